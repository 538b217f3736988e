"""What the commands share that run images: opening a model, telling Outcomes to the streams."""

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

from segcli.claims import Claims
from segcli.cli.console import Results, Talk
from segcli.errors import ExitCode, ImageError, ImageMissing, SegcliError, UsageError
from segcli.inputs import exists
from segcli.registry import Registry, load_registry
from segcli.urls import is_url, plain_path
from segcli.writers import OutputPlan, check_folders, check_place, refuse_other_content

if TYPE_CHECKING:
    from segcli.artifact import ModelCard, Task
    from segcli.inputs import Source
    from segcli.jobs import Job
    from segcli.model import Model
    from segcli.ray_cluster import RayOptions
    from segcli.ray_engine import RayModel
    from segcli.reading import RunOptions
    from segcli.report import Kind, Report
    from segcli.results import Outcome

# What a run goes through: a model in this process, or on the workers of a cluster.
Engine: TypeAlias = "Model | RayModel"

Records = Literal["text", "json", "jsonl"]

_COMMANDS = {"segmentation": "segment", "classification": "classify", "features": "embed"}


def records_of(*, json: bool, jsonl: bool) -> Records:
    """Returns how records are written.

    Raises:
        UsageError: Both were asked for.
    """
    if json and jsonl:
        raise UsageError("--json and --jsonl exclude each other")
    return "json" if json else "jsonl" if jsonl else "text"


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
        check_task(card.task, task, name)
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
            check_task(found, task, name)
    return path


def refuse_url(option: str, path: str) -> None:
    """Raises UsageError where an option that takes a file is given a URL."""
    if is_url(path):
        raise UsageError(f"{option} {path!r} is a URL, expected a file on this machine")


def local_file(option: str, path: str | None) -> str | None:
    """Returns what an option that takes a file names, ``file://`` in front of it or not.

    Raises:
        UsageError: It is on another machine.
    """
    if path is None:
        return None
    refuse_url(option, path)
    return plain_path(path)


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


def check_task(found: str, wanted: str, name: str) -> None:
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


def dry_run(
    sources: Iterable["Source"],
    plan: Callable[["Source"], tuple[str, ...]] | None,
    out: Results,
    talk: Talk,
    *,
    end: bytes,
) -> ExitCode:
    """Writes each input and what it would write, and returns the code that planning gives.

    Args:
        sources: The inputs, in order.
        plan: Returns what a source would write, nothing where it would be left; raises ImageError.
            None where a run writes no files: the inputs alone are shown.
        out: Takes the pairs: ``input -> output`` where ``end`` is a newline, else both ended so.
        talk: Takes errors.
        end: After each line, or after each path.
    """
    failed = False
    for source in sources:
        try:
            targets = plan(source) if plan else ()
            listed = source.origin == "folder" and is_url(source.path)
            if source.origin != "stdin" and not listed and not exists(source.path, ImageMissing):
                raise ImageMissing(f"cannot read {source.path!r}: no such file")
        except ImageError as error:
            failed = True
            talk.image_error(error)
            continue
        if plan is None:
            out.line(source.path, end)
        for target in targets:
            if end == b"\n":
                out.line(f"{source.path} -> {target}")
            else:
                out.line(source.path, end)
                out.line(target, end)
    talk.hidden_errors()
    return ExitCode.SOME_FAILED if failed else ExitCode.OK


def report(
    outcomes: Iterable["Outcome"],
    out: Results,
    talk: Talk,
    *,
    records: Records,
    timing: bool,
    model: "Engine",
    text: Callable[["Outcome"], None],
    total: int | None = None,
    page: "Report | None" = None,
) -> ExitCode:
    """Writes every Outcome as it comes and returns the run's exit code.

    Args:
        outcomes: In input order.
        out: Takes the results.
        talk: Takes errors, details and the summary.
        records: How results are written.
        timing: Keeps ``elapsed_ms`` in records.
        model: For what is said of it.
        text: Writes one Outcome where records are ``text``.
        total: How many there will be, None where a list is still being read.
        page: A report to add each to.
    """
    start = time.perf_counter()
    counts = {"ok": 0, "skipped": 0, "error": 0}
    with _progress(talk, out, total) as advance:
        for outcome in _told_to(page, outcomes, counts):
            if not any(counts.values()):
                announce(model, talk)
            counts[outcome.status] += 1
            advance(counts)
            if page is not None:
                _add_to_page(page, outcome, timing=timing)
            if records == "text":
                text(outcome)
            elif records == "jsonl":
                out.line(outcome.to_json(timing=timing))
            else:
                opening = "[\n" if sum(counts.values()) == 1 else ",\n"
                out.write((opening + outcome.to_json(timing=timing)).encode())
            if outcome.error:
                talk.image_error(outcome.error)
            else:
                talk.detail(f"{outcome.path}: {outcome.status}, {outcome.elapsed_ms or 0:.0f} ms")
    if records == "json":
        out.write(b"\n]\n" if sum(counts.values()) else b"[]\n")
    talk.hidden_errors()
    seconds = time.perf_counter() - start
    if page is not None:
        page.close({**counts, "seconds": round(seconds, 3)})
    done = sum(counts.values())
    if done > 1 or talk.verbose:
        parts = [f"{counts['ok']} done"]
        parts += [
            f"{counts[k]} {w}"
            for k, w in (("skipped", "skipped"), ("error", "failed"))
            if counts[k]
        ]
        talk.note(
            f"{done} image{'s' if done != 1 else ''}: {', '.join(parts)} in {seconds:.1f} s "
            f"({done / max(seconds, 1e-9):.1f} images/s) on {model.provider}"
        )
    return ExitCode.SOME_FAILED if counts["error"] else ExitCode.OK


