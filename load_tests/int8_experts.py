"""What rounding experts to int8 costs in accuracy and saves in memory: the embedded model, asked what it can do.

    python load_tests/int8_experts.py [--preset tiny] [--json FILE]

All skills of the embedded model, exact answers to prompts that it never saw, with weights as they are stored, in
bfloat16, and with experts in int8 beside activations of either dtype. In-process: nothing here depends on where
experts live. See README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from generation import machine_and_kernels, machine_lines
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.embedded.evaluate import MAX_ANSWER_TOKENS, evaluate
from pimoe.runtime.experts.client import LocalGroup
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.loop_thread import new_event_loop
from pimoe.runtime.model.tokenizer import Tokenizer
from pimoe.runtime.requests import GenerateRequest, SamplingParams
from report import parser, progress, publish, table, target, target_table

PRESETS = {"tiny": 4, "default": 100}  # prompts of each skill
# dtype of everything else, quantisation of experts
WAYS = (("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int8"))
_MAX_BYTES_RATIO, _LEAST_POINTS = 0.55, -1.0


@dataclass(frozen=True)
class Result:
    """One way.

    Attributes:
        expert_bytes: of all experts' weights, as they lie in memory.
        bytes_ratio: of that to bfloat16's.
        exact, total: answers.
        points: of exact answers above (below: negative) the same dtype without rounding, in points of a hundred.
    """

    way: str
    dtype: str
    int8: bool
    expert_bytes: int
    bytes_ratio: float
    exact: int
    total: int
    points: float
    skills: dict[str, int]


async def _measure(dtype: str, quantization: object, samples: int) -> tuple[int, dict[str, int]]:
    tokenizer = Tokenizer.load(CHECKPOINT)
    assert tokenizer is not None
    options = {} if quantization is None else {"expert_quantization": "int8"}
    async with await LocalRuntime.start(CHECKPOINT, dtype=dtype, **options) as runtime:  # type: ignore[arg-type]
        router = runtime.router

        async def answer(prompt: str) -> str:
            request = GenerateRequest(
                prompt,
                tuple(tokenizer.encode(prompt)),
                SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0),
            )
            found = [token async for chunk in router.generate(request) for token in chunk.token_ids]
            return tokenizer.decode(found)

        scores = await evaluate(answer, samples)
        held = [group for group in router.dispatcher.groups if isinstance(group, LocalGroup)]
        return sum(group.group.weights_bytes for group in held), {score.skill: score.exact for score in scores}


def measure(samples: int) -> list[Result]:
    """All ways."""
    found = {}
    for dtype, quantization in WAYS:
        progress(f"{dtype}, experts in {quantization or dtype}")
        found[dtype, quantization] = new_event_loop().run_until_complete(_measure(dtype, quantization, samples))
    reference = found["bfloat16", None][0]
    results = []
    for (dtype, quantization), (size, skills) in found.items():
        exact, total = sum(skills.values()), samples * len(skills)
        points = 100 * (exact - sum(found[dtype, None][1].values())) / total
        way = dtype if quantization is None else f"int8 experts, the rest {dtype}"
        results.append(
            Result(way, dtype, quantization is not None, size, size / reference, exact, total, points, skills)
        )
    return results


def targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Reached or missed."""
    rounded = [result for result in results if result.int8]
    ratio, points = max(r.bytes_ratio for r in rounded), min(r.points for r in rounded)
    return [
        target("int8 experts: bytes of weights to bfloat16", ratio, _MAX_BYTES_RATIO, at_most=True),
        target("int8 experts: exact answers of the embedded model, change", points, _LEAST_POINTS, unit=" points"),
    ]


def tables(results: Sequence[Result]) -> str:
    """For people."""
    skills = list(results[0].skills)
    header = ("way", "expert bytes", "to bfloat16", "exact", "points", *skills)
    rows = [
        (
            r.way,
            f"{r.expert_bytes:,}",
            f"{r.bytes_ratio:.2f}x",
            f"{r.exact}/{r.total}",
            f"{r.points:+.2f}" if r.int8 else "",
            *(str(r.skills[skill]) for skill in skills),
        )
        for r in results
    ]
    return table("Experts rounded to int8, on the embedded model's skills", header, rows)


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here, results = machine_and_kernels(), measure(PRESETS[options.preset])
    judged = targets(results)
    facts = {
        "machine": here,
        "preset": options.preset,
        "kernels": here["kernels"],
        "int8_experts": [asdict(result) for result in results],
        "targets": judged,
    }
    text = f"{machine_lines(here)}\n\n{tables(results)}\n\n"
    publish(facts, text + target_table(judged), options.json)


if __name__ == "__main__":
    run(parser("Compare int8 experts with whole ones, in accuracy and memory.", PRESETS).parse_args())
