"""The models known by name: models.yaml, and a user's own file of the same form.

Turns a name into a ``ModelSpec``: what the model is, where its weights come from, under which
licence, and what was published of it. Nothing is fetched or opened but the registry file, and
nothing heavy imported: shell completion asks here for names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, cast, get_args

from segcli.errors import ModelNotFound, RegistryError
from segcli.strict_yaml import MAX_BYTES, Entry, parse, shown

SCHEMA = 1

Family = Literal["segformer", "mobilenet_v2"]
Task = Literal["segmentation", "classification"]

# No name reads as a path, a hub repository or an option.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SEGFORMER_VARIANT = re.compile(r"b[0-5]")
_MULTIPLIER = re.compile(r"[0-9]\.[0-9]{1,3}")


@dataclass(frozen=True)
class Figure:
    """One published result.

    Attributes:
        metric: ``mIoU``, ``top-1``, ``top-5``.
        value: In per cent.
        protocol: Data and procedure the value holds for.
        source: Where it was published.
    """

    metric: str
    value: float
    protocol: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the registry says of one model.

    Attributes:
        name: The name users type.
        family: Which reference model in ``segcli.export`` it is.
        variant: ``b0`` … ``b5``, or the depth multiplier as "1.0".
        task: What its first output means.
        source: Hub repository; where ``embedded`` or ``checkpoint`` is set, that as text.
        revision: Branch, tag or commit of the hub repository; "" without one.
        license: Name of the licence of the weights.
        license_url: Its text, or "".
        license_note: What it means for a user, or "".
        dataset: What the classes come from, or "".
        num_labels: Channels of the logits; None where the entry does not say.
        parameters: Learned values of the reference model; None where not said.
        size_bytes: About what a download takes; None where not said.
        figures: Published results.
        embedded: Name of the .onnx within ``segcli.data``, or None.
        checkpoint: Local folder or weight file, or None; it may not be there.
    """

    name: str
    family: Family
    variant: str
    task: Task
    source: str
    revision: str
    license: str
    license_url: str
    license_note: str
    dataset: str
    num_labels: int | None
    parameters: int | None
    size_bytes: int | None
    figures: tuple[Figure, ...]
    embedded: str | None
    checkpoint: Path | None


class Registry:
    """Models by name, in the order of the files that name them.

    Args:
        own: The models of a user's file, None without one.
    """

    def __init__(self, own: Mapping[str, ModelSpec] | None = None) -> None:
        self.extended = own is not None
        self._own = own or {}

    @cached_property
    def specs(self) -> Mapping[str, ModelSpec]:
        """The models; models.yaml is read at the first look."""
        return {**_builtin()[1], **self._own}

    def __iter__(self) -> Iterator[ModelSpec]:
        """Yields the models; one that was replaced keeps its place."""
        return iter(self.specs.values())

    def __len__(self) -> int:
        """Returns how many models there are."""
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        """Returns whether ``get(name)`` gives a model."""
        return name in self.specs

    def names(self) -> tuple[str, ...]:
        """Returns what ``get`` takes."""
        return tuple(self.specs)

    def get(self, name: str) -> ModelSpec:
        """Returns the model of that name.

        Raises:
            ModelNotFound: There is none; the message lists the nearest three.
        """
        if name in self.specs:
            return self.specs[name]
        from difflib import get_close_matches

        # Without a cutoff, so that nonsense too is shown what a name looks like.
        near = get_close_matches(name[:80].lower(), self.specs, n=3, cutoff=0.0)
        raise ModelNotFound(
            f"unknown model {shown(name)}; the nearest names are {', '.join(near)}",
            hint="'segcli models list' shows every name; a path to an .onnx file works too",
        )


def load_registry(extra: Path | None = None) -> Registry:
    """Returns the built-in models, with those of a user's file added or put in their place.

    Args:
        extra: A file of the same form as models.yaml. Its entries may name licences of
            models.yaml, and local checkpoints relative to the file.

    Raises:
        RegistryError: A file cannot be read, or something in it is wrong.
    """
    if extra is None:
        return Registry()
    try:
        with extra.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RegistryError(
            f"cannot read registry file {str(extra)!r}: {reason}",
            hint="--registry and SEGCLI_REGISTRY name a YAML file in the form of models.yaml",
        ) from error
    licenses, _ = _builtin()
    _, own = _read(data, f"registry file {str(extra)!r}", licenses, extra.parent)
    return Registry(own)


_License = tuple[str, str, str]


@cache
def _builtin() -> tuple[dict[str, _License], dict[str, ModelSpec]]:
    from importlib.resources import files

    data = (files("segcli.data") / "models.yaml").read_bytes()
    return _read(data, "models.yaml", {}, None)


