"""A model folder: what was saved is read bit for bit, and whatever is missing, damaged or swapped is named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXACT, tiny_config, tiny_model

from medseg.config import DataConfig
from medseg.errors import ConfigError, ModelError
from medseg.infer import load_model
from medseg.model import (
    COLOURS,
    changed,
    is_complete,
    label_names,
    label_table,
    new_network,
    read_model,
    record_choices,
    save_model,
)


def describe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite model.json with `change` done to its content."""
    content = json.loads((folder / "model.json").read_text())
    change(content)
    (folder / "model.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.json").unlink(),
        lambda folder: (folder / "model.json").write_text((folder / "model.json").read_text()[:200]),
        lambda folder: describe(folder, lambda content: content.pop("config")),
        lambda folder: describe(folder, lambda content: content.pop("inference")),
        # of a medseg that did not note whose labels it was chosen by
        lambda folder: describe(folder, lambda content: content["training"].pop("validation_sha256")),
    ],
)
def test_a_model_that_is_not_whole_is_made_once_more(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    config = tiny_config()
    network = new_network(config)
    save_model(network, config, tmp_path, training={"validation_sha256": "these"}, licence="CC0-1.0")
    record_choices(tmp_path, {})
    assert is_complete(network, config, tmp_path, judged_by="these")
    assert not is_complete(network, config, tmp_path, judged_by="others")
    assert not is_complete(new_network(config), config, tmp_path, judged_by="these")
    harm(tmp_path)
    assert not is_complete(network, config, tmp_path, judged_by="these")


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = tiny_config(network={"norm": "batch"})
    network = new_network(config)
    network.train()(torch.randn(2, 1, 8, 8, 8))
    save_model(network, config, tmp_path, training={"cases": 2}, licence="CC0-1.0")
    model = read_model(tmp_path)
    before, after = network.state_dict(), model.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def test_configuration_and_description_come_back(tmp_path: Path) -> None:
    config = tiny_config(preprocess={"spacing_mm": [1, 1.5, 2]}, windows={"overlap": 0.25})
    model = read_model(tiny_model(tmp_path, config))
    assert model.config == config
    assert model.label_names == {3: "shell", 7: "core"}
    assert model.description["licence"] == "CC0-1.0"
    assert model.description["training"] == {"cases": 0}
    assert [entry["value"] for entry in model.description["labels"]] == [3, 7]
    assert {"python", "medseg", "torch", "monai", "numpy"} <= set(model.description["versions"])


def test_a_read_model_is_ready_to_infer(tmp_path: Path) -> None:
    assert not read_model(tiny_model(tmp_path)).network.training


def test_the_digest_is_that_of_the_weights_file(tmp_path: Path) -> None:
    model = read_model(tiny_model(tmp_path))
    assert model.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_nothing_but_the_two_files_is_left(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    tiny_model(tmp_path, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        read_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (tiny_model(tmp_path) / name).unlink()
    with pytest.raises(ModelError, match=f"no {name} found"):
        read_model(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "a")
    tiny_model(tmp_path / "b", tiny_config(network={"channels": [4, 12]}))
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ModelError, match=r"a/model\.safetensors: weights of another network"):
        read_model(tmp_path / "a")


@pytest.mark.parametrize("what", ["missing", "extra"])
def test_a_missing_or_an_unknown_tensor_is_refused(tmp_path: Path, what: str) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    if what == "missing":
        del weights[first]
    else:
        weights["stranger"] = torch.zeros(1)
    save_file(weights, path)
    with pytest.raises(ModelError, match=f"`{first if what == 'missing' else 'stranger'}`"):
        read_model(tmp_path)


def test_swapped_weights_of_an_equal_network_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "a", seed=0)
    tiny_model(tmp_path / "b", seed=1)
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ModelError, match=r"a/model\.safetensors: not the weights that model\.json describes"):
        read_model(tmp_path / "a")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"not json"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tiny_model(tmp_path) / "model.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.json: is not valid JSON"):
        read_model(tmp_path)


def test_json_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tiny_model(tmp_path) / "model.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"model\.json: holds list, expected an object"):
        read_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_cut_off_weights_are_named(tmp_path: Path, keep: int) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors"):
        read_model(tmp_path)


