"""Digests of a data set: what is the same data, what is another, and what is learnt though it is held back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medseg.cases import Case, Dataset
from medseg.check import check_dataset
from medseg.datasets import read_dataset
from medseg.errors import ConfigError
from medseg.fingerprint import data_sha256, image_digests, voxel_digests
from medseg.leaks import refuse_leaks
from medseg.readers import file_sha256


def a_case(folder: Path, value: int, ending: str) -> Case:
    folder.mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.full((4, 5, 6), value, np.int16)), str(folder / f"i{ending}"))
    return Case(folder.name, (folder / f"i{ending}",), None, folder.name)


@pytest.mark.parametrize("ending", [".mhd", ".nhdr", ".mha"])
def test_equal_headers_of_other_voxels_are_other_data(tmp_path: Path, ending: str) -> None:
    one, other, copy = (a_case(tmp_path / n, v, ending) for n, v in (("a", 1), ("b", 2), ("c", 1)))
    digests = image_digests([one, other, copy])
    assert digests["a"] == digests["c"] != digests["b"]
    assert data_sha256([one]) == data_sha256([copy]) != data_sha256([other])
    refuse_leaks([one], [other])
    with pytest.raises(ConfigError, match="1 of the 1 cases held back are trained on under another name, first c as a"):
        refuse_leaks([one], [copy])


# ---- leaks

# no two of them have a channel in common; the first voxel of each is 0
NOISE = np.random.default_rng(0).integers(0, 1000, (8, 6, 5, 4)).astype(np.int16)
NOISE[:, 0, 0, 0] = 0
LEFT = np.diag([-1.0, 1.0, 1.0, 1.0])


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def listed(folder: Path, cases: Mapping[str, Sequence[Path]]) -> Dataset:
    """A list of cases of the images that are given, with labels that fit them in shape."""
    columns = [f"image{n}" for n in range(max(map(len, cases.values())))]
    rows = [",".join(("case", *columns, "label"))]
    for name, images in cases.items():
        image = nib.load(images[0])
        label = np.zeros(image.shape[:3], np.uint8)
        label[1:3, 1:3, 1:3] = 1
        rows.append(",".join((name, *map(str, images), str(write(folder / f"{name}_label.nii", label, image.affine)))))
    (folder / "list.csv").write_text("\n".join(rows))
    return read_dataset(folder / "list.csv")


def refuse(dataset: Dataset, *held_back: str, weights: Path | None = None) -> None:
    """What a training does with a data set of which some cases are held back."""
    facts = check_dataset(dataset).facts
    training, kept = ([c for c in dataset.cases if (c.id in held_back) is held] for held in (False, True))
    refuse_leaks(training, kept, weights=weights, facts=facts)


def a_run(folder: Path, **training: list[str]) -> Path:
    """The weights of a run that has learnt images of these digests."""
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({"schema_version": 1, "training": training}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder / "model.safetensors"


def as_before(*files: Path) -> str:
    """The digest of a case of `files` in a model.json of earlier versions."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:16]


TWINS = {
    "float32": (NOISE[0].astype(np.float32), np.eye(4)),
    "int32": (NOISE[0].astype(np.int32), np.eye(4)),
    "float64": (NOISE[0].astype(np.float64), np.eye(4)),
    "big endian": (NOISE[0].astype(">i2"), np.eye(4)),
    "with -0": (np.where(NOISE[0] == 0, np.float32(-0.0), NOISE[0].astype(np.float32)), np.eye(4)),
    "mirrored": (NOISE[0][::-1], LEFT),
    "turned": (NOISE[0].transpose(2, 0, 1), np.eye(4)[:, [2, 0, 1, 3]]),
}


@pytest.mark.parametrize("stored", TWINS)
def test_a_twin_of_another_number_type_or_order_of_axes_is_known(tmp_path: Path, stored: str) -> None:
    files = {name: write(tmp_path / f"{name}.nii", NOISE[n]) for n, name in enumerate("ab")}
    files["twin"] = write(tmp_path / "twin.nii", *TWINS[stored])
    dataset = listed(tmp_path, {name: [file] for name, file in files.items()})
    told = [f.found for f in check_dataset(dataset).findings if f.case == "twin" and "the voxels" in f.found]
    assert [text.partition(",")[0] for text in told] == ["the voxels of case a"]
    refuse(dataset, "b")
    with pytest.raises(ConfigError, match="are trained on under another name, first twin as a"):
        refuse(dataset, "twin")


def test_a_mirrored_anatomy_is_another(tmp_path: Path) -> None:
    files = {"a": write(tmp_path / "a.nii", NOISE[0]), "b": write(tmp_path / "b.nii", NOISE[0][::-1])}
    refuse(listed(tmp_path, {name: [file] for name, file in files.items()}), "b")


