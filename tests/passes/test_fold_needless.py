"""BatchNorms that an exact rewrite can remove, beside operators that once kept them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx


def settled(model: nn.Module) -> nn.Module:
    """`model` in eval mode and float64, with statistics and affine maps drawn at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                norm.weight.mul_(torch.randn(norm.weight.shape, generator=generator).sign())
    return model.double().eval()


class Net(nn.Module):
    """Layers around a function of one tensor, or of a tensor and a parameter."""

    def __init__(
        self, call: Callable[..., Any], *layers: nn.Module, shape: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.call = call
        self.before, self.after = nn.Sequential(*layers[:1]), nn.Sequential(*layers[1:])
        self.w = nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y: Tensor = self.after(self.call(x) if self.w is None else self.call(x, self.w))
        return y


def verdicts(folded: nn.Module) -> list[str]:
    """What became of each BatchNorm."""
    report = bnfx.report(folded)
    assert isinstance(report, bnfx.FoldReport)
    return [record.verdict for record in report.batch_norms]


def folds(model: nn.Module, x: Tensor, *, kept: int = 0) -> None:
    """Hold a fold of `model`, with and without an example, to the source."""
    settled(model)
    for inputs in ((x,), None):
        folded = bnfx.fold_bn(model, inputs)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
        assert verdicts(folded).count("kept") == kept or inputs is None


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda y: 2 - y,
        lambda y: torch.rsub(y, 2),
        lambda y: torch.sub(torch.ones(()).double(), y),
        lambda y: -y,
        torch.neg,
        lambda y: 3 - -y,
        lambda y: F.pad(y, (0, 0)),
        lambda y: F.pad(y, (-1, -1)),
        lambda y: F.pad(y, (0, -2), mode="reflect"),
        lambda y: F.pad(y, (0, 0), value=1.0),
        lambda y: y[..., 1:-1],
        lambda y: y.to(y.dtype),
        lambda y: y.to(torch.float64),
    ],
)
@pytest.mark.parametrize("forward", [True, False])
def test_what_brings_nothing_in_lets_all_through(
    call: Callable[[Tensor], Tensor], *, forward: bool
) -> None:
    """A norm before or behind it goes into the layer on the other side."""
    layer, norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
    layers = (norm, layer) if forward else (layer, norm)
    folds(Net(call, *layers), image(2, 4, 7))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(4, 3)], (5, 4)),
        ([nn.Conv2d(4, 3, 3)], (2, 4, 6, 6)),
        ([nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()], (2, 4, 6, 6)),
        ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)], (2, 4, 6, 6)),
        ([nn.ConvTranspose2d(4, 3, 1)], (2, 4, 6, 6)),
    ],
)
def test_zero_gamma_goes_forward(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    """No division: that column of W is 0, and its constant goes into the bias."""
    norm = nn.BatchNorm1d(4) if len(shape) == 2 else nn.BatchNorm2d(4)
    model = settled(nn.Sequential(norm, *layers))
    norm.weight.data[1:3] = 0
    x = image(*shape)
    folded = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == ["folded"]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 3, 3, padding=1)],
        [nn.ReLU(), nn.Conv2d(4, 3, 1)],
        [nn.MaxPool2d(2), nn.Conv2d(4, 3, 1)],
        [nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)],
        [nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 3, 1)],
        [nn.Identity()],
    ],
)
def test_zero_gamma_stays_where_its_constant_is_seen(layers: list[nn.Module]) -> None:
    norm = nn.BatchNorm2d(4)
    model = settled(nn.Sequential(norm, *layers))
    norm.weight.data[1] = 0
    x = image(2, 4, 6, 6)
    folded = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded)[0] == "kept"


def test_zero_gamma_beside_other_readers_of_its_input() -> None:
    """What else reads the input of the norm sees it as it was."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(self.norm(x)), x.exp()

    model = Two()
    settled(model)
    model.norm.weight.data[2] = 0
    x = image(5, 4)
    folded = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == ["folded"]
