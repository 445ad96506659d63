"""The picture of a case: proportions, letters and colours, read back from its pixels; its looks are for eyes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from medseg import overview
from medseg.grid import Grid
from medseg.overview import HEIGHT, WIDTH, draw_overview
from medseg.readers.segments import Segmentation, SegmentInfo

ORANGE, BLUE = "#E69F00", "#56B4E9"
SEGMENTS = (SegmentInfo(1, "ball", ORANGE), SegmentInfo(2, "nowhere", BLUE))
SPACING = (1.0, 2.0, 5.0)
# beginning in the first row of tiles, from the left: axial, coronal, sagittal
SIDE = (WIDTH - 2 * 24 - 2 * 12) // 3
TILES = [slice(24 + n * (SIDE + 12), 24 + n * (SIDE + 12) + SIDE) for n in range(3)]


def ball(affine: np.ndarray) -> tuple[np.ndarray, Segmentation]:
    """A ball of 20 mm radius in (100, 60, 24) voxels of 1 × 2 × 5 mm."""
    shape = (100, 60, 24)
    mm = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1) * SPACING
    inside = np.linalg.norm(mm - np.array([50.0, 60.0, 60.0]), axis=-1) < 20
    image = np.where(inside, 100, 0).astype(np.int16) + (mm[..., 0] % 2).astype(np.int16)
    return image, Segmentation(inside.astype(np.uint8), Grid(shape, affine), SEGMENTS)


def draw(affine: np.ndarray | None = None, **more: object) -> np.ndarray:
    image, segmentation = ball(np.diag([*SPACING, 1.0]) if affine is None else affine)
    return draw_overview(image, segmentation, **{"quality": {}, "warnings": (), "maker": "net 1", **more})


def like(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where the lines of a colour are."""
    return np.abs(pixels.astype(int) - np.round(255 * np.array(to_rgb(colour)))).max(axis=-1) < 20


def test_a_ball_is_round_in_all_planes_whatever_the_spacing() -> None:
    page = draw()
    assert page.shape == (HEIGHT, WIDTH, 3)
    assert page.dtype == np.uint8
    for tile in TILES:
        down, across = np.nonzero(like(page[100 : 100 + SIDE, tile], ORANGE))
        height, width = np.ptp(down), np.ptp(across)
        # steps of 5 mm at the ends of 40
        assert height == pytest.approx(width, rel=0.15)
        assert height > 0.4 * SIDE


def test_a_volume_turned_in_its_file_gives_the_same_picture() -> None:
    image, segmentation = ball(np.diag([*SPACING, 1.0]))
    want = draw_overview(image, segmentation, quality={}, warnings=(), maker="")
    affine = segmentation.grid.affine[:, [2, 0, 1, 3]].copy()
    affine[:, 3] += affine[:, 0] * 23
    affine[:, 0] *= -1
    turned = Segmentation(segmentation.array.transpose(2, 0, 1)[::-1], Grid((24, 100, 60), affine), SEGMENTS)
    found = draw_overview(image.transpose(2, 0, 1)[::-1], turned, quality={}, warnings=(), maker="")
    # but for the last line, which tells the voxel of the file
    np.testing.assert_array_equal(found[: HEIGHT - 40], want[: HEIGHT - 40])


@pytest.mark.parametrize(
    ("direction", "letters"),
    [
        ((1, 0, 0), "R"),
        ((-1, 0, 0), "L"),
        ((0, 1, 0), "A"),
        ((0, -1, 0), "P"),
        ((0, 0, 1), "H"),
        ((0, 0, -1), "F"),
        ((0.8, -0.6, 0), "RP"),
        ((0.1, 0.3, -0.95), "FA"),
        ((0.99, 0.1, 0.1), "R"),
    ],
)
def test_letters_name_the_side_of_the_body(direction: tuple[float, ...], letters: str) -> None:
    assert overview._letters(np.array(direction)) == letters


