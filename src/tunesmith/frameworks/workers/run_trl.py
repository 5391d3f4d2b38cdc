"""Train with TRL's `SFTTrainer`, inside TRL's environment: `python run_trl.py trl.json`."""

from __future__ import annotations

import sys

from worker import Run, main


def work(run: Run) -> None:
    run.enter("importing")
    import datasets
    import frozen
    import hf
    import peft
    import raw_rows
    import torch
    import transformers
    import trl

    datasets.disable_progress_bars()
    hf.install(run, framework="trl", versions=hf.read_versions("trl", "peft", "datasets"))
    handoff, settings = run.handoff, run.settings
    run.enter("loading")
    chosen = {"dtype": getattr(torch, settings["weights"]), "attn_implementation": "sdpa"}
    if settings["quantization"]:
        chosen["quantization_config"] = transformers.BitsAndBytesConfig(**settings["quantization"])
        chosen["device_map"] = {
            "": 0 if handoff["device"] == "cuda" else "cpu"
        }  # accelerate asks for a number
    model = transformers.AutoModelForCausalLM.from_pretrained(handoff["model"], **chosen)
    if raw := handoff.get("raw"):
        rows = raw_rows.number_rows(raw["rows"], splits_answer=settings["splits_answer"])
    else:
        rows = hf.read_rows(handoff["rows"])
    run.enter("building")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**hf.leave_out_unknown(trl.SFTConfig, settings["sft"])),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(handoff["model"]),
        peft_config=peft.LoraConfig(**settings["lora"]) if settings["lora"] else None,
    )
    frozen.keep_adapters_fp32(run, trainer.model)
    trainer.train()


if __name__ == "__main__":
    sys.exit(main(work))
