"""Fixtures of the tests of what is deployed."""

from shared_fixtures import close_servers, immediate_metrics, upstream

__all__ = ["close_servers", "immediate_metrics", "upstream"]
