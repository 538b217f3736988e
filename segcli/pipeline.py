"""Sources -> Outcomes, in input order, with a bounded number under way.

Each worker takes one image through its whole life (read, decode, run, encode, write), so decoding
one overlaps with running another; ONNX Runtime, Pillow, zlib and file I/O release the GIL. An image
that fails is an Outcome like any other.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli import image_io, render
from segcli.artifact import ModelCard
from segcli.atomic import sweep_parts, write_atomic
from segcli.errors import ImageError, ImageMissing
from segcli.inputs import Source
from segcli.model import Model
from segcli.preprocess import resized_hw
from segcli.results import Classification, Outcome, Segmentation
from segcli.writers import Claims, Format, OutputPlan, all_exist, refuse_existing

# The antialiased resize to the model's size then still has something to average.
_MARGIN = 2

_Image: TypeAlias = npt.NDArray[np.uint8]
# What is done with a decoded image of this height and width; given the Outcome to fill in.
_Work: TypeAlias = Callable[[_Image, tuple[int, int], Outcome], Outcome]

# Enough that no worker waits for the head of the line, little enough that memory stays flat.
_QUEUED_PER_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What applies to every image of a run.

    Attributes:
        workers: Threads that share the session.
        max_pixels: Images with more are refused.
        fail_fast: Stops after the first image that failed.
        fast_decode: Decodes a JPEG at a fraction of its size, to at least ``_MARGIN`` times what
            the model sees, where no output shows the image.
    """

    workers: int = 1
    max_pixels: int = image_io.DEFAULT_MAX_PIXELS
    fail_fast: bool = False
    fast_decode: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """What ``segment`` writes.

    Attributes:
        plan: Names the outputs.
        opacity: Share of the class colour in an overlay, in [0, 1].
        visible: The class ids to keep, None for all.
        legend: Adds names, colours and shares to ``color`` and ``overlay``.
        skip_existing: Leaves an image whose outputs are all there.
        no_clobber: Makes an existing output that image's error.
    """

    plan: OutputPlan
    opacity: float = 0.5
    visible: frozenset[int] | None = None
    legend: bool = False
    skip_existing: bool = False
    no_clobber: bool = False


def segment_images(
    sources: Iterable[Source],
    model: Model,
    claims: Claims,
    options: SegmentOptions,
    run: RunOptions,
    *,
    stdin: BinaryIO,
    write_stdout: Callable[[bytes], object],
) -> Iterator[Outcome]:
    """Yields one Outcome per source, in order, its files written.

    Args:
        sources: The inputs; taken only as fast as they are worked on.
        model: A segmentation model.
        claims: Which input writes which file.
        options: What to write.
        run: How to run.
        stdin: Read for the source ``-``.
        write_stdout: Takes the bytes of ``-o -``.
    """
    swept: set[str] = set()

    def prepare(source: Source) -> _Work | Outcome:
        # In order and before any work: who writes a file is not decided by who is faster.
        if not source.path or "\0" in source.path:
            raise ImageMissing(f"an entry of the list is no file name: {source.path!r}")
        targets = options.plan.targets(source)
        to_stdout = options.plan.kind == "stdout"
        if not to_stdout:
            claims.claim(source, targets)
            if options.skip_existing and all_exist(targets):
                return Outcome(
                    source.path, "skipped", model.card.name, "", outputs=targets, elapsed_ms=0.0
                )
            if options.no_clobber:
                # Before the work; write_atomic asks again, for what came meanwhile.
                refuse_existing(targets)

            for folder in {os.path.dirname(t) for t in targets} - swept:  # noqa: PTH120
                sweep_parts(folder)
                swept.add(folder)

        def work(image: _Image, size_hw: tuple[int, int], blank: Outcome) -> Outcome:
            result = model(image, size_hw=size_hw)
            assert isinstance(result, Segmentation)
            for format_, target in zip(options.plan.formats, targets, strict=True):
                data = encode_output(result, format_, target, model, options)
                if to_stdout:
                    write_stdout(data)
                else:
                    write_atomic(target, data, replace=not options.no_clobber)
            shown = result.classes
            if options.visible is not None:
                shown = [c for c in shown if c.class_id in options.visible]
            return replace(blank, outputs=targets, size_hw=size_hw, classes=shown)

        return work

    if Format.OVERLAY in options.plan.formats:
        # It shows the image itself.
        run = replace(run, fast_decode=False)
    return _run(sources, model, prepare, run, stdin)


def classify_images(
    sources: Iterable[Source], model: Model, k: int, run: RunOptions, *, stdin: BinaryIO
) -> Iterator[Outcome]:
    """Yields one Outcome per source, in order, with its ``k`` best labels."""

    def work(image: _Image, size_hw: tuple[int, int], blank: Outcome) -> Outcome:
        result = model(image)
        assert isinstance(result, Classification)
        return replace(blank, labels=result.labels[:k], size_hw=size_hw)

    return _run(sources, model, lambda source: work, run, stdin)


