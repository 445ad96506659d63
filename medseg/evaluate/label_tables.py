"""Names and colours of labels in the forms that 3D Slicer and ITK-SNAP read; files are written elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from medseg.metrics import Value

# a line of 3D Slicer's reader is 1023 bytes long, with values, colour and end
_MOST_BYTES = 900
# what the readers of both programs take at most: a table up to the largest value, and 16 bits
_SLICER_MOST, _SNAP_MOST = 32768, 65535


def slicer_table(labels: Mapping[str, Value], colours: Mapping[str, str]) -> str:
    """A colour table (.ctbl): value, name without spaces, red, green, blue, opacity (0–255) on each line.

    A value that only regions hold has the name of all of them and the colour of the smallest. What both readers cannot
    take, such as a space in a name, is replaced by an underscore.
    """
    values, notes = _by_value(labels, _SLICER_MOST)
    lines = ["# Color table file", f"# {len(values) + 1} values", *notes, "0 Background 0 0 0 0"]
    for value, (name, source) in values.items():
        # ticks around a name are taken off by the reader
        word = "_".join(_one_line(name).split()).strip("'")
        lines.append(f"{value} {_cut(word) or value} {' '.join(map(str, _rgb(colours[source])))} 255")
    return "\n".join(lines) + "\n"


def snap_table(labels: Mapping[str, Value], colours: Mapping[str, str]) -> str:
    """A label description file of ITK-SNAP: value, red, green, blue, opacity (0–1), shown in 2D, in 3D, "name".

    Regions are named as in `slicer_table`; a quotation mark in a name becomes an apostrophe.
    """
    values, notes = _by_value(labels, _SNAP_MOST)
    lines = [
        "# ITK-SnAP Label Description File",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        *notes,
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for value, (name, source) in values.items():
        red, green, blue = _rgb(colours[source])
        text = _cut(_one_line(name).replace('"', "'")) or str(value)
        lines.append(f'{value:>5}   {red:>3}  {green:>3}  {blue:>3}        1  1  1    "{text}"')
    return "\n".join(lines) + "\n"


def _by_value(labels: Mapping[str, Value], most: int) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """By value: its name, and the label that gives the colour; and comments on what could not be said."""
    regions = {name: value for name, value in labels.items() if isinstance(value, tuple)}
    found: dict[int, tuple[str, str]] = {}
    for value in sorted({v for members in regions.values() for v in members}):
        holders = [name for name in regions if value in regions[name]]
        found[value] = "+".join(holders), min(holders, key=lambda name: len(regions[name]))
    found |= {value: (name, name) for name, value in labels.items() if isinstance(value, int)}
    notes = [f"# {_cut(_one_line(n))} is the region of the values {', '.join(map(str, v))}" for n, v in regions.items()]
    notes += [f"# value {value} is above {most} and left out" for value in sorted(found) if value > most]
    return {value: found[value] for value in sorted(found) if value <= most}, notes


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _one_line(name: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def _cut(name: str) -> str:
    return name.encode("utf-8", errors="replace")[:_MOST_BYTES].decode("utf-8", errors="ignore")
