"""Weight files of every kind and vintage end in one state dict; damaged and hostile ones do not."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from segcli.errors import CheckpointError
from segcli.export.checkpoints import find_weights, load_strict, read_weights
from segcli.export.hub_names import hub_names
from segcli.export.mobilenet_v2 import (
    MobileNetV2Config,
    MobileNetV2Features,
    MobileNetV2ForImageClassification,
)
from segcli.export.segformer import (
    SegformerConfig,
    SegformerFeatures,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

pytestmark = pytest.mark.export


@pytest.fixture
def config(tiny_segformer):
    return SegformerConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in tiny_segformer.items()}
    )


@pytest.fixture
def state(config, randomize):
    """A random segmenter under hub names."""
    return dict(randomize(SegformerForSemanticSegmentation(config)).state_dict())


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def saved(path, state):
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth", "a.pt"])
def test_every_kind_of_file_gives_the_same_tensors(tmp_path, state, name):
    path = saved(tmp_path / name, state)
    weights = read_weights(path)
    same(weights.state, state)
    assert weights.path == path
    assert weights.family == "segformer"
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.notes == ()


@pytest.mark.parametrize(("kind", "name"), [("a.safetensors", "a.bin"), ("a.bin", "a.safetensors")])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, state, kind, name):
    path = saved(tmp_path / kind, state).rename(tmp_path / name)
    same(read_weights(path).state, state)
    same(read_weights(path.rename(tmp_path / "no-suffix")).state, state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_wrapped_state_dict_is_unwrapped(tmp_path, state, wrapper):
    path = tmp_path / "a.pth"
    torch.save({wrapper: state, "epoch": 3, "meta": {"classes": ["a"]}}, path)
    same(read_weights(path).state, state)


def test_the_format_before_zip_files_is_read(tmp_path, state):
    path = tmp_path / "a.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    same(read_weights(path).state, state)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, state, name, dtype):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    found = read_weights(saved(tmp_path / name, stored)).state
    same(found, {k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
    assert {v.dtype for k, v in found.items() if "num_batches" not in k} == {torch.float32}


HEADS = {
    "SegformerForSemanticSegmentation": SegformerForSemanticSegmentation,
    "SegformerForImageClassification": SegformerForImageClassification,
}


@pytest.mark.parametrize("head", HEADS)
def test_names_of_transformers_in_memory_and_on_disk_agree(
    tmp_path, tiny_segformer, config, randomize, save_checkpoint, head
):
    theirs = randomize(getattr(transformers, head)(transformers.SegformerConfig(**tiny_segformer)))
    folder = save_checkpoint(theirs)
    path = tmp_path / "memory.bin"
    torch.save(theirs.state_dict(), path)
    on_disk = read_weights(find_weights(folder))
    in_memory = read_weights(path)
    same(in_memory.state, on_disk.state)
    ours = HEADS[head](config)
    for weights in (on_disk, in_memory):
        load_strict(ours, weights.state, weights.path)


def test_a_bare_encoder_of_transformers_gets_its_prefix(
    tmp_path, tiny_segformer, config, randomize, save_checkpoint
):
    theirs = randomize(transformers.SegformerModel(transformers.SegformerConfig(**tiny_segformer)))
    path = tmp_path / "memory.bin"
    torch.save(theirs.state_dict(), path)
    for file in (path, find_weights(save_checkpoint(theirs))):
        weights = read_weights(file)
        assert weights.family == "segformer"
        assert all(k.startswith("segformer.encoder.") for k in weights.state)
        load_strict(SegformerFeatures(config), weights.state, file)


def test_mobilenets_with_and_without_a_head(tmp_path, randomize, save_checkpoint):
    values = {"depth_multiplier": 0.35, "num_labels": 7}
    for theirs_class, ours_class in (
        (transformers.MobileNetV2Model, MobileNetV2Features),
        (transformers.MobileNetV2ForImageClassification, MobileNetV2ForImageClassification),
    ):
        theirs = randomize(theirs_class(transformers.MobileNetV2Config(**values)))
        path = tmp_path / f"{theirs_class.__name__}.bin"
        torch.save(theirs.state_dict(), path)
        for file in (path, find_weights(save_checkpoint(theirs))):
            weights = read_weights(file)
            assert weights.family == "mobilenet_v2"
            load_strict(ours_class(MobileNetV2Config(**values)), weights.state, file)


def test_missing_batch_counters_are_no_fault(config, state, tmp_path):
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    load_strict(SegformerForSemanticSegmentation(config), old, tmp_path)


# hub name -> name of github.com/NVlabs/SegFormer; stages count from one there.
TO_ORIGINAL = (
    (r"^segformer\.encoder\.patch_embeddings\.(\d)\.proj", r"backbone.patch_embed<\1>.proj"),
    (r"^segformer\.encoder\.patch_embeddings\.(\d)\.layer_norm", r"backbone.patch_embed<\1>.norm"),
    (r"^segformer\.encoder\.layer_norm\.(\d)", r"backbone.norm<\1>"),
    (r"^segformer\.encoder\.block\.(\d)\.(\d+)", r"backbone.block<\1>.\2"),
    (r"\.layer_norm_1\.", ".norm1."),
    (r"\.layer_norm_2\.", ".norm2."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.sr\.", ".attn.sr."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.mlp\.dense1\.", ".mlp.fc1."),
    (r"\.mlp\.dense2\.", ".mlp.fc2."),
    (r"^decode_head\.linear_c\.(\d)", r"decode_head.linear_c<\1>"),
    (r"^decode_head\.linear_fuse\.", "decode_head.linear_fuse.conv."),
    (r"^decode_head\.batch_norm\.", "decode_head.linear_fuse.bn."),
    (r"^decode_head\.classifier\.", "decode_head.linear_pred."),
    (r"^classifier\.", "head."),
)


def original(state):
    """Returns a hub state dict as the original repository would have saved it."""
    result = {}
    for name, tensor in state.items():
        if ".attention.self.value." in name:
            continue
        if ".attention.self.key." in name:
            value = state[name.replace(".key.", ".value.")]
            tensor = torch.cat([tensor, value])
            name = name.replace(".attention.self.key.", ".attn.kv.")
        for pattern, replacement in TO_ORIGINAL:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"<(\d)>", lambda m: str(int(m[1]) + 1), name)
        result[name] = tensor
    return result


def test_the_original_segmenter_is_read(tmp_path, config, state):
    raw = original(state)
    for name in (
        *("backbone.patch_embed1.proj.weight", "backbone.patch_embed4.norm.bias"),
        *("backbone.block2.1.norm1.weight", "backbone.block1.0.attn.kv.weight"),
        *("backbone.block1.0.attn.sr.weight", "backbone.block1.0.attn.norm.weight"),
        *("backbone.block4.0.attn.q.bias", "backbone.block4.0.attn.proj.bias"),
        *("backbone.block3.0.mlp.fc1.weight", "backbone.block3.0.mlp.dwconv.dwconv.weight"),
        *("backbone.norm4.weight", "decode_head.linear_c1.proj.weight"),
        *("decode_head.linear_fuse.conv.weight", "decode_head.linear_fuse.bn.running_var"),
        "decode_head.linear_pred.weight",
    ):
        assert name in raw
    raw["decode_head.conv_seg.weight"] = torch.randn(5, 128, 1, 1)
    raw["decode_head.conv_seg.bias"] = torch.randn(5)
    path = tmp_path / "segformer.b0.512x512.ade.160k.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": raw}, path)
    weights = read_weights(path)
    same(weights.state, state)
    assert weights.notes == ("decode_head.conv_seg, which the original never uses, is left out",)
    load_strict(SegformerForSemanticSegmentation(config), weights.state, path)


def test_keys_come_before_values_in_the_original(state):
    raw = original(state)
    name = "backbone.block1.0.attn.kv.weight"
    dim = raw[name].shape[1]
    found, _ = hub_names({name: raw[name], "patch_embed1.proj.bias": torch.ones(1)}, "x")
    prefix = "segformer.encoder.block.0.0.attention.self."
    assert torch.equal(found[f"{prefix}key.weight"], raw[name][:dim])
    assert torch.equal(found[f"{prefix}value.weight"], raw[name][dim:])


def test_the_original_classifier_is_read(tmp_path, config, randomize):
    state = dict(randomize(SegformerForImageClassification(config)).state_dict())
    raw = {k.removeprefix("backbone."): v for k, v in original(state).items()}
    assert {"patch_embed1.proj.weight", "head.weight", "head.bias"} <= raw.keys()
    path = saved(tmp_path / "mit_b0.pth", raw)
    weights = read_weights(path)
    same(weights.state, state)
    load_strict(SegformerForImageClassification(config), weights.state, path)


def test_mmsegmentation_s_own_names_are_refused(tmp_path, state):
    raw = {
        "backbone.layers.0.0.projection.weight": torch.ones(1),
        "decode_head.convs.0.conv.weight": torch.ones(1),
        "decode_head.conv_seg.weight": torch.ones(1),
    }
    with pytest.raises(CheckpointError, match="mmsegmentation's own SegFormer") as caught:
        read_weights(saved(tmp_path / "a.pth", raw))
    assert "NVlabs" in caught.value.hint


def test_tensors_that_do_not_fit_are_listed(config, state, tmp_path):
    del state["decode_head.batch_norm.running_mean"]
    del state["segformer.encoder.block.0.0.attention.self.sr.bias"]
    state["decode_head.aux.weight"] = torch.ones(1)
    state["decode_head.classifier.weight"] = torch.ones(6, 24, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        load_strict(SegformerForSemanticSegmentation(config), state, tmp_path / "a.bin")
    message = str(caught.value)
    assert (
        "2 missing: segformer.encoder.block.0.0.attention.self.sr.bias, "
        "decode_head.batch_norm.running_mean"
    ) in message
    assert "1 unexpected: decode_head.aux.weight" in message
    assert (
        "1 of the wrong shape: decode_head.classifier.weight is 6x24x1x1, expected 5x24x1x1"
    ) in message
    assert str(tmp_path / "a.bin") in message


def test_a_long_list_of_missing_tensors_is_cut(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: ([^,]+, ){8}…"):
        load_strict(SegformerForSemanticSegmentation(config), {}, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, state, value):
    state["decode_head.classifier.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"decode_head\.classifier\.bias .* not finite"):
        read_weights(saved(tmp_path / "a.safetensors", state))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["a.bin", "a.pth", "a.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, state, name, zipped):
    mark = tmp_path / "it-ran"
    path = tmp_path / name
    torch.save(
        {"state_dict": state, "more": Hostile(mark)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="refused to load") as caught:
        read_weights(path)
    assert "tensors only" in caught.value.hint
    assert not mark.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, state, name, part):
    path = saved(tmp_path / name, state)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_weights(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        bytes(999),
        b"\x80\x02.",
        b"\x80\x04.",
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_weights(path)


def test_a_damaged_file_is_read_or_refused(tmp_path):
    """Whatever a flipped byte leads the unpickler to, no other error comes out."""
    path = tmp_path / "a.bin"
    torch.save(
        {"state_dict": {"encoder.x": torch.ones(2)}}, path, _use_new_zipfile_serialization=False
    )
    data = path.read_bytes()
    for at in range(len(data)):
        for value in (0, 0x2E, 0x80, data[at] ^ 0xFF):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            with contextlib.suppress(CheckpointError):
                read_weights(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(1)], "no state dict but list"),
        (torch.ones(1), "no state dict but Tensor"),
        ({}, "no state dict but dict"),
        ({"epoch": 3}, "'epoch' of type int, expected tensors"),
        ({1: torch.ones(1)}, "1 of type Tensor, expected tensors"),
        ({"a": torch.ones(2).to_sparse()}, "expected plain floats"),
        ({"a": torch.ones(2) * 1j}, "expected plain floats"),
        ({"a": torch.ones(1)}, "neither a SegFormer nor a MobileNetV2: its tensors are a"),
    ],
)
def test_a_file_of_other_values_is_refused(tmp_path, content, expected):
    path = tmp_path / "a.bin"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read_weights(path)


def test_a_folder_prefers_safetensors(tmp_path, state):
    saved(tmp_path / "pytorch_model.bin", state)
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    saved(tmp_path / "model.safetensors", state)
    assert find_weights(tmp_path).name == "model.safetensors"


def test_places_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing, expected model"):
        find_weights(tmp_path)
    (tmp_path / "weights.h5").touch()
    with pytest.raises(CheckpointError, match=r"found weights\.h5, expected") as caught:
        find_weights(tmp_path)
    assert caught.value.hint == "name the weight file itself"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_weights(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"weights\.h5' is no weight file: it begins with b''"
    ):
        read_weights(tmp_path / "weights.h5")


def zipped(path, state, members):
    """A file as torch.save writes it, with more members, each (name, bytes, compression)."""
    torch.save(state, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name, data, method in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def peak_of(path):
    """Reads a file in a process that may take four GB of address space; its stderr."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from segcli.errors import CheckpointError\n"
        "from segcli.export.checkpoints import read_weights\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n    read_weights(Path(sys.argv[1]))\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["a.bin", "a.pth"])
