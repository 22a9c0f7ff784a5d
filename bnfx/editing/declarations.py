"""What a pass declares to leave as it is, and the check of that declaration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto

from torch import Tensor, nn

from bnfx.editing.preservation import run
from bnfx.errors import FoldError, RecipeError
from bnfx.graphs.examples import Example, clone


class Preserved(Flag):
    """What stays, compared with the model, or the graph, before the pass."""

    SIGNATURE = auto()  # arguments by name, and the structure of what is returned
    STATE_KEYS = auto()  # names, shapes and types in the state_dict, in any order
    STATE_VALUES = auto()  # the values, to the bit, but for those that a record names
    EVAL_OUTPUTS = auto()  # outputs in eval mode, to the bit


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


def check_preserved(
    name: str,
    declared: Preserved,
    before: nn.Module,
    after: nn.Module,
    given: Example | None,
    named: Collection[str] = (),
) -> None:
    """Compare two models with what the pass `name` declares to preserve.

    Args:
        name: Of the pass, for the message.
        declared: What to compare.
        before: The model given.
        after: What the pass made of it.
        given: Inputs to run both on; without them outputs are not compared.
        named: Names in the state_dict whose values the pass says it has changed.

    Raises:
        RecipeError: Something that should have stayed did not, or `after` does not run.
    """
    if Preserved.STATE_KEYS in declared:
        _check_keys(name, before, after)
    if Preserved.STATE_VALUES in declared:
        _check_values(name, before, after, named)
    if given is None:
        return
    outputs = _run_edited(name, after, given)
    if Preserved.EVAL_OUTPUTS in declared:
        _check_outputs(name, before, _outputs(before, given), outputs)


def _check_keys(name: str, before: nn.Module, after: nn.Module) -> None:
    ours, theirs = ({k: (v.shape, v.dtype) for k, v in _state(m)} for m in (before, after))
    differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if differing:
        raise RecipeError(
            f"{name} must keep the state_dict's names and shapes, but changed {differing[0]!r}"
            f"{_more(differing)} in {type(before).__name__}; please report the model"
        )


def _check_values(name: str, before: nn.Module, after: nn.Module, named: Collection[str]) -> None:
    theirs = {k: v for k, v in _state(after) if k not in named}
    moved = [k for k, v in _state(before) if k in theirs and not _same(v, theirs[k])]
    if moved:
        raise RecipeError(
            f"{name} must keep parameters and buffers, but changed the values of {moved[0]!r}"
            f"{_more(moved)} in {type(before).__name__}; please report the model"
        )


def _run_edited(name: str, after: nn.Module, given: Example) -> list[Tensor]:
    try:
        return _outputs(after, given)
    except Exception as error:  # a user's forward raises anything
        raise RecipeError(
            f"{type(after).__name__} does not run any more after {name}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}. Its code asks a module for something that an "
            "edited one does not have; exclude that module"
        ) from error


def _check_outputs(name: str, before: nn.Module, ours: list[Tensor], theirs: list[Tensor]) -> None:
    if len(ours) != len(theirs):
        raise RecipeError(f"{name} changed the structure of the output; please report the model")
    for i, (old, new) in enumerate(zip(ours, theirs, strict=True)):
        if not _same(old, new):
            raise RecipeError(
                f"{name} must keep outputs in eval mode, but output {i} of {type(before).__name__} "
                f"moved by {_distance(old, new)}; exclude the modules in question, or report it"
            )


def _outputs(model: nn.Module, given: Example) -> list[Tensor]:
    """Floating-point outputs of a copy in eval mode, with one state of the random generator."""
    return run(clone(model).eval(), given, None)


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):  # extra state may be anything
            yield key, value


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return True
    equal = (a == b) | ((a != a) & (b != b))  # NaN equals NaN here
    return bool(equal.all())


def _distance(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"a change of shape, {tuple(a.shape)} to {tuple(b.shape)}"
    return f"{float((a.double() - b.double()).abs().max()):.3g}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
