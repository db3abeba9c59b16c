"""What `estimate-proxy quote` shows: rows for people, Markdown or programs, and the verdict for its exit status."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from proxy.quota.credits import micro_of, percent_text

WITHIN, OVER, UNKNOWN = 0, 1, 2
"""Exit statuses. Bad input is also 2."""

_LABEL_CHARACTERS = 60
"""In a table; a longer label is cut."""


class Row(NamedTuple):
    """A variant, or a line of its breakdown. Amounts are as RenderNet or the gateway wrote them; empty if unknown."""

    variant: str
    estimated: str = ""
    delta: str = ""
    share_percent: str = ""
    basis: str = ""
    age_s: str = ""
    note: str = ""


COLUMNS = Row._fields

HEADERS = ("variant", "estimated", "delta", "share %", "basis", "age s", "note")
"""The columns for people."""


@dataclass(frozen=True, slots=True)
class Report:
    """A quote. `total` is None if a price that it needs is unknown.

    quotas: as the gateway wrote them, but for a plan `fits` says whether all of it fits.
    is_plan: all bodies are wanted; else variants are alternatives, and the cheapest counts.
    """

    variants: Sequence[Mapping[str, Any]]
    cheapest: str | None
    total: Decimal | None
    quotas: Sequence[Mapping[str, Any]] | None
    is_plan: bool

    @property
    def errors(self) -> list[str]:
        """The codes of all errors, those of breakdowns included."""
        parts = [part for variant in self.variants for part in (variant, *variant.get("breakdown", ()))]
        return [part["error"]["code"] for part in parts if "error" in part]


def report_of(answers: Sequence[Mapping[str, Any]], *, is_plan: bool) -> Report:
    """The report of one answer, or of the answers to all calls of a plan."""
    variants = [variant for answer in answers for variant in answer["variants"]]
    cheapest, quotas = answers[-1]["cheapest"], answers[-1]["quotas"]
    if not is_plan:
        amounts = {variant["label"]: variant["estimated"] for variant in variants}
        total = answers[0].get("total", amounts.get(cheapest))
        return Report(variants, cheapest, None if total is None else Decimal(total), quotas, is_plan=False)
    known = {
        variant["label"]: Decimal(variant["estimated"]) for variant in variants if variant["estimated"] is not None
    }
    total = sum(known.values(), Decimal()).normalize() if len(known) == len(variants) else None
    cheapest = min(known, key=known.__getitem__, default=None)
    if quotas is not None:
        quotas = [{**quota, "fits": _fits(quota, total, len(variants))} for quota in quotas]
    return Report(variants, cheapest, total, quotas, is_plan=True)


def _fits(quota: Mapping[str, Any], total: Decimal | None, bodies: int) -> bool | None:
    if total is None:
        return None
    wanted = Decimal(bodies) if quota["measure"] == "requests" else total
    return bool(0 < quota["remaining"] >= wanted)


def verdict(report: Report, max_total: Decimal | None) -> tuple[int, str]:
    """The exit status and the reason. What is not known never passes."""
    unknown = [code for code in report.errors if code != "quota-exceeded"]
    if unknown:
        prices = "1 price is" if len(unknown) == 1 else f"{len(unknown)} prices are"
        return UNKNOWN, f"{prices} unknown ({', '.join(sorted(set(unknown)))})"
    if report.errors:
        return OVER, "a quota would refuse these estimates"
    if report.quotas is None or report.total is None:
        return UNKNOWN, "what the quotas leave is unknown"
    for quota in report.quotas:
        if not quota["fits"]:
            return OVER, f"more than the {_quota_name(quota)} leaves ({quota['remaining']})"
    if max_total is not None and report.total > max_total:
        return OVER, f"{_text(report.total)} credits are more than --max-total {_text(max_total)}"
    within = "" if max_total is None else f", within --max-total {_text(max_total)}"
    return WITHIN, f"{_text(report.total)} credits{within}"


def rows_of(report: Report) -> Iterator[Row]:
    """A row for each variant and each line of its breakdown.

    The share of a body in a plan is of the total, that of a variant is of the first one, and that of a line is of its
    variant.
    """
    whole = report.total if report.is_plan else report.variants[0]["estimated"]
    for variant in report.variants:
        note = "cheapest" if variant["label"] == report.cheapest and len(report.variants) > 1 else ""
        yield Row(
            variant=_clean(variant["label"]),
            estimated=_amount(variant["estimated"]),
            delta="" if report.is_plan else _amount(variant["delta"]),
            share_percent=_share(variant["estimated"], whole),
            basis=variant["basis"] or "",
            age_s="" if variant["age_s"] is None else str(variant["age_s"]),
            note=_error_of(variant) or note,
        )
        yield from _lines_of(variant)


def _lines_of(variant: Mapping[str, Any]) -> Iterator[Row]:
    whole = variant["estimated"]
    for line in variant.get("breakdown", ()):
        if "item" in line:
            amount = line["estimated"]
            yield Row(f"- item {line['item']}", _amount(amount), "", _share(amount, whole), note=_error_of(line))
        else:
            marginal, note = line["marginal"], "another mode" if line.get("mode_changes") else ""
            label = f"- {_clean(line['member'])}"
            yield Row(label, "", _amount(marginal), _share(marginal, whole), note=_error_of(line) or note)
    if "residual" in variant:
        residual = variant["residual"]
        yield Row("- residual", _amount(residual), "", _share(residual, whole))


def quota_lines(report: Report) -> Iterator[str]:
    """A sentence for each quota."""
    for quota in report.quotas or ():
        fits = {True: "fits", False: "does not fit", None: "unknown whether it fits"}[quota["fits"]]
        how_many = quota["how_many"]
        often = "" if how_many is None or report.is_plan else f", {how_many} times the cheapest"
        yield f"{_quota_name(quota)}: {quota['remaining']} left, {fits}{often}"


def markdown(report: Report, reason: str) -> str:
    """A table, the verdict and the quotas, for a comment on a change."""
    header = f"| {' | '.join(HEADERS)} |\n|---|--:|--:|--:|---|--:|---|\n"
    table = "".join(f"| {' | '.join(map(_escaped, row))} |\n" for row in rows_of(report))
    quotas = "".join(f"- {line}\n" for line in quota_lines(report))
    return f"{header}{table}\n**{reason[0].upper()}{reason[1:]}.**\n" + (f"\n{quotas}" if quotas else "")


def _quota_name(quota: Mapping[str, Any]) -> str:
    whose = "team's" if quota["scope"] == "team" else "organisation's"
    what = "requests" if quota["measure"] == "requests" else "estimated credits"
    return f"{whose} quota of {what} per {quota['per']}"


def _amount(amount: Any) -> str:
    return "" if amount is None else _text(Decimal(amount))


def _text(amount: Decimal) -> str:
    return format(amount, "f")


def _share(part: Any, whole: Any) -> str:
    if part is None or whole is None:
        return ""
    micro, whole_micro = (micro_of(str(amount).encode()) for amount in (part, whole))
    return percent_text(micro, whole_micro)


def _error_of(part: Mapping[str, Any]) -> str:
    error = part.get("error")
    return "" if error is None else _clean(f"{error['code']}: {error['message']}")


def _clean(text: str) -> str:
    """Without control characters, which a terminal would obey, and without tabs, which separate columns."""
    return "".join(character if character.isprintable() else " " for character in text)


def _escaped(cell: str) -> str:
    """A cell of Markdown."""
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
