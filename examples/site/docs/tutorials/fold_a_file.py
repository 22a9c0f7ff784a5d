# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Fold an ONNX file
#
# Who holds nothing but a file, of whatever exporter, folds that. Here is one that onnxruntime's own
# optimiser leaves as it is: the BatchNorm stands *before* the convolution.

# %%
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import bnfx

draw = np.random.default_rng(0)
constants = {
    "gamma": draw.uniform(0.5, 2, 3),
    "beta": draw.normal(size=3),
    "mean": draw.normal(size=3),
    "var": draw.uniform(0.5, 2, 3),
    "w": draw.normal(size=(4, 3, 3, 3)),
}
graph = helper.make_graph(
    [
        helper.make_node("Sigmoid", ["x"], ["a"]),
        helper.make_node(
            "BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"], "norm"
        ),
        helper.make_node("Conv", ["b", "w"], ["y"], "conv"),
    ],
    "small",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 6, 6])],
    [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
)
folder = Path(tempfile.mkdtemp())
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
onnx.save(model, folder / "trained.onnx")
bnfx.inspect_onnx(folder / "trained.onnx")

# %% [markdown]
# The result is verified against the file as it was before it is moved into place; the second name may be the
# first.

# %%
done = bnfx.fold_onnx(folder / "trained.onnx", folder / "folded.onnx")
assert done
done

# %%
print([node.op_type for node in onnx.load(folder / "folded.onnx").graph.node])

# %% [markdown]
# From the shell: `bnfx fold trained.onnx folded.onnx`, and `bnfx inspect trained.onnx` beforehand.
