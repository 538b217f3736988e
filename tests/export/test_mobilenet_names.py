"""torchvision's and timm's MobileNetV2: the logits of their own layout, their preprocessing."""

import hashlib
import json
from functools import cache

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from segcli.artifact import Preprocessing
from segcli.errors import CheckpointError
from segcli.export import mobilenet_names
from segcli.export.checkpoints import load_strict, read_weights
from segcli.export.convert import (
    ExportRequest,
    export_model,
    read_checkpoint,
    reference_module,
)
from segcli.export.hf_processor import IMAGENET_MEAN, IMAGENET_STD
from segcli.export.mobilenet_v2 import MobileNetV2Config, MobileNetV2ForImageClassification
from segcli.session import Session

pytestmark = pytest.mark.export

# t, c, n, s of the paper's table 2.
ROWS = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def divisible(channels):
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def conv(c_in, c_out, kernel=1, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)


def conv_norm_act(*args, **options):
    layer = conv(*args, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU6())


class Residual(nn.Module):
    """A block of torchvision's: everything in `conv`."""

    def __init__(self, c_in, c_out, stride, t):
        super().__init__()
        mid = c_in * t
        self.adds = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *([conv_norm_act(c_in, mid)] if t != 1 else []),
            conv_norm_act(mid, mid, 3, stride, groups=mid),
            conv(mid, c_out),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class Torchvision(nn.Module):
    """Modules laid out so that their state dict has torchvision's names."""

    def __init__(self, width, num_classes):
        super().__init__()
        channels = divisible(32 * width)
        layers = [conv_norm_act(3, channels, 3, 2)]
        for t, c, n, s in ROWS:
            for i in range(n):
                layers.append(Residual(channels, divisible(c * width), s if i == 0 else 1, t))
                channels = divisible(c * width)
        last = divisible(1280 * max(1, width))
        self.features = nn.Sequential(*layers, conv_norm_act(channels, last))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(last, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class TimmStem(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv_dw, self.bn1 = conv(c_in, c_in, 3, groups=c_in), nn.BatchNorm2d(c_in)
        self.conv_pw, self.bn2 = conv(c_in, c_out), nn.BatchNorm2d(c_out)

    def forward(self, x):
        return self.bn2(self.conv_pw(nn.functional.relu6(self.bn1(self.conv_dw(x)))))


class TimmBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        mid = c_in * 6
        self.adds = stride == 1 and c_in == c_out
        self.conv_pw, self.bn1 = conv(c_in, mid), nn.BatchNorm2d(mid)
        self.conv_dw, self.bn2 = conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid)
        self.conv_pwl, self.bn3 = conv(mid, c_out), nn.BatchNorm2d(c_out)

    def forward(self, x):
        y = nn.functional.relu6(self.bn1(self.conv_pw(x)))
        y = nn.functional.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.adds else y


class Timm(nn.Module):
    """Modules laid out so that their state dict has timm's names."""

    def __init__(self, width, num_classes):
        super().__init__()
        channels = divisible(32 * width)
        self.conv_stem, self.bn1 = conv(3, channels, 3, 2), nn.BatchNorm2d(channels)
        stages = []
        for t, c, n, s in ROWS:
            blocks = []
            for i in range(n):
                out = divisible(c * width)
                blocks.append(
                    TimmStem(channels, out)
                    if t == 1
                    else TimmBlock(channels, out, s if i == 0 else 1)
                )
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        last = divisible(1280 * max(1, width))
        self.conv_head, self.bn2 = conv(channels, last), nn.BatchNorm2d(last)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x):
        x = nn.functional.relu6(self.bn1(self.conv_stem(x)))
        x = nn.functional.relu6(self.bn2(self.conv_head(self.blocks(x))))
        return self.classifier(x.mean((2, 3)))


@pytest.fixture(scope="module")
def saved(randomize, calibrate, tmp_path_factory):
    """Makes one of the two, random, and a file of its weights."""

    @cache
    def made(kind, width, num_classes):
        return calibrate(randomize(kind(width, num_classes)))

    def saved(kind, width=0.35, num_classes=3, name="weights.pth"):
        model = made(kind, width, num_classes)
        path = tmp_path_factory.mktemp("checkpoint") / name
        if path.suffix == ".safetensors":
            pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
        else:
            torch.save(model.state_dict(), path)
        return model, path

    return saved


