"""The four forms a data set may have on disk, listed and paired; what they consist of is in cases.py."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medseg.cases import CHANNEL_SUFFIX, GROUP_COLUMNS, Case, Dataset, Fold, Labels, Problem, images_in, label_values
from medseg.errors import DataError
from medseg.readers import ENDINGS, is_picture, split_ending, why_absent
from medseg.readers.dicom_files import holds_dicom

log = logging.getLogger(__name__)

FORMS = """a data set is one of:
  1. nnU-Net folder: imagesTr/CASE_0000.EXT, labelsTr/CASE.EXT, dataset.json
  2. Decathlon folder: dataset.json with training: [{image, label}]
  3. plain folder: images/ and labels/ with equal stems
  4. CSV or JSON list: columns case,image[,image2...],label[,fold][,group or patient]"""


_IMAGE_COLUMN = re.compile(r"image\d*")
COLUMNS = ("case", "label", "fold")


def read_dataset(path: Path) -> Dataset:
    """Lists the data set at `path`, a folder or a list, in whichever of the four forms it has.

    Files without their partner are in `problems`; where these are errors, not one case may be left. Raises `DataError`
    where the form is none of the four, a description cannot be understood, or nothing is there.
    """
    try:
        dataset = _read_any(path)
    except OSError as error:
        where = error.filename or path
        raise DataError(f"{where}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not dataset.cases and not any(problem.severity == "error" for problem in dataset.problems):
        problems = "".join(f"\n  {problem}" for problem in dataset.problems[:5])
        raise DataError(f"{path}: no case found; {FORMS}\nknown endings: {', '.join(ENDINGS)}{problems}")
    counts = Counter(case.id for case in dataset.cases)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        files = [str(case.images[0]) for case in dataset.cases if case.id == twice[0]]
        raise DataError(f"{path}: case {twice[0]} is there {counts[twice[0]]} times ({', '.join(files)}); rename one")
    return _with_fold_column(dataset) if dataset.folds is None else dataset


def _read_any(path: Path) -> Dataset:
    if reason := why_absent(path):
        raise DataError(f"{path}: {reason}; {FORMS}")
    if path.is_file():
        if path.name == "dataset.json":
            return _read_any(path.parent)
        if path.suffix.lower() == ".csv":
            return _from_list(path, _csv_rows(path))
        if path.suffix.lower() == ".json":
            content = _json(path)
            if isinstance(content, dict) and isinstance(content.get("training"), list):
                return _from_decathlon(path, content)
            return _from_list(path, _json_rows(path, content))
        raise DataError(f"{path}: a single {path.suffix or 'nameless'} file found; {FORMS}")
    description = path / "dataset.json"
    if description.is_file():
        content = _json(description)
        if not isinstance(content, dict):
            raise DataError(f"{description}: a {type(content).__name__} found, expected an object with labels")
        if _is_decathlon(path, content):
            return _from_decathlon(description, content)
        return _from_nnunet(path, content)
    if (path / "images").is_dir() and (path / "labels").is_dir():
        return _from_plain(path)
    wanted = ("dataset.json", "imagesTr", "labelsTr", "images", "labels")
    there = [name for name in wanted if (path / name).exists()]
    raise DataError(
        f"{path}: {' and '.join(there) or 'none of ' + ', '.join(wanted)} found, "
        f"missing {', '.join(name for name in wanted if name not in there)}; {FORMS}"
    )


def _is_decathlon(path: Path, content: Mapping[str, Any]) -> bool:
    # the first nnU-Net listed names without channel number, of files that do not exist as such
    entries = content.get("training")
    if not isinstance(entries, list) or not entries:
        return False
    names = [name for entry in entries if isinstance(entry, dict) for name in _names(entry.get("image"))]
    there = sum(not _why_no_file(path / name) for name in names)
    # one that was forgotten among files with channel numbers makes no Decathlon of them
    numbered = sum(not _why_no_file(path / _with_channel(name)) for name in names)
    return not (path / "imagesTr").is_dir() or there >= max(1, numbered)


def _with_channel(name: str) -> str:
    """What nnU-Net calls the first channel of an image that a list names without."""
    stem, ending = split_ending(name)
    return f"{stem}_0000{ending}"


def _names(image: Any) -> list[str]:
    """The files of an entry: one, several, or none."""
    return [str(name) for name in (image if isinstance(image, list) else [image]) if name]


def _from_nnunet(path: Path, content: Mapping[str, Any]) -> Dataset:
    channels = _channels(path / "dataset.json", content)
    for name in ("imagesTr", "labelsTr"):
        if not (path / name).is_dir():
            raise DataError(f"{path}: folder {name} is missing; {FORMS}")
    ending = str(content.get("file_ending", ""))
    problems = _dicom_folders(path / "imagesTr")
    images: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in _of_ending(path / "imagesTr", ending, problems):
        match = CHANNEL_SUFFIX.fullmatch(_stem(file))
        if match is None or int(match[2]) >= len(channels):
            expected = f"a channel number _0000 to _{len(channels) - 1:04d} at the end of the name"
            problems.append(Problem(file.name, file, "no such channel", expected, "rename or remove it"))
        elif int(match[2]) in images[match[1]]:
            problems.append(Problem(match[1], file, "the same channel twice", "one file per channel", "remove one"))
        else:
            images[match[1]][int(match[2])] = file
    labels = _labels_by_case(_of_ending(path / "labelsTr", ending, problems), problems)
    cases, more = _paired(images, labels, len(channels), path / "labelsTr")
    dataset = Dataset(
        path,
        "nnunet",
        cases,
        channels,
        _labels(path / "dataset.json", content),
        _region_values(path / "dataset.json", content),
        problems=(*problems, *more),
        licence=_licence(content),
    )
    splits = path / "splits_final.json"
    return _with_splits(dataset, splits) if splits.is_file() else dataset


def _from_decathlon(description: Path, content: Mapping[str, Any]) -> Dataset:
    root = description.parent
    cases: list[Case] = []
    problems: list[Problem] = []
    for number, entry in enumerate(content["training"]):
        if not isinstance(entry, dict) or "image" not in entry:
            found = f"has {', '.join(entry) or 'nothing'}" if isinstance(entry, dict) else f"is {entry!r}"
            raise DataError(f"{description}: training[{number}] {found}, expected an object with image and label")
        names = _names(entry["image"])
        stem = split_ending(Path(names[0]).name)[0] if names else ""
        row = {
            "case": stem or f"training[{number}]",
            "label": entry.get("label"),
            **{k: entry[k] for k in ("fold", "group") if k in entry},
        }
        case, more = _case(root, description, row, names)
        problems += more
        cases += [case] if case is not None else []
    return Dataset(
        root,
        "decathlon",
        tuple(cases),
        _channels(description, content),
        _labels(description, content),
        _region_values(description, content),
        problems=tuple(problems),
        licence=_licence(content),
    )


def _from_plain(path: Path) -> Dataset:
    problems = _dicom_folders(path / "images")
    labels = _labels_by_case(images_in(path / "labels"), problems)
    images: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in images_in(path / "images"):
        stem = _stem(file)
        match = CHANNEL_SUFFIX.fullmatch(stem)
        # CASE_0001 is a channel only where the label says CASE
        by_channel = match is not None and stem not in labels and match[1] in labels
        case, channel = (match[1], int(match[2])) if match is not None and by_channel else (stem, 0)
        if channel in images[case]:
            twin = images[case][channel].name
            problems.append(Problem(case, file, f"a second image beside {twin}", "one per case", "remove one"))
        else:
            images[case][channel] = file
    count = 1 + max((max(found) for found in images.values()), default=0)
    cases, more = _paired(images, labels, count, path / "labels")
    names = ("image",) if count == 1 else tuple(f"image{n + 1}" for n in range(count))
    return Dataset(path, "plain", cases, names, problems=(*problems, *more))


def _from_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> Dataset:
    rows = _by_their_names(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    images = [c for c in columns if _IMAGE_COLUMN.fullmatch(c)]
    if "case" not in columns or not images:
        hint = "; separate the columns by commas" if any(";" in c or "\t" in c for c in columns) else ""
        raise DataError(
            f"{path}: columns {', '.join(columns) or 'none'} found, expected at least case and image{hint}; {FORMS}"
        )
    group = next((c for c in GROUP_COLUMNS if c in columns), None)
    unused = [c for c in columns if c not in (*COLUMNS, group, *images)]
    if unused:
        log.warning("%s: columns not used: %s", path, ", ".join(unused))
    cases: list[Case] = []
    problems: list[Problem] = []
    for row in rows:
        names = [str(row[c]) for c in images if row.get(c)]
        case, more = _case(path.parent, path, {**row, "group": row.get(group) if group else None}, names)
        problems += more
        cases += [case] if case is not None else []
        gaps = [c for c in images if not row.get(c)]
        if case is not None and gaps:
            found = f"nothing in column {', '.join(gaps)} of case {case.id}"
            problems.append(Problem(case.id, path, found, "an image for each channel", "name it, or drop the case"))
    return Dataset(path, "list", tuple(cases), tuple(images), problems=tuple(problems))


def _by_their_names(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with columns in small letters where only capitals keep them from a name that is known here."""
    columns = {key for row in rows for key in row}
    small = Counter(column.lower() for column in columns)
    known = (*COLUMNS, *GROUP_COLUMNS)
    names = {c: c.lower() for c in columns if c.lower() in known or _IMAGE_COLUMN.fullmatch(c.lower())}
    return [{names.get(c, c) if small[c.lower()] == 1 else c: value for c, value in row.items()} for row in rows]


