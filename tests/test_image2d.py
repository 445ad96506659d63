"""Pictures: nothing is turned, cut to 8 bits or left out without a word."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image as Picture
from tiny import EXACT, tiny_config, tiny_model

from medseg.errors import DataError
from medseg.folder import infer
from medseg.readers import read_geometry, read_image, read_label

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
# unlike in every channel, above 8 bits, and unlike their own transpose
DEEP = (np.arange(60, dtype=np.uint16) * 1000).reshape(3, 4, 5)
# the TIFF tags that tests change
PHOTOMETRIC, ORIENTATION, SAMPLES, EXTRA = 262, 274, 277, 338


def png(path: Path, rows: bytes, *, shape: tuple[int, int], bits: int, colour: int, behind: bytes = b"") -> Path:
    """A PNG of filtered `rows`, with an eXIf chunk `behind` its pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    start = struct.pack(">IIBBBBB", shape[1], shape[0], bits, colour, 0, 0, 0)
    exif = chunk(b"eXIf", behind) if behind else b""
    body = chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(rows)) + exif + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(path: Path, pixels: np.ndarray, **changed: int) -> Path:
    """A TIFF whose pixels (rows, columns, samples) lie side by side, with tags of one short each as named."""
    rows, columns, samples = pixels.shape
    tags = {
        256: columns,
        257: rows,
        258: 8 * pixels.dtype.itemsize,
        259: 1,
        PHOTOMETRIC: 2,
        273: 0,
        SAMPLES: samples,
        278: rows,
        279: pixels.nbytes,
        284: 1,
        339: {"u": 1, "f": 3}[pixels.dtype.kind],
    } | {int(tag.removeprefix("tag_")): value for tag, value in changed.items()}
    each = {258: samples, 339: samples, EXTRA: samples - {2: 3, 5: 4}.get(tags[PHOTOMETRIC], 1)}
    later = 8 + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, value in sorted(tags.items()):
        count = each.get(tag, 1)
        body = struct.pack(f"<{count}H", *[value] * count)
        if tag == 273:
            body = struct.pack("<H", later + 100)
        if len(body) > 4:
            entries += struct.pack("<HHII", tag, 3, count, later + len(values))
            values += body
        else:
            entries += struct.pack("<HHI", tag, 3, count) + body.ljust(4, b"\0")
    whole = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values.ljust(100, b"\0")
    path.write_bytes(whole + pixels.tobytes())
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_a_picture_that_is_too_large_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Picture.fromarray(GREY).save(tmp_path / name)
    # refused is what has more than twice as many pixels
    monkeypatch.setattr(Picture, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(DataError, match=rf"{name}: too large to be read .*12 pixels.*10 pixels.*cut it into tiles"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
@pytest.mark.parametrize("turn", [3, 6])
def test_a_picture_that_is_stored_turned_is_refused(tmp_path: Path, name: str, turn: int) -> None:
    exif = Picture.Exif()
    exif[ORIENTATION] = turn
    Picture.fromarray(GREY).save(tmp_path / name, exif=exif)
    for read in (read_image, read_label, read_geometry):
        with pytest.raises(DataError, match=rf"{name}: pixels stored turned .*orientation {turn}.*auto-orient"):
            read(tmp_path / name)


def test_the_tag_is_found_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    exif = Picture.Exif()
    exif[ORIENTATION] = 8
    behind = exif.tobytes().removeprefix(b"Exif\0\0")
    path = png(tmp_path / "a.png", b"\0\1\2\0\3\4", shape=(2, 2), bits=8, colour=0, behind=behind)
    with pytest.raises(DataError, match="orientation 8"):
        read_label(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_a_picture_that_says_it_is_upright_is_read(tmp_path: Path, name: str) -> None:
    exif = Picture.Exif()
    exif[ORIENTATION] = 1
    Picture.fromarray(GREY).save(tmp_path / name, exif=exif)
    assert read_image(tmp_path / name).grid.shape == read_geometry(tmp_path / name).grid.shape == (3, 4)


def test_damaged_notes_cost_no_picture(tmp_path: Path) -> None:
    Picture.fromarray(GREY).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array[0], GREY)


def test_colour_of_16_bits_in_a_tiff_is_kept(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", DEEP[..., :3])
    np.testing.assert_array_equal(read_image(path).array, np.moveaxis(DEEP[..., :3], -1, 0))
    assert read_geometry(path).grid.shape == (3, 4)


def test_transparency_of_16_bits_is_dropped(tmp_path: Path) -> None:
    paths = [tiff(tmp_path / "a.tif", DEEP[..., :4], tag_338=2), tmp_path / "a.png"]
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(DEEP[..., :4], isVector=True), str(paths[1]))
    for path in paths:
        np.testing.assert_array_equal(read_image(path).array, np.moveaxis(DEEP[..., :3], -1, 0))


def test_grey_of_16_bits_with_transparency_is_refused(tmp_path: Path) -> None:
    labels = np.array([[[0, 65535], [1, 65535]], [[2, 65535], [3, 65535]]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in labels)
    path = png(tmp_path / "a.png", rows, shape=(2, 2), bits=16, colour=4)
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=r"a\.png: 16 bits of grey with transparency found.*-alpha off"):
            read(path)
    path = tiff(tmp_path / "a.tif", labels.astype("<u2"), tag_262=1, tag_338=2)
    with pytest.raises(DataError, match=r"a\.tif: 2 channels of 16 bits found, stored as none of our libraries"):
        read_label(path)


@pytest.mark.parametrize(
    "pixels", [DEEP, DEEP[..., :4], (DEEP // 1000).astype(np.uint8)], ids=["5", "4", "5 of 8 bits"]
)
def test_channels_that_are_no_colours_are_read_only_where_the_data_set_names_them(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    path = tiff(tmp_path / "a.tif", np.ascontiguousarray(pixels), tag_338=0)
    count = pixels.shape[-1]
    for channels in (None, 1, 3):
        with pytest.raises(DataError, match=rf"a\.tif: {count} channels found.* name {count} channels in the data set"):
            read_image(path, channels=channels)
    np.testing.assert_array_equal(read_image(path, channels=count).array, np.moveaxis(pixels, -1, 0))


def test_transparency_is_a_channel_where_the_data_set_names_four(tmp_path: Path) -> None:
    pixels = (DEEP[..., :4] // 1000).astype(np.uint8)
    path = tiff(tmp_path / "a.tif", np.ascontiguousarray(pixels), tag_338=1)
    np.testing.assert_array_equal(read_image(path, channels=4).array, np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_grey_with_more_channels_is_refused(tmp_path: Path, depth: type) -> None:
    path = tiff(tmp_path / "a.tif", DEEP.astype(depth), tag_262=1, tag_338=0)
    with pytest.raises(DataError, match="5 channels found"):
        read_image(path)
    with pytest.raises(DataError, match=r"5 channels of .* bits found, stored as none of our libraries"):
        read_image(path, channels=5)


def test_deep_colour_in_planes_is_refused(tmp_path: Path) -> None:
    # ITK makes 8 bits of it
    path = tiff(tmp_path / "a.tif", DEEP[..., :3], tag_284=2)
    with pytest.raises(DataError, match=r"a\.tif: 3 channels of 16 bits found, stored as none of our libraries"):
        read_image(path)


def test_a_case_of_many_channels_has_its_picture_too(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 4000, (16, 24, 5)).astype(np.uint16)
    path = tiff(tmp_path / "a.tif", deep, tag_338=0)
    config = tiny_config(
        data={"spatial_dims": 2, "channels": list("abcde")},
        preprocess={"orient": False, "intensity": [{"normalise": "image"}] * 5},
        augment={"flip_axes": [1], "rotation_deg": [10]},
        windows={"patch_size": [16, 24]},
    )
    model = tiny_model(tmp_path / "model", config)
    (result,) = infer([path], [model], tmp_path / "out", replace(EXACT, formats=("nifti", "picture")))
    assert (result.status, result.reason) == ("done", None)
    assert (tmp_path / "out" / "a.picture.png").is_file()
