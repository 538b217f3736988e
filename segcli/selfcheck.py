"""One picture through the embedded model, against logits that were computed elsewhere.

Finds a broken wheel, a wrong provider or a damaged model file better than any list of versions.
``python -m segcli.selfcheck`` writes the stored logits again, after the embedded model changed; a
test compares them with transformers' own forward pass.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segcli.onnx_file import read_card
from segcli.preprocess import preprocess
from segcli.session import Session

MODEL = "segformer-b0-camvid.onnx"
STORED = "selfcheck.json"

# Of the logits' largest value. CPUs differ by 1e-6; CUDA's TF32 convolutions by 1e-3.
TOLERANCE = 1e-2

# One logit in so many of each axis is stored.
STEP = 9


def picture() -> npt.NDArray[np.uint8]:
    """Returns a (120, 160, 3) uint8 picture of integer arithmetic: the same on every machine."""
    y, x = np.mgrid[:120, :160]
    return np.stack([(x * 3 + y) % 256, (x * y // 16) % 256, (y * 5 - x) % 256], -1).astype(
        np.uint8
    )


def embedded_model() -> Path:
    """Returns the path of the embedded model."""
    return Path(str(files("segcli.data") / MODEL))


def run(device: str = "cpu") -> tuple[str, float]:
    """Runs the picture through the embedded model.

    Returns:
        The provider, and the largest difference from the stored logits over their largest value.

    Raises:
        ModelError: The embedded model is damaged.
        DeviceError: The device is not to be had.
    """
    stored = json.loads((files("segcli.data") / STORED).read_text())
    expected = np.array(stored["logits"], np.float64)
    provider, found = _logits(device)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return provider, float("inf")
    return provider, float(np.abs(found - expected).max() / np.abs(expected).max())


def _logits(device: str) -> tuple[str, npt.NDArray[np.float64]]:
    path = embedded_model()
    card = read_card(path)
    session = Session(path, device=device)
    logits: npt.NDArray[Any] = session.run(preprocess(picture(), card.preprocessing))[0][0]
    return session.provider, logits[:, ::STEP, ::STEP].astype(np.float64)


def _store() -> None:
    _, logits = _logits("cpu")
    path = Path(str(files("segcli.data") / STORED))
    rounded = [[[round(v, 4) for v in row] for row in plane] for plane in logits.tolist()]
    path.write_text(json.dumps({"logits": rounded}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    _store()
