"""Exact algebra before tracing: the same function with fewer multiply-adds.

Each rewrite computes its new weights once in float64, so that the logits move by rounding only.
The names returned are recorded in the ModelCard.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcli.export.fused import FusedEncoder, linear, parameter
from segcli.export.mobilenet_v2 import ConvLayer, DeepLabHead, MobileNetV2ForSemanticSegmentation
from segcli.export.segformer import (
    MixTransformer,
    MLPDecoder,
    Segformer,
    SegformerFeatures,
    SegformerForSemanticSegmentation,
    StageProjection,
    upsample_like,
)


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns scale and shift (float64) with which batch norm is ``scale * x + shift``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - scale * norm.running_mean.double()


class FoldedDecoder(nn.Module):
    """The SegFormer decode head without its 4D -> D convolution at H/4.

    Bilinear upsampling acts on each channel alone and its weights sum to one, so it commutes
    with a 1x1 convolution and its bias. Hence, with F_i the block of ``linear_fuse`` that
    meets stage i, and batch norm the affine map (s, t):

        BN(F concat(up(W_i x_i + b_i))) = sum_i up(s F_i W_i x_i) + (s sum_i F_i b_i + t)

    and the only work left at H/4 is the sum and the classifier. The constant rides on the last
    stage, where it meets the fewest pixels.
    """

    def __init__(self, head: MLPDecoder) -> None:
        super().__init__()
        scale, shift = batch_norm_affine(head.batch_norm)
        fuse = scale[:, None] * head.linear_fuse.weight.double().flatten(1)  # (D, 4D)
        # The concatenation runs from the deepest stage to the first.
        blocks = fuse.chunk(len(head.linear_c), dim=1)[::-1]
        weights = []
        for block, layer in zip(blocks, head.linear_c, strict=True):
            assert isinstance(layer, StageProjection)
            shift = shift + block @ layer.proj.bias.double()
            weights.append(block @ layer.proj.weight.double())  # (D, C_i)
        self.projections = nn.ModuleList(
            linear(weight, shift if weight is weights[-1] else None) for weight in weights
        )
        assert head.classifier.bias is not None
        self.weight = parameter(head.classifier.weight.flatten(1))  # (K, D)
        self.bias = parameter(head.classifier.bias[:, None, None])

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Returns logits (B, num_labels, H/4, W/4) from the stage maps."""
        terms: list[Tensor] = []
        for x, projection in zip(maps, self.projections, strict=True):
            # Channels last: a bilinear Resize is then four times faster on the CPU provider.
            x = projection(x.permute(0, 2, 3, 1))  # (B, h, w, D)
            if terms:
                x = upsample_like(x.permute(0, 3, 1, 2), maps[0]).permute(0, 2, 3, 1)
            terms.append(x)
        # Deepest first: of the nodes that a sum waits for ONNX Runtime runs the last one in the
        # file first, so that two maps of this size are alive at a time and not five.
        total = terms.pop()
        while terms:
            total = terms.pop() + total
        pixels = F.relu(total).flatten(1, 2)  # (B, H/4*W/4, D)
        logits = self.weight @ pixels.transpose(1, 2)  # (B, K, H/4*W/4)
        # The bias comes last: a graph that ends in a Reshape copies its output once more.
        return logits.reshape(logits.shape[0], -1, *maps[0].shape[2:]) + self.bias


class FoldedDeepLabHead(nn.Module):
    """The DeepLab head without its concatenation; batch norm is folded before.

    The projection of ``concat(pool, aspp)`` is ``W_p pool + W_a aspp``, and pool is one cell, the
    same everywhere: half the projection is computed once and added by broadcast.
    """

    def __init__(self, head: DeepLabHead) -> None:
        super().__init__()
        self.conv_pool, self.conv_aspp = head.conv_pool, head.conv_aspp
        projection = head.conv_projection.convolution
        pool_dim, dim = head.conv_pool.convolution.out_channels, projection.out_channels
        self.pool_projection = nn.Conv2d(pool_dim, dim, 1, bias=False)
        self.pool_projection.weight = parameter(projection.weight[:, :pool_dim])
        self.aspp_projection = nn.Conv2d(projection.in_channels - pool_dim, dim, 1)
        self.aspp_projection.weight = parameter(projection.weight[:, pool_dim:])
        self.aspp_projection.bias = projection.bias
        self.activation = head.conv_projection.activation
        self.classifier = head.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, num_labels, h, w) of features (B, 320, h, w)."""
        pool = self.conv_pool(x.mean((2, 3), keepdim=True))  # (B, 256, 1, 1)
        x = self.aspp_projection(self.conv_aspp(x)) + self.pool_projection(pool)
        logits: Tensor = self.classifier(self.activation(x))
        return logits


def fold(model: nn.Module) -> tuple[str, ...]:
    """Rewrites a model in place; call it in eval mode, after the weights are loaded.

    Returns:
        The names of the rewrites that applied.
    """
    folds = []
    # Attention maps exist only where attention is spelled out.
    if not (isinstance(model, SegformerFeatures) and model.attentions):
        for module in model.modules():
            if isinstance(module, Segformer):
                assert isinstance(module.encoder, MixTransformer)
                module.encoder = FusedEncoder(module.encoder)
                folds.append("encoder")
    if isinstance(model, SegformerForSemanticSegmentation):
        assert isinstance(model.decode_head, MLPDecoder)
        model.decode_head = FoldedDecoder(model.decode_head)
        folds += ["decode_head", "batch_norm"]
    layers = [m for m in model.modules() if isinstance(m, ConvLayer)]
    for layer in layers:
        _fold_batch_norm(layer)
    if layers:
        folds.append("batch_norm")
    if isinstance(model, MobileNetV2ForSemanticSegmentation):
        # The 1280-channel convolution after the last block feeds no segmentation output.
        del model.mobilenet_v2.conv_1x1
        assert isinstance(model.segmentation_head, DeepLabHead)
        model.segmentation_head = FoldedDeepLabHead(model.segmentation_head)
        folds += ["unused_conv_1x1", "image_pooling"]
    return tuple(folds)


def _fold_batch_norm(layer: ConvLayer) -> None:
    norm, conv = layer.normalization, layer.convolution
    if not isinstance(norm, nn.BatchNorm2d):
        return
    scale, shift = batch_norm_affine(norm)
    if conv.bias is not None:
        shift = shift + scale * conv.bias.double()
    conv.weight = parameter(conv.weight.double() * scale[:, None, None, None])
    conv.bias = parameter(shift)
    layer.normalization = nn.Identity()
