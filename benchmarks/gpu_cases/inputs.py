"""What both sides of a case read: model folder, adapter folder, training rows. Made once, seeded, same files for all.

    python -m gpu_cases.inputs task.json     task: {"out", "config", "rank", "alpha", "device", "seed"}

A folder is finished when its last file is there; a finished one is left alone.

T: tokens of all rows  V: vocabulary
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.fingerprint import hash_row, hash_rows
from tunesmith.data.batch import plan_epoch

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Shards are drawn and written side by side: small enough for many, and the largest matrix fills one.
SHARD_BYTES = 1 << 30
WRITERS = 8
# Ids 0, 1 and 2 are the tokenizer's special ones; random text has none of them.
NUM_SPECIAL = 3


# --- rows -------------------------------------------------------------------------------------------------------------


def write_random_rows(
    folder: Path, *, lengths: Sequence[int], vocab_size: int, seed: int, pairs: bool = False
) -> None:
    """A folder of prepared rows, as our engine reads them: random ids, all but the first of a row trained.

    pairs: row 2p + 1 begins with the first half of row 2p, its prompt, and only what follows is trained.
    """
    if (folder / "prepared.json").is_file():
        return
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids_T = np.random.default_rng(seed).integers(NUM_SPECIAL, vocab_size, offsets[-1], dtype=np.int32)
    mask_T = np.ones(len(ids_T), dtype=np.uint8)
    mask_T[offsets[:-1]] = 0
    for start, end in pairwise(offsets.tolist()[::2]) if pairs else ():
        middle, half = (start + end) // 2, (end - start) // 4
        ids_T[middle : middle + half] = ids_T[start : start + half]
        mask_T[start : start + half] = mask_T[middle : middle + half] = 0
    save_file({"ids": ids_T, "mask": mask_T, "offsets": offsets}, str(folder / "train.safetensors"))
    row_ids = [
        hash_row(ids_T[start:end].tolist(), mask_T[start:end].tobytes())
        for start, end in pairwise(offsets.tolist())
    ]
    facts = [
        {"place": f"random:{number}", "source": "random", "index": number, "row_id": row_id, "bytes": 0}
        | {"cluster": row_id, "conversation": number}
        for number, row_id in enumerate(row_ids)
    ]
    (folder / "train.rows.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    index = {"schema": 1, "splits": ["train"], "fingerprints": {"train_sha256": hash_rows(row_ids)}}
    index |= {"rows": "pairs"} if pairs else {}
    (folder / "prepared.json").write_text(json.dumps(index))


def write_prompts(folder: Path, *, count: int, tokens: int, model: Path, seed: int) -> None:
    """A folder of prepared prompts, as our engine reads them: random letters, of which the tokenizer in `model` makes a
    token each. `prompts.json` in it holds their texts, for peers."""
    if (folder / "prompts.json").is_file():
        return
    from tunesmith.data.prepare import prepare_data
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.job.load import job_from

    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz "), (count, tokens))
    texts = ["".join(row) for row in letters]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    split = {"validation": 0.0, "test": 0.0}
    job = job_from({"model": str(model), "data": {"train": str(source), "split": split}})
    prepare_data(job, tokenizer=load_tokenizer(model), folder=folder, rows="prompts")
    if len(StoredRows(folder)) != count:
        raise ValueError(f"{count} prompts became {len(StoredRows(folder))}")
    (folder / "prompts.json").write_text(json.dumps(texts))


def render_rows(data: Path, tokenizer: Path, folder: Path, *, template: str, max_tokens: int) -> int:
    """Render real rows with a real tokenizer into `folder`; texts stay behind. Returns their number."""
    from tunesmith.data.prepare import prepare_data
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.job.load import job_from

    job = job_from(
        {
            "model": str(tokenizer),
            "data": {
                "train": str(data),
                "split": {"validation": 0.0, "test": 0.0},
                "template": template,
                "max_tokens": max_tokens,
            },
        }
    )
    made = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(made, ignore_errors=True)
    prepare_data(job, tokenizer=load_tokenizer(tokenizer), folder=made)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.safetensors", "train.rows.jsonl", "prepared.json"):
        shutil.move(made / name, folder / name)
    shutil.rmtree(made)
    return len(StoredRows(folder))


class StoredRows:
    """Rows of a prepared folder, without our package's classes: peers read them, too."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        arrays = load_file(str(folder / "train.safetensors"))
        self._ids, self._mask, self._offsets = arrays["ids"], arrays["mask"], arrays["offsets"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of a row, int32 and uint8."""
        span = slice(int(self._offsets[number]), int(self._offsets[number + 1]))
        return self._ids[span], self._mask[span]


def plan_steps(num_rows: int, *, batch_rows: int, seed: int) -> list[list[int]]:
    """Row numbers of each whole step of the first epoch, as our engine orders them."""
    return [
        step
        for step in plan_epoch(num_rows, batch_rows=batch_rows, seed=seed, epoch=0)
        if len(step) == batch_rows
    ]


def hash_step(rows: Sequence[tuple[Any, Any]]) -> str:
    """SHA-256 over the (ids, kept mask) of a step's rows, in any order: what a contender really fed its model.

    The first token of a row is never a target, whatever a side's labels say there.
    """
    hashes: list[bytes] = []
    for ids, kept in rows:
        mask = np.array(kept, dtype=np.uint8)
        mask[0] = 0
        hashes.append(hashlib.sha256(np.asarray(ids, dtype=np.int32).tobytes() + mask.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


# --- weights ----------------------------------------------------------------------------------------------------------


def list_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama or Qwen2 checkpoint."""
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = width // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * size
    outputs = {"q_proj": width, "k_proj": kv, "v_proj": kv}
    yield "model.embed_tokens.weight", (vocab, width)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows in outputs.items():
            yield f"{layer}.self_attn.{name}.weight", (rows, width)
            if config["model_type"] == "qwen2":
                yield f"{layer}.self_attn.{name}.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (width, width)
        yield f"{layer}.mlp.gate_proj.weight", (inner, width)
        yield f"{layer}.mlp.up_proj.weight", (inner, width)
        yield f"{layer}.mlp.down_proj.weight", (width, inner)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, width)


