"""Section 3.3: BatchNorm enables higher learning rates; here over three and a half decades."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from claims import Bench, Row, Study, main, mean, percent, two_arms
from sweeps import draw_sweep, span, sweep, trained, trained_values

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def measure(bench: Bench) -> dict[str, Any]:
    """The perceptron of section 4.1 at eight learning rates."""
    rates = (0.01, 1.0, 30.0) if bench.quick else RATES
    steps = 400 if bench.quick else 5_000
    return sweep(bench, rates, steps, lambda _, seed: two_arms(bench, seed), lambda rate: rate)


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over the learning rate."""
    draw_sweep(
        results,
        path,
        title="Learning rates",
        subtitle="three hidden layers of 100 sigmoids, plain SGD, batch 60",
        xlabel="Learning rate",
        log=True,
    )


def judge(results: dict[str, Any]) -> list[Row]:
    """The range of rates that train, and the highest of them."""
    good = {arm: trained_values(results, arm) for arm in ("without", "with")}
    highest = {arm: max(values, default=0.0) for arm, values in good.items()}
    factor = highest["with"] / highest["without"] if highest["without"] else float("inf")
    at_the_end = highest["with"] == max(results["values"])
    size = f"x{factor:.2g}" + (", or more: higher rates were not tried" if at_the_end else "")
    verdict = (
        "does not hold" if factor <= 1 else f"{'holds' if factor >= 30 else 'smaller'}: {size}"
    )
    best = {arm: max(mean(seeds) for seeds in results["accuracy"][arm]) for arm in good}
    return [
        Row(
            f"rates that reach {trained(results):.0%} in {results['steps']:,} steps, "
            "without and with BN",
            "x30 of the baseline's rate works, where x5 broke the baseline (Inception)",
            f"{span(good['without'])}; {span(good['with'])}",
            verdict,
        ),
        Row(
            "each at its best rate, without and with BN",
            "-",
            f"{percent(best['without'])} and {percent(best['with'])}",
            f"{100 * (best['with'] - best['without']):+.1f} points where the rate is tuned",
        ),
    ]


STUDY = Study("learning_rates", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
