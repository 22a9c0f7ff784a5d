"""Models inside what torch puts around them: they work, or one sentence says what to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import bnfx
from tests.support.laws import randomise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DistributedDataParallel wants a group of processes, if only of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain() -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


class Whole(nn.Module):
    """A model with a part that is wrapped."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.more, self.bn = part, nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.more(self.part(x))))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "averaged": AveragedModel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, X),
}
WORK = ("compiled", "averaged")


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def fold(model: nn.Module, _: Path) -> None:
    folded = bnfx.fold_bn(model, X)
    same(folded(X), model(X))
    done = bnfx.report(folded)
    assert isinstance(done, bnfx.FoldReport)
    assert done.left == 0


def insert(model: nn.Module, _: Path) -> None:
    inserted = bnfx.insert_bn(model, X, init="identity")
    same(inserted(X), model(X))
    assert set(model.state_dict()) <= set(inserted.state_dict())


def deploy(model: nn.Module, folder: Path) -> None:
    assert bnfx.deploy(model, X, folder / "a.onnx")


def export(model: nn.Module, folder: Path) -> None:
    bnfx.export_onnx(model, X, folder / "a.onnx")


def recipe(model: nn.Module, _: Path) -> None:
    bnfx.recipe(model, lr=0.1, weight_decay=0.1, example_inputs=X)


@pytest.mark.parametrize("act", [fold, insert, deploy, export, recipe])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_works_or_says_what_to_give(
    tmp_path: Path,
    wrapper: str,
    *,
    inside: bool,
    act: Callable[[nn.Module, Path], None],
) -> None:
    model = WRAPPERS[wrapper](plain())
    model = (Whole(model) if inside else model).eval()
    wrapped = wrapper == "DistributedDataParallel"
    if wrapper in WORK or (wrapped and inside and act is fold):
        if not wrapped:
            act(model, tmp_path)
        return
    with pytest.raises(bnfx.BnfxError) as caught:
        act(model, tmp_path)
    said = str(caught.value)
    assert "module" in said
    assert ("is a wrapper" if wrapped else "is TorchScript") in said
    assert said.count(".") <= 2
    assert ("'part'" in said) == inside


def test_statistics_of_what_is_wrapped() -> None:
    truth = bnfx.recalibrate_bn(plain(), [X], progress=False).get_submodule("1")
    for name, wrap in WRAPPERS.items():
        model = wrap(plain())
        if name in ("scripted", "traced"):
            with pytest.raises(bnfx.CalibrationError, match="TorchScript"):
                bnfx.recalibrate_bn(model, [X], progress=False)
        else:
            bnfx.recalibrate_bn(model, [X], progress=False)
            (norm,) = (part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
            torch.testing.assert_close(norm.running_mean, truth.running_mean)


def test_what_is_sharded_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    changes: list[Callable[[], object]] = [
        lambda: bnfx.insert_bn(model),
        lambda: bnfx.fold_bn(model),
        lambda: bnfx.fold_bn(model, form="module"),
    ]
    for change in changes:
        with pytest.raises(bnfx.BnfxError, match=r"'1'.*is sharded by FSDP"):
            change()
