"""Models that come with medseg: found by name, listed, small, and as good as before they were made small."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from geometry import save
from safetensors.torch import load_file
from tiny import AFFINE, EXACT, SHAPE, blobs, some_images, tiny_config, tiny_model

import medseg
from medseg import catalogue, shipped
from medseg.catalogue import find_model, weights_file
from medseg.cli import run
from medseg.errors import ConfigError, ModelError
from medseg.model import new_network, read_model, save_model
from medseg.pretrained import load_pretrained
from medseg.shipped import ModelCard, halved, list_models, make_card, ship_model
from medseg_pipelines.ship import page

FIGURE = {"mean": 0.9, "low": 0.88, "high": 0.91, "cases": 12}
WORDS: dict[str, Any] = {
    "title": "Eggs in noise",
    "segments": "shell and core",
    "data": "made",
    "origin": "here",
    "licence": "CC0-1.0",
    "attribution": "none",
    "intended_use": "tests",
    "limits": ["not for breakfast"],
    "dice": {"shell": FIGURE, "core": FIGURE},
    "judged": "by nobody",
}


@pytest.fixture
def card() -> ModelCard:
    return make_card(WORDS, source="here")


@pytest.fixture
def models(tmp_path: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped models with one in it, `egg`, in place of those that come with medseg."""
    folder = tmp_path / "models"
    ship_model(tiny_model(tmp_path / "run"), folder / "egg", card)
    for function in (shipped.list_models, catalogue.model_names, catalogue.find_model):
        monkeypatch.setattr(function, "__defaults__", (folder,))
    return folder


def segment(model: str | Path, image: Path) -> torch.Tensor:
    return medseg.load_model(model, options=EXACT).segment(image).as_tensor()


# ---- made small


def test_half_the_bytes_and_nearly_the_same_mask(tmp_path: Path, card: ModelCard) -> None:
    config = tiny_config(network={"channels": [16, 32], "norm": "batch"})
    folder = tiny_model(tmp_path / "run", config)
    made = ship_model(folder, tmp_path / "egg", card)
    before, after = read_model(folder), read_model(made.folder)
    weights = load_file(made.folder / "model.safetensors")
    assert {t.dtype for k, t in weights.items() if t.ndim > 2} == {torch.float16}
    assert {t.dtype for k, t in weights.items() if k.endswith(("bias", "running_var"))} == {torch.float32}
    assert made.size < 0.6 * (folder / "model.safetensors").stat().st_size
    image = torch.randn(1, 1, 12, 9, 8)
    with torch.no_grad():
        exact, rounded = before.network(image), after.network(image)
    # 11 bits of each kernel's weight are left: 2^-11 of it, and the layers add some of that up
    assert 0 < (exact - rounded).abs().max() < 20 * 2**-11 * exact.abs().max()
    scan = save(tmp_path / "scan.nii.gz", blobs(SHAPE), AFFINE)
    masks = segment(folder, scan), segment(made.folder, scan)
    assert len(masks[0].unique()) > 1
    assert (masks[0] != masks[1]).float().mean() < 0.005


def test_what_the_rounding_changed_is_written_down(tmp_path: Path, card: ModelCard) -> None:
    made = ship_model(tiny_model(tmp_path / "run"), tmp_path / "egg", card)
    description = json.loads((made.folder / "model.json").read_text())
    change = description["half_precision"]
    assert 0 < change["largest_difference_of_logits"] < 0.01 * change["largest_logit"]
    assert 0 <= change["voxels_of_another_label"] <= shipped.LARGEST_CHANGE


def test_weights_that_half_precision_cannot_hold_stay_as_they_are() -> None:
    network = new_network(tiny_config())
    kernel = network.get_parameter("encoder.stem.0.weight")
    with torch.no_grad():
        kernel[0] = 1e6
    made = halved(network)
    assert torch.equal(made["encoder.stem.0.weight"], kernel)
    assert made["head.classifier.weight"].dtype == torch.float16


