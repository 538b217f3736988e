"""tf_model.h5 as transformers 4 wrote it: every tensor comes back, and nothing else gets in."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
h5py = pytest.importorskip("h5py")

from segcli.errors import CheckpointError
from segcli.export.checkpoints import find_weights, load_strict, read_weights
from segcli.export.convert import ExportRequest, read_checkpoint
from segcli.export.segformer import (
    SegformerConfig,
    SegformerFeatures,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

pytestmark = pytest.mark.export

HEADS = {
    "tf_segformer_for_semantic_segmentation": SegformerForSemanticSegmentation,
    "tf_segformer_for_image_classification": SegformerForImageClassification,
    "tf_segformer_model": SegformerFeatures,
}
SEGMENTER = "tf_segformer_for_semantic_segmentation"


@pytest.fixture
def config(tiny_segformer):
    return SegformerConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in tiny_segformer.items()}
    )


def keras_name(name, tensor):
    """Returns the path of a layer and the name of its weight, as modeling_tf_segformer.py has them.

    Lists are written out there: `patch_embeddings.0`, `block.0.1`, `layer_norm.3`, `linear_c.2`.
    """
    parts = name.split(".")
    layers, last = parts[:-1], parts[-1]
    path = []
    while layers:
        layer = layers.pop(0)
        while layers and layers[0].isdigit():
            layer += f".{layers.pop(0)}"
        path.append(layer)
    is_norm = "norm" in path[-1]
    last = {
        "weight": "gamma" if is_norm else "kernel",
        "bias": "beta" if is_norm else "bias",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }[last]
    array = tensor.numpy()
    if last == "kernel":
        array = {4: lambda a: np.einsum("oihw->hwio", a), 2: lambda a: a.T}[array.ndim](array)
    return path, last, array


def write_h5(path, state, model, suffix=":0"):
    """Writes a state dict with the groups and attributes of Keras' save_weights."""
    groups = {}
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            layers, last, array = keras_name(name, tensor)
            full = "/".join((model, *layers, f"{last}{suffix}"))
            groups.setdefault(layers[0], []).append((full, array))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in groups]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.13.1"
        file.create_group("top_level_model_weights").attrs["weight_names"] = []
        for layer, weights in groups.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name, _ in weights]
            for name, array in weights:
                group.create_dataset(name, data=array)
    return path


@pytest.fixture
def state(config, randomize):
    return dict(randomize(SegformerForSemanticSegmentation(config)).state_dict())


@pytest.fixture
def written(tmp_path, state):
    """A segmenter's file."""
    return write_h5(tmp_path / "tf_model.h5", state, SEGMENTER)


def test_the_writer_has_the_names_of_transformers(written):
    with h5py.File(written) as file:
        prefix = f"segformer/{SEGMENTER}/segformer/encoder"
        assert file[f"{prefix}/patch_embeddings.0/proj/kernel:0"].shape == (7, 7, 3, 8)
        # A convolution with groups in TensorFlow: (height, width, in over groups, out).
        assert file[f"{prefix}/block.1.1/mlp/dwconv/dwconv/kernel:0"].shape == (3, 3, 1, 32)
        assert file[f"{prefix}/block.0.0/attention/self/sr/kernel:0"].shape == (8, 8, 8, 8)
        assert file[f"{prefix}/block.0.0/mlp/dense1/kernel:0"].shape == (8, 16)
        assert f"{prefix}/block.0.0/attention/output/dense/bias:0" in file
        assert f"{prefix}/layer_norm.3/gamma:0" in file
        head = f"decode_head/{SEGMENTER}/decode_head"
        assert file[f"{head}/linear_c.3/proj/kernel:0"].shape == (32, 24)
        assert file[f"{head}/classifier/kernel:0"].shape == (1, 1, 24, 5)
        assert f"{head}/batch_norm/moving_variance:0" in file


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("again", ["", "_1"])
def test_every_head_comes_back_bit_for_bit(tmp_path, config, randomize, model, again):
    ours = randomize(HEADS[model](config))
    path = write_h5(tmp_path / "any.name", ours.state_dict(), model + again)
    weights = read_weights(path)
    assert weights.family == "segformer"
    expected = {k: v for k, v in ours.state_dict().items() if "num_batches" not in k}
    assert weights.state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights.state[name], tensor), name
    loaded = HEADS[model](config).eval()
    load_strict(loaded, weights.state, path)
    x = torch.randn(1, 3, 64, 96)
    found, wanted = loaded(x), ours(x)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_names_without_the_colon_and_in_half_precision(tmp_path, state):
    halves = {k: v.half() for k, v in state.items()}
    found = read_weights(write_h5(tmp_path / "a.h5", halves, SEGMENTER, suffix="")).state
    assert all(torch.equal(found[k], v.float()) for k, v in halves.items() if k in found)
    assert len(found) == len(state) - 1
    assert {v.dtype for v in found.values()} == {torch.float32}


