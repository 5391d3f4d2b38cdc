"""Inline SVG charts without scripts or inline styles; colours come from the page's classes `s0`, `s1`, ... per arm.

Charts are narrow in their own units, so that their text stays readable on a phone, and carry numbers as tooltips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from tunesmith.report.scales import Scale, fit_scale, format_tick
from tunesmith.report.visible import make_visible

WIDTH = 400
DOTS_WIDTH = 430
Format = Callable[[float], str]

# Marks differ in shape as well as in colour; paths are drawn around (0, 0), about 10 units across.
MARKS = (
    "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "M0,-5L5,4H-5Z",
    "M0,5L5,-4H-5Z",
    "M-5,-1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",
    "M-5,0L-2.5,-4.4H2.5L5,0L2.5,4.4H-2.5Z",
    "M0,-5.6L1.5,-1.8L5.4,-1.7L2.3,0.8L3.4,4.6L0,2.4L-3.4,4.6L-2.3,0.8L-5.4,-1.7L-1.5,-1.8Z",
)


@dataclass(frozen=True, slots=True)
class DotRow:
    """One arm in a dot plot: a value with its interval, and the values of single seeds."""

    label: str
    style: int
    value: float
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. marks: draw every point; the last point is always marked and labelled."""

    label: str
    style: int
    points: Sequence[tuple[float, float]]
    marks: bool = False
    chosen: float | None = None


@dataclass(frozen=True, slots=True)
class Spot:
    """One arm in a scatter plot. faded: dominated."""

    label: str
    style: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    faded: bool = False
    note: str = ""


def draw_mark(style: int) -> Markup:
    """The mark of one arm by itself, for legends and chips."""
    shape = MARKS[style % len(MARKS)]
    return Markup(
        '<svg class="key s{}" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{}"/></svg>'
    ).format(style, shape)


def plot_dots(
    rows: Sequence[DotRow],
    *,
    title: str,
    x_label: str,
    show: Format,
    log: bool | None = False,
    include: Sequence[float] = (),
    band: tuple[float, float] | None = None,
) -> Markup:
    """Rows of intervals: a bar from low to high, a mark at the value, a small ring for each seed.

    band: a shaded range (the margin within which a difference does not matter).
    """
    left = _label_room([row.label for row in rows])
    height, top = 34 * len(rows) + 52, 8
    bottom = height - 44
    values = [v for row in rows for v in (row.value, row.low, row.high, *row.seeds) if v is not None]
    scale = fit_scale(values, left, DOTS_WIDTH - 24, log=log, include=include)
    parts = [_vertical_grid(scale, top, bottom, x_label, show)]
    if band is not None:
        x0, x1 = scale.place(band[0]), scale.place(band[1])
        parts.append(
            f'<rect class="band" x="{x0:.1f}" y="{top}" width="{max(x1 - x0, 1):.1f}" height="{bottom - top}"/>'
        )
        zero = scale.place(0)
        parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{top}" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        parts.append(_draw_dot_row(row, top + 34 * number + 17, scale, left, show))
    return _frame(title, height, parts, width=DOTS_WIDTH)