def _run(
    sources: Iterable[Source],
    model: Model,
    prepare: Callable[[Source], _Work | Outcome],
    run: RunOptions,
    stdin: BinaryIO,
) -> Iterator[Outcome]:
    stopping = threading.Event()

    def failed(source: Source, error: ImageError) -> Outcome:
        return Outcome(source.path, "error", model.card.name, "", error=error)

    def attempt(source: Source, work: _Work) -> Outcome:
        start = time.perf_counter()
        waited = 0.0
        try:
            if run.fast_decode:
                image, size_hw = read_reduced(source, run.max_pixels, stdin, model.card)
            else:
                image = read_image(source, run.max_pixels, stdin)
                size_hw = (image.shape[0], image.shape[1])
            decoded = time.perf_counter()
            # The first images are decoded while the session is being built; that is not theirs.
            provider = model.provider
            waited = time.perf_counter() - decoded
            if stopping.is_set():
                # Interrupted while the model was loading: nobody waits for this Outcome.
                return failed(source, ImageError("interrupted"))
            outcome = work(image, size_hw, Outcome(source.path, "ok", model.card.name, provider))
        except ImageError as error:
            outcome = failed(source, error)
        return replace(outcome, elapsed_ms=(time.perf_counter() - start - waited) * 1e3)

    def settled(item: Future[Outcome] | Outcome) -> Outcome:
        # A device or a file that fails comes before what any image has to say.
        provider = model.provider
        outcome = item if isinstance(item, Outcome) else item.result()
        return replace(outcome, provider=provider)

    with ThreadPoolExecutor(run.workers, thread_name_prefix="segcli") as pool:
        queue: deque[Future[Outcome] | Outcome] = deque()
        try:
            for source in sources:
                try:
                    work = prepare(source)
                except ImageError as error:
                    work = failed(source, error)
                if isinstance(work, Outcome):
                    queue.append(work)
                else:
                    queue.append(pool.submit(attempt, source, work))
                if len(queue) > run.workers * _QUEUED_PER_WORKER:
                    outcome = settled(queue.popleft())
                    yield outcome
                    if outcome.error and run.fail_fast:
                        return
            while queue:
                outcome = settled(queue.popleft())
                yield outcome
                if outcome.error and run.fail_fast:
                    return
        finally:
            stopping.set()
            # On an error, a closed generator or Ctrl-C: what has not begun does not begin.
            pool.shutdown(wait=True, cancel_futures=True)


def read_image(source: Source, max_pixels: int, stdin: BinaryIO) -> npt.NDArray[np.uint8]:
    """Returns a source's image, (H, W, 3) uint8 RGB.

    Args:
        source: A file, or ``-``.
        max_pixels: Images with more are refused.
        stdin: Read for the source ``-``.

    Raises:
        ImageError: It cannot be read or decoded.
    """
    return image_io.decode_image(_read_bytes(source, stdin), source.path, max_pixels=max_pixels)


def read_reduced(
    source: Source, max_pixels: int, stdin: BinaryIO, card: ModelCard
) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Returns a source's image, as small as suffices for a model, and its whole height and width.

    Args:
        source: A file, or ``-``.
        max_pixels: Images with more are refused.
        stdin: Read for the source ``-``.
        card: Of the model.

    Raises:
        ImageError: It cannot be read or decoded.
    """

    def needed_hw(whole_hw: tuple[int, int]) -> tuple[int, int]:
        height, width = resized_hw(whole_hw, card.preprocessing)
        return _MARGIN * height, _MARGIN * width

    data = _read_bytes(source, stdin)
    return image_io.decode_reduced(data, source.path, needed_hw, max_pixels=max_pixels)


def _read_bytes(source: Source, stdin: BinaryIO) -> bytes:
    return stdin.read() if source.origin == "stdin" else image_io.read_bytes(source.path)


def encode_output(
    result: Segmentation, format_: Format, target: str, model: Model, options: SegmentOptions
) -> bytes:
    """Returns the bytes of one output file.

    Args:
        result: What the model said of the image.
        format_: What to make of it.
        target: The file's name; its suffix chooses how an overlay is encoded.
        model: Named in the file.
        options: What to show of it.
    """
    text = {"Model": model.card.name, "Weights": model.card.weights_sha256}
    if format_ is Format.MASK:
        return _encode_mask(result, options.visible, text)
    if format_ is Format.COLOR:
        picture = render.colorize(result.class_map, result.palette, options.visible)
    else:
        picture = render.overlay(
            result.image, result.class_map, result.palette, options.opacity, options.visible
        )
    if options.legend:
        picture = render.with_legend(picture, _legend(result, options.visible))
    if format_ is Format.COLOR or Path(target).suffix.lower() == ".png":
        return image_io.encode_png_rgb(picture, text)
    return image_io.encode_jpeg(picture)


def _encode_mask(
    result: Segmentation, visible: frozenset[int] | None, text: dict[str, str]
) -> bytes:
    class_map = result.class_map
    if visible is not None:
        # 255 is the field's value for void; above 255 classes the type's own largest.
        fill = 255 if len(result.class_names) <= 255 else int(np.iinfo(np.uint16).max)
        if fill > 255:
            class_map = class_map.astype(np.uint16)
        class_map = render.keep_classes(class_map, visible, fill)
    if class_map.dtype == np.uint8:
        return image_io.encode_palette_png(class_map.astype(np.uint8), result.palette, text)
    return image_io.encode_gray16_png(class_map.astype(np.uint16), text)


def _legend(result: Segmentation, visible: frozenset[int] | None) -> npt.NDArray[np.uint8]:
    entries: Sequence[tuple[str, tuple[int, int, int], float | None]] = [
        (c.name, tuple(result.palette[c.class_id].tolist()), c.fraction)
        for c in result.classes
        if visible is None or c.class_id in visible
    ]
    return render.legend(entries, result.class_map.shape[0])