@contextlib.contextmanager
def open_page(path: str | None, kind: "Kind", model: "Engine") -> "Iterator[Report | None]":
    """Yields a report that is written when it is closed, or None without a path.

    Raises:
        UsageError: The path names no .html file, or a file that is no report.
        OutputError: It cannot be written.
    """
    if path is None:
        yield None
        return
    from segcli.report import Report

    command = shlex.join(["segcli", *sys.argv[1:]])
    with Report(path, kind, model.card, model.provider, command) as page:
        yield page


def check_page(path: str | None) -> str | None:
    """Returns the file of ``--report``, refused before any work where it cannot be one.

    Raises:
        UsageError: It names no .html file, or a file that is something else.
        OutputError: It cannot be written.
    """
    path = local_file("--report", path)
    if path is None:
        return None
    if not path.lower().endswith((".html", ".htm")) or Path(path).is_dir():
        raise UsageError(f"--report {path!r} is not a file that ends in .html")
    from segcli.report_page import PAGE_START

    plan = OutputPlan("file", path, ())
    check_place(plan)
    check_folders(plan)
    refuse_other_content(path, (PAGE_START,), "a report")
    return path


def _told_to(
    page: "Report | None", outcomes: Iterable["Outcome"], counts: dict[str, int]
) -> Iterator["Outcome"]:
    """Yields outcomes; what ends them early is told to the page, which is written all the same."""
    try:
        yield from outcomes
    except SegcliError as error:
        if page is not None and any(counts.values()):
            with contextlib.suppress(SegcliError):
                page.close({**counts, "ended early": str(error)})
        raise


def _add_to_page(page: "Report", outcome: "Outcome", *, timing: bool) -> None:
    record = outcome.to_dict(timing=timing)
    if outcome.error is not None:
        page.add_failure(record)
    elif outcome.small is not None and outcome.small.class_ids is not None:
        small = outcome.small
        page.add_segmentation(record, small.image, outcome.small.class_ids, small.confidence)
    elif outcome.small is not None:
        page.add_classification(record, outcome.small.image)


@contextlib.contextmanager
def _progress(
    talk: Talk, out: Results, total: int | None
) -> Iterator[Callable[[dict[str, int]], None]]:
    if out.isatty():
        # A bar and lines in one terminal would tear each other apart.
        yield lambda counts: None
        return
    start = time.perf_counter()
    with status(talk) as show:
        yield lambda counts: show(progress_text(counts, total, time.perf_counter() - start))


def progress_text(counts: dict[str, int], total: int | None, seconds: float) -> str:
    """Returns how far a run has come: images done, images a second, time left, failures.

    Args:
        counts: Of each status.
        total: How many there will be, None where that is not known.
        seconds: Since the run began.
    """
    done = sum(counts.values())
    # What was skipped took no time, and says nothing of the others.
    worked = done - counts["skipped"]
    rate = worked / seconds if seconds > 0 else 0.0
    parts = [f"{done}/{total} images" if total is not None else f"{done} images"]
    parts.append(f"{rate:.1f} images/s")
    if total is not None and rate > 0:
        left = round((total - done) / rate)
        hours, minutes = divmod(left // 60, 60)
        clock = f"{minutes}:{left % 60:02}" if not hours else f"{hours}:{minutes:02}:{left % 60:02}"
        parts.append(f"{clock} left")
    if counts["error"]:
        parts.append(f"{counts['error']} failed")
    return ", ".join(parts)


@contextlib.contextmanager
def status(talk: Talk) -> Iterator[Callable[[str], None]]:
    """Yields what shows one changing line on stderr; nothing where it is no terminal."""
    # With -v there are lines, which the changing one would tear apart.
    if talk.quiet or talk.verbose or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.status import Status

    with Status("starting", console=Console(stderr=True, highlight=False, markup=False)) as shown:
        yield shown.update
