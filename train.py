"""LoRA-PAR from end to end: score -> partition -> sft -> grpo -> evaluate (paper, Algorithm 1).

    python train.py                                        # the toy world, no GPU, no network
    python train.py --model FOLDER --data gsm8k --data-path DIR --labels labels.jsonl --out runs/x

`run` is the whole method; the five calls it makes follow, then settings, inputs, the run folder and
the commands eval, merge, figure, sweep and bench. A run lives in one folder (config, labels,
scores, partition, adapters, metrics, report); the same command goes on where it stopped.
Left out: several GPUs, and training on anything but the two systems' data.
"""
# ruff: noqa: E402  (the first lines must stand before the imports)

import os
import signal


def stop(number, frame):
    """Ctrl-C or SIGTERM at any moment: one line, no traceback. Files are renamed into place."""
    os.write(2, b"\ntrain.py: stopped; repeat the command (a run goes on from its folder)\n")
    os._exit(128 + number)


if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

import argparse
import csv
import io
import itertools
import json
import math
import random
import re
import resource
import runpy
import shutil
import statistics
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import data
import grpo
import lorapar
import model as decoder


class Diverged(ValueError):
    """Training or its result is no longer finite."""


def run(c: "RunConfig") -> dict:
    """The whole method on one run folder. Returns the report, also report.json."""
    report = open_run(c)
    model, tokenizer, examples, rows, test = prepare(c, report)  # the votes are in the examples
    done(c, report, "load")

    def evaluate_row(row):
        if c.score_only:
            return
        file = Path(c.out) / "answers" / f"{row}.jsonl"
        if row in report["evaluation"] and file.exists():
            print(f"evaluate {row}: reused from {c.out}")
        else:
            report["evaluation"][row], records = evaluate(c, model, tokenizer, test, row)
            data.write_jsonl(file, records)
        done(c, report, f"evaluate {row}")

    evaluate_row("base")
    start = torch.Generator().manual_seed(c.seed)
    lorapar.add_lora(model, c.targets, c.r, c.lora_alpha, c.dropout, c.init, generator=start)
    if c.init == "gaussian":  # the other starts leave the model as it is
        evaluate_row("init")
    s1, s2 = score(c, model, rows)  # importance on S1, importance on S2: eq. 1-3
    done(c, report, "score")
    masks, report["partition"] = make_partition(c, model, s1, s2)  # Algorithm 1, step 1
    done(c, report, "partition")
    sft_rows, rl_examples = rows["S1"], examples["S2"]
    if c.stage_data == "all":  # an ablation: both stages train on both systems
        sft_rows, rl_examples = rows["S1"] + rows["S2"], examples["S2"] + examples["S1"]
    for stage in () if c.score_only else c.order.split(","):
        if stage == "sft":  # step 2: moves S1-only and the top alpha of shared
            sft(c, model, sft_rows, masks[stage])
        else:  # step 3: moves S2-only and the top beta of shared
            rl(c, model, tokenizer, rl_examples, masks[stage])
        done(c, report, stage)
        evaluate_row(stage)
    print("\n" + write_report(c, report))
    return report


# ----------------------------------------------------------------------------------- what run calls


def backward(model, rows, micro_batch: int, device) -> float:
    """The mean over `rows` of the mean cross-entropy of each answer's tokens; adds its gradient."""
    total = 0.0
    for tokens, labels in data.batches(rows, micro_batch, device):
        logp = decoder.token_logprobs(model, tokens, labels)
        loss = -(logp.sum(1) / (labels[:, 1:] != -100).sum(1)).sum() / len(rows)
        loss.backward()
        total += loss.detach()
    return float(total)


def score(c, model, rows):
    """Importance of every LoRA element for both systems, before any training -> s1, s2 (N,) on the
    CPU; ones where no element is left out. Kept with the start of the factors, which a resumed run
    puts back."""
    path = Path(c.out) / "importance.safetensors"
    if path.exists():
        kept = read_tensors(path)
        lorapar.set_flat(model, kept["start"])
        if c.init in lorapar.ANCHORED:
            lorapar.set_anchor(model, kept["start"])
        print(f"score: reused from {path}")
        return kept["s1"], kept["s2"]
    scores = {"start": lorapar.get_flat(model)}
    rank_by = c.select if c.select in lorapar.SCORES else "importance"
    needs_ranking = c.theta < 1 or c.alpha not in (0, 1) or c.beta not in (0, 1)
    for name in ("s1", "s2"):
        scores[name] = torch.ones_like(scores["start"])
        if needs_ranking:
            members = rows[name.upper()]
            chosen = random.Random(c.seed).sample(members, min(c.score_examples, len(members)))
            batches = bar(data.batches(chosen, c.micro_batch, c.device), f"score {name}")
            scores[name] = lorapar.importance(
                model, batches, decoder.token_logprobs, rank_by=rank_by
            )
            print(f"score: {name} on {len(chosen)} examples")
    lorapar.write_tensors(path, scores)
    return scores["s1"].cpu(), scores["s2"].cpu()


def make_partition(c, model, s1, s2):
    """The regions and both stages' masks -> {"sft": mask, "rl": mask}, facts for the report."""
    if c.select.startswith("random"):
        generator = torch.Generator().manual_seed(c.seed)
        s1, s2 = lorapar.shuffle_scores(model, s1, s2, c.select, generator)
    part = lorapar.partition(s1, s2, c.theta)
    masks = {
        "sft": lorapar.stage_mask(part, s1, 1, c.alpha),
        "rl": lorapar.stage_mask(part, s2, 2, c.beta),
    }
    if c.select == "swapped":  # the control: each stage moves the other system's elements
        masks = {"sft": masks["rl"], "rl": masks["sft"]}
    facts = partition_facts(model, part, masks)
    lorapar.write_json(Path(c.out) / "partition.json", facts)
    lorapar.write_tensors(Path(c.out) / "partition.safetensors", part._asdict())  # flat order
    shares = "  ".join(f"{stage} {share:.1f}%" for stage, share in facts["active_percent"].items())
    print(f"partition: {len(s1)} elements, active {shares}, Jaccard {facts['jaccard']:.3f}")
    return masks, facts


def sft(c, model, rows, mask):
    """Stage 1: supervised fine-tuning of the masked elements. rows: (tokens, prompt length)."""

    def step(optimizer, chosen, generator):
        batch, started = [rows[i] for i in chosen], time.perf_counter()
        loss = backward(model, batch, c.micro_batch, c.device)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        optimizer.step()
        optimizer.zero_grad()
        rate = round(sum(len(t) for t, _ in batch) / (time.perf_counter() - started))
        values = {"loss": loss, "grad_norm": optimizer.grad_norm.item(), "tokens_per_s": rate}
        return values, f"loss {loss:.4f}  grad {values['grad_norm']:.3f}  {rate} tok/s"

    model.train()  # dropout acts here alone
    run_stage(c, "sft", model, mask, rows, step, betas=(0.9, 0.999))
    model.eval()


def graded(c, tokenizer, grade, examples, answers):
    """Answers [P][G] -> their texts [P][G], grade(example, text, ..) of each, on all cores."""
    texts = [[tokenizer.decode(ids) for ids in group] for group in answers]
    pairs = [(e, text) for e, group in zip(examples, texts) for text in group]
    found = iter(data.in_parallel(grade, [(*pair, c.allow_unconfined_code) for pair in pairs]))
    return texts, [[next(found) for _ in group] for group in texts]


def rl_prompts(c, tokenizer, examples) -> list:
    """[(example, its prompt's ids)] of what a reward can check and --max-prompt lets in."""
    checked = [e for e in examples if c.reward or e.kind != "text"]
    if not checked:
        raise ValueError("rl: no answer of System 2 can be checked: name a --rl-data or --reward")
    asked = [(e, data.example_ids(e, tokenizer, c.prompt)[0]) for e in checked]
    kept = [(e, prompt) for e, prompt in asked if len(prompt) <= c.max_prompt]
    if not kept:
        raise ValueError(f"rl: no prompt has at most --max-prompt {c.max_prompt} tokens")
    return kept


