"""Messages between the supervisor and a worker, besides settings and the URLs of the embedded stores."""

READY = "ready"
"""From the worker: it accepts requests."""

DRAIN = "drain"
"""To the worker: keep serving, and report "not ready"."""

STOP = "stop"
"""To the worker: finish the running requests, and exit."""

RELOAD_FAILED = "reload failed"
"""To the worker: there are newer settings, but they are invalid."""

CANNOT_SERVE = 3
"""A worker's exit status if another attempt would fail in the same way."""
