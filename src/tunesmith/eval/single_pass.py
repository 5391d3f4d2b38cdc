"""Likelihood and answer from one reading of each prompt.

A row is run once, prompt and true answer together, with its keys and values kept. That gives the likelihood, and what
the model would say at every place of the true answer: as long as that is the true token, greedy decoding goes the same
way. Decoding begins where the two part, so an answer that is right costs no step of its own. This is speculative
decoding (Leviathan et al. 2023, arXiv:2211.17192) with the true answer as the draft: it decides which tokens are
checked in one go, never which are chosen. `score_rows` and `generate` are the definition, and tests compare with them.

n: sequences  K: target tokens  D: width
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from tunesmith.core.types import TokenRow
from tunesmith.eval.nll import RowScore, choose_budget, cut_prefix, plan_batches, read_logits, sum_row
from tunesmith.eval.shared_prefix import find_shared_prefix
from tunesmith.infer.generate import Generation, Opened, continue_all
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.cache import Session
from tunesmith.models.decoder import Decoder
from tunesmith.models.layout import make_batch


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt with its true answer behind it: the targets of `row` from `prompt_length` on, to the last one."""

    row: TokenRow
    prompt_length: int

    @property
    def draft(self) -> list[int]:
        """The tokens of the true answer."""
        end = len(self.row.mask) - list(reversed(self.row.mask)).index(1)
        return list(self.row.ids[self.prompt_length : end])


@torch.no_grad()
def score_and_answer(
    model: Decoder,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: SamplingSpec,
    keys: Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[RowScore], list[Generation]]:
    """What `score_rows` gives for the rows, with `stop_ids` as end tokens, and `generate` for the prompts.

    Sampled answers are decoded from the prompt's end on; they only share its reading.
    """
    rows = [item.row for item in asked]
    room = [min(max_new_tokens, model.config.max_positions - item.prompt_length) for item in asked]
    prefix = find_shared_prefix(model, rows)
    cut = 0 if prefix is None else prefix.length
    scores: dict[int, RowScore] = {}

    def open_rows() -> Iterator[Opened]:
        for numbers in plan_batches(
            [len(row.ids) - cut for row in rows], budget_tokens=choose_budget(prefix)
        ):
            batch = make_batch([cut_prefix(rows[number], cut) for number in numbers], device=model.device)
            session = Session(model, batch.split_ids(), prefix=prefix)
            hidden_KD = session.prefill(batch.sources_K)
            nll_K, likeliest_K = read_logits(model, hidden_KD, batch.targets_K)
            nats, likeliest, at = nll_K.tolist(), likeliest_K.tolist(), 0
            places_n, lengths, outputs = [], [], []
            for number in numbers:
                end, draft = at + rows[number].num_targets, asked[number].draft
                scores[number] = sum_row(rows[number], nats[at:end], stop_ids)
                first, most = end - len(draft), 0 if sampling.temperature else room[number] - 1
                agreed = count_agreed(likeliest[first:end], draft, stop_ids=stop_ids, most=most)
                places_n.append(first + agreed)
                lengths.append(asked[number].prompt_length - cut + agreed)
                outputs.append(draft[:agreed])
                at = end
            session.rewind(lengths)
            yield Opened(session, numbers, lengths, outputs, hidden_KD[places_n])

    generations = continue_all(
        model,
        open_rows(),
        room=room,
        stop_ids=stop_ids,
        sampling=sampling,
        on_progress=on_progress,
        keys=keys,
    )
    return [scores[number] for number in range(len(asked))], generations


def count_agreed(
    likeliest: Sequence[int], draft: Sequence[int], *, stop_ids: Collection[int], most: int
) -> int:
    """How many tokens of the draft greedy decoding repeats, at most `most`, and short of a stop and of the last token:
    what comes after these is chosen from a hidden state at hand.

        likeliest 5 7 9, draft 5 7 8  ->  2
    """
    for place, (chosen, given) in enumerate(zip(likeliest, draft, strict=True)):
        if place >= most or chosen != given or given in stop_ids:
            return place
    return len(draft) - 1
