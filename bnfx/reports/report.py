"""Reports: what bnfx did, in a form to print, to read by program and to keep.

Every report is a frozen dataclass that prints as a table and has `to_dict()`.
"""

from __future__ import annotations

import dataclasses
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from bnfx.errors import BnfxError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

#: Width of a printed report; tables wrap inside it.
_WIDTH = 118

_REPORT = "bnfx"

_Model = TypeVar("_Model", bound="nn.Module")


class Report(ABC):
    """A frozen dataclass that prints as a table.

    Subclasses are `@dataclass(frozen=True)` and say in `__rich__` how they look.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The report as something `rich` can draw."""

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=_WIDTH, no_color=True, highlight=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings, ready for `json.dumps`."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_markdown(self) -> str:
        """The report as Markdown."""
        from bnfx.reports.report_files import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """The report as one HTML file that loads nothing, with pictures where there are numbers."""
        from bnfx.reports.report_files import to_html

        return to_html(self)


def plain(value: Any) -> Any:
    """`value` with dataclasses, tuples, mappings and paths turned into JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    return str(value)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> RenderableType:
    """A plain table; cells are turned into text, never read as markup."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    return Group(Text(title), drawn)  # a title of the table itself would wrap at its width


def tally(words: Iterable[str]) -> str:
    """`["folded", "folded", "kept"]` -> `"2 folded, 1 kept"`."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).items()) or "none"


@dataclasses.dataclass(frozen=True)
class InsertRecord:
    """What was done at one affine layer's call site.

    Attributes:
        path: Module path of the affine layer, or of its weight for a functional call.
        kind: Operator, such as "conv2d" or "linear".
        channels: Number of output channels, the size of gamma and beta.
        action: "inserted" or "skipped".
        bn_path: Module path of the new BatchNorm, None where skipped.
        reason: Why it was inserted there, or why not, in words a user can act on.
    """

    path: str
    kind: str
    channels: int
    action: Literal["inserted", "skipped"]
    bn_path: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class InsertReport(Report):
    """One record for every affine layer's call site, in execution order."""

    sites: tuple[InsertRecord, ...]

    def __rich__(self) -> RenderableType:
        title = f"insert_bn: {tally(site.action for site in self.sites)}"
        rows = (
            (s.path, s.kind, s.channels, s.action, s.bn_path or "-", s.reason) for s in self.sites
        )
        return table(title, ("layer", "kind", "channels", "action", "BatchNorm", "reason"), rows)


@dataclasses.dataclass(frozen=True)
class FoldRecord:
    """What became of one evaluation of a BatchNorm.

    Attributes:
        path: Module path of the BatchNorm; a functional call goes by its running mean's owner.
        verdict: "folded" (gone), "reduced" (a part of it is gone) or "kept".
        into: Names of the layers whose weights now carry it; none where nothing reads its output.
        reason: What keeps it, in words a user can act on. With "folded" it is empty, or says why
            no layer carries it.
    """

    path: str
    verdict: Literal["folded", "reduced", "kept"]
    into: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class FoldReport(Report):
    """One record for every BatchNorm evaluation, in execution order.

    Attributes:
        batch_norms: The records.
        provenance: For every parameter that was rewritten, the source's parameters and buffers
            that it was computed from.
        unavoidable: A number of BatchNorms that is proved to stay, whatever is chosen under the
            rules; None where that was not asked.
    """

    batch_norms: tuple[FoldRecord, ...]
    provenance: Mapping[str, tuple[str, ...]]
    unavoidable: int | None = None

    @property
    def proved(self) -> bool:
        """Whether it is proved that the rules allow no better choice."""
        left = sum(bn.verdict != "folded" for bn in self.batch_norms)
        return left == (self.unavoidable or 0)

    def __rich__(self) -> RenderableType:
        title = f"fold_bn: {tally(bn.verdict for bn in self.batch_norms)}"
        if self.proved:
            title += ", proved to be the best that the rules allow"
        elif self.unavoidable is not None:
            title += f"; at least {self.unavoidable} stay whatever is chosen"
        rows = (
            (bn.path, bn.verdict, ", ".join(bn.into) or "-", bn.reason or "-")
            for bn in self.batch_norms
        )
        return table(title, ("BatchNorm", "verdict", "into", "reason"), rows)


def report(model: nn.Module) -> InsertReport | FoldReport:
    """What bnfx did to a model that it returned.

    Raises:
        BnfxError: bnfx did not make this model.
    """
    meta = getattr(model, "meta", None)
    done = meta.get(_REPORT) if isinstance(meta, dict) else None
    done = done or getattr(model, "__dict__", {}).get("_bnfx_report")
    if not isinstance(done, InsertReport | FoldReport):
        raise BnfxError(
            f"this {type(model).__name__} was not returned by bnfx, so there is no report of it; "
            "plan_insert and plan_fold say what would be done"
        )
    return done


def remember(module: _Model, done: InsertReport | FoldReport) -> _Model:
    """`module`, which from now on tells `done` when asked by `report`."""
    meta = getattr(module, "meta", None)
    if isinstance(meta, dict):
        meta[_REPORT] = done
    module.__dict__["_bnfx_report"] = done  # a GraphModule's copy keeps `meta`, its pickle this
    return module
