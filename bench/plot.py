"""Curves as SVG: small panels with logarithmic axes, on which a sudden jump is visible at any scale.

All panels have the same vertical scale, so that they can be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 52
_COLUMNS = 2
_LEGEND = 36
_COLOURS = {"bare route": "#6b7280", "hit": "#2563eb", "miss": "#d97706", "nginx + Lua": "#059669"}
_OTHER_COLOUR = "#7c3aed"
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#111827}.title{font-weight:600}.tick{font-size:11px;fill:#4b5563}"
    ".grid{stroke:#e5e7eb}.frame{fill:none;stroke:#9ca3af}.curve{fill:none;stroke-width:2}"
)


@dataclass(frozen=True, slots=True)
class Curve:
    title: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """`x` and `y`: titles of the axes, with units."""

    x: str
    y: str
    curves: Sequence[Curve]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps a number on a logarithmic axis to a coordinate."""

    least: float
    most: float
    start: float
    end: float

    def at(self, number: float) -> float:
        share = (log10(number) - log10(self.least)) / (log10(self.most) - log10(self.least))
        return round(self.start + share * (self.end - self.start), 1)


def svg(panels: Sequence[Panel]) -> str:
    """Returns the panels as one picture, with one legend."""
    rows = ceil(len(panels) / _COLUMNS)
    width, height = _WIDTH * _COLUMNS, _HEIGHT * rows + _LEGEND
    titles = list(dict.fromkeys(curve.title for panel in panels for curve in panel.curves))
    up = _bounds([y for panel in panels for curve in panel.curves for _, y in curve.points])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(titles),
    ]
    for index, panel in enumerate(panels):
        x, y = index % _COLUMNS * _WIDTH, index // _COLUMNS * _HEIGHT + _LEGEND
        lines += [f'<g transform="translate({x},{y})">', *_panel(panel, _Scale(*up, _HEIGHT - _BOTTOM, _TOP)), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def _legend(titles: Sequence[str]) -> Iterator[str]:
    x = _LEFT
    for title in titles:
        yield f'<line x1="{x}" x2="{x + 24}" y1="20" y2="20" class="curve" stroke="{_colour(title)}"/>'
        yield _text(x + 32, 24, title)
        x += 64 + 8 * len(title)


def _panel(panel: Panel, up: _Scale) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    across = _Scale(*_bounds([x for curve in panel.curves for x, _ in curve.points]), _LEFT, right)
    for tick in _ticks(across):
        x = across.at(tick)
        yield f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}" class="grid"/>'
        yield _text(x, bottom + 18, f"{tick:,.0f}", "tick", "middle")
    for tick in _ticks(up):
        y = up.at(tick)
        yield f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" class="grid"/>'
        yield _text(_LEFT - 8, y + 4, f"{tick:,.0f}", "tick", "end")
    yield f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" class="frame"/>'
    yield _text((_LEFT + right) / 2, _HEIGHT - 12, panel.x, anchor="middle")
    yield _text(_LEFT, _TOP - 12, panel.y, "title")
    for curve in panel.curves:
        yield from _curve(curve, across, up)


def _curve(curve: Curve, across: _Scale, up: _Scale) -> Iterator[str]:
    places = [(across.at(x), up.at(y)) for x, y in curve.points]
    path, colour = " ".join(f"{x},{y}" for x, y in places), _colour(curve.title)
    yield f'<polyline points="{path}" class="curve" stroke="{colour}"/>'
    yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(title: str) -> str:
    return _COLOURS.get(title, _OTHER_COLOUR)


def _bounds(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns bounds slightly wider than the numbers, never empty."""
    return min(numbers, default=1.0) / 1.25, max(numbers, default=1.0) * 1.25


def _ticks(scale: _Scale) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten, or only the powers on a long axis."""
    long = scale.most / scale.least > 10**2.5
    powers = range(floor(log10(scale.least)), ceil(log10(scale.most)) + 1)
    steps = (1,) if long else (1, 2, 5)
    return [step * 10.0**power for power in powers for step in steps if scale.least <= step * 10.0**power <= scale.most]
