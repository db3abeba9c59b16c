"""The settings: one frozen object, with a default and a description for each field.

Error messages never contain a value, because it could be a secret. `proxy.settings.loader` has the sources of values.
"""

import re
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Secret, ValidationInfo

from proxy.quota.credits import PRICE_DECIMALS, Currency
from proxy.quota.quotas import UNITS, Measure
from proxy.quota.windows import Period
from proxy.store.access import CONNECT_TIMEOUT_S, TIMEOUT_S
from proxy.urls import check_host, is_ip, parse_store_url, split_url

MASK = "**********"

UNLABELLED_CHARACTERS = len("sha256:") + 8
"""Of a digest: enough to find its token in the config, too few to say anything about it."""

MAX_REQUESTS = 10**12
MAX_CREDITS = 9 * 10**9
"""In micro-credits this stays below 2**53, up to which numbers in the store's scripts (doubles) are exact."""

MAX_CREDITS_WITH_DECIMALS = 2**33
"""TOML's decimal numbers are doubles. Above this value, neighbouring doubles are more than a micro-credit apart."""


_RENDERNET_PATH = re.compile("/+pub/+v1(/+generations(/+estimate)?)?/*$")


_DEFAULT_PORTS = {"http": 80, "https": 443}

_PRICE = re.compile(rf"[0-9]{{1,9}}(\.[0-9]{{1,{PRICE_DECIMALS}}})?")


class SecretUrl(Secret[str]):
    """A URL that may contain a password, which is masked when it is shown."""

    def _display(self) -> str:
        return masked_url(self.get_secret_value())


class SecretText(Secret[str]):
    """A key or password, which is masked when it is shown."""

    def _display(self) -> str:
        return MASK


