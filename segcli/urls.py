"""Addresses of objects: which arguments are URLs, and the parts that they are made of.

The URL of an object in a store is ``scheme://bucket/`` and the key as it is, nothing
percent-decoded: keys may hold ``%``, ``#`` and ``?``. A web address is taken as it is, its query
included, as that may be a signature. ``file://`` is another spelling of a path.
"""

import os
import re
from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from segcli.errors import UsageError

_STORES = ("s3", "gs", "memory")
_URL = re.compile(r"(s3|gs|memory|https?)://", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
# What S3 and GCS let a bucket be called, now or once.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_FILE = re.compile(r"file://(?:localhost)?(?=/)", re.IGNORECASE)


class Address(NamedTuple):
    """Where an object lies.

    Attributes:
        scheme: ``s3``, ``gs`` or ``memory``.
        bucket: Its bucket.
        key: Its key; of a folder without the slash at its end, "" for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str


def is_url(path: str) -> bool:
    """Tells whether a path is the URL of an object or a folder of them; ``file://`` is not."""
    return _URL.match(path) is not None


def is_web(path: str) -> bool:
    """Tells whether a path is an ``http://`` or ``https://`` URL."""
    return _WEB.match(path) is not None


def other_scheme(path: str) -> str | None:
    """Returns the beginning of a URL that is none of those that are read or written, else None."""
    scheme = _SCHEME.match(path)
    return None if scheme is None or is_url(path) else scheme[0]


def is_url_folder(path: str) -> bool:
    """Tells whether a URL names a folder of a store: a slash at its end says so."""
    return path.endswith("/") and is_url(path) and not is_web(path)


def is_bucket(path: str) -> bool:
    """Tells whether a URL names a bucket and nothing in it."""
    return is_url(path) and not is_web(path) and not path.partition("://")[2].partition("/")[2]


def split_url(url: str) -> Address:
    """Returns the parts of an object store's URL.

    Raises:
        ValueError: It has no bucket, or a key that cannot be addressed.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() not in _STORES or not bucket:
        raise ValueError("expected s3://BUCKET/KEY or gs://BUCKET/KEY")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("its bucket has characters that no bucket's name has")
    key = key.removesuffix("/")
    # Object stores allow these, obstore drops the first and refuses the others.
    if key and not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise ValueError("its key has an empty part, '.' or '..' between slashes")
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in key):
        raise ValueError("its key has control characters, or is not UTF-8")
    return Address(scheme.lower(), bucket, key)


def join_url(folder: str, relative: str) -> str:
    """Returns the URL of what is at ``relative`` below a folder."""
    return f"{folder.removesuffix('/')}/{relative}"


def below(url: str, folder: str) -> str | None:
    """Returns what follows a folder's URL in another one, None where that is not below it."""
    start = folder.removesuffix("/") + "/"
    return url.removeprefix(start) if url.startswith(start) else None


def url_name(url: str) -> str:
    """Returns the last component of a URL, of a web address without its query and decoded."""
    if not is_web(url):
        return url.removesuffix("/").rpartition("/")[2]
    return unquote(_without_query(url).removesuffix("/").rpartition("/")[2])


def url_place(url: str, root: str) -> str:
    """Returns the place of a URL below a root, ``..`` where it is not below it."""
    if is_web(url):
        url, root = unquote(_without_query(url)), unquote(_without_query(root))
    return below(url, root) or ".."


def url_identity(url: str) -> int:
    """Returns a negative number of 128 bits that stands for a URL, as no file's number does."""
    # A URL's own characters take three times the memory, and a run may have millions.
    digest = blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return ~int.from_bytes(digest, "big")


def plain_path(path: str) -> str:
    """Returns the one spelling that a place is known by.

    Of ``file://`` that is the path, of another URL the scheme is in lower case; anything else is as
    it was.

    Raises:
        UsageError: The URL names another host.
    """
    if path[:7].lower() != "file://":
        scheme = _URL.match(path)
        return path if scheme is None else scheme[0].lower() + path[scheme.end() :]
    start = _FILE.match(path)
    if start is None:
        raise UsageError(
            f"{path!r} names another host, expected file:///FOLDER/FILE with three slashes"
        )
    return os.fsdecode(unquote_to_bytes(path[start.end() :]))


def refuse_url(option: str, path: str) -> None:
    """Raises UsageError where an option that takes a file is given a URL."""
    if is_url(path):
        raise UsageError(f"{option} {path!r} is a URL, expected a file on this machine")


def local_file(option: str, path: str | None) -> str | None:
    """Returns what an option that takes a file names, ``file://`` in front of it or not.

    Raises:
        UsageError: It is on another machine.
    """
    if path is None:
        return None
    refuse_url(option, path)
    return plain_path(path)


def _without_query(url: str) -> str:
    return url.partition("#")[0].partition("?")[0]
