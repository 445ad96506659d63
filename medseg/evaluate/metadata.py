"""A table beside the data: the subgroups of each case and which cases are of one patient; nothing is measured."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medseg.cases import GROUP_COLUMNS
from medseg.errors import DataError
from medseg.evaluate.pairs import case_name, counted, named, printable

CASE = "case"
# capitals and signs do not matter
_BARE_GROUP_COLUMNS = tuple(name.replace("_", "") for name in GROUP_COLUMNS)
NO_VALUE = "(none)"
MOST_VALUES = 12
"""Of more distinct texts a column is no subgroup."""
MOST_NUMBERS = 6
"""Of more distinct numbers a column is cut into bands."""
# names of columns, without signs and capitals, whose values say who somebody is
_IDENTIFYING = re.compile(
    r"(full|first|last|sur|family|given|patient|subject|person)?names?|initials|dob|birth(date|day)|(date|day)ofbirth|"
    r"mrn|.*recordn(o|r|umber)|accession.*|ssn|socialsecurity.*|e?mail.*|(tele)?phone.*|(street|home)?address|"
    r"(case|study|series|patient|subject|person)?id|.*uid"
)
_DATE = re.compile(r"(19|20)\d\d[-/.]?[01]\d[-/.]?[0-3]\d([ T].*)?|[0-3]?\d[-/.][0-3]?\d[-/.](19|20)?\d\d([ T].*)?")
_EMPTY = frozenset({"", "na", "n/a", "nan", "null", "none", NO_VALUE})
_AGE = re.compile(r"age([ _(].*)?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")


@dataclass(frozen=True)
class Metadata:
    """What a table says of the cases.

    `table`: one row per case (the index), one column of ordered categories per subgroup. `patients` maps each case to
    the first case of its patient, so that no name of a patient goes further; None where no column names patients.
    """

    table: pd.DataFrame
    patients: Mapping[str, str] | None
    warnings: tuple[str, ...]


def read_metadata(path: Path, cases: Sequence[str], *, group: str | None = None) -> Metadata:
    """Subgroups and patients of `cases` from a CSV file with a column `case` (file names with an ending will do).

    Separators: comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252. `group` is the column that names patients; left
    out, one called group, patient, subject, patient_id or subject_id. Numbers of more than 6 distinct values become
    bands: decades in a column `age`, else between the quartiles. Columns of more than 12 distinct texts, or of another
    text for every case, are no subgroups. Raises `DataError` for a file that cannot be used so.
    """
    sheet = _read(path)
    rows = _by_case(path, sheet, cases)
    warnings = _of_other_cases(path, sheet, rows, cases)
    patient = _patient_column(path, sheet.columns, group)
    left_out = {sheet.case_column, patient, *(c for c in sheet.columns if _bare(c) in _BARE_GROUP_COLUMNS)}
    table = pd.DataFrame(index=pd.Index(list(cases), name=CASE, dtype=object))
    for column in sheet.columns:
        if column in left_out:
            continue
        values = [_filled(rows.get(case, {}).get(column, "")) for case in cases]
        reason = _identifies(column, values) or _no_subgroup(values, sheet.decimal_comma)
        if reason:
            warnings.append(f"column {column!r} of {path.name} gives no subgroups: {reason}")
        else:
            table[column] = _categories(column, values, sheet.decimal_comma)
    patients = None
    if patient is not None:
        patients = called_by_case({case: _filled(rows.get(case, {}).get(patient, "")) for case in cases}, cases)
        warnings.append(
            f"column {patient!r} of {path.name} names patients: intervals are those of {len(set(patients.values()))} "
            f"patients with {len(cases)} cases"
        )
    return Metadata(table, patients, tuple(warnings))


def called_by_case(patients: Mapping[str, str | None], cases: Iterable[str]) -> dict[str, str]:
    """Each of `cases` with the first case of its patient: no name of a patient goes further.

    A case that `patients` does not hold, or with None, is a patient of its own.
    """
    first: dict[str, str] = {}
    called = {}
    for case in cases:
        patient = patients.get(case)
        called[case] = case if patient is None else first.setdefault(patient, case)
    return called


@dataclass(frozen=True)
class _Sheet:
    """A CSV file: its columns, which of them names the case, its rows with the number of their line."""

    columns: tuple[str, ...]
    case_column: str
    rows: tuple[tuple[int, Mapping[str, str]], ...]
    decimal_comma: bool


def _read(path: Path) -> _Sheet:
    try:
        text = _decoded(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r"sep=(.)\r?", first, re.IGNORECASE)
    delimiter = told[1] if told else _delimiter(first)
    lines = csv.reader(io.StringIO(rest if told else text, newline=""), delimiter=delimiter, strict=True)
    try:
        filled = [
            (lines.line_num, [printable(field.strip()) for field in line])
            for line in lines
            if any(map(str.strip, line))
        ]
    except csv.Error as error:
        raise DataError(f"{path}: line {lines.line_num} is no CSV ({error}); export it again") from error
    columns = filled[0][1] if filled else []
    names = [c for c in columns if c.lower() == CASE]
    if len(names) != 1:
        raise DataError(
            f"{path}: {named(columns) or 'nothing'} found in the first line, expected a column called `case` with "
            "the names of the cases; rename it"
        )
    twice = sorted({c for c in columns if c and columns.count(c) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} found twice, expected each once; rename one")
    for number, line in filled[1:]:
        if len(line) > len(columns) and any(line[len(columns) :]):
            raise DataError(f"{path}: line {number} has {len(line)} fields, expected {len(columns)} as in the first")
        # what a spreadsheet leaves out at the end of a line is empty
        if len(line) <= columns.index(names[0]):
            raise DataError(
                f"{path}: line {number} has {counted(len(line), 'field')} and names no case, expected {len(columns)} "
                "as in the first; complete it or take it out"
            )
    rows = tuple((number, dict(zip(columns, line))) for number, line in filled[1:])
    return _Sheet(tuple(c for c in columns if c), names[0], rows, decimal_comma=delimiter != ",")


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        # what Excel writes in western Europe; five of its codes are none
        return content.decode("cp1252", errors="replace")


def _delimiter(line: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", line)
    return max(",;\t", key=unquoted.count)


def _by_case(path: Path, sheet: _Sheet, cases: Sequence[str]) -> dict[str, Mapping[str, str]]:
    known = set(cases)
    rows: dict[str, Mapping[str, str]] = {}
    lines: dict[str, int] = {}
    for number, row in sheet.rows:
        whole = unicodedata.normalize("NFC", row[sheet.case_column])
        case = whole if whole in known else case_name(whole)
        if case in rows:
            raise DataError(f"{path}: case {case!r} found in lines {lines[case]} and {number}, expected once; keep one")
        rows[case], lines[case] = row, number
    return rows


def _of_other_cases(path: Path, sheet: _Sheet, rows: Mapping[str, object], cases: Sequence[str]) -> list[str]:
    absent = [case for case in cases if case not in rows]
    if len(absent) == len(cases):
        raise DataError(
            f"{path}: none of the {len(cases)} cases found in column {sheet.case_column!r}, expected names as those of "
            f"the references: {named(absent)}"
        )
    others = len(rows) - (len(cases) - len(absent))
    warnings = []
    if absent:
        warnings.append(f"{len(absent)} cases are not in {path.name}: {named(absent)}")
    if others:
        # not by name: whom else the table knows is nobody's business
        warnings.append(f"{others} of {len(rows)} cases in {path.name} are not among those evaluated and were ignored")
    return warnings


def _patient_column(path: Path, columns: Sequence[str], wanted: str | None) -> str | None:
    if wanted is not None:
        found = [c for c in columns if c == wanted] or [c for c in columns if c.lower() == wanted.lower()]
        if not found:
            raise DataError(f"{path}: no column {wanted!r} found, expected one of {', '.join(columns)}")
        return found[0]
    by_name = {_bare(column): column for column in reversed(columns)}
    return next((by_name[name] for name in _BARE_GROUP_COLUMNS if name in by_name), None)


def _bare(column: str) -> str:
    """The name of a column without capitals, spaces and signs: `Patient ID` and `patient_id` are one."""
    return "".join(c for c in column.lower() if c.isalnum())


def _filled(text: str) -> str | None:
    return None if text.lower() in _EMPTY else text


def _identifies(column: str, values: Sequence[str | None]) -> str:
    """Why a column could tell who somebody is; empty where nothing says so."""
    given = [value for value in values if value is not None]
    if _IDENTIFYING.fullmatch(_bare(column)):
        return "by its name it says who somebody is"
    if given and all(_DATE.fullmatch(value) for value in given):
        return "it holds dates, which can say who somebody is; give years or ages"
    return ""


def _no_subgroup(values: Sequence[str | None], decimal_comma: bool) -> str:
    """Why a column is none; empty where it is one."""
    given = [value for value in values if value is not None]
    distinct = set(given)
    if not given:
        return "it is empty for all cases"
    if _numbers(given, decimal_comma) is not None:
        return ""
    if len(distinct) > MOST_VALUES:
        return f"it has {len(distinct)} different texts, more than {MOST_VALUES}"
    if len(distinct) == len(given) > 1:
        return "its text is another one for every case"
    return ""


def _categories(column: str, values: Sequence[str | None], decimal_comma: bool) -> pd.Categorical[str]:
    given = [value for value in values if value is not None]
    numbers = _numbers(given, decimal_comma)
    if numbers is None:
        texts, order = dict(zip(given, given)), sorted(set(given))
    else:
        names = _bands(column, numbers)
        texts = {text: names[number] for text, number in zip(given, numbers)}
        order = list(dict.fromkeys(names[number] for number in sorted(names)))
    chosen = [NO_VALUE if value is None else texts[value] for value in values]
    return pd.Categorical(chosen, categories=[*order, *([NO_VALUE] if None in values else [])], ordered=True)


def _numbers(texts: Iterable[str], decimal_comma: bool) -> list[float] | None:
    numbers = []
    for text in texts:
        try:
            number = float(text.replace(",", ".") if decimal_comma and _DECIMAL_COMMA.fullmatch(text) else text)
        except ValueError:
            return None
        if not math.isfinite(number):
            return None
        numbers.append(number)
    return numbers


def _bands(column: str, numbers: Sequence[float]) -> dict[float, str]:
    """The name of the band of each number: low edges belong to a band, high ones to the next."""
    if _AGE.fullmatch(column):
        starts = {number: math.floor(number / 10) * 10 for number in numbers}
        return {number: f"{start} to under {start + 10}" for number, start in starts.items()}
    if len(set(numbers)) <= MOST_NUMBERS:
        # all digits: numbers that differ stay apart
        return {number: f"{number:.15g}" for number in numbers}
    # edges are rounded as they are shown, so that what is shown is what was done
    edges = sorted({float(f"{edge:.4g}") for edge in np.quantile(numbers, (0.25, 0.5, 0.75))})
    names = [
        f"under {edges[0]:g}",
        *(f"{low:g} to under {high:g}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} or more",
    ]
    return {number: names[int(np.searchsorted(edges, number, side="right"))] for number in numbers}
