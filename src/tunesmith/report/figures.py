"""Which charts a comparison gets: from its numbers and the trainings' steps to drawn figures with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tunesmith.core.comparison import ArmResult, Comparison, MetricInfo
from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.quantities import format_bytes, format_seconds
from tunesmith.core.records import StepRecord
from tunesmith.core.rundir import RunDir
from tunesmith.report.charts import DotRow, Format, Line, Spot, plot_dots, plot_lines, plot_spots
from tunesmith.report.scales import format_tick

_POINTS = 80
_COSTS: tuple[tuple[str, str, Callable[[ArmResult], float], Format], ...] = (
    ("train_wall_seconds", "Training time of one seed", lambda a: a.train_wall_seconds, format_seconds),
    ("peak_bytes", "Peak memory", lambda a: float(a.peak_bytes), format_bytes),
    ("size_bytes", "Size on disk beside the base", lambda a: float(a.size_bytes), format_bytes),
)


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    caption: str
    chart: Markup


def show_share(value: float) -> str:
    """0.843 -> `84.3%`; whole percents without decimals."""
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{text}%".replace("-", "−")


def _show_metric(info: MetricInfo) -> Format:
    return show_share if info.unit == "%" else format_tick_or_value


def format_tick_or_value(value: float) -> str:
    """Three decimals at most, no trailing zeros."""
    if abs(value) < 1e-3:
        return format_tick(value)
    return f"{value:.3f}".rstrip("0").rstrip(".").replace("-", "−")


def _axis_label(info: MetricInfo, metric: str = "") -> str:
    rows = "held-out pairs" if metric == "preference_accuracy" else "test rows"
    unit = {"%": f"share of {rows}", "nats": "nats per target token", "bits": "bits"}.get(info.unit, "")
    better = "right is better" if info.higher_is_better else "left is better"
    return f"{info.title}{', ' + unit if unit else ''} ({better})"


def draw_quality(comparison: Comparison) -> list[Figure]:
    """The declared metric and the likelihood: intervals and single seeds."""
    names = [comparison.metric] + [name for name in ("nll",) if name != comparison.metric]
    return [_draw_metric(comparison, name) for name in names if name in comparison.metrics]


def _draw_metric(comparison: Comparison, metric: str) -> Figure:
    info, rows = comparison.metrics[metric], list[DotRow]()
    for style, arm in enumerate(comparison.arms):
        if metric in arm.metrics:
            value = arm.metrics[metric]
            rows.append(
                DotRow(
                    arm.name,
                    style,
                    value.value,
                    value.low,
                    value.high,
                    arm.per_seed.get(metric, []),
                    note=arm.not_comparable,
                )
            )
    if info.unit == "%":
        chart = plot_dots(
            rows,
            title=f"{info.title} of every arm",
            x_label=_axis_label(info, metric),
            show=show_share,
            include=(0.0, 1.0),
        )
    else:
        chart = plot_dots(
            rows,
            title=f"{info.title} of every arm",
            x_label=_axis_label(info, metric),
            show=format_tick_or_value,
            log=None,
        )
    declared = "The declared metric" if metric == comparison.metric else "Ranks trained arms only"
    return Figure(info.title, f"{declared}. Mark: mean; bar: 95% interval; rings: single seeds.", chart)


def draw_gain(comparison: Comparison) -> list[Figure]:
    """Gain over the base, and beside it what was forgotten of general text."""
    info, figures = comparison.metrics[comparison.metric], list[Figure]()
    gains = [
        DotRow(arm.name, style, d.delta, d.low, d.high, note=d.verdict)
        for style, arm in enumerate(comparison.arms)
        if (d := arm.differences.get(comparison.metric)) is not None
    ]
    if gains:
        margin = float(comparison.method.get("margin", 0.01))
        chart = plot_dots(
            gains,
            title=f"Gain in {info.title} over the base",
            x_label=f"Difference from {comparison.base} in {info.title}"
            + (", points" if info.unit == "%" else ""),
            show=_show_points if info.unit == "%" else format_tick_or_value,
            include=(0.0,),
            band=(-margin, margin),
        )
        figures.append(
            Figure("Gain", "Difference from the base on the declared metric, with its 95% interval.", chart)
        )
    lost = [
        DotRow(arm.name, style, f["general_nll"] - f["general_nll_base"], note=_say_kl(f))
        for style, arm in enumerate(comparison.arms)
        if arm.prompting == "zero-shot"
        and (f := arm.forgetting)
        and {"general_nll", "general_nll_base"} <= f.keys()
    ]
    if lost:
        chart = plot_dots(
            lost,
            title="Loss on general text after training, minus before",
            x_label="Rise of NLL, nats per token (left is better)",
            show=format_tick_or_value,
            include=(0.0,),
            band=(0.0, 0.0),
        )
        caption = (
            "Rise of the loss on text that has nothing to do with the task. Zero: nothing was forgotten."
        )
        figures.append(Figure("Forgetting", caption, chart))
    return figures


def _show_points(value: float) -> str:
    return f"{100 * value:+.1f}".removesuffix(".0").replace("-", "−").replace("+0", "0")


def _say_kl(forgetting: dict[str, float]) -> str:
    kl = forgetting.get("kl_from_base")
    return "" if kl is None else f"KL from the base on task prompts {kl:.3f} nats per token"


def draw_costs(comparison: Comparison) -> list[Figure]:
    """Quality against time, memory and size; dominated arms faded."""
    info, figures = comparison.metrics[comparison.metric], list[Figure]()
    arms = [
        (style, arm)
        for style, arm in enumerate(comparison.arms)
        if comparison.metric in arm.metrics
        and (comparison.metric != "nll" or arm.kind == "trained")
        and not arm.not_comparable
    ]
    for key, title, read, show in _COSTS:
        if not any(read(arm) for _, arm in arms):
            continue
        spots = [
            Spot(
                label=arm.name,
                style=style,
                x=read(arm),
                y=arm.metrics[comparison.metric].value,
                low=arm.metrics[comparison.metric].low,
                high=arm.metrics[comparison.metric].high,
                faded=key in arm.dominated_by,
                note=f"dominated by {arm.dominated_by[key]}" if key in arm.dominated_by else "",
            )
            for style, arm in arms
        ]
        chart = plot_spots(
            spots,
            title=f"{info.title} against {title}",
            x_label=title,
            y_label=f"{info.title}{' (higher is better)' if info.higher_is_better else ' (lower is better)'}",
            show_x=lambda value, show=show: _shorten_zeros(show(value)) if value else "0",
            show_y=_show_metric(info),
            include_y=(0.0, 1.0) if info.unit == "%" else (),
        )
        figures.append(Figure(title, "", chart))
    return figures


def _shorten_zeros(text: str) -> str:
    """`20.0 s` -> `20 s`, `2.50 MB` -> `2.5 MB`: what an axis says about round values."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".strip()


