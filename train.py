"""LoRA-PAR from end to end: score -> partition -> sft -> grpo -> evaluate (paper, Algorithm 1).

    python train.py                                        # the toy world, no GPU, no network
    python train.py --model FOLDER --data gsm8k:DIR --labels labels.jsonl

`run` is the whole method; scores, masks, both loops and the evaluation follow in its order, then
settings, inputs (`prepare`), the run folder, and the commands eval, compare, merge, figure, sweep.
A run lives in one folder (config, labels, scores, partition, adapters, metrics, report); the same
command goes on where it stopped. `torchrun --nproc_per_node=N train.py ..` splits each step's
examples over N processes. Left out: sharding the model, resuming on another number of processes.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

import data
import grpo
import lorapar
from model import (
    ModelConfig,
    Transformer,
    auto_dtype,
    eval_mode,
    find_model,
    generate,
    load_model,
    prefill,
    read_json,
    save_model,
    token_logprobs,
    weight_files,
)


class Diverged(ValueError):
    """Training or its result is no longer finite."""


def run(c) -> dict:
    """The whole method on one run folder. c: the flags, one attribute each (`read_config`). Returns
    the report, also report.json."""
    lock = open_folder(c)  # noqa: F841  held until this function ends
    model, inputs = prepare(c)  # each example carries its voted label
    rows = {}
    if c.order != "none":
        rows["base"] = evaluate(c, "base", model, inputs)
    if c.method != "lora":
        return run_baseline(c, model, inputs, rows)
    add_adapters(c, model)
    if c.init == "gaussian" and rows:  # the other starts leave the model as it is
        rows["init"] = evaluate(c, "init", model, inputs)
    s1, s2 = score(c, model, inputs.encoded)  # importance on S1, importance on S2: eq. 1-3
    masks, facts = split_elements(c, model, s1, s2)  # Algorithm 1, step 1
    model.model.checkpointing = c.checkpointing  # not before: scoring's vmap cannot run it
    for stage in ORDERS[c.order]:
        lorapar.set_mask(model, masks[stage])
        if stage == "sft":  # step 2: moves S1-only and the top alpha of shared
            sft(c, model, inputs)
        else:  # step 3: moves S2-only and the top beta of shared
            rl(c, model, inputs)
        rows[stage] = evaluate(c, stage, model, inputs)
    return write_report(c, rows, facts, inputs, s1, s2)


# ------------------------------------------------------------------- what run calls, in its order


def evaluate(c, row, model, inputs) -> dict:
    """A row of the report: greedy accuracy, and what the model thinks of the reference answers."""
    file = c.out / "answers" / f"{row}.jsonl"
    if file.exists():
        try:
            records = [record for _, record in data.read_records(file)]
            if [r["id"] for r in records] != [e.id for e in inputs.test]:
                raise ValueError
            means = averages(records)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError(f"{file}: not the answers of a run; delete it to ask again") from None
    else:
        records = answer_all(c, model, inputs, inputs.test, row)
        file.parent.mkdir(exist_ok=True)
        write_lines(file, records)
        means = averages(records)
    accuracies = [f"{system} {100 * mean['accuracy']:.1f}%" for system, mean in means.items()]
    print(f"evaluate {row}: {'  '.join(accuracies)}")
    return means


def add_adapters(c, model):
    generator = torch.Generator().manual_seed(c.seed)
    targets = [PROJECTIONS[letter] for letter in c.targets]
    lorapar.add_lora(model, targets, c.r, c.lora_alpha, c.dropout, c.init, generator=generator)


def score(c, model, encoded):
    """Importance of every LoRA element for both systems, before any training -> s1, s2 (N,) on the
    CPU. Saved with the start of the factors; a resumed run restores both."""
    path = c.out / "importance.safetensors"
    if path.exists():
        saved = read_tensors(path, ("start", "s1", "s2"))
        lorapar.set_flat(model, saved["start"])
        if c.init in lorapar.ANCHORED:
            lorapar.set_anchor(model, saved["start"])
        print(f"score: reused from {path}")
        return saved["s1"], saved["s2"]
    saved = {"start": lorapar.get_flat(model)}  # PiSSA's SVD may differ on another machine
    for name, system in (("s1", "S1"), ("s2", "S2")):
        if ranks_nothing(c):
            saved[name] = torch.ones_like(saved["start"], device="cpu")
            continue
        examples = encoded[system]
        examples = random.Random(c.seed).sample(examples, min(c.score_examples, len(examples)))
        rank, size = lorapar.rank_and_size()
        batches = data.batches(examples[rank::size], c.micro_batch, c.device)
        batches = bar(batches, f"score {system}")
        saved[name] = lorapar.importance(model, batches)
        print(f"score: {system} on {len(examples)} examples")
    write_tensors(path, saved)
    return saved["s1"], saved["s2"]


def ranks_nothing(c) -> bool:
    """At theta 1 all elements are shared; to take all or none of them needs no scores."""
    return c.theta == 1 and {c.alpha, c.beta} <= {0, 1}


def split_elements(c, model, s1, s2):
    """The partition -> both stages' masks {"sft", "rl"}, and the facts of partition.json."""
    if c.select in ("random", "random-in-tensor"):
        s1, s2 = permuted(model, s1, s2, c.select, torch.Generator().manual_seed(c.seed))
    part = lorapar.partition(s1, s2, c.theta)
    masks = {
        "sft": lorapar.stage_mask(part.s1_only, part.shared, s1, c.alpha),
        "rl": lorapar.stage_mask(part.s2_only, part.shared, s2, c.beta),
    }
    if c.select == "swapped":  # the control: each stage moves the other system's elements
        masks = {"sft": masks["rl"], "rl": masks["sft"]}
    for stage in ORDERS[c.order]:
        if not masks[stage].any():
            share = "--alpha" if stage == "sft" else "--beta"
            raise ValueError(f"{stage}: no element is active: raise {share} or change --theta")
    stages = ORDERS[c.order] or ("sft", "rl")  # --order none: what both would move
    facts = partition_facts(model, part, {stage: masks[stage] for stage in stages})
    write_json(c.out / "partition.json", facts)
    write_tensors(c.out / "partition.safetensors", part._asdict())  # flat order
    active = [f"{percent:.1f}% in {stage}" for stage, percent in facts["active_percent"].items()]
    print(
        f"partition: {len(s1)} elements, active {', '.join(active)}, Jaccard {facts['jaccard']:.3f}"
    )
    return masks, facts


def permuted(model, s1, s2, select: str, generator):
    """The control: scores that no longer say which element they belong to. One permutation moves
    both vectors ("random-in-tensor": inside each factor), so every region keeps its size."""
    sizes = [len(s1)]
    if select == "random-in-tensor":
        sizes = [p.numel() for p in lorapar.lora_factors(model).values()]
    pieces = torch.arange(len(s1)).split(sizes)
    order = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in pieces])
    return s1[order], s2[order]


def sft(c, model, inputs):
    """Supervised fine-tuning of the masked elements. inputs.sft: questions with their answers."""
    optimizer = lorapar.MaskedAdamW(
        model,
        lr=c.sft_lr,
        weight_decay=c.sft_weight_decay,
        max_grad_norm=c.sft_grad_norm,
        sum_gradients=True,
    )
    plan = step_batches(inputs.sft, c.sft_batch, c.sft_epochs, c.sft_steps, c.seed)
    first = load_state(c, "sft", model, optimizer, len(plan))  # 0 unless a run goes on
    model.train()  # dropout acts in this stage alone
    for step in range(first, len(plan)):
        started = time.perf_counter()
        seed_step(c, step)
        lr = set_lr(optimizer, c.sft_lr, step, len(plan), c.sft_warmup)
        batch = plan[step]
        with stop_if_diverged(c, "sft", step):
            rank, size = lorapar.rank_and_size()
            loss = backward(model, batch[rank::size], len(batch), c.micro_batch, c.device)
            loss = float(lorapar.sum_over_ranks(loss))
            optimizer.step()  # clips, then moves the active elements
            optimizer.zero_grad()
        values = {
            "loss": loss,
            "grad_norm": optimizer.grad_norm.item(),
            "lr": lr,
            "seconds": time.perf_counter() - started,
        }
        end_step(c, "sft", model, optimizer, inputs, step, len(plan), values)
    model.eval()


def backward(model, encoded, batch_size: int, micro_batch: int, device):
    """Backward of (sum over these examples of the answer's mean token cross-entropy) / batch_size,
    which it returns. At most micro_batch examples at a time; but for dropout's draws the gradient
    does not depend on it."""
    total = torch.zeros((), device=device)
    for tokens, labels in data.batches(encoded, micro_batch, device):
        logp = token_logprobs(model, tokens, labels)  # (B, T-1), 0 on the prompt
        answer_tokens = (labels[:, 1:] != -100).sum(1)  # (B,)
        loss = -(logp.sum(1) / answer_tokens).sum() / batch_size
        loss.backward()
        total += loss.detach()
    return total


def rl(c, model, inputs):
    """GRPO on the masked elements. inputs.rl: (example, the ids of its prompt)."""
    optimizer = lorapar.MaskedAdamW(
        model,
        lr=c.rl_lr,
        betas=(0.9, 0.99),
        weight_decay=c.rl_weight_decay,
        max_grad_norm=c.rl_grad_norm,
        sum_gradients=True,
    )
    reference = lorapar.get_flat(model)  # the policy as RL begins: load_state changes it
    if c.kl_reference == "base":  # the factors that add nothing: the anchor, or zeros
        reference = torch.zeros_like(reference)
        if c.init in lorapar.ANCHORED:
            anchors = lorapar.lora_buffers(model, "anchor")
            reference = torch.cat([anchor.flatten() for anchor in anchors])
    settings = grpo.Settings(
        group=c.rl_group,
        max_new_tokens=c.max_response,
        eos_ids=inputs.tokenizer.eos_ids,
        temperature=c.temperature,
        loss=c.rl_loss,
        clip=c.clip,
        clip_high=c.clip_high,
        mask_truncated=c.mask_truncated,
        kl=c.kl,
        iterations=c.rl_iterations,
        batch_rows=c.batch_rows,
        micro_batch=c.micro_batch,
    )
    plan = step_batches(inputs.rl, c.rl_batch, c.rl_epochs, c.rl_steps, c.seed)
    first = load_state(c, "rl", model, optimizer, len(plan))
    equal_steps = 0
    for step in range(first, len(plan)):
        started = time.perf_counter()
        generator = seed_step(c, step)
        lr = set_lr(optimizer, c.rl_lr, step, len(plan), c.rl_warmup)
        examples = [example for example, _ in plan[step]]
        prompts = [prompt for _, prompt in plan[step]]
        reward = partial(reward_rollouts, c, inputs, examples)
        with stop_if_diverged(c, "rl", step):
            stats, rollouts = grpo.grpo_step(
                model, optimizer, prompts, reward, reference, settings, generator
            )
        keep_samples(c, inputs.tokenizer, step, examples, rollouts)
        values = stats | {"lr": lr, "seconds": time.perf_counter() - started}
        end_step(c, "rl", model, optimizer, inputs, step, len(plan), values)
        equal_steps = equal_steps + 1 if stats["equal_groups"] == len(prompts) else 0
        if equal_steps == 10:
            print("rl: warning: ten steps without a difference in reward: nothing is being learned")


