"""Train with Unsloth, inside its environment: `python run_unsloth.py unsloth.json`."""

from __future__ import annotations

import sys

from worker import Run, main


def work(run: Run) -> None:
    run.enter("importing")
    import unsloth  # isort: skip - it rewrites what is imported after it
    import datasets
    import frozen
    import hf
    import scripts
    import torch
    import trl

    datasets.disable_progress_bars()
    versions = hf.read_versions("unsloth", "unsloth_zoo", "trl", "peft", "datasets")
    hf.install(run, framework="unsloth", versions=versions)
    settings = run.settings
    run.enter("loading")
    rows = datasets.Dataset.from_list(hf.read_rows(run.handoff["rows"]))
    chosen = settings["model"] | {"dtype": getattr(torch, settings["model"]["dtype"])}
    # More positions would only make room for longer rows.
    chosen["max_seq_length"] = max(map(len, rows["input_ids"]))
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(**chosen)
    run.enter("building")
    if settings["lora"]:
        model = unsloth.FastLanguageModel.get_peft_model(model, **settings["lora"])

    def script() -> None:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**hf.leave_out_unknown(trl.SFTConfig, settings["sft"])),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        frozen.keep_adapters_fp32(run, trainer.model)
        trainer.train()

    scripts.run_until_trained(run, script)


if __name__ == "__main__":
    sys.exit(main(work))
