"""Warnings about settings that are valid but probably unintended, as lines for the operator."""

import re
from collections.abc import Iterator, Sequence
from datetime import date

from proxy.settings.schema import CacheSettings, QuotaSettings, Settings

EXPIRES_SOON_DAYS = 14
"""The alert `EstimateProxyTokenExpires` has the same limit."""

_INDEX = re.compile("[0-9]+")
_NO_MEMBER = re.compile(r"[$*#]|.*[][/].*|\s.*|.*\s", re.DOTALL)
"""A part of a path that is a wildcard or the syntax of another kind of path."""


def warnings(settings: Settings, today: date) -> Iterator[str]:
    """One line for each doubtful setting. `today` is in the time zone `org.timezone`."""
    metrics = settings.metrics
    if not (metrics.public or metrics.tokens or settings.admin.tokens):
        yield "nobody can read /metrics: add a token's digest to metrics.tokens, or set metrics.public = true"
    upstream_s, request_s = settings.upstream.timeout_s, settings.server.request_timeout_s
    if upstream_s > request_s:
        yield (
            f"upstream.timeout_s ({upstream_s:g}) is above server.request_timeout_s ({request_s:g}), which ends a "
            "request first: lower the one or raise the other"
        )
    yield from _token_warnings(settings, today)
    yield from _quota_warnings(settings)
    yield from _ignore_warnings(settings.cache.ignore)
    yield from _never_learn_warnings(settings.cache)
    urls = [url.get_secret_value() for url in (settings.store.url, settings.cache.url) if url is not None]
    if (settings.store.ca_file or settings.store.cert_file) and not any(url.startswith("rediss") for url in urls):
        yield "store.ca_file and store.cert_file are not used: neither store.url nor cache.url begins with rediss"


def _token_warnings(settings: Settings, today: date) -> Iterator[str]:
    for name, team in settings.teams.items():
        if not team.tokens:
            yield f"teams.{name} has no tokens, so no client can use this team"
        last_days = team.last_days()
        ends = [day for day in last_days.values() if day is not None]
        if ends and len(ends) == len(last_days) and max(ends) < today:
            yield (
                f"every token of teams.{name} has expired, the last one on {max(ends)}: "
                f"`estimate-proxy token new {name}` makes a new one"
            )
        for label, day in last_days.items():
            if day is not None and 0 <= (left := (day - today).days) <= EXPIRES_SOON_DAYS:
                yield f"the token {label!r} of teams.{name} works until {day}, for {_days(left)} after today"


def _days(number: int) -> str:
    return "1 day" if number == 1 else f"{number} days"


def _quota_warnings(settings: Settings) -> Iterator[str]:
    yield from _above_org("team_defaults", settings.team_defaults.quotas, settings.org.quotas)
    for name, team in settings.teams.items():
        yield from _above_org(f"teams.{name}", team.quotas or (), settings.org.quotas)


def _above_org(path: str, quotas: Sequence[QuotaSettings], org: Sequence[QuotaSettings]) -> Iterator[str]:
    limits = {(quota.measure, quota.per): quota.limit for quota in org if quota.on_exceed == "refuse"}
    for index, quota in enumerate(quotas):
        limit = limits.get((quota.measure, quota.per))
        if limit is not None and quota.limit > limit:
            yield (
                f"{path}.quotas[{index}] allows {quota.limit} {quota.measure} per {quota.per}, more than the "
                f"organisation's quota ({limit}), which refuses first"
            )


def _ignore_warnings(ignored: Sequence[str]) -> Iterator[str]:
    for path in ignored:
        if any(_NO_MEMBER.fullmatch(part) or _INDEX.fullmatch(part) for part in path.split(".")):
            yield (
                f"cache.ignore: {path!r} can never match: a path has names of members joined by dots, begins inside "
                "each item, and does not go through lists"
            )
        elif inside := _covering(path, ignored):
            yield f"cache.ignore: {path!r} can never match: all of {inside!r} is ignored"


def _never_learn_warnings(cache: CacheSettings) -> Iterator[str]:
    for path in cache.never_learn:
        parts = path.split(".")
        if _INDEX.fullmatch(parts[0]) or any(map(_NO_MEMBER.fullmatch, parts)):
            yield (
                f"cache.never_learn: {path!r} can never match: a path has names of members, or indexes of lists, "
                "joined by dots, and begins inside each item, such as loras.0.weight"
            )
        elif inside := path if path in cache.ignore else _covering(path, cache.ignore):
            yield f"cache.never_learn: {path!r} can never match: cache.ignore leaves out {inside!r}"


def _covering(path: str, paths: Sequence[str]) -> str | None:
    """The first of `paths` that `path` is below."""
    parts = path.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((parent for parent in parents if parent in paths), None)
