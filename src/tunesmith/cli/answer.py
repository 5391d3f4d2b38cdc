"""`tunesmith answer`: rows to learn from, answered by another model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.core.jsonl import dump_json


def answer(
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="Rows with prompts: file, folder, bundled name or hub id; answers are left out.",
        ),
    ],
    endpoint: Annotated[
        str, typer.Option("--endpoint", metavar="URL", help="Base URL of an API of OpenAI's shape.")
    ],
    model: Annotated[str, typer.Option("--model", help="Model behind it, by its name there.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Rows to write, .jsonl.")],
    system: Annotated[
        str | None, typer.Option("--system", help="System message, for prompts without their own.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer; default: the endpoint's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Of sampling; default: the endpoint's.")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=256, help="Requests at a time.")] = 8,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds that one attempt may take.")
    ] = 120.0,
    key_name: Annotated[
        str, typer.Option("--key-name", metavar="NAME", help="Environment variable that holds the API key.")
    ] = "OPENAI_API_KEY",
    on_bad_row: Annotated[
        Literal["refuse", "skip"], typer.Option("--on-bad-row", help="Stop at a bad row, or skip it.")
    ] = "refuse",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of adding to FILE.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Let a model behind an endpoint answer prompts, and keep rows to train on. Run it again to go on."""
    from tunesmith import api
    from tunesmith.cli.progress import watch

    with watch() as on_event:
        result = api.answer_prompts(
            prompts, endpoint=endpoint, model=model, out=out, system=system, max_tokens=max_tokens,
            temperature=temperature, parallel=parallel, timeout=timeout, key_name=key_name,
            on_bad_row=on_bad_row, fresh=fresh, on_event=on_event,
        )  # fmt: skip
    if as_json:
        print(dump_json(result.to_json()))
        return
    from tunesmith.cli.console import open_console, style_text

    counts = [f"{count:,} {name}" for name, count in result.counts.items() if count or name == "answered"]
    before = f", {result.kept:,} kept from before" if result.kept else ""
    console = open_console()
    console.print(style_text((result.out, "bold"), f": {', '.join(counts)}{before}"))
    if result.answer_tokens:
        asked = f"{result.prompt_tokens:,} tokens asked, {result.answer_tokens:,} answered"
        console.print(style_text(asked))
