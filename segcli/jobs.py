"""What a command wants of every image: the files to claim before, the work once there is an answer.

A job is plain data (but for where ``-o -`` goes) that another process can be given. What it does
before the work runs in one place and in the order of the inputs; what it does after runs wherever
the answer is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli import render, storage
from segcli.artifact import ModelCard
from segcli.claims import Claims, claim_targets
from segcli.encode import Style, draw_overlay, encode_output
from segcli.formats import Format
from segcli.inputs import Source
from segcli.model import Answer, MapSize
from segcli.pooling import Pool, pool
from segcli.results import Classification, Features, Outcome, Segmentation
from segcli.thumbnail import small_picture
from segcli.writers import (
    OutputPlan,
    all_exist,
    refuse_existing,
    refuse_pictures,
)

# What these show is not the image.
_WITHOUT_IMAGE = {Format.MASK, Format.COLOR, Format.NPY, Format.JSON, Format.CONFIDENCE}

_Image: TypeAlias = npt.NDArray[np.uint8]


class Job(Protocol):
    """What is wanted of every image of a run."""

    @property
    def map_size(self) -> MapSize | None:
        """Height and width of class maps, ``logits``, or None for each image's own."""

    @property
    def confidence(self) -> bool:
        """Whether a segmentation is asked how sure it is of every pixel."""

    @property
    def shows_image(self) -> bool:
        """Whether an output shows the image itself, which is then read as it is."""

    def claim(self, source: Source, claims: Claims) -> tuple[str, ...]:
        """Returns the files that an image will be written to; called in the order of the inputs.

        Raises:
            ImageError: It cannot have them.
        """

    def is_done(self, targets: tuple[str, ...]) -> bool:
        """Tells whether an image is to be left because its files are there.

        Raises:
            ImageError: One is there and may not be replaced.
        """

    def again(self) -> "Job":
        """Returns the job for images whose worker died: it may have written files of theirs."""

    def finish(
        self, answer: Answer, image: _Image, blank: Outcome, card: ModelCard, *, small: bool
    ) -> Outcome:
        """Returns an image's Outcome, its files written.

        Args:
            answer: What the model says.
            image: (H, W, 3) uint8 RGB, as it was read.
            blank: The Outcome to fill in; its ``outputs`` are the files to write.
            card: Of the model.
            small: Adds what a report shows of the image.

        Raises:
            ImageError: A file cannot be encoded or written.
        """


@dataclass(frozen=True, kw_only=True)
class SegmentJob:
    """Class maps, in files.

    Attributes:
        plan: Names the outputs.
        style: What they show.
        map_size: Height and width of the class map, ``logits`` for that of the logits, None for
            the image's own.
        preview_columns: Width of the overlay that an Outcome carries for a terminal, 0 for none.
        skip_existing: Leaves an image whose outputs are all there.
        no_clobber: Makes an existing output that image's error.
        keep_pictures: Makes an output that is somebody else's image an error, too.
        is_again: Takes an existing output with the very bytes that would be written for its own.
        write_stdout: Takes the bytes of ``-o -``.
    """

    plan: OutputPlan
    style: Style = field(default_factory=Style)
    map_size: MapSize | None = None
    preview_columns: int = 0
    skip_existing: bool = False
    no_clobber: bool = False
    keep_pictures: bool = False
    is_again: bool = False
    write_stdout: Callable[[bytes], object] | None = None

    @property
    def confidence(self) -> bool:
        """Whether a file shows how sure the model is."""
        return Format.CONFIDENCE in self.plan.formats

    @property
    def shows_image(self) -> bool:
        """Whether a file, or the preview, shows the image."""
        return bool(self.preview_columns) or not _WITHOUT_IMAGE.issuperset(self.plan.formats)

    def claim(self, source: Source, claims: Claims) -> tuple[str, ...]:
        """Returns one path per format, which from then on are this image's own."""
        return claim_targets(source, self.plan, claims)

    def is_done(self, targets: tuple[str, ...]) -> bool:
        """Tells whether ``skip_existing`` leaves an image; raises where it may not be written."""
        if self.plan.kind == "stdout":
            return False
        if self.no_clobber and not self.is_again:
            # Before the work; whoever writes asks again, for what came meanwhile.
            refuse_existing(targets)
        is_done = self.skip_existing and all_exist(targets)
        if self.keep_pictures and not is_done:
            refuse_pictures(targets)
        return is_done

    def again(self) -> "SegmentJob":
        """Returns the job that goes on where a worker may have got to."""
        return replace(self, is_again=True)

    def finish(
        self, answer: Answer, image: _Image, blank: Outcome, card: ModelCard, *, small: bool
    ) -> Outcome:
        """Returns the Outcome with its classes, the files written."""
        assert isinstance(answer, Segmentation)
        outputs: Iterable[tuple[str, bytes]] = (
            (target, encode_output(answer, format_, target, card, self.style))
            for format_, target in zip(self.plan.formats, blank.outputs, strict=True)
        )
        if self.no_clobber and self.is_again:
            # One that is somebody else's is told before any is written.
            outputs = [output for output in outputs if not _is_written(*output)]
        for target, data in outputs:
            if self.write_stdout is not None and self.plan.kind == "stdout":
                self.write_stdout(data)
            else:
                storage.write_whole(target, data, replace=not self.no_clobber)
        visible = self.style.visible
        preview = None
        if self.preview_columns:
            preview = render.shrink(draw_overlay(answer, self.style), self.preview_columns)
        return replace(
            blank,
            classes=[c for c in answer.classes if visible is None or c.class_id in visible],
            preview=preview,
            small=small_picture(image, answer.class_map, confidence=answer.mean_confidence)
            if small
            else None,
        )


def _is_written(target: str, data: bytes) -> bool:
    if storage.read_start(target, len(data) + 1) == data:
        return True
    refuse_existing([target])
    return False


class _NoFiles:
    """What jobs share that give records only."""

    map_size: MapSize | None = None
    confidence = False
    shows_image = False

    def claim(self, source: Source, claims: Claims) -> tuple[str, ...]:
        """Returns nothing: there is no file to own."""
        return ()

    def is_done(self, targets: tuple[str, ...]) -> bool:
        """Tells that there is always something to do."""
        return False

    def again(self) -> Self:
        """Returns the job: nothing of it is left behind."""
        return self


@dataclass(frozen=True)
class ClassifyJob(_NoFiles):
    """The best labels.

    Attributes:
        k: How many.
    """

    k: int

    def finish(
        self, answer: Answer, image: _Image, blank: Outcome, card: ModelCard, *, small: bool
    ) -> Outcome:
        """Returns the Outcome with its labels."""
        assert isinstance(answer, Classification)
        shown = small_picture(image) if small else None
        return replace(blank, labels=answer.labels[: self.k], small=shown)


@dataclass(frozen=True)
class EmbedJob(_NoFiles):
    """Features of one layer.

    Attributes:
        layer: An output of the network.
        how: How it is pooled.
    """

    layer: str
    how: Pool

    def finish(
        self, answer: Answer, image: _Image, blank: Outcome, card: ModelCard, *, small: bool
    ) -> Outcome:
        """Returns the Outcome with its features."""
        assert isinstance(answer, Features)
        return replace(blank, embedding=pool(answer.outputs[self.layer], self.how))
