"""The graph at lower precision, by the converters that ONNX Runtime ships.

``fp16`` computes in float16, for GPUs; ``int8`` multiplies matrices in 8 bits, for CPUs. Either
keeps float32 inputs and outputs. What that does to answers is for ``agreement.py`` to say.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Literal

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

import segcli
from segcli.errors import ExportError
from segcli.export.half import store_as_fp16

Kind = Literal["fp16", "int8"]

# Sums and powers leave float16's range (65504) where their inputs and results do not, and a
# coordinate of a large picture has more than float16's 11 bits.
FP32_OPERATORS = (
    *("LayerNormalization", "SimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    *("InstanceNormalization", "GroupNormalization", "LpNormalization"),
    *("Softmax", "LogSoftmax", "Exp", "Pow", "Reciprocal", "Sqrt"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp"),
    *("GlobalAveragePool", "AveragePool", "CumSum", "Range", "Resize"),
)


def lower(
    proto: onnx.ModelProto, kind: Kind, storage: Literal["fp32", "fp16"] = "fp32"
) -> onnx.ModelProto:
    """Returns a graph at lower precision; ``proto`` stays as it is.

    Args:
        proto: The fp32 graph.
        kind: What to compute in.
        storage: ``fp16`` rounds the weights that ``int8`` leaves in fp32; ``fp16`` has none.

    Raises:
        ExportError: The graph has nothing that ``int8`` would quantise, or the converter failed.
    """
    try:
        lowered = _half(proto) if kind == "fp16" else _quantised(_with_matrices(proto))
    except ExportError:
        raise
    # The converters raise RuntimeError, ValueError and more for a graph they cannot follow.
    except Exception as error:
        raise ExportError(f"ONNX Runtime's converter to {kind} failed: {error}") from error
    nodes = _in_order(lowered.graph.node)
    del lowered.graph.node[:]
    lowered.graph.node.extend(nodes)
    del lowered.graph.value_info[:]
    lowered.producer_name, lowered.producer_version = "segcli", segcli.__version__
    if kind == "int8" and storage == "fp16":
        # Scales are new, and float16 would keep 7 bits of one of 1e-5.
        old = {t.name for t in proto.graph.initializer}
        store_as_fp16(lowered, keep={t.name for t in lowered.graph.initializer} - old)
    return lowered


def _typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy that says the type of every value, as both converters ask for.

    onnx infers nothing behind an operator of com.microsoft, all of whose outputs are float32 in
    any graph of ours.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(proto)
    del typed.metadata_props[:]
    known = {output.name for output in typed.graph.output}
    typed.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for node in typed.graph.node
        if node.domain == "com.microsoft"
        for name in node.output
        # An output that nobody reads has no name.
        if name and name not in known
    )
    return onnx.shape_inference.infer_shapes(typed)


def _half(proto: onnx.ModelProto) -> onnx.ModelProto:
    # Importing the package puts its own folder on sys.path: only where it is needed.
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    half: onnx.ModelProto = convert_float_to_float16(
        _typed(proto),
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FP32_OPERATORS],
    )
    return half


def _with_matrices(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a transformer's graph with a MatMul for each 1x1 convolution, any other as it is.

    ONNX Runtime's ConvInteger takes a SegFormer half as long again as fp32 does, on a CPU with
    VNNI, and int8 matrices between two transpositions as long as fp32. MobileNetV2 is slower
    either way, and one photo in thirteen loses its label.
    """
    if not any(node.op_type == "LayerNormalization" for node in proto.graph.node):
        return proto
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or not _is_pointwise(node, weight):
            nodes.append(node)
            continue
        name = node.output[0]
        matrix = numpy_helper.to_array(weight)[:, :, 0, 0].T  # (C_in, C_out)
        changed.graph.initializer.append(numpy_helper.from_array(matrix, f"{name}/matrix"))
        steps = [
            # (B, C, H, W) -> (B, H, W, C)
            helper.make_node("Transpose", [node.input[0]], [f"{name}/last"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", [f"{name}/last", f"{name}/matrix"], [f"{name}/product"]),
            helper.make_node("Add", [f"{name}/product", *node.input[2:]], [f"{name}/sum"]),
            # (B, H, W, C) -> (B, C, H, W)
            helper.make_node("Transpose", [f"{name}/sum"], [name], perm=[0, 3, 1, 2]),
        ]
        if len(node.input) == 2:
            steps[3].input[0] = f"{name}/product"
            del steps[2]
        for step in steps:
            step.name = step.output[0]
        nodes += steps
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def _is_pointwise(conv: NodeProto, weight: TensorProto) -> bool:
    values = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    return (
        tuple(weight.dims[2:]) == (1, 1)
        and values.get("group", 1) == 1
        and set(values.get("strides", [1])) == {1}
        and set(values.get("pads", [0])) == {0}
    )


def _quantised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph with int8 weights where a matrix is multiplied by weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_root_logger(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            _typed(proto),
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # CPUs without VNNI add two products of uint8 and int8 in 16 bits, which saturate
            # beyond 7-bit weights: agreement here would say nothing of answers there.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        quantised = onnx.load(path)
    del quantised.metadata_props[:]
    if not any(t.data_type == TensorProto.INT8 for t in quantised.graph.initializer):
        raise ExportError(
            "int8 has nothing to quantise: the graph multiplies no matrix by weights, and "
            "convolutions stay in fp32",
            hint="--weights fp16 halves the file, --precision fp16 computes in float16",
        )
    return quantised


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """The quantiser advises on the root logger, which gets a handler on stderr for good by that."""
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def _in_order(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Returns nodes after what they read: converters append Casts at the end, one a reader."""
    makers = {node.output[0]: i for i, node in enumerate(nodes)}
    makers |= {name: i for i, node in enumerate(nodes) for name in node.output if name}
    graph = {
        i: [makers[name] for name in node.input if name in makers]
        for i, node in enumerate(nodes)
        if makers[node.output[0]] == i
    }
    ordered = []
    for i in TopologicalSorter(graph).static_order():
        ordered.append(NodeProto())
        ordered[-1].CopyFrom(nodes[i])
    return ordered


def rounding(half: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the fp16 graph such that ONNX Runtime's CPU rounds each result to float16.

    It has few float16 kernels, so it computes in float32 and drops the casts between its nodes:
    what overflows on a GPU would pass. It keeps two float16 operators in a row, such as these.
    """
    rounded = onnx.ModelProto()
    rounded.CopyFrom(half)
    del rounded.graph.node[:]
    for node in half.graph.node:
        kept = rounded.graph.node.add()
        kept.CopyFrom(node)
        for i, name in enumerate(node.output):
            if name:
                kept.output[i] = f"{name}/exact"
                steps = (f"{name}/exact", f"{name}/rounded", name)
                for before, after in pairwise(steps):
                    rounded.graph.node.append(helper.make_node("Identity", [before], [after]))
    return rounded
