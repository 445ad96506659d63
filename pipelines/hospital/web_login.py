"""Who may see the pages: passwords, sessions in signed cookies, tokens against forged forms, a brake on guessing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from itsdangerous import BadSignature, URLSafeSerializer

import medseg
from medseg_pipelines.hospital.settings import UserSettings, WebSettings
from medseg_pipelines.hospital.store import sync_folder

# OWASP's password storage cheat sheet (2024): 32 MB and three passes, about 0.3 s here
COST, BLOCK_SIZE, PASSES = 2**15, 8, 3
MOST_SCRYPT_BYTES = 2**28
SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 1024
SECRET_FILE, SECRET_BYTES = "web.secret", 32
_HASH = re.compile(r"scrypt\$(\d{1,8})\$(\d{1,2})\$(\d{1,2})\$([A-Za-z0-9+/=]{22,88})\$([A-Za-z0-9+/=]{43,88})")

# failures that are free, and the longest wait after more of them: a user must not be locked out for good by others
FREE_FAILURES = {"user": 5, "address": 20}
MOST_WAIT_S = {"user": 60.0, "address": 900.0}
FORGET_S = 3600.0
MOST_KEYS = 10_000
Key = tuple[str, str]


def hash_password(password: str, *, cost: int = COST, passes: int = PASSES) -> str:
    """What stands in the settings for a password. Raises `ConfigError` where it is too short, or far too long."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise medseg.ConfigError(
            f"password: {len(password)} characters found, expected {SHORTEST_PASSWORD} to {LONGEST_PASSWORD}"
        )
    salt = os.urandom(16)
    made = _scrypt(password, salt, cost, BLOCK_SIZE, passes)
    return f"scrypt${cost}${BLOCK_SIZE}${passes}${_text(salt)}${_text(made)}"


@dataclass(frozen=True)
class PasswordHash:
    """A password as it is kept."""

    cost: int
    block_size: int
    passes: int
    salt: bytes
    made: bytes

    @classmethod
    def parse(cls, user: str, text: str) -> PasswordHash:
        """From the settings. Raises `ConfigError`, which does not quote it."""
        found = _HASH.fullmatch(text)
        if found:
            cost, block_size, passes = (int(number) for number in found.groups()[:3])
            cheap = cost & (cost - 1) == 0 and cost >= 2**12 and 128 * cost * block_size <= MOST_SCRYPT_BYTES
            if cheap and block_size >= 1 and 1 <= passes <= 16:
                return cls(cost, block_size, passes, base64.b64decode(found[4]), base64.b64decode(found[5]))
        raise medseg.ConfigError(
            f"web.users: password_hash of {user} is none that `medseg-hospital password` prints; make a new one"
        )

    def matches(self, password: str) -> bool:
        """Whether it is that password; takes as long whether or not."""
        made = _scrypt(password, self.salt, self.cost, self.block_size, self.passes)
        return hmac.compare_digest(made, self.made)


def read_secret(folder: Path) -> bytes:
    """The key that cookies are signed with; made by whoever asks first, and shared by all who share the folder.

    Raises `ConfigError` where it is damaged, or where others may read it.
    """
    path = folder / SECRET_FILE
    if not path.exists():
        _make_secret(path)
    text, mode = path.read_text(encoding="ascii", errors="replace").strip(), stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise medseg.ConfigError(
            f"{path}: others may read it (mode {mode:03o}), expected 600; remove it, and all log in anew"
        )
    if not re.fullmatch(f"[0-9a-f]{{{2 * SECRET_BYTES}}}", text):
        raise medseg.ConfigError(f"{path}: damaged, expected {2 * SECRET_BYTES} digits; remove it, and all log in anew")
    return bytes.fromhex(text)


def _make_secret(path: Path) -> None:
    own = path.with_name(f".{SECRET_FILE}-{uuid.uuid4().hex}")
    handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # a name is given once, by the first of several processes and machines; it is whole from the start
            os.link(own, path)
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        own.unlink()


@dataclass(frozen=True)
class Session:
    """Somebody who is logged in. `id`: of this login; `until`: seconds since 1970."""

    user: str
    id: str
    until: float


@dataclass(frozen=True)
class Denied:
    """A login that failed. `wait_s`: so long the next one is not even looked at."""

    wait_s: float = 0.0


