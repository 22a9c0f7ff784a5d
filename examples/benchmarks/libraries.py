"""Networks of libraries that the zoos don't hold: insertion, folding in each form, programs.

Each network keeps its class when BatchNorm is inserted and when it is folded in module form; the
table tells sites in both forms of insertion, BatchNorms left in module form, in graph form and as a
program (as exported, in core ATen, read from a file), the largest error of each relative to the
largest output in float64, and what failed. Needs segmentation_models_pytorch, monai, ultralytics,
open_clip_torch, efficientnet_pytorch and pretrainedmodels; what is missing is left out.

    python examples/benchmarks/libraries.py                # goes on from results/libraries.csv
    python examples/benchmarks/libraries.py smp:Unet monai
"""

from __future__ import annotations

import copy
import csv
import importlib
import io
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fold_networks import randomise
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bnfx
from bnfx.cli.libraries import open_torchvision
from bnfx.graphs.observed import tensors_in
from bnfx.reports.report import InsertReport

RESULT = Path(__file__).parent / "results" / "libraries.csv"
_IMAGE = (2, 3, 64, 64)
_UNETS = ("Unet", "UnetPlusPlus", "FPN", "Linknet", "PSPNet", "MAnet", "DeepLabV3Plus")
_ENCODERS = ("mobilenet_v2", "efficientnet-b0", "vgg11_bn", "densenet121", "timm-regnetx_002")


def library(name: str) -> Any:
    """A package that is no dependency."""
    return importlib.import_module(name)


def segmenter(kind: str, encoder: str = "resnet18") -> nn.Module:
    """Of segmentation_models_pytorch."""
    made: nn.Module = getattr(library("segmentation_models_pytorch"), kind)(
        encoder, encoder_weights=None
    )
    return made


def medical(kind: str, **options: Any) -> nn.Module:
    """Of MONAI."""
    made: nn.Module = getattr(library("monai.networks.nets"), kind)(**options)
    return made


def yolo(name: str) -> nn.Module:
    """Of ultralytics."""
    tasks = library("ultralytics.nn.tasks")
    kinds = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel"}
    kind = next((kinds[end] for end in kinds if name.endswith(end)), "DetectionModel")
    kind = "RTDETRDetectionModel" if name.startswith("rtdetr") else kind
    made: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    return made


def transformer(kind: str, **options: Any) -> nn.Module:
    """Of transformers, small."""
    package = library("transformers")
    config = getattr(package, f"{kind}Config")(**options)
    made: nn.Module = getattr(package, f"{kind}ForImageClassification")(config)
    return made


def effnet() -> nn.Module:
    """Of efficientnet_pytorch, whose activations are autograd functions."""
    made: nn.Module = library("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0")
    return made


def pretrained(name: str) -> nn.Module:
    """Of pretrainedmodels, with random weights."""
    made: nn.Module = vars(library("pretrainedmodels"))[name](pretrained=None)
    return made


def visual() -> nn.Module:
    """The image tower of open_clip."""
    kind = library("open_clip.modified_resnet").ModifiedResNet
    made: nn.Module = kind((1, 1, 1, 1), output_dim=64, heads=4, image_size=64, width=16)
    return made


def detector(name: str) -> nn.Module:
    """A whole detector of torchvision."""
    made: nn.Module = open_torchvision().get_model(name, weights=None, weights_backbone=None)
    return made


_VOLUME: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_PLANE: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_STEPS: dict[str, Any] = {"channels": (4, 8, 16), "strides": (2, 2)}
_DYNAMIC: dict[str, Any] = {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "norm_name": "batch",
}

_SMALL: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [8, 16]}
_SCALES: dict[str, Any] = {"width_coefficient": 1.0, "depth_coefficient": 1.0}
_ONE = (2, 1, 32, 32)
_FEW = (2, 3, 224, 224)