def reward_rollouts(c, inputs, examples, rollouts) -> list[dict]:
    """The reward parts of a step's rollouts, on all cores."""
    work = []
    for rollout in rollouts:
        reply = inputs.tokenizer.decode(rollout.answer)
        work.append((examples[rollout.prompt_index], reply))
    return data.in_parallel(inputs.reward, work)


def keep_samples(c, tokenizer, step: int, examples, rollouts):
    """The first answer to each of three prompts goes to rl/samples.jsonl, one now and then into the
    log."""
    for i, example in enumerate(examples[:3]):
        rollout = rollouts[i * c.rl_group]
        sample = {
            "step": step,
            "id": example.id,
            "question": example.question,
            "answer": tokenizer.decode(rollout.answer),
            "reward": rollout.reward_parts,
        }
        append_line(c.out / "rl" / "samples.jsonl", sample)
        if i == 0 and step % (c.eval_every or 20) == 0:
            print(f"rl sample: {sample['answer'][:300]!r} to {example.question[-100:]!r}")
            print(f"rl sample: its reward is {rollout.reward_parts}")


# ------------------------------------------------------------------------ what the loops share


def step_batches(examples, batch: int, epochs: int, limit: int | None, seed: int) -> list[list]:
    """The examples of every step: each epoch one seeded permutation, cut into batches."""
    steps = []
    for epoch in range(epochs):
        order = list(examples)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[i : i + batch] for i in range(0, len(order), batch)]
    return steps[:limit]


def seed_step(c, step: int):
    """Each step has its own seed, so a resumed run needs no state of a random generator."""
    seed = c.seed * 1_000_003 + step
    rank = lorapar.rank_and_size()[0]
    torch.manual_seed(seed + (rank << 20))  # of dropout: another in each process and step
    return torch.Generator().manual_seed(seed)


def set_lr(optimizer, peak: float, step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then cosine to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        factor = (step + 1) / (warm + 1)
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
    optimizer.param_groups[0]["lr"] = peak * factor
    return peak * factor


@contextmanager
def stop_if_diverged(c, stage: str, step: int):
    try:
        yield
    except FloatingPointError as error:
        cure = f"lower --{stage}-lr and name another --out ({c.out} keeps what was good)"
        raise Diverged(f"{stage} step {step + 1}: {error}: {cure}") from None


SHOWN = {  # the values in a step's line of the log
    "sft": ("loss", "grad_norm"),
    "rl": ("reward", "length", "truncated", "kl", "gap", "equal_groups", "rollout_s", "update_s"),
}
LEGEND = {
    "sft": "loss: mean of the answers' per-token means; grad_norm: of the active elements, before "
    "clipping",
    "rl": "reward (its parts), length: means over answers; truncated: share without an end; kl: to "
    "the\n    reference; gap: of sampling's log-probs to training's (rounding alone); "
    "equal_groups:\n    prompts whose answers all earn the same, so nothing is learned from them",
}
STAGE = {"running": False, "stop": False, "saved": 0.0}  # of the loop; saved: the time it did last


def ask_to_stop(signum, frame):
    """Ctrl-C or SIGTERM: in a loop the first one lets the step end and saves, the second stops at
    once. Outside a loop the first stops at once."""
    if STAGE["stop"] or not STAGE["running"]:
        raise KeyboardInterrupt
    STAGE["stop"] = True
    print("stopping after this step; once more to stop at once", file=sys.stderr)


def end_step(c, stage, model, optimizer, inputs, step: int, steps: int, values: dict):
    """Prints the step's line, adds it to metrics.jsonl; now and then (and at the end) validates and
    saves."""
    last = step + 1 == steps
    validates = c.eval_every and ((step + 1) % c.eval_every == 0 or last)
    if validates:
        values = values | validate(c, stage, model, inputs, step)
    late = time.monotonic() - STAGE["saved"] > 600  # steps may take minutes
    due = validates or last or late or (step + 1) % c.save_every == 0
    saves = any(grpo.gather_over_ranks([due or STAGE["stop"]]))  # all stop at the same step
    if saves:
        refuse_overflow(c, stage, model, step)
    append_line(c.out / "metrics.jsonl", {"stage": stage, "step": step} | values)
    print(step_line(stage, step, steps, values))
    if saves:
        lorapar.save_adapter(model, c.out / stage, c.model or "toy")
        save_state(c.out / stage, model, optimizer, step + 1)  # last: no step runs after it
        STAGE["saved"] = time.monotonic()
    STAGE["running"] = not last
    if saves and any(grpo.gather_over_ranks([STAGE["stop"]])):  # also if asked while it saved
        print(f"saved after {stage} step {step + 1} of {steps} in {c.out}")
        raise KeyboardInterrupt


def refuse_overflow(c, stage: str, model, step: int):
    """Raises Diverged instead of saving a broken adapter: finite A and B may overflow in B A."""
    with stop_if_diverged(c, stage, step), eval_mode(model), torch.no_grad():
        tokens = labels = torch.zeros(1, 2, dtype=torch.long, device=c.device)  # any will do
        if not token_logprobs(model, tokens, labels).isfinite().all():
            raise FloatingPointError("the model's log-probs are not finite")


def step_line(stage: str, step: int, steps: int, values: dict) -> str:
    """A step's line of the log: see LEGEND."""
    words = [f"{name} {values[name]:.4g}" for name in SHOWN[stage]]
    if "parts" in values:  # of the reward
        parts = [f"{name} {value:.2f}" for name, value in values["parts"].items()]
        words[0] += f" ({' '.join(parts)})"
    minutes, seconds = divmod(int(values["seconds"] * (steps - step - 1)), 60)
    return f"{stage} {step + 1}/{steps}  {'  '.join(words)}  left {minutes}:{seconds:02d}"


def validate(c, stage: str, model, inputs, step: int) -> dict:
    """Accuracy and loss on a fixed sample of the validation split; the stage's best adapter so far
    is kept beside its last one."""
    records = answer_all(c, model, inputs, inputs.validation, f"{stage} {step + 1}")
    mean, file = averages(records)["all"], c.out / "metrics.jsonl"
    print(f"{stage} validation {step + 1}: {mean['accuracy']:.3f} ± {mean['error']:.3f}; for one:")
    print(f"  {records[0]['reply'][:300]!r} to {records[0]['question'][-100:]!r}")
    earlier = [r for _, r in data.read_records(file)] if file.exists() else []
    scores = [r["accuracy"] for r in earlier if r["stage"] == stage and "accuracy" in r]
    if mean["accuracy"] > max(scores, default=-math.inf):
        lorapar.save_adapter(model, c.out / stage / "best", c.model or "toy")
    return {"accuracy": mean["accuracy"], "validation_loss": mean["loss"]}


def save_state(folder, model, optimizer, step: int):
    """What a stage needs to go on bit for bit, in one file that is renamed into place."""
    tensors = {f"adam.{name}": t for name, t in optimizer.state[optimizer.packed].items()}
    tensors |= {"flat": lorapar.get_flat(model), "step": torch.tensor(step)}
    write_tensors(folder / "state.safetensors", tensors)


def load_state(c, stage: str, model, optimizer, steps: int) -> int:
    """Puts a saved state back -> the step to go on with, 0 if there is none. Drops the metrics and
    samples of the steps that will run again. ValueError if it was made with another mask or reward,
    or from another start (after another first stage), or if several processes differ in these."""
    folder, first = c.out / stage, 0
    folder.mkdir(exist_ok=True)
    path = folder / "state.safetensors"
    start = digest(lorapar.get_flat(model).cpu().numpy().tobytes())
    origin = {"mask": optimizer.param_groups[0]["mask"], "start": start}
    if stage == "rl":
        origin["reward"] = digest(reward_code(c))
    if path.exists():
        tensors = read_tensors(path, ("flat", "step"))
        refuse_changes(path, read_json(folder / "origin.json"), origin)
        lorapar.set_flat(model, tensors["flat"])
        adam = {name[5:]: t for name, t in tensors.items() if name.startswith("adam.")}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: adam}})
        first = int(tensors["step"])
    else:
        write_json(folder / "origin.json", origin)
        if lorapar.rank_and_size()[0] == 0:  # a user who deletes a stage's folder redoes the stage
            for name in (f"answers/{stage}.jsonl", "report.json", "report.md"):
                (c.out / name).unlink(missing_ok=True)
    states = grpo.gather_over_ranks([(origin, first)])
    if any(state != states[0] for state in states):  # another machine's SVD, a folder of its own
        raise ValueError(f"{stage}: the processes do not have the same start, mask and step")
    metrics = c.out / "metrics.jsonl"
    keep_lines(metrics, lambda r: r["stage"] != stage or r["step"] < first)
    keep_lines(folder / "samples.jsonl", lambda r: r["step"] < first)
    STAGE.update(running=first < steps, stop=False, saved=time.monotonic())
    if first:
        print(f"{stage}: goes on after step {first}")
    print(f"{stage}: {LEGEND[stage]}")
    return first


def keep_lines(path: Path, wanted):
    """Leaves the records of a jsonl file that are wanted; a torn line goes too."""
    if not path.exists():
        return
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(json.JSONDecodeError, TypeError, KeyError):
            record = json.loads(line)
            if wanted(record):
                records.append(record)
    write_lines(path, records)


