"""Train with LLaMA-Factory's `run_exp`, inside its environment: `python run_llamafactory.py llamafactory.json`."""

from __future__ import annotations

import sys

from worker import Run, main


def work(run: Run) -> None:
    run.enter("importing")
    import datasets
    import hf
    import scripts
    from llamafactory.train.tuner import run_exp

    datasets.disable_progress_bars()
    hf.install(
        run, framework="llamafactory", versions=hf.read_versions("llamafactory", "trl", "peft", "datasets")
    )
    run.enter("loading")
    scripts.link_base(run, dtype=run.settings["weights"], chat_template=run.settings.get("chat_template"))
    if run.handoff.get("raw"):
        scripts.write_raw_file(run)
    else:
        scripts.write_rows(run)
    # It checks, reads and loads in one call.
    run.enter("building")
    scripts.run_until_trained(run, lambda: run_exp(run.settings["arguments"]))


if __name__ == "__main__":
    sys.exit(main(work))
