"""All claims, one after the other, and the page that shows what came out.

    python examples/paper/run_all.py             # the full forms; an hour or so on one core
    python examples/paper/run_all.py --quick     # seconds each, on scikit-learn's digits
    python examples/paper/run_all.py --redraw    # pictures and page from the results that are there

Options are those of the single scripts. Studies whose images cannot be had are skipped, with the
reason, and the exit code says so.
"""

from __future__ import annotations

import sys

import algorithm2
import claims
import depth
import figure1a
import figure1bc
import identities
import inception_table
import initial_scales
import learning_rates
import page
import torch
import without_dropout

#: A study, and the data sets of its full form besides its own.
STUDIES: tuple[tuple[claims.Study, tuple[str, ...]], ...] = (
    (figure1a.STUDY, ()),
    (figure1bc.STUDY, ()),
    (learning_rates.STUDY, ("fashion",)),
    (initial_scales.STUDY, ()),
    (depth.STUDY, ("fashion",)),
    (without_dropout.STUDY, ()),
    (identities.STUDY, ()),
    (algorithm2.STUDY, ()),
    (inception_table.STUDY, ("fashion", "cifar10")),
)


def main(argv: list[str]) -> int:
    """Run every study; the worst exit code of them."""
    worst = 0
    chosen = claims.options(claims.Study.__doc__ or "", "mnist", 3, argv)
    for study, more in STUDIES:
        worst = max(worst, claims.main(study, argv))
        if chosen.quick or chosen.data is not None:
            continue
        for data in more:
            there = (chosen.out / f"{study.name}_{data}.json").exists()
            if data == "cifar10" and not torch.cuda.is_available() and not chosen.redraw:
                print("CIFAR-10 is left out: the full form needs a GPU")
            elif there or not chosen.redraw:
                worst = max(worst, claims.main(study, [*argv, "--data", data]))
    if chosen.out == claims.HERE / "results":
        page.write(chosen.out)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
