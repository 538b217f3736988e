"""Weight files -> a state dict under the hub's names, and its strict loading into a model.

Reads Hugging Face folders and single files, told apart by their first bytes: safetensors,
PyTorch's, TensorFlow's HDF5 and TFLite. Never runs code from one. What the names in a file mean is
the business of the rooms it asks.
"""

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from segcli.errors import CheckpointError
from segcli.export.hub_names import hub_names
from segcli.export.mobilenet_names import read_mobilenet_names
from segcli.export.state_dict import Reading, StateDict
from segcli.export.tf_h5 import read_tf_h5
from segcli.export.tflite import read_tflite

# In the order in which transformers itself prefers them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "tf_model.h5")


@dataclass(frozen=True, kw_only=True)
class Weights(Reading):
    """A weight file as read; its tensors are float32.

    A bare encoder's tensors have the prefix ``segformer.`` or ``mobilenet_v2.`` also where the
    file leaves that out.

    Attributes:
        path: The file.
        sha256: Digest of the file's bytes.
        family: ``segformer`` or ``mobilenet_v2``, by the names found.
    """

    path: Path
    sha256: str
    family: str


def find_weights(path: Path) -> Path:
    """Returns the weight file that ``path`` is or that lies in the folder ``path``.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {str(path)!r}")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(p.name for p in path.iterdir())[:10]
    raise CheckpointError(
        f"no weights in {str(path)!r}: found {', '.join(found) or 'nothing'}, "
        f"expected {' or '.join(WEIGHT_FILES)}",
        hint="name the weight file itself",
    )


def read_weights(path: Path) -> Weights:
    """Returns the tensors of one weight file.

    Raises:
        CheckpointError: The file is damaged, holds anything but tensors, or is of no known family.
    """
    reading = _reader(path)(path)
    state = reading.state
    if any(k.startswith("segformer.") for k in state):
        family = "segformer"
    elif any(k.startswith("mobilenet_v2.") for k in state):
        family = "mobilenet_v2"
    else:
        shown = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{str(path)!r} is neither a SegFormer nor a MobileNetV2: its tensors are {shown}, …"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} of {str(path)!r} has values that are not finite")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(**vars(reading), path=path, sha256=digest, family=family)


def load_strict(model: nn.Module, state: StateDict, path: Path) -> None:
    """Fills ``model`` with ``state``, every tensor exactly once.

    Raises:
        CheckpointError: Tensors are missing, left over or of another shape; lists them.
    """
    wanted = model.state_dict()
    # Old files were saved before PyTorch counted batches; no inference reads the counter.
    counters = {k for k in wanted if k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in state and k not in counters]
    unexpected = [k for k in state if k not in wanted]
    misshapen = [
        f"{k} is {_shape(state[k])}, expected {_shape(wanted[k])}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the tensors of {str(path)!r} do not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    model.load_state_dict({**{k: wanted[k] for k in counters}, **state}, strict=True)


def _reader(path: Path) -> Callable[[Path], Reading]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_tf_h5
    if head[4:8] == b"TFL3":
        return read_tflite
    # A zip file, or the pickle that PyTorch wrote before 1.6.
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch
    # The length of a JSON header, then that header.
    if head[8:] == b"{":
        return _read_safetensors
    raise CheckpointError(
        f"{str(path)!r} is no weight file: it begins with {head!r}, expected safetensors, PyTorch, "
        "TensorFlow HDF5 or TFLite"
    )


def _read_safetensors(path: Path) -> Reading:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
    return _named(_as_float(raw, path), path)


def _read_torch(path: Path) -> Reading:
    _refuse_zip_bomb(path)
    try:
        # mmap=False: a file that is cut off is then an error here and not a bus error later.
        # An open file: by its path PyTorch would judge it by its suffix.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # on other pickle protocols, which either load or fail
            raw = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused to load {str(path)!r}: it is no plain file of tensors",
            hint="a checkpoint may hold tensors only: what else a pickle says would run as code",
        ) from error
    except Exception as error:  # the unpickler meets damaged bytes with whatever they lead to
        raise CheckpointError(f"cannot read {str(path)!r}: {_first_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    return _named(_as_float(raw, path), path)


def _named(raw: StateDict, path: Path) -> Reading:
    if reading := read_mobilenet_names(raw, path):
        return reading
    state, notes = hub_names(raw, str(path))
    return Reading(state, tuple(notes))


def _refuse_zip_bomb(path: Path) -> None:
    """Raises CheckpointError where the members of a zip claim more bytes than the file has.

    PyTorch stores members as they are, but its reader would inflate others, into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # of the older format, or damaged: torch.load says which
    _refuse_claim(claimed, path, factor=1)


def _refuse_claim(claimed: int, path: Path, *, factor: int) -> None:
    size = path.stat().st_size
    if claimed > size * factor:
        raise CheckpointError(
            f"{str(path)!r} claims {claimed} bytes of tensors, but the file has {size}",
            hint="save the state dict anew with torch.save or safetensors",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _as_float(raw: object, path: Path) -> StateDict:
    if not isinstance(raw, dict) or not raw:
        raise CheckpointError(f"{str(path)!r} holds no state dict but {type(raw).__name__}")
    # A tensor may repeat its storage without end, or share it; a few times is honest.
    tensors = [t for t in raw.values() if isinstance(t, Tensor)]
    _refuse_claim(sum(t.numel() * t.element_size() for t in tensors), path, factor=4)
    state = {}
    for name, tensor in raw.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {type(tensor).__name__}, expected tensors"
            )
        counter = name.endswith("num_batches_tracked")
        plain = tensor.is_floating_point() and not tensor.is_quantized and not tensor.is_sparse
        plain = plain and tensor.device.type == "cpu"
        if not plain and not counter:
            raise CheckpointError(
                f"tensor {name} of {str(path)!r} is {tensor.dtype}, expected plain floats"
            )
        state[name] = tensor if counter else tensor.float()
    return state


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
