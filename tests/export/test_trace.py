"""Checkpoint in, one self-describing file out: right at every size, the same bytes each time."""

import copy
import dataclasses
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
from segcli.export import trace as trace_room
from segcli.export import verify
from segcli.export.trace import OPSET, ExportRequest, export_model
from segcli.labels import Labels
from segcli.onnx_file import parse_metadata
from segcli.session import Session

pytestmark = pytest.mark.export

SIZES_HW = ((32, 32), (64, 96), (97, 131), (33, 160), (128, 64))
NAMES = {str(i): name for i, name in enumerate(("road", "sky", "car", "tree", "person"))}
PROCESSOR = {"size": {"height": 64, "width": 96}, "do_reduce_labels": True}


@pytest.fixture
def segformer(tiny_segformer, randomize, save_checkpoint):
    """Makes a tiny random SegFormer of transformers, and its checkpoint."""

    def segformer(head="ForSemanticSegmentation", processor=PROCESSOR, **changes):
        values = {**tiny_segformer, **{k: v for k, v in changes.items() if k != "id2label"}}
        config = transformers.SegformerConfig(**values)
        model = randomize(getattr(transformers, f"Segformer{head}")(config))
        names = changes.get("id2label", NAMES)
        more = {"id2label": names, "label2id": {}} if names and head != "Model" else {}
        return model, save_checkpoint(model, processor=processor, **more)

    return segformer


@pytest.fixture
def mobilenet(randomize, save_checkpoint):
    def mobilenet(head="ForImageClassification", **config):
        config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=7, **config)
        model = randomize(getattr(transformers, f"MobileNetV2{head}")(config))
        return model, save_checkpoint(model)

    return mobilenet


def request(checkpoint, **changes):
    return ExportRequest(checkpoint=checkpoint, name="tiny", source="a test", **changes)


def operators(data):
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


def check_sizes(data, theirs, relative, sizes=SIZES_HW, tolerance=verify.TOLERANCE):
    session = Session(data, device="cpu")
    for h, w in sizes:
        for batch in (1, 2):
            x = torch.randn(batch, 3, h, w)
            expected = theirs(x).logits
            [found] = session.run(x.numpy())
            assert relative(found, expected) <= tolerance


