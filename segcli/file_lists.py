"""Lists of paths and URLs in a file or on stdin, read while they are written."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from segcli.errors import UsageError
from segcli.urls import plain_path

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def list_entries(name: str, separator: bytes, stream: BinaryIO | None) -> Iterator[str]:
    r"""Yields the entries of a list as soon as each is there, ``file://`` ones as paths.

    Names are bytes: what is not UTF-8 becomes lone surrogates, as in ``os.fsdecode``. Of lines,
    a carriage return at the end is left out, and a byte order mark before the first.

    Args:
        name: Of the list's file.
        separator: ``\n`` or ``\0``; what follows the last one is an entry unless it is empty.
        stream: Read instead of the file.

    Raises:
        UsageError: The list cannot be read, or is in UTF-16.
    """
    if stream is not None:
        yield from _entries(stream, separator, name)
        return
    try:
        with Path(plain_path(name)).open("rb") as file:
            yield from _entries(file, separator, name)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot read the list {name!r}: {reason}") from error


def _entries(stream: BinaryIO, separator: bytes, name: str) -> Iterator[str]:
    items = _split(stream, separator)
    if separator == b"\n":
        items = _lines(items, name)
    for item in items:
        entry = os.fsdecode(item)
        try:
            yield plain_path(entry)
        except UsageError:  # the record of a missing file names it
            yield entry


def _lines(items: Iterator[bytes], name: str) -> Iterator[bytes]:
    for number, item in enumerate(items):
        if number == 0:
            # No file's name has a NUL; what PowerShell's > writes has one behind each letter.
            if item.startswith(_UTF16) and b"\0" in item:
                raise UsageError(
                    f"the list {name!r} is in UTF-16, expected UTF-8",
                    hint="in PowerShell: … | Out-File -Encoding utf8 LIST",
                )
            item = item.removeprefix(codecs.BOM_UTF8)
        yield item.removesuffix(b"\r")


def _split(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    # read1 returns what a pipe holds by now; read would wait for the full block.
    read = getattr(stream, "read1", stream.read)
    rest = b""
    while block := read(1 << 16):
        *items, rest = (rest + block).split(separator)
        yield from items
    if rest:
        yield rest
