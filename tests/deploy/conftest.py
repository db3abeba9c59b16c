"""Fixtures of the deployment tests."""

from shared_fixtures import close_servers, gateway, open_gateway, quick_gateways, simulator, upstream, valkey_url

__all__ = ["close_servers", "gateway", "open_gateway", "quick_gateways", "simulator", "upstream", "valkey_url"]
