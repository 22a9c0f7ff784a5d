"""Providers that run on any processor, for real: OpenVINO, and ggml, which is a plugin.

`make test-providers` brings them. BNFX_REQUIRE_PROVIDERS names those that must be there.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import bnfx
from bnfx.runtime.availability import unavailable_reason
from bnfx.runtime.providers import Where

pytestmark = [pytest.mark.providers, pytest.mark.xdist_group("providers")]

OPENVINO = "OpenVINOExecutionProvider"


def missing(name: str, reason: str) -> None:
    """Skip, or fail where the provider must be there."""
    if name in os.environ.get("BNFX_REQUIRE_PROVIDERS", "").split(","):
        pytest.fail(f"{name} is required: {reason}")
    pytest.skip(reason)


@pytest.fixture
def openvino() -> str:
    if reason := unavailable_reason("openvino"):
        missing("openvino", reason)
    return "openvino"


@pytest.fixture
def ggml(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Options that bring the plugin."""
    monkeypatch.setenv("ORT_GGML_LOG", "off")
    path = os.environ.get("BNFX_GGML_LIBRARY", "")
    if not Path(path).is_file():
        missing("ggml", "the plugin is not there: BNFX_GGML_LIBRARY names its library")
    return {"library": path}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4)
        nn.init.constant_(self.norm.weight, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        out: torch.Tensor = self.head(torch.relu(self.depthwise(y)).mean((2, 3)))
        return out


def file(folder: Path, text: str, opset: int = 18) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]> g {text}')
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type.lower()}{i}"
    onnx.save(model, folder / "file.onnx")
    return folder / "file.onnx"


def test_the_whole_way_on_openvino(tmp_path: Path, openvino: str) -> None:
    done = bnfx.deploy(
        Net().eval(),
        torch.randn(2, 3, 16, 16),
        tmp_path / "net.onnx",
        provider=openvino,
        dynamic_shapes=({0: "batch"},),
        benchmark=True,
    )
    found = done.verify
    assert found, str(found)
    assert found.providers.keys() == {OPENVINO} == found.proof["ran"].keys()
    assert {node.operator for node in found.nodes} >= {"Conv", "Relu"}
    assert set(found.proof["arithmetic"].values()) == {"float32"}
    assert "layers: their values are of the CPU" in str(found)
    assert done.benchmark is not None
    assert "memory of the CPU" in str(done.benchmark)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_proved_on_openvino(tmp_path: Path, openvino: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    bnfx.export_onnx(bnfx.fold_bn(Net().to(dtype).eval()), x, tmp_path / "net.onnx")
    found = bnfx.prove_onnx(tmp_path / "net.onnx", provider=openvino)
    assert found, str(found)
    assert found.operators[OPENVINO]["Conv"] == 2
    half = dtype is torch.float16
    assert found.arithmetic == ("float16" if half else "float32")
    assert found.verification.proof.get("sums", {}).get("MatMul") == ("float32" if half else None)


def test_what_openvino_lacks_is_named(tmp_path: Path, openvino: str) -> None:
    f = file(
        tmp_path, "(float[4,3,3] x) => (float[4] y) { r = Relu(x) m = MatMul(r, r) y = Det(m) }"
    )
    with pytest.raises(bnfx.ProviderError, match=r"run elsewhere: Det 'det2'; .*allow_on_cpu"):
        bnfx.prove_onnx(f, provider=openvino)
    for nothing in ((), ("Relu",)):
        with pytest.raises(bnfx.ProviderError):
            bnfx.prove_onnx(f, provider=openvino, allow_on_cpu=nothing)
    found = bnfx.prove_onnx(f, provider=openvino, allow_on_cpu=("Det",))
    assert found, str(found)
    assert found.operators["CPUExecutionProvider"] == {"Det": 1}
    assert found.verification.proof["shape_nodes_on_cpu"] == ["Det 'det2'"]
    assert "nodes on the CPU, as allowed" in found.to_html()
    x = torch.randn(4, 3, 3)
    measured = bnfx.benchmark_onnx(f, x, provider=openvino, allow_on_cpu=["Det"], num_runs=50)
    assert measured.arithmetic == "float32"


def test_sizes_are_computed_on_openvino(tmp_path: Path, openvino: str) -> None:
    sizes = "s = Shape(x) k = ReduceProd<keepdims=1>(s)"
    text = f"(float[n,4] x) => (float[m] y) {{ {sizes} r = Relu(x) y = Reshape(r, k) }}"
    found = bnfx.prove_onnx(file(tmp_path, text), provider=openvino)
    assert found.operators.keys() == {OPENVINO}


def test_a_device_that_openvino_lacks(tmp_path: Path, openvino: str) -> None:
    f = file(tmp_path, "(float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(bnfx.ProviderError, match=OPENVINO):
        bnfx.prove_onnx(f, provider=openvino, provider_options={"device_type": "GPU"})
    with pytest.raises(bnfx.ProviderError, match="no_such_option"):
        bnfx.prove_onnx(f, provider=openvino, provider_options={"no_such_option": "1"})


def test_doctor_knows_openvino(openvino: str) -> None:
    found = bnfx.doctor()
    assert found.why_not(openvino) == ""
    assert "built into" in found.why_not("xnnpack")


PRODUCT = "(float[8,16] x) => (float[8,16] y) <float[16,16] w> { y = MatMul(x, w) }"


def product(folder: Path) -> Path:
    f = file(folder, PRODUCT.replace("<float[16,16] w>", ""))
    model = onnx.load(f)
    weight = (torch.randn(16, 16) / 4).numpy()
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, f)
    return f


def test_a_plugin_is_believed_by_its_canary(tmp_path: Path, ggml: dict[str, str]) -> None:
    """It keeps weights in float16 unless told otherwise."""
    f = product(tmp_path)
    with pytest.raises(bnfx.ProviderError, match="ggml computed in float16, not in float32"):
        bnfx.prove_onnx(f, provider="ggml", provider_options=ggml)
    options: dict[str, Any] = {**ggml, "weights": "f32"}
    found = bnfx.prove_onnx(f, provider="ggml", provider_options=options)
    assert found, str(found)
    assert found.operators == {"ggml": {"MatMul": 1}}
    assert found.arithmetic == "float32"
    # What the refusal advises works too.
    assert bnfx.prove_onnx(f, provider="ggml", provider_options=ggml, precision="fp16")


def test_a_run_that_fails_tells_why(tmp_path: Path, ggml: dict[str, str]) -> None:
    bnfx.export_onnx(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8), tmp_path / "conv.onnx")
    with pytest.raises(bnfx.ProviderError, match=r"that the CPU runs: .*only 1-D convolutions"):
        bnfx.prove_onnx(
            tmp_path / "conv.onnx", provider="ggml", provider_options={**ggml, "weights": "f32"}
        )


def test_a_plugin_that_is_registered_here_is_known(ggml: dict[str, str]) -> None:
    if unavailable_reason(Where.of("ggml", ggml)) is None:
        pytest.fail("it has no two-dimensional convolution")
    importlib.import_module("onnxruntime")
    assert Where.of("ggml").options["library"] == ggml["library"]
    other = Where.of("other", {"library": "/no/such.so"})
    assert "the library of other does not load" in (unavailable_reason(other) or "")
