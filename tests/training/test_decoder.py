"""The loop over the decoder people train: each method, resumed in every bit, on the CPU and (marked) on a GPU."""

import json
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from train_tiny import hash_run, make_rows, make_spec

from tunesmith.core.errors import Interrupted
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.config import load_config
from tunesmith.models.headers import list_expected
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora
from tunesmith.training.loop import TrainOutcome, train

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
METHODS = {
    "full": None,
    "lora": LoraSpec(name="lora", rank=4, dropout=0.1),
    "qlora": LoraSpec(name="qlora", rank=4),
    "int8": LoraSpec(name="lora", base="int8", rank=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of 20,000 weights in an ordinary model folder."""
    root = tmp_path_factory.mktemp("llama")
    (root / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in list_expected(load_config(root)).items():
        is_norm = name.endswith("norm.weight")
        tensors[name] = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def open_model(folder, method, *, device="cpu", dtype=torch.float32):
    lora = METHODS[method]
    if lora is None:
        return load_model(folder, device=device, dtype=dtype, trainable=True)
    model = load_model(folder, device=device, dtype=dtype, base=lora.storage)
    add_lora(model, lora, seed=0)
    return model


def run(folder, root, method, *, stop=0, resume=False, device="cpu", dtype=torch.float32, **spec) -> dict:
    model = open_model(folder, method, device=device, dtype=dtype)

    def ask_to_stop(progress):
        if progress.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    values = {"epochs": 2.0, "save_every": "epoch", "micro_batch_tokens": 24, "learning_rate": 0.003, **spec}
    outcome = train(
        model,
        make_rows(22),
        make_spec(**values),
        RunDir(root).create(),
        make_batch=lambda rows, where: make_batch(rows, device=where),
        loss=sft_loss,
        on_step=ask_to_stop,
        resume=resume,
    )
    return {"outcome": outcome, "model": model, "hash": hash_run(root, model)}


def first_and_last_loss(root) -> tuple[float, float]:
    steps = [json.loads(line)["loss"] for line in RunDir(root).steps.read_text().splitlines()]
    return steps[0], steps[-1]


def check_resume(folder, tmp_path, method, **more):
    whole = run(folder, tmp_path / "whole", method, **more)["hash"]
    with pytest.raises(Interrupted):
        run(folder, tmp_path / "cut", method, stop=4, **more)
    assert run(folder, tmp_path / "cut", method, resume=True, **more)["hash"] == whole


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_exactly(folder, tmp_path, method):
    check_resume(folder, tmp_path, method)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bf16_compute_continues_exactly(folder, tmp_path, method):
    check_resume(folder, tmp_path, method, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_trains_only_its_own_weights(folder, tmp_path, method, dtype):
    before = dict(open_model(folder, method, dtype=dtype).named_parameters())
    done = run(folder, tmp_path, method, epochs=10.0, learning_rate=0.01, dtype=dtype)
    first, last = first_and_last_loss(tmp_path)
    assert last < 0.6 * first
    trained = {id(p) for _, p in done["model"].named_trainable()}
    for name, parameter in done["model"].named_parameters():
        assert torch.equal(parameter, before[name]) is (id(parameter) not in trained), name
    outcome: TrainOutcome = done["outcome"]
    assert outcome.trained_parameters == sum(p.numel() for _, p in done["model"].named_trainable())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_row_per_micro_batch_equals_all_rows_together(folder, tmp_path, method):
    models = {}
    for budget in (1, 4096):
        settings = {"micro_batch_tokens": budget, "epochs": 1.0}
        # Dropout draws per micro-batch: two groupings can't draw the same.
        METHODS["plain lora"] = LoraSpec(name="lora", rank=4)
        name = "plain lora" if method == "lora" else method
        models[budget] = run(folder, tmp_path / str(budget), name, **settings)["model"]
    del METHODS["plain lora"]
    alone, together = (dict(models[budget].named_trainable()) for budget in (1, 4096))
    assert_close(alone, together, rtol=1e-3, atol=1e-4)


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "dtype"), [("full", torch.bfloat16), ("lora", torch.bfloat16), ("qlora", torch.bfloat16)]
)
def test_a_gpu_run_continues_exactly(folder, tmp_path, method, dtype):
    check_resume(folder, tmp_path, method, device="cuda", dtype=dtype)


@pytest.mark.gpu
def test_a_gpu_reaches_the_losses_of_the_cpu(folder, tmp_path):
    for device in ("cpu", "cuda"):
        run(folder, tmp_path / device, "full", device=device)
    on_cpu, on_gpu = (first_and_last_loss(tmp_path / device) for device in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.gpu
def test_fp16_on_a_gpu_learns_with_a_loss_scale(folder, tmp_path):
    run(folder, tmp_path, "full", device="cuda", dtype=torch.float16, epochs=10.0, learning_rate=0.01)
    first, last = first_and_last_loss(tmp_path)
    assert last < 0.6 * first
    newest = sorted(RunDir(tmp_path).checkpoints.iterdir())[-1]
    assert json.loads((newest / "state.json").read_text())["loss_scale"]["value"] > 1


@pytest.mark.gpu
def test_the_host_waits_for_the_gpu_once_a_step(folder):
    from tunesmith.training.optim import LossScale, MasterAdamW
    from tunesmith.training.step import Stepper

    device = torch.device("cuda")
    model = open_model(folder, "lora", device="cuda", dtype=torch.bfloat16).train()
    # Batches are made before: how they reach the device is another matter.
    batches = {len(rows): make_batch(rows, device=device) for rows in (make_rows(1), make_rows(8))}
    stepper = Stepper(
        model,
        MasterAdamW(dict(model.named_trainable())),
        make_batch=lambda rows, where: batches[len(rows)],
        loss=sft_loss,
        device=device,
        budget_tokens=4096,
        clip_norm=1.0,
        scale=LossScale(enabled=False),
    )
    stepper.take(make_rows(8), step=1, learning_rate=0.001)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            stepper.take(make_rows(8), step=2, learning_rate=0.001)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 1, waits


@pytest.mark.gpu
def test_running_out_of_gpu_memory_halves_the_micro_batch(folder, tmp_path):
    model = open_model(folder, "lora", device="cuda", dtype=torch.bfloat16)

    def hungry_loss(model, batch):
        # A real allocation, beyond any card, for micro-batches above 30 tokens.
        if batch.ids_T.numel() > 30:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return sft_loss(model, batch)

    outcome = train(
        model,
        make_rows(22),
        make_spec(epochs=1.0),
        RunDir(tmp_path).create(),
        make_batch=lambda rows, where: make_batch(rows, device=where),
        loss=hungry_loss,
    )
    assert outcome.micro_batch_tokens <= 30
    assert "out of memory, repeated with" in outcome.warnings[0]
    assert outcome.peak_bytes < 1 << 30
