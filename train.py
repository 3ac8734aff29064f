"""LoRA-PAR from end to end: score -> partition -> sft -> grpo -> evaluate (paper, Algorithm 1).

    python train.py                                        # the toy world, no GPU, no network
    python train.py --model FOLDER --data gsm8k --data-path DIR --labels labels.jsonl --out runs/x

`run` at the end of this file is the whole method in five calls. A run lives in one folder
(config, labels, scores, partition, adapters, metrics, report); the same command on the same folder
goes on where it stopped. Sweeps are shell loops over --seed, --theta ... with an --out each.
Left out: several GPUs, and training on anything but the two systems' data.
"""

import argparse
import ctypes
import json
import math
import os
import random
import resource
import statistics
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import grpo
import lorapar
import model as decoder

# ---------------------------------------------------------------------------------- configuration


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run; each field is a command line flag. Defaults are the paper's, where it
    gives them; without --model the toy preset below replaces some."""

    # what goes in and out
    model: str | None = flag(None, "model folder or Hub id; without it the toy world runs")
    data: str = flag("toy", f"data set: {', '.join(data.DATASETS)}")
    data_path: str | None = flag(None, "its folder or file, as its publisher ships it")
    rl_data: str | None = flag(None, "another set for stage 2, where --data cannot be checked")
    rl_data_path: str | None = flag(None, "its folder or file")
    eval_data: str | None = flag(None, "another set for the evaluation")
    eval_data_path: str | None = flag(None, "its folder or file")
    labels: str | None = flag(
        None, 'S1/S2 labels: a labels.jsonl, the authors\' csv, or "steps:K" (GSM8K stand-in)'
    )
    prompt: Literal["plain", "chat", "authors"] = flag(
        "plain", "the question alone, the checkpoint's chat template, or the authors' templates"
    )
    out: str = flag("runs/toy", "the run folder")
    seed: int = flag(0, "seeds everything")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "base weights; auto: the checkpoint's on CUDA, float32 on CPU"
    )
    # LoRA
    targets: str = flag("qkvgud", "projections that get an adapter: letters of q k v o g u d")
    r: int = flag(8, "LoRA rank")
    lora_alpha: float = flag(64.0, "LoRA scale is lora_alpha / r")
    dropout: float = flag(0.05, "LoRA dropout, in SFT only")
    init: Literal["anchored", "gaussian", "lora", "pissa", "olora"] = flag(
        "anchored", "the adapter's start; all but gaussian leave the model as it is at step 0"
    )
    # the method
    score_examples: int = flag(100, "examples a system that importance is measured on")
    theta: float = flag(0.9, "cumulative importance of a system's region, in (0, 1]")
    alpha: float = flag(1.0, "share of the shared region that SFT trains")
    beta: float = flag(1.0, "share of the shared region that RL trains")
    select: Literal["importance", "random", "random-in-tensor"] = flag(
        "importance", "ablation: permute the scores so that regions keep only their sizes"
    )
    order: Literal["sft,rl", "rl,sft", "sft", "rl"] = flag("sft,rl", "the stages and their order")
    stage_data: Literal["split", "all"] = flag("split", "a stage trains on its system, or on all")
    # stage 1: SFT
    sft_lr: float = flag(2e-4, "learning rate")
    sft_epochs: int = flag(1, "epochs over the S1 examples")
    sft_steps: int | None = flag(None, "at most this many optimizer steps")
    sft_batch: int = flag(32, "examples an optimizer step (the paper accumulates 32)")
    sft_warmup: float = flag(0.03, "share of the steps that warm up, then cosine")
    sft_weight_decay: float = flag(0.0, "AdamW's decoupled weight decay")
    sft_grad_norm: float = flag(1.0, "clip the norm of the active gradient at this")
    max_length: int = flag(512, "tokens of question and answer in SFT and scoring")
    # stage 2: GRPO
    rl_lr: float = flag(5e-6, "learning rate")
    rl_epochs: int = flag(1, "epochs over the S2 prompts")
    rl_steps: int | None = flag(None, "at most this many optimizer batches")
    rl_prompts: int = flag(4, "prompts a batch")
    rl_group: int = flag(8, "answers a prompt (the group)")
    rl_updates: int = flag(1, "optimizer steps a batch; the ratio clip acts from the second on")
    rl_warmup: float = flag(0.1, "share of the batches that warm up, then cosine")
    rl_weight_decay: float = flag(0.1, "AdamW's decoupled weight decay")
    rl_grad_norm: float = flag(0.1, "clip the norm of the active gradient at this")
    max_prompt: int = flag(128, "longer prompts are left out of RL, and counted")
    max_response: int = flag(256, "tokens an answer may have, in RL and evaluation")
    temperature: float = flag(0.9, "softmax temperature of rollouts and of their log-probs")
    kl: float = flag(0.04, "weight of the KL to the policy as it was when RL began; 0: none")
    clip: float = flag(0.2, "PPO's ratio clip")
    # size and speed
    train_examples: int | None = flag(None, "use at most this many training examples")
    eval_examples: int | None = flag(None, "evaluate on at most this many examples")
    eval_split: Literal["test", "validation"] = flag("test", "choose settings on validation only")
    eval_batch: int = flag(64, "prompts a batch in evaluation")
    micro_batch: int = flag(8, "rows, or answers of GRPO, a forward and backward")
    checkpointing: bool = flag(False, "recompute layers in the backward: less memory, slower")
    save_every: int = flag(50, "steps between saves of the resume state")
    allow_network: bool = flag(False, "run code answers even where their network cannot be closed")


TOY = {
    "lora_alpha": 32.0,
    "dropout": 0.0,
    "sft_lr": 3e-3,
    "sft_epochs": 8,
    "rl_lr": 4e-3,
    "rl_steps": 80,
    "rl_prompts": 16,
    "rl_weight_decay": 0.0,
    "rl_grad_norm": 1.0,
    "max_length": 32,
    "max_prompt": 16,
    "max_response": 12,
    "temperature": 1.0,
    "kl": 0.005,
    "eval_batch": 1024,
    "micro_batch": 128,
}
TOY_BASE = {"layers": 2, "hidden": 128, "heads": 4, "ffn": 256, "steps": 1000, "batch": 96}


def add_flags(parser, names):
    for f in fields(Config):
        if f.name not in names:
            continue
        kind, choices = f.type, None
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        elif isinstance(kind, types.UnionType):
            kind = get_args(kind)[0]
        default = f"{TOY[f.name]} in the toy, else {f.default}" if f.name in TOY else f.default
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
        option = "--" + f.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(option, action="store_true", help=text)
        else:
            parser.add_argument(option, type=kind, choices=choices, help=text)


def read_config(arguments) -> Config:
    """The command line -> Config: defaults, then the toy preset, then what the user said."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="python train.py eval --help: evaluate a checkpoint, with or without an adapter; "
        "python train.py bench --help: what a model shape costs on this machine",
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser, [f.name for f in fields(Config)])
    said = vars(parser.parse_args(arguments))
    preset = {} if said.get("model") else TOY
    config = Config(**(preset | said))
    check_config(config)
    return config


