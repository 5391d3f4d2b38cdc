"""The parity table: which frameworks were shown to do the same work, before anything is said of who did it better."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.core.comparison import Comparison, Gate, Parity

_TITLES = {
    "tokens": ("Tokens", "The same rows and labels in every step, none on padding"),
    "parameters": ("Parameters", "The same tensors, shapes, dtypes and initial spread are trained"),
    "loss": ("First loss", "The loss before any update"),
    "gradient": ("First gradient", "Its norm before clipping, from the same adapters"),
    "curve": ("Loss curve", "The losses of the first steps"),
    "optimizer": ("Optimizer", "Settings, states, learning rate of every step, clipping"),
}
_TONES = {"PASS": "pass", "FAIL": "fail", "UNVERIFIED": "open"}


@dataclass(frozen=True, slots=True)
class GateView:
    title: str
    word: str
    tone: str
    detail: str
    says: str


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One arm. columns: title and hint of each gate; findings: gates that do not say PASS."""

    arm: str
    made_with: str
    columns: list[tuple[str, str]]
    cells: list[GateView]

    @property
    def findings(self) -> list[GateView]:
        return [cell for cell in self.cells if cell.word != "PASS"]

    @property
    def outcome(self) -> str:
        failed = any(cell.word == "FAIL" for cell in self.cells)
        return "other work, and in no ranking" if failed else "ranked, with doubts"


def view_parity(comparison: Comparison) -> list[ParityRow]:
    """A row for each arm that was looked at; [] where all arms are ours."""
    return [_view_arm(name, parity) for name, parity in comparison.parity.items()]


def _view_arm(name: str, parity: Parity) -> ParityRow:
    version = parity.versions.get(parity.framework, "")
    cells = [
        GateView(_title(g)[0], g.word, _TONES.get(g.word, "open"), show_figure(g), g.says)
        for g in parity.gates
    ]
    return ParityRow(name, f"{parity.framework} {version}".strip(), [_title(g) for g in parity.gates], cells)


def _title(gate: Gate) -> tuple[str, str]:
    return _TITLES.get(gate.name, (gate.name, ""))


def show_figure(gate: Gate) -> str:
    """`812 rows differ`, `2.1%, allowed 0.03%`, or "" where nothing was measured."""
    if gate.figure is None or (gate.unit != "relative" and gate.word == "UNVERIFIED"):
        return ""
    if gate.unit != "relative":
        words = (
            f"1 {gate.unit.removesuffix('s')} differs"
            if gate.figure == 1
            else f"{gate.figure:,.0f} {gate.unit} differ"
        )
        return words if gate.figure else "none differs"
    allowed = "" if gate.tolerance is None else f", allowed {_show_share(gate.tolerance)}"
    return f"{_show_share(gate.figure)}{allowed}"


def _show_share(value: float) -> str:
    """0.021 -> `2.1%`; below a thousandth of a percent `3.1e-6`."""
    if value == 0:
        return "0"
    if value < 1e-5:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{100 * value:.2g}%" if value < 10 else "over 1,000%"
