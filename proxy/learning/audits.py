"""Chooses which inferred answers are audited: in each block of `one_in` answers of a scope, one at a random position.

Clients cannot predict which one. Two audits of a scope are less than two blocks apart; independent random draws would
leave longer gaps now and then.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable

MAX_BLOCKS = 4096
"""Limits the memory: scopes whose block is remembered. Evicts in FIFO order."""

MAX_OWED = 1024
"""Limits the memory: settings that owe an audit. Evicts in FIFO order."""


class Audits:
    """The audits of one process."""

    def __init__(self, one_in: int, choose: Callable[[int], int] = secrets.randbelow) -> None:
        self._one_in = one_in
        self._choose = choose
        self._blocks: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._owed: OrderedDict[str, None] = OrderedDict()

    def is_due(self, scope: str) -> bool:
        """Whether the answer that is given now, from this scope, is audited."""
        place, chosen = self._blocks.get(scope) or (0, self._choose(self._one_in))
        if place + 1 == self._one_in:
            self._blocks.pop(scope, None)
        else:
            self._blocks[scope] = place + 1, chosen
            if len(self._blocks) > MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return place == chosen

    def owe(self, setting: str) -> None:
        """An audit could not be asked."""
        self._owed[setting] = None
        if len(self._owed) > MAX_OWED:
            self._owed.popitem(last=False)

    def pay(self, setting: str) -> bool:
        """Whether the setting owes an audit; then it no longer does, because its next body is asked."""
        return self._owed.pop(setting, self) is None
