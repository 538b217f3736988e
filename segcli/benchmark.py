"""How fast this machine is with a model: by stage, image by image, and in the real pipeline.

The stages are the functions that the pipeline itself calls, one image at a time; throughput is the
pipeline's own, run on the same images into a folder that is removed. Nothing is printed here.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from tempfile import TemporaryDirectory
from typing import TypeVar

from segcli import session
from segcli.atomic import write_atomic
from segcli.encode import encode_output
from segcli.errors import ImageError, OutputError, UsageError
from segcli.formats import Format
from segcli.inputs import Source, join
from segcli.jobs import ClassifyJob, Job, SegmentJob
from segcli.machine import cpu_name, peak_rss_bytes
from segcli.measurements import Benchmark, BenchOptions, Stage, Throughput
from segcli.model import Model
from segcli.pipeline import run_images
from segcli.reading import RunOptions, read_image
from segcli.results import Segmentation
from segcli.sample_images import write_images
from segcli.writers import OutputPlan

# Without a number of runs: as many as fit, but enough for a median and few enough to end.
BUDGET_S = 5.0
FEWEST_RUNS, MOST_RUNS = 5, 100
# So many different images are used; a folder may hold millions.
MOST_IMAGES = 32
GENERATED_IMAGES = 4
# Fewer images a worker would time the pipeline's ends, where workers wait.
_IMAGES_PER_WORKER = 4
_TOP_K = 5

_T = TypeVar("_T")
_Clock = dict[str, list[float]]


def measure(
    load: Callable[[int, int], Model],
    sources: Iterable[Source],
    options: BenchOptions,
    *,
    started: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
    refuse: Callable[[ImageError], None] = lambda _: None,
) -> Benchmark:
    """Measures a model on images, or on made ones where there are none.

    Args:
        load: Opens the model for so many workers, with so many threads a run.
        sources: Files; the first ``MOST_IMAGES`` that can be decoded are used.
        options: What to measure.
        started: ``time.perf_counter()`` when loading began; None where it begins here.
        tell: Is given a word on what is being done.
        refuse: Is given the error of each image that cannot be used.

    Raises:
        UsageError: None of the sources can be decoded, or the model gives no answers.
        ImageError: The model failed on an image.
        ModelError, DeviceError: From ``load``.
        OutputError: There is no place for temporary files.
    """
    started = time.perf_counter() if started is None else started
    tell("loading the model")
    model = load(options.workers, options.threads)
    if model.card.task == "features":
        raise UsageError(f"{model.card.name!r} gives features, no classes")
    load_ms = (time.perf_counter() - started) * 1e3
    with _temporary_folder() as folder:
        chosen = _decodable(sources, options, refuse)
        if generated := not chosen:
            tell("making images")
            paths = write_images(join(folder, "in"), GENERATED_IMAGES, options.image_size_wh)
            chosen = [Source(path, f"{i}.jpg", "file") for i, path in enumerate(paths)]
        tell("timing each stage")
        stages, image_sizes, input_sizes = _time_stages(model, chosen, options, folder)
        image = Stage("image", tuple(map(sum, zip(*(s.samples_ms for s in stages), strict=True))))
        tell("timing the pipeline")
        count = max(len(image.samples_ms), options.workers * _IMAGES_PER_WORKER)
        throughput = _time_pipeline(model, chosen, options, count, folder)
        peak = peak_rss_bytes()
        sweep = []
        for workers, threads in splits(session.usable_cores()) if options.sweep else ():
            tell(f"timing {workers} workers with {threads} threads each")
            other = replace(options, workers=workers, threads=threads)
            same = (workers > 1, threads) == (options.workers > 1, options.threads)
            fitting = model if same else load(workers, threads)
            sweep.append(_time_pipeline(fitting, chosen, other, count, folder))
    return Benchmark(
        model=model.card.name,
        task=model.card.task,
        provider=model.provider,
        options=options,
        images=len(chosen),
        generated=generated,
        image_wh=image_sizes.pop() if len(image_sizes) == 1 else None,
        input_wh=input_sizes.pop() if len(input_sizes) == 1 else None,
        load_ms=load_ms,
        stages=tuple(stages),
        image=image,
        throughput=throughput,
        peak_rss_bytes=peak,
        sweep=tuple(sweep),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        usable_cores=session.usable_cores(),
    )


def splits(cores: int) -> list[tuple[int, int]]:
    """Returns every (workers, threads) whose product is ``cores``, most workers first."""
    return [(cores // n, n) for n in range(1, cores + 1) if cores % n == 0]


def _temporary_folder() -> "TemporaryDirectory[str]":
    try:
        return TemporaryDirectory(prefix="segcli-bench-")
    except OSError as error:
        raise OutputError(
            f"cannot make a temporary folder: {error.strerror}", hint="TMPDIR names another place"
        ) from error


def _decodable(
    sources: Iterable[Source], options: BenchOptions, refuse: Callable[[ImageError], None]
) -> list[Source]:
    """Returns the first sources that can be decoded; this also brings them into the page cache."""
    chosen: list[Source] = []
    first: ImageError | None = None
    for source in sources:
        try:
            read_image(source, RunOptions(max_pixels=options.max_pixels))
        except ImageError as error:
            first = first or error
            refuse(error)
            continue
        chosen.append(source)
        if len(chosen) == min(options.runs or MOST_IMAGES, MOST_IMAGES):
            break
    if first and not chosen:
        raise UsageError("none of the inputs can be decoded", hint=first.hint) from first
    return chosen


def _time_stages(
    model: Model, sources: Sequence[Source], options: BenchOptions, folder: str
) -> tuple[list[Stage], set[tuple[int, int]], set[tuple[int, int]]]:
    """Returns the stages, and the (width, height) of the images and of the graph's inputs."""
    for source in islice(cycle(sources), options.warmup):
        _run_stages(model, source, options, folder, {})
    clock: _Clock = {}
    sizes = []
    deadline = time.perf_counter() + BUDGET_S
    for done, source in enumerate(cycle(sources)):
        if done == (options.runs or MOST_RUNS):
            break
        if options.runs is None and done >= FEWEST_RUNS and time.perf_counter() > deadline:
            break
        sizes.append(_run_stages(model, source, options, folder, clock))
    stages = [Stage(name, tuple(times)) for name, times in clock.items()]
    return stages, {image for image, _ in sizes}, {graph for _, graph in sizes}


