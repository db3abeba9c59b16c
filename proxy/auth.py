"""Authentication: the form of tokens, and which team or role a token belongs to.

* A token is `ep_`, 32 random base62 characters, and the CRC-32 of all that as 6 base62 characters. So a mistyped token
  is refused without a look-up, and secret scanners can recognise a token.
* The gateway only has SHA-256 digests of tokens. A slow hash is not needed: a token has 190 random bits.
"""

import re
from collections.abc import Collection, Mapping
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
TOKEN_CHARACTERS = len(PREFIX) + RANDOM_CHARACTERS + CHECK_CHARACTERS
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_TOKEN = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{RANDOM_CHARACTERS + CHECK_CHARACTERS}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Team:
    id: str
    account: str
    disabled: bool
    limits: TeamLimits


@dataclass(frozen=True, slots=True)
class Credential:
    """A configured token: its team, the last day on which it works, and its label, which people read."""

    team: Team
    expires: date | None
    label: str = ""

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


def is_well_formed(token: str) -> bool:
    stem = token[:-CHECK_CHARACTERS]
    return _TOKEN.fullmatch(token) is not None and token == stem + _check_characters(stem)


def digest_of(token: str) -> str:
    """A token as the configuration has it: `sha256:` and 64 hexadecimal characters."""
    return "sha256:" + sha256(token.encode()).hexdigest()


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
    Code.UNKNOWN_TOKEN,
    "The token is unknown or mistyped: check it, or ask the gateway's operator for a new one.",
)


class Access:
    """Decides what a token may do.

    zone: the time zone in which a token's last day ends.
    """

    def __init__(
        self,
        teams: Teams,
        zone: ZoneInfo,
        *,
        admin_digests: Collection[str],
        viewer_digests: Collection[str],
        metrics_digests: Collection[str],
        metrics_are_public: bool,
    ) -> None:
        self._teams = teams
        self._zone = zone
        self._admin_digests = admin_digests
        self._viewer_digests = viewer_digests
        self._metrics_digests = metrics_digests
        self._metrics_are_public = metrics_are_public

    def is_admin(self, token: str | None) -> bool:
        return token is not None and digest_of(token) in self._admin_digests

    def is_viewer(self, token: str | None) -> bool:
        """Whether it is a token that reads the reports of all teams, and does nothing else."""
        return token is not None and digest_of(token) in self._viewer_digests

    def may_scrape(self, token: str | None) -> bool:
        if self._metrics_are_public or self.is_admin(token):
            return True
        return token is not None and digest_of(token) in self._metrics_digests

    def credential(self, token: str | None) -> Credential | Problem:
        """The credential of a team's token, even if the team is disabled: see `team_disabled`."""
        if token is None:
            return _NO_TOKEN
        credential = self._teams.find(token)
        if credential is not None and (credential.expires is None or credential.works_on(self._today())):
            return credential
        if self.is_admin(token) or self.is_viewer(token) or digest_of(token) in self._metrics_digests:
            return Problem(
                Code.FORBIDDEN,
                "This is an admin, viewer or metrics token, and this endpoint needs a team's token: send your team's.",
            )
        return _UNKNOWN if credential is None else _expired(credential)

    def _today(self) -> date:
        return datetime.now(self._zone).date()


def _expired(credential: Credential) -> Problem:
    label = f" with the label {credential.label!r}" if credential.label else ""
    return Problem(
        Code.UNKNOWN_TOKEN,
        f"The token has expired: {credential.expires} was the last day of this token of the team "
        f"{credential.team.id!r}{label}. Ask the gateway's operator for a new one.",
    )


def team_disabled(team: Team) -> Problem:
    return Problem(Code.TEAM_DISABLED, f"The team {team.id!r} is disabled: ask the gateway's operator to enable it.")
