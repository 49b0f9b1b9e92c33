"""Line charts as SVG, written by hand: a load test should not need a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Okabe and Ito's palette and a grey, which stay apart for the colour-blind, and dashes for print.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a8a")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 2", "12 3", "4 2 1 2")

_WIDTH, _HEIGHT = 480, 320  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 34, 46  # margins of its axes
_LEGEND, _CAPTION = 30, 34
_FONT = "font-family='sans-serif' font-size='12' fill='#222'"


@dataclass(frozen=True)
class Series:
    """A line: points in order of x. On a logarithmic axis, what is not above 0 is left out."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x_log, y_log: logarithmic axes.
        y_from_zero: whether a linear y axis begins at 0.
        steps: whether lines hold their value up to the next point, as a distribution does.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    y_from_zero: bool = True
    steps: bool = False


@dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return round(self.start + share * (self.end - self.start), 2)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def figure(title: str, panels: Sequence[Panel], columns: int = 2) -> str:
    """An SVG document: the panels in rows, and one legend for all of them, by the names of their series."""
    columns = max(1, min(columns, len(panels)))
    rows = math.ceil(len(panels) / columns)
    width, height = columns * _WIDTH, rows * _HEIGHT + _CAPTION + _LEGEND
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' role='img' aria-label='{_attribute(title)}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        _text(width / 2, 22, title, "middle", "font-weight='bold'"),
        *_legend(names, width, _CAPTION),
    ]
    for index, panel in enumerate(panels):
        x, y = index % columns * _WIDTH, index // columns * _HEIGHT + _CAPTION + _LEGEND
        parts += [f"<g transform='translate({x},{y})'>", *_panel(panel, names), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _legend(names: Sequence[str], width: float, top: float) -> Iterator[str]:
    widths = [46 + 7.2 * len(name) for name in names]
    x = (width - sum(widths)) / 2
    for index, name in enumerate(names):
        yield f"<path d='M{x:.1f} {top + 12}h26' {_stroke(index)}/>"
        yield _text(x + 32, top + 16, name)
        x += widths[index]


def _panel(panel: Panel, names: Sequence[str]) -> Iterator[str]:
    points = [point for series in panel.series for point in series.points]
    x_axis = _axis([x for x, _ in points], panel.x_log, False, _LEFT, _WIDTH - _RIGHT)
    y_axis = _axis([y for _, y in points], panel.y_log, panel.y_from_zero, _HEIGHT - _BOTTOM, _TOP)
    yield _text((x_axis.start + x_axis.end) / 2, _TOP - 12, panel.title, "middle", "font-weight='bold'")
    for x in x_axis.ticks():
        yield f"<path d='M{x_axis(x)} {_TOP}V{_HEIGHT - _BOTTOM}' stroke='#e5e5e5'/>"
        yield _text(x_axis(x), _HEIGHT - _BOTTOM + 17, _label(x), "middle")
    for y in y_axis.ticks():
        yield f"<path d='M{_LEFT} {y_axis(y)}H{_WIDTH - _RIGHT}' stroke='#e5e5e5'/>"
        yield _text(_LEFT - 7, y_axis(y) + 4, _label(y), "end")
    yield f"<path d='M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}' fill='none' stroke='#222'/>"
    yield _text((x_axis.start + x_axis.end) / 2, _HEIGHT - 10, panel.x_label, "middle")
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    yield _text(15, middle, panel.y_label, "middle", f"transform='rotate(-90 15 {middle})'")
    for series in panel.series:
        kept = [(x_axis(x), y_axis(y)) for x, y in series.points if x_axis.holds(x) and y_axis.holds(y)]
        if kept:
            line = _path(kept, panel.steps)
            title = f"<title>{escape(series.name)}</title>"
            yield f"<path d='{line}' fill='none' {_stroke(names.index(series.name))}>{title}</path>"


def _axis(values: Sequence[float], log: bool, from_zero: bool, start: float, end: float) -> _Axis:
    """Around the values, from tick to tick on a linear axis and with some air on a logarithmic one."""
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(usable), max(usable)) if usable else (1.0, 2.0)
    if log:
        return _Axis(low / 1.15, high * 1.15, True, start, end)
    low = min(0.0, low) if from_zero else low
    high = high if high > low else low + 1.0
    step = _step(low, high)
    return _Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, False, start, end)


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, so that there are some five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _linear_ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low <= value <= high]


def _path(points: Sequence[tuple[float, float]], steps: bool) -> str:
    (x, y), *rest = points
    moves: Callable[[float, float], str] = (lambda x, y: f"H{x}V{y}") if steps else (lambda x, y: f"L{x} {y}")
    return f"M{x} {y}" + "".join(moves(x, y) for x, y in rest)


def _stroke(index: int) -> str:
    dash = _DASHES[index % len(_DASHES)]
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    return f"stroke='{_COLOURS[index % len(_COLOURS)]}' stroke-width='2'{dashes}"


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_FONT} {more}>{escape(text)}</text>"


def _attribute(text: str) -> str:
    return escape(text, {"'": "&apos;", '"': "&quot;"})


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
