"""Whether the machines of a cluster have the same files: paths are all that they are told."""

import platform
from collections.abc import Iterable
from pathlib import Path

from segcli.errors import DeviceError, ImageNotFound
from segcli.pipeline import Item
from segcli.results import Outcome
from segcli.storage import exists
from segcli.urls import is_url

_HINT = "the machines of a cluster need shared folders, or URLs"


def check_mark(mark: str) -> None:
    """Refuses a machine without a file that another one holds where its outputs go.

    Raises:
        DeviceError: The file is not here.
    """
    if not exists(mark):
        raise DeviceError(
            f"{str(Path(mark).parent)!r} is another folder on {platform.node()!r}", hint=_HINT
        )


def check_paths(items: Iterable[Item], folder: str) -> None:
    """Refuses paths that are others here than where the inputs were taken.

    Args:
        items: With paths as given there.
        folder: That was the current folder there.

    Raises:
        DeviceError: One is relative, and that folder is not here.
    """
    for item in items:
        if item.error is not None:
            continue
        sources = (item.source.path,) if item.data is None else ()
        for path in (*sources, *item.targets):
            if is_url(path) or Path(path).is_absolute() or Path.cwd() == Path(folder):
                continue
            raise DeviceError(
                f"{path!r} is in {folder!r}, which {platform.node()!r} does not have", hint=_HINT
            )


def check_images(machine: str, outcomes: Iterable[Outcome]) -> None:
    """Refuses a machine that does not find an image of this one.

    Not for that image's sake: it would miss others, faster than other machines do their work.

    Args:
        machine: That the Outcomes come from.
        outcomes: Of images.

    Raises:
        DeviceError: It says that there is no such file, and here it is.
    """
    for outcome in outcomes:
        if isinstance(outcome.error, ImageNotFound) and exists(outcome.path):
            raise DeviceError(f"{outcome.error} on {machine!r}, and here it is", hint=_HINT)
