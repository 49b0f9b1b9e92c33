"""Trains the embedded model and writes its checkpoint folder: `python -m pimoe.runtime.embedded.train`.

Two CPU threads and fixed seeds: the same command gives the same weights on the same machine. Progress goes
to standard output.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .export import END_ID, Measured, write_checkpoint
from .network import Batch, Network, NetworkConfig
from .skills import SKILLS, Example, held_out, training_stream

THREADS = 2


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. A batch is `batch_examples` prompts with their answers."""

    steps: int = 3_000
    seed: int = 0
    batch_examples: int = 160
    peak_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    balance_weight: float = 0.02
    report_every: int = 200
    quick_prompts: int = 100
    final_prompts: int = 800

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch and where its answers are.

    Attributes:
        batch: prompts, answers and end tokens.
        ask: rows of the batch `[answers]` whose next token is part of an answer.
        owner: the example each of those rows belongs to, `[answers]`.
        target: that next token, `[answers]`.
        weight: share of each of those rows in the loss, `[answers]`, summing to 1.
    """

    batch: Batch
    ask: Tensor
    owner: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def of(cls, examples: list[Example]) -> Lesson:
        prompts = [list(example.prompt.encode()) for example in examples]
        answers = [[*example.answer.encode(), END_ID] for example in examples]
        sizes = torch.tensor([len(answer) for answer in answers])
        batch = Batch.of([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        lengths = torch.tensor([len(prompt) for prompt in prompts]) + sizes
        rows = torch.arange(len(batch.ids))
        in_answer = batch.positions >= (lengths - sizes).repeat_interleave(lengths)
        target = rows[in_answer]
        owner = torch.arange(len(examples)).repeat_interleave(sizes)
        # Every answer counts the same; counting tokens, long ones would drown `add` and `count`.
        weight = 1 / (sizes[owner] * len(examples))
        return cls(batch, target - 1, owner, batch.ids[target], weight)


def train(config: TrainConfig) -> Network:
    """The trained network. Sets torch's thread count and global seed."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(config.seed)
    network = Network(NetworkConfig())
    optimizer = _optimizer(network, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    started = time.monotonic()
    for step, lesson in enumerate(_lessons(config), start=1):
        loss = _loss(network, lesson, config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % config.report_every == 0 or step == config.steps:
            _report(network, config, step, float(loss.detach()), time.monotonic() - started)
    return network


def accuracy(network: Network, skill: str, prompts: int) -> tuple[int, int]:
    """Exact greedy answers to held-out prompts of a skill, and how many were asked."""
    lesson = Lesson.of(held_out(skill, prompts))
    with torch.inference_mode():
        hidden, _ = network(lesson.batch)
        said = network.logits(hidden[lesson.ask]).argmax(-1)
    # Greedy decoding repeats the answer exactly if and only if every token of it is the likeliest after
    # the right ones before, so one pass over the answers measures what generation would give.
    slips = torch.zeros(prompts).index_add(0, lesson.owner, (said != lesson.target).float())
    return int((slips == 0).sum()), prompts


def load_shares(network: Network, prompts: int) -> tuple[tuple[float, ...], ...]:
    """Share of the assignments that each expert gets, per layer, over held-out prompts of every skill."""
    lesson = Lesson.of([example for skill in SKILLS for example in held_out(skill, prompts)])
    with torch.inference_mode():
        _, routings = network(lesson.batch)
    return tuple(tuple((routing.load / routing.load.sum()).tolist()) for routing in routings)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pimoe.runtime.embedded.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    defaults = TrainConfig()
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of weights and examples")
    parser.add_argument("--prompts", type=int, default=defaults.final_prompts, help="measured, per skill")
    options = parser.parse_args(arguments)
    config = TrainConfig(steps=options.steps, seed=options.seed, final_prompts=options.prompts)
    wall, cpu = time.monotonic(), time.process_time()
    network = train(config)
    measured = Measured(
        command=f"{parser.prog} --out DIR --steps {config.steps} --seed {config.seed}",
        steps=config.steps,
        examples=config.steps * config.batch_examples,
        wall_s=time.monotonic() - wall,
        cpu_s=time.process_time() - cpu,
        accuracy={skill: accuracy(network, skill, config.final_prompts) for skill in SKILLS},
        load_shares=load_shares(network, min(config.quick_prompts, config.final_prompts)),
    )
    write_checkpoint(options.out, network, measured)
    _summarise(measured)


def _lessons(config: TrainConfig) -> Iterator[Lesson]:
    stream = training_stream(config.seed)
    for _ in range(config.steps):
        yield Lesson.of(list(islice(stream, config.batch_examples)))


def _optimizer(network: Network, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    decay = config.weight_decay
    return torch.optim.AdamW(groups, config.peak_rate, (0.9, 0.98), weight_decay=decay, fused=True)


def _rate(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to nothing."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _loss(network: Network, lesson: Lesson, config: TrainConfig) -> Tensor:
    hidden, routings = network(lesson.batch)
    errors = F.cross_entropy(network.logits(hidden[lesson.ask]), lesson.target, reduction="none")
    balance = torch.stack([routing.balance_loss for routing in routings]).mean()
    return (errors * lesson.weight).sum() + config.balance_weight * balance


def _report(network: Network, config: TrainConfig, step: int, loss: float, elapsed_s: float) -> None:
    scores = []
    for skill in SKILLS:
        right, asked = accuracy(network, skill, config.quick_prompts)
        scores.append(f"{skill} {right / asked:.0%}")
    print(f"step {step}  loss {loss:.4f}  {'  '.join(scores)}  {elapsed_s:.0f} s", flush=True)


def _summarise(measured: Measured) -> None:
    print(f"wall {measured.wall_s:.0f} s, processor {measured.cpu_s:.0f} s")
    for skill, (right, asked) in measured.accuracy.items():
        print(f"{skill}: {right} of {asked} exact ({right / asked:.2%})")
    for layer, shares in enumerate(measured.load_shares):
        print(f"layer {layer} expert load: {' '.join(f'{share:.3f}' for share in shares)}")


if __name__ == "__main__":
    main()
