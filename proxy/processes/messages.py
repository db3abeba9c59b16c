"""Messages between the supervisor and a worker, beside settings and the addresses of the embedded stores."""

READY = "ready"
"""From the worker: it serves."""

DRAIN = "drain"
"""Go on serving, and say that you are about to stop."""

STOP = "stop"
"""Finish what is in flight, and exit."""

RELOAD_FAILED = "reload failed"
"""There are newer settings, and they are invalid."""

CANNOT_SERVE = 3
"""A worker's exit status where another attempt would fail in the same way."""
