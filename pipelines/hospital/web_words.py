"""How the pages say things: names, dates, ages, states, and the addresses of the list; functions of values alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from medseg_pipelines.hospital.web_views import ALL_STEPS, JobView, StudyRow

# how often a page that changes is loaded again
REFRESH_S = 15
STATE_WORDS = {"all": "All", "in-work": "In work", "done": "Done", "dead": "Failed", "not-taken": "Not taken"}
JOB_WORDS = {
    "queued": "Waiting",
    "running": "In work",
    "sending": "Being sent",
    "done": "Done",
    "dead": "Failed",
    "superseded": "Superseded",
}
DELIVERY_WORDS = {
    "waiting": "Waiting",
    "sending": "Being sent",
    "sent": "Sent, not yet confirmed",
    "done": "Done",
    "dead": "Failed",
    "superseded": "Superseded",
}
# which colour a state has; the word stands beside it always
TONES = {
    "done": "good",
    "dead": "bad",
    "running": "busy",
    "sending": "busy",
    "sent": "busy",
    "in-work": "busy",
    "queued": "quiet",
    "waiting": "quiet",
    "not-taken": "quiet",
    "superseded": "quiet",
}
FORMAT_WORDS = {
    "nifti": "NIfTI",
    "dicom-seg": "DICOM SEG",
    "rtstruct": "RTSTRUCT",
    "dicom-sr": "DICOM SR",
    "dicom-sc": "Secondary capture",
}


@cache
def environment() -> Environment:
    """The templates of the pages: every value is escaped, a missing one is an error."""
    made = Environment(
        loader=PackageLoader("medseg_pipelines", "templates/hospital"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        person=person, day=day, span=span, clock=clock, machine_time=machine_time, gb=gb, model_name=model_name
    )
    made.globals.update(
        state_words=STATE_WORDS,
        job_words=JOB_WORDS,
        delivery_words=DELIVERY_WORDS,
        format_words=FORMAT_WORDS,
        tones=TONES,
        all_steps=ALL_STEPS,
        refresh_s=REFRESH_S,
        list_address=list_address,
        study_words=study_words,
        step_marks=step_marks,
    )
    return made


def person(name: str) -> str:
    """A DICOM person name as people write it: `Müller^Hans^^Dr.` is `Müller, Hans, Dr.`; other scripts follow."""
    written = []
    for group in name.split("="):
        family, *others = ([part.strip() for part in group.split("^")] + [""])[:6]
        given = " ".join(filter(None, others[:2]))
        if whole := ", ".join(filter(None, [family, given, *others[2:]])):
            written.append(whole)
    return " · ".join(written) or "No name"


def day(date: str) -> str:
    """`20240131` as `2024-01-31`; anything else as it is."""
    known = len(date) == 8 and date.isdigit()
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if known else date or "–"


def span(seconds: float) -> str:
    """A length of time: `4.2 s`, `35 s`, `12 min`, `3 h`, `5 days`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds / size < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def clock(at: float) -> str:
    """A time in the zone of this machine, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def machine_time(at: float) -> str:
    """A time for programs."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def gb(size: float) -> str:
    """Bytes as GB."""
    return f"{size / 1e9:,.1f} GB"


def model_name(model: str) -> str:
    """The last part of the folder of a model."""
    return PurePath(model).name or model


def list_address(*, state: str = "all", search: str = "", page: int = 1, still: bool = False) -> str:
    """The address of a page of the list; what is as usual is left out."""
    values = {"state": state if state != "all" else "", "search": search, "page": page if page > 1 else ""}
    query = urlencode({key: value for key, value in values.items() if value} | ({"still": "1"} if still else {}))
    return f"/?{query}" if query else "/"


def study_words(row: StudyRow) -> str:
    """A few words beside the state of a study; empty where there is no more to say."""
    doing = {"running": "being segmented", "queued": "waiting", "sending": "being sent"}.get(row.doing, "")
    words = [
        "being received" if row.receiving and row.state == "in-work" else doing,
        f"{row.jobs_done} of {row.jobs} done" if row.jobs > 1 else "",
    ]
    return ", ".join(filter(None, words))


def step_marks(job: JobView) -> Mapping[str, str]:
    """For each step: done, now, failed or open."""
    after = {"dead": "failed", "queued": "open", "done": "done", "superseded": "open"}.get(job.state, "now")
    marks = {}
    for number, step in enumerate(ALL_STEPS):
        if number < job.done_steps:
            marks[step] = "done"
        else:
            marks[step] = after if number == job.done_steps else "open"
    return marks
