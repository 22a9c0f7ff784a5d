"""A file against itself: where each node ran, in which arithmetic, how far off."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import bnfx


def written(folder: Path, dtype: torch.dtype) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(1, 3, 4, 4)
    f = folder / "net.onnx"
    shapes = ({0: "batch"},)
    bnfx.export_onnx(model.to(dtype), x.to(dtype), f, dynamic_shapes=shapes)
    return f


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    found = bnfx.prove_onnx(written(tmp_path, dtype), provider="CPUExecutionProvider")
    assert found, str(found)
    assert found.provider == "CPUExecutionProvider"
    assert found.operators.keys() == {"CPUExecutionProvider"}
    assert sum(found.operators["CPUExecutionProvider"].values()) == len(found.verification.nodes)
    assert found.arithmetic == ("float16" if dtype is torch.float16 else "float32")
    copied = dtype is torch.bfloat16
    assert ("no kernels for bfloat16: the weights are checked" in str(found)) == copied
    assert "computes what it must" in found.to_html()


def test_what_cannot_be_proved_is_not(tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] y) { s = Add(x, large) y = Sub(s, large) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {text}')
    model.graph.initializer.append(onnx.helper.make_tensor("large", 1, [], [1e12]))
    onnx.save(model, tmp_path / "lost.onnx")
    found = bnfx.prove_onnx(tmp_path / "lost.onnx")
    assert not found
    assert "is not proved" in str(found)


def test_a_provider_that_is_missing_is_an_error(tmp_path: Path) -> None:
    f = written(tmp_path, torch.float32)
    for name in ("xnnpack", "NoSuchExecutionProvider"):
        with pytest.raises(bnfx.ProviderError, match="built without it"):
            bnfx.prove_onnx(f, provider=name)
    with pytest.raises(bnfx.ProviderError, match="'nothing' is unknown"):
        bnfx.prove_onnx(f, provider="nothing")
