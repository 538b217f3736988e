"""What an exported .onnx says of itself: the ModelCard in its ``metadata_props``.

The card is all that ``segcli`` knows of a model at run time: no registry, no config
file beside it. ``segcli.export`` writes it, ``segcli.session`` hands the metadata map
back, and this room alone turns one into the other. It opens no file and imports neither
onnx nor onnxruntime.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from segcli.errors import ArtifactError

SCHEMA = 1
METADATA_KEY = "segcli.model_card"

# Height and width below this leave nothing of a map at 1/32 of the size.
MIN_IMAGE_SIZE = 32

Task = Literal["segmentation", "classification", "features"]
Resize = Literal["none", "squash", "shortest_edge"]
Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Activation = Literal["softmax", "sigmoid", "identity"]

Rgb = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the graph's input, in this order.

    Attributes:
        resize: ``squash`` to ``size_hw`` whatever the aspect; ``shortest_edge`` to that
            many pixels, aspect kept; ``none``.
        size_hw: Target height and width of ``squash``.
        shortest_edge: Target length of the shorter side of ``shortest_edge``.
        interpolation: Pillow's name of the antialiased filter.
        crop_hw: Centre crop after the resize, zero-padded where the image is smaller.
        rescale: Factor from uint8 values, usually 1/255; None leaves them as they are.
        mean: Per channel, subtracted after ``rescale``; None skips normalisation.
        std: Per channel, divided by; None exactly where ``mean`` is.
    """

    resize: Resize
    size_hw: tuple[int, int] | None = None
    shortest_edge: int | None = None
    interpolation: Interpolation = "bilinear"
    crop_hw: tuple[int, int] | None = None
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ArtifactError where the fields contradict each other."""
        if self.resize not in get_args(Resize):
            raise ArtifactError(f"unknown resize mode {self.resize!r}")
        if self.interpolation not in get_args(Interpolation):
            raise ArtifactError(f"unknown interpolation {self.interpolation!r}")
        if (self.resize == "squash") != (self.size_hw is not None):
            raise ArtifactError("size_hw and the resize mode 'squash' go together")
        if (self.resize == "shortest_edge") != (self.shortest_edge is not None):
            raise ArtifactError("shortest_edge and its resize mode go together")
        if (self.mean is None) != (self.std is None):
            raise ArtifactError("mean and std go together")
        lengths = (
            *(self.size_hw or ()),
            *(self.crop_hw or ()),
            *(() if self.shortest_edge is None else (self.shortest_edge,)),
        )
        pairs = (self.size_hw, self.crop_hw)
        if any(p is not None and len(p) != 2 for p in pairs) or any(
            type(n) is not int or n < 1 or n > 1 << 16 for n in lengths
        ):
            raise ArtifactError(f"absurd preprocessing size {lengths}")
        if any(v is not None and len(v) != 3 for v in (self.mean, self.std)):
            raise ArtifactError("mean and std must have one value for each of R, G and B")
        numbers = (
            *(self.mean or ()),
            *(self.std or ()),
            1 if self.rescale is None else self.rescale,
        )
        # NaN passes no comparison.
        if not all(type(n) in (int, float) and abs(n) <= 1e6 for n in numbers):
            raise ArtifactError(f"rescale, mean and std must be numbers, found {numbers}")
        if self.std is not None and any(s <= 0 for s in self.std):
            raise ArtifactError(f"std must be positive, found {self.std}")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model file's own description of itself.

    Attributes:
        name: Registry name, or the checkpoint's name where it has none.
        task: What the first output means.
        family: ``segformer`` or ``mobilenet_v2``.
        variant: ``b0`` … ``b5``, or the depth multiplier.
        class_names: One per channel of ``logits``, in channel order; empty for features. A
            segmentation model with one channel and ``sigmoid`` has two: background, then its own.
        palette: One RGB colour per class for segmentation, else empty.
        preprocessing: From image to ``pixel_values``.
        activation: What turns classification logits into scores.
        align_corners: Convention of the bilinear upsampling of segmentation logits.
        ignore_index: Value that ground truth uses for void.
        reduce_labels: Ground truth counts classes from 1, 0 is void (ADE20K); predictions
            never do.
        input_name: Name of the (N, C, H, W) float32 input.
        output_names: Names of the outputs, ``logits`` first where there are logits.
        source: Where the weights came from: hub repository or checkpoint file name.
        revision: The hub commit, or "".
        weights_sha256: Digest of the weight file as read.
        license: Licence of the weights (not of segcli).
        license_note: What that licence means for a user, or "".
        opset: ONNX opset of the default domain.
        folds: Names of the exact rewrites applied before tracing.
        storage: ``fp32`` or ``fp16``: how the weights are stored in the file.
        precision: ``fp32``, ``fp16`` or ``int8``: what the graph computes in.
        versions: Versions of what wrote the file.
        verification: Figures of the comparison with PyTorch before the file was put in
            place: ``max_rel_diff``, ``tolerance``, ``sizes_hw``, ``batches``; below fp32 also
            ``precision``, its agreement with the fp32 graph on images.
    """

    name: str
    task: Task
    family: str
    variant: str
    class_names: tuple[str, ...]
    palette: tuple[Rgb, ...]
    preprocessing: Preprocessing
    activation: Activation = "softmax"
    align_corners: bool = False
    ignore_index: int = 255
    reduce_labels: bool = False
    input_name: str = "pixel_values"
    output_names: tuple[str, ...] = ("logits",)
    source: str
    revision: str = ""
    weights_sha256: str
    license: str
    license_note: str = ""
    opset: int
    folds: tuple[str, ...] = ()
    storage: Literal["fp32", "fp16"] = "fp32"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    versions: dict[str, str]
    verification: dict[str, Any]

    def __post_init__(self) -> None:
        """Raises ArtifactError where the fields contradict each other."""
        if self.task not in get_args(Task):
            raise ArtifactError(f"unknown task {self.task!r}")
        if self.activation not in get_args(Activation):
            raise ArtifactError(f"unknown activation {self.activation!r}")
        if self.storage not in ("fp32", "fp16"):
            raise ArtifactError(f"unknown storage {self.storage!r}")
        if self.precision not in ("fp32", "fp16", "int8"):
            raise ArtifactError(f"unknown precision {self.precision!r}")
        if self.task != "features" and not self.class_names:
            raise ArtifactError(f"a {self.task} model without class names")
        if self.task == "segmentation" and len(self.palette) != len(self.class_names):
            raise ArtifactError(
                f"{len(self.palette)} palette colours for {len(self.class_names)} classes"
            )
        if any(
            len(c) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in c)
            for c in self.palette
        ):
            raise ArtifactError("palette colours must be three values in 0..255")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, the schema number first."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_metadata(self) -> dict[str, str]:
        """Returns the entries for ``metadata_props``; the same card, the same bytes."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
        return {METADATA_KEY: text}

    @classmethod
    def parse(cls, metadata: Mapping[str, str], path: str) -> "ModelCard":
        """Returns the card of a model file.

        Args:
            metadata: The file's ``metadata_props``.
            path: The file, for messages.

        Raises:
            ArtifactError: There is no card, its schema is newer, or it is not valid.
        """
        hint = "write the file with 'segcli export'"
        text = metadata.get(METADATA_KEY)
        if text is None:
            raise ArtifactError(
                f"{path!r} carries no ModelCard: it was not written by segcli",
                hint=hint,
            )
        try:
            raw = json.loads(text)
            schema = raw.pop("schema")
        except (
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
            RecursionError,
        ) as error:
            raise ArtifactError(
                f"the ModelCard of {path!r} is not readable JSON", hint=hint
            ) from error
        if schema != SCHEMA:
            raise ArtifactError(
                f"the ModelCard of {path!r} has schema {schema!r}, this segcli reads {SCHEMA}",
                hint="update segcli, or export the model again with this version",
            )
        try:
            return _from_dict(raw)
        except (TypeError, KeyError, ValueError, ArtifactError) as error:
            raise ArtifactError(
                f"the ModelCard of {path!r} is not valid: {error}", hint=hint
            ) from error


def _from_dict(raw: dict[str, Any]) -> ModelCard:
    known = {f.name for f in fields(ModelCard)}
    # Within a schema number fields are only added, so an older reader skips the new ones.
    values: dict[str, Any] = {k: v for k, v in raw.items() if k in known}
    for name, value in values.items():
        expected = _JSON_TYPES.get(name, str)
        if type(value) is not expected:
            raise ArtifactError(f"{name} is {value!r:.40}, expected {expected.__name__}")
    pre = {f.name: raw["preprocessing"].get(f.name) for f in fields(Preprocessing)}
    for key in ("size_hw", "crop_hw", "mean", "std"):
        pre[key] = None if pre[key] is None else tuple(pre[key])
    values["preprocessing"] = Preprocessing(**pre)
    for key in ("class_names", "output_names", "folds"):
        names = values.get(key, [])
        if not all(isinstance(v, str) for v in names):
            raise ArtifactError(f"{key} is {names!r:.40}, expected strings")
        if key in values:
            values[key] = tuple(names)
    values["palette"] = tuple(tuple(color) for color in raw["palette"])
    return ModelCard(**values)


# What each field is in JSON, where it is no string.
_JSON_TYPES: dict[str, type] = {
    **dict.fromkeys(("class_names", "palette", "output_names", "folds"), list),
    **dict.fromkeys(("preprocessing", "versions", "verification"), dict),
    **dict.fromkeys(("align_corners", "reduce_labels"), bool),
    **dict.fromkeys(("opset", "ignore_index"), int),
}
