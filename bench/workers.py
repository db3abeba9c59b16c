"""Two workers compared with one. The measure depends on the machine.

* Four cores or more: two cores for the gateway, and throughput with two workers over that with one.
* Fewer: load and stores use the workers' cores, so throughput is meaningless. CPU time per request is compared instead:
  it rises if two workers cause work that one does not.
"""

from bench import machine
from bench.cases import CASES, Case
from bench.gateways import GatewayVariant
from bench.load import Kind
from bench.measuring import Measured
from bench.parts import Pace, Part, Say, Table, Target
from bench.rounds import Rounds, run_rounds
from bench.servers import Servers, start_servers
from bench.sites import Site
from bench.table import cpu_us, notes, per_s
from bench.traffic import TEAMS

CORES_NEEDED = 4
CONNECTIONS = 256
"""Enough connections for the largest ledger batches, with one worker or with two."""
_GAIN = 1.8
_EVEN = 0.5
_COLUMNS = ("case", "req/s", "CPU µs", "CPU ÷ one worker", "least worker ÷ most", "p50 ms", "p99 ms")
ONE, TWO = "one worker", "two workers"


def run(kind: Kind, pace: Pace, say: Say) -> Part:
    cores = machine.cores(servers=2)
    with start_servers(cores, kind) as opened:
        found = run_rounds(opened, [_case(ONE, 1), _case(TWO, 2)], pace, say)
    names = [name for name in (ONE, TWO) if name in found]
    return Part(
        name="workers",
        how=f"{pace.text()}; {cores.text()}",
        tables=[Table("Workers", _COLUMNS, [_row(name, found) for name in names])],
        targets=_targets(found, by_throughput=cores.apart),
        notes=notes(found) if cores.apart else (),
        failures=found.failures,
        raw=found.raw(),
    )


def _case(name: str, workers: int) -> Case:
    def site(opened: Servers) -> Site:
        return opened.gateway(GatewayVariant(name.replace(" ", "-"), TEAMS, workers=workers))

    (hit,) = (case for case in CASES if case.name == "hit")
    return hit.at(name, site=site, connections=CONNECTIONS)


def _row(name: str, found: Rounds) -> list[str]:
    compared = found.ratio(name, ONE, cpu_us)
    return [
        name,
        found.of(name, per_s).text(),
        found.of(name, cpu_us).text(),
        compared.text(".2f") if compared else "-",
        found.of(name, evenness).text(".2f"),
        found.of(name, lambda each: each.p50_ms).text(".2f"),
        found.of(name, lambda each: each.p99_ms).text(".2f"),
    ]


def evenness(measured: Measured) -> float:
    """Returns the CPU time of the least busy worker divided by that of the busiest."""
    return min(measured.workers) / max(measured.workers)


def _targets(found: Rounds, *, by_throughput: bool) -> list[Target]:
    gain, saved = found.ratio(TWO, ONE, per_s), found.ratio(ONE, TWO, cpu_us)
    if gain is None or saved is None:
        return []
    even = found.of(TWO, evenness)
    share = Target("the less busy of two workers ÷ the busier", _EVEN, even.median, spread=even)
    if by_throughput:
        return [Target("two workers ÷ one, by throughput", _GAIN, gain.median, spread=gain), share]
    text = f"twice the CPU of one worker ÷ that of two, a request (fewer than {CORES_NEEDED} cores: not by throughput)"
    return [Target(text, _GAIN, 2 * saved.median, spread=saved.times(2)), share]
