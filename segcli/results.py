"""The frozen records that flow through the program, and their JSON form.

``Segmentation`` and ``Classification`` are what a model says of one image; ``Outcome``
is what a run says of one input, success or failure. No files, no arrays computed here.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.errors import ImageError

RECORD_SCHEMA = 1

ClassMap: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


class ClassShare(NamedTuple):
    """How much of an image one class covers; ``fraction`` in [0, 1]."""

    class_id: int
    name: str
    pixels: int
    fraction: float

    def to_dict(self) -> dict[str, Any]:
        """Returns its entry under ``classes`` in records and documents."""
        return {**self._asdict(), "fraction": _digits(self.fraction)}


class Label(NamedTuple):
    """One answer of a classifier; ``score`` is after the model's own activation."""

    class_id: int
    name: str
    score: float


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A class for every pixel of an image.

    Attributes:
        class_map: (H, W) uint8, uint16 above 256 classes; the image's own size.
        class_names: One per class id.
        palette: (K, 3) uint8 RGB.
        image: (H, W, 3) uint8 RGB, the image as segmented, after EXIF orientation.
        provider: ONNX Runtime's name of the provider that ran it.
        confidence: (H, W) float32 in [0, 1], each pixel's best probability less its second; None
            where it was not asked for.
        mean_confidence: Its mean, over the grid of the logits where the map was not asked for;
            None where neither was.
    """

    class_map: ClassMap
    class_names: tuple[str, ...]
    palette: npt.NDArray[np.uint8]
    image: npt.NDArray[np.uint8]
    provider: str
    confidence: npt.NDArray[np.float32] | None = None
    mean_confidence: float | None = None

    @property
    def classes(self) -> list[ClassShare]:
        """The classes that occur, largest first, ties by id."""
        # Here for the same reason as in overlay().
        from segcli.postprocess import count_classes

        counts = count_classes(self.class_map, len(self.class_names))
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda i: (-counts[i], i))
        total = self.class_map.size
        return [
            ClassShare(i, self.class_names[i], int(counts[i]), int(counts[i]) / total)
            for i in order
        ]

    def overlay(self, opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """Returns (H, W, 3) uint8 RGB: the image blended with its class colours."""
        # Here so that the records need no OpenCV; render imports no room of ours.
        from segcli.render import overlay

        return overlay(self.image, self.class_map, self.palette, opacity)


@dataclass(frozen=True)
class Classification:
    """Every label of a classifier for one image.

    Attributes:
        labels: All classes, best first, ties by id.
        size_hw: Height and width of the image after EXIF orientation.
        provider: ONNX Runtime's name of the provider that ran it.
    """

    labels: list[Label]
    size_hw: tuple[int, int]
    provider: str


@dataclass(frozen=True, eq=False)
class Features:
    """What a network without a head says of one image.

    Attributes:
        outputs: By the names of the graph's outputs: maps (C, h, w), vectors (C,), tokens (N, C),
            attention (heads, N, M), all float32.
        size_hw: Height and width of the image after EXIF orientation.
        provider: ONNX Runtime's name of the provider that ran it.
    """

    outputs: dict[str, npt.NDArray[np.float32]]
    size_hw: tuple[int, int]
    provider: str


class SmallPicture(NamedTuple):
    """An image and its class maps, small enough to be shown by the thousand.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        class_ids: (h, w) uint8 or uint16; None for a classifier.
        truth_ids: The same of the truth, for an evaluation.
        confidence: Mean margin of the image's pixels, in [0, 1]; None where it was not asked for.
    """

    image: npt.NDArray[np.uint8]
    class_ids: ClassMap | None = None
    truth_ids: ClassMap | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run says of one input.

    Attributes:
        path: The argument or list entry as given; for a folder joined with the relative path.
        status: ``ok``, ``skipped`` (its outputs were there), or ``error``.
        outputs: The files written or found, as given by ``-o``.
        size_hw: Height and width after orientation; None where the image was not read.
        classes: Largest first, for segmentation.
        labels: Best first, for classification.
        preview: (h, w, 3) uint8 RGB, what a terminal is shown; None where it is not asked for.
        small: What a report shows of the image; None where it is not asked for.
        embedding: For features, of any shape.
        row: Place of the features in the one output, from 0.
        error: Set exactly where status is ``error``.
    """

    path: str
    status: Literal["ok", "skipped", "error"]
    model: str
    provider: str
    outputs: tuple[str, ...] = ()
    size_hw: tuple[int, int] | None = None
    classes: list[ClassShare] | None = None
    labels: list[Label] | None = None
    preview: npt.NDArray[np.uint8] | None = field(default=None, compare=False)
    small: SmallPicture | None = field(default=None, compare=False)
    embedding: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    row: int | None = None
    elapsed_ms: float | None = None
    error: ImageError | None = field(default=None, compare=False)

    def to_dict(self, *, timing: bool = True) -> dict[str, Any]:
        """Returns the record of ``--json`` and ``--jsonl``.

        Args:
            timing: False drops ``elapsed_ms``, so that two runs diff empty.
        """
        record: dict[str, Any] = {
            "schema": RECORD_SCHEMA,
            "path": self.path,
            "status": self.status,
            "model": self.model,
            "provider": self.provider,
        }
        if self.size_hw is not None:
            record["width"], record["height"] = self.size_hw[1], self.size_hw[0]
        if self.labels is not None:
            record["labels"] = [
                {"class_id": i, "name": n, "score": _digits(s)} for i, n, s in self.labels
            ]
        elif self.embedding is not None:
            # float32 to its own 9 digits at most, not to the 17 of the float64 it becomes.
            record["embedding"] = _nested(self.embedding)
        elif self.error is None:
            record["outputs"] = list(self.outputs)
        if self.row is not None:
            record["row"] = self.row
        if self.classes is not None:
            record["classes"] = [share.to_dict() for share in self.classes]
        if self.error is not None:
            record["error"] = {"code": self.error.code, "message": str(self.error)}
        if timing and self.elapsed_ms is not None:
            record["elapsed_ms"] = round(self.elapsed_ms, 3)
        return record

    def to_json(self, *, timing: bool = True) -> str:
        r"""Returns one line of JSON in ASCII; undecodable bytes of names as ``\udcNN``."""
        return json.dumps(self.to_dict(timing=timing), allow_nan=False)


def _nested(values: npt.NDArray[np.float32]) -> list[Any]:
    if values.ndim == 1:
        return [float(np.format_float_positional(v, unique=True)) for v in values]
    return [_nested(part) for part in values]


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
