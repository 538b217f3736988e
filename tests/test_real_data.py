"""Real checkpoints on real photos, against what others say of the same photos.

Run with ``-s`` to see the figures.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcli import load
from segcli.artifact import ModelCard
from segcli.evaluate import confusion_matrix, iou_per_class, mean_iou, pixel_accuracy
from segcli.model import Model
from segcli.preprocess import preprocess

# What checkpoints/segformer-b0-camvid/README.md says transformers measured.
PUBLISHED_MIOU = {"val": 0.5265, "test": 0.4228}

BIRD = 3


@pytest.fixture(scope="module")
def photos(shared: Path) -> dict[str, dict[str, str]]:
    """photos.csv by file name."""
    with (shared / "data/photos/photos.csv").open(newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def _exported(checkpoint: Path, folder: Path) -> Model:
    from segcli.export.convert import ExportRequest, export_model

    path = folder / f"{checkpoint.name}.onnx"
    request = ExportRequest(checkpoint=checkpoint, name=checkpoint.name, source=checkpoint.name)
    path.write_bytes(export_model(request).data)
    return Model.open(path)


@pytest.fixture(scope="module")
def classifier(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The ImageNet checkpoint, exported."""
    pytest.importorskip("torch")
    checkpoint = shared / "checkpoints/mobilenet_v2_1.0_224-imagenet"
    return _exported(checkpoint, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def deeplab(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The VOC checkpoint, exported."""
    pytest.importorskip("torch")
    checkpoint = shared / "checkpoints/deeplabv3_mobilenet_v2_1.0_513-voc"
    return _exported(checkpoint, tmp_path_factory.mktemp("models"))


@pytest.mark.export
def test_classifier_agrees_with_the_float_reference(shared, photos, classifier):
    labelled = {f: r for f, r in photos.items() if r["float_top1_index_1001"]}
    right = 0
    for file, row in labelled.items():
        [best, *_] = classifier(str(shared / "data/photos" / file)).labels
        right += best.class_id == int(row["float_top1_index_1001"])
    print(f"\ntop-1 equals the reference's on {right} of {len(labelled)} photos")
    assert len(labelled) == 12
    assert right >= 11


@pytest.mark.export
def test_top5_is_that_of_transformers(shared, photos, classifier):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = str(shared / "checkpoints/mobilenet_v2_1.0_224-imagenet")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    reference = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    worst = 0.0
    for file in photos:
        path = shared / "data/photos" / file
        with Image.open(path) as image, torch.no_grad():
            logits = reference(**processor(images=image.convert("RGB"), return_tensors="pt")).logits
        expected = logits[0].softmax(-1).numpy()
        found = classifier(str(path)).labels[:5]
        # Names may swap only where the scores are the same to a thousandth.
        order = np.argsort(-expected, kind="stable")[:5]
        for label, class_id in zip(found, order, strict=True):
            worst = max(worst, abs(label.score - float(expected[label.class_id])))
            assert abs(expected[label.class_id] - expected[class_id]) < 1e-3, file
    print(f"\nlargest score difference among the top 5: {worst:.2g}")
    assert worst < 1e-4


@pytest.mark.export
def test_deeplab_finds_the_bird(shared, deeplab):
    folder = shared / "data/photos"
    with Image.open(folder / "masks/bird_segmentation_mask.png") as mask:
        reference = np.array(mask)
    found = deeplab(str(folder / "bird_segmentation.jpg")).class_map
    # 1 and 2 are edges.
    sure = (reference == 0) | (reference == BIRD)
    ours, theirs = (found == BIRD) & sure, (reference == BIRD) & sure
    iou = (ours & theirs).sum() / (ours | theirs).sum()
    print(f"\nbird IoU {iou:.4f}")
    assert iou >= 0.85


@pytest.mark.export
def test_deeplab_masks_are_those_of_transformers(shared, photos, deeplab):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = shared / "checkpoints/deeplabv3_mobilenet_v2_1.0_513-voc"
    reference = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    same = total = 0
    for file in photos:
        result = deeplab(str(shared / "data/photos" / file))
        pixel_values = torch.from_numpy(preprocess(result.image, deeplab.card.preprocessing))
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(
                reference(pixel_values).logits, size=result.class_map.shape, mode="bilinear"
            )
        same += int((logits.argmax(1)[0].numpy() == result.class_map).sum())
        total += result.class_map.size
    print(f"\nDeepLab masks agree on {same / total:.6%} of {total} pixels")
    assert same / total >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
def test_embedded_model_scores_what_its_readme_says(shared, split):
    model = load()
    counts = np.zeros((11, 11), np.int64)
    frames = sorted((shared / f"data/camvid/images/{split}").glob("*.jpg"))
    assert len(frames) == {"val": 101, "test": 117}[split]
    for frame in frames:
        with Image.open(shared / f"data/camvid/annotations/{split}/{frame.stem}.png") as image:
            truth = np.array(image)
        counts += confusion_matrix(truth, model(str(frame)).class_map, 11)
    print(f"\nCamVid {split}: mIoU {mean_iou(counts):.4f}, accuracy {pixel_accuracy(counts):.4f}")
    assert np.isfinite(iou_per_class(counts)).all()
    assert abs(mean_iou(counts) - PUBLISHED_MIOU[split]) <= 0.005


@pytest.mark.export
def test_embedded_model_has_the_masks_of_transformers(shared):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = shared / "checkpoints/segformer-b0-camvid"
    reference = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = load()
    assert isinstance(model.card, ModelCard)
    same = total = 0
    for frame in sorted((shared / "data/camvid/images/val").glob("*.jpg"))[::10]:
        with Image.open(frame) as image, torch.no_grad():
            outputs = reference(**processor(images=image.convert("RGB"), return_tensors="pt"))
            [expected] = processor.post_process_semantic_segmentation(
                outputs, target_sizes=[image.size[::-1]]
            )
        found = model(str(frame)).class_map
        same += int((expected.numpy() == found).sum())
        total += found.size
    print(f"\nembedded model (fp16 storage) against transformers: {same / total:.4%} of pixels")
    assert same / total >= 0.999


@pytest.mark.export
@pytest.mark.parametrize(("split", "published"), [("val", 0.5265), ("test", 0.4228)])
def test_eval_is_a_few_lines_of_numpy_over_the_masks(shared, segcli, tmp_path, split, published):
    camvid = shared / "data/camvid"
    ran = segcli("eval", "--truth", camvid, "--split", split, "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert segcli("segment", camvid / "images" / split, "-o", tmp_path / "masks").code == 0
    counts = np.zeros((11, 11))
    for path in (camvid / "annotations" / split).glob("*.png"):
        truth = np.asarray(Image.open(path))
        mask = np.asarray(Image.open(tmp_path / "masks" / path.name))
        np.add.at(counts, (truth[truth != 255], mask[truth != 255]), 1)
    both = np.diag(counts)
    ious = both / (counts.sum(0) + counts.sum(1) - both)
    print(f"{split}: mIoU {ious.mean():.6f}, eval {found['miou']:.6f}, published {published}")
    assert found["miou"] == pytest.approx(ious.mean(), abs=1e-12)
    assert [c["iou"] for c in found["classes"]] == pytest.approx(ious.tolist(), abs=1e-12)
    assert found["miou"] == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize("name", ["segformer-b0-camvid", "deeplabv3_mobilenet_v2_1.0_513-voc"])
def test_rewritten_graphs_keep_every_mask(shared, photos, name):
    """Of the graph as the papers have it and the graph as it ships, on the same tensors."""
    torch = pytest.importorskip("torch")
    from segcli.export.convert import ExportRequest, read_checkpoint, reference_module
    from segcli.export.fold import fold
    from segcli.export.trace import trace
    from segcli.postprocess import argmax_class_map
    from segcli.session import Session

    folder = shared / "checkpoints" / name
    checkpoint = read_checkpoint(ExportRequest(checkpoint=folder, name=name, source=name))
    module, sessions = reference_module(checkpoint), []
    with torch.no_grad():
        for rewrite in (lambda module: (), fold):
            rewrite(module)
            proto = trace(module)
            sessions.append(Session(proto.SerializeToString(), device="cpu"))
    frames = sorted((shared / "data/camvid/images/val").glob("*.jpg"))[::10]
    other = near_ties = total = 0
    for path in (*frames, *(shared / "data/photos" / file for file in photos)):
        with Image.open(path) as image:
            picture = np.array(image.convert("RGB"))
        batch = preprocess(picture, checkpoint.preprocessing)
        [plain], [rewritten] = (session.run(batch) for session in sessions)
        size_hw = picture.shape[:2]
        differing = argmax_class_map(plain[0], size_hw) != argmax_class_map(rewritten[0], size_hw)
        full = torch.nn.functional.interpolate(torch.from_numpy(plain), size_hw, mode="bilinear")
        best, second = full[0].topk(2, dim=0).values.numpy()
        near = best - second < 1e-5 * np.abs(plain).max()
        assert not (differing & ~near).any(), path
        other, near_ties = other + int(differing.sum()), near_ties + int(near.sum())
        total += differing.size
    print(f"\n{name}: {other} of {total} pixels differ, all among {near_ties} near-ties")
