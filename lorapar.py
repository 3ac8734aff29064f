"""LoRA-PAR's method: element-wise importance, the partition of LoRA parameters, masked training.

Every element phi_j of every LoRA factor gets an importance for System 1 and for System 2,
I_j = |g_j phi_j - 1/2 F_jj phi_j^2|, and a stage trains only the elements its system needs:

    add_lora(model)                              # W x + s (B A - B0 A0) x,  W frozen
    s1, s2 = importance(model, s1_batches), importance(model, s2_batches)
    part = partition(s1, s2, theta=0.9)          # S1-only, S2-only, shared
    set_mask(model, stage_mask(part, s1, stage=1, fraction=1.0))
    optimizer = MaskedAdamW(model, lr=2e-4)      # frozen elements stay bit-identical

The file stands alone: it works on any `nn.Module` whose leaves are `nn.Linear` and which maps
tokens (B, T) to logits (B, T, V). Paper: Huang et al., LoRA-PAR, Findings of EMNLP 2025.
Left out: DoRA, adapters on embeddings, quantised bases; load_adapter refuses them by name.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
PROJECTIONS |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}

# ------------------------------------------------------------------------------------ LoRA layers


class LoRALinear(nn.Linear):
    """y = W x + s (B A - B0 A0) x, with A (r, in), B (out, r) trained and W, A0, B0 frozen.

    The anchor A0, B0 is a frozen copy of the start, so at step 0 the layer is exactly W x whatever
    the start is; without an anchor this is plain LoRA. The factors are float32 and cast where
    they are used. `mask_A`, `mask_B` (bool) say which elements the current stage trains.
    """

    def __init__(self, linear: nn.Linear, A, B, scale: float, dropout: float, anchored: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # the same tensors, not copies
        self.product = getattr(linear, "product", F.linear)  # how W x is computed
        self.pack = getattr(linear, "pack", torch.Tensor.contiguous)  # and W laid out
        self.scale, self.dropout = scale, dropout
        self.kept = None  # see decode
        device = linear.weight.device
        self.lora_A = nn.Parameter(A.to(device, torch.float32).contiguous())
        self.lora_B = nn.Parameter(B.to(device, torch.float32).contiguous())
        for name, factor in (("A", self.lora_A), ("B", self.lora_B)):
            anchor = factor.detach().clone() if anchored else None
            self.register_buffer(f"anchor_{name}", anchor)
            self.register_buffer(f"mask_{name}", torch.ones_like(factor, dtype=torch.bool))

    def factors(self):
        """(R, in) and (out, R) whose product is B A - B0 A0: R = 2r with an anchor, r without.

        Written as (B - B0) A + B0 (A - A0): the small differences are taken in float32, before
        any cast, so bf16 rounds the update and not its distance from a large start.
        """
        A, B, A0, B0 = self.lora_A, self.lora_B, self.anchor_A, self.anchor_B
        if A0 is None:
            return A, B
        return torch.cat((A, A - A0)), torch.cat((B - B0, B0), dim=1)

    def folded(self):
        """(out, in) float32: the one weight that does what the layer does, W + s (B A - B0 A0)."""
        A, B = self.factors()
        return torch.addmm(self.weight.float(), B, A, alpha=self.scale)

    @torch.no_grad()
    def decode(self, on: bool):
        """While on, no factor may change: what each step of decoding would compute anew is kept."""
        self.kept = None
        if on and self.weight.dtype == torch.float32:  # no adapter to pay for
            self.kept = self.pack(self.folded())
        elif on:  # in bf16 a folded weight would round the update away
            self.kept = [factor.to(self.weight.dtype) for factor in self.factors()]

    def forward(self, x):
        if isinstance(self.kept, torch.Tensor):
            return self.product(x, self.kept, self.bias)
        A, B = self.kept or (factor.to(x.dtype) for factor in self.factors())
        low = F.linear(F.dropout(x, self.dropout, self.training), A) * self.scale  # (..., R)
        return self.product(x, self.weight, self.bias) + F.linear(low, B)


def put(model, name: str, module):
    """Puts a module into the model's tree under a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def lora_layers(model) -> dict[str, LoRALinear]:
    """name -> layer, in the order of named_modules: the order of every flat vector here."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers; call add_lora first")
    return layers


def lora_factors(model) -> dict[str, nn.Parameter]:
    """name -> factor in flat order: in each layer A (r, in), then B (out, r)."""
    return {
        f"{name}.lora_{f}": getattr(layer, f"lora_{f}")
        for name, layer in lora_layers(model).items()
        for f in "AB"
    }


def start_factors(weight, init: str, r: int, scale: float, std: float, generator):
    """The start (A, B) of one layer; weight is (out, in)."""
    out_features, in_features = weight.shape
    if init in ("anchored", "gaussian"):
        shapes = (r, in_features), (out_features, r)
        return tuple(std * torch.randn(shape, generator=generator) for shape in shapes)
    if init == "lora":  # Hu et al. 2021: A Kaiming-uniform, B zero
        bound = 1 / math.sqrt(in_features)
        A = (2 * torch.rand(r, in_features, generator=generator) - 1) * bound
        return A, torch.zeros(out_features, r)
    if init == "pissa":  # Meng et al. 2024: scale * B A is the best rank-r approximation of W
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (S[:r] / scale).sqrt()
        return root[:, None] * Vh[:r], U[:, :r] * root
    if init == "olora":  # Büyükakyüz 2024: the leading rows and columns of W = Q R
        Q, R = torch.linalg.qr(weight.float())
        return R[:r], Q[:, :r]
    raise ValueError(f"unknown init {init!r}; one of anchored, gaussian, lora, pissa, olora")


def add_lora(
    model, targets="qkvgud", r=8, alpha=64, dropout=0.0, init="anchored", std=0.01, generator=None
):
    """Freezes the model, replaces its target `nn.Linear`s by `LoRALinear`s in place, returns it.

    targets: letters of q k v o g u d, or a list of module names ("c_attn"). The scale is alpha/r.
    init: "anchored" draws A, B ~ N(0, std^2) and subtracts the draw, "gaussian" draws without the
    anchor (the authors' start: it changes the model), "lora" is B = 0 (importance is then zero),
    "pissa" and "olora" take A, B from W, anchored. `generator` lives on the CPU.
    Raises ValueError on unknown targets or init, a rank that does not fit, or a second call.
    """
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has LoRA layers already")
    unknown = [t for t in targets if t not in PROJECTIONS] if isinstance(targets, str) else []
    if unknown or not targets:
        raise ValueError(f"unknown targets {targets!r}; letters of q k v o g u d, or module names")
    names = [PROJECTIONS[t] for t in targets] if isinstance(targets, str) else list(targets)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    }
    if not linears:
        raise ValueError(f"no nn.Linear of the model is named one of {names}")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if not 1 <= r <= min(linear.weight.shape):
            raise ValueError(f"r = {r} does not fit {name} of shape {tuple(linear.weight.shape)}")
        A, B = start_factors(linear.weight.detach(), init, r, alpha / r, std, generator)
        anchored = init in ("anchored", "pissa", "olora")
        layer = LoRALinear(linear, A, B, alpha / r, dropout, anchored).train(model.training)
        put(model, name, layer)
    return model


def get_flat(model) -> torch.Tensor:
    """(N,) float32: a copy of all LoRA factors, in the order of `lora_factors`, row-major."""
    return torch.cat([p.detach().flatten() for p in lora_factors(model).values()])


@torch.no_grad()
def _write_flat(tensors, vector, what):
    total = sum(t.numel() for t in tensors)
    if vector.shape != (total,):
        raise ValueError(f"the {what} has shape {tuple(vector.shape)}, the model needs ({total},)")
    for tensor, piece in zip(tensors, vector.split([t.numel() for t in tensors])):
        tensor.copy_(piece.view_as(tensor))


def set_flat(model, vector):
    """Writes (N,) back into the factors; ValueError if N does not fit."""
    _write_flat(list(lora_factors(model).values()), vector, "flat vector")


def set_anchor(model, vector):
    """Writes (N,) into the anchors A0, B0: what a resumed run needs besides `set_flat`."""
    layers = lora_layers(model).values()
    _write_flat([t for x in layers for t in (x.anchor_A, x.anchor_B)], vector, "anchor")


def set_mask(model, mask):
    """Writes a bool (N,) mask into the layers: True elements are the ones a stage trains."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {mask.dtype}, not bool")
    layers = lora_layers(model).values()
    _write_flat([t for x in layers for t in (x.mask_A, x.mask_B)], mask, "mask")


