"""Which packages are installed, and whether they can work together; nothing of them is imported."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path

#: Distributions that own the folder `onnxruntime`; with two of them the last one installed wins.
_RUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    *("onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-training", "ort-nightly"),
    *("ort-nightly-gpu", "onnxruntime-silicon"),
)


def installed_runtimes() -> dict[str, str]:
    """Every installed distribution of onnxruntime, with its version."""
    found = {}
    for name in _RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def double_install() -> str | None:
    """What is wrong if two distributions own the same onnxruntime, and the remedy; None if fine."""
    found = installed_runtimes()
    if len(found) < 2:
        return None
    names = " and ".join(f"{name} {version}" for name, version in found.items())
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else next(iter(found))
    return (
        f"{names} are installed into the same folder, and the one installed last is what runs; "
        f"pip uninstall -y {' '.join(found)} && pip install {keep}"
    )


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
    """Why torch's CUDA libraries cannot serve onnxruntime; None where they can.

    onnxruntime-gpu loads the libraries of its own major version of CUDA, and a torch of another
    major version, or for the CPU, brings none of those.
    """
    wanted, brought = runtime_cuda(), torch_cuda()
    if wanted is None:
        return None
    major = wanted.partition(".")[0]
    if brought is None:
        return f"onnxruntime needs CUDA {major}, and this torch is for the CPU and brings none"
    if brought.partition(".")[0] != major:
        return f"onnxruntime needs CUDA {major}, and this torch brings CUDA {brought}"
    return None


def _stated(package: str, file: str, pattern: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        return None
    match = re.search(pattern, path.read_text())
    return match.group(1) if match else None
