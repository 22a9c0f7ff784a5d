"""Did a file really run on a provider, and did it compute what it computes elsewhere?

No model is needed: the file is held against itself, evaluated in float64, in units of the error
that it has on the CPU. Which node ran where is asked of onnxruntime and of its profile, and the
arithmetic is seen from a canary (`bnfx.runtime.canary`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType

from bnfx.reports.document import Headline, Section, blocks
from bnfx.reports.report import Report, table
from bnfx.runtime.devices import device_name
from bnfx.runtime.providers import Where
from bnfx.verification.references import Precision
from bnfx.verification.verdicts import Status, VerifyReport
from bnfx.verify import verify_onnx


@dataclass(frozen=True)
class ProofReport(Report):
    """Where each node of a file ran, in which arithmetic, and how far off that is."""

    #: "passed", "failed" or "skipped".
    status: Status
    #: The file.
    path: str
    #: Execution provider that was asked for, by onnxruntime's name.
    provider: str
    #: What it ran on, such as "NVIDIA H200"; "" where nothing tells.
    device: str
    #: Execution provider -> operator -> nodes.
    operators: Mapping[str, Mapping[str, int]]
    #: The coarsest arithmetic that the canary saw in a layer, such as "float32" or "TF32".
    arithmetic: str
    #: The comparison of the file with itself in float64, and where each node lies.
    verification: VerifyReport

    def __bool__(self) -> bool:
        return self.status == "passed"

    def headline(self) -> Headline:
        """Whether it ran there, and computed what it must."""
        place = f"{self.provider} ({self.device})" if self.device else self.provider
        found = self.verification.headline()
        facts = (
            ("provider", place),
            ("nodes there", str(self._count(self.provider))),
            ("nodes on the CPU, as allowed", str(self._elsewhere)),
            ("copies between devices", str(self.verification.proof.get("memcpy_nodes", 0))),
            ("arithmetic", self.arithmetic),
        )
        verdict = f"{self.path} ran on {place} in {self.arithmetic}, and computes what it must."
        if not self:
            why = self.verification.first_divergence or found.verdict
            verdict = f"{self.path} ran on {place} in {self.arithmetic}, and is not proved: {why}"
        return Headline(f"bnfx: prove {self.path}", found.status, verdict, (*facts, *found.facts))

    def _count(self, provider: str) -> int:
        return sum(self.operators.get(provider, {}).values())

    @property
    def _elsewhere(self) -> int:
        return sum(self._count(name) for name in self.operators if name != self.provider)

    def sections(self) -> Iterator[Section]:
        """Where nodes ran, in which arithmetic, and the comparison."""
        yield Section("Where it ran", tuple(blocks(self._nodes())))
        yield Section("Arithmetic", tuple(blocks(self._canary())))
        yield Section("Against itself in float64", tuple(blocks(self.verification)))

    def __rich__(self) -> RenderableType:
        return Group(self._nodes(), self._canary(), self.verification)

    def _nodes(self) -> RenderableType:
        rows = (
            (provider, str(sum(kinds.values())), ", ".join(f"{n} {k}" for k, n in kinds.items()))
            for provider, kinds in self.operators.items()
        )
        title = f"prove_onnx: {self.headline().verdict}"
        return table(title, ("provider", "nodes", "operators"), rows)

    def _canary(self) -> RenderableType:
        proof = self.verification.proof
        values = proof.get("canary", {})
        rows = [
            (kind, f"{values[kind]:.12g}", name)
            for kind, name in proof.get("arithmetic", {}).items()
        ]
        rows += [(kind, "", f"sums in {name}") for kind, name in proof.get("sums", {}).items()]
        rows += [(kind, "", f"none: {why}") for kind, why in proof.get("not tried", {}).items()]
        title = (
            "1 + 2^-12 times one came back as, and sums were in:"
            if rows
            else "The CPU computes in float32."
        )
        return table(title, ("layer", "came back", "arithmetic"), rows)


def prove_onnx(
    f: str | os.PathLike[str],
    args: Any = None,
    *,
    provider: str = "cpu",
    provider_options: Mapping[str, Any] | None = None,
    allow_on_cpu: Sequence[str] | None = None,
    num_inputs: int = 8,
    precision: Precision = "fp32",
    max_ratio: float = 4.0,
    timeout: float | None = None,
) -> ProofReport:
    """Run a file on a provider and prove that it ran there, and computed what it must.

    Args:
        f: The ONNX file, written by anyone.
        args: Example inputs in the order of the file's, a tuple or a lone tensor; None draws them
            by what the file declares.
        provider: "cuda:1", "openvino" or any other, as in `verify_onnx`.
        provider_options: Options of the provider, as in `verify_onnx`.
        allow_on_cpu: Operators that may run on the CPU all the same, as in `verify_onnx`.
        num_inputs: Inputs to pool the error over.
        precision: What the provider may compute in, and what the budget is taken from.
        max_ratio: Limit of the error, in budgets.
        timeout: Seconds that onnxruntime gets, as in `verify_onnx`.

    Raises:
        ProviderError: The provider did not run the graph, or not in the arithmetic asked for.
        VerificationError: The file cannot be read, run on the CPU, or evaluated in float64.
    """
    where = Where.of(provider, provider_options, allow_on_cpu)
    found = verify_onnx(
        f,
        f,
        args,
        provider=provider,
        provider_options=provider_options,
        allow_on_cpu=allow_on_cpu,
        num_inputs=num_inputs,
        precision=precision,
        max_ratio=max_ratio,
        localize=False,
        timeout=timeout,
    )
    operators: dict[str, Counter[str]] = {where.name: Counter()}
    for node in found.nodes:
        operators.setdefault(node.provider, Counter())[node.operator] += 1
    return ProofReport(
        status=found.status,
        path=found.path,
        provider=where.name,
        device=device_name(where),
        operators={name: dict(kinds.most_common()) for name, kinds in operators.items()},
        arithmetic=found.proof.get("coarsest") or _own_arithmetic(found.precision, where),
        verification=found,
    )


def _own_arithmetic(precision: str, where: Where) -> str:
    """Of a file in a narrow type; onnxruntime's CPU has no bfloat16, and a copy in float32 ran."""
    if where.on_cpu and precision != "fp16":
        return "float32"
    return {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
