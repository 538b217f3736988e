"""Options that several commands share, each declared once."""

import inspect
from collections.abc import Callable
from typing import Annotated, Literal

import typer

# A backspace alone on a line keeps the lines of a paragraph as they are.
EXIT_CODES = """\b
Exit codes:
  0    all done or skipped
  1    finished, some images failed
  2    usage, name collision, no image found
  3    model unknown, missing, damaged, not to be fetched, or its export failed
  4    device, session, or cluster
  5    output cannot be written at all
  70   bug
  130  interrupted
  141  reader of stdout went away
  143  terminated"""


def manual(command: Callable[..., object]) -> str:
    """Returns the help of a command: its docstring, whose one-line paragraphs are examples.

    Prose ends with a full stop.
    """
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    prose = [text for text in paragraphs if text.endswith(".")]
    examples = ["Examples:", *(f"  {text}" for text in paragraphs if text not in prose)]
    return "\n\n".join([*prose, "\n".join(["\b", *examples])] if examples[1:] else prose)


Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUTS",
        help="Image files, folders, URLs (s3://, gs://, https://), or - for one image on stdin.",
        show_default=False,
    ),
]


def complete_model(incomplete: str) -> list[str]:
    """Returns the registry's names that begin so, for the shell."""
    from segcli.registry import load_registry

    return [spec.name for spec in load_registry(None) if spec.name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        envvar="SEGCLI_MODEL",
        metavar="MODEL",
        autocompletion=complete_model,
        help="A registry name, or an .onnx file that 'segcli export' wrote.",
    ),
]
DEFAULT_MODEL = "segformer-b0-camvid"

Recursive = Annotated[bool, typer.Option("-r", "--recursive", help="Descend into folders.")]
FilesFrom = Annotated[
    str | None,
    typer.Option(help="List of images, one a line; - is stdin.", metavar="FILE"),
]
Files0From = Annotated[
    str | None,
    typer.Option(
        "--files0-from",
        help="List of images, each ended by NUL; - is stdin.",
        metavar="FILE",
    ),
]
Root = Annotated[
    str | None,
    typer.Option(
        help="Entries of a list keep their place below this folder.",
        metavar="DIR",
    ),
]
Ext = Annotated[
    list[str] | None,
    typer.Option(
        help="A further suffix that counts as an image inside a folder.",
        metavar="SUFFIX",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        show_default="about 179 million",
        help="Refuse larger images.",
        min=1,
    ),
]
AllowTruncated = Annotated[
    bool,
    typer.Option(
        "--allow-truncated",
        help="Take an image that is cut short as far as it goes, instead of an error.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "-n",
        "--dry-run",
        help="Only print what would be read, and written; models and images are not opened.",
    ),
]
Null = Annotated[
    bool,
    typer.Option("-0", "--null", help="End each line on stdout with NUL, for xargs -0."),
]
Resize = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="What the model is shown: model (its own size), short-side[=N] (aspect kept), "
        "native, or WxH.",
    ),
]
Tile = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        show_default="the whole image at once",
        help="Show it windows of this size, and average the logits where they overlap.",
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(
        metavar="PX", show_default="a quarter of --tile", help="Pixels that windows share."
    ),
]
Augment = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Average over flip, scales (0.5 to 1.75), or factors: 'flip,0.75,1,1.25'.",
    ),
]

Device = Annotated[
    str,
    typer.Option(
        envvar="SEGCLI_DEVICE",
        metavar="DEVICE",
        help="auto, cpu, cuda[:N], tensorrt[:N] …; only auto may fall back to the CPU.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="one per usable core",
        help="Images worked on at once, around one session; with --engine ray, processes.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="all usable cores for one image at a time, else at most 4",
        help="Threads of one run of the network.",
    ),
]
EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--engine",
        help="local: this process; ray: the workers of a Ray cluster (the extra segcli[ray]).",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="auto|ADDRESS",
        show_default="$RAY_ADDRESS, else one that is started here for the run",
        help="The Ray cluster; auto is the one of this machine.",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        metavar="F", show_default="none", help="GPUs of each Ray worker; 0.5 puts two on one."
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="i/N",
        help="Do the i-th part of N only; 1/N to N/N are disjoint and make the whole.",
    ),
]
Report = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="One page to look through the run with: pictures, legend, sort, filter, failures.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Images that go through the network together on a GPU; the CPU takes one at a time.",
    ),
]
FastDecode = Annotated[
    bool,
    typer.Option(
        "--fast-decode",
        help="Decode a large JPEG at 1/2, 1/4 or 1/8 of its size, still twice what the model sees.",
    ),
]
FailFast = Annotated[
    bool,
    typer.Option("--fail-fast", help="Stop at the first image that fails."),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", envvar="SEGCLI_OFFLINE", help="Never fetch a model."),
]
RegistryFile = Annotated[
    str | None,
    typer.Option(
        "--registry",
        envvar="SEGCLI_REGISTRY",
        metavar="FILE",
        help="A file of your own models, in the form of models.yaml.",
    ),
]

Json = Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")]
Jsonl = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help="One JSON object a line, as soon as each image is done.",
    ),
]
Timing = Annotated[
    bool,
    typer.Option(
        "--timing/--no-timing",
        help="Keep elapsed_ms in records; without, two runs diff empty.",
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="A line per image.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="SEGCLI_DEBUG", help="Tracebacks of errors."),
]
