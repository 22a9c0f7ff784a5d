"""Inputs, what the reference computes on them, and what that says about other batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfx.numbers import UNIT, Array
from bnfx.verification.outputs import relative_error

#: How many times its own error the reference may be from rows put together, which are then truth.
_ROOM = 2.0
_UNIT_OF = {"float16": UNIT["fp16"], "bfloat16": UNIT["bf16"]}


@dataclass(frozen=True)
class Sample:
    """One input: positional arguments and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """Outputs of the reference on some inputs, one list of arrays for each.

    Attributes:
        own: As the reference is.
        rounded: In the deployed precision.
        exact: In float64.
        dtypes: Names of the dtypes of its outputs as it is.
    """

    own: list[list[Array]]
    rounded: list[list[Array]]
    exact: list[list[Array]]
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

    Attributes:
        runs: What was computed before, each of `batch` rows.
        batch: Rows of each input of before.
        rows: For each new input the (input, row) of before that its rows are; None if unknown.
    """

    runs: Runs
    batch: int | None
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
