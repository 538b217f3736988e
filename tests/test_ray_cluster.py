import pytest

from segcli.errors import UsageError
from segcli.ray_cluster import RayOptions, fit


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 2}], {}, (1, 2)),
        ([{"CPU": 16}], {}, (4, 4)),
        ([{"CPU": 2}], {"workers": 2}, (2, 1)),
        ([{"CPU": 16}], {"workers": 2}, (2, 4)),
        ([{"CPU": 16}], {"threads": 1}, (16, 1)),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 1.0}, (2, 4)),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 0.5}, (4, 2)),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 0.6}, (2, 4)),
        ([{"CPU": 8, "GPU": 5}], {"gpus": 2.0}, (2, 4)),
        # An actor is on one machine, and a head node often lends no core.
        ([{"CPU": 2}] * 16, {"address": "auto"}, (16, 2)),
        ([{"CPU": 6}] * 3, {"address": "auto"}, (3, 4)),
        ([{}, {"CPU": 0}, {"CPU": 8}], {"address": "auto"}, (2, 4)),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], {"gpus": 0.5, "address": "auto"}, (2, 4)),
        # What a cluster has not may be added to it.
        ([{"CPU": 1}], {"workers": 9, "address": "auto"}, (9, 1)),
        ([{}], {"address": "auto"}, (1, 1)),
        ([{"CPU": 4}], {"gpus": 1.0, "address": "auto"}, (1, 4)),
    ],
)
def test_fit(nodes, asked, expected):
    assert fit(nodes, RayOptions(**asked)) == expected


@pytest.mark.parametrize(
    ("machine", "asked", "says"),
    [
        ({"CPU": 2}, {"workers": 3}, "--workers 3 with --threads 1 takes 3 cores, .* has 2"),
        ({"CPU": 8}, {"gpus": 1.0}, "--workers 1 with --gpus-per-worker 1 does .*: 0"),
        ({"CPU": 8, "GPU": 2}, {"gpus": 0.6, "workers": 3}, "--gpus-per-worker 0.6 does .*: 2"),
        ({"CPU": 8, "GPU": 1}, {"gpus": 2.0}, "--gpus-per-worker 2 does .*: 1"),
    ],
)
def test_more_than_this_machine_has(machine, asked, says):
    with pytest.raises(UsageError, match=says):
        fit([machine], RayOptions(**asked))