def test_a_model_that_rounding_changes_too_much_does_not_ship(
    tmp_path: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_model(tmp_path / "run")
    ship_model(run, tmp_path / "egg", card)
    before = {path.name: path.read_bytes() for path in (tmp_path / "egg").iterdir()}
    monkeypatch.setattr(shipped, "LARGEST_CHANGE", -1.0)
    with pytest.raises(ModelError, match=r"half precision gives .* of the voxels of a test image another label"):
        ship_model(run, tmp_path / "egg", card)
    # the one that was there is whole
    assert {path.name: path.read_bytes() for path in (tmp_path / "egg").iterdir()} == before


def test_a_model_that_weighs_too_much_does_not_ship(
    tmp_path: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "LARGEST", 1000)
    with pytest.raises(ModelError, match="bytes of weights in half precision, expected at most 1,000"):
        ship_model(tiny_model(tmp_path / "run"), tmp_path / "egg", card)
    assert not (tmp_path / "egg").exists()


def test_a_card_of_other_labels_is_refused(tmp_path: Path) -> None:
    card = make_card(WORDS | {"dice": {"liver": FIGURE}}, source="here")
    with pytest.raises(ConfigError, match="its labels are core, shell, the card has Dice of liver"):
        ship_model(tiny_model(tmp_path / "run"), tmp_path / "egg", card)


def test_names_of_cases_do_not_ship_and_choices_do(tmp_path: Path, card: ModelCard) -> None:
    config = tiny_config()
    training = {"cases": 2, "validation_cases": ["patient_7"]}
    save_model(new_network(config), config, tmp_path / "run", training=training, licence="unknown")
    medseg.model.record_choices(tmp_path / "run", {"windows": {"settings": {"windows": {"overlap": 0.25}}}})
    ship_model(tmp_path / "run", tmp_path / "egg", card)
    description = json.loads((tmp_path / "egg" / "model.json").read_text())
    assert description["training"] == {"cases": 2}
    assert description["licence"] == "CC0-1.0"
    assert medseg.load_model(tmp_path / "egg", options=EXACT).config.windows.overlap == 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"title": ""}, "title: string should have at least 1"),
        ({"limits": []}, "limits: tuple should have at least 1"),
        ({"price": 3}, "price: extra inputs"),
        ({"dice": {"shell": {**FIGURE, "mean": 1.1}}}, "dice.shell.mean: input should be less than"),
    ],
)
def test_a_card_that_says_too_little_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"here: no model card: {words}"):
        make_card(WORDS | change, source="here")


# ---- found


def test_a_name_stands_for_the_model(models: Path, tmp_path: Path) -> None:
    assert find_model("egg") == models / "egg"
    scan = save(tmp_path / "scan.nii.gz", blobs(SHAPE), AFFINE)
    assert torch.equal(segment("egg", scan), segment(models / "egg", scan))


def test_a_folder_of_that_name_comes_first_and_is_told(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "egg", seed=5)
    with caplog.at_level(logging.WARNING):
        assert find_model("egg") == Path("egg")
    assert "egg: the folder of that name is taken, not the model that comes with medseg" in caplog.text


