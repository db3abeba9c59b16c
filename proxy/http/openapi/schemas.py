"""The JSON schemas of the OpenAPI document.

Objects may get new members in a later version, unless they say `additionalProperties: false`.
"""

from collections.abc import Mapping
from typing import Any

from proxy.learning.evidence import State
from proxy.learning.verdict import Reason
from proxy.problems import Code
from proxy.quota.usage_report import OUTCOMES

Object = Mapping[str, Any]
"""A JSON object: a schema, or another part of the document."""


def record(members: Mapping[str, Object], optional: Mapping[str, Object] | None = None, **more: Any) -> Object:
    """An object with these members, all of which are required but the `optional` ones."""
    return {"type": "object", "properties": {**members, **(optional or {})}, "required": list(members), **more}


def closed(members: Mapping[str, Object], optional: Mapping[str, Object] | None = None, **more: Any) -> Object:
    """As `record`, without any other members."""
    return record(members, optional, additionalProperties=False, **more)


def reference(name: str, kind: str = "schemas") -> Object:
    """A reference to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def array(items: Object, **more: Any) -> Object:
    return {"type": "array", "items": items, **more}


def one_of(*schemas: Object) -> Object:
    return {"oneOf": list(schemas)}


def nullable(schema: Object) -> Object:
    """The same schema, or null."""
    return {**schema, "type": [schema["type"], "null"]}


def text(description: str = "", **more: Any) -> Object:
    return {"type": "string", "description": description, **more} if description else {"type": "string", **more}


def boolean(description: str) -> Object:
    return {"type": "boolean", "description": description}


def integer(description: str) -> Object:
    return {"type": "integer", "description": description}


def count(description: str) -> Object:
    return {**COUNT, "description": description}


def in_credits(description: str) -> Object:
    return {**CREDITS, "description": description}


COUNT: Object = {"type": "integer", "minimum": 0}
CREDITS: Object = {"type": "number", "minimum": 0, "description": "Credits, an exact decimal number."}
SECONDS: Object = {"type": "integer", "minimum": 0, "description": "Seconds."}
PERCENT: Object = nullable({"type": "number", "minimum": 0, "description": "In per cent; null if the total is 0."})
DAY: Object = {"type": "string", "format": "date"}
TIME: Object = {"type": "string", "format": "date-time"}
TEAM = text("A team's id.", pattern="^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")
ACCOUNT = text("The id of an account: a RenderNet key in the gateway's config.")
KEY = text("The cache key of a body: SHA-256.", pattern="^[0-9a-f]{64}$")

_QUOTA_NAMES: dict[str, Object] = {
    "scope": {"enum": ["team", "org"]},
    "measure": {"enum": ["requests", "estimated_credits"]},
    "per": {"enum": ["minute", "hour", "day", "week", "month"]},
}
"""What names one of a team's quotas."""

_ANYTHING: Object = {"type": "object", "additionalProperties": True}

_GENERATIONS = array(
    {
        "type": "object",
        "additionalProperties": True,
        "description": "A generation object of RenderNet's API. All of its members are passed on.",
        "properties": {
            "model": text("The model's name."),
            "style": text("The style's name, instead of a model's."),
            "prompt": record({}, {"positive": text(), "negative": text()}, additionalProperties=True),
            "batch_size": {"type": "integer"},
            "quality": text("Such as Regular or Plus."),
            "steps": {"type": "integer"},
            "cfg_scale": {"type": "number"},
            "seed": {"type": "integer"},
        },
    },
    minItems=1,
    description="What an estimate is for: an array of generation objects.",
)

_ESTIMATE = record(
    {
        "data": record(
            {"estimated": CREDITS},
            {"balance": {"type": "number", "description": "The newest balance that RenderNet has reported."}},
            additionalProperties=True,
            description="What RenderNet said for this body, with the newest balance that is known.",
        )
    },
    {"error": {**_ANYTHING, "description": "Empty."}},
    additionalProperties=True,
)

