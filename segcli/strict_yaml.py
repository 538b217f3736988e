"""A YAML file of mappings, read strictly: every complaint names file, entry, key and value."""

import reprlib
from typing import Any

from segcli.errors import RegistryError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16


class Entry:
    """One mapping of a registry file; every complaint names file, entry, key and value."""

    def __init__(self, where: str, raw: object) -> None:
        if not isinstance(raw, dict):
            raise RegistryError(f"{where}: found {shown(raw)}, expected a mapping")
        self.where = where
        self.raw: dict[str, Any] = raw
        for key in raw:
            if not isinstance(key, str):
                raise RegistryError(
                    f"{where}: found the key {shown(key)}, expected text",
                    hint="put it in quotes",
                )

    def wrong(self, key: str, expected: str) -> RegistryError:
        """Returns the error for a value of the wrong kind."""
        found = shown(self.raw.get(key))
        return RegistryError(f"{self.where}, key {key!r}: found {found}, expected {expected}")

    def refuse_unknown(self, *known: str) -> None:
        """Raises RegistryError for a key that is not known."""
        for key in self.raw:
            if key not in known:
                raise RegistryError(
                    f"{self.where}: unknown key {shown(key)}, expected {', '.join(known)}"
                )

    def required(self, key: str) -> object:
        """Returns a value that must be there."""
        if key not in self.raw:
            raise RegistryError(f"{self.where}: the key {key!r} is missing")
        return self.raw[key]

    def text(self, key: str, default: str | None = None) -> str:
        """Returns text that is not empty."""
        if key not in self.raw and default is not None:
            return default
        value = self.required(key)
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value.strip()
        raise self.wrong(key, "text" if isinstance(value, str) else "text, in quotes")

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """Returns one of the choices."""
        value = self.required(key)
        if isinstance(value, str) and value in choices:
            return value
        raise self.wrong(key, " or ".join(choices))

    def number(self, key: str) -> float | None:
        """Returns a positive number, None without."""
        if key not in self.raw:
            return None
        value = self.raw[key]
        # Exact types: True is an int. The bound comes first: an int may exceed any float.
        if type(value) in (int, float) and 0 < value < 1e15:
            return float(value)
        raise self.wrong(key, "a positive number")

    def integer(self, key: str) -> int | None:
        """Returns a positive whole number, None without."""
        if key not in self.raw:
            return None
        value = self.raw[key]
        if type(value) is int and 0 < value < 1 << 50:
            return value
        raise self.wrong(key, "a positive whole number")

    def mapping(self, key: str) -> dict[str, Any]:
        """Returns a mapping with text keys."""
        return Entry(f"{self.where}, key {key!r}", self.required(key)).raw


def parse(data: bytes, where: str, *, trusted: bool) -> object:
    """Returns what a YAML file says.

    Args:
        data: The file's bytes.
        where: The file, for messages.
        trusted: Skips the search for aliases and deep nesting.

    Raises:
        RegistryError: It is no YAML, too large, or of a form that could exhaust the machine.
    """
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


def shown(value: object) -> str:
    """Returns a short form for messages, whatever a file or a command line holds."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    shortener.maxlevel = 2
    try:
        return shortener.repr(value)
    except ValueError:  # more digits than Python prints
        return "a huge number"
