"""The model: checkpoint reading, config families, and the decoder trunk (everything but the experts).

Import what you need from its module; this file imports nothing, so that a process which only tokenizes
does not pay for torch.

    checkpoint ── families ── spec         a folder on disk -> what it needs, as frozen values
        └─ decoder ── attention ── step ── kv_cache ── rope
    layer_model                            a single MoE layer, or any custom experts, as a checkpoint
    tokenizer ── detokenizer · chat        text in and out, without torch
"""
