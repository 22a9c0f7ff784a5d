"""export_onnx: names, open axes, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import bnfx
from tests.support.laws import assert_same_state, randomise


class Pair(NamedTuple):
    mean: Tensor
    features: Tensor


@dataclasses.dataclass
class Result:
    mean: Tensor
    features: Tensor | None = None


RESULTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "tensor": (lambda _, b: b, ["output"]),
    "tuple": (lambda a, b: (a, b), ["output_0", "output_1"]),
    "list": (lambda a, b: [a, b], ["output_0", "output_1"]),
    "dict": (lambda a, b: {"mean": a, "features": b}, ["mean", "features"]),
    "ordered": (lambda a, b: OrderedDict(z=a, a=b), ["z", "a"]),
    "default": (lambda a, b: defaultdict(list, {"z": a, "a": b}), ["z", "a"]),
    "named tuple": (Pair, ["mean", "features"]),
    "dataclass": (Result, ["mean", "features"]),
    "half a dataclass": (lambda a, _: Result(a), ["mean"]),
    "nested": (lambda a, b: {"maps": [b, a], "aux": {"k": b + 1}}, ["maps_0", "maps_1", "aux_k"]),
    "dict in a tuple": (lambda a, b: (a, {"k": b}), ["output_0", "output_1_k"]),
    "as the input": (lambda a, b: {"x": a, "y": b}, ["x_out", "y"]),
    "as a weight": (lambda a, b: {"layer.bias": a, "y": b}, ["layer.bias_out", "y"]),
    "as an operator": (lambda a, b: {"relu": a, "mean": b}, ["relu", "mean"]),
    "twice": (lambda a, b: {"one": b, "two": b, "three": a}, ["one", "two", "three"]),
    "numbers": (lambda a, b: {0: a, 1: b}, ["0", "1"]),
    "nothing": (lambda a, b: {"mean": a, "none": None, "features": b}, ["mean", "features"]),
}


class Net(nn.Module):
    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.result = nn.Linear(3, 4), result

    def forward(self, x: Tensor) -> Any:
        features = torch.relu(self.layer(x))
        return self.result(features.mean(1), features)


@pytest.mark.parametrize("kind", RESULTS)
def test_outputs_are_named_after_what_the_model_returns(kind: str, tmp_path: Path) -> None:
    result, names = RESULTS[kind]
    bnfx.export_onnx(Net(result).eval(), torch.randn(5, 3), tmp_path / "m.onnx")
    assert [o.name for o in onnx.load(tmp_path / "m.onnx").graph.output] == names
    assert Result not in pytree.SUPPORTED_NODES, "registered for the export alone"


@pytest.mark.parametrize("kind", ["twice", "half a dataclass"])
def test_outputs_keep_their_names_in_what_is_deployed(kind: str, tmp_path: Path) -> None:
    result, names = RESULTS[kind]
    report = bnfx.deploy(Net(result).eval(), torch.randn(5, 3), tmp_path / "m.onnx", num_inputs=1)
    assert list(report.export.outputs) == names


def test_an_input_that_is_returned_has_a_name_as_output(tmp_path: Path) -> None:
    class Through(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"image": x, "y": x + 1}

    report = bnfx.export_onnx(Through().eval(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert (list(report.inputs), list(report.outputs)) == (["x"], ["image", "y"])


def test_names_that_are_given_come_first(tmp_path: Path) -> None:
    model = Net(RESULTS["dict"][0]).eval()
    report = bnfx.export_onnx(
        model, torch.randn(5, 3), tmp_path / "m.onnx", output_names=["features"]
    )
    assert list(report.outputs) == ["features", "features_out"]


class Fixed(nn.Module):
    """It adds a table of 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor, *more: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x) + self.table
        y = sum(more, start=y)
        return y if scale is None else y * scale


H = Dim("H")
ASKED: dict[str, Any] = {
    "tuple": ({0: Dim("B"), 2: H},),
    "list": [{2: H}],
    "dict": {"x": {0: Dim("B"), 2: H}},
    "axes in a tuple": ((None, None, H, None),),
    "name": {"x": {2: "H"}},
    "as keyword": {"x": None, "scale": {0: H}},
    "as more": {"x": None, "more": ({2: H},)},
}


