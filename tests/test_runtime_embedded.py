"""The embedded model: skills that can be checked, a split that cannot leak, and a checkpoint that answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.embedded import CHECKPOINT, SKILLS, Example, held_out, is_exact, training_stream
from pimoe.runtime.embedded.export import (
    END_ID,
    PAD_ID,
    Measured,
    byte_tokenizer,
    hub_tensors,
    write_checkpoint,
)
from pimoe.runtime.embedded.network import Batch, Network, NetworkConfig
from pimoe.runtime.embedded.train import TrainConfig, accuracy, load_shares, main, train
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS_PER_SKILL = 40
LARGEST_BYTES = 8_000_000

WORD_VALUES = {
    **{"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7},
    **{"eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14},
    **{"fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19},
    **{"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70},
    **{"eighty": 80, "ninety": 90},
}


def number_of(words: str) -> int:
    """Reads a number in words, the other way round from how the skill writes it."""
    total = current = 0
    for word in re.split("[ -]", words):
        if word == "thousand":
            total, current = current * 1_000, 0
        elif word == "hundred":
            current *= 100
        else:
            current += WORD_VALUES[word]
    return total + current


def is_sorted_letters(argument: str, answer: str) -> bool:
    rises = all(a <= b for a, b in pairwise(answer))
    return rises and Counter(argument) == Counter(answer)


def is_reverse(argument: str, answer: str) -> bool:
    return len(answer) == len(argument) and all(answer[-1 - i] == letter for i, letter in enumerate(argument))


def is_sum(argument: str, answer: str) -> bool:
    left, plus, right = argument.split()
    return plus == "+" and int(answer) - int(left) == int(right)


def is_count(argument: str, answer: str) -> bool:
    found = re.fullmatch("([a-z]+) ([a-z])", argument)
    return found is not None and len(found[1].split(found[2])) - 1 == int(answer)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "reverse": is_reverse,
    "sort": is_sorted_letters,
    "upper": lambda argument, answer: [ord(c) + 32 for c in answer] == [ord(c) for c in argument],
    "count": is_count,
    "add": is_sum,
    "spell": lambda argument, answer: number_of(answer) == int(argument),
}


def argument_of(example: Example) -> str:
    found = re.fullmatch(rf"{example.skill}: ([^\n]+)\n", example.prompt)
    assert found is not None, example
    return found[1]


# --- skills ---------------------------------------------------------------------------------------------


def test_the_skills_promised_are_there() -> None:
    assert {"reverse", "sort", "add", "spell"} <= set(SKILLS)
    assert set(CHECKS) == set(SKILLS)


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_pass_an_independent_check(skill: str) -> None:
    examples = [*held_out(skill, 300), *(e for e in islice(training_stream(1), 3_000) if e.skill == skill)]
    assert len(examples) > 350
    assert not [e for e in examples if not CHECKS[skill](argument_of(e), e.answer)]


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_prompts_are_distinct_and_the_same_every_time(skill: str) -> None:
    examples = held_out(skill, 200)
    assert len({e.prompt for e in examples}) == 200
    assert {e.skill for e in examples} == {skill}
    assert held_out(skill, 200) == examples
    assert held_out(skill, 50) == examples[:50]
    assert held_out(skill, 50, seed=1) != examples[:50]


def in_fresh_python(code: str, hash_seed: str = "0") -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    return done.stdout.decode()


def test_held_out_prompts_do_not_depend_on_the_process() -> None:
    code = "from pimoe.runtime.embedded import *; print([held_out(s, 20) for s in SKILLS])"
    expected = f"{[held_out(skill, 20) for skill in SKILLS]}\n"
    assert [in_fresh_python(code, hash_seed) for hash_seed in ("1", "2")] == [expected, expected]


def test_importing_the_skills_does_not_import_torch() -> None:
    assert in_fresh_python("import sys, pimoe.runtime.embedded; print('torch' in sys.modules)") == "False\n"


def test_training_never_sees_a_held_out_prompt() -> None:
    trained = {e.prompt for e in islice(training_stream(0), 60_000)}
    asked = {e.prompt for skill in SKILLS for e in held_out(skill, 800)}
    assert not trained & asked
    # The test would be idle if the stream did not cover the small spaces.
    assert sum(prompt.startswith("add") for prompt in trained) > 5_000


def test_a_sum_is_held_out_both_ways_round() -> None:
    def pairs(examples: Iterable[Example]) -> set[frozenset[str]]:
        return {frozenset(argument_of(e).split(" + ")) for e in examples if e.skill == "add"}

    assert not pairs(islice(training_stream(0), 40_000)) & pairs(held_out("add", 800))


def test_about_a_tenth_of_the_numbers_are_held_out_and_every_number_word_is_trained() -> None:
    trained = [e for e in islice(training_stream(0), 60_000) if e.skill == "spell"]
    assert set(WORD_VALUES) <= {word for e in trained for word in re.split("[ -]", e.answer)}
    assert len(held_out("spell", 900)) == 900
    with pytest.raises(ValueError, match="spell"):
        held_out("spell", 1_200)


def test_training_stream_repeats_for_a_seed_and_has_every_skill() -> None:
    first = list(islice(training_stream(3), 500))
    assert first == list(islice(training_stream(3), 500))
    assert first != list(islice(training_stream(4), 500))
    assert {e.skill for e in first} == set(SKILLS)


def test_unknown_skill_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'juggle'.*reverse, sort"):
        held_out("juggle", 0)


def test_exact_means_the_answer_and_nothing_else() -> None:
    example = Example("add", "add: 47 + 85\n", "132")
    assert is_exact(example, "132")
    assert not [text for text in ("", "13", "1320", " 132", "132\n", "131") if is_exact(example, text)]


# --- network and export ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _keep_torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured() -> Measured:
    shares = ((0.125,) * 8,) * 4
    return Measured("command", 1, 1, 1.0, 1.0, dict.fromkeys(SKILLS, (1, 2)), shares)


def test_flat_tokens_give_what_each_sequence_gives_alone() -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig())
    sequences = [list(b"sort: banana\n"), list(b"add: 1 + 2\n3"), list(b"x")]
    with torch.inference_mode():
        together, _ = network(Batch.of(sequences))
        alone = torch.cat([network(Batch.of([sequence]))[0] for sequence in sequences])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_exported_weights_give_the_same_logits_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig())
    write_checkpoint(tmp_path / "new", network, measured())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    sequence = list(b"reverse: planet\ntenalp")
    with torch.inference_mode():
        ours = network.logits(network(Batch.of([sequence]))[0])
        expected = theirs(torch.tensor([sequence])).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_network_config_says_what_would_be_right() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok 9 must be 1 to num_experts 8"):
        NetworkConfig(num_experts_per_tok=9)
    with pytest.raises(ValueError, match="num_attention_heads 4 must be a multiple"):
        NetworkConfig(num_key_value_heads=3)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        TrainConfig(steps=0)


def test_training_repeats_exactly_for_a_seed() -> None:
    config = TrainConfig(steps=3, batch_examples=8, quick_prompts=2)
    first, second = hub_tensors(train(config)), hub_tensors(train(config))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = hub_tensors(train(TrainConfig(steps=3, batch_examples=8, quick_prompts=2, seed=1)))
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_command_writes_the_whole_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "new"), "--steps", "1", "--prompts", "5"])
    assert {p.name for p in (tmp_path / "new").iterdir()} == {p.name for p in CHECKPOINT.iterdir()}
    printed = capsys.readouterr().out
    assert "layer 3 expert load" in printed
    assert "--steps 1 --seed 0" in (tmp_path / "new" / "README.md").read_text()


# --- tokenizer ------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_its_bytes_and_comes_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_token_even_outside_utf8() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(bytes(range(128)).decode()).ids == list(range(128))
    # A lone continuation byte is no text; it decodes to the replacement character and nothing breaks.
    assert [tokenizer.decode([byte]) for byte in range(128, 256)] == ["\N{REPLACEMENT CHARACTER}"] * 128


# --- the checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_checkpoint_is_small_and_whole() -> None:
    files = {p.name: p.stat().st_size for p in CHECKPOINT.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert {"tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) <= LARGEST_BYTES


def test_checkpoint_has_the_tensor_names_of_the_hub() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        gate = file.get_tensor("model.layers.0.mlp.experts.7.gate_proj.weight")
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.gate.weight"} <= names
    assert gate.dtype == torch.float32
    assert gate.shape == (128, 128)


def test_checkpoint_knows_its_end_token(model: Any, tokenizer: Any) -> None:
    assert {tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id} == {END_ID}
    assert {tokenizer.pad_token_id, model.config.pad_token_id} == {PAD_ID}
    assert len(tokenizer) == model.config.vocab_size


def test_checkpoint_tokenizer_round_trips_text(tokenizer: Any) -> None:
    text = "naïve  日本語 🦊\n\ttabs, <|pipes|> and  spaces "
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([*b"132", END_ID], skip_special_tokens=True) == "132"


def test_chat_template_asks_the_last_question(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "reverse: planet"},
        {"role": "assistant", "content": "tenalp"},
        {"role": "user", "content": "add: 47 + 85"},
    ]

    def rendered(messages: list[dict[str, str]], **options: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text

    assert rendered(chat) == "add: 47 + 85\n"
    assert rendered(chat[:2]) == "reverse: planet\n"
    ended = [{"role": "user", "content": "add: 47 + 85\n"}]
    assert rendered(ended, add_generation_prompt=True) == "add: 47 + 85\n"
    with pytest.raises(Exception, match="role user"):
        rendered(chat[:1])


def test_a_prompt_as_long_as_the_context_is_survived(model: Any) -> None:
    with torch.inference_mode():
        logits = model(torch.arange(512)[None] % 256).logits
    assert logits.shape == (1, 512, 258)
    assert torch.isfinite(logits).all()


def stored_network() -> Network:
    """The checkpoint in the training network, the other way round from `hub_tensors`."""
    stored, network = load_file(CHECKPOINT / "model.safetensors"), Network(NetworkConfig())
    own: dict[str, torch.Tensor] = {}
    for name in network.state_dict():
        prefix, stacked, kind = f"model.{name}".partition(".experts.")
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        if not stacked:
            own[name] = stored[prefix]
            continue
        experts = [[stored[f"{prefix}.experts.{e}.{part}.weight"] for part in parts] for e in range(8)]
        own[name] = torch.stack([torch.cat(tensors) for tensors in experts])
    network.load_state_dict(own)
    return network


def test_accuracy_in_training_is_that_of_generation(model: Any, tokenizer: Any) -> None:
    network = stored_network()
    for skill in ("sort", "add"):
        examples = held_out(skill, PROMPTS_PER_SKILL)
        said = answers(model, tokenizer, [e.prompt for e in examples])
        right = sum(is_exact(e, text) for e, text in zip(examples, said, strict=True))
        assert accuracy(network, skill, PROMPTS_PER_SKILL) == (right, PROMPTS_PER_SKILL)
    assert all(sum(shares) == pytest.approx(1.0) for shares in load_shares(network, 5))


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.generate(**inputs)
    new = out[:, inputs.input_ids.shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def test_no_expert_is_idle_and_groups_of_experts_share_the_work(model: Any, tokenizer: Any) -> None:
    prompts = [example.prompt + example.answer for skill in SKILLS for example in held_out(skill, 20)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        routed = model(**inputs, output_router_logits=True).router_logits
    real = inputs.attention_mask.flatten().bool()
    for logits in routed:
        load = logits[real].topk(2).indices.flatten().bincount(minlength=8).float()
        share = load / load.sum()
        assert share.min() > 0.04, share
        assert share.unflatten(0, (2, 4)).sum(1).max() < 0.65, share
        assert share.unflatten(0, (4, 2)).sum(1).max() < 0.40, share


@pytest.mark.parametrize("skill", SKILLS)
def test_greedy_answers_are_exact(model: Any, tokenizer: Any, skill: str) -> None:
    examples = held_out(skill, PROMPTS_PER_SKILL)
    said = answers(model, tokenizer, [e.prompt for e in examples])
    wrong = [(e.prompt, text) for e, text in zip(examples, said, strict=True) if not is_exact(e, text)]
    assert len(wrong) <= 0.1 * PROMPTS_PER_SKILL, wrong
