"""One request to onnxruntime, in this process or in one of its own.

A process of its own (`python -m bnfx.runtime.runner FOLDER`) survives whatever a file does to
onnxruntime, can be stopped when it does not end, and sees an environment in which CUDA has not
started yet: NVIDIA_TF32_OVERRIDE works only there. The folder holds `request.json` and
`inputs.npz`; `answer.json` and `outputs.npz` come back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnfx.errors import BnfxError, ProviderError, VerificationError
from bnfx.numbers import Array
from bnfx.runtime.proof import canary, loaded_libraries, off_provider
from bnfx.runtime.sessions import SessionSettings, execution_provider, open_session, runtime_errors

REQUEST, ANSWER, INPUTS, OUTPUTS = "request.json", "answer.json", "inputs.npz", "outputs.npz"


@dataclass(frozen=True)
class Request:
    """What to run."""

    #: Path of the ONNX file.
    model: str
    #: "cpu", "cuda" or "cuda:1".
    provider: str
    #: Where the profile and the answer go.
    folder: str
    #: Names of the inputs, in the order of the arrays of a run.
    names: tuple[str, ...]
    #: How many runs there are; without any, the file is only loaded.
    runs: int
    #: Whether CUDA may round factors to TF32.
    tf32: bool = False
    #: Of one operator on the CPU; 0 lets onnxruntime choose.
    num_threads: int = 0
    #: Folder of the external data, where that is not the model's own.
    weights: str = ""
    #: Path of the file, without functions, of which further values are wanted.
    values_model: str = ""
    #: Names of those values; they are computed on the CPU, without optimisation.
    values: tuple[str, ...] = ()
    #: Number of the run that they are computed for.
    values_run: int = 0
    #: Whether `onnx.checker` looks at the file first.
    check: bool = True
    #: Bytes that a process of its own may take; None sets no limit.
    memory: int | None = None


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    #: Name -> onnxruntime's type of every input of the file, and its shape.
    inputs: Mapping[str, Any]
    #: Names of the outputs, in order.
    outputs: tuple[str, ...]
    #: For each run its outputs; None where onnxruntime failed.
    results: list[list[Array] | None]
    #: Run -> message.
    failures: Mapping[int, str]
    #: The further values; those that could not be computed are missing.
    values: Mapping[str, Array]
    #: Why they are missing; "" where they are not.
    values_failure: str
    #: Execution provider -> nodes that it was given.
    assigned: Mapping[str, int]
    #: Execution provider -> nodes that it ran in the first run, by onnxruntime's profile.
    ran: Mapping[str, int]
    #: What else tells where and how it ran.
    proof: Mapping[str, Any] = field(default_factory=dict)
    #: Wall-clock time of loading, of all runs, and of the further values.
    seconds: Mapping[str, float] = field(default_factory=dict)


def execute(request: Request, runs: Sequence[Sequence[Array]]) -> Answer:
    """Run the file on every input.

    Args:
        request: What to run.
        runs: Arrays of the inputs, in the order of `request.names`.

    Raises:
        VerificationError: The file cannot be loaded, or its inputs are others.
        ProviderError: The provider did not run it, or did not compute as asked.
    """
    start = time.perf_counter()
    complaint = _complaint(request.model) if request.check else ""
    session = _open(request)
    inputs = {v.name: [v.type, list(v.shape)] for v in session.get_inputs()}
    if runs and set(inputs) != set(request.names):
        raise VerificationError(
            f"the file takes the inputs {', '.join(inputs) or 'none'}; "
            f"given were {', '.join(request.names) or 'none'}"
        )
    proof = {"checker": complaint, **_prove(session, request)}
    loaded = time.perf_counter()
    results: list[list[Array] | None] = []
    failures: dict[int, str] = {}
    ran: Counter[str] = Counter()
    faults: tuple[type[Exception], ...] = (*runtime_errors(), ValueError)
    for i, arrays in enumerate(runs):
        try:
            outs = session.run(None, dict(zip(request.names, arrays, strict=True)))
            results.append([np.asarray(out) for out in outs])
        except faults as error:
            results.append(None)
            failures[i] = str(error)
        if i == 0:
            ran, memcpy = _profile(session.end_profiling())
            proof |= {"memcpy_nodes": memcpy, **_prove_run(session, request, ran)}
    done = time.perf_counter()
    values: dict[str, Array] = {}
    values_failure = ""
    outputs, assigned = tuple(v.name for v in session.get_outputs()), _assigned(session)
    del session  # two would hold the weights twice
    if request.values:
        values, values_failure = _values(request, runs[request.values_run], frozenset(outputs))
    return Answer(
        inputs=inputs,
        outputs=outputs,
        results=results,
        failures=failures,
        values=values,
        values_failure=values_failure,
        assigned=assigned,
        ran=dict(ran),
        proof=proof,
        seconds={
            "load": loaded - start,
            "run": done - loaded,
            "values": time.perf_counter() - done,
        },
    )


def _complaint(model: str) -> str:
    """What `onnx.checker` says against a file; onnxruntime runs some files that it refuses."""
    import onnx

    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error)
    return ""


def _open(request: Request) -> Any:
    settings = SessionSettings(
        num_threads=request.num_threads,
        tf32=request.tf32,
        profile=str(Path(request.folder) / "profile"),
        weights=request.weights,
    )
    try:
        return open_session(_source(request.model, request.weights), request.provider, settings)
    except ProviderError as error:
        if not request.provider.startswith("cuda") or "fallback" not in str(error).lower():
            raise
        # Shape arithmetic may have to run on the CPU; `off_provider` says whether it is only that.
        loose = dataclasses.replace(settings, strict=False)
        return open_session(_source(request.model, request.weights), request.provider, loose)


def _source(model: str, weights: str) -> str | bytes:
    return Path(model).read_bytes() if weights else model


def _prove(session: Any, request: Request) -> dict[str, Any]:
    """Before any run: the nodes are where they must be, and CUDA's arithmetic is the one asked."""
    name, _ = execution_provider(request.provider)
    if name not in session.get_providers():
        raise ProviderError(f"{name} was asked for, the session has {session.get_providers()}")
    wrong, shapes = off_provider(session, name, request.model)
    if wrong:
        raise ProviderError(
            f"{name} was asked for, but these nodes run elsewhere: {', '.join(wrong[:8])}; move "
            "them into operators that it has, or use provider='cpu'"
        )
    proof: dict[str, Any] = {"shape_nodes_on_cpu": shapes}
    if request.provider.startswith("cuda"):
        proof |= canary(request.provider, tf32=request.tf32)
    return proof


