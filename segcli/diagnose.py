"""What ``segcli doctor`` looks at: each check says what it found, and how to mend what is wrong."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Literal

from segcli import __version__
from segcli.errors import ExitCode, SegcliError

ORT_WHEELS = ("onnxruntime", "onnxruntime-gpu")
OPENCV_WHEELS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
PACKAGES = (
    "numpy",
    "opencv-python-headless",
    "pillow",
    "typer",
    "huggingface_hub",
    "torch",
    "onnx",
)

# The soname of cuDNN 9, which every ONNX Runtime since 1.19 is built against.
CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: What was looked at.
        state: ``ok``, ``note`` (works, worth knowing) or ``fail``.
        text: What was found.
        mend: The command or step that mends it, or "".
        exit_code: What a ``fail`` makes of the exit status.
    """

    check: str
    state: Literal["ok", "note", "fail"]
    text: str
    mend: str = ""
    exit_code: ExitCode = ExitCode.DEVICE


def examine(device: str = "auto") -> Iterator[Finding]:
    """Yields the findings as they are made.

    Args:
        device: What the self-check runs on, as for ``segcli segment``.
    """
    yield Finding(
        "segcli",
        "ok",
        f"{__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
    )
    yield _packages()
    yield _onnxruntime_wheels()
    yield _opencv_wheels()
    try:
        from segcli.session import available_providers, usable_cores
        from segcli.session import version as ort_version
    except ImportError as error:
        yield Finding(
            "onnxruntime",
            "fail",
            f"cannot be imported: {error}",
            "pip install --force-reinstall onnxruntime-gpu (or onnxruntime)",
        )
        return
    providers = available_providers()
    yield Finding("onnxruntime", "ok", f"{ort_version()}, providers {', '.join(providers)}")
    yield from _cuda(providers)
    yield _threads(usable_cores())
    yield _cache()
    yield from _environment()
    yield _self_check(device)


def _packages() -> Finding:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return Finding("packages", "ok", ", ".join(found))


def installed(names: tuple[str, ...]) -> list[str]:
    """Returns which of these distributions are installed."""
    present = {(d.metadata["Name"] or "").lower().replace("_", "-") for d in distributions()}
    return [name for name in names if name in present]


def _onnxruntime_wheels() -> Finding:
    found = installed(ORT_WHEELS)
    if len(found) == 1:
        return Finding("onnxruntime wheel", "ok", found[0])
    if not found:
        return Finding(
            "onnxruntime wheel",
            "fail",
            "none is installed",
            "pip install onnxruntime-gpu (or the smaller onnxruntime)",
        )
    return Finding(
        "onnxruntime wheel",
        "fail",
        f"{' and '.join(found)} are both installed and overwrite each other's files",
        f"pip uninstall -y {' '.join(found)} && pip install onnxruntime-gpu",
    )


def _opencv_wheels() -> Finding:
    found = installed(OPENCV_WHEELS)
    if len(found) > 1:
        return Finding(
            "opencv wheel",
            "note",
            f"{', '.join(found)} share one folder",
            "keep one: pip uninstall the others, then reinstall it",
        )
    return Finding("opencv wheel", "ok", ", ".join(found) or "not installed as a wheel")


def _cuda(providers: list[str]) -> Iterator[Finding]:
    from segcli.session import CUDA, cuda_driver_present

    if CUDA not in providers:
        yield Finding(
            "cuda",
            "note",
            "this ONNX Runtime has no CUDA provider; it runs on the CPU",
            "for a GPU: pip uninstall -y onnxruntime && pip install 'segcli[cuda]'",
        )
        return
    if not cuda_driver_present():
        yield Finding("cuda", "note", "no NVIDIA driver on this machine; it runs on the CPU")
        return
    from segcli.session import preload_cuda

    preload_cuda()
    try:
        ctypes.CDLL(CUDNN)
    except OSError as error:
        yield Finding(
            "cuda",
            "fail",
            f"a driver is here, but {CUDNN} does not load: {error}",
            "pip install 'segcli[cuda]'",
        )
        return
    try:
        from segcli.selfcheck import run

        provider, difference = run("cuda")
    except SegcliError as error:
        yield Finding("cuda", "fail", str(error), "pip install 'segcli[cuda]'")
        return
    yield Finding("cuda", "ok", f"{provider} is active, logits differ by {difference:.1g}")


def _threads(cores: int) -> Finding:
    total = os.cpu_count() or cores
    text = f"{cores} of {total} cores may be used"
    limits = [
        f"{n}={os.environ[n]}"
        for n in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        if n in os.environ
    ]
    if limits:
        text += f" ({', '.join(limits)} is set; segcli passes its own count to ONNX Runtime)"
    return Finding("threads", "ok" if cores == total else "note", text)


def _cache() -> Finding:
    from segcli.store import cache_dir

    folder = cache_dir()
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "cache",
            "fail",
            f"{str(folder)!r} cannot be written",
            "set SEGCLI_CACHE_DIR to a folder that can",
            ExitCode.MODEL,
        )
    models = sorted(p.stem for p in Path(folder, "models").glob("*.onnx"))
    return Finding("cache", "ok", f"{folder}: {', '.join(models) or 'no models yet'}")


def _environment() -> Iterator[Finding]:
    names = (
        "SEGCLI_MODEL",
        "SEGCLI_DEVICE",
        "SEGCLI_OFFLINE",
        "SEGCLI_REGISTRY",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    )
    present = [n for n in names if os.environ.get(n) or os.environ.get(n.lower())]
    if present:
        yield Finding("environment", "note", f"{', '.join(present)} in force")


def _self_check(device: str) -> Finding:
    from segcli.selfcheck import TOLERANCE, run

    try:
        provider, difference = run(device)
    except SegcliError as error:
        return Finding("self-check", "fail", str(error), error.hint or "", error.exit_code)
    except (OSError, ValueError, KeyError) as error:
        return Finding(
            "self-check",
            "fail",
            f"the package's own data are damaged: {error}",
            "pip install --force-reinstall segcli",
            ExitCode.MODEL,
        )
    text = f"embedded model on {provider}, logits differ by {difference:.1g} of their scale"
    if difference <= TOLERANCE:
        return Finding("self-check", "ok", text)
    return Finding(
        "self-check",
        "fail",
        f"{text}, allowed is {TOLERANCE:g}",
        "pip install --force-reinstall onnxruntime-gpu segcli",
        ExitCode.MODEL,
    )
