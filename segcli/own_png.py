"""Which PNG files segcli itself wrote, as their text chunks say."""

import io
import os
import struct
from pathlib import Path
from typing import BinaryIO

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of PNG, JPEG, BMP, WebP and TIFF.
_PICTURES = (_PNG_SIGNATURE, b"\xff\xd8\xff", b"BM", b"RIFF", b"II*\0", b"MM\0*")
# Text chunks of our own files stand right behind IHDR; a bound against endless ones.
_PNG_CHUNKS = 64

# Of a file's start that tell.
START_BYTES = 1024


def is_segcli_png(path: str) -> bool:
    """Tells whether the text of a PNG file names segcli as its ``Software``."""
    if not path.lower().endswith(".png"):
        return False
    try:
        with Path(path).open("rb") as file:
            return _names_segcli(file)
    except OSError:  # the decoder's to say
        return False


def starts_segcli_png(start: bytes) -> bool:
    """Tells the same from a file's first ``START_BYTES``, which segcli's own name is among."""
    return _names_segcli(io.BytesIO(start))


def starts_other_picture(start: bytes) -> bool:
    """Tells from a file's first ``START_BYTES`` whether it is an image of somebody else's."""
    return start.startswith(_PICTURES) and not starts_segcli_png(start)


def _names_segcli(file: BinaryIO) -> bool:
    try:
        if file.read(8) != _PNG_SIGNATURE:
            return False
        for _ in range(_PNG_CHUNKS):
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind in (b"IDAT", b"IEND"):
                return False
            start = file.read(min(length, 16))
            if kind == b"tEXt" and start.startswith(b"Software\0segcli "):
                return True
            file.seek(length - len(start) + 4, os.SEEK_CUR)
    except struct.error:  # cut short
        pass
    return False
