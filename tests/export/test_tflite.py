"""TFLite MobileNetV2: the tensors of the shared conversions, LiteRT's answers, and other files.

A writer of its own makes files of every kind from a random PyTorch network: float, float16, int8
with a scale for each channel, padded and pooled as one converter does it or the other.
"""

import csv
import random
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tflite = pytest.importorskip("tflite")
flatbuffers = pytest.importorskip("flatbuffers")

from segcli.errors import CheckpointError
from segcli.export.checkpoints import read_weights
from segcli.export.convert import ExportRequest, export_model, read_checkpoint, reference_module
from segcli.export.mobilenet_v2 import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
)
from segcli.image_io import decode_image
from segcli.labels import Labels
from segcli.resize import resize
from segcli.session import Session

pytestmark = pytest.mark.export

SHARED = {
    "mobilenet_v2_1.0_224_quant": "mobilenet_v2_1.0_224-imagenet",
    "deeplabv3_mnv2_pascal_quant": "deeplabv3_mobilenet_v2_1.0_513-voc",
}


def request(path, **changes):
    return ExportRequest(checkpoint=path, name="mine", source="a test", **changes)


@pytest.mark.parametrize(("file", "folder"), SHARED.items())
def test_tensors_equal_the_shared_conversion_bit_for_bit(shared, file, folder):
    from safetensors.torch import load_file

    folder = shared / "checkpoints" / folder
    expected = load_file(folder / "model.safetensors")
    found = read_weights(shared / "checkpoints/tflite" / f"{file}.tflite").state
    counters = {k for k in expected if k.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys() - counters
    differing = [k for k in found if not torch.equal(found[k], expected[k])]
    assert differing == []
    print(f"\n{file}: {len(found)} of {len(found)} tensors equal bit for bit")


@pytest.mark.parametrize(("file", "folder"), SHARED.items())
def test_the_graph_says_what_the_shared_configs_say(shared, file, folder):
    expected = read_checkpoint(request(shared / "checkpoints" / folder))
    found = read_checkpoint(request(shared / "checkpoints/tflite" / f"{file}.tflite"))
    ignored = {"image_size": 224}
    assert {**vars(found.config.network), **ignored} == {**vars(expected.config.network), **ignored}
    assert found.config.task == expected.config.task
    assert found.config.variant == expected.config.variant == "1.0"
    assert found.config.class_names == expected.config.class_names
    assert found.preprocessing == expected.preprocessing
    # Google's DeepLab graph upsamples with align_corners, transformers without.
    assert found.weights.align_corners == (found.config.task == "segmentation")
    assert found.notes[0].startswith("the checkpoint names no classes: the usual ones for")


def interpreter(path):
    """Returns LiteRT's interpreter, with all tensors kept and no delegate."""
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
    made = litert.Interpreter(
        str(path),
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    made.allocate_tensors()
    return made


def run_litert(made, pixels, tensor):
    """Returns the real values of a tensor, dequantised, after running an (H, W, 3) input."""
    made.set_tensor(made.get_input_details()[0]["index"], pixels[None])
    made.invoke()
    details = next(t for t in made.get_tensor_details() if t["index"] == tensor)
    scale, zero_point = details["quantization"]
    values = made.get_tensor(tensor).astype(np.float64)
    return ((values - zero_point) * scale if scale else values)[0], scale


@pytest.mark.slow
@pytest.mark.parametrize("file", SHARED)
def test_our_graph_answers_photos_as_litert_does(shared, file):
    """The same uint8 pixels go into both; the logits are those before softmax or upsampling."""
    path = shared / "checkpoints/tflite" / f"{file}.tflite"
    theirs = interpreter(path)
    with (shared / "data/photos/photos.csv").open(newline="", encoding="utf-8") as rows:
        photos = [r["file"] for r in csv.DictReader(rows) if r["float_top1_index_1001"]]
    assert len(photos) == 12
    report = export_model(request(path))
    ours = Session(report.data, device="cpu")
    assert report.card.align_corners == (report.card.task == "segmentation")
    [details] = theirs.get_input_details()
    size_hw = tuple(int(n) for n in details["shape"][1:3])
    scale, zero_point = details["quantization"]
    # The tensor that the class scores are made of, by the only shape of its kind.
    classifier = [t for t in theirs.get_tensor_details() if t["shape"].tolist() == [1, 1001]]
    if classifier:
        tensor = classifier[0]["index"]
    else:
        maps = [t for t in theirs.get_tensor_details() if t["shape"].tolist() == [1, 33, 33, 21]]
        tensor = maps[0]["index"]
    differences, same = [], []
    for photo in (shared / "data/photos" / name for name in photos):
        pixels = resize(decode_image(photo.read_bytes(), str(photo)), size_hw, "bilinear")
        expected, step = run_litert(theirs, pixels, tensor)
        real = ((pixels.astype(np.float64) - zero_point) * scale).astype(np.float32)
        [found] = ours.run(real.transpose(2, 0, 1)[None])
        found = found[0].transpose(1, 2, 0) if found.ndim == 4 else found[0]
        assert found.shape == expected.shape
        differences.append(float(np.abs(found - expected).mean()))
        same.append(float((found.argmax(-1) == expected.argmax(-1)).mean()))
    mean, top1 = float(np.mean(differences)), float(np.mean(same))
    print(
        f"\n{file}: mean |logit - LiteRT's| {mean:.4f} (worst photo {max(differences):.4f}), one "
        f"step is {step:.4f}; top-1 the same on {top1:.4f} of "
        f"{'12 photos' if classifier else 'the cells of 12 photos'}"
    )
    assert mean <= step
    assert top1 >= (11 / 12 if classifier else 0.98)


OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONCATENATION": "ConcatenationOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "MEAN": "ReducerOptions",
    "SOFTMAX": "SoftmaxOptions",
    "PAD": "PadOptions",
    "RESHAPE": "ReshapeOptions",
    "ARG_MAX": "ArgMaxOptions",
}
TYPES = {
    np.dtype(k): v
    for k, v in {
        "f4": tflite.TensorType.FLOAT32,
        "f2": tflite.TensorType.FLOAT16,
        "u1": tflite.TensorType.UINT8,
        "i1": tflite.TensorType.INT8,
        "i4": tflite.TensorType.INT32,
        "i8": tflite.TensorType.INT64,
    }.items()
}
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "RESHAPE": 1, "FULLY_CONNECTED": 4}
NONE, RELU, RELU6 = 0, 1, 3
SAME, VALID = 0, 1


