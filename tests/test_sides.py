"""Left and right are not mixed up: by names in other languages, files of other data, or axes that are not turned."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from geometry import save

import medseg
from medseg.asked import TrainOptions, plan_run
from medseg.config import DataConfig
from medseg.datasets import read_dataset
from medseg.errors import ConfigError
from medseg.fingerprint import measure
from medseg.preprocess import prepare
from medseg.sides import BEGINNINGS, PAIRED, STEMS, WORDS, keep_sides, sided_label
from medseg.train import CONFIG, _begun

MakeDataset = Callable[..., Path]

KIDNEYS = {"background": 0, "left kidney": 1, "right kidney": 2}


def sided(*names: str) -> str | None:
    return sided_label(DataConfig(labels={name: n for n, name in enumerate(names, 1)}))


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "rene sx",
        "rene_dx",
        "左肾",
        "右腎臓",
        "левая почка",
        "почка правая",
        "Почка_слева",
        "ліва нирка",
        "nerka lewa",
        "prawa_nerka",
        "ledvina levá",
        "pravá oblička",
        "njure vänster",
        "NJURE HÖGER",
        "nyre venstre",
        "nyre højre",
        "høyre nyre",
        "vasen munuainen",
        "oikea munuainen",
        "riñón izquierdo",
        "riñón derecho",
        "rim esquerdo",
        "Niere_links",
        "rechte Niere",
        "rein gauche",
        "왼쪽 신장",
        "الكلية اليسرى",
        "rinichi stâng",
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_one_side_is_known_by_its_word(name: str, form: Any) -> None:
    assert sided(unicodedata.normalize(form, name)) is not None


@pytest.mark.parametrize(
    "names",
    [
        ("rein_g", "rein_d"),
        ("rein G", "rein D"),
        ("OD", "OS"),
        ("papilla od", "papilla os"),
        ("sağ böbrek", "sol böbrek"),
        ("riñón_i", "riñón_d"),
        ("njure V", "njure H"),
        ("Niere li", "Niere re"),
        ("kidneyG", "kidneyD"),
    ],
)
def test_words_of_other_meanings_tell_sides_as_a_pair(names: tuple[str, str]) -> None:
    assert sided("liver", *names) == names[0]
    for name in names:
        assert sided("liver", name) is None


@pytest.mark.parametrize(
    "names",
    [
        ("плевра",),
        ("Rückenmark",),
        ("levator",),
        ("os sacrum", "os coxae"),
        ("rein_g", "foie_d"),
        ("zone_g", "zone_h"),
        ("vein v", "liver h"),
        ("cél",),
        tuple("ABCDE"),
        tuple(f"lesion_{letter}" for letter in "abcde"),
        ("BAL", "lava"),
    ],
)
def test_names_without_a_side_tell_none(names: tuple[str, ...]) -> None:
    assert sided(*names) is None


def test_the_table_is_written_as_names_are_read() -> None:
    for word in chain.from_iterable((*STEMS, *BEGINNINGS, *WORDS)):
        assert sided(word) == word
    for pair in PAIRED:
        assert sided(*pair) is not None


# ---- files of other data


@pytest.fixture
def kidneys(tiny_dataset: MakeDataset) -> Path:
    folder = tiny_dataset(cases=2, form="nnunet")
    said = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**said, "labels": KIDNEYS}))
    return folder


@pytest.fixture
def whole(kidneys: Path, tmp_path: Path) -> Callable[..., Path]:
    """The whole configuration planned for the kidneys, with `changes` laid over."""

    def call(without: tuple[str, ...] = (), **changes: Any) -> Path:
        values = medseg.overlay(medseg.plan(kidneys, device="cpu").config.model_dump(mode="json"), changes)
        path = tmp_path / "file.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))
        return path

    return call


def planned(dataset: Path, config: Path | medseg.Config | None = None, **settings: Any) -> medseg.Plan:
    options = TrainOptions(config=config, settings=settings)
    return plan_run(read_dataset(dataset), options, {}, device=torch.device("cpu"))


@pytest.mark.parametrize("without", [(), ("data",)], ids=["whole", "without its data"])
@pytest.mark.parametrize("axes", [[0], [0, 1, 2]])
def test_axes_of_a_file_that_mix_up_sides_are_left_out(
    kidneys: Path, whole: Callable[..., Path], axes: list[int], without: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = whole(without, augment={"flip_axes": axes})
    made = planned(kidneys, file)
    assert made.config.augment.flip_axes == ()
    assert made.reasons["augment.flip_axes"] == "label `left kidney` tells sides apart: never mirrored"
    typed = str(axes).replace(" ", "")
    assert f"{file}: augment.flip_axes {typed} is left out" in caplog.text
    assert f"--set augment.flip_axes={typed} mirrors all the same" in caplog.text


@pytest.mark.parametrize("without", [(), ("data",)], ids=["whole", "without its data"])
def test_axes_that_are_typed_are_meant(
    kidneys: Path, whole: Callable[..., Path], without: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = planned(kidneys, whole(without), augment={"flip_axes": [0]})
    assert made.config.augment.flip_axes == (0,)
    assert "augment.flip_axes" not in made.reasons
    assert "[0] is used as asked for, although label `left kidney` tells sides apart" in caplog.text


def test_the_default_of_a_file_that_names_no_axes_is_left_out(
    kidneys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"data": {"channels": ["MRI"], "labels": KIDNEYS}, "augment": {"p_noise": 0.5}}
    values |= {"preprocess": {}, "network": {}, "windows": {"patch_size": [16, 16, 16]}}
    file = tmp_path / "file.yaml"
    file.write_text(json.dumps(values))
    assert planned(kidneys, file).config.augment.flip_axes == ()
    assert planned(kidneys, medseg.make_config(values)).config.augment.flip_axes == ()
    assert "augment.flip_axes [0,1,2] is left out" in caplog.text


def test_the_configuration_of_a_run_is_used_again(
    kidneys: Path, whole: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = whole()
    assert planned(kidneys, file).config == medseg.read_config(file)
    # as a cross-validation gives it to its folds
    typed = medseg.read_config(whole(augment={"flip_axes": [0]}))
    assert "flip_axes" not in caplog.text
    assert planned(kidneys, typed).config == typed
    assert "is used as asked for" in caplog.text


def test_axes_of_a_file_that_mix_up_nothing_stay(
    kidneys: Path, whole: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for kept in ({"flip_axes": [1, 2]}, {"flip_axes": [0], "p_flip": 0.0}):
        found = planned(kidneys, whole(augment=kept))
        assert list(found.config.augment.flip_axes) == kept["flip_axes"]
        assert found.reasons == {}
    assert "flip_axes" not in caplog.text
    # in the order of the file any axis may be the one
    unturned = whole(augment={"flip_axes": [1, 2]}, preprocess={"orient": False})
    assert planned(kidneys, unturned).config.augment.flip_axes == ()


def test_labels_without_names_are_not_mirrored_by_a_file(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("augment: {flip_axes: [0]}\n")
    dataset = tiny_dataset(cases=2)
    assert planned(dataset, file).config.augment.flip_axes == ()
    # its own names for them, as its own configuration has them, are none
    named = planned(dataset, data={"labels": {"label_1": 1, "label_2": 2}})
    assert named.config.augment.flip_axes == ()
    assert planned(dataset, data={"labels": {"liver": 1, "core": 2}}).config.augment.flip_axes == (0,)


def test_only_what_was_planned_has_a_reason(kidneys: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("preprocess: {spacing_mm: [2, 2, 2]}\ndata: {labels: {left: 1, right: 2}}\n")
    before = planned(kidneys, network={"name": "deeplabv3plus"}).reasons
    settings = {"train": {"time_budget_s": 60.0}, "network": {"output_stride": 2}}
    found = planned(kidneys, file, **settings).reasons
    laid = {"preprocess.spacing_mm", "data.labels", "train.time_budget_s", "network.output_stride"}
    assert laid <= before.keys()
    assert found.keys() == before.keys() - laid
    other = planned(kidneys, network={"name": "unet"}).reasons
    assert other["network.name"].startswith("as asked for")


def test_what_was_left_out_is_left_out_again_where_a_training_goes_on(tmp_path: Path) -> None:
    file, run = tmp_path / "file.yaml", tmp_path / "run"
    file.write_text("augment: {flip_axes: [0], p_flip: 0.25}\n")
    run.mkdir()
    options = TrainOptions(config=file, resume=True)
    for begun in ([], [0]):
        values = {"data": {"labels": KIDNEYS}, "augment": {"flip_axes": begun}}
        (run / CONFIG).write_text(medseg.dump_yaml(medseg.make_config(values)))
        found = _begun(run, options, "").config
        assert isinstance(found, medseg.Config)
        # what was typed when it was begun holds
        assert list(found.augment.flip_axes) == begun
        assert found.augment.p_flip == 0.25


def test_axes_of_slices_count_from_the_first() -> None:
    for dims, labels, kept in ((2, KIDNEYS, ()), (2, {"liver": 1}, (1,)), (3, KIDNEYS, (1,))):
        asked = {"data": {"spatial_dims": dims, "labels": labels}, "augment": {"flip_axes": [1], "p_noise": 0.5}}
        asked |= {"windows": {"patch_size": [32] * dims}, "preprocess": {"spacing_mm": [1.0] * dims}}
        found, _ = keep_sides(medseg.make_config(asked), source="a file", typed=False)
        assert (found.augment.flip_axes, found.augment.p_noise) == (kept, 0.5)


# ---- axes as they are


@pytest.fixture
def sagittal(tmp_path: Path) -> Path:
    """Volumes with axes to anterior, superior and right, of 1 × 1 × 4 mm and 40 × 36 × 12 voxels."""
    folder, noise = tmp_path / "sagittal", np.random.default_rng(0)
    affine = np.array([[0, 0, 4.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    for n in range(2):
        label = np.zeros((40, 36, 12), np.uint8)
        label[10:30, 10 + n : 30, 3:9] = 1
        for name, array in (("images", noise.normal(size=label.shape).astype(np.float32)), ("labels", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            save(folder / name / f"c{n}.nii", array, affine)
    return folder


def test_axes_that_are_not_turned_are_planned_as_they_are(sagittal: Path) -> None:
    turned, found = (planned(sagittal, preprocess={"orient": orient}).config for orient in (True, False))
    assert not found.preprocess.orient
    assert (turned.preprocess.spacing_mm, found.preprocess.spacing_mm) == ((4, 1, 1), (1, 1, 4))
    assert (turned.augment.flip_axes, found.augment.flip_axes) == ((0,), (2,))
    assert (turned.augment.rotation_deg, found.augment.rotation_deg) == ((30, 5, 5), (5, 5, 30))
    for one, other in (
        (turned.windows.patch_size, found.windows.patch_size),
        *zip(turned.network.strides or (), found.network.strides or (), strict=True),
    ):
        assert (*one[1:], one[0]) == other
    assert found.network.strides
    case = read_dataset(sagittal).cases[0]
    assert prepare(case, found.preprocess, found.data, with_label=True).grid.shape == (40, 36, 12)


def test_axes_that_are_not_turned_and_differ_are_not_mirrored(sagittal: Path) -> None:
    for name in ("images", "labels"):
        array = np.zeros((20, 20, 20), np.uint8)
        array[5:9, 5:9, 5:9] = 1
        save(sagittal / name / "c1.nii", array if name == "labels" else array.astype(np.float32), np.eye(4))
    assert measure(read_dataset(sagittal)).left_right == (0,)
    assert measure(read_dataset(sagittal), turned=False).left_right == (0, 2)
    found = planned(sagittal, preprocess={"orient": False})
    assert found.config.augment.flip_axes == ()
    assert "another one runs from left to right" in found.reasons["augment.flip_axes"]


@pytest.mark.parametrize("without", [(), ("train", "data")], ids=["whole", "without its data"])
def test_a_file_for_turned_axes_is_not_used_for_others(sagittal: Path, tmp_path: Path, without: Any) -> None:
    values = planned(sagittal).config.model_dump(mode="json")
    file = tmp_path / "file.yaml"
    file.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))
    unturned: dict[str, Any] = {"preprocess": {"orient": False}}
    with pytest.raises(
        ConfigError,
        match=r"--set preprocess.orient=false: .*file.yaml has preprocess.spacing_mm, windows.patch_size, "
        r"augment.rotation_deg, augment.flip_axes for axes in the order of preprocess.orient true; leave the file out",
    ):
        planned(sagittal, file, **unturned)
    unturned["preprocess"]["spacing_mm"] = [1, 1, 4]
    unturned |= {"augment": {"flip_axes": [2], "rotation_deg": [5, 5, 30]}, "windows": {"patch_size": [40, 40, 12]}}
    assert planned(sagittal, file, **unturned).config.augment.flip_axes == (2,)


def test_a_file_that_is_the_same_along_all_axes_fits_any_order(sagittal: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("preprocess: {spacing_mm: [2, 2, 2]}\naugment: {flip_axes: [0, 1, 2]}\n")
    assert planned(sagittal, file, preprocess={"orient": False}).config.preprocess.spacing_mm == (2, 2, 2)
