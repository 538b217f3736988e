"""Sources -> Outcomes, in input order, with a bounded number under way.

Each worker takes its images through their whole life (read, decode, run, encode, write), so
decoding one overlaps with running another; ONNX Runtime, Pillow, zlib and file I/O release the GIL.
An image that fails is an Outcome like any other.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.artifact import ModelCard
from segcli.atomic import sweep_parts
from segcli.errors import ImageError
from segcli.in_order import in_order
from segcli.inputs import Source
from segcli.jobs import Job
from segcli.model import Model
from segcli.reading import RunOptions, image_error, read_image, read_reduced
from segcli.results import Outcome
from segcli.writers import STDOUT, Claims

_Image: TypeAlias = npt.NDArray[np.uint8]


class Item(NamedTuple):
    """A source in its turn.

    Attributes:
        source: The input.
        targets: The files that are its own to write.
        error: Why it has none.
        data: Its bytes where they could be read only in turn.
    """

    source: Source
    targets: tuple[str, ...] = ()
    error: ImageError | None = None
    data: bytes | None = None


def run_images(
    sources: Iterable[Source],
    model: Model,
    job: Job,
    run: RunOptions,
    *,
    claims: Claims | None = None,
    stdin: BinaryIO,
) -> Iterator[Outcome]:
    """Yields one Outcome per source, in order, its files written.

    Args:
        sources: The inputs; taken only as fast as they are worked on.
        model: For the job's task.
        job: What is wanted of each.
        run: How to run.
        claims: Which input writes which file; none where the run begins with none.
        stdin: Read for the source ``-``.
    """
    return run_items(take(sources, job, claims or Claims(), stdin), model, job, run)


def take(sources: Iterable[Source], job: Job, claims: Claims, stdin: BinaryIO) -> Iterator[Item]:
    """Yields sources with what has to be settled in their order and in one place.

    Who writes a file is not decided by who is faster. Folders that will be written to are swept of
    what a killed run left there.
    """
    swept: set[Path] = set()
    for source in sources:
        try:
            targets = job.claim(source, claims)
            for folder in {Path(t).parent for t in targets if t != STDOUT} - swept:
                sweep_parts(str(folder))
                swept.add(folder)
            # Here, as a worker that waits for a writer could not be interrupted.
            data = stdin.read() if source.origin == "stdin" else None
        except ImageError as error:
            yield Item(source, error=error)
        else:
            yield Item(source, targets, data=data)


def run_items(items: Iterable[Item], model: Model, job: Job, run: RunOptions) -> Iterator[Outcome]:
    """Yields one Outcome per item, in order, its files written.

    Args:
        items: Taken only as fast as they are worked on.
        model: For the job's task.
        job: What is wanted of each.
        run: How to run.
    """
    if job.shows_image:
        run = replace(run, fast_decode=False)
    # Set when the model is there, or is no longer waited for.
    go_on = threading.Event()
    stopped = threading.Event()
    model.when_ready(go_on.set)

    def stop() -> None:
        stopped.set()
        go_on.set()

    def failed(source: Source, reason: Exception) -> Outcome:
        error = image_error(source, reason)
        return Outcome(source.path, "error", model.card.name, "", error=error, elapsed_ms=0.0)

    def batches() -> Iterator[Callable[[], list[Outcome]]]:
        each = iter(items)
        while batch := list(islice(each, run.batch_size)):
            yield partial(attempt, batch)

    def settled_before(item: Item) -> Outcome | None:
        if item.error is not None:
            return failed(item.source, item.error)
        try:
            done = job.is_done(item.targets)
        except ImageError as error:
            return failed(item.source, error)
        if not done:
            return None
        outcome = Outcome(item.source.path, "skipped", model.card.name, "", outputs=item.targets)
        return replace(outcome, elapsed_ms=0.0)

    def attempt(batch: list[Item]) -> list[Outcome]:
        start = time.perf_counter()
        known = [settled_before(item) for item in batch]
        outcomes = list(known)
        images: list[_Image] = []
        sizes_hw: list[tuple[int, int]] = []
        places: list[int] = []
        for place, item in enumerate(batch):
            if known[place] is not None:
                continue
            try:
                image, size_hw = _read(item, run, model.card)
            except Exception as error:
                outcomes[place] = failed(item.source, error)
                continue
            images.append(image)
            sizes_hw.append(size_hw)
            places.append(place)
        # The first images are decoded while the session is being built; that is not theirs.
        decoded = time.perf_counter()
        go_on.wait()
        waited = time.perf_counter() - decoded
        if not stopped.is_set():
            answers = model.answer(
                images,
                [job.map_size or size_hw for size_hw in sizes_hw],
                run.protocol,
                confidence=job.confidence,
                mean_confidence=run.small and model.card.task == "segmentation",
            )
            for place, answer, image, size_hw in zip(
                places, answers, images, sizes_hw, strict=True
            ):
                item, name = batch[place], model.card.name
                if isinstance(answer, ImageError):
                    outcomes[place] = failed(item.source, answer)
                    continue
                blank = Outcome(
                    item.source.path, "ok", name, "", size_hw=size_hw, outputs=item.targets
                )
                try:
                    outcomes[place] = job.finish(answer, image, blank, model.card, small=run.small)
                except Exception as error:
                    outcomes[place] = failed(item.source, error)
        share_ms = (time.perf_counter() - start - waited) / max(1, len(places)) * 1e3
        return [
            outcome if outcome is before else replace(outcome, elapsed_ms=share_ms)
            for outcome, before in zip(outcomes, known, strict=True)
            # None is left only where nobody waits for it.
            if outcome is not None
        ]

    with closing(in_order(batches(), workers=run.workers, stopping=stop)) as settled:
        for outcomes in settled:
            # A device or a file that fails comes before what any image has to say.
            provider = model.provider
            for outcome in outcomes:
                yield replace(outcome, provider=provider)
                if outcome.error and run.fail_fast:
                    return


def _read(item: Item, run: RunOptions, card: ModelCard) -> tuple[_Image, tuple[int, int]]:
    if run.fast_decode:
        return read_reduced(item.source, run, card, item.data)
    image = read_image(item.source, run, item.data)
    return image, (image.shape[0], image.shape[1])
