"""Checkpoint in, one self-describing file out: right at every size, the same bytes each time."""

import copy
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import segcli
from segcli.artifact import METADATA_KEY, ModelCard, Preprocessing
from segcli.errors import CheckpointError, ExportError
from segcli.export import convert as convert_room
from segcli.export import verify
from segcli.export.convert import ExportRequest, export_model
from segcli.export.trace import OPSET
from segcli.labels import Labels
from segcli.onnx_file import parse_metadata
from segcli.session import Session

pytestmark = pytest.mark.export

SIZES_HW = ((32, 32), (64, 96), (97, 131), (33, 160), (128, 64))
NAMES = {str(i): name for i, name in enumerate(("road", "sky", "car", "tree", "person"))}
PROCESSOR = {"size": {"height": 64, "width": 96}, "do_reduce_labels": True}


@pytest.fixture(scope="module")
def segformer(tiny_segformer, randomize, calibrate, save_checkpoint):
    """Makes a tiny random SegFormer of transformers, and its checkpoint."""

    def segformer(head="ForSemanticSegmentation", id2label=NAMES, **changes):
        config = transformers.SegformerConfig(**{**tiny_segformer, **changes})
        model = randomize(getattr(transformers, f"Segformer{head}")(config))
        if config.num_channels == 3 and head == "ForSemanticSegmentation":
            calibrate(model)
        more = {} if head == "Model" else {"id2label": id2label, "label2id": {}}
        return model, save_checkpoint(model, processor=PROCESSOR, **more)

    return segformer


@pytest.fixture(scope="module")
def mobilenet(randomize, calibrate, save_checkpoint):
    """Makes a random MobileNetV2 0.35 of transformers, and its checkpoint."""

    def mobilenet(head="ForImageClassification", **config):
        config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=7, **config)
        model = randomize(getattr(transformers, f"MobileNetV2{head}")(config))
        return calibrate(model), save_checkpoint(model)

    return mobilenet


def request(checkpoint, **changes):
    return ExportRequest(checkpoint=checkpoint, name="tiny", source="a test", **changes)


# An export takes seconds, so tests that look at one share it.
@pytest.fixture(scope="module")
def segmenter(segformer):
    """A SegFormer segmenter of transformers, its checkpoint, and its export."""
    theirs, folder = segformer()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    values = {"revision": "abc", "license": "MIT", "license_note": "yours", "num_classes": 5}
    report = export_model(request(folder, **values))
    # An export leaves the checkpoint alone.
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    return theirs, folder, report


@pytest.fixture(scope="module")
def classifier(mobilenet):
    """A MobileNetV2 classifier of transformers, its checkpoint, and its export."""
    theirs, folder = mobilenet()
    return theirs, folder, export_model(request(folder))


@pytest.fixture(scope="module")
def deeplab(mobilenet):
    """A DeepLab segmenter of transformers, its checkpoint, and its export."""
    theirs, folder = mobilenet("ForSemanticSegmentation", output_stride=16)
    return theirs, folder, export_model(request(folder))


@pytest.fixture
def untraced(segmenter, monkeypatch):
    """Skips tracing and comparing, for tests of what surrounds them: any graph will do."""
    proto = onnx.load_from_string(segmenter[2].data)
    monkeypatch.setattr(convert_room, "trace", lambda *_: copy.deepcopy(proto))
    monkeypatch.setattr(convert_room.verify, "compare", lambda *_: {"max_rel_diff": 0.0})


def operators(data):
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


def check_sizes(data, theirs, relative, sizes=SIZES_HW):
    session = Session(data, device="cpu")
    for h, w in sizes:
        for batch in (1, 2):
            x = torch.randn(batch, 3, h, w)
            [found] = session.run(x.numpy())
            assert relative(found, theirs(x).logits) <= verify.TOLERANCE


