"""What a TIFF says of its samples, since libraries cut and scramble some without a word; pixels are read elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

# tags of TIFF 6.0
_COLUMNS, _ROWS, _BITS, _PHOTOMETRIC = 256, 257, 258, 262
_ORIENTATION, _SAMPLES, _PLANES, _EXTRA = 274, 277, 284, 338
# samples by photometric interpretation: RGB, inks, YCbCr, CIELab; grey and palettes have one
_RGB = 2
_COLOURS = {_RGB: 3, 5: 4, 6: 3, 8: 3}
# of a sample beyond the colours: transparency, multiplied into them or not
_ALPHA = {1, 2}
_BIG = 43


@dataclass(frozen=True)
class Tiff:
    """The first page. `bits` of the widest sample; `colours`: samples that are grey or colour; `alpha`: there is one
    more, transparency. `interleaved`: the samples of a pixel lie side by side."""

    rows: int
    columns: int
    samples: int
    bits: int
    colours: int
    alpha: bool
    interleaved: bool
    rgb: bool
    orientation: int

    @property
    def is_plain(self) -> bool:
        """Whether every sample is grey, colour or transparency."""
        return self.samples == self.colours or self.alpha


def read_tiff(path: Path) -> Tiff | None:
    """What the tags say; None for other formats and where no size is told."""
    with path.open("rb") as file:
        start = file.read(8)
        # a large TIFF of big-endian numbers is one that Pillow does not know
        if len(start) < 8 or start[:4] not in PREFIXES or start[3] == _BIG:
            return None
        start += file.read(8) if start[2] == _BIG else b""
        tags: Any = ImageFileDirectory_v2(start)
        file.seek(tags.next)
        tags.load(file)
        if _ROWS not in tags or _COLUMNS not in tags:
            return None
        samples = int(tags.get(_SAMPLES, 1))
        colours = _COLOURS.get(tags.get(_PHOTOMETRIC), 1)
        return Tiff(
            rows=int(tags[_ROWS]),
            columns=int(tags[_COLUMNS]),
            samples=samples,
            bits=max(tags.get(_BITS, (1,))),
            colours=colours,
            alpha=samples == colours + 1 and set(tags.get(_EXTRA, (0,))) <= _ALPHA,
            interleaved=tags.get(_PLANES, 1) == 1,
            rgb=tags.get(_PHOTOMETRIC) == _RGB,
            orientation=int(tags.get(_ORIENTATION, 1)),
        )