_PROBLEM = record(
    {
        "type": text("`urn:estimate-proxy:problem:` and the code.", format="uri"),
        "title": text("What the code means."),
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": text("What happened, and what to do."),
        "request_id": text("As in `X-Request-Id`."),
        "data": {"type": "null"},
        "error": record(
            {"code": text("Stable: programs may depend on it.", enum=list(Code)), "message": text("As `detail`.")},
            description="RenderNet's own envelope of errors.",
        ),
    },
    {
        "quota": record(
            {**_QUOTA_NAMES, "limit": CREDITS, "used": CREDITS, "requested": nullable(CREDITS), "resets_at": TIME},
            description="The first quota that refused the request.",
        ),
        "estimated": in_credits("The price, if it is above the request's ceiling."),
        "ceiling": in_credits("The request's `Estimate-Proxy-Max-Credits`."),
        "violated-policies": array(text(), description="The names of all quotas that refused it, as in `RateLimit`."),
        "upstream": record(
            {"status": {"type": "integer"}},
            {"code": {"type": ["string", "integer"]}, "message": text()},
            description="What RenderNet said.",
        ),
        "err": record({"code": text(), "message": text()}, description="As `error`, like other RenderNet endpoints."),
    },
    additionalProperties=True,
    description="A problem document (RFC 9457) that is also an error of RenderNet's API.",
)

_QUOTA = record(
    {
        **_QUOTA_NAMES,
        "scope": text("Of the team, or of all teams together.", enum=["team", "org"]),
        "limit": CREDITS,
        "used": CREDITS,
        "remaining": CREDITS,
        "on_exceed": text("`warn`: counted, and admitted.", enum=["refuse", "warn"]),
        "window_start": TIME,
        "resets_at": TIME,
        "used_percent": PERCENT,
    },
    {"forecast": reference("Forecast")},
)

_FORECAST = record(
    {
        "at_end": in_credits("What will be used at the window's end."),
        "low": in_credits("The range around it, from the forecast's own past errors."),
        "high": CREDITS,
        "reached_at": {**nullable(TIME), "description": "When the limit is reached; null: not in this window."},
        "reached_from": {**nullable(TIME), "description": "At the earliest."},
        "reached_until": {**nullable(TIME), "description": "At the latest."},
        "method": text("How it was made, in words."),
    },
    description="Of a quota for a week or month. Absent without 14 days of history, and if nothing was used.",
)

_RATE = record(
    {
        "per_s": {"type": "number", "exclusiveMinimum": 0},
        "burst": {"type": "integer", "minimum": 1},
        "remaining": COUNT,
    },
    description="Requests a second, the largest burst, and how many requests the rate admits now.",
)

_TEAM_QUOTAS = record(
    {
        "team": reference("TeamId"),
        "team_name": text("Empty if the config has none."),
        "rate": _RATE,
        "quotas": array(reference("Quota")),
    }
)

_AMOUNTS: dict[str, Object] = {
    "requests": count("Requests that were admitted."),
    "refused": count("Requests that the rate or a quota refused."),
    "estimated_credits": CREDITS,
    "outcomes": {
        "type": "object",
        "additionalProperties": COUNT,
        "description": f"How many had which outcome: {', '.join(OUTCOMES)}. Those that did not occur are left out.",
    },
    "upstream_calls_saved": count("Answers for which RenderNet was not asked."),
    "upstream_seconds_saved": nullable(
        {"type": "number", "minimum": 0, "description": "What these would have taken; null if nobody knows."}
    ),
}
_MONEY: dict[str, Object] = {
    "derived_cost": {"type": "number", "description": "With `org.currency`: credits times its `per_credit`."}
}

_USAGE = record(
    {
        "from": DAY,
        "to": DAY,
        "timezone": text("Of the days, such as Europe/Berlin."),
        "by": array({"enum": ["day", "week", "month", "team", "model"]}),
        "rows": array(
            record(
                {**_AMOUNTS, "share_percent": PERCENT},
                {
                    **_MONEY,
                    "day": DAY,
                    "week": {**DAY, "description": "Its Monday."},
                    "month": text(pattern="^[0-9]{4}-[0-9]{2}$"),
                    "team": text("A team's id."),
                    "team_name": text("Empty if the config has none."),
                    "model": text(),
                },
                description="The members that `by` names say what the row is about.",
            )
        ),
        "total": record(_AMOUNTS, _MONEY),
    },
    {"currency": record({"code": text(pattern="^[A-Z]{3}$"), "per_credit": {"type": "number"}})},
)

_EXPLANATION = record(
    {
        "canonical_body": text("The canonical JSON of the body, which RenderNet would receive."),
        "key": KEY,
        "account": ACCOUNT,
        "query": text("The query string, which is a part of the question."),
        "ignored_members": array(text(), description="Members of the body that `cache.ignore` leaves out of the key."),
        "stored": nullable(boolean("Whether a price is stored; null if nobody knows.")),
        "admitted": nullable(boolean("Whether an estimate would be admitted now; null if nobody knows.")),
    },
    {
        "estimated": in_credits("The stored price; not shown if a quota would refuse the estimate."),
        "age_s": {**SECONDS, "description": "The age of the stored price."},
        "ttl_s": integer("How long it is fresh; negative: it is stale."),
        "refusal": record({"code": {"enum": list(Code)}, "detail": text()}),
        "degraded": array({"enum": ["ledger", "price-book"]}, description="The stores that are unavailable."),
        "learned": reference("LearnedAboutBody"),
    },
)

