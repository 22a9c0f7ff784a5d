"""Every operator of ONNX over its versions and attributes: one-operator files against themselves.

    python examples/benchmarks/operators_sweep.py            # every file: ten minutes
    python examples/benchmarks/operators_sweep.py --quick    # every 60th
    python examples/benchmarks/operators_sweep.py --only LSTM GRU

The files are the examples that onnx generates for its own operators, each at every version of its
operator from opset 7 on that takes it, and the forms of older opsets that those lack. A file
verified against itself must pass with a budget of float32's size. A larger budget would mean that
the float64 answer is no truth, and that a wrong file passes too: there must be none. A refusal has
a reason in words. Anything raised but an error of bnfx is a raw error: there must be none.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measuring import save
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bnfx

FIRST, NEWEST = 7, onnx.defs.onnx_opset_version()
#: Of the table of results.
COLUMNS = ("verdict", "operator", "opset", "files", "such as")
#: A sound reference errs by less in float32.
SOUND = 1e-3
#: Input -> shape and kind ("f" floats, "p" positive floats, "i" integers below 3), or a value.
Spec = tuple[tuple[int, ...], str]
_X2, _X3, _X4 = ((3, 5), "f"), ((2, 4, 6), "f"), ((2, 3, 8, 8), "f")
_NORM = [((4,), "f"), ((4,), "f"), ((4,), "f"), ((4,), "p")]


def _recurrent(gates: int, biases: int, states: int, directions: int = 1) -> list[Any]:
    """Inputs of a recurrent layer of 3 units over 5 steps of 2 sequences of 4 features."""
    d = directions
    x, lengths = ((5, 2, 4), "f"), np.array([5, 3], np.int32)
    weights = [((d, gates * 3, 4), "f"), ((d, gates * 3, 3), "f"), ((d, biases * 3), "f")]
    return [x, *weights, lengths, *[((d, 2, 3), "f")] * states]


#: Operator, inputs, values of attributes that are all combined, number of outputs.
OLDER: Sequence[Any] = (
    *((name, [shape], {"axis": [None, 0, 1, -1]}, 1)
      for name in ("Softmax", "LogSoftmax", "Hardmax", "Flatten") for shape in (_X2, _X3, _X4)),
    ("BatchNormalization", [((2, 4, 6, 6), "f"), *_NORM],
     {"epsilon": [None, 1e-2], "momentum": [None, 0.5, 1.0], "spatial": [None, 1]}, 1),
    ("BatchNormalization", [((2, 4), "f"), *_NORM], {"momentum": [None, 0.9]}, 1),
    ("BatchNormalization", [((2, 4, 5), "f"), *_NORM], {"momentum": [None, 0.9]}, 1),
    ("InstanceNormalization", [((2, 4, 5), "f"), *_NORM[:2]], {"epsilon": [None, 1e-2]}, 1),
    ("LRN", [((2, 6, 5, 5), "f")], {"size": [3, 4], "alpha": [None, 0.5], "bias": [None, 2.0]}, 1),
    ("LRN", [((2, 6, 5), "f")], {"size": [3]}, 1),
    ("LpNormalization", [_X3], {"axis": [None, 0, 1], "p": [None, 1]}, 1),
    ("MeanVarianceNormalization", [_X4], {"axes": [None, [0, 2, 3], [1]]}, 1),
    *((name, [_X3], {"axes": [None, [0], [1, 2], [-1]], "keepdims": [None, 0]}, 1)
      for name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1",
                   "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare")),
    ("ReduceLogSum", [((2, 4, 6), "p")], {"axes": [None, [0], [1, 2]], "keepdims": [None, 0]}, 1),
    ("Squeeze", [((2, 1, 3, 1), "f")], {"axes": [None, [1], [1, 3]]}, 1),
    ("Unsqueeze", [_X2], {"axes": [[0], [1, 3]]}, 1),
    ("Slice", [_X3], {"starts": [[0, 1]], "ends": [[2, -1]], "axes": [None, [1, 2]]}, 1),
    ("Split", [((4, 6), "f")], {"axis": [None, 1], "split": [None, [1, 3], [2, 4]]}, 2),
    ("Clip", [_X2], {"min": [None, -0.5], "max": [None, 0.5]}, 1),
    ("Pad", [_X4], {"pads": [[0, 0, 1, 2, 0, 0, 2, 1]], "mode": [None, "reflect", "edge"],
                    "value": [None, 1.5]}, 1),
    ("TopK", [_X3], {"axis": [None, 1], "k": [2]}, 2),
    ("Dropout", [_X2], {"ratio": [None, 0.3]}, 1),
    ("Upsample", [_X4], {"scales": [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.5, 2.5]],
                         "mode": [None, "linear", "nearest"]}, 1),
    *((name, [_X4, np.array(scales, np.float32)], {"mode": [None, "linear"]}, 1)
      for name in ("Upsample", "Resize")
      for scales in ([1, 1, 2, 2], [1, 1, 1.5, 2.5], [1, 1, 0.5, 0.7])),
    ("Resize", [_X4, None, np.array([1, 1, 1.6, 0.6], np.float32)],
     {"mode": [None, "linear", "cubic"],
      "coordinate_transformation_mode": [None, "align_corners", "asymmetric", "pytorch_half_pixel"],
      "nearest_mode": [None, "floor", "ceil"]}, 1),
    ("Resize", [_X4, None, None, np.array([2, 3, 13, 5], np.int64)],
     {"mode": [None, "linear", "cubic"], "antialias": [None, 1],
      "coordinate_transformation_mode": [None, "align_corners"]}, 1),
    ("Conv", [_X4, ((4, 3, 3, 3), "f"), ((4,), "f")],
     {"auto_pad": [None, "SAME_UPPER", "SAME_LOWER", "VALID"], "strides": [None, [2, 3]],
      "dilations": [None, [2, 1]]}, 1),
    ("Conv", [((2, 4, 9), "f"), ((6, 2, 3), "f")], {"group": [2], "pads": [None, [1, 2]]}, 1),
    ("ConvTranspose", [((2, 4, 5, 5), "f"), ((4, 3, 3, 3), "f"), ((3,), "f")],
     {"auto_pad": [None, "SAME_UPPER", "SAME_LOWER", "VALID"], "strides": [None, [2, 3]],
      "output_padding": [None, [1, 1]]}, 1),
    ("ConvTranspose", [((2, 4, 5, 5), "f"), ((4, 3, 3, 3), "f")],
     {"output_shape": [[10, 12], [11, 11]], "strides": [[2, 2]],
      "auto_pad": [None, "SAME_UPPER", "SAME_LOWER"]}, 1),
    ("ConvTranspose", [((2, 4, 5), "f"), ((4, 3, 3), "f")],
     {"group": [2], "pads": [None, [1, 0]], "dilations": [None, [2]]}, 1),
    ("MaxPool", [_X4], {"kernel_shape": [[3, 2]], "strides": [None, [2, 2]],
                        "pads": [None, [1, 0, 1, 1]], "ceil_mode": [None, 1],
                        "dilations": [None, [2, 1]]}, 1),
    ("MaxPool", [_X4], {"kernel_shape": [[3, 3]], "strides": [None, [2, 2]],
                        "auto_pad": ["SAME_UPPER", "SAME_LOWER", "VALID"]}, 1),
    ("MaxPool", [_X4], {"kernel_shape": [[3, 3]], "storage_order": [None, 1],
                        "pads": [None, [1, 1, 1, 1]], "strides": [None, [2, 2]]}, 2),
    ("AveragePool", [_X4], {"kernel_shape": [[3, 2]], "strides": [None, [2, 2]],
                            "pads": [None, [1, 0, 1, 1]], "ceil_mode": [None, 1],
                            "count_include_pad": [None, 1], "dilations": [None, [2, 1]]}, 1),
    ("AveragePool", [_X4], {"kernel_shape": [[3, 3]], "strides": [None, [2, 2]],
                            "auto_pad": ["SAME_UPPER", "SAME_LOWER", "VALID"]}, 1),
    ("LpPool", [_X4], {"kernel_shape": [[3, 2]], "strides": [None, [2, 2]], "p": [None, 1],
                       "pads": [None, [1, 0, 1, 1]], "auto_pad": [None, "SAME_UPPER"]}, 1),
    *((name, [shape], {}, 1) for name in ("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
      for shape in (_X3, _X4, ((2, 3, 4, 4, 4), "f"))),
    ("GlobalLpPool", [_X4], {"p": [1, 2, 3]}, 1),
    ("LSTM", _recurrent(4, 8, 2)[:4], {"hidden_size": [3], "clip": [None, 0.2]}, 3),
    ("LSTM", [*_recurrent(4, 8, 2), ((1, 9), "f")],
     {"hidden_size": [3], "clip": [None, 0.2], "input_forget": [None, 1],
      "activations": [None, ["Relu", "Tanh", "Sigmoid"], ["HardSigmoid", "Elu", "Softsign"]]}, 3),
    ("LSTM", _recurrent(4, 8, 2, 2), {"hidden_size": [3], "direction": ["bidirectional"]}, 3),
    ("GRU", _recurrent(3, 6, 1),
     {"hidden_size": [3], "clip": [None, 0.2], "linear_before_reset": [None, 1],
      "activations": [None, ["Relu", "Tanh"]], "direction": [None, "reverse"]}, 2),
    ("GRU", _recurrent(3, 6, 1, 2), {"hidden_size": [3], "direction": ["bidirectional"]}, 2),
    ("RNN", _recurrent(1, 2, 1),
     {"hidden_size": [3], "clip": [None, 0.2], "direction": [None, "reverse"],
      "activations": [None, ["Relu"], ["Affine"], ["LeakyRelu"], ["ScaledTanh"], ["Softplus"]]}, 2),
    ("RNN", _recurrent(1, 2, 1, 2), {"hidden_size": [3], "direction": ["bidirectional"]}, 2),
    ("RNN", _recurrent(1, 2, 1),
     {"hidden_size": [3], "clip": [None, 0.4], "activation_alpha": [[0.7]],
      "activation_beta": [[0.3]], "activations": [["Affine"], ["ScaledTanh"], ["HardSigmoid"]]}, 2),
    ("LSTM", _recurrent(4, 8, 2)[:4],
     {"hidden_size": [3], "activation_alpha": [[0.1, 1.5, 0.7]], "activation_beta": [[0.4, 0.6]],
      "activations": [["HardSigmoid", "ScaledTanh", "LeakyRelu"]]}, 3),
    *(("QuantizeLinear", [((2, 3, 4), "f"), np.array(scale, np.float32), np.array(zero, kind)],
       {"axis": [None, 1, 2]}, 1)
      for scale, zero in ((0.02, 3), ([0.02] * 3, [3] * 3)) for kind in (np.uint8, np.int8)),
    *(("DequantizeLinear", [((2, 3, 4), kind), np.array(scale, np.float32), np.array(zero, kind)],
       {"axis": [None, 1]}, 1)
      for scale, zero in ((0.02, 3), ([0.02, 0.1, 1], [3, 0, 2])) for kind in ("uint8", "int8")),
    ("DequantizeLinear", [((2, 3, 4), "int32"), np.array(0.02, np.float32)], {}, 1),
    ("Gemm", [((3, 4), "f"), ((4, 5), "f"), ((5,), "f")],
     {"alpha": [None, 0.5], "beta": [None, 2.0]}, 1),
    ("Gemm", [((4, 3), "f"), ((5, 4), "f"), ((3, 1), "f")], {"transA": [1], "transB": [1]}, 1),
    ("PRelu", [_X4, ((3, 1, 1), "f")], {}, 1),
    ("Scatter", [_X2, np.array([[0, 2], [1, 0]], np.int64), ((2, 2), "f")], {"axis": [None, 1]}, 1),
    ("OneHot", [((2, 3), "i"), np.array(3, np.int64), np.array([0, 1], np.float32)],
     {"axis": [None, 0]}, 1),
    ("CumSum", [_X2, np.array(1, np.int64)], {"exclusive": [None, 1], "reverse": [None, 1]}, 1),
    ("DepthToSpace", [((2, 8, 3, 3), "f")], {"blocksize": [2], "mode": [None, "CRD"]}, 1),
    ("ArgMax", [_X3],
     {"axis": [None, 1], "keepdims": [None, 0], "select_last_index": [None, 1]}, 1),
    ("Cast", [_X2], {"to": [TensorProto.DOUBLE, TensorProto.INT32, TensorProto.FLOAT16]}, 1),
    ("EyeLike", [_X2], {"k": [None, 1], "dtype": [None, TensorProto.DOUBLE]}, 1),
    *(("Resize", [_X4, None, None, np.array([2, 3, 5, 11], np.int64)],
       {"mode": [mode], "coordinate_transformation_mode": [
           "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"],
        "antialias": [None, 1], "exclude_outside": [None, 1]}, 1) for mode in ("linear", "cubic")),
    ("RoiAlign", [_X4, np.array([[0, 0, 5, 5], [1, 2, 7, 6]], np.float32),
                  np.array([0, 1], np.int64)],
     {"mode": [None, "max"], "output_height": [2], "output_width": [3],
      "sampling_ratio": [None, 2]}, 1),
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file and the example to verify it on."""

    name: str
    operator: str
    opset: int
    model: bytes
    inputs: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of verifying a file against itself."""

    name: str
    operator: str
    opset: int
    #: "passed", "without a truth", "refused", "not run by onnxruntime", "no tensor", "raw error".
    verdict: str
    budget: float
    reason: str


def of_onnx() -> Iterator[File]:
    """The examples of onnx, at every version of their operator that takes them."""
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):
        if case.model is None or not case.data_sets:
            continue
        nodes = case.model.graph.node
        plain = all(node.domain in ("", "ai.onnx") for node in nodes)
        tensors = all(v.type.HasField("tensor_type") for v in case.model.graph.input)
        if not plain or not tensors or "_expanded" in case.name:
            continue
        inputs = tuple(np.asarray(array) for array in case.data_sets[0][0])
        own = next(o.version for o in case.model.opset_import if o.domain in ("", "ai.onnx"))
        for opset in {own, *versions(nodes[0].op_type)}:
            if (model := at_opset(case.model, opset)) is not None:
                yield File(case.name, nodes[0].op_type, opset, model, inputs)


def older() -> Iterator[File]:
    """The forms of `OLDER`, at every version of their operator that takes them."""
    rng = np.random.default_rng(0)
    for operator, specs, choices, outputs in OLDER:
        values = [None if spec is None else _value(spec, rng) for spec in specs]
        for picked in itertools.product(*choices.values()):
            attributes = {k: v for k, v in zip(choices, picked, strict=True) if v is not None}
            model, inputs = _one_node(operator, values, specs, attributes, outputs)
            said = ", ".join(f"{k}={v}" for k, v in attributes.items())
            for opset in versions(operator):
                if (made := at_opset(model, opset)) is not None:
                    yield File(f"{operator}({said})", operator, opset, made, inputs)


def _value(spec: Any, rng: np.random.Generator) -> np.ndarray:
    made: np.ndarray
    if isinstance(spec, np.ndarray):
        return spec
    shape, kind = spec
    if kind in ("f", "p"):
        noise = rng.standard_normal(shape)
        made = (np.abs(noise) + 0.1 if kind == "p" else noise).astype(np.float32)
    else:
        made = rng.integers(0, 3, shape).astype(np.dtype(np.int64 if kind == "i" else kind))
    return made


def _one_node(
    operator: str,
    values: Sequence[np.ndarray | None],
    specs: Sequence[Any],
    attributes: dict[str, Any],
    outputs: int,
) -> tuple[onnx.ModelProto, tuple[np.ndarray, ...]]:
    """A model of one node; what `specs` gives as a value is stored in it."""
    names = ["" if value is None else f"x{i}" for i, value in enumerate(values)]
    results = [f"y{i}" for i in range(outputs)]
    stored, taken, inputs = [], [], []
    for name, value, spec in zip(names, values, specs, strict=True):
        if value is None:
            continue
        if isinstance(spec, np.ndarray):
            stored.append(numpy_helper.from_array(value, name))
            continue
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        taken.append(helper.make_tensor_value_info(name, kind, value.shape))
        inputs.append(value)
    node = helper.make_node(operator, names, results, **attributes)
    told = [onnx.ValueInfoProto(name=name) for name in results]
    graph = helper.make_graph([node], "one", taken, told, stored)
    return helper.make_model(graph, ir_version=9), tuple(inputs)


def versions(operator: str) -> list[int]:
    """The opsets from 7 on in which an operator changed; 7 itself where it is older."""
    schemas = onnx.defs.get_all_schemas_with_history()
    since = [s.since_version for s in schemas if s.name == operator and not s.domain]
    old = [FIRST] if any(v <= FIRST for v in since) else []
    return sorted({*old, *(v for v in since if FIRST <= v <= NEWEST)})


def at_opset(model: onnx.ModelProto, opset: int) -> bytes | None:
    """The model at another opset, with the types of its outputs; None where it is not valid."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.opset_import[:]
    copy.opset_import.append(helper.make_opsetid("", opset))
    try:
        if not all(value.type.WhichOneof("value") for value in copy.graph.output):
            copy = onnx.shape_inference.infer_shapes(copy, strict_mode=True)
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError):
        return None
    return bytes(copy.SerializeToString())


