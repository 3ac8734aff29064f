"""The LLaMA-family decoder (LLaMA 2/3, Mistral, Qwen2, Qwen3) in plain PyTorch.

Three things happen here: a Hugging Face folder becomes a `Transformer` (`load_model`), the model
says how likely given tokens are (`token_logprobs`: SFT, GRPO and the evaluation read from it), and
it continues prompts with a KV cache (`generate`). The module tree carries Hugging Face's names, so
checkpoints and adapters need no renaming table. Try it alone:

    python model.py FOLDER "Once upon a time"

Left out: sliding windows, quantised weights, mixture of experts, tensor parallelism. A checkpoint
that needs one of them is refused by name, never loaded as a silently wrong model.
"""

import json
import math
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------- config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_FIELDS = {  # rope_type: the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


def is_count(x) -> bool:
    return type(x) is int and 0 < x < 1 << 31


def is_positive(x) -> bool:
    return type(x) in (int, float) and 0 < x < 1e300


FIELD_TYPES = {  # type of a field below: what its value must be, and the test of that
    int: ("a positive integer", is_count),
    float: ("a positive number", is_positive),
    bool: ("true or false", lambda x: type(x) is bool),
}


@dataclass
class ModelConfig:
    """The shape of a decoder, in the words of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", its numbers}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    attention_bias: bool = False  # LLaMA: on q, k, v and o. Qwen2 has a bias on q, k, v always.
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, raw: dict, source="config.json") -> "ModelConfig":
        """Reads config.json in the old style (`rope_theta`, `rope_scaling` at top level) and the
        new one (`rope_parameters`). Raises ValueError, naming the field, on what we do not support.
        """
        model_type = raw.get("model_type")
        window = raw.get("sliding_window")  # null: none; absent: none, but in Mistral 4096
        if model_type == "mistral" and "sliding_window" not in raw:
            window = "4096 by default"
        raw = {name: value for name, value in raw.items() if value is not None}
        if model_type != "mistral" and not raw.get("use_sliding_window"):
            window = None  # Qwen files carry a window that is switched off
        lacking = raw.get("layer_types")
        if isinstance(lacking, list):  # the first kind that we lack
            lacking = next((kind for kind in lacking if kind != "full_attention"), None)
        for field, value, supported in (
            ("model_type", model_type, tuple(ARCHITECTURES)),
            ("hidden_act", raw.get("hidden_act", "silu"), ("silu", "swish")),
            ("quantization_config", raw.get("quantization_config") or None, (None,)),
            ("sliding_window", window, (None,)),
            ("is_causal", raw.get("is_causal", True), (True,)),
            ("layer_types", lacking, (None,)),
        ):
            if value not in supported:
                only = ", ".join(map(str, supported))
                value = repr(value)[:40]
                raise ValueError(f"{source}: {field} = {value} is not supported (only {only})")
        if model_type in ("mistral", "qwen2"):
            raw.pop("attention_bias", None)  # these families ignore it, as transformers does
        if model_type != "llama":
            raw.pop("mlp_bias", None)
        raw |= read_rope(raw, source)
        heads = raw.get("num_attention_heads")
        if model_type == "llama":
            raw.setdefault("num_key_value_heads", heads)
        if is_count(heads) and is_count(raw.get("hidden_size")):
            raw.setdefault(
                "head_dim", 128 if model_type == "qwen3" else raw["hidden_size"] // heads
            )
        values = {}
        for f in fields(cls):
            value = values[f.name] = raw.get(f.name, f.default)
            if value is MISSING:
                raise ValueError(f"{source}: the field {f.name} is missing")
            needed, fits = FIELD_TYPES.get(f.type, (None, None))
            if needed and not fits(value):
                raise ValueError(f"{source}: {f.name} is {repr(value)[:40]}, not {needed}")
        if values["num_hidden_layers"] > 1000:
            raise ValueError(f"{source}: num_hidden_layers is above 1000")
        if heads % values["num_key_value_heads"] or values["head_dim"] % 2:
            raise ValueError(f"{source}: key-value heads must divide the heads, head_dim be even")
        return cls(**values)


def read_rope(raw: dict, source) -> dict:
    """-> {"rope_theta", "rope_scaling"}. A `rope_scaling` that a user has added wins over the
    `rope_parameters` that transformers wrote. ValueError on a kind that we do not support."""
    written, added = raw.get("rope_parameters", {}), raw.get("rope_scaling", {})
    if type(written) is not dict or type(added) is not dict:
        raise ValueError(f"{source}: rope_parameters or rope_scaling is not an object")
    rope = added or written
    theta = rope.get("rope_theta", raw.get("rope_theta", written.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(type(value) is dict for value in rope.values()):
        kind = "one for each kind of layer"
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{source}: a partial_rotary_factor is not supported")
    if kind not in tuple(ROPE_FIELDS):  # a tuple: kind may be a list
        only = ", ".join(ROPE_FIELDS)
        kind = repr(kind)[:40]
        raise ValueError(f"{source}: rope_type {kind} is not supported (only {only})")
    for name in ROPE_FIELDS[kind]:
        if not is_positive(rope.get(name)):
            raise ValueError(f"{source}: rope_scaling has no {name} that is a positive number")
    numbers = {name: rope[name] for name in ROPE_FIELDS[kind]}
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(f"{source}: high_freq_factor is not above low_freq_factor")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | numbers if numbers else None}


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """(head_dim / 2,) float32: the angle per position of each pair of coordinates (RoFormer).

    `llama3` scaling (Llama 3.1): long wavelengths are stretched by `factor`, short ones kept, the
    band between them interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    rope = config.rope_scaling
    if rope is None:
        return inv_freq
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, 0: long one
    return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]


