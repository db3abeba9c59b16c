"""The bench's command line. Bad input is one clear line on standard error, and exit status 2."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from bench import growth, latency, machine, memory, plot, report, table, workers
from bench.cases import CASES, Case
from bench.children import BenchError
from bench.load import Kind, kind_of
from bench.parts import Pace, Part
from bench.servers import Servers, start_servers
from bench.sites import no_nginx, no_peer

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
PACES = {"table": Pace(5, 2.0), "latency": Pace(3, 4.0), "workers": Pace(3, 3.0), "growth": Pace(2, 1.0)}
PARTS = (*PACES, "memory")


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

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
@click.option("--all", "everything", is_flag=True, help="All of these.")
@click.option("--only", metavar="CASE,…", help=f"Of the table these: {', '.join(case.name for case in CASES)}.")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often each case is measured. [default: 2 to 5]")
@click.option("--seconds", type=click.FloatRange(0.1, 600), help="For a case and round. [default: 1 to 4]")
@click.option("--requests", type=click.IntRange(1), default=memory.REQUESTS, show_default=True, help="For --memory.")
@click.option("--load", type=click.Choice(["auto", "wrk", "own"]), default="auto", show_default=True, help="What asks.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All numbers, into this file."
)
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="The plot of --growth, into this file.")
@click.option("--write-docs", is_flag=True, help="Put results and plot into docs/performance.md.")
def main(*, json_file: Path | None, write_docs: bool, **given: Any) -> None:
    """Measure the gateway beside what it is compared with, on this machine.

    Servers have one core, what asks them has the others. Nothing else should run meanwhile: compare ratios, and only
    within one run.
    """
    wanted = _wanted(**given, write_docs=write_docs)
    facts = _facts(wanted)
    console = Console(soft_wrap=True)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}; {facts['setting']}", highlight=False
    )
    parts = []
    for part in _measured(wanted):
        _say("")
        report.shown(part, console)
        parts.append(part)
    if json_file:
        report.written_json(json_file, facts, parts)
    if write_docs:
        report.write_docs(parts, facts)
    if any(part.failures for part in parts):
        sys.exit(FAILED)


def _wanted(
    *, parts: tuple[str, ...], everything: bool, only: str | None, load: str, write_docs: bool, **rest: Any
) -> Wanted:
    chosen = PARTS if everything else tuple(part for part in PARTS if part in parts) or ("table",)
    svg = rest.pop("svg") or (report.PLOT if write_docs else None)
    return Wanted(chosen, kind_of(load), _cases(only), svg=svg, **rest)


def _cases(only: str | None) -> list[Case]:
    known = {case.name: case for case in CASES}
    names = only.split(",") if only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"unknown case {unknown[0]!r}: choose from {', '.join(known)}")
    return [known[name] for name in names if _left_out().get(name) is None]


def _left_out() -> dict[str, str | None]:
    """Why a case cannot be measured here; None if it can."""
    return {"peer": no_peer(), "nginx": no_nginx()}


def _facts(wanted: Wanted) -> Mapping[str, Any]:
    loader = "wrk" if wanted.kind == "wrk" else "the bench's own loader"
    without = "".join(f"; without {case}: {reason}" for case, reason in _left_out().items() if reason)
    return {**machine.facts(), "setting": f"{machine.cores().text()}; load by {loader}{without}"}


def _measured(wanted: Wanted) -> Iterator[Part]:
    """Yields each part when it is measured. The workers have their own servers, on other cores."""
    with start_servers(machine.cores(), wanted.kind) as opened:
        for name in wanted.parts:
            if name != "workers":
                yield _or_why_not(name, partial(_part, name, opened, wanted))
    if "workers" in wanted.parts:
        yield _or_why_not("workers", partial(workers.run, wanted.kind, wanted.pace("workers"), _say))


def _or_why_not(name: str, measured: Callable[[], Part]) -> Part:
    try:
        return measured()
    except BenchError as error:
        return Part(name, "it failed", tables=(), failures={name: str(error)})


def _part(name: str, opened: Servers, wanted: Wanted) -> Part:
    match name:
        case "table":
            return table.run(opened, wanted.cases, wanted.pace(name), _say)
        case "latency":
            return latency.run(opened, wanted.pace(name), _say, with_peer=wanted.with_peer)
        case "growth":
            part, panels = growth.run(opened, wanted.pace(name), _say, with_peer=wanted.with_peer)
            if wanted.svg:
                wanted.svg.write_text(plot.svg(panels), encoding="utf-8")
            return part
        case _:
            return memory.run(opened, _say, requests=wanted.requests)


def _say(text: str) -> None:
    """To a person who waits; to nobody in a pipe."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def run() -> None:
    """The command; what goes wrong is one line."""
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
    _say("")
    click.echo(f"bench: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    run()
