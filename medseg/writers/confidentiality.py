"""One DICOM data set without what tells whose it is: PS3.15 annex E, element by element, at every depth; no files.

Imports pydicom: this module is imported where DICOM is written, never by the package.
"""

from __future__ import annotations

import hmac
import re
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import empty_value_for_VR
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.uid import UID

from medseg.errors import DataError
from medseg.readers.dicom_facts import VALID_UID
from medseg.readers.dicom_files import UNREADABLE
from medseg.writers.confidentiality_table import (
    ACTIONS,
    BULK,
    ESSENTIAL,
    NEVER_SHIFTED,
    OF_DEVICES,
    OF_PATIENTS,
    TECHNICAL_TEXT,
    UNLISTED_REMOVED,
)

MOST_SHIFTED_DAYS = 3650
# people of 90 and more are few (HIPAA, 45 CFR 164.514)
_OLDEST = 89
_DUMMIES = {"AS": "000Y", "DA": "19000101", "TM": "000000", "DT": "19000101000000", "DS": "0", "IS": "0"}
_DUMMIES |= dict.fromkeys(("AE", "CS", "LO", "SH", "ST", "LT", "UT", "UC", "PN"), "REMOVED")
_PATTERNS = {
    "AS": re.compile(r"[0-9]{3}[DWMY]"),
    "CS": re.compile(r"[A-Z0-9_ ]{0,16}"),
    "DS": re.compile(r"[0-9+\-.eE ]{0,32}"),
    "IS": re.compile(r"[0-9+\- ]{0,16}"),
}
# scanners write more into codes than the standard allows; only what is needed is kept so
_LOOSE_CODE = re.compile(r"[A-Za-z0-9_ +./\-]{0,64}")
_TEXT = ("LO", "SH", "CS", "AE", "ST", "LT", "UT", "UC")
_BINARY = ("OB", "OD", "OF", "OL", "OV", "OW", "UN")
_DATE, _MOMENT = re.compile(r"[0-9]{8}"), re.compile(r"([0-9]{8})([0-9]{2,6}(\.[0-9]{1,6})?)?([+-][0-9]{4})?")
_TIME = re.compile(r"[0-9]{2}([0-9]{2}([0-9]{2}(\.[0-9]{1,6})?)?)?")
# classes tell what an object is, not whose; what stands in their place may be the UID of an object
_CLASSES = ("ReferencedSOPClassUID", "ReferencedSOPClassUIDInFile", "OriginalSpecializedSOPClassUID")
_STANDARD = "1.2.840.10008.5.1.4."
_OBJECTS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
IDENTIFIERS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "AdmissionID", "IssuerOfPatientID", "StudyID")
_TRAITS = ("IssuerOfPatientID", "PatientBirthDate")
# shorter parts of names are words of their own somewhere; only from here on they are looked for inside of words. Two
# characters are a whole name where each is a syllable
_SHORTEST, _INSIDE, _SYLLABLES, _IN_BYTES = 3, 5, 2, 6
# all in it is of the patient, what the table forgets too: a birth date in another calendar
_OF_PATIENTS_GROUP = 0x0010
# curves, overlays, what is signed or encrypted, and what has no place in a data set
_GROUPS = (
    *range(0x0007),
    *range(0x5000, 0x5100),
    *range(0x6000, 0x6100),
    0x0400,
    0x4000,
    0x4008,
    0xFFFA,
    0xFFFC,
    0xFFFE,
)


@dataclass(frozen=True)
class Secret:
    """What new identifiers are made with: the same `salt` gives the same ones, and without it nobody comes back."""

    salt: bytes

    def uid(self, old: str) -> str:
        """A UID for an old one (2.25. and a UUID of version 5 as a number, PS3.5 annex B.2)."""
        space = uuid.UUID(bytes=self._digest("uid", "")[:16])
        return f"2.25.{uuid.uuid5(space, old).int}"

    def pseudonym(self, patient: str) -> str:
        """Twelve hexadecimal digits for whatever identifies a patient."""
        return f"P{self._digest('patient', patient).hex()[:12].upper()}"

    def days(self, patient: str) -> int:
        """By how many days the dates of a patient go back: 1 to `MOST_SHIFTED_DAYS`."""
        return 1 + int.from_bytes(self._digest("days", patient)[:8], "big") % MOST_SHIFTED_DAYS

    def _digest(self, purpose: str, words: str) -> bytes:
        return hmac.digest(self.salt, f"{purpose}\0{words}".encode("utf-8", "surrogateescape"), "sha256")