def check_config(c: Config):
    """Raises ValueError, naming the flag, on settings that cannot work together."""
    if (c.data == "toy") != (c.model is None):
        raise ValueError("--model and --data go together: give both, or neither for the toy world")
    for name in filter(None, (c.data, c.rl_data, c.eval_data)):
        if name not in data.DATASETS:
            raise ValueError(f"--data {name}: unknown; one of {', '.join(data.DATASETS)}")
    for flag_, name in (("rl", c.rl_data or c.data), ("eval", c.eval_data or c.data)):
        if not data.DATASETS[name].checked and (flag_ == "eval" or "rl" in c.order):
            raise ValueError(f"answers of {name} cannot be checked: name a set with --{flag_}-data")
    if c.model and not c.labels:
        raise ValueError('--labels is missing: a file of votes, or "steps:2" for GSM8K')
    check_ranges(c)


def check_ranges(c: Config):
    """Raises ValueError, naming the flag, on a value out of range."""
    if not 0 < c.theta <= 1:
        raise ValueError(f"--theta {c.theta} is outside (0, 1]")
    for name in ("alpha", "beta", "dropout", "sft_warmup", "rl_warmup"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)} is outside [0, 1]")
    for f in fields(Config):
        value = getattr(c, f.name)
        if type(value) is int and f.name != "seed" and value < 1:
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be at least 1")
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(
                f"--{f.name.replace('_', '-')} {value}: must be finite and not negative"
            )
    if c.rl_group < 2:
        raise ValueError("--rl-group 1: an answer needs others of its group to compare with")
    if c.temperature == 0:
        raise ValueError("--temperature 0: greedy rollouts of a group are all equal")
    if c.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {c.device}: this PyTorch sees no GPU")


# --------------------------------------------------------------------------------- the run folder


def write_json(path, value):
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def settings(c: Config) -> dict:
    return {name: value for name, value in asdict(c).items() if name != "out"}


def open_run(c: Config):
    """-> the run folder and its report so far. Raises ValueError if it holds another run."""
    out, report = Path(c.out), {"evaluation": {}, "partition": {}, "data": {}}
    report |= {"seconds": {}, "peak_gb": {}}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from None
    if (out / "config.json").exists():
        old, new = decoder.read_json(out / "config.json"), settings(c)
        for name in new | old:
            if new.get(name) != old.get(name):
                raise ValueError(
                    f"{out} holds a run with --{name.replace('_', '-')} {old.get(name)}, not "
                    f"{new.get(name)}: choose another --out, or delete that folder"
                )
    if (out / "report.json").exists():
        report = decoder.read_json(out / "report.json")
    return out, report


def save_state(folder, model, optimizer, step, generator):
    """Everything a stage needs to go on bit for bit, in one file that is renamed into place."""
    adam = optimizer.state[optimizer.packed]
    tensors = {f"adam.{name}": value for name, value in adam.items()}
    tensors |= {"flat": lorapar.get_flat(model), "rng": torch.get_rng_state()}
    tensors["generator"] = generator.get_state()
    if torch.cuda.is_available():
        tensors["cuda_rng"] = torch.cuda.get_rng_state()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / "state.safetensors.tmp", metadata={"step": str(step)})
    os.replace(folder / "state.safetensors.tmp", folder / "state.safetensors")


