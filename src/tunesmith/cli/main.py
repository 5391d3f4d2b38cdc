"""The command line: one verb a function, each a thin layer over `tunesmith.api`.

Nothing heavy is imported before a verb runs, so `--help` and bad job files answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tunesmith.cli import frameworks
from tunesmith.cli.answer import answer
from tunesmith.core.errors import JobError, TunesmithError
from tunesmith.core.jsonl import dump_json

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune a language model, and know what you gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its markup would swallow what stands in square brackets
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(frameworks.app, name="frameworks")

# Without naming click: recent versions of typer carry their own.
_UsageError: Any = typer.BadParameter.__base__

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML). `tunesmith init` writes one.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job, e.g. train.epochs=1."),
]
OutDir = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for everything the command writes.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
OnBadRow = Annotated[
    Literal["refuse", "skip"],
    typer.Option("--on-bad-row", help="Stop at a bad row, or skip it; a folder given by --out keeps it."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming what DIR holds.")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("job.yaml"),
    model: Annotated[str | None, typer.Option(help="Base model: bundled name, folder or hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training rows: bundled name, file, folder or hub id.")
    ] = None,
) -> None:
    """Write a commented job file, and the schema that gives editors completion."""
    from tunesmith.job.init import write_example_job

    write_example_job(path, model=model, data=data)
    _say(f"Wrote {path}. Next: tunesmith check {path}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Configuration of another framework (YAML).")],
    framework: Annotated[
        Literal["axolotl", "llamafactory", "trl", "unsloth"] | None,
        typer.Option("--from", help="Whose it is; told by its keys if left out."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="JOB", help="Job file to write.")] = Path("job.yaml"),
    as_json: AsJson = False,
) -> None:
    """Make a job file from a configuration of Axolotl, LLaMA-Factory, TRL or Unsloth."""
    from tunesmith.job.importing.engine import import_configuration
    from tunesmith.job.importing.write import write_job

    made = import_configuration(file, framework=framework, out=out)
    if made.job is not None:
        write_job(made, out)
    if as_json:
        _print_json({**made.to_json(), "job_file": str(out) if made.job is not None else None})
    else:
        from tunesmith.cli.show_import import print_import

        print_import(made)
    if made.job is None:
        _say(f"error: {file}: no job can be made; {'; '.join(made.failures)}")
        raise typer.Exit(1)
    if count := len(made.not_supported):
        _say(f"warning: {file}: {count} not supported; {out} says what stands in their place")
    _say(f"Wrote {out}. Next: tunesmith check {out}")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference page instead.")] = False,
    imports: Annotated[
        bool, typer.Option("--imports", help="The page on `tunesmith import` instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of the job file."""
    if imports:
        from tunesmith.job.importing.reference import import_reference

        print(import_reference(), end="")
        return
    from tunesmith.job.schema import job_reference, job_schema

    print(job_reference() if markdown else dump_json(job_schema(), indent=2), end="" if markdown else "\n")


@app.command()
def check(
    job_file: JobFile,
    overrides: Overrides = [],  # noqa: B006
    on_bad_row: OnBadRow = "refuse",
    as_json: AsJson = False,
) -> None:
    """Look at the data before training: counts, lengths, what is lost, duplicates, leaks, masks."""
    from tunesmith import api
    from tunesmith.cli import show

    report = api.check(api.load_job(job_file, overrides), on_bad_row=on_bad_row)
    if as_json:
        _print_json(report.to_json())
    else:
        show.print_check(report)
    raise typer.Exit(2 if report.errors else 0)


@app.command()
def preview(
    job_file: JobFile,
    rows: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 3,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which split.")] = "train",
    overrides: Overrides = [],  # noqa: B006
    on_bad_row: OnBadRow = "refuse",
    as_json: AsJson = False,
) -> None:
    """Print rows as they are trained: trained, masked and stop tokens in colour."""
    from tunesmith import api
    from tunesmith.cli import show

    job = api.load_job(job_file, overrides)
    previews = api.preview(job, rows=rows, split=split, on_bad_row=on_bad_row)
    if as_json:
        _print_json([dataclasses.asdict(item) for item in previews])
    else:
        show.print_previews(previews)


@app.command()
def plan(
    job_file: JobFile,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Load the model and take two micro-steps to correct the job's row."),
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="Plan for a card that is not here: h200, a100, rtx4090 ...")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="24GiB", help="Memory of that card.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    on_bad_row: OnBadRow = "refuse",
    as_json: AsJson = False,
) -> None:
    """Predict peak memory and time of each method without training."""
    from tunesmith import api
    from tunesmith.cli import show
    from tunesmith.cli.progress import watch

    job = api.load_job(job_file, overrides)
    with watch() as on_event:
        planned = api.plan(
            job, probe=probe, device=device, memory=memory, on_bad_row=on_bad_row, on_event=on_event
        )
    if as_json:
        _print_json(planned.to_json())
    else:
        show.print_plan(planned)


