"""Maps of labels: which gauge each element of a tensor has.

A map is an int64 tensor of the tensor's own shape, in which axes along which labels do not change
have stride 0: it costs one number for each channel, and most views of it cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bnfx.numbers import Ints


def ground_map(shape: Sequence[int]) -> Tensor:
    """Label 0 everywhere."""
    return torch.zeros((), dtype=torch.int64, device="cpu").expand(tuple(shape))


def along(labels: Ints, axis: int, shape: Sequence[int]) -> Tensor:
    """`labels` along one axis, equal along all others."""
    view = [1] * len(shape)
    view[axis] = len(labels)
    return torch.from_numpy(labels).reshape(view).expand(tuple(shape))


def compact(labels: Tensor) -> Tensor:
    """One slice of every axis that has stride 0."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def settled(labels: Tensor) -> Tensor:
    """The same map, with stride 0 on all axes along which labels do not change."""
    shape, small = labels.shape, compact(labels)
    for axis in range(small.dim()):
        if small.shape[axis] > 1:
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
    if not small.numel():
        return ground_map(shape)
    return small.contiguous().expand(shape)


def array(labels: Tensor) -> Ints:
    """The compact map as a flat array."""
    return np.asarray(compact(labels).reshape(-1).numpy())


def rows_along(labels: Tensor, axes: Sequence[int]) -> tuple[Ints, tuple[int, ...]]:
    """The compact map with `axes` in rows, the others in columns; and the sizes of `axes` in it.

    An axis that is compact though it is asked for has one label throughout.
    """
    small = compact(labels)
    kept = [axis % labels.dim() for axis in axes]
    others = [axis for axis in range(labels.dim()) if axis not in kept]
    sizes = tuple(small.shape[axis] for axis in kept)
    columns = [small.shape[axis] for axis in others]
    rows = small.permute(*kept, *others).reshape(math.prod(sizes), math.prod(columns))
    return np.asarray(rows.numpy()), sizes


def concatenated(maps: Sequence[Tensor], axis: int) -> Tensor:
    """`torch.cat` of maps, which stays compact where all of them are."""
    shape = list(maps[0].shape)
    axis %= len(shape)
    shape[axis] = sum(m.shape[axis] for m in maps)
    parts = list(maps)
    for other in range(len(shape)):
        if other != axis and all(m.stride(other) == 0 or m.shape[other] == 1 for m in parts):
            parts = [m.narrow(other, 0, 1) for m in parts]
    return torch.cat(parts, axis).expand(shape)
