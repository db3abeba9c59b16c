"""Reference model of several gateways with one price book, without any code of the package.

* Time is one counter of milliseconds for the store and all processes. It only changes between steps.
* A `Fleet` is the state that the processes share: the store and upstream. A `Process` is the state of one gateway.
* `Process.begin` handles a request up to the call of upstream, `Process.complete` handles upstream's answer. A test may
  change anything in between.
"""

from collections import Counter
from dataclasses import replace

from price_book_fleet import (
    AUDIT_EVERY_MS,
    BALANCE_MAX_AGE_MS,
    IF_ERROR_MS,
    REVALIDATE_MS,
    TTL_MS,
    Answer,
    Balance,
    BookSnapshot,
    Directives,
    Fetch,
    FetchResult,
    Fleet,
    Lease,
    Lookup,
    Pending,
    Price,
)
from price_book_upstream import (
    Body,
    Failed,
    ModelCircuitBreaker,
    Priced,
    Rejected,
    Reply,
    Unpriced,
    amount_text,
    document,
)


class Process:
    """One gateway with its memory, its circuit breaker and its fetches."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._memory: dict[int, tuple[Price, int, int]] = {}
        """Prices, with the time when they were read and the number of invalidations at that time."""
        self._snapshot: BookSnapshot | None = None
        self._circuit_breaker = ModelCircuitBreaker()
        self.balance: Balance | None = None
        self.fetches: dict[int, Fetch] = {}
        self.audits: Counter[str] = Counter()
        self.in_flight: list[Fetch] = []
        self.joined, self.followed = 0, 0
        """Number of requests that waited for a fetch, and of fetches that followed another process."""

    def begin(self, body: Body, directives: Directives) -> Answer | Pending:
        """Returns a request's answer, or `Pending` if it has to wait for upstream."""
        stored_price, lookup = self.look_up(body.key)
        fallback: Lookup | None = None
        if directives.bypass_cache:
            reason = "request"
        elif lookup is None or self.balance is None:
            reason = "miss"
        elif directives.max_age_s is not None and lookup.age_ms > directives.max_age_s * 1000:
            reason = "request"
        elif -lookup.ttl_ms <= REVALIDATE_MS:
            return self._serve(body, lookup, stored_price)
        else:
            reason = "stale"
            fallback = lookup if -lookup.ttl_ms <= IF_ERROR_MS else None
        if directives.only_if_cached:
            return Answer(504, "not-cached")
        if directives.bypass_cache:
            lease = self._take_lease(body.key, None, force=True) if directives.store else None
            return Pending(self._start(self._call_upstream(body, lease)), reason)
        self.joined += 1
        running = self.fetches.get(body.key)
        return Pending(
            running or self._start_shared(self._fetch(body, stored_price)),
            reason,
            stored_price,
            fallback,
            running is not None,
        )

    def end(self, pending: Pending) -> Answer:
        """Returns the answer of a request that has waited."""
        fetch, joined = pending.fetch, pending.joined
        self.complete(fetch)
        if joined and fetch.result is not None and fetch.result.overtaken:
            # a joined request may have arrived after the purge
            fetch, joined = self._start_shared(self._fetch(fetch.body, pending.known_price)), False
            self.complete(fetch)
        assert fetch.result is not None
        reply = fetch.result.reply
        if isinstance(reply, Failed) and pending.fallback is not None:
            return self._stale_on_error(reply, pending.fallback)
        status = None if isinstance(reply, Failed) and reply.status is None else _status_of(reply)
        parts = [f"fwd={pending.reason}"]
        parts += [] if status is None else [f"fwd-status={status}"]
        parts += ["stored", f"ttl={TTL_MS // 1000}"] if fetch.result.stored else []
        parts += ["collapsed"] if joined or fetch.result.elsewhere else []
        return self._answer(reply, "; ".join(parts))

    def look_up(self, key: int) -> tuple[Price | None, Lookup | None]:
        """Returns the price that this process finds, and its age and lifetime unless it is purged."""
        fleet = self._fleet
        remembered = self._memory.pop(key, None)
        if remembered is None or fleet.now - remembered[1] > fleet.memory_ms:
            remembered = self._in_store(key, self._invalidations)
            snapshot = self._read()
        elif (snapshot := self._read()).invalidations != remembered[2] or snapshot.purge != remembered[0].purge:
            remembered = self._in_store(key, snapshot.invalidations)
        if remembered is None:
            return None, None
        price = remembered[0]
        generations = snapshot.purge, snapshot.reprice
        is_outdated = (price.purge, price.reprice) != generations and price.put_at >= snapshot.read_at
        if is_outdated or self.balance is None:  # the process that stored the price has read the book before
            snapshot = self._read(force=True)
        self._memory[key] = remembered
        return price, self._lookup(price, snapshot)

    def complete(self, fetch: Fetch) -> None:
        """Completes a fetch, whether a request waits for it or not. Does nothing if it is complete already."""
        if fetch not in self.in_flight:
            return
        self.in_flight.remove(fetch)
        if fetch.result is None:
            fetch.result = self._follow(fetch) if fetch.follows else self._receive(fetch)
        if self.fetches.get(fetch.body.key) is fetch:
            del self.fetches[fetch.body.key]

    def purge_request(self, key: int) -> bool:
        self._memory.pop(key, None)
        return self._fleet.purge_request(key)

    def purge_account(self) -> None:
        self._fleet.purge_account()
        self._snapshot = None

    def _serve(self, body: Body, lookup: Lookup, stored_price: Price | None) -> Answer:
        assert self.balance is not None
        answer = self._answer_from_store(lookup, f"hit; ttl={lookup.ttl_ms // 1000}")
        if lookup.ttl_ms > 0:
            if self._claims_audit():
                lease = self._take_lease(body.key, stored_price)
                if isinstance(lease, Lease):
                    self._start(self._call_upstream(body, lease, audited=lookup.price))
            return answer
        if body.key not in self.fetches:
            self._start_shared(self._fetch(body, stored_price))
        return replace(answer, cache_status=f"{answer.cache_status}; detail=stale-while-revalidate")

    def _claims_audit(self) -> bool:
        book, now = self._fleet.book, self._fleet.now
        if self.balance is None or now - self.balance.at <= BALANCE_MAX_AGE_MS:
            return False
        if any(fetch.audited is not None for fetch in self.in_flight):
            return False
        if now < book.audit_until or (book.balance is not None and now - book.balance.at < BALANCE_MAX_AGE_MS):
            return False
        book.audit_until = now + AUDIT_EVERY_MS
        return True

    def _start_shared(self, fetch: Fetch) -> Fetch:
        """Starts a fetch that other requests can join."""
        self.fetches[fetch.body.key] = fetch
        return self._start(fetch)

    def _start(self, fetch: Fetch) -> Fetch:
        """Starts a fetch; it is complete at once if it does not wait."""
        self.in_flight.append(fetch)
        if not fetch.waits:
            self.complete(fetch)
        return fetch

    def _fetch(self, body: Body, known_price: Price | None) -> Fetch:
        lease = self._take_lease(body.key, known_price)
        if isinstance(lease, Lease):
            return self._call_upstream(body, lease)
        if lease is None:
            self.followed += 1
            return Fetch(body, follows=True, known_price=known_price)
        return Fetch(body, result=self._fetched_elsewhere(lease))

    def _call_upstream(self, body: Body, lease: Lease | Price | None, audited: Price | None = None) -> Fetch:
        assert not isinstance(lease, Price)
        refusal = self._circuit_breaker.refusal(self._fleet.now)
        self._fleet.calls += refusal is None
        return Fetch(body, lease, refusal, audited=audited)

    def _take_lease(self, key: int, known_price: Price | None, *, force: bool = False) -> Lease | Price | None:
        """Returns the lease, or a newer price that is fresh, or None if another process holds the lease."""
        invalidations, snapshot, fleet = self._invalidations, self._read(force=True), self._fleet
        stored = fleet.prices.get(key)
        if not force:
            if stored is not None and stored != known_price and self._is_fresh(stored, snapshot):
                self._memory[key] = stored, fleet.now, invalidations
                return stored
            if key in fleet.leases:
                return None
        fleet.leases[key] = next(fleet.generations)
        fleet.leader_replies.pop(key, None)
        return Lease(fleet.leases[key], snapshot.purge, snapshot.reprice)

    def _receive(self, fetch: Fetch) -> FetchResult:
        fleet = self._fleet
        if fetch.refusal is not None:
            reply: Reply = fetch.refusal
        else:
            fleet.serial += 1
            reply = fleet.upstream.reply(fetch.body, fleet.serial)
            self._circuit_breaker.record(fleet.now, reply)
        if isinstance(reply, Priced | Unpriced) and reply.balance is not None:
            self.balance = fleet.book.balance = Balance(reply.balance, fleet.now)
        if fetch.lease is None:
            return FetchResult(reply)
        in_time = self._settle(fetch.body, fetch.lease, reply)
        stored = in_time and isinstance(reply, Priced)
        if fetch.audited is not None and stored:
            self._compare(fetch, fetch.audited)
        return FetchResult(reply, stored=stored, overtaken=not in_time)

    def _settle(self, body: Body, lease: Lease, reply: Reply) -> bool:
        fleet, key = self._fleet, body.key
        if isinstance(reply, Rejected):
            self._memory.pop(key, None)
        if fleet.leases.get(key) != lease.token:
            return False
        del fleet.leases[key]
        if isinstance(reply, Priced):
            price = Price(reply.serial, reply.amount, body, fleet.now, lease.purge, lease.reprice)
            if (old := fleet.prices.get(key)) is not None and self._replaces_fresh(price, old):
                fleet.invalidate()  # upstream numbers its answers, so the new one differs
            fleet.prices[key] = price
            if self._snapshot is not None and self._snapshot.purge != lease.purge:
                return False
            self._memory[key] = price, fleet.now, self._invalidations
            return True
        if isinstance(reply, Rejected):
            fleet.prices.pop(key, None)
        fleet.leader_replies[key] = reply
        return True

    def _replaces_fresh(self, price: Price, old: Price) -> bool:
        """Returns whether a price replaces one that is still fresh."""
        generations = (price.purge, price.reprice) == (old.purge, old.reprice)
        return generations and self._fleet.now - old.put_at < TTL_MS

    def _compare(self, fetch: Fetch, old: Price) -> None:
        new = self._fleet.prices[fetch.body.key]
        if new.amount == old.amount:
            result = "same"
        elif new.body != old.body:
            result = "ignored-member"
        else:
            result = "changed"
            if self._fleet.record_change(fetch.body.key):
                self._snapshot = None
        self.audits[result] += 1

    def _follow(self, fetch: Fetch) -> FetchResult:
        """Returns the price or the reply of the process that held the lease, or calls upstream if there is neither."""
        fleet, key = self._fleet, fetch.body.key
        stored = fleet.prices.get(key)
        if stored is not None and stored != fetch.known_price and self._is_fresh(stored, self._read()):
            self._memory[key] = stored, fleet.now, self._invalidations
            return self._fetched_elsewhere(stored)
        if key in fleet.leader_replies:
            return FetchResult(fleet.leader_replies[key], elsewhere=True)
        lease = self._take_lease(key, fetch.known_price)
        assert isinstance(lease, Lease)
        return self._receive(self._call_upstream(fetch.body, lease))

    def _fetched_elsewhere(self, price: Price) -> FetchResult:
        self._read(force=True)
        return FetchResult(Priced(price.amount, price.serial), stored=True, elsewhere=True)

    def _read(self, *, force: bool = False) -> BookSnapshot:
        """Reads the account's book, and creates it if it was evicted."""
        fleet, book = self._fleet, self._fleet.book
        if not force and self._snapshot is not None and fleet.now - self._snapshot.read_at < fleet.book_ms:
            return self._snapshot
        repriced_at = book.repriced_at
        if book.purge is None or book.reprice is None:
            book.purge, book.reprice, repriced_at = next(fleet.generations), next(fleet.generations), None
        if book.balance is not None and (self.balance is None or book.balance.at >= self.balance.at):
            self.balance = book.balance
        self._snapshot = BookSnapshot(book.purge, book.reprice, repriced_at, book.invalidations, fleet.now)
        return self._snapshot

    @property
    def _invalidations(self) -> int:
        return -1 if self._snapshot is None else self._snapshot.invalidations

    def _in_store(self, key: int, invalidations: int) -> tuple[Price, int, int] | None:
        fleet = self._fleet
        return (fleet.prices[key], fleet.now, invalidations) if key in fleet.prices else None

    def _lookup(self, price: Price, snapshot: BookSnapshot) -> Lookup | None:
        if price.purge != snapshot.purge:
            return None
        age_ms = self._fleet.now - price.put_at
        ttl_ms = TTL_MS - age_ms
        if price.reprice != snapshot.reprice:
            ttl_ms = min(ttl_ms, 0 if snapshot.repriced_at is None else snapshot.repriced_at - self._fleet.now)
        return Lookup(price, age_ms, ttl_ms)

    def _is_fresh(self, price: Price, snapshot: BookSnapshot) -> bool:
        lookup = self._lookup(price, snapshot)
        return lookup is not None and lookup.ttl_ms > 0

    def _stale_on_error(self, reply: Failed, lookup: Lookup) -> Answer:
        status = "" if reply.status is None else f"fwd-status={reply.status}; "
        how = f"fwd=stale; {status}" if reply.asked else "hit; "
        return self._answer_from_store(lookup, f"{how}ttl={lookup.ttl_ms // 1000}; detail=stale-if-error")

    def _answer_from_store(self, lookup: Lookup, cache_status: str) -> Answer:
        answer = self._answer(Priced(lookup.price.amount, lookup.price.serial), cache_status)
        return replace(answer, age_s=lookup.age_ms // 1000)

    def _answer(self, reply: Reply, cache_status: str) -> Answer:
        match reply:
            case Priced(amount, serial):
                amount_shown = None if self.balance is None else self.balance.amount
                age_s = None if self.balance is None else (self._fleet.now - self.balance.at) // 1000
                body = document(amount_text(amount), amount_shown, serial)
                return Answer(200, body, cache_status, balance_age_s=age_s)
            case Unpriced(body):
                return Answer(200, body, cache_status)
            case Rejected(status, body):
                return Answer(status, body, cache_status)
            case Failed(code):
                status = 503 if code == "upstream-busy" else 502
                return Answer(status, code, cache_status, retry_after_s=reply.retry_after_s)


def _status_of(reply: Reply) -> int | None:
    return reply.status if isinstance(reply, Rejected | Failed) else 200
