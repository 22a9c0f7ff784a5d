"""The README's example and the scripts in examples/ run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("examples")


def run_script(*arguments: str | Path, cwd: Path) -> str:
    """Standard output of a Python script that must succeed, in `cwd`."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def operators(f: Path) -> set[str]:
    """Operator types in the graph of an ONNX file."""
    return {node.op_type for node in onnx.load(f).graph.node}


def readme_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_example_runs(tmp_path: Path) -> None:
    assert "passed" in run_script("-c", readme_examples()[0], cwd=tmp_path)
    assert (tmp_path / "net.onnx").exists()


def test_readme_example_of_a_trained_network_runs(tmp_path: Path) -> None:
    before = """
import torch, bnfx
from torch import nn
trained = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
loader = [(torch.randn(8, 3), torch.zeros(8)) for _ in range(3)]
"""
    after = "print(len(optimizer.param_groups), net.get_submodule('0.bn'))"
    text = run_script("-c", before + readme_examples()[1] + after, cwd=tmp_path)
    assert text.startswith("2 BatchNorm1d(4")


def test_readme_example_is_short() -> None:
    lines = readme_examples()[0].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    out = tmp_path / "results of the demo"
    text = run_script(ROOT / "examples" / "digits.py", "--quick", "--out", out, cwd=tmp_path)
    report = json.loads((out / "report.json").read_text())
    for name, network in report["networks"].items():
        assert network["verify"]["status"] == "passed"
        assert network["test_images_that_torch_and_onnxruntime_read_differently"] == 0
        assert all(bn["verdict"] == "folded" for bn in network["fold"]["batch_norms"])
        assert all(bn["path"] in text for bn in network["fold"]["batch_norms"])
        assert "BatchNormalization" not in operators(out / f"{name}.onnx")
        assert "BatchNormalization" in operators(out / f"{name}-unfolded.onnx")
    accuracy = report["networks"]["mlp"]["test_accuracy"]
    assert accuracy["torch, without BatchNorm"] < 0.2 < 0.7 < accuracy["onnxruntime, folded"]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_slim(tmp_path: Path) -> None:
    run_script(ROOT / "examples" / "slim.py", "--quick", "--out", tmp_path, cwd=tmp_path)
    found = json.loads((tmp_path / "slim.json").read_text())
    assert found["verify"] == "passed"
    assert found["test_images_read_differently"] == 0
    assert found["slim"]["weights"] < found["folded"]["weights"]
    assert len(set(found["test_accuracy"])) == 1
    assert found["test_accuracy"][0] > 0.8


@pytest.mark.slow
def test_retrofit(tmp_path: Path) -> None:
    text = run_script(ROOT / "examples" / "retrofit.py", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert "calibrated" in text
    outcomes = json.loads((tmp_path / "retrofit.json").read_text())["outcomes"]
    first = {outcome["test_accuracy"][0] for outcome in outcomes}
    assert len(first) == 1  # no form changes what the network computes at once
    assert (tmp_path / "retrofit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.zoo
def test_zoo_of_insertion(tmp_path: Path) -> None:
    script = ROOT / "examples" / "benchmarks" / "insert_zoo.py"
    text = run_script(script, "--quick", "--out", tmp_path, cwd=tmp_path)
    assert "networks, in" in text
    rows = json.loads((tmp_path / "insert_zoo.json").read_text())["rows"]
    assert len(rows) >= 4
    assert all(row["status"] == "ok" for row in rows)
