"""The embedding as the checkpoint stores it: one matrix, which a tied head's exact rows share."""

from __future__ import annotations

import onnx_ir as ir

from flashhead_edge.checkpoint.source import Source, weight_map
from flashhead_edge.checkpoint.tensors import read_header
from flashhead_edge.checkpoint.weights import EMBEDDINGS, head_name
from flashhead_edge.errors import ExportError
from flashhead_edge.export.graph import Ops
from flashhead_edge.export.matrices import DTYPES, stored_matrix


def embedding_tensor(source: Source) -> tuple[ir.LazyTensor, bool]:
    """The embedding [V, d] in the checkpoint's own dtype, read from its file when it is used, and whether the head is tied to it.

    Raises:
        ExportError: there is none that stands unquantised in the files.
    """
    files = weight_map(source.folder)
    head, tied = head_name(files, source)
    found = [n for n in files for e in EMBEDDINGS if n == e or n.endswith("." + e)]
    name = head if tied else min(found, key=lambda n: (n.count("."), n), default=None)
    entry = read_header(files[name])[name] if name is not None else None
    if name is None or entry is None or entry.dtype not in DTYPES or len(entry.shape) != 2:
        what = "no embedding in the weight files" if entry is None else f"the embedding {name} is {entry.dtype} {list(entry.shape)}"
        raise ExportError(f"{source.name}: {what}, expected a matrix [V, d] in F32, F16 or BF16; export from a checkpoint whose embedding is not quantised")
    return stored_matrix(files[name], entry, name), tied


def share_embedding(model: ir.Model, rows: ir.LazyTensor, name: str, scale: float | None = None) -> None:
    """Look tokens up in `rows` [V, d]: the rows that are needed are gathered first and made float32 afterwards.

    Args:
        name: of the initializer.
        scale: put in place of the factor that follows the lookup; None leaves it as it is.
    Raises:
        ExportError: the model has no lookup in a matrix of this shape.
    """
    graph = model.graph
    ids = next(v for v in graph.inputs if v.name == "input_ids")
    lookup = next((n for n in graph if n.op_type == "Gather" and n.inputs[1] is ids), None)
    old = None if lookup is None else lookup.inputs[0]
    if lookup is None or old is None or old.name not in graph.initializers or list(old.shape or ()) != list(rows.shape):
        found = "no lookup of input_ids" if old is None else f"a lookup in {old.name} {list(old.shape or ())}"
        raise ExportError(f"the body has {found}, expected one in a matrix {list(rows.shape)}; report this model")
    rows.name = name
    matrix = ir.Value(name=name, shape=ir.Shape(rows.shape), type=ir.TensorType(rows.dtype), const_value=rows)
    graph.initializers[name] = matrix
    op = Ops()
    found_rows = op.Gather(matrix, ids, axis=0)
    if rows.dtype != ir.DataType.FLOAT:
        found_rows = op.Cast(found_rows, to=ir.DataType.FLOAT)
    after = [n for n in lookup.outputs[0].consumers() if n.op_type == "Mul"]
    ends: ir.Node = lookup
    if scale is not None:
        if len(after) != 1:
            raise ExportError(f"the body scales its embedding {len(after)} times, expected once; report this model")
        found_rows, ends = op.Mul(found_rows, op.const(scale)), after[0]
    op.rename("embed_tokens")
    ir.convenience.replace_nodes_and_values(graph, lookup, [ends] if ends is lookup else [ends, lookup], op.nodes, ends.outputs, [found_rows])
    if not old.uses():
        graph.initializers.pop(str(old.name))
