"""``segcli export``: a checkpoint into one self-describing .onnx file."""

import io
import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segcli.artifact import MIN_IMAGE_SIZE
from segcli.cli import options as o
from segcli.errors import OutputError, OutputWriteError, UsageError
from segcli.inputs import STDIN, check_arguments, open_sources

if TYPE_CHECKING:
    from segcli.cli.console import Talk
    from segcli.export.convert import ExportRequest
    from segcli.registry import Registry


class ExportTask(StrEnum):
    """What the exported graph is for."""

    SEGMENTATION = "segmentation"
    CLASSIFICATION = "classification"
    FEATURES = "features"


class Storage(StrEnum):
    """How the weights are stored."""

    FP32 = "fp32"
    FP16 = "fp16"


class Precision(StrEnum):
    """What the graph computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


def export(
    name: Annotated[str | None, typer.Argument(help="A registry name.", show_default=False)] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE.onnx", help="The file to write.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|ORG/REPO[@REV]",
            help="A Hugging Face folder or id, or a safetensors, PyTorch, .h5 or .tflite file.",
        ),
    ] = None,
    task: Annotated[
        ExportTask | None, typer.Option(help="Default: what the checkpoint's head is for.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            show_default="all but single blocks",
            help="Outputs of --task features. SegFormer: stage_1 …, last_hidden_state, "
            "attention_S_B; MobileNetV2: last_hidden_state, pooler_output, expansion_N.",
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="A fixed input size; default: dynamic.")
    ] = None,
    weights: Annotated[
        Storage, typer.Option(help="Storage of weights; what the graph computes in stays the same.")
    ] = Storage.FP32,
    precision: Annotated[
        Precision,
        typer.Option(
            help="What the graph computes in: fp16 is for GPUs, int8 for small files of SegFormer."
        ),
    ] = Precision.FP32,
    verify_images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Images, or folders of them, on which a lower precision has to agree with fp32.",
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How far, 0 to 1; default: 0.995 for fp16, 0.98 for int8; features 0.98 and 0.95.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="VARIANT", help="b0 … b5 or a depth multiplier, for a file without config.json."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Class names: one a line, JSON, or id,name,r,g,b CSV."),
    ] = None,
    card_name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The model's name in its records.")
    ] = None,
    license_name: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="TEXT", help="Licence of the weights, for the ModelCard."
        ),
    ] = None,
    offline: o.Offline = False,
    registry: o.RegistryFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Trace a PyTorch reference model with a checkpoint's weights into one .onnx file.

    segcli export segformer-b2 -o segformer-b2.onnx

    segcli export --checkpoint my-finetune/ -o my.onnx

    segcli export --checkpoint weights.pth --variant b1 --labels names.txt -o my.onnx

    segcli export --checkpoint mobilenet_v2_1.0_224_quant.tflite -o my.onnx

    segcli export segformer-b2 --precision fp16 --verify-images photos/ -o b2-fp16.onnx

    Nothing is written unless the graph reproduces PyTorch's outputs, and a lower precision the
    answers of fp32.
    """
    from segcli.atomic import write_atomic
    from segcli.cli import console, engines
    from segcli.store import require_export
    from segcli.writers import OutputPlan, check_place

    if (name is None) == (checkpoint is None):
        raise UsageError("name a registry model or give --checkpoint, one of the two")
    if output is None:
        raise UsageError("-o is missing", hint=f"add -o {name or 'model'}.onnx")
    if Path(output).is_dir():
        raise UsageError(f"-o {output!r} is a folder, expected a file that ends in .onnx")
    if Path(output).suffix != ".onnx":
        raise UsageError(f"-o {output!r} does not name a file that ends in .onnx")
    if checkpoint == "":
        raise UsageError("--checkpoint is empty")
    chosen = [] if layers is None else [name.strip() for name in layers.split(",")]
    if not all(chosen):
        raise UsageError(f"--layers {layers!r} has an empty name")
    if layers is not None and task is not ExportTask.FEATURES:
        raise UsageError("--layers goes with --task features")
    size_hw = _parse_size(image_size)
    images = _verification(precision, verify_images or [], min_agreement)
    require_export("'segcli export'")
    talk = console.Talk(quiet=quiet)
    names = engines.open_registry(registry)
    request = _request(name, checkpoint, names, talk, offline=offline)
    # What can be known of the output's place is said before minutes of work, not after.
    check_place(OutputPlan("file", output, ()))
    from segcli.export.convert import export_model
    from segcli.labels import read_labels

    if card_name and card_name in names:
        # Weights that go under a registry name go under its licence.
        spec = names.get(card_name)
        request = replace(request, license=spec.license, license_note=spec.license_note)
    if license_name:
        request = replace(request, license=license_name, license_note="")
    request = replace(
        request,
        name=card_name or request.name,
        task=task.value if task else request.task,
        layers=tuple(dict.fromkeys(chosen)),
        variant=variant,
        labels=read_labels(Path(labels)) if labels else None,
        size_hw=size_hw,
        storage=weights.value,
        precision=precision.value,
        verify_images=images,
        min_agreement=min_agreement,
    )
    report = export_model(request)
    try:
        write_atomic(output, report.data)
    except OutputWriteError as error:
        raise OutputError(str(error)) from error
    for note in report.notes:
        talk.note(f"note: {note}")
    card = report.card
    with console.results() as out:
        if as_json:
            console.dump_json(
                out,
                {
                    "path": output,
                    "sha256": report.sha256,
                    "bytes": len(report.data),
                    "parameters": report.parameters,
                    "notes": report.notes,
                    "card": card.to_dict(),
                },
            )
            return
        out.line(output)
        difference = card.verification["max_rel_diff"]
        sizes = ", ".join(f"{h}x{w}" for h, w in card.verification["sizes_hw"])
        out.line(f"sha256 {report.sha256}")
        out.line(
            f"max difference to PyTorch {difference:g} of the output's scale "
            f"(allowed {card.verification['tolerance']:g}), at {sizes}, "
            f"batch {' and '.join(map(str, card.verification['batches']))}"
        )
        if "fp16_max_rel_diff" in card.verification:
            out.line(f"after rounding weights to fp16 {card.verification['fp16_max_rel_diff']:g}")
    if "precision" in card.verification:
        talk.note(_agreement(card.verification["precision"]))
    talk.note(
        f"{card.family} {card.variant}, {card.task}, {len(card.class_names)} classes, "
        f"{report.parameters / 1e6:.2f} M parameters, {len(report.data) / 1e6:.1f} MB, "
        f"licence {card.license}"
    )


