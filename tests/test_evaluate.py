import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import TruthError, UsageError
from segcli.evaluate import (
    Hits,
    accuracy_per_class,
    confusion_matrix,
    figures,
    has_background,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    reduce_labels,
    true_rank,
)
from segcli.labels import dataset_labels


@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_figures_follow_the_formula_pixel_by_pixel(seed, num_classes, wide):
    rng = np.random.default_rng(seed)
    dtype = np.int32 if wide else np.uint8
    present = rng.integers(1, num_classes + 1)
    truth = rng.integers(0, present, (5, 7)).astype(dtype)
    truth[rng.random((5, 7)) < 0.2] = 255
    prediction = rng.integers(0, present, (5, 7)).astype(np.uint8)

    pairs = [
        (int(t), int(p)) for t, p in zip(truth.ravel(), prediction.ravel(), strict=True) if t != 255
    ]
    ious, accuracies = [], []
    for k in range(num_classes):
        both = sum(t == k and p == k for t, p in pairs)
        either = sum(t == k or p == k for t, p in pairs)
        true = sum(t == k for t, p in pairs)
        ious.append(both / either if either else np.nan)
        accuracies.append(both / true if true else np.nan)

    confusion = confusion_matrix(truth, prediction, num_classes)
    assert confusion.dtype == np.int64
    assert confusion.sum() == len(pairs)
    np.testing.assert_allclose(iou_per_class(confusion), ious)
    np.testing.assert_allclose(accuracy_per_class(confusion), accuracies)
    if pairs:
        present_ious = [v for v in ious if v == v]
        assert mean_iou(confusion) == pytest.approx(sum(present_ious) / len(present_ious))
        present_accuracies = [v for v in accuracies if v == v]
        assert mean_accuracy(confusion) == pytest.approx(
            sum(present_accuracies) / len(present_accuracies)
        )
        right = sum(t == p for t, p in pairs) / len(pairs)
        assert pixel_accuracy(confusion) == pytest.approx(right)


def test_rows_are_truth_and_columns_prediction():
    confusion = confusion_matrix(np.array([0, 0, 2, 255]), np.array([1, 1, 2, 0]), 3)
    np.testing.assert_array_equal(confusion, [[0, 2, 0], [0, 0, 0], [0, 0, 1]])


def test_matrices_of_several_images_add_up():
    truth = np.array([[0, 1, 1], [1, 255, 0]])
    prediction = np.array([[0, 0, 1], [1, 1, 1]])
    whole = confusion_matrix(truth, prediction, 2)
    parts = [confusion_matrix(t, p, 2) for t, p in zip(truth, prediction, strict=True)]
    np.testing.assert_array_equal(sum(parts), whole)


def test_class_that_is_only_predicted_counts_in_the_mean_iou_alone():
    confusion = confusion_matrix(np.array([0, 0]), np.array([0, 1]), 3)
    np.testing.assert_array_equal(iou_per_class(confusion), [0.5, 0, np.nan])
    assert mean_iou(confusion) == 0.25
    np.testing.assert_array_equal(accuracy_per_class(confusion), [0.5, np.nan, np.nan])
    assert mean_accuracy(confusion) == 0.5


def test_nothing_but_void_gives_nan_without_a_warning():
    confusion = confusion_matrix(np.full((2, 2), 255), np.zeros((2, 2), int), 3)
    for figure in (mean_iou, mean_accuracy, pixel_accuracy):
        assert np.isnan(figure(confusion))


def test_other_ignore_index_makes_255_an_error():
    truth, prediction = np.array([0, 255]), np.array([1, 1])
    assert confusion_matrix(truth, prediction, 2, ignore_index=255).sum() == 1
    with pytest.raises(TruthError, match="truth holds the value 255"):
        confusion_matrix(truth, prediction, 2, ignore_index=0)
    with pytest.raises(TruthError, match="truth holds the value 255"):
        confusion_matrix(truth, prediction, 2, ignore_index=None)


