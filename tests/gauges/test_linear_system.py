"""The solver of sparse equations, held against elimination in exact fractions and by trying all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfx.gauges.linear_system import LinearSystem, Rows, classes
from bnfx.numbers import Ints

#: sum of coefficients times unknowns + constant = 0; an unknown may come twice.
Equation = tuple[list[tuple[int, int]], int]

_UNKNOWNS = 5
_SOME = settings(max_examples=50, deadline=None)


def equations(coefficients: Sequence[int]) -> st.SearchStrategy[list[Equation]]:
    term = st.tuples(st.integers(0, _UNKNOWNS - 1), st.sampled_from(coefficients))
    one = st.tuples(st.lists(term, min_size=1, max_size=3), st.integers(-3, 3))
    return st.lists(one, min_size=1, max_size=8)


REAL = equations([-3, -2, -1, 1, 2, 3])
SIGNS = equations([1])
ORDERS = st.permutations(range(_UNKNOWNS)).map(np.array)


def rows(some: Sequence[Equation]) -> Rows:
    """Equations as the solver takes them; short ones are filled with terms of factor 0."""
    width = max(len(terms) for terms, _ in some)
    filled = [[*terms, *[(0, 0)] * (width - len(terms))] for terms, _ in some]
    columns = [
        (np.array([row[k][0] for row in filled]), np.array([float(row[k][1]) for row in filled]))
        for k in range(width)
    ]
    return Rows.of(*columns, constant=np.array([float(c) for _, c in some]), floor=1.0)


def dense(equation: Equation) -> list[Fraction]:
    row = [Fraction(0)] * (_UNKNOWNS + 1)
    for unknown, factor in equation[0]:
        row[unknown] += factor
    row[-1] = Fraction(equation[1])
    return row


def reduced(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """Reduced row echelon form, the constants last; without rows of zeros."""
    matrix = [list(row) for row in matrix]
    done = 0
    for column in range(_UNKNOWNS + 1):
        pivot = next((i for i in range(done, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[done], matrix[pivot] = matrix[pivot], matrix[done]
        matrix[done] = [value / matrix[done][column] for value in matrix[done]]
        for i, row in enumerate(matrix):
            if i != done and row[column]:
                factor = row[column]
                matrix[i] = [a - factor * b for a, b in zip(row, matrix[done], strict=True)]
        done += 1
    return matrix[:done]


def contradicts(some: Sequence[Equation]) -> bool:
    return any(not any(row[:-1]) for row in reduced([dense(e) for e in some]))


def solutions(some: Sequence[Equation]) -> set[tuple[int, ...]]:
    """All assignments of 0 and 1 that hold modulo 2."""
    return {
        bits
        for bits in itertools.product((0, 1), repeat=_UNKNOWNS)
        if all((sum(c * bits[x] for x, c in terms) + k) % 2 == 0 for terms, k in some)
    }


def value_of(system: LinearSystem, free: Sequence[float]) -> np.ndarray:
    """All unknowns, where those that are free have these values."""
    flat = system.substituted(Rows.of((np.arange(_UNKNOWNS), 1.0)))
    terms = np.where(flat.unknowns < 0, 0.0, np.array(free)[flat.unknowns]) * flat.coefficients
    return np.asarray(terms.sum(axis=1) + flat.constant)


@_SOME
@given(REAL, ORDERS, st.lists(st.integers(-5, 5), min_size=_UNKNOWNS, max_size=_UNKNOWNS))
def test_what_is_accepted_holds_for_any_values_of_what_is_free(
    some: list[Equation], order: Ints, free: list[int]
) -> None:
    system = LinearSystem(order)
    wrong = set(system.add(rows(some)).tolist())
    x = value_of(system, [float(value) for value in free])
    for index, (terms, constant) in enumerate(some):
        if index not in wrong:
            size = sum(abs(c * x[u]) for u, c in terms) + abs(constant) + 1
            assert abs(sum(c * x[u] for u, c in terms) + constant) <= 1e-10 * size
    for unknown in np.flatnonzero(~system.defined):
        assert x[unknown] == free[unknown]


@_SOME
@given(REAL, ORDERS)
def test_only_what_contradicts_is_refused(some: list[Equation], order: Ints) -> None:
    system = LinearSystem(order)
    wrong = system.add(rows(some)).tolist()
    kept = [equation for i, equation in enumerate(some) if i not in wrong]
    assert not contradicts(kept)
    assert all(contradicts([*kept, some[i]]) for i in wrong)
    assert int(system.defined.sum()) == len(reduced([dense(e) for e in kept]))


@_SOME
@given(REAL, REAL, ORDERS)
def test_one_batch_or_two_say_the_same(
    first: list[Equation], second: list[Equation], order: Ints
) -> None:
    system = LinearSystem(order)
    wrong = system.add(rows(first)).tolist()
    kept = [equation for i, equation in enumerate(first) if i not in wrong]
    refused = set(system.add(rows(second)).tolist())
    assert all(contradicts([*kept, *second]) for _ in refused)
    assert refused or not contradicts([*kept, *second])


@_SOME
@given(REAL, REAL, ORDERS)
def test_what_is_taken_back_leaves_no_trace(
    first: list[Equation], second: list[Equation], order: Ints
) -> None:
    system = LinearSystem(order)
    system.add(rows(first))
    before, free = value_of(system, range(_UNKNOWNS)), system.defined.copy()
    mark, other = system.mark(), system.copy()
    system.add(rows(second))
    system.undo(mark)
    assert np.array_equal(system.defined, free)
    assert np.array_equal(value_of(system, range(_UNKNOWNS)), before)
    assert np.array_equal(value_of(other, range(_UNKNOWNS)), before)


@_SOME
@given(REAL, REAL, ORDERS)
def test_flattening_changes_no_solution(
    first: list[Equation], second: list[Equation], order: Ints
) -> None:
    plain, flat = LinearSystem(order), LinearSystem(order)
    for system in (plain, flat):
        system.add(rows(first))
    flat.flatten()
    assert not flat.defined[flat.rows.unknowns[flat.defined]][
        flat.rows.unknowns[flat.defined] >= 0
    ].any()
    wrong = [system.add(rows(second)).tolist() for system in (plain, flat)]
    assert wrong[0] == wrong[1]
    np.testing.assert_allclose(
        value_of(plain, range(_UNKNOWNS)), value_of(flat, range(_UNKNOWNS)), rtol=1e-9, atol=1e-9
    )


@_SOME
@given(SIGNS, ORDERS)
def test_signs_have_the_solutions_that_trying_all_finds(some: list[Equation], order: Ints) -> None:
    system = LinearSystem(order, 2)
    wrong = system.add(rows(some)).tolist()
    kept = [equation for i, equation in enumerate(some) if i not in wrong]
    found = {
        tuple(int(v) for v in value_of(system, free) % 2)
        for free in itertools.product((0, 1), repeat=_UNKNOWNS)
    }
    assert found == solutions(kept)
    assert all(not solutions([*kept, some[i]]) for i in wrong)


def test_the_highest_in_order_is_defined() -> None:
    system = LinearSystem(np.array([2, 0, 1]))
    system.add(Rows.of((np.array([0]), 1.0), (np.array([1]), 1.0), (np.array([2]), 1.0)))
    assert system.defined.tolist() == [True, False, False]


def test_what_cancels_to_rounding_is_zero() -> None:
    system = LinearSystem(np.arange(2))
    system.add(Rows.of((np.array([1]), 3.0), (np.array([0]), -1.0), constant=0.1))
    again = Rows.of((np.array([1]), 0.3), (np.array([0]), -0.1), constant=0.01)
    assert not len(system.add(again))
    assert system.defined.tolist() == [False, True]
    off = Rows.of((np.array([1]), 0.3), (np.array([0]), -0.1), constant=0.010000001)
    assert system.add(off).tolist() == [0]


def test_more_rows_than_a_block() -> None:
    count = 9_000
    system, others = LinearSystem(np.arange(count)), np.arange(1, count)
    assert not len(
        system.add(Rows.of((others, 1.0), (others * 0, -1.0), constant=-others.astype(np.float64)))
    )
    assert int(system.defined.sum()) == count - 1
    flat = system.substituted(Rows.of((others, 1.0)))
    assert not flat.unknowns.any()
    assert np.array_equal(flat.constant, others)


@_SOME
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=10))
def test_classes_are_the_connected_parts(pairs: list[tuple[int, int]]) -> None:
    names = list(range(8))
    for a, b in pairs:
        old, new = max(names[a], names[b]), min(names[a], names[b])
        names = [new if name == old else name for name in names]
    halves = [pairs[::2], pairs[1::2]]
    arrays = [(np.array([a for a, _ in h], int), np.array([b for _, b in h], int)) for h in halves]
    assert classes(8, arrays).tolist() == names


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_equations_all_is_free(count: int) -> None:
    system = LinearSystem(np.arange(count))
    assert not len(system.add(Rows.of((np.zeros(0, np.int64), 1.0))))
    assert not system.defined.any()
    assert classes(count, []).tolist() == list(range(count))
