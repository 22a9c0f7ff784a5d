"""Put every case to every folding that is installed: folded, right, refused, or silently wrong.

"folded": right, and no BatchNorm is left; "right": right, and some are left, or nobody can see;
"refused": it raised; "WRONG": an output is off by more than a thousandth of the largest one, or the
network that was given has changed. Without options the page and the picture are written anew:

    .venv/bin/python examples/conformance/run.py
    .venv/bin/python examples/conformance/run.py --tool fuse --case "called twice" --script
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import inspect
import io
import json
import logging
import platform
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import onnx
import torch
from cases import CASES, Case
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from tools import TOOLS, File, Tool, exported, ran
from torch import Tensor, nn

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
PAGE = ROOT / "examples" / "site" / "docs" / "results" / "conformance.md"
KINDS = ("folded", "right", "refused", "WRONG")
COLORS = ("#0072B2", "#9ecae1", "#e6e6e6", "#D55E00")
LIMIT = 1e-3
ABOUT = """\
{count} small networks, each for a kind of code on which a folding of BatchNorm can go wrong or
could do more, put to the foldings that were installed. Each was called as its own documentation
says. *Folded*: right, and no BatchNorm is left. *Right*: right, and some are left, or nobody can
see. *Refused*: it raised, or the exporter gave it no right file. *WRONG*: the output is off by more
than a thousandth of the largest one without a word, or the network that was given has changed.

{run}. One command writes this page: `.venv/bin/python examples/conformance/run.py`; with
`--tool NAME --case NAME --script` it prints what shows one square alone.

![What each folding does with each case](conformance/conformance.png)
"""
SOBER = """\
What this does not say: the cases were chosen by the authors of bnfx, from faults that they met in
foldings, their own among them. Most are rare in practice, the other tools do other things well, and
a newer version may do better; a name that begins with an underscore is internal to its package, and
of MCT, which has no folding to call, what it makes of a network before it quantises was taken. The
random networks are those of bnfx's own tests.
"""


Build = Callable[[], tuple[nn.Module, Tensor]]


def outcome(tool: Tool, build: Build, file: File | None = None) -> tuple[str, str]:
    """What became of a network, and the details."""
    net, x = build()
    file = file or file_of(build)
    reference = copy.deepcopy(net).double()
    with torch.no_grad():
        wanted = reference(x.double())
    moving = tuple(f"{path}." for path, module in net.named_modules() if module.training)
    state = {n: t.clone() for n, t in net.state_dict().items() if not n.startswith(moving)}
    hushed = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(hushed),
            contextlib.redirect_stderr(hushed),
            torch.no_grad(),
        ):
            run, left = tool.fold(net, x, file)
            found = run(x)
    except Exception as error:  # noqa: BLE001  # a refusal may be anything
        return "refused", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[
            :200
        ]
    off = gap(found, wanted)
    if off > LIMIT:
        return "WRONG", f"off by {off:.2g} of the largest output"
    kept = net.state_dict()
    if not all(name in kept and torch.equal(t, kept[name]) for name, t in state.items()):
        return "WRONG", "the network that was given has changed"
    return ("folded" if left == 0 else "right"), f"{'?' if left is None else left} left"


def file_of(build: Build) -> File:
    """The file of a network, exported once for all foldings that read one.

    Where the exporter writes another network, there is nothing to judge the others by: they get an
    error in its place, and the exporter alone is charged.
    """

    @functools.cache
    def made() -> onnx.ModelProto:
        net, x = build()
        file = exported(net, x)
        run, _ = ran(file)
        with torch.no_grad():
            if gap(run(x), net(x)) > LIMIT:
                raise ValueError("the exporter wrote another network: no file to fold")
        return file

    return made


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value."""
    if found.shape != wanted.shape or not found.isfinite().all():
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def random_cases(count: int, seed: int) -> list[tuple[str, Build]]:
    """Random networks of the tests, with one input and one output."""
    sys.path.insert(0, str(ROOT))
    from tests.support.graph_moves import MOVES
    from tests.support.graphs import Sample, random_network

    found: list[tuple[str, Build]] = []
    while len(found) < count:
        sample, name = random_network(random.Random(seed), MOVES), f"seed {seed}"
        seed += 1
        if len(sample.inputs()) != 1:
            continue

        def build(sample: Sample = sample) -> tuple[nn.Module, Tensor]:
            return sample.build().float().eval(), sample.inputs()[0].float()

        with contextlib.suppress(RuntimeError), torch.no_grad():  # those that need float64
            net, x = build()
            values = (net(x), net.double()(x.double()))
            if all(isinstance(v, Tensor) and v.isfinite().all() and v.any() for v in values):
                found.append((name, build))
    return found


def version(tool: Tool) -> str | None:
    """Of the tool's package; None where it is not installed."""
    names = (tool.package, f"{tool.package}-gpu")
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def script(tool: Tool, case: Case) -> str:
    """What shows this outcome alone: run it in this folder."""
    return f"""# {tool.name} {version(tool)}: {case.name} ({case.about})
import onnx
import torch
from cases import CASES
from tools import TOOLS, exported

net, x = next(case for case in CASES if case.name == {case.name!r}).build()
wanted = net(x)
fold = next(tool.fold for tool in TOOLS if tool.name == {tool.name!r})
# {inspect.getsource(tool.fold).strip().replace(chr(10), chr(10) + "# ")}
folded, left = fold(net, x, lambda: exported(net, x))
print((folded(x) - wanted).abs().max().item(), "of", wanted.abs().max().item(), "left:", left)
"""


