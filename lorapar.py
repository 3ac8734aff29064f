"""LoRA-PAR's method: element-wise importance, the partition of LoRA parameters, masked training.

Every element phi_j of every LoRA factor gets an importance for System 1 and for System 2,
I_j = |g_j phi_j - 1/2 F_jj phi_j^2|, and a stage trains only the elements its system needs:

    add_lora(model)                              # W x + s (B A - B0 A0) x,  W frozen
    s1, s2 = importance(model, s1_batches), importance(model, s2_batches)
    part = partition(s1, s2, theta=0.9)          # S1-only, S2-only, shared
    set_mask(model, stage_mask(part, s1, stage=1, fraction=1.0))
    optimizer = MaskedAdamW(model, lr=2e-4)      # frozen elements stay bit-identical

The file stands alone: it works on any `nn.Module` that maps tokens (B, T) to logits (B, T, V) and
whose target linears get (B, T, in). Paper: Huang et al., LoRA-PAR, Findings of EMNLP 2025.
Left out: DoRA, adapters on embeddings, quantised bases (load_adapter refuses them by name), and a
linear that the model holds under two names.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
PROJECTIONS |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}
ANCHORED = ("anchored", "pissa", "olora")  # the starts that keep a frozen copy of themselves

# ------------------------------------------------------------------------------------ LoRA layers


class LoRALinear(nn.Linear):
    """y = W x + s (B A - B0 A0) x, with A (r, in), B (out, r) trained and W, A0, B0 frozen.

    The anchor A0, B0 is a frozen copy of the start, so at step 0 the layer is exactly W x whatever
    the start is; without an anchor this is plain LoRA. The factors are float32 and cast where they
    are used. `mask_A`, `mask_B` (bool) say which elements the current stage trains: `forward` never
    reads them, the optimizer does.
    """

    def __init__(self, linear: nn.Linear, A, B, scale: float, dropout: float, anchored: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # the same tensors, not copies
        self.scale, self.dropout, self.training = scale, dropout, linear.training
        self.held = None  # used instead of A, B: set by hold and per_example_gradients
        device = linear.weight.device
        self.lora_A = nn.Parameter(A.to(device, torch.float32).contiguous())
        self.lora_B = nn.Parameter(B.to(device, torch.float32).contiguous())
        for name, factor in (("A", self.lora_A), ("B", self.lora_B)):
            anchor = factor.detach().clone() if anchored else None
            self.register_buffer(f"anchor_{name}", anchor)
            self.register_buffer(f"mask_{name}", torch.ones_like(factor, dtype=torch.bool))

    def factors(self, A, B):
        """A (.., r, in), B (.., out, r) -> (.., R, in), (.., out, R) with product B A - B0 A0.

        R = 2r with an anchor, else r. Written as (B - B0) A + B0 (A - A0): the small differences
        are taken in float32, before any cast, so bf16 rounds the update and not its distance from a
        large start.
        """
        A0, B0 = self.anchor_A, self.anchor_B
        if A0 is None:
            return A, B
        return torch.cat((A, A - A0), dim=-2), torch.cat((B - B0, B0.expand_as(B)), dim=-1)

    @torch.no_grad()
    def hold(self, on: bool):
        """Keeps the cast factors for decoding, which would compute them anew for every token;
        while on, A and B must not change."""
        self.held = None
        if on:
            self.held = [f.to(self.weight.dtype) for f in self.factors(self.lora_A, self.lora_B)]

    def forward(self, x):  # (.., in) -> (.., out)
        A, B = self.held or self.factors(self.lora_A, self.lora_B)
        if A.ndim == 3 and x.ndim != 3:  # factors of every example: per_example_gradients
            raise ValueError(f"importance needs inputs (B, T, in), a linear got {tuple(x.shape)}")
        low = F.dropout(x, self.dropout, self.training) @ A.to(x.dtype).mT * self.scale  # (.., R)
        return F.linear(x, self.weight, self.bias) + low @ B.to(x.dtype).mT


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
    layers = lora_layers(model).items()
    return {f"{name}.lora_{f}": getattr(layer, f"lora_{f}") for name, layer in layers for f in "AB"}


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


def target_linears(model, targets, r: int) -> dict[str, nn.Linear]:
    """The model's plain linears that `targets` names: letters of q k v o g u d, or module names.
    ValueError where a name finds none, or rank r does not fit one."""
    names = [PROJECTIONS.get(t) for t in targets] if isinstance(targets, str) else list(targets)
    if not names or None in names:
        raise ValueError(f"unknown targets {targets!r}; letters of q k v o g u d, or module names")
    modules = [(n, n.rpartition(".")[2], m) for n, m in model.named_modules()]
    there = {leaf for _, leaf, m in modules if type(m) is nn.Linear}  # a subclass computes its own
    for name in names:
        if name not in there:
            kinds = sorted({type(m).__name__ for _, leaf, m in modules if leaf == name})
            found = f"it is a {', '.join(kinds)}" if kinds else "nothing has that name"
            found += f"; the model's linears are {', '.join(sorted(there)) or 'none'}"
            raise ValueError(f"no nn.Linear is named {name}: {found}")
    linears = {n: m for n, leaf, m in modules if type(m) is nn.Linear and leaf in names}
    for name, linear in linears.items():
        if not 1 <= r <= min(linear.weight.shape):
            raise ValueError(f"r = {r} does not fit {name} of shape {tuple(linear.weight.shape)}")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(f"{name}: nn.TransformerEncoderLayer's fast path reads weights alone")
    return linears


def add_lora(
    model, targets="qkvgud", r=8, alpha=64, dropout=0.0, init="anchored", std=0.01, generator=None
):
    """Freezes the model, replaces its target `nn.Linear`s by `LoRALinear`s in place, returns it.

    targets: letters of q k v o g u d, or a list of module names ("c_attn"). The scale is alpha/r.
    init: "anchored" draws A, B ~ N(0, std^2) and subtracts the draw, "gaussian" draws without the
    anchor (the authors' start: it changes the model), "lora" is B = 0 (importance is then zero),
    "pissa" and "olora" take A, B from W, anchored. `generator` lives on the CPU.
    Raises ValueError on unknown targets or init, a rank that does not fit, alpha <= 0, or a second
    call.
    """
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has LoRA layers already")
    if alpha <= 0:
        raise ValueError(f"lora_alpha = {alpha} must be positive: the adapter is scaled by it")
    linears = target_linears(model, targets, r)
    model.requires_grad_(False)
    for name, linear in linears.items():
        A, B = start_factors(linear.weight.detach(), init, r, alpha / r, std, generator)
        put(model, name, LoRALinear(linear, A, B, alpha / r, dropout, anchored=init in ANCHORED))
    return model


def get_flat(model) -> torch.Tensor:
    """(N,) float32: a copy of all LoRA factors, in the order of `lora_factors`, row-major."""
    return torch.cat([p.detach().flatten() for p in lora_factors(model).values()])


def _buffers(model, kind: str) -> list[torch.Tensor]:
    return [getattr(x, f"{kind}_{f}") for x in lora_layers(model).values() for f in "AB"]


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
    _write_flat(_buffers(model, "anchor"), vector, "anchor")


def get_mask(model) -> torch.Tensor:
    """(N,) bool: a copy of the layers' masks, in flat order."""
    return torch.cat([m.flatten() for m in _buffers(model, "mask")])


def set_mask(model, mask):
    """Writes a bool (N,) mask into the layers: True elements are the ones a stage trains."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {mask.dtype}, not bool")
    _write_flat(_buffers(model, "mask"), mask, "mask")


# ------------------------------------------------------------------------------------- importance

# What ranks the elements, from g, F and phi (N,). The method is the first; the others are what it
# is compared with.
SCORES = {
    "importance": lambda g, fisher, phi: g * phi - 0.5 * fisher * phi**2,  # eq. 3
    "first-order": lambda g, fisher, phi: g * phi,
    "magnitude": lambda g, fisher, phi: phi,
    "gradient": lambda g, fisher, phi: g,
    "fisher": lambda g, fisher, phi: fisher,
}


def logits_logprobs(model, tokens, labels):
    """log p of each label that is not -100, 0 elsewhere: (B, T-1) float32. For any model that maps
    tokens to logits, to an object with .logits, or to a tuple that begins with them."""
    output = model(tokens[:, :-1])
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    B, T = labels[:, 1:].shape
    if logits.ndim != 3 or logits.shape[:2] != (B, T):
        shape = tuple(logits.shape)
        raise ValueError(f"logits must be ({B}, {T}, V), at every position; the model gave {shape}")
    targets = labels[:, 1:].flatten()
    return -F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none").view(B, T)


def per_example_gradients(model, tokens, labels, logprobs) -> list[torch.Tensor]:
    """The gradient of each example's loss: for each factor a tensor, a row an example.

    One ordinary backward: each of the E examples gets a copy of the factors, A (E, r, in) and
    B (E, out, r), that it alone passes through, so the gradient of the summed loss with respect to
    the copies is each example's own. Fused attention and checkpointing work as in training.
    """
    layers, factors = lora_layers(model).values(), lora_factors(model).values()
    copies = [f.detach().expand(len(tokens), -1, -1).requires_grad_() for f in factors]
    try:
        for layer, A, B in zip(layers, copies[::2], copies[1::2]):
            layer.held = layer.factors(A, B)
        loss = -logprobs(model, tokens, labels).sum(1) / (labels[:, 1:] != -100).sum(1)  # (B,)
        return torch.autograd.grad(loss.sum(), copies, materialize_grads=True)
    finally:
        for layer in layers:
            layer.held = None


def gradient_moments(model, batches, logprobs=logits_logprobs, chunk_tokens=512):
    """-> (N,), (N,): the sums over the examples of the per-example gradient and of its square
    (float64), and how many examples there were. Arguments and errors: see `importance`."""
    sizes = [p.numel() for p in lora_factors(model).values()]
    g_sum = get_flat(model).double().zero_()
    f_sum, count, was_training = g_sum.clone(), 0, model.training
    model.eval()
    try:
        for tokens, labels in batches:
            lengths = (labels[:, 1:] != -100).sum(1)
            if not lengths.all():
                raise ValueError(f"example {count + int(lengths.argmin())} has no answer token")
            rows = max(1, chunk_tokens // tokens.shape[1])
            for t, y in zip(tokens.split(rows), labels.split(rows)):
                gradients = per_example_gradients(model, t, y, logprobs)
                for g, f, gradient in zip(g_sum.split(sizes), f_sum.split(sizes), gradients):
                    g += gradient.sum(0).flatten()
                    f += gradient.square().sum(0).flatten()
            count += len(tokens)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("importance needs at least one example")
    return g_sum, f_sum, count


def scores_from(g_sum, f_sum, count: int, phi, rank_by="importance"):
    """The scores (N,) float32 of what `gradient_moments` gives. Raises as `importance` does."""
    scores = SCORES[rank_by](g_sum / count, f_sum / count, phi).abs().float()
    if not scores.isfinite().all():
        raise ValueError("the importance scores are not finite; is a loss NaN?")
    if not scores.any():
        raise ValueError(
            "every importance is exactly 0: with B = 0 both dL/dA and phi_B vanish, so nothing can "
            'be ranked; use init "anchored" (or "gaussian", "pissa", "olora")'
        )
    return scores


def importance(model, batches, logprobs=logits_logprobs, *, rank_by="importance", chunk_tokens=512):
    """I = |g * phi - 1/2 * F * phi^2| for every LoRA element -> (N,) float32 (paper, eq. 3).

    g is the mean over the examples of the per-example gradient, F (the diagonal of the Fisher
    matrix) the mean of its square; an example's loss is the mean cross-entropy of its answer
    tokens. batches: iterable of (tokens, labels), int64 (B, T), right padded, labels[t] = tokens[t]
    at answer positions (EOS included) and -100 elsewhere. At most chunk_tokens tokens (and at
    least one row) pass through the model at once; the result does not depend on it.
    `logprobs(model, tokens, labels)` gives (B, T-1) log-probs. rank_by: a name in `SCORES`.
    Runs in eval mode and restores it. Raises ValueError on an example without answer tokens, on
    scores that are all zero and on scores that are not finite.
    """
    if rank_by not in SCORES:
        raise ValueError(f"unknown rank_by {rank_by!r}; one of {', '.join(SCORES)}")
    moments = gradient_moments(model, batches, logprobs, chunk_tokens)
    return scores_from(*moments, get_flat(model), rank_by)


# -------------------------------------------------------------------------------------- partition


class Partition(NamedTuple):
    """Three disjoint bool (N,) regions; elements of neither system are in none of them."""

    s1_only: torch.Tensor
    s2_only: torch.Tensor
    shared: torch.Tensor


def top(order, count: int) -> torch.Tensor:
    """bool (N,): the elements in the first `count` places of an order of all N."""
    return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)


def cumulative_region(scores, theta: float) -> torch.Tensor:
    """bool (N,): the shortest prefix of the stable descending order whose cumulative sum (float64)
    reaches theta times the sum of all; theta = 1 is everything."""
    if not (scores.isfinite().all() and (scores >= 0).all() and scores.any()):
        raise ValueError("importance scores must be finite, not negative and not all zero")
    if theta == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)  # ties go to the lower index
    cumulative = scores[order].double().cumsum(0)
    return top(order, int(torch.searchsorted(cumulative, theta * cumulative[-1])) + 1)


def partition(s1, s2, theta: float) -> Partition:
    """Splits N elements by two score vectors (N,) (the coordinator): a system's region is what
    reaches cumulative importance theta, globally over all elements; the overlap is shared.

    Give it CPU tensors where it matters that two runs agree: CUDA's cumsum is not deterministic.
    Raises ValueError on theta outside (0, 1] or on bad scores.
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta = {theta} is outside (0, 1]")
    if s1.shape != s2.shape or s1.ndim != 1 or not len(s1):
        raise ValueError(f"importance scores have shapes {tuple(s1.shape)} and {tuple(s2.shape)}")
    one, two = cumulative_region(s1, theta), cumulative_region(s2, theta)
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
    order = scores[part.shared].argsort(descending=True, stable=True)
    mask[part.shared] = top(order, int(fraction * len(order)))
    return mask


def shuffle_scores(model, s1, s2, select: str, generator):
    """The control: scores whose order no longer says which element they belong to.

    "random" moves both vectors by one permutation of all N elements, "random-in-tensor" permutes
    inside each factor; so every region keeps its size (ties aside). ValueError on another word.
    """
    if select not in ("random", "random-in-tensor"):
        raise ValueError(f"unknown select {select!r}; random or random-in-tensor")
    sizes = [len(s1)]
    if select == "random-in-tensor":
        sizes = [p.numel() for p in lora_factors(model).values()]
    pieces = torch.arange(len(s1)).split(sizes)
    order = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in pieces])
    return s1[order.to(s1.device)], s2[order.to(s2.device)]


