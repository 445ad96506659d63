"""The audit log: chains that show what was done to them, and the command that looks."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="needs the extra `hospital`")

import medseg
from medseg_pipelines.hospital import audit as audit_module
from medseg_pipelines.hospital.audit import START, Audit, check_audit, read_audit
from medseg_pipelines.hospital.command import run_command


def written(folder: Path, *events: str, part: str = "n-web-0", close: bool = True) -> Path:
    audit = Audit(folder, part)
    for event in events:
        audit.record(event, study="ab" * 16)
    if close:
        audit.close()
    return audit.path


def test_every_line_carries_the_hash_of_the_one_before(tmp_path: Path) -> None:
    lines = written(tmp_path, "viewed").read_bytes().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["event"] for e in entries] == ["started", "viewed", "ended"]
    assert entries[0]["previous"] == START
    assert [e["previous"] for e in entries[1:]] == [hashlib.sha256(line).hexdigest() for line in lines[:-1]]
    report = check_audit(tmp_path)
    assert report.faults == ()
    assert report.files[0].ended
    assert report.heads == {"n-web-0": hashlib.sha256(lines[-1]).hexdigest()}


def changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"viewed", b"looked", 1), *lines[2:]]


def dropped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def added(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[1], *lines[2:]]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def garbled(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"\xff not json", *lines[2:]]


def beheaded(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


@pytest.mark.parametrize(
    ("deed", "broken"),
    [(changed, (3,)), (dropped, (2,)), (added, (3,)), (swapped, (2, 3, 4)), (garbled, (2, 3)), (beheaded, (1,))],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_done_to_lines_is_seen_where_it_was_done(tmp_path: Path, deed, broken: tuple[int, ...]) -> None:
    path = written(tmp_path, "viewed", "replay", "viewed")
    path.write_bytes(b"\n".join(deed(path.read_bytes().splitlines())) + b"\n")
    assert read_audit(path).broken == broken
    assert len(check_audit(tmp_path).faults) == len(broken)


def test_a_file_cut_after_a_line_has_no_end_and_an_unbroken_chain(tmp_path: Path) -> None:
    path = written(tmp_path, "viewed")
    path.write_bytes(b"".join(line + b"\n" for line in path.read_bytes().splitlines()[:-1]))
    found = read_audit(path)
    assert (found.broken, found.ended, found.torn) == ((), False, False)


def test_a_file_that_ends_inside_a_line_is_torn_not_broken(tmp_path: Path) -> None:
    path = written(tmp_path, "viewed")
    path.write_bytes(path.read_bytes()[:-10])
    found = read_audit(path)
    assert (found.broken, found.ended, found.torn, len(found.hashes)) == ((), False, True, 2)


def test_a_new_file_stands_on_the_latest_of_its_part(tmp_path: Path) -> None:
    written(tmp_path)
    second = written(tmp_path, "viewed")
    written(tmp_path, part="n-worker-0")
    # a name that begins with the other's is another part
    written(tmp_path, part="n-web-0-x")
    third = read_audit(written(tmp_path))
    assert (third.after, third.after_hash) == (second.name, read_audit(second).last_hash)
    assert check_audit(tmp_path).faults == ()


def test_the_hash_before_is_found_however_long_the_last_lines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_BLOCK", 7)
    first = written(tmp_path, "viewed")
    assert read_audit(written(tmp_path)).after_hash == read_audit(first).last_hash


def test_a_cut_or_removed_file_is_seen_where_a_later_one_stands_on_it(tmp_path: Path) -> None:
    first, second = written(tmp_path, "viewed"), written(tmp_path)
    whole = first.read_bytes()
    first.write_bytes(b"".join(line + b"\n" for line in whole.splitlines()[:-1]))
    assert check_audit(tmp_path).faults == (
        f"{first.name}: its last line is not the one that {second.name} stands on (cut, or added to)",
    )
    first.unlink()
    assert check_audit(tmp_path).faults == (
        f"{second.name}: stands on {first.name}, which is not here (removed, or moved away)",
    )


def test_a_torn_file_can_be_followed_by_the_next_start(tmp_path: Path) -> None:
    first = written(tmp_path, "viewed", close=False)
    first.write_bytes(first.read_bytes()[:-5])
    written(tmp_path)
    assert check_audit(tmp_path).faults == ()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(tmp_path, "n-web-0")
    write = os.write

    def half(handle: int, content: bytes) -> int:
        write(handle, content[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            audit.record("lost")
    audit.record("kept")
    audit.close()
    assert read_audit(audit.path).broken == ()
    assert [json.loads(line)["event"] for line in audit.path.read_text().splitlines()] == ["started", "kept", "ended"]


def test_many_threads_make_one_chain(tmp_path: Path) -> None:
    audit = Audit(tmp_path, "n-web-0")
    threads = [threading.Thread(target=lambda: [audit.record("viewed") for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    found = read_audit(audit.path)
    assert (found.broken, len(found.hashes)) == ((), 82)


def test_two_starts_at_once_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module.time, "time", iter([100.0, 100.0, 100.0, 100.0, 100.001, *[101.0] * 9]).__next__)
    monkeypatch.setattr(audit_module.time, "sleep", lambda _: None)
    assert len({written(tmp_path), written(tmp_path)}) == 2


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(medseg.DataError, match="no such folder"):
        check_audit(tmp_path / "audit")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "hospital.yaml"
    path.write_text("folder: node\n")
    return path


def test_the_command_passes_whole_chains_and_prints_their_ends(tmp_path: Path, config: Path, capsys) -> None:
    folder = tmp_path / "node" / "audit"
    path = written(folder, "viewed")
    running = written(folder, part="n-worker-0", close=False)
    assert run_command(["audit", "-c", str(config)]) == 0
    told = capsys.readouterr().out
    assert f"n-web-0 ends with {read_audit(path).last_hash}" in told
    assert f"{running.name}: has no end" in told
    assert f"{path.name}: has no end" not in told


def test_the_command_fails_for_a_broken_chain(tmp_path: Path, config: Path, capsys) -> None:
    path = written(tmp_path / "node" / "audit", "viewed")
    path.write_bytes(path.read_bytes().replace(b"viewed", b"nothin"))
    assert run_command(["audit", "-c", str(config)]) == 1
    assert f"{path.name}: line 3 does not follow" in capsys.readouterr().err


def test_a_chain_made_anew_is_seen_by_a_hash_that_was_kept_elsewhere(tmp_path: Path, config: Path, capsys) -> None:
    path = written(tmp_path / "node" / "audit", "viewed")
    kept = read_audit(path).last_hash
    assert run_command(["audit", "-c", str(config), "--holds", kept]) == 0
    path.unlink()
    written(tmp_path / "node" / "audit", "nothing")
    assert run_command(["audit", "-c", str(config), "--holds", kept]) == 1
    assert f"no line has the hash {kept}" in capsys.readouterr().err
