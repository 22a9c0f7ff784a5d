"""Tier 1: every weight of a file against the float64 value that it should have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnfx.numbers import UNIT
from bnfx.verification.layers import PARTS, by_channel, samples
from bnfx.verification.outputs import weight_ratio
from bnfx.verification.pairing import Pair, similar
from bnfx.verification.torch_layers import Constant
from bnfx.verification.verdicts import WeightCheck

#: Folding right was seen to err by at most 3.6 units in a weight, folding wrong by 27 and more.
MAX_WEIGHT_RATIO = 8.0
#: A weight that nothing changed is stored as it is, or rounded once.
_MAX_UNTOUCHED = 1.0

_UNIT_OF = {
    "float64": UNIT["fp32"],
    "float32": UNIT["fp32"],
    "float16": UNIT["fp16"],
    "bfloat16": UNIT["bf16"],
}


@dataclass(frozen=True)
class Rounding:
    """How weights may be rounded."""

    #: Name of the dtype of the reference's weights.
    reference: str
    #: Precision of the deployment.
    precision: str
    #: Whether the file says that bnfx folded it. Then each channel is held to its own unit; others
    #: compute the folding in float32, so that the largest channel counts.
    claimed: bool

    def unit(self, stored: str) -> float:
        """Relative error of one rounding for weights that are stored as `stored`.

        Weights may be stored as coarsely as the reference's, or as the precision asked for.
        """
        own = _UNIT_OF.get(self.reference, UNIT["fp32"])
        asked = UNIT["fp32"] if self.precision == "tf32" else UNIT[self.precision]
        return max(own, min(_UNIT_OF.get(stored, UNIT["fp32"]), max(asked, own)))


def check_pair(pair: Pair, dtypes: dict[str, str], rounding: Rounding) -> list[WeightCheck]:
    """The weights of one layer.

    Args:
        pair: The layer.
        dtypes: Name of an operand in the file -> name of its dtype.
        rounding: How they may be rounded.
    """
    truth, ours = pair.truth, pair.ours
    parts = [part for part in PARTS if part in truth.parts or part in ours.parts]
    checks = [_check_part(pair, part, dtypes, rounding) for part in parts]
    if truth.kind == "batch_norm" and not all(check.passed for check in checks):
        return _effective(pair, checks, rounding)
    return checks


def _check_part(pair: Pair, part: str, dtypes: dict[str, str], rounding: Rounding) -> WeightCheck:
    truth, ours = pair.truth, pair.ours
    stored = ours.names.get(part, "")
    unit = rounding.unit(dtypes.get(stored, "float32"))
    limit = MAX_WEIGHT_RATIO * truth.conditions.get(part, 1.0)
    if rounding.claimed and part in truth.untouched:
        limit = _MAX_UNTOUCHED
    name = truth.names.get(part) or f"{truth.name}.{part}"
    exact, mine = (by_channel(layer, part).numpy() for layer in (truth, ours))
    if exact.shape != mine.shape:
        reason = f"its shape is {list(mine.shape)}, not {list(exact.shape)}"
        return WeightCheck(name, stored, ours.name, math.inf, 0, passed=False, reason=reason)
    ratio, channel = weight_ratio(mine, exact, unit)
    if ratio > limit and not rounding.claimed:
        ratio, channel = weight_ratio(mine, exact, unit, per_channel=False)
    reason = "" if ratio <= limit else f"wrong in channel {channel}"
    return WeightCheck(name, stored, ours.name, ratio, channel, not reason, reason)


def _effective(pair: Pair, checks: list[WeightCheck], rounding: Rounding) -> list[WeightCheck]:
    """A BatchNorm in other numbers is right if its scale and shift are."""
    rows = []
    for layer in (pair.truth, pair.ours):
        scale = layer.part("weight") / (layer.part("var") + layer.eps).sqrt()
        shift = layer.part("bias") - layer.part("mean") * scale
        rows.append(torch.stack((scale, shift), 1).numpy())
    ratio, _ = weight_ratio(rows[1], rows[0], UNIT["fp32"], per_channel=rounding.claimed)
    if rounding.claimed or ratio > MAX_WEIGHT_RATIO:
        return checks
    name = f"{pair.truth.name} (scale and shift)"
    return [WeightCheck(name, pair.ours.x, pair.ours.name, ratio, 0, passed=True)]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file that is no weight of a paired layer."""

    name: str
    values: Tensor
    dtype: str


