"""Where bytes are: files of this machine, objects of a store, answers of a web server.

The one place that knows the difference for what is read and written whole.
"""

from pathlib import Path
from stat import S_ISREG

from segcli import remote, web
from segcli.atomic import write_atomic
from segcli.errors import ImageMissing, ImageNotFound, UsageError
from segcli.urls import is_bucket, is_url, is_url_folder, is_web


def read_bytes(path: str) -> bytes:
    """Returns the content of a file or an object.

    Raises:
        ImageMissing: There is none (ImageNotFound), it is a folder, or it cannot be read.
        UsageError: It is an object, and the extra for them is not installed.
    """
    if is_web(path):
        return web.read_web(path)
    if is_bucket(path) or is_url_folder(path):
        raise ImageMissing(f"cannot read {path!r}: it is a folder")
    if is_url(path):
        return remote.read_object(path)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ImageNotFound(f"cannot read {path!r}: no such file") from error
    except IsADirectoryError as error:
        raise ImageMissing(f"cannot read {path!r}: it is a folder") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageMissing(f"cannot read {path!r}: {reason[:1].lower()}{reason[1:]}") from error


def read_start(path: str, length: int) -> bytes:
    """Returns the first bytes of a file or an object, none where it cannot be read.

    Raises:
        UsageError: It is an object, and the extra for them is not installed.
    """
    if is_url(path):
        return remote.read_start(path, length)
    try:
        with Path(path).open("rb") as file:
            return file.read(length)
    except (OSError, ValueError):
        return b""


def write_whole(path: str, data: bytes, *, replace: bool = True) -> None:
    """Puts a complete file or object in place, or leaves what was there.

    Args:
        path: The target; its folders are created as needed.
        data: All of its bytes.
        replace: False refuses a target that exists.

    Raises:
        OutputExists: The target exists and ``replace`` is False.
        OutputWriteError: It cannot be written.
        OutputError: Nothing can be written there.
        UsageError: It is an object, and the extra for them is not installed.
    """
    if is_web(path):
        raise UsageError(f"cannot write {path!r}: a web address is only read")
    if is_url(path):
        remote.put_object(path, data, replace=replace)
    else:
        write_atomic(path, data, replace=replace)


def exists(path: str) -> bool:
    """Tells whether there is a file, which no folder or pipe is, or an object.

    Raises:
        OutputError: A store does not tell.
    """
    if is_url(path):
        return remote.object_exists(path)
    try:
        return bool(path) and S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False
