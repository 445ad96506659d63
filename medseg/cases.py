"""What a data set consists of: cases, channels, label names, folds, and the inputs of inference.

Of DICOM, and of headers beside their voxels, files are opened: they say which series or files they are of.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from medseg.config import BACKGROUND
from medseg.errors import ConfigError, DataError
from medseg.readers import (
    ENDINGS,
    Series,
    SeriesOptions,
    holds_colour,
    is_image_file,
    is_picture,
    split_ending,
    stored_in,
    why_absent,
)
from medseg.readers.archive import is_archive
from medseg.readers.dicom_files import ENDINGS as DICOM_ENDINGS
from medseg.readers.dicom_files import holds_dicom
from medseg.readers.series import Found, find_series

log = logging.getLogger(__name__)

GROUP_COLUMNS = ("group", "patient", "subject", "patient_id", "subject_id")
"""Columns of a table that name patients without being asked for, the first that is there."""

Labels = dict[str, int | tuple[int, ...]]
Item = TypeVar("Item")

CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")
# where the images of a data set are, those to be segmented first
IMAGE_FOLDERS = ("imagesTs", "imagesTr", "images")
# so many names that several inputs share are told, and the number of the others
MOST_CLASHES = 5
COLOURS = 3


@dataclass(frozen=True)
class Case:
    """One case: `images` holds one file per channel, or one file with all channels. `group`: cases of one patient.

    `series`: the DICOM series that is meant in `images`, a folder, an archive or a file.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    fold: int | None = None
    series: Series | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from, images before label; the files that a header names come behind it."""
        return tuple(file for path in (*self.images, self.label) if path is not None for file in stored_in(path))


@dataclass(frozen=True)
class Fold:
    """Case ids to train on and to validate on."""

    train: tuple[str, ...]
    val: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A file that is missing or belongs to nothing: what was found, what was expected, what to do."""

    case: str
    file: Path
    found: str
    expected: str
    fix: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.file}: {self.found}, expected {self.expected}; {self.fix}"


@dataclass(frozen=True)
class Dataset:
    """A listed data set. `labels` None: nothing names them. `folds` None: to be assigned. `form`: one of the four."""

    path: Path
    form: Literal["nnunet", "decathlon", "plain", "list"]
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    labels: Labels | None = None
    region_values: tuple[int, ...] = ()
    folds: tuple[Fold, ...] | None = None
    problems: tuple[Problem, ...] = ()
    licence: str = "not stated by the data set"

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases one can train on."""
        return tuple(case for case in self.cases if case.label is not None)


def label_values(named: Mapping[Any, Any]) -> Labels:
    """Names with values, from a description in either order: liver: 1, whole: [1, 2], or the older "1": "liver".

    Whatever its name, 0 is the background. Raises `ValueError` naming a label whose value is no whole number (1, 1.0
    and "1" are), or which has two.
    """
    labels: Labels = {}
    for key, value in named.items():
        name, number = (value, key) if str(key).isdecimal() and isinstance(value, str) else (str(key), value)
        try:
            whole = tuple(map(_whole, number)) if isinstance(number, list | tuple) else _whole(number)
        except (TypeError, ValueError) as error:
            raise ValueError(f"label {name!r} has value {number!r}, expected a whole number or a list") from error
        if whole == 0:
            name = BACKGROUND
        if labels.setdefault(name, whole) != whole:
            raise ValueError(f"label {name!r} has value {labels[name]!r} and value {whole!r}, expected one")
    return labels


def _whole(number: Any) -> int:
    """1 for 1, 1.0 and "1". Raises `ValueError` for 1.9, which `int` cuts, and for true."""
    if isinstance(number, bool) or (isinstance(number, float) and not number.is_integer()):
        raise ValueError(f"{number} is no whole number")
    return int(number)


def spread_evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the `items` at equal distances from the first to the last; all where there are no more."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def assign_folds(cases: Sequence[Case], *, folds: int, seed: int = 0) -> tuple[Fold, ...]:
    """Splits `cases` into `folds` of nearly equal size; cases of one group stay together.

    The same cases and seed give the same folds on any machine: groups are ordered by SHA-256 of seed and name, large
    ones first, and each goes to the smallest fold. Raises `ConfigError` for fewer groups than folds.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        groups[case.group].append(case.id)
    if folds < 2 or folds > len(groups):
        most = len(groups)
        fitting = f"ask for --folds 2{f' to {most}' if most > 2 else ''}" if most > 1 else "add other patients"
        raise ConfigError(
            f"{folds} folds asked for {most} groups (patients), expected at least 2 folds and no more than groups; "
            f"{fitting}, or train on all of them (medseg train --fold all)"
        )

    def order(group: str) -> tuple[int, str]:
        # names of files may be bytes that are no UTF-8
        return -len(groups[group]), hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogateescape")).hexdigest()

    members: list[list[str]] = [[] for _ in range(folds)]
    for group in sorted(groups, key=order):
        min(members, key=len).extend(groups[group])
    everyone = sorted(case.id for case in cases)
    return tuple(Fold(tuple(c for c in everyone if c not in set(val)), tuple(sorted(val))) for val in members)


