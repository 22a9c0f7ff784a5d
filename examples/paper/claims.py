"""What the scripts of this folder share: options, progress, results as JSON, the verdict.

A script measures (`measure`), draws (`draw`) and judges (`judge`); a `Study` names the three.
Results are plain dicts, so that `--redraw` draws and judges again what an earlier run measured.
Importing this file makes the common files of the examples, one folder up, importable too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn

import bnfx

sys.path.insert(0, str(Path(__file__).parents[1]))
from image_data import DataUnavailableError, load_images
from networks import sigmoid_mlp
from training import Images

HERE = Path(__file__).parent
DATA = ("digits", "mnist", "fashion", "cifar10")
TITLES = {"digits": "8x8 digits", "mnist": "MNIST", "fashion": "Fashion-MNIST"} | {
    "cifar10": "CIFAR-10"
}


@dataclass(frozen=True)
class Bench:
    """What `measure` works with.

    Attributes:
        data: The images.
        quick: Whether to finish within seconds.
        seeds: The seeds to run.
        device: Where to train.
        tick: To be called after each step of training.
        expect: To be called with the number of steps to come.
    """

    data: Images
    quick: bool
    seeds: tuple[int, ...]
    device: torch.device
    tick: Callable[[], None]
    expect: Callable[[int], None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.data.train_images.shape[1:]
        return channels, height, width

    @property
    def pixels(self) -> int:
        """Pixels of an image, over all channels."""
        return self.data.train_images[0].numel()


@dataclass(frozen=True)
class Row:
    """One line of the verdict: what the paper reports, what came out here, how they compare."""

    quantity: str
    paper: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class Study:
    """One claim of the paper, and the three functions that test it.

    Attributes:
        name: Of the JSON file and the picture.
        claim: What the paper says, with the place.
        measure: Bench -> results, JSON's own types only.
        draw: Draws results into a file.
        judge: Results -> rows of the verdict.
        data: The data set of the full form.
        seeds: Number of seeds of the full form.
    """

    name: str
    claim: str
    measure: Callable[[Bench], dict[str, Any]]
    draw: Callable[[dict[str, Any], Path], None]
    judge: Callable[[dict[str, Any]], list[Row]]
    data: str = "mnist"
    seeds: int = 3


def main(study: Study, argv: list[str]) -> int:
    """Run one study from the command line; 0 when it ran, 3 when its images cannot be had."""
    chosen = options(study.claim, study.data, study.seeds, argv)
    data = chosen.data or ("digits" if chosen.quick else study.data)
    torch.set_num_threads(1)  # these networks are small: more threads would be slower
    console = Console(highlight=False)
    name = study.name if data == study.data or chosen.quick else f"{study.name}_{data}"
    f = chosen.out / f"{name}.json"
    console.rule(study.name)
    console.print(study.claim, markup=False, style="italic")
    if not chosen.redraw:
        try:
            images = load_images(data, chosen.cache)
            seeds = tuple(range(1 if chosen.quick else chosen.seeds))
            results = run(study, data, images, seeds, console, quick=chosen.quick)
        except DataUnavailableError as error:
            console.print(str(error), markup=False, style="red")
            return 3
        chosen.out.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(f.read_text())
    study.draw(results, f.with_suffix(".png"))
    rows = study.judge(results)
    f.write_text(json.dumps(results | {"verdict": [asdict(row) for row in rows]}, indent=1) + "\n")
    console.print(_table(rows, results))
    return 0


def run(
    study: Study,
    data: str,
    images: Images,
    seeds: tuple[int, ...],
    console: Console,
    *,
    quick: bool,
) -> dict[str, Any]:
    """Measure, with a progress bar; the results with the circumstances they came from."""
    columns = (TextColumn(study.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start, cpu = time.perf_counter(), time.process_time()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(study.name, total=None)
        steps = 0

        def expect(more: int) -> None:
            nonlocal steps
            steps += more
            progress.update(task, total=steps)

        bench = Bench(
            data=images.to(device),
            quick=quick,
            seeds=seeds,
            device=device,
            tick=lambda: progress.advance(task),
            expect=expect,
        )
        measured = study.measure(bench)
    return {
        "study": study.name,
        "claim": study.claim,
        "data": TITLES[data],
        "quick": quick,
        "seeds": list(bench.seeds),
        "run": {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "device": str(device),
            **circumstances(),
        },
        **measured,
    }


def circumstances() -> dict[str, Any]:
    """Hardware and versions."""
    packages = ("bnfx", "torch", "numpy")
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def _cpuinfo() -> list[str]:
    f = Path("/proc/cpuinfo")
    return f.read_text().splitlines() if f.exists() else []


def two_arms(
    bench: Bench, seed: int, *, width: int = 100, depth: int = 3, std: float | None = 0.1
) -> dict[str, nn.Module]:
    """The paper's perceptron of section 4.1, as it is and with BatchNorm inserted by bnfx."""
    torch.manual_seed(seed)
    plain = sigmoid_mlp(width, depth, inputs=bench.pixels, std=std)
    plain.to(bench.device)
    return {"without": plain, "with": bnfx.insert_bn(plain, form="graph")}


def first_step(steps: list[int], accuracy: list[float], target: float) -> int | None:
    """The first measured step at which `target` is reached."""
    return next((s for s, a in zip(steps, accuracy, strict=True) if a >= target), None)


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def percent(value: float, digits: int = 1) -> str:
    """0.9731 -> "97.3 %"."""
    return f"{100 * value:.{digits}f} %"


def within(difference: float) -> str:
    """1.3e-15 -> "within 1e-15"."""
    return f"within {difference:.0e}" if difference else "exactly"


def _table(rows: list[Row], results: dict[str, Any]) -> Table:
    where = f"{results['data']}, {len(results['seeds'])} seed(s), {results['run']['device']}"
    table = Table(title=f"{where}, {results['run']['seconds']:.0f} s", title_justify="left")
    for column in ("quantity", "paper", "here", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (row.quantity, row.paper, row.ours, row.verdict)
        table.add_row(*(Text(cell) for cell in cells))  # brackets are no markup
    return table


def options(claim: str, data: str, seeds: int, argv: list[str]) -> argparse.Namespace:
    """The options of a study; `data` and `seeds` are those of its full form."""
    parser = argparse.ArgumentParser(description=claim)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bnfx"
    parser.add_argument("--quick", action="store_true", help="seconds, on scikit-learn's digits")
    parser.add_argument("--data", choices=DATA, help=f"default {data}; digits with --quick")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds ({seeds})")
    parser.add_argument(
        "--out", type=Path, help="folder for results (results/, with --quick demo/)"
    )
    parser.add_argument("--cache", type=Path, default=cache, help="folder for downloaded images")
    parser.add_argument("--redraw", action="store_true", help="from the results that are there")
    chosen = parser.parse_args(argv)
    if chosen.out is None:
        chosen.out = Path("demo", "paper") if chosen.quick else HERE / "results"
    return chosen
