"""DICOMweb as a client that asks and fetches: QIDO-RS for series (PS3.18 10.6), WADO-RS for their files (10.4)."""

from __future__ import annotations

import json
import logging
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx

import medseg
from medseg_pipelines.hospital.multipart import PartsError, each_part
from medseg_pipelines.hospital.settings import DicomwebSettings

# it logs each address, and UIDs stand in them
logging.getLogger("httpx").setLevel(logging.WARNING)

TIMEOUT_S = 30.0
# of a page of series, in bytes: 16 kB for each
MOST_ANSWER = 2**23
PAGE, MOST_PAGES = 500, 200
# files of a series: the largest scans have a tenth of it
MOST_FILES = 100_000
# what unfolds on the way, a few bytes could fill the memory with: of several layers even one block of them
PLAIN = {"Accept-Encoding": "identity"}
# Orthanc without gdcm answers HTTP 500 where a transfer syntax is asked for that it would have to make
ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*'
CHECKS = {401: "`user` and `password_file`", 403: "the rights of `user`", 404: "`url`"}


class ServiceError(Exception):
    """A DICOMweb service does not answer, or not as it should; the text says what to check, nothing of a patient."""


@contextmanager
def connected(service: DicomwebSettings) -> Iterator[httpx.Client]:
    """A client of the service. Raises `ConfigError`, and `ServiceError` for whatever fails on the way."""
    try:
        password = service.password_file.read_text(encoding="utf-8").strip() if service.password_file else ""
        verify = ssl.create_default_context(cafile=service.authority)
    except (OSError, UnicodeDecodeError) as error:
        raise medseg.ConfigError(
            f"dicomweb {service.url}: `password_file` or `authority` cannot be read ({type(error).__name__}), expected "
            "a text file and PEM"
        ) from error
    client = httpx.Client(
        auth=None if service.user is None else (service.user, password),
        verify=verify,
        headers=PLAIN,
        timeout=TIMEOUT_S,
        # proxies of the environment are for browsers; a redirection could lead anywhere
        trust_env=False,
        follow_redirects=False,
    )
    with client:
        try:
            yield client
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceError(
                f"{service.url}: no answer ({type(error).__name__}); check that it runs, `url` and `authority`"
            ) from error


def find_series(client: httpx.Client, service: DicomwebSettings, asked: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What the service knows of the series that match `asked` (DICOM keywords): DICOM JSON, one after the other."""
    for page in range(MOST_PAGES):
        params = {**asked, "includefield": "00201209", "limit": str(PAGE), "offset": str(page * PAGE)}
        found = _asked(client, service, params)
        yield from found
        if len(found) < PAGE:
            return


def fetch_series(
    client: httpx.Client,
    service: DicomwebSettings,
    study_uid: str,
    series_uid: str,
    new_file: Callable[[], AbstractContextManager[Path]],
    *,
    most_bytes: int,
) -> Iterator[Path]:
    """The files of a series, written one after the other by `new_file`. The UIDs must be valid ones."""
    address = f"{_base(service)}/studies/{study_uid}/series/{series_uid}"
    with client.stream("GET", address, headers={"Accept": ACCEPT}) as answer:
        _check(service, answer)
        try:
            parts = each_part(
                answer.iter_raw(), answer.headers.get("Content-Type", ""), new_file, most_bytes=most_bytes
            )
            for number, part in enumerate(parts):
                if number >= MOST_FILES:
                    raise PartsError(f"more than {MOST_FILES} files")
                yield part
        except PartsError as error:
            raise ServiceError(
                f"{service.url}: {error} found, expected all files of a series; check its log"
            ) from error


def value_of(item: Mapping[str, Any], tag: str) -> Any:
    """The first value of an element in DICOM JSON; None where there is none."""
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None


def _asked(client: httpx.Client, service: DicomwebSettings, params: Mapping[str, str]) -> list[dict[str, Any]]:
    headers = {"Accept": "application/dicom+json"}
    with client.stream("GET", f"{_base(service)}/series", params=dict(params), headers=headers) as answer:
        _check(service, answer)
        body = bytearray()
        for block in answer.iter_raw():
            body += block
            if len(body) > MOST_ANSWER:
                raise ServiceError(f"{service.url}: a list of more than {MOST_ANSWER} bytes found; check its log")
    if not body:
        # nothing found: 204
        return []
    try:
        found = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"{service.url}: no JSON found, expected a list of series; check `url`") from error
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _check(service: DicomwebSettings, answer: httpx.Response) -> None:
    if answer.status_code not in (200, 204):
        check = CHECKS.get(answer.status_code, "its log")
        raise ServiceError(f"{service.url}: HTTP {answer.status_code} found, expected 200; check {check}")
    if is_packed(answer):
        raise ServiceError(f"{service.url}: a compressed answer found, expected none; turn that off there")


def is_packed(answer: httpx.Response) -> bool:
    """Whether an answer would have to be decompressed; its bytes are taken as they come."""
    return answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")


def _base(service: DicomwebSettings) -> str:
    return service.url.rstrip("/")
