"""The types of single settings: each checks a value and says what is wrong with it.

Error messages contain no value that could be a secret: a URL only after a check that it has no user.
"""

import re
from datetime import date
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from zoneinfo import available_timezones

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from proxy.quota.credits import PRICE_DECIMALS
from proxy.settings.masking import SecretText, SecretUrl
from proxy.urls import check_host, is_ip, parse_store_url, split_url

MAX_REQUESTS = 10**12
MAX_CREDITS = 9 * 10**9
"""In micro-credits this stays below 2**53, up to which numbers in the store's scripts (doubles) are exact."""

MAX_CREDITS_WITH_DECIMALS = 2**33
"""TOML's decimal numbers are doubles. Above this value, neighbouring doubles are more than a micro-credit apart."""

_RENDERNET_PATH = re.compile("/+pub/+v1(/+generations(/+estimate)?)?/*$")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PRICE = re.compile(rf"[0-9]{{1,9}}(\.[0-9]{{1,{PRICE_DECIMALS}}})?")


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


IDENTIFIER_RULE = "1 to 64 of a-z, 0-9 and -, beginning and ending with a letter or digit"


def is_identifier(value: str) -> bool:
    """Whether `value` is allowed as the id of a team, an account or an organisation."""
    return re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", value) is not None


def _identifier(value: str) -> str:
    if not is_identifier(value):
        raise ValueError(f"must be {IDENTIFIER_RULE}")
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

Host = Annotated[str, AfterValidator(check_host)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
WebOrigin = Annotated[str, AfterValidator(_web_origin)]
ProxyUrl = Annotated[SecretUrl, AfterValidator(_proxy_url)]
StoreUrl = Annotated[SecretUrl, AfterValidator(_store_url)]
Username = Annotated[str, AfterValidator(_filled)]
MemberPath = Annotated[Line, AfterValidator(_member_path)]
QuotaLimit = Annotated[Exact, Field(ge=0), AfterValidator(_countable)]
CurrencyCode = Annotated[str, AfterValidator(_currency_code)]
Price = Annotated[Decimal, BeforeValidator(_price)]
ZoneName = Annotated[str, AfterValidator(_known_zone)]
CalendarDay = Annotated[date, BeforeValidator(_calendar_day)]
TokenDigest = Annotated[str, AfterValidator(_token_digest)]
RoleDigest = Annotated[TokenDigest, BeforeValidator(_digest_alone)]
