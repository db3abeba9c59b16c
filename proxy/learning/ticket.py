"""A ticket: what must be known about a body, before it is asked, to learn from the answer."""

from dataclasses import dataclass

from proxy.learning.leaves import Reduced


@dataclass(frozen=True, slots=True)
class Ticket:
    """epoch: the account's price epoch when the ticket was given; an answer with an older one is not learned from.

    asked_at_ms: the time of the ticket on the store's clock, or a little earlier.
    """

    account: str
    reduced: Reduced
    body: str
    epoch: str
    asked_at_ms: int