def test_a_segformer_segmenter(segformer, relative):
    theirs, folder = segformer()
    report = export_model(
        request(folder, revision="abc", license="MIT", license_note="yours", num_classes=5)
    )
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
        folds=("decode_head", "batch_norm"),
        storage="fp32",
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
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert (proto.producer_name, proto.producer_version) == ("segcli", segcli.__version__)
    assert [i.name for i in proto.graph.input] == ["pixel_values"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    assert [p.key for p in proto.metadata_props] == [METADATA_KEY]
    assert not any(t.external_data for t in proto.graph.initializer)

    ops = operators(data)
    # Patch embeddings and stages 4 each, blocks 2 each, reductions of the stages with a ratio.
    assert ops["LayerNormalization"] == 4 + 4 + 2 * 5 + 4
    assert ops["Gelu"] == 5
    # Upsampling of all stages but the first.
    assert ops["Resize"] == 3
    assert not ops.keys() & {"Pad", "BatchNormalization", "Erf", "ReduceMean", "Concat_", "If"}

    check_sizes(data, theirs, relative)
    rng = np.random.default_rng(1)
    sizes = [tuple(rng.integers(32, 200, 2).tolist()) for _ in range(6)]
    check_sizes(data, theirs, relative, sizes)


def test_a_mobilenet_classifier(mobilenet, relative):
    theirs, folder = mobilenet()
    report = export_model(request(folder))
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


def test_a_deeplab_segmenter(mobilenet, relative):
    theirs, folder = mobilenet("ForSemanticSegmentation", output_stride=16)
    report = export_model(request(folder))
    assert report.card.folds == ("batch_norm", "unused_conv_1x1", "image_pooling")
    assert report.card.preprocessing.crop_hw is None
    assert "Pad" not in operators(report.data)
    # The unused convolution still counts as a weight of the checkpoint.
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    check_sizes(report.data, theirs, relative)


def test_a_segformer_classifier(segformer, relative):
    theirs, folder = segformer("ForImageClassification")
    report = export_model(request(folder))
    assert report.card.task == "classification"
    assert report.card.folds == ()
    assert "Pad" not in operators(report.data)
    check_sizes(report.data, theirs, relative)


@pytest.mark.parametrize("reshape", [True, False])
def test_segformer_features(segformer, relative, reshape):
    theirs, folder = segformer("Model", reshape_last_stage=reshape)
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
        stages = expected.hidden_states if reshape else expected.hidden_states[:-1]
        for ours, stage in zip(found, stages, strict=False):
            assert relative(ours, stage) <= 1e-4


def test_features_of_a_checkpoint_with_a_head(segformer, mobilenet, relative):
    theirs, folder = segformer()
    report = export_model(request(folder, task="features"))
    assert report.card.folds == ()
    x = torch.randn(1, 3, 64, 96)
    found = Session(report.data, device="cpu").run(x.numpy())
    assert relative(found[-1], theirs.segformer(x).last_hidden_state) <= 1e-4


def test_mobilenet_features(mobilenet, relative):
    theirs, folder = mobilenet("Model")
    report = export_model(request(folder))
    assert report.card.task == "features"
    x = torch.randn(2, 3, 97, 131)
    found = Session(report.data, device="cpu").run(x.numpy())
    expected = theirs(x)
    assert len(found) == len(report.card.output_names) == 2
    assert relative(found[0], expected.last_hidden_state) <= 1e-3
    assert relative(found[1], expected.pooler_output) <= 1e-3


AGAIN = """
import sys
from pathlib import Path
from segcli.export.trace import ExportRequest, export_model
report = export_model(ExportRequest(checkpoint=Path(sys.argv[1]), name="tiny", source="a test"))
sys.stdout.buffer.write(report.data)
"""


def test_the_same_checkpoint_gives_the_same_bytes(segformer, mobilenet):
    for _, folder in (segformer(),):
        data = export_model(request(folder)).data
        assert export_model(request(folder)).data == data
        again = subprocess.run(
            [sys.executable, "-c", AGAIN, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": "4711"},
            cwd=folder,
            stdout=subprocess.PIPE,
            check=True,
        )
        assert again.stdout == data


def test_nothing_of_this_machine_is_in_the_file(segformer, mobilenet):
    for folder in (segformer()[1], mobilenet()[1]):
        data = export_model(request(folder)).data
        for trace in (
            *(b"/tmp", b"site-packages", b"torch/", b"torch\\", b".py", b"/work", b"/home"),
            *(str(folder).encode(), str(Path.cwd()).encode(), str(Path.home()).encode()),
        ):
            assert len(trace) > 2 or trace == b"/"
            assert trace not in data


def test_a_fixed_size(segformer, mobilenet, relative):
    theirs, folder = segformer()
    report = export_model(request(folder, size_hw=(64, 160)))
    assert Session(report.data, device="cpu").input_hw == (64, 160)
    assert report.card.preprocessing.size_hw == (64, 160)
    assert report.card.verification["sizes_hw"] == [[64, 160]]
    check_sizes(report.data, theirs, relative, [(64, 160)])
    assert "Shape" not in operators(report.data) or operators(report.data)["Shape"] < 5


def test_a_fixed_size_keeps_the_proportion_of_the_crop(mobilenet, relative):
    theirs, folder = mobilenet()
    report = export_model(request(folder, size_hw=(96, 112)))
    pre = report.card.preprocessing
    assert (pre.resize, pre.shortest_edge, pre.crop_hw) == ("shortest_edge", 128, (96, 112))
    assert "Pad" not in operators(report.data)
    check_sizes(report.data, theirs, relative, [(96, 112)])


def test_fp16_storage(mobilenet, relative):
    theirs, folder = mobilenet("ForSemanticSegmentation")
    full = export_model(request(folder))
    half = export_model(request(folder, storage="fp16"))
    assert half.card.storage == "fp16"
    assert dataclasses.replace(half.card, storage="fp32", verification={}) == dataclasses.replace(
        full.card, verification={}
    )
    # Biases stay as they are, and each stored tensor has a Cast of its own.
    assert 0.45 < len(half.data) / len(full.data) < 0.6
    verification = half.card.verification
    assert verification["fp16_max_rel_diff"] <= verify.FP16_TOLERANCE
    assert verification["max_rel_diff"] == full.card.verification["max_rel_diff"]
    x = torch.randn(2, 3, 97, 131)
    [found] = Session(half.data, device="cpu").run(x.numpy())
    assert found.dtype == np.float32
    expected = theirs(x).logits.numpy()
    assert relative(found, expected) <= verify.FP16_TOLERANCE
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95


def test_one_class_is_a_foreground(segformer):
    _, folder = segformer(num_labels=1, id2label={"0": "crack"})
    card = export_model(request(folder, num_classes=1)).card
    assert card.activation == "sigmoid"
    assert card.class_names == ("background", "crack")
    assert len(card.palette) == 2


def test_labels_of_one_s_own(segformer):
    _, folder = segformer()
    names = ("a", "b", "c", "d", "e")
    palette = tuple((i, i, i) for i in range(5))
    card = export_model(request(folder, labels=Labels(names, palette))).card
    assert card.class_names == names
    assert card.palette == palette
    card = export_model(request(folder, labels=Labels(names, None))).card
    assert len(set(card.palette)) == 5


def test_weights_without_a_config(tmp_path, randomize, relative):
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=7)
    theirs = randomize(transformers.MobileNetV2ForImageClassification(config))
    path = tmp_path / "mobile.pth"
    torch.save(theirs.state_dict(), path)
    report = export_model(request(path))
    assert report.card.variant == "0.35"
    assert report.notes[0].startswith("no config.json: recognised as MobileNetV2 0.35")
    check_sizes(report.data, theirs, relative, [(97, 131)])


def test_a_wrong_rewrite_is_caught(segformer, monkeypatch):
    _, folder = segformer()
    right = trace_room.fold

    def wrong(model):
        names = right(model)
        model.decode_head.classifier.bias.add_(0.1)
        return names

    monkeypatch.setattr(trace_room, "fold", wrong)
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* nothing was written"):
        export_model(request(folder))


def test_a_graph_that_is_wrong_at_one_size_is_caught(segformer, monkeypatch):
    """What is constant in a bad trace would be right at the size that was traced."""
    _, folder = segformer()
    right = trace_room.trace
    monkeypatch.setattr(trace_room, "trace", lambda model, size: right(model, size or (64, 96)))
    with pytest.raises((ExportError, segcli.errors.InferenceError)):
        export_model(request(folder))


def test_values_that_are_not_numbers_are_caught():
    assert verify.relative_difference(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert verify.relative_difference(np.array([1.0]), np.array([np.nan])) == float("inf")
    assert verify.relative_difference(np.array([np.inf]), np.array([np.inf])) == float("inf")
    assert verify.relative_difference(np.zeros(3), np.zeros(3)) == 0
    assert verify.relative_difference(np.array([1.5, 4.0]), np.array([1.0, -4.0])) == 2


def test_a_module_that_cannot_be_traced_is_an_export_error():
    class Strange(torch.nn.Module):
        def forward(self, x):
            raise ValueError("nothing to see")

    with pytest.raises(ExportError, match="could not trace Strange"):
        trace_room.trace(Strange().eval())


def test_pictures_have_three_channels(segformer):
    _, folder = segformer(num_channels=4)
    with pytest.raises(CheckpointError, match="num_channels 4, expected 3"):
        export_model(request(folder))


@pytest.mark.parametrize("size_hw", [(16, 64), (64, 31), (1, 1), (0, 64)])
def test_a_size_below_the_least_is_refused(tmp_path, size_hw):
    seen = f"--image-size {size_hw[0]}x{size_hw[1]} is too small, expected at least 32x32"
    with pytest.raises(CheckpointError, match=seen):
        export_model(request(tmp_path, size_hw=size_hw))


def test_another_number_of_classes_is_refused(segformer):
    _, folder = segformer()
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


def test_an_export_leaves_the_checkpoint_alone(segformer):
    _, folder = segformer()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    export_model(request(folder))
    assert copy.copy({p.name: p.read_bytes() for p in folder.iterdir()}) == before
