"""Which part of a model is rewritten for which BatchNorm.

A model that can be traced as a whole is one region. In any other model the edit is made at the
layer: its slot gets a small graph that computes the layer, with parameters of the same names, and
then the BatchNorm, so that state_dict keys, the parent's code and its hooks stay. A layer that is
called several times needs a larger region, one that holds all its calls, because a BatchNorm
belongs to one activation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bnfx.editing.affine_calls import traced
from bnfx.errors import CaptureError
from bnfx.graphs.examples import clone
from bnfx.graphs.observed import SCOPES
from bnfx.graphs.training import ModuleGraph, module_graph
from bnfx.operators.table import affine_module
from bnfx.passes import InsertSite


@dataclass(frozen=True)
class Regions:
    """How the sites are shared out.

    Attributes:
        sites: Path of the region -> the sites rewritten in it.
        refused: Sites for which there is no region -> the reason.
    """

    sites: Mapping[str, Sequence[InsertSite]]
    refused: Mapping[InsertSite, str]


def share_out(
    root: nn.Module,
    sites: Sequence[InsertSite],
    whole: ModuleGraph | None,
    *,
    calls: Mapping[str, int],
    runs: Mapping[str, int],
    behind: bool,
) -> Regions:
    """Find the smallest region for each site.

    Args:
        root: The model.
        sites: What is to be inserted.
        whole: The trace of the whole model, None where there is none.
        calls: How often each affine layer is called, by path.
        runs: How often the forward of each module runs, by path; 1 where that is not known.
        behind: Whether the region must hold the nonlinearity as well as the layer.
    """
    found: dict[InsertSite, str] = {}
    refused: dict[InsertSite, str] = {}
    probes = _Probes(root)
    for site in sites:
        call = site.call
        if whole is not None and not _inside(call.scopes, whole.opaque):
            found[site] = ""
            continue
        inside = _common_scopes(site, sites, behind=behind)
        region = next(
            (
                scope
                for scope in reversed(inside)
                if runs.get(scope, 1) == 1 and probes.calls(scope)[call.path] == calls[call.path]
            ),
            None,
        )
        if region is None:
            refused[site] = _why_none(calls[call.path], behind=behind)
        else:
            found[site] = region
    regions = sorted(set(found.values()), key=len)
    shared: defaultdict[str, list[InsertSite]] = defaultdict(list)
    for site, region in found.items():
        shared[_outermost(region, regions) if region else ""].append(site)
    return Regions(dict(shared), refused)


class _Probes:
    """Which affine calls a module makes when it is traced on its own; nothing where it fails."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.known: dict[str, Counter[str]] = {}

    def calls(self, path: str) -> Counter[str]:
        """Calls of each layer, by its path in the whole model."""
        if path not in self.known:
            self.known[path] = self._trace(path)
        return self.known[path]

    def _trace(self, path: str) -> Counter[str]:
        module = self.root.get_submodule(path)
        if affine_module(module) is not None:
            # a weight that is neither is put there by a hook, which needs the layer itself
            stored = "weight" in module._parameters or is_parametrized(module, "weight")
            return Counter([path] if stored else [])
        try:
            captured = module_graph(clone(module), None)
        except CaptureError:
            return Counter()
        return Counter(call.path for call in traced(captured, path).calls)


def _inside(scopes: Sequence[str], opaque: Sequence[str]) -> bool:
    return any(scope in opaque for scope in scopes)


def _common_scopes(
    site: InsertSite, sites: Sequence[InsertSite], *, behind: bool
) -> tuple[str, ...]:
    """The modules around every call of the site's layer, outermost first."""
    together = [other.call.scopes for other in sites if other.call.path == site.call.path]
    if behind:
        together.append(tuple(site.nonlinearity.meta.get(SCOPES, site.call.scopes)))
    common = [scope for scope in site.call.scopes if all(scope in other for other in together)]
    return tuple(common)


def _why_none(count: int, *, behind: bool) -> str:
    if count > 1:
        return (
            f"it is called {count} times from code that cannot be traced, and one BatchNorm "
            "cannot serve several activations"
        )
    if behind:
        return (
            "its nonlinearity is called from code that cannot be traced; use "
            "placement='pre_activation'"
        )
    return (
        "code that cannot be traced calls it as a function, or its weight is put there by a hook; "
        "make it a module of its own, or use torch.nn.utils.parametrizations"
    )


def _outermost(region: str, regions: Sequence[str]) -> str:
    """The largest of `regions` that `region` lies in; they are sorted by length."""
    return next(r for r in regions if r and (region == r or region.startswith(f"{r}.")))
