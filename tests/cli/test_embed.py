import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def features(tiny_model):
    """A model whose one output is its input."""
    path = tiny_model("f.onnx")
    model = onnx.load(path)
    model.graph.output[0].name = model.graph.node[0].output[0] = "stage_1"
    card = json.loads(model.metadata_props[0].value)
    card |= {"task": "features", "class_names": [], "palette": [], "output_names": ["stage_1"]}
    model.metadata_props[0].value = json.dumps(card)
    onnx.save(model, path)
    return path


@pytest.fixture
def embed(segcli, features):
    return lambda *args, **more: segcli("embed", "-m", features, *args, **more)


def mean(path):
    # The tiny model's preprocessing divides by 255.
    return np.asarray(Image.open(path), np.float64).mean((0, 1)) / 255


def test_rows_of_a_bucket(embed, picture, bucket):
    for i in range(3):
        bucket.put(f"in/{i}.png", picture(f"in/{i}.png", (8 + i, 6)).read_bytes())
    local = embed("in", "-o", "local.npy")
    remote = embed(bucket.url + "/in", "-o", "remote.npy")
    assert remote.out == "".join(f"{bucket.url}/{path}\n" for path in local.out.split())
    np.testing.assert_array_equal(np.load("remote.npy"), np.load("local.npy"))
    ran = embed("in", "-o", bucket.url + "/x.npy")
    assert (ran.code, "is a URL, expected a file on this machine" in ran.err) == (2, True)


def test_rows_and_their_paths(embed, picture):
    for i in range(5):
        picture(f"in/{i}.png", (8 + i, 6), 2 + i)
    ran = embed("in", "-o", "x.npy", "--workers", 3)
    assert (ran.code, ran.out) == (0, "".join(f"in/{i}.png\n" for i in range(5)))
    found = np.load("x.npy")
    assert found.shape == (5, 3)
    for row, path in zip(found, ran.out.splitlines(), strict=True):
        np.testing.assert_allclose(row, mean(path), atol=1e-6)
    embed("in", "-o", "x.npz")
    with np.load("x.npz") as archive:
        assert (archive["embeddings"] == found).all()
        assert archive["paths"].tolist() == ran.out.splitlines()


def test_records(embed, picture, check_record):
    picture("a.png")
    ran = embed("a.png", "none.png", "--jsonl")
    assert ran.code == 1
    ok, failed = (json.loads(line) for line in ran.out.splitlines())
    check_record(ok)
    check_record(failed)
    np.testing.assert_allclose(ok["embedding"], mean("a.png"), atol=1e-6)
    assert (ok["width"], ok["height"]) == (8, 6)
    ran = embed("a.png", "--jsonl", "-o", "x.npy")
    record = json.loads(ran.out)
    check_record(record)
    assert (record["outputs"], record["row"]) == (["x.npy"], 0)
    assert "embedding" not in record


def test_an_image_that_fails_has_no_row(embed, picture):
    picture("in/a.png"), picture("in/c.png")
    Path("in/b.png").write_bytes(b"damaged")
    ran = embed("in", "-o", "x.npy")
    assert (ran.code, ran.out) == (1, "in/a.png\nin/c.png\n")
    assert np.load("x.npy").shape == (2, 3)


def test_layers_as_they_are_want_one_size(embed, picture):
    picture("in/a.png", (8, 6)), picture("in/b.png", (9, 6))
    ran = embed("in", "-o", "x.npy", "--pool", "none")
    assert (ran.code, ran.out) == (1, "in/a.png\n")
    assert "features of shape (3, 6, 9), those before have (3, 6, 8)" in ran.err
    assert np.load("x.npy").shape == (1, 3, 6, 8)
    ran = embed("in", "-o", "y.npy", "--pool", "7x7", "--resize", "40x32")
    assert ran.code == 0
    assert np.load("y.npy").shape == (2, 3, 26, 34)


def test_nothing_to_write_writes_nothing(embed):
    Path("a.png").write_bytes(b"damaged")
    assert embed("a.png", "-o", "x.npy").code == 1
    assert not Path("x.npy").exists()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "nowhere to write to"),
        (["-o", "x.txt"], 2, "ends in .npy or .npz"),
        (["--jsonl", "--pool", "max"], 2, "is not mean, 7x7, none"),
        (["--jsonl", "--layer", "stage_9"], 2, "the model has no output 'stage_9', it has stage_1"),
        (["--jsonl", "--resize", "big"], 2, "--resize 'big'"),
        (["-o", "a.png/x.npy"], 5, "is not a folder"),
    ],
)
def test_usage(embed, picture, args, code, says):
    picture("a.png")
    ran = embed("a.png", *args)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err


def test_other_models_name_the_right_command(segcli, tiny_model, features, picture):
    picture("a.png")
    ran = segcli("embed", "a.png", "-m", tiny_model(), "--jsonl")
    assert (ran.code, "use 'segcli segment' with it" in ran.err) == (2, True)
    ran = segcli("segment", "a.png", "-m", features, "-o", "x.png")
    assert (ran.code, "use 'segcli embed' with it" in ran.err) == (2, True)
    assert segcli("embed", "a.png", "--jsonl").code == 2


def test_an_input_is_not_written_over(embed, picture):
    picture("a.npy.png").rename("a.npy")
    before = Path("a.npy").read_bytes()
    ran = embed("a.npy", "-o", "a.npy")
    assert (ran.code, ran.out) == (2, "")
    assert "is there and is not an array file" in ran.err
    assert Path("a.npy").read_bytes() == before
    picture("b.png")
    assert embed("b.png", "-o", "x.npy").code == 0
    assert embed("b.png", "-o", "x.npy").code == 0
