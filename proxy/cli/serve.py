"""`estimate-proxy serve`: runs the supervisor."""

import os
import sys
from pathlib import Path

import click

from proxy.cli.inputs import config_option, fail, load_settings
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.processes.supervisor import ListenError, Supervisor
from proxy.settings.loader import Source, find_config
from proxy.telemetry import logs
from proxy.telemetry.metrics_files import NoMetricsFileError


@click.command()
@config_option
@click.option("--host", metavar="HOST", help="Listen on this address instead of server.host.")
@click.option("--port", type=int, metavar="PORT", help="Listen on this port instead of server.port; 0: any free one.")
@click.option("--workers", type=int, metavar="N", help="Number of worker processes, instead of server.workers.")
def serve(config: Path | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Run the gateway. SIGTERM drains it, SIGHUP reloads its settings."""
    given = {"host": host, "port": port, "workers": workers}
    chosen = {name: value for name, value in given.items() if value is not None}
    found = find_config(config, os.environ)  # once: a reload must not fall back to no file, and so to no teams
    source = Source(found, dict(os.environ), {"server": chosen})
    settings = load_settings(found, source.overrides)
    logs.configure(settings.log.level, settings.log.format)
    try:
        status = Supervisor(settings, source).run()
    except (ListenError, EmbeddedStoreError, NoMetricsFileError) as error:
        fail(str(error))
    sys.exit(status)