_LEARN: Object = {"enum": ["off", "observe", "use"], "description": "The setting `cache.learn`."}

_EVIDENCE: dict[str, Object] = {
    "scope": text("An id, for `estimate-proxy learned forget`."),
    "state": {"enum": list(State)},
    "counting": array(text(), description="The members that decide the price, as far as is known, as dotted paths."),
    "left_out": array(text(), description="Those that seem not to."),
    "tests": count("Bodies that were asked although a price could have been inferred, and agreed."),
    "tests_needed": COUNT,
    "bound": {"type": "number", "description": "At 95 % confidence, fewer than this share of bodies cost otherwise."},
    "bound_in_words": text(),
}

_LEARNED_ABOUT_BODY = record(
    {"learn": _LEARN, "inferable": boolean("Whether its price could be inferred now.")},
    {
        "setting": text("The id of its setting: the members that count, with their values."),
        "reason": {"enum": list(Reason), "description": "Why its price cannot be inferred."},
        "detail": text("The reason in words."),
        **_EVIDENCE,
    },
)

_SCOPE = record(
    {
        **_EVIDENCE,
        "items": array(text(), description="The model or mode of each item."),
        "settings": count("How many settings were asked."),
        "asked": count("Bodies that RenderNet was asked."),
        "answered": count("Answers that were inferred."),
        "answered_percent": {"type": "number"},
        "would_have_answered": count('With `learn = "observe"`: that would have been inferred.'),
        "would_have_answered_percent": {"type": "number"},
        "would_have_been_wrong": COUNT,
        "audits": COUNT,
        "list_moves": count("How often the price list changed as a whole."),
        "contradictions": COUNT,
        "last_contradiction": one_of(
            record({"since": TIME, "until": TIME, "suspect_answers": COUNT}), {"type": "null"}
        ),
        "team": text("The team that brought it; empty if unknown."),
        "last_asked": TIME,
    }
)

_LEARNED = record(
    {"learn": _LEARN, "timezone": text(), "accounts": array(record({"account": ACCOUNT, "scopes": array(_SCOPE)}))}
)

_PRICE_CHANGE = record(
    {
        "at": TIME,
        "account": ACCOUNT,
        "model": text(),
        "key": text("The beginning of the body's key, as in log lines."),
        "old": CREDITS,
        "new": CREDITS,
        "found_by": {"enum": ["audit", "doubt", "ask"]},
    }
)

_PRICE_CHANGES = record(
    {
        "from": DAY,
        "to": DAY,
        "timezone": text(),
        "changes": array(_PRICE_CHANGE),
        "not_kept": count("How many more were found, of all accounts."),
    }
)

_ACCOUNT_OR_DEFAULT = {**ACCOUNT, "default": "default"}

_PURGE = one_of(
    closed(
        {"body": reference("Generations")},
        {"account": _ACCOUNT_OR_DEFAULT, "query": text("As sent with the estimate.")},
        title="One question",
    ),
    closed({"all": {"const": True}}, {"account": _ACCOUNT_OR_DEFAULT}, title="All prices of an account"),
)

_PURGED = one_of(
    record({"account": ACCOUNT, "purged": {"const": "question"}, "key": KEY, "was_stored": {"type": "boolean"}}),
    record({"account": ACCOUNT, "purged": {"const": "all"}}),
)

_TOKEN = record(
    {
        "role": {"enum": ["team", "viewer", "admin"]},
        "timezone": text("The organisation's, such as Europe/Berlin."),
        "today": {**DAY, "description": "The date in that time zone."},
        "accounts": array(
            record(
                {
                    "account": ACCOUNT,
                    "balance": nullable({"type": "number", "description": "The newest; null if none is known."}),
                    "balance_age_s": nullable(SECONDS),
                }
            )
        ),
    },
    {
        "team": reference("TeamId"),
        "team_name": text("Empty if the config has none."),
        "token_label": text("Empty if the config has none."),
        "token_expires": nullable({**DAY, "description": "The token's last day; null: it does not expire."}),
    },
    description="The optional members are those of a team's token.",
)

