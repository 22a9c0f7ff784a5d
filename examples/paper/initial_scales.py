"""Section 1: BatchNorm reduces the dependence on initial scale; here over four decades."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from claims import Bench, Row, Study, main, two_arms
from sweeps import draw_sweep, span, sweep, trained, trained_values

SCALES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LR = 0.3


def measure(bench: Bench) -> dict[str, Any]:
    """The perceptron of section 4.1 from nine standard deviations of its initial weights."""
    scales = (0.001, 0.1, 10.0) if bench.quick else SCALES
    steps = 400 if bench.quick else 4_000
    return sweep(
        bench, scales, steps, lambda std, seed: two_arms(bench, seed, std=std), lambda _: LR
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over the initial scale."""
    draw_sweep(
        results,
        path,
        title="Initial scales",
        subtitle=f"three hidden layers of 100 sigmoids, plain SGD, learning rate {LR}, batch 60",
        xlabel="Standard deviation of the initial weights",
        log=True,
    )


def judge(results: dict[str, Any]) -> list[Row]:
    """The scales from which training succeeds, and their worst accuracy."""
    good = {arm: trained_values(results, arm) for arm in ("without", "with")}
    wider = len(good["with"]) > len(good["without"])
    return [
        Row(
            f"initial scales that reach {trained(results):.0%} in {results['steps']:,} steps, "
            "without and with BN",
            "less careful initialisation (no figure)",
            f"{span(good['without'])}; {span(good['with'])}",
            "holds" if wider else "does not hold",
        )
    ]


STUDY = Study("initial_scales", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