@dataclass(frozen=True)
class Rules:
    """How a patient's data set is cleaned. `patient`: what identifies them; the flags are options of the profile."""

    secret: Secret
    patient: str
    keep_interval: bool = False
    retain_uids: bool = False
    retain_patient_characteristics: bool = False
    retain_device: bool = False

    @cached_property
    def retained(self) -> frozenset[str]:
        """Keywords that an option keeps."""
        patients = OF_PATIENTS if self.retain_patient_characteristics else frozenset()
        return patients | (OF_DEVICES if self.retain_device else frozenset())

    def new_uid(self, old: str) -> str:
        """The UID that stands for `old`; those that the standard registers stay."""
        if not VALID_UID.fullmatch(old):
            return self.secret.uid(old)
        return old if self.retain_uids or UID(old).type else self.secret.uid(old)


def patient_of(dataset: Dataset) -> str:
    """What identifies the patient of a data set: their number, or where that is blank name and birth, or the study."""
    number, name, born = (
        str(_read(dataset, k) or "").strip() for k in ("PatientID", "PatientName", "PatientBirthDate")
    )
    if number:
        return f"PatientID\0{number}"
    if name:
        return f"PatientName\0{name}" + (f"\0{born}" if born else "")
    study = str(_read(dataset, "StudyInstanceUID") or "").strip()
    return f"StudyInstanceUID\0{study}" if study else ""


def traits_of(dataset: Dataset) -> dict[str, str]:
    """What two patients of one number differ in, as far as it is told."""
    found = {keyword: str(_read(dataset, keyword) or "").strip().casefold() for keyword in _TRAITS}
    if not _DATE.fullmatch(found["PatientBirthDate"]):
        del found["PatientBirthDate"]
    return {keyword: value for keyword, value in found.items() if value}


def identifiers_of(dataset: Dataset, *, devices: bool = True) -> frozenset[str]:
    """What must be in no text, at every depth, in lower case: the parts of all names of persons and of numbers that
    identify; the institution as a whole; dates, in each order of day, month and year; UIDs of objects; of `devices`
    station and serial number."""
    whole = (*_OBJECTS, "InstitutionName", *(("StationName", "DeviceSerialNumber") if devices else ()))
    found: set[str] = set()
    for element in _every(dataset):
        if element.VR == "DA":
            found.update(form for day in _values(element) for form in _orders(str(day).strip()))
        elif element.keyword in whole:
            found.add(str(element.value or "").casefold().strip(" \0"))
        if element.VR == "PN" or element.keyword in IDENTIFIERS:
            for text in _spellings(str(element.value or "")):
                parts = [part for part in re.split(r"[\W_]+", text) if part]
                # a name of short parts is known by two that stand together; a number also without its marks
                pairs = [f"{a} {b}" for a, b in (parts[:2], parts[1::-1])] if len(parts) > 1 else []
                found.update(parts, *([pairs] if element.VR == "PN" else [[text.strip(), "".join(parts)]]))
    return frozenset(word for word in found if len(word) >= (_SHORTEST if word.isascii() else _SYLLABLES))


def _spellings(text: str) -> set[str]:
    """`text` in lower case; and as it is written where there are no accents and umlauts."""
    lower = text.casefold()
    bare = unicodedata.normalize("NFKD", lower)
    plain = "".join(c for c in bare if not unicodedata.combining(c))
    return {lower, unicodedata.normalize("NFC", lower), plain, bare.replace("\u0308", "e")}


def _orders(day: str) -> tuple[str, ...]:
    return (day, day[6:] + day[4:6] + day[:4], day[4:] + day[:4]) if _DATE.fullmatch(day) else ()


