"""What is wrong with settings, in words for their operator: never pydantic's, and never with a value in them."""

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
"""Keys whose value may come from a file."""

KEY_HINT = "set RENDERNET_API_KEY, or api_key_file in [accounts.default]"


@dataclass(frozen=True, slots=True)
class SettingsProblem:
    """One thing that is wrong, and where: `path` is a TOML path such as `teams.design.tokens[0]`."""

    path: str
    message: str


class SettingsError(Exception):
    """The settings cannot be used; `problems` has every reason."""

    def __init__(self, problems: Sequence[SettingsProblem]) -> None:
        super().__init__("; ".join(f"{problem.path}: {problem.message}" for problem in problems))
        self.problems = problems


def path_of(*parts: str | int) -> str:
    """A TOML path: what is not a bare key is quoted, so that it stays on one line."""
    spelled = (
        f"[{part}]"
        if isinstance(part, int)
        else f".{part if re.fullmatch('[A-Za-z0-9_-]+', part) else json.dumps(part)}"
        for part in parts
    )
    return "".join(spelled).lstrip(".")


_WORDS = {
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
"""By the first word of pydantic's name for an error."""


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
            message = _WORDS.get(kind.partition("_")[0], "must be " + detail["msg"].rpartition(" be ")[2])
    return SettingsProblem(path_of(*loc), message)


def _suggest(keys: list[str]) -> str:
    """What an unknown key may have been meant to be."""
    known = _known_keys(keys[:-1])
    close = difflib.get_close_matches(keys[-1], known, n=1)
    return f": did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    annotation: Any = Settings
    for parent in parents:
        fields = _fields(annotation)
        # What is no section is a table or list of things of one kind: the last argument, or the one before `...`.
        annotation = fields[parent] if fields else [arg for arg in get_args(annotation) if arg is not ...][-1]
        while get_origin(annotation) in (Annotated, Union, UnionType):  # of a union: what it is unless it is None
            annotation = get_args(annotation)[0]
    return [key for name in _fields(annotation) for key in (name, *([f"{name}_file"] * (name in SECRET_KEYS)))]


def _fields(annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return {}
