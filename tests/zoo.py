"""Networks of torchvision and timm for tests.

torchvision's wheel is built against a CUDA torch. Beside a CPU torch its C++ operators do not
load, and the import fails where it describes operators that then do not exist. Networks for
classification never call them, so it is enough to declare their schemas.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def torchvision_models() -> Any:
    """The module `torchvision.models`; the test is skipped where it is not installed."""
    _import_torchvision()
    return importlib.import_module("torchvision.models")


def timm() -> Any:
    """The module `timm`; the test is skipped where it is not installed."""
    _import_torchvision()
    return pytest.importorskip("timm", reason="timm is not installed: pip install bnfx[zoo]")


@functools.cache
def _schema_library() -> torch.library.Library:
    """Declares what is missing; kept for the life of the process, or torch would forget it."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing}: pip install bnfx[zoo]")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _schema_library()
        importlib.import_module("torchvision")
