import importlib.util

import pytest
from train_tiny import make_spec, run_tiny

from tunesmith.core.errors import SetupError
from tunesmith.core.records import StepRecord
from tunesmith.training.trackers import as_scalars, open_trackers


def missing(name):
    return importlib.util.find_spec(name) is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, name):
    if not missing(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        SetupError, match=rf"train.trackers: {name} needs .*pip install 'tunesmith\[{name}\]'"
    ) as caught:
        run_tiny(tmp_path, make_spec(steps=1, trackers=[name]))
    assert caught.value.exit_code == 2


def test_no_tracker_needs_no_package(tmp_path):
    assert open_trackers([], run_root=tmp_path, config={}, first_step=0) == []


def test_trackers_show_the_log_under_the_same_names():
    record = StepRecord(3, 0.5, 1.25, 2.0, 0.1, 100, 40, 0.5, 1000, validation_loss=1.5)
    scalars = as_scalars(record)
    assert scalars["tokens_per_second"] == 200.0
    assert scalars["loss"] == 1.25
    assert scalars["validation_loss"] == 1.5


@pytest.mark.skipif(missing("tensorboard"), reason="needs tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tiny(tmp_path, make_spec(steps=3, trackers=["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
