"""A configuration of other data is refused; what a data set leaves open, or what is typed, is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import medseg
from medseg.cases import Dataset
from medseg.datasets import read_dataset
from medseg.errors import ConfigError
from medseg.told import read_labels, refuse_other_data, told
from medseg.train import TrainOptions, plan_run

MakeDataset = Callable[..., Path]


@pytest.fixture
def dataset(tiny_dataset: MakeDataset) -> Path:
    return tiny_dataset(cases=2, form="nnunet")


@pytest.fixture
def file(dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """The whole configuration that is planned for `dataset`, with another section `data`."""

    def call(**data: Any) -> Path:
        made = medseg.plan(dataset, device="cpu").config
        values = medseg.overlay(made.model_dump(mode="json"), {"data": data})
        path = tmp_path / "full.yaml"
        path.write_text(medseg.dump_yaml(medseg.make_config(values)))
        return path

    return call


def planned(dataset: Path, config: Path, **settings: Any) -> medseg.Config:
    options = TrainOptions(config=config, settings={"data": settings} if settings else {})
    return plan_run(read_dataset(dataset), options, {}, device=torch.device("cpu")).config


def test_the_configuration_of_the_data_set_itself_is_taken(dataset: Path, file: Callable[..., Path]) -> None:
    assert planned(dataset, file()).data.labels == {"background": 0, "shell": 1, "core": 2}
    # in another order and without background it means the same
    assert planned(dataset, file(labels={"core": 2, "shell": 1})).data.foreground == ("core", "shell")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"labels": {"shell": 2, "core": 1}}, r"full.yaml: is of other data: it says data.labels .*\"shell\": 2.*tiny"),
        ({"channels": ["CT"]}, r"it says data.channels \[\"CT\"\], but .* says \[\"MRI\"\]"),
    ],
)
def test_a_configuration_of_other_data_is_refused(
    dataset: Path, file: Callable[..., Path], data: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        planned(dataset, file(**data))
    # what is typed is meant
    key, value = next(iter(data.items()))
    assert f"--set 'data.{key}={json.dumps(value)}'" in str(caught.value)
    assert planned(dataset, file(**data), **data).model_dump(mode="json")["data"][key] == value


def test_a_part_of_a_configuration_may_not_differ_either(dataset: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.yaml"
    part.write_text("data: {labels: {core: 1, shell: 2}}\n")
    with pytest.raises(ConfigError, match="is of other data"):
        planned(dataset, part)


def test_a_part_of_a_configuration_may_make_regions_of_the_labels(dataset: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.yaml"
    part.write_text("data: {labels: {whole: [1, 2], core: [2]}, region_values: [1, 2]}\n")
    found = planned(dataset, part).data
    assert (found.labels, found.region_values) == ({"whole": (1, 2), "core": (2,)}, (1, 2))


def test_what_a_data_set_leaves_open_is_told_by_the_file(tiny_dataset: MakeDataset, file: Callable[..., Path]) -> None:
    plain = tiny_dataset(cases=2, name="plain")
    found = planned(plain, file(labels={"core": 2, "shell": 1}, channels=["CT"])).data
    assert (found.labels, found.channels) == ({"core": 2, "shell": 1}, ("CT",))


def test_values_that_the_configuration_does_not_name_are_found_before_anything_is_done(
    tiny_dataset: MakeDataset, file: Callable[..., Path]
) -> None:
    with pytest.raises(medseg.DataError, match="label values 2 in"):
        planned(tiny_dataset(cases=2, name="plain"), file(labels={"shell": 1}))


def test_the_order_of_regions_is_compared_where_both_say_it() -> None:
    labels = {"whole": (1, 2), "core": (2, 3)}
    data = Dataset(Path("set"), "nnunet", (), ("image",), labels, (1, 2))
    with pytest.raises(ConfigError, match=r"data.region_values \[1, 3\], but set says \[1, 2\]"):
        refuse_other_data(data, Path("c.yaml"), {"labels": labels, "region_values": [1, 3]}, {})
    refuse_other_data(data, Path("c.yaml"), {"labels": labels, "region_values": [1, 3]}, {"region_values": [1, 3]})


BRATS = Dataset(
    Path("set"), "nnunet", (), ("T1", "T1Gd", "FLAIR"), {"background": 0, "necrosis": 1, "edema": 2, "enhancing": 3}
)
REGIONS = {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}


@pytest.mark.parametrize(
    "given",
    [
        {"labels": REGIONS, "region_values": [2, 1, 3]},
        {"labels": {"enhancing": [1, 2, 3], "core": [1]}},
        {"labels": {"necrosis": 1, "edema": 2, "ignore": 3}},
        {"labels": {"NCR": 1, "ED": 2, "ET": 3}},
        {"channels": ["t1n", "t1c", "t2f"]},
        {"labels": {"necrosis": 1, "edema": 2, "enhancing": 3, "ignore": 255}},
    ],
)
def test_other_groups_and_names_of_what_a_data_set_holds_are_taken_and_told(
    given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    refuse_other_data(BRATS, Path("c.yaml"), given, {})
    (record,) = caplog.records
    assert f"c.yaml: data.{next(iter(given))}" in record.message
    assert "where set says" in record.message


@pytest.mark.parametrize(
    "given",
    [
        {"labels": {"Edema": 1, "Necrosis": 2, "enhancing": 3}},
        {"labels": {"necrosis": 1, "edema": 2, "enhancing": 4}},
        {"labels": {**REGIONS, "other": [4]}},
        {"channels": ["T1", "FLAIR", "T1Gd"]},
        {"channels": ["T1", "T1Gd"]},
        {"channels": ["T1", "T1Gd", "CT"]},
    ],
)
def test_another_value_channel_or_unit_is_of_other_data(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"is of other data: it says data.{next(iter(given))}"):
        refuse_other_data(BRATS, Path("c.yaml"), given, {})


def test_a_region_is_made_of_the_same_values_in_both() -> None:
    # edema and necrosis are 1 and 2 here, 2 and 1 there
    data = Dataset(Path("set"), "nnunet", (), ("image",), {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})
    with pytest.raises(ConfigError, match="is of other data"):
        refuse_other_data(data, Path("c.yaml"), {"labels": REGIONS}, {})


# ---- the order of regions


def test_an_order_that_a_file_does_not_hold_is_not_compared() -> None:
    data = Dataset(Path("set"), "nnunet", (), ("image",), {"whole": (1, 2, 4), "core": (2,)}, (4, 2))
    for labels in ({"whole": [1, 2, 4], "core": [2]}, {"core": [2], "whole": [1, 2, 4]}):
        refuse_other_data(data, Path("c.yaml"), {"labels": labels}, {})
        # nor does it replace that of the data set
        assert told(data, {"labels": labels}) == data
    listed = told(data, {"labels": {"background": 0, "core": 2, "whole": [4, 2, 1]}})
    assert list((listed.labels or {}).items()) == [("background", 0), ("whole", (4, 2, 1)), ("core", 2)]
    assert listed.region_values == (4, 2)
    other = told(data, {"labels": {"whole": [1, 2, 4], "rest": [1, 4]}})
    assert (other.labels, other.region_values) == ({"whole": (1, 2, 4), "rest": (1, 4)}, (2, 1))
    assert told(data, {"labels": {"a": 1, "b": 2, "c": 4}}).region_values == ()


def test_the_order_of_a_whole_configuration_without_one_is_that_of_the_data_set(
    tiny_dataset: MakeDataset, tmp_path: Path
) -> None:
    folder = tiny_dataset(cases=2, form="nnunet")
    description = json.loads((folder / "dataset.json").read_text())
    description |= {"labels": {"background": 0, "shell": [1], "core": [2]}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(description))
    values = medseg.plan(folder, device="cpu").config.model_dump(mode="json")
    values["data"] |= {"labels": {"core": [2], "shell": [1]}}
    del values["data"]["region_values"]
    path = tmp_path / "whole.yaml"
    path.write_text(json.dumps(values))
    found = planned(folder, path).data
    assert (found.foreground, found.region_values) == (("shell", "core"), (1, 2))


def test_labels_that_cannot_be_are_named_with_where_they_stand() -> None:
    with pytest.raises(ConfigError, match=r"part\.yaml: two labels share one value"):
        told(Dataset(Path("set"), "plain", (), ("image",)), {"labels": {"a": 1, "b": 1}}, source="part.yaml")


def test_of_many_labels_those_that_differ_are_shown() -> None:
    labels = {f"label number {n}": n for n in range(1, 60)}
    data = Dataset(Path("set"), "nnunet", (), ("image",), labels)
    with pytest.raises(
        ConfigError, match=r'data.labels {"label number 7": 77, …}, but set says {"label number 7": 7, …};'
    ):
        refuse_other_data(data, Path("c.yaml"), {"labels": {**labels, "label number 7": 77}}, {})


def test_many_labels_of_a_file_alone_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    labels = {f"label number {n}": n for n in range(1, 60)}
    refuse_other_data(Dataset(Path("set"), "plain", (), ("image",)), Path("c.yaml"), {"labels": labels}, {})
    assert not caplog.records


ORDERED = Dataset(Path("set"), "nnunet", (), ("MRI",), {"a": (1, 5, 6), "b": (2, 7)}, (5, 7))


@pytest.mark.parametrize("given", [{"a2": [1, 5, 6], "b": [2, 7]}, {"b": [7, 2], "a": [6, 1, 5]}])
@pytest.mark.parametrize("empty", [{}, {"region_values": []}])
def test_regions_keep_the_values_of_the_data_set_whatever_they_are_called(
    given: dict[str, Any], empty: dict[str, Any]
) -> None:
    found = told(ORDERED, {"labels": given} | empty)
    assert found.region_values == (5, 7)
    assert [set(values) for values in (found.labels or {}).values()] == [{1, 5, 6}, {2, 7}]
    # an empty list, which every plan has, contradicts nothing
    refuse_other_data(ORDERED, Path("c.yaml"), {"labels": given} | empty, {})


def test_labels_that_are_no_regions_any_more_have_no_order() -> None:
    data = Dataset(Path("set"), "nnunet", (), ("MRI",), {"a": (1,), "b": (2,)}, (1, 2))
    assert told(data, {"labels": {"a": 1, "b": 2}}).region_values == ()


@pytest.mark.parametrize(
    ("own", "other"), [(("CT",), ["image"]), (("T1", "T2"), ["image"]), (("T1", "T2"), ["T1", "T2", "FLAIR"])]
)
@pytest.mark.parametrize("form", ["nnunet", "plain"])
def test_other_numbers_and_kinds_of_channels_are_other_data(own: tuple[str, ...], other: list[str], form: Any) -> None:
    data = Dataset(Path("set"), form, (), own)
    if form == "plain" and len(own) == 1:
        # nothing says more than that there is a file
        refuse_other_data(data, Path("c.yaml"), {"channels": other}, {})
        return
    with pytest.raises(ConfigError, match=r"c\.yaml: is of other data: it says data\.channels"):
        refuse_other_data(data, Path("c.yaml"), {"channels": other}, {})


def test_of_many_labels_those_that_differ_are_shown_and_none_is_advised_alone() -> None:
    many = {f"structure_{n}": n for n in range(1, 118)}
    data = Dataset(Path("set"), "nnunet", (), ("CT",), many)
    with pytest.raises(ConfigError) as caught:
        refuse_other_data(data, Path("c.yaml"), {"labels": {**many, "tumour": 200}}, {})
    text = str(caught.value)
    assert 'it says data.labels {"tumour": 200, …}, but set says nothing of it' in text
    assert text.endswith("say so with --set data.labels= and all of its own")


def test_a_whole_configuration_without_labels_has_those_of_the_data_set(
    dataset: Path, file: Callable[..., Path]
) -> None:
    path = file()
    values = medseg.read_yaml(path)
    del values["data"]["labels"]
    path.write_text(json.dumps(values))
    assert planned(dataset, path).data.labels == {"background": 0, "shell": 1, "core": 2}


# ---- labels from files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.yaml", "liver: 1\ntumour: 2\n"),
        ("config.yaml", "data: {labels: {liver: 1, tumour: 2}}\n"),
        ("dataset.json", '{"labels": {"liver": 1, "tumour": 2}}'),
        ("dataset.json", '{"labels": {"1": "liver", "2": "tumour"}}'),
    ],
)
def test_labels_are_read_from_every_form(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_labels(tmp_path / name) == {"liver": 1, "tumour": 2}


def test_labels_of_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {labels: {a: 4}}\n")
    assert read_labels(tmp_path) == {"a": 4}


def test_labels_of_a_model_without_its_run(tmp_path: Path) -> None:
    described = {"config": {"data": {"labels": {"liver": 1, "whole": [1, 2]}}}, "labels": []}
    (tmp_path / "model.json").write_text(json.dumps(described, indent="\t"))
    assert read_labels(tmp_path) == {"liver": 1, "whole": (1, 2)}


def test_a_json_file_may_be_indented_with_tabs(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{\n\t"labels": {\n\t\t"liver": 1\n\t}\n}\n')
    assert read_labels(tmp_path / "dataset.json") == {"liver": 1}
    # as Windows begins a file
    (tmp_path / "dataset.json").write_text('{"labels": {"liver": 1}}', encoding="utf-8-sig")
    assert read_labels(tmp_path / "dataset.json") == {"liver": 1}
    (tmp_path / "dataset.json").write_text('{"labels": }')
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_labels(tmp_path / "dataset.json")


def test_labels_of_a_model_that_comes_with_medseg() -> None:
    assert set(read_labels(Path("hippocampus"))) == {"background", "anterior", "posterior"}


def test_a_folder_of_that_name_speaks_only_if_it_says_something_of_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("hippocampus")
    (folder / "images").mkdir(parents=True)
    with caplog.at_level("WARNING"):
        assert set(read_labels(folder)) == {"background", "anterior", "posterior"}
    assert "hippocampus: the model that comes with medseg is taken, not the folder of that name" in caplog.text
    # a data set is a source of labels, too
    (folder / "dataset.json").write_text('{"labels": {"head": 1}}')
    assert read_labels(folder) == {"head": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("liver: big\n", "label 'liver' has value 'big', expected a whole number"),
        ("liver: 1.9\n", r"label 'liver' has value 1\.9"),
        ("liver: [1, 2.5]\n", r"label 'liver' has value \[1, 2\.5\]"),
        ("liver: yes\n", "label 'liver' has value True"),
        ('"1": liver\n"2": liver\n', "label 'liver' has value 1 and value 2, expected one"),
        ("{}\n", "no labels found"),
        ("data: 3\n", "no labels found"),
        ("data: {labels: [1]}\n", "no labels found"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "l.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"l\.yaml: {reason}"):
        read_labels(tmp_path / "l.yaml")
