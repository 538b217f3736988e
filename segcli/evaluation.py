"""Images with their truth -> what the model made of each, in order: the work of ``segcli eval``."""

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from segcli.class_truth import ClassIds, LabelledImage
from segcli.cross_entropy import class_map_and_loss
from segcli.datasets import Dataset, Sample
from segcli.errors import ImageError, TruthError
from segcli.eval_state import Figures
from segcli.evaluate import (
    Confusion,
    confusion_matrix,
    json_number,
    mean_iou,
    pixel_accuracy,
    true_rank,
)
from segcli.in_order import in_order
from segcli.model import Model
from segcli.reading import RunOptions, image_error, read_image
from segcli.results import Classification, ClassMap, Segmentation, SmallPicture
from segcli.thumbnail import small_picture


class Judged(NamedTuple):
    """What became of one image.

    Attributes:
        path: Of the image, as given.
        figures: By the names in ``eval_state.COLUMNS``, or why there are none.
        confusion: Of a segmentation.
        rank: Place of the true class, for a classifier.
        loss_sum: In nats, over the pixels that count; 0 where it is not asked for.
        small: What a report shows of the image.
    """

    path: str
    figures: Figures | ImageError
    confusion: Confusion | None = None
    rank: int | None = None
    loss_sum: float = 0.0
    small: SmallPicture | None = None


def judge_segmentation(
    samples: Iterable[Sample],
    model: Model,
    dataset: Dataset,
    run: RunOptions,
    *,
    ignore_index: int,
    loss: bool,
) -> Generator[Judged, None, None]:
    """Yields each image's figures; its class map is made at the size of the truth.

    Args:
        samples: Images with their truth.
        model: For segmentation.
        dataset: Reads the truth.
        run: How to run.
        ignore_index: True value of pixels that do not count.
        loss: Computes the cross-entropy, too.
    """
    num_classes = len(model.card.class_names)

    def judge(sample: Sample) -> Judged:
        if isinstance(sample.truth, TruthError):
            raise sample.truth
        truth = dataset.read(sample.truth, max_pixels=run.max_pixels)
        image = read_image(sample.source, run)
        size_hw, loss_sum = (truth.shape[0], truth.shape[1]), 0.0
        if loss:
            field = model.field(image, size_hw, run.protocol)
            found, loss_sum = class_map_and_loss(field, truth, ignore_index=ignore_index)
        else:
            answer = model(image, size_hw=size_hw, protocol=run.protocol)
            assert isinstance(answer, Segmentation)
            found = answer.class_map
        try:
            confusion = confusion_matrix(truth, found, num_classes, ignore_index)
        except TruthError as error:
            raise TruthError(f"{sample.truth!r}: {error}", hint=error.hint) from error
        pixels = int(confusion.sum())
        figures = {
            "pixels": pixels,
            "miou": json_number(mean_iou(confusion)),
            "pixel_accuracy": json_number(pixel_accuracy(confusion)),
            "loss": loss_sum / pixels if loss and pixels else None,
        }
        small = small_picture(image, found, _shown(truth, ignore_index)) if run.small else None
        return Judged(sample.source.path, figures, confusion, loss_sum=loss_sum, small=small)

    return _judged(samples, judge, run)


def judge_classification(
    images: Iterable[LabelledImage], model: Model, ids: ClassIds, run: RunOptions
) -> Generator[Judged, None, None]:
    """Yields the place of each image's true class among the model's.

    Args:
        images: With their classes.
        model: A classifier.
        ids: Of the truth; says whether the model has a background before them.
        run: How to run.
    """

    def judge(image: LabelledImage) -> Judged:
        if isinstance(image.class_id, TruthError):
            raise image.class_id
        pixels = read_image(image.source, run)
        answer = model(pixels, protocol=run.protocol)
        assert isinstance(answer, Classification)
        scores = np.empty(len(answer.labels))
        for label in answer.labels:
            scores[label.class_id] = label.score
        scores = scores[ids.skipped :]
        best = int(scores.argmax())
        rank = true_rank(scores, image.class_id)
        figures: Figures = {
            "class_id": image.class_id,
            "name": ids.names[image.class_id],
            "rank": rank,
            "predicted_id": best,
            "predicted_name": ids.names[best],
        }
        small = small_picture(pixels) if run.small else None
        return Judged(image.source.path, figures, rank=rank, small=small)

    return _judged(images, judge, run)


def _shown(truth: ClassMap, ignore_index: int) -> ClassMap:
    """Returns the truth with what does not count as an id that no class has."""
    shown: ClassMap = truth.astype(np.uint16)
    shown[truth == ignore_index] = np.iinfo(np.uint16).max
    return shown


def _judged(
    pairs: Iterable[Sample] | Iterable[LabelledImage],
    judge: Callable[..., Judged],
    run: RunOptions,
) -> Generator[Judged, None, None]:
    def attempt(pair: Sample | LabelledImage) -> Judged:
        try:
            return judge(pair)
        except Exception as error:
            return Judged(pair.source.path, image_error(pair.source, error))

    jobs = (partial(attempt, pair) for pair in pairs)
    for judged in in_order(jobs, workers=run.workers, stopping=lambda: None):
        yield judged
        if run.fail_fast and isinstance(judged.figures, ImageError):
            return
