"""Features by name: a network that gives the outputs that were asked for, and computes no more."""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from segcli.errors import UsageError
from segcli.export.by_shapes import NetworkConfig
from segcli.export.mobilenet_v2 import MobileNetV2Config, MobileNetV2Features
from segcli.export.segformer import SegformerFeatures


def features_module(network: NetworkConfig, layers: Sequence[str]) -> nn.Module:
    """Returns a network without its head, which has the chosen layers among its outputs.

    Args:
        network: Its config.
        layers: Names of outputs; those that every network of the family has need not be named.

    Raises:
        CheckpointError: The network has no such block.
    """
    if isinstance(network, MobileNetV2Config):
        blocks = (re.fullmatch(r"expansion_([0-9]+)", name) for name in layers)
        return MobileNetV2Features(network, [int(m[1]) for m in blocks if m])
    maps = (re.fullmatch(r"attention_([0-9]+)_([0-9]+)", name) for name in layers)
    return SegformerFeatures(network, [(int(m[1]), int(m[2])) for m in maps if m])


class ChosenLayers(nn.Module):
    """A features module that gives some of its outputs.

    What they do not depend on is not traced into a graph.

    Args:
        features: From ``features_module``, filled and folded.
        layers: Names of its outputs, in the order wanted.

    Raises:
        UsageError: It has no such output.
    """

    def __init__(self, features: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        known = tuple(str(name) for name in features.output_names)  # type: ignore[union-attr]
        for name in layers:
            if name not in known:
                more = "attention_S_B" if isinstance(features, SegformerFeatures) else "expansion_N"
                raise UsageError(
                    f"no layer {name!r}: this network has {', '.join(known)} and {more}",
                    hint="the S, B and N of these count from 0",
                )
        self.features, self.output_names = features, tuple(layers)
        self._places = tuple(known.index(name) for name in layers)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs that ``output_names`` lists."""
        outputs = self.features(pixel_values)
        return tuple(outputs[place] for place in self._places)
