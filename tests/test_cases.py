"""The four forms of a data set, folds that keep groups together, and what infer is given."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import phantom
import pytest
from PIL import Image as Picture
from pydicom import Dataset

from medseg.cases import Case, assign_folds, dicom_cases, fold_split, infer_inputs
from medseg.datasets import read_dataset
from medseg.errors import ConfigError, DataError
from medseg.readers import SeriesOptions


def touch(root: Path, *names: str) -> Path:
    """Empty files: listing opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def describe(root: Path, **content: object) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


def nnunet(root: Path, cases: int = 4, **content: object) -> Path:
    describe(root, **{"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, **content})
    for n in range(cases):
        touch(root, f"imagesTr/c{n}_0000.nii.gz", f"labelsTr/c{n}.nii.gz")
    return root


def case(name: str, group: str = "") -> Case:
    return Case(name, (Path(name),), Path(name), group or name)


def test_nnunet_folder(tmp_path: Path) -> None:
    dataset = read_dataset(nnunet(tmp_path, file_ending=".nii.gz"))
    assert dataset.form == "nnunet"
    assert [c.id for c in dataset.cases] == ["c0", "c1", "c2", "c3"]
    assert dataset.cases[0].label == tmp_path / "labelsTr" / "c0.nii.gz"
    assert dataset.cases[0].group == "c0"
    assert dataset.channels == ("CT",)
    assert dataset.labels == {"background": 0, "x": 1}
    assert dataset.problems == ()
    assert dataset.folds is None


def test_channel_number_is_taken_off_at_the_end_only(tmp_path: Path) -> None:
    describe(tmp_path, channel_names={"0": "US"}, labels={"background": 0, "x": 1})
    touch(tmp_path, "imagesTr/us_0000_0000.png", "labelsTr/us_0000.png")
    assert [c.id for c in read_dataset(tmp_path).cases] == ["us_0000"]


def test_channels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    describe(tmp_path, channel_names={"1": "T2", "0": "T1"}, labels={})
    touch(tmp_path, "imagesTr/a_0001.nii", "imagesTr/a_0000.nii", "labelsTr/a.nii")
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("T1", "T2")
    assert [p.name for p in dataset.cases[0].images] == ["a_0000.nii", "a_0001.nii"]


def test_old_description_with_modality_and_turned_labels(tmp_path: Path) -> None:
    dataset = read_dataset(
        nnunet(
            tmp_path,
            channel_names=None,
            modality={"0": "MRI"},
            labels={"0": "background", "1": "liver"},
            training=[{"image": "./imagesTr/c0.nii.gz", "label": "./labelsTr/c0.nii.gz"}],
        )
    )
    assert dataset.form == "nnunet"
    assert dataset.channels == ("MRI",)
    assert dataset.labels == {"background": 0, "liver": 1}


def test_regions_and_ignore(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    dataset = read_dataset(nnunet(tmp_path, labels=labels, regions_class_order=[1, 2]))
    assert dataset.labels == {"background": 0, "whole": (1, 2), "core": (2,), "ignore": 3}
    assert dataset.region_values == (1, 2)


def test_partners_that_are_missing_are_named(tmp_path: Path) -> None:
    root = nnunet(tmp_path, channel_names={"0": "T1", "1": "T2"}, cases=0)
    touch(root, "imagesTr/full_0000.nii", "imagesTr/full_0001.nii", "labelsTr/full.nii")
    touch(root, "imagesTr/half_0000.nii", "labelsTr/half.nii")
    touch(root, "imagesTr/bare_0000.nii", "imagesTr/bare_0001.nii", "labelsTr/lost.nii", "imagesTr/odd_0007.nii")
    dataset = read_dataset(root)
    text = {p.case: str(p) for p in dataset.problems}
    assert "half_0001" in text["half"]
    assert "without label" in text["bare"]
    assert "without image" in text["lost"]
    assert "odd_0007.nii" in text["odd_0007.nii"]
    assert [c.id for c in dataset.labelled] == ["full"]


def test_split_file_gives_folds_as_they_are(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    (root / "splits_final.json").write_text(
        json.dumps([{"train": ["c0", "c1"], "val": ["c2", "gone"]}, {"train": ["c2"], "val": ["c0"]}])
    )
    dataset = read_dataset(root)
    train, val = fold_split(dataset, 0)
    # c3 is in neither list
    assert ([c.id for c in train], [c.id for c in val]) == (["c0", "c1"], ["c2"])
    assert [p.severity for p in dataset.problems] == ["warning", "warning"]
    assert "gone" in str(dataset.problems[0])
    assert "1 of 4 cases, c3 the first, are in no fold" in str(dataset.problems[1])


@pytest.mark.parametrize("content", ["[]", "{}", '[{"train": []}]', "nonsense"])
def test_split_file_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    root = nnunet(tmp_path)
    (root / "splits_final.json").write_text(content)
    with pytest.raises(DataError, match=r"splits_final\.json"):
        read_dataset(root)


def test_split_file_with_a_case_on_both_sides_is_refused(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    (root / "splits_final.json").write_text(json.dumps([{"train": ["c0", "c1"], "val": ["c1"]}]))
    with pytest.raises(DataError, match="fold 0 trains on c1 and validates on c1"):
        read_dataset(root)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_case_named_twice_in_one_part_of_a_fold_is_refused(tmp_path: Path, part: str) -> None:
    root = nnunet(tmp_path)
    fold = {"train": ["c0"], "val": ["c1"]}
    (root / "splits_final.json").write_text(json.dumps([fold | {part: ["c2", "c2"]}]))
    with pytest.raises(DataError, match=f"fold 0 names c2 more than once in {part}"):
        read_dataset(root)


def test_decathlon_folder(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b.nii.gz")
    describe(
        tmp_path,
        modality={"0": "FLAIR", "1": "T1w"},
        labels={"0": "background", "1": "edema"},
        training=[
            {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
            {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
            {"image": "./imagesTr/c.nii.gz", "label": "./labelsTr/c.nii.gz"},
        ],
    )
    dataset = read_dataset(tmp_path)
    assert dataset.form == "decathlon"
    assert dataset.channels == ("FLAIR", "T1w")
    assert [c.id for c in dataset.cases] == ["a", "b"]
    assert [c.id for c in dataset.labelled] == ["a"]
    assert {p.case for p in dataset.problems} == {"b", "c"}


def test_plain_folder_ignores_what_is_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nrrd", "labels/a.nii.gz", "images/.DS_Store", "images/._a.nrrd", "labels/readme.txt")
    dataset = read_dataset(tmp_path)
    assert dataset.form == "plain"
    assert [c.id for c in dataset.cases] == ["a"]
    assert dataset.labels is None
    assert dataset.problems == ()


def test_plain_folder_names_of_four_digits_stay(tmp_path: Path) -> None:
    touch(tmp_path, "images/us_0000.png", "images/us_0001.png", "labels/us_0000.png", "labels/us_0001.png")
    assert [c.id for c in read_dataset(tmp_path).cases] == ["us_0000", "us_0001"]


def test_plain_folder_with_channels(tmp_path: Path) -> None:
    touch(tmp_path, "images/a_0000.nii", "images/a_0001.nii", "labels/a.nii")
    dataset = read_dataset(tmp_path)
    assert len(dataset.channels) == 2
    assert len(dataset.cases[0].images) == 2


def test_plain_folder_with_a_stem_twice_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii", "images/a.png", "labels/a.nii")
    dataset = read_dataset(tmp_path)
    assert "second image" in str(dataset.problems[0])


def test_csv_list_with_groups_and_folds(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.nii", "x/a2.nii", "x/b.nii", "x/b2.nii", "y/a.nii", "y/b.nii")
    (tmp_path / "list.csv").write_text(
        "case,image,image2,label,fold,group\na,x/a.nii,x/a2.nii,y/a.nii,0,p1\nb,x/b.nii,x/b2.nii,y/b.nii,1,p2\n"
    )
    dataset = read_dataset(tmp_path / "list.csv")
    assert dataset.form == "list"
    assert dataset.channels == ("image", "image2")
    assert dataset.cases[0] == Case("a", (tmp_path / "x/a.nii", tmp_path / "x/a2.nii"), tmp_path / "y/a.nii", "p1", 0)
    train, val = fold_split(dataset, 0)
    assert ([c.id for c in train], [c.id for c in val]) == (["b"], ["a"])


def test_json_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "l.nii")
    (tmp_path / "list.json").write_text(json.dumps([{"case": "a", "image": "a.nii", "label": "l.nii"}]))
    dataset = read_dataset(tmp_path / "list.json")
    assert dataset.cases[0].label == tmp_path / "l.nii"


def test_fold_column_that_parts_a_group_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "l.csv").write_text("case,image,label,fold,group\na,a.nii,a.nii,0,Smith\nb,b.nii,b.nii,1,Smith\n")
    with pytest.raises(DataError, match="trains on b and validates on a, which are of one group; keep") as caught:
        read_dataset(tmp_path / "l.csv")
    assert "Smith" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.csv", "case,image,label,group\n,a.nii,b.nii,Smith\n", r"without case name found \(of a.nii\); name"),
        ("l.csv", "case,image,label,group\n,,b.nii,Smith\n", r"without case name found \(of no image\)"),
        ("dataset.json", '{"training": [{"group": "Smith", "label": "b.nii"}]}', "has group, label, expected"),
        ("dataset.json", '{"training": ["a.nii"]}', "is 'a.nii', expected"),
    ],
)
def test_what_is_wrong_in_a_row_is_told_without_its_patient(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_dataset(tmp_path / name)
    assert "Smith" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,image\na,a.nii\n", "at least case and image"),
        ("case,image,label,fold\na,a.nii,a.nii,0\nb,a.nii,a.nii,\n", "b has no fold"),
        ("case,image,label,fold\na,a.nii,a.nii,x\n", "fold 'x'"),
        ("case,image,label,fold\na,a.nii,a.nii,0\nb,a.nii,a.nii,2\n", "without a gap"),
        ("case,image\na,a.nii\na,a.nii\n", "there 2 times"),
        ("case,image\na,a.nii,more\n", "line 2"),
        ("case,image\n,a.nii\n", "without case name"),
        ("case,image\n", "case and image|no case"),
    ],
)
def test_list_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.nii")
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path / "l.csv")
    assert "l.csv" in str(caught.value)


def test_files_of_a_list_that_are_missing_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    (tmp_path / "l.csv").write_text("case,image,label\na,a.nii,gone.nii\nb,lost.nii,a.nii\n")
    dataset = read_dataset(tmp_path / "l.csv")
    assert [c.id for c in dataset.cases] == ["a"]
    assert {p.file.name for p in dataset.problems} == {"gone.nii", "lost.nii"}


def test_folder_of_no_form_is_told_all_four(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"images found, missing .*labels") as caught:
        read_dataset(tmp_path)
    for form in ("nnU-Net", "Decathlon", "plain", "CSV"):
        assert form in str(caught.value)


def test_folder_without_a_case_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/readme.txt", "labels/readme.txt")
    with pytest.raises(DataError, match="no case found"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("labels", [["liver"], {"liver": "one"}, {"liver": [None]}])
def test_labels_without_values_are_refused(tmp_path: Path, labels: object) -> None:
    with pytest.raises(DataError, match=r"dataset\.json"):
        read_dataset(nnunet(tmp_path, labels=labels))


def test_folds_keep_groups_together_and_balance(tmp_path: Path) -> None:
    cases = [case(f"c{n}", f"p{n // 3}") for n in range(30)]
    folds = assign_folds(cases, folds=5)
    group = {c.id: c.group for c in cases}
    assert sorted(c for f in folds for c in f.val) == sorted(group)
    for fold in folds:
        assert len(fold.val) == 6
        assert set(fold.train) == set(group) - set(fold.val)
        assert not {group[c] for c in fold.train} & {group[c] for c in fold.val}


def test_folds_do_not_depend_on_the_order_of_cases() -> None:
    cases = [case(f"c{n}") for n in range(11)]
    assert assign_folds(cases, folds=3, seed=1) == assign_folds(cases[::-1], folds=3, seed=1)


def test_folds_depend_on_the_seed() -> None:
    cases = [case(f"c{n}") for n in range(20)]
    assert assign_folds(cases, folds=5, seed=0) != assign_folds(cases, folds=5, seed=1)


def test_folds_of_names_that_are_no_text() -> None:
    folds = assign_folds([case(f"caf\udce9{n}") for n in range(4)], folds=2)
    assert [len(fold.val) for fold in folds] == [2, 2]


def test_more_folds_than_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 folds asked for 2 groups.*; ask for --folds 2, or train on all"):
        assign_folds([case("a", "p"), case("b", "p"), case("c", "q")], folds=5)
    with pytest.raises(ConfigError, match=r"ask for --folds 2 to 3, or"):
        assign_folds([case(name) for name in "abc"], folds=5)
    with pytest.raises(ConfigError, match=r"1 groups.*; add other patients, or .*medseg train --fold all"):
        assign_folds([case("a")], folds=5)


def test_all_holds_nothing_back(tmp_path: Path) -> None:
    train, val = fold_split(read_dataset(nnunet(tmp_path)), "all")
    assert (len(train), val) == (4, [])


@pytest.mark.parametrize("fold", [-1, 2])
def test_fold_out_of_range_says_how_many_there_are(tmp_path: Path, fold: int) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        fold_split(read_dataset(nnunet(tmp_path)), fold, folds=2)


def test_infer_takes_files_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.nii.gz", "in/b.mha", "in/notes.txt", "in/sub/c.nii", "d.png")
    cases = infer_inputs([tmp_path / "in", tmp_path / "d.png"], channels=1)
    assert [c.id for c in cases] == ["a", "b", "d"]
    assert cases[0].images == (tmp_path / "in" / "a.nii.gz",)


def test_infer_takes_off_channel_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "us_0000_0000.nii.gz")
    assert [c.id for c in infer_inputs([tmp_path], channels=1)] == ["a", "us_0000"]


def test_infer_leaves_numbers_that_are_no_channels(tmp_path: Path) -> None:
    touch(tmp_path, "us_0000.png", "us_0001.png")
    assert [c.id for c in infer_inputs([tmp_path], channels=1)] == ["us_0000", "us_0001"]


def test_infer_groups_channels(tmp_path: Path) -> None:
    touch(tmp_path, "a_0001.nii", "a_0000.nii", "b_0000.nii")
    cases = infer_inputs([tmp_path], channels=2)
    # b is incomplete: reading refuses it by name, and a goes on
    assert [(c.id, [p.name for p in c.images]) for c in cases] == [
        ("a", ["a_0000.nii", "a_0001.nii"]),
        ("b", ["b_0000.nii"]),
    ]


def test_infer_keeps_frames_in_colour_apart(tmp_path: Path) -> None:
    for n in range(3):
        Picture.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"film_{n:04d}.png")
        Picture.new("L", (4, 4)).save(tmp_path / f"grey_{n:04d}.png")
    Picture.new("RGB", (4, 4)).save(tmp_path / "still_0000.png")
    cases = {c.id: len(c.images) for c in infer_inputs([tmp_path], channels=3)}
    assert cases == {"film_0000": 1, "film_0001": 1, "film_0002": 1, "grey": 3, "still": 1}


def test_grey_that_is_stored_as_colour_is_a_channel(tmp_path: Path) -> None:
    grey = Picture.linear_gradient("L").resize((4, 4))
    for n, mode in enumerate(("RGB", "L", "RGB")):
        grey.convert(mode).save(tmp_path / f"scan_{n:04d}.png")
    assert {c.id: len(c.images) for c in infer_inputs([tmp_path], channels=3)} == {"scan": 3}


def test_beside_a_file_without_number_an_incomplete_name_is_left_as_it_is(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "a_0000.nii", "p_0001.nii", "q_0000.nii")
    cases = {c.id: len(c.images) for c in infer_inputs([tmp_path], channels=3)}
    # the first alone may hold all channels, unless another has the name
    assert cases == {"a": 1, "a_0000": 1, "p_0001": 1, "q": 1}


def test_infer_groups_channels_beside_a_file_that_has_none(tmp_path: Path) -> None:
    names = [f"{name}_{n:04d}.nii" for name in "abc" for n in range(2)]
    touch(tmp_path, *names, "atlas.nii", "film_0000.nii", "film_0001.nii", "film_0002.nii")
    cases = {c.id: len(c.images) for c in infer_inputs([tmp_path], channels=2)}
    assert cases == {"a": 2, "b": 2, "c": 2, "atlas": 1, "film_0000": 1, "film_0001": 1, "film_0002": 1}


def test_infer_takes_a_folder_of_dicom_as_one_case(tmp_path: Path) -> None:
    touch(tmp_path, "series/1.dcm", "series/2.dcm", "study/s1/IM0", "study/s2/x.ima", "study/empty/readme")
    (tmp_path / "study/s1/IM0").write_bytes(b"\0" * 128 + b"DICM")
    cases = infer_inputs([tmp_path / "series", tmp_path / "study"], channels=1)
    assert [(c.id, c.images) for c in cases] == [
        ("series", (tmp_path / "series",)),
        ("s1", (tmp_path / "study/s1",)),
        ("s2", (tmp_path / "study/s2",)),
    ]


def test_infer_takes_each_series_of_a_folder_as_a_case(tmp_path: Path) -> None:
    def other(k: int, ds: Dataset) -> None:
        phantom.put(ds, SeriesInstanceUID="1.2.9", SOPInstanceUID=f"1.2.9.{k}")

    phantom.series(tmp_path / "scan")
    phantom.series(tmp_path / "both")
    phantom.series(tmp_path / "both/later", other)
    cases = infer_inputs([tmp_path / "scan", tmp_path / "both", tmp_path / "scan"], channels=1)
    first, second, third = sorted(cases, key=lambda c: c.id)
    # two share a folder: digits made of the UID, and nothing that stands in the files
    assert first.series is not None
    assert first.id == f"both-{first.series.digits}"
    assert (second.id, third.id) == ("later", "scan")
    assert third.images == (tmp_path / "scan",)
    assert [len(c.series.files) for c in cases if c.series] == [5, 5, 5]


def test_infer_takes_files_of_a_series_together(tmp_path: Path) -> None:
    folder = phantom.series(tmp_path / "scan")
    files = sorted(folder.iterdir())
    (case,) = infer_inputs(files, channels=1)
    assert (case.id, case.images) == ("scan", (folder,))
    assert case.series is not None
    assert len(case.series.files) == 5
    assert infer_inputs(files[:1], channels=1)[0].id == "IM03"
    uids = [phantom.enhanced(tmp_path / name) for name in ("1.2.3", "1.2.4")]
    assert [c.id for path in uids for c in infer_inputs([path], channels=1)] == ["1.2.3", "1.2.4"]


def test_infer_takes_archives_and_leaves_pictures_of_scans(tmp_path: Path) -> None:
    folder = phantom.series(tmp_path / "in/scan")
    (folder / "preview.png").write_bytes(b"-")
    shutil.make_archive(str(tmp_path / "in/zipped"), "zip", folder)
    assert sorted(c.id for c in infer_inputs([tmp_path / "in"], channels=1)) == ["scan", "zipped"]


def test_infer_takes_the_series_that_is_asked_for(tmp_path: Path) -> None:
    folder = phantom.series(tmp_path / "scan")
    options = SeriesOptions(phantom.SERIES, resample_gaps=True)
    (case,) = infer_inputs([folder], channels=1, series=options)
    assert case.series is not None
    assert case.series.options == options
    with pytest.raises(ConfigError, match=r"no series 1\.9 in the inputs"):
        infer_inputs([folder], channels=1, series=SeriesOptions("1.9"))


def test_slices_beside_a_volume_are_refused(tmp_path: Path) -> None:
    folder = phantom.series(tmp_path / "scan")
    (folder / "old_mask.nii.gz").touch()
    told = r"scan: DICOM files \(5, such as IM03\) and other images \(1, such as old_mask\.nii\.gz\) found"
    with pytest.raises(ConfigError, match=told):
        infer_inputs([folder], channels=1)
    with pytest.raises(ConfigError, match=told):
        dicom_cases(folder)
    # each kind by its names
    assert infer_inputs([folder / "old_mask.nii.gz"], channels=1)[0].id == "old_mask"
    assert len(infer_inputs(sorted(folder.glob("IM*")), channels=1)) == 1


def test_notes_beside_volumes_are_no_slices(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "README", "notes.1")
    (tmp_path / "a.json").write_text("{}")
    assert [c.id for c in infer_inputs([tmp_path], channels=1)] == ["a"]


def test_infer_takes_a_series_beside_a_cut_file_of_another_one(tmp_path: Path) -> None:
    folder = phantom.series(tmp_path / "scan")
    cut = phantom.plane(90, phantom.VOXELS[0])
    phantom.put(cut, SeriesInstanceUID="1.9", Rows=None, Columns=None)
    cut.save_as(folder / "cut", enforce_file_format=True)
    (case,) = infer_inputs([folder], channels=1, series=SeriesOptions(phantom.SERIES))
    assert case.series is not None
    assert infer_inputs([folder], channels=1)[0].series is None


def test_infer_takes_links_to_nothing_as_cases(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.nii").symlink_to(tmp_path / "itself.nii")
    assert sorted(c.id for c in infer_inputs([tmp_path], channels=1)) == ["a", "gone", "itself"]


@pytest.mark.parametrize("names", [("x/a.nii", "y/a.nii.gz"), ("x/a.nii", "x/a.png")])
def test_infer_refuses_one_name_for_two_inputs(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ConfigError, match="would both become case a") as caught:
        infer_inputs([tmp_path / name for name in names], channels=1)
    assert all(str(tmp_path / name) in str(caught.value) for name in names)


def test_infer_takes_a_file_once_that_is_named_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    assert len(infer_inputs([tmp_path, tmp_path / "a.nii"], channels=1)) == 1


def test_infer_takes_a_file_once_whatever_its_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.nii", "in/b.nii")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    cases = infer_inputs([Path("in"), tmp_path / "in" / "a.nii", Path("link")], channels=1)
    assert [c.images for c in cases] == [(Path("in/a.nii"),), (Path("in/b.nii"),)]


def test_infer_takes_a_file_and_a_link_of_its_name_as_one_case(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.nii", "y/b.nii")
    (tmp_path / "y/a.nii").symlink_to(tmp_path / "x/a.nii")
    cases = infer_inputs([tmp_path / "x", tmp_path / "y"], channels=1)
    assert [(c.id, c.images) for c in cases] == [("a", (tmp_path / "x/a.nii",)), ("b", (tmp_path / "y/b.nii",))]


def test_infer_groups_channels_that_are_spelled_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a_0000.nii", "a_0001.nii")
    monkeypatch.chdir(tmp_path)
    cases = infer_inputs([Path("a_0000.nii"), tmp_path / "a_0001.nii"], channels=2)
    assert [(c.id, [p.name for p in c.images]) for c in cases] == [("a", ["a_0000.nii", "a_0001.nii"])]


def test_infer_takes_links_of_two_names_to_one_file_as_two_channels(tmp_path: Path) -> None:
    touch(tmp_path, "real/x.nii")
    (tmp_path / "in").mkdir()
    for name in ("a_0000.nii", "a_0001.nii"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "real/x.nii")
    cases = infer_inputs([tmp_path / "in"], channels=2)
    assert [p.name for p in cases[0].images] == ["a_0000.nii", "a_0001.nii"]


def test_infer_names_the_first_five_names_that_clash_and_counts_the_others(tmp_path: Path) -> None:
    names = "abcdefg"
    touch(tmp_path, *(f"{folder}/{name}.nii" for folder in "xy" for name in names))
    with pytest.raises(ConfigError, match="7 names are shared") as caught:
        infer_inputs([tmp_path / "x", tmp_path / "y"], channels=1)
    said = str(caught.value)
    assert [f"become case {name}" in said for name in names] == [True] * 5 + [False] * 2
    assert "and 2 more names" in said


def test_infer_counts_the_inputs_of_one_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"p{n}/image.nii" for n in range(6)))
    with pytest.raises(ConfigError, match=r"p1/image\.nii and 4 more would all become case image; rename"):
        infer_inputs([tmp_path / f"p{n}" for n in range(6)], channels=1)


@pytest.mark.parametrize("folders", [("imagesTr", "imagesTs"), ("images", "labels"), ("imagesTr",)])
def test_infer_names_the_images_of_a_data_set(tmp_path: Path, folders: tuple[str, ...]) -> None:
    touch(tmp_path, *(f"{folder}/a.nii" for folder in folders))
    (tmp_path / "imagesTs").mkdir(exist_ok=True)
    meant = re.escape(str(tmp_path / ("imagesTs" if "imagesTs" in folders else folders[0])))
    with pytest.raises(ConfigError, match=f"no image found, .*; give {meant}$"):
        infer_inputs([tmp_path], channels=1)


def test_infer_refuses_what_holds_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt")
    with pytest.raises(ConfigError, match="no image found"):
        infer_inputs([tmp_path], channels=1)
    with pytest.raises(ConfigError, match="no such file"):
        infer_inputs([tmp_path / "gone"], channels=1)
    with pytest.raises(ConfigError, match="no input"):
        infer_inputs([], channels=1)


@pytest.mark.shared_data
def test_real_split_keeps_subjects_together(shared_data: Path) -> None:
    dataset = read_dataset(shared_data / "hippocampus")
    train, val = fold_split(dataset, 0)
    assert (len(train), len(val)) == (160, 40)
    # ids 2k−1 and 2k are two crops of one subject
    subject = [{(int(c.id[-3:]) + 1) // 2 for c in part} for part in (train, val)]
    assert not subject[0] & subject[1]


def test_group_zero_of_a_json_list_is_a_group(tmp_path: Path) -> None:
    rows = [{"case": n, "image": f"{n}.nii", "label": f"{n}.nii", "group": 0} for n in "ab"]
    for n in "ab":
        (tmp_path / f"{n}.nii").touch()
    (tmp_path / "l.json").write_text(json.dumps(rows))
    assert {c.group for c in read_dataset(tmp_path / "l.json").cases} == {"0"}