class Writer:
    """Tensors and operators -> the bytes of a .tflite file."""

    def __init__(self):
        self.tensors, self.operators, self.inputs, self.outputs = [], [], [], []

    def tensor(self, shape, dtype="f4", data=None, scale=(), zero=(), axis=0):
        data = None if data is None else np.ascontiguousarray(data, dtype)
        self.tensors.append((tuple(shape), np.dtype(dtype), data, scale, zero, axis))
        return len(self.tensors) - 1

    def constant(self, values, dtype="f4", **quantization):
        return self.tensor(np.shape(values), dtype, values, **quantization)

    def operator(self, kind, inputs, shape, dtype="f4", *, scale=(), zero=(), **options):
        output = self.tensor(shape, dtype, scale=scale, zero=zero)
        self.operators.append((kind, list(inputs), [output], options))
        return output

    def file(self):
        b = flatbuffers.Builder(1 << 20)

        def offsets(items):
            b.StartVector(4, len(items), 4)
            for item in reversed(items):
                b.PrependUOffsetTRelative(item)
            return b.EndVector()

        def table(name, **fields):
            getattr(tflite, f"{name}Start")(b)
            for field, value in fields.items():
                getattr(tflite, f"{name}Add{field}")(b, value)
            return getattr(tflite, f"{name}End")(b)

        def vector(values, dtype):
            return b.CreateNumpyVector(np.asarray(values, dtype))

        buffers, tensors = [table("Buffer")], []
        for i, (shape, dtype, data, scale, zero, axis) in enumerate(self.tensors):
            fields = {"Name": b.CreateString(f"tensor {i}"), "Shape": vector(shape, np.int32)}
            if len(scale):
                scales, zeros = vector(scale, np.float32), vector(zero, np.int64)
                fields["Quantization"] = table(
                    "QuantizationParameters",
                    Scale=scales,
                    ZeroPoint=zeros,
                    QuantizedDimension=axis,
                )
            fields["Type"] = TYPES[dtype]
            if data is not None:
                raw = vector(data.reshape(-1).view(np.uint8), np.uint8)
                buffers.append(table("Buffer", Data=raw))
                fields["Buffer"] = len(buffers) - 1
            tensors.append(table("Tensor", **fields))
        kinds = sorted({kind for kind, *_ in self.operators})
        codes = [
            table(
                "OperatorCode",
                BuiltinCode=getattr(tflite.BuiltinOperator, kind),
                DeprecatedBuiltinCode=min(getattr(tflite.BuiltinOperator, kind), 127),
                Version=VERSIONS.get(kind, 2),
            )
            for kind in kinds
        ]
        operators = []
        for kind, inputs, outputs, options in self.operators:
            fields = {
                "OpcodeIndex": kinds.index(kind),
                "Inputs": vector(inputs, np.int32),
                "Outputs": vector(outputs, np.int32),
            }
            if kind in OPTIONS:
                fields["BuiltinOptions"] = table(OPTIONS[kind], **options)
                fields["BuiltinOptionsType"] = getattr(tflite.BuiltinOptions, OPTIONS[kind])
            operators.append(table("Operator", **fields))
        lists = [offsets(tensors), offsets(operators)]
        ends = [vector(self.inputs, np.int32), vector(self.outputs, np.int32)]
        graph = table(
            "SubGraph", Tensors=lists[0], Operators=lists[1], Inputs=ends[0], Outputs=ends[1]
        )
        lists = [offsets(codes), offsets([graph]), offsets(buffers)]
        model = table(
            "Model", Version=3, OperatorCodes=lists[0], Subgraphs=lists[1], Buffers=lists[2]
        )
        b.Finish(model, b"TFL3")
        return bytes(b.Output())


