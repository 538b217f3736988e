"""SegFormer B0-B5: hierarchical Mix Transformer encoder and all-MLP decode head.

Written from the paper: Xie et al., "SegFormer: Simple and Efficient Design for Semantic
Segmentation with Transformers", arXiv 2105.15203 (sections 3.1, 3.2, table 6). Numbers were
checked against the Apache-2.0 port in Hugging Face transformers, whose published checkpoints
these modules load: submodules carry the names of its hub files, so a state dict needs no
renaming and an error names the tensor as the file does.

Layer norm: the port leaves every LayerNorm at PyTorch's eps of 1e-5 and never reads
``layer_norm_eps`` of its config (the original code has 1e-6 in blocks and stage norms). Masks
that equal the port's need the port's eps, so it is a constant here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcli.errors import CheckpointError
from segcli.export.activations import ACTIVATIONS

LAYER_NORM_EPS = 1e-5

# No SegFormer comes near it; a damaged config could ask for terabytes.
MAX_COUNT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SegformerConfig:
    """Shape of a SegFormer; field names and defaults are those of a hub ``config.json``.

    Raises:
        CheckpointError: The values cannot describe a network.
    """

    num_labels: int = 150
    num_channels: int = 3
    num_encoder_blocks: int = 4
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    num_attention_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    hidden_act: str = "gelu"
    decoder_hidden_size: int = 256
    reshape_last_stage: bool = True

    def __post_init__(self) -> None:
        """Refuses what no SegFormer can be, naming the field."""
        for name in ("num_encoder_blocks", "num_labels", "num_channels", "decoder_hidden_size"):
            value = getattr(self, name)
            if not _is_count(value):
                raise CheckpointError(f"{name} must be a positive integer, found {value!r}")
        for name in (
            "depths",
            "sr_ratios",
            "hidden_sizes",
            "patch_sizes",
            "strides",
            "num_attention_heads",
            "mlp_ratios",
        ):
            values = getattr(self, name)
            if len(values) != self.num_encoder_blocks:
                raise CheckpointError(
                    f"{name} has {len(values)} entries, expected one for each of the "
                    f"{self.num_encoder_blocks} of num_encoder_blocks"
                )
            if name == "mlp_ratios":
                if any(not 0 < v <= MAX_COUNT for v in values):
                    raise CheckpointError(f"{name} must be positive, found {list(values)}")
            elif not all(map(_is_count, values)):
                raise CheckpointError(f"{name} must be positive integers, found {list(values)}")
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        for dim, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if dim % heads:
                raise CheckpointError(
                    f"num_attention_heads {heads} does not divide hidden_sizes {dim}"
                )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_COUNT


_WIDE = SegformerConfig(hidden_sizes=(64, 128, 320, 512), decoder_hidden_size=768)

# arXiv 2105.15203, table 6 (C, L and N of each stage; the decoder's C).
VARIANTS: dict[str, SegformerConfig] = {
    "b0": SegformerConfig(),
    "b1": replace(_WIDE, decoder_hidden_size=256),
    "b2": replace(_WIDE, depths=(3, 4, 6, 3)),
    "b3": replace(_WIDE, depths=(3, 4, 18, 3)),
    "b4": replace(_WIDE, depths=(3, 8, 27, 3)),
    "b5": replace(_WIDE, depths=(3, 6, 40, 3)),
}


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns (B, C, height, width) from (B, height*width, C)."""
    return tokens.reshape(tokens.shape[0], height, width, -1).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Returns (B, H*W, C) from (B, C, H, W)."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


