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


def test_readme_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "passed" in run_script("-c", example, cwd=tmp_path)
    assert (tmp_path / "net.onnx").exists()


def test_readme_example_is_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


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
