"""Random networks against fold_bn: how many were tried, how many came out wrong.

Each seed is one network (tests/graphs.py) and one way to call fold_bn: with or without example
inputs, options as they fall. A wrong one is printed as source code, cut down to what still fails.
The exit code is the number of wrong ones, at most 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from measuring import ROOT, progress_bar, save, show, start
from rich.console import Console

sys.path.insert(0, str(ROOT))  # the networks and the laws are those of the tests

from tests.support.graph_laws import Outcome, check, options_of_fold_bn
from tests.support.graph_moves import MOVES
from tests.support.graphs import NAME, Sample, random_network


@dataclasses.dataclass(frozen=True)
class Case:
    """One seed.

    Attributes:
        seed: Gives all the rest.
        sample: The network.
        given: Whether fold_bn gets example inputs.
        options: Its options.
    """

    seed: int
    sample: Sample
    given: bool
    options: dict[str, bool]

    def run(self) -> Outcome | str:
        """What came of it, or what is wrong."""
        others = [self.sample.inputs(5)] if self.sample.batched else []
        net, inputs = self.sample.build(), self.sample.inputs()
        try:
            return check(net, inputs, given=self.given, others=others, **self.options)
        except Exception as error:  # noqa: BLE001  # whatever fold_bn raises is a finding
            return f"{type(error).__name__}: {error}"

    def text(self) -> str:
        """A script that shows the mistake."""
        call = f"check(build(), inputs, given={self.given}, **{self.options})"
        lines = ("", "from tests.support.graph_laws import check", "", f"print({call})", "")
        return f"# seed {self.seed}\n" + self.sample.source() + "\n".join(lines)


def case(seed: int) -> Case:
    """The network and the call of one seed."""
    rng = random.Random(seed)
    sample = random_network(rng, MOVES)
    given = rng.random() < 0.6
    options = {name: rng.random() < 0.5 for name in options_of_fold_bn(given=given)}
    return Case(seed, sample, given, options)


def kind(finding: Outcome | str) -> str | None:
    """A finding without its numbers and names, to tell it from another; None for no finding."""
    if isinstance(finding, Outcome):
        return None
    return re.sub(r"\d[\d.e+-]*|'[^']*'", "#", finding)[:40]


def reduced(found: Case) -> Case:
    """The smallest network, by leaving out statements, that is wrong in the same way."""
    wanted, shorter = kind(found.run()), True
    while shorter:
        shorter = False
        for sample in _shorter(found.sample):
            smaller = dataclasses.replace(found, sample=sample)
            if _runs(sample) and kind(smaller.run()) == wanted:
                found, shorter = smaller, True
                break
    return found


def _runs(sample: Sample) -> bool:
    try:
        sample.build()(*sample.inputs())
    except Exception:  # noqa: BLE001  # a statement was missing
        return False
    return True


def _shorter(sample: Sample) -> list[Sample]:
    """`sample` without one statement each; what it defined becomes what it read."""
    found = [
        dataclasses.replace(sample, layers=sample.layers[:i] + sample.layers[i + 1 :])
        for i in range(len(sample.layers))
    ]
    outputs = sample.result.split(", ")
    found += [
        dataclasses.replace(sample, result=", ".join(outputs[:i] + outputs[i + 1 :]))
        for i in range(len(outputs) if len(outputs) > 1 and "{" not in sample.result else 0)
    ]
    for i, line in enumerate(sample.lines):
        name, _, expression = line.partition(" = ")
        rest = (*sample.lines[:i], *sample.lines[i + 1 :])
        if not re.fullmatch(r"v\d+", name):
            found.append(dataclasses.replace(sample, lines=rest))
            continue
        for other in dict.fromkeys(NAME.findall(expression)):
            swap = re.compile(rf"\b{name}\b")
            lines = tuple(swap.sub(other, text) for text in rest)
            result = swap.sub(other, sample.result)
            found.append(dataclasses.replace(sample, lines=lines, result=result))
    return found


@dataclasses.dataclass
class Tally:
    """What came out so far."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    begun: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, seed: int, finding: Outcome | str) -> None:
        """Count one network."""
        self.counts["tried"] += 1
        if isinstance(finding, str):
            self.wrong.append({"seed": seed, "finding": finding})
            return
        self.counts[finding.status] += 1
        self.counts["folded"] += finding.folded
        self.counts["kept"] += finding.left

    def row(self) -> dict[str, Any]:
        """The figures."""
        return {
            "networks tried": self.counts["tried"],
            "wrong": len(self.wrong),
            "right": self.counts["ok"],
            "refused to capture": self.counts["refused"],
            "refused to run": self.counts["guarded"],
            "not finite": self.counts["unfit"],
            "BatchNorms folded": self.counts["folded"],
            "BatchNorms kept": self.counts["kept"],
            "seconds": round(time.perf_counter() - self.begun, 1),
        }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--count", type=int, default=5000, help="networks to try")
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--quick", action="store_true", help="20 networks only")
    asked = parser.parse_args(argv)
    console = Console()
    start(console)
    warnings.simplefilter("ignore")  # of torch, about the networks drawn
    asked.out.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    seeds = range(asked.seed, asked.seed + (20 if asked.quick else asked.count))
    with progress_bar(console) as progress:
        task = progress.add_task("random networks", total=len(seeds))
        for seed in seeds:
            found = case(seed)
            finding = found.run()
            tally.add(seed, finding)
            if isinstance(finding, str):
                (asked.out / f"wrong_{seed}.py").write_text(reduced(found).text())
                progress.console.print(f"seed {seed}: {finding}", markup=False)
            if seed % 50 == 0 or seed == seeds[-1]:  # so that little is lost when it is stopped
                save(asked.out, "random_graphs", [tally.row()], first_seed=asked.seed,
                     wrong=tally.wrong)  # fmt: skip
            progress.advance(task)
    show(console, "Random networks", [tally.row()])
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
