"""The operations of the OpenAPI document that teams call."""

from proxy.http.openapi.parts import (
    ADMISSION_HEADERS,
    CACHE_CONTROL,
    CSV_PARAMETERS,
    ESTIMATE_HEADERS,
    EXAMPLE_BODY,
    EXAMPLE_KEY,
    Operation,
    answer,
    headers,
    json_answer,
    json_body,
    json_or_csv,
    query,
    with_examples,
)
from proxy.http.openapi.schemas import DAY, reference
from proxy.problems import Code

_EXAMPLE_AMOUNTS = {
    "requests": 23,
    "refused": 0,
    "estimated_credits": 76.5,
    "outcomes": {"hit": 17, "miss": 6},
    "upstream_calls_saved": 17,
    "upstream_seconds_saved": 5.304,
}
_EXAMPLE_QUOTAS = {
    "team": "design",
    "rate": {"per_s": 50, "burst": 100, "remaining": 84},
    "quotas": [
        {
            "scope": "team",
            "measure": "estimated_credits",
            "per": "month",
            "limit": 5000,
            "used": 76.5,
            "remaining": 4923.5,
            "on_exceed": "refuse",
            "window_start": "2026-11-01T00:00:00+00:00",
            "resets_at": "2026-12-01T00:00:00+00:00",
            "used_percent": 1.5,
            "forecast": {
                "at_end": 4210.5,
                "low": 3890,
                "high": 4480,
                "reached_at": None,
                "reached_from": None,
                "reached_until": None,
                "method": "weekday means of 90 days, corrected by 41 backtests",
            },
        }
    ],
    "team_name": "Design",
}


ESTIMATE = Operation(
    name="estimate",
    tag="Teams",
    summary="Estimate what a generation would cost",
    description=(
        "As RenderNet's endpoint: the same path, body and answer. The answer may be a stored one; `balance` is always "
        "the newest balance that is known. The query string is a part of the question and is sent to RenderNet as it "
        "is. An answer of RenderNet without a price is passed on as it is, unless the operator has it refused with 502 "
        "`unpriced`."
    ),
    tokens=("Team",),
    parameters=[CACHE_CONTROL, reference("MaxCredits", "parameters")],
    body=json_body("Generations", {"One image": EXAMPLE_BODY}),
    answer=json_answer(
        "Estimate",
        "The estimate and the balance, in credits.",
        {"data": {"estimated": 4, "balance": 10000}, "error": {}},
        ESTIMATE_HEADERS,
    ),
    more_answers={
        "4XX": {
            "description": "RenderNet refused the body: its status and JSON, as they are.",
            "headers": {**ESTIMATE_HEADERS, **headers("RequestId", "NoStore")},
            "content": {
                "application/json": {
                    "schema": {"description": "Any JSON."},
                    "example": {"data": None, "error": {"code": "INVALID", "message": "model is unknown"}},
                }
            },
        }
    },
    problems=(
        Code.TEAM_DISABLED,
        Code.RATE_LIMITED,
        Code.QUOTA_EXCEEDED,
        Code.OVER_CEILING,
        Code.UPSTREAM_ERROR,
        Code.UPSTREAM_REFUSED,
        Code.UPSTREAM_BUSY,
        Code.UPSTREAM_TIMEOUT,
        Code.UNPRICED,
        Code.NOT_CACHED,
        Code.STORE_UNAVAILABLE,
    ),
    problem_headers=ESTIMATE_HEADERS,
)

QUOTE = Operation(
    name="quote",
    tag="Teams",
    summary="Compare the prices of several bodies",
    description=(
        "Up to 64 bodies, or every combination of some values, in one call; with `breakdown` also what each item or "
        "member adds. Amounts are RenderNet's own, added or subtracted. At most 256 distinct questions are asked: each "
        "uses one request of the rate, and one that RenderNet is asked uses one of the quotas on requests; none uses "
        "credits. A variant whose price is unknown has its own `error`."
    ),
    tokens=("Team",),
    parameters=[CACHE_CONTROL],
    body=json_body(
        "QuoteRequest",
        {
            "A grid": {"base": EXAMPLE_BODY, "vary": {"quality": ["Regular", "Plus"], "steps": [20, 30]}},
            "Bodies": {
                "variants": [{"label": "one", "body": EXAMPLE_BODY}],
                "breakdown": "members",
                "quantity": 100,
            },
            "Items": {"variants": [{"label": "two", "body": EXAMPLE_BODY * 2}], "breakdown": "items"},
        },
    ),
    answer=json_answer(
        "Quote",
        "The variants in order, and what the quotas leave room for.",
        {
            "variants": [
                {
                    "label": "quality=Plus",
                    "changes": [{"path": "quality", "value": "Plus", "added": True}],
                    "estimated": 4,
                    "delta": 0,
                    "age_s": 0,
                    "ttl_s": 3600,
                    "basis": "asked",
                }
            ],
            "cheapest": "quality=Plus",
            "quotas": [
                {
                    "scope": "team",
                    "measure": "estimated_credits",
                    "per": "month",
                    "remaining": 4923.5,
                    "fits": True,
                    "how_many": 1230,
                }
            ],
            "balance": 9923.5,
            "balance_age_s": 0,
        },
        {**ADMISSION_HEADERS, **headers("NoStore")},
    ),
    problems=(Code.TEAM_DISABLED,),
    problem_headers=ADMISSION_HEADERS,
)