def append_line(path: Path, record: dict):
    """Of several processes the first alone writes."""
    if lorapar.rank_and_size()[0] == 0:
        with open(path, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------- evaluation


def answer_all(c, model, inputs, examples, what: str) -> list[dict]:
    """A record for each example that a person can read: the greedy answer, whether it is right (its
    reward, where that alone can tell), and the reference answer's probability and loss per token
    (its EOS included)."""
    tokenizer = inputs.tokenizer
    encoded, _ = data.tokenize(examples, tokenizer, 10**9, c.prompt, "rl")
    rank, size = lorapar.rank_and_size()
    # similar lengths together, for little padding; the longest first: what is too large fails now
    order = sorted(range(len(examples)), key=lambda i: -encoded[i].prompt_length)
    own = order[rank::size]
    letters = [i for i in own if examples[i].kind == "letter"]
    texts = [i for i in own if examples[i].kind != "letter"]
    jobs = []
    for reply_to, rows in ((reply_texts, texts), (reply_letters, letters)):
        for start in range(0, len(rows), c.batch_rows):
            jobs.append((reply_to, rows[start : start + c.batch_rows]))
    records = {}  # index of the example -> its record
    with eval_mode(model):
        for reply_to, rows in bar(jobs, f"evaluate {what}"):
            batch = [examples[i] for i in rows]
            prompts = [encoded[i].ids[: encoded[i].prompt_length] for i in rows]
            replies = reply_to(c, model, tokenizer, batch, prompts)
            work = [(example, reply) for example, (reply, _) in zip(batch, replies)]
            verdicts = data.in_parallel(partial(judge, c, inputs.reward), work)
            likelihoods = likelihood(c, model, [encoded[i] for i in rows], what)
            for i, (reply, cut), correct, (p, loss) in zip(rows, replies, verdicts, likelihoods):
                records[i] = {
                    "id": examples[i].id,
                    "label": examples[i].label,
                    "question": examples[i].question,
                    "gold": examples[i].gold,
                    "reply": reply,
                    "truncated": cut,
                    "correct": correct,
                    "probability": p,
                    "loss": loss,
                }
    records = dict(grpo.gather_over_ranks(list(records.items())))
    return [records[i] for i in range(len(examples))]


def judge(c, reward, example, reply: str) -> float:
    """Is the reply right? Where only the reward can tell: its reward."""
    if example.kind == "text":
        return sum(reward(example, reply).values())
    return data.is_correct(example, reply, c.allow_unconfined_code)


def reply_texts(c, model, tokenizer, examples, prompts) -> list[tuple[str, bool]]:
    """The model's greedy answers, and whether each was cut at --max-response."""
    settings = {"temperature": 0, "eos_ids": tokenizer.eos_ids, "batch_rows": c.batch_rows}
    with lorapar.cached_factors(model):
        answers = generate(model, prompts, c.max_response, **settings)
    return [(tokenizer.decode(ids), ids[-1] not in tokenizer.eos_ids) for (ids,) in answers]


@torch.no_grad()
def reply_letters(c, model, tokenizer, examples, prompts) -> list[tuple[str, bool]]:
    """The most likely of A, B, C and D after each prompt; none is cut."""
    letters = []
    for letter in "ABCD":
        example = replace(examples[0], answer=f" {letter}")
        letters.append(data.example_ids(example, tokenizer, c.prompt, "rl")[1][0])
    logits, _ = prefill(model, prompts)  # (P, V)
    return [("ABCD"[i], False) for i in logits[:, letters].argmax(-1).tolist()]


@torch.no_grad()
def likelihood(c, model, encoded, what: str) -> list[tuple[float, float]]:
    """(p(reference answer), its loss per token) of each example. Raises Diverged where the model no
    longer gives numbers."""
    pairs = []
    for start in range(0, len(encoded), c.micro_batch):
        tokens, labels = data.collate(encoded[start : start + c.micro_batch], c.device)
        logp = token_logprobs(model, tokens, labels).sum(1)
        if not logp.isfinite().all():
            raise Diverged(f"evaluate {what}: the model's log-probs are not finite")
        counts = (labels[:, 1:] != -100).sum(1)
        for log_p, n in zip(logp.tolist(), counts.tolist()):
            pairs.append((math.exp(log_p), -log_p / n))
    return pairs


def averages(records: list[dict]) -> dict:
    """{S1, S2, all: means over its examples}; "all" is every example, labelled or not."""
    means = {}
    for system in ("S1", "S2", "all"):
        members = [r for r in records if system in ("all", r["label"])]
        if members:
            values = [float(r["correct"]) for r in members]
            error = math.sqrt(statistics.pvariance(values) / len(values))
            means[system] = {"accuracy": statistics.fmean(values), "error": error}
            for name in ("probability", "loss", "truncated"):
                means[system][name] = statistics.fmean(r[name] for r in members)
            means[system]["examples"] = len(members)
    return means


# ---------------------------------------------------------------------------------------- settings

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
PROJECTIONS |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}
ORDERS = {"sft-rl": ("sft", "rl"), "rl-sft": ("rl", "sft"), "sft": ("sft",), "rl": ("rl",)}
ORDERS["none"] = ()


def within(kind, low, high):
    """The type of a flag: a number from low to high."""

    def number(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


def device_name(name: str) -> str:
    try:
        torch.empty(0, device=name, dtype=torch.float64)  # Apple's has none
    except (RuntimeError, AssertionError, TypeError):
        why = f"this PyTorch sees no device {name} with float64"
        raise argparse.ArgumentTypeError(why) from None
    return name


COUNT, SHARE, ABOVE_0 = within(int, 1, 10**9), within(float, 0, 1), within(float, 1e-37, 1e37)
FROM_0 = within(float, 0, 1e37)  # float32 ends there
METHODS = ("lora", *lorapar.BASELINE_METHODS)
SELECT = ("importance", "random", "random-in-tensor", "swapped")

SIZE_AND_SPEED = "size and speed (free to change when a run goes on)"
# group: {flag: (type, default, help)}. Defaults are the paper's, where it gives them. The flags of
# a stage may change until that stage begins.
FLAGS = {
    "what goes in and out": {
        "model": (str, None, "a model folder or Hub id; without it the toy world runs"),
        "data": (str, "toy", "NAME, NAME:PATH or a .jsonl of your own; names: see README"),
        "rl_data": (str, None, "another set for System 2, where --data cannot be checked"),
        "eval_data": (str, None, "another set for the evaluation"),
        "labels": (str, None, "labels.jsonl, authors' csv, steps:K; toy: teachers:K[:shuffled]"),
        "reward": (str, None, "FILE.py:FUNCTION(question, answer, completion) -> float or dict"),
        "prompt": (("plain", "chat", "authors"), "plain", "chat, authors: for chat models"),
        "out": (Path, None, "the run folder; default runs/toy or runs/MODEL-DATA"),
        "max_length": (COUNT, 512, "tokens of question and answer in SFT and scoring"),
        "max_response": (COUNT, 256, "tokens an answer may have, in RL and evaluation"),
        "seed": (within(int, 0, 10**9), 0, "seeds everything"),
        "dtype": (("auto", "float32", "bfloat16"), "auto", "of the base; auto: bfloat16 on a GPU"),
        "train_examples": (COUNT, None, "use at most this many training examples"),
        "eval_examples": (COUNT, None, "evaluate on at most this many examples"),
        "eval_split": (("test", "validation"), "test", "choose settings on validation only"),
        "eval_every": (COUNT, None, "steps between looks at the validation split, in both stages"),
    },
    "LoRA": {
        "method": (METHODS, "lora", "or a baseline of the paper's table 6, with --order sft"),
        "virtual_tokens": (COUNT, 20, "of prompt, p-tuning and prefix"),
        "targets": (str, "qkvgud", "projections that get an adapter: letters of q k v o g u d"),
        "r": (COUNT, 8, "rank"),
        "lora_alpha": (ABOVE_0, 64.0, "the scale is lora_alpha / r"),
        "dropout": (within(float, 0, 0.99), 0.05, "in SFT only"),
        "init": (lorapar.STARTS, "anchored", "start; all but gaussian keep the model at step 0"),
    },
    "the method": {
        "score_examples": (COUNT, 100, "examples per system that importance is measured on"),
        "theta": (within(float, 1e-37, 1), 0.9, "cumulative importance of a system's region"),
        "alpha": (SHARE, 1.0, "share of the shared region that SFT trains"),
        "beta": (SHARE, 1.0, "share of the shared region that RL trains"),
        "select": (SELECT, "importance", "random permutes the scores, swapped the stages' masks"),
        "order": (tuple(ORDERS), "sft-rl", "the stages; none stops after the partition"),
        "stage_data": (("split", "all"), "split", "a stage trains on its system, or on all"),
    },
    "SFT": {
        "sft_lr": (FROM_0, 2e-4, "learning rate"),
        "sft_epochs": (COUNT, 1, "epochs over the S1 examples"),
        "sft_steps": (COUNT, None, "at most this many optimizer steps"),
        "sft_batch": (COUNT, 32, "examples per optimizer step (the paper accumulates 32)"),
        "sft_warmup": (SHARE, 0.03, "share of the steps that warm up, then cosine"),
        "sft_weight_decay": (FROM_0, 0.0, "AdamW's decoupled weight decay"),
        "sft_grad_norm": (ABOVE_0, 1.0, "clip the norm of the active gradient at this"),
    },
    "RL (GRPO)": {
        "rl_lr": (FROM_0, 5e-6, "learning rate"),
        "rl_epochs": (COUNT, 1, "epochs over the S2 prompts"),
        "rl_steps": (COUNT, None, "at most this many batches of prompts"),
        "rl_batch": (COUNT, 4, "prompts per batch"),
        "rl_group": (within(int, 2, 10**9), 8, "answers per prompt (the group)"),
        "rl_iterations": (COUNT, 1, "optimizer steps per batch; the clip acts from the second on"),
        "rl_warmup": (SHARE, 0.1, "share of the batches that warm up, then cosine"),
        "rl_weight_decay": (FROM_0, 0.1, "AdamW's decoupled weight decay"),
        "rl_grad_norm": (ABOVE_0, 0.1, "clip the norm of the active gradient at this"),
        "max_prompt": (COUNT, 128, "longer prompts are left out of RL, and counted"),
        "temperature": (ABOVE_0, 0.9, "softmax temperature of rollouts and their log-probs"),
        "kl": (FROM_0, 0.04, "weight of the KL penalty; 0: none"),
        "kl_reference": (("start", "base"), "start", "the policy as RL begins, or the base"),
        "rl_loss": (("grpo", "token", "dr_grpo"), "grpo", "mean of answers, tokens, or no mean"),
        "clip": (FROM_0, 0.2, "PPO's ratio clip"),
        "clip_high": (FROM_0, None, "its upper side, if another (DAPO: 0.28)"),
        "mask_truncated": (bool, False, "answers cut at --max-response do not train"),
    },
    SIZE_AND_SPEED: {
        "device": (device_name, "cuda" if torch.cuda.is_available() else "cpu", "torch device"),
        "batch_rows": (COUNT, 64, "answers decoded together, in rollouts and evaluation"),
        "micro_batch": (COUNT, 4, "examples or answers per forward and backward"),
        "checkpointing": (bool, False, "recompute layers in the backward: less memory, slower"),
        "save_every": (COUNT, 50, "steps between saves of the resume state"),
        "allow_unconfined_code": (bool, False, "run code answers where no sandbox can be had"),
    },
}
TOY = {  # without --model these are the defaults
    "lora_alpha": 32.0, "dropout": 0.0,
    "sft_lr": 3e-3, "sft_epochs": 8, "max_length": 32,
    "rl_lr": 4e-3, "rl_epochs": 2, "rl_batch": 16, "rl_weight_decay": 0.0, "rl_grad_norm": 1.0,
    "max_prompt": 16, "max_response": 12, "temperature": 1.0, "kl": 0.005,
    "batch_rows": 1024, "micro_batch": 128,
}  # fmt: skip
TOY_BASE = {"steps": 1000, "batch": 96}
TOY_LABELS = r"teachers:([1-5])(:shuffled)?"  # what --labels may say there


class Parser(argparse.ArgumentParser):
    def __init__(self, *arguments, **settings):  # a sweep looks for its own flags by their names
        super().__init__(*arguments, allow_abbrev=False, **settings)

    def error(self, message):  # one line, without the usage
        raise ValueError(message)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser, names=None):
    """The flags of a run (or those of these names). A flag that is not given stays unset."""
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (kind, default, text) in flags.items():
            if names and name not in names:
                continue
            shown = f"{TOY[name]} in the toy, else {default}" if name in TOY else default
            if shown is not None:
                text = f"{text} (default: {shown})".replace("%", "%%")
            how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            if kind is bool:
                how = {"action": "store_true"}
            group.add_argument(option(name), default=argparse.SUPPRESS, help=text, **how)


