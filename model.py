"""The LLaMA-family decoder (LLaMA 2/3, Mistral, Qwen2) in plain PyTorch.

Three things happen here: a Hugging Face folder becomes a `Transformer` (`load_model`), the model
says how likely given tokens are (`token_logprobs`: every loss of this project comes from it), and
it continues prompts with a KV cache (`generate`). The module tree carries Hugging Face's names,
so checkpoints and adapters need no renaming table. Try it alone:

    python model.py FOLDER "Once upon a time"

Left out: sliding windows, quantised weights, mixture of experts, tensor parallelism. A checkpoint
that needs one of them is refused by name, never loaded as a silently wrong model.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------- config


@dataclass
class Config:
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
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", "factor": ...}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    attention_bias: bool = False  # LLaMA: on q, k, v and o. Qwen2 has a bias on q, k, v always.
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "Config":
        """Reads config.json in the old style (`rope_theta`, `rope_scaling` at top level) and the
        new one (`rope_parameters`). Raises ValueError, naming the field, on what we do not support.
        """

        def refuse(field, value, supported):
            raise ValueError(f"{source}: {field} = {value!r} is not supported (only {supported})")

        model_type = raw.get("model_type")
        if model_type not in ("llama", "mistral", "qwen2"):
            refuse("model_type", model_type, "llama, mistral, qwen2")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            refuse("hidden_act", raw["hidden_act"], "silu")
        if raw.get("quantization_config"):
            refuse("quantization_config", "...", "unquantised weights")
        window = raw.get("sliding_window")
        if model_type == "qwen2" and not raw.get("use_sliding_window", False):
            window = None  # Qwen2 files carry a window that is switched off
        if window is not None or "sliding_attention" in (raw.get("layer_types") or ()):
            refuse("sliding_window", window, "full attention")

        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            refuse("rope_type", rope["rope_type"], "default, linear, llama3")
        if raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
            refuse("partial_rotary_factor", "...", "1.0")
        try:
            heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=hidden,
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or hidden // heads,
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=None if rope["rope_type"] == "default" else rope,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                model_type=model_type,
                attention_bias=raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
            )
        except KeyError as missing:
            raise ValueError(f"{source}: the field {missing} is missing") from None


def rope_frequencies(config: Config) -> torch.Tensor:
    """(head_dim / 2,) float32: the angle per position of each pair of coordinates (RoFormer).

    `llama3` scaling (Llama 3.1): long wavelengths are stretched by `factor`, short ones kept, the
    band between them interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, 0: long one
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


# ----------------------------------------------------------------------------------------- model

# PyTorch's own x86 CPU matrix product is MKL's. oneDNN, which it ships too, takes 0.3 to 0.85 of
# MKL's time on AMD (README), and is within reach only by these operators of torch.compile's.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
ONEDNN_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
ONEDNN_SIZE = 1 << 18  # elements of a weight; for fewer the call costs more than it saves


