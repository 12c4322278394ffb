"""Plots as inline SVG: no library, no script, no font, no address; colours come from the page, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 88, 20, 18, 54
MARKS = ("circle", "square", "triangle", "diamond", "down", "cross", "plus")
MISSES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001, 0.00005, 0.00002, 0.00001)


@dataclass(frozen=True)
class Axis:
    """One direction of a plot."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, kept inside the frame."""
        inside = min(max(value, min(self.low, self.high)), max(self.low, self.high))
        low, high, v = (math.log10(x) if self.log else x for x in (self.low, self.high, inside))
        return self.start + (v - low) / ((high - low) or 1) * (self.end - self.start)


@dataclass(frozen=True)
class Point:
    """A mark with what is read when it is pointed at."""

    x: float
    y: float
    label: str
    low: float | None = None  # ends of an interval of y
    high: float | None = None
    large: bool = False


@dataclass(frozen=True)
class Series:
    """Points or a line of one colour."""

    name: str
    points: Sequence[Point]


def colour(i: int) -> str:
    """The page's colour of the i-th series."""
    return f"var(--c{i % 8})"


def mark(kind: str, x: float, y: float, size: float, fill: str) -> str:
    """One mark, centred."""
    s = size
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}" fill="{fill}"/>'
    shapes = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -1.2 * s), (1.15 * s, s), (-1.15 * s, s)],
        "down": [(0, 1.2 * s), (1.15 * s, -s), (-1.15 * s, -s)],
        "diamond": [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
    }
    if kind in shapes:
        return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shapes[kind])}" fill="{fill}"/>'
    a, b = (s, s) if kind == "cross" else (1.3 * s, 0)
    lines = f"M{x - a:.1f} {y - b:.1f}L{x + a:.1f} {y + b:.1f}M{x - (a if b else 0):.1f} {y + (b or a):.1f}L{x + (a if b else 0):.1f} {y - (b or a):.1f}"
    return f'<path d="{lines}" stroke="{fill}" stroke-width="2.4" fill="none"/>'


