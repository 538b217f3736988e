"""Parity with transformers on random weights, ONNX exports at many sizes, config errors."""

import dataclasses
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from segcli.errors import CheckpointError
from segcli.export.activations import ACTIVATIONS
from segcli.export.mobilenet_v2 import (
    DOMAINS,
    MobileNetV2Config,
    MobileNetV2Features,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
    SamePadConv2d,
)

pytestmark = pytest.mark.export

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"
SIZES_HW = ((64, 96), (65, 65), (33, 47))


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def randomize(model):
    """Gives every layer an output that depends on its input, and every BN its own statistics."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
        elif isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                torch.nn.init.uniform_(values, low, high)
    return model.eval()


def assert_close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    scale = np.abs(theirs).max()
    assert scale > 0
    assert np.abs(ours - theirs).max() / scale <= tolerance


def assert_depends_on_input(logits):
    """Two random images in a batch: a network that has gone constant proves nothing."""
    assert (logits[0] - logits[1]).abs().max() > 1e-3 * logits.abs().max()


def pair(ours_class, theirs_class, prefix="", **config):
    config = {"num_labels": 7, **config}
    theirs = theirs_class(transformers.MobileNetV2Config(**config))
    theirs = randomize(theirs)
    ours = ours_class(MobileNetV2Config(**config)).eval()
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def check_classifier(sizes=SIZES_HW, **config):
    ours, theirs = pair(
        MobileNetV2ForImageClassification,
        transformers.MobileNetV2ForImageClassification,
        **config,
    )
    for h, w in sizes:
        x = torch.randn(2, config.get("num_channels", 3), h, w)
        expected = theirs(x).logits
        assert_depends_on_input(expected)
        assert_close(ours(x), expected)


def check_segmenter(sizes=SIZES_HW, **config):
    ours, theirs = pair(
        MobileNetV2ForSemanticSegmentation,
        transformers.MobileNetV2ForSemanticSegmentation,
        **config,
    )
    for h, w in sizes:
        x = torch.randn(2, config.get("num_channels", 3), h, w)
        expected = theirs(x).logits
        assert_depends_on_input(expected)
        assert_close(ours(x), expected)


@pytest.mark.parametrize("tf_padding", [True, False])
@pytest.mark.parametrize("depth_multiplier", [0.35, 0.75, 1.0, 1.4])
def test_classifier_matches_transformers(depth_multiplier, tf_padding):
    check_classifier(depth_multiplier=depth_multiplier, tf_padding=tf_padding)


@pytest.mark.parametrize("tf_padding", [True, False])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("depth_multiplier", [0.35, 0.75, 1.0, 1.4])
def test_segmenter_matches_transformers(depth_multiplier, output_stride, tf_padding):
    check_segmenter(
        depth_multiplier=depth_multiplier,
        output_stride=output_stride,
        tf_padding=tf_padding,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"output_stride": 8},
        {"finegrained_output": False},
        {"finegrained_output": False, "depth_multiplier": 1.4},
        {"depth_divisible_by": 4},
        {"depth_divisible_by": 1, "depth_multiplier": 0.53},
        {"min_depth": 24},
        {"min_depth": 13},
        {"expand_ratio": 2.5},
        {"expand_ratio": 1},
        {"first_layer_is_expansion": False},
        {"num_channels": 4},
        {"num_channels": 1, "num_labels": 1},
        {"layer_norm_eps": 0.1},
        {"image_size": [96, 128]},
        *({"hidden_act": act} for act in ("relu", "gelu", "gelu_new")),
    ],
    ids=str,
)
def test_every_config_value_has_the_effect_it_has_in_transformers(config):
    config = {"depth_multiplier": 0.35, **config}
    check_classifier(sizes=[(33, 47)], **config)
    check_segmenter(sizes=[(33, 47)], **config)


@pytest.mark.parametrize("tf_padding", [True, False])
@pytest.mark.parametrize("depth_multiplier", [0.35, 1.4])
def test_features_match_transformers(depth_multiplier, tf_padding):
    ours, theirs = pair(
        MobileNetV2Features,
        transformers.MobileNetV2Model,
        prefix="mobilenet_v2.",
        depth_multiplier=depth_multiplier,
        tf_padding=tf_padding,
    )
    for h, w in SIZES_HW:
        x = torch.randn(2, 3, h, w)
        expected = theirs(x)
        last_hidden_state, pooled = ours(x)
        assert_close(last_hidden_state, expected.last_hidden_state)
        assert_close(pooled, expected.pooler_output)


def test_activations_are_those_of_transformers():
    x = torch.linspace(-8, 8, 1001)
    # selu is in transformers' documentation, but not in its table.
    for name, ours in ACTIVATIONS.items():
        act = torch.selu if name == "selu" else transformers.activations.ACT2FN[name]
        torch.testing.assert_close(ours()(x), act(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("output_stride", "plan"),
    [
        (32, "21 11 21 11 11 21 11 11 11 11 11 11 21 11 11 11"),
        (16, "21 11 21 11 11 21 11 11 11 11 11 11 11 12 12 12"),
        (8, "21 11 21 11 11 11 12 12 12 12 12 12 12 14 14 14"),
    ],
)
def test_strides_turn_into_dilation(output_stride, plan):
    config = MobileNetV2Config(output_stride=output_stride)
    strides = config.block_strides()
    assert " ".join(f"{stride}{dilation}" for stride, dilation in strides) == plan


def test_channels_are_rounded_by_at_most_a_tenth_down():
    config = MobileNetV2Config()
    rounded = [config.round_channels(value) for value in (1, 8, 11, 12, 20, 34, 42.6)]
    assert rounded == [8, 8, 16, 16, 24, 32, 40]


def test_the_segmenter_does_not_compute_the_last_convolution():
    config = MobileNetV2Config(depth_multiplier=0.35, num_labels=7)
    model = MobileNetV2ForSemanticSegmentation(config).eval()
    model.mobilenet_v2.conv_1x1.forward = None
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7, 2, 2)


@pytest.mark.parametrize(
    ("folder", "ours_class"),
    [
        ("mobilenet_v2_1.0_224-imagenet", MobileNetV2ForImageClassification),
        ("deeplabv3_mobilenet_v2_1.0_513-voc", MobileNetV2ForSemanticSegmentation),
    ],
)
def test_a_hub_checkpoint_loads_strictly_and_matches(folder, ours_class):
    path = CHECKPOINTS / folder
    if not (path / "model.safetensors").exists():
        pytest.skip(f"no checkpoint at {path}")
    from safetensors.torch import load_file

    values = json.loads((path / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(MobileNetV2Config)}
    known = {name: values[name] for name in fields & values.keys()}
    known["num_labels"] = len(values["id2label"])
    ours = ours_class(MobileNetV2Config(**known)).eval()
    ours.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    theirs = getattr(transformers, ours_class.__name__).from_pretrained(path).eval()
    x = torch.rand(2, 3, 97, 130) * 2 - 1
    assert_close(ours(x), theirs(x).logits)


def export(model, x, *, dynamic):
    """Exports as the trace room does: dynamic batch, height and width, or none of them."""
    dim = torch.export.Dim
    axes = {0: dim("batch"), 2: dim("height", min=32), 3: dim("width", min=32)}
    with warnings.catch_warnings():
        # torch's own use of a pytree class that it has deprecated.
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            opset_version=18,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=(axes,) if dynamic else None,
            verbose=False,
        )
    return program.model_proto


def auto_pads(graph):
    values = (a.s for n in graph.graph.node for a in n.attribute if a.name == "auto_pad")
    return Counter(values)


def run_onnx(graph, x):
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": x.numpy()})[0]


@pytest.mark.parametrize(
    ("model_class", "config", "extra_ops"),
    [
        (MobileNetV2ForImageClassification, {}, {"Gemm"}),
        (
            MobileNetV2ForSemanticSegmentation,
            {"output_stride": 16},
            {"Relu", "Concat", "Expand", "Shape", "Div", "Squeeze", "Reshape"},
        ),
    ],
)
def test_one_dynamic_graph_is_right_at_every_size(model_class, config, extra_ops):
    config = MobileNetV2Config(depth_multiplier=0.35, num_labels=7, **config)
    model = randomize(model_class(config))
    graph = export(model, torch.zeros(2, 3, 64, 96), dynamic=True)
    ops = {node.op_type for node in graph.graph.node}
    assert "Pad" not in ops
    assert ops <= {"Conv", "Clip", "Add", "ReduceMean"} | extra_ops
    strided = sum(isinstance(module, SamePadConv2d) for module in model.modules())
    assert strided in (4, 5)
    assert auto_pads(graph)[b"SAME_UPPER"] == strided
    for batch in (1, 3):
        for h, w in ((32, 32), (33, 47), (257, 385)):
            x = torch.randn(batch, 3, h, w)
            assert_close(run_onnx(graph, x), model(x), 1e-4)


def test_a_fixed_graph_has_its_padding_in_the_convolutions():
    config = MobileNetV2Config(depth_multiplier=0.35, num_labels=7, output_stride=8)
    model = randomize(MobileNetV2ForSemanticSegmentation(config))
    x = torch.randn(1, 3, 65, 96)
    graph = export(model, x, dynamic=False)
    assert "Pad" not in {node.op_type for node in graph.graph.node}
    assert auto_pads(graph).keys() <= {b"NOTSET"}
    assert_close(run_onnx(graph, x), model(x), 1e-4)


def test_a_folded_convolution_keeps_its_padding():
    conv = SamePadConv2d(3, 3, 3, stride=2, groups=3).eval()
    conv.bias = torch.nn.Parameter(torch.randn(3))
    x = torch.randn(1, 3, 33, 64)
    graph = export(conv, torch.zeros(2, 3, 64, 96), dynamic=True)
    padded = torch.nn.functional.pad(x, (0, 1, 1, 1))  # left, right, top, bottom
    expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias, 2, groups=3)
    assert_close(conv(x), expected)
    assert_close(run_onnx(graph, x), expected)


BAD = {
    "num_channels": [0, -3, True, 3.0, "3", None],
    "depth_multiplier": [0, -1.0, float("nan"), float("inf"), 1e9, True, "1.0", None],
    "depth_divisible_by": [0, -8, 8.0, False, None],
    "min_depth": [0, -8, 8.5, None],
    "expand_ratio": [0.0, -6, float("nan"), "6", [6], None],
    "output_stride": [0, 4, 12, 64, 16.0, True, "16", None],
    "first_layer_is_expansion": [0, 1, "true", None],
    "finegrained_output": [1, "false", None],
    "hidden_act": ["swish", "ReLU6", "", None, 6, ["relu6"]],
    "tf_padding": [1, "yes", None],
    "layer_norm_eps": [0, -1e-3, float("nan"), "1e-3", None],
    "num_labels": [0, -1, 21.0, True, "21", None],
}


def test_every_field_with_an_effect_is_checked():
    fields = {field.name for field in dataclasses.fields(MobileNetV2Config)}
    assert DOMAINS.keys() == BAD.keys() == fields - {"image_size"}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
)
def test_a_bad_config_value_is_named(name, value):
    seen = re.escape(f"MobileNetV2 config has {name} = {value!r}, expected ")
    with pytest.raises(CheckpointError, match=seen):
        MobileNetV2Config(**{name: value})
