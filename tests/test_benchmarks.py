"""The benchmarks of folding and verifying run, each in seconds, and leave what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import zoo
from tests.test_examples import ROOT, run_script

BENCHMARKS = (
    "random_graphs",
    "fold_zoo",
    "file_zoo",
    "fold_latency",
    "linear_latency",
    "dead_latency",
    "fold_cost",
    "insert_cost",
    "verify_cost",
    "gpu",
)


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark(name: str, tmp_path: Path) -> None:
    zoo.timm()  # skipped where the networks are not installed
    script = ROOT / "examples" / "benchmarks" / f"{name}.py"
    text = run_script(script, "--quick", "--out", tmp_path, cwd=tmp_path)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["environment"]["torch"] in text
    assert found["rows"]
    assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == len(found["rows"]) + 1
    if name not in (
        "random_graphs",
        "dead_latency",
        "file_zoo",
        "verify_cost",
        "insert_cost",
        "gpu",
        "linear_latency",
    ):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
