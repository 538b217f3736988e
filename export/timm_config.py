"""timm's ``config.json`` -> the fields of the hub's own two files.

timm keeps the preprocessing in ``pretrained_cfg``. Every field that could change an answer is
honoured, or refused with an error that names it.
"""

import math
from typing import Any, NoReturn

from segcli.errors import CheckpointError

# Pillow's numbers, in which the hub's files name a filter.
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def is_timm(config: dict[str, Any] | None) -> bool:
    """Says whether a ``config.json`` is timm's."""
    return config is not None and isinstance(config.get("pretrained_cfg"), dict)


def translate(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the labels as a ``config.json`` and the rest as a ``preprocessor_config.json``.

    Args:
        config: A parsed config.json for which ``is_timm``.

    Raises:
        CheckpointError: A field cannot be honoured; the message names it.
    """
    pretrained = config["pretrained_cfg"]
    if config.get("model_args"):
        _refuse("model_args", config["model_args"], "none: they make another network")
    labels = config.get("label_names", pretrained.get("label_names"))
    hub: dict[str, Any] = {}
    if isinstance(labels, list):
        hub["id2label"] = {str(i): name for i, name in enumerate(labels)}
    elif labels is not None:
        _refuse("label_names", labels, "a list")
    size = pretrained.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        _refuse("input_size", size, "[3, N, N]")
    edge = size[1]
    if type(edge) is not int or edge < 1:
        _refuse("input_size", size, "[3, N, N]")
    share = pretrained.get("crop_pct", 0.875)
    if type(share) not in (int, float) or not 0.1 <= share <= 1:
        _refuse("crop_pct", share, "a number from 0.1 to 1")
    if pretrained.get("crop_mode", "center") != "center":
        _refuse("crop_mode", pretrained["crop_mode"], "'center'")
    filter_name = pretrained.get("interpolation", "bicubic")
    if not isinstance(filter_name, str) or filter_name not in _RESAMPLE:
        _refuse("interpolation", filter_name, f"one of {', '.join(_RESAMPLE)}")
    processor = {
        # timm/data/transforms_factory.py rounds down.
        "size": {"shortest_edge": math.floor(edge / share)},
        "resample": _RESAMPLE[filter_name],
        "crop_size": {"height": edge, "width": edge},
    }
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in pretrained:
            processor[ours] = pretrained[theirs]
    return hub, processor


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise CheckpointError(f"timm's config.json says {name} {value!r}, expected {expected}")
