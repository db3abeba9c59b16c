"""Fixtures of the tests of what is deployed."""

from shared_fixtures import close_servers, quick_gateways, upstream

__all__ = ["close_servers", "quick_gateways", "upstream"]
