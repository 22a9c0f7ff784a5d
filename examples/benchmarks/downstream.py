"""What comes after bnfx, tried for real: each tool on its own, and with fold_bn before it.

Counts the BatchNorms that are left in what each tool makes, and runs it. Each run is a process of
its own. A tool that is not installed is skipped. Writes downstream.md, .csv and .json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import fold_peers as peers
import onnx
import torch
from fold_networks import build, example, randomise
from fold_zoo import distance, outputs
from measuring import in_child, progress_bar, save, start
from rich.console import Console
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import bnfx

#: Small, and each with BatchNorms at another place.
NETWORKS = (
    *("torchvision:resnet18", "timm:test_byobnet", "timm:resnetv2_18", "timm:levit_128s"),
    "torchvision:densenet121",
)
_aten = torch.ops.aten


def norms(graph: fx.Graph) -> int:
    """Calls of BatchNorm in a graph."""
    return sum("batch_norm" in str(node.target) for node in graph.nodes)


def program_of(model: nn.Module, x: Tensor, *, fold: bool) -> ExportedProgram:
    """The model as a program, folded or not."""
    program = torch.export.export(model, (x,))
    return bnfx.fold_bn(program) if fold else program


class Roots:
    """Counts the square roots in what inductor is about to compile: each BatchNorm has one."""

    found = 0

    def __call__(self, graph: fx.Graph) -> None:
        """Look at one graph."""
        wanted = (_aten.sqrt.default, _aten.rsqrt.default)
        self.found += sum(node.target in wanted for node in graph.nodes)

    def uuid(self) -> None:
        """No cache."""


def compiled(model: nn.Module, x: Tensor, *, fold: bool, freezing: bool) -> tuple[int, Any]:
    """torch.compile with inductor."""
    from torch._inductor import config

    model, roots = bnfx.fold_bn(model, (x,)) if fold else model, Roots()
    chosen: dict[str, Any] = {"post_grad_custom_post_pass": roots, "force_disable_caches": True}
    with torch.no_grad(), config.patch(freezing=freezing, **chosen):
        compiled_model: Any = torch.compile(model)
        made = outputs(compiled_model, x)  # compiled here
        return roots.found, made


def aot_inductor(model: nn.Module, x: Tensor, *, fold: bool) -> tuple[int, Any]:
    """AOTInductor's package, loaded and run."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package, config

    program, roots = program_of(model, x, fold=fold), Roots()
    chosen: dict[str, Any] = {"post_grad_custom_post_pass": roots, "force_disable_caches": True}
    with tempfile.TemporaryDirectory() as folder, config.patch(**chosen):
        path = aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        package: Any = aoti_load_package(path)
        return roots.found, outputs(package, x)


def pt2e(model: nn.Module, x: Tensor, *, fold: bool) -> tuple[int, Any]:
    """Torchao's prepare and convert with int8 weights and activations."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program_of(model, x, fold=fold).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    return norms(converted.graph), outputs(converted, x)


def executorch(model: nn.Module, x: Tensor, *, fold: bool, lower: bool) -> tuple[int, Any]:
    """ExecuTorch's to_edge, with XNNPACK's partitioner or without; run by its runtime."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = program_of(model, x, fold=fold)
    given = [XnnpackPartitioner()] if lower else []
    edge = to_edge_transform_and_lower(program, partitioner=given)
    left = norms(edge.exported_program().graph)  # what is left outside of XNNPACK
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(edge.to_executorch().buffer)
        method = Runtime.get().load_program(path).load_method("forward")
        return left, [leaf.double() for leaf in method.execute([x])]


def onnx_exporter(model: nn.Module, x: Tensor, *, fold: bool) -> tuple[int, Any]:
    """torch.onnx.export, and its file in onnxruntime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program = program_of(model, x, fold=fold)
        torch.onnx.export(program, (), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        made = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return peers.count(onnx.load(path))[0], [torch.from_numpy(array).double() for array in made]


def openvino(model: nn.Module, x: Tensor, *, fold: bool) -> tuple[int, Any]:
    """OpenVINO's convert_model, which writes BatchNorm as a product and a sum; run on the CPU."""
    import openvino as ov

    converted = ov.convert_model(program_of(model, x, fold=fold))
    products = [op for op in converted.get_ops() if op.get_type_name() == "Multiply"]
    left = sum(any(map(_per_channel, op.input_values())) for op in products)
    run = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return left, [torch.from_numpy(array).double() for array in run(x.numpy()).values()]


