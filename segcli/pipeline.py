"""Sources -> Outcomes, in input order, with a bounded number under way.

Each worker takes its images through their whole life (read, decode, run, encode, write), so
decoding one overlaps with running another; ONNX Runtime, Pillow, zlib and file I/O release the GIL.
An image that fails is an Outcome like any other.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli import image_io, render, storage
from segcli.artifact import ModelCard
from segcli.atomic import sweep_parts
from segcli.encode import Style, draw_overlay, encode_output
from segcli.errors import ImageError, InferenceError, is_out_of_memory
from segcli.in_order import in_order
from segcli.inputs import Source
from segcli.model import Answer, MapSize, Model
from segcli.pooling import Pool, pool
from segcli.preprocess import resized_hw
from segcli.protocol import Protocol
from segcli.results import Classification, Features, Outcome, Segmentation
from segcli.thumbnail import small_picture
from segcli.writers import Claims, Format, OutputPlan, all_exist, claim_targets

# The antialiased resize to the model's size then still has something to average.
_MARGIN = 2

# What these show is not the image.
_WITHOUT_IMAGE = {Format.MASK, Format.COLOR, Format.NPY, Format.JSON, Format.CONFIDENCE}

_Image: TypeAlias = npt.NDArray[np.uint8]
# What is done with the answer for an image; given the Outcome to fill in.
_Work: TypeAlias = Callable[[Answer, _Image, Outcome], Outcome]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What applies to every image of a run.

    Attributes:
        workers: Threads that share the session.
        batch_size: Images that a worker takes at once. On an accelerator those of one size go
            through the network together; on the CPU that gains nothing (measured: MobileNetV2
            1.08 of the speed, SegFormer-B2 0.88), so there they still go one by one, and results
            cannot depend on it.
        max_pixels: Images with more are refused.
        allow_truncated: Takes an image that is cut short as far as it goes.
        fail_fast: Stops after the first image that failed.
        protocol: How the model is shown each image.
        small: Gives each Outcome what a report shows of its image.
        fast_decode: Decodes a JPEG at a fraction of its size, to at least ``_MARGIN`` times what
            the model sees, where no output shows the image.
    """

    workers: int = 1
    batch_size: int = 1
    max_pixels: int = image_io.DEFAULT_MAX_PIXELS
    allow_truncated: bool = False
    fail_fast: bool = False
    protocol: Protocol = field(default_factory=Protocol)
    small: bool = False
    fast_decode: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """What ``segment`` writes.

    Attributes:
        plan: Names the outputs.
        style: What they show.
        map_size: Height and width of the class map, ``logits`` for that of the logits, None for
            the image's own.
        preview_columns: Width of the overlay that an Outcome carries for a terminal, 0 for none.
        skip_existing: Leaves an image whose outputs are all there.
        no_clobber: Makes an existing output that image's error.
        is_there: Tells whether an output exists.
    """

    plan: OutputPlan
    style: Style = field(default_factory=Style)
    map_size: MapSize | None = None
    preview_columns: int = 0
    skip_existing: bool = False
    no_clobber: bool = False
    is_there: Callable[[str], bool] = storage.exists


class _Ask(NamedTuple):
    """What a segmentation is asked for beside its class map at the image's size."""

    map_size: MapSize | None
    confidence: bool


class _Item(NamedTuple):
    """A source, what is to be done with it or has become of it, and its bytes if they are read."""

    source: Source
    work: _Work | Outcome
    data: bytes | None


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
    to_stdout = options.plan.kind == "stdout"

    def prepare(source: Source) -> _Work | Outcome:
        # In order and before any work: who writes a file is not decided by who is faster.
        targets = claim_targets(
            source,
            options.plan,
            claims,
            no_clobber=options.no_clobber,
            is_there=options.is_there,
        )
        if not to_stdout:
            for folder in {os.path.dirname(t) for t in targets} - swept:  # noqa: PTH120
                sweep_parts(folder)
                swept.add(folder)
            if options.skip_existing and all_exist(targets, options.is_there):
                return Outcome(
                    source.path, "skipped", model.card.name, "", outputs=targets, elapsed_ms=0.0
                )

        def work(answer: Answer, image: _Image, blank: Outcome) -> Outcome:
            assert isinstance(answer, Segmentation)
            for format_, target in zip(options.plan.formats, targets, strict=True):
                data = encode_output(answer, format_, target, model.card, options.style)
                if to_stdout:
                    write_stdout(data)
                else:
                    storage.write_whole(target, data, replace=not options.no_clobber)
            visible = options.style.visible
            shown = [c for c in answer.classes if visible is None or c.class_id in visible]
            preview = None
            if options.preview_columns:
                preview = render.shrink(
                    draw_overlay(answer, options.style), options.preview_columns
                )
            small = None
            if run.small:
                small = small_picture(image, answer.class_map, confidence=answer.mean_confidence)
            return replace(blank, outputs=targets, classes=shown, preview=preview, small=small)

        return work

    if options.preview_columns or not _WITHOUT_IMAGE.issuperset(options.plan.formats):
        # It shows the image itself.
        run = replace(run, fast_decode=False)
    ask = _Ask(options.map_size, confidence=Format.CONFIDENCE in options.plan.formats)
    return _run(sources, model, prepare, run, stdin, ask)


def classify_images(
    sources: Iterable[Source], model: Model, k: int, run: RunOptions, *, stdin: BinaryIO
) -> Iterator[Outcome]:
    """Yields one Outcome per source, in order, with its ``k`` best labels."""

    def work(answer: Answer, image: _Image, blank: Outcome) -> Outcome:
        assert isinstance(answer, Classification)
        small = small_picture(image) if run.small else None
        return replace(blank, labels=answer.labels[:k], small=small)

    return _run(sources, model, lambda source: work, run, stdin)


