"""The images of an evaluation, one by one: judged, counted, told to the streams and files."""

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from segcli.cli.progress import status
from segcli.errors import ImageError

if TYPE_CHECKING:
    from segcli.class_truth import ClassIds, LabelledImage
    from segcli.cli.console import Talk
    from segcli.datasets import Dataset
    from segcli.eval_state import EvalState
    from segcli.evaluation import Judged
    from segcli.inputs import Source
    from segcli.model import Model
    from segcli.reading import RunOptions
    from segcli.report import Report

# The state is written so often, and at the end.
_SAVE_EVERY_S = 10.0


class EvalFiles(NamedTuple):
    """The files that an evaluation keeps as it goes on, where they are asked for."""

    state: str | None
    table: str | None


def judge_masks(
    sources: Iterable["Source"],
    limit: int | None,
    model: "Model",
    dataset: "Dataset",
    options: "RunOptions",
    ignore_index: int,
    loss: bool,
    done: Container[str],
) -> Iterator["Judged"]:
    """Yields what becomes of each image of a data set.

    Args:
        sources: The images.
        limit: How many more at most, None for all.
        model: A segmenter.
        dataset: Where their true class maps lie.
        options: How to run.
        ignore_index: The id that counts for nothing.
        loss: Adds the cross entropy.
        done: Paths that are counted already.
    """
    from segcli.evaluation import judge_segmentation

    left = (sample for sample in dataset.samples(sources) if sample.source.path not in done)
    return judge_segmentation(
        islice(left, limit), model, dataset, options, ignore_index=ignore_index, loss=loss
    )


def judge_labels(
    images: Iterable["LabelledImage"],
    limit: int | None,
    model: "Model",
    ids: "ClassIds",
    options: "RunOptions",
    done: Container[str],
) -> Iterator["Judged"]:
    """Yields what becomes of each labelled image.

    Args:
        images: With their true classes.
        limit: As for ``judge_masks``.
        model: A classifier.
        ids: Which of its classes are meant by those of the truth.
        options: How to run.
        done: Paths that are counted already.
    """
    from segcli.evaluation import judge_classification

    left = (image for image in images if image.source.path not in done)
    return judge_classification(islice(left, limit), model, ids, options)


def count_all(
    judged: Callable[[Container[str]], Iterator["Judged"]],
    files: EvalFiles,
    identity: Mapping[str, str | int | None],
    model: "Model",
    num_classes: int,
    talk: "Talk",
    page: "Report | None",
) -> tuple["EvalState", int]:
    """Returns what all images come to, and how many failed.

    Args:
        judged: Yields what becomes of each image, but for those that are counted already.
        files: Kept as the images go by; the state also where an interrupt ends it.
        identity: What a state has to agree with.
        model: That is evaluated.
        num_classes: Of the confusion matrix.
        talk: Takes errors and details.
        page: A report to add each to.
    """
    from segcli.atomic import write_atomic
    from segcli.eval_state import EvalState, csv_header, csv_row

    task = model.card.task
    state = EvalState(identity, num_classes)
    if files.state is not None:
        state = EvalState.load(files.state, identity, num_classes)
        if state.images:
            talk.note(f"{len(state.images)} images are counted in {files.state!r} already")
    rows = [csv_row(task, path, figures) for path, figures in state.images.items()]
    failed, saved = 0, time.monotonic()
    try:
        with status(talk) as show:
            for one in judged(frozenset(state.images)):
                rows.append(csv_row(task, one.path, one.figures))
                if isinstance(one.figures, ImageError):
                    failed += 1
                    talk.image_error(one.figures)
                    if page is not None:
                        error = {"code": one.figures.code, "message": str(one.figures)}
                        page.add_failure({"path": one.path, "error": error})
                else:
                    state.add(
                        one.path,
                        one.figures,
                        confusion=one.confusion,
                        rank=one.rank,
                        loss_sum=one.loss_sum,
                    )
                    talk.detail(csv_row(task, one.path, one.figures).rstrip())
                    if page is not None and one.small is not None:
                        page.add_evaluation(
                            one.path,
                            one.figures,
                            one.small.image,
                            one.small.truth_ids,
                            one.small.class_ids,
                        )
                show(f"{len(state.images)} images, {failed} failed")
                if files.state is not None and time.monotonic() - saved > _SAVE_EVERY_S:
                    state.save(files.state)
                    saved = time.monotonic()
    finally:
        # On Ctrl-C, too: that is what it is for.
        if files.state is not None and state.images:
            state.save(files.state)
        talk.hidden_errors()
    if files.table is not None:
        text = "".join([csv_header(task), *rows])
        write_atomic(files.table, text.encode("utf-8", "surrogateescape"))
    return state, failed
