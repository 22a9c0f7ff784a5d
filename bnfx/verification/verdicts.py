"""What verification found: the verdicts on weights, layers and outputs, and the report of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bnfx.errors import VerificationError
from bnfx.reports.report import Report, table
from bnfx.verification.outputs import OutputCheck

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class WeightCheck:
    """One weight of the file against the float64 folding of the reference.

    Attributes:
        name: Name in the folded model.
        stored: Name of the value in the file.
        node: The node of the file that it feeds; "" where several do.
        ratio: Largest distance, in units of rounding of the largest weight of its channel.
        channel: Where that is, along the output channels.
        passed: Whether ratio is within the limit.
        reason: Why not; empty if it is.
    """

    name: str
    stored: str
    node: str
    ratio: float
    channel: int
    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the file on the input that the file itself gives it.

    Attributes:
        name: Module path in the reference, or the node's name.
        node: The node of the file.
        kind: Operator, such as "Conv".
        ratio: Error of the worst channel, in units of the error of torch's own layer.
        channel: The worst channel.
        error: Error of the layer's output against the float64 reference on the same network input,
            relative, all earlier errors included; what a picture of error by layer shows.
        passed: Whether ratio is within the limit.
    """

    name: str
    node: str
    kind: str
    ratio: float
    channel: int
    error: float
    passed: bool


@dataclass(frozen=True)
class TierCheck:
    """One tier as a whole.

    Attributes:
        tier: "weights", "layers" or "outputs".
        status: "passed", "failed" or "skipped".
        checked: How many weights, layers or outputs were compared.
        of: How many there are.
        worst: The largest ratio.
        limit: Its limit.
        decides: Whether a failure of this tier fails the verification; layers only point.
        reason: Why it was skipped, or what it could not see.
    """

    tier: Literal["weights", "layers", "outputs"]
    status: Status
    checked: int
    of: int
    worst: float
    limit: float
    decides: bool
    reason: str


@dataclass(frozen=True)
class Divergence:
    """The first thing that is wrong, in execution order.

    Attributes:
        tier: The tier that saw it first: "weights", "structure", "layers" or "outputs".
        module: Module path in the reference; "" where unknown.
        node: Node or output of the file.
        channel: The worst channel; None where it makes no sense.
        ratio: By how many units it is off.
        cause: The likely cause, such as "eps was forgotten"; "" where none fits.
        gamma, var, eps: Of the BatchNorm behind the worst channel; None without one.
        message: All of it in a sentence.
    """

    tier: Literal["weights", "structure", "layers", "outputs"]
    module: str
    node: str
    channel: int | None
    ratio: float
    cause: str
    gamma: float | None = None
    var: float | None = None
    eps: float | None = None
    message: str = ""


@dataclass(frozen=True)
class VerifyReport(Report):
    """What was checked, and how it came out.

    Attributes:
        status: "passed", "failed" or "skipped".
        path: The file.
        reference: What it was compared with: the class of the model, or the other file.
        provider: Where it was asked to run.
        providers: Execution provider -> number of nodes that it ran.
        proof: What proves that, such as the TF32 canary and the libraries loaded.
        precision: Precision that the budget is taken from.
        num_inputs: Inputs that outputs were pooled over.
        batch_sizes: Batch sizes that were run.
        batch_norms_left: BatchNormalization nodes in the file.
        tiers: One summary each for weights, layers and outputs.
        outputs: One record for each output and batch size.
        layers: One record for each layer of the file that the reference knows, in order.
        weights: One record for each weight held against the float64 folding.
        notes: What was not checked, and why.
        first_divergence: The first thing that is wrong, as a sentence.
        divergence: The same in parts.
        seconds: Wall-clock time of the verification.
    """

    status: Status
    path: str
    reference: str
    provider: str
    providers: Mapping[str, int]
    proof: Mapping[str, Any]
    precision: str
    num_inputs: int
    batch_sizes: tuple[int, ...]
    batch_norms_left: int
    tiers: tuple[TierCheck, ...]
    outputs: tuple[OutputCheck, ...]
    layers: tuple[LayerCheck, ...]
    weights: tuple[WeightCheck, ...]
    notes: tuple[str, ...]
    first_divergence: str | None
    divergence: Divergence | None
    seconds: float

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

    def __rich__(self) -> RenderableType:
        ran = ", ".join(f"{n} nodes on {name}" for name, n in self.providers.items())
        lines = [
            f"verify_onnx: {self.status}. {self.path}: {ran}; {self.num_inputs} inputs; "
            f"{self.batch_norms_left} BatchNormalization left; {self.seconds:.1f} s",
            *(f"{tier.tier}: {_tier_line(tier)}" for tier in self.tiers),
            *self.notes,
            *([f"first divergence: {self.first_divergence}"] if self.first_divergence else []),
        ]
        rows = [
            (
                *(o.name, str(list(o.shape)), o.dtype, f"{o.err:.2e}", f"{o.budget:.2e}"),
                *(f"{o.ratio:.2f}", "passed" if o.passed else o.reason),
            )
            for o in self.outputs
        ]
        rows += [
            (w.name, "", "weight", "", "", f"{w.ratio:.3g}", w.reason)
            for w in self.weights
            if not w.passed
        ]
        columns = ("output", "shape", "dtype", "error", "budget", "ratio", "")
        return table("\n".join(lines), columns, rows)


def _tier_line(tier: TierCheck) -> str:
    if tier.status == "skipped":
        return f"skipped: {tier.reason}"
    text = f"{tier.status}, {tier.checked} of {tier.of}, worst {tier.worst:.3g} of {tier.limit:g}"
    return f"{text}; {tier.reason}" if tier.reason else text
