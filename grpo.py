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
from torch.nn.utils.rnn import pad_sequence

from lorapar import get_flat, set_flat
from model import generate, token_logprobs

PACKED = 512  # answer tokens in a row: attention grows with the square of a row's length


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
    micro_batch: int = 8  # answers a forward and backward


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
        return_logprobs=True,
    )
    return Rollouts(prompts, answers, logps)


def pack(rows, device):
    """Answers behind one copy of their prompt, so that the prompt is computed once for all.

    rows: [(prompt, its answers)]. A row is prompt[:-1] (segment 0), then for answer k = 1, 2, ..
    the prompt's last token, which predicts the answer's first, and the answer (segment k).
    -> tokens, labels, segments (B, T) for `token_logprobs`, segments None if each row has but one
    answer; index (A, longest answer), where in its flattened output the log-probs of each answer
    stand; mask (A, longest answer), False at padding.
    """
    T = max(len(prompt) - 1 + sum(1 + len(a) for a in answers) for prompt, answers in rows)
    packed, spans = [], []
    for b, (prompt, answers) in enumerate(rows):
        row = [(token, -100, 0) for token in prompt[:-1]]
        for k, answer in enumerate(answers, 1):
            start = b * (T - 1) + len(row)
            spans.append(torch.arange(start, start + len(answer)))
            row += [(prompt[-1], -100, k)] + [(token, token, k) for token in answer]
        packed.append(row + [(0, -100, 0)] * (T - len(row)))
    tokens, labels, segments = torch.tensor(packed, device=device).unbind(-1)
    if max(len(answers) for _, answers in rows) == 1:
        segments = None  # ordinary rows
    index = pad_sequence(spans, batch_first=True, padding_value=-1).to(device)
    return tokens, labels, segments, index.clamp(min=0), index >= 0


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

    advantages (P, G); reference: the flat vector (N,) of the policy that the KL holds on to. At
    most s.micro_batch answers go through the model at a time, those of a prompt behind one copy of
    it (`pack`); the gradient does not depend on the cut. Raises ValueError if the loss is not
    finite, before that step moves a parameter.
    """
    P, G = advantages.shape
    device = next(model.parameters()).device
    longest = max(len(answer) for group in rows.answers for answer in group)
    cut = min(G, s.micro_batch, max(1, PACKED // longest))  # answers of one prompt in a row
    parts = [(p, slice(g, g + cut)) for p in range(P) for g in range(0, G, cut)]
    parts.sort(key=lambda part: -sum(map(len, rows.answers[part[0]][part[1]])))
    together = max(1, s.micro_batch // cut)
    micro = []
    for chosen in (parts[i : i + together] for i in range(0, len(parts), together)):
        packed = pack([(rows.prompts[p], rows.answers[p][g]) for p, g in chosen], device)
        micro.append((*packed, torch.cat([advantages[p, g] for p, g in chosen]).to(device)))

    def logprobs(tokens, labels, segments, index):
        logp = token_logprobs(model, tokens, labels, s.temperature, segments=segments)
        return logp.flatten()[index]  # (answers, longest answer)

    reference_logps = [None] * len(micro)
    if s.beta:
        policy = get_flat(model)
        set_flat(model, reference)
        with torch.no_grad():
            reference_logps = [logprobs(*packed) for *packed, _, _ in micro]
        set_flat(model, policy)
    old_logps, totals = [None] * len(micro), {}
    for _ in range(s.updates):
        optimizer.zero_grad()
        for k, (*packed, mask, advantage) in enumerate(micro):
            logp = logprobs(*packed)
            if old_logps[k] is None:  # what sampled is what scores first, so the ratio starts at 1
                old_logps[k] = logp.detach()
            loss, stats = grpo_loss(
                logp,
                old_logps[k],
                reference_logps[k],
                advantage,
                mask,
                clip=s.clip,
                beta=s.beta,
            )
            share = len(mask) / (P * G)
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
    answers = [(p, a) for p, group in enumerate(rows.answers) for a in group]
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
