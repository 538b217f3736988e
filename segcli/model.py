"""One call from an image to its answer: preprocess, session, postprocess.

``load()`` is the Python API; the command line uses the same object.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli import image_io, storage
from segcli.artifact import MIN_IMAGE_SIZE, ModelCard
from segcli.confidence import class_map_and_confidence
from segcli.errors import (
    ImageError,
    InferenceError,
    UsageError,
    is_out_of_memory,
)
from segcli.fields import Upsampled, class_map
from segcli.network import PLAIN, Network
from segcli.postprocess import against_nothing, argmax_class_map, scores, top_k
from segcli.protocol import Protocol
from segcli.registry import load_registry
from segcli.results import Classification, ClassMap, Features, Label, Segmentation
from segcli.session import CPU, CUDA, Session
from segcli.store import Tell, obtain

Answer: TypeAlias = Segmentation | Classification | Features
# Height and width of a class map; that of the logits without any resize.
MapSize: TypeAlias = tuple[int, int] | Literal["logits"]

# Upsampled logits that a GPU may be asked to hold: 2 GiB of float32.
MOST_VALUES = 1 << 29


class Model(Network):
    """A model: call it with an image."""

    def __init__(self, path: Path, card: ModelCard, opening: Future[Session]) -> None:
        super().__init__(path, card, opening)
        self._palette = np.array(card.palette, np.uint8).reshape(-1, 3)

    def __call__(
        self,
        image: npt.NDArray[np.uint8] | str | os.PathLike[str],
        *,
        size_hw: MapSize | None = None,
        protocol: Protocol = PLAIN,
        confidence: bool = False,
    ) -> Answer:
        """Answers for one image; safe to call from several threads.

        Args:
            image: (H, W, 3) uint8 RGB, or the path of an image file.
            size_hw: Height and width of the class map, ``logits`` for that of the logits, None for
                the image's own.
            protocol: How the model is shown the image.
            confidence: Asks a segmentation how sure it is, too.

        Raises:
            ImageError: The image cannot be read or the model failed on it.
            UsageError: The array is no RGB image.
        """
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            image = image_io.decode_image(storage.read_bytes(path), path)
        [answer] = self.answer(
            [image], [size_hw or image.shape[:2]], protocol, confidence=confidence
        )
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def answer(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        sizes_hw: Sequence[MapSize],
        protocol: Protocol = PLAIN,
        *,
        confidence: bool = False,
        mean_confidence: bool = False,
    ) -> list[Answer | ImageError]:
        """Answers for several images; one that fails has its error in its place.

        On an accelerator those whose network input has one size go through it together. On the
        CPU each goes alone, which is as fast and makes its answer independent of the others.

        Args:
            images: (H, W, 3) uint8 RGB each.
            sizes_hw: Height and width of each class map, or ``logits``.
            protocol: How the model is shown the images.
            confidence: Asks segmentations how sure they are, too.
            mean_confidence: The same of the whole picture, which costs little.

        Raises:
            UsageError: An array is no RGB image.
        """
        answers: list[Answer | ImageError | None] = [None] * len(images)
        inputs: dict[int, npt.NDArray[np.float32]] = {}
        for place, image in enumerate(images):
            _check_image(image)
            try:
                if protocol.one_look and not confidence and not mean_confidence:
                    inputs[place] = self.prepare(image, protocol)
                else:
                    answers[place] = self._looked(
                        image,
                        sizes_hw[place],
                        protocol,
                        confidence=confidence,
                        mean_confidence=mean_confidence,
                    )
            except Exception as error:
                answers[place] = _image_error(error)
        for group in self._groups(inputs):
            found: Sequence[Answer | ImageError] = ()
            if group[1:] or self.maps_on_device:
                # It may fail for want of memory, or for one image that must not fail the others.
                try:
                    found = self._answer_group(group, inputs, images, sizes_hw)
                except Exception as error:
                    _image_error(error)
            if not found:
                found = [self._answer_one(inputs[i], images[i], sizes_hw[i]) for i in group]
            for place, answer in zip(group, found, strict=True):
                answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def _looked(
        self,
        image: npt.NDArray[np.uint8],
        size_hw: MapSize,
        protocol: Protocol,
        *,
        confidence: bool,
        mean_confidence: bool,
    ) -> Segmentation:
        image_hw = (image.shape[0], image.shape[1])
        field = self.field(image, image_hw if size_hw == "logits" else size_hw, protocol)
        if size_hw == "logits":
            if confidence or not isinstance(field, Upsampled):
                raise UsageError("only a class map alone, of one look, has the size of the logits")
            field = _grid(field)
        activation = self.card.activation
        if confidence or (mean_confidence and not isinstance(field, Upsampled)):
            found, margins = class_map_and_confidence(field, activation)
            answer = self._segmentation(found, image)
            return replace(
                answer, confidence=margins, mean_confidence=float(margins.mean(dtype=np.float64))
            )
        answer = self._segmentation(class_map(field), image)
        if not mean_confidence or not isinstance(field, Upsampled):
            return answer
        # On the grid of the logits: the picture's own pixels would take many times as long.
        _, margins = class_map_and_confidence(_grid(field), activation)
        return replace(answer, mean_confidence=float(margins.mean(dtype=np.float64)))

    def _groups(self, inputs: dict[int, npt.NDArray[np.float32]]) -> list[list[int]]:
        """Returns the places that go through the network together."""
        if self.provider == CPU:
            return [[place] for place in inputs]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, pixel_values in inputs.items():
            groups.setdefault(pixel_values.shape, []).append(place)
        return list(groups.values())

    def _answer_group(
        self,
        group: list[int],
        inputs: dict[int, npt.NDArray[np.float32]],
        images: Sequence[npt.NDArray[np.uint8]],
        sizes_hw: Sequence[MapSize],
    ) -> Sequence[Answer]:
        batch = np.concatenate([inputs[i] for i in group]) if group[1:] else inputs[group[0]]
        if self.card.task == "features":
            return self._features(batch, [images[i] for i in group])
        sizes = [sizes_hw[i] for i in group]
        most = MOST_VALUES // len(self.card.class_names)
        known = [s for s in sizes if s != "logits" and math.prod(s) <= most]
        if self.maps_on_device and len(known) == len(sizes):
            maps = self.session.class_maps(batch, known)
            return [self._segmentation(m, images[i]) for i, m in zip(group, maps, strict=True)]
        logits = self.infer(batch)
        return [
            self.interpret(logits[n], images[i], size)
            for n, (i, size) in enumerate(zip(group, sizes, strict=True))
        ]

    def _answer_one(
        self,
        pixel_values: npt.NDArray[np.float32],
        image: npt.NDArray[np.uint8],
        size_hw: MapSize,
    ) -> Answer | ImageError:
        try:
            if self.card.task == "features":
                return self._features(pixel_values, [image])[0]
            return self.interpret(self.infer(pixel_values)[0], image, size_hw)
        except Exception as error:
            return _image_error(error)

    def _features(
        self, batch: npt.NDArray[np.float32], images: Sequence[npt.NDArray[np.uint8]]
    ) -> list[Features]:
        outputs = dict(zip(self.session.output_names, self.session.run(batch), strict=True))
        for name, values in outputs.items():
            if len(values) != len(batch) or not np.isfinite(values).all():
                raise InferenceError(f"the model's {name} is not finite, or of another batch")
        return [
            Features(
                {name: values[i] for name, values in outputs.items()},
                (image.shape[0], image.shape[1]),
                self.provider,
            )
            for i, image in enumerate(images)
        ]

    def interpret(
        self,
        logits: npt.NDArray[np.float32],
        image: npt.NDArray[np.uint8],
        size_hw: MapSize | None = None,
    ) -> Answer:
        """Returns what the logits of one image say, as ``__call__`` does.

        Args:
            logits: (K, h, w) or (K,), of one image, from ``infer``.
            image: (H, W, 3) uint8 RGB, the image they are of.
            size_hw: As for ``__call__``.

        Raises:
            InferenceError: The logits are not finite, or not of the card's classes.
        """
        image_hw = (image.shape[0], image.shape[1])
        if self.card.task == "segmentation":
            logits = against_nothing(logits, self.card.activation)
            self.check_classes(len(logits))
            map_hw = logits.shape[1:] if size_hw == "logits" else size_hw or image_hw
            ids = argmax_class_map(
                logits, (map_hw[0], map_hw[1]), align_corners=self.card.align_corners
            )
            return self._segmentation(ids, image)
        self.check_classes(len(logits))
        values = scores(logits, self.card.activation)
        labels = [
            Label(i, self.card.class_names[i], score) for i, score in top_k(values, len(values))
        ]
        return Classification(labels, image_hw, self.provider)

    def _segmentation(self, ids: npt.NDArray[Any], image: npt.NDArray[np.uint8]) -> Segmentation:
        names = self.card.class_names
        # uint8 or uint16 already where the CPU made it.
        found: ClassMap = (
            np.asarray(ids, np.uint8) if len(names) <= 256 else np.asarray(ids, np.uint16)
        )
        return Segmentation(found, names, self._palette, image, self.provider)

    @cached_property
    def maps_on_device(self) -> bool:
        """Whether class maps are made on the GPU that the logits are on.

        Proved once on a small picture: drivers and providers differ, and this path must give the
        masks of the other one.
        """
        card, session = self.card, self.session
        fits = card.task == "segmentation" and card.activation != "sigmoid"
        fits &= session.num_channels == len(card.class_names)
        if session.provider != CUDA or not fits or card.align_corners:
            return False
        height, width = session.input_hw or (MIN_IMAGE_SIZE, 2 * MIN_IMAGE_SIZE)
        noise = np.random.default_rng(0).standard_normal((1, 3, height, width), np.float32)
        size_hw = (2 * height + 1, width + 7)
        try:
            [found] = session.class_maps(noise, [size_hw])
            expected = argmax_class_map(self.infer(noise)[0], size_hw)
        except InferenceError:
            return False
        # TF32 moves the logits a little from run to run of different algorithms.
        return bool((found == expected).mean() >= 0.99)


def load(
    model: str | os.PathLike[str] = "segformer-b0-camvid",
    *,
    device: str = "auto",
    threads: int | None = None,
    offline: bool = False,
    registry: str | os.PathLike[str] | None = None,
    tell: Tell = lambda _: None,
) -> Model:
    """Returns a model by registry name or path; a name is fetched and exported on first use.

    Args:
        model: ``segformer-b2`` and the like, or the path of an .onnx file.
        device: ``auto``, ``cpu``, ``cuda[:N]`` …; anything but ``auto`` is that or an error.
        threads: Threads within one operator; None takes the cores this process may use.
        offline: Forbids the network.
        registry: A file of further names.
        tell: Is given one line before anything is fetched.

    Raises:
        ModelError: The model is unknown, missing, damaged or cannot be fetched.
        DeviceError: The device is not to be had.
    """
    names = load_registry(Path(registry) if registry is not None else None)
    path = obtain(os.fspath(model), names, offline=offline, tell=tell)
    return Model.open(path, device=device, threads=threads)


def _image_error(error: Exception) -> ImageError:
    """Returns what failed as one image's error; raises what is none."""
    if isinstance(error, ImageError):
        return error
    if is_out_of_memory(error):
        return InferenceError("not enough memory", hint="fewer --workers need less at once")
    raise error


def _check_image(image: object) -> None:
    if not isinstance(image, np.ndarray):
        raise UsageError(f"an image of type {type(image).__name__}, expected an array or a path")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UsageError(
            f"an image of shape {image.shape} and dtype {image.dtype}, expected (H, W, 3) uint8 RGB"
        )


def _grid(field: Upsampled) -> Upsampled:
    """Returns logits at their own size."""
    return Upsampled(field.logits, (field.logits.shape[1], field.logits.shape[2]))
