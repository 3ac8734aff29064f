"""GRPO (Shao et al. 2024, DeepSeekMath) for System 2: the step, advantages, the loss, the update.

A step samples G answers to each of P prompts, scores them, and compares each answer with its own
group: advantage = (r - mean) / std. The update raises the log-probs of answers that beat their
group, clipped (PPO) and held near the policy as RL began by a KL penalty. Rewards come in as a
function, so this file knows nothing of data sets.

Left out: reward models, a value network, importance-sampling corrections for stale rollouts. The
policy that samples is the policy that learns, and dropout is off in both, so the ratio starts at 1.
The update computes the prompt anew for every answer.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from lorapar import cached_factors, get_flat, rank_and_size, set_flat, sum_over_ranks
from model import generate, token_logprobs


@dataclass
class Settings:
    """How a step samples and updates; in brackets the GRPO paper's symbols."""

    group: int = 8  # answers per prompt (G)
    max_new_tokens: int = 256
    eos_ids: tuple = ()
    temperature: float = 0.9  # of sampling and of every log-prob
    loss: str = "grpo"  # how tokens are averaged: "grpo", "token" or "dr_grpo" (see grpo_loss)
    clip: float = 0.2  # PPO's ratio clip (epsilon)
    clip_high: float | None = None  # its upper side, where that is wider (DAPO)
    mask_truncated: bool = False  # answers without an end do not train (DAPO)
    kl: float = 0.04  # weight of the KL penalty (beta); 0: no reference is computed
    iterations: int = 1  # optimizer steps per batch of rollouts (mu)
    batch_rows: int = 64  # answers decoded together
    micro_batch: int = 4  # answers per forward and backward


@dataclass
class Rollout:
    """One sampled answer."""

    prompt_index: int  # which of the step's prompts it answers
    prompt: list[int]
    answer: list[int]  # new tokens, the sampled EOS included
    logprobs: list[float]  # theirs, as they were sampled
    reward_parts: dict = field(default_factory=dict)  # their sum is the reward
    truncated: bool = False  # cut at max_new_tokens, without an EOS
    advantage: float = 0.0
    trains: bool = True


def grpo_step(model, optimizer, prompts, reward, reference, s: Settings, generator=None):
    """One step: sample, reward, compare within groups, update -> (statistics, rollouts).

    prompts: P lists of ids. reward(rollouts) gives {part: number} for each rollout. reference: the
    flat vector (N,) of the KL's reference policy. The model stays in eval mode, without dropout. Of
    several processes each answers its share of the prompts and computes its share of the gradient;
    all return all P * G rollouts, the G of a prompt one after another.
    """
    if rank_and_size()[1] > 1 and not optimizer.sum_gradients:
        raise ValueError("with several processes the optimizer needs sum_gradients=True")
    started = time.perf_counter()
    rollouts = sample_rollouts(model, prompts, s, generator)
    sampled_at = time.perf_counter()
    for rollout, parts in zip(rollouts, reward(rollouts), strict=True):
        rollout.reward_parts = parts
    rewarded_at = time.perf_counter()
    rollouts = sorted(gather_over_ranks(rollouts), key=lambda r: r.prompt_index)
    rewards = [float(sum(r.reward_parts.values())) for r in rollouts]
    rewards = torch.tensor(rewards, dtype=torch.float32).view(len(prompts), s.group)  # (P, G)
    advantages = group_advantages(rewards, by_std=s.loss != "dr_grpo")
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist()):
        rollout.advantage = advantage
        rollout.truncated = rollout.answer[-1] not in s.eos_ids
        rollout.trains = not (rollout.truncated and s.mask_truncated)
    stats = grpo_update(model, optimizer, rollouts, reference, s)
    names = dict.fromkeys(name for r in rollouts for name in r.reward_parts)
    stats |= {
        "reward": rewards.mean().item(),
        "parts": {
            n: sum(r.reward_parts.get(n, 0.0) for r in rollouts) / len(rollouts) for n in names
        },
        "equal_groups": int((advantages == 0).all(1).sum()),  # nothing to learn there
        "length": sum(len(r.answer) for r in rollouts) / len(rollouts),
        "truncated": sum(r.truncated for r in rollouts) / len(rollouts),
        "grad_norm": optimizer.grad_norm.item(),  # of the last iteration
        "rollout_s": round(sampled_at - started, 4),
        "reward_s": round(rewarded_at - sampled_at, 4),
        "update_s": round(time.perf_counter() - rewarded_at, 4),
    }
    return stats, rollouts


