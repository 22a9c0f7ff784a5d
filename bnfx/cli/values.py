"""Values of options: words in, data out, or an error that says what to write."""

from __future__ import annotations

import argparse
import math
from fractions import Fraction

from bnfx.runtime.providers import SHORT, known

_OTHERS = f"or {', '.join([*SHORT][2:])}, or a full name such as QNNExecutionProvider"


def count(text: str) -> int:
    """A number of things, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of things")
    return int(text)


def width(text: str) -> int:
    """A number of channels."""
    if not count(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no width; give 1 or more")
    return int(text)


def positive(text: str) -> int:
    """A number of things, 1 or more."""
    if not count(text):
        raise argparse.ArgumentTypeError(f"{text!r} is nothing to verify on; give 1 or more")
    return int(text)


def survivors(text: str) -> int | None:
    """What becomes of BatchNorms that cannot vanish, as the number of them that may stay."""
    if text not in ("batch_norm", "error"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither batch_norm nor error")
    return 0 if text == "error" else None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between, fractions too."""
    try:
        return tuple(float(Fraction(part)) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; write 0.485,0.456,0.406 or 1/255"
        ) from None


def runs(text: str) -> int:
    """A number of timed runs."""
    if count(text) < 50:
        raise argparse.ArgumentTypeError(f"{text} runs are too few for a median; give 50 or more")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Numbers of things with commas between."""
    return tuple(positive(part) for part in text.split(","))


def ratio(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no limit; give a positive number, such as 4")
    return value


def provider_name(text: str) -> str:
    """An execution provider."""
    if known(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is unknown; use cpu, cuda or cuda:1, {_OTHERS}")


def option(text: str) -> tuple[str, str]:
    """KEY=VALUE in its parts."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no option; give KEY=VALUE")
    return key, value


def names(text: str) -> tuple[str, ...]:
    """Words with commas between."""
    return tuple(filter(None, text.split(",")))
