"""Log-probabilities of a prompt's tokens, collected chunk by chunk as it is prefilled."""

from __future__ import annotations

from torch import Tensor

from .logprobs import prompt_logprobs
from .scheduler import StepItem


def note_prompt_logprobs(item: StepItem, logits: Tensor) -> None:
    """Adds what a chunk tells of the prompt.

    Args:
        item: computed, and not yet entered in its generation.
        logits: `[item.count, vocab]`; each row is about the token after its own.
    """
    generation = item.generation
    prompt, noted = generation.request.prompt_token_ids, generation.prompt_logprobs
    if not noted:
        noted.append(None)  # nothing comes before the first token
    start = generation.computed
    # A sequence that was preempted computes again what it has noted already.
    first, stop = len(noted), min(start + item.count + 1, len(prompt))
    if first < stop:
        rows = logits[first - 1 - start : stop - 1 - start]
        noted += prompt_logprobs(rows, prompt[first:stop], generation.request.sampling.prompt_logprobs or 0)
