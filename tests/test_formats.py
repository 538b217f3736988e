import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.formats import Format, common_stem
from segcli.inputs import Source
from segcli.writers import OutputPlan

# A "." or ".." is a folder, never an image.
NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "x/", "x.d/"]),
        st.text("a.", min_size=1, max_size=3),
        st.sampled_from(["", ".color", ".mask.color", ".confidence", ".overlay", ".mask", ".1"]),
        st.sampled_from([".jpg", ".png", ".JPEG", ""]),
    ),
).filter(lambda relative: relative.rpartition("/")[2] not in {".", ".."})


@given(NAMES, NAMES, st.booleans())
def test_inputs_that_write_one_file_have_a_stem_in_common(one, other, bare):
    plan = OutputPlan("folder", "" if bare else "out", tuple(Format))
    targets = [set(plan.targets(Source(name, name, "file"))) for name in (one, other)]
    if targets[0] & targets[1]:
        assert common_stem(one) == common_stem(other)


@pytest.mark.parametrize(
    ("relative", "stem"),
    [
        ("x/a.jpg", "x/a"),
        ("a.color.jpg", "a"),
        ("a.mask.color.png", "a"),
        # Frames of a film are not one.
        ("shot.000001.jpg", "shot.000001"),
        ("a.colors.jpg", "a.colors"),
        ("a", "a"),
    ],
)
def test_stems(relative, stem):
    assert common_stem(relative) == stem
