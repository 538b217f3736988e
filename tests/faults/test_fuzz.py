"""Damaged and hostile files: an answer or one line, and no other end."""

import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import segcli
from segcli.artifact import METADATA_KEY, Preprocessing

LINE = re.compile(rb"(segcli: |hint: )[^\n]*")


def few_and_many(few, many):
    return [
        pytest.param(few, id="few"),
        pytest.param(many, id="many", marks=pytest.mark.slow_chaos),
    ]


# Images


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole_images():
    """Returns (suffix, bytes) of every format and most of their kinds."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (21, 33, 3), np.uint8))
    smooth = Image.radial_gradient("L").resize((48, 40)).convert("RGB")
    grey, palette, alpha = rgb.convert("L"), rgb.quantize(16), rgb.convert("RGBA")
    deep = Image.fromarray(rng.integers(0, 65536, (9, 14), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = b"P3\n3 2\n255\n" + b" ".join(b"%d" % v for v in range(18)) + b"\n"
    return [
        *((".jpg", encoded(i, "JPEG")) for i in (rgb, smooth, grey, rgb.convert("CMYK"))),
        (".jpg", encoded(smooth, "JPEG", progressive=True, exif=exif, quality=60)),
        *(
            (".png", encoded(i, "PNG"))
            for i in (rgb, grey, palette, alpha, deep, rgb.convert("1"), grey.convert("LA"))
        ),
        (".png", encoded(palette, "PNG", transparency=3, exif=exif)),
        (".webp", encoded(smooth, "WEBP")),
        (".webp", encoded(alpha, "WEBP", lossless=True, exif=exif)),
        (".webp", encoded(rgb, "WEBP", save_all=True, append_images=[smooth.resize(rgb.size)])),
        *(
            (".tif", encoded(rgb, "TIFF", compression=c))
            for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        (".tif", encoded(rgb.convert("1"), "TIFF", compression="group4")),
        (".tif", encoded(deep, "TIFF", exif=exif)),
        *((".bmp", encoded(i, "BMP")) for i in (rgb, grey, palette, alpha, rgb.convert("1"))),
        (".gif", encoded(palette, "GIF", transparency=2)),
        (".gif", encoded(palette, "GIF", save_all=True, append_images=[grey.quantize(8)])),
        *((".ppm", encoded(i, "PPM")) for i in (rgb, grey, rgb.convert("1"), deep)),
        (".ppm", plain),
    ]


def mutated(data, other, rng):
    """Returns ``data`` with one to four pieces of damage, some of it from another file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 64))
        length = rng.choice((1, 2, 4, 16, 200))
        match rng.randrange(8):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del out[max(at, 1) :]
            case 3:
                start = rng.randrange(len(other))
                out[at : at + length] = other[start : start + length]
            case 4:
                del out[at : at + length]
                out = out or bytearray(data)
            case 5:
                out[at:at] = out[at : at + length] * rng.choice((1, 3, 50))
            case 6:
                # Where formats keep lengths, counts, offsets and sizes.
                value = rng.choice((0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 28))
                order = rng.choice("<>")
                piece = struct.pack(order + ("H" if value < 1 << 16 else "I"), value)
                out[at : at + len(piece)] = piece
            case 7:
                start = rng.randrange(len(other))
                out = out[:at] + other[start:] or out
    if bytes(out[:4]) == b"\x89PNG" and rng.random() < 0.6:
        out = with_checksums(out)
    return bytes(out)


def with_checksums(data):
    """Returns a damaged PNG whose chunks claim to be sound, so that a decoder reads them."""
    at = 8
    while at + 12 <= len(data):
        [length] = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


@pytest.mark.parametrize(
    ("count", "limit"),
    [
        pytest.param(400, ("--max-pixels", "4000000"), id="few"),
        pytest.param(5000, (), id="many", marks=pytest.mark.slow_chaos),
    ],
)
def test_damaged_images(segcli_process, tiny_model, check_record, count, limit):
    rng = random.Random(count)
    seeds = whole_images()
    model = tiny_model(preprocessing=Preprocessing(resize="squash", size_hw=(64, 64)))
    seen = Counter()
    for first in range(0, count, 1000):
        folder = Path(f"in{first}")
        folder.mkdir()
        for i in range(first, min(first + 1000, count)):
            suffix, data = seeds[i % len(seeds)]
            Path(folder, f"{i:05}{suffix}").write_bytes(
                mutated(data, rng.choice(seeds)[1], rng) if i >= len(seeds) else data
            )
        options = ("--ext", "gif", "--ext", "ppm", "--jsonl", "-v", *limit)
        done = segcli_process("segment", folder, "-m", model, "-o", f"out{first}", *options)
        assert done.returncode in (0, 1), (folder, done.returncode, done.stderr[-3000:])
        assert b"Traceback" not in done.stderr
        names = sorted(os.fsencode(p) for p in folder.iterdir())
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [os.fsencode(r["path"]) for r in found] == names
        for number, record in enumerate(found, first):
            check_record(record)
            if record["status"] == "error":
                assert record["error"]["code"] in ("decode", "too_large")
                assert repr(record["path"]) in record["error"]["message"]
                assert "\n" not in record["error"]["message"]
                assert number >= len(seeds), record
            else:
                with Image.open(record["outputs"][0]) as mask:
                    assert mask.size == (record["width"], record["height"])
            seen[Path(record["path"]).suffix, record.get("error", {}).get("code", "ok")] += 1
        written = {Path(r["outputs"][0]).name for r in found if r["status"] == "ok"}
        assert {p.name for p in Path(f"out{first}").iterdir()} == written
    print(dict(sorted(seen.items())))
    assert {code for _, code in seen} >= {"ok", "decode", "too_large"}


