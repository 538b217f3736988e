"""What a reader of weight files hands on: tensors, and what the file itself says of its network."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

StateDict: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """The tensors of one weight file under hub names.

    A file that is no Hugging Face checkpoint may fix more than tensors. It says so in the words of
    the hub's own files, so that there is one room that honours or refuses each field.

    Attributes:
        state: The tensors.
        notes: What the reader should know, one sentence each.
        config: Fields of a ``config.json`` that the file stands in for, or None.
        processor: Those of a ``preprocessor_config.json``, or None.
        align_corners: Convention of the upsampling of segmentation logits.
    """

    state: StateDict
    notes: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    align_corners: bool = False
