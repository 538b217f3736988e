"""Model name or path -> an .onnx file on this machine.

Embedded models come from the package, others from the cache, and names not yet there are fetched
through ``hub`` and exported once, under a lock.

The cache holds ``models/NAME.onnx`` and, beside it, ``NAME.json`` with what it was made from and
its sha256. Its place is ``$SEGCLI_CACHE_DIR``, else the user's cache folder.

The cache is private: folders made here have mode 0700. A model in it is taken only where the file
and the cache's folders belong to this user or to root and nobody else can write there
(``ownership.doubt``); else it is an error, never a silent new export. A cache that an
administrator keeps for many users works: readable by all, writable by its owner, either root's, or
anybody's whom the user trusts by naming the folder in ``SEGCLI_CACHE_DIR``. It may be read-only.
A path given with ``-m`` is the user's own word and not judged.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from segcli.atomic import sweep_parts, write_atomic
from segcli.errors import ModelNotFound, OutputWriteError, RegistryError
from segcli.hub import fetch_checkpoint, license_in, parse_hub_id
from segcli.ownership import Doubt, doubt, make_private
from segcli.registry import ModelSpec, Registry

if TYPE_CHECKING:
    from segcli.export.convert import ExportRequest

Tell = Callable[[str], None]

# Of the ``export`` extra.
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "safetensors")


@dataclass(frozen=True)
class CacheEntry:
    """What lies beside a cached model.

    Attributes:
        source: The registry's source when the file was made.
        revision: The registry's revision then; of a local checkpoint when it was last changed.
        commit: The hub commit that this was.
        sha256: Digest of the .onnx.
        size_bytes: Its length.
    """

    source: str
    revision: str
    commit: str
    sha256: str
    size_bytes: int


def cache_dir() -> Path:
    """Returns the folder that models are kept in; it need not exist."""
    if folder := os.environ.get("SEGCLI_CACHE_DIR"):
        return Path(folder).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("segcli", appauthor=False)


def is_path(model: str) -> bool:
    """Says whether ``-m`` names a file rather than a registry name."""
    return model.endswith(".onnx") or os.sep in model or "/" in model


def cached_path(name: str) -> Path:
    """Returns where the cache keeps a model; the file need not exist."""
    return cache_dir() / "models" / f"{name}.onnx"


def cache_entry(spec: ModelSpec) -> CacheEntry | None:
    """Returns what the cache says of a model, None where it does not have it as it is now."""
    path = cached_path(spec.name)
    try:
        raw = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        entry = CacheEntry(**raw)
        size = path.stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    if (entry.source, entry.size_bytes) != (spec.source, size):
        return None
    # A local checkpoint that is gone cannot be newer than what was made from it.
    return entry if entry.revision == (_revision(spec) or entry.revision) else None


def _revision(spec: ModelSpec) -> str:
    """Returns what changes when a model's source does."""
    if spec.checkpoint is None:
        return spec.revision
    folder = spec.checkpoint
    try:
        return str(max(p.stat().st_mtime_ns for p in (folder, *folder.glob("*"))))
    except OSError:
        return ""


def locate(spec: ModelSpec) -> Path | None:
    """Returns the model's file where it is on this machine already, else None."""
    if spec.embedded:
        return Path(str(files("segcli.data") / spec.embedded))
    return cached_path(spec.name) if cache_entry(spec) else None


def on_hand(model: str, registry: Registry) -> Path | None:
    """Returns the file of a path, or of a model in the package: what needs no look-up.

    Raises:
        ModelNotFound: There is no such file.
    """
    if is_path(model):
        path = Path(model)
        if not path.is_file():
            raise ModelNotFound(
                f"no model file at {model!r}",
                hint="'segcli export' writes one; 'segcli models list' shows names that need none",
            )
        return path
    if registry.extended:
        # A user's entry may have the name.
        return None
    # The package keeps a model under its name.
    packaged = Path(str(files("segcli.data") / f"{model}.onnx"))
    return packaged if packaged.is_file() else None


def obtain(model: str, registry: Registry, *, offline: bool, tell: Tell) -> Path:
    """Returns the .onnx of a name or path, fetching and exporting it on first use.

    Args:
        model: A registry name, or a path.
        registry: Where names are looked up.
        offline: Forbids the network.
        tell: Is given one line before anything is fetched.

    Raises:
        ModelNotFound: There is no such file or name, or it may not be fetched.
        DownloadError: The hub did not give it.
        ExportError: Its export does not reproduce the reference.
    """
    if path := on_hand(model, registry):
        return path
    spec = registry.get(model)
    path = locate(spec)
    if path is None:
        return _make(spec, offline, tell)
    if not spec.embedded:
        _require_trust(path)
    return path


def distrust(path: Path) -> Doubt | None:
    """Returns why the cache, or a model in it, may be a stranger's work; None where it cannot.

    Args:
        path: The cache's folder, or a file in it; it exists.
    """
    return doubt(path, cache_dir(), named=bool(os.environ.get("SEGCLI_CACHE_DIR")))


def _require_trust(path: Path) -> None:
    if found := distrust(path):
        raise ModelNotFound(
            f"the model cache may hold a stranger's work: {found.reason}",
            hint=f"'{found.mend}' mends that, SEGCLI_CACHE_DIR names another cache, and a file "
            "that you trust can be named with -m FILE",
        )