def load_state(folder, model, optimizer, generator) -> int:
    """Puts a saved state back and returns how many steps it has behind it; 0 if there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            step = int(file.metadata()["step"])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}); delete it to redo the stage") from None
    lorapar.set_flat(model, tensors.pop("flat"))
    torch.set_rng_state(tensors.pop("rng"))
    generator.set_state(tensors.pop("generator"))
    if "cuda_rng" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors.pop("cuda_rng"))
    device = optimizer.packed.device
    adam = {name[5:]: t for name, t in tensors.items() if name.startswith("adam.")}
    if adam["exp_avg"].shape != optimizer.packed.shape:
        raise ValueError(f"{path}: made with another mask; delete it to redo the stage")
    optimizer.state[optimizer.packed] = {
        name: t if name == "step" else t.to(device) for name, t in adam.items()
    }
    return step


class Metrics:
    """metrics.jsonl, a line a step; a resumed stage first drops the lines it will write again."""

    def __init__(self, out: Path, stage: str, first_step: int):
        self.path, self.stage = out / "metrics.jsonl", stage
        if self.path.exists():
            kept = [r for _, r in data.read_jsonl(self.path)]
            kept = [r for r in kept if r["stage"] != stage or r["step"] < first_step]
            data.write_jsonl(self.path, kept)

    def log(self, step: int, values: dict):
        with open(self.path, "a") as out:
            out.write(json.dumps({"stage": self.stage, "step": step} | values) + "\n")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def peak_memory(device) -> int:
    """Bytes: the GPU's peak since the last call, or this process' peak so far."""
    if not device.startswith("cuda"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def keep_pages():
    """Tells glibc not to give freed memory back to the kernel: fetching the pages of large tensors
    anew at every allocation costs as much as computing on them (importance took twice as long).
    The price: the process stays as large as it ever was."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def bar(items, what):
    """A progress bar; in a log file it speaks every half minute only."""
    return tqdm(items, desc=what, leave=False, mininterval=0.2 if sys.stderr.isatty() else 30)


# -------------------------------------------------------------------------------------- toy world


