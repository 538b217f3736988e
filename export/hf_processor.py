"""``preprocessor_config.json`` of every vintage -> the ModelCard's preprocessing.

Every field is honoured, known to have no effect, or refused with an error that names it.
"""

import math
from typing import Any, NoReturn, cast

from segcli.artifact import Interpolation, Preprocessing, Task
from segcli.errors import CheckpointError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# PIL.Image.Resampling, which preprocessor configs store by number.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

# What SegformerImageProcessor and MobileNetV2ImageProcessor do where a config is silent.
_PROCESSOR_DEFAULTS: dict[str, dict[str, Any]] = {
    "segformer": {
        "size": {"height": 512, "width": 512},
        # One integer is a square here, the shorter side in MobileNetV2's processor.
        "default_to_square": True,
        "do_center_crop": False,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
    "mobilenet_v2": {
        "size": {"shortest_edge": 256},
        "default_to_square": False,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
}
_PROCESSOR_FIELDS = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("do_reduce_labels", "reduce_labels", "default_to_square"),
}
_PROCESSOR_NO_EFFECT = {
    *(
        "feature_extractor_type",
        "image_processor_type",
        "processor_class",
        "_processor_class",
    ),
    *("do_convert_rgb", "data_format", "input_data_format", "return_tensors", "device"),
    *(
        "disable_grouping",
        "_valid_processor_keys",
        "image_seq_length",
    ),
}
_PROCESSOR_ONLY: dict[str, tuple[object, ...]] = {
    "do_pad": (False, None),
    "pad_size": (None,),
    "size_divisor": (None,),
    "do_flip_channel_order": (False, None),
    "crop_pct": (None,),
}


def preprocessing(
    raw: dict[str, Any] | None, family: str, task: Task
) -> tuple[Preprocessing, bool, list[str]]:
    """Returns what ``preprocessor_config.json`` says, of any vintage.

    A segmentation model loses its processor's centre crop: its mask covers the whole picture.

    Args:
        raw: The parsed file, or None for the family's defaults.
        family: ``segformer`` or ``mobilenet_v2``.
        task: What the model is for.

    Returns:
        The record, whether ground truth is to be shifted down by one (``reduce_labels``), and
        notes.

    Raises:
        CheckpointError: A field cannot be honoured; the message names it.
    """
    notes = []
    if raw is None:
        notes.append("no preprocessor_config.json: the processor's defaults are used")
        raw = {}
    for name, value in raw.items():
        if name in _PROCESSOR_ONLY:
            if value not in _PROCESSOR_ONLY[name]:
                _refuse(name, value, f"{_PROCESSOR_ONLY[name][0]!r}")
        elif name not in _PROCESSOR_FIELDS | _PROCESSOR_NO_EFFECT:
            notes.append(
                f"preprocessor_config.json says {name!r}, which is no known field: not used"
            )
    config = {
        "resample": 2,
        "rescale_factor": 1 / 255,
        **_PROCESSOR_DEFAULTS[family],
        **raw,
    }

    resize: dict[str, Any] = {"resize": "none"}
    if _flag(config, "do_resize", True):
        resize = _resize_of(config["size"], _flag(config, "default_to_square", False))
    crop_hw = None
    if family == "segformer":
        if config["do_center_crop"]:
            notes.append("do_center_crop has no effect: SegFormer's processor never crops")
    elif _flag(config, "do_center_crop", False):
        crop_hw = _crop_of(config.get("crop_size"))
        if task == "segmentation":
            notes.append("the processor's centre crop is left out: a mask covers the whole picture")
            crop_hw = None
    mean = std = None
    if _flag(config, "do_normalize", True):
        mean, std = (
            _triple(config, "image_mean", least=-math.inf),
            _triple(config, "image_std", least=0),
        )
    rescale = None
    if _flag(config, "do_rescale", True):
        rescale = config["rescale_factor"]
        if not _is_number(rescale) or not rescale > 0:
            _refuse("rescale_factor", rescale, "a positive number")
    resample = config["resample"]
    if type(resample) is not int or not 0 <= resample < len(_RESAMPLE):
        _refuse("resample", resample, "a number from 0 to 5")
    reduce_labels = _flag(config, "do_reduce_labels", _flag(config, "reduce_labels", False))
    record = Preprocessing(
        **resize,
        interpolation=cast("Interpolation", _RESAMPLE[resample]),
        crop_hw=crop_hw,
        rescale=rescale,
        mean=mean,
        std=std,
    )
    return record, reduce_labels, notes


def _resize_of(size: object, default_to_square: bool) -> dict[str, Any]:
    if _is_length(size):
        if default_to_square:
            return {"resize": "squash", "size_hw": (size, size)}
        return {"resize": "shortest_edge", "shortest_edge": size}
    if isinstance(size, dict):
        if set(size) == {"height", "width"} and all(map(_is_length, size.values())):
            return {"resize": "squash", "size_hw": (size["height"], size["width"])}
        if set(size) == {"shortest_edge"} and _is_length(size["shortest_edge"]):
            return {"resize": "shortest_edge", "shortest_edge": size["shortest_edge"]}
    if isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_length, size)):
        return {"resize": "squash", "size_hw": (size[0], size[1])}
    _refuse("size", size, "an integer, height and width, or shortest_edge")


def _crop_of(size: object) -> tuple[int, int]:
    if _is_length(size):
        return cast("int", size), cast("int", size)
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        height, width = size["height"], size["width"]
        if _is_length(height) and _is_length(width):
            return height, width
    _refuse("crop_size", size, "an integer, or height and width")


def _triple(config: dict[str, Any], name: str, *, least: float) -> tuple[float, ...]:
    value = config[name]
    triple = value if isinstance(value, list | tuple) else [value] * 3
    if len(triple) != 3 or not all(_is_number(v) and v > least for v in triple):
        _refuse(name, value, f"three numbers{' above 0' if least == 0 else ''}")
    return tuple(float(v) for v in triple)


def _flag(config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if value is None:  # as good as false in the reference: it asks `if do_resize:`
        return False
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return bool(value)


def _is_number(value: object) -> bool:
    # As for the ModelCard: no NaN, and nothing absurd.
    return type(value) in (int, float) and abs(cast("float", value)) <= 1e6


def _is_length(value: object) -> bool:
    return type(value) is int and 0 < value <= 1 << 14


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise CheckpointError(f"preprocessor_config.json says {name} {value!r}, expected {expected}")
