"""Single files behind ``http://`` and ``https://``, read with the standard library."""

import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from segcli import __version__
from segcli.errors import ImageMissing

if TYPE_CHECKING:
    from http.client import HTTPResponse

_TIMEOUT_S = 30.0
_BLOCK_BYTES = 1 << 20
# Of content, by RFC 9110, 8.4.1, and those that came after.
_ENCODINGS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
# An answer may have no end; an image of 179 million pixels, the most unless asked for more, has
# half of it.
_MOST_BYTES = 1 << 30
_PAUSES_S = (0.2, 1.0)  # before the second and the third attempt


def read_web(url: str) -> bytes:
    """Returns what a web server sends for a URL, which is taken as it is, query included.

    Raises:
        ImageMissing: It sends nothing, an error status, less than it said, more than a gigabyte, or
            what it has encoded unasked.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    # What no URL can hold is encoded, what is encoded stays.
    sent = quote(url.encode("utf-8", "surrogateescape"), safe="%/:?#[]@!$&'()*+,;=~")
    reason: Exception | str = ""
    for pause_s in (*_PAUSES_S, None):
        try:
            request = Request(sent, headers={"User-Agent": f"segcli/{__version__}"})
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                return _read_body(answer)
        except HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                break
        except HTTPException as error:
            reason = f"the answer was cut short or is not HTTP ({type(error).__name__})"
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(error, ValueError):
                break
        if pause_s is not None:
            time.sleep(pause_s)
    if isinstance(reason, OSError):
        reason = reason.strerror or str(reason)
    raise ImageMissing(f"cannot read {url!r}: {' '.join(str(reason).split())}")


def _read_body(answer: "HTTPResponse") -> bytes:
    from http.client import IncompleteRead

    encoding = answer.headers.get("Content-Encoding", "")
    if encoding.lower() in _ENCODINGS:
        raise ValueError(f"it comes as {encoding}, which was not asked for")
    data = bytearray()
    while block := answer.read(_BLOCK_BYTES):
        data += block
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is more than {_MOST_BYTES >> 20} MB")
    # Only a read without a limit would say so.
    if answer.length:
        raise IncompleteRead(bytes(data), answer.length)
    return bytes(data)
