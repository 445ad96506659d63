"""What a hospital node is told: one frozen class per section of its YAML; read and checked here, used everywhere."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

import medseg

AE_TITLE = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _ae_title(text: str) -> str:
    if not AE_TITLE.fullmatch(text):
        raise ValueError(f"{text!r} found, expected an AE title: 1 to 16 characters of ASCII without a backslash")
    return text


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"{text!r} found, expected a name of letters, digits, `_`, `.` and `-`")
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} found, expected a regular expression ({error})") from error
    return text


def _network(value: object) -> object:
    try:
        return ipaddress.ip_network(str(value), strict=False)
    except ValueError as error:
        raise ValueError(f"{value!r} found, expected an address or a network such as 10.1.0.0/16") from error


AeTitle = Annotated[str, AfterValidator(_ae_title)]
Name = Annotated[str, AfterValidator(_name)]
Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, BeforeValidator(_network)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Port = Annotated[int, Field(ge=1, le=65535)]
Format = Literal["nifti", "dicom-seg", "rtstruct", "dicom-sr", "dicom-sc"]


class Section(BaseModel):
    """Base of all sections: values are frozen, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class TlsSettings(Section):
    """Certificate and key of this node, PEM. `authority`: who must have signed that of the other side (mutual TLS)."""

    certificate: Path
    key: Path
    authority: Path | None = None


class PeerSettings(Section):
    """Another DICOM node. `tls`: speak TLS to it, with our certificate where one is given."""

    ae_title: AeTitle
    host: str
    port: Port
    tls: TlsSettings | None = None


class AllowedSettings(Section):
    """Who may send: an AE title, and the address or network it calls from (none: any)."""

    ae_title: AeTitle
    network: Network | None = None


class GatewaySettings(Section):
    """DICOM in by C-STORE. `allow` empty: everybody, which is told at the start.

    `most_associations`, `idle_s` (without a message), `handshake_s` (until an association stands) bound what peers can
    hold. A file above `most_mb` is refused.
    """

    ae_title: AeTitle = "MEDSEG"
    host: str = "127.0.0.1"
    port: Port = 11112
    allow: tuple[AllowedSettings, ...] = ()
    tls: TlsSettings | None = None
    most_associations: PositiveInt = 20
    idle_s: PositiveFloat = 60.0
    handshake_s: PositiveFloat = 10.0
    most_mb: PositiveFloat = 2048.0


class WatchSettings(Section):
    """A folder whose DICOM files and zip archives are taken in; done ones are moved to `taken`, others to `refused`."""

    folder: Path
    every_s: PositiveFloat = 2.0


class PullSettings(Section):
    """Series that are fetched: asked for every `every_s` seconds, those of the last `days` days that match.

    `peer`: by C-FIND and C-MOVE (which sends to `gateway`); `dicomweb`: by QIDO and WADO.
    """

    peer: Name | None = None
    dicomweb: Name | None = None
    modality: str = "CT"
    series_description: Pattern = ""
    days: PositiveInt = 1
    every_s: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _one_way(self) -> PullSettings:
        if (self.peer is None) == (self.dicomweb is None):
            raise ValueError("expected one of `peer` and `dicomweb`")
        return self


class DicomwebSettings(Section):
    """A DICOMweb service. `password_file`: holds the password of `user`; `authority`: PEM of who signed its key."""

    url: str
    user: str | None = None
    password_file: Path | None = None
    authority: Path | None = None


class StorageSettings(Section):
    """The disk. Below `least_free_gb` nothing is taken in any more; what is published goes after `keep_days`."""

    least_free_gb: NonNegativeFloat = 10.0
    keep_days: PositiveFloat | None = 30.0


class CompletenessSettings(Section):
    """When a series is all there: by the count that a peer tells, else when nothing came for `quiet_s` seconds.

    `ask_peer` (C-FIND) or `ask_dicomweb` (QIDO) give that count; a series of which fewer are here waits for the rest
    up to `wait_s`, then it is taken as it is and flagged.
    """

    quiet_s: PositiveFloat = 30.0
    ask_peer: Name | None = None
    ask_dicomweb: Name | None = None
    wait_s: PositiveFloat = 900.0


class WhenSettings(Section):
    """What a series must be; what is left out may be anything. Patterns are searched, whatever the case of letters."""

    modality: tuple[str, ...] = ()
    body_part: Pattern = ""
    series_description: Pattern = ""
    study_description: Pattern = ""
    protocol_name: Pattern = ""
    not_series_description: Pattern = ""
    thickness_mm: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    images: tuple[PositiveInt, PositiveInt] | None = None
    sent_by: tuple[str, ...] = ()


