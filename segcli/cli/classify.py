"""``segcli classify``: top-k labels for every image."""

import csv
import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from segcli.cli import options as o
from segcli.errors import ModelNotFound, UsageError
from segcli.inputs import (
    DEFAULT_EXTENSIONS,
    STDIN,
    check_arguments,
    open_sources,
    resolve_arguments,
)
from segcli.shards import parse_shard
from segcli.urls import is_url

if TYPE_CHECKING:
    from segcli.cli.console import Results
    from segcli.registry import Registry
    from segcli.results import Outcome


def classify(
    inputs: o.Inputs = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            envvar="SEGCLI_MODEL",
            metavar="MODEL",
            autocompletion=o.complete_model,
            show_default="the first classifier on this machine",
            help="A registry name, or an .onnx file that 'segcli export' wrote.",
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="Labels per image.")] = 5,
    recursive: o.Recursive = False,
    files_from: o.FilesFrom = None,
    files0_from: o.Files0From = None,
    ext: o.Ext = None,
    max_pixels: o.MaxPixels = None,
    allow_truncated: o.AllowTruncated = False,
    device: o.Device = "auto",
    workers: o.Workers = None,
    threads: o.Threads = None,
    engine: o.EngineName = "local",
    ray_address: o.RayAddress = None,
    gpus_per_worker: o.GpusPerWorker = None,
    shard: o.Shard = None,
    batch_size: o.BatchSize = 1,
    fail_fast: o.FailFast = False,
    fast_decode: o.FastDecode = False,
    offline: o.Offline = False,
    registry: o.RegistryFile = None,
    report: o.Report = None,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Only print what would be read.")
    ] = False,
    null: o.Null = False,
    as_json: o.Json = False,
    as_jsonl: o.Jsonl = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="path,rank,class_id,label,score with a header.")
    ] = False,
    timing: o.Timing = True,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Print the best labels of every image: path, label and score, a line each.

    segcli classify photo.jpg -m mobilenet-v2

    segcli classify photos/ -m mobilenet-v2.onnx -k 1

    segcli classify photos/ -r -m mobilenet-v2 --jsonl | jq -r .labels[0].name
    """
    from segcli.cli import console, engines, pages, run

    args = resolve_arguments(inputs or [])
    talk = console.Talk(quiet=quiet, verbose=verbose)
    records = run.records_of(json=as_json, jsonl=as_jsonl)
    if as_csv and records != "text":
        raise UsageError(f"--csv and --{records} exclude each other")
    if (as_csv or records != "text") and (dry_run or null):
        raise UsageError("--dry-run and --null go with plain text, not with records or --csv")
    end = b"\0" if null else b"\n"
    report = pages.check_page(report)
    walk = {
        "recursive": recursive,
        "extensions": (
            *DEFAULT_EXTENSIONS,
            *(ext or ()),
        ),
        "files_from": files_from,
        "files0_from": files0_from,
    }
    check_arguments(args, **walk, remote=True)  # type: ignore[arg-type]
    part = {"shard": parse_shard(shard), "stdin": sys.stdin.buffer}
    ray = engines.parse_engine(engine, ray_address, gpus_per_worker, args)
    with console.results() as out:
        names = engines.open_registry(registry)
        name = model or _first_on_this_machine(names)
        if dry_run:
            engines.find_model(name, "classification", names)
            sources = open_sources(args, **walk, **part)  # type: ignore[arg-type]
            raise typer.Exit(run.dry_run(sources, None, out, talk, end=end))
        has_list = files_from is not None or files0_from is not None
        with engines.open_engine(
            *(ray, name, "classification", names, talk),
            device=device,
            workers=workers,
            threads=threads,
            single=len(args) == 1 and not has_list,
            distant=any(map(is_url, args)),
            offline=offline,
            wait=has_list or STDIN in args,
        ) as (loaded, workers):
            from segcli.image_io import DEFAULT_MAX_PIXELS
            from segcli.jobs import ClassifyJob
            from segcli.reading import RunOptions

            outcomes = engines.run_images(
                loaded,
                open_sources(args, **walk, **part),  # type: ignore[arg-type]
                ClassifyJob(top_k),
                RunOptions(
                    workers=workers,
                    batch_size=batch_size,
                    max_pixels=max_pixels or DEFAULT_MAX_PIXELS,
                    allow_truncated=allow_truncated,
                    fail_fast=fail_fast,
                    small=report is not None,
                    fast_decode=fast_decode,
                ),
                stdin=sys.stdin.buffer,
            )
            with pages.open_page(report, "classify", loaded) as page:
                code = run.report(
                    outcomes,
                    out,
                    talk,
                    records=records,
                    timing=timing,
                    model=loaded,
                    text=_text_writer(out, end, as_csv=as_csv),
                    page=page,
                )
    raise typer.Exit(code)


def _first_on_this_machine(registry: "Registry") -> str:
    from segcli.store import locate

    for spec in registry:
        if spec.task == "classification" and locate(spec):
            return spec.name
    raise ModelNotFound(
        "no classifier is on this machine, and none was named with -m",
        hint="'segcli classify -m mobilenet-v2 …' fetches and exports one (with the export extra); "
        "-m FILE.onnx takes one that 'segcli export' wrote",
    )


def _text_writer(out: "Results", end: bytes, *, as_csv: bool) -> Callable[["Outcome"], None]:
    """Returns what writes one Outcome where no records are asked for."""
    if as_csv:
        out.line("path,rank,class_id,label,score")
        return lambda outcome: _write_csv(outcome, out)
    if not out.isatty() or end != b"\n":
        return lambda outcome: _write_lines(outcome, out, end)
    from segcli.cli.console import terminal, visible

    screen = terminal(out)

    def draw(outcome: "Outcome") -> None:
        if outcome.labels:
            screen.print(visible(outcome.path))
            for _, name, score in outcome.labels:
                screen.print(f"    {score:7.2%}  {name}")

    return draw


def _write_lines(outcome: "Outcome", out: "Results", end: bytes) -> None:
    from segcli.cli.console import visible

    for _, name, score in outcome.labels or ():
        # A tab or line break in a name would make another column or line of it.
        out.line(f"{outcome.path}\t{visible(name)}\t{score:.6g}", end)


def _write_csv(outcome: "Outcome", out: "Results") -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for rank, (class_id, name, score) in enumerate(outcome.labels or (), 1):
        writer.writerow([outcome.path, rank, class_id, name, f"{score:.6g}"])
    out.write(text.getvalue().encode("utf-8", "surrogateescape"))
