"""ONNX Runtime: provider choice and proof, thread counts, one run.

The only importer of onnxruntime. A provider that was asked for and is not active once the session
stands is an error; ONNX Runtime itself would go on with the CPU and a log line.
"""

import contextlib
import ctypes
import io
import math
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from segcli.errors import ArtifactError, DeviceError, InferenceError
from segcli.onnx_file import check_seal

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

# What ONNX Runtime raises on any device where the file is to blame.
_FAULTS_OF_THE_FILE = ("InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")

# Nothing is reported to anyone.
ort.disable_telemetry_events()
# ONNX Runtime warns on stderr about what it recovers from; errors arrive as exceptions.
ort.set_default_logger_severity(4)


class Session:
    """One loaded model on one provider.

    Args:
        model: Path of an .onnx file, or its bytes.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``tensorrt[:N]`` or another provider's name.
        threads: Threads within one operator; None takes the cores this process may use.
        shared: Several threads will call it. As many runs as fill the cores then go on at a time,
            so that memory grows with the cores and not with the callers, and waiting threads
            sleep instead of spinning: with one core busy elsewhere a run otherwise takes twice as
            long. Alone on the machine spinning saves 3 to 10 per cent.
        cores: How many those are; None takes the cores this process may use.
        optimize: False keeps the graph as it is in the file.

    Attributes:
        provider: ONNX Runtime's name of the provider that is active.
        fallback: Why ``auto`` did not take the accelerator it found, or None.
        threads: The thread count in use.
        input_hw: The only (height, width) the graph takes, or None where both are dynamic.
        input_name: Of the one input.
        output_names: In order.
        num_channels: Size of the first output's second axis, None where the graph leaves it open.

    Raises:
        DeviceError: The device is not to be had.
        ArtifactError: ONNX Runtime cannot load the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        device: str = "auto",
        threads: int | None = None,
        shared: bool = False,
        cores: int | None = None,
        optimize: bool = True,
    ) -> None:
        self.threads = threads or usable_cores()
        at_once = max(1, (cores or usable_cores()) // self.threads)
        self._slots: AbstractContextManager[object] = (
            threading.BoundedSemaphore(at_once) if shared else contextlib.nullcontext()
        )
        self.fallback: str | None = None
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # A pattern is learned in the first run and given a block of its own in the second, while
        # the arena keeps the first one's: half as much memory again, and no faster.
        options.enable_mem_pattern = False
        if shared:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session: Any
        self._second: Any = None
        self._opening_upsampler = threading.Lock()
        self._number = 0
        if device == "auto":
            self._session = self._automatic(model, options)
        else:
            provider, self._number = parse_device(device)
            self._session = _open(model, options, provider, self._number)
            self._prove(provider, device)
        _trim_heap()
        self.provider: str = self._session.get_providers()[0]
        self.input_name, self.input_hw = _check_input(self._session.get_inputs())
        outputs = self._session.get_outputs()
        if not outputs:
            raise ArtifactError("the graph has no output, expected logits or features")
        self.output_names = tuple(o.name for o in outputs)
        channels = outputs[0].shape[1] if len(outputs[0].shape) > 1 else None
        self.num_channels = channels if isinstance(channels, int) else None

    def run(self, batch: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
        """Returns all outputs of a batch (N, 3, H, W); safe to call from several threads.

        Raises:
            InferenceError: ONNX Runtime failed, for want of memory for instance.
        """
        try:
            with self._slots:
                outputs: list[npt.NDArray[Any]] = self._session.run(None, {self.input_name: batch})
        except Exception as error:
            raise InferenceError(f"the model failed: {_reason(error)}") from error
        return outputs

    def class_maps(
        self, batch: npt.NDArray[np.float32], sizes_hw: Sequence[tuple[int, int]]
    ) -> list[npt.NDArray[np.int32]]:
        """Returns the class map (H, W) of every image of a batch, made on the device.

        Neither the logits nor their upsampling leave it (``export/class_map.py``). It holds
        K x H x W floats there, of one image at a time.

        Args:
            batch: (N, 3, h, w).
            sizes_hw: Height and width of each map.

        Raises:
            InferenceError: ONNX Runtime failed, or the logits are not finite.
        """
        device = "cuda" if self.provider == CUDA else "cpu"
        class_maps = []
        try:
            with self._slots:
                network = self._session.io_binding()
                network.bind_cpu_input(self.input_name, batch)
                network.bind_output(self.output_names[0], device, self._number)
                self._session.run_with_iobinding(network)
                [logits] = network.get_outputs()
                upsampler = self._upsampler()
                for index, size_hw in enumerate(sizes_hw):
                    answer = upsampler.io_binding()
                    answer.bind_ortvalue_input("logits", logits)
                    answer.bind_cpu_input("index", np.array([index], np.int64))
                    answer.bind_cpu_input("size_hw", np.array(size_hw, np.int64))
                    answer.bind_output("class_map", "cpu")
                    answer.bind_output("zero", "cpu")
                    upsampler.run_with_iobinding(answer)
                    class_map, zero = answer.copy_outputs_to_cpu()
                    class_maps.append((class_map[0], zero))
        except Exception as error:
            raise InferenceError(f"the model failed: {_reason(error)}") from error
        if any(zero != 0 for _, zero in class_maps):
            raise InferenceError("the model produced logits that are not finite")
        return [class_map for class_map, _ in class_maps]

    def _upsampler(self) -> Any:  # noqa: ANN401
        with self._opening_upsampler:
            if self._second is None:
                options = ort.SessionOptions()
                options.intra_op_num_threads = self.threads
                options.log_severity_level = 4
                graph = (files("segcli.data") / "class_map.onnx").read_bytes()
                self._second = _open(graph, options, self.provider, self._number)
            return self._second

    def _automatic(self, model: Path | bytes, options: Any) -> Any:  # noqa: ANN401
        if CUDA in ort.get_available_providers() and cuda_driver_present():
            # ONNX Runtime goes on with the CPU after most failures, and raises after some.
            with contextlib.suppress(DeviceError):
                session = _open(model, options, CUDA, 0)
                if session.get_providers()[0] == CUDA:
                    return session
            self.fallback = (
                "a CUDA driver is here but ONNX Runtime could not use it; running on the CPU"
            )
        return _open(model, options, CPU, 0)

    def _prove(self, provider: str, device: str) -> None:
        active = self._session.get_providers()
        if active[0] != provider:
            raise DeviceError(
                f"device {device!r} was asked for but {provider} is not active: "
                f"ONNX Runtime {ort.__version__} took {active[0]}",
                hint="'segcli doctor' says what is missing; --device auto or cpu runs without it",
            )


def open_session(
    model: Path, *, device: str = "auto", threads: int | None = None, shared: bool = False
) -> Future[Session]:
    """Starts to open a session and returns at once; ONNX Runtime holds no lock meanwhile.

    The file's own digest is checked before ONNX Runtime sees it. Args and what ``result()`` raises
    are those of ``Session``.
    """

    def open_checked() -> Session:
        check_seal(model)
        return Session(model, device=device, threads=threads, shared=shared)

    with_one = ThreadPoolExecutor(1, thread_name_prefix="segcli-open")
    opening = with_one.submit(open_checked)
    with_one.shutdown(wait=False)
    return opening


def _check_input(inputs: list[Any]) -> tuple[str, tuple[int, int] | None]:
    """Returns the name of the one input, and its height and width if they are fixed."""
    if len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4:
        _, channels, height, width = inputs[0].shape  # a dynamic one is a string or None
        if channels == 3 or not isinstance(channels, int):
            if isinstance(height, int) and isinstance(width, int):
                return inputs[0].name, (height, width)
            if not isinstance(height, int) and not isinstance(width, int):
                return inputs[0].name, None
    found = ", ".join(f"{i.type} {i.shape}" for i in inputs) or "nothing"
    raise ArtifactError(f"the graph takes {found}, expected one of float32 (N, 3, H, W)")


def parse_device(device: str) -> tuple[str, int]:
    """Returns ONNX Runtime's provider name and the device number of ``cuda:1`` and the like.

    Raises:
        DeviceError: This ONNX Runtime has no such provider.
    """
    name, _, number = device.partition(":")
    available = ort.get_available_providers()
    by_name = {p.removesuffix("ExecutionProvider").lower(): p for p in available}
    if name.lower() not in by_name or (number and not number.isdecimal()):
        raise DeviceError(
            f"device {device!r} is not available: this ONNX Runtime {ort.__version__} has "
            f"{', '.join(sorted(by_name))}",
            hint="'segcli doctor' says how to get another",
        )
    return by_name[name.lower()], int(number or 0)


def provider_options(provider: str, number: int) -> dict[str, str]:
    """Returns the options with which a provider is opened."""
    if provider == CUDA:
        return {
            "device_id": str(number),
            # EXHAUSTIVE, the default, searches anew for each shape: 634 ms against 1.9 ms a shape
            # (PaddlePaddle/PaddleX#5057); DEFAULT picks slow kernels (onnxruntime#22705).
            "cudnn_conv_algo_search": "HEURISTIC",
            # The default doubles the arena whenever one picture is larger than those before.
            "arena_extend_strategy": "kSameAsRequested",
        }
    if provider == TENSORRT:
        return {"device_id": str(number)}
    return {}


def available_providers() -> list[str]:
    """Returns the providers that this ONNX Runtime was built with; they may still fail to load."""
    return list(ort.get_available_providers())


def version() -> str:
    """Returns ONNX Runtime's version."""
    return str(ort.__version__)


