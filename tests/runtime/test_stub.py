"""onnxruntime's real CUDA provider over a stub of CUDA: its options, its assignment, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.cuda_stub import stub_environment

pytestmark = [pytest.mark.providers, pytest.mark.xdist_group("stub")]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds one device."""
    return stub_environment(tmp_path_factory.mktemp("cuda"))


def run(code: str, environment: dict[str, str], *argv: str, **more: str) -> dict[str, Any]:
    """What a script put into `told`; it imports torch, onnx and bnfx, and has `graph`."""
    script = f"{_HEAD}\n{code}\nprint('told', json.dumps(told))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *argv],
        env={**environment, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    assert not before, "onnxruntime wrote to standard output"
    found: dict[str, Any] = json.loads(last.partition(" ")[2])
    return found


_HEAD = """
import json, sys, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own parts
    import torch, onnx, numpy as np
from pathlib import Path
import bnfx
from bnfx.errors import BnfxError
from bnfx.runtime.assignment import open_placed
from bnfx.runtime.availability import unavailable_reason
from bnfx.runtime.providers import Where
from bnfx.runtime.runner import Request, execute
from bnfx.runtime.sessions import SessionSettings, open_session
told = {}

def graph(f, text, opset=18):
    head = f'<ir_version: 9, opset_import: ["": {opset}]>'
    onnx.save(onnx.parser.parse_model(f"{head} g {text}"), f)
    return f

def error(call):
    try:
        call()
    except BnfxError as error:
        return f"{type(error).__name__}: {error}"
    return ""
"""


def test_without_a_device_the_cause_is_told(cuda: dict[str, str]) -> None:
    told = run("told['why'] = unavailable_reason('cuda')", cuda, STUB_DEVICES="0")
    assert "no CUDA-capable device is detected" in told["why"]
    assert "Conflicting session configuration" not in told["why"]


def test_a_device_that_is_not_there_is_told(cuda: dict[str, str]) -> None:
    told = run("told['why'] = unavailable_reason('cuda:9')", cuda)
    assert "Invalid device ID: 9" in told["why"]


def test_without_cudnn_cuda_does_not_work(cuda: dict[str, str]) -> None:
    told = run("told['why'] = unavailable_reason('cuda')", cuda)
    assert "cuDNN is unavailable" in told["why"]


def test_the_options_are_heard(cuda: dict[str, str]) -> None:
    code = """
f = graph(sys.argv[1], "(float[2] x) => (float[2] y) { y = Relu(x) }")
for name, where, tf32 in [
    ("strict", Where("cuda"), False),
    ("full name", Where("CUDAExecutionProvider"), False),
    ("tf32", Where("cuda"), True),
    ("own", Where("cuda:0", {"gpu_mem_limit": "1000000000"}), False),
]:
    session = open_session(f, where, SessionSettings(tf32=tf32))
    options = session.get_provider_options()["CUDAExecutionProvider"]
    told[name] = [options["use_tf32"], options["device_id"], options["gpu_mem_limit"]]
told["unknown"] = error(lambda: open_session(f, Where("cuda", {"no_such_option": "1"})))
"""
    told = run(code, cuda, "/tmp/unused.onnx")
    assert [told[name][0] for name in ("strict", "full name", "tf32")] == ["0", "0", "1"]
    assert told["own"][1:] == ["0", "1000000000"]
    assert "no_such_option" in told["unknown"]


def test_a_canary_that_comes_back_as_zero_is_no_tf32(cuda: dict[str, str]) -> None:
    code = """
from bnfx.runtime.canary import require_arithmetic
for precision in ("fp32", "tf32"):
    told[precision] = error(lambda: require_arithmetic(Where("cuda"), precision))
"""
    told = run(code, cuda)
    assert all("computes wrong" in told[precision] for precision in ("fp32", "tf32"))
