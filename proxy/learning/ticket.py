"""A ticket: what is recorded about a body before upstream is asked, so that its answer can be learned from."""

from dataclasses import dataclass

from proxy.learning.leaves import Reduced


@dataclass(frozen=True, slots=True)
class Ticket:
    """body: the key of the exact question.

    epoch: the account's price epoch when the ticket was given; empty if it had none. An answer with an older epoch was
    asked before the prices were dropped, and is not learned from.
    asked_at_ms: when the ticket was given, on the store's clock, or a little earlier.
    """

    account: str
    reduced: Reduced
    body: str
    epoch: str
    asked_at_ms: int
