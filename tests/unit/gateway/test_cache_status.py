"""`Cache-Status` in all documented forms, each a valid structured field of RFC 9211."""

from typing import Any

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.prices import Price, StoredPrice
from proxy.gateway.cache_status import after_failure, forwarded, hit
from proxy.gateway.fetcher import FetchResult
from proxy.problems import Code, Problem
from proxy.upstream.replies import Failed, Priced, Rejected, Reply, Unpriced

PRICED = Priced(Price(b"5", b""), b"20")
FETCHED = FetchResult(PRICED, stored=True)
UPSTREAM_ERROR = Failed(Problem(Code.UPSTREAM_ERROR, "Later."), 502)
TIMEOUT = Failed(Problem(Code.UPSTREAM_TIMEOUT, "Later."))
OPEN = Failed(Problem(Code.UPSTREAM_BUSY, "Later.", 5), asked=False)

# RFC 9211 §2: the type of each parameter.
KINDS = {"hit": bool, "fwd": http_sf.Token, "fwd-status": int, "ttl": int, "stored": bool, "collapsed": bool}
KINDS |= {"detail": http_sf.Token}
REASONS = {"bypass", "method", "uri-miss", "vary-miss", "miss", "request", "stale", "partial"}


def stored(ttl_s: float) -> StoredPrice:
    return StoredPrice(Price(b"5", b""), 0.0, ttl_s, b"d1")


def parameters(status: str) -> dict[str, Any]:
    """The parameters after the cache's name, checked to be valid under RFC 9211."""
    parsed: Any = http_sf.parse(f"estimate-proxy; {status}".encode(), tltype="list")
    [(name, found)] = parsed
    assert name == http_sf.Token("estimate-proxy")
    assert http_sf.ser(parsed) == f"estimate-proxy;{status.replace('; ', ';')}"
    assert all(type(value) is KINDS[parameter] for parameter, value in found.items())
    assert ("hit" in found) != ("fwd" in found)
    if "hit" in found:
        assert found.keys() <= {"hit", "ttl", "detail"}
        assert found["hit"] is True
    else:
        assert str(found["fwd"]) in REASONS
    return dict(found)


def after(reply: Reply, reason: str = "miss", *, kept: bool = False, collapsed: bool = False) -> str:
    return forwarded(reason, FetchResult(reply, stored=kept, collapsed=collapsed), ttl_s=300)


SHAPES = {
    "hit": (hit(stored(288)), "hit; ttl=288"),
    "hit, stale": (
        hit(stored(-12), detail="stale-while-revalidate"),
        "hit; ttl=-12; detail=stale-while-revalidate",
    ),
    "miss": (after(PRICED, kept=True), "fwd=miss; fwd-status=200; stored; ttl=300"),
    "miss, waited": (
        after(PRICED, kept=True, collapsed=True),
        "fwd=miss; fwd-status=200; stored; ttl=300; collapsed",
    ),
    "miss, not kept": (after(PRICED), "fwd=miss; fwd-status=200"),
    "miss, not kept, waited": (after(PRICED, collapsed=True), "fwd=miss; fwd-status=200; collapsed"),
    "stale": (after(PRICED, "stale", kept=True), "fwd=stale; fwd-status=200; stored; ttl=300"),
    "request": (after(PRICED, "request", kept=True), "fwd=request; fwd-status=200; stored; ttl=300"),
    "request, no-store": (after(PRICED, "request"), "fwd=request; fwd-status=200"),
    "unpriced": (after(Unpriced(b"{}", b"5")), "fwd=miss; fwd-status=200"),
    "rejected": (after(Rejected(422, b"{}")), "fwd=miss; fwd-status=422"),
    "rejected, waited": (after(Rejected(400, b"{}"), collapsed=True), "fwd=miss; fwd-status=400; collapsed"),
    "failed": (after(UPSTREAM_ERROR), "fwd=miss; fwd-status=502"),
    "stale, failed, nothing to show": (after(UPSTREAM_ERROR, "stale"), "fwd=stale; fwd-status=502"),
    "no answer": (after(TIMEOUT), "fwd=miss"),
    "no answer, waited": (after(TIMEOUT, "stale", collapsed=True), "fwd=stale; collapsed"),
    "bypass": (after(PRICED, "bypass"), "fwd=bypass; detail=store-unavailable"),
    "bypass, waited": (
        after(PRICED, "bypass", collapsed=True),
        "fwd=bypass; detail=store-unavailable; collapsed",
    ),
    "bypass, failed": (after(UPSTREAM_ERROR, "bypass"), "fwd=bypass; detail=store-unavailable"),
    "stale after a failure": (
        after_failure(UPSTREAM_ERROR, stored(-12)),
        "fwd=stale; fwd-status=502; ttl=-12; detail=stale-if-error",
    ),
    "stale after no answer": (after_failure(TIMEOUT, stored(-12)), "fwd=stale; ttl=-12; detail=stale-if-error"),
    "stale beside an open circuit": (after_failure(OPEN, stored(-12)), "hit; ttl=-12; detail=stale-if-error"),
}