def fold_split(
    dataset: Dataset, fold: int | Literal["all"], *, folds: int = 5, seed: int = 0
) -> tuple[list[Case], list[Case]]:
    """Cases to train on and to validate on; `all` holds nothing back. Folds that the data set gives win.

    Raises `ConfigError` for a fold that is not there, or too few groups.
    """
    labelled = {case.id: case for case in dataset.labelled}
    if fold == "all":
        return list(labelled.values()), []
    known = dataset.folds or assign_folds(dataset.labelled, folds=folds, seed=seed)
    if not 0 <= fold < len(known):
        raise ConfigError(f"fold {fold} asked, expected 0 to {len(known) - 1} or all; {dataset.path} has {len(known)}")
    train = [labelled[c] for c in known[fold].train if c in labelled]
    validation = [labelled[c] for c in known[fold].val if c in labelled]
    if not train or not validation:
        raise ConfigError(
            f"fold {fold} of {dataset.path} has {len(train)} labelled cases to train on and {len(validation)} to "
            "validate on, expected some of each; correct the split, or train on all (medseg train --fold all)"
        )
    return train, validation


def infer_inputs(inputs: Iterable[Path], *, channels: int, series: SeriesOptions | None = None) -> list[Case]:
    """Cases in files and folders: not in their subfolders, unless these hold DICOM files: then one for each series.

    Files CASE_0000, CASE_0001, … of one folder are channels of CASE where no number of that name is beyond `channels`,
    and not several of them are pictures in colour, which hold three themselves; for a single channel, where every file
    of the folder ends in _0000. What is given twice, in whatever spelling, is taken once, as it was spelled first. A
    series has the name of its folder, archive or file, never of what is in it. Raises `ConfigError` where nothing is
    found, a folder holds slices and volumes side by side, or two inputs would share a name.
    """
    by_folder: dict[Path, dict[str, Path]] = {}
    dicom: dict[Path, Path] = {}
    for path in inputs:
        if reason := why_absent(path):
            raise ConfigError(f"{path}: {reason}; check the path")
        found = _input_files(path)
        if not found:
            folders = [path / name for name in IMAGE_FOLDERS if os.path.isdir(path / name)]
            inside = next((f"; give {folder}" for folder in folders if images_in(folder)), "")
            raise ConfigError(
                f"{path}: no image found, expected DICOM or a file ending in {', '.join(ENDINGS)}{inside}"
            )
        for file in found:
            if not is_image_file(file) or os.path.isdir(file):
                dicom.setdefault(file.resolve(), file)
                continue
            # the file itself is not resolved: links of two names to one file are two cases, or two channels
            by_folder.setdefault(file.parent.resolve(), {}).setdefault(file.name, file)
    by_name: dict[str, dict[object, Case]] = {}
    for files in by_folder.values():
        for name, images in _by_case(list(files.values()), channels):
            key = tuple(os.path.realpath(image) for image in images)
            by_name.setdefault(name, {}).setdefault(key, Case(name, images, None, name))
    for case in _dicom_cases(list(dicom.values()), series or SeriesOptions()):
        by_name.setdefault(case.id, {}).setdefault((case.images, case.series), case)
    if not by_name:
        wanted = series.uid if series is not None else None
        raise ConfigError(f"no series {wanted} in the inputs" if wanted else "no input given; give files or folders")
    _refuse_clashes({name: [case.images for case in found.values()] for name, found in by_name.items()})
    return [next(iter(found.values())) for found in by_name.values()]


