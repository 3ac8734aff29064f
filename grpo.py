"""GRPO (Shao et al. 2024, DeepSeekMath) for stage 2: rollouts, advantages, the loss, the loop.

A step samples G answers to each of P prompts, scores them, and compares each answer with its own
group: advantage = (r - mean) / std. The update raises the log-probs of answers that beat their
group, clipped (PPO) and held near the SFT checkpoint by a KL penalty. Rewards come in as a
function, so this file knows nothing of data sets.

Left out: reward models, a value network, importance-sampling corrections for stale rollouts: the
policy that samples is the policy that learns, and dropout is off in both, so the ratio starts at 1.
"""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lorapar import get_flat, set_flat
from model import generate, token_logprobs


@dataclass
class Settings:
    """How a step samples and updates; the names are those of the GRPO paper."""

    group: int = 8  # G, answers a prompt
    max_new_tokens: int = 256
    eos_ids: tuple = ()
    temperature: float = 0.9  # of sampling and of every log-prob
    clip: float = 0.2  # PPO's ratio clip
    beta: float = 0.04  # weight of the KL penalty; 0 computes no reference
    updates: int = 1  # optimizer steps a batch of rollouts (mu)
    micro_batch: int = 8  # rows a forward and backward


@dataclass
class Rollouts:
    """The answers of one step as right-padded rows: row p * G + g is answer g of prompt p."""

    tokens: torch.Tensor  # (B, T) int64, prompt then answer (the sampled EOS included)
    labels: torch.Tensor  # (B, T) int64, tokens at answer positions, -100 elsewhere
    logp: torch.Tensor  # (B, T-1) float32, what sampling said; 0 where labels are -100
    completions: list[list[list[int]]]  # [P][G][new tokens]


def rollouts(model, prompts, s: Settings, generator=None) -> Rollouts:
    """Samples s.group answers to each prompt (a list of ids) from softmax(logits / temperature)."""
    completions, logps = generate(
        model,
        prompts,
        s.max_new_tokens,
        temperature=s.temperature,
        eos_ids=s.eos_ids,
        samples_per_prompt=s.group,
        generator=generator,
        return_logprobs=True,
    )
    answers = [answer for group in completions for answer in group]
    answer_logps = [logp for group in logps for logp in group]
    asked = [prompt for prompt in prompts for _ in range(s.group)]
    T = max(len(prompt) + len(answer) for prompt, answer in zip(asked, answers))
    tokens = torch.zeros(len(answers), T, dtype=torch.long)
    labels = torch.full((len(answers), T), -100)
    sampled = torch.zeros(len(answers), T - 1)
    for i, (prompt, answer, logp) in enumerate(zip(asked, answers, answer_logps)):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        labels[i, start:end] = torch.tensor(answer)  # by position, so a pad id equal to EOS is fine
        sampled[i, start - 1 : end - 1] = torch.tensor(logp)
    device = next(model.parameters()).device
    return Rollouts(tokens.to(device), labels.to(device), sampled.to(device), completions)


