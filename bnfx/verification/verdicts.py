"""What verification found: the verdicts on weights, layers and outputs, and the report of all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import RenderableType

from bnfx.errors import VerificationError
from bnfx.reports.document import Block, Headline, Picture, Section, Table, blocks
from bnfx.reports.drawing import Dot, dots
from bnfx.reports.report import Report, table
from bnfx.verification.outputs import OutputCheck

#: Wrong weights that a printed report lists; a page has all of them.
_MOST_ROWS = 6

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class WeightCheck:
    """One weight of the file against the float64 folding of the reference."""

    #: Name in the folded model.
    name: str
    #: Name of the value in the file.
    stored: str
    #: The node of the file that it feeds; "" where several do.
    node: str
    #: Largest distance, in units of rounding of the largest weight of its channel.
    ratio: float
    #: Where that is, along the output channels.
    channel: int
    #: Whether ratio is within the limit.
    passed: bool
    #: Why not; empty if it is.
    reason: str = ""


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the file on the input that the file itself gives it."""

    #: Module path in the reference, or the node's name.
    name: str
    #: The node of the file.
    node: str
    #: Operator, such as "Conv".
    kind: str
    #: Error of the worst channel, in units of the error of torch's own layer.
    ratio: float
    #: The worst channel.
    channel: int
    #: Error of the layer's output against the float64 reference on the same network input,
    #: relative, all earlier errors included; what a picture of error by layer shows.
    error: float
    #: Whether ratio is within the limit.
    passed: bool


@dataclass(frozen=True)
class TierCheck:
    """One tier as a whole."""

    #: "weights", "layers" or "outputs".
    tier: Literal["weights", "layers", "outputs"]
    #: "passed", "failed" or "skipped".
    status: Status
    #: How many weights, layers or outputs were compared.
    checked: int
    #: How many there are.
    of: int
    #: The largest ratio.
    worst: float
    #: Its limit.
    limit: float
    #: Whether a failure of this tier fails the verification; layers only point.
    decides: bool
    #: Why it was skipped, or what it could not see.
    reason: str


@dataclass(frozen=True)
class Divergence:
    """The first thing that is wrong, in execution order."""

    #: The tier that saw it first; "reference" where that has no truth to compare with.
    tier: Literal["weights", "structure", "layers", "outputs", "reference"]
    #: Module path in the reference; "" where unknown.
    module: str
    #: Node or output of the file.
    node: str
    #: The worst channel; None where it makes no sense.
    channel: int | None
    #: By how many units it is off.
    ratio: float
    #: The likely cause, such as "eps was forgotten"; "" where none fits.
    cause: str
    #: Of the BatchNorm behind the worst channel; None without one.
    gamma: float | None = None
    var: float | None = None
    eps: float | None = None
    #: All of it in a sentence.
    message: str = ""


@dataclass(frozen=True)
class NodePlace:
    """A node of the graph that onnxruntime made of the file, and who holds it."""

    #: Execution provider.
    provider: str
    #: Type, such as "Conv".
    operator: str
    name: str