@pytest.mark.parametrize("stored", ["as it was", "in other bytes"])
@pytest.mark.parametrize("now", ["more", "fewer", "swapped", "one other"])
def test_weights_with_other_channels_have_learnt_a_case_all_the_same(tmp_path: Path, now: str, stored: str) -> None:
    files = [write(tmp_path / f"{n}.nii", NOISE[n]) for n in range(8)]
    before = listed(tmp_path, {f"p{n}": files[n : n + 1] if now == "more" else files[n : n + 2] for n in (0, 2, 4)})
    images, voxels = image_digests(before.cases), voxel_digests(before.cases, check_dataset(before).facts)
    weights = a_run(tmp_path / "run", images_sha256=sorted(images["p2"]), images_voxels=sorted(voxels["p2"]))
    if stored == "in other bytes":
        files = [write(tmp_path / f"{n}_.nii", NOISE[n].astype(np.float32)) for n in range(8)]
    chosen = {"more": (2, 3), "fewer": (3,), "swapped": (3, 2), "one other": (6, 3)}[now]
    others = {f"q{n}": files[n : n + len(chosen)] for n in (0, 4)}
    after = listed(tmp_path, {**others, "q2": [files[n] for n in chosen]})
    refuse(after, "q0", "q4", weights=weights)
    with pytest.raises(ConfigError, match="has learnt 1 of the 1 cases held back, first q2"):
        refuse(after, "q2", weights=weights)


def test_weights_of_earlier_versions_are_known_by_what_they_say(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{n}.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 4) + np.int16(n)) for n in range(6)
    ]
    two = listed(tmp_path, {f"c{n}": files[n : n + 2] for n in (0, 2, 4)})
    one = listed(tmp_path, {f"c{n}": files[n : n + 1] for n in (0, 2, 4)})
    # of the voxels of c0, as version 0.1.0 had it
    stored = {"ff082da6ed663c4c": one, "3c194bd3b1fe4dc4": two}
    for number, (digest, dataset) in enumerate(stored.items()):
        for key, found in (("images_sha256", as_before(*dataset.cases[0].images)), ("images_voxels", digest)):
            weights = a_run(tmp_path / f"{number}_{key}", **{key: [found]})
            refuse(dataset, "c2", weights=weights)
            with pytest.raises(ConfigError, match="has learnt 1 of the 1 cases held back, first c0"):
                refuse(dataset, "c0", weights=weights)
    # a channel more than those weights had
    with pytest.raises(ConfigError, match="has learnt 1 of the 1 cases held back, first c0"):
        refuse(two, "c0", weights=a_run(tmp_path / "more", images_sha256=[as_before(files[0])]))


def test_a_channel_that_all_share_is_no_leak(tmp_path: Path) -> None:
    atlas = write(tmp_path / "atlas.nii", NOISE[7])
    shared = listed(tmp_path, {f"c{n}": [write(tmp_path / f"{n}.nii", NOISE[n]), atlas] for n in range(3)})
    both = image_digests(shared.cases), voxel_digests(shared.cases, check_dataset(shared).facts)
    # of three patients each has its own channel, and what both channels are together
    assert [len(found) for digests in both for found in digests.values()] == [2] * 6
    learnt = {key: sorted(found["c0"]) for key, found in zip(("images_sha256", "images_voxels"), both)}
    refuse(shared, "c1", weights=a_run(tmp_path / "run", **learnt))
    # of two patients too it may be what all have
    refuse(listed(tmp_path, {case.id: case.images for case in shared.cases[:2]}), "c1")


def test_a_constant_channel_is_no_leak(tmp_path: Path) -> None:
    zeros, entries = np.zeros_like(NOISE[0]), []
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / part).mkdir()
    for n in range(4):
        channels = [NOISE[n], zeros if n < 2 else NOISE[n + 2]]
        write(tmp_path / "imagesTr" / f"c{n}.nii", np.stack(channels, -1))
        write(tmp_path / "labelsTr" / f"c{n}.nii", (NOISE[n] > 500).astype(np.uint8))
        entries.append({"image": f"./imagesTr/c{n}.nii", "label": f"./labelsTr/c{n}.nii"})
    described = {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "a"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    refuse(read_dataset(tmp_path), "c1")


def test_a_channel_of_two_patients_alone_is_told_and_not_refused(tmp_path: Path) -> None:
    # it may be a map of coordinates, which two images of one size have in common
    files = [write(tmp_path / f"{n}.nii", NOISE[n]) for n in range(5)]
    dataset = listed(tmp_path, {"a": files[:2], "b": files[2:4], "c": [files[4], files[0]]})
    assert [(f.case, f.found) for f in check_dataset(dataset).findings if "channel" in f.found] == [
        ("c", "a channel of case a, with other ones")
    ]
    for held_back in "abc":
        refuse(dataset, held_back)
    run = image_digests(dataset.cases)
    weights = a_run(tmp_path / "run", images_sha256=sorted(run["a"]))
    refuse(dataset, "c", weights=weights)
    with pytest.raises(ConfigError, match="has learnt 1 of the 1 cases held back, first a"):
        refuse(dataset, "a", weights=weights)
