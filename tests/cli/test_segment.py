import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

RED, GREEN, BLUE = range(3)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(tiny_model):
    return tiny_model()


@pytest.fixture
def seg(segcli, tiny):
    """``segcli segment`` with the tiny model, in this process."""
    return lambda *args, **more: segcli("segment", "-m", tiny, *args, **more)


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def listing(folder="."):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def no_parts(folder="."):
    return not [p for p in Path(folder).rglob("*.segcli-part")]


# Models


def test_default_model_is_embedded(segcli, picture):
    ran = segcli("segment", picture(size_wh=(64, 48)), "-o", "out.png", "--offline")
    assert (ran.code, ran.out, ran.err) == (0, "out.png\n", "")
    with Image.open("out.png") as mask:
        assert (mask.mode, mask.size) == ("P", (64, 48))


def test_unknown_model_lists_three(segcli, picture):
    ran = segcli("segment", picture(), "-m", "segfromer-b2", "-o", "out.png")
    assert ran.code == 3
    first = ran.err.splitlines()[0]
    assert first.startswith("segcli: error: unknown model 'segfromer-b2'; the nearest names are ")
    assert len(first.partition(" are ")[2].split(", ")) == 3
    assert "segformer-b2" in first


def test_model_file_that_is_missing(segcli, picture):
    ran = segcli("segment", picture(), "-m", "none.onnx", "-o", "out.png")
    assert ran.code == 3
    assert "no model file at 'none.onnx'" in ran.err


def test_onnx_without_card(segcli, picture, tiny_model):
    ran = segcli("segment", picture(), "-m", tiny_model(with_card=False), "-o", "out.png")
    assert ran.code == 3
    assert "carries no ModelCard" in ran.err
    assert not Path("out.png").exists()


def test_classifier_names_the_right_command(segcli, picture, tiny_model):
    model = tiny_model(task="classification", palette=())
    ran = segcli("segment", picture(), "-m", model, "-o", "out.png")
    assert ran.code == 2
    assert "segcli classify" in ran.err


def test_classifier_by_name_is_refused_before_it_is_fetched(segcli, picture):
    ran = segcli("segment", picture(), "-m", "mobilenet-v2", "-o", "out.png", "--offline")
    assert ran.code == 2
    assert "segcli classify" in ran.err


def test_name_that_is_not_here_offline(segcli, picture):
    ran = segcli("segment", picture(), "-m", "segformer-b0", "-o", "out.png", "--offline")
    assert ran.code == 3
    assert "not on this machine" in ran.err


def test_model_from_the_environment(segcli, picture, tiny, monkeypatch):
    monkeypatch.setenv("SEGCLI_MODEL", str(tiny))
    ran = segcli("segment", picture(), "-o", "out.png", "--jsonl")
    assert records(ran.out)[0]["model"] == "tiny"


def test_device_that_is_not_here(seg, picture):
    from segcli.errors import DeviceError
    from segcli.selfcheck import run

    try:
        run("cuda")
    except DeviceError:
        ran = seg(picture(), "-o", "out.png", "--device", "cuda")
        assert ran.code == 4
        assert "cuda" in ran.err.lower()
        assert not Path("out.png").exists()
    else:
        pytest.skip("CUDA works here")


def test_device_that_nobody_has(seg, picture):
    ran = seg(picture(), "-o", "out.png", "--device", "quantum")
    assert ran.code == 4
    assert "'quantum' is not available" in ran.err


# Masks


def test_mask_is_palette_with_the_class_id_as_value(seg, picture):
    assert seg(picture(size_wh=(9, 6), split=4), "-o", "out.png").code == 0
    with Image.open("out.png") as mask:
        assert mask.mode == "P"
        assert mask.info["Software"].startswith("segcli ")
        assert mask.getpalette()[:9] == [200, 0, 0, 0, 200, 0, 0, 0, 200]
        pixels = np.asarray(mask)
    assert pixels.shape == (6, 9)
    assert (pixels[:, :4] == RED).all()
    assert (pixels[:, 4:] == BLUE).all()


