"""``segcli eval``: how well a model does on a labelled folder."""

import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segcli.cli import options as o
from segcli.errors import ExitCode, UsageError
from segcli.inputs import (
    DEFAULT_EXTENSIONS,
    STDIN,
    check_arguments,
    file_identity,
    open_sources,
)
from segcli.onnx_file import digest
from segcli.own_png import is_segcli_png
from segcli.urls import local_file
from segcli.writers import OutputPlan, check_folders, check_place, refuse_other_content

if TYPE_CHECKING:
    from segcli.datasets import Dataset
    from segcli.evaluation import Judged
    from segcli.inputs import Source
    from segcli.model import Model

# 18 pixels each: more make pictures that no viewer opens.
_MOST_DRAWN = 256


class Layout(StrEnum):
    """How a data set lays out its files."""

    AUTO = "auto"
    PAIRS = "pairs"
    ADE20K = "ade20k"
    CITYSCAPES = "cityscapes"
    VOC = "voc"
    CAMVID = "camvid"


def evaluate(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUTS",
            show_default="the images of the data set that --truth is",
            help="Image files or folders.",
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|CSV",
            show_default=False,
            help="True class maps, or the root of a data set; for a classifier a folder per class "
            "or a CSV 'path,label'.",
        ),
    ] = None,
    model: o.Model = o.DEFAULT_MODEL,
    layout: Annotated[Layout, typer.Option(help="How --truth is laid out.")] = Layout.AUTO,
    split: Annotated[
        str | None,
        typer.Option(show_default="the data set's validation split", help="Such as test."),
    ] = None,
    reduce_labels: Annotated[
        bool | None,
        typer.Option(
            "--reduce-labels/--no-reduce-labels",
            show_default="as the layout says",
            help="The truth counts classes from 1, and 0 is void.",
        ),
    ] = None,
    ignore_index: Annotated[
        int, typer.Option(min=0, max=65535, help="True value of pixels that do not count.")
    ] = 255,
    truth_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default="1000 for ImageNet's 1001, else the model's",
            help="Classes of a classifier's truth; one less than the model's skips background.",
        ),
    ] = None,
    loss: Annotated[bool, typer.Option("--loss", help="The mean cross-entropy, too.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only N images; with --state, N that it lacks."),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Keep what is counted here, and go on from there in another run."
        ),
    ] = None,
    table: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="A line per image.")
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option("--confusion", metavar="FILE.png", help="A picture of the confusion matrix."),
    ] = None,
    report: o.Report = None,
    resize: o.Resize = "model",
    tile: o.Tile = None,
    overlap: o.Overlap = None,
    augment: o.Augment = None,
    recursive: o.Recursive = False,
    files_from: o.FilesFrom = None,
    files0_from: o.Files0From = None,
    root: o.Root = None,
    ext: o.Ext = None,
    max_pixels: o.MaxPixels = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    threads: o.Threads = None,
    fail_fast: o.FailFast = False,
    offline: o.Offline = False,
    registry: o.RegistryFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure mIoU and accuracies, or top-1 and top-5, against the truth.

    Over all images at once: one confusion matrix. The truth is never resized, the prediction is
    made at its size.

    segcli eval --truth camvid/ --split test

    segcli eval images/ --truth labels/ -r -m my.onnx --csv images.csv --confusion confusion.png

    segcli eval --truth ADEChallengeData2016/ -m segformer-b0 --resize short-side

    segcli eval val/ -r --truth val/ -m mobilenet-v2 --json
    """
    from segcli.cli import console, engines, eval_output, eval_run, pages
    from segcli.protocol import parse_protocol

    args = inputs or []
    talk = console.Talk(quiet=quiet, verbose=verbose)
    if truth is None:
        raise UsageError("no --truth given", hint="it is a folder of labels, or a data set's root")
    if STDIN in args:
        raise UsageError("stdin ('-') is one image, and has no truth")
    protocol = parse_protocol(resize, tile, overlap, augment)
    report = pages.check_page(report)
    state = local_file("--state", state)
    table = local_file("--csv", table)
    picture = local_file("--confusion", picture)
    _check_files(state, table, picture, report)
    if report is not None and state is not None:
        raise UsageError("--report shows the images of one run, and --state leaves some out")
    has_list = files_from is not None or files0_from is not None
    walk: dict[str, Any] = {
        "recursive": recursive,
        "extensions": (*DEFAULT_EXTENSIONS, *(ext or ())),
        "files_from": files_from,
        "files0_from": files0_from,
        "root": root,
    }
    with console.results() as out:
        names = engines.open_registry(registry)
        workers, threads = engines.default_workers(workers, threads, single=False)
        loaded = engines.open_model(
            model,
            None,
            names,
            talk,
            device=device,
            threads=threads,
            shared=workers > 1,
            offline=offline,
            wait=True,
        )
        if loaded.card.task == "features":
            raise UsageError(f"{model!r} gives features, no classes")
        from segcli.image_io import DEFAULT_MAX_PIXELS
        from segcli.reading import RunOptions

        options = RunOptions(
            workers=workers,
            max_pixels=max_pixels or DEFAULT_MAX_PIXELS,
            fail_fast=fail_fast,
            protocol=protocol,
            small=report is not None,
        )
        if loaded.card.task == "classification" and (
            split or reduce_labels is not None or loss or picture or layout is not Layout.AUTO
        ):
            raise UsageError(
                f"{loaded.card.name!r} is a classifier: --layout, --split, --reduce-labels, "
                "--loss and --confusion are for segmentation"
            )
        if picture is not None and len(loaded.card.class_names) > _MOST_DRAWN:
            raise UsageError(
                f"--confusion draws up to {_MOST_DRAWN} classes, the model has "
                f"{len(loaded.card.class_names)}"
            )
        dataset = _open_dataset(loaded, truth, layout, split, reduce_labels)
        if dataset and dataset.images and not has_list and _is_root(args, truth):
            args, walk["recursive"] = [dataset.images], True
        check_arguments(args, **walk)
        sources: Iterable[Source] = open_sources(args, **walk, stdin=sys.stdin.buffer)
        identity = {
            "model": loaded.card.name,
            "model_sha256": digest(loaded.path),
            "truth": truth,
            "split": dataset.split if dataset else None,
            "reduce_labels": dataset.reduce_labels if dataset else False,
            "ignore_index": ignore_index,
            **{key: str(value) for key, value in asdict(protocol).items()},
            "loss": loss,
        }
        engines.announce(loaded, talk)
        judged: Callable[[Container[str]], Iterator[Judged]]
        if dataset:
            judged = partial(
                eval_run.judge_masks, sources, limit, loaded, dataset, options, ignore_index, loss
            )
            class_names = loaded.card.class_names
        else:
            from segcli.class_truth import open_class_truth

            ids, paired = open_class_truth(truth, loaded.card.class_names, num_true=truth_classes)
            judged = partial(eval_run.judge_labels, paired(sources), limit, loaded, ids, options)
            class_names = ids.names
        with pages.open_page(report, "eval", loaded) as page:
            counted, failed = eval_run.count_all(
                judged,
                eval_run.EvalFiles(state, table),
                identity,
                loaded,
                len(class_names),
                talk,
                page,
            )
            found = eval_output.figures_of(
                counted, loaded, class_names, protocol, failed, loss=loss
            )
            if page is not None:
                page.close(found)
        if picture is not None:
            eval_output.write_confusion(picture, counted, class_names)
        if as_json:
            console.dump_json(out, found)
        elif out.isatty():
            eval_output.draw_table(found, out)
        else:
            eval_output.write_lines(found, out)
        count = found["images"]
        images = f"{count} image{'s' if count != 1 else ''}"
        talk.note(f"{images}, {failed} failed, on {loaded.provider}")
    raise typer.Exit(ExitCode.SOME_FAILED if failed else ExitCode.OK)


def _check_files(
    state: str | None, table: str | None, picture: str | None, report: str | None
) -> None:
    """Refuses files that cannot be written, or that are something else: an image, or the truth.

    Raises:
        UsageError: Two are one, one has another suffix, or is there and is no such file.
        OutputError: One cannot be written.
    """
    given = [path for path in (state, table, picture, report) if path is not None]
    if len({os.path.realpath(path) for path in given}) < len(given):
        raise UsageError("--state, --csv, --confusion and --report are files of their own")
    for path in given:
        if not Path(path).name or path == "-" or path.endswith("/") or Path(path).is_dir():
            raise UsageError(f"{path!r} is no file name")
        plan = OutputPlan("file", path, ())
        check_place(plan)
        check_folders(plan)
    if picture is not None:
        if not picture.lower().endswith(".png"):
            raise UsageError(f"--confusion {picture!r} does not end in .png")
        if Path(picture).exists() and not is_segcli_png(picture):
            raise UsageError(
                f"{picture!r} is there and segcli did not write it: it is not replaced",
                hint="name another file",
            )
    if table is not None:
        refuse_other_content(table, (b"path,status,",), "a table of images")


def _open_dataset(
    model: "Model", truth: str, layout: Layout, split: str | None, reduce_labels: bool | None
) -> "Dataset | None":
    """Returns where the true class maps lie; None for a classifier."""
    if model.card.task != "segmentation":
        return None
    from segcli.datasets import open_dataset

    return open_dataset(
        truth,
        layout=None if layout is Layout.AUTO else layout.value,  # type: ignore[arg-type]
        split=split,
        reduce_labels=reduce_labels,
    )


def _is_root(args: list[str], truth: str) -> bool:
    """Tells whether the images are those of the data set itself: its root, or none named."""
    return not args or (len(args) == 1 and file_identity(args[0]) == file_identity(truth))