def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, state, name):
    """Members that inflate to a thousand times their size, one of them a tensor's."""
    path = tmp_path / name
    bomb = (f"{path.stem}/data/999", bytes(300 << 20), zipfile.ZIP_DEFLATED)
    zipped(path, state, [bomb])
    assert path.stat().st_size < 2 << 20
    with pytest.raises(CheckpointError, match=r"claims 3\d{8} bytes of tensors, but the file has"):
        read_weights(path)


def test_a_zip_whose_directory_claims_hundreds_of_gigabytes(tmp_path, state):
    path = tmp_path / "a.pth"
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    # Both lengths of the last entry of the directory (APPNOTE.TXT 4.3.12), nearly 4 GB each.
    at = 0
    for _ in range(200):
        at = data.find(b"PK\x01\x02", at + 1)
        if at < 0:
            break
        data[at + 20 : at + 28] = b"\xf0\xff\xff\xff" * 2
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert sum(m.file_size for m in archive.infolist()) > 200e9
    assert "bytes of tensors, but the file has" in peak_of(path)


def test_one_value_that_is_repeated_a_million_million_times(tmp_path):
    endless = torch.ones(1).expand(1_000_000, 1_000_000)
    path = tmp_path / "a.bin"
    torch.save({"encoder.x": endless}, path)
    assert path.stat().st_size < 4096
    with pytest.raises(CheckpointError, match="claims 4000000000000 bytes of tensors"):
        read_weights(path)


