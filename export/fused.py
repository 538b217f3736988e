"""SegFormer as ONNX Runtime computes it fastest: the same function in other operators.

``segformer.py`` is the paper; these modules replace its encoder for tracing (the decode head's are
in ``fold.py``). Two
kinds of change, both exact but for rounding, with new weights computed once in float64:

Algebra. Every reader of the residual stream normalizes it, so the stream's mean over channels
never matters: all that is added to it is centered beforehand, and LayerNorm becomes a division
by the root mean square. The shift of a LayerNorm moves into the linear layers that read it. With
one head, the projection after attention commutes with the weighted mean, and moves into ``value``.

Layout. Convolutions of 1x1 around the depthwise one keep Mix-FFN in ONNX Runtime's blocked layout.
The reduction of keys and values gathers its windows and is then a matrix product.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcli.export.operators import add_and_rms_norm, multi_head_attention
from segcli.export.segformer import (
    LAYER_NORM_EPS,
    Attention,
    Block,
    MixFFN,
    MixTransformer,
    OverlapPatchEmbed,
    map_to_tokens,
    tokens_to_map,
)


def window_index(height: int, width: int, ratio: int) -> Tensor:
    """Returns the tokens of each whole window of ``ratio`` by ``ratio``, window after window.

    (height//ratio * width//ratio * ratio^2,) int64; tokens beyond the last whole window are left
    out, as the convolution without padding leaves them out.
    """
    rows = torch.arange(height // ratio)[:, None, None, None] * ratio
    columns = torch.arange(width // ratio)[None, :, None, None] * ratio
    down = torch.arange(ratio)[None, None, :, None]
    right = torch.arange(ratio)[None, None, None, :]
    return ((rows + down) * width + columns + right).flatten()


class FusedAttention(nn.Module):
    """Attention with its output projection, of input that was normalized but not shifted."""

    def __init__(self, attention: Attention, shift: Tensor) -> None:
        super().__init__()
        inner, dense = attention.self, attention.output.dense
        query, key, value = inner.query, inner.key, inner.value
        self.num_heads = inner.num_heads
        self.reduction: nn.Linear | None = None
        query_bias = _shifted_bias(query, shift)
        key_bias, value_bias = key.bias.double(), value.bias.double()
        if inner.sr is not None:
            assert inner.sr.bias is not None
            weight = inner.sr.weight.double()  # (C, C, sr, sr)
            bias = inner.sr.bias.double() + weight.sum((2, 3)) @ shift
            # A window is gathered row by row, pixel by pixel, channels last.
            self.reduction = linear(weight.permute(0, 2, 3, 1).flatten(1), bias)
            self.norm = inner.layer_norm
        else:
            key_bias, value_bias = _shifted_bias(key, shift), _shifted_bias(value, shift)
        # Centered: see the module's docstring.
        out_weight, out_bias = _centered(dense.weight.double()), _centered(dense.bias.double())
        value_weight = value.weight.double()
        self.projection: nn.Linear | None = None
        self.out_bias: nn.Parameter | None = None
        if self.num_heads == 1:
            # The weights of a mean sum to one, so the bias rides along.
            value_weight, value_bias = out_weight @ value_weight, out_weight @ value_bias + out_bias
        else:
            self.projection = linear(out_weight, None)
            self.out_bias = parameter(out_bias)
        self.query = linear(query.weight, None)
        self.key = linear(key.weight, None)
        self.value = linear(value_weight, None)
        self.bias = parameter(torch.cat([query_bias, key_bias, value_bias]))

    def forward(self, x: Tensor, windows: Tensor | None) -> Tensor:
        """Returns what attention adds to the stream, less ``out_bias``: (B, N, C) of (B, N, C).

        Args:
            x: (B, N, C).
            windows: Of ``window_index``; None without a reduction.
        """
        reduced = x
        if self.reduction is not None:
            assert windows is not None
            reduced = x.index_select(1, windows)  # (B, L*sr^2, C)
            reduced = reduced.reshape(x.shape[0], -1, self.reduction.in_features)
            reduced = self.norm(self.reduction(reduced))  # (B, L, C)
        key, value = self.key(reduced), self.value(reduced)
        mixed = multi_head_attention(self.query(x), key, value, self.bias, self.num_heads)
        return mixed if self.projection is None else self.projection(mixed)


class FusedMixFFN(nn.Module):
    """Mix-FFN of input that was normalized but not shifted, with 1x1 convolutions."""

    def __init__(self, mlp: MixFFN, shift: Tensor) -> None:
        super().__init__()
        self.dense1 = _conv1x1(mlp.dense1.weight.double(), _shifted_bias(mlp.dense1, shift))
        self.dwconv = mlp.dwconv.dwconv
        self.act = mlp.act
        weight, bias = mlp.dense2.weight.double(), mlp.dense2.bias.double()
        self.dense2 = _conv1x1(_centered(weight), _centered(bias))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Returns what Mix-FFN adds to the stream: (B, N, C) of (B, N, C)."""
        x = tokens_to_map(x, height, width)  # (B, C, H, W)
        return map_to_tokens(self.dense2(self.act(self.dwconv(self.dense1(x)))))


class FusedBlock(nn.Module):
    """A block between its two normalizations; its first is the caller's."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attention = FusedAttention(block.attention, block.layer_norm_1.bias.double())
        self.mlp = FusedMixFFN(block.mlp, block.layer_norm_2.bias.double())
        self.norm_1_weight = block.layer_norm_1.weight
        self.norm_2_weight = block.layer_norm_2.weight

    def forward(
        self, stream: Tensor, x: Tensor, height: int, width: int, windows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the stream after attention, and what is to be added to it: both (B, N, C).

        Args:
            stream: (B, N, C), centered.
            x: (B, N, C), the stream normalized with ``norm_1_weight``.
            height: Of the map.
            width: Of the map.
            windows: Of ``window_index``.
        """
        mixed = self.attention(x, windows)
        x, stream = add_and_rms_norm(
            mixed, stream, self.norm_2_weight, self.attention.out_bias, LAYER_NORM_EPS
        )
        return stream, self.mlp(x, height, width)


class FusedStage(nn.Module):
    """One stage of the encoder."""

    def __init__(self, embed: OverlapPatchEmbed, blocks: nn.ModuleList, norm: nn.LayerNorm) -> None:
        super().__init__()
        first = blocks[0]
        assert isinstance(first, Block)
        self.embed, self.norm = embed, norm
        self.sr_ratio = first.attention.self.sr_ratio
        self.blocks = nn.ModuleList(FusedBlock(b) for b in blocks if isinstance(b, Block))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the stage's map (B, C, H', W') of the map before it."""
        x, height, width = self.embed(x)  # (B, N, C)
        windows = window_index(height, width, self.sr_ratio) if self.sr_ratio > 1 else None
        # The embedding's own scale is per channel, so this one mean has to be taken.
        stream = x - x.mean(-1, keepdim=True)
        added: Tensor | None = None
        for block in self.blocks:
            assert isinstance(block, FusedBlock)
            weight = block.norm_1_weight
            if added is None:
                x = F.layer_norm(stream, weight.shape, weight, None, LAYER_NORM_EPS)
            else:
                x, stream = add_and_rms_norm(added, stream, weight, None, LAYER_NORM_EPS)
            stream, added = block(stream, x, height, width, windows)
        assert added is not None
        # The next embedding pads with zeros, so here the shift must stay.
        return tokens_to_map(self.norm(stream + added), height, width)


class FusedEncoder(nn.Module):
    """Replaces MixTransformer; gives no attention maps."""

    def __init__(self, encoder: MixTransformer) -> None:
        super().__init__()
        parts = zip(encoder.patch_embeddings, encoder.block, encoder.layer_norm, strict=True)
        self.stages = nn.ModuleList(FusedStage(*part) for part in parts)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        """Returns the stage maps (B, C_i, H_i, W_i) of an image (B, C, H, W), and no attentions."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps, {}


def parameter(value: Tensor) -> nn.Parameter:
    """Returns float32 weights that are not trained."""
    return nn.Parameter(value.detach().float().contiguous(), requires_grad=False)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns the layer of these weights (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


def _conv1x1(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    layer.weight, layer.bias = parameter(weight[:, :, None, None]), parameter(bias)
    return layer


def _shifted_bias(layer: nn.Linear, shift: Tensor) -> Tensor:
    """Returns the bias (float64) with which a layer needs no ``shift`` on its input."""
    return layer.bias.double() + layer.weight.double() @ shift


def _centered(value: Tensor) -> Tensor:
    """Returns weights or a bias whose output has mean zero over channels."""
    return value - value.mean(0, keepdim=True)
