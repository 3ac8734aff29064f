"""LoRA-PAR's method: element-wise importance, the partition of LoRA parameters, masked training.

Every element phi_j of every LoRA factor gets an importance for System 1 and for System 2,
I_j = |g_j phi_j - 1/2 F_jj phi_j^2|, and a stage trains only the elements that its system needs:

    add_lora(model)                              # W x + s (B A - B0 A0) x,  W frozen
    s1, s2 = importance(model, s1_batches), importance(model, s2_batches)
    part = partition(s1, s2, theta=0.9)          # S1-only, S2-only, shared
    set_mask(model, stage_mask(part.s1_only, part.shared, s1, fraction=1.0))
    optimizer = MaskedAdamW(model, lr=2e-4)      # frozen elements stay bit-identical

The file stands alone: copy it into a project of your own. It works on any causal `nn.Module` that
maps tokens (B, T) to logits (B, T, V). Paper: Huang et al., LoRA-PAR, Findings of EMNLP 2025.
Left out: DoRA, adapters on embeddings, quantised bases (load_adapter refuses them by name), and
models whose layers are spread over several devices.
"""

import hashlib
import inspect
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "LoRALinear", "add_lora", "cached_factors", "lora_layers", "lora_factors",
    "get_flat", "set_flat", "set_anchor", "get_mask", "set_mask",
    "importance", "Partition", "partition", "stage_mask", "MaskedAdamW",
    "save_adapter", "load_adapter", "merge",
    "add_baseline", "save_baseline", "load_baseline",
]  # fmt: skip

QKVGUD = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")  # the paper's targets
STARTS = ("anchored", "gaussian", "lora", "pissa", "olora")  # see add_lora
ANCHORED = ("anchored", "pissa", "olora")  # the starts that keep a frozen copy of themselves

# ------------------------------------------------------------------------------------ LoRA layers


class LoRALinear(nn.Linear):
    """y = W x + s (B A - B0 A0) x, with A (r, in), B (out, r) trained and W, A0, B0 frozen.

    The anchor A0, B0 is a frozen copy of the start, so at step 0 the layer is exactly W x whatever
    the start is; without an anchor (None) this is plain LoRA. The factors are float32 and cast
    where they are used. The buffers `mask_A`, `mask_B` (bool) say which elements a stage trains:
    `forward` never reads them, `MaskedAdamW` does.
    """

    @classmethod
    def adapt(cls, linear: nn.Linear, A, B, scale: float, dropout: float, anchored: bool):
        """Turns an nn.Linear into a LoRA layer in place: its names, tensors and hooks stay."""
        linear.__class__ = cls
        linear.scale, linear.dropout = scale, dropout
        linear.cached = None  # the cast factors while decoding: see cached_factors
        for name, start in (("A", A), ("B", B)):
            factor = start.to(linear.weight.device, torch.float32).contiguous()
            linear.register_parameter(f"lora_{name}", nn.Parameter(factor))
            linear.register_buffer(f"anchor_{name}", factor.clone() if anchored else None)
            linear.register_buffer(f"mask_{name}", torch.ones_like(factor, dtype=torch.bool))

    def factors(self):
        """A (R, in) and B (out, R) with the product B A - B0 A0; R = 2r with an anchor, else r.

        Written as (B - B0) A + B0 (A - A0). Subtracting in float32, before any cast, keeps the
        small update's digits in bf16.
        """
        A, B = self.lora_A, self.lora_B
        if self.anchor_A is None:
            return A, B
        if A.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{A.dtype} loses the update: cast before add_lora or after merge")
        return torch.cat((A, A - self.anchor_A)), torch.cat((B - self.anchor_B, self.anchor_B), 1)

    def forward(self, x):  # (.., in) -> (.., out)
        A, B = self.cached or self.factors()
        low_rank = F.linear(F.dropout(x, self.dropout, self.training), A.to(x.dtype))  # (.., R)
        return F.linear(x, self.weight, self.bias) + F.linear(low_rank * self.scale, B.to(x.dtype))

    def extra_repr(self):
        return f"{super().extra_repr()}, r={len(self.lora_A)}, scale={self.scale}"


