"""Checkpoints from the Hugging Face hub. The only room that touches the network.

``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and proxies work because huggingface_hub does it.
"""

import logging
import re
from pathlib import Path

from segcli.errors import DownloadError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "tf_model.h5")
# The README states the licence.
OTHER_FILES = ("config.json", "preprocessor_config.json", "README.md")

_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")


def fetch_checkpoint(
    source: str, revision: str = "main", *, offline: bool = False
) -> tuple[Path, str]:
    """Downloads a checkpoint through huggingface_hub's own cache.

    Args:
        source: ``ORG/REPO``.
        revision: Branch, tag or commit.
        offline: Uses the hub's cache alone.

    Returns:
        The folder with its files, and the commit.

    Raises:
        DownloadError: The hub did not give it.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # It logs each of its retries; what they came to is the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    offline = offline or constants.HF_HUB_OFFLINE

    def download(name: str) -> Path:
        return Path(hf_hub_download(source, name, revision=revision, local_files_only=offline))

    where = f"{source}@{revision}"
    try:
        for name in WEIGHT_FILES:
            try:
                weights = download(name)
                break
            except EntryNotFoundError as error:
                # LocalEntryNotFoundError says that there was no connection to ask; offline on
                # purpose, that the hub's cache has no such file.
                unknown = isinstance(error, LocalEntryNotFoundError) and not offline
                if unknown or name == WEIGHT_FILES[-1]:
                    raise
        for name in OTHER_FILES:
            try:
                download(name)
            except LocalEntryNotFoundError:
                if not offline:
                    raise
            except EntryNotFoundError:
                continue
    except Exception as error:
        # huggingface_hub raises its own, httpx's, OSError and ValueError.
        reason = " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
        raise DownloadError(
            f"cannot fetch {where} from the hub: {reason}",
            hint="check the name, the connection and HF_TOKEN; HF_ENDPOINT names a mirror",
        ) from error
    return weights.parent, weights.parent.name


def parse_hub_id(text: str) -> tuple[str, str] | None:
    """Returns (repository, revision) of ``ORG/REPO[@REV]``, None for anything else."""
    match = _HUB_ID.fullmatch(text)
    return (match["repo"], match["revision"] or "main") if match else None


def license_in(folder: Path) -> str:
    """Returns the licence that a checkpoint's own README states, ``unknown`` without one."""
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(folder / "README.md") or {}).get("license")
    # A README is prose: whatever it holds, it may only fail to name a licence.
    except Exception:
        found = None
    return str(found) if found else "unknown"
