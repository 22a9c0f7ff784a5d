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

from bnfx.runtime.packages import without_telemetry


def main() -> None:
    """Try the imports, the driver, and a node on each provider."""
    without_telemetry()
    _tell(import_errors=_import_errors())
    _tell(provider={"cpu": _why_not("cpu")})
    _tell(**_driver())
    _tell(cudnn=_cudnn())
    _tell(provider={"cuda": _why_not("cuda")})


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


def _why_not(provider: str) -> str:
    """Why no node runs on `provider`; "" where one ran."""
    if sys.modules.get("onnxruntime") is None:
        return "onnxruntime does not import"
    try:
        from bnfx.runtime.sessions import cuda_problem, unavailable_reason

        if provider == "cuda" and (problem := cuda_problem()):
            return problem
        return unavailable_reason(provider) or ""
    except Exception as error:  # noqa: BLE001  # a broken onnxruntime raises anything
        return f"{type(error).__name__}: {error}"


def _driver() -> dict[str, Any]:
    """What the NVIDIA driver says, if there is one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return {"driver": "of unknown version", "devices": []}
    found = f"supports CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return {"driver": found, "devices": []}
    names = []
    for device in range(count.value):
        name = ctypes.create_string_buffer(128)
        cuda.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    return {"driver": found, "devices": names}


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
