import numpy as np
import pytest

from segcli.image_bytes import (
    encode_gray16_png,
    encode_gray_png,
    encode_jpeg,
    encode_palette_png,
    encode_png_rgb,
)
from segcli.own_png import START_BYTES, is_segcli_png, starts_other_picture, starts_segcli_png

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
PALETTE = np.zeros((256, 3), np.uint8)


@pytest.mark.parametrize(
    "data",
    [
        encode_png_rgb(NOISE, {"model": "x" * 2000}),
        encode_palette_png(NOISE[..., 0], PALETTE),
        encode_gray_png(NOISE[..., 0]),
        encode_gray16_png(NOISE[..., 0].astype(np.uint16)),
    ],
)
def test_our_own_are_told_by_their_start(data, tmp_path):
    assert len(data) > START_BYTES
    assert starts_segcli_png(data[:START_BYTES])
    (tmp_path / "a.PNG").write_bytes(data)
    assert is_segcli_png(str(tmp_path / "a.PNG"))
    (tmp_path / "a.jpg").write_bytes(data)
    assert not is_segcli_png(str(tmp_path / "a.jpg"))


def test_pictures_of_others():
    ours = encode_gray_png(NOISE[..., 0])
    for data, other in (
        (ours, False),
        (ours.replace(b"segcli", b"gimpli"), True),
        (ours[:40], True),
        (encode_jpeg(NOISE), True),
        (b"kept", False),
        (b"", False),
    ):
        assert starts_other_picture(data[:START_BYTES]) is other


def test_others_and_what_is_cut_short_are_not():
    ours = encode_gray_png(NOISE[..., 0])
    for data in (b"", ours[:20], ours.replace(b"segcli", b"gimpli"), encode_jpeg(NOISE)):
        assert not starts_segcli_png(data)