@dataclass(frozen=True)
class VerifyReport(Report):
    """What was checked, and how it came out."""

    #: "passed", "failed" or "skipped".
    status: Status
    #: The file.
    path: str
    #: What it was compared with: the class of the model, or the other file.
    reference: str
    #: Where it was asked to run.
    provider: str
    #: Execution provider -> number of nodes that it ran.
    providers: Mapping[str, int]
    #: What proves that, such as the TF32 canary and the libraries loaded.
    proof: Mapping[str, Any]
    #: Precision that the budget is taken from.
    precision: str
    #: Inputs that outputs were pooled over.
    num_inputs: int
    #: Batch sizes that were run.
    batch_sizes: tuple[int, ...]
    #: BatchNormalization nodes in the file.
    batch_norms_left: int
    #: One summary each for weights, layers and outputs.
    tiers: tuple[TierCheck, ...]
    #: One record for each output and batch size.
    outputs: tuple[OutputCheck, ...]
    #: One record for each layer of the file that the reference knows, in order.
    layers: tuple[LayerCheck, ...]
    #: One record for each weight held against the float64 folding.
    weights: tuple[WeightCheck, ...]
    #: What was not checked, and why.
    notes: tuple[str, ...]
    #: The first thing that is wrong, as a sentence.
    first_divergence: str | None
    #: The same in parts.
    divergence: Divergence | None
    #: Wall-clock time of the verification.
    seconds: float
    #: Where each node ran; what one kernel fuses node by node. Empty where it was not told.
    nodes: tuple[NodePlace, ...] = ()

    def __bool__(self) -> bool:
        return self.status == "passed"

    @property
    def worst_ratio(self) -> float:
        """Largest ratio of errors over the outputs."""
        return max((output.ratio for output in self.outputs), default=math.nan)

    def raise_for_failure(self) -> None:
        """Raise VerificationError unless the status is "passed"."""
        if not self:
            message = f"{self.path} {self.status}: {self.first_divergence}\n{self}"
            raise VerificationError(message, self)

    def headline(self) -> Headline:
        """Whether the file computes what the reference computes."""
        ran = ", ".join(f"{n} on {name}" for name, n in self.providers.items())
        facts = (
            ("error of the outputs, in budgets", f"{self.worst_ratio:.2f}"),
            ("precision", self.precision),
            ("inputs", str(self.num_inputs)),
            ("batch sizes", ", ".join(map(str, self.batch_sizes)) or "-"),
            ("nodes ran", ran or "none"),
            ("BatchNormalization left", str(self.batch_norms_left)),
        )
        title = f"bnfx: verify {self.path}"
        if self.status == "passed":
            verdict = f"{self.path} computes what {self.reference} computes."
            return Headline(title, "good", verdict, facts)
        if self.status == "skipped":
            return Headline(title, "warning", f"{self.path} was not verified.", facts)
        where = self.first_divergence or "see the table"
        verdict = f"{self.path} does not compute what {self.reference} computes: {where}"
        return Headline(title, "bad", verdict, facts)

    def sections(self) -> Iterator[Section]:
        """The table, what proves where it ran, and the errors by layer."""
        proof = tuple((name, str(value)) for name, value in self.proof.items())
        shown = bool(proof) and self.provider != "cpu"
        table = (Table("What proves where it ran", ("", "found"), proof),) if shown else ()
        yield Section("Verification", (*blocks(self), *table))
        if found := tuple(self._errors()):
            yield Section("Error by layer", found)

    def _errors(self) -> Iterator[Block]:
        limits = {tier.tier: tier.limit for tier in self.tiers}
        words = {True: "passed", False: "wrong"}
        if self.layers:
            yield _series(
                "Error of each layer's output against float64, all earlier errors included",
                [Dot(layer.name, layer.error, layer.passed) for layer in self.layers],
                None,
                "relative error, layers in order",
            )
            yield _series(
                "Each layer on its own input: error of the worst channel, in units of torch's own",
                [Dot(layer.name, layer.ratio, layer.passed) for layer in self.layers],
                limits.get("layers"),
                "ratio, layers in order",
            )
        if self.weights:
            yield _series(
                "Each folded weight against the float64 formula, in units of rounding",
                [Dot(weight.name, weight.ratio, weight.passed) for weight in self.weights],
                limits.get("weights"),
                "units, weights in order",
            )
        if self.layers:
            columns = ("layer", "kind", "error", "ratio", "worst channel", "")
            rows = (
                (
                    d.name,
                    d.kind,
                    f"{d.error:.2e}",
                    f"{d.ratio:.3g}",
                    str(d.channel),
                    words[d.passed],
                )
                for d in self.layers
            )
            yield Table("Layers", columns, tuple(rows))
        if self.weights:
            weights = (
                (w.name, f"{w.ratio:.3g}", str(w.channel), w.reason or words[w.passed])
                for w in self.weights
            )
            yield Table("Weights", ("weight", "units", "worst channel", ""), tuple(weights))

    def __rich__(self) -> RenderableType:
        ran = ", ".join(f"{n} nodes on {name}" for name, n in self.providers.items())
        lines = [
            f"verify_onnx: {self.status}. {self.path}: {ran}; {self.num_inputs} inputs; "
            f"{self.batch_norms_left} BatchNormalization left; {self.seconds:.1f} s",
            *(f"{tier.tier}: {_tier_line(tier)}" for tier in self.tiers),
            *(note for note in self.notes if not any(note in tier.reason for tier in self.tiers)),
            *([f"first divergence: {self.first_divergence}"] if self.first_divergence else []),
        ]
        limits = {tier.tier: tier.limit for tier in self.tiers}
        limit = limits.get("outputs", math.nan)
        rows = [
            (
                *(o.name, str(list(o.shape)), o.dtype, f"{o.err:.2e}", f"{o.budget:.2e}"),
                *(f"{_times(o.ratio)} of {limit:g}", "passed" if o.passed else o.reason),
            )
            for o in self.outputs
        ]
        wrong = [weight for weight in self.weights if not weight.passed]
        rows += [
            (w.name, "", "weight", "", "", f"{_times(w.ratio)} of {limits['weights']:g}", w.reason)
            for w in wrong[:_MOST_ROWS]
        ]
        if more := wrong[_MOST_ROWS:]:
            rows.append((f"{len(more)} more", "", "weights", "", "", "", "wrong too"))
        if rows:
            lines.append(
                f"budget: the error of the reference itself in {self.precision}, against float64; "
                f"that of the file may be {limit:g} times as large"
            )
        columns = ("output", "shape", "dtype", "error", "budget", "in budgets", "")
        return table("\n".join(lines), columns, rows)


def _series(title: str, series: list[Dot], limit: float | None, unit: str) -> Picture:
    wrong = [dot.label for dot in series if not dot.passed]
    worst = max((d for d in series if not math.isnan(d.value)), key=lambda d: d.value, default=None)
    said = f"{len(series)} values"
    if worst is not None:
        said += f", largest {worst.value:.3g} at {worst.label}"
    said += f"; wrong: {', '.join(wrong)}" if wrong else "; none is wrong"
    return Picture(title, said, dots(title, said, series, limit, unit))


def _times(ratio: float) -> str:
    """By how many units something is off, as far as the number still says anything."""
    return "over 1e6" if ratio > 1e6 else f"{ratio:.3g}"


def _tier_line(tier: TierCheck) -> str:
    if tier.status == "skipped":
        return f"skipped: {tier.reason}"
    text = (
        f"{tier.status}, {tier.checked} of {tier.of}, worst {_times(tier.worst)} of {tier.limit:g}"
    )
    return f"{text}; {tier.reason}" if tier.reason else text