def defaults() -> dict:
    return {name: default for flags in FLAGS.values() for name, (_, default, _) in flags.items()}


def read_config(arguments):
    """The command line of a run -> its settings, each flag an attribute."""
    commands = f"Also: python train.py {'|'.join(COMMANDS)} --help"
    about = __doc__.partition("\n")[0]
    parser = Parser(usage="python train.py [flags]", description=about, epilog=commands)
    add_flags(parser)
    said = vars(parser.parse_args(arguments))
    c = argparse.Namespace(**defaults() | ({} if said.get("model") else TOY) | said)
    if (c.data == "toy") != (c.model is None):
        raise ValueError("--model and --data go together: give both, or neither for the toy world")
    if c.out is None:
        name = data.split_spec(c.data)[0]
        c.out = Path("runs", f"{Path(c.model).name}-{Path(name).stem}" if c.model else "toy")
    if c.labels and Path(c.labels).resolve() == (c.out / "labels.jsonl").resolve():
        raise ValueError(f"--labels {c.labels} is a file that the run writes: name another --out")
    if c.method != "lora" and c.order != "sft":
        raise ValueError(f"--method {c.method} has the SFT stage alone: --order sft")
    if not c.targets or set(c.targets) - set(PROJECTIONS) or len(set(c.targets)) < len(c.targets):
        raise ValueError(f"--targets {c.targets}: letters of q k v o g u d, each once")
    if c.method == "lora" and c.init == "lora" and not ranks_nothing(c):
        raise ValueError(
            "--init lora: B = 0, so every importance is 0: --theta 1, or another start"
        )
    if c.data == "toy" and not re.fullmatch(TOY_LABELS, c.labels or "teachers:5"):
        raise ValueError(f'--labels {c.labels}: in the toy "teachers:1" to "teachers:5"')
    return c


# ------------------------------------------------------------------------------------------ inputs


@dataclass
class Inputs:
    """What a run reads: training data by system and by stage, and what it is evaluated on."""

    tokenizer: data.Tokenizer
    encoded: dict  # system -> its training examples as token ids, for scoring
    sft: list  # of data.Encoded
    rl: list  # of (example, its prompt's ids)
    test: list  # of examples
    validation: list  # of examples, for --eval-every
    reward: object  # (example, reply) -> its parts
    notes: dict  # name -> a line of the report
    made_from: dict  # hashes of base, data, labels, reward


def prepare(c):
    """Reads and checks every input before work begins (the toy's are made first)."""
    folder = find_model(c.model) if c.model else toy_base(c)
    inputs, labels = read_inputs(c, folder)
    model = load(c, folder)
    # raises now, not after the base's evaluation, where --targets or --r do not fit
    linears = lorapar.target_linears(model, [PROJECTIONS[x] for x in c.targets], c.r)
    config = c.out / "config.json"
    if config.exists():
        refuse_changes(config, read_json(config).get("made_from", {}), inputs.made_from)
    write_json(config, flags_of(c) | {"made_from": inputs.made_from})
    write_lines(c.out / "labels.jsonl", labels)
    describe(c, model, linears, inputs)
    if inputs.rl:  # one rollout and its reward are tried too
        example, prompt = inputs.rl[0]
        short = argparse.Namespace(**vars(c) | {"max_response": min(8, c.max_response)})
        replies = reply_texts(short, model, inputs.tokenizer, [example], [prompt])
        inputs.reward(example, replies[0][0])
    return model, inputs


def read_inputs(c, folder):
    """-> Inputs, and the label records."""
    reward, tokenizer = reward_function(c), data.Tokenizer(folder)
    sets, notes = read_sets(c), {}
    labels = read_labels(c, sets, notes)
    label_of = {r["id"]: r["label"] for r in labels}
    examples_of, encoded_of = {}, {}  # system -> its training examples, and these as token ids
    for system in ("S1", "S2"):
        labelled = [replace(e, label=label_of[e.id]) for e in sets[system] if e.id in label_of]
        random.Random(c.seed).shuffle(labelled)  # one cut for both systems, then each its own
        examples = [e for e in labelled[: c.train_examples] if e.label == system]
        encoded, counts = data.tokenize(examples, tokenizer, c.max_length, c.prompt, "sft")
        counts["without a label"] = len(sets[system]) - len(labelled)
        words = [f"{len(encoded)} training examples", *(f"{n} {k}" for k, n in counts.items() if n)]
        notes[system] = ", ".join(words)
        if not encoded:
            spec = c.data if system == "S1" else c.rl_data or c.data
            cure = "check --labels (ids of both sets), --train-examples, --max-length"
            raise ValueError(f"{system} of {spec}: {notes[system]}: {cure}")
        examples_of[system], encoded_of[system] = examples, encoded
    sft_encoded, rl_examples, rl_pairs = encoded_of["S1"], examples_of["S2"], []
    if c.stage_data == "all":  # an ablation: both stages train on both systems
        sft_encoded = encoded_of["S1"] + encoded_of["S2"]
        rl_examples = examples_of["S2"] + examples_of["S1"]
    if "rl" in ORDERS[c.order]:
        rl_pairs = rl_prompts(c, tokenizer, rl_examples, notes)
        example = rl_pairs[0][0]  # the reward is tried before hours of work, in a thread as in RL
        (parts,) = data.in_parallel(reward, [(example, example.answer)])
        notes["reward"] = f"of the reference answer of {example.id}: {parts}"
        if ORDERS[c.order][0] == "rl" and "tags" in parts and c.prompt != "authors":
            notes["reward"] += "; only --prompt authors asks for its tags"
    test = checkable(c, sets["test"], label_of)[: c.eval_examples]
    notes["test"] = f"{len(test)} {c.eval_split} examples of {c.eval_data or c.data}"
    inputs = Inputs(
        tokenizer=tokenizer,
        encoded=encoded_of,
        sft=sft_encoded,
        rl=rl_pairs,
        test=test,
        validation=checkable(c, sets["validation"], label_of)[: c.eval_examples or 100],
        reward=reward,
        notes=notes,
        made_from=made_from(c, folder, sets, labels),
    )
    return inputs, labels


def checkable(c, examples, label_of: dict) -> list:
    """The examples whose answers can be checked (all, if none can: the reward judges), labelled."""
    examples = [replace(e, label=label_of.get(e.id, e.label)) for e in examples]
    checked = [e for e in examples if e.kind != "text"] or examples
    random.Random(c.seed).shuffle(checked)
    return checked


def describe(c, model, linears, inputs):
    """What runs, in one block."""
    parameters = sum(p.numel() for p in model.parameters())
    elements = sum(c.r * (linear.in_features + linear.out_features) for linear in linears)
    plans = {
        "sft": step_batches(inputs.sft, c.sft_batch, c.sft_epochs, c.sft_steps, c.seed),
        "rl": step_batches(inputs.rl, c.rl_batch, c.rl_epochs, c.rl_steps, c.seed),
    }
    steps = [f"{stage} {len(plans[stage])}" for stage in ORDERS[c.order]]
    block = {
        "model": f"{c.model or 'toy base'}: {parameters:,} parameters, {model.head_weight.dtype}",
        "device": f"{c.device}, {torch.get_num_threads()} threads",
    }
    if c.method == "lora":
        where = f"{len(linears)} linears, r {c.r}, start {c.init}"
        block["LoRA"] = f"{elements:,} elements in {where}"
    block |= inputs.notes | {"steps": ", ".join(steps) or "none", "folder": c.out}
    for name, text in block.items():
        print(f"{name:9s} {text}")


def source(c, spec: str):
    """A data set's flag -> (name, path)."""
    return ("toy", str(c.out / "world")) if spec == "toy" else data.split_spec(spec)


