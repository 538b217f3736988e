"""``tf_model.h5``, the file that transformers 4 wrote for TensorFlow's SegFormer -> hub names.

Keras' HDF5 layout: a group for each layer of the model, in it a dataset for each weight under the
weight's full name, such as ``decode_head`` and in it
``tf_segformer_for_semantic_segmentation/decode_head/linear_c.0/proj/kernel:0``. Names follow
``modeling_tf_segformer.py`` of transformers 4, whose layers have the hub's names: only the prefix,
the last part and the order of a kernel's axes differ.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from segcli.errors import CheckpointError
from segcli.export.state_dict import Reading, StateDict

if TYPE_CHECKING:
    import h5py

# Keras' name -> PyTorch's.
_PARTS = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Order of a kernel's axes, by name and rank. TensorFlow has (height, width, in, out) and (in, out),
# and (height, width, channel, 1) for a depthwise layer; PyTorch (out, in, height, width).
_AXES = {
    ("kernel", 4): (3, 2, 0, 1),
    ("kernel", 2): (1, 0),
    ("depthwise_kernel", 4): (2, 3, 0, 1),
}
_ROOTS = ("segformer", "decode_head")


def read_tf_h5(path: Path) -> Reading:
    """Returns the tensors of a TensorFlow SegFormer.

    Raises:
        CheckpointError: The file is damaged, or a weight in it has no counterpart.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} is an HDF5 file, and {error.name} cannot be imported here",
            hint="pip install 'segcli[export]'",
        ) from error
    found: dict[str, Any] = {}

    def visit(name: str, item: object) -> None:
        # A link is not followed: it may lead out of the file.
        if isinstance(item, h5py.Dataset):
            found[name] = _array(item, name, path)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except CheckpointError:
        raise
    except Exception as error:  # h5py meets damaged bytes with whatever they lead to
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
    state: StateDict = {}
    for name, array in found.items():
        hub, tensor = _renamed(name, array, path)
        if hub in state:
            raise CheckpointError(f"{str(path)!r} holds {hub} twice, the second time as {name!r}")
        state[hub] = tensor
    return Reading(state)


def _array(dataset: "h5py.Dataset", name: str, path: Path) -> Any:  # noqa: ANN401
    # Keras writes each weight in one piece; anything else may lead out of the file, or unpack to
    # more than there is memory.
    if dataset.dtype.kind != "f":
        raise CheckpointError(f"{name!r} of {str(path)!r} is {dataset.dtype}, expected floats")
    if dataset.external or dataset.is_virtual or dataset.id.get_storage_size() != dataset.nbytes:
        raise CheckpointError(
            f"{name!r} of {str(path)!r} is not stored in one piece: it is not from Keras"
        )
    return np.asarray(dataset[()], np.float32)


def _renamed(name: str, array: Any, path: Path) -> tuple[str, Tensor]:  # noqa: ANN401
    *layers, last = name.split("/")
    part = last.partition(":")[0]
    axes = _AXES.get((part, array.ndim), (0,) if array.ndim == 1 else None)
    if part not in _PARTS or axes is None:
        shape = "x".join(map(str, array.shape)) or "scalar"
        raise CheckpointError(
            f"{str(path)!r} holds {name!r} of shape {shape}, which no SegFormer in TensorFlow has"
        )
    # The model's own name and Keras' group come first and say nothing; only the last root counts.
    roots = [i for i, layer in enumerate(layers) if layer in _ROOTS]
    if roots:
        layers = layers[roots[-1] :]
    elif "encoder" in layers:
        layers = layers[layers.index("encoder") :]
    elif layers[-1:] == ["classifier"]:
        layers = layers[-1:]
    hub = ".".join((*layers, _PARTS[part]))
    tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(axes)))
    return (hub if not hub.startswith("encoder.") else f"segformer.{hub}"), tensor
