"""What a run goes through: a model in this process, or on the workers of a cluster."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from segcli.claims import Claims
from segcli.cli.console import Talk
from segcli.errors import UsageError
from segcli.registry import Registry, load_registry
from segcli.urls import plain_path, refuse_url

if TYPE_CHECKING:
    from segcli.artifact import ModelCard, Task
    from segcli.inputs import Source
    from segcli.jobs import Job
    from segcli.model import Model
    from segcli.ray_cluster import RayOptions
    from segcli.ray_engine import RayModel
    from segcli.reading import RunOptions
    from segcli.results import Outcome

Engine: TypeAlias = "Model | RayModel"

_COMMANDS = {"segmentation": "segment", "classification": "classify", "features": "embed"}


def open_registry(path: str | None) -> Registry:
    """Returns the built-in registry with a user's file added."""
    return load_registry(Path(path) if path else None)


def open_model(
    name: str,
    task: "Task | None",
    registry: Registry,
    talk: Talk,
    *,
    device: str,
    threads: int | None,
    shared: bool,
    offline: bool,
    wait: bool = False,
) -> "Model":
    """Returns a model for one task, or for any where ``task`` is None; it may still be loading.

    With ``wait`` it is ready: where whoever feeds the images may take long, and is not to find out
    at the end that the model or the device fails.

    Raises:
        ModelError: It cannot be had.
        DeviceError: The device is not to be had; without ``wait`` its first use says so.
        UsageError: It is a model for another task.
    """
    path, card = _obtain(name, task, registry, talk, offline=offline)
    from segcli.session import open_session

    opening = open_session(path, device=device, threads=threads, shared=shared)
    # These imports take as long as the session does, which is built meanwhile.
    from segcli.model import Model

    model = Model(path, card, opening)
    if wait:
        _ = model.session
    return model


def _obtain(
    name: str, task: "Task | None", registry: Registry, talk: Talk, *, offline: bool
) -> tuple[Path, "ModelCard"]:
    path = find_model(name, task, registry)
    if path is None:
        from segcli.store import obtain

        path = obtain(name, registry, offline=offline, tell=talk.note)
    from segcli.onnx_file import read_card

    card = read_card(path)
    if task:
        _check_task(card.task, task, name)
    return path, card


def parse_engine(
    engine: str, address: str | None, gpus: float | None, places: Iterable[str]
) -> "RayOptions | None":
    """Returns where a run goes, None for this process.

    Args:
        engine: ``local`` or ``ray``.
        address: Of a cluster, if any is named.
        gpus: Of each worker, as asked for.
        places: Inputs and output of the command line.

    Raises:
        UsageError: An option of Ray's goes without it, a number is out of range, or a place is one
            that the workers do not share.
    """
    if engine != "ray":
        given = (("--ray-address", address), ("--gpus-per-worker", gpus))
        for option, value in given:
            if value is not None:
                raise UsageError(f"{option} goes with --engine ray")
        return None
    if gpus is not None and not 0 <= gpus < math.inf:
        raise UsageError(f"--gpus-per-worker {gpus:g} is not a number from 0 up")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise UsageError(f"--gpus-per-worker {gpus:g}: above 1 there are only whole GPUs")
    for place in places:
        if place.lower().startswith("memory://"):
            raise UsageError(f"{place!r} is in the memory of one process, and Ray has several")
    from segcli.ray_cluster import RayOptions

    return RayOptions(address=address or os.environ.get("RAY_ADDRESS"), gpus=gpus or 0.0)


