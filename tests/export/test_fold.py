"""Each rewrite leaves the function as it is, and the layers it promises to remove are gone."""

import copy

import pytest

torch = pytest.importorskip("torch")

from segcli.export import fold as fold_room
from segcli.export import fused as fused_room
from segcli.export.fold import (
    FoldedDecoder,
    FoldedDeepLabHead,
    batch_norm_affine,
    fold,
)
from segcli.export.fused import FusedEncoder
from segcli.export.mobilenet_v2 import (
    MobileNetV2Config,
    MobileNetV2Features,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
)
from segcli.export.segformer import (
    VARIANTS,
    SegformerConfig,
    SegformerFeatures,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

pytestmark = pytest.mark.export

SIZES_HW = ((64, 96), (97, 131))
# What float32 leaves, relative to the largest logit. Random MobileNets lose about 2e-5 to their own
# rounding, folded or not: their deep chain of batch norms has nothing to keep its scale.
ROUNDING = 5e-6
MOBILENET_ROUNDING = 5e-5


@pytest.fixture
def segformer(randomize, tiny_segformer):
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in tiny_segformer.items()}
    return randomize(SegformerForSemanticSegmentation(SegformerConfig(**fields)))


@pytest.fixture
def mobilenet(randomize):
    def mobilenet(module_class, **config):
        config = {"depth_multiplier": 0.35, "num_labels": 7, **config}
        return randomize(module_class(MobileNetV2Config(**config)))

    return mobilenet


@pytest.fixture
def check_fold(assert_close, monkeypatch):
    """Compares a model with its fold: exact in float64, and as it will be, in float32."""

    def check_fold(model, names, rounding=ROUNDING):
        folded = copy.deepcopy(model)
        assert fold(folded) == names
        for h, w in SIZES_HW:
            x = torch.randn(2, 3, h, w)
            assert_close(folded(x), model(x), rounding)
        with monkeypatch.context() as patch:
            for room in (fold_room, fused_room):
                patch.setattr(
                    room, "parameter", lambda v: torch.nn.Parameter(v.detach().double(), False)
                )
            exact, reference = copy.deepcopy(model).double(), copy.deepcopy(model).double()
            fold(exact)
            x = torch.randn(2, 3, 97, 131, dtype=torch.float64)
            assert_close(exact(x), reference(x), 1e-12)
        return folded

    return check_fold


def kinds(model):
    return {type(m) for m in model.modules()}


def test_the_segformer_head_loses_its_wide_convolution_and_batch_norm(segformer, check_fold):
    folded = check_fold(segformer, ("encoder", "decode_head", "batch_norm"))
    head = folded.decode_head
    assert isinstance(head, FoldedDecoder)
    assert torch.nn.BatchNorm2d not in kinds(folded)
    assert not hasattr(head, "linear_fuse")
    assert [(p.in_features, p.out_features) for p in head.projections] == [
        (dim, 24) for dim in (8, 16, 24, 32)
    ]
    # Only the stage with the fewest pixels carries the constant.
    assert [p.bias is not None for p in head.projections] == [False, False, False, True]
    assert head.weight.shape == (5, 24)


def test_b0_folds(randomize, check_fold):
    model = randomize(SegformerForSemanticSegmentation(VARIANTS["b0"]))
    check_fold(model, ("encoder", "decode_head", "batch_norm"))


def test_a_segformer_classifier_keeps_its_head(randomize, check_fold):
    model = randomize(SegformerForImageClassification(VARIANTS["b0"]))
    folded = check_fold(model, ("encoder",))
    assert isinstance(folded.segformer.encoder, FusedEncoder)


def test_segformer_features_fold(randomize, assert_close):
    model = randomize(SegformerFeatures(VARIANTS["b0"]))
    folded = copy.deepcopy(model)
    assert fold(folded) == ("encoder",)
    x = torch.randn(2, 3, 97, 131)
    for ours, theirs in zip(folded(x), model(x), strict=True):
        assert_close(ours, theirs, ROUNDING)