def request(path, **changes):
    return ExportRequest(checkpoint=path, name="mine", source="a test", **changes)


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors"])
@pytest.mark.parametrize(("kind", "resample"), [(Torchvision, "bilinear"), (Timm, "bicubic")])
def test_logits_names_and_preprocessing(saved, kind, resample, name, assert_close):
    theirs, path = saved(kind, num_classes=1000, name=name)
    checkpoint = read_checkpoint(request(path))
    network = checkpoint.config.network
    assert (network.tf_padding, network.layer_norm_eps) == (False, 1e-5)
    assert (checkpoint.config.variant, network.output_stride) == ("0.35", 32)
    ours = reference_module(checkpoint)
    # At stride 2 both paddings differ at even sizes only.
    for size_hw in ((64, 96), (97, 131), (224, 224)):
        x = torch.randn(2, 3, *size_hw)
        assert_close(ours(x), theirs(x))
    names = checkpoint.config.class_names
    assert len(names) == 1000
    assert (names[0], names[1], names[999][:13]) == (
        *("tench, Tinca tinca", "goldfish, Carassius auratus"),
        "toilet tissue",
    )
    assert checkpoint.preprocessing == Preprocessing(
        resize="shortest_edge",
        shortest_edge=256,
        crop_hw=(224, 224),
        interpolation=resample,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


@pytest.mark.parametrize("kind", [Torchvision, Timm])
@pytest.mark.parametrize("width", [0.5, 0.75, 1.0, 1.4])
def test_every_width_loads(kind, width, tmp_path):
    theirs = kind(width, 3)
    path = tmp_path / "a.pth"
    torch.save(theirs.state_dict(), path)
    weights = read_weights(path)
    config = MobileNetV2Config(depth_multiplier=width, num_labels=3)
    load_strict(MobileNetV2ForImageClassification(config), weights.state, path)
    assert read_checkpoint(request(path)).config.network.depth_multiplier == width


@pytest.mark.parametrize("kind", [Torchvision, Timm])
def test_other_padding_and_eps_would_be_another_network(saved, kind, relative):
    """What the parity above would not see if it were blind."""
    theirs, path = saved(kind)
    state = read_weights(path).state
    x = torch.randn(1, 3, 64, 96)
    for change in ({"tf_padding": True}, {"layer_norm_eps": 1e-3}):
        config = {"depth_multiplier": 0.35, "num_labels": 3, "tf_padding": False}
        config |= {"layer_norm_eps": 1e-5, **change}
        ours = MobileNetV2ForImageClassification(MobileNetV2Config(**config)).eval()
        load_strict(ours, state, path)
        assert relative(ours(x), theirs(x)) > 1e-4


def test_the_export_of_a_file_with_torchvision_s_names(saved, assert_close):
    theirs, path = saved(Torchvision)
    report = export_model(request(path))
    assert report.card.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    x = torch.randn(2, 3, 96, 64)
    [found] = Session(report.data, device="cpu").run(x.numpy())
    assert_close(found, theirs(x), 1e-4)


def test_torchvision_s_second_weights_are_told_by_their_digest(saved, monkeypatch):
    _, path = saved(Torchvision)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(mobilenet_names, "_TORCHVISION_V2", digest[:8])
    assert read_checkpoint(request(path)).preprocessing.shortest_edge == 232


def test_files_beside_it_say_labels_and_preprocessing_not_the_network(saved):
    _, path = saved(Torchvision)
    names = {"0": "a", "1": "b", "2": "c"}
    config = {"id2label": names, "tf_padding": True, "depth_multiplier": 1.0}
    (path.parent / "config.json").write_text(json.dumps(config))
    (path.parent / "preprocessor_config.json").write_text(json.dumps({"size": 320}))
    found = read_checkpoint(request(path))
    assert found.config.class_names == ("a", "b", "c")
    assert not found.config.network.tf_padding
    assert found.config.network.depth_multiplier == 0.35
    assert found.preprocessing.shortest_edge == 320


PRETRAINED = {
    "input_size": [3, 96, 96],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}


def timm_folder(path, **changes):
    config = {
        "architecture": "mobilenetv2_035",
        "num_classes": 3,
        "num_features": 1280,
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": PRETRAINED,
        **changes,
    }
    (path.parent / "config.json").write_text(json.dumps(config))
    return request(path)


def test_timm_s_own_config_is_honoured(saved):
    _, path = saved(Timm)
    found = read_checkpoint(timm_folder(path))
    assert found.config.class_names == ("a", "b", "c")
    assert found.notes == ()
    assert found.preprocessing == Preprocessing(
        resize="shortest_edge",
        shortest_edge=106,
        crop_hw=(96, 96),
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"pad_type": "same"}}, "model_args"),
        ({"label_names": "a,b,c"}, "label_names 'a,b,c', expected a list"),
        ({"input_size": [3, 96, 128]}, "input_size"),
        ({"input_size": [1, 96, 96]}, "input_size"),
        ({"input_size": [3, "96", "96"]}, "input_size"),
        ({"crop_pct": 0}, "crop_pct 0"),
        ({"crop_pct": "1"}, "crop_pct '1'"),
        ({"crop_mode": "border"}, "crop_mode 'border', expected 'center'"),
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"interpolation": ["bicubic"]}, "interpolation"),
        ({"mean": "x"}, "image_mean 'x'"),
        ({"std": [0.1, 0, 0.1]}, "image_std"),
    ],
)
def test_what_timm_s_config_cannot_mean_is_refused(saved, changes, message):
    _, path = saved(Timm)
    outer = {k: v for k, v in changes.items() if k in ("model_args", "label_names")}
    inner = {k: v for k, v in changes.items() if k not in outer}
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        read_checkpoint(timm_folder(path, **outer, pretrained_cfg={**PRETRAINED, **inner}))


def test_a_variant_is_for_what_the_channels_do_not_tell(saved):
    _, path = saved(Torchvision, width=0.6)
    with pytest.raises(CheckpointError, match="no depth multiplier gives") as caught:
        read_checkpoint(request(path))
    assert "--variant" in caught.value.hint
    found = read_checkpoint(request(path, variant="0.6"))
    assert found.config.variant == "0.6"
    reference_module(found)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (Torchvision, "features.2.se.weight"),
        (Torchvision, "features.19.0.weight"),
        (Torchvision, "features.2.conv.4.weight"),
        (Timm, "blocks.1.2.conv_pw.weight"),
        (Timm, "blocks.1.0.se.conv_reduce.weight"),
        (Timm, "blocks.7.0.conv_pw.weight"),
    ],
)
def test_a_tensor_of_another_network_is_named(saved, kind, extra):
    _, path = saved(kind)
    torch.save({**torch.load(path), extra: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=f"1 unexpected: {extra}"):
        reference_module(read_checkpoint(request(path)))
