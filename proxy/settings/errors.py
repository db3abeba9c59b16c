"""Turns pydantic's validation errors into messages for operators. They never contain a value: it could be a secret."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from proxy.settings.schema import Settings

SECRET_KEYS = ("api_key", "password", "sentinel_password")
"""Keys whose value may come from a file, `<key>_file`."""

KEY_HINT = "set RENDERNET_API_KEY, or api_key_file in [accounts.default]"


@dataclass(frozen=True, slots=True)
class SettingsProblem:
    """One thing that is wrong. `path` is a TOML path, such as `teams.design.tokens[0]`."""

    path: str
    message: str


class SettingsError(Exception):
    """The settings are invalid; `problems` has all reasons."""

    def __init__(self, problems: Sequence[SettingsProblem]) -> None:
        super().__init__("; ".join(f"{problem.path}: {problem.message}" for problem in problems))
        self.problems = problems


def path_of(*parts: str | int) -> str:
    """A TOML path. Keys that are not bare keys are quoted, so that the path stays on one line."""
    spelled = (
        f"[{part}]"
        if isinstance(part, int)
        else f".{part if re.fullmatch('[A-Za-z0-9_-]+', part) else json.dumps(part)}"
        for part in parts
    )
    return "".join(spelled).lstrip(".")


_MESSAGES = {
    "model": "must be a table",
    "dict": "must be a table",
    "tuple": "must be a list (in the environment: as JSON)",
    "string": "must be text",
    "int": "must be a whole number",
    "float": "must be a number",
    "decimal": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "path": "must be a path",
    "date": "must be a date, such as 2027-06-30",
}
"""By the first part of pydantic's error type, such as `int` of `int_parsing`."""


def explain(detail: ErrorDetails) -> SettingsProblem:
    loc = [part for part in detail["loc"] if part != "[key]"]
    kind, context = detail["type"], detail.get("ctx", {})
    match kind:
        case "extra_forbidden":
            message = "is not a setting" + _suggest([str(part) for part in loc])
        case "missing":
            message = "is missing" + (f": {KEY_HINT}" if loc[:2] == ["accounts", "default"] else "")
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
        case "literal_error":
            message = f"must be {context['expected']}"
        case _:
            message = _MESSAGES.get(kind.partition("_")[0], "must be " + detail["msg"].rpartition(" be ")[2])
    return SettingsProblem(path_of(*loc), message)


def _suggest(keys: list[str]) -> str:
    """The most similar known key, or else all known keys."""
    known = _known_keys(keys[:-1])
    close = difflib.get_close_matches(keys[-1], known, n=1)
    return f": did you mean {close[0]}?" if close else f"; expected one of: {', '.join(known)}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    annotation: Any = Settings
    for parent in parents:
        fields = _fields(annotation)
        # Without fields it is a table or list of one type: the last type argument, or the one before `...`.
        annotation = fields[parent] if fields else [arg for arg in get_args(annotation) if arg is not ...][-1]
        while get_origin(annotation) in (Annotated, Union, UnionType):  # the part of a union that is not None
            annotation = get_args(annotation)[0]
    return [key for name in _fields(annotation) for key in (name, *([f"{name}_file"] * (name in SECRET_KEYS)))]


def _fields(annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return {}
