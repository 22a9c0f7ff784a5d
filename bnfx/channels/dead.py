"""Which units count for nothing: a greatest fixed point.

A unit is dead if every layer that reads it either finds a number there that it always is, or has
only weights of zero for it in the rows that are not dead themselves; and if nothing else reads it
that needs it. A number c goes into the layer's bias, b' = b + W c, where a constant image gives a
constant image. Where zeros are padded it does not; then one channel that always is k != 0 stays and
carries all others: W'[:, k] = W[:, k] + W[:, c] c / k, which is the same at the border, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from bnfx.channels.look import Layer, Look
from bnfx.gauges.constraints import Batch, Constraints, Demand
from bnfx.gauges.linear_system import classes
from bnfx.numbers import Ints

#: One truth for each unit.
Truths = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Channels:
    """What looks at several sizes found together; units go by the least one tied to them."""

    #: One look for each run.
    looks: Sequence[Look]
    #: Unit -> the least that goes with it.
    of: Ints
    #: Layers with units that are such least ones, and with what is known at all sizes.
    layers: Mapping[fx.Node, Layer]
    #: Unit that must stay -> what needs it.
    needed: Mapping[int, str]


@dataclass(frozen=True)
class Block:
    """One group of a layer."""

    #: Positions of its input channels.
    ins: slice
    #: Positions of its output channels.
    outs: slice


def blocks(layer: Layer) -> Iterator[Block]:
    """Its groups."""
    groups, outs, ins = layer.reads.shape
    for g in range(groups):
        yield Block(slice(g * ins, (g + 1) * ins), slice(g * outs, (g + 1) * outs))


def gathered(looks: Sequence[Look], found: Constraints) -> Channels:
    """What `looks` say together; what is no layer at some size keeps its channels."""
    first = looks[0]
    same = [b for b in found.batches if b.demand is Demand.SAME]
    pairs = [(b.labels[0], b.labels[1]) for b in same]
    layers = {}
    for node, layer in first.layers.items():
        others = [look.layers.get(node) for look in looks[1:]]
        if not all(other is not None and len(other.x) == len(layer.x) for other in others):
            pairs += [(labels, np.zeros_like(labels)) for labels in (layer.x, layer.y)]
            continue
        for other in others:
            assert other is not None
            pairs.append((layer.x, other.x))
            known = np.where(layer.known == other.known, layer.known, np.nan)
            layer = replace(layer, known=known, finite=layer.finite and other.finite)
        layers[node] = layer
    of = classes(found.count, pairs)
    needed = _needs(found.count, same)
    layers = {n: replace(layer, x=of[layer.x], y=of[layer.y]) for n, layer in layers.items()}
    return Channels(looks, of, layers, needed)


def _needs(count: int, same: Sequence[Batch]) -> dict[int, str]:
    """Unit -> what needs it, or one that goes with it, whole."""
    tied: list[tuple[Ints, Ints]] = []
    blamed: dict[int, str] = {}
    for batch in same:
        one, two = batch.labels
        free = (one > 0) & (two > 0)
        tied.append((one[free], two[free]))
    of = classes(count, tied)
    for batch in same:
        one, two = batch.labels
        for unit in of[np.append(one[two == 0], two[one == 0])].tolist():
            blamed.setdefault(unit, batch.cause.words)
    return {unit: blamed[root] for unit, root in enumerate(of.tolist()) if root in blamed}


def dead_units(channels: Channels) -> Truths:
    """(units,): what counts for nothing; true at least units alone."""
    dead = np.zeros(len(channels.of), bool)
    for layer in channels.layers.values():
        dead[layer.y] = True
    dead[0] = False
    while True:
        _settle(channels, dead)
        if not any(_carried(layer, dead) for layer in channels.layers.values() if not layer.even):
            return dead


def _settle(channels: Channels, dead: Truths) -> None:
    """Take back what some layer reads."""
    again = True
    while again:
        again = False
        for layer in reversed(list(channels.layers.values())):
            lost = layer.x[needs(layer, dead) & np.isnan(layer.known)]
            again |= bool(dead[lost].any())
            dead[lost] = False


def needs(layer: Layer, dead: Truths) -> Truths:
    """(in,): which input channels the rows that count read."""
    groups, outs, ins = layer.reads.shape
    live = ~dead[layer.y].reshape(groups, outs, 1)
    if not layer.finite:
        return np.repeat(live.any(1), ins, 1).reshape(-1)
    return np.asarray((layer.reads.numpy() & live).any(1).reshape(-1))


def _carried(layer: Layer, dead: Truths) -> bool:
    """Where numbers need a channel that carries them and none stays, take back the largest one."""
    known, more = np.nan_to_num(layer.known), False
    wanted = dead[layer.x] & (known != 0) & needs(layer, dead)
    for block in blocks(layer) if wanted.any() else ():
        if wanted[block.ins].any() and carrier(layer, block, dead) is None:
            best = np.argmax(np.where(wanted[block.ins], abs(known[block.ins]), 0.0))
            dead[layer.x[block.ins][best]] = False
            more = True
    return more


def carrier(layer: Layer, block: Block, dead: Truths) -> int | None:
    """Position in the group of the largest constant channel that stays; None without one."""
    known = np.where(dead[layer.x[block.ins]], 0.0, np.nan_to_num(layer.known[block.ins]))
    best = int(np.argmax(abs(known)))
    return best if known[best] else None