def _case(root: Path, source: Path, row: Mapping[str, Any], names: Sequence[str]) -> tuple[Case | None, list[Problem]]:
    """The case of one row; without it where an image file is missing."""
    name = "" if row.get("case") is None else str(row["case"])
    if not name:
        # the rest of the row may tell whose it is
        raise DataError(f"{source}: a row without case name found (of {', '.join(names) or 'no image'}); name the case")
    if name in (".", "..") or "/" in name or "\\" in name:
        # names become file names: such a one would leave the output folder
        raise DataError(f"{source}: case name {name!r} found, expected one without / and \\; rename it")
    problems = []
    images = tuple(_placed(root, n) for n in names)
    for image in images:
        if reason := _why_no_file(image):
            problems.append(Problem(name, image, reason, "an image", _correction(image, source)))
    if not images or problems:
        return None, problems or [Problem(name, source, "no image", "a file", f"correct {source.name}")]
    label = _placed(root, str(row["label"])) if row.get("label") else None
    if label is None:
        problems.append(Problem(name, images[0], "an image without label", "a label", f"name one in {source.name}"))
    elif reason := _why_no_file(label):
        problems.append(Problem(name, label, reason, "a label map", _correction(label, source)))
        label = None
    fold = row.get("fold")
    try:
        number = None if fold is None or fold == "" else int(str(fold))
    except ValueError as error:
        raise DataError(f"{source}: fold {fold!r} of case {name} found, expected a whole number from 0") from error
    group = row.get("group")
    return Case(name, images, label, name if group in (None, "") else str(group), number), problems


