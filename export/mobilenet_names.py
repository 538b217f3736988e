"""MobileNetV2 as torchvision and timm save it -> hub names, and how those two differ.

Both are the hub's network with PyTorch's symmetric padding and the batch norm's eps of 1e-5, for
images normalized as ImageNet's. Names are those of ``torchvision/models/mobilenetv2.py`` and, for
timm, ``timm/models/efficientnet.py``; a tensor that neither has stays under its own name, which no
module wants.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segcli.export.hf_processor import IMAGENET_MEAN, IMAGENET_STD
from segcli.export.mobilenet_v2 import C_N_S
from segcli.export.state_dict import Reading, StateDict

# Its file on download.pytorch.org is named after the first digits of its SHA-256; there is no
# other way to tell these weights from the older ones, which are resized to 256.
_TORCHVISION_V2, _V2_EDGE = "7ebf99e0", 232

# The table's rows in torchvision's flat count: features.0 is the stem's convolution, 1 its block.
_LAST = 1 + sum(n for _, n, _ in C_N_S)

_STEM = "mobilenet_v2.conv_stem"
_CONVOLUTION, _NORMALIZATION = "convolution", "normalization"
# Place in a block's `conv` -> our layer and part; the stem's block has no expansion.
_TORCHVISION_STEM = {
    "0.0": ("conv_3x3", _CONVOLUTION),
    "0.1": ("conv_3x3", _NORMALIZATION),
    "1": ("reduce_1x1", _CONVOLUTION),
    "2": ("reduce_1x1", _NORMALIZATION),
}
_TORCHVISION_BLOCK = {
    "0.0": ("expand_1x1", _CONVOLUTION),
    "0.1": ("expand_1x1", _NORMALIZATION),
    "1.0": ("conv_3x3", _CONVOLUTION),
    "1.1": ("conv_3x3", _NORMALIZATION),
    "2": ("reduce_1x1", _CONVOLUTION),
    "3": ("reduce_1x1", _NORMALIZATION),
}
_TIMM_STEM = {
    "conv_dw": ("conv_3x3", _CONVOLUTION),
    "bn1": ("conv_3x3", _NORMALIZATION),
    "conv_pw": ("reduce_1x1", _CONVOLUTION),
    "bn2": ("reduce_1x1", _NORMALIZATION),
}
_TIMM_BLOCK = {
    "conv_pw": ("expand_1x1", _CONVOLUTION),
    "bn1": ("expand_1x1", _NORMALIZATION),
    "conv_dw": ("conv_3x3", _CONVOLUTION),
    "bn2": ("conv_3x3", _NORMALIZATION),
    "conv_pwl": ("reduce_1x1", _CONVOLUTION),
    "bn3": ("reduce_1x1", _NORMALIZATION),
}
_TIMM_OUTER = {
    "conv_stem": f"{_STEM}.first_conv.{_CONVOLUTION}",
    "bn1": f"{_STEM}.first_conv.{_NORMALIZATION}",
    "conv_head": f"mobilenet_v2.conv_1x1.{_CONVOLUTION}",
    "bn2": f"mobilenet_v2.conv_1x1.{_NORMALIZATION}",
}


def read_mobilenet_names(raw: StateDict, path: Path) -> Reading | None:
    """Returns ``raw``, as read from ``path``, under hub names; None where its names are others."""
    if "features.1.conv.0.0.weight" in raw:
        edge = _V2_EDGE if _digest(path).startswith(_TORCHVISION_V2) else 256
        return _reading(raw, _from_torchvision, imagenet_processor(edge, resample=2))
    if "blocks.0.0.conv_dw.weight" in raw and "conv_stem.weight" in raw:
        return _reading(raw, _from_timm, imagenet_processor(256, resample=3))
    return None


def imagenet_processor(edge: int, *, resample: int) -> dict[str, Any]:
    """Returns a ``preprocessor_config.json`` for 224 pixels: its shortest edge, Pillow's filter."""
    return {
        "size": {"shortest_edge": edge},
        "resample": resample,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _reading(raw: StateDict, hub_name: Callable[[str], str], processor: dict[str, Any]) -> Reading:
    config = {"tf_padding": False, "layer_norm_eps": 1e-5}
    return Reading({hub_name(k): v for k, v in raw.items()}, config=config, processor=processor)


def _from_torchvision(name: str) -> str:
    if match := re.fullmatch(r"features\.(\d+)\.conv\.(\d(?:\.\d)?)\.(\w+)", name):
        index, place, tensor = int(match[1]), match[2], match[3]
        parts = _TORCHVISION_STEM if index == 1 else _TORCHVISION_BLOCK
        if place in parts and 1 <= index < _LAST:
            block = _STEM if index == 1 else f"mobilenet_v2.layer.{index - 2}"
            return ".".join((block, *parts[place], tensor))
    elif match := re.fullmatch(r"features\.(\d+)\.([01])\.(\w+)", name):
        layer = {0: f"{_STEM}.first_conv", _LAST: "mobilenet_v2.conv_1x1"}.get(int(match[1]))
        if layer:
            return f"{layer}.{(_CONVOLUTION, _NORMALIZATION)[int(match[2])]}.{match[3]}"
    return re.sub(r"^classifier\.1\.", "classifier.", name)


def _from_timm(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)", name):
        stage, index, part, tensor = int(match[1]), int(match[2]), match[3], match[4]
        parts = _TIMM_BLOCK if stage else _TIMM_STEM
        if part in parts and stage < len(C_N_S) and index < C_N_S[stage][1]:
            before = sum(n for _, n, _ in C_N_S[1:stage])
            block = f"mobilenet_v2.layer.{before + index}" if stage else _STEM
            return ".".join((block, *parts[part], tensor))
    elif match := re.fullmatch(r"(\w+)\.(\w+)", name):
        return f"{_TIMM_OUTER.get(match[1], match[1])}.{match[2]}"
    return name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
