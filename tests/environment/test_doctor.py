"""doctor: this environment as it is, and judgements on environments that nobody wants to have."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bnfx
from bnfx.environment import facts
from bnfx.environment.doctor import EnvCheck, EnvReport, judge, numbers, package_of
from bnfx.environment.facts import Facts
from bnfx.runtime.availability import cuda_unavailable_reason

SOUND = Facts(
    bnfx="0.1.0",
    python=(3, 12, 4),
    versions={
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "onnx": "1.23.2",
        "onnxscript": "0.7.2",
        "matplotlib": None,
    },
    runtimes={"onnxruntime-gpu": "1.31.1"},
    least={"torch": "2.11", "onnxruntime": "1.23", "onnxruntime-gpu": "1.28"},
    import_errors={},
    torch_cuda="13.0",
    runtime_owner="onnxruntime-gpu",
    runtime_cuda="13.0",
    providers={"cpu": "", "cuda": ""},
    missing_libraries=(),
    driver="supports CUDA up to 13.1",
    devices=("NVIDIA L4",),
    cudnn="9.14.0",
)


def line(report: EnvReport, name: str) -> EnvCheck:
    (check,) = (check for check in report.checks if check.name == name)
    return check


def test_this_environment_is_usable() -> None:
    report = bnfx.doctor()
    assert report, str(report)
    assert report.why_not("cpu") == ""
    assert (report.why_not("cuda") == "") == (cuda_unavailable_reason() is None)
    assert all(check.remedy for check in report.checks if check.status != "ok")
    assert json.loads(json.dumps(report.to_dict()))["status"] == report.status
    assert "provider cpu" in str(report)


def test_a_sound_environment_needs_nothing() -> None:
    report = judge(SOUND)
    assert report.status == "ok"
    needed = {check.name for check in report.checks if check.remedy}
    assert needed <= {"matplotlib", "safetensors", "timm", "torchvision"}


def with_versions(**versions: str | None) -> Facts:
    return dataclasses.replace(SOUND, versions={**SOUND.versions, **versions})


def with_runtimes(**versions: str) -> Facts:
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    return dataclasses.replace(SOUND, runtimes=found)


@pytest.mark.parametrize(
    ("facts", "name", "status", "detail", "remedy"),
    [
        (
            dataclasses.replace(SOUND, python=(3, 10, 1)),
            *("Python", "error", "3.10.1", "3.11"),
        ),
        (with_versions(torch="2.10.1"), "torch", "error", "2.11 or later", "torch>=2.11"),
        (with_versions(onnx=None), "onnx", "error", "not installed", "pip install onnx"),
        (
            dataclasses.replace(SOUND, import_errors={"onnxscript": "no module x"}),
            *("onnxscript", "error", "no module x", "pip install"),
        ),
        (
            with_runtimes(),
            *("onnxruntime", "error", "not installed", "never both"),
        ),
        (
            with_runtimes(onnxruntime="1.32.0", onnxruntime_gpu="1.31.1"),
            *("onnxruntime", "error", "own the same files", "pip uninstall"),
        ),
        (
            dataclasses.replace(SOUND, import_errors={"onnxruntime": "no InferenceSession"}),
            *("onnxruntime", "error", "no InferenceSession", "pip uninstall"),
        ),
        (
            dataclasses.replace(SOUND, runtime_owner="onnxruntime"),
            *("onnxruntime", "error", "the files there are of onnxruntime", "pip uninstall"),
        ),
        (
            with_runtimes(onnxruntime_gpu="1.26.0"),
            *("onnxruntime", "error", "1.26.0", "onnxruntime-gpu>=1.28"),
        ),
        (
            dataclasses.replace(SOUND, providers={"cpu": "it crashed", "cuda": ""}),
            *("provider cpu", "error", "it crashed", "onnxruntime"),
        ),
        (
            dataclasses.replace(SOUND, torch_cuda="12.8"),
            *("CUDA versions", "warning", "majors differ", "torch built for CUDA 13"),
        ),
    ],
)
def test_judgements(facts: Facts, name: str, status: str, detail: str, remedy: str) -> None:
    report = judge(facts)
    found = line(report, name)
    assert (found.status, detail in found.detail, remedy in found.remedy) == (status, True, True)
    assert report.status == status
    assert bool(report) == (status != "error")


def test_missing_cuda_tells_libraries_driver_and_cudnn() -> None:
    facts = dataclasses.replace(
        SOUND,
        providers={"cpu": "", "cuda": "libcublasLt.so.13 does not load"},
        missing_libraries=(
            "libcublasLt.so.13",
            "libcublas.so.13",
            "libcurand.so.10",
            "libcuda.so.1",
        ),
        driver=None,
        devices=(),
        cudnn=None,
    )
    report = judge(facts)
    assert report.status == "warning"
    assert report, "the CPU serves"
    assert line(report, "CUDA libraries").remedy == "pip install nvidia-cublas nvidia-curand"
    assert "libcuda.so.1" in line(report, "driver").detail
    assert line(report, "cuDNN").remedy == "pip install nvidia-cudnn-cu13"


def test_a_runtime_for_the_cpu_has_no_lines_on_cuda() -> None:
    facts = dataclasses.replace(
        with_runtimes(onnxruntime="1.32.0"),
        runtime_owner="onnxruntime",
        runtime_cuda=None,
        providers={"cpu": "", "cuda": "this onnxruntime was built without CUDA"},
    )
    report = judge(facts)
    assert report.status == "ok"
    assert "pip install onnxruntime-gpu" in line(report, "provider cuda").remedy
    assert not [check for check in report.checks if check.name == "driver"]


@pytest.mark.parametrize("broken", ["torch", "torchvision", "timm"])
def test_no_remedy_takes_a_torch_for_the_cpu_away(broken: str) -> None:
    """From PyPI, a torch is one for CUDA, and what depends on torch brings it along."""
    gone = None if broken != "torch" else "2.1.0+cpu"
    facts = dataclasses.replace(
        with_versions(torch="2.13.0+cpu") if gone is None else SOUND, torch_cuda=None
    )
    facts = dataclasses.replace(facts, versions={**facts.versions, broken: gone})
    assert "https://download.pytorch.org/whl/cpu" in line(judge(facts), broken).remedy
    for check in judge(facts).checks:
        assert "bnfx[" not in check.remedy, "bnfx is on no package index"


def test_packages_of_libraries() -> None:
    assert package_of("libcudart.so.12", "12.8") == "nvidia-cuda-runtime-cu12"
    assert package_of("libcufft.so.12", "13.0") == "nvidia-cufft"
    assert package_of("libcudnn.so.9", "12.8") == "nvidia-cudnn-cu12"
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("2.9") < numbers("2.13.0")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("raise ImportError('broken on purpose')", "broken on purpose"),
        ("", "no InferenceSession"),
        ("import os\nos._exit(9)", "code 9"),
    ],
)
def test_a_broken_onnxruntime_is_told(tmp_path: Path, content: str, found: str) -> None:
    """The probe runs in its own process, where this onnxruntime comes first."""
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text(content)
    code = "import bnfx; r = bnfx.doctor(); print(r.status); print(r.to_dict())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    status, rest = done.stdout.split("\n", 1)
    assert status == "error"
    assert found in rest


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_PATIENCE", 0.2)
    assert "did not start within" in bnfx.doctor().why_not("cpu")
