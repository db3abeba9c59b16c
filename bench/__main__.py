"""The bench's command line. Invalid input gives one line on standard error, and exit status 2."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from bench import growth, latency, learning, machine, memory, plot, report, table, workers
from bench.cases import CASES, Case
from bench.children import BenchError
from bench.load import Kind, kind_of
from bench.parts import Pace, Part
from bench.servers import Servers, start_servers
from bench.sites import no_nginx, no_peer

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
PACES = {"table": Pace(5, 2.0), "latency": Pace(3, 4.0), "workers": Pace(3, 3.0), "growth": Pace(2, 1.0)}
PARTS = (*PACES, "memory", "learning")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    parts: tuple[str, ...]
    kind: Kind
    cases: list[Case]
    rounds: int | None
    seconds: float | None
    requests: int
    svg: Path | None

    def pace(self, part: str) -> Pace:
        usual = PACES[part]
        return Pace(self.rounds or usual.rounds, self.seconds or usual.seconds)

    @cached_property
    def with_peer(self) -> bool:
        return no_peer() is None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--table", "parts", flag_value="table", multiple=True, help="The main table, the default: 4 minutes.")
@click.option("--latency", "parts", flag_value="latency", multiple=True, help="Latency at a fixed rate: 1 minute.")
@click.option("--workers", "parts", flag_value="workers", multiple=True, help="Two workers beside one: half a minute.")
@click.option("--growth", "parts", flag_value="growth", multiple=True, help="How cost grows, as a plot too: 5 minutes.")
@click.option("--memory", "parts", flag_value="memory", multiple=True, help="A worker's memory: up to an hour.")
@click.option("--learning", "parts", flag_value="learning", multiple=True, help="Learned prices, replayed: 10 minutes.")
@click.option("--all", "everything", is_flag=True, help="All of these.")
@click.option("--only", metavar="CASE,…", help=f"Of the table these: {', '.join(case.name for case in CASES)}.")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often each case is measured. [default: 2 to 5]")
@click.option("--seconds", type=click.FloatRange(0.1, 600), help="For a case and round. [default: 1 to 4]")
@click.option("--requests", type=click.IntRange(1), default=memory.REQUESTS, show_default=True, help="For --memory.")
@click.option(
    "--load", type=click.Choice(["auto", "wrk", "own"]), default="auto", show_default=True, help="The load generator."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All numbers, into this file."
)
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="The plot of --growth, into this file.")
@click.option("--write-docs", is_flag=True, help="Put results and plot into docs/performance.md.")
def main(*, json_file: Path | None, write_docs: bool, **given: Any) -> None:
    """Measure the gateway and the servers that it is compared with, on this machine.

    Servers have one core, load generators have the others. Nothing else should run at the same time. Compare only
    ratios, and only within one run.
    """
    options = _wanted(**given, write_docs=write_docs)
    facts = _facts(options)
    console = Console(soft_wrap=True)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}; {facts['setting']}", highlight=False
    )
    parts = []
    for part in _measured(options):
        _show_progress("")
        report.print_part(part, console)
        parts.append(part)
    if json_file:
        report.written_json(json_file, facts, parts)
    if write_docs:
        report.write_docs(parts, facts)
    if any(part.failures for part in parts):
        sys.exit(FAILED)


def _wanted(
    *, parts: tuple[str, ...], everything: bool, only: str | None, load: str, write_docs: bool, **rest: Any
) -> Options:
    chosen = PARTS if everything else tuple(part for part in PARTS if part in parts) or ("table",)
    svg = rest.pop("svg") or (report.PLOT if write_docs else None)
    return Options(chosen, kind_of(load), _cases(only), svg=svg, **rest)


def _cases(only: str | None) -> list[Case]:
    cases_by_name = {case.name: case for case in CASES}
    names = only.split(",") if only else list(cases_by_name)
    if unknown := [name for name in names if name not in cases_by_name]:
        raise click.UsageError(f"unknown case {unknown[0]!r}: choose from {', '.join(cases_by_name)}")
    return [cases_by_name[name] for name in names if _left_out().get(name) is None]


def _left_out() -> dict[str, str | None]:
    """Returns why each case cannot be measured on this machine; None if it can."""
    return {"peer": no_peer(), "nginx": no_nginx()}


def _facts(options: Options) -> Mapping[str, Any]:
    loader = "wrk" if options.kind == "wrk" else "the bench's own loader"
    without = "".join(f"; without {case}: {reason}" for case, reason in _left_out().items() if reason)
    return {**machine.facts(), "setting": f"{machine.cores().text()}; load by {loader}{without}"}


def _measured(options: Options) -> Iterator[Part]:
    """Measures and yields each part. The parts on workers and on learning have their own servers."""
    served = [name for name in options.parts if name not in ("workers", "learning")]
    if served:
        with start_servers(machine.cores(), options.kind) as opened:
            for name in served:
                yield _catch_errors(name, partial(_part, name, opened, options))
    if "workers" in options.parts:
        yield _catch_errors("workers", partial(workers.run, options.kind, options.pace("workers"), _show_progress))
    if "learning" in options.parts:
        yield _catch_errors("learning", partial(learning.run, _show_progress))


def _catch_errors(name: str, measured: Callable[[], Part]) -> Part:
    try:
        return measured()
    except BenchError as error:
        return Part(name, "it failed", tables=(), failures={name: str(error)})


def _part(name: str, opened: Servers, options: Options) -> Part:
    match name:
        case "table":
            return table.run(opened, options.cases, options.pace(name), _show_progress)
        case "latency":
            return latency.run(opened, options.pace(name), _show_progress, with_peer=options.with_peer)
        case "growth":
            part, panels = growth.run(opened, options.pace(name), _show_progress, with_peer=options.with_peer)
            if options.svg:
                options.svg.write_text(plot.svg(panels), encoding="utf-8")
            return part
        case _:
            return memory.run(opened, _show_progress, requests=options.requests)


def _show_progress(text: str) -> None:
    """Prints progress on a terminal, and nothing to a pipe."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def run() -> None:
    """Runs the command; each error is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main.main(prog_name="scripts/bench", standalone_mode=False)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()) + " (see --help)", BAD_INPUT)
    except BenchError as error:
        _fail(str(error), FAILED)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", INTERRUPTED)


def _fail(message: str, status: int) -> NoReturn:
    _show_progress("")
    click.echo(f"bench: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    run()
