"""Every instrument, declared once. What they are called and labelled is an interface."""

from prometheus_client import CollectorRegistry, Counter


class Metrics:
    """The instruments of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.price_audits = Counter(
            "estimate_proxy_price_audits",
            "Stored prices that were asked for again, by what came of it.",
            ["account", "result"],
            registry=self.registry,
        )