def draw_curves(run_dir: RunDir, comparison: Comparison) -> list[Figure]:
    """Training loss (mean over seeds) and validation loss (each seed) of every training."""
    training: list[Line] = []
    validation: list[Line] = []
    measured: dict[str, list[Line]] = {name: [] for name in _MEASURED}
    for style, arm in enumerate(comparison.arms):
        if arm.trained_by != arm.name:
            continue
        runs = [steps for seed in arm.seeds if (steps := _read_steps(run_dir.arm(arm.name, seed)))]
        for name, lines in measured.items():
            if runs and all(name in (step.measures or {}) for steps in runs for step in steps):
                lines.append(Line(arm.name, style, thin_curve(runs, measure=name)))
        if arm.objective != "sft":
            # Losses of other objectives are in units of their own.
            continue
        if runs:
            training.append(Line(arm.name, style, thin_curve(runs)))
        for steps in runs:
            points = [(float(s.step), s.validation_loss) for s in steps if s.validation_loss is not None]
            validation.append(Line(arm.name, style, points, marks=len(points) <= 24))
    figures: list[Figure] = []
    for lines, title, caption in (
        (training, "Training loss", "Mean over seeds, averaged over stretches of steps."),
        (
            validation,
            "Validation loss",
            "One line per seed. Chooses checkpoint and learning rate; the test rows do not.",
        ),
    ):
        if any(line.points for line in lines):
            chart = plot_lines(
                lines, title=title, x_label="Optimizer step", y_label=f"{title}, nats per target token"
            )
            figures.append(Figure(title, caption, chart))
    for name, (title, label, caption) in _MEASURED.items():
        if any(line.points for line in measured[name]):
            chart = plot_lines(measured[name], title=title, x_label="Optimizer step", y_label=label)
            figures.append(Figure(title, caption, chart))
    return figures


# What steps of other objectives log: figure's title, axis, caption.
_MEASURED = {
    "reward": ("Reward while training", "Mean reward of sampled answers", "Of answers to training prompts."),
    "margin": (
        "Margin while training",
        "Chosen over rejected",
        "Of training pairs, in the loss's own scale.",
    ),
}


def _read_steps(folder: RunDir) -> list[StepRecord]:
    if not folder.steps.is_file():
        return []
    name = str(folder.steps)
    return [StepRecord.from_json(value, place=f"{name}:{line}") for line, value in read_jsonl(folder.steps)]


def thin_curve(
    runs: Sequence[Sequence[StepRecord]], *, num_points: int = _POINTS, measure: str | None = None
) -> list[tuple[float, float]]:
    """Mean loss over runs and over stretches of steps: (middle step, loss), at most `num_points` of them.

    Weighted by target tokens, so that a stretch's point is the loss per token of that stretch. measure: of `measures`
    instead of the loss, every step alike.
    """
    last = max(step.step for run in runs for step in run)
    size = max(1, -(-last // num_points))
    sums: dict[int, list[float]] = {}
    for run in runs:
        for step in run:
            cell = sums.setdefault((step.step - 1) // size, [0.0, 0.0, 0.0, 0.0])
            weight = 1 if measure else max(step.num_target_tokens, 1)
            value = (step.measures or {})[measure] if measure else step.loss
            for index, part in enumerate((value * weight, weight, step.step, 1)):
                cell[index] += part
    return [(cell[2] / cell[3], cell[0] / cell[1]) for _, cell in sorted(sums.items())]


def draw_trials(comparison: Comparison) -> list[Figure]:
    """Validation loss against learning rate, the chosen one ringed."""
    lines = [
        Line(
            arm.name,
            style,
            [
                (trial.learning_rate, trial.validation_loss)
                for trial in arm.trials
                if trial.validation_loss is not None
            ],
            marks=True,
            chosen=next((trial.learning_rate for trial in arm.trials if trial.chosen), None),
        )
        for style, arm in enumerate(comparison.arms)
        if arm.trials and arm.trained_by == arm.name
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    chart = plot_lines(
        lines,
        title="Validation loss against learning rate",
        x_label="Learning rate",
        y_label="Validation loss, nats per target token",
        log_x=True,
        show_x=_show_rate,
    )
    caption = (
        "Equally many trials per arm around its own starting value; the ring marks the rate that was used."
    )
    return [Figure("Learning-rate trials", caption, chart)]


def _show_rate(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-")