def rl(c, model, tokenizer, examples, mask):
    """Stage 2: GRPO on the masked elements; KL to the model as it comes in."""
    reward = load_reward(c.reward) if c.reward else data.reward_parts
    prompts = rl_prompts(c, tokenizer, examples)
    print(
        f"rl: {len(prompts)} of {len(examples)} prompts, at most --max-prompt {c.max_prompt} long"
    )
    reference = lorapar.get_flat(model)
    sampling = grpo.Settings(
        group=c.rl_group,
        max_new_tokens=c.max_response,
        eos_ids=tokenizer.eos_ids,
        temperature=c.temperature,
        clip=c.clip,
        beta=c.kl,
        num_iterations=c.rl_iterations,
        batch_rows=c.batch_rows,
        micro_batch=c.micro_batch,
    )

    def step(optimizer, chosen, generator):
        batch = [prompts[i] for i in chosen]

        def rewards(answers):
            return graded(c, tokenizer, reward, [e for e, _ in batch], answers)[1]

        asked = [prompt for _, prompt in batch]
        values = grpo.grpo_step(model, optimizer, asked, rewards, reference, sampling, generator)
        parts = " ".join(f"{k} {v:.2f}" for k, v in values["parts"].items())
        return values, (
            f"reward {values['reward']:.3f} ({parts})  kl {values['kl']:.4f}  gap "
            f"{values['gap']:.1e}  zero-std groups {values['zero_std_groups']}/{len(batch)}  "
            f"length {values['length']:.0f}  {values['rollout_s'] + values['update_s']:.2f} s"
        )

    rows = [(prompt, 1) for _, prompt in prompts]  # is_finite looks at one
    run_stage(c, "rl", model, mask, rows, step, betas=(0.9, 0.99))


def run_stage(c, stage, model, mask, rows, one_step, betas):
    """The loop of both stages: `one_step(optimizer, chosen rows, generator)` -> (values, words).

    A step's seed is its own, so a resumed run needs no state of a random generator. Raises
    Diverged, one line, where the numbers are not finite; what was saved before stays.
    """
    names = ("lr", "batch", "epochs", "steps", "warmup", "weight_decay", "grad_norm")
    lr, batch, epochs, limit, warmup, decay, norm = (getattr(c, f"{stage}_{n}") for n in names)
    lorapar.set_mask(model, mask)
    optimizer = lorapar.MaskedAdamW(model, lr, betas, weight_decay=decay, max_grad_norm=norm)
    schedule, folder = step_indices(len(rows), batch, epochs, limit, c.seed), Path(c.out) / stage
    first, total = load_state(folder, model, optimizer), len(schedule)
    if first:
        print(f"{stage}: " + (f"reused from {folder}" if first == total else f"after step {first}"))
    metrics, started = Path(c.out) / "metrics.jsonl", time.perf_counter()  # a line a step
    forget_metrics(metrics, stage, first)
    for step in range(first, total):
        seed = c.seed * 1_000_003 + step
        torch.manual_seed(seed)  # dropout, on every device
        optimizer.param_groups[0]["lr"] = rate = lr * cosine(step, total, warmup)
        try:
            generator = torch.Generator().manual_seed(seed)
            values, words = one_step(optimizer, schedule[step], generator)
            saves = (step + 1) % c.save_every == 0 or step + 1 == total
            if saves and not is_finite(model, rows[schedule[step][0]], c.device):
                raise FloatingPointError("the model's log-probs are not finite")
        except FloatingPointError as error:
            raise Diverged(
                f"{stage} step {step + 1}: {error}: lower --{stage}-lr {lr} and name another --out "
                f"({c.out} keeps what was good)"
            ) from None
        with open(metrics, "a") as out:
            out.write(json.dumps({"stage": stage, "step": step} | values | {"lr": rate}) + "\n")
        left = (time.perf_counter() - started) / (step + 1 - first) * (total - step - 1)
        print(f"{stage} {step + 1}/{total}  {words}  left {clock(left)}")
        if saves:
            save_state(folder, model, optimizer, step + 1)
    lorapar.save_adapter(model, folder, c.model or "toy")  # derived: anew, whatever was there


def step_indices(n: int, batch: int, epochs: int, limit: int | None, seed: int) -> list[list[int]]:
    """The examples of every step: each epoch one seeded permutation, cut into batches."""
    steps = []
    for epoch in range(epochs):
        order = list(range(n))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[i : i + batch] for i in range(0, n, batch)]
    return steps[:limit]


def cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: linear warm-up over the first share of the steps, then cosine
    to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def is_finite(model, row, device) -> bool:
    """Does the model still give numbers? Elements can be finite and their product not."""
    was_training = model.training
    logp = decoder.token_logprobs(model.eval(), *data.collate([row], device))
    model.train(was_training)
    return bool(logp.isfinite().all())


def answer(c, model, tokenizer, examples, prompts, samples: int, generator):
    """-> for each example its [(text of an answer, is it right)]: one greedy answer, or `samples`
    of them at c.temperature. A letter is the most likely of A, B, C and D."""
    if examples[0].kind == "letter":
        letters = [
            data.example_ids(replace(examples[0], answer=f" {x}"), tokenizer, c.prompt)[1][0]
            for x in "ABCD"
        ]
        with torch.no_grad():
            best = decoder.prefill(model, prompts)[:, letters].argmax(-1).tolist()
        return [[("ABCD"[i], "ABCD"[i] == e.gold)] for i, e in zip(best, examples)]
    answers = decoder.generate(
        model,
        prompts,
        c.max_response,
        temperature=0 if samples == 1 else c.temperature,
        eos_ids=tokenizer.eos_ids,
        samples_per_prompt=samples,
        generator=generator,
        batch_rows=c.batch_rows,
    )
    texts, verdicts = graded(c, tokenizer, data.is_correct, examples, answers)
    return [list(zip(*pair)) for pair in zip(texts, verdicts)]