# ----------------------------------------------------------------------------------------- model


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()  # the mean square in float32, as Hugging Face does
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVCache:
    """Keys and values of every layer, each (rows, kv heads, slots, head_dim).

    First a row is a prompt, kept as the forward over whole prompts gives it (`positions` None).
    After `start_decoding` a row is one answer: its prompt, then its own tokens, token t in slot t.
    `positions` (rows,) is the slot that the next token of each row takes. Later slots
    (zeros, or a prompt's padding) are masked.
    """

    def __init__(self):
        self.keys, self.values, self.positions = {}, {}, None

    def update(self, layer: int, k, v):
        """Takes the new tokens' keys and values, gives all that these tokens may see."""
        if self.positions is None:  # whole prompts
            self.keys[layer], self.values[layer] = k, v
        else:  # one token a row: k, v (rows, kv heads, 1, head_dim)
            slot = self.positions[:, None, None, None].expand_as(k)
            self.keys[layer].scatter_(2, slot, k)
            self.values[layer].scatter_(2, slot, v)
        return self.keys[layer], self.values[layer]

    def start_decoding(self, owner, lengths, max_new_tokens: int):
        """From here on row r is an answer to prompt owner[r]; lengths (P,) are the prompts'."""
        for kept in (self.keys, self.values):
            for layer, x in kept.items():  # so only one layer is held twice
                kept[layer] = F.pad(x[owner], (0, 0, 0, max_new_tokens))
        self.positions = lengths[owner]

    def mask(self, dtype):
        """(rows, 1, 1, slots): 0 up to each row's newest token, -inf after it."""
        slots = torch.arange(self.keys[0].shape[2], device=self.positions.device)
        seen = slots <= self.positions[:, None, None, None]
        return torch.where(seen, 0.0, -torch.inf).to(dtype)


