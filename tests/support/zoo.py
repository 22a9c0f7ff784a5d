"""Networks of torchvision and timm for tests."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bnfx.cli.libraries import open_torchvision

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))


def torchvision_models() -> Any:
    """The module `torchvision.models`; the test is skipped where it is not installed."""
    try:
        return open_torchvision()
    except ModuleNotFoundError as missing:
        if missing.name != "torchvision":
            raise
        _missing(f"{missing}: pip install bnfx[zoo]")


def timm() -> Any:
    """The module `timm`; the test is skipped where it is not installed."""
    torchvision_models()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as missing:
        if missing.name != "timm":
            raise
        _missing("timm is not installed: pip install bnfx[zoo]")


def _missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where tests on a GPU must run: then nothing may be skipped."""
    if os.environ.get("BNFX_REQUIRE_GPU") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
