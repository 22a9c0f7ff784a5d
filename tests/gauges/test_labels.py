"""Maps of labels stay the maps that they stand for, however little of them is stored."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnfx.gauges.labels import (
    along,
    array,
    compact,
    concatenated,
    ground_map,
    rows_along,
    settled,
)

_SOME = settings(max_examples=80, deadline=None)


@st.composite
def maps(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Tensor:
    """A map that is stored along some of its axes; on others it repeats, with stride 0 or not."""
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    stored = [n if draw(st.booleans()) else 1 for n in shape]
    count = int(np.prod(stored))
    numbers = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    small = torch.tensor(numbers).reshape(stored)
    return (
        small.expand(shape)
        if draw(st.booleans())
        else small.repeat([n // s for n, s in zip(shape, stored, strict=True)])
    )


@_SOME
@given(maps())
def test_one_slice_stands_for_all(labels: Tensor) -> None:
    small = compact(labels)
    assert torch.equal(small.expand(labels.shape), labels)
    assert all(s == 1 or labels.stride(i) != 0 for i, s in enumerate(small.shape))


@_SOME
@given(maps())
def test_settled_is_the_same_map_stored_once(labels: Tensor) -> None:
    done = settled(labels)
    assert torch.equal(done, labels)
    for axis, size in enumerate(compact(done).shape):
        if size > 1:
            assert not bool((labels == labels.narrow(axis, 0, 1)).all())
    assert torch.equal(settled(done), labels)
    assert set(array(done).tolist()) == set(labels.flatten().tolist())


@_SOME
@given(maps(), st.data())
def test_rows_hold_what_lies_along_the_axes(labels: Tensor, data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.integers(0, labels.dim() - 1), unique=True, max_size=2))
    found, sizes = rows_along(labels, axes)
    others = [axis for axis in range(labels.dim()) if axis not in axes]
    whole = labels.permute(*axes, *others).reshape([labels.shape[axis] for axis in axes] + [-1])
    assert len(found) == int(np.prod(sizes, dtype=int))
    assert all(s in (1, labels.shape[axis]) for s, axis in zip(sizes, axes, strict=True))
    for place in np.ndindex(*whole.shape[:-1]):
        stored = [min(i, size - 1) for i, size in zip(place, sizes, strict=True)]
        row = np.ravel_multi_index(stored, sizes) if sizes else 0
        assert set(found[row].tolist()) == set(whole[place].tolist())


@_SOME
@given(st.data())
def test_concatenation_is_torchs_own(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    parts = []
    for _ in range(data.draw(st.integers(1, 3))):
        own = list(shape)
        own[axis] = data.draw(st.integers(1, 3))
        parts.append(data.draw(maps(shape=tuple(own))))
    assert torch.equal(concatenated(parts, axis), torch.cat([p.contiguous() for p in parts], axis))


def test_one_number_for_each_channel_is_stored() -> None:
    labels = along(np.arange(3), 1, (2, 3, 100, 100))
    assert labels.untyped_storage().nbytes() == 3 * 8
    assert compact(labels).shape == (1, 3, 1, 1)
    assert compact(ground_map((5, 7))).numel() == 1
    both = concatenated([labels, labels], 2)
    assert both.shape == (2, 3, 200, 100)
    assert both.untyped_storage().nbytes() <= 200 * 3 * 8


def test_a_map_without_elements() -> None:
    assert settled(torch.zeros(2, 0, 3, dtype=torch.int64)).shape == (2, 0, 3)


def test_a_tensor_without_elements_has_no_rows() -> None:
    rows, sizes = rows_along(torch.zeros(0, 3, dtype=torch.int64), [0])
    assert rows.shape[0] == 0
    assert sizes == (0,)