def _read(
    data: bytes, where: str, licenses: dict[str, _License], folder: Path | None
) -> tuple[dict[str, _License], dict[str, ModelSpec]]:
    top = Entry(where, parse(data, where, trusted=folder is None))
    top.refuse_unknown("schema", "licenses", "models")
    if top.required("schema") != SCHEMA:
        raise top.wrong("schema", str(SCHEMA))
    licenses = dict(licenses)
    if "licenses" in top.raw:
        for key, raw in top.mapping("licenses").items():
            licenses[key] = _license(Entry(f"{where}, license {shown(key)}", raw))
    specs = {}
    for name, raw in top.mapping("models").items():
        if not _NAME.fullmatch(name) or name.lower().endswith(".onnx"):
            raise RegistryError(
                f"{where}: found the name {shown(name)}, expected letters, digits, '.', '_' "
                "and '-', not ending in .onnx"
            )
        entry = Entry(f"{where}, model {shown(name)}", raw)
        specs[name] = _spec(name, entry, licenses, folder)
    return licenses, specs


def _spec(name: str, entry: Entry, licenses: dict[str, _License], folder: Path | None) -> ModelSpec:
    places = ("source", "embedded" if folder is None else "checkpoint")
    entry.refuse_unknown(
        *("family", "variant", "task", *places, "revision", "license", "dataset"),
        *("num_labels", "parameters", "download_mb", "figures"),
    )
    found = [key for key in places if key in entry.raw]
    if len(found) != 1:
        raise RegistryError(
            f"{entry.where}: found {' and '.join(found) or 'neither'}, "
            f"expected one of the keys {' and '.join(map(repr, places))}"
        )
    place = entry.text(found[0])
    if found == ["source"] and (not _REPO.fullmatch(place) or ".." in place):
        raise entry.wrong("source", "a hub repository 'owner/name'")
    if found != ["source"] and "revision" in entry.raw:
        raise entry.wrong("revision", "none without a hub repository as source")
    checkpoint = None
    if found == ["checkpoint"] and folder is not None:
        try:
            # The cache knows a model by this: two folders may hold the same relative path.
            checkpoint = (folder / Path(place).expanduser()).absolute()
        except RuntimeError as error:
            raise entry.wrong("checkpoint", "a path under a known home") from error
    elif found == ["embedded"] and ("/" in place or not place.endswith(".onnx")):
        raise entry.wrong("embedded", "the name of an .onnx file")

    family = cast(Family, entry.choice("family", get_args(Family)))
    size = entry.number("download_mb")
    license_name, url, note = _license_of(entry, licenses)
    return ModelSpec(
        name=name,
        family=family,
        variant=_variant(entry, family),
        task=cast(Task, entry.choice("task", get_args(Task))),
        source=str(checkpoint) if checkpoint else place,
        revision=entry.text("revision", "main") if found == ["source"] else "",
        license=license_name,
        license_url=url,
        license_note=note,
        dataset=entry.text("dataset", ""),
        num_labels=entry.integer("num_labels"),
        parameters=entry.integer("parameters"),
        size_bytes=None if size is None else round(size * 1e6),
        figures=_figures(entry),
        embedded=place if found == ["embedded"] else None,
        checkpoint=checkpoint,
    )


def _variant(entry: Entry, family: Family) -> str:
    value = entry.required("variant")
    if family == "segformer":
        if isinstance(value, str) and _SEGFORMER_VARIANT.fullmatch(value):
            return value
        raise entry.wrong("variant", "b0, b1, b2, b3, b4 or b5")
    # YAML reads an unquoted 1.0 as a number.
    text = str(value) if isinstance(value, float) else value
    if isinstance(text, str) and _MULTIPLIER.fullmatch(text) and float(text) > 0:
        return text
    raise entry.wrong("variant", 'a depth multiplier such as "1.0" or "0.35"')


def _license_of(entry: Entry, licenses: dict[str, _License]) -> _License:
    value = entry.required("license")
    if isinstance(value, dict):
        return _license(Entry(f"{entry.where}, key 'license'", value))
    if isinstance(value, str) and value in licenses:
        return licenses[value]
    known = ", ".join(licenses) or "none here"
    raise entry.wrong("license", f"a mapping with a name, or a key of licenses ({known})")


def _license(entry: Entry) -> _License:
    entry.refuse_unknown("name", "url", "note")
    return entry.text("name"), entry.text("url", ""), entry.text("note", "")


def _figures(entry: Entry) -> tuple[Figure, ...]:
    raw = entry.raw.get("figures", [])
    if not isinstance(raw, list):
        raise entry.wrong("figures", "a list")
    figures = []
    for i, item in enumerate(raw):
        figure = Entry(f"{entry.where}, figure {i + 1}", item)
        figure.refuse_unknown("metric", "value", "protocol", "source")
        figure.required("value")
        value = figure.number("value")
        if value is None or value > 100:
            raise figure.wrong("value", "per cent, at most 100")
        texts = (figure.text(key) for key in ("protocol", "source"))
        figures.append(Figure(figure.text("metric"), value, *texts))
    return tuple(figures)
