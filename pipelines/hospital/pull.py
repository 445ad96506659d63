"""Series that a PACS has are fetched: found by C-FIND and moved by C-MOVE to the gateway, or by QIDO-RS and WADO-RS.

It also asks how many instances a series has there, which tells when it is complete here.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from io import BytesIO
from typing import Any

import sqlalchemy as sa
from pynetdicom.association import Association
from pynetdicom.dsutils import decode

from medseg_pipelines.hospital.completeness import CountOf, NoAnswerError
from medseg_pipelines.hospital.database import series
from medseg_pipelines.hospital.dicomweb import ServiceError, connected, fetch_series, find_series, value_of
from medseg_pipelines.hospital.dimse import PeerUnreachable, associated
from medseg_pipelines.hospital.intake import NoRoomError, RefusedError
from medseg_pipelines.hospital.jobs import digest
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.settings import DicomwebSettings, NodeSettings, PeerSettings, PullSettings

log = logging.getLogger(__name__)

FIND, MOVE = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2"
SYNTAXES = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"]
PENDING = (0xFF00, 0xFF01)
SUCCESS = 0x0000
FIND_S = 30.0
# between two answers of a C-MOVE; many peers give none before all is sent
MOVE_S = 900.0
# a series of which fewer came than its peer counts is fetched again later and later
FIRST_PAUSE_S, MOST_PAUSE_S = 60.0, 3600.0
MOST_FOUND = 10_000
UID = re.compile(r"[0-9.]{1,64}")
# DICOM JSON
STUDY, SERIES, DESCRIPTION, COUNT = "0020000D", "0020000E", "0008103E", "00201209"


@dataclass(frozen=True)
class Found:
    """A series that a peer has. `count`: of its instances; None where the peer does not tell."""

    study_uid: str
    series_uid: str
    description: str
    count: int | None


class Puller:
    """Asks one peer or service again and again, and fetches what matches and is not here in full."""

    def __init__(self, settings: PullSettings, node: Node, *, most_bytes: int) -> None:
        self._settings, self._node, self._most_bytes = settings, node, most_bytes
        self._tries: dict[str, tuple[int, float]] = {}
        self._is_down = False

    def look(self) -> int:
        """How many series were fetched, or begun to be. A peer that is down is told once, and asked again next time."""
        try:
            fetched = self._fetch_all()
        except (PeerUnreachable, ServiceError) as error:
            if not self._is_down:
                log.error("pull: %s; it is asked again", error)
            self._is_down = True
            return 0
        except NoRoomError as error:
            log.error("pull: nothing is fetched: %s", error)
            return 0
        if self._is_down:
            log.info("pull: %s answers again", self._settings.peer or self._settings.dicomweb)
        self._is_down = False
        return fetched

    def _fetch_all(self) -> int:
        settings, known = self._node.settings, self._settings
        if known.peer is not None:
            return self._by_dimse(settings.peers[known.peer])
        return self._by_dicomweb(settings.dicomweb[str(known.dicomweb)])

    def _by_dimse(self, peer: PeerSettings) -> int:
        ae_title = self._node.settings.gateway.ae_title
        with associated(peer, ae_title=ae_title, contexts=[(FIND, SYNTAXES)], timeout_s=FIND_S) as association:
            found = list(_find_recent(association, self._settings, peer))
        wanted = [one for one in found if self._wants(one)]
        if not wanted:
            return 0
        with associated(peer, ae_title=ae_title, contexts=[(MOVE, SYNTAXES)], timeout_s=MOVE_S) as association:
            for one in wanted:
                self._note(one)
                _move(association, one, ae_title, peer)
        return len(wanted)

    def _by_dicomweb(self, service: DicomwebSettings) -> int:
        sent_by = str(self._settings.dicomweb)
        asked = {"Modality": self._settings.modality, "StudyDate": _dates(self._settings)}
        with connected(service) as client:
            wanted = [one for one in map(_from_json, find_series(client, service, asked)) if one and self._wants(one)]
            for one in wanted:
                self._note(one)
                files = fetch_series(
                    client,
                    service,
                    one.study_uid,
                    one.series_uid,
                    self._node.store.new_file,
                    most_bytes=self._most_bytes,
                )
                self._node.intake.check_room()
                for file in files:
                    self._node.intake.check_room()
                    try:
                        self._node.intake.take(file, sent_by=sent_by)
                    except RefusedError:
                        # it is written down; the others of the series may be well
                        continue
        return len(wanted)

    def _wants(self, one: Found) -> bool:
        """Whether a series matches, and is not here in full."""
        if not re.search(self._settings.series_description, one.description, re.IGNORECASE):
            return False
        with self._node.database.reading() as connection:
            here = connection.scalar(sa.select(series.c.images).where(series.c.id == digest(one.series_uid))) or 0
        if here >= (one.count or 1):
            self._tries.pop(one.series_uid, None)
            return False
        return time.monotonic() >= self._tries.get(one.series_uid, (0, 0.0))[1]

    def _note(self, one: Found) -> None:
        tries = self._tries.get(one.series_uid, (0, 0.0))[0] + 1
        pause_s = min(FIRST_PAUSE_S * 2.0 ** (tries - 1), MOST_PAUSE_S)
        self._tries[one.series_uid] = (tries, time.monotonic() + pause_s)
        log.info("pull: series %s is fetched (%s instances)", digest(one.series_uid), one.count or "some")


def count_of(settings: NodeSettings) -> CountOf | None:
    """What completeness asks a peer or a service with; None where neither is to be asked."""
    asked = settings.completeness
    if asked.ask_peer is not None:
        peer = settings.peers[asked.ask_peer]
        return _answering(lambda study, one: _count_by_dimse(peer, settings.gateway.ae_title, study, one))
    if asked.ask_dicomweb is not None:
        service = settings.dicomweb[asked.ask_dicomweb]
        return _answering(lambda study, one: _count_by_dicomweb(service, study, one))
    return None


def _answering(ask: CountOf) -> CountOf:
    """The same, with what is wrong told once until it is well again."""
    state = {"down": False}

    def answer(study_uid: str, series_uid: str) -> int | None:
        try:
            count = ask(study_uid, series_uid)
        except (PeerUnreachable, ServiceError) as error:
            if not state["down"]:
                log.error("completeness: %s; series wait for it", error)
            state["down"] = True
            raise NoAnswerError from error
        state["down"] = False
        return count

    return answer


def _count_by_dimse(peer: PeerSettings, ae_title: str, study_uid: str, series_uid: str) -> int | None:
    with associated(peer, ae_title=ae_title, contexts=[(FIND, SYNTAXES)], timeout_s=FIND_S) as association:
        found = list(_find_series(association, study_uid, peer, series_uid=series_uid))
    return next((one.count for one in found if one.series_uid == series_uid), None)


def _count_by_dicomweb(service: DicomwebSettings, study_uid: str, series_uid: str) -> int | None:
    asked = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid}
    with connected(service) as client:
        found = [one for one in map(_from_json, find_series(client, service, asked)) if one]
    return next((one.count for one in found if one.series_uid == series_uid), None)


def _find_recent(association: Association, settings: PullSettings, peer: PeerSettings) -> Iterator[Found]:
    asked = _empty()
    asked.QueryRetrieveLevel = "STUDY"
    asked.StudyInstanceUID = ""
    asked.StudyDate = _dates(settings)
    asked.ModalitiesInStudy = settings.modality
    studies = [_word(answer, "StudyInstanceUID", peer) for answer in _answers(association, asked, peer)]
    for study_uid in filter(UID.fullmatch, studies):
        yield from _find_series(association, study_uid, peer, modality=settings.modality)


def _find_series(
    association: Association, study_uid: str, peer: PeerSettings, *, modality: str = "", series_uid: str = ""
) -> Iterator[Found]:
    asked = _empty()
    asked.QueryRetrieveLevel = "SERIES"
    asked.StudyInstanceUID = study_uid
    asked.SeriesInstanceUID = series_uid
    asked.Modality = modality
    asked.SeriesDescription = ""
    asked.NumberOfSeriesRelatedInstances = ""
    for answer in _answers(association, asked, peer):
        found = _word(answer, "SeriesInstanceUID", peer)
        # keys that a peer does not match by, it leaves open
        if UID.fullmatch(found) and (not modality or _word(answer, "Modality", peer) in ("", modality)):
            count = _whole(_word(answer, "NumberOfSeriesRelatedInstances", peer))
            yield Found(study_uid, found, _word(answer, "SeriesDescription", peer), count)


def _answers(association: Association, asked: Any, peer: PeerSettings) -> Iterator[Any]:
    """What a peer finds. Raises `PeerUnreachable` where it fails, or falls silent."""
    found = 0
    for status, answer in _sent(lambda: association.send_c_find(asked, FIND), peer):
        code = status.get("Status")
        if code in PENDING and answer is not None:
            found += 1
            if found > MOST_FOUND:
                raise PeerUnreachable(
                    f"{peer.ae_title}: more than {MOST_FOUND} answers to C-FIND; ask for fewer `days`"
                )
            yield answer
        elif code != SUCCESS:
            raise PeerUnreachable(f"{peer.ae_title}: C-FIND fails ({_code(code)}); check its log")


def _word(answer: Any, keyword: str, peer: PeerSettings) -> str:
    """A value of an answer as text; empty where there is none. Raises `PeerUnreachable` where it cannot be read."""
    try:
        return str(answer.get(keyword) or "")
    except Exception as error:  # noqa: BLE001
        # values are read when they are asked for, and what pydicom raises for bad ones has no common class
        raise PeerUnreachable(
            f"{peer.ae_title}: {keyword} of an answer to C-FIND cannot be read ({type(error).__name__}); check its log"
        ) from None


def _move(association: Association, one: Found, ae_title: str, peer: PeerSettings) -> None:
    asked = _empty()
    asked.QueryRetrieveLevel = "SERIES"
    asked.StudyInstanceUID = one.study_uid
    asked.SeriesInstanceUID = one.series_uid
    code = None
    for status, _ in _sent(lambda: association.send_c_move(asked, ae_title, MOVE), peer):
        code = status.get("Status")
    if code is None:
        raise PeerUnreachable(f"{peer.ae_title}: no answer to C-MOVE; check its log")
    if code != SUCCESS:
        # the next series may be well
        log.error(
            "pull: %s: C-MOVE of series %s fails (status 0x%04X); check that it knows %s and where it listens, and "
            "that `allow` has it",
            peer.ae_title,
            digest(one.series_uid),
            code,
            ae_title,
        )


def _sent(send: Callable[[], Iterator[tuple[Any, Any]]], peer: PeerSettings) -> Iterator[tuple[Any, Any]]:
    try:
        yield from send()
    except (RuntimeError, ValueError) as error:
        raise PeerUnreachable(f"{peer.ae_title}: the association broke; check its log") from error


def _code(code: int | None) -> str:
    return "no answer" if code is None else f"status 0x{code:04X}"


def _from_json(item: dict[str, Any]) -> Found | None:
    study_uid, series_uid = (str(value_of(item, tag) or "") for tag in (STUDY, SERIES))
    if not (UID.fullmatch(study_uid) and UID.fullmatch(series_uid)):
        return None
    return Found(study_uid, series_uid, str(value_of(item, DESCRIPTION) or ""), _whole(value_of(item, COUNT)))


def _whole(value: Any) -> int | None:
    text = str(value if value is not None else "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _dates(settings: PullSettings) -> str:
    today = date.today()
    return f"{today - timedelta(days=settings.days):%Y%m%d}-{today:%Y%m%d}"


def _empty() -> Any:
    # the class of data sets belongs to a library that only readers and writers import
    return decode(BytesIO(), True, True)
