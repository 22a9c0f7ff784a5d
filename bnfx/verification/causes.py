"""What most likely went wrong with a folded layer, told from how its weights are off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfx.verification.layers import Layer, by_channel
from bnfx.verification.pairing import Pair

_FITS = 5e-7  # relative; a wrong formula is recognised by all channels to this


@dataclass(frozen=True)
class Origin:
    """The layer and the BatchNorm of the unfolded reference that a folded layer came from."""

    layer: Layer
    norm: Layer


def likely_cause(pair: Pair, part: str, channel: int, origin: Origin | None) -> str:
    """A cause in words; "" where none is recognised.

    Args:
        pair: The layer; `part` of it is wrong.
        part: "weight", "bias", "mean" or "var".
        channel: The worst channel.
        origin: What it was folded from; None for a layer without a BatchNorm.
    """
    exact, mine = by_channel(pair.truth, part), by_channel(pair.ours, part)
    if not bool(torch.isfinite(mine).all()):
        return "it holds NaN or infinity"
    if pair.belongs_to:
        return f"it holds the weights of {pair.belongs_to!r}: swapped"
    if exact.shape != mine.shape:
        return "it has another shape"
    if origin is not None:
        for name, weight, bias in _mistakes(origin):
            made = weight if part == "weight" else bias
            if made is not None and made.shape == mine.shape and _same(made, mine):
                return name
    return _by_pattern(exact, mine, channel)


def _same(a: Tensor, b: Tensor) -> bool:
    scale = a.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return bool((((a - b).abs() / scale) <= _FITS).all())


def _mistakes(origin: Origin) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Wrong formulas: name, the weight and the bias that they give, as (channels, rest)."""
    layer, norm = origin.layer, origin.norm
    gamma, beta, mean, var = (norm.part(p) for p in ("weight", "bias", "mean", "var"))
    w, b = by_channel(layer, "weight"), layer.part("bias")
    right = gamma / (var + norm.eps).sqrt()
    scales: Mapping[str, Tensor] = {
        "eps was forgotten": gamma / var.sqrt(),
        "eps was 1e-5 instead of its own": gamma / (var + 1e-5).sqrt(),
        "eps was 1e-3 instead of its own": gamma / (var + 1e-3).sqrt(),
        "eps was added to the standard deviation": gamma / (var.sqrt() + norm.eps),
        "gamma was left out": 1 / (var + norm.eps).sqrt(),
        "the variance was taken for the standard deviation": gamma / (var + norm.eps),
        "mean and variance were swapped": gamma / (mean.abs() + norm.eps).sqrt(),
        "beta was taken for gamma": beta / (var + norm.eps).sqrt(),
        "the BatchNorm was not folded": torch.ones_like(gamma),
    }
    for name, s in scales.items():
        if bool(torch.isfinite(s).all()) and not torch.equal(s, right):
            middle = var if "swapped" in name else mean
            shift = b if "not folded" in name else s * (b - middle) + beta
            yield name, w * s[:, None], shift[:, None]
    for name, bias in {
        "the bias was not scaled": b + beta - mean * right,
        "the mean was not subtracted": right * b + beta,
        "the mean was added": right * (b + mean) + beta,
        "beta was left out": right * (b - mean),
        "the bias was left out": beta - mean * right,
        "the mean was not scaled": right * b + beta - mean,
    }.items():
        yield name, None, bias[:, None]
    yield "gamma was scaled along the wrong axis", _wrong_axis(layer, right), None


def _wrong_axis(layer: Layer, scale: Tensor) -> Tensor | None:
    weight = layer.parts["weight"]
    axis = 0 if layer.kind == "conv_transpose" else 1
    if weight.shape[axis] != len(scale):
        return None
    view = [1] * weight.dim()
    view[axis] = -1
    wrong = Layer(layer.kind, "", {"weight": weight * scale.view(view)}, geometry=layer.geometry)
    return by_channel(wrong, "weight")


def _by_pattern(exact: Tensor, mine: Tensor, channel: int) -> str:
    if not bool(mine.any()) and bool(exact.any()):
        return "it is zero throughout"
    if not bool(mine[channel].any()) and bool(exact[channel].any()):
        return f"channel {channel} is zero"
    scale = exact.abs().amax(1).clamp(min=1e-30)
    off = ((mine - exact).abs().amax(1) / scale) > 1e-6
    rows = off.nonzero().flatten().tolist()
    half = _same(exact.to(torch.float16).double(), mine) and len(rows) > 1
    if half:
        return "it was rounded to half precision"
    if len(rows) != 1:
        return _common_factor(exact, mine)
    row = rows[0]
    elements = (mine[row] - exact[row]).abs() > 1e-6 * scale[row]
    if int(elements.sum()) == 1 and exact.shape[1] > 1:
        return f"one element of channel {row} was changed"
    factor = float(torch.dot(mine[row], exact[row]) / torch.dot(exact[row], exact[row]))
    if math.isfinite(factor) and _same(exact[row : row + 1] * factor, mine[row : row + 1]):
        return f"channel {row} alone is off by a factor of {factor:.6g}"
    return f"channel {row} alone was changed"


def _common_factor(exact: Tensor, mine: Tensor) -> str:
    power = float(exact.square().sum())
    factor = float((exact * mine).sum()) / power if power else math.nan
    if math.isfinite(factor) and abs(factor - 1) > 1e-6 and _same(exact * factor, mine):
        return f"all of it is off by a factor of {factor:.6g}"
    permuted = torch.equal(
        exact.float().reshape(-1).sort().values, mine.float().reshape(-1).sort().values
    )
    return "its elements are in another order" if permuted else ""