class OverlapPatchEmbed(nn.Module):
    """Overlapped patch merging (section 3.1): a strided convolution, then LayerNorm."""

    def __init__(self, in_dim: int, dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch_size, stride, padding=patch_size // 2)
        self.layer_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Returns tokens (B, H'*W', dim) and H', W'."""
        x = self.proj(x)  # (B, C, H, W) -> (B, dim, H', W')
        height, width = x.shape[2], x.shape[3]
        return self.layer_norm(map_to_tokens(x)), height, width


class EfficientSelfAttention(nn.Module):
    """Self-attention whose keys and values are shortened by ``sr_ratio`` squared (equation 2).

    The reduction is a convolution with kernel and stride ``sr_ratio`` and no padding: rows and
    columns beyond the last whole window do not take part.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.scale = (dim // num_heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr: nn.Conv2d | None = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.layer_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        else:
            self.sr = None

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns the mixed values (B, N, C) and the attention map (B, heads, N, N/sr^2)."""
        query = self._split_heads(self.query(x)) * self.scale
        if self.sr is not None:
            x = self.sr(tokens_to_map(x, height, width))  # (B, C, H/sr, W/sr)
            x = self.layer_norm(map_to_tokens(x))  # (B, N/sr^2, C)
        key, value = self._split_heads(self.key(x)), self._split_heads(self.value(x))
        attention = torch.softmax(query @ key.transpose(2, 3), dim=-1)
        mixed = attention @ value  # (B, heads, N, C/heads)
        return mixed.transpose(1, 2).flatten(2), attention

    def _split_heads(self, x: Tensor) -> Tensor:
        # (B, N, C) -> (B, heads, N, C/heads)
        batch, tokens, dim = x.shape
        return x.reshape(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)


class AttentionOutput(nn.Module):
    """The projection after the heads are joined; a module of its own for its hub name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)


class Attention(nn.Module):
    """Attention and its output projection."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.self = EfficientSelfAttention(dim, num_heads, sr_ratio)
        self.output = AttentionOutput(dim)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns (B, N, C) and the attention map."""
        mixed, attention = self.self(x, height, width)
        return self.output.dense(mixed), attention


class DepthwiseConv(nn.Module):
    """The 3x3 depthwise convolution of Mix-FFN; a module of its own for its hub name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class MixFFN(nn.Module):
    """Feed-forward with a depthwise convolution in place of positions (equation 3)."""

    def __init__(self, dim: int, hidden_dim: int, hidden_act: str) -> None:
        super().__init__()
        self.dense1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.act = ACTIVATIONS[hidden_act]()
        self.dense2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Returns (B, N, C)."""
        x = tokens_to_map(self.dense1(x), height, width)  # (B, hidden, H, W)
        x = map_to_tokens(self.dwconv.dwconv(x))  # (B, N, hidden)
        out: Tensor = self.dense2(self.act(x))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; drop path is the identity at inference."""

    def __init__(self, config: SegformerConfig, stage: int) -> None:
        super().__init__()
        dim = config.hidden_sizes[stage]
        self.layer_norm_1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attention = Attention(dim, config.num_attention_heads[stage], config.sr_ratios[stage])
        self.layer_norm_2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MixFFN(dim, int(dim * config.mlp_ratios[stage]), config.hidden_act)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns (B, N, C) and the attention map."""
        mixed, attention = self.attention(self.layer_norm_1(x), height, width)
        x = x + mixed
        return x + self.mlp(self.layer_norm_2(x), height, width), attention


class MixTransformer(nn.Module):
    """The encoder: stages at H/4, H/8, H/16 and H/32, each ending in its own LayerNorm."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        stages = range(config.num_encoder_blocks)
        in_dims = (config.num_channels, *config.hidden_sizes)
        self.patch_embeddings = nn.ModuleList(
            OverlapPatchEmbed(
                in_dims[i],
                config.hidden_sizes[i],
                config.patch_sizes[i],
                config.strides[i],
            )
            for i in stages
        )
        self.block = nn.ModuleList(
            nn.ModuleList(Block(config, i) for _ in range(config.depths[i])) for i in stages
        )
        self.layer_norm = nn.ModuleList(
            nn.LayerNorm(config.hidden_sizes[i], eps=LAYER_NORM_EPS) for i in stages
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        """Encodes an image.

        Args:
            x: (B, C, H, W).

        Returns:
            The stage maps (B, C_i, H_i, W_i), and the attention maps by (stage, block).
        """
        maps, attentions = [], {}
        for i, (embed, blocks, norm) in enumerate(
            zip(self.patch_embeddings, self.block, self.layer_norm, strict=True)
        ):
            x, height, width = embed(x)
            assert isinstance(blocks, nn.ModuleList)
            for j, block in enumerate(blocks):
                x, attentions[i, j] = block(x, height, width)
            x = tokens_to_map(norm(x), height, width)
            maps.append(x)
        return maps, attentions


class Segformer(nn.Module):
    """Holds the encoder under its hub name."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        # export/fold.py puts its equivalent here, and in place of the decode head below.
        self.encoder: nn.Module = MixTransformer(config)


class StageProjection(nn.Module):
    """One linear layer of the decode head; a module of its own for its hub name."""

    def __init__(self, dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, decoder_dim)


def upsample_like(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear upsampling to the height and width of ``like``, half-pixel centers."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class MLPDecoder(nn.Module):
    """All-MLP decode head (equation 4): unify channels, upsample, fuse, classify."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        dim = config.decoder_hidden_size
        self.linear_c = nn.ModuleList(StageProjection(c, dim) for c in config.hidden_sizes)
        self.linear_fuse = nn.Conv2d(dim * config.num_encoder_blocks, dim, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, config.num_labels, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Returns logits (B, num_labels, H/4, W/4) from the stage maps."""
        unified = []
        for x, projection in zip(maps, self.linear_c, strict=True):
            assert isinstance(projection, StageProjection)
            y = tokens_to_map(projection.proj(map_to_tokens(x)), x.shape[2], x.shape[3])
            unified.append(upsample_like(y, maps[0]))
        x = self.linear_fuse(torch.cat(unified[::-1], dim=1))  # deepest stage first
        logits: Tensor = self.classifier(F.relu(self.batch_norm(x)))
        return logits


class SegformerForSemanticSegmentation(nn.Module):
    """Encoder and decode head."""

    output_names = ("logits",)

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.segformer = Segformer(config)
        self.decode_head: nn.Module = MLPDecoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns logits (B, num_labels, H/4, W/4) of (B, C, H, W)."""
        maps, _ = self.segformer.encoder(pixel_values)
        logits: Tensor = self.decode_head(maps)
        return logits


class SegformerForImageClassification(nn.Module):
    """Encoder, mean over the last stage's tokens, linear classifier."""

    output_names = ("logits",)

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.segformer = Segformer(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns logits (B, num_labels) of (B, C, H, W)."""
        maps, _ = self.segformer.encoder(pixel_values)
        logits: Tensor = self.classifier(maps[-1].mean(dim=(2, 3)))
        return logits


class SegformerFeatures(nn.Module):
    """The bare encoder.

    Outputs, in order: ``stage_1`` … ``stage_4`` (B, C_i, H_i, W_i), ``last_hidden_state``
    (the last stage; as tokens (B, N, C) where ``reshape_last_stage`` is false), and
    ``attention_S_B`` (B, heads, N, N/sr^2) for each chosen (stage, block), counted from zero.

    Raises:
        CheckpointError: A chosen layer does not exist.
    """

    def __init__(self, config: SegformerConfig, attentions: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        for stage, block in attentions:
            if not (0 <= stage < len(config.depths) and 0 <= block < config.depths[stage]):
                raise CheckpointError(
                    f"no attention layer {(stage, block)}: the stages have "
                    f"{', '.join(map(str, config.depths))} blocks"
                )
        self.segformer = Segformer(config)
        self.reshape_last_stage = config.reshape_last_stage
        self.attentions = tuple(attentions)
        self.output_names = (
            *(f"stage_{i + 1}" for i in range(config.num_encoder_blocks)),
            "last_hidden_state",
            *(f"attention_{s}_{b}" for s, b in self.attentions),
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs that ``output_names`` lists."""
        maps, attentions = self.segformer.encoder(pixel_values)
        last = maps[-1] if self.reshape_last_stage else map_to_tokens(maps[-1])
        return (*maps, last, *(attentions[key] for key in self.attentions))
