"""What a provider runs on: the driver and the names of GPUs, the processor."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

from bnfx.runtime.providers import Where


def device_name(where: Where) -> str:
    """Such as "NVIDIA H200" or "AMD EPYC"; "" where nothing tells."""
    if where.on_cpu:
        return _processor()
    names = driver().get("devices", ()) if where.on_nvidia else ()
    _, index = where.memory
    return str(names[index]) if index < len(names) else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def driver() -> dict[str, Any]:
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