def make_toy_base(c: Config, folder: Path, world: data.ToyWorld):
    """Trains the toy's tiny base on the unreliable corpus; writes a Hugging Face style folder."""
    b = TOY_BASE
    torch.manual_seed(c.seed)
    config = decoder.Config(
        vocab_size=len(data.TOY_TOKENS),
        hidden_size=b["hidden"],
        intermediate_size=b["ffn"],
        num_hidden_layers=b["layers"],
        num_attention_heads=b["heads"],
        num_key_value_heads=b["heads"],
        head_dim=b["hidden"] // b["heads"],
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = decoder.Transformer(config).to(c.device)
    for p in model.parameters():
        if p.ndim == 2:  # 1 / sqrt(fan in): a std of 0.02 gets stuck in so small a model
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    data.save_toy_tokenizer(folder)
    write_json(folder / "config.json", {"eos_token_id": 0})  # the tokenizer reads it from here
    tokenizer = data.Tokenizer(folder)
    rows, _ = data.tokenize(world.corpus(b["steps"] * b["batch"]), tokenizer, c.max_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    started = time.perf_counter()
    for step in range(b["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - step / b["steps"])
        optimizer.zero_grad()
        total = 0.0
        chosen = rows[step * b["batch"] : (step + 1) * b["batch"]]
        for tokens, labels in data.batches(chosen, b["batch"] // 2, c.device):  # short, then long
            loss = answer_losses(model, tokens, labels).sum() / b["batch"]
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            elapsed = time.perf_counter() - started
            left = elapsed / (step + 1) * (b["steps"] - step - 1)
            print(f"base {step + 1}/{b['steps']}  loss {total:.3f}  left {clock(left)}")
    decoder.save_model(model, folder, eos_token_id=tokenizer.eos_ids[0])


def toy_inputs(c: Config, out: Path):
    """The toy world's files -> (model folder, data folder), made once a run folder."""
    base, world_folder = out / "base", out / "world"
    if (base / "model.safetensors").exists():
        print(f"toy base: reused from {base}")
    else:
        write_json(out / "config.json", settings(c))
        world = data.make_toy(world_folder, c.seed)
        print(f"toy base: training {TOY_BASE['steps']} steps on the unreliable corpus")
        make_toy_base(c, base, world)
    return base, world_folder


# ----------------------------------------------------------------------------------- the five calls


def answer_losses(model, tokens, labels):
    """(B,): the mean cross-entropy over each example's answer tokens."""
    logp = decoder.token_logprobs(model, tokens, labels)
    return -logp.sum(1) / (labels[:, 1:] != -100).sum(1)


def score(c: Config, model, s1_rows, s2_rows, out: Path):
    """Importance of every LoRA element for both systems, before any training -> s1, s2 (N,)."""
    path = out / "importance.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            s1, s2, start = (file.get_tensor(name).clone() for name in ("s1", "s2", "start"))
        lorapar.set_flat(model, start)
        if c.init in ("anchored", "pissa", "olora"):
            lorapar.set_anchor(model, start)
        print(f"score: reused from {path}")
        return s1, s2
    scores = {"start": lorapar.get_flat(model)}
    for name, rows in (("s1", s1_rows), ("s2", s2_rows)):
        chosen = random.Random(c.seed).sample(rows, min(c.score_examples, len(rows)))
        scores[name] = lorapar.importance(
            model,
            data.batches(chosen, c.micro_batch, c.device),
            decoder.token_logprobs,
            chunk_size=c.micro_batch,
            progress=lambda batches, name=name: bar(batches, f"score {name}"),
        )
        print(f"score: {name} on {len(chosen)} examples")
    save_file({k: v.cpu() for k, v in scores.items()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    return scores["s1"].cpu(), scores["s2"].cpu()


def make_partition(c: Config, model, s1, s2, out: Path):
    """The regions and both stages' masks -> {"sft": mask, "rl": mask}; writes partition.json."""
    generator = torch.Generator().manual_seed(c.seed)
    s1, s2 = lorapar.shuffle_scores(model, s1, s2, c.select, generator)
    part = lorapar.partition(s1, s2, c.theta)
    masks = {
        "sft": lorapar.stage_mask(part, s1, 1, c.alpha),
        "rl": lorapar.stage_mask(part, s2, 2, c.beta),
    }
    regions = part._asdict()
    union = sum(int(r.sum()) for r in regions.values())
    facts = {"elements": len(s1), "regions": {k: int(r.sum()) for k, r in regions.items()}}
    facts["jaccard"] = int(part.shared.sum()) / union
    facts["active"] = {k: int(m.sum()) for k, m in masks.items()}
    facts["active_percent"] = {k: 100 * n / len(s1) for k, n in facts["active"].items()}
    facts["per_projection"] = {}
    position = 0
    for name, factor in lorapar.lora_factors(model).items():
        row = facts["per_projection"].setdefault(name.split(".")[-2], {"elements": 0})
        piece = slice(position, position + factor.numel())
        row["elements"] += factor.numel()
        for region, chosen in regions.items():
            row[region] = row.get(region, 0) + int(chosen[piece].sum())
        position += factor.numel()
    write_json(out / "partition.json", facts)
    save_file(regions, out / "partition.safetensors")  # bool (N,), in lora_factors' order
    active = "  ".join(
        f"{k} {n} ({facts['active_percent'][k]:.1f}%)" for k, n in facts["active"].items()
    )
    print(f"partition: {len(s1)} elements, active {active}, Jaccard {facts['jaccard']:.3f}")
    return masks, facts


def step_indices(n: int, batch: int, epochs: int, limit: int | None, seed: int) -> list[list[int]]:
    """The examples of every step: each epoch one seeded permutation, cut into batches."""
    steps = []
    for epoch in range(epochs):
        order = list(range(n))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[i : i + batch] for i in range(0, n, batch)]
    return steps[:limit]


def cosine(optimizer, steps: int, warmup: float, first_step: int):
    """Linear warm-up over the first share of the steps, then cosine to 0."""
    warm = math.ceil(warmup * steps)

    def factor(step):
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    if first_step:  # a resumed schedule: LambdaLR wants to know where it began
        optimizer.param_groups[0]["initial_lr"] = optimizer.defaults["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=first_step - 1)


def sft(c: Config, model, rows, mask, out: Path):
    """Stage 1: supervised fine-tuning of the masked elements (paper, Algorithm 1)."""
    torch.manual_seed(c.seed)  # for dropout
    generator = torch.Generator()  # unused here; the state file has a place for it
    lorapar.set_mask(model, mask)
    optimizer = lorapar.MaskedAdamW(
        model, lr=c.sft_lr, weight_decay=c.sft_weight_decay, max_grad_norm=c.sft_grad_norm
    )
    steps = step_indices(len(rows), c.sft_batch, c.sft_epochs, c.sft_steps, c.seed)
    first = load_state(out / "sft", model, optimizer, generator)
    if first == len(steps):
        print(f"sft: reused from {out / 'sft'}")
        return
    if first:
        print(f"sft: going on after step {first}")
    scheduler = cosine(optimizer, len(steps), c.sft_warmup, first)
    metrics, started = Metrics(out, "sft", first), time.perf_counter()
    model.train()
    model.model.checkpointing = c.checkpointing
    for step in range(first, len(steps)):
        begun, total = time.perf_counter(), 0.0
        chosen = [rows[i] for i in steps[step]]
        for tokens, labels in data.batches(chosen, c.micro_batch, c.device):
            loss = answer_losses(model, tokens, labels).sum() / len(chosen)
            loss.backward()
            total += loss.detach()
        total = float(total)
        if not math.isfinite(total):
            raise ValueError(f"sft step {step}: the loss is {total}; try a lower --sft-lr")
        optimizer.step()
        optimizer.zero_grad()
        values = {"loss": total, "grad_norm": optimizer.grad_norm.item()}
        values["lr"] = scheduler.get_last_lr()[0]
        scheduler.step()
        now = time.perf_counter()
        values["tokens_per_s"] = round(sum(len(t) for t, _ in chosen) / (now - begun))
        metrics.log(step, values)
        left = (now - started) / (step + 1 - first) * (len(steps) - step - 1)
        print(
            f"sft {step + 1}/{len(steps)}  loss {total:.4f}  grad {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_s']} tok/s  left {clock(left)}"
        )
        if (step + 1) % c.save_every == 0 or step + 1 == len(steps):
            save_state(out / "sft", model, optimizer, step + 1, generator)
    model.eval()
    model.model.checkpointing = False
    lorapar.save_adapter(model, out / "sft", c.model or "toy")


def rl(c: Config, model, tokenizer, examples, mask, out: Path):
    """Stage 2: GRPO on the masked elements (paper, Algorithm 1); KL to the model as it comes in."""
    generator = torch.Generator(c.device).manual_seed(c.seed)
    lorapar.set_mask(model, mask)
    optimizer = lorapar.MaskedAdamW(
        model,
        lr=c.rl_lr,
        betas=(0.9, 0.99),
        weight_decay=c.rl_weight_decay,
        max_grad_norm=c.rl_grad_norm,
    )
    prompts = [data.example_ids(e, tokenizer, c.prompt)[0] for e in examples]
    kept = [(e, p) for e, p in zip(examples, prompts) if len(p) <= c.max_prompt]
    if len(kept) < len(examples):
        print(f"rl: {len(examples) - len(kept)} prompts over --max-prompt {c.max_prompt} left out")
    if not kept:
        raise ValueError(f"rl: no prompt has at most --max-prompt {c.max_prompt} tokens")
    steps = step_indices(len(kept), c.rl_prompts, c.rl_epochs, c.rl_steps, c.seed)
    reference = lorapar.get_flat(model)
    first = load_state(out / "rl", model, optimizer, generator)
    if first == len(steps):
        print(f"rl: reused from {out / 'rl'}")
        return
    if first:
        print(f"rl: going on after step {first}")
    scheduler = cosine(optimizer, len(steps), c.rl_warmup, first)
    metrics, started = Metrics(out, "rl", first), time.perf_counter()
    settings = grpo.Settings(
        group=c.rl_group,
        max_new_tokens=c.max_response,
        eos_ids=tokenizer.eos_ids,
        temperature=c.temperature,
        clip=c.clip,
        beta=c.kl,
        updates=c.rl_updates,
        micro_batch=c.micro_batch,
    )
    model.model.checkpointing = c.checkpointing
    for step in range(first, len(steps)):
        asked = [kept[i] for i in steps[step]]

        def rewards(p, answer, asked=asked):
            return data.reward_parts(asked[p][0], tokenizer.decode(answer))

        prompts = [prompt for _, prompt in asked]
        try:
            values = grpo.grpo_step(
                model, optimizer, prompts, rewards, reference, settings, generator
            )
        except ValueError as error:
            raise ValueError(f"rl step {step + 1}: {error}") from None
        values["lr"] = scheduler.get_last_lr()[0]
        scheduler.step()
        metrics.log(step, values)
        left = (time.perf_counter() - started) / (step + 1 - first) * (len(steps) - step - 1)
        parts = " ".join(f"{k} {v:.2f}" for k, v in values["parts"].items())
        print(
            f"rl {step + 1}/{len(steps)}  reward {values['reward']:.3f} ({parts})  kl "
            f"{values['kl']:.4f}  equal groups {values['equal_groups']}/{len(asked)}  length "
            f"{values['length']:.0f}  {values['rollout_s'] + values['update_s']:.2f} s  "
            f"left {clock(left)}"
        )
        if (step + 1) % c.save_every == 0 or step + 1 == len(steps):
            save_state(out / "rl", model, optimizer, step + 1, generator)
    model.model.checkpointing = False
    lorapar.save_adapter(model, out / "rl", c.model or "toy")


def answer(c: Config, model, tokenizer, examples, prompts, samples: int, generator):
    """-> for each example its [(text of an answer, is it right)]: one greedy answer, or `samples`
    of them at c.temperature. MMLU is answered by the most likely of its four letters."""
    if examples[0].kind == "letter":
        letters = [
            data.example_ids(replace(examples[0], answer=f" {x}"), tokenizer, c.prompt)[1][0]
            for x in "ABCD"
        ]
        best = decoder.next_logprobs(model, prompts)[:, letters].argmax(-1).tolist()
        return [[("ABCD"[i], "ABCD"[i] == e.gold)] for i, e in zip(best, examples)]
    answers = decoder.generate(
        model,
        prompts,
        c.max_response,
        temperature=0 if samples == 1 else c.temperature,
        eos_ids=tokenizer.eos_ids,
        samples_per_prompt=samples,
        generator=generator,
    )
    texts = [[tokenizer.decode(tokens) for tokens in group] for group in answers]
    asked = [(e, text) for e, group in zip(examples, texts) for text in group]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # code answers run for seconds
        right = list(pool.map(lambda x: data.is_correct(*x, c.allow_network), asked))
    verdicts = iter(right)
    return [[(text, next(verdicts)) for text in group] for group in texts]


def evaluate(c: Config, model, tokenizer, examples, what, answers_file=None, samples=1) -> dict:
    """Answers -> per system {"accuracy", "probability", "loss", "examples"}; greedy, or pass@1 and
    pass@k of `samples` answers at c.temperature.

    probability is the mean over examples of p(reference answer, EOS included | question), loss the
    mean cross-entropy of its tokens. "all" is every example, labelled or not. answers_file gets a
    line an example that a person can read.
    """
    model.eval()
    generator = torch.Generator(c.device).manual_seed(c.seed)
    rows, _ = data.tokenize(examples, tokenizer, 10**9, c.prompt, "rl")
    order = sorted(range(len(rows)), key=lambda i: rows[i][1])
    results, records = {}, {}
    for start in bar(range(0, len(order), c.eval_batch), f"evaluate {what}"):
        chosen = order[start : start + c.eval_batch]
        prompts = [rows[i][0][: rows[i][1]] for i in chosen]
        asked = [examples[i] for i in chosen]
        answers = answer(c, model, tokenizer, asked, prompts, samples, generator)
        for i, e, given in zip(chosen, asked, answers):
            right = sum(correct for _, correct in given)
            ks = [k for k in (10, 100, samples) if 1 < k <= samples]
            results[i] = {"accuracy": right / len(given)}
            results[i] |= {f"pass@{k}": data.pass_at_k(samples, right, k) for k in ks}
            records[i] = {"id": e.id, "label": e.label, "correct": right / len(given)}
            records[i] |= {"gold": e.gold, "question": e.question}
            records[i]["answers"] = [text for text, _ in given]
        for part in [chosen[i : i + c.micro_batch] for i in range(0, len(chosen), c.micro_batch)]:
            tokens, labels = data.collate([rows[i] for i in part], c.device)
            with torch.no_grad():
                logp = decoder.token_logprobs(model, tokens, labels).sum(1)
            counts = (labels[:, 1:] != -100).sum(1)
            for i, p, n in zip(part, logp.tolist(), counts.tolist()):
                results[i] |= {"probability": math.exp(p), "loss": -p / n}
    table = {}
    for system in ("S1", "S2", "all"):
        members = [results[i] for i, e in enumerate(examples) if system in ("all", e.label)]
        if members:
            table[system] = {k: sum(m[k] for m in members) / len(members) for k in members[0]}
            table[system]["examples"] = len(members)
    if answers_file:
        data.write_jsonl(answers_file, (records[i] for i in range(len(examples))))
    shown = "  ".join(f"{system} {row['accuracy']:.1%}" for system, row in table.items())
    print(f"evaluate {what}: {shown}")
    return table


def write_report(c: Config, out: Path, report: dict):
    """report.json as it stands, and report.md: the table a person reads. Returns the text."""
    write_json(out / "report.json", report)
    rows = report["evaluation"]
    systems = [s for s in ("S1", "S2", "all") if any(s in row for row in rows.values())]
    lines = [f"# LoRA-PAR: {c.data}, seed {c.seed}", ""]
    lines += [
        "| | " + " | ".join(f"{s} accuracy | {s} p(answer) | {s} loss" for s in systems) + " |"
    ]
    lines += ["|---|" + "---|---|---|" * len(systems)]
    for stage, row in rows.items():
        cells = [
            f"{100 * row[s]['accuracy']:.1f}% | {row[s]['probability']:.3f} | {row[s]['loss']:.3f}"
            for s in systems
        ]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    examples = ", ".join(f"{s} {n['examples']}" for s, n in next(iter(rows.values())).items())
    lines += ["", f"{c.eval_split} examples: {examples}; greedy answers.", ""]
    p = report["partition"]
    lines += ["| elements | S1-only | S2-only | shared | Jaccard | active in SFT | active in RL |"]
    lines += ["|---|---|---|---|---|---|---|"]
    regions = " | ".join(f"{p['regions'][k]}" for k in ("s1_only", "s2_only", "shared"))
    active = " | ".join(f"{p['active'][k]} ({p['active_percent'][k]:.1f}%)" for k in ("sft", "rl"))
    lines += [f"| {p['elements']} | {regions} | {p['jaccard']:.3f} | {active} |", ""]
    lines += [f"- {name}: {value}" for name, value in report["data"].items()]
    seconds = "  ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items())
    peaks = "  ".join(f"{k} {v:.2f}" for k, v in report["peak_gb"].items())
    lines += ["", f"Seconds: {seconds}", "", f"Peak memory up to the end of each, GB: {peaks}", ""]
    text = "\n".join(lines)
    (out / "report.md").write_text(text)
    return text


# ------------------------------------------------------------------------------------ the lecture


def load(c: Config, model_path):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtypes["auto"] = None if c.device.startswith("cuda") else torch.float32
    return decoder.load_model(model_path, c.device, dtypes[c.dtype])


def load_labels(c: Config, data_path, examples, report: dict) -> list[dict]:
    """The label records of `examples`: the teachers' votes in the toy, else what --labels says."""
    if c.data == "toy" and not c.labels:
        files = sorted((Path(data_path) / "answers").glob("*.jsonl"))
        records, votes = data.count_votes(data.read_answers(files), len(files))
        report["data"] |= {f"votes: {k}": v for k, v in votes.items()}
        return records
    records = [{"id": e.id, "label": e.label} for e in data.label_examples(examples, c.labels)]
    if not records:
        raise ValueError(f"--labels {c.labels}: no label matches an example of {c.data}")
    return records


def prepare(c: Config, model_path, data_path, out: Path, report: dict):
    """Reads and checks every input before anything is written -> model, tokenizer, labelled
    training examples by system, evaluation examples. Counts go into the report."""
    train = {"S1": data.load_dataset(c.data, data_path, "train")}
    train["S2"] = train["S1"]  # stage 2 and the evaluation may have sets of their own
    if c.rl_data:
        train["S2"] = data.load_dataset(c.rl_data, c.rl_data_path, "train")
    if c.eval_data:
        test = data.load_dataset(c.eval_data, c.eval_data_path, c.eval_split)
    else:
        test = data.load_dataset(c.data, data_path, c.eval_split)
    everything = {e.id: e for e in train["S1"] + train["S2"] + test}
    records = load_labels(c, data_path, list(everything.values()), report)
    labels = out / "labels.jsonl"
    if labels.exists() and (out / "config.json").exists():
        if [r for _, r in data.read_jsonl(labels)] != records:
            raise ValueError(
                f"--labels {c.labels}: other labels than this run began with ({labels})"
            )
    known = {r["id"]: r["label"] for r in records}
    random.Random(c.seed).shuffle(test)
    test = [replace(e, label=known.get(e.id, e.label)) for e in test]
    tokenizer = data.Tokenizer(model_path)
    systems = {}
    for system, examples in train.items():
        labelled = [replace(e, label=known[e.id]) for e in examples if e.id in known]
        report["data"][f"{system} source: without a label"] = len(examples) - len(labelled)
        random.Random(c.seed).shuffle(labelled)
        systems[system] = [e for e in labelled[: c.train_examples] if e.label == system]
        if not systems[system]:
            raise ValueError(
                f"no {system} training example among {len(labelled)} labelled ones: check --labels"
            )
    model = load(c, model_path)
    data.write_jsonl(labels, records)
    write_json(out / "config.json", settings(c))
    return model, tokenizer, systems, test[: c.eval_examples]


def run(c: Config):
    """The whole method on one run folder. Returns the report (also report.json)."""
    out, report = open_run(c)
    last = time.perf_counter()

    def took(what):  # the first time counts: a reused result took no time
        nonlocal last
        now = time.perf_counter()
        report["seconds"].setdefault(what, round(now - last, 2))
        report["peak_gb"].setdefault(what, round(peak_memory(c.device) / 1e9, 2))
        last = now

    def evaluated(what):
        if what in report["evaluation"]:
            print(f"evaluate {what}: reused from {out / 'report.json'}")
        else:
            file = out / "answers" / f"{what}.jsonl"
            report["evaluation"][what] = evaluate(c, model, tokenizer, test, what, file)
        took(f"evaluate {what}")
        write_json(out / "report.json", report)

    data_path = c.data_path
    if c.model:
        model_path = decoder.find_model(c.model)
    else:
        model_path, data_path = toy_inputs(c, out)
        took("toy base")
    model, tokenizer, systems, test = prepare(c, model_path, data_path, out, report)
    rows = {}
    for system, examples in systems.items():
        rows[system], counts = data.tokenize(examples, tokenizer, c.max_length, c.prompt, "sft")
        counts = {"examples": len(rows[system])} | counts
        report["data"] |= {f"{system} {k}": v for k, v in counts.items()}
    took("load")

    evaluated("base")
    start = torch.Generator().manual_seed(c.seed)
    lorapar.add_lora(model, c.targets, c.r, c.lora_alpha, c.dropout, c.init, generator=start)
    s1, s2 = score(c, model, rows["S1"], rows["S2"], out)
    took("score")
    masks, report["partition"] = make_partition(c, model, s1, s2, out)
    took("partition")
    if c.init == "gaussian":
        evaluated("init")
    both = c.stage_data == "all"
    for stage in c.order.split(","):
        if stage == "sft":
            sft(c, model, rows["S1"] + (rows["S2"] if both else []), masks["sft"], out)
        else:
            examples = systems["S2"] + (systems["S1"] if both else [])
            examples = [e for e in examples if e.kind != "text"]  # what a reward can check
            rl(c, model, tokenizer, examples, masks["rl"], out)
        took(stage)
        evaluated(stage)
    print("\n" + write_report(c, out, report))
    print(f"everything is in {out}")
    return report


EVAL_FLAGS = "model data data_path labels prompt seed device dtype max_response temperature"
EVAL_FLAGS += " eval_examples eval_split eval_batch micro_batch allow_network"


def run_eval(arguments):
    """python train.py eval: the accuracy of a checkpoint, with or without an adapter."""
    parser = argparse.ArgumentParser("train.py eval", argument_default=argparse.SUPPRESS)
    add_flags(parser, EVAL_FLAGS.split())
    parser.add_argument("--adapter", default=None, help="a folder in PEFT's format")
    parser.add_argument("--samples", type=int, default=1, help="over 1: sample, and give pass@k")
    parser.add_argument("--out", default="answers.jsonl", help="every answer, a line an example")
    said = vars(parser.parse_args(arguments))
    adapter, samples, out = (said.pop(name) for name in ("adapter", "samples", "out"))
    c = Config(**said)
    if not c.model or c.data == "toy" or samples < 1:
        raise ValueError("eval needs --model and --data, and --samples of at least 1")
    check_ranges(c)
    examples = data.load_dataset(c.data, c.data_path, c.eval_split)
    if not data.DATASETS[c.data].checked:
        raise ValueError(f"answers of {c.data} cannot be checked")
    if c.labels:
        known = {e.id: e for e in data.label_examples(examples, c.labels)}
        examples = [known.get(e.id, e) for e in examples]
    random.Random(c.seed).shuffle(examples)
    path = decoder.find_model(c.model)
    tokenizer, model = data.Tokenizer(path), load(c, path)
    if adapter:
        lorapar.load_adapter(model, adapter)
    table = evaluate(c, model, tokenizer, examples[: c.eval_examples], c.data, out, samples)
    print(json.dumps(table, indent=2))
    print(f"every answer is in {out}")


# --------------------------------------------------------------------------------------- benchmark

SHAPES = {  # hidden, layers, heads, key-value heads, ffn, vocabulary
    "58m": (512, 8, 8, 8, 1376, 32000),
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064),
}


def random_model(name, device, dtype):
    """A model of a known shape, or of a folder's config.json, with random weights."""
    if name in SHAPES:
        hidden, layers, heads, kv_heads, ffn, vocabulary = SHAPES[name]
        kind = "qwen2" if name.startswith("qwen") else "llama"
        sizes = (vocabulary, hidden, ffn, layers, heads, kv_heads, hidden // heads)
        config = decoder.Config(*sizes, model_type=kind)
    else:
        path = decoder.find_model(name) / "config.json"
        config = decoder.Config.from_dict(decoder.read_json(path), str(path))
    with torch.device("meta"):
        model = decoder.Transformer(config)
    model.to_empty(device=device).to(dtype).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim == 2 else p.fill_(1.0)
    model.model.inv_freq = decoder.rope_frequencies(config).to(device)
    return model.eval()


def seconds(work, device, repeats=3) -> float:
    """The median time of work(), after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def machine_limits(device, dtype):
    """-> the best operations a second of large matrix products, and bytes a second of a copy."""
    rates = []
    for n in (4096, 8192) if device.startswith("cuda") else (1024, 2048, 4096):
        square = torch.randn(n, n, device=device, dtype=dtype)
        rates.append(2 * n**3 / seconds(lambda s=square: decoder.linear(s, s), device, 5))
    block = torch.zeros(2**27, dtype=torch.uint8, device=device)
    other = torch.zeros_like(block)
    copy = seconds(lambda: other.copy_(block), device, 5)
    return max(rates), 2 * len(block) / copy


def run_bench(arguments):
    """python train.py bench: what a shape costs on this device, each figure beside its floor.

    Floors: the arithmetic at the rate of a large matrix product, the bytes at the rate of a copy,
    both measured here. SFT counts 4 FLOPs a parameter and token (forward, and backward to the
    activations: the frozen weights need no gradient), decoding reads weights and KV cache once a
    step. A prompt counts once for the answers to it, in rollouts and in the update.
    """
    parser = argparse.ArgumentParser("train.py bench", description=run_bench.__doc__)
    parser.add_argument("--shape", default="58m", help=f"{', '.join(SHAPES)}, or a model folder")
    add_flags(parser, ["device", "targets", "r"])
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--batch", type=int, default=8, help="rows of SFT and importance")
    parser.add_argument("--length", type=int, default=256, help="tokens a row, half of them answer")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a GRPO step")
    parser.add_argument("--group", type=int, default=8, help="answers a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens an answer")
    parser.add_argument("--json", action="store_true", help="one JSON line a figure")
    parser.set_defaults(device=Config.device, targets=Config.targets, r=Config.r)
    b = parser.parse_args(arguments)
    cuda = b.device.startswith("cuda")
    dtype = getattr(torch, b.dtype or ("bfloat16" if cuda else "float32"))
    torch.manual_seed(0)

    flops, bandwidth = machine_limits(b.device, dtype)

    def figure(what, value, unit, floor=None):
        share = f"  {floor / value:6.1%} of the floor's speed" if floor else ""
        if b.json:
            line = {"shape": b.shape, "device": b.device, "figure": what, "value": value}
            print(json.dumps(line | {"unit": unit, "floor_seconds": floor}))
        else:
            print(f"{what:44s} {value:12.4g} {unit}{share}")

    figure("matrix product", flops / 1e9, "GFLOP/s")
    figure("memory copy, bytes read and written", bandwidth / 1e9, "GB/s")
    model = random_model(b.shape, b.device, dtype)
    lorapar.add_lora(model, b.targets, b.r)
    c = model.config
    head = model.head_weight.numel()
    body = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    weights = (body + head) * model.head_weight.element_size()
    rows = [(torch.randint(c.vocab_size, (b.length,)).tolist(), b.length // 2)] * b.batch
    tokens, labels = data.collate(rows, b.device)
    answers = int((labels[:, 1:] != -100).sum())
    N = len(lorapar.get_flat(model))
    optimizer = lorapar.MaskedAdamW(model, lr=1e-5, max_grad_norm=1.0)

    def forward_backward():
        answer_losses(model, tokens, labels).mean().backward()

    def sft_step():
        forward_backward()
        optimizer.step()
        optimizer.zero_grad()

    floor = 4 * (body * tokens.numel() + head * answers) / flops
    time_sft = seconds(sft_step, b.device)
    figure("SFT step", time_sft, "s", floor)
    figure("SFT tokens", tokens.numel() / time_sft, "tokens/s")
    optimizer.zero_grad()
    plain = seconds(forward_backward, b.device)

    def score_batch():
        lorapar.importance(model, [(tokens, labels)], decoder.token_logprobs, chunk_size=b.batch)

    time_score = seconds(score_batch, b.device)
    figure("importance", time_score, "s", floor)
    figure("importance: a plain forward and backward", plain, "s")
    figure("importance: plain time / its time", plain / time_score, "")
    figure("importance examples", b.batch / time_score, "examples/s")

    scores = torch.rand(2, N) ** 4
    time_cut = seconds(lambda: lorapar.partition(*scores, 0.9), b.device)
    figure(f"partition of {N} elements, both systems", time_cut, "s")
    figure("partition: two sorts", seconds(lambda: scores.sort(stable=True), b.device, 1), "s")

    prompts = [row[: b.length // 2] for row, _ in rows[:1] * b.prompts]
    s = grpo.Settings(
        group=b.group, max_new_tokens=b.new_tokens, temperature=1.0, micro_batch=b.batch
    )
    R = b.prompts * b.group
    time_rollout = seconds(lambda: grpo.rollouts(model, prompts, s), b.device, 2)
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
    asked = len(prompts) * len(prompts[0])  # prompt tokens, each computed once for its group
    prefill = 2 * body * asked / flops
    steps = [
        max(2 * (body + head) * R / flops, (weights + cache * (asked + R * t)) / bandwidth)
        for t in range(1, b.new_tokens)
    ]
    figure("rollouts", time_rollout, "s", prefill + sum(steps))
    figure("rollout tokens", R * b.new_tokens / time_rollout, "tokens/s")
    sampled = grpo.rollouts(model, prompts, s)
    advantages = torch.randn(b.prompts, b.group)
    reference = lorapar.get_flat(model)
    for beta, what in ((0.0, "GRPO update without KL"), (0.04, "GRPO update with KL")):
        s.beta = beta
        time_update = seconds(
            lambda: grpo.grpo_update(model, optimizer, sampled, advantages, reference, s),
            b.device,
            2,
        )
        passes = 6 if beta else 4  # the reference pass is a forward more
        forward = body * (asked + R * (b.new_tokens - 1)) + head * R * b.new_tokens
        floor = passes * forward / flops
        figure(what, time_update, "s", floor)
    figure("GRPO step", time_rollout + time_update, "s")
    figure("peak memory", peak_memory(b.device) / 1e9, "GB")
    # GSM8K's 7,473 training problems: about 200 tokens each; RL: 8 answers of up to 256 tokens
    figure("SFT epoch on GSM8K, projected", 7473 * 200 / (tokens.numel() / time_sft) / 3600, "h")
    step_tokens = R * b.new_tokens / (time_rollout + time_update)
    figure("RL epoch on GSM8K, projected", 7473 * 8 * 256 / step_tokens / 3600, "h")


def main(arguments=None):
    sys.stdout.reconfigure(line_buffering=True)
    keep_pages()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["eval"]:
            run_eval(arguments[1:])
        elif arguments[:1] == ["bench"]:
            run_bench(arguments[1:])
        else:
            run(read_config(arguments))
    except (ValueError, data.SandboxError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
