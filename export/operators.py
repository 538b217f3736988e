"""Operators of ONNX Runtime that ONNX itself lacks, each with its meaning in PyTorch.

While a module is traced each becomes one ``com.microsoft`` node, which the CPU and CUDA providers
have kernels for; otherwise PyTorch computes the same. Definitions: ONNX Runtime's
``docs/ContribOperators.md``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

DOMAIN = "com.microsoft"
# Of the domain, as every ONNX Runtime that has these operators registers it.
DOMAIN_VERSION = 1


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, num_heads: int
) -> Tensor:
    """Returns softmax(q k^T / sqrt(C / num_heads)) v, heads joined: (B, N, C).

    Args:
        query: (B, N, C).
        key: (B, L, C).
        value: (B, L, C).
        bias: (3 * C,), added to query, key and value.
        num_heads: Divides C.
    """
    if torch.compiler.is_exporting():
        output: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MultiHeadAttention",
            [query, key, value, bias],
            {"num_heads": num_heads},
            dtype=query.dtype,
            shape=query.shape,
            version=DOMAIN_VERSION,
        )
        return output
    q, k, v = (
        (x + b).reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)  # (B, heads, N or L, C/heads)
        for x, b in zip((query, key, value), bias.chunk(3), strict=True)
    )
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


def add_and_rms_norm(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds, and divides the sum by its root mean square over the last axis.

    Args:
        x: (B, N, C).
        skip: (B, N, C), added to ``x``.
        weight: (C,), the factor of the quotient.
        bias: (C,), added to ``x`` too, or None.
        eps: Added to the mean square.

    Returns:
        The normalized sum and the sum, both (B, N, C).
    """
    if torch.compiler.is_exporting():
        statistics = (*x.shape[:-1], 1)
        normalized, _, _, total = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::SkipSimplifiedLayerNormalization",
            [x, skip, weight] if bias is None else [x, skip, weight, bias],
            {"epsilon": eps},
            dtypes=[x.dtype, torch.float32, torch.float32, x.dtype],
            shapes=[x.shape, statistics, statistics, x.shape],
            version=DOMAIN_VERSION,
        )
        return normalized, total
    total = x + skip if bias is None else x + skip + bias
    mean_square = total.square().mean(-1, keepdim=True)
    return total * torch.rsqrt(mean_square + eps) * weight, total