def _run_stages(
    model: Model, source: Source, options: BenchOptions, folder: str, clock: _Clock
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Takes one image through all stages; returns its size and its input's, (width, height)."""

    def timed(stage: str, call: Callable[[], _T]) -> _T:
        start = time.perf_counter()
        result = call()
        clock.setdefault(stage, []).append((time.perf_counter() - start) * 1e3)
        return result

    image = timed("decode", lambda: read_image(source, RunOptions(max_pixels=options.max_pixels)))
    pixel_values = timed("preprocess", lambda: model.prepare(image))
    logits = timed("infer", lambda: model.infer(pixel_values))

    def postprocess() -> Segmentation | None:
        result = model.interpret(logits[0], image)
        if not isinstance(result, Segmentation):
            return None
        # Every record of a run counts them.
        _ = result.classes
        return result

    result = timed("postprocess", postprocess)
    if result is not None:
        writing = _writing(folder)
        [target] = writing.plan.targets(source)
        timed(
            "encode",
            lambda: write_atomic(
                target, encode_output(result, Format.MASK, target, model.card, writing.style)
            ),
        )
    height, width = pixel_values.shape[2:]
    return (image.shape[1], image.shape[0]), (width, height)


def _time_pipeline(
    model: Model, sources: Sequence[Source], options: BenchOptions, count: int, folder: str
) -> Throughput:
    _drain(model, sources, options, options.warmup, folder)
    start = time.perf_counter()
    _drain(model, sources, options, count, folder)
    return Throughput(options.workers, options.threads, count, time.perf_counter() - start)


def _drain(
    model: Model, sources: Sequence[Source], options: BenchOptions, count: int, folder: str
) -> None:
    run = RunOptions(workers=options.workers, max_pixels=options.max_pixels)
    # Another name each: two workers may have the same image under way.
    repeated = (
        replace(source, relative=f"{i}.png")
        for i, source in enumerate(islice(cycle(sources), count))
    )
    job: Job = ClassifyJob(_TOP_K) if model.card.task == "classification" else _writing(folder)
    outcomes = run_images(repeated, model, job, run, stdin=io.BytesIO())
    # No loop: so Ctrl-C lands in the generator, which ends its workers before the folder goes.
    for outcome in list(outcomes):
        if outcome.error:
            raise outcome.error


def _writing(folder: str) -> SegmentJob:
    return SegmentJob(plan=OutputPlan("folder", join(folder, "out"), (Format.MASK,)))