def write_model(folder: Path, config: dict[str, Any], *, seed: int, device: str) -> None:
    """A Hugging Face model folder: random bf16 weights, a small tokenizer. config.json comes last."""
    if (folder / "config.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards = _plan_shards(config)

    def write(number: int) -> None:
        _write_shard(folder / _name_shard(number), shards[number - 1], seed=seed, device=device)

    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(write, range(1, len(shards) + 1)))
    where = {name: _name_shard(number) for number, shard in enumerate(shards, 1) for name, _ in shard}
    total = 2 * sum(math.prod(shape) for shard in shards for _, shape in shard)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    extra = {"torch_dtype": "bfloat16", "hidden_act": "silu", "initializer_range": 0.02, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(config | ids | extra, indent=1))


def _plan_shards(config: dict[str, Any]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of each file's tensors."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in list_tensors(config):
        num_bytes = 2 * math.prod(shape)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    return shards


def _write_shard(
    file: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], *, seed: int, device: str
) -> None:
    import torch
    from safetensors.torch import save_file

    shard: dict[str, Any] = {}
    for name, shape in tensors:
        tensor = _draw(name, shape, seed=seed, device=device, std=0.02)
        if name.endswith("norm.weight"):
            tensor = 1 + tensor
        shard[name] = tensor.to(torch.bfloat16).cpu()
    save_file(shard, str(file), {"format": "pt"})


def _name_shard(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _draw(name: str, shape: tuple[int, ...], *, seed: int, device: str, std: float) -> Any:
    """Normal random numbers that follow from (seed, name) on one kind of device."""
    import torch

    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(device).manual_seed(key)
    return torch.randn(shape, generator=generator, device=device).mul_(std)


def _write_tokenizer(folder: Path) -> None:
    """Bytes and three special tokens. Nothing is tokenised here, but every loader wants a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.save_pretrained(str(folder))


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    *,
    rank: int,
    alpha: int,
    seed: int,
    device: str,
    deviation_b: float = 1e-3,
) -> None:
    """A LoRA adapter on all linear layers, in PEFT's format. Unless B is zero, A has a gradient, too."""
    from safetensors.torch import save_file

    if (folder / "adapter_config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    for name, shape in list_tensors(config):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in TARGETS or name == module:
            continue
        outputs, inputs = shape
        drawn = {
            "lora_A": _draw(module + "A", (rank, inputs), seed=seed, device=device, std=inputs**-0.5),
            "lora_B": _draw(module + "B", (outputs, rank), seed=seed, device=device, std=deviation_b),
        }
        for part, tensor in drawn.items():
            tensors[f"base_model.model.{module}.{part}.weight"] = tensor.cpu()
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha}
    described |= {"lora_dropout": 0.0, "bias": "none", "target_modules": list(TARGETS)}
    described |= {"inference_mode": False, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1))


def read_adapter(folder: Path) -> dict[str, Any]:
    """The adapter's tensors by the names that all contenders use: `model.layers.0.mlp.up_proj.lora_A.weight`."""
    from safetensors.torch import load_file

    tensors = load_file(str(folder / "adapter_model.safetensors"))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def name_parameter(name: str) -> str:
    """The common name of a parameter of a transformers model, with or without PEFT around it."""
    return name.removeprefix("base_model.model.").replace(".default.weight", ".weight")


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(task["out"])
    write_model(out / "model", task["config"], seed=task["seed"], device=task["device"])
    write_adapter(
        out / "adapter",
        task["config"],
        rank=task["rank"],
        alpha=task["alpha"],
        seed=task["seed"],
        device=task["device"],
    )


if __name__ == "__main__":
    main()