@pytest.mark.parametrize(("status", "documented"), SHAPES.values(), ids=SHAPES)
def test_each_form_is_as_documented(status: str, documented: str) -> None:
    assert status == documented
    parameters(status)


@pytest.mark.parametrize(
    ("ttl_s", "shown"),
    [
        (288.9, 288),
        (288.0, 288),
        (1.0, 1),
        (0.999, 0),
        (0.0, 0),
        (-0.0, 0),
        (-0.001, -1),
        (-0.5, -1),
        (-11.5, -12),
        (-12.0, -12),
        (-12.001, -13),
        (31_536_000.5, 31_536_000),
    ],
)
def test_a_ttl_is_rounded_down(ttl_s: float, shown: int) -> None:
    for status in (
        hit(stored(ttl_s)),
        forwarded("miss", FETCHED, ttl_s=ttl_s),
        after_failure(UPSTREAM_ERROR, stored(ttl_s)),
        after_failure(OPEN, stored(ttl_s)),
    ):
        assert parameters(status)["ttl"] == shown
        assert f"ttl={shown}" in status.split("; ")


replies = st.sampled_from([PRICED, Unpriced(b"{}", None), UPSTREAM_ERROR, TIMEOUT, OPEN]) | st.builds(
    Rejected, st.integers(400, 499), st.just(b"{}")
)
ttls = st.floats(-1e6, 1e6)


@given(st.sampled_from(["miss", "stale", "request", "bypass"]), replies, st.booleans(), st.booleans(), ttls)
def test_each_forwarded_request_has_a_valid_status(
    reason: str,
    reply: Reply,
    kept: bool,  # noqa: FBT001 -- hypothesis passes them by position
    collapsed: bool,  # noqa: FBT001
    ttl_s: float,
) -> None:
    fetched = FetchResult(reply, stored=kept and isinstance(reply, Priced), collapsed=collapsed)
    found = parameters(forwarded(reason, fetched, ttl_s=ttl_s))
    assert str(found["fwd"]) == reason
    assert ("stored" in found) == ("ttl" in found) == (fetched.stored and reason != "bypass")
    assert ("collapsed" in found) == collapsed


@given(replies, ttls, st.none() | st.just("stale-while-revalidate"))
def test_each_stored_price_has_a_valid_status(reply: Reply, ttl_s: float, detail: str | None) -> None:
    found = parameters(hit(stored(ttl_s), detail=detail))
    assert found["hit"] is True
    assert ("detail" in found) == (detail is not None)
    if isinstance(reply, Failed):
        found = parameters(after_failure(reply, stored(ttl_s)))
        assert ("hit" in found) != reply.asked
        assert found.get("fwd-status") == reply.upstream_status
        assert str(found["detail"]) == "stale-if-error"
