"""Section 1: BatchNorm lets networks of saturating nonlinearities train; here 1 to 12 deep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from claims import Bench, Row, Study, main, percent, two_arms
from sweeps import draw_sweep, span, sweep, trained, trained_values

DEPTHS = (1, 2, 3, 5, 8, 12)
LR = 0.3


def measure(bench: Bench) -> dict[str, Any]:
    """Perceptrons of 100 sigmoids a layer, of growing depth."""
    depths = (1, 6, 12) if bench.quick else DEPTHS
    steps = 400 if bench.quick else 4_000
    return sweep(
        bench,
        depths,
        steps,
        lambda depth, seed: two_arms(bench, seed, depth=int(depth)),
        lambda _: LR,
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over the depth."""
    draw_sweep(
        results,
        path,
        title="Depth of a sigmoid network",
        subtitle=f"100 sigmoids a layer, init std 0.1, plain SGD, learning rate {LR}, batch 60",
        xlabel="Hidden layers",
        log=False,
    )


def judge(results: dict[str, Any]) -> list[Row]:
    """The deepest network that trains, and the accuracy at the deepest of all."""
    good = {arm: trained_values(results, arm) for arm in ("without", "with")}
    deepest = {arm: results["accuracy"][arm][-1] for arm in ("without", "with")}
    holds = max(good["with"], default=0) > max(good["without"], default=0)
    return [
        Row(
            f"depths that reach {trained(results):.0%} in {results['steps']:,} steps, "
            "without and with BN",
            "sigmoid Inception trains with BN alone",
            f"{span(good['without'])}; {span(good['with'])}",
            "holds" if holds else "does not hold",
        ),
        Row(
            f"worst seed at depth {results['values'][-1]}, without and with BN",
            "chance (1/1000) and 69.8 % (Inception)",
            f"{percent(min(deepest['without']))} and {percent(min(deepest['with']))}",
            "holds" if holds else "does not hold",
        ),
    ]


STUDY = Study("depth", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
