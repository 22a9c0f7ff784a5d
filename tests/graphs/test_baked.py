"""Layers whose weight is computed: in eval mode it is a constant, and BatchNorms fold into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import bnfx
from bnfx.reports.report import FoldRecord

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Mixed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5 + weight.mean()


class LowRank(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(weight.shape[0], 2))
        self.b = nn.Parameter(torch.randn(2, weight[0].numel()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.a @ self.b).view_as(weight)


class Late(nn.Module):
    """Fails once it has ended."""

    ended = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.ended:
            raise OSError("no such device")
        return weight


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def parametrized(layer: nn.Module, part: nn.Module) -> nn.Module:
    made: nn.Module = parametrize.register_parametrization(layer, "weight", part)
    return made


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.l1_unstructured(layer, "bias", 0.3)
    prune.ln_structured(layer, "weight", 0.3, 2, 0)
    return layer


WAYS: dict[str, Callable[[Any], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of old": utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of old": utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": pruned,
    "own": lambda layer: parametrized(layer, Mixed()),
    "low rank": lambda layer: parametrized(layer, LowRank(layer.weight)),
    "two": lambda layer: parametrized(parametrizations.weight_norm(layer), Mixed()),
}

LAYERS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "conv1d": lambda: (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
    "conv2d": lambda: (nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "transposed": lambda: (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)),
    "linear": lambda: (nn.Linear(6, 4), nn.BatchNorm1d(4)),
}


class Adapted(nn.Conv1d):
    """Low rank beside the weight, as adapters of language models have it."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.low = LowRank(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.low(self.weight), self.bias)


class Masked(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(4, 3, 3)), nn.Parameter(torch.tensor(0.7))
        self.register_buffer("mask", torch.rand(4, 3, 3) > 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w * self.mask * self.gain)


class Standardised(nn.Conv1d):
    """As in timm's ScaledStdConv: a BatchNorm function works on the weight."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv1d(x, weight.reshape_as(self.weight), self.bias)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w * self.scale)


def settled(*modules: nn.Module) -> nn.Module:
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.get_buffer("running_mean").normal_()
            module.get_buffer("running_var").uniform_(0.5, 1.5)
    return nn.Sequential(*modules, nn.ReLU()).double().eval()


def image(layer: nn.Module) -> Tensor:
    channels = getattr(layer, "in_channels", None)
    shape = {None: (5, 6), 3: (5, 3, 8), 4: (5, 4, 8, 8)}[channels]
    return torch.randn(*shape, dtype=torch.float64)


def records_of(folded: nn.Module) -> list[FoldRecord]:
    report = bnfx.report(folded)
    assert isinstance(report, bnfx.FoldReport)
    return list(report.batch_norms)


def folds(model: nn.Module, x: Tensor, *, given: bool) -> torch.fx.GraphModule:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    folded = bnfx.fold_bn(model, (x,) if given else None)
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-10)
    records = records_of(folded)
    assert [r.verdict for r in records] == ["folded"], records
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert torch.equal(model(x), expected), "the source computes its weight still"
    return folded


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_batch_norm_folds_into_a_computed_weight(
    way: Callable[[Any], Any],
    layer: Callable[[], tuple[nn.Module, nn.Module]],
    given: bool,  # noqa: FBT001  # drawn by pytest
) -> None:
    plain, norm = layer()
    x = image(plain)
    folded = folds(settled(way(plain), norm), x, given=given)
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert not folded.graph.find_nodes(op="call_module")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("layer", [Adapted, Masked, Standardised, Product])
def test_also_where_the_forward_computes_it(layer: type[nn.Module], given: bool) -> None:  # noqa: FBT001  # drawn by pytest
    x = torch.randn(5, *((6,) if layer is Product else (3, 8)), dtype=torch.float64)
    model = settled(layer(), nn.BatchNorm1d(4))
    folded = folds(model, x, given=given)
    names = [name for name in folded.state_dict() if name.startswith("0.")]
    assert len(names) == 2, "a weight and a bias"
    assert not any(p.requires_grad is False for p in folded.parameters())


def test_a_layer_that_is_called_twice_keeps_its_weight() -> None:
    layer = parametrizations.weight_norm(nn.Conv1d(4, 4, 1))
    model = settled(layer, nn.BatchNorm1d(4), layer)
    folds(model, torch.randn(2, 4, 5, dtype=torch.float64), given=True)


def test_on_meta_it_is_computed_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), nn.ReLU()).eval()
    folded = bnfx.fold_bn(model)
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda conv: vars(
            parametrized(conv, Late()).get_submodule("parametrizations.weight.0")
        ).update(ended=True),
        lambda conv: parametrized(conv, Noisy()),
        lambda conv: parametrizations.spectral_norm(conv).train(),
        lambda conv: utils.spectral_norm(conv).train(),
        lambda conv: utils.weight_norm(conv).register_forward_hook(lambda *_: None),
        lambda conv: utils.weight_norm(conv).register_forward_pre_hook(lambda *_: None),
    ],
    ids=["failing", "random", "iterating", "iterating of old", "watched", "watched before"],
)
def test_what_is_no_constant_stays_whole(spoil: Callable[[nn.Module], object]) -> None:
    model = settled(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    spoil(model.get_submodule("0"))
    model.double()
    [record] = records_of(bnfx.fold_bn(model))
    assert record.verdict == "kept"
    assert record.reason
