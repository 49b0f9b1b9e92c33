"""Generation and the isolation tax: the scripts run and report all that they claim to measure, and what they make
of the numbers is right. The numbers themselves are no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "load_tests"
LLAMA = FOLDER.parent / ".venv" / "llama" / "bin" / "python"
QUIET = "transformers, before the cluster started"
PARTS = ("attention", "gate", "plan", "link", "expert", "combine")

needs_llama = pytest.mark.skipif(not LLAMA.exists(), reason="llama-cpp-python is not installed in .venv/llama")


def run_tiny(script: str, folder: Path, *options: str) -> tuple[dict[str, Any], str, str]:
    """The facts, the text and the chart."""
    facts, chart = folder / "facts.json", folder / "chart.svg"
    command = [sys.executable, str(FOLDER / script), "--preset", "tiny", "--json", str(facts), "--svg", str(chart)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(facts.read_text()), done.stdout, chart.read_text()


@pytest.fixture
def load_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


# compare_generation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    return run_tiny("compare_generation.py", tmp_path_factory.mktemp("generation"))


def test_every_way_decodes_and_prefills_or_says_why_not(compared: tuple[dict[str, Any], str, str]) -> None:
    facts, text, chart = compared
    for weights, gguf in (("bfloat16", "BF16"), ("int8", "Q8_0")):
        if f"pimoe {weights}" in facts["skipped"]:
            continue
        rows = {(r["phase"], r["sequences"], r["way"]): r for r in facts["rates"] if r["weights"] == weights}
        ways = {way for _, _, way in rows}
        assert {"served over HTTP", "in-process, 1 thread", "transformers", QUIET} <= ways
        assert (f"llama.cpp {gguf}" in ways) == (f"llama.cpp {gguf}" not in facts["skipped"])
        assert rows.keys() == {(p, n, way) for p in ("decode", "prefill") for n in (1, 4) for way in ways}
        assert all(row["tokens_per_s"] > 0 for row in rows.values())
        assert all(row["to_transformers"] == 1 for (_, _, way), row in rows.items() if way == "transformers")
        assert all(row["to_quiet"] == pytest.approx(1) for (_, _, way), row in rows.items() if way == QUIET)
        assert all(row["lowest"] <= row["to_faster"] <= row["highest"] for row in rows.values())
    assert len(facts["targets"]) == 4, "each kind of weights, one sequence and four"
    assert "decode, served, experts in two processes, bfloat16, 1 sequence(s)" in text
    assert "transformers is faster than served in" in text
    assert f"{QUIET} is faster than served in" in text
    assert all(f"Skipped: {way}: " in text for way in facts["skipped"])
    assert chart.startswith("<svg")
    assert "served over HTTP" in chart
    rivals = {row["weights"]: row for row in facts["rivals"]}
    assert rivals.keys() == {gguf for gguf in ("BF16", "Q8_0") if f"llama.cpp {gguf}" not in facts["skipped"]}
    for row in rivals.values():
        assert row["file_bytes"] > 0
        assert f"llama.cpp: {row['title']} {row['version']}; " in text
    assert text.splitlines()[1] == f"native kernels: {facts['machine']['kernels']}"


def test_transformers_computes_in_its_fastest_way(compared: tuple[dict[str, Any], str, str]) -> None:
    choices = compared[0]["choices"]
    assert {(c["phase"], c["sequences"]) for c in choices} == {
        (p, n) for p in ("decode", "prefill") for n in (1, 4)
    }
    assert all(c["experts"] in ("eager", "batched_mm", "grouped_mm") and c["threads"] >= 1 for c in choices)


def test_the_first_tokens_of_bfloat16_are_mostly_those_of_transformers(
    compared: tuple[dict[str, Any], str, str],
) -> None:
    rows = [row for row in compared[0]["agreements"] if row["weights"] == "bfloat16"]
    assert {row["way"] for row in rows} >= {"served over HTTP", "in-process, 1 thread"}
    for row in rows:
        assert row["same_first"] <= row["same"] <= row["of"]
    # Not all: two logits of a random model may be as good as equal.
    assert sum(row["same_first"] for row in rows) >= 0.7 * sum(row["answers"] for row in rows)
    assert all(row["wrong"] is None for row in compared[0]["targets"] if "bfloat16" in row["what"])


def rate(weights: str, way: str, tokens_per_s: float, ratio: float, to_llama: float | None = None) -> Any:
    """Decoding one sequence; the rounds lie a tenth apart."""
    ratios = (ratio, ratio, ratio, ratio - 0.1, ratio + 0.1)
    return import_module("generation_results").Rate(weights, "decode", 1, way, tokens_per_s, *ratios, to_llama)


def agreement(weights: str, sequences: int, same_first: int, answers: int, way: str = "served over HTTP") -> Any:
    found = import_module("generation_results").Agreement
    return found(weights, sequences, way, same_first, 8 * answers, same_first, answers)


def test_what_is_missed_and_what_is_faster_is_told(load_tests: None) -> None:
    results = import_module("generation_results")
    rates = [
        rate("bfloat16", "served over HTTP", 150.0, 1.5, 0.5),
        rate("bfloat16", "transformers", 100.0, 1.0, 0.33),
        rate("bfloat16", "llama.cpp BF16", 300.0, 3.0, 1.0),
        rate("int8", "served over HTTP", 190.0, 1.9),
    ]
    lines = results.summary(rates, [], [], [], {"llama.cpp Q8_0": "not here"})
    agreements = [agreement("bfloat16", 1, 3, 3), agreement("int8", 1, 3, 3)]
    judged = [(row["target"], row["measured"], row["reached"]) for row in results.targets(rates, agreements)]
    assert judged == [
        ("at least 1.5x", "1.50x (1.40 to 1.60)", True),
        ("at least 2x", "1.90x (1.80 to 2.00)", False),
    ]
    assert "bfloat16: llama.cpp BF16 is faster than served in: decode at 1 (2.0x)." in lines
    assert "bfloat16: transformers is faster than served in: nothing." in lines
    assert lines[-1] == "Skipped: llama.cpp Q8_0: not here."


def test_speed_counts_only_where_the_first_tokens_are_right(load_tests: None) -> None:
    results = import_module("generation_results")
    rates = [rate("bfloat16", "served over HTTP", 900.0, 9.0), rate("int8", "served over HTTP", 900.0, 9.0)]

    def judged(*agreements: Any) -> list[tuple[bool, str | None]]:
        return [(row["reached"], row["wrong"]) for row in results.targets(rates, agreements)]

    enough, too_few = agreement("bfloat16", 1, 7, 10), agreement("int8", 1, 69, 100)
    reason = "first tokens as transformers': 69 of 100, below 70%"
    assert judged(enough, too_few) == [(True, None), (False, reason)]
    assert reason in results.targets(rates, [enough, too_few])[1]["measured"]
    others = [agreement("int8", 1, 100, 100, way="in-process, 1 thread")]
    assert judged(enough, too_few, *others)[1] == (False, reason), "what is not served does not count"
    assert judged(agreement("bfloat16", 1, 0, 2), agreement("bfloat16", 8, 98, 98))[0] == (True, None)
    assert judged() == [(False, "no tokens were compared")] * 2


def test_ratios_are_to_the_faster_of_transformers_beside_and_before_the_cluster(load_tests: None) -> None:
    cases = import_module("generation_cases")
    case = cases.Case("decode", 1, 8, 8, 256)
    rates = {
        "served over HTTP": [300.0, 200.0, 240.0],
        "transformers": [100.0, 50.0, 60.0],
        QUIET: [90.0, 120.0, 100.0],
    }
    found = cases.rate_of("bfloat16", case, "served over HTTP", rates)
    assert (found.to_transformers, found.to_quiet) == (4.0, 2.4)
    assert (found.to_faster, found.lowest, found.highest) == (2.4, 2.0, 3.0), "before, it was faster"
    found = cases.rate_of("bfloat16", case, "served over HTTP", {**rates, QUIET: [10.0, 20.0, 30.0]})
    assert (found.to_faster, found.lowest, found.highest) == (4.0, 3.0, 4.0), "in each round's own ratio"


def test_no_prompt_begins_as_one_before_in_another_round_or_case(load_tests: None) -> None:
    compare = import_module("compare_generation")
    preset, begun = compare.PRESETS["default"], []
    for case in compare._cases(preset):
        for seed in [seed for index in range(3) for seed in case.seeds(index)]:
            begun += [tuple(prompt[:16]) for prompt in case.prompts(seed)]
        assert case.prompt_tokens + case.max_tokens <= preset.shape.max_tokens
    assert len(begun) == len(set(begun)), "a router that reuses what it knows of prompts would be ahead"


def test_llama_cpps_version_file_and_processor_features_are_told(load_tests: None) -> None:
    results = import_module("generation_results")
    system = "CPU : SSE3 = 1 | AVX2 = 1 | SVE_CNT = 32 | AVX512 = 0 | "
    rivals = [
        results.rival_of({"version": "0.3", "bytes": size, "system": system}, weights)
        for weights, size in (("BF16", 2000), ("Q8_0", 1000))
    ]
    assert rivals[0] == results.Rival("llama-cpp-python", "0.3", "BF16", 2000, "SSE3 AVX2 SVE_CNT=32")
    files = "BF16 file of 2,000 bytes, Q8_0 file of 1,000 bytes"
    line = f"llama.cpp: llama-cpp-python 0.3; {files}; SSE3 AVX2 SVE_CNT=32."
    assert line in results.summary([], [], [], rivals, {})


def test_tokens_count_as_the_same_up_to_the_first_other_one(load_tests: None) -> None:
    common = import_module("generation_cases").common_tokens
    assert common([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert common([1, 2], [1, 2]) == 2
    assert common([5, 2], [1, 2]) == 0


@needs_llama
@pytest.mark.parametrize("matrices", ["BF16", "Q8_0"])
async def test_llama_cpp_generates_the_same_tokens_alone_and_with_others(
    load_tests: None, tmp_path: Path, matrices: str
) -> None:
    random_model, rivals = import_module("random_model"), import_module("generation_rivals")
    shape = random_model.Shape(
        64, 2, num_experts=4, top_k=2, expert_size=64, num_heads=2, num_kv_heads=1, vocab_size=256
    )
    random_model.write_random_model(tmp_path, shape)
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8], [200, 100, 50, 25]]
    with rivals.llama(tmp_path, matrices, 3, 16) as llama:
        together = [answer.tokens for answer in await llama.burst(prompts, 4)]
        alone = [(await llama.burst([prompt], 4))[0].tokens for prompt in prompts]
        assert together == alone
        assert [len(tokens) for tokens in together] == [4, 4, 4]


@needs_llama
def test_llama_cpp_says_why_it_cannot_read_a_checkpoint(load_tests: None, tmp_path: Path) -> None:
    rivals = import_module("generation_rivals")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with (
        pytest.raises(rivals.RivalMissingError, match="must be 'qwen3_moe'"),
        rivals.llama(tmp_path, "BF16", 1, 8),
    ):
        pass


# isolation_tax -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taxed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    return run_tiny("isolation_tax.py", tmp_path_factory.mktemp("isolation"))


def test_the_same_engine_is_measured_in_process_and_in_processes(taxed: tuple[dict[str, Any], str, str]) -> None:
    facts, text, chart = taxed
    rows = {(r["sequences"], r["way"]): r for r in facts["speeds"] if r["weights"] == "bfloat16"}
    ways = {way for _, way in rows}
    assert {"in-process, 1 thread", "2 group processes", "4 group processes"} <= ways
    assert rows.keys() == {(count, way) for count in (1, 4) for way in ways}
    for (count, _), row in rows.items():
        assert row["tokens_per_s"] > 0
        limit = max(other["ratio"] for (n, _), other in rows.items() if n == count and not other["processes"])
        assert limit == 1, "the fastest in-process way is what all are measured against"
        assert row["one"] + row["two"] >= 8, "every token but the first takes a step"
        assert not row["two"] or (row["processes"] and count > 1), "only processes overlap, and only of several"
    assert "decode, experts in two processes, bfloat16, 1 sequence(s), to in-process" in text
    assert "bfloat16: slower than in-process: " in text
    assert all(row["lowest"] <= row["ratio"] <= row["highest"] for row in facts["speeds"])
    assert [row["measured"].count(" to ") for row in facts["targets"]] == [1] * len(facts["targets"])
    assert text.splitlines()[1] == f"native kernels: {facts['machine']['kernels']}"
    assert chart.startswith("<svg")


def test_a_layers_time_is_split_into_its_parts(taxed: tuple[dict[str, Any], str, str]) -> None:
    facts, text, _ = taxed
    assert {(p["sequences"], p["way"]) for p in facts["parts"]} == {
        (s["sequences"], s["way"]) for s in facts["speeds"]
    }
    for row in facts["parts"]:
        parts_us = {part: row[f"{part}_us"] for part in PARTS}
        assert all(value >= 0 for value in parts_us.values()), row
        assert min(parts_us[part] for part in ("attention", "gate", "expert", "combine")) > 0, row
        # Medians of parts need not add up; two layers of them are not more than twice a step.
        assert 2 * sum(parts_us.values()) < 2 * 1e3 * row["step_ms"]
        assert 0 < row["other_ms"] < row["step_ms"]
    assert all(part in text for part in PARTS)


async def test_splitting_leaves_the_router_as_it_was(load_tests: None, tmp_path: Path) -> None:
    from pimoe.runtime.local import LocalRuntime

    random_model, generation = import_module("random_model"), import_module("generation")
    split = import_module("generation_split").split
    shape = random_model.Shape(
        64, 2, num_experts=4, top_k=2, expert_size=64, num_heads=2, num_kv_heads=1, vocab_size=256
    )
    random_model.write_random_model(tmp_path, shape)
    async with await LocalRuntime.start(tmp_path) as runtime:
        burst = generation.streaming(generation.by_router(runtime.router))
        plain = await burst([[1, 2, 3]], 6)
        with split(runtime.router) as steps:
            timed = await burst([[1, 2, 3]], 6)
        counted = len(steps)
        again = await burst([[1, 2, 3]], 6)
    assert plain[0].tokens == timed[0].tokens == again[0].tokens
    assert counted == len(steps) == 6, "nothing is recorded afterwards"
    assert [step.tokens for step in steps[1:]] == [1] * 5


# gpu -----------------------------------------------------------------------------------------------------------


def test_the_gpus_table_says_that_pimoe_is_measured_against_itself(load_tests: None) -> None:
    gpu = import_module("gpu")
    rates = [gpu.Rate(8, "in-process", 200.0, 900.0, 1.0), gpu.Rate(8, "2 group processes", 100.0, 800.0, 0.5)]
    text = gpu.tables(rates, "some GPU", gpu.PRESETS["tiny"])
    assert "No rival runs on the GPU here" in text
    assert "pimoe is worse: 2 group processes, 8 sequences: 0.50 of in-process" in text
