"""examples/README.md: the part with the results is written from the JSON files in results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START, END = "<!-- results: written by paper/run_all.py -->", "<!-- end of results -->"
PAGE = Path(__file__).parents[1] / "README.md"
ORDER = (
    *("figure1a", "figure1bc", "learning_rates", "learning_rates_fashion", "initial_scales"),
    *("depth", "depth_fashion", "without_dropout"),
    *("inception_table", "inception_table_fashion", "inception_table_cifar10"),
    *("identities", "algorithm2"),
)


def write(results: Path) -> None:
    """Put the results in `results` between the markers of the page."""
    found = [results / f"{name}.json" for name in ORDER]
    studies = {f.stem: json.loads(f.read_text()) for f in found if f.exists()}
    text = PAGE.read_text()
    before, after = text.partition(START)[0], text.partition(END)[2]
    body = "\n\n".join((_table(studies), *(_section(n, s) for n, s in studies.items())))
    PAGE.write_text(f"{before}{START}\n\n{body}\n\n{END}{after}")


def _table(studies: dict[str, Any]) -> str:
    """One line for each quantity: what the paper says, what came out, how the two compare."""
    lines = ["| claim | data | paper | here | verdict |", "|---|---|---|---|---|"]
    for study in studies.values():
        for row in study["verdict"]:
            cells = (row["quantity"], study["data"], row["paper"], row["ours"], row["verdict"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _section(name: str, study: dict[str, Any]) -> str:
    """The claim, the picture and the circumstances."""
    run = study["run"]
    where = run["gpu"] or f"{run['cpu']}, {run['threads']} thread"
    minutes = run["cpu_seconds"] / 60
    seeds = len(study["seeds"])
    how = f"{seeds} {'seed' if seeds == 1 else 'seeds'}, {minutes:.1f} minutes of CPU time"
    script = study["study"]
    return (
        f"### {study['claim'].rstrip('.')} ({study['data']})\n\n"
        f"![{script} on {study['data']}](paper/results/{name}.png)\n\n"
        f"[`paper/{script}.py`](paper/{script}.py) on {study['data']}: {how} ({where}, "
        f"torch {run['torch']}, Python {run['python']}). Numbers: "
        f"[`{name}.json`](paper/results/{name}.json)."
    )