def _placed(root: Path, name: str) -> Path:
    path = Path(name)
    try:
        return root / path.expanduser()
    except RuntimeError:
        # ~NAME of somebody who is not known here: there is no such file
        return root / path


def _why_no_file(path: Path) -> str:
    """What was found in place of a file; empty where one is there."""
    if reason := why_absent(path):
        return reason
    return "" if path.is_file() else "a folder of DICOM files" if _holds_dicom(path) else "a folder"


def _correction(path: Path, source: Path) -> str:
    """What to do in `source` about a path where no file is."""
    if _holds_dicom(path):
        return f"{_conversion(path)}, and name that file in {source.name}"
    return f"correct {source.name}"


def _dicom_folders(folder: Path) -> list[Problem]:
    """The first case of a plain or nnU-Net folder that is a folder of DICOM files."""
    inside = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    first = next((path for path in inside if _holds_dicom(path)), None)
    if first is None:
        return []
    found = f"a folder of DICOM files, one of {len(inside)} folders in {folder.name}"
    severity: Literal["error", "warning"] = "warning" if images_in(folder) else "error"
    return [Problem("", first, found, "a file for each case", _conversion(first), severity)]


def _conversion(series: Path) -> str:
    return f"make a file of it: {shlex.join(['medseg', 'convert', str(series), '-o', f'{series}.nii.gz'])}"


