"""Data sets as users keep them: what is odd in a folder or a list is named, and no case is lost without a word."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from pathlib import Path

import phantom
import pytest

from medseg.asked import plan
from medseg.check import check_dataset
from medseg.datasets import read_dataset
from medseg.errors import DataError


def touch(root: Path, *names: str) -> Path:
    """Empty files: listing opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def nnunet(root: Path, *names: str, **content: object) -> Path:
    """An nnU-Net folder with cases of these file names, such as a.nii."""
    for name in names:
        stem, dot, ending = name.partition(".")
        touch(root, f"imagesTr/{stem}_0000{dot}{ending}", f"labelsTr/{name}")
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, **content}))
    return root


def listed(root: Path, text: str) -> Path:
    """A list of this text, beside files of the names a to d."""
    touch(root, *(f"{name}.nii" for name in "abcd"))
    (root / "l.csv").write_text(text)
    return root / "l.csv"


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"l\.csv: column 'image' found twice.*image2"):
        read_dataset(listed(tmp_path, "case,image,image,label\nx,a.nii,b.nii,c.nii\n"))


@pytest.mark.parametrize("header", ["case,image,label", "case,image,label,"])
def test_a_comma_at_the_end_of_each_line_is_no_field(tmp_path: Path, header: str) -> None:
    (case,) = read_dataset(listed(tmp_path, f"{header}\nx,a.nii,b.nii,\n,,,\n")).cases
    assert (case.id, case.label) == ("x", tmp_path / "b.nii")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,image,label\nx,a.nii,b.nii,c.nii\n", "line 2 has 4 fields, expected 3"),
        ("case,image,label\nx,a.nii\n", "line 2 has 2 fields, expected 3"),
        ("case,image,\nx,a.nii,b.nii\n", "line 2 has a field in a column without a name"),
        ("case;image;label\nx;a.nii;b.nii\n", "separate the columns by commas"),
        ("case\timage\tlabel\nx\ta.nii\tb.nii\n", "separate the columns by commas"),
        ("case,image,label\n", "no case below the header found"),
        ("", "columns none found"),
        ("Image,IMAGE,case\na.nii,b.nii,x\n", "columns Image, IMAGE, case found"),
    ],
)
def test_a_list_that_is_no_table_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(listed(tmp_path, text))


def test_columns_may_have_capitals(tmp_path: Path) -> None:
    (case,) = read_dataset(listed(tmp_path, "Case,Image,LABEL,Patient,Fold\nx,a.nii,b.nii,p1,\n")).cases
    assert (case.id, case.label, case.group, case.fold) == ("x", tmp_path / "b.nii", "p1", None)
    # a column that is there by its name is meant
    (case,) = read_dataset(listed(tmp_path, "case,image,label,Label\nx,a.nii,b.nii,c.nii\n")).cases
    assert case.label == tmp_path / "b.nii"
    (tmp_path / "l.json").write_text('[{"Case": "y", "Image": "a.nii", "Label": "b.nii"}]')
    assert [c.id for c in read_dataset(tmp_path / "l.json").cases] == ["y"]


def test_a_gap_in_a_list_is_told_by_case_and_column(tmp_path: Path) -> None:
    data = read_dataset(listed(tmp_path, "case,image,image2,label\nx,a.nii,b.nii,c.nii\ny,a.nii,,c.nii\n"))
    (problem,) = data.problems
    assert "l.csv: nothing in column image2 of case y, expected an image for each channel" in str(problem)


def test_a_case_of_a_json_list_may_be_the_number_0(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "l.json").write_text('[{"case": 0, "image": "a.nii", "label": "b.nii"}]')
    assert [case.id for case in read_dataset(tmp_path / "l.json").cases] == ["0"]


