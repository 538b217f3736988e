"""MobileNetV2: the ImageNet classifier and the DeepLab segmenter built on it, for inference.

One file, top to bottom: config, convolution, block, backbone, heads. Modules carry the names of the
hub's state dicts, so a checkpoint loads strictly and without renaming. Nothing here reads files,
and nothing trains: call ``eval()`` before use.

References:
    MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381 (Table 2).
    Rethinking Atrous Convolution (image pooling, output stride), arXiv 1706.05587.
    TensorFlow's SAME padding: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    Names, shapes and numbers are tested against transformers' port of both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcli.errors import CheckpointError
from segcli.export.activations import ACTIVATIONS

# Channels c, repeats n, first stride s of Table 2. The first row is the stem's own block; its
# expansion t is 1, that of all others `expand_ratio`.
C_N_S = (
    (16, 1, 1),
    (24, 2, 2),
    (32, 3, 2),
    (64, 4, 2),
    (96, 3, 1),
    (160, 3, 2),
    (320, 1, 1),
)
STEM_CHANNELS, LAST_CHANNELS, HEAD_CHANNELS = 32, 1280, 256
HEAD_EPS = 1e-5  # transformers ignores layer_norm_eps in the DeepLab head

# What a config value must be: a test, and its wording. `type() is` keeps True from passing for 1.
Domain = tuple[Callable[[Any], bool], str]
_COUNT: Domain = (lambda v: type(v) is int and v > 0, "an integer above 0")
_NUMBER: Domain = (
    lambda v: type(v) in (int, float) and 0 < v <= 1000,
    "a number above 0 and at most 1000",
)
_FLAG: Domain = (lambda v: type(v) is bool, "true or false")
DOMAINS: dict[str, Domain] = {
    "num_channels": _COUNT,
    "depth_multiplier": _NUMBER,
    "depth_divisible_by": _COUNT,
    "min_depth": _COUNT,
    "expand_ratio": _NUMBER,
    "output_stride": (lambda v: type(v) is int and v in (8, 16, 32), "8, 16 or 32"),
    "first_layer_is_expansion": _FLAG,
    "finegrained_output": _FLAG,
    "hidden_act": (
        lambda v: isinstance(v, str) and v in ACTIVATIONS,
        f"one of {', '.join(ACTIVATIONS)}",
    ),
    "tf_padding": _FLAG,
    "layer_norm_eps": _NUMBER,
    "num_labels": _COUNT,
}


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config:
    """What a hub config.json says of the network, under its names and with its defaults.

    Attributes:
        num_channels: Channels of the input image.
        depth_multiplier: The paper's width multiplier (slim called it depth).
        depth_divisible_by: Channel counts are rounded to a multiple of this.
        min_depth: The least channel count that rounding may give.
        expand_ratio: The paper's t, for all blocks but the stem's.
        output_stride: 8, 16 or 32: input pixels per cell of the last feature map. Once it is
            reached, strides turn into dilation of the blocks that follow.
        first_layer_is_expansion: The stem's 3x3 convolution is its block's expansion; if False, the
            block has a 1x1 expansion (t = 1) of its own.
        finegrained_output: The last 1x1 convolution keeps 1280 channels if depth_multiplier < 1.
        hidden_act: Activation in the backbone; the DeepLab head always has a plain ReLU.
        tf_padding: TensorFlow's SAME padding; if False, PyTorch's symmetric padding, which differs
            at stride 2 on even sizes.
        layer_norm_eps: Despite its name the batch norm's epsilon, and in the backbone alone: the
            DeepLab head has 1e-5 whatever this says.
        num_labels: Classes, background included.
        image_size: The size it was trained at. No effect and not checked: any size goes in.

    Raises:
        CheckpointError: A value that the network cannot have.
    """

    num_channels: int = 3
    depth_multiplier: float = 1.0
    depth_divisible_by: int = 8
    min_depth: int = 8
    expand_ratio: float = 6.0
    output_stride: int = 32
    first_layer_is_expansion: bool = True
    finegrained_output: bool = True
    hidden_act: str = "relu6"
    tf_padding: bool = True
    layer_norm_eps: float = 0.001
    num_labels: int = 1001
    image_size: int | tuple[int, int] | list[int] = 224

    def __post_init__(self) -> None:  # noqa: D105
        for name, (holds, expected) in DOMAINS.items():
            if not holds(value := getattr(self, name)):
                raise CheckpointError(
                    f"MobileNetV2 config has {name} = {value!r}, expected {expected}"
                )

    def round_channels(self, channels: float) -> int:
        """Returns the nearest count the divisor and minimum allow, at most a tenth below."""
        value, divisor = round(channels), self.depth_divisible_by
        nearest = max(self.min_depth, int(value + divisor / 2) // divisor * divisor)
        return nearest if nearest >= 0.9 * value else nearest + divisor

    def scale_channels(self, channels: int) -> int:
        """Returns what the paper's `channels` become at this depth_multiplier."""
        return self.round_channels(channels * self.depth_multiplier)

    def block_strides(self) -> list[tuple[int, int]]:
        """Returns (stride, dilation) of the depthwise convolution of each block after the stem."""
        plan = []
        reached, dilation = 2, 1  # the stem's first convolution has stride 2
        for _, repeats, first_stride in C_N_S[1:]:
            for stride in [first_stride] + [1] * (repeats - 1):
                if reached < self.output_stride:
                    plan.append((stride, 1))
                    reached *= stride
                else:
                    # The block that gives up its stride is itself not yet dilated by it.
                    plan.append((1, dilation))
                    dilation *= stride
        return plan