def embed_images(
    sources: Iterable[Source],
    model: Model,
    layer: str,
    how: Pool,
    run: RunOptions,
    *,
    stdin: BinaryIO,
) -> Iterator[Outcome]:
    """Yields one Outcome per source, in order, with its features.

    Args:
        sources: The inputs; taken only as fast as they are worked on.
        model: A network without a head.
        layer: One of its outputs.
        how: How that is pooled.
        run: How to run.
        stdin: Read for the source ``-``.
    """

    def work(answer: Answer, image: _Image, blank: Outcome) -> Outcome:
        assert isinstance(answer, Features)
        return replace(blank, embedding=pool(answer.outputs[layer], how))

    return _run(sources, model, lambda source: work, run, stdin)


def _run(
    sources: Iterable[Source],
    model: Model,
    prepare: Callable[[Source], _Work | Outcome],
    run: RunOptions,
    stdin: BinaryIO,
    ask: "_Ask | None" = None,
) -> Iterator[Outcome]:
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

    def items() -> Iterator[_Item]:
        for source in sources:
            data = None
            try:
                work = prepare(source)
                if source.origin == "stdin":
                    # Here, as a worker that waits for a writer could not be interrupted.
                    data = stdin.read()
            except ImageError as error:
                work = failed(source, error)
            yield _Item(source, work, data)

    def jobs() -> Iterator[Callable[[], list[Outcome]]]:
        each = items()
        while batch := list(islice(each, run.batch_size)):
            yield partial(attempt, batch)

    def attempt(batch: list[_Item]) -> list[Outcome]:
        start = time.perf_counter()
        outcomes = [item.work if isinstance(item.work, Outcome) else None for item in batch]
        images: list[_Image] = []
        sizes_hw: list[tuple[int, int]] = []
        places: list[int] = []
        for place, item in enumerate(batch):
            if outcomes[place] is not None:
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
                [(ask and ask.map_size) or size_hw for size_hw in sizes_hw],
                run.protocol,
                confidence=bool(ask and ask.confidence),
                mean_confidence=bool(ask and run.small),
            )
            for place, answer, image, size_hw in zip(
                places, answers, images, sizes_hw, strict=True
            ):
                source, work, _ = batch[place]
                blank = Outcome(source.path, "ok", model.card.name, "", size_hw=size_hw)
                if isinstance(answer, ImageError):
                    outcomes[place] = failed(source, answer)
                    continue
                assert not isinstance(work, Outcome)
                try:
                    outcomes[place] = work(answer, image, blank)
                except Exception as error:
                    outcomes[place] = failed(source, error)
        share_ms = (time.perf_counter() - start - waited) / max(1, len(places)) * 1e3
        return [
            outcome if outcome is item.work else replace(outcome, elapsed_ms=share_ms)
            for item, outcome in zip(batch, outcomes, strict=True)
            # None is left only where nobody waits for it.
            if outcome is not None
        ]

    with closing(in_order(jobs(), workers=run.workers, stopping=stop)) as settled:
        for outcomes in settled:
            # A device or a file that fails comes before what any image has to say.
            provider = model.provider
            for outcome in outcomes:
                yield replace(outcome, provider=provider)
                if outcome.error and run.fail_fast:
                    return


def read_image(source: Source, run: RunOptions, data: bytes | None = None) -> _Image:
    """Returns a source's image, (H, W, 3) uint8 RGB.

    Args:
        source: A file, or what ``data`` came from.
        run: How to run.
        data: Its bytes where they have been read.

    Raises:
        ImageError: It cannot be read or decoded.
    """
    data = storage.read_bytes(source.path) if data is None else data
    return image_io.decode_image(
        data, source.path, max_pixels=run.max_pixels, allow_truncated=run.allow_truncated
    )


def read_reduced(
    source: Source, run: RunOptions, card: ModelCard, data: bytes | None = None
) -> tuple[_Image, tuple[int, int]]:
    """Returns a source's image, as small as suffices for a model, and its whole height and width.

    Args:
        source: A file, or what ``data`` came from.
        run: How to run.
        card: Of the model.
        data: Its bytes where they have been read.

    Raises:
        ImageError: It cannot be read or decoded.
    """

    def needed_hw(whole_hw: tuple[int, int]) -> tuple[int, int]:
        largest = max(run.protocol.scales)
        spec = run.protocol.preprocessing(whole_hw, card.preprocessing, largest)
        height, width = resized_hw(whole_hw, spec)
        return _MARGIN * height, _MARGIN * width

    data = storage.read_bytes(source.path) if data is None else data
    return image_io.decode_reduced(
        data,
        source.path,
        needed_hw,
        max_pixels=run.max_pixels,
        allow_truncated=run.allow_truncated,
    )


def _read(item: _Item, run: RunOptions, card: ModelCard) -> tuple[_Image, tuple[int, int]]:
    if run.fast_decode:
        return read_reduced(item.source, run, card, item.data)
    image = read_image(item.source, run, item.data)
    return image, (image.shape[0], image.shape[1])


def image_error(source: Source, reason: Exception) -> ImageError:
    """Returns the error of an image, which names its file; raises what is no image's fault."""
    if not isinstance(reason, ImageError):
        if not is_out_of_memory(reason):
            raise reason
        reason = InferenceError("not enough memory", hint="fewer --workers need less at once")
    if repr(source.path) in str(reason):
        return reason
    return type(reason)(f"{source.path!r}: {reason}", hint=reason.hint)