@contextlib.contextmanager
def open_engine(
    ray: "RayOptions | None",
    name: str,
    task: "Task",
    registry: Registry,
    talk: Talk,
    *,
    device: str,
    workers: int | None,
    threads: int | None,
    single: bool,
    distant: bool,
    folder: Path | None = None,
    offline: bool,
    wait: bool,
) -> Iterator[tuple["Engine", int]]:
    """Yields a model in this process or on a cluster, and how many threads of this process run it.

    A cluster is left at the end.

    Args:
        ray: As ``parse_engine`` gives it.
        name: Of the model.
        task: That it has to be for.
        registry: Knows names.
        talk: Takes notes.
        device: As for ``open_model``, like ``offline`` and ``wait``.
        workers: As asked for.
        threads: As asked for.
        single: There is one image.
        distant: Images or outputs are behind URLs.
        folder: One of this machine that outputs go below.
        offline: Nothing is fetched.
        wait: The model is to be ready.

    Raises:
        ModelError: It cannot be had.
        DeviceError: The device or the cluster is not to be had.
        UsageError: It is a model for another task, or there are not so many cores.
    """
    if ray is not None:
        from segcli.ray_engine import RayModel

        path, card = _obtain(name, task, registry, talk, offline=offline)
        where = replace(
            ray,
            workers=workers,
            threads=threads,
            device=device,
            distant=distant,
            folder=folder,
        )
        with contextlib.closing(RayModel(path, card, where, talk.note)) as loaded:
            yield loaded, 1
        return
    workers, threads = default_workers(workers, threads, single=single, distant=distant)
    model = open_model(
        *(name, task, registry, talk),
        device=device,
        threads=threads,
        shared=workers > 1,
        offline=offline,
        wait=wait,
    )
    yield model, workers


def run_images(
    engine: "Engine",
    sources: Iterable["Source"],
    job: "Job",
    options: "RunOptions",
    *,
    claims: Claims | None = None,
    stdin: BinaryIO,
) -> Iterator["Outcome"]:
    """Yields one Outcome per source, in order, its files written.

    Args:
        engine: As ``open_engine`` gives it.
        sources: The inputs; taken only as fast as they are worked on.
        job: What is wanted of each.
        options: How to run.
        claims: Which input writes which file; none where the run begins with none.
        stdin: Read for the source ``-``.
    """
    from segcli.model import Model

    if isinstance(engine, Model):
        from segcli.pipeline import run_images

        return run_images(sources, engine, job, options, claims=claims, stdin=stdin)
    return engine.run_images(sources, job, options, claims=claims, stdin=stdin)


def find_model(name: str, task: "Task | None", registry: Registry) -> Path | None:
    """Returns a model's file where it needs no look-up; None where ``obtain`` has to get it.

    Raises:
        ModelNotFound: There is no such file or name.
        UsageError: A name is that of a model for another task.
    """
    from segcli.store import on_hand

    refuse_url("-m", name)
    path = on_hand(plain_path(name), registry)
    if path is None:
        found = registry.get(name).task
        # Before anything is fetched.
        if task:
            _check_task(found, task, name)
    return path


def announce(model: "Engine", talk: Talk) -> None:
    """Waits for a model's session and says on what it runs.

    Raises:
        ModelError: It cannot be loaded.
        DeviceError: The device is not to be had.
    """
    if model.fallback:
        talk.note(f"warning: {model.fallback}")
    talk.detail(
        f"{model.card.name} on {model.provider}, {model.threads} threads a run, "
        f"weights under {model.card.license}"
    )


def _check_task(found: str, wanted: str, name: str) -> None:
    """Raises UsageError, naming the right command, where a model is for another task."""
    if found != wanted:
        raise UsageError(
            f"{name!r} is a {found} model", hint=f"use 'segcli {_COMMANDS[found]}' with it"
        )


def default_workers(
    workers: int | None, threads: int | None, *, single: bool, distant: bool = False
) -> tuple[int, int]:
    """Returns (workers, threads) for the cores of this process.

    Of many images each worker decodes, finishes and writes its own, while few go through the
    network at once, with several threads each: as fast as one thread for each worker, for a
    fraction of the memory. One image gets all cores. Where images or outputs are ``distant`` there
    are workers that wait for a network, too.

    Raises:
        UsageError: More threads were asked for than the machine has cores.
    """
    from segcli.session import DISTANT, MOST_THREADS, usable_cores

    cores = usable_cores()
    # ONNX Runtime starts as many as it is told, and a thousand of them do nothing but wait.
    most = max(cores, os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise UsageError(f"--threads {threads} is more than the {most} cores of this machine")
    if workers is None:
        workers = 1 if single else cores * (DISTANT if distant else 1)
    return workers, threads or (cores if workers == 1 else min(cores, MOST_THREADS))
