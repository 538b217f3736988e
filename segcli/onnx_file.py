"""What can be known of an .onnx file without ONNX Runtime: its metadata, and that it is one file.

Walks the protobuf wire format (protobuf.dev, "Encoding") over the fields that matter, so that a
hostile file is judged before a session touches it, and a card is read in a millisecond. Field
numbers are those of onnx.proto3.
"""

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from segcli.artifact import ModelCard
from segcli.errors import ArtifactError, ModelNotFound

# ModelProto: graph, metadata_props, training_info, functions. GraphProto: node, initializer,
# sparse_initializer. NodeProto: attribute. AttributeProto: t, g, tensors, graphs, sparse_tensor(s).
# SparseTensorProto: values, indices. FunctionProto: node, attribute_proto. TrainingInfoProto:
# initialization, algorithm. TensorProto: data_location.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_MODEL_CHILDREN = {_MODEL_GRAPH: "graph", 20: "training", 25: "function"}
_TENSORS = {"graph": (5,), "attribute": (5, 10), "sparse": (1, 2)}
_CHILDREN = {
    "graph": {1: "node", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}
_DATA_LOCATION, _EXTERNAL = 14, 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Subgraphs of the deepest published models nest three levels; a file made to exhaust the stack
# would go on.
_MAX_DEPTH = 64

Buffer = memoryview

# The last metadata entry of an exported file: the sha256 of all bytes before it. Field 14 of
# ModelProto, holding fields 1 (key) and 2 (value) of StringStringEntryProto.
_SEAL_KEY = b"segcli.sha256"
_DIGEST_CHARS = 64
_ENTRY = bytes([1 << 3 | 2, len(_SEAL_KEY)]) + _SEAL_KEY + bytes([2 << 3 | 2, _DIGEST_CHARS])
_SEAL = bytes([_MODEL_METADATA << 3 | 2, len(_ENTRY) + _DIGEST_CHARS]) + _ENTRY
_SEAL_SIZE = len(_SEAL) + _DIGEST_CHARS


def seal(data: bytes) -> bytes:
    """Returns a serialised ModelProto with its own digest appended as a metadata entry.

    Protobuf readers take the fields of a message in any order and merge repeated ones, so that it
    stays an ONNX file for everyone.
    """
    return data + _SEAL + hashlib.sha256(data).hexdigest().encode()


def digest(path: Path) -> str:
    """Returns the sha256 that a model file is known by: that of its seal, else of all its bytes.

    Raises:
        ArtifactError, ModelNotFound: It cannot be read.
    """
    data = _open(path)
    end = bytes(data[-_SEAL_SIZE:])
    if end.startswith(_SEAL):
        return end[len(_SEAL) :].decode("ascii", "replace")
    return hashlib.sha256(data).hexdigest()


def check_seal(path: Path) -> None:
    """Refuses an .onnx file whose bytes are not those that were exported.

    One flipped bit may crash ONNX Runtime or, worse, change masks a little. A file without a seal
    is of another maker, or of a segcli before seals, and passes.

    Raises:
        ArtifactError: It is damaged, or was changed after its export.
        ModelNotFound: There is no such file.
    """
    data = _open(path)
    body, end = data[:-_SEAL_SIZE], bytes(data[-_SEAL_SIZE:])
    if end.startswith(_SEAL):
        found = hashlib.sha256(body).hexdigest().encode()
        if found == end[len(_SEAL) :]:
            return
    elif _SEAL_KEY.decode() not in parse_metadata(data, str(path)):
        return
    raise ArtifactError(
        f"{str(path)!r} is damaged, or was changed after its export: its bytes are not those that "
        "its sha256 is of",
        hint="export it again with 'segcli export', or fetch it again with 'segcli models rm' and "
        "'pull'",
    )


def read_card(path: Path) -> ModelCard:
    """Returns the card of a self-contained .onnx file.

    Raises:
        ModelNotFound: There is no such file.
        ArtifactError: It is not an ONNX model, keeps tensors in other files, or has no valid card.
    """
    return ModelCard.parse(read_metadata(path), str(path))


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the ``metadata_props`` of a self-contained .onnx file.

    Raises:
        ModelNotFound: There is no such file.
        ArtifactError: It is not an ONNX model, or keeps tensors in other files.
    """
    return parse_metadata(_open(path), str(path))


def _open(path: Path) -> Buffer:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ModelNotFound(f"no model file at {str(path)!r}") from error
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise ArtifactError(f"cannot read {str(path)!r}: {error}") from error
    # It closes with its last view. Closing it here fails on a damaged file, where the traceback
    # of the error still holds some.
    return memoryview(data)


def parse_metadata(data: Buffer, path: str) -> dict[str, str]:
    """Returns the ``metadata_props`` of a serialised ModelProto.

    Args:
        data: The file's bytes.
        path: The file, for messages.

    Raises:
        ArtifactError: It is not an ONNX model, or keeps tensors in other files.
    """
    metadata: dict[str, str] = {}
    graphs = 0
    try:
        for number, value in _fields(data):
            if number == _MODEL_METADATA and isinstance(value, memoryview):
                entry = {k: bytes(v) for k, v in _fields(value) if isinstance(v, memoryview)}
                metadata[entry.get(1, b"").decode()] = entry.get(2, b"").decode()
            elif number in _MODEL_CHILDREN and isinstance(value, memoryview):
                graphs += number == _MODEL_GRAPH
                if _has_external_data(value, _MODEL_CHILDREN[number], 0):
                    raise ArtifactError(
                        f"{path!r} keeps weights in another file; segcli reads one file a model",
                        hint="export the model again with 'segcli export'",
                    )
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path!r} is not a complete ONNX file: {error}") from error
    if not graphs:
        raise ArtifactError(f"{path!r} is not an ONNX file: it holds no graph")
    return metadata


def _has_external_data(data: Buffer, kind: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise ValueError("its graphs nest too deeply")
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number in _TENSORS.get(kind, ()):
            if any(n == _DATA_LOCATION and _enum(v) == _EXTERNAL for n, v in _fields(value)):
                return True
        elif number in _CHILDREN[kind] and _has_external_data(
            value, _CHILDREN[kind][number], depth + 1
        ):
            return True
    return False


def _fields(data: Buffer) -> Iterator[tuple[int, int | Buffer]]:
    """Yields (field number, value) of one message; length-delimited values as views."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: int | Buffer
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES:
            length, at = _varint(data, at)
            value = data[at : at + length]
            if len(value) != length:
                raise ValueError(f"it ends at byte {end}, within a field of {length} bytes")
            at += length
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
            value = int.from_bytes(data[at : at + size], "little")
            at += size
            if at > end:
                raise ValueError("it ends within a number")
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if number == 0:
            raise ValueError(f"field number 0 at byte {at}")
        yield number, value


def _enum(value: int | Buffer) -> int | None:
    # Protobuf cuts an enum to 32 bits.
    return value & 0xFFFFFFFF if isinstance(value, int) else None


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes before byte {at}")