def draw(table: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """A square for each case and folding."""
    tools, cases = [*table], [*next(iter(table.values()))]
    left, width, height = 2.7, 4.0 + 0.4 * len(tools), 2.1 + 0.24 * len(cases)  # inches
    figure = Figure(figsize=(width, height), dpi=120)
    across, up = (0.4 * len(tools)) / width, (0.24 * len(cases)) / height
    ax = figure.add_axes((left / width, 0.5 / height, across, up))
    grid = [[KINDS.index(table[tool][case]) for tool in tools] for case in cases]
    ax.imshow(grid, cmap=ListedColormap(COLORS), vmin=-0.5, vmax=3.5, aspect="auto")
    ax.set_xticks(range(len(tools)), tools, rotation=45, ha="left", fontsize=8)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(cases)), cases, fontsize=8)
    ax.tick_params(length=0)
    ax.set_xticks([i + 0.5 for i in range(len(tools))], minor=True)
    ax.set_yticks([i + 0.5 for i in range(len(cases))], minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    for i, row in enumerate(grid):
        for j, kind in enumerate(row):
            if kind == KINDS.index("WRONG"):
                ax.text(j, i, "x", ha="center", va="center", color="white", fontsize=8)
    for i, (word, color) in enumerate(zip(KINDS, COLORS, strict=True)):
        at = 0.2 + 0.85 * i
        figure.text(at / width, 0.15 / height, "■", color=color, fontsize=11)
        figure.text((at + 0.15) / width, 0.16 / height, word, fontsize=9)
    ax.spines[:].set_visible(False)
    figure.savefig(path)


def page(content: Mapping[str, object]) -> str:
    """The page of the site, from what was stored."""
    traps, randoms, versions, about, run = (
        content[key] for key in ("traps", "random", "versions", "about", "run")
    )
    assert isinstance(traps, dict)
    assert isinstance(randoms, dict)
    assert isinstance(versions, dict)
    assert isinstance(about, dict)
    head = ("folding", "version", *KINDS, *(f"random: {kind}" for kind in KINDS))
    lines = [
        "# Conformance\n",
        ABOUT.format(count=len(about), run=run),
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for tool in traps:
        counts = [Counter(one[tool].values()) for one in (traps, randoms) if tool in one]
        cells = [str(count[kind]) for count in counts for kind in KINDS]
        lines.append(
            f"| {tool} | {versions[tool]} | {' | '.join(cells + ['-'] * (8 - len(cells)))} |"
        )
    lines += ["", "## Where it was wrong", ""]
    for tool, found in traps.items():
        wrong = [f"{case} ({about[case]})" for case, kind in found.items() if kind == "WRONG"]
        if wrong:
            lines.append(f"* **{tool}**: {'; '.join(wrong)}.")
    lines += ["", SOBER]
    return "\n".join(lines)


Found = dict[str, dict[str, str]]


def store(
    out: Path,
    tools: Sequence[Tool],
    cases: Sequence[Case],
    traps: Found,
    randoms: Found,
    details: Found,
) -> None:
    """Write what is known so far: the numbers, the picture, and the page of the site."""
    now, python = datetime.datetime.now(tz=datetime.UTC).date(), platform.python_version()
    here = f"{platform.system()} {platform.machine()}, Python {python}, torch {torch.__version__}"
    content = {
        "run": f"Run on {now}, {here}",
        "versions": {tool.name: version(tool) for tool in tools},
        "about": {case.name: case.about for case in cases},
        "traps": traps,
        "random": randoms,
        "details": details,
    }
    out.mkdir(exist_ok=True)
    (out / "conformance.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(traps, out / "conformance.png")
    if out == RESULTS:
        PAGE.write_text(page(content), encoding="utf-8")


def _prepare() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)


def main(argv: Sequence[str]) -> int:
    """Run what is asked for; 1 where bnfx is wrong somewhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tool", default="", help="a part of its name")
    parser.add_argument("--case", default="", help="a part of its name")
    parser.add_argument("--random", type=int, default=40, help="how many random networks")
    parser.add_argument("--script", action="store_true", help="print what shows it, do not run it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the numbers")
    options = parser.parse_args(argv)
    _prepare()
    tools = [tool for tool in TOOLS if options.tool in tool.name and version(tool)]
    cases = [case for case in CASES if options.case in case.name]
    if options.script:
        print("\n".join(script(tool, case) for tool in tools for case in cases))
        return 0
    whole = not (options.tool or options.case)
    networks = random_cases(options.random, 70000) if whole else []
    traps: Found = {}
    randoms: Found = {}
    details: Found = {}
    trapped = [(case.name, case.build, file_of(case.build)) for case in cases]
    drawn = [(name, build, file_of(build)) for name, build in networks]
    for tool in tools:
        found = {name: outcome(tool, build, file) for name, build, file in trapped}
        traps[tool.name] = {name: kind for name, (kind, _) in found.items()}
        details[tool.name] = {name: told for name, (_, told) in found.items()}
        if networks and tool.name != "Inductor, freezing":  # it compiles C++ for each
            randoms[tool.name] = {name: outcome(tool, build, f)[0] for name, build, f in drawn}
        counts = (Counter(traps[tool.name].values()), Counter(randoms.get(tool.name, {}).values()))
        print(
            f"{tool.name} {version(tool)}: {dict(counts[0])}; random: {dict(counts[1])}", flush=True
        )
        if not whole:
            print(json.dumps(details[tool.name], indent=1))
            continue
        store(options.out, tools[: len(traps)], cases, traps, randoms, details)
    own = [kind for tool, found in (*traps.items(), *randoms.items()) for kind in found.values()
           if tool.startswith("bnfx")]  # fmt: skip
    return int("WRONG" in own)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
