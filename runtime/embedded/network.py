"""A lean Qwen3-MoE decoder for training on short, unpadded sequences on a few CPU cores.

The same mathematics as the Hugging Face class and the same parameter names, except that a layer's experts
are stacked. Two things make it fast: tokens lie flat, `[tokens, hidden]`, without padding everywhere but
in attention, and experts are one grouped GEMM over rows sorted by expert. It knows nothing of KV caches,
tokenizers, files or skills, and the served model does not use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Shape of the network; the field names are those of a Hugging Face `config.json`."""

    vocab_size: int = 258
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be 1 to num_experts {self.num_experts}"
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences laid end to end.

    Attributes:
        ids: token ids `[tokens]`, one sequence after the other.
        positions: place of each token in its sequence, `[tokens]`.
        slots: place of each token in a padded `[sequences * longest]` grid, `[tokens]`.
        sequences: how many sequences.
        longest: tokens in the longest one.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    sequences: int
    longest: int

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Batch:
        """The batch of the given token id lists, none of them empty."""
        longest = max(map(len, sequences))
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
        rows = torch.arange(len(sequences)).repeat_interleave(lengths)
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        return cls(ids, positions, rows * longest + positions, len(sequences), longest)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[tokens, heads, head_dim]` in the half-split layout of Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in projections)
        q, k = _rotate(self.q_norm(q), cos, sin), _rotate(self.k_norm(k), cos, sin)
        # Padding is on the right, so the causal mask alone keeps it out.
        mixed = F.scaled_dot_product_attention(
            _pad(q, batch), _pad(k, batch), _pad(v, batch), is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(0, 1)[batch.slots].flatten(1))
        return out


def _pad(x: Tensor, batch: Batch) -> Tensor:
    """`[tokens, heads, head_dim]` to `[sequences, heads, longest, head_dim]`, with zeros for padding."""
    grid = x.new_zeros(batch.sequences * batch.longest, *x.shape[1:]).index_copy(0, batch.slots, x)
    return grid.view(batch.sequences, batch.longest, *x.shape[1:]).transpose(1, 2)


class Gate(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))


class Experts(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """`[rows, hidden]` sorted by expert, each expert's rows up to `ends[expert]`, through the experts."""
        gate, up = F.grouped_mm(rows, self.gate_up_proj.mT, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.mT, offs=ends)


@dataclass(frozen=True, slots=True)
class Routing:
    """What one layer's gate decided: assignments per expert `[experts]` and the loss that evens them out."""

    load: Tensor
    balance_loss: Tensor


class SparseBlock(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.top_k = config.num_experts_per_tok

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        probabilities = F.linear(x, self.gate.weight).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        load = chosen.flatten().bincount(minlength=probabilities.shape[1])
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.top_k
        out = self.experts(x[rows], load.cumsum(0, dtype=torch.int32)) * weights.flatten()[order, None]
        # Switch Transformer (arXiv 2101.03961), equation 4: 1 when every expert gets the same share.
        share = load / load.sum()
        balance = len(load) * (share * probabilities.mean(0)).sum()
        return torch.zeros_like(x).index_add(0, rows, out), Routing(load, balance)


class DecoderLayer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseBlock(config)

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing]:
        x = x + self.self_attn(self.input_layernorm(x), batch, cos, sin)
        mixed, routing = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, routing


class Network(nn.Module):
    """The decoder. Weights are drawn from torch's global generator: seed it first."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Into the residual stream less, so that depth does not make it grow (as in GPT-2).
                into_stream = name.endswith(("o_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=0.02 if into_stream else 0.06)

    def forward(self, batch: Batch) -> tuple[Tensor, list[Routing]]:
        """Hidden states `[tokens, hidden]` after the last norm, and each layer's routing."""
        half = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angles = (batch.positions[:, None] / self.config.rope_theta**half).repeat(1, 2)[:, None]
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(batch.ids)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, batch, cos, sin)
            routings.append(routing)
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to `[rows, vocab]`; the output layer is the embedding."""
        return F.linear(hidden, self.embed_tokens.weight)
