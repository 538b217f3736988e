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
from segcli.jobs import Job
from segcli.model import Model
from segcli.pipeline import Item, attempt, batches
from segcli.reading import RunOptions
from segcli.results import Outcome
from segcli.session import Session
from segcli.shared_files import check_mark, check_paths


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
    """What an actor says of itself; ``machine`` is a host's name."""

    version: str
    machine: str
    provider: str
    fallback: str | None
    threads: int


class Worker:
    """What one actor does: images through one session, several at a time.

    Args:
        folder: The current folder of the process that takes the inputs.
        mark: A file that it holds where the outputs go, if they are files.
        device: As for ``open_session``.
        threads: Cores that are this actor's.
    """

    def __init__(self, folder: str, mark: str | None, device: str, threads: int) -> None:
        self._folder, self._mark = folder, mark
        self._device, self._threads = device, threads
        self._opening = threading.Lock()
        self._model: Model | None = None

    def start(self, shipped: Shipped) -> Started:
        """Returns what runs here once the model is loaded.

        Raises:
            ModelError: It cannot be loaded.
            DeviceError: The device is not to be had, or this machine has other files.
        """
        model = self._open(shipped)
        return Started(__version__, platform.node(), model.provider, model.fallback, model.threads)

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

                if self._mark is not None:
                    check_mark(self._mark)
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
