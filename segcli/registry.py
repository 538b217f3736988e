"""The models known by name: models.yaml, and a user's own file of the same form.

Turns a name into a ``ModelSpec``: what the model is, where its weights come from, under which
licence, and what was published of it. Nothing is fetched or opened but the registry file, and
nothing heavy imported: shell completion asks here for names.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from segcli.errors import ModelNotFound, RegistryError

SCHEMA = 1
MAX_BYTES = 1 << 20
MAX_DEPTH = 16

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


@dataclass(frozen=True)
class Registry:
    """Models by name, in the order of the files that name them."""

    specs: Mapping[str, ModelSpec]

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
            f"unknown model {_shown(name)}; the nearest names are {', '.join(near)}",
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
    licenses, specs = _builtin()
    if extra is not None:
        try:
            with extra.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RegistryError(
                f"cannot read registry file {str(extra)!r}: {reason}",
                hint="--registry and SEGCLI_REGISTRY name a YAML file in the form of models.yaml",
            ) from error
        _, own = _read(data, f"registry file {str(extra)!r}", licenses, extra.parent)
        specs = {**specs, **own}
    return Registry(specs)


_License = tuple[str, str, str]


@cache
def _builtin() -> tuple[dict[str, _License], dict[str, ModelSpec]]:
    from importlib.resources import files

    data = (files("segcli.data") / "models.yaml").read_bytes()
    return _read(data, "models.yaml", {}, None)


def _read(
    data: bytes, where: str, licenses: dict[str, _License], folder: Path | None
) -> tuple[dict[str, _License], dict[str, ModelSpec]]:
    top = _Entry(where, _parse(data, where, trusted=folder is None))
    top.refuse_unknown("schema", "licenses", "models")
    if top.required("schema") != SCHEMA:
        raise top.wrong("schema", str(SCHEMA))
    licenses = dict(licenses)
    if "licenses" in top.raw:
        for key, raw in top.mapping("licenses").items():
            licenses[key] = _license(_Entry(f"{where}, license {_shown(key)}", raw))
    specs = {}
    for name, raw in top.mapping("models").items():
        if not _NAME.fullmatch(name) or name.lower().endswith(".onnx"):
            raise RegistryError(
                f"{where}: found the name {_shown(name)}, expected letters, digits, '.', '_' "
                "and '-', not ending in .onnx"
            )
        entry = _Entry(f"{where}, model {_shown(name)}", raw)
        specs[name] = _spec(name, entry, licenses, folder)
    return licenses, specs


def _spec(
    name: str, entry: "_Entry", licenses: dict[str, _License], folder: Path | None
) -> ModelSpec:
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
            checkpoint = folder / Path(place).expanduser()
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


def _variant(entry: "_Entry", family: Family) -> str:
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


def _license_of(entry: "_Entry", licenses: dict[str, _License]) -> _License:
    value = entry.required("license")
    if isinstance(value, dict):
        return _license(_Entry(f"{entry.where}, key 'license'", value))
    if isinstance(value, str) and value in licenses:
        return licenses[value]
    known = ", ".join(licenses) or "none here"
    raise entry.wrong("license", f"a mapping with a name, or a key of licenses ({known})")


def _license(entry: "_Entry") -> _License:
    entry.refuse_unknown("name", "url", "note")
    return entry.text("name"), entry.text("url", ""), entry.text("note", "")


def _figures(entry: "_Entry") -> tuple[Figure, ...]:
    raw = entry.raw.get("figures", [])
    if not isinstance(raw, list):
        raise entry.wrong("figures", "a list")
    figures = []
    for i, item in enumerate(raw):
        figure = _Entry(f"{entry.where}, figure {i + 1}", item)
        figure.refuse_unknown("metric", "value", "protocol", "source")
        figure.required("value")
        value = figure.number("value")
        if value is None or value > 100:
            raise figure.wrong("value", "per cent, at most 100")
        texts = (figure.text(key) for key in ("protocol", "source"))
        figures.append(Figure(figure.text("metric"), value, *texts))
    return tuple(figures)


class _Entry:
    """One mapping of a registry file; every complaint names file, entry, key and value."""

    def __init__(self, where: str, raw: object) -> None:
        if not isinstance(raw, dict):
            raise RegistryError(f"{where}: found {_shown(raw)}, expected a mapping")
        self.where = where
        self.raw: dict[str, Any] = raw
        for key in raw:
            if not isinstance(key, str):
                raise RegistryError(
                    f"{where}: found the key {_shown(key)}, expected text",
                    hint="put it in quotes",
                )

    def wrong(self, key: str, expected: str) -> RegistryError:
        found = _shown(self.raw.get(key))
        return RegistryError(f"{self.where}, key {key!r}: found {found}, expected {expected}")

    def refuse_unknown(self, *known: str) -> None:
        for key in self.raw:
            if key not in known:
                raise RegistryError(
                    f"{self.where}: unknown key {_shown(key)}, expected {', '.join(known)}"
                )

    def required(self, key: str) -> object:
        if key not in self.raw:
            raise RegistryError(f"{self.where}: the key {key!r} is missing")
        return self.raw[key]

    def text(self, key: str, default: str | None = None) -> str:
        if key not in self.raw and default is not None:
            return default
        value = self.required(key)
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value.strip()
        raise self.wrong(key, "text" if isinstance(value, str) else "text, in quotes")

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.required(key)
        if isinstance(value, str) and value in choices:
            return value
        raise self.wrong(key, " or ".join(choices))

    def number(self, key: str) -> float | None:
        if key not in self.raw:
            return None
        value = self.raw[key]
        # Exact types: True is an int. The bound comes first: an int may exceed any float.
        if type(value) in (int, float) and 0 < value < 1e15:
            return float(value)
        raise self.wrong(key, "a positive number")

    def integer(self, key: str) -> int | None:
        if key not in self.raw:
            return None
        value = self.raw[key]
        if type(value) is int and 0 < value < 1 << 50:
            return value
        raise self.wrong(key, "a positive whole number")

    def mapping(self, key: str) -> dict[str, Any]:
        return _Entry(f"{self.where}, key {key!r}", self.required(key)).raw


def _parse(data: bytes, where: str, *, trusted: bool) -> object:
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: ANN401
            # YAML forbids a key twice, PyYAML takes the last one in silence.
            seen: set[str] = set()
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"the key {key.value!r} occurs twice",
                        key.start_mark,
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    if len(data) > MAX_BYTES:
        raise RegistryError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
        if not trusted:
            _refuse_bombs(text, where, base)
        return yaml.load(text, Loader)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RegistryError(
            f"{where}, line {line}: found byte 0x{data[error.start]:02x}, expected UTF-8"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RegistryError(f"{place}: {problem}") from error
    except (ValueError, OverflowError) as error:
        # What PyYAML's constructors raise for 2024-99-99 and the like.
        raise RegistryError(f"{where}: {error}") from error


def _refuse_bombs(text: str, where: str, loader: Any) -> None:  # noqa: ANN401
    # Aliases make small files huge, and libyaml's composer overflows the C stack on deep nesting.
    import yaml

    depth = 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        alias = isinstance(event, yaml.AliasEvent)
        if alias or depth > MAX_DEPTH:
            mark = event.start_mark
            found = "an alias" if alias else f"nesting deeper than {MAX_DEPTH}"
            raise RegistryError(
                f"{where}, line {mark.line + 1 if mark else 1}: found {found}, "
                "expected the plain form of models.yaml"
            )


def _shown(value: object) -> str:
    # Short, whatever a file or a command line holds.
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    shortener.maxlevel = 2
    try:
        return shortener.repr(value)
    except ValueError:  # more digits than Python prints
        return "a huge number"
