"""Which options of folding make the fastest file: measured on the provider, not guessed.

What a bound per channel, a constant map or a merged branch costs depends on the runtime, its
version and the sizes. So each option that is left open is turned alone, and those that gained,
together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx

from bnfx.benchmark import BenchReport, Latency
from bnfx.errors import BnfxError
from bnfx.gauges.walk import FoldOptions

Options = Mapping[str, Any]

#: The arm of the options as they were given.
AS_ASKED = "as asked"
#: As few as `benchmark_onnx` allows: there may be six arms.
_RUNS = 50


def race(
    write: Callable[[Options, Path], None],
    given: Options,
    folder: Path,
    measure: Callable[[Mapping[str, Path]], BenchReport],
) -> tuple[tuple[Options, ...], BenchReport | None]:
    """Write a file for each way of folding and measure them all; what cannot be written is out.

    A way counts as faster than the options as given where the middle halves of their runs lie
    apart: among equals, what was asked for stays.

    Args:
        write: Folds with the options, exports to the path, and raises where that is no file to use.
        given: Options of `fold_bn` that the caller has settled.
        folder: Where the files go.
        measure: Name of an arm -> file, to the latencies in this order.

    Returns:
        The ways, fastest first, and how long each takes; None for that where nothing is left to
        choose.

    Raises:
        BnfxError: No way gives a file; the error is that of the options as given.
    """
    entries = _Entries(write, folder)
    for name, options in {AS_ASKED: given, **turned(given)}.items():
        entries.add(name, options)
    if not entries.files:
        raise entries.refused[AS_ASKED]
    report = entries.measured(measure)
    faster = [arm.arm for arm in _faster(report)]
    if len(faster) > 1:
        together = {key: value for name in faster for key, value in entries.ways[name].items()}
        entries.keep({AS_ASKED, *faster})
        entries.add(", ".join(faster), together)
        report = entries.measured(measure)
    ahead = [arm.arm for arm in _faster(report)]
    ranking = [*ahead, *(arm.arm for arm in report.arms if arm.arm not in ahead)]
    notes = (*report.notes, *(f"{name}: {error}" for name, error in entries.refused.items()))
    report = dataclasses.replace(report, notes=notes)
    return tuple(entries.ways[name] for name in ranking), report


def turned(given: Options) -> dict[str, Options]:
    """Each option that is not given, alone and the other way round than by default."""
    ways: dict[str, Options] = {}
    for field in dataclasses.fields(FoldOptions):
        if field.name not in given and isinstance(field.default, bool):
            name = f"{field.name} off" if field.default else field.name
            ways[name] = {**given, field.name: not field.default}
    return ways


def _faster(report: BenchReport) -> list[Latency]:
    """What is clearly faster than the first arm, fastest first."""
    first, *others = report.arms
    clearly = [arm for arm in others if arm.upper_quartile < first.lower_quartile]
    return sorted(clearly, key=lambda arm: arm.median)


class _Entries:
    """The ways that have a file of their own."""

    def __init__(self, write: Callable[[Options, Path], None], folder: Path) -> None:
        self.write, self.folder = write, folder
        self.ways: dict[str, Options] = {}
        self.files: dict[str, Path] = {}
        self.refused: dict[str, BnfxError] = {}
        self._seen: set[bytes] = set()

    def add(self, name: str, options: Options) -> None:
        """Write the file of a way, unless another gave the same one or this gives none."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            self.write(options, place / "net.onnx")
        except BnfxError as error:
            self.refused[name] = error
            return
        found = _digest(place)
        if found not in self._seen:
            self._seen.add(found)
            self.ways[name], self.files[name] = options, place / "net.onnx"

    def keep(self, names: set[str]) -> None:
        """Drop all other ways."""
        self.files = {name: path for name, path in self.files.items() if name in names}

    def measured(self, measure: Callable[[Mapping[str, Path]], BenchReport]) -> BenchReport:
        """All files, in turns."""
        report = measure(self.files)
        named = zip(self.files, report.arms, strict=True)
        arms = (dataclasses.replace(arm, arm=name, path="-") for name, arm in named)
        return dataclasses.replace(report, arms=tuple(arms))


def _digest(folder: Path) -> bytes:
    """Of the file, but for what it says of itself, and of the weights that lie beside it."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".onnx":
            proto = onnx.load(str(path), load_external_data=False)
            del proto.metadata_props[:]
            digest.update(proto.SerializeToString(deterministic=True))
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()