# -------------------------------------------------------------------------------------- optimizer


class MaskedAdamW(torch.optim.AdamW):
    """AdamW on the active elements alone, packed into one vector (paper, Algorithm 1).

    Masking gradients is not enough: decoupled weight decay and old momentum would still move the
    frozen elements. Here the optimizer owns `packed`, the (n_active,) elements under the mask;
    step() gathers their gradients, clips their norm, updates them and writes them back between the
    frozen ones, whose bits stay. Adam's state is 8 bytes per active element.
    Raises ValueError if the mask selects nothing, or where the factors are not float32.
    """

    def __init__(
        self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=math.inf
    ):
        self.model, self.mask = model, get_mask(model)
        self.index = self.mask.nonzero()[:, 0]  # (n_active,)
        self.max_grad_norm, self.grad_norm = max_grad_norm, None
        if not len(self.index):
            raise ValueError("the mask has no active element: training would silently do nothing")
        self.packed = nn.Parameter(get_flat(model)[self.index])
        if self.packed.dtype != torch.float32:
            raise ValueError(f"the factors are {self.packed.dtype}: small steps need float32")
        super().__init__([self.packed], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for factor in lora_factors(self.model).values():
            factor.grad = None

    @torch.no_grad()
    def step(self):
        """One update. The norm of the packed gradient before clipping is in `grad_norm`.

        Raises ValueError without gradients or if the mask has changed since construction;
        FloatingPointError, before the model is touched, where gradient or update is not finite.
        """
        factors = lora_factors(self.model).values()
        if not torch.equal(get_mask(self.model), self.mask):
            raise ValueError("set_mask was called after this optimizer was made; make a new one")
        if all(p.grad is None for p in factors):
            raise ValueError("step() without gradients: call backward() first")
        flat = get_flat(self.model)
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in factors]
        self.packed.copy_(flat[self.index])
        self.packed.grad = torch.cat(gradients)[self.index]
        self.grad_norm = nn.utils.clip_grad_norm_(self.packed, self.max_grad_norm)
        if not self.grad_norm.isfinite():
            raise FloatingPointError(f"the norm of the gradient is {self.grad_norm}")
        super().step()
        if not self.packed.isfinite().all():
            raise FloatingPointError("an updated element is not finite")
        flat[self.index] = self.packed
        set_flat(self.model, flat)


