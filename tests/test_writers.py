import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import (
    OutputError,
    OutputWriteError,
    UsageError,
)
from segcli.formats import Format
from segcli.inputs import Source
from segcli.writers import (
    OutputPlan,
    all_exist,
    check_place,
    plan_output,
)

MASK = (Format.MASK,)
ALL = tuple(Format)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("a.jpg", "b.jpg", "in/a.jpg"):
        Path(name).write_text(name)


def named(path, relative=None, origin="file"):
    return Source(path, Path(path).name if relative is None else relative, origin)


ENDINGS = (".color.png", ".overlay.jpg", ".cutout.png", ".npy", ".json", ".confidence.png")


@pytest.mark.parametrize(
    ("output", "formats", "args", "kind", "targets"),
    [
        (None, ALL, ["a.jpg"], "folder", ["a.mask.png", *(f"a{e}" for e in ENDINGS)]),
        ("out", ALL, ["a.jpg"], "folder", ["out/a.png", *(f"out/a{e}" for e in ENDINGS)]),
        ("./out/", MASK, ["a.jpg"], "folder", ["./out/a.png"]),
        ("out.png/", MASK, ["a.jpg"], "folder", ["out.png/a.png"]),
        ("in", MASK, ["a.jpg"], "folder", ["in/a.png"]),
        ("x.v2", MASK, ["a.jpg"], "folder", ["x.v2/a.png"]),
        ("new/x.PNG", MASK, ["a.jpg"], "file", ["new/x.PNG"]),
        ("x.jpeg", (Format.OVERLAY,), ["a.jpg"], "file", ["x.jpeg"]),
        ("x.png", (Format.OVERLAY,), ["a.jpg"], "file", ["x.png"]),
        ("x.png", (Format.MASK, Format.MASK), ["a.jpg"], "file", ["x.png"]),
        ("/dev/null", MASK, ["a.jpg"], "file", ["/dev/null"]),
        ("-", MASK, ["a.jpg"], "stdout", ["-"]),
        ("/dev/stdout", MASK, ["-"], "stdout", ["-"]),
    ],
)
def test_output_names(output, formats, args, kind, targets):
    plan = plan_output(output, formats, args)
    assert plan.kind == kind
    assert list(plan.targets(named("a.jpg"))) == targets
    assert plan.folder == (output if kind == "folder" else None)


def test_stdin_and_trees_are_named_below_the_folder():
    plan = plan_output("out", MASK, ["-", "in"])
    assert plan.targets(Source("-", "stdin", "stdin")) == ("out/stdin.png",)
    assert plan.targets(named("in/x/a.b.jpg", "x/a.b.jpg")) == ("out/x/a.b.png",)
    assert plan.targets(named("in/x/..jpg", "x/..jpg")) == ("out/x/..png",)
    assert plan.targets(named("in/.jpg", ".jpg")) == ("out/.jpg.png",)
    assert plan_output(None, MASK, [], has_list=True).targets(
        named("r/x/a.jpg", "x/a.jpg", "list")
    ) == ("x/a.mask.png",)


@pytest.mark.parametrize(
    ("output", "formats", "args", "message"),
    [
        (None, MASK, ["in"], "'in' needs -o"),
        (None, MASK, ["-"], "stdin needs -o"),
        ("", MASK, ["a.jpg"], "-o is empty"),
        ("-", MASK, ["a.jpg", "b.jpg"], "takes one image"),
        ("-", MASK, ["in"], "takes one image"),
        ("-", ALL, ["a.jpg"], "takes one format, not mask and color and overlay"),
        ("x.png", MASK, ["a.jpg", "b.jpg"], "takes one image"),
        ("x.png", MASK, ["in"], "takes one image"),
        ("/dev/null", MASK, ["in"], "takes one image"),
        ("x.png", ALL, ["a.jpg"], "takes one format"),
        ("x.jpg", MASK, ["a.jpg"], "mask cannot be written to 'x.jpg'"),
        ("x.gif", MASK, ["a.jpg"], "mask cannot be written to 'x.gif'"),
        ("x.webp", (Format.OVERLAY,), ["a.jpg"], "expected the suffix .jpg or .jpeg or .png"),
        ("in", MASK, ["in"], "is the input folder 'in'"),
        ("./in/../in/", MASK, ["a.jpg", "in/"], "is the input folder 'in/'"),
        ("link", MASK, ["in"], "is the input folder 'in'"),
        ("plain", MASK, ["a.jpg"], "is a file and has no image suffix"),
    ],
)
def test_outputs_that_cannot_be(output, formats, args, message):
    Path("link").symlink_to("in")
    Path("plain").touch()
    with pytest.raises(UsageError, match=message):
        plan_output(output, formats, args)


def test_list_counts_as_several_inputs():
    for output in ("x.png", "-"):
        with pytest.raises(UsageError, match="takes one image"):
            plan_output(output, MASK, [], has_list=True)


@pytest.mark.parametrize("relative", ["../a.jpg", "x/../../a.jpg", "/a.jpg", "..", "", "."])
def test_outputs_never_leave_the_folder(relative):
    plan = plan_output("out", MASK, [], has_list=True)
    with pytest.raises(OutputWriteError, match="would leave the output folder") as caught:
        plan.targets(named("x.jpg", relative, "list"))
    assert "--root" in caught.value.hint


@given(
    st.text(st.sampled_from("a./\\~é\udcff \n"), max_size=12), st.sampled_from(["out", "", "/o/"])
)
def test_any_place_is_inside_the_folder_or_refused(relative, output):
    plan = OutputPlan("folder", output, ALL)
    try:
        targets = plan.targets(named("x", relative))
    except OutputWriteError:
        return
    assert len(set(targets)) == len(ALL)
    for target in targets:
        below = target.removeprefix("out/" if output == "out" else output)
        assert target == os.path.normpath(target)
        assert below == target.removeprefix(output).lstrip("/")
        assert ".." not in Path(below).parts
        assert Path(below).name


def test_place_is_checked_and_not_created(monkeypatch):
    check_place(plan_output("new/deep", MASK, ["a.jpg"]))
    check_place(plan_output("new/x.png", MASK, ["a.jpg"]))
    check_place(plan_output(None, MASK, ["a.jpg"]))
    check_place(plan_output("-", MASK, ["a.jpg"]))
    check_place(plan_output("/dev/null", MASK, ["a.jpg"]))
    assert not Path("new").exists()
    with pytest.raises(OutputError, match="is not a folder"):
        check_place(plan_output("a.jpg/out", MASK, ["b.jpg"]))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="may not be written"):
        check_place(plan_output("new/deep", MASK, ["a.jpg"]))


def test_all_exist():
    assert all_exist(["a.jpg", "b.jpg"])
    for missing in ("gone", "in", "/dev/null", "x" * 300, "-"):
        assert not all_exist(["a.jpg", missing])