def test_a_storage_that_is_shared_a_few_times_is_honest(tmp_path, state):
    name = "decode_head.classifier.weight"
    state = {**state, "tied": state[name]}
    assert torch.equal(read_weights(saved(tmp_path / "a.bin", state)).state["tied"], state[name])


def test_old_format_that_claims_more_than_it_has(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"encoder.x": torch.ones(77)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    # The pickled number of elements, as one byte, becomes one of four.
    assert data.count(b"K\x4d") >= 1
    path.write_bytes(data.replace(b"K\x4d", b"J\xff\xff\xff\x7f"))
    assert repr(str(path)) in peak_of(path)


def test_a_tensor_without_values_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"encoder.x": torch.empty(3, device="meta")}, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_weights(path)


def header(text, data=b"", length=None):
    raw = text.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


WRAPS = '{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[8,8]}'
TWO = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":%s}'


@pytest.mark.parametrize(
    "content",
    [
        header("{}", length=1 << 62),
        header("{}", length=99_999_999),
        header(TWO % '{"dtype":"F32","shape":[2],"data_offsets":[4,12]}', bytes(12)),
        header(TWO % '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', bytes(8)),
        header(TWO % '{"dtype":"F32","shape":[2],"data_offsets":[8,4]}', bytes(16)),
        header(TWO % '{"dtype":"F32","shape":[1000000000000],"data_offsets":[8,16]}', bytes(16)),
        header(TWO % WRAPS, bytes(8)),
        header("[" * 100_000),
    ],
    ids=["absurd", "long", "overlap", "same", "backwards", "claims", "wraps", "nested"],
)
def test_hostile_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_links_in_a_folder_are_followed_to_files_only(tmp_path, state):
    """The hub's cache is made of links, and a user may have some of his own."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    saved(elsewhere / "weights.safetensors", state)
    folder = tmp_path / "folder"
    folder.mkdir()
    link = folder / "model.safetensors"
    link.symlink_to("../elsewhere/weights.safetensors")
    same(read_weights(find_weights(folder)).state, state)
    for target in ("/dev/zero", "../elsewhere", "nowhere"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(CheckpointError, match="no weights in"):
            find_weights(folder)
    link.unlink()
    link.symlink_to("/etc/hostname" if Path("/etc/hostname").exists() else __file__)
    with pytest.raises(CheckpointError, match="is no weight file") as caught:
        read_weights(find_weights(folder))
    assert "\n" not in str(caught.value)