# ------------------------------------------------------------------------------------- importance


def logits_logprobs(model, tokens, labels, answer_tokens=None):
    """log p of each label that is not -100, 0 elsewhere: (B, T-1). For any model of logits."""
    logits = model(tokens[:, :-1])
    logits = getattr(logits, "logits", logits)  # transformers wraps them
    logp = logits.float().log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return torch.where(labels[:, 1:] != -100, logp, 0.0)


class _Scored(nn.Module):
    """model + its log-prob function as one module, which is what functional_call wants."""

    def __init__(self, model, logprobs):
        super().__init__()
        self.model, self.logprobs = model, logprobs

    def forward(self, tokens, labels, answer_tokens):
        return self.logprobs(self.model, tokens, labels, answer_tokens=answer_tokens)


def importance(model, batches, logprobs=logits_logprobs, chunk_size=8, progress=iter):
    """I = |g * phi - 1/2 * F * phi^2| for every LoRA element -> (N,) float32 (paper, eq. 3).

    g is the mean over the examples of the per-example gradient, F (the diagonal of the Fisher
    matrix) the mean of its square; an example's loss is the mean cross-entropy of its answer
    tokens. batches: iterable of (tokens, labels), int64 (B, T), right padded, labels[t] = tokens[t]
    at answer positions (EOS included) and -100 elsewhere. Per-example gradients come from
    torch.func's vmap over grad, chunk_size examples at once; the result does not depend on it.
    `logprobs(model, tokens, labels, answer_tokens=K)` gives (B, T-1) log-probs; K is static.
    Runs in eval mode and restores it. Raises ValueError on an example without answer tokens, on
    scores that are all zero and on scores that are not finite.
    """
    factors = lora_factors(model)
    phi = get_flat(model)
    names, scored = [f"model.{name}" for name in factors], _Scored(model, logprobs)
    parameters = dict(zip(names, (p.detach() for p in factors.values())))

    def loss(parameters, tokens, labels, answer_tokens):  # of one example, tokens (T,)
        call = functional_call(scored, parameters, (tokens[None], labels[None], answer_tokens))
        return -call.sum() / (labels[1:] != -100).sum()

    g_sum = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    f_sum = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    count, was_training = 0, model.training
    model.eval()
    try:
        # The fused attention kernels have no batching rule; the plain one is a few batched matmuls.
        with sdpa_kernel(SDPBackend.MATH):
            for tokens, labels in progress(batches):
                answers = (labels[:, 1:] != -100).sum(1)
                if not answers.all():
                    raise ValueError(f"example {count + int(answers.argmin())} has no answer token")
                per_example = vmap(grad(loss), in_dims=(None, 0, 0, None))
                for part in torch.arange(len(tokens)).split(chunk_size):
                    k = int(answers[part].max())
                    gradients = per_example(parameters, tokens[part], labels[part], k)
                    for name, gradient in gradients.items():  # (chunk, *factor)
                        g_sum[name] += gradient.sum(0)
                        f_sum[name] += gradient.square().sum(0)
                count += len(tokens)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("importance needs at least one example")
    g = torch.cat([g_sum[n].flatten() for n in names]) / count
    fisher = torch.cat([f_sum[n].flatten() for n in names]) / count
    scores = (g * phi - 0.5 * fisher * phi**2).abs().float()  # eq. 3
    if not scores.isfinite().all():
        raise ValueError("the importance scores are not finite; is a loss NaN?")
    if not scores.any():
        raise ValueError(
            "every importance is exactly 0: with B = 0 both dL/dA and phi_B vanish, so nothing can "
            'be ranked; use init "anchored" (or "gaussian", "pissa", "olora")'
        )
    return scores


