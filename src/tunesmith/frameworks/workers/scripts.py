"""For frameworks that are run by a script of their own: what it reads, what it made of it, and where it ends.

A worker's module, like hf.py.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import raw_rows
import transformers
from hf import read_rows
from worker import Failure, Run

TEMPLATE = "chat_template.jinja"


class Trained(BaseException):
    """The training is over and what was asked for is left. What the script would do next (save again, plot, publish)
    is left out; nothing of a framework's catches this."""


def run_until_trained(run: Run, script) -> None:
    """Call `script`, which makes a `Trainer` and calls its `train`; after `hf.install`.

    Raises Failure if its trainer has other settings than the job, or if it never trained.
    """
    watched = transformers.Trainer.train

    @functools.wraps(watched)
    def train(trainer, *args, **kwargs):
        check_settings(trainer, run.settings["expected"])
        if trainer.args.device.type != run.handoff["device"]:
            raise Failure(f"trains on {trainer.args.device}, and was handed {run.handoff['device']}")
        watched(trainer, *args, **kwargs)
        raise Trained

    transformers.Trainer.train = train
    try:
        script()
    except Trained:
        return
    raise Failure("ended without training")


def check_settings(trainer, expected: dict) -> None:
    """Refuse what the framework altered. Raises Failure with the first setting that is not the job's."""
    for name, wanted in expected["arguments"].items():
        found = getattr(trainer.args, name)
        found = getattr(found, "value", found)  # of an enumeration
        if name == "warmup_steps":  # may be a share of all
            found = trainer.args.get_warmup_steps(trainer.args.max_steps)
        if (found or None) != (wanted or None):
            raise Failure(f"makes {name} {found} of {wanted}")
    if expected["lora"]:
        config = trainer.model.peft_config["default"]
        for name, wanted in expected["lora"].items():
            found = getattr(config, name)
            if isinstance(found, set):
                found, wanted = sorted(found), sorted(wanted)
            if (found or None) != (wanted or None):
                raise Failure(f"makes the adapters' {name} {found} of {wanted}")
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and str(parameter.dtype) != "torch.float32":
            raise Failure(f"trains {name} in {parameter.dtype}, where our engine keeps fp32")


def write_rows(run: Run) -> None:
    """The rows as a folder of `datasets`, in the scratch folder: tokenised, or raw and numbered."""
    import datasets

    folder = f"{run.handoff['scratch']}/rows"
    if raw := run.handoff.get("raw"):
        raw_rows.keep_numbers()
        rows = raw_rows.number_rows(raw["rows"], train_field=run.settings["train_field"])
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        return
    rows = read_rows(run.handoff["rows"])
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
    datasets.Dataset.from_dict(columns).save_to_disk(folder)


def write_raw_file(run: Run) -> None:
    """Raw rows, numbered, as the file that the settings name."""
    raw_rows.keep_numbers()
    rows = raw_rows.number_rows(run.handoff["raw"]["rows"])
    path = Path(run.handoff["scratch"]) / run.settings["raw_file"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def link_base(run: Run, *, dtype: str, chat_template: str | None = None) -> None:
    """The base in the scratch folder: links to its files, beside a config.json that names `dtype`, and a chat template
    if one is given."""
    folder = Path(run.handoff["scratch"]) / "base"
    folder.mkdir()
    ours = {"config.json"} | ({TEMPLATE} if chat_template is not None else set())
    for path in Path(run.handoff["model"]).iterdir():
        if path.is_file() and path.name not in ours:
            os.symlink(path.resolve(), folder / path.name)
    if chat_template is not None:
        (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    config = json.loads((Path(run.handoff["model"]) / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"dtype": dtype, "torch_dtype": dtype}), encoding="utf-8"
    )
