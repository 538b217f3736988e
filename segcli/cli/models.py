"""``segcli models``: the registry, and what is on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segcli.cli import options as o
from segcli.errors import ExitCode, ImageError, ModelError, ModelNotFound, UsageError

if TYPE_CHECKING:
    from segcli.cli.console import Results
    from segcli.comparison import Comparison
    from segcli.registry import ModelSpec

app = typer.Typer(
    help="The registry, and what is on this machine.",
    epilog=o.EXIT_CODES,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", show_default=False)]


@app.callback()
def default(context: typer.Context) -> None:
    """List the models; see the subcommands for more."""
    if context.invoked_subcommand is None:
        list_models()


def list_models(
    registry: o.RegistryFile = None, as_json: AsJson = False, debug: o.Debug = False
) -> None:
    """List every model: name, task, variant, parameters, figure, where it is, licence.

    segcli models list
    """
    from segcli.cli import console, engines

    specs = list(engines.open_registry(registry))
    with console.results() as out:
        if as_json:
            console.dump_json(out, [_spec_dict(spec) for spec in specs])
        elif out.isatty():
            _draw_table(specs, out)
        else:
            for spec in specs:
                out.line("\t".join(_row(spec)))


def show(
    model: Annotated[str, typer.Argument(metavar="NAME|FILE", show_default=False)],
    registry: o.RegistryFile = None,
    as_json: AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show a registry entry, or the ModelCard of an .onnx file.

    segcli models show segformer-b2

    segcli models show my.onnx --json
    """
    from segcli.cli import console, engines
    from segcli.onnx_file import read_card
    from segcli.store import is_path, locate

    shown: dict[str, Any] = {}
    if is_path(model):
        path: Path | None = Path(model)
    else:
        spec = engines.open_registry(registry).get(model)
        shown |= _spec_dict(spec)
        path = locate(spec)
    if path is not None:
        card = read_card(path)
        shown |= {"file": str(path), "bytes": path.stat().st_size, "card": card.to_dict()}
    with console.results() as out:
        if as_json:
            console.dump_json(out, shown)
        else:
            _write_fields(shown, out)


