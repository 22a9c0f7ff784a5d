"""Normalisation of the input as part of the network: what folds, and that the model stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.graphs.normalised import normalised
from tests.support.laws import randomise

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PIXELS = torch.randint(0, 256, (2, 3, 9, 9), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, padding: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4)

    def forward(self, image: Tensor, gain: Tensor | None = None) -> Tensor:
        y = torch.relu(self.bn(self.conv(image)))
        return y if gain is None else y * gain


def by_hand(model: nn.Module, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    made: Tensor = copy.deepcopy(model).double()((pixels.double() / 255 - mean) / std)
    return made


@pytest.mark.parametrize(("padding", "left"), [(0, []), (1, ["Sub"])])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("init", [None, "fresh"])
def test_a_file_that_takes_pixels(
    tmp_path: Path, padding: int, left: list[str], dtype: torch.dtype, init: Literal["fresh"] | None
) -> None:
    model = randomise(Net(padding))
    model = model if init is None else bnfx.insert_bn(model, init=init).eval()
    before = copy.deepcopy(model.state_dict())
    f, pixels = tmp_path / "net.onnx", PIXELS.to(dtype)
    bnfx.deploy(model, pixels, f, input_scale=1 / 255, input_mean=MEAN, input_std=STD)
    assert [*before] == [*model.state_dict()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    graph = onnx.load(f).graph
    assert [i.name for i in graph.input] == ["image"]
    casts = ["Cast"] if dtype is torch.uint8 else []
    assert [n.op_type for n in graph.node] == [*casts, *left, "Conv", "Relu"]
    session = onnxruntime.InferenceSession(f, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": pixels.numpy()})
    np.testing.assert_allclose(got, by_hand(model, PIXELS).detach(), rtol=1e-5, atol=1e-5)


def test_one_number_for_all_channels_and_other_arguments() -> None:
    model, gain = randomise(Net(1)), torch.full((1,), 3.0)
    made = normalised(model, PIXELS, scale=0.5, mean=1)
    expected = model(PIXELS * 0.5 - 1, gain=gain)
    torch.testing.assert_close(made(PIXELS, gain=gain), expected)
    torch.testing.assert_close(made(PIXELS, gain), expected)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"mean": [1.0, 2.0]}, "input_mean has 2 numbers .* 3 channels"),
        ({"std": [1.0, 0.0, 1.0]}, "input_std is"),
        ({"scale": float("nan")}, "input_scale is"),
    ],
)
def test_numbers_that_do_not_fit(numbers: dict[str, object], told: str) -> None:
    with pytest.raises(bnfx.CaptureError, match=told):
        normalised(Net(0), PIXELS, **numbers)  # type: ignore[arg-type]


def test_the_first_argument_must_have_channels() -> None:
    with pytest.raises(bnfx.CaptureError, match="no tensor"):
        normalised(Net(0), torch.ones(3), scale=2)