def sample_rollouts(model, prompts, s: Settings, generator=None) -> list[Rollout]:
    """s.group answers to each prompt (of this process's share), from softmax(logits / temperature).
    The numbers are drawn for all prompts, so the split over processes changes rounding alone."""
    shape = len(prompts), s.group, s.max_new_tokens
    uniforms = torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)
    rank, size = rank_and_size()
    own = list(range(rank, len(prompts), size))
    if not own:
        return []
    with cached_factors(model):
        answers, logprobs = generate(
            model,
            [prompts[i] for i in own],
            s.max_new_tokens,
            temperature=s.temperature,
            eos_ids=s.eos_ids,
            samples_per_prompt=s.group,
            uniforms=uniforms[own].flatten(0, 1),
            batch_rows=s.batch_rows,
            return_logprobs=True,
        )
    rollouts = []
    for i, group_answers, group_logprobs in zip(own, answers, logprobs):
        for answer, logps in zip(group_answers, group_logprobs):
            rollouts.append(Rollout(i, prompts[i], answer, logps))
    return rollouts


def gather_over_ranks(items: list) -> list:
    """The lists of all processes, concatenated."""
    size = rank_and_size()[1]
    if size == 1:
        return items
    lists = [None] * size
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def group_advantages(rewards, by_std=True):
    """rewards (P, G) -> (r - mean) / (sample std + 1e-4) within each group, (P, G) float32.

    Exactly 0 where a group's rewards are all equal (rounding alone would make a gradient out of
    nothing). by_std=False does not divide, as the division favours groups that
    differ little (Dr. GRPO). ValueError for G = 1: nothing to compare with.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, G) with G >= 2, got {tuple(rewards.shape)}")
    rewards = rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    scale = rewards.std(1, keepdim=True) + 1e-4 if by_std else 1.0
    return torch.where(equal, 0.0, centred / scale)


def grpo_loss(
    logp, old_logp, ref_logp, advantages, mask, clip=0.2, kl=0.04,
    *, clip_high=None, loss="grpo", max_new_tokens=None,
):  # fmt: skip
    """The GRPO objective, negated, and its statistics (DeepSeekMath eq. 3 and 4):
    min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) - kl * KL, with ratio = exp(logp - old_logp).

    logp (new policy, with gradient), old_logp, ref_logp, mask (B, T), advantages (B,). The KL
    estimator is k3, exp(ref - new) - (ref - new) - 1 >= 0; kl = 0 takes ref_logp None. clip_high:
    the upper side is 1 + clip_high. loss: "grpo" is the mean over each answer's tokens, then over
    the B answers, a row without tokens counting as 0; "token" the mean over all tokens (DAPO, Yu et
    al. 2025); "dr_grpo" the sum over all tokens / (B max_new_tokens) (Dr. GRPO, Liu et al. 2025).
    """
    ratio = ((logp - old_logp) * mask).exp()  # masked first: what is outside must not overflow
    A = advantages[:, None]  # (B, 1)
    high = clip if clip_high is None else clip_high
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + high) * A)
    k3 = torch.zeros_like(logp)
    if kl:
        difference = (ref_logp - logp) * mask
        k3 = torch.expm1(difference) - difference  # exp(x) - 1 would round below 0

    def per_answer(x):
        return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

    gain = objective - kl * k3  # (B, T)
    if loss == "grpo":
        mean = per_answer(gain)
    elif loss == "token":
        mean = (gain * mask).sum() / mask.sum().clamp(min=1)
    elif loss == "dr_grpo":
        mean = (gain * mask).sum() / (len(mask) * max_new_tokens)
    else:
        raise ValueError(f"unknown loss {loss!r}; one of grpo, token, dr_grpo")
    with torch.no_grad():
        clipped = per_answer((objective < ratio * A).float())
        stats = {"kl": per_answer(k3), "ratio": per_answer(ratio), "clipped": clipped}
    return -mean, stats


def grpo_update(model, optimizer, rollouts, reference, s: Settings) -> dict:
    """`s.iterations` optimizer steps on one batch of rollouts -> their mean statistics.

    At most s.micro_batch answers go through the model at a time; the gradient does not depend on
    it. "gap" is the mean |difference| between sampling's log-probs and those of the first pass of
    the same policy: beyond rounding, decoding and training compute different models. Raises
    FloatingPointError if the gradient is not finite, before that step moves anything.
    """
    model.eval()
    device = next(model.parameters()).device
    rank, size = rank_and_size()
    by_length = sorted(rollouts, key=lambda r: -len(r.prompt + r.answer))  # little padding
    own, batches = by_length[rank::size], []
    for start in range(0, len(own), s.micro_batch):
        batches.append(collate_rollouts(own[start : start + s.micro_batch], device))
    if s.kl:
        add_reference_logprobs(model, batches, reference, s.temperature)
    trained_answers = max(1, sum(r.trains for r in rollouts))
    trained_tokens = max(1, sum(len(r.answer) for r in rollouts if r.trains))
    totals = {}
    for name in ("loss", "gap", "kl", "ratio", "clipped"):
        totals[name] = torch.zeros((), device=device)
    for _ in range(s.iterations):
        optimizer.zero_grad()
        for b in batches:
            logp = token_logprobs(model, b.tokens, b.labels, s.temperature)
            if b.old is None:
                b.old = logp.detach()  # not b.sampled, whose rounding would move the ratio off 1
                totals["gap"] += ((b.old - b.sampled) * b.mask).abs().sum() / trained_tokens
            loss, stats = grpo_loss(
                logp, b.old, b.ref, b.advantages, b.mask, s.clip, s.kl,
                clip_high=s.clip_high, loss=s.loss, max_new_tokens=s.max_new_tokens,
            )  # fmt: skip
            share = len(b.tokens) / len(rollouts)  # of all answers, also of those that do not train
            if s.loss == "token":
                share = b.mask.sum() / trained_tokens
            (loss * share).backward()
            totals["loss"] += loss.detach() * share / s.iterations
            for name, value in stats.items():  # means over the answers that train, alone
                totals[name] += value * len(b.tokens) / trained_answers / s.iterations
        optimizer.step()
    values = sum_over_ranks(torch.stack(list(totals.values())))
    return dict(zip(totals, values.tolist()))


@torch.no_grad()
def add_reference_logprobs(model, batches, reference, temperature: float):
    """Sets each micro-batch's `ref`: its log-probs with the factors of the flat vector (N,)."""
    policy = get_flat(model)
    try:
        set_flat(model, reference)
        for b in batches:
            b.ref = token_logprobs(model, b.tokens, b.labels, temperature)
    finally:
        set_flat(model, policy)


