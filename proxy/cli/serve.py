"""`estimate-proxy serve`: runs the supervisor."""

import os
import sys
from pathlib import Path

import click

from proxy.cli.inputs import config_option, fail, load_settings
from proxy.embedded.valkey import EmbeddedStoreError
from proxy.processes.supervisor import ListenError, Supervisor
from proxy.settings.loader import Source
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
    source = Source(config, dict(os.environ), {"server": chosen})
    settings = load_settings(config, source.overrides)
    logs.configure(settings.log.level, settings.log.format)
    try:
        status = Supervisor(settings, source).run()
    except (ListenError, EmbeddedStoreError, NoMetricsFileError) as error:
        fail(str(error))
    sys.exit(status)