def test_one_flipped_bit_in_the_weights_is_found(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not the weights"):
        read_model(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(tmp_path: Path, version: object) -> None:
    describe(tiny_model(tmp_path), lambda d: d.update(schema_version=version))
    with pytest.raises(ModelError, match=r"model\.json: schema_version .* found, expected 1"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("config"),
        lambda d: d.update(config=[]),
        lambda d: d.update(config=None),
        lambda d: d["config"]["train"].update(epoch=3),
        lambda d: d["config"]["network"].update(name="unheard_of"),
    ],
)
def test_an_unusable_configuration_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    describe(tiny_model(tmp_path), change)
    with pytest.raises(ModelError, match=r"model\.json: no usable configuration"):
        read_model(tmp_path)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_under_the_name_of_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    torch.save({"weights": Trap(tmp_path / "ran")}, path)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors"):
        read_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_names_and_colours_of_labels() -> None:
    data = DataConfig(labels={"background": 0, "b": 9, "a": 2, "ignore": 4})
    assert label_names(data) == {9: "b", 2: "a"}
    assert label_table(data) == [
        {"name": "b", "value": 9, "colour": COLOURS[0]},
        {"name": "a", "value": 2, "colour": COLOURS[1]},
    ]


def test_regions_are_named_by_the_value_that_is_written() -> None:
    data = DataConfig(labels={"whole": (1, 2, 3), "core": (2,)}, region_values=(4, 5))
    assert label_names(data) == {4: "whole", 5: "core"}


def test_colours_repeat_from_the_eighth_label_on() -> None:
    table = label_table(DataConfig(labels={f"l{n}": n for n in range(1, 11)}))
    assert table[7]["colour"] == table[0]["colour"]


# ---- a trained model with other settings


def test_another_output_stride_keeps_the_weights_and_takes_the_rates_along(tmp_path: Path) -> None:
    config = tiny_config(
        network={"output_stride": 4, "aspp_rates": [1, 2], "name": "deeplabv3", "upsampling": "interpolate"}
    )
    folder = tiny_model(tmp_path, config)
    trained, denser = read_model(folder), read_model(folder, {"network": {"output_stride": 2}})
    assert denser.config.network.aspp_rates == (2, 4)
    before, after = trained.network.state_dict(), denser.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert denser.network.encoder.strides[-1] == (2, 2, 2)


def test_rates_that_are_given_stay_as_given() -> None:
    config = tiny_config(network={"output_stride": 4})
    changes = {"network": {"output_stride": 2, "aspp_rates": [5]}}
    assert changed(config, changes).network.aspp_rates == (5,)


def test_what_a_model_learnt_cannot_be_changed() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--set preprocess\.orient: belongs to what a trained model has learnt; expected one of network",
    ):
        changed(tiny_config(), {"preprocess": {"orient": False}})


@pytest.mark.parametrize("change", [{"norm": "group"}, {"multi_grid": [2]}, {"aspp_channels": 8}])
def test_what_weights_mean_cannot_be_changed(change: dict[str, Any]) -> None:
    # a group norm has the weights of an instance norm: they would fit, and mean something else
    with pytest.raises(ConfigError, match="belongs to what a trained model has learnt"):
        changed(tiny_config(), {"network": change})


def test_weights_that_do_not_fit_another_stride_are_told(tmp_path: Path) -> None:
    # a sub-pixel classifier gives as many logits as a block has voxels
    config = tiny_config(network={"name": "deeplabv3", "output_stride": 4, "aspp_rates": [1]})
    with pytest.raises(ModelError, match=r'do not fit a network with \{"output_stride": 2\}'):
        read_model(tiny_model(tmp_path, config), {"network": {"output_stride": 2}})


def test_an_output_stride_that_the_encoder_cannot_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network.output_stride 8 is not possible.*it can have 2, 4"):
        read_model(tiny_model(tmp_path), {"network": {"output_stride": 8}})


# ---- what a cross-validation chose


