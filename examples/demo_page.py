"""The page that the demo ends with: one HTML file with what was done, measured and verified."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from rich.table import Table as RichTable

from bnfx.reports.document import Facts, Headline, Picture, Section, Status, blocks
from bnfx.reports.report import Report


@dataclass(frozen=True)
class DemoReport(Report):
    """The demo as a report: accuracies and curves, then for each network what bnfx tells of it."""

    good: bool
    facts: Facts
    accuracy: RichTable
    #: The picture of the training curves.
    curves: Path
    #: Title of a network -> the reports of its insertion, folding, verification and latency.
    networks: Mapping[str, Sequence[Report]]

    def __rich__(self) -> RichTable:
        return self.accuracy

    def headline(self) -> Headline:
        """Whether all files are verified."""
        status: Status = "good" if self.good else "bad"
        said = "the files give what the trained networks give" if self.good else "see below"
        verdict = f"BatchNorm inserted, trained, folded, exported to ONNX; {said}."
        return Headline("bnfx: the demo", status, verdict, self.facts)

    def sections(self) -> Iterator[Section]:
        """The results of both networks, then each network's reports."""
        shown = embedded(self.curves, "Test accuracy over the steps of training")
        yield Section("Results", (*blocks(self.accuracy), shown))
        for title, reports in self.networks.items():
            for part in (section for report in reports for section in report.sections()):
                name = part.heading[0].lower() + part.heading[1:]
                yield replace(part, heading=f"{title}: {name}")


def embedded(image: Path, title: str) -> Picture:
    """A PNG as a picture that needs no file beside the page."""
    with Image.open(image) as opened:
        width, height = opened.size
    data = base64.b64encode(image.read_bytes()).decode()
    svg = (
        f'<svg class="picture chart" viewBox="0 0 {width} {height}" role="img">'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/></svg>'
    )
    return Picture(title, "With BatchNorm the curves rise sooner.", svg)
