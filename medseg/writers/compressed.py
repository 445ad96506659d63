"""What stands in compressed pixels beside the image: comments, foreign blocks, bytes behind the end; none is decoded.

Imports pydicom: this module is imported where DICOM is written, never by the package.
"""

from __future__ import annotations

import re

from pydicom.encaps import generate_fragments

_JPEG = (*(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81)),)
_JPEG_2000 = (*(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 92, 93, 201, 202, 203)),)
_RLE = "1.2.840.10008.1.2.5"
# ISO 10918-1 annex B, 14495-1 annex C; 15444-1 annex A
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_SOC, _SOT, _SOD, _COMMENT = 0x4F, 0x90, 0x93, 0x64
# blocks of applications, by their first bytes: sizes, colours, and what a codec must know
_BLOCKS = {
    0xE0: (b"JFIF\0", b"AVI1"),
    0xE2: (b"ICC_PROFILE\0",),
    # the second one ends the directory of SPIFF, ISO 10918-3 F.2.2.3
    0xE8: (b"SPIFF\0", b"\0\0\0\1\xff\xd8", b"mrfx"),
    0xEE: (b"Adobe",),
}
# what libraries write of themselves, and nothing else: their names, numbers, and what stands between
_CODECS = re.compile(
    rb"([\s.,:()/=_+-]|v(ers?(ion)?|s)?(?=[\s.-]?[0-9])|[0-9]|created by|creator|compressed by|encoder|encoded by|using"
    rb"|quality|lead technologies|inc\b|gd-jpeg|ijg|jpeg|libjpeg|openjpeg|gdcm|kakadu|kdu|jasper|aware|charls|lavc"
    rb"|openjph|grok|pegasus|accusoft)*|kdu-layer-info: log_2{delta-d\(squared-error\)/delta-l\(bytes\)}, l\(bytes\)\n"
    rb"[\s0-9.,e+-]*",
    re.IGNORECASE,
)
# of so many digits a comment could be a date or a number of somebody
_MOST_DIGITS = 7
_LAYERS = b"Kdu-Layer-Info"
_PADDING = b"\0\xff"
_CUT = "cut off, or no stream of its kind"


def beside_image(pixels: bytes, syntax: str) -> str:
    """What is in the encapsulated `pixels` of the transfer syntax `syntax` beside the image; empty: nothing.

    Words without any of the values. A stream that is not to be understood counts as well.
    """
    if syntax == _RLE:
        # its lengths are known to the decoder alone
        return ""
    if syntax not in (*_JPEG, *_JPEG_2000):
        return "a compression that nobody can look into here"
    try:
        parts = list(generate_fragments(pixels))
    except ValueError:
        return _CUT
    # the first one is the table of offsets; a frame may be in several
    return _looked_into(b"".join(parts[1:]), wavelets=syntax in _JPEG_2000)


def _looked_into(data: bytes, *, wavelets: bool) -> str:
    at = 0
    walk = _codestream if wavelets else _jpeg
    begin = b"\xff\x4f\xff\x51" if wavelets else b"\xff\xd8\xff"
    while at < len(data):
        if not data.startswith(begin, at):
            return "bytes behind the end of a compressed frame" if at else _CUT
        try:
            at, found = walk(data, at + 2)
        except IndexError:
            return _CUT
        if found:
            return found
        while at < len(data) and data[at] in _PADDING and not data.startswith(begin, at):
            at += 1
    return "" if data else _CUT


def _jpeg(data: bytes, at: int) -> tuple[int, str]:
    """From behind the start of an image to behind its end, and what was found."""
    while True:
        at, marker = _marker(data, at)
        if marker == _EOI:
            return at, ""
        if 0xD0 <= marker <= _SOI or marker == 0x01:
            continue
        length = data[at] << 8 | data[at + 1]
        if length < 2 or at + length > len(data):
            return at, _CUT
        held = data[at + 2 : at + length]
        if marker == _COM and not _is_codec(held):
            return at, "a comment"
        if 0xE0 <= marker <= 0xEF and not held.startswith(_BLOCKS.get(marker, ())):
            return at, "a block of another program"
        at += length
        if marker == _SOS:
            at = _behind_scan(data, at)


def _marker(data: bytes, at: int) -> tuple[int, int]:
    if data[at] != 0xFF:
        raise IndexError(at)
    while data[at] == 0xFF:
        at += 1
    return at + 1, data[at]


def _behind_scan(data: bytes, at: int) -> int:
    """The next marker that ends what is coded: 0xFF and zero is a value, or in JPEG-LS 0xFF and less than 0x80."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            raise IndexError(at)
        follows = data[at + 1]
        if follows >= 0x80 and not 0xD0 <= follows <= 0xD7 and follows != 0xFF:
            return at
        at += 1 if follows == 0xFF else 2


def _codestream(data: bytes, at: int) -> tuple[int, str]:
    """As `_jpeg`, for JPEG 2000: the main header, then tile after tile by their lengths."""
    tile = 0
    while True:
        if data[at] != 0xFF:
            return at, _CUT
        marker, at = data[at + 1], at + 2
        if marker == _EOI:
            return at, ""
        if marker == _SOD:
            at = tile
            continue
        length = data[at] << 8 | data[at + 1]
        if length < 2 or at + length > len(data):
            return at, _CUT
        if marker == _SOT:
            whole = int.from_bytes(data[at + 4 : at + 8], "big")
            # zero: up to the end of the codestream, which only the last tile may say
            tile = at - 2 + whole if whole else data.rfind(b"\xff\xd9")
            if not at + length < tile < len(data):
                return at, _CUT
        if marker == _COMMENT and not _is_codec(data[at + 4 : at + length]):
            return at, "a comment"
        at += length


def _is_codec(held: bytes) -> bool:
    words = held.strip(b"\0 \r\n")
    digits = sum(byte in b"0123456789" for byte in words)
    return _CODECS.fullmatch(words) is not None and (digits <= _MOST_DIGITS or words.startswith(_LAYERS))