def rotate(x, cos, sin):
    """RoPE on halves (x1, x2), the layout of Hugging Face checkpoints (not interleaved pairs)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        bias = c.attention_bias or c.model_type == "qwen2"
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.attention_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if c.model_type == "qwen3":
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, kv heads, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if mask is None:  # whole rows
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:  # one token a row: the query heads that share a key head become its queries (with a
            # mask enable_gqa would copy the keys for every head)
            q = q.reshape(B, k.shape[1], -1, self.head_dim)  # (B, kv heads, group, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.reshape(B, -1, 1, self.head_dim)  # (B, heads, 1, D); CUDA's y is not contiguous
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, heads * D)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens to the last hidden states: everything below the head."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.inv_freq = rope_frequencies(c)  # no buffer: .to(bfloat16) must not round it
        self.checkpointing = False  # True: recompute each layer in the backward, for long rows

    def forward(self, tokens, cache: KVCache | None = None):
        """tokens (B, T) -> hidden states (B, T, hidden_size).

        Attention is causal, so right padding never reaches a real token. With a cache the tokens
        are whole prompts; after its `start_decoding` they are (B, 1), each row's next token.
        """
        x = self.embed_tokens(tokens)  # (B, T, hidden)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        mask = None  # whole rows: causal attention needs none
        if cache is not None and cache.positions is not None:
            positions, mask = cache.positions[:, None], cache.mask(x.dtype)  # (B, 1)
        self.inv_freq = self.inv_freq.to(tokens.device)  # copied once, not in each step
        angles = positions[:, None, :, None] * self.inv_freq  # (B or 1, 1, T, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)  # training has no cache
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)  # `model`, `lm_head`: Hugging Face's names
        self.lm_head = None  # tied: the embedding serves as the head
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):  # (V, hidden)
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        if type(self.lm_head) is not nn.Linear:
            raise ValueError("adapters on lm_head are not supported: only its weight is read")
        return self.lm_head.weight

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V). Right padding; padded positions mean nothing."""
        return F.linear(self.model(tokens), self.head_weight)


