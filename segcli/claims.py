"""Who may write which file: two inputs never write one, and no input is written over."""

import os
from collections.abc import Iterable, Sequence

from segcli.errors import ImageMissing, OutputCollision, OutputError, OutputWriteError, UsageError
from segcli.formats import common_stem
from segcli.inputs import Source, file_identity
from segcli.urls import below, is_url, is_url_folder
from segcli.writers import OutputPlan


def open_claims(args: Sequence[str], plan: OutputPlan, *, has_list: bool = False) -> "Claims":
    """Returns what keeps the outputs of a command line's inputs apart.

    Args:
        args: The inputs of the command line.
        plan: Names the outputs.
        has_list: There are inputs from a list as well.
    """
    folders = [arg for arg in args if is_url_folder(arg)]
    # Where instead the output folder is in the input folder, it is left out of the listing.
    listed_late = [folder for folder in folders if below(folder, plan.output) is not None]
    if len(args) == len(folders) == 1 and not has_list:
        return SortedClaims(listed_late)
    return Claims(listed_late)


class Claims:
    """Which input writes which file, for one run and from one thread.

    Args:
        listed_late: Folders whose images are known only as the run goes on; nothing is written
            into one.
    """

    def __init__(self, listed_late: Sequence[str] = ()) -> None:
        self._listed_late = listed_late
        self._owners: dict[str, str] = {}  # real path of a target: path of its source
        self._inputs: dict[int, str] = {}

    def check(self, plan: OutputPlan, sources: Iterable[Source]) -> int:
        """Claims all outputs of the command line's inputs before the run; returns their number.

        Args:
            plan: Names the outputs.
            sources: The inputs without those of a list or of a store's folders.

        Raises:
            UsageError: Two of them would write one file, or one would be written over.
        """
        found: list[tuple[int, str]] = []
        count = 0
        for source in sources:
            count += 1
            try:
                targets = plan.targets(source)
                self._own(source, targets)
            except (OutputCollision, OutputWriteError) as error:
                raise UsageError(str(error), hint=error.hint) from error
            self._add_input(source)
            identities = ((file_identity(t), t) for t in targets)
            found += [(i, t) for i, t in identities if i is not None]
        for identity, target in found:
            if identity in self._inputs:
                raise UsageError(
                    f"the output {target!r} is the input {self._inputs[identity]!r}",
                    hint="name another folder with -o",
                )
        return count

    def claim(self, source: Source, targets: Sequence[str]) -> None:
        """Claims the outputs of one source when its turn comes.

        Raises:
            OutputCollision: Another source of this run writes one of them.
            OutputWriteError: One of them is an input of this run.
        """
        real = (_real_name(t) for t in targets)
        if all(self._owners.get(t) == source.path for t in real):
            return
        written_by = self._owners.get(_real_name(source.path))
        if source.origin != "stdin" and written_by is not None:
            raise OutputCollision(f"the input {source.path!r} is the output of {written_by!r}")
        self._add_input(source)
        self._refuse_listed_late(targets)
        for target in targets:
            if (identity := file_identity(target)) in self._inputs:
                raise OutputWriteError(
                    f"the output {target!r} is the input {self._inputs[identity]!r}"
                )
        self._own(source, targets)

    def _refuse_listed_late(self, targets: Sequence[str]) -> None:
        for target in targets:
            for folder in self._listed_late:
                if below(target, folder) is not None:
                    raise OutputWriteError(
                        f"the output {target!r} would be in the input folder {folder!r}",
                        hint="name another folder with -o",
                    )

    def _add_input(self, source: Source) -> None:
        if source.origin != "stdin" and (identity := file_identity(source.path)):
            self._inputs[identity] = source.path

    def _own(self, source: Source, targets: Sequence[str]) -> None:
        real = {_real_name(t): t for t in targets}
        for key, target in real.items():
            owner = self._owners.get(key, source.path)
            if owner != source.path:
                raise OutputCollision(f"{owner!r} and {source.path!r} would both write {target!r}")
        self._owners.update(dict.fromkeys(real, source.path))


class SortedClaims(Claims):
    """Claims of the images of one folder that is listed in the order of its names' bytes.

    What they remember does not grow with the folder. Two images write one file only where their
    names have a stem in common; in this order such names stand together, but for others that begin
    with it, too.

    Args:
        listed_late: As for ``Claims``.
    """

    def __init__(self, listed_late: Sequence[str] = ()) -> None:
        super().__init__(listed_late)
        # What the names that are still to come may begin with, and who writes what of it.
        self._near: list[tuple[str, dict[str, str]]] = []
        self._last = b""

    def claim(self, source: Source, targets: Sequence[str]) -> None:
        """Claims the outputs of the next image.

        Raises:
            OutputCollision: Another image of the folder writes one of them.
            OutputWriteError: One of them would be in the input folder.
            OutputError: The store does not keep the order, as S3's directory buckets do not.
        """
        name = source.relative.encode("utf-8", "surrogatepass")
        if name < self._last:
            raise OutputError(
                f"{source.path!r} is listed out of order, so it is not known who writes what",
                hint="give the keys as a list: --files-from",
            )
        self._last = name
        self._refuse_listed_late(targets)
        start = common_stem(source.relative) + "."
        while self._near and not start.startswith(self._near[-1][0]):
            self._near.pop()
        if not self._near or self._near[-1][0] != start:
            self._near.append((start, {}))
        owners = self._near[-1][1]
        for target in targets:
            owner = owners.get(target, source.path)
            if owner != source.path:
                raise OutputCollision(f"{owner!r} and {source.path!r} would both write {target!r}")
        owners.update(dict.fromkeys(targets, source.path))


def _real_name(path: str) -> str:
    return path if is_url(path) else os.path.realpath(path)


def claim_targets(source: Source, plan: OutputPlan, claims: Claims) -> tuple[str, ...]:
    """Returns the files that one source will write, which from then on are its own.

    Raises:
        ImageMissing: The source is no file name.
        OutputCollision: Another source of this run writes one of them.
        OutputWriteError: One is an input, or would leave the output folder.
    """
    if not source.path or "\0" in source.path + source.relative:
        raise ImageMissing(f"an entry of the list is no file name: {source.path!r}")
    if is_url(source.path) and not source.relative:
        raise ImageMissing(f"{source.path!r} is no URL of an image")
    targets = plan.targets(source)
    if plan.kind != "stdout":
        claims.claim(source, targets)
    return targets