@app.command()
def train(
    job_file: JobFile,
    out: OutDir,
    overrides: Overrides = [],  # noqa: B006
    on_bad_row: OnBadRow = "refuse",
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Train one model. Run the same command again to resume after an interruption."""
    from tunesmith import api
    from tunesmith.cli.progress import watch

    job = api.load_job(job_file, overrides)
    with watch() as on_event:
        record = api.train(job, out=out, on_bad_row=on_bad_row, fresh=fresh, on_event=on_event)
    if as_json:
        _print_json(record.to_json())
    else:
        from tunesmith.cli import show

        show.print_run(record, out)


@app.command("eval")
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, adapter folder, model folder or name.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to score: file, folder, bundled name or hub id.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Chosen and rejected answers instead, also for reward models."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B", help="Tasks of lm-eval instead, by name or YAML file."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep what was scored here.")
    ] = None,
    generate: Annotated[bool, typer.Option(help="Also generate answers and score them.")] = True,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Score only the first rows.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template, name or file, if the model has none.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model of an adapter, if not the one it names.")
    ] = None,
    on_bad_row: OnBadRow = "refuse",
    as_json: AsJson = False,
) -> None:
    """Score any model, adapter or run on rows with answers, on pairs, or on tasks of lm-eval (extra lm-eval)."""
    from tunesmith import api
    from tunesmith.cli.progress import watch

    if sum(given is not None for given in (data, pairs, tasks)) != 1:
        raise JobError(
            "eval", "takes --data, --pairs or --tasks, one of them", cure="See: tunesmith eval --help"
        )
    if pairs is not None:
        if not generate:
            raise JobError("eval --pairs", "takes no --no-generate", rule="that is for --data")
        with watch() as on_event:
            found = api.evaluate_pairs(
                target, pairs=pairs, out=out, max_rows=max_rows, template=template, base=base,
                on_bad_row=on_bad_row, on_event=on_event,
            )  # fmt: skip
        if as_json:
            _print_json(found)
        else:
            from tunesmith.cli import show

            show.print_pair_evaluation(found)
        return
    if tasks is not None:
        if not generate or on_bad_row != "refuse":
            raise JobError(
                "eval --tasks", "takes neither --no-generate nor --on-bad-row", rule="those are for --data"
            )
        # Results own stdout; lm-eval prints what it likes.
        with watch() as on_event, contextlib.redirect_stdout(sys.stderr):
            scores = api.evaluate_tasks(
                target,
                tasks.split(","),
                out=out,
                max_rows=max_rows,
                template=template,
                base=base,
                on_event=on_event,
            )
        if as_json:
            _print_json(scores)
        else:
            for task, metrics in scores["tasks"].items():
                print("\n".join(f"{task}  {name}  {value:.4g}" for name, value in metrics.items()))
        return
    assert data is not None
    with watch() as on_event:
        record = api.evaluate(
            target, data=data, out=out, generate=generate, max_rows=max_rows, template=template, base=base,
            on_bad_row=on_bad_row, on_event=on_event,
        )  # fmt: skip
    if as_json:
        _print_json(api.evaluation_json(record))
    else:
        from tunesmith.cli import show

        show.print_evaluation(record)


@app.command()
def compare(
    job_file: JobFile,
    out: OutDir,
    overrides: Overrides = [],  # noqa: B006
    on_bad_row: OnBadRow = "refuse",
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Run every arm on the same rows, judge them alike, and write the report. Resumes where it stopped."""
    from tunesmith import api
    from tunesmith.cli.progress import watch

    job = api.load_job(job_file, overrides)
    with watch() as on_event:
        comparison = api.compare(job, out=out, on_bad_row=on_bad_row, fresh=fresh, on_event=on_event)
    _print_comparison(comparison, out, as_json)


@app.command()
def demo(
    out: OutDir = Path("demo-run"),
    align: Annotated[
        bool, typer.Option("--align", help="Compare SFT with DPO, PPO and GRPO after it.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="How many; default: 3, with --align 1.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Compare prompting, retrieval and fine-tuning on the bundled model and data, offline, in minutes."""
    from tunesmith import api
    from tunesmith.cli.progress import watch

    job = api.demo_job(overrides, about="alignment" if align else "methods", seeds=seeds)
    with watch() as on_event:
        comparison = api.compare(job, out=out, fresh=fresh, on_event=on_event)
    _print_comparison(comparison, out, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a comparison.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rebuild the report of a comparison from its files."""
    from tunesmith import api

    comparison = api.report(run)
    if markdown:
        print(api.report_markdown(comparison))
    else:
        _print_comparison(comparison, run, as_json)


app.command()(answer)


def _print_comparison(comparison: Any, out: Path, as_json: bool) -> None:
    if as_json:
        from tunesmith import api

        _print_json(api.comparison_json(comparison, out))
    else:
        from tunesmith.cli import show

        show.print_comparison(comparison, out)
    if any(arm.status != "done" for arm in comparison.arms):
        raise typer.Exit(1)


def _print_json(value: Any) -> None:
    print(dump_json(value))


def _say(text: str) -> None:
    from tunesmith.report.visible import make_visible

    print(make_visible(text), file=sys.stderr)


def main() -> None:
    """Entry point: faults of the user's making end in one line and their exit code, never in a traceback.

    Ctrl-C and a closed pipe are typer's: exit codes 130 and 1.
    """
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:  # closed by the caller: `>&-`
            sys.stdout.flush()
        sys.exit(code)
    except _UsageError as error:  # typer itself would draw a frame of five lines
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _say(f"error: {' '.join(error.format_message().split())} See: tunesmith --help")
        sys.exit(error.exit_code)
    except TunesmithError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None:
            raise
        # Python would try to write what is left once more as it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            sys.exit(1)
        _say(f"error: stdout: {(error.strerror or str(error)).lower()}. Send the output elsewhere")
        sys.exit(2)


if __name__ == "__main__":
    main()