def _holds_dicom(path: Path) -> bool:
    try:
        return os.path.isdir(path) and holds_dicom(path)
    except DataError as error:
        # a folder that is closed does not tell what is in it
        log.info("%s", error)
        return False


def _of_ending(folder: Path, ending: str, problems: list[Problem]) -> list[Path]:
    """The image files that `file_ending` means, in whatever case; the others are told."""
    files = images_in(folder)
    others = [file for file in files if not file.name.lower().endswith(ending.lower())]
    if others:
        found = f"{len(others)} of {len(files)} files, this the first, of another ending: they are left out"
        fix = "convert them, or correct file_ending"
        problems.append(Problem("", others[0], found, f"{ending}, the file_ending of dataset.json", fix, "warning"))
    return [file for file in files if file.name.lower().endswith(ending.lower())]


def _stem(file: Path) -> str:
    # macOS and Linux spell accents in two ways
    return unicodedata.normalize("NFC", split_ending(file.name)[0])


def _labels_by_case(files: Sequence[Path], problems: list[Problem]) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    for file in files:
        stem = _stem(file)
        if stem in labels:
            problems.append(Problem(stem, file, f"a second label beside {labels[stem].name}", "one", "remove one"))
        labels.setdefault(stem, file)
    return labels


def _paired(
    images: Mapping[str, Mapping[int, Path]], labels: Mapping[str, Path], channels: int, label_folder: Path
) -> tuple[tuple[Case, ...], list[Problem]]:
    cases, problems = [], []
    for name in sorted(images):
        found = images[name]
        if not found:
            continue
        first = found[min(found)]
        # a picture holds its colours in one file
        whole = len(found) == channels or (list(found) == [0] and is_picture(first))
        if not whole:
            missing = ", ".join(f"{name}_{n:04d}" for n in range(channels) if n not in found)
            problems.append(Problem(name, first, f"{len(found)} of {channels} channels", missing, "add it"))
            continue
        if name not in labels:
            where = f"{label_folder.name}/{name}{split_ending(first.name)[1]}"
            problems.append(Problem(name, first, "an image without label", where, "add the label or remove the image"))
        cases.append(Case(name, tuple(found[n] for n in sorted(found)), labels.get(name), name))
    for name in sorted(set(labels) - {n for n in images if images[n]}):
        problems.append(
            Problem(
                name, labels[name], "a label without image", f"an image {name}", "add the image or remove the label"
            )
        )
    return tuple(cases), problems


# ---- folds that a data set brings


def _with_splits(dataset: Dataset, path: Path) -> Dataset:
    content = _json(path)
    known = {case.id: case for case in dataset.cases}
    try:
        folds = tuple(Fold(_cases_of(f["train"]), _cases_of(f["val"])) for f in content)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: not a list of {{train: [...], val: [...]}}; correct or remove it") from error
    if not folds:
        raise DataError(f"{path}: no fold found, expected at least one; correct or remove it")
    listed = {c for f in folds for c in (*f.train, *f.val)}
    strangers = sorted(listed - set(known))
    problems = [
        Problem(c, path, f"unknown case {c}", "cases of this data set", "correct the split", "warning")
        for c in strangers
    ]
    without = [case.id for case in dataset.labelled if case.id not in listed]
    if without:
        found = f"{len(without)} of {len(dataset.labelled)} cases, {without[0]} the first, are in no fold"
        fix = "complete the split, or train on them with --fold all"
        problems.append(Problem("", path, found, "every case in one", fix, "warning"))
    for number, fold in enumerate(folds):
        _refuse_repetition(path, number, fold)
        _refuse_leak(path, number, fold, known)
    kept = tuple(Fold(tuple(c for c in f.train if c in known), tuple(c for c in f.val if c in known)) for f in folds)
    return replace(dataset, folds=kept, problems=(*dataset.problems, *problems))


