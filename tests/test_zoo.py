"""The networks of torchvision and timm can be built beside any torch."""

from __future__ import annotations

import pytest
import torch

from tests.support import zoo

pytestmark = pytest.mark.zoo


def test_torchvision_networks_run() -> None:
    model = zoo.torchvision_models().resnet18(weights=None).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_timm_networks_run() -> None:
    model = zoo.timm().create_model("resnet18", pretrained=False).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
