"""From a case to what its processes are told: inputs on disk, the reference, and each side's task."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases.cases import NEW_TOKENS, SAMPLES, SHAPES, Case, Shape
from gpu_cases.inputs import StoredRows, hash_step, plan_steps, write_prompts, write_random_rows
from gpu_cases.options import CaseFailed, Options, locked, merge_keys, run_helper, say
from gpu_cases.parity import measure_noise

RANK, ALPHA = 16, 32
BETA = 0.1
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
SEED = 0
# The first step of a round fills the allocator again; it is not timed.
SETTLE = 1
SHORT_LAYERS = 2
# What both sides call to judge answers.
REWARDS, REWARD = Path(__file__).with_name("rewards.py"), "even_tokens"
# Random rows come in whole multiples of so many steps: cases of different lengths share rows, and so a reference.
ROUND_STEPS = 96


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Files of a case, and the rows of each step."""

    folder: Path
    model: Path
    adapter: Path
    short_model: Path
    short_adapter: Path
    rows: Path
    steps: list[list[int]]
    max_tokens: int
    digests: list[str]


def make_inputs(case: Case, options: Options) -> Inputs:
    """Write what is not there yet: weights, adapters, rows. Raises CaseFailed."""
    # Of one process; those that take turns start from the first step every time.
    num_steps = case.warm_up + (options.rounds if case.together else 1) * (SETTLE + case.steps)
    shape = SHAPES[case.shape]
    whole, short = options.folder / f"{case.shape}-whole", options.folder / f"{case.shape}-short"
    with ThreadPoolExecutor() as writers:
        written = [
            writers.submit(_write_weights, folder, wanted, options)
            for folder, wanted in ((short, shape.shortened(SHORT_LAYERS)), (whole, shape))
        ]
        for future in written:
            future.result()
    rows = _find_rows(case, options, num_steps=num_steps, model=whole / "model")
    stored, size = StoredRows(rows), case.rows.per_example
    steps = plan_steps(len(stored) // size, batch_rows=case.batch_rows, seed=SEED)
    if len(steps) < num_steps:
        raise CaseFailed(
            f"{len(stored)} rows are {len(steps)} steps of {case.batch_rows}, {num_steps} are needed"
        )
    steps = [[size * example + at for example in step for at in range(size)] for step in steps[:num_steps]]
    return Inputs(
        folder=options.folder,
        model=whole / "model",
        adapter=whole / "adapter",
        short_model=short / "model",
        short_adapter=short / "adapter",
        rows=rows,
        steps=steps,
        max_tokens=max(len(stored[number][0]) for step in steps for number in step),
        digests=[hash_step([stored[number] for number in step]) for step in steps[: case.warm_up]],
    )


def _write_weights(folder: Path, shape: Shape, options: Options) -> None:
    """A model folder and an adapter folder in `folder`."""
    with locked(folder):
        if (folder / "adapter" / "adapter_config.json").is_file():
            return
        say(f"  writing {folder.name}")
        folder.mkdir(exist_ok=True)
        task = {"out": str(folder), "config": shape.config, "rank": RANK, "alpha": ALPHA}
        run_helper("inputs", task | {"seed": SEED, "device": options.device}, options)


def _find_rows(case: Case, options: Options, *, num_steps: int, model: Path) -> Path:
    """Folder of the case's rows. Random ones are written."""
    if case.rows.kind == "real":
        if options.rows is None or not (options.rows / "prepared.json").is_file():
            raise CaseFailed(f"{case.name} needs --rows, a folder made with --make-rows")
        return options.rows
    vocab_size = SHAPES[case.shape].config["vocab_size"]
    if case.rows.kind in ("pairs", "prompts"):
        # No more than are needed: of pairs the reference is asked before the first step, of each.
        count, kind = case.batch_rows * num_steps, case.rows.kind
        rows = options.folder / f"{kind}-{vocab_size}-{case.rows.tokens}-{count}"
        with locked(rows):
            if kind == "prompts":
                write_prompts(rows, count=count, tokens=case.rows.tokens, model=model, seed=SEED)
            else:
                lengths = [case.rows.tokens] * (2 * count)
                write_random_rows(rows, lengths=lengths, vocab_size=vocab_size, seed=SEED, pairs=True)
        return rows
    num_rows = case.batch_rows * ROUND_STEPS * -(-num_steps // ROUND_STEPS)
    rows = options.folder / f"rows-{vocab_size}-{case.rows.tokens}-{num_rows}"
    with locked(rows):
        write_random_rows(rows, lengths=[case.rows.tokens] * num_rows, vocab_size=vocab_size, seed=SEED)
    return rows


def find_reference(case: Case, inputs: Inputs, options: Options) -> Path:
    """Folder of the gradients that the sides of the case are held to."""
    name = f"reference-{inputs.short_model.parent.name}-{inputs.rows.name}-{case.batch_rows}-{case.method}"
    return options.folder / (name + "-nf4" * _is_four_bit(case, options))


def make_reference(case: Case, inputs: Inputs, options: Options) -> None:
    """Compute the reference, if it is not there yet, and how far plain bf16 code is from it. Raises CaseFailed."""
    folder = find_reference(case, inputs, options)
    with locked(folder):
        folder.mkdir(exist_ok=True)
        if not (folder / "reference.json").is_file():
            say("  reference gradients in fp32")
            task = {"model": str(inputs.short_model), "adapter": str(inputs.short_adapter)}
            task |= {"rows": str(inputs.rows), "step": inputs.steps[0], "method": case.method}
            task |= {"objective": case.objective, "beta": BETA}
            task |= {
                "four_bit": _is_four_bit(case, options),
                "fp8": case.method == "lora" and case.objective == "sft",
                "out": str(folder),
            }
            run_helper("reference", task, options)
        for file in sorted(folder.glob("rounded*.safetensors")):
            measure_noise(folder, file.stem)
    say("  the reference is there")


def _is_four_bit(case: Case, options: Options) -> bool:
    return case.base == "nf4" and not options.plain


# --- tasks ------------------------------------------------------------------------------------------------------------


def make_job(
    case: Case, keys: dict[str, Any], options: Options, *, model: Path, adapter: Path, rows: Path, steps: int
) -> dict[str, Any]:
    """An ordinary job: what a user would write for this case. keys: beyond those that all cases share."""
    method: dict[str, Any] = {"name": case.method}
    if case.method == "lora":
        method = {"name": "lora", "rank": RANK, "alpha": ALPHA, "adapter": str(adapter)}
    job: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(rows)},
        "method": method,
        "train": {
            "steps": steps,
            "batch_rows": case.batch_rows,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0.0,
            "clip_norm": CLIP_NORM,
            "seed": SEED,
            "precision": "bf16" if options.device == "cuda" else "fp32",
            "evaluate_every": "never",
            "save_every": "never",
            "keep_best": False,
        },
    }
    if case.objective == "dpo":
        job["objective"] = {"name": "dpo", "beta": BETA}
    elif case.objective == "grpo":
        # One optimizer step a rollout, as TRL takes it; the rewards are a function of the sampled tokens.
        job["train"]["batch_rows"] = case.batch_rows * SAMPLES
        job["objective"] = {"name": "grpo", "prompts": case.batch_rows, "samples": SAMPLES}
        job["objective"] |= {"max_new_tokens": NEW_TOKENS, "rewards": [f"{REWARDS}:{REWARD}"]}
    return merge_keys(merge_keys(job, keys), options.job)


