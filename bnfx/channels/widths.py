"""How wide layers become: dead units leave the tensors where what is left is a tensor again.

A width is rounded up to the target's block, and channels that stay for that are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import fx

from bnfx.channels.dead import Channels, Truths, blocks
from bnfx.channels.look import Layer
from bnfx.channels.resizing import Call, Resizing
from bnfx.numbers import Ints


def leaving(channels: Channels, dead: Truths, block: int) -> tuple[Truths, dict[fx.Node, Call]]:
    """Which units leave, true for each of theirs, and which calls need other arguments for that."""
    gone = dead.copy()
    while True:
        before = gone.copy()
        for layer in channels.layers.values():
            for units in _rounded(layer, gone, block):
                gone[units] = False
        calls = _resized(channels, gone)
        if calls is not None and np.array_equal(gone, before):
            return gone[channels.of], calls


def _resized(channels: Channels, gone: Truths) -> dict[fx.Node, Call] | None:
    """The calls that change; None where units had to stay."""
    found = [Resizing(look, gone[channels.of]).run() for look in channels.looks]
    stuck = sorted({label for each in found for label in each.stuck})
    if not stuck:
        first, *others = (each.calls for each in found)
        odd = {
            n
            for other in others
            for n in first.keys() | other.keys()
            if first.get(n) != other.get(n)
        }
        if not odd:
            return first
        for each in found:
            each.refuse(*odd)
        stuck = sorted({label for each in found for label in each.stuck})
    gone[channels.of[stuck]] = False
    return None


def _rounded(layer: Layer, gone: Truths, block: int) -> Iterator[Ints]:
    """Units that must stay for the sake of a width, of equal groups, or of any channel at all."""
    groups, _, ins = layer.reads.shape
    if ins == 1 and groups > 1:
        return  # it is as wide as the one that it reads
    for units in (layer.x, layer.y):
        if groups > 1:
            yield _levelled(layer, units, gone)
    left = int((~gone[layer.y]).sum())
    wanted = min(len(layer.y), max(1, -(-left // block)) * block)
    yield layer.y[gone[layer.y]][: wanted - left]


def _levelled(layer: Layer, units: Ints, gone: Truths) -> Ints:
    """Units that let all groups have equally many channels; groups that leave as a whole do."""
    rows = units.reshape(len(layer.reads), -1)
    whole = np.array(
        [gone[layer.x[b.ins]].all() and gone[layer.y[b.outs]].all() for b in blocks(layer)]
    )
    stay = [row for row, leaves in zip(rows, whole, strict=True) if not leaves]
    if not stay:
        return units[:0]
    most = max(1, *(int((~gone[row]).sum()) for row in stay))
    return np.concatenate([row[gone[row]][: most - int((~gone[row]).sum())] for row in stay])