#: Name -> how it is made, and the shape of its input.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"smp:{kind}": (partial(segmenter, kind), _IMAGE) for kind in _UNETS},
    "smp:PAN": (partial(segmenter, "PAN"), (1, 3, 256, 256)),
    **{f"smp:Unet:{name}": (partial(segmenter, "Unet", name), _IMAGE) for name in _ENCODERS},
    "monai:UNet": (partial(medical, "UNet", **_PLANE, **_STEPS, norm="batch"), _ONE),
    "monai:UNet:residual": (
        partial(medical, "UNet", **_VOLUME, **_STEPS, norm="batch", num_res_units=2),
        (1, 1, 16, 16, 16),
    ),
    "monai:AttentionUnet": (partial(medical, "AttentionUnet", **_PLANE, **_STEPS), _ONE),
    "monai:BasicUNet": (
        partial(medical, "BasicUNet", **_PLANE, features=(4, 4, 8, 8, 16, 4), norm="batch"),
        _ONE,
    ),
    "monai:SegResNet": (
        partial(medical, "SegResNet", **_PLANE, init_filters=8, norm="batch"),
        _ONE,
    ),
    "monai:DynUNet": (partial(medical, "DynUNet", **_PLANE, **_DYNAMIC), _ONE),
    "monai:VNet": (partial(medical, "VNet", **_VOLUME), (1, 1, 32, 32, 32)),
    "monai:HighResNet": (partial(medical, "HighResNet", **_PLANE), _ONE),
    "monai:DenseNet121": (partial(medical, "DenseNet121", **_PLANE), (2, 1, 64, 64)),
    "monai:resnet10": (
        partial(medical, "resnet10", spatial_dims=3, n_input_channels=1, num_classes=2),
        (1, 1, 32, 32, 32),
    ),
    "monai:SEResNet50": (
        partial(medical, "SEResNet50", spatial_dims=2, in_channels=1, num_classes=2),
        (2, 1, 64, 64),
    ),
    "monai:EfficientNetBN": (
        partial(medical, "EfficientNetBN", model_name="efficientnet-b0", pretrained=False),
        _IMAGE,
    ),
    **{
        f"ultralytics:{name}": (partial(yolo, name), (1, 3, 64, 64))
        for name in ("yolov8n", "yolo11n-seg", "yolo11n-pose", "yolo11n-cls", "yolov5n", "yolov10n")
    },
    "efficientnet_pytorch:b0": (effnet, _IMAGE),
    "pretrainedmodels:bninception": (partial(pretrained, "bninception"), _FEW),
    "pretrainedmodels:se_resnet50": (partial(pretrained, "se_resnet50"), _FEW),
    "pretrainedmodels:polynet": (partial(pretrained, "polynet"), (1, 3, 235, 235)),
    "open_clip:ModifiedResNet": (visual, _IMAGE),
    **{
        f"torchvision:{name}": (partial(detector, name), (1, 3, 96, 96))
        for name in ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
    },
    "transformers:ResNet": (partial(transformer, "ResNet", **_SMALL), _IMAGE),
    "transformers:RegNet": (partial(transformer, "RegNet", **_SMALL, groups_width=8), _IMAGE),
    "transformers:MobileNetV2": (partial(transformer, "MobileNetV2"), _IMAGE),
    "transformers:EfficientNet": (
        partial(transformer, "EfficientNet", hidden_dim=1280, **_SCALES),
        _IMAGE,
    ),
    "transformers:Levit": (partial(transformer, "Levit"), _FEW),
    "transformers:MobileViT": (partial(transformer, "MobileViT", num_hidden_layers=2), _IMAGE),
    "transformers:Cvt": (partial(transformer, "Cvt", depth=[1, 1, 1]), _IMAGE),
}

HEADS = (
    *("network", "class kept", "sites: module", "sites: graph", "train, copy, pickle, checkpoint"),
    *("BN", "left: module", "left: graph", "left: program", "left: core ATen", "moved"),
    *("error: module", "error: graph", "error: program", "error: core ATen", "failed"),
)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The floating-point tensors that it returns."""
    with torch.no_grad():
        return [t for t in tensors_in(model(x)) if t.is_floating_point() and t.numel()]


def error(model: nn.Module, x: Tensor, truth: list[Tensor]) -> str:
    """The largest difference, relative to the largest output."""
    pairs = zip(outputs(model, x), truth, strict=True)
    return f"{max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs):.1e}"


def left(folded: Any) -> int:
    """BatchNorms that a fold left."""
    return sum(bn["verdict"] != "folded" for bn in bnfx.report(folded).to_dict()["batch_norms"])


def sites(inserted: nn.Module) -> int:
    """How many BatchNorms were inserted."""
    done = bnfx.report(inserted)
    assert isinstance(done, InsertReport)
    return Counter(site.action for site in done.sites)["inserted"]


class Row(dict[str, Any]):
    """A row of the table, and what failed."""

    def attempt(self, what: str, act: Callable[[], Any]) -> Any:
        """What `act` gives; a failure is a result."""
        try:
            return act()
        except Exception as refusal:  # noqa: BLE001  # of anyone's code
            said = f"{type(refusal).__name__}: {str(refusal).strip()}".partition("\n")[0][:160]
            self["failed"] = "; ".join(filter(None, (self.get("failed", ""), f"{what}: {said}")))
            return None


def measure(name: str) -> Row:
    """All of it for one network."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x, row = make().eval(), torch.randn(shape), Row(network=name)
    insertion(row, model, x)
    model = randomise(model).double()
    row.attempt("run", lambda: folding(row, model, x.double()))
    return row