def test_the_patients_right_is_on_the_left_and_the_front_on_top() -> None:
    image, segmentation = ball(np.diag([*SPACING, 1.0]))
    scene = overview._scene(image, segmentation)
    assert [scene.near(axis).letters for axis in (2, 1, 0)] == [
        ("R", "L", "A", "P"),
        ("R", "L", "H", "F"),
        ("A", "P", "H", "F"),
    ]
    # a mark at the right, the front and the feet
    labels = np.zeros(segmentation.array.shape, np.uint8)
    labels[-3:, -3:, :2] = 1
    corner = overview._scene(image, Segmentation(labels, segmentation.grid, SEGMENTS))
    for axis, (row, column) in {2: (0, 0), 1: (-1, 0), 0: (-1, 0)}.items():
        assert corner.near(axis).labels[row, column] == 1


def test_slices_go_through_the_extent_of_the_labels_across_the_thickest_axis() -> None:
    image, segmentation = ball(np.diag([*SPACING, 1.0]))
    captions = [cut.caption for cut in overview._scene(image, segmentation).strip(8)]
    # 60 ± 20 mm in steps of 5: 9 to 15, counted from 1 those are 10 to 16
    assert captions == [f"{n} of 24" for n in range(10, 17)]


@pytest.mark.parametrize("labelled", [True, False])
def test_the_same_case_gives_the_same_pixels(labelled: bool) -> None:
    image, segmentation = ball(np.diag([*SPACING, 1.0]))
    shown = segmentation if labelled else Segmentation(segmentation.array * 0, segmentation.grid, SEGMENTS)
    first, second = (draw_overview(image, shown, quality={}, warnings=(), maker="net") for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert like(first[: 100 + SIDE], ORANGE).any() == labelled


def test_a_low_estimate_and_warnings_stand_out() -> None:
    table = np.s_[100 + SIDE : HEIGHT - 40, WIDTH // 2 + 250 :]
    plain = draw(quality={"ball": {"expected": 0.9, "low": 0.8, "high": 0.95}})[table]
    low = draw(quality={"ball": {"expected": 0.5, "low": 0.3, "high": 0.7}})[table]
    warned = draw(warnings=["intensities look like CT"])[table]
    assert not like(plain, "#f2b134").any()
    assert like(low, "#f2b134").any()
    assert like(warned, "#f2b134").any()


def test_many_labels_and_strange_names_have_room() -> None:
    image, segmentation = ball(np.diag([*SPACING, 1.0]))
    names = tuple(SegmentInfo(n, f"$\\frac{{{n}}}$ {'long ' * 20}") for n in range(1, 118))
    page = draw_overview(
        image,
        Segmentation(segmentation.array, segmentation.grid, names),
        quality={},
        warnings=["much to say " * 20] * 9,
        maker="x" * 300,
    )
    # nothing is written over the last line, or into it
    assert (page[HEIGHT - 40 : HEIGHT - 30, WIDTH // 2 :] == page[HEIGHT - 40, -1]).all()


def test_a_plane_lies_as_it_is_and_is_counted_in_pixels() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[:10, :20] = 1
    page = draw_overview(
        labels * 100, Segmentation(labels, Grid((40, 60), np.eye(3)), SEGMENTS), quality={}, warnings=(), maker="net"
    )
    down, across = np.nonzero(like(page[100:980, 24 : 24 + 880], ORANGE))
    # 60 columns over 880 pixels, rows in the middle
    scale = 880 / 60
    assert (np.ptp(across), np.ptp(down)) == (pytest.approx(20 * scale, abs=6), pytest.approx(10 * scale, abs=6))
    assert across.min() < 5


@pytest.mark.parametrize("voxels", [1, 3])
def test_equal_values_inside_of_labels_do_not_blacken_the_picture(voxels: int) -> None:
    image, _ = ball(np.eye(4))
    image = (np.arange(100)[:, None, None] + image * 0).astype(np.int16)
    labels = np.zeros(image.shape, np.uint8)
    labels[50, 30 : 30 + voxels, 12] = 1
    segmentation = Segmentation(labels, Grid(image.shape, np.diag([*SPACING, 1.0])), SEGMENTS)
    page = draw_overview(image, segmentation, quality={}, warnings=(), maker="")
    # a ramp from left to right has many greys
    assert len(np.unique(page[100 : 100 + SIDE, TILES[0]][SIDE // 4, :, 0])) > 30
