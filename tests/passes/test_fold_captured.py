"""fold_bn on forwards that a graph shows in part: what it takes, keeps and refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from tests.passes.test_fold_bn import Net, bn, conv
from tests.support.laws import randomise

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A convolution and its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.calls, self.last = 0, torch.zeros(())
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def block(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) -> the same."""
        out: Tensor = self.bn(self.conv(x))
        return out


def branching(padding: int) -> Callable[[Any, Tensor], Tensor]:
    """A forward that only torch.export captures."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 2 if x.shape[1] > 3 else x
        return m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, padding=padding))  # type: ignore[no-any-return]

    return forward


@pytest.mark.parametrize("padding", [0, 1])
def test_result_of_the_exporter_is_an_ordinary_module(padding: int) -> None:
    model = randomise(Net(branching(padding), conv=conv(), bn=bn())).double()
    folded = bnfx.fold_bn(model, X)
    assert not any(module.training for module in folded.modules())
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        for size in ((2, 4, 6, 6), (5, 4, 9, 8)):
            x = torch.randn(size, dtype=torch.float64)
            torch.testing.assert_close(copied(x), model(x), rtol=1e-10, atol=1e-10)
        with pytest.raises(AssertionError, match="Guard failed"):
            copied(torch.randn(2, 3, 6, 6, dtype=torch.float64))  # made for more than 3 channels


def test_model_that_only_the_exporter_captures_is_deployed(tmp_path: Path) -> None:
    model = randomise(Net(branching(1), conv=conv(), bn=bn()))
    assert bnfx.deploy(model, X.float(), tmp_path / "model.onnx")


def test_several_inputs_in_one_argument_keep_their_sizes_open() -> None:
    class Several(Base):
        def forward(self, *images: Tensor) -> Tensor:
            return self.block(images[0]) + images[1]

    model = randomise(Several()).double()
    folded = bnfx.fold_bn(model, (X, X))
    other = torch.randn(5, 4, 8, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(other, other), model(other, other), rtol=1e-10, atol=1e-10)


class Optional(Base):
    def forward(
        self, x: Tensor, flip: int, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        y = self.block(-x if flip else x)
        y = y if bias is None else y + bias
        return y if scale is None else y * scale


@pytest.mark.parametrize("args", [(X, 0), (X, 1, None), (X, 1, None, 0.5), (X, 1, X)])
def test_result_takes_the_example(args: tuple[Any, ...]) -> None:
    model = randomise(Optional()).double()
    folded = bnfx.fold_bn(model, args)
    for module in (folded, pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(module(*args), model(*args), rtol=1e-10, atol=1e-10)
        with pytest.raises(AssertionError, match="flip was"):
            module(X, 1 - args[1], *args[2:])  # what it was not made for
    program = torch.export.export(folded, args)
    torch.testing.assert_close(program.module()(*args), model(*args), rtol=1e-10, atol=1e-10)


class Counting(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.block(x) * self.calls


class Averaging(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen * 0.9 + x.mean()
        return self.block(x) * self.seen


class Replacing(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = self.conv.weight.data * 2
        return self.block(x)


@pytest.mark.parametrize("kind", [Counting, Averaging, Replacing])
def test_state_that_no_graph_keeps_is_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(bnfx.CaptureError, match="it assigns to"):
        bnfx.fold_bn(randomise(kind()))


def test_buffer_that_the_forward_replaces() -> None:
    model = randomise(Averaging()).double()
    folded = bnfx.fold_bn(model, X)
    for _ in range(2):
        torch.testing.assert_close(folded(X), model(X), rtol=1e-10, atol=1e-10)


def test_attributes_that_the_forward_only_writes_do_no_harm() -> None:
    class Remembering(Base):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = self.block(x)
            return self.last * 2

    model = randomise(Remembering()).double()
    folded = bnfx.fold_bn(model)
    assert [r.verdict for r in bnfx.plan_fold(model).batch_norms] == ["folded"]
    torch.testing.assert_close(folded(X), model(X), rtol=1e-10, atol=1e-10)


def test_bounds_of_a_clamp_that_cross() -> None:
    model = Net(lambda m, x: m.bn(m.conv(x).clamp(1.0, -1.0)), conv=conv(), bn=bn())
    randomise(model).double()
    with torch.no_grad():
        model.get_parameter("bn.weight").copy_(torch.tensor([-1.0, 1.0, -2.0, 0.5]))
    folded = bnfx.fold_bn(model, X, thresholds=True)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_chunks_are_joined_as_they_come(join: Callable[..., Tensor]) -> None:
    model: nn.Module = Net(
        lambda m, x: F.gelu(m.bn(join(m.conv(x).chunk(2, 1)[::-1], 1).reshape(-1, 4, 6, 6))),
        conv=conv(),
        bn=bn(),
    )
    model = randomise(model).double()
    assert [r.verdict for r in bnfx.plan_fold(model, X).batch_norms] == ["folded"]
    torch.testing.assert_close(bnfx.fold_bn(model, X)(X), model(X), rtol=1e-10, atol=1e-10)


def test_example_without_a_batch_is_taken() -> None:
    model = randomise(nn.Sequential(conv(), bn())).double()
    folded = bnfx.fold_bn(model, X[:0])
    torch.testing.assert_close(folded(X), model(X), rtol=1e-10, atol=1e-10)


def test_scale_that_cannot_be_divided_by_stays() -> None:
    model = randomise(nn.Sequential(conv(), bn(), nn.GELU())).double()
    with torch.no_grad():
        model.get_parameter("1.weight")[1] = 1e-320
    record = bnfx.plan_fold(model, X).batch_norms[0]
    assert record.verdict == "kept"
    assert "[1]" in record.reason
    torch.testing.assert_close(bnfx.fold_bn(model, X)(X), model(X), rtol=1e-10, atol=1e-10)


class Mixed(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        out: Tensor = self.bn(y.float())
        return out


def test_autocast_in_the_forward_is_no_part_of_a_trace() -> None:
    model, x = randomise(Mixed()), X.float()
    with pytest.raises(bnfx.CaptureError, match="autocast"):
        bnfx.fold_bn(model)
    torch.testing.assert_close(bnfx.fold_bn(model, x)(x), model(x))


def sine(x: Tensor) -> Tensor:
    """A forward for any module."""
    return x.sin()


@pytest.mark.parametrize("path", ["", "1"])
def test_forward_of_the_object_is_not_taken_for_that_of_its_class(path: str) -> None:
    model = randomise(nn.Sequential(conv(), bn(), conv())).double()
    vars(model.get_submodule(path))["forward"] = sine
    torch.testing.assert_close(bnfx.fold_bn(model, X)(X), model(X), rtol=1e-10, atol=1e-10)
    if path:
        torch.testing.assert_close(bnfx.fold_bn(model)(X), model(X), rtol=1e-10, atol=1e-10)
    else:
        with pytest.raises(bnfx.CaptureError, match="attribute of the object"):
            bnfx.fold_bn(model)


class Everything(Base):
    def forward(self, *images: Tensor) -> Tensor:
        return self.block(images[0])


def scripted() -> nn.Module:
    made: nn.Module = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval())
    return made


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "arguments without a name": (Everything, "images"),
    "TorchScript": (scripted, "Script"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()), "uninitialized"),
    "no module": (lambda: "a name", "torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Lazy modules")
def test_what_cannot_be_folded_is_refused(name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(bnfx.CaptureError, match=words):
        bnfx.fold_bn(build())


def test_model_without_values_keeps_its_batch_norms() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(), bn()).eval()
    record = bnfx.plan_fold(model).batch_norms[0]
    assert record.verdict == "kept"
    assert "meta" in record.reason


def test_default_device_does_not_matter() -> None:
    model = randomise(nn.Sequential(conv(), bn(), nn.ReLU(), conv(), bn())).double()
    with torch.device("meta"):
        folded = bnfx.fold_bn(model, X)
    assert [r.verdict for r in bnfx.plan_fold(model, X).batch_norms] == ["folded"] * 2
    torch.testing.assert_close(folded(X), model(X), rtol=1e-10, atol=1e-10)


def test_only_models_have_reports() -> None:
    nothing: Any = None
    with pytest.raises(bnfx.BnfxError, match="NoneType"):
        bnfx.report(nothing)


def test_parts_without_gradients_fold_with_what_is_around_them() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x * 2 if x.shape[1] > 3 else x)
        with torch.no_grad():
            z = m.bn(y)
            with torch.enable_grad():
                y = m.after(z)
        return y, z

    model = randomise(Net(forward, conv=conv(), bn=bn(), after=conv())).double()
    folded = bnfx.fold_bn(model, X)
    assert [r["verdict"] for r in bnfx.report(folded).to_dict()["batch_norms"]] == ["folded"]
    for ours, truth in zip(pickle.loads(pickle.dumps(folded))(X), model(X), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
