"""Zip archives of DICOM: the same volume as the folder, nothing on the disk, and nothing that is made to do harm."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import phantom
import pytest
from phantom import VOXELS, series

from medseg.errors import DataError
from medseg.readers import archive
from medseg.readers.dicom_files import holds_dicom
from medseg.readers.series import choose_series, find_series, read_series


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def members(tmp_path: Path, prefix: str = "Canary^Tweety/") -> dict[str, bytes]:
    return {f"{prefix}{path.name}": path.read_bytes() for path in series(tmp_path / "ct").iterdir()}


def test_an_archive_is_the_same_volume_as_its_folder(tmp_path: Path) -> None:
    path = zipped(tmp_path / "ct.zip", members(tmp_path) | {"readme.txt": b"-", "nested.zip": b"PK\3\4", ".IM9": b"x"})
    found = choose_series(path)
    image = read_series(found)
    np.testing.assert_array_equal(image.array[0], VOXELS.T)
    np.testing.assert_allclose(image.grid.affine, phantom.ras_affine(), atol=1e-9)
    assert found.sha256() == choose_series(tmp_path / "ct").sha256()
    assert find_series(path).others == 2


def test_a_series_in_an_archive_in_an_archive_is_ignored(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", members(tmp_path))
    assert not holds_dicom(zipped(tmp_path / "outer.zip", {"inner.zip": inner.read_bytes()}))


def test_names_in_an_archive_are_never_paths(tmp_path: Path) -> None:
    evil = dict(
        zip(("../../evil", "/etc/evil", "C:\\evil", "a/../../../evil", "evil\n\0x"), members(tmp_path).values())
    )
    before = sorted(tmp_path.rglob("*"))
    path = zipped(tmp_path / "evil.zip", evil)
    np.testing.assert_array_equal(read_series(choose_series(path)).array[0], VOXELS.T)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_a_member_without_a_name_is_none(tmp_path: Path) -> None:
    path = zipped(tmp_path / "ct.zip", {"nameless": b"x", **members(tmp_path)})
    # what is read of a name ends at a zero byte
    path.write_bytes(path.read_bytes().replace(b"nameless", b"\0ameless"))
    np.testing.assert_array_equal(read_series(choose_series(path)).array[0], VOXELS.T)


def test_a_damaged_member_is_told_by_its_number_and_not_by_its_name(tmp_path: Path) -> None:
    path = zipped(tmp_path / "ct.zip", members(tmp_path), zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    # in the pixels of the third member, so that its checksum fails
    content[content.index(VOXELS[1].tobytes()) + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ct\.zip: member \d is damaged") as caught:
        read_series(choose_series(path))
    assert "Canary" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 MB of zeros would do as well, in seconds
    monkeypatch.setattr(archive, "SMALL_BYTES", 2**20)
    path = zipped(tmp_path / "bomb.zip", {f"{n}": bytes(2**20) for n in range(5)})
    assert path.stat().st_size < 2**13
    with pytest.raises(DataError, match="bytes would unpack to 5242880, expected at most 200 times"):
        find_series(path)


def test_a_claim_of_many_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match="it would unpack to"):
        find_series(zipped(tmp_path / "ct.zip", members(tmp_path)))
    monkeypatch.setattr(archive, "MOST_MEMBERS", 3)
    with pytest.raises(DataError, match="5 members found, expected at most 3"):
        find_series(tmp_path / "ct.zip")


def test_a_list_of_members_without_end_is_not_read(tmp_path: Path) -> None:
    # the members share one place: 30 MB of list would be 250 MB in memory, and there may be gigabytes of it
    path = zipped(tmp_path / "ct.zip", {"a": b"x"})
    content = path.read_bytes()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    count = 600_000
    size = count * (end - start)
    ends = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    ends += struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    ends += struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(content[:start] + content[start:end] * count + ends)
    tracemalloc.start()
    with pytest.raises(DataError, match="a list of members of 28200000 bytes"):
        find_series(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < archive.MOST_LIST_BYTES


def test_a_member_that_is_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "ct.zip", {"a": b"\0" * 128 + b"DICM" + bytes(5000)})
    content = bytearray(path.read_bytes())
    # the size in the central directory, which alone is believed
    at = content.index(b"PK\1\2") + 24
    content[at : at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="member 1"):
        find_series(path)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "ct.zip", {"a": b"\0" * 128 + b"DICM"})
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted members found"):
        find_series(path)


@pytest.mark.parametrize("content", [b"PK\3\4", b"PK\5\6" + bytes(18)])
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ct.zip"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable zip archive|no DICOM file found"):
        choose_series(path)
