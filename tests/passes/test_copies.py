"""How often a model is copied: memory holds it that often, and large ones fill it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx


class Branchy(nn.Module):
    """Its root cannot be traced: control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(0.1))
        self.end = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        out: Tensor = self.end(F.dropout(x, 0.1, self.training) if x.sum() > 0 else x)
        return out


class Parted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        return F.gelu(self.near(x) + self.far(self.bn(x)))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(0.1), nn.LocalResponseNorm(2), nn.Conv2d(4, 2, 1)
    )


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the modules that are copied as a whole, in order."""
    seen: list[str] = []
    inside: list[None] = []
    original = copy.deepcopy

    def counting(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, nn.Module) and not inside:
            seen.append(type(value).__name__)
        inside.append(None)
        try:
            return original(value, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(copy, "deepcopy", counting)
    return seen


@pytest.mark.parametrize("build", [plain, Branchy])
@pytest.mark.parametrize("init", ["fresh", "identity", "calibrate"])
@pytest.mark.parametrize("given", [True, False])
def test_insertion_copies_at_most_twice(
    build: Callable[[], nn.Module],
    init: str,
    given: bool,  # noqa: FBT001  # drawn by pytest
    copies: list[str],
) -> None:
    model, x = build().eval(), torch.randn(4, 3, 8, 8)
    options: dict[str, Any] = {"init": init}
    if init == "calibrate":
        options["calibration_data"] = [x]
    bnfx.insert_bn(model, x if given else None, **options)
    exact = init == "calibrate" or (init == "identity" and given)  # the truth is float64
    assert len(copies) == 1 + exact, copies


@pytest.mark.parametrize("build", [plain, Branchy])
@pytest.mark.parametrize("given", [True, False])
def test_the_recipe_copies_once(
    build: Callable[[], nn.Module],
    given: bool,  # noqa: FBT001  # drawn by pytest
    copies: list[str],
) -> None:
    example = torch.randn(4, 3, 8, 8) if given else None
    bnfx.recipe(build(), lr=0.1, weight_decay=1e-4, example_inputs=example, zero_init_residual=True)
    assert len(copies) == 1, copies


def test_folding_copies_no_more_than_the_capture(copies: list[str]) -> None:
    """Branches that a fold parts are merged, and folded again, from the graph there is."""
    parted = Parted().eval()
    folded = bnfx.fold_bn(parted)
    assert folded.get_parameter("near.merged.weight").shape == (4, 4, 3, 3)
    assert len(copies) == 1, copies