@pytest.mark.parametrize("files", [(), ("dataset.json", "imagesTr/a.nii.gz")], ids=["empty", "a data set"])
def test_a_folder_of_that_name_without_a_model_is_passed_over_and_told(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: tuple[str, ...],
) -> None:
    (tmp_path / "data" / "egg" / "imagesTr").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    for name in files:
        Path("egg", name).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert find_model("egg") == models / "egg"
    assert "egg: the model that comes with medseg is taken, not the folder of that name, which holds" in caplog.text
    assert weights_file(Path("egg")) == models / "egg" / "model.safetensors"
    assert medseg.load_model("egg").models


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "best.json", "crossval.json", "config.yaml"])
def test_a_folder_of_that_name_with_a_part_of_a_model_is_told_as_damaged(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("egg").mkdir()
    Path("egg", file).touch()
    assert find_model("egg") == Path("egg")
    assert weights_file(Path("egg")) == Path("egg", "model.safetensors")


def test_a_wrong_name_lists_the_right_ones(models: Path) -> None:
    with pytest.raises(ModelError, match=r"yolk: no such folder, and no model of that name .*; those are egg"):
        medseg.load_model("yolk")


def test_where_none_is_installed_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is none in this installation"):
        find_model("yolk", tmp_path / "nothing")
    assert list_models(tmp_path / "nothing") == ()


def test_a_path_that_is_not_there_is_told_as_a_path(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"runs/egg: no such folder; a model is the folder"):
        medseg.load_model(tmp_path / "runs" / "egg")


def test_a_changed_file_is_found_when_it_is_loaded(models: Path) -> None:
    path = models / "egg" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not the weights"):
        medseg.load_model("egg")


def test_a_damaged_card_is_named(models: Path) -> None:
    path = models / "egg" / "model.json"
    content = json.loads(path.read_text())
    del content["card"]["licence"]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model\.json: `card.licence` is missing or damaged"):
        list_models()


def test_training_may_begin_with_it(models: Path) -> None:
    config = tiny_config()
    found = load_pretrained(new_network(config), "egg", spatial_dims=3, config=config)
    assert {r.outcome for r in found.rows} == {"loaded"}
    assert found.path == models / "egg" / "model.safetensors"


# ---- the command line


def test_models_are_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    shown = capsys.readouterr().out
    size = (models / "egg" / "model.safetensors").stat().st_size / 1e6
    for words in (
        "egg  Eggs in noise",
        "shell 0.900 (0.880–0.910), core",
        "CC0-1.0",
        f"{size:.1f} MB",
        "shell and core",
    ):
        assert words in shown


def test_models_as_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["name"] == "egg"
    assert model["dice"]["core"] == FIGURE
    assert model["sha256"] == read_model(models / "egg").sha256


def test_no_models_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped.list_models, "__defaults__", (tmp_path,))
    assert run(["models"]) == 0
    assert "No trained model comes with this installation" in capsys.readouterr().out


def test_infer_with_a_name(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scan,) = some_images(tmp_path / "scans", 1)
    assert run(["infer", str(scan), "-m", "egg", "-o", str(tmp_path / "masks"), "--device", "cpu"]) == 0
    assert (tmp_path / "masks" / scan.name).is_file()
    assert run(["infer", str(scan), "-m", "yolk", "-o", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "those are egg" in capsys.readouterr().err


def test_every_model_that_ships_is_whole() -> None:
    models = list_models(Path(medseg.__file__).parent / "models")
    assert [model.name for model in models] == ["hippocampus", "nerve"]
    # reads each as a user would: digest, configuration, card
    for model in models:
        found = read_model(model.folder)
        assert found.sha256 == model.sha256
        assert model.size <= shipped.LARGEST
        assert set(model.card.dice) == set(found.config.data.foreground)
        assert model.card.licence in (model.folder / "README.md").read_text()


def test_the_cards_that_ship_say_what_their_models_say() -> None:
    for model in list_models(Path(medseg.__file__).parent / "models"):
        description = json.loads((model.folder / "model.json").read_text(encoding="utf-8"))
        assert (model.folder / "README.md").read_text(encoding="utf-8") == page(model, description), model.name


def test_the_hippocampus_model_finds_the_hippocampus_of_the_sample_data(tmp_path: Path) -> None:
    # it has learnt these cases: a mask out of place, mirrored or of other labels would fall far below
    sample = Path(medseg.__file__).parent / "sample"
    images = sorted((sample / "imagesTr").glob("*.nii.gz"))[:3]
    results = medseg.infer(images, ["hippocampus"], tmp_path / "masks", medseg.InferOptions(device="cpu"))
    assert {r.status for r in results} == {"done"}
    report = medseg.evaluate(tmp_path / "masks", sample / "labelsTr", medseg.EvaluateOptions(allow_missing=True))
    judged = report.table[report.table["status"] == "ok"]
    assert len(judged) == 6
    assert judged["dice"].min() > 0.8
    assert all(q["expected"] is not None for r in results for q in r.quality.values())


@pytest.mark.shared_data
def test_the_nerve_model_finds_what_it_has_learnt(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "us_nerve_2d"
    images = sorted((folder / "imagesTr").iterdir())[:6]
    results = medseg.infer(images, ["nerve"], tmp_path / "masks", medseg.InferOptions(device="cpu"))
    assert {r.status for r in results} == {"done"}
    report = medseg.evaluate(tmp_path / "masks", folder / "labelsTr", medseg.EvaluateOptions(allow_missing=True))
    judged = report.table[report.table["status"] == "ok"]
    assert judged["dice"].mean() > 0.8