def folded(layer):
    """Returns weight and bias of one of our layers, its batch norm folded in."""
    weight, norm = layer.convolution.weight, layer.normalization
    if not isinstance(norm, torch.nn.BatchNorm2d):
        return weight.numpy(), layer.convolution.bias.numpy()
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = norm.bias - norm.running_mean * factor
    return (weight * factor[:, None, None, None]).numpy(), bias.numpy()


class NetworkWriter(Writer):
    """One of our networks -> the file that a converter would make of it.

    Args:
        model: In eval mode.
        size: Height and width of the input.
        numbers: "float", "half" (weights float16, then DEQUANTIZE), "dynamic" (weights int8 by
            channel, then DEQUANTIZE) or "int8" (all of it, weights by channel).
        keras: PAD and VALID in place of SAME, MEAN and a matrix in place of pooling and 1x1
            convolution.
        symmetric: PyTorch's padding.
        fuses: False leaves activations to what the output's numbers can hold.
    """

    def __init__(self, model, size, numbers="float", *, keras=False, symmetric=False, fuses=True):
        super().__init__()
        self.numbers, self.keras, self.symmetric, self.fuses = numbers, keras, symmetric, fuses
        self.dtype = "i1" if numbers == "int8" else "f4"
        self.written, self.limits = {}, {}
        if numbers == "int8":
            self.calibrate(model, size)
        # Pixels from -1 to 1, as uint8 less 128.
        pixels = {"scale": [1 / 128], "zero": [0]} if numbers == "int8" else {}
        at = self.tensor((1, size, size, 3), self.dtype, **pixels)
        self.inputs = [at]
        backbone = model.mobilenet_v2
        stem = backbone.conv_stem
        at = self.conv(at, stem.first_conv)
        if hasattr(stem, "expand_1x1"):
            at = self.conv(at, stem.expand_1x1)
        at = self.conv(self.conv(at, stem.conv_3x3), stem.reduce_1x1)
        for block in backbone.layer:
            start = at
            at = self.conv(at, block.expand_1x1)
            at = self.conv(self.conv(at, block.conv_3x3), block.reduce_1x1)
            if block.is_residual:
                more = {"FusedActivationFunction": NONE, **self.quantization(block)}
                at = self.operator("ADD", [at, start], self.shape(at), self.dtype, **more)
        if hasattr(model, "segmentation_head"):
            self.deeplab(at, model.segmentation_head, size)
        else:
            self.classifier(self.conv(at, backbone.conv_1x1), model)

    def shape(self, tensor):
        return self.tensors[tensor][0]

    def calibrate(self, model, size):
        """Notes between which values each layer's output lies."""

        def note(module, _, output):
            self.limits[module] = float(min(output.min(), 0)), float(output.max())

        hooks = [module.register_forward_hook(note) for module in model.modules()]
        model(torch.rand(8, 3, size, size) * 2 - 1)
        for hook in hooks:
            hook.remove()

    def quantization(self, module):
        if self.numbers != "int8":
            return {}
        low, high = self.limits[module]
        scale = (high - low) / 255
        return {"scale": [scale], "zero": [round(-128 - low / scale)]}

    def weight(self, values, axis):
        """Adds a weight in this file's numbers; returns its tensor and its scales."""
        if self.numbers == "float":
            return self.constant(values), None
        if self.numbers == "half":
            half = self.constant(values, "f2")
            return self.operator("DEQUANTIZE", [half], values.shape), None
        others = tuple(i for i in range(values.ndim) if i != axis)
        scale = (np.abs(values).max(others) / 127).astype(np.float32)
        along = [-1 if i == axis else 1 for i in range(values.ndim)]
        q = np.round(values / scale.reshape(along)).astype(np.int8)
        tensor = self.constant(q, "i1", scale=scale, zero=np.zeros(len(scale)), axis=axis)
        if self.numbers == "dynamic":
            return self.operator("DEQUANTIZE", [tensor], values.shape), scale
        return tensor, scale

    def bias(self, values, at, scale):
        if self.numbers != "int8":
            return self.constant(values)
        product = np.float64(np.float32(self.tensors[at][3][0])) * scale.astype(np.float64)
        q = np.round(values / product).astype(np.int32)
        return self.constant(q, "i4", scale=product, zero=np.zeros(len(scale)), axis=0)

    def conv(self, at, layer):
        source, (weight, bias) = layer.convolution, folded(layer)
        stride, kernel = source.stride[0], source.kernel_size[0]
        depthwise = source.groups > 1
        height = self.shape(at)[1]
        out = -(-height // stride)
        padding = SAME
        if stride > 1 and (self.keras or self.symmetric):
            first = 1 if self.symmetric or height % 2 else 0
            pads = self.constant([[0, 0], [first, 1], [first, 1], [0, 0]], "i4")
            n = height + first + 1
            same = {"scale": self.tensors[at][3], "zero": self.tensors[at][4]}
            at = self.operator("PAD", [at, pads], (1, n, n, self.shape(at)[3]), self.dtype, **same)
            padding = VALID
        elif kernel == 1:
            padding = VALID if self.keras else SAME
        order = "oihw->ihwo" if depthwise else "oihw->ohwi"
        tensor, scale = self.weight(np.einsum(order, weight), 3 if depthwise else 0)
        inputs = [at, tensor, self.bias(bias, at, scale)]
        activations = {"ReLU6": RELU6, "ReLU": RELU, "Identity": NONE}
        return self.operator(
            "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D",
            inputs,
            (1, out, out, source.out_channels),
            self.dtype,
            Padding=padding,
            StrideH=stride,
            StrideW=stride,
            DilationHFactor=source.dilation[0],
            DilationWFactor=source.dilation[0],
            FusedActivationFunction=(
                activations[type(layer.activation).__name__] if self.fuses else NONE
            ),
            **({"DepthMultiplier": 1} if depthwise else {}),
            **self.quantization(layer),
        )

    def pool(self, at):
        _, height, width, channels = self.shape(at)
        same = {"scale": self.tensors[at][3], "zero": self.tensors[at][4]}
        if self.keras:
            axes = self.constant([1, 2], "i4")
            return self.operator("MEAN", [at, axes], (1, channels), self.dtype, KeepDims=0, **same)
        return self.operator(
            *("AVERAGE_POOL_2D", [at], (1, 1, 1, channels), self.dtype),
            **{"Padding": VALID, "StrideH": 1, "StrideW": 1, "FusedActivationFunction": NONE},
            **{"FilterHeight": height, "FilterWidth": width, **same},
        )

    def classifier(self, at, model):
        at = self.pool(at)
        matrix, bias = model.classifier.weight.numpy(), model.classifier.bias.numpy()
        quantization = self.quantization(model)
        if self.keras:
            tensor, scale = self.weight(matrix, 0)
            at = self.operator(
                *("FULLY_CONNECTED", [at, tensor, self.bias(bias, at, scale)]),
                *((1, len(bias)), self.dtype),
                **{"FusedActivationFunction": NONE, "WeightsFormat": 0, **quantization},
            )
        else:
            tensor, scale = self.weight(matrix[:, None, None, :], 0)
            at = self.operator(
                *("CONV_2D", [at, tensor, self.bias(bias, at, scale)]),
                *((1, 1, 1, len(bias)), self.dtype),
                **{"Padding": SAME, "StrideH": 1, "StrideW": 1, "FusedActivationFunction": NONE},
                **{"DilationHFactor": 1, "DilationWFactor": 1, **quantization},
            )
            to = self.constant([1, len(bias)], "i4")
            at = self.operator("RESHAPE", [at, to], (1, len(bias)), self.dtype, **quantization)
        self.logits = at
        out = {"scale": [1 / 256], "zero": [-128]} if quantization else {}
        self.outputs = [self.operator("SOFTMAX", [at], (1, len(bias)), self.dtype, Beta=1.0, **out)]

    def deeplab(self, at, head, size):
        n = self.shape(at)[1]
        pool, aspp = self.conv(self.pool(at), head.conv_pool), self.conv(at, head.conv_aspp)

        def enlarged(tensor, side, corners):
            to = self.constant([side, side], "i4")
            shape = (1, side, side, self.shape(tensor)[3])
            return self.operator("RESIZE_BILINEAR", [tensor, to], shape, AlignCorners=corners)

        joined = self.operator(
            *("CONCATENATION", [enlarged(pool, n, True), aspp], (1, n, n, 512)),
            Axis=3,
            FusedActivationFunction=NONE,
        )
        self.logits = self.conv(self.conv(joined, head.conv_projection), head.classifier)
        large = enlarged(self.logits, size, True)
        axis = self.constant(3, "i4")
        self.outputs = [
            self.operator(
                "ARG_MAX",
                [large, axis],
                (1, size, size),
                "i8",
                OutputType=tflite.TensorType.INT64,
            )
        ]


def random_network(randomize, calibrate, head="classification", seed=0, **config):
    torch.manual_seed(seed)
    made = {
        "classification": MobileNetV2ForImageClassification,
        "segmentation": MobileNetV2ForSemanticSegmentation,
    }[head]
    values = {"depth_multiplier": 0.35, "num_labels": 5, **config}
    model = randomize(made(MobileNetV2Config(**values)))
    if head == "segmentation":
        # Its last convolution is never computed and has no statistics to take.
        backbone = model.mobilenet_v2
        last, backbone.conv_1x1 = backbone.conv_1x1, torch.nn.Identity()
        calibrate(model)
        backbone.conv_1x1 = last.eval()
        return model
    return calibrate(model)


@pytest.fixture(scope="module")
def classifier(randomize, calibrate):
    return random_network(randomize, calibrate)


@pytest.fixture
def save(tmp_path):
    """Writes a network's file."""

    def save(writer):
        path = tmp_path / "model"
        path.write_bytes(writer.file())
        return path

    return save


def read_back(path, **changes):
    checkpoint = read_checkpoint(request(path, **changes))
    return checkpoint, reference_module(checkpoint)


@pytest.mark.parametrize("keras", [False, True])
@pytest.mark.parametrize("size", [96, 97])
def test_a_float_classifier_in_the_style_of_each_converter(
    classifier, save, assert_close, keras, size
):
    writer = NetworkWriter(classifier, size, keras=keras)
    path = save(writer)
    checkpoint, ours = read_back(path)
    # The converter's explicit padding is TensorFlow's at every other size, too.
    for size_hw in ((size, size), (64, 96), (97, 131)):
        x = torch.randn(2, 3, *size_hw)
        assert_close(ours(x), classifier(x))
    assert checkpoint.config.class_names == tuple(f"LABEL_{i}" for i in range(5))
    pre = checkpoint.preprocessing
    assert (pre.shortest_edge, pre.crop_hw) == (size + 32, (size, size))
    assert (pre.mean, pre.std) == ((0.5,) * 3, (0.5,) * 3)
    assert any("takes floats" in note for note in checkpoint.notes)
    pixels = np.random.default_rng(0).uniform(-1, 1, (size, size, 3)).astype(np.float32)
    expected, _ = run_litert(interpreter(path), pixels, writer.logits)
    found = ours(torch.from_numpy(pixels.transpose(2, 0, 1)[None]))[0]
    assert_close(found, expected.reshape(-1), 1e-4)


def test_pytorch_s_padding_is_told_from_tensorflow_s(randomize, calibrate, save, assert_close):
    theirs = random_network(randomize, calibrate, tf_padding=False)
    checkpoint, ours = read_back(save(NetworkWriter(theirs, 96, symmetric=True)))
    assert checkpoint.config.network.tf_padding is False
    x = torch.randn(2, 3, 64, 96)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "config",
    [
        {"first_layer_is_expansion": False},
        {"hidden_act": "relu"},
        {"finegrained_output": False},
        {"depth_multiplier": 1.4, "num_labels": 3},
    ],
)
def test_each_kind_of_network_is_recognised(randomize, calibrate, save, assert_close, config):
    theirs = random_network(randomize, calibrate, **config)
    checkpoint, ours = read_back(save(NetworkWriter(theirs, 96)))
    found = checkpoint.config.network
    assert {name: getattr(found, name) for name in config} == config
    x = torch.randn(1, 3, 64, 96)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_a_float_deeplab_at_each_output_stride(
    randomize, calibrate, save, assert_close, output_stride
):
    theirs = random_network(
        randomize, calibrate, "segmentation", output_stride=output_stride, num_labels=21
    )
    writer = NetworkWriter(theirs, 97)
    path = save(writer)
    checkpoint, ours = read_back(path)
    assert checkpoint.config.network.output_stride == output_stride
    assert checkpoint.config.class_names[15] == "person"
    assert checkpoint.weights.align_corners
    assert checkpoint.preprocessing.shortest_edge == 97
    assert checkpoint.preprocessing.crop_hw is None
    x = torch.rand(1, 3, 97, 97) * 2 - 1
    assert_close(ours(x), theirs(x), 1e-4)
    pixels = x[0].permute(1, 2, 0).numpy()
    expected, _ = run_litert(interpreter(path), pixels, writer.logits)
    assert_close(ours(x)[0].permute(1, 2, 0), expected, 1e-4)


