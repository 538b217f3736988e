"""Which shared libraries ONNX Runtime's CUDA providers want, and which this machine has.

ONNX Runtime only says that a provider did not start. The system's loader, asked to load the
provider's own library, names the first one that it does not find. It runs no code on the device.
"""

import ctypes
import os
import re
import sys
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# cuDNN 9, which every ONNX Runtime since 1.19 is built against.
CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"

# What glibc's loader says; the name of a broken file comes with its folder.
_NOT_FOUND = re.compile(
    r"(?P<soname>(?P<stem>lib[\w+-]+\.so)\.\d[\d.]*): cannot open shared .*No such"
)

_TOOLKITS = "cuda*/lib64", "cuda*/targets/*/lib"


class Missing(NamedTuple):
    """Why a library does not load.

    Attributes:
        reason: What is needed and what was found instead, or the loader's own words.
        folder: Where the needed library lies, though the loader does not look there, or None.
    """

    reason: str
    folder: str | None = None


def missing_for(provider: str) -> Missing | None:
    """Returns what keeps a provider's library from loading, None where nothing does.

    Libraries from wheels count where they are loaded already (``session.preload_cuda``).

    Args:
        provider: ``cuda`` or ``tensorrt``.
    """
    spec = find_spec("onnxruntime")
    if sys.platform != "linux" or spec is None or not spec.submodule_search_locations:
        return None
    libraries = Path(spec.submodule_search_locations[0], "capi")
    try:
        # The providers' libraries use its symbols.
        ctypes.CDLL(str(libraries / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(libraries / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        return _explain(str(error))
    return None


def missing_cudnn() -> Missing | None:
    """Returns why cuDNN does not load, None where it does."""
    try:
        ctypes.CDLL(CUDNN)
    except OSError as error:
        return _explain(str(error))
    return None


def _explain(message: str) -> Missing:
    match = _NOT_FOUND.match(message)
    if not match:
        return Missing(message)
    needed, found = match["soname"], _on_this_machine(match["stem"])
    if folder := found.get(needed):
        return Missing(f"needs {needed}, which lies in {folder}: the loader does not look", folder)
    here = " and ".join(found) if found else "none of any version"
    return Missing(f"needs {needed}, this machine has {here}")


def _on_this_machine(stem: str) -> dict[str, str]:
    """Returns the sonames of ``libNAME.so`` in the places where they are usual, and the folders."""
    folders = [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    for entry in sys.path:
        folders += sorted(Path(entry or ".").glob("nvidia/*/lib"))
    for pattern in _TOOLKITS:
        folders += sorted(Path("/usr/local").glob(pattern))
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"{stem}.*")):
            if re.fullmatch(rf"{re.escape(stem)}\.\d+", path.name):
                found.setdefault(path.name, str(folder.absolute()))
    # What ldconfig knows.
    if not found and (name := find_library(stem.removeprefix("lib").removesuffix(".so"))):
        found[name] = ""
    return found
