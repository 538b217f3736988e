"""What can be written of an image, and how its files are named."""

from enum import StrEnum
from pathlib import PurePath
from typing import NamedTuple


class Format(StrEnum):
    """What ``-f`` writes for an image."""

    MASK = "mask"
    COLOR = "color"
    OVERLAY = "overlay"
    CUTOUT = "cutout"
    NPY = "npy"
    JSON = "json"
    CONFIDENCE = "confidence"


class Naming(NamedTuple):
    """How the files of a format are named.

    Attributes:
        ending: Of a file in an output folder.
        bare_ending: Of a file in the current folder, when there is no -o.
        suffixes: That ``-o FILE`` may have.
    """

    ending: str
    bare_ending: str
    suffixes: tuple[str, ...]


NAMING = {
    Format.MASK: Naming(".png", ".mask.png", (".png",)),
    Format.COLOR: Naming(".color.png", ".color.png", (".png",)),
    Format.OVERLAY: Naming(".overlay.jpg", ".overlay.jpg", (".jpg", ".jpeg", ".png")),
    Format.CUTOUT: Naming(".cutout.png", ".cutout.png", (".png",)),
    Format.NPY: Naming(".npy", ".npy", (".npy",)),
    Format.JSON: Naming(".json", ".json", (".json",)),
    Format.CONFIDENCE: Naming(".confidence.png", ".confidence.png", (".png",)),
}

# What stands before the suffix in these names.
_INNER = tuple(
    sorted({PurePath(e).stem for n in NAMING.values() for e in n[:2] if PurePath(e).suffix})
)


def common_stem(relative: str) -> str:
    """Returns what all inputs have in common that may write one file.

    ``a.color.jpg`` as a mask and ``a.png`` in color both are written to ``a.color.png``.

    Args:
        relative: Of an input, ``Source.relative``.
    """
    place = PurePath(relative)
    stem = str(place).removesuffix(place.suffix)
    while inner := next(filter(stem.endswith, _INNER), ""):
        stem = stem.removesuffix(inner)
    return stem
