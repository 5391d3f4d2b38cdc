"""Optional places to log steps: TensorBoard, Weights & Biases, MLflow. `steps.jsonl` needs none of them.

To add one: a class with `log` and `close`, and a line in `_OPENERS`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tunesmith.core.errors import SetupError
from tunesmith.core.records import StepRecord


class Tracker(Protocol):
    def log(self, record: StepRecord) -> None: ...
    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str], *, run_root: Path, config: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """Open trackers by name. first_step: the run continues after this step (0: it begins).

    Raises SetupError naming the extra to install when a tracker's package is missing.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_OPENERS[name](run_root, config, first_step))
        except ModuleNotFoundError as error:
            for tracker in opened:
                tracker.close()
            raise _missing(name, error.name) from None
    return opened


def check_trackers(names: Sequence[str]) -> None:
    """Raise SetupError, without importing any, if a tracker's package (which has its name) is missing."""
    for name in names:
        if sys.modules.get(name) is None and find_spec(name) is None:
            raise _missing(name, name)


def _missing(tracker: str, package: str | None) -> SetupError:
    return SetupError(
        "train.trackers",
        f"{tracker} needs the package {package!r}, which is not installed",
        cure=f"Run: pip install 'tunesmith[{tracker}]', or take {tracker} out of train.trackers",
    )


def as_scalars(record: StepRecord) -> dict[str, float]:
    """What trackers show of a step, under the names of `steps.jsonl`."""
    scalars = {
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "epoch": record.epoch,
        "tokens_per_second": record.num_tokens / record.step_seconds if record.step_seconds else 0.0,
        "peak_bytes": float(record.peak_bytes),
    }
    if record.validation_loss is not None:
        scalars["validation_loss"] = record.validation_loss
    return scalars | dict(record.measures or {})


def _run_id(run_root: Path) -> str:
    """The same for the same folder, so that a continued run continues its tracker's run."""
    return hashlib.sha256(str(run_root.resolve()).encode()).hexdigest()[:16]


class _TensorBoard:
    def __init__(self, run_root: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the checkpoint were logged by the part of the run that is repeated now.
        self._writer = SummaryWriter(
            str(run_root / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )

    def log(self, record: StepRecord) -> None:
        for name, value in as_scalars(record).items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run_root: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project="tunesmith",
            name=run_root.name,
            dir=str(run_root),
            id=_run_id(run_root),
            resume="allow" if first_step else None,
            config=dict(config),
        )

    def log(self, record: StepRecord) -> None:
        self._run.log(as_scalars(record), step=record.step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run_root: Path, config: Mapping[str, Any], first_step: int) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        tag = _run_id(run_root)
        mlflow.set_experiment("tunesmith")
        earlier = mlflow.search_runs(filter_string=f"tags.tunesmith_run = '{tag}'", output_format="list")
        if first_step and earlier:
            mlflow.start_run(run_id=earlier[0].info.run_id)
        else:
            mlflow.start_run(run_name=run_root.name, tags={"tunesmith_run": tag})
            mlflow.log_params(dict(config))

    def log(self, record: StepRecord) -> None:
        self._mlflow.log_metrics(as_scalars(record), step=record.step)

    def close(self) -> None:
        self._mlflow.end_run()


_OPENERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