def layers_of(writer):
    """Returns (weight, bias) of each convolution in order, real values in float64."""
    found = []
    for kind, inputs, _, _ in writer.operators:
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            values = []
            for index in inputs[1:]:
                makers = [i for k, i, o, _ in writer.operators if o == [index]]
                shape, _, data, scale, _, axis = writer.tensors[makers[0][0] if makers else index]
                data = data.reshape(shape).astype(np.float64)
                if len(scale) and len(values) == 0:
                    along = [-1 if i == axis else 1 for i in range(data.ndim)]
                    data = data * np.float64(np.float32(scale)).reshape(along)
                    weight_scale = np.float64(np.float32(scale))
                elif len(scale):
                    data = data * (
                        np.float64(np.float32(writer.tensors[inputs[0]][3])) * weight_scale
                    )
                values.append(data.astype(np.float32))
            found.append((kind, *values))
    return found


@pytest.mark.parametrize("keras", [False, True])
@pytest.mark.parametrize("numbers", ["int8", "dynamic", "half"])
def test_weights_in_few_bits_are_dequantised_exactly(classifier, save, numbers, keras):
    writer = NetworkWriter(classifier, 96, numbers, keras=keras)
    state = read_weights(save(writer)).state
    weights = [
        v for k, v in state.items() if k.endswith(("convolution.weight", "classifier.weight"))
    ]
    biases = [v for k, v in state.items() if k.endswith(("normalization.bias", "classifier.bias"))]
    expected = layers_of(writer)
    assert len(expected) == len(weights) == len(biases) == 53
    for weight, bias, (kind, their_weight, their_bias) in zip(
        weights, biases, expected, strict=True
    ):
        order = {"CONV_2D": "oihw->ohwi", "DEPTHWISE_CONV_2D": "oihw->ihwo"}.get(kind, "oi->oi")
        if weight.ndim == 2 and kind == "CONV_2D":
            weight = weight[:, :, None, None]
        assert np.array_equal(np.einsum(order, weight.numpy()), their_weight)
        assert np.array_equal(bias.numpy(), their_bias)