def _draw_dot_row(row: DotRow, y: float, scale: Scale, left: float, show: Format) -> str:
    tip = f"{row.label}: {show(row.value)}"
    if row.low is not None and row.high is not None:
        tip += f", 95% interval {show(row.low)} to {show(row.high)}"
    if len(row.seeds) > 1:
        tip += f"; seeds {', '.join(show(seed) for seed in row.seeds)}"
    tip += f"; {row.note}" if row.note else ""
    parts = [f'<g class="s{row.style}"><title>{_text(tip)}</title>']
    parts.append(f'<rect class="hit" x="0" y="{y - 17:.1f}" width="{DOTS_WIDTH}" height="34"/>')
    parts.append(
        f'<text class="name" x="{left - 12:.1f}" y="{y + 4:.1f}" text-anchor="end">{_text(row.label)}</text>'
    )
    if row.low is not None and row.high is not None:
        x0, x1 = scale.place(row.low), scale.place(row.high)
        parts.append(f'<line class="interval" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for seed in row.seeds if len(row.seeds) > 1 else ():
        parts.append(f'<circle class="seed" cx="{scale.place(seed):.1f}" cy="{y + 9:.1f}" r="2.6"/>')
    parts.append(_mark(row.style, scale.place(row.value), y))
    return "".join(parts) + "</g>"


def plot_lines(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_x: Format = format_tick,
    show_y: Format = format_tick,
    log_x: bool | None = False,
    log_y: bool | None = None,
    height: int = 300,
) -> Markup:
    """Curves over a shared x axis. A logarithmic y axis is chosen when values span more than a factor of 8."""
    every = [point for line in lines for point in line.points]
    top, bottom, left, right = 30, height - 44, 46, WIDTH - 20
    x_scale = fit_scale([x for x, _ in every], left, right, log=log_x, pad=0.02)
    y_scale = fit_scale([y for _, y in every], bottom, top, log=log_y)
    parts = [
        _vertical_grid(x_scale, top, bottom, x_label, show_x, lines=False),
        _horizontal_grid(y_scale, left, right, y_label, show_y),
    ]
    for line in lines:
        if not line.points:
            continue
        path = "L".join(f"{x_scale.place(x):.1f},{y_scale.place(y):.1f}" for x, y in line.points)
        last = line.points[-1]
        tip = f"{line.label}: ends at {show_y(last[1])}"
        parts.append(f'<g class="s{line.style}"><title>{_text(tip)}</title><path class="curve" d="M{path}"/>')
        for x, y in line.points if line.marks else ():
            chosen = " chosen" if x == line.chosen else ""
            spot = _mark(line.style, x_scale.place(x), y_scale.place(y), extra=chosen)
            parts.append(f"<g><title>{_text(f'{line.label}: {show_y(y)} at {show_x(x)}')}</title>{spot}</g>")
        parts.append("</g>")
    return _frame(title, height, parts)


def plot_spots(
    spots: Sequence[Spot],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_x: Format,
    show_y: Format,
    include_y: Sequence[float] = (),
    height: int = 300,
) -> Markup:
    """Quality against a cost, both with units. Faded arms are dominated: another is better and cheaper."""
    top, bottom, left, right = 30, height - 44, 46, WIDTH - 24
    xs = [spot.x for spot in spots]
    x_scale = fit_scale(
        xs, left, right, include=(0.0,) if min(xs) <= 0.5 * max(xs) else (), num_ticks=4, pad=0.06
    )
    ys = [v for spot in spots for v in (spot.y, spot.low, spot.high) if v is not None]
    y_scale = fit_scale(ys, bottom, top, include=include_y)
    parts = [
        _vertical_grid(x_scale, top, bottom, x_label, show_x),
        _horizontal_grid(y_scale, left, right, y_label, show_y),
    ]
    places = [(x_scale.place(spot.x), y_scale.place(spot.y)) for spot in spots]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for spot, (x, y), label in zip(spots, places, _share_labels(spots, places), strict=True):
        tip = f"{spot.label}: {show_y(spot.y)} at {show_x(spot.x)}{'; ' + spot.note if spot.note else ''}"
        parts.append(f'<g class="s{spot.style}{" faded" if spot.faded else ""}"><title>{_text(tip)}</title>')
        if spot.low is not None and spot.high is not None:
            y0, y1 = y_scale.place(spot.low), y_scale.place(spot.high)
            parts.append(
                f'<line class="interval thin" x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/>'
            )
        parts.append(_mark(spot.style, x, y))
        if label:
            label_x, label_y = _find_room(7.4 * len(label), x, y, taken, (left, top, WIDTH, bottom))
            parts.append(f'<text class="name" x="{label_x:.1f}" y="{label_y:.1f}">{_text(label)}</text>')
        parts.append("</g>")
    return _frame(title, height, parts)


def _share_labels(spots: Sequence[Spot], places: Sequence[tuple[float, float]]) -> list[str]:
    """What stands beside each mark. Marks on one another (arms that do the same work) share the first one's label,
    `lora and 4 more`; the others have none."""
    leaders: dict[int, int] = {}
    for number, (x, y) in enumerate(places):
        on = (n for n in leaders if abs(places[n][0] - x) < 5 and abs(places[n][1] - y) < 5)
        leader = next(on, number)
        leaders[leader] = leaders.get(leader, -1) + 1
    labels = [""] * len(spots)
    for leader, more in leaders.items():
        labels[leader] = spots[leader].label + (f" and {more} more" if more else "")
    return labels


Box = tuple[float, float, float, float]


def _find_room(width: float, x: float, y: float, taken: list[Box], inside: Box) -> tuple[float, float]:
    """Where a label of this width starts, beside its mark and on no other mark or label; adds it to `taken`.

    Right, left, above, below, then farther up and down; boxes are (left, top, right, bottom).
    """
    right, left, middle = x + 10, x - 10 - width, x - width / 2
    beside = [(right, y + 4), (left, y + 4), (middle, y - 10), (middle, y + 19)]
    steps = (14, -14, 28, -28, 42, -42, 56, -56, 70, -70, 84, -84)
    beside += [(start, y + 4 + step) for step in steps for start in (right, left, middle)]

    def boxed(spot: tuple[float, float]) -> Box:
        return (spot[0], spot[1] - 10, spot[0] + width, spot[1] + 2)

    def is_free(box: Box) -> bool:
        fits = box[0] >= inside[0] and box[1] >= inside[1] - 8 and box[2] <= inside[2] and box[3] <= inside[3]
        return fits and not any(
            box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
        )

    chosen = next((spot for spot in beside if is_free(boxed(spot))), beside[0])
    taken.append(boxed(chosen))
    return chosen


def _mark(style: int, x: float, y: float, *, extra: str = "") -> str:
    shape = MARKS[style % len(MARKS)]
    return f'<path class="mark{extra}" transform="translate({x:.1f},{y:.1f})" d="{shape}"/>'


def _vertical_grid(
    scale: Scale, top: float, bottom: float, label: str, show: Format, *, lines: bool = True
) -> str:
    parts: list[str] = []
    for tick in scale.ticks:
        x = scale.place(tick)
        if lines:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{_text(show(tick))}</text>'
        )
    parts.append(f'<line class="axis" x1="{scale.start}" x2="{scale.stop}" y1="{bottom}" y2="{bottom}"/>')
    middle = (scale.start + scale.stop) / 2
    parts.append(
        f'<text class="label" x="{middle:.1f}" y="{bottom + 37}" text-anchor="middle">{_text(label)}</text>'
    )
    return "".join(parts)


def _horizontal_grid(scale: Scale, left: float, right: float, label: str, show: Format) -> str:
    # The axis is named above it, where it can be read without turning the head.
    parts = [f'<text class="label" x="0" y="14">{_text(label)}</text>']
    for tick in scale.ticks:
        y = scale.place(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_text(show(tick))}</text>'
        )
    return "".join(parts)


def _label_room(labels: Sequence[str]) -> float:
    """Width for row labels, in units; 7.4 per letter at the page's 13-unit text."""
    return min(190.0, 26 + 7.4 * max((len(label) for label in labels), default=4))


def _frame(title: str, height: int, parts: Sequence[str], *, width: int = WIDTH) -> Markup:
    body = "".join(parts)
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">'
    # Every text in `parts` went through `_text`.
    return Markup(f"{head}{body}</svg>")  # noqa: S704


def _text(text: str) -> str:
    """Escaped for text and for attributes in double quotes."""
    return str(escape(make_visible(text)))
