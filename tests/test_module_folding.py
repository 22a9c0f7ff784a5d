"""fold_bn(form="module"): a copy of the user's class, with what it can express folded."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import bnfx
from bnfx.reports.report import FoldReport
from tests.passes.test_fold_bn import LAYERS
from tests.support import zoo
from tests.support.laws import assert_close, assert_same_state, randomise


def fold(model: nn.Module, *args: Tensor, given: bool = True, **kwargs: Any) -> nn.Module:
    """Fold a float64 copy in its own class: the laws of folding hold for it."""
    wide, inputs = copy.deepcopy(randomise(model)).double(), [x.double() for x in args]
    before = copy.deepcopy(wide.state_dict())
    folded = bnfx.fold_bn(wide, tuple(inputs) if given else None, form="module", **kwargs)
    assert_same_state(wide.state_dict(), before)
    assert type(folded) is type(wide)
    assert_close(wide, folded, inputs)
    assert_close(wide, copy.deepcopy(folded), inputs)
    assert_close(wide, pickle.loads(pickle.dumps(folded)), inputs)
    norms = sum(isinstance(m, _BatchNorm) for m in folded.modules())
    records = told(folded).batch_norms
    assert norms == len({r.path for r in records if r.verdict == "kept"})
    assert all(r.reason for r in records if r.verdict == "kept")
    shared = {t.data_ptr() for t in wide.parameters()} & {t.data_ptr() for t in folded.parameters()}
    assert not shared, "training it would change the model"
    again = bnfx.fold_bn(folded, tuple(inputs) if given else None, form="module")
    assert_close(folded, again, inputs)
    return folded


def told(folded: nn.Module) -> FoldReport:
    done = bnfx.report(folded)
    assert isinstance(done, FoldReport)
    return done


def left(folded: nn.Module) -> list[str]:
    return [r.path for r in told(folded).batch_norms if r.verdict != "folded"]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str, given: bool) -> None:  # noqa: FBT001  # pytest's parameter
    made, shape = LAYERS[name]
    model = nn.Sequential(*made())
    folded = fold(model, torch.randn(*shape), given=given)
    assert isinstance(folded, nn.Sequential)
    assert not left(folded) or not given
    assert [type(layer) for layer in folded][:1] == [type(model[0])]


class Net(nn.Module):
    """Optional arguments, a method, attributes."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, *, bias: bool = False):
        super().__init__()
        self.config = {"name": "net"}
        self.conv = nn.Conv2d(3, 4, 3, bias=bias)
        self.norm = norm(4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def features(self, x: Tensor) -> Any:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.head(self.features(x).mean((2, 3)))
        return y if labels is None else (F.cross_entropy(y, labels), y)


def test_methods_attributes_and_optional_arguments_stay() -> None:
    model, x = Net(), torch.randn(2, 3, 6, 6)
    folded = fold(model, x)
    assert isinstance(folded, Net)
    assert not left(folded)
    assert folded.config == {"name": "net"}
    assert type(folded.norm) is nn.Identity
    assert type(folded.conv) is nn.Conv2d
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(folded.features(x.double()), wide.features(x.double()))
    labels = torch.tensor([0, 1])
    loss, _ = folded(x.double(), labels=labels)
    torch.testing.assert_close(loss, wide(x.double(), labels=labels)[0])
    loss.backward()
    assert folded.conv.bias is not None
    assert folded.conv.bias.grad is not None


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(torch.sigmoid(self.norm(x)))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages = nn.Conv2d(3, 4, 1), nn.ModuleList([Stage(), Stage()])
        self.last, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, hidden: bool = False) -> Any:  # noqa: FBT001, FBT002
        seen = [self.stem(x)]
        for stage in self.stages:
            seen.append(stage(seen[-1]))
        y = self.head(self.last(seen[-1]))
        return (y, seen[1:]) if hidden else y


