"""A file and its session: from an image to what the graph gives, checked against its card."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from segcli.artifact import ModelCard
from segcli.errors import ArtifactError, InferenceError, UsageError
from segcli.fields import Field
from segcli.onnx_file import read_card
from segcli.postprocess import against_nothing, require_finite
from segcli.preprocess import preprocess
from segcli.protocol import Protocol, logits_field
from segcli.session import Session, open_session

PLAIN = Protocol()


class Network:
    """A model's graph, its card, and the session that runs it.

    Args:
        path: The .onnx file, for messages.
        card: What the file says of itself.
        opening: Its session, open or being opened.

    Attributes:
        card: What the file says of itself.
        path: The .onnx file.
    """

    def __init__(self, path: Path, card: ModelCard, opening: Future[Session]) -> None:
        self.card = card
        self.path, self._opening = path, opening
        self._checked = False

    @classmethod
    def open(cls, path: Path, *, device: str = "auto", threads: int | None = None) -> Self:
        """Returns a model that is ready.

        Args:
            path: An .onnx file that ``segcli export`` wrote.
            device: ``auto``, ``cpu``, ``cuda[:N]`` …; anything but ``auto`` is that or an error.
            threads: Threads within one operator; None takes the cores this process may use.

        Raises:
            ModelError: The file is missing, damaged, or does not describe itself.
            DeviceError: The device is not to be had.
        """
        card = read_card(path)
        network = cls(path, card, open_session(path, device=device, threads=threads))
        _ = network.session
        return network

    @property
    def session(self) -> Session:
        """The ONNX Runtime session; waits until it is open.

        Raises:
            ArtifactError: ONNX Runtime cannot load the file, or its graph is not the card's.
            DeviceError: The device is not to be had.
        """
        session = self._opening.result()
        if not self._checked:
            self._check_graph(session)
            self._checked = True
        return session

    def _check_graph(self, session: Session) -> None:
        card, path = self.card, str(self.path)
        names = (session.input_name, *session.output_names)
        if names != (card.input_name, *card.output_names):
            raise ArtifactError(
                f"the graph of {path!r} has the input and outputs {', '.join(names)}, its card "
                f"says {', '.join((card.input_name, *card.output_names))}"
            )
        expected = len(card.class_names)
        if card.task == "segmentation" and card.activation == "sigmoid":
            expected -= 1
        if card.task != "features" and session.num_channels not in (None, expected):
            raise ArtifactError(
                f"the graph of {path!r} gives {session.num_channels} classes, its card names "
                f"{expected}"
            )

    def when_ready(self, call: Callable[[], object]) -> None:
        """Calls once the session is open, or has failed to; at once where it has already."""
        self._opening.add_done_callback(lambda _: call())

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the provider that is active."""
        return self.session.provider

    @property
    def fallback(self) -> str | None:
        """Why ``auto`` did not take the accelerator it found, or None."""
        return self.session.fallback

    @property
    def threads(self) -> int:
        """Threads of one run."""
        return self.session.threads

    def prepare(
        self, image: npt.NDArray[np.uint8], protocol: Protocol = PLAIN
    ) -> npt.NDArray[np.float32]:
        """Returns the graph's input for one image, (1, 3, h, w) float32.

        Args:
            image: (H, W, 3) uint8 RGB.
            protocol: Its ``resize`` says at which size the model is shown the image.

        Raises:
            ImageError: The image does not fit the model.
        """
        spec = protocol.preprocessing(image.shape[:2], self.card.preprocessing)
        pixel_values = preprocess(image, spec)
        self._check_seen(pixel_values)
        return pixel_values

    def _check_seen(self, pixel_values: npt.NDArray[np.float32]) -> None:
        fixed, seen = self.session.input_hw, pixel_values.shape[2:]
        if fixed and seen != fixed:
            raise InferenceError(
                f"the model takes {fixed[0]}x{fixed[1]} only, it would be shown "
                f"{seen[0]}x{seen[1]} of this image"
            )

    def infer(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns the logits of a batch, (N, K, h, w) or (N, K).

        Args:
            pixel_values: (N, 3, h, w), from ``prepare``.

        Raises:
            InferenceError: The model failed, or its logits have another rank.
        """
        logits: npt.NDArray[Any] = self.session.run(pixel_values)[0]
        rank = 4 if self.card.task == "segmentation" else 2
        if logits.ndim != rank or not logits.size or len(logits) != len(pixel_values):
            raise InferenceError(
                f"the model's logits have shape {logits.shape}, expected {rank} dimensions, "
                f"the first {len(pixel_values)}"
            )
        return logits

    def field(
        self,
        image: npt.NDArray[np.uint8],
        size_hw: tuple[int, int],
        protocol: Protocol = PLAIN,
    ) -> Field:
        """Returns what the model says of every pixel, a class for each of the card's.

        Args:
            image: (H, W, 3) uint8 RGB.
            size_hw: Height and width of the field.
            protocol: How the model is shown the image.

        Raises:
            ImageError: The image does not fit the model, or the model failed on it; reading the
                field's rows may raise it, too.
            UsageError: The model is none for segmentation.
        """
        if self.card.task != "segmentation":
            raise UsageError(f"{self.card.name!r} is no segmentation model")

        def look(pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            self._check_seen(pixel_values)
            logits = against_nothing(self.infer(pixel_values)[0], self.card.activation)
            self.check_classes(len(logits))
            require_finite(logits)
            return logits

        return logits_field(image, self.card, protocol, look, size_hw)

    def check_classes(self, found: int) -> None:
        """Raises InferenceError where a graph gives another number of classes than its card."""
        if found != len(self.card.class_names):
            raise InferenceError(
                f"the model gives {found} classes, its card names {len(self.card.class_names)}"
            )