def test_features_with_attention_maps_are_left_alone(randomize):
    model = randomize(SegformerFeatures(VARIANTS["b0"], attentions=[(0, 1)]))
    before = copy.deepcopy(model.state_dict())
    assert fold(model) == ()
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("config", [{}, {"tf_padding": False}, {"layer_norm_eps": 0.1}], ids=str)
def test_a_mobilenet_classifier_loses_its_batch_norms(mobilenet, check_fold, config):
    model = mobilenet(MobileNetV2ForImageClassification, **config)
    folded = check_fold(model, ("batch_norm",), MOBILENET_ROUNDING)
    assert torch.nn.BatchNorm2d not in kinds(folded)


def test_mobilenet_features_fold(mobilenet, assert_close):
    model = mobilenet(MobileNetV2Features)
    folded = copy.deepcopy(model)
    assert fold(folded) == ("batch_norm",)
    # ReLU6 clips these random features at 6: in float64, so that only the weights are rounded.
    x = torch.randn(1, 3, 97, 131, dtype=torch.float64)
    for ours, theirs in zip(folded.double()(x), model.double()(x), strict=True):
        assert_close(ours, theirs, MOBILENET_ROUNDING)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_deeplab_loses_its_batch_norms_and_its_unused_convolution(
    mobilenet, check_fold, output_stride
):
    model = mobilenet(MobileNetV2ForSemanticSegmentation, output_stride=output_stride)
    names = ("batch_norm", "unused_conv_1x1", "image_pooling")
    folded = check_fold(model, names, MOBILENET_ROUNDING)
    head = folded.segmentation_head
    assert isinstance(head, FoldedDeepLabHead)
    assert (head.pool_projection.in_channels, head.pool_projection.bias) == (256, None)
    assert head.aspp_projection.in_channels == 256
    assert torch.nn.BatchNorm2d not in kinds(folded)
    assert not hasattr(folded.mobilenet_v2, "conv_1x1")
    # The classifier's own bias is kept.
    assert torch.equal(
        folded.segmentation_head.classifier.convolution.bias,
        model.segmentation_head.classifier.convolution.bias,
    )


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_checkpoints_with_identity_batch_norms_fold(mobilenet, segformer, check_fold):
    """Files that were folded before: variance 1 - eps, so that the norm only adds a bias."""
    for model, names, rounding in (
        (mobilenet(MobileNetV2ForImageClassification), ("batch_norm",), MOBILENET_ROUNDING),
        (segformer, ("encoder", "decode_head", "batch_norm"), ROUNDING),
    ):
        for norm in norms(model):
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
        for norm in norms(model):
            scale, shift = batch_norm_affine(norm)
            torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=1e-7)
            torch.testing.assert_close(shift, norm.bias.double())
        check_fold(model, names, rounding)


@pytest.mark.parametrize("names", ["weight", "running_var", "all"])
def test_zeros_in_a_batch_norm_fold(mobilenet, segformer, names):
    for model in (mobilenet(MobileNetV2ForSemanticSegmentation), segformer):
        for norm in norms(model):
            if names in ("weight", "all"):
                norm.weight.zero_()
            if names in ("running_var", "all"):
                norm.running_var.zero_()
        folded = copy.deepcopy(model)
        fold(folded)
        x = torch.randn(1, 3, 64, 64)
        expected = model(x)
        assert torch.isfinite(expected).all()
        # Dividing by sqrt(eps) blows up what there is of rounding in the layers before.
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-5)


def test_all_zero_weights_fold(mobilenet, segformer):
    for model in (mobilenet(MobileNetV2ForSemanticSegmentation), segformer):
        for parameter in model.parameters():
            parameter.zero_()
        fold(model)
        assert torch.equal(model(torch.randn(1, 3, 64, 64)).unique(), torch.zeros(1))


def test_a_fold_does_not_touch_the_module_it_was_not_given(segformer, check_fold):
    before = copy.deepcopy(segformer.state_dict())
    check_fold(segformer, ("encoder", "decode_head", "batch_norm"))
    after = segformer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
