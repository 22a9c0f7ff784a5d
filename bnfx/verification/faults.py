"""What went wrong first, in words: module, node, channel, and the likely cause.

A cause is told from how the weights of a folded layer are off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfx.verification.file_layers import FileGraph
from bnfx.verification.layers import Geometry, Layer, by_channel
from bnfx.verification.outputs import OutputCheck
from bnfx.verification.pairing import Pair, flow_error
from bnfx.verification.verdicts import Divergence, LayerCheck, WeightCheck

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


#: How far values between layers may drift from float64 before they count as other values.
_DRIFT = {"fp32": 1e-3, "tf32": 1e-3, "fp16": 5e-2, "bf16": 0.3}


def weight_fault(pair: Pair, check: WeightCheck, origin: Origin | None) -> Divergence:
    """A wrong weight of a layer."""
    part = next((p for p, name in pair.truth.names.items() if name == check.name), "")
    part = part or check.name.rpartition(".")[2]
    part = part if part in ("weight", "bias", "mean", "var") else "weight"
    cause = likely_cause(pair, part, check.channel, origin)
    gamma = var = eps = None
    facts = ""
    if origin is not None and check.channel < origin.norm.channels:
        norm = origin.norm
        gamma, var = (float(norm.part(p)[check.channel]) for p in ("weight", "var"))
        eps = norm.eps
        facts = f" (gamma {gamma:.4g}, var {var:.4g}, eps {eps:.3g})"
    message = (
        f"weight {check.name!r} at node {pair.ours.name!r}, channel {check.channel}{facts}: "
        f"{check.ratio:.3g} units of rounding from the float64 folding"
    )
    return Divergence(
        tier="weights",
        module=pair.truth.name,
        node=pair.ours.name,
        channel=check.channel,
        ratio=check.ratio,
        cause=cause,
        gamma=gamma,
        var=var,
        eps=eps,
        message=f"{message}; {cause}" if cause else message,
    )


def constant_fault(check: WeightCheck) -> Divergence:
    """A wrong constant that is no layer's."""
    message = f"constant {check.name!r}, stored as {check.stored!r}: {check.reason}"
    module = check.name.rpartition(".")[0]
    return Divergence(
        "weights", module, check.stored, check.channel, check.ratio, check.reason, message=message
    )


def output_fault(check: OutputCheck) -> Divergence:
    """A wrong output."""
    message = f"output {check.name!r} {list(check.shape)}: {check.reason}"
    return Divergence("outputs", "", check.name, None, check.ratio, "", message=message)


def structure_faults(pair: Pair, layer: LayerCheck, *, same_input: bool) -> Iterator[Divergence]:
    """Settings of a node that are not those of the layer."""
    truth, ours = pair.truth, pair.ours
    wrong = []
    if ours.training and not truth.training:
        wrong.append("it normalises with batch statistics (training_mode=1)")
    if truth.eps and abs(truth.eps - ours.eps) > 1e-6 * truth.eps:
        wrong.append(f"epsilon is {ours.eps:.6g}, not {truth.eps:.6g}")
    if not layer.passed and truth.geometry is not None and ours.geometry is not None:
        wrong += _other_settings(truth.geometry, ours.geometry)
    if not wrong and layer.ratio == float("inf") and same_input:
        wrong.append("its output has another shape or is not finite")
    for what in wrong:
        message = f"node {ours.name!r} ({layer.kind} of {truth.name!r}): {what}"
        yield Divergence(
            "structure", truth.name, ours.name, None, layer.ratio, what, message=message
        )


def _other_settings(truth: Geometry, ours: Geometry) -> list[str]:
    names = {
        "stride": "strides",
        "begin": "pads at the start",
        "end": "pads at the end",
        "dilation": "dilations",
        "groups": "group",
        "output_padding": "output_padding",
    }
    return [
        f"{word} are {getattr(ours, name)}, not {getattr(truth, name)}"
        for name, word in names.items()
        if _zeros(getattr(truth, name)) != _zeros(getattr(ours, name))
    ]


def _zeros(value: object) -> object:
    return () if isinstance(value, tuple) and not any(value) else value


def hint(
    pairs: Sequence[Pair],
    layers: Sequence[LayerCheck],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    graph: FileGraph,
    precision: str,
) -> Divergence | None:
    """The first layer that computes something else, or the first whose input already is.

    Args:
        pairs: Layers in the order of the file.
        layers: What tier 2 found for them.
        expected: Key -> sample of what flows in the reference.
        found: Likewise in the file.
        graph: The file, to name the operators between two layers.
        precision: Of the deployment; says how far values may drift.
    """
    by_node = {layer.node: layer for layer in layers}
    for pair in pairs:
        truth, ours = pair.truth, pair.ours
        if truth.x in expected and ours.x in found:
            error = flow_error(expected[truth.x], found[ours.x])
            if error > _DRIFT[precision]:
                return _other_input(pair, error, graph)
        layer = by_node.get(ours.name)
        if layer is not None and not layer.passed:
            message = (
                f"layer {truth.name!r} (node {layer.node!r}), channel {layer.channel}: "
                f"{layer.ratio:.3g} times torch's own error on equal input"
            )
            return Divergence(
                "layers", truth.name, layer.node, layer.channel, layer.ratio, "", message=message
            )
    return None


def _other_input(pair: Pair, error: float, graph: FileGraph) -> Divergence:
    between = _between(pair.ours.x, graph)
    message = (
        f"the input of {pair.truth.name!r} (value {pair.ours.x!r}) is off by {error:.2g} while "
        f"every layer before is right: look at {between}"
    )
    return Divergence(
        "layers", pair.truth.name, pair.ours.name, None, error, f"in {between}", message=message
    )


def _between(value: str, graph: FileGraph) -> str:
    """The operators that compute a value, back to the layers before them."""
    ends = {node.y for node in graph.nodes}
    seen: list[str] = []
    queue = [value]
    while queue and len(seen) < 6:
        name = queue.pop(0)
        node = graph.producers.get(name)
        if node is None or name in ends:
            continue
        seen.append(f"{node.op_type} {node.name!r}")
        queue.extend(node.input)
    return ", ".join(reversed(seen)) or "what feeds it"
