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
    import raw_rows
    import scripts
    import torch
    import transformers
    import trl
    from unsloth.chat_templates import train_on_responses_only

    datasets.disable_progress_bars()
    versions = hf.read_versions("unsloth", "unsloth_zoo", "trl", "peft", "datasets")
    hf.install(run, framework="unsloth", versions=versions)
    settings = run.settings
    run.enter("loading")
    chosen = settings["model"] | {"dtype": getattr(torch, settings["model"]["dtype"])}
    if raw := run.handoff.get("raw"):
        raw_rows.keep_numbers()
        rows = raw_rows.number_rows(raw["rows"])
        # For more positions than the model has it would stretch them.
        config = transformers.AutoConfig.from_pretrained(run.handoff["model"])
        chosen["max_seq_length"] = min(raw["max_tokens"], config.max_position_embeddings)
    else:
        rows = hf.read_rows(run.handoff["rows"])
        # More positions would only make room for longer rows.
        chosen["max_seq_length"] = max(len(row["input_ids"]) for row in rows)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(**chosen)
    run.enter("building")
    masking = settings.get("masking")
    if masking:
        tokenizer.chat_template = settings["chat_template"]
        for row in rows:
            row["text"] = tokenizer.apply_chat_template(row.pop("messages"), tokenize=False)
    if settings["lora"]:
        model = unsloth.FastLanguageModel.get_peft_model(model, **settings["lora"])

    def script() -> None:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**hf.leave_out_unknown(trl.SFTConfig, settings["sft"])),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        if masking:
            trainer = train_on_responses_only(trainer, **masking)
        frozen.keep_adapters_fp32(run, trainer.model)
        trainer.train()

    scripts.run_until_trained(run, script)


if __name__ == "__main__":
    sys.exit(main(work))
