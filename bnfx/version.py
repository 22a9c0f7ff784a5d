"""The version of bnfx, and of what it works with."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"
#: Versions of ONNX's operators that torch's exporter writes; a test asks it.
OPSETS = range(18, 26)
_PACKAGES = ("torch", "onnx", "onnxscript", "numpy", "bnfx")


def version_of(name: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide what bnfx computes."""
    found = {name: version_of(name) for name in _PACKAGES}
    every = ((str(dist.metadata["Name"]), dist.version) for dist in metadata.distributions())
    # The first of a name on the path is the one in use.
    found |= dict(reversed([pair for pair in every if pair[0].startswith("onnxruntime")]))
    here = {"python": platform.python_version(), "platform": platform.platform()}
    return here | {name: version for name, version in found.items() if version is not None}
