"""GRPO (Shao et al. 2024, DeepSeekMath) for stage 2: rollouts, advantages, the loss, the step.

A step samples G answers to each of P prompts, scores them, and compares each answer with its own
group: advantage = (r - mean) / std. The update raises the log-probs of answers that beat their
group, clipped (PPO) and held near the policy as RL began by a KL penalty. Rewards come in as a
function, so this file knows nothing of data sets.

Left out: reward models, a value network, importance-sampling corrections for stale rollouts. The
policy that samples is the policy that learns, and dropout is off in both, so the ratio starts at 1.
In the update every answer carries its prompt, which is computed anew for each.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from lorapar import get_flat, set_flat
from model import generate, token_logprobs


@dataclass
class Settings:
    """How a step samples and updates; the names are those of the GRPO paper."""

    group: int = 8  # G, answers per prompt
    max_new_tokens: int = 256
    eos_ids: tuple = ()
    temperature: float = 0.9  # of sampling and of every log-prob
    clip: float = 0.2  # PPO's ratio clip
    beta: float = 0.04  # weight of the KL penalty; 0 computes no reference
    num_iterations: int = 1  # optimizer steps per batch of rollouts (mu)
    batch_rows: int = 64  # answers decoded together
    micro_batch: int = 8  # answers per forward and backward


@dataclass
class Rollouts:
    """The answers of one step: P prompts, G answers each, and what sampling said of every token."""

    prompts: list[list[int]]  # [P][tokens]
    answers: list[list[list[int]]]  # [P][G][new tokens], the sampled EOS included
    logps: list[list[list[float]]]  # [P][G][log-prob of each new token]


def rollouts(model, prompts, s: Settings, generator=None) -> Rollouts:
    """Samples s.group answers to each prompt (a list of ids) from softmax(logits / temperature)."""
    answers, logps = generate(
        model,
        prompts,
        s.max_new_tokens,
        temperature=s.temperature,
        eos_ids=s.eos_ids,
        samples_per_prompt=s.group,
        generator=generator,
        batch_rows=s.batch_rows,
        return_logprobs=True,
    )
    return Rollouts(prompts, answers, logps)


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
    ratio = ((logp - old_logp) * mask).exp()
    A = advantages[:, None]  # (B, 1)
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    kl = torch.zeros_like(logp)
    if beta:
        log_ratio = (ref_logp - logp) * mask
        kl = torch.expm1(log_ratio) - log_ratio  # k3; exp(x) - 1 would round below 0
    length = mask.sum(1).clamp(min=1)

    def per_answer(x):
        return ((x * mask).sum(1) / length).mean()

    loss = -per_answer(objective - beta * kl)
    with torch.no_grad():
        clipped = per_answer(((ratio - 1).abs() > clip).float())
        stats = {"kl": per_answer(kl), "ratio": per_answer(ratio), "clipped": clipped}
    return loss, stats


@dataclass
class MicroBatch:
    """A few answers as ordinary rows, each behind its prompt, right padded."""

    tokens: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T), -100 outside the answers
    advantages: torch.Tensor  # (B,)
    sampled: torch.Tensor  # (B, T-1): sampling's own log-probs at the answers, 0 elsewhere
    mask: torch.Tensor  # (B, T-1) bool: the answers' tokens, the sampled EOS included
    old: torch.Tensor | None = None  # (B, T-1): log-probs of the policy that sampled
    ref: torch.Tensor | None = None  # (B, T-1): log-probs of the reference


def micro_batches(rollout: Rollouts, advantages, size: int, device) -> list[MicroBatch]:
    """Rollouts, sorted by length and cut into `size` answers each. advantages (P, G)."""
    samples = [
        (prompt, *answer)
        for prompt, *group in zip(rollout.prompts, rollout.answers, rollout.logps, advantages)
        for answer in zip(*group)
    ]
    samples.sort(key=lambda sample: -len(sample[0] + sample[1]))

    def padded(rows, fill):
        return pad_sequence([torch.tensor(row) for row in rows], True, fill)

    batches = []
    for chosen in (samples[i : i + size] for i in range(0, len(samples), size)):
        tokens = padded([prompt + answer for prompt, answer, *_ in chosen], 0)
        labels = padded([[-100] * len(prompt) + answer for prompt, answer, *_ in chosen], -100)
        sampled = padded([[0.0] * (len(prompt) - 1) + logps for prompt, _, logps, _ in chosen], 0.0)
        advantage = torch.stack([advantage for *_, advantage in chosen])
        tensors = (tokens, labels, advantage, sampled, labels[:, 1:] != -100)
        batches.append(MicroBatch(*(t.to(device) for t in tensors)))
    return batches


def grpo_update(model, optimizer, rollout: Rollouts, advantages, reference, s: Settings) -> dict:
    """`s.num_iterations` optimizer steps on one batch of rollouts -> their mean statistics.

    advantages (P, G); reference: the flat vector (N,) of the policy that the KL holds on to. At
    most s.micro_batch answers go through the model at a time; the gradient does not depend on it.
    "gap" is the mean |difference| between sampling's log-probs and those of the first pass, which
    is still the policy that sampled: more than rounding means the two do not compute the same.
    Dropout is off. Raises FloatingPointError if the loss is not finite, before that step moves a
    parameter.
    """
    model.eval()
    batches = micro_batches(rollout, advantages, s.micro_batch, next(model.parameters()).device)
    n_tokens = sum(int(b.mask.sum()) for b in batches)

    def logprobs(b):
        return token_logprobs(model, b.tokens, b.labels, s.temperature)

    if s.beta:
        policy = get_flat(model)
        try:
            set_flat(model, reference)
            with torch.no_grad():
                for b in batches:
                    b.ref = logprobs(b)
        finally:
            set_flat(model, policy)
    totals = {"gap": 0.0}
    for _ in range(s.num_iterations):
        optimizer.zero_grad()
        for b in batches:
            logp = logprobs(b)
            if b.old is None:
                b.old = logp.detach()
                totals["gap"] += (b.old - b.sampled).abs().sum() / n_tokens
            loss, stats = grpo_loss(logp, b.old, b.ref, b.advantages, b.mask, s.clip, s.beta)
            share = len(b.tokens) / advantages.numel()
            (loss * share).backward()
            for name, value in (stats | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, 0) + value * share / s.num_iterations
        if not math.isfinite(totals["loss"]):
            raise FloatingPointError(f"the GRPO loss is {float(totals['loss'])}")
        optimizer.step()
    return {name: value.item() for name, value in totals.items()}


def grpo_step(model, optimizer, prompts, rewards, reference, s: Settings, generator=None) -> dict:
    """One step of GRPO: sample, reward, compare within groups, update -> statistics.

    prompts: lists of ids; rewards(answers [P][G][tokens]) -> [P][G] dicts of reward parts, whose
    sum is an answer's reward. The model stays in eval mode, without dropout. The statistics are
    what a researcher watches.
    """
    started = time.perf_counter()
    rollout = rollouts(model, prompts, s, generator)
    sampled = time.perf_counter()
    rewarded = rewards(rollout.answers)
    totals = torch.tensor([[float(sum(parts.values())) for parts in group] for group in rewarded])
    stats = grpo_update(model, optimizer, rollout, group_advantages(totals), reference, s)
    answers = [answer for group in rollout.answers for answer in group]
    flat = [parts for group in rewarded for parts in group]
    names = dict.fromkeys(name for parts in flat for name in parts)
    stats |= {
        "reward": totals.mean().item(),
        "reward_std": totals.std().item(),  # over all answers, not within groups
        "parts": {n: sum(parts.get(n, 0.0) for parts in flat) / len(flat) for n in names},
        "zero_std_groups": int((totals == totals[:, :1]).all(1).sum()),
        "length": sum(map(len, answers)) / len(answers),
        "truncated": sum(a[-1] not in s.eos_ids for a in answers) / len(answers),
        "grad_norm": optimizer.grad_norm.item(),
        "rollout_s": round(sampled - started, 4),
        "update_s": round(time.perf_counter() - sampled, 4),
    }
    return stats
