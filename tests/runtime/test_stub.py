"""onnxruntime's real CUDA provider over a stub of CUDA: its options, its assignment, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bnfx.runtime.providers import CPU
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
from bnfx.onnx_files.reading import all_nodes
from bnfx.runtime.assignment import open_placed
from bnfx.runtime.availability import unavailable_reason
from bnfx.runtime.providers import Where
from bnfx.runtime.canary import require_arithmetic
from bnfx.runtime.runner import Request, execute
from bnfx.runtime.sessions import SessionSettings, open_session
told, here = {}, sys.argv[-1]

def graph(f, text, opset=18):
    head = f'<ir_version: 9, opset_import: ["": {opset}]>'
    model = onnx.parser.parse_model(f"{head} g {text}")
    for i, node in enumerate(all_nodes(model)):
        node.name = f"{node.op_type.lower()}{i}"
    onnx.save(model, f)
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
    assert "info.cc:" not in told["why"]


def test_what_the_provider_is_given_and_says(cuda: dict[str, str], tmp_path: Path) -> None:
    code = """
told["index"] = unavailable_reason("cuda:9")
told["cudnn"] = unavailable_reason("cuda")
f = graph(f"{here}/relu.onnx", "(float[2] x) => (float[2] y) { y = Relu(x) }")
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
for precision in ("fp32", "tf32"):
    told["canary " + precision] = error(lambda: require_arithmetic(Where("cuda"), precision))
f = graph(f"{here}/conv.onnx", "(float[1,4,8,8] x, float[4,4,1,1] w) => (float[n,4,8,8] y) "
          "{ r = Relu(x) y = Conv(r, w) }")
x, w = np.ones((1, 4, 8, 8), np.float32), np.ones((4, 4, 1, 1), np.float32)
told["run"] = error(lambda: execute(Request(f, "cuda", here, ("x", "w"), 1), [[x, w]]))
"""
    told = run(code, cuda, str(tmp_path))
    assert "Invalid device ID: 9" in told["index"]
    # It is loaded at the first convolution.
    assert "cuDNN is unavailable" in told["cudnn"]
    assert [told[name][0] for name in ("strict", "full name", "tf32")] == ["0", "0", "1"]
    assert told["own"][1:] == ["0", "1000000000"]
    assert "no_such_option" in told["unknown"]
    # A canary that comes back as zero is not one in TF32.
    assert all("computes wrong" in told[f"canary {name}"] for name in ("fp32", "tf32"))
    assert "that the CPU runs" in told["run"] or "computes wrong" in told["run"]


def test_where_nodes_lie(cuda: dict[str, str], tmp_path: Path) -> None:
    """Shape arithmetic on the CPU, in branches too; anything else is named with its remedy."""
    code = """
def placed(text, opset=18, allow=None):
    f = graph(f"{here}/f.onnx", text, opset)
    def open_it():
        found = open_placed(f, Where.of("cuda", allow_on_cpu=allow), SessionSettings())
        told["strays"] = [str(node) for node in found.strays]
    told["strays"] = []
    return error(open_it) or told["strays"]

sizes = ("(float[n,4] x) => (float[m] y) "
         "{ s = Shape(x) k = ReduceProd<keepdims=1>(s) r = Relu(x) y = Reshape(r, k) }")
told["sizes"] = placed(sizes)
told["none"] = placed(sizes, allow=())
told["other"] = placed(sizes, allow=("Relu",))
told["named"] = placed(sizes, allow=("ReduceProd",))
told["branch"] = placed('''(float[n,4] x, bool c) => (float[n,4] y) { z = Relu(x) y = If(c) <
  then_branch = t () => (float[n,4] a) { s = Shape(z) o = Constant<value_ints=[1]>()
    d = Add(s, o) u = Sub(d, o) q = Reshape(z, u) a = Add(q, z) },
  else_branch = e () => (float[n,4] b) { b = Mul(z, z) }> }''')
