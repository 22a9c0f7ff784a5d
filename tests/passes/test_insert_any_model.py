"""insert_bn in models that cannot be traced: edits at the layer, by what a run has shown."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import InsertReport
from tests.support.laws import assert_same_state


def sites(model: nn.Module) -> dict[str, tuple[str, str | None]]:
    done = bnfx.report(model)
    assert isinstance(done, InsertReport)
    return {site.path: (site.action, site.bn_path) for site in done.sites}


def reasons(model: nn.Module) -> dict[str, str]:
    done = bnfx.report(model)
    assert isinstance(done, InsertReport)
    return {site.path: site.reason for site in done.sites}


class Flow(nn.Module):
    """Control flow that depends on the data, so that no symbolic trace exists."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        if bool(x.sum() > 0):
            x = F.relu(x + self.conv2(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@dataclass
class Result:
    """What some models return."""

    logits: Tensor
    hidden: Tensor | None = None


class Keywords(nn.Module):
    """`**kwargs`, a dict among the inputs, a dataclass as output, like transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, batch: dict[str, Tensor], **kwargs: Any) -> Result:
        x = batch["x"] * kwargs.get("scale", 1.0)
        if kwargs.get("hidden"):
            return Result(self.down(F.gelu(self.up(x))), x)
        return Result(self.norm(x + self.down(F.gelu(self.up(x)))))


def check(model: nn.Module, *args: Any, form: Any = "module", **kwargs: Any) -> nn.Module:
    """Identity insertion keeps the eval output and the source; train mode has gradients."""
    before = copy.deepcopy(model.state_dict())
    done = bnfx.insert_bn(model, args, example_kwargs=kwargs, init="identity", form=form)
    assert_same_state(model.state_dict(), before)
    assert type(done).__name__ == type(model).__name__
    model.eval()
    done.eval()
    with torch.no_grad():
        torch.testing.assert_close(tensors(done(*args, **kwargs)), tensors(model(*args, **kwargs)))
    done.train()
    torch.stack([t.sum() for t in tensors(done(*args, **kwargs))]).sum().backward()
    report = bnfx.report(done)
    assert isinstance(report, InsertReport)
    for site in report.sites:
        if site.bn_path is not None:
            norm = done.get_submodule(site.bn_path)
            assert type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            assert norm.get_parameter("weight").grad is not None
    return done


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Result):
        return [t for t in (value.logits, value.hidden) if t is not None]
    return [value] if isinstance(value, Tensor) else list(value)


def test_data_dependent_control_flow() -> None:
    done = check(Flow(), torch.randn(4, 3, 8, 8))
    assert sites(done) == {
        "conv1": ("inserted", "conv1.bn"),
        "conv2": ("inserted", "conv2.bn"),
        "head": ("skipped", None),
    }
    assert "output head" in reasons(done)["head"]
    assert isinstance(done, Flow)
    conv1 = done.get_submodule("conv1")
    assert conv1.kernel_size == (3, 3)  # what other code may ask a layer for
    assert conv1.bias is None


def test_keywords_dicts_and_dataclasses() -> None:
    batch = {"x": torch.randn(5, 3, 6)}
    done = check(Keywords(), batch, scale=2.0)
    assert sites(done)["up"] == ("inserted", "up.bn")
    assert "normalised already, behind an add" in reasons(done)["down"]


def test_without_an_example_what_leaves_the_traceable_part_stays() -> None:
    class Outer(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.part(x))

    done = bnfx.insert_bn(Outer())
    assert sites(done)["part.0"] == ("inserted", "part.0.bn")
    assert "example_inputs" in reasons(done)["part.2"]
    assert "example_inputs" in reasons(done)["conv1"]
    x = torch.randn(2, 3, 6, 6)
    assert done.train()(x).shape == (2, 2)
    assert sites(bnfx.insert_bn(Outer(), x))["part.2"] == ("skipped", None)


class Functional(nn.Module):
    """A layer that calls `F.conv2d` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class Standardised(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight, self.weight.shape[1:])
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "functional": Functional,
    "standardised": lambda: Standardised(3, 4, 3, padding=1),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)),
    "subclass": lambda: type("Own", (nn.Conv2d,), {})(3, 4, 3, padding=1),
}


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str, *, traceable: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = LAYERS[name](), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            if not traceable and bool(x.sum() > 1e9):
                return x
            out: Tensor = self.head(F.relu(x).mean((2, 3)))
            return out

    model = Plain()
    # spectral norm iterates in train mode, so that only eval mode repeats itself
    form = "graph" if traceable else "module"
    done = check(model.eval(), torch.randn(4, 3, 8, 8), form=form)
    expected = "layer_bn" if traceable else "layer.bn"
    assert sites(done)["layer"] == ("inserted", expected)
    keys = {key for key in done.state_dict() if not key.startswith(expected)}
    assert keys == set(model.state_dict()) - {"layer.bias"}
    checkpoint = model.state_dict()
    done.load_state_dict(checkpoint, strict=True)