@pytest.mark.parametrize("keras", [False, True])
def test_an_int8_classifier_by_channel_answers_as_litert_does(classifier, save, keras):
    writer = NetworkWriter(classifier, 96, "int8", keras=keras)
    path = save(writer)
    checkpoint, ours = read_back(path)
    assert (checkpoint.preprocessing.mean, checkpoint.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    assert not any("takes floats" in note for note in checkpoint.notes)
    theirs = interpreter(path)
    rng = np.random.default_rng(0)
    differences, spread = [], []
    for _ in range(8):
        pixels = rng.integers(-128, 128, (96, 96, 3), np.int8)
        expected, _ = run_litert(theirs, pixels, writer.logits)
        x = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 128)
        differences.append(np.abs(ours(x)[0].numpy() - expected.reshape(-1)).mean())
        spread.append(np.ptp(expected))
    mean, range_ = float(np.mean(differences)), float(np.mean(spread))
    print(
        f"\nrandom int8 network: mean |logit - LiteRT's| {mean:.4f}, logits are {range_:.2f} apart"
    )
    # Random weights are harder to quantise than trained ones. Mixed-up channels or scales would
    # put the difference near the spread itself.
    assert mean <= 0.1 * range_


@pytest.mark.parametrize(
    ("scale", "zero", "mean", "std"),
    [
        (1 / 128, 0, 0.5, 0.5),
        (1 / 127.5, -1, 0.5, 0.5),
        (1 / 255, -128, 0.0, 1.0),
        (1.0, -128, 0.0, 1 / 255),
    ],
)
def test_a_quantised_input_says_what_a_pixel_stands_for(classifier, save, scale, zero, mean, std):
    writer = NetworkWriter(classifier, 96, "int8")
    shape, dtype, data, _, _, axis = writer.tensors[writer.inputs[0]]
    writer.tensors[writer.inputs[0]] = (shape, dtype, data, [scale], [zero], axis)
    pre = read_checkpoint(request(save(writer))).preprocessing
    assert pre.mean == pytest.approx((mean,) * 3, abs=1e-6)
    assert pre.std == pytest.approx((std,) * 3, rel=1e-6)


