"""Watched folders: what stops growing is taken and moved away; archives are, links and unfinished files are not."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from hospital_node import (
    check_kept,
    complete,
    counter,
    gateway,
    header,
    leaks,
    node_settings,
    rows_of,
    slices,
    the_series,
)

import medseg
from medseg_pipelines.hospital import watch as watch_module
from medseg_pipelines.hospital.database import refusals
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.settings import WatchSettings
from medseg_pipelines.hospital.store import Store
from medseg_pipelines.hospital.watch import Watcher

MOST_BYTES = 10**7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    return made


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = open_node(node_settings(tmp_path), "gateway")
    yield made
    made.close()


@pytest.fixture
def watcher(node: Node, folder: Path) -> Watcher:
    return Watcher(WatchSettings(folder=folder), node.intake, node.store, most_bytes=MOST_BYTES)


def names(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def reasons(node: Node) -> list[str]:
    return [row.reason for row in rows_of(node, refusals)]


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_files_are_taken_at_the_second_look_and_moved(node: Node, folder: Path, watcher: Watcher) -> None:
    slices(folder / "study" / "ct")
    assert watcher.look() == 0
    assert watcher.look() == 5
    assert names(folder) == [f"taken/study/ct/1-00{k}.dcm" for k in range(5)]
    assert len(check_kept(node)) == 5
    assert the_series(node).sent_by.startswith("folder-")
    assert watcher.look() == 0


def test_a_file_that_still_grows_is_left(node: Node, folder: Path, watcher: Watcher) -> None:
    (file,) = slices(folder, 1)
    whole = file.read_bytes()
    file.write_bytes(whole[:300])
    watcher.look()
    with file.open("ab") as more:
        more.write(whole[300:])
    assert watcher.look() == 0
    assert watcher.look() == 1
    assert names(folder) == ["taken/1-000.dcm"]
    assert reasons(node) == []


def test_a_file_that_is_written_to_while_it_is_copied_is_left(
    folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = slices(folder, 1)
    watcher.look()
    opened = os.open

    def late(path: object, *arguments: int, **options: int) -> int:
        handle = opened(path, *arguments, **options)  # type: ignore[arg-type]
        if path == file:
            with file.open("ab") as more:
                more.write(b"x")
        return handle

    monkeypatch.setattr(watch_module.os, "open", late)
    assert watcher.look() == 0
    assert names(folder) == ["1-000.dcm"]


@pytest.mark.parametrize("name", [".hidden.dcm", "x.dcm.part", "x.TMP", "x.filepart"])
def test_hidden_and_unfinished_files_are_left(folder: Path, watcher: Watcher, name: str) -> None:
    (folder / name).write_bytes(b"x")
    watcher.look()
    assert watcher.look() == 0
    assert names(folder) == [name]


def test_what_is_no_dicom_file_is_moved_to_refused(node: Node, folder: Path, watcher: Watcher) -> None:
    (folder / "Tweety.txt").write_text("Tweety")
    (folder / "empty.dcm").write_bytes(b"")
    slices(folder, 1)
    watcher.look()
    assert watcher.look() == 3
    assert names(folder) == ["refused/Tweety.txt", "refused/empty.dcm", "taken/1-000.dcm"]
    assert len(reasons(node)) == 2
    assert leaks(node.settings.folder, *reasons(node)) == []


def test_a_file_that_nothing_is_prepared_for_keeps_out_no_other(
    node: Node, folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = medseg.dicom_facts

    def broken(path: Path) -> medseg.DicomFacts:
        if b"odd" in path.read_bytes():
            raise IndexError("Tweety")
        return facts(path)

    monkeypatch.setattr(medseg, "dicom_facts", broken)
    (folder / "a").write_bytes(b"odd")
    slices(folder, 1)
    watcher.look()
    assert watcher.look() == 2
    assert names(folder) == ["refused/a", "taken/1-000.dcm"]
    (reason,) = reasons(node)
    assert reason.startswith("a file that cannot be looked at: IndexError at ")
    assert leaks(node.settings.folder, reason) == []


def test_links_lead_nowhere(tmp_path: Path, node: Node, folder: Path, watcher: Watcher) -> None:
    outside = tmp_path / "outside"
    slices(outside, 2)
    (folder / "link.dcm").symlink_to(outside / "1-000.dcm")
    (folder / "folder").symlink_to(outside)
    os.mkfifo(folder / "pipe.dcm")
    watcher.look()
    assert watcher.look() == 0
    assert len(names(outside)) == 2
    assert stat.S_ISFIFO((folder / "pipe.dcm").stat().st_mode)
    assert check_kept(node) == []


@pytest.mark.parametrize("place", ["taken", "refused"])
def test_no_link_leads_what_is_moved_elsewhere(tmp_path: Path, folder: Path, watcher: Watcher, place: str) -> None:
    if place == "taken":
        slices(folder, 1)
    else:
        (folder / "authorized_keys").write_text("a key of mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / place).symlink_to(elsewhere)
    watcher.look()
    watcher.look()
    assert names(elsewhere) == []
    assert watcher.look() == 0


def test_a_folder_that_turns_into_a_link_gives_nothing_of_what_it_leads_to(
    tmp_path: Path, folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices(folder / "in", 1)
    watcher.look()
    other = tmp_path / "other"
    slices(other, 1)
    take = watcher._intake.take

    def swap(path: Path, *, sent_by: str) -> object:
        (folder / "in").rename(tmp_path / "was")
        (folder / "in").symlink_to(other)
        return take(path, sent_by=sent_by)

    monkeypatch.setattr(watcher._intake, "take", swap)
    watcher.look()
    assert names(other) == ["1-000.dcm"]


def test_a_folder_that_is_a_link_is_told(tmp_path: Path, folder: Path, watcher: Watcher) -> None:
    folder.rename(tmp_path / "was")
    folder.symlink_to(tmp_path / "was")
    with pytest.raises(medseg.ConfigError, match="a link is none"):
        watcher.look()


def test_a_file_that_turns_into_a_link_is_not_followed(
    tmp_path: Path, node: Node, folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = slices(folder, 1)
    (secret,) = slices(tmp_path / "outside", 1, number=2)
    watcher.look()
    check_room = node.intake.check_room

    def swap(size: int = 0) -> None:
        check_room(size)
        file.unlink()
        file.symlink_to(secret)

    monkeypatch.setattr(node.intake, "check_room", swap)
    assert watcher.look() == 0
    assert check_kept(node) == []


def test_killed_before_the_move_it_is_taken_again_without_harm(node: Node, folder: Path, watcher: Watcher) -> None:
    files = slices(folder, 2)
    content = [file.read_bytes() for file in files]
    watcher.look()
    watcher.look()
    for file, bytes_ in zip(files, content, strict=True):
        file.write_bytes(bytes_)
    again = Watcher(WatchSettings(folder=folder), node.intake, node.store, most_bytes=MOST_BYTES)
    again.look()
    assert again.look() == 2
    assert len(check_kept(node)) == 2
    assert counter(node, "received_again") == 2
    # a name that is there already stays
    assert names(folder) == ["taken/1-000-2.dcm", "taken/1-000.dcm", "taken/1-001-2.dcm", "taken/1-001.dcm"]


def test_no_room_leaves_all_where_it_is(
    node: Node, folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices(folder, 3)
    watcher.look()
    with monkeypatch.context() as full:
        full.setattr(Store, "has_room", lambda self, size=0: False)
        assert watcher.look() == 0
    assert len(names(folder)) == 3
    assert watcher.look() == 3


def test_a_file_that_cannot_be_moved_is_not_taken_again_and_again(
    node: Node, folder: Path, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    slices(folder, 1)
    (folder / "taken").write_bytes(b"in the way")
    watcher.look()
    watcher.look()
    watcher.look()
    assert counter(node, "received") == 1
    assert counter(node, "received_again") == 0
    assert "cannot be moved" in caplog.text


def test_a_file_that_may_not_be_read_is_told_and_the_others_are_taken(
    folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = slices(folder, 2)
    watcher.look()
    opened = os.open

    def forbidden(path: object, *arguments: int, **options: int) -> int:
        if path == first:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(watch_module.os, "open", forbidden)
    assert watcher.look() == 1
    assert watcher.look() == 0
    assert caplog.text.count("may not be read") == 1


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_file_that_its_disk_does_not_give_is_told_and_the_others_are_taken(
    folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    first, _ = slices(folder, 2)
    watcher.look()
    opened, bad = os.open, os.stat(first).st_ino
    read = watch_module._read

    def broken(path: object, *arguments: int, **options: int) -> int:
        if where == "open" and path == first:
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    def torn(source: BinaryIO) -> bytes:
        if where == "read" and os.fstat(source.fileno()).st_ino == bad:
            raise watch_module._UnreadableError("Input/output error")
        return read(source)

    with monkeypatch.context() as damaged:
        damaged.setattr(watch_module.os, "open", broken)
        damaged.setattr(watch_module, "_read", torn)
        assert [watcher.look() for _ in range(3)] == [1, 0, 0]
    assert caplog.text.count("cannot be read (Input/output error)") == 1
    # a share that hung for a while
    assert watcher.look() == 1


def test_a_folder_that_is_gone_is_told(folder: Path, watcher: Watcher) -> None:
    folder.rmdir()
    with pytest.raises(medseg.ConfigError, match="no folder found"):
        watcher.look()


def test_a_file_that_is_too_large_is_refused(node: Node, folder: Path) -> None:
    slices(folder, 1)
    watcher = Watcher(WatchSettings(folder=folder), node.intake, node.store, most_bytes=100)
    watcher.look()
    watcher.look()
    assert names(folder) == ["refused/1-000.dcm"]
    assert "expected at most 100" in reasons(node)[0]


# ---- archives


def test_an_archive_is_unpacked_to_no_name_of_its_own(
    tmp_path: Path, node: Node, folder: Path, watcher: Watcher
) -> None:
    files = slices(tmp_path / "ct", 3)
    paths = ("../../../Tweety.dcm", "/etc/Tweety.dcm", "a/../../b.dcm")
    members = {name: file.read_bytes() for name, file in zip(paths, files, strict=True)}
    zipped(folder / "study.zip", members | {"readme.txt": b"-", "DICOMDIR": files[0].read_bytes(), ".x": b"x"})
    before = names(tmp_path)
    watcher.look()
    assert watcher.look() == 1
    assert names(folder) == ["taken/study.zip"]
    kept = {str((node.store.folder / row.file).relative_to(tmp_path)) for row in check_kept(node)}
    assert len(kept) == 3
    audit = {name for name in names(tmp_path) if "audit" in name or "sqlite" in name}
    assert set(names(tmp_path)) - kept - audit - set(before) == {"in/taken/study.zip"}
    assert leaks(node.settings.folder) == []


def test_a_bomb_is_not_unpacked(node: Node, folder: Path, watcher: Watcher) -> None:
    zipped(folder / "bomb.zip", {f"{n}.dcm": bytes(2**26) for n in range(8)})
    watcher.look()
    watcher.look()
    assert names(folder) == ["refused/bomb.zip"]
    assert "would unpack to" in reasons(node)[0]
    assert "bomb" not in reasons(node)[0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content[:-30], "not a readable zip archive"),
        (lambda content: b"no zip" + content[6:], "no zip archive"),
    ],
)
def test_an_archive_that_is_none_is_refused(
    tmp_path: Path, node: Node, folder: Path, watcher: Watcher, spoil: object, reason: str
) -> None:
    (file,) = slices(tmp_path / "ct", 1)
    archive = zipped(folder / "x.zip", {"a.dcm": file.read_bytes()})
    archive.write_bytes(spoil(archive.read_bytes()))  # type: ignore[operator]
    watcher.look()
    watcher.look()
    assert names(folder) == ["refused/x.zip"]
    assert reason in reasons(node)[0]


def test_the_sound_members_of_an_archive_are_taken_and_it_is_refused(
    tmp_path: Path, node: Node, folder: Path, watcher: Watcher
) -> None:
    first, second = slices(tmp_path / "ct", 2)
    archive = folder / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        file.writestr("a.dcm", first.read_bytes())
        file.writestr("b.dcm", second.read_bytes())
        file.writestr("large.dcm", bytes(2 * MOST_BYTES))
    content = bytearray(archive.read_bytes())
    # a bit of the first member: its checksum tells
    content[content.index(b"DICM") + 300] ^= 1
    archive.write_bytes(content)
    watcher.look()
    watcher.look()
    assert names(folder) == ["refused/x.zip"]
    assert len(check_kept(node)) == 1
    damaged, large = sorted(reasons(node), key=lambda text: "expected at most" in text)
    assert "member 1 is damaged" in damaged
    assert f"expected at most {MOST_BYTES}" in large


def test_an_archive_without_dicom_is_refused(node: Node, folder: Path, watcher: Watcher) -> None:
    zipped(folder / "x.zip", {"readme.txt": b"-"})
    watcher.look()
    watcher.look()
    assert names(folder) == ["refused/x.zip"]
    assert reasons(node) == ["no DICOM file found in an archive, expected some"]


def test_a_disc_has_its_directory_beside_the_files(tmp_path: Path, node: Node, folder: Path, watcher: Watcher) -> None:
    slices(folder / "IMAGES", 1)
    (folder / "DICOMDIR").write_bytes(b"anything")
    watcher.look()
    assert watcher.look() == 2
    assert names(folder) == ["taken/DICOMDIR", "taken/IMAGES/1-000.dcm"]
    assert reasons(node) == []


# ---- in the gateway


def test_the_gateway_watches(tmp_path: Path, folder: Path) -> None:
    header(1, 0).save_as(folder / "1.dcm", enforce_file_format=True)
    with gateway(node_settings(tmp_path, watch=[{"folder": str(folder), "every_s": 0.05}])) as node:
        complete(node, images=1)
    assert names(folder) == ["taken/1.dcm"]
