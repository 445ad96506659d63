"""Files taken in, series closed, jobs queued: the same on SQLite and on PostgreSQL; and what they are made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hospital_node import (
    ROOT,
    check_kept,
    closing_series,
    complete,
    counter,
    gateway,
    header,
    jobs_of,
    leaks,
    model_folder,
    node_settings,
    rows_of,
    send,
    series_uid,
    slices,
    the_series,
)
from hospital_peers import PostgresServer, wait_for
from pydicom.uid import UID

import medseg
from medseg_pipelines.hospital.completeness import Completeness, NoAnswerError
from medseg_pipelines.hospital.database import instances, refusals, series
from medseg_pipelines.hospital.intake import NoRoomError, RefusedError
from medseg_pipelines.hospital.models import Models, model_of
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.rules import SeriesKnown, select
from medseg_pipelines.hospital.settings import RuleSettings, WhenSettings
from medseg_pipelines.hospital.store import Store, sha256_of
from medseg_pipelines.hospital.threads import told

MakeNode = Callable[..., Node]


@pytest.fixture(params=["sqlite", "postgresql"])
def make_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeNode]:
    """Opens a part of a node; all parts of a test share one database."""
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    made: list[Node] = []

    def make(number: int = 0, **changes: Any) -> Node:
        made.append(open_node(node_settings(tmp_path, database=url, **changes), "gateway", number))
        return made[-1]

    yield make
    for node in made:
        node.close()


def take(node: Node, files: list[Path], sent_by: str = "SCANNER") -> list[str]:
    """What became of copies of files."""
    outcome = []
    for file in files:
        with node.store.new_file() as copy:
            copy.write_bytes(file.read_bytes())
            try:
                outcome.append(node.intake.take(copy, sent_by=sent_by).what)
            except RefusedError as error:
                outcome.append(str(error))
    return outcome


def closing(node: Node, count_of: Any = None) -> Completeness:
    return Completeness(node.database, node.jobs, node.settings, node.audit, count_of=count_of)


def made_quiet(node: Node, *, seconds: float = 60.0) -> None:
    """As if that time had passed since anything came, or was asked."""
    with node.database.writing() as connection:
        connection.execute(series.update().values(last_at=series.c.last_at - seconds, asked_at=None))


def clear(node: Node) -> None:
    """All that is there goes, as housekeeping does it."""
    with node.database.writing() as connection:
        connection.execute(instances.update().values(gone_at=1.0))
    for row in rows_of(node, instances):
        (node.store.folder / row.file).unlink()


def changed_slices(folder: Path, count: int, **elements: str) -> list[Path]:
    """The slices of series 1 with other elements."""
    folder.mkdir()
    paths = []
    for k in range(count):
        made = header(1, k)
        for name, value in elements.items():
            setattr(made, name, value)
        paths.append(folder / f"{k}.dcm")
        made.save_as(paths[-1], enforce_file_format=True)
    return paths


# ---- intake


def test_a_file_is_new_then_known_and_another_content_is_a_copy(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node()
    (file,) = slices(tmp_path / "ct", 1)
    assert take(node, [file, file]) == ["new", "known"]
    other = header(1, 0)
    other.WindowCenter = 40
    other.save_as(tmp_path / "other.dcm", enforce_file_format=True)
    assert take(node, [tmp_path / "other.dcm", tmp_path / "other.dcm"]) == ["copy", "known"]
    assert the_series(node).images == 1
    assert sorted(row.is_copy for row in check_kept(node)) == [False, True]
    assert [counter(node, name) for name in ("received", "received_again", "received_copies")] == [1, 2, 1]
    assert list(node.store.incoming.iterdir()) == []


def test_a_uid_that_two_series_have_leaves_neither_incomplete(make_node: MakeNode, tmp_path: Path) -> None:
    """As where a PACS has moved images to a new series, and kept their UIDs."""
    node = make_node(completeness={"quiet_s": 0.001})
    first, moved = slices(tmp_path / "ct", 3), changed_slices(tmp_path / "pacs", 3, SeriesInstanceUID=series_uid(2))
    assert take(node, first) == take(node, moved) == ["new"] * 3
    made_quiet(node)
    assert closing(node).look() == 2
    assert [the_series(node, number).images for number in (1, 2)] == [3, 3]
    assert [len(jobs_of(node, number)) for number in (1, 2)] == [1, 1]
    assert [len(job.files) for job in iter(lambda: node.jobs.claim(node.me), None)] == [3, 3]


def test_what_comes_again_of_two_contents_holds(make_node: MakeNode, tmp_path: Path) -> None:
    """The scanner sent one, the PACS another; both were removed as published long ago, and the PACS sends its own."""
    node = make_node(completeness={"quiet_s": 0.001})
    look = closing(node)
    scanner, pacs = slices(tmp_path / "ct", 3), changed_slices(tmp_path / "pacs", 3, InstitutionName="of the PACS")
    assert take(node, scanner) == ["new"] * 3
    assert take(node, pacs) == ["copy"] * 3
    made_quiet(node)
    assert look.look() == 1
    clear(node)
    late = slices(tmp_path / "late", 1, first=3)
    assert take(node, late) == ["new"]
    assert take(node, pacs) == ["known"] * 3
    made_quiet(node)
    assert look.look() == 1
    (_, second) = jobs_of(node)
    (job,) = [job for job in iter(lambda: node.jobs.claim(node.me), None) if job.id == second.id]
    kept = sorted(sha256_of(node.store.folder / file) for file in job.files)
    assert kept == sorted(map(sha256_of, [*pacs, *late]))


def test_what_is_no_dicom_file_is_quarantined_without_its_name(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node()
    bad = tmp_path / "Tweety.dcm"
    bad.write_bytes(b"Tweety" * 100)
    (reason,) = take(node, [bad])
    (row,) = rows_of(node, refusals)
    assert row.reason == reason
    assert "DICM" in reason
    assert sha256_of(node.store.folder / row.file) == sha256_of(bad)
    assert counter(node, "refused") == 1
    assert leaks(node.settings.folder, reason) == []


def test_what_was_never_a_file_can_be_refused(make_node: MakeNode) -> None:
    node = make_node()
    error = node.intake.refuse(None, sent_by="SCANNER", reason="too large")
    assert isinstance(error, RefusedError)
    (row,) = rows_of(node, refusals)
    assert (row.reason, row.file) == ("too large", "")


def test_no_room_is_counted(make_node: MakeNode) -> None:
    node = make_node(storage={"least_free_gb": 1e9})
    with pytest.raises(NoRoomError, match="least_free_gb"):
        node.intake.check_room()
    assert counter(node, "refused_no_room") == 1


def test_many_threads_take_one_series_once(make_node: MakeNode, tmp_path: Path) -> None:
    nodes = [make_node(number) for number in range(2)]
    files = slices(tmp_path / "ct", 8)
    threads = [threading.Thread(target=take, args=(nodes[n % 2], files[n % 3 :] + files[: n % 3])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(check_kept(nodes[0])) == 8
    assert the_series(nodes[0]).images == 8
    assert counter(nodes[0], "received") == 8
    assert counter(nodes[0], "received_again") == 24


def test_a_series_in_two_studies_keeps_its_first(
    make_node: MakeNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = make_node()
    take(node, slices(tmp_path / "ct", 1))
    other = header(1, 1)
    other.StudyInstanceUID = f"{ROOT}.99"
    other.save_as(tmp_path / "other.dcm", enforce_file_format=True)
    assert take(node, [tmp_path / "other.dcm"]) == ["new"]
    assert the_series(node).study_uid == f"{ROOT}.0"
    assert "comes with another study UID" in caplog.text


def test_a_failing_database_shows_no_values(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node()
    with node.database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE series RENAME TO away")
    with pytest.raises(sa.exc.DBAPIError) as error:
        take(node, slices(tmp_path / "ct", 1))
    assert "Tweety" not in str(error.value)
    assert "Tweety" not in told(error.value)


# ---- completeness


def test_a_quiet_series_is_complete_and_flagged(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(completeness={"quiet_s": 30.0})
    take(node, slices(tmp_path / "ct"))
    look = closing(node)
    assert look.look() == 0
    made_quiet(node)
    assert look.look() == 1
    row = the_series(node)
    assert (row.state, row.revision, row.images, row.expected, row.assumed) == ("complete", 1, 5, None, True)
    assert row.selection == "ct: takes it"
    (job,) = jobs_of(node)
    assert (job.state, job.step, job.rule) == ("queued", "selected", "ct")
    assert job.model_sha256 == sha256_of(Path(job.model) / "model.safetensors")
    assert look.look() == 0


def test_a_count_makes_it_certain(make_node: MakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make_node(completeness={"quiet_s": 0.001, "wait_s": 3600.0})
    asked: list[tuple[str, str]] = []

    def count_of(study_uid: str, series_uid: str) -> int:
        asked.append((study_uid, series_uid))
        return 5

    look = closing(node, count_of)
    take(node, slices(tmp_path / "ct", 4))
    made_quiet(node)
    assert look.look() == 0
    assert the_series(node).expected == 5
    # it is not asked for at every look
    assert look.look() == 0
    assert asked == [(f"{ROOT}.0", series_uid(1))]
    take(node, slices(tmp_path / "rest", 1, first=4))
    made_quiet(node)
    assert look.look() == 1
    row = the_series(node)
    assert (row.revision, row.expected, row.assumed) == (1, 5, False)


@pytest.mark.parametrize(("count", "expected"), [(7, 7), (None, None), (0, None), ("down", None)])
def test_what_stays_away_is_waited_for_then_taken_as_it_is_and_flagged(
    make_node: MakeNode, tmp_path: Path, count: Any, expected: int | None
) -> None:
    node = make_node(completeness={"quiet_s": 0.001, "wait_s": 100.0})

    def count_of(study_uid: str, series_uid: str) -> int | None:
        if count == "down":
            raise NoAnswerError
        return count  # type: ignore[no-any-return]

    take(node, slices(tmp_path / "ct"))
    made_quiet(node)
    waits = count in (7, "down")
    assert closing(node, count_of).look() == (0 if waits else 1)
    made_quiet(node)
    assert closing(node, count_of).look() == (1 if waits else 0)
    row = the_series(node)
    assert (row.state, row.expected, row.assumed) == ("complete", expected, True)


def test_a_peer_that_has_fewer_does_not_make_it_certain(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(completeness={"quiet_s": 0.001})
    take(node, slices(tmp_path / "ct"))
    made_quiet(node)
    assert closing(node, lambda *_: 3).look() == 1
    assert the_series(node).assumed


def test_a_slice_that_comes_while_a_peer_is_asked_is_not_left_out(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(completeness={"quiet_s": 0.001})
    late = slices(tmp_path / "late", 1, first=5)

    def count_of(study_uid: str, series_uid: str) -> int:
        take(node, late)
        return 5

    take(node, slices(tmp_path / "ct"))
    made_quiet(node)
    assert closing(node, count_of).look() == 0
    assert the_series(node).state == "receiving"


def test_a_late_slice_is_a_new_revision_with_another_job(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(completeness={"quiet_s": 0.001})
    look = closing(node)
    files = slices(tmp_path / "ct", 6)
    take(node, files[:5])
    made_quiet(node)
    assert look.look() == 1
    # what is known does not open it again
    assert take(node, files[:5]) == ["known"] * 5
    made_quiet(node)
    assert look.look() == 0
    take(node, files[5:])
    assert the_series(node).state == "receiving"
    made_quiet(node)
    assert look.look() == 1
    first, second = jobs_of(node)
    assert (first.revision, second.revision, first.id == second.id) == (1, 2, False)
    assert sorted(row.revision for row in rows_of(node, instances)) == [1] * 5 + [2]


@pytest.mark.parametrize("state", ["queued", "running", "dead", "done"])
def test_a_later_revision_takes_the_place_of_what_is_not_done(make_node: MakeNode, tmp_path: Path, state: str) -> None:
    node = make_node(completeness={"quiet_s": 0.001})
    look = closing(node)
    files = slices(tmp_path / "ct", 6)
    take(node, files[:5])
    made_quiet(node)
    assert look.look() == 1
    job = None if state == "queued" else node.jobs.claim(node.me)
    if job is not None and state == "dead":
        node.jobs.fail(job.id, node.me, "a slice is missing", for_good=True)
    if job is not None and state == "done":
        assert node.jobs.finish(job.id, node.me, {}, [])
    take(node, files[5:])
    # while the rest comes, nobody begins with what is there
    assert node.jobs.claim(node.me) is None
    made_quiet(node)
    assert look.look() == 1
    first, second = jobs_of(node)
    assert (first.state, second.state) == ("done" if state == "done" else "superseded", "queued")
    why = {"done": "", "dead": "a slice is missing"}.get(state, "images came later: revision 2 took its place")
    assert first.reason == why
    if job is not None and state == "running":
        assert not node.jobs.renew(job.id, node.me)
        assert not node.jobs.finish(job.id, node.me, {}, [("pacs", "dicom-seg")])
    assert not node.jobs.replay(first.id)
    claimed = node.jobs.claim(node.me)
    assert claimed is not None
    assert claimed.revision == 2
    assert len(claimed.files) == 6


def test_a_slice_that_comes_when_the_rest_was_removed_makes_no_job_until_all_is_there(
    make_node: MakeNode, tmp_path: Path
) -> None:
    node = make_node(completeness={"quiet_s": 0.001})
    look = closing(node)
    files = slices(tmp_path / "ct", 6)
    take(node, files[:5])
    made_quiet(node)
    assert look.look() == 1
    clear(node)
    take(node, files[5:])
    made_quiet(node)
    assert look.look() == 1
    assert "5 of 6 images were removed" in the_series(node).selection
    assert len(jobs_of(node)) == 1
    take(node, files)
    made_quiet(node)
    assert look.look() == 1
    assert [job.revision for job in jobs_of(node)] == [1, 2]
    # what was done is not done again when it is sent once more
    take(node, files)
    made_quiet(node)
    assert look.look() == 0


def test_what_was_removed_may_come_again_with_another_content(make_node: MakeNode, tmp_path: Path) -> None:
    """A PACS gives back the same image with other bytes: that is no copy of a file that is gone."""
    node = make_node(completeness={"quiet_s": 0.001})
    look = closing(node)
    files = slices(tmp_path / "ct", 3)
    take(node, files)
    made_quiet(node)
    assert look.look() == 1
    clear(node)
    files = changed_slices(tmp_path / "pacs", 3, InstitutionName="of the PACS")
    assert take(node, files[:2]) == ["new", "new"]
    made_quiet(node)
    assert look.look() == 1
    assert "1 of 3 images were removed" in the_series(node).selection
    assert take(node, files[2:]) == ["new"]
    assert take(node, files) == ["known"] * 3
    made_quiet(node)
    assert look.look() == 1
    row, (_, second) = the_series(node), jobs_of(node)
    assert (row.images, row.revision, second.revision) == (3, 3, 3)
    job = node.jobs.claim(node.me)
    assert job is not None
    assert (job.revision, len(job.files)) == (3, 3)
    held = rows_of(node, instances, ~instances.c.is_copy)
    assert sorted(one.sha256 for one in held) == sorted(map(sha256_of, files))


def test_a_series_that_is_sent_again_before_it_is_closed_is_not_quiet(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(completeness={"quiet_s": 30.0})
    files = slices(tmp_path / "ct")
    take(node, files)
    made_quiet(node)
    take(node, files[:1])
    assert closing(node).look() == 0


def test_two_gateways_close_a_series_once(make_node: MakeNode, tmp_path: Path) -> None:
    nodes = [make_node(number, completeness={"quiet_s": 0.001}) for number in range(2)]
    for number in range(1, 6):
        take(nodes[0], slices(tmp_path / "ct", 2, number=number))
    made_quiet(nodes[0])
    closed: list[int] = []
    threads = [threading.Thread(target=lambda n=n: closed.append(closing(n).look())) for n in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(closed) == 5
    assert [len(jobs_of(nodes[0], number)) for number in range(1, 6)] == [1] * 5


def test_a_series_that_no_rule_takes_says_why(make_node: MakeNode, tmp_path: Path) -> None:
    rules = [{"name": "mr", "model": str(tmp_path / "model"), "when": {"modality": ["MR"]}}]
    node = make_node(rules=rules)
    take(node, slices(tmp_path / "ct"))
    made_quiet(node)
    closing(node).look()
    assert the_series(node).selection == "mr: modality is not MR"
    assert jobs_of(node) == []


def test_rules_that_ask_for_the_same_make_one_job_for_all_of_them(make_node: MakeNode, tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path / "model"))
    rules = [{"name": name, "model": folder, "priority": n} for n, name in enumerate(("care", "study"))]
    rules.append({"name": "other", "model": folder, "tta": "flip"})
    node = make_node(completeness={"quiet_s": 0.001}, rules=rules)
    take(node, slices(tmp_path / "ct", 5))
    made_quiet(node)
    assert closing(node).look() == 1
    held = [node.jobs.claim(node.me), node.jobs.claim(node.me)]
    assert [job.rules for job in held if job is not None] == [("care", "study"), ("other",)]
    assert node.jobs.claim(node.me) is None


def test_a_model_that_is_missing_holds_up_its_own_series_alone(make_node: MakeNode, tmp_path: Path) -> None:
    rules = [
        {"name": name, "model": str(model_folder(tmp_path / name)), "when": {"images": [number, number]}}
        for number, name in ((3, "three"), (4, "four"))
    ]
    node = make_node(completeness={"quiet_s": 0.001}, rules=rules)
    look = closing(node)
    for number, count in ((1, 3), (2, 4), (3, 3)):
        take(node, slices(tmp_path / "ct", count, number=number))
    made_quiet(node)
    away = (tmp_path / "three" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(medseg.ConfigError, match=r"rule three: model"):
        look.look()
    assert [the_series(node, number).state for number in (1, 2, 3)] == ["receiving", "complete", "receiving"]
    away.rename(tmp_path / "three" / "model.safetensors")
    assert look.look() == 2


def test_our_own_pictures_that_come_back_make_no_job(make_node: MakeNode, tmp_path: Path) -> None:
    # a rule that takes whatever it is given
    node = make_node(rules=[{"name": "all", "model": str(tmp_path / "model")}])
    made = header()
    made.Modality, made.Manufacturer = "OT", "medseg"
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    made.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    node.intake.take(tmp_path / "x.dcm", sent_by="PACS")
    made_quiet(node)
    closing(node).look()
    assert the_series(node).selection == "no images of a patient"
    assert jobs_of(node) == []


def test_another_model_is_another_job(tmp_path: Path) -> None:
    models = Models()
    rule = RuleSettings(name="ct", model=str(tmp_path / "model"))
    with pytest.raises(medseg.ConfigError, match=r"rule ct.*expected a run folder"):
        model_of(models, rule)
    node_settings(tmp_path)
    before = model_of(models, rule)
    assert model_of(models, rule) == before
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    assert model_of(models, rule).weights_sha256 != before.weights_sha256
    assert model_of(models, rule).description_sha256 == before.description_sha256


# ---- a database that is gone for a while


def test_nothing_is_acknowledged_without_the_database_and_all_goes_on_with_it(
    tmp_path: Path, postgres_server: PostgresServer, postgres: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = slices(tmp_path / "ct")
    with gateway(node_settings(tmp_path, database=postgres)) as node:
        port = node.settings.gateway.port
        assert send(port, files[:2]) == [0, 0]
        postgres_server.stop()
        try:
            assert send(port, files[2:4]) == [0xA700, 0xA700]
            with closing_series(node):
                wait_for(lambda: "completeness does not work" in caplog.text)
        finally:
            postgres_server.start()
        assert send(port, files) == [0] * 5
        complete(node, images=5)
        assert len(check_kept(node)) == 5
    assert leaks(tmp_path / "node", caplog.text) == []


# ---- rules


def known(**changes: Any) -> SeriesKnown:
    base: dict[str, Any] = {
        "modality": "CT",
        "body_part": "HEAD",
        "series_description": "Axial 1.0 Bone",
        "study_description": "Head",
        "protocol_name": "Routine",
        "thickness_mm": 1.0,
        "images": 120,
        "is_image": True,
        "sent_by": "SCANNER",
    }
    return SeriesKnown(**base | changes)


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({}, ""),
        ({"modality": ("MR", "CT")}, ""),
        ({"modality": ("MR", "PT")}, "modality is not MR or PT"),
        ({"body_part": "^head$"}, ""),
        ({"body_part": "chest"}, "body_part does not match"),
        ({"series_description": "bone"}, ""),
        ({"series_description": "soft"}, "series_description does not match"),
        ({"study_description": "neck"}, "study_description does not match"),
        ({"protocol_name": "trauma"}, "protocol_name does not match"),
        ({"not_series_description": "BONE"}, "series_description is ruled out"),
        ({"thickness_mm": (1.0, 2.0)}, ""),
        ({"thickness_mm": (2.0, 5.0)}, "thickness 1 mm is not 2 to 5"),
        ({"images": (120, 120)}, ""),
        ({"images": (1, 119)}, "120 images are not 1 to 119"),
        ({"sent_by": ("OTHER",)}, "sent by another"),
        ({"modality": ("MR",), "images": (1, 2)}, "modality is not MR, 120 images are not 1 to 2"),
    ],
)
def test_a_rule_takes_a_series_or_says_why_not(when: dict[str, Any], reason: str) -> None:
    rule = RuleSettings(name="r", model="m", when=WhenSettings(**when))
    chosen = select([rule], known())
    assert chosen.taken == (() if reason else (rule,))
    assert chosen.reasons == ((f"r: {reason}",) if reason else ())


def test_several_rules_may_take_a_series_and_no_object_is_taken() -> None:
    rules = [RuleSettings(name=name, model="m") for name in ("a", "b")]
    assert str(select(rules, known())) == "a: takes it; b: takes it"
    assert select(rules, known(is_image=False)).reasons == ("no images of a patient",)
    assert str(select([], known())) == "no rules"
    (reason,) = select(
        [RuleSettings(name="t", model="m", when=WhenSettings(thickness_mm=(1, 2)))], known(thickness_mm=None)
    ).reasons
    assert reason == "t: thickness is not told"


# ---- store


def test_a_kept_file_lies_under_a_name_of_its_content(tmp_path: Path) -> None:
    store = Store(tmp_path, least_free_gb=0)
    with store.new_file() as path:
        path.write_bytes(b"content")
        sha256 = sha256_of(path)
        place = store.keep(path, "ab" * 16, sha256)
    assert place == Path("store", "ab", "ab" * 16, f"{sha256[:32]}.dcm")
    assert (tmp_path / place).read_bytes() == b"content"


def test_a_new_file_is_gone_where_it_was_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, least_free_gb=0)
    with store.new_file() as path:
        path.write_bytes(b"content")
    assert not path.exists()
    assert list(store.incoming.iterdir()) == []


def test_room_is_what_is_free_beyond_what_must_stay_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, least_free_gb=2)
    monkeypatch.setattr(Store, "free_bytes", property(lambda self: 3 * 10**9))
    assert store.has_room(10**9)
    assert not store.has_room(10**9 + 1)


def test_only_what_is_old_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path, least_free_gb=0)
    old = store.incoming / "tmpx.dcm"
    old.write_bytes(b"x")
    now = old.stat().st_mtime
    assert store.sweep(60, now + 59) == 0
    assert store.sweep(60, now + 61) == 1
    assert not old.exists()


def test_every_association_has_a_connection_to_the_database(make_node: MakeNode) -> None:
    """A database that hangs is waited for by each on its own; those that keep the gateway alive are not shut out."""
    node = make_node()
    with ExitStack() as held:
        for _ in range(node.settings.gateway.most_associations + 5):
            held.enter_context(node.database.reading())
        node.beat()
