"""fold_bn: what is folded, what stays, and that nothing is ever silently wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from tests.support import zoo
from tests.support.laws import check_fold, count_batch_norms, randomise

LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "conv2d same": (
        lambda: [nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)],
        (2, 4, 9, 9),
    ),
    "conv2d reflect": (
        lambda: [nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)],
        (2, 4, 9, 9),
    ),
    "depthwise": (lambda: [nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4, eps=1e-2)], (2, 2, 5, 5, 5)),
    "transposed 1d": (
        lambda: [nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)],
        (2, 4, 9),
    ),
    "transposed 2d": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6)],
        (2, 4, 5, 5),
    ),
    "transposed square": (
        lambda: [nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)],
        (2, 4, 5, 5),
    ),
    "transposed depthwise": (
        lambda: [nn.ConvTranspose2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)],
        (2, 4, 5, 5),
    ),
    "transposed 3d": (
        lambda: [nn.ConvTranspose3d(2, 4, 3), nn.BatchNorm3d(4, affine=False)],
        (2, 2, 3, 3, 3),
    ),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (5, 4)),
    "linear without bias": (
        lambda: [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False)],
        (5, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_batch_norm_become_one(name: str) -> None:
    build, shape = LAYERS[name]
    model = randomise(nn.Sequential(*build(), nn.ReLU()))
    assert check_fold(model, torch.randn(shape)) == ["folded"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    folded = bnfx.fold_bn(model).state_dict()
    exact = bnfx.fold_bn(copy.deepcopy(model).double()).state_dict()
    for name, tensor in folded.items():
        assert torch.equal(tensor, exact[name].to(dtype))


class Net(nn.Module):
    """Layers and a forward that reads like a case."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.case = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.case(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def bn(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **options)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.add_(1)
    out: Tensor = m.bn(y)
    return out


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.view(-1).mul_(2)
    out: Tensor = m.bn(y)
    return out


def weight_changed(m: Any, x: Tensor) -> Tensor:
    m.conv.weight.detach().view(-1).mul_(2)
    out: Tensor = m.bn(m.conv(x))
    return out


KEPT: dict[str, Callable[[], nn.Module]] = {
    "second user": lambda: Net(lambda m, x: m.bn(y := m.conv(x)) + y, conv=conv(), bn=bn()),
    "returned too": lambda: Net(lambda m, x: (m.bn(y := m.conv(x)), y), conv=conv(), bn=bn()),
    "activation between": lambda: Net(lambda m, x: m.bn(F.relu(m.conv(x))), conv=conv(), bn=bn()),
    "in place": lambda: Net(in_place, conv=conv(), bn=bn()),
    "view in place": lambda: Net(through_a_view, conv=conv(), bn=bn()),
    "no statistics": lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(track_running_stats=False)
    ),
    "no layer": lambda: Net(lambda m, x: m.bn(x), bn=bn()),
    "before the layer": lambda: Net(lambda m, x: m.conv(m.bn(x)), conv=conv(), bn=bn()),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_proved_stays(name: str) -> None:
    assert check_fold(randomise(KEPT[name]()), torch.randn(2, 4, 6, 6)) == ["kept"]


def shared_twice(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(F.relu(m.bn(m.conv(x))))))