def read_sets(c) -> dict:
    """{"S1", "S2", "test", "validation"}: the examples of both stages and of the evaluation. One
    file without splits is cut only where it both trains and tests. ValueError where answers
    could not be checked, or where the evaluation holds training examples."""
    specs = {"S1": c.data, "S2": c.rl_data or c.data, "test": c.eval_data or c.data}
    splits = {"S1": "train", "S2": "train", "test": c.eval_split}
    cut = specs["test"] if specs["test"] in (specs["S1"], specs["S2"]) else None
    for spec in dict.fromkeys(specs.values()):
        if data.in_one_file(*source(c, spec)):
            print(split_words(source(c, spec), spec == cut))
    if c.eval_every:
        specs["validation"], splits["validation"] = specs["test"], "validation"
    sets = {"validation": []}
    for name, spec in specs.items():
        place, split = source(c, spec), splits[name]
        if data.in_one_file(*place) and spec != cut:
            if split == "validation":
                raise ValueError(f"{spec} is evaluated whole: it has no validation split")
            split = "all"
        sets[name] = data.load_dataset(*place, split)
    if all(e.kind == "text" for e in sets["S2"]) and "rl" in ORDERS[c.order] and not c.reward:
        raise ValueError(
            f'{specs["S2"]}: no answer can be checked: rows need a "check", or give --rl-data or '
            "a --reward"
        )
    if all(e.kind == "text" for e in sets["test"]) and c.order != "none" and not c.reward:
        raise ValueError(
            f"{specs['test']}: no answer can be checked: name a --eval-data or --reward"
        )
    question_of = {}
    for e in itertools.chain(*sets.values()):
        if question_of.setdefault(e.id, e.question) != e.question:
            files = ", ".join(dict.fromkeys(specs.values()))
            raise ValueError(f"{files}: two questions have the id {e.id}: give one another")
    trained = {e.question.strip() for e in sets["S1"] + sets["S2"]}
    if any(e.question.strip() in trained for e in sets["test"] + sets["validation"]):
        raise ValueError(f"{specs['test']}: the evaluation holds training questions")
    return sets


def split_words(place, is_cut: bool) -> str:
    """How one file was cut, in one line."""
    everything, parts = data.load_dataset(*place, "all"), ["taken whole"]
    if is_cut:
        parts = []
        for split in data.ALL_SPLITS:
            _, begin, end = data.ONE_FILE[split]
            parts.append(f"{len(data.take_share(everything, begin, end))} {split}")
    unchecked = sum(e.kind == "text" for e in everything)
    if unchecked:
        parts.append(f"{unchecked} cannot be checked")
    return f"{place[1]}: {len(everything)} examples: {', '.join(parts)}"


def read_labels(c, sets, notes) -> list[dict]:
    """The label records of all examples: the teachers' votes in the toy, what --labels says, or the
    labels of one's own file."""
    if not c.model:
        teachers, shuffled = re.fullmatch(TOY_LABELS, c.labels or "teachers:5").groups()
        files = sorted((c.out / "world" / "answers").glob("*.jsonl"))[: int(teachers)]
        records, lines = data.count_votes(files)
        notes["votes"] = lines[-1].removeprefix("votes: ")
        return data.shuffle_labels(records, c.seed) if shuffled else records
    examples = {}  # by id: one data set may serve several purposes
    for part in sets.values():
        examples |= {e.id: e for e in part}
    if c.labels:
        return data.label_examples(list(examples.values()), c.labels)
    records = [{"id": e.id, "label": e.label} for e in examples.values() if e.label]
    if not records:
        raise ValueError(
            '--labels is missing: a file of votes, "steps:2" for GSM8K, or in rows of your own the '
            'field "label" (S1 or S2)'
        )
    return records


