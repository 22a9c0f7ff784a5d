"""The worked examples of CONTRIBUTING.md, carried out on a copy of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
_PLACE = re.compile(r"# (\S+\.py), (?:behind: (.*)|at the end)\n")


def run_example(
    section: str, folder: Path, *, carried_out: bool
) -> subprocess.CompletedProcess[str]:
    """The check of a section, after its edits, or without them.

    Args:
        section: Its heading, such as "How to add an operator".
        folder: An empty folder for the copy.
        carried_out: Whether the edits are made.
    """
    ignored = shutil.ignore_patterns("__pycache__", "passes.pyi")
    shutil.copytree(ROOT / "bnfx", folder / "bnfx", ignore=ignored)
    shutil.copytree(ROOT / "passes", folder / "bnfx" / "passes", ignore=ignored)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    *edits, check = _BLOCK.findall(text.partition(f"## {section}\n")[2].partition("\n## ")[0])
    assert len(edits) > 1
    for block in edits if carried_out else ():
        _edit(folder, block)
    (folder / "check.py").write_text(check, encoding="utf-8")
    command = [sys.executable, "check.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _edit(root: Path, block: str) -> None:
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
