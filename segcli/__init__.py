"""Semantic segmentation and image classification on ONNX Runtime.

``load()`` gives a model as a function of an image; everything else is the command line.
Importing this package imports nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcli.model import Model as Model
    from segcli.model import load as load
    from segcli.results import Classification as Classification
    from segcli.results import Segmentation as Segmentation

__version__ = "0.1.0"
__all__ = ["Classification", "Model", "Segmentation", "__version__", "load"]

_HOMES = {
    "Model": "segcli.model",
    "load": "segcli.model",
    "Classification": "segcli.results",
    "Segmentation": "segcli.results",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # PEP 562: numpy, cv2 and onnxruntime are imported by the first use, not by the package.
    if name not in _HOMES:
        raise AttributeError(f"module 'segcli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
