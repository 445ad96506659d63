"""A model with its card, out of a run folder and a cross-validation; what may not ship is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_shipped import WORDS
from tiny import tiny_config
from typer.testing import CliRunner

import medseg
from medseg.model import new_network, read_description, record_choices, save_model
from medseg_pipelines.ship import CARDS, app, ship

ABOUT = {key: value for key, value in WORDS.items() if key not in ("dice", "judged")}
TRAINING = {
    "data_set": "eggs",
    "data_sha256": "ab12",
    "cases": 4,
    "validation_cases": ["egg_7"],
    "steps": 300,
    "seconds": 1210.4,
    "device": "a laptop",
    "precision": "32",
}
CHOICES = {
    "windows": {"settings": {"windows": {"overlap": 0.25}}, "measured": [{"name": "overlap 0.25"}]},
    "tta": {"settings": {"windows": {"shifts": [[1, 1, 1]]}}, "measured": []},
    "postprocess": {"settings": {"postprocess": {"fill_holes": ["core"]}}, "measured": []},
    "quality": {"settings": {}, "measured": [], "flip_axes": [], "model": {"some": "model"}},
}


def figures(mean: float, n: int = 12) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - 0.02, mean + 0.01], "n": n}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = tiny_config(preprocess={"spacing_mm": [1, 1.5, 2]})
    save_model(new_network(config), config, tmp_path / "run", training=TRAINING, licence="unknown")
    return tmp_path / "run"


@pytest.fixture
def about(tmp_path: Path) -> Path:
    (tmp_path / "egg.yaml").write_text(yaml.safe_dump(ABOUT))
    return tmp_path / "egg.yaml"


@pytest.fixture
def crossval(tmp_path: Path, run: Path) -> Callable[..., Path]:
    """Writes crossval.json with two networks, of which the run's is the second; `change` is done to it before."""

    def write(change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
        config = json.loads((run / "model.json").read_text())["config"]
        other = config | {"network": config["network"] | {"norm": "group"}}
        # a longer training is the same recipe
        same = config | {"train": config["train"] | {"time_budget_s": 7.0}}
        record: dict[str, Any] = {
            "complete": True,
            "setup": {"dataset": "eggs", "folds": 2, "cases": 12, "patients": 9},
            "networks": [
                {"name": "other", "config": other, "folds": []},
                {"name": "egg", "config": same, "folds": [{"fold": n, "steps": 310 + n} for n in range(2)]},
            ],
            "methods": [
                method("egg + other", ["egg", "other"], 0.95),
                method("egg, cleaned", ["egg"], 0.93, {"fill_holes": ["core"]}),
                method("egg", ["egg"], 0.9),
                method("other", ["other"], 0.8),
            ],
        }
        change(record)
        for n in range(2):
            fold = tmp_path / "egg" / f"fold_{n}"
            save_model(new_network(tiny_config()), tiny_config(), fold, training=TRAINING, licence="unknown")
            record_choices(fold, CHOICES)
        path = tmp_path / "crossval.json"
        path.write_text(json.dumps(record))
        return path

    return write


def method(name: str, networks: list[str], dice: float, postprocess: dict[str, Any] | None = None) -> dict[str, Any]:
    labels = {"shell": figures(dice), "core": figures(dice - 0.1)}
    return {"name": name, "networks": networks, "postprocess": postprocess or {}, "labels": labels}


def test_the_dice_is_that_of_the_network_alone(run: Path, about: Path, crossval: Any, tmp_path: Path) -> None:
    made = ship(run, crossval(), tmp_path / "models" / "egg", about=about)
    assert made.card.dice["shell"].mean == 0.9
    assert made.card.dice["core"].model_dump() == pytest.approx({"mean": 0.8, "low": 0.78, "high": 0.81, "cases": 12})
    assert made.card.judged.startswith("2-fold cross-validation of the same recipe, 12 cases of 9 patients")
    assert medseg.list_models(tmp_path / "models")[0].card == made.card


def test_the_card_says_all_that_one_has_to_know(run: Path, about: Path, crossval: Any, tmp_path: Path) -> None:
    made = ship(run, crossval(), tmp_path / "made" / "egg", about=about)
    text = (tmp_path / "made" / "egg" / "README.md").read_text()
    rows = ["| shell | 0.900 | 0.880 to 0.910 | 12 |", "| core | 0.800 | 0.780 to 0.810 | 12 |"]
    said = [
        *rows,
        "not for breakfast",
        "bootstrap interval over patients",
        "CC0-1.0",
        "300 steps in 20 minutes on a laptop, in float32, on 4 cases of `eggs`",
    ]
    said += ["medseg infer scan.nii.gz -m egg -o masks", "8 × 8 × 8 voxels at 1 × 1.5 × 2 mm", made.sha256, "torch "]
    assert [words for words in said if words not in text] == []
    assert "egg_7" not in text + (tmp_path / "made" / "egg" / "model.json").read_text()
    assert sorted(p.name for p in (tmp_path / "made" / "egg").iterdir()) == [
        "README.md",
        "model.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(complete=False), "is not finished"),
        (lambda r: r["networks"].pop(), r"not trained as any network in .*crossval\.json \(other: network.norm: "),
        (lambda r: r["networks"][1]["config"]["augment"].update(p_affine=1), r"egg: augment.p_affine: 1 there"),
        (lambda r: r["networks"][1]["config"]["train"].update(batch_size=9), r"egg: train.batch_size: 9 there"),
        (lambda r: r["setup"].update(dataset="hens"), r"learnt `eggs`, .* is of `hens`"),
        (lambda r: r["networks"][1]["folds"][1].update(steps=400), r"300 steps, the folds of .* for up to 400"),
        (lambda r: r["methods"][2]["labels"]["core"].update(ci95=None), "no interval for `core`; judge more cases"),
        (lambda r: r["methods"][2]["labels"].pop("core"), "its labels are core, shell, the card has Dice of shell"),
    ],
)
def test_a_judgement_that_is_not_of_this_model_is_refused(
    run: Path, about: Path, crossval: Any, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    with pytest.raises(medseg.ConfigError, match=words):
        ship(run, crossval(change), tmp_path / "made" / "egg", about=about)
    assert not (tmp_path / "made").exists()


def test_a_run_that_held_nothing_back_infers_as_the_folds_do(
    run: Path, about: Path, crossval: Any, tmp_path: Path
) -> None:
    ship(run, crossval(), tmp_path / "made" / "egg", about=about)
    chosen = read_description(tmp_path / "made" / "egg")["inference"]
    assert chosen["windows"]["settings"] == {"windows": {"overlap": 0.25}}
    assert chosen["tta"]["settings"] == {"windows": {"shifts": [[1, 1, 1]]}}
    assert chosen["quality"] == CHOICES["quality"]
    # the Dice of the card is that without cleaning
    assert "postprocess" not in chosen


def test_the_command(run: Path, about: Path, crossval: Any, tmp_path: Path) -> None:
    asked = [str(run), str(crossval()), "-o", str(tmp_path / "made" / "egg")]
    done = CliRunner().invoke(app, [*asked, "--about", str(about)])
    assert done.exit_code == 0
    assert (tmp_path / "made" / "egg" / "README.md").is_file()
    assert CliRunner().invoke(app, asked).exit_code == 2


def test_what_is_known_of_the_models_makes_cards() -> None:
    files = sorted(CARDS.glob("*.yaml"))
    assert [p.stem for p in files] == ["hippocampus", "nerve"]
    for path in files:
        words = medseg.read_yaml(path)
        card = medseg.make_card(words | {"dice": WORDS["dice"], "judged": "by nobody"}, source=path.name)
        assert any("No medical device" in limit for limit in card.limits)
        assert card.licence in ("CC-BY-SA-4.0", "CC-BY-4.0")
