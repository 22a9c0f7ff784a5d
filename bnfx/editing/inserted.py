"""The module that insertion returns: a graph that still knows the model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from bnfx.graphs.durable import DurableGraph
from bnfx.graphs.examples import take_hooks
from bnfx.graphs.origins import Origin, name_the_layer, translate


class InsertedGraph(DurableGraph):
    """A graph with inserted BatchNorms.

    It loads checkpoints of the model from before the insertion: where a `state_dict` has a layer
    but not the BatchNorm behind it, the layer's old bias becomes beta, and the BatchNorm an
    identity (mean 0, var 1, gamma sqrt(1 + eps)).
    """

    _bnfx_origins: tuple[Origin, ...] = ()

    @staticmethod
    def build(
        root: nn.Module, graph: fx.Graph, origins: Sequence[Origin], like: nn.Module | None = None
    ) -> InsertedGraph:
        """`graph` with what it reads of `root`, in the mode and with the outer hooks of `root`.

        Args:
            root: The module that the graph was traced from.
            graph: The graph, with the BatchNorms of `origins`.
            origins: The BatchNorms that were inserted.
            like: A layer whose plain attributes, such as `in_features`, the result has as well.
        """
        _mention_everything(root, graph)
        graph.lint()
        module = InsertedGraph(root, graph, class_name=type(root).__name__)
        module._bnfx_origins = tuple(origins)
        _resemble(module, root)
        if like is not None:
            _take_absent(module, like)
            for name, value in vars(like).items():
                if not name.startswith("_") and name not in module.__dict__:
                    setattr(module, name, value)
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; an error of a BatchNorm that is inside says behind which layer it is."""
        try:
            return super().__call__(*args, **kwargs)
        except ValueError as error:
            name_the_layer(self, self._bnfx_origins, "", error)
            raise

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        translate(self, self._bnfx_origins, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _mention_everything(root: nn.Module, graph: fx.Graph) -> None:
    """Read every parameter and buffer of `root`: what a graph reads survives copy and pickle."""
    covered = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for name in root.state_dict(keep_vars=True):
        inside = any(name.startswith(f"{path}.") for path in covered)
        if name in covered or inside or name.endswith("_extra_state"):
            continue
        with graph.inserting_before(first):
            graph.get_attr(name)


def _resemble(made: nn.Module, source: nn.Module) -> None:
    """Give `made` the modes, the outer hooks and the names of `source`.

    A module under several names is one module, and names come in one order: torch.fx makes modules
    anew along the names that a graph reads.
    """
    theirs = dict(source.named_modules(remove_duplicate=False))
    ours = dict(made.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for path, module in theirs.items():
        if path in ours:
            ours[path].training = module.training
        original = first.setdefault(id(module), path)
        if original != path and original in ours:
            parent, _, leaf = path.rpartition(".")
            if parent in ours:
                ours[parent]._modules[leaf] = ours[original]
    for path, module in made.named_modules():
        order = list(theirs[path]._modules) if path in theirs else []
        children = dict(module._modules)
        module._modules.clear()
        module._modules.update({name: children[name] for name in order if name in children})
        module._modules.update(children)
    take_hooks(made, source)


def _take_absent(made: nn.Module, source: nn.Module) -> None:
    """A parameter that is None, such as a bias that is gone, stays an attribute."""
    for name, parameter in source._parameters.items():
        if parameter is None and name not in made._parameters:
            made.register_parameter(name, None)
