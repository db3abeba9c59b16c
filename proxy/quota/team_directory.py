"""What the settings say about team ids in reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TeamDirectory:
    """Names and earlier ids of teams.

    names: by team id, of those teams that have one.
    current: the id of the configured team by each of its earlier ids (`teams.X.was`).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    current: Mapping[str, str] = field(default_factory=dict)

    def ids_of(self, team: str) -> list[str]:
        """A team's id and its earlier ones."""
        return [team, *(earlier for earlier, current in self.current.items() if current == team)]

    def name_of(self, team: str) -> str:
        """The name of a team, empty if it has none."""
        return self.names.get(team, "")


NO_NAMES = TeamDirectory()
