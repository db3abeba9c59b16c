"""Paths of the gateway's own endpoints, and masking of paths in logs. RenderNet's path: `proxy.upstream.address`."""

import re
import string
from urllib.parse import quote, unquote

from proxy.upstream.address import ESTIMATE_PATH

PAGE_PATH = "/"
QUOTE_PATH = "/v1/quote"
EXPLAIN_PATH = "/v1/explain"
PURGE_PATH = "/v1/cache/purge"
USAGE_PATH = "/v1/usage"
QUOTA_PATH = "/v1/quota"
TOKEN_PATH = "/v1/token"  # noqa: S105 -- a path, not a secret
PRICE_CHANGES_PATH = "/v1/prices/changes"
LEARNED_PATH = "/v1/learned"
METRICS_PATH = "/metrics"
LIVENESS_PATH = "/healthz"
READINESS_PATH = "/readyz"
OPENAPI_PATH = "/openapi.json"
DOCS_PATH = "/docs"

OWN_PATHS = (
    *(QUOTA_PATH, USAGE_PATH, TOKEN_PATH, PRICE_CHANGES_PATH, LEARNED_PATH, QUOTE_PATH),
    *(EXPLAIN_PATH, PURGE_PATH, METRICS_PATH, LIVENESS_PATH, READINESS_PATH, OPENAPI_PATH, DOCS_PATH),
)
"""Those of the API: a client that gets one of them slightly wrong is told so."""

MAX_SHOWN_CHARACTERS = 200
"""Limits a path in log lines and problems: a request line may have up to 64 KiB."""

_ESTIMATE_PATH = ESTIMATE_PATH.encode()
_TOKEN = re.compile(r"ep_[0-9A-Za-z]{16,}", re.IGNORECASE)
"""A token, or the beginning of one."""

_SHOWN_AS_THEY_ARE = "".join(set(string.punctuation) - set('"#%<>?\\'))


def shown_path(raw_path: bytes) -> str:
    """A request's path for log lines and problems: percent-encoded as far as needed, tokens masked, length limited."""
    if raw_path == _ESTIMATE_PATH:
        return ESTIMATE_PATH
    path = without_tokens(unquote(raw_path.decode("ascii"), "latin-1"))
    shown = quote(path, safe=_SHOWN_AS_THEY_ARE, encoding="latin-1")
    return shown if len(shown) <= MAX_SHOWN_CHARACTERS else shown[:MAX_SHOWN_CHARACTERS] + "..."


def without_tokens(text: str) -> str:
    """`text` with tokens masked: a client may put its token where it does not belong."""
    return _TOKEN.sub("ep_***", text)