def pull(
    names: Names = None,
    offline: o.Offline = False,
    registry: o.RegistryFile = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Fetch and export models now, for later use without a network.

    segcli models pull segformer-b0 mobilenet-v2
    """
    from segcli.cli import console, engines
    from segcli.store import obtain

    talk, known = console.Talk(quiet=quiet), engines.open_registry(registry)
    specs = [known.get(name) for name in _required(names)]
    with console.results() as out:
        for spec in specs:
            out.line(str(obtain(spec.name, known, offline=offline, tell=talk.note)))


def remove_models(
    names: Names = None, registry: o.RegistryFile = None, debug: o.Debug = False
) -> None:
    """Remove models from the cache.

    segcli models rm segformer-b5
    """
    from segcli.cli import console, engines
    from segcli.store import cached_path, remove

    known = engines.open_registry(registry)
    specs = [known.get(name) for name in _required(names)]
    with console.results() as out:
        for spec in specs:
            if not remove(spec):
                raise ModelNotFound(f"{spec.name!r} is not in the cache")
            out.line(str(cached_path(spec.name)))


def verify(
    names: Names = None,
    registry: o.RegistryFile = None,
    debug: o.Debug = False,
) -> None:
    """Compare the models on this machine, or .onnx files, with their checksums; read their cards.

    segcli models verify

    segcli models verify my.onnx
    """
    from segcli.cli import console, engines
    from segcli.onnx_file import check_seal, read_card
    from segcli.store import cache_entry, distrust, is_path, locate, sha256_of

    def state_of_file(path: Path) -> str:
        if not path.exists():
            return "absent"
        try:
            read_card(path)
            check_seal(path)
        except ModelError as error:
            return f"damaged: {error}"
        return "ok"

    def state(spec: "ModelSpec") -> str:
        path, entry = locate(spec), cache_entry(spec)
        if path is None:
            return "absent"
        anew = f"'segcli models rm {spec.name} && segcli models pull {spec.name}' makes it anew"
        try:
            if entry is not None and (doubt := distrust(path)):
                return f"not trusted: {doubt.reason}; mend it with '{doubt.mend}'"
            if entry is not None and sha256_of(path) != entry.sha256:
                return f"damaged: {str(path)!r} is not the file that was exported; {anew}"
        except ModelError as error:
            return f"damaged: {error}; {anew}"
        found = state_of_file(path)
        return found if found == "ok" or entry is None else f"{found}; {anew}"

    known = engines.open_registry(registry)
    named = names or [spec.name for spec in known if locate(spec)]
    checks = [Path(name) if is_path(name) else known.get(name) for name in named]
    failed = False
    with console.results() as out:
        for name, check in zip(named, checks, strict=True):
            found = state_of_file(check) if isinstance(check, Path) else state(check)
            failed |= found != "ok"
            out.line(f"{name}\t{console.visible(found)}")
    if failed:
        raise typer.Exit(ExitCode.MODEL)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", show_default=False)],
    on: Annotated[
        list[str],
        typer.Option("--on", metavar="PATH", help="Images, or folders of them; repeatable."),
    ],
    recursive: o.Recursive = False,
    max_pixels: o.MaxPixels = None,
    device: o.Device = "auto",
    threads: o.Threads = None,
    offline: o.Offline = False,
    registry: o.RegistryFile = None,
    as_json: AsJson = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Compare two models on your images: on how much they agree, and which is faster.

    segcli models compare my.onnx my-int8.onnx --on photos/ -r
    """
    import sys

    from segcli.cli import console, engines, progress
    from segcli.inputs import check_arguments, open_sources

    talk, names = console.Talk(quiet=quiet), engines.open_registry(registry)
    check_arguments(on, recursive=recursive)
    failed = 0

    def refuse(error: ImageError) -> None:
        nonlocal failed
        failed += 1
        talk.image_error(error)

    with console.results() as out:
        one, other = (
            engines.open_model(
                name,
                None,
                names,
                talk,
                device=device,
                threads=threads,
                shared=False,
                offline=offline,
                wait=True,
            )
            for name in (first, second)
        )
        from segcli.comparison import compare_models
        from segcli.image_io import DEFAULT_MAX_PIXELS
        from segcli.reading import RunOptions

        with progress.status(talk) as show:
            found = compare_models(
                one,
                other,
                open_sources(on, recursive=recursive, stdin=sys.stdin.buffer),
                RunOptions(max_pixels=max_pixels or DEFAULT_MAX_PIXELS),
                refuse=refuse,
                tell=show,
            )
        if as_json:
            console.dump_json(out, found.to_dict())
        else:
            _write_comparison(found, out)
    if failed:
        raise typer.Exit(ExitCode.SOME_FAILED)


def _write_comparison(found: "Comparison", out: "Results") -> None:
    """Writes ``name<TAB>value``, then ``iou<TAB>class<TAB>value``."""
    from segcli.cli.console import visible

    out.line(f"images\t{found.images}")
    out.line(f"agreement\t{found.agreement:.6g}")
    if found.lowest:
        out.line(f"lowest\t{found.lowest[1]:.6g}\t{visible(found.lowest[0])}")
    if found.miou is not None:
        out.line(f"miou\t{found.miou:.6g}")
    if found.largest_difference is not None:
        out.line(f"largest_difference\t{found.largest_difference:.6g}")
    out.line(f"speed\t{found.speed:.3g}")
    for name, iou in found.class_iou:
        out.line(f"iou\t{visible(name)}\t{iou:.6g}")


for _name, _command in (
    ("list", list_models),
    ("show", show),
    ("pull", pull),
    ("rm", remove_models),
    ("verify", verify),
    ("compare", compare),
):
    app.command(_name, help=o.manual(_command), epilog=o.EXIT_CODES)(_command)


def _required(names: list[str] | None) -> list[str]:
    if not names:
        raise UsageError("no model named", hint="'segcli models list' shows every name")
    return names


def _place(spec: "ModelSpec") -> str:
    from segcli.store import locate

    if spec.embedded:
        return "embedded"
    return "cached" if locate(spec) else "not here"


def _figure(spec: "ModelSpec") -> str:
    return f"{spec.figures[0].metric} {spec.figures[0].value:g}" if spec.figures else ""


def _row(spec: "ModelSpec") -> list[str]:
    parameters = f"{spec.parameters / 1e6:.2f} M" if spec.parameters else ""
    return [
        spec.name,
        spec.task,
        spec.dataset,
        spec.variant,
        parameters,
        _figure(spec),
        _place(spec),
        spec.license,
    ]


def _draw_table(specs: list["ModelSpec"], out: "Results") -> None:
    from rich.table import Table
    from rich.text import Text

    from segcli.cli.console import terminal

    table = Table(box=None, pad_edge=False)
    for title in (
        "name",
        "task",
        "classes",
        "variant",
        "parameters",
        "published",
        "here",
        "licence",
    ):
        table.add_column(title, overflow="fold")
    for spec in specs:
        table.add_row(*(Text(cell) for cell in _row(spec)))
    screen = terminal(out)
    screen.print(table)
    notes = {spec.license: spec.license_note for spec in specs if spec.license_note}
    for name, note in notes.items():
        screen.print(f"\n{name}: {note}")


def _spec_dict(spec: "ModelSpec") -> dict[str, Any]:
    from dataclasses import asdict

    shown = asdict(spec)
    shown["checkpoint"] = str(spec.checkpoint) if spec.checkpoint else None
    shown["here"] = _place(spec)
    return shown


def _write_fields(fields: dict[str, Any], out: "Results", indent: str = "") -> None:
    from segcli.cli.console import visible

    for key, value in fields.items():
        if isinstance(value, dict):
            out.line(f"{indent}{key}:")
            _write_fields(value, out, indent + "  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            out.line(f"{indent}{key}:")
            for item in value:
                out.line(f"{indent}  " + ", ".join(f"{k} {v}" for k, v in item.items()))
        elif key == "class_names":
            out.line(f"{indent}{key}:")
            for i, name in enumerate(value):
                out.line(f"{indent}  {i}\t{visible(name)}")
        elif key == "palette":
            colors = " ".join("#{:02x}{:02x}{:02x}".format(*color) for color in value)
            out.line(f"{indent}{key}: {colors}")
        elif value not in (None, "", (), []):
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            out.line(f"{indent}{key}: {visible(shown)}")
