"""Arguments, folders, lists and stdin as one ordered stream of sources.

The stream is lazy, so that a run can begin before a list ends; what it remembers is one
number per file, to process each file once. This room decides what is an input and what
its output is named after. It opens no image, only the text chunks of PNG files, which
say what segcli itself wrote. Objects of a store are listed by ``object_folder``.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import BinaryIO, Literal

from segcli.errors import SegcliError, UsageError
from segcli.file_lists import check_list, list_entries
from segcli.object_folder import is_object_folder, walk_objects
from segcli.own_png import is_segcli_png
from segcli.remote import object_exists
from segcli.shards import Shard
from segcli.urls import (
    is_bucket,
    is_url,
    is_url_folder,
    is_web,
    join_url,
    other_scheme,
    plain_path,
    url_identity,
    url_name,
    url_place,
)

DEFAULT_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One input of a run.

    Attributes:
        path: What to open and to report: the argument or list entry as given, for a
            folder the argument joined with the relative path, ``-`` for stdin.
        relative: What names the output: the place below the folder or ``--root``, else
            the last component.
        origin: Where the path came from. Only ``stdin`` means the stream: a list may
            name a file called ``-``.
    """

    path: str
    relative: str
    origin: Literal["file", "folder", "list", "stdin"]


def resolve_arguments(args: Sequence[str]) -> list[str]:
    """Returns arguments as the rest of this room takes them.

    ``file://`` becomes a path. A URL that ends in no image suffix and names a folder of a store
    gets its slash; one with a suffix is taken for an object, and not asked for.

    Raises:
        UsageError: A store does not tell what a URL names, or a URL is malformed.
    """
    resolved = []
    for arg in map(plain_path, args):
        named = is_web(arg) or arg.endswith("/") or arg.lower().endswith(DEFAULT_EXTENSIONS)
        if is_bucket(arg) or (is_url(arg) and not named and is_object_folder(arg)):
            arg = arg.removesuffix("/") + "/"
        resolved.append(arg)
    return resolved


def check_arguments(
    args: Sequence[str],
    *,
    recursive: bool = False,
    files_from: str | None = None,
    files0_from: str | None = None,
    root: str | None = None,
    extensions: Collection[str] = DEFAULT_EXTENSIONS,
    exclude_dir: str | None = None,
    remote: bool = False,
) -> None:
    """Refuses what cannot become a run, before a model is loaded.

    Args:
        args: Files, folders and ``-`` in the order given.
        recursive: Folders are descended.
        files_from: Newline-separated list, ``-`` for stdin.
        files0_from: NUL-separated list, ``-`` for stdin.
        root: Folder below which list entries keep their place.
        extensions: What counts as an image inside a folder, in any case.
        exclude_dir: The output folder, left out of every walk.
        remote: URLs are taken, as :func:`resolve_arguments` leaves them.

    Raises:
        UsageError: Nothing is given, none of it exists, a folder holds no image, a list
            cannot be opened, or stdin is asked for twice.
    """
    lists = [name for name in (files_from, files0_from) if name is not None]
    if not args and not lists:
        raise UsageError("no input given", hint="name image files, a folder, or - for stdin")
    if root is not None and not lists:
        raise UsageError("--root goes with --files-from or --files0-from")
    if [*args, *lists].count(STDIN) > 1:
        raise UsageError("stdin ('-') can be read only once")
    if STDIN in args and recursive:
        raise UsageError("stdin ('-') is one image and does not go with -r")
    for arg in args:
        if is_url(arg) and not remote:
            raise UsageError(
                f"{arg!r} is a URL, and this command reads files",
                hint="segment, classify and embed read URLs",
            )
    for name, separator in ((files_from, b"\n"), (files0_from, b"\0")):
        if name is not None and name != STDIN:
            check_list(name, separator)
    if not lists and not any(arg == STDIN or exists(arg) for arg in args):
        more = f", nor any of the {len(args) - 1} other inputs" if args[1:] else ""
        raise UsageError(
            f"no such file or folder: {args[0]!r}{more}",
            hint="of URLs, s3, gs, http, https and file are read"
            if other_scheme(args[0])
            else None,
        )
    for arg in args:
        if arg != STDIN and is_input_folder(arg):
            _check_folder(arg, recursive, _suffixes(extensions), exclude_dir)


def open_sources(
    args: Sequence[str],
    *,
    recursive: bool = False,
    files_from: str | None = None,
    files0_from: str | None = None,
    root: str | None = None,
    extensions: Collection[str] = DEFAULT_EXTENSIONS,
    exclude_dir: str | None = None,
    shard: Shard | None = None,
    stdin: BinaryIO,
) -> Iterator[Source]:
    """Yields every input once: arguments in their order, then the lists.

    Inside a folder the order is the byte order of the relative path. What is missing is
    yielded as well: that is an error record, not the end of the run.

    Args:
        args: As for :func:`check_arguments`, like all options up to ``exclude_dir``.
        recursive: Folders are descended.
        files_from: Newline-separated list, ``-`` for stdin.
        files0_from: NUL-separated list, ``-`` for stdin.
        root: Folder below which list entries keep their place.
        extensions: What counts as an image inside a folder.
        exclude_dir: The output folder.
        shard: The part of the inputs to yield; None is all of them.
        stdin: Read for a list named ``-`` and for nothing else.

    Raises:
        UsageError: A list cannot be read, or there was no input at all.
    """
    suffixes = _suffixes(extensions)

    def every() -> Iterator[Source]:
        for arg in args:
            if arg == STDIN:
                yield Source(STDIN, "stdin", "stdin")
            elif is_input_folder(arg):
                yield from _walk(arg, recursive, suffixes, exclude_dir)
            else:
                yield Source(arg, url_name(arg) if is_url(arg) else Path(arg).name, "file")
        for name, separator in ((files_from, b"\n"), (files0_from, b"\0")):
            if name is not None:
                stream = stdin if name == STDIN else None
                for entry in list_entries(name, separator, stream):
                    yield Source(entry, _place(entry, root), "list")

    if len(args) == 1 and is_url_folder(args[0]) and files_from is None and files0_from is None:
        # A store lists each key once, and a bucket may have millions: nothing to remember.
        yield from (s for s in every() if shard is None or shard.holds(s.relative))
        return
    seen: set[int | str] = set()
    for source in every():
        key = "" if source.origin == "stdin" else file_identity(source.path)
        key = os.fspath(source.path) if key is None else key
        if key not in seen:
            seen.add(key)
            if shard is None or shard.holds(source.relative):
                yield source
    if not seen:
        raise UsageError("no input found: the list names no file")