def test_values_that_an_optional_argument_may_return_stay() -> None:
    model, x = Stages(), torch.randn(2, 3, 5, 5)
    folded = fold(model, x)
    wide = copy.deepcopy(model).double()
    for ours, theirs in zip(
        folded(x.double(), hidden=True)[1], wide(x.double(), hidden=True)[1], strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert "last" not in left(folded)


def test_a_checkpoint_loads_into_a_fresh_instance_with_biases() -> None:
    x = torch.randn(2, 3, 6, 6)
    folded = bnfx.fold_bn(randomise(Net()), (x,), form="module")
    fresh = Net(nn.Identity, bias=True).eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), folded(x))


@pytest.mark.parametrize("head", [True, False])
def test_the_keys_do_not_depend_on_the_statistics(head: bool) -> None:  # noqa: FBT001
    """A summand of zero has a bias too: the class with biases takes what is saved."""

    def made(norm: Callable[[int], nn.Module], *, bias: bool) -> nn.Module:
        first, second = nn.Conv2d(3, 4, 3, bias=bias), nn.Conv2d(4, 4, 3, groups=2, bias=bias)
        chain = [first, norm(4), nn.ReLU(), second, norm(4), nn.Flatten()]
        rest = [nn.Linear(16, 6, bias=bias), nn.BatchNorm1d(6) if bias is False else nn.Identity()]
        return nn.Sequential(*chain, *rest, nn.ReLU(), nn.Linear(6, 2, bias=head)).eval()

    x = torch.randn(2, 3, 6, 6)
    for model in (fresh := made(nn.BatchNorm2d, bias=False), randomise(copy.deepcopy(fresh))):
        folded = bnfx.fold_bn(model, (x,), form="module")
        assert not left(folded)
        other = made(nn.Identity, bias=True)
        other.load_state_dict(folded.state_dict(), strict=True)
        torch.testing.assert_close(other(x), model(x))
        missing = {k for k in folded.state_dict() if k not in model.state_dict()}
        assert missing == {"0.bias", "3.bias", "6.bias"} <= set(told(folded).keys)


def test_the_report_and_the_loading_error_name_the_keys() -> None:
    model = randomise(Net())
    folded = bnfx.fold_bn(model, (torch.randn(2, 3, 6, 6),), form="module")
    keys = told(folded).keys
    assert set(keys) == {k for k in model.state_dict() if "norm" in k} | {"conv.bias"}
    with pytest.raises(RuntimeError, match=r"'conv\.bias': conv has a bias now.*fold it then"):
        folded.load_state_dict(model.state_dict())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.conv(torch.sigmoid(self.a(self.conv(x)))))


def test_calls_of_one_layer_share_its_weights() -> None:
    assert len(left(fold(Twice(), torch.randn(2, 4, 5, 5)))) == 1
    model = Twice()
    model.b = model.a
    assert not left(fold(model, torch.randn(2, 4, 5, 5)))


class PreActivation(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return self.left(self.act(self.norm(x))) + self.right(x)


def test_what_works_in_place_does_not_reach_others_through_an_identity() -> None:
    model = PreActivation(nn.ReLU(inplace=True))
    model.norm.weight.data.abs_()
    x = torch.randn(2, 4, 5, 5)
    folded = bnfx.fold_bn(positive(model), (x,), form="module")
    assert not left(folded)
    assert not folded.get_submodule("act").extra_repr()
    torch.testing.assert_close(folded(x), model(x))
    by_function = positive(PreActivation(torch.relu_))
    folded = bnfx.fold_bn(by_function, (x,), form="module")
    assert "in place" in told(folded).batch_norms[0].reason
    torch.testing.assert_close(folded(x), by_function(x))


def positive(model: nn.Module) -> nn.Module:
    randomise(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.data.abs_()
    return model


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.same = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)) + self.same(x)


