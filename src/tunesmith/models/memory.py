"""What training an own decoder needs of a card's memory and time, worked out from its shapes alone, without torch."""

from __future__ import annotations

from typing import Literal

Level = Literal["keep", "cheap", "recompute", "offload"]