@dataclass
class MicroBatch:
    """A few rollouts as rows, each answer after its prompt, right padded."""

    tokens: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T), -100 outside the answers
    mask: torch.Tensor  # (B, T-1) bool: the answers' tokens, the sampled EOS included
    advantages: torch.Tensor  # (B,)
    sampled: torch.Tensor  # (B, T-1): log-probs at the answers as decoding computed them, else 0
    old: torch.Tensor | None = None  # (B, T-1): the same as the update's first pass computes them
    ref: torch.Tensor | None = None  # (B, T-1): log-probs of the reference


def collate_rollouts(rollouts, device) -> MicroBatch:
    tokens = [torch.tensor(r.prompt + r.answer) for r in rollouts]
    labels, sampled = [], []
    for r in rollouts:
        answer = r.answer if r.trains else [-100] * len(r.answer)
        labels.append(torch.tensor([-100] * len(r.prompt) + answer))
        logprobs = [0.0] * (len(r.prompt) - 1) + r.logprobs
        sampled.append(torch.tensor(logprobs, dtype=torch.float32))
    advantages = torch.tensor([r.advantage for r in rollouts], dtype=torch.float32)
    labels = pad_sequence(labels, True, -100)
    return MicroBatch(
        tokens=pad_sequence(tokens, True).to(device),
        labels=labels.to(device),
        mask=(labels[:, 1:] != -100).to(device),
        advantages=advantages.to(device),
        sampled=pad_sequence(sampled, True).to(device),
    )
