import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.atomic import write_atomic
from segcli.claims import Claims, SortedClaims, claim_targets, open_claims
from segcli.errors import ImageMissing, OutputCollision, OutputError, OutputWriteError, UsageError
from segcli.formats import Format
from segcli.inputs import Source, open_sources
from segcli.writers import OutputPlan, plan_output

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


STEMS = st.sampled_from(["a", "b", "a.color", "a.overlay", "a.mask"])
PLACES = st.builds(
    lambda folder, stem, suffix: folder + stem + suffix,
    st.sampled_from(["", "x/", "a.png/"]),
    STEMS,
    st.sampled_from([".jpg", ".png", ""]),
)


@given(st.lists(st.tuples(PLACES, st.sampled_from(["in1/", "in2/"])), max_size=8), st.booleans())
def test_two_sources_never_share_a_target_in_silence(places, bare):
    plan = OutputPlan("folder", "" if bare else "out", ALL)
    claims = Claims()
    owners = {}
    for relative, folder in places:
        source = named("/no/such/" + folder + relative, relative)
        targets = plan.targets(source)
        taken = {owners[t] for t in targets if t in owners} - {source.path}
        if taken:
            with pytest.raises(OutputCollision):
                claims.claim(source, targets)
        else:
            claims.claim(source, targets)
            owners.update(dict.fromkeys(targets, source.path))


def test_collision_of_the_command_line_names_both():
    plan = plan_output("out", MASK, ["a.jpg", "in"])
    stream = open_sources(["a.jpg", "in"], stdin=None)
    with pytest.raises(UsageError, match=r"'a.jpg' and 'in/a.jpg' would both write 'out/a.png'"):
        Claims().check(plan, stream)


def test_formats_collide_across_stems():
    plan = plan_output("out", ALL, ["a.jpg", "a.color.jpg"])
    with pytest.raises(UsageError, match=r"would both write 'out/a\.color\.png'"):
        Claims().check(plan, [named("a.jpg"), named("a.color.jpg")])


def test_planned_sources_claim_again_and_list_entries_do_not():
    plan = plan_output("out", MASK, ["a.jpg"], has_list=True)
    claims, source = Claims(), named("a.jpg")
    claims.check(plan, [source])
    claims.claim(source, plan.targets(source))
    write_atomic("out/a.png", b"")
    claims.claim(source, plan.targets(source))
    entry = named("in/a.jpg", origin="list")
    with pytest.raises(OutputCollision, match=r"'a.jpg' and 'in/a.jpg'"):
        claims.claim(entry, plan.targets(entry))


def test_linked_targets_collide():
    Path("real").mkdir()
    Path("link").symlink_to("real")
    claims = Claims()
    claims.claim(named("x"), ["real/a.png"])
    with pytest.raises(OutputCollision):
        claims.claim(named("y"), ["link/a.png"])


@pytest.mark.parametrize("names", [["a.jpg", "a.png"], ["a.png", "b.jpg"], ["link.jpg"]])
def test_inputs_are_not_written_over(names):
    Path("a.png").touch()
    Path("link.jpg").symlink_to("a.png")
    Path("link.png").symlink_to("a.png")
    plan = plan_output(".", MASK, names)
    with pytest.raises(UsageError, match=r"is the input|would both write"):
        Claims().check(plan, map(named, names))
    with pytest.raises(OutputWriteError, match="is the input"):
        Claims().claim(named("a.png", origin="list"), ["./a.png"])


def test_list_entry_that_this_run_wrote_is_refused():
    claims = Claims()
    claims.claim(named("a.jpg", origin="list"), ["a.png"])
    write_atomic("a.png", b"mask")
    with pytest.raises(OutputCollision, match=r"'a.png' is the output of 'a.jpg'"):
        claims.claim(named("a.png", origin="list"), ["out/a.png"])


NAMES = st.lists(
    st.text(st.sampled_from("a./-"), min_size=1, max_size=4).filter(
        lambda name: {"", ".", ".."}.isdisjoint(name.split("/"))
    ),
    max_size=6,
    unique=True,
)
SUFFIXES = st.sampled_from([".jpg", ".png", ".color.jpg", ".overlay.png"])


@given(st.lists(st.tuples(NAMES, SUFFIXES), max_size=8))
def test_sorted_claims_refuse_what_claims_refuse(places):
    """Any keys of a bucket, in their order: a memory of what is near is enough."""
    keys = sorted({name + suffix for names, suffix in places for name in names}, key=str.encode)
    plan = OutputPlan("folder", "s3://bucket/out/", ALL)
    every, near = Claims(), SortedClaims()
    for key in keys:
        source = Source(f"s3://bucket/in/{key}", key, "folder")
        targets = plan.targets(source)
        said = []
        for claims in (every, near):
            try:
                claims.claim(source, targets)
                said.append(None)
            except OutputCollision as error:
                said.append(str(error))
        assert said[0] == said[1]


def test_frames_of_a_film_are_forgotten():
    claims, plan = SortedClaims(), OutputPlan("folder", "s3://b/out", ALL)
    tracemalloc.start()
    try:
        for i in range(3000):
            source = named(f"s3://b/in/shot.{i:06}.jpg", f"shot.{i:06}.jpg")
            claims.claim(source, plan.targets(source))
            if i == 100:
                before, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Remembered, they would take a megabyte.
    assert after - before < 100_000


def test_names_that_no_file_can_have():
    plan = OutputPlan("folder", "out", MASK)
    for source in (named("http://h/%00.jpg", "\0.jpg"), named("s3://", "")):
        with pytest.raises(ImageMissing, match=r"is no file name|is no URL"):
            claim_targets(source, plan, Claims())


def test_only_one_folder_of_a_store_is_sorted():
    plan = OutputPlan("folder", "out", MASK)
    assert type(open_claims(["s3://b/in/"], plan)) is SortedClaims
    for args in (["in"], ["s3://b/a.jpg"], ["s3://b/in/", "s3://b/in/"], []):
        assert type(open_claims(args, plan)) is Claims
    assert type(open_claims(["s3://b/in/"], plan, has_list=True)) is Claims


def test_a_store_without_order_is_refused():
    claims, plan = SortedClaims(), OutputPlan("folder", "out", MASK)
    for key in ("b.jpg", "b/a.jpg", "é.jpg"):
        claims.claim(named(f"s3://b/{key}", key), plan.targets(named(key, key)))
    with pytest.raises(OutputError, match="is listed out of order"):
        claims.claim(named("s3://b/z.jpg", "z.jpg"), ("out/z.png",))


@pytest.mark.parametrize("more", [[], ["a.jpg"]])
def test_nothing_is_written_into_a_folder_that_is_listed_late(more):
    plan = OutputPlan("folder", "s3://b", MASK)
    claims = open_claims(["s3://b/in/", *more], plan)
    source = Source("s3://b/in/in/a.jpg", "in/a.jpg", "folder")
    with pytest.raises(OutputWriteError, match="would be in the input folder 's3://b/in/'"):
        claims.claim(source, plan.targets(source))
