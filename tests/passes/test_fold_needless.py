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


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU6()], (2, 3, 8, 8)),
        ([nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Tanh()], (2, 4, 5, 5)),
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.MaxPool1d(2), nn.Conv1d(4, 2, 1)], (2, 3, 9)),
        ([nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.AdaptiveAvgPool3d(1)], (2, 3, 5, 5, 5)),
        ([nn.Linear(5, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 3)], (6, 5)),
        ([nn.BatchNorm1d(5), nn.Linear(5, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)], (6, 5)),
        ([nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)], (2, 3, 5, 5)),
        ([nn.Conv2d(3, 4, 1), nn.Dropout(), nn.AvgPool2d(2), nn.BatchNorm2d(4)], (2, 3, 6, 6)),
    ],
)
def test_core_aten_folds_as_the_source_does(
    layers: list[nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = settled(nn.Sequential(*layers)), image(*shape)
    core = torch.export.export(model, (x,)).run_decompositions().module()
    folded = bnfx.fold_bn(core, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == verdicts(bnfx.fold_bn(model, (x,)))


@pytest.mark.parametrize("rest", [False, True])
def test_native_batch_norm_has_a_record(*, rest: bool) -> None:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            state = (n.weight, n.bias, n.running_mean, n.running_var)
            y, mean, _ = torch.native_batch_norm(self.conv(x), *state, False, 0.1, 1e-5)
            return y + mean.sum() if rest else y

    model, x = settled(Native()), image(2, 3, 6, 6)
    folded = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert len(verdicts(folded)) == 1 + rest


_PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "x @ w": (lambda x, w: x @ w, True),
    "matmul": (lambda x, w: torch.matmul(x, w), True),
    "method": (lambda x, w: x.matmul(w), True),
    "mm": (lambda x, w: torch.mm(x, w), True),
    "transposed": (lambda x, w: x @ w.t(), True),
    "addmm": (lambda x, w: torch.addmm(w[0], x, w), True),
    "scaled addmm": (lambda x, w: torch.addmm(w[:1], x, w, beta=-2, alpha=0.5), True),
    "filled addmm": (lambda x, w: torch.addmm(torch.ones(4, dtype=x.dtype), x, w), True),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), True),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,bi->bo", w, x), True),
    "w @ x.T": (lambda x, w: (w @ x.t()).t(), True),
    "x @ x": (lambda x, w: x @ (x.t() @ x), False),
}


@pytest.mark.parametrize("name", _PRODUCTS)
@pytest.mark.parametrize("forward", [True, False])
def test_products_with_a_parameter_are_layers(name: str, *, forward: bool) -> None:
    call, layer = _PRODUCTS[name]
    norm, other = nn.BatchNorm1d(4), nn.Tanh()
    layers = (norm, other) if forward else (nn.Identity(), norm, other)
    folds(Net(call, *layers, shape=(4, 4)), image(4, 4), kept=not layer)


#: Products over several axes or with a weight for each entry of one: shapes of x and w, and of y.
_CONTRACTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "bci,cio->bo": ((6, 3, 5), (3, 5, 4), (6, 4)),
    "bci,oic->bo": ((6, 3, 5), (4, 5, 3), (6, 4)),
    "bci,cio->bco": ((6, 3, 5), (3, 5, 4), (6, 3, 4)),
    "bic,cio->bco": ((6, 5, 3), (3, 5, 4), (6, 3, 4)),
    "bi,iop->bop": ((6, 5), (5, 4, 2), (6, 4, 2)),
    "bi,ipo->bop": ((6, 5), (5, 2, 4), (6, 4, 2)),
    "bci,c->bci": ((6, 3, 5), (3,), (6, 3, 5)),
    "...i,io->...o": ((6, 5), (5, 4), (6, 4)),
    "bchw,oc->bohw": ((2, 3, 4, 5), (4, 3), (2, 4, 4, 5)),
    "bhci,hcio->bohc": ((2, 2, 3, 5), (2, 3, 5, 4), (2, 4, 2, 3)),
}


