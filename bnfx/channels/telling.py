"""What is told of channels that leave, and of idle ones that stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import fx

from bnfx.channels.dead import Channels, Truths, needs
from bnfx.channels.look import Layer
from bnfx.graphs.naming import owner_of, path_of
from bnfx.operators.table import layer_call
from bnfx.reports.report import Change

_SIZES = "other sizes"
#: The kind of these records.
CHANNELS = "channels"
_ROUNDED = "the width, or groups of equal size, which they fill up"
_CARRY = "layers that pad zeros, into which they carry constants"


def layer_path(node: fx.Node) -> str:
    """Path of a layer."""
    weight = layer_call(node)["weight"]
    named = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return owner_of(str(weight.target)) if named else path_of(node)


def dropped(by: str, channels: Channels, gone: Truths) -> Iterator[Change]:
    """One record for each set of channels that leaves all layers that write it."""
    values = _values(channels)
    for writers in _sets(channels.layers.values(), gone):
        units = np.unique(np.concatenate([layer.y[gone[layer.y]] for layer in writers]))
        first = writers[0]
        before, left = len(first.y), int((~gone[first.y]).sum())
        why = Counter(_why(values.get(unit, [])) for unit in units.tolist())
        told = ", ".join(f"{count} {words}" for words, count in why.items())
        yield Change(
            by,
            layer_path(first.node),
            CHANNELS,
            "changed",
            told,
            into=tuple(dict.fromkeys(layer_path(layer.node) for layer in writers)),
            channels=before,
            left=left,
            at=f"{first.node.name}/{before}",
        )


def left(by: str, channels: Channels, dead: Truths, gone: Truths) -> Iterator[Change]:
    """One record for each layer with channels that always are one number, and yet stay."""
    blamed = _blamed(channels, dead)
    read = [layer.x[np.isfinite(layer.known)] for layer in channels.layers.values()]
    steady = np.concatenate(read) if read else np.zeros(0, np.int64)
    for node, layer in channels.layers.items():
        idle = (np.isfinite(layer.gives) | np.isin(layer.y, steady)) & ~gone[layer.y]
        if not idle.any():
            continue
        labels = channels.looks[0].layers[node].y
        reasons = Counter(
            channels.needed.get(label, _SIZES) if not unit else blamed.get(unit, _ROUNDED)
            for label, unit in zip(labels[idle].tolist(), layer.y[idle].tolist(), strict=True)
        )
        told = "; ".join(f"{count} stay for {words}" for words, count in reasons.items())
        yield Change(
            by,
            layer_path(layer.node),
            CHANNELS,
            "kept",
            told,
            channels=len(layer.y),
            left=int((~gone[layer.y]).sum()),
            at=f"{layer.node.name}/idle",
        )


def _blamed(channels: Channels, dead: Truths) -> dict[int, str]:
    """Unit -> which layer cannot do without it."""
    found: dict[int, str] = {}
    for layer in channels.layers.values():
        wanted = needs(layer, dead) & ~dead[layer.x]
        lost = layer.x[wanted & np.isnan(layer.known)].tolist()
        words = f"{layer_path(layer.node)!r}, where they are no constant"
        found |= dict.fromkeys(lost, words)
        if not layer.even:
            for unit in layer.x[wanted & np.isfinite(layer.known)].tolist():
                found.setdefault(unit, _CARRY)
    return found


def _values(channels: Channels) -> dict[int, list[float]]:
    """Unit -> what each layer that reads it finds there."""
    found: dict[int, list[float]] = {}
    for layer in channels.layers.values():
        for unit, value in zip(layer.x.tolist(), layer.known.tolist(), strict=True):
            found.setdefault(unit, []).append(value)
    return found


def _why(values: Sequence[float]) -> str:
    if not values or np.isnan(values).any():
        return "that nobody reads"
    return "always zero" if not any(values) else "constant"


def _sets(layers: Iterable[Layer], gone: Truths) -> list[list[Layer]]:
    """Layers that write units which leave, those together that share one."""
    sets: list[tuple[set[int], list[Layer]]] = []
    for layer in layers:
        units = set(layer.y[gone[layer.y]].tolist())
        if not units:
            continue
        joined = [entry for entry in sets if not units.isdisjoint(entry[0])]
        sets = [entry for entry in sets if units.isdisjoint(entry[0])]
        before = [member for _, members in joined for member in members]
        sets.append((units.union(*(known for known, _ in joined)), [*before, layer]))
    return [members for _, members in sets]
