import hashlib
import json
import shutil
from pathlib import Path

import pytest

NEEDED = ("torch", "onnx", "onnxscript", "safetensors")

BLOCKER = """\
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """A checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


INT8 = ("segformer-b0", "-o", "x.onnx", "--precision", "int8", "--verify-images")


def nothing_written(folder="."):
    return not [p for p in Path(folder).rglob("*") if p.suffix in (".onnx", ".segcli-part")]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "x.onnx"], "one of the two"),
        (["segformer-b0", "--checkpoint", "dir", "-o", "x.onnx"], "one of the two"),
        (["segformer-b0"], "-o is missing"),
        (["segformer-b0", "-o", "x.pt"], "does not name a file that ends in .onnx"),
        (["segformer-b0", "-o", "folder.onnx"], "is a folder"),
        (["segformer-b0", "-o", "x.onnx", "--image-size", "512"], "HxW"),
        (["segformer-b0", "-o", "x.onnx", "--image-size", "0x512"], "HxW"),
        (["segformer-b0", "-o", "x.onnx", "--image-size", "31x64"], "at least 32"),
        (["segformer-b0", "-o", "x.onnx", "--weights", "int2"], "--weights"),
        (["segformer-b0", "-o", "x.onnx", "--task", "poetry"], "--task"),
        (["segformer-b0", "-o", "x.onnx", "--precision", "bf16"], "--precision"),
        (["segformer-b0", "-o", "x.onnx", "--precision", "int8"], "needs --verify-images"),
        (["segformer-b0", "-o", "x.onnx", "--verify-images", "a.png"], "go with --precision"),
        (["segformer-b0", "-o", "x.onnx", "--min-agreement", "0.5"], "go with --precision"),
        ([*INT8, "none.png"], "no such file or folder: 'none.png'"),
        ([*INT8, "folder.onnx"], "--verify-images: the folder 'folder.onnx' holds no image"),
        ([*INT8, "-"], "not stdin"),
        ([*INT8, "folder.onnx", "--min-agreement", "1.1"], "is not between 0 and 1"),
        ([*INT8, "folder.onnx", "--min-agreement", "nan"], "is not between 0 and 1"),
    ],
)
def test_usage(segcli, args, says):
    Path("folder.onnx").mkdir()
    ran = segcli("export", *args)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


@pytest.mark.parametrize("blocked", [NEEDED, ("onnxscript",)])
def test_without_the_extra(segcli_process, tmp_path, blocked):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKER.format(names=blocked))
    done = segcli_process("export", "segformer-b0", "-o", "x.onnx", PYTHONPATH=str(site))
    err = done.stderr.decode()
    assert (done.returncode, done.stdout) == (3, b"")
    assert err.startswith("segcli: error: ")
    assert ", ".join(blocked) in err
    assert "pip install 'segcli[export]'" in err
    assert "Traceback" not in err


