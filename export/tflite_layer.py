"""One convolution of a TFLite graph -> its float32 tensors, and what its options leave possible.

References:
    Quantisation: https://ai.google.dev/edge/litert/models/quantization_spec
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segcli.export.tflite_graph import Graph, Operator, UnlikeError, constant

FUSED = "FusedActivationFunction"
_SAME, _VALID = 0, 1
_ACTIVATIONS = {1: "relu", 3: "relu6"}
_KERNEL_AXES = {
    # (out, height, width, in) and (1, height, width, channel).
    "CONV_2D": (0, 3, 1, 2),
    "DEPTHWISE_CONV_2D": (3, 0, 1, 2),
    "FULLY_CONNECTED": (0, 1),
}


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix.

    Attributes:
        weight: float32, axes in PyTorch's order.
        bias: (C',) float32.
        stride: In both directions.
        dilation: In both directions.
        activations: Which it may be followed by; empty for none.
        paddings: Whose padding it may have: True for TensorFlow's, False for PyTorch's, which are
            the same at stride 1 and at odd sizes.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    dilation: int
    activations: frozenset[str]
    paddings: frozenset[bool]


def read_layer(graph: Graph, op: Operator, pad: Operator | None = None) -> Layer:
    """Returns what one operator computes.

    Args:
        graph: Where it stands.
        op: A key of ``_KERNEL_AXES``.
        pad: The PAD in front of it, if there is one.

    Raises:
        UnlikeError: It is no layer of a MobileNetV2.
    """
    weight, bias = _weight_and_bias(graph, op)
    stride = dilation = 1
    paddings = frozenset({True, False})
    if op.kind != "FULLY_CONNECTED":
        stride, dilation = op.options["StrideH"], op.options["DilationHFactor"]
        if (op.options["StrideW"], op.options["DilationWFactor"]) != (stride, dilation):
            raise UnlikeError("has a stride or dilation that is not square")
        if stride > 1 or pad:
            paddings = _paddings(graph, op, pad)
        elif op.options["Padding"] != _SAME and weight.shape[2:] != (1, 1):
            raise UnlikeError("has no padding")
    # A copy: floats are a view into the file so far. What gets infinite is refused by its name.
    with np.errstate(over="ignore"):
        weight, bias = (np.array(values, np.float32, order="C") for values in (weight, bias))
    return Layer(
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        stride,
        dilation,
        _activations(graph, op),
        paddings,
    )


def _weight_and_bias(graph: Graph, op: Operator) -> tuple[NDArray[Any], NDArray[Any]]:
    axes = _KERNEL_AXES[op.kind]
    found = constant(graph, op.inputs[1] if len(op.inputs) > 1 else -1)
    if found is None or found[1].ndim != len(axes) or op.options.get("WeightsFormat"):
        raise UnlikeError(f"has no constant weight of {len(axes)} axes")
    tensor, values = found
    weight = _dequantized(values, tensor.scale, tensor.zero_point, tensor.axis).transpose(axes)
    if len(op.inputs) < 3 or op.inputs[2] < 0:
        return weight, np.zeros(len(weight))
    stored = constant(graph, op.inputs[2])
    if stored is None or stored[1].shape != (len(weight),):
        raise UnlikeError(f"has no constant bias of {len(weight)} values")
    bias = stored[1]
    if bias.dtype.kind == "i":
        # The product itself: the bias's own scale is this, rounded to float32.
        scale = graph.tensors[op.inputs[0]].scale * tensor.scale
        bias = _dequantized(bias, scale, np.zeros(scale.size, np.int64), 0)
    return weight, bias


def _dequantized(
    values: NDArray[Any], scale: NDArray[np.float64], zero_point: NDArray[np.int64], axis: int
) -> NDArray[Any]:
    """Returns ``scale * (q - zero_point)`` in float64; floats as they are."""
    if values.dtype.kind == "f":
        return values
    if scale.size != 1:
        if not 0 <= axis < values.ndim or values.shape[axis] != scale.size:
            raise UnlikeError(f"has {scale.size} scales for values of shape {list(values.shape)}")
        along = [-1 if i == axis else 1 for i in range(values.ndim)]
        scale, zero_point = scale.reshape(along), zero_point.reshape(along)
    return (values.astype(np.int64) - zero_point) * scale


def _paddings(graph: Graph, op: Operator, pad: Operator | None) -> frozenset[bool]:
    if pad is None and op.options["Padding"] == _SAME:
        return frozenset({True})
    found = constant(graph, pad.inputs[1]) if pad and len(pad.inputs) > 1 else None
    amounts = found[1].ravel().tolist() if found else []
    shape = graph.tensors[pad.inputs[0]].shape if pad else ()
    possible = set()
    if op.options["Padding"] == _VALID and op.options["StrideH"] == 2 and len(shape) == 4:
        if amounts == [0, 0, 1, 1, 1, 1, 0, 0]:
            possible.add(False)
        same = [v for n in shape[1:3] for v in ((1, 1) if n % 2 else (0, 1))]
        if amounts == [0, 0, *same, 0, 0]:
            possible.add(True)
    if not possible:
        raise UnlikeError(f"has the padding {amounts}, of no MobileNetV2")
    return frozenset(possible)


def _activations(graph: Graph, op: Operator) -> frozenset[str]:
    """Returns which activations an operator may have.

    Some converters drop one that rounding does by itself: a quantised output whose least value is
    0 cannot be negative, and one that ends at 6 cannot go beyond.
    """
    code = op.options[FUSED]
    if code in _ACTIVATIONS:
        return frozenset({_ACTIVATIONS[code]})
    if code:
        raise UnlikeError(f"has activation {code} of the schema, expected ReLU, ReLU6 or none")
    limits = graph.tensors[op.outputs[0]].range if op.outputs else None
    if limits is None or limits[0] != 0:
        return frozenset()
    return frozenset({"relu", "relu6"} if limits[1] * 254 / 255 <= 6 else {"relu"})