class RuleSettings(Section):
    """Which series goes to which model, and what becomes of the result.

    `model`: a run folder or a name of `medseg models`. `formats`: what is made; `send_to`: names of destinations, all
    of them where none is named. The greater `priority` goes first. `resample_tilt`, `resample_gaps`: as in `medseg
    infer`; DICOM objects of such series are refused.
    """

    name: Name
    when: WhenSettings = WhenSettings()
    model: str
    formats: tuple[Format, ...] = ("dicom-seg",)
    send_to: tuple[Name, ...] = ()
    priority: int = Field(default=0, ge=-1000, le=1000)
    tta: Literal["none", "flip", "scale", "auto"] = "auto"
    resample_tilt: bool = False
    resample_gaps: bool = False


class WorkerSettings(Section):
    """What computes. A job has `attempts` goes, with `retry_s` before the second one and twice that before each next.

    The child process that infers ends where it takes longer than `most_s` or more than `most_memory_gb`. A worker
    renews its lease on a job; one that has not for `lease_s` seconds has lost it. `workers`: how many `run` starts.
    `pictures`: whether one of each result is drawn, for the pages.
    """

    workers: PositiveInt = 1
    device: str = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"
    threads: PositiveInt | None = None
    attempts: PositiveInt = 3
    retry_s: NonNegativeFloat = 10.0
    most_s: PositiveFloat = 1800.0
    most_memory_gb: PositiveFloat = 16.0
    lease_s: PositiveFloat = 60.0
    pictures: bool = True


