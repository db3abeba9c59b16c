"""How to reach a store: role, credentials, certificates and time limits.

Only dataclasses and constants: the supervisor imports this without the client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["ledger", "price-book"]

EmbeddedUrls = Mapping[Role, str]
"""The URLs of the embedded stores, by role."""

TIMEOUT_S, CONNECT_TIMEOUT_S = 0.25, 2.0
"""Defaults of `store.timeout_s` and `store.connect_timeout_s`."""

MAX_CONNECTIONS = 16
"""Limits the connections of one process to one server.

It is in this module because the supervisor reads it, and must not import the client.
"""


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """Credentials, certificates and time limits. Credentials in a URL take precedence.

    timeout_s: limits a call.
    connect_timeout_s: limits the set-up of a connection, authentication included.
    """

    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    timeout_s: float = TIMEOUT_S
    connect_timeout_s: float = CONNECT_TIMEOUT_S


NO_ACCESS = StoreAccess()