def cuda_driver_present() -> bool:
    """Says whether the CUDA driver library is on this machine."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def preload_cuda() -> None:
    """Loads the CUDA and cuDNN libraries that the ``cuda`` extra installs as wheels, if it has."""
    if hasattr(ort, "preload_dlls"):
        # It prints what it does not find; whether the provider starts is proved afterwards.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls(directory="")


# A run with more threads than this spends them on waiting for each other between operators: so many
# cores run several images at once instead. Not measured beyond two cores.
MOST_THREADS = 4

# Images under way for each core where they come over a network: at 80 ms a GET two cores did 16
# images a second with one each, 29 with two or four (SegFormer-B0).
DISTANT = 4


def usable_cores() -> int:
    """Returns the number of cores this process may really use: affinity and cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores or 1, math.ceil(quota) if quota else cores or 1))


def cgroup_quota(root: Path) -> float | None:
    """Returns the CPU quota in cores: cgroup v2 ``cpu.max``, else v1's pair of files."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not limit.isdecimal() or not period.isdecimal() or not int(period):
        return None
    return int(limit) / int(period) or None


def _open(model: Path | bytes, options: Any, provider: str, number: int) -> Any:  # noqa: ANN401
    if provider in (CUDA, TENSORRT):
        preload_cuda()
    source = model if isinstance(model, bytes) else os.fspath(model)
    # Operators that the provider lacks run on the CPU, so that one is always second.
    providers = [(provider, provider_options(provider, number))]
    if provider != CPU:
        providers.append((CPU, {}))
    try:
        # Its own fallback prints a banner, and tries the CPU, which is ours to decide.
        return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        if provider != CPU and type(error).__name__ not in _FAULTS_OF_THE_FILE:
            raise DeviceError(f"{provider} does not start: {_reason(error)}") from error
        where = "the model" if isinstance(model, bytes) else repr(str(model))
        raise ArtifactError(f"ONNX Runtime cannot load {where}: {_reason(error)}") from error


def _trim_heap() -> None:
    """Gives back what parsing the model leaves in glibc's heap: the size of the file again."""
    if sys.platform == "linux":
        # musl has no such function.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