def test_branches_that_only_a_graph_can_merge_are_told() -> None:
    folded = fold(Branches(), torch.randn(2, 3, 5, 5))
    [kept] = [r for r in told(folded).batch_norms if r.verdict == "kept"]
    assert kept.path == "same"
    assert "form='graph' it becomes one convolution" in kept.reason


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, features: bool = False) -> Any:  # noqa: FBT001, FBT002
        y = self.conv(x)
        return y if features else self.rest(self.norm(y).relu())


def test_a_switch_that_returns_what_would_change_keeps_it() -> None:
    model, x = Switched(), torch.randn(2, 3, 5, 5)
    folded = fold(model, x)
    assert left(folded) == ["norm"]
    assert "features=True" in told(folded).batch_norms[-1].reason
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(folded(x.double(), features=True), wide(x.double(), features=True))


class NormAct(nn.BatchNorm2d):
    """As in timm: a BatchNorm with its activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.ndim == 4, "an image")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)
        return self.act(y)


def test_a_norm_with_an_activation_inside_leaves_the_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 2, 1))
    folded = fold(model, torch.randn(2, 3, 6, 6))
    assert not left(folded)
    assert [key for key in folded.state_dict() if key.startswith("1.")] == ["1.act.weight"]


def test_hooks_see_what_they_saw() -> None:
    inner = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), inner, nn.ReLU(), nn.Conv2d(4, 4, 1), NormAct(4))
    seen: list[Tensor] = []
    inner.register_forward_hook(lambda _module, _args, out: seen.append(out.detach()))
    x = torch.randn(2, 3, 6, 6)
    folded = bnfx.fold_bn(randomise(model), (x,), form="module")
    assert not left(folded)
    seen.clear()
    torch.testing.assert_close(folded(x), model(x))
    torch.testing.assert_close(seen[0], seen[1])


class Detector(nn.Module):
    """Its end depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norm, self.head = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.norm(self.conv(self.body(x))).mean((2, 3))
        return [self.head(row) for row in y if row.sum() > 0]


def test_what_no_graph_holds_is_folded_in_parts() -> None:
    model, x = randomise(Detector()), torch.randn(4, 3, 6, 6)
    with pytest.raises(bnfx.CaptureError, match="form='module'"):
        bnfx.fold_bn(model, (x,))
    with pytest.raises(bnfx.CaptureError, match="Pass example_inputs"):
        bnfx.fold_bn(model, form="module")
    folded = bnfx.fold_bn(model, (x,), form="module")
    torch.testing.assert_close(folded(x), model(x))
    reasons = {r.path: r.reason for r in told(folded).batch_norms}
    assert reasons["body.1"] == ""
    assert "Detector" in reasons["norm"]
    assert "did not call it" in reasons["unused"]


def test_a_part_that_others_use_keeps_what_they_use() -> None:
    class Tied(Detector):
        def forward(self, x: Tensor) -> list[Tensor]:
            layer, norm = self.body.get_submodule("0"), self.body.get_submodule("1")
            y = self.body(x).mean((2, 3)) + norm(layer(x)).mean((2, 3))
            return [self.head(row) for row in y if row.sum() > -99]

    model, x = randomise(Tied()), torch.randn(4, 3, 6, 6)
    folded = bnfx.fold_bn(model, (x,), form="module")
    torch.testing.assert_close(folded(x), model(x))
    [record] = [r for r in told(folded).batch_norms if r.path == "body.1"]
    assert "outside" in record.reason


def test_without_an_example_the_rank_is_checked_where_it_decides() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()))
    folded = bnfx.fold_bn(model, form="module")
    assert isinstance(folded.get_submodule("1"), nn.Identity)
    x = torch.randn(5, 4)
    torch.testing.assert_close(folded(x), model(x))
    with pytest.raises(AssertionError, match="rank 2 only"):
        folded(torch.randn(5, 8, 4))
    images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert type(bnfx.fold_bn(randomise(images), form="module").get_submodule("1")) is nn.Identity


