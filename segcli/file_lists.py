"""Lists of paths and URLs in a file or on stdin, read while they are written."""

import codecs
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from segcli.errors import UsageError
from segcli.urls import is_url, plain_path

_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
# No file's name has a NUL. In UTF-16 and UTF-32 each newline has one, before or behind it: at the
# end of the first line or the start of the second.
_TELLING = 2


def list_entries(name: str, separator: bytes, stream: BinaryIO | None) -> Iterator[str]:
    r"""Yields the entries of a list as soon as each is there, ``file://`` ones as paths.

    Names are bytes: what is not UTF-8 becomes lone surrogates, as in ``os.fsdecode``. Of lines,
    a carriage return at the end is left out, and a byte order mark before the first.

    Args:
        name: Of the list's file.
        separator: ``\n`` or ``\0``; what follows the last one is an entry unless it is empty.
        stream: Read instead of the file.

    Raises:
        UsageError: The list cannot be read, or is in UTF-16 or UTF-32.
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


def check_list(name: str, separator: bytes) -> None:
    """Refuses a list that cannot be read, where that can be told before a run.

    Args:
        name: Of the list's file. One that is no regular file, such as a named pipe, can be opened
            only once, and is not.
        separator: As for ``list_entries``.

    Raises:
        UsageError: There is no such file on this machine, or it is none of the kind.
    """
    path = plain_path(name)
    if is_url(path):
        raise UsageError(f"the list {path!r} is a URL, expected a file on this machine, or -")
    try:
        # Path("") would be the current folder.
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UsageError(f"no such list file: {path!r}") from error
    if S_ISDIR(mode):
        raise UsageError(f"the list {path!r} is a folder, expected a file, or -")
    if S_ISREG(mode):
        for _ in islice(list_entries(name, separator, None), _TELLING):
            pass


def _entries(stream: BinaryIO, separator: bytes, name: str) -> Iterator[str]:
    first = b""
    for number, item in enumerate(_split(stream, separator)):
        first = first if number else item
        if number < _TELLING and first.startswith(_WIDE_MARKS) and b"\0" in item:
            raise UsageError(
                f"the list {name!r} is in UTF-16 or UTF-32, expected UTF-8",
                hint="in PowerShell: … | Out-File -Encoding utf8 LIST",
            )
        entry = os.fsdecode(item)
        try:
            yield plain_path(entry)
        except UsageError:  # the record of a missing file names it
            yield entry


def _split(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    mark, end = (codecs.BOM_UTF8, b"\r") if separator == b"\n" else (b"", b"")
    # read1 returns what a pipe holds by now; read would wait for the full block.
    read = getattr(stream, "read1", stream.read)
    rest = b""
    while block := read(1 << 16):
        *items, rest = (rest + block).split(separator)
        for item in items:
            yield item.removeprefix(mark).removesuffix(end)
            mark = b""
    if last := rest.removeprefix(mark).removesuffix(end):
        yield last
