"""insert_bn: where, how, and that train() and eval() keep their meaning."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import InsertReport
from tests.support import zoo
from tests.support.laws import assert_same_state, randomise


def report(model: nn.Module) -> InsertReport:
    done = bnfx.report(model)
    assert isinstance(done, InsertReport)
    return done


def actions(model: nn.Module) -> dict[str, str]:
    return {site.path: site.action for site in report(model).sites}


def test_the_papers_rule() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    before = copy.deepcopy(model.state_dict())
    done = bnfx.insert_bn(model, form="graph")
    assert actions(done) == {"0": "inserted", "3": "skipped"}
    assert_same_state(model.state_dict(), before)
    assert type(done.get_submodule("0_bn")) is nn.BatchNorm2d
    assert torch.equal(done.get_parameter("0_bn.bias"), model.get_parameter("0.bias"))
    assert set(done.state_dict()) >= set(model.state_dict()) - {"0.bias"}
    assert "0.bias" not in done.state_dict()


def test_twice_adds_nothing() -> None:
    once = bnfx.insert_bn(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    twice = bnfx.insert_bn(once)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert set(actions(twice).values()) == {"skipped"}


class Everything(nn.Module):
    """Dropout by flag, attention-like products, a tied decoder, a residual, a squashed output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.up, self.down, self.decode = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.unused = nn.Linear(6, 1), nn.Linear(6, 6)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.embed(x)), 0.5, self.training)
        x = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ x
        x = F.gelu(x + self.down(F.gelu(self.up(x))))
        return torch.sigmoid(self.head(self.decode(x)))


def test_every_affine_layer_is_accounted_for() -> None:
    done = bnfx.insert_bn(Everything())
    chosen = {path for path, action in actions(done).items() if action == "inserted"}
    assert chosen == {"up", "down"}
    reasons = {site.path: site.reason for site in report(done).sites}
    assert "tied" in reasons["embed"]
    assert "matmul" in reasons["q"]
    assert "head" in reasons["head"]
    assert "never" in reasons["unused"]


def test_train_and_eval_act_as_on_the_source() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(8, 64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.dropout(F.relu(self.fc(x)), 0.5, self.training))
            return out

    done = bnfx.insert_bn(Dropped(), exclude="*", form="graph")
    x = torch.randn(16, 8)
    for model in (done, copy.deepcopy(done), pickle.loads(pickle.dumps(done))):
        model.eval()
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_statistics_of_a_linear_layer_are_per_feature() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    done = bnfx.insert_bn(model, form="graph").train()
    x = torch.randn(5, 6, 6)  # here the length equals the number of features
    done(x)
    mean = nn.functional.linear(x, model.get_parameter("0.weight")).flatten(0, -2).mean(0)
    torch.testing.assert_close(done.get_buffer("0_bn.running_mean"), 0.1 * mean)
    done.eval()
    folded = bnfx.fold_bn(done)
    assert [r["verdict"] for r in bnfx.report(folded).to_dict()["batch_norms"]] == ["folded"]
    torch.testing.assert_close(folded(x), done(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_keeps_the_output(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).to(dtype).eval()
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    done = bnfx.insert_bn(model, x, init="identity")
    moved = (done(x) - model(x)).detach().double().norm() / model(x).detach().double().norm()
    # A few roundings, pooled: elementwise, values near zero lose more. Gamma 1 would move the
    # float32 output by 42 eps.
    assert float(moved) <= 4 * torch.finfo(dtype).eps


def test_layer_called_twice_gets_two() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(self.fc(F.relu(self.fc(x)))))
            return out

    model, x = Twice().eval(), torch.randn(3, 4)
    done = bnfx.insert_bn(model, x, init="identity")
    assert [site.bn_path for site in report(done).sites] == ["fc_bn", "fc_bn_1", None]
    torch.testing.assert_close(done(x), model(x))


def test_bias_that_another_call_needs_stays() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(F.relu(self.fc(x)))
            return out

    model, x = Mixed().eval(), torch.randn(3, 4)
    done = bnfx.insert_bn(model, x, init="identity")
    assert "fc.bias" in done.state_dict()
    torch.testing.assert_close(done(x), model(x))


def test_bad_input() -> None:
    with pytest.raises(bnfx.InsertError, match="no affine layer"):
        bnfx.insert_bn(nn.Sequential(nn.ReLU()))
    with pytest.raises(bnfx.InsertError, match="calibration_data"):
        bnfx.insert_bn(nn.Linear(2, 2), init="calibrate")
    with pytest.raises(bnfx.BnfxError, match="not returned by bnfx"):
        bnfx.report(nn.Linear(2, 2))


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["vgg11", "vgg16"])
def test_vgg_equals_torchvisions_own(name: str) -> None:
    models: Any = zoo.torchvision_models()
    with torch.device("meta"):
        plain, theirs = getattr(models, name)(), getattr(models, f"{name}_bn")()
    done = bnfx.insert_bn(plain, exclude="classifier.*")
    ours = [m.num_features for m in done.modules() if isinstance(m, nn.BatchNorm2d)]
    assert ours == [m.num_features for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(s.action == "inserted" for s in report(done).sites) == len(ours)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_computes_what_torchvisions_own_does(name: str) -> None:
    models: Any = zoo.torchvision_models()
    plain = getattr(models, name)(num_classes=10).features.double()
    theirs = randomise(getattr(models, f"{name}_bn")(num_classes=10).features.double())
    done = bnfx.insert_bn(plain).eval()
    state = theirs.state_dict()
    # theirs: conv, bn, relu counted in one Sequential, with biases; ours: conv, relu and <conv>_bn
    convs = [path for path, m in theirs.named_modules() if isinstance(m, nn.Conv2d)]
    mapped: dict[str, Tensor] = {}
    for site, conv in zip([s for s in report(done).sites if s.bn_path], convs, strict=True):
        norm = str(int(conv) + 1)
        mapped[f"{site.path}.weight"] = state[f"{conv}.weight"]
        mapped |= {f"{site.bn_path}.{part}": state[f"{norm}.{part}"] for part in NORM_STATE}
        mapped[f"{site.bn_path}.running_mean"] = (
            state[f"{norm}.running_mean"] - state[f"{conv}.bias"]
        )
    done.load_state_dict(mapped, strict=True)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(done(x), theirs(x), rtol=1e-12, atol=1e-12)


NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_the_meta_device_has_no_values(init: Any) -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    done = bnfx.insert_bn(model, x, init=init, form="graph")
    assert done.get_parameter("0_bn.weight").is_meta
    assert done(x).shape == (2, 4, 6, 6)
