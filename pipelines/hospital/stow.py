"""Results to a DICOMweb service by STOW-RS (PS3.18 10.5), one request for each file."""

from __future__ import annotations

import json
import ssl
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from medseg_pipelines.hospital.dicomweb import PLAIN, is_packed
from medseg_pipelines.hospital.parcels import DestinationDownError, Parcel, Said, Tell, said_of_status
from medseg_pipelines.hospital.settings import DicomwebSettings
from medseg_pipelines.hospital.store import BLOCK

FAILED, REFERENCED = "00081198", "00081199"
INSTANCE, FAILURE_REASON = "00081155", "00081197"
# of an answer, in bytes: it names one object
MOST_ANSWER = 2**20
CHECKS = {
    401: "user and password are not accepted; check `user` and `password_file`",
    403: "the user may not store; give it the right to",
    404: "there is no such service; check `url`",
    405: "there is no such service; check `url`",
}


@dataclass(frozen=True)
class DicomwebSender:
    """To a DICOMweb service. `timeout_s`: for the connection, and for each step of request and answer."""

    service: DicomwebSettings
    timeout_s: float

    def send(self, parcels: Sequence[Parcel], tell: Tell) -> None:
        """Sends them over one connection. Raises `DestinationDownError`."""
        with self._client() as client:
            for parcel in parcels:
                if not parcel.sop_instance_uid:
                    tell(parcel, Said.NEVER, "it is no DICOM file, and the destination is DICOMweb; change `formats`")
                    continue
                tell(parcel, *self._sent(client, parcel))

    def _client(self) -> httpx.Client:
        service = self.service
        try:
            password = service.password_file.read_text(encoding="utf-8").strip() if service.password_file else ""
            verify = ssl.create_default_context(cafile=service.authority)
        except (OSError, UnicodeDecodeError) as error:
            raise DestinationDownError(
                f"{service.url}: `password_file` or `authority` cannot be read ({type(error).__name__}); check them"
            ) from error
        return httpx.Client(
            auth=None if service.user is None else (service.user, password),
            verify=verify,
            headers=PLAIN,
            timeout=self.timeout_s,
            # proxies of the environment are for browsers; a redirection would carry an object elsewhere
            trust_env=False,
            follow_redirects=False,
        )

    def _sent(self, client: httpx.Client, parcel: Parcel) -> tuple[Said, str]:
        try:
            code, body = self._posted(client, parcel)
            if code in (200, 202, 409):
                return self._understood(client, code, body, parcel)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise DestinationDownError(f"{self.service.url}: no URL of http or https; check `url`") from error
        except httpx.ConnectError as error:
            raise DestinationDownError(f"{self.service.url}: {_why_no_connection(error)}") from error
        except httpx.HTTPError as error:
            raise DestinationDownError(
                f"{self.service.url}: the connection broke in the middle of an object, or there was no answer in time "
                f"({type(error).__name__}); check that it runs, and its log",
                during=parcel,
            ) from error
        if code in CHECKS:
            raise DestinationDownError(f"{self.service.url}: HTTP {code}: {CHECKS[code]}")
        if code == 429 or code >= 500:
            raise DestinationDownError(
                f"{self.service.url}: HTTP {code}: it is busy or broken; check its log", during=parcel
            )
        if 300 <= code < 400:
            raise DestinationDownError(f"{self.service.url}: HTTP {code}: it is elsewhere; check `url`")
        return Said.LATER, f"refused with HTTP {code}; the log of the service says more"

    def _posted(self, client: httpx.Client, parcel: Parcel) -> tuple[int, bytes]:
        boundary = uuid.uuid4().hex
        # no transfer syntax here: Orthanc 1.10 leaves such a part out, and answers 200 all the same
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            # else it is sent in chunks, which not every service knows
            "Content-Length": str(len(head) + parcel.path.stat().st_size + len(tail)),
            "Accept": "application/dicom+json",
        }
        content = _pieces(head, parcel.path, tail)
        return _answered(client, "POST", f"{self._url}/studies", content=content, headers=headers)

    def _understood(self, client: httpx.Client, code: int, body: bytes, parcel: Parcel) -> tuple[Said, str]:
        """What an answer says of our object: only what is listed as stored is; where in doubt, it is looked for."""
        answer = _read_json(body)
        reason = f"HTTP {code} without a word on the object; the log of the service says more"
        for item in _items(answer, FAILED):
            if _value(item, INSTANCE) in (parcel.sop_instance_uid, None):
                status = _value(item, FAILURE_REASON)
                said, reason = said_of_status(status if isinstance(status, int) else 0x0110)
                if said is None:
                    raise DestinationDownError(f"{self.service.url}: {reason}", during=parcel)
                if said is not Said.LATER:
                    return said, reason
        listed = any(_value(item, INSTANCE) == parcel.sop_instance_uid for item in _items(answer, REFERENCED))
        # some answer nothing, or take what they have already for a failure
        if listed or self._has(client, parcel):
            return Said.STORED, ""
        return Said.LATER, reason

    def _has(self, client: httpx.Client, parcel: Parcel) -> bool:
        query = f"{self._url}/instances?SOPInstanceUID={parcel.sop_instance_uid}"
        code, body = _answered(client, "GET", query, headers={"Accept": "application/dicom+json"})
        found = _read_json(body)
        return (
            code == 200
            and isinstance(found, list)
            and any(isinstance(item, dict) and _value(item, "00080018") == parcel.sop_instance_uid for item in found)
        )

    @property
    def _url(self) -> str:
        return self.service.url.rstrip("/")


def _answered(
    client: httpx.Client,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    content: Iterator[bytes] | None = None,
) -> tuple[int, bytes]:
    """Code and body of an answer; a body that is too long is cut off, a compressed one left out: not understood."""
    with client.stream(method, url, content=content, headers=headers) as got:
        body = b""
        for block in () if is_packed(got) else got.iter_raw():
            body += block
            if len(body) > MOST_ANSWER:
                break
        return got.status_code, body


def _pieces(head: bytes, path: Path, tail: bytes) -> Iterator[bytes]:
    yield head
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block
    yield tail


def _why_no_connection(error: httpx.ConnectError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted; give that of who signed it as `authority`, and its name in `url`"
    if "SSL" in str(error):
        return "no TLS connection comes about; check whether it speaks https"
    return "nothing answers; check that it runs, and `url`"


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        # XML, or nothing: the code speaks alone
        return None


def _items(answer: Any, tag: str) -> list[Mapping[str, Any]]:
    # some wrap the data set in a list
    found = answer[0] if isinstance(answer, list) and answer else answer
    element = found.get(tag) if isinstance(found, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    return [item for item in values if isinstance(item, dict)] if isinstance(values, list) else []


def _value(item: Mapping[str, Any], tag: str) -> Any:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None