# -------------------------------------------------------------------------------------- partition


class Partition(NamedTuple):
    """Three disjoint bool (N,) regions; elements of neither system are in none of them."""

    s1_only: torch.Tensor
    s2_only: torch.Tensor
    shared: torch.Tensor


def at_least(scores: np.ndarray, threshold, count: int) -> np.ndarray:
    """bool: the `count` largest scores, where the smallest of them is `threshold`; ties go to the
    lower index, as in a stable descending sort."""
    chosen = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


def cumulative_region(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """bool (N,): the shortest prefix of the stable descending order whose cumulative sum (float64)
    reaches theta times the sum of all; theta = 1 is everything.

    Nothing but one bin is sorted: floats that are not negative are ordered as their bits are, so
    the leading 16 bits cut the order into bins, and the sums of these tell where theta falls.
    """
    values = scores.detach().cpu().numpy()
    if not (values.min() >= 0 and 0 < values.max() < np.inf):  # also where one is NaN
        raise ValueError("importance scores must be finite, not negative and not all zero")
    if theta == 1:
        return torch.ones(len(values), dtype=torch.bool)
    values = np.abs(values)  # -0.0 has the bits of a negative number
    bins = values.view(f"i{values.itemsize}") >> 8 * values.itemsize - 16
    mass = np.bincount(bins, weights=values, minlength=1 << 15)[::-1].cumsum()  # from the top bin
    goal = theta * mass[-1]
    above = max(1, int(np.searchsorted(mass, goal)))  # whole bins above the one where theta falls
    edge = (1 << 15) - 1 - above
    descending = np.sort(values[bins == edge])[::-1]
    cumulative = mass[above - 1] + descending.cumsum(dtype=np.float64)  # no bin is above NaN's
    last = min(int(np.searchsorted(cumulative, goal)), len(descending) - 1)
    return torch.from_numpy(
        at_least(values, descending[last], np.count_nonzero(bins > edge) + last + 1)
    )


def partition(s1, s2, theta: float) -> Partition:
    """Splits N elements by two score vectors (N,) (the coordinator): a system's region is what
    reaches cumulative importance theta, globally over all elements; the overlap is shared.

    The masks live on the CPU. Raises ValueError on theta outside (0, 1] or on bad scores.
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta = {theta} is outside (0, 1]")
    if s1.shape != s2.shape or s1.ndim != 1 or not len(s1):
        raise ValueError(f"importance scores have shapes {tuple(s1.shape)} and {tuple(s2.shape)}")
    with ThreadPoolExecutor(2) as pool:  # numpy sorts outside the interpreter lock
        one, two = pool.map(lambda s: cumulative_region(s, theta), (s1, s2))
    return Partition(one & ~two, two & ~one, one & two)


def stage_mask(part: Partition, scores, stage: int, fraction: float) -> torch.Tensor:
    """bool (N,): the stage's own region and the top `fraction` of the shared one by its scores.

    Stage 1 (SFT, System 1) takes s1_only and alpha, stage 2 (RL, System 2) s2_only and beta;
    int(fraction * |shared|) elements, ties to the lower index (paper, Algorithm 1).
    """
    if stage not in (1, 2):
        raise ValueError(f"stage = {stage} is not 1 or 2")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction = {fraction} is outside [0, 1]")
    mask = (part.s1_only if stage == 1 else part.s2_only).clone()
    shared = part.shared.nonzero()[:, 0]
    count = int(fraction * len(shared))
    if count:
        values = scores.detach().cpu().numpy()[shared.numpy()]
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        mask[shared[torch.from_numpy(at_least(values, threshold, count))]] = True
    return mask


def shuffle_scores(model, s1, s2, select: str, generator):
    """The ablation: scores whose order no longer says which element they belong to.

    "random" moves both vectors by one permutation of all N elements, "random-in-tensor" permutes
    inside each factor; so every region keeps its size. "importance" returns them unchanged.
    """
    if select == "importance":
        return s1, s2
    if select == "random":
        order = torch.randperm(len(s1), generator=generator)
    elif select == "random-in-tensor":
        sizes = [p.numel() for p in lora_factors(model).values()]
        starts = np.cumsum([0] + sizes)
        order = torch.cat(
            [start + torch.randperm(n, generator=generator) for start, n in zip(starts, sizes)]
        )
    else:
        raise ValueError(f"unknown select {select!r}; importance, random or random-in-tensor")
    return s1[order.to(s1.device)], s2[order.to(s2.device)]


# -------------------------------------------------------------------------------------- optimizer


class MaskedAdamW(torch.optim.AdamW):
    """AdamW on the active elements alone, packed into one vector (paper, Algorithm 1).

    Masking gradients is not enough: decoupled weight decay and old momentum would still move the
    frozen elements. Here the optimizer owns `packed`, the (n_active,) elements under the mask;
    step() gathers their gradients, clips their norm, updates and scatters them back. Frozen
    elements are never written, and Adam's state is 8 bytes an active element.
    Raises ValueError if the mask selects nothing, or if it has changed since construction.
    """

    def __init__(
        self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=None
    ):
        self.factors = list(lora_factors(model).values())
        layers = lora_layers(model).values()
        self.masks = [m for layer in layers for m in (layer.mask_A, layer.mask_B)]
        self.versions = [m._version for m in self.masks]
        self.indices = [m.flatten().nonzero()[:, 0] for m in self.masks]
        self.max_grad_norm, self.grad_norm = max_grad_norm, None
        if not sum(map(len, self.indices)):
            raise ValueError("the mask has no active element: training would silently do nothing")
        self.packed = nn.Parameter(self._gather(self.factors))
        super().__init__([self.packed], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _gather(self, tensors):
        return torch.cat([t.detach().flatten()[i] for t, i in zip(tensors, self.indices)])

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for factor in self.factors:
            factor.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        """One update. The norm of the packed gradient before clipping is in `grad_norm`."""
        if [m._version for m in self.masks] != self.versions:
            raise ValueError("set_mask was called after this optimizer was made; make a new one")
        if all(p.grad is None for p in self.factors):
            raise ValueError("step() without gradients: call backward() first")
        self.packed.copy_(self._gather(self.factors))
        self.packed.grad = self._gather(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self.factors]
        )
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        self.grad_norm = nn.utils.clip_grad_norm_(self.packed, limit)
        super().step(closure)
        for factor, index, piece in zip(
            self.factors, self.indices, self.packed.detach().split([len(i) for i in self.indices])
        ):
            factor.view(-1)[index] = piece


# ---------------------------------------------------------------------------------- adapter files


def save_adapter(model, folder, base_model=""):
    """Writes PEFT's adapter_config.json and adapter_model.safetensors (float32).

    An anchored adapter is written as the rank-2r pair of `LoRALinear.factors` with lora_alpha
    doubled: exactly our model on the untouched base, whatever the start was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank = first.factors()[0].shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.safetensors.tmp", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "adapter_config.json.tmp", folder / "adapter_config.json")


UNSUPPORTED = (
    "use_dora modules_to_save rank_pattern alpha_pattern fan_in_fan_out layer_replication "
    "lora_bias trainable_token_indices use_qalora use_bdlora alora_invocation_tokens "
    "target_parameters"
).split()


def read_adapter(folder):
    """-> {module name: (A, B, scale)} and the dropout of an adapter in PEFT's format (ours, or
    PEFT's own). ValueError, one line, on features we do not have."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable PEFT adapter ({error})") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type {config.get('peft_type')!r} is not LORA")
    bad = [key for key in UNSUPPORTED if config.get(key)]
    if bad or config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: the adapter uses {', '.join(bad) or 'bias'}: not supported")
    pairs = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise ValueError(f"{folder}: tensor {key} is not a LoRA factor of an nn.Linear")
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{folder}: {name} has no A (r, in) and B (out, r) of one rank")
        rank = len(pair["A"])
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[name] = (pair["A"], pair["B"], scale)
    if not pairs:
        raise ValueError(f"{folder}: the adapter file holds no tensors")
    return pairs, config.get("lora_dropout", 0.0)


def check_fit(folder, name, A, B, weight_shape):
    if weight_shape is None or tuple(weight_shape) != (B.shape[0], A.shape[1]):
        shape = f"{tuple(weight_shape)} there" if weight_shape else "not there"
        raise ValueError(
            f"{folder}: {name} is for a linear of {(B.shape[0], A.shape[1])}, which is {shape}"
        )


def load_adapter(model, folder):
    """Adds a LoRA adapter in PEFT's format (ours or PEFT's own) to a model without LoRA layers.

    The layers have no anchor: the file holds the whole difference from the base. Raises
    ValueError, one line, on features we do not have and on tensors that do not fit.
    """
    pairs, dropout = read_adapter(folder)
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has LoRA layers already; load the adapter into a fresh base")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, (A, B, _) in pairs.items():
        check_fit(folder, name, A, B, modules[name].weight.shape if name in modules else None)
    model.requires_grad_(False)
    for name, (A, B, scale) in pairs.items():
        layer = LoRALinear(modules[name], A, B, scale, dropout, anchored=False)
        put(model, name, layer.train(model.training))
    return model


@torch.no_grad()
def merge(model):
    """Folds every adapter into its weight, W + s (B A - B0 A0) in float32 stored in W's dtype,
    and puts plain `nn.Linear`s back. In place; returns the model."""
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight = nn.Parameter(layer.folded().to(layer.weight.dtype), requires_grad=False)
        linear.bias = layer.bias
        put(model, name, linear)
    return model


def merge_files(model_folder, adapter_folder, out):
    """Writes a full Hugging Face folder: the checkpoint with the adapter folded in, W + s B A in
    float32, stored in W's own dtype; config and tokenizer files are copied. One shard is in memory
    at a time. Raises ValueError if something does not fit, or if `out` is the checkpoint itself."""
    source, out = Path(model_folder), Path(out)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source}: no safetensors files there")
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the model itself; name another folder")
    pairs, _ = read_adapter(adapter_folder)
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            shapes |= {n.removesuffix(".weight"): tensors.get_slice(n).get_shape() for n in names}
    for name, (A, B, _) in pairs.items():
        check_fit(adapter_folder, name, A, B, shapes.get(name))
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        merged = load_file(file)
        for name in {n.removesuffix(".weight") for n in merged} & set(pairs):
            (A, B, scale), weight = pairs[name], merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + scale * (B @ A)).to(weight.dtype)
        save_file(merged, out / f"{file.name}.tmp", metadata={"format": "pt"})
        os.replace(out / f"{file.name}.tmp", out / file.name)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".jinja", ".txt"):
            shutil.copy(file, out / file.name)


def main():
    parser = argparse.ArgumentParser(description="Fold an adapter into its checkpoint.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("--model", required=True, help="the base: a Hugging Face model folder")
    parser.add_argument("--adapter", required=True, help="a folder in PEFT's format")
    parser.add_argument("--out", required=True, help="the folder to write")
    args = parser.parse_args()
    try:
        merge_files(args.model, args.adapter, args.out)
    except (ValueError, SafetensorError) as error:
        print(f"lorapar.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"merged: {args.out}")


if __name__ == "__main__":
    main()
