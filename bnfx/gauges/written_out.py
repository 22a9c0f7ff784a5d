"""BatchNorms written as arithmetic: sums and products with constants of running statistics.

    y = x * w / sqrt(var + eps) + (b - mean * w / sqrt(var + eps))

is what frozen BatchNorms compute (torchvision.ops.FrozenBatchNorm2d and its kin in other projects),
and code that works on the statistics itself. An evaluation is known by what its constants come
from, not by a class: operators next to each other, each with a constant from one owner, and all
constants together from its `running_mean` and `running_var`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx
from torch._ops import HigherOrderOperator

from bnfx.gauges.bound import Bound
from bnfx.gauges.constraints import Constraints
from bnfx.gauges.explanation import UNCARRIED, Explanation
from bnfx.graphs.constants import Values
from bnfx.graphs.naming import describe, owner_of
from bnfx.graphs.norms import is_norm
from bnfx.graphs.parameters import constants
from bnfx.operators.effects import assigns
from bnfx.operators.table import Passage, affine_of, passage_of
from bnfx.reports.report import Change

#: node.meta key: the evaluation that an operator is a part of.
_PART = "bnfx_norm_part"
#: Why no layer carries a BatchNorm that is gone.
UNREAD = "nothing reads its output"
#: How the reason of an evaluation that stays begins.
AS_ARITHMETIC = "it is written as arithmetic"
_BY = "fold_bn"
_MEAN, _VAR = "running_mean", "running_var"


@dataclass(eq=False)
class Written:
    """One evaluation of a BatchNorm that is written as arithmetic."""

    #: The module that owns the statistics.
    path: str
    #: Name of its first operator.
    name: str
    #: Names of the parameters and buffers in its constants.
    sources: set[str] = field(default_factory=set)

    def gone(self, into: tuple[str, ...], why: str) -> Change:
        """The record of it where no operator of it is left."""
        return Change(_BY, self.path, "batch_norm", "changed", why, into=into, at=self.name)


def mark(module: fx.GraphModule) -> Mapping[str, Written]:
    """Find all evaluations and mark their operators; by the name of the first one of each."""
    known = constants(module)
    owners = {
        name.removesuffix(_VAR)
        for name, readers in known.readers.items()
        if name.rpartition(".")[2] == _VAR and not all(is_norm(reader) for reader in readers)
    }
    if not owners:
        return {}
    values = Values(module.graph, known)
    of: dict[fx.Node, tuple[str, Written]] = {}
    for node in module.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):  # what it reads is for its parts
            continue
        sources = _constants_of(node, values)
        owner = next(
            (o for s in sources if (o := s.removesuffix(s.rpartition(".")[2])) in owners), None
        )
        if owner is None:
            continue
        before = (of[n] for n in node.all_input_nodes if n in of and _call(n) == _call(node))
        part = next((w for at, w in before if at == owner), None)
        part = part or Written(owner_of(f"{owner}{_MEAN}"), node.name)
        part.sources.update(sources)
        of[node] = owner, part
    found = {}
    for node, (owner, part) in of.items():
        if {f"{owner}{_MEAN}", f"{owner}{_VAR}"} <= part.sources:
            node.meta[_PART] = found[part.name] = part
    return found


def part_of(node: fx.Node) -> Written | None:
    """The evaluation that a marked operator is a part of."""
    part = node.meta.get(_PART)
    return part if isinstance(part, Written) else None


def records(
    graph: fx.Graph, found: Constraints, gone: set[fx.Node], explanation: Explanation
) -> Iterator[Change]:
    """Records of the marked evaluations of which an operator is left.

    Args:
        graph: Before anything vanishes from it.
        found: Its sites.
        gone: Operators that will vanish.
        explanation: Why the others stay.
    """
    for part, nodes in _parts(graph).items():
        left = [node for node in nodes if node not in gone]
        if not left:
            layers = [name for node in nodes for name in explanation.into(found.sites[node])]
            into = tuple(dict.fromkeys(layers))
            yield part.gone(into, "" if into else UNCARRIED)
            continue
        why = _why(left[0], found, explanation)
        words = f"{AS_ARITHMETIC}, and {describe(left[0])} stays: {why}"
        yield Change(_BY, part.path, "batch_norm", "kept", words, at=part.name)


def unavoidable(graph: fx.Graph, bound: Bound) -> int:
    """How many marked evaluations hold an operator that stays under any choice."""
    held = 0
    for nodes in _parts(graph).values():
        known = [bound.candidates[bound.place[node]] for node in nodes if node in bound.place]
        held += any(bound.alone(site) is not None for site in known)
    return held


def _parts(graph: fx.Graph) -> dict[Written, list[fx.Node]]:
    """The marked evaluations, with what is left of each."""
    parts: dict[Written, list[fx.Node]] = {}
    for node in graph.nodes:
        part = part_of(node)
        if part is not None:
            parts.setdefault(part, []).append(node)
    return parts


def _why(node: fx.Node, found: Constraints, explanation: Explanation) -> str:
    site = found.sites.get(node)
    if site is None:
        return (
            "it is no sum or product with a constant, or its shape is unknown; pass example_inputs"
        )
    if node not in explanation.gauges.refused:
        return "its constant differs where all that it reads shares one gauge"
    return explanation.reason(site)


def gone_whole(
    marked: Mapping[str, Written],
    done: Mapping[str, Change],
    provenance: Mapping[str, tuple[str, ...]],
) -> Iterator[Change]:
    """Records of the evaluations that went whole: into merged branches, or unread.

    Args:
        marked: All evaluations.
        done: The records of those of which an operator was left.
        provenance: Parameter of a merged layer -> what it was computed from.
    """
    for name, part in marked.items():
        if name not in done:
            layers = (owner_of(new) for new, old in provenance.items() if part.sources & {*old})
            into = tuple(dict.fromkeys(layers))
            yield part.gone(into, "" if into else UNREAD)


def _constants_of(node: fx.Node, values: Values) -> tuple[str, ...]:
    """What the constants of an operator on data come from; a layer's and a norm's don't count."""
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or values.is_constant(node):
        return ()
    if (
        assigns(node)
        or affine_of(node) is not None
        or is_norm(node)
        or passage_of(node) is Passage.SHAPE
    ):
        return ()
    if all(values.is_constant(n) for n in inputs):
        return ()
    return tuple(name for n in inputs for name in values.sources(n))


def _call(node: fx.Node) -> str:
    """The module call in which an operator stands."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    return str(next(reversed(stack)))
