"""Where a graph ran, and in which arithmetic: every branch that a CPU allows, and CUDA where it is.

With the gpu wheel and no GPU, a request for CUDA must fail with the cause; that is tested here too.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import bnfx
from bnfx.runtime import canary, packages, runner
from bnfx.runtime.assignment import (
    Placed,
    PlacedNode,
    is_shape_arithmetic,
    placed_nodes,
    require_placed,
    whole_number_nodes,
)
from bnfx.runtime.availability import unavailable_reason
from bnfx.runtime.canary import CANARY, require_arithmetic
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.providers import (
    CPU,
    CUDA,
    SHORT,
    Where,
    execution_provider,
    installed_plugins,
    known,
)
from bnfx.runtime.sessions import SessionSettings, cuda_problem, open_session, require_still_on
from bnfx.verification.references import StoredAs, Tf32, to_tf32
from bnfx.version import version_of
from tests.support import zoo
from tests.verification.test_verify import export

NO_CUDA = unavailable_reason("cuda") is not None
without_cuda = pytest.mark.skipif(not NO_CUDA, reason="CUDA works here")


def relu_file(folder: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["s"], "shape"),
            helper.make_node("Gather", ["s", "i"], ["n"], "gather"),
            helper.make_node("Relu", ["x"], ["y"], "relu"),
        ],
        "g",
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, [2, 3]), value("n", TensorProto.INT64, [])],
        [onnx.numpy_helper.from_array(np.array(0), "i")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "relu.onnx"))
    return folder / "relu.onnx"


def request(f: Path, folder: Path, provider: str = "cpu") -> runner.Request:
    return runner.Request(str(f), provider, str(folder), ("x",), 1)


@pytest.mark.parametrize("provider", ["tpu", "cuda:x", "cpu:0", "", "CUDA"])
def test_unknown_providers_are_refused(provider: str) -> None:
    with pytest.raises(bnfx.ProviderError, match="unknown"):
        execution_provider(provider)


@pytest.mark.parametrize("short", SHORT)
def test_a_short_name_and_the_full_one_are_the_same(short: str) -> None:
    full = SHORT[short].name
    assert known(short)
    assert known(full)
    assert execution_provider(short) == execution_provider(full)
    assert Where(short).memory == Where(full).memory
    device = SHORT[short].device_option
    for name in (short, full):
        assert known(f"{name}:1") == bool(device)
        if device:
            assert execution_provider(f"{name}:1")[1][device] == "1"
            assert Where(name, {device: "2"}).entries(tf32=False)[1][device] == "2"


def test_options_that_nobody_hears_are_refused() -> None:
    with pytest.raises(bnfx.ProviderError, match="the CPU takes no options"):
        Where.of("CPUExecutionProvider", {"use_tf32": 0})
    assert Where.of("cuda", {"do_copy_in_default_stream": True}).options == {
        "do_copy_in_default_stream": "1"
    }


def test_provider_options() -> None:
    assert execution_provider("cpu") == ("CPUExecutionProvider", {})
    name, options = execution_provider("cuda:1")
    assert (name, options) == ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})
    assert execution_provider("cuda", tf32=True)[1]["use_tf32"] == "1"


@without_cuda
def test_cuda_that_is_missing_is_an_error_everywhere(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    for ask in (
        lambda: bnfx.verify_onnx(model, f, x, provider="cuda"),
        lambda: bnfx.benchmark_onnx(f, x, provider="cuda:0"),
        lambda: bnfx.deploy(model, x, tmp_path / "new.onnx", provider="cuda"),
    ):
        with pytest.raises(bnfx.ProviderError, match=r"provider='cpu'") as caught:
            ask()
        assert "CUDA" in str(caught.value)
    assert not (tmp_path / "new.onnx").exists()
    assert cuda_problem() is not None


def test_the_profile_tells_what_ran(tmp_path: Path) -> None:
    f = relu_file(tmp_path)
    asked = request(f, tmp_path)
    x = np.array([[-1, 0, 1], [2, -2, 3]], np.float32)
    for answer in (
        runner.execute(asked, [[x]]),
        execute_apart(asked, [[x]], timeout=60),
    ):
        assert answer.ran.keys() == {"CPUExecutionProvider"}
        assert answer.assigned.keys() == {"CPUExecutionProvider"}
        assert answer.proof["memcpy_nodes"] == 0
        assert not answer.proof["libraries"]["cudnn"]
        np.testing.assert_array_equal((answer.results[0] or [])[0], np.maximum(x, 0))


def test_the_profile_is_believed_over_the_session(tmp_path: Path) -> None:
    node = {"cat": "Node", "args": {"provider": CUDA, "op_name": "Conv"}}
    copy = {"cat": "Node", "args": {"provider": CUDA, "op_name": "MemcpyToHost"}}
    other = {"cat": "Session", "args": {}}
    astray = {"cat": "Node", "args": {"provider": CPU, "op_name": "Relu"}}
    f = tmp_path / "profile.json"

    def profile(*events: Any) -> runner.Profile:
        f.write_text(json.dumps(events))
        return runner._profile(str(f))

    found = profile(node, copy, other)
    assert (dict(found.ran), found.memcpy) == ({CUDA: 2}, 1)
    session = open_session(relu_file(tmp_path))
    with pytest.raises(bnfx.ProviderError, match=CUDA):
        require_placed(placed_nodes(session), Where("cuda"), str(relu_file(tmp_path)))
    with pytest.raises(bnfx.ProviderError, match="switched"):
        require_still_on(session, CUDA, "the model")
    cuda, stray = Where("cuda"), PlacedNode(CPU, "Relu", "relu")
    runner._prove_run(found, Placed(session, (), ()), cuda)
    with pytest.raises(bnfx.ProviderError, match="no node that ran"):
        runner._prove_run(profile(astray), Placed(session, (), ()), cuda)
    with pytest.raises(bnfx.ProviderError, match="no node that ran"):  # copies compute nothing
        runner._prove_run(profile(copy), Placed(session, (), ()), cuda)
    with pytest.raises(bnfx.ProviderError, match="given Relu, and by the profile"):
        runner._prove_run(profile(node, astray), Placed(session, (), ()), cuda)
    runner._prove_run(profile(node, astray), Placed(session, (), (stray,)), cuda)


def test_only_shape_arithmetic_may_stray(tmp_path: Path) -> None:
    f = relu_file(tmp_path)
    whole = whole_number_nodes(str(f))
    assert whole == {"shape", "gather"}
    pairs = [("Shape", "shape"), ("Gather", "gather"), ("Relu", "relu"), ("Gather", "unknown")]
    nodes = [PlacedNode(CPU, *pair) for pair in pairs]
    wrong = [str(node) for node in nodes if not is_shape_arithmetic(node, whole)]
    assert wrong == ["Relu 'relu'", "Gather 'unknown'"]
    # Asked for CUDA, a session on the CPU has every node in the wrong place.
    session = open_session(f, "cpu", SessionSettings(optimise=False))
    with pytest.raises(bnfx.ProviderError, match=r"elsewhere: Relu 'relu';.*for: Relu\)"):
        require_placed(placed_nodes(session), Where("cuda"), str(f))


def test_no_fallback_of_onnxruntime_is_left(tmp_path: Path) -> None:
    """Its Python class has one for opening and one for running, which prints, too."""
    assert not open_session(relu_file(tmp_path))._enable_fallback


def test_a_run_that_fails_while_measured_is_an_error_of_bnfx(tmp_path: Path) -> None:
    text = "g (float[n] x) => (float[3] y) { y = Reshape(x, three) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {text}')
    model.graph.initializer.append(helper.make_tensor("three", TensorProto.INT64, [1], [3]))
    onnx.save(model, tmp_path / "three.onnx")
    for isolate in (True, False):
        with pytest.raises(bnfx.VerificationError, match="Reshape"):
            bnfx.benchmark_onnx(tmp_path / "three.onnx", torch.ones(4), isolate=isolate)


def test_what_may_stray_is_named(tmp_path: Path) -> None:
    f = str(relu_file(tmp_path))
    nodes = placed_nodes(open_session(f, "cpu", SessionSettings(optimise=False)))
    for allowed, left in [
        (("Shape", "Gather", "Relu"), ""),
        (("Relu",), "Shape 'shape', Gather 'gather'"),
        ((), "Shape 'shape', Gather 'gather', Relu 'relu'"),
    ]:
        where = Where.of("cuda", allow_on_cpu=allowed)
        if not left:
            assert len(require_placed(nodes, where, f)) == 3
            continue
        with pytest.raises(bnfx.ProviderError, match=f"elsewhere: {left};"):
            require_placed(nodes, where, f)
    # Allowed is the CPU, no third provider; and who tells nothing has proved nothing.
    elsewhere = [PlacedNode("QNNExecutionProvider", "Relu", "relu")]
    with pytest.raises(bnfx.ProviderError, match="elsewhere"):
        require_placed(elsewhere, Where.of("cuda", allow_on_cpu="Relu"), f)
    with pytest.raises(bnfx.ProviderError, match="tells of no node"):
        require_placed([], Where("cuda"), f)


def test_the_canary_survives_float32_and_dies_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = require_arithmetic(Where(), "fp32")
    assert set(found.canary.values()) == {CANARY}
    assert not found.told()["tf32"]
    assert {"MatMul", "Conv", "Conv depthwise", "ConvTranspose"} <= found.factors.keys()
    assert float(to_tf32(torch.tensor(CANARY))) == 1.0
    # Inputs and weights as they would be rounded stand for a provider that rounds them.
    for name, precision, worse in [
        ("TF32", "tf32", "fp32"),
        ("TF32, truncated", "tf32", "fp32"),
        ("bfloat16", None, "tf32"),
        ("bfloat16, truncated", None, "tf32"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(canary, "run_session", rounded_run(canary.ROUNDINGS[name]))
            with pytest.raises(bnfx.ProviderError, match=f"in {name.partition(',')[0]}, not in"):
                require_arithmetic(Where(), worse)
            if precision is not None:
                told = require_arithmetic(Where(), precision).told()
                assert told["tf32"]
                assert told["truncated"] == name.endswith("truncated")
    for wrong in (np.zeros_like, lambda y: y * 0.999, lambda y: np.full_like(y, np.nan)):
        with monkeypatch.context() as patch:
            patch.setattr(canary, "run_session", rounded_run(wrong))
            with pytest.raises(bnfx.ProviderError, match="computes wrong"):
                require_arithmetic(Where(), "tf32")


def test_kinds_of_layers_that_a_provider_lacks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_session

    def lacking(model: bytes, *given: Any) -> Any:
        if b"ConvTranspose" in model:
            raise bnfx.ProviderError("there is no ConvTranspose")
        return real(model, *given)

    monkeypatch.setattr(canary, "open_session", lacking)
    told = require_arithmetic(Where(), "fp32").told()
    assert told["not tried"] == {"ConvTranspose": "there is no ConvTranspose"}
    assert len(told["arithmetic"]) == 6


def test_plugins_come_in_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By agreement `onnxruntime-ep-NAME` tells the provider and its library."""
    wheel(tmp_path, "onnxruntime-ep-demo", "1.0", "onnxruntime_ep_demo")
    wheel(tmp_path, "onnxruntime-ep-reserved", "0.0.0", "onnxruntime_ep_reserved")
    (tmp_path / "onnxruntime_ep_demo.py").write_text(
        "get_ep_name = lambda: 'DemoExecutionProvider'\nget_library_path = lambda: '/no/such.so'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_plugins() == {"DemoExecutionProvider": "onnxruntime_ep_demo"}
    with pytest.raises(bnfx.ProviderError, match=r"library of Demo.* does not load: .*such\.so"):
        open_session(relu_file(tmp_path), "DemoExecutionProvider")


def rounded_run(rounding: Any) -> Any:
    """What a session gives whose factors are rounded: one of the two is always one."""
    return lambda session, feed: [
        rounding(y.astype(np.float64)).astype(y.dtype) for y in session.run(None, feed)
    ]


def test_sums_of_float16_are_told_from_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_arithmetic(Where(), "fp16").sums == {"MatMul": "float32", "Conv": "float32"}

    def narrow(_session: Any, feed: Any) -> Any:
        totals = []
        for given in feed.values():
            total = np.float16(0)
            for value in given.ravel():
                total += value
            totals.append(np.full(1, total))
        return totals

    monkeypatch.setattr(canary, "run_session", narrow)
    assert set(require_arithmetic(Where(), "fp16").sums.values()) == {"the narrow type"}


def test_tf32_keeps_ten_bits() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -3.14159, 0.0, float("inf")])
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -3.140625, 0.0, float("inf")])
    assert torch.equal(to_tf32(x), expected)
    layer = nn.Linear(64, 64).eval()
    x = torch.randn(8, 64)
    with torch.no_grad():
        exact = layer(x)
        with Tf32():
            rounded = layer(x)
        with StoredAs(torch.float16):
            half = layer(x)
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 1e-3
    assert torch.equal(half, half.half().float())


