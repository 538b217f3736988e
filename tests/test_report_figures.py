import numpy as np

from segcli.report_figures import Mistake, TimeBar, row_shares, timings, worst_mistakes


def test_no_times_no_chart():
    assert timings([]) is None


def test_a_bar_for_each_of_few_images():
    found = timings([5.0, 1.0, 3.0])
    assert found.bars == [TimeBar(1, 1, 5, 5), TimeBar(2, 2, 1, 1), TimeBar(3, 3, 3, 3)]
    assert (found.median_ms, found.largest_ms) == (3, 5)
    assert 4.7 < found.p95_ms < 5


def test_bars_of_many_images_leave_none_out():
    values = np.arange(1.0, 2001.0)
    found = timings(values.tolist())
    assert len(found.bars) <= 200
    assert [bar.first for bar in found.bars[1:]] == [bar.last + 1 for bar in found.bars[:-1]]
    assert (found.bars[0].first, found.bars[-1].last) == (1, 2000)
    total = sum((bar.last - bar.first + 1) * bar.mean_ms for bar in found.bars)
    assert np.isclose(total, values.sum())
    assert found.bars[-1].largest_ms == 2000


CONFUSION = np.array([[6, 2, 0], [0, 0, 0], [3, 1, 4]], np.int64)


def test_row_shares():
    assert row_shares(CONFUSION) == [[0.75, 0.25, 0], None, [0.375, 0.125, 0.5]]


def test_worst_mistakes_leave_out_what_is_right_and_what_never_happens():
    before = CONFUSION.copy()
    assert worst_mistakes(CONFUSION) == [
        Mistake(2, 0, 3, 0.375),
        Mistake(0, 1, 2, 0.25),
        Mistake(2, 1, 1, 0.125),
    ]
    assert worst_mistakes(CONFUSION, 1) == [Mistake(2, 0, 3, 0.375)]
    assert (before == CONFUSION).all()


def test_no_matrix():
    assert row_shares(np.zeros((0, 0), np.int64)) == []
    assert worst_mistakes(np.zeros((0, 0), np.int64)) == []