def remove(spec: ModelSpec) -> bool:
    """Removes a cached model; returns whether there was one.

    Raises:
        ModelNotFound: The model is part of the package, is just being made, or cannot be removed.
    """
    from filelock import FileLock, Timeout

    if spec.embedded:
        raise ModelNotFound(f"{spec.name!r} is part of the package and cannot be removed")
    path = cached_path(spec.name)
    description, lock = path.with_suffix(".json"), path.with_suffix(".lock")
    if not any(p.exists() for p in (path, description, lock)):
        return False
    try:
        with FileLock(lock, timeout=0):
            existed = path.exists()
            # The description first: without it the model counts as absent.
            description.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    except Timeout as error:
        raise ModelNotFound(
            f"cannot remove {spec.name!r}: another process is making it",
            hint="run again when that is done",
        ) from error
    except OSError as error:
        raise ModelNotFound(f"cannot remove {str(path)!r}: {error.strerror}") from error
    return existed


def sha256_of(path: Path) -> str:
    """Returns a file's digest.

    Raises:
        ModelNotFound: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelNotFound(f"cannot read {str(path)!r}: {error.strerror}") from error


def can_export() -> bool:
    """Says whether the ``export`` extra is installed."""
    return all(find_spec(name) for name in EXPORT_PACKAGES)


def require_export(what: str) -> None:
    """Raises ModelNotFound, with the two ways out, where the ``export`` extra is missing."""
    if not can_export():
        missing = [n for n in EXPORT_PACKAGES if not find_spec(n)]
        raise ModelNotFound(
            f"{what} needs the export extra, and {', '.join(missing)} cannot be imported here",
            hint="either pip install 'segcli[export]', or run 'segcli export NAME -o NAME.onnx' on "
            "a machine that has it and pass that file with -m NAME.onnx",
        )


def _make(spec: ModelSpec, offline: bool, tell: Tell) -> Path:
    if offline and spec.checkpoint is None:
        raise ModelNotFound(
            f"{spec.name!r} is not on this machine and --offline forbids to fetch it",
            hint=f"run 'segcli models pull {spec.name}' while online",
        )
    require_export(f"{spec.name!r} is not on this machine yet; to fetch and export it")
    from filelock import FileLock

    target = cached_path(spec.name)
    try:
        make_private(target.parent)
        _require_trust(target.parent)
        with FileLock(target.with_suffix(".lock")):
            # Another process may have made it while this one waited.
            if cache_entry(spec) is None:
                sweep_parts(str(target.parent))
                _export_into_cache(spec, target, offline=offline, tell=tell)
    except (OSError, OutputWriteError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(
            f"cannot write the model cache {str(target.parent)!r}: {reason}",
            hint="set SEGCLI_CACHE_DIR to a folder that can be written",
        ) from error
    return target


def export_request(spec: ModelSpec, *, offline: bool, tell: Tell) -> "ExportRequest":
    """Returns what to export for a registry name, its checkpoint fetched.

    Raises:
        ModelError: The checkpoint cannot be had.
    """
    from segcli.export.convert import ExportRequest

    if spec.embedded:
        raise ModelNotFound(
            f"{spec.name!r} is part of the package as an .onnx: there is no checkpoint to export",
            hint="its file is what 'segcli models show' names",
        )
    if spec.checkpoint is not None:
        if not spec.checkpoint.exists():
            raise RegistryError(f"{spec.name!r}: no checkpoint at {str(spec.checkpoint)!r}")
        folder, commit, source = spec.checkpoint, "", spec.checkpoint.name
    else:
        size = f", about {spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else ""
        note = f" ({spec.license_note})" if spec.license_note else ""
        tell(f"fetching {spec.name} from {spec.source}{size}, licence {spec.license}{note}")
        folder, commit = fetch_checkpoint(spec.source, spec.revision, offline=offline)
        source = spec.source
    return ExportRequest(
        checkpoint=folder,
        name=spec.name,
        source=source,
        revision=commit,
        license=spec.license,
        license_note=spec.license_note,
        task=spec.task,
        num_classes=spec.num_labels,
    )


def checkpoint_request(
    checkpoint: str, registry: Registry, *, offline: bool, tell: Tell
) -> "ExportRequest":
    """Returns what to export for a local path or an ``ORG/REPO[@REV]``, fetched.

    Raises:
        ModelError: The checkpoint cannot be had.
    """
    from segcli.export.convert import ExportRequest

    path = Path(checkpoint)
    hub_id = None if path.exists() else parse_hub_id(checkpoint)
    if hub_id is None:
        if not path.exists():
            raise ModelNotFound(
                f"no checkpoint at {checkpoint!r}, and it is no hub id ORG/REPO[@REV] either"
            )
        path = path.resolve()
        folder = path if path.is_dir() else path.parent
        name = path.name if path.is_dir() else path.stem
        return ExportRequest(
            checkpoint=path, name=name, source=path.name, license=license_in(folder)
        )
    source, revision = hub_id
    known = next((spec for spec in registry if spec.source == source), None)
    tell(f"fetching {source}@{revision}")
    folder, commit = fetch_checkpoint(source, revision, offline=offline)
    return ExportRequest(
        checkpoint=folder,
        name=source.partition("/")[2],
        source=source,
        revision=commit,
        license=known.license if known else license_in(folder),
        license_note=known.license_note if known else "",
    )


def _export_into_cache(spec: ModelSpec, target: Path, *, offline: bool, tell: Tell) -> None:
    from segcli.export.convert import export_model

    # Before the checkpoint is read: a change during the export makes the entry stale at once.
    revision = _revision(spec)
    request = export_request(spec, offline=offline, tell=tell)
    report = export_model(request)
    entry = CacheEntry(spec.source, revision, request.revision, report.sha256, len(report.data))
    # The description last: without it the model counts as absent.
    target.with_suffix(".json").unlink(missing_ok=True)
    write_atomic(str(target), report.data)
    write_atomic(str(target.with_suffix(".json")), json.dumps(asdict(entry), indent=1).encode())