def chosen(folder: Path, **changes: Any) -> Path:
    """A folder of `medseg-crossval`: two models that clean for themselves, and a choice that takes that back."""
    for n in range(2):
        run = tiny_model(folder / "net" / f"fold_{n}", seed=n)
        record_choices(run, {"postprocess": {"settings": {"postprocess": {"fill_holes": ["core"]}}}})
    best = {
        "schema_version": 1,
        "models": ["net/fold_0", "net/fold_1"],
        "settings": {"postprocess": {"fill_holes": [], "min_size_mm3": {"shell": 4.0}}},
        "command": "not read",
    }
    (folder / "best.json").write_text(json.dumps(best | changes))
    return folder


def test_the_folder_of_a_cross_validation_stands_for_what_it_chose(tmp_path: Path) -> None:
    segmenter = load_model(chosen(tmp_path / "cv"), options=EXACT)
    assert [m.sha256 for m in segmenter.models] == [
        read_model(tmp_path / "cv" / "net" / f"fold_{n}").sha256 for n in range(2)
    ]
    assert segmenter.config.postprocess.fill_holes == ()
    assert segmenter.config.postprocess.min_size_mm3 == {"shell": 4.0}


def test_settings_that_are_given_go_over_those_of_a_cross_validation(tmp_path: Path) -> None:
    options = replace(EXACT, settings={"postprocess": {"fill_holes": ["shell"]}})
    postprocess = load_model(chosen(tmp_path), options=options).config.postprocess
    assert (postprocess.fill_holes, postprocess.min_size_mm3) == (("shell",), {"shell": 4.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, r"best\.json: is damaged \(schema_version\)"),
        ({"models": []}, r"is damaged \(models\)"),
        ({"settings": {"postprocess": 1}}, r"is damaged \(settings\.postprocess\)"),
        ({"models": ["../net/fold_0"]}, r"model '\.\./net/fold_0', expected the path of a run folder below"),
        ({"models": ["/net/fold_0"]}, "model '/net/fold_0', expected"),
        ({"models": ["C:net"]}, "model 'C:net', expected"),
        ({"models": ["net/fold_0", "net/fold_0"]}, "is there twice"),
        ({"models": ["net/fold_0", "net/fold_7"]}, "fold_7: no such folder"),
        ({"settings": {"data": {"labels": {"x": 1}}}}, r"best\.json: `settings` does not fit the model .*data\.labels"),
        ({"settings": {"postprocess": {"fill_holes": ["yolk"]}}}, r"best\.json: `settings` does not fit .*yolk"),
    ],
)
def test_a_choice_that_cannot_be_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(chosen(tmp_path / "cv", **changes), options=EXACT)


def test_a_choice_that_is_no_json_is_named(tmp_path: Path) -> None:
    chosen(tmp_path).joinpath("best.json").write_text("{")
    with pytest.raises(ModelError, match=r"best\.json: is damaged"):
        load_model(tmp_path, options=EXACT)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_file_of_a_model_is_told_with_its_folder(tmp_path: Path, name: str) -> None:
    folder = tiny_model(tmp_path / "run")
    with pytest.raises(ModelError, match=rf"{name}: a file, expected the folder .* such as .*run$"):
        load_model(folder / name, options=EXACT)


def test_a_training_that_has_not_ended_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "last.pt").touch()
    with pytest.raises(ModelError, match=r"training has not ended \(last.pt, no model.json\); go on with --resume"):
        load_model(tmp_path, options=EXACT)


def test_a_run_in_the_folder_of_a_cross_validation_is_not_taken_for_its_choice(tmp_path: Path) -> None:
    tiny_model(chosen(tmp_path / "cv"), seed=5)
    with pytest.raises(ModelError, match=r"cv: holds a training run .* and a cross-validation .* move one of them"):
        load_model(tmp_path / "cv", options=EXACT)


def test_a_cross_validation_without_a_choice_is_told(tmp_path: Path) -> None:
    chosen(tmp_path).joinpath("best.json").rename(tmp_path / "crossval.json")
    with pytest.raises(ModelError, match=r"a cross-validation without best\.json: a fold is missing or has failed"):
        load_model(tmp_path, options=EXACT)


def test_a_choice_is_not_mixed_with_other_models(tmp_path: Path) -> None:
    folder = chosen(tmp_path)
    with pytest.raises(ModelError, match="holds the choice of a cross-validation; give it alone"):
        load_model(folder, folder / "net" / "fold_0", options=EXACT)
