"""Who could have put a file where it lies.

A model decides what is computed, so that one in a cache counts only where no stranger can have
written it. This room judges by owners and modes; Windows, which has neither, it leaves alone.
"""

import os
import sys
from pathlib import Path
from stat import S_ISDIR, S_ISVTX, S_IWOTH
from typing import NamedTuple


class Doubt(NamedTuple):
    """Why a file may be a stranger's.

    Attributes:
        reason: What was found, one clause.
        mend: The command that the owner of the place runs.
    """

    reason: str
    mend: str


def make_private(folder: Path) -> None:
    """Creates a folder, and those above it that are missing, with mode 0700.

    Raises:
        OSError: The system does not let it.
    """
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def doubt(path: Path, folder: Path, *, named: bool) -> Doubt | None:
    """Returns why a stranger may have written ``path``, None where none can have.

    Nothing on the way to it may be writable by every user, but for folders whose sticky bit keeps
    others from replacing what is not theirs; and from ``folder`` on all of it belongs to this
    user, to root or, where the user named the folder, to its owner. That owner counts only where
    no folder above is writable by every user: in ``/tmp`` anybody may have taken the name first.
    Who shares a folder with a group trusts the group.

    Args:
        path: A file or folder that exists.
        folder: The place that holds it, or itself.
        named: The user chose the place.
    """
    if sys.platform == "win32":
        return None
    inside, real = folder.resolve(), path.resolve()
    above = {*folder.absolute().parents, *inside.parents}
    for place in (real, *real.parents, *above):
        mode = place.stat().st_mode
        if mode & S_IWOTH and not (S_ISDIR(mode) and mode & S_ISVTX):
            return Doubt(f"{str(place)!r} can be written by every user", f"chmod o-w {place}")
    owners = {0, os.geteuid()}
    if named and not any(place.stat().st_mode & S_IWOTH for place in above):
        owners.add(inside.stat().st_uid)
    for place in (real, *(p for p in real.parents if p.is_relative_to(inside)), inside):
        if (owner := place.stat().st_uid) not in owners:
            return Doubt(
                f"{str(place)!r} belongs to {_name(owner)}, not to this user or root",
                f"chown -R root {folder}",
            )
    return None


def _name(uid: int) -> str:
    # On Windows there is no such module, and no call of this.
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