class DestinationSettings(Section):
    """Where results go: one of a `peer` (C-STORE; with `commitment`, storage commitment is asked for), a `dicomweb`
    service (STOW-RS) or a `folder`. `formats`: of what a rule makes, only these; NIfTI goes to folders alone."""

    name: Name
    peer: Name | None = None
    dicomweb: Name | None = None
    folder: Path | None = None
    commitment: bool = False
    formats: tuple[Format, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> DestinationSettings:
        if sum(way is not None for way in (self.peer, self.dicomweb, self.folder)) != 1:
            raise ValueError(f"destination {self.name}: expected one of `peer`, `dicomweb` and `folder`")
        if self.commitment and self.peer is None:
            raise ValueError(f"destination {self.name}: `commitment` is for peers")
        return self


class PublishSettings(Section):
    """How results are sent: again after `retry_s`, twice that each time up to `most_retry_s`, for `give_up_h` hours.

    `ae_title`: what we call ourselves; `at_once`: associations or connections to each destination. Storage commitment
    that is not confirmed within `commitment_wait_s` is asked for again, later each time; peers report on the same
    association, or to the gateway, where they must know this title at its address.
    """

    destinations: tuple[DestinationSettings, ...] = ()
    ae_title: AeTitle = "MEDSEG"
    retry_s: PositiveFloat = 5.0
    most_retry_s: PositiveFloat = 300.0
    give_up_h: PositiveFloat = 168.0
    timeout_s: PositiveFloat = 30.0
    commitment_wait_s: PositiveFloat = 60.0
    at_once: PositiveInt = 4


class UserSettings(Section):
    """Who may see the pages. `password_hash`: what `medseg-hospital password` prints."""

    name: Name
    password_hash: str


class WebSettings(Section):
    """The pages. `secure`: cookies go over TLS alone; leave it on wherever a browser is not on this machine.

    `trusted_proxies`: addresses or networks of proxies before the pages. The address of a browser is then the last one
    in their `X-Forwarded-For` that is none of theirs; without them all browsers count as one where logins are held off.
    """

    host: str = "127.0.0.1"
    port: Port = 8080
    users: tuple[UserSettings, ...] = ()
    tls: TlsSettings | None = None
    secure: bool = True
    trusted_proxies: tuple[Network, ...] = ()
    session_h: PositiveFloat = 8.0


class NodeSettings(Section):
    """All of it. `folder` holds everything that must outlive a restart.

    `node_id`: what stands in `node.id` there; a part does not start where it stands not, as on a disk that is not
    mounted. Without it a new node is made in a folder that has none (with PostgreSQL the database knows better).

    `database`: None, SQLite in that folder; or `postgresql://user@host/name`, for several machines, which then share
    `folder` as well; `database_password_file`: holds the password of that user. `name`: of this machine, in the log
    and on the pages; None: its host name.
    """

    folder: Path
    node_id: str | None = None
    database: str | None = None
    database_password_file: Path | None = None
    name: Name | None = None
    gateway: GatewaySettings = GatewaySettings()
    watch: tuple[WatchSettings, ...] = ()
    pull: tuple[PullSettings, ...] = ()
    storage: StorageSettings = StorageSettings()
    completeness: CompletenessSettings = CompletenessSettings()
    peers: Mapping[Name, PeerSettings] = Field(default_factory=dict)
    dicomweb: Mapping[Name, DicomwebSettings] = Field(default_factory=dict)
    rules: tuple[RuleSettings, ...] = ()
    worker: WorkerSettings = WorkerSettings()
    publish: PublishSettings = PublishSettings()
    web: WebSettings = WebSettings()

    @model_validator(mode="after")
    def _known_names(self) -> NodeSettings:
        asked = (
            *((d.peer, d.dicomweb) for d in self.publish.destinations),
            *((p.peer, p.dicomweb) for p in self.pull),
            (self.completeness.ask_peer, self.completeness.ask_dicomweb),
        )
        for peer, service in asked:
            if peer is not None and peer not in self.peers:
                raise ValueError(f"peer {peer}: not among `peers` ({', '.join(sorted(self.peers)) or 'none'})")
            if service is not None and service not in self.dicomweb:
                raise ValueError(
                    f"dicomweb {service}: not among `dicomweb` ({', '.join(sorted(self.dicomweb)) or 'none'})"
                )
        known = [d.name for d in self.publish.destinations]
        for rule in self.rules:
            self._check_sends(rule)
            for name in rule.send_to:
                if name not in known:
                    raise ValueError(
                        f"rule {rule.name}: `send_to` {name}: no destination ({', '.join(known) or 'none'})"
                    )
        for what, names in (("rules", [r.name for r in self.rules]), ("destinations", known)):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{what}: {', '.join(sorted(twice))} stands there twice")
        return self

    def _check_sends(self, rule: RuleSettings) -> None:
        """What nobody would ever get is a mistake, not a result."""
        takes = {
            d.name: [f for f in rule.formats if f in (d.formats or rule.formats) and (f != "nifti" or d.folder)]
            for d in self.destinations_of(rule)
        }
        vain = [name for name in rule.send_to if name in takes and not takes[name]]
        if vain or (takes and not any(takes.values())):
            raise ValueError(
                f"rule {rule.name}: nothing of {', '.join(rule.formats)} is for {', '.join(vain or takes)}: change "
                "`formats` here or there (NIfTI goes to folders alone)"
            )

    def destinations_of(self, rule: RuleSettings) -> tuple[DestinationSettings, ...]:
        """Where the results of a rule go."""
        return tuple(d for d in self.publish.destinations if not rule.send_to or d.name in rule.send_to)

    def rule(self, name: str) -> RuleSettings | None:
        """The rule of that name; None where it is there no more."""
        return next((rule for rule in self.rules if rule.name == name), None)


def read_settings(path: Path) -> NodeSettings:
    """The settings in a YAML file; relative paths count from its folder. Raises `ConfigError` naming each wrong key."""
    values = medseg.read_yaml(path)
    try:
        settings = NodeSettings.model_validate(values)
    except ValidationError as error:
        raise medseg.ConfigError(f"{path}: " + "; ".join(_told(e) for e in error.errors(include_url=False))) from error
    return _placed(settings, path.resolve().parent)  # type: ignore[no-any-return]


def _told(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: no such setting"
    return (
        f"{where}: {error['msg'].removeprefix('Value error, ')}"
        if where
        else error["msg"].removeprefix("Value error, ")
    )


def _placed(section: Any, folder: Path) -> Any:
    """The same with every relative path set below `folder`."""
    if isinstance(section, Path):
        return folder / section
    if isinstance(section, BaseModel):
        held = {name: _placed(getattr(section, name), folder) for name in type(section).model_fields}
        if isinstance(section, RuleSettings) and (folder / section.model).is_dir():
            # a name that is no folder is that of a model that comes with medseg
            held["model"] = str(folder / section.model)
        return section.model_copy(update=held)
    if isinstance(section, tuple):
        return tuple(_placed(item, folder) for item in section)
    if isinstance(section, Mapping):
        return {key: _placed(value, folder) for key, value in section.items()}
    return section