def cleaned(dataset: Dataset, rules: Rules, identifiers: frozenset[str]) -> Dataset:
    """A copy of what may stay. Raises `DataError` naming the keyword where what pixels mean cannot be kept."""
    made = Dataset()
    for tag in sorted(dataset.keys()):
        keyword = "" if tag.group % 2 or tag.group in _GROUPS or tag.element == 0 else keyword_for_tag(tag)
        if not keyword or keyword == "SpecificCharacterSet":
            # private, or of another edition: nobody knows what it holds; texts become Unicode
            continue
        element = _kept(dataset, tag, keyword, rules, identifiers)
        if element is not None:
            made.add(element)
        elif keyword in ESSENTIAL and keyword not in ACTIONS:
            raise DataError(
                f"a value of {keyword} found that cannot be kept, expected one as the standard says; export it again"
            )
    return made


def holds_identifier(data: bytes, pixels: bytes, identifiers: frozenset[str]) -> bool:
    """Whether long parts of names are still in a written file: anywhere in its header, or as usual in its pixels."""
    # numbers are found somewhere by chance, and UIDs may be kept
    words = {
        w for w in identifiers if len(w.encode()) >= _IN_BYTES and not VALID_UID.fullmatch(w) and not w.isdecimal()
    }
    written = {form for word in words for form in (word, word.upper(), word.capitalize())}
    header = data[: len(data) - len(pixels)].lower()
    return any(raw in header for raw in _bytes_of(words)) or any(raw in pixels for raw in _bytes_of(written))


def _bytes_of(words: set[str]) -> list[bytes]:
    made = [word.encode(encoding) for word in words for encoding in ("utf-8", "utf-16-le", "utf-16-be")]
    # fewer bytes are found somewhere by chance
    return [raw for raw in made if len(raw) >= _IN_BYTES]


# ---- one element


def _kept(
    dataset: Dataset, tag: BaseTag, keyword: str, rules: Rules, identifiers: frozenset[str]
) -> DataElement | None:
    """The element as it may be written, or None."""
    try:
        element = dataset[tag]
        expected = dictionary_VR(tag)
        if element.VR not in (expected, *expected.split(" or ")):
            # a number that is said to be a text, and the like
            return None
        action = _action(keyword, element.VR, rules)
        value = _value(element, keyword, action, rules, identifiers)
    except UNREADABLE:
        return None
    if value is None:
        return None
    made = DataElement(tag, element.VR, value)
    made.is_undefined_length = element.is_undefined_length
    return made


def _action(keyword: str, vr: str, rules: Rules) -> str:
    """X, Z, D, U, K (keep), or S (shift) for an attribute."""
    if keyword in ("PatientName", "PatientID"):
        return "P"
    if keyword in rules.retained:
        return "K"
    code = ACTIONS.get(keyword)
    if vr in ("DA", "TM", "DT") and rules.keep_interval and keyword not in NEVER_SHIFTED:
        return "S"
    if vr == "UI":
        return "X" if code == "X" else "U"
    if code is None:
        return "K" if _may_stay(keyword, vr) else "X"
    if vr == "SQ":
        return {"X/Z": "Z", "Z": "Z", "X/Z/U*": "K"}.get(code, "X")
    if code == "X/D" and vr in ("DA", "TM"):
        # only treatment records and plans must have these, and they are not taken
        return "X"
    # the mildest that every type of object allows
    return code.rsplit("/", 1)[-1]


def _may_stay(keyword: str, vr: str) -> bool:
    """Whether an attribute stays that the table does not name."""
    if (tag_for_keyword(keyword) or 0) >> 16 == _OF_PATIENTS_GROUP:
        return False
    return keyword in TECHNICAL_TEXT if vr in ("LO", "SH") else vr not in UNLISTED_REMOVED or keyword in BULK


def _value(element: DataElement, keyword: str, action: str, rules: Rules, identifiers: frozenset[str]) -> Any:
    """The value to be written; None: none, the element goes."""
    if action == "X":
        return None
    if action == "P":
        return rules.secret.pseudonym(rules.patient)
    if action == "S":
        return _shifted(element, rules.secret.days(rules.patient))
    if element.is_empty or action == "Z":
        return _empty(element)
    if action == "D":
        return _DUMMIES.get(element.VR)
    if element.VR == "SQ":
        return Items([cleaned(item, rules, identifiers) for item in element.value])
    if action == "U":
        return _uids(element, keyword, rules)
    return _checked(element, keyword, identifiers)


