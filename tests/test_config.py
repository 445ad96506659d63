"""Settings: mistakes are named with what would be right, and what is written is read back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg.config import (
    Config,
    DataConfig,
    Section,
    dump_yaml,
    make_config,
    nest,
    overlay,
    parse_assignment,
    read_config,
    read_yaml,
    settings_from,
)
from medseg.errors import ConfigError
from medseg.regions import check_regions

# that of the hospital node is another kind: test_hospital_settings.py
RECIPES = sorted(p for p in (Path(__file__).parents[1] / "configs").rglob("*.yaml") if p.name != "hospital.yaml")

# a value for every key that differs from its default
OTHER: dict[str, Any] = {
    "data": {
        "spatial_dims": 2,
        "channels": ["t1: weighted", "Größe #2"],
        "labels": {"background": 0, "yes": [1, 2], "1": [2], "ignore": 9},
        "region_values": [4, 300],
    },
    "preprocess": {
        "orient": False,
        "crop": "nonzero",
        "spacing_mm": [1e-5, 3e20],
        "intensity": [
            {"clip": [-1e-7, 1e17], "normalise": "fixed", "mean": -1e-9, "sd": 1e-5},
            {"clip": [0, 1], "normalise": "none"},
        ],
    },
    "network": {
        "name": "deeplabv3",
        "encoder": "resnet34",
        "channels": [8, 16],
        "output_stride": 8,
        "strides": [[2, 1], [2, 2]],
        "multi_grid": [1, 2, 4],
        "norm": "group",
        "aspp_rates": [3, [1, 2]],
        "aspp_channels": 7,
        "image_pooling": False,
        "pooling_window": [24, 40],
        "dropout": 1e-6,
        "skip_channels": 3,
        "decoder_channels": 5,
        "upsampling": "interpolate",
        "arguments": {"filters": [8, 16], "act": "PRELU"},
        "width": 0.3,
        "hidden_channels": 96,
        "dilations": [1, [2, 5]],
        "leak": 1e-4,
        "separable": True,
        "context": "large",
        "gated": False,
        "scales": [0.5, 1],
        "scale_fusion": "attention",
    },
    "augment": {
        "p_affine": 0.3,
        "rotation_deg": [12.5],
        "scale": [0.5, 0.6],
        "shift": 0.01,
        "flip_axes": [1],
        "p_flip": 0.1,
        "p_intensity": 0.2,
        "brightness": 0.3,
        "contrast": [0.9, 1.1],
        "gamma": [0.8, 0.9],
        "noise": 0.4,
        "p_gamma": 0.5,
        "p_noise": 0.6,
        "blur_voxels": [0.1, 0.2],
        "p_blur": 0.7,
        "low_resolution": [0.3, 0.4],
        "p_low_resolution": 0.8,
        "stretch": 0.15,
        "shear": 0.05,
        "p_gamma_inverted": 0.9,
        "bias_field": 0.25,
        "p_bias_field": 0.35,
    },
    "loss": {
        "dice_weight": 0.5,
        "cross_entropy_weight": 2,
        "batch_dice": False,
        "smooth": 1e-3,
        "focal": 1.5,
        "boundary_weight": 0.5,
    },
    "train": {
        "epochs": 7,
        "time_budget_s": None,
        "steps_per_epoch": 3,
        "batch_size": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "pretrained_factor": 0.7,
        "freeze_share": 0.2,
        "weight_decay": 0,
        "warm_up": 0.5,
        "clip_gradient": 12,
        "foreground_fraction": 1,
        "seed": 4294967295,
        "precision": "32",
        "deterministic": True,
        "save_every_s": 1,
        "calibration_share": 0.3,
        "validation_share": 0,
    },
    "windows": {
        "patch_size": [24, 40],
        "mode": "halo",
        "tile_size": [48, 64],
        "halo": [0, 8],
        "whole_voxels": 1000,
        "overlap": 0.75,
        "batch_size": 1,
        "flip_axes": [1],
        "shifts": [[1, 2], [3, 0]],
        "scales": [1.0, 0.75],
        "skip_air": "off",
    },
    "postprocess": {
        "crf": True,
        "crf_iterations": 2,
        "crf_smoothness_weight": 0,
        "crf_smoothness_mm": 0.002,
        "crf_appearance_weight": 0.5,
        "crf_appearance_mm": 7,
        "crf_intensity_sd": 0.75,
        "crf_compatibility": 3,
        "crf_radius_mm": 11,
        "crf_radius_voxels": 4,
    },
}


def test_defaults_are_a_valid_configuration() -> None:
    assert make_config({}) == Config()


# ---- mistakes


def test_an_unknown_key_is_named_with_the_keys_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `train\.epoch`; the keys there are .*epochs, .*learning_rate"):
        make_config({"train": {"epoch": 3}})


def test_an_unknown_section_is_named_with_the_sections_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown key `trian`; the keys there are augment, data, loss, network"):
        make_config({"trian": {}})


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"loss\.smoth.*train\.epoch"):
        make_config({"train": {"epoch": 3}, "loss": {"smoth": 1}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "batch_size", "many"),
        ("train", "batch_size", 0),
        ("train", "batch_size", 2.5),
        ("train", "learning_rate", -1),
        ("train", "learning_rate", float("nan")),
        ("train", "learning_rate", float("inf")),
        ("train", "precision", "fp16"),
        ("train", "seed", 2**32),
        ("windows", "overlap", 1),
        ("windows", "patch_size", 64),
        ("network", "output_stride", 3),
        ("network", "channels", [0]),
        ("augment", "p_flip", 1.5),
        ("augment", "scale", [0, 1]),
        ("augment", "contrast", [2, 1]),
        ("data", "spatial_dims", 4),
        ("preprocess", "spacing_mm", [1, 0, 1]),
        ("preprocess", "crop", "yes"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(section: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: .*{section}\.{key}") as caught:
        make_config({section: {key: value}}, source="recipe.yaml")
    shown = value[0] if isinstance(value, list) and key != "spacing_mm" else value
    assert "found" in str(caught.value) or str(shown) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"epochs": 3}}, "exactly one of epochs and time_budget_s"),
        ({"train": {"time_budget_s": None}}, "exactly one of epochs and time_budget_s"),
        ({"preprocess": {"spacing_mm": [1, 1, 1], "shape": [8, 8, 8]}}, "spacing_mm or shape, not both"),
        ({"preprocess": {"spacing_mm": [1, 1]}}, r"preprocess\.spacing_mm has 2 numbers, expected 3"),
        ({"windows": {"patch_size": [64, 64]}}, r"windows\.patch_size has 2 numbers, expected 3"),
        ({"network": {"strides": [[2, 2, 2], [2, 2]]}}, r"network\.strides\[1\] has 2 numbers"),
        ({"augment": {"rotation_deg": [10]}}, r"augment\.rotation_deg has 1 numbers"),
        ({"augment": {"flip_axes": [0, 3]}}, r"augment\.flip_axes: 3 is no axis"),
        ({"windows": {"flip_axes": [3]}}, r"windows\.flip_axes: 3 is no axis"),
        ({"windows": {"tile_size": [64]}}, r"windows\.tile_size has 1 numbers, expected 3"),
        ({"windows": {"halo": [8, 8]}}, r"windows\.halo has 2 numbers, expected 3"),
        ({"windows": {"shifts": [[1, 2, 3], [1]]}}, r"windows\.shifts\[1\] has 1 numbers, expected 3"),
        ({"data": {"channels": ["t1", "t2"]}}, r"preprocess\.intensity has 1 entries"),
        ({"data": {"labels": {"background": 1}}}, "`background` must be 0"),
        ({"data": {"labels": {"a": 1, "b": 1}}}, "two labels share one value"),
        ({"data": {"labels": {"a": 0}}}, "two labels share one value"),
        ({"data": {"labels": {"a": [0, 1]}}}, "label `a` has the value 0, which is the background"),
        ({"data": {"labels": {"a": []}}}, "expected a name and at least one"),
        ({"data": {"labels": {" ": 1}}}, "expected a name and at least one"),
        ({"data": {"labels": {"background": 0, "ignore": 1}}}, "expected at least one to be learnt"),
        ({"data": {"labels": {"a": [1, 2], "b": [2, 1]}}}, r"regions_class_order in dataset.json\), found 0"),
        ({"data": {"labels": {"a": 1, "ignore": 1}}}, "two labels share one value"),
        ({"data": {"labels": {"a": 1, "ignore": 0}}}, "two labels share one value"),
        ({"data": {"labels": {"a": 1, "ignore": [2, 3]}}}, "`ignore` has 2 values, expected one"),
        ({"data": {"labels": {"a": 70000}}}, "outside 0..65535"),
        ({"data": {"labels": {"a": -1}}}, "outside 0..65535"),
        ({"data": {"labels": {"a": [1, 2], "b": 2}, "region_values": [1]}}, "2 regions need"),
        ({"data": {"labels": {f"l{n}": n for n in range(1, 256)}}}, "255 labels found, expected at most 254"),
        ({"windows": {"skip_air": "on"}}, r"windows\.skip_air: on found with 3 dimensions and .*normalise: image"),
        (
            {
                "data": {"spatial_dims": 2},
                "preprocess": {"intensity": [{"normalise": "fixed"}]},
                "windows": {"skip_air": "on"},
            },
            "on found with 2 dimensions and .*: fixed, expected 3",
        ),
    ],
)
def test_contradictions_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(values)


def test_air_may_be_skipped_where_it_is_known() -> None:
    how = {"intensity": [{"normalise": "fixed", "sd": 200.0}]}
    assert make_config({"preprocess": how, "windows": {"skip_air": "on"}}).windows.skip_air == "on"


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.seed = 3  # type: ignore[misc]


# ---- labels and channels


def test_background_is_always_there_and_ignore_is_never_predicted() -> None:
    data = DataConfig(labels={"b": 9, "ignore": 4, "a": 2})
    assert (data.foreground, data.out_channels, data.out_values) == (("b", "a"), 3, (0, 9, 2))
    assert (data.ignore_value, data.is_regions) == (4, False)


def test_regions_have_no_background_channel() -> None:
    data = DataConfig(labels={"background": 0, "whole": (1, 2), "core": 2}, region_values=(1, 2))
    assert (data.is_regions, data.out_channels, data.out_values) == (True, 2, (1, 2))


def test_regions_without_an_order_get_one() -> None:
    # the smaller first, a label beside regions, and values that several regions share
    labels = {"ignore": 9, "core": 3, "whole": [1, 2, 3], "background": 0, "inner": [2, 3], "other": (3, 5)}
    data = make_config({"data": {"labels": labels}}).data
    assert data.foreground == ("whole", "inner", "other", "core")
    assert data.region_values == (1, 2, 5, 3)
    check_regions(data)
    # one that is given stays as it is
    given = DataConfig(labels={"core": 3, "whole": (1, 3)}, region_values=(3, 1))
    assert (given.foreground, given.region_values) == (("core", "whole"), (3, 1))


@pytest.mark.parametrize(
    ("labels", "written"),
    [
        ({"whole": (1, 2), "core": 2}, (1, 2)),
        ({"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4}, (2, 1, 4)),
        # none holds the other
        ({"left": (1, 2), "right": (2, 3)}, (1, 3)),
    ],
)
def test_regions_that_are_read_back_as_written(labels: dict[str, Any], written: tuple[int, ...]) -> None:
    check_regions(DataConfig(labels=labels | {"ignore": 9}, region_values=written))


@pytest.mark.parametrize(
    ("labels", "written", "words"),
    [
        ({"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4}, (1, 2, 4), "read as `core` too.*`core` is written as 2"),
        ({"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4}, (1, 2, 4), r"\[2, 1, 4\] fits"),
        ({"whole": (1, 2), "core": 2}, (4, 5), r"none of its values \[1, 2\]"),
        ({"core": 2, "whole": (1, 2)}, (2, 1), "`whole` holds all of `core` and would be painted over it"),
        (
            {"enh": 3, "core": (1, 3), "whole": (1, 2, 3)},
            (3, 1, 2),
            r"that only it and those around it have; list the labels as whole, core, enh with \[2, 1, 3\]$",
        ),
        (
            {"core": 2, "whole": (1, 2), "rest": (1,)},
            (2, 1, 3),
            r"those around it have; list the labels as whole, core, rest$",
        ),
    ],
)
def test_regions_that_are_read_back_as_others(labels: dict[str, Any], written: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_regions(DataConfig(labels=labels, region_values=written))


# ---- YAML


def test_the_sample_of_other_values_names_every_key() -> None:
    for name, section in OTHER.items():
        known = set(getattr(Config(), name).__class__.model_fields)
        # a configuration has one of spacing_mm and shape, one of focal and label_smoothing, and these labels are
        # regions, which are not cleaned
        either = {"shape", "label_smoothing", "largest_component", "fill_holes", "min_size_mm3"}
        assert known - set(section) <= either, name


def test_every_section_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = make_config(OTHER)
    for name in OTHER:
        assert getattr(config, name) != getattr(Config(), name)
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert read_config(path) == config


def test_the_defaults_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(Config()), encoding="utf-8")
    assert read_config(path) == Config()


def test_a_shape_is_read_back(tmp_path: Path) -> None:
    config = make_config({"preprocess": {"shape": [16, 24, 8]}})
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert read_config(path) == config


def test_reasons_stand_as_comments_above_their_keys() -> None:
    lines = dump_yaml(Config(), {"train.batch_size": "two cores", "windows.overlap": "half"}).splitlines()
    assert lines[lines.index("  # two cores") + 1].startswith("  batch_size: 4")
    assert lines[lines.index("  # half") + 1] == "  overlap: 0.5"
    assert sum("#" in line for line in lines) == 2


def test_small_numbers_are_numbers_to_any_yaml_reader() -> None:
    values = yaml.safe_load(dump_yaml(make_config({"train": {"learning_rate": 1e-5}})))
    assert values["train"]["learning_rate"] == 1e-5


def test_every_public_field_has_a_section_class() -> None:
    fields = {n: f.annotation for n, f in Config.model_fields.items() if n != "schema_version"}
    assert all(isinstance(kind, type) and issubclass(kind, Section) for kind in fields.values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- 1\n- 2\n", "holds list"),
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\xfa", "not valid YAML"),
        (b"", "holds None"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"broken\.yaml: .*{words}"):
        read_yaml(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "trap.yaml"
    path.write_text(f"train: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_that_ships_loads(path: Path) -> None:
    values = read_yaml(path)
    if not set(values) <= set(Config.model_fields):
        pytest.skip(f"{path.name} is no recipe of a training: it has other sections")
    assert read_config(path)


def test_there_are_recipes() -> None:
    if not RECIPES:
        pytest.skip("configs/ holds no recipe yet")
    assert any(set(read_yaml(p)) <= set(Config.model_fields) for p in RECIPES)


# ---- changes


def test_overlay_goes_section_by_section_and_leaves_its_input_alone() -> None:
    base = {"train": {"epochs": 1, "seed": 2}, "loss": {"smooth": 1}}
    assert overlay(base, {"train": {"seed": 3}}, {"train": {"seed": 4, "batch_size": 5}}) == {
        "train": {"epochs": 1, "seed": 4, "batch_size": 5},
        "loss": {"smooth": 1},
    }
    assert base == {"train": {"epochs": 1, "seed": 2}, "loss": {"smooth": 1}}


def test_overlay_replaces_labels_and_lists_as_a_whole() -> None:
    base = {"data": {"labels": {"a": 1, "b": 2}, "channels": ["t1", "t2"]}}
    change = {"data": {"labels": {"c": 3}, "channels": ["ct"]}}
    assert overlay(base, change) == change


@pytest.mark.parametrize(("section", "key"), [("postprocess", "min_size_mm3"), ("network", "arguments")])
def test_an_empty_mapping_takes_away_what_is_there(section: str, key: str) -> None:
    base = {section: {key: {"a": 5.0}}}
    assert overlay(base, {section: {key: {"b": 3.0}}}) == {section: {key: {"a": 5.0, "b": 3.0}}}
    assert overlay(base, settings_from([f"{section}.{key}={{}}"])) == {section: {key: {}}}
    assert overlay(base, {section: {}}) == base


def test_overlay_over_null_takes_the_change() -> None:
    assert overlay({"train": None}, {"train": {"seed": 1}}) == {"train": {"seed": 1}}


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("train.batch_size=2", ("train", "batch_size"), 2),
        ("train.epochs=null", ("train", "epochs"), None),
        ("windows.patch_size=[8, 9]", ("windows", "patch_size"), [8, 9]),
        ("data.labels={a: 1}", ("data", "labels"), {"a": 1}),
        ("network.name=a=b", ("network", "name"), "a=b"),
    ],
)
def test_assignments(text: str, keys: tuple[str, ...], value: object) -> None:
    assert parse_assignment(text) == (keys, value)


@pytest.mark.parametrize("text", ["train.batch_size", "=3", "train.=3", ".x=3", "a=[1"])
def test_an_assignment_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_assignment(text)


def test_nest() -> None:
    assert nest(("a", "b"), 1) == {"a": {"b": 1}}


def test_later_settings_win() -> None:
    assert settings_from(["train.seed=1", "train.seed=2"], {"train": {"epochs": 3}}) == {
        "train": {"seed": 2, "epochs": 3}
    }
