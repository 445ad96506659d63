"""Reports brought side by side: the cases and labels that all have, and proof that they judge the same references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from medseg.compare.methods import Method
from medseg.errors import DataError
from medseg.evaluate.metadata import called_by_case
from medseg.evaluate.pairs import counted, named

Floats = npt.NDArray[np.float64]

# measures that say how good a method is, and whether more is better
HIGHER_IS_BETTER = {
    "dice": True,
    "nsd": True,
    "hd95_mm": False,
    "assd_mm": False,
    "hd_mm": False,
    "masd_mm": False,
    "iou": True,
    "boundary_iou": True,
    "cldice": True,
    "precision": True,
    "recall": True,
    "volume_error_ml": False,
}
ALL_LABELS = "all labels"
# volumes come from spacings that headers hold as 32-bit numbers
_VOLUME_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Label:
    """A label that all methods have; `value` is empty where it stands for all of them."""

    name: str
    value: str


@dataclass(frozen=True, eq=False)
class Aligned:
    """Measures of all methods on common cases and labels.

    `values`: measure → (methods, labels, cases), NaN where undefined; `status`: the same shape, one of
    `STATUSES`. `groups`: the patient of each case, or None. `left_out`: method → cases that not all have.
    """

    methods: Sequence[Method]
    labels: Sequence[Label]
    cases: Sequence[str]
    values: Mapping[str, Floats]
    status: npt.NDArray[np.str_]
    groups: Sequence[str] | None
    left_out: Mapping[str, Sequence[str]]
    warnings: Sequence[str]

    def mean_over_labels(self, metric: str) -> Floats:
        """Mean of each case over its labels that have a value: (methods, cases); NaN where none has, inf with one."""
        values = self.values[metric]
        defined = ~np.isnan(values)
        sums = np.where(defined, values, 0.0).sum(axis=1)
        return np.where(defined.any(axis=1), sums / np.maximum(defined.sum(axis=1), 1), np.nan)


def align(methods: Sequence[Method]) -> Aligned:
    """Put `methods` side by side. Raises `DataError` where they cannot be compared, and says why.

    Cases are paired by name; labels by name, or by value as soon as one report has no names. Surface, tolerance of the
    NSD and ignored value must be the same, and so must the size of every reference: in voxels, where they were counted.
    A warning names reports that do not tell their settings, or measure other volumes of the same voxels.
    """
    cases, left_out = _common_cases(methods)
    warnings = _by_text(
        (name, f"{counted(len(names), 'case')} not in all reports, left out: {named(names)}")
        for name, names in left_out.items()
        if names
    )
    warnings += _by_text(
        (method.name, f"{counted(len(method.failed), 'case')} could not be evaluated, left out: {named(method.failed)}")
        for method in methods
        if method.failed
    )
    labels, keyed, more = _common_labels(methods)
    warnings += _check_settings(methods, keyed, labels)
    tables = [
        table.set_index(["key", "case"]).reindex(pd.MultiIndex.from_product([list(labels), cases])) for table in keyed
    ]
    _check_whole(methods, tables, cases)
    warnings += _check_references(methods, tables)
    shape = len(labels), len(cases)
    status = np.stack([table["status"].to_numpy(dtype=str).reshape(shape) for table in tables])
    values, without = _values(methods, tables, shape)
    groups, of_groups = _groups(methods, cases)
    return Aligned(
        methods=methods,
        labels=list(labels.values()),
        cases=cases,
        values=values,
        status=status,
        groups=groups,
        left_out=left_out,
        warnings=[
            *(*warnings, *more, *_unpredicted(methods, tables, cases)),
            *(*without, *of_groups, *_same_source(methods)),
        ],
    )


def _check_settings(
    methods: Sequence[Method], tables: Sequence[pd.DataFrame], labels: Mapping[str, Label]
) -> list[str]:
    """Refuse other settings; what the reports do not tell, or tell in other words, is a warning."""
    telling = [
        (method, method.settings, dict(zip(table["key"], table["name"])))
        for method, table in zip(methods, tables)
        if method.settings is not None
    ]
    for (one, mine, my_names), (other, theirs, their_names) in pairwise(telling):
        _check_same(one, other, "surface", mine.surface, theirs.surface)
        _check_same(one, other, "the ignored value", mine.ignore_value, theirs.ignore_value)
        for key, label in labels.items():
            tolerances = mine.tolerance_of(my_names[key]), theirs.tolerance_of(their_names[key])
            _check_same(one, other, f"the NSD tolerance (mm) of {label.name}", *tolerances)
    silent = [method.name for method in methods if method.settings is None]
    warnings = []
    if silent:
        warnings.append(
            f"surface, NSD tolerance and ignored value are not told by {', '.join(silent)}; make sure that they are "
            "the same in all reports"
        )
    return [*warnings, *_other_words(methods), *_other_versions(methods)]


def _check_same(one: Method, other: Method, setting: str, expected: object, found: object) -> None:
    if found != expected:
        found, expected = ("not set" if value is None else value for value in (found, expected))
        raise DataError(
            f"{other.source}: {setting} is {found}, expected {expected} as in {one.source}; evaluate both with the "
            "same settings"
        )


def _other_words(methods: Sequence[Method]) -> list[str]:
    warnings = []
    for one, other in pairwise([method for method in methods if method.definitions]):
        # whether volumes mean the same is seen by their numbers
        terms = {*HIGHER_IS_BETTER, "status", "surface", "ignore"}
        if one.settings is not None and other.settings is not None:
            # told by the settings, and in the words of each set of labels
            terms -= {"nsd", "surface", "ignore"}
        shared = one.definitions.keys() & other.definitions.keys() & terms
        differing = sorted(term for term in shared if one.definitions[term] != other.definitions[term])
        if differing:
            warnings.append(f"{one.name} and {other.name} define in other words: {', '.join(differing)}")
    return warnings


def _other_versions(methods: Sequence[Method]) -> list[str]:
    by_version: dict[int, list[str]] = {}
    for method in methods:
        if method.schema_version is not None:
            by_version.setdefault(method.schema_version, []).append(method.name)
    if len(by_version) < 2:
        return []
    told = "; ".join(f"version {version}: {', '.join(names)}" for version, names in sorted(by_version.items()))
    return [f"other versions of medseg made these reports (schema {told})"]


def _unpredicted(methods: Sequence[Method], tables: Sequence[pd.DataFrame], cases: Sequence[str]) -> list[str]:
    """A method that fails on hard cases must not gain by it unseen."""
    warnings = []
    for method, table in zip(methods, tables):
        absent = set(table.index[table["status"] == "missing_prediction"].get_level_values(1))
        if absent:
            names = named([case for case in cases if case in absent])
            warnings.append(
                f"{method.name}: {counted(len(absent), 'case')} without a prediction: {names}; differences leave "
                "them out, ranks count them as worst"
            )
    return warnings


def _common_cases(methods: Sequence[Method]) -> tuple[list[str], dict[str, list[str]]]:
    of_each = [dict.fromkeys(method.table["case"]) for method in methods]
    common = sorted(set(of_each[0]).intersection(*of_each[1:]))
    if not common:
        examples = "; ".join(f"{m.name}: {named(list(cases)[:3])}" for m, cases in zip(methods, of_each))
        raise DataError(
            f"no case is in all {len(methods)} reports ({examples}); compare reports on the same cases, by name"
        )
    kept = set(common)
    return common, {m.name: [c for c in cases if c not in kept] for m, cases in zip(methods, of_each)}


def _common_labels(methods: Sequence[Method]) -> tuple[dict[str, Label], list[pd.DataFrame], list[str]]:
    by = "name" if all(method.named for method in methods) else "label"
    tables = [method.table.assign(key=method.table[by]) for method in methods]
    for method, table in zip(methods, tables):
        if table.duplicated(["key", "case"]).any():
            raise DataError(
                f"{method.source}: labels share a value, which must tell them apart here, for not all reports have "
                "names of labels; evaluate the others with --labels"
            )
    of_each = [dict.fromkeys(table["key"]) for table in tables]
    first = of_each[0]
    common = [key for key in first if all(key in keys for keys in of_each)]
    if not common:
        examples = "; ".join(f"{m.name}: {named(list(keys))}" for m, keys in zip(methods, of_each))
        raise DataError(f"no label is in all {len(methods)} reports ({examples}); evaluate both with the same --labels")
    names = _names(methods)
    labels = {}
    for key in common:
        row = tables[0][tables[0]["key"] == key].iloc[0]
        labels[key] = Label(key if by == "name" else names.get(key, key), str(row["label"]))
    warnings = _by_text(
        (m.name, f"{counted(len(alone), 'label')} not in all reports, left out: {named(alone)}")
        for m, keys in zip(methods, of_each)
        if (alone := [names.get(key, key) if by == "label" else key for key in keys if key not in labels])
    )
    if by == "label" and any(method.named for method in methods):
        nameless = ", ".join(method.name for method in methods if not method.named)
        warnings.append(f"labels were paired by value, for these reports have no names of labels: {nameless}")
    return labels, tables, warnings


def _names(methods: Sequence[Method]) -> dict[str, str]:
    """Value → name, from the first method that has names."""
    for method in methods:
        if method.named:
            return dict(zip(method.table["label"], method.table["name"]))
    return {}


def _check_whole(methods: Sequence[Method], tables: Sequence[pd.DataFrame], cases: Sequence[str]) -> None:
    for method, table in zip(methods, tables):
        holes = table.index[table["status"].isna()]
        if len(holes):
            key, case = holes[0]
            raise DataError(
                f"{method.source}: case {case} has no row for label {key}, expected every case with every label; "
                "evaluate again"
            )


def _check_references(methods: Sequence[Method], tables: Sequence[pd.DataFrame]) -> list[str]:
    """Refuse other references, by their voxels where those were counted, else by volume; other volumes are told."""
    warnings = []
    for (one, table), (other, its_table) in pairwise(zip(methods, tables)):
        expected, found = (t["tp"] + t["fn"] for t in (table, its_table))
        counted_twice = expected.notna() & found.notna()
        differs = (expected != found) & counted_twice
        if "reference_ml" in table and "reference_ml" in its_table:
            mine, its = table["reference_ml"], its_table["reference_ml"]
            other_volume = (mine - its).abs() > _VOLUME_TOLERANCE * mine.abs()
            # reports of earlier versions took axes to be at right angles: their volumes prove nothing
            if one.definitions.get("volumes") == other.definitions.get("volumes"):
                differs |= other_volume & ~counted_twice
            warnings += _other_volumes(one, other, table.index[other_volume & ~differs])
        if differs.any():
            key, case = table.index[differs][0]
            cases = sorted({c for _, c in table.index[differs]})
            raise DataError(
                f"{other.source}: the references are not those of {one.source}; in case {case}, label {key}, "
                f"{_size(its_table, (key, case))} found, expected {_size(table, (key, case))}; "
                f"{counted(len(cases), 'case')} differ: {named(cases)}; evaluate both against the same references"
            )
    return warnings


def _other_volumes(one: Method, other: Method, rows: pd.Index[Any]) -> list[str]:
    cases = sorted({case for _, case in rows})
    if not cases:
        return []
    return [
        f"{one.name} and {other.name} measure other volumes of the same reference in {counted(len(cases), 'case')}: "
        f"{named(cases)}; one is of an earlier version of medseg or of other sizes of voxels: evaluate it again"
    ]


def _size(table: pd.DataFrame, row: tuple[str, str]) -> str:
    voxels = table["tp"][row] + table["fn"][row]
    if not np.isnan(voxels):
        volume = table["reference_ml"][row] if "reference_ml" in table else np.nan
        return f"{voxels:.0f} voxels" + ("" if np.isnan(volume) else f" ({volume:.6g} ml)")
    return f"{table['reference_ml'][row]:.6g} ml"


def _values(
    methods: Sequence[Method], tables: Sequence[pd.DataFrame], shape: tuple[int, int]
) -> tuple[dict[str, Floats], list[str]]:
    values: dict[str, Floats] = {}
    without: dict[tuple[str, ...], list[str]] = {}
    for metric in HIGHER_IS_BETTER:
        columns = [_column(table, metric) for table in tables]
        having = [not np.isnan(column).all() for column in columns]
        if all(having):
            values[metric] = np.stack([column.reshape(shape) for column in columns])
        elif any(having):
            lacking = tuple(method.name for method, has in zip(methods, having) if not has)
            without.setdefault(lacking, []).append(metric)
    notes = [f"not measured by {', '.join(names)}, so not compared: {', '.join(m)}" for names, m in without.items()]
    if not values:
        raise DataError("no measure has a value in all reports; is any label there at all?")
    return values, notes


def _column(table: pd.DataFrame, metric: str) -> Floats:
    if metric == "volume_error_ml":
        return np.abs(_column(table, "volume_difference_ml"))
    if metric not in table:
        return np.full(len(table), np.nan)
    return table[metric].to_numpy(dtype=np.float64)


def _groups(methods: Sequence[Method], cases: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    telling = [(method, method.groups) for method in methods if method.groups]
    if not telling:
        return None, []
    (first, groups), *others = telling
    # reports of earlier versions name patients each in their own way
    patients = called_by_case(groups, cases)
    for method, theirs in others:
        called = called_by_case(theirs, cases)
        differing = [case for case in cases if called[case] != patients[case]]
        if differing:
            raise DataError(
                f"{method.source}: other patients than in {first.source} for {counted(len(differing), 'case')}: "
                f"{named(differing)}; evaluate both with the same groups"
            )
    silent = ", ".join(method.name for method in methods if not method.groups)
    of_cases = list(patients.values())
    if not silent:
        return of_cases, []
    return of_cases, [f"only {first.name} names patients; they are taken for the others too: {silent}"]


def _same_source(methods: Sequence[Method]) -> list[str]:
    sources = [method.source.resolve() for method in methods]
    twice = sorted({m.name for m, source in zip(methods, sources) if sources.count(source) > 1})
    return [f"these are one and the same report: {', '.join(twice)}"] if twice else []


def _by_text(told: Iterable[tuple[str, str]]) -> list[str]:
    """What several methods are told in the same words is said once."""
    names: dict[str, list[str]] = {}
    for name, text in told:
        names.setdefault(text, []).append(name)
    return [f"{', '.join(those)}: {text}" for text, those in names.items()]
