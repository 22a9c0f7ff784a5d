"""Reports: what bnfx did, in a form to print, to read by program and to keep.

Every report is a frozen dataclass that prints as a table and has `to_dict()`.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from bnfx.errors import BnfxError
from bnfx.reports import writers
from bnfx.reports.document import (
    Block,
    Document,
    Headline,
    Paragraph,
    Picture,
    Section,
    Table,
    blocks,
)
from bnfx.reports.graph_pictures import Box, around
from bnfx.text import printable
from bnfx.version import versions

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

#: Width of a printed report; tables wrap inside it.
_WIDTH = 118
_LEAST_WORDS = 24
_SUFFIXES = (".json", ".txt", ".md", ".html")
_REPORT = "bnfx"

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Model = TypeVar("_Model", bound="nn.Module")


class Report(ABC):
    """A frozen dataclass that prints as a table.

    Subclasses are `@dataclass(frozen=True)`, say in `__rich__` how they look, in `headline` what is
    the news, and in `sections` what a page of them shows where that is more than the tables.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    #: Heading of its tables in a page.
    heading: ClassVar[str] = "Report"

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The report as something `rich` can draw."""

    @abstractmethod
    def headline(self) -> Headline:
        """What it is about, whether that is good news, and the numbers that matter most."""

    def sections(self) -> Iterator[Section]:
        """What a page of it shows."""
        yield Section(self.heading, tuple(blocks(self)))

    def __str__(self) -> str:
        return self.text(_WIDTH)

    def text(self, width: int) -> str:
        """The report as text, in lines of at most `width` characters where that can be."""
        out = io.StringIO()
        Console(file=out, width=width, no_color=True, highlight=False).print(self)
        return "\n".join(line.rstrip() for line in printable(out.getvalue()).split("\n")).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings, ready for `json.dumps`."""
        told: dict[str, Any] = plain(self)
        return told

    def to_json(self) -> str:
        """The report as JSON by the standard; numbers that are not finite become strings."""
        return writers.to_json(self.to_dict())

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict and the tables; `to_html` has the pictures too."""
        return writers.to_fragment(self.headline(), blocks(self))

    def to_markdown(self, more: Sequence[Report] = (), title: str = "") -> str:
        """The report as Markdown, with the sections of `more` behind its own."""
        return writers.to_markdown(self._document(more, title))

    def to_html(self, more: Sequence[Report] = (), title: str = "") -> str:
        """The report as one HTML file that loads nothing, with pictures where there are numbers."""
        return writers.to_html(self._document(more, title))

    def _document(self, more: Sequence[Report], title: str) -> Document:
        head = self.headline()
        head = dataclasses.replace(head, title=title or head.title)
        here = Table("", ("name", "version"), tuple(versions().items()))
        found = [section for part in (self, *more) for section in part.sections()]
        return Document(head, (*found, Section("Environment", (here,))))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as ".json", ".txt", ".md" or ".html".

        Raises:
            BnfxError: The suffix is another one, or the file cannot be written.
        """
        path = Path(path)
        check_report_path(path)
        forms: dict[str, Callable[[], str]] = {
            ".html": self.to_html,
            ".json": self.to_json,
            ".md": self.to_markdown,
            ".txt": self.__str__,
        }
        text = forms[path.suffix]()
        try:
            path.write_bytes(f"{text.rstrip()}\n".encode(errors="replace"))
        except OSError as error:
            raise BnfxError(f"the report cannot be written: {error}") from error

    write = save


def check_report_path(path: Path) -> None:
    """Refuse a report's path before the work, not after it.

    Raises:
        BnfxError: No report can be written there.
    """
    if path.suffix not in _SUFFIXES:
        raise BnfxError(f"a report ends in {', '.join(_SUFFIXES)}; {path} does not")
    if not path.parent.is_dir():
        raise BnfxError(f"{path.parent} is not a folder; make it before asking for {path}")


