import numpy as np
import pytest

from segcli.confusion_picture import draw_confusion
from segcli.labels import dataset_labels

DARK, WHITE, GREY = [8, 48, 107], [255, 255, 255], [222, 222, 222]


def cell_colors(confusion, cell):
    """The color of each cell, from its corner: the number, if any, stands in the middle."""
    names = [f"class {i}" for i in range(len(confusion))]
    picture = draw_confusion(np.array(confusion, np.int64), names)
    side = cell * len(names)
    # 20 pixels of margin lie below the matrix and, where it is the widest part, beside it.
    top = picture.shape[0] - 20 - side
    left = picture.shape[1] - 20 - side
    return picture, picture[top + 2 : top + side : cell, left + 2 : left + side : cell]


def test_rows_are_shares_of_the_truth():
    # Many pixels or few, a row has the same colors.
    confusion = np.zeros((20, 20), int)
    confusion[0, 0], confusion[1, 1], confusion[2, 7] = 5, 10**9, 3
    confusion[3, 3] = confusion[3, 19] = 50
    _, cells = cell_colors(confusion, 40)
    assert cells[0, 0].tolist() == cells[1, 1].tolist() == cells[2, 7].tolist() == DARK
    assert cells[2, 2].tolist() == WHITE
    assert cells[3, 3].tolist() == cells[3, 19].tolist() == [74, 152, 201]
    assert (cells[4:] == GREY).all()


def test_darkness_grows_with_the_share():
    confusion = np.zeros((20, 20), int)
    confusion[0] = np.arange(20)
    _, cells = cell_colors(confusion, 40)
    assert (np.diff(cells[0].astype(int).sum(axis=-1)) < 0).all()


def test_many_classes_have_closer_cells_without_numbers():
    confusion = np.full((150, 150), 1)
    np.fill_diagonal(confusion, 10**6)
    picture, cells = cell_colors(confusion, 18)
    assert (cells[np.arange(150), np.arange(150)] == cells[0, 0]).all()
    corner = picture[-20 - 18 : -21, -20 - 18 : -21]
    assert (corner == corner[0, 0]).all()
    few = draw_confusion(np.eye(20, dtype=np.int64), ["a"] * 20)
    corner = few[-20 - 40 : -21, -20 - 40 : -21]
    assert not (corner == corner[0, 0]).all()


@pytest.mark.parametrize("dataset", ["camvid", "voc", "ade20k"])
def test_names_stand_beside_rows_and_above_columns(dataset):
    names = dataset_labels(dataset).names
    count, cell = len(names), 40 if len(names) <= 32 else 18
    confusion = np.eye(count, dtype=np.int64)
    picture = draw_confusion(confusion, names)
    top = picture.shape[0] - 20 - cell * count
    blank = draw_confusion(confusion, [" " if i == 3 else n for i, n in enumerate(names)])
    assert blank.shape == picture.shape
    changed = np.argwhere((picture != blank).any(axis=-1))
    middle_y = top + 3 * cell + cell // 2
    beside = changed[changed[:, 0] >= top]
    assert len(beside)
    assert (abs(beside[:, 0] - middle_y) <= 10).all()
    above = changed[changed[:, 0] < top]
    assert len(above)
    # One column's width of ink, within reach of the matrix.
    assert np.ptp(above[:, 1]) <= 20
    assert top - above[:, 0].max() <= 12


def test_matrix_must_fit_the_names():
    with pytest.raises(ValueError, match=r"\(3, 3\) for 2 class names"):
        draw_confusion(np.zeros((3, 3), np.int64), ["a", "b"])
