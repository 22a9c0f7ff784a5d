"""What a pass declares to leave as it is, and the check of that declaration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto

import torch
from torch import Tensor

from bnfx.errors import CaptureError, FoldError, RecipeError


class Preserved(Flag):
    """What stays, compared with the model, or the graph, before the pass."""

    SIGNATURE = auto()  # arguments by name, and the structure of what is returned
    STATE_KEYS = auto()  # names, shapes and types in the state_dict, in any order
    STATE_VALUES = auto()  # the values, to the bit, but for those that a record names
    EVAL_OUTPUTS = auto()  # outputs in eval mode, to the bit
    RUNS = auto()  # the model runs on the example


@dataclass(frozen=True)
class GraphFacts:
    """What is cheap to compare of two inference graphs, so that it is compared after each pass.

    Outputs are not: two runs in float64 take longer than the passes do, and a rounded one tells
    little. The rules are exact, and `verify_onnx` compares what comes out in the end.
    """

    inputs: tuple[str, ...]
    outputs: object
    #: Parameters and buffers that the graph reads.
    tensors: Mapping[str, object]
    #: Names of those that passes have written so far.
    named: frozenset[str]

    def check(self, name: str, declared: Preserved, after: GraphFacts) -> None:
        """Raise FoldError unless the pass `name` preserved what it declares."""
        signature = (self.inputs, self.outputs) == (after.inputs, after.outputs)
        if Preserved.SIGNATURE in declared and not signature:
            raise FoldError(
                f"{name} must keep the arguments and the structure of the result, but changed "
                f"{self.inputs} -> {self.outputs} to {after.inputs} -> {after.outputs}; please "
                "report the model"
            )
        moved = sorted(
            key
            for key, value in after.tensors.items()
            if key not in after.named and value is not self.tensors.get(key)
        )
        if Preserved.STATE_VALUES in declared and moved:
            raise FoldError(
                f"{name} changed {moved[0]!r}{_more(moved)} without saying so; please report the "
                "model"
            )


@dataclass(frozen=True)
class ModelFacts:
    """What is compared of a model that trains, before and after a pass."""

    #: Class of the model given.
    kind: str
    state: Mapping[str, object]
    #: The state of the model given.
    source: Mapping[str, object]
    #: Names in the state_dict whose values passes say they have changed so far.
    named: Collection[str]
    #: Floating-point outputs on the example, in eval mode; why there are none if it does not run.
    outputs: Sequence[Tensor] | CaptureError | None

    def check(self, name: str, declared: Preserved, after: ModelFacts) -> None:
        """Raise RecipeError unless the pass `name` preserved what it declares."""
        if isinstance(self.outputs, CaptureError):
            raise self.outputs
        if Preserved.STATE_KEYS in declared:
            self._check_keys(name, after)
        if Preserved.STATE_VALUES in declared:
            self._check_values(name, after)
        if isinstance(after.outputs, CaptureError):
            error = after.outputs.__cause__
            raise RecipeError(
                f"{self.kind} does not run any more after {name}: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}. Its code asks a module for something that an "
                "edited one does not have; exclude that module"
            ) from error
        if Preserved.EVAL_OUTPUTS in declared and self.outputs is not None:
            self._check_outputs(name, self.outputs, after.outputs or ())

    def _check_keys(self, name: str, after: ModelFacts) -> None:
        ours, theirs = (
            {k: (v.shape, v.dtype) for k, v in _tensors(facts.state) if k not in after.named}
            for facts in (self, after)
        )
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if differing:
            raise RecipeError(
                f"{name} must keep the state_dict's names and shapes, but changed {differing[0]!r}"
                f"{_more(differing)} in {self.kind}; please report the model"
            )

    def _check_values(self, name: str, after: ModelFacts) -> None:
        theirs = {k: v for k, v in _tensors(after.state) if k not in after.named}
        source = _tensors(self.source)
        moved = [k for k, v in source if k in theirs and not _same(v, theirs[k])]
        if moved:
            raise RecipeError(
                f"{name} must keep parameters and buffers, but changed the values of {moved[0]!r}"
                f"{_more(moved)} in {self.kind}; please report the model"
            )

    def _check_outputs(self, name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        if len(ours) != len(theirs):
            raise RecipeError(
                f"{name} changed the structure of the output; please report the model"
            )
        for i, (old, new) in enumerate(zip(ours, theirs, strict=True)):
            if not _same(old, new):
                raise RecipeError(
                    f"{name} must keep outputs in eval mode, but output {i} of {self.kind} moved "
                    f"by {_distance(old, new)}; exclude the modules in question, or report it"
                )


def _tensors(state: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):  # extra state may be anything
            yield key, value


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta or torch.equal(a, b):  # which needs no memory
        return True
    equal = (a == b) | ((a != a) & (b != b))  # NaN equals NaN here
    return bool(equal.all())


def _distance(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"a change of shape, {tuple(a.shape)} to {tuple(b.shape)}"
    return f"{float((a.double() - b.double()).abs().max()):.3g}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