def plain(value: Any) -> Any:
    """`value` with dataclasses, tuples, mappings and paths turned into JSON's own types.

    What a dataclass leaves out where it prints itself is left out here too.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = (f.name for f in dataclasses.fields(value) if f.repr)
        return {name: plain(getattr(value, name)) for name in shown}
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
    drawn = _Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(str(cell))) for cell in row))
    # A title of the table itself would wrap at its width.
    return Group(Text(printable(title)), *([drawn] if drawn.rows else []))


class _Table(RichTable):
    """A table that breaks no names as long as its widest column, that of words, can take it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        natural = [
            self._measure_column(console, options, column).maximum for column in self.columns
        ]
        widest = max(natural)
        roomy = sum(natural) - widest + min(widest, _LEAST_WORDS) <= options.max_width
        for column, width in zip(self.columns, natural, strict=True):
            column.no_wrap = roomy and width < widest
        yield from super().__rich_console__(console, options)


def tally(words: Iterable[str]) -> str:
    """`["folded", "folded", "kept"]` -> `"2 folded, 1 kept"`."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).items()) or "none"


@dataclasses.dataclass(frozen=True)
class Change:
    """What a pass did, or left, at one place of a model."""

    #: Name of the pass.
    by: str
    #: Module path; of the calling module for a functional call, "" for the root.
    path: str
    #: What stood there, such as "Dropout" or "local_response_norm".
    kind: str
    action: Literal["changed", "kept"]
    #: What was done, or why nothing was, in words a user can act on.
    reason: str
    #: Names in the state_dict whose values were changed, or that came or went.
    values: tuple[str, ...] = ()
    #: Names of what took its place: of a new BatchNorm, or of the layers that carry an old one.
    into: tuple[str, ...] = ()
    #: Number of output channels of a layer.
    channels: int = 0
    #: How many of them are left.
    left: int = 0
    #: Name of the node of an inference graph.
    at: str = ""


@dataclasses.dataclass(frozen=True)
class InsertRecord:
    """What was done at one affine layer's call site."""

    #: Module path of the affine layer, or of its weight for a functional call.
    path: str
    #: Operator, such as "conv2d" or "linear".
    kind: str
    #: Number of output channels, the size of gamma and beta.
    channels: int
    action: Literal["inserted", "skipped"]
    #: Module path of the new BatchNorm, None where skipped.
    bn_path: str | None
    #: Why it was inserted there, or why not, in words a user can act on.
    reason: str


@dataclasses.dataclass(frozen=True)
class InsertReport(Report):
    """One record for every affine layer's call site, in execution order."""

    heading = "Insertion"
    sites: tuple[InsertRecord, ...]

    def headline(self) -> Headline:
        """How many BatchNorms were inserted."""
        done = sum(site.action == "inserted" for site in self.sites)
        verdict = f"BatchNorm at {done} of {len(self.sites)} affine layers."
        return Headline("bnfx: insert", "neutral", verdict)

    def __rich__(self) -> RenderableType:
        title = f"insert_bn: {tally(site.action for site in self.sites)}"
        rows = (
            (s.path, s.kind, s.channels, s.action, s.bn_path or "-", s.reason) for s in self.sites
        )
        return table(title, ("layer", "kind", "channels", "action", "BatchNorm", "reason"), rows)


@dataclasses.dataclass(frozen=True)
class FoldRecord:
    """What became of one evaluation of a BatchNorm."""

    #: Module path of the BatchNorm; a functional call goes by its running mean's owner.
    path: str
    #: "folded" (gone), "reduced" (a part of it is gone) or "kept".
    verdict: Literal["folded", "reduced", "kept"]
    #: Names of the layers whose weights now carry it; none where nothing reads its output.
    into: tuple[str, ...]
    #: What keeps it, in words a user can act on. With "folded" it is empty, or says why no layer
    #: carries it.
    reason: str


@dataclasses.dataclass(frozen=True)
class MergeRecord:
    """Linear maps that became one layer, or changed places, for the sake of speed."""

    #: Module paths of the layers.
    layers: tuple[str, ...]
    #: What computes them now.
    into: str
    #: What was done, and what it costs.
    reason: str