def masked_url(url: str) -> str:
    """`url` with masks for what may be secret: its password, a user name without one, and its query except for `db`."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    credentials, at, location = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    masked = f"{user}:{MASK}" if colon else MASK
    query = "&".join(map(_masked_member, parts.query.split("&"))) if parts.query else ""
    tail = f"?{query}" * bool(query) + f"#{MASK}" * bool(parts.fragment)
    return f"{parts.scheme}://{masked if at else ''}{at}{location}{parts.path}{tail}"


def _masked_member(member: str) -> str:
    name, equals, value = member.partition("=")
    return member if name == "db" and value.isdigit() else f"{name}={MASK}" if equals else MASK


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")  # noqa: TRY004 -- pydantic collects ValueErrors
    return value


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of text without control characters")
    return text


def _filled(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return _one_line(text)


def _password(secret: SecretText) -> SecretText:
    return SecretText(_filled(secret.get_secret_value()))


def _header_safe(secret: SecretText) -> SecretText:
    text = secret.get_secret_value()
    if not (text.isascii() and text.isprintable() and text and " " not in text):
        raise ValueError("is empty, or has characters that are not allowed in an HTTP header")
    return secret


def _path(value: object) -> object:
    if isinstance(value, str) and _filled(value).startswith("~"):
        raise ValueError("begins with ~, which only shells expand: write the full path")
    return value


def _base_url(url: str, info: ValidationInfo) -> str:
    parts = split_url(url, "https", "http")
    if any(mark in url for mark in "@?#"):
        raise ValueError("has a user, a query or a fragment: remove it")
    if ends := _RENDERNET_PATH.search(parts.path):
        right = url.removesuffix(parts.path) + parts.path[: ends.start()]
        raise ValueError(f"ends in a path of RenderNet's API, which the gateway adds itself: use {right}")
    host = parts.hostname or ""
    loopback = host == "localhost" or (is_ip(host) and ip_address(host).is_loopback)
    if parts.scheme == "http" and not loopback and info.data.get("insecure") is False:
        raise ValueError("would send the API key in clear text: use https, or set upstream.insecure = true")
    return url


def _web_origin(origin: str) -> str:
    if origin == "*":
        raise ValueError("must name one origin, such as https://tools.example.com: every page would be too many")
    parts = split_url(origin, "https", "http")
    default_port = f":{_DEFAULT_PORTS[parts.scheme]}"
    right = f"{parts.scheme}://{parts.netloc.lower().removesuffix(default_port)}"
    if "@" in origin or parts.query or parts.fragment or parts.path.strip("/"):
        raise ValueError("must be scheme, host and port alone, such as https://tools.example.com")
    if origin != right:
        raise ValueError(f"must be written as browsers send it: {right}")
    return origin


def _proxy_url(url: SecretUrl) -> SecretUrl:
    split_url(url.get_secret_value(), "http", "https")
    return url


def _store_url(url: SecretUrl) -> SecretUrl:
    parse_store_url(url.get_secret_value())
    return url


def _exact(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("must be a number")  # noqa: TRY004 -- pydantic collects ValueErrors
    if isinstance(value, float) and not value.is_integer() and MAX_CREDITS_WITH_DECIMALS < value <= MAX_CREDITS:
        raise ValueError(f"must be a whole number above {MAX_CREDITS_WITH_DECIMALS}: its decimals would be inexact")
    return value


def _countable(limit: Decimal, info: ValidationInfo) -> Decimal:
    match info.data.get("measure"):
        case "requests" if limit > MAX_REQUESTS or limit != round(limit):
            raise ValueError(f"must be a whole number of requests, at most {MAX_REQUESTS}")
        case "estimated_credits" if limit > MAX_CREDITS or limit != round(limit, 6):
            raise ValueError(f"must be a number of credits with at most six decimals, at most {MAX_CREDITS}")
    return limit


def _currency_code(code: str) -> str:
    if not re.fullmatch("[A-Z]{3}", code):
        raise ValueError("must be the three capital letters of a currency, such as EUR")
    return code


def _price(value: object) -> Decimal:
    """A price as text, which is exact in any program that writes TOML, or as a number."""
    text = f"{Decimal(str(value)):f}" if type(value) in (int, float, Decimal) else value
    if not (isinstance(text, str) and _PRICE.fullmatch(text) and Decimal(text) > 0):
        raise ValueError(f'must be more than 0, with at most {PRICE_DECIMALS} decimals, such as "0.002"')
    return Decimal(text)


def _known_zone(name: str) -> str:
    if name == "localtime":
        raise ValueError("must be a time zone's name, such as Europe/Berlin: localtime differs between machines")
    if name not in available_timezones():
        raise ValueError("must be a time zone's name, such as UTC or Europe/Berlin")
    return name


def _token_table(value: object) -> object:
    return {"sha256": value} if isinstance(value, str) else value


def _token_digest(value: str) -> str:
    if value.startswith("ep_"):
        raise ValueError("is the token itself: put its digest here, as `estimate-proxy token new` prints it")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        raise ValueError("must be sha256: and 64 hexadecimal digits, as `estimate-proxy token new` prints it")
    return value


def _digest_alone(value: object) -> object:
    if isinstance(value, dict):
        alone = 'must be the digest alone, "sha256:...": only tokens of teams have a label and a last day'
        raise ValueError(alone)  # noqa: TRY004 -- pydantic catches it
    return value


def _calendar_day(value: object) -> object:
    """A TOML date, or its text. Times of day and numbers (which pydantic reads as seconds since 1970) are refused."""
    text = value if isinstance(value, str) else ""
    if type(value) is not date and not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ValueError("must be a date, such as 2027-06-30")
    return value


def _member_path(value: str) -> str:
    if not all(value.split(".")):
        raise ValueError("must be a member's name, or several joined by dots, such as prompt.positive")
    return value


def is_identifier(value: str) -> bool:
    """Whether `value` is allowed as the id of a team, an account or an organisation."""
    return re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", value) is not None


def _identifier(value: str) -> str:
    if not is_identifier(value):
        raise ValueError("must be 1 to 64 of a-z, 0-9 and -, beginning and ending with a letter or digit")
    return value


Identifier = Annotated[str, AfterValidator(_identifier)]
Line = Annotated[str, AfterValidator(_one_line)]
PlainPath = Annotated[Path, BeforeValidator(_path)]
Whole = Annotated[int, BeforeValidator(_not_boolean)]
Real = Annotated[float, BeforeValidator(_not_boolean), Field(allow_inf_nan=False)]
Seconds = Real
Exact = Annotated[Decimal, BeforeValidator(_exact), BeforeValidator(_not_boolean)]
"""The number as written: a double becomes the shortest decimal number that stands for it."""

ApiKey = Annotated[SecretText, AfterValidator(_header_safe)]
Password = Annotated[SecretText, AfterValidator(_password)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerSettings(_Section):
    host: Annotated[str, AfterValidator(check_host)] = "127.0.0.1"
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
    cors_origins: tuple[Annotated[str, AfterValidator(_web_origin)], ...] = ()
    """Pages of these origins may call the API from a browser."""


class UpstreamSettings(_Section):
    insecure: bool = False
    """Allows http to hosts other than this one."""
    base_url: Annotated[str, AfterValidator(_base_url)] = "https://api.rendernet.ai"
    timeout_s: Annotated[Seconds, Field(gt=0, le=3600)] = 10.0
    """From the request to the last byte of the answer, including the wait for a connection."""
    max_connections: Annotated[Whole, Field(ge=1, le=10_000)] = 100
    on_unpriced: Literal["pass", "refuse"] = "pass"
    proxy: Annotated[SecretUrl, AfterValidator(_proxy_url)] | None = None
    """An HTTP proxy for requests to upstream. Proxy variables of the environment are ignored."""
    ca_file: PlainPath | None = None
    """Certificates to trust instead of the system's."""


