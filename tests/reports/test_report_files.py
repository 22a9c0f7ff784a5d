"""Reports as Markdown and HTML: complete, self-contained, and harmless whatever they are told."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.reports.document import Paragraph, Table, blocks
from bnfx.reports.drawing import Bar, Dot, bars, dots, shorten, ticks
from bnfx.reports.report import FoldRecord, FoldReport, Report
from tests.support.laws import randomise

EVIL = "<script>document['title']='owned'</script>"
X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """A fold, a fold beside a branch, one that stays, and a module with a name to beware of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.left, self.left_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.add_module(EVIL, nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y = torch.relu(self.left_bn(self.left(y)) + y)
        return torch.sigmoid(self.get_submodule(EVIL)(torch.sigmoid(y)))


VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "href", "data") if name in found]
        assert not [name for name in found if name.startswith("on")], found
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(text: str) -> Page:
    """A well-formed page that loads nothing and runs nothing."""
    page = Page(text)
    assert page.open == []
    assert not {"script", "iframe", "object", "link", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "url(" not in text
    assert "@import" not in text
    return page


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return randomise(Net(), 0)


@pytest.fixture(scope="module")
def deployed(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> bnfx.DeployReport:
    f = tmp_path_factory.mktemp("deployed") / "a.onnx"
    return bnfx.deploy(net, X, f, dynamic_shapes=({0: "batch"},), benchmark=True)


def test_deploy_report_is_a_page(deployed: bnfx.DeployReport, tmp_path: Path) -> None:
    deployed.write(tmp_path / "a.html")
    page = check_page((tmp_path / "a.html").read_text())
    for words in ("Passed.", "is in place", "conv", "left_bn", "removed by", "median", "torch"):
        assert words in page.text
    assert EVIL in page.text, "the name is shown as text"
    assert page.tags.count("svg") >= 3 + 3, "three BatchNorms; ledger, latency and errors"
    headings = page.tags.count("h2")
    assert headings == page.tags.count("section") == len(page.links)


REPORTS: dict[str, Callable[[nn.Module, bnfx.DeployReport], Report]] = {
    "insert": lambda net, _: bnfx.plan_insert(net),
    "fold": lambda net, _: bnfx.plan_fold(net),
    "export": lambda _, done: done.export,
    "verify": lambda _, done: done.verify,
    "stages": lambda _, done: done.stages,
    "failed": lambda _, done: dataclasses.replace(
        done.verify, status="failed", first_divergence=EVIL
    ),
    "doctor": lambda _, __: bnfx.doctor(),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_has_every_form(
    net: nn.Module, deployed: bnfx.DeployReport, tmp_path: Path, kind: str
) -> None:
    report = REPORTS[kind](net, deployed)
    for suffix in (".json", ".txt", ".md", ".html"):
        report.save(str(tmp_path / f"a{suffix}"))
    assert report.to_json() == (tmp_path / "a.json").read_text().rstrip()
    json.loads(report.to_json())
    page = check_page((tmp_path / "a.html").read_text())
    markdown = (tmp_path / "a.md").read_text()
    plain = (tmp_path / "a.txt").read_text()
    cells = [c for t in blocks(report) if isinstance(t, Table) for row in t.rows for c in row]
    assert cells
    squeezed = "".join(plain.split())
    notebook = check_page(report._repr_html_())
    assert "<br>" not in notebook.text, "lines break, they do not say so"
    for cell in cells:
        assert " ".join(cell.split()) in page.text
        assert " ".join(cell.split()) in notebook.text
        assert cell.replace(" ", "") in squeezed or len(cell) > 20, "long cells wrap"
    assert "<script" not in markdown
    assert markdown.startswith("# ")


def test_markdown_tables_have_one_line_per_row() -> None:
    report = FoldReport((FoldRecord("a|b\n*c*", "kept", (), "`x` <b>"),), {})
    text = report.to_markdown()
    (row,) = [line for line in text.splitlines() if "kept" in line and line.startswith("|")]
    assert row == r"| a\|b \*c\* | kept | - | \`x\` &lt;b> |"


def test_wrong_suffix_is_refused(deployed: bnfx.DeployReport, tmp_path: Path) -> None:
    with pytest.raises(bnfx.BnfxError, match=r"\.html"):
        deployed.write(tmp_path / "a.pdf")


def test_deploy_writes_the_page_itself(net: nn.Module, tmp_path: Path) -> None:
    bnfx.deploy(net, X, tmp_path / "a.onnx", report=tmp_path / "a.html")
    assert "The graph around each BatchNorm" in check_page((tmp_path / "a.html").read_text()).text


def test_pictures_of_folds(net: nn.Module) -> None:
    records = bnfx.report(bnfx.fold_bn(net, X))
    assert isinstance(records, FoldReport)
    pictures = records.pictures()
    assert [p.title.split(":")[0] for p in pictures][:2] == ["bn", "left_bn"]
    for picture, record in zip(pictures, records.batch_norms, strict=True):
        root = ET.fromstring(picture.svg)
        before, after = picture.description.split("; after: ")
        assert f"BatchNorm {record.path}" in before
        assert ("BatchNorm" in after) == (record.verdict != "folded")
        assert all(layer in after for layer in record.into)
        marked = [r for r in root.iter("rect") if "into" in str(r.get("class"))]
        assert len(marked) == len(record.into)
        assert root.get("role") == "img"
        assert root.find("title") is not None


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("a", 2.0, 1.9, 2.5, "2 ms"), Bar("b", 1.0, 1.0, 1.0, "1 ms", "main")]
    root = ET.fromstring(bars("t", "d", rows, "ms"))
    long, short = (float(str(r.get("width"))) for r in root.iter("rect"))
    assert long == pytest.approx(2 * short, abs=0.2)
    assert ET.fromstring(bars("t", "d", [Bar("a", 0, 0, 0, "0")], "ms")) is not None


def test_dots_rise_with_their_values_and_mark_what_is_wrong() -> None:
    rows = [
        Dot("a", 0.0, True),
        Dot("b", 1e-7, True),
        Dot("c", 1e-3, False),
        Dot("d", math.inf, False),
    ]
    root = ET.fromstring(dots("t", "d", rows, 1e-5, "u"))
    heights = [float(str(c.get("cy"))) for c in root.iter("circle")]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] > heights[1]
    wrong = [c for c in root.iter("circle") if "wrong" in str(c.get("class"))]
    assert len(wrong) == 2
    assert "limit 1e-05" in "".join(root.itertext())


def test_words_of_pictures() -> None:
    assert shorten("layer1.0.conv", 8) == "….0.conv"
    assert ticks(17.0) == [0, 5, 10, 15]
    assert ticks(0.9) == pytest.approx([0, 0.5]) or len(ticks(0.9)) <= 6


def test_blocks_follow_what_a_report_draws() -> None:
    report = FoldReport((FoldRecord("bn", "folded", ("conv",), ""),), {})
    text, table = blocks(report)
    assert isinstance(text, Paragraph)
    assert text.text.startswith("fold_bn: 1 folded")
    assert isinstance(table, Table)
    assert table.rows == (("bn", "folded", "conv", "-"),)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_and_runs_nothing(net: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    bnfx.plan_fold(net).write(file)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(
        [str(CHROMIUM), *flags], capture_output=True, text=True, timeout=120, check=True
    )
    assert "<title>bnfx: fold</title>" in done.stdout
    assert "owned</title>" not in done.stdout
    assert done.stdout.count("<svg") == 3
