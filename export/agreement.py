"""How far the answers of a graph at lower precision agree with those of the fp32 graph.

What rounding does to answers depends on the weights, so it is measured on pictures, from the file
to the class of each pixel, and a graph that agrees too little is refused.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from segcli import image_io, storage
from segcli.artifact import ModelCard
from segcli.errors import ExportError, ImageError, InferenceError, UsageError
from segcli.export.precision import Kind, rounding
from segcli.postprocess import against_nothing, argmax_class_map, scores
from segcli.preprocess import preprocess
from segcli.session import Session

# Measured on trained weights and a dozen photos each: fp16 0.9991 to 1, int8 0.9935 to 1. Of fewer
# than 50 classified images, all must keep their label.
BOUNDS: dict[Kind, float] = {"fp16": 0.995, "int8": 0.98}
# Measured in the same way: fp16 0.991 to 0.999, int8 0.99.
FEATURE_BOUNDS: dict[Kind, float] = {"fp16": 0.98, "int8": 0.95}

_HINTS: dict[Kind, str] = {
    "fp16": "leave --precision at fp32, or accept less with --min-agreement",
    "int8": "try --precision fp16, or accept less with --min-agreement",
}


def require_images(paths: Sequence[str], kind: Kind) -> None:
    """Raises UsageError where there is no image, or one cannot be read: before minutes of work."""
    _require_some(paths, kind)
    for path in paths:
        with _usable():
            image_io.decode_image(storage.read_bytes(path), path)


def _require_some(paths: Sequence[str], kind: Kind) -> None:
    if not paths:
        raise UsageError(f"precision {kind} needs images to compare its answers with those of fp32")


@contextlib.contextmanager
def _usable() -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise UsageError(f"an image to verify with: {error}", hint=error.hint) from error


def check(
    full: onnx.ModelProto,
    lowered: onnx.ModelProto,
    kind: Kind,
    card: ModelCard,
    paths: Sequence[str],
    bound: float | None = None,
) -> dict[str, Any]:
    """Returns how far both graphs' answers to images agree, from the file to the answer.

    Args:
        full: The fp32 graph.
        lowered: What ``precision.lower`` made of it.
        kind: What it computes in.
        card: Of either: task, preprocessing and activation are read.
        paths: Image files.
        bound: The least agreement to accept; None takes that of ``BOUNDS`` or, for features,
            ``FEATURE_BOUNDS``.

    Returns:
        ``kind``, ``agreement``, ``bound`` and ``images``, for the ModelCard. The agreement is the
        mean over the images: for segmentation of the share of pixels that have the same class,
        for classification of 1 where the best label is the same, for features of one less the
        relative difference. Segmentation and features have ``lowest``, that of the worst image;
        classification has ``max_score_diff``.

    Raises:
        ExportError: They agree less than ``bound``, or the graph gives no numbers.
        UsageError: There is no image, or one cannot be read.
    """
    _require_some(paths, kind)
    if bound is None:
        bound = (FEATURE_BOUNDS if card.task == "features" else BOUNDS)[kind]
    exact = Session(full.SerializeToString(), device="cpu")
    other = (
        Session(rounding(lowered).SerializeToString(), device="cpu", optimize=False)
        if kind == "fp16"
        else Session(lowered.SerializeToString(), device="cpu")
    )
    shares, differences = [], []
    for path in paths:
        with _usable():
            image = image_io.decode_image(storage.read_bytes(path), path)
            batch = preprocess(image, card.preprocessing)
        size_hw = (image.shape[0], image.shape[1])
        try:
            share, difference = _compare(other.run(batch), exact.run(batch), card, size_hw)
        except InferenceError as error:
            raise ExportError(
                f"the {kind} graph fails on {path!r}: {error}: nothing was written",
                hint=_HINTS[kind],
            ) from error
        shares.append(share)
        differences.append(difference)
    agreement = _floor(float(np.mean(shares)))
    report: dict[str, Any] = {
        "kind": kind,
        "agreement": agreement,
        "bound": bound,
        "images": len(shares),
    }
    if card.task == "classification":
        report["max_score_diff"] = float(f"{max(differences):.0e}")
    else:
        report["lowest"] = _floor(min(shares))
    if not agreement >= bound:
        raise ExportError(
            f"the {kind} graph agrees with fp32 by {agreement:g} on {len(shares)} "
            f"images, required is {bound:g}: nothing was written",
            hint=_HINTS[kind],
        )
    return report


def _compare(
    ours: list[npt.NDArray[Any]],
    exact: list[npt.NDArray[Any]],
    card: ModelCard,
    size_hw: tuple[int, int],
) -> tuple[float, float]:
    """Returns the agreement on one image, and the largest difference of scores or features."""
    if card.task == "features":
        pairs = zip(ours, exact, strict=True)
        with np.errstate(invalid="ignore", divide="ignore"):  # infinity less itself
            worst = float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))
        if not np.isfinite(worst):
            raise InferenceError("the model produced features that are not finite")
        return 1 - worst, worst
    if card.task == "segmentation":
        found, expected = (
            argmax_class_map(
                against_nothing(outputs[0][0], card.activation),
                size_hw,
                align_corners=card.align_corners,
            )
            for outputs in (ours, exact)
        )
        return float((found == expected).mean()), 0.0
    a, b = (scores(outputs[0][0], card.activation) for outputs in (ours, exact))
    return float(a.argmax() == b.argmax()), float(np.abs(a - b).max())


def _floor(share: float) -> float:
    # Never up: 1.0 has to mean every pixel. Rounded before, as 0.57 * 1e4 falls short of 5700.
    return float(np.floor(round(share * 1e4, 6)) / 1e4)