def test_modes_and_options() -> None:
    model, x = Net(), torch.randn(2, 3, 6, 6)
    folded = bnfx.fold_bn(model.train(), (x,), form="module")
    assert folded.training
    assert "train mode" in told(folded).batch_norms[0].reason
    with pytest.raises(bnfx.FoldError, match="form='graph'"):
        bnfx.fold_bn(model, (x,), form="module", thresholds=True)
    with pytest.raises(bnfx.FoldError, match="choose from"):
        bnfx.fold_bn(model, (x,), form="modul")  # type: ignore[call-overload]  # the fault
    assert bnfx.plan_fold(model.eval(), (x,), form="module").folded == 1


class Read(Net):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]  # no labels here
        return self.features(x) * self.conv.weight.norm()


def test_the_same_name_holds_one_parameter() -> None:
    """A weight that another operator reads too is nobody's to change."""
    model, x = Read(), torch.randn(2, 3, 6, 6)
    assert left(fold(model, x)) == ["norm"]


def test_a_wrong_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnfx.module_folding._write", lambda *_: None)
    with pytest.raises(bnfx.FoldError, match="differs from the model by"):
        bnfx.fold_bn(randomise(Net()), (torch.randn(2, 3, 6, 6),), form="module")


def test_deploy_takes_the_own_class(tmp_path: Path) -> None:
    model, x = randomise(Net()), torch.randn(2, 3, 6, 6)
    done = bnfx.deploy(model, x, tmp_path / "net.onnx", form="module", num_inputs=2)
    assert done.status == "deployed"
    assert done.fold.left == 0
    assert done.fold.keys


class Late(nn.Module):
    """Its BatchNorm comes first: the shift goes to what is before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(self.norm(x).relu())


class Methods(nn.Module):
    """As in timm: forward_features ends in a BatchNorm that the head could carry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.stages = nn.Sequential(Late(), Late())
        self.last, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward_features(self, x: Tensor) -> Any:
        return self.last(self.stages(self.norm(self.stem(x))).relu())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:  # noqa: FBT001, FBT002
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def encode(self, x: Tensor, twice: bool) -> Any:  # noqa: FBT001
        return self.forward_head(self.forward_features(x)) * (1 + twice)

    def forward(self, x: Tensor) -> Any:
        return self.encode(x, twice=True)


class Unrolled(Methods):
    """A loop that asks for a size: torch.export captures it."""

    def forward_features(self, x: Tensor) -> Any:
        for _ in range(int(x.shape[1]) - 2):
            x = x.contiguous()
        return super().forward_features(x)


@pytest.mark.parametrize("kind", [Methods, Unrolled])
def test_methods_that_the_forward_calls_give_what_they_gave(kind: type[Methods]) -> None:
    model, x = kind(), torch.randn(2, 3, 5, 5)
    folded = fold(model, x)
    assert isinstance(folded, Methods)
    assert left(folded) == ["last"]
    wide, x = copy.deepcopy(model).double(), x.double()
    features = wide.forward_features(x)
    torch.testing.assert_close(folded.forward_features(x), features)
    torch.testing.assert_close(folded.forward_head(features), wide.forward_head(features))
    assert "own may see" in told(folded).batch_norms[-1].reason
    assert "forward_features" not in vars(model), "nothing is left of what noted the calls"


def test_modules_give_by_themselves_what_they_gave_or_the_report_names_them() -> None:
    model, x = Methods(), torch.randn(2, 3, 5, 5)
    folded, wide = fold(model, x), copy.deepcopy(model).double()
    moved = told(folded).moved
    assert moved == ("stages", "stages.0", "stages.1")
    y = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert not torch.allclose(folded.get_submodule("stages")(y), wide.stages(y))
    acts = (nn.ReLU(), nn.ReLU(), nn.Sigmoid())
    blocks = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act) for act in acts)
    )
    apart, whole = fold(blocks, y), copy.deepcopy(blocks).double()
    assert not told(apart).moved
    for ours, theirs in zip(apart.children(), whole.children(), strict=True):
        torch.testing.assert_close(ours(y), theirs(y))


