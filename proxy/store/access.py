"""How to reach a store: its role, credentials, certificates and time limits. Plain values."""

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
"""To one server, of one process. It is here because the supervisor reads it, and does not import the client."""


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """What servers are told, which are trusted, and how long they may take. What stands in a URL comes before it.

    timeout_s: for a call. connect_timeout_s: for a connection to be set up, credentials included.
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