def evaluate(c, model, tokenizer, examples, what, samples=1):
    """-> a table {system: {"accuracy", "probability", "loss", "examples"}} of S1, S2 and all, and a
    record per example that a person can read. Greedy, or pass@1 and pass@k of `samples` answers.

    probability is the mean over examples of p(reference answer, EOS included | question), loss the
    mean cross-entropy of its tokens. "all" is every example, labelled or not. Raises Diverged
    where the model no longer gives numbers.
    """
    is_letter = [e.kind == "letter" for e in examples]
    if samples > 1 and any(is_letter):
        raise ValueError("--samples: a letter is answered once, by the most likely of the four")
    model.eval()
    generator = torch.Generator().manual_seed(c.seed)
    rows, _ = data.tokenize(examples, tokenizer, 10**9, c.prompt, "rl")
    order = sorted(range(len(rows)), key=lambda i: (is_letter[i], rows[i][1]))  # by prompt length
    size = max(1, c.batch_rows // samples)  # prompts whose answers are decoded together
    batches = [
        chosen[start : start + size]
        for chosen in (list(kind) for _, kind in itertools.groupby(order, lambda i: is_letter[i]))
        for start in range(0, len(chosen), size)
    ]
    ks = [k for k in (10, 100, samples) if 1 < k <= samples]
    records = [{"id": e.id, "label": e.label, "question": e.question} for e in examples]
    for chosen in bar(batches, f"evaluate {what}"):
        prompts = [rows[i][0][: rows[i][1]] for i in chosen]
        asked = [examples[i] for i in chosen]
        answers = answer(c, model, tokenizer, asked, prompts, samples, generator)
        for i, given in zip(chosen, answers):
            right = sum(correct for _, correct in given)
            records[i] |= {"gold": examples[i].gold, "answers": [text for text, _ in given]}
            records[i] |= {"accuracy": right / len(given)}
            records[i] |= {f"pass@{k}": data.pass_at_k(samples, right, k) for k in ks}
        for start in range(0, len(chosen), c.micro_batch):
            part = chosen[start : start + c.micro_batch]
            tokens, labels = data.collate([rows[i] for i in part], c.device)
            with torch.no_grad():
                logp = decoder.token_logprobs(model, tokens, labels).sum(1)
            if not logp.isfinite().all():
                raise Diverged(f"evaluate {what}: the model's log-probs are not finite")
            counts = (labels[:, 1:] != -100).sum(1)
            for i, p, n in zip(part, logp.tolist(), counts.tolist()):
                records[i] |= {"probability": math.exp(p), "loss": -p / n}
    averages = {}
    for system in ("S1", "S2", "all"):
        members = [r for r in records if system in ("all", r["label"])]
        names = ["accuracy", *(f"pass@{k}" for k in ks), "probability", "loss"]
        if members:
            averages[system] = {k: sum(r[k] for r in members) / len(members) for k in names}
            averages[system]["examples"] = len(members)
    shown = "  ".join(f"{system} {row['accuracy']:.1%}" for system, row in averages.items())
    print(f"evaluate {what}: {shown}")
    return averages, records


# ----------------------------------------------------------------------------------------- settings


def flag(default, text, toy=None):
    """A field that is a command line flag; `toy` takes its default's place in the toy world."""
    return field(default=default, metadata={"help": text, "toy": toy})


@dataclass
class RunConfig:
    """Every setting of a run; each field is a command line flag. Defaults are the paper's, where it
    gives them; without --model the toy preset below replaces some."""

    # what goes in and out
    model: str | None = flag(None, "model folder or Hub id; without it the toy world runs")
    data: str = flag("toy", f"data set: {', '.join(data.DATASETS)}, or a jsonl of your own")
    data_path: str | None = flag(None, "its folder or file, as its publisher ships it")
    rl_data: str | None = flag(None, "another set for stage 2, where --data cannot be checked")
    rl_data_path: str | None = flag(None, "its folder or file")
    eval_data: str | None = flag(None, "another set for the evaluation")
    eval_data_path: str | None = flag(None, "its folder or file")
    labels: str | None = flag(
        None, "a labels.jsonl, the authors' csv, or steps:K (GSM8K); toy: teachers:K[:shuffled]"
    )
    reward: str | None = flag(None, "FILE.py:FUNCTION(question, answer, completion) -> float, dict")
    prompt: Literal["plain", "chat", "authors"] = flag("plain", "whose template asks the question")
    out: str = flag("runs/toy", "the run folder")
    seed: int = flag(0, "seeds everything")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "base weights; auto: float32 on the CPU and for float32 files, else bfloat16"
    )
    # LoRA
    targets: str = flag("qkvgud", "projections that get an adapter: letters of q k v o g u d")
    r: int = flag(8, "LoRA rank")
    lora_alpha: float = flag(64.0, "LoRA scale is lora_alpha / r", toy=32.0)
    dropout: float = flag(0.05, "LoRA dropout, in SFT only", toy=0.0)
    init: Literal["anchored", "gaussian", "lora", "pissa", "olora"] = flag(
        "anchored", "the adapter's start; all but gaussian leave the model as it is at step 0"
    )
    # the method
    score_examples: int = flag(100, "examples a system that importance is measured on")
    theta: float = flag(0.9, "cumulative importance of a system's region, in (0, 1]")
    alpha: float = flag(1.0, "share of the shared region that SFT trains")
    beta: float = flag(1.0, "share of the shared region that RL trains")
    select: Literal[(*lorapar.SCORES, "random", "random-in-tensor", "swapped")] = flag(
        "importance", "what ranks the elements; random permutes the scores, swapped the stages"
    )
    order: Literal["sft,rl", "rl,sft", "sft", "rl"] = flag("sft,rl", "the stages and their order")
    stage_data: Literal["split", "all"] = flag("split", "a stage trains on its system, or on all")
    score_only: bool = flag(False, "stop after the partition: no evaluation, no training")
    # stage 1: SFT
    sft_lr: float = flag(2e-4, "learning rate", toy=3e-3)
    sft_epochs: int = flag(1, "epochs over the S1 examples", toy=8)
    sft_steps: int | None = flag(None, "at most this many optimizer steps")
    sft_batch: int = flag(32, "examples an optimizer step (the paper accumulates 32)")
    sft_warmup: float = flag(0.03, "share of the steps that warm up, then cosine")
    sft_weight_decay: float = flag(0.0, "AdamW's decoupled weight decay")
    sft_grad_norm: float = flag(1.0, "clip the norm of the active gradient at this")
    max_length: int = flag(512, "tokens of question and answer in SFT and scoring", toy=32)
    # stage 2: GRPO
    rl_lr: float = flag(5e-6, "learning rate", toy=4e-3)
    rl_epochs: int = flag(1, "epochs over the S2 prompts")
    rl_steps: int | None = flag(None, "at most this many batches of prompts", toy=40)
    rl_batch: int = flag(4, "prompts a batch", toy=16)
    rl_group: int = flag(8, "answers a prompt (the group)")
    rl_iterations: int = flag(1, "optimizer steps a batch; the ratio clip acts from the second on")
    rl_warmup: float = flag(0.1, "share of the batches that warm up, then cosine")
    rl_weight_decay: float = flag(0.1, "AdamW's decoupled weight decay", toy=0.0)
    rl_grad_norm: float = flag(0.1, "clip the norm of the active gradient at this", toy=1.0)
    max_prompt: int = flag(128, "longer prompts are left out of RL, and counted", toy=16)
    max_response: int = flag(256, "tokens an answer may have, in RL and evaluation", toy=12)
    temperature: float = flag(0.9, "softmax temperature of rollouts and their log-probs", toy=1.0)
    kl: float = flag(0.04, "weight of the KL to the policy as RL begins; 0: none", toy=0.005)
    clip: float = flag(0.2, "PPO's ratio clip")
    # size and speed
    train_examples: int | None = flag(None, "use at most this many training examples")
    eval_examples: int | None = flag(None, "evaluate on at most this many examples")
    eval_split: Literal["test", "validation"] = flag("test", "choose settings on validation only")
    batch_rows: int = flag(64, "answers decoded together, in rollouts and evaluation", toy=1024)
    micro_batch: int = flag(8, "rows a forward and backward", toy=128)
    checkpointing: bool = flag(False, "recompute layers in the backward: less memory, slower")
    save_every: int = flag(50, "steps between saves of the resume state")
    allow_unconfined_code: bool = flag(False, "run code answers where no sandbox is to be had")


TOY = {f.name: f.metadata["toy"] for f in fields(RunConfig) if f.metadata["toy"] is not None}
TOY_BASE = {"steps": 1000, "batch": 96}
TOY_LABELS = r"teachers:([1-5])(:shuffled)?"  # what --labels may say there


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_flags(parser, names: list[str], arguments):
    """The command line -> a checked RunConfig of the flags `names` (defaults, then without --model
    the toy preset, then what the user said), and the parser's own arguments."""
    for f in fields(RunConfig):
        if f.name in names:
            default = f"{TOY[f.name]} in the toy, else {f.default}" if f.name in TOY else f.default
            text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
            how = {"default": argparse.SUPPRESS, "help": text}
            kinds = get_args(f.type) or (f.type,)  # a Literal's words; of X | None, X first
            if f.type is bool:
                how["action"] = "store_true"
            elif isinstance(kinds[0], str):
                how["choices"] = kinds
            else:
                how["type"] = kinds[0]
            parser.add_argument(option(f.name), **how)
    said = vars(parser.parse_args(arguments))
    own = argparse.Namespace(**{name: said.pop(name) for name in list(said) if name not in names})
    if "model" in names and not said.get("model"):
        said = TOY | said
    c = RunConfig(**said)
    check_ranges(c)
    return c, own


def read_config(arguments) -> RunConfig:
    """The command line of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"Also: python train.py {'|'.join(COMMANDS)} --help",
    )
    c, _ = read_flags(parser, [f.name for f in fields(RunConfig)], arguments)
    if (c.data == "toy") != (c.model is None):
        raise ValueError("--model and --data go together: give both, or neither for the toy world")
    return c


def check_ranges(c: RunConfig):
    """Raises ValueError, naming the flag, on a value out of range."""
    if not 0 < c.theta <= 1:
        raise ValueError(f"--theta {c.theta} is outside (0, 1]")
    if not c.targets or set(c.targets) - set(lorapar.PROJECTIONS):
        raise ValueError(f"--targets {c.targets}: letters of q k v o g u d")
    if c.data == "toy" and not re.fullmatch(TOY_LABELS, c.labels or "teachers:5"):
        raise ValueError(f'--labels {c.labels}: in the toy "teachers:1" to "teachers:5"')
    for name in ("alpha", "beta", "dropout", "sft_warmup", "rl_warmup"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"{option(name)} {getattr(c, name)} is outside [0, 1]")
    for name, value in asdict(c).items():
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"{option(name)} {value}: must be at least 1")
        if isinstance(value, float) and not 0 <= value < 1e37:  # float32 ends there
            raise ValueError(f"{option(name)} {value} is outside [0, 1e37)")
    if c.rl_group < 2:
        raise ValueError("--rl-group 1: an answer needs others of its group to compare with")
    for name in ("temperature", "lora_alpha"):
        if getattr(c, name) == 0:
            raise ValueError(f"{option(name)} 0: must be positive")
    try:
        torch.empty(0, device=c.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {c.device}: this PyTorch sees no such device") from None


# ----------------------------------------------------------------------------------------- inputs


def load(c: RunConfig, folder):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(c.dtype) or decoder.auto_dtype(folder, c.device)
    return decoder.load_model(folder, c.device, dtype)


def load_reward(spec: str):
    """FILE.py:FUNCTION -> reward(example, completion, ..) -> parts. Raises ValueError, one line, on
    anything that the file or the function raises or gives that is not a number."""
    file, _, name = spec.rpartition(":")
    try:
        function = runpy.run_path(file)[name]
    except Exception as error:  # the user's own code
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--reward {spec}: not FILE.py:FUNCTION ({why})") from None

    def reward(example, completion, _=False):
        try:
            given = function(example.question, example.answer, completion)
            parts = given if isinstance(given, dict) else {"reward": given}
            parts = {str(k): float(v) for k, v in parts.items()}
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"--reward {spec}: {why} (on {example.id})") from None
        if not parts or not all(map(math.isfinite, parts.values())):
            raise ValueError(f"--reward {spec}: gave {given!r} (on {example.id})")
        return parts

    return reward


def load_labels(c: RunConfig, data_path, examples, report: dict) -> list[dict]:
    """The label records of `examples`: the teachers' votes in the toy, what --labels says, or the
    labels of one's own file."""
    if c.data == "toy":
        said = re.fullmatch(TOY_LABELS, c.labels or "teachers:5")
        files = sorted((Path(data_path) / "answers").glob("*.jsonl"))[: int(said[1])]
        records, votes = data.count_votes(data.read_answers(files), len(files))
        report["data"] |= {f"votes: {k}": v for k, v in votes.items()}
        return data.shuffle_labels(records, c.seed) if said[2] else records
    labelled = data.label_examples(examples, c.labels) if c.labels else examples
    records = [{"id": e.id, "label": e.label} for e in labelled if e.label]
    if not records and not c.labels:
        raise ValueError('--labels is missing: a file of votes, or "steps:2" for GSM8K')
    if not records:
        raise ValueError(f"--labels {c.labels}: no label matches an example of {c.data}")
    return records