_READINESS = record(
    {"status": {"const": "ready"}, "degraded": array({"enum": ["ledger", "price-book", "upstream"]})},
    description="`degraded` lists what is unavailable; the gateway serves without it as documented.",
)

_QUOTE_OPTIONS: dict[str, Object] = {
    "breakdown": {
        "enum": ["items", "members"],
        "description": "`items`: asks each item alone. `members`: asks the body without each of its members.",
    },
    "quantity": {"type": "integer", "minimum": 1, "maximum": 1_000_000, "description": "How many of the cheapest."},
}

_NEW_VARIANT = closed({"label": text("Distinct.", minLength=1, maxLength=200), "body": reference("Generations")})

_QUOTE_REQUEST = one_of(
    closed({"variants": array(_NEW_VARIANT, minItems=1, maxItems=64)}, _QUOTE_OPTIONS, title="Bodies"),
    closed(
        {
            "base": reference("Generations"),
            "vary": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {"type": "array", "minItems": 1},
                "description": "Values by dotted path inside each item. Every combination is a variant.",
            },
        },
        _QUOTE_OPTIONS,
        title="A grid",
    ),
)

_AMOUNT: Object = {"type": ["number", "null"], "description": "Credits; null if unknown."}
_WHY_UNKNOWN = record(
    {"code": text("A problem code, or RenderNet's own."), "message": text()}, description="Why a price is unknown."
)

_ITEM_ALONE = record({"item": COUNT, "estimated": _AMOUNT}, {"error": _WHY_UNKNOWN}, title="An item alone")
_MEMBER = record(
    {"member": text(), "marginal": {**_AMOUNT, "description": "What the member adds to the price."}},
    {"mode_changes": {"const": True, "description": "Without it, another mode wins."}, "error": _WHY_UNKNOWN},
    title="A member",
)

_QUOTED_VARIANT = record(
    {
        "label": text(),
        "changes": array(
            record(
                {"path": text(), "value": {}},
                {"added": {"const": True, "description": "It was not there before."}},
                description="What the grid has set.",
            )
        ),
        "estimated": _AMOUNT,
        "delta": {**_AMOUNT, "description": "The difference to the first variant."},
        "age_s": nullable(SECONDS),
        "ttl_s": nullable(integer("How long the price is fresh; null: it is not stored.")),
        "basis": {"enum": ["asked", "stored", "inferred", None]},
    },
    {
        "error": _WHY_UNKNOWN,
        "breakdown": array(one_of(_ITEM_ALONE, _MEMBER)),
        "residual": {**_AMOUNT, "description": "The price less the sum of the items' prices."},
    },
)

_FIT = record(
    {
        **_QUOTA_NAMES,
        "remaining": CREDITS,
        "fits": nullable(boolean("Whether the cheapest fits, times `quantity`.")),
        "how_many": nullable(integer("How many of the cheapest fit; null: unknown, or no limit.")),
    }
)

_QUOTE = record(
    {
        "variants": array(_QUOTED_VARIANT),
        "cheapest": {"type": ["string", "null"], "description": "The label of the cheapest variant."},
        "quotas": nullable(
            array(_FIT, description="What the quotas leave room for; null if the ledger is unavailable.")
        ),
        "balance": {"type": ["number", "null"]},
        "balance_age_s": nullable(SECONDS),
    },
    {
        "quantity": {"type": "integer"},
        "total": {**_AMOUNT, "description": "The price of the cheapest, times `quantity`."},
    },
)

SCHEMAS: Mapping[str, Object] = {
    "QuoteRequest": _QUOTE_REQUEST,
    "Quote": _QUOTE,
    "TeamId": TEAM,
    "Generations": _GENERATIONS,
    "Estimate": _ESTIMATE,
    "Problem": _PROBLEM,
    "Quota": _QUOTA,
    "Forecast": _FORECAST,
    "TeamQuotas": _TEAM_QUOTAS,
    "AllQuotas": record({"teams": array(reference("TeamQuotas"))}),
    "Token": _TOKEN,
    "Usage": _USAGE,
    "Explanation": _EXPLANATION,
    "LearnedAboutBody": _LEARNED_ABOUT_BODY,
    "Learned": _LEARNED,
    "PriceChanges": _PRICE_CHANGES,
    "Purge": _PURGE,
    "Purged": _PURGED,
    "Liveness": record({"status": {"const": "alive"}}),
    "Readiness": _READINESS,
    "Draining": record({"status": {"const": "draining"}}),
}
