"""Files that are complete or absent, whatever happens while they are written.

The bytes go into a locked temporary file beside the target, which then takes the target's name in
one step. What a killed run leaves behind is removed by the next one.
"""

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from segcli.errors import OutputError, OutputExists, OutputWriteError

# On Windows parts are not locked, so none are swept.
if sys.platform != "win32":
    import fcntl

PART_SUFFIX = ".segcli-part"
# Not swept with the parts: there are network file systems whose locks hold on one machine only.
_MARK_SUFFIX = ".segcli-mark"

_NAME_MAX = 255
_TOKEN_BYTES = 6

# Those of this process, for an end that runs no ``finally``.
_under_way: set[Path] = set()


def write_atomic(path: str, data: bytes, *, replace: bool = True) -> None:
    """Puts a complete file in place, or leaves what was there.

    Args:
        path: The target; its folders are created as needed.
        data: All of its bytes.
        replace: False refuses a target that exists.

    Raises:
        OutputExists: The target exists and ``replace`` is False.
        OutputWriteError: The system does not let it be written.
    """
    with open_atomic(path, replace=replace) as file:
        _write_all(file, data)


@contextlib.contextmanager
def open_atomic(path: str, *, replace: bool = True) -> Iterator[FileIO]:
    """Yields a file that takes its target's place once it is written, or never.

    A link is replaced, a pipe or a device is written directly. There is no
    fsync: this holds against a killed process, not against a power cut.

    Args:
        path: The target; its folders are created as needed.
        replace: False refuses a target that exists.

    Raises:
        OutputExists: The target exists and ``replace`` is False.
        OutputWriteError: The system does not let it be written.
    """
    try:
        status = _status(path)
        if status and not S_ISREG(status.st_mode) and not S_ISDIR(status.st_mode):
            # No O_CREAT and no O_TRUNC: it is there, and it is not ours.
            with FileIO(os.open(path, os.O_WRONLY), "w") as file:
                yield file
            return
        # Links on the way are followed. One in the file's own place is replaced: what it points
        # to may be anything, a photo for instance.
        given = Path(path)
        target = Path(os.path.realpath(given.parent)) / given.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if status and not replace:
            raise _exists(path)
        with _new_part(target) as (part, file):
            yield file
            if sys.platform == "win32":  # an open file cannot be renamed there
                file.close()
            if replace:
                part.replace(target)
            elif not _link_new(part, target):
                raise _exists(path)
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        raise OutputWriteError(
            f"cannot write {path!r}: {getattr(error, 'strerror', None) or error}",
            hint="free some space and run again with --skip-existing" if full else None,
        ) from error


@contextlib.contextmanager
def hold_mark(folder: Path) -> Iterator[str]:
    """Yields the path of a file that others see who have the same folder; nothing is left of it.

    Those of killed runs, which nobody locks any more, are removed before.

    Raises:
        OutputError: The system does not let it be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold_folder(folder))
            _sweep(str(folder), _MARK_SUFFIX)
            mark = held.enter_context(_new_mark(folder.absolute()))
        except OSError as error:
            raise OutputError(f"cannot write into {str(folder)!r}: {error.strerror}") from error
        yield mark


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it; what is empty of these afterwards is removed.

    Raises:
        OSError: One cannot be made.
    """
    made: list[Path] = []
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                # Another process may make it, too.
                with contextlib.suppress(FileExistsError):
                    place.mkdir()
                    made.append(place)
        yield
    finally:
        for place in reversed(made):
            # There may be something in it by now.
            with contextlib.suppress(OSError):
                place.rmdir()


def sweep_parts(folder: str, names: Collection[str] | None = None) -> None:
    """Removes the temporary files that a killed run left directly inside a folder.

    Those that a running process still locks stay, and so does what cannot be removed.

    Args:
        folder: That outputs go to.
        names: Of the files that were to be written, None for all.
    """
    _sweep(folder, PART_SUFFIX, None if names is None else set(map(_shorten, names)))


def _sweep(folder: str, suffix: str, names: Collection[str] | None = None) -> None:
    if sys.platform == "win32":
        return
    # ValueError: a list entry may hold a NUL.
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
        for entry in entries:
            if not (entry.name.startswith(".") and entry.name.endswith(suffix)):
                continue
            name = entry.name[1:].removesuffix(suffix).rpartition(".")[0]
            if names is not None and name not in names:
                continue
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    # Network file systems lock what is open for writing.
                    with FileIO(entry.path, "r+") as part:
                        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        Path(entry.path).unlink()


def discard_parts() -> None:
    """Removes the temporary files of this process, which is about to end at once."""
    for part in list(_under_way):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _status(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except FileNotFoundError:
        return None


def _exists(path: str) -> OutputExists:
    return OutputExists(f"{path!r} exists", hint="leave out --no-clobber to replace it")


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file.fileno(), view) :]


def _lock(file: FileIO) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def _new_mark(folder: Path) -> Iterator[str]:
    while True:
        with _new_part(folder / "run", _MARK_SUFFIX) as (part, file), FileIO(part, "r+") as mark:
            # Of some network file systems others see only what is closed.
            file.close()
            _lock(mark)
            # A sweep may have come between the two locks.
            if os.fstat(mark.fileno()).st_nlink > 0:
                yield str(part)
                return


def _shorten(name: str) -> str:
    """Returns as much of a name as its part's has room for."""
    room = _NAME_MAX - len("..") - 2 * _TOKEN_BYTES - len(PART_SUFFIX)
    return os.fsencode(name)[:room].decode("utf-8", "ignore")


@contextlib.contextmanager
def _new_part(target: Path, suffix: str = PART_SUFFIX) -> Iterator[tuple[Path, FileIO]]:
    """Yields a temporary file beside the target, locked; nothing is left of it after."""
    while True:
        token = secrets.token_hex(_TOKEN_BYTES)
        part = target.with_name(f".{_shorten(target.name)}.{token}{suffix}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        _under_way.add(part)
        try:
            # The mode is what the umask leaves, where mkstemp would give 0600.
            with FileIO(os.open(part, flags, 0o666), "w") as file:
                _lock(file)
                # A sweep may have come between the open and the lock.
                if os.fstat(file.fileno()).st_nlink > 0:
                    yield part, file
                    return
        finally:
            # After the file is closed, as Windows removes no open one. Elsewhere the lock has
            # outlasted the rename: by now the part has become the target, or has failed.
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            _under_way.discard(part)


def _link_new(part: Path, target: Path) -> bool:
    """Puts the part in place unless the target exists; False where it does."""
    try:
        target.hardlink_to(part)
    except FileExistsError:
        return False
    except OSError:  # no hard links here: reserve the name, then replace it
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        try:
            part.replace(target)
        except OSError:
            target.unlink()
            raise
    return True