def test_a_folder_with_nothing_else(tmp_path, written, tiny_segformer):
    names = {str(i): f"class {i}" for i in range(5)}
    config = {"model_type": "segformer", "id2label": names, **tiny_segformer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_weights(tmp_path) == written
    found = read_checkpoint(ExportRequest(checkpoint=tmp_path, name="x", source="x"))
    assert found.config.class_names == tuple(names.values())
    assert found.config.task == "segmentation"
    (tmp_path / "pytorch_model.bin").touch()
    assert find_weights(tmp_path).name == "pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("optimizer/iterations:0", np.int64(3), "is int64, expected floats"),
        ("segformer/encoder/x/momentum:0", np.zeros(3, np.float32), "holds .*momentum:0.* shape 3"),
        ("segformer/encoder/x/kernel:0", np.zeros((2, 2, 2), np.float32), "of shape 2x2x2"),
        (f"decode_head/{SEGMENTER}_1/decode_head/classifier/bias:0", np.zeros(5, "f4"), "twice"),
    ],
)
def test_what_no_segformer_has_is_named(written, name, array, message):
    with h5py.File(written, "a") as file:
        file[name] = array
    with pytest.raises(CheckpointError, match=message):
        read_weights(written)


def test_a_tensor_that_is_missing_or_too_many_is_named(config, written):
    with h5py.File(written, "a") as file:
        del file[f"decode_head/{SEGMENTER}/decode_head/classifier/bias:0"]
        file[f"decode_head/{SEGMENTER}/decode_head/aux/bias:0"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError) as caught:
        load_strict(SegformerForSemanticSegmentation(config), read_weights(written).state, written)
    assert "1 missing: decode_head.classifier.bias" in str(caught.value)
    assert "1 unexpected: decode_head.aux.bias" in str(caught.value)


def test_another_network_of_keras_is_refused(tmp_path):
    path = tmp_path / "mobilenet.h5"
    with h5py.File(path, "w") as file:
        file["Conv1/Conv1/kernel:0"] = np.zeros((3, 3, 3, 32), np.float32)
    with pytest.raises(CheckpointError, match="neither a SegFormer nor a MobileNetV2"):
        read_weights(path)


@pytest.mark.parametrize("kind", ["external", "virtual", "compressed", "empty"])
def test_data_that_is_not_in_the_file_is_refused(tmp_path, written, kind):
    """What a dataset points to may be any file, and what it unpacks to larger than memory."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["x"] = np.zeros(16, np.float32)
    with h5py.File(written, "a") as file:
        where = {"name": "segformer/encoder/x/bias:0", "shape": (16,), "dtype": "f4"}
        if kind == "external":
            file.create_dataset(**where, external=[(str(secret), 0, 64)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((16,), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "source.h5"), "x", (16,))
            file.create_virtual_dataset(where["name"], layout)
        elif kind == "compressed":
            file.create_dataset(where["name"], (1 << 36,), "f4", chunks=True, compression="gzip")
        else:
            file.create_dataset(where["name"], (1 << 36,), "f4")
    with pytest.raises(CheckpointError, match="not stored in one piece"):
        read_weights(written)


def test_links_out_of_the_file_are_not_followed(tmp_path, written):
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["x/bias:0"] = np.zeros(16, np.float32)
    before = read_weights(written).state.keys()
    with h5py.File(written, "a") as file:
        file["segformer/more"] = h5py.ExternalLink(str(tmp_path / "source.h5"), "/x")
    assert read_weights(written).state.keys() == before


def test_without_the_package_the_way_to_it_is_said(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match="HDF5 file, and h5py cannot") as caught:
        read_weights(written)
    assert "segcli[export]" in caught.value.hint


@pytest.mark.parametrize("part", [0.00005, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(written, part):
    data = written.read_bytes()
    written.write_bytes(data[: max(9, int(len(data) * part))])
    with pytest.raises(CheckpointError, match=r"cannot read .*tf_model"):
        read_weights(written)
