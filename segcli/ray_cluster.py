"""The Ray cluster that a run goes to: its address, how workers fit it, the connection."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from segcli.errors import DeviceError, UsageError
from segcli.session import MOST_THREADS, usable_cores

_R = TypeVar("_R")

_KNOCK_TIMEOUT_S = 10
# Ray itself would try for ten minutes. Without the token that a cluster asks for it gives up after
# twenty seconds, and says so.
_CONNECT_TIMEOUT_S = 60
# A start that is stopped takes three seconds; Ray waits a minute for processes of its own that the
# same signal has ended.
_FAREWELL_S = 10


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where a run goes.

    Attributes:
        address: Of a cluster, ``auto`` for the one of this machine; None starts one for this run.
        workers: Actors, each with a session of its own; None fills the cluster.
        threads: Cores of one actor; None shares the cluster's among them, up to 4 each and no
            more than its smallest machine has.
        gpus: GPUs of one actor, of which ONNX Runtime uses the first.
        device: As for ``open_session``; ``auto`` is CUDA or an error where there are GPUs.
        distant: Images or outputs are behind URLs: more of them are under way at once.
        folder: One of this machine that outputs go below, which all of a cluster have to share.
    """

    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    gpus: float = 0.0
    device: str = "auto"
    distant: bool = False
    folder: Path | None = None


def fit(nodes: Sequence[Mapping[str, float]], options: RayOptions) -> tuple[int, int]:
    """Returns the number of workers and the cores of each.

    Args:
        nodes: What each machine of the cluster has, by Ray's names.
        options: What is asked for.

    Raises:
        UsageError: This machine alone is asked for more than it has. A cluster may grow.
    """
    if options.gpus:
        nodes = [node for node in nodes if node.get("GPU")] or nodes
    # Of those that run anything: a head node often lends no core.
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    places = sum(_gpu_places(node.get("GPU", 0.0), options.gpus) for node in nodes)
    workers, threads = options.workers, options.threads
    if workers is None and options.gpus:
        workers = max(1, places)
    if threads is None:
        threads = max(1, min(MOST_THREADS, min(cores), sum(cores) // (workers or 1)))
    if workers is None:
        workers = max(1, sum(n // threads for n in cores))
    if options.address is None and workers * threads > sum(cores):
        raise UsageError(
            f"--workers {workers} with --threads {threads} takes {workers * threads} cores, "
            f"this machine has {sum(cores)}"
        )
    if options.address is None and options.gpus and workers > places:
        raise UsageError(
            f"--workers {workers} with --gpus-per-worker {options.gpus:g} does not fit the GPUs "
            f"that Ray finds on this machine: {gpus:g}"
        )
    return workers, threads


def _gpu_places(gpus: float, share: float) -> int:
    # Part of a GPU is never put together from two.
    if share >= 1:
        return int(gpus / share)
    return int(gpus) * int(1 / share) if share else 0


class Connection:
    """A connection to a Ray cluster, or to one that it starts.

    Args:
        address: As for ``RayOptions``.

    Attributes:
        ray: The module.
        stopping: Set where nobody waits any more for what ``do`` is given.

    Raises:
        UsageError: Ray is not installed.
        DeviceError: There is no such cluster, or none can be started.
    """

    def __init__(self, address: str | None) -> None:
        self.ray = _import_ray()
        self.stopping = threading.Event()
        # What Ray starts ends with the thread that started it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="segcli-ray")
        self._leaves_something = address is None
        self._closed = False
        try:
            self.do(partial(self._open, address))
        except Exception as error:
            where = f"the Ray cluster {address!r} cannot be reached"
            reason = str(error).partition("\n")[0].rstrip(".") or "it does not answer"
            raise DeviceError(
                f"{where if address else 'Ray did not start'}: {reason}",
                hint="'ray status' on that machine says more; with a token, set RAY_AUTH_MODE=token"
                if address
                else None,
            ) from error

    def _open(self, address: str | None) -> None:
        options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
        if address is None:
            options |= {"num_cpus": usable_cores(), "include_dashboard": False}
        else:
            _knock(address)
        # Ray has workers import from what is the current folder now, before all else: a folder of
        # pictures called numpy there, or a clone of segcli, would stand in for the package.
        with contextlib.chdir(Path(__file__).parents[1]):
            self.ray.init(address or "local", **options)
        self._leaves_something = True

    def do(self, step: Callable[[], _R]) -> _R:
        """Returns what a step returns that calls Ray.

        It runs in another thread, to its end if that is near: an interrupt that cut it off half-way
        would leave processes behind for a minute, and there Ray's handlers of signals do not take
        the place of ours.
        """
        running = self._thread.submit(step)
        try:
            return running.result(None if self._leaves_something else _CONNECT_TIMEOUT_S)
        except BaseException:
            self.stopping.set()
            if self._leaves_something:
                if wait([running], _FAREWELL_S).not_done:
                    self._closed = True
                self.close()
            raise

    def close(self) -> None:
        """Leaves the cluster, and ends one that was started."""
        if self._closed:
            return
        self._closed = True
        leaving = self._thread.submit(self.ray.shutdown)
        try:
            leaving.result()
        finally:
            # Cut off half-way, Ray would end this process with an exit code of its own.
            wait([leaving])
            self._thread.shutdown(wait=False)


def _import_ray() -> ModuleType:
    # Before Ray is imported: it would tell its makers of each cluster.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its handlers in C++ would end the process with another exit code, and tell where it was.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # What it prints goes to stderr, where no colour belongs unasked. Of a worker that died its
    # kilobyte of advice is left out: the run says so itself.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--engine ray needs Ray, which is not installed", hint="pip install 'segcli[ray]'"
        ) from error
    # Importing it sets the level; what it logs of its tokens is nothing to act on.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


def _knock(address: str) -> None:
    """Raises OSError where nothing answers: Ray itself would try for ten minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdecimal():
        if int(port) >= 1 << 16:
            raise OSError(f"there is no port {port}")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()


def describe(nodes: Sequence[Mapping[str, float]]) -> str:
    """Returns in a few words what a cluster has, as ``fit`` is given it."""
    cores, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return f"a cluster of {cores:g} cores and {gpus:g} GPUs"
