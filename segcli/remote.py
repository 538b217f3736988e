"""Objects of S3 and GCS buckets, and of this process's memory; the only importer of obstore.

The package comes with the extra ``remote`` and is imported at the first URL. Credentials, region
and endpoint are the environment's (``AWS_*``, ``GOOGLE_*``) or the machine's own; where boto3 is
installed and the environment has no key, its profiles and logins count.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, NoReturn
from urllib.parse import urlsplit

from segcli.errors import (
    ImageMissing,
    OutputError,
    OutputExists,
    OutputWriteError,
    SegcliError,
    UsageError,
)
from segcli.urls import split_url

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# A host that is not there has failed after 20 seconds, one that stalls after a minute.
_CLIENT: "ClientConfig" = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=10),
    # Only where the user's own endpoint is http://: a MinIO beside the machine, for instance.
    "allow_http": True,
}
_RETRY: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}

# What a listing answers at once.
_PAGE = 1000
# Above it each part has its own time to arrive. What a killed run leaves of them is no object.
_ONE_PUT = 64 << 20

# Sorts behind every other name in its folder.
_LAST = "\U0010ffff"

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with boto3 also AWS_PROFILE), or "
    "AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
}
_REGION = "set AWS_REGION to the bucket's region"

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_REGION_NAME = re.compile(r"[A-Za-z0-9_-]+")

_UNLISTED = "such a folder cannot be listed; name its other keys in a list: --files-from"

# What obstore asks where the environment has no credentials, or only the half of them.
_NO_KEY = re.compile(
    r"/latest/api/token|/latest/meta-data|169\.254\.170\.2|metadata\.google\.internal|"
    r"Missing (?:AccessKeyId|SecretAccessKey)"
)
_STATUS = re.compile(r"status code: (\d{3}) ([\w ]+)")
_CODE = re.compile(r"<Code>(.*?)</Code>", re.DOTALL)
_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_SERVER = re.compile(r"performing \w+ (\w+://[^/ ]+)")
_CAUSE = re.compile(r'message: "([^"]+)"|(dns error)|(TimedOut)')
_INVALID = re.compile(r'object with invalid path: .*?Path "(.*?)"[ :]')
_TIMING = re.compile(r" in [\d.]+(?:ns|µs|ms|s)\b.*? - ")

# Of what a store answers, in characters.
_MOST_TOLD = 300

_stores: "dict[tuple[str, str], ObjectStore]" = {}
_opening = threading.Lock()


def read_object(url: str) -> bytes:
    """Returns an object's content.

    Raises:
        ImageMissing: There is no such object, or it cannot be read.
        UsageError: obstore is not installed.
    """
    try:
        store, key = _locate(url)
        return bytes(store.get(key).bytes())
    except SegcliError:
        raise
    except Exception as error:
        reason, hint = _explain(error, url)
        raise ImageMissing(f"cannot read {url!r}: {reason}", hint=hint) from error


def read_start(url: str, length: int) -> bytes:
    """Returns the first bytes of an object, none where it cannot be read.

    Raises:
        UsageError: obstore is not installed.
    """
    try:
        store, key = _locate(url)
        return bytes(store.get_range(key, start=0, length=length))
    except SegcliError:
        raise
    except Exception:  # Whoever reads the whole of it says why.
        return b""


def put_object(url: str, data: bytes, *, replace: bool = True) -> None:
    """Puts a complete object in place, or leaves what was there.

    Args:
        url: Its place.
        data: All of its bytes.
        replace: False refuses an object that exists; the store decides, in one step.

    Raises:
        OutputExists: It exists and ``replace`` is False.
        OutputError: The store lets nothing be written there.
        OutputWriteError: This object could not be written.
        UsageError: obstore is not installed.
    """
    try:
        store, key = _locate(url)
        store.put(
            key,
            data,
            mode="overwrite" if replace else "create",
            use_multipart=replace and len(data) > _ONE_PUT,
        )
    except SegcliError:
        raise
    except Exception as error:
        if type(error).__name__ == "AlreadyExistsError":
            raise OutputExists(
                f"{url!r} exists", hint="leave out --no-clobber to replace it"
            ) from error
        _raise_put(error, url, replace=replace)


def object_exists(url: str, failure: type[SegcliError] = OutputError) -> bool:
    """Tells whether there is an object.

    Args:
        url: Its place.
        failure: Raised where the store does not tell.
    """
    try:
        store, key = _locate(url)
        store.head(key)
    except FileNotFoundError:
        return False
    except SegcliError:
        raise
    except Exception as error:
        reason, hint = _explain(error, url)
        raise failure(f"cannot tell whether {url!r} exists: {reason}", hint=hint) from error
    return True


class Listed(NamedTuple):
    """What a listing says of an object.

    Attributes:
        key: Relative to the folder.
        size: In bytes.
    """

    key: str
    size: int


def list_objects(folder: str, left_out: Callable[[str], str | None]) -> Iterator[Listed]:
    """Yields the objects below a folder in the byte order of their keys' UTF-8.

    A page is asked for when the last one has been taken. Where one ends within a subfolder that is
    left out, the next begins behind it: of a million keys there, few are ever listed.

    Args:
        folder: A URL that names a folder.
        left_out: Given a relative key, returns the subfolder of it that is not wanted, or None.

    Raises:
        UsageError: The store does not list them, or obstore is not installed.
    """
    try:
        store, prefix = _locate(folder)
        start = prefix + "/" if prefix else ""
        offset: str | None = ""
        while offset is not None:
            pages = store.list(prefix or None, offset=offset or None, chunk_size=_PAGE)
            offset = None
            for page in pages:
                subfolder = None
                for meta in page:
                    relative = meta["path"].removeprefix(start)
                    subfolder = left_out(relative)
                    # The mark of a folder made in a browser is the folder's own name, and empty.
                    if subfolder is None and meta["path"] != prefix:
                        yield Listed(relative, meta["size"])
                if subfolder is not None and len(page) == _PAGE:
                    offset = max(f"{start}{subfolder}/{_LAST}", page[-1]["path"])
                    break
    except SegcliError:
        raise
    except Exception as error:
        reason, hint = _explain(error, folder)
        raise UsageError(f"cannot list {folder!r}: {reason}", hint=hint) from error


def _locate(url: str) -> "tuple[ObjectStore, str]":
    address = split_url(url)
    place = address.scheme, address.bucket
    with _opening:
        # Without the lock two threads would have two memories.
        if place not in _stores:
            _stores[place] = _open(url, *place)
        return _stores[place], address.key


def _open(url: str, scheme: str, bucket: str) -> "ObjectStore":
    try:
        from obstore.store import GCSStore, MemoryStore, S3Store
    except ImportError as error:
        raise UsageError(
            f"{url!r} needs object storage support", hint="pip install 'segcli[remote]'"
        ) from error
    if scheme == "memory":
        return MemoryStore()
    _settle_environment()
    if scheme == "gs":
        return GCSStore(bucket, client_options=_CLIENT, retry_config=_RETRY)
    return S3Store(
        bucket,
        client_options=_CLIENT,
        retry_config=_RETRY,
        credential_provider=_boto3_credentials(),
    )


def _settle_environment() -> None:
    """Refuses what obstore would not report but panic at; what is empty counts as not set.

    Raises:
        UsageError: The environment names no endpoint, or no region, that can be.
    """
    for names, can_be, expected in (
        (_ENDPOINTS, _is_endpoint, "a URL such as https://storage.example.com:9000"),
        (_REGIONS, _REGION_NAME.fullmatch, "a region such as us-east-1"),
    ):
        for name in names:
            value = os.environ.get(name)
            if value == "":
                del os.environ[name]
            elif value is not None and not can_be(value):
                raise UsageError(f"{name} is {value!r}, expected {expected}")


def _is_endpoint(text: str) -> bool:
    if not re.fullmatch(r"https?://[!-~]+", text, re.IGNORECASE):
        return False
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _boto3_credentials() -> "Boto3CredentialProvider | None":
    """Returns boto3's credentials where the environment shows none, None for obstore's own way."""
    own = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(name) for name in own) or find_spec("boto3") is None:
        return None
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = boto3.Session()
    return None if session.get_credentials() is None else Boto3CredentialProvider(session)


def _raise_put(error: Exception, url: str, *, replace: bool) -> NoReturn:
    reason, hint = _explain(error, url)
    message = f"cannot write {url!r}: {reason}"
    status = _status(error)
    if not replace and (status == 501 or type(error).__name__ == "NotSupportedError"):
        raise OutputError(
            f"cannot write {url!r}: this store has no conditional writes, which --no-clobber needs",
            hint="leave out --no-clobber, or take --skip-existing",
        ) from error
    # A PUT finds no bucket, or nothing at all.
    if hint is not None or isinstance(error, FileNotFoundError):
        raise OutputError(message, hint=hint) from error
    raise OutputWriteError(message) from error


def _status(error: Exception) -> int | None:
    found = _STATUS.search(_first_part(error))
    return int(found[1]) if found else None


def _first_part(error: Exception) -> str:
    return str(error).partition("\n\nDebug source")[0]


def _explain(error: Exception, url: str) -> tuple[str, str | None]:
    """Returns in one line why a request failed, and what to do where the user has to."""
    text = _first_part(error)
    scheme = url.partition("://")[0].lower()
    credentials = _CREDENTIALS.get(scheme)
    if _NO_KEY.search(text):
        return "no credentials were found", credentials
    code, told, status = _CODE.search(text), _MESSAGE.search(text), _STATUS.search(text)
    name = code[1] if code else ""
    if name == "NoSuchBucket":
        return "no such bucket", None
    if isinstance(error, FileNotFoundError):
        return "no such object", None
    if invalid := _INVALID.search(text):
        return f"it holds the key {invalid[1]!r}, which obstore does not take", _UNLISTED
    if status is None:
        if "redirect without LOCATION" in text:
            return "the bucket is in another region", _REGION
        if "error sending request" in text and (server := _SERVER.search(text)):
            cause = _CAUSE.search(str(error))
            told_why = f": {next(filter(None, cause.groups()))}" if cause else ""
            return f"no answer from {server[1]}{told_why}", None
        # Behind what request it was, which is not the user's.
        reason = " ".join((_TIMING.split(text, maxsplit=1)[-1]).split())
        return reason[:_MOST_TOLD].rstrip(".") or type(error).__name__, None
    reason = f"{status[1]} {status[2].strip()}"
    if name:
        reason += f", {name}"
    if told:
        reason += f" ({' '.join(told[1].split())[:_MOST_TOLD].rstrip('.')})"
    if name == "AuthorizationHeaderMalformed":
        return reason, _REGION
    refused = status[1] in ("401", "403") or name in ("ExpiredToken", "InvalidToken")
    return reason, credentials if refused else None
