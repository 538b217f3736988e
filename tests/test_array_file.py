import os
from pathlib import Path

import numpy as np
import pytest

from segcli.array_file import Rows
from segcli.errors import InferenceError, OutputError, OutputWriteError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(path, rows, names):
    with Rows(".") as kept:
        for row in rows:
            kept.add(row)
        kept.save(path, names)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4)])
def test_npy_is_the_rows(shape):
    rows = np.random.default_rng(0).standard_normal((7, *shape)).astype(np.float32)
    saved("x.npy", rows, [""] * 7)
    found = np.load("x.npy", mmap_mode="r")
    assert found.dtype == np.float32
    assert (found == rows).all()
    assert os.listdir(".") == ["x.npy"]  # noqa: PTH208


def test_npz_has_the_names():
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    saved("x.npz", rows, ["a.jpg", "ü/b c.jpg", "c\udce9.jpg"])
    with np.load("x.npz", allow_pickle=False) as found:
        assert (found["embeddings"] == rows).all()
        assert found["paths"].tolist() == ["a.jpg", "ü/b c.jpg", "c\udce9.jpg"]


def test_rows_that_are_not_contiguous():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    saved("x.npy", rows, [""] * 3)
    assert (np.load("x.npy") == rows).all()


def test_another_shape_is_refused_and_leaves_the_others():
    with Rows(".") as kept:
        kept.add(np.zeros(3, np.float32))
        with pytest.raises(InferenceError, match=r"shape \(4,\), those before have \(3,\)"):
            kept.add(np.zeros(4, np.float32))
        kept.save("x.npy", ["a"])
    assert np.load("x.npy").shape == (1, 3)


def test_nothing_is_there_before_it_is_saved():
    with Rows("out") as kept:
        kept.add(np.zeros(3, np.float32))
        assert not os.listdir("out")  # noqa: PTH208
    assert Path("out").is_dir()
    assert not os.listdir("out")  # noqa: PTH208


def test_no_place():
    Path("file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write into"):
        Rows("file")
    with Rows(".") as kept, pytest.raises(OutputWriteError):
        kept.save("file/x.npy", [])
