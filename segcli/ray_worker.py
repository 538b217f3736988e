"""What runs in a process of a Ray cluster: images through one session, files written there."""

import contextlib
import os
import platform
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from segcli import __version__
from segcli.artifact import ModelCard
from segcli.errors import OutputError
from segcli.jobs import Job
from segcli.model import Model
from segcli.pipeline import Item, attempt, batches
from segcli.reading import RunOptions
from segcli.results import Outcome
from segcli.session import Session
from segcli.urls import is_url


class Shipped(NamedTuple):
    """A model on its way to an actor.

    Attributes:
        path: Of its file on the machine that it comes from, for messages.
        card: What the file says of itself.
        data: A reference to the file's bytes; in a list, so that Ray leaves fetching it to us.
    """

    path: Path
    card: ModelCard
    data: list[Any]


class Started(NamedTuple):
    """What an actor says of itself."""

    version: str
    machine: str
    provider: str
    fallback: str | None
    threads: int


def this_machine() -> str:
    """Returns a name of this machine that no other one of a cluster has; Ray is connected."""
    import ray

    return f"{platform.node()} (node {ray.get_runtime_context().get_node_id()[:8]})"


class Worker:
    """What one actor does: images through one session, several at a time.

    Args:
        folder: The current folder of the process that takes the inputs.
        device: As for ``open_session``.
        threads: Cores that are this actor's.
    """

    def __init__(self, folder: str, device: str, threads: int) -> None:
        self._folder, self._device, self._threads = folder, device, threads
        self._opening = threading.Lock()
        self._model: Model | None = None

    def start(self, shipped: Shipped) -> Started:
        """Returns what runs here once the model is loaded.

        Raises:
            ModelError: It cannot be loaded.
            DeviceError: The device is not to be had.
        """
        model = self._open(shipped)
        machine = this_machine()
        return Started(__version__, machine, model.provider, model.fallback, model.threads)

    def attempt(
        self, group: Sequence[Item], shipped: Shipped, job: Job, run: RunOptions
    ) -> list[Outcome]:
        """Returns the Outcomes of items, their files written.

        Raises:
            SegcliError: What is no image's own fault.
        """
        model = self._open(shipped)
        check_paths(group, self._folder)
        return [
            replace(outcome, provider=model.provider)
            for batch in batches(group, run.batch_size)
            for outcome in attempt(batch, model, job, run)
        ]

    def _open(self, shipped: Shipped) -> Model:
        # Not in __init__: what fails there reaches the other side as a dead actor without a reason.
        with self._opening:
            if self._model is None:
                import ray

                with contextlib.suppress(OSError):
                    os.chdir(self._folder)
                session: Future[Session] = Future()
                session.set_result(
                    Session(
                        ray.get(shipped.data[0]),
                        device=self._device,
                        threads=self._threads,
                        shared=True,
                        cores=self._threads,
                    )
                )
                self._model = Model(shipped.path, shipped.card, session)
            return self._model


def check_paths(items: Sequence[Item], folder: str) -> None:
    """Refuses paths that are others here than where the inputs were taken.

    Args:
        items: With paths as given there.
        folder: That was the current folder there.

    Raises:
        OutputError: One is relative, and that folder is not here.
    """
    for item in items:
        if item.error is not None:
            continue
        sources = (item.source.path,) if item.data is None else ()
        for path in (*sources, *item.targets):
            if is_url(path) or Path(path).is_absolute() or Path.cwd() == Path(folder):
                continue
            raise OutputError(
                f"{path!r} is in {folder!r}, which {platform.node()!r} does not have",
                hint="the machines of a cluster need shared folders, or URLs",
            )
