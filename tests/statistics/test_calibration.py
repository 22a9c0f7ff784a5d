"""init="calibrate" and recalibrate_bn: exact statistics, unchanged outputs, nothing lost."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnfx
from bnfx.reports.report import InsertReport
from bnfx.statistics.moments import Moments
from tests.support.laws import assert_same_state, randomise


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.GELU()),
        *(nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 4)),
    )


def batches(sizes: tuple[int, ...] = (16, 16, 5)) -> list[Tensor]:
    """Ragged, and sorted by brightness: the worst loader for averages of batches."""
    images = (
        torch.randn(sum(sizes), 3, 10, 10) + torch.linspace(-3, 3, sum(sizes))[:, None, None, None]
    )
    return list(images.split(sizes))


def test_moments_merge_exactly() -> None:
    parts = [torch.randn(n, 3, 4, dtype=torch.float64) * n + 100 * n for n in (7, 1, 12)]
    merged = Moments.of(parts[0]).merged(Moments.of(parts[1])).merged(Moments.of(parts[2]))
    together = torch.cat(parts).transpose(0, 1).flatten(1)
    torch.testing.assert_close(merged.mean, together.mean(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.variance, together.var(1), rtol=1e-13, atol=0)


def test_moments_of_large_batches_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 3, 5, 5) + 50
    whole = Moments.of(x)
    monkeypatch.setattr("bnfx.statistics.moments._CHUNK", 21)
    chunked = Moments.of(x)
    assert whole.count == chunked.count == 150
    torch.testing.assert_close(chunked.m2, whole.m2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("placement", ["pre_activation", "post_activation"])
def test_calibration_keeps_outputs_and_takes_exact_statistics(placement: Any) -> None:
    model, data = convnet().eval(), batches()
    before = copy.deepcopy(model.state_dict())
    done = bnfx.insert_bn(
        model, init="calibrate", calibration_data=iter(data), placement=placement, form="graph"
    )
    assert_same_state(model.state_dict(), before)
    for x in data:
        torch.testing.assert_close(done(x), model(x), rtol=1e-4, atol=1e-5)
    norm = done.get_submodule("0_bn")
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x in data:
        done(x)
    values = torch.cat(seen).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        norm.get_buffer("running_mean").double(), values.mean(1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        norm.get_buffer("running_var").double(), values.var(1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    model, data = convnet().to(dtype).eval(), batches()  # float32 batches for any model
    done = bnfx.insert_bn(model, init="calibrate", calibration_data=data, form="graph")
    assert done.get_buffer("0_bn.running_var").dtype == torch.promote_types(dtype, torch.float32)
    x = data[1].to(dtype)
    with torch.no_grad():
        apart = (done(x).double() - model(x).double()).norm() / model(x).double().norm()
    assert float(apart) < 20 * torch.finfo(dtype).eps


def test_train_mode_starts_close() -> None:
    torch.manual_seed(1)
    model, data = convnet(), [torch.randn(64, 3, 10, 10) for _ in range(4)]
    calibrated = bnfx.insert_bn(
        model, init="calibrate", calibration_data=data, form="graph"
    ).train()
    fresh = bnfx.insert_bn(model, form="graph").train()
    truth = model(data[0])
    apart = [
        float((m(data[0]) - truth).detach().norm() / truth.detach().norm())
        for m in (calibrated, fresh)
    ]
    assert apart[0] < 0.15 < apart[1]


class Masked(nn.Module):
    """Takes two arguments, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.fc(x))
        out: Tensor = self.head(x if mask is None else x * mask)
        return out


def forms() -> Iterator[tuple[str, list[Any]]]:
    x, labels = torch.randn(12, 4), torch.randint(0, 2, (12,))
    yield "tensors", [x]
    yield "tuples with labels", [(x, labels)]
    yield "lists with labels", [[x, labels]]
    yield "dicts", [{"x": x, "labels": labels}]
    yield "dicts in tuples", [({"x": x},)]


@pytest.mark.parametrize(("name", "data"), [*forms()])
def test_any_form_of_batches(name: str, data: list[Any]) -> None:
    model = Masked().eval()
    done = bnfx.insert_bn(model, init="calibrate", calibration_data=data, form="graph")
    x = torch.randn(5, 4)
    torch.testing.assert_close(done(x), model(x), rtol=1e-4, atol=1e-5)
    mean = done.get_buffer("fc_bn.running_mean")
    assert float(mean.abs().max()) > 0


