"""The README's table of bad input, row by row: what is written there is what happens."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from segcli.onnx_file import seal

README = Path(__file__).resolve().parents[2] / "README.md"


class Row(NamedTuple):
    """One row: the exit code, the record's error code or "", and a part of the message."""

    exit_code: int
    code: str
    says: str


def table() -> dict[str, Row]:
    section = README.read_text("utf-8").partition("## Bad input")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line[:2] == "| "]
    cells = [[cell.strip() for cell in row] for row in rows[1:]]
    return {name: Row(int(code), c.strip("`"), says.strip("`")) for name, code, c, says in cells}


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-60])
    return path


def photo(name: str, kind: str = "JPEG", mode: str = "RGB") -> Path:
    noise = Image.effect_noise((60, 40), 60)
    noise.convert(mode).save(name, kind)
    return Path(name)


def damaged_png(name: str) -> Path:
    path = photo(name, "PNG")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    return path


def changed(model: Path, change) -> Path:
    proto = onnx.load(model)
    change(proto)
    model.write_bytes(proto.SerializeToString())
    return model


def newer(proto) -> None:
    entry = next(p for p in proto.metadata_props if '"schema":' in p.value or p.key == "segcli")
    entry.value = re.sub(r'"schema": ?\d+', '"schema": 99', entry.value)


def outside(proto) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    proto.graph.initializer.append(tensor)


def flipped(model: Path) -> Path:
    data = bytearray(seal(model.read_bytes()))
    data[40] ^= 1
    model.write_bytes(data)
    return model


def written(path: str, data: bytes | str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def existing(path: str) -> str:
    return written(path, "here before")


OUT = ("-o", "out/")
# What the table calls it: the command line after ``segcli segment -m MODEL``, from the fixtures.
CASES = {
    "a file of zero bytes": lambda f: [written("a.jpg", b""), *OUT],
    "a JPEG that is cut short": lambda f: [cut(photo("a.jpg")), *OUT],
    "a PNG that is cut short": lambda f: [cut(photo("a.png", "PNG")), *OUT],
    "a PNG with a wrong byte": lambda f: [damaged_png("a.png"), *OUT],
    "text with the name of an image": lambda f: [written("a.jpg", "no image"), *OUT],
    "a JPEG with the suffix of a PNG": lambda f: [photo("a.png"), *OUT],
    "a suffix that no image has": lambda f: [photo("a.download"), *OUT],
    "a name that is not UTF-8": lambda f: [photo("caf\udce9.jpg"), *OUT],
    "32-bit or floating-point samples": lambda f: [photo("a.tif", "TIFF", "F"), *OUT],
    "more pixels than `--max-pixels`": lambda f: [photo("a.jpg"), "--max-pixels", 2399, *OUT],
    "one of several inputs is missing": lambda f: [f.picture("b.png"), "none.jpg", *OUT],
    "none of the inputs exists": lambda f: ["none.jpg", "no.png", *OUT],
    "a folder without images": lambda f: [Path(written("in/x.txt", "")).parent, *OUT],
    "images only in subfolders, without `-r`": lambda f: [f.picture("in/b/a.png").parents[1], *OUT],
    "nothing on stdin": lambda f: ["-", *OUT],
    "a list that names nothing": lambda f: ["--files-from", written("list", ""), *OUT],
    "a list in UTF-16": lambda f: [
        "--files-from",
        written("list", f"{f.picture('a.png')}\n".encode("utf-16")),
        *OUT,
    ],
    "an empty line in a list": lambda f: ["--files-from", written("list", "\n"), *OUT],
    "a folder in a list": lambda f: [
        "--files-from",
        written("list", f"{f.picture('d/a.png').parent}\n"),
        *OUT,
    ],
    "two inputs with one output": lambda f: [f.picture("a.png"), f.picture("b/a.png"), *OUT],
    "two entries of a list with one output": lambda f: [
        *("--files-from", written("list", f"{f.picture('a.png')}\n{f.picture('b/a.png')}\n")),
        *OUT,
    ],
    "the output is the input": lambda f: [f.picture("a.png"), "-o", "a.png"],
    "an output that exists, with `--no-clobber`": lambda f: [
        f.picture("a.png"),
        *("-o", existing("x.png"), "--no-clobber"),
    ],
    "no space left": lambda f: [f.picture("a.png"), "-o", "full.png"],
    "an output folder below a file": lambda f: [f.picture("a.png"), "-o", existing("x") + "/y/"],
    "a class that the model does not have": lambda f: [
        f.picture("a.png"),
        *("--classes", "sky,zebra", *OUT),
    ],
    "a model name that nobody knows": lambda f: [f.picture("a.png"), "-m", "segformer-b9", *OUT],
    "a model file that is damaged": lambda f: [f.picture("a.png"), "-m", flipped(f.model()), *OUT],
    "an .onnx that segcli did not write": lambda f: [
        f.picture("a.png"),
        *("-m", f.model(with_card=False), *OUT),
    ],
    "a model file of a newer segcli": lambda f: [
        f.picture("a.png"),
        *("-m", changed(f.model(), newer), *OUT),
    ],
    "an .onnx with weights in another file": lambda f: [
        f.picture("a.png"),
        *("-m", changed(f.model(), outside), *OUT),
    ],
    "a classifier": lambda f: [
        f.picture("a.png"),
        *("-m", f.model(task="classification", palette=()), *OUT),
    ],
    "a device that is not here": lambda f: [f.picture("a.png"), "--device", "cuda:x", *OUT],
}


class Fixtures(NamedTuple):
    picture: object
    model: object


@pytest.fixture
def fixtures(picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full.png").symlink_to("/dev/full")
    return Fixtures(picture, lambda **card: tiny_model("other.onnx", **card))


def test_every_row_is_tested():
    assert set(table()) == set(CASES)


@pytest.mark.parametrize("row", CASES)
def test_row(row, segcli, tiny_model, fixtures):
    if row == "no space left" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    expected, args = table()[row], CASES[row](fixtures)
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and not p.is_symlink()}
    ran = segcli("segment", "-m", tiny_model(), *args, "--jsonl")
    assert ran.code == expected.exit_code
    records = [json.loads(line) for line in ran.out.splitlines()]
    errors = [r["error"] for r in records if r["status"] == "error"]
    assert [e["code"] for e in errors] == [expected.code] * bool(expected.code)
    assert expected.says in ran.err
    assert "Traceback" not in ran.err
    assert bool(ran.err) == bool(expected.exit_code) or len(records) > 1
    # Whatever happened, nothing that was there has changed and nothing is half there.
    for path, data in before.items():
        assert path.read_bytes() == data
    assert not list(Path().rglob("*.segcli-part"))
    for path in Path().rglob("out/*.png"):
        with Image.open(path) as image:
            image.load()
