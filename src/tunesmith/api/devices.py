"""The device and precision that `auto` means on this machine."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import SetupError
from tunesmith.data.prepare import Prepared
from tunesmith.job.spec import Job

if TYPE_CHECKING:
    from tunesmith.models.causal_lm import CausalLM

# Five minutes of a fast card at half its speed: blocks compile in about one, and run a seventh faster.
COMPILE_FROM_FLOPS = 300 * 4e14

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@cache
def pick_device() -> torch.device:
    """The first CUDA GPU, else the CPU; that with one thread, unless OMP_NUM_THREADS says otherwise (decision 004)."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Compute dtype of `train.precision`. Raises SetupError for what the hardware cannot do."""
    if precision == "auto":
        if device.type == "cuda":
            return (
                torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            )
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise SetupError(
            "train.precision",
            "is fp16, and there is no GPU",
            rule="fp16 needs a GPU",
            cure="Use bf16, fp32 or auto",
        )
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise SetupError("train.precision", "is bf16, which this GPU lacks", cure="Use fp16, fp32 or auto")
    return _DTYPES[precision]


@cache
def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-bf16, AMX, or ARM's bf16); emulation is slower than fp32."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """What a run record says of the GPU; threads, for a CPU."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def set_up_segments(model: CausalLM, job: Job, prepared: Prepared, device: torch.device) -> None:
    """How an own decoder is trained on a GPU: by functions of its blocks, compiled where the job repays it."""
    from tunesmith.models.decoder import Decoder
    from tunesmith.models.segments import Segments

    if device.type == "cuda" and isinstance(model, Decoder):
        values = sum(projection.out_features * projection.in_features for projection in model.projections())
        model.segments = Segments(compiled=compiles(job, values, _count_tokens(job, prepared)))
        # Weights that adapters are joined to are laid out anew, each a little larger: what they leave behind fits none.
        for projection in model.projections():
            if projection.has_plain_form:
                projection.tensors()
        torch.cuda.empty_cache()


def records_graphs(model: CausalLM, device: torch.device) -> bool:
    """Whether micro-batches whose shape comes back are recorded as CUDA graphs: of compiled blocks and a plain head,
    where nothing is drawn and all that is trained is adapters. Of other weights passes read copies, which move.

    An adapter that training goes on from brings dropout and tuned tables of its own: the model is asked, not the job.
    """
    from tunesmith.models.decoder import Decoder

    if device.type != "cuda" or not isinstance(model, Decoder) or model.segments is None:
        return False
    is_plain = model.has_plain_form and model.has_plain_head
    projections = list(model.projections())
    adapters = {id(w) for part in projections for _, _, lora in part.loras() for w in (lora.a, lora.b)}
    trains_adapters_only = all(id(weight) in adapters for weight in model.trainable_parameters())
    draws = any(part.dropout for part in projections)
    return model.segments.is_compiled and is_plain and trains_adapters_only and not draws


def compiles(job: Job, num_values: int, num_tokens: float) -> bool:
    """Whether blocks are compiled on a GPU: as the job says, or if training takes so long that it repays.

    num_values: of the blocks' matrices. num_tokens: of all steps.
    """
    if job.train.compile != "auto":
        return job.train.compile
    return 6 * num_values * num_tokens > COMPILE_FROM_FLOPS


def _count_tokens(job: Job, prepared: Prepared) -> float:
    if job.data.streaming:
        return (job.train.steps or 0) * job.train.batch_rows * job.data.max_tokens / 2
    lengths = prepared.examples("train").lengths
    share = job.train.epochs
    if job.train.steps is not None:
        share = job.train.steps * job.train.batch_rows / max(1, len(lengths))
    return share * sum(lengths)
