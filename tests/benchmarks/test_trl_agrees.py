"""The same rows in TRL and in our engine, each as a user would start it: do they compute the same thing?

TRL pads the rows of a step into a rectangle; we lay them end to end. Both in fp32.
"""

from pathlib import Path

import pytest

import cpu_dpo_vs_trl as dpo_bench
import cpu_vs_trl as bench

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.timeout(600)]

Both = tuple[bench.Measured, bench.Measured]
PLAIN = {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return train_both(tmp_path_factory.mktemp("lora"), lora=bench.LORA)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return train_both(tmp_path_factory.mktemp("full"), lora=None)


def train_both(folder: Path, *, lora: dict[str, int] | None) -> Both:
    """(ours, TRL's): the same four steps of eight rows."""
    if not bench.TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    common = bench.Bench(
        what="the bundled model",
        folder=folder,
        model=bench.copy_bundled("tunesmith/tiny", folder),
        data=bench.copy_bundled("tunesmith/tickets", folder),
        steps=4,
        batch_rows=8,
        seed=0,
        threads=1,
        precision="fp32",
        lora=lora,
    )
    ours = bench.train_ours(common, out=folder / "ours")
    bench.write_rows(folder / "ours" / "prepared", common)
    return ours, bench.train_trl(common, "trl", sft=PLAIN, weights="float32")


def test_lora_trains_the_same_tokens_and_parameters(lora):
    bench.check_same_work(lora)


def test_loss_before_the_first_update_is_the_same(lora):
    ours, trl = lora

    assert ours.losses[0] == pytest.approx(trl.losses[0], rel=1e-5)


def test_full_fine_tuning_takes_the_same_steps(full):
    # LoRA draws its first matrices at random; only without it can gradients and updates agree as well.
    ours, trl = full

    bench.check_same_work(full)
    assert ours.grad_norms == pytest.approx(trl.grad_norms, rel=1e-4)
    assert ours.losses == pytest.approx(trl.losses, rel=1e-4)


def test_dpo_begins_at_ln_2_and_goes_on_as_trls(tmp_path):
    if not bench.TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    pairs = dpo_bench.make_bench(tmp_path, steps=6, batch_rows=4, precision="fp32", threads=1, seed=0)

    losses = dpo_bench.check_losses(pairs)

    assert losses["ours"][0] == pytest.approx(0.693147, rel=1e-6)
    assert losses["ours"] == pytest.approx(losses["trl"], rel=dpo_bench.ALLOWED_LOSS)
    assert len({round(loss, 4) for loss in losses["ours"]}) == dpo_bench.PARITY_STEPS
