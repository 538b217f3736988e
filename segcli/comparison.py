"""Two models on the same images: how far they agree, and which is faster.

What one asks before trusting an export in int8, or another's. Neither is the truth: agreement is
the same either way round, and so is the mean IoU.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from segcli.errors import ImageError, UsageError
from segcli.evaluate import confusion_matrix, iou_per_class, json_number, mean_iou, pixel_accuracy
from segcli.inputs import Source
from segcli.model import Answer, Model
from segcli.reading import RunOptions, read_image
from segcli.results import Classification, Segmentation


@dataclass(frozen=True)
class Comparison:
    """How far two models agree.

    Attributes:
        images: That both answered.
        agreement: Share of pixels with one class, or of images with one best label, in [0, 1].
        lowest: (path, share) of the image with the least; None for classifiers.
        miou: Mean IoU of the maps of one as the truth of the other's; None for classifiers.
        class_iou: (name, IoU) of each class that occurs; empty for classifiers.
        largest_difference: Of any score; None for segmentation.
        speed: Median time of a run of the first over that of the second: above 1 the second is
            faster. Of both on the same images, in turns.
    """

    images: int
    agreement: float
    lowest: tuple[str, float] | None
    miou: float | None
    class_iou: tuple[tuple[str, float], ...]
    largest_difference: float | None
    speed: float

    def to_dict(self) -> dict[str, Any]:
        """Returns it for JSON."""
        lowest = {"path": self.lowest[0], "agreement": self.lowest[1]} if self.lowest else None
        return {
            "schema": 1,
            "images": self.images,
            "agreement": self.agreement,
            "lowest": lowest,
            "miou": None if self.miou is None else json_number(self.miou),
            "class_iou": [{"name": name, "iou": iou} for name, iou in self.class_iou],
            "largest_difference": self.largest_difference,
            "speed": self.speed,
        }


def compare_models(
    first: Model,
    second: Model,
    sources: Iterable[Source],
    run: RunOptions,
    *,
    refuse: Callable[[ImageError], None],
    tell: Callable[[str], None],
) -> Comparison:
    """Returns how far two models agree on images.

    Args:
        first: A model.
        second: Of the same task and classes.
        sources: The images.
        run: Its limits and protocol.
        refuse: Is given the error of each image that one of them cannot answer for.
        tell: Is given a word on how far it has come.

    Raises:
        UsageError: The models are not of one kind, or there was no image to compare on.
    """
    names = first.card.class_names
    if (first.card.task, len(names)) != (second.card.task, len(second.card.class_names)):
        raise UsageError(
            f"{first.card.name!r} is for {first.card.task} with {len(names)} classes, "
            f"{second.card.name!r} for {second.card.task} with {len(second.card.class_names)}"
        )
    if first.card.task == "features":
        raise UsageError("features have no classes to agree on")
    confusion = np.zeros((len(names), len(names)), np.int64)
    shares: list[tuple[str, float]] = []
    differences = [0.0]
    seconds: tuple[list[float], list[float]] = ([], [])
    for source in sources:
        try:
            image = read_image(source, run)
            # The first run of a size is slower than the others.
            if not shares:
                first(image, protocol=run.protocol), second(image, protocol=run.protocol)
            answers: list[Answer] = []
            for model, times in zip((first, second), seconds, strict=True):
                start = time.perf_counter()
                answers.append(model(image, protocol=run.protocol))
                times.append(time.perf_counter() - start)
        except ImageError as error:
            refuse(error)
            continue
        a, b = answers
        if isinstance(a, Segmentation) and isinstance(b, Segmentation):
            counts = confusion_matrix(a.class_map, b.class_map, len(names), None)
            confusion += counts
            shares.append((source.path, pixel_accuracy(counts)))
        elif isinstance(a, Classification) and isinstance(b, Classification):
            theirs = {label.class_id: label.score for label in b.labels}
            differences += [abs(label.score - theirs[label.class_id]) for label in a.labels]
            same = a.labels[0].class_id == b.labels[0].class_id
            shares.append((source.path, float(same)))
        tell(f"{len(shares)} images")
    if not shares:
        raise UsageError("no image to compare on")
    segmentation = first.card.task == "segmentation"
    ious = zip(names, iou_per_class(confusion).tolist(), strict=True)
    return Comparison(
        images=len(shares),
        agreement=pixel_accuracy(confusion)
        if segmentation
        else sum(share for _, share in shares) / len(shares),
        lowest=min(shares, key=lambda one: one[1]) if segmentation else None,
        miou=mean_iou(confusion) if segmentation else None,
        class_iou=tuple((n, iou) for n, iou in ious if not np.isnan(iou)) if segmentation else (),
        largest_difference=None if segmentation else max(differences),
        speed=median(seconds[0]) / median(seconds[1]),
    )