def _per_channel(value: Any) -> bool:
    """Whether it is a constant of several numbers."""
    shape = value.get_partial_shape()
    known = value.get_node().get_type_name() == "Constant" and shape.is_static
    return bool(known and max([1, *shape.get_max_shape()]) > 1)


#: Tool -> the package that it is in, and how it is used.
TOOLS: dict[str, tuple[str, Callable[..., tuple[int, Any]], dict[str, bool]]] = {
    "torch.compile": ("torch", compiled, {"freezing": False}),
    "torch.compile, freezing": ("torch", compiled, {"freezing": True}),
    "AOTInductor": ("torch", aot_inductor, {}),
    "torch.onnx.export": ("onnxruntime", onnx_exporter, {}),
    "torchao PT2E (int8)": ("torchao", pt2e, {}),
    "ExecuTorch to_edge": ("executorch", executorch, {"lower": False}),
    "ExecuTorch XNNPACK": ("executorch", executorch, {"lower": True}),
    "OpenVINO convert_model": ("openvino", openvino, {}),
}


def run_one(network: str, tool: str, *, fold: bool) -> dict[str, Any]:
    """Left, and the error in float32 relative to the source in float64."""
    model = randomise(build(network))
    x = example(network, model)
    truth = outputs(build_wide(network), x.double())
    _, use, options = TOOLS[tool]
    left, made = use(model, x, fold=fold, **options)
    return {"left": left, "error": distance(made, truth), "BN": peers.evaluations(model, x)}


def build_wide(network: str) -> nn.Module:
    """The same network in float64."""
    return randomise(build(network)).double()


def child(network: str, tool: str, *, fold: bool) -> int:
    """One run, as one line of JSON on standard output."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = run_one(network, tool, fold=fold)
    except Exception as error:  # noqa: BLE001  # that a tool fails is a result
        row = {"failed": f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200]}
    print("\n" + json.dumps(row))
    return 0


def measure(network: str, tool: str, timeout: float, *, fold: bool) -> dict[str, Any]:
    """The same in a process of its own."""
    return in_child([network, tool, *(["--fold"] if fold else [])], timeout)


def version(package: str) -> str | None:
    """Installed version; None where it is missing."""
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def table(rows: list[dict[str, Any]], missing: list[str]) -> str:
    """The Markdown for the docs."""
    lines = [
        "| tool | network | BatchNorms | left by itself | left with `fold_bn` before | "
        "error by itself | error with `fold_bn` |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (row["tool"], row["network"], row.get("BN"), *(row.get(k) for k in _CELLS))
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    used = {row["package"]: row["version"] for row in rows} | {"torch": torch.__version__}
    lines += ["", "Versions: " + ", ".join(f"{n} {v}" for n, v in sorted(used.items())) + "."]
    lines += [f"Not installed, and not tried: {', '.join(missing)}."] if missing else []
    for row in rows:
        for arm in ("own", "folded"):
            if f"why: {arm}" in row:
                words = "with `fold_bn` before" if arm == "folded" else "by itself"
                lines.append(f"\n{row['tool']} on {row['network']}, {words}: {row[f'why: {arm}']}")
    return "\n".join(lines) + "\n"


_CELLS = ("left: own", "left: folded", "error: own", "error: folded")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one small network, one tool")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each run")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--fold", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        return child(*asked.child, fold=asked.fold)
    if asked.quick:
        asked.networks, asked.tools = ["timm:test_byobnet"], ["torch.onnx.export"]
    console = Console()
    start(console)
    asked.out.mkdir(parents=True, exist_ok=True)
    log = asked.out / "downstream.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    known = {(row["network"], row["tool"]): row for row in map(json.loads, lines)}
    tools = [tool for tool in asked.tools if version(TOOLS[tool][0])]
    jobs = [(tool, network) for tool in tools for network in asked.networks]
    with progress_bar(console) as progress, log.open("a") as file:
        for tool, network in progress.track([j for j in jobs if j[::-1] not in known]):
            package = TOOLS[tool][0]
            row = {"tool": tool, "network": network, "package": package}
            row |= {"version": version(package)}
            for arm in ("own", "folded"):
                found = measure(network, tool, asked.timeout, fold=arm == "folded")
                row |= {"BN": found.get("BN", row.get("BN"))}
                keys = {"left": f"left: {arm}", "error": f"error: {arm}", "failed": f"why: {arm}"}
                row |= {new: found[key] for key, new in keys.items() if key in found}
            known[network, tool] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    rows = [known[network, tool] for tool, network in jobs]
    text = table(rows, sorted({TOOLS[t][0] for t in asked.tools if t not in tools}))
    (asked.out / "downstream.md").write_text(text)
    console.print(text, markup=False)
    save(asked.out, "downstream", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