def read_sets(c: RunConfig, data_path) -> dict:
    """{"S1", "S2", "eval"}: the examples of both stages and of the evaluation. A file that trains
    or evaluates alone is taken whole. Raises ValueError where answers could not be checked, or
    where the evaluation holds training examples."""
    first = (c.data, data_path)
    second = (c.rl_data, c.rl_data_path) if c.rl_data else first
    test = (c.eval_data, c.eval_data_path) if c.eval_data else first
    own = {name for name, _ in (first, second, test) if name.endswith(data.OWN_NAMES)}
    if len({Path(name).stem for name in own}) < len(own):
        raise ValueError(f"{' and '.join(own)}: examples are named after their file: rename one")
    rl_grades = "rl" in c.order and not c.reward
    sets = {}
    for name, source, split, others, cure in (
        ("S1", first, "train", [test], None),
        ("S2", second, "train", [test], "--rl-data, or a --reward" if rl_grades else None),
        ("eval", test, c.eval_split, [first, second], "--eval-data"),
    ):
        alone = data.in_one_file(*source) and source not in others
        if alone and split == "validation":
            raise ValueError(f"{source[0]} is evaluated whole: it has no validation split")
        sets[name] = data.load_dataset(*source, "all" if alone else split)
        if cure and not c.score_only and all(e.kind == "text" for e in sets[name]):
            raise ValueError(f"answers of {source[0]} cannot be checked: name a {cure}")
    if {e.id for e in sets["eval"]} & {e.id for name in ("S1", "S2") for e in sets[name]}:
        raise ValueError(f"{test[0]}: the evaluation holds training examples (by their ids)")
    return sets


def prepare(c: RunConfig, report: dict):
    """Reads and checks every input before it is worked on -> model, tokenizer, by system training
    examples and their rows of (tokens, prompt length), evaluation examples. Counts: the report."""
    if c.reward:
        load_reward(c.reward)  # to refuse it early
    model_path, data_path = (decoder.find_model(c.model) if c.model else None), c.data_path
    if not c.model:
        model_path, data_path = toy_inputs(c)
        done(c, report, "toy base")
    sets = read_sets(c, data_path)
    everything = {e.id: e for examples in sets.values() for e in examples}
    records = load_labels(c, data_path, list(everything.values()), report)
    labels = Path(c.out) / "labels.jsonl"
    if labels.exists() and [r for _, r in data.read_records(labels)] != records:
        raise ValueError(f"--labels {c.labels}: other labels than this run began with ({labels})")
    known = {r["id"]: r["label"] for r in records}
    test = sets.pop("eval")
    random.Random(c.seed).shuffle(test)
    test = [replace(e, label=known.get(e.id, e.label)) for e in test if e.kind != "text"]
    test = test[: c.eval_examples]
    report["test"] = f"{c.eval_split} examples of {c.eval_data or c.data}"
    tokenizer, systems, rows = data.Tokenizer(model_path), {}, {}
    for system, examples in sets.items():
        labelled = [replace(e, label=known[e.id]) for e in examples if e.id in known]
        random.Random(c.seed).shuffle(labelled)
        chosen = [e for e in labelled[: c.train_examples] if e.label == system]
        if not chosen:
            raise ValueError(
                f"no {system} training example among {len(labelled)} labelled ones: check --labels"
            )
        rows[system], counts = data.tokenize(chosen, tokenizer, c.max_length, c.prompt, "sft")
        if not rows[system]:
            raise ValueError(f"no {system} prompt is shorter than --max-length {c.max_length}")
        counts["source: without a label"] = len(examples) - len(labelled)
        counts = {"examples": len(rows[system])} | counts
        report["data"] |= {f"{system} {k}": v for k, v in counts.items()}
        systems[system] = chosen
    if "rl" in c.order and not c.score_only:
        rl_prompts(c, tokenizer, systems["S2"])  # to refuse them early
    model = load(c, model_path)
    lorapar.target_linears(model, c.targets, c.r)  # to refuse these early
    model.model.checkpointing = c.checkpointing
    data.write_jsonl(labels, records)
    lorapar.write_json(Path(c.out) / "config.json", settings(c))
    return model, tokenizer, systems, rows, test