@dataclasses.dataclass(frozen=True)
class DropRecord:
    """What became of a set of channels that layers share, or of idle channels of one layer."""

    #: Path of the first layer that writes them.
    path: str
    #: "dropped", or "kept" for channels that always are one number and yet stay.
    verdict: Literal["dropped", "kept"]
    #: Number of channels before.
    channels: int
    #: Number of channels after.
    left: int
    #: All layers that lost them.
    layers: tuple[str, ...]
    #: Of those that are gone, how many were zero, constant or read by nobody; why others stay.
    reason: str


@dataclasses.dataclass(frozen=True)
class FoldReport(Report):
    """One record for every BatchNorm evaluation, in execution order."""

    heading = "Folding"
    batch_norms: tuple[FoldRecord, ...]
    #: For every parameter that was rewritten, the source's parameters and buffers that it was
    #: computed from.
    provenance: Mapping[str, tuple[str, ...]]
    #: A number of BatchNorms that is proved to stay, whatever is chosen under the rules; None where
    #: that was not asked.
    unavoidable: int | None = None
    #: With form="module": keys of the state_dict that came or went, and why.
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: With form="module": modules, and methods of modules, that take or give other values than in
    #: the model, because a BatchNorm was carried across their border; the others, called by
    #: themselves, give what they gave.
    moved: tuple[str, ...] = ()
    #: What was merged where that costs less.
    merges: tuple[MergeRecord, ...] = ()
    #: With drop_dead=True: what became of channels that are zero, constant or read by nobody.
    dropped: tuple[DropRecord, ...] = ()
    #: The options of `fold_bn` that it was folded with, by name.
    options: Mapping[str, bool | int] = dataclasses.field(default_factory=dict)
    #: The graph before and after, to draw.
    graphs: tuple[tuple[Box, ...], tuple[Box, ...]] = dataclasses.field(
        default=((), ()), repr=False, compare=False
    )

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> FoldReport:
        """What `to_dict` gave, as a report again; there are no graphs in it."""
        records = (FoldRecord(**{**bn, "into": tuple(bn["into"])}) for bn in told["batch_norms"])
        provenance = {name: tuple(sources) for name, sources in told["provenance"].items()}
        merges = (
            MergeRecord(**{**merge, "layers": tuple(merge["layers"])})
            for merge in told.get("merges", ())  # files of before have none
        )
        dropped = (
            DropRecord(**{**drop, "layers": tuple(drop["layers"])})
            for drop in told.get("dropped", ())
        )
        return cls(
            tuple(records),
            provenance,
            told["unavoidable"],
            merges=tuple(merges),
            dropped=tuple(dropped),
            options=told.get("options", {}),
        )

    @property
    def folded(self) -> int:
        """How many are gone."""
        return sum(bn.verdict == "folded" for bn in self.batch_norms)

    @property
    def left(self) -> int:
        """How many stay, whole or in part."""
        return len(self.batch_norms) - self.folded

    @property
    def proved(self) -> bool:
        """Whether it is proved that the rules allow no better choice."""
        return self.left == (self.unavoidable or 0)

    def headline(self) -> Headline:
        """How many BatchNorms were folded."""
        facts = (("verdicts", tally(bn.verdict for bn in self.batch_norms)),)
        verdict = f"{self.folded} of {len(self.batch_norms)} BatchNorms folded."
        verdict = verdict if self.batch_norms else "There is no BatchNorm in it."
        return Headline("bnfx: fold", "neutral", verdict, facts)

    def sections(self) -> Iterator[Section]:
        """The table, and the graph around each BatchNorm."""
        yield from super().sections()
        if pictures := self.pictures():
            note = Paragraph("Orange: the BatchNorm. Blue: the layers that carry it after folding.")
            found: tuple[Block, ...] = (note, *pictures)
            yield Section("The graph around each BatchNorm", found)

    def pictures(self) -> list[Picture]:
        """The graph around each BatchNorm, before and after.

        Few are all shown; of many, the first few that are not plain folds.
        """
        before, after = self.graphs
        waiting, found = list(self.batch_norms), []
        for norm in (node for node in before if node.mark == "norm"):
            bn = next((bn for bn in waiting if bn.path == norm.layer), None)
            if bn is not None:
                waiting.remove(bn)
                goes = f"goes into {', '.join(bn.into)}" if bn.into else bn.reason or "stays"
                title = f"{bn.path}: {bn.verdict}, {goes}"
                found.append((bn, around(norm, title, bn.into, before, after)))
        kept = [picture for bn, picture in found if bn.verdict != "folded"]
        drawn = [picture for _, picture in found]
        shown = drawn if len(drawn) <= 6 else kept[:4] or drawn[:2]
        return [dataclasses.replace(p, is_open=p in shown) for p in drawn]

    def __rich__(self) -> RenderableType:
        title = f"fold_bn: {tally(bn.verdict for bn in self.batch_norms)}"
        if not self.batch_norms:
            title = "fold_bn: no BatchNorm"
        elif self.proved:
            title += ", proved to be the best that the rules allow"
        elif self.unavoidable is not None:
            title += f"; at least {self.unavoidable} stay whatever is chosen"
        rows = (
            (bn.path, bn.verdict, ", ".join(bn.into) or "-", bn.reason or "-")
            for bn in self.batch_norms
        )
        parts = [table(title, ("BatchNorm", "verdict", "into", "reason"), rows)]
        if self.merges:
            merged = ((", ".join(m.layers), m.into, m.reason) for m in self.merges)
            title = f"merge_linear: {len(self.merges)}"
            parts.append(table(title, ("layers", "into", "what it costs"), merged))
        if self.dropped:
            parts.append(self._channels())
        return Group(*parts)

    def _channels(self) -> RenderableType:
        gone = [d for d in self.dropped if d.verdict == "dropped"]
        lost = sum((d.channels - d.left) * len(d.layers) for d in gone)
        title = f"drop_dead: {lost} channels of {sum(len(d.layers) for d in gone)} layers dropped"
        rows = (
            (", ".join(d.layers), d.verdict, f"{d.channels} -> {d.left}", d.reason)
            for d in self.dropped
        )
        return table(title, ("layers", "verdict", "channels", "reason"), rows)


