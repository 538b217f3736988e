"""The records of a benchmark, and their JSON form. Nothing is measured here."""

import platform
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segcli import __version__, session
from segcli.artifact import Task
from segcli.image_io import DEFAULT_MAX_PIXELS

BENCHMARK_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        workers: Images worked on at once, for the throughput.
        threads: Threads within one image's run.
        runs: Images timed one by one; None takes some seconds' worth.
        warmup: Images run before each timing and not counted.
        max_pixels: Images with more are refused.
        image_size_wh: Width and height of the images made where none are given.
        sweep: Measures the throughput of every split of the usable cores, too.
    """

    workers: int = 1
    threads: int = 1
    runs: int | None = None
    warmup: int = 3
    max_pixels: int = DEFAULT_MAX_PIXELS
    image_size_wh: tuple[int, int] = (1920, 1080)
    sweep: bool = False


@dataclass(frozen=True)
class Stage:
    """The times of one stage.

    Attributes:
        name: ``decode``, ``preprocess``, ``infer``, ``postprocess``, ``encode``, or ``image`` for
            all of them together.
        samples_ms: One per run.
    """

    name: str
    samples_ms: tuple[float, ...]

    @cached_property
    def median_ms(self) -> float:
        """The time that half of the runs stay below."""
        return float(np.median(self.samples_ms))

    @cached_property
    def p95_ms(self) -> float:
        """The time that 95 % of the runs stay below, interpolated."""
        return float(np.percentile(self.samples_ms, 95))


@dataclass(frozen=True)
class Throughput:
    """What the pipeline did.

    Attributes:
        workers: Images worked on at once.
        threads: Threads within one image's run.
        images: How many went through.
        seconds: From the first to the last, without loading.
    """

    workers: int
    threads: int
    images: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured, and on what.

    Attributes:
        model: The name in the model's own card.
        task: Of the model.
        provider: ONNX Runtime's name of the active provider.
        options: As asked for.
        images: Different images used.
        generated: Whether they were made here.
        image_wh: Their width and height, None where they differ.
        input_wh: What the graph was given, None where that differs.
        load_ms: Importing the libraries and opening the model.
        stages: In the order an image goes through them.
        image: All stages of an image together.
        throughput: Of the pipeline.
        peak_rss_bytes: The most memory that the process held, sweep excluded; None where the
            system does not say.
        sweep: The throughput of other splits of the cores.
        cpu: The processor's name.
        cores: Of this machine.
        usable_cores: That this process may use.
    """

    model: str
    task: Task
    provider: str
    options: BenchOptions
    images: int
    generated: bool
    image_wh: tuple[int, int] | None
    input_wh: tuple[int, int] | None
    load_ms: float
    stages: tuple[Stage, ...]
    image: Stage
    throughput: Throughput
    peak_rss_bytes: int | None
    sweep: tuple[Throughput, ...]
    cpu: str
    cores: int
    usable_cores: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the object of ``--json``; its JSON Schema ships with the package."""
        return {
            "schema": BENCHMARK_SCHEMA,
            "model": self.model,
            "task": self.task,
            "provider": self.provider,
            "workers": self.options.workers,
            "threads": self.options.threads,
            "images": self.images,
            "generated": self.generated,
            "image_size": _size_dict(self.image_wh),
            "input_size": _size_dict(self.input_wh),
            "warmup": self.options.warmup,
            "runs": len(self.image.samples_ms),
            "load_ms": round(self.load_ms, 3),
            "stages": {stage.name: _stage_dict(stage) for stage in self.stages},
            "image": _stage_dict(self.image),
            "throughput": {
                "images": self.throughput.images,
                "seconds": round(self.throughput.seconds, 6),
                "images_per_s": _digits(self.throughput.images_per_s),
            },
            "peak_rss_bytes": self.peak_rss_bytes,
            "sweep": [
                {
                    "workers": run.workers,
                    "threads": run.threads,
                    "images_per_s": _digits(run.images_per_s),
                }
                for run in self.sweep
            ],
            "machine": {
                "cpu": self.cpu,
                "cores": self.cores,
                "usable_cores": self.usable_cores,
                "system": f"{platform.system()} {platform.machine()}",
            },
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Returns the versions of what was at work."""
        return {
            "segcli": __version__,
            "onnxruntime": session.version(),
            "python": platform.python_version(),
        }


def _size_dict(size_wh: tuple[int, int] | None) -> dict[str, int] | None:
    return None if size_wh is None else {"width": size_wh[0], "height": size_wh[1]}


def _stage_dict(stage: Stage) -> dict[str, float]:
    return {"median_ms": round(stage.median_ms, 3), "p95_ms": round(stage.p95_ms, 3)}


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
