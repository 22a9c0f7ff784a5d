"""The verifier verified: faults are caught and named, right files pass. The bulk is a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import bnfx
from tests.support.fault_networks import NETWORKS, Network
from tests.support.faults import FORMULAS, Fault, all_faults, strip_claims
from tests.support.laws import randomise
from tests.test_examples import ROOT, run_script

BY_NAME = {network.name: network for network in NETWORKS}
Source = tuple[nn.Module, tuple[Tensor, ...], onnx.ModelProto]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A right file of each of two networks."""
    folder = tmp_path_factory.mktemp("right")
    made = {}
    for name in ("plain", "mixed"):
        network = BY_NAME[name]
        model, example = network.made(0)
        f = folder / f"{name}.onnx"
        folded = bnfx.fold_bn(model, example)
        bnfx.export_onnx(folded, example, f, dynamic_shapes=network.dynamic)
        made[name] = (model, example, onnx.load(f))
    return made


def judge(source: Source, fault: Fault, network: Network, f: Path, *, strip: bool) -> str | None:
    """What the verifier says of a faulty file: "" if it passed; None where there is no place."""
    model, example, clean = source
    faulty = onnx.ModelProto()
    faulty.CopyFrom(clean)
    if not fault.inject(network, model, faulty):
        return None
    if strip:
        strip_claims(faulty)
    onnx.save(faulty, f)
    try:
        report = bnfx.verify_onnx(model, f, example, isolate=False, batch_sizes=(1,))
    except bnfx.VerificationError as error:
        return str(error)
    return "" if report else str(report.first_divergence)


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_faults_are_caught(
    tmp_path: Path, sources: dict[str, Source], name: str, *, strip: bool
) -> None:
    chosen = [fault for fault in all_faults() if "(layer 1)" not in fault.name]
    network, f = BY_NAME[name], tmp_path / "faulty.onnx"
    said = {fault.name: judge(sources[name], fault, network, f, strip=strip) for fault in chosen}
    assert [fault for fault, message in said.items() if message == ""] == []
    assert sum(message is not None for message in said.values()) >= 25


def test_causes_are_named(tmp_path: Path, sources: dict[str, Source]) -> None:
    network, f = BY_NAME["plain"], tmp_path / "faulty.onnx"
    faults = {fault.name: fault for fault in all_faults()}
    expected = {
        "eps forgotten (layer 0)": "eps was forgotten",
        "eps added to the deviation (layer 0)": "eps was added to the standard deviation",
        "gamma left out (layer 1)": "gamma was left out",
        "variance for deviation (layer 1)": "the variance was taken for the standard deviation",
        "mean and var swapped (layer 0)": "mean and variance were swapped",
        "bias not scaled (layer 1)": "the bias was not scaled",
        "mean not subtracted (layer 1)": "the mean was not subtracted",
        "beta left out (layer 0)": "beta was left out",
        "not folded (layer 1)": "the BatchNorm was not folded",
        "gamma off by 1e-3 in one channel": "channel 7 alone is off by a factor of 1.001",
        "gamma off by 1e-5 in one channel": "channel 7 alone is off by a factor of 1.00001",
        "NaN in a weight": "NaN",
        "weight through half precision": "half precision",
        "channels in another order": "another order",
        "activation removed": "look at Identity 'node_relu'",
    }
    for name, cause in expected.items():
        message = judge(sources["plain"], faults[name], network, f, strip=False)
        assert message is not None
        assert cause in message, name
    assert len(FORMULAS) == 13


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_right_files_pass(tmp_path: Path, network: Network) -> None:
    model, example = network.made(3)
    f = tmp_path / "right.onnx"
    folded = bnfx.fold_bn(model, example)
    bnfx.export_onnx(folded, example, f, dynamic_shapes=network.dynamic)
    report = bnfx.verify_onnx(model, f, example)
    assert report, str(report)
    weights, layers, outputs = report.tiers
    assert weights.checked == weights.of > 0
    assert layers.status == "passed"
    assert outputs.worst <= 4
    stripped = onnx.load(f)
    strip_claims(stripped)
    onnx.save(stripped, f)
    assert bnfx.verify_onnx(model, f, example, isolate=False)


def test_a_file_folded_by_the_exporter_passes(tmp_path: Path) -> None:
    model, example = BY_NAME["residual"].made(1)
    f, unfolded = tmp_path / "exporter.onnx", tmp_path / "unfolded.onnx"
    bnfx.export_onnx(model, example, f)
    program = torch.onnx.export(model, example, dynamo=True, verbose=False, optimize=False)
    assert program is not None
    program.save(unfolded)
    for path in (f, unfolded):
        report = bnfx.verify_onnx(model, path, example, isolate=False)
        assert report, str(report)
        assert report.tiers[0].checked == report.tiers[0].of
    assert report.batch_norms_left == 4