def refuse_among(read: Iterable[Path], folder: Path, *, written: str) -> None:
    """Raises `ConfigError` where `folder`, of an output, is one of those that are `read`.

    `written` would be lost there, and who removes it later would remove both.
    """
    if folder.resolve() in {path.resolve() for path in read}:
        raise ConfigError(
            f"{folder}: images or labels are there, among which {written} would be lost; choose another -o"
        )


def refuse_image_name(folder: Path, *, written: str) -> None:
    """Raises `ConfigError` where a `folder` that is not there yet is called as an image."""
    ending = split_ending(folder.name)[1]
    if ending and not folder.is_dir():
        raise ConfigError(f"{folder}: is called as an image, expected a folder for {written}; give it without {ending}")


def dicom_cases(path: Path) -> list[Case]:
    """One case for each DICOM series in a folder, archive or file, named as `infer_inputs` does; none for other data.

    `series` is None where files cannot be read or are no images: reading such a case says why. Raises `ConfigError`
    where a folder holds other images too.
    """
    return _dicom_cases([f for f in _input_files(path) if os.path.isdir(f) or not is_image_file(f)], SeriesOptions())


def images_in(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name. Raises `DataError` where it cannot be listed."""
    try:
        # a link to what is not there is a case that cannot be read, and no folder
        return sorted(f for f in folder.iterdir() if is_image_file(f) and not os.path.isdir(f))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check the permissions") from error


def _input_files(path: Path) -> list[Path]:
    if os.path.isfile(path):
        return [path] if is_image_file(path) or _is_dicom(path) else []
    images = images_in(path)
    volumes = [file for file in images if not is_picture(file)]
    inside = sorted(f for f in path.iterdir() if not f.name.startswith("."))
    slices = [f for f in inside if f not in volumes and os.path.isfile(f) and not is_archive(f) and _is_dicom(f)]
    if volumes and slices:
        raise ConfigError(
            f"{path}: DICOM files ({len(slices)}, such as {slices[0].name}) and other images ({len(volumes)}, such as "
            f"{volumes[0].name}) found in one folder, expected one kind; give the files of one kind by their names, or "
            "move the others to a folder of their own"
        )
    if volumes:
        return images
    # scans come with pictures of themselves
    if slices:
        return [path]
    if images:
        return images
    return [f for f in inside if (os.path.isdir(f) or is_archive(f)) and _is_dicom(f)]


def _is_dicom(path: Path) -> bool:
    try:
        return holds_dicom(path)
    except DataError as error:
        # a broken archive, a folder that is closed: told when the case is read, so that it costs no other
        log.info("%s", error)
        return True


def _dicom_cases(sources: Sequence[Path], options: SeriesOptions) -> list[Case]:
    """Cases of the series in folders, archives and files; files of one folder are taken together."""
    files: dict[Path, list[Path]] = defaultdict(list)
    for source in sources:
        if source.is_file() and not is_archive(source):
            files[source.parent].append(source)
    cases = []
    for source in sources:
        if source.is_dir() or is_archive(source):
            cases += _series_cases(source, (), options)
    for folder, some in files.items():
        cases += _series_cases(some[0] if len(some) == 1 else folder, some, options)
    return cases


def _series_cases(source: Path, only: Sequence[Path], options: SeriesOptions) -> list[Case]:
    name = _stem(source)
    try:
        found = find_series(source, only)
    except DataError as error:
        # told when the case is read, so that it costs no other
        log.info("%s", error)
        return [Case(name, (source,), None, name)]
    if found.unreadable_for(options.uid) or not found.series:
        return [Case(name, (source,), None, name)]
    names = _series_names(found, name)
    return [
        Case(name, (source,), None, name, series=replace(series, options=options))
        for name, series in zip(names, found.series)
        if options.uid in (None, series.key)
    ]


def _series_names(found: Found, name: str) -> list[str]:
    """A name for each series: of its folder where it has that for itself, else with digits made of its UID."""
    if len(found.series) == 1:
        return [name]
    folders = [series.folder.resolve() for series in found.series]
    alone = [
        folder != found.source.resolve()
        and not any(folder == o or folder in o.parents for o in [*folders[:n], *folders[n + 1 :]])
        for n, folder in enumerate(folders)
    ]
    plain = [folder.name if own else name for folder, own in zip(folders, alone)]
    return [
        base if own and plain.count(base) == 1 else f"{base}-{series.digits}"
        for base, own, series in zip(plain, alone, found.series)
    ]


def _refuse_clashes(inputs: Mapping[str, Sequence[tuple[Path, ...]]]) -> None:
    clashes = []
    for name, found in inputs.items():
        if len(found) == 2:
            clashes.append(f"{found[0][0]} and {found[1][0]} would both become case {name}")
        elif len(found) > 2:
            clashes.append(f"{found[0][0]}, {found[1][0]} and {len(found) - 2} more would all become case {name}")
    if len(clashes) == 1:
        raise ConfigError(f"{clashes[0]}; rename all but one, or run apart")
    if clashes:
        rest = f"; and {len(clashes) - MOST_CLASHES} more names" if len(clashes) > MOST_CLASHES else ""
        raise ConfigError(
            f"{len(clashes)} names are shared by several inputs: {'; '.join(clashes[:MOST_CLASHES])}{rest}; "
            "rename the files, or run the folders apart"
        )


def _by_case(files: Sequence[Path], channels: int) -> list[tuple[str, tuple[Path, ...]]]:
    """Case names and files of one folder; a name is there twice where two files share it."""
    stems = {file: _stem(file) for file in files}
    numbered: dict[str, dict[Path, int]] = defaultdict(dict)
    plain: set[str] = set()
    for file, stem in sorted(stems.items(), key=lambda item: item[0].name):
        match = CHANNEL_SUFFIX.fullmatch(stem)
        if match is None:
            plain.add(stem)
        else:
            numbered[match[1]][file] = int(match[2])

    def belongs(name: str, found: Mapping[Path, int]) -> bool:
        # where all are numbered, one that lacks a channel is a case that fails; beside others it may be no channel at
        # all, but that the first alone may hold every channel
        whole = len(found) == channels or not plain or (set(found.values()) == {0} and name not in plain)
        return whole and _are_channels(found, channels)

    joined = {name: tuple(found) for name, found in numbered.items() if belongs(name, found)}
    taken = {file for found in joined.values() for file in found}
    alone = [(stem, (file,)) for file, stem in stems.items() if file not in taken]
    # where there is one channel to each, a number is a part of the name unless all have it
    if alone and channels == 1:
        return [(stem, (file,)) for file, stem in stems.items()]
    return [*joined.items(), *alone]


def _are_channels(numbers: Mapping[Path, int], channels: int) -> bool:
    """Whether the files of one name can be the channels of one case."""
    if len(set(numbers.values())) < len(numbers) or max(numbers.values()) >= channels:
        return False
    # a picture in colour holds the three itself: what is numbered are frames
    return not (channels == COLOURS and len(numbers) > 1 and any(map(holds_colour, numbers)))


def _stem(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    stem, ending = split_ending(path.name)
    # names of DICOM files are often UIDs: what follows their last dot is no ending
    return stem if ending else path.stem if path.suffix.lower() in (*DICOM_ENDINGS, ".zip") else path.name
