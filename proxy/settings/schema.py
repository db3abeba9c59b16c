"""The settings: one frozen object. Most fields have a default, and a description where the name does not suffice.

`proxy.settings.values` has the types of single values, `proxy.settings.loader` the sources of values.
"""

from datetime import date
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from proxy.quota.credits import Currency
from proxy.quota.quotas import UNITS, Measure
from proxy.quota.windows import Period
from proxy.settings.tree import leaves
from proxy.settings.values import (
    ApiKey,
    BaseUrl,
    CalendarDay,
    CurrencyCode,
    Host,
    Identifier,
    Line,
    MemberPath,
    Password,
    PlainPath,
    Price,
    ProxyUrl,
    QuotaLimit,
    Real,
    RoleDigest,
    Seconds,
    StoreUrl,
    TokenDigest,
    Username,
    WebOrigin,
    Whole,
    ZoneName,
)
from proxy.store.access import CONNECT_TIMEOUT_S, TIMEOUT_S, Role

UNLABELLED_CHARACTERS = len("sha256:") + 8
"""Of a digest: enough to find its token in the config, too few to say anything about it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerSettings(_Section):
    host: Host = "127.0.0.1"
    port: Annotated[Whole, Field(ge=0, le=65535)] = 8080
    """0: any free port, which the log names."""
    workers: Annotated[Whole, Field(ge=1, le=64)] = 1
    """Processes on one socket; more than one per core brings nothing."""
    max_body_bytes: Annotated[Whole, Field(ge=2, le=64 * 2**20)] = 262_144
    request_timeout_s: Annotated[Seconds, Field(gt=0, le=3600)] = 15.0
    """From a request's head to its answer, including the request to upstream."""
    head_timeout_s: Annotated[Seconds, Field(gt=0, le=3600)] = 10.0
    """For a request's head to arrive: from its first byte; on a new connection, from when that was opened."""
    drain_delay_s: Annotated[Seconds, Field(ge=0, le=3600)] = 5.0
    """After SIGTERM: report "not ready" and keep serving for this long."""
    drain_s: Annotated[Seconds, Field(ge=0, le=3600)] = 30.0
    """Then: running requests have at most this long to finish."""
    cors_origins: tuple[WebOrigin, ...] = ()
    """Pages of these origins may call the API from a browser."""


class UpstreamSettings(_Section):
    insecure: bool = False
    """Allows http to hosts other than this one."""
    base_url: BaseUrl = "https://api.rendernet.ai"
    timeout_s: Annotated[Seconds, Field(gt=0, le=3600)] = 10.0
    """From the request to the last byte of the answer, including the wait for a connection."""
    max_connections: Annotated[Whole, Field(ge=1, le=10_000)] = 100
    on_unpriced: Literal["pass", "refuse"] = "pass"
    proxy: ProxyUrl | None = None
    """An HTTP proxy for requests to upstream. Proxy variables of the environment are ignored."""
    ca_file: PlainPath | None = None
    """Certificates to trust instead of the system's."""


class AccountSettings(_Section):
    api_key: ApiKey


class StoreSettings(_Section):
    url: StoreUrl | None = None
    """One server, Sentinels or a cluster. Not set: an embedded Valkey keeps its data in data_dir."""
    username: Username | None = None
    password: Password | None = None
    sentinel_password: Password | None = None
    """For the Sentinels. A user name for them is not supported."""
    ca_file: PlainPath | None = None
    """Certificates to trust instead of the system's. This and the next two also apply to cache.url."""
    cert_file: PlainPath | None = None
    """The gateway's client certificate."""
    key_file: PlainPath | None = None
    """That certificate's private key, without a passphrase. Not set: the key is in cert_file."""
    timeout_s: Annotated[Seconds, Field(ge=0.05, le=10)] = TIMEOUT_S
    """For a call, also to cache.url. Must be longer than a round trip."""
    connect_timeout_s: Annotated[Seconds, Field(ge=0.05, le=60)] = CONNECT_TIMEOUT_S
    """For setting up a connection, including TLS and login, also to cache.url. Calls do not wait for it."""
    data_dir: PlainPath
    on_outage: Literal["refuse", "admit"] = "refuse"
    """While the ledger is unreachable: refuse estimates, or answer them and record the debits later."""


class CacheSettings(_Section):
    url: StoreUrl | None = None
    """The price book's server, which may evict. Not set: the ledger's."""
    ttl_s: Annotated[Seconds, Field(ge=1, le=366 * 86400)] = 3600.0
    """How long a price is fresh."""
    stale_while_revalidate_s: Annotated[Seconds, Field(ge=0, le=366 * 86400)] = 300.0
    """After that: how long it is still served while a refresh runs in the background."""
    stale_if_error_s: Annotated[Seconds, Field(ge=0, le=366 * 86400)] = 86_400.0
    """After that: how long it is served when upstream fails."""
    balance_max_age_s: Annotated[Seconds, Field(ge=0, le=366 * 86400)] = 60.0
    """A hit with an older balance refreshes it in the background, and checks the price."""
    ignore: tuple[MemberPath, ...] = ()
    """Members that do not affect the price, as dotted paths inside each item: left out of keys, but sent upstream."""
    learn: Literal["off", "observe", "use"] = "observe"
    """Which members decide the price: observe learns, and reports what it would have answered; use answers."""
    never_learn: tuple[MemberPath, ...] = ()
    """Members that always count, as dotted paths inside each item, with all that is below them."""
    learn_from: Annotated[Whole, Field(ge=1, le=100_000)] = 100
    """Tests without a contradiction before a price is inferred."""
    audit_one_in: Annotated[Whole, Field(ge=1, le=10_000)] = 25
    """One of so many inferred answers is compared with RenderNet's own, in the background."""


