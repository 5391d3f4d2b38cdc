"""The one way the cli writes through rich: a text is printed as it is, and its style stands beside it, never inside it.

rich reads `[harness]` as markup and `rows.jsonl:100:` as an emoji, so both are off, for help texts too (`main.app`).
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from tunesmith.report.visible import make_visible


def open_console(*, stderr: bool = False) -> Console:
    """Standard output or error as a console without markup, emoji names and guessed colours."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def style_text(*parts: str | tuple[str, str]) -> Text:
    """Parts joined, each a text or (text, style); what could drive the terminal is made visible."""
    return Text.assemble(
        *(make_visible(p) if isinstance(p, str) else (make_visible(p[0]), p[1]) for p in parts)
    )
