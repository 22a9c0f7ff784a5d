"""The example of CONTRIBUTING.md, "How to add an operator", carried out on a copy of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
_PLACE = re.compile(r"# (\S+\.py), (?:behind: (.*)|at the end)\n")


def blocks() -> list[str]:
    """The Python blocks of the section: edits, which begin with a place, and a check."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## How to add an operator\n")[2].partition("\n## ")[0]
    return _BLOCK.findall(section)


def edit(root: Path, block: str) -> None:
    """Put a block where its first line says."""
    place = _PLACE.match(block)
    assert place is not None
    file, code = root / place[1], block[place.end() :]
    text = file.read_text(encoding="utf-8")
    if place[2] is None:
        file.write_text(f"{text}\n\n{code}", encoding="utf-8")
        return
    before, anchor, after = text.partition(place[2])
    assert anchor, f"{place[1]} has no {place[2]!r}"
    line, newline, rest = after.partition("\n")
    file.write_text(before + anchor + line + newline + code + rest, encoding="utf-8")


@pytest.mark.parametrize("carried_out", [True, False])
def test_worked_example(tmp_path: Path, *, carried_out: bool) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "passes.pyi")
    shutil.copytree(ROOT / "bnfx", tmp_path / "bnfx", ignore=ignored)
    shutil.copytree(ROOT / "passes", tmp_path / "bnfx" / "passes", ignore=ignored)
    *edits, check = blocks()
    assert len(edits) > 1
    for block in edits if carried_out else ():
        edit(tmp_path, block)
    (tmp_path / "check.py").write_text(check, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) is carried_out, done.stderr
    if not carried_out:  # without the rows the BatchNorm stays
        assert "AssertionError" in done.stderr
