"""What each kind of report says first, and which pictures go with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from bnfx.benchmark import BenchReport, Latency
from bnfx.bundle import environment
from bnfx.deployment import DeployReport
from bnfx.environment.doctor import EnvReport
from bnfx.export import ExportReport
from bnfx.inspection import InspectReport
from bnfx.removal import StageReport
from bnfx.reports.document import (
    Block,
    Document,
    Paragraph,
    Picture,
    Section,
    Status,
    Table,
    blocks,
)
from bnfx.reports.drawing import Bar, Dot, bars, dots
from bnfx.reports.report import FoldReport, InsertReport, Report, tally
from bnfx.verification.verdicts import VerifyReport

Facts = tuple[tuple[str, str], ...]


def document_of(
    report: Report, graphs: tuple[Picture, ...] = (), more: tuple[Report, ...] = ()
) -> Document:
    """The report as a document.

    Args:
        report: Any report of bnfx, which gives the verdict.
        graphs: Pictures of the graph around each BatchNorm, from `bnfx.reports.graph_pictures`.
        more: Reports whose sections follow.
    """
    status, verdict, facts = headline(report)
    sections = [section for part in (report, *more) for section in _sections(part)]
    if graphs:
        note = "Orange: the BatchNorm. Blue: the layers that carry it after folding."
        around = Section("The graph around each BatchNorm", (Paragraph(note), *graphs))
        sections.insert(min(2, len(sections)), around)
    versions = tuple(environment().items())
    here = Section("Environment", (Table("", ("name", "version"), versions),))
    title = f"bnfx: {_title(report)}"
    return Document(title, status, verdict, facts, (*sections, here))


def _title(report: Report) -> str:
    path = getattr(report, "path", None)
    kind = type(report).__name__.removesuffix("Report").lower()
    names = {"inspect": "ONNX file", "stage": "ledger", "env": "doctor", "bench": "benchmark"}
    return f"{names.get(kind, kind)} {path}" if isinstance(path, str) else names.get(kind, kind)


@functools.singledispatch
def headline(report: Report) -> tuple[Status, str, Facts]:
    """Whether it is good news, the news in a sentence, and the numbers that matter most."""
    return "neutral", type(report).__name__, ()


@headline.register
def _(report: InsertReport) -> tuple[Status, str, Facts]:
    done = sum(site.action == "inserted" for site in report.sites)
    return "neutral", f"BatchNorm at {done} of {len(report.sites)} affine layers.", ()


@headline.register
def _(report: FoldReport) -> tuple[Status, str, Facts]:
    done = sum(bn.verdict == "folded" for bn in report.batch_norms)
    facts = (("verdicts", tally(bn.verdict for bn in report.batch_norms)),)
    return "neutral", f"{done} of {len(report.batch_norms)} BatchNorms folded.", facts


@headline.register
def _(report: StageReport) -> tuple[Status, str, Facts]:
    counts = tally(bn.removed_by or "nobody" for bn in report.batch_norms)
    return "neutral", f"{len(report.batch_norms)} BatchNorms, removed by: {counts}.", ()


@headline.register
def _(report: ExportReport) -> tuple[Status, str, Facts]:
    facts = (
        ("opset", str(report.opset)),
        ("nodes", str(sum(report.operators.values()))),
        ("BatchNormalization left", str(report.batch_norms_left)),
        ("size", f"{report.size:,} bytes"),
    )
    return "neutral", f"{report.path} is written, not yet verified.", facts


@headline.register
def _(report: InspectReport) -> tuple[Status, str, Facts]:
    facts = (
        ("opset", str(report.opset)),
        ("nodes", str(sum(report.operators.values()))),
        ("elements in weights", f"{report.parameters:,}"),
        ("written by", f"bnfx {report.by_bnfx}" if report.by_bnfx else report.producer or "-"),
    )
    count = len(report.batch_norms) or "no"
    nodes = "node" if count == 1 else "nodes"
    return "neutral", f"{report.path} holds {count} BatchNormalization {nodes}.", facts


@headline.register
def _(report: VerifyReport) -> tuple[Status, str, Facts]:
    ran = ", ".join(f"{n} on {name}" for name, n in report.providers.items())
    facts = (
        ("error of the outputs, in budgets", f"{report.worst_ratio:.2f}"),
        ("precision", report.precision),
        ("inputs", str(report.num_inputs)),
        ("batch sizes", ", ".join(map(str, report.batch_sizes)) or "-"),
        ("nodes ran", ran or "none"),
        ("BatchNormalization left", str(report.batch_norms_left)),
    )
    if report.status == "passed":
        return "good", f"{report.path} computes what {report.reference} computes.", facts
    if report.status == "skipped":
        return "warning", f"{report.path} was not verified.", facts
    where = report.first_divergence or "see the table"
    return "bad", f"{report.path} does not compute what {report.reference} computes: {where}", facts


@headline.register
def _(report: BenchReport) -> tuple[Status, str, Facts]:
    first = report.arms[0]
    facts = (
        ("median", _ms(first.median)),
        ("provider", report.provider),
        ("runs of each arm", str(report.num_runs)),
        ("threads", str(report.num_threads or "onnxruntime's choice")),
    )
    if report.ratio is None:
        return "neutral", f"{first.path} takes {_ms(first.median)}.", facts
    change = f"{abs(1 - report.ratio):.1%} {'less' if report.ratio < 1 else 'more'}"
    return "neutral", f"{first.path} takes {change} time than the baseline.", facts


@headline.register
def _(report: DeployReport) -> tuple[Status, str, Facts]:
    status, verdict, facts = headline(report.verify)
    fold = sum(bn.verdict == "folded" for bn in report.fold.batch_norms)
    own: Facts = (
        ("BatchNorms folded", f"{fold} of {len(report.fold.batch_norms)}"),
        ("size", f"{report.export.size:,} bytes"),
        ("opset", str(report.export.opset)),
    )
    if report.benchmark is not None and report.benchmark.ratio is not None:
        own += (("latency, to the unfolded file", f"{report.benchmark.ratio:.3f}"),)
    if report:
        done = f"{report.path} is in place; it computes what {report.verify.reference} computes."
        return status, done, (*own, *facts)
    why = report.verify.first_divergence or verdict
    return (
        "bad",
        f"{report.path} was not written; an older file is as it was. {why}",
        (*own, *facts),
    )


@headline.register
def _(report: EnvReport) -> tuple[Status, str, Facts]:
    verdicts: dict[str, tuple[Status, str]] = {
        "ok": ("good", "This environment can do all of it."),
        "warning": ("warning", "This environment works; something in it needs a look."),
        "error": ("bad", "This environment does not work yet."),
    }
    return *verdicts[report.status], ()


@functools.singledispatch
def _sections(report: Report) -> Iterator[Section]:
    headings = {FoldReport: "Folding", InsertReport: "Insertion", InspectReport: "BatchNorms"}
    heading = headings.get(type(report), "Report")
    yield Section(heading, tuple(blocks(report)))


@_sections.register
def _(report: DeployReport) -> Iterator[Section]:
    verification, *errors = _sections(report.verify)
    yield verification
    yield from _sections(report.stages)
    yield from errors
    if report.benchmark is not None:
        yield from _sections(report.benchmark)
    yield Section("File", tuple(blocks(report.export)))
    steps = tuple((step, f"{seconds:.2f}") for step, seconds in report.seconds.items())
    yield Section("Time of the steps", (Table("", ("step", "seconds"), steps),))


@_sections.register
def _(report: VerifyReport) -> Iterator[Section]:
    proof = tuple((name, str(value)) for name, value in report.proof.items())
    shown = bool(proof) and report.provider != "cpu"
    table = (Table("What proves where it ran", ("", "found"), proof),) if shown else ()
    yield Section("Verification", (*blocks(report), *table))
    if found := tuple(_error_pictures(report)):
        yield Section("Error by layer", found)


@_sections.register
def _(report: StageReport) -> Iterator[Section]:
    rows = [Bar(stage, n, n, n, str(n), "main") for stage, n in report.left.items()]
    picture: tuple[Block, ...] = ()
    if rows:
        title = "BatchNorms left after each stage"
        picture = (Picture(title, _said(rows), bars(title, _said(rows), rows, "BatchNorms")),)
    yield Section("Who removed which BatchNorm", (*picture, *blocks(report)))


@_sections.register
def _(report: BenchReport) -> Iterator[Section]:
    rows = [_latency(arm) for arm in report.arms]
    title = "Latency: median, and the middle half of the runs"
    drawn = bars(title, _said(rows), rows, "ms")
    yield Section("Latency", (Picture(title, _said(rows), drawn), *blocks(report)))


def _latency(arm: Latency) -> Bar:
    kind = "main" if arm.arm.startswith("file") else "quiet" if arm.arm == "floor" else "other"
    median, low, high = (1e3 * t for t in (arm.median, arm.lower_quartile, arm.upper_quartile))
    return Bar(arm.arm, median, low, high, _ms(arm.median), kind)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _said(rows: list[Bar]) -> str:
    return "; ".join(f"{row.label} {row.text}" for row in rows)


def _error_pictures(report: VerifyReport) -> Iterator[Block]:
    if report.layers:
        series = [Dot(layer.name, layer.error, layer.passed) for layer in report.layers]
        title = "Error of each layer's output against float64, all earlier errors included"
        yield _series(title, series, None, "relative error, layers in order")
        series = [Dot(layer.name, layer.ratio, layer.passed) for layer in report.layers]
        limit = next((tier.limit for tier in report.tiers if tier.tier == "layers"), None)
        title = "Each layer on its own input: error of the worst channel, in units of torch's own"
        yield _series(title, series, limit, "ratio, layers in order")
    if report.weights:
        series = [Dot(weight.name, weight.ratio, weight.passed) for weight in report.weights]
        limit = next((tier.limit for tier in report.tiers if tier.tier == "weights"), None)
        title = "Each folded weight against the float64 formula, in units of rounding"
        yield _series(title, series, limit, "units, weights in order")
    yield from _error_tables(report)


def _error_tables(report: VerifyReport) -> Iterator[Table]:
    words = {True: "passed", False: "wrong"}
    if report.layers:
        columns = ("layer", "kind", "error", "ratio", "worst channel", "")
        rows = (
            (d.name, d.kind, f"{d.error:.2e}", f"{d.ratio:.3g}", str(d.channel), words[d.passed])
            for d in report.layers
        )
        yield Table("Layers", columns, tuple(rows))
    if report.weights:
        weights = (
            (w.name, f"{w.ratio:.3g}", str(w.channel), w.reason or words[w.passed])
            for w in report.weights
        )
        yield Table("Weights", ("weight", "units", "worst channel", ""), tuple(weights))


def _series(title: str, series: list[Dot], limit: float | None, unit: str) -> Picture:
    wrong = [dot.label for dot in series if not dot.passed]
    finite = [dot for dot in series if not math.isnan(dot.value)]
    worst = max(finite, key=lambda dot: dot.value, default=None)
    said = f"{len(series)} values"
    if worst is not None:
        said += f", largest {worst.value:.3g} at {worst.label}"
    said += f"; wrong: {', '.join(wrong)}" if wrong else "; none is wrong"
    return Picture(title, said, dots(title, said, series, limit, unit))