def _request(
    name: str | None, checkpoint: str | None, registry: "Registry", talk: "Talk", *, offline: bool
) -> "ExportRequest":
    from segcli import store

    if name is not None:
        return store.export_request(registry.get(name), offline=offline, tell=talk.note)
    assert checkpoint is not None
    return store.checkpoint_request(checkpoint, registry, offline=offline, tell=talk.note)


def _verification(
    precision: Precision, args: list[str], min_agreement: float | None
) -> tuple[str, ...]:
    """Returns the image files of ``--verify-images``.

    Raises:
        UsageError: There is none where the precision needs them, or they go with nothing.
    """
    if precision is Precision.FP32:
        if args or min_agreement is not None:
            raise UsageError("--verify-images and --min-agreement go with --precision fp16 or int8")
        return ()
    if not args:
        raise UsageError(
            f"--precision {precision} needs --verify-images",
            hint="name some images of the kind that the model is for, or a folder of them",
        )
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement:g} is not between 0 and 1")
    if STDIN in args:
        raise UsageError("--verify-images takes files and folders, not stdin ('-')")
    try:
        check_arguments(args)
    except UsageError as error:
        hint = "a folder stands for the images directly inside it"
        raise UsageError(f"--verify-images: {error}", hint=hint) from error
    return tuple(source.path for source in open_sources(args, stdin=io.BytesIO()))


def _agreement(found: dict[str, Any]) -> str:
    text = (
        f"{found['kind']} agrees with fp32 by {found['agreement']:g} "
        f"(required {found['bound']:g}) on {found['images']} images"
    )
    if "max_score_diff" in found:
        return f"{text}, scores differ by {found['max_score_diff']:g} at most"
    return f"{text}, by {found['lowest']:g} on the worst"


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """Returns (height, width) of ``HxW``.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None or min(int(match[1]), int(match[2])) < MIN_IMAGE_SIZE:
        raise UsageError(
            f"--image-size {text!r} is not of the form HxW with at least {MIN_IMAGE_SIZE} each, "
            "such as 512x512"
        )
    return int(match[1]), int(match[2])
