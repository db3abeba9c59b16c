"""A gateway between an organisation's teams and RenderNet's price-estimate API."""

__version__ = "0.1.0.dev0"