def make_toy_base(c: RunConfig, folder: Path, world: data.ToyWorld):
    """Trains the toy's tiny base on the unreliable corpus; writes a Hugging Face style folder."""
    b = TOY_BASE
    torch.manual_seed(c.seed)
    shape = decoder.ModelConfig(
        *SHAPES["toy"], max_position_embeddings=64, tie_word_embeddings=True
    )
    model = decoder.Transformer(shape).to(c.device)
    for p in model.parameters():
        if p.ndim == 2:  # 1 / sqrt(fan in): a std of 0.02 gets stuck in so small a model
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    data.save_toy_tokenizer(folder)
    lorapar.write_json(folder / "config.json", {"eos_token_id": 0})  # the tokenizer reads it here
    tokenizer = data.Tokenizer(folder)
    rows, _ = data.tokenize(world.corpus(b["steps"] * b["batch"]), tokenizer, c.max_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    started = time.perf_counter()
    for step in range(b["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - step / b["steps"])
        optimizer.zero_grad()
        chosen = rows[step * b["batch"] : (step + 1) * b["batch"]]
        loss = backward(model, chosen, b["batch"] // 2, c.device)  # two halves: short, then long
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            elapsed = time.perf_counter() - started
            left = elapsed / (step + 1) * (b["steps"] - step - 1)
            print(f"base {step + 1}/{b['steps']}  loss {loss:.3f}  left {clock(left)}")
    decoder.save_model(model, folder, eos_token_id=tokenizer.eos_ids[0])  # the weights last


def toy_inputs(c: RunConfig):
    """The toy world's files -> (model folder, data folder), made once a run folder."""
    base, world_folder = Path(c.out) / "base", Path(c.out) / "world"
    if (base / "model.safetensors").exists():
        print(f"toy base: reused from {base}")
    else:
        lorapar.write_json(Path(c.out) / "config.json", settings(c))
        world = data.make_toy(world_folder, c.seed)
        print(f"toy base: training {TOY_BASE['steps']} steps on the unreliable corpus")
        make_toy_base(c, base, world)
    return base, world_folder


# --------------------------------------------------------------------------------- the run folder


def settings(c: RunConfig) -> dict:
    return {name: value for name, value in asdict(c).items() if name != "out"}


def open_run(c: RunConfig) -> dict:
    """-> the report of the run folder so far. Raises ValueError if it holds another run."""
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "config.json").exists():
        old, new = decoder.read_json(out / "config.json"), settings(c)
        for name in new | old:
            if new.get(name) != old.get(name):
                raise ValueError(
                    f"{out} holds a run with {option(name)} {old.get(name)}, not "
                    f"{new.get(name)}: choose another --out, or delete that folder"
                )
    report = {"evaluation": {}, "partition": {}, "data": {}, "seconds": {}, "peak_gb": {}}
    if (out / "report.json").exists():
        report |= decoder.read_json(out / "report.json")
    report["since"] = time.perf_counter()  # the last `done`; never written
    return report


def done(c: RunConfig, report: dict, what: str):
    """Notes the seconds since the last call and the peak memory, and saves the report. The first
    time counts: a reused result took no time."""
    now = time.perf_counter()
    report["seconds"].setdefault(what, round(now - report["since"], 2))
    report["peak_gb"].setdefault(what, round(peak_memory(c.device) / 1e9, 2))
    report["since"] = now
    kept = {name: value for name, value in report.items() if name != "since"}
    lorapar.write_json(Path(c.out) / "report.json", kept)


def peak_memory(device) -> int:
    """Bytes: the GPU's peak since the last call, or this process' peak so far."""
    if torch.device(device).type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def read_tensors(path) -> dict[str, torch.Tensor]:
    try:
        return {
            name: t.clone() for name, t in load_file(path).items()
        }  # a copy, for the file is mapped
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}); delete it to redo this part") from None


def save_state(folder, model, optimizer, step: int):
    """What a stage needs to go on bit for bit, in one file that is renamed into place."""
    tensors = {f"adam.{name}": t for name, t in optimizer.state[optimizer.packed].items()}
    tensors |= {"flat": lorapar.get_flat(model), "step": torch.tensor(step)}
    lorapar.write_tensors(folder / "state.safetensors", tensors)


def load_state(folder, model, optimizer) -> int:
    """Puts a saved state back and returns how many steps it has behind it; 0 if there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    tensors = read_tensors(path)
    if tensors["adam.exp_avg"].shape != optimizer.packed.shape:
        raise ValueError(f"{path}: made with another mask; delete it to redo the stage")
    lorapar.set_flat(model, tensors["flat"])
    adam = {name[5:]: t for name, t in tensors.items() if name.startswith("adam.")}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: adam}})
    return int(tensors["step"])


def forget_metrics(path: Path, stage: str, first_step: int):
    """Drops the lines of metrics.jsonl that a resumed stage will write again, and a torn one."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["stage"] != stage or record["step"] < first_step:
                kept.append(record)
    data.write_jsonl(path, kept)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def bar(items, what):
    """A progress bar; in a log file it speaks every half minute only."""
    return tqdm(items, desc=what, leave=False, mininterval=0.2 if sys.stderr.isatty() else 30)


def jaccard(part: lorapar.Partition) -> float:
    return int(part.shared.sum()) / sum(int(region.sum()) for region in part)


def partition_facts(model, part: lorapar.Partition, masks: dict) -> dict:
    """What partition.json says: regions, active elements, each projection's share of them."""
    sizes = {name: p.numel() for name, p in lorapar.lora_factors(model).items()}  # in flat order
    projections = {}
    for name, *pieces in zip(sizes, *(region.split(list(sizes.values())) for region in part)):
        row = projections.setdefault(name.split(".")[-2], Counter())
        row["elements"] += sizes[name]
        row.update({region: int(piece.sum()) for region, piece in zip(part._fields, pieces)})
    active = {stage: int(mask.sum()) for stage, mask in masks.items()}
    return {
        "elements": len(part.shared),
        "regions": {name: int(region.sum()) for name, region in part._asdict().items()},
        "jaccard": jaccard(part),
        "active": active,
        "active_percent": {stage: 100 * n / len(part.shared) for stage, n in active.items()},
        "per_projection": projections,
        "factors": sizes,
    }


def table(head: list, rows) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def write_report(c: RunConfig, report: dict) -> str:
    """report.md: the tables a person reads. Returns its text."""
    stages, p = report["evaluation"], report["partition"]
    lines = [f"# LoRA-PAR: {c.data}, seed {c.seed}", ""]
    if stages:
        systems = {system: row["examples"] for system, row in stages["base"].items()}
        shown = {"accuracy": "{:.1%}", "probability": "{:.3f}", "loss": "{:.3f}"}
        head = ["", *(f"{s} {k}" for s in systems for k in ("accuracy", "p(answer)", "loss"))]
        rows = (
            [stage, *(form.format(row[s][k]) for s in systems for k, form in shown.items())]
            for stage, row in stages.items()
        )
        counts = ", ".join(f"{system} {n}" for system, n in systems.items())
        lines += [*table(head, rows), "", f"{report['test']}: {counts}; greedy answers.", ""]
    head = ["elements", "S1-only", "S2-only", "shared", "Jaccard", "active in SFT", "active in RL"]
    active = (f"{p['active'][k]} ({p['active_percent'][k]:.1f}%)" for k in ("sft", "rl"))
    row = [p["elements"], *p["regions"].values(), f"{p['jaccard']:.3f}", *active]
    lines += [*table(head, [row]), ""]
    lines += [f"- {name}: {value}" for name, value in report["data"].items() if value]
    costs = {"Seconds": "seconds", "Peak memory up to the end of each, GB": "peak_gb"}
    for what, key in costs.items():
        lines += ["", f"{what}: " + "  ".join(f"{k} {v:.2f}" for k, v in report[key].items())]
    text = "\n".join([*lines, ""])
    lorapar.write_file(Path(c.out) / "report.md", text.encode())
    return text


# ------------------------------------------------------------------------------- other commands


def run_eval(arguments):
    """The accuracy of a checkpoint, with or without an adapter."""
    parser = argparse.ArgumentParser("train.py eval", description=run_eval.__doc__)
    parser.add_argument("--adapter", help="a folder in PEFT's format")
    parser.add_argument("--samples", type=int, default=1, help="over 1: sample, and give pass@k")
    parser.add_argument("--out", default="answers.jsonl", help="every answer, a line an example")
    names = "model data data_path labels prompt seed device dtype max_response temperature "
    names += "eval_examples eval_split batch_rows micro_batch allow_unconfined_code"
    c, own = read_flags(parser, names.split(), arguments)
    if not c.model or c.data == "toy" or own.samples < 1:
        raise ValueError("eval needs --model and --data, and --samples of at least 1")
    split = "all" if data.in_one_file(c.data, c.data_path) else c.eval_split
    examples = data.load_dataset(c.data, c.data_path, split)
    if all(e.kind == "text" for e in examples):
        raise ValueError(f"answers of {c.data} cannot be checked")
    if c.labels:
        known = {e.id: e for e in data.label_examples(examples, c.labels)}
        if not known:
            raise ValueError(f"--labels {c.labels}: no label matches an example of {c.data}")
        examples = [known.get(e.id, e) for e in examples]
    random.Random(c.seed).shuffle(examples)
    path = decoder.find_model(c.model)
    with open(own.out, "a"):  # fails now, not after the work
        pass
    tokenizer, model = data.Tokenizer(path), load(c, path)
    if own.adapter:
        lorapar.load_adapter(model, own.adapter)
    examples = [e for e in examples if e.kind != "text"][: c.eval_examples]
    averages, records = evaluate(c, model, tokenizer, examples, c.data, own.samples)
    print(json.dumps(averages, indent=2))
    data.write_jsonl(own.out, records)
    print(f"every answer is in {own.out}")


def run_merge(arguments):
    """Folds an adapter into its checkpoint: a whole Hugging Face folder, weights in their dtype."""
    parser = argparse.ArgumentParser("train.py merge", description=run_merge.__doc__)
    parser.add_argument("--model", required=True, help="the base: a model folder or Hub id")
    parser.add_argument("--adapter", required=True, help="a folder in PEFT's format")
    parser.add_argument("--out", required=True, help="the folder to write")
    args = parser.parse_args(arguments)
    source, out = decoder.find_model(args.model), Path(args.out)
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the model itself; name another folder")
    model = decoder.load_model(source, dtype=None)  # each tensor as it is stored
    decoder.save_model(lorapar.merge(lorapar.load_adapter(model, args.adapter)), out)
    for file in source.iterdir():
        kept = file.suffix in (".json", ".model", ".jinja", ".txt")
        if file.is_file() and kept and not file.name.endswith(".index.json"):
            shutil.copy(file, out / file.name)
    print(f"merged: {out}")


def run_figure(arguments):
    """Draws importance.png and training.png of a run folder."""
    parser = argparse.ArgumentParser("train.py figure", description=run_figure.__doc__)
    parser.add_argument("run", help="the run folder")
    out = Path(parser.parse_args(arguments).run)
    if not (out / "importance.safetensors").exists():
        raise ValueError(f"{out}: no run there (no importance.safetensors)")
    draw_figures(out)


def new_figure(width, height):
    """A figure of matplotlib; None (and a line that says so) where that is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        print("figures: none, matplotlib is not installed")
        return None
    return matplotlib.figure.Figure(figsize=(width, height))


def draw_figures(out: Path):
    """importance.png: S1 against S2 importance of the elements, a colour a region (paper, figure
    4). training.png: loss, reward, KL and length over steps."""
    figure = new_figure(6, 5)
    if figure is None:
        return
    scores = read_tensors(out / "importance.safetensors")
    s1, s2 = scores["s1"], scores["s2"]
    regions = read_tensors(out / "partition.safetensors")
    s1_only, s2_only, shared = (regions[name] for name in lorapar.Partition._fields)
    facts = decoder.read_json(out / "partition.json")
    axes = figure.subplots()
    some = torch.randperm(len(shared), generator=torch.Generator().manual_seed(0))[:20_000]
    for name, colour, region in (
        ("neither: frozen", "0.8", ~(s1_only | s2_only | shared)),
        ("S1-only", "red", s1_only),
        ("S2-only", "blue", s2_only),
        ("shared", "purple", shared),
    ):
        here = some[region[some]]
        share = f"{name} {region.double().mean():.1%}"
        axes.scatter(s1[here], s2[here], s=2, c=colour, label=share, rasterized=True)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="importance for System 1", ylabel="importance for System 2")
    axes.legend(title=f"Jaccard index {facts['jaccard']:.3f}", markerscale=4)
    figure.savefig(out / "importance.png", dpi=120, bbox_inches="tight")
    metrics = out / "metrics.jsonl"
    lines = [r for _, r in data.read_records(metrics)] if metrics.exists() else []
    figure = new_figure(14, 3)
    shown = {"loss": "sft", "reward": "rl", "kl": "rl", "length": "rl"}
    for axes, (name, stage) in zip(figure.subplots(1, 4), shown.items()):
        points = [(r["step"] + 1, r[name]) for r in lines if r["stage"] == stage and name in r]
        axes.plot(*zip(*points) if points else ([], []))
        axes.set(title=f"{stage}: {name}", xlabel="step")
    figure.savefig(out / "training.png", dpi=120, bbox_inches="tight")
    print(f"figures: {out}/importance.png, {out}/training.png")


# ------------------------------------------------------------------------------------------ sweeps

TARGETS, RANDOM = ("qkvgud", "qkv", "gud"), ("random", "random-in-tensor")
FULL = {"theta": 1.0, "stage_data": "all"}  # every element, every example
TWICE = {"sft_epochs": lambda base: 2 * base.sft_epochs}
SWEEPS = {  # name -> {row: the flags it changes}; a function is called with the base settings
    "splits": {
        "one teacher": {"labels": "teachers:1"},
        "vote of 3": {"labels": "teachers:3"},
        "vote of 5": {"labels": "teachers:5"},
        "random split": {"labels": "teachers:5:shuffled"},
    },
    "shared": {
        f"alpha {a} beta {b}": {"alpha": a, "beta": b}
        for a in (0.0, 0.5, 1.0)
        for b in (0.0, 0.5, 1.0)
    },
    "theta": {
        f"{targets.upper()} {theta} {select}": dict(targets=targets, theta=theta, select=select)
        for targets in TARGETS
        for select in ("importance", *RANDOM)
        for theta in (0.3, 0.5, 0.7, 0.9, 1.0)
        if select == "importance" or (targets == "qkvgud" and theta < 1)
    },
    "methods": {
        "LoRA": FULL | {"init": "lora", "order": "sft"},
        "LoRA, 2 epochs": FULL | {"init": "lora", "order": "sft"} | TWICE,
        "OLoRA": FULL | {"init": "olora", "order": "sft"},
        "OLoRA, 2 epochs": FULL | {"init": "olora", "order": "sft"} | TWICE,
        "PiSSA": FULL | {"init": "pissa", "order": "sft"},
        "PiSSA, 2 epochs": FULL | {"init": "pissa", "order": "sft"} | TWICE,
        "LoRA + RL": FULL | {"init": "lora"},
        "PiSSA + RL": FULL | {"init": "pissa"},
        "LoRA-PAR 0.9": {},
        "LoRA-PAR 0.95": {"theta": 0.95},
        "LoRA-PAR 0.9 from PiSSA": {"init": "pissa"},
        "LoRA-PAR 0.95 from PiSSA": {"init": "pissa", "theta": 0.95},
    },
    "order": {"SFT then RL": {}, "RL then SFT": {"order": "rl,sft"}},
    "scores": {s: {"select": s} for s in (*lorapar.SCORES, *reversed(RANDOM), "swapped")},
}
SAME = "itself after SFT"  # in the place of another row
CLAIMS = {  # sweep -> (the row that should end higher, the other, points in the paper if known)
    "splits": [("vote of 5", "one teacher", None), ("vote of 5", "random split", None)],
    "shared": [("alpha 1.0 beta 1.0", "alpha 0.0 beta 0.0", None)],
    "theta": [
        *(
            (f"QKVGUD {t} importance", f"QKVGUD {t} {r}", None)
            for t in (0.3, 0.5, 0.9)
            for r in RANDOM
        ),
        ("QKVGUD 0.9 importance", "QKVGUD 1.0 importance", None),
    ],
    "methods": [
        ("LoRA-PAR 0.9", SAME, 12.96),
        ("LoRA-PAR 0.9", "LoRA + RL", 11.82),
        ("LoRA-PAR 0.9 from PiSSA", "LoRA-PAR 0.9", None),
    ],
    "order": [("SFT then RL", "RL then SFT", 13.19)],
    "scores": [("importance", other, None) for other in list(lorapar.SCORES)[1:] + ["swapped"]],
}
# The paper's numbers as far as the authors' repository shows them: Qwen2.5-7B on GSM8K, accuracy at
# the end; percent active of LLaMA-2-7B (table 3) by targets and theta.
PAPER = {"LoRA": 68.61, "PiSSA": 57.24, "LoRA + RL": 69.83, "LoRA-PAR 0.9": 81.65}
PAPER |= {"SFT then RL": 81.65, "RL then SFT": 68.46}
PAPER_ACTIVE = {("qkvgud", 0.1): 0.32, ("qkvgud", 0.3): 2.72, ("qkvgud", 0.5): 7.91}
PAPER_ACTIVE |= {("qkvgud", 0.7): 17.87, ("qkvgud", 0.8): 26.4, ("qkvgud", 0.9): 40.56}
PAPER_ACTIVE |= {("qkv", 0.9): 35.7, ("gud", 0.9): 42.9}
RATES = (1 / 3, 1, 3)  # times the run's own


def run_sweep(arguments):
    """Repeats a table or figure of the paper: each cell an ordinary run in a folder of its own
    under --out (default runs/sweep), with any flag of a run. Writes NAME.md, NAME.csv and, where
    the paper has a figure and matplotlib is installed, NAME.png. Finished cells are reused."""
    parser = argparse.ArgumentParser(
        "train.py sweep", description=run_sweep.__doc__, allow_abbrev=False
    )
    parser.add_argument("name", choices=[*SWEEPS, "resample"])
    parser.add_argument("--seeds", type=int, default=5, help="0 .. N-1; seed N chooses the rates")
    args, rest = parser.parse_known_args(arguments)
    base = read_config(["--out", "runs/sweep", *rest])
    if args.seeds < 1 or (base.score_only and args.name != "theta"):
        raise ValueError("sweep needs --seeds of at least 1, and --score-only goes with theta")
    rows = SWEEPS.get(args.name, {})
    for name in {k for row in rows.values() for k, v in row.items() if not callable(v)}:
        if any(word.partition("=")[0] == option(name) for word in rest):
            raise ValueError(f"sweep {args.name} sets {option(name)} itself")
    if args.name == "resample":
        return resample(base, args.seeds)
    if base.score_only:
        return active_shares(replace(base, score_only=False), args.seeds)
    records, rates = [], {}
    for row, changes in rows.items():
        best, rates[row] = tuned_rates(base, changes, args.seeds)
        for seed in range(args.seeds):
            _, report = run_cell(base, changes | best | {"seed": seed})
            records.append({"row": row, "seed": seed} | best | cell_facts(report))
        print(f"{row}: {spread(r['all at the end'] for r in records[-args.seeds :])}")
    columns = ["% active in sft", "% active in rl", "S1 after sft", "S2 after sft"]
    columns += ["S1 at the end", "S2 at the end", "all at the end"]
    columns = [name for name in columns if any(name in r for r in records)]
    counts = ", ".join(f"{k} {v['examples']}" for k, v in report["evaluation"]["base"].items())
    cells = {row: [r for r in records if r["row"] == row] for row in rows}
    shown = (
        [row, PAPER.get(row, ""), rates[row], *(spread(r.get(k) for r in mine) for k in columns)]
        for row, mine in cells.items()
    )
    claims = ["ends higher", "than", "by", "standard error", "paper", "verdict"]
    lines = [
        f"## {args.name}: {args.seeds} seeds, {report['test']} ({counts})",
        "",
        *table(["", "paper", "rates", *columns], shown),
        "",
        "Mean ± standard deviation, in %. Rates of the stages in their order, each the best of "
        f"{len(RATES)} on the validation split of seed {args.seeds} (* at the grid's edge). "
        "Paper: Qwen2.5-7B on GSM8K. Differences at the end are paired by seed.",
        "",
        *table(claims, (verdict(*claim, records) for claim in CLAIMS[args.name])),
        "",
        f"{len(records)} cells, {sum(r['seconds'] for r in records):.0f} s; choosing rates not in.",
    ]
    write_sweep(base, args.name, records, lines)
    if args.name == "theta":  # figure 5
        curves = {}
        for row, mine in cells.items():
            targets, theta, select = row.split()
            ends = [r["all at the end"] for r in mine]
            curves.setdefault(f"{targets} {select}", {})[float(theta)] = ends
        draw_curves(base, "theta", curves, "theta", "accuracy at the end, %")


def run_cell(base: RunConfig, changes: dict) -> tuple[RunConfig, dict]:
    """One ordinary run in a folder named after what it changes -> its settings and report; a
    finished one is read."""
    changes = {k: v(base) if callable(v) else v for k, v in changes.items()}
    changed = {k: v for k, v in changes.items() if k == "seed" or v != getattr(base, k)}
    folder = Path(base.out) / "cells" / ",".join(f"{k}={v}" for k, v in sorted(changed.items()))
    c = replace(base, **changes, out=str(folder))
    if (folder / "report.md").exists() and decoder.read_json(folder / "config.json") == settings(c):
        return c, decoder.read_json(folder / "report.json")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        share_toy(base, c)
        return c, run(c)


def share_toy(base: RunConfig, c: RunConfig):
    """Links the toy's base and data, made once a seed, into a run folder."""
    if not c.model:
        once = replace(base, seed=c.seed, out=str(Path(base.out) / f"toy-{c.seed}"))
        for part in toy_inputs(once):
            if not (Path(c.out) / part.name).exists():
                (Path(c.out) / part.name).symlink_to(part.resolve())


def tuned_rates(base: RunConfig, changes: dict, seed: int):
    """-> the cell's learning rates and their text. One stage after the other takes the best of
    three, by the accuracy of whole runs at the end, on the validation split of a seed that is not
    compared."""
    rates, words = {}, []
    for stage in changes.get("order", base.order).split(","):
        tried = {}
        for factor in RATES:
            rate = float(f"{getattr(base, f'{stage}_lr') * factor:.3g}")
            trial = changes | rates | {f"{stage}_lr": rate, "seed": seed}
            try:
                _, report = run_cell(base, trial | {"eval_split": "validation"})
                row = list(report["evaluation"].values())[-1]["all"]
                tried[rate] = row["accuracy"], row["probability"]
            except Diverged:
                tried[rate] = -1.0, 0.0
        best = max(tried, key=tried.get)
        rates[f"{stage}_lr"] = best
        words.append(f"{best:.2g}" + "*" * (best in (min(tried), max(tried))))
    return rates, " / ".join(words)


def cell_facts(report: dict) -> dict:
    """What a sweep shows of one run, in percent."""
    facts = {f"% active in {k}": v for k, v in report["partition"]["active_percent"].items()}
    facts["jaccard"], stages = report["partition"]["jaccard"], list(report["evaluation"])
    for stage, when in [*((s, f"after {s}") for s in stages), (stages[-1], "at the end")]:
        for system, row in report["evaluation"][stage].items():
            facts[f"{system} {when}"] = 100 * row["accuracy"]
    return facts | {"seconds": round(sum(report["seconds"].values()), 1)}


def spread(values, digits=1) -> str:
    """Mean ± standard deviation."""
    values = [v for v in values if v is not None]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}" if values else ""


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, which one value does not tell."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return statistics.mean(values), error