class AccountSettings(_Section):
    api_key: ApiKey


class StoreSettings(_Section):
    url: Annotated[SecretUrl, AfterValidator(_store_url)] | None = None
    """One server, Sentinels or a cluster. Not set: an embedded Valkey keeps its data in data_dir."""
    username: Annotated[str, AfterValidator(_filled)] | None = None
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
    url: Annotated[SecretUrl, AfterValidator(_store_url)] | None = None
    """The price book's server, which may evict. Not set: the ledger's."""
    ttl_s: Annotated[Seconds, Field(ge=1, le=366 * 86400)] = 3600.0
    """How long a price is fresh."""
    stale_while_revalidate_s: Annotated[Seconds, Field(ge=0, le=366 * 86400)] = 300.0
    """After that: how long it is still served while a refresh runs in the background."""
    stale_if_error_s: Annotated[Seconds, Field(ge=0, le=366 * 86400)] = 86_400.0
    """After that: how long it is served when upstream fails."""
    balance_max_age_s: Annotated[Seconds, Field(ge=0, le=366 * 86400)] = 60.0
    """A hit with an older balance refreshes it in the background, and checks the price."""
    ignore: tuple[Annotated[Line, AfterValidator(_member_path)], ...] = ()
    """Members that do not affect the price, as dotted paths inside each item: left out of keys, but sent upstream."""
    learn: Literal["off", "observe", "use"] = "observe"
    """Which members decide the price: observe learns, and reports what it would have answered; use answers."""
    never_learn: tuple[Annotated[Line, AfterValidator(_member_path)], ...] = ()
    """Members that always count, as dotted paths inside each item, with all that is below them."""
    learn_from: Annotated[Whole, Field(ge=1, le=100_000)] = 100
    """Tests without a contradiction before a price is inferred."""
    audit_one_in: Annotated[Whole, Field(ge=1, le=10_000)] = 25
    """One of so many inferred answers is compared with RenderNet's own, in the background."""


_RoleDigest = Annotated[str, BeforeValidator(_digest_alone), AfterValidator(_token_digest)]


class MetricsSettings(_Section):
    public: bool = False
    """Whether `/metrics` needs no token."""
    tokens: tuple[_RoleDigest, ...] = ()
    """These may read `/metrics`, and nothing else."""


class PageSettings(_Section):
    enabled: bool = True
    """Whether browsers get the usage page at `/`."""


class AdminSettings(_Section):
    tokens: tuple[_RoleDigest, ...] = ()
    """These may purge, read the usage and quotas of all teams, and read `/metrics`."""


class ViewerSettings(_Section):
    tokens: tuple[_RoleDigest, ...] = ()
    """May read usage and quotas of all teams, and price changes, and nothing else."""


class RateSettings(_Section):
    per_s: Annotated[Real, Field(ge=0.001, le=100_000)]
    burst: Annotated[Whole, Field(ge=1, le=1_000_000)]
    """Requests at once, after a pause."""


class QuotaSettings(_Section):
    measure: Measure
    limit: Annotated[Exact, Field(ge=0), AfterValidator(_countable)]
    """In requests, or in credits. 0: every request is refused."""
    per: Period
    on_exceed: Literal["refuse", "warn"] = "refuse"

    @property
    def counted_limit(self) -> int:
        """The limit in the ledger's units: requests, or micro-credits."""
        return int(self.limit * UNITS[self.measure])


class CurrencySettings(_Section):
    """For the money that reports show beside credits."""

    code: Annotated[str, AfterValidator(_currency_code)]
    """As in ISO 4217."""
    per_credit: Annotated[Decimal, BeforeValidator(_price)]


class OrgSettings(_Section):
    id: Identifier = "default"
    """Part of the ledger's keys in the store."""
    timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
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


class TokenSettings(_Section):
    sha256: Annotated[str, AfterValidator(_token_digest)]
    label: Line = ""
    expires: Annotated[date, BeforeValidator(_calendar_day)] | None = None
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

    def rate_of(self, team: TeamSettings) -> RateSettings:
        """The team's own rate, or else the default."""
        return team.rate or self.team_defaults.rate

    def quotas_of(self, team: TeamSettings) -> tuple[QuotaSettings, ...]:
        """The team's own quotas, or else the defaults. The organisation's quotas apply in addition."""
        return self.team_defaults.quotas if team.quotas is None else team.quotas


def effective(settings: Settings) -> list[tuple[str, Any]]:
    """Every effective setting as (path, value). Secrets are masked by their types; None: not set."""
    return list(_flatten(settings.model_dump(), ""))


def _flatten(table: dict[str, Any], parent: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        path = f"{parent}.{key}" if parent else key
        yield from _flatten(value, path) if isinstance(value, dict) else [(path, value)]


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
