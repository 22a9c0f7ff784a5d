"""Prove that an ONNX file computes what the unfolded PyTorch model computes.

Two tiers. Weights: where the file says that bnfx folded it, the folding is done again from the
reference in float64, and every weight in the file is held against it. Outputs: onnxruntime against
the reference in float64, in units of the reference's own error (see `bnfx.compare`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfx.capture import clone
from bnfx.compare import UNIT, Array, OutputCheck, check_output, weight_ratio
from bnfx.errors import BnfxError, VerificationError
from bnfx.export import training_modules
from bnfx.onnx_files import FOLDED, all_nodes, read_onnx
from bnfx.providers import open_session, require_provider, runtime_errors
from bnfx.verdicts import Divergence, TierCheck, VerifyReport, WeightCheck

Precision = Literal["fp32", "fp16", "bf16"]

#: Folding right was seen to err by at most 3.6 units in a weight, folding wrong by 27 and more.
_MAX_WEIGHT_RATIO = 8.0
_OTHER_BATCHES = (1, 2, 7)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def verify_onnx(
    model: nn.Module,
    f: str | os.PathLike[str],
    args: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    provider: str = "cpu",
    num_inputs: int = 8,
    inputs: Sequence[Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    precision: Precision = "fp32",
    max_ratio: float = 4.0,
    localize: bool = True,
) -> VerifyReport:
    """Compare an ONNX file with the unfolded model that it was made from.

    Args:
        model: The unfolded reference, in eval mode; left bit-identical.
        f: The ONNX file.
        args: Tuple of positional example arguments, or a lone tensor: shapes, dtypes and ranges of
            the inputs that are drawn. They are the first input themselves.
        kwargs: Example keyword arguments.
        provider: "cpu", "cuda" or "cuda:1"; CUDA never falls back.
        num_inputs: Inputs to pool the error over.
        inputs: Inputs to use instead of drawn ones, each like `args`.
        batch_sizes: Batch sizes to run besides that of `args`; by default 1, 2 and 7 where the
            file's batch is symbolic, none where it is fixed.
        precision: What the budget is taken from: the reference in "fp32", "fp16" or "bf16".
        max_ratio: Limit of the error, in budgets.
        localize: Whether to name the first wrong weight or output.

    Raises:
        VerificationError: The file cannot be read or run, or the reference is in train mode.
        ProviderError: The provider did not run the graph.
    """
    if precision not in _DTYPES:
        raise VerificationError(
            f"precision={precision!r} is not available; use {', '.join(_DTYPES)}"
        )
    if found := training_modules(model):
        raise VerificationError(
            f"the reference is in train mode at {found[:8]}, so it has no one answer; call "
            "model.eval() first"
        )
    start = time.perf_counter()
    path = Path(f)
    proto = read_onnx(path)
    session = open_session(path, provider)
    reference = _Reference.of(model, precision)
    example = ((args,) if isinstance(args, Tensor) else tuple(args), dict(kwargs or {}))
    pooled = _pool(example, inputs, num_inputs)
    batches: list[list[Any]] = [pooled]
    sizes = _batch_sizes(session, example, batch_sizes)
    batches += [[_resized(x, size) for x in pooled[:2]] for size in sizes]
    outputs: list[OutputCheck] = []
    for batch in batches:
        outputs += _check_batch(session, reference, batch, UNIT[precision], max_ratio)
    weights, notes = _check_weights(model, proto, path, example)
    providers = require_provider(session, provider)
    wrong = [_of_weight(w) for w in weights if not w.passed]
    wrong += [_of_output(o) for o in outputs if not o.passed]
    counts = Counter(node.op_type for node in all_nodes(proto))
    own = _batch_of(example)
    return VerifyReport(
        status="failed" if wrong else "passed",
        path=str(path),
        reference=type(model).__name__,
        provider=provider,
        providers=providers,
        proof={},
        precision=precision,
        num_inputs=len(pooled),
        batch_sizes=(*([own] if own is not None else []), *sizes),
        batch_norms_left=counts["BatchNormalization"],
        tiers=_tiers(weights, outputs, max_ratio, notes),
        outputs=tuple(outputs),
        layers=(),
        weights=tuple(weights),
        notes=tuple(notes),
        first_divergence=wrong[0].message if wrong and localize else None,
        divergence=wrong[0] if wrong and localize else None,
        seconds=time.perf_counter() - start,
    )


def _of_weight(check: WeightCheck) -> Divergence:
    message = (
        f"weight {check.name!r}, channel {check.channel}: "
        f"{check.ratio:.3g} units of rounding from the float64 folding"
    )
    return Divergence(
        "weights",
        check.name.rpartition(".")[0],
        check.node,
        check.channel,
        check.ratio,
        "",
        None,
        None,
        None,
        message,
    )


def _of_output(check: OutputCheck) -> Divergence:
    message = f"output {check.name!r} {list(check.shape)}: {check.reason}"
    return Divergence("outputs", "", check.name, None, check.ratio, "", None, None, None, message)


def _tiers(
    weights: list[WeightCheck], outputs: list[OutputCheck], max_ratio: float, notes: list[str]
) -> tuple[TierCheck, ...]:
    def tier(kind: Any, checks: Sequence[Any], limit: float, reason: str) -> TierCheck:
        failed = any(not check.passed for check in checks)
        status: Any = "failed" if failed else "passed" if checks else "skipped"
        worst = max((check.ratio for check in checks), default=math.nan)
        decides = kind != "layers"
        return TierCheck(kind, status, len(checks), len(checks), worst, limit, decides, reason)

    return (
        tier("weights", weights, _MAX_WEIGHT_RATIO, "; ".join(notes)),
        tier("layers", (), 16.0, "not asked for"),
        tier("outputs", outputs, max_ratio, ""),
    )


@dataclass(frozen=True)
class _Reference:
    """The unfolded model as given, in the deployed precision and in float64."""

    own: nn.Module
    rounded: nn.Module
    exact: nn.Module
    dtype: torch.dtype

    @staticmethod
    def of(model: nn.Module, precision: str) -> _Reference:
        dtype = _DTYPES[precision]
        own = clone(model)
        return _Reference(own, clone(model).to(dtype), clone(model).double(), dtype)

    def run(self, which: nn.Module, x: Any, dtype: torch.dtype | None) -> list[Tensor]:
        args, kwargs = pytree.tree_map(lambda leaf: _cast(leaf, dtype), x)
        with torch.no_grad():
            leaves = pytree.tree_leaves(which(*args, **kwargs))
        return [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.clone()  # a forward may work in place
    return leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf


def _check_batch(
    session: Any, reference: _Reference, batch: list[Any], unit: float, max_ratio: float
) -> list[OutputCheck]:
    ours = [_run(session, x) for x in batch]
    own = [_arrays(reference.run(reference.own, x, None)) for x in batch]
    rounded = [_arrays(reference.run(reference.rounded, x, reference.dtype)) for x in batch]
    truth = [_arrays(reference.run(reference.exact, x, torch.float64)) for x in batch]
    names = [value.name for value in session.get_outputs()]
    if len(names) != len(own[0]):
        reason = f"the file has {len(names)} outputs, the model {len(own[0])}"
        return [OutputCheck("outputs", (), "", math.inf, unit, math.inf, False, reason)]
    checks = []
    for i, name in enumerate(names):
        mine, budget = ([arrays[i] for arrays in side] for side in (ours, rounded))
        like = [a[i].astype(b[i].dtype) for a, b in zip(rounded, own, strict=True)]
        check = check_output(
            name,
            mine,
            like if mine[0].dtype == own[0][i].dtype else budget,
            [arrays[i] for arrays in truth],
            unit=unit,
            max_ratio=max_ratio,
        )
        checks.append(check)
    return checks


def _run(session: Any, x: Any) -> list[Array]:
    leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(leaves):
        raise VerificationError(
            f"the file has {len(names)} inputs ({', '.join(names)}), the example has {len(leaves)}"
        )
    feed = dict(zip(names, _arrays(leaves), strict=True))
    errors: tuple[type[Exception], ...] = (*runtime_errors(), ValueError)
    try:
        return [np.asarray(value) for value in session.run(None, feed)]
    except errors as error:
        raise VerificationError(
            f"onnxruntime cannot run the file on this input: {error}"
        ) from error


def _arrays(tensors: Iterable[Tensor]) -> list[Array]:
    """As numpy arrays; bfloat16, which numpy lacks, as float32."""
    return [(t.float() if t.dtype is torch.bfloat16 else t).detach().cpu().numpy() for t in tensors]


def _pool(example: Any, inputs: Sequence[Any] | None, num_inputs: int) -> list[Any]:
    if inputs is not None:
        given: list[Any] = [((x,), {}) if isinstance(x, Tensor) else (tuple(x), {}) for x in inputs]
        if not given:
            raise VerificationError("inputs is empty; give at least one, or leave it out")
        return given
    generator = torch.Generator().manual_seed(0)
    drawn = [
        pytree.tree_map(lambda leaf: _draw(leaf, generator), example) for _ in range(num_inputs - 1)
    ]
    return [example, *drawn]


def _draw(leaf: Any, generator: torch.Generator) -> Any:
    """A random tensor like `leaf`: mean and spread of its floats, range of its integers."""
    if not isinstance(leaf, Tensor) or leaf.numel() == 0:
        return leaf
    if leaf.dtype is torch.bool:
        return (torch.rand(leaf.shape, generator=generator) < 0.5).to(leaf.device)
    if not leaf.is_floating_point():
        low, high = int(leaf.min()), int(leaf.max())
        return torch.randint(low, high + 1, leaf.shape, generator=generator).to(leaf)
    wide = leaf.detach().double().cpu()
    spread = float(wide.std(correction=0)) or 1.0
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    drawn = noise * spread + wide.mean()
    return (
        drawn.clamp(float(wide.min()), float(wide.max())).to(leaf)
        if spread < 1e-3
        else drawn.to(leaf)
    )


def _batch_of(example: Any) -> int | None:
    first = next((x for x in pytree.tree_leaves(example) if isinstance(x, Tensor)), None)
    return first.shape[0] if first is not None and first.dim() else None


def _batch_sizes(session: Any, example: Any, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if wanted is not None:
        return tuple(wanted)
    values = session.get_inputs()
    symbolic = all(value.shape and isinstance(value.shape[0], str) for value in values)
    own = _batch_of(example)
    return tuple(size for size in _OTHER_BATCHES if size != own) if values and symbolic else ()


def _resized(x: Any, size: int) -> Any:
    """Every tensor with the batch of the first one, at another batch size, by repetition."""
    own = _batch_of(x)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != own:
            return leaf
        return leaf[torch.arange(size, device=leaf.device) % leaf.shape[0]]

    return pytree.tree_map(resize, x)


def _check_weights(
    model: nn.Module, proto: onnx.ModelProto, path: Path, example: Any
) -> tuple[list[WeightCheck], list[str]]:
    """Hold the file's weights against the float64 folding, where the file says it was folded."""
    folded = next((entry.value for entry in proto.metadata_props if entry.key == FOLDED), None)
    if folded is None:
        return [], ["weights: not checked, since the file does not say that bnfx folded it"]
    from bnfx.folding import fold_bn

    wide = clone(model).double()
    args, kwargs = pytree.tree_map(lambda leaf: _cast(leaf, torch.float64), example)
    try:
        again = fold_bn(wide, args, example_kwargs=kwargs).state_dict()
    except BnfxError as error:
        return [], [f"weights: not checked, since folding the reference again failed: {error}"]
    checks = []
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, tensor in again.items():
        if name not in stored or not tensor.is_floating_point():
            continue
        array = onnx.numpy_helper.to_array(stored[name], base_dir=str(path.parent))
        exact = tensor.detach().cpu().numpy()
        if array.shape != exact.shape:
            checks.append(
                WeightCheck(name, name, "", math.inf, 0, passed=False, reason="another shape")
            )
            continue
        unit = {2: 2.0**-11, 4: 2.0**-24, 8: 2.0**-24}[array.dtype.itemsize]
        ratio, channel = weight_ratio(
            array, exact, UNIT["bf16"] if "bf" in str(array.dtype) else unit
        )
        checks.append(
            WeightCheck(
                name,
                name,
                "",
                ratio,
                channel,
                ratio <= _MAX_WEIGHT_RATIO,
                "" if ratio <= _MAX_WEIGHT_RATIO else f"wrong in channel {channel}",
            )
        )
    missing = sorted(set(json.loads(folded)) - {check.name for check in checks})
    notes = [f"weights: {', '.join(missing)} not found in the file by name"] if missing else []
    return checks, notes