class SamePadConv2d(nn.Conv2d):
    """A strided convolution with TensorFlow's SAME padding, which depends on the input's size.

    Only strides need it: at stride 1 SAME is symmetric at any size, and plain ``nn.Conv2d`` does.
    An ONNX export gets one Conv node and no Pad: at a fixed size the padding is in its `pads`, at a
    dynamic one `auto_pad` makes one graph right at every size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C', ceil(H/s), ceil(W/s)) of a (B, C, H, W) input."""
        if torch.onnx.is_in_onnx_export():
            return self._onnx_conv(x)
        top, left, bottom, right = self._pads(x)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _pads(self, x: Tensor) -> list[int]:
        """Returns top, left, bottom, right; of an odd sum the greater half goes bottom, right."""
        totals = [
            max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, s, k, d in zip(
                x.shape[2:], self.stride, self.kernel_size, self.dilation, strict=True
            )
        ]
        before = [total // 2 for total in totals]
        return before + [total - b for total, b in zip(totals, before, strict=True)]

    def _onnx_conv(self, x: Tensor) -> Tensor:
        is_fixed = all(type(n) is int for n in x.shape[2:])  # else a torch.SymInt
        sizes = [(n + s - 1) // s for n, s in zip(x.shape[2:], self.stride, strict=True)]
        return torch.onnx.ops.symbolic(
            "Conv",
            [x, self.weight] if self.bias is None else [x, self.weight, self.bias],
            {
                "kernel_shape": self.kernel_size,
                "strides": self.stride,
                "dilations": self.dilation,
                "group": self.groups,
                **({"pads": self._pads(x)} if is_fixed else {"auto_pad": "SAME_UPPER"}),
            },
            dtype=x.dtype,
            shape=[x.shape[0], self.out_channels, *sizes],
        )


class ConvLayer(nn.Module):
    """Convolution, batch norm, activation; either of the last two may be an identity.

    Kernels are 1 or 3 wide, and dilated at stride 1 only. An `eps` of None means a bias in place of
    the batch norm; `activation` is a key of `ACTIVATIONS`; `tf_padding` is the config's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        eps: float | None = None,
        activation: str | None = None,
        tf_padding: bool = False,
    ) -> None:
        super().__init__()
        is_same = tf_padding and stride > 1
        self.convolution = (SamePadConv2d if is_same else nn.Conv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0 if is_same else (kernel_size - 1) // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=eps is None,
        )
        self.normalization = nn.Identity() if eps is None else nn.BatchNorm2d(out_channels, eps)
        self.activation = ACTIVATIONS[activation]() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C', ceil(H/s), ceil(W/s)) of a (B, C, H, W) input."""
        x = self.activation(self.normalization(self.convolution(x)))
        return x


def _backbone_layer(config: MobileNetV2Config) -> partial[ConvLayer]:
    return partial(
        ConvLayer,
        eps=config.layer_norm_eps,
        activation=config.hidden_act,
        tf_padding=config.tf_padding,
    )


class Stem(nn.Sequential):
    """The first convolution and the table's first row: (B, 3, H, W) -> (B, 16, H/2, W/2)."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        conv = _backbone_layer(config)
        mid, out = (config.scale_channels(c) for c in (STEM_CHANNELS, C_N_S[0][0]))
        self.first_conv = conv(config.num_channels, mid, 3, stride=2)
        if not config.first_layer_is_expansion:
            self.expand_1x1 = conv(mid, mid)
        self.conv_3x3 = conv(mid, mid, 3, groups=mid)
        self.reduce_1x1 = conv(mid, out, activation=None)


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project without activation; add the input where shapes agree."""

    def __init__(
        self,
        config: MobileNetV2Config,
        c_in: int,
        c_out: int,
        stride: int,
        dilation: int,
    ) -> None:
        super().__init__()
        conv = _backbone_layer(config)
        mid = config.round_channels(c_in * config.expand_ratio)
        self.is_residual = stride == 1 and c_in == c_out
        self.expand_1x1 = conv(c_in, mid)
        self.conv_3x3 = conv(mid, mid, 3, stride=stride, dilation=dilation, groups=mid)
        self.reduce_1x1 = conv(mid, c_out, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, c_out, ceil(H/s), ceil(W/s)) of a (B, c_in, H, W) input."""
        return self.narrow(x, self.expand_1x1(x))  # (B, C, H, W) -> (B, tC, H, W)

    def narrow(self, x: Tensor, expanded: Tensor) -> Tensor:
        """Returns the block's output of its input and that of ``expand_1x1``."""
        y: Tensor = self.reduce_1x1(self.conv_3x3(expanded))  # (B, tC, H, W) -> (B, C', H/s, W/s)
        return x + y if self.is_residual else y


class Backbone(nn.Module):
    """The stem and sixteen blocks; `conv_1x1` lives here but is called by the heads that use it."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        channels = [config.scale_channels(c) for c, n, _ in C_N_S for _ in range(n)]
        self.conv_stem = Stem(config)
        self.layer = nn.Sequential()
        for i, (stride, dilation) in enumerate(config.block_strides()):
            self.layer.append(
                InvertedResidual(config, channels[i], channels[i + 1], stride, dilation)
            )
        keeps_last = config.finegrained_output and config.depth_multiplier < 1
        last = LAST_CHANNELS if keeps_last else config.scale_channels(LAST_CHANNELS)
        self.conv_1x1 = _backbone_layer(config)(channels[-1], last)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, 320, H/os, W/os): sizes rounded up, os the output stride."""
        x = self.layer(self.conv_stem(x))
        return x


class MobileNetV2Features(nn.Module):
    """The network without a head.

    Outputs, in order: ``last_hidden_state`` (B, 1280, H/os, W/os), ``pooler_output`` (B, 1280), its
    mean, and ``expansion_N`` (B, tC, h, w) for each chosen block, counted from zero: what its first
    1x1 convolution gives after ReLU6.

    Raises:
        CheckpointError: A chosen block does not exist.
    """

    def __init__(self, config: MobileNetV2Config, expansions: Sequence[int] = ()) -> None:
        super().__init__()
        self.mobilenet_v2 = Backbone(config)
        blocks = len(self.mobilenet_v2.layer)
        for block in expansions:
            if not 0 <= block < blocks:
                raise CheckpointError(f"no block {block}: the network has blocks 0 to {blocks - 1}")
        self.expansions = tuple(expansions)
        self.output_names = (
            *("last_hidden_state", "pooler_output"),
            *(f"expansion_{i}" for i in self.expansions),
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs that ``output_names`` lists."""
        x: Tensor = self.mobilenet_v2.conv_stem(pixel_values)
        expanded: list[Tensor] = []
        for block in self.mobilenet_v2.layer:
            assert isinstance(block, InvertedResidual)
            expanded.append(block.expand_1x1(x))
            x = block.narrow(x, expanded[-1])
        x = self.mobilenet_v2.conv_1x1(x)
        return (x, x.mean((2, 3)), *(expanded[i] for i in self.expansions))


class MobileNetV2ForImageClassification(nn.Module):
    """The classifier: the pooled features and one linear layer."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        self.mobilenet_v2 = Backbone(config)
        last = self.mobilenet_v2.conv_1x1.convolution.out_channels
        self.classifier = nn.Linear(last, config.num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns logits (B, num_labels)."""
        x: Tensor = self.mobilenet_v2.conv_1x1(self.mobilenet_v2(pixel_values))
        x = self.classifier(x.mean((2, 3)))  # (B, 1280, h, w) -> (B, 1280) -> (B, K)
        return x


class DeepLabHead(nn.Module):
    """DeepLab with neither atrous pyramid nor decoder: a 1x1 branch beside image pooling."""

    def __init__(self, in_channels: int, num_labels: int) -> None:
        super().__init__()
        conv = partial(ConvLayer, eps=HEAD_EPS, activation="relu")
        self.conv_pool = conv(in_channels, HEAD_CHANNELS)
        self.conv_aspp = conv(in_channels, HEAD_CHANNELS)
        self.conv_projection = conv(2 * HEAD_CHANNELS, HEAD_CHANNELS)
        self.classifier = ConvLayer(HEAD_CHANNELS, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, num_labels, h, w) of features (B, 320, h, w)."""
        aspp = self.conv_aspp(x)  # (B, 256, h, w)
        pool = self.conv_pool(x.mean((2, 3), keepdim=True))  # (B, 256, 1, 1)
        # The paper upsamples this one cell bilinearly, which is a broadcast.
        x = torch.cat([pool.expand_as(aspp), aspp], dim=1)  # (B, 512, h, w)
        x = self.classifier(self.conv_projection(x))  # -> (B, 256, h, w) -> (B, K, h, w)
        return x


class MobileNetV2ForSemanticSegmentation(nn.Module):
    """The segmenter; `conv_1x1` is there because checkpoints have it, and never computed."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        self.mobilenet_v2 = Backbone(config)
        features = config.scale_channels(C_N_S[-1][0])
        # export/fold.py puts its equivalent here.
        self.segmentation_head: nn.Module = DeepLabHead(features, config.num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns logits (B, num_labels, H/os, W/os): sizes rounded up, os the output stride."""
        x: Tensor = self.segmentation_head(self.mobilenet_v2(pixel_values))
        return x
