"""The folder that reproduces a failed verification on another machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.verification.samples import as_sample
from bnfx.verification.verdicts import VerifyReport
from bnfx.version import versions


def keep(
    bundle: Path, written: Path, args: Any, kwargs: Mapping[str, Any] | None, found: VerifyReport
) -> str:
    """Where what reproduces a failure lies, or why it does not: that must not hide the failure."""
    try:
        _write_bundle(bundle, written, args, kwargs, found)
    except OSError as error:
        return f"the bundle {bundle} cannot be written: {error}"
    return str(bundle)


def _write_bundle(
    folder: Path, f: Path, args: Any, kwargs: Mapping[str, Any] | None, found: VerifyReport
) -> None:
    """Fill `folder`, made if need be.

    It holds the ONNX file with its external data, `inputs.npz` with the example's tensors in order,
    `report.json`, `report.txt` and `environment.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (f, *f.parent.glob(f"{f.name}.*")):
        shutil.copy2(path, folder / path.name)
    example = as_sample(args, kwargs)
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    tensors = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
    arrays: dict[str, Any] = {
        f"input_{i}": (t.float() if t.dtype is torch.bfloat16 else t).numpy()
        for i, t in enumerate(tensors)
    }
    with (folder / "inputs.npz").open("wb") as out:
        np.savez(out, **arrays)
    (folder / "report.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    (folder / "report.txt").write_text(f"{found}\n")
    (folder / "environment.json").write_text(json.dumps(versions(), indent=1) + "\n")