def verdict(better: str, worse: str, paper: float | None, records: list[dict]) -> list[str]:
    """A table's row. Seen: the mean difference is beyond two standard errors. Not seen: it is not,
    and two standard errors more do not reach the paper's (0 where that is not known)."""
    row, column = (better, "all after sft") if worse == SAME else (worse, "all at the end")
    first = {r["seed"]: r["all at the end"] for r in records if r["row"] == better}
    second = {r["seed"]: r[column] for r in records if r["row"] == row}
    mean, error = mean_and_error([first[seed] - second[seed] for seed in first])
    word = "not seen" if mean + 2 * error < (paper or 0.0) else "too noisy to tell"
    word = "seen" if mean > 2 * error else word
    known = "" if paper is None else f"{paper:+.1f}"
    return [better, worse, f"{mean:+.1f}", f"{error:.1f}", known, word]


def write_sweep(base: RunConfig, name: str, records: list[dict], lines: list[str]):
    """NAME.csv, all facts of all cells, and NAME.md, which is also printed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for r in records for k in r)))
    writer.writeheader()
    writer.writerows(records)
    lorapar.write_file(Path(base.out) / f"{name}.csv", text.getvalue().encode())
    lorapar.write_file(Path(base.out) / f"{name}.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(["", *lines, "", f"written: {base.out}/{name}.md and .csv"]))


def active_shares(base: RunConfig, seeds: int):
    """How many elements reach cumulative importance theta, for three target sets (table 3). At an
    anchored start an adapter's gradient is its own whatever the others are, so the scores of QKV
    and GUD are those of all six, ranked alone."""
    records, rows, kept = [], [], []
    for seed in range(seeds):
        c, report = run_cell(base, {"seed": seed, "score_only": True})
        scores = read_tensors(Path(c.out) / "importance.safetensors")
        kept.append((report["partition"]["factors"], scores["s1"], scores["s2"]))
    for targets, theta in itertools.product(TARGETS, (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)):
        names = [lorapar.PROJECTIONS[letter] for letter in targets]
        for seed, (factors, s1, s2) in enumerate(kept):
            inside = [torch.full((n,), f.split(".")[-2] in names) for f, n in factors.items()]
            part = lorapar.partition(s1[torch.cat(inside)], s2[torch.cat(inside)], theta)
            record = {"targets": targets, "theta": theta, "seed": seed, "jaccard": jaccard(part)}
            for name, region in (("S1", part.s1_only), ("S2", part.s2_only)):
                record[name] = 100 * float((region | part.shared).double().mean())
            records.append(record)
        shares = [spread([r[k] for r in records[-seeds:]], 2) for k in ("S1", "S2")]
        index = spread([r["jaccard"] for r in records[-seeds:]], 3)
        known = PAPER_ACTIVE.get((targets, theta), "")
        rows.append([targets.upper(), theta, known, *shares, index])
    head = ["targets", "theta", "paper, % active", "S1 region, %", "S2 region, %", "Jaccard"]
    lines = [f"## theta: {seeds} seeds, {base.score_examples} examples a system", ""]
    write_sweep(base, "theta-scores", records, [*lines, *table(head, rows)])


BLOCK = 25  # examples whose gradients are summed once, to be put together in several draws


def resample(base: RunConfig, seeds: int):
    """How much of what looks like two regions is sampling: the Jaccard index of the regions of the
    two systems, of one system scored on other examples, and of two halves with shuffled labels."""
    records, rows, kinds = [], [], ("S1 / S2", "S1 / S1", "S2 / S2", "shuffled")
    for seed in range(seeds):
        records += resample_once(base, seed)
    curves = {kind: {} for kind in kinds}
    for n, theta in dict.fromkeys((r["examples"], r["theta"]) for r in records):
        mine = [r for r in records if (r["examples"], r["theta"]) == (n, theta)]
        gaps = [(r["S1 / S1"] + r["S2 / S2"]) / 2 - r["S1 / S2"] for r in mine]
        beyond = "{:+.3f} ± {:.3f}".format(*mean_and_error(gaps))
        rows.append([n, theta, *(spread((r.get(kind) for r in mine), 3) for kind in kinds), beyond])
        for kind in kinds if theta == 0.9 else ():
            if kind in mine[0]:
                curves[kind][n] = [r[kind] for r in mine]
    lines = [
        f"## resample: Jaccard indices, {seeds} seeds",
        "",
        *table(["examples a draw", "theta", *kinds, "beyond sampling"], rows),
        "",
        "S1 / S2: the mean of four pairs of draws. S1 / S1, S2 / S2: disjoint draws of one system. "
        "Shuffled: two disjoint halves, each half S1 and half S2. Beyond sampling: the mean of the "
        "second and third less the first, with its standard error.",
    ]
    write_sweep(base, "resample", records, lines)
    draw_curves(base, "resample", curves, "examples a draw", "Jaccard index at theta 0.9")


def resample_once(base: RunConfig, seed: int) -> list[dict]:
    """The records of one seed, kept in a folder of its own."""
    folder = Path(base.out) / f"resample-{seed}"
    c = replace(base, seed=seed, score_only=True, out=str(folder))
    report = open_run(c)  # refuses a folder of other settings
    if (folder / "resample.json").exists():
        return decoder.read_json(folder / "resample.json")
    share_toy(base, c)
    model, _, _, rows, _ = prepare(c, report)
    start = torch.Generator().manual_seed(c.seed)
    lorapar.add_lora(model, c.targets, c.r, c.lora_alpha, c.dropout, c.init, generator=start)
    fewest = min(map(len, rows.values()))
    sizes = [n for n in (25, 50, 100, 200) if 2 * n <= fewest]
    if not sizes:
        raise ValueError(f"resample: {fewest} examples of a system are too few for two draws of 25")
    half, sums = sizes[-1] // BLOCK, {}  # blocks of a draw; system -> its blocks' g and F
    for system, members in rows.items():
        sums[system] = []
        for i in bar(range(0, 2 * sizes[-1], BLOCK), f"score {system}"):
            block = data.batches(members[i : i + BLOCK], c.micro_batch, c.device)
            moments = lorapar.gradient_moments(model, block, decoder.token_logprobs)
            sums[system].append([m.float().cpu() for m in moments[:2]])
    phi = lorapar.get_flat(model).cpu()

    def scores(blocks):
        g, fisher = (sum(block[i].double() for block in blocks) for i in (0, 1))
        return lorapar.scores_from(g, fisher, BLOCK * len(blocks), phi)

    records = []
    for n in sizes:
        k, firsts = n // BLOCK, (0, half)  # two disjoint draws of k blocks begin there
        one, two = ([scores(blocks[f : f + k]) for f in firsts] for blocks in sums.values())
        pairs = {"S1 / S2": list(itertools.product(one, two)), "S1 / S1": [one], "S2 / S2": [two]}
        if k > 1:
            mixed = [
                [b for blocks in sums.values() for b in blocks[f : f + k // 2]] for f in firsts
            ]
            pairs["shuffled"] = [[scores(blocks) for blocks in mixed]]
        for theta in (0.1, 0.3, 0.5, 0.7, 0.9):
            record = {"seed": c.seed, "examples": n, "theta": theta}
            for kind, those in pairs.items():
                indices = [jaccard(lorapar.partition(*pair, theta)) for pair in those]
                record[kind] = sum(indices) / len(indices)
            records.append(record)
    lorapar.write_json(folder / "resample.json", records)
    return records


def draw_curves(base: RunConfig, name: str, curves: dict, x: str, y: str):
    """{curve: {x: values}} -> NAME.png, means and standard deviations, if matplotlib is there."""
    figure = new_figure(6, 4)
    if figure is None:
        return
    axes = figure.subplots()
    for curve, points in curves.items():
        means = [statistics.mean(values) for values in points.values()]
        errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()]
        axes.errorbar(list(points), means, errors, label=curve, marker="o", capsize=3)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    figure.savefig(Path(base.out) / f"{name}.png", dpi=120, bbox_inches="tight")


# ------------------------------------------------------------------------------------------- bench

SHAPES = {  # the first seven fields of ModelConfig: vocabulary, hidden, ffn, layers, heads ..
    "toy": (len(data.TOY_TOKENS), 128, 256, 2, 4, 4, 32),
    "58m": (32000, 512, 1376, 8, 8, 8, 64),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 128),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128),
}


def random_model(name, device, dtype):
    """A model of a known shape, or of a folder's config.json, with random weights."""
    if name in SHAPES:
        kind = "qwen2" if name.startswith("qwen") else "llama"
        config = decoder.ModelConfig(*SHAPES[name], model_type=kind)
    else:
        path = decoder.find_model(name) / "config.json"
        config = decoder.ModelConfig.from_dict(decoder.read_json(path), str(path))
    with torch.device("meta"):
        model = decoder.Transformer(config)
    model.to_empty(device=device).to(dtype).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim == 2 else p.fill_(1.0)
    return model.eval()


