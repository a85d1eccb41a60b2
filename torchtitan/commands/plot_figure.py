"""The drawing of `torchtitan plot`, by matplotlib. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from torchtitan.commands.plot import Curve, Curves, Floats
from torchtitan.utils.files import replace_file

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which people with any colour vision tell apart, without yellow and black. On
black they come in reverse, the brightest first."""
_DASHES = ("-", "--", ":", "-.")
_TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Throughput, tokens/s per device",
    "memory_peak_gib": "Peak memory, GiB",
    "validation/loss": "Validation loss",
    "tflops": "TFLOP/s per device",
}
_UNITS = {"_seconds": "s", "_gib": "GiB", "_fraction": "fraction", "_per_second": "1/s"}
_FROM_ZERO = ("tokens_per_second", "memory_peak_gib", "tflops")
_NEVER_SMOOTH = (
    "lr",
    "num_",
    "memory_",
    "run_seconds",
    "validation/",
    "evaluation/",
    "time_share/",
)
_BINS = 1500
"""A line has two points in each: more than a chart has pixels."""
_FEW = 50
"""So many points of a validation or evaluation are dots."""
_TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Look:
    """Style of the curves: colours, smoothing, axes."""

    by: str
    """`steps`, `tokens` or `time`."""
    smooth: float
    """A weight below 1, or a number of steps."""
    log: bool
    dark: bool


def draw(runs: Sequence[Curves], metrics: Sequence[str], look: Look, output: Path) -> None:
    """Write the charts of `metrics` to `output`, in the format of its name. Raises OSError."""
    grid = {"axes.grid": True, "grid.alpha": 0.3}
    style: list[Any] = [
        "default",
        *["dark_background"] * look.dark,
        {"svg.fonttype": "none", "text.parse_math": False, **grid},
    ]
    with matplotlib.style.context(style):
        figure = _figure(runs, metrics, look)
        with replace_file(output) as file:
            figure.savefig(file, format=output.suffix[1:].lower(), dpi=150)


def smoothed(curve: Curve, smooth: float) -> Floats:
    """Return the curve's moving mean, `[points]`; NaN stays NaN and counts nowhere.

    Below 1, `smooth` is the weight of the past, as TensorBoard's; otherwise the mean is over the
    records of the last `smooth` steps.
    """
    known = np.isfinite(curve.y)
    y, steps = curve.y[known], curve.steps[known]
    result = np.full_like(curve.y, np.nan)
    if smooth >= 1:
        total = np.concatenate([[0.0], np.cumsum(y)])
        first = np.searchsorted(steps, steps - smooth, side="right")
        last = np.arange(len(y)) + 1
        result[known] = (total[last] - total[first]) / (last - first)
        return result
    means, mean, weight = [], 0.0, 0.0
    for value in y.tolist():
        mean = smooth * mean + (1 - smooth) * value
        weight = smooth * weight + 1 - smooth
        means.append(mean / weight)
    result[known] = means
    return result


def thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the lowest and the highest point of each of many short stretches, in order."""
    length = math.ceil(len(y) / _BINS)
    if length <= 2:
        return x, y
    starts = np.arange(0, len(y), length)
    padded = np.concatenate([y, np.full(-len(y) % length, np.nan)]).reshape(-1, length)
    lowest = np.where(np.isnan(padded), np.inf, padded).argmin(1) + starts
    highest = np.where(np.isnan(padded), -np.inf, padded).argmax(1) + starts
    kept = np.unique([*lowest, *highest, 0, len(y) - 1])
    return x[kept], y[kept]


def short(number: float, _: object = None) -> str:
    """Return a number as a tick shows it: `0.0003`, `2,000`, `20K`, `1.5M`, `3B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= max(size, 1e4):
            return f"{number / size:g}{unit}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:g}"


class _ShortLogFormatter(LogFormatter):
    """Labels the ticks that LogFormatter labels, without exponents."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label, empty where there is no room."""
        return short(x) if super().__call__(x, pos) else ""


def _figure(runs: Sequence[Curves], metrics: Sequence[str], look: Look) -> Figure:
    columns = 1 if len(metrics) == 1 else 2 if len(metrics) in (2, 4) else 3
    rows = math.ceil(len(metrics) / columns)
    width, height = (7.0, 4.0) if len(metrics) == 1 else (4.4, 2.7)
    figure = Figure((width * columns + 0.4, height * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    size, label = _scale_of_x(runs, metrics, look.by)
    charts = list(chain.from_iterable(grid))
    for chart, metric in zip(charts, metrics):
        _draw_chart(chart, metric, runs, look, size)
    for chart in charts[len(metrics) :]:
        chart.remove()
    figure.supxlabel(label, fontsize="medium")
    shown = [run.name for run in runs]
    if len(runs) == 1:
        figure.suptitle(shown[0], fontsize="large", fontweight="bold")
        return figure
    lines = [Line2D([], [], label=n, **_line(i, look.dark)) for i, n in enumerate(shown)]
    room = int(figure.get_figwidth() * 10 / (max(map(len, shown)) + 6))
    columns = max(1, min(4, len(runs), room))
    figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil(len(runs) / columns - 1))
    figure.legend(handles=lines, loc="outside upper center", ncols=columns)
    return figure


def _scale_of_x(runs: Sequence[Curves], metrics: Sequence[str], by: str) -> tuple[float, str]:
    """Return the size of the unit of the horizontal axis, and its label."""
    if by != "time":
        return 1.0, by
    curves = (run.by_metric.get(metric) for run in runs for metric in metrics)
    longest = max(curve.x[-1] for curve in curves if curve is not None)
    size, unit = next((entry for entry in _TIMES if longest >= 2 * entry[0]), _TIMES[-1])
    return size, f"time of the run, {unit}"


def _draw_chart(chart: Axes, metric: str, runs: Sequence[Curves], look: Look, size: float) -> None:
    chart.set_title(_title(metric), loc="left", fontsize="medium")
    is_measure = metric.startswith(("validation/", "evaluation/"))
    smooth = 0.0 if metric.startswith(_NEVER_SMOOTH) else look.smooth
    has_validation = False
    for index, run in enumerate(runs):
        curve, line = run.by_metric.get(metric), _line(index, look.dark)
        if curve is not None:
            x, alpha = curve.x / size, 0.25 if smooth else 1.0
            _plot(chart, x, curve.y, dots=is_measure, alpha=alpha, **line)
            if smooth:
                _plot(chart, x, smoothed(curve, smooth), **line)
        points = run.by_metric.get("validation/loss") if metric == "loss" else None
        if points is not None:
            has_validation = True
            _dots(chart, *thinned(points.x / size, points.y), line["color"])
    if has_validation:
        _explain_dots(chart)
    _set_axes(chart, metric, look)


def _plot(chart: Axes, x: Floats, y: Floats, dots: bool = False, **line: Any) -> None:
    """Draw a line with gaps where values are unknown; a value between gaps is a dot."""
    x, y = thinned(x, y)
    known = np.concatenate([[False], np.isfinite(y), [False]])
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    marked = np.flatnonzero(known[1:-1] if dots and len(y) <= _FEW else alone).tolist()
    width = 1.4 if len(y) < 10 * _FEW else 0.9
    chart.plot(x, y, marker="o", markersize=3.5, markevery=marked, linewidth=width, **line)


def _dots(chart: Axes, x: Floats, y: Floats, color: str) -> None:
    few = len(y) <= _FEW
    edge = chart.get_facecolor() if few else "none"
    size = 5 if few else 2
    chart.plot(x, y, "o", markersize=size, markeredgecolor=edge, zorder=3, color=color)


def _explain_dots(chart: Axes) -> None:
    color = "0.5"
    chart.legend(
        handles=[
            Line2D([], [], color=color, label="training"),
            Line2D([], [], color=color, marker="o", linestyle="", label="validation"),
        ],
        fontsize="small",
    )


def _set_axes(chart: Axes, metric: str, look: Look) -> None:
    chart.xaxis.set_tick_params(labelbottom=True)
    integer = look.by == "steps"
    chart.xaxis.set_major_locator(MaxNLocator(6, integer=integer, min_n_ticks=1 if integer else 2))
    chart.xaxis.set_major_formatter(FuncFormatter(short))
    lines = (line.get_ydata() for line in chart.get_lines())
    if look.log and _has_scale(metric) and any((np.asarray(line) > 0).any() for line in lines):
        chart.set_yscale("log")
        chart.yaxis.set_major_formatter(_ShortLogFormatter())
        chart.yaxis.set_minor_formatter(_ShortLogFormatter())
        return
    chart.yaxis.set_major_formatter(FuncFormatter(short))
    if metric in _FROM_ZERO:
        chart.set_ylim(0, chart.dataLim.y1 * 1.08 or 1)


def _has_scale(metric: str) -> bool:
    """Return True for what a log scale suits: losses, perplexities and norms."""
    return metric.rpartition("/")[2] in ("loss", "cross_entropy", "perplexity", "grad_norm")


def _title(metric: str) -> str:
    """Return the metric's title with its unit."""
    if metric in _TITLES:
        return _TITLES[metric]
    if metric.startswith("validation/") and metric.endswith("/loss"):
        return f"Validation loss of {metric.split('/', 1)[1].removesuffix('/loss')}"
    unit = next((unit for end, unit in _UNITS.items() if metric.endswith(end)), "")
    return metric + (f", {unit}" if unit else "")


def _line(index: int, dark: bool) -> dict[str, Any]:
    """Return the colour and dashes of a run's line: dashes from the eighth run on."""
    colors = _COLORS[::-1] if dark else _COLORS
    dashes = _DASHES[index // len(colors) % len(_DASHES)]
    return {"color": colors[index % len(colors)], "linestyle": dashes}