@pytest.mark.parametrize("kind", ASKED)
def test_an_axis_that_the_model_fixes_cannot_be_asked_for(kind: str, tmp_path: Path) -> None:
    args: tuple[Tensor, ...] = (torch.randn(2, 3, 8, 8),)
    kwargs = {"scale": torch.randn(8, 8)} if kind == "as keyword" else {}
    args += (torch.randn(1, 4, 8, 8),) if kind == "as more" else ()
    with pytest.raises(bnfx.ExportError, match=r"H|conflicts"):
        bnfx.export_onnx(
            Fixed().eval(), args, tmp_path / "m", kwargs=kwargs, dynamic_shapes=ASKED[kind]
        )
    assert not list(tmp_path.iterdir())


def test_axes_that_the_model_leaves_open_are_open(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    shapes = {"x": {0: Dim("B"), 2: Dim.AUTO, 3: None}}
    report = bnfx.export_onnx(Fixed().eval(), x, tmp_path / "m", dynamic_shapes=shapes)
    assert report.inputs["x"].startswith("float32[B,3,")


def test_lazy_modules_that_never_ran_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(bnfx.ExportError, match=r"'0.weight' has no shape yet"):
        bnfx.export_onnx(model, torch.randn(2, 3, 6, 6), tmp_path / "m.onnx")
    assert isinstance(model[0], nn.LazyConv2d)
    model(torch.randn(2, 3, 6, 6))
    assert bnfx.export_onnx(model, torch.randn(2, 3, 6, 6), tmp_path / "m.onnx")


def test_what_the_forward_keeps_is_as_before(tmp_path: Path) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls, self.last = nn.Linear(3, 4), 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.relu(self.layer(x))

    model = Keeping().eval()
    before = copy.deepcopy(model.state_dict())
    bnfx.export_onnx(model, torch.randn(2, 3), tmp_path / "m.onnx")
    assert model.calls == 0
    assert_same_state(model.state_dict(), before)


def test_the_module_of_a_program_needs_no_eval_mode(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program: Any = torch.export.export(net.eval(), (x,)).module()
    assert bnfx.deploy(program, x, tmp_path / "m.onnx", num_inputs=1)
    around = nn.Sequential(program)
    around.training = False  # eval() would ask the program
    assert bnfx.export_onnx(around, x, tmp_path / "n.onnx")
    training: Any = torch.export.export(net.train(), (x,)).module()
    with pytest.raises(bnfx.ExportError, match=r"in train mode: 'batch_norm"):
        bnfx.export_onnx(training, x, tmp_path / "m.onnx")
    inserted = bnfx.insert_bn(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), form="graph"
    )
    with pytest.raises(bnfx.ExportError, match="0_bn"):
        bnfx.export_onnx(inserted, x, tmp_path / "m.onnx")


def test_hooks_of_a_root_that_is_a_graph_are_exported(tmp_path: Path) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.register_forward_hook(lambda _module, _args, out: 2 * out)
    model.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
    assert bnfx.deploy(model, torch.randn(2, 3, 5, 5), tmp_path / "m.onnx")


class Mixed(nn.Module):
    """Its first half runs in 16 bits, with BatchNorms of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b, self.b_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(self.a_bn(self.a(x)))
        out: Tensor = self.b_bn(self.b(y.float()))
        return out


def test_what_the_exporter_would_fold_into_16_bits_stays(tmp_path: Path) -> None:
    """It folds in float32, which is no valid file; its own folding is then left out."""
    model, x = randomise(Mixed()), torch.randn(2, 3, 6, 6)
    done = bnfx.deploy(model, x, tmp_path / "m.onnx", opset_version=22)
    assert [record.verdict for record in done.fold.batch_norms] == ["kept", "folded"]


def test_what_is_not_needed_is_not_missed(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torchvision"] = None
import bnfx, torch
bnfx.export_onnx(torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),), "a.onnx")
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stderr
