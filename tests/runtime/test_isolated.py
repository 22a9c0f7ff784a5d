"""onnxruntime in a process of its own: whatever ends its caller ends it, and limits are limits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bnfx.errors import ProviderError
from bnfx.runtime import isolated
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.runner import Request

value = helper.make_tensor_value_info
posix = pytest.mark.skipif(os.name != "posix", reason="processes and limits as POSIX has them")


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A file whose loop takes longer than anybody waits."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Sin", ["a"], ["b"]),
        ],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("a", TensorProto.FLOAT, [1]),
        ],
        [value("on", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, [1])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "go", "x"], ["y"], body=body)],
        "g",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [
            helper.make_tensor("n", TensorProto.INT64, [], [2**40]),
            helper.make_tensor("go", TensorProto.BOOL, [], [1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "endless.onnx")
    return tmp_path / "endless.onnx"


ASK = """
import sys
from pathlib import Path
import numpy as np
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.runner import Request
from bnfx.workspace import workspace
with workspace(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    request = Request(sys.argv[1], "cpu", str(folder), ("x",), 1)
    execute_apart(request, [[np.ones(1, np.float32)]], timeout=600)
"""


def runs(folder: Path) -> bool:
    """Whether a process that works in `folder` is there."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"bnfx.runtime.runner" in words and os.fsencode(folder) in words:
            return True
    return False


@posix
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_it_ends_with_its_caller_even_where_that_is_killed(endless: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ASK, str(endless)], stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        folder = Path(caller.stdout.readline().strip())
        until = time.monotonic() + 60
        while not (runs(folder) and list(folder.glob("profile*"))):  # it has a session
            assert time.monotonic() < until
            time.sleep(0.1)
        caller.kill()
    until = time.monotonic() + 10
    while runs(folder):
        assert time.monotonic() < until, "it goes on for nobody"
        time.sleep(0.1)
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="files as they lie on Linux")
@pytest.mark.parametrize("own", ["", "0"])
@pytest.mark.parametrize("what", ["runtime.sessions", "environment.probe"])
def test_onnxruntime_writes_nothing_about_its_use(tmp_path: Path, what: str, own: str) -> None:
    code = "from bnfx.runtime.sessions import load_onnxruntime; load_onnxruntime()"
    if what == "environment.probe":
        code = "from bnfx.environment import probe; probe.main()"
    # A bare environment: onnxruntime keeps quiet by itself where a variable tells of CI.
    environment = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment |= {"ORT_DISABLE_TELEMETRY": own} if own else {}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert bool(written) == bool(own), "the user's own word counts"


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from bnfx.errors import BnfxError
from bnfx.runtime.isolated import execute_apart, load_apart
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load_apart(Path(sys.argv[1]))
    print("loaded")
except BnfxError as error:
    print(type(error).__name__, error)
"""


@posix
@pytest.mark.parametrize("gigabytes", [64, 16, 2])
def test_a_hard_limit_of_memory_is_kept(endless: Path, gigabytes: int) -> None:
    command = [sys.executable, "-c", LIMITED, str(endless), str(gigabytes * 2**30)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("loaded"), done.stdout + done.stderr


def test_short_of_memory_is_no_failure_of_the_file(
    tmp_path: Path, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e12 numbers fit nowhere: where 'ulimit -v' is why, that is said."""
    monkeypatch.setattr(isolated, "_allowed_memory", lambda: 2**30)
    proto = onnx.load(endless)
    proto.graph.initializer[0].int64_data[:] = [1]
    del proto.graph.node[:]
    proto.graph.node.extend(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Mul", ["s", "many"], ["big"]),
            helper.make_node("ConstantOfShape", ["big"], ["z"]),
            helper.make_node("ReduceSum", ["z"], ["y"], keepdims=1),
        ]
    )
    proto.graph.initializer.append(helper.make_tensor("many", TensorProto.INT64, [1], [10**12]))
    onnx.save(proto, tmp_path / "large.onnx")
    request = Request(str(tmp_path / "large.onnx"), "cpu", str(tmp_path), ("x",), 1)
    with pytest.raises(ProviderError, match="ulimit -v"):
        execute_apart(request, [[np.ones(1, np.float32)]], timeout=60)
