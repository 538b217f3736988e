"""Storage of weights as fp16: half the file, the same fp32 computation.

Each large initializer becomes a float16 one followed by a Cast, which ONNX Runtime folds away when
it loads the file: the session computes with float32 weights that were rounded once.
"""

from collections.abc import Container

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# A Cast node costs about a hundred bytes, so small tensors stay as they are.
MIN_ELEMENTS = 256

FP16_MAX = 65504.0


def store_as_fp16(proto: onnx.ModelProto, *, keep: Container[str] = ()) -> None:
    """Rewrites the float32 weights of ``proto`` in place; values beyond fp16 stay fp32.

    Args:
        proto: The graph.
        keep: Names of initializers that stay as they are.
    """
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in keep:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < MIN_ELEMENTS or not np.abs(values).max() <= FP16_MAX:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*casts, *nodes])
