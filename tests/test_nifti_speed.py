"""What fast reading and writing of NIfTI must keep: the bytes of the file, the notice of damage, a bound on memory."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import DataError
from medseg.readers import read_image
from medseg.writers import write_label

# 3 MB: blocks of 1 MB are filled whole and in part
NOISE = np.random.default_rng(0).integers(0, 99, (130, 110, 107), dtype=np.int16)
# no side is a multiple of the tiles that the writer turns
MASK = np.random.default_rng(1).integers(0, 3, (9, 21, 35), dtype=np.uint8)


def saved(path: Path, array: np.ndarray = NOISE, *, slope: float = 1) -> Path:
    image = nib.Nifti1Image(array, np.eye(4))
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    header["scl_slope"] = slope
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw), 1, mtime=0) if path.suffix == ".gz" else bytes(raw))
    return path


def peak_bytes(path: Path) -> int:
    read_image(path)
    tracemalloc.start()
    try:
        read_image(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_volume_of_several_blocks_is_read_whole(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(read_image(saved(tmp_path / name)).array[0], NOISE)


def test_gzip_of_several_members_is_read_whole(tmp_path: Path) -> None:
    content = saved(tmp_path / "a.nii").read_bytes()
    parts = [gzip.compress(content[:1000]), gzip.compress(content[1000:2_000_001]), gzip.compress(content[2_000_001:])]
    (tmp_path / "b.nii.gz").write_bytes(b"".join(parts))
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii.gz").array[0], NOISE)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_one_wrong_bit_in_gzip_is_noticed(tmp_path: Path, place: float) -> None:
    path = saved(tmp_path / "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.nii\.gz: the gzip stream is damaged or cut off .*copy the file again"):
        read_image(path)


@pytest.mark.parametrize("missing", [1, 8, 1000])
def test_gzip_without_its_end_is_refused(tmp_path: Path, missing: int) -> None:
    path = saved(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(DataError, match="the gzip stream is damaged or cut off"):
        read_image(path)


def test_whole_gzip_with_too_few_voxels_is_refused_with_both_numbers(tmp_path: Path) -> None:
    content = saved(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[: 352 + 5000]))
    with pytest.raises(DataError, match=f"5000 of {NOISE.nbytes} bytes of voxels found: cut off"):
        read_image(tmp_path / "b.nii.gz")


def test_claim_beyond_what_gzip_can_hold_takes_no_memory(tmp_path: Path) -> None:
    content = bytearray(saved(tmp_path / "a.nii").read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    # 7 axes of 32767: no 64 bits count these bytes
    header["dim"] = [7, *[32767] * 7]
    content[:348] = header.binaryblock
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(DataError, match=f"{NOISE.nbytes} of {2 * 32767**7} bytes of voxels found: cut off"):
        read_image(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_reading_holds_the_voxels_once(tmp_path: Path, name: str) -> None:
    # the block of 1 MB on the way, and what gzip keeps of its stream
    assert peak_bytes(saved(tmp_path / name)) < NOISE.nbytes + 2.5e6


def test_scaling_adds_one_float32_volume(tmp_path: Path) -> None:
    assert peak_bytes(saved(tmp_path / "a.nii", slope=2)) < NOISE.nbytes + NOISE.size * 4 + 1e5


def test_scaling_of_float32_adds_no_volume(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", NOISE.astype(np.float32), slope=2)
    assert peak_bytes(path) < NOISE.size * 4 + 1.2e6
    np.testing.assert_array_equal(read_image(path).array[0], NOISE * np.float32(2))


def test_type_of_no_bytes_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    header["datatype"] = 0
    content[:348] = header.binaryblock
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="voxel type of code 0 is not known"):
        read_image(path)


@pytest.mark.parametrize("shape", [(9, 21, 35), (9, 21, 1), (1, 21, 35), (300, 7, 16)])
def test_mask_has_the_bytes_of_the_format_whatever_its_layout_in_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = saved(tmp_path / "in.nii", np.zeros(shape, np.uint8))
    mask = np.resize(MASK, shape)
    layouts = [mask, np.asfortranarray(mask), np.ascontiguousarray(mask.transpose(1, 0, 2)).transpose(1, 0, 2)]
    written = [write_label(tmp_path / f"{n}.nii.gz", array, source, names={}) for n, array in enumerate(layouts)]
    contents = [path.read_bytes() for path in written]
    assert contents[0] == contents[1] == contents[2]
    assert gzip.decompress(contents[0]).endswith(mask.tobytes(order="F"))


def test_gzip_of_a_mask_has_neither_name_nor_time(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.nii", np.zeros(MASK.shape, np.uint8))
    head = write_label(tmp_path / "a.nii.gz", MASK, source, names={}).read_bytes()[:8]
    # RFC 1952: magic, deflate, no flags, no time
    assert head == b"\x1f\x8b\x08\x00\x00\x00\x00\x00"