def test_a_link_to_nothing_is_a_case_that_fails(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii", "labels/a.nii", "labels/b.nii")
    (tmp_path / "images/b.nii").symlink_to("/mnt/share/b.nii")
    dataset = read_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a", "b"]
    found = [finding.found for finding in check_dataset(dataset).errors if finding.file.endswith("images/b.nii")]
    assert found == ["a link to /mnt/share/b.nii, which is not there"]


def test_cases_of_another_ending_are_told_and_capitals_do_not_matter(tmp_path: Path) -> None:
    root = nnunet(tmp_path, "a.nii.gz", "b.NII.GZ", "c.mha", "d.mha", file_ending=".nii.gz")
    dataset = read_dataset(root)
    assert [case.id for case in dataset.labelled] == ["a", "b"]
    assert [(p.file.name, p.severity) for p in dataset.problems] == [("c_0000.mha", "warning"), ("c.mha", "warning")]
    assert all(".nii.gz, the file_ending of dataset.json" in str(p) for p in dataset.problems)
    assert "2 of 4 files" in str(dataset.problems[0])


def test_a_label_in_two_files_of_an_nnunet_folder_is_told(tmp_path: Path) -> None:
    dataset = read_dataset(touch(nnunet(tmp_path, "a.nii.gz"), "labelsTr/a.nii"))
    assert "a second label beside a.nii" in str(dataset.problems[0])


def test_labelled_cases_in_no_fold_of_a_split_are_told(tmp_path: Path) -> None:
    root = nnunet(tmp_path, "a.nii", "b.nii", "c.nii", "d.nii")
    (root / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]')
    (problem,) = read_dataset(root).problems
    assert problem.severity == "warning"
    assert "2 of 4 cases, c the first, are in no fold" in str(problem)


def test_paths_of_a_list_that_lead_nowhere_cost_only_their_cases(tmp_path: Path) -> None:
    long = "x" * 300
    (tmp_path / "folder").mkdir()
    rows = f"x,a.nii,b.nii\nlong,{long}.nii,b.nii\nuser,~nobody-of-that-name/x.nii,b.nii\nfolder,folder,folder\n"
    dataset = read_dataset(listed(tmp_path, f"case,image,label\n{rows}"))
    assert [case.id for case in dataset.cases] == ["x"]
    assert {p.case: p.found for p in dataset.problems} == {
        "long": "cannot be reached (File name too long)",
        "user": "no such file or folder",
        "folder": "a folder",
    }


def test_a_data_set_behind_a_closed_door_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def closed(path: Path, **how: bool) -> os.stat_result:
        if "closed" in path.parts[:-1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", closed)
    path = listed(tmp_path, "case,image,label\nx,closed/a.nii,b.nii\ny,a.nii,closed/b.nii\nz,a.nii,b.nii\n")
    dataset = read_dataset(path)
    assert [case.id for case in dataset.labelled] == ["z"]
    assert [p.found for p in dataset.problems] == ["cannot be reached (Permission denied)"] * 2
    with pytest.raises(DataError, match=r"closed/data: cannot be reached \(Permission denied\)"):
        read_dataset(tmp_path / "closed/data")


def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check the path and its permissions"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("nothing", [[], "", None])
@pytest.mark.parametrize("first", [True, False])
def test_an_entry_without_an_image_costs_only_its_case(tmp_path: Path, nothing: object, first: bool) -> None:
    touch(tmp_path, "imagesTr/a.nii", "labelsTr/a.nii", "labelsTr/b.nii")
    whole = {"image": "imagesTr/a.nii", "label": "labelsTr/a.nii"}
    empty = {"image": nothing, "label": "labelsTr/b.nii"}
    training = [empty, whole] if first else [whole, empty]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training}))
    dataset = read_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a"]
    assert [(p.case, p.found) for p in dataset.problems] == [(f"training[{1 - first}]", "no image")]


def test_a_decathlon_folder_whose_first_image_is_missing_is_one_all_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/b.nii", "labelsTr/a.nii", "labelsTr/b.nii")
    training = [{"image": f"imagesTr/{name}.nii", "label": f"labelsTr/{name}.nii"} for name in "ab"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training}))
    dataset = read_dataset(tmp_path)
    assert (dataset.form, [case.id for case in dataset.cases]) == ("decathlon", ["b"])
    assert [p.file.name for p in dataset.problems] == ["a.nii"]


def test_where_every_image_is_missing_all_are_found(tmp_path: Path) -> None:
    rows = "".join(f"{n},lost{n}.nii,a.nii\n" for n in range(7))
    path = listed(tmp_path, f"case,image,label\n{rows}")
    assert [finding.case for finding in check_dataset(path).errors] == [str(n) for n in range(7)]
    with pytest.raises(DataError, match="7 errors found, nothing was trained"):
        plan(path)


