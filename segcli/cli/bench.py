"""``segcli bench``: latency by stage, throughput and memory on this machine."""

import re
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from segcli.cli import options as o
from segcli.errors import ExitCode, ImageError, UsageError
from segcli.inputs import STDIN, check_arguments, open_sources

if TYPE_CHECKING:
    from segcli.cli.console import Results
    from segcli.measurements import Benchmark
    from segcli.model import Model

# What a JPEG can hold.
_LONGEST_SIDE = 65500


def bench(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUTS",
            help="Image files and folders; the first 32 images are used.",
            show_default="images made for it",
        ),
    ] = None,
    model: o.Model = o.DEFAULT_MODEL,
    runs: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="about five seconds' worth, 5 to 100",
            help="Images timed one by one.",
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Images run before each timing and not counted.")
    ] = 3,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            show_default="1920x1080",
            help="Width and height of the images that are made where none are given.",
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Throughput of every workers x threads = usable cores, too."),
    ] = False,
    recursive: o.Recursive = False,
    max_pixels: o.MaxPixels = None,
    device: o.Device = "auto",
    workers: o.Workers = None,
    threads: o.Threads = None,
    offline: o.Offline = False,
    registry: o.RegistryFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: o.Quiet = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="A line per step.")] = False,
    debug: o.Debug = False,
) -> None:
    """Measure latency by stage, throughput and memory on this machine, of a model of either task.

    segcli bench

    segcli bench photos/ -r -m segformer-b2 --json

    segcli bench photo.jpg --workers 1 --runs 50
    """
    from segcli.cli import console, engines, progress

    args = inputs or []
    talk = console.Talk(quiet=quiet, verbose=verbose)
    size_wh = _parse_size(size)
    if args and size_wh:
        raise UsageError("--size is for made images, and there are inputs")
    if STDIN in args:
        raise UsageError("stdin ('-') can be read only once, and a benchmark repeats")
    if args:
        check_arguments(args, recursive=recursive)
    failed = 0

    def refuse(error: ImageError) -> None:
        nonlocal failed
        failed += 1
        talk.image_error(error)

    with console.results() as out:
        names = engines.open_registry(registry)
        from segcli.store import obtain

        # Before the clock starts: it may fetch and export.
        path = obtain(model, names, offline=offline, tell=talk.note)
        started = time.perf_counter()
        # NumPy, OpenCV and ONNX Runtime; importing them is part of what loading takes.
        from segcli.benchmark import measure
        from segcli.measurements import BenchOptions

        workers, threads = engines.default_workers(workers, threads, single=False)
        defaults = BenchOptions()
        limit = max_pixels or defaults.max_pixels
        if size_wh and size_wh[0] * size_wh[1] > limit:
            raise UsageError(f"--size {size} is more than {limit} pixels")

        def load(workers: int, threads: int) -> "Model":
            loaded = engines.open_model(
                str(path),
                None,
                names,
                talk,
                device=device,
                threads=threads,
                shared=workers > 1,
                offline=offline,
            )
            engines.announce(loaded, talk)
            return loaded

        with progress.status(talk) as show:

            def tell(text: str) -> None:
                show(text)
                talk.detail(text)

            measured = measure(
                load,
                open_sources(args, recursive=recursive, stdin=sys.stdin.buffer) if args else (),
                BenchOptions(
                    workers=workers,
                    threads=threads,
                    runs=runs,
                    warmup=warmup,
                    max_pixels=limit,
                    image_size_wh=size_wh or defaults.image_size_wh,
                    sweep=sweep,
                ),
                started=started,
                tell=tell,
                refuse=refuse,
            )
        talk.hidden_errors()
        if as_json:
            console.dump_json(out, measured.to_dict())
        elif out.isatty():
            _draw(measured, out)
        else:
            _write_lines(measured, out)
    raise typer.Exit(ExitCode.SOME_FAILED if failed else ExitCode.OK)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """Returns width and height of ``WxH``.

    Raises:
        UsageError: It is not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if not match or max(map(int, match.groups())) > _LONGEST_SIDE:
        raise UsageError(
            f"--size {text!r} is not of the form WxH with at most {_LONGEST_SIDE} each, "
            "such as 1920x1080"
        )
    return int(match[1]), int(match[2])


def _write_lines(measured: "Benchmark", out: "Results") -> None:
    """Writes ``stage<TAB>median_ms<TAB>p95_ms``, then ``name<TAB>value``."""
    for stage in (*measured.stages, measured.image):
        out.line(f"{stage.name}\t{stage.median_ms:.3f}\t{stage.p95_ms:.3f}")
    for name, value in _facts(measured).items():
        out.line(f"{name}\t{value}")


def _draw(measured: "Benchmark", out: "Results") -> None:
    """Draws the same for people."""
    from rich.table import Table
    from rich.text import Text

    from segcli.cli.console import terminal

    screen = terminal(out)
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for title in ("median ms", "p95 ms"):
        table.add_column(title, justify="right")
    for stage in (*measured.stages, measured.image):
        style = "bold" if stage is measured.image else ""
        table.add_row(stage.name, f"{stage.median_ms:.1f}", f"{stage.p95_ms:.1f}", style=style)
    screen.print(table)
    screen.print()
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in _facts(measured).items():
        facts.add_row(name, Text(value, overflow="fold"))
    screen.print(facts)


def _facts(measured: "Benchmark") -> dict[str, str]:
    """Returns all but the stages, by the names of ``--json``; a sweep by workers x threads."""
    from segcli.cli.console import visible

    peak = measured.peak_rss_bytes
    facts = {
        "images_per_s": f"{measured.throughput.images_per_s:.2f}",
        "peak_rss_mib": "unknown" if peak is None else f"{peak / 2**20:.0f}",
        "load_ms": f"{measured.load_ms:.0f}",
        "model": visible(measured.model),
        "provider": measured.provider,
        "workers": str(measured.options.workers),
        "threads": str(measured.options.threads),
        "runs": str(len(measured.image.samples_ms)),
        "warmup": str(measured.options.warmup),
        "images": str(measured.images),
        "generated": "yes" if measured.generated else "no",
        "image_size": _size(measured.image_wh),
        "input_size": _size(measured.input_wh),
        "cpu": visible(measured.cpu),
        "cores": str(measured.cores),
        "usable_cores": str(measured.usable_cores),
        **measured.versions(),
    }
    for run in measured.sweep:
        facts[f"images_per_s_{run.workers}x{run.threads}"] = f"{run.images_per_s:.2f}"
    return facts


def _size(size_wh: tuple[int, int] | None) -> str:
    return "several" if size_wh is None else f"{size_wh[0]}x{size_wh[1]}"