@pytest.mark.export
class TestWithTorch:
    def test_success(self, segcli, tiny_checkpoint, picture):
        ran = segcli("export", "--checkpoint", tiny_checkpoint, "-o", "new/tiny.onnx")
        assert ran.code == 0
        path, digest, difference = ran.out.splitlines()
        assert path == "new/tiny.onnx"
        assert digest == f"sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
        assert difference.startswith("max difference to PyTorch ")
        assert float(difference.split()[4]) < 1e-4
        assert "licence cc-by-4.0" in ran.err
        ran = segcli("segment", "-m", path, picture(size_wh=(64, 48)), "-o", "out.png", "--jsonl")
        assert ran.code == 0
        assert json.loads(ran.out)["model"] == "tiny-segformer"

    def test_json(self, segcli, tiny_checkpoint):
        ran = segcli(
            *("export", "--checkpoint", tiny_checkpoint, "-o", "x.onnx", "--json", "-q"),
            *("--name", "own", "--license", "MIT", "--image-size", "64x96", "--weights", "fp16"),
        )
        assert (ran.code, ran.err) == (0, "")
        report = json.loads(ran.out)
        assert report["path"] == "x.onnx"
        assert report["bytes"] == Path("x.onnx").stat().st_size
        assert report["sha256"] == hashlib.sha256(Path("x.onnx").read_bytes()).hexdigest()
        assert report["parameters"] > 0
        card = report["card"]
        assert (card["name"], card["license"], card["storage"]) == ("own", "MIT", "fp16")
        assert card["preprocessing"]["size_hw"] == [64, 96]
        assert card["class_names"] == ["red", "green", "blue"]

    @pytest.mark.parametrize(("kind", "bound"), [("fp16", 0.995), ("int8", 0.98)])
    def test_lower_precision(self, segcli, tiny_checkpoint, picture, kind, bound):
        picture("photos/a.png", size_wh=(64, 48), split=32)
        picture("photos/b.png", size_wh=(96, 64), split=9)
        picture("photos/masks/b.png", size_wh=(96, 64))
        args = ("export", "--checkpoint", tiny_checkpoint, "--precision", kind)
        ran = segcli(*args, "--verify-images", "photos", "-o", "x.onnx")
        assert ran.code == 0
        assert f"{kind} agrees with fp32 by " in ran.err
        assert f"(required {bound}) on 2 images" in ran.err
        ran = segcli("models", "show", "x.onnx", "--json")
        card = json.loads(ran.out)["card"]
        assert card["precision"] == kind
        assert card["storage"] == {"fp16": "fp16", "int8": "fp32"}[kind]
        assert card["verification"]["max_rel_diff"] < 1e-4
        found = card["verification"]["precision"]
        assert (found["kind"], found["bound"], found["images"]) == (kind, bound, 2)
        assert bound <= found["lowest"] <= found["agreement"] <= 1
        ran = segcli("segment", "-m", "x.onnx", "photos/a.png", "-o", "out.png", "--jsonl")
        assert (ran.code, json.loads(ran.out)["width"]) == (0, 64)

    def test_too_little_agreement_writes_nothing(self, segcli, copy, picture):
        """Two classes whose logits differ by less than float16 tells apart."""
        from safetensors.torch import load_file, save_file

        state = load_file(copy / "model.safetensors")
        state["decode_head.classifier.weight"] *= 1e-3
        state["decode_head.classifier.bias"][:] = 1000
        save_file(state, copy / "model.safetensors")
        args = ("export", "--checkpoint", copy, "--precision", "fp16", "--image-size", "64x64")
        args = (*args, "--verify-images", picture(), "-o", "x.onnx")
        Path("x.onnx").write_text("before")
        ran = segcli(*args)
        assert (ran.code, ran.out) == (3, "")
        assert "the fp16 graph agrees with fp32 by 0" in ran.err
        assert "required is 0.995: nothing was written" in ran.err
        assert Path("x.onnx").read_text() == "before"
        assert segcli(*args, "--min-agreement", "0").code == 0

    def test_existing_file_is_replaced_whole(self, segcli, copy):
        Path("x.onnx").write_text("before")
        (copy / "config.json").write_text("{")
        assert segcli("export", "--checkpoint", copy, "-o", "x.onnx").code == 3
        assert Path("x.onnx").read_text() == "before"

    def test_missing_tensor(self, segcli, copy):
        from safetensors.torch import load_file, save_file

        state = load_file(copy / "model.safetensors")
        del state["decode_head.classifier.bias"]
        save_file(state, copy / "model.safetensors")
        ran = segcli("export", "--checkpoint", copy, "-o", "x.onnx")
        assert (ran.code, ran.out) == (3, "")
        assert "decode_head.classifier.bias" in ran.err
        assert nothing_written()

    def test_pickle_with_code_is_not_run(self, segcli, copy, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        (copy / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "weights.pth"):
            (copy / name).write_bytes(pickle.dumps({"segformer.x": Evil()}))
        for checkpoint in (copy, copy / "weights.pth"):
            ran = segcli("export", "--checkpoint", checkpoint, "-o", "x.onnx")
            assert ran.code == 3
            assert "Traceback" not in ran.err
        assert not Path("ran").exists()
        assert nothing_written()

    def test_damaged_weights(self, segcli, copy):
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
        ran = segcli("export", "--checkpoint", copy, "-o", "x.onnx")
        assert ran.code == 3
        assert nothing_written()

    def test_failed_verification_writes_nothing(self, segcli, tiny_checkpoint, monkeypatch):
        from segcli.export import verify

        monkeypatch.setattr(verify, "TOLERANCE", -1.0)
        args = ("export", "--checkpoint", tiny_checkpoint, "--image-size", "64x64")
        ran = segcli(*args, "-o", "x.onnx")
        assert (ran.code, ran.out) == (3, "")
        assert nothing_written()

    def test_place_that_cannot_be_written(self, segcli, tiny_checkpoint):
        Path("file").write_text("in the way")
        ran = segcli("export", "--checkpoint", tiny_checkpoint, "-o", "file/x.onnx")
        assert ran.code == 5
        assert "is not a folder" in ran.err

    @pytest.mark.parametrize("checkpoint", ["no/such/folder", "nothing here"])
    def test_no_checkpoint(self, segcli, checkpoint):
        ran = segcli("export", "--checkpoint", checkpoint, "-o", "x.onnx")
        assert ran.code == 3
        assert "no checkpoint at" in ran.err

    def test_labels_of_another_count(self, segcli, tiny_checkpoint):
        Path("names.txt").write_text("one\ntwo\n")
        ran = segcli(
            *("export", "--checkpoint", tiny_checkpoint, "-o", "x.onnx", "--labels", "names.txt")
        )
        assert ran.code == 3
        assert nothing_written()

    def test_embedded_has_no_checkpoint(self, segcli):
        ran = segcli("export", "segformer-b0-camvid", "-o", "x.onnx")
        assert ran.code == 3
        assert "part of the package" in ran.err

    def test_unknown_name(self, segcli):
        ran = segcli("export", "segformer-b9", "-o", "x.onnx")
        assert ran.code == 3
        assert "the nearest names are" in ran.err