@contextmanager
def eval_mode(model):
    """Every module in eval mode; at the end, also after an error, each gets its own flag back."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in was_training.items():
            module.training = flag


# ------------------------------------------------------------------------------------- log-probs


class HeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the target tokens, without ever holding all logits.

    For a small model with a large vocabulary the logits are most of the memory and time. But a
    row's log-prob depends on its own hidden state h alone, and with a frozen head W the gradient in
    h is known at once: (onehot - p) W / temperature. So the forward takes a few rows at a
    time and keeps this one vector a row; the backward only scales it. The error onehot - p is taken
    in float32 before it is rounded to W's dtype, for the target as -expm1(log p), which keeps its
    digits where p is near 1.
    """

    LOGITS = 1 << 25  # of one chunk: 128 MB in float32, of which up to three exist at a time

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        # hidden (M, H), weight (V, H), targets (M,) -> logp (M,) float32
        rows = max(1, HeadLogprobs.LOGITS // len(weight))
        logps, jacobians = [], []
        for h, t in zip(hidden.split(rows), targets[:, None].split(rows)):
            all_logp = (F.linear(h, weight).float() / temperature).log_softmax(-1)  # (rows, V)
            logp = all_logp.gather(-1, t)
            logps.append(logp[:, 0])
            if ctx.needs_input_grad[0]:
                error = all_logp.exp_().neg_()  # -p, in the same memory
                error.scatter_(-1, t, -torch.expm1(logp))  # 1 - p at the target: onehot - p
                jacobians.append(error.to(weight.dtype) @ weight / temperature)
        if jacobians:
            ctx.save_for_backward(torch.cat(jacobians))  # (M, H)
        return torch.cat(logps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp):
        (jacobian,) = ctx.saved_tensors
        return grad_logp[:, None].to(jacobian.dtype) * jacobian, None, None, None


def check_length(model, tokens: int):
    """One warning where positions go beyond what the checkpoint was made for."""
    limit = model.config.max_position_embeddings
    if tokens > limit:
        warnings.warn(f"positions beyond max_position_embeddings {limit}", stacklevel=3)


def token_logprobs(model, tokens, labels, temperature=1.0):
    """log p(tokens[t+1] | tokens[..t]) at softmax temperature `temperature`, where labels[t+1] is
    not -100, and 0 elsewhere. tokens, labels (B, T) int64, right padded -> (B, T-1) float32.

    The head runs only at the answer positions, in chunks.
    """
    check_length(model, tokens.shape[1] - 1)
    hidden = model.model(tokens[:, :-1])  # (B, T-1, H): nothing follows the last token
    targets, weight = labels[:, 1:], model.head_weight
    answer = (targets != -100).nonzero(as_tuple=True)  # once, as this waits for the GPU
    h, t = hidden[answer], targets[answer]  # (M, H), (M,)
    if weight.requires_grad:  # only the toy's base is trained whole: let autograd see the head
        logp = -F.cross_entropy(F.linear(h, weight).float() / temperature, t, reduction="none")
    else:
        logp = HeadLogprobs.apply(h, weight, t, temperature)
    zeros = hidden.new_zeros(targets.shape, dtype=torch.float32)
    return zeros.index_put(answer, logp)


# ------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    *,
    temperature=1.0,
    top_p=1.0,
    eos_ids=(),
    samples_per_prompt=1,
    generator=None,
    uniforms=None,
    batch_rows=64,
    return_logprobs=False,
):
    """Continues each prompt `samples_per_prompt` times: list[list[int]] -> [P][G][new tokens].

    The sampled EOS is part of the answer. At most batch_rows answers are decoded together, each
    prompt of them prefilled once. All random numbers are drawn before decoding starts, so what is
    sampled depends neither on when others end nor, but for rounding (in bfloat16 it shows), on
    batch_rows. With return_logprobs also gives [P][G][log-prob of each new token] under
    softmax(logits / temperature). Runs in eval mode and restores each module's flag. `generator`
    lives on the CPU; uniforms (P G, max_new_tokens) are the random numbers where the caller draws
    them. Raises ValueError on an empty prompt, or on settings out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no empty one (add a BOS token?)")
    counts_fit = min(max_new_tokens, samples_per_prompt, batch_rows) >= 1
    if not (counts_fit and temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"generate: max_new_tokens {max_new_tokens}, samples_per_prompt {samples_per_prompt}, "
            f"batch_rows {batch_rows}, temperature {temperature} or top_p {top_p} is out of range"
        )
    check_length(model, max(map(len, prompts)) + max_new_tokens - 1)  # the last is not fed back
    device, R = model.head_weight.device, len(prompts) * samples_per_prompt
    owner = torch.arange(len(prompts), device="cpu").repeat_interleave(samples_per_prompt)  # (R,)
    if uniforms is None:
        settings = {"dtype": torch.float64, "device": "cpu", "generator": generator}
        uniforms = torch.rand(R, max_new_tokens, **settings)
    eos = torch.tensor(list(eos_ids), device=device, dtype=torch.long)
    answers, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    with eval_mode(model):
        for rows in torch.arange(R, device="cpu").split(batch_rows):
            first, last = int(owner[rows[0]]), int(owner[rows[-1]])
            tokens, logps, lengths = generate_rows(
                model,
                prompts[first : last + 1],
                (owner[rows] - first).to(device),
                uniforms[rows].to(device),
                temperature,
                top_p,
                eos,
            )
            for r, t, p, n in zip(rows, tokens.tolist(), logps.tolist(), lengths.tolist()):
                answers[owner[r]].append(t[:n])
                logprobs[owner[r]].append(p[:n])
    return (answers, logprobs) if return_logprobs else answers


def generate_rows(model, prompts, owner, uniforms, temperature, top_p, eos):
    """Row r continues prompts[owner[r]] with the numbers uniforms[r] (max_new_tokens,) -> tokens
    and their log-probs (R, max_new_tokens), and how many of them are each row's answer (R,)."""
    R, max_new_tokens = uniforms.shape
    cache = KVCache()
    logits, lengths = prefill(model, prompts, cache)
    logits = logits[owner]  # (R, V)
    cache.start_decoding(owner, lengths, max_new_tokens)
    tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=logits.device)
    logps = torch.zeros(R, max_new_tokens, dtype=torch.float32, device=logits.device)
    ended = torch.zeros(R, dtype=torch.bool, device=logits.device)
    counts = torch.zeros(R, dtype=torch.long, device=logits.device)
    for step in range(max_new_tokens):
        token, logp = sample(logits, temperature, top_p, uniforms[:, step])
        tokens[:, step], logps[:, step] = token, logp
        counts += ~ended  # the EOS itself counts
        ended |= torch.isin(token, eos)
        if step + 1 == max_new_tokens or (step % 8 == 7 and ended.all()):
            break  # every 8th step only: the check synchronises with the GPU
        logits = decode_one_token(model, token, cache)
    return tokens, logps, counts


