"""The passes of bnfx, one file each; import them from `bnfx.passes`."""

if __name__ != "bnfx.passes":
    raise ImportError(
        f"this package is bnfx.passes, not {__name__}: under a second name the same files would "
        "load twice; write `from bnfx.passes import ...` (and run pytest or python with bnfx "
        "installed, `pip install -e .`)"
    )

from .drop_dead import DropDead
from .erase_unread import EraseUnread
from .fold_bn import FoldBatchNorm
from .insert_bn import Filter as InsertFilter
from .insert_bn import Form as InsertForm
from .insert_bn import InsertBatchNorm
from .insert_bn import Placement as InsertPlacement
from .insert_bn import Site as InsertSite
from .merge_branches import MergeBranches
from .merge_linear import MergeLinear
from .pad_first import PadFirst
from .remove_dropout import RemoveDropout
from .remove_lrn import RemoveLocalResponseNorm
from .zero_init_residual import ZeroInitResidual

__all__ = [
    "DropDead",
    "EraseUnread",
    "FoldBatchNorm",
    "InsertBatchNorm",
    "InsertFilter",
    "InsertForm",
    "InsertPlacement",
    "InsertSite",
    "MergeBranches",
    "MergeLinear",
    "PadFirst",
    "RemoveDropout",
    "RemoveLocalResponseNorm",
    "ZeroInitResidual",
]
