"""Each operator means in ONNX Runtime what it means in PyTorch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from segcli.export.operators import add_and_rms_norm, multi_head_attention
from segcli.export.trace import trace
from segcli.session import Session

pytestmark = pytest.mark.export


class Operator(nn.Module):
    """Gives an operator the tokens of a picture, so that it can be traced like a model."""

    output_names = ("tokens",)

    def __init__(self, dim, apply):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)
        self.bias = nn.Parameter(torch.randn(3 * dim))
        self.apply_operator = apply

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, N, dim)
        return self.apply_operator(self, tokens)


def attend(module, x):
    return multi_head_attention(x, x[:, 1:] * 2, x[:, 1:].flip(2), module.bias, 3)


def normalize_with_bias(module, x):
    normalized, total = add_and_rms_norm(x, x.flip(1), module.weight, module.bias[:6], 1e-2)
    return normalized + 3 * total


def normalize(module, x):
    return add_and_rms_norm(x, x.flip(1), module.weight, None, 1e-2)[0]


@pytest.mark.parametrize(
    ("apply", "op_type", "unread"),
    [
        (attend, "MultiHeadAttention", 0),
        (normalize_with_bias, "SkipSimplifiedLayerNormalization", 2),
        (normalize, "SkipSimplifiedLayerNormalization", 3),
    ],
)
def test_the_node_computes_what_pytorch_computes(apply, op_type, unread, assert_close):
    model = Operator(6, apply).eval()
    proto = trace(model)
    [node] = [n for n in proto.graph.node if n.domain == "com.microsoft"]
    assert node.op_type == op_type
    assert list(node.output).count("") == unread
    session = Session(proto.SerializeToString(), device="cpu")
    for batch, height, width in ((1, 40, 64), (3, 33, 47)):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(x)
        [found] = session.run(x.numpy())
        assert_close(torch.from_numpy(found), expected, 1e-6)


def test_attention_is_the_weighted_mean_of_values():
    query, key, value = (torch.randn(2, n, 8) for n in (5, 4, 4))
    bias = torch.randn(24)
    found = multi_head_attention(query, key, value, bias, 2).numpy()
    q, k, v = ((x + bias[8 * i : 8 * i + 8]).numpy() for i, x in enumerate((query, key, value)))
    for b in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            scores = q[b, :, head] @ k[b, :, head].T / 2.0  # sqrt(4 channels a head)
            weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            np.testing.assert_allclose(found[b, :, head], weights @ v[b, :, head], atol=1e-5)


def test_rms_norm_divides_by_the_root_mean_square():
    x, skip = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[0.0, 2.0]]])
    normalized, total = add_and_rms_norm(x, skip, torch.tensor([1.0, 2.0]), torch.ones(2), 0.0)
    assert total.tolist() == [[[4.0, 4.0]]]
    torch.testing.assert_close(normalized, torch.tensor([[[1.0, 2.0]]]))