@pytest.mark.parametrize("numbers", ["int8", "float"])
def test_an_activation_may_be_left_to_rounding(randomize, calibrate, save, numbers):
    theirs = random_network(randomize, calibrate)
    path = save(NetworkWriter(theirs, 96, numbers, fuses=False))
    if numbers == "float":
        with pytest.raises(CheckpointError, match="first_conv has another activation"):
            read_weights(path)
    else:
        assert read_weights(path).config["hidden_act"] == "relu6"


def test_labels_of_one_s_own_and_no_variant(classifier, save):
    path = save(NetworkWriter(classifier, 96))
    names = ("a", "b", "c", "d", "e")
    assert read_back(path, labels=Labels(names, None))[0].config.class_names == names
    with pytest.raises(CheckpointError, match="this one says what it is"):
        read_checkpoint(request(path, variant="0.35"))
    with pytest.raises(CheckpointError, match="no segmentation head"):
        read_checkpoint(request(path, task="segmentation"))
    assert read_back(path, task="features")[0].config.class_names == ()


def change(index, **options):
    def apply(writer):
        kind, inputs, outputs, old = writer.operators[index]
        writer.operators[index] = (kind, inputs, outputs, {**old, **options})

    return apply


def rename(index, kind):
    def apply(writer):
        _, *rest, options = writer.operators[index]
        options = {k: v for k, v in options.items() if k != "DepthMultiplier"}
        writer.operators[index] = (kind, *rest, options)

    return apply


