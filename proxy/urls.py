"""Validates the URLs in settings, and parses the URLs of stores.

* Messages never show a value: a URL may contain a password.
* Some URLs are refused that redis-py accepts: it ignores a database that is not a number, for example, and takes query
  parameters for options of its own.

The text of a `ValueError` has no subject: it is shown after the setting's name.
"""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

MAX_URL_CHARACTERS = 2048
MAX_ADDRESSES = 32
"""Limits the hosts in one URL."""

_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # RFC 1035 §2.3.1, and `_`, which names of containers contain
_NAME = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*(?![0-9]+\.?$){_LABEL}\.?")

_LOCATION = re.compile(r"(\[[^][]+:[^][]*\]|[^][:]*)(:[0-9]*)?")  # `hostname` ignores text beside the brackets
_INVALID = "is not a valid URL: a port is 1 to 65535, and special characters are percent-encoded"

Kind = Literal["server", "socket", "sentinel", "cluster"]

_KINDS: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("socket", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
"""By scheme: what the URL points to, and whether the connection uses TLS."""

_INSTEAD_OF_OPTIONS = {
    "ssl_cert_reqs": (
        "certificates are always verified: remove it, and set store.ca_file to the CA's certificate, or to that of the "
        "server if it is self-signed"
    ),
    "ssl_check_hostname": "host names are always verified: remove it, and use a host that the certificate names",
    "ssl_ca_certs": "set store.ca_file instead",
    "ssl_certfile": "set store.cert_file instead",
    "ssl_keyfile": "set store.key_file instead",
    "socket_timeout": "set store.timeout_s instead",
    "socket_connect_timeout": "set store.connect_timeout_s instead",
}
"""What to do about options that URLs for redis-py often have. Other options may be part of a password, so their names
are not shown."""

_DEFAULT_PORTS: dict[Kind, int] = {"server": 6379, "sentinel": 26379, "cluster": 6379}


class Address(NamedTuple):
    """A server's host and port. A host with colons is an IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A parsed store URL.

    addresses: of the server, of the Sentinels, or of some nodes of the cluster; empty for a socket.
    path: of the unix socket, else empty.
    primary: the name under which the Sentinels know the primary, else empty.
    """

    kind: Kind
    tls: bool
    addresses: tuple[Address, ...]
    path: str
    primary: str
    database: int
    username: str | None
    password: str | None


def check_host(host: str) -> str:
    if not (_NAME.fullmatch(host) or is_ip(host)):
        raise ValueError("must name a host: an IP address or a name in ASCII")
    return host


def is_ip(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def split_url(url: str, *schemes: str) -> SplitResult:
    """The parts of a URL with exactly one host. Raises `ValueError`."""
    parts = _split(url, schemes)
    try:
        is_bad_port = parts.port == 0
    except ValueError:
        is_bad_port = True
    if is_bad_port:
        raise ValueError(_INVALID)
    location = _LOCATION.fullmatch(parts.netloc.rpartition("@")[2])
    check_host((location and parts.hostname) or "")
    return parts


def parse_store_url(url: str) -> StoreUrl:
    """Parses a store's URL. Raises `ValueError`."""
    parts = _split(url, tuple(_KINDS))
    kind, tls = _KINDS[parts.scheme]
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if kind == "socket":
        addresses: tuple[Address, ...] = ()
    elif kind == "server":
        split_url(url, parts.scheme)
        addresses = (Address(unquote(parts.hostname or ""), parts.port or _DEFAULT_PORTS[kind]),)
    else:
        addresses = _addresses(parts.netloc.rpartition("@")[2], _DEFAULT_PORTS[kind])
    for option in options:
        if option in _INSTEAD_OF_OPTIONS:
            raise ValueError(f"has the option {option}: {_INSTEAD_OF_OPTIONS[option]}")
    if parts.fragment or not options.keys() <= {"db", "username", "password"}:
        raise ValueError("has options other than db, username and password (# and ? are percent-encoded)")
    path, primary, database = _parse_path(kind, parts, options.get("db"))
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    return StoreUrl(
        kind=kind,
        tls=tls,
        addresses=addresses,
        path=path,
        primary=primary,
        database=database,
        username=unquote(user) or options.get("username") or None,
        password=unquote(password) or options.get("password") or None,
    )


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """`urlsplit` without the hosts, which are put back: some versions refuse brackets after the first host."""
    scheme, slashes, rest = url.partition("://")
    location = re.split("[/?#]", rest, maxsplit=1)[0]
    try:
        parts = urlsplit(f"{scheme}{slashes}{rest[len(location) :]}")._replace(netloc=location)
    except ValueError:
        raise ValueError(_INVALID) from None
    if not url.isprintable() or " " in url or len(url) > MAX_URL_CHARACTERS:
        raise ValueError(_INVALID)
    if parts.scheme not in schemes:
        *others, last = (f"{scheme}://" for scheme in schemes)
        raise ValueError(f"must be a URL that begins with {', '.join(others)} or {last}")
    return parts


def _addresses(locations: str, default_port: int) -> tuple[Address, ...]:
    """Parses `h1:1,h2:2`."""
    found = tuple(_address(location, default_port) for location in locations.split(","))
    if len(found) > MAX_ADDRESSES:
        raise ValueError(f"names more than {MAX_ADDRESSES} servers: name fewer")
    return found


def _address(location: str, default_port: int) -> Address:
    matched = _LOCATION.fullmatch(location)
    if not matched:
        raise ValueError(_INVALID)
    port = int((matched[2] or "").lstrip(":") or default_port)
    if not 1 <= port <= 65535:  # noqa: PLR2004 -- RFC 9293 §3.1
        raise ValueError(_INVALID)
    return Address(check_host(matched[1].strip("[]").lower()), port)


def _parse_path(kind: Kind, parts: SplitResult, option: str | None) -> tuple[str, str, int]:
    """The socket's path, the primary's name, and the database's number."""
    match kind:
        case "socket":
            path, primary, text = unquote(parts.path), "", option or "0"
            if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
                raise ValueError("must name a socket by its full path, such as unix:///run/valkey.sock")
        case "sentinel":
            sentinel_path = re.fullmatch(r"/([A-Za-z0-9._-]+)(?:/([0-9]{0,5}))?", parts.path)
            if not sentinel_path:
                raise ValueError("must name the primary, such as redis+sentinel://host:26379/mymaster/0")
            path, primary, text = "", sentinel_path[1], option if option is not None else sentinel_path[2] or "0"
        case "cluster":
            path, primary, text = "", "", option if option is not None else parts.path.strip("/") or "0"
            if text != "0":
                raise ValueError("must not name a database other than 0: a cluster has no other")
        case "server":
            path, primary, text = "", "", option if option is not None else parts.path.removeprefix("/") or "0"
            if not re.fullmatch("(/[0-9]{0,5})?", parts.path):
                text = ""
    if not re.fullmatch("[0-9]{1,5}", text):
        raise ValueError("must name its database by number, such as redis://host/0")
    return path, primary, int(text)
