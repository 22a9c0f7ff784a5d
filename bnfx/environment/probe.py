"""Runs in a process of its own and prints one line of JSON after each thing that it has tried.

A provider or a library that crashes or hangs ends this process alone, and the lines before tell
how far it came.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from typing import Any

from bnfx.runtime.devices import driver
from bnfx.runtime.packages import without_telemetry

#: Runs operators that call a service, and no layer.
_REMOTE = "AzureExecutionProvider"


def main() -> None:
    """Try the imports, the driver, and a node on each provider."""
    without_telemetry()
    _tell(import_errors=_import_errors())
    _tell(provider={"cpu": _why_not("cpu")})
    _tell(**driver())
    _tell(cudnn=_cudnn())
    _tell(provider={"cuda": _why_not("cuda")})
    for name in _others():
        _tell(provider={name: _why_not(name)})


def _tell(**found: Any) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _import_errors() -> dict[str, str]:
    """Why imports fail; torch first, whose CUDA libraries onnxruntime finds then."""
    found = {}
    for name in ("torch", "numpy", "onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # else it is not installed, which its version tells
                found[name] = str(error)
        except Exception as error:  # noqa: BLE001  # a broken package raises anything
            found[name] = f"{type(error).__name__}: {error}"
    runtime = sys.modules.get("onnxruntime")
    if runtime is not None and getattr(runtime, "InferenceSession", None) is None:
        found["onnxruntime"] = "its files are not complete: it has no InferenceSession"
    return found


def _others() -> list[str]:
    """What else this onnxruntime has, built in or as a plugin; by short names where they exist."""
    runtime = sys.modules.get("onnxruntime")
    if runtime is None or getattr(runtime, "InferenceSession", None) is None:
        return []
    from bnfx.runtime.providers import CPU, CUDA, SHORT, installed_plugins

    short = {provider.name: name for name, provider in SHORT.items()}
    found = dict.fromkeys([*runtime.get_available_providers(), *installed_plugins()])
    return [short.get(name, name) for name in found if name not in (CPU, CUDA, _REMOTE)]


def _why_not(provider: str) -> str:
    """Why no node runs on `provider`; "" where one ran."""
    if sys.modules.get("onnxruntime") is None:
        return "onnxruntime does not import"
    try:
        from bnfx.runtime.availability import unavailable_reason
        from bnfx.runtime.sessions import cuda_problem

        if provider == "cuda" and (problem := cuda_problem()):
            return problem
        return unavailable_reason(provider) or ""
    except Exception as error:  # noqa: BLE001  # a broken onnxruntime raises anything
        return f"{type(error).__name__}: {error}"


def _cudnn() -> str | None:
    """Version of cuDNN as torch's libraries or the loader have it; None where it does not load."""
    try:
        version = ctypes.CDLL("libcudnn.so.9").cudnnGetVersion
    except (OSError, AttributeError):
        return None
    version.restype = ctypes.c_size_t
    number = int(version())
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


if __name__ == "__main__":
    main()
