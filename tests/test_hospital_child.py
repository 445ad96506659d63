"""The process that infers, on real series and a tiny model: results, refusals, models that change, and its privacy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import phantom
import pytest
from hospital_peers import wait_for
from pydicom import dcmread
from tiny import tiny_model

import medseg
from medseg_pipelines.hospital import child as child_module
from medseg_pipelines.hospital.child import MOST_MODELS, Child, Watched
from medseg_pipelines.hospital.models import Models
from medseg_pipelines.hospital.request import Request
from medseg_pipelines.hospital.results import inputs_of, read_result, write_result

VOXELS = np.random.default_rng(1).integers(0, 300, (6, 10, 14)).astype(np.int16)
GAP = [0.0, 2.5, 7.5, 10.0, 12.5, 15.0]
CANARIES = ("Canary", "Tweety", "SECRET", "4711", "1.2.3")
JOB = "a" * 32


class Told(list[dict[str, Any]]):
    """What a child has told."""

    def __call__(self, **facts: Any) -> None:
        json.dumps(facts)
        self.append(facts)

    @property
    def end(self) -> dict[str, Any]:
        """The last line."""
        return self[-1]


@pytest.fixture
def told() -> Told:
    """What the child of this test has told."""
    return Told()


@pytest.fixture
def child(told: Told) -> Child:
    """One that nothing was asked yet."""
    return Child(told)


def request(folder: Path, model: Path, *, at: list[float] | None = None, **changes: Any) -> Request:
    """For a series that is made."""
    store = folder / "store"
    if not store.exists():
        phantom.series(store, voxels=VOXELS, at=at)
    known = Models().of(str(model))
    wanted = Request(
        job=JOB,
        series_id="b" * 32,
        revision=1,
        files=tuple(str(path) for path in sorted(store.iterdir())),
        work=str(folder / "work"),
        results=str(folder / "results" / JOB),
        model=str(model),
        weights_sha256=known.weights_sha256,
        description_sha256=known.description_sha256,
        formats=("dicom-seg",),
        picture=False,
        tta="none",
        precision="32",
        device="cpu",
        resample_tilt=False,
        resample_gaps=False,
    )
    (folder / "results").mkdir(exist_ok=True)
    return replace(wanted, **changes)


def test_a_series_becomes_files_with_a_manifest(tmp_path: Path, model: Path, child: Child, told: Told) -> None:
    formats = ("nifti", "dicom-seg", "rtstruct", "dicom-sr")
    child.answer(request(tmp_path, model, formats=formats, picture=True).line())
    assert [line.get("step") for line in told] == ["checked", "inferred", None]
    assert told.end["end"] == "done"
    result, folder = told.end["result"], tmp_path / "results" / JOB
    assert set(result["files"]) == {*formats, "picture"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "dicom-seg.dcm",
        "dicom-sr.dcm",
        "manifest.json",
        "nifti.nii.gz",
        "picture.png",
        "rtstruct.dcm",
    ]
    stored = read_result(folder)
    assert stored is not None
    assert stored["files"] == result["files"]
    segmentation, mask = dcmread(folder / "dicom-seg.dcm"), nib.load(folder / "nifti.nii.gz")
    assert segmentation.Modality == "SEG"
    labels = medseg.load_model(model, options=medseg.InferOptions(device="cpu", precision="32", tta="none"))
    np.testing.assert_array_equal(np.asarray(mask.dataobj), labels.segment(tmp_path / "store").numpy())
    assert {"link", "load", "read", "network", "write", "place"} <= set(result["seconds"])
    # links, and what was made of them, are gone
    assert list((tmp_path / "work").iterdir()) == []


def test_another_revision_is_another_object_and_the_same_one_is_the_same(
    tmp_path: Path, model: Path, child: Child
) -> None:
    def uid(name: str, **changes: Any) -> str:
        results = tmp_path / "results" / name
        child.answer(request(tmp_path, model, results=str(results), **changes).line())
        return str(dcmread(results / "dicom-seg.dcm").SOPInstanceUID)

    assert uid("1") == uid("2") != uid("3", revision=2)


def test_what_is_no_volume_is_refused_in_the_library_s_words(
    tmp_path: Path, model: Path, child: Child, told: Told
) -> None:
    child.answer(request(tmp_path, model, at=GAP).line())
    assert told.end["end"] == "refused"
    assert "a gap of 5.00 mm" in told.end["reason"]
    assert str(tmp_path) not in told.end["reason"]
    child.answer(request(tmp_path, model, formats=("nifti",), resample_gaps=True).line())
    assert told.end["end"] == "done"
    assert told.end["result"]["warnings"][0].startswith("resampled: ")
    child.answer(request(tmp_path, model, resample_gaps=True, results=str(tmp_path / "results" / "c")).line())
    assert told.end["end"] == "refused"
    assert "cannot be referred to" in told.end["reason"]


def test_what_is_no_image_is_refused(tmp_path: Path, model: Path, child: Child, told: Told) -> None:
    wanted = request(tmp_path, model)
    for file in wanted.files:
        Path(file).write_bytes(b"\0" * 128 + b"DICM" + bytes(50))
    child.answer(wanted.line())
    assert told.end["end"] == "refused"
    assert "no transfer syntax" in told.end["reason"]


def test_an_image_that_is_gone_from_the_store_refuses_the_job(
    tmp_path: Path, model: Path, child: Child, told: Told
) -> None:
    wanted = request(tmp_path, model)
    Path(wanted.files[2]).unlink()
    child.answer(wanted.line())
    assert told.end["end"] == "refused"
    assert "no more in the store; send the series again" in told.end["reason"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_no_hard_link_can_be_made_another_one_does(
    tmp_path: Path, model: Path, child: Child, told: Told, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, "no link")

    monkeypatch.setattr(os, "link", refused)
    child.answer(request(tmp_path, model).line())
    assert told.end["end"] == "done"


@pytest.mark.parametrize(
    ("error", "end", "words"),
    [
        (ValueError("could not convert 'Canary^Tweety'"), "failed", "ValueError in a library"),
        (medseg.DataError("a: Canary has no volume"), "refused", "a: Canary has no volume"),
        (MemoryError("9 GB"), "failed", "the memory of this machine does not hold it"),
        (OSError(5, "Input/output error"), "failed", "Input/output error"),
    ],
)
def test_refusals_and_failures_are_told_apart_and_texts_of_others_are_kept_back(
    tmp_path: Path,
    model: Path,
    child: Child,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    end: str,
    words: str,
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(medseg.Segmenter, "prepare", breaks)
    child.answer(request(tmp_path, model).line())
    assert told.end["end"] == end
    assert words in told.end["reason"]
    if not isinstance(error, medseg.MedsegError):
        assert "Canary" not in json.dumps(told)


def test_a_fault_of_our_own_is_a_failure_that_says_where(
    tmp_path: Path, model: Path, child: Child, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("Canary")

    monkeypatch.setattr(child_module, "_gathered", breaks)
    child.answer(request(tmp_path, model).line())
    assert told.end["end"] == "failed"
    assert told.end["reason"].startswith("ZeroDivisionError at test_hospital_child.py:")
    assert list((tmp_path / "work").iterdir()) == []


def test_nothing_of_the_patient_is_told(
    tmp_path: Path, model: Path, child: Child, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    for at in (None, GAP, [0.0, 2.5, 2.5, 5.0, 7.5, 10.0]):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        child.answer(request(tmp_path, model, at=at, picture=True).line())
        shutil.rmtree(tmp_path / "results")
    assert [line["end"] for line in told if "end" in line] == ["done", "refused", "refused"]
    assert not [word for word in CANARIES if word in json.dumps(told) + caplog.text]


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("loaded", [True, False])
def test_no_other_model_than_the_one_of_the_job_infers(
    tmp_path: Path, model: Path, other_model: Path, child: Child, told: Told, file: str, loaded: bool
) -> None:
    mine = shutil.copytree(model, tmp_path / "mine")
    wanted = request(tmp_path, mine)
    if loaded:
        child.answer(wanted.line())
        assert told.end["end"] == "done"
        shutil.rmtree(wanted.results)
    text = (other_model / file).read_bytes()
    (mine / file).write_bytes(text + (b"\n" if file.endswith("json") else b""))
    child.answer(wanted.line())
    assert told.end["end"] == "refused"
    assert "the model was changed since the job was made; put the old one back and replay" in told.end["reason"]
    (mine / file).unlink()
    child.answer(wanted.line())
    assert told.end["end"] == "refused"
    assert "is gone since the job was made" in told.end["reason"]
    shutil.copy(model / file, mine / file)
    child.answer(wanted.line())
    assert told.end["end"] == "done"


def test_a_description_that_changes_while_it_is_loaded_is_seen(
    tmp_path: Path, model: Path, child: Child, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, load = shutil.copytree(model, tmp_path / "mine"), medseg.load_model

    def changed(*folders: str, **more: Any) -> Any:
        with (mine / "model.json").open("a") as file:
            file.write("\n")
        return load(*folders, **more)

    monkeypatch.setattr(medseg, "load_model", changed)
    child.answer(request(tmp_path, mine).line())
    assert told.end["end"] == "refused"
    assert "description with SHA-256" in told.end["reason"]


def test_weights_that_only_look_like_the_old_ones_are_seen(
    tmp_path: Path, model: Path, other_model: Path, child: Child, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copytree(model, tmp_path / "mine")
    wanted = request(tmp_path, mine)
    old = Models().of(str(mine))
    # as after `cp -p`: of the same size, and not newer
    monkeypatch.setattr(Models, "of", lambda *_: old)
    shutil.copytree(other_model, mine, dirs_exist_ok=True)
    child.answer(wanted.line())
    assert told.end["end"] == "refused"
    assert "weights with SHA-256" in told.end["reason"]


def test_a_damaged_model_refuses_the_job(tmp_path: Path, model: Path, child: Child, told: Told) -> None:
    mine = shutil.copytree(model, tmp_path / "mine")
    (mine / "model.safetensors").write_bytes(b"\0" * 100)
    child.answer(request(tmp_path, mine).line())
    assert told.end["end"] == "refused"
    assert "model.safetensors" in told.end["reason"]


def test_models_stay_loaded_the_latest_ones_alone(
    tmp_path: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = medseg.load_model

    def counted(folder: str, **more: Any) -> Any:
        loads.append(Path(folder).name)
        return load(folder, **more)

    monkeypatch.setattr(medseg, "load_model", counted)
    models = [tiny_model(tmp_path / f"model{n}", seed=n) for n in range(MOST_MODELS + 1)]
    for n in (0, 0, 1, 0, 2, 0, 1):
        child.answer(request(tmp_path, models[n], results=str(tmp_path / f"results/{len(loads)}")).line())
        shutil.rmtree(tmp_path / "results")
    assert loads == ["model0", "model1", "model2", "model1"]
    child.answer(request(tmp_path, models[1], tta="flip").line())
    assert loads[4:] == ["model1"]


def test_who_is_second_takes_what_is_there(tmp_path: Path) -> None:
    place = tmp_path / "results" / JOB
    place.parent.mkdir()

    def made(text: str) -> dict[str, Any]:
        folder = tmp_path / "work" / text / "made"
        folder.mkdir(parents=True)
        (folder / "nifti.nii.gz").write_text(text)
        sha256 = medseg.file_sha256(folder / "nifti.nii.gz")
        result = write_result(folder, {"files": {"nifti": {"file": "nifti.nii.gz", "sha256": sha256}}}, place)
        assert not folder.exists()
        return result

    first = made("first")
    assert made("second") == first
    assert (place / "nifti.nii.gz").read_text() == "first"
    # what is broken is replaced, and what was made of other images
    (place / "nifti.nii.gz").write_text("damaged")
    third = made("third")
    assert third != first
    assert read_result(place) == third
    folder = tmp_path / "work" / "fourth"
    folder.mkdir()
    fourth = write_result(folder, {"files": {}, "inputs": inputs_of(["store/a.dcm"])}, place)
    assert read_result(place) == fourth
    assert [path.name for path in place.parent.iterdir()] == [JOB]


def test_what_libraries_print_does_not_stand_between_the_answers(tmp_path: Path, model: Path) -> None:
    # a real process, whose library prints by all ways
    code = (
        "import os, sys, warnings\n"
        "from medseg_pipelines.hospital import child\n"
        "class Loud(child.Child):\n"
        "    def do(self, request, folder):\n"
        "        print('Canary'); os.write(1, b'Canary'); warnings.warn('Canary'); os.system('echo Canary')\n"
        "        return super().do(request, folder)\n"
        "child.main(Loud)\n"
    )
    wanted = request(tmp_path, model)
    with (tmp_path / "printed").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed
        )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(wanted.line().encode())
    process.stdin.flush()
    lines = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert lines[0] == {"ready": True}
    assert lines[-1]["end"] == "done"
    assert (tmp_path / "printed").read_text().count("Canary") >= 4
    # the first that the kernel takes when memory runs out, and gone with its worker
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
    process.stdin.close()
    assert process.wait(30) == 0


def test_the_process_ends_with_its_worker_even_while_it_is_busy(tmp_path: Path) -> None:
    # of a worker that is killed, nothing closes what it held: the kernel does
    code = (
        "import subprocess, sys, time\n"
        "child = 'from medseg_pipelines.hospital import child; child._die_with_the_worker();'\n"
        "child += 'print(1, flush=True); import ctypes; ctypes.PyDLL(None).sleep(600)'\n"
        "p = subprocess.Popen([sys.executable, '-c', child], start_new_session=True, stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    busy = int(worker.stdout.readline())
    worker.kill()
    worker.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{busy}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True

    wait_for(gone, seconds=10)


def test_a_watched_model_keeps_its_watch_under_other_options(model: Path) -> None:
    loaded = medseg.load_model(model, options=medseg.InferOptions(device="cpu"))
    watched = Watched(loaded.models, loaded.options)
    steps: list[str] = []
    other = watched.watched(replace(watched.options, revision=2), steps.append)
    other.told("checked")
    assert (steps, other.options.revision, watched.options.revision) == (["checked"], 2, 1)
