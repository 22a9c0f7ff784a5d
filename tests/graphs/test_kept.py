"""Modules that keep their class and get another forward."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import InsertReport
from tests.support.laws import assert_close, assert_same_state

X = torch.randn(4, 3, 6, 6)


class Net(nn.Module):
    """A stock layer, a layer with an optional argument, and a forward with one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"name": "net"}
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = F.relu(self.conv(x))
        y = F.relu(self.up(y, output_size=[y.shape[2] * 2 + 1, y.shape[3] * 2 + 1]))
        out = self.head(y.mean((2, 3)))
        return out if labels is None else (F.cross_entropy(out, labels), out)

    def name(self) -> str:
        return self.config["name"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.conv(F.relu(self.conv(x)))))


class Optional(Twice):
    def forward(self, x: Tensor, *, again: bool = True) -> Any:
        x = F.relu(self.conv(x))
        return self.head(F.relu(self.conv(x)) if again else x)


def sites(model: nn.Module) -> dict[str, str | None]:
    done = bnfx.report(model)
    assert isinstance(done, InsertReport)
    return {site.path: site.bn_path for site in done.sites}


@pytest.mark.parametrize("given", [True, False])
def test_classes_methods_and_arguments_stay(given: bool) -> None:  # noqa: FBT001  # pytest's
    model = Net().double().eval()
    before = copy.deepcopy(model.state_dict())
    done = bnfx.insert_bn(model, (X.double(),) if given else None, init="identity")
    assert_same_state(model.state_dict(), before)
    assert type(done) is Net
    assert done.name() == "net"
    assert isinstance(done.conv, nn.Conv2d)
    assert isinstance(done.up, nn.ConvTranspose2d)
    assert repr(done.conv).startswith("Conv2d(")
    assert inspect.signature(done.conv.forward) == inspect.signature(model.conv.forward)
    assert sites(done) == {"conv": "conv.bn", "up": "up.bn", "head": None}
    assert_close(model, done, [X.double()])
    loss, _ = done.train()(X.double(), labels=torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert done.get_parameter("conv.bn.weight").grad is not None


def test_copies_pickles_and_checkpoints() -> None:
    model = Net().double().eval()
    done = bnfx.insert_bn(model, X.double(), init="identity")
    for again in (copy.deepcopy(done), pickle.loads(pickle.dumps(done))):
        assert_same_state(again.state_dict(), done.state_dict())
        assert_close(done, again, [X.double()])
        assert isinstance(again.conv, nn.Conv2d)
        assert sites(bnfx.insert_bn(again, X.double())) == dict.fromkeys(sites(done))
    done.load_state_dict(Net().double().state_dict(), strict=True)
    bnfx.insert_bn(Net().double()).load_state_dict(done.state_dict(), strict=True)


def test_attributes_go_on_deciding() -> None:
    done = bnfx.insert_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    assert len(done) == 3  # type: ignore[arg-type]  # a Sequential
    layer = done.get_submodule("0")
    assert isinstance(layer, nn.Conv2d)
    layer.stride = (2, 2)
    assert done(X).shape == (4, 2, 2, 2)


def test_an_initialiser_finds_the_layers() -> None:
    found = []
    bnfx.insert_bn(Net()).apply(lambda m: found.append(m) if isinstance(m, nn.Conv2d) else None)
    assert len(found) == 1


def test_a_layer_called_twice_gets_two_in_new_code() -> None:
    model = Twice().double().eval()
    for given in (X.double(), None):
        done = bnfx.insert_bn(model, given, init="identity")
        assert isinstance(done, Twice)
        assert [n for n, _ in done.named_children()] == ["conv", "head", "conv_bn", "conv_bn_1"]
        for again in (done, copy.deepcopy(done), pickle.loads(pickle.dumps(done))):
            assert_close(model, again, [X.double()])
        done.load_state_dict(model.state_dict(), strict=True)
        assert torch.export.export(done, (X.double(),)).module()(X.double()).shape == (4, 2, 6, 6)


def test_code_with_optional_arguments_is_not_replaced() -> None:
    done = bnfx.insert_bn(Optional().eval(), X, init="identity")
    assert sites(done)["conv"] is None
    assert "optional arguments" in str(bnfx.report(done))
    assert sites(bnfx.insert_bn(Optional().eval(), X, form="graph"))["conv"] is not None


def test_the_graph_form_raises_where_there_is_none() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return F.relu(self.fc(x)) if float(x.sum()) else x

    assert sites(bnfx.insert_bn(Loop(), torch.randn(4, 3))) == {"fc": "fc.bn"}
    for insert in (bnfx.insert_bn, bnfx.plan_insert):
        with pytest.raises(bnfx.CaptureError, match="form='module'"):
            insert(Loop(), torch.randn(4, 3), form="graph")


def test_an_error_names_the_layer() -> None:
    done = bnfx.insert_bn(nn.Sequential(Net())).train()
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        done.get_submodule("0.conv")(torch.randn(1, 3, 3, 3))
    assert "'0.conv' ('0.conv.bn')" in caught.value.__notes__[0]


def test_folding_in_the_own_class_takes_them_out_again() -> None:
    model = bnfx.insert_bn(Net().double().eval(), X.double())
    model.get_submodule("conv.bn").running_mean.fill_(0.5)  # type: ignore[operator]  # a tensor
    folded = bnfx.fold_bn(model, X.double(), form="module")
    assert_close(model, folded, [X.double()])
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
