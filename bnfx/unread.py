"""What nothing reads is no part of what a network computes: it must not tie gauges of the rest."""

from __future__ import annotations

from torch import fx

from bnfx.graphs.constants import is_pure
from bnfx.graphs.naming import norm_path
from bnfx.graphs.norms import is_norm
from bnfx.reports.report import FoldRecord

#: Why no layer carries a BatchNorm that is gone.
UNREAD = "nothing reads its output"


def erase_unread(graph: fx.Graph) -> dict[str, FoldRecord]:
    """Erase the calls that nothing reads and that do nothing else.

    Modules that are kept whole, random and unknown functions, and writers stay.

    Returns:
        Records of the BatchNorms among them, by the names of their nodes.
    """
    norms = [(node.name, norm_path(node), node) for node in graph.nodes if is_norm(node)]
    graph.eliminate_dead_code(lambda node: node.op != "get_attr" and not is_pure(node))
    left = set(graph.nodes)
    return {
        name: FoldRecord(path, "folded", (), UNREAD)
        for name, path, node in norms
        if node not in left
    }
