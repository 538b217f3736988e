import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import UsageError
from segcli.evaluate import (
    accuracy_per_class,
    confusion_matrix,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)


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
    with pytest.raises(UsageError, match="truth holds the value 255"):
        confusion_matrix(truth, prediction, 2, ignore_index=0)
    with pytest.raises(UsageError, match="truth holds the value 255"):
        confusion_matrix(truth, prediction, 2, ignore_index=None)


def test_values_that_are_no_class_are_named():
    ids = np.array([[0, 1]])
    with pytest.raises(UsageError, match=r"truth holds the value 7, expected .* 0\.\.1"):
        confusion_matrix(np.array([[0, 7]]), ids, 2)
    with pytest.raises(UsageError, match="truth holds the value -1"):
        confusion_matrix(np.array([[0, -1]]), ids, 2)
    with pytest.raises(UsageError, match="prediction holds the value 2"):
        confusion_matrix(ids, np.array([[0, 2]]), 2)


def test_wrong_prediction_under_void_does_not_matter():
    assert confusion_matrix(np.array([255, 1]), np.array([9, 1]), 2).sum() == 1


def test_shapes_must_agree():
    with pytest.raises(UsageError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)


def test_no_overflow_with_small_dtypes():
    truth = np.full(70000, 199, np.uint8)
    confusion = confusion_matrix(truth, truth, 200)
    assert confusion[199, 199] == 70000
    assert confusion.sum() == 70000