class Brake:
    """Counts failures by key, and says how long to wait; in memory, and of bounded size."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: dict[Key, tuple[int, float]] = {}

    def begin(self, keys: Sequence[Key]) -> float:
        """Counts a try as a failure until `succeeded` says otherwise, so that many at once gain nothing.

        Seconds to wait where there were too many; then it is not counted.
        """
        with self._lock:
            now = self._clock()
            wait = max(self._wait_s(key, now) for key in keys)
            if wait <= 0:
                for key in keys:
                    number, _ = self._held(key, now)
                    self._failures.pop(key, None)
                    self._failures[key] = (number + 1, now)
                while len(self._failures) > MOST_KEYS:
                    self._failures.pop(next(iter(self._failures)))
            return wait

    def succeeded(self, user: Key, address: Key) -> None:
        """The failures of the user are forgotten; those of the address are not, else one good account would help."""
        with self._lock:
            self._failures.pop(user, None)
            number, at = self._failures.get(address, (1, 0.0))
            self._failures[address] = (number - 1, at)

    def _held(self, key: Key, now: float) -> tuple[int, float]:
        number, at = self._failures.get(key, (0, now))
        return (0, now) if now - at > FORGET_S else (number, at)

    def _wait_s(self, key: Key, now: float) -> float:
        number, at = self._held(key, now)
        more = number - FREE_FAILURES[key[0]]
        return 0.0 if more < 0 else min(2.0 ** min(more, 30), MOST_WAIT_S[key[0]]) - (now - at)


class Doorkeeper:
    """Lets people in, knows them again, and lets them go; all cookies and tokens hang on one secret."""

    def __init__(self, settings: WebSettings, secret: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._secret, self._clock = secret, clock
        self._session_s = settings.session_h * 3600
        self._hashes = {user.name: PasswordHash.parse(user.name, user.password_hash) for user in settings.users}
        if len(self._hashes) < len(settings.users):
            raise medseg.ConfigError("web.users: a name stands there twice, expected each once")
        self._stamps = {user.name: self._stamp(user) for user in settings.users}
        # a name that nobody has takes as long as one that somebody has
        dearest = max(self._hashes.values(), key=lambda h: h.cost * h.block_size * h.passes, default=None)
        self._nobody = dearest or PasswordHash(COST, BLOCK_SIZE, PASSES, bytes(16), bytes(64))
        self._signer = URLSafeSerializer(
            secret, salt="session", signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256}
        )
        self._brake = Brake(clock)
        # each takes 32 MB
        self._at_once = threading.BoundedSemaphore(2)
        self._ended: dict[str, float] = {}

    @property
    def has_users(self) -> bool:
        """Whether anybody may log in at all."""
        return bool(self._hashes)

    def knows(self, name: str) -> bool:
        """Whether there is a user of that name."""
        return name in self._hashes

    def enter(self, name: str, password: str, address: str) -> Session | Denied:
        """A new session for the right password, else nothing; after some failures, not before a while has passed."""
        user_key, address_key = ("user", name[:64]), ("address", address)
        wait = self._brake.begin((user_key, address_key))
        if wait > 0:
            return Denied(wait)
        with self._at_once:
            right = self._hashes.get(name, self._nobody).matches(password[:LONGEST_PASSWORD])
        if not right or not self.knows(name):
            return Denied()
        self._brake.succeeded(user_key, address_key)
        return Session(name, secrets.token_hex(16), self._clock() + self._session_s)

    def cookie(self, session: Session) -> str:
        """What the browser keeps; it holds no secret, and cannot be made without ours."""
        held = {"user": session.user, "id": session.id, "until": session.until, "stamp": self._stamps[session.user]}
        return str(self._signer.dumps(held))

    def session(self, cookie: str | None) -> Session | None:
        """Whose cookie it is; None where it is not ours, has expired, was left, or its user has another password."""
        if not cookie:
            return None
        try:
            held = self._signer.loads(cookie)
        except BadSignature:
            return None
        session = Session(held["user"], held["id"], held["until"])
        known = hmac.compare_digest(self._stamps.get(session.user, ""), held["stamp"])
        if not known or session.until <= self._clock() or session.id in self._ended:
            return None
        return session

    def leave(self, session: Session) -> None:
        """Its cookie is worth nothing any more, as far as this process goes."""
        now = self._clock()
        self._ended = {i: until for i, until in self._ended.items() if until > now} | {session.id: session.until}

    def token(self, holder: str) -> str:
        """What a form must bring back that was given to the holder of a session, or of a visit before it."""
        return hmac.new(self._secret, b"form\0" + holder.encode(), hashlib.sha256).hexdigest()

    def is_token(self, holder: str, token: str) -> bool:
        """Whether the form was ours."""
        return hmac.compare_digest(self.token(holder), token) if token.isascii() else False

    def _stamp(self, user: UserSettings) -> str:
        # changes with the password, and cannot be turned back into its hash
        return hmac.new(self._secret, b"stamp\0" + user.password_hash.encode(), hashlib.sha256).hexdigest()[:32]


def _scrypt(password: str, salt: bytes, cost: int, block_size: int, passes: int) -> bytes:
    # the same letters may come composed or not, as keyboards differ
    typed = unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
    return hashlib.scrypt(typed, salt=salt, n=cost, r=block_size, p=passes, maxmem=2 * MOST_SCRYPT_BYTES, dklen=64)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