class FrozenLinear(torch.autograd.Function):
    """x W^T by oneDNN, x (..., in), W (out, in), both float32 on the CPU; no gradient for W."""

    @staticmethod
    def forward(x, weight):
        return ONEDNN_LINEAR(x, weight, None, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return linear(grad, ctx.saved_tensors[0].T), None

    @staticmethod
    def vmap(info, in_dims, x, weight):
        if in_dims[1] is not None:
            return torch.vmap(F.linear, in_dims)(x, weight), 0
        return linear(x.movedim(in_dims[0], 0), weight), 0  # one more leading dimension


def for_onednn(weight):
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    large = weight.numel() >= ONEDNN_SIZE
    return on_cpu and large and not weight.requires_grad and ONEDNN_LINEAR is not None


def linear(x, weight, bias=None):
    """F.linear, by the quickest kernel at hand (which knows no autocast, nor forward-mode AD)."""
    if not for_onednn(weight):
        return F.linear(x, weight, bias)
    y = FrozenLinear.apply(x, weight)
    return y if bias is None else y + bias


def pack(weight):
    """A copy in oneDNN's own layout for `linear` without gradients, where that is quicker (above
    all for a few rows); elsewhere the weight itself."""
    return ONEDNN_PACK(weight) if for_onednn(weight) and ONEDNN_PACK is not None else weight


class Linear(nn.Linear):
    product, pack = staticmethod(linear), staticmethod(pack)  # used by a LoRA layer in its place
    packed = None

    def decode(self, on: bool):
        self.packed = pack(self.weight.detach()) if on else None

    def forward(self, x):
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()  # the mean square in float32, as Hugging Face does
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x, cos, sin):
    """RoPE on halves (x1, x2), the layout of Hugging Face checkpoints (not interleaved pairs)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.grouped = c.num_key_value_heads != c.num_attention_heads
        bias = c.attention_bias or c.model_type == "qwen2"
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, bias=bias)
        self.k_proj = Linear(c.hidden_size, keys, bias=bias)
        self.v_proj = Linear(c.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, cos, sin, mask=None, cache=None, slot=0):
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache and slot:
            y = decode_attention(q, k, v, cache, mask, slot)
        elif mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:
            if self.grouped:  # on CUDA no quick kernel takes a mask and grouped keys
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if cache and not slot:  # a prefill: take the prompts' keys and values along
            cache[0][:, :, :T], cache[1][:, :, :T] = k, v
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def decode_attention(q, k, v, cache, mask, slot):
    """One more token for each of R = P * G rows: q (R, heads, 1, D), k and v (R, kv heads, 1, D).

    cache: keys and values, both (P, kv heads, slots, D). The G rows of a prompt share a cache, a
    step's tokens take G slots of it, and the rows ask it together, as G queries a head: so a prompt
    is stored and read once. mask (P, 1, G * heads / kv heads, slots): see `decode_mask`.
    """
    (P, heads, _, D), G = cache[0].shape, len(q) // len(cache[0])
    for kept, new in zip(cache, (k, v)):
        kept[:, :, slot : slot + G] = new.view(P, G, heads, D).transpose(1, 2)
    keys, values = (kept[:, :, : slot + G] for kept in cache)
    q = q.view(P, G, heads, -1, D).transpose(1, 2).reshape(P, heads, -1, D)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[..., : slot + G])
    return y.view(P, heads, G, -1, D).transpose(1, 2).reshape(P * G, -1, 1, D)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, *attention_inputs):
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens to the last hidden states: everything below the head."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.register_buffer("inv_freq", rope_frequencies(c), persistent=False)
        self.checkpointing = False  # True: recompute each layer in the backward, for long rows

    def forward(self, tokens, positions=None, mask=None, caches=None, slot=0):
        """tokens (B, T) -> hidden states (B, T, hidden_size).

        Without a mask attention is causal, so right padding never reaches a real token; a mask
        (B, 1, T, T) of 0 and -inf says what a token sees. caches, keys and values a layer, take the
        prompts' along at slot 0; at a later slot this is a step of decoding (`decode_attention`).
        """
        x = self.embed_tokens(tokens)  # (B, T, hidden)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        angles = positions[:, None, :, None] * self.inv_freq  # (B or 1, 1, T, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, caches and caches[i], slot)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None  # tied: the embedding serves as the head
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):  # (V, hidden)
        return (self.lm_head or self.model.embed_tokens).weight

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V). Right padding; padded positions mean nothing."""
        return linear(self.model(tokens), self.head_weight)


# ------------------------------------------------------------------------------------- log-probs


class HeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the target tokens, without ever holding all logits.

    Row i's log-prob depends on hidden row i alone, and with a frozen head its gradient there is
    known as soon as the probabilities p are: (W[target] - p W) / temperature. So the forward takes
    a few rows at a time, keeps that one vector a row, and the backward only scales it.
    """

    # float32 logits that exist at any moment: on the CPU few enough that malloc reuses the pages
    CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}

    @staticmethod
    def forward(hidden, weight, targets, temperature, with_grad):
        # hidden (M, H), weight (V, H), targets (M,) -> logp (M,), jacobian (M, H)
        rows = max(1, HeadLogprobs.CHUNK.get(weight.device.type, 1 << 22) // len(weight))
        logps, jacobians = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows)):
            logits = linear(h, weight).float()
            logp_all = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
            logps.append(logp_all.gather(-1, t[:, None])[:, 0])
            if with_grad:
                expected = linear(logp_all.exp().to(weight.dtype), weight.T)
                jacobians.append((weight[t] - expected) / temperature)
        return torch.cat(logps), torch.cat(jacobians) if with_grad else hidden.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_logp, _):
        (jacobian,) = ctx.saved_tensors
        return grad_logp[:, None].to(jacobian.dtype) * jacobian, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, hidden, weight, targets, temperature, with_grad):
        """A batch of examples is so many more rows, in the same chunks."""
        hidden, targets = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in ((hidden, in_dims[0]), (targets, in_dims[2]))
        )
        flat = hidden.flatten(0, 1), weight, targets.flatten(), temperature, with_grad
        logp, jacobian = HeadLogprobs.apply(*flat)
        if with_grad:
            jacobian = jacobian.view(hidden.shape)
        return (logp.view(targets.shape), jacobian), (0, 0 if with_grad else None)


def packed_attention(segments, dtype):
    """segments (B, T) -> positions (B, T) and mask (B, 1, T, T), 0 or -inf, of several answers
    packed behind one prompt: a token sees what is before it in its own segment and in segment 0."""
    own, other = segments[:, :, None], segments[:, None, :]
    seen = ((own == other) | (other == 0)).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return seen.sum(-1) - 1, mask[:, None]


def token_logprobs(model, tokens, labels, temperature=1.0, answer_tokens=None, segments=None):
    """log p(tokens[t+1] | tokens[..t]) at softmax temperature `temperature`, where labels[t+1] is
    not -100, and 0 elsewhere. tokens, labels (B, T) int64, right padded -> (B, T-1) float32.

    The head runs only at the answer positions, in chunks. `answer_tokens`, an upper bound on the
    number of them in a row, makes every shape static, which `torch.func.vmap` asks for. With
    segments (B, T) a row packs several answers behind one prompt (`packed_attention`).
    """
    weight, packed = model.head_weight, ()
    if segments is not None:
        packed = packed_attention(segments[:, :-1], weight.dtype)
    hidden = model.model(tokens[:, :-1], *packed)  # (B, T-1, H): nothing follows the last token
    targets = labels[:, 1:]
    answer = targets != -100
    rows = answer.nonzero(as_tuple=True) if answer_tokens is None else None
    if rows is None:  # the first `answer_tokens` columns after a stable sort hold every answer
        columns = (~answer).byte().argsort(dim=1, stable=True)[:, :answer_tokens]
        rows = (torch.arange(len(tokens), device=tokens.device)[:, None], columns)
    h, t = hidden[rows].flatten(0, -2), targets[rows].flatten()
    if weight.requires_grad:  # training the base itself: let autograd see the head
        logp = (F.linear(h, weight).float() / temperature).log_softmax(-1)
        logp = logp.gather(-1, t.clamp(min=0)[:, None])[:, 0]
    else:
        with_grad = torch.is_grad_enabled()
        logp, _ = HeadLogprobs.apply(h, weight, t.clamp(min=0), temperature, with_grad)
    logp = torch.where(t != -100, logp, 0.0).view(rows[1].shape)
    return torch.zeros(targets.shape, device=logp.device).index_put(rows, logp)


@torch.no_grad()
def next_logprobs(model, prompts):
    """Log-probs of the token after each prompt (lists of ids): (P, V) float32. For letters."""
    lengths = torch.tensor([len(p) for p in prompts])
    rows = [p + [0] * (int(lengths.max()) - len(p)) for p in prompts]
    hidden = model.model(torch.tensor(rows, device=model.head_weight.device))
    last = hidden[torch.arange(len(prompts)), lengths - 1]
    return linear(last, model.head_weight).float().log_softmax(-1)


# ------------------------------------------------------------------------------------ generation


def sample(logits, temperature, top_p, generator):
    """logits (R, V) -> token (R,), its log-prob (R,) under softmax(logits / temperature).

    temperature 0 takes the most likely token and reports its log-prob at temperature 1. top_p < 1
    restricts what is drawn (nucleus sampling), never the log-prob that is reported.
    """
    logits = logits.float()
    logp = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:
        p = logp.exp()
        if top_p < 1:  # the smallest set of most likely tokens whose mass reaches top_p
            ordered, index = p.sort(-1, descending=True)
            ordered[ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p] = 0
            p = torch.zeros_like(p).scatter(-1, index, ordered)
        cdf = p.cumsum(-1, dtype=torch.float64)  # inverse-CDF sampling: one uniform number a row
        u = torch.rand(len(p), 1, dtype=cdf.dtype, device=cdf.device, generator=generator)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]


SHARED = 8  # rows to a cache at most: each also passes over the others' tokens there


def decode_mask(lengths, G, L, slots, c: Config, dtype):
    """What each of the G rows of a prompt sees of their cache: the prompt, of lengths (P,), in the
    first L slots, then every G-th one. (P, 1, G * heads / kv heads, slots), 0 or -inf."""
    slot = torch.arange(slots, device=lengths.device)
    row = torch.arange(G, device=lengths.device)[:, None]
    seen = (slot < lengths[:, None, None]) | ((slot >= L) & ((slot - L) % G == row))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1)[:, None]


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
    return_logprobs=False,
):
    """Continues each prompt `samples_per_prompt` times: list[list[int]] -> [P][G][new tokens].

    The sampled EOS is part of the answer. Each prompt is prefilled once and its keys are shared
    out to its samples; rows that have ended leave the batch. With return_logprobs also gives
    [P][G][log-prob of each new token] under softmax(logits / temperature). Runs in eval mode and
    restores the mode. `generator` must live on the model's device. Raises ValueError on an empty
    prompt, or on settings out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no empty one (add a BOS token?)")
    if max_new_tokens < 1 or samples_per_prompt < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"generate: max_new_tokens {max_new_tokens}, samples_per_prompt {samples_per_prompt}, "
            f"temperature {temperature} or top_p {top_p} is out of range"
        )
    c, weight = model.config, model.head_weight
    device, R = weight.device, len(prompts) * samples_per_prompt
    G = max(g for g in range(1, SHARED + 1) if samples_per_prompt % g == 0)  # rows to a cache
    head = pack(weight)
    layers = [m for m in model.model.modules() if hasattr(m, "decode")]
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    L = int(lengths.max())
    tokens = torch.tensor([p + [0] * (L - len(p)) for p in prompts], device=device)  # (P, L)
    slots = L + G * max_new_tokens  # of a prompt's cache: the prompt, then G rows' tokens in turn
    room = (len(prompts), c.num_key_value_heads, slots, c.head_dim)
    was_training = model.training
    model.eval()
    try:
        for layer in layers:  # whose weights stay as they are from here on
            layer.decode(True)
        caches = [[weight.new_empty(room) for _ in "kv"] for _ in range(c.num_hidden_layers)]
        hidden = model.model(tokens, caches=caches)  # prefill (P, L, H)
        hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]
        logits = linear(hidden, head).repeat_interleave(samples_per_prompt, 0)  # (R, V)
        positions = lengths.repeat_interleave(samples_per_prompt)[:, None]  # (R, 1)
        if samples_per_prompt > G:
            for cache in caches:
                cache[:] = (x.repeat_interleave(samples_per_prompt // G, 0) for x in cache)
        mask = decode_mask(positions[::G, 0], G, L, slots, c, weight.dtype)

        eos = torch.tensor(list(eos_ids), device=device, dtype=torch.long)
        new_tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
        new_logps = torch.zeros(R, max_new_tokens, device=device)
        alive = torch.arange(R, device=device)  # batch row -> answer
        ended = torch.zeros(R, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            token, logp = sample(logits, temperature, top_p, generator)
            new_tokens[alive, step], new_logps[alive, step] = token, logp
            ended = ended | torch.isin(token, eos)
            if step == max_new_tokens - 1:
                break
            if device.type == "cpu" or step % 16 == 15:  # elsewhere to look is to wait
                keep = (~ended).nonzero()[:, 0]
                if not len(keep):
                    break
                if len(keep) <= len(ended) // 2:  # the others move up, each with a cache of its own
                    own = torch.arange(L + max_new_tokens, device=device)
                    own = torch.where(own < L, own, L + (own - L) * G + keep[:, None] % G)
                    for cache in caches:  # (rows, kv heads, L + max_new_tokens, head_dim)
                        taken = (x[keep[:, None] // G, :, own] for x in cache)
                        cache[:] = (x.transpose(1, 2).contiguous() for x in taken)
                    positions, alive = positions[keep], alive[keep]
                    token, ended, G = token[keep], ended[keep], 1
                    mask = decode_mask(positions[:, 0], G, L, own.shape[1], c, weight.dtype)
            hidden = model.model(token[:, None], positions + step, mask, caches, L + G * step)
            logits = linear(hidden[:, 0], head)
    finally:
        for layer in layers:
            layer.decode(False)
        model.train(was_training)

    is_eos = torch.isin(new_tokens, eos)
    count = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, max_new_tokens)  # first EOS
    rows = zip(new_tokens.tolist(), new_logps.tolist(), count.tolist())
    answers = [(t[:n], p[:n]) for t, p, n in rows]
    groups = [answers[i : i + samples_per_prompt] for i in range(0, R, samples_per_prompt)]
    completions = [[t for t, _ in group] for group in groups]
    if not return_logprobs:
        return completions
    return completions, [[p for _, p in group] for group in groups]


# ------------------------------------------------------------------------------------ checkpoints


def read_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def find_model(name) -> Path:
    """A model folder as it is, or a Hub id ("Qwen/Qwen2.5-7B"), downloaded into the Hub's ordinary
    cache: weights and tokenizer files only. ValueError if it is neither."""
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or Path(name).is_absolute() or str(name).startswith("."):
        raise ValueError(f"{name}: no such model folder, and not a Hub id like Qwen/Qwen2.5-7B")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # network, access and name errors of several libraries
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}: no such folder, nor to be had from the Hub ({reason})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one file, or the shards its index names."""
    if (folder / "model.safetensors.index.json").exists():
        index = read_json(folder / "model.safetensors.index.json")
        names = sorted(set((index.get("weight_map") or {}).values()))
        if not names:
            raise ValueError(f"{folder}/model.safetensors.index.json: no weight_map")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"{folder}: only pytorch_model.bin is there; save it as safetensors first")
    raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def load_model(path, device="cpu", dtype: torch.dtype | None = torch.float32) -> Transformer:
    """Loads a Hugging Face model folder (config.json, safetensors in one file or in shards).

    dtype None keeps each tensor as it is stored. The model is built without memory (meta device)
    and takes tensor after tensor from the memory-mapped file, so no second copy exists. Its
    parameters are frozen: LoRA-PAR never trains the base. Raises ValueError, one line that names
    the file, field or tensor, on anything unsupported, missing, surplus, misshaped or truncated.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such model folder")
    config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    waiting = dict(model.named_parameters())
    loaded = set()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old files store what rope_frequencies computes
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue  # tied heads are sometimes stored as well
                    if name not in waiting:
                        raise ValueError(f"{file}: unexpected tensor {name}")
                    tensor, expected = tensors.get_tensor(name), waiting[name]
                    if tensor.shape != expected.shape:
                        shapes = f"{tuple(tensor.shape)}, config.json says {tuple(expected.shape)}"
                        raise ValueError(f"{file}: {name} has shape {shapes}")
                    if not tensor.is_floating_point() or tensor.element_size() < 2:
                        raise ValueError(f"{file}: {name} is {tensor.dtype}, quantised weights?")
                    owner, _, leaf = name.rpartition(".")
                    parameter = nn.Parameter(tensor.to(dtype or tensor.dtype), requires_grad=False)
                    setattr(model.get_submodule(owner), leaf, parameter)
                    loaded.add(name)
        except FileNotFoundError:
            raise ValueError(f"{file}: this shard is missing") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    missing = sorted(set(waiting) - loaded)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
    model.model.inv_freq = rope_frequencies(config).to(device)
    return model.eval()


def save_model(model: Transformer, folder, **extra):
    """Writes config.json and model.safetensors; `extra` fields (eos_token_id ...) join the config.

    Both are written under a temporary name and renamed, so a save that dies half-way leaves the
    old files whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    }
    config = asdict(model.config) | {"architectures": [names[model.config.model_type]]} | extra
    config |= {"torch_dtype": str(model.head_weight.dtype).removeprefix("torch.")}
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "config.json.tmp", folder / "config.json")


def main():
    """python model.py FOLDER "prompt": prints the continuation."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(description="Continue a prompt with a checkpoint.")
    parser.add_argument("folder", help="a Hugging Face model folder, or a Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        folder = find_model(args.folder)
        cuda = args.device.startswith("cuda")
        model = load_model(folder, args.device, None if cuda else torch.float32)
        if (folder / "tokenizer.json").exists():
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            ids, decode = tokenizer.encode(args.prompt).ids, tokenizer.decode
        elif (folder / "tokenizer.model").exists():
            import sentencepiece

            tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
            ids, decode = tokenizer.encode(args.prompt, add_bos=True), tokenizer.decode
        else:
            raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model")
        settings = read_json(folder / "config.json")
        if (folder / "generation_config.json").exists():
            settings |= read_json(folder / "generation_config.json")
        eos = settings.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        new = generate(
            model,
            [ids],
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            eos_ids=eos,
            generator=torch.Generator(args.device).manual_seed(args.seed),
        )[0][0]
        print(decode(ids + [t for t in new if t not in eos]))
    except ValueError as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
