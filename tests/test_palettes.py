import cv2
import numpy as np
import pytest

from segcli.labels import dataset_palette
from segcli.palettes import safe_palette

# Machado et al. 2009, severity 1, as its table gives them, rows of R, G and B.
VISION = {
    "normal": np.eye(3),
    "protanopia": """0.152286 1.052583 -0.204868
                     0.114503 0.786281 0.099216
                     -0.003882 -0.048116 1.051998""",
    "deuteranopia": """0.367322 0.860646 -0.227968
                       0.280085 0.672501 0.047413
                       -0.011820 0.042940 0.968881""",
    "tritanopia": """1.255528 -0.076749 -0.178779
                     -0.078411 0.930809 0.147602
                     0.004733 0.691367 0.303900""",
}


def least_distance(palette, vision="normal"):
    """The smallest CIELAB distance of two colors, by OpenCV's conversion."""
    matrix = VISION[vision]
    if isinstance(matrix, str):
        matrix = np.array(matrix.split(), float).reshape(3, 3)
    values = np.array(palette) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ matrix.T, 0, 1)
    encoded = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = cv2.cvtColor(encoded[None].astype(np.float32), cv2.COLOR_RGB2Lab)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return distances[~np.eye(len(lab), dtype=bool)].min()


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("num_classes", "least"),
    [
        *((2, 91), (3, 33), (4, 24), (5, 20), (6, 17)),
        *((7, 16), (12, 16), (24, 16), (32, 13), (64, 8.5), (150, 5.7), (256, 3.9)),
    ],
)
def test_safe_colors_stay_apart_for_every_kind_of_eyes(num_classes, least, vision):
    assert least_distance(safe_palette(num_classes), vision) >= least


def test_the_first_safe_colors_are_okabe_and_ito_s():
    published = {
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
        *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
    }
    assert set(safe_palette(7)) == published


def test_safe_colors_do_not_depend_on_the_number_and_are_not_black():
    palette = safe_palette(256)
    assert len(set(palette)) == 256
    assert all(safe_palette(n) == palette[:n] for n in (0, 1, 7, 8, 12, 100))
    assert least_distance([(0, 0, 0), *palette[:64]]) > 8
    # Written files must not change their colors.
    assert palette[7:12] == (
        (136, 0, 255),
        (102, 51, 17),
        (204, 255, 204),
        (17, 34, 136),
        (85, 68, 85),
    )


@pytest.mark.parametrize("num_classes", [-1, 257])
def test_safe_palette_names_its_limit(num_classes):
    with pytest.raises(ValueError, match=f"0 to 256 colors, not {num_classes}"):
        safe_palette(num_classes)


@pytest.mark.parametrize(("num_classes", "least"), [(11, 12), (21, 8.7), (64, 5), (256, 1.2)])
def test_colors_of_an_unknown_data_set_stay_apart(num_classes, least):
    palette = dataset_palette([f"class {i}" for i in range(num_classes)])
    assert least_distance(palette) >= least
