"""Who asks: a team, by its token, the gateway's operator, or Prometheus."""

from collections.abc import Collection
from datetime import date, datetime
from zoneinfo import ZoneInfo

from proxy.auth import Team, Teams, digest_of
from proxy.problems import Code, Problem

_NO_TOKEN = Problem(Code.UNKNOWN_TOKEN, "Send your team's token as X-API-KEY, or as Authorization: Bearer <token>.")
_UNKNOWN = Problem(
    Code.UNKNOWN_TOKEN, "This token is unknown, expired or mistyped: ask the gateway's operator for one."
)


class Access:
    """What the tokens open. `zone` is where a token's last day ends."""

    def __init__(
        self,
        teams: Teams,
        zone: ZoneInfo,
        *,
        admin_digests: Collection[str],
        metrics_digests: Collection[str],
        metrics_are_public: bool,
    ) -> None:
        self._teams = teams
        self._zone = zone
        self._admin_digests = admin_digests
        self._metrics_digests = metrics_digests
        self._metrics_are_public = metrics_are_public

    def is_admin(self, token: str | None) -> bool:
        return token is not None and digest_of(token) in self._admin_digests

    def may_scrape(self, token: str | None) -> bool:
        if self._metrics_are_public or self.is_admin(token):
            return True
        return token is not None and digest_of(token) in self._metrics_digests

    def team(self, token: str | None) -> Team | Problem:
        """The team that asks, be it disabled: see `refusal`."""
        if token is None:
            return _NO_TOKEN
        credential = self._teams.find(token)
        if credential is not None and (credential.expires is None or credential.works_on(self._today())):
            return credential.team
        if self.is_admin(token) or digest_of(token) in self._metrics_digests:
            return Problem(Code.FORBIDDEN, "This is an admin's or a scraper's token: send your team's.")
        return _UNKNOWN

    def refusal(self, team: Team) -> Problem:
        """Why a disabled team may not ask."""
        return Problem(Code.TEAM_DISABLED, f"The team {team.id!r} is disabled: ask the gateway's operator.")

    def _today(self) -> date:
        return datetime.now(self._zone).date()
