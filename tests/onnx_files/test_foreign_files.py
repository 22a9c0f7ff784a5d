"""Files that nobody should trust: each gives an error that says what is wrong, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bnfx
from bnfx.onnx_files.reading import read_onnx
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.runner import Request

FLOAT = TensorProto.FLOAT
Write = Callable[[Path], None]


def value(name: str, shape: list[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto],
    tensors: list[TensorProto] | None = None,
    *,
    opset: int = 18,
    shape: list[int | str] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [value("x", shape or [1, 4])], [value("y", None)], tensors or []
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("here", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, functions=functions or [])


def add_weight(tensor: TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", tensor.name], ["y"])], [tensor])


def claim(dims: list[int], held: bytes) -> TensorProto:
    return TensorProto(name="w", data_type=FLOAT, dims=dims, raw_data=held)


def external(location: str, length: int = 16, offset: int = 0) -> TensorProto:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    for key, entry in entries.items():
        tensor.external_data.add(key=key, value=entry)
    return tensor


def raw(content: bytes) -> Write:
    def write(f: Path) -> None:
        f.write_bytes(content)

    return write


def proto(made: onnx.ModelProto) -> Write:
    return raw(made.SerializeToString())


def outside(f: Path) -> None:
    (f.parent.parent / "secret.bin").write_bytes(bytes(16))
    f.write_bytes(add_weight(external("../secret.bin")).SerializeToString())


def link_outside(f: Path) -> None:
    (f.parent.parent / "secret.bin").write_bytes(bytes(16))
    (f.parent / "inside.bin").symlink_to(f.parent.parent / "secret.bin")
    f.write_bytes(add_weight(external("inside.bin")).SerializeToString())


def short_data(f: Path) -> None:
    (f.parent / "w.bin").write_bytes(bytes(8))
    f.write_bytes(add_weight(external("w.bin")).SerializeToString())


def in_two_places(f: Path) -> None:
    (f.parent / "w.bin").write_bytes(bytes(16))
    tensor = external("w.bin")
    tensor.external_data.add(key="location", value="other.bin")
    f.write_bytes(add_weight(tensor).SerializeToString())


def truncated(f: Path) -> None:
    weight = numpy_helper.from_array(np.zeros((1, 4), np.float32), "w")
    content = add_weight(weight).SerializeToString()
    f.write_bytes(content[: len(content) // 2])


RELU = helper.make_node("Relu", ["x"], ["y"])
CYCLE = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
TWICE = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]

#: Wrong in the file itself: whatever reads it says so.
UNREADABLE: dict[str, tuple[Write, str]] = {
    "empty": (raw(b""), "no ONNX graph"),
    "garbage": (raw(b"\x93NUMPY garbage"), "not a readable"),
    "truncated": (truncated, "not a readable"),
    "a length of 2 GiB": (raw(b"\x3a\xff\xff\xff\xff\x07" + bytes(64)), "not a readable"),
    "nested a thousand times": (raw(b"\x3a\x80\x08" * 1000), "not a readable"),
    "petabytes claimed": (proto(add_weight(claim([10**6, 10**9], bytes(16)))), "claims"),
    "overflowing dimensions": (proto(add_weight(claim([2**62, 2**62], bytes(16)))), "claims"),
    "negative dimension": (proto(add_weight(claim([-4], bytes(16)))), "negative"),
    "too few bytes": (proto(add_weight(claim([1, 4], bytes(12)))), "claims 16 bytes and holds 12"),
    "unknown type": (
        proto(add_weight(TensorProto(name="w", data_type=99, dims=[4], raw_data=bytes(16)))),
        "element type 99",
    ),
    "data in /etc": (proto(add_weight(external("/etc/passwd"))), "outside"),
    "data above": (proto(add_weight(external("../../../etc/passwd"))), "outside"),
    "data beside the folder": (outside, "outside"),
    "data through a link": (link_outside, "outside"),
    "data missing": (proto(add_weight(external("gone.bin"))), "missing"),
    "data too short": (short_data, "which has 8"),
    "data behind a null": (proto(add_weight(external("a\0b"))), "cannot be the name"),
    "data of a long name": (proto(add_weight(external("n" * 5000))), "cannot be the name"),
    "data in two places": (in_two_places, "says twice"),
    "data nowhere": (proto(add_weight(external(""))), "does not say where"),
    "a cycle": (proto(model([*CYCLE, RELU])), "cycle"),
    "read and never defined": (proto(model([helper.make_node("Relu", ["z"], ["y"])])), "'z'"),
    "output of no node": (proto(model([helper.make_node("Relu", ["x"], ["z"])])), "'y'"),
    "defined twice": (proto(model(TWICE)), "twice"),
}


def ticking(f: Path) -> None:
    """A loop of 2^62 steps."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["state", "state"], ["next"]),
        ],
        "body",
        [
            value("i", [], TensorProto.INT64),
            value("go", [], TensorProto.BOOL),
            value("state", [1, 4]),
        ],
        [value("on", [], TensorProto.BOOL), value("next", [1, 4])],
    )
    tensors = [
        numpy_helper.from_array(np.array(2**62), "count"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    loop = helper.make_node("Loop", ["count", "yes", "x"], ["y"], body=body)
    f.write_bytes(model([loop], tensors).SerializeToString())


def endless_function() -> onnx.FunctionProto:
    node = helper.make_node("f", ["a"], ["b"], domain="here")
    imports = [helper.make_opsetid("here", 1)]
    return helper.make_function("here", "f", ["a"], ["b"], [node], imports)


HUGE = [
    helper.make_node("ConstantOfShape", ["w"], ["big"]),
    helper.make_node("ReduceSum", ["big"], ["small"], keepdims=0),
    helper.make_node("Add", ["x", "small"], ["y"]),
]

#: Readable, and yet nothing that onnxruntime can or should run.
UNRUNNABLE: dict[str, Write] = {
    "unknown operator": proto(model([helper.make_node("Nonsense", ["x"], ["y"])])),
    "unknown domain": proto(model([helper.make_node("Relu", ["x"], ["y"], domain="not.here")])),
    "opset of the future": proto(model([RELU], opset=9999)),
    "missing operand": proto(model([helper.make_node("Conv", ["x"], ["y"])])),
    "petabytes computed": proto(
        model(HUGE, [numpy_helper.from_array(np.array([10**6, 10**9]), "w")])
    ),
    "another input": proto(model([RELU], shape=[10**12, 10**6])),
    "function that calls itself": proto(
        model([helper.make_node("f", ["x"], ["y"], domain="here")], functions=[endless_function()])
    ),
}


@pytest.fixture
def f(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / "model.onnx"


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(f: Path, name: str) -> None:
    write, message = UNREADABLE[name]
    write(f)
    x = torch.zeros(1, 4)
    for ask in (
        lambda: bnfx.inspect_onnx(f),
        lambda: bnfx.verify_onnx(nn.ReLU().eval(), f, x),
        lambda: bnfx.verify_onnx(f, f, x),
        lambda: bnfx.benchmark_onnx(f, x),
        lambda: bnfx.removal_ledger(None, f=f),
    ):
        with pytest.raises(bnfx.VerificationError, match=message):
            ask()


@pytest.mark.parametrize("name", UNRUNNABLE)
def test_unrunnable(f: Path, name: str) -> None:
    UNRUNNABLE[name](f)
    x = torch.zeros(1, 4)
    assert bnfx.inspect_onnx(f).path == str(f)
    with pytest.raises(bnfx.VerificationError):
        bnfx.verify_onnx(nn.ReLU().eval(), f, x).raise_for_failure()
    with pytest.raises(bnfx.BnfxError):
        bnfx.benchmark_onnx(f, x)


def test_what_does_not_end_is_stopped(f: Path) -> None:
    ticking(f)
    with pytest.raises(bnfx.VerificationError, match="after 3 s"):
        bnfx.verify_onnx(nn.ReLU().eval(), f, torch.zeros(1, 4), timeout=3)


def test_a_crash_is_an_error(f: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto(model([RELU]))(f)
    request = Request(str(f), "cpu", str(f.parent), ("x",), 1)
    site = f.parent / "sitecustomize.py"
    site.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(f.parent))
    with pytest.raises(bnfx.VerificationError, match="SIGSEGV"):
        execute_apart(request, [[np.zeros((1, 4), np.float32)]], timeout=60)


def test_a_right_file_reads(f: Path) -> None:
    (f.parent / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    f.write_bytes(add_weight(external("w.bin")).SerializeToString())
    assert len(read_onnx(f).graph.node) == 1
    (file,) = bnfx.inspect_onnx(f).external_data
    assert (file.location, file.size, file.needed) == ("w.bin", 16, 16)

    class AddOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert bnfx.verify_onnx(AddOne().eval(), f, torch.randn(1, 4))
    (f.parent / "w.bin").write_bytes(np.full(4, 2, np.float32).tobytes())
    assert not bnfx.verify_onnx(AddOne().eval(), f, torch.randn(1, 4))


def test_inspect_looks_into_subgraphs_and_functions(f: Path) -> None:
    def norm(x: str, y: str) -> onnx.NodeProto:
        return helper.make_node("BatchNormalization", [x, "s", "b", "m", "v"], [y])

    vectors = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in "sbmv"]
    branches = {
        key: helper.make_graph([norm("x", f"{key}_y")], key, [], [value(f"{key}_y", None)])
        for key in ("then_branch", "else_branch")
    }
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function(
        "here", "f", ["a", "s", "b", "m", "v"], ["c"], [norm("a", "c")], imports
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    nodes = [
        helper.make_node("If", ["yes"], ["z"], **branches),
        helper.make_node("f", ["z", "s", "b", "m", "v"], ["y"], domain="here"),
    ]
    f.write_bytes(model(nodes, [*vectors, yes], functions=[function]).SerializeToString())
    found = bnfx.inspect_onnx(f)
    assert len(found.batch_norms) == 3
    assert {bn.where for bn in found.batch_norms} == {
        "graph/If/then_branch",
        "graph/If/else_branch",
        "function here:f",
    }
    assert found.functions == ("here:f",)
