"""Features by name, against transformers; and that what is not asked for is not computed."""

import json

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from segcli import load
from segcli.errors import CheckpointError, UsageError
from segcli.export.convert import ExportRequest, export_model

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """A MobileNetV2 of transformers with random weights, batch norm included; and its folder."""
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=96, tf_padding=True)
    model = transformers.MobileNetV2ForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model, saved(model, tmp_path_factory.mktemp("mobilenet"))


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 40, 64], num_labels=5, attn_implementation="eager"
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    return model, saved(model, tmp_path_factory.mktemp("segformer"))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def export(folder, tmp_path, *layers):
    path = tmp_path / "f.onnx"
    request = ExportRequest(checkpoint=folder, name="f", source="", task="features", layers=layers)
    path.write_bytes(export_model(request).data)
    return path


def run(path, x):
    model = load(path, device="cpu")
    outputs = model.session.run(x.numpy())
    return dict(zip(model.session.output_names, outputs, strict=True))


def close(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_mobilenets_expansions_pooled_and_last(mobilenet, tmp_path):
    model, folder = mobilenet
    x = torch.randn(2, 3, 96, 128)
    seen = {}
    for i in (10, 13):
        model.mobilenet_v2.layer[i].expand_1x1.register_forward_hook(
            lambda module, args, output, i=i: seen.__setitem__(i, output)
        )
    with torch.no_grad():
        expected = model.mobilenet_v2(x)
    found = run(
        export(folder, tmp_path, "expansion_13", "expansion_10", "pooler_output"),
        x,
    )
    assert list(found) == ["expansion_13", "expansion_10", "pooler_output"]
    close(found["expansion_10"], seen[10])
    close(found["expansion_13"], seen[13])
    # After ReLU6.
    assert found["expansion_10"].min() == 0
    assert found["expansion_10"].max() <= 6
    close(found["pooler_output"], expected.pooler_output)
    found = run(export(folder, tmp_path), x)
    assert list(found) == ["last_hidden_state", "pooler_output"]
    close(found["last_hidden_state"], expected.last_hidden_state)


def test_segformers_stages_and_attentions(segformer, tmp_path):
    model, folder = segformer
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.segformer(x, output_hidden_states=True, output_attentions=True)
    found = run(export(folder, tmp_path), x)
    assert list(found) == [f"stage_{i}" for i in range(1, 5)] + ["last_hidden_state"]
    for i in range(4):
        close(found[f"stage_{i + 1}"], expected.hidden_states[i])
    close(found["last_hidden_state"], expected.last_hidden_state)
    found = run(export(folder, tmp_path, "attention_0_1", "attention_3_0", "stage_2"), x)
    close(found["attention_0_1"], expected.attentions[1])
    close(found["attention_3_0"], expected.attentions[6])
    close(found["stage_2"], expected.hidden_states[1])


def cost(path):
    """Convolutions and weights of a graph."""
    graph = onnx.load(path).graph
    values = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    return sum(node.op_type == "Conv" for node in graph.node), values


def test_what_is_not_asked_for_is_not_there(mobilenet, segformer, tmp_path):
    whole_convs, whole_weights = cost(export(mobilenet[1], tmp_path))
    convs, weights = cost(export(mobilenet[1], tmp_path, "expansion_10"))
    # The stem's two, three of each of ten blocks, and one.
    assert convs == 2 + 1 + 10 * 3 + 1 < whole_convs
    assert weights < whole_weights / 3
    whole_convs, whole_weights = cost(export(segformer[1], tmp_path))
    convs, weights = cost(export(segformer[1], tmp_path, "stage_1"))
    assert (convs, weights) < (whole_convs / 3, whole_weights / 10)


def test_layers_that_are_not_there(mobilenet, segformer, tmp_path):
    with pytest.raises(CheckpointError, match="no block 16: the network has blocks 0 to 15"):
        export(mobilenet[1], tmp_path, "expansion_16")
    with pytest.raises(UsageError, match="no layer 'stage_1': this network has last_hidden_state"):
        export(mobilenet[1], tmp_path, "stage_1")
    with pytest.raises(CheckpointError, match="no attention layer"):
        export(segformer[1], tmp_path, "attention_4_0")
    with pytest.raises(UsageError, match="no layer 'stage_5'"):
        export(segformer[1], tmp_path, "stage_5")


def test_the_card_names_the_layers(mobilenet, tmp_path):
    path = export(mobilenet[1], tmp_path, "expansion_3")
    card = load(path, device="cpu").card
    assert (card.task, card.output_names) == ("features", ("expansion_3",))
    assert json.dumps(card.to_dict())