def lora_layers(model) -> dict[str, LoRALinear]:
    """name -> layer, in the order of named_modules: the order of every flat vector here."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers; call add_lora first")
    return layers


def lora_factors(model) -> dict[str, nn.Parameter]:
    """name -> factor in flat order: in each layer A (r, in), then B (out, r)."""
    factors = {}
    for name, layer in lora_layers(model).items():
        factors[f"{name}.lora_A"] = layer.lora_A
        factors[f"{name}.lora_B"] = layer.lora_B
    return factors


WRAPPERS = (  # by name: some belong to libraries that need not be installed
    "OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel",
    "DeepSpeedEngine", "_FabricModule",
)  # fmt: skip


def unwrapped(model):
    """The model inside torch.compile, DataParallel and their kind: their only child."""
    while type(model).__name__ in WRAPPERS:
        (model,) = set(model.children())
    return model


def is_baseline(model) -> bool:
    """Does it hold a baseline of table 6 (the last chapter) in place of LoRA layers?"""
    return any(isinstance(m, BASELINES) for m in model.modules())


def refuse_adapted(model):
    of_peft = hasattr(unwrapped(model), "peft_config")
    if of_peft or any(isinstance(m, (LoRALinear, *BASELINES)) for m in model.modules()):
        raise ValueError("the model has adapters already: merge them, or take a fresh base")


def trainable(model) -> dict[str, nn.Parameter]:
    """name -> what a stage may train: LoRA's factors, or a baseline's parameters."""
    if is_baseline(model):
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    return lora_factors(model)


@contextmanager
def cached_factors(model):
    """For decoding: the factors are cast once instead of at every token. Nothing may train here."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.cached = [factor.to(layer.weight.dtype) for factor in layer.factors()]
        yield
    finally:
        for layer in layers:
            layer.cached = None


def start_factors(weight, init: str, r: int, scale: float, std: float, generator):
    """The start (A, B) of one layer; weight is (out, in)."""
    out_features, in_features = weight.shape
    on_cpu = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    if init in ("anchored", "gaussian"):
        A = std * torch.randn(r, in_features, **on_cpu)
        return A, std * torch.randn(out_features, r, **on_cpu)
    if init == "lora":  # Hu et al. 2021: A Kaiming-uniform, B zero
        bound = 1 / math.sqrt(in_features)
        A = (2 * torch.rand(r, in_features, **on_cpu) - 1) * bound
        return A, A.new_zeros(out_features, r)
    if init == "pissa":  # Meng et al. 2024: scale * B A is the best rank-r approximation of W
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (S[:r] / scale).sqrt()
        return root[:, None] * Vh[:r], U[:, :r] * root
    if init == "olora":  # Büyükakyüz 2024: the leading rows and columns of W = Q R
        Q, R = torch.linalg.qr(weight.float())
        return R[:r].clone(), Q[:, :r].clone()  # a view would keep all of Q and R
    raise ValueError(f"unknown init {init!r}; one of {', '.join(STARTS)}")