def test_values_that_are_no_class_are_named():
    ids = np.array([[0, 1]])
    with pytest.raises(TruthError, match=r"truth holds the value 7, expected .* 0\.\.1"):
        confusion_matrix(np.array([[0, 7]]), ids, 2)
    with pytest.raises(TruthError, match="truth holds the value -1"):
        confusion_matrix(np.array([[0, -1]]), ids, 2)
    with pytest.raises(UsageError, match="prediction holds the value 2"):
        confusion_matrix(ids, np.array([[0, 2]]), 2)


def test_wrong_prediction_under_void_does_not_matter():
    assert confusion_matrix(np.array([255, 1]), np.array([9, 1]), 2).sum() == 1


def test_shapes_must_agree():
    with pytest.raises(TruthError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)


def test_no_overflow_with_small_dtypes():
    truth = np.full(70000, 199, np.uint8)
    confusion = confusion_matrix(truth, truth, 200)
    assert confusion[199, 199] == 70000
    assert confusion.sum() == 70000


def scenes(seed, num_classes, images=4, *, reduced=False):
    """Truth with void and without some classes, and predictions that are partly right."""
    rng = np.random.default_rng(seed)
    present = rng.integers(1, num_classes + 1)
    for _ in range(images):
        shape = tuple(rng.integers(1, 30, 2))
        truth = rng.integers(0, present, shape).astype(np.uint8)
        wrong = rng.integers(0, num_classes, shape).astype(np.uint8)
        prediction = np.where(rng.random(shape) < 0.6, truth, wrong)
        if reduced:
            truth += np.uint8(1)
        truth[rng.random(shape) < 0.2] = 255
        if reduced:
            truth[rng.random(shape) < 0.1] = 0
        yield truth, prediction


def mmseg_figures(pairs, num_classes, *, reduced):
    """The algorithm of mmsegmentation's IoUMetric: histograms of areas, over the whole set."""
    total = np.zeros((4, num_classes))
    for label, pred in pairs:
        label = label.astype(np.int64)
        if reduced:
            label[label == 0] = 255
            label = label - 1
            label[label == 254] = 255
        mask = label != 255
        pred, label = pred[mask].astype(np.int64), label[mask]
        intersect = pred[pred == label]
        areas = [
            np.array([(values == k).sum() for k in range(num_classes)], np.float64)
            for values in (intersect, pred, label)
        ]
        total += np.stack([areas[0], areas[1] + areas[2] - areas[0], areas[1], areas[2]])
    with np.errstate(invalid="ignore"):
        iou, acc = total[0] / total[1], total[0] / total[3]
        overall = total[0].sum() / total[3].sum()
    return iou, acc, overall


