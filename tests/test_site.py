"""The documentation: tutorials and examples run as they stand, and every page is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import zoo

ROOT = Path(__file__).parent.parent
SITE = ROOT / "examples" / "site"
PAGES = sorted((SITE / "docs").rglob("*.md"))
TUTORIALS = sorted((SITE / "docs" / "tutorials").glob("*.py"))

pytestmark = pytest.mark.xdist_group("examples")


def run(code: str, cwd: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(tutorial: Path, tmp_path: Path) -> None:
    run(tutorial.read_text(encoding="utf-8"), tmp_path)


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda path: path.stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    before = ""
    if page.stem in ("timm", "transformers"):
        zoo.timm()
        pytest.importorskip(page.stem)
        before = f"from bnfx.cli.libraries import open_library\nopen_library({page.stem!r})\n"
    run(before + "\n".join(blocks(page)), tmp_path)


def test_every_page_is_in_the_menu() -> None:
    menu = (SITE / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    told = set(re.findall(r"[\w/-]+\.(?:md|py)", menu))
    there = {str(path.relative_to(SITE / "docs")) for path in (*PAGES, *TUTORIALS)}
    taken = set(re.findall(r'"([\w/-]+\.md)": "', (SITE / "hooks.py").read_text(encoding="utf-8")))
    assert told == there | taken


def test_every_picture_is_there() -> None:
    for page in PAGES:
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            taken = page.stem == "conformance"  # its picture is kept with its numbers
            there = ROOT / "examples" / "conformance" / "results" if taken else page.parent
            assert (there / (Path(name).name if taken else name)).is_file(), f"{page.name}: {name}"
