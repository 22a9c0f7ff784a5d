"""What surrounds inserted BatchNorm in training: optimizers, checkpoints, wrappers, placement."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import InsertReport
from tests.support.laws import assert_same_state


class Net(nn.Module):
    """A convolution, a residual, a linear layer; traceable or not."""

    def __init__(self, *, traceable: bool = True) -> None:
        super().__init__()
        self.traceable = traceable
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(x + self.conv2(x))
        if not self.traceable and x.dim() == 3:
            return x
        out: Tensor = self.head(torch.tanh(self.fc(x.mean((2, 3)))))
        return out


BOTH = [True, False]
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("traceable", BOTH)
def test_an_optimizer_goes_on_with_its_state(*, traceable: bool) -> None:
    model = Net(traceable=traceable)
    other = nn.Parameter(torch.ones(2))
    body = [p for name, p in model.named_parameters() if not name.startswith("head")]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": 1e-3, "weight_decay": 0.1},
            {"params": [*model.head.parameters(), other], "lr": 1e-2},
        ]
    )
    model(X).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[model.conv1.weight]["exp_avg"].clone()
    done = bnfx.insert_bn(model, X, init="identity", optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    trained = {id(p) for p in done.parameters()} | {id(other)}
    assert {id(p) for p in held} == trained
    assert torch.equal(optimizer.state[done.get_parameter("conv1.weight")]["exp_avg"], momentum)
    assert not any(p is q for p in optimizer.state for q in model.parameters())
    first, second, added = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], second["lr"]) == (1e-3, 0.1, 1e-2)
    assert (added["lr"], added["weight_decay"], len(added["params"])) == (1e-3, 0.0, 6)
    before = copy.deepcopy(done.state_dict())
    done.train()(X).square().mean().backward()
    optimizer.step()
    changed = {
        name
        for name, _ in done.named_parameters()
        if not torch.equal(before[name], done.state_dict()[name])
    }
    assert changed == {name for name, _ in done.named_parameters()}


def test_an_optimizer_with_names_keeps_them() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    done = bnfx.insert_bn(model, optimizer=optimizer)
    named = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    ours = dict(done.named_parameters())
    assert named.keys() == ours.keys()
    assert all(named[name] is ours[name] for name in ours)


def test_an_optimizer_of_something_else_is_refused_before_anything_happens() -> None:
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    held = [*optimizer.param_groups[0]["params"]]
    with pytest.raises(bnfx.InsertError, match="holds no parameter"):
        bnfx.insert_bn(Net(), optimizer=optimizer)
    model = Net()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    bnfx.plan_insert(model, optimizer=mine)
    with pytest.raises(bnfx.CalibrationError):
        bnfx.insert_bn(model, init="calibrate", calibration_data=[], optimizer=mine)
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))
    assert all(
        a is b for a, b in zip(model.parameters(), mine.param_groups[0]["params"], strict=True)
    )


def test_param_groups_spare_gamma_beta_and_biases() -> None:
    model = bnfx.insert_bn(Net(), form="graph")
    model.get_parameter("head.weight").requires_grad_(False)
    decayed, spared = bnfx.param_groups(model, weight_decay=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [
        "conv1.weight",
        "conv2.weight",
        "fc.weight",
    ]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert {names[id(p)] for p in spared["params"]} == {
        *(
            f"{layer}_bn.{part}"
            for layer in ("conv1", "conv2", "fc")
            for part in ("weight", "bias")
        ),
        "head.bias",
    }
    torch.optim.SGD([decayed, spared], lr=0.1)
    with pytest.raises(bnfx.BnfxError, match="negative"):
        bnfx.param_groups(model, weight_decay=-1)
    with pytest.raises(bnfx.BnfxError, match="gradient"):
        bnfx.param_groups(nn.ReLU(), weight_decay=0)


@pytest.mark.parametrize("traceable", BOTH)
def test_checkpoints_both_ways(*, traceable: bool) -> None:
    trained, model = Net(traceable=traceable).eval(), Net(traceable=traceable)
    done = bnfx.insert_bn(model, X).eval()
    done.train()(X)
    done.eval()
    checkpoint = trained.state_dict()
    assert not torch.allclose(done(X), trained(X))
    done.load_state_dict(checkpoint, strict=True)
    torch.testing.assert_close(done(X), trained(X), rtol=1e-5, atol=1e-6)
    assert "conv1.bias" in checkpoint  # the caller's own dict stays
    own = copy.deepcopy(done.state_dict())
    done.load_state_dict(own, strict=True)
    with pytest.raises(RuntimeError, match=r"conv2\.weight"):
        done.load_state_dict({k: v for k, v in checkpoint.items() if k != "conv2.weight"})
    for norm in ("conv1", "conv2", "fc"):
        for name, value in own.items():
            if name.startswith(norm) and ("bn.weight" in name or "running" in name):
                value.add_(torch.rand_like(value))
    done.load_state_dict(own)
    merged = bnfx.fold_bn(done, X)  # the residual is in the weights of conv2 now
    back = Net(traceable=traceable).eval()
    with pytest.raises(RuntimeError, match=r"conv2\.merged"):
        back.load_state_dict(merged.state_dict(), strict=True)
    folded = bnfx.fold_bn(done, X, merge_branches=False)
    back.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(back(X), done(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("traceable", BOTH)
def test_wrapped_in_a_larger_model_a_checkpoint_loads_too(*, traceable: bool) -> None:
    trained = Net(traceable=traceable).eval()
    done = bnfx.insert_bn(Net(traceable=traceable), X).eval()
    outer = nn.ModuleDict({"net": copy.deepcopy(done)})
    outer.load_state_dict({f"net.{k}": v for k, v in trained.state_dict().items()}, strict=True)
    torch.testing.assert_close(outer["net"](X), trained(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("traceable", BOTH)
def test_synchronised_and_distributed(tmp_path: Path, *, traceable: bool) -> None:
    done = bnfx.insert_bn(Net(traceable=traceable), X)
    checkpoint = Net().state_dict()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(done)).eval()
    synchronised.load_state_dict(done.state_dict(), strict=True)
    torch.testing.assert_close(synchronised(X), done.eval()(X))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules()) == 3
    synchronised.load_state_dict(checkpoint, strict=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(done.train())
        wrapped(X).sum().backward()
        assert all(p.grad is not None for p in done.parameters())
        # the last one to hold the group joins its threads, which may wait for Python's lock
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("traceable", BOTH)
def test_compiled_and_exported(*, traceable: bool) -> None:
    done = bnfx.insert_bn(Net(traceable=traceable), X).eval()
    compiled = torch.compile(done, backend="eager")
    torch.testing.assert_close(compiled(X), done(X))
    if traceable:
        program = torch.export.export(done, (X,))
        torch.testing.assert_close(program.module()(X), done(X))


def test_sequences_go_to_onnx_and_fold_away(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    done = bnfx.insert_bn(model)
    for _ in range(3):
        done.train()(torch.randn(4, 5, 6))
    done.eval()
    x = torch.randn(2, 5, 6)
    bnfx.export_onnx(done, (x,), tmp_path / "inserted.onnx", dynamic_shapes=({0: "n", 1: "l"},))
    assert bnfx.verify_onnx(done, tmp_path / "inserted.onnx", (x,))
    folded = bnfx.fold_bn(done)
    assert not [n for n in folded.graph.nodes if n.target in (torch.flatten, "view_as")]
    bnfx.export_onnx(folded, (x,), tmp_path / "folded.onnx", dynamic_shapes=({0: "n", 1: "l"},))
    assert bnfx.verify_onnx(done, tmp_path / "folded.onnx", (x,))


def records(model: nn.Module) -> dict[str, tuple[str, str]]:
    done = bnfx.report(model)
    assert isinstance(done, InsertReport)
    return {site.path: (site.action, site.reason) for site in done.sites}


def test_behind_the_activation() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(16, 2)
    )
    done = bnfx.insert_bn(model, placement="post_activation", init="identity", form="graph").eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(done(x), model.eval()(x))
    assert records(done)["0"][0] == "inserted"
    assert "move to another axis" in records(done)["2"][1]
    order = [str(node.target) for node in done.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]  # a GraphModule
    assert order[:3] == ["0", "1", "0_bn"]
    assert "0.bias" in done.state_dict()  # only in front of the activation beta replaces it
    again = bnfx.insert_bn(done, placement="post_activation")
    assert records(again)["0"][0] == "skipped"
    done.load_state_dict(model.state_dict(), strict=True)


def test_behind_an_activation_that_two_layers_share() -> None:
    model = Net()
    done = bnfx.insert_bn(model, placement="post_activation", init="identity").eval()
    assert {path for path, (action, _) in records(done).items() if action == "inserted"} == {
        *("conv1", "conv2", "fc"),
    }
    torch.testing.assert_close(done(X), model.eval()(X))

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(self.a(x) + self.b(x)))
            return out

    done = bnfx.insert_bn(Sum(), placement="post_activation")
    assert "of 'a' already" in records(done)["b"][1]


def test_filters_and_the_predicate_sees_a_record() -> None:
    def chosen(**options: Any) -> set[str]:
        done = records(bnfx.insert_bn(Net(), **options))
        return {path for path, (action, _) in done.items() if action == "inserted"}

    assert chosen(include="conv*") == {"conv1", "conv2"}
    assert chosen(exclude=["conv1", "fc"]) == {"conv2"}
    assert chosen(include=lambda site: site.kind == "linear") == {"fc"}
    assert chosen(include="conv*", exclude=lambda site: site.channels == 4) == set()


def test_frozen_layers_stay_frozen() -> None:
    model = Net()
    model.conv1.requires_grad_(False)
    done = bnfx.insert_bn(model, form="graph")
    frozen = {name for name, p in done.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "conv1_bn.weight", "conv1_bn.bias"}


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(3, 6, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), torch.randn(3, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(3)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_examples_are_refused(name: str) -> None:
    build, x = UNBATCHED[name]
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(bnfx.InsertError, match=f"{name} '0' got an unbatched input"):
        bnfx.insert_bn(model, x)
    assert_same_state(model.state_dict(), before)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_models_that_cannot_be_changed_are_refused() -> None:
    with pytest.raises(bnfx.InsertError, match="lazy"):
        bnfx.insert_bn(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    with pytest.raises(bnfx.InsertError, match=r"model\.module"):
        bnfx.insert_bn(nn.DataParallel(Net()))
    with pytest.raises(bnfx.InsertError, match="not a torch"):
        bnfx.insert_bn(Net)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(bnfx.CaptureError, match="does not run"):
        bnfx.insert_bn(Net(), torch.randn(2, 5, 6, 6))
