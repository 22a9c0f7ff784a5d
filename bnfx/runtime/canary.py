"""In which arithmetic a provider computes, seen from numbers that another one would lose.

TF32 keeps 10 bits of a mantissa, bfloat16 7: 1 + 2^-12 is 1 in both. The numbers are multiplied by
one, as inputs and as weights, in each kind of layer; what comes back is the name of the arithmetic.
float32 sums of float16 are told from float16 sums in the same way. Options are never believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto, helper, numpy_helper

from bnfx.errors import ProviderError
from bnfx.numbers import Array
from bnfx.runtime.providers import Where
from bnfx.runtime.sessions import SessionSettings, faults, open_session
from bnfx.runtime.values import run_session

#: TF32 keeps 10 bits of the mantissa: this becomes 1.0 in it, and survives float32.
CANARY = 1.0 + 2.0**-12
#: Numbers to multiply by one; the last is beyond float16.
_VALUES = np.array(
    [1, CANARY, 1 + 3 * 2.0**-12, 1 + 2.0**-10, 1 + 3 * 2.0**-9, 1 + 2.0**-7, 1.5, 2.0**17]
)
_WIDTH = 64
#: Of a number; float32 in a fast convolution loses the last bits.
_EXACT = 2.0**-17


def _rounding(bits: int, to_whole: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def rounded(values: Array) -> Array:
        mantissa, exponent = np.frexp(values)
        return np.asarray(np.ldexp(to_whole(np.ldexp(mantissa, bits + 1)), exponent - bits - 1))

    return rounded


#: Arithmetic -> what becomes of a factor, the finest first.
ROUNDINGS: Mapping[str, Callable[[Array], Array]] = {
    "float32": np.asarray,
    "TF32": _rounding(10, np.rint),
    "TF32, truncated": _rounding(10, np.trunc),
    "float16": _rounding(10, np.rint),
    "bfloat16": _rounding(7, np.rint),
    "bfloat16, truncated": _rounding(7, np.trunc),
}
_ORDER = list(ROUNDINGS)
#: Precision -> the coarsest arithmetic that it allows.
_COARSEST = {"fp32": "float32", "tf32": "TF32, truncated", "fp16": "float16"}
_HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Arithmetic:
    """How a provider computes."""

    #: Kind of layer -> what came back for 1 + 2^-12.
    canary: Mapping[str, float]
    #: Kind of layer -> the arithmetic of its factors; "" where it is none that is known.
    factors: Mapping[str, str]
    #: Kind of layer -> whether sums of the file's own narrow type are in "float32" or in "float16".
    sums: Mapping[str, str]
    #: Kind of layer -> why the provider ran none.
    untried: Mapping[str, str]

    @property
    def coarsest(self) -> str:
        """The coarsest arithmetic of a layer."""
        return max(self.factors.values(), key=_ORDER.index, default="float32")

    def told(self) -> dict[str, Any]:
        """As reports have it."""
        return {
            "canary": dict(self.canary),
            "arithmetic": dict(self.factors),
            **({"coarsest": self.coarsest} if self.factors else {}),
            "tf32": any(name.startswith("TF32") for name in self.factors.values()),
            "truncated": any(name.endswith("truncated") for name in self.factors.values()),
            **({"sums": dict(self.sums)} if self.sums else {}),
            **({"not tried": dict(self.untried)} if self.untried else {}),
        }


def require_arithmetic(where: Where, precision: str = "fp32") -> Arithmetic:
    """What the provider's arithmetic is, after checking that it is as fine as was asked for.

    Args:
        where: The provider.
        precision: "fp32" wants float32 proper, "tf32" that or TF32. A file in "fp16" or "bf16" has
            its own factors: there it is its sums that are looked at.

    Raises:
        ProviderError: The arithmetic is a coarser one, none that is known, or cannot be seen.
    """
    settings = SessionSettings(tf32=precision != "fp32")
    if precision in _HALF:
        return _half(where, settings, _HALF[precision])
    outputs, untried = _computed(dict(_models()), _numbers, where, settings)
    seen = {kind: _seen(y) for kind, y in outputs.items()}
    factors = {kind: name for kind, (name, _) in seen.items()}
    found = Arithmetic({kind: back for kind, (_, back) in seen.items()}, factors, {}, untried)
    if not factors:
        raise ProviderError(
            f"{where.name} ran no layer in which its arithmetic would be seen: "
            f"{next(iter(untried.values()))}"
        )
    _require(found, where, precision)
    return found


def _require(seen: Arithmetic, where: Where, precision: str) -> None:
    odd = [kind for kind, name in seen.factors.items() if not name]
    if odd:
        values = {kind: seen.canary[kind] for kind in odd}
        raise ProviderError(
            f"{where.name} computes wrong: {CANARY} times one came back as {values}; update its "
            "driver and libraries, or use provider='cpu'"
        )
    if _ORDER.index(seen.coarsest) > _ORDER.index(_COARSEST[precision]):
        raise ProviderError(
            f"{where.name} computed in {seen.coarsest.partition(',')[0]}, not in "
            f"{_COARSEST[precision].partition(',')[0]}: {CANARY} came back as {dict(seen.canary)}; "
            f"{_advice(seen.coarsest, where)}"
        )


def _advice(arithmetic: str, where: Where) -> str:
    precision = {"float16": "fp16"}.get(arithmetic, "bf16" if arithmetic[0] == "b" else "tf32")
    first = "unset NVIDIA_TF32_OVERRIDE" if where.on_nvidia else "set its precision by an option"
    return f"{first} (provider_options), or verify with precision={precision!r}"


def _computed(
    models: Mapping[str, onnx.ModelProto],
    feed: Callable[[Sequence[int]], Array],
    where: Where,
    settings: SessionSettings,
) -> tuple[dict[str, Array], dict[str, str]]:
    """What each model gives, and why the provider runs the others not.

    All are one graph, which some providers compile for seconds; one by one where that fails.
    """

    def run(parts: Sequence[onnx.ModelProto]) -> list[Array]:
        session = open_session(_together(parts).SerializeToString(), where, settings)
        given = {value.name: feed(value.shape) for value in session.get_inputs()}
        return run_session(session, given)

    try:
        return dict(zip(models, run(list(models.values())), strict=True)), {}
    except faults():
        pass
    found: dict[str, Array] = {}
    failed: dict[str, str] = {}
    for kind, model in models.items():
        try:
            (found[kind],) = run([model])
        except faults() as error:
            failed[kind] = str(error)
    return found, failed


def _together(parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """Models side by side in one graph, each with names of its own."""
    named = [onnx.compose.add_prefix(part, f"{i}.") for i, part in enumerate(parts)]
    first = named[0]
    for other in (part.graph for part in named[1:]):
        for field in ("node", "initializer", "input", "output"):
            getattr(first.graph, field).extend(getattr(other, field))
    return first


def _numbers(shape: Sequence[int]) -> Array:
    """The numbers as inputs of the first half of the channels, ones in the others."""
    x = np.ones(shape, np.float32)
    x[:, : _WIDTH // 2] = _VALUES.reshape(-1, *[1] * (x.ndim - 1))
    return x


def _seen(y: Array) -> tuple[str, float]:
    """The arithmetic of a layer, and what became of the canary."""
    half = _WIDTH // 2
    y = np.moveaxis(y, 1, -1).reshape(len(_VALUES), -1, _WIDTH)
    # Rows have the numbers as inputs; behind them the columns of the first row, as weights.
    inputs = y[:, :, :half].reshape(len(_VALUES), -1)
    weights = y[0, :, half:].reshape(-1, half // len(_VALUES), len(_VALUES))
    names = [_name(inputs), _name(np.moveaxis(weights, -1, 0).reshape(len(_VALUES), -1))]
    worst = max(names, key=lambda name: _ORDER.index(name) if name else len(_ORDER))
    returned = float(max(inputs[1], key=lambda back: abs(back - CANARY)))
    return worst, returned


def _name(found: Array) -> str:
    """The arithmetic in which each number times one is `found`; "" where it is none of them."""
    plain, wide = found[:-1], bool(np.allclose(found[-1], _VALUES[-1], _EXACT, 0))
    for name, rounded in ROUNDINGS.items():
        wanted = rounded(_VALUES[:-1])[:, None]
        if wide == (name != "float16") and np.allclose(plain, wanted, _EXACT, 0):
            return name
    return ""


def _models() -> Iterator[tuple[str, onnx.ModelProto]]:
    """A model for each kind of layer, whose weight is diagonal: ones, then the numbers."""
    half = _WIDTH // 2
    diagonal = np.concatenate([np.ones(half), np.resize(_VALUES, half)])
    matrix = np.diag(diagonal).astype(np.float32)
    for kind in ("MatMul", "Gemm"):
        yield kind, _model(kind, matrix, [len(_VALUES), _WIDTH])

    def kernel(weight: Array, *size: int) -> Array:
        full = np.zeros((*weight.shape, *size), np.float32)
        middle: tuple[Any, ...] = (..., *(n // 2 for n in size))
        full[middle] = weight
        return full

    image, depthwise = [len(_VALUES), _WIDTH, 28, 28], diagonal[:, None]
    yield "Conv", _model("Conv", kernel(matrix, 1, 1), image)
    yield "Conv 3x3", _model("Conv", kernel(matrix, 3, 3), image, pads=[1] * 4)
    own = _model("Conv", kernel(depthwise, 3, 3), image, pads=[1] * 4, group=_WIDTH)
    yield "Conv depthwise", own
    yield "Conv 1-d", _model("Conv", kernel(matrix, 3), image[:3], pads=[1] * 2)
    yield "ConvTranspose", _model("ConvTranspose", kernel(matrix, 3, 3), image, pads=[1] * 4)


def _model(
    operator: str, weight: Array, shape: list[int], kind: int = TensorProto.FLOAT, **how: Any
) -> onnx.ModelProto:
    node = helper.make_node(operator, ["x", "w"], ["y"], operator, **how)
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", kind, None)
    stored = numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(kind)), "w")
    graph = helper.make_graph([node], "canary", [x], [y], [stored])
    opset = 22 if kind == TensorProto.BFLOAT16 else 18  # the first with bfloat16 in convolutions
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _half(where: Where, settings: SessionSettings, kind: int) -> Arithmetic:
    """How sums of narrow numbers are computed: a quarter beside 1024 is lost in a narrow sum."""
    # In any order but that of a lone float32 sum some quarter is added to a partial sum of 1024.
    pattern = np.tile([1024.0, 0.25, -1024.0, 0.25], 256)
    x = np.random.default_rng(0).permutation(pattern).astype(np.float32)
    ones = np.ones((len(x), _WIDTH), np.float32)
    models = {
        "MatMul": _model("MatMul", ones, [1, len(x)], kind),
        "Conv": _model("Conv", ones.T[:, :, None, None], [1, len(x), 1, 1], kind),
    }
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    outputs, untried = _computed(
        models, lambda shape: x.reshape(shape).astype(dtype), where, settings
    )
    exact = {name: bool((y.astype(float) == pattern.sum()).all()) for name, y in outputs.items()}
    sums = {name: "float32" if same else "the narrow type" for name, same in exact.items()}
    return Arithmetic({}, {}, sums, untried)
