"""Text from models and data, made harmless to look at: nothing invisible, nothing that turns the line around."""

from __future__ import annotations

import re

# C0 except tab and newline, DEL, C1; bidirectional controls; zero-width and line separators; tags; variation selectors
# 17 and up; lone surrogates; noncharacters. Joiners U+200C and U+200D stay: Persian and emoji are written with them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\ufffe\uffff\U000e0000-\U000e0fff]"
)


def make_visible(text: str) -> str:
    """Replace control, direction-changing and invisible characters by a sign that shows them.

    ESC becomes `␛`, other C0 controls their picture, the rest its code point: `⟨U+202E⟩`.
    """
    return _HIDDEN.sub(_name_hidden, text)


def _name_hidden(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
