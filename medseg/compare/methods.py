"""The methods of a comparison, each read from the report that it left; nothing is compared here."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from medseg.errors import ConfigError, DataError
from medseg.evaluate.pairs import case_name

ID_COLUMNS = ("case", "label", "name", "status")
COUNTS = ("tp", "fp", "fn")
STATUSES = ("ok", "both_empty", "missed", "spurious", "missing_prediction")
# of the columns of metrics.csv those that a comparison cannot do without
NEEDED = (*ID_COLUMNS, *COUNTS, "dice")
_NNUNET_COUNTS = ("TP", "FP", "FN")


@dataclass(frozen=True)
class Settings:
    """How a method was judged. `tolerance_mm`: that of the NSD, one for all labels or one by label name."""

    surface: str
    tolerance_mm: float | Mapping[str, float]
    ignore_value: int | None

    def tolerance_of(self, label: str) -> float | None:
        """The tolerance of a label in mm; None where the report tells none."""
        return self.tolerance_mm.get(label) if isinstance(self.tolerance_mm, Mapping) else self.tolerance_mm


@dataclass(frozen=True, eq=False)
class Method:
    """What one method achieved.

    `table`: one row per case and label in the columns of metrics.csv; what was not measured is not there.
    `named`: labels have names, not only values. `failed`: cases that could not be evaluated. `groups`: case →
    patient, or None. `definitions`: term → text, empty where the report tells none. `settings`: None where the report
    does not tell them (nnU-Net's, and those of the first version).
    """

    name: str
    source: Path
    kind: str
    table: pd.DataFrame
    named: bool
    failed: tuple[str, ...] = ()
    groups: Mapping[str, str] | None = None
    definitions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int | None = None
    settings: Settings | None = None


def read_methods(reports: Sequence[Path | str] | Mapping[str, Path | str]) -> list[Method]:
    """Read every report; of a list, `NAME=FOLDER` gives a name, else the folder does. Names are made unique.

    Raises `ConfigError` for fewer than two reports or a name given twice, `DataError` for what is no report.
    """
    if isinstance(reports, str | Path):
        # a text is a sequence too: of letters
        reports = [reports]
    if isinstance(reports, Mapping):
        given: list[tuple[str | None, Path]] = [(str(name), Path(path)) for name, path in reports.items()]
    else:
        given = [_split_name(report) for report in reports]
    if len(given) < 2:
        found = "1 report" if given else "no report"
        raise ConfigError(f"{found} given, expected two or more: medseg compare REPORT_A REPORT_B -o DIR")
    return [_read(name, path) for name, path in zip(_names(given), [path for _, path in given])]


def _split_name(report: Path | str) -> tuple[str | None, Path]:
    text = str(report)
    # a folder may have = in its name
    if isinstance(report, Path) or "=" not in text or Path(text).exists():
        return None, Path(text)
    name, _, path = text.partition("=")
    if not name.strip() or not path:
        raise ConfigError(f"{text}: expected NAME=FOLDER or the folder of a report")
    return name.strip(), Path(path)


def _names(given: Sequence[tuple[str | None, Path]]) -> list[str]:
    chosen = [name for name, _ in given if name is not None]
    for name, times in Counter(chosen).items():
        if times > 1:
            raise ConfigError(f"{times} reports are called {name!r}; give each a name of its own, NAME=FOLDER")
    parts = [list(_folder(path).parts) for _, path in given]
    # runs/a/report and runs/b/report are a and b
    while len({tuple(p) for p in parts}) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    last = Counter(p[-1] for p in parts)
    names: list[str] = []
    for (called, _), own in zip(given, parts):
        text = called or (own[-1] if last[own[-1]] == 1 else "/".join(own[-2:]))
        taken, number = {*names, *(chosen if called is None else ())}, 2
        unique = text
        while unique in taken:
            unique, number = f"{text} ({number})", number + 1
        names.append(unique)
    return names


def _folder(path: Path) -> Path:
    whole = path.resolve()
    return whole.parent if whole.suffix == ".json" else whole


def _read(name: str, path: Path) -> Method:
    file = path if path.suffix == ".json" and not path.is_dir() else path / "summary.json"
    if not file.is_file():
        raise DataError(
            f"{path}: no report found, expected a folder that `medseg evaluate` wrote (metrics.csv and summary.json), "
            "or nnU-Net's summary.json"
        )
    summary = _read_json(file)
    if isinstance(summary, dict) and "metric_per_case" in summary:
        return _from_nnunet(name, file, summary["metric_per_case"])
    if not isinstance(summary, dict) or not isinstance(summary.get("schema_version"), int):
        raise DataError(f"{file}: no schema_version found, expected the summary of a report; run `medseg evaluate`")
    if "comparisons" in summary:
        raise DataError(f"{file}: a comparison found, expected a report; give the folders that `medseg evaluate` wrote")
    groups = summary.get("groups")
    if groups is not None and not isinstance(groups, dict):
        raise DataError(f"{file}: groups of {type(groups).__name__} found, expected case → patient; evaluate again")
    definitions = summary.get("definitions")
    table = _read_table(file.parent / "metrics.csv")
    return Method(
        name=name,
        source=file.parent,
        kind="medseg",
        table=table,
        named=bool((table["name"] != table["label"]).any()),
        failed=_failed(summary.get("failures")),
        groups=None if not groups else {str(case): str(group) for case, group in groups.items()},
        definitions={str(k): str(v) for k, v in definitions.items()} if isinstance(definitions, dict) else {},
        schema_version=summary["schema_version"],
        settings=None if summary.get("options") is None else _settings(summary["options"], file),
    )


def _failed(failures: Any) -> tuple[str, ...]:
    return tuple(str(f.get("case")) for f in failures if isinstance(f, dict)) if isinstance(failures, list) else ()


def _settings(options: Any, file: Path) -> Settings:
    try:
        surface, tolerance, ignore = (options[key] for key in ("surface", "nsd_tolerance_mm", "ignore_value"))
        return Settings(
            surface=str(surface),
            tolerance_mm={str(label): float(mm) for label, mm in tolerance.items()}
            if isinstance(tolerance, dict)
            else float(tolerance),
            ignore_value=None if ignore is None else int(ignore),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: options are not as medseg writes them ({type(error).__name__}: {error}), expected surface, "
            "nsd_tolerance_mm and ignore_value; run `medseg evaluate` again"
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); write the report again") from error


def _read_table(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise DataError(f"{file}: does not exist, expected the table beside summary.json; run `medseg evaluate` again")
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            header, *rows = [row for row in csv.reader(stream) if row] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); run `medseg evaluate` again") from error
    absent = [column for column in NEEDED if column not in header]
    if absent:
        raise DataError(f"{file}: no column {', '.join(absent)} found, expected the columns of metrics.csv")
    twice = [column for column, times in Counter(header).items() if times > 1]
    if twice:
        raise DataError(f"{file}: column {twice[0]} found twice, expected each once; run `medseg evaluate` again")
    if not rows:
        raise DataError(f"{file}: no rows found, expected one per case and label")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"{file}: row {number} has {len(row)} cells, expected {len(header)}; is the file whole?")
    # as text: a case may be called NA or 007
    table = pd.DataFrame(rows, columns=header, dtype=str)
    for column in table.columns.difference(list(ID_COLUMNS)):
        table[column] = _numbers(table[column], file)
    return _checked(table, file)


def _numbers(cells: pd.Series[str], file: Path) -> npt.NDArray[np.float64]:
    texts = [cell or "nan" for cell in cells.tolist()]
    try:
        return np.asarray(texts, dtype=np.float64)
    except ValueError as error:
        number, wrong = next((n, text) for n, text in enumerate(texts, start=2) if not _is_number(text))
        raise DataError(
            f"{file}: {wrong!r} found in column {cells.name}, row {number}, expected a number, inf or nothing; run "
            "`medseg evaluate` again"
        ) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _checked(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    unknown = sorted(set(table["status"]) - set(STATUSES))
    if unknown:
        raise DataError(f"{file}: status {unknown[0]!r} found, expected one of {', '.join(STATUSES)}")
    twice = table[table.duplicated(["case", "name"])]
    if len(twice):
        first = twice.iloc[0]
        raise DataError(f"{file}: case {first['case']} with label {first['name']} found twice, expected once")
    return table.reset_index(drop=True)


def _from_nnunet(name: str, file: Path, cases: Any) -> Method:
    rows = []
    try:
        for case in cases:
            path = str(case.get("reference_file") or case["prediction_file"])
            # in the spelling of our own reports
            name_of_case = case_name(re.split(r"[\\/]", path)[-1])
            found = (_nnunet_row(name_of_case, key, measures) for key, measures in case["metrics"].items())
            # nnU-Net leaves the background out of its means too
            rows += [row for row in found if row["label"] != "0"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: metric_per_case is not as nnU-Net writes it ({type(error).__name__}: {error}); expected metrics "
            "by label with Dice, TP, FP, FN, n_pred, n_ref, and reference_file"
        ) from error
    if not rows:
        raise DataError(f"{file}: no cases found in metric_per_case, expected one at least")
    return Method(name, file.parent, "nnU-Net", _checked(pd.DataFrame(rows), file), named=False)


def _nnunet_row(case: str, key: str, measures: Mapping[str, Any]) -> dict[str, Any]:
    # a region is written as a Python tuple: (1, 2)
    label = "+".join(re.findall(r"\d+", key))
    if not label:
        raise ValueError(f"label {key!r}")
    tp, fp, fn = (float(measures[count]) for count in _NNUNET_COUNTS)
    expected, predicted = tp + fn, tp + fp
    status = "ok" if expected and predicted else "missed" if expected else "spurious" if predicted else "both_empty"
    return {
        "case": case,
        "label": label,
        "name": label,
        "status": status,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "dice": _share(2 * tp, 2 * tp + fp + fn),
        "iou": _share(tp, tp + fp + fn),
        "precision": _share(tp, predicted),
        "recall": _share(tp, expected),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
