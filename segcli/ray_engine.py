"""The same run on a Ray cluster: this process takes the inputs in order, Ray's actors do the rest.

Ray Core and not Ray Data: there are no blocks of data to move, only names that come one by one. In
a trial Ray Data gave no result of a source that goes on only as results come, which is what keeps
memory flat here; and it brings pyarrow and pandas.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeAlias

from segcli import __version__
from segcli.artifact import ModelCard
from segcli.claims import Claims
from segcli.errors import DeviceError, InferenceError, SegcliError, UsageError
from segcli.in_order import in_groups, in_order
from segcli.inputs import Source
from segcli.jobs import Job
from segcli.onnx_file import check_seal
from segcli.pipeline import Item, take
from segcli.ray_cluster import Connection, RayOptions, fit, told
from segcli.ray_worker import Shipped, Started, Worker
from segcli.reading import RunOptions, image_error
from segcli.results import Outcome

# An image whose worker has died so often is taken for the reason. Those that merely shared it with
# such an image are tried again alone, and so die with it once.
_MOST_DEATHS = 3

# With one image a call, 3,000 of the smallest took 12 s on two cores; with up to so many, 7 s.
_GROUP = 8

# Ray starts a process for each, with Python and ONNX Runtime: seconds; more on a machine that has
# to be added to a cluster first.
_START_TIMEOUT_S = 300
_PATIENCE_S = 20
_RESTART_S = 0.5

# What Ray makes at run time and gives no type: references and handles of actors.
_RayObject: TypeAlias = Any


class RayModel:
    """A model on the workers of a Ray cluster.

    Args:
        path: An .onnx file that ``segcli export`` wrote.
        card: What it says of itself.
        options: Where it goes.
        tell: Takes what the user has to wait for.

    Attributes:
        card: As given.
        provider: ONNX Runtime's name of the provider of the first worker that was ready.
        fallback: Why ``auto`` did not take an accelerator there, or None.
        threads: Of each worker.

    Raises:
        UsageError: Ray is not installed, or the machine has not so many cores or GPUs.
        ModelError: The model cannot be loaded.
        DeviceError: There is no such cluster, no worker starts, or the device is not to be had.
    """

    def __init__(
        self, path: Path, card: ModelCard, options: RayOptions, tell: Callable[[str], None]
    ) -> None:
        check_seal(path)
        self.card = card
        self._connection = Connection(options.address)
        self._ray = self._connection.ray
        self._idle: SimpleQueue[_RayObject] = SimpleQueue()
        self._alone = threading.Lock()
        self._connection.do(partial(self._start, path, options, tell))

    def _start(self, path: Path, options: RayOptions, tell: Callable[[str], None]) -> None:
        ray = self._ray
        resources = ray.cluster_resources()
        workers, threads = fit(resources, options)
        # One more than its cores: the next image is there when one is done.
        self._in_flight = threads + (3 * threads if options.distant else 1)
        self._shipped = Shipped(path, self.card, [ray.put(path.read_bytes())])
        device = "cuda" if options.gpus and options.device == "auto" else options.device
        actor = ray.remote(Worker).options(
            num_cpus=threads,
            num_gpus=options.gpus,
            max_restarts=-1,
            max_concurrency=self._in_flight,
        )
        self._actors = [actor.remote(str(Path.cwd()), device, threads) for _ in range(workers)]
        starting = [one.start.remote(self._shipped) for one in self._actors]
        need = f"each takes {threads} cores and {options.gpus:g} GPUs of {told(resources)}"
        ready: list[_RayObject] = []
        for waited_s in range(_START_TIMEOUT_S):
            ready, _ = ray.wait(starting, timeout=1)
            if ready or self._connection.stopping.is_set():
                break
            if waited_s == _PATIENCE_S:
                tell(f"waiting for a worker to start: {need}")
        if not ready:
            raise DeviceError(
                f"no worker started within {_START_TIMEOUT_S} s: {need}",
                hint="fewer --threads or --gpus-per-worker fit smaller machines",
            )
        first = self._first_words(ready[0])
        self.provider, self.fallback, self.threads = first.provider, first.fallback, first.threads
        # The others join when they are ready, on machines perhaps that have yet to be added.
        for one, words in zip(self._actors, starting, strict=True):
            words.future().add_done_callback(partial(self._join, one))

    def _first_words(self, words: _RayObject) -> Started:
        try:
            started: Started = self._ray.get(words)
        except self._ray.exceptions.RayError as error:
            raise _reason(error) from error
        if started.version != __version__:
            raise UsageError(
                f"a worker runs segcli {started.version}, this is {__version__}",
                hint="install one version on every machine of the cluster",
            )
        return started

    def _join(self, actor: _RayObject, words: "Future[Started]") -> None:
        reason = words.exception()
        for _ in range(self._in_flight):
            self._idle.put(actor if reason is None else _reason(reason))

    def run_images(
        self,
        sources: Iterable[Source],
        job: Job,
        run: RunOptions,
        *,
        claims: Claims | None = None,
        stdin: BinaryIO,
    ) -> Iterator[Outcome]:
        """Yields one Outcome per source, in order, as ``pipeline.run_images`` does.

        The files are written by the workers. Ends the connection to the cluster, and a cluster of
        its own.
        """
        slots = self._in_flight * len(self._actors)

        def stop() -> None:
            for _ in range(slots):
                self._idle.put(None)

        works = (
            partial(self._attempt, group, job, run)
            for group in in_groups(
                take(sources, job, claims or Claims(), stdin), max(_GROUP, run.batch_size)
            )
        )
        try:
            with closing(in_order(works, workers=slots, stopping=stop)) as settled:
                for outcomes in settled:
                    for outcome in outcomes:
                        yield outcome
                        if outcome.error and run.fail_fast:
                            return
        finally:
            self.close()

    def _attempt(self, group: Sequence[Item], job: Job, run: RunOptions) -> list[Outcome]:
        errors = self._ray.exceptions
        deaths = 0
        while deaths < _MOST_DEATHS:
            with self._alone if deaths else nullcontext():
                actor = self._idle.get()
                if actor is None:  # nobody waits for it any more
                    return []
                if isinstance(actor, Exception):
                    self._idle.put(actor)
                    raise actor
                try:
                    outcomes: list[Outcome] = self._ray.get(
                        actor.attempt.remote(group, self._shipped, job, run)
                    )
                except errors.RayTaskError as error:
                    raise _reason(error) from error
                except errors.RayError:
                    deaths += 1
                    self._await_restart(actor)
                else:
                    return outcomes
                finally:
                    self._idle.put(actor)
        if group[1:]:
            return [outcome for item in group for outcome in self._attempt([item], job, run)]
        source = group[0].source
        reason = image_error(
            source,
            InferenceError(
                f"its worker died {_MOST_DEATHS} times, perhaps for want of memory",
                hint="fewer --threads for each worker need less at once",
            ),
        )
        return [Outcome(source.path, "error", self.card.name, self.provider, error=reason)]

    def _await_restart(self, actor: _RayObject) -> None:
        """Returns when Ray has started an actor again: what it is given before only fails."""
        errors = self._ray.exceptions
        end = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end:
            try:
                self._ray.get(actor.start.remote(self._shipped))
            except errors.RayTaskError as error:
                raise _reason(error) from error
            except errors.RayError:
                time.sleep(_RESTART_S)
            else:
                return

    def close(self) -> None:
        """Leaves the cluster, which ends the workers."""
        self._connection.close()


def _reason(error: BaseException) -> Exception:
    """Returns what segcli itself raised in a worker, else a DeviceError with what Ray says."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SegcliError):
        return cause
    if isinstance(cause, Exception) and not isinstance(cause, ImportError):
        return cause
    reason = str(cause or error).strip().rpartition("\n")[2]
    return DeviceError(
        f"a worker of the Ray cluster did not start: {reason}",
        hint=f"segcli {__version__} has to be installed on every machine of it",
    )