def median_time(work, device, repeats=3) -> float:
    """The median seconds of work(), after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def run_bench(arguments):
    """What a model shape costs on this device, each figure beside its floor.

    Floors: the arithmetic at the rate of a large matrix product, the bytes at that of a copy, both
    measured here. SFT counts 4 FLOPs a parameter and token (forward, and backward to the
    activations: the frozen weights need no gradient); a step of decoding reads the weights and
    every slot of the KV cache once.
    """
    parser = argparse.ArgumentParser("train.py bench", description=run_bench.__doc__)
    parser.add_argument("--shape", default="58m", help=f"{', '.join(SHAPES)}, or a model folder")
    parser.add_argument("--length", type=int, default=256, help="tokens per row, half are answer")
    parser.set_defaults(max_response=64)
    names = "device dtype targets r micro_batch rl_batch rl_group max_response"
    c, own = read_flags(parser, names.split(), arguments)
    cuda = torch.device(c.device).type == "cuda"
    dtype = "bfloat16" if c.dtype == "bfloat16" or (cuda and c.dtype == "auto") else "float32"
    dtype, half = getattr(torch, dtype), own.length // 2
    torch.manual_seed(0)

    def show(what, value, unit, floor=None):
        share = f"  {floor / value:6.1%} of the floor's speed" if floor else ""
        print(f"{what:44s} {value:12.4g} {unit}{share}")

    n = 8192 if cuda else 2048
    square = torch.randn(n, n, device=c.device, dtype=dtype)
    flops = 2 * n**3 / median_time(lambda: square @ square, c.device, 5)
    block, copied = torch.zeros(2, 2**27, dtype=torch.uint8, device=c.device)
    bandwidth = 2 * len(block) / median_time(lambda: copied.copy_(block), c.device, 5)
    show("matrix product", flops / 1e9, "GFLOP/s")
    show("memory copy, bytes read and written", bandwidth / 1e9, "GB/s")
    model = lorapar.add_lora(random_model(own.shape, c.device, dtype), c.targets, c.r)
    m, head = model.config, model.head_weight.numel()
    body = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    rows = [(torch.randint(m.vocab_size, (own.length,)).tolist(), half)] * c.micro_batch
    tokens, labels = data.collate(rows, c.device)
    optimizer = lorapar.MaskedAdamW(model, lr=1e-5, max_grad_norm=1.0)

    def sft_step():
        backward(model, rows, c.micro_batch, c.device)
        optimizer.step()
        optimizer.zero_grad()

    def score_batch():
        lorapar.importance(model, [(tokens, labels)], decoder.token_logprobs)

    floor = 4 * (body * tokens.numel() + head * int((labels != -100).sum())) / flops
    time_sft = median_time(sft_step, c.device)
    show("SFT step", time_sft, "s", floor)
    show("importance", median_time(score_batch, c.device), "s", floor)
    scores = torch.rand(2, len(lorapar.get_flat(model))) ** 4
    time_partition = median_time(lambda: lorapar.partition(*scores, 0.9), c.device, 1)
    show(f"partition of {scores.shape[1]} elements", time_partition, "s")

    R, prompts = c.rl_batch * c.rl_group, [rows[0][0][:half]] * c.rl_batch
    sizes = {"group": c.rl_group, "max_new_tokens": c.max_response, "batch_rows": R}
    s, slots = grpo.Settings(**sizes, micro_batch=c.micro_batch), half + c.max_response
    cache = 2 * m.num_hidden_layers * m.num_key_value_heads * m.head_dim * R * slots
    read = (body + head + cache) * dtype.itemsize / bandwidth
    floor = 2 * body * c.rl_batch * half / flops  # the prompts
    floor += (c.max_response - 1) * max(read, 2 * (body + head) * R / flops)
    time_rollout = median_time(lambda: grpo.rollouts(model, prompts, s), c.device, 2)
    show("rollouts", time_rollout, "s", floor)
    sampled, advantages = grpo.rollouts(model, prompts, s), torch.randn(c.rl_batch, c.rl_group)
    reference = lorapar.get_flat(model)
    time_update = median_time(
        lambda: grpo.grpo_update(model, optimizer, sampled, advantages, reference, s), c.device, 2
    )
    floor = 6 * R * (body * slots + head * c.max_response) / flops  # the reference: a forward more
    show("GRPO update with KL", time_update, "s", floor)
    show("peak memory", peak_memory(c.device) / 1e9, "GB")
    # GSM8K's 7,473 training problems: about 200 tokens each; RL: 8 answers of up to 256 tokens
    show("SFT epoch on GSM8K, projected", 7473 * 200 * time_sft / tokens.numel() / 3600, "h")
    per_token = (time_rollout + time_update) / (R * c.max_response)
    show("RL epoch on GSM8K, projected", 7473 * 8 * 256 * per_token / 3600, "h")


COMMANDS = {
    "eval": run_eval,
    "merge": run_merge,
    "figure": run_figure,
    "sweep": run_sweep,
    "bench": run_bench,
}


def main(arguments=None):
    sys.stdout.reconfigure(line_buffering=True)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] and arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
        else:
            c = read_config(arguments)
            run(c)
            draw_figures(Path(c.out))
            print(f"everything is in {c.out}")
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        sys.exit(f"train.py: {reason}: lower --micro-batch and --batch-rows, or --checkpointing")
    except (ValueError, OSError, SafetensorError, data.SandboxError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