def _prove_run(session: Any, request: Request, ran: Mapping[str, int]) -> dict[str, Any]:
    """After the first run: the session has not switched, and the profile says the same."""
    name, _ = execution_provider(request.provider)
    if name not in session.get_providers():
        raise ProviderError(f"onnxruntime switched from {name} to {session.get_providers()}")
    if name != "CPUExecutionProvider" and not ran.get(name):
        raise ProviderError(f"the profile shows no node that ran on {name}: {dict(ran)}")
    return {"libraries": loaded_libraries()}


def _profile(path: str) -> tuple[Counter[str], int]:
    """Nodes that ran by execution provider, and how many of them copied between devices."""
    events = json.loads(Path(path).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e["args"].get("provider")]
    memcpy = sum(str(args.get("op_name", "")).startswith("Memcpy") for args in nodes)
    return Counter(str(args["provider"]) for args in nodes), memcpy


def _assigned(session: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[str(part.ep_name)] += len(part.get_nodes())
    return dict(counts)


def _values(
    request: Request, arrays: Sequence[Array], declared: Set[str]
) -> tuple[dict[str, Array], str]:
    settings = SessionSettings(
        num_threads=request.num_threads,
        optimise=False,
        weights=request.weights or str(Path(request.values_model).parent),
    )
    faults: tuple[type[Exception], ...] = (*runtime_errors(), ValueError, VerificationError)
    try:
        source = _showing(request.values_model, (v for v in request.values if v not in declared))
        session = open_session(source, "cpu", settings)
        names = list(request.values)
        outs = session.run(names, dict(zip(request.names, arrays, strict=True)))
    except faults as error:
        return {}, str(error)
    return dict(zip(names, map(np.asarray, outs), strict=True)), ""


def _showing(path: str, values: Iterable[str]) -> bytes:
    """The file with `values` as further outputs: protobuf merges what is appended to a message."""
    import onnx

    more = onnx.ModelProto()
    more.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    return Path(path).read_bytes() + bytes(more.SerializeToString())


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    _end_with_the_caller(folder)
    request = Request(**json.loads((folder / REQUEST).read_text()))
    if request.memory is not None:
        _limit(request.memory)
    with np.load(folder / INPUTS) as stored:
        runs = [[stored[f"{i}.{name}"] for name in request.names] for i in range(request.runs)]
    try:
        answer = execute(request, runs)
    except BnfxError as error:
        said = {"error": type(error).__name__, "message": str(error)}
        (folder / ANSWER).write_text(json.dumps(said))
        return
    arrays: dict[str, Any] = {f"value.{name}": value for name, value in answer.values.items()}
    for i, outs in enumerate(answer.results):
        arrays |= {f"run.{i}.{k}": out for k, out in enumerate(outs or ())}
    with (folder / OUTPUTS).open("wb") as out:
        np.savez(out, **arrays)
    told = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer)}
    told |= {"results": [outs if outs is None else len(outs) for outs in answer.results]}
    told |= {"values": list(answer.values)}
    (folder / ANSWER).write_text(json.dumps(told))


def _limit(memory: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)  # `ulimit -v`, which is the user's word
    if allowed != resource.RLIM_INFINITY:
        memory = min(memory, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _end_with_the_caller(folder: Path) -> None:
    """Whoever asked holds the other end of standard input: where that closes, nobody waits."""

    def wait() -> None:
        os.read(0, 1)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
