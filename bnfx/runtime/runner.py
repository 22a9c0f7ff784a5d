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
from bnfx.runtime.assignment import Placed, open_placed
from bnfx.runtime.canary import require_arithmetic
from bnfx.runtime.packages import loaded_libraries
from bnfx.runtime.providers import Where
from bnfx.runtime.sessions import (
    SessionSettings,
    faults,
    open_session,
    require_still_on,
    runtime_errors,
)
from bnfx.runtime.values import run_session

REQUEST, ANSWER, INPUTS, OUTPUTS = "request.json", "answer.json", "inputs.npz", "outputs.npz"


@dataclass(frozen=True)
class Request:
    """What to run."""

    #: Path of the ONNX file.
    model: str
    #: "cpu", "cuda:1" or another.
    provider: str
    #: Where the profile and the answer go.
    folder: str
    #: Names of the inputs, in the order of the arrays of a run.
    names: tuple[str, ...]
    #: How many runs there are; without any, the file is only loaded.
    runs: int
    #: Of the provider.
    provider_options: Mapping[str, str] = field(default_factory=dict)
    #: Operators that may run on the CPU; None lets arithmetic of shapes alone.
    allow_on_cpu: Sequence[str] | None = None
    #: The arithmetic that the provider may compute in.
    precision: str = "fp32"
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

    @property
    def where(self) -> Where:
        """Where it is to run."""
        return Where.of(self.provider, self.provider_options, self.allow_on_cpu)


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
    #: Every node of onnxruntime's graph: provider, operator and name.
    nodes: Sequence[Sequence[str]]
    #: Execution provider -> nodes that it ran in the first run, by onnxruntime's profile.
    ran: Mapping[str, int]
    #: What else tells where and how it ran.
    proof: Mapping[str, Any] = field(default_factory=dict)
    #: Wall-clock time of loading, of all runs, and of the further values.
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def assigned(self) -> dict[str, int]:
        """Execution provider -> nodes that it was given."""
        return dict(Counter(provider for provider, *_ in self.nodes)) or dict(self.ran)


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
    where = request.where
    placed = _open(request, where)
    session = placed.session
    inputs = {v.name: [v.type, list(v.shape)] for v in session.get_inputs()}
    if runs and set(inputs) != set(request.names):
        raise VerificationError(
            f"the file takes the inputs {', '.join(inputs) or 'none'}; "
            f"given were {', '.join(request.names) or 'none'}"
        )
    proof = {"checker": complaint, **_prove(placed, request, where)}
    loaded = time.perf_counter()
    results: list[list[Array] | None] = []
    failures: dict[int, str] = {}
    ran: Counter[str] = Counter()
    for i, arrays in enumerate(runs):
        feed = dict(zip(request.names, arrays, strict=True))
        try:
            results.append(run_session(session, feed))
        except runtime_errors() as error:
            results.append(None)
            failures[i] = str(error)
            if i == 0:
                _blame(request, where, feed, failures[i])
        require_still_on(session, where.name, request.model)
        if i == 0:
            profile = _profile(session.end_profiling())
            ran = profile.ran
            proof |= {"memcpy_nodes": profile.memcpy, "libraries": loaded_libraries(where)}
            if 0 not in failures:
                _prove_run(profile, placed, where)
    done = time.perf_counter()
    values: dict[str, Array] = {}
    values_failure = ""
    outputs, nodes = tuple(v.name for v in session.get_outputs()), placed.nodes
    del session, placed  # two would hold the weights twice
    if request.values:
        values, values_failure = _values(request, runs[request.values_run], frozenset(outputs))
    return Answer(
        inputs=inputs,
        outputs=outputs,
        results=results,
        failures=failures,
        values=values,
        values_failure=values_failure,
        nodes=[dataclasses.astuple(node) for node in nodes],
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


def _open(request: Request, where: Where) -> Placed:
    settings = SessionSettings(
        num_threads=request.num_threads,
        tf32=request.precision != "fp32",
        profile=str(Path(request.folder) / "profile"),
    )
    return open_placed(request.model, where, settings, weights=request.weights)


def _prove(placed: Placed, request: Request, where: Where) -> dict[str, Any]:
    """Before any run: which nodes lie on the CPU, and that the arithmetic is the one asked for."""
    proof: dict[str, Any] = {"shape_nodes_on_cpu": [str(node) for node in placed.strays]}
    if where.on_cpu:
        return proof
    return proof | require_arithmetic(where, request.precision).told()


def _blame(request: Request, where: Where, feed: Mapping[str, Array], reason: str) -> None:
    """Tell a provider that cannot run the file from a file that nothing can run.

    Raises:
        ProviderError: onnxruntime runs it on the CPU.
    """
    if where.on_cpu:
        return
    try:
        on_cpu = open_placed(request.model, Where(), SessionSettings(), weights=request.weights)
        run_session(on_cpu.session, feed)
    except faults():
        return
    raise ProviderError(
        f"{where.name} failed on an input of {request.model} that the CPU runs: {reason}"
    )


@dataclass(frozen=True)
class Profile:
    """What ran, by onnxruntime's profile."""

    #: Execution provider -> nodes.
    ran: Counter[str]
    #: Nodes that copied between devices.
    memcpy: int
    #: Provider and operator of each node that copied nothing.
    kinds: frozenset[tuple[str, str]]


def _profile(path: str) -> Profile:
    events = json.loads(Path(path).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e["args"].get("provider")]
    pairs = [(str(args["provider"]), str(args.get("op_name", ""))) for args in nodes]
    copies = [pair for pair in pairs if pair[1].startswith("Memcpy")]
    ran = Counter(provider for provider, _ in pairs)
    return Profile(ran, len(copies), frozenset(pairs) - frozenset(copies))


def _prove_run(profile: Profile, placed: Placed, where: Where) -> None:
    """After the first run: the profile says the same as the assignment.

    Raises:
        ProviderError: Nothing ran on the provider, or something else than the strays did not.
    """
    if where.on_cpu:
        return
    if not any(provider == where.name for provider, _ in profile.kinds):
        raise ProviderError(
            f"the profile shows no node that ran on {where.name}: {dict(profile.ran)}; use "
            "provider='cpu'"
        )
    known = {node.operator for node in placed.strays}
    others = sorted(kind for name, kind in profile.kinds if name != where.name)
    if wrong := [kind for kind in others if kind not in known]:
        raise ProviderError(
            f"{where.name} was given {', '.join(wrong[:8])}, and by the profile they ran elsewhere"
        )


def _values(
    request: Request, arrays: Sequence[Array], declared: Set[str]
) -> tuple[dict[str, Array], str]:
    settings = SessionSettings(
        num_threads=request.num_threads,
        optimise=False,
        weights=request.weights or str(Path(request.values_model).parent),
    )
    try:
        source = _showing(request.values_model, (v for v in request.values if v not in declared))
        session = open_session(source, "cpu", settings)
        names = list(request.values)
        outs = session.run(names, dict(zip(request.names, arrays, strict=True)))
    except faults() as error:
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
