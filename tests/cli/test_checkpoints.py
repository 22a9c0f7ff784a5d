"""Checkpoints as people keep them load, and those that do not fit say where they part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnfx.cli.checkpoints import load_checkpoint
from bnfx.errors import UsageError


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.Linear(5, 2))


def before(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def compiled_part(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("0.", "0._orig_mod."): value for name, value in state.items()}


FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str | None, str]] = {
    "as it is": (lambda s: s, None, ""),
    "DistributedDataParallel": (lambda s: before("module.", s), None, "'module.'"),
    "torch.compile": (lambda s: before("_orig_mod.", s), None, "'_orig_mod.'"),
    "both": (lambda s: before("module._orig_mod.", s), None, "'module.'"),
    "both, the other way": (lambda s: before("_orig_mod.module.", s), None, "'module.'"),
    "a part compiled": (compiled_part, None, "'_orig_mod.'"),
    "Lightning": (
        lambda s: {"state_dict": {**before("model.", s), "loss.weight": torch.ones(2)}, "epoch": 3},
        None,
        "left out: 'loss.weight'",
    ),
    "nested": (lambda s: {"model": s, "optimizer": {}, "args": {"lr": 0.1}}, None, "'model'"),
    "nested twice": (lambda s: {"model": {"state_dict": s}}, None, "'model.state_dict'"),
    "its own key": (lambda s: {"ema": {"weights": s}, "model": before("x.", s)}, "ema.weights", ""),
    "a key with a dot": (lambda s: {"ema.weights": s}, "ema.weights", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_to_the_bit(tmp_path: Path, form: str) -> None:
    make, key, says = FORMS[form]
    source, model = net(), net()
    torch.save(make(source.state_dict()), tmp_path / "c.pt")
    assert says in load_checkpoint(model, tmp_path / "c.pt", key)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_averages_and_safetensors(tmp_path: Path) -> None:
    source, model = net(), net()
    torch.save(AveragedModel(source).state_dict(), tmp_path / "c.pth")
    assert "left out: 'n_averaged'" in load_checkpoint(model, tmp_path / "c.pth")
    save_file(before("module.", source.state_dict()), tmp_path / "c.safetensors")
    assert "'module.'" in load_checkpoint(model, tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("make", "key", "says"),
    [
        (lambda: net(8).state_dict(), None, "'0.weight' is 8x3x1x1 in it and 4x3x1x1 in the model"),
        (lambda: before("encoder.", net().state_dict()), None, "it has no '0.weight'"),
        (
            lambda: before("encoder.", net().state_dict()),
            None,
            "the model has no 'encoder.0.weight'",
        ),
        (lambda: {"optimizer": {"lr": 1.0}}, None, "--checkpoint-key"),
        (lambda: {"model": net().state_dict()}, "ema", "has no 'ema'; it has 'model'"),
        (lambda: [torch.ones(1)], None, "holds a list"),
        (dict, None, "holds no tensors"),
    ],
)
def test_what_does_not_fit_says_where(
    tmp_path: Path, make: Callable[[], Any], key: str | None, says: str
) -> None:
    torch.save(make(), tmp_path / "c.pt")
    model = net()
    earlier = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_checkpoint(model, tmp_path / "c.pt", key)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400
    assert all(torch.equal(model.state_dict()[name], value) for name, value in earlier.items())
