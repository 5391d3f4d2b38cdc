"""Train with Axolotl's `train`, inside its environment: `python run_axolotl.py axolotl.json`."""

from __future__ import annotations

import sys
import tempfile

from worker import Failure, Run, main


def work(run: Run) -> None:
    run.enter("importing")
    import datasets
    import hf
    import scripts
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from axolotl.utils.dict import DictDefault

    datasets.disable_progress_bars()
    hf.install(run, framework="axolotl", versions=hf.read_versions("axolotl", "trl", "peft", "datasets"))
    handoff, arguments = run.handoff, run.settings["arguments"]
    if handoff["device"] == "cpu" and handoff["precision"] != "fp32":
        raise Failure(f"has no {handoff['precision']} on a CPU; set train.precision: fp32")
    if handoff["lora"] is None and handoff["precision"] != "fp32":
        raise Failure(
            f"would keep trained weights in {handoff['precision']}, ours are fp32; set train.precision: fp32"
        )
    run.enter("loading")
    scripts.write_rows(run)
    tempfile.tempdir = handoff["scratch"]  # it writes down its configuration, and leaves it
    config = load_cfg(DictDefault(arguments))
    for name, wanted in arguments.items():
        # Its checks change some settings and leave out what they do not know.
        if name != "datasets" and (config[name] or None) != (wanted or None):
            raise Failure(f"makes {name} {config[name]} of {wanted}")
    if (passes := handoff["batch_rows"] // handoff["micro_rows"]) > 1:
        run.warn(
            f"Axolotl averages the means of a step's {passes} forward passes, whatever their number of target tokens: "
            f"another loss than the job's, unless train.micro_batch_tokens holds {handoff['batch_rows']} rows"
        )
    run.enter("building")
    rows = load_datasets(cfg=config)
    if arguments["warmup_steps"] is None:
        rows.total_num_steps = None  # as of a data set that is streamed: then it obeys a share
    scripts.run_until_trained(run, lambda: train(cfg=config, dataset_meta=rows))


if __name__ == "__main__":
    sys.exit(main(work))
