"""Unsloth as a contender, in a bare loop: no trainer, nothing logged, batches on the GPU before the clock starts.

That is at least as fast as what its users run. Rows of one length go in as a rectangle; with `padding_free`, rows of
different lengths go in end to end with the sequence lengths that Unsloth's own collator would add.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu_cases.protocol import Session, describe_packages, reset_peak

session = Session()
os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")

import unsloth  # noqa: E402, I001  # before torch and transformers, which it changes
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from unsloth import FastLanguageModel  # noqa: E402

from gpu_cases.inputs import TARGETS, StoredRows, hash_step, name_parameter, read_adapter  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
settings: dict[str, Any] = session.task["settings"]
rows = StoredRows(Path(session.task["rows"]))


def load(model_folder: str, adapter_folder: str) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The model with adapters of equal initial weights, and its trained parameters by their common names."""
    checkpointing = settings["checkpointing"]
    model, _ = FastLanguageModel.from_pretrained(
        model_folder,
        max_seq_length=session.task["max_tokens"],
        dtype=getattr(torch, session.task["dtype"]),
        load_in_4bit=settings.get("four_bit", False),
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=session.task["rank"],
        lora_alpha=session.task["alpha"],
        lora_dropout=0,
        bias="none",
        target_modules=list(TARGETS),
        use_gradient_checkpointing=checkpointing,
        random_state=0,
        max_seq_length=session.task["max_tokens"],
    )
    model.train()
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    if settings.get("padding_free") and DEVICE == "cuda":
        # What its collators do before they add sequence lengths; its CPU path has no such kernels.
        from unsloth.utils.packing import _enable_hf_packed_attention, mark_allow_overlength

        mark_allow_overlength(model)
        _enable_hf_packed_attention()
    trained = {name_parameter(name): p for name, p in model.named_parameters() if p.requires_grad}
    tensors = read_adapter(Path(adapter_folder))
    if trained.keys() != tensors.keys():
        raise RuntimeError(f"trained: {sorted(trained)[:3]} ..., in the adapter: {sorted(tensors)[:3]} ...")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    return model, trained


def make_batch(numbers: list[int]) -> dict[str, torch.Tensor]:
    """What the model's forward takes, on the device."""
    taken = [rows[number] for number in numbers]
    ids = [torch.from_numpy(ids).long() for ids, _ in taken]
    labels = [
        torch.where(torch.from_numpy(kept).bool(), i, -100) for i, (_, kept) in zip(ids, taken, strict=True)
    ]
    if settings.get("padding_free"):
        positions = torch.cat([torch.arange(len(i)) for i in ids])[None]
        return {
            "input_ids": torch.cat(ids)[None].to(DEVICE),
            "labels": torch.cat(labels)[None].to(DEVICE),
            "position_ids": positions.to(DEVICE),
            # On the CPU, as its collator leaves them.
            "packed_seq_lengths": torch.tensor([len(i) for i in ids], dtype=torch.int32),
        }
    if len({len(i) for i in ids}) != 1:
        raise RuntimeError("rows of different lengths need padding_free")
    return {"input_ids": torch.stack(ids).to(DEVICE), "labels": torch.stack(labels).to(DEVICE)}


def hash_batch(batch: dict[str, torch.Tensor]) -> str:
    """Digest of the rows that the tensors hold."""
    ids, kept = batch["input_ids"].cpu(), (batch["labels"] != -100).cpu()
    if (lengths := batch.get("packed_seq_lengths")) is not None:
        sizes = lengths.tolist()
        pairs = zip(ids[0].split(sizes), kept[0].split(sizes), strict=True)
    else:
        pairs = zip(ids, kept, strict=True)
    return hash_step([(row.numpy(), mask.numpy()) for row, mask in pairs])


def compute_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the step's target tokens."""
    extra = {"use_cache": False} if settings.get("padding_free") else {}
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=session.task["dtype"] == "bfloat16"):
        return model(attention_mask=None, **batch, **extra).loss


def train() -> None:
    model, trained = load(session.task["model"], session.task["adapter"])
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=session.task["learning_rate"], weight_decay=0.0, fused=DEVICE == "cuda"
    )
    batches = [make_batch(numbers) for numbers in session.task["steps"]]
    counts = [
        {
            "num_tokens": batch["input_ids"].numel(),
            "num_target_tokens": sum(int(rows[number][1].sum()) for number in numbers),
        }
        for batch, numbers in zip(batches, session.task["steps"], strict=True)
    ]
    session.loaded()
    reset_peak()
    for batch, count in zip(batches, counts, strict=True):
        if session.wants_rows:
            session.note_rows(hash_batch(batch))
        # Its caches know a batch by this tensor: a new one every step, as a collator makes.
        given = {
            name: value.clone() if name == "packed_seq_lengths" else value for name, value in batch.items()
        }
        loss = compute_loss(model, given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, session.task["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        session.step_done(loss.detach(), **count)


def gradients(out: Path) -> dict[str, Any]:
    model, trained = load(session.task["short_model"], session.task["short_adapter"])
    batch = make_batch(session.task["steps"][0])
    digest = hash_batch(batch)
    loss = compute_loss(model, batch)
    loss.backward()
    # Copies: the same adapter could be written twice from one storage.
    found = {name: p.grad.float().cpu().clone() for name, p in trained.items() if p.grad is not None}
    save_file(found, str(out))
    return {"loss": float(loss.detach()), "digest": digest}


if __name__ == "__main__":
    session.serve(
        gradients=gradients,
        train=train,
        facts=lambda: (
            describe_packages("unsloth", "unsloth_zoo", "bitsandbytes", "xformers", "trl")
            | {"unsloth_loaded_from": Path(unsloth.__file__).parent.name}
        ),
    )