# Models

# Imports everything once and forks for each file: a process of its own for 20 ms instead of 500.
FORKS = """
import json, os, resource, signal, sys
from segcli.cli.app import run
import segcli.cli.segment, segcli.pipeline, segcli.model, segcli.session

for line in sys.stdin:
    args, folder, environment = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.update(environment)
        # A graph may ask for terabytes; and what does not end is ended, as -14.
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        signal.alarm(60)
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(null, 0), os.dup2(null, 1), os.dup2(said, 2)
        os._exit(run(args))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def outcome(forks, tmp_path):
    """Runs a command line in a process of its own and returns its exit code and stderr."""

    def call(*args):
        own = {k: v for k, v in os.environ.items() if k.startswith("SEGCLI_")}
        forks.stdin.write(json.dumps([[str(a) for a in args], str(tmp_path), own]) + "\n")
        forks.stdin.flush()
        return int(forks.stdout.readline()), Path("said").read_bytes()

    return call


@pytest.fixture
def judge(outcome, picture):
    """Shows and runs a model file and returns the two exit codes; fails on any other end."""
    picture("a.png", (48, 40), 20)

    def call(path):
        codes = []
        for args in (("models", "show", path), ("segment", "-m", path, "a.png", "-o", "o.png")):
            code, said = outcome(*args)
            where = (args, code, said[-3000:])
            assert code in (0, 1, 2, 3), where
            assert b"Traceback" not in said, where
            # A model that loads may still fail on an image, and a classifier is for classify.
            assert (code in (0, 3)) or args[0] == "segment", where
            assert code != 1 or re.search(rb"error: (.*: )?the model'?s? ", said), where
            assert code != 2 or b"segcli classify" in said or b"segcli embed" in said, where
            codes.append(code)
        return tuple(codes)

    return call


def damaged(data, other, structure, rng):
    """Returns a damaged model; ``structure`` are the ranges that are not weights."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        low, high = rng.choice(structure) if rng.random() < 0.8 else (0, len(out))
        at = min(rng.randrange(low, high), len(out) - 1)
        length = rng.choice((1, 4, 32, 400))
        match rng.randrange(8):
            case 0 | 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                # Length prefixes, dimensions and enums are varints.
                out[at : at + 1] = rng.choice(
                    (b"\x00", b"\x7f", b"\xff\x01", b"\xff" * 9 + b"\x01")
                )
            case 3:
                del out[at:]
                out = out or bytearray(b"\x08")
            case 4:
                start = rng.randrange(len(other))
                out[at : at + length] = other[start : start + length]
            case 5:
                del out[at : at + length]
                out = out or bytearray(b"\x08")
            case 6:
                out[at:at] = out[at : at + length]
            case 7:
                out[at] = rng.randrange(256)
    return bytes(out)


def structure_of(data):
    """Returns the ranges of a model file that lie between its large tensors."""
    weights = sorted(
        (data.find(t.raw_data), len(t.raw_data))
        for t in onnx.load_from_string(data).graph.initializer
        if len(t.raw_data) > 256
    )
    edges = [0, *(edge for at, n in weights if at > 0 for edge in (at, at + n)), len(data)]
    return [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high]


@pytest.mark.parametrize("count", few_and_many(40, 1000))
def test_damaged_models(judge, tiny_model, count):
    rng = random.Random(count)
    embedded = Path(segcli.__file__).parent / "data" / "segformer-b0-camvid.onnx"
    seeds = [p.read_bytes() for p in (tiny_model(), tiny_model("c.onnx", **CLASSIFIER), embedded)]
    ranges = [structure_of(data) for data in seeds]
    seen = Counter()
    for i in range(count):
        which = rng.choice((0, 0, 1, 2, 2, 2)) if count > 100 else rng.choice((0, 0, 0, 0, 1, 2))
        path = Path(f"{i}.onnx")
        path.write_bytes(damaged(seeds[which], rng.choice(seeds), ranges[which], rng))
        seen[("tiny", "classifier", "embedded")[which], *judge(path)] += 1
        # Left behind where it is at fault.
        path.unlink()
    print(dict(sorted(seen.items())))
    assert sum(n for (_, show, _), n in seen.items() if show == 3)


