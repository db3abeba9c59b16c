"""What can change while the gateway runs: who may ask, on what terms, for which accounts, and what counts.

A story takes the rules once, when it begins, and keeps them to its end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.access import Access
from proxy.quota.quotas import Terms


@dataclass(frozen=True, slots=True)
class Rules:
    """terms: of every configured team. ignored: members that do not count, as dotted paths inside each item."""

    access: Access
    terms: Mapping[str, Terms]
    accounts: frozenset[str]
    ignored: tuple[str, ...]


@dataclass(slots=True)
class InForce:
    """Where the rules in force are to be found."""

    rules: Rules
