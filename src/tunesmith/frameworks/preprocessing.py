"""What no framework's own preprocessing can be told, whichever it is (`compare.track: native`)."""

from __future__ import annotations

from tunesmith.frameworks.handoff import RawRows
from tunesmith.frameworks.port import Reason


def can_prepare_rows(raw: RawRows, *, title: str, weighs_answers: bool = False) -> Reason | None:
    """The first thing about the rows that a framework over `datasets` cannot be told.

    weighs_answers: each message can say whether it is trained.
    """
    if raw.kind == "several kinds":
        return Reason("data.train", f"{title} wants all rows of one shape", "Compare one source at a time")
    if raw.extras:
        finding = f"the rows have {raw.extras}, which {title}'s data sets fill up with empty fields"
        return Reason("data.train", finding, "Take these rows out, or compare by tokens")
    if raw.trains == "some answers" and not weighs_answers:
        finding = f"{title} has no weight for a single answer"
        return Reason("data.train", finding, "Leave weights of answers out, or compare by tokens")
    return None