def test_sequences_of_any_rank() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).eval()
    data = [torch.randn(3, 5, 7, 4) + 2]
    done = bnfx.insert_bn(model, init="calibrate", calibration_data=data, form="graph")
    rows = nn.functional.linear(data[0], model.get_parameter("0.weight")).flatten(0, -2)
    torch.testing.assert_close(
        done.get_buffer("0_bn.running_var"), rows.var(0), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(done(data[0]), model(data[0]), rtol=1e-4, atol=1e-5)


def nan() -> list[Tensor]:
    x = torch.randn(4, 3, 10, 10)
    x[2, 1, 0, 0] = float("nan")
    return [torch.randn(4, 3, 10, 10), x]


BAD: dict[str, tuple[Any, str]] = {
    "empty": ([], "empty"),
    "NaN": (nan(), "batch 1: 1 of 1200 input values"),
    "wrong shape": ([torch.randn(4, 5, 10, 10)], r"batch 0 \(inputs \[4, 5, 10, 10\]\)"),
    "one tensor": (torch.randn(4, 3, 10, 10), "one Tensor"),
    "no iterable": (3, "int"),
    "one value per channel": ([torch.randn(1, 3, 10, 10)], "1 value per channel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused(name: str) -> None:
    data, message = BAD[name]
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(bnfx.CalibrationError, match=message):
        bnfx.insert_bn(model, init="calibrate", calibration_data=data, form="graph")
    assert_same_state(model.state_dict(), before)
    assert all(module.training for module in model.modules())


def test_activations_that_overflow_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(3e38)
    with pytest.raises(bnfx.CalibrationError, match="'0_bn'"):
        bnfx.insert_bn(model, init="calibrate", calibration_data=[torch.ones(4, 4)], form="graph")


def test_contradictory_arguments() -> None:
    with pytest.raises(bnfx.InsertError, match="calibration_data"):
        bnfx.insert_bn(convnet(), init="calibrate")
    with pytest.raises(bnfx.InsertError, match="not read"):
        bnfx.insert_bn(convnet(), calibration_data=batches())
    with pytest.raises(bnfx.InsertError, match="init="):
        bnfx.insert_bn(convnet(), init="zeros")  # type: ignore[arg-type]  # on purpose


def test_a_wrong_identity_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convnet().eval(), torch.randn(2, 3, 10, 10)
    bnfx.insert_bn(model, x, init="identity")
    monkeypatch.setattr("math.sqrt", lambda _: 1.0)
    with pytest.raises(bnfx.InsertError, match="the worst site is"):
        bnfx.insert_bn(model, x, init="identity")


def normed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*model, nn.Linear(256, 6), nn.BatchNorm1d(6, momentum=None), nn.Dropout())


def test_exact_statistics_are_those_of_all_data() -> None:
    model, data = nn.Sequential(nn.BatchNorm2d(3)), batches()
    assert bnfx.recalibrate_bn(model, data, progress=False) is model
    values = torch.cat(data).double().transpose(0, 1).flatten(1)
    mean, variance = model.get_buffer("0.running_mean"), model.get_buffer("0.running_var")
    torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), values.var(1), rtol=1e-6, atol=1e-6)
    assert int(model.get_buffer("0.num_batches_tracked")) == 3
    average = copy.deepcopy(model)
    update_bn(data, average)
    assert float((average.get_buffer("0.running_var") - variance).abs().max()) > 0.1


def test_the_papers_estimator_equals_update_bn() -> None:
    ours, data = normed().eval(), batches((8, 8, 8))
    theirs = copy.deepcopy(ours)
    torch.manual_seed(0)
    bnfx.recalibrate_bn(ours, [(x, None) for x in data], estimator="paper", progress=False)
    torch.manual_seed(0)
    update_bn(data, theirs)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = randomise(normed())
    model.get_submodule("0").train()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]

    def broken() -> Iterator[Tensor]:
        yield torch.randn(4, 3, 10, 10)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        bnfx.recalibrate_bn(model, broken(), progress=False)
    with pytest.raises(bnfx.CalibrationError, match="batch 1"):
        bnfx.recalibrate_bn(model, [torch.randn(4, 3, 10, 10), torch.randn(4, 1, 2, 2)])
    with pytest.raises(bnfx.CalibrationError, match="empty"):
        bnfx.recalibrate_bn(model, [])
    with pytest.raises(bnfx.CalibrationError, match="'5' got one value per channel"):
        bnfx.recalibrate_bn(model, [torch.randn(1, 3, 10, 10)])
    assert_same_state(model.state_dict(), before)
    assert flags == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.get_submodule("5").momentum is None


def test_recalibration_needs_batch_norm() -> None:
    with pytest.raises(bnfx.CalibrationError, match="no BatchNorm"):
        bnfx.recalibrate_bn(nn.Linear(2, 2), [torch.ones(2, 2)])
    with pytest.raises(bnfx.CalibrationError, match="estimator"):
        bnfx.recalibrate_bn(normed(), [], estimator="mean")  # type: ignore[arg-type]  # on purpose


def _rank(rank: int, folder: str, estimator: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    data = batches((8, 8, 8, 5))
    model = nn.Sequential(nn.BatchNorm2d(3))
    wrapped = nn.parallel.DistributedDataParallel(model)
    bnfx.recalibrate_bn(wrapped, data[rank::2], estimator=estimator, progress=False)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    del (
        wrapped
    )  # the last one to hold the group joins its threads, which may wait for Python's lock
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["exact", "paper"])
def test_two_processes_equal_one(tmp_path: Path, estimator: Any) -> None:
    spawn: Any = importlib.import_module("torch.multiprocessing").spawn  # untyped
    spawn(_rank, (str(tmp_path), estimator), nprocs=2)
    torch.manual_seed(0)
    data = batches((8, 8, 8, 5))
    alone = bnfx.recalibrate_bn(nn.Sequential(nn.BatchNorm2d(3)), data, estimator=estimator)
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt")
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)


def test_a_dry_run_reads_no_data_and_agrees() -> None:
    data = iter(batches())
    plan = bnfx.plan_insert(convnet(), init="calibrate", calibration_data=data)
    assert len(list(data)) == 3
    done = bnfx.report(bnfx.insert_bn(convnet(), init="calibrate", calibration_data=batches()))
    assert isinstance(done, InsertReport)
    assert plan == done
