"""What starts, and what it is built of: the facts behind `doctor`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfx.runtime.packages import (
    folder_of,
    installed_runtimes,
    least_versions,
    runtime_cuda,
    runtime_owner,
    shadowed_runtimes,
    torch_cuda,
)
from bnfx.version import __version__, version_of

_PACKAGES = (
    *("torch", "numpy", "onnx", "onnxscript"),
    *("matplotlib", "safetensors", "timm", "torchvision"),
)
_PATIENCE = 180.0  # seconds; starting CUDA for the first time takes up to a minute


@dataclass(frozen=True)
class Facts:
    """The environment as found."""

    bnfx: str  #: its version
    python: tuple[int, ...]
    versions: Mapping[str, str | None]  #: distribution -> version, None where not installed
    runtimes: Mapping[str, str]  #: distribution whose files are the onnxruntime in use -> version
    least: Mapping[str, str]  #: distribution -> the least version that bnfx declares
    import_errors: Mapping[str, str]  #: package -> why its import fails
    torch_cuda: str | None  #: CUDA that torch is built for, None for the CPU
    runtime_owner: str | None  #: the distribution that onnxruntime's files belong to
    runtime_cuda: str | None  #: CUDA that onnxruntime is built for, None for the CPU
    #: "cpu", "cuda" and the others of this onnxruntime -> why no node runs there; "" where one ran.
    providers: Mapping[str, str]
    #: What the CUDA provider's library links to and the loader does not find; None where that could
    #: not be asked.
    missing_libraries: tuple[str, ...] | None
    driver: str | None  #: what NVIDIA's driver says of itself; None without one
    devices: tuple[str, ...]  #: names of the GPUs
    cudnn: str | None  #: its version; None where it does not load
    #: Distributions of onnxruntime that another one hides -> folder.
    shadowed: Mapping[str, str] = field(default_factory=dict)


def collect() -> Facts:
    """Look at this environment; what could crash runs in a process of its own."""
    probe = _probe()
    return Facts(
        bnfx=__version__,
        python=tuple(sys.version_info[:3]),
        versions={name: version_of(name) for name in _PACKAGES},
        runtimes=installed_runtimes(),
        shadowed=shadowed_runtimes(),
        least=least_versions(),
        import_errors=probe.get("import_errors", {}),
        torch_cuda=torch_cuda(),
        runtime_owner=runtime_owner(),
        runtime_cuda=runtime_cuda(),
        providers=probe["providers"],
        missing_libraries=_missing_libraries(folder_of("onnxruntime")),
        driver=probe.get("driver"),
        devices=tuple(probe.get("devices", ())),
        cudnn=probe.get("cudnn"),
    )


def _missing_libraries(folder: Path | None) -> tuple[str, ...] | None:
    """Libraries that the CUDA provider links to and neither the loader nor a package has."""
    library = folder / "capi" / "libonnxruntime_providers_cuda.so" if folder else None
    ldd = shutil.which("ldd")
    if library is None or not library.is_file() or ldd is None:
        return None
    root = library.parents[2] / "nvidia"
    folders = sorted({str(file.parent) for file in root.glob("*/lib/lib*.so*")})
    own = os.environ.get("LD_LIBRARY_PATH")
    path = os.pathsep.join([*folders, *([own] if own else [])])
    try:
        done = subprocess.run(
            [ldd, str(library)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "LD_LIBRARY_PATH": path},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return tuple(dict.fromkeys(re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)))


def _probe() -> dict[str, Any]:
    """The lines of `bnfx.environment.probe`, as far as it came."""
    command = [sys.executable, "-m", "bnfx.environment.probe"]
    search = os.pathsep.join(part for part in sys.path if part)
    end = "it did not answer"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env={**os.environ, "PYTHONPATH": search},
        )
        lines = done.stdout
        last = done.stderr.strip().splitlines()[-1:]
        end = f"the process that tried ended with code {done.returncode} {' '.join(last)}".strip()
    except subprocess.TimeoutExpired as slow:
        lines = (slow.stdout or b"").decode(errors="replace")
        end = f"it did not start within {_PATIENCE:.0f} seconds"
    found: dict[str, Any] = {}
    providers = {"cpu": end, "cuda": end}
    for line in lines.splitlines():
        if not line.startswith("{"):
            continue
        part = json.loads(line)
        providers.update(part.pop("provider", {}))
        found.update(part)
    return {**found, "providers": providers}
