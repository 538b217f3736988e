"""``segcli labels``: the classes of a model, and their colors."""

from typing import Annotated

import typer

from segcli.cli import options as o
from segcli.errors import ModelNotFound, UsageError


def labels(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=o.DEFAULT_MODEL,
            autocompletion=o.complete_model,
            help="A registry name that is on this machine, or an .onnx file.",
        ),
    ] = o.DEFAULT_MODEL,
    registry: o.RegistryFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    debug: o.Debug = False,
) -> None:
    """List a model's classes in the order of their ids, with the colors of a segmentation model.

    In the form that 'segcli export --labels FILE' takes: CSV, or one name a line.

    segcli labels

    segcli labels my.onnx > names.csv
    """
    from segcli.cli import console, engines
    from segcli.labels import labels_text
    from segcli.onnx_file import read_card
    from segcli.store import locate

    names = engines.open_registry(registry)
    path = engines.find_model(model, None, names) or locate(names.get(model))
    if path is None:
        raise ModelNotFound(
            f"{model!r} is not on this machine", hint=f"'segcli models pull {model}' gets it"
        )
    card = read_card(path)
    if not card.class_names:
        raise UsageError(f"{model!r} gives features, no classes")
    colors = card.palette or [None] * len(card.class_names)
    with console.results() as out:
        if as_json:
            found = [
                {"class_id": i, "name": name, "color": color and list(color)}
                for i, (name, color) in enumerate(zip(card.class_names, colors, strict=True))
            ]
            console.dump_json(out, found)
        else:
            out.write(labels_text(card.class_names, card.palette).encode())
