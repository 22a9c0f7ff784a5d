"""What the benchmarks of folding share: where they ran, progress, tables, files."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bnfx.runtime.devices import driver

#: The checkout; its tests hold the random networks and the laws.
ROOT = Path(__file__).resolve().parents[2]

#: Optional packages that the zoo compares with.
PEERS = ("onnxsim", "onnxslim", "onnxoptimizer", "onnxruntime")

_PACKAGES = ("bnfx", "torch", "torchvision", "timm", "onnx", "onnxscript", *PEERS)


def version_of(package: str) -> str | None:
    """Installed version; onnxruntime's wheels are two, of which either will do."""
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def revision() -> str:
    """Commit of the checkout; "unknown" outside of one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, Any]:
    """Hardware and versions, to go with every result."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    gpus = driver()
    return {
        "cpu": cpu,
        **({"gpus": ", ".join(gpus["devices"]), "driver": gpus["driver"]} if gpus else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "revision": revision(),
        **{package: version_of(package) or "missing" for package in _PACKAGES},
    }


def start(console: Console) -> None:
    """One thread, and a line that says where this runs and which peers are missing."""
    torch.set_num_threads(1)
    about = environment()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    missing = [package for package in PEERS if about[package] == "missing"]
    if missing:
        console.print(f"not installed, not compared: {', '.join(missing)}; pip install bnfx[bench]")


def progress_bar(console: Console) -> Progress:
    """A bar with a count and the time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def show(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` as a table, one column for each key of the first."""
    if len(rows) == 1:
        rows = [{"": key, "value": value} for key, value in rows[0].items()]
    table = Table(title=title, title_justify="left")
    for i, key in enumerate(rows[0] if rows else ()):
        table.add_column(key, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(out: Path, name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """`<name>.csv` and `<name>.json` in `out`; the latter with hardware, versions and `more`."""
    out.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    found = {"environment": environment(), **more, "rows": list(rows)}
    (out / f"{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


def reset_peak() -> None:
    """From now on `peak_bytes` counts anew; only Linux can do that."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Resident size of this process."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Largest resident size since `reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(key))
    return 1024 * int(line.split()[1])


def median(values: Iterable[float | None]) -> float | None:
    """The middle one of those that are numbers."""
    known = sorted(v for v in values if v is not None and v == v)
    if not known:
        return None
    middle = len(known) // 2
    return known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2


def in_child(arguments: Sequence[str], timeout: float) -> dict[str, Any]:
    """The row that the running script prints last, in a process of its own with these arguments.

    A network that crashes or hangs there is a row too: {"failed": why}.
    """
    command = [sys.executable, sys.argv[0], "--child", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:g} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not last.startswith("{"):
        return {"failed": f"exit code {done.returncode}: {done.stderr[-200:]}"}
    row = json.loads(last)
    assert isinstance(row, dict)
    return row