def rewire(index, *inputs):
    def apply(writer):
        kind, old, *rest = writer.operators[index]
        writer.operators[index] = (kind, [old[i] if i >= 0 else -1 for i in inputs], *rest)

    return apply


def two_inputs(writer):
    writer.inputs = writer.inputs * 2


def another_output(writer):
    writer.outputs = [writer.operators[4][2][0]]


# In the order of the writer: 0 stem, 1 depthwise, 2 project, 3 expand, 4 depthwise of block 0.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(0, StrideH=1, StrideW=1), "first_conv has stride 1"),
        (change(0, StrideW=1), "stride or dilation that is not square"),
        (change(0, Padding=VALID), r"first_conv has the padding \[\]"),
        (change(1, Padding=VALID), "conv_stem.conv_3x3 has no padding"),
        (change(1, DilationHFactor=2, DilationWFactor=2), "conv_3x3 has stride 1, dilation 2"),
        (change(3, FusedActivationFunction=RELU), "layer.0.expand_1x1 has another activation"),
        (change(3, FusedActivationFunction=4), "activation 4 of the schema"),
        (change(2, FusedActivationFunction=RELU6), "reduce_1x1 has another activation than none"),
        (change(4, DilationHFactor=2, DilationWFactor=2), "its blocks have strides and dilations"),
        (
            rename(0, "DEPTHWISE_CONV_2D"),
            "after the input comes DEPTHWISE_CONV_2D, expected CONV_2D",
        ),
        (rename(4, "CONV_2D"), "expected DEPTHWISE_CONV_2D"),
        (rename(-1, "TANH"), "after the classifier comes TANH, expected the output"),
        (rewire(1, 0), "conv_3x3 has no constant weight of 4 axes"),
        (rewire(1, 0, -1, 2), "conv_3x3 has no constant weight of 4 axes"),
        (rewire(1, 0, 1, 1), "has no constant bias of 16 values"),
        (change(-4, FilterHeight=1), "AVERAGE_POOL_2D does not pool the whole map"),
        (two_inputs, "2 inputs, 1 outputs"),
        (another_output, "expected the output"),
    ],
)
def test_another_network_is_refused_with_what_differs(classifier, save, damage, message):
    writer = NetworkWriter(classifier, 96)
    damage(writer)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(save(writer))
    assert "\n" not in str(caught.value)
    assert "DeepLab" in caught.value.hint


