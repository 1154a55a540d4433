"""A chart as inline SVG: axes, lines, error bars, events; its values ride along for the pointer to read."""

import math
from dataclasses import replace

from rlhf.page.report_charts import Chart, Line
from rlhf.page.report_data import Points, Words
from rlhf.page.report_html import both, short, text

# Units of a drawing, about the pixels of a phone's width, so that its letters are readable there.
WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24

# Points of a line, at most: more than a screen can tell apart.
MOST_POINTS = 300

# (step, kind of mark, words) of what happened in a run.
Event = tuple[float, str, Words]


def draw(chart: Chart, steps: tuple[int, int], events: list[Event]) -> str:
    """A chart as a figure: title, how to read it, a legend with the last values, the drawing."""
    # The drawing alone is thinned: the tables are made of all points.
    lines = [replace(line, points=thinned(line.points)) for line in chart.lines]
    low, high = _value_range(lines, chart.from_zero)

    # 1. The frame: grid, numbers on both axes.
    drawn = []
    for value in ticks(low, high, 4):
        y = _y(value, low, high)
        drawn.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4}">{tick_name(value)}</text>')
    for step in ticks(*steps, 5):
        # Half a step is none.
        if step == int(step):
            x = _x(step, steps)
            drawn.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{HEIGHT - 6}">{int(step)}</text>')

    # 2. Events under the lines, which they must not hide.
    for step, kind, words in events:
        x = _x(step, steps)
        title = f"<title>{text(words[0])}</title>"
        drawn.append(f'<path class="event {kind}" d="M{x} {TOP}V{HEIGHT - BOTTOM}">{title}</path>')
    drawn += [_line(line, steps, low, high) for line in lines]
    drawn.append(f'<text class="at" y="{TOP + 9}"></text>')
    drawn.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>')

    # 3. Around it: what it is, and each line's value.
    legend = "".join(_legend(line) for line in lines)
    hint = f'<p class="hint">{both(chart.hint)}</p>' if chart.hint[0] else ""
    name = " / ".join(dict.fromkeys(chart.title))
    frame = f'data-low="{steps[0]}" data-high="{steps[1]}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}"'
    return (
        f'<figure class="chart"><figcaption><h3>{both(chart.title)}</h3>{hint}<ul class="legend">{legend}</ul>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(name)}" tabindex="0" {frame}>'
        f"{''.join(drawn)}</svg></figure>\n"
    )


def _line(line: Line, steps: tuple[int, int], low: float, high: float) -> str:
    """One line, its points and error bars where it has them."""
    places = [(_x(step, steps), _y(value, low, high)) for step, value in line.points]
    path = "L".join(f"{x} {y}" for x, y in places)
    drawn = [f'<path class="line c{line.colour} d{line.dash}" d="M{path}"/>']
    if not line.dots:
        return drawn[0]

    for (step, value), (x, y) in zip(line.points, places, strict=True):
        drawn.append(f'<circle class="dot c{line.colour}" cx="{x}" cy="{y}" r="3"/>')
        error = line.errors.get(step)
        if error:
            top, bottom = (_y(value + sign * error, low, high) for sign in (1, -1))
            drawn.append(f'<path class="bar c{line.colour}" d="M{x} {top}V{bottom}"/>')
    return "".join(drawn)


def _legend(line: Line) -> str:
    """A line's colour, label and last value, with all values for the pointer."""
    # The page's script has no other source for them: it must not ask the network.
    values = ";".join(f"{step} {value:.6g}" for step, value in line.points)
    last = line.points[-1][1]
    return (
        f'<li><svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line c{line.colour} d{line.dash}" '
        f'd="M0 4H22"/></svg>{both(line.label)} <b data-points="{values}">{short(last)}</b></li>'
    )


# ---- arithmetic ----
def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points of a line: of each stretch the lowest and the highest, and the last point."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / (most - 2))
    kept = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        # Both extremes of a stretch, so that a spike of one step is not lost between two points.
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _value_range(lines: list[Line], from_zero: bool) -> tuple[float, float]:
    """Lowest and highest value of a chart's axis, with some room; error bars fit in."""
    values = []
    for line in lines:
        for step, value in line.points:
            error = line.errors.get(step, 0.0)
            values += [value - error, value + error]
    low = min(values)
    high = max(values)
    if from_zero and low >= 0:
        low = 0.0
    # A line without any change still needs an axis.
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return []
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= count)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def tick_name(value: float) -> str:
    """A number on an axis."""
    return f"{value:.0e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def _x(step: float, steps: tuple[int, int]) -> float:
    low, high = steps
    # A tenth of a unit is less than a pixel, and every digit costs bytes of the page.
    return round(LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, low: float, high: float) -> float:
    return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)
