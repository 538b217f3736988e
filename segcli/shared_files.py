"""Whether another machine's files are this one's: its first ones are looked for here."""

import threading
import time
from collections.abc import Iterable

from segcli.errors import ImageMissing, OutputError
from segcli.results import Outcome
from segcli.storage import exists
from segcli.urls import is_url

# For so long an NFS client may take a folder for what it was: acdirmax in nfs(5).
_CACHE_S = 60.0
_POLL_S = 0.2

_HINT = "the machines of a cluster need shared folders, or URLs"


class SharedFiles:
    """What is known of the machines that read and write the files of a run.

    Args:
        here: This machine.
        stopping: Set when nobody waits for an answer any more.
    """

    def __init__(self, here: str, stopping: threading.Event) -> None:
        self._read, self._written = {here}, {here}
        self._stopping = stopping

    def check(self, machine: str, outcomes: Iterable[Outcome]) -> None:
        """Ends a run on a machine with other files, which would fail image after image there.

        Raises:
            OutputError: An image is here and not there, or an output is there and not here.
        """
        for outcome in outcomes:
            if machine not in self._read and not is_url(outcome.path):
                if outcome.status == "ok":
                    self._read.add(machine)
                elif isinstance(outcome.error, ImageMissing) and exists(outcome.path):
                    raise OutputError(f"{outcome.error} on {machine}, and here it is", hint=_HINT)
            if machine not in self._written and outcome.error is None:
                for output in outcome.outputs:
                    if is_url(output):
                        continue
                    if not self._appears(output):
                        raise OutputError(
                            f"{output!r} was written on {machine} and is not here", hint=_HINT
                        )
                    self._written.add(machine)

    def _appears(self, path: str) -> bool:
        deadline = time.monotonic() + _CACHE_S
        while not exists(path):
            if time.monotonic() > deadline:
                return False
            if self._stopping.wait(_POLL_S):
                break
        return True
