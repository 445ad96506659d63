"""The volumes of the page's viewer: small, in the right place, with every label and nothing that ends the page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from browser import Visiting
from PIL import Image

from medseg.evaluate import EvaluateOptions, Evaluation
from medseg.grid import Grid
from medseg.report import Report, evaluate
from medseg.report.layers import Layers, read_layers
from medseg.report.page import environment
from medseg.report.scene import (
    MARGIN_MM,
    ONLY_PREDICTION,
    ONLY_REFERENCE,
    OTHER_LABEL,
    Scene,
    coarser_affine,
    make_scene,
    niivue_script,
    prepare_viewer,
    reduce_labels,
)
from medseg.report.worst import read_worst
from medseg.writers.in_memory import nifti_bytes

NASTY = "a<script>alert(1)<!--&\"quoted' ü"
# axes turned and tilted, unequal spacings, an origin far away
OBLIQUE = np.array([[0.0, -1.9, 0.3, 40.0], [0.9, 0.1, 0.0, -70.0], [0.0, 0.6, 3.0, 12.0], [0.0, 0.0, 0.0, 1.0]])


def opened(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def voxels(text: str) -> np.ndarray:
    return np.asanyarray(opened(text).dataobj)


def scene_of(prediction, reference, image=None, *, affine=None, labels=None, **options):
    affine = np.eye(4) if affine is None else affine
    labels = {"one": 1, "two": 2} if labels is None else labels
    layers = Layers(prediction, reference, image, Grid(prediction.shape, affine))
    colours = {name: f"#00000{n}" for n, name in enumerate(labels)}
    return make_scene(layers, labels, colours, case="case", dice=0.5, **options)


@pytest.fixture
def evaluation(tmp_path: Path):
    """Writes {case: (prediction, reference)} and evaluates them."""

    def make(cases, image=None, labels=None, affine=OBLIQUE) -> Evaluation:
        for name in ("pred", "ref", "images"):
            (tmp_path / name).mkdir()
        for case, arrays in cases.items():
            for folder, array in zip(("pred", "ref", "images"), (*arrays, image)):
                if array is not None:
                    nib.save(nib.Nifti1Image(array, affine), tmp_path / folder / f"{case}.nii.gz")
        options = EvaluateOptions(labels=labels or {"one": 1})
        return evaluate(tmp_path / "pred", tmp_path / "ref", options, images=tmp_path / "images").evaluation

    return make


def scenes(made: Evaluation, **limits) -> list[Scene]:
    return [case.scene for case in read_worst(made, **limits) if case.scene is not None]


def cube(shape=(8, 9, 10), value=1) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[2:5, 2:5, 2:5] = value
    return array


# ---- where things lie


def test_an_oblique_case_stands_upright_and_a_voxel_keeps_its_place(evaluation):
    reference = np.zeros((7, 8, 9), np.uint8)
    reference[1, 6, 2] = 1
    made = evaluation({"a": (reference, reference)}, affine=OBLIQUE)
    layers = read_layers(made.pairs["a"], made)
    (found,) = np.argwhere(layers.reference)
    # NIfTI keeps the affine in 32 bits
    assert layers.grid.affine @ [*found, 1] == pytest.approx(OBLIQUE @ [1, 6, 2, 1], abs=1e-4)
    assert (np.diag(layers.grid.affine)[:3] > 0).all()


def test_a_voxel_keeps_its_place_through_crop_and_coarser_voxels(evaluation):
    reference = np.zeros((40, 40, 40), np.uint8)
    reference[20:22, 24:26, 22:24] = 1
    made = evaluation({"a": (reference, reference)}, affine=np.diag([1.0, 1.0, 1.0, 1.0]))
    layers = read_layers(made.pairs["a"], made)
    # the margin of 10 mm begins at 10, 14 and 12: blocks of two begin at even distances from there
    whole = make_scene(layers, {"one": 1}, {"one": "#000000"}, case="a", dice=1)
    reduced = reduce_labels(voxels(whole.reference), (2, 2, 2))
    (block,) = np.argwhere(reduced)
    place = coarser_affine(opened(whole.reference).affine, (2, 2, 2)) @ [*block, 1]
    assert place[:3].tolist() == [20.5, 24.5, 22.5]


def test_the_crop_leaves_the_margin_and_ends_at_the_volume():
    marked = np.zeros((60, 30, 30), np.uint8)
    marked[30, 2, 15] = 1
    scene = scene_of(marked, marked, affine=np.diag([1.0, 2.0, 3.0, 1.0]))
    # 10 mm are 10, 5 and (rounded up) 4 voxels on each side; the second axis has only 2 before it
    assert MARGIN_MM == 10
    assert scene.shape == (21, 8, 9)
    assert opened(scene.image).affine[:3, 3].tolist() == [20, 0, 33]


def test_all_volumes_of_a_scene_share_one_grid():
    scene = scene_of(cube(), np.roll(cube(), 1, axis=0), cube().astype(np.float32), affine=np.diag([1, 2, 3, 1.0]))
    grids = [opened(text) for text in (scene.image, scene.reference, scene.prediction, scene.errors)]
    assert {g.shape for g in grids} == {scene.shape}
    assert all((g.affine == grids[0].affine).all() for g in grids)


def test_the_first_view_is_where_most_is_wrong():
    reference = np.zeros((6, 6, 6), np.uint8)
    reference[1:5, 1:5, 1:5] = 1
    prediction = reference.copy()
    prediction[4, 2:4, 3] = 0
    # two voxels are missed: one plane across x and one across z hold both; across y the first of two equal ones
    assert scene_of(prediction, reference).start == (4, 2, 3)


# ---- labels that become coarser


def test_a_block_takes_what_most_of_its_voxels_have():
    labels = np.zeros((6, 2, 2), np.uint8)
    labels[:2].flat[:5] = 1
    labels[2:4].flat[:5] = 1
    labels[2:4].flat[5:] = 2
    labels[4:] = 2
    assert reduce_labels(labels, (2, 2, 2)).ravel().tolist() == [1, 1, 2]


def test_on_a_tie_the_rarer_one_stays():
    labels = np.zeros((4, 2, 2), np.uint8)
    labels[0], labels[1], labels[2:] = 1, 2, 1
    assert reduce_labels(labels, (2, 2, 2)).ravel().tolist() == [2, 1]


def test_what_stands_apart_does_not_vanish():
    labels = np.zeros((12, 3, 3), np.uint8)
    labels[:3] = 1
    labels[7, 1, 1] = 1
    labels[10, 0, 2] = 2
    # nine blocks of background around one voxel each would swallow both
    assert reduce_labels(labels, (3, 3, 3)).ravel().tolist() == [1, 0, 1, 2]


def test_what_hangs_together_is_not_made_larger():
    labels = np.zeros((9, 3, 3), np.uint8)
    labels[:4] = 1
    # the second block holds 9 of 27 voxels, of the piece that has the first one
    assert reduce_labels(labels, (3, 3, 3)).ravel().tolist() == [1, 0, 0]


def test_blocks_at_the_end_are_filled_up():
    assert reduce_labels(np.ones((3, 2, 2), np.uint8), (2, 2, 2)).ravel().tolist() == [1, 1]


# ---- what is shown


def test_the_image_is_the_mean_of_each_block():
    image = np.zeros((4, 2, 2), np.float32)
    image[2:] = np.arange(8).reshape(2, 2, 2)
    everywhere = np.ones((4, 2, 2), np.uint8)
    fine = voxels(scene_of(everywhere, everywhere, image).image).astype(float)
    # half of the voxels are equal, so the range is that of the 1st to 99th percentile: 0 to 6.85
    assert fine[3, 1, 1] == 255
    assert fine[3, 0, 0] == round(255 * 4 / 6.85)


def test_errors_name_what_only_one_map_has_and_what_differs():
    reference = np.array([0, 1, 0, 1, 1], np.uint8).reshape(5, 1, 1).repeat(2, 1).repeat(2, 2)
    prediction = np.array([0, 1, 1, 0, 2], np.uint8).reshape(5, 1, 1).repeat(2, 1).repeat(2, 2)
    found = voxels(scene_of(prediction, reference).errors)[:, 0, 0].tolist()
    assert found == [0, 0, ONLY_PREDICTION, ONLY_REFERENCE, OTHER_LABEL]


def test_large_values_with_gaps_keep_their_names():
    reference = cube().astype(np.int32) * 70_000
    prediction = cube().astype(np.int32) * 300
    scene = scene_of(prediction, reference, labels={"far": 70_000, "near": 300, "absent": 5})
    assert [(label.value, label.names) for label in scene.labels] == [(1, ("near",)), (2, ("far",))]
    assert (voxels(scene.reference).max(), voxels(scene.prediction).max()) == (2, 1)


def test_overlapping_regions_name_a_voxel_together_in_the_colour_of_the_smallest():
    both = cube()
    both[3, 3, 3] = 2
    scene = scene_of(both, both, labels={"whole": (1, 2), "core": (2,)})
    assert [label.names for label in scene.labels] == [("whole",), ("whole", "core")]
    assert [label.colour for label in scene.labels] == ["#000000", "#000001"]


def test_a_case_without_an_image_has_a_black_one():
    scene = scene_of(cube(), cube())
    assert not scene.with_image
    assert not voxels(scene.image).any()


def test_only_the_prediction_is_marked_for_outlines():
    scene = scene_of(cube(), cube())
    intents = [int(opened(t).header["intent_code"]) for t in (scene.image, scene.reference, scene.prediction)]
    assert intents == [0, 0, 1002]


# ---- budgets


def test_a_noisy_case_becomes_coarser_until_it_fits():
    noise = np.random.default_rng(0).normal(size=(60, 60, 30)).astype(np.float32)
    everywhere = np.ones(noise.shape, np.uint8)
    scene = scene_of(everywhere, everywhere, noise, affine=np.diag([1.0, 1.0, 2.0, 1.0]), max_bytes=60_000)
    assert scene.size <= 60_000
    # the finer axes go first
    assert scene.steps[0] >= 2 > scene.steps[2]
    assert scene.spacing_mm == tuple(step * mm for step, mm in zip(scene.steps, (1, 1, 2)))


def test_the_least_bad_cases_are_left_out_of_a_small_budget(evaluation):
    reference = cube()
    cases = {f"case{n}": (np.roll(reference, n, axis=0), reference) for n in range(3)}
    made = evaluation(cases)
    size = scenes(made)[0].size
    assert [s.case for s in scenes(made)] == ["case2", "case1", "case0"]
    assert [s.case for s in scenes(made, max_scenes=1)] == ["case2"]
    assert [s.case for s in scenes(made, max_bytes=int(1.5 * size))] == ["case2"]


def test_pictures_have_no_viewer(tmp_path):
    for name in ("pred", "ref"):
        (tmp_path / name).mkdir()
        Image.fromarray(cube()[:, :, 3]).save(tmp_path / name / "scan.png")
    assert scenes(evaluate(tmp_path / "pred", tmp_path / "ref").evaluation) == []
    assert prepare_viewer([]) is None


def test_a_case_that_is_gone_is_left_out(evaluation, tmp_path, caplog):
    made = evaluation({"a": (cube(), cube()), "b": (cube(), np.roll(cube(), 1, axis=0))})
    (tmp_path / "ref" / "b.nii.gz").unlink()
    assert [s.case for s in scenes(made)] == ["a"]
    assert "b is not pictured" in caplog.text


# ---- the page's part


def test_names_cannot_end_the_script(evaluation):
    made = evaluation({NASTY: (cube(), cube())}, labels={"</script><b>liver</b>": 1})
    page = environment().get_template("_viewer.html.jinja").render(viewer=prepare_viewer(scenes(made)))
    assert page.count("<script") == page.count("</script>") == 3
    assert "<b>liver" not in page
    data = re.search(r'<script type="application/json" id="viewer-data">(.*?)</script>', page, re.DOTALL)
    (scene,) = json.loads(data[1])["scenes"]
    assert scene["case"] == NASTY
    assert scene["labels"][0]["names"] == ["</script><b>liver</b>"]


def test_niivue_is_the_published_one_with_its_licences():
    folder = files("medseg.report").joinpath("viewer")
    source = folder.joinpath("SOURCE.md").read_text(encoding="utf-8")
    packed = base64.b64decode(niivue_script())
    for data in (packed, gzip.decompress(packed)):
        assert hashlib.sha256(data).hexdigest() in source
    assert "BSD 2-Clause" in folder.joinpath("LICENSE").read_text(encoding="utf-8")
    assert "gl-matrix" in folder.joinpath("NOTICES").read_text(encoding="utf-8")


def test_bytes_of_a_volume_are_a_readable_file():
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    image = nib.Nifti1Image.from_bytes(nifti_bytes(array, OBLIQUE, labels=True))
    assert (np.asanyarray(image.dataobj) == array).all()
    assert image.affine == pytest.approx(OBLIQUE, rel=1e-6)
    assert nifti_bytes(array, OBLIQUE) == nifti_bytes(array, OBLIQUE)


def test_bytes_of_another_type_are_refused():
    with pytest.raises(ValueError, match="uint8 or uint16"):
        nifti_bytes(np.zeros((2, 2, 2)), np.eye(4))


def test_slices_lie_as_in_the_pictures(evaluation, visit: Visiting, tmp_path):
    # one is the patient's right, front and top; two the opposite corner
    reference = np.zeros((20, 20, 20), np.uint8)
    reference[12:17, 12:17, 12:17], reference[3:8, 3:8, 3:8] = 1, 2
    reference[3:17, 9:11, 9:11] = reference[9:11, 3:17, 9:11] = reference[9:11, 9:11, 3:17] = 3
    made = evaluation({"a": (reference, reference)}, labels={"one": 1, "two": 2, "between": 3}, affine=np.eye(4))
    page = visit(Report(made).save(tmp_path / "out") / "report.html", width=500).page
    page.locator("#viewer .open").click()
    page.wait_for_selector("#viewer canvas[data-state=ready]", timeout=20_000)
    for view, (axis, at) in {0: (2, 14), 1: (1, 14), 2: (0, 14)}.items():
        sides = {
            name: _middle(page, view, axis, place, made.colours[name]) for name, place in (("one", at), ("two", 5))
        }
        # R and A, R and S, A and S are at the left and the upper edge
        assert sides["one"][0] < sides["two"][0], view
        assert sides["one"][1] < sides["two"][1], view


def _middle(page, view: int, axis: int, at: int, colour: str) -> tuple[float, float]:
    """Where a label is seen in a view (0 axial, 1 coronal, 2 sagittal) through slice `at`: right and down."""
    left, top, width, height = page.evaluate(
        """async ([view, axis, at]) => {
          const viewer = window.medsegViewer, place = [...viewer.scene.crosshairPos];
          place[axis] = (at + 0.5) / 20;
          viewer.scene.crosshairPos = place;
          viewer.drawScene();
          await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
          return [...viewer.screenSlices.find(slice => slice.axCorSag === view).leftTopWidthHeight];
        }""",
        [view, axis, at],
    )
    shown = np.asarray(Image.open(io.BytesIO(page.locator("#viewer canvas").screenshot())).convert("RGB")).astype(float)
    ratio = shown.shape[1] / page.evaluate("window.medsegViewer.gl.canvas.width")
    rows, columns = (
        slice(round(start * ratio), round((start + size) * ratio)) for start, size in ((top, height), (left, width))
    )
    wanted = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)], float)
    tile = shown[rows, columns]
    # of the hue of the label, however strong it lies over the black image
    strength = tile @ wanted / (np.linalg.norm(tile, axis=-1) * np.linalg.norm(wanted) + 1e-9)
    down, right = np.nonzero((strength > 0.99) & (tile.max(axis=-1) > 60))
    assert len(right) > 20
    return float(right.mean()), float(down.mean())
