"""The rest of *Gateway*: RenderNet, the stores, the circuit breaker, the price list, and the gateway's processes."""

from grafana_foundation_sdk.models import dashboard

from board import Row
from panels import (
    AMOUNT,
    AREAS,
    BARS,
    DATE,
    GREEN,
    ORANGE,
    PER_SECOND,
    RED,
    REST,
    SECONDS,
    SHARE,
    SHORT,
    STATE,
    YELLOW,
    About,
    Line,
    Look,
    chart,
    number,
    states,
)
from promql import LEADING, QUANTILES, REQUESTS, increase, leading, others, quantile, rate, select
from tables import Column, grid

UPSTREAM = "estimate_proxy_upstream_request_duration_seconds"
STORE = "estimate_proxy_store_duration_seconds"
IN_FLIGHT = "estimate_proxy_requests_in_flight"
CIRCUIT = "estimate_proxy_upstream_circuit_open"
AUDITS = "estimate_proxy_price_audits_total"

FAILED = 'status!~"2xx|4xx"'


def upstream() -> Row:
    return Row("How is RenderNet?", (upstream_latency(), upstream_by_status(), upstream_by_account()))


def stores() -> Row:
    latency = (store_latency(), store_latency_by_call(), store_state())
    ledger = (debits_unanswered(), debits_buffered(), ledgers_lost(), ledger_created())
    return Row("How are the stores?", (*latency, *ledger))


def circuits() -> Row:
    return Row("Is the circuit breaker closed?", (circuit_state(),))


def prices() -> Row:
    return Row("Do prices change?", (price_audits(), audits_by_account()))


def processes() -> Row:
    return Row("How busy is the gateway, and which instances run?", (in_flight(), instances(), restarts(), replicas()))


def upstream_latency() -> dashboard.Panel:
    reads = "RenderNet's response time, all accounts; timeouts and failures are included."
    about = About("Upstream latency", reads, SECONDS, 8)
    return chart(about, *(Line(quantile(q, "", UPSTREAM), name) for q, name in QUANTILES))


def upstream_by_status() -> dashboard.Panel:
    reads = "RenderNet's responses by status class; `timeout` and `error` are requests without a response."
    about = About("Upstream requests, by status", reads, PER_SECOND, 8)
    colours = {"2xx": GREEN, "4xx": YELLOW, "5xx": RED, "timeout": ORANGE, "error": "dark-red"}
    return chart(
        about, Line(rate("status", f"{UPSTREAM}_count"), "{{status}}"), look=Look(stacked=True, colours=colours)
    )


def upstream_by_account() -> dashboard.Panel:
    asked, failed = increase("account", f"{UPSTREAM}_count"), increase("account", f"{UPSTREAM}_count", FAILED)
    reads = (
        "Upstream requests of each account in the time range, and the share that failed: 5xx, timeout or error. A"
        " refused key is the outcome `upstream-refused` above."
    )
    return grid(
        About("Upstream, by account", reads, AMOUNT, 8),
        Column(title="Account", label="account"),
        Column(title="Requests", expr=asked, decimals=0),
        Column(title="Failed", expr=f"{failed} / ({asked} > 0)", unit=SHARE, gauge=True),
        most="Requests",
    )


def store_latency() -> dashboard.Panel:
    reads = "The stores' response time, all calls. Every estimate waits for at least one call."
    about = About("Store latency", reads, SECONDS, 8)
    return chart(about, *(Line(quantile(q, "", STORE), name) for q, name in QUANTILES))


def store_latency_by_call() -> dashboard.Panel:
    reads = "Shows which call is slow: 95% of its replies were faster than this."
    about = About("Store latency p95, by call", reads, SECONDS, 8)
    return chart(about, Line(quantile(0.95, "call", STORE), "{{call}}"))


def store_state() -> dashboard.Panel:
    reads = (
        "Red while at least one process cannot reach the store of that role, or the store refuses its writes. Without"
        " the ledger the gateway refuses estimates or buffers debits, as `store.on_outage` says; without the price"
        " book estimates go upstream."
    )
    about = About("State of the stores", reads, STATE, 8)
    up = f"min by (role) ({select('estimate_proxy_store_up')})"
    return states(about, Line(up, "{{role}}"), {"1": ("serves", GREEN), "0": ("down", RED)})


def debits_unanswered() -> dashboard.Panel:
    reads = (
        "Debits in the time range whose reply was lost: they may or may not count, and were not sent again. If this"
        " is not 0, check the store."
    )
    about = About("Debits without a reply", reads, AMOUNT, 6, 4)
    lost = increase("", "estimate_proxy_unanswered_debits_total")
    return number(about, lost, steps=((None, GREEN), (0.5, ORANGE)), decimals=0)


def debits_buffered() -> dashboard.Panel:
    reads = (
        'Debits that the processes keep until the ledger is back (`on_outage = "admit"`). A killed process loses its'
        " debits."
    )
    about = About("Debits waiting in memory", reads, AMOUNT, 6, 4)
    return number(
        about, f"sum({select('estimate_proxy_buffered_debits')})", steps=((None, GREEN), (1, ORANGE)), decimals=0
    )