def legend(names: Sequence[str], marks: bool) -> str:
    """Which colour and mark is which, as an HTML list."""
    items = []
    for i, name in enumerate(names):
        key = mark(MARKS[i % len(MARKS)], 9, 9, 5, colour(i)) if marks else f'<rect x="1" y="7" width="16" height="4" rx="2" fill="{colour(i)}"/>'
        items.append(f'<li><svg width="18" height="18" viewBox="0 0 18 18" aria-hidden="true">{key}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def frame(name: str, title: str, description: str, body: str) -> str:
    """The picture around a plot's body, with its words for those who do not see it."""
    return (
        f'<svg class="plot" id="{name}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{body}</svg>'
    )


def axes(x: Axis, y: Axis, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_name: str, y_name: str) -> str:
    """Grid, tick labels and names of both axes."""
    parts = []
    for value, label in x_ticks:
        px = x.at(value)
        parts.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{y.end}" y2="{y.start}"/>')
        parts.append(f'<text class="tick" x="{px:.1f}" y="{y.start + 20}" text-anchor="middle">{escape(label)}</text>')
    for value, label in y_ticks:
        py = y.at(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{x.start - 10}" y="{py + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    parts.append(f'<text class="name" x="{(x.start + x.end) / 2}" y="{y.start + 44}" text-anchor="middle">{escape(x_name)}</text>')
    middle = (y.start + y.end) / 2
    parts.append(f'<text class="name" x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_name)}</text>')
    return "".join(parts)


def log_ticks(low: float, high: float, label: Callable[[float], str]) -> list[tuple[float, str]]:
    """Ticks at 1, 2 and 5 times the powers of ten; fewer over many decades."""
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    values = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in steps]
    inside = [v for v in values if low * 0.999 <= v <= high * 1.001]
    return [(v, label(v)) for v in inside or [low, high]]


def linear_ticks(high: float, label: Callable[[float], str]) -> list[tuple[float, str]]:
    """About five round ticks from 0 to `high`."""
    raw = high / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return [(i * step, label(i * step)) for i in range(int(high / step + 1e-9) + 1)]


def agreement_plot(series: Sequence[Series], target: float | None) -> str:
    """Agreement against the share of the dense bytes. x is logarithmic; y shows misses logarithmically, best on top.

    Points: x is a share of the dense bytes, y a share of misses, never 0.
    """
    points = [p for s in series for p in s.points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v] + ([1 - target] if target else [])
    x = Axis(min(0.01, min(p.x for p in points) / 1.3), max(1.0, max(p.x for p in points)) * 1.15, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(min(0.99, max(ys) * 1.3), max(1e-6, min(ys) / 1.3), HEIGHT - BOTTOM, TOP, log=True)
    spread = math.log10(y.low / y.high)
    ticks = [(m, f"{100 * (1 - m):.{max(0, -math.floor(math.log10(m)) - 2)}f} %") for m in MISSES if y.high <= m <= y.low]
    if spread > 2.4:
        ticks = [t for t in ticks if round(t[0] / 10 ** math.floor(math.log10(t[0]) + 1e-9)) in (1, 5)]
    body = [
        axes(
            x,
            y,
            log_ticks(x.low, x.high, lambda v: f"{100 * v:g} %"),
            ticks,
            "bytes read a step, as a share of the dense head's",
            "agreement with the dense head",
        )
    ]
    if target:
        py = y.at(1 - target)
        body.append(f'<line class="target" x1="{x.start}" x2="{x.end}" y1="{py:.1f}" y2="{py:.1f}"/>')
        body.append(f'<text class="note" x="{x.end - 4}" y="{py - 6:.1f}" text-anchor="end">promised: {100 * target:g} %</text>')
    for i, s in reversed(list(enumerate(series))):
        for p in s.points:
            px, py = x.at(p.x), y.at(p.y)
            bar = ""
            if p.low is not None and p.high is not None:
                ends = f'y1="{y.at(max(p.low, 1e-9)):.1f}" y2="{y.at(max(p.high, 1e-9)):.1f}"'
                bar = f'<line x1="{px:.1f}" x2="{px:.1f}" {ends} stroke="{colour(i)}" stroke-width="1.5" opacity="0.6"/>'
            opacity = "1" if p.large else "0.55"
            body.append(
                f'<g opacity="{opacity}"><title>{escape(p.label)}</title>{bar}{mark(MARKS[i % len(MARKS)], px, py, 6 if p.large else 4, colour(i))}</g>'
            )
    words = "; ".join(p.label for s in series for p in s.points if p.large)
    return frame("agreement", "Agreement with the dense head against bytes read", words, "".join(body))


def lines_plot(name: str, title: str, series: Sequence[Series], x_name: str, y_name: str) -> str:
    """Lines with marks over two logarithmic axes; x is labelled where there are points."""
    points = [p for s in series for p in s.points]
    xs, ys = sorted({p.x for p in points}), [p.y for p in points]
    x = Axis(xs[0] / 1.15, xs[-1] * 1.15, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(min(ys) / 1.2, max(ys) * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    body = [axes(x, y, [(v, f"{v:g}") for v in xs], log_ticks(y.low, y.high, lambda v: f"{v:g}"), x_name, y_name)]
    for i, s in reversed(list(enumerate(series))):
        path = "M" + "L".join(f"{x.at(p.x):.1f} {y.at(p.y):.1f}" for p in s.points)
        body.append(f'<path d="{path}" fill="none" stroke="{colour(i)}" stroke-width="2" stroke-linejoin="round"/>')
        body += [f"<g><title>{escape(p.label)}</title>{mark(MARKS[i % len(MARKS)], x.at(p.x), y.at(p.y), 5, colour(i))}</g>" for p in s.points]
    return frame(name, title, "; ".join(p.label for p in points), "".join(body))


def histogram_plot(
    name: str, title: str, edges: Sequence[float], steps: Sequence[float], marks: Sequence[tuple[float, str]], x_name: str, label: Callable[[float], str]
) -> str:
    """One histogram over a logarithmic x, as shares of the steps, with upright lines at `marks` (x, words)."""
    share = [c / max(1, sum(steps)) for c in steps]
    x = Axis(edges[0], max(edges[-1], edges[0] * 1.01), LEFT, WIDTH - RIGHT, log=True)
    y = Axis(0, max(share) * 1.15, HEIGHT - BOTTOM, TOP)
    body = [axes(x, y, log_ticks(x.low, x.high, label), linear_ticks(y.high, lambda v: f"{100 * v:g} %"), x_name, "share of steps")]
    for a, b, part in zip(edges, edges[1:], share):
        words = f"{label(a)} to {label(b)}: {100 * part:.2g} % of the steps"
        tall = y.start - y.at(part)
        left, width = x.at(a) + 0.75, max(0.5, x.at(b) - x.at(a) - 1.5)
        body.append(f'<rect class="bar" x="{left:.1f}" y="{y.at(part):.1f}" width="{width:.1f}" height="{tall:.1f}"><title>{words}</title></rect>')
    for i, (value, words) in enumerate(marks):
        px = x.at(value)
        anchor, shift = ("end", -6) if px > (x.start + x.end) / 2 else ("start", 6)
        body.append(f'<line class="target" x1="{px:.1f}" x2="{px:.1f}" y1="{y.start}" y2="{y.end}"/>')
        body.append(f'<text class="note" x="{px + shift:.1f}" y="{y.end + 14 + 17 * i}" text-anchor="{anchor}">{escape(words)}</text>')
    return frame(name, title, f"Histogram from {label(edges[0])} to {label(edges[-1])}; " + ", ".join(w for _, w in marks) + ".", "".join(body))


def cumulative_plot(name: str, title: str, series: Sequence[Series], x_name: str, label: Callable[[float], str]) -> str:
    """Share of steps that need at most x; x is logarithmic."""
    xs = [p.x for s in series for p in s.points]
    x = Axis(min(xs), max(max(xs), min(xs) * 1.01), LEFT, WIDTH - RIGHT, log=True)
    y = Axis(0, 1, HEIGHT - BOTTOM, TOP)
    ticks = [(v / 100, f"{v} %") for v in (0, 25, 50, 75, 90, 99)]
    body = [axes(x, y, log_ticks(x.low, x.high, label), ticks, x_name, "share of steps that read at most")]
    for i, s in enumerate(series):
        path = "M" + "L".join(f"{x.at(p.x):.1f} {y.at(p.y):.1f}" for p in s.points)
        body.append(f'<path d="{path}" fill="none" stroke="{colour(i)}" stroke-width="2.2" stroke-linejoin="round"><title>{escape(s.name)}</title></path>')
    words = "; ".join(f"{s.name}: half of the steps read at most {label(s.points[len(s.points) // 2].x)}, all at most {label(s.points[-1].x)}" for s in series)
    return frame(name, title, words, "".join(body))
