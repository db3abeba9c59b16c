"""The values that pass between the HTTP layer and the gateway.

A handler, such as `Estimates.estimate`, takes a `ClientRequest` and a `Trace`, and returns one of `Result`:

* `ClientRequest` is what the client sent.
* `Trace` collects what the response headers, the metrics and the log line need besides the result.
* `Result` is the answer, or the `Problem` for which there is none. `proxy.http.responses` turns it into bytes.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, Self

from proxy.auth import Credential
from proxy.cache.prices import Price, StoredPrice
from proxy.gateway.canonical_request import CanonicalRequest
from proxy.gateway.freshness import Directives
from proxy.learning.verdict import Inferred, NotInferred
from proxy.problems import NO_NAME, Outcome, Problem
from proxy.quota.ledger import Admitted, Denied
from proxy.quota.quotas import Quota, QuotaState


class ClientRequest(Protocol):
    """A request as the client sent it.

    query: the raw query string.
    directives: from its `Cache-Control` header.
    ceiling_micro: the highest price that it accepts for an estimate, in micro-credits; None if any.
    accept: its `Accept` header.
    deadline: when the answer must be complete, on the event loop's clock.
    """

    token: str | None
    query: bytes
    directives: Directives
    ceiling_micro: int | None
    accept: str | None
    deadline: float

    async def read_body(self) -> bytes:
        """The whole body; call it once. Raises `BadRequest`, `ClientGone`, `Overloaded`."""


@dataclass(slots=True)
class Answer:
    """The answer to an estimate: a JSON body. `price` is None if there is none, `age_s` if it was not stored."""

    outcome: Outcome
    status: int
    body: bytes
    price: Price | None = None
    age_s: float | None = None
    balance_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned about a body.

    learn: `cache.learn`. inferred: the price that an estimate would be answered with; None if that is not inferred.
    """

    learn: str
    verdict: Inferred | NotInferred
    inferred: StoredPrice | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """How the gateway reads a body, what is stored for it, and whether an estimate would be admitted.

    outcome: `hit`, `miss`, or `bypass` if the price book is unavailable.
    ignored: the members of `cache.ignore` that the body has.
    admission: the ledger's decision on an estimate now; None if the ledger is unavailable.
    learned: None if `cache.learn` is `off`, or if the price book is unavailable.
    """

    outcome: Outcome
    request: CanonicalRequest
    ignored: list[str]
    stored: StoredPrice | None
    admission: Admitted | Denied | None
    learned: Learned | None


@dataclass(frozen=True, slots=True)
class Purged:
    """What was purged: the question with this key, or the account's whole price book if `key` is None.

    found: whether a price was stored under the key.
    """

    account: str
    key: str | None = None
    found: bool | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A report, such as usage, quotas or metrics, or a quote."""

    body: bytes
    media_type: str
    outcome: Outcome = Outcome.HIT


Result = Answer | Explanation | Purged | Document | Problem


class Trace:
    """What happened while a request was handled. Durations are seconds."""

    team: str = NO_NAME
    token_label: str = ""
    question: CanonicalRequest | None = None
    """None if no body was parsed."""
    cache_status: str | None = None
    setting: str | None = None
    """The id of the setting whose price was answered, if the price was inferred."""
    store_s: float | None = None
    upstream_s: float | None = None
    quota_state: QuotaState | None = None
    """The team's rate and quotas after the ledger's last decision."""
    warnings: tuple[Quota, ...] = ()
    """The `warn` quotas that this answer exceeds."""

    def record_credential(self, credential: Credential) -> None:
        self.team, self.token_label = credential.team.id, credential.label

    def record_admission(self, admission: Admitted | Denied) -> None:
        """Keeps the team's state. A denied request is not booked, so it exceeds no `warn` quota."""
        self.quota_state = admission.quota_state or self.quota_state
        if isinstance(admission, Denied):
            self.warnings = ()
        elif admission.quota_state is not None:
            self.warnings = admission.quota_state.warnings()

    def record_inference(self, cache_status: str, setting: str) -> None:
        self.cache_status, self.setting = cache_status, setting

    def timing_store(self) -> Self:
        """A context manager that adds the time spent in it to `store_s`."""
        return self

    def __enter__(self) -> None:
        self._since = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.store_s = (self.store_s or 0.0) + perf_counter() - self._since