def test_a_segformer_segmenter(segmenter, relative):
    theirs, folder, report = segmenter
    card, data = report.card, report.data
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    assert report.notes == ()
    assert ModelCard.parse(parse_metadata(memoryview(data), "x"), "x") == card
    weights = folder / "model.safetensors"
    assert card == ModelCard(
        name="tiny",
        task="segmentation",
        family="segformer",
        variant="custom",
        class_names=tuple(NAMES.values()),
        palette=card.palette,
        preprocessing=Preprocessing(
            resize="squash",
            size_hw=(64, 96),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        activation="softmax",
        align_corners=False,
        ignore_index=255,
        reduce_labels=True,
        input_name="pixel_values",
        output_names=("logits",),
        source="a test",
        revision="abc",
        weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        license="MIT",
        license_note="yours",
        opset=OPSET,
        folds=("encoder", "decode_head", "batch_norm"),
        storage="fp32",
        precision="fp32",
        versions={
            "segcli": segcli.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
        verification=card.verification,
    )
    assert len(set(card.palette)) == 5
    assert card.verification["max_rel_diff"] <= card.verification["tolerance"] == verify.TOLERANCE
    assert card.verification["sizes_hw"] == [list(s) for s in verify.SIZES_HW]
    assert card.verification["batches"] == list(verify.BATCHES)

    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [
        ("", OPSET),
        ("com.microsoft", 1),
    ]
    assert (proto.producer_name, proto.producer_version) == ("segcli", segcli.__version__)
    assert [i.name for i in proto.graph.input] == ["pixel_values"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    assert [p.key for p in proto.metadata_props] == [METADATA_KEY, "segcli.sha256"]
    assert not any(t.external_data for t in proto.graph.initializer)

    ops = operators(data)
    # Patch embeddings, first blocks and stages 4 each, reductions of the stages with a ratio.
    assert ops["LayerNormalization"] == 4 + 4 + 4 + 4
    # The other norms of the 5 blocks come with a residual to add.
    assert ops["SkipSimplifiedLayerNormalization"] == 2 * 5 - 4
    assert ops["MultiHeadAttention"] == ops["Gelu"] == 5
    # The mean of what each patch embedding gives; no other is left.
    assert ops["ReduceMean"] == 4
    # Upsampling of all stages but the first.
    assert ops["Resize"] == 3
    assert not ops.keys() & {"Pad", "BatchNormalization", "Erf", "Softmax", "If"}

    check_sizes(data, theirs, relative)
    rng = np.random.default_rng(1)
    sizes = [tuple(rng.integers(32, 200, 2).tolist()) for _ in range(6)]
    check_sizes(data, theirs, relative, sizes)


def test_a_mobilenet_classifier(classifier, relative):
    theirs, _, report = classifier
    card = report.card
    assert (card.family, card.variant, card.task) == ("mobilenet_v2", "0.35", "classification")
    assert card.class_names == tuple(f"LABEL_{i}" for i in range(7))
    assert card.palette == ()
    assert card.folds == ("batch_norm",)
    assert card.preprocessing == Preprocessing(
        resize="shortest_edge",
        shortest_edge=256,
        crop_hw=(224, 224),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    assert "no preprocessor_config.json: the processor's defaults are used" in report.notes
    assert operators(report.data).keys() <= {"Conv", "Clip", "Add", "ReduceMean", "Gemm"}
    check_sizes(report.data, theirs, relative)


def test_a_deeplab_segmenter(deeplab, relative):
    theirs, _, report = deeplab
    assert report.card.folds == ("batch_norm", "unused_conv_1x1", "image_pooling")
    assert report.card.preprocessing.crop_hw is None
    assert "Pad" not in operators(report.data)
    # The unused convolution still counts as a weight of the checkpoint.
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    check_sizes(report.data, theirs, relative)


def test_segformer_features(segformer, relative):
    theirs, folder = segformer("Model", reshape_last_stage=False)
    report = export_model(request(folder))
    names = ("stage_1", "stage_2", "stage_3", "stage_4", "last_hidden_state")
    assert report.card.task == "features"
    assert report.card.output_names == names
    assert report.card.class_names == report.card.palette == ()
    session = Session(report.data, device="cpu")
    assert session.output_names == names
    for h, w in SIZES_HW:
        x = torch.randn(2, 3, h, w)
        expected = theirs(x, output_hidden_states=True)
        found = session.run(x.numpy())
        assert relative(found[-1], expected.last_hidden_state) <= 1e-4
        assert expected.last_hidden_state.ndim == 3
        for ours, stage in zip(found[:3], expected.hidden_states[:-1], strict=True):
            assert relative(ours, stage) <= 1e-4


def test_features_of_a_checkpoint_with_a_head(segmenter, relative):
    theirs, folder, _ = segmenter
    report = export_model(request(folder, task="features"))
    assert report.card.folds == ("encoder",)
    x = torch.randn(1, 3, 64, 96)
    found = Session(report.data, device="cpu").run(x.numpy())
    expected = theirs.segformer(x, output_hidden_states=True)
    for ours, stage in zip(
        found, (*expected.hidden_states, expected.last_hidden_state), strict=True
    ):
        assert relative(ours, stage) <= 1e-4


def test_mobilenet_features(mobilenet, relative):
    theirs, folder = mobilenet("Model")
    report = export_model(request(folder))
    assert report.card.task == "features"
    x = torch.randn(2, 3, 97, 131)
    found = Session(report.data, device="cpu").run(x.numpy())
    expected = theirs(x)
    assert len(found) == len(report.card.output_names) == 2
    assert relative(found[0], expected.last_hidden_state) <= verify.TOLERANCE
    assert relative(found[1], expected.pooler_output) <= verify.TOLERANCE


AGAIN = """
import sys
from pathlib import Path
from segcli.export.convert import ExportRequest, export_model
report = export_model(ExportRequest(checkpoint=Path(sys.argv[1]), name="tiny", source="a test"))
sys.stdout.buffer.write(report.data)
"""


def test_the_same_checkpoint_gives_the_same_bytes(classifier):
    _, folder, report = classifier
    assert export_model(request(folder)).data == report.data


def test_another_process_gives_the_same_bytes(classifier, tmp_path):
    _, folder, report = classifier
    again = subprocess.run(
        [sys.executable, "-c", AGAIN, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert again.stdout == report.data


def test_a_segformer_gives_the_same_bytes_again(segmenter):
    _, folder, report = segmenter
    values = {"revision": "abc", "license": "MIT", "license_note": "yours"}
    assert export_model(request(folder, **values)).data == report.data


def test_nothing_of_this_machine_is_in_the_file(segmenter, classifier, deeplab):
    for _, folder, report in (segmenter, classifier, deeplab):
        for trace in (
            *(b"/tmp", b"site-packages", b"torch/", b".py", b"/work", b"/home"),
            *(str(path).encode() for path in (folder, Path.cwd(), Path.home())),
        ):
            assert trace not in report.data


def test_a_fixed_size(segmenter, relative):
    theirs, folder, _ = segmenter
    report = export_model(request(folder, size_hw=(64, 160)))
    assert Session(report.data, device="cpu").input_hw == (64, 160)
    assert report.card.preprocessing.size_hw == (64, 160)
    assert report.card.verification["sizes_hw"] == [[64, 160]]
    check_sizes(report.data, theirs, relative, [(64, 160)])


def test_a_fixed_size_keeps_the_proportion_of_the_crop(classifier, relative):
    theirs, folder, _ = classifier
    report = export_model(request(folder, size_hw=(96, 112)))
    pre = report.card.preprocessing
    assert (pre.resize, pre.shortest_edge, pre.crop_hw) == ("shortest_edge", 128, (96, 112))
    assert "Pad" not in operators(report.data)
    check_sizes(report.data, theirs, relative, [(96, 112)])


def test_fp16_storage(segformer, relative):
    # Wide enough that the file is mostly weights.
    theirs, folder = segformer(
        depths=[1, 1, 1, 1],
        hidden_sizes=[32, 64, 160, 256],
        num_attention_heads=[1, 2, 5, 8],
        mlp_ratios=[4, 4, 4, 4],
        decoder_hidden_size=128,
    )
    report = export_model(request(folder, storage="fp16"))
    assert report.card.storage == "fp16"
    # Biases stay as they are, and each stored tensor has a Cast of its own. The folded head has a
    # 4D -> D convolution less than the checkpoint.
    decoder = 4 * 128 * 128
    assert 1.8 < len(report.data) / (report.parameters - decoder) < 2.3
    verification = report.card.verification
    assert verification["max_rel_diff"] <= verify.TOLERANCE
    assert verify.TOLERANCE < verification["fp16_max_rel_diff"] <= verify.FP16_TOLERANCE
    x = torch.randn(2, 3, 97, 131)
    [found] = Session(report.data, device="cpu").run(x.numpy())
    assert found.dtype == np.float32
    expected = theirs(x).logits.numpy()
    assert relative(found, expected) <= verify.FP16_TOLERANCE
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98


@pytest.mark.usefixtures("untraced")
def test_one_class_is_a_foreground(segformer):
    _, folder = segformer(num_labels=1, id2label={"0": "crack"})
    card = export_model(request(folder, num_classes=1)).card
    assert card.activation == "sigmoid"
    assert card.class_names == ("background", "crack")
    assert len(card.palette) == 2


@pytest.mark.usefixtures("untraced")
def test_labels_of_one_s_own(segmenter):
    _, folder, _ = segmenter
    names = ("a", "b", "c", "d", "e")
    palette = tuple((i, i, i) for i in range(5))
    card = export_model(request(folder, labels=Labels(names, palette))).card
    assert card.class_names == names
    assert card.palette == palette
    card = export_model(request(folder, labels=Labels(names, None))).card
    assert len(set(card.palette)) == 5


@pytest.mark.usefixtures("untraced")
def test_weights_without_a_config(classifier, tmp_path):
    path = tmp_path / "mobile.pth"
    torch.save(classifier[0].state_dict(), path)
    report = export_model(request(path))
    assert report.card.variant == "0.35"
    assert report.card.class_names == tuple(f"LABEL_{i}" for i in range(7))
    assert report.notes[0].startswith("no config.json: recognised as MobileNetV2 0.35")


def test_a_wrong_rewrite_is_caught(classifier, monkeypatch):
    _, folder, _ = classifier
    right = convert_room.fold

    def wrong(model):
        names = right(model)
        model.classifier.bias.add_(0.1)
        return names

    monkeypatch.setattr(convert_room, "fold", wrong)
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* nothing was written"):
        export_model(request(folder))


def test_a_graph_that_runs_at_one_size_only_is_caught(classifier, monkeypatch):
    """What a bad trace took for a constant would be right at the size that was traced."""
    _, folder, _ = classifier
    right = convert_room.trace
    monkeypatch.setattr(convert_room, "trace", lambda model, size: right(model, size or (64, 96)))
    with pytest.raises(ExportError, match="does not run at 97x131"):
        export_model(request(folder))


def test_another_number_of_outputs_is_caught(segmenter):
    proto = onnx.load_from_string(segmenter[2].data)
    model = torch.nn.AvgPool2d(4)
    with pytest.raises(ExportError, match="at 64x96, batch 1 have shapes"):
        verify.compare(proto, model, None, 1e-4)


def test_values_that_are_not_numbers_are_caught():
    assert verify.relative_difference(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert verify.relative_difference(np.array([1.0]), np.array([np.nan])) == float("inf")
    assert verify.relative_difference(np.array([np.inf]), np.array([np.inf])) == float("inf")
    assert verify.relative_difference(np.zeros(3), np.zeros(3)) == 0
    assert verify.relative_difference(np.array([1.5, 4.0]), np.array([1.0, -4.0])) == 2


def test_pictures_have_three_channels(segformer):
    _, folder = segformer(num_channels=4)
    with pytest.raises(CheckpointError, match="num_channels 4, expected 3"):
        export_model(request(folder))


@pytest.mark.parametrize("size_hw", [(16, 64), (64, 31), (1, 1), (0, 64)])
def test_a_size_below_the_least_is_refused(tmp_path, size_hw):
    seen = f"--image-size {size_hw[0]}x{size_hw[1]} is too small, expected at least 32x32"
    with pytest.raises(CheckpointError, match=seen):
        export_model(request(tmp_path, size_hw=size_hw))


def test_another_number_of_classes_is_refused(segmenter):
    _, folder, _ = segmenter
    with pytest.raises(CheckpointError, match="a test has 5 classes, expected 150"):
        export_model(request(folder, num_classes=150))


def test_tensors_that_do_not_fit_the_config_are_refused(segformer):
    _, folder = segformer()
    path = folder / "config.json"
    path.write_text(
        path.read_text().replace('"decoder_hidden_size": 24', '"decoder_hidden_size": 32')
    )
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        export_model(request(folder))