def make_our_task(
    case: Case, keys: dict[str, Any], inputs: Inputs, options: Options, *, folder: Path
) -> dict[str, Any]:
    """What our process is told. keys: of the job, beyond those that all cases share."""
    return {
        "folder": str(folder),
        "rows": str(inputs.rows),
        "checked_steps": case.warm_up,
        "job": make_job(
            case,
            keys,
            options,
            model=inputs.model,
            adapter=inputs.adapter,
            rows=inputs.rows,
            steps=len(inputs.steps),
        ),
        "short_job": make_job(
            case,
            keys,
            options,
            model=inputs.short_model,
            adapter=inputs.short_adapter,
            rows=inputs.rows,
            steps=1,
        ),
    }


def make_peer_task(
    case: Case, settings: dict[str, Any], inputs: Inputs, options: Options, *, folder: Path
) -> dict[str, Any]:
    """What the peer's process is told."""
    return {
        "folder": str(folder),
        "rows": str(inputs.rows),
        "checked_steps": case.warm_up,
        "model": str(inputs.model),
        "adapter": str(inputs.adapter),
        "short_model": str(inputs.short_model),
        "short_adapter": str(inputs.short_adapter),
        "steps": inputs.steps,
        "max_tokens": inputs.max_tokens,
        "batch_rows": case.batch_rows,
        "method": case.method,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "clip_norm": CLIP_NORM,
        "beta": BETA,
        "samples": SAMPLES,
        "new_tokens": NEW_TOKENS,
        "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "settings": settings,
    }
