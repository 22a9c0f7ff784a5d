"""Requests to onnxruntime in a process of their own: no crash, hang or greed of it gets out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfx import errors
from bnfx.errors import ProviderError, VerificationError
from bnfx.numbers import Array
from bnfx.runtime.runner import ANSWER, INPUTS, OUTPUTS, REQUEST, Answer, Request
from bnfx.workspace import workspace

#: What onnxruntime, numpy and Python say where memory is short.
_STARVED = ("bad_alloc", "bad allocation", "memoryerror", "allocate", "out of memory")
#: Least memory that onnxruntime is left, in bytes.
_LEAST = 2**31


def execute_apart(request: Request, runs: Sequence[Sequence[Array]], *, timeout: float) -> Answer:
    """`bnfx.runtime.runner.execute` in a process of its own, with limits of time and memory.

    For a strict float32 run on a GPU, NVIDIA_TF32_OVERRIDE=0 is set before CUDA starts.

    Args:
        request: What to run.
        runs: Arrays of the inputs, in the order of `request.names`.
        timeout: Seconds after which it is stopped.

    Raises:
        VerificationError: The file cannot be loaded, crashed onnxruntime or did not end in time.
        ProviderError: The provider did not run it, or did not compute as asked.
    """
    folder = Path(request.folder)
    # A GPU's library reserves far more address space than it uses, so that no limit fits it.
    memory = _free_memory() if request.where.on_cpu else None
    request = dataclasses.replace(request, runs=len(runs), memory=memory)
    (folder / REQUEST).write_text(json.dumps(dataclasses.asdict(request)))
    arrays: dict[str, Any] = {
        f"{i}.{name}": array
        for i, values in enumerate(runs)
        for name, array in zip(request.names, values, strict=True)
    }
    with (folder / INPUTS).open("wb") as out:
        np.savez(out, **arrays)
    (folder / ANSWER).unlink(missing_ok=True)
    _run(folder, request, timeout)
    told = json.loads((folder / ANSWER).read_text())
    if "error" in told:
        _require_memory(request, told["message"])
        raise getattr(errors, told["error"])(told["message"])
    with np.load(folder / OUTPUTS) as stored:
        told["results"] = [
            None if count is None else [stored[f"run.{i}.{k}"] for k in range(count)]
            for i, count in enumerate(told["results"])
        ]
        told["values"] = {name: stored[f"value.{name}"] for name in told["values"]}
    told["failures"] = {int(i): message for i, message in told["failures"].items()}
    for message in told["failures"].values():
        _require_memory(request, message)
    told["outputs"] = tuple(told["outputs"])
    return Answer(**told)


def load_apart(model: Path, *, timeout: float = 120.0) -> None:
    """Load a file in a process of its own, to learn whether it is safe to do so in this one.

    Raises:
        VerificationError: It is not valid, cannot be loaded, or crashes onnxruntime.
        ProviderError: Memory is too short for it.
    """
    with workspace() as folder:
        request = Request(str(model), "cpu", str(folder), (), 0)
        execute_apart(request, [], timeout=timeout)


def _run(folder: Path, request: Request, timeout: float) -> None:
    environment = dict(os.environ)
    if request.where.on_nvidia:
        environment.pop("NVIDIA_TF32_OVERRIDE", None)
        if request.precision == "fp32":
            environment["NVIDIA_TF32_OVERRIDE"] = "0"
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (root, environment.get("PYTHONPATH", "")))
    )
    command = [sys.executable, "-m", "bnfx.runtime.runner", str(folder)]
    theirs, ours = os.pipe()  # ours closes when this process ends, however it does
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=theirs,
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"onnxruntime had not finished {request.model} after {timeout:.0f} s and was stopped; "
            "give it longer (timeout, in seconds) or fewer inputs (num_inputs)"
        ) from error
    finally:
        os.close(theirs)
        os.close(ours)
    if (folder / ANSWER).is_file():
        return
    last = (done.stderr.strip().splitlines() or [""])[-1]
    _require_memory(request, last, crashed=done.returncode < 0)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        kind = VerificationError if request.where.on_cpu else ProviderError
        raise kind(f"onnxruntime crashed on {request.model} ({name}) {last}".rstrip())
    raise VerificationError(f"onnxruntime gave up on {request.model}: {last}")


def _require_memory(request: Request, said: str, *, crashed: bool = False) -> None:
    """A file that `ulimit -v` leaves too little memory for has not failed: it has not run.

    Raises:
        ProviderError: Such a limit holds here, and onnxruntime ran out of memory or crashed.
    """
    least, allowed = request.memory, _allowed_memory()
    starved = crashed or any(word in said.lower() for word in _STARVED)
    if starved and allowed is not None and (least is None or allowed < least):
        raise ProviderError(
            f"onnxruntime ran out of memory on {request.model}: 'ulimit -v' leaves a process "
            f"{allowed / 2**30:.1f} GiB here; raise it ({said})"
        )


def _allowed_memory() -> int | None:
    """Bytes that `ulimit -v` leaves a process; None where it sets no limit."""
    if sys.platform == "win32":
        return None
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if allowed == resource.RLIM_INFINITY else allowed


def _free_memory() -> int | None:
    """Bytes that a process may take here; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    available = values.get("MemAvailable", "").split()
    return max(_LEAST, int(available[0]) * 1024) if available else None
