"""Fine-tune a language model, and know what you gained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["check", "compare", "evaluate", "generate", "job_from", "load_job", "plan", "preview", "train"]

if TYPE_CHECKING:
    from tunesmith.api import check, compare, evaluate, generate, job_from, load_job, plan, preview, train


def __getattr__(name: str) -> Any:
    """Public functions on first use, so that importing one part of the package imports nothing above it."""
    if name in __all__:
        from tunesmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
