"""Arrays of numbers, and the units in which precision is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Half the distance from 1 to the next number: the relative error of one rounding.
UNIT = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}


def relative_error(values: Sequence[Array], truth: Sequence[Array]) -> float:
    """rms(values - truth) / rms(truth) over the finite entries of the truth, pooled.

    Where the truth is zero throughout, any difference is an infinite error.
    """
    noise = power = 0.0
    for value, exact in zip(values, truth, strict=True):
        wide = exact.astype(np.float64)
        finite = np.isfinite(wide)
        difference = value.astype(np.float64)[finite] - wide[finite]
        noise += float(np.square(np.abs(difference)).sum())
        power += float(np.square(np.abs(wide[finite])).sum())
    if power == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / power)
