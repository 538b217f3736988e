import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from segcli.errors import ImageDecodeError, ImageError, ImageTooLarge
from segcli.image_bytes import encode_palette_png
from segcli.image_io import decode_image, decode_labels, decode_reduced

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
RNG = np.random.default_rng(7)


def photo(height=97, width=131):
    """A smooth, asymmetric image: no flip or turn of it equals another."""
    y, x = np.mgrid[:height, :width]
    planes = (
        x * 255 // width,
        y * 255 // height,
        255 - (x + y) * 255 // (width + height),
    )
    return np.stack(planes, axis=-1).astype(np.uint8)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(ihdr, rows, *chunks):
    """A PNG by hand, for what Pillow cannot write."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", *ihdr, 0, 0, 0))
    body += b"".join(chunk(kind, data) for kind, data in chunks)
    raw = b"".join(b"\0" + row for row in rows)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def on_white(rgba):
    colour, alpha = rgba[..., :3].astype(np.float64), rgba[..., 3:].astype(np.float64)
    return np.floor((colour * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_back(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = decode_image(saved(photo(), file_format, **options), "a")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, photo())


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(progressive):
    data = saved(photo(), "JPEG", progressive=progressive)
    np.testing.assert_array_equal(decode_image(data, "a"), np.array(Image.open(io.BytesIO(data))))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared is not there")
def test_photos_equal_opencv():
    # Another decoder over the same libjpeg-turbo: rules out draft modes and colour shifts.
    import cv2

    for path in sorted(PHOTOS.glob("*.jpg")):
        data = path.read_bytes()
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        difference = np.abs(decode_image(data, path.name).astype(int) - expected)
        assert difference.max() <= 2, path.name
        assert difference.mean() < 0.1, path.name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
    }.get(file_format, {})
    stored = photo()
    # Where the stored first row and column belong, from the EXIF specification.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }[orientation]
    decoded = decode_image(saved(stored, file_format, exif=exif, **options), "a")
    assert decoded.shape == upright.shape
    # A JPEG's errors stay far below the difference to any other orientation.
    assert np.abs(decoded.astype(int) - upright).mean() < (8 if options else 0.001)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_invalid_orientation_is_upright(value):
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(decode_image(saved(photo(), "PNG", exif=exif), "a"), photo())


def test_damaged_exif_does_not_spoil_the_pixels():
    data = saved(photo(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(data, "a"), photo())


def test_grey_is_replicated():
    grey = photo()[..., 0]
    for data in (saved(grey, "PNG"), saved(grey, "PPM"), saved(grey, "BMP")):
        np.testing.assert_array_equal(decode_image(data, "a"), np.repeat(grey[..., None], 3, 2))


def test_one_bit():
    bits = RNG.integers(0, 2, (9, 13)).astype(bool)
    for file_format in ("PNG", "TIFF", "PPM", "BMP"):
        decoded = decode_image(saved(Image.fromarray(bits), file_format), "a")
        np.testing.assert_array_equal(
            decoded, np.repeat(bits[..., None], 3, 2).astype(np.uint8) * 255
        )


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_composited_on_white(file_format):
    rgba = RNG.integers(0, 256, (64, 67, 4), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(
        decode_image(saved(rgba, file_format, **options), "a"), on_white(rgba)
    )


def test_grey_with_alpha_is_composited_on_white():
    values = RNG.integers(0, 256, (64, 67, 2), dtype=np.uint8)
    data = saved(Image.fromarray(values), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "LA"
    np.testing.assert_array_equal(decode_image(data, "a"), on_white(values[..., [0, 0, 0, 1]]))


def test_palette_with_and_without_transparency():
    ids = RNG.integers(0, 4, (20, 31), dtype=np.uint8)
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    alpha = np.array([0, 255, 100, 255], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette(colours.tobytes())
    np.testing.assert_array_equal(decode_image(saved(image, "PNG"), "a"), colours[ids])
    np.testing.assert_array_equal(
        decode_image(saved(image, "PNG", transparency=alpha.tobytes()), "a"),
        on_white(np.column_stack([colours, alpha])[ids]),
    )
    seen = colours.copy()
    seen[1] = 255
    np.testing.assert_array_equal(decode_image(saved(image, "GIF", transparency=1), "a"), seen[ids])


def test_colour_key_is_transparent():
    image = np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8)
    data = saved(Image.fromarray(image), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode_image(data, "a"), [[[255, 255, 255], [1, 2, 4]]])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_grey_16_bit_keeps_the_high_byte(file_format, orientation):
    values = RNG.integers(0, 65536, (9, 14), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if file_format == "PPM" else {"exif": exif}
    decoded = decode_image(saved(Image.fromarray(values), file_format, **options), "a")
    grey = (values // 256).astype(np.uint8)
    if orientation == 6 and options:
        grey = np.rot90(grey, -1)
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, 2))


def test_colour_16_bit_keeps_the_high_byte():
    values = RNG.integers(0, 65536, (9, 14, 3), dtype=np.uint16)
    data = png((14, 9, 16, 2), [row.astype(">u2").tobytes() for row in values])
    np.testing.assert_array_equal(decode_image(data, "a"), values // 256)


def test_rgba_16_bit_is_composited_from_the_high_bytes():
    values = RNG.integers(0, 65536, (9, 14, 4), dtype=np.uint16)
    data = png((14, 9, 16, 6), [row.astype(">u2").tobytes() for row in values])
    np.testing.assert_array_equal(
        decode_image(data, "a"), on_white((values // 256).astype(np.uint8))
    )


def test_grey_16_bit_colour_key():
    values = np.array([[7, 0x1234, 0x1235]], np.uint16)
    data = png((3, 1, 16, 0), [values.astype(">u2").tobytes()], (b"tRNS", b"\x12\x34"))
    np.testing.assert_array_equal(decode_image(data, "a")[0, :, 0], [0, 255, 0x12])


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_samples_without_a_range_are_refused(kind):
    data = saved(Image.fromarray(np.ones((3, 3), kind)), "TIFF")
    with pytest.raises(ImageDecodeError, match="32-bit or floating-point"):
        decode_image(data, "a.tif")


def test_cmyk_follows_pillow():
    cmyk = Image.fromarray(photo()).convert("CMYK")
    for data in (saved(cmyk, "JPEG", quality=95), saved(cmyk, "TIFF")):
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "CMYK"
            expected = np.array(image.convert("RGB"))
        decoded = decode_image(data, "a")
        np.testing.assert_array_equal(decoded, expected)
        # Not inverted: Adobe's files store 255 - ink.
        assert np.abs(decoded.astype(int) - photo()).mean() < 8


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(file_format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode_image(data, "a"), np.full((6, 8, 3), (255, 0, 0)))


def test_multi_picture_jpeg_gives_the_main_one():
    frames = [Image.fromarray(photo()), Image.new("RGB", (20, 10))]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(data, "a.jpg").shape == photo().shape


def test_suffix_does_not_matter():
    np.testing.assert_array_equal(decode_image(saved(photo(), "PNG"), "a.jpg"), photo())


def test_empty():
    with pytest.raises(ImageDecodeError, match=r"'a\.jpg': the file is empty"):
        decode_image(b"", "a.jpg")


def test_text_named_jpg():
    with pytest.raises(
        ImageDecodeError, match=r"'a\.jpg': not an image: starts with b'hello"
    ) as caught:
        decode_image(b"hello world, hello", "a.jpg")
    assert "JPEG" in caught.value.hint


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF", b"\xd7\xcd\xc6\x9a", b"%PDF-"])
def test_formats_that_run_programs_are_out_of_reach(start):
    with pytest.raises(ImageDecodeError, match="not an image"):
        decode_image(start + bytes(100), "a.jpg")


CUT = {
    "baseline": lambda: saved(photo(), "JPEG"),
    "progressive": lambda: saved(photo(), "JPEG", progressive=True),
    "png": lambda: saved(photo(), "PNG"),
    "webp": lambda: saved(photo(), "WEBP"),
    "webp lossless": lambda: saved(photo(), "WEBP", lossless=True),
    "bmp": lambda: saved(photo(), "BMP"),
    "ppm": lambda: saved(photo(), "PPM"),
    "tiff": lambda: saved(photo(), "TIFF"),
    "tiff lzw": lambda: saved(photo(), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", CUT)
def test_truncated_is_an_error_never_a_grey_half(kind, capfd):
    data = CUT[kind]()
    decode_image(data, "a")
    cuts = {1, 2, 3, 9, 30, len(data) // 4, len(data) // 2, len(data) * 9 // 10}
    cuts |= {len(data) - 40, len(data) - 9}
    # The last four bytes of a PNG are a checksum of nothing, of this BMP a row's padding.
    if kind not in ("png", "bmp"):
        cuts |= {len(data) - 1, len(data) - 2, len(data) - 3}
    for end in sorted(cuts):
        with pytest.raises(ImageDecodeError, match=r"cannot decode 'b/a\.img': "):
            decode_image(data[:end], "b/a.img")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("baseline", "JPEG"), ("progressive", "JPEG"), ("png", "PNG"), ("webp", "WebP")],
)
def test_truncated_is_named_so(kind, name):
    data = CUT[kind]()
    end = len(data) // 2
    with pytest.raises(
        ImageDecodeError,
        match=rf"^cannot decode 'a': truncated {name} \({end} bytes\)$",
    ):
        decode_image(data[:end], "a")


@pytest.mark.parametrize("kind", ["baseline", "progressive", "png", "webp"])
def test_trailing_garbage_is_fine(kind):
    data = CUT[kind]()
    np.testing.assert_array_equal(
        decode_image(data + b"garbage" * 1000, "a"), decode_image(data, "a")
    )


def test_host_that_loads_truncated_images(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = saved(photo(), "JPEG")
    with pytest.raises(ImageDecodeError, match="truncated JPEG"):
        decode_image(data[: len(data) // 2], "a")


def test_damaged_png_is_named_so():
    data = bytearray(saved(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageDecodeError, match="damaged PNG"):
        decode_image(bytes(data), "a")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_image_errors_only(data):
    with pytest.raises(ImageError):
        decode_image(data, "a")


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(CUT)),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_raise_image_errors_only(kind, changes):
    data = bytearray(CUT[kind]())
    for position, value in changes:
        data[position % len(data)] = value
    try:
        decoded = decode_image(bytes(data), "a", max_pixels=1 << 20)
    except ImageError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3


def test_pixel_limit_from_the_header_alone():
    # 60000 x 60000 pixels in a header with nothing behind it.
    data = png((60000, 60000, 8, 2), [b""])
    with pytest.raises(ImageTooLarge, match=r"'a\.png' is too large: 60000x60000") as caught:
        decode_image(data, "a.png")
    assert "--max-pixels" in caught.value.hint


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_pixel_limit_is_exact(file_format):
    data = saved(photo(10, 12), file_format)
    assert decode_image(data, "a", max_pixels=120).shape == (10, 12, 3)
    with pytest.raises(ImageTooLarge):
        decode_image(data, "a", max_pixels=119)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_pillows_limit_does_not_interfere(file_format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    data = saved(photo(10, 12), file_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, "a").shape == (10, 12, 3)


def test_pillows_own_switch_off_stays(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    decode_image(saved(photo(), "PNG"), "a")
    assert Image.MAX_IMAGE_PIXELS is None


def test_threads_agree():
    files = [make() for make in CUT.values()] * 4
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda data: decode_image(data, "a"), files))
    for data, image in zip(files, decoded, strict=True):
        np.testing.assert_array_equal(image, decode_image(data, "a"))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_reduced_to_no_less_than_what_is_needed(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(97, 203), "JPEG", quality=95, exif=exif)
    whole_hw = (97, 203) if orientation == 1 else (203, 97)
    whole = decode_image(data, "a.jpg")
    asked = []
    for needed, scale in (
        ((97, 203), 1),
        ((49, 102), 1),
        ((48, 101), 2),
        ((20, 40), 4),
        ((1, 1), 8),
    ):
        needed_hw = needed if orientation == 1 else needed[::-1]
        pixels, size_hw = decode_reduced(
            data, "a.jpg", lambda hw, needed_hw=needed_hw: asked.append(hw) or needed_hw
        )
        assert size_hw == asked.pop() == whole_hw
        assert pixels.shape == (*(-(-n // scale) for n in whole_hw), 3)
        assert all(n >= m for n, m in zip(pixels.shape, needed_hw, strict=False))
        # The same picture, upright; any other orientation is off by 60.
        shown = np.asarray(Image.fromarray(whole).resize(pixels.shape[1::-1], Image.Resampling.BOX))
        assert np.abs(pixels.astype(int) - shown).mean() < 8


def test_other_formats_are_not_reduced():
    picture = Image.linear_gradient("L").convert("RGB")
    pixels, size_hw = decode_reduced(saved(picture, "PNG"), "a.png", lambda hw: (1, 1))
    assert pixels.shape == (256, 256, 3)
    assert size_hw == (256, 256)


def test_a_reduced_jpeg_obeys_the_limit_of_the_whole():
    data = saved(Image.new("RGB", (64, 64)), "JPEG")
    with pytest.raises(ImageTooLarge, match="64x64"):
        decode_reduced(data, "a.jpg", lambda hw: (1, 1), max_pixels=64 * 64 - 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("strip_pixels", [1, 131 * 10, 131 * 96])
def test_pixels_that_come_in_strips_are_those_of_the_whole(monkeypatch, orientation, strip_pixels):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(), "PNG", exif=exif)
    whole = decode_image(data, "a.png")
    monkeypatch.setattr("segcli.samples._STRIP_PIXELS", strip_pixels)
    assert np.array_equal(decode_image(data, "a.png"), whole)
    assert whole.shape == ((97, 131, 3) if orientation < 5 else (131, 97, 3))


IDS = np.array([[0, 1, 2, 3], [255, 7, 19, 150], [3, 3, 0, 254]], np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["P", "L"])
def test_labels_are_the_values_that_were_written(file_format, mode):
    image = Image.fromarray(IDS)
    if mode == "P":
        # Neither the order of the colors nor their number is that of the ids.
        image.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
    labels = decode_labels(saved(image, file_format), "a")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, IDS)


def test_labels_are_the_indices_of_our_own_masks():
    palette = np.zeros((150, 3), np.uint8)
    labels = decode_labels(encode_palette_png(IDS, palette), "a")
    np.testing.assert_array_equal(labels, IDS)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_labels_of_16_bits_keep_all_of_them(file_format):
    ids = np.array([[0, 300], [65535, 256]], np.uint16)
    labels = decode_labels(saved(ids, file_format), "a")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, ids)


@pytest.mark.parametrize(("bits", "row"), [(1, 0b10110000), (2, 0b11100100), (4, 0xF7)])
@pytest.mark.parametrize("color_type", [0, 3])
def test_labels_of_few_bits_are_not_stretched(bits, row, color_type):
    width = {1: 4, 2: 4, 4: 2}[bits]
    expected = [row >> (8 - bits * (i + 1)) & ((1 << bits) - 1) for i in range(width)]
    chunks = [(b"PLTE", bytes(range(3 * (1 << bits))))] if color_type == 3 else []
    data = png((width, 1, bits, color_type), [bytes([row])], *chunks)
    np.testing.assert_array_equal(decode_labels(data, "a"), [expected])


def test_labels_with_a_transparent_class_keep_it():
    image = Image.fromarray(IDS)
    image.putpalette(bytes(range(256)) * 3)
    labels = decode_labels(saved(image, "PNG", transparency=3), "a")
    np.testing.assert_array_equal(labels, IDS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colored_labels_are_refused(mode):
    data = saved(Image.new(mode, (4, 3), "red"), "PNG")
    with pytest.raises(ImageDecodeError, match=f"class ids from 'a.png': found {mode}, ") as caught:
        decode_labels(data, "a.png")
    assert "colors, no class ids" in caught.value.hint


@pytest.mark.parametrize(("mode", "found"), [("LA", "LA"), ("I", "I"), ("F", "F")])
def test_labels_of_other_kinds_are_refused(mode, found):
    data = saved(Image.new(mode, (4, 3)), "PNG" if mode == "LA" else "TIFF")
    with pytest.raises(ImageDecodeError, match=f"found {found}, expected a palette or one grey"):
        decode_labels(data, "a")


def test_labels_with_white_as_zero_are_refused():
    data = saved(Image.fromarray(IDS), "TIFF", tiffinfo={262: 0})
    with pytest.raises(ImageDecodeError, match="with white as 0"):
        decode_labels(data, "a")


@pytest.mark.parametrize("file_format", ["JPEG", "PPM", "WEBP"])
def test_formats_that_change_values_hold_no_labels(file_format):
    data = saved(Image.fromarray(IDS), file_format)
    with pytest.raises(ImageDecodeError, match="does not keep pixel values"):
        decode_labels(data, "a")


def test_labels_have_the_limits_of_images():
    data = saved(Image.fromarray(IDS), "PNG")
    with pytest.raises(ImageTooLarge):
        decode_labels(data, "a", max_pixels=11)
    with pytest.raises(ImageDecodeError, match="truncated PNG"):
        decode_labels(data[:-20], "a")