# ---------------------------------------------------------------------------------- adapter files


def write_file(path, content: bytes):
    """Writes under a temporary name and renames: a write that dies leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path, value):
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path, tensors: dict, **metadata: str):
    """Tensors of any device -> a safetensors file with ordinary permissions (not 0600)."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_file(path, safetensors_bytes(tensors, {"format": "pt"} | metadata))


def save_adapter(model, folder, base_model=""):
    """Writes PEFT's adapter_config.json and adapter_model.safetensors (float32).

    An anchored adapter is written as the rank-2r pair of `LoRALinear.factors` with lora_alpha
    doubled: exactly our model on the untouched base, whatever the start was.
    """
    layers, tensors = lora_layers(model), {}
    for name, layer in layers.items():
        A, B = layer.factors(layer.lora_A, layer.lora_B)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    first = next(iter(layers.values()))
    rank = len(A)  # every layer has the same
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
    write_tensors(Path(folder) / "adapter_model.safetensors", tensors)
    write_json(Path(folder) / "adapter_config.json", config)


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
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: the peft_type in adapter_config.json is not LORA")
    bad = [key for key in UNSUPPORTED if config.get(key)]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        bad.append(f"init_lora_weights {start} (PEFT changes the base when it loads this)")
    if bad or config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: the adapter uses {', '.join(bad) or 'bias'}: not supported")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{folder}/adapter_config.json: no lora_alpha")
    pairs = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise ValueError(f"{folder}: tensor {key} is not a LoRA factor of an nn.Linear")
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    for name, pair in pairs.items():
        A, B, rank = pair.get("A"), pair.get("B"), config.get("r")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or not rank == len(A) == B.shape[1]:
            raise ValueError(f"{folder}: {name} has no A (r, in) and B (out, r) of r = {rank}")
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[name] = (A, B, scale)
    if not pairs:
        raise ValueError(f"{folder}: the adapter file holds no tensors")
    return pairs, config.get("lora_dropout", 0.0)


