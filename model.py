"""The LLaMA-family decoder (LLaMA 2/3, Mistral, Qwen2, Qwen3) in plain PyTorch.

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
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------- config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
ROPE_FIELDS = {"default": [], "linear": ["factor"], "llama3": LLAMA3.split()}  # of rope_scaling


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
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", "factor": ...}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    attention_bias: bool = False  # LLaMA: on q, k, v and o. Qwen2 has a bias on q, k, v always.
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Reads config.json in the old style (`rope_theta`, `rope_scaling` at top level) and the
        new one (`rope_parameters`). Raises ValueError, naming the field, on what we do not support.
        """
        model_type = raw.get("model_type")
        window = raw.get("sliding_window")
        if model_type == "mistral" and "sliding_window" not in raw:
            window = 4096  # what an absent field means
        if model_type in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
            window = None  # Qwen files carry a window that is switched off
        if "sliding_attention" in (raw.get("layer_types") or ()):
            window = window or "sliding_attention"
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
        partial = raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        for field, value, supported in (
            ("model_type", model_type, tuple(ARCHITECTURES)),
            ("hidden_act", raw.get("hidden_act", "silu"), ("silu", "swish")),
            ("quantization_config", raw.get("quantization_config") or None, (None,)),
            ("sliding_window", window, (None,)),
            ("rope_type", rope["rope_type"], tuple(ROPE_FIELDS)),
            ("partial_rotary_factor", partial, (1.0,)),
        ):
            if value not in supported:
                only = ", ".join(map(str, supported))
                raise ValueError(f"{source}: {field} = {value!r} is not supported (only {only})")
        for needed in ROPE_FIELDS[rope["rope_type"]]:
            if needed not in rope:
                raise ValueError(f"{source}: rope_scaling has no {needed}")
        config = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        for f in fields(cls)[:5]:  # those of every checkpoint
            if f.name not in config:
                raise ValueError(f"{source}: the field {f.name} is missing")
        heads = config["num_attention_heads"]
        head_dim = 128 if model_type == "qwen3" else config["hidden_size"] // heads
        config = {"num_key_value_heads": heads, "head_dim": head_dim} | config
        scaling = None if rope["rope_type"] == "default" else rope
        return cls(**config | {"rope_theta": theta, "rope_scaling": scaling})


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
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
    """The keys and values of every layer, each (rows, kv heads, slots, head_dim).

    A row is one answer: its prompt, then its own tokens, token t in slot t. Slots beyond a row's
    position hold zeros or its prompt's padding and are masked.
    """

    def __init__(self, c: ModelConfig, rows: int, slots: int, like):
        shape = rows, c.num_key_value_heads, slots, c.head_dim
        self.keys = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]

    def fill(self, layer: int, k, v, owner):
        """The prompts' keys and values (P, kv heads, L, head_dim); row r takes prompt owner[r]."""
        self.keys[layer][:, :, : k.shape[2]] = k[owner]
        self.values[layer][:, :, : v.shape[2]] = v[owner]

    def append(self, layer: int, k, v, positions):
        """One more token a row: k, v (rows, kv heads, 1, head_dim) go to slot positions[r]."""
        slot = positions[:, None, None, None].expand_as(k)
        self.keys[layer].scatter_(2, slot, k)
        self.values[layer].scatter_(2, slot, v)

    def keep(self, rows):
        """Only these rows go on. Layer by layer, so that one old layer at a time lives on."""
        for kept in (self.keys, self.values):
            for layer in range(len(kept)):
                kept[layer] = kept[layer][rows]