def _empty(element: DataElement) -> Any:
    # None would be: no element
    return empty_value_for_VR(element.VR) if element.VR == "SQ" else ""


def _uids(element: DataElement, keyword: str, rules: Rules) -> list[str]:
    old = [str(value).strip(" \0") for value in _values(element)]
    if keyword == "SOPClassUID" and all(VALID_UID.fullmatch(value) for value in old):
        return old
    kept = _STANDARD if keyword in _CLASSES else "-"
    return [rules.new_uid(v) if v and not (v.startswith(kept) and VALID_UID.fullmatch(v)) else v for v in old]


def _checked(element: DataElement, keyword: str, identifiers: frozenset[str]) -> Any:
    """The value of an element that stays; None where it is not of its type, or holds a part of a name."""
    if element.VR in _BINARY:
        return element.value
    if element.VR == "UI":
        return element.value if all(VALID_UID.fullmatch(str(value)) for value in _values(element)) else None
    if keyword == "PatientAge":
        return _age(str(element.value))
    if keyword == "PatientSex":
        return element.value if element.value in ("F", "M", "O") else None
    pattern = _LOOSE_CODE if element.VR == "CS" and keyword in ESSENTIAL else _PATTERNS.get(element.VR)
    values = [str(value) for value in _values(element)]
    if pattern is not None and not all(pattern.fullmatch(value.strip()) for value in values):
        return None
    if element.VR in ("IS", "DS") and any(len(v.strip()) >= _IN_BYTES and v.strip() in identifiers for v in values):
        return None
    if element.VR in _TEXT and any(_names_somebody(value, identifiers) for value in values):
        return None
    return element.value


def _names_somebody(value: str, identifiers: frozenset[str]) -> bool:
    return any(_names_in(text, identifiers) for text in _spellings(value))


def _names_in(text: str, identifiers: frozenset[str]) -> bool:
    listed = [word for word in re.split(r"[\W_]+", text) if word]
    words, spaced, compact = set(listed), " ".join(listed), "".join(listed)
    return any(
        word in words
        or (word in text and (len(word) >= _INSIDE or not word.isascii()))
        or (" " in word and word in spaced)
        or (len(word) >= _IN_BYTES and any(c.isdecimal() for c in word) and word in compact)
        for word in identifiers
    )


def _age(value: str) -> str | None:
    if not _PATTERNS["AS"].fullmatch(value.strip()):
        return None
    old = value.strip().endswith("Y") and int(value.strip()[:3]) > _OLDEST
    return f"{_OLDEST + 1:03}Y" if old else value.strip()


def _shifted(element: DataElement, days: int) -> list[str] | str:
    """Dates moved back by `days`, times as they are; empty where one of them is not to be understood."""
    made = []
    for value in (str(value).strip() for value in _values(element)):
        match = _MOMENT.fullmatch(value) if element.VR == "DT" else _DATE.fullmatch(value)
        if element.VR == "TM" and _TIME.fullmatch(value):
            made.append(value)
        elif element.VR != "TM" and match is not None:
            day = date(int(value[:4]), int(value[4:6]), int(value[6:8])) - timedelta(days=days)
            made.append(f"{day:%Y%m%d}".rjust(8, "0") + value[8:])
        else:
            return ""
    return made


def _values(element: DataElement) -> list[Any]:
    if element.is_empty:
        return []
    return list(element.value) if element.VM > 1 else [element.value]


def _every(dataset: Dataset) -> Iterator[DataElement]:
    """Every element that can be understood, at every depth; private ones are left out."""
    for tag in sorted(dataset.keys()):
        if tag.group % 2:
            continue
        element = _read(dataset, tag)
        if element is None:
            continue
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _every(item)


def _read(dataset: Dataset, key: Any) -> Any:
    """The value of a keyword, or the element of a tag; None where it is missing or not to be understood."""
    try:
        return dataset.get(key)
    except UNREADABLE:
        return None