def load_adapter(model, folder):
    """Adds a LoRA adapter in PEFT's format (ours or PEFT's own) to a model without LoRA layers.

    The layers have no anchor: the file holds the whole difference from the base. Raises
    ValueError, one line, on features we do not have and on tensors that do not fit.
    """
    pairs, dropout = read_adapter(folder)
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has LoRA layers already; load the adapter into a fresh base")
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    for name, (A, B, _) in pairs.items():
        shape = (B.shape[0], A.shape[1])
        there = tuple(linears[name].weight.shape) if name in linears else "missing"
        if there != shape:
            raise ValueError(f"{folder}: {name} is for a linear of {shape}, which is {there} here")
    model.requires_grad_(False)
    for name, (A, B, scale) in pairs.items():
        put(model, name, LoRALinear(linears[name], A, B, scale, dropout, anchored=False))
    return model


@torch.no_grad()
def merge(model):
    """Folds every adapter into its weight, W + s (B A - B0 A0) in float32 stored in W's dtype,
    and puts plain `nn.Linear`s back. In place; returns the model."""
    for name, layer in lora_layers(model).items():
        A, B = layer.factors(layer.lora_A, layer.lora_B)
        weight = torch.addmm(layer.weight.float(), B, A, alpha=layer.scale).to(layer.weight.dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        put(model, name, linear)
    return model