def wheel(folder: Path, name: str, version: str, top: str = "onnxruntime") -> None:
    """Install a wheel that has nothing but its metadata and one file."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{top}/__init__.py,,\n")


def test_two_wheels_in_one_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"onnxruntime": "1.32.0", "onnxruntime-brandnew": "1.31.1"}
    for name, version in installed.items():
        wheel(tmp_path / "first", name, version)
    wheel(tmp_path / "first", "onnxruntime-ep-openvino", "1.8.1", "onnxruntime_ep_openvino")
    wheel(tmp_path / "second", "onnxruntime-openvino", "1.24.1")
    monkeypatch.setattr("sys.path", [str(tmp_path / "first"), str(tmp_path / "second")])
    importlib.invalidate_caches()
    assert packages.installed_runtimes() == installed
    assert packages.shadowed_runtimes() == {"onnxruntime-openvino": str(tmp_path / "second")}
    assert version_of("onnxruntime-directml") is None


@pytest.mark.parametrize(
    ("wanted", "brought", "message"),
    [
        ("13.0", "13.2", None),
        ("13.0", "12.8", "CUDA 13, and this torch brings CUDA 12.8"),
        ("13.0", None, "for the CPU"),
        (None, "13.0", None),
    ],
)
def test_cuda_majors(wanted: str | None, brought: str | None, message: str | None) -> None:
    found = packages.mismatch(wanted, brought)
    assert found is None if message is None else found is not None and message in found


def test_stated_versions_are_those_of_the_packages() -> None:
    assert packages.torch_cuda() == torch.version.cuda
    assert packages.installed_runtimes()


def test_sessions_without_optimisation_show_every_value(tmp_path: Path) -> None:
    session = open_session(relu_file(tmp_path), "cpu", SessionSettings(optimise=False))
    kinds = {
        str(node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }
    assert kinds == {"Shape", "Gather", "Relu"}


GPU_NETWORKS = (
    "resnet50",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "regnet_y_400mf",
)


@pytest.mark.gpu
@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("name", GPU_NETWORKS)
def test_the_whole_way_on_cuda(tmp_path: Path, name: str, precision: Any) -> None:
    """Fold, export, verify and measure; float32 strictly, TF32 as asked for, half as stored."""
    model = getattr(zoo.torchvision_models(), name)(weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    if precision == "fp16":
        model, x = model.half(), x.half()
    done = bnfx.deploy(
        model,
        x,
        tmp_path / "net.onnx",
        provider="cuda",
        precision=precision,
        dynamic_shapes=({0: "batch"},),
        num_inputs=2,  # the reference runs on the CPU, in float16 slowly
        benchmark=True,
    )
    report = done.verify
    assert report, str(report)
    assert report.proof["ran"].get("CUDAExecutionProvider", 0) > 0
    assert report.proof["tf32"] is (precision == "tf32")
    assert report.proof["libraries"]["cudnn"]
    assert set(report.providers) <= {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert done.benchmark is not None
    assert {arm.arm for arm in done.benchmark.arms} >= {"file", "baseline", "floor"}
    print(done.benchmark)


@pytest.mark.gpu
def test_proved_on_tensorrt(tmp_path: Path) -> None:
    """It fuses a graph into one kernel; what is in it is told node by node."""
    if reason := unavailable_reason("tensorrt"):
        pytest.skip(reason)
    _, f, _ = export(tmp_path)
    found = bnfx.prove_onnx(f, provider="tensorrt", num_inputs=2)
    assert found, str(found)
    assert found.operators.keys() == {"TensorrtExecutionProvider"}
    assert sum(found.operators["TensorrtExecutionProvider"].values()) > 1
