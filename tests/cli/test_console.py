"""What is printed for people is the text itself: no bracket, place or escape character of it means anything to rich."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.cli.progress import watch
from tunesmith.cli.show import print_previews
from tunesmith.core.events import Event
from tunesmith.data.preview import RowPreview

TEXT = "rows.jsonl:100: [INST] and tunesmith[hub], \\[/bold]"


def test_every_help_text_is_shown_as_it_is_written() -> None:
    command = typer.main.get_command(app)
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
        written = [verb.help, *(parameter.help for parameter in verb.params)]
        for text in filter(None, written):
            assert "".join(text.split()) in "".join(shown.split()), name


def test_square_brackets_and_places_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    segments = ((TEXT, "masked"), ("[/s]\x1b[2J", "stop"))
    print_previews([RowPreview("rows.jsonl:100", "id", 5, 1, segments)])
    shown = capsys.readouterr().out
    assert "rows.jsonl:100 5 tokens" in shown
    assert f"{TEXT}[/s]␛[2J" in shown


@pytest.mark.parametrize("terminal", ["1", ""])
def test_progress_is_printed_as_it_is(
    terminal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with watch() as draw:
        draw(Event("warning", text=f"{TEXT} one"))
        draw(Event("progress", "[x] seed 0", f"{TEXT} two", done=1, total=2))
        draw(Event("failed", "[x] seed 0", f"{TEXT} three"))
    shown = capsys.readouterr().err
    for text in (f"warning: {TEXT} one", f"[x] seed 0: {TEXT} three"):
        assert text in shown
    assert ("✗" in shown) == bool(terminal)
