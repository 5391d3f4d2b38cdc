"""Likelihood: values worked by hand on a bigram table, and independence from batching on a real decoder."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.errors import ArmFailed
from tunesmith.core.types import Origin, TokenRow
from tunesmith.eval.nll import plan_batches, score_rows, summarize_scores
from tunesmith.eval.shared_prefix import count_shared
from tunesmith.models.layout import Layout


class BigramTable(nn.Module):
    """A language model in which the next token depends on the last one alone: logits are rows of a table."""

    def __init__(self, table_VV: Tensor) -> None:
        super().__init__()
        self.table_VV = table_VV
        self.config = SimpleNamespace(vocab_size=len(table_VV))
        self.device = torch.device("cpu")

    def hidden(self, ids_T: Tensor, layout: Layout, keep_K: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids_T[keep_K], len(self.table_VV)).float()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table_VV


def make_row(ids: list[int], mask: list[int], *, num_bytes: int = 0) -> TokenRow:
    return TokenRow(ids, mask, Origin("rows.jsonl:1", "rows.jsonl", 0), "", num_bytes)


# After token 0 the next is 1 with probability 1/2 and 0, 2 with 1/4 each; after 1: all 1/3; after 2: always e : 1 : 1.
TABLE = torch.tensor([[math.log(1 / 4), math.log(1 / 2), math.log(1 / 4)], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])


def test_the_sum_is_over_target_tokens_and_each_is_predicted_from_the_token_before():
    # targets: 1 after 0 (1/2), 2 after 1 (1/3)
    score = score_rows(BigramTable(TABLE), [make_row([2, 0, 1, 2], [0, 0, 1, 1], num_bytes=3)])[0]
    assert score.nll == pytest.approx(math.log(2) + math.log(3))
    assert (score.num_target_tokens, score.num_bytes) == (2, 3)


def test_content_likelihood_leaves_out_the_end_token_only():
    row = make_row([0, 1, 2], [0, 1, 1])
    score = score_rows(BigramTable(TABLE), [row], end_ids=[2])[0]
    assert score.nll == pytest.approx(math.log(2) + math.log(3))
    assert score.nll_content == pytest.approx(math.log(2))
    assert (score.num_target_tokens, score.num_content_tokens) == (2, 1)


def test_means_are_weighted_by_tokens_not_by_rows():
    rows = [make_row([0, 1], [0, 1], num_bytes=1), make_row([1, 1, 1, 1], [0, 1, 1, 1], num_bytes=3)]
    summary = summarize_scores(score_rows(BigramTable(TABLE), rows))
    nats = math.log(2) + 3 * math.log(3)
    assert summary["nll"] == pytest.approx(nats / 4)
    assert summary["perplexity"] == pytest.approx(math.exp(nats / 4))
    assert summary["bits_per_byte"] == pytest.approx(nats / math.log(2) / 4)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    summary = summarize_scores(score_rows(BigramTable(torch.zeros(7, 7)), [make_row([3, 5, 6], [0, 1, 1])]))
    assert summary["perplexity"] == pytest.approx(7.0)


def test_a_likelihood_that_is_not_finite_stops_and_names_the_row():
    table = TABLE.clone()
    table[0, 1] = math.nan
    with pytest.raises(ArmFailed, match=r"rows\.jsonl:1: its likelihood is not finite"):
        score_rows(BigramTable(table), [make_row([0, 1], [0, 1])])


def test_batches_hold_neighbours_in_length_within_the_budget():
    assert plan_batches([5, 1, 4, 2, 90], budget_tokens=7) == [[1, 3, 2], [0], [4]]
    assert plan_batches([], budget_tokens=7) == []


def test_rows_without_targets_score_zero():
    score = score_rows(BigramTable(TABLE), [make_row([0, 1], [0, 0])])[0]
    assert (score.nll, score.num_target_tokens) == (0.0, 0)
    assert summarize_scores([score]) == {}


def make_random_rows(count: int, *, vocab_size: int, seed: int = 0) -> list[TokenRow]:
    draw = torch.Generator().manual_seed(seed)
    rows: list[TokenRow] = []
    for _ in range(count):
        length = int(torch.randint(2, 90, (1,), generator=draw))
        ids = torch.randint(0, vocab_size, (length,), generator=draw).tolist()
        start = int(torch.randint(1, length, (1,), generator=draw))
        rows.append(make_row(ids, [0] * start + [1] * (length - start)))
    return rows


def test_the_company_of_a_row_never_changes_its_score(model):
    rows = make_random_rows(40, vocab_size=250)
    alone = [score_rows(model, [row])[0].nll for row in rows]
    together = [score.nll for score in score_rows(model, rows)]
    eights = [score.nll for n in range(0, 40, 8) for score in score_rows(model, rows[n : n + 8])]
    tight = [score.nll for score in score_rows(model, rows, budget_tokens=100)]
    for other in (together, eights, tight):
        assert other == pytest.approx(alone, rel=1e-6)


def test_a_shared_beginning_run_once_gives_the_scores_of_whole_rows(model):
    shared = torch.randint(0, 250, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        dataclasses.replace(row, ids=[*shared, *row.ids], mask=[0] * 200 + list(row.mask))
        for row in make_random_rows(20, vocab_size=250)
    ]
    assert count_shared(rows) == 200
    alone = [score_rows(model, [row])[0].nll for row in rows]
    assert [score.nll for score in score_rows(model, rows)] == pytest.approx(alone, rel=1e-6)


def test_the_source_of_a_first_target_is_never_part_of_the_shared_beginning():
    rows = [make_row([1, 2, 3, 4], [0, 0, 1, 1]), make_row([1, 2, 3, 5], [0, 0, 0, 1])]
    assert count_shared(rows) == 1
    assert count_shared([make_row([1, 2, 3], [0, 0, 1]), make_row([9, 2, 3], [0, 0, 1])]) == 0
    assert count_shared(rows[:1]) == 0