QUOTA = Operation(
    name="quota",
    tag="Teams",
    summary="Show the rate and the quotas, and what is left of them",
    description=(
        "With a team's token: the team's own. With a viewer or admin token: one team with `team`, all without. Debits "
        "nothing."
    ),
    tokens=("Team", "Viewer", "Admin"),
    parameters=[query("team", reference("TeamId"), "The team to show.")],
    answer=answer(
        "One team, or all teams.",
        {
            "application/json": with_examples(
                {"oneOf": [reference("TeamQuotas"), reference("AllQuotas")]},
                {"A team": _EXAMPLE_QUOTAS, "All teams": {"teams": [_EXAMPLE_QUOTAS]}},
            )
        },
    ),
    problems=(Code.INVALID_QUERY, Code.STORE_UNAVAILABLE),
)

USAGE = Operation(
    name="usage",
    tag="Teams",
    summary="Report requests and estimated credits",
    description=(
        "Numbers are exact. They are what teams estimated, not what RenderNet charged. A team's token shows the team's "
        "own rows, a viewer or admin token those of all teams."
    ),
    tokens=("Team", "Viewer", "Admin"),
    parameters=[
        query(
            "from",
            DAY,
            "The first day; by default the first of the month. At most 400 days before `to`.",
            example="2026-11-01",
        ),
        query("to", DAY, "The last day; by default today.", example="2026-11-30"),
        query(
            "by",
            {
                "type": "array",
                "items": {"enum": ["day", "week", "month", "team", "model"]},
                "minItems": 1,
                "uniqueItems": True,
                "default": ["day"],
            },
            "One row for each of these, in this order of columns; `team` needs a viewer or admin token.",
            style="form",
            explode=False,
            example=["day", "model"],
        ),
        query("team", reference("TeamId"), "Only the rows of this team."),
        query("model", {"type": "string"}, "Only the rows of this model, as `by=model` names it.", example="Flux"),
        *CSV_PARAMETERS,
    ],
    answer=json_or_csv(
        "Usage",
        "The report.",
        {
            "from": "2026-11-01",
            "to": "2026-11-22",
            "timezone": "UTC",
            "by": ["day", "model"],
            "rows": [{"day": "2026-11-22", "model": "Flux", **_EXAMPLE_AMOUNTS, "share_percent": 100}],
            "total": _EXAMPLE_AMOUNTS,
        },
        "day,model,requests,refused,estimated_credits,…\r\n2026-11-22,Flux,23,0,76.5,…\r\n",
    ),
    problems=(Code.INVALID_QUERY, Code.STORE_UNAVAILABLE),
)

TOKEN = Operation(
    name="token",
    tag="Teams",
    summary="Tell what the token may see",
    description=(
        "Its role, today's date in the organisation's time zone, and the balances of its accounts: a team's own, or "
        "all of them. Works for a disabled team, and without the ledger."
    ),
    tokens=("Team", "Viewer", "Admin"),
    answer=json_answer(
        "Token",
        "What the gateway knows about the token.",
        {
            "role": "team",
            "team": "design",
            "team_name": "Design",
            "token_label": "ci",
            "token_expires": "2027-06-30",
            "timezone": "UTC",
            "today": "2026-11-22",
            "accounts": [{"account": "default", "balance": 9923.5, "balance_age_s": 12}],
        },
    ),
)

EXPLAIN = Operation(
    name="explain",
    tag="Teams",
    summary="Explain how the gateway reads a body",
    description=(
        "Shows the canonical body and its key, whether a price is stored, and whether an estimate would be admitted "
        "now. Asks RenderNet nothing and debits no quota, but uses one request of the rate. Without the store, "
        "`degraded` says what is not known."
    ),
    tokens=("Team",),
    body=json_body("Generations", {"One image": EXAMPLE_BODY}),
    answer=json_answer(
        "Explanation",
        "What the gateway knows about this body.",
        {
            "canonical_body": '[{"batch_size":1,"model":"JuggernautXL","prompt":{"positive":"a cat"}}]',
            "key": EXAMPLE_KEY,
            "account": "default",
            "query": "",
            "ignored_members": [],
            "stored": True,
            "admitted": True,
            "age_s": 12,
            "ttl_s": 3588,
            "estimated": 4,
            "learned": {
                "learn": "observe",
                "inferable": False,
                "reason": "new-scope",
                "detail": "No body with these members, models and number of items was asked yet.",
            },
        },
        {**ADMISSION_HEADERS, **headers("NoStore")},
    ),
    problems=(Code.TEAM_DISABLED, Code.RATE_LIMITED),
    problem_headers=ADMISSION_HEADERS,
)