def ledgers_lost() -> dashboard.Panel:
    reads = "How often the ledger was found empty or replaced in the time range: usage before that is lost."
    about = About("Ledgers lost", reads, AMOUNT, 6, 4)
    lost = f"max(increase({select('estimate_proxy_ledger_lost_total')}[$__range]))"
    return number(about, lost, steps=((None, GREEN), (0.5, RED)), decimals=0)


def ledger_created() -> dashboard.Panel:
    reads = "When the current ledger was created. An unexpected recent date means that a store was emptied or replaced."
    about = About("Ledger created", reads, DATE, 6, 4)
    return number(about, f"max({select('estimate_proxy_ledger_created_timestamp_seconds')}) * 1000")


def circuit_state() -> dashboard.Panel:
    reads = (
        "Red while at least one process sends RenderNet no requests for that account, because too many failed. Shows"
        " the ten accounts that were worst in the time range."
    )
    about = About("Circuit breaker, by account", reads, STATE, 24, 6)
    worst = f"topk({LEADING}, max by (account) (sum_over_time({select(CIRCUIT)}[$__range] @ end())))"
    line = Line(f"max by (account) ({select(CIRCUIT)}) and on (account) {worst}", "{{account}}")
    return states(about, line, {"0": ("closed", GREEN), "1": ("open", RED)})


def price_audits() -> dashboard.Panel:
    reads = (
        "Stored prices that were checked in the background, an hour. `changed`: RenderNet's price is different now;"
        " three such bodies within an hour make the account's older prices stale. `ignored-member`: a member in"
        " `cache.ignore` did affect the price."
    )
    about = About("Prices checked, by result", reads, SHORT, 14)
    colours = {"same": GREEN, "changed": ORANGE, "ignored-member": RED}
    return chart(
        about,
        Line(f"{rate('result', AUDITS)} * 3600", "{{result}}"),
        look=Look(stacked=True, bars=True, colours=colours),
    )


def audits_by_account() -> dashboard.Panel:
    reads = (
        "How often a checked price was the same, was different, or depended on an ignored member, in the time range."
    )
    return grid(
        About("Price changes, by account", reads, AMOUNT, 10),
        Column(title="Account", label="account"),
        Column(title="Changed", expr=increase("account", AUDITS, 'result="changed"'), decimals=0),
        Column(title="By an ignored member", expr=increase("account", AUDITS, 'result="ignored-member"'), decimals=0),
        Column(title="Same", expr=increase("account", AUDITS, 'result="same"'), decimals=0),
        most="Changed",
    )


def in_flight() -> dashboard.Panel:
    now = f"sum by (instance) ({select(IN_FLIGHT)})"
    size = f"sum by (instance) (sum_over_time({select(IN_FLIGHT)}[$__range] @ end()))"
    reads = (
        "Requests being served: the ten busiest instances, and all others together. It grows when RenderNet or the"
        " store becomes slow."
    )
    about = About("Requests in flight, by instance", reads, SHORT, 12)
    return chart(
        about,
        Line(leading("instance", now, size), "{{instance}}"),
        Line(others("instance", now, size), REST),
        look=AREAS,
    )


def instances() -> dashboard.Panel:
    reads = (
        "The number of instances that Prometheus can scrape. A dip is a restart or a lost instance; two versions are"
        " a rollout."
    )
    about = About("Instances, by version", reads, SHORT, 12)
    running = f"count by (version) (max by (instance, version) ({select('estimate_proxy_build_info')}))"
    return chart(about, Line(running, "{{version}}"), look=AREAS)


def restarts() -> dashboard.Panel:
    reads = (
        "When an instance's counters were reset: that happens when the whole gateway restarts, not when it replaces a"
        " worker. A replica that comes back under another name is a new instance instead. Shows the ten with the most"
        " restarts."
    )
    about = About("Restarts, by instance", reads, SHORT, 12)
    line = Line(leading("instance", began("[$__rate_interval]"), began("[$__range] @ end()")), "{{instance}}")
    return chart(about, line, look=BARS)


def began(window: str) -> str:
    """How often each instance restarted. Several workers together have no common start time to compare."""
    return f"max by (instance) (resets({select(REQUESTS)}{window}))"


def replicas() -> dashboard.Panel:
    reads = (
        "Instances at the end of the time range, how often each restarted in it, and whether its last reload of"
        " the config was accepted. After a refused reload the old config stays in force."
    )
    return grid(
        About("Instances and restarts", reads, AMOUNT, 12),
        Column(title="Instance", label="instance"),
        Column(title="Version", label="version"),
        Column(
            title="Running",
            expr=f"max by (instance, version) ({select('estimate_proxy_build_info')})",
            words={"1": ("yes", GREEN)},
        ),
        Column(title="Restarts", expr=began("[$__range]"), decimals=0),
        Column(
            title="Last reload",
            expr=f"min by (instance) ({select('estimate_proxy_config_last_reload_successful')})",
            words={"1": ("accepted", GREEN), "0": ("refused", RED)},
        ),
        most="Restarts",
    )
