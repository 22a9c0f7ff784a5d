"""Moments merge to those of all values, whatever the batches are."""

from __future__ import annotations

import functools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfx.statistics.moments import Moments

_SOME = settings(max_examples=80, deadline=None)
VALUES = st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=2, max_size=30)


@_SOME
@given(VALUES, st.lists(st.integers(0, 30), max_size=4), st.sampled_from([0.0, 1e5, 1e7]))
def test_any_batches_give_mean_and_variance_of_all(
    values: list[float], cuts: list[int], offset: float
) -> None:
    data = torch.tensor(values, dtype=torch.float64) + offset
    parts = torch.tensor_split(data, sorted(min(cut, len(values)) for cut in cuts))
    done = functools.reduce(Moments.merged, (Moments.of(part[:, None]) for part in parts))
    truth = data.numpy()
    assert done.count == len(values)
    size = np.abs(truth).max() + 1
    np.testing.assert_allclose(done.mean.numpy(), [truth.mean()], atol=1e-12 * size)
    spread = truth.var(ddof=1)
    np.testing.assert_allclose(done.variance.numpy(), [spread], rtol=1e-9, atol=1e-13 * size**2)


@_SOME
@given(st.permutations(range(5)))
def test_the_order_of_batches_does_not_matter(order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n + 1, 3, 2, generator=generator) + n for n in range(5)]
    whole = Moments.of(torch.cat(parts))
    done = functools.reduce(Moments.merged, [Moments.of(parts[i]) for i in order])
    assert done.count == whole.count
    torch.testing.assert_close(done.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(done.variance, whole.variance, rtol=1e-12, atol=1e-12)


def test_the_channels_are_axis_one() -> None:
    x = torch.randn(2, 3, 4, 5)
    done = Moments.of(x)
    torch.testing.assert_close(done.mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(done.variance, x.double().var((0, 2, 3)))


def test_an_empty_batch_adds_nothing() -> None:
    some, none = Moments.of(torch.randn(4, 3)), Moments.of(torch.randn(0, 3))
    assert none.count == 0
    for done in (some.merged(none), none.merged(some)):
        assert done.count == 4
        assert torch.equal(done.mean, some.mean)
        assert torch.equal(done.m2, some.m2)
    assert none.merged(none).count == 0


def test_half_precision_is_summed_in_float64() -> None:
    x = torch.full((70_000, 1), 300.0, dtype=torch.float16)
    x[::2] = 302.0
    done = Moments.of(x)
    assert done.mean.item() == 301.0
    np.testing.assert_allclose(done.variance.item(), 70_000 / 69_999, rtol=1e-12)
