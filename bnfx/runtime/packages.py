"""Which packages are installed, and whether they can work together; nothing of them is imported."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from bnfx.runtime.providers import Where


def without_telemetry() -> None:
    """Let onnxruntime write and send nothing about its use, unless the user said otherwise.

    It looks when it is imported, and writes a device's id and a session into the user's folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def installed_runtimes() -> dict[str, str]:
    """Every distribution whose files lie in the folder `onnxruntime` in use, with its version.

    With two of them the last one installed wins.
    """
    folders = _runtime_folders()
    return {name: version for name, (version, at) in folders.items() if at == _first(folders)}


def shadowed_runtimes() -> dict[str, str]:
    """Distributions of onnxruntime in folders that Python does not come to -> folder."""
    folders = _runtime_folders()
    return {name: str(at) for name, (_, at) in folders.items() if at != _first(folders)}


def _runtime_folders() -> dict[str, tuple[str, Path]]:
    """Version and folder of each distribution of onnxruntime, in the order of `sys.path`."""
    found: dict[str, tuple[str, Path]] = {}
    for dist in metadata.distributions():
        name = str(dist.metadata["Name"] or "")
        if name.startswith(("onnxruntime", "ort")) and _owns_runtime(dist):
            found.setdefault(name, (dist.version, Path(str(dist.locate_file("")))))
    return found


def _owns_runtime(dist: metadata.Distribution) -> bool:
    """Whether its files lie in the folder `onnxruntime`; plugins and tools have their own."""
    tops = {path.parts[0] for path in dist.files or () if path.parts}
    return "onnxruntime" in (tops or (dist.read_text("top_level.txt") or "").split())


def _first(folders: Mapping[str, tuple[str, Path]]) -> Path | None:
    return next((at for _, at in folders.values()), None)


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


def loaded_libraries(where: Where) -> dict[str, bool]:
    """Which CUDA libraries serve a provider in this process; empty where the system does not tell.

    torch may have loaded them all the same: they count where onnxruntime's own provider is there.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return {}
    serves = where.on_nvidia and "libonnxruntime_providers_" in maps
    return {name: serves and f"lib{name}" in maps for name in ("cudnn", "cublas", "cudart")}
