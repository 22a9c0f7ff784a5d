"""Tiers 1 and 2 together: the layers of a file, one by one, against those of the reference.

The reference is folded again in float64. A file that another tool folded may carry other weights
that are as right: it is compared with the unfolded reference, and with the one in which each
BatchNorm is folded into the layer before it, and judged by what it agrees with most.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from bnfx.errors import BnfxError, VerificationError
from bnfx.graphs.examples import Example
from bnfx.numbers import Array
from bnfx.onnx_files.reading import tensor_array, type_name
from bnfx.verification.faults import Origin, constant_fault, hint, structure_faults, weight_fault
from bnfx.verification.file_layers import FileGraph, file_layers, stored_dtype
from bnfx.verification.layer_checks import check_layer
from bnfx.verification.layers import Layer, as_tensor, neighbours, samples
from bnfx.verification.pairing import Pair, Pairing, flow_error, pair_layers
from bnfx.verification.references import Form
from bnfx.verification.torch_layers import Traced
from bnfx.verification.verdicts import Divergence, LayerCheck, WeightCheck
from bnfx.verification.weight_checks import Rounding, Stored, check_constants, check_pair

_NEARLY = 0.01  # relative to the largest weight of a channel
_SAME = 0.05  # relative; two values that differ by less are the same one, with errors


class Known(Protocol):
    """A reference whose layers can be listed."""

    name: str
    #: Whether a wrong weight is always a fault.
    decides: bool
    #: Forms that could not be made, and why.
    failures: list[str]

    def forms(self, sample: Example) -> Iterator[Form]:
        """The layers in every form that is right."""

    def unfolded(self, sample: Example) -> Traced:
        """The layers as they are."""


@dataclass(frozen=True)
class Findings:
    """What tiers 1 and 2 found."""

    #: One record for each weight.
    weights: tuple[WeightCheck, ...]
    #: One record for each layer.
    layers: tuple[LayerCheck, ...]
    #: How many weights and other constants the reference has.
    wanted: int
    #: What is wrong, in the order of the file; each decides.
    faults: tuple[Divergence, ...]
    #: First sign of what is wrong in the flow of values; it decides nothing.
    hint: Divergence | None
    #: What was not checked, and why.
    notes: tuple[str, ...]
    #: Whether a wrong weight is a fault, whatever the outputs are.
    decides: bool
    #: Layers inside subgraphs, which are not compared.
    hidden: int


@dataclass(frozen=True)
class _Match:
    """The file against one form of the reference."""

    form: Form
    first: bool
    pairing: Pairing
    checks: tuple[tuple[Pair, tuple[WeightCheck, ...]], ...]
    #: Of constants that are no layer's, and the names of those that are nowhere.
    constants: tuple[WeightCheck, ...]
    absent: tuple[str, ...]

    @property
    def score(self) -> int:
        checks = [check for _, checks in self.checks for check in checks]
        good = sum(check.passed for check in (*checks, *self.constants))
        bad = sum(not check.passed for check in (*checks, *self.constants))
        return good - bad - 4 * len(self.pairing.missing)

    @property
    def perfect(self) -> bool:
        known = all(check.passed for check in self.constants)
        return known and not self.wrong and not self.pairing.missing

    @property
    def wrong(self) -> int:
        """How many layers hold a wrong weight."""
        return sum(any(not check.passed for check in checks) for _, checks in self.checks)

    def settled(self, layers: int, unit: float) -> bool:
        """Whether the file, of so many layers, is of this form, be it with a fault.

        Other forms differ in several layers, or, where an identity was merged into a convolution,
        in one by far: a lone layer that is nearly right is wrong. Layers that the file lacks may
        have been computed ahead, where every one that it has is right.
        """
        faultless = not self.wrong and all(check.passed for check in self.constants)
        if self.perfect or (faultless and not self.absent and 0 < layers == len(self.checks)):
            return True
        complete = layers == len(self.checks) == len(self.form.traced.layers)
        worst = max((check.ratio for _, checks in self.checks for check in checks), default=0.0)
        return complete and self.wrong == 1 and worst * unit <= _NEARLY


def check_layers(
    reference: Known,
    sample: Example,
    graph: FileGraph,
    values: Mapping[str, Array],
    rounding: Rounding,
    rewritten: Collection[str] = (),
) -> Findings:
    """Compare weights, structure and layers.

    Args:
        reference: What the file must be.
        sample: The input that `values` were computed for.
        graph: The layers of the file.
        values: Name -> what onnxruntime computed for it.
        rounding: How weights may be rounded.
        rewritten: Tensors of the file that shall have other values than the reference's.
    """
    ours = list(file_layers(graph, values))
    found = {name: samples(as_tensor(array)) for name, array in values.items()}
    names = {name for node in graph.nodes for name in node.operands.values()}
    dtypes = {name: stored_dtype(graph, name, values) for name in names}
    try:
        match = _best(reference, sample, graph, ours, found, dtypes, rounding)
    except BnfxError as error:
        note = (
            f"weights and layers: not checked, since the reference cannot be taken apart: {error}"
        )
        return Findings((), (), 0, (), None, (note,), False, graph.hidden)
    decides = reference.decides or match.settled(len(ours), rounding.unit(rounding.reference))
    origins = _origins(reference, sample, match)
    faults: list[Divergence] = []
    weights: list[WeightCheck] = []
    layers: list[LayerCheck] = []
    strangers: list[str] = []
    meant: list[str] = []
    flow = match.form.traced.flow
    for pair, checks in match.checks:
        wrong = [check for check in checks if not check.passed]
        if not set(pair.ours.names.values()).isdisjoint(rewritten):
            meant.append(pair.truth.name)
            continue
        if wrong and not (pair.recognised or pair.belongs_to or rounding.claimed):
            strangers.append(pair.truth.name)
            continue
        weights += checks
        origin = origins.get(pair.truth.name)
        faults += [weight_fault(pair, check, origin) for check in wrong if decides]
        layer = check_layer(pair, values, flow)
        if layer is None or _fused(layer):
            continue
        layers.append(layer)
        same_input = flow_error(flow[pair.truth.x], found[pair.ours.x]) < math.inf
        faults += structure_faults(pair, layer, same_input=same_input)
    constants = [check for check in match.constants if check.stored not in rewritten]
    meant += [check.name for check in match.constants if check.stored in rewritten]
    weights += constants
    faults += [constant_fault(check) for check in constants if not check.passed]
    notes = tuple(_notes(reference, match, strangers, graph, decides=decides))
    if meant:
        notes += (f"weights: {_few(meant)} are others, as folding wants; outputs decide there",)
    left_out = (strangers, meant, match.absent, match.pairing.missing)
    wanted = len(weights) + sum(map(len, left_out))
    first = hint(match.pairing.pairs, layers, flow, found, graph, rounding.precision)
    return Findings(
        tuple(weights), tuple(layers), wanted, tuple(faults), first, notes, decides, graph.hidden
    )


def _fused(layer: LayerCheck) -> bool:
    """Whether a layer took its neighbour in, a padding say: other inputs, the same output."""
    return layer.ratio == math.inf and layer.error < _SAME


def _best(
    reference: Known,
    sample: Example,
    graph: FileGraph,
    ours: Sequence[Layer],
    found: Mapping[str, Tensor],
    dtypes: dict[str, str],
    rounding: Rounding,
) -> _Match:
    """The form of the reference that the file agrees with most."""
    best: _Match | None = None
    for form in reference.forms(sample):
        pairing = pair_layers(form.traced.layers, ours, form.traced.flow, found)
        # Others fold in float32, so that only what bnfx folded is held to one rounding.
        how = replace(rounding, claimed=rounding.claimed and form.rounded_once)
        checks = tuple((p, tuple(check_pair(p, dtypes, how))) for p in pairing.pairs)
        constants, absent = _constants(form, pairing, graph, rounding)
        match = _Match(form, best is None, pairing, checks, tuple(constants), tuple(absent))
        if match.settled(len(ours), rounding.unit(rounding.reference)):
            return match
        if best is None or match.score > best.score:
            best = match
    if best is None:
        raise VerificationError(f"{reference.name} has no form that could be captured")
    return best


def _origins(known: Known, sample: Example, match: _Match) -> dict[str, Origin]:
    """What each layer was folded from, by its path; only looked up where something is wrong."""
    if all(check.passed for _, checks in match.checks for check in checks):
        return {}
    try:
        plain = known.unfolded(sample)
    except BnfxError:
        return {}
    return {layer.name: Origin(layer, norm) for layer, norm in neighbours(plain.layers)}


def _constants(
    form: Form, pairing: Pairing, graph: FileGraph, rounding: Rounding
) -> tuple[list[WeightCheck], list[str]]:
    truth = [c for c in form.traced.constants if c.value.numel() > 1]
    if not truth:
        return [], []
    sizes = {constant.value.numel() for constant in truth}
    paired = {name for pair in pairing.pairs for name in pair.ours.names.values()}
    stored = []
    for tensor in graph.tensors:
        count = 1
        for dim in tensor.dims:
            count *= dim
        if tensor.name in paired or count not in sizes or tensor.data_type == 8:
            continue
        array = tensor_array(tensor, graph.folder)
        plain = array if array.dtype.kind in "iub" else array.astype("f8")
        values = as_tensor(plain)
        stored.append(Stored(tensor.name, values, type_name(tensor.data_type)))
    return check_constants(truth, stored, rounding)


def _notes(
    reference: Known,
    match: _Match,
    strangers: list[str],
    graph: FileGraph,
    *,
    decides: bool,
) -> Iterator[str]:
    if not match.first:
        yield (
            f"weights: compared with the reference {match.form.name}, with which the file agrees "
            "most"
        )
    if not match.perfect:
        yield from (f"weights: not compared with the reference {why}" for why in reference.failures)
    if not decides:
        yield (
            "weights: the reference has BatchNorms, sums or products, which may have gone into "
            "several layers: other weights may be as right, so outputs decide"
        )
    truths = [(pair.truth, part) for pair in match.pairing.pairs for part in pair.truth.names]
    if odd := [t.names[part] for t, part in truths if not bool(t.parts[part].isfinite().all())]:
        yield f"weights: {_few(odd)} of the reference itself hold NaN or infinities"
    if match.pairing.missing:
        names = _few(layer.name for layer in match.pairing.missing)
        yield f"weights: no node of the file has the shape of {names}; outputs decide there"
    if strangers:
        yield (
            f"weights: those of {_few(strangers)} are of no folding that bnfx knows; the file does "
            "not say that bnfx wrote it, so outputs decide there"
        )
    if match.absent:
        yield f"constants: {_few(match.absent)} not found in the file; outputs decide there"
    if graph.hidden:
        yield (
            f"layers: {graph.hidden} inside subgraphs (of If, Loop or Scan) are not compared, only "
            "that the constants they store are the reference's; outputs decide there"
        )


def _few(names: Iterator[str] | Sequence[str]) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return ", ".join(repr(name) for name in found[:6]) + more
