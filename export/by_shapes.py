"""Which network a weight file holds, where no config.json says it: by tensor shapes."""

from typing import TypeAlias

from segcli.artifact import Task
from segcli.errors import CheckpointError
from segcli.export.mobilenet_v2 import MobileNetV2Config
from segcli.export.segformer import VARIANTS, SegformerConfig
from segcli.export.state_dict import StateDict

NetworkConfig: TypeAlias = SegformerConfig | MobileNetV2Config


def recognize(
    state: StateDict, family: str, task: Task, variant: str | None
) -> tuple[NetworkConfig, list[str]]:
    """Returns the network's config and what the reader should know.

    Args:
        state: The weights, under hub names.
        family: ``segformer`` or ``mobilenet_v2``.
        task: What the model is for.
        variant: Taken instead of what the shapes tell.

    Raises:
        CheckpointError: No known variant has these shapes.
    """
    if family == "segformer":
        found = _segformer_by_shapes(state, variant)
        return found, [f"no config.json: recognised as SegFormer-{variant_name(found).upper()}"]
    multiplier = depth_multiplier(state, variant)
    note = f"no config.json: recognised as MobileNetV2 {multiplier:g} with TensorFlow's padding"
    stride = 32
    if task == "segmentation":
        # Shapes do not tell; 8 is that of the only checkpoint on the hub.
        stride = 8
        note += ", output stride 8 assumed"
    return MobileNetV2Config(depth_multiplier=multiplier, output_stride=stride), [note]


def _segformer_by_shapes(state: StateDict, variant: str | None) -> SegformerConfig:
    if variant is not None:
        if variant not in VARIANTS:
            raise CheckpointError(
                f"unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}"
            )
        return VARIANTS[variant]
    prefix = "segformer.encoder."
    dims: list[int] = []
    depths: list[int] = []
    while (name := f"{prefix}patch_embeddings.{len(dims)}.proj.weight") in state:
        dims.append(state[name].shape[0])
        blocks = {k.split(".")[4] for k in state if k.startswith(f"{prefix}block.{len(depths)}.")}
        depths.append(len(blocks))
    for config in VARIANTS.values():
        if (config.depths, config.hidden_sizes) == (tuple(depths), tuple(dims)):
            return config
    raise CheckpointError(
        f"no config.json, and no SegFormer variant has depths {depths} and hidden_sizes {dims}",
        hint=f"put its config.json beside the file, or give --variant {'|'.join(VARIANTS)}",
    )


def depth_multiplier(state: StateDict, variant: str | None = None) -> float:
    """Returns the multiplier of a MobileNetV2 by its channels.

    Args:
        state: The weights, under hub names.
        variant: Taken instead of what the channels tell.

    Raises:
        CheckpointError: No known multiplier has these channels.
    """
    if variant is not None:
        try:
            return float(variant)
        except ValueError:
            raise CheckpointError(
                f"unknown variant {variant!r}, expected a depth multiplier such as 1.0"
            ) from None
    names = (
        "mobilenet_v2.layer.0.reduce_1x1.convolution.weight",
        "mobilenet_v2.layer.15.reduce_1x1.convolution.weight",
    )
    found = [state[n].shape[0] for n in names if n in state]
    for multiplier in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4):
        config = MobileNetV2Config(depth_multiplier=multiplier)
        if found == [config.scale_channels(24), config.scale_channels(320)]:
            return multiplier
    raise CheckpointError(
        f"no config.json, and no depth multiplier gives a MobileNetV2 with {found} channels "
        "in its first and last block",
        hint="put its config.json beside the file, or give --variant MULTIPLIER",
    )


def variant_name(network: NetworkConfig) -> str:
    """Returns ``b0`` … ``b5`` or ``custom``; the depth multiplier for MobileNetV2."""
    if isinstance(network, MobileNetV2Config):
        return f"{network.depth_multiplier:g}" if network.depth_multiplier != 1 else "1.0"
    for name, config in VARIANTS.items():
        if (network.depths, network.hidden_sizes) == (
            config.depths,
            config.hidden_sizes,
        ):
            return name
    return "custom"