CLASSIFIER = {"task": "classification", "palette": ()}


@pytest.mark.parametrize("count", few_and_many(30, 600))
def test_damaged_cards(judge, tiny_model, make_card, count):
    """JSON that parses, and says something else."""
    rng = random.Random(count)
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "x" * 5000,
        [],
        [[]],
        {},
        [1, 2],
        "\u202e\x1b[31m",
    ]
    seen = Counter()
    for i in range(count):
        card = make_card().to_dict()
        place = card["preprocessing"] if rng.random() < 0.4 else card
        key = rng.choice(list(place))
        if rng.random() < 0.2:
            del place[key]
        elif isinstance(place[key], list | tuple) and place[key] and rng.random() < 0.5:
            entries = list(place[key])
            entries[rng.randrange(len(entries))] = rng.choice(values)
            place[key] = entries
        else:
            place[key] = rng.choice(values)
        path = tiny_model(f"card{i}.onnx")
        with_metadata(path, json.dumps(card))
        seen[judge(path)] += 1
        path.unlink()
    print(dict(sorted(seen.items())))
    assert seen[3, 3] > count // 3


def with_metadata(path, text):
    model = onnx.load(path)
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=text)
    onnx.save(model, path)


HUGE = 1 << 40


def _outside(model):
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../etc/passwd")
    weight.ClearField("raw_data")
    model.graph.initializer.append(weight)


def _through(*nodes, **constants):
    """Returns what puts nodes between the input ``pixel_values`` and ``logits``."""

    def change(model):
        del model.graph.node[:]
        model.graph.node.extend(helper.make_node(*node[:3], **dict(node[3:])) for node in nodes)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
        )

    return change


def _weight(*dims):
    def change(model):
        model.graph.initializer.add(
            name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 8
        )
        del model.graph.node[:]
        model.graph.node.append(helper.make_node("Add", ["pixel_values", "w"], ["logits"]))

    return change


def _dims(which, *dims):
    def change(model):
        shape = getattr(model.graph, which)[0].type.tensor_type.shape
        for dim, value in zip(shape.dim, dims, strict=True):
            dim.dim_value = value

    return change


def _nested(model):
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["y"])], "g", [], [])
    for _ in range(28):
        # One branch: two would double it at each level.
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    model.graph.node.extend(graph.node)


def _kind(which, kind):
    def change(model):
        getattr(model.graph, which)[0].type.tensor_type.elem_type = kind

    return change