def rotate(x, cos, sin):
    """RoPE on halves (x1, x2), the layout of Hugging Face checkpoints (not interleaved pairs)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.grouped = c.num_key_value_heads != c.num_attention_heads
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

    def forward(self, x, cos, sin, cache=None, owner=None, positions=None, mask=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, kv heads, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if positions is None:  # whole rows
            if cache:
                cache.fill(self.layer, k, v, owner)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:  # one more token a row
            cache.append(self.layer, k, v, positions)
            k, v = cache.keys[self.layer], cache.values[self.layer]
            q = q.view(B, k.shape[1], -1, self.head_dim)  # the queries of a key head are its rows
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.reshape(B, -1, 1, self.head_dim)  # no view: CUDA's kernel has its own layout
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, *attention_inputs):
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
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

    def forward(self, tokens, cache=None, owner=None, positions=None):
        """tokens (B, T) -> hidden states (B, T, hidden_size).

        Attention is causal, so right padding never reaches a real token. With a cache, tokens are
        prompts, and row r of the cache keeps prompt owner[r]. With positions (B,) too, tokens
        (B, 1) are the next token of each of its rows, at that position.
        """
        x = self.embed_tokens(tokens)  # (B, T, hidden)
        steps = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        mask = None
        if positions is not None:
            steps = positions[:, None]  # (B, 1)
            slots = torch.arange(cache.keys[0].shape[2], device=tokens.device)
            mask = torch.where(slots <= steps, 0.0, -torch.inf).to(x.dtype)[:, None, None]
        self.inv_freq = self.inv_freq.to(tokens.device)  # once: a copy in each step would wait
        angles = steps[:, None, :, None] * self.inv_freq  # (B or 1, 1, T, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache, owner, positions, mask)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
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


# ------------------------------------------------------------------------------------- log-probs


class HeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the target tokens, without ever holding all logits.

    Row i's log-prob depends on hidden row i alone, and with a frozen head its gradient there is
    known as soon as the probabilities p are: (onehot - p) W / temperature. So the forward takes a
    few rows at a time, keeps that one vector a row, and the backward only scales it. The error
    onehot - p is taken in float32, for the target as -expm1(log p), before anything is rounded to
    W's dtype: W[target] - p W in bf16 would cancel to noise where p is near 1.
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
                error = all_logp.exp_().neg_().scatter_(-1, t, -torch.expm1(logp))  # onehot - p
                jacobians.append(error.to(weight.dtype) @ weight / temperature)
        if jacobians:
            ctx.save_for_backward(torch.cat(jacobians))  # (M, H)
        return torch.cat(logps)

    @staticmethod
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
    answer = targets != -100
    h, t = hidden[answer], targets[answer]  # (M, H), (M,)
    if weight.requires_grad:  # training the base itself: let autograd see the head
        logp = -F.cross_entropy(F.linear(h, weight).float() / temperature, t, reduction="none")
    else:
        logp = HeadLogprobs.apply(h, weight, t, temperature)
    return torch.zeros(targets.shape, device=logp.device).index_put((answer,), logp)


# ------------------------------------------------------------------------------------ generation


def prefill(model, prompts, cache=None, owner=None):
    """Whole prompts (lists of ids) -> the logits (P, V) of the token that follows each. With a
    cache, its row r takes the keys and values of prompt owner[r]."""
    device = model.head_weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    padded = [p + [0] * (max(map(len, prompts)) - len(p)) for p in prompts]
    hidden = model.model(torch.tensor(padded, device=device), cache, owner)  # (P, L, H)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    return F.linear(last, model.head_weight)


def decode_one_token(model, token, positions, cache):
    """token (R,), the newest of each row, at positions (R,) -> the logits (R, V) that follow.

    Every shape is static and nothing branches on data, so that a GPU can replay one recorded step.
    """
    hidden = model.model(token[:, None], cache, positions=positions)
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
        token = token.clamp(max=p.shape[-1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]


LOOK_EVERY = 4  # steps between looks at which rows have ended: a look waits for the device


def generate_rows(model, prompts, owner, uniforms, temperature, top_p, eos):
    """Row r continues prompts[owner[r]] with the numbers uniforms[r] (max_new_tokens,) -> tokens
    and their log-probs (R, max_new_tokens); what stands behind a row's first EOS means nothing."""
    R, max_new_tokens = uniforms.shape
    slots = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, R, slots, model.head_weight)
    logits = prefill(model, prompts, cache, owner)[owner]  # (R, V)
    lengths = torch.tensor([len(p) for p in prompts], device=logits.device)[owner]  # (R,)
    tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=logits.device)
    logps = torch.zeros(R, max_new_tokens, device=logits.device)
    alive = torch.arange(R, device=logits.device)  # the rows that the cache still holds
    ended = torch.zeros(R, dtype=torch.bool, device=logits.device)
    for step in range(max_new_tokens):
        token, logp = sample(logits, temperature, top_p, uniforms[alive, step])
        tokens[alive, step], logps[alive, step] = token, logp
        ended = ended | torch.isin(token, eos)
        if step + 1 == max_new_tokens:
            break
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) <= len(ended) // 2:  # then copying the cache pays
                cache.keep(going)
                alive, ended, token, lengths = (x[going] for x in (alive, ended, token, lengths))
        logits = decode_one_token(model, token, lengths + step, cache)
    return tokens, logps


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
    batch_rows=64,
    return_logprobs=False,
):
    """Continues each prompt `samples_per_prompt` times: list[list[int]] -> [P][G][new tokens].

    The sampled EOS is part of the answer. At most batch_rows answers are decoded together, each
    prompt of them prefilled once. All random numbers are drawn before decoding starts, so what is
    sampled depends neither on batch_rows nor on when others end. With return_logprobs also
    gives [P][G][log-prob of each new token] under softmax(logits / temperature). Runs in eval mode
    and restores the mode. `generator` lives on the CPU. Raises ValueError on an empty prompt, or on
    settings out of range.
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
    owner = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)  # row -> prompt
    uniforms = torch.rand(R, max_new_tokens, dtype=torch.float64, generator=generator)
    eos = torch.tensor(list(eos_ids), device=device, dtype=torch.long)
    holders = [m for m in model.modules() if hasattr(m, "hold")]  # LoRA layers
    was_training = model.training
    model.eval()
    answers, logps = [], []
    try:
        for layer in holders:
            layer.hold(True)
        for rows in torch.arange(R).split(batch_rows):
            first, last = int(owner[rows[0]]), int(owner[rows[-1]])
            owners, numbers = (owner[rows] - first).to(device), uniforms[rows].to(device)
            new_tokens, new_logps = generate_rows(
                model, prompts[first : last + 1], owners, numbers, temperature, top_p, eos
            )
            is_eos = torch.isin(new_tokens, eos)
            count = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, max_new_tokens).tolist()
            answers += [t[:n] for t, n in zip(new_tokens.tolist(), count)]
            logps += [p[:n] for p, n in zip(new_logps.tolist(), count)]
    finally:
        for layer in holders:
            layer.hold(False)
        model.train(was_training)
    G = samples_per_prompt
    answers, logps = ([x[i : i + G] for i in range(0, R, G)] for x in (answers, logps))
    return (answers, logps) if return_logprobs else answers


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


@contextmanager
def open_tensors(file: Path, device="cpu"):
    """safe_open, whose errors name the file in one line."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except FileNotFoundError:
        raise ValueError(f"{file}: this shard is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def auto_dtype(folder, device) -> torch.dtype:
    """What base weights are best computed in: float32 on the CPU and where the whole checkpoint is
    float32, else bfloat16 (float16 without loss scaling trains badly)."""
    stored = set()
    for file in weight_files(Path(folder)):
        with open_tensors(file) as tensors:
            stored |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu or stored == {"F32"} else torch.bfloat16


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
    config = ModelConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    waiting = dict(model.named_parameters())
    for file in weight_files(folder):
        with open_tensors(file, device) as tensors:
            for name in tensors.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old files store what rope_frequencies computes
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # tied heads are sometimes stored as well
                if name not in waiting:
                    raise ValueError(f"{file}: unexpected tensor {name}")
                tensor, expected = tensors.get_tensor(name), waiting.pop(name)
                if tensor.shape != expected.shape:
                    shapes = f"{tuple(tensor.shape)}, config.json says {tuple(expected.shape)}"
                    raise ValueError(f"{file}: {name} has shape {shapes}")
                if not tensor.is_floating_point() or tensor.element_size() < 2:
                    raise ValueError(f"{file}: {name} is {tensor.dtype}, quantised weights?")
                parent, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(tensor.to(dtype or tensor.dtype), requires_grad=False)
                setattr(model.get_submodule(parent), leaf, parameter)
    if waiting:
        raise ValueError(f"{folder}: {len(waiting)} tensors are missing, first {min(waiting)}")
    return model.eval()


def save_model(model: Transformer, folder, **extra):
    """Writes config.json, then model.safetensors; `extra` fields (eos_token_id ..) join the config.

    Each is written under a temporary name and renamed, the weights last: a folder that holds them
    is whole.
    """
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    if any(".lora_" in name for name in state):
        raise ValueError("save_model writes plain weights: merge the adapters first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config) | {"architectures": [ARCHITECTURES[model.config.model_type]]}
    config |= {"torch_dtype": str(model.head_weight.dtype).removeprefix("torch.")}
    config |= {"sliding_window": None} | extra
    (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "config.json.tmp", folder / "config.json")
    temporary = folder / "model.safetensors.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", temporary)  # save_file's own mode is 0600
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
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        folder = find_model(args.folder)
        tokenizer, text = Tokenizer(folder), args.prompt
        if args.chat:
            text = tokenizer.chat([{"role": "user", "content": text}])
        model = load_model(folder, args.device, auto_dtype(folder, args.device))
        new = generate(
            model,
            [tokenizer.encode(text, bos=True)],
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            eos_ids=tokenizer.eos_ids,
            generator=torch.Generator().manual_seed(args.seed),
        )[0][0]
        print(args.prompt + ("\n" if args.chat else "") + tokenizer.decode(new))
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