class Doubled(nn.Module):
    """A parametrization of a user, which can be inverted."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", [parametrizations.weight_norm, weight_norm, pruned, doubled])
def test_weights_that_are_computed_take_up_what_can_be_put_into_them(
    how: Callable[[nn.Module], nn.Module],
    bias: bool,  # noqa: FBT001
) -> None:
    with torch.no_grad():  # a layer with hooks can be copied then
        layer, linear = how(nn.Conv2d(3, 4, 3, bias=bias)), how(nn.Linear(4, 2, bias=bias))
    first = (layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 4), nn.BatchNorm2d(4))
    model = nn.Sequential(*first, nn.Flatten(), linear, nn.BatchNorm1d(2))
    randomise(model).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    keys = model.state_dict().keys()
    folded = bnfx.fold_bn(model, (x,), form="module")
    assert not left(folded)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    norms = {key for key in keys if key.startswith(("1.", "4.", "7."))}
    assert keys - norms <= folded.state_dict().keys()
    assert {type(m) for m in folded.children()} >= {type(layer), type(linear)}


@pytest.mark.parametrize(
    ("how", "remove"),
    [
        (parametrizations.spectral_norm, r"remove_parametrizations\(layer, 'weight'\)"),
        (spectral_norm, r"remove_spectral_norm\(layer, 'weight'\)"),
    ],
)
def test_weights_that_cannot_become_what_is_needed_stay(
    how: Callable[[nn.Module], nn.Module], remove: str
) -> None:
    with torch.no_grad():
        layer = how(nn.Conv2d(3, 4, 3))
    rest = (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = positive(nn.Sequential(layer, *rest)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = bnfx.fold_bn(model, (x,), form="module")
    assert left(folded) == ["1"]
    assert re.search(remove, told(folded).batch_norms[0].reason)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


class Same(nn.Conv2d):
    """As in TensorFlow: its forward pads, as much as the size asks for."""

    def forward(self, x: Tensor) -> Any:
        over = -x.shape[-1] % self.stride[1]
        y = F.pad(x, (0, over, 0, 0)) if over > 0 else x
        return F.conv2d(y, self.weight, self.bias, self.stride, self.padding)


class Deaf(nn.Conv2d):
    """It takes no bias, though its class has one."""

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(x, self.weight)


class Halved(nn.Conv2d):
    """It does something else with a bias than to add it."""

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias[:, None, None] / 2


@pytest.mark.parametrize("kind", [Same, Deaf, Halved])
@pytest.mark.parametrize("given", [True, False])
def test_a_subclass_gets_a_bias_where_its_forward_adds_it(
    kind: type[nn.Conv2d],
    given: bool,  # noqa: FBT001
) -> None:
    model = nn.Sequential(kind(3, 4, 1, stride=1, bias=False), nn.BatchNorm2d(4), nn.Sigmoid())
    if given or kind is not Same:
        folded = fold(model, torch.randn(2, 3, 6, 6), given=given)
        assert left(folded) == ([] if kind is Same else ["1"])


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["test_byobnet", "resnet18", "resnetv2_18", "mobilenetv3_small_050", "visformer_tiny"]
)
def test_methods_of_networks_of_timm_give_what_they_gave(name: str) -> None:
    model = zoo.timm().create_model(name, pretrained=False).eval()
    assert isinstance(model, nn.Module)
    wide: Any = randomise(model).double()
    side = 224 if name == "visformer_tiny" else 64
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    folded: Any = bnfx.fold_bn(wide, (x,), form="module")
    features = wide.forward_features(x)
    pairs = [
        (folded.forward_features(x), features),
        (folded.forward_head(features), wide.forward_head(features)),
    ]
    if not told(folded).moved:
        each = (net.forward_intermediates(x)[1] for net in (folded, wide))
        pairs += zip(*each, strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