def test_a_residual_that_is_missing_is_refused(classifier, save):
    writer = NetworkWriter(classifier, 96)
    [first, *_] = [i for i, (kind, *_) in enumerate(writer.operators) if kind == "ADD"]
    _, (at, _), outputs, _ = writer.operators[first]
    other = writer.operators[0][2][0]
    writer.operators[first] = ("ADD", [at, other], outputs, {"FusedActivationFunction": NONE})
    with pytest.raises(CheckpointError, match=r"layer\.1 adds something else than its input"):
        read_weights(save(writer))


def test_operators_in_a_circle_are_refused(classifier, save):
    writer = NetworkWriter(classifier, 96)
    _, inputs, _, _ = writer.operators[-1]
    writer.operators[-1] = ("RESHAPE", inputs, inputs, {})
    with pytest.raises(CheckpointError, match=r"circle|comes"):
        read_weights(save(writer))


def test_a_deeplab_that_joins_in_another_order_is_refused(randomize, calibrate, save):
    writer = NetworkWriter(random_network(randomize, calibrate, "segmentation"), 97)
    [joins] = [op for op in writer.operators if op[0] == "CONCATENATION"]
    joins[1].reverse()
    with pytest.raises(CheckpointError, match="does not join image pooling and the 1x1 branch"):
        read_weights(save(writer))


@pytest.fixture(scope="module")
def small_file(classifier):
    with torch.no_grad():
        return NetworkWriter(classifier, 96, "int8").file()


def outcome(path):
    """Reads a file; returns None or the message, and lets no other error out."""
    message = None
    try:
        read_weights(path)
    except CheckpointError as error:
        message = str(error)
    assert message is None or (str(path) in message and "\n" not in message)
    return message


@pytest.mark.parametrize("part", [0.00001, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, small_file, part):
    path = tmp_path / "a.tflite"
    path.write_bytes(small_file[: max(9, int(len(small_file) * part))])
    assert outcome(path)


def test_a_damaged_file_is_read_or_refused(tmp_path, small_file):
    """Whatever a flipped byte of the structure leads to, no other error comes out."""
    path = tmp_path / "a.tflite"
    rng = random.Random(0)
    refused = 0
    # Weights are most of the file, and any bytes are weights: what comes before them is not.
    for _ in range(400):
        data = bytearray(small_file)
        for _ in range(rng.choice((1, 1, 4))):
            at = rng.randrange(8, 60_000)
            data[at] = rng.choice((0, 0x7F, 0x80, 0xFF, data[at] ^ 0x01))
        path.write_bytes(data)
        refused += outcome(path) is not None
    assert 0 < refused < 400


@pytest.mark.parametrize("content", [b"\0\0\0\0TFL3\0", b"\x10\0\0\0TFL3" + bytes(64)])
def test_a_file_of_nothing_but_its_mark_is_refused(tmp_path, content):
    path = tmp_path / "a.tflite"
    path.write_bytes(content)
    assert outcome(path)


def test_a_list_that_would_never_end_is_refused(tmp_path, classifier):
    writer = NetworkWriter(classifier, 96)
    writer.operators *= 20
    path = tmp_path / "a.tflite"
    path.write_bytes(writer.file())
    assert "expected at most 1024" in outcome(path)


def test_without_the_package_the_way_to_it_is_said(tmp_path, small_file, monkeypatch):
    path = tmp_path / "a.tflite"
    path.write_bytes(small_file)
    monkeypatch.setitem(sys.modules, "tflite", None)
    with pytest.raises(CheckpointError, match="TFLite file, and tflite cannot") as caught:
        read_weights(path)
    assert "segcli[export]" in caught.value.hint


def test_the_export_of_a_small_file(classifier, save, relative):
    path = save(NetworkWriter(classifier, 96, keras=True))
    report = export_model(request(path))
    assert report.card.variant == "0.35"
    x = torch.randn(2, 3, 64, 96)
    [found] = Session(report.data, device="cpu").run(x.numpy())
    assert relative(found, classifier(x)) <= 1e-4
    assert Path(path).suffix == ""
