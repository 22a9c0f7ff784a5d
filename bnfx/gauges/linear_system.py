"""Sparse linear equations in solved form, added in batches and taken back.

Every unknown is either free or defined by unknowns of lower order:

    x_p = k + sum_j c_j x_j        with order(x_j) < order(x_p)

so that definitions never form a circle. A batch of equations is substituted, and each row that is
left with unknowns defines the one of highest order. Rows that claim the same unknown wait for the
next round. All rows of a batch are handled at once by numpy.

The same code solves over the integers modulo 2, where the unknowns are signs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfx.numbers import Floats, Ints

Flags = npt.NDArray[np.bool_]

#: Terms that cancel to less than this part of themselves count as zero. A chain of ten float64
#: operations errs by some 1e-15; refusing an equation that holds costs a fold, not exactness.
_TOLERANCE = 1e-13

#: Rows that are substituted at a time, which bounds the memory that it takes meanwhile.
_BLOCK = 8192


@dataclass(frozen=True)
class Rows:
    """Equations sum_j coefficients[:, j] x[unknowns[:, j]] + constant = 0, one for each row."""

    #: (rows, terms); -1 where a row has fewer terms.
    unknowns: Ints
    #: (rows, terms).
    coefficients: Floats
    #: (rows,).
    constant: Floats
    #: (rows,), sum of the magnitudes that went into `constant`.
    size: Floats

    @staticmethod
    def of(
        *terms: tuple[Ints, Floats | float], constant: Floats | float = 0.0, floor: float = 0.0
    ) -> Rows:
        """One row for each entry of the index arrays; `floor` is the least `size`."""
        count = len(terms[0][0])
        unknowns = np.stack([index for index, _ in terms], axis=1).astype(np.int64)
        coefficients = np.stack([np.broadcast_to(c, (count,)) for _, c in terms], axis=1)
        constants = np.broadcast_to(np.asarray(constant, np.float64), (count,)).copy()
        size = np.maximum(np.abs(constants), floor)
        return Rows(unknowns, coefficients.astype(np.float64), constants, size)

    def copy(self) -> Rows:
        """An independent copy."""
        return self.take(np.arange(len(self.constant)))

    def take(self, which: npt.NDArray[Any] | slice) -> Rows:
        """The chosen rows."""
        return Rows(
            self.unknowns[which], self.coefficients[which], self.constant[which], self.size[which]
        )


@dataclass
class LinearSystem:
    """Equations in solved form."""

    #: (unknowns,), a permutation: of the unknowns of a row, the highest becomes defined.
    order: Ints
    #: 0 for the reals, 2 for signs.
    modulus: int = 0
    defined: Flags = field(init=False)
    rows: Rows = field(init=False)
    journal: list[Ints] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.order)
        self.defined = np.zeros(count, bool)
        self.rows = Rows(
            np.full((count, 2), -1), np.zeros((count, 2)), np.zeros(count), np.zeros(count)
        )

    def copy(self) -> LinearSystem:
        """An independent copy; its journal starts empty."""
        other = LinearSystem(self.order, self.modulus)
        other.defined = self.defined.copy()
        other.rows = self.rows.copy()
        return other

    def add(self, rows: Rows) -> Ints:
        """Add equations. The indices of those that contradict what is there; these are left out."""
        waiting = np.arange(len(rows.constant))
        wrong: list[Ints] = []
        while len(waiting):
            rows = self.substituted(rows)
            known = np.asarray((rows.unknowns < 0).all(axis=1))
            off = np.abs(rows.constant) > _TOLERANCE * rows.size
            wrong.append(waiting[known & off])
            rows, waiting = rows.take(~known), waiting[~known]
            if not len(waiting):
                break
            heights = np.where(rows.unknowns < 0, -1, self.order[rows.unknowns])
            column = heights.argmax(axis=1)
            pivot = rows.unknowns[np.arange(len(waiting)), column]
            _, first = np.unique(pivot, return_index=True)
            self._define(rows.take(first), column[first])
            left = np.ones(len(waiting), bool)
            left[first] = False
            rows, waiting = rows.take(left), waiting[left]
        return np.sort(np.concatenate(wrong)) if wrong else np.zeros(0, np.int64)

    def mark(self) -> int:
        """A point to which `undo` can go back."""
        return len(self.journal)

    def undo(self, mark: int) -> None:
        """Forget all equations added since `mark`."""
        while len(self.journal) > mark:
            self.defined[self.journal.pop()] = False

    def flatten(self) -> None:
        """Write every definition in free unknowns. What was added before cannot be undone."""
        which = np.flatnonzero(self.defined)
        flat = self.substituted(self.rows.take(which))
        self._store(which, flat)
        self.journal.clear()

    def substituted(self, rows: Rows) -> Rows:
        """The rows in free unknowns, like terms collected."""
        starts = range(0, max(len(rows.constant), 1), _BLOCK)
        parts = (rows.take(np.s_[start : start + _BLOCK]) for start in starts)
        return _joined([self._block(part) for part in parts])

    def _block(self, rows: Rows) -> Rows:
        rows = self._collected(rows)
        while True:
            replace = (rows.unknowns >= 0) & self.defined[rows.unknowns]
            touched = np.asarray(replace.any(axis=1))
            if not touched.any():
                return rows
            done = self._collected(self._once(rows.take(touched), replace[touched]))
            rows = _merged(rows, touched, done)

    def _once(self, rows: Rows, replace: Flags) -> Rows:
        index = np.where(replace, rows.unknowns, 0)
        factor = np.where(replace, rows.coefficients, 0.0)
        inner = self.rows.take(index.reshape(-1))
        width, count = inner.unknowns.shape[1], len(index)
        used = np.repeat(replace.reshape(-1), width).reshape(-1, width)
        unknowns = np.where(used, inner.unknowns, -1).reshape(count, -1)
        coefficients = (inner.coefficients * factor.reshape(-1, 1)).reshape(count, -1)
        constants = inner.constant.reshape(count, -1) * factor
        sizes = inner.size.reshape(count, -1) * np.abs(factor)
        return Rows(
            np.concatenate([np.where(replace, -1, rows.unknowns), unknowns], axis=1),
            np.concatenate([rows.coefficients, coefficients], axis=1),
            rows.constant + constants.sum(axis=1),
            rows.size + sizes.sum(axis=1),
        )

    def _collected(self, rows: Rows) -> Rows:
        """Each unknown once per row, terms that cancel dropped, to the left."""
        order = np.argsort(rows.unknowns, axis=1, kind="stable")
        unknowns = np.take_along_axis(rows.unknowns, order, 1)
        coefficients = np.take_along_axis(rows.coefficients, order, 1)
        sizes = np.abs(coefficients)
        for j in range(1, unknowns.shape[1]):
            same = (unknowns[:, j] == unknowns[:, j - 1]) & (unknowns[:, j] >= 0)
            coefficients[same, j] += coefficients[same, j - 1]
            sizes[same, j] += sizes[same, j - 1]
            unknowns[same, j - 1] = -1
        constant, size = rows.constant, rows.size
        if self.modulus:
            coefficients, constant = coefficients % self.modulus, constant % self.modulus
            size = np.ones_like(constant)
        unknowns[np.abs(coefficients) <= _TOLERANCE * sizes] = -1
        left = np.argsort(unknowns < 0, axis=1, kind="stable")
        width = max(1, int((unknowns >= 0).sum(axis=1).max(initial=0)))
        return Rows(
            np.take_along_axis(unknowns, left, 1)[:, :width],
            np.take_along_axis(coefficients, left, 1)[:, :width],
            constant,
            size,
        )

    def _define(self, rows: Rows, column: Ints) -> None:
        lane = np.arange(len(column))
        pivot = rows.unknowns[lane, column]
        factor = -1.0 / rows.coefficients[lane, column]
        unknowns = rows.unknowns.copy()
        unknowns[lane, column] = -1
        coefficients = rows.coefficients * factor[:, None]
        solved = Rows(unknowns, coefficients, rows.constant * factor, rows.size * np.abs(factor))
        self._store(pivot, self._collected(solved))
        self.defined[pivot] = True
        self.journal.append(pivot)

    def _store(self, index: Ints, rows: Rows) -> None:
        width, wide = rows.unknowns.shape[1], self.rows.unknowns.shape[1]
        if width > wide:
            self.rows = _widened(self.rows, width)
            wide = width
        rows = _widened(rows, wide)
        self.rows.unknowns[index] = rows.unknowns
        self.rows.coefficients[index] = rows.coefficients
        self.rows.constant[index] = rows.constant
        self.rows.size[index] = rows.size


def _widened(rows: Rows, width: int) -> Rows:
    more = width - rows.unknowns.shape[1]
    if more <= 0:
        return rows
    pad = ((0, 0), (0, more))
    return Rows(
        np.pad(rows.unknowns, pad, constant_values=-1),
        np.pad(rows.coefficients, pad),
        rows.constant,
        rows.size,
    )


def _joined(parts: list[Rows]) -> Rows:
    """All rows of `parts`, of which there is one at least."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.unknowns.shape[1] for part in parts)
    wide = [_widened(part, width) for part in parts]
    return Rows(
        np.concatenate([part.unknowns for part in wide]),
        np.concatenate([part.coefficients for part in wide]),
        np.concatenate([part.constant for part in wide]),
        np.concatenate([part.size for part in wide]),
    )


def _merged(rows: Rows, touched: Flags, done: Rows) -> Rows:
    width = max(rows.unknowns.shape[1], done.unknowns.shape[1])
    rows, done = _widened(rows, width), _widened(done, width)
    result = rows.copy()
    result.unknowns[touched] = done.unknowns
    result.coefficients[touched] = done.coefficients
    result.constant[touched] = done.constant
    result.size[touched] = done.size
    return result


def classes(count: int, pairs: list[tuple[Ints, Ints]]) -> Ints:
    """The smallest member of each element's class, where the pairs are equal: (count,)."""
    parent = np.arange(count)
    if not pairs:
        return parent
    left = np.concatenate([a for a, _ in pairs])
    right = np.concatenate([b for _, b in pairs])
    while True:
        a, b = parent[left], parent[right]
        differ = a != b
        if not differ.any():
            return parent
        left, right, a, b = left[differ], right[differ], a[differ], b[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parent, higher := parent[parent]):
            parent = higher
