"""What went wrong first, in words: module, node, channel, likely cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from bnfx.verification.causes import Origin, likely_cause
from bnfx.verification.file_layers import FileGraph
from bnfx.verification.layers import Geometry
from bnfx.verification.outputs import OutputCheck
from bnfx.verification.pairing import Pair, flow_error
from bnfx.verification.verdicts import Divergence, LayerCheck, WeightCheck

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
    if ours.training:
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