told["loop"] = placed('''(float[n,4] x) => (int64[1] y, float[n,4] z) { z = Relu(x) s = Shape(z)
  k = ReduceProd<keepdims=1>(s) trips = Constant<value_int=3>() go = Constant<value=bool {1}>()
  y = Loop(trips, go, k) <body = b (int64 i, bool ci, int64[1] a) => (bool co, int64[1] ao)
    { co = Identity(ci) ao = Add(a, k) }> }''')
pool = ("([1,4,8,8] x) => ([1,4,4,4] y) "
        "{ r = Relu(x) y = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r) }")
told["old"] = placed(pool.replace("[1,4,", "float[1,4,"), 20)
told["new"] = placed(pool.replace("[1,4,", "float[1,4,"), 22)
told["bf16"] = placed(pool.replace("[1,4,", "bfloat16[1,4,"), 22)
"""
    told = run(code, cuda, str(tmp_path))
    assert told["sizes"] == told["named"] == ["ReduceProd 'reduceprod1'"]
    for name in ("none", "other"):
        assert "elsewhere: ReduceProd 'reduceprod1'; move" in told[name]
    assert sorted(told["branch"]) == ["Add 'add4'", "Sub 'sub5'"]
    assert sorted(told["loop"]) == ["Loop 'loop5'", "ReduceProd 'reduceprod2'"]
    assert told["old"] == []
    assert "elsewhere: MaxPool" in told["new"]
    assert "try opset_version=20" in told["new"]
    assert "The file is in bfloat16, for which it lacks kernels" in told["bf16"]


def test_a_session_stays_where_it_is(cuda: dict[str, str], tmp_path: Path) -> None:
    """What shape arithmetic strays to is the same to a verification and to a benchmark."""
    code = """
text = ("(float[n,4] x) => (float[m] y) "
        "{ s = Shape(x) k = ReduceProd<keepdims=1>(s) r = Relu(x) y = Reshape(r, k) }")
f, x = graph(f"{here}/f.onnx", text), torch.ones(2, 4)
# The stub's kernels compute nothing, and so no canary comes back from it.
import bnfx.runtime.runner as runner, bnfx.benchmark as benchmark
from bnfx.runtime.canary import Arithmetic
seen = Arithmetic({}, {}, {}, {})
runner.require_arithmetic = benchmark.require_arithmetic = lambda *given: seen
benchmark._try_apart = lambda *given: None
answer = execute(Request(f, "cuda", here, ("x",), 2), [[x.numpy()], [x.numpy()]])
told["ran"] = dict(answer.ran)
told["assigned"] = answer.assigned
told["libraries"] = answer.proof["libraries"]
found = bnfx.benchmark_onnx(f, x, provider="cuda", num_runs=50, warmup=1)
told["device"] = found.device
told["notes"] = found.notes
fixed = graph(f"{here}/fixed.onnx", "(float[2,4] x) => (float[2,4] y) { y = Relu(x) }")
graphs = {"provider": "cuda", "provider_options": {"enable_cuda_graph": True}, "num_runs": 50}
told["graph"] = error(lambda: bnfx.benchmark_onnx(fixed, x, **graphs))
told["no graph"] = error(lambda: bnfx.benchmark_onnx(f, x, **graphs))
doctor = bnfx.doctor()
told["doctor"] = [doctor.why_not("cuda"), str(doctor)]
"""
    told = run(code, cuda, str(tmp_path))
    assert told["ran"] == told["assigned"] == {"CUDAExecutionProvider": 3, CPU: 1}
    assert told["libraries"] == {"cudnn": False, "cublas": True, "cudart": True}
    assert told["notes"] == []
    assert told["device"] == "stub 0"
    assert told["graph"] == ""
    assert "a captured graph needs outputs of fixed size" in told["no graph"]
    assert "cuDNN is unavailable" in told["doctor"][0]
    assert "stub 0" in told["doctor"][1]
