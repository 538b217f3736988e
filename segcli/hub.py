"""Checkpoints from the Hugging Face hub. The only room that touches the network.

``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_HUB_ETAG_TIMEOUT``,
``HF_HUB_DOWNLOAD_TIMEOUT`` and proxies work because huggingface_hub does it. It resumes a download
that is cut off and puts only whole files in place, but compares no more than their sizes: digests
are compared here.
"""

import contextlib
import hashlib
import logging
import re
import time
from pathlib import Path

from segcli.errors import DownloadError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "tf_model.h5")
_README = "README.md"
# The README states the licence.
OTHER_FILES = ("config.json", "preprocessor_config.json", _README)

_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")

# Answers that another attempt may better, and the seconds before each.
_PASSING = (408, 429, 500, 502, 503, 504)
_WAITS_S = (1, 2)

# The longest README of a model that was seen has 0.1 MB.
_MAX_README_BYTES = 1 << 22


def fetch_checkpoint(
    source: str, revision: str = "main", *, offline: bool = False
) -> tuple[Path, str]:
    """Downloads a checkpoint through huggingface_hub's own cache, and compares its digests.

    Where the hub does not answer, what is in that cache already will do.

    Args:
        source: ``ORG/REPO``.
        revision: Branch, tag or commit.
        offline: Uses the hub's cache alone.

    Returns:
        The folder with its files, and the commit.

    Raises:
        DownloadError: The hub did not give it, or gave something else than it says.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # It logs each of its retries; what they came to is the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    offline = offline or constants.HF_HUB_OFFLINE
    silence: Exception | None = None

    def download(name: str, revision: str) -> Path:
        path = Path(hf_hub_download(source, name, revision=revision, local_files_only=not online))
        _compare_digest(path, source, online=online)
        return path

    try:
        silence = None if offline else _silence(source, revision)
        online = not offline and silence is None
        for name in WEIGHT_FILES:
            try:
                weights = download(name, revision)
                break
            except EntryNotFoundError as error:
                # LocalEntryNotFoundError says that the hub was not asked, or would not tell.
                untold = isinstance(error, LocalEntryNotFoundError) and online
                if untold or name == WEIGHT_FILES[-1]:
                    raise
        commit = weights.parent.name
        for name in OTHER_FILES:
            try:
                # Of the same commit, whatever happens to the branch meanwhile.
                download(name, commit)
            except LocalEntryNotFoundError:
                # Without its processor's settings a model would be exported with others.
                needed = name != _README and not _known_absent(source, name, commit)
                if online or needed:
                    raise
            except EntryNotFoundError:
                continue
    except DownloadError:
        raise
    # huggingface_hub raises its own, httpx's, OSError and ValueError.
    except Exception as error:
        cause: BaseException = error
        if isinstance(error, LocalEntryNotFoundError) and not offline:
            cause = silence or error.__cause__ or error
        reason, hint = _explain(cause, source, offline=offline)
        raise DownloadError(
            f"cannot fetch {source}@{revision} from the hub: {reason}", hint=hint
        ) from error
    return weights.parent, commit


def _silence(source: str, revision: str) -> Exception | None:
    """Returns why the hub cannot be asked just now, None where it answers.

    Before it gives up, huggingface_hub tries six times within half a minute, which none of its
    settings shortens. For a file's metadata alone it asks once, for ``HF_HUB_ETAG_TIMEOUT``
    seconds at most.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    found: Exception | None = None
    for wait in (0, *_WAITS_S):
        time.sleep(wait)
        try:
            get_hf_file_metadata(hf_hub_url(source, WEIGHT_FILES[0], revision=revision))
        except HfHubHTTPError as error:
            # What else it answers is judged where the file is asked for.
            if error.response.status_code not in _PASSING:
                return None
            found = error
        except Exception as error:  # httpx's own: no connection, no name, a proxy, a certificate
            return error
        else:
            return None
    return found


def _known_absent(source: str, name: str, commit: str) -> bool:
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(source, name, revision=commit) is _CACHED_NO_EXIST


def _compare_digest(path: Path, source: str, *, online: bool) -> None:
    """Compares a file in the hub's cache with its ETag, and removes it where they differ.

    The ETag of a large file is its sha256, that of a small one git's blob id, sha1 of
    ``blob LENGTH NUL`` and the bytes. The cache names a blob by it, to which ``path`` is a link;
    where the system has no links, the hub is asked.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    blob = path.parent / path.readlink() if path.is_symlink() else path
    if blob != path:
        expected: str | None = blob.name
    elif online:
        url = hf_hub_url(source, path.name, revision=path.parent.name)
        expected = get_hf_file_metadata(url).etag
    else:
        expected = None
    # A mirror may have ETags of its own, which say nothing of the content.
    if expected is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return
    kind = "sha256" if len(expected) == 64 else "git sha1"
    start = b"" if kind == "sha256" else b"blob %d\0" % path.stat().st_size
    with path.open("rb") as file:
        found = hashlib.file_digest(
            file, lambda: hashlib.new(kind.split()[-1], start, usedforsecurity=False)
        ).hexdigest()
    if found == expected:
        return
    # The blob may be a link to one that repositories share.
    damaged = (path, blob, path.resolve())
    with contextlib.suppress(OSError):
        for file_path in damaged:
            file_path.unlink(missing_ok=True)
    left = damaged[-1].exists()
    raise DownloadError(
        f"{path.name} of {source} is damaged: its {kind} is {found}, the hub says {expected}",
        hint=f"remove {str(damaged[-1])!r} and run again"
        if left
        else "it is removed from the hub's cache: run again to fetch it anew",
    )


def _explain(error: BaseException, source: str, *, offline: bool) -> tuple[str, str]:
    """Returns the reason and the hint for what huggingface_hub or its client raised."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hint = "check the name, the connection and HF_TOKEN; HF_ENDPOINT names a mirror"
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{source}"
        return (
            "it is gated, and not open to this account",
            f"accept its terms at {page} and set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private",
            "check the name; a private one needs HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit", "ORG/REPO@REV names one"
    if isinstance(error, LocalEntryNotFoundError) and offline:
        return (
            f"it is not whole in the hub's cache {constants.HF_HUB_CACHE!r}, and offline",
            "run it once without --offline, SEGCLI_OFFLINE and HF_HUB_OFFLINE",
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return (
            f"it has neither {' nor '.join(WEIGHT_FILES)}",
            "name a repository with PyTorch weights",
        )
    if isinstance(error, HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        return f"it answered {status}", hint
    # The paragraphs after the first are advice on huggingface_hub's own arguments.
    text = " ".join(str(error).split("\n\n")[0].split())[:300]
    return text or type(error).__name__, hint


def parse_hub_id(text: str) -> tuple[str, str] | None:
    """Returns (repository, revision) of ``ORG/REPO[@REV]``, None for anything else."""
    match = _HUB_ID.fullmatch(text)
    return (match["repo"], match["revision"] or "main") if match else None


def license_in(folder: Path) -> str:
    """Returns the licence that a checkpoint's own README states, ``unknown`` without one."""
    from huggingface_hub import metadata_load

    path = folder / _README
    # A README is prose: whatever it holds, it may only fail to name a licence.
    try:
        readable = path.is_file() and path.stat().st_size <= _MAX_README_BYTES
        found = (metadata_load(path) or {}).get("license") if readable else None
    except Exception:
        found = None
    # Only text: YAML's references can make the text of a list endless.
    return found if isinstance(found, str) and found else "unknown"
