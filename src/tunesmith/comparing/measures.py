"""The metrics a comparison knows: how each is named, what it is measured in, and how its values are written."""

from __future__ import annotations

from tunesmith.core.comparison import Interval, MetricInfo

MEASURES: dict[str, MetricInfo] = {
    "exact_match": MetricInfo("Exact match", "%", True),
    "token_f1": MetricInfo("Token F1", "%", True),
    "rouge_l": MetricInfo("ROUGE-L", "%", True),
    "json_valid": MetricInfo("Valid JSON", "%", True),
    "json_schema": MetricInfo("JSON schema", "%", True),
    "json_fields": MetricInfo("JSON fields", "%", True),
    "choice_accuracy": MetricInfo("Choice accuracy", "%", True),
    "reward": MetricInfo("Reward", "", True),
    "win_rate": MetricInfo("Win rate", "%", True),
    "preference_accuracy": MetricInfo("Preference accuracy", "%", True),
    "preference_margin": MetricInfo("Preference margin", "nats", True),
    "kl_from_start": MetricInfo("KL from its start", "nats", False),
    "answer_tokens": MetricInfo("Answer length", "tokens", False),
    "finished": MetricInfo("Answers finished", "%", True),
    "nll": MetricInfo("NLL", "nats", False),
    "nll_content": MetricInfo("NLL without the end token", "nats", False),
    "bits_per_byte": MetricInfo("Bits per byte", "bits", False),
    "perplexity": MetricInfo("Perplexity", "", False),
}
"""`nll` is nats per target token, summed over rows and divided once; `perplexity` is its exponential."""


# Neither more nor less of these is better.
NEUTRAL = ("kl_from_start", "answer_tokens")
# Measured against the arm that each starts from: arms with different starts have nothing to compare.
AGAINST_START = ("win_rate", "preference_margin", "kl_from_start")


def describe_metric(name: str) -> MetricInfo:
    """A metric added by a plug-in that is not listed here is a share, higher better."""
    return MEASURES.get(name) or MetricInfo(name.replace("_", " ").capitalize(), "%", True)


def format_value(value: float, info: MetricInfo) -> str:
    """0.8431 -> `84.3%` for a share; three decimals of nats; perplexity with three significant digits, four below 2."""
    if info.unit == "%":
        return f"{100 * value:.1f}%"
    if info.unit in ("nats", "bits"):
        return f"{value:.3f}"
    if info.unit == "tokens":
        return f"{value:,.1f}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 2 else f"{value:#.3g}"


def format_bounds(interval: Interval, info: MetricInfo) -> str:
    """`81.0–87.2`, or "" without bounds."""
    if interval.low is None or interval.high is None:
        return ""
    low, high = (format_value(bound, info).rstrip("%") for bound in (interval.low, interval.high))
    return f"{low}–{high}"


def format_difference(delta: float, info: MetricInfo) -> str:
    """`+12.3 points`, `−0.041 nats`; with a real minus sign."""
    sign = "−" if delta < 0 else "+"
    if info.unit == "%":
        return f"{sign}{100 * abs(delta):.1f} points"
    return f"{sign}{abs(delta):.3f} {info.unit}".rstrip()


def format_gap(delta: float, info: MetricInfo) -> str:
    """The size of a difference without its sign: `12.3 points`."""
    return format_difference(abs(delta), info)[1:]