HOSTILE = {
    "input of 2^40 rows": _dims("input", 1, 3, HUGE, HUGE),
    "input of negative size": _dims("input", 1, 3, -1, -7),
    "input of no rows": _dims("input", 1, 3, 0, 0),
    "input of five channels": _dims("input", 1, 5, 32, 32),
    "input of bytes": _kind("input", TensorProto.UINT8),
    "input of strings": _kind("input", TensorProto.STRING),
    "output of 2^40 classes": _dims("output", 1, HUGE, 32, 32),
    "output of negative size": _dims("output", 1, -3, -1, -1),
    "output of strings": _kind("output", TensorProto.STRING),
    "weight of 2^40": _weight(HUGE, HUGE),
    "weight of 2^62 x 8": _weight(1 << 62, 8),
    "weight of negative size": _weight(-1, -2),
    "weight of no size": _weight(0, 3),
    "weight with too few bytes": _weight(3, 100, 100),
    "weights elsewhere": _outside,
    "graphs in graphs": _nested,
    "a constant of 2^40": _through(
        ("ConstantOfShape", ["s"], ["big"]),
        ("ReduceSum", ["big"], ["sum"]),
        ("Add", ["pixel_values", "sum"], ["logits"]),
        s=np.array([HUGE], np.int64),
    ),
    "expanded to 2^40": _through(
        ("Expand", ["pixel_values", "s"], ["logits"]), s=np.array([HUGE, 3, 1, 1], np.int64)
    ),
    "tiled 2^40 times": _through(
        ("Tile", ["pixel_values", "s"], ["logits"]), s=np.array([1, 1, HUGE, 1], np.int64)
    ),
    "tiled -1 times": _through(
        ("Tile", ["pixel_values", "s"], ["logits"]), s=np.array([1, 1, -1, 1], np.int64)
    ),
    "padded by 2^40": _through(
        ("Pad", ["pixel_values", "s"], ["logits"]),
        s=np.array([0, 0, 0, 0, 0, 0, HUGE, 0], np.int64),
    ),
    "padded by -2^40": _through(
        ("Pad", ["pixel_values", "s"], ["logits"]),
        s=np.array([0, 0, 0, 0, 0, 0, -HUGE, 0], np.int64),
    ),
    "resized by 1e9": _through(
        ("Resize", ["pixel_values", "", "s"], ["logits"]), s=np.array([1, 1, 1e9, 1e9], np.float32)
    ),
    "reshaped to what does not fit": _through(
        ("Reshape", ["pixel_values", "s"], ["logits"]), s=np.array([1, 3, 7, 11], np.int64)
    ),
    "gathered from far outside": _through(
        ("Gather", ["pixel_values", "s"], ["logits"], ("axis", 1)),
        s=np.array([0, HUGE, -HUGE], np.int64),
    ),
    "logits that are not finite": _through(
        ("Log", ["pixel_values"], ["log"]),
        ("Log", ["log"], ["logits"]),
    ),
    "logits of one pixel": _through(("GlobalMaxPool", ["pixel_values"], ["logits"])),
    "logits of no pixel": _through(
        ("Slice", ["pixel_values", "a", "b", "axis"], ["logits"]),
        a=np.array([5]),
        b=np.array([5]),
        axis=np.array([2]),
    ),
    "logits of two axes": _through(
        ("ReduceMean", ["pixel_values", "axes"], ["logits"], ("keepdims", 0)), axes=np.array([2, 3])
    ),
    "fewer channels than classes": _through(
        ("ReduceMean", ["pixel_values", "axes"], ["logits"]), axes=np.array([1])
    ),
    "an operator nobody knows": _through(("Nonesuch", ["pixel_values"], ["logits"])),
    "a graph without an output": lambda model: model.graph.ClearField("output"),
    "a graph without an input": lambda model: model.graph.ClearField("input"),
    "a graph without a node": lambda model: model.graph.ClearField("node"),
    "no graph": lambda model: model.ClearField("graph"),
    "an opset from far ahead": lambda model: setattr(model.opset_import[0], "version", 10**6),
    "a negative opset": lambda model: setattr(model.opset_import[0], "version", -5),
    "a format from far ahead": lambda model: setattr(model, "ir_version", 10**9),
    "no card": lambda model: model.ClearField("metadata_props"),
}


# ONNX Runtime takes declared sizes for a remark, and a negative one for any.
HARMLESS = {
    "input of negative size",
    "input of no rows",
    "output of 2^40 classes",
    "output of negative size",
    "weight of no size",
    "logits of one pixel",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_models(judge, tiny_model, name, outcome):
    path = tiny_model()
    model = onnx.load(path)
    HOSTILE[name](model)
    path.write_bytes(model.SerializeToString())
    shown, ran = judge(path)
    assert ran in (1, 3) or (ran == 0 and name in HARMLESS)
    if name in ("no card", "no graph", "weights elsewhere", "graphs in graphs"):
        assert (shown, ran) == (3, 3)


def test_a_name_in_the_graph_that_is_not_text(outcome, picture, tiny_model):
    """ONNX Runtime prints a banner of its own and tries again, unless told not to."""
    path = tiny_model()
    data = path.read_bytes()
    at = data.index(b"Identity")
    path.write_bytes(data[:at] + b"\xc8" + data[at + 1 :])
    code, said = outcome("segment", "-m", path, picture(), "-o", "o.png")
    assert code == 3
    assert [line for line in said.splitlines() if not LINE.fullmatch(line)] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", b"not readable JSON"),
        ("[" * 100_000, b"not readable JSON"),
        ("null", b"not readable JSON"),
        ('{"schema": 99}', b"has schema 99, this segcli reads 1"),
        ('{"schema": 1}', b"is not valid"),
        ('{"schema": NaN}', b"has schema nan"),
        ("9" * 10_000, b"not readable JSON"),
    ],
    ids=range(7),
)
def test_hostile_cards(judge, outcome, tiny_model, text, says):
    path = tiny_model()
    with_metadata(path, text)
    assert judge(path) == (3, 3)
    assert says in outcome("models", "show", path)[1]


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\x08", b"no model\n" * 99, b"\xff" * 4096, b"PK\3\4"]
)
def test_what_is_no_model(judge, data):
    path = Path("x.onnx")
    path.write_bytes(data)
    assert judge(path) == (3, 3)


def test_a_folder_for_a_model(judge):
    Path("x.onnx").mkdir()
    assert judge(Path("x.onnx")) == (3, 3)
