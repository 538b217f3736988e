"""``segcli embed``: a feature vector for every image."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segcli.cli import options as o
from segcli.errors import InferenceError, UsageError
from segcli.inputs import (
    DEFAULT_EXTENSIONS,
    STDIN,
    check_arguments,
    open_sources,
    resolve_arguments,
)
from segcli.shards import parse_shard
from segcli.urls import is_url, local_file
from segcli.writers import OutputPlan, check_place, refuse_other_content

if TYPE_CHECKING:
    from collections.abc import Iterable

    from segcli.array_file import Rows
    from segcli.cli.console import Results
    from segcli.results import Outcome


def embed(
    inputs: o.Inputs = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            envvar="SEGCLI_MODEL",
            metavar="FILE.onnx",
            show_default=False,
            help="A file that 'segcli export --task features' wrote.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            show_default=False,
            help="A .npy of one row per image, or a .npz of 'embeddings' and 'paths'.",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="pooler_output, else last_hidden_state, else the first",
            help="One of the model's outputs.",
        ),
    ] = None,
    pool: Annotated[
        str,
        typer.Option(
            metavar="mean|7x7|none",
            help="mean: a vector; 7x7: the mean of each window of 7x7; none: the layer as it is.",
        ),
    ] = "mean",
    resize: o.Resize = "model",
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
    as_json: o.Json = False,
    as_jsonl: o.Jsonl = False,
    timing: o.Timing = True,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Write a feature vector for every image: rows of one array, or JSON records.

    With -o, stdout has the path of each row, in the order of the rows.

    segcli export mobilenet-v2 --task features -o features.onnx

    segcli embed photos/ -r -m features.onnx -o photos.npz

    segcli embed photo.jpg -m features.onnx --jsonl | jq .embedding

    segcli embed photos/ -m features.onnx --layer expansion_13 --pool 7x7 --resize 320x320 -o x.npy
    """
    from segcli.cli import console, engines, run
    from segcli.pooling import POOLS
    from segcli.protocol import parse_protocol

    args = resolve_arguments(inputs or [])
    talk = console.Talk(quiet=quiet, verbose=verbose)
    records = run.records_of(json=as_json, jsonl=as_jsonl)
    if model is None:
        raise UsageError(
            "no model given", hint="'segcli export NAME --task features -o FILE.onnx' makes one"
        )
    if pool not in POOLS:
        raise UsageError(f"--pool {pool!r} is not {', '.join(POOLS)}")
    if output is None and records == "text":
        raise UsageError("nowhere to write to", hint="-o FILE.npy, -o FILE.npz or --jsonl")
    output = local_file("-o", output)
    _check_output(output)
    protocol = parse_protocol(resize, None, None, None)
    walk = {
        "recursive": recursive,
        "extensions": (*DEFAULT_EXTENSIONS, *(ext or ())),
        "files_from": files_from,
        "files0_from": files0_from,
    }
    check_arguments(args, **walk, remote=True)  # type: ignore[arg-type]
    part = {"shard": parse_shard(shard), "stdin": sys.stdin.buffer}
    ray = engines.parse_engine(engine, ray_address, gpus_per_worker, args)
    has_list = files_from is not None or files0_from is not None
    with (
        console.results() as out,
        engines.open_engine(
            *(ray, model, "features", engines.open_registry(registry), talk),
            device=device,
            workers=workers,
            threads=threads,
            single=len(args) == 1 and not has_list,
            distant=any(map(is_url, args)),
            offline=offline,
            wait=has_list or STDIN in args,
        ) as (loaded, workers),
    ):
        from segcli.array_file import Rows
        from segcli.image_io import DEFAULT_MAX_PIXELS
        from segcli.jobs import EmbedJob
        from segcli.reading import RunOptions

        outcomes = engines.run_images(
            loaded,
            open_sources(args, **walk, **part),  # type: ignore[arg-type]
            EmbedJob(choose_layer(layer, loaded.card.output_names), pool),
            RunOptions(
                workers=workers,
                batch_size=batch_size,
                max_pixels=max_pixels or DEFAULT_MAX_PIXELS,
                allow_truncated=allow_truncated,
                fail_fast=fail_fast,
                protocol=protocol,
                fast_decode=fast_decode,
            ),
            stdin=sys.stdin.buffer,
        )
        names: list[str] = []
        with nullcontext() if output is None else Rows(str(Path(output).parent)) as rows:
            code = run.report(
                _kept(outcomes, rows, output, names),
                out,
                talk,
                records=records,
                timing=timing,
                model=loaded,
                text=lambda outcome: _write_path(outcome, out),
            )
            if rows is not None and output is not None and rows.count:
                rows.save(output, names)
    raise typer.Exit(code)


def choose_layer(layer: str | None, outputs: tuple[str, ...]) -> str:
    """Returns the output to take.

    Raises:
        UsageError: The model has no such output.
    """
    if layer is None:
        usual = (name for name in ("pooler_output", "last_hidden_state") if name in outputs)
        return next(usual, outputs[0])
    if layer not in outputs:
        raise UsageError(
            f"the model has no output {layer!r}, it has {', '.join(outputs)}",
            hint="'segcli export --task features --layers …' makes one that has it",
        )
    return layer


def _check_output(output: str | None) -> None:
    from segcli.array_file import SUFFIXES

    if output is None:
        return
    if not output.endswith(SUFFIXES) or Path(output).is_dir():
        raise UsageError(f"-o {output!r} is not a file that ends in {' or '.join(SUFFIXES)}")
    refuse_other_content(output, (b"\x93NUMPY", b"PK"), "an array file")
    check_place(OutputPlan("file", output, ()))


def _kept(
    outcomes: "Iterable[Outcome]", rows: "Rows | None", output: str | None, names: list[str]
) -> "Iterator[Outcome]":
    """Yields outcomes, their features moved into rows where these are asked for."""
    for outcome in outcomes:
        if rows is None or output is None or outcome.embedding is None:
            yield outcome
            continue
        try:
            rows.add(outcome.embedding)
        except InferenceError as error:
            named = InferenceError(f"{outcome.path!r}: {error}", hint=error.hint)
            yield replace(outcome, status="error", embedding=None, error=named)
            continue
        names.append(outcome.path)
        yield replace(outcome, embedding=None, outputs=(output,), row=rows.count - 1)


def _write_path(outcome: "Outcome", out: "Results") -> None:
    if outcome.status == "ok":
        out.line(outcome.path)
