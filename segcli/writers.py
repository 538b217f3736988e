"""Where outputs go.

:func:`plan_output` decides from the command line what the outputs are called. Nothing is encoded or
written here; that is ``storage``'s.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal

from segcli.atomic import hold_folder
from segcli.errors import (
    OutputError,
    OutputExists,
    OutputWriteError,
    UsageError,
)
from segcli.formats import NAMING, Format
from segcli.inputs import (
    DEFAULT_EXTENSIONS,
    STDIN,
    Source,
    file_identity,
    file_status,
    is_folder,
    is_input_folder,
    join,
)
from segcli.own_png import START_BYTES, starts_other_picture
from segcli.storage import exists, read_start
from segcli.urls import is_url, is_web, other_scheme, split_url

STDOUT = "-"

# The guard on file descriptor 1 points these at stderr while libraries load.
_STDOUT_NAMES = (STDOUT, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


# With one of these -o names a file; without, a folder.
_FILE_SUFFIXES = frozenset(DEFAULT_EXTENSIONS) | {".gif", ".jp2", ".npy", ".json"}


@dataclass(frozen=True)
class OutputPlan:
    """What the outputs of a run are called.

    Attributes:
        kind: Whether ``output`` is a folder, the one file, or stdout.
        output: As given by ``-o``; "" is the current folder.
        formats: What is written for every image, without repeats.
    """

    kind: Literal["folder", "file", "stdout"]
    output: str
    formats: tuple[Format, ...]

    @property
    def folder(self) -> str | None:
        """The folder that ``-o`` names, to be left out of the walk; None without."""
        return self.output if self.kind == "folder" and self.output else None

    def targets(self, source: Source) -> tuple[str, ...]:
        """Returns one path per format, as they open from the current folder.

        Raises:
            OutputWriteError: The source has no place below the output folder.
        """
        if self.kind != "folder":
            return (self.output,)
        place = Path(source.relative)
        if not place.name or place.anchor or ".." in place.parts:
            raise OutputWriteError(
                f"the output of {source.path!r} would leave the output folder",
                hint="--root names a folder that holds all entries of the list"
                if source.origin == "list"
                else None,
            )
        endings = (NAMING[f].ending if self.output else NAMING[f].bare_ending for f in self.formats)
        stem = str(place).removesuffix(place.suffix)
        return tuple(join(self.output, stem + ending) for ending in endings)


def plan_output(
    output: str | None,
    formats: Iterable[Format],
    args: Sequence[str],
    *,
    has_list: bool = False,
) -> OutputPlan:
    """Decides what ``-o`` means for these inputs; writes nothing.

    Args:
        output: The value of ``-o``, None without.
        formats: What to write for every image.
        args: The inputs of the command line.
        has_list: There are inputs from a list as well.

    Raises:
        UsageError: Inputs, formats and output do not go together.
    """
    formats = tuple(dict.fromkeys(formats))
    folders = [arg for arg in args if arg != STDIN and is_input_folder(arg)]
    single = len(args) == 1 and not folders and not has_list
    if output is None:
        if folders:
            raise UsageError(f"the input folder {folders[0]!r} needs -o", hint="add -o FOLDER/")
        if STDIN in args:
            raise UsageError("an image on stdin needs -o", hint="add -o FILE or -o -")
        return OutputPlan("folder", "", formats)
    if not output:
        raise UsageError("-o is empty", hint="'-o .' names the current folder")
    if "\0" in output:
        raise UsageError(f"-o {output!r} is no file name")
    if is_url(output):
        _check_address(output)
    elif scheme := other_scheme(output):
        raise UsageError(
            f"-o {output!r}: nothing is written to {scheme}", hint="s3:// and gs:// are written"
        )
    if output in _STDOUT_NAMES:
        _check_single(output, formats, single)
        return OutputPlan("stdout", STDOUT, formats)
    if not _names_folder(output):
        _check_single(output, formats, single)
        _check_suffix(output, formats[0])
        return OutputPlan("file", output, formats)
    identity = _folder_identity(output)
    for folder in folders:
        if identity is not None and identity == _folder_identity(folder):
            raise UsageError(f"-o {output!r} is the input folder {folder!r}")
    return OutputPlan("folder", output, formats)


def _check_address(output: str) -> None:
    if is_web(output):
        raise UsageError(
            f"-o {output!r} is a web address, which is only read",
            hint="s3:// and gs:// are written",
        )
    try:
        split_url(output)
    except ValueError as error:
        raise UsageError(f"-o {output!r} cannot be written: {error}") from error


def _folder_identity(folder: str) -> int | None:
    return file_identity(folder.rstrip("/") if is_url(folder) else folder)


def _names_folder(output: str) -> bool:
    status = file_status(output)
    if output.endswith(("/", os.sep)) or (status and S_ISDIR(status.st_mode)):
        return True
    if Path(output).suffix.lower() in _FILE_SUFFIXES:
        return False
    if status and S_ISREG(status.st_mode):
        raise UsageError(f"-o {output!r} is a file and has no image suffix")
    # What exists and is neither file nor folder is a pipe or a device.
    return status is None


def _check_single(output: str, formats: tuple[Format, ...], single: bool) -> None:
    if not single:
        raise UsageError(
            f"-o {output!r} takes one image, and there are several inputs or a folder",
            hint="name a folder: -o FOLDER/",
        )
    if len(formats) > 1:
        raise UsageError(
            f"-o {output!r} takes one format, not {' and '.join(formats)}",
            hint="name a folder: -o FOLDER/",
        )


def _check_suffix(output: str, format_: Format) -> None:
    suffix, fitting = Path(output).suffix.lower(), NAMING[format_].suffixes
    if suffix in _FILE_SUFFIXES and suffix not in fitting:
        raise UsageError(
            f"the format {format_} cannot be written to {output!r}, "
            f"expected the suffix {' or '.join(fitting)}",
            hint=next(
                (
                    f"-f {other} writes {suffix}"
                    for other, n in NAMING.items()
                    if suffix in n.suffixes
                ),
                None,
            ),
        )


def check_place(plan: OutputPlan) -> None:
    """Refuses a place that nothing can be written to; creates nothing.

    Raises:
        OutputError: The nearest existing folder is none, or may not be written.
    """
    if is_url(plan.output):
        # Only a PUT tells what a store allows.
        return
    if plan.kind == "stdout" or (plan.kind == "file" and file_status(plan.output)):
        return
    try:
        path = Path(plan.output).absolute()
    except OSError as error:  # the current folder was removed
        raise OutputError(f"the current folder cannot be used: {error.strerror}") from error
    place = path if plan.kind == "folder" else path.parent
    while file_status(str(place)) is None and place != place.parent:
        place = place.parent
    if not is_folder(str(place)):
        reason = f"{str(place)!r} is not a folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f"{str(place)!r} may not be written"
    else:
        return
    raise OutputError(f"cannot write {plan.output or '.'!r}: {reason}")


def refuse_other_content(path: str, starts: tuple[bytes, ...], kind: str) -> None:
    """Refuses to replace a file that is of another kind: an input perhaps, or the truth.

    Args:
        path: That will be written; it need not exist.
        starts: How a file of the kind begins.
        kind: What it is called.

    Raises:
        UsageError: There is a file that begins otherwise.
    """
    status = file_status(path)
    if status is None or not S_ISREG(status.st_mode) or not status.st_size:
        return
    try:
        with Path(path).open("rb") as file:
            found = file.read(max(map(len, starts)))
    except OSError:
        found = b""
    if not found.startswith(starts):
        raise UsageError(
            f"{path!r} is there and is not {kind}: it is not replaced", hint="name another file"
        )


def output_folder(plan: OutputPlan) -> Path | None:
    """Returns the folder that all outputs are below; None where they are no files of this machine.

    It need not be there.
    """
    if plan.kind == "folder":
        return None if is_url(plan.output) else Path(plan.output)
    status = file_status(plan.output)
    if plan.kind == "stdout" or is_url(plan.output) or (status and not S_ISREG(status.st_mode)):
        return None
    return Path(plan.output).parent


def check_folders(plan: OutputPlan) -> None:
    """Refuses an output folder that cannot be made, by making it; it is left as it was.

    Asked for last before the work, as permissions do not tell all: below ``/proc`` not even root
    makes one.

    Raises:
        OutputError: It cannot be made.
    """
    folder = output_folder(plan)
    if folder is None:
        return
    try:
        with hold_folder(folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error


def refuse_pictures(targets: Sequence[str]) -> None:
    """Keeps an image from being written over that comes later in the list of a run.

    The list is not known to its end; files of a command line and of folders are.

    Raises:
        OutputWriteError: One of the targets is an image, and not one that segcli wrote. Of
            overlays, which are JPEGs, that cannot be told.
    """
    for target in targets:
        if target.lower().endswith(".png") and starts_other_picture(
            read_start(target, START_BYTES)
        ):
            raise OutputWriteError(
                f"{target!r} is there and segcli did not write it: it is not replaced, as it may "
                "be an image of the list",
                hint="name another folder with -o, or remove it",
            )


def all_exist(targets: Sequence[str]) -> bool:
    """Tells whether every target is there by now: ``--skip-existing`` asks this."""
    return all(map(exists, targets))


def refuse_existing(targets: Sequence[str]) -> None:
    """Raises OutputExists where a target is there and would be replaced."""
    for target in targets:
        if exists(target):
            raise OutputExists(f"{target!r} exists", hint="leave out --no-clobber to replace it")
