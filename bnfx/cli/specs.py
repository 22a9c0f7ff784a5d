"""What models, inputs and free axes are called on the command line: words in, data out."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bnfx.errors import UsageError

#: Bytes of one number, by the names of torch.
DTYPES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
#: Their largest numbers; those of integers follow from the bytes.
_LARGEST = {
    "float32": 3.4028234663852886e38,
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float64": 1.7976931348623157e308,
}
_FORM = "NAME:1x3x224x224[:DTYPE[:LOW..HIGH]]"
MOST_BYTES = 2**33  # a typing error such as 1x3x224224x224 should not take the machine down


@dataclass(frozen=True)
class Drawn:
    """An input to be drawn."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    #: Least and largest value; None leaves that to the dtype.
    bounds: tuple[float, float] | None


@dataclass(frozen=True)
class Factory:
    """A call that makes a model, or the place where one lies."""

    module: str
    #: Names to follow inside the module.
    path: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


#: Packages whose models go by names, which need not be those of Python.
LIBRARIES = ("timm", "torchvision", "transformers")


def parse_factory(spec: str) -> Factory:
    """`PACKAGE.MODULE:FACTORY` or `timm:NAME`, with literal arguments where wanted.

    Raises:
        UsageError: It is no such thing.
    """
    module, colon, call = spec.partition(":")
    if not colon or not module or not call or module.endswith((".py", "/")):
        raise UsageError(
            f"model {spec!r} is neither PACKAGE.MODULE:FACTORY (such as nets:small, for small() in "
            "nets.py of the current directory) nor a .pt2 file"
        )
    name, paren, rest = call.partition("(")
    free = module in LIBRARIES and re.fullmatch(r"[\w./-]+", name, re.ASCII) is not None
    try:
        parsed = ast.parse(f"name{paren}{rest}" if free else call, mode="eval").body
        args, kwargs = (), {}
        if isinstance(parsed, ast.Call):
            args = tuple(ast.literal_eval(arg) for arg in parsed.args)
            kwargs = {str(word.arg): ast.literal_eval(word.value) for word in parsed.keywords}
            parsed = parsed.func
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"model {spec!r}: {call!r} is no name, nor a call with literal arguments such as "
            "resnet(depth=18)"
        ) from error
    if free:
        return Factory(module, tuple(name.split(".")), args, kwargs)
    path: list[str] = []
    while isinstance(parsed, ast.Attribute):
        path.insert(0, parsed.attr)
        parsed = parsed.value
    if not isinstance(parsed, ast.Name):
        raise UsageError(f"model {spec!r}: {call!r} is no name of a factory")
    return Factory(module, (parsed.id, *path), args, kwargs)


def parse_input(spec: str) -> Drawn:
    """`NAME:1x3x224x224[:DTYPE[:LOW..HIGH]]`.

    Raises:
        UsageError: It is no such thing, or would be empty or larger than the machine.
    """
    name, *rest = spec.split(":")
    if not name or not 1 <= len(rest) <= 3:
        raise UsageError(f"input {spec!r} has not the form {_FORM}, and is no .npz file")
    if not re.fullmatch(r"(\d{1,18}(x\d{1,18})*)?", rest[0], re.ASCII):
        raise UsageError(
            f"input {spec!r}: {rest[0]!r} is no shape; write numbers with x between, such as "
            "1x3x224x224 (an axis of free size is declared with --dynamic NAME:AXIS=SYMBOL)"
        )
    shape = tuple(int(n) for n in rest[0].split("x") if n)
    if 0 in shape:
        raise UsageError(f"input {spec!r} is empty: an axis of size 0 gives nothing to compute")
    word = rest[1] if len(rest) > 1 and rest[1] else "float32"
    if word not in DTYPES:
        raise UsageError(f"input {spec!r}: dtype {word!r} is unknown; use {', '.join(DTYPES)}")
    size = math.prod(shape) * DTYPES[word]
    if size > MOST_BYTES:
        raise UsageError(f"input {spec!r} would take {size / 2**30:.0f} GiB; check its shape")
    return Drawn(name, shape, word, _bounds(rest[2], word, spec) if len(rest) > 2 else None)


def _bounds(text: str, dtype: str, spec: str) -> tuple[float, float]:
    """The ends of a range; of one for integers what the dtype holds of it."""
    low, dots, high = text.partition("..")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = (1.0, 0.0)
    if dtype in _LARGEST:
        fits = -_LARGEST[dtype] <= bounds[0] <= bounds[1] <= _LARGEST[dtype]
    else:
        least, most = _integers(dtype)
        bounds = max(bounds[0], least), min(bounds[1], most)
        fits = bounds[0] <= bounds[1] and math.ceil(bounds[0]) <= bounds[1]
    if not dots or not fits:
        raise UsageError(
            f"input {spec!r}: {text!r} is no range of {dtype}; write LOW..HIGH, such as 0..29999"
        )
    return bounds


def _integers(dtype: str) -> tuple[int, int]:
    """The least and the largest number."""
    if dtype in ("uint8", "bool"):
        return 0, 255
    half = 1 << (8 * DTYPES[dtype] - 1)
    return -half, half - 1


def parse_dynamic(spec: str) -> tuple[str, int, str]:
    """`NAME:AXIS=SYMBOL` in its parts.

    Raises:
        UsageError: It is no such thing.
    """
    match = re.fullmatch(r"([^:]+):(\d{1,4})=([A-Za-z_]\w*)", spec, re.ASCII)
    if match is None:
        raise UsageError(f"--dynamic {spec!r} has not the form NAME:AXIS=SYMBOL")
    return match[1], int(match[2]), match[3]
