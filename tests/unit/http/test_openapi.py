"""The OpenAPI document: complete, and its examples are valid."""

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import orjson
import pytest

from proxy.http.openapi.document import openapi_document
from proxy.http.openapi.problems import EXAMPLES
from proxy.problems import Code

DOCUMENT: dict[str, Any] = orjson.loads(orjson.dumps(openapi_document()))
OPERATIONS = [
    pytest.param(operation, id=f"{method} {path}")
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]


def nodes(value: Any) -> Iterator[Any]:
    """All objects and arrays inside a JSON value."""
    yield value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for member in inside:
        yield from nodes(member)


def resolved(value: Any) -> Any:
    """What a reference stands for."""
    if not isinstance(value, dict) or "$ref" not in value:
        return value
    found = DOCUMENT
    for name in value["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def contents_of(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for answer in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from answer.get("content", {}).items()


def examples_of(content: dict[str, Any]) -> list[Any]:
    named = [resolved(example)["value"] for example in content.get("examples", {}).values()]
    return [*named, content["example"]] if "example" in content else named


def test_every_problem_code_has_an_example() -> None:
    assert {problem.code for problem in EXAMPLES} == set(Code)
    assert len(DOCUMENT["components"]["examples"]) == len(EXAMPLES)


def test_every_problem_code_is_a_response_of_some_path() -> None:
    listed = {
        code
        for node in nodes(DOCUMENT["paths"])
        if isinstance(node, dict) and "enum" in node and set(node["enum"]) <= set(Code)
        for code in node["enum"]
    }
    assert set(Code) - listed == {"method-not-allowed"}, "no operation has a wrong method"


def test_references_lead_somewhere_and_every_component_is_used() -> None:
    references = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node, dict) and "$ref" in node}
    for reference in references:
        assert resolved({"$ref": reference})
    components = {f"#/components/{kind}/{name}" for kind, names in DOCUMENT["components"].items() for name in names}
    unused = {name for name in components - references if "/securitySchemes/" not in name}
    assert unused == {"#/components/examples/method-not-allowed"}
    used_tokens = {name for node in nodes(DOCUMENT["paths"]) if isinstance(node, dict) for name in node}
    assert set(DOCUMENT["components"]["securitySchemes"]) <= used_tokens


@pytest.mark.parametrize("operation", OPERATIONS)
def test_examples_are_valid(operation: dict[str, Any]) -> None:
    for media_type, content in contents_of(operation):
        schema = {**content["schema"], "components": DOCUMENT["components"]}
        examples = examples_of(content)
        assert examples or not media_type.endswith("json") or operation["operationId"] == "openapi"
        for example in examples:
            jsonschema_rs.validate(schema, example)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_says_who_may_call_it_and_what_it_does(operation: dict[str, Any]) -> None:
    assert operation["summary"][0].isupper()
    assert not operation["summary"].endswith(".")
    assert operation["description"].endswith(".")
    assert ("401" in operation["responses"]) == bool(operation["security"])
    assert operation["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}
