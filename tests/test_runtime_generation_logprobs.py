"""Log-probabilities and ranks: of many rows at once, of a prompt, and the same for a row whatever is beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pimoe.runtime.generation import chunks
from pimoe.runtime.generation.logprobs import prompt_logprobs, token_logprobs
from torch import Tensor


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def logits_of(seed: int, rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("rows", "vocab", "top"), [(7, 50, 5), (3, 4, 20), (5, 200_000, 3), (1, 1, 1), (2, 9, 0)])
def test_they_are_those_of_a_plain_reference(rows: int, vocab: int, top: int) -> None:
    logits = logits_of(rows, rows, vocab)
    tokens = [(7919 * row + 3) % vocab for row in range(rows)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    reports = token_logprobs(logits, tokens, top)
    assert len(reports) == rows
    for row, report in enumerate(reports):
        order = expected[row].argsort(descending=True).tolist()
        assert report.token_id == tokens[row]
        assert report.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert report.rank == 1 + order.index(tokens[row])
        assert [token for token, _ in report.top] == order[:top]
        values = [float(expected[row, token]) for token in order[:top]]
        assert [value for _, value in report.top] == pytest.approx(values, abs=1e-5)


def test_equals_share_the_better_rank() -> None:
    reports = token_logprobs(torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0]]).expand(5, -1), range(5), 0)
    assert [report.rank for report in reports] == [3, 1, 3, 1, 5]


@pytest.mark.parametrize("vocab", [3, 258, 5000, 151_936])
def test_a_row_is_reported_bit_by_bit_as_when_alone(vocab: int, threads: int) -> None:
    logits = logits_of(vocab, 9, vocab)
    tokens = [row % vocab for row in range(9)]
    together = token_logprobs(logits, tokens, 2)
    assert together == [token_logprobs(logits[row : row + 1], [tokens[row]], 2)[0] for row in range(9)]
    torch.set_num_threads(1)
    assert together == token_logprobs(logits, tokens, 2)


def test_a_prompts_rows_predict_the_tokens_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many pieces as memory asks for."""
    logits, tokens = logits_of(1, 25, 40), [token % 40 for token in range(25)]
    whole = prompt_logprobs(logits, tokens, 3)
    assert [report.token_id for report in whole] == tokens
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 80)
    assert [len(range(25)[part]) for part in chunks.row_slices(logits)] == [2] * 12 + [1]
    assert prompt_logprobs(logits, tokens, 3) == whole
    assert prompt_logprobs(logits[:0], [], 3) == []


def test_rows_that_are_views_of_one_are_reported_too() -> None:
    row = logits_of(2, 1, 700)
    reports = token_logprobs(row.expand(4, -1), [5] * 4, 1)
    assert reports == token_logprobs(row, [5], 1) * 4
