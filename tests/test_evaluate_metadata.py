"""Tables beside the data: what is read from them, what becomes a subgroup, and what goes no further."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.errors import DataError
from medseg.evaluate.metadata import NO_VALUE, Metadata, read_metadata


@pytest.fixture
def read(tmp_path: Path):
    """Reads a table from text or bytes for cases a, b, c, … as many as asked for."""

    def from_text(content: str | bytes, cases: str = "abc", group: str | None = None) -> Metadata:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_metadata(path, list(cases), group=group)

    return from_text


def column(found: Metadata, name: str) -> list[str]:
    return list(found.table[name])


def order(found: Metadata, name: str) -> list[str]:
    return list(found.table[name].cat.categories)


def test_a_column_of_few_texts_gives_subgroups(read) -> None:
    found = read("case,site\na,Graz\nb,Basel\nc,Graz\n")
    assert (column(found, "site"), order(found, "site")) == (["Graz", "Basel", "Graz"], ["Basel", "Graz"])
    assert (found.patients, found.warnings) == (None, ())


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffcase;site\r\na;Graz\r\nb;Köln\r\nc;Graz\r\n".encode(),
        "case;site\r\na;Graz\r\nb;Köln\r\nc;Graz\r\n".encode("cp1252"),
        "case\tsite\na\tGraz\nb\tKöln\nc\tGraz\n".encode("utf-16"),
        "sep=;\ncase;site\na;Graz\nb;Köln\nc;Graz\n".encode(),
        "Case , site\n a , Graz\n\nb,Köln\n,\nc,Graz".encode(),
        "case,site,note\na,Graz\nb,Köln,\nc,Graz,,\n".encode(),
        'site,"case"\nGraz,"a"\nKöln,b\nGraz,c\n'.encode(),
    ],
    ids=["excel", "windows", "utf-16", "sep", "spaces", "short lines", "quoted"],
)
def test_what_spreadsheets_write_is_read(read, content: bytes) -> None:
    assert column(read(content), "site") == ["Graz", "Köln", "Graz"]


def test_a_field_may_hold_the_separator(read) -> None:
    assert column(read('case,site\na,"x, y"\nb,z\nc,z\n'), "site") == ["x, y", "z", "z"]


def test_cases_may_be_named_with_their_ending(read) -> None:
    assert column(read("case,site\na.nii.gz,x\nb.NRRD,x\nc,y\n"), "site") == ["x", "x", "y"]


def test_cases_that_are_not_in_the_file_are_named_and_have_no_value(read) -> None:
    found = read("case,site\na,x\nc,x\n")
    assert (column(found, "site"), order(found, "site")) == (["x", NO_VALUE, "x"], ["x", NO_VALUE])
    assert found.warnings == ("1 cases are not in table.csv: b",)


def test_other_cases_of_the_file_are_counted_but_not_named(read) -> None:
    found = read("case,site\na,x\nb,x\nc,y\nsecret,z\n")
    assert order(found, "site") == ["x", "y"]
    assert found.warnings == ("1 of 4 cases in table.csv are not among those evaluated and were ignored",)


@pytest.mark.parametrize("empty", ["", "NA", "n/a", "NaN", "None"])
def test_empty_values_are_a_group_of_their_own(read, empty: str) -> None:
    assert column(read(f"case,site\na,x\nb,{empty}\nc,x\n"), "site") == ["x", NO_VALUE, "x"]


def test_ages_are_cut_into_decades(read) -> None:
    found = read("case,Age (years)\na,59.5\nb,60\nc,9\nd,103\n", "abcd")
    assert column(found, "Age (years)") == ["50 to under 60", "60 to under 70", "0 to under 10", "100 to under 110"]
    assert order(found, "Age (years)") == ["0 to under 10", "50 to under 60", "60 to under 70", "100 to under 110"]


def test_other_numbers_are_cut_at_their_quartiles(read) -> None:
    # 1 to 9: quartiles 3, 5, 7
    found = read("case,dose\n" + "".join(f"{case},{n}\n" for n, case in enumerate("abcdefghi", start=1)), "abcdefghi")
    assert order(found, "dose") == ["under 3", "3 to under 5", "5 to under 7", "7 or more"]
    assert [order(found, "dose").index(value) for value in column(found, "dose")] == [0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_the_edges_that_are_shown_are_those_that_cut(read) -> None:
    # the median 5.00001 is shown as 5, so 5 lies above it
    numbers = [1, 2, 3, 5, 5.00001, 6, 7, 8, 9]
    found = read("case,dose\n" + "".join(f"{case},{n}\n" for n, case in zip(numbers, "abcdefghi")), "abcdefghi")
    assert order(found, "dose") == ["under 3", "3 to under 5", "5 to under 7", "7 or more"]
    assert column(found, "dose")[3] == "5 to under 7"


def test_few_numbers_are_taken_as_they_are(read) -> None:
    found = read("case,tesla\na,3.0\nb,1.5\nc,3\n")
    assert (column(found, "tesla"), order(found, "tesla")) == (["3", "1.5", "3"], ["1.5", "3"])


def test_decimal_commas_are_read_where_fields_are_parted_by_semicolons(read) -> None:
    found = read("case;tesla\na;1,5\nb;3\nc;1,50\n")
    assert column(found, "tesla") == ["1.5", "3", "1.5"]


def test_infinite_numbers_are_texts(read) -> None:
    assert column(read("case,dose\na,inf\nb,1\nc,1\n"), "dose") == ["inf", "1", "1"]


def test_a_column_of_many_texts_is_left_out(read) -> None:
    cases = "abcdefghijklmn"
    found = read("case,note\n" + "".join(f"{case},word {n % 13}\n" for n, case in enumerate(cases)), cases)
    assert list(found.table.columns) == []
    assert found.warnings == ("column 'note' of table.csv gives no subgroups: it has 13 different texts, more than 12",)


def test_a_text_of_its_own_for_every_case_goes_no_further(read) -> None:
    found = read("case,remark\na,Ann\nb,Bob\nc,Cid\n")
    assert list(found.table.columns) == []
    assert "another one for every case" in found.warnings[0]
    assert not any(name in found.warnings[0] for name in ("Ann", "Bob", "Cid"))


def test_an_empty_column_is_left_out(read) -> None:
    assert "it is empty for all cases" in read("case,site\na,\nb,\nc,\n").warnings[0]


@pytest.mark.parametrize("name", ["group", "Patient", "subject_id"])
def test_a_column_that_names_patients_is_taken_by_itself(read, name: str) -> None:
    found = read(f"case,{name}\na,Smith\nb,Jones\nc,Smith\n")
    # by their first case: no name of a patient goes further
    assert found.patients == {"a": "a", "b": "b", "c": "a"}
    assert list(found.table.columns) == []
    assert found.warnings == (
        f"column {name!r} of table.csv names patients: intervals are those of 2 patients with 3 cases",
    )


def test_the_column_that_names_patients_can_be_chosen(read) -> None:
    found = read("case,patient,mouse\na,1,x\nb,1,y\nc,2,y\n", group="mouse")
    assert found.patients == {"a": "a", "b": "b", "c": "b"}
    assert list(found.table.columns) == []


def test_a_case_without_a_patient_is_one_of_its_own(read) -> None:
    assert read("case,patient\na,\nc,p\n").patients == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("case,site\nx,y\n", "none of the 3 cases found in column 'case'"),
        ("name,site\na,x\n", "name, site found in the first line, expected a column called `case`"),
        ("", "nothing found in the first line"),
        ("case,site\na,x\nb,y\na.nii.gz,z\n", "case 'a' found in lines 2 and 4, expected once"),
        ("case,site,site\na,x,y\n", "column 'site' found twice"),
        ("case,site\na,x,y\n", "line 2 has 3 fields, expected 2"),
        ("age,sex,case\n60,f,a\nexported 2024\n", "line 3 has 1 field and names no case, expected 3"),
        ('case,site\na,"x\n', "is no CSV"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(read, content: str, said: str) -> None:
    with pytest.raises(DataError, match=r"table\.csv: ") as refused:
        read(content)
    assert said in str(refused.value)


def test_an_unknown_column_of_patients_names_the_known_ones(read) -> None:
    with pytest.raises(DataError, match="no column 'patients' found, expected one of case, site"):
        read("case,site\na,x\n", group="patients")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        read_metadata(tmp_path / "none.csv", ["a"])


@pytest.mark.parametrize(
    "name",
    ["Patient Name", "PatientName", "surname", "date_of_birth", "DOB", "MRN", "Accession number", "StudyUID", "ID"],
)
def test_a_column_that_says_who_somebody_is_gives_no_subgroups(read, name: str) -> None:
    found = read(f"case,{name}\na,x\nb,x\nc,y\n")
    assert list(found.table.columns) == []
    assert "by its name it says who somebody is" in found.warnings[0]


@pytest.mark.parametrize("name", ["site_name", "scanner id", "birth weight", "surgeon"])
def test_a_column_of_a_similar_name_gives_subgroups(read, name: str) -> None:
    assert list(read(f"case,{name}\na,x\nb,x\nc,y\n").table.columns) == [name]


@pytest.mark.parametrize("date", ["1961-04-03", "3.4.1961", "04/03/61", "19610403", "1961-04-03 12:30"])
def test_dates_give_no_subgroups(read, date: str) -> None:
    found = read(f"case,first scan\na,{date}\nb,{date}\nc,\n")
    assert list(found.table.columns) == []
    assert "it holds dates" in found.warnings[0]


@pytest.mark.parametrize("name", ["PatientID", "Patient ID", "subject_id", "Group"])
def test_a_column_of_patients_may_be_spelled_in_many_ways(read, name: str) -> None:
    assert read(f"case,{name}\na,1\nb,1\nc,2\n").patients == {"a": "a", "b": "a", "c": "c"}


def test_large_numbers_that_differ_are_not_one_subgroup(read) -> None:
    assert order(read("case,dose\na,9000001\nb,9000002\nc,9000002\n"), "dose") == ["9000001", "9000002"]


def test_what_a_terminal_would_obey_is_shown_by_its_code(read) -> None:
    with pytest.raises(DataError, match=r"\\x1b\[2J found in the first line"):
        read("\x1b[2J\n")