def digest(*parts) -> str:
    """A hash of bytes, or of anything's repr."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else repr(part).encode())
    return total.hexdigest()[:16]


def made_from(c, folder, sets, labels) -> dict:
    """Hashes of what a run is made from: if one changes, nothing that was computed fits."""
    parts = {"base": base_parts(folder), "data": [sets["S1"], sets["S2"]]}
    parts["evaluation data"] = [sets["test"], sets["validation"]]
    parts["labels"] = [(r["id"], r["label"]) for r in labels]
    if sets["test"][0].kind == "text":  # the reward evaluates too; else RL alone depends on it
        parts["reward"] = [reward_code(c)]
    return {name: digest(*part) for name, part in parts.items()}


def base_parts(folder: Path) -> list:
    """What tells one checkpoint from another: config and tokenizer, and of the weights (gigabytes)
    the sizes and both ends."""
    files = [file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".model")]
    parts = [file.read_bytes() for file in sorted(files)]
    for file in weight_files(folder):
        with open(file, "rb") as tensors:
            parts += [file.stat().st_size, tensors.read(1 << 20)]
            tensors.seek(-min(1 << 20, file.stat().st_size), 2)
            parts.append(tensors.read())
    return parts


def reward_code(c) -> bytes:
    """The file of --reward."""
    return Path(c.reward.rpartition(":")[0]).read_bytes() if c.reward else b""


def refuse_changes(path, old: dict, new: dict):
    for name, value in new.items():
        if not isinstance(old, dict) or old.get(name, value) != value:
            raise ValueError(
                f"{path} was made from another {name}: name another --out, or put it back"
            )


def rl_prompts(c, tokenizer, examples, notes) -> list:
    """[(example, its prompt's ids)] of what a reward can check and --max-prompt lets in."""
    checked = [e for e in examples if e.kind != "text" or c.reward]
    prompts = [(e, data.example_ids(e, tokenizer, c.prompt, "rl")[0]) for e in checked]
    short = [(e, prompt) for e, prompt in prompts if len(prompt) <= c.max_prompt]
    notes["rl"] = (
        f"{len(short)} of {len(examples)} prompts ({len(prompts) - len(short)} longer than "
        f"--max-prompt {c.max_prompt}, {len(examples) - len(checked)} cannot be checked)"
    )
    if not short:
        raise ValueError(f"rl: {notes['rl']}")
    return short


def reward_function(c):
    """reward(example, completion) -> its parts: the data set's, or --reward's. Raises ValueError,
    one line, on whatever one's own raises or gives that is no number."""
    if not c.reward:
        return partial(data.reward_parts, unconfined=c.allow_unconfined_code)
    file, _, name = c.reward.rpartition(":")
    if not file:
        raise ValueError(f"--reward {c.reward}: the form is FILE.py:FUNCTION")
    try:
        function = runpy.run_path(file)[name]
    except Exception as error:  # no such file or function, or the user's own code
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--reward {c.reward}: {why}") from None

    def reward(example, completion):
        try:
            value = function(example.question, example.answer, completion)
            parts = value if isinstance(value, dict) else {"reward": value}
            parts = {str(k): float(v) for k, v in parts.items()}
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f"line {frame.lineno}, " for frame in frames if frame.filename == file]
            why = f"{type(error).__name__}: {error} ({''.join(lines[-1:])}on {example.id})"
            raise ValueError(f"--reward {c.reward}: {why}") from None
        if not parts or not all(map(math.isfinite, parts.values())):
            raise ValueError(f"--reward {c.reward}: gave {value!r} (on {example.id})")
        return parts

    return reward


def load(c, folder) -> Transformer:
    dtype = auto_dtype(folder, c.device) if c.dtype == "auto" else getattr(torch, c.dtype)
    return load_model(folder, c.device, dtype)


def toy_base(c) -> Path:
    """The folder of the toy's base, made once a run folder, by the first of several processes."""
    folder = c.out / "base"
    if lorapar.rank_and_size()[0] == 0 and not (folder / "model.safetensors").exists():
        make_toy_base(c, folder)  # the weights are written last
    grpo.gather_over_ranks([])  # the others wait here
    return folder


def make_toy_base(c, folder: Path):
    """The toy's data and its tiny base, trained on the unreliable corpus: a Hugging Face folder."""
    steps, batch = TOY_BASE["steps"], TOY_BASE["batch"]
    config = c.out / "config.json"
    if not config.exists():  # else it says which base the run was made from
        write_json(config, flags_of(c))
    world = data.make_toy(c.out / "world", c.seed)
    data.save_toy_tokenizer(folder)
    torch.manual_seed(c.seed)
    shape = ModelConfig(
        len(data.TOY_TOKENS), 128, 256, 2, 4, 4, 32,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Transformer(shape).to(c.device)
    for p in model.parameters():
        if p.ndim == 2:  # 1 / sqrt(fan in): a std of 0.02 gets stuck in so small a model
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    corpus = world.corpus(steps * batch)
    encoded, _ = data.tokenize(corpus, data.Tokenizer(folder), TOY["max_length"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    print(f"toy base: training {steps} steps on the unreliable corpus")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.zero_grad()
        examples = encoded[step * batch : (step + 1) * batch]
        loss = backward(model, examples, batch, batch // 2, c.device)  # long ones, then short
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"base {step + 1}/{steps}  loss {loss:.3f}")
    save_model(model, folder, eos_token_id=0)


# ---------------------------------------------------------------------------------- the run folder


def flags_of(c) -> dict:
    return {name: getattr(c, name) for name in defaults() if name != "out"}


def open_folder(c):
    """Locks the run folder -> the lock, a file that must stay open. ValueError if another process
    works there, or it holds a user's files, or another run: a stage's own flags may change until it
    begins, those of size and speed always."""
    out, rank = c.out, lorapar.rank_and_size()[0]
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out) if rank == 0 else None
    config = out / "config.json"
    if not config.exists():
        ours = ("config.json.tmp", "base", "world", "log.txt")  # the last three: a sweep's
        names = [path.name for path in out.iterdir() if not path.name.startswith(".")]
        foreign = set(names) - set(ours)
        if foreign and rank == 0:
            raise ValueError(f"{out} holds {min(foreign)}, but no config.json: name another --out")
        return lock
    old, new = read_json(config), flags_of(c)
    if not new.keys() <= old.keys():
        raise ValueError(f"{config} is not of a run: name another --out")
    free = list(FLAGS[SIZE_AND_SPEED])
    for stage, group in (("sft", "SFT"), ("rl", "RL (GRPO)")):
        if not (out / stage / "state.safetensors").exists():
            free += FLAGS[group]
    for name in new:
        if name not in free and new[name] != old.get(name):
            changed = f"{option(name)} {old.get(name)}, not {new[name]}"
            raise ValueError(f"{out} holds a run with {changed}: name another --out")
    if lock:
        for leftover in out.rglob("*.tmp"):  # of a save that was killed
            if Path(leftover.stem).suffix in (".json", ".jsonl", ".md", ".safetensors"):
                leftover.unlink()
    return lock


def lock_folder(out: Path):
    try:
        import fcntl
    except ImportError:  # Windows has none
        return None
    lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with its process
    except OSError:
        raise ValueError(f"{out}: another process is at work there") from None
    return lock


def write_json(path, value):
    lorapar.write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_lines(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    lorapar.write_file(path, "".join(lines).encode())


def write_tensors(path, tensors: dict):
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    lorapar.write_file(path, safetensors_bytes(tensors, {"format": "pt"}))


def read_tensors(path, needed) -> dict[str, torch.Tensor]:
    try:
        tensors = tensors_from_bytes(Path(path).read_bytes())  # a mapped file could not be replaced
        if not set(needed) <= tensors.keys():
            raise OSError(f"it does not hold {', '.join(needed)}")
    except (SafetensorError, OSError) as error:
        why = str(error)[:100]
        raise ValueError(f"{path}: not readable ({why}); delete it to redo this part") from None
    return tensors


def bar(items, what):
    """A progress bar; in a log file a line every half minute."""
    seconds, silent = 0.2 if sys.stderr.isatty() else 30, lorapar.rank_and_size()[0] > 0
    return tqdm(items, desc=what, leave=False, mininterval=seconds, disable=silent)


def jaccard(part: lorapar.Partition) -> float:
    return int(part.shared.sum()) / sum(int(region.sum()) for region in part)


def partition_facts(model, part: lorapar.Partition, masks: dict) -> dict:
    """What partition.json says: regions, active elements, each projection's share of them."""
    N, begin, projections = len(part.shared), 0, {}
    for name, factor in lorapar.lora_factors(model).items():  # in flat order
        piece = slice(begin, begin + factor.numel())
        begin = piece.stop
        counts = projections.setdefault(name.split(".")[-2], Counter())
        counts["elements"] += factor.numel()
        for region_name, region in part._asdict().items():
            counts[region_name] += int(region[piece].sum())
    return {
        "elements": N,
        "regions": {name: int(region.sum()) for name, region in part._asdict().items()},
        "jaccard": jaccard(part),
        "active": {stage: int(mask.sum()) for stage, mask in masks.items()},
        "active_percent": {stage: 100 * int(mask.sum()) / N for stage, mask in masks.items()},
        "per_projection": projections,
    }


def table(head: list, rows) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def write_report(c, rows, facts, inputs, s1, s2) -> dict:
    """report.json, and report.md: the tables a person reads, also printed."""
    lines = [f"# LoRA-PAR: {c.data}, seed {c.seed}", ""]
    metric, scale, digits = "accuracy, %", 100, 1
    if inputs.test[0].kind == "text":
        metric, scale, digits = "reward", 1, 3
    if rows:
        head = [f"{system} ({means['examples']})" for system, means in rows["base"].items()]
        cells = []
        for stage, row in rows.items():
            cell = [stage]
            for means in row.values():  # S1, S2, all
                mean, error = scale * means["accuracy"], scale * means["error"]
                cell.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
            cells.append([*cell, f"{row['all']['loss']:.3f}"])
        lines += table([metric, *head, "loss"], cells)
        lines += ["", "Greedy answers, ± one standard error over questions (not seeds). loss:"]
        lines += ["mean over examples of the cross-entropy per token of the reference answer.", ""]
        cuts = {stage: row["all"]["truncated"] for stage, row in rows.items()}
        if any(cuts.values()):
            words = [f"{stage} {share:.1%}" for stage, share in cuts.items()]
            lines += [f"Cut at --max-response {c.max_response}: {', '.join(words)}.", ""]
    if s1 is not None and (s1 != s1[0]).any():  # not a baseline, nor theta 1
        thetas = []
        for theta in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9):
            part = lorapar.partition(s1, s2, theta)
            share1 = 100 * float((part.s1_only | part.shared).double().mean())
            share2 = 100 * float((part.s2_only | part.shared).double().mean())
            thetas.append([theta, f"{share1:.2f}", f"{share2:.2f}", f"{jaccard(part):.3f}"])
        lines += [*table(["theta", "% S1 region", "% S2 region", "Jaccard"], thetas), ""]
    regions = [f"{name} {size}" for name, size in facts["regions"].items()]
    lines.append(f"- elements: {', '.join([str(facts['elements']), *regions])}")
    lines += [f"- {name}: {text}" for name, text in inputs.notes.items()]
    if rows and c.method == "lora" and c.init in lorapar.ANCHORED:
        lines.append(f"- adapters: rank {2 * c.r}, twice --r: the difference from the base")
    text = "\n".join([*lines, ""])
    print("\n" + text)
    report = {"evaluation": rows, "partition": facts, "data": inputs.notes, "metric": metric}
    write_json(c.out / "report.json", report)
    lorapar.write_file(c.out / "report.md", text.encode())
    return report


# --------------------------------------------------------------------------------- other commands


def virtual_ids(model) -> list[int]:
    """The ids of a baseline's virtual tokens, after those of the vocabulary."""
    first = model.config.vocab_size
    return list(range(first, first + model.baseline["virtual_tokens"]))


def run_baseline(c, model, inputs, rows) -> dict:
    """A baseline of the paper's table 6: the SFT stage alone, on all that its method trains."""
    n = 0 if c.method == "ia3" else c.virtual_tokens
    lorapar.add_baseline(model, c.method, n, torch.Generator().manual_seed(c.seed))
    model.model.checkpointing = c.checkpointing
    virtual = inputs.tokenizer.virtual = virtual_ids(model)  # not counted in --max-length
    inputs.sft = [data.Encoded(virtual + e.ids, e.prompt_length + n) for e in inputs.sft]
    sft(c, model, inputs)
    rows["sft"] = evaluate(c, "sft", model, inputs)
    facts = {"elements": len(lorapar.get_flat(model)), "regions": {}, "jaccard": None}
    return write_report(c, rows, facts | {"active_percent": {"sft": 100.0}}, inputs, None, None)


def run_eval(arguments):
    """The accuracy of a run, with its prompts, or of any checkpoint (--model, --adapter)."""
    parser = Parser("train.py eval", description=run_eval.__doc__)
    run_help = "a run folder: its model, last adapter and settings"
    parser.add_argument("run", nargs="?", type=Path, help=run_help)
    parser.add_argument("--adapter", type=Path, help="a folder in PEFT's format")
    names = "model data prompt seed device dtype max_response eval_examples eval_split "
    add_flags(parser, (names + "batch_rows micro_batch allow_unconfined_code").split())
    said = vars(parser.parse_args(arguments))
    folder, adapter = said.pop("run"), said.pop("adapter")
    old = read_json(folder / "config.json") if folder else {}
    old = {name: old[name] for name in old if name not in FLAGS[SIZE_AND_SPEED]}
    c = argparse.Namespace(**defaults() | old | said | {"out": folder or Path()})
    if not folder and not (c.model and "data" in said):
        raise ValueError("eval needs a run folder (the toy's too), or --model and --data")
    if folder and not adapter:
        adapter = last_adapter(c)
    checkpoint = find_model(c.model) if c.model else folder / "base"
    if folder and "data" not in said:  # what the run itself evaluates
        labels = data.read_records(folder / "labels.jsonl")
        label_of = {record["id"]: record["label"] for _, record in labels}
        sets = read_sets(c)
        hashes = {"data": digest(sets["S1"], sets["S2"])}
        if "model" not in said:
            hashes["base"] = digest(*base_parts(checkpoint))
        refuse_changes(folder / "config.json", old.get("made_from", {}), hashes)
        examples = checkable(c, sets["test"], label_of)
        c.data = c.eval_data or c.data
    else:
        place, split = source(c, c.data), c.eval_split
        if data.in_one_file(*place):
            specs = [old[name] for name in ("data", "rl_data") if old.get(name)]
            trained = {Path(source(c, spec)[1]).resolve() for spec in specs}
            file = Path(place[1]).resolve()
            if file in trained or file.parent in trained:
                raise ValueError(f"{folder} trained on {c.data}: leave --data out")
            print(split_words(place, is_cut=False))
            split = "all"
        examples = checkable(c, data.load_dataset(*place, split), {})
    if all(e.kind == "text" for e in examples) and not c.reward:
        raise ValueError(f"answers of {c.data} cannot be checked")
    name = f"eval-{Path(source(c, c.data)[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    out = folder / "answers" / name if folder else Path(name)
    tokenizer, model = data.Tokenizer(checkpoint), load(c, checkpoint)
    if adapter and (adapter / "baseline.json").exists():
        lorapar.load_baseline(model, adapter)
        tokenizer.virtual = virtual_ids(model)
    elif adapter:
        lorapar.load_adapter(model, adapter)
    inputs = argparse.Namespace(tokenizer=tokenizer, reward=reward_function(c))
    data.write_jsonl(out, [])  # a folder that cannot be written fails now
    records = answer_all(c, model, inputs, examples[: c.eval_examples], c.data)
    print(json.dumps(averages(records), indent=2))
    data.write_jsonl(out, records)
    print(f"every answer of {adapter or c.model} is in {out}")


def last_adapter(c) -> Path:
    """The folder of a run's last stage that has one."""
    for stage in reversed(ORDERS[c.order]):
        for name in ("adapter_config.json", "baseline.json"):
            if (c.out / stage / name).exists():
                return c.out / stage
    raise ValueError(f"{c.out}: no adapter there yet")


def run_compare(arguments):
    """Two finished runs: their last rows, the paired difference of their answers with its standard
    error, percent active, and the hours of training."""
    parser = Parser("train.py compare", description=run_compare.__doc__)
    parser.add_argument("runs", nargs=2, type=Path, help="a run folder")
    folder1, folder2 = parser.parse_args(arguments).runs
    report1, answers1, hours1 = read_finished(folder1)
    report2, answers2, hours2 = read_finished(folder2)
    metric = report1.get("metric")
    asked1 = {name: (record["question"], record["gold"]) for name, record in answers1.items()}
    asked2 = {name: (record["question"], record["gold"]) for name, record in answers2.items()}
    if asked1 != asked2 or metric != report2.get("metric"):
        raise ValueError(f"{folder1} and {folder2} were not evaluated on the same questions")
    scale, digits = (1, 3) if metric == "reward" else (100, 1)
    lines = []
    for system in ("S1", "S2", "all"):
        names = [name for name, r in answers1.items() if system in ("all", r["label"])]
        if names:
            first = [scale * answers1[name]["correct"] for name in names]
            second = [scale * answers2[name]["correct"] for name in names]
            mean1 = f"{statistics.fmean(first):.{digits}f}"
            mean2 = f"{statistics.fmean(second):.{digits}f}"
            gaps = [b - a for a, b in zip(first, second)]
            gap = mean_and_error(gaps, digits)
            lines.append([f"{system} ({len(names)})", mean1, mean2, gap])
    for stage in ("sft", "rl"):
        active1 = report1["partition"]["active_percent"].get(stage, 0)
        active2 = report2["partition"]["active_percent"].get(stage, 0)
        lines.append([f"% active in {stage}", f"{active1:.1f}", f"{active2:.1f}", ""])
    lines.append(["hours of training", f"{hours1:.2f}", f"{hours2:.2f}", ""])
    print("\n".join(table([metric, folder1, folder2, "difference"], lines)))


def read_finished(folder: Path):
    """-> a run's report, the answers of its last evaluation by their ids, hours of training."""
    report = read_json(folder / "report.json")
    if not report.get("evaluation"):
        raise ValueError(f"{folder}: nothing was evaluated there")
    last = list(report["evaluation"])[-1]
    records = data.read_records(folder / "answers" / f"{last}.jsonl")
    answers = {record["id"]: record for _, record in records}
    seconds = sum(r.get("seconds", 0) for _, r in data.read_records(folder / "metrics.jsonl"))
    return report, answers, seconds / 3600


def run_merge(arguments):
    """Folds an adapter into its checkpoint: a whole Hugging Face folder, weights in their dtype.
    Rounding to bfloat16 may lose much of a small update: the adapter itself is more exact."""
    parser = Parser("train.py merge", description=run_merge.__doc__)
    parser.add_argument("--model", required=True, help="the base: a model folder or Hub id")
    parser.add_argument("--adapter", required=True, type=Path, help="a folder in PEFT's format")
    parser.add_argument("--out", required=True, type=Path, help="a folder to write: new, or empty")
    args = parser.parse_args(arguments)
    folder, out = find_model(args.model), args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty; name a new folder")
    model = load_model(folder, dtype=None)  # each tensor as it is stored
    unfinished = out.with_name(out.name + ".merging.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(lorapar.merge(lorapar.load_adapter(model, args.adapter)), unfinished)
    for file in folder.iterdir():
        described = file.suffix in (".json", ".model", ".jinja", ".txt", "")  # "": LICENSE
        if file.is_file() and described and not file.name.endswith(".index.json"):
            shutil.copy(file, unfinished / file.name)
    tied = {"tie_word_embeddings": model.config.tie_word_embeddings}  # a file may say it wrongly
    write_json(unfinished / "config.json", read_json(folder / "config.json") | tied)
    if out.exists():
        out.rmdir()
    os.replace(unfinished, out)
    made_for = read_json(args.adapter / "adapter_config.json").get("base_model_name_or_path")
    print(f"merged: {out} (the adapter was made for {made_for!r})")


def run_figure(arguments):
    """Draws importance.png and training.png of a run folder."""
    parser = Parser("train.py figure", description=run_figure.__doc__)
    parser.add_argument("run", type=Path, help="the run folder")
    out = parser.parse_args(arguments).run
    if not (out / "metrics.jsonl").exists() and not (out / "partition.json").exists():
        raise ValueError(f"{out}: no run there")
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
    if (out / "partition.safetensors").exists():
        draw_importance(out, figure)
    metrics = out / "metrics.jsonl"
    lines = [record for _, record in data.read_records(metrics)] if metrics.exists() else []
    shown = [("sft", "loss"), ("rl", "reward"), ("rl", "kl"), ("rl", "length")]
    validated = {r["stage"] for r in lines if "accuracy" in r}
    shown += [(stage, "accuracy") for stage in ("sft", "rl") if stage in validated]
    figure = new_figure(3.5 * len(shown), 3)
    for axes, (stage, name) in zip(figure.subplots(1, len(shown)), shown):
        points = [r for r in lines if r["stage"] == stage and name in r]
        axes.plot([r["step"] + 1 for r in points], [r[name] for r in points], marker=".")
        axes.set(title=f"{stage}: {name}", xlabel="step")
        axes.locator_params(axis="x", nbins=5, integer=True)
    figure.savefig(out / "training.png", dpi=120, bbox_inches="tight")
    print(f"figures: in {out}")


def draw_importance(out: Path, figure):
    scores = read_tensors(out / "importance.safetensors", ("s1", "s2"))
    fields = lorapar.Partition._fields
    part = lorapar.Partition(**read_tensors(out / "partition.safetensors", fields))
    axes = figure.subplots()
    some = torch.randperm(len(part.shared), generator=torch.Generator().manual_seed(0))[:20_000]
    for name, colour, region in (
        ("neither: frozen", "0.8", ~(part.s1_only | part.s2_only | part.shared)),
        ("S1-only", "red", part.s1_only),
        ("S2-only", "blue", part.s2_only),
        ("shared", "purple", part.shared),
    ):
        dots = some[region[some]]
        label = f"{name} {region.double().mean():.1%}"
        axes.scatter(
            scores["s1"][dots], scores["s2"][dots], 2, colour, label=label, rasterized=True
        )
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="importance for System 1", ylabel="importance for System 2")
    axes.legend(title=f"Jaccard index {jaccard(part):.3f}", markerscale=4)
    figure.savefig(out / "importance.png", dpi=120, bbox_inches="tight")


# ------------------------------------------------------------------------------------------ sweeps

SWEEPS = {
    "splits": "table 1: who splits the data",
    "shared": "table 2: alpha and beta, the share of the shared elements that each stage trains",
    "theta": "table 3, figure 5: how many elements, against random ones, for three target sets",
    "methods": "table 4: LoRA, OLoRA, PiSSA, with and without RL, against LoRA-PAR",
    "peft": "table 6: Prompt Tuning, P-Tuning, Prefix-Tuning, IA3, beside LoRA and LoRA-PAR",
    "order": "SFT then RL, or the reverse",
    "swapped": "each stage with the other system's elements",
    "resample": "how much of two regions' difference is sampling",
}
RATES = (1 / 3, 1, 3)  # times the run's own; ten times that for a baseline's few parameters
RATES_SEED = 1000  # the rates are chosen on it


def sweep_rows(name: str) -> dict:
    """The rows of a table: {row: (its flags, the row it is compared with)}."""
    full = "--theta 1 --stage-data all"  # every element, every example
    par, rows = "LoRA-PAR 0.9", {}
    if name == "splits":
        rows["vote of 5"] = "--labels teachers:5", "vote of 5"
        rows["vote of 3"] = "--labels teachers:3", "vote of 5"
        rows["one teacher"] = "--labels teachers:1", "vote of 5"
        rows["random split"] = "--labels teachers:5:shuffled", "vote of 5"
    if name == "order":
        rows["SFT then RL"] = "--order sft-rl", "SFT then RL"
        rows["RL then SFT"] = "--order rl-sft", "SFT then RL"
    if name == "swapped":
        rows["own masks"] = "--select importance", "own masks"
        rows["swapped masks"] = "--select swapped", "own masks"
    if name == "shared":
        for alpha, beta in itertools.product((0.0, 0.5, 1.0), repeat=2):
            flags = f"--alpha {alpha} --beta {beta}"
            rows[f"alpha {alpha} beta {beta}"] = flags, "alpha 1.0 beta 1.0"
    if name == "theta":
        thetas = 0.3, 0.5, 0.7, 0.9, 1.0
        for targets, theta in itertools.product(("qkvgud", "qkv", "gud"), thetas):
            flags, row = f"--targets {targets} --theta {theta}", f"{targets} {theta} importance"
            rows[row] = f"{flags} --select importance", f"{targets} 1.0 importance"
            if targets == "qkvgud" and theta < 1:
                for select in ("random", "random-in-tensor"):
                    rows[f"{targets} {theta} {select}"] = f"{flags} --select {select}", row
    if name == "methods":
        rows["LoRA"] = f"{full} --init lora --order sft", par
        rows["OLoRA"] = f"{full} --init olora --order sft", par
        rows["PiSSA"] = f"{full} --init pissa --order sft", par
        rows["LoRA + RL"] = f"{full} --init lora", par
        rows["PiSSA + RL"] = f"{full} --init pissa", par
        for theta in (0.9, 0.95):
            rows[f"LoRA-PAR {theta}"] = f"--theta {theta}", par
            rows[f"LoRA-PAR {theta} from PiSSA"] = f"--theta {theta} --init pissa", par
    if name == "peft":
        for method in METHODS:
            rows[method] = f"{full} --init lora --order sft --method {method}", par
        rows[par] = "--theta 0.9", par
    return rows


def run_sweep(arguments):
    """Repeats a table or figure of the paper: each cell an ordinary run in a folder of its own
    under --out (default runs/sweep), with any flag of a run. Writes NAME.md, NAME.csv and, where
    the paper has a figure and matplotlib is installed, NAME.png. Finished cells are reused."""
    about = "; ".join(f"{name}: {words}" for name, words in SWEEPS.items())
    parser = Parser("train.py sweep", description=run_sweep.__doc__, epilog=about)
    parser.add_argument("name", choices=tuple(SWEEPS))
    parser.add_argument("--seeds", type=COUNT, default=5, help="0 .. N-1 are compared")
    args, said = parser.parse_known_args(arguments)
    steps = ["--rl-steps", "100"]  # where the toy's differences showed best on seeds 20 to 24
    if any(word.partition("=")[0] == "--model" for word in said):
        steps = []
    said = ["--out", "runs/sweep", *steps, *said]
    base = read_config(said)
    if args.name == "resample":
        return resample(base, args.seeds)
    if args.name == "splits" and base.model:
        raise ValueError("sweep splits is for the toy: only there are several teachers at hand")
    rows = sweep_rows(args.name)
    own_flags = {"--order", "--seed"}  # no table works with another order, and each sets its seeds
    for flags, _ in rows.values():
        own_flags |= set(flags.split())
    for word in said:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag in own_flags:
            raise ValueError(f"sweep {args.name} sets {flag} itself")
    configs = {row: read_config([*said, *flags.split()]) for row, (flags, _) in rows.items()}
    tried = sum(len(RATES) * len(ORDERS[c.order]) for c in configs.values())
    cells, began, done = tried + args.seeds * len(rows), time.time(), 0

    def cell(row, **changes):
        nonlocal done
        try:
            return run_cell(base, argparse.Namespace(**vars(configs[row]) | changes))
        finally:  # a trial may diverge
            done += 1
            left = int((time.time() - began) / done * (cells - done))
            print(f"cell {done} of {cells}, left {left // 60}:{left % 60:02d}")

    records, rates = [], {}
    for row, c in configs.items():
        best = best_rates(c, partial(cell, row))
        rates[row] = " / ".join(f"{rate:.2g}" for rate in best.values())
        for seed in range(args.seeds):
            records.append({"row": row, "seed": seed} | best | cell(row, seed=seed, **best))
        print(f"{row}: {spread([r['all at the end'] for r in records[-args.seeds :]])}")
    write_sweep(base, args.name, records, sweep_table(args, base, rows, records, rates))
    if args.name == "theta":  # figure 5
        curves = {}
        for row in rows:
            targets, theta, select = row.split()
            ends = [r["all at the end"] for r in records if r["row"] == row]
            curves.setdefault(f"{targets} {select}", {})[float(theta)] = ends
        draw_curves(base, "theta", curves, "theta", "accuracy at the end, %")


def run_cell(base, c) -> dict:
    """One ordinary run in a folder named after what it changes, a finished one only read -> its
    numbers, accuracies in percent."""
    changed = {k: v for k, v in flags_of(c).items() if k == "seed" or v != getattr(base, k)}
    folder = base.out / "cells" / ",".join(f"{k}={v}" for k, v in sorted(changed.items()))
    folder.mkdir(parents=True, exist_ok=True)
    c.out = folder
    done = (folder / "report.md").exists()
    if done and flags_of(c).items() <= read_json(folder / "config.json").items():
        report = read_json(folder / "report.json")
    else:
        log = open(folder / "log.txt", "a", encoding="utf-8")
        with log, redirect_stdout(log), redirect_stderr(log):
            share_toy(base, c)
            report = run(c)
    numbers = {name: report["partition"][name] for name in ("elements", "jaccard")}
    numbers |= {f"% active in {k}": v for k, v in report["partition"]["active_percent"].items()}
    rows = {f"after {stage}": row for stage, row in report["evaluation"].items()}
    rows["at the end"] = list(rows.values())[-1]
    for when, row in rows.items():
        for system, means in row.items():
            numbers[f"{system} {when}"] = 100 * means["accuracy"]
            numbers[f"{system} p(answer) {when}"] = means["probability"]
            numbers[f"{system} loss {when}"] = means["loss"]
    return numbers


def share_toy(base, c):
    """Links the toy's base and data, made once a seed, into a run folder."""
    if not c.model:
        toy = base.out / f"toy-{c.seed}"
        toy.mkdir(parents=True, exist_ok=True)
        toy_base(argparse.Namespace(**vars(base) | {"seed": c.seed, "out": toy}))
        for part in ("base", "world"):
            if not (c.out / part).exists():
                (c.out / part).symlink_to((toy / part).resolve())


def best_rates(c, cell) -> dict:
    """A row's learning rates. One stage after the other takes the best of three, by the accuracy
    of whole runs at the end (then by the loss), on the validation split of a seed that is never
    compared."""
    best = {}
    for stage in ORDERS[c.order]:
        name, ends = f"{stage}_lr", {}
        for factor in RATES:
            rate = getattr(c, name) * factor * (1 if c.method == "lora" else 10)
            rate = float(f"{rate:.3g}")
            trial = best | {name: rate, "seed": RATES_SEED, "eval_split": "validation"}
            try:
                numbers = cell(**trial)
                ends[rate] = numbers["all at the end"], -numbers["all loss at the end"]
            except Diverged:
                ends[rate] = -1.0, -math.inf
        best[name] = max(ends, key=ends.get)
    return best


def sweep_table(args, base, rows, records, rates) -> list[str]:
    columns = ["elements", "% active in sft", "% active in rl", "S1 at the end", "S2 at the end"]
    columns += ["all after sft", "all at the end"]
    lines = []
    for row, (_, reference) in rows.items():
        own = {r["seed"]: r for r in records if r["row"] == row}
        other = {r["seed"]: r for r in records if r["row"] == reference}
        gaps = []
        if row != reference:
            gaps = [own[s]["all at the end"] - other[s]["all at the end"] for s in other]
        spreads = [spread([r[column] for r in own.values() if column in r]) for column in columns]
        lines.append([row, rates[row], *spreads, reference, mean_and_error(gaps)])
    head = ["", "rates", *columns, "compared with", "difference"]
    return [
        f"## {args.name}: {args.seeds} seeds, the {base.eval_split} split of {base.data}",
        "",
        *table(head, lines),
        "",
        "Accuracy in %, mean ± standard deviation. Rates of the stages in their order, each the "
        f"best of {len(RATES)} on the validation split of seed {RATES_SEED}. "
        "Difference at the end, paired by seed, ± its standard error.",
    ]


def spread(values: list, digits=1) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}" if values else ""


def mean_and_error(gaps: list, digits=1) -> str:
    """Mean ± its standard error; the mean alone of one value."""
    error = ""
    if len(gaps) > 1:
        error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.{digits}f}"
    return f"{statistics.mean(gaps):+.{digits}f}{error}" if gaps else ""


def write_sweep(base, name: str, records: list[dict], lines: list[str]):
    """NAME.csv, all facts of all cells, and NAME.md, which is also printed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for r in records for k in r)))
    writer.writeheader()
    writer.writerows(records)
    lorapar.write_file(base.out / f"{name}.csv", text.getvalue().encode())
    lorapar.write_file(base.out / f"{name}.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(["", *lines, "", f"written: {base.out}/{name}.md and .csv"]))


def resample(base, seeds: int):
    """How much of what looks like two regions is sampling: the Jaccard index of the regions of the
    two systems, of one system scored on other examples, and of two halves with shuffled labels."""
    records = []
    for seed in range(seeds):
        c = argparse.Namespace(**vars(base) | {"seed": seed, "order": "none"})
        c.out = base.out / f"resample-{seed}"
        lock = open_folder(c)  # noqa: F841
        share_toy(base, c)
        model, inputs = prepare(c)
        add_adapters(c, model)
        S1, S2 = inputs.encoded["S1"], inputs.encoded["S2"]
        if min(len(S1), len(S2)) < 50:
            raise ValueError("sweep resample needs 50 training examples of each system")
        for n in [n for n in (25, 50, 100, 200) if 2 * n <= min(len(S1), len(S2))]:
            half = n // 2
            draws = S1[:n], S1[n : 2 * n], S2[:n], S2[n : 2 * n]  # two disjoint draws a system
            draws += S1[:half] + S2[:half], S1[half:n] + S2[half:n]
            scores = []
            for encoded in bar(draws, f"resample {n}"):
                batches = data.batches(encoded, c.micro_batch, c.device)
                scores.append(lorapar.importance(model, batches))
            first_s1, second_s1, first_s2, second_s2, first_mixed, second_mixed = scores
            between = []
            for s1, s2 in itertools.product((first_s1, second_s1), (first_s2, second_s2)):
                between.append(jaccard(lorapar.partition(s1, s2, c.theta)))
            record = {
                "seed": seed,
                "examples": n,
                "S1 / S2": statistics.mean(between),
                "S1 / S1": jaccard(lorapar.partition(first_s1, second_s1, c.theta)),
                "S2 / S2": jaccard(lorapar.partition(first_s2, second_s2, c.theta)),
                "shuffled": jaccard(lorapar.partition(first_mixed, second_mixed, c.theta)),
            }
            records.append(record)
    kinds, rows, curves = ("S1 / S2", "S1 / S1", "S2 / S2", "shuffled"), [], {}
    for n in dict.fromkeys(r["examples"] for r in records):
        of_row = [r for r in records if r["examples"] == n]
        gaps = [(r["S1 / S1"] + r["S2 / S2"]) / 2 - r["S1 / S2"] for r in of_row]
        spreads = [spread([r[kind] for r in of_row], 3) for kind in kinds]
        rows.append([n, *spreads, mean_and_error(gaps, 3)])
        for kind in kinds:
            curves.setdefault(kind, {})[n] = [r[kind] for r in of_row]
    lines = [
        f"## resample: Jaccard indices at theta {base.theta}, {seeds} seeds",
        "",
        *table(["examples a draw", *kinds, "beyond sampling"], rows),
        "",
        "S1 / S2: the mean of four pairs of draws. S1 / S1, S2 / S2: disjoint draws of one system. "
        "Shuffled: two disjoint draws, each half S1 and half S2. Beyond sampling: the mean of the "
        "second and third less the first, ± its standard error.",
    ]
    write_sweep(base, "resample", records, lines)
    y = f"Jaccard index at theta {base.theta}"
    draw_curves(base, "resample", curves, "examples a draw", y)


def draw_curves(base, name: str, curves: dict, x: str, y: str):
    """{curve: {x: values}} -> NAME.png, means and standard deviations, if matplotlib is there."""
    figure = new_figure(6, 4)
    if figure is None:
        return
    axes = figure.subplots()
    width = 0.01 * max(p for points in curves.values() for p in points)
    for i, (curve, points) in enumerate(curves.items()):
        means = [statistics.mean(values) for values in points.values()]
        errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()]
        beside = [p + (i - len(curves) / 2) * width / 2 for p in points]  # no bar hides another
        axes.errorbar(beside, means, errors, label=curve, marker="o", capsize=3)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(base.out / f"{name}.png", dpi=120, bbox_inches="tight")


COMMANDS = {"eval": run_eval, "compare": run_compare, "merge": run_merge}
COMMANDS |= {"figure": run_figure, "sweep": run_sweep}


def main(arguments=None):
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    handlers = {name: signal.signal(name, ask_to_stop) for name in (signal.SIGINT, signal.SIGTERM)}
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # torchrun says so
    try:
        if arguments and arguments[0] in COMMANDS:
            if several:
                raise ValueError(f"{arguments[0]} runs in one process, without torchrun")
            COMMANDS[arguments[0]](arguments[1:])
            return
        c = read_config(arguments)
        if several:
            join_processes(c)
        run(c)
        if lorapar.rank_and_size()[0] == 0:
            draw_figures(c.out)
            print(f"everything is in {c.out}")
        if several:
            torch.distributed.destroy_process_group()
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        cure = "lower --micro-batch, --batch-rows or --max-length, or take --checkpointing"
        sys.exit(f"train.py: {reason}: {cure}")
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; repeat the command to go on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, data.SandboxError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        sys.exit(f"train.py: a process of the group ended ({str(error)[:100]})")
    finally:
        STAGE.update(running=False, stop=False)
        for name, handler in handlers.items():
            signal.signal(name, handler)


def join_processes(c):
    """One of torchrun's processes: a GPU of its own where there are GPUs; the first one speaks."""
    backend = "gloo"
    if c.device.startswith("cuda"):
        backend = "nccl"
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(f"more processes than the {gpus} GPUs here: lower --nproc_per_node")
        c.device = f"cuda:{number}"
        torch.cuda.set_device(c.device)
    # a slow reward may hold the others up for longer than nccl's ten minutes
    torch.distributed.init_process_group(backend, timeout=timedelta(hours=4))
    if lorapar.rank_and_size()[0]:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")


if __name__ == "__main__":
    main()
