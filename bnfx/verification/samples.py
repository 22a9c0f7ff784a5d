"""Inputs to verify on, drawn like the example; what the reference gives for them; other batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.errors import VerificationError
from bnfx.graphs.examples import Example
from bnfx.numbers import UNIT, Array, relative_error

_OTHER_BATCHES = (1, 2, 7)


def as_sample(args: Any, kwargs: Any = None) -> Example:
    """An example as arguments (a lone tensor is accepted).

    Raises:
        VerificationError: It is neither a sequence nor a tensor.
    """
    if not isinstance(args, Tensor | tuple | list):
        raise VerificationError(
            f"args is a {type(args).__name__}; give a tuple of positional arguments, or one tensor"
        )
    return Example((args,) if isinstance(args, Tensor) else tuple(args), dict(kwargs or {}))


class Runnable(Protocol):
    """A reference, as far as drawing inputs for it goes."""

    def run(self, samples: Sequence[Example], known: RowTruths | None = None) -> Runs:
        """What it gives for them."""


def pool(
    reference: Runnable,
    example: Example,
    inputs: Sequence[Any] | None,
    num_inputs: int,
    *,
    drawn_too: bool,
) -> tuple[list[Example], Runs]:
    """The inputs to pool errors over, and what the reference gives for them.

    These are the inputs given, or the example and others drawn like it: freely at first; where the
    reference fails on those, gives NaN or nothing, floats are drawn positive, and then integers
    left as they are in the example. Where nothing drawn will do, the example is the only one.

    Args:
        reference: What runs on them.
        example: Shapes, dtypes and ranges.
        inputs: Inputs to take as they are.
        num_inputs: How many to make.
        drawn_too: Whether the example was drawn itself, and may be drawn otherwise.

    Raises:
        VerificationError: There is none, or the reference fails on those that were given.
    """
    if inputs is not None:
        given = [_given(x) for x in inputs]
        if not given:
            raise VerificationError("inputs is empty; give at least one, or leave it out")
        return given, reference.run(given)
    if not isinstance(num_inputs, int) or num_inputs < 1:
        raise VerificationError(f"num_inputs={num_inputs} verifies nothing; use 8 or more")
    for positive, whole in ((False, True), (True, True), (False, False), (True, False)):
        generator = torch.Generator().manual_seed(0)
        draw = partial(_draw, generator=generator, positive=positive, whole=whole)
        first = _mapped(_positive, example) if drawn_too and positive else example
        made = [first, *(_mapped(draw, example) for _ in range(num_inputs - 1))]
        try:
            runs = reference.run(made)
        except VerificationError:
            continue
        if runs.tell(0 if drawn_too else 1):
            return made, runs
    return [example], reference.run([example])


def _given(x: Any) -> Example:
    if isinstance(x, dict):
        return Example((), x)
    return as_sample(x)


def _mapped(function: Callable[[Any], Any], example: Example) -> Example:
    """The example with each leaf replaced."""
    args, kwargs = pytree.tree_map(function, (example.args, dict(example.kwargs)))
    return Example(args, kwargs)


def _positive(leaf: Any) -> Any:
    return leaf.abs() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _draw(leaf: Any, *, generator: torch.Generator, positive: bool, whole: bool) -> Any:
    """A random tensor like `leaf`: mean and spread of its floats, range of its integers.

    Args:
        leaf: The tensor; anything else is left as it is.
        generator: Where the numbers come from.
        positive: Whether floats get no sign.
        whole: Whether integers are drawn too.
    """
    if not isinstance(leaf, Tensor) or leaf.numel() == 0:
        return leaf
    floating = leaf.is_floating_point() or leaf.is_complex()
    if not floating and not whole:
        return leaf
    if leaf.dtype is torch.bool:
        return (torch.rand(leaf.shape, generator=generator) < 0.5).to(leaf.device)
    if not floating:
        values = leaf.cpu().numpy()  # torch has no least value of unsigned integers
        low, high = int(values.min()), int(values.max())
        if high - low >= 2**62:
            return leaf
        return (torch.randint(0, high - low + 1, leaf.shape, generator=generator) + low).to(leaf)
    wide = leaf.detach().cpu().to(torch.complex128 if leaf.is_complex() else torch.float64)
    wide = torch.view_as_real(wide) if leaf.is_complex() else wide
    known = wide[torch.isfinite(wide)]
    spread = (float(known.std(correction=0)) if known.numel() else 0.0) or 1.0
    noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
    value = noise * spread + (known.mean() if known.numel() else 0.0)
    # What is not negative may have to stay so: a probability, a length, the argument of a root.
    if positive or (bool((known >= 0).all()) and bool(known.any())):
        value = value.abs()
    return (torch.view_as_complex(value) if leaf.is_complex() else value).to(leaf)


def batch_of(example: Example) -> int | None:
    """Size of the first axis of the first tensor."""
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    first = next((x for x in leaves if isinstance(x, Tensor)), None)
    return first.shape[0] if first is not None and first.dim() else None


def symbolic_batch(values: Sequence[onnx.ValueInfoProto]) -> str | None:
    """Name of the symbolic size of the inputs' first axes; None where one of them is fixed.

    Scalars have no batch and do not count.
    """
    firsts = [v.type.tensor_type.shape.dim for v in values]
    names = {dims[0].dim_param for dims in firsts if dims}
    return names.pop() if len(names) == 1 and "" not in names else None


def other_batches(
    values: Sequence[onnx.ValueInfoProto], example: Example, wanted: Sequence[int] | None
) -> tuple[int, ...]:
    """Batch sizes to run besides that of the example.

    Raises:
        VerificationError: One of those wanted is no size.
    """
    own = batch_of(example)
    if wanted is not None:
        return _sizes(wanted)
    if own is None or symbolic_batch(values) is None:
        return ()
    return tuple(size for size in _OTHER_BATCHES if size != own)


def _sizes(wanted: Sequence[int]) -> tuple[int, ...]:
    sizes = isinstance(wanted, Sequence) and all(isinstance(n, int) and n >= 1 for n in wanted)
    if not sizes:
        raise VerificationError(f"batch_sizes={wanted!r} must be integers of at least 1")
    return tuple(wanted)


def resized(samples: Sequence[Example], size: int) -> Example:
    """An input of another batch size, with rows of all `samples` in turns.

    Every tensor with the batch of the first one along its first axis is resized.
    """
    own = batch_of(samples[0])
    trees = [(sample.args, dict(sample.kwargs)) for sample in samples]
    flat = [pytree.tree_flatten(tree) for tree in trees]
    leaves = []
    for column in zip(*(values for values, _ in flat), strict=True):
        first = column[0]
        if not isinstance(first, Tensor) or not first.dim() or first.shape[0] != own:
            leaves.append(first)
            continue
        fitting = [leaf for leaf in column if leaf.shape[1:] == first.shape[1:]]
        rows = torch.cat(fitting)
        # One row of each sample first, so that a batch of two already holds two of them.
        order = torch.arange(len(rows)).reshape(len(fitting), -1).T.reshape(-1)
        picks = order[torch.arange(size) % len(order)]
        leaves.append(rows[picks.to(rows.device)])
    args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
    return Example(args, kwargs)


def rows_of(samples: Sequence[Example], size: int) -> list[tuple[int, int]] | None:
    """Sample and row within it that each row of `resized(samples, size)` is.

    None where samples differ in shape, so that tensors of one input come from several.
    """
    own = batch_of(samples[0])
    shapes = [
        [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(tree)]
        for tree in ((sample.args, dict(sample.kwargs)) for sample in samples)
    ]
    if not own or any(shape != shapes[0] for shape in shapes):
        return None
    count = len(samples) * own
    return [(i % len(samples), i // len(samples)) for i in (i % count for i in range(size))]


#: How many times its own error the reference may be from rows put together, which are then truth.
_ROOM = 2.0
_UNIT_OF = {"float16": UNIT["fp16"], "bfloat16": UNIT["bf16"]}


@dataclass(frozen=True)
class Runs:
    """Outputs of the reference on some inputs, one list of arrays for each."""

    #: As the reference is.
    own: list[list[Array]]
    #: In the deployed precision.
    rounded: list[list[Array]]
    #: In float64.
    exact: list[list[Array]]
    #: Names of the dtypes of its outputs as it is.
    dtypes: tuple[str, ...]

    def tell(self, start: int) -> bool:
        """Whether no input from `start` on gives more NaNs or empty outputs than the first."""
        counts = [sum(map(_nans, outs)) for outs in self.exact]
        empty = [sum(not array.size for array in outs) for outs in self.exact]
        return all(
            mine <= found[0] * bool(start) for found in (counts, empty) for mine in found[start:]
        )

    def __add__(self, more: Runs) -> Runs:
        """Both, one after the other."""
        own, rounded, exact = (
            [*a, *b]
            for a, b in zip(
                (self.own, self.rounded, self.exact),
                (more.own, more.rounded, more.exact),
                strict=True,
            )
        )
        return Runs(own, rounded, exact, self.dtypes)


@dataclass(frozen=True)
class RowTruths:
    """Outputs in float64 for inputs whose rows are rows of inputs that were run before.

    They are the rows of the outputs of before, if the rows of a batch know nothing of each other.
    That is measured: the reference as it is runs on the new batch and must be as near to those rows
    as it is to float64 elsewhere, to a factor of 2.
    """

    #: What was computed before, each of `batch` rows.
    runs: Runs
    #: Rows of each input of before.
    batch: int | None
    #: For each new input the (input, row) of before that its rows are; None if unknown.
    rows: Sequence[Sequence[tuple[int, int]] | None]

    def of(self, which: int, own: Sequence[Array]) -> list[Array] | None:
        """The outputs for a new input; None where they must be computed.

        Args:
            which: Number of the new input.
            own: What the reference as it is computes for it.
        """
        rows = self.rows[which]
        if rows is None or len(own) != len(self.runs.exact[0]):
            return None
        truths = []
        for k, mine in enumerate(own):
            before = [outs[k] for outs in self.runs.exact]
            if any(a.ndim == 0 or a.shape != before[0].shape for a in before):
                return None
            if before[0].shape[0] != self.batch:
                return None
            truth = np.stack([before[i][j] for i, j in rows])
            if not self._near(k, mine, truth):
                return None
            truths.append(truth)
        return truths

    def _near(self, k: int, mine: Array, truth: Array) -> bool:
        if mine.shape != truth.shape:
            return False
        if not np.issubdtype(truth.dtype, np.inexact):
            return bool(np.array_equal(mine, truth))
        if not np.array_equal(np.isfinite(mine), np.isfinite(truth)):
            return False
        own = [outs[k] for outs in self.runs.own]
        before = [outs[k] for outs in self.runs.exact]
        budget = max(relative_error(own, before), _UNIT_OF.get(self.runs.dtypes[k], UNIT["fp32"]))
        return relative_error([mine], [truth]) <= _ROOM * budget


def _nans(array: Array) -> int:
    return int(np.isnan(array).sum()) if np.issubdtype(array.dtype, np.inexact) else 0
