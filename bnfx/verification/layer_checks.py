"""Tier 2: each layer of a file on the input that the file itself gives it, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bnfx.numbers import UNIT, Array
from bnfx.verification.layers import Layer, apply, as_tensor, rounding_scale, samples
from bnfx.verification.pairing import Pair, flow_error
from bnfx.verification.verdicts import LayerCheck

#: Folded right, a layer's worst channel was seen at 7.5 times torch's own error, wrong from 8.4.
MAX_LAYER_RATIO = 16.0

_UNITS = {"float16": UNIT["fp16"], "bfloat16": UNIT["bf16"]}


def check_layer(
    pair: Pair, values: Mapping[str, Array], expected: Mapping[str, Tensor]
) -> LayerCheck | None:
    """Compare one layer of the file with the reference's on equal input.

    ratio = max over channels of rms(file - exact) / max(rms(torch - exact), unit rms(scale)),
    where exact is the reference's layer in float64 and torch is the same in single precision, both
    on the input that the file gave the layer; scale is what the products that are summed up come
    to (see `rounding_scale`), or the output itself for a normalisation.

    Args:
        pair: The layer.
        values: Name -> what onnxruntime computed for it, without optimisation.
        expected: Key -> sample of what flows in the reference.

    Returns:
        None where the values are not there.
    """
    truth, ours = pair.truth, pair.ours
    if ours.x not in values or ours.y not in values:
        return None
    x, y = (as_tensor(values[name]) for name in (ours.x, ours.y))
    if not bool(torch.isfinite(x).all()):
        return None  # what was wrong before shows in what comes of it
    unit = _UNITS.get(str(values[ours.y].dtype), UNIT["fp32"])
    kind = ours.kind
    flow = flow_error(expected[truth.y], samples(y)) if truth.y in expected else math.nan
    try:
        with torch.no_grad():
            exact = apply(truth, x.double())
            own = apply(truth, x.float()).double()
            scale = exact
            if kind in ("conv", "conv_transpose", "linear"):
                scale = rounding_scale(truth, x.float()).double()
    except (RuntimeError, ValueError):
        return LayerCheck(truth.name, ours.name, kind, math.inf, 0, flow, passed=False)
    if exact.shape != y.shape:
        return LayerCheck(truth.name, ours.name, kind, math.inf, 0, flow, passed=False)
    odd = ~(exact.isfinite() | y.isfinite())  # of NaN in the reference's own weights
    parts = (y.double() - exact, own - exact, unit * scale)
    ratio, channel = _worst_channel(truth, *(part.masked_fill(odd, 0) for part in parts))
    passed = ratio <= MAX_LAYER_RATIO
    return LayerCheck(truth.name, ours.name, kind, ratio, channel, flow, passed)


def _worst_channel(
    layer: Layer, error: Tensor, own_error: Tensor, rounding: Tensor
) -> tuple[float, int]:
    off, own, unit = (_rms_by_channel(layer, t) for t in (error, own_error, rounding))
    # A channel that is zero throughout has no relative error; its unit is that of the whole.
    whole = float(rounding.square().mean().sqrt()) * 1e-3
    ratio = off / torch.maximum(own, unit).clamp(min=whole or 2.0**-149)
    ratio = torch.where(torch.isfinite(ratio), ratio, torch.full_like(ratio, math.inf))
    worst = int(torch.argmax(ratio))
    return float(ratio[worst]), worst


def _rms_by_channel(layer: Layer, value: Tensor) -> Tensor:
    if layer.kind in ("linear", "layer_norm"):
        return value.reshape(-1, value.shape[-1]).square().mean(0).sqrt()
    rank = len(layer.geometry.stride) if layer.geometry is not None else value.dim() - 2
    rows = value.movedim(-rank - 1, 0)
    return rows.reshape(rows.shape[0], -1).square().mean(1).sqrt()
