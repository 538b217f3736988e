"""A ``.tflite`` file -> tensors and operators as plain records.

The file is a flatbuffer, a web of offsets: whatever a damaged one leads to ends here in one error,
and what comes out is plain Python, bounded in number. What the operators mean is the next room's
business.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segcli.errors import CheckpointError

# MobileNetV2 with any head has about 70 operators and 200 tensors. Entries may share their bytes:
# without a bound a small file could stand for a large amount of work.
MAX_ENTRIES = 1 << 10
MAX_SHORT_LIST = 16  # axes of a tensor, tensors of an operator
_DTYPES: dict[str, Any] = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
}
_INTEGERS = ("UINT8", "INT8", "INT16", "INT32", "INT64")
# Options that change what an operator computes, under the schema's names.
_CONVOLUTION = ("Padding", "StrideH", "StrideW", "DilationHFactor", "DilationWFactor")
_ACTIVATION = "FusedActivationFunction"
_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "CONV_2D": ("Conv2DOptions", (*_CONVOLUTION, _ACTIVATION)),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", (*_CONVOLUTION, _ACTIVATION)),
    "FULLY_CONNECTED": ("FullyConnectedOptions", (_ACTIVATION, "WeightsFormat")),
    "ADD": ("AddOptions", (_ACTIVATION,)),
    "AVERAGE_POOL_2D": ("Pool2DOptions", ("FilterHeight", "FilterWidth", _ACTIVATION)),
    "CONCATENATION": ("ConcatenationOptions", ("Axis", _ACTIVATION)),
    "RESIZE_BILINEAR": ("ResizeBilinearOptions", ("AlignCorners",)),
}


class UnlikeError(Exception):
    """A graph is well-formed, and another network than the one looked for."""


@dataclass(frozen=True)
class GraphTensor:
    """One tensor.

    Attributes:
        shape: As stored: channels come last.
        signature: The same with -1 where a size is not fixed.
        dtype: The schema's name, such as ``UINT8``.
        scale: One value, or one per entry of ``axis``; empty where it is not quantised.
        zero_point: As many.
        axis: The axis that scales go along.
        data: Its bytes, a view into the file, if it is a constant; else None.
    """

    shape: tuple[int, ...]
    signature: tuple[int, ...]
    dtype: str
    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    axis: int
    data: NDArray[np.uint8] | None

    @property
    def range(self) -> tuple[float, float] | None:
        """The real values that the least and the largest integer stand for; None for floats."""
        if self.scale.size != 1 or self.dtype not in _INTEGERS:
            return None
        limits = np.iinfo(_DTYPES[self.dtype])
        zero, scale = int(self.zero_point[0]), float(self.scale[0])
        return (limits.min - zero) * scale, (limits.max - zero) * scale


@dataclass(frozen=True)
class Operator:
    """One operator; ``options`` has the schema's names, enumerations as numbers.

    An absent input is -1.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The only subgraph of a file, operators in the order in which they run."""

    tensors: tuple[GraphTensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_graph(path: Path) -> Graph:
    """Returns the graph of a TFLite file.

    Raises:
        CheckpointError: The file is damaged, or holds more than one graph.
    """
    try:
        import tflite  # noqa: F401
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} is a TFLite file, and {error.name} cannot be imported here",
            hint="pip install 'segcli[export]'",
        ) from error
    try:
        return _parse(path.read_bytes())
    except Exception as error:  # an offset of a damaged file leads anywhere
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"cannot read {str(path)!r}: damaged TFLite file: {reason}"
        ) from error


def _parse(data: bytes) -> Graph:
    import tflite

    model = tflite.Model.GetRootAs(data, 0)
    if model.SubgraphsLength() != 1:
        raise ValueError(f"{model.SubgraphsLength()} subgraphs, expected 1")
    graph = model.Subgraphs(0)
    counts = (graph.TensorsLength(), graph.OperatorsLength(), model.BuffersLength())
    if max(counts) > MAX_ENTRIES:
        raise ValueError(f"{max(counts)} entries in one list, expected at most {MAX_ENTRIES}")
    tensors = tuple(_tensor(model, graph.Tensors(i)) for i in range(counts[0]))
    operators = tuple(_operator(model, graph.Operators(i)) for i in range(counts[1]))
    result = Graph(tensors, operators, _ints(graph.InputsAsNumpy()), _ints(graph.OutputsAsNumpy()))
    made = {*result.inputs, *result.outputs, *(i for op in operators for i in op.outputs)}
    read = {i for op in operators for i in op.inputs}
    for i in made | (read - {-1}):
        if not 0 <= i < counts[0]:
            raise ValueError(f"tensor {i} is used, there are {counts[0]}")
    return result


def _tensor(model: Any, raw: Any) -> GraphTensor:  # noqa: ANN401
    import tflite

    if raw.Sparsity() is not None:
        raise ValueError("a sparse tensor")
    dtype = _name_of(tflite.TensorType, raw.Type())
    shape = _ints(raw.ShapeAsNumpy())
    if min(shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {list(shape)}")
    quantization = raw.Quantization()
    scale = zero_point = np.zeros(0)
    axis = 0
    if quantization is not None and quantization.ScaleLength():
        if quantization.ScaleLength() not in (1, *shape):
            raise ValueError(f"{quantization.ScaleLength()} scales for shape {list(shape)}")
        scale = quantization.ScaleAsNumpy().astype(np.float64)
        zero_point = np.zeros(scale.size)
        if quantization.ZeroPointLength() == scale.size:
            zero_point = quantization.ZeroPointAsNumpy()
        elif quantization.ZeroPointLength():
            raise ValueError(f"{quantization.ZeroPointLength()} zero points, {scale.size} scales")
        axis = quantization.QuantizedDimension()
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError("a quantisation whose scales are not positive")
    buffer = model.Buffers(raw.Buffer())
    data = buffer.DataAsNumpy() if buffer is not None and buffer.DataLength() else None
    if data is not None and dtype in _DTYPES:
        expected = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if len(data) != expected:
            raise ValueError(f"a tensor of {len(data)} bytes, expected {expected}")
    return GraphTensor(
        shape,
        _ints(raw.ShapeSignatureAsNumpy()) or shape,
        dtype,
        scale,
        zero_point.astype(np.int64),
        axis,
        data,
    )


def _operator(model: Any, raw: Any) -> Operator:  # noqa: ANN401
    import tflite

    code = model.OperatorCodes(raw.OpcodeIndex())
    # Codes above 127 came with a second field; files of either age fill one and leave the other.
    kind = _name_of(tflite.BuiltinOperator, max(code.BuiltinCode(), code.DeprecatedBuiltinCode()))
    options = {}
    if kind in _OPTIONS:
        table, names = _OPTIONS[kind]
        found = raw.BuiltinOptionsType()
        if found != getattr(tflite.BuiltinOptions, table):
            raise ValueError(f"{kind} without its options")
        reader = getattr(tflite, table)()
        reader.Init(raw.BuiltinOptions().Bytes, raw.BuiltinOptions().Pos)
        options = {name: int(getattr(reader, name)()) for name in names}
    return Operator(kind, _ints(raw.InputsAsNumpy()), _ints(raw.OutputsAsNumpy()), options)


def _name_of(enumeration: type, value: int) -> str:
    for name, number in vars(enumeration).items():
        if type(number) is int and number == value:
            return name
    raise ValueError(f"{enumeration.__name__} {value}, which is not known")


def _ints(values: Any) -> tuple[int, ...]:  # noqa: ANN401
    # The generated readers return 0 for a list that is absent.
    if not isinstance(values, np.ndarray):
        return ()
    if values.size > MAX_SHORT_LIST:
        raise ValueError(f"a list of {values.size}, expected at most {MAX_SHORT_LIST}")
    return tuple(map(int, values))


def constant(graph: Graph, index: int) -> tuple[GraphTensor, NDArray[Any]] | None:
    """Returns a constant and its values as stored; None for anything that is computed.

    Weights stored as float16, or quantised for a float network, reach their convolution through a
    DEQUANTIZE: the constant is then what goes into that.
    """
    if index < 0:
        return None
    tensor = graph.tensors[index]
    if tensor.data is None:
        makers = [op for op in graph.operators if index in op.outputs and op.kind == "DEQUANTIZE"]
        if len(makers) != 1 or len(makers[0].inputs) != 1 or makers[0].inputs[0] < 0:
            return None
        tensor = graph.tensors[makers[0].inputs[0]]
    if tensor.data is None or tensor.dtype not in _DTYPES:
        return None
    # Flatbuffers are little-endian.
    dtype = np.dtype(_DTYPES[tensor.dtype]).newbyteorder("<")
    return tensor, np.frombuffer(tensor.data.data, dtype).reshape(tensor.shape)
