"""Networks of torchvision and timm for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
        pytest.skip(f"{missing}: pip install bnfx[zoo]")


def timm() -> Any:
    """The module `timm`; the test is skipped where it is not installed."""
    torchvision_models()
    return pytest.importorskip("timm", reason="timm is not installed: pip install bnfx[zoo]")
