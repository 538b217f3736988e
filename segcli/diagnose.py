"""What ``segcli doctor`` looks at: each check says what it found, and how to mend what is wrong."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.request import getproxies_environment

from segcli import __version__
from segcli.errors import ExitCode, SegcliError

if TYPE_CHECKING:
    from segcli.cuda_libraries import Missing

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

# Of the limits on threads that other libraries read; segcli passes its own count to ONNX Runtime.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_CUDA_EXTRA = "pip install 'segcli[cuda]'"


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
    yield _export()
    yield from _network()
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
    from segcli import cuda_libraries
    from segcli.session import TENSORRT, preload_cuda

    preload_cuda()
    if missing := cuda_libraries.missing_for("cuda"):
        reason = f"a driver is here, but the CUDA provider does not load: {missing.reason}"
        yield Finding("cuda", "fail", reason, _mend(missing.folder))
    else:
        yield _cuda_run(cuda_libraries.missing_cudnn())
    if TENSORRT in providers and (missing := cuda_libraries.missing_for("tensorrt")):
        yield Finding(
            "tensorrt",
            "note",
            f"ONNX Runtime lists it, but it does not load: {missing.reason}",
            "for --device tensorrt install NVIDIA TensorRT; --device cuda needs none",
        )


def _cuda_run(cudnn: "Missing | None") -> Finding:
    from segcli.selfcheck import run

    # ONNX Runtime 1.31 can do without cuDNN, earlier ones cannot.
    without = f", without cuDNN: it {cudnn.reason}" if cudnn else ""
    mend = _mend(cudnn.folder) if cudnn else ""
    try:
        provider, difference = run("cuda")
    except SegcliError as error:
        return Finding("cuda", "fail", f"{error}{without}", mend or _CUDA_EXTRA)
    text = f"{provider} is active, logits differ by {difference:.1g}{without}"
    return Finding("cuda", "note" if cudnn else "ok", text, mend)


def _mend(folder: str | None) -> str:
    return f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH" if folder else _CUDA_EXTRA


def _threads(cores: int, cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    from segcli.session import cgroup_quota

    total = os.cpu_count() or cores
    text, mends = f"{cores} of {total} cores may be used", []
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    if affinity < total:
        text += f"; the affinity mask allows {affinity}"
        mends.append("taskset or the job's CPU set widens the mask")
    if (quota := cgroup_quota(cgroup)) is not None:
        text += f"; the cgroup allows the time of {quota:g}"
        mends.append("the container's CPU limit (docker run --cpus) raises the quota")
    limits = [f"{n}={os.environ[n]}" for n in THREAD_VARIABLES if n in os.environ]
    if limits:
        text += f"; {', '.join(limits)} is set, which slows 'segcli export' and nothing else"
        mends.append(f"unset {' '.join(n.partition('=')[0] for n in limits)}")
    return Finding("threads", "note" if mends else "ok", text, "; ".join(mends))


def _cache() -> Finding:
    from segcli.store import cache_dir, distrust

    folder = cache_dir()
    models = sorted(p.stem for p in Path(folder, "models").glob("*.onnx"))
    shown = ", ".join(models) or "no models yet"
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    effective = os.access in os.supports_effective_ids
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
        text = f"{str(folder)!r} cannot be written"
        mend = "set SEGCLI_CACHE_DIR to a folder that can"
        # A cache that an administrator keeps.
        if models:
            return Finding("cache", "note", f"{text}: its models can be used, others not: {shown}")
        return Finding("cache", "fail", text, mend, ExitCode.MODEL)
    for path in (folder / "models", *(folder / "models" / f"{name}.onnx" for name in models)):
        if path.exists() and (doubt := distrust(path)):
            text = f"{folder}: its models are refused, {doubt.reason}"
            return Finding("cache", "fail", text, doubt.mend, ExitCode.MODEL)
    return Finding("cache", "ok", f"{folder}: {shown}")


def _export() -> Finding:
    from segcli.store import EXPORT_PACKAGES

    missing = [name for name in EXPORT_PACKAGES if not find_spec(name)]
    if not missing:
        return Finding("export", "ok", "the export extra is installed")
    return Finding(
        "export",
        "note",
        f"{', '.join(missing)} cannot be imported: models run, but none can be fetched or exported",
        "pip install 'segcli[export]'",
    )


def _network() -> Iterator[Finding]:
    # The values may hold a password and are shown nowhere.
    proxies = getproxies_environment()
    used = [f"{kind.upper()}_PROXY" for kind in ("https", "http", "all") if kind in proxies]
    if used:
        text = f"{', '.join(used)} in force (values are never shown)"
        if "no" in proxies:
            text += ", but not for the hosts in NO_PROXY"
        yield Finding("proxy", "note", text)
    socks = [name for name in used if proxies[name[:-6].lower()].lower().startswith("socks")]
    if socks and not find_spec("socksio"):
        yield Finding(
            "socks proxy",
            "note",
            f"{', '.join(socks)} is a SOCKS proxy, for which socksio is missing: no download works",
            "pip install socksio",
        )
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SEGCLI_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            text = f"{name} forbids downloads: only models on this machine can be used"
            yield Finding("offline", "note", text, f"unset {name}")


def _environment() -> Iterator[Finding]:
    names = ("SEGCLI_MODEL", "SEGCLI_DEVICE", "SEGCLI_REGISTRY", "HF_ENDPOINT")
    if present := [n for n in names if os.environ.get(n)]:
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