def check_constants(
    truth: Sequence[Constant], ours: Sequence[Stored], rounding: Rounding
) -> tuple[list[WeightCheck], list[str]]:
    """Constants of the reference that are no layer's: tables, slopes, scales of channels.

    Each is looked for among the tensors of the file, by its values; one that is nowhere, while a
    tensor that is recognisably it is there with other values, is wrong. Also returned are the names
    of those that are nowhere.
    """
    checks: list[WeightCheck] = []
    missing: list[str] = []
    used: set[str] = set()
    odd: list[Constant] = []
    for constant in truth:
        match = _exact(constant, ours, rounding)
        if match is None:
            odd.append(constant)
            continue
        checks.append(match)
        used.add(match.stored)
    for constant in odd:
        rest = [tensor for tensor in ours if tensor.name not in used]
        wrong = None if constant.hidden else _recognised(constant, rest, rounding)
        if wrong is None:
            missing.append(constant.name)
            continue
        checks.append(wrong)
        used.add(wrong.stored)
    return checks, missing


def _exact(constant: Constant, ours: Sequence[Stored], rounding: Rounding) -> WeightCheck | None:
    """The tensor that is this constant, one of its own name first."""
    named = sorted(ours, key=lambda tensor: tensor.name != constant.name)
    for tensor in named:
        ratio = _distance(constant.value, tensor, rounding)
        limit = _MAX_UNTOUCHED if constant.untouched else MAX_WEIGHT_RATIO
        if ratio <= limit:
            return WeightCheck(constant.name, tensor.name, "", ratio, 0, passed=True)
    return None


def _recognised(
    constant: Constant, ours: Sequence[Stored], rounding: Rounding
) -> WeightCheck | None:
    for tensor in sorted(ours, key=lambda tensor: tensor.name != constant.name):
        own = tensor.name == constant.name and rounding.claimed
        if tensor.values.numel() != constant.value.numel():
            continue
        floating = constant.value.is_floating_point()
        alike = floating and any(
            similar(samples(constant.value), samples(way)) for way in _ways(constant.value, tensor)
        )
        if not alike and not own:
            continue
        ratio = _distance(constant.value, tensor, rounding)
        channel = _channel(constant.value, tensor)
        reason = f"wrong in entry {channel} of its first axis"
        return WeightCheck(
            constant.name, tensor.name, "", ratio, channel, passed=False, reason=reason
        )
    return None


def _ways(value: Tensor, tensor: Stored) -> list[Tensor]:
    """The tensor in the constant's shape: as it lies, and transposed."""
    ways = [tensor.values.reshape(value.shape)]
    if value.dim() == 2 and tuple(tensor.values.shape) == tuple(value.T.shape):
        ways.append(tensor.values.T)
    return ways


def _distance(value: Tensor, tensor: Stored, rounding: Rounding) -> float:
    if tensor.values.numel() != value.numel() or not value.numel():
        return math.inf
    if not value.is_floating_point() or not tensor.values.is_floating_point():
        same = bool((tensor.values.reshape(-1).double() == value.reshape(-1).double()).all())
        return 0.0 if same else math.inf
    unit = rounding.unit(tensor.dtype)
    rows = value.shape[0] if value.dim() > 1 else value.numel()
    exact = value.reshape(rows, -1).numpy()
    return min(
        weight_ratio(way.reshape(rows, -1).numpy(), exact, unit)[0] for way in _ways(value, tensor)
    )


def _channel(value: Tensor, tensor: Stored) -> int:
    rows = value.shape[0] if value.dim() else 1
    difference = (tensor.values.reshape(rows, -1) - value.reshape(rows, -1)).double().abs()
    finite = torch.nan_to_num(difference, nan=math.inf).amax(1)
    return int(np.argmax(finite.numpy()))
