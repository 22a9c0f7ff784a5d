"""Inputs to verify on, drawn like the example; what the reference gives for them; other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def pool(example: Example, inputs: Sequence[Any] | None, num_inputs: int) -> list[Example]:
    """The inputs to pool errors over: those given, or the example and others drawn like it.

    Raises:
        VerificationError: There is none.
    """
    if inputs is not None:
        given = [_given(x) for x in inputs]
        if not given:
            raise VerificationError("inputs is empty; give at least one, or leave it out")
        return given
    if not isinstance(num_inputs, int) or num_inputs < 1:
        raise VerificationError(f"num_inputs={num_inputs} verifies nothing; use 8 or more")
    generator = torch.Generator().manual_seed(0)
    return [example, *(drawn(example, generator) for _ in range(num_inputs - 1))]


def _given(x: Any) -> Example:
    if isinstance(x, dict):
        return Example((), x)
    return as_sample(x)


def drawn(example: Example, generator: torch.Generator) -> Example:
    """Random tensors like those of `example`; everything else is the same."""
    args, kwargs = pytree.tree_map(
        lambda leaf: _draw(leaf, generator), (example.args, dict(example.kwargs))
    )
    return Example(args, kwargs)


def _draw(leaf: Any, generator: torch.Generator) -> Any:
    """A random tensor like `leaf`: mean and spread of its floats, range of its integers."""
    if not isinstance(leaf, Tensor) or leaf.numel() == 0:
        return leaf
    if leaf.dtype is torch.bool:
        return (torch.rand(leaf.shape, generator=generator) < 0.5).to(leaf.device)
    if not leaf.is_floating_point():
        low, high = int(leaf.min()), int(leaf.max())
        return torch.randint(low, high + 1, leaf.shape, generator=generator).to(leaf)
    wide = leaf.detach().double().cpu()
    spread = float(wide.std(correction=0)) or 1.0
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    value = noise * spread + wide.mean()
    # What is not negative may have to stay so: a probability, a length, the argument of a root.
    return (value.abs() if bool((wide >= 0).all()) and bool(wide.any()) else value).to(leaf)


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
