"""How the images of a run are read, and how what fails is told of each."""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from segcli import image_io, storage
from segcli.artifact import ModelCard
from segcli.errors import ImageError, InferenceError, is_out_of_memory
from segcli.inputs import Source
from segcli.preprocess import resized_hw
from segcli.protocol import Protocol

# The antialiased resize to the model's size then still has something to average.
_MARGIN = 2

_Image: TypeAlias = npt.NDArray[np.uint8]


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


def image_error(source: Source, reason: Exception) -> ImageError:
    """Returns the error of an image, which names its file; raises what is no image's fault."""
    if not isinstance(reason, ImageError):
        if not is_out_of_memory(reason):
            raise reason
        reason = InferenceError("not enough memory", hint="fewer --workers need less at once")
    if repr(source.path) in str(reason):
        return reason
    return type(reason)(f"{source.path!r}: {reason}", hint=reason.hint)