def _cases_of(names: Sequence[Any]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", str(name)) for name in names)


def _with_fold_column(dataset: Dataset) -> Dataset:
    numbers = {case.id: case.fold for case in dataset.cases if case.fold is not None}
    if not numbers:
        return dataset
    without = [case.id for case in dataset.cases if case.fold is None]
    if without:
        raise DataError(f"{dataset.path}: case {without[0]} has no fold but others have; give a fold to all or to none")
    used = set(numbers.values())
    if used != set(range(len(used))) or len(used) < 2:
        raise DataError(f"{dataset.path}: folds {sorted(used)} found, expected 0, 1, … without a gap, at least two")
    ids = [case.id for case in dataset.cases]
    folds = tuple(
        Fold(tuple(c for c in ids if numbers[c] != n), tuple(c for c in ids if numbers[c] == n))
        for n in range(len(used))
    )
    known = {case.id: case for case in dataset.cases}
    for number, fold in enumerate(folds):
        _refuse_leak(dataset.path, number, fold, known)
    return replace(dataset, folds=folds)


def _refuse_repetition(path: Path, number: int, fold: Fold) -> None:
    for part, names in (("train", fold.train), ("val", fold.val)):
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise DataError(
                f"{path}: fold {number} names {repeated[0]} more than once in {part}, expected once; correct the split"
            )


def _refuse_leak(path: Path, number: int, fold: Fold, known: Mapping[str, Case]) -> None:
    train = {known[c].group: c for c in fold.train if c in known}
    for name in fold.val:
        if name in known and known[name].group in train:
            raise DataError(
                f"{path}: fold {number} trains on {train[known[name].group]} and validates on {name}, which are of one "
                "group; keep a group in one fold"
            )


# ---- descriptions and lists


def _channels(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    named = content.get("channel_names") or content.get("modality")
    if named is None:
        return ("image",)
    if isinstance(named, dict):
        keys = sorted(named, key=lambda k: int(k) if str(k).isdigit() else -1)
        if [str(k) for k in keys] == [str(n) for n in range(len(keys))] and keys:
            return tuple(str(named[k]) for k in keys)
    raise DataError(f'{path}: channel_names {named!r} found, expected {{"0": "name", "1": …}}')


def _labels(path: Path, content: Mapping[str, Any]) -> Labels | None:
    named = content.get("labels")
    if named is None:
        return None
    if not isinstance(named, dict):
        raise DataError(f"{path}: labels {named!r} found, expected names with values")
    try:
        return label_values(named)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _region_values(path: Path, content: Mapping[str, Any]) -> tuple[int, ...]:
    values = content.get("regions_class_order", [])
    if not isinstance(values, list) or not all(isinstance(v, int) for v in values):
        raise DataError(f"{path}: regions_class_order {values!r} found, expected a list of whole numbers")
    return tuple(values)


def _licence(content: Mapping[str, Any]) -> str:
    return str(content.get("licence") or content.get("license") or "not stated by the data set")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); correct the file") from error


def _csv_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            filled = [
                (lines.line_num, [field.strip() for field in line]) for line in lines if any(map(str.strip, line))
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV ({error}); save it as UTF-8 with commas") from error
    columns = filled[0][1] if filled else []
    if len(filled) == 1:
        raise DataError(f"{path}: no case below the header found, expected a row for each; add them")
    twice = [column for column, count in Counter(columns).items() if column and count > 1]
    if twice:
        raise DataError(
            f"{path}: column {twice[0]!r} found twice, expected each once; rename one (channels: image, image2, …)"
        )
    for number, line in filled[1:]:
        # a comma at the end of a line is no field
        if len(line) < len(columns) or any(line[len(columns) :]):
            raise DataError(
                f"{path}: line {number} has {len(line)} fields, expected {len(columns)} as in the first; correct it"
            )
        if any(field for column, field in zip(columns, line) if not column):
            raise DataError(f"{path}: line {number} has a field in a column without a name; name the column")
    return [{column: field for column, field in zip(columns, line) if column} for _, line in filled[1:]]


def _json_rows(path: Path, content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path}: neither a list of objects nor a description with training found; {FORMS}")
    return content
