"""Sources -> Outcomes, in input order, with a bounded number under way.

Each worker takes its images through their whole life (read, decode, run, encode, write), so
decoding one overlaps with running another; ONNX Runtime, Pillow, zlib and file I/O release the GIL.
An image that fails is an Outcome like any other.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from segcli.claims import Claims
from segcli.errors import ImageError
from segcli.in_order import in_order
from segcli.inputs import Source
from segcli.jobs import Job
from segcli.model import Model
from segcli.reading import RunOptions, image_error, read_image, read_reduced
from segcli.results import Outcome
from segcli.urls import is_url
from segcli.writers import STDOUT

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
    # Set when the model is there, or is no longer waited for.
    go_on = threading.Event()
    stopped = threading.Event()
    model.when_ready(go_on.set)

    def stop() -> None:
        stopped.set()
        go_on.set()

    def until_ready() -> bool:
        go_on.wait()
        return not stopped.is_set()

    items = take(sources, job, claims or Claims(), stdin)
    works = (
        partial(attempt, batch, model, job, run, until_ready=until_ready)
        for batch in batches(items, run.batch_size)
    )
    with closing(in_order(works, workers=run.workers, stopping=stop)) as settled:
        for outcomes in settled:
            # A device or a file that fails comes before what any image has to say.
            provider = model.provider
            for outcome in outcomes:
                yield replace(outcome, provider=provider)
                if outcome.error and run.fail_fast:
                    return


def take(sources: Iterable[Source], job: Job, claims: Claims, stdin: BinaryIO) -> Iterator[Item]:
    """Yields sources with what has to be settled in their order and in one place.

    Who writes a file is not decided by who is faster. Folders that will be written to are swept of
    what a killed run left there.
    """
    swept: set[Path] = set()
    for source in sources:
        try:
            targets = job.claim(source, claims)
            for folder in folders_of(targets) - swept:
                sweep_parts(str(folder))
                swept.add(folder)
            # Here, as a worker that waits for a writer could not be interrupted.
            data = stdin.read() if source.origin == "stdin" else None
        except ImageError as error:
            yield Item(source, error=error)
        else:
            yield Item(source, targets, data=data)


def folders_of(targets: Iterable[str]) -> set[Path]:
    """Returns the folders of this machine that files are written to."""
    return {Path(target).parent for target in targets if target != STDOUT and not is_url(target)}


def attempt(
    batch: Sequence[Item],
    model: Model,
    job: Job,
    run: RunOptions,
    *,
    until_ready: Callable[[], bool] = lambda: True,
) -> list[Outcome]:
    """Returns the Outcomes of items that a worker takes at once, their files written.

    Args:
        batch: The items.
        model: For the job's task; its provider is not filled in, as nothing may have asked it yet.
        job: What is wanted of each.
        run: How to run.
        until_ready: Called when the images are decoded; False means that nobody waits for them
            any more, and those that would need the model are left out.

    Raises:
        SegcliError: What is no image's own fault.
    """
    start = time.perf_counter()
    known = [_known(item, model, job) for item in batch]
    outcomes = list(known)
    images: list[_Image] = []
    sizes_hw: list[tuple[int, int]] = []
    places: list[int] = []
    for place, item in enumerate(batch):
        if known[place] is not None:
            continue
        try:
            image, size_hw = _read(item, run, model.card, whole=job.shows_image)
        except Exception as error:
            outcomes[place] = _failed(item.source, error, model)
            continue
        images.append(image)
        sizes_hw.append(size_hw)
        places.append(place)
    # The first images are decoded while the session is being built; that is not theirs.
    decoded = time.perf_counter()
    is_wanted = until_ready()
    waited = time.perf_counter() - decoded
    if is_wanted:
        answers = model.answer(
            images,
            [job.map_size or size_hw for size_hw in sizes_hw],
            run.protocol,
            confidence=job.confidence,
            mean_confidence=run.small and model.card.task == "segmentation",
        )
        for place, answer, image, size_hw in zip(places, answers, images, sizes_hw, strict=True):
            source, targets = batch[place].source, batch[place].targets
            if isinstance(answer, ImageError):
                outcomes[place] = _failed(source, answer, model)
                continue
            name = model.card.name
            blank = Outcome(source.path, "ok", name, "", size_hw=size_hw, outputs=targets)
            try:
                outcomes[place] = job.finish(answer, image, blank, model.card, small=run.small)
            except Exception as error:
                outcomes[place] = _failed(source, error, model)
    share_ms = (time.perf_counter() - start - waited) / max(1, len(places)) * 1e3
    return [
        outcome if outcome is before else replace(outcome, elapsed_ms=share_ms)
        for outcome, before in zip(outcomes, known, strict=True)
        if outcome is not None
    ]


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields items that are worked on at once, no more than ``size``."""
    each = iter(items)
    while batch := list(islice(each, size)):
        yield batch


def _known(item: Item, model: Model, job: Job) -> Outcome | None:
    """Returns the Outcome of an item that needs no look at its image."""
    try:
        if item.error is not None:
            raise item.error
        if not job.is_done(item.targets):
            return None
    except ImageError as error:
        return _failed(item.source, error, model)
    path, name = item.source.path, model.card.name
    return Outcome(path, "skipped", name, "", outputs=item.targets, elapsed_ms=0.0)


def _failed(source: Source, reason: Exception, model: Model) -> Outcome:
    error = image_error(source, reason)
    return Outcome(source.path, "error", model.card.name, "", error=error, elapsed_ms=0.0)


def _read(
    item: Item, run: RunOptions, card: ModelCard, *, whole: bool
) -> tuple[_Image, tuple[int, int]]:
    if run.fast_decode and not whole:
        return read_reduced(item.source, run, card, item.data)
    image = read_image(item.source, run, item.data)
    return image, (image.shape[0], image.shape[1])
