import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from segcli import selfcheck
from segcli.artifact import ModelCard
from segcli.onnx_file import read_metadata
from segcli.preprocess import preprocess

DATA = Path(selfcheck.__file__).parent / "data"


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A copy of the embedded model and its logits that may be damaged."""
    for name in (selfcheck.MODEL, selfcheck.STORED):
        shutil.copy(DATA / name, tmp_path)
    monkeypatch.setattr(selfcheck, "files", lambda package: tmp_path)
    return tmp_path


def stored_logits():
    return np.array(json.loads((DATA / selfcheck.STORED).read_text())["logits"])


def test_passes():
    provider, difference = selfcheck.run("cpu")
    assert provider == "CPUExecutionProvider"
    assert difference < 1e-4 < selfcheck.TOLERANCE


def test_picture_is_the_same_everywhere():
    picture = selfcheck.picture()
    assert (picture.shape, picture.dtype) == ((120, 160, 3), np.uint8)
    # By plain Python integers.
    for y, x in ((0, 0), (7, 11), (119, 159), (60, 3)):
        assert picture[y, x].tolist() == [(3 * x + y) % 256, (x * y // 16) % 256, (5 * y - x) % 256]


def test_a_wrong_value_among_the_stored(own_data):
    path = own_data / selfcheck.STORED
    stored = json.loads(path.read_text())
    stored["logits"][4][1][2] += 5
    path.write_text(json.dumps(stored))
    assert selfcheck.run("cpu")[1] > selfcheck.TOLERANCE


def test_logits_of_another_shape(own_data):
    path = own_data / selfcheck.STORED
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({"logits": stored["logits"][:-1]}))
    assert selfcheck.run("cpu")[1] == float("inf")


def test_another_model(own_data):
    path = own_data / selfcheck.MODEL
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    weights = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(weights[::-1].copy(), largest.name))
    onnx.save(model, path)
    assert selfcheck.run("cpu")[1] > selfcheck.TOLERANCE


def test_writing_the_stored_logits_again_changes_nothing(own_data):
    before = stored_logits()
    selfcheck._store()
    after = np.array(json.loads((own_data / selfcheck.STORED).read_text())["logits"])
    assert np.abs(after - before).max() < 1e-3


@pytest.mark.export
def test_stored_logits_are_those_of_transformers(shared):
    import torch
    from transformers import SegformerForSemanticSegmentation

    reference = SegformerForSemanticSegmentation.from_pretrained(
        shared / "checkpoints" / "segformer-b0-camvid"
    ).eval()
    path = selfcheck.embedded_model()
    card = ModelCard.parse(read_metadata(path), str(path))
    pixel_values = preprocess(selfcheck.picture(), card.preprocessing)
    with torch.inference_mode():
        logits = reference(torch.from_numpy(pixel_values)).logits[0].numpy()
    found = logits[:, :: selfcheck.STEP, :: selfcheck.STEP]
    stored = stored_logits()
    assert found.shape == stored.shape
    # Of their scale, as in the self-check; fp16 storage of the weights makes most of it.
    assert np.abs(found - stored).max() / np.abs(found).max() < 1e-3
