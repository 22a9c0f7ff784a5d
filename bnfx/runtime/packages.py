"""Which packages are installed, and whether they can work together; nothing of them is imported."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path

from bnfx.version import version_of

#: Distributions that own the folder `onnxruntime`; with two of them the last one installed wins.
_RUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    *("onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-training", "ort-nightly"),
    *("ort-nightly-gpu", "onnxruntime-silicon"),
)


def without_telemetry() -> None:
    """Let onnxruntime write and send nothing about its use, unless the user said otherwise.

    It looks when it is imported, and writes a device's id and a session into the user's folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def installed_runtimes() -> dict[str, str]:
    """Every installed distribution of onnxruntime, with its version."""
    found = {name: version_of(name) for name in _RUNTIMES}
    return {name: version for name, version in found.items() if version is not None}


def least_versions() -> dict[str, str]:
    """Least versions out of bnfx's own metadata, as `pyproject.toml` states them."""
    try:
        requirements = metadata.requires("bnfx") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found if match}


def torch_cuda() -> str | None:
    """CUDA version that torch was built for, such as "13.0"; None for a CPU torch."""
    return _stated("torch", "version.py", r"cuda[^=\n]*=\s*['\"]([\d.]+)['\"]")


def runtime_cuda() -> str | None:
    """CUDA version that onnxruntime was built for, such as "13.0"; None for the CPU package."""
    where = "capi/build_and_package_info.py"
    return _stated("onnxruntime", where, r"cuda_version\s*=\s*['\"]([\d.]+)['\"]")


def runtime_owner() -> str | None:
    """The distribution whose files lie in the folder `onnxruntime`; None where that is not said."""
    where = "capi/build_and_package_info.py"
    return _stated("onnxruntime", where, r"package_name\s*=\s*['\"]([\w-]+)['\"]")


def cuda_mismatch() -> str | None:
    """Why the installed torch's CUDA libraries cannot serve onnxruntime; None where they can."""
    return mismatch(runtime_cuda(), torch_cuda())


def mismatch(wanted: str | None, brought: str | None) -> str | None:
    """Why CUDA `brought` by torch cannot serve an onnxruntime built for CUDA `wanted`.

    onnxruntime-gpu loads the libraries of its own major version of CUDA, and a torch of another
    major version, or for the CPU (None), brings none of those.
    """
    if wanted is None:
        return None
    major = wanted.partition(".")[0]
    if brought is None:
        return f"onnxruntime needs CUDA {major}, and this torch is for the CPU and brings none"
    if brought.partition(".")[0] != major:
        return f"onnxruntime needs CUDA {major}, and this torch brings CUDA {brought}"
    return None


def folder_of(package: str) -> Path | None:
    """Where a package lies; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _stated(package: str, file: str, pattern: str) -> str | None:
    folder = folder_of(package)
    if folder is None or not (folder / file).is_file():
        return None
    match = re.search(pattern, (folder / file).read_text())
    return match.group(1) if match else None