def group_advantages(rewards):
    """rewards (P, G) -> (r - mean) / (sample std + 1e-4) within each group, (P, G) float32.

    Exactly 0 where a group's rewards are all equal (rounding alone would give about 6e-4, a
    gradient out of nothing). ValueError for G = 1: nothing to compare with.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, G) with G >= 2, got {tuple(rewards.shape)}")
    rewards = rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (rewards.std(1, keepdim=True) + 1e-4))


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, clip=0.2, beta=0.04):
    """The GRPO objective, negated, and its statistics (DeepSeekMath eq. 3 and 4).

    logp (new policy, with gradient), old_logp, ref_logp, mask (B, T), advantages (B,). Mean over
    each answer's tokens, then over the B answers; a row without tokens counts as 0. The KL
    estimator is k3, exp(ref - new) - (ref - new) - 1 >= 0. beta = 0 takes ref_logp None.
    """
    mask = mask.float()
    ratio = ((logp - old_logp) * mask).exp()
    A = advantages[:, None]  # (B, 1)
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    kl = torch.zeros_like(logp)
    if beta:
        log_ratio = (ref_logp - logp) * mask
        kl = log_ratio.exp() - log_ratio - 1
    length = mask.sum(1).clamp(min=1)

    def per_answer(x):
        return ((x * mask).sum(1) / length).mean()

    loss = -per_answer(objective - beta * kl)
    with torch.no_grad():
        clipped = per_answer(((ratio - 1).abs() > clip).float())
        stats = {"kl": per_answer(kl), "ratio": per_answer(ratio), "clipped": clipped}
    return loss, stats


def grpo_update(model, optimizer, rows: Rollouts, advantages, reference, s: Settings) -> dict:
    """`s.updates` optimizer steps on one batch of rollouts -> statistics, averaged over them.

    advantages (P, G); reference: the flat vector (N,) of the policy that the KL holds on to. Rows
    run s.micro_batch at a time, longest first, each cut to its own length; the gradient does not
    depend on the cut. Raises ValueError if the loss is not finite, before any parameter moves.
    """
    B, T = rows.tokens.shape
    advantages = advantages.flatten().to(rows.tokens.device)  # (B,)
    position = torch.arange(1, T + 1, device=rows.tokens.device)
    lengths = ((rows.labels != -100) * position).amax(1)  # (B,) prompt and answer
    order = lengths.argsort(descending=True).split(s.micro_batch)
    micro = [
        (i, rows.tokens[i, :end], rows.labels[i, :end]) for i in order for end in [lengths[i[0]]]
    ]

    def logprobs(tokens, labels):
        return token_logprobs(model, tokens, labels, s.temperature)

    reference_logps = [None] * len(micro)
    if s.beta:
        policy = get_flat(model)
        set_flat(model, reference)
        with torch.no_grad():
            reference_logps = [logprobs(tokens, labels) for _, tokens, labels in micro]
        set_flat(model, policy)
    old_logps, totals = [None] * len(micro), {}
    for _ in range(s.updates):
        optimizer.zero_grad()
        for k, (i, tokens, labels) in enumerate(micro):
            logp = logprobs(tokens, labels)
            if old_logps[k] is None:  # what sampled is what scores first, so the ratio starts at 1
                old_logps[k] = logp.detach()
            loss, stats = grpo_loss(
                logp,
                old_logps[k],
                reference_logps[k],
                advantages[i],
                labels[:, 1:] != -100,
                clip=s.clip,
                beta=s.beta,
            )
            share = len(i) / B
            (loss * share).backward()
            for name, value in (stats | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, 0) + value * share / s.updates
        if not math.isfinite(totals["loss"]):
            raise ValueError(f"the GRPO loss is {float(totals['loss'])}; try a lower learning rate")
        optimizer.step()
    return {name: value.item() for name, value in totals.items()}


def grpo_step(model, optimizer, prompts, rewards, reference, s: Settings, generator=None) -> dict:
    """One step of GRPO: sample, reward, compare within groups, update -> statistics.

    prompts: lists of ids; rewards(p, answer ids) -> a dict of reward parts for an answer to prompt
    p, whose sum is the reward. Dropout is off. The statistics are what a researcher watches.
    """
    model.eval()
    started = time.perf_counter()
    rows = rollouts(model, prompts, s, generator)
    sampled = time.perf_counter()
    answers = [(p, a) for p, group in enumerate(rows.completions) for a in group]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a reward may run code for seconds
        parts = list(pool.map(lambda answer: rewards(*answer), answers))
    totals = torch.tensor([sum(part.values()) for part in parts]).view(len(prompts), s.group)
    stats = grpo_update(model, optimizer, rows, group_advantages(totals), reference, s)
    return stats | {
        "reward": totals.mean().item(),
        "reward_std": totals.std().item(),
        "parts": {k: sum(part[k] for part in parts) / len(parts) for k in parts[0]},
        "equal_groups": int((totals == totals[:, :1]).all(1).sum()),
        "length": sum(len(a) for _, a in answers) / len(answers),
        "unfinished": sum(a[-1] not in s.eos_ids for _, a in answers) / len(answers),
        "grad_norm": optimizer.grad_norm.item(),
        "rollout_s": round(sampled - started, 4),
        "update_s": round(time.perf_counter() - sampled, 4),
    }
