"""Authentication: the form of tokens, and which team or role a token belongs to.

* A token is `ep_`, 32 random base62 characters, and the CRC-32 of all that as 6 base62 characters. So a mistyped token
  is refused without a look-up, and secret scanners can recognise a token.
* The gateway only has SHA-256 digests of tokens. A slow hash is not needed: a token has 190 random bits.
"""

import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from hashlib import sha256
from zlib import crc32
from zoneinfo import ZoneInfo

from proxy.problems import Code, Problem
from proxy.quota.quotas import TeamLimits

PREFIX = "ep_"
RANDOM_CHARACTERS = 32
CHECK_CHARACTERS = 6
TOKEN_ID_DIGITS = 16
"""Hexadecimal digits: enough that no two tokens of an organisation have the same id."""
TOKEN_CHARACTERS = len(PREFIX) + RANDOM_CHARACTERS + CHECK_CHARACTERS
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_TOKEN = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{RANDOM_CHARACTERS + CHECK_CHARACTERS}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Team:
    id: str
    account: str
    disabled: bool
    limits: TeamLimits
    infer: bool = True
    """Whether inferred prices may answer it."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A configured token: its team, the last day on which it works, and its label, which people read."""

    team: Team
    expires: date | None
    label: str = ""
    token_id: str = ""

    def works_on(self, today: date) -> bool:
        return self.expires is None or today <= self.expires


class Teams:
    """Finds the credential of a token."""

    def __init__(self, by_digest: Mapping[str, Credential]) -> None:
        self._by_digest = by_digest
        self._by_token: dict[str, Credential] = {}
        """Credentials of tokens that were used, to hash each token once. There are no more of them than digests."""

    def find(self, token: str) -> Credential | None:
        """The credential of `token`; None if the token is malformed or unknown."""
        credential = self._by_token.get(token)
        if credential is None and len(token) == TOKEN_CHARACTERS and is_well_formed(token):
            credential = self._by_digest.get(digest_of(token))
            if credential is not None:
                self._by_token[token] = credential
        return credential


def token_of(random: str) -> str:
    """Makes a token from 32 random base62 characters."""
    stem = PREFIX + random
    return stem + _check_characters(stem)


def new_token() -> str:
    return token_of("".join(secrets.choice(BASE62) for _ in range(RANDOM_CHARACTERS)))


def is_well_formed(token: str) -> bool:
    stem = token[:-CHECK_CHARACTERS]
    return _TOKEN.fullmatch(token) is not None and token == stem + _check_characters(stem)


def digest_of(token: str) -> str:
    """A token as the configuration has it: `sha256:` and 64 hexadecimal characters."""
    return "sha256:" + sha256(token.encode()).hexdigest()


def token_id_of(digest: str) -> str:
    """The beginning of a digest: names a token in the store, and is too short to be configured in its place."""
    return digest.removeprefix("sha256:")[:TOKEN_ID_DIGITS]


def _check_characters(stem: str) -> str:
    number = crc32(stem.encode())
    digits = []
    for _ in range(CHECK_CHARACTERS):
        number, digit = divmod(number, len(BASE62))
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


_NO_TOKEN = Problem(
    Code.UNKNOWN_TOKEN,
    "The request has no token: send your team's token as X-API-KEY, or as Authorization: Bearer <token>.",
)
_UNKNOWN = Problem(
    Code.UNKNOWN_TOKEN, "The token is unknown or mistyped: check it, or ask the gateway's operator for a new one."
)


@dataclass(frozen=True, slots=True)
class RoleDigests:
    """The digests of tokens that belong to no team, by what they may do."""

    admin: Collection[str] = ()
    viewer: Collection[str] = ()
    metrics: Collection[str] = ()

    @property
    def named(self) -> dict[str, Collection[str]]:
        """The digests of each role, by its name in a sentence."""
        return {"an admin": self.admin, "a viewer": self.viewer, "a metrics": self.metrics}


class Access:
    """Decides what a token may do.

    zone: the time zone in which a token's last day ends.
    record_use: called with the id of each valid token, also if the token may not do what was asked.
    """

    def __init__(
        self,
        teams: Teams,
        zone: ZoneInfo,
        roles: RoleDigests,
        *,
        metrics_are_public: bool,
        record_use: Callable[[str], None],
    ) -> None:
        self._teams = teams
        self._zone = zone
        self._roles = roles
        self._metrics_are_public = metrics_are_public
        self._record_use = record_use

    def is_admin(self, token: str | None) -> bool:
        return self._is_one_of(self._roles.admin, token)

    def is_viewer(self, token: str | None) -> bool:
        """Whether it is a token that reads the reports of all teams, and does nothing else."""
        return self._is_one_of(self._roles.viewer, token)

    def may_scrape(self, token: str | None) -> bool:
        return self.is_admin(token) or self._is_one_of(self._roles.metrics, token) or self._metrics_are_public

    def credential(self, token: str | None) -> Credential | Problem:
        """The credential of a team's token, even if the team is disabled."""
        if token is None:
            return _NO_TOKEN
        credential = self._teams.find(token)
        if credential is not None and (credential.expires is None or credential.works_on(self._today())):
            self._record_use(credential.token_id)
            return credential
        for role, digests in self._roles.named.items():
            if self._is_one_of(digests, token):
                return Problem(Code.FORBIDDEN, f"This needs a team's token; you sent {role} token.")
        return _UNKNOWN if credential is None else _expired(credential)

    def _is_one_of(self, digests: Collection[str], token: str | None) -> bool:
        """Whether it is a token of this role, which belongs to no team."""
        if token is None or (digest := digest_of(token)) not in digests:
            return False
        self._record_use(token_id_of(digest))
        return True

    def _today(self) -> date:
        return datetime.now(self._zone).date()


def _expired(credential: Credential) -> Problem:
    label = f" with the label {credential.label!r}" if credential.label else ""
    return Problem(
        Code.UNKNOWN_TOKEN,
        f"The token has expired: {credential.expires} was the last day of this token of the team "
        f"{credential.team.id!r}{label}. Ask the gateway's operator for a new one.",
    )
