"""`estimate-proxy demo`: the gateway with a simulated RenderNet and live traffic."""

import sys

import click

from proxy.demo.runner import run


@click.command(short_help="Try the gateway without a RenderNet account.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="PORT",
    help="Listen on this port; 0: any free one.",
)
@click.option("--traffic/--no-traffic", default=True, help="Send requests of three teams all the time (the default).")
@click.option("--prometheus", is_flag=True, help="Also write a Prometheus configuration that scrapes the demo.")
def demo(port: int, traffic: bool, prometheus: bool) -> None:  # noqa: FBT001 -- click passes a flag by name
    """Try the gateway without a RenderNet account: simulated RenderNet, three teams, live traffic."""
    sys.exit(run(port=port, traffic=traffic, prometheus=prometheus))
