import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import segcli
from segcli import load
from segcli.artifact import Preprocessing
from segcli.errors import (
    ArtifactError,
    ImageDecodeError,
    ImageMissing,
    InferenceError,
    ModelNotFound,
    UsageError,
)
from segcli.model import Model
from segcli.postprocess import argmax_class_map
from segcli.protocol import Protocol


@pytest.fixture
def image():
    """(6, 8, 3): left half red, right half blue."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4, 0] = 255
    pixels[:, 4:, 2] = 255
    return pixels


@pytest.fixture
def change():
    """Edits a model file in place."""

    def edit(path, function):
        model = onnx.load(path)
        function(model.graph)
        onnx.save(model, path)
        return path

    return edit


def keep_channels(count):
    """Makes a graph give its first channels only."""

    def edit(graph):
        weights = np.eye(3, dtype=np.float32)[:count, :, None, None]
        del graph.node[:]
        graph.node.append(helper.make_node("Conv", ["pixel_values", "w"], ["logits"]))
        graph.initializer.append(numpy_helper.from_array(weights, "w"))
        graph.output[0].type.tensor_type.shape.dim[1].dim_value = count

    return edit


def test_lazy_names():
    assert set(segcli.__all__) <= {*dir(segcli), *segcli._HOMES}
    for name in segcli.__all__:
        assert getattr(segcli, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = segcli.nonsense


def test_segmentation(tiny_model, image):
    model = load(tiny_model())
    result = model(image)
    assert isinstance(result, segcli.Segmentation)
    assert result.class_map.dtype == np.uint8
    assert (result.class_map == [0, 0, 0, 0, 2, 2, 2, 2]).all()
    assert [(c.name, c.pixels, c.fraction) for c in result.classes] == [
        ("red", 24, 0.5),
        ("blue", 24, 0.5),
    ]
    assert result.provider == model.provider
    overlay = result.overlay()
    assert (overlay.shape, overlay.dtype) == (image.shape, np.uint8)
    assert (result.overlay(0.0) == image).all()
    assert (result.overlay(1.0)[0, 0] == (200, 0, 0)).all()


def test_path_of_an_image(tiny_model, picture, image, tmp_path):
    model = load(str(tiny_model()), device="cpu", threads=1)
    path = picture()
    for given in (path, str(path)):
        assert (model(given).class_map == model(image).class_map).all()
    with pytest.raises(ImageMissing):
        model(tmp_path / "none.png")
    path.write_bytes(b"no picture")
    with pytest.raises(ImageDecodeError):
        model(path)


def test_default_model_needs_no_network(image):
    result = load(offline=True)(image)
    assert result.class_map.shape == (6, 8)
    assert "sky" in result.class_names


def test_classification(tiny_model, image):
    result = load(tiny_model(task="classification", palette=()))(image)
    assert isinstance(result, segcli.Classification)
    assert [label.name for label in result.labels[:5]] == ["red", "blue", "green"]
    assert result.labels[0].score == result.labels[1].score > result.labels[2].score
    assert sum(label.score for label in result.labels) == pytest.approx(1)
    assert result.size_hw == (6, 8)


def test_image_is_not_changed(tiny_model, image):
    before = image.copy()
    image.flags.writeable = False
    load(tiny_model())(image).overlay()
    assert (image == before).all()


def test_strided_image(tiny_model, image):
    model = load(tiny_model())
    found = model(image[::-1, ::-1]).class_map
    assert (found == [2, 2, 2, 2, 0, 0, 0, 0]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((6, 8), np.uint8),
        np.zeros((6, 8, 4), np.uint8),
        np.zeros((3, 6, 8), np.uint8),
        np.zeros((1, 6, 8, 3), np.uint8),
        np.zeros((6, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=lambda a: f"{a.shape}{a.dtype}",
)
def test_wrong_arrays(tiny_model, wrong):
    with pytest.raises(UsageError, match=r"expected \(H, W, 3\) uint8 RGB"):
        load(tiny_model())(wrong)


def test_unknown_and_missing(tmp_path):
    with pytest.raises(ModelNotFound, match="the nearest names are"):
        load("nonsense")
    with pytest.raises(ModelNotFound, match="no model file at"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelNotFound, match="--offline"):
        load("segformer-b2", offline=True)


@pytest.mark.parametrize("keep", [0, 1, 10, 0.3, 0.5, 0.8, 0.99, -1])
def test_cut_file(tiny_model, keep):
    path = tiny_model()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ArtifactError):
        load(path)


def test_file_of_something_else(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(ArtifactError):
        load(path)


def test_fixed_size_graph(tiny_model, change, image):
    def fix(graph):
        for value in (graph.input[0], graph.output[0]):
            for axis, size in ((2, 6), (3, 8)):
                value.type.tensor_type.shape.dim[axis].dim_value = size

    model = load(change(tiny_model(), fix))
    assert model.session.input_hw == (6, 8)
    assert model(image).class_map.shape == (6, 8)
    with pytest.raises(InferenceError, match=r"takes 6x8 only.*shown 5x8"):
        model(image[:5])
    squash = Preprocessing(resize="squash", size_hw=(6, 8))
    model = load(change(tiny_model(preprocessing=squash), fix))
    assert model(image[:3]).class_map.shape == (3, 8)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_card_of_another_class_count(tiny_model, task):
    names = ("one", "two")
    palette = ((1, 1, 1), (2, 2, 2)) if task == "segmentation" else ()
    # Before an image is read: the fault is the file's, not each image's.
    with pytest.raises(ArtifactError, match="gives 3 classes, its card names 2"):
        load(tiny_model(task=task, class_names=names, palette=palette))


def test_card_of_other_outputs(tiny_model):
    with pytest.raises(ArtifactError, match="its card says pixel_values, scores"):
        load(tiny_model(output_names=("scores",)))


def test_card_of_another_task(tiny_model, change, image):
    path = tiny_model()
    model = onnx.load(path)
    del model.graph.node[:]
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    model.graph.initializer.append(axes)
    model.graph.node.append(
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)
    )
    for _ in range(2):
        model.graph.output[0].type.tensor_type.shape.dim.pop()
    onnx.save(model, path)
    with pytest.raises(InferenceError, match="expected 4 dimensions"):
        load(path)(image)


def test_one_channel_sigmoid(tiny_model, change, image):
    shift = Preprocessing(resize="none", mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    path = tiny_model(
        class_names=("background", "red"),
        palette=((0, 0, 0), (200, 0, 0)),
        activation="sigmoid",
        preprocessing=shift,
    )
    result = load(change(path, keep_channels(1)))(image)
    assert (result.class_map == [1, 1, 1, 1, 0, 0, 0, 0]).all()
    assert {c.name for c in result.classes} == {"background", "red"}


def test_features_are_the_outputs_by_name(tiny_model, image):
    model = load(tiny_model(task="features", class_names=(), palette=()), device="cpu")
    found = model(image)
    assert (found.size_hw, found.provider) == ((6, 8), "CPUExecutionProvider")
    assert list(found.outputs) == ["logits"]
    np.testing.assert_allclose(found.outputs["logits"], image.mean((0, 1)) / 255, atol=1e-6)


def test_features_that_are_not_finite(tiny_model, image, monkeypatch):
    model = load(tiny_model(task="features", class_names=(), palette=()), device="cpu")
    monkeypatch.setattr(model.session, "run", lambda batch: [np.full((1, 3, 2, 2), np.nan)])
    with pytest.raises(InferenceError, match="logits is not finite"):
        model(image)


def test_graph_that_fails(tiny_model, change, image):
    def reshape(graph):
        shape = numpy_helper.from_array(np.array([1, 3, 7, 7], np.int64), "shape")
        graph.initializer.append(shape)
        del graph.node[:]
        graph.node.append(helper.make_node("Reshape", ["pixel_values", "shape"], ["logits"]))

    with pytest.raises(InferenceError, match="the model failed"):
        load(change(tiny_model(), reshape))(image)


def test_several_threads_share_a_model(tiny_model, image):
    from concurrent.futures import ThreadPoolExecutor

    model = load(tiny_model(), threads=1)
    images = [np.roll(image, i, axis=1) for i in range(8)] * 4
    with ThreadPoolExecutor(4) as pool:
        for given, result in zip(images, pool.map(model, images), strict=True):
            assert (result.class_map == np.where(given[..., 0] > 0, 0, 2)).all()


@pytest.fixture
def on_device(monkeypatch):
    """Takes the CPU for the GPU that makes class maps itself."""
    from segcli.session import CPU

    monkeypatch.setattr("segcli.model.CUDA", CPU)


def test_a_class_map_made_on_the_device_is_the_same(tiny_model, image, on_device, monkeypatch):
    from segcli.session import Session

    model, made = load(tiny_model(), device="cpu"), []
    real = Session.class_maps
    monkeypatch.setattr(
        Session, "class_maps", lambda self, *args: made.extend(args[1]) or real(self, *args)
    )
    assert model.maps_on_device
    result = model(image, size_hw=(12, 16))
    assert made[-1] == (12, 16)
    assert result.class_map.dtype == np.uint8
    assert (result.class_map[:, :7] == 0).all()
    assert (result.class_map[:, 9:] == 2).all()


def test_a_device_whose_maps_are_wrong_is_not_trusted(tiny_model, image, on_device, monkeypatch):
    from segcli.session import Session

    monkeypatch.setattr(
        Session, "class_maps", lambda self, batch, sizes: [np.ones(s, np.int32) for s in sizes]
    )
    model = load(tiny_model(), device="cpu")
    assert not model.maps_on_device
    assert (model(image).class_map == [0, 0, 0, 0, 2, 2, 2, 2]).all()


def test_what_fails_on_the_device_is_done_on_the_cpu(tiny_model, image, on_device, monkeypatch):
    from segcli.session import Session

    model = load(tiny_model(), device="cpu")
    assert model.maps_on_device

    def out_of_memory(self, batch, sizes_hw):
        raise InferenceError("no memory")

    monkeypatch.setattr(Session, "class_maps", out_of_memory)
    assert (model(image).class_map == [0, 0, 0, 0, 2, 2, 2, 2]).all()


@pytest.mark.parametrize(
    "card",
    [
        {"align_corners": True},
        {"activation": "sigmoid", "class_names": list("abcd"), "palette": [[0, 0, 0]] * 4},
        {"task": "classification", "palette": ()},
    ],
    ids=lambda card: next(iter(card)),
)
def test_only_plain_class_maps_are_made_on_the_device(tiny_model, on_device, card):
    assert not load(tiny_model(**card), device="cpu").maps_on_device


def test_the_cpu_makes_class_maps_itself(tiny_model):
    assert not load(tiny_model(), device="cpu").maps_on_device


@pytest.fixture
def accelerator(monkeypatch):
    """Makes the CPU pass for an accelerator, on which images go through the network together."""
    monkeypatch.setattr("segcli.model.CPU", "none")


@pytest.fixture
def runs(monkeypatch):
    """The shapes of all batches that a session runs."""
    from segcli.session import Session

    shapes, real = [], Session.run
    monkeypatch.setattr(
        Session, "run", lambda self, batch: shapes.append(batch.shape) or real(self, batch)
    )
    return shapes


def noise(*sizes_hw):
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes_hw]


MIXED = ((4, 5), (6, 7), (4, 5), (4, 5))


def test_images_of_one_size_go_through_an_accelerator_together(tiny_model, accelerator, runs):
    model, images = load(tiny_model(), device="cpu"), noise(*MIXED)
    sizes = [(9, 9), (6, 7), (4, 5), (8, 3)]
    answers = model.answer(images, sizes)
    assert sorted(runs) == [(1, 3, 6, 7), (3, 3, 4, 5)]
    for answer, image, size in zip(answers, images, sizes, strict=True):
        assert answer.image is image
        assert (answer.class_map == model(image, size_hw=size).class_map).all()


def test_images_go_through_the_cpu_one_by_one(tiny_model, runs):
    load(tiny_model(), device="cpu").answer(noise(*MIXED), list(MIXED))
    assert [shape[0] for shape in runs] == [1, 1, 1, 1]


def test_class_maps_of_a_batch_made_on_the_device(tiny_model, accelerator, on_device, runs):
    model, images = load(tiny_model(), device="cpu"), noise(*MIXED)
    assert model.maps_on_device
    runs.clear()
    answers = model.answer(images, [(9, 9)] * 4)
    assert not runs
    for answer, image in zip(answers, images, strict=True):
        expected = argmax_class_map(model.infer(model.prepare(image))[0], (9, 9))
        assert (answer.class_map == expected).all()


def test_one_image_that_fails_does_not_fail_its_batch(tiny_model, accelerator, monkeypatch):
    model, images = load(tiny_model(), device="cpu"), noise(*MIXED)
    real = Model.infer

    def no_memory_for_two(self, pixel_values):
        if len(pixel_values) > 1 or np.array_equal(pixel_values, pixel_values_of_last):
            raise InferenceError("no memory")
        return real(self, pixel_values)

    pixel_values_of_last = model.prepare(images[3])
    monkeypatch.setattr(Model, "infer", no_memory_for_two)
    answers = model.answer(images, list(MIXED))
    assert [isinstance(a, InferenceError) for a in answers] == [False, False, False, True]


def test_want_of_memory_is_the_images_error(tiny_model, monkeypatch):
    def no_memory(*_args, **_more):
        raise MemoryError

    monkeypatch.setattr("segcli.model.argmax_class_map", no_memory)
    with pytest.raises(InferenceError, match="not enough memory"):
        load(tiny_model(), device="cpu")(noise((4, 5))[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_on_the_device_too(tiny_model, bad):
    session = load(tiny_model(), device="cpu").session
    batch = np.zeros((1, 3, 4, 5), np.float32)
    assert (session.class_maps(batch, [(8, 10)])[0] == 0).all()
    batch[0, 1, 2, 3] = bad
    with pytest.raises(InferenceError, match="not finite"):
        session.class_maps(batch, [(8, 10)])


def test_mean_confidence_is_of_the_logits_own_grid(tiny_model, image):
    model = Model.open(tiny_model())
    [answer] = model.answer([image], [(6, 8)], mean_confidence=True)
    logits = model.infer(model.prepare(image))[0].astype(np.float64)
    odds = np.exp(logits - logits.max(axis=0))
    _, second, best = np.sort(odds / odds.sum(axis=0), axis=0)
    assert answer.confidence is None
    assert answer.mean_confidence == pytest.approx((best - second).mean(), abs=1e-6)
    np.testing.assert_array_equal(answer.class_map, model(image).class_map)


def test_mean_confidence_of_a_confidence_map_is_its_mean(tiny_model, image):
    model = Model.open(tiny_model())
    [answer] = model.answer([image], [(6, 8)], confidence=True, mean_confidence=True)
    assert answer.mean_confidence == pytest.approx(answer.confidence.mean(), abs=1e-6)
    [answer] = model.answer(
        [image], [(6, 8)], Protocol(flip=True), confidence=False, mean_confidence=True
    )
    assert answer.mean_confidence == pytest.approx(answer.confidence.mean(), abs=1e-6)
