"""The house: rooms stand on floors, imports run down only, nothing goes round in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: From the ground up. A room imports rooms of lower floors and of its own.
FLOORS = (
    "numbers text version workspace",
    "errors",
    "operators reports",
    "graphs optimizers",
    "onnx_files",
    "gauges editing statistics runtime export inspection",
    "channels",
    "passes",
    "module_folding",
    "insertion folding environment",
    "recipes",
    "verification",
    "removal verify benchmark bundle",
    "file_folding prove tuning",
    "deployment",
    "__init__",
    "cli",
    "__main__",
)
_FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def test_imports_run_down() -> None:
    up = []
    for name, target in _arrows():
        room, other = _room(name), _room(target)
        if room != other and room != "__init__" and _FLOOR[other] >= _FLOOR[room]:
            up.append(f"{name} -> {target}")
    assert not up, "\n".join(sorted(up))


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for name, target in _arrows():
        if name != "__init__":
            graph.setdefault(name, set()).add(target)
    while free := [n for n in graph if not any(t in graph for t in graph[n])]:
        for name in free:
            del graph[name]
    assert not graph, {n: sorted(t for t in graph[n] if t in graph) for n in graph}


def test_the_map_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "bnfx").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \| \S", text, re.M)) == rooms
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").is_file()}
    assert folders == rooms | {"passes", "support"}


def _room(name: str) -> str:
    return name.split(".")[0]


def _files() -> dict[str, Path]:
    """Files by module name without `bnfx.`; `__init__` is bnfx itself."""
    files = {}
    for top, prefix in ((ROOT / "bnfx", ()), (ROOT / "passes", ("passes",))):
        for path in top.rglob("*.py"):
            parts = (*prefix, *path.relative_to(top).with_suffix("").parts)
            files[".".join(p for p in parts if p != "__init__") or "__init__"] = path
    return files


def _arrows() -> Iterator[tuple[str, str]]:
    """Every import of one file of bnfx by another, those inside functions included."""
    files = _files()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = f"bnfx.passes.{node.module}" if node.level else node.module or ""
            if module.partition(".")[0] != "bnfx":
                continue
            base = module.removeprefix("bnfx").strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                target = inner if inner in files else base or "__init__"
                if target != name:
                    yield name, target
