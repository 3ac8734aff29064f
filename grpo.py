"""GRPO (Shao et al. 2024, DeepSeekMath) for stage 2: rollouts, group advantages, the loss, the loop.

A step samples G answers to each of P prompts, scores them, and compares each answer with its own
group: advantage = (r - mean) / std. The update raises the log-probs of answers that beat their
group, clipped (PPO) and held near the SFT checkpoint by a KL penalty. Rewards come in as a
function, so this file knows nothing of data sets.

Left out: reward models, a value network, importance-sampling corrections for stale rollouts: the
policy that samples is the policy that learns, and dropout is off in both, so the ratio starts at 1.
"""

import time
from dataclasses import dataclass

import torch

from lorapar import get_flat, set_flat
from model import generate, token_logprobs


@dataclass
class Rollouts:
    """The answers of one step as right-padded rows: row p * G + g is answer g of prompt p."""

    tokens: torch.Tensor  # (B, T) int64, prompt then answer (the sampled EOS included)
    labels: torch.Tensor  # (B, T) int64, tokens at answer positions, -100 elsewhere
    logp: torch.Tensor  # (B, T-1) float32, what sampling said; 0 where labels are -100
    completions: list[list[list[int]]]  # [P][G][new tokens]


def rollouts(
    model, prompts, group, max_new_tokens, *, temperature, eos_ids, generator=None
) -> Rollouts:
    """Samples `group` answers to each prompt (lists of ids) from softmax(logits / temperature)."""
    completions, logps = generate(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        eos_ids=eos_ids,
        samples_per_prompt=group,
        generator=generator,
        return_logprobs=True,
    )
    rows = [
        (prompt, answer, logp)
        for prompt, answers, answer_logps in zip(prompts, completions, logps)
        for answer, logp in zip(answers, answer_logps)
    ]
    T = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    tokens = torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full((len(rows), T), -100)
    sampled = torch.zeros(len(rows), T - 1)
    for i, (prompt, answer, logp) in enumerate(rows):
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


def grpo_update(
    model,
    optimizer,
    rows: Rollouts,
    advantages,
    reference,
    *,
    temperature,
    clip,
    beta,
    updates,
    micro,
):
    """`updates` optimizer steps on one batch of rollouts -> averaged statistics.

    advantages (P, G); reference: the flat vector of the KL's policy. Rows run `micro` at a time,
    longest first, each micro-batch cut to its own length; the gradient does not depend on the cut.
    """
    B = len(rows.tokens)
    weights = advantages.flatten()
    lengths = (rows.labels != -100).int() * torch.arange(1, rows.labels.shape[1] + 1).to(
        weights.device
    )
    lengths = lengths.max(1).values
    micro_batches = lengths.argsort(descending=True).split(micro)
    cut = [int(lengths[i].max()) for i in micro_batches]

    def logprobs(i, end):
        return token_logprobs(model, rows.tokens[i, :end], rows.labels[i, :end], temperature)

    reference_logps = [None] * len(cut)
    if beta:
        policy = get_flat(model)
        set_flat(model, reference)
        with torch.no_grad():
            reference_logps = [logprobs(i, end) for i, end in zip(micro_batches, cut)]
        set_flat(model, policy)
    old, totals = [None] * len(cut), {}
    for _ in range(updates):
        optimizer.zero_grad()
        for k, (i, end) in enumerate(zip(micro_batches, cut)):
            logp = logprobs(i, end)
            if old[k] is None:  # the policy that sampled is the one that scores first: ratio 1
                old[k] = logp.detach()
            mask = rows.labels[i, 1:end] != -100
            loss, stats = grpo_loss(
                logp, old[k], reference_logps[k], weights[i], mask, clip=clip, beta=beta
            )
            share = len(i) / B
            (loss * share).backward()
            for name, value in (stats | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, 0) + value * share / updates
        optimizer.step()
    return {name: value.item() for name, value in totals.items()}


def train_grpo(
    model,
    optimizer,
    scheduler,
    prompts,
    rewards,
    *,
    steps,
    group,
    max_new_tokens,
    eos_ids,
    temperature,
    clip,
    beta,
    updates,
    micro,
    reference,
    generator,
    first_step=0,
):
    """The loop, a generator: yields (step, statistics) after each of `steps` steps.

    prompts(step) -> (keys, list of token lists); rewards(key, tokens) -> dict of reward parts,
    whose sum is the reward. reference (N,) is the flat vector when GRPO started. Dropout is off.
    Raises ValueError when a loss is not finite, before the parameters take it.
    """
    model.eval()
    for step in range(first_step, steps):
        started = time.perf_counter()
        keys, asked = prompts(step)
        rows = rollouts(
            model,
            asked,
            group,
            max_new_tokens,
            temperature=temperature,
            eos_ids=eos_ids,
            generator=generator,
        )
        sampled = time.perf_counter()
        parts = [[rewards(key, a) for a in answers] for key, answers in zip(keys, rows.completions)]
        totals = torch.tensor([[sum(p.values()) for p in row] for row in parts])  # (P, G)
        advantages = group_advantages(totals).to(rows.tokens.device)
        stats = grpo_update(
            model,
            optimizer,
            rows,
            advantages,
            reference,
            temperature=temperature,
            clip=clip,
            beta=beta,
            updates=updates,
            micro=micro,
        )
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        answers = [a for row in rows.completions for a in row]
        flat_parts = [p for row in parts for p in row]
        yield (
            step,
            stats
            | {
                "reward": totals.mean().item(),
                "reward_std": totals.std().item(),
                "parts": {
                    k: sum(p[k] for p in flat_parts) / len(flat_parts) for k in flat_parts[0]
                },
                "equal_groups": int((totals == totals[:, :1]).all(1).sum()),
                "length": sum(map(len, answers)) / len(answers),
                "unfinished": sum(a[-1] not in eos_ids for a in answers) / len(answers),
                "grad_norm": optimizer.grad_norm.item(),
                "lr": rate,
                "rollout_s": round(sampled - started, 4),
                "update_s": round(time.perf_counter() - sampled, 4),
            },
        )
