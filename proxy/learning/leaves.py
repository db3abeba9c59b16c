"""A body reduced to what is learned from it: its scope, and the values and classes of its leaves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reduced:
    """scope: its id. paths: of the leaves, `0.prompt.positive`, in order."""

    scope: str
    paths: tuple[str, ...]
