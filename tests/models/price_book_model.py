"""What a fleet of gateways is expected to answer: a small model that knows nothing of the package.

* Time is one count of milliseconds, the same for the store and all processes, and moves between steps only.
* A `Fleet` is what the processes share: the store and upstream. A `Process` is what one of them remembers.
* `Process.begin` is a request up to upstream's door, `Process.land` the rest: between them a test may do its worst.
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
    Fleet,
    Flight,
    Lease,
    Page,
    Pending,
    Price,
    Seen,
    Told,
    Wants,
)
from price_book_upstream import Body, Circuit, Failed, Priced, Rejected, Reply, Unpriced, document, spelled


class Process:
    """One gateway: what it remembers, and what it does next."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._hot: dict[int, tuple[Price, int, int]] = {}
        """Prices, with when they were read and how many purges were known then."""
        self._page: Page | None = None
        self._circuit = Circuit()
        self.balance: Balance | None = None
        self.flights: dict[int, Flight] = {}
        self.audits: Counter[str] = Counter()
        self.in_the_air: list[Flight] = []
        self.joined, self.followed = 0, 0
        """How many requests have waited for a flight, and how many flights followed another process."""

    def begin(self, body: Body, wants: Wants) -> Answer | Pending:
        """A request's answer, unless it has to wait for upstream."""
        text, seen = self.look_up(body.key)
        fallback: Seen | None = None
        if wants.anew:
            reason = "request"
        elif seen is None or self.balance is None:
            reason = "miss"
        elif wants.max_age_s is not None and seen.age_ms > wants.max_age_s * 1000:
            reason = "request"
        elif -seen.ttl_ms <= REVALIDATE_MS:
            return self._serve(body, seen, text)
        else:
            reason = "stale"
            fallback = seen if -seen.ttl_ms <= IF_ERROR_MS else None
        if wants.only_if_cached:
            return Answer(504, "not-cached")
        if wants.anew:
            lease = self._take_lease(body.key, None, force=True) if wants.store else None
            return Pending(self._start(self._set_off(body, lease)), reason)
        self.joined += 1
        flying = self.flights.get(body.key)
        return Pending(flying or self._share(self._ask(body, text)), reason, text, fallback, flying is not None)

    def end(self, pending: Pending) -> Answer:
        """The answer of a request that has waited."""
        flight, joined = pending.flight, pending.joined
        self.land(flight)
        if joined and flight.told is not None and flight.told.overtaken:  # who joined may have come after the purge
            flight, joined = self._share(self._ask(flight.body, pending.known)), False
            self.land(flight)
        assert flight.told is not None
        reply = flight.told.reply
        if isinstance(reply, Failed) and pending.fallback is not None:
            return self._fall_back(reply, pending.fallback)
        status = None if isinstance(reply, Failed) and reply.status is None else _status_of(reply)
        parts = [f"fwd={pending.reason}"]
        parts += [] if status is None else [f"fwd-status={status}"]
        parts += ["stored", f"ttl={TTL_MS // 1000}"] if flight.told.stored else []
        parts += ["collapsed"] if joined or flight.told.elsewhere else []
        return self._answer(reply, "; ".join(parts))

    def look_up(self, key: int) -> tuple[Price | None, Seen | None]:
        """The text that this process knows of, and what it is worth."""
        fleet = self._fleet
        remembered = self._hot.pop(key, None)
        if remembered is None or fleet.now - remembered[1] > fleet.hot_ms:
            remembered = self._in_store(key, self._drops)
            page = self._read()
        elif (page := self._read()).drops != remembered[2] or page.purge != remembered[0].purge:
            remembered = self._in_store(key, page.drops)
        if remembered is None:
            return None, None
        price = remembered[0]
        is_behind = (price.purge, price.reprice) != (page.purge, page.reprice) and price.put_at >= page.read_at
        if is_behind or self.balance is None:  # whoever stored the price has been at the book before
            page = self._read(anew=True)
        self._hot[key] = remembered
        return price, self._seen(price, page)

    def land(self, flight: Flight) -> None:
        """What comes of a flight, whoever waits for it. Nothing, if it has landed already."""
        if flight not in self.in_the_air:
            return
        self.in_the_air.remove(flight)
        if flight.told is None:
            flight.told = self._told_elsewhere(flight) if flight.follows else self._told(flight)
        if self.flights.get(flight.body.key) is flight:
            del self.flights[flight.body.key]

    def purge_question(self, key: int) -> bool:
        self._hot.pop(key, None)
        return self._fleet.purge_question(key)

    def purge_account(self) -> None:
        self._fleet.purge_account()
        self._page = None

    def _serve(self, body: Body, seen: Seen, text: Price | None) -> Answer:
        assert self.balance is not None
        answer = self._stored(seen, f"hit; ttl={seen.ttl_ms // 1000}")
        if seen.ttl_ms > 0:
            if self._claims_audit():
                lease = self._take_lease(body.key, text)
                if isinstance(lease, Lease):
                    self._start(self._set_off(body, lease, audited=seen.price))
            return answer
        if body.key not in self.flights:
            self._share(self._ask(body, text))
        return replace(answer, cache_status=f"{answer.cache_status}; detail=stale-while-revalidate")

    def _claims_audit(self) -> bool:
        book, now = self._fleet.book, self._fleet.now
        if self.balance is None or now - self.balance.at <= BALANCE_MAX_AGE_MS:
            return False
        if any(flight.audited is not None for flight in self.in_the_air):
            return False
        if now < book.audit_until or (book.balance is not None and now - book.balance.at < BALANCE_MAX_AGE_MS):
            return False
        book.audit_until = now + AUDIT_EVERY_MS
        return True

    def _share(self, flight: Flight) -> Flight:
        """Lets others join."""
        self.flights[flight.body.key] = flight
        return self._start(flight)

    def _start(self, flight: Flight) -> Flight:
        """What does not wait for upstream has landed at once."""
        self.in_the_air.append(flight)
        if not flight.waits:
            self.land(flight)
        return flight

    def _ask(self, body: Body, known: Price | None) -> Flight:
        lease = self._take_lease(body.key, known)
        if isinstance(lease, Lease):
            return self._set_off(body, lease)
        if lease is None:
            self.followed += 1
            return Flight(body, follows=True, known=known)
        return Flight(body, told=self._found(lease))

    def _set_off(self, body: Body, lease: Lease | Price | None, audited: Price | None = None) -> Flight:
        assert not isinstance(lease, Price)
        refusal = self._circuit.refusal(self._fleet.now)
        self._fleet.calls += refusal is None
        return Flight(body, lease, refusal, audited=audited)

    def _take_lease(self, key: int, known: Price | None, *, force: bool = False) -> Lease | Price | None:
        """The lease, or a newer price that is fresh, or None: another process asks."""
        drops, page, fleet = self._drops, self._read(anew=True), self._fleet
        stored = fleet.prices.get(key)
        if not force:
            if stored is not None and stored != known and self._is_fresh(stored, page):
                self._hot[key] = stored, fleet.now, drops
                return stored
            if key in fleet.leases:
                return None
        fleet.leases[key] = next(fleet.generations)
        fleet.words.pop(key, None)
        return Lease(fleet.leases[key], page.purge, page.reprice)

    def _told(self, flight: Flight) -> Told:
        fleet = self._fleet
        if flight.refusal is not None:
            reply: Reply = flight.refusal
        else:
            fleet.serial += 1
            reply = fleet.upstream.reply(flight.body, fleet.serial)
            self._circuit.note(fleet.now, reply)
        if isinstance(reply, Priced | Unpriced) and reply.balance is not None:
            self.balance = fleet.book.balance = Balance(reply.balance, fleet.now)
        if flight.lease is None:
            return Told(reply)
        in_time = self._settle(flight.body, flight.lease, reply)
        stored = in_time and isinstance(reply, Priced)
        if flight.audited is not None and stored:
            self._compare(flight, flight.audited)
        return Told(reply, stored=stored, overtaken=not in_time)

    def _settle(self, body: Body, lease: Lease, reply: Reply) -> bool:
        fleet, key = self._fleet, body.key
        if isinstance(reply, Rejected):
            self._hot.pop(key, None)
        if fleet.leases.get(key) != lease.token:
            return False
        del fleet.leases[key]
        if isinstance(reply, Priced):
            price = Price(reply.serial, reply.amount, body, fleet.now, lease.purge, lease.reprice)
            if (old := fleet.prices.get(key)) is not None and self._is_early(price, old):
                fleet.drop()  # each answer of upstream's is numbered, so it is another one
            fleet.prices[key] = price
            if self._page is not None and self._page.purge != lease.purge:
                return False
            self._hot[key] = price, fleet.now, self._drops
            return True
        if isinstance(reply, Rejected):
            fleet.prices.pop(key, None)
        fleet.words[key] = reply
        return True

    def _is_early(self, price: Price, old: Price) -> bool:
        """Whether a price replaces one that anybody would still take for fresh."""
        generations = (price.purge, price.reprice) == (old.purge, old.reprice)
        return generations and self._fleet.now - old.put_at < TTL_MS

    def _compare(self, flight: Flight, old: Price) -> None:
        new = self._fleet.prices[flight.body.key]
        if new.amount == old.amount:
            result = "same"
        elif new.body != old.body:
            result = "ignored-member"
        else:
            result = "changed"
            if self._fleet.note_change(flight.body.key):
                self._page = None
        self.audits[result] += 1

    def _told_elsewhere(self, flight: Flight) -> Told:
        """Another process has asked: its price, its word, or this one's turn."""
        fleet, key = self._fleet, flight.body.key
        stored = fleet.prices.get(key)
        if stored is not None and stored != flight.known and self._is_fresh(stored, self._read()):
            self._hot[key] = stored, fleet.now, self._drops
            return self._found(stored)
        if key in fleet.words:
            return Told(fleet.words[key], elsewhere=True)
        lease = self._take_lease(key, flight.known)
        assert isinstance(lease, Lease)
        return self._told(self._set_off(flight.body, lease))

    def _found(self, price: Price) -> Told:
        self._read(anew=True)
        return Told(Priced(price.amount, price.serial), stored=True, elsewhere=True)

    def _read(self, *, anew: bool = False) -> Page:
        """The account's book, made anew if it has gone."""
        fleet, book = self._fleet, self._fleet.book
        if not anew and self._page is not None and fleet.now - self._page.read_at < fleet.book_ms:
            return self._page
        repriced_at = book.repriced_at
        if book.purge is None or book.reprice is None:
            book.purge, book.reprice, repriced_at = next(fleet.generations), next(fleet.generations), None
        if book.balance is not None and (self.balance is None or book.balance.at >= self.balance.at):
            self.balance = book.balance
        self._page = Page(book.purge, book.reprice, repriced_at, book.drops, fleet.now)
        return self._page

    @property
    def _drops(self) -> int:
        return -1 if self._page is None else self._page.drops

    def _in_store(self, key: int, drops: int) -> tuple[Price, int, int] | None:
        fleet = self._fleet
        return (fleet.prices[key], fleet.now, drops) if key in fleet.prices else None

    def _seen(self, price: Price, page: Page) -> Seen | None:
        if price.purge != page.purge:
            return None
        age_ms = self._fleet.now - price.put_at
        ttl_ms = TTL_MS - age_ms
        if price.reprice != page.reprice:
            ttl_ms = min(ttl_ms, 0 if page.repriced_at is None else page.repriced_at - self._fleet.now)
        return Seen(price, age_ms, ttl_ms)

    def _is_fresh(self, price: Price, page: Page) -> bool:
        seen = self._seen(price, page)
        return seen is not None and seen.ttl_ms > 0

    def _fall_back(self, reply: Failed, seen: Seen) -> Answer:
        status = "" if reply.status is None else f"fwd-status={reply.status}; "
        how = f"fwd=stale; {status}" if reply.asked else "hit; "
        return self._stored(seen, f"{how}ttl={seen.ttl_ms // 1000}; detail=stale-if-error")

    def _stored(self, seen: Seen, cache_status: str) -> Answer:
        answer = self._answer(Priced(seen.price.amount, seen.price.serial), cache_status)
        return replace(answer, age_s=seen.age_ms // 1000)

    def _answer(self, reply: Reply, cache_status: str) -> Answer:
        match reply:
            case Priced(amount, serial):
                amount_shown = None if self.balance is None else self.balance.amount
                age_s = None if self.balance is None else (self._fleet.now - self.balance.at) // 1000
                body = document(spelled(amount), amount_shown, serial)
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