def test_mask_has_the_size_after_orientation(seg, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to see it upright
    with Image.open(picture("flat.png", (8, 6), 4)) as image:
        image.save("turned.png", exif=exif)
    assert seg("turned.png", "-o", "out.png", "--jsonl").code == 0
    with Image.open("out.png") as mask:
        assert mask.size == (6, 8)
        pixels = np.asarray(mask)
    assert (pixels[:4] == RED).all()
    assert (pixels[4:] == BLUE).all()


def test_more_than_256_classes_give_16_bit(segcli, tiny_model, picture):
    names = tuple(f"c{i}" for i in range(300))
    path = tiny_model("many.onnx", class_names=names, palette=((1, 2, 3),) * 300)
    model = onnx.load(path)
    # 297 classes below every colour, then the three channels.
    low = onnx.numpy_helper.from_array(np.full((297, 3, 1, 1), -1, np.float32))
    same = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32)[:, :, None, None])
    weights = np.concatenate([onnx.numpy_helper.to_array(t) for t in (low, same)])
    del model.graph.node[:]
    model.graph.node.append(onnx.helper.make_node("Conv", ["pixel_values", "w"], ["logits"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 300
    onnx.save(model, path)
    ran = segcli("segment", "-m", path, picture(), "-o", "out.png", "--jsonl")
    assert ran.code == 0
    with Image.open("out.png") as mask:
        assert mask.mode.startswith("I")
        assert np.unique(np.asarray(mask)).tolist() == [297, 299]
    assert {c["class_id"] for c in records(ran.out)[0]["classes"]} == {297, 299}
    segcli("segment", "-m", path, picture(), "-o", "out.png", "--classes", "c297")
    with Image.open("out.png") as mask:
        assert np.unique(np.asarray(mask)).tolist() == [297, 65535]


def test_classes_keeps_only_those(seg, picture):
    ran = seg(picture(), "-o", "out.png", "--classes", "Blue,1", "--jsonl")
    assert [c["name"] for c in records(ran.out)[0]["classes"]] == ["blue"]
    with Image.open("out.png") as mask:
        assert np.unique(np.asarray(mask)).tolist() == [BLUE, 255]


@pytest.mark.parametrize(("text", "says"), [("purple", "the nearest are"), (" ,", "is empty")])
def test_classes_that_are_not_there(seg, picture, text, says):
    ran = seg(picture(), "-o", "out.png", "--classes", text)
    assert ran.code == 2
    assert says in ran.err


@pytest.mark.parametrize("opacity", ["-0.1", "1.5", "x"])
def test_opacity_out_of_range(seg, picture, opacity):
    ran = seg(picture(), "-o", "out.jpg", "-f", "overlay", f"--opacity={opacity}")
    assert ran.code == 2


def test_opacity_blends(seg, picture):
    for opacity, expected in (("0", (255, 0, 0)), ("1", (200, 0, 0))):
        assert seg(picture(), "-o", "o.png", "-f", "overlay", "--opacity", opacity).code == 0
        with Image.open("o.png") as image:
            assert image.getpixel((0, 0)) == expected


def test_legend_is_added_beside_the_picture(seg, picture):
    image = picture(size_wh=(64, 64), split=20)
    seg(image, "-o", "plain.png", "-f", "color")
    seg(image, "-o", "legend.png", "-f", "color", "--legend")
    with Image.open("plain.png") as plain, Image.open("legend.png") as legend:
        assert legend.width > plain.width
        assert legend.crop((0, 0, 64, 64)).tobytes() == plain.tobytes()


# Names


@pytest.mark.parametrize(
    ("format_", "bare", "below"),
    [
        ("mask", "a.mask.png", "out/a.png"),
        ("color", "a.color.png", "out/a.color.png"),
        ("overlay", "a.overlay.jpg", "out/a.overlay.jpg"),
    ],
)
def test_names(seg, picture, format_, bare, below):
    image = picture()
    ran = seg(image, "-f", format_)
    assert (ran.code, ran.out) == (0, f"{bare}\n")
    ran = seg(image, "-f", format_, "-o", "out/")
    assert (ran.code, ran.out) == (0, f"{below}\n")
    assert Path(bare).is_file()
    assert Path(below).is_file()


def test_two_formats(seg, picture):
    ran = seg(picture(), "-o", "out/", "-f", "mask", "-f", "overlay", "-f", "mask")
    assert ran.out.splitlines() == ["out/a.png", "out/a.overlay.jpg"]
    assert listing("out") == ["a.overlay.jpg", "a.png"]


def test_two_formats_into_one_file(seg, picture):
    assert seg(picture(), "-o", "x.png", "-f", "mask", "-f", "color").code == 2
    assert seg(picture(), "-o", "-", "-f", "mask", "-f", "color").code == 2


def test_several_inputs_into_one_file(seg, picture):
    ran = seg(picture("a.png"), picture("b.png"), "-o", "x.png")
    assert ran.code == 2
    assert "-o FOLDER/" in ran.err


# Streams


def test_stdout(segcli_process, picture, tiny):
    done = segcli_process("segment", "-m", tiny, picture(), "-o", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    Path("out.png").write_bytes(done.stdout)
    with Image.open("out.png") as mask:
        assert mask.mode == "P"
    assert listing() == ["a.png", "out.png", "tiny.onnx"]


def test_image_is_not_written_to_a_terminal(command, picture, tiny):
    main, other = pty.openpty()
    try:
        done = subprocess.run(
            [*command, "segment", "-m", str(tiny), str(picture()), "-o", "-"],
            stdout=other,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(other)
        os.close(main)
    assert done.returncode == 2
    assert b"stdout is a terminal" in done.stderr


def test_table_on_a_terminal(command, picture, tiny):
    main, other = pty.openpty()
    try:
        subprocess.run(
            [*command, "segment", "-m", str(tiny), str(picture()), "-o", "x.png"],
            stdout=other,
            stderr=subprocess.PIPE,
            timeout=60,
            check=True,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        )
        shown = os.read(main, 4096).decode()
    finally:
        os.close(other)
        os.close(main)
    assert "-> x.png" in shown
    assert "red   50.0%" in shown
    assert "blue  50.0%" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("flag", ["--json", "--jsonl"])
def test_stdout_is_wanted_twice(seg, picture, flag):
    ran = seg(picture(), "-o", "-", flag)
    assert (ran.code, ran.out) == (2, "")


def test_stdin(seg, picture):
    data = picture().read_bytes()
    ran = seg("-", "-o", "out.png", "--jsonl", stdin=data)
    assert ran.code == 0
    assert records(ran.out)[0]["path"] == "-"
    assert Path("out.png").is_file()
    assert seg("-", "-o", "in/", stdin=data).out == "in/stdin.png\n"
    assert seg("-", stdin=data).code == 2


def test_stdin_of_nothing(seg):
    ran = seg("-", "-o", "out.png", stdin=b"")
    assert ran.code == 1
    assert not Path("out.png").exists()


def test_pipe_through(segcli_process, picture, tiny):
    done = segcli_process("segment", "-m", tiny, "-", "-o", "-", stdin=picture().read_bytes())
    assert done.returncode == 0
    assert done.stdout.startswith(b"\x89PNG")


# Folders and lists


@pytest.fixture
def tree(picture):
    for name in ("in/b.png", "in/a.jpg", "in/sub/a.png", "in/.hidden.png"):
        picture(name)
    Path("in/notes.txt").write_text("no picture")
    return "in"


def test_folder(seg, tree):
    ran = seg(tree, "-o", "out")
    assert ran.out.splitlines() == ["out/a.png", "out/b.png"]
    assert listing("out") == ["a.png", "b.png"]


def test_folder_is_mirrored(seg, tree):
    ran = seg(tree, "-r", "-o", "out", "--jsonl")
    assert listing("out") == ["a.png", "b.png", "sub/a.png"]
    assert [r["path"] for r in records(ran.out)] == ["in/a.jpg", "in/b.png", "in/sub/a.png"]
    assert "3 images: 3 done" in ran.err


def test_folder_needs_a_place(seg, tree):
    assert seg(tree).code == 2
    assert seg(tree, "-o", "in").code == 2


def test_output_folder_is_left_out_of_the_walk(seg, tree):
    Path("in/out").mkdir()
    (Path("in/out") / "picture.png").write_bytes(Path("in/b.png").read_bytes())
    ran = seg(tree, "-r", "-o", "in/out", "--jsonl")
    assert [r["path"] for r in records(ran.out)] == ["in/a.jpg", "in/b.png", "in/sub/a.png"]


def test_second_run_does_not_take_its_own_masks(seg, tree):
    first = seg(tree, "-r", "-o", "in/out")
    assert seg(tree, "-r", "-o", "in/out").out == first.out
    assert seg("in/b.png", "-o", "in/sub/").out == "in/sub/b.png\n"
    assert [r["path"] for r in records(seg("in/sub", "-o", "x/", "--jsonl").out)] == [
        "in/sub/a.png"
    ]


def test_files_from(seg, tree):
    Path("list").write_text("in/b.png\r\nin/sub/a.png\n")
    ran = seg("--files-from", "list", "-o", "out")
    assert ran.out.splitlines() == ["out/b.png", "out/a.png"]
    ran = seg("--files-from", "list", "--root", "in", "-o", "out2")
    assert ran.out.splitlines() == ["out2/b.png", "out2/sub/a.png"]


def test_files0_from_stdin(seg, tree, picture):
    picture("in/new\nline.png")
    ran = seg("--files0-from", "-", "-o", "out", stdin=b"in/new\nline.png\0in/b.png\0")
    assert listing("out") == ["b.png", "new\nline.png"]
    assert ran.code == 0


def test_list_collision_is_a_record(seg, tree):
    ran = seg("--files-from", "-", "-o", "out", "--jsonl", stdin=b"in/a.jpg\nin/sub/a.png\n")
    assert ran.code == 1
    assert [r.get("error", {}).get("code") for r in records(ran.out)] == [None, "collision"]


def test_collision_stops_before_the_run(seg, tree):
    ran = seg("in/a.jpg", "in/sub/a.png", "-o", "out")
    assert (ran.code, ran.out) == (2, "")
    assert "would both write 'out/a.png'" in ran.err
    assert not Path("out").exists()


def test_input_is_never_written_over(seg, picture):
    before = picture().read_bytes()
    assert seg("a.png", "-o", "a.png").code == 2
    assert seg("a.png", "-o", ".").code == 2
    assert Path("a.png").read_bytes() == before


def test_same_file_twice_is_one(seg, picture):
    picture()
    assert len(records(seg("a.png", "./a.png", "--jsonl").out)) == 1


# Failures


def test_missing_among_others_is_a_record(seg, picture, check_record):
    ran = seg(picture(), "none.jpg", "-o", "out", "--jsonl")
    assert ran.code == 1
    found = records(ran.out)
    assert [r["status"] for r in found] == ["ok", "error"]
    assert found[1]["error"]["code"] == "missing"
    assert found[1]["path"] == "none.jpg"
    for record in found:
        check_record(record)


def test_nothing_exists(seg):
    ran = seg("none.jpg", "nor.jpg", "-o", "out")
    assert (ran.code, ran.out) == (2, "")
    assert "'none.jpg'" in ran.err


def test_empty_folder(seg):
    Path("empty").mkdir()
    assert seg("empty", "-o", "out").code == 2


def test_no_input(seg):
    assert seg("-o", "out").code == 2


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_image_is_one_line(seg, damage, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save("bad.jpg")
    data = Path("bad.jpg").read_bytes()
    Path("bad.jpg").write_bytes(
        {"truncated": data[: len(data) // 2], "text": b"no picture\n", "empty": b""}[damage]
    )
    ran = seg("bad.jpg", "-o", "out.png")
    assert (ran.code, ran.out) == (1, "")
    line, *hint = ran.err.splitlines()
    assert line.startswith("segcli: error: ")
    assert all(h.startswith("hint: ") for h in hint)
    assert len(hint) <= 1
    assert "bad.jpg" in line
    assert listing() == ["bad.jpg", "tiny.onnx"]


def test_bomb_is_refused(seg, picture):
    ran = seg(picture(size_wh=(20, 20)), "-o", "out.png", "--max-pixels", "399", "--jsonl")
    assert ran.code == 1
    assert records(ran.out)[0]["error"]["code"] == "too_large"


def test_fail_fast_stops(seg, picture):
    args = ["none.jpg", *(picture(f"{i}.png") for i in range(20))]
    ran = seg(*args, "-o", "out", "--jsonl", "--fail-fast", "--workers", "1")
    assert ran.code == 1
    assert [r["status"] for r in records(ran.out)] == ["error"]
    assert len(listing("out") if Path("out").is_dir() else []) < 20


def test_many_errors_are_counted(seg, picture):
    ran = seg(picture(), *(f"none{i}.jpg" for i in range(8)), "-o", "out")
    assert ran.err.count("error: ") == 5
    assert "and 3 more errors" in ran.err


# Existing outputs


def test_skip_existing(seg, picture, check_record):
    picture("a.png"), picture("b.png")
    seg("a.png", "-o", "out/")
    before = Path("out/a.png").stat().st_mtime_ns
    ran = seg("a.png", "b.png", "-o", "out", "--skip-existing", "--jsonl")
    assert ran.code == 0
    assert [r["status"] for r in records(ran.out)] == ["skipped", "ok"]
    assert records(ran.out)[0]["outputs"] == ["out/a.png"]
    assert Path("out/a.png").stat().st_mtime_ns == before
    for record in records(ran.out):
        check_record(record)


def test_no_clobber(seg, picture):
    picture("a.png"), picture("b.png")
    seg("a.png", "-o", "out/")
    before = Path("out/a.png").stat().st_mtime_ns
    ran = seg("a.png", "b.png", "-o", "out", "--no-clobber", "--jsonl")
    assert ran.code == 1
    assert [r.get("error", {}).get("code") for r in records(ran.out)] == ["exists", None]
    assert Path("out/a.png").stat().st_mtime_ns == before


def test_skip_existing_and_no_clobber(seg, picture):
    assert seg(picture(), "-o", "x.png", "--skip-existing", "--no-clobber").code == 2


# Places that cannot be written


def test_output_below_a_file(seg, picture):
    Path("file").write_text("in the way")
    ran = seg(picture(), "-o", "file/out/")
    assert ran.code == 5
    assert "is not a folder" in ran.err


def test_one_output_that_cannot_be_written(seg, picture):
    Path("out/a.png").mkdir(parents=True)
    ran = seg(picture("a.png"), picture("b.png"), "-o", "out", "--jsonl")
    assert ran.code == 1
    assert [r.get("error", {}).get("code") for r in records(ran.out)] == ["write", None]
    assert no_parts()


def test_full_device(seg, picture):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    Path("out.png").symlink_to("/dev/full")
    ran = seg(picture(), "-o", "out.png")
    assert ran.code == 1
    assert "No space left" in ran.err


# Records


@pytest.fixture
def mixed(picture):
    """Pictures of several sizes, a damaged and a missing one."""
    args = [picture(f"in/{i:02}.png", (5 + 7 * i, 4 + i), 3) for i in range(12)]
    Path("in/05.png").write_text("damaged")
    return [*(f"in/{a.name}" for a in args), "in/none.png"]


def test_jsonl_in_order_whatever_the_workers(seg, mixed, check_record):
    runs = {seg(*mixed, "-o", "out", "--jsonl", "--no-timing", "--workers", n).out for n in (1, 4)}
    [text] = runs
    found = records(text)
    assert [r["path"] for r in found] == mixed
    assert [r["status"] for r in found].count("error") == 2
    assert not any("elapsed_ms" in r for r in found)
    for record in found:
        check_record(record)


def test_json_is_one_array(seg, mixed, check_record):
    ran = seg(*mixed, "-o", "out", "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert [r["path"] for r in found] == mixed
    assert all(r["elapsed_ms"] >= 0 for r in found if r["status"] == "ok")
    for record in found:
        check_record(record)


def test_record_of_one_image(seg, picture):
    ran = seg(picture(size_wh=(9, 6), split=6).name, "-o", "out.png", "--jsonl", "--no-timing")
    assert records(ran.out) == [
        {
            "schema": 1,
            "path": "a.png",
            "status": "ok",
            "model": "tiny",
            "provider": records(ran.out)[0]["provider"],
            "width": 9,
            "height": 6,
            "outputs": ["out.png"],
            "classes": [
                {"class_id": RED, "name": "red", "pixels": 36, "fraction": 0.666667},
                {"class_id": BLUE, "name": "blue", "pixels": 18, "fraction": 0.333333},
            ],
        }
    ]


def test_json_and_jsonl(seg, picture):
    assert seg(picture(), "-o", "x.png", "--json", "--jsonl").code == 2


def test_quiet_and_verbose(seg, picture):
    args = (picture("a.png"), picture("b.png"), "-o", "out")
    assert seg(*args, "-q").err == ""
    assert "2 images: 2 done in " in seg(*args).err
    verbose = seg(*args, "-v").err
    assert verbose.count(": ok, ") == 2
    assert "weights under MIT" in verbose
    assert "error: " in seg("-q", picture(), "none.jpg", "-o", "out").err


def test_no_color(segcli_process, picture, tiny):
    done = segcli_process("segment", "--help", NO_COLOR="1", FORCE_COLOR="1")
    assert b"\x1b[3" not in done.stdout
    done = segcli_process("segment", "-m", tiny, "none.jpg", "-o", "x.png", NO_COLOR="1")
    assert b"\x1b" not in done.stderr


def test_names_that_are_not_utf8_keep_their_bytes(segcli_process, picture, tiny, tmp_path):
    name = b"caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_bytes(picture().read_bytes())
    except OSError:
        pytest.skip("the file system refuses such names")
    done = segcli_process("segment", "-m", tiny, name, "-o", "out/")
    assert (done.returncode, done.stdout) == (0, b"out/caf\xe9.png\n")
    assert [os.fsencode(p.name) for p in Path("out").iterdir()] == [name]
    done = segcli_process("segment", "-m", tiny, name, "-o", "out/", "--jsonl")
    assert b'"caf\\udce9.png"' in done.stdout
    done = segcli_process("segment", "-m", tiny, name + b".no", "a.png", "-o", "out/")
    assert done.returncode == 1
    assert b"caf\\" in done.stderr
    done = segcli_process(
        *("segment", "-m", tiny, "--files-from", "-", "-o", "out2/"), stdin=name + b"\n"
    )
    assert done.stdout == b"out2/caf\xe9.png\n"


# Signals


def test_terminated_leaves_nothing_behind(command, picture, tiny):
    args = [*command, "segment", "-m", str(tiny), "--files-from", "-", "-o", "out", "--jsonl"]
    with subprocess.Popen(
        args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        # The list stays open: the run waits for more until it is told to end.
        process.stdin.write(b"".join(b"%d.png\n" % i for i in range(40)))
        for i in range(40):
            picture(f"{i}.png")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == b"segcli: terminated\n"
    assert no_parts()


def test_interrupted(command, picture, tiny):
    args = [*command, "segment", "-m", str(tiny), "--files-from", "-", "-o", "out", "--jsonl"]
    with subprocess.Popen(
        args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        picture()
        process.stdin.write(b"a.png\n" + b"".join(b"none%d\n" % i for i in range(40)))
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert no_parts()


def test_reader_that_goes_away(command, picture, tiny):
    for i in range(30):
        picture(f"in/{i}.png")
    args = [*command, "segment", "-m", str(tiny), "in", "-o", "out", "--jsonl", "-v"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 141
    assert b"Traceback" not in err
    assert b"rror" not in err
    assert no_parts()


def test_a_bad_list_entry_does_not_end_the_run(seg, picture):
    picture("a.png")
    Path("list").write_bytes(b"x\0y\n\na.png\n")
    ran = seg("--files-from", "list", "-o", "out")
    assert (ran.code, ran.out) == (1, "out/a.png\n")
    assert ran.err.count("an entry of the list is no file name") == 2


def test_more_threads_than_cores(seg, picture):
    picture("a.png")
    ran = seg("a.png", "-o", "b.png", "--threads", "100000")
    assert (ran.code, ran.out) == (2, "")
    assert "cores of this machine" in ran.err


def test_an_odd_image_does_not_end_the_run(seg, picture):
    picture("a.png", (64, 64)), picture("thin.png", (4000, 1)), picture("z.png", (64, 64))
    ran = seg("a.png", "thin.png", "z.png", "-o", "out", "--resize", "short-side=512", "--jsonl")
    assert ran.code == 1
    found = records(ran.out)
    assert [r["status"] for r in found] == ["ok", "error", "ok"]
    assert found[1]["error"]["code"] == "too_large"
    assert "thin.png" in found[1]["error"]["message"]


def test_opacity_that_is_no_number(seg, picture):
    ran = seg(picture(), "-o", "x.png", "-f", "overlay", "--opacity", "nan")
    assert ran.code == 2
    assert "--opacity nan" in ran.err


def test_a_list_does_not_write_over_what_it_may_name_later(segcli, tiny, picture):
    picture("in/a.jpg.png").rename("in/a.jpg")
    photo = picture("in/a.png", (20, 6)).read_bytes()
    args = ("segment", "-m", tiny, "--files-from", "-", "--root", "in")
    ran = segcli(*args, "-o", "in/", "--jsonl", stdin=b"in/a.jpg\nin/a.png\n")
    assert Path("in/a.png").read_bytes() == photo
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert records[0]["error"]["code"] == "write"
    assert "segcli did not write it" in records[0]["error"]["message"]
    # Some of its outputs are missing, so that all would be written.
    two = ("-f", "mask", "-f", "color", "--skip-existing")
    ran = segcli(*args, "-o", "in/", *two, stdin=b"in/a.jpg\n")
    assert (ran.code, Path("in/a.png").read_bytes()) == (1, photo)
    planned = segcli(*args, "-o", "in/", "--dry-run", stdin=b"in/a.jpg\n")
    assert (planned.code, planned.out) == (1, "")
    # What it wrote itself is replaced, whatever the format.
    formats = [part for name in ("mask", "color", "cutout", "confidence") for part in ("-f", name)]
    for _ in range(2):
        ran = segcli(
            *(*args, "-o", "out/", *formats, "--classes", "0", "--jsonl"), stdin=b"in/a.jpg\n"
        )
        assert ran.code == 0, ran.out


def test_a_shard_does_not_write_over_an_input_of_another(segcli, tiny, picture):
    for i in range(8):
        picture(f"in/{i}.jpg.png").rename(f"in/{i}.jpg")
    photos = {f"in/x/{i}.png": picture(f"in/x/{i}.png", (20, 6)).read_bytes() for i in range(8)}
    listing = "\n".join([*(f"in/{i}.jpg" for i in range(8)), *photos]).encode()
    args = ("segment", "-m", tiny, "--files-from", "-", "--root", "in", "-o", "in/x", "--jsonl")
    codes = []
    for part in ("1/2", "2/2"):
        ran = segcli(*args, "--shard", part, stdin=listing)
        codes += [json.loads(line).get("error", {}).get("code") for line in ran.out.splitlines()]
        assert {name: Path(name).read_bytes() for name in photos} == photos
    # Of those in one part the photo is taken for the other's output.
    assert (len(codes), codes.count("write")) == (16, 8)
    assert set(codes) <= {"write", "collision", None}
