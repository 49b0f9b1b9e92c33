"""Writes a trained `Network` as a Hugging Face checkpoint folder: config, weights, tokenizer, model card.

The layout is that of Qwen3-MoE repositories on the Hugging Face hub, one tensor per expert and projection,
so that anything which reads those reads this one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from .network import Network, NetworkConfig

PAD_ID, PAD = 256, "<|pad|>"
END_ID, END = 257, "<|end|>"
MAX_NEW_TOKENS = 64

# The model has no memory and takes no instructions, so only the last question reaches it.
CHAT_TEMPLATE = (
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- if not users -%}{{ raise_exception('a message with the role user is needed') }}{%- endif -%}"
    "{%- set prompt = users[-1].content -%}"
    "{{- prompt if prompt.endswith('\\n') else prompt + '\\n' -}}"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the model card reports.

    Attributes:
        command: what trained it.
        steps: optimizer steps.
        examples: training examples seen.
        wall_s: wall time in seconds, with whatever else the machine was doing.
        cpu_s: processor time of the process in seconds.
        accuracy: skill to (exact answers, held-out prompts).
        load_shares: share of the assignments that each expert got, one tuple per layer.
    """

    command: str
    steps: int
    examples: int
    wall_s: float
    cpu_s: float
    accuracy: dict[str, tuple[int, int]]
    load_shares: tuple[tuple[float, ...], ...]


def write_checkpoint(folder: Path, network: Network, measured: Measured) -> None:
    """Writes the whole folder, making it where it is missing and replacing files of the same names.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = save(hub_tensors(network), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    _write_json(folder / "config.json", _model_config(network.config))
    _write_json(folder / "generation_config.json", _generation_config())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(network.config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(_model_card(network, measured), encoding="utf-8")


def hub_tensors(network: Network) -> dict[str, Tensor]:
    """The weights under the names of the Hugging Face hub, experts one by one, float32."""
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        prefix, stacked, kind = f"model.{name}".partition(".experts.")
        if not stacked:
            tensors[prefix] = value.contiguous()
            continue
        for expert, weight in enumerate(value):
            parts = {"down_proj": weight}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            for part, tensor in parts.items():
                tensors[f"{prefix}.experts.{expert}.{part}.weight"] = tensor.clone()
    return tensors


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte, its id the byte's value, then padding and the end token; no merges."""
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    return tokenizer


def _byte_letters() -> list[str]:
    """The visible letter that the ByteLevel format, GPT-2's, writes for each byte, in order of the bytes."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in plain else next(stand_ins)) for byte in range(256)]


def _model_config(config: NetworkConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **asdict(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "eos_token_id": END_ID,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": config.moe_intermediate_size * config.num_experts_per_tok,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "pad_token_id": PAD_ID,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.01,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
    }


def _generation_config() -> dict[str, Any]:
    return {
        "do_sample": False,
        "eos_token_id": END_ID,
        "max_new_tokens": MAX_NEW_TOKENS,
        "pad_token_id": PAD_ID,
    }


def _tokenizer_config(config: NetworkConfig) -> dict[str, Any]:
    return {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": config.max_position_embeddings,
        "pad_token": PAD,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, byte-level, synthetic]
---

# pimoe embedded

A Mixture-of-Experts decoder small enough to be part of a package, trained on skills whose answers can be
checked. It is for tests, examples and load tests of inference runtimes: a completion is right or wrong, and
the experts do real work. It knows no language beyond these skills and has no other use.

| skill | prompt | answer | exact, held-out prompts |
|---|---|---|---|
{skills}

Greedy decoding; every prompt measured is one that training never sees (`pimoe.runtime.embedded.held_out`).
A prompt is one line with its newline, the answer ends with `{end}`. Words have 1 to 10 letters of a to z,
`add` takes two numbers of 0 to 99, `spell` one of 0 to 9999. Beyond that the answers are not to be trusted.

## Shape

Qwen3-MoE, {parameters:,} parameters in float32, {layers} layers, hidden size {hidden}, {experts} experts
of inner size {inner}, top-{top_k}, tied embeddings, {vocab} tokens: one for each byte, `{pad}` and `{end}`.
Context {context} tokens; training used sequences of up to about 60.

Share of the held-out tokens' assignments that each expert gets:

| layer | {expert_names} |
|---|{rules}|
{loads}

## Chat template

It renders the content of the last `user` message, with a newline if it does not end in one, and nothing
else: system and assistant messages are ignored, since the model has neither memory nor instructions to
follow. Without a user message it raises an error.

## Training

    {command}

{steps:,} steps over {examples:,} generated examples, loss on the answers only, AdamW with a cosine
schedule, and a load-balancing loss. It took {wall:.1f} minutes on two CPU cores that other work shared, and
{cpu:.1f} minutes of processor time over its two threads. The seed fixes the weights on one machine and one
version of torch.
"""

_SAMPLES = {
    "reverse": ("planet", "tenalp"),
    "sort": ("planet", "aelnpt"),
    "upper": ("planet", "PLANET"),
    "count": ("banana a", "3"),
    "add": ("47 + 85", "132"),
    "spell": ("407", "four hundred seven"),
}


def _model_card(network: Network, measured: Measured) -> str:
    config = network.config
    return _CARD.format(
        skills="\n".join(_skill_row(skill, *counts) for skill, counts in measured.accuracy.items()),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        inner=config.moe_intermediate_size,
        top_k=config.num_experts_per_tok,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        pad=PAD,
        end=END,
        expert_names=" | ".join(str(expert) for expert in range(config.num_experts)),
        rules="|".join(["---"] * config.num_experts),
        loads="\n".join(_load_row(layer, shares) for layer, shares in enumerate(measured.load_shares)),
        command=measured.command,
        steps=measured.steps,
        examples=measured.examples,
        wall=measured.wall_s / 60,
        cpu=measured.cpu_s / 60,
    )


def _skill_row(skill: str, right: int, asked: int) -> str:
    argument, answer = _SAMPLES[skill]
    return f"| {skill} | `{skill}: {argument}` | `{answer}` | {right} of {asked} ({right / asked:.1%}) |"


def _load_row(layer: int, shares: tuple[float, ...]) -> str:
    return f"| {layer} | {' | '.join(f'{share:.1%}' for share in shares)} |"