def test_layers_in_every_container() -> None:
    class Containers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.dict = nn.ModuleDict({"a": nn.Linear(4, 4)})
            self.seq = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.list:
                x = F.relu(layer(x))
            if float(x.detach().sum()) < -1:
                return x
            out: Tensor = self.seq(F.relu(self.dict["a"](x)))
            return out

    done = check(Containers(), torch.randn(6, 4))
    inserted = [path for path, (action, _) in sites(done).items() if action == "inserted"]
    assert inserted == ["list.0", "list.1", "dict.a", "seq.0"]


class Twice(nn.Module):
    """A layer that is called twice, in a part that can be traced, or in code that cannot."""

    def __init__(self, *, traceable: bool) -> None:
        super().__init__()
        self.fc, self.traceable = nn.Linear(4, 4), traceable

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x))
        if not self.traceable and float(x.detach().sum()) < -1:
            return x
        return F.relu(self.fc(x))


class Around(nn.Module):
    """Makes the whole untraceable."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        if float(x.detach().sum()) < -1:
            return x
        out: Tensor = self.head(x)
        return out


def test_layer_called_twice_gets_two_where_its_part_can_be_traced() -> None:
    done = check(Around(Twice(traceable=True)), torch.randn(6, 4))
    report = bnfx.report(done)
    assert isinstance(report, InsertReport)
    assert [s.bn_path for s in report.sites] == ["part.fc_bn", "part.fc_bn_1", None]


def test_layer_called_twice_by_untraceable_code_stays() -> None:
    done = check(Around(Twice(traceable=False)), torch.randn(6, 4))
    assert sites(done)["part.fc"] == ("skipped", None)
    assert "called 2 times" in reasons(done)["part.fc"]


def test_layers_that_only_train_mode_calls() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.aux_head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.body(x))
            if self.training:
                return self.head(x), self.aux_head(F.relu(self.aux(x)))
            return self.head(x)

    done = check(Auxiliary(), torch.randn(6, 4))
    assert sites(done)["aux"] == ("inserted", "aux.bn")
    assert sites(done)["aux_head"] == ("skipped", None)


def test_fused_attention_blocks_do_not_bypass_the_norm() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(),
        torch.randn(3, 5, 8),
    )
    done = bnfx.insert_bn(model, x, init="identity").eval()
    inserted = {path for path, (action, _) in sites(done).items() if action == "inserted"}
    assert inserted == {"layers.0.linear1", "layers.1.linear1"}
    assert "multi_head_attention" in reasons(done)["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        torch.testing.assert_close(done(x), model(x), atol=1e-5, rtol=1e-5)
        norm = done.get_submodule("layers.0.linear1.bn")
        norm.get_parameter("bias").add_(1.0)
        assert not torch.allclose(done(x), model(x), atol=1e-2)


def test_code_that_keeps_another_reference_reaches_the_batch_norm() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.kept = [self.fc]

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.kept[0](x))
            return out * 2 if float(out.detach().sum()) > 0 else out

    done = check(Bypass(), torch.randn(4, 4))
    assert sites(done)["fc"] == ("inserted", "fc.bn")


def test_a_graph_that_disagrees_with_the_model_is_not_taken() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.fc(x))
            # a tracing proxy is no Tensor, so a symbolic trace takes the other way
            out: Tensor = self.head(x) if isinstance(x, Tensor) else x
            return out

    done = check(Asks(), torch.randn(6, 4))
    assert isinstance(done, Asks)
    assert sites(done)["fc"] == ("inserted", "fc.bn")


def test_statistics_of_constants_are_not_taken() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.out = (
                nn.Parameter(torch.randn(5, 2)),
                nn.Linear(2, 4),
                nn.Linear(4, 4),
            )
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(self.body(x)) + self.out(F.relu(self.fc(self.table))))
            return out

    done = bnfx.insert_bn(Positions(), torch.randn(3, 5, 4))
    assert sites(done)["body"][0] == "inserted"
    assert "no batch" in reasons(done)["fc"]


def test_twice_adds_nothing_at_the_layers_either() -> None:
    x = torch.randn(4, 3, 8, 8)
    once = bnfx.insert_bn(Flow(), x)
    twice = bnfx.insert_bn(once, x)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert {action for action, _ in sites(twice).values()} == {"skipped"}


@pytest.mark.parametrize("build", [Flow, lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU())])
def test_copies_pickles_and_files(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    x = torch.randn(4, 3, 8, 8) if isinstance(model, Flow) else torch.randn(4, 3)
    checkpoint = model.state_dict()
    seen: list[int] = []
    done = bnfx.insert_bn(model, x)
    done.train()
    done(x)
    done.eval()
    torch.save(done, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(done), pickle.loads(pickle.dumps(done)), loaded):
        assert_same_state(other.state_dict(), done.state_dict())
        assert [m.training for m in other.modules()] == [m.training for m in done.modules()]
        torch.testing.assert_close(other(x), done(x))
        assert bnfx.report(other).to_dict() == bnfx.report(done).to_dict()
        other.load_state_dict(checkpoint, strict=True)  # from before the insertion
        torch.testing.assert_close(other(x), model.eval()(x))
    done.register_forward_hook(lambda *_: seen.append(1))
    copy.deepcopy(done)(x)
    assert seen == [1]


def test_random_state_and_modes_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    model[2].eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    done = bnfx.insert_bn(model, torch.randn(5, 4, generator=torch.Generator()), form="graph")
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert done.get_submodule("2").training is False
    assert done.get_submodule("0_bn").training is True


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_old_weight_norm() -> None:
    class Normed(nn.Module):
        def __init__(self, *, traceable: bool) -> None:
            super().__init__()
            self.traceable = traceable
            self.fc, self.head = nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.fc(x))
            if not self.traceable and x.dim() == 5:
                return x
            out: Tensor = self.head(x)
            return out

    done = check(Normed(traceable=True), torch.randn(5, 4))
    assert sites(done)["fc"] == ("inserted", "fc_bn")
    done = check(Normed(traceable=False), torch.randn(5, 4))
    assert sites(done)["fc"] == ("skipped", None)
    assert "hook" in reasons(done)["fc"]


def test_models_that_fix_a_dtype_inside() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(self.fc(x.float())))
            return out

    check(Fixed(), torch.randn(5, 4))


def test_parts_inside_a_part_that_is_kept_whole() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seq = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Functional1d())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.seq(x) if x.dim() == 2 else self.seq(x.flatten(0, 1))
            return out

    class Functional1d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.weight))

    model = nn.Sequential(Kept(), nn.Linear(4, 2))
    done = bnfx.insert_bn(model)
    assert sites(done)["0.seq.0"] == ("inserted", "0.seq.0.bn")
    assert sites(done)["0.seq.2"] == ("inserted", "0.seq.2.bn")
    with_example = bnfx.insert_bn(model, torch.randn(5, 4))
    assert sites(with_example) == sites(done)
    done.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(5, 4)
    torch.testing.assert_close(done.eval()(x), model.eval()(x))


@pytest.mark.parametrize("form", ["graph", "module"])
def test_layers_outside_and_inside_of_parts_that_stay_whole(
    form: Literal["graph", "module"],
) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return x if x.sum() > 1e9 else self.b(self.a(x).relu()).relu()

    stem, head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    model = nn.Sequential(stem, nn.ReLU(), Asks(), Asks(), head)
    inserted = bnfx.insert_bn(model, torch.randn(2, 3, 6, 6), form=form)
    report = bnfx.report(inserted)
    assert isinstance(report, InsertReport)
    assert [site.action for site in report.sites] == ["inserted"] * 5 + ["skipped"]
