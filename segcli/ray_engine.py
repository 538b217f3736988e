"""The same run on a Ray cluster: this process takes the inputs in order, Ray's actors do the rest.

Ray Core and not Ray Data: there are no blocks of data to move, only names that come one by one. In
a trial Ray Data gave no result of a source that goes on only as results come, which is what keeps
memory flat here; and it brings pyarrow and pandas.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from segcli import __version__
from segcli.artifact import ModelCard
from segcli.atomic import hold_mark, sweep_parts
from segcli.claims import Claims
from segcli.errors import DeviceError, InferenceError, SegcliError, UsageError
from segcli.in_order import in_groups, in_order
from segcli.inputs import Source
from segcli.jobs import Job
from segcli.onnx_file import check_seal
from segcli.pipeline import Item, folders_of, take
from segcli.ray_cluster import Connection, RayOptions, describe, fit
from segcli.ray_worker import Shipped, Started, Worker
from segcli.reading import RunOptions, image_error
from segcli.results import Outcome
from segcli.session import DISTANT
from segcli.shared_files import check_images

# An image whose worker has died so often is taken for the reason. After the first time each of a
# group is tried by itself, and no other such image meanwhile.
_MOST_DEATHS = 3

# A call costs this process 2 ms of a core, one of eight images 3 ms. They are dealt one by one, so
# that few are spread and each is told when it is done, unless calls would come faster than this.
_GROUP = 8
_CALL_S = 0.01

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
        self._tell = tell
        self._connection = Connection(options.address)
        self._ray = self._connection.ray
        self._idle: SimpleQueue[_Place | Exception | None] = SimpleQueue()
        self._first: Started | None = None
        self._alone = threading.Lock()
        self._lives = threading.Lock()
        self._closed = False
        self._is_away = options.address is not None
        self._held = contextlib.ExitStack()
        self._settled: Generator[list[Outcome], None, None] | None = None
        self._last_free = time.monotonic()
        self._image_s = math.inf  # what images took lately
        self._data: list[_RayObject] = []
        self._shipped = Shipped(path, card, self._data)
        try:
            first = self._connection.do(partial(self._start, path, options))
        except BaseException:
            self.close()
            raise
        self.provider, self.fallback, self.threads = first.provider, first.fallback, first.threads

    def _start(self, path: Path, options: RayOptions) -> Started:
        """Returns what the first worker says that is ready; the others join when they are."""
        try:
            return self._start_workers(path, options)
        except BaseException:
            self._forget()
            raise

    def _start_workers(self, path: Path, options: RayOptions) -> Started:
        ray = self._ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, threads = fit(nodes, options)
        # One more than its cores: the next images are there when some are done.
        self._in_flight = threads * (DISTANT if options.distant else 1) + (not options.distant)
        self._data.append(ray.put(path.read_bytes()))
        mark = None
        if self._is_away and options.folder is not None:
            # Held to the end: Ray may start a worker again anywhere.
            mark = self._held.enter_context(hold_mark(options.folder))
        device = "cuda" if options.gpus and options.device == "auto" else options.device
        actor = ray.remote(Worker).options(
            num_cpus=threads,
            num_gpus=options.gpus,
            max_restarts=-1,
            max_concurrency=self._in_flight,
        )
        self._actors = [
            _Actor(actor.remote(str(Path.cwd()), mark, device, threads)) for _ in range(workers)
        ]
        for one in self._actors:
            self._open(one)
        need = f"each takes {threads} cores and {options.gpus:g} GPUs of {describe(nodes)}"
        for waited_s in range(_START_TIMEOUT_S):
            with contextlib.suppress(Empty):
                place = self._idle.get(timeout=1)
                self._idle.put(place)
                if isinstance(place, Exception):
                    raise place
            if self._first is not None:
                return self._first
            if self._connection.stopping.is_set():
                break
            if waited_s == _PATIENCE_S:
                self._tell(f"waiting for a worker to start: {need}")
        raise DeviceError(
            f"no worker started within {_START_TIMEOUT_S} s: {need}",
            hint="fewer --threads or --gpus-per-worker fit smaller machines",
        )

    def _open(self, actor: "_Actor") -> None:
        """Has an actor load the model, again where it has died; it joins when it has."""
        with self._lives:
            if not self._closed:
                words = actor.handle.start.remote(self._shipped)
                words.future().add_done_callback(partial(self._join, actor))

    def _join(self, actor: "_Actor", words: "Future[Started]") -> None:
        error = words.exception()
        if error is None and words.result().version != __version__:
            error = UsageError(
                f"a worker runs segcli {words.result().version}, this is {__version__}",
                hint="install one version on every machine of the cluster",
            )
        if error is None:
            with self._lives:
                actor.machine = words.result().machine
                place = _Place(actor, actor.life)
            self._first = self._first or words.result()
            self._last_free = time.monotonic()
            for _ in range(self._in_flight):
                self._idle.put(place)
        elif self._has_died(error):
            # Ray starts it again; what it is asked before fails.
            again = threading.Timer(_RESTART_S, self._open, (actor,))
            again.daemon = True
            again.start()
        else:
            actor.is_out = True
            if all(one.is_out for one in self._actors):
                self._idle.put(_reason(error))
            else:
                self._tell(f"warning: a worker is left out: {_reason(error)}")

    def _has_died(self, error: BaseException) -> bool:
        """Tells whether an actor has died, and not just failed or never been one."""
        errors = self._ray.exceptions
        never = (errors.RayTaskError, errors.RuntimeEnvSetupError, errors.ActorUnschedulableError)
        return (
            isinstance(error, errors.RayError)
            and not isinstance(error, never)
            and not getattr(error, "actor_init_failed", False)
        )

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

        groups = in_groups(
            take(sources, job, claims or Claims(), stdin),
            max(_GROUP, run.batch_size),
            lambda: max(run.batch_size, int(_CALL_S * slots / self._image_s)),
        )
        works = (partial(self._attempt, group, job, run) for group in groups)
        try:
            self._settled = in_order(works, workers=slots, stopping=partial(self._idle.put, None))
            for outcomes in self._settled:
                for outcome in outcomes:
                    yield outcome
                    if outcome.error and run.fail_fast:
                        return
        finally:
            self.close()

    def _attempt(
        self, group: Sequence[Item], job: Job, run: RunOptions, deaths: int = 0
    ) -> list[Outcome]:
        while deaths < _MOST_DEATHS:
            with self._alone if deaths else contextlib.nullcontext():
                place = self._next_place()
                if place is None:  # nobody waits for it any more
                    return []
                try:
                    handle = place.actor.handle
                    outcomes: list[Outcome] = self._ray.get(
                        handle.attempt.remote(
                            group, self._shipped, job.again() if deaths else job, run
                        )
                    )
                except self._ray.exceptions.RayError as error:
                    if not self._has_died(error):
                        raise _reason(error) from error
                    deaths += 1
                    self._give_up(place)
                    targets = [path for item in group for path in item.targets]
                    for folder in folders_of(targets):
                        sweep_parts(str(folder), {Path(path).name for path in targets})
                    if group[1:]:
                        break
                else:
                    if self._is_away:
                        check_images(place.actor.machine, outcomes)
                    self._last_free = time.monotonic()
                    self._idle.put(place)
                    spent_ms = sum(outcome.elapsed_ms or 0.0 for outcome in outcomes)
                    self._image_s = max(spent_ms / 1e3 / len(group), 1e-3)
                    return outcomes
        if group[1:]:
            return [
                outcome for item in group for outcome in self._attempt([item], job, run, deaths)
            ]
        source = group[0].source
        reason = image_error(
            source,
            InferenceError(
                f"its worker died {_MOST_DEATHS} times, perhaps for want of memory",
                hint="fewer --threads for each worker need less at once",
            ),
        )
        return [Outcome(source.path, "error", self.card.name, self.provider, error=reason)]

    def _next_place(self) -> "_Place | None":
        while True:
            try:
                place = self._idle.get(timeout=_START_TIMEOUT_S)
            except Empty:
                # Others may have been served all the while.
                if time.monotonic() - self._last_free < _START_TIMEOUT_S:
                    continue
                raise DeviceError(
                    f"no worker has been free for {_START_TIMEOUT_S} s",
                    hint="'ray status' says what is left of the cluster",
                ) from None
            if not isinstance(place, _Place):
                # For all who wait.
                self._idle.put(place)
            if isinstance(place, Exception):
                raise place
            if place is None or place.life == place.actor.life:
                return place

    def _give_up(self, place: "_Place") -> None:
        """Takes all places of an actor that has died out of use, until it is there again."""
        with self._lives:
            if place.life != place.actor.life:
                return
            place.actor.life += 1
        self._tell(f"warning: a worker on {place.actor.machine!r} died: its images are tried again")
        self._open(place.actor)

    def close(self) -> None:
        """Leaves the cluster, which ends the workers."""
        # Before, as what asks Ray afterwards would start it again.
        if self._settled is not None:
            self._settled.close()
        self._forget()
        try:
            self._connection.close()
        finally:
            # After the workers that may still look for it.
            self._held.close()

    def _forget(self) -> None:
        with self._lives:
            self._closed = True
            # Ray gives another session's objects the same names: one that is forgotten then would
            # take the other with it.
            self._data.clear()


class _Actor:
    """One of Ray's actors.

    Attributes:
        handle: Ray's.
        life: How often it has died.
        is_out: It cannot work.
        machine: Where it is.
    """

    def __init__(self, handle: _RayObject) -> None:
        self.handle, self.life, self.is_out, self.machine = handle, 0, False, ""


class _Place(NamedTuple):
    """Leave to give an actor one more group, as long as it lives."""

    actor: _Actor
    life: int


def _reason(error: BaseException) -> Exception:
    """Returns what segcli itself raised in a worker, else a DeviceError with what Ray says."""
    # What a worker raises comes as Ray's error and its own at once, with a traceback for a message.
    cause = getattr(error, "cause", None) or error
    is_raised = isinstance(cause, SegcliError) or cause is not error
    if is_raised and isinstance(cause, Exception) and not isinstance(cause, ImportError):
        return cause
    reason = str(cause).strip().rpartition("\n")[2]
    return DeviceError(
        f"a worker of the Ray cluster did not start: {reason}",
        hint=f"segcli {__version__} has to be installed on every machine of it",
    )