def verify(file: File) -> Outcome:
    """Verify a file against itself, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    budget = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        f = Path(folder) / "one.onnx"
        f.write_bytes(file.model)
        try:
            args = tuple(map(_tensor, file.inputs))
            report = bnfx.verify_onnx(f, f, args or None, num_inputs=2, isolate=False)
        except TypeError as error:  # strings and floats that torch has no dtype for
            known = "can't convert np.ndarray" in str(error)
            verdict, reason = "no tensor" if known else "raw error", f"TypeError: {error}"
        except bnfx.BnfxError as error:
            runs = "onnxruntime cannot" not in str(error)
            verdict, reason = "refused" if runs else "not run by onnxruntime", str(error)
        except Exception as error:  # noqa: BLE001  # what this looks for
            verdict, reason = "raw error", f"{type(error).__name__}: {error}"
        else:
            budget = max((check.budget for check in report.outputs), default=budget)
            verdict, reason = "passed", ""
            if not report:
                verdict, reason = "refused", f"{report.status}: {report.first_divergence}"
            elif not budget <= SOUND and report.precision == "fp32":
                verdict = "without a truth"
    short = reason.replace(str(f), "the file").partition("\n")[0]
    return Outcome(file.name, file.operator, file.opset, verdict, budget, short)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # of ml_dtypes, unknown to torch
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def files(only: Sequence[str]) -> list[File]:
    """All files, each once."""
    found = {(f.operator, f.opset, f.model): f for f in itertools.chain(of_onnx(), older())}
    return [f for f in found.values() if not only or f.operator in only]


def grouped(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """One row for each verdict and operator, with a file that stands for the others."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.verdict, outcome.operator), []).append(outcome)
    for (verdict, operator), mine in sorted(groups.items()):
        opsets = " ".join(map(str, sorted({o.opset for o in mine})))
        worst = max(mine, key=lambda o: o.budget if o.budget == o.budget else 0.0)
        said = mine[0].reason or f"{worst.name}: budget {worst.budget:.1e}"
        found = (verdict, operator, opsets, len(mine), said[:200])
        yield dict(zip(COLUMNS, found, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every 60th file")
    parser.add_argument("--only", nargs="+", default=[], help="these operators")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="folder for operators_sweep.csv and .json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=160)
    start = time.perf_counter()
    chosen = files(options.only)[:: 60 if options.quick else 1]
    outcomes: list[Outcome] = []
    shown = Progress(console=console, transient=True)
    with shown as progress, ProcessPoolExecutor(options.jobs) as pool:
        done = pool.map(verify, chosen, chunksize=8)
        outcomes += progress.track(done, total=len(chosen), description="files")
    counts = Counter(o.verdict for o in outcomes)
    rows = list(grouped(outcomes))
    table = Table(*COLUMNS, title="Files that did not pass")
    for row in rows:
        if row["verdict"] != "passed":
            table.add_row(*(str(row[column])[:110] for column in COLUMNS))
    console.print(table)
    console.print(
        f"{len(outcomes)} files of {len({o.operator for o in outcomes})} operators, "
        f"opsets {FIRST} to {NEWEST}: "
        + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    )
    bad = counts["without a truth"] + counts["raw error"]
    console.print(f"passed without a truth or ended in a raw error: {bad}")
    console.print(f"{time.perf_counter() - start:.0f} s")
    if options.out is not None:
        save(options.out, "operators_sweep", rows, counts=dict(counts))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
