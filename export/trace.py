"""A module -> its ONNX graph, the same bytes each time.

Traced with dynamic axes; what differs from run to run or names this machine is taken out.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import Dim

import segcli
from segcli.artifact import MIN_IMAGE_SIZE
from segcli.errors import ExportError

# 17 is the first with LayerNormalization, 20 the first with Gelu: each stays one operator, which
# ONNX Runtime 1.17 and later has kernels for.
OPSET = 20


def trace(model: nn.Module, size_hw: tuple[int, int] | None = None) -> onnx.ModelProto:
    """Returns the graph of a module in eval mode.

    Batch is always dynamic; height and width are unless ``size_hw`` fixes them.

    Raises:
        ExportError: torch.onnx could not trace the module.
    """
    height, width = size_hw or (96, 160)
    # A dimension of 0 or 1 is taken for a constant while tracing, so the example has 2.
    example = torch.zeros(2, 3, height, width)
    # Not Dim("height"): SegFormer's reductions have guards against a few small sizes, at which the
    # graph is right nevertheless, and for a named dimension torch.onnx traces all a second time.
    shapes: dict[int, Any] = {0: Dim.DYNAMIC}
    if size_hw is None:
        shapes |= {2: Dim.DYNAMIC(min=MIN_IMAGE_SIZE), 3: Dim.DYNAMIC(min=MIN_IMAGE_SIZE)}
    names = getattr(model, "output_names", ("logits",))
    with torch.no_grad(), _quiet_tracing():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=list(names),
                dynamic_shapes=(shapes,),
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"torch.onnx could not trace {type(model).__name__}: {error}"
            ) from error
    assert program is not None
    return _normalized(program.model_proto)


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    # torch.onnx logs that torchvision is absent, and its own use of pytrees warns.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _normalized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Removes what differs from run to run or names this machine, in place."""
    read = {name for node in proto.graph.node for name in node.input}
    read |= {output.name for output in proto.graph.output}
    for node in proto.graph.node:
        # Stack traces with paths of source files.
        del node.metadata_props[:]
        node.doc_string = ""
        if node.domain:
            # Outputs that PyTorch had to name and nobody reads: a kernel may then skip them.
            node.output[:] = [name if name in read else "" for name in node.output]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    proto.graph.name = "segcli"
    proto.producer_name, proto.producer_version = "segcli", segcli.__version__
    [pixel_values] = proto.graph.input
    for value in (pixel_values, *proto.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = _axis_name(value.name, axis)
    return proto


def _axis_name(value: str, axis: int) -> str:
    if axis == 0:
        return "batch"
    if value == "pixel_values":
        return ("channels", "height", "width")[axis - 1]
    return f"{value}_dim_{axis}"