def hugging_face_figures(pairs, num_labels, *, reduced):
    """The algorithm of Hugging Face evaluate's mean_iou: np.histogram with the range (0, C - 1)."""
    sums = [np.zeros(num_labels) for _ in range(4)]
    for label, pred in pairs:
        label, pred = label.astype(np.int64), pred.astype(np.int64)
        if reduced:
            label[label == 0] = 255
            label = label - 1
            label[label == 254] = 255
        keep = np.not_equal(label, 255)
        pred, label = pred[keep], label[keep]
        intersect = pred[pred == label]
        area_intersect, area_pred, area_label = (
            np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
            for values in (intersect, pred, label)
        )
        for total, area in zip(
            sums,
            (area_intersect, area_pred + area_label - area_intersect, area_pred, area_label),
            strict=True,
        ):
            total += area
    with np.errstate(invalid="ignore"):
        return sums[0] / sums[1], sums[0] / sums[3], sums[0].sum() / sums[3].sum()


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("peer", [mmseg_figures, hugging_face_figures])
@given(seed=st.integers(0, 2**32), num_classes=st.integers(2, 150))
def test_figures_are_those_of_other_programs(peer, reduced, seed, num_classes):
    pairs = list(scenes(seed, num_classes, reduced=reduced))
    iou, accuracy, overall = peer(pairs, num_classes, reduced=reduced)
    confusion = sum(
        confusion_matrix(reduce_labels(truth) if reduced else truth, prediction, num_classes)
        for truth, prediction in pairs
    )
    close = {"rtol": 0, "atol": 1e-9, "equal_nan": True}
    np.testing.assert_allclose(iou_per_class(confusion), iou, **close)
    np.testing.assert_allclose(accuracy_per_class(confusion), accuracy, **close)
    np.testing.assert_allclose(pixel_accuracy(confusion), overall, **close)
    if np.isfinite(iou).any():
        np.testing.assert_allclose(mean_iou(confusion), np.nanmean(iou), **close)
    if np.isfinite(accuracy).any():
        np.testing.assert_allclose(mean_accuracy(confusion), np.nanmean(accuracy), **close)


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 6))
def test_matrices_of_images_sum_to_that_of_all_their_pixels(seed, num_classes, images):
    pairs = list(scenes(seed, num_classes, images))
    whole = confusion_matrix(
        *(np.concatenate([a.ravel() for a in arrays]) for arrays in zip(*pairs, strict=True)),
        num_classes,
    )
    np.testing.assert_array_equal(sum(confusion_matrix(*p, num_classes) for p in pairs), whole)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_reduced_labels_count_from_zero_and_keep_void(dtype):
    truth = np.array([[0, 1, 2], [150, 254, 255]], dtype)
    np.testing.assert_array_equal(reduce_labels(truth), [[255, 0, 1], [149, 253, 255]])
    assert truth[0, 0] == 0


def test_reduced_labels_have_no_room_above_void():
    with pytest.raises(TruthError, match="the value 300, expected at most 255"):
        reduce_labels(np.array([[0, 300]], np.uint16))


def test_report_is_json_without_nan():
    confusion = confusion_matrix(np.array([0, 0, 1, 255]), np.array([0, 1, 1, 1]), 3)
    report = json.loads(json.dumps(figures(confusion, ("a", "b", "c")), allow_nan=False))
    assert report["miou"] == 0.5
    assert report["mean_accuracy"] == 0.75
    assert report["pixel_accuracy"] == pytest.approx(2 / 3)
    assert report["pixels"] == 3
    assert report["classes"][1] == {
        "class_id": 1,
        "name": "b",
        "iou": 0.5,
        "accuracy": 1.0,
        "pixels": 1,
    }
    assert report["classes"][2]["iou"] is None
    empty = figures(np.zeros((1, 1), np.int64), ("a",))
    assert (empty["miou"], empty["pixel_accuracy"]) == (None, None)


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_rank_is_the_place_in_a_stable_sort(seed, num_classes):
    # Few different values, so that ties occur.
    logits = np.random.default_rng(seed).integers(0, 4, num_classes).astype(np.float32)
    order = np.argsort(-logits, kind="stable").tolist()
    assert [true_rank(logits, i) for i in order] == list(range(num_classes))


def test_rank_of_no_class_is_refused():
    with pytest.raises(TruthError, match=r"the value 1000, expected class ids 0\.\.999"):
        true_rank(np.zeros(1000), 1000)


def test_hits_count_the_first_and_the_first_five():
    hits = Hits()
    for rank in (0, 0, 1, 4, 5, 900):
        hits = hits.plus(rank)
    assert hits == (6, 2, 4)
    assert hits.figures() == {"top1": 2 / 6, "top5": 4 / 6, "images": 6}
    assert Hits().figures() == {"top1": None, "top5": None, "images": 0}


def test_background_is_dropped_from_1001_against_1000():
    names = ("background", *(f"class {i}" for i in range(1000)))
    assert has_background(names, 1000)
    logits = np.zeros(1001)
    logits[0], logits[8] = 9, 5
    assert true_rank(logits[1:], 7) == 0
    assert not has_background(names, 1001)
    assert not has_background(("tench", *names[1:]), 1000)
    # Background is one of Pascal VOC's own classes.
    assert not has_background(dataset_labels("voc").names, 21)
