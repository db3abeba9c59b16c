"""Renders the parameters of `Cache-Status` (RFC 9211 §2). `hit` and `fwd` exclude each other."""

from math import floor
from typing import assert_never

from proxy.cache.prices import StoredPrice
from proxy.gateway.fetcher import FetchResult
from proxy.upstream.replies import Failed, Priced, Rejected, Reply, Unpriced

INFERRED = "inferred"
"""The detail of an answer whose price is another body's, fresh or stale: a negative `ttl` shows the latter."""


def hit(stored: StoredPrice, *, detail: str | None = None) -> str:
    """A stored price was served without asking upstream. `ttl` is negative if it was stale."""
    status = f"hit; {_ttl(stored.ttl_s)}"
    return f"{status}; detail={detail}" if detail else status


def forwarded(reason: str, fetched: FetchResult, *, ttl_s: float) -> str:
    """Upstream was asked, by this request or by another one that it waited for. `ttl_s` is of a price just stored."""
    collapsed = "collapsed" if fetched.collapsed else None
    if reason == "bypass":
        return _join("fwd=bypass", "detail=store-unavailable", collapsed)
    stored = ("stored", _ttl(ttl_s)) if fetched.stored else ()
    return _join(f"fwd={reason}", _status(fetched.reply), *stored, collapsed)


def after_failure(failed: Failed, stored: StoredPrice, *, detail: str = "stale-if-error") -> str:
    """A stale price was served because upstream failed, or was not asked: see `Failed.asked`."""
    ttl, detail = _ttl(stored.ttl_s), f"detail={detail}"
    return _join("fwd=stale", _status(failed), ttl, detail) if failed.asked else _join("hit", ttl, detail)


def _join(*parameters: str | None) -> str:
    return "; ".join(parameter for parameter in parameters if parameter)


def _ttl(ttl_s: float) -> str:
    return f"ttl={floor(ttl_s)}"


def _status(reply: Reply) -> str | None:
    match reply:
        case Failed(upstream_status=None):
            return None
        case Priced(status=status) | Unpriced(status=status) | Rejected(status) | Failed(upstream_status=status):
            return f"fwd-status={status}"
        case _:
            assert_never(reply)
