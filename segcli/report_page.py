"""How a report's parts become HTML: its templates, and what makes any text fit to be shown."""

import base64
import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.resources import files
from types import TracebackType
from typing import Any, Self

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from segcli.artifact import Preprocessing
from segcli.errors import OutputWriteError

_CHUNK_BYTES = 1 << 16

# What a browser draws nothing for, or ends a line at, as its own picture: U+2400 and on.
_VISIBLE = {c: 0x2400 + c for c in range(32)} | {127: 0x2421}
_VISIBLE |= dict.fromkeys(range(128, 160), 0xFFFD)

# How each page begins: another file is not replaced by one.
PAGE_START = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="segcli">
"""


def describe_preprocessing(how: Preprocessing) -> str:
    """Returns how an image becomes the model's input, in words and in order."""
    steps = {
        "none": "no resize",
        "squash": f"resized to {how.size_hw} (height, width), {how.interpolation}",
        "shortest_edge": f"shorter side to {how.shortest_edge}, {how.interpolation}",
    }[how.resize]
    if how.crop_hw:
        steps += f"; centre crop {how.crop_hw}"
    if how.rescale is not None:
        steps += f"; times {how.rescale:.6g}"
    if how.mean is not None and how.std is not None:
        steps += f"; mean {_numbers(how.mean)}, std {_numbers(how.std)}"
    return steps


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{v:.6g}" for v in values)


def visible_text(text: str) -> str:
    """Returns a text that any browser shows: no control characters, no undecodable bytes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_VISIBLE)


def open_templates() -> Environment:
    """Returns the templates: all that is put into them is made visible and escaped."""

    def shown(value: Any) -> Any:  # noqa: ANN401
        return (
            visible_text(value)
            if isinstance(value, str) and not hasattr(value, "__html__")
            else value
        )

    made = Environment(
        loader=FunctionLoader(read_data),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    made.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    made.filters["digits"] = _digits
    return made


def _digits(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(str(_digits(one)) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if type(value) is int else value


def read_data(name: str) -> str:
    """Returns a file of the package's data."""
    return files("segcli.data").joinpath(name).read_text("utf-8")


def page_assets() -> dict[str, str]:
    """Returns the page's style and script, and what its policy calls the script by.

    That is the digest of CSP level 3, 2.3.1: any other script is refused.
    """
    script = read_data("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "style": Markup(read_data("report.css")),
        "script": Markup(script),
        "script_hash": digest,
    }


def data_uri(kind: str, data: bytes) -> Markup:
    """Returns a file's bytes as an address, ready to stand in an attribute."""
    # Markup, as escaping would search each for what base64 never has.
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


class Spool:
    """HTML in an unnamed temporary file, until the page's beginning can be written.

    Args:
        target: Of the page, for messages.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> Self:
        """Returns the spool, which is gone when the block ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drops what was written."""
        # What is still in a buffer may find no room; nobody needs it any more.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, part: str) -> None:
        """Adds HTML.

        Raises:
            OutputWriteError: There is no room for it.
        """
        try:
            self._file.write(part.encode())
        except OSError as error:
            raise OutputWriteError(
                f"cannot write {self._target!r}: its temporary file: {error.strerror}",
                hint="TMPDIR names a folder with more room",
            ) from error

    def parts(self) -> Iterator[Markup]:
        """Yields all that was written, in pieces."""
        self._file.seek(0)
        decode = io.TextIOWrapper(self._file, "utf-8", newline="")
        for part in iter(partial(decode.read, _CHUNK_BYTES), ""):
            yield Markup(part)
        decode.detach()
