"""deploy with the real exporter and the real onnxruntime: what lands, and what stays on failure."""

from __future__ import annotations

import json
import resource
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import bnfx
from bnfx.onnx_files.placing import data_files
from bnfx.passes import FoldBatchNorm
from bnfx.tuning import AS_ASKED
from tests.support.fault_networks import NETWORKS, Plain
from tests.support.laws import randomise
from tests.verification.test_verify import DYNAMIC, Two, export


def plain(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return randomise(Plain(), seed), torch.randn(2, 3, 9, 9)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_verified_file_and_a_report(tmp_path: Path) -> None:
    model, x = randomise(Two()), torch.randn(1, 3, 8, 8)
    f, written = tmp_path / "net.onnx", tmp_path / "report.json"
    steps: list[str] = []
    done = bnfx.deploy(
        model, (x,), f, report=written, dynamic_shapes=DYNAMIC, progress=steps.append
    )
    assert done
    assert steps == ["fold", "export", "verify", "ledger", "report"]
    assert names(tmp_path) == ["net.onnx", "report.json"]
    told = json.loads(written.read_text())
    assert told["status"] == "deployed"
    assert told["verify"]["status"] == "passed"
    assert set(told["seconds"]) == {"fold", "export", "verify", "ledger"}
    assert "deployed" in str(done)


def test_a_failure_keeps_the_old_file_and_leaves_a_bundle(tmp_path: Path) -> None:
    model, x = plain()
    f, written = tmp_path / "net.onnx", tmp_path / "report.txt"
    f.write_bytes(b"older")
    with pytest.raises(bnfx.VerificationError, match="not written") as caught:
        bnfx.deploy(model, x, f, max_ratio=1e-3, bundle=tmp_path / "bundle", report=written)
    assert caught.value.report.status == "failed"
    assert not caught.value.report
    assert f.read_bytes() == b"older"
    assert names(tmp_path) == ["bundle", "net.onnx", "report.txt"]
    assert "failed" in written.read_text()
    kept = {"net.onnx", "inputs.npz", "report.json", "report.txt", "environment.json"}
    assert set(names(tmp_path / "bundle")) == kept
    # The bundle's file really is what failed.
    again = bnfx.verify_onnx(model, tmp_path / "bundle" / "net.onnx", x, max_ratio=1e-3)
    assert not again


@pytest.mark.parametrize("step", ["report", "opset", "train", "shape"])
def test_an_error_leaves_nothing_behind(tmp_path: Path, step: str) -> None:
    model, x = plain()
    f = tmp_path / "net.onnx"
    f.write_bytes(b"older")
    options: dict[str, Any] = {}
    if step == "report":
        options["report"] = tmp_path / "report.pdf"
    if step == "opset":
        options["opset_version"] = 26
    if step == "train":
        model.get_submodule("a_bn").train()
    if step == "shape":
        x = torch.randn(2, 5, 9, 9)
    with pytest.raises(bnfx.BnfxError):
        bnfx.deploy(model, x, f, **options)
    assert f.read_bytes() == b"older"
    assert names(tmp_path) == ["net.onnx"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    model, x = plain()
    f = tmp_path / "net.onnx"
    f.write_bytes(b"older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(bnfx.ExportError, match="as it was"):
            bnfx.deploy(model, x, f)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f.read_bytes() == b"older"
    assert names(tmp_path) == ["net.onnx"]


def test_permissions_stay_and_links_are_followed(tmp_path: Path) -> None:
    model, x = plain()
    real, link = tmp_path / "v1.onnx", tmp_path / "net.onnx"
    real.write_bytes(b"older")
    real.chmod(0o640)
    link.symlink_to("v1.onnx")
    bnfx.export_onnx(bnfx.fold_bn(model, x), x, link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert bnfx.verify_onnx(model, link, x)
    far = tmp_path / "elsewhere"
    far.mkdir()
    (far / "net.onnx").symlink_to(real)
    with pytest.raises(bnfx.ExportError, match="link"):
        bnfx.export_onnx(model, x, far / "net.onnx", external_data=True)


def test_weights_beside_the_graph_are_replaced_with_it(tmp_path: Path) -> None:
    (first, x), (second, _) = plain(0), plain(1)
    f = tmp_path / "net.onnx"
    bnfx.deploy(first, x, f, external_data=True)
    (old,) = data_files(f)
    bnfx.deploy(second, x, f, external_data=True)
    (new,) = data_files(f)
    assert old != new
    assert names(tmp_path) == sorted(["net.onnx", new.name])
    assert bnfx.verify_onnx(second, f, x)
    assert not bnfx.verify_onnx(first, f, x)
    bnfx.deploy(second, x, f, external_data=False)
    assert names(tmp_path) == ["net.onnx"]


def test_an_interruption_between_weights_and_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, x), (second, _) = plain(0), plain(1)
    f = tmp_path / "net.onnx"
    bnfx.export_onnx(bnfx.fold_bn(first, x), x, f, external_data=True)
    replace: Callable[[Path, Path], Path] = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if target == f:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        bnfx.export_onnx(bnfx.fold_bn(second, x), x, f, external_data=True)
    assert bnfx.verify_onnx(first, f, x)


def test_weights_swapped_or_cut_are_found(tmp_path: Path) -> None:
    (first, x), (second, _) = plain(0), plain(1)
    f, g = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for model, path in ((first, f), (second, g)):
        bnfx.export_onnx(bnfx.fold_bn(model, x), x, path, external_data=True)
    (mine,), (theirs,) = data_files(f), data_files(g)
    content = mine.read_bytes()
    mine.write_bytes(theirs.read_bytes())
    assert not bnfx.verify_onnx(first, f, x)
    mine.write_bytes(content[:-8])
    with pytest.raises(bnfx.VerificationError, match="needs bytes"):
        bnfx.verify_onnx(first, f, x)
    mine.write_bytes(content)
    assert bnfx.verify_onnx(first, f, x)


class Wide(nn.Module):
    """Arguments by position and name, a dict and a tuple, and a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(
        self,
        pixels: dict[str, Tensor],
        pair: tuple[Tensor, Tensor],
        *,
        scale: Tensor,
        shift: Tensor,
    ) -> dict[str, Tensor]:
        y = torch.relu(self.bn(self.conv(pixels["image"]))).mean((2, 3)) + pixels["bias"]
        return {"features": y, "scores": self.head(y * pair[0] - pair[1]) * scale + shift}


def test_dicts_tuples_and_keywords(tmp_path: Path) -> None:
    model = randomise(Wide())
    pixels = {"image": torch.randn(2, 3, 6, 6), "bias": torch.randn(2, 8)}
    args = (pixels, (torch.randn(2, 8), torch.randn(2, 8)))
    # By name in another order than the signature's.
    kwargs = {"shift": torch.randn(2, 4), "scale": torch.randn(2, 4)}
    done = bnfx.deploy(model, args, tmp_path / "net.onnx", kwargs=kwargs)
    assert len(done.verify.outputs) == 2
    assert len(done.export.inputs) == 6


def test_names_of_inputs_and_outputs(tmp_path: Path) -> None:
    network = next(network for network in NETWORKS if network.name == "mixed")
    model, args = network.made(0)
    done = bnfx.deploy(
        model,
        args,
        tmp_path / "net.onnx",
        input_names=["image", "words"],
        output_names=["vectors", "scores"],
        dynamic_shapes=network.dynamic,
    )
    assert list(done.export.inputs) == ["image", "words"]
    assert list(done.export.outputs) == ["vectors", "scores"]
    assert done.verify.batch_sizes == (2, 1, 7)


@pytest.mark.parametrize("opset", [18, 21, 25])
def test_opsets(tmp_path: Path, opset: int) -> None:
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"onnx {onnx.__version__} knows no opset {opset}")
    model, x = plain()
    done = bnfx.deploy(model, x, tmp_path / "net.onnx", opset_version=opset)
    assert done.export.opset == opset
    with pytest.raises(bnfx.ExportError, match="18 to"):
        bnfx.deploy(model, x, tmp_path / "net.onnx", opset_version=17)


def test_the_newest_opset_is_that_of_the_exporter() -> None:
    from onnxscript.version_converter import _version_converter

    from bnfx.version import OPSETS

    assert OPSETS[-1] == _version_converter.SUPPORTED_MAX_ONNX_OPSET


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = plain()
    model, x = model.to(dtype), x.to(dtype)
    f = tmp_path / "net.onnx"
    done = bnfx.deploy(model, x, f, dynamic_shapes=DYNAMIC)
    assert done.verify.precision == {"torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(dtype)]
    assert done.verify.tiers[0].checked == done.verify.tiers[0].of > 0
    proto = onnx.load(f)
    tensor = next(t for t in proto.graph.initializer if t.name == "a.weight")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] = array[0] * 1.25
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, "a.weight"))
    onnx.save(proto, f)
    report = bnfx.verify_onnx(model, f, x)
    assert not report
    assert report.divergence is not None
    assert report.divergence.module == "a"


class Branches(nn.Module):
    """Four convolutions of one input, which folding makes one of."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(sum(way(x) for way in self.ways))
        return y


class Padded(nn.Module):
    """A BatchNorm before a convolution that pads zeros: only a map lets its shift through."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.bn(x))
        return y


def test_the_fastest_way_is_kept_and_told(tmp_path: Path) -> None:
    """Which one is the machine's affair; that it is the report's fastest, and its file, is not."""
    model, x = randomise(Branches().eval()), torch.randn(1, 8, 9, 9)
    steps: list[str] = []
    f, again = tmp_path / "net.onnx", tmp_path / "again.onnx"
    page = tmp_path / "net.html"
    done = bnfx.deploy(model, x, f, tune=True, progress=steps.append, report=page)
    assert steps == ["tune", "fold", "export", "verify", "ledger", "report"]
    assert "Ways of folding" in page.read_text()
    assert done.tuning is not None
    arms = {arm.arm: arm for arm in done.tuning.arms}
    # Bounds and maps change nothing here, and files that are alike run once.
    assert set(arms) == {AS_ASKED, "merge_branches off"}
    merged = not done.fold_options
    apart = arms["merge_branches off"].upper_quartile < arms[AS_ASKED].lower_quartile
    assert merged != apart
    bnfx.deploy(model, x, again, fold_options=done.fold_options)
    assert f.read_bytes() == again.read_bytes()
    assert "fastest options" in str(done)
    assert names(tmp_path) == ["again.onnx", "net.html", "net.onnx"]


def test_a_way_that_may_not_be_is_no_way(tmp_path: Path) -> None:
    """Maps hold for one size of images, and this file takes any."""
    model, x = randomise(Padded().eval()), torch.randn(2, 3, 9, 9)
    size = {0: "batch", 2: "height", 3: "width"}
    done = bnfx.deploy(model, x, tmp_path / "net.onnx", dynamic_shapes=({**size},), tune=True)
    assert done
    assert not done.fold_options.get("border_maps")
    with pytest.raises(bnfx.VerificationError, match="BatchNorms stay"):
        bnfx.deploy(
            model,
            x,
            tmp_path / "none.onnx",
            tune=True,
            max_batch_norms_left=0,
            fold_options={"border_maps": False, "thresholds": False},
        )
    done = bnfx.deploy(model, x, tmp_path / "all.onnx", tune=True, max_batch_norms_left=0)
    assert done.fold_options["border_maps"]


def test_benchmark_in_deploy(tmp_path: Path) -> None:
    model, x = plain()
    done = bnfx.deploy(model, x, tmp_path / "net.onnx", benchmark=True)
    assert done.benchmark is not None
    assert len(done.benchmark.arms) == 5
    assert names(tmp_path) == ["net.onnx"]


def test_inspect_lists_every_batch_norm(tmp_path: Path) -> None:
    _, f, _ = export(tmp_path)
    found = bnfx.inspect_onnx(f)
    (norm,) = found.batch_norms
    assert (norm.module, norm.channels, norm.training_mode) == ("last", 8, False)
    assert found.by_bnfx == bnfx.__version__
    assert found.inputs == {"x": "float32[batch,3,8,8]"}


def test_ledger_says_who_removed_what(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    found = bnfx.removal_ledger(model, (x,), f)
    removed = {bn.path: bn.removed_by for bn in found.batch_norms}
    assert removed.pop("bn") == "bnfx"
    # 1.31 removes the other one, 1.23 does not
    new = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)
    assert removed["last"] in ({"onnxruntime full"} if new else {"onnxruntime full", None})
    assert found.left["onnxruntime extended"] == 1
    assert bnfx.removal_ledger(None, f=f).left["source"] == 1
    assert bnfx.removal_ledger(model, (x,)).left == found.left


class Counted(Plain):
    """A network that counts how often it is copied."""

    copies = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        type(self).copies += 1
        return super().__reduce_ex__(protocol)


def test_one_folding_serves_the_file_its_verification_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: Counter[str] = Counter()

    def counting(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            called[name] += 1
            return real(*args, **kwargs)

        return counted

    for owner, name in ((FoldBatchNorm, "match"), (fx.Tracer, "trace"), (torch.export, "export")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), name))
    torch.manual_seed(0)
    model, x = randomise(Counted(), 0), torch.randn(2, 3, 9, 9)
    assert bnfx.deploy(model, x, tmp_path / "net.onnx", report=tmp_path / "net.html")
    # The exporter traces with torch.export, and twice more what that gave.
    assert called == {"match": 1, "trace": 1 + 2, "export": 1}
    assert Counted.copies <= 6


def test_more_batch_norms_than_may_stay_stop_before_the_export(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Sigmoid()), torch.randn(2, 3, 4, 4)
    page, steps = tmp_path / "a.html", list[str]()
    with pytest.raises(bnfx.VerificationError, match="1 BatchNorms stay, and at most 0") as caught:
        bnfx.deploy(
            randomise(model),
            x,
            tmp_path / "net.onnx",
            max_batch_norms_left=0,
            report=page,
            progress=steps.append,
        )
    assert isinstance(caught.value.report, bnfx.FoldReport)
    assert steps == ["fold"]
    assert names(tmp_path) == ["a.html"]
