"""``segcli segment``: a mask for every image."""

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from segcli.claims import claim_targets, open_claims
from segcli.cli import options as o
from segcli.errors import UsageError
from segcli.formats import Format
from segcli.inputs import (
    DEFAULT_EXTENSIONS,
    STDIN,
    Source,
    check_arguments,
    open_sources,
    resolve_arguments,
)
from segcli.shards import parse_shard
from segcli.urls import is_url, is_url_folder, plain_path
from segcli.writers import (
    OutputPlan,
    all_exist,
    check_folders,
    check_place,
    output_folder,
    plan_output,
    refuse_existing,
    refuse_pictures,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from segcli.artifact import ModelCard
    from segcli.model import MapSize
    from segcli.protocol import Protocol


def segment(
    inputs: o.Inputs = None,
    model: o.Model = o.DEFAULT_MODEL,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            show_default="the current folder",
            help="A file for one image, a folder for several (also s3://, gs://), - for stdout.",
        ),
    ] = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "-f",
            "--format",
            show_default="mask",
            help="mask: pixel value = class id; color: RGB; overlay: blended; cutout: only "
            "--classes are opaque; npy: class ids; json: RLE per class; confidence: how sure, "
            "0 to 255. Repeatable.",
        ),
    ] = None,
    opacity: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the class color in an overlay.")
    ] = 0.5,
    legend: Annotated[
        bool, typer.Option("--legend", help="Add names, colors and shares to color and overlay.")
    ] = False,
    contours: Annotated[
        bool, typer.Option("--contours", help="Draw the borders of classes into an overlay.")
    ] = False,
    names: Annotated[
        bool, typer.Option("--names", help="Draw the names of classes into an overlay.")
    ] = False,
    safe_colors: Annotated[
        bool,
        typer.Option("--safe-colors", help="Colors that the color-blind tell apart, up to 32."),
    ] = False,
    polygons: Annotated[
        bool, typer.Option("--polygons", help="Add outlines along pixel edges to json.")
    ] = False,
    viridis: Annotated[
        bool, typer.Option("--viridis", help="Color confidence from purple to yellow.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Draw each overlay in the terminal, too.")
    ] = False,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Keep only these classes, by name or id; in a mask "
            "the others become 255 (65535 above 255 classes).",
        ),
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave images whose outputs are there.")
    ] = False,
    no_clobber: Annotated[
        bool, typer.Option("--no-clobber", help="An output that exists is that image's error.")
    ] = False,
    mask_size: Annotated[
        str | None,
        typer.Option(
            metavar="logits|WxH",
            show_default="the image's own",
            help="Another size of the mask.",
        ),
    ] = None,
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
    dry_run: o.DryRun = False,
    null: o.Null = False,
    as_json: o.Json = False,
    as_jsonl: o.Jsonl = False,
    timing: o.Timing = True,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Write a mask for every image.

    segcli segment street.jpg -o street.png

    segcli segment photos/ -r -o masks/ -f mask -f overlay --legend --names

    find . -name '*.jpg' -print0 | segcli segment --files0-from - -o masks/ --jsonl
    """
    from segcli.cli import console, engines, pages, run, segment_output
    from segcli.protocol import parse_protocol

    args = resolve_arguments(inputs or [])
    output = None if output is None else plain_path(output)
    talk = console.Talk(quiet=quiet, verbose=verbose)
    records = run.records_of(json=as_json, jsonl=as_jsonl)
    if not 0 <= opacity <= 1:
        # Not a number passes for any range.
        raise UsageError(f"--opacity {opacity} is not from 0 to 1")
    if skip_existing and no_clobber:
        raise UsageError("--skip-existing and --no-clobber exclude each other")
    has_list = files_from is not None or files0_from is not None
    plan = plan_output(output, formats or [Format.MASK], args, has_list=has_list)
    if plan.kind == "stdout" and records != "text":
        raise UsageError(f"-o - and --{records} both want stdout")
    if records != "text" and (dry_run or null):
        raise UsageError(f"--{records} does not go with {'--dry-run' if dry_run else '--null'}")
    end = b"\0" if null else b"\n"
    if Format.CUTOUT in plan.formats and classes is None:
        raise UsageError("-f cutout needs --classes, which stay opaque")
    report = pages.check_page(report)
    ray = engines.parse_engine(engine, ray_address, gpus_per_worker, (*args, plan.output))
    if ray is not None and plan.kind == "stdout":
        raise UsageError("--engine ray writes files, not to stdout", hint="name one with -o")
    protocol = parse_protocol(resize, tile, overlap, augment)
    map_size = parse_mask_size(mask_size, plan, protocol)
    extensions = (*DEFAULT_EXTENSIONS, *(ext or ()))
    walk = {"recursive": recursive, "extensions": extensions, "exclude_dir": plan.folder}
    lists = {
        "files_from": files_from,
        "files0_from": files0_from,
        "root": None if root is None else plain_path(root),
    }
    check_arguments(args, **walk, **lists, remote=True)  # type: ignore[arg-type]
    claims = open_claims(args, plan, has_list=has_list)
    part = {"shard": parse_shard(shard), "stdin": sys.stdin.buffer}
    # Folders of a store are listed once, while the run goes on.
    known_now = [arg for arg in args if not is_url_folder(arg)]
    named = claims.check(
        plan,
        open_sources(known_now, **walk, **part) if known_now else (),  # type: ignore[arg-type]
    )
    check_place(plan)
    known = engines.open_registry(registry)
    with console.results() as out:
        if dry_run:
            engines.find_model(model, "segmentation", known)

            def targets(source: Source) -> tuple[str, ...]:
                found = claim_targets(source, plan, claims)
                if no_clobber:
                    refuse_existing(found)
                if skip_existing and all_exist(found):
                    return ()
                if has_list:
                    refuse_pictures(found)
                return found

            sources = open_sources(args, **walk, **lists, **part)  # type: ignore[arg-type]
            raise typer.Exit(run.dry_run(sources, targets, out, talk, end=end))
        if plan.kind == "stdout" and out.isatty():
            raise UsageError(
                "the output is an image and stdout is a terminal", hint="redirect it or use -o FILE"
            )
        single = len(args) == 1 and plan.kind != "folder" and not has_list
        with engines.open_engine(
            *(ray, model, "segmentation", known, talk),
            device=device,
            workers=workers,
            threads=threads,
            single=single,
            distant=any(map(is_url, (*args, root or "", plan.output))),
            folder=output_folder(plan),
            offline=offline,
            wait=has_list or STDIN in args,
        ) as (loaded, workers):
            from segcli.encode import Style
            from segcli.image_io import DEFAULT_MAX_PIXELS
            from segcli.jobs import SegmentJob
            from segcli.reading import RunOptions

            check_folders(plan)
            palette = choose_palette(loaded.card, safe=safe_colors)
            # Records go to stdout as well; a picture between them would break them.
            shown = show and records == "text" and plan.kind != "stdout" and out.isatty()
            outcomes = engines.run_images(
                loaded,
                open_sources(args, **walk, **lists, **part),  # type: ignore[arg-type]
                SegmentJob(
                    plan=plan,
                    style=Style(
                        opacity=opacity,
                        visible=None if classes is None else parse_classes(classes, loaded.card),
                        legend=legend,
                        contours=contours,
                        names=names,
                        polygons=polygons,
                        viridis=viridis,
                        palette=palette if safe_colors else None,
                    ),
                    map_size=map_size,
                    preview_columns=segment_output.PREVIEW_COLUMNS if shown else 0,
                    skip_existing=skip_existing,
                    no_clobber=no_clobber,
                    # What a list names later is not known.
                    keep_pictures=has_list,
                    write_stdout=out.write if plan.kind == "stdout" else None,
                ),
                RunOptions(
                    workers=workers,
                    batch_size=batch_size,
                    max_pixels=max_pixels or DEFAULT_MAX_PIXELS,
                    allow_truncated=allow_truncated,
                    fail_fast=fail_fast,
                    protocol=protocol,
                    small=report is not None,
                    fast_decode=fast_decode,
                ),
                claims=claims,
                stdin=sys.stdin.buffer,
            )
            with pages.open_page(report, "segment", loaded) as page:
                code = run.report(
                    outcomes,
                    out,
                    talk,
                    records=records,
                    timing=timing,
                    model=loaded,
                    text=segment_output.text_writer(out, plan, end, palette if single else None),
                    total=None if has_list or known_now != args else named,
                    page=page,
                )
    raise typer.Exit(code)


def parse_mask_size(text: str | None, plan: OutputPlan, protocol: "Protocol") -> "MapSize | None":
    """Returns the class map's size of ``--mask-size``, None for the image's own.

    Raises:
        UsageError: It has another form, or does not go with the formats or the protocol.
    """
    if text is None:
        return None
    for format_ in (Format.OVERLAY, Format.CUTOUT):
        if format_ in plan.formats:
            raise UsageError(f"--mask-size does not go with -f {format_}, which shows the image")
    if text == "logits":
        if not protocol.one_look or Format.CONFIDENCE in plan.formats:
            raise UsageError(
                "--mask-size logits does not go with --tile, --augment or -f confidence"
            )
        return "logits"
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise UsageError(
            f"--mask-size {text!r} is not logits or WxH such as 640x480, up to five digits"
        )
    return int(match[2]), int(match[1])


def parse_classes(text: str, card: "ModelCard") -> frozenset[int]:
    """Returns the ids of a comma-separated list of class names or ids.

    Raises:
        UsageError: The model has no such class.
    """
    names = card.class_names
    by_name = {name.casefold(): i for i, name in reversed(list(enumerate(names)))}
    chosen = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item.casefold() in by_name:
            chosen.add(by_name[item.casefold()])
        elif item.isdecimal() and int(item) < len(names):
            chosen.add(int(item))
        else:
            from difflib import get_close_matches

            near = get_close_matches(item.casefold(), by_name, n=3, cutoff=0.0)
            raise UsageError(
                f"{card.name} has no class {item!r}; the nearest are {', '.join(near)}",
                hint=f"'segcli models show {card.name}' lists them all",
            )
    if not chosen:
        raise UsageError("--classes is empty")
    return frozenset(chosen)


def choose_palette(card: "ModelCard", *, safe: bool) -> "npt.NDArray[np.uint8]":
    """Returns (K, 3) uint8 RGB: the model's own colours, or those that the colour-blind tell apart.

    Raises:
        UsageError: There are no safe colours for so many classes.
    """
    import numpy as np

    if not safe:
        return np.array(card.palette, np.uint8).reshape(-1, 3)
    from segcli.palettes import MOST_COLORS, safe_palette

    if len(card.class_names) > MOST_COLORS:
        raise UsageError(
            f"--safe-colors has colors for {MOST_COLORS} classes, {card.name!r} has "
            f"{len(card.class_names)}"
        )
    return np.array(safe_palette(len(card.class_names)), np.uint8)