@pytest.mark.parametrize("equation", _CONTRACTIONS)
@pytest.mark.parametrize("first", [True, False])
def test_contractions_with_a_parameter_are_layers(equation: str, *, first: bool) -> None:
    taken, weight, given = _CONTRACTIONS[equation]
    terms, _, out = equation.partition("->")
    swapped = f"{','.join(reversed(terms.split(',')))}->{out}"
    norms = [nn.BatchNorm2d(s[1]) if len(s) == 4 else nn.BatchNorm1d(s[1]) for s in (taken, given)]

    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum(equation, x, w) if first else torch.einsum(swapped, w, x)

    model, x = settled(Net(call, *norms, nn.Tanh(), shape=weight)), image(*taken)
    folded = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == ["folded", "folded"]


@pytest.mark.parametrize(
    ("taken", "weight", "folded"),
    [((6, 3, 5), (3, 5, 4), 2), ((6, 3, 2, 5), (3, 5, 4), 2), ((6, 3, 2, 5), (1, 5, 4), 0)],
)
def test_products_with_a_weight_for_each_entry(
    taken: tuple[int, ...], weight: tuple[int, ...], folded: int
) -> None:
    """`bmm` and `matmul`; a weight that is repeated over an axis of x is none for each entry."""
    norms = [nn.BatchNorm1d(3) if len(taken) == 3 else nn.BatchNorm2d(3) for _ in range(2)]

    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), w).transpose(0, 1) if len(taken) == 3 else x @ w

    model, x = settled(Net(call, *norms, nn.Tanh(), shape=weight)), image(*taken)
    made = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(made).count("folded") == folded


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: x.transpose(1, 2) @ w,
        lambda x, w: w @ x,
        lambda x, w: torch.einsum("bct,cd->bdt", x, w),
        lambda x, w: torch.einsum("oc, bct -> bot", w, x),
        lambda x, w: torch.einsum("bct,cd->btd", x, w),
    ],
)
def test_products_over_any_axis(call: Callable[..., Tensor]) -> None:
    folds(Net(call, nn.BatchNorm1d(4), nn.GELU(), shape=(4, 4)), image(2, 4, 4))
    folds(Net(call, nn.Conv1d(4, 4, 3), nn.GELU(), shape=(4, 4)), image(2, 4, 6))


def test_a_zero_scale_goes_into_a_product() -> None:
    model = Net(lambda x, w: x @ w, nn.BatchNorm1d(4), nn.Tanh(), shape=(4, 3))
    settled(model)
    norm = model.before[0]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.weight.data[2] = 0
    x = image(5, 4)
    folded = bnfx.fold_bn(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == ["folded"]


def test_what_insertion_put_beside_a_product_folds() -> None:
    model = nn.Sequential(Net(lambda x, w: x @ w, nn.Identity(), nn.ReLU(), shape=(4, 5)))
    model.append(nn.Linear(5, 3))
    x = image(6, 4)
    inserted = settled(bnfx.insert_bn(model.double(), (x,)))
    folded = bnfx.fold_bn(inserted, (x,))
    torch.testing.assert_close(folded(x), inserted(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == ["folded"]


class TwoAxes(nn.Module):
    """The output of one product, normalised along one axis and then along the other."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6, 3))
        self.last, self.middle = nn.BatchNorm1d(3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bci,cio->bco", x, self.w)
        z: Tensor = self.middle(self.last(y.flatten(0, -2)).reshape_as(y))
        return z


def zero_behind_another() -> nn.Module:
    """A channel that is constant reaches a layer through the second BatchNorm alone."""
    chain = settled(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten()))
    chain.get_parameter("0.weight").data[1] = 0
    return nn.Sequential(chain, nn.Linear(64, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "x"),
    [(settled(TwoAxes()), image(2, 6, 6)), (zero_behind_another(), image(2, 4, 4, 4))],
    ids=["two axes", "a gamma of zero"],
)
def test_what_folds_only_once_another_has_folded(model: nn.Module, x: Tensor) -> None:
    folded = bnfx.fold_bn(model, (x,), border_maps=True)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert verdicts(folded) == ["folded", "folded"]
