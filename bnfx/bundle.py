"""What reproduces a failed verification: the file, the inputs, the report, the environment."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.verification.verdicts import VerifyReport

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "bnfx")


def write_bundle(
    folder: Path, f: Path, args: Any, kwargs: Mapping[str, Any] | None, found: VerifyReport
) -> Path:
    """Fill `folder`, made if need be, and return it.

    It holds the ONNX file with its external data, `inputs.npz` with the example's tensors in order,
    `report.json`, `report.txt` and `environment.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (f, *f.parent.glob(f"{f.name}.*")):
        shutil.copy2(path, folder / path.name)
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    leaves = pytree.tree_leaves((positional, dict(kwargs or {})))
    tensors = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
    arrays: dict[str, Any] = {
        f"input_{i}": (t.float() if str(t.dtype) == "torch.bfloat16" else t).numpy()
        for i, t in enumerate(tensors)
    }
    with (folder / "inputs.npz").open("wb") as out:
        np.savez(out, **arrays)
    (folder / "report.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    (folder / "report.txt").write_text(f"{found}\n")
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    return folder


def environment() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