def prefill(model, prompts, cache=None):
    """Whole prompts (lists of ids) -> the logits (P, V) of the token that follows each, and the
    prompts' lengths (P,). A cache takes their keys and values."""
    device, longest = model.head_weight.device, max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = [list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    hidden = model.model(torch.tensor(padded, device=device), cache)  # (P, longest, H)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (P, H)
    return F.linear(last, model.head_weight), lengths


def decode_one_token(model, token, cache):
    """token (R,), the newest of each row -> the logits (R, V) that follow.

    Every shape is static and nothing branches on data, so a CUDA graph can hold the step.
    """
    hidden = model.model(token[:, None], cache)  # (R, 1, H)
    cache.positions += 1
    return F.linear(hidden[:, 0], model.head_weight)


def sample(logits, temperature, top_p, uniform):
    """logits (R, V), uniform (R,) in [0, 1) -> token (R,), its log-prob (R,) under
    softmax(logits / temperature).

    temperature 0 takes the most likely token and reports its log-prob at temperature 1. top_p < 1
    restricts what is drawn (nucleus sampling), never the log-prob that is reported.
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:
        p = logp.exp()
        if top_p < 1:  # the smallest set of most likely tokens whose mass reaches top_p
            ordered, index = p.sort(-1, descending=True)
            ordered[ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p] = 0
            p = torch.zeros_like(p).scatter(-1, index, ordered)
        cdf = p.cumsum(-1, dtype=torch.float64)  # inverse-CDF sampling: one uniform number a row
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
        token = token.clamp(max=p.shape[-1] - 1)  # the product may round up to the whole sum
    return token[:, 0], logp.gather(-1, token)[:, 0]


# ------------------------------------------------------------------------------------ checkpoints


def read_json(path) -> dict:
    """A JSON object; ValueError, one line that names the file, on anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def find_model(name) -> Path:
    """A model folder as it is, or a Hub id ("Qwen/Qwen2.5-7B"), downloaded into the Hub's ordinary
    cache: the files that are read here and no others. ValueError if it is neither."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"{name}: no such model folder, and not a Hub id like Qwen/Qwen2.5-7B")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "tokenizer.model", "*.jinja"]
    wanted += ["model.safetensors", "model-*-of-*.safetensors"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # network, access and name errors of several libraries
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(
            f"{name}: no such folder, and the Hub download failed ({reason})"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: the one file (which wins, as in
    transformers), or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{index}: no weight_map of tensor to file")
        return [folder / name for name in sorted(set(shards.values()))]
    raise ValueError(f"{folder}: no model.safetensors (save a pytorch_model.bin as that first)")


@contextmanager
def open_tensors(file: Path, device="cpu"):
    """safe_open, whose errors name the file in one line."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except FileNotFoundError:
        raise ValueError(f"{file}: this shard is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({str(error)[:100]})") from None


def auto_dtype(folder, device) -> torch.dtype:
    """What base weights are best computed in: float32 on the CPU and where the whole checkpoint is
    float32, else bfloat16 (float16 without loss scaling trains badly)."""
    stored = set()
    for file in weight_files(Path(folder)):
        with open_tensors(file) as tensors:
            stored |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu or stored <= {"F32", "F64"} else torch.bfloat16


def load_model(path, device="cpu", dtype: torch.dtype | None = torch.float32) -> Transformer:
    """Loads a Hugging Face model folder (config.json, safetensors in one file or in shards).

    dtype None keeps each tensor as it is stored (to copy; a mix of them does not run). The model is
    built without memory (meta device) and takes the tensors of the memory-mapped file, so no second
    copy exists. Its parameters are frozen: LoRA-PAR never trains the base. Raises ValueError, one
    line that names the file, field or tensor, on anything unsupported, missing, surplus, misshaped
    or truncated.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such model folder")
    config = ModelConfig.from_dict(read_json(folder / "config.json"), folder / "config.json")
    weights = {}
    for file in weight_files(folder):
        with open_tensors(file, device) as tensors:
            for name in tensors.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old files store what rope_frequencies computes
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point() or tensor.element_size() < 2:
                    raise ValueError(f"{file}: {name} is {tensor.dtype}, quantised weights?")
                weights[name] = tensor.to(dtype or tensor.dtype)
                if not weights[name].isfinite().all():
                    kind = weights[name].dtype
                    raise ValueError(f"{file}: {name} holds numbers that are not finite in {kind}")
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        embedding = weights.setdefault("model.embed_tokens.weight", head)
        if not torch.equal(head, embedding):
            warnings.warn(
                f"{folder}: lm_head.weight differs from the embedding: not tied", stacklevel=2
            )
            weights["lm_head.weight"], config.tie_word_embeddings = head, False
    with torch.device("meta"):
        model = Transformer(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # it names what is missing, unexpected or misshaped
        raise ValueError(f"{folder}: {' '.join(str(error).split())[:200]}") from None
    return model.requires_grad_(False).eval()


def save_model(model: Transformer, folder, **extra):
    """Writes config.json, then model.safetensors; `extra` fields (eos_token_id ..) join the config.

    Each is written under a temporary name and renamed, the weights last: a folder that holds them
    is whole.
    """
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    with torch.device("meta"):
        plain = Transformer(model.config)
    if weights.keys() != dict(plain.named_parameters()).keys():
        raise ValueError("save_model writes plain weights: merge the adapters first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config) | {"architectures": [ARCHITECTURES[model.config.model_type]]}
    config |= {"torch_dtype": str(model.head_weight.dtype).removeprefix("torch.")}
    config |= {"sliding_window": None} | extra
    (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "config.json.tmp", folder / "config.json")
    temporary = folder / "model.safetensors.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", temporary)  # save_file's own mode is 0600
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / "model.safetensors")


def main():
    """python model.py FOLDER "prompt": prints the continuation."""
    import argparse
    import sys

    from data import Tokenizer

    parser = argparse.ArgumentParser(description="Continue a prompt with a checkpoint.")
    parser.add_argument("folder", help="a Hugging Face model folder, or a Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--chat", action="store_true", help="ask in the checkpoint's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        folder = find_model(args.folder)
        tokenizer, text = Tokenizer(folder), args.prompt
        if args.chat:
            text = tokenizer.chat([{"role": "user", "content": text}])
        model = load_model(folder, device, auto_dtype(folder, device))
        prompt = tokenizer.encode(text, bos=True)
        settings = {"temperature": 0, "eos_ids": tokenizer.eos_ids}
        new = generate(model, [prompt], args.max_new_tokens, **settings)[0][0]
        print(args.prompt + ("\n" if args.chat else "") + tokenizer.decode(new))
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