def takes_arguments_of(
    function: Callable[_Arguments, object],
) -> Callable[[Callable[..., _Result]], Callable[_Arguments, _Result]]:
    """The decorated function hands its arguments on to `function`, and is called like it."""

    def decorate(own: Callable[..., _Result]) -> Callable[_Arguments, _Result]:
        theirs = inspect.signature(function)
        returned = inspect.signature(own).return_annotation
        vars(own)["__signature__"] = theirs.replace(return_annotation=returned)
        return own

    return decorate


def report(model: nn.Module | ExportedProgram) -> InsertReport | FoldReport:
    """What bnfx did to a model or an exported program that it returned; files keep it, too.

    Raises:
        BnfxError: bnfx did not make this model.
    """
    done = told(model)
    if done is None:
        raise BnfxError(
            f"this {type(model).__name__} was not returned by bnfx, so there is no report of it; "
            "plan_insert and plan_fold say what would be done"
        )
    return done


def told(model: nn.Module | ExportedProgram) -> InsertReport | FoldReport | None:
    """The same, or None."""
    from torch.export import ExportedProgram  # a model is there, and so is torch

    meta = getattr(model, "meta", None)
    done = meta.get(_REPORT) if isinstance(meta, dict) else None
    done = done or getattr(model, "__dict__", {}).get("_bnfx_report")
    if done is None and isinstance(model, ExportedProgram):
        kept = model.graph_module.meta.get("custom", {}).get(_REPORT)
        return None if kept is None else FoldReport.from_dict(kept)
    return done if isinstance(done, InsertReport | FoldReport) else None


def remember(module: _Model, done: InsertReport | FoldReport) -> _Model:
    """`module`, which from now on tells `done` when asked by `report`."""
    meta = getattr(module, "meta", None)
    if isinstance(meta, dict):
        meta[_REPORT] = done
    module.__dict__["_bnfx_report"] = done  # a GraphModule's copy keeps `meta`, its pickle this
    return module


def remember_in_program(program: ExportedProgram, done: FoldReport) -> ExportedProgram:
    """`program`, which from now on tells `done`; `torch.export.save` writes the text of it."""
    meta = program.graph_module.meta
    meta["custom"] = {**meta.get("custom", {}), _REPORT: done.to_dict()}
    program.__dict__["_bnfx_report"] = done
    return program
