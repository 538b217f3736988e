"""The encoder's fast form: what it assumes, where it could go wrong."""

import pytest

torch = pytest.importorskip("torch")

from segcli.export.fused import FusedAttention, FusedEncoder, FusedMixFFN, window_index
from segcli.export.segformer import Attention, MixFFN, MixTransformer, SegformerConfig

pytestmark = pytest.mark.export


@pytest.mark.parametrize("size_hw", [(4, 6), (7, 5), (3, 9)])
@pytest.mark.parametrize("ratio", [2, 3])
def test_windows_are_those_of_a_convolution_without_padding(size_hw, ratio):
    height, width = size_hw
    tokens = torch.arange(height * width).reshape(1, 1, height, width).float()
    expected = torch.nn.functional.unfold(tokens, ratio, stride=ratio)[0].T  # (windows, ratio^2)
    assert torch.equal(window_index(height, width, ratio), expected.flatten().long())


@pytest.mark.parametrize(("num_heads", "sr_ratio"), [(1, 2), (1, 1), (2, 2), (4, 1)])
def test_attention_of_unshifted_input_is_attention_of_shifted_input(
    randomize, assert_close, num_heads, sr_ratio
):
    attention = randomize(Attention(8, num_heads, sr_ratio)).double()
    shift, x = torch.randn(8).double(), torch.randn(2, 35, 8).double()
    fused = FusedAttention(attention, shift).double()
    windows = window_index(5, 7, sr_ratio) if sr_ratio > 1 else None
    found = fused(x, windows)
    if fused.out_bias is not None:
        found = found + fused.out_bias
    expected, _ = attention(x + shift, 5, 7)
    assert_close(found, expected - expected.mean(-1, keepdim=True), 1e-6)
    # With one head its projection has moved into the values.
    assert (fused.projection is None) == (num_heads == 1)


def test_mix_ffn_of_unshifted_input_is_mix_ffn_of_shifted_input(randomize, assert_close):
    mlp = randomize(MixFFN(8, 24, "gelu")).double()
    shift, x = torch.randn(8).double(), torch.randn(2, 35, 8).double()
    expected = mlp(x + shift, 5, 7)
    found = FusedMixFFN(mlp, shift).double()(x, 5, 7)
    assert_close(found, expected - expected.mean(-1, keepdim=True), 1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "relu"},
        {"sr_ratios": (4, 1, 2, 1), "num_attention_heads": (2, 1, 1, 4)},
        {"depths": (1, 2, 1, 3)},
        {
            "num_encoder_blocks": 2,
            "depths": (1, 1),
            "sr_ratios": (2, 1),
            "hidden_sizes": (8, 16),
            "patch_sizes": (7, 3),
            "strides": (4, 2),
            "num_attention_heads": (1, 2),
            "mlp_ratios": (2, 2.5),
        },
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_the_encoder_takes_every_config(randomize, assert_close, fields):
    fields = {"hidden_sizes": (8, 16, 24, 32), "num_attention_heads": (1, 2, 3, 4), **fields}
    encoder = randomize(MixTransformer(SegformerConfig(**fields)))
    fused = FusedEncoder(encoder)
    x = torch.randn(2, 3, 65, 94)
    maps, attentions = fused(x)
    assert attentions == {}
    for ours, theirs in zip(maps, encoder(x)[0], strict=True):
        assert_close(ours, theirs, 5e-6)