def test_a_file_is_compared_with_a_file(tmp_path: Path) -> None:
    network = BY_NAME["decoder"]
    model, example = network.made(1)
    f, g = tmp_path / "folded.onnx", tmp_path / "unfolded.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, example), example, f, dynamic_shapes=network.dynamic)
    program = torch.onnx.export(model, example, dynamo=True, verbose=False, optimize=False)
    assert program is not None
    program.save(g)
    assert bnfx.verify_onnx(g, f, example)
    assert bnfx.verify_onnx(f, f)
    faulty = onnx.load(f)
    tensor = next(t for t in faulty.graph.initializer if t.name == "a.weight")
    array = numpy_helper.to_array(tensor) * 1.001
    tensor.CopyFrom(numpy_helper.from_array(array.astype("f4"), "a.weight"))
    onnx.save(faulty, tmp_path / "faulty.onnx")
    assert not bnfx.verify_onnx(f, tmp_path / "faulty.onnx")
    assert not bnfx.verify_onnx(g, tmp_path / "faulty.onnx", example)
    with pytest.raises(bnfx.VerificationError, match="no file"):
        bnfx.verify_onnx(tmp_path / "gone.onnx", f)


class Pool(nn.Module):
    """What the float64 evaluation of a file computes by torch: paddings, ceilings, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), dilation=(1, 2), groups=2)
        self.b = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(self.a(x), 3, 2, 1)
        y = nn.functional.avg_pool2d(self.b(y), 3, 2, 1, count_include_pad=False)
        return nn.functional.max_pool2d(y, 3, 2, ceil_mode=True)


def test_a_file_in_float64_is_the_model_in_float64(tmp_path: Path) -> None:
    from bnfx.graphs.examples import Example
    from bnfx.verification.file_reference import OnnxReference
    from bnfx.verification.references import TorchReference

    model, x = randomise(Pool()), torch.randn(2, 2, 17, 19)
    f = tmp_path / "pool.onnx"
    bnfx.export_onnx(model, x, f)
    ours: Any = OnnxReference(f, "fp32", 60).run([Example((x,), {})]).exact[0][0]
    truth: Any = TorchReference(model, "fp32").run([Example((x,), {})]).exact[0][0]
    assert ours.dtype == truth.dtype == np.float64
    np.testing.assert_allclose(ours.astype(float), truth.astype(float), rtol=0, atol=1e-12)


class Branches(nn.Module):
    """Two convolutions of one input that are added: merged into one by default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.b_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a_bn(self.a(x)) + self.b_bn(self.b(x)))


@pytest.mark.parametrize("merge", [True, False])
def test_options_of_folding_are_no_fault(tmp_path: Path, *, merge: bool) -> None:
    model, x = randomise(Branches()), torch.randn(2, 4, 6, 6)
    f = tmp_path / "branches.onnx"
    folded = bnfx.fold_bn(model, x, merge_branches=merge)
    bnfx.export_onnx(folded, x, f)
    report = bnfx.verify_onnx(model, f, x, isolate=False)
    assert report, str(report)
    assert report.tiers[0].checked == report.tiers[0].of == (2 if merge else 4)


def test_claims_do_not_help_a_wrong_file(tmp_path: Path, sources: dict[str, Source]) -> None:
    """A file that says bnfx folded nothing, or all of it, is checked the same."""
    model, example, clean = sources["plain"]
    for claim in ('["a.weight"]', "[]", "not json", ""):
        faulty = onnx.ModelProto()
        faulty.CopyFrom(clean)
        tensor = next(t for t in faulty.graph.initializer if t.name == "a.weight")
        array = numpy_helper.to_array(tensor).copy()
        array[7] *= 1.001
        tensor.CopyFrom(numpy_helper.from_array(array, "a.weight"))
        del faulty.metadata_props[:]
        helper.set_model_props(faulty, {"bnfx.folded": claim} if claim else {})
        onnx.save(faulty, tmp_path / "faulty.onnx")
        report = bnfx.verify_onnx(model, tmp_path / "faulty.onnx", example, isolate=False)
        assert report.divergence is not None
        assert (report.divergence.module, report.divergence.channel) == ("a", 7)


def test_precisions(tmp_path: Path, sources: dict[str, Source]) -> None:
    model, example, clean = sources["plain"]
    f = tmp_path / "plain.onnx"
    onnx.save(clean, f)
    assert bnfx.verify_onnx(model, f, example, precision="tf32", isolate=False).precision == "tf32"
    halved = onnx.ModelProto()
    halved.CopyFrom(clean)
    for tensor in halved.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == "f4":
            tensor.CopyFrom(numpy_helper.from_array(array.astype("f2").astype("f4"), tensor.name))
    onnx.save(halved, f)
    assert not bnfx.verify_onnx(model, f, example, isolate=False)


@pytest.mark.slow
def test_the_benchmark_of_the_verifier(tmp_path: Path) -> None:
    script = ROOT / "examples" / "benchmarks" / "verifier.py"
    text = run_script(script, "--quick", cwd=tmp_path)
    assert "0 missed" in text
    assert "3 right files: 0 false alarms" in text
