"""Parameter counts, parity with transformers on random weights, config errors."""

import dataclasses
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from segcli.errors import CheckpointError
from segcli.export.activations import ACTIVATIONS
from segcli.export.segformer import (
    VARIANTS,
    SegformerConfig,
    SegformerFeatures,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

pytestmark = pytest.mark.export

# A multiple of 32; odd, so that each stage and each reduction drops a remainder; not square.
SIZES_HW = ((64, 96), (97, 131), (70, 33))
THREE_STAGES = {
    "num_encoder_blocks": 3,
    "depths": [1, 2, 1],
    "sr_ratios": [8, 4, 1],
    "hidden_sizes": [8, 16, 24],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "num_attention_heads": [1, 2, 3],
    "mlp_ratios": [2, 3, 2.5],
}


def our_config(values):
    return SegformerConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def their_config(values, **more):
    # transformers 5 types mlp_ratios as integers, hub files of the wild have others.
    config = transformers.SegformerConfig(**{**values, "mlp_ratios": [4] * 4}, **more)
    if "mlp_ratios" in values:
        object.__setattr__(config, "mlp_ratios", values["mlp_ratios"])
    return config


@pytest.fixture
def pair(randomize, ours_like, tiny_segformer):
    """Builds both implementations with the same random weights."""

    def pair(ours_class, theirs_class, prefix="", base=None, attn="sdpa", options=None, **config):
        values = {**(tiny_segformer if base is None else base), **config}
        theirs = randomize(theirs_class(their_config(values, attn_implementation=attn)))
        ours = ours_like(theirs, ours_class, our_config(values), prefix, **(options or {}))
        return ours, theirs

    return pair


@pytest.fixture
def check(pair, assert_close):
    """Compares the logits of one head at several sizes."""

    def check(ours_class, sizes=SIZES_HW, **config):
        ours, theirs = pair(ours_class, getattr(transformers, ours_class.__name__), **config)
        for h, w in sizes:
            x = torch.randn(2, config.get("num_channels", 3), h, w)
            expected = theirs(x).logits
            # Two random images: a network that has gone constant would prove nothing.
            assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
            assert_close(ours(x), expected)

    return check


HEADS = pytest.mark.parametrize(
    "ours_class", [SegformerForSemanticSegmentation, SegformerForImageClassification]
)


@pytest.mark.parametrize(
    ("variant", "millions"),
    [("b0", 3.58), ("b1", 13.66), ("b2", 24.71), ("b3", 44.59), ("b4", 61.36), ("b5", 81.96)],
)
@HEADS
def test_parameter_counts_are_those_of_transformers(variant, millions, ours_class):
    config = dataclasses.replace(VARIANTS[variant], num_labels=1000)
    values = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
    with torch.device("meta"):
        ours = ours_class(config)
        theirs = getattr(transformers, ours_class.__name__)(their_config(values))
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    if ours_class is SegformerForImageClassification:
        assert round(count / 1e6, 2) == millions


@HEADS
def test_logits_match_transformers(check, ours_class):
    check(ours_class)


@HEADS
def test_b0_matches_transformers(check, ours_class):
    check(ours_class, base={}, num_labels=7, sizes=[(97, 131)])


@pytest.mark.parametrize(
    "config",
    [
        {"num_channels": 4},
        {"num_channels": 1, "num_labels": 1},
        THREE_STAGES,
        {"sr_ratios": [4, 2, 2, 2]},
        {"sr_ratios": [1, 1, 1, 1]},
        {"patch_sizes": [5, 3, 5, 3]},
        {"patch_sizes": [4, 2, 2, 2]},
        {"strides": [2, 2, 1, 2]},
        {"num_attention_heads": [2, 4, 6, 8]},
        {"mlp_ratios": [4, 1, 2, 3]},
        {"decoder_hidden_size": 40},
        *({"hidden_act": act} for act in ACTIVATIONS if act in transformers.activations.ACT2FN),
    ],
    ids=str,
)
@HEADS
def test_every_config_value_has_the_effect_it_has_in_transformers(check, ours_class, config):
    check(ours_class, sizes=[(97, 131)], **config)


def test_layer_norm_eps_has_no_effect_as_in_transformers(pair, tiny_segformer, assert_close):
    values = {**tiny_segformer, "layer_norm_eps": 0.5}
    theirs = transformers.SegformerForSemanticSegmentation(their_config(values)).eval()
    norms = [m for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms
    assert {m.eps for m in norms} == {1e-5}
    ours = SegformerForSemanticSegmentation(our_config(tiny_segformer))
    assert {m.eps for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_classification_without_reshape_of_the_last_stage(check):
    check(SegformerForImageClassification, reshape_last_stage=False)


@pytest.mark.parametrize("reshape", [True, False])
@pytest.mark.parametrize("config", [{}, THREE_STAGES], ids=["four", "three"])
def test_features_match_transformers(pair, assert_close, reshape, config):
    chosen = [(0, 0), (1, 1), (2, 0)]
    ours, theirs = pair(
        SegformerFeatures,
        transformers.SegformerModel,
        prefix="segformer.",
        attn="eager",
        options={"attentions": chosen},
        **{**config, "reshape_last_stage": reshape},
    )
    stages = len(config.get("depths", "1234"))
    names = [f"stage_{i + 1}" for i in range(stages)]
    names += ["last_hidden_state", "attention_0_0", "attention_1_1", "attention_2_0"]
    assert list(ours.output_names) == names
    for h, w in SIZES_HW:
        x = torch.randn(2, 3, h, w)
        found = dict(zip(names, ours(x), strict=True))
        expected = theirs(x, output_hidden_states=True, output_attentions=True)
        assert_close(found["last_hidden_state"], expected.last_hidden_state)
        assert expected.last_hidden_state.ndim == (4 if reshape else 3)
        # Without the reshape the last stage's map is still a map here.
        hidden = expected.hidden_states if reshape else expected.hidden_states[:-1]
        for i, stage in enumerate(hidden):
            assert_close(found[f"stage_{i + 1}"], stage)
        by_layer = iter(expected.attentions)
        depths = config.get("depths", [1, 2, 1, 1])
        layers = {(s, b): next(by_layer) for s, n in enumerate(depths) for b in range(n)}
        for s, b in chosen:
            assert_close(found[f"attention_{s}_{b}"], layers[s, b])
            assert_close(found[f"attention_{s}_{b}"].sum(-1), torch.ones(layers[s, b].shape[:-1]))


@pytest.mark.parametrize("layer", [(4, 0), (0, 1), (-1, 0), (0, -1)])
def test_an_attention_layer_that_is_not_there_is_refused(tiny_segformer, layer):
    with pytest.raises(CheckpointError, match=re.escape(f"no attention layer {layer}")):
        SegformerFeatures(our_config(tiny_segformer), [layer])


COUNTS = [0, -1, 2.0, True, "3", None, 1 << 40]
LISTS = [
    (2, 2, 2),
    (2, 2, 2, 0),
    (2, 2, 2, -1),
    (2, 2, 2, 2.5),
    (2, 2, 2, True),
    (2, 2, 2, 1 << 40),
]
BAD = {
    **dict.fromkeys(
        ("num_labels", "num_channels", "num_encoder_blocks", "decoder_hidden_size"), COUNTS
    ),
    **dict.fromkeys(
        ("depths", "sr_ratios", "hidden_sizes", "patch_sizes", "strides", "num_attention_heads"),
        LISTS,
    ),
    "mlp_ratios": [(4, 4, 4), (4, 4, 4, 0), (4, 4, 4, -1.0), (4, 4, 4, float("nan")), (1e99,) * 4],
    "hidden_act": ["swish", "GELU", "", None],
}


def test_every_field_with_an_effect_is_checked():
    fields = {field.name for field in dataclasses.fields(SegformerConfig)}
    assert BAD.keys() == fields - {"reshape_last_stage"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_config_value_is_named(name, value):
    with pytest.raises(CheckpointError, match=name):
        SegformerConfig(**{name: value})


def test_heads_must_divide_the_channels():
    with pytest.raises(CheckpointError, match="num_attention_heads 3 does not divide hidden_sizes"):
        SegformerConfig(num_attention_heads=(3, 2, 5, 8))
