"""Folders of cases: failures stay apart, nothing stale is kept, and the record says what was done."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from geometry import oblique, save
from tiny import AFFINE, EXACT, SHAPE, blobs, some_images

from medseg import folder as folder_module
from medseg import record as record_module
from medseg.cases import Case
from medseg.errors import ConfigError, DataError, GeometryError
from medseg.folder import CaseResult, infer, segment_cases
from medseg.infer import InferOptions, Segmented, Segmenter, load_model
from medseg.preprocess import Prepared
from medseg.writers import formats as formats_module
from medseg.writers import ignores_case, write_label, write_text

# the package has a function of this name
infer_module = import_module("medseg.infer")


def statuses(results: tuple[CaseResult, ...]) -> list[str]:
    return [r.status for r in results]


def record(folder: Path, name: str = "run.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


# ---- many cases


def test_masks_lie_on_the_grids_of_their_images(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in")
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert [(r.case, r.status, r.output) for r in results] == [
        (f"case{n}", "done", f"case{n}.nii.gz") for n in range(3)
    ]
    for path in images:
        mask = nib.load(tmp_path / "out" / path.name)
        assert mask.shape == SHAPE
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, nib.load(path).affine)


def test_one_path_needs_no_list(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    for number, (given, models) in enumerate([(path, model), (str(path), str(model)), (str(path), [model])]):
        (result,) = infer(given, models, tmp_path / f"out{number}", EXACT)
        assert (result.case, result.status) == ("case0", "done")


def test_a_written_mask_is_what_segment_gives(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    infer([path], [model], tmp_path / "out", EXACT)
    written = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    assert np.array_equal(written, load_model(model, options=EXACT).segment(path))


def test_an_image_whose_sides_are_a_guess_is_on_record(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 2)
    image = nib.load(images[1])
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), images[1])
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert not any("guess" in warning for warning in results[0].warnings)
    assert results[1].warnings[0].startswith("neither sform nor qform says how the voxels lie")
    assert record(tmp_path / "out")["cases"][1]["warnings"] == list(results[1].warnings)


def test_a_case_that_fails_costs_no_other(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in")
    images[1].write_bytes(images[1].read_bytes()[:200])
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["done", "failed", "done"]
    assert "case1.nii.gz" in str(results[1].reason)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["case0.nii.gz", "case2.nii.gz", "run.json"]
    assert [c["status"] for c in record(tmp_path / "out")["cases"]] == ["done", "failed", "done"]


def test_an_unexpected_error_of_one_case_is_named_and_kept_apart(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)
    whole = Segmenter.segment_prepared
    calls = []

    def first_breaks(*arguments: Any, **named: Any) -> Segmented:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return whole(*arguments, **named)

    monkeypatch.setattr(Segmenter, "segment_prepared", first_breaks)
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["failed", "done"]
    assert "case0.nii.gz: the device ran out of memory" in str(results[0].reason)


@pytest.mark.parametrize("stage", ["prepare", "segment_prepared", "write_label"])
def test_an_error_in_any_thread_is_the_failure_of_its_case(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    some_images(tmp_path / "in")
    where = formats_module if stage == "write_label" else Segmenter
    whole, calls = getattr(where, stage), []

    def second_breaks(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("broken")
        return whole(*arguments, **named)

    monkeypatch.setattr(where, stage, second_breaks)
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["done", "failed", "done"]
    assert "case1.nii.gz: ZeroDivisionError: broken" in str(results[1].reason)
    assert masks(tmp_path / "out").keys() == {"case0.nii.gz", "case2.nii.gz"}


def test_what_is_no_error_of_a_case_ends_the_run_and_is_not_swallowed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 3)

    def leave(*_: object, **__: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr(Segmenter, "segment_prepared", leave)
    with pytest.raises(SystemExit) as left:
        infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert left.value.code == 7
    assert [c["status"] for c in record(tmp_path / "out")["cases"]] == ["not_done"] * 3


def ended(work: Callable[[], object]) -> BaseException | None:
    """What `work` raises; a run that waits for ever fails the test in place of holding it up."""
    raised: list[BaseException] = []

    def whole() -> None:
        try:
            work()
        except ArithmeticError as error:
            raised.append(error)

    thread = threading.Thread(target=whole, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the run waits for ever"
    return raised[0] if raised else None


@pytest.mark.parametrize("stage", ["prepare", "segment_prepared", "write_label"])
def test_an_error_while_an_error_is_told_ends_the_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    some_images(tmp_path / "in", 6)

    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    def cannot_tell(*_: object) -> str:
        raise FloatingPointError

    monkeypatch.setattr(formats_module if stage == "write_label" else Segmenter, stage, breaks)
    monkeypatch.setattr(folder_module, "_why", cannot_tell)
    threads = threading.active_count()
    assert isinstance(ended(lambda: run(tmp_path, model)), FloatingPointError)
    assert threading.active_count() == threads
    assert [c["status"] for c in record(tmp_path / "out")["cases"]] == ["not_done"] * 6


@pytest.mark.parametrize("started", range(3))
def test_a_thread_that_cannot_be_started_ends_the_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    some_images(tmp_path / "in", 6)
    start, calls = threading.Thread.start, []

    def few(thread: threading.Thread) -> None:
        if thread.name != "outside":
            calls.append(1)
            if len(calls) == started + 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    def refused() -> None:
        with pytest.raises(RuntimeError, match="can't start"):
            run(tmp_path, model)

    work = threading.Thread(target=refused, name="outside", daemon=True)
    monkeypatch.setattr(threading.Thread, "start", few)
    work.start()
    work.join(30)
    assert not work.is_alive(), "the run waits for ever"
    assert len(calls) == started + 1


def test_a_name_that_no_file_can_have_is_the_failure_of_its_case(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    # four letters more are too many
    nib.save(nib.load(path), tmp_path / "in" / f"{'y' * 250}.nii")
    results: list[CaseResult] = []
    assert ended(lambda: results.extend(infer([tmp_path / "in"], [model], tmp_path / "out", EXACT))) is None
    assert statuses(tuple(results)) == ["done", "failed"]
    assert "File name too long" in str(results[1].reason)


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "words", "name"),
    [
        (DataError("a.nii: is bent"), "a.nii: is bent", "DataError"),
        (GeometryError("a.nii: is turned"), "a.nii: is turned", "GeometryError"),
        (_from(DataError("a.nii: no access"), PermissionError(13, "no")), "a.nii: no access", "OSError"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "device ran out of memory",
            "MemoryError",
        ),
        (RuntimeError("CUDA error: out of memory"), "device ran out of memory", "MemoryError"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "device ran out of memory", "MemoryError"),
        (MemoryError("Unable to allocate 9 GiB"), "does not hold it (Unable to allocate 9", "MemoryError"),
        (ZeroDivisionError("by zero"), "case0.nii.gz: ZeroDivisionError: by zero", "ZeroDivisionError"),
    ],
)
def test_the_reason_is_what_lies_behind_the_error_of_a_library(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, words: str, name: str
) -> None:
    some_images(tmp_path / "in", 1)

    def wrapped(*_: object, **__: object) -> None:
        raise RuntimeError("applying transform <object at 0x7f>") from cause

    monkeypatch.setattr(Segmenter, "prepare", wrapped)
    (result,) = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert words in str(result.reason)
    assert "0x7f" not in str(result.reason)
    assert (result.cause, record(tmp_path / "out")["cases"][0]["cause"]) == (name, name)


# ---- side by side


def masks(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but the records, hidden ones included."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".json"}


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_no_more_than_three_cases_are_under_way(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images(tmp_path / "in", 6)
    prepare, read, go_on = Segmenter.prepare, [], threading.Event()

    def counted(self: Segmenter, case: Case) -> Prepared:
        read.append(case.id)
        return prepare(self, case)

    def held(*arguments: Any, **named: Any) -> Path:
        assert go_on.wait(20)
        return write_label(*arguments, **named)

    monkeypatch.setattr(Segmenter, "prepare", counted)
    monkeypatch.setattr(formats_module, "write_label", held)
    results: list[CaseResult] = []
    run = threading.Thread(target=lambda: results.extend(infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)))
    run.start()
    wait_until(lambda: len(read) == 3)
    # one is held in the writer, one has left the network, one has been read: a fourth must not come
    time.sleep(0.3)
    assert read == ["case0", "case1", "case2"]
    go_on.set()
    run.join()
    assert [r.case for r in results] == [f"case{n}" for n in range(6)]


def test_the_next_case_is_read_while_one_is_in_the_network(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)
    prepare, whole, second_read = Segmenter.prepare, Segmenter.segment_prepared, threading.Event()

    def told(self: Segmenter, case: Case) -> Prepared:
        found = prepare(self, case)
        if case.id == "case1":
            second_read.set()
        return found

    def waiting(*arguments: Any, **named: Any) -> Segmented:
        assert second_read.wait(20)
        return whole(*arguments, **named)

    monkeypatch.setattr(Segmenter, "prepare", told)
    monkeypatch.setattr(Segmenter, "segment_prepared", waiting)
    assert statuses(infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)) == ["done", "done"]


def test_two_devices_share_the_cases_and_change_no_mask(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 5)
    infer([tmp_path / "in"], [model], tmp_path / "one", EXACT)
    whole, both, users = Segmenter.segment_prepared, threading.Barrier(2), []

    def together(self: Segmenter, prepared: Prepared, *arguments: Any, **named: Any) -> Segmented:
        users.append(self)
        if len(users) <= 2:
            both.wait(20)
        return whole(self, prepared, *arguments, **named)

    monkeypatch.setattr(Segmenter, "segment_prepared", together)
    results = infer([tmp_path / "in"], [model], tmp_path / "two", replace(EXACT, devices=("cpu", "cpu")))
    assert [(r.case, r.status) for r in results] == [(f"case{n}", "done") for n in range(5)]
    assert len(set(map(id, users))) == 2
    assert masks(tmp_path / "two") == masks(tmp_path / "one")
    assert record(tmp_path / "two")["device"].count("cpu") == 2
    assert record(tmp_path / "two")["peak_memory_of"] == "the process so far"


def test_what_two_devices_have_done_one_skips(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model, options=replace(EXACT, devices=("cpu", "cpu")))
    assert run(tmp_path, model) == ["skipped", "skipped"]


def test_a_number_is_a_gpu(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="--devices 99: "):
        run(tmp_path, model, options=replace(EXACT, devices=("99", "cpu")))
    assert not (tmp_path / "out").exists()


def test_devices_that_would_compute_differently_are_refused(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    one, other = (load_model(model, options=replace(EXACT, precision=p)) for p in ("32", "bf16"))
    with pytest.raises(ConfigError, match="32 and bf16; choose one with --precision"):
        segment_cases(one, [Case("a", (path,), None, "a")], tmp_path / "out", beside=[other])
    assert not (tmp_path / "out").exists()


# ---- stops


def interrupted_by(number: int, at: str) -> Callable[..., Segmented]:
    """`segment_prepared` that sends this process a signal in the case `at`, and leaves it by a tick only."""
    whole = Segmenter.segment_prepared

    def segment_prepared(
        self: Segmenter, prepared: Prepared, seconds: Any, *, tick: Callable[[float], None], **_: Any
    ) -> Any:
        if prepared.id == at:
            os.kill(os.getpid(), number)
            end = time.monotonic() + 20
            while time.monotonic() < end:
                tick(0.5)
                time.sleep(0.01)
        return whole(self, prepared, seconds, tick=tick)

    return segment_prepared


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drops_the_case_in_the_network_and_keeps_what_is_finished(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    some_images(tmp_path / "in", 5)
    infer([tmp_path / "in"], [model], tmp_path / "undisturbed", EXACT)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Segmenter, "segment_prepared", interrupted_by(number, "case2"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert masks(tmp_path / "out").keys() == {"case0.nii.gz", "case1.nii.gz"}
    told = record(tmp_path / "out")["cases"]
    assert [c["status"] for c in told] == ["done", "done", "not_done", "not_done", "not_done"]
    assert told[4]["reason"] == "interrupted"
    assert "3 of 5 cases are not done" in caplog.text
    monkeypatch.undo()
    assert run(tmp_path, model) == ["skipped", "skipped", "done", "done", "done"]
    assert masks(tmp_path / "out") == masks(tmp_path / "undisturbed")


def test_a_stop_forgets_nothing_of_earlier_runs(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = some_images(tmp_path / "in", 3)
    run(tmp_path, model)
    save(images[0], blobs(SHAPE, seed=9), AFFINE)
    monkeypatch.setattr(Segmenter, "segment_prepared", interrupted_by(signal.SIGTERM, "case0"))
    monkeypatch.setattr(record_module.CaseResult, "whole_files", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model)
    monkeypatch.undo()
    assert run(tmp_path, model) == ["done", "skipped", "skipped"]


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images(tmp_path / "in", 1)
    whole = Segmenter.segment_prepared

    def signalled(*arguments: Any, **named: Any) -> Segmented:
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*arguments, **named)

    monkeypatch.setattr(Segmenter, "segment_prepared", signalled)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(tmp_path, model) == ["done"]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_run_and_says_what_is_done(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    some_images(tmp_path / "in", 5)

    def full(path: Path, *arguments: Any, **named: Any) -> Path:
        if path.name == "case2.nii.gz":
            raise DataError("cannot write") from OSError(number, os.strerror(number))
        return write_label(path, *arguments, **named)

    monkeypatch.setattr(formats_module, "write_label", full)
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["done", "done", "not_done", "not_done", "not_done"]
    assert {r.reason for r in results[2:]} == {f"{tmp_path / 'out'}: the disk is full"}
    assert [c["status"] for c in record(tmp_path / "out")["cases"]] == statuses(results)
    monkeypatch.undo()
    assert run(tmp_path, model) == ["skipped", "skipped", "done", "done", "done"]


def test_masks_that_no_record_could_be_written_of_are_not_called_done(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)
    written: list[Path] = []

    def only_the_first(path: Path, text: str) -> Path:
        if written:
            raise DataError("cannot write") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return write_text(path, text)

    monkeypatch.setattr(record_module, "write_text", only_the_first)
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["not_done", "not_done"]
    assert "2 more masks there are whole, but run.json has no room for them" in str(results[0].reason)
    monkeypatch.undo()
    # there is no record of them
    assert run(tmp_path, model) == ["done", "done"]


def test_the_last_record_has_the_room_that_was_held_for_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 4)
    room: list[int] = []

    def full(path: Path, *arguments: Any, **named: Any) -> Path:
        if path.name == "case2.nii.gz":
            room.extend(p.stat().st_size for p in (tmp_path / "out").glob(".room*"))
            raise DataError("cannot write") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_label(path, *arguments, **named)

    monkeypatch.setattr(formats_module, "write_label", full)
    assert run(tmp_path, model) == ["done", "done", "not_done", "not_done"]
    assert len(room) == 1
    assert (tmp_path / "out" / "run.json").stat().st_size <= room[0]
    assert not list((tmp_path / "out").glob(".room*"))
    assert record(tmp_path / "out")["cases"][3]["reason"] == f"{tmp_path / 'out'}: the disk is full"


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 1)
    (tmp_path / "out" / "run.json").mkdir(parents=True)
    monkeypatch.setattr(Segmenter, "prepare", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match=r"cannot write run\.json"):
        run(tmp_path, model)


# ---- resuming


def run(folder: Path, *models: Path, options: InferOptions = EXACT) -> list[str]:
    return statuses(infer([folder / "in"], list(models), folder / "out", options))


def test_finished_cases_are_skipped_without_a_look_at_the_network(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*.gz"))]
    monkeypatch.setattr(Segmenter, "segment_prepared", lambda *_, **__: pytest.fail("segmented again"))
    assert run(tmp_path, model) == ["skipped", "skipped"]
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*.gz"))] == before


def test_a_skipped_case_keeps_what_was_known_of_it(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    first = record(tmp_path / "out")["cases"][0]
    run(tmp_path, model)
    assert record(tmp_path / "out")["cases"][0] == first | {"status": "skipped"}
    assert run(tmp_path, model) == ["skipped"]


def test_another_model_does_everything_again(tmp_path: Path, model: Path, other_model: Path) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    before = (tmp_path / "out" / "case0.nii.gz").read_bytes()
    assert run(tmp_path, other_model) == ["done", "done"]
    assert (tmp_path / "out" / "case0.nii.gz").read_bytes() != before
    assert run(tmp_path, other_model, model) == ["done", "done"]


def test_masks_of_another_model_that_stay_are_told(
    tmp_path: Path, model: Path, other_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = some_images(tmp_path / "in", 3)
    infer([first, second, third], [model], tmp_path / "out", EXACT)
    (tmp_path / "out" / "case2.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        infer([first], [other_model], tmp_path / "out", EXACT)
    assert "out: 1 masks of another model or other settings stay, such as case1.nii.gz, and run.json" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        infer([first, second], [other_model], tmp_path / "out", EXACT)
        infer([first], [other_model], tmp_path / "out", EXACT)
    assert not caplog.text


def test_a_mask_that_another_model_left_in_between_is_done_again(
    tmp_path: Path, model: Path, other_model: Path
) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    mine = (tmp_path / "out" / "case0.nii.gz").read_bytes()
    # into the same folder, with a record of its own
    run(tmp_path, other_model, options=replace(EXACT, shard=(1, 2)))
    assert (tmp_path / "out" / "case0.nii.gz").read_bytes() != mine
    assert run(tmp_path, model) == ["done", "skipped"]
    assert (tmp_path / "out" / "case0.nii.gz").read_bytes() == mine


def test_a_random_field_is_one_setting_away_and_makes_masks_of_its_own(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    plain = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    field = {"postprocess": {"crf": True, "crf_smoothness_weight": 20.0, "crf_smoothness_mm": 3.0}}
    assert run(tmp_path, model, options=replace(EXACT, settings=field)) == ["done"]
    smooth = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    edges = [int(sum((np.diff(a, axis=axis) != 0).sum() for axis in range(3))) for a in (plain, smooth)]
    assert edges[1] < 0.8 * edges[0]
    assert "postprocess" in record(tmp_path / "out")["cases"][0]["seconds"]


def test_a_random_field_whose_scores_no_memory_holds_is_the_failure_of_its_case(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 1)
    loaded = load_model(model, options=replace(EXACT, settings={"postprocess": {"crf": True}}))
    # of the 1,020 voxels of the grid of the network eight times three scores, two images and two scales
    monkeypatch.setattr(infer_module, "beyond_memory", lambda numbers: "all" if numbers >= 28 * 1020 else "")
    monkeypatch.setattr(infer_module, "stream", lambda *_, **__: pytest.fail("the network ran"))
    (result,) = infer([tmp_path / "in"], loaded, tmp_path / "out")
    assert (result.status, result.cause) == ("failed", "MemoryError")
    assert "does not hold it (case0: postprocess.crf on 3 scores of 1,020 voxels takes all" in str(result.reason)
    monkeypatch.undo()
    monkeypatch.setattr(infer_module, "beyond_memory", lambda numbers: "all" if numbers > 28 * 1020 else "")
    assert infer([tmp_path / "in"], loaded, tmp_path / "out")[0].status == "done"


def test_a_case_that_this_machine_cannot_hold_is_no_fault_of_its_file(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_) = some_images(tmp_path / "in", 1)
    monkeypatch.setattr("medseg.preprocess.beyond_memory", lambda numbers: "all")
    (result,) = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert (result.status, result.cause) == ("failed", "MemoryError")
    assert str(result.reason).startswith(f"{path}: the memory of this machine does not hold it (spacing ")
    assert "voxels, whose resampling takes all; " in str(result.reason)


@pytest.mark.parametrize(
    "change", [{"tta": "flip"}, {"window": (8, 8, 8)}, {"overlap": 0.25}, {"precision": "bf16"}, {"overwrite": True}]
)
def test_other_options_do_everything_again(tmp_path: Path, model: Path, change: dict[str, Any]) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    assert run(tmp_path, model, options=replace(EXACT, **change)) == ["done"]


def test_a_changed_input_is_done_again_and_only_that(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    save(images[1], blobs(SHAPE, seed=9), AFFINE)
    assert run(tmp_path, model) == ["skipped", "done"]


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_beside_a_header_are_of_the_input(tmp_path: Path, model: Path, ending: str) -> None:
    first, second = (tmp_path / name / f"ct{ending}" for name in ("in", "next"))
    for seed, path in enumerate((first, second)):
        path.parent.mkdir()
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(blobs(SHAPE, seed=seed)), str(path))
    assert first.read_bytes() == second.read_bytes()
    (result,) = infer([first], [model], tmp_path / "out", EXACT)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (first, first.with_suffix(".raw"))]
    assert list(result.inputs.values()) == digests
    before = masks(tmp_path / "out")
    assert statuses(infer([second], [model], tmp_path / "out", EXACT)) == ["done"]
    assert masks(tmp_path / "out") != before
    assert statuses(infer([second], [model], tmp_path / "out", EXACT)) == ["skipped"]


@pytest.mark.parametrize("damage", ["cut", "gone", "elsewhere"])
def test_a_mask_that_is_not_whole_or_not_in_its_place_is_made_again(tmp_path: Path, model: Path, damage: str) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    mask = tmp_path / "out" / "case0.nii.gz"
    whole = mask.read_bytes()
    if damage == "cut":
        mask.write_bytes(whole[:-20])
    elif damage == "gone":
        mask.unlink()
    else:
        save(mask, np.zeros(SHAPE, np.uint8), oblique((1.0, 1.5, 2.6)))
    assert run(tmp_path, model) == ["done"]
    assert mask.read_bytes() == whole


def test_a_mask_without_a_record_is_made_again_byte_for_byte(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    before = masks(tmp_path / "out")
    (tmp_path / "out" / "run.json").unlink()
    assert run(tmp_path, model) == ["done"]
    assert masks(tmp_path / "out") == before


def test_a_mask_on_another_grid_is_made_again_though_its_labels_are_right(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    mask = tmp_path / "out" / "case0.nii.gz"
    before = mask.read_bytes()
    loaded = nib.load(mask)
    labels = np.asarray(loaded.dataobj)
    affine = loaded.affine.copy()
    affine[0, 3] += 0.5
    nib.save(nib.Nifti1Image(labels, affine), mask)
    assert run(tmp_path, model) == ["done"]
    assert mask.read_bytes() == before


def test_a_case_that_failed_says_which_bytes_it_was_made_of(tmp_path: Path, model: Path) -> None:
    (whole,) = some_images(tmp_path / "in", 1)
    broken = tmp_path / "in" / "broken.nii.gz"
    broken.write_bytes(whole.read_bytes()[:-40])
    results = {r.case: r for r in infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)}
    assert results["broken"].status == "failed"
    assert results["broken"].inputs == {str(broken): hashlib.sha256(broken.read_bytes()).hexdigest()}
    told = json.loads((tmp_path / "out" / "run.json").read_text())["cases"]
    assert {c["case"]: c["inputs"] for c in told}["broken"] == results["broken"].inputs


def test_inputs_that_were_moved_are_still_the_same(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    (result,) = infer([tmp_path / "elsewhere"], [model], tmp_path / "out", EXACT)
    assert result.status == "skipped"
    assert list(result.inputs) == [str(tmp_path / "elsewhere" / "case0.nii.gz")]


def test_a_record_of_another_version_is_named_and_its_cases_done_again(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    old = record(tmp_path / "out") | {"schema_version": 1}
    (tmp_path / "out" / "run.json").write_text(json.dumps(old))
    assert run(tmp_path, model) == ["done"]
    assert "run.json is of another version of medseg (schema 1): its cases are done again" in caplog.text


def test_what_a_killed_run_has_left_is_cleared_away(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 1)
    with monkeypatch.context() as patched:
        # a killed process removes nothing; no process has this number
        patched.setattr(os, "getpid", lambda: 2**22 + 1)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            write_text(tmp_path / "out" / "case0.nii.gz", "half")
    assert len(masks(tmp_path / "out")) == 1
    assert run(tmp_path, model) == ["done"]
    assert masks(tmp_path / "out").keys() == {"case0.nii.gz"}


def test_names_that_are_no_text_are_read_back_from_a_record(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    path.rename(path.with_name("caf\udce9.nii.gz"))
    assert run(tmp_path, model) == ["done"]
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, model) == ["skipped"]
    assert not caplog.text


def test_a_damaged_record_is_named_and_its_cases_done_again(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    (tmp_path / "out" / "run.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, model) == ["done"]
    assert "run.json" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quality", {"shell": 5}),
        ("quality", {"shell": {"expected": 0.5}}),
        ("warnings", "abc"),
        ("inputs", {"a": 5}),
        ("seconds", {"read": "long"}),
        ("look", "perhaps"),
        ("status", "fine"),
    ],
)
def test_a_record_with_a_damaged_case_is_named_and_its_cases_done_again(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, key: str, value: object
) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    told = record(tmp_path / "out")
    told["cases"][0][key] = value
    (tmp_path / "out" / "run.json").write_text(json.dumps(told))
    assert run(tmp_path, model) == ["done"]
    assert f"run.json is damaged (cases.0.{key}" in caplog.text


@pytest.mark.parametrize("text", ['{"settings": {}, "cases": 5}', "[1, 2]"])
def test_a_file_of_somebody_else_is_not_written_over(tmp_path: Path, model: Path, text: str) -> None:
    some_images(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: is not a record of medseg .* choose another -o"):
        run(tmp_path, model)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["run.json"]
    assert (tmp_path / "out" / "run.json").read_text() == text


def test_a_folder_is_not_called_as_an_image(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    out = tmp_path / "mask.nii.gz"
    with pytest.raises(ConfigError, match=r"mask\.nii\.gz: is called as an image, .*; give it without \.nii\.gz"):
        infer([tmp_path / "in"], [model], out, EXACT)
    assert not out.exists()
    # one that is there already is told apart by nothing but its name
    out.mkdir()
    assert [r.status for r in infer([tmp_path / "in"], [model], out, EXACT)] == ["done"]


def test_masks_do_not_go_among_the_images(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    # its mask would have another name, and be an image of the next run
    nib.save(nib.load(path), tmp_path / "in" / "scan.nii")
    path.unlink()
    with pytest.raises(ConfigError, match="images or labels are there, among which"):
        infer([tmp_path / "in"], [model], tmp_path / "in", EXACT)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["scan.nii"]


@pytest.mark.parametrize("shard", [(1, 1), (2, 2)])
@pytest.mark.parametrize("names", [("Case", "case"), ("caf\u00e9", "CAFE\u0301")])
def test_names_that_the_disk_takes_for_one_are_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], shard: tuple[int, int]
) -> None:
    images = []
    for name, part in zip(names, ("one", "two")):
        (tmp_path / part).mkdir()
        images.append(save(tmp_path / part / f"{name}.nii.gz", blobs(SHAPE), AFFINE))
    monkeypatch.setattr(folder_module, "ignores_case", lambda folder: True)
    with pytest.raises(ConfigError, match=f"both {images[0]} and {images[1]} would become it, since this disk"):
        infer(images, [model], tmp_path / "out", replace(EXACT, shard=shard))
    assert not masks(tmp_path / "out")
    monkeypatch.undo()
    if not ignores_case(tmp_path):
        assert statuses(infer(images, [model], tmp_path / "out", EXACT)) == ["done", "done"]


def test_a_failed_case_is_tried_again(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 1)
    good = images[0].read_bytes()
    images[0].write_bytes(good[:100])
    assert run(tmp_path, model) == ["failed"]
    images[0].write_bytes(good)
    assert run(tmp_path, model) == ["done"]


def test_a_failed_case_says_that_an_older_mask_is_still_there(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    images[0].write_bytes(images[0].read_bytes()[:100])
    (result,) = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert result.status == "failed"
    assert result.warnings == ("case0.nii.gz is of an earlier run: do not use it",)


def test_cases_of_earlier_runs_stay_in_the_record(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 3)
    infer(images[:2], [model], tmp_path / "out", EXACT)
    infer(images[2:], [model], tmp_path / "out", EXACT)
    assert [c["case"] for c in record(tmp_path / "out")["cases"]] == ["case0", "case1", "case2"]


# ---- shards and records


def test_shards_share_the_cases_and_know_each_other(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 3)
    first = infer([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=(1, 2)))
    second = infer([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=(2, 2)))
    assert ([r.case for r in first], [r.case for r in second]) == (["case0", "case2"], ["case1"])
    assert {p.name for p in (tmp_path / "out").glob("*.json")} == {"run.1-of-2.json", "run.2-of-2.json"}
    assert run(tmp_path, model) == ["skipped"] * 3


def test_two_shards_at_once_make_what_one_run_makes(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 5)
    infer([tmp_path / "in"], [model], tmp_path / "whole", EXACT)
    shards = [
        threading.Thread(
            target=infer, args=([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=(n, 2)))
        )
        for n in (1, 2)
    ]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert masks(tmp_path / "out") == masks(tmp_path / "whole")


def test_a_shard_without_a_case_is_told(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    some_images(tmp_path / "in", 1)
    assert run(tmp_path, model, options=replace(EXACT, shard=(2, 2))) == []
    assert "shard 2/2 has none of the 1 cases" in caplog.text


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_an_impossible_shard_is_refused_before_anything_is_done(
    tmp_path: Path, model: Path, shard: tuple[int, int]
) -> None:
    some_images(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="--shard"):
        infer([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=shard))
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_was_done_with_what(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    found = record(tmp_path / "out")
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert found["schema_version"] == 2
    digests = {"descriptions", "configuration"}
    told = {k: v for k, v in found["settings"].items() if k not in digests}
    assert told == {
        "models": [weights],
        "window": "auto",
        "tta": "auto",
        "overlap": None,
        "precision": "32",
        "engine": "torch",
        "settings": {},
    }
    assert len(found["settings"]["configuration"]) == 64
    assert [len(d) for d in found["settings"]["descriptions"]] == [64]
    assert found["labels"] == {"3": "shell", "7": "core"}
    assert found["device"].startswith("cpu")
    assert {"python", "medseg", "torch", "monai", "numpy"} <= set(found["versions"])
    (case,) = found["cases"]
    assert case["inputs"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert {"hash", "read", "network", "write"} <= set(case["seconds"])
    assert all(s >= 0 for s in case["seconds"].values())
    assert 10 < case["peak_memory_mb"] <= found["peak_memory_mb"]
    assert found["peak_memory_of"] in ("each case", "the process so far")


def test_what_is_thought_of_a_mask_is_on_record_and_kept_by_a_skip(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 1)
    whole = Segmenter.segment_prepared
    quality = {"shell": {"expected": 0.61, "low": 0.4, "high": 0.78}}

    def assessed(*arguments: Any, **named: Any) -> Segmented:
        return replace(whole(*arguments, **named), quality=quality, warnings=("shell touches the edge",))

    monkeypatch.setattr(Segmenter, "segment_prepared", assessed)
    run(tmp_path, model)
    (case,) = record(tmp_path / "out")["cases"]
    assert (case["quality"], case["warnings"]) == (quality, ["shell touches the edge"])
    (result,) = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert (result.status, result.quality, result.warnings) == ("skipped", quality, ("shell touches the edge",))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_peak_of_a_case_is_its_own(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images(tmp_path / "in", 2)
    whole = Segmenter.segment_prepared
    megabytes = 300

    def greedy(self: Segmenter, prepared: Prepared, *arguments: Any, **named: Any) -> Segmented:
        if prepared.id == "case0":
            np.ones(megabytes * 2**20, np.uint8).sum()
        return whole(self, prepared, *arguments, **named)

    monkeypatch.setattr(Segmenter, "segment_prepared", greedy)
    run(tmp_path, model)
    told = record(tmp_path / "out")
    first, second = (c["peak_memory_mb"] for c in told["cases"])
    # the other case may differ by what the allocator keeps, not by most of what the first one held
    assert first - second > 0.8 * megabytes
    assert told["peak_memory_mb"] >= first
    assert told["peak_memory_of"] == "each case"


@pytest.mark.parametrize(("seconds", "writes"), [(1000.0, {2}), (0.0, set(range(3, 1000)))])
def test_the_record_is_written_by_the_clock_and_at_the_end(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, writes: set[int]
) -> None:
    some_images(tmp_path / "in", 4)
    written: list[Path] = []

    def counted(path: Path, text: str) -> Path:
        written.append(path)
        return write_text(path, text)

    monkeypatch.setattr(folder_module, "SECONDS_BETWEEN_RECORDS", seconds)
    monkeypatch.setattr(record_module, "write_text", counted)
    run(tmp_path, model)
    assert len(written) in writes
    assert [c["status"] for c in record(tmp_path / "out")["cases"]] == ["done"] * 4


def test_progress_rises_to_the_end_and_tells_the_time_left(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, float, str]] = []
    whole, looked = Segmenter.segment_prepared, threading.Event()

    def in_halves(
        self: Segmenter, prepared: Prepared, seconds: Any, *, tick: Callable[[float], None], **_: Any
    ) -> Segmented:
        tick(0.5)
        if prepared.id == "case1.nii.gz":
            assert looked.wait(20)
        return whole(self, prepared, seconds)

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        assert stage == "infer"
        told.append((done, total, detail))
        if done == 1.5:
            looked.set()

    monkeypatch.setattr(Segmenter, "segment_prepared", in_halves)
    cases = [Case(p.name, (p,), None, p.name) for p in some_images(tmp_path / "in", 2)]
    segment_cases(load_model(model, options=EXACT), cases, tmp_path / "out", progress=progress)
    done = [d for d, _, _ in told]
    assert done == sorted(done)
    assert done[-1] == 2
    assert {t for _, t, _ in told} == {2}
    detail = next(detail for d, _, detail in told if d == 1.5)
    assert detail.endswith(" left")
    assert " s a case, " in detail


def test_a_progress_that_breaks_ends_the_run_with_its_error(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 3)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        infer([tmp_path / "in"], [model], tmp_path / "out", EXACT, progress=broken)
    assert [c["status"] for c in record(tmp_path / "out")["cases"]][-1] == "not_done"
    assert threading.active_count() == threads


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be made"):
        infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