def insertion(row: Row, model: nn.Module, x: Tensor) -> None:
    """Insert in both forms."""
    inserted = row.attempt("insert", partial(bnfx.insert_bn, model, (x,)))
    if inserted is not None:
        row["class kept"] = isinstance(inserted, type(model))
        row["sites: module"] = sites(inserted)
        row["train, copy, pickle, checkpoint"] = row.attempt(
            "use", partial(used, model, inserted, x)
        )
    graph = row.attempt("insert, graph", partial(bnfx.insert_bn, model, (x,), form="graph"))
    if graph is not None:
        row["sites: graph"] = sites(graph)


def used(model: nn.Module, inserted: nn.Module, x: Tensor) -> bool:
    """A train step, a deep copy, a pickle where the model has one, the old checkpoint."""
    copied = copy.deepcopy(inserted)
    copied.load_state_dict(model.state_dict(), strict=True)
    pickles = Row()
    if pickles.attempt("pickle", lambda: pickle.dumps(model)) is not None:
        pickle.loads(pickle.dumps(inserted))
    copied.train()
    try:
        out = copied(torch.cat([x, x]))
    except (ValueError, RuntimeError, AssertionError):  # it wants labels to train
        return True
    floats = [t.float().square().mean() for t in tensors_in(out) if t.requires_grad]
    torch.stack(floats).sum().backward()
    return any(p.grad is not None for p in copied.parameters())


def folding(row: Row, model: nn.Module, x: Tensor) -> None:
    """Fold in both forms, and as programs."""
    truth = outputs(model, x)
    for form in ("module", "graph"):
        folded = row.attempt(form, partial(folded_as, model, x, form))
        if folded is None:
            continue
        row[f"left: {form}"] = left(folded)
        row[f"error: {form}"] = row.attempt(form, partial(error, folded, x, truth))
        if form == "module":
            done = bnfx.report(folded).to_dict()
            row["BN"], row["moved"] = len(done["batch_norms"]), len(done["moved"])
            row["class kept"] = row.get("class kept", True) and type(folded) is type(model)
    program = row.attempt("torch.export", partial(exported, model, x))
    if program is None:
        return
    for name, source in (("program", program), ("core ATen", program.run_decompositions())):
        again = row.attempt(name, partial(folded_program, source))
        if again is not None:
            row[f"left: {name}"] = left(again)
            row[f"error: {name}"] = row.attempt(name, partial(error, again.module(), x, truth))


def folded_as(model: nn.Module, x: Tensor, form: str) -> nn.Module:
    """`fold_bn` in a form by its name."""
    fold: Any = bnfx.fold_bn
    done: nn.Module = fold(model, (x,), form=form)
    return done


def folded_program(source: ExportedProgram) -> ExportedProgram:
    """The program folded, written and read."""
    file = io.BytesIO()
    torch.export.save(bnfx.fold_bn(source), file)
    file.seek(0)
    return torch.export.load(file)


def exported(model: nn.Module, x: Tensor) -> ExportedProgram:
    """The program, its batch free where that can be."""
    try:
        both = torch.cat([x, x])
        return torch.export.export(model, (both,), dynamic_shapes=({0: Dim("batch", max=64)},))
    except Exception:  # noqa: BLE001  # it may be that only the batch is in the way
        return torch.export.export(model, (x,))


def main(words: list[str]) -> int:
    """Measure, print, and write the table where all networks were asked for."""
    warnings.simplefilter("ignore")
    open_torchvision()
    chosen = [n for n in NETWORKS if not words or any(n.startswith(word) for word in words)]
    rows = []
    if RESULT.is_file() and not words:
        rows = list(csv.DictReader(RESULT.open(encoding="utf-8")))
    known = {row["network"] for row in rows}
    for name in chosen:
        if name in known:
            continue
        try:
            row = measure(name)
        except ImportError as missing:
            print(f"{name}: {missing}", file=sys.stderr)
            continue
        rows.append(row)
        print(dict(row), flush=True)
        if not words:
            with RESULT.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, HEADS, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
