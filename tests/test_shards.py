import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import UsageError
from segcli.inputs import Source, open_sources
from segcli.shards import Shard, parse_shard

# Of several folders, with and without suffixes, some equal but for them.
NAMES = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(NAMES, min_size=1), st.integers(1, 7))
def test_shards_of_any_list_make_the_whole_exactly(names, count):
    def read(shard):
        listing = io.BytesIO(b"\0".join(name.encode() for name in names))
        return list(open_sources([], files0_from="-", root=".", shard=shard, stdin=listing))

    whole = read(None)
    parts = [read(parse_shard(f"{i}/{count}")) for i in range(1, count + 1)]
    # Disjoint and complete, each in the order of the whole.
    assert sorted(whole.index(s) for part in parts for s in part) == list(range(len(whole)))
    for part in parts:
        assert part == [source for source in whole if source in part]
    assert parts == [read(Shard(i, count)) for i in range(count)]


@given(NAMES, st.lists(NAMES), st.integers(1, 7))
def test_other_files_move_none(name, others, count):
    def part_of(names):
        listing = io.BytesIO(b"\0".join(n.encode() for n in names))
        found = open_sources([], files0_from="-", root=".", stdin=listing)
        [source] = [s for s in found if s.path == name]
        return [i for i in range(count) if Shard(i, count).holds(source.relative)]

    assert part_of([name]) == part_of([*others, name])


def test_inputs_that_would_write_one_file_meet():
    for i in range(100):
        for shard in (Shard(j, 7) for j in range(7)):
            assert shard.holds(f"a/{i}.jpg") == shard.holds(f"a/{i}.png")
            # As a mask, and in color.
            assert shard.holds(f"a/{i}.color.jpg") == shard.holds(f"a/{i}.jpg")


def test_parts_are_about_equal():
    counts = [sum(Shard(i, 4).holds(f"photos/{n:05}.jpg") for n in range(4000)) for i in range(4)]
    assert sum(counts) == 4000
    assert all(900 < count < 1100 for count in counts)


def test_a_part_of_a_list_that_names_one_is_empty():
    parts = [list(open_sources(["a.jpg"], shard=Shard(i, 2), stdin=io.BytesIO())) for i in range(2)]
    assert sorted(parts, key=len) == [[], [Source("a.jpg", "a.jpg", "file")]]


@pytest.mark.parametrize(
    "text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1 /4", "²/4"]
)
def test_other_forms(text):
    with pytest.raises(UsageError, match="is not i/N with i from 1 to N"):
        parse_shard(text)


def test_none_is_the_whole():
    assert parse_shard(None) is None
    assert parse_shard("1/1") == Shard(0, 1)