class MetricsSettings(_Section):
    public: bool = False
    """Whether `/metrics` needs no token."""
    tokens: tuple[RoleDigest, ...] = ()
    """These may read `/metrics`, and nothing else."""


class PageSettings(_Section):
    enabled: bool = True
    """Whether browsers get the usage page at `/`."""


class AdminSettings(_Section):
    tokens: tuple[RoleDigest, ...] = ()
    """These may purge, read all that viewers may read, and read `/metrics`."""


class ViewerSettings(_Section):
    tokens: tuple[RoleDigest, ...] = ()
    """These may read all teams' reports, price changes and what was learned, and nothing else."""


class RateSettings(_Section):
    per_s: Annotated[Real, Field(ge=0.001, le=100_000)]
    burst: Annotated[Whole, Field(ge=1, le=1_000_000)]
    """Requests at once, after a pause."""


class QuotaSettings(_Section):
    measure: Measure
    limit: QuotaLimit
    """In requests, or in credits. 0: every request is refused."""
    per: Period
    on_exceed: Literal["refuse", "warn"] = "refuse"

    @property
    def counted_limit(self) -> int:
        """The limit in the ledger's units: requests, or micro-credits."""
        return int(self.limit * UNITS[self.measure])


class CurrencySettings(_Section):
    """For the money that reports show beside credits."""

    code: CurrencyCode
    """As in ISO 4217."""
    per_credit: Price


class OrgSettings(_Section):
    id: Identifier = "default"
    """Part of the ledger's keys in the store."""
    timezone: ZoneName = "UTC"
    """Quota windows, report days and a token's last day follow its calendar."""
    quotas: tuple[QuotaSettings, ...] = ()
    """For all teams together."""
    currency: CurrencySettings | None = None

    @property
    def counted_currency(self) -> Currency | None:
        return None if self.currency is None else Currency(self.currency.code, self.currency.per_credit)

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)


def _token_table(value: object) -> object:
    return {"sha256": value} if isinstance(value, str) else value


class TokenSettings(_Section):
    sha256: TokenDigest
    label: Line = ""
    expires: CalendarDay | None = None
    """The last day on which it works."""


class TeamDefaults(_Section):
    """For teams that do not set these."""

    rate: RateSettings = RateSettings(per_s=50.0, burst=100)
    quotas: tuple[QuotaSettings, ...] = ()


class TeamSettings(_Section):
    name: Line = ""
    was: tuple[Identifier, ...] = ()
    """Earlier ids, whose usage is reported as this team's."""
    account: Identifier = "default"
    tokens: tuple[Annotated[TokenSettings, BeforeValidator(_token_table)], ...] = ()
    rate: RateSettings | None = None
    quotas: tuple[QuotaSettings, ...] | None = None
    """Replaces the default quotas; does not add to them."""
    infer: bool = True
    """Whether learned prices may answer this team. False: exact answers only."""
    disabled: bool = False

    def last_days(self) -> dict[str, date | None]:
        """The last day on which a token works, by label; None if one with this label never expires.

        Of several tokens with one label, the newest counts: the others were replaced. A token without a label has the
        beginning of its digest.
        """
        found: dict[str, date | None] = {}
        for token in self.tokens:
            label = token.label or token.sha256[:UNLABELLED_CHARACTERS]
            latest = found.setdefault(label, date.min)
            found[label] = None if latest is None or token.expires is None else max(latest, token.expires)
        return found


class LogSettings(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """There is one line per request at level info."""
    format: Literal["auto", "json", "text"] = "auto"
    """auto: text on a terminal, otherwise JSON."""


class Settings(_Section):
    """Everything that an operator can set, by section."""

    server: ServerSettings = ServerSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    accounts: dict[Identifier, AccountSettings] = {}
    store: StoreSettings
    cache: CacheSettings = CacheSettings()
    metrics: MetricsSettings = MetricsSettings()
    admin: AdminSettings = AdminSettings()
    viewer: ViewerSettings = ViewerSettings()
    page: PageSettings = PageSettings()
    org: OrgSettings = OrgSettings()
    team_defaults: TeamDefaults = TeamDefaults()
    teams: dict[Identifier, TeamSettings] = {}
    log: LogSettings = LogSettings()

    @property
    def embedded_roles(self) -> list[Role]:
        """The stores that have no URL. Without `cache.url`, the price book uses the ledger's store."""
        if self.store.url is not None:
            return []
        return ["ledger", "price-book"] if self.cache.url is None else ["ledger"]

    def rate_of(self, team: TeamSettings) -> RateSettings:
        """The team's own rate, or else the default."""
        return team.rate or self.team_defaults.rate

    def quotas_of(self, team: TeamSettings) -> tuple[QuotaSettings, ...]:
        """The team's own quotas, or else the defaults. The organisation's quotas apply in addition."""
        return self.team_defaults.quotas if team.quotas is None else team.quotas


def effective(settings: Settings) -> list[tuple[str, Any]]:
    """Every effective setting as (path, value). Secrets are masked by their types; None: not set."""
    return [(".".join(path), value) for path, value in leaves(settings.model_dump())]


def inherited(settings: Settings) -> dict[str, tuple[str, Any]]:
    """The settings that are not set and follow another one: that one's path and value, by path."""
    defaults = settings.team_defaults.model_dump()
    found: dict[str, tuple[str, Any]] = {
        f"teams.{team}.{name}": (f"team_defaults.{name}", defaults[name])
        for team, own in settings.teams.items()
        for name in defaults
        if getattr(own, name) is None
    }
    if settings.cache.url is None and settings.store.url is not None:
        found["cache.url"] = ("store.url", settings.store.url)
    return found
