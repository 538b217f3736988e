import numpy as np
import pytest

from segcli.artifact import Preprocessing
from segcli.errors import ImageTooLarge, InferenceError, UsageError
from segcli.fields import class_map, strips
from segcli.model import load
from segcli.preprocess import preprocess
from segcli.protocol import Protocol, logits_field, parse_protocol

SQUASH = Preprocessing(resize="squash", size_hw=(512, 512), mean=(0.5,) * 3, std=(0.5,) * 3)


def parse(resize="model", tile=None, overlap=None, augment=None):
    return parse_protocol(resize, tile, overlap, augment)


def size(protocol, image_hw, own=SQUASH, scale=1.0):
    spec = protocol.preprocessing(image_hw, own, scale)
    return preprocess(np.zeros((*image_hw, 3), np.uint8), spec).shape[2:]


@pytest.mark.parametrize(
    ("resize", "image_hw", "expected"),
    [
        ("model", (480, 640), (512, 512)),
        # mmcv: 683 = int(640 * 512 / 480 + 0.5), then up to 704.
        ("short-side", (480, 640), (512, 704)),
        ("short-side", (640, 480), (704, 512)),
        ("short-side=256", (480, 640), (256, 352)),
        ("short-side=100", (300, 300), (128, 128)),
        ("native", (333, 517), (333, 517)),
        ("300x200", (480, 640), (200, 300)),
    ],
)
def test_sizes(resize, image_hw, expected):
    assert size(parse(resize), image_hw) == expected


def test_short_side_of_models_that_keep_the_aspect():
    own = Preprocessing(resize="shortest_edge", shortest_edge=300, crop_hw=(256, 256))
    assert size(parse("short-side"), (600, 800), own) == (320, 416)


@pytest.mark.parametrize(
    ("resize", "scale", "expected"),
    [
        ("model", 0.75, (384, 384)),
        ("short-side", 1.25, (640, 864)),
        ("native", 0.5, (240, 320)),
        ("300x200", 2, (400, 600)),
    ],
)
def test_scaled_sizes(resize, scale, expected):
    assert size(parse(resize), (480, 640), scale=scale) == expected


def test_what_is_too_large_for_any_model_is_an_error():
    for image_hw in ((1, 4000), (4000, 1)):
        with pytest.raises(ImageTooLarge, match="becomes"):
            parse("short-side").preprocessing(image_hw, SQUASH)
    with pytest.raises(ImageTooLarge):
        parse("native").preprocessing((8001, 8000), SQUASH, 4.0)


def test_what_is_too_small_for_a_model_is_an_error():
    with pytest.raises(InferenceError, match="would see 10x8 pixels"):
        size(parse("native"), (8, 10))


@pytest.mark.parametrize(
    "options",
    [
        {"resize": "big"},
        {"resize": "short-side=0"},
        {"resize": "short-side=7"},
        {"resize": "0x10"},
        {"resize": "99999999x100"},
        {"overlap": 10},
        {"tile": 4},
        {"tile": 64, "overlap": 64},
        {"tile": 64, "overlap": -1},
        {"augment": "flop"},
        {"augment": "0"},
        {"augment": "5"},
        {"augment": ""},
    ],
    ids=str,
)
def test_what_is_no_protocol(options):
    with pytest.raises(UsageError):
        parse(**options)


def test_what_is_one():
    assert parse() == Protocol()
    assert parse(tile=1024, overlap=256).overlap == 256
    assert parse(tile=100).overlap == 25
    assert parse(augment="flip") == Protocol(flip=True)
    assert parse(augment="flip,scales").scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert parse(augment="0.5,1,.5").scales == (0.5, 1.0)


@pytest.fixture
def network(make_card):
    """A card, and a network whose logits depend on the pixel's place, as padding makes them."""
    card = make_card(preprocessing=Preprocessing(resize="none", mean=(0.5,) * 3, std=(0.25,) * 3))

    def infer(pixel_values):
        assert pixel_values.flags.c_contiguous
        logits = pixel_values[0, :, ::4, ::4].copy()
        logits += np.linspace(0, 1, logits.shape[2], dtype=np.float32)
        return logits

    return card, infer


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (66, 90, 3), np.uint8)


def whole(field):
    return np.concatenate([values for _, values in strips(field)], axis=1)


def interpolate(planes, size_hw):
    torch = pytest.importorskip("torch")
    return torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(planes))[None], size=size_hw, mode="bilinear"
    )[0]


def test_flips_and_scales_are_averaged_as_mmsegmentation_does(network, image):
    torch = pytest.importorskip("torch")
    card, infer = network
    expected = torch.zeros(3, 66, 90)
    for scale in (0.75, 1.0):
        for flip in (False, True):
            spec = parse("64x64").preprocessing((66, 90), card.preprocessing, scale)
            pixels = preprocess(image, spec)
            logits = infer(np.ascontiguousarray(pixels[..., ::-1] if flip else pixels))
            full = torch.softmax(interpolate(logits, (66, 90)), dim=0)
            expected += full.flip(-1) if flip else full
    field = logits_field(image, card, parse("64x64", augment="flip,0.75,1"), infer, (66, 90))
    np.testing.assert_allclose(np.exp(whole(field)), (expected / 4).numpy(), atol=1e-6)


def test_windows_of_a_resized_image_end_at_the_size_that_is_asked(network, image):
    card, infer = network
    protocol = parse("short-side=128", tile=64, overlap=16)
    pixels = preprocess(image, protocol.preprocessing((66, 90), card.preprocessing))
    assert pixels.shape[2:] == (128, 192)
    total, count = np.zeros((3, 128, 192)), np.zeros((128, 192))
    for top in (0, 48, 64):
        for left in (0, 48, 96, 128):
            place = np.s_[..., top : top + 64, left : left + 64]
            logits = infer(np.ascontiguousarray(pixels[place]))
            total[place] += interpolate(logits, (64, 64)).numpy()
            count[place] += 1
    expected = interpolate((total / count).astype(np.float32), (33, 45)).numpy()
    field = logits_field(image, card, protocol, infer, (33, 45))
    np.testing.assert_allclose(whole(field), expected, atol=1e-5)
    assert (class_map(field) == expected.argmax(axis=0)).mean() > 0.999


def test_a_model_under_a_protocol(tiny_model, image):
    own = Preprocessing(resize="squash", size_hw=(32, 32))
    model = load(tiny_model(preprocessing=own), device="cpu")
    # Its logits are its pixels: at the image's own size the largest channel wins everywhere.
    expected = image.argmax(axis=2)
    assert (model(image).class_map == expected).mean() < 0.9
    for protocol in (parse("native"), parse("native", tile=32, overlap=8)):
        assert (model(image, protocol=protocol).class_map == expected).all()
    # Softmax keeps the order, and a mirrored image is the image mirrored.
    assert (model(image, protocol=parse("native", augment="flip")).class_map == expected).all()
    assert model(image, size_hw="logits").class_map.shape == (32, 32)
    with pytest.raises(UsageError, match="of one look"):
        model(image, size_hw="logits", protocol=parse(tile=32))
