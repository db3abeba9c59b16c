"""What the operations of the OpenAPI document share: their frame, headers, parameters, bodies and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.http.openapi.problems import BODY, ENDPOINT, MALFORMED, TOKEN, problem_responses
from proxy.http.openapi.schemas import Object, reference
from proxy.problems import Code

EXAMPLE_BODY = [{"model": "JuggernautXL", "batch_size": 1, "prompt": {"positive": "a cat"}}]
EXAMPLE_KEY = "f0a9e2b7c1d84e6f95b3a7d2c8e1f4063b5a9d7e2f8c1b4a6d3e9f7058c2b1a4"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation. Everything that each operation has, or each with a token or a body, is added by `document`.

    answer: the response 200.
    more_answers: other responses that are not problems; `last_answers`: those that stand after the problems.
    tokens: the kinds of tokens that may call it; none: it needs no token.
    problems: the codes that are its own.
    problem_headers: the headers of `answer` that its problems have too.
    """

    name: str
    tag: Literal["Teams", "Operators", "Documentation"]
    summary: str
    description: str
    answer: Object
    more_answers: Object = field(default_factory=dict)
    last_answers: Object = field(default_factory=dict)
    tokens: Sequence[Literal["Team", "Viewer", "Admin", "Metrics"]] = ()
    parameters: Sequence[Object] = ()
    body: Object | None = None
    problems: Sequence[Code] = ()
    problem_headers: Object = field(default_factory=dict)

    @property
    def method(self) -> str:
        return "post" if self.body else "get"

    def document(self) -> Object:
        of_token = (*ENDPOINT, *TOKEN) if self.tokens else ()
        of_body = BODY if self.body else ()
        problems = problem_responses((*MALFORMED, *of_token, *of_body, *self.problems), self.problem_headers)
        return {
            "operationId": self.name,
            "tags": [self.tag],
            "summary": self.summary,
            "description": self.description,
            "security": [{f"{kind}Token": []} for kind in self.tokens],
            "parameters": [*self.parameters, reference("RequestId", "parameters")],
            **({"requestBody": self.body} if self.body else {}),
            "responses": {"200": self.answer, **self.more_answers, **problems, **self.last_answers},
        }


_HEADER_NAMES = {
    "BalanceAge": "Estimate-Proxy-Balance-Age",
    "CacheStatus": "Cache-Status",
    "NoStore": "Cache-Control",
    "RateLimitPolicy": "RateLimit-Policy",
    "RequestId": "X-Request-Id",
    "ServerTiming": "Server-Timing",
    "Warning": "Estimate-Proxy-Warning",
}


def headers(*names: str) -> Object:
    """References to headers; a name is that of the header's component."""
    return {_HEADER_NAMES.get(name, name): reference(name, "headers") for name in names}


ADMISSION_HEADERS = headers("RateLimit", "RateLimitPolicy", "ServerTiming")
ESTIMATE_HEADERS = {**ADMISSION_HEADERS, **headers("CacheStatus", "Age", "BalanceAge", "Warning")}
_NO_STORE = headers("NoStore")
_STATIC_HEADERS = headers("ETag", "RequestId")


def query(name: str, schema: Object, description: str, **more: Any) -> Object:
    return {"name": name, "in": "query", "schema": schema, "description": description, **more}


CACHE_CONTROL = reference("CacheControl", "parameters")
CSV_PARAMETERS = (
    query("format", {"enum": ["json", "csv"]}, "Overrides `Accept: text/csv`."),
    query("dialect", {"enum": ["rfc4180", "excel-semicolon"]}, "The dialect of the CSV. Implies `format=csv`."),
)


def json_body(schema: str, examples: Object) -> Object:
    return {"required": True, "content": {"application/json": with_examples(reference(schema), examples)}}


def json_answer(schema: str, description: str, example: Any, more_headers: Object = _NO_STORE) -> Object:
    """A response with a JSON body. Every response has the header `X-Request-Id`."""
    return {
        "description": description,
        "headers": {**more_headers, **headers("RequestId")},
        "content": {"application/json": {"schema": reference(schema), "example": example}},
    }


def answer(description: str, content: Object) -> Object:
    """A response whose content, by media type, is not one JSON schema with one example."""
    return {"description": description, "headers": headers("RequestId", "NoStore"), "content": content}


def json_or_csv(schema: str, description: str, example: Any, csv_example: str) -> Object:
    json = {"schema": reference(schema), "example": example}
    csv = {"schema": {"type": "string"}, "example": csv_example}
    return answer(f"{description} In CSV, new columns come last.", {"application/json": json, "text/csv": csv})


def static_file(media_type: str, description: str) -> Object:
    schema = {"type": "object" if media_type == "application/json" else "string"}
    return {"description": description, "headers": _STATIC_HEADERS, "content": {media_type: {"schema": schema}}}


NOT_MODIFIED = {"304": {"description": "The client's copy (`If-None-Match`) is current.", "headers": _STATIC_HEADERS}}
"""What every static file may be answered with."""


def with_examples(schema: Object, examples: Object) -> Object:
    return {"schema": schema, "examples": {name: {"value": value} for name, value in examples.items()}}
