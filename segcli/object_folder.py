"""The images of a folder in an object store, as of one on this machine."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial

from segcli.errors import OutputError, UsageError
from segcli.in_order import in_order
from segcli.own_png import START_BYTES, starts_segcli_png
from segcli.remote import Listed, list_objects, object_exists, read_start
from segcli.urls import below, join_url, split_url

# Each look into a PNG is a request, and waits for an answer rather than for a core.
_LOOKS_AT_ONCE = 8


def is_object_folder(url: str) -> bool:
    """Tells whether there are keys below a URL, and no object of its name.

    Raises:
        UsageError: The store does not tell, or the URL cannot be one of its.
    """
    try:
        if split_url(url).key and object_exists(url, UsageError):
            return False
    except ValueError as error:
        raise UsageError(f"{url!r} is no address of an object: {error}") from error
    return any(True for _ in list_objects(url, lambda relative: None))


def walk_objects(
    folder: str, *, recursive: bool, suffixes: tuple[str, ...], exclude_dir: str | None
) -> Iterator[str]:
    """Yields the relative keys of a folder's images, in byte order.

    Hidden components are left out, so are PNGs that segcli wrote. The listing goes on while the
    images are worked on.

    Args:
        folder: A URL that names a folder.
        recursive: Subfolders are descended.
        suffixes: What counts as an image, in lower case.
        exclude_dir: The output folder.

    Raises:
        UsageError: The store does not list it.
    """
    excluded = None if exclude_dir is None else below(exclude_dir.removesuffix("/"), folder)

    def left_out(relative: str) -> str | None:
        if excluded is not None and relative.startswith(excluded + "/"):
            return excluded
        *folders, _ = relative.split("/")
        for depth, name in enumerate(folders, 1):
            if name.startswith(".") or not recursive:
                return "/".join(folders[:depth])
        return None

    def look(listed: Listed) -> str | None:
        url = join_url(folder, listed.key)
        if not listed.size:
            return listed.key if _is_object(url) else None
        own = listed.key.lower().endswith(".png") and starts_segcli_png(
            read_start(url, START_BYTES)
        )
        return None if own else listed.key

    candidates = (
        listed
        for listed in list_objects(folder, left_out)
        if listed.key.lower().endswith(suffixes)
        and not listed.key.rpartition("/")[2].startswith(".")
    )
    jobs = (partial(look, listed) for listed in candidates)
    with closing(in_order(jobs, workers=_LOOKS_AT_ONCE, stopping=lambda: None)) as looked:
        yield from (relative for relative in looked if relative is not None)


def _is_object(url: str) -> bool:
    """Tells whether an empty object is one of this name, not the mark of a folder ``url/``.

    A listing shows both alike: obstore drops the slash.
    """
    try:
        return object_exists(url)
    except OutputError:  # whoever reads it says why
        return True
