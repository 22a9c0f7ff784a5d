"""Which layer of a file is which layer of the reference.

Names are claims, so they are not asked. Two layers can only be the same if their weights have the
same shape; among those, the order in which they run decides, and where the weights say otherwise,
what flows through them does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfx.verification.layers import Layer, samples

#: Two tensors count as the same one, with a fault, if half of their elements agree to this.
_ALIKE = 0.05


@dataclass(frozen=True)
class Pair:
    """A layer of the reference and the one of the file that stands for it."""

    #: Of the reference, in float64.
    truth: Layer
    #: Of the file.
    ours: Layer
    #: Whether the file's weights are these, up to a fault: half of them agree to 5 %.
    recognised: bool
    #: Name of another layer of the reference whose weights the file has here; "" if none.
    belongs_to: str = ""


@dataclass(frozen=True)
class Pairing:
    """All pairs in the order of the file, and the layers of the reference without one."""

    pairs: tuple[Pair, ...]
    missing: tuple[Layer, ...]


def pair_layers(
    truth: Sequence[Layer],
    ours: Sequence[Layer],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> Pairing:
    """Pair the layers of two graphs.

    Args:
        truth: Layers of the reference in the order in which they run.
        ours: Layers of the file, likewise.
        expected: Key -> sample of what flows in the reference.
        found: Likewise in the file, on the same input.
    """
    mates: dict[int, tuple[Layer, str]] = {}
    taken: set[int] = set()
    groups: dict[object, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
    for side, layers in enumerate((truth, ours)):
        for layer in layers:
            groups[layer.signature][side].append(layer)
    for wanted, given in groups.values():
        for mine, theirs, other in _pair_group(wanted, given, expected, found):
            mates[id(mine)] = (theirs, other)
            taken.add(id(theirs))
    pairs = []
    for mine in ours:
        if id(mine) in mates:
            theirs, other = mates[id(mine)]
            pairs.append(Pair(theirs, mine, alike(theirs, mine), other))
    missing = tuple(layer for layer in truth if id(layer) not in taken)
    return Pairing(tuple(pairs), missing)


def _pair_group(
    wanted: list[Layer],
    given: list[Layer],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> list[tuple[Layer, Layer, str]]:
    """Pairs (ours, truth, other owner of the weights) among layers of one signature."""
    if len(wanted) != len(given):
        return _in_order(wanted, given)
    odd = [i for i in range(len(wanted)) if not alike(wanted[i], given[i])]
    pairs = [(given[i], wanted[i], "") for i in range(len(wanted)) if i not in set(odd)]
    free = set(odd)
    for i in odd:
        fits = [j for j in odd if j in free and alike(wanted[j], given[i])]
        flows = [j for j in fits if same_flow(wanted[j], given[i], expected, found)]
        # Another order of layers that do the same work is no fault; weights in the wrong place are.
        pick = flows[0] if flows else (i if i in free else None)
        if pick is None:
            continue
        free.discard(pick)
        other = "" if flows or not fits else wanted[fits[0]].name
        pairs.append((given[i], wanted[pick], other))
    return pairs


def _in_order(wanted: list[Layer], given: list[Layer]) -> list[tuple[Layer, Layer, str]]:
    pairs = []
    start = 0
    for mine in given:
        match = next((j for j in range(start, len(wanted)) if alike(wanted[j], mine)), None)
        if match is not None:
            pairs.append((mine, wanted[match], ""))
            start = match + 1
    return pairs


def alike(truth: Layer, ours: Layer) -> bool:
    """Whether at least half of the weights agree to 5 %."""
    parts = ("weight", "bias", "mean", "var") if truth.kind == "batch_norm" else ("weight",)
    a = torch.cat([samples(truth.part(part), 512) for part in parts])
    b = torch.cat([samples(ours.part(part), 512) for part in parts])
    return similar(a, b)


def similar(a: Tensor, b: Tensor) -> bool:
    """Whether at least half of the elements of two samples agree to 5 %."""
    if a.shape != b.shape:
        return False
    finite = torch.isfinite(a)
    size = a[finite].square().mean().sqrt() if bool(finite.any()) else torch.zeros(())
    near = (a - b).abs() <= _ALIKE * a.abs() + 1e-3 * size
    return bool(torch.where(finite, near, a == b).double().mean() >= 0.5)


def same_flow(
    truth: Layer, ours: Layer, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> bool:
    """Whether both have the same input and output, as far as single precision can tell."""
    return all(
        theirs in expected and mine in found and close(expected[theirs], found[mine])
        for theirs, mine in ((truth.x, ours.x), (truth.y, ours.y))
    )


def close(truth: Tensor, ours: Tensor, limit: float = _ALIKE) -> bool:
    """Whether two samples differ by less than `limit`, relative root mean square."""
    if truth.shape != ours.shape:
        return False
    return flow_error(truth, ours) <= limit


def flow_error(truth: Tensor, ours: Tensor) -> float:
    """Relative root mean square difference of two samples; infinite where shapes differ."""
    if truth.shape != ours.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    power = float(truth.square().mean().sqrt())
    noise = float((truth - ours).square().mean().sqrt())
    return noise / power if power else (0.0 if noise == 0 else float("inf"))
