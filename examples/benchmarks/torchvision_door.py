"""torchvision beside any torch.

Its wheel is built against a CUDA torch. Beside a CPU torch its C++ operators do not load, and the
import fails where it describes operators that then do not exist. Networks for classification never
call them, so it is enough to declare their schemas.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def open_torchvision() -> Any:
    """The module `torchvision.models`."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared()
        return importlib.import_module("torchvision.models")


@functools.cache
def _declared() -> torch.library.Library:
    """Declares what is missing; kept for the life of the process, or torch would forget it."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