def target_linears(model, targets, r: int) -> list[nn.Linear]:
    """The linears that `targets` names (see add_lora). ValueError where a name finds nothing, or
    something that a LoRA layer cannot stand in for."""
    every = model.named_modules(remove_duplicate=False)  # one linear may have two names
    modules = {own_name(name): module for name, module in every}
    named = {}
    if targets == "all-linear":
        head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
        for name, module in modules.items():
            is_head = module is head or name.rpartition(".")[2] in ("lm_head", "head")
            if isinstance(module, nn.Linear) and not is_head:  # a subclass is refused below
                named[name] = module
    elif isinstance(targets, str):
        raise ValueError(f'targets {targets!r}: a sequence of module names, or "all-linear"')
    else:
        for target in targets or ():
            found = {n: m for n, m in modules.items() if f".{n}".endswith(f".{target}")}
            if not found:
                ends = {n.rpartition(".")[2] for n, m in modules.items() if type(m) is nn.Linear}
                known = ", ".join(sorted(ends)) or "none"
                raise ValueError(f"no module is named {target}; the model's linears are {known}")
            named |= found
    if not named:
        raise ValueError("no targets: there is nothing to adapt")
    unfit = [(name, why) for name, module in named.items() if (why := why_unfit(module, r))]
    if unfit:
        name, why = unfit[0]
        raise ValueError(f"{len(unfit)} of {len(named)} targets cannot get LoRA: {name} {why}")
    for name in named:
        if isinstance(modules.get(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(f"{name}: nn.TransformerEncoderLayer's fast path reads weights alone")
    return list(dict.fromkeys(named.values()))


def why_unfit(module, r: int) -> str | None:
    """Why a LoRA layer of rank r cannot take this module's place; None if it can."""
    if type(module) is not nn.Linear:  # a subclass may compute in its own way
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    if "forward" in vars(module) or not isinstance(module.weight, nn.Parameter):
        return "has a forward or weight that another library replaced"
    if module.weight.is_meta:
        return "holds no weight (meta device: offloaded?)"
    if not module.weight.is_floating_point() or module.weight.element_size() < 2:
        return f"has weights of {module.weight.dtype}"
    if r > min(module.weight.shape):
        return f"has shape {tuple(module.weight.shape)}: r = {r} does not fit"
    return None


def add_lora(
    model,
    targets=QKVGUD,
    r=8,
    lora_alpha=None,
    dropout=0.0,
    init="anchored",
    std=0.01,
    generator=None,
):
    """Freezes the model, turns its target `nn.Linear`s into `LoRALinear`s in place, returns it.

    targets: module names or their dotted ends ("q_proj", "encoder.0.fc"), or "all-linear": every
    nn.Linear but the head (get_output_embeddings(), and what is named lm_head or head). The scale
    is lora_alpha / r; lora_alpha None means 8 r. init: "anchored" draws A, B ~ N(0, std^2) and
    subtracts the draw, "gaussian" draws without the anchor (the authors' start: it changes the
    model), "lora" is B = 0 (importance is then zero), "pissa" and "olora" take A, B from W,
    anchored. `generator` lives on the CPU. Raises ValueError, before anything is changed, on
    targets that are missing or no plain nn.Linear, an unknown init, numbers out of range, or a
    model that is adapted already.
    """
    refuse_adapted(model)
    if type(r) is not int or r < 1:
        raise ValueError(f"r = {r!r} must be a positive integer")
    scale = (8 * r if lora_alpha is None else lora_alpha) / r
    if not 0 < scale < math.inf:
        raise ValueError(f"lora_alpha = {lora_alpha} must be positive: the adapter is scaled by it")
    if not 0 < std < math.inf:
        raise ValueError(f"std = {std} must be positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} is outside [0, 1)")
    linears = target_linears(model, targets, r)
    starts = []
    for linear in linears:
        starts.append(start_factors(linear.weight.detach(), init, r, scale, std, generator))
    model.requires_grad_(False)
    for linear, (A, B) in zip(linears, starts):
        LoRALinear.adapt(linear, A, B, scale, dropout, anchored=init in ANCHORED)
    return model


# ------------------------------------------------------------------- factors and masks as vectors


def get_flat(model) -> torch.Tensor:
    """(N,) float32: a copy of all that is `trainable`, in its order, row-major."""
    return torch.cat([p.detach().flatten() for p in trainable(model).values()])


def lora_buffers(model, kind: str) -> list[torch.Tensor]:
    """The layers' anchors or masks (kind "anchor" or "mask"), in flat order."""
    buffers = []
    for layer in lora_layers(model).values():
        buffers += [getattr(layer, f"{kind}_A"), getattr(layer, f"{kind}_B")]
    if buffers[0] is None:
        raise ValueError("these layers have no anchor: the start was made without one")
    return buffers


@torch.no_grad()
def write_flat(tensors, vector, what: str):
    """Copies the pieces of a vector (N,) into tensors, in order; `what` it is, for the error."""
    total = sum(t.numel() for t in tensors)
    if vector.shape != (total,):
        raise ValueError(f"the {what} has shape {tuple(vector.shape)}, the model needs ({total},)")
    for tensor, piece in zip(tensors, vector.split([t.numel() for t in tensors])):
        tensor.copy_(piece.view_as(tensor))


def set_flat(model, vector):
    """Writes (N,) back into the factors; ValueError if N does not fit."""
    write_flat(list(trainable(model).values()), vector, "flat vector")


def set_anchor(model, vector):
    """Writes (N,) into the anchors A0, B0: what a resumed run needs besides `set_flat`."""
    write_flat(lora_buffers(model, "anchor"), vector, "anchor")


def get_mask(model) -> torch.Tensor:
    """(N,) bool: a copy of the layers' masks, in flat order; a baseline trains all it has."""
    if is_baseline(model):
        return torch.ones_like(get_flat(model), dtype=torch.bool)
    return torch.cat([m.flatten() for m in lora_buffers(model, "mask")])


def set_mask(model, mask):
    """Writes a bool (N,) mask into the layers: True elements are the ones that a stage trains."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {mask.dtype}, not bool")
    write_flat(lora_buffers(model, "mask"), mask, "mask")


# ------------------------------------------------------------------------------ several processes


def rank_and_size() -> tuple[int, int]:
    """This process's number in torch.distributed, and how many there are; alone: 0 and 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensor):
    """A tensor summed over all processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------- importance


def importance(model, batches, chunk_tokens=512) -> torch.Tensor:
    """I = |g * phi - 1/2 * F * phi^2| for every LoRA element -> (N,) float32, on the CPU (paper,
    eq. 3): how much the loss would change if the element became 0, to second order.

    g is the mean over the examples of the per-example gradient; F, the diagonal of the empirical
    Fisher matrix that stands in for the Hessian, is the mean of its square. An example's loss is
    the mean cross-entropy of its answer tokens.

    batches: iterable of (tokens, labels), int64 (B, T), right padded, labels[t] = tokens[t] at
    answer positions (EOS included) and -100 elsewhere. The model may give logits (B, T, V), an
    object with .logits, or a tuple that begins with them. At most chunk_tokens tokens (and at least
    one example) pass through it at once; the result does not depend on that.
    Under torch.distributed each process gives examples of its own, and all get the scores of all.
    Runs in eval mode; every module gets its own flag back. Raises ValueError on a model that vmap
    cannot run (switch gradient checkpointing on after scoring), an example without answer
    tokens, and scores that are all zero or not finite.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("importance needs gradients, which torch.inference_mode() forbids")
    model = unwrapped(model)
    phi = get_flat(model).double()
    g, fisher = torch.zeros_like(phi), torch.zeros_like(phi)  # float64: sums over all examples
    count = 0
    # eval_mode of model.py, written out as this file stands alone
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            dimensions = [getattr(tensor, "ndim", 0) for tensor in batch]
            if dimensions != [2, 2]:  # a dict gives its keys, a lone pair its tokens
                raise ValueError("importance needs pairs (tokens, labels), each (B, T)")
            tokens, labels = (torch.as_tensor(tensor, device=phi.device) for tensor in batch)
            answer_tokens = (labels[:, 1:] != -100).sum(1)  # (B,)
            if not answer_tokens.all():
                first = count + int(answer_tokens.argmin())
                raise ValueError(f"example {first} has no answer token")
            chunk = max(1, chunk_tokens // tokens.shape[1])  # examples at once
            for t, y in zip(tokens.split(chunk), labels.split(chunk)):
                gradients = per_example_gradients(model, t, y)  # (E, N)
                g += gradients.sum(0)
                fisher += gradients.square().sum(0)
            count += len(tokens)
    finally:
        for module, flag in was_training.items():
            module.training = flag
    count = int(sum_over_ranks(torch.tensor(count, device=phi.device)))
    if count == 0:
        raise ValueError("importance needs at least one example")
    g, fisher = sum_over_ranks(g) / count, sum_over_ranks(fisher) / count
    scores = (g * phi - 0.5 * fisher * phi**2).abs()  # eq. 3
    scores = scores.float().cpu()  # for `partition`, whose cumsum varies on CUDA
    if not scores.isfinite().all():
        raise ValueError("the importance scores are not finite; is a loss NaN?")
    if not scores.any():
        raise ValueError(
            "every importance is exactly 0: with B = 0 both dL/dA and phi_B vanish, so nothing can "
            'be ranked; use init "anchored" (or "gaussian", "pissa", "olora")'
        )
    return scores


@torch.enable_grad()
def per_example_gradients(model, tokens, labels) -> torch.Tensor:
    """The gradient of each example's loss: tokens, labels (E, T) -> (E, N).

    Under vmap each example runs through its own copy of the factors, so one ordinary backward of
    the summed losses gives every example its own gradient. vmap(grad(loss)) gives the same, but
    needs two to three times the memory: it records the backward's own graph too.
    """
    copies = {
        name: p.detach().expand(len(tokens), *p.shape).clone().requires_grad_()
        for name, p in lora_factors(model).items()
    }

    def loss(factors, t, y):  # of one example, t, y (T,): mean cross-entropy of its answer
        # tie_weights=False: one layer may have two names
        output = functional_call(model, factors, (t[None, :-1],), tie_weights=False)
        logits = logits_of(output, len(t) - 1)  # (1, T-1, V)
        return F.cross_entropy(logits[0].float(), y[1:])  # leaves out labels of -100

    # MATH: under vmap no tensor says that it needs a gradient, so CUDA's fused attention kernels
    # would keep nothing for the backward
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(tokens.device.type, enabled=False):
        try:
            losses = vmap(loss)(copies, tokens, labels)  # (E,)
            gradients = torch.autograd.grad(
                losses.sum(), list(copies.values()), materialize_grads=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0][:120]
            hint = "is gradient checkpointing or autocast on? Score before any trainer"
            why = f"vmap cannot run this model ({hint}): {reason}"
            raise ValueError(f"importance: {why}") from None
    return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


def logits_of(output, T: int) -> torch.Tensor:
    """The logits (B, T, V) in what a model gives; ValueError if there are none."""
    first = output[0] if isinstance(output, tuple) and output else output
    logits = getattr(output, "logits", first)
    if not torch.is_tensor(logits) or logits.ndim != 3 or logits.shape[1] != T:
        raise ValueError(
            "the model must give logits (B, T, V), an object with .logits, or a tuple that begins "
            f"with them; it gave a {type(output).__name__} {tuple(getattr(logits, 'shape', ()))} "
            f"for T = {T}"
        )
    return logits


# -------------------------------------------------------------------------------------- partition


class Partition(NamedTuple):
    """Three disjoint bool (N,) regions; an element that neither system needs is in none."""

    s1_only: torch.Tensor
    s2_only: torch.Tensor
    shared: torch.Tensor


def partition(s1, s2, theta: float) -> Partition:
    """Splits N elements by two score vectors (N,), the paper's coordinator: a system's region is
    the fewest elements, over all layers, that hold theta of its importance; the overlap is shared.
    Raises ValueError on theta outside (0, 1] or on bad scores.
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta = {theta} is outside (0, 1]")
    if s1.shape != s2.shape or s1.ndim != 1:
        raise ValueError(f"importance scores have shapes {tuple(s1.shape)} and {tuple(s2.shape)}")
    region1, region2 = cumulative_region(s1, theta), cumulative_region(s2, theta)
    return Partition(region1 & ~region2, region2 & ~region1, region1 & region2)


def cumulative_region(scores, theta: float) -> torch.Tensor:
    """bool (N,): the shortest prefix of the stable descending order whose cumulative sum (float64)
    reaches theta times the sum of all; theta = 1 is everything."""
    if not (scores.isfinite().all() and (scores >= 0).all() and scores.any()):
        raise ValueError("importance scores must be finite, not negative and not all zero")
    if theta == 1:  # also what has no importance at all
        return torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)  # ties fall alike on every machine
    cumulative = scores[order].double().cumsum(0)
    count = int(torch.searchsorted(cumulative, theta * cumulative[-1])) + 1
    region = torch.zeros_like(scores, dtype=torch.bool)
    region[order[:count]] = True
    return region


def stage_mask(own, shared, scores, fraction: float) -> torch.Tensor:
    """bool (N,): a system's own region and the top `fraction` of the shared one by its scores.

    SFT takes (s1_only, shared, s1, alpha), RL (s2_only, shared, s2, beta); int(fraction * |shared|)
    elements, ties to the lower index (paper, Algorithm 1). ValueError on a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction = {fraction} is outside [0, 1]")
    indices = shared.nonzero()[:, 0]
    order = scores[indices].argsort(descending=True, stable=True)
    top = order[: int(fraction * len(indices))]
    mask = own.clone()
    mask[indices[top]] = True
    return mask


# -------------------------------------------------------------------------------------- optimizer


class MaskedAdamW(torch.optim.AdamW):
    """AdamW on the active elements alone, packed into one vector (paper, Algorithm 1).

    Masking gradients is not enough: decoupled weight decay and old momentum would still move the
    frozen elements. Here the optimizer owns `packed`, the (n_active,) elements under the mask that
    the layers hold at construction; step() gathers their gradients, clips their norm, updates them
    and writes them back between the frozen ones, whose bits stay. Adam's state is 8 bytes per
    active element. Weight decay pulls the factors to 0, not to the anchor. A float16 base would
    need a GradScaler, which does not work here: take bfloat16. Gradients stay on the model's
    factors, not on `packed`. sum_gradients: the packed gradient, |active| numbers, is summed over
    all processes of torch.distributed (not under DistributedDataParallel, which averages it).
    Raises ValueError if the mask selects nothing, where the factors are not float32, or if
    max_grad_norm is not above 0 (inf: no clipping).
    """

    def __init__(
        self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        max_grad_norm=math.inf, sum_gradients=False,
    ):  # fmt: skip
        self.sum_gradients = sum_gradients
        self.model, self.mask = model, get_mask(model)
        self.index = self.mask.nonzero()[:, 0]  # (n_active,)
        self.max_grad_norm, self.grad_norm = max_grad_norm, None
        if not len(self.index):
            raise ValueError("the mask has no active element: training would silently do nothing")
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm = {max_grad_norm} must be above 0; inf does not clip")
        self.packed = nn.Parameter(get_flat(model)[self.index])
        if self.packed.dtype != torch.float32:
            raise ValueError(f"the factors are {self.packed.dtype}: small steps need float32")
        digest = hashlib.sha256(self.mask.cpu().numpy()).hexdigest()  # for load_state_dict
        group = {"params": [self.packed], "mask": digest}
        super().__init__([group], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def __getstate__(self):  # so that deepcopy and pickle keep what is not AdamW's
        names = ("model", "mask", "index", "max_grad_norm", "grad_norm", "packed", "sum_gradients")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict):
        if state_dict["param_groups"][0].get("mask") != self.param_groups[0]["mask"]:
            raise ValueError("this optimizer state belongs to another mask")
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for factor in trainable(self.model).values():
            factor.grad = None

    def active_gradient(self) -> torch.Tensor:
        """(n_active,): the gradients under the mask, summed over processes where that is asked."""
        if not torch.equal(get_mask(self.model), self.mask):
            raise ValueError("set_mask was called after this optimizer was made; make a new one")
        factors = trainable(self.model).values()
        # a process without examples has no gradients, but takes part in the sum
        alone = not self.sum_gradients or rank_and_size()[1] == 1
        if alone and all(p.grad is None for p in factors):
            raise ValueError("step() without gradients: call backward() first")
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in factors]
        gradient = torch.cat(gradients)[self.index]
        return sum_over_ranks(gradient) if self.sum_gradients else gradient

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss. `grad_norm` is the active gradient's norm before
        clipping.

        Raises ValueError without gradients or if the mask has changed since construction;
        FloatingPointError, before the model is touched, where gradient or update is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flat = get_flat(self.model)
        if flat.device != self.packed.device:  # a Trainer moves the model after its optimizer
            self.packed.data = self.packed.data.to(flat.device)
            self.mask, self.index = self.mask.to(flat.device), self.index.to(flat.device)
            self.load_state_dict(self.state_dict())  # Adam's state follows `packed`
        self.packed.copy_(flat[self.index])  # set_flat may have been called since
        self.packed.grad = self.active_gradient()
        self.grad_norm = nn.utils.clip_grad_norm_(self.packed, self.max_grad_norm)
        if not self.grad_norm.isfinite():
            raise FloatingPointError(f"the norm of the gradient is {self.grad_norm}")
        # torch wraps every class's step for its hooks: super().step() would run them twice
        inspect.unwrap(torch.optim.AdamW.step)(self)
        if not self.packed.isfinite().all():
            raise FloatingPointError("an updated element is not finite")
        flat[self.index] = self.packed
        set_flat(self.model, flat)
        return loss


# ---------------------------------------------------------------------------------- adapter files


def write_file(path, content: bytes):
    """Writes under a temporary name and renames: a write that dies leaves the old file whole. Of
    several processes the first alone writes."""
    path = Path(path)
    if rank_and_size()[0]:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from None


def own_name(name: str) -> str:
    """A module's name without what torch.compile, FSDP and checkpoint_wrapper put into it."""
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def save_adapter(model, folder, base_model=""):
    """Writes PEFT's adapter_config.json and adapter_model.safetensors (float32).

    An anchored adapter is written as the rank-2r pair of `LoRALinear.factors` with lora_alpha
    doubled: exactly our model on the untouched base, whatever the start was. Masks and anchor
    are not in it: to go on training keep `model.state_dict()`. A baseline is written by
    `save_baseline`.
    """
    model, tensors, folder = unwrapped(model), {}, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_baseline(model):
        return save_baseline(model, folder)
    layers = {own_name(n): layer for n, layer in lora_layers(model).items()}
    for name, layer in layers.items():
        A, B = layer.factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
    # target_modules are short names where every module of such a name is adapted
    ends = {name.rpartition(".")[2] for name in layers}
    named = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ends]
    all_adapted = all(isinstance(m, LoRALinear) for m in named)
    layer = next(iter(layers.values()))  # rank, scale and dropout are the same in all
    rank = len(layer.factors()[0])
    model_config = getattr(model, "config", None)  # Hugging Face's, or with its names
    task = "CAUSAL_LM" if hasattr(model_config, "model_type") else None
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": str(base_model or getattr(model_config, "_name_or_path", "")),
        "r": rank,
        "lora_alpha": layer.scale * rank,
        "lora_dropout": layer.dropout,
        "target_modules": sorted(ends if all_adapted else layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    weights = safetensors_bytes(tensors, {"format": "pt"})
    write_file(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_file(folder / "adapter_model.safetensors", weights)


def is_number(x) -> bool:
    return type(x) in (int, float) and abs(x) < 1e300


# field of adapter_config.json: what stands for an absent one, what it must be, the test of that
ADAPTER_FIELDS = {
    "peft_type": (None, "LORA", lambda x: x == "LORA"),
    "r": (None, "a positive integer", lambda x: type(x) is int and x > 0),
    "lora_alpha": (None, "a positive number", lambda x: is_number(x) and x > 0),
    "lora_dropout": (0.0, "a number in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1),
    "use_rslora": (False, "true or false", lambda x: type(x) is bool),
    "bias": ("none", '"none"', lambda x: x == "none"),
    "init_lora_weights": (
        True,
        "a start that leaves the base as it is (PEFT changes the base when it loads this)",
        lambda x: not str(x).lower().startswith(("pissa", "olora", "corda", "loftq")),
    ),
}
UNSUPPORTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "layer_replication", "lora_bias", "trainable_token_indices", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "target_parameters", "kasa_config", "arrow_config",
)  # fmt: skip


def read_adapter(folder):
    """-> {module name: (A, B)}, scale and dropout of an adapter in PEFT's format (ours, or PEFT's
    own). ValueError, one line, on what is misshapen and on features that we do not have."""
    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable PEFT adapter ({str(error)[:100]})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object")
    fields = {}
    for name, (default, needed, fits) in ADAPTER_FIELDS.items():
        fields[name] = default if config.get(name) is None else config[name]
        if not fits(fields[name]):
            raise ValueError(f"{file}: {name} is {repr(fields[name])[:40]}, not {needed}")
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{file}: the adapter uses {name}: not supported")
    pairs, r = {}, fields["r"]
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if not match:
            raise ValueError(f"{folder}: tensor {key[:80]} is not a LoRA factor of an nn.Linear")
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    for name, pair in pairs.items():
        A, B = pair.get("A", torch.empty(0)), pair.get("B", torch.empty(0))
        if A.ndim != 2 or B.ndim != 2 or (len(A), B.shape[1]) != (r, r):
            raise ValueError(f"{folder}: {name} has no A (r, in) and B (out, r) of r = {r}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{folder}: {name} holds numbers that are not finite")
        pairs[name] = (A, B)
    if not pairs:
        raise ValueError(f"{folder}: the adapter file holds no tensors")
    scale = fields["lora_alpha"] / (math.sqrt(r) if fields["use_rslora"] else r)
    return pairs, scale, fields["lora_dropout"]


def load_adapter(model, folder):
    """Adds a LoRA adapter in PEFT's format (ours or PEFT's own) to a model without LoRA layers.

    The layers have no anchor: the file holds the whole difference from the base, at rank 2r if it
    was anchored. To go on with the method itself use `model.load_state_dict` after `add_lora`.
    Raises ValueError, one line, on features that we do not have and on tensors that do not fit.
    """
    pairs, scale, dropout = read_adapter(folder)
    refuse_adapted(model)
    named = unwrapped(model).named_modules(remove_duplicate=False)
    modules = {own_name(n): m for n, m in named}
    for name, (A, B) in pairs.items():
        why = why_unfit(modules[name], r=1) if name in modules else "is missing here"
        if why:
            raise ValueError(f"{folder}: {name} {why}")
        needed, shape = (B.shape[0], A.shape[1]), tuple(modules[name].weight.shape)
        if needed != shape:
            raise ValueError(f"{folder}: {name} is for a linear of {needed}, which is {shape} here")
    model.requires_grad_(False)
    for name, (A, B) in pairs.items():
        LoRALinear.adapt(modules[name], A, B, scale, dropout, anchored=False)
    return model


@torch.no_grad()
def merge(model):
    """Folds every adapter into its weight, W + s (B A - B0 A0) in float32 stored in W's dtype, and
    makes the layers plain `nn.Linear`s again. In place; returns the model."""
    for layer in lora_layers(model).values():
        A, B = layer.factors()
        merged = torch.addmm(layer.weight.float(), B, A, alpha=layer.scale).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
        for name in ("lora_A", "lora_B", "anchor_A", "anchor_B", "mask_A", "mask_B"):
            delattr(layer, name)
        del layer.scale, layer.dropout, layer.cached
        layer.__class__ = nn.Linear
    config = getattr(unwrapped(model), "config", None)
    if hasattr(config, "_name_or_path"):
        config._name_or_path = ""  # another adapter on top is none of the old checkpoint
    return model


# ------------------------------------------------------------------ the baselines of table 6
#
# n virtual tokens stand before each prompt: the ids V .. V + n - 1, from the vocabulary's end on.
# Modules are changed in place instead of the decoder, so that its cache, log-probs and generation
# stay as they are. What they train is float32, and all of it moves: `MaskedAdamW` sees one mask.


def put_virtual(vectors, ids, x):
    """x (B, T, ..), replaced by vectors[ids] where ids (B, T) >= 0."""
    return torch.where((ids >= 0)[..., None], vectors[ids.clamp(min=0)].to(x.dtype), x)


class VirtualEmbedding(nn.Embedding):
    """Answers the virtual ids with trained vectors. Prompt Tuning (Lester et al. 2021): free ones;
    P-Tuning (Liu et al. 2021): through an MLP; for Prefix-Tuning it only notes where they are."""

    def forward(self, tokens):
        self.ids = tokens - self.num_embeddings  # (B, T): which virtual token, negative: none
        words = F.embedding(tokens.clamp(max=self.num_embeddings - 1), self.weight)
        if self.virtual is None:
            return words
        virtual = self.virtual if self.mlp is None else self.mlp(self.virtual)  # (n, H)
        return put_virtual(virtual, self.ids, words)


class PrefixLinear(nn.Linear):
    """k_proj or v_proj whose output at the virtual tokens is trained: Prefix-Tuning (Li and Liang
    2021). A key is rotated with its position as any other."""

    def forward(self, x):
        (embedding,) = self.source  # in a tuple, so that it is no submodule of this one
        return put_virtual(self.prefix, embedding.ids, F.linear(x, self.weight, self.bias))


class ScaledLinear(nn.Linear):
    """IA3 (Liu et al. 2022): a trained factor for each output of k_proj and v_proj, each input of
    down_proj."""

    def forward(self, x):
        scale = self.scale.to(x.dtype)
        if self.on_input:
            return F.linear(x * scale, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias) * scale


BASELINES = (VirtualEmbedding, PrefixLinear, ScaledLinear)
BASELINE_METHODS = ("prompt", "p-tuning", "prefix", "ia3")


@torch.no_grad()
def add_baseline(model, method: str, n=20, generator=None):
    """Freezes the model and adds a baseline of the paper's table 6 in place; returns it.

    Starts: prompt: the embeddings of n random tokens; p-tuning: N(0, 1) through an MLP with two
    hidden layers, as wide as the model; prefix: the keys and values of n random tokens (without the
    paper's MLP); ia3: ones. All but ia3 need prompts that begin with the n virtual ids. With
    prefix and recomputation (checkpointing) each forward needs its backward before the next one.
    Raises ValueError on a model that is adapted already or lacks plain modules of these names.
    """
    refuse_adapted(model)
    if method not in BASELINE_METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(BASELINE_METHODS)}")
    named = {"k_proj": [], "v_proj": [], "down_proj": []}  # end of the name -> its linears
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rpartition(".")[2] in named:
            named[name.rpartition(".")[2]].append(module)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    needed = {"prefix": ["k_proj", "v_proj"], "ia3": list(named)}.get(method, [])
    if type(embedding) is not nn.Embedding or not all(named[name] for name in needed):
        raise ValueError(f"{method} needs an nn.Embedding and linears named {needed}")
    model.requires_grad_(False)
    model.baseline = {"method": method, "virtual_tokens": n}
    keys_and_values = named["k_proj"] + named["v_proj"]
    device, (V, H) = embedding.weight.device, embedding.weight.shape
    on_cpu = {"device": "cpu", "dtype": torch.float32}
    if method == "ia3":
        for linear in keys_and_values + named["down_proj"]:
            linear.__class__, linear.on_input = ScaledLinear, linear in named["down_proj"]
            width = linear.in_features if linear.on_input else linear.out_features
            linear.scale = nn.Parameter(torch.ones(width, device=device, dtype=torch.float32))
        return model
    words = torch.randint(V, (1, n), generator=generator, device="cpu")  # n random tokens
    words = words.to(device)
    if method == "prefix":
        outputs = {}

        def keep(linear, inputs, output):  # output (1, n, out)
            outputs[linear] = output[0]

        hooks = [linear.register_forward_hook(keep) for linear in keys_and_values]
        model(words)
        for hook in hooks:
            hook.remove()
        for linear in keys_and_values:
            linear.__class__, linear.source = PrefixLinear, (embedding,)
            linear.prefix = nn.Parameter(outputs[linear].float().clone())  # (n, out)
    embedding.__class__, embedding.virtual, embedding.mlp = VirtualEmbedding, None, None
    if method == "prompt":
        embedding.virtual = nn.Parameter(embedding.weight[words[0]].float())  # (n, H)
    if method == "p-tuning":
        virtual = torch.randn(n, H, generator=generator, **on_cpu)
        embedding.virtual = nn.Parameter(virtual.to(device))
        first, second, third = (nn.Linear(H, H, **on_cpu) for _ in range(3))
        embedding.mlp = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).to(device)
        for p in embedding.mlp.parameters():  # PyTorch's own start, from our generator
            drawn = torch.rand(p.shape, generator=generator, **on_cpu)
            p.copy_((2 * drawn - 1) / math.sqrt(H))
    return model


def save_baseline(model, folder):
    """Writes what a baseline trains, in a format of our own."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    about = json.dumps(model.baseline) + "\n"
    write_file(Path(folder) / "baseline.json", about.encode())
    write_file(Path(folder) / "baseline.safetensors", safetensors_bytes(tensors))


def load_baseline(model, folder):
    """Adds a saved baseline to a plain model; returns it. ValueError on files that do not fit."""
    try:
        about = json.loads((Path(folder) / "baseline.json").read_text())
        tensors = load_file(Path(folder) / "baseline.safetensors")
        add_baseline(model, about["method"], about["virtual_tokens"])
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as why:
        raise ValueError(f"{folder}: not a readable baseline ({str(why)[:100]})") from None
    for name, p in trainable(model).items():
        if name not in tensors or tensors[name].shape != p.shape:
            raise ValueError(f"{folder}: no {name} of shape {tuple(p.shape)} for this model")
        p.data.copy_(tensors[name])
    return model
