"""What the site takes from elsewhere in the repository, and formulas as MathML.

Pages that are kept elsewhere are taken as they are; on them, links to files that the site has not
are plain text. `{{ csv FILE: A | B }}` is a table of those columns, `{{ versions }}` what
`make test-versions` has seen.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: Pages of the site that are kept elsewhere.
TAKEN = {
    "project/contributing.md": "CONTRIBUTING.md",
    "project/security.md": "SECURITY.md",
    "project/changelog.md": "CHANGELOG.md",
    "results/paper.md": "examples/README.md",
    "results/folding.md": "examples/benchmarks/results/README.md",
}
#: Folders whose pictures go beside a page.
PICTURES = {
    "results/paper": "examples/paper",
    "results/results": "examples/results",
    "results": "examples/benchmarks/results",
    "results/conformance": "examples/conformance/results",
}

#: Pictures that stand at the end of a page.
SHOWN = {"results/folding.md": ("fold_zoo", "fold_latency", "fold_cost")}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the pictures that are kept elsewhere."""
    for page, source in TAKEN.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for folder, source in PICTURES.items():
        for path in sorted((ROOT / source).rglob("*.png")):
            name = f"{folder}/{path.relative_to(ROOT / source)}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, *, page: Any, files: Files, **_: Any) -> str:
    """Links, tables and formulas of a page."""
    source = page.file.src_uri
    if source in TAKEN:
        text += "".join(f"\n![{name}]({name}.png)\n" for name in SHOWN.get(source, ()))
        text = _without_links(text, Path(source).parent, files)
    text = re.sub(r"\{\{ csv ([^:]+): ([^}]+) \}\}", _table, text)
    text = text.replace("{{ versions }}", _versions())
    parts = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else _formulas(part) for part in parts)


def _without_links(text: str, folder: Path, files: Files) -> str:
    """Links to files that the site has not become their words."""

    def plain(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        there = target.startswith(("http", "#")) or files.get_file_from_path(str(folder / target))
        return match[0] if mark or there else words

    return re.sub(r"(!?)\[((?:`[^`\n]*`|[^\]`])*)\]\(([^)\s]*)\)", plain, text)


def _formulas(text: str) -> str:
    shown = re.sub(
        r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), text, flags=re.DOTALL
    )
    # A line that began with <math> would be a paragraph of its own.
    return re.sub(r"(?<![\\$])\$([^$\n]+?)\$", lambda m: f"<span>{convert(m[1])}</span>", shown)


def _table(match: re.Match[str]) -> str:
    wanted = [name.strip() for name in match[2].split("|")]
    with (ROOT / match[1].strip()).open(encoding="utf-8", newline="") as file:
        rows = [[row[name] or "-" for name in wanted] for row in csv.DictReader(file)]
    return _markdown(wanted, rows)


def _versions() -> str:
    seen = json.loads((HERE / "versions.json").read_text("utf-8"))
    columns = ["python", "torch", "onnx", "onnxscript", "onnxruntime", "numpy", "passed", "failed"]
    columns += ["skipped", "platform", "day"]
    rows = [[name, *(str(one.get(key, 0)) for key in columns)] for name, one in seen.items()]
    return _markdown(["set", *columns], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