FOLDED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "weight norm": (
        lambda: Net(
            lambda m, x: m.bn(m.conv(x)),
            conv=nn.utils.parametrizations.weight_norm(conv()),
            bn=bn(),
        ),
        ["folded"],
    ),
    "conv and bn called twice": (
        lambda: Net(shared_twice, conv=conv(), bn=bn()),
        ["folded", "folded"],
    ),
    "two norms of one conv": (
        lambda: Net(lambda m, x: m.b(m.conv(m.a(m.conv(x)))), conv=conv(), a=bn(), b=bn()),
        ["folded", "folded"],
    ),
    "one bare use": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) + m.conv(x * 2), conv=conv(), bn=bn()),
        ["folded"],
    ),
    "weight read elsewhere": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.norm(), conv=conv(), bn=bn()),
        ["folded"],
    ),
    "statistics read elsewhere": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(), conv=conv(), bn=bn()),
        ["folded"],
    ),
    "synchronised": (
        lambda: Net(
            lambda m, x: m.bn(m.conv(x)),
            conv=conv(),
            bn=nn.SyncBatchNorm.convert_sync_batchnorm(bn()),
        ),
        ["folded"],
    ),
    "by keyword": (
        lambda: Net(
            lambda m, x: F.batch_norm(
                bias=m.bn.bias,
                input=F.conv2d(weight=m.conv.weight, input=x, padding=1),
                running_var=m.bn.running_var,
                running_mean=m.bn.running_mean,
            ),
            conv=conv(),
            bn=bn(),
        ),
        ["folded"],
    ),
    "only gamma": (
        lambda: Net(
            lambda m, x: F.batch_norm(
                m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, eps=0.3
            ),
            conv=conv(),
            bn=bn(),
        ),
        ["folded"],
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_can_be_proved_is_folded(name: str) -> None:
    build, verdicts = FOLDED[name]
    assert check_fold(randomise(build()), torch.randn(2, 4, 6, 6)) == verdicts


def test_one_parameter_in_two_layers() -> None:
    model = Net(lambda m, x: m.b(m.c2(m.a(m.c1(x)))), c1=conv(), c2=conv(), a=bn(), b=bn())
    model.get_submodule("c2").register_parameter("weight", model.get_parameter("c1.weight"))
    assert check_fold(randomise(model), torch.randn(2, 4, 6, 6)) == ["folded", "folded"]


def test_weight_that_the_forward_changes_is_left_alone() -> None:
    model = randomise(Net(weight_changed, conv=conv(), bn=bn()))
    assert bnfx.plan_fold(model).batch_norms[0].verdict == "kept"


def test_train_mode_stays() -> None:
    model = randomise(nn.Sequential(conv(), bn(), conv(), bn()))
    model.get_submodule("1").train()
    first, second = bnfx.plan_fold(model).batch_norms
    assert (first.verdict, second.verdict) == ("kept", "folded")
    assert "train mode" in first.reason


def test_hooks_stay() -> None:
    seen: list[Any] = []
    model = randomise(nn.Sequential(conv(), bn()))
    model.get_submodule("0").register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    folded = bnfx.fold_bn(model)
    assert not seen
    folded(torch.randn(1, 4, 5, 5))
    assert seen == [(1, 4, 5, 5)]
    assert "hooks" not in bnfx.report(folded).to_dict()["batch_norms"][0]["verdict"]
    assert count_batch_norms(folded) == 1


def test_linear_on_three_axes_normalises_the_middle_one() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))).double()
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    folded = bnfx.fold_bn(model, x)
    assert torch.equal(folded(x), model(x))
    assert "axis 1" in bnfx.report(folded).to_dict()["batch_norms"][0]["reason"]
    with pytest.raises(AssertionError, match="example_inputs"):
        bnfx.fold_bn(model)(x)  # not proved, so the result says no instead of being wrong


def test_unbatched_conv1d_is_not_taken_for_a_batch() -> None:
    model = randomise(nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.BatchNorm1d(5))).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(bnfx.fold_bn(model, x)(x), model(x))
    with pytest.raises(AssertionError, match="example_inputs"):
        bnfx.fold_bn(model)(x)


def test_running_mean_of_nan_stays() -> None:
    model = randomise(nn.Sequential(conv(), bn()))
    model.get_buffer("1.running_var")[2] = -1.0
    record = bnfx.plan_fold(model).batch_norms[0]
    assert record.verdict == "kept"
    assert "[2]" in record.reason


def test_optional_argument_is_not_taken_for_given() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            y = self.bn(self.conv(x))
            return y * mask if mask is not None else y

    model, x = randomise(Masked()), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(bnfx.fold_bn(model)(x), model(x))
    mask = torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(bnfx.fold_bn(model, (x, mask))(x, mask), model(x, mask))


def test_control_flow_takes_example_inputs() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 3:
                x = x * 2
            out: Tensor = self.bn(self.conv(x))
            return out

    model, x = randomise(Flow()), torch.randn(2, 4, 5, 5)
    with pytest.raises(bnfx.CaptureError, match="example_inputs"):
        bnfx.fold_bn(model)
    folded = bnfx.fold_bn(model, x)
    assert [r["verdict"] for r in bnfx.report(folded).to_dict()["batch_norms"]] == ["folded"]
    torch.testing.assert_close(folded(x), model(x))


def test_result_is_an_ordinary_module() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), bn(), nn.ReLU()))
    folded, x = bnfx.fold_bn(model), torch.randn(2, 4, 6, 6)
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(copied(x), folded(x))
        assert bnfx.report(copied).to_dict() == bnfx.report(folded).to_dict()
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), folded(x))
    original = nn.Conv2d(4, 4, 3)
    original.load_state_dict({k[2:]: v for k, v in folded.state_dict().items()})


@pytest.mark.zoo
def test_batch_norm_that_holds_an_activation() -> None:
    norm_act = zoo.timm().layers.BatchNormAct2d
    model = randomise(nn.Sequential(conv(), norm_act(4)))
    assert check_fold(model, torch.randn(2, 4, 6, 6)) == ["folded"]


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"]
)
def test_torchvision(name: str) -> None:
    model = randomise(getattr(zoo.torchvision_models(), name)(weights=None))
    verdicts = check_fold(model, torch.randn(1, 3, 64, 64))
    assert verdicts.count("folded") > len(verdicts) // 3


def test_casting_the_result_leaves_the_source_alone() -> None:
    model = randomise(nn.Sequential(conv(), bn(), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    folded = bnfx.fold_bn(model)
    shared = folded.get_parameter("3.weight")
    assert shared.data_ptr() == model.get_parameter("3.weight").data_ptr()  # no copy
    folded.half()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
