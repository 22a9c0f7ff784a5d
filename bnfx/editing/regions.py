"""Which part of a model is rewritten for which BatchNorm.

A model that can be traced as a whole is one region. In any other model the edit is made at the
layer: its slot gets a small graph that computes the layer, with parameters of the same names, and
then the BatchNorm, so that state_dict keys, the parent's code and its hooks stay. A layer that is
called several times needs a larger region, one that holds all its calls, because a BatchNorm
belongs to one activation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch.nn.utils.parametrize import is_parametrized

from bnfx.editing.affine_calls import AffineCall, Evidence
from bnfx.editing.draft import Draft, below, takes_just_what_it_must
from bnfx.operators.table import affine_module


def share_out(
    draft: Draft,
    wanted: Sequence[tuple[AffineCall, tuple[str, ...]]],
    *,
    calls: Mapping[str, int],
    runs: Mapping[str, int],
    behind: bool,
    kept: bool,
) -> list[tuple[str, str]]:
    """The smallest region for each BatchNorm, or why there is none ("" where there is one).

    Args:
        draft: The model.
        wanted: Affine calls, and the paths of the modules around the nonlinearity behind each.
        calls: How often each affine layer is called, by path.
        runs: How often the forward of each module runs, by path; 1 where that is not known.
        behind: Whether the region must hold the nonlinearity as well as the layer.
        kept: Whether modules keep their class. A part with optional arguments is none then: the
            code of its graph takes those of one call.
    """
    whole, probes = None if kept else draft.whole, _Probes(draft, kept=kept)
    found: list[tuple[str, str]] = []
    for call, scopes in wanted:
        if whole is not None and not any(scope in whole.opaque for scope in call.scopes):
            found.append(("", ""))
            continue
        around = [other.scopes for other, _ in wanted if other.path == call.path]
        if behind:
            around.append(scopes)
        common = [scope for scope in call.scopes if all(scope in other for other in around)]
        common = ["", *common] if kept else common
        region = next(
            (
                scope
                for scope in reversed(common)
                if runs.get(scope, 1) <= 1 and probes.calls(scope)[call.path] == calls[call.path]
            ),
            None,
        )
        why = "" if region is not None else _why_none(calls[call.path], behind=behind)
        found.append((region or "", why))
    taken = {region for region, why in found if not why and (region or kept)}
    parts = sorted(taken, key=len)  # code of a part may hold that of parts inside of it
    return [
        (next((p for p in parts if below(region, p)), "") if not why else "", why)
        for region, why in found
    ]


class _Probes:
    """Which affine calls a module makes when it is traced on its own; nothing where it fails."""

    def __init__(self, draft: Draft, *, kept: bool) -> None:
        self.draft, self.kept = draft, kept
        self.known: dict[str, Counter[str]] = {}

    def calls(self, path: str) -> Counter[str]:
        """Calls of each layer, by its path in the whole model."""
        if path not in self.known:
            self.known[path] = self._trace(path)
        return self.known[path]

    def _trace(self, path: str) -> Counter[str]:
        module = self.draft.root.get_submodule(path)
        if affine_module(module) is not None:
            # a weight that is neither is put there by a hook, which needs the layer itself
            stored = "weight" in module._parameters or is_parametrized(module, "weight")
            return Counter([path] if stored else [])
        if self.kept and not takes_just_what_it_must(module):
            return Counter()
        region = self.draft.traced(path)
        return Counter(call.path for call in Evidence(region).calls) if region else Counter()


def _why_none(count: int, *, behind: bool) -> str:
    if count > 1:
        return (
            f"it is called {count} times from code that cannot be traced, or whose optional "
            "arguments new code would not take, and one BatchNorm cannot serve several activations"
        )
    if behind:
        return (
            "its nonlinearity is called from code that cannot be traced, or whose optional "
            "arguments new code would not take; use placement='pre_activation'"
        )
    return (
        "code that cannot be traced calls it as a function, or its weight is put there by a hook; "
        "make it a module of its own, or use torch.nn.utils.parametrizations"
    )