@pytest.mark.parametrize(("images", "labels"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("form", ["plain", "nnunet"])
def test_accents_may_be_spelled_in_two_ways(tmp_path: Path, form: str, images: str, labels: str) -> None:
    image, label = (unicodedata.normalize(how, "Zoë") for how in (images, labels))
    if form == "plain":
        touch(tmp_path, f"images/{image}.nii", f"labels/{label}.nii")
    else:
        nnunet(tmp_path, "other.nii")
        touch(tmp_path, f"imagesTr/{image}_0000.nii", f"labelsTr/{label}.nii")
        split = [{"train": ["other"], "val": [label]}]
        (tmp_path / "splits_final.json").write_text(json.dumps(split))
    dataset = read_dataset(tmp_path)
    assert dataset.problems == ()
    assert dataset.labelled[0].id == unicodedata.normalize("NFC", "Zoë")
    assert dataset.labelled[0].images[0].is_file()


@pytest.mark.parametrize(
    ("form", "images", "labels"), [("plain", "images", "labels"), ("nnunet", "imagesTr", "labelsTr")]
)
def test_folders_of_dicom_in_a_data_set_are_told_with_what_to_do(
    tmp_path: Path, form: str, images: str, labels: str
) -> None:
    root = tmp_path / "my data"
    (root / labels).mkdir(parents=True)
    if form == "nnunet":
        nnunet(root)
    folder = phantom.series(root / images / "a")
    (problem,) = read_dataset(root).problems
    assert problem.severity == "error"
    assert f"{folder}: a folder of DICOM files" in str(problem)
    assert f"medseg convert '{folder}' -o '{folder}.nii.gz'" in str(problem)
    touch(root, f"{images}/b_0000.nii", f"{labels}/b{'' if form == 'nnunet' else '_0000'}.nii")
    assert [p.severity for p in read_dataset(root).problems] == ["warning"]


@pytest.mark.parametrize("column", ["group", "patient", "subject", "patient_id", "subject_id"])
def test_a_column_of_a_list_that_names_patients_keeps_them_together(
    tmp_path: Path, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"{name},{name}.nii,{name}.nii,{owner}\n" for name, owner in zip("abcd", ("x", "x", "y", "")))
    found = read_dataset(listed(tmp_path, f"case,image,label,{column}\n{rows}"))
    assert [case.group for case in found.cases] == ["x", "x", "y", "d"]
    assert "not used" not in caplog.text


def test_of_two_columns_that_name_patients_the_plainer_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_dataset(listed(tmp_path, "case,image,label,patient,group\na,a.nii,b.nii,p,g\n"))
    assert [case.group for case in found.cases] == ["g"]
    assert "columns not used: patient" in caplog.text


def test_a_list_that_names_a_folder_of_dicom_says_what_to_do(tmp_path: Path) -> None:
    folder = phantom.series(tmp_path / "scan")
    (problem,) = read_dataset(listed(tmp_path, "case,image,label\nx,scan,a.nii\n")).problems
    assert f"a folder of DICOM files, expected an image; make a file of it: medseg convert {folder}" in str(problem)
    assert "and name that file in l.csv" in str(problem)


def test_a_label_s_value_is_never_cut_to_a_whole_number(tmp_path: Path) -> None:
    shape = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "numTraining": 0}
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({**shape, "labels": {"background": 0, "x": 1.9}}))
    with pytest.raises(DataError, match=r"label 'x' has value 1\.9, expected a whole number"):
        read_dataset(tmp_path)


def test_a_file_forgotten_in_a_listed_folder_of_nnunet_makes_no_decathlon_of_it(tmp_path: Path) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
    listed = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(3)]
    described = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "x"}, "training": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    for n in range(3):
        (tmp_path / "imagesTr" / f"c{n}_0000.nii.gz").touch()
        (tmp_path / "labelsTr" / f"c{n}.nii.gz").touch()
    (tmp_path / "imagesTr" / "c2.nii.gz").touch()
    found = read_dataset(tmp_path)
    assert (found.form, len(found.cases)) == ("nnunet", 3)
    # where all that is listed is there, copies with a number change nothing
    for n in range(2):
        (tmp_path / "imagesTr" / f"c{n}.nii.gz").touch()
    assert read_dataset(tmp_path).form == "decathlon"