def file_identity(path: str) -> int | None:
    """Returns a number that two names of the same existing file share, else None.

    A URL has one whatever is there.
    """
    if is_url(path):
        return url_identity(path)
    status = file_status(path)
    if status is None or status.st_ino == 0:
        return None
    # One integer takes a third of the memory of a tuple, and a run may have millions.
    return status.st_dev << 64 | status.st_ino


def file_status(path: str) -> os.stat_result | None:
    """Returns what the system says of a path after links, None where it says nothing."""
    try:
        # Path("") would be the current folder.
        return Path(path).stat() if path else None
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return None


def is_folder(path: str) -> bool:
    """Tells whether a path is a folder, without ever raising."""
    status = file_status(path)
    return status is not None and S_ISDIR(status.st_mode)


def is_input_folder(path: str) -> bool:
    """Tells whether an argument is walked: a folder, or a URL that ends in a slash."""
    return is_url_folder(path) if is_url(path) else is_folder(path)


def exists(path: str, failure: type[SegcliError] = UsageError) -> bool:
    """Tells whether there is a file, a folder, an object; of a web address this says its reader.

    Args:
        path: As given.
        failure: Raised where a store does not tell.
    """
    if is_web(path) or is_url_folder(path):
        return True
    return object_exists(path, failure) if is_url(path) else file_status(path) is not None


def join(folder: str, relative: str) -> str:
    """Returns the path below ``folder``, which keeps the spelling that the user gave."""
    if is_url(folder):
        return join_url(folder, relative)
    return os.path.join(folder, relative)  # noqa: PTH118 - Path drops a leading ./


def _suffixes(extensions: Collection[str]) -> tuple[str, ...]:
    return tuple("." + ext.lower().removeprefix(".") for ext in extensions)


def _check_folder(
    folder: str, recursive: bool, suffixes: tuple[str, ...], exclude_dir: str | None
) -> None:
    if any(_walk(folder, recursive, suffixes, exclude_dir)):
        return
    if not recursive and any(_walk(folder, True, suffixes, exclude_dir)):
        raise UsageError(
            f"the folder {folder!r} holds no image, its subfolders do",
            hint="-r descends into them",
        )
    raise UsageError(
        f"the folder {folder!r} holds no image",
        hint=f"looked for {' '.join(suffixes)}, other than files that segcli wrote",
    )


def _walk(
    folder: str, recursive: bool, suffixes: tuple[str, ...], exclude_dir: str | None
) -> Iterator[Source]:
    """Yields the images of a folder in byte order of their relative path."""
    if is_url(folder):
        for relative in walk_objects(
            folder, recursive=recursive, suffixes=suffixes, exclude_dir=exclude_dir
        ):
            yield Source(join_url(folder, relative), relative, "folder")
        return
    excluded = None if exclude_dir is None else _real_relative(exclude_dir, folder)
    # (relative path, is a folder), last first; a stack, as trees can be deeper than
    # Python recurses.
    pending = [("", True)]
    while pending:
        relative, descend = pending.pop()
        path = join(folder, relative) if relative else folder
        if not descend:
            if not is_segcli_png(path):
                yield Source(path, relative, "folder")
            continue
        try:
            with os.scandir(path) as entries:
                found = [
                    (join(relative, entry.name), is_subfolder)
                    for entry in entries
                    if not entry.name.startswith(".")
                    and (
                        (is_subfolder := entry.is_dir(follow_symlinks=False))
                        or _is_candidate(entry, suffixes)
                    )
                ]
        except OSError:
            # A record that names the folder is better than files passed over in silence.
            yield Source(path, relative or Path(folder).name, "folder")
            continue
        # The slash sorts as it does in the relative paths below the subfolder.
        found.sort(key=lambda f: os.fsencode(f[0]) + b"/" * f[1], reverse=True)
        pending += [f for f in found if not f[1] or (recursive and f[0] != excluded)]


def _is_candidate(entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> bool:
    if not entry.name.lower().endswith(suffixes):
        return False
    try:
        # A dangling link is a missing image, a link to a folder is none.
        return entry.is_file() or (entry.is_symlink() and not Path(entry).exists())
    except OSError:
        return True


def _real_relative(path: str, folder: str) -> str | None:
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:  # another drive
        return None


def _place(entry: str, root: str | None) -> str:
    """Returns what names the output of a list entry; outside the root with ``..``."""
    if is_url(entry):
        return url_name(entry) if root is None else url_place(entry, root)
    if root is None:
        return Path(entry).name
    try:
        relative = os.path.relpath(entry, root)
        if Path(relative).parts[:1] == ("..",):
            # Root and entry may be spelled through different links.
            parent = _real_relative(str(Path(entry).parent), root)
            relative = str(Path(parent or relative, Path(entry).name))
    except ValueError:  # empty, or another drive
        return entry
    return relative
