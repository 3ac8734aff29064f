"""All tests: each names the property it proves and holds it against an independent reference.

Some tests need fixtures of other libraries or real data and skip without them; what they prove is
proved by a smaller test as well, so a bare clone needs nothing but this file:

    python -m pytest -q
"""

import copy
import csv
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import data
import grpo
import lorapar
import model as decoder
import train

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "fixtures").is_dir(), reason="needs real data")
FAMILIES = ["llama2_tiny", "llama3_tiny", "qwen2_tiny"]

# ------------------------------------------------------------------------------------ small models

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
# config.json fields -> six logits of the last position of row 1, one of row 0, and the mean square
# of all, which transformers 5 (eager, float32) gave for the formula weights below.
STORED = {
    "llama2": (
        {"model_type": "llama", "num_key_value_heads": 4, "rope_theta": 10000.0},
        [-0.8731, -0.9626, 0.2564, -0.0398, -1.3312, 2.61, 0.2816, 1.4783],
    ),
    "llama3": (
        {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 12, "rope_theta": 500000.0}
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
        | {"rope_scaling": LLAMA3},
        [0.0117, 1.3003, -0.9672, -1.9394, -0.6318, -0.3565, -0.3052, 1.6281],
    ),
    "mistral": (
        {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        [1.7937, 0.5197, 1.5349, 1.3158, 0.3697, 1.2348, -1.8567, 1.4607],
    ),
    "qwen2": (
        {"model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
        | {"rope_theta": 1e6, "tie_word_embeddings": True}
        | {"sliding_window": 16, "use_sliding_window": False},
        [0.6425, 0.5073, 0.507, -2.2851, -2.702, -0.8421, -0.2441, 1.479],
    ),
    "qwen3": (
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6}
        | {"rope_theta": 1e6, "attention_bias": False, "use_sliding_window": False},
        [-0.1367, -1.2299, -0.0634, 0.3982, -0.7803, 0.6032, -2.9686, 1.5289],
    ),
    "linear": (
        {"model_type": "llama", "num_key_value_heads": 1, "rope_theta": 10000.0}
        | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        [-0.3202, -0.3558, 1.4465, -0.4891, 0.476, -0.3296, 0.0327, 1.496],
    ),
}


def formula_model(fields):
    """A small model whose weights are sines of their index, the same in every library."""
    model = decoder.Transformer(decoder.ModelConfig.from_dict(SMALL | fields)).requires_grad_(False)
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        wave = 0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) ** 1.3 + i)
        p.copy_(((1 + wave) if "norm" in name else wave).view_as(p))
    return model.eval()


def qwen():
    return formula_model(STORED["qwen2"][0])


def lora_model(init="anchored", moved=True, **settings):
    """A small model with adapters, away from their start unless moved=False."""
    generator = torch.Generator().manual_seed(0)
    settings = {"targets": "qkvogud", "r": 3, "alpha": 6, "std": 0.1} | settings
    model = lorapar.add_lora(qwen(), init=init, generator=generator, **settings)
    if moved:
        flat = lorapar.get_flat(model)
        lorapar.set_flat(model, flat + 0.05 * torch.randn(len(flat), generator=generator))
    return model.eval()


def answer_batch(rows=5, length=14, seed=0):
    """Right-padded (tokens, labels) with prompts and answers of different lengths."""
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        total = rng.randint(6, length)
        made.append(([rng.randrange(64) for _ in range(total)], rng.randint(1, total - 2)))
    return data.collate(made)


def plain_logprobs(model, tokens, labels, temperature=1.0):
    """The reference: full logits, log_softmax, gather."""
    logp = (model(tokens)[:, :-1] / temperature).log_softmax(-1)
    logp = logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return logp * (labels[:, 1:] != -100)


def close(a, b, tolerance=1e-5):
    a, b = a.detach(), b.detach()
    scale = max(float(b.abs().max()), 1e-12)
    assert float((a - b).abs().max()) <= tolerance * scale, float((a - b).abs().max()) / scale


def python(*command):
    """A command line of ours, run in a process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("family", STORED)
def test_formula_weights_give_the_logits_of_transformers(family):
    fields, expected = STORED[family]
    tokens = (torch.arange(40).view(2, 20) * 7 + 3) % 64
    logits = formula_model(fields)(tokens)
    ours = [*logits[1, -1, :6].tolist(), logits[0, 7, 9].item(), logits.square().mean().item()]
    assert ours == pytest.approx(expected, abs=2e-4)


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_fixture_logits_and_greedy_text(family):
    folder = SHARED / "fixtures" / family
    model, expected = decoder.load_model(folder), load_file(folder / "expected.safetensors")
    facts = json.loads((folder / "expected.json").read_text())
    error = (model(expected["input_ids"]) - expected["logits"]).abs().max()
    assert error < facts["max_abs_tolerance"] / 10
    for rows in (64, 1):
        together = decoder.generate(model, facts["prompts"], 16, temperature=0, batch_rows=rows)
        assert [answers[0] for answers in together] == facts["greedy"]


@pytest.mark.parametrize("family", STORED)
def test_padding_changes_neither_logits_nor_greedy_text(family):
    """Trap 10, and grouped heads, q_norm and scaled RoPE while decoding."""
    model, prompts = (
        formula_model(STORED[family][0]),
        [[5, 9, 2], [7] * 11, [1, 2, 3, 4, 5, 6, 7]],
    )
    padded, _ = data.collate([(p, 1) for p in prompts])
    logits = model(padded)
    for row, prompt in zip(logits, prompts):
        close(row[: len(prompt)], model(torch.tensor([prompt]))[0])
    together = decoder.generate(model, prompts, 12, temperature=0)
    for prompt, answers in zip(prompts, together):
        tokens = list(prompt)  # the slowest generation: the whole model for every token
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert answers == [tokens[len(prompt) :]]


def test_token_logprobs_equal_a_full_log_softmax_and_its_gradient(monkeypatch):
    monkeypatch.setattr(decoder.HeadLogprobs, "LOGITS", 7 * 64)  # the last chunk is ragged
    model, (tokens, labels) = qwen(), answer_batch()
    norm = model.model.norm.weight.requires_grad_()
    ours = decoder.token_logprobs(model, tokens, labels, temperature=0.7)
    reference = plain_logprobs(model, tokens, labels, 0.7)
    close(ours, reference)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad((reference * weights).sum(), norm)
    close(torch.autograd.grad((ours * weights).sum(), norm)[0], expected)


@pytest.mark.parametrize("sharpness", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_bf16_gradients_of_confident_tokens_are_no_noise(sharpness):
    """Traps 22 and 25: p from about 0.9 to 1 - 1e-9, against float64 and against a plain head on
    the same bf16 states."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 64, generator=generator).bfloat16()
    targets = torch.arange(0, 200, 3)
    hidden = sharpness * weight[targets].float() / weight[targets].float().norm(dim=1)[:, None]
    hidden = (hidden * 1.0).bfloat16().requires_grad_()

    def gradient(logp):
        return torch.autograd.grad(logp.sum(), hidden)[0].double()

    wide = hidden.detach().double().requires_grad_()
    logp = (wide @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])
    (exact,) = torch.autograd.grad(logp.sum(), wide)
    ours = gradient(decoder.HeadLogprobs.apply(hidden, weight, targets, 1.0))
    plain = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None])
    errors = [float((g - exact).norm() / exact.norm()) for g in (ours, gradient(plain))]
    assert errors[0] < 0.15 and errors[0] < 1.2 * errors[1], errors


def test_token_logprobs_train_the_head_where_it_is_trainable():
    model, (tokens, labels) = qwen(), answer_batch()
    weight = model.head_weight.requires_grad_()
    (ours,) = torch.autograd.grad(decoder.token_logprobs(model, tokens, labels).sum(), weight)
    (expected,) = torch.autograd.grad(plain_logprobs(model, tokens, labels).sum(), weight)
    close(ours, expected)


def test_full_logits_never_exist(monkeypatch):
    """Trap 19: the head sees answer positions only, a few of them at once."""
    monkeypatch.setattr(decoder.HeadLogprobs, "LOGITS", 4 * 64)
    model, (tokens, labels), seen = lora_model(), answer_batch(), []
    original = torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda x, d: seen.append(x.numel()) or original(x, d)
    )
    decoder.token_logprobs(model, tokens, labels)
    assert max(seen) <= 4 * 64 and sum(seen) == 64 * int((labels[:, 1:] != -100).sum())


def test_an_all_masked_row_gives_zero():
    model, (tokens, labels) = qwen(), answer_batch()
    labels[2] = -100
    logp = decoder.token_logprobs(model, tokens, labels)
    assert (logp[2] == 0).all() and logp.isfinite().all() and logp[1].any()
    labels[:] = -100
    assert (decoder.token_logprobs(model, tokens, labels) == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampling_logprobs_equal_a_full_forward(temperature):
    """Trap 6. Prompts of different lengths, several samples, rows that end early and leave."""
    model, prompts = lora_model(dropout=0.5).train(), [[5, 9, 2], [7] * 11, [1, 2, 3, 4]]
    answers, logps = decoder.generate(
        model,
        prompts,
        20,
        temperature=temperature,
        eos_ids=range(6),
        samples_per_prompt=6,
        generator=torch.Generator().manual_seed(3),
        return_logprobs=True,
    )
    assert model.training  # restored
    model.eval()
    assert len({len(a) for group in answers for a in group}) > 3
    for prompt, group, group_logps in zip(prompts, answers, logps):
        for answer, logp in zip(group, group_logps):
            tokens, labels = data.collate([(prompt + answer, len(prompt))])
            full = plain_logprobs(model, tokens, labels, temperature)[0, len(prompt) - 1 :]
            assert torch.tensor(logp) == pytest.approx(full.tolist(), abs=2e-5)


@pytest.mark.parametrize("batch_rows, look_every", [(1, 1), (4, 100), (5, 3), (64, 1)])
def test_what_is_sampled_depends_neither_on_the_batch_nor_on_who_has_ended(
    batch_rows, look_every, monkeypatch
):
    model, prompts = lora_model(), [[5, 9, 2], [7] * 11, [1, 2, 3, 4]]
    settings = {"eos_ids": range(4), "samples_per_prompt": 5}
    expected = decoder.generate(
        model, prompts, 16, generator=torch.Generator().manual_seed(1), **settings
    )
    assert len({len(a) for group in expected for a in group}) > 3
    monkeypatch.setattr(decoder, "LOOK_EVERY", look_every)
    generator = torch.Generator().manual_seed(1)
    settings |= {"batch_rows": batch_rows, "generator": generator}
    assert decoder.generate(model, prompts, 16, **settings) == expected


def test_no_more_rows_are_decoded_together_than_asked(monkeypatch):
    seen, original = [], decoder.decode_one_token
    monkeypatch.setattr(
        decoder, "decode_one_token", lambda *a: seen.append(len(a[1])) or original(*a)
    )
    decoder.generate(qwen(), [[1], [2, 3], [4]], 3, samples_per_prompt=7, batch_rows=4)
    assert max(seen) == 4 and sum(seen) == 21 * 2


def test_one_step_of_decoding_is_a_static_graph():
    """Traced once, replayed at every position: eager's result, so a GPU can record the step."""
    model, prompts, owner = qwen(), [[5, 9, 2], [7] * 6], torch.tensor([0, 0, 1])

    def fresh():
        cache = decoder.KVCache(model.config, 3, 16, model.head_weight)
        decoder.prefill(model, prompts, cache, owner)
        return cache

    def step(token, positions, *kept):
        cache = copy.copy(eager)
        cache.keys, cache.values = list(kept[:2]), list(kept[2:])
        return decoder.decode_one_token(model, token, positions, cache)

    eager, replayed = fresh(), fresh()
    token, positions = torch.tensor([1, 2, 3]), torch.tensor([3, 3, 6])
    traced_on = fresh()
    graph = make_fx(step)(token, positions, *traced_on.keys, *traced_on.values)
    for k in range(8):
        expected = decoder.decode_one_token(model, token, positions + k, eager)
        logits = graph(token, positions + k, *replayed.keys, *replayed.values)
        close(logits, expected, 1e-6)
        token = expected.argmax(-1)
    assert len(set(token.tolist())) > 1


def test_sampling_stops_after_any_eos_and_keeps_it():
    """Trap 4."""
    model, eos = qwen(), (3, 11, 40)
    answers = decoder.generate(
        model, [[1, 2]], 30, eos_ids=eos, samples_per_prompt=64, generator=torch.Generator()
    )[0]
    ended = [a for a in answers if len(a) < 30]
    assert {a[-1] for a in ended} == set(eos)
    assert all(not set(a[:-1]) & set(eos) for a in answers)


def test_samples_follow_the_tempered_distribution_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]).log_softmax(-1)
    draws = 40_000
    uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, logp = decoder.sample(logits.repeat(draws, 1), 0.8, 1.0, uniform)
    p = (logits / 0.8).softmax(-1)
    frequency = torch.bincount(token, minlength=5) / draws
    assert (frequency - p).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard errors
    close(logp, p.log()[token])
    for top_p, drawn in ((0.7, {0}), (0.8, {0, 1})):  # p[0] = 0.72 alone reaches 0.7
        token, _ = decoder.sample(logits.repeat(2000, 1), 0.8, top_p, uniform[:2000])
        assert set(token.tolist()) == drawn


def test_generate_refuses_what_it_cannot_do_and_warns_once_of_long_rows():
    for prompts, length in (([], 4), ([[1], []], 4), ([[1]], 0)):
        with pytest.raises(ValueError, match="generate"):
            decoder.generate(qwen(), prompts, length)
    with pytest.warns(UserWarning, match="beyond max_position_embeddings 128") as caught:
        decoder.generate(qwen(), [[1] * 127], 3, samples_per_prompt=2)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(qwen(), [[1] * 126], 3)


def test_sharded_and_single_files_load_alike_and_round_trip(tmp_path):
    model = formula_model(STORED["llama2"][0])
    decoder.save_model(model, tmp_path / "one", eos_token_id=2)
    state = load_file(tmp_path / "one" / "model.safetensors")
    files = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "one").iterdir()}
    assert set(files) == {"config.json", "model.safetensors"} and len(set(files.values())) == 1
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    names = sorted(state)
    where = {n: f"model-{i % 3}.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: state[n] for n in names if where[n] == file}, shards / file)
    index = {"weight_map": where}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.arange(20)[None]
    for folder in (tmp_path / "one", shards):
        loaded = decoder.load_model(folder)
        assert torch.equal(loaded(tokens), model(tokens))
        assert not any(p.requires_grad for p in loaded.parameters())


def broken(folder, change):
    """A copy of a good checkpoint after change(state, config)."""
    decoder.save_model(formula_model(STORED["llama2"][0]), folder)
    state = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NORM = "model.norm.weight"
BROKEN = {
    "missing": (lambda s, c: s.pop(NORM), NORM),
    "surplus": (lambda s, c: s.update(extra=torch.ones(2)), "extra"),
    "misshaped": (lambda s, c: s.update({NORM: torch.ones(3)}), NORM),
    "quantised": (lambda s, c: s.update({NORM: torch.ones(32, dtype=torch.int8)}), NORM),
    "architecture": (lambda s, c: c.update(model_type="gpt2"), "model_type"),
    "window": (lambda s, c: c.update(model_type="mistral", sliding_window=8), "sliding_window"),
    "rope": (lambda s, c: c.update(rope_scaling={"rope_type": "yarn"}), "yarn"),
    "rope factor": (lambda s, c: c.update(rope_scaling={"rope_type": "linear"}), "no factor"),
    "absent window": (
        lambda s, c: c.update(model_type="mistral") or c.pop("sliding_window"),
        "sliding_window",
    ),
    "field": (lambda s, c: c.pop("hidden_size"), "hidden_size"),
    "activation": (lambda s, c: c.update(hidden_act="gelu"), "hidden_act"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_we_cannot_run_is_refused_by_name(case, tmp_path):
    change, named = BROKEN[case]
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        decoder.load_model(broken(tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_truncated_or_absent_file_is_refused(tmp_path):
    folder = broken(tmp_path / "a", lambda s, c: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for read in (decoder.load_model, lambda path: decoder.auto_dtype(path, "cuda")):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        decoder.load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="only pytorch_model.bin"):
        decoder.load_model(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    with pytest.raises(ValueError, match="gone.safetensors: this shard is missing"):
        decoder.load_model(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        decoder.load_model(folder)
    with pytest.raises(ValueError, match="no such model folder"):
        decoder.load_model(tmp_path / "nowhere")


def test_checkpointing_recomputes_every_layer_and_changes_no_gradient():
    model, (tokens, labels) = lora_model(dropout=0.3).train(), answer_batch()
    gradients, calls = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.model.checkpointing in (False, True):
        torch.manual_seed(0)
        calls.clear()
        decoder.token_logprobs(model, tokens, labels).sum().backward()
        assert len(calls) == (4 if model.model.checkpointing else 2)  # each of two layers again
        gradients.append([p.grad.clone() for p in lorapar.lora_factors(model).values()])
        model.zero_grad()
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


def test_prefill_reads_the_last_position_of_each_prompt():
    """What MMLU's letters are read from."""
    model, prompts = qwen(), [[5, 9, 2], [7] * 11, [1]]
    for row, prompt in zip(decoder.prefill(model, prompts), prompts):
        close(row, model(torch.tensor([prompt]))[0, -1])


def test_old_files_and_every_stored_dtype_load(tmp_path):
    """rotary_emb.inv_freq of old files, a stored copy of a tied head; float16, bfloat16, mixed."""
    tokens = torch.arange(12)[None]
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for dtype, on_cuda in ((f32, f32), (f16, bf16), (bf16, bf16), (None, bf16)):
        model = qwen().to(dtype or f32)
        if dtype is None:  # a file of mixed dtypes
            model.model.layers[0].to(bf16)
        decoder.save_model(model, tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state = {n: t.clone() for n, t in state.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(state, tmp_path / "model.safetensors")
        kept = decoder.load_model(tmp_path, dtype=None)
        assert kept.head_weight.dtype == model.head_weight.dtype
        assert kept.model.inv_freq.dtype == f32
        wide = decoder.load_model(tmp_path)
        close(wide(tokens), copy.deepcopy(kept).float()(tokens), 1e-6)
        assert decoder.auto_dtype(tmp_path, "cpu") == f32
        assert decoder.auto_dtype(tmp_path, "cuda:1") == on_cuda
        decoder.load_model(tmp_path, dtype=on_cuda)(tokens)  # one dtype throughout


def test_a_folder_or_a_hub_id_becomes_a_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kw: asked.append((name, kw)) or tmp_path
    )
    assert decoder.find_model(tmp_path) == tmp_path and not asked
    assert decoder.find_model("Qwen/Qwen2.5-7B") == tmp_path
    assert asked[0][0] == "Qwen/Qwen2.5-7B" and "*.safetensors" in asked[0][1]["allow_patterns"]
    for nowhere in ("nowhere", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(ValueError, match="no such model folder"):
            decoder.find_model(nowhere)

    def offline(*_, **__):
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"Hub \(offline\)$"):
        decoder.find_model("a/b")


def test_saving_over_a_loaded_file_leaves_the_loaded_model_whole(tmp_path):
    """Trap 16: safetensors are memory-mapped."""
    decoder.save_model(qwen(), tmp_path)
    model, tokens = decoder.load_model(tmp_path), torch.arange(12)[None]
    before = model(tokens)
    other = qwen()
    other.head_weight.mul_(2)
    decoder.save_model(other, tmp_path)
    assert torch.equal(model(tokens), before)


# ------------------------------------------------------------------------------------ LoRA layers


@pytest.mark.parametrize("init", ["anchored", "lora", "pissa", "olora", "gaussian"])
def test_step_0_is_the_base_in_train_mode_with_dropout(init):
    tokens = torch.arange(24).view(2, 12)
    base = qwen()(tokens)
    model = lora_model(init, moved=False, dropout=0.5).train()
    if init == "gaussian":
        assert (model(tokens) - base).abs().max() > 0.01
    else:
        close(model(tokens), base, 1e-6)


def test_every_start_follows_its_paper():
    linear = nn.Linear(12, 10)
    W, r, scale = linear.weight.detach(), 3, 2.0
    A, B = lorapar.start_factors(W, "pissa", r, scale, 0.01, None)
    U, S, Vh = torch.linalg.svd(W)
    close(scale * B @ A, (U[:, :r] * S[:r]) @ Vh[:r])
    A, B = lorapar.start_factors(W, "olora", r, scale, 0.01, None)
    close(B.T @ B, torch.eye(r))
    Q, R = torch.linalg.qr(W)
    assert torch.equal(A, R[:r]) and torch.equal(B, Q[:, :r])
    A, B = lorapar.start_factors(torch.empty(400, 500), "anchored", r, scale, 0.01, None)
    assert A.std() == pytest.approx(0.01, rel=0.1) and B.std() == pytest.approx(0.01, rel=0.1)
    A, B = lorapar.start_factors(W, "lora", r, scale, 0.01, None)
    assert not B.any() and A.abs().max() <= 12**-0.5


@pytest.mark.parametrize("init", ["anchored", "pissa", "olora", "lora", "gaussian"])
def test_one_formula_serves_forward_export_and_merge(init, tmp_path):
    """Each layer against W x + s (B A - B0 A0) x written out, then the file, then the merge."""
    start, model = lora_model(init, moved=False), lora_model(init)
    tokens = torch.arange(24).view(2, 12)
    starts = dict(lorapar.lora_layers(start))
    dense = {}
    for name, layer in lorapar.lora_layers(model).items():
        delta = layer.lora_B @ layer.lora_A
        if init in ("anchored", "pissa", "olora"):
            delta = delta - starts[name].lora_B @ starts[name].lora_A
        dense[name] = layer.weight + 2.0 * delta.detach()  # s = alpha / r = 6 / 3
        x = torch.randn(4, layer.in_features)
        close(layer(x), F.linear(x, dense[name], layer.bias))
    reference = qwen()
    for name, weight in dense.items():
        reference.get_submodule(name).weight.copy_(weight)
    close(model(tokens), reference(tokens))
    lorapar.save_adapter(model, tmp_path)
    modes = {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}  # safetensors' own is 0600
    close(lorapar.load_adapter(qwen(), tmp_path)(tokens), reference(tokens))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["r"] == len(next(t for n, t in tensors.items() if "lora_A" in n))
    for name, weight in dense.items():  # as PEFT reads it, on the untouched base
        A, B = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        untouched = qwen().get_submodule(name).weight
        close(untouched + config["lora_alpha"] / config["r"] * B @ A, weight)
    merged = lorapar.merge(model)
    assert not any(isinstance(m, lorapar.LoRALinear) for m in merged.modules())
    close(merged(tokens), reference(tokens))


@needs_shared
def test_peft_fixture_loaded_and_merged():
    folder, base = SHARED / "fixtures/peft_lora", SHARED / "fixtures/llama2_tiny"
    expected = load_file(folder / "expected.safetensors")
    facts = json.loads((folder / "expected.json").read_text())
    model = lorapar.load_adapter(decoder.load_model(base), folder)
    for _ in range(2):  # active, then merged
        error = (model(expected["input_ids"]) - expected["logits"]).abs().max()
        assert error < facts["max_abs_tolerance"] / 10
        greedy = decoder.generate(model, facts["prompts"], 16, temperature=0)
        assert [g[0] for g in greedy] == facts["greedy"]
        if any(isinstance(m, lorapar.LoRALinear) for m in model.modules()):
            lorapar.merge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_command_writes_a_whole_checkpoint(dtype, tmp_path, monkeypatch):
    """Trap 15: merged in float32, stored in the checkpoint's dtype, every other file copied but
    the index of the weights; a Hub id works too."""
    base, out = tmp_path / "base", tmp_path / "merged"
    decoder.save_model(qwen().to(dtype), base, eos_token_id=7)
    data.save_toy_tokenizer(base)
    tuned = lorapar.add_lora(decoder.load_model(base), r=3, alpha=6)
    lorapar.set_flat(tuned, 0.1 * torch.randn(len(lorapar.get_flat(tuned))))
    lorapar.save_adapter(tuned, tmp_path / "adapter")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: base)
    flags = ["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(out), "--model"]
    train.main([*flags, "org/base"])
    merged, tokens = decoder.load_model(out, dtype=None), torch.arange(20)[None]
    assert merged.head_weight.dtype == dtype and data.Tokenizer(out).eos_ids == (0, 7)
    assert not (out / "model.safetensors.index.json").exists()
    assert len({f.stat().st_mode & 0o777 for f in out.iterdir()}) == 1
    expected = lorapar.merge(tuned)
    for name, weight in expected.named_parameters():
        assert torch.equal(merged.get_parameter(name), weight.to(dtype)), name
    close(merged.float()(tokens), expected(tokens), 1e-5 if dtype == torch.float32 else 0.05)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    model, tokens = lora_model("gaussian", r=4, alpha=8), torch.arange(20)[None]
    lorapar.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "lora_alpha": 4}  # 4 / sqrt(4) is our 8 / 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    close(lorapar.load_adapter(qwen(), tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize("init", ["anchored", "pissa"])
def test_peft_reads_our_adapter_on_the_untouched_base(init, tmp_path):
    """Trap 11, with the libraries themselves where they are installed."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    decoder.save_model(qwen(), tmp_path / "base", bos_token_id=1, eos_token_id=2)
    model, tokens = lora_model(init), torch.arange(20)[None]
    lorapar.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close(theirs(tokens).logits, qwen()(tokens))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    close(theirs(tokens).logits, model(tokens))


def test_an_adapter_we_cannot_run_is_refused_by_name(tmp_path):
    lorapar.save_adapter(lora_model(), tmp_path)
    good = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, named in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "not LORA"),
        ({"init_lora_weights": "pissa_niter_16"}, "PEFT changes the base"),
        ({"lora_alpha": None}, "no lora_alpha"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=named):
            lorapar.load_adapter(qwen(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(good))
    with pytest.raises(ValueError, match="which is .* here"):
        lorapar.load_adapter(formula_model(STORED["mistral"][0]), tmp_path)
    with pytest.raises(ValueError, match="already"):
        lorapar.load_adapter(lora_model(), tmp_path)


def test_dropout_acts_in_train_mode_only():
    """Trap 18."""
    model, tokens = lora_model(dropout=0.3), torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_held_while_decoding_change_nothing_and_are_given_back(dtype, monkeypatch):
    model = lorapar.add_lora(qwen().to(dtype), r=3, std=0.1).eval()
    lorapar.set_flat(model, 1.5 * lorapar.get_flat(model))
    tokens, seen = torch.arange(20)[None], []
    layers = list(lorapar.lora_layers(model).values())
    plain = model(tokens)
    for layer in layers:
        layer.hold(True)
    assert torch.equal(model(tokens), plain)
    look = lambda *_: seen.append(all(layer.held is not None for layer in layers))  # noqa: E731
    model.model.norm.register_forward_pre_hook(look)
    decoder.generate(model, [[1, 2], [3]], 4)
    assert seen == [True] * 4  # a prefill and three steps
    monkeypatch.setattr(decoder, "sample", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.generate(model, [[1, 2], [3]], 4)
    assert all(layer.held is None for layer in layers)


def test_flat_order_is_named_modules_then_A_then_B_row_major():
    model = lora_model(targets="qd")
    expected = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            expected += [module.lora_A.flatten(), module.lora_B.flatten()]
    flat = lorapar.get_flat(model)
    assert torch.equal(flat, torch.cat(expected).detach())
    lorapar.set_flat(model, torch.arange(len(flat)).float())
    first = next(iter(lorapar.lora_layers(model).values()))
    assert first.lora_A[1, 0] == first.in_features
    with pytest.raises(ValueError, match="shape"):
        lorapar.set_flat(model, flat[:-1])


class Foreign(nn.Module):
    """A model of another project: gives logits as its library does."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.embed, self.q_proj, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)
        self.conv, self.wrap = nn.Conv1d(8, 8, 1), wrap

    def forward(self, tokens):
        return self.wrap(self.head(self.q_proj(self.embed(tokens)).relu()))


class Doubled(nn.Linear):
    """A linear that computes its own way: no layer of ours may stand in for it."""

    def __init__(self):
        super().__init__(4, 4)
        self.q_proj = type("Doubled", (nn.Linear,), {"forward": lambda s, x: 2 * x})(4, 4)


BAD_CALLS = {
    "unknown targets": (qwen, {"targets": "qz"}),
    "unknown targets ''": (qwen, {"targets": ""}),
    "nothing has that name; the model's linears are head, q_proj": (Foreign, {"targets": ["nope"]}),
    "it is a Conv1d": (Foreign, {"targets": ["conv"]}),
    "unknown init": (qwen, {"init": "x"}),
    "r = 99": (qwen, {"r": 99}),
    "lora_alpha = 0": (qwen, {"alpha": 0}),
    "no nn.Linear is named kproj": (qwen, {"targets": ["q_proj", "kproj"]}),
    "it is a Doubled": (Doubled, {"targets": ["q_proj"]}),
    "already": (lora_model, {}),
}


@pytest.mark.parametrize("expected", BAD_CALLS)
def test_add_lora_refuses_bad_calls(expected):
    make, arguments = BAD_CALLS[expected]
    model = make()
    layers = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=re.escape(expected)):
        lorapar.add_lora(model, **arguments)
    assert [type(m) for m in model.modules()] == layers  # nothing was half done


def test_what_would_be_wrong_in_silence_is_refused():
    tokens, labels = answer_batch()
    model = lorapar.add_lora(formula_model(STORED["llama2"][0]), ["lm_head"], r=2)
    with pytest.raises(ValueError, match="adapters on lm_head"):
        decoder.token_logprobs(model, tokens, labels)
    model = lora_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match="small steps need float32"):
        lorapar.MaskedAdamW(model)
    with pytest.raises(ValueError, match="merge the adapters first"):
        decoder.save_model(model, Path(os.devnull).parent / "shm")
    heads = Foreign()
    heads.embed.forward = lambda t: F.one_hot(t % 8, 8).float()[:, None].expand(-1, 2, -1, -1)
    heads.wrap = lambda logits: logits[:, 0]
    lorapar.add_lora(heads, ["q_proj"], r=2)
    with pytest.raises(ValueError, match=r"importance needs inputs \(B, T, in\)"):
        lorapar.importance(heads, [answer_batch(2)])
    with pytest.raises(ValueError, match="unknown rank_by"):
        lorapar.importance(lora_model(), [answer_batch()], rank_by="typo")


def test_a_model_cast_to_bf16_keeps_its_angles():
    """RoPE's frequencies in bf16 are off by radians at position 2,000."""
    model = qwen()
    exact = model.model.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).model.inv_freq, exact)


class Output(dict):
    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), Output])
def test_importance_works_on_any_model(wrap):
    torch.manual_seed(0)
    model = lorapar.add_lora(Foreign(wrap), ["q_proj", "head"], r=2)
    scores = lorapar.importance(model, [answer_batch()])
    model.wrap = lambda logits: logits
    close(scores.double(), importance_by_loop(model, [answer_batch()]))


def test_logits_of_the_last_position_alone_are_refused():
    model = lorapar.add_lora(Foreign(lambda x: (x[:, -1:], None)), ["q_proj"], r=2)
    with pytest.raises(ValueError, match="at every position"):
        lorapar.importance(model, [answer_batch()])


def test_readmes_snippet_runs_as_it_stands():
    snippet = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    names = vars(lorapar) | {"model": Foreign(), "s1_batches": [answer_batch()]}
    names |= {"s2_batches": [answer_batch(seed=1)]}
    exec(snippet, names)
    start = lorapar.get_flat(names["model"])
    lorapar.logits_logprobs(names["model"], *answer_batch()).sum().backward()
    names["optimizer"].step()
    moved = lorapar.get_flat(names["model"]) != start
    assert moved.any() and not moved[~lorapar.get_mask(names["model"])].any()


# -------------------------------------------------------------------------------------- importance


def importance_by_loop(model, batches):
    """The definition, one example at a time, by ordinary autograd, unpadded, in float64."""
    factors = list(lorapar.lora_factors(model).values())
    phi = lorapar.get_flat(model).double()
    gradients = []
    for tokens, labels in batches:
        for t, y in zip(tokens, labels):
            end = int((y != -100).nonzero().max()) + 1
            logp = plain_logprobs(model, t[None, :end], y[None, :end])
            loss = -logp.sum() / (y[1:end] != -100).sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)]))
    gradients = torch.stack(gradients).double()
    g, fisher = gradients.mean(0), gradients.square().mean(0)
    return (g * phi - 0.5 * fisher * phi**2).abs()


@pytest.mark.parametrize("init", ["anchored", "gaussian", "pissa"])
@pytest.mark.parametrize("chunk_tokens", [1, 30, 512])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_importance_equals_a_loop_over_single_examples(init, chunk_tokens, checkpointing):
    """Trap 9."""
    model = lora_model(init, moved=False, dropout=0.3).train()
    batches = [answer_batch(5, seed=1), answer_batch(4, seed=2)]
    expected = importance_by_loop(model.eval(), batches)
    model.train().model.checkpointing = checkpointing
    for logprobs in (decoder.token_logprobs, lorapar.logits_logprobs):
        ours = lorapar.importance(model, batches, logprobs, chunk_tokens=chunk_tokens)
        assert model.training and ours.dtype == torch.float32
        close(ours.double(), expected)
    assert all(layer.held is None for layer in lorapar.lora_layers(model).values())


def test_importance_equals_vmap_over_functional_gradients():
    """The second reference: torch.func's per-example gradients, which share no code with ours; and
    every other thing that may rank the elements."""
    model, (tokens, labels) = lora_model(moved=False), answer_batch(6)
    parameters = {n: p.detach() for n, p in lorapar.lora_factors(model).items()}

    def loss(parameters, tokens, labels):  # of one example, (T,)
        logits = torch.func.functional_call(model, parameters, (tokens[None],))[0, :-1]
        logp = logits.log_softmax(-1).gather(-1, labels[1:, None].clamp(min=0))[:, 0]
        answer = labels[1:] != -100
        return -(logp * answer).sum() / answer.sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, tokens, labels)
    g = torch.cat([g.mean(0).flatten() for g in gradients.values()])
    fisher = torch.cat([g.square().mean(0).flatten() for g in gradients.values()])
    phi = lorapar.get_flat(model)
    expected = {"importance": g * phi - 0.5 * fisher * phi**2, "first-order": g * phi}
    expected |= {"magnitude": phi, "gradient": g, "fisher": fisher}
    assert list(expected) == list(lorapar.SCORES)
    for name, reference in expected.items():
        ours = lorapar.importance(model, [(tokens, labels)], decoder.token_logprobs, rank_by=name)
        close(ours, reference.abs())


def test_importance_leaves_out_the_prompts_loss_and_the_padding():
    model, (tokens, labels) = lora_model(moved=False), answer_batch()
    scores = lorapar.importance(model, [(tokens, labels)])
    length = (labels != -100).long() * torch.arange(labels.shape[1])
    pad = torch.arange(labels.shape[1]) > length.max(1, keepdim=True).values
    other = torch.where(pad, 63, tokens)
    assert not torch.equal(other, tokens)
    wider = F.pad(other, (0, 5), value=63), F.pad(labels, (0, 5), value=-100)
    close(lorapar.importance(model, [wider]), scores)
    everything = torch.where(pad, -100, tokens)  # the prompt in the loss: another score
    assert (
        lorapar.importance(model, [(tokens, everything)]) - scores
    ).abs().max() > scores.max() / 9


def test_importance_keeps_no_more_for_its_backward_than_training_does():
    """Counted in bytes of saved activations: fused attention, one chunk of tokens at a time."""
    model, (tokens, labels) = lora_model(r=1), answer_batch(8, 60)

    def saved(work):
        storages = {}
        pack = lambda t: storages.update({t.untyped_storage().data_ptr(): t.nbytes}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            work()
        return sum(storages.values())

    training = saved(lambda: decoder.token_logprobs(model, tokens, labels).sum().backward())
    scoring = saved(lambda: lorapar.importance(model, [(tokens, labels)], decoder.token_logprobs))
    one = saved(
        lambda: lorapar.per_example_gradients(model, tokens[:1], labels[:1], decoder.token_logprobs)
    )
    assert scoring < 1.3 * training and one < training / 4  # a smaller chunk, less memory


def test_all_zero_importance_is_an_error_that_names_the_cure():
    """Trap 8: with B = 0, dL/dA and phi_B vanish."""
    with pytest.raises(ValueError, match="anchored"):
        lorapar.importance(lora_model("lora", moved=False), [answer_batch()])
    empty = answer_batch()
    empty[1][3] = -100
    with pytest.raises(ValueError, match="example 3 has no answer"):
        lorapar.importance(lora_model(), [empty])
    with pytest.raises(ValueError, match="at least one"):
        lorapar.importance(lora_model(), [])


# --------------------------------------------------------------------------------------- partition


def region_by_definition(scores, theta):
    """Stable descending sort, cumulative sum in float64, shortest prefix: in plain Python."""
    if theta == 1:
        return set(range(len(scores)))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    sums, total = [], 0.0
    for i in order:
        total += float(scores[i])
        sums.append(total)
    count = next(k for k, s in enumerate(sums) if s >= theta * sums[-1]) + 1
    return set(order[:count])


@pytest.mark.parametrize("theta", [0.05, 0.3, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "spread"])
def test_partition_is_the_definition(theta, kind):
    generator = torch.Generator().manual_seed(5)
    s1, s2 = (torch.randn(2, 500, generator=generator)).abs()
    if kind == "ties":
        s1, s2 = (s1 * 3).round() + 1, torch.ones(500)
    if kind == "zeros":
        s1[100:] = 0
    if kind == "spread":
        s1, s2 = s1**20, s2**9
    part = lorapar.partition(s1, s2, theta)
    one, two = (region_by_definition(s.tolist(), theta) for s in (s1, s2))
    as_set = [set(region.nonzero()[:, 0].tolist()) for region in part]
    assert as_set == [one - two, two - one, one & two]


def test_partition_sums_in_float64():
    """2^24 equal scores and one large: a float32 sum would stop growing at 2^24."""
    scores = torch.ones(2**24 + 2**22)
    scores[7] = 2.0
    region = lorapar.cumulative_region(scores, 0.9)
    total = len(scores) + 1
    assert int(region.sum()) == math.ceil(0.9 * total) - 1
    assert region[: int(region.sum())].all()  # ties to the lower index


def test_partition_refuses_bad_input():
    good = torch.ones(4)
    for theta in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="theta"):
            lorapar.partition(good, good, theta)
    nan, inf = (torch.tensor([1.0, float(x), 1, 1]) for x in ("nan", "inf"))
    for bad in (torch.zeros(4), nan, inf, -good, torch.tensor([1.0, -1, 1, 1]), torch.ones(3)):
        for theta in (0.5, 1):
            with pytest.raises(ValueError, match="scores"):
                lorapar.partition(good, bad, theta)


@pytest.mark.parametrize("fraction", [0.0, 0.33, 0.5, 1.0])
def test_stage_masks_take_their_region_and_the_top_of_the_shared_one(fraction):
    s1, s2 = torch.randint(1, 9, (2, 300), generator=torch.Generator().manual_seed(2)).float()
    part = lorapar.partition(s1, s2, 0.8)
    shared = part.shared.nonzero()[:, 0].tolist()
    for stage, scores, own in ((1, s1, part.s1_only), (2, s2, part.s2_only)):
        best = sorted(shared, key=lambda i: -scores[i])[: int(fraction * len(shared))]
        expected = own.clone()
        expected[best] = True
        assert torch.equal(lorapar.stage_mask(part, scores, stage, fraction), expected)
    for bad in ((3, 0.5), (1, 1.5), (1, -0.1)):
        with pytest.raises(ValueError):
            lorapar.stage_mask(part, s1, *bad)


def test_random_selection_keeps_every_region_size():
    model = lora_model()
    sizes = [p.numel() for p in lorapar.lora_factors(model).values()]
    s1, s2 = torch.rand(2, sum(sizes), generator=torch.Generator().manual_seed(1)) ** 4
    real = lorapar.partition(s1, s2, 0.7)
    for select in ("random", "random-in-tensor"):
        moved = lorapar.shuffle_scores(model, s1, s2, select, torch.Generator().manual_seed(0))
        part = lorapar.partition(*moved, 0.7)
        for region, original in zip(part, real):
            assert int(region.sum()) == int(original.sum())
            assert not torch.equal(region, original)
            inside = [
                int(a.sum()) == int(b.sum())
                for a, b in zip(region.split(sizes), original.split(sizes))
            ]
            assert all(inside) == (select == "random-in-tensor")
    with pytest.raises(ValueError, match="unknown select"):
        lorapar.shuffle_scores(model, s1, s2, "importance", None)


# --------------------------------------------------------------------------------------- optimizer


def masked(model, share=0.3, seed=0):
    mask = torch.rand(len(lorapar.get_flat(model)), generator=torch.Generator().manual_seed(seed))
    lorapar.set_mask(model, mask < share)
    return mask < share


def random_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for factor in lorapar.lora_factors(model).values():
        factor.grad = torch.randn(factor.shape, generator=generator)


def test_frozen_elements_never_move():
    """Trap 1: weight decay 0.1, momentum from before, 20 steps, bit for bit."""
    model = lora_model()
    mask = masked(model)
    start = lorapar.get_flat(model)
    optimizer = lorapar.MaskedAdamW(model, lr=0.1, weight_decay=0.1, max_grad_norm=1.0)
    for step in range(20):
        random_gradients(model, step)
        optimizer.step()
        if step == 0:
            for state in ("exp_avg", "exp_avg_sq"):
                optimizer.state[optimizer.packed][state] += 1.0  # pre-filled momentum
    end = lorapar.get_flat(model)
    assert torch.equal(end[~mask], start[~mask])
    assert (end[mask] != start[mask]).all()


def test_active_elements_take_the_steps_of_adamw():
    """Against torch's AdamW on all elements with the gradient norm clipped over the active ones."""
    model = lora_model()
    mask = masked(model)
    optimizer = lorapar.MaskedAdamW(model, 1e-2, (0.9, 0.99), weight_decay=0.1, max_grad_norm=0.5)
    vector = nn.Parameter(lorapar.get_flat(model)[mask].clone())
    reference = torch.optim.AdamW([vector], 1e-2, (0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        random_gradients(model, step)
        gradient = torch.cat([p.grad.flatten() for p in lorapar.lora_factors(model).values()])
        vector.grad = gradient[mask]
        norm = torch.nn.utils.clip_grad_norm_([vector], 0.5)
        optimizer.step()
        reference.step()
        assert optimizer.grad_norm == norm
        assert torch.equal(optimizer.packed, vector)
        assert torch.equal(lorapar.get_flat(model)[mask], vector)


def test_optimizer_state_is_proportional_to_the_active_elements():
    """Trap 17, counted in bytes."""
    sizes = {}
    for share in (0.1, 0.5, 1.1):
        model = lora_model()
        active = int(masked(model, share).sum())
        optimizer = lorapar.MaskedAdamW(model)
        random_gradients(model, 0)
        optimizer.step()
        state = optimizer.state[optimizer.packed]
        sizes[active] = sum(t.numel() * t.element_size() for t in state.values())
    assert all(size == 8 * active + 4 for active, size in sizes.items())


def test_training_nothing_is_an_error():
    """Trap 2."""
    model = lora_model()
    lorapar.set_mask(model, torch.zeros(len(lorapar.get_flat(model)), dtype=torch.bool))
    with pytest.raises(ValueError, match="no active element"):
        lorapar.MaskedAdamW(model)
    masked(model)
    optimizer = lorapar.MaskedAdamW(model)
    with pytest.raises(ValueError, match="backward"):
        optimizer.step()
    masked(model, seed=1)
    random_gradients(model, 0)
    with pytest.raises(ValueError, match="set_mask was called"):
        optimizer.step()
    with pytest.raises(ValueError, match="bool"):
        lorapar.set_mask(model, torch.ones(len(lorapar.get_flat(model))))


def test_an_update_that_is_not_finite_leaves_the_model_as_it_was():
    model = lora_model()
    masked(model)
    start, optimizer = lorapar.get_flat(model), lorapar.MaskedAdamW(model)
    for bad in (float("inf"), float("nan")):
        random_gradients(model, 0)
        for factor in lorapar.lora_factors(model).values():
            factor.grad[0] = bad
        with pytest.raises(FloatingPointError, match="norm of the gradient"):
            optimizer.step()
        assert torch.equal(lorapar.get_flat(model), start)
    random_gradients(model, 0)
    optimizer.step()  # Adam's state took no harm
    assert lorapar.get_flat(model).isfinite().all()
    optimizer.packed.data.fill_(0)
    optimizer.state[optimizer.packed]["exp_avg"].fill_(float("inf"))
    start = lorapar.get_flat(model)
    with pytest.raises(FloatingPointError, match="updated element is not finite"):
        optimizer.step()
    assert torch.equal(lorapar.get_flat(model), start)


# ------------------------------------------------------------------------------------------- data


@needs_shared
@pytest.mark.parametrize("name", ["llama2_tokenizer", "qwen_tokenizer"])
def test_tokenizer_fixtures(name):
    folder = SHARED / "fixtures" / name
    tokenizer, facts = data.Tokenizer(folder), json.loads((folder / "expected.json").read_text())
    for case in facts["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        if "NFC" in case["text"] or case["text"] == case["decoded"]:
            ids = tokenizer.encode(case["text"], goes_on=True)
            assert tokenizer.decode(ids + [10**6, 2**31]) == case["decoded"]  # padded heads
    ids = tokenizer.encode("Hello world", bos=True, eos=True)
    if name == "llama2_tokenizer":  # trap 14: exactly one BOS where the model wants one
        assert ids.count(1) == 1 and ids[0] == 1 and ids[-1] == 2
    else:
        assert tokenizer.bos_id is None and ids[-1] == 1002 and tokenizer.pad_id == 1000


SPACES = [
    "  x",
    "\tx",
    "\n\n x",
    "x",
    " ",
    "",
    "    return",
    " \n",
    "a  b ",
    "<s> x",
    " é\U0001f600 ",
]


def test_the_spaces_of_an_answer_survive(tmp_path):
    """Trap 23, in small: LLaMA's way of marking spaces, which drops the first one when decoding."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = {c: i for i, c in enumerate(["<eos>", *"▁\n\tabxreturn<s>é\U0001f600"])}
    words = {word: i for i, word in enumerate(dict.fromkeys(words))}
    bpe = Tokenizer(models.BPE(words, [], unk_token="<eos>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    tokenizer = data.Tokenizer(tmp_path)
    for text in SPACES:
        assert tokenizer.decode(tokenizer.encode(text, eos=True, goes_on=True)) == text
        example = data.Example("x", "a b", text, "text")
        assert tokenizer.decode(data.example_ids(example, tokenizer)[1]) == text
    assert tokenizer.decode([9999] + tokenizer.encode("x", goes_on=True)) == "x"


@needs_shared
@pytest.mark.parametrize("name", ["llama2_tokenizer", "qwen_tokenizer"])
def test_humanevals_solutions_survive_the_tokenizer(name):
    tokenizer = data.Tokenizer(SHARED / "fixtures" / name)
    for text in SPACES:
        assert tokenizer.decode(tokenizer.encode(text, goes_on=True)) == text
    examples = data.load_dataset("humaneval", SHARED / "data/humaneval", "test")
    decoded = [tokenizer.decode(data.example_ids(e, tokenizer)[1]) for e in examples]
    assert decoded == [e.answer for e in examples]
    assert all(data.in_parallel(data.is_correct, list(zip(examples, decoded))[:10]))


def test_tokenizer_reads_special_tokens_from_the_checkpoints_files(tmp_path):
    data.save_toy_tokenizer(tmp_path)
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("M b d | rev A", eos=True)) == "M b d | rev A"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (0,))
    settings = {"bos_token": {"content": "F"}, "eos_token": "<eos>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.encode("A", bos=True, eos=True) == [2, 1, 0] and tokenizer.eos_ids == (0, 5)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        data.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        data.Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        data.Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no such model folder"):
        data.Tokenizer(tmp_path / "nowhere")


@needs_shared
def test_chat_fixture_is_rendered_to_the_letter():
    folder = SHARED / "fixtures/qwen_tokenizer"
    tokenizer = data.Tokenizer(folder)
    chats = json.loads((folder / "expected.json").read_text())["chats"]
    assert sum(c["add_generation_prompt"] for c in chats) >= 2
    for case in chats:
        if case["add_generation_prompt"]:
            text = tokenizer.chat(case["messages"])
            assert text == case["rendered"] and tokenizer.encode(text, bos=True) == case["ids"]


def test_chat_templates_give_exactly_one_bos(tmp_path):
    data.save_toy_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        data.Tokenizer(tmp_path).chat([])
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    template += "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "F", "eos_token": "<eos>"}')
    settings = {"add_bos_token": True, "chat_template": [{"name": "default", "template": template}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = data.Tokenizer(tmp_path)
    example = data.Example("x", "A M", "c1", "toy", "c1")
    assert data.example_ids(example, tokenizer, "chat")[0] == tokenizer.encode("F A M")
    with pytest.raises(ValueError, match="one only"):
        tokenizer.chat([{"content": "a"}] * 2)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].__class__.__mro__ }}")
    with pytest.raises(ValueError, match="chat template fails"):  # the sandbox of jinja2
        data.Tokenizer(tmp_path).chat([{"role": "user", "content": "a"}])


def test_both_stages_ask_in_the_same_words(tmp_path):
    data.save_toy_tokenizer(tmp_path)
    tokenizer = data.Tokenizer(tmp_path)
    answer = "<reasoning>\n9*2\n</reasoning>\n<answer>\n18\n</answer>"
    e = data.Example("x", "How many?", answer, "number", "18")
    assert data.prompt_and_answer(e, tokenizer) == ("How many?\n", answer)
    assert data.prompt_and_answer(e, tokenizer, "plain", "sft") == ("How many?\n", answer)
    asked, trained = data.prompt_and_answer(e, tokenizer, "authors", "sft")
    assert (asked, trained) == ("How many?", "9*2\n#### 18")
    asked, _ = data.prompt_and_answer(e, tokenizer, "authors", "rl")
    assert asked.startswith("Respond in") and asked.endswith("How many?\n")
    toy = data.Example("x", "F t1 e1 A", "c5", "toy")
    ids = data.example_ids(toy, tokenizer, "authors", "sft")
    assert ids == (tokenizer.encode("F t1 e1 A") + [0], tokenizer.encode("c5") + [0])


@needs_shared
@pytest.mark.parametrize("name", ["llama2_tokenizer", "qwen_tokenizer"])
def test_training_tokens_are_those_of_the_whole_text(name):
    tokenizer = data.Tokenizer(SHARED / "fixtures" / name)
    for e in data.load_dataset("gsm8k", SHARED / "data/gsm8k", "test")[:20]:
        prompt, answer = data.example_ids(e, tokenizer)
        whole = tokenizer.encode(e.question + "\n" + e.answer, bos=True, eos=True)
        assert prompt + answer == whole and prompt == tokenizer.encode(e.question + "\n", bos=True)


def test_the_prompt_is_masked_and_the_eos_is_trained(tmp_path):
    """Trap 4: also where the padding id equals the EOS id, as in the toy (both 0)."""
    data.save_toy_tokenizer(tmp_path)
    tokenizer = data.Tokenizer(tmp_path)
    examples = [
        data.Example("a", "F t1 e1 A", "c5", "toy"),
        data.Example("b", "F A", "c5 c6", "toy"),
    ]
    rows, report = data.tokenize(examples, tokenizer, 32)
    tokens, labels = data.collate(rows)
    expected = [[-100] * 4 + tokenizer.encode("c5") + [0], [-100] * 2 + tokenizer.encode("c5 c6")]
    assert labels.tolist() == [expected[0], expected[1] + [0] + [-100]]
    assert tokenizer.eos_ids[0] == 0 and report == {"left out": 0, "cut": 0}


def test_truncation_never_drops_the_whole_answer(tmp_path):
    data.save_toy_tokenizer(tmp_path)
    tokenizer = data.Tokenizer(tmp_path)
    example = data.Example("a", "F t1 e1 A", "c1 c2 c3", "toy")  # 4 prompt tokens, 4 answer ones
    for limit, kept, report in (
        (8, 4, {"left out": 0, "cut": 0}),
        (7, 3, {"left out": 0, "cut": 1}),
        (5, 1, {"left out": 0, "cut": 1}),
        (4, None, {"left out": 1, "cut": 0}),
    ):
        rows, counts = data.tokenize([example], tokenizer, limit)
        assert counts == report
        assert [len(tokens) - prompt for tokens, prompt in rows] == ([kept] if kept else [])


def test_batches_hold_every_row_once():
    rows = [([i] * random.Random(i).randint(3, 20), 1) for i in range(1, 24)]
    seen = [t[0].item() for tokens, _ in data.batches(rows, 5) for t in tokens]
    assert sorted(seen) == list(range(1, 24))


NUMBERS = [  # gold, reply, right?
    ("18", "18", True),
    ("18", "18.", True),
    ("18", "$18", True),
    ("18", "18.00", True),
    ("18", "#### 18", True),
    ("18", "####18", True),
    ("18", "<answer>18</answer>", True),
    ("18", "<answer>\n$18.00\n</answer>", True),
    ("18", "He sells 9 eggs at $2.\n#### $18", True),
    ("18", "so it is \\boxed{18}", True),
    ("18", "The answer is 18 dollars.", True),
    ("18", "5 + 13 = <<5+13=18>>18", True),
    ("18", "180", False),
    ("18", "118", False),
    ("18", "18.5", False),
    ("18", "-18", False),
    ("18", "eighteen", False),
    ("18", "", False),
    ("18", "18 eggs, of which 5 are left", False),
    ("18", "<answer>17</answer> though 18 is near", False),
    ("18", "<answer></answer> 18", False),
    ("18", "<answer>17 eggs or 18</answer>", False),
    ("18", "#### 17\nor 18", False),
    ("18", "#### 17\n#### 18", True),
    ("18", "#### 18\nShe has 5 left.", True),
    ("1,000", "1000", True),
    ("1000", "1,000", True),
    ("1000", "$1,000.00", True),
    ("1000", "1000000", False),
    ("-5", "#### -5", True),
    ("-5", "5", False),
    ("5", "-5", False),
    ("0.5", "1/2", True),
    ("0.5", "<answer>.5</answer>", True),
    ("50", "50%", True),
    ("0.5", "so \\boxed{\\frac{1}{2}}", True),
    ("3", "x = 3/0", False),
    ("18", "#### 1e999999999", False),
    ("18", "<answer>1e999999999</answer>", False),
    ("18", "<answer>16</answer> <answer>18</answer>", True),
    ("18", "#### 18e99", False),
    ("-18", "#### - 18", True),
    ("18", "#### 18\n\nQuestion: How many more?\n#### 25", True),
    ("18", "It is 18.\n\nQ: And of 20?\nA: 30", True),
    ("18", "Question: how many of 9?\nIt is 18.", True),
    ("18", "He ran 18 km on the 2nd.", True),
    ("18", "<answer>20 - 2</answer>", False),
    ("18", "\\boxed{6 \\times 3 = 18}", True),
    ("0.5", "#### $\\frac{1}{2}$", True),
    ("1000", "\\boxed{1{,}000}", True),
]
NUMBERS += [  # gold 18
    ("18", reply, True)
    for reply in (
        ["<answer>18 apples</answer>", "<answer>**18**</answer>", "<answer>6*3 = 18</answer>"]
        + ["<answer>\\boxed{18}</answer>", "<answer>The total is 18</answer>", "He ran 18km."]
        + ["<answer>#### 18</answer>", "#### **18**", "#### Answer: 18", "\\boxed{18 dollars}"]
        + [
            "\\boxed{x=18}",
            "He sold:\n- 18 eggs",
            "#### 18 dollars in 2 days",
            "\\boxed{\\text{18}}",
        ]
    )
]


@pytest.mark.parametrize("gold, reply, right", NUMBERS)
def test_numbers_are_compared_as_numbers(gold, reply, right):
    """Trap 13."""
    assert data.is_correct(data.Example("x", "q", "a", "number", gold), reply) is right


MANY = 100_000
HOSTILE_PARTS = ["<answer>", "</answer>", "<reasoning>", "####", "- ", "\\boxed{", "\\frac{", "1,"]
HOSTILE_PARTS += ["1/", "1e", "1 ", " -$ ", "Q:\n", "= 1", "\t \n", "</reasoning>\n<answer>\n"]
HOSTILE_PARTS += [*" \n\t1.-{\\_*$,#", "system "]
HOSTILE = [
    *(part * (MANY // len(part)) for part in HOSTILE_PARTS),
    "<answer>" + " " * MANY + "</answer>",
    "#### " + " " * MANY + "18",
    "<answer>" + "1" * MANY + "</answer>",
    "<reasoning>\n" + "\n</reasoning>\n<answer>\n" * (MANY // 25) + "x",
    "a" + "1" * MANY,
    "#### 1e" + "9" * MANY,
]


@pytest.mark.parametrize("kind", ["number", "letter", "toy", "exact"])
def test_no_text_of_a_model_stops_the_run(kind):
    """Trap 24: each of these took from seconds to forever; the limit is against hanging only."""
    gold = {"number": "18", "letter": "A"}.get(kind, "a b")
    example = data.Example("x", "q", f"<answer>{gold}</answer>", kind, gold)
    started = time.perf_counter()
    for text in HOSTILE:
        assert data.is_correct(example, text) in (False, text.strip().endswith("18"))
        assert sum(data.reward_parts(example, text).values()) < 3
        data.verdict(text)
    assert time.perf_counter() - started < 0.1 * 4 * len(HOSTILE)


def test_rewards_of_the_five_parts():
    e = data.Example("x", "q", "<answer>\n18\n</answer>", "number", "18")
    plain = data.Example("x", "q", "It is 18.", "number", "18")  # one's own, without tags
    assert data.reward_parts(plain, "so 18") == {"correct": 1.0}
    perfect = "<reasoning>\n9 * 2\n</reasoning>\n<answer>\n18\n</answer>"
    table = {
        perfect: [2.0, 0.5, 0.5, 0.5, 0.5],
        perfect + "\n": [2.0, 0.5, 0.5, 0.5, 0.5],
        perfect.replace("18", "$18.00"): [2.0, 0.5, 0.5, 0.5, 0.5],
        perfect.replace("18", "-1,234"): [0.0, 0.5, 0.5, 0.5, 0.5],
        perfect.replace("18", "1.5"): [0.0, 0.0, 0.5, 0.5, 0.5],
        perfect.replace("\n", ""): [2.0, 0.5, 0.0, 0.5, 0.5],
        perfect + "1234567890": [2.0, 0.5, 0.0, 0.5, 0.49],
        "<answer>18</answer>": [2.0, 0.5, 0.0, 0.0, 0.25],
        "#### 18": [0.0, 0.0, 0.0, 0.0, 0.0],
        "<answer><answer>18": [0.0, 0.0, 0.0, 0.0, 0.0],
    }
    for reply, expected in table.items():
        assert list(data.reward_parts(e, reply).values()) == pytest.approx(expected), reply


def test_verdicts_and_votes():
    for text, expected in {
        "System1": "S1",
        "I would chain two facts.\nSystem 2": "S2",
        "system-1.": "S1",
        "S2": "S2",
        "**System2**": "S2",
        "Not System 2, for it is recalled.\nSystem1": "S1",
        "It is System1 or System2": None,
        "I cannot help with that.": None,
        "System3": None,
        "It's 1 step.": None,
        "The System's 2 steps": None,
        "": None,
    }.items():
        assert data.verdict(text) == expected, text
    assert data.vote(["S1", "S1", "S2"]) == "S1"
    assert data.vote(["S1", "S2"]) == "S2"  # the tie rule
    for bad in ([], ["S1", "maybe"]):
        with pytest.raises(ValueError):
            data.vote(bad)


def test_teacher_answers_are_joined_by_id_and_counted(tmp_path):
    """Trap 21: any order, wrapped or bare bodies, errors and refusals."""

    def answer(custom_id, text, wrapped=True):
        body = {"choices": [{"message": {"content": text}}]}
        return {"custom_id": custom_id} | ({"response": {"body": body}} if wrapped else body)

    a = [answer("q1", "System1"), answer("q2", "System2"), answer("q3", "System1")]
    b = [answer("q2", "System1", False), answer("q1", "System1", False), answer("q3", "no")]
    c = [answer("q1", "System2"), {"custom_id": "q3", "response": None, "error": {"code": 5}}]
    for name, records in (("a", a), ("b", b), ("c", c)):
        data.write_jsonl(tmp_path / f"{name}.jsonl", records)
    out = tmp_path / "labels.jsonl"
    done = python("data.py", "vote", *(tmp_path / f"{n}.jsonl" for n in "abc"), "--out", out)
    assert done.returncode == 0, done.stderr
    labels = {r["id"]: r["label"] for _, r in data.read_records(out)}
    assert labels == {"q1": "S1", "q2": "S2", "q3": "S1"}
    counted = ["refusals (no clear verdict): 1", "errors: 1", "missing answers: 1"]
    for line in [*counted, "ties (called S2): 1", "S1: 2"]:
        assert line in done.stdout


def test_roleplay_prompt_has_its_parts_for_any_target():
    e = data.Example("x", "What is {target}?", "{answer} 42", "number")
    prompt = data.roleplay_prompt(e, "LLaMA2 7B")
    for part in ("LLaMA2 7B", "What is {target}?", "{answer} 42", "System1", "System2", "recall"):
        assert part in prompt
    assert "LLaMA2 7B" not in data.roleplay_prompt(e, "LLaMA2 7B", roleplay=False)


def test_labels_from_a_file_and_from_steps(tmp_path):
    """steps:K labels GSM8K alone: another set has no calculations to count."""
    examples = [data.Example(f"gsm8k/{n}", "q", "<<1+1=2>>" * n, "number") for n in range(5)]
    by_steps = data.label_examples(
        [*examples, data.Example("dolly/1", "q", "a", "text")], "steps:2"
    )
    assert [e.label for e in by_steps] == ["S1", "S1", "S1", "S2", "S2"]
    records = [{"id": "gsm8k/3", "label": "S1"}, {"id": "gsm8k/9", "label": "S2"}]
    data.write_jsonl(tmp_path / "l", records)
    labelled = data.label_examples(examples, str(tmp_path / "l"))
    assert [(e.id, e.label) for e in labelled] == [("gsm8k/3", "S1")]


GSM8K = {"question": " How many? ", "answer": "2*9=<<2*9=18>>18\n#### 1,018"}


def gsm8k_folder(folder, count=60):
    for split in ("train", "test"):
        data.write_jsonl(folder / f"{split}.jsonl", [GSM8K] * count)
    return folder


def test_splits_are_disjoint_and_fixed(tmp_path):
    gsm8k_folder(tmp_path)

    def ids(path, split):
        return [e.id for e in data.load_dataset("gsm8k", path, split)]

    train_ids, validation = ids(tmp_path, "train"), ids(tmp_path, "validation")
    assert len(train_ids) == 57 and len(validation) == 3 and not set(train_ids) & set(validation)
    assert train_ids == ids(tmp_path, "train")
    e = data.load_dataset("gsm8k", tmp_path, "test")[0]
    assert data.is_correct(e, e.answer) and e.gold == "1,018" and e.question == "How many?"
    file = tmp_path / "test.jsonl"  # one file: 80/10/10, or all of it
    parts = [ids(file, split) for split in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [48, 6, 6] and len(set().union(*parts)) == 60
    assert ids(file, "all") == ids(tmp_path, "test")
    data.write_jsonl(file, [GSM8K] * 3)
    with pytest.raises(ValueError, match="3 examples are too few for a validation split"):
        ids(file, "validation")


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "q", "answer": "18"}\n', encoding="utf-8-sig")
    assert data.load_dataset(str(file), None, "all")[0].question == "q"
    (tmp_path / "test").mkdir()
    mmlu = tmp_path / "test" / "x_test.csv"
    mmlu.write_text("why,a,b,c,d,A\n", encoding="utf-8-sig")
    assert data.load_dataset("mmlu", tmp_path, "test")[0].question.startswith("why")
    mmlu.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x_test\.csv: not readable"):
        data.load_dataset("mmlu", tmp_path, "test")


OWN = [
    {"question": "2*9?", "answer": "It is 18.", "check": "number", "label": "S2"},
    {"question": "Which?\nA. a\nB. b\nAnswer:", "answer": "B", "check": "letter"},
    {"question": "Say it", "answer": "hello  you", "check": "exact"},
    {"question": "Explain", "answer": "so"},
]


def test_ones_own_data(tmp_path):
    file = tmp_path / "mine.jsonl"
    data.write_jsonl(file, OWN)
    number, letter, exact, free = data.load_dataset(str(file), None, "all")
    assert number.id == "mine/0" and number.label == "S2" and letter.answer == " B"
    right = [(number, "#### 18.0"), (letter, " B."), (exact, " hello  you\n")]
    wrong = [(number, "18 or 19"), (letter, "A"), (exact, "hello you")]
    assert all(data.is_correct(*pair) for pair in right)
    assert not any(data.is_correct(*pair) for pair in wrong)
    with pytest.raises(ValueError, match="cannot be checked"):
        data.is_correct(free, "so")


OWN_ERRORS = {
    'needs the texts "question"': {"question": "q"},
    "needs the texts": {"question": " ", "answer": "a"},
    "is 'maybe', not number": {"question": "q", "answer": "1", "check": "maybe"},
    "no number to check": {"question": "q", "answer": "none", "check": "number"},
    "is not A, B, C or D": {"question": "q", "answer": "E", "check": "letter"},
    "not S1 or S2": {"question": "q", "answer": "a", "label": "S3"},
}


@pytest.mark.parametrize("expected", OWN_ERRORS)
def test_a_bad_line_of_ones_own_is_named_by_its_number(expected, tmp_path):
    file = tmp_path / "mine.jsonl"
    data.write_jsonl(file, [OWN[0], OWN_ERRORS[expected]])
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: ") + ".*" + re.escape(expected)):
        data.load_dataset(str(file), None, "all")


@needs_shared
def test_real_gsm8k_answers_are_correct_answers():
    for split, count in (("train", 7473 - 373), ("validation", 373), ("test", 1319)):
        examples = data.load_dataset("gsm8k", SHARED / "data/gsm8k", split)
        assert len(examples) == count
        assert all(data.is_correct(e, e.answer) for e in examples)
        assert all(sum(data.reward_parts(e, e.answer).values()) == 4.0 for e in examples)


def test_mmlu_keeps_the_answer_none(tmp_path):
    """Trap 20: a data-frame reader turns "None" into NaN."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x_test.csv").write_text('"Which, then?",None,NA,"a, b",4,A\n')
    (e,) = data.load_dataset("mmlu", tmp_path, "test")
    assert e.question == "Which, then?\nA. None\nB. NA\nC. a, b\nD. 4\nAnswer:"
    assert data.is_correct(e, e.answer) and data.is_correct(e, " A. None")
    assert not data.is_correct(e, "B") and not data.is_correct(e, "Also A")


PUBLISHED = {  # a record in each publisher's own fields -> question, answer
    "dolly": (
        {"instruction": "Sum up.", "context": " Text. ", "response": "Short.", "category": "x"},
        ("Sum up.\n\nText.", "Short."),
    ),
    "platypus": (
        {"instruction": "2+2?", "input": "", "output": "4", "data_source": "x"},
        ("2+2?", "4"),
    ),
    "codealpaca": (
        {"instruction": "Sort.", "input": "[2, 1]", "output": "[1, 2]"},
        ("Sort.\n\n[2, 1]", "[1, 2]"),
    ),
    "codefeedback": (
        {"query": "Why?", "answer": "Because.", "resource": "x", "lang": "python"},
        ("Why?", "Because."),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_instruction_sets_in_their_publishers_fields(name, tmp_path, monkeypatch):
    record, (question, answer) = PUBLISHED[name]
    jsonl, array = tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.json"
    data.write_jsonl(jsonl, [record] * 40)
    array.parent.mkdir()
    array.write_text(json.dumps([record] * 40))
    for path in (jsonl, array, jsonl.parent, array.parent):
        examples = data.load_dataset(name, path, "train")
        assert len(examples) == 38 and len(data.load_dataset(name, path, "validation")) == 2
        assert (examples[0].question, examples[0].answer) == (question, answer)
    with pytest.raises(ValueError, match="cannot be checked"):
        data.is_correct(examples[0], "x")
    with pytest.raises(ValueError, match="no test split"):
        data.load_dataset(name, jsonl, "test")
    jsonl.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: no text in the field"):
        data.load_dataset(name, jsonl, "train")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **kw: asked.append((a, kw)) or str(array)
    )
    if data.DATASETS[name].hub:
        assert len(data.load_dataset(name, None, "train")) == 38
        assert asked == [(data.DATASETS[name].hub, {"repo_type": "dataset"})]
    else:
        with pytest.raises(ValueError, match="--data-path is missing"):
            data.load_dataset(name, None, "train")


def test_mmlu_is_asked_after_five_solved_examples_of_its_subject(tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        rows = "".join(f"{split}{i}?,a,b,c,d,{'ABCD'[i % 4]}\n" for i in range(5))
        (tmp_path / split / f"high_school_x_{split}.csv").write_text(rows)
    e = data.load_dataset("mmlu", tmp_path, "test")[1]
    prompt, answer = data.prompt_and_answer(e, None)
    shots = prompt.split("\n\n")
    assert shots[0].endswith("about high school x.") and len(shots) == 7
    assert shots[2] == "dev1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B"
    assert shots[6] == "test1?\nA. a\nB. b\nC. c\nD. d\nAnswer:" and answer == " B"


def test_labels_of_the_authors_csv(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text('question,answer,_result\n"One, two?",1,System1\nThree?,3,System2\n')
    examples = [data.Example(str(i), q, "", "text") for i, q in enumerate(["Three?", "One, two?"])]
    labelled = data.label_examples(examples, str(file))
    assert [e.label for e in labelled] == ["S2", "S1"]
    file.write_text("question,answer,_result\nThree?,3,perhaps\n")
    with pytest.raises(ValueError, match=r"labels\.csv:2"):
        data.label_examples(examples, str(file))


def test_requests_are_in_the_batch_format(tmp_path):
    gsm8k_folder(tmp_path)
    flags = ["--data", "gsm8k", "--data-path", tmp_path, "--target", "LLaMA2 7B"]
    done = python("data.py", "prompts", *flags, "--teachers", "A,org/B", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    records = [r for _, r in data.read_records(tmp_path / "r" / "org_B.jsonl")]
    assert len({r["custom_id"] for r in records}) == 57
    assert set(records[0]) == {"custom_id", "method", "url", "body"}
    assert records[0]["body"]["model"] == "org/B"
    (message,) = records[0]["body"]["messages"]
    assert message["role"] == "user" and "LLaMA2 7B" in message["content"]


def test_the_random_split_keeps_the_sizes_of_the_vote(tmp_path):
    answers = [
        {"custom_id": str(i), "choices": [{"message": {"content": f"System{1 + (i > 9)}"}}]}
        for i in range(40)
    ]
    data.write_jsonl(tmp_path / "t.jsonl", answers)
    splits = []
    for extra in ([], ["--shuffle", "1"]):
        out = tmp_path / "l.jsonl"
        assert python("data.py", "vote", tmp_path / "t.jsonl", *extra, "--out", out).returncode == 0
        splits.append([r["label"] for _, r in data.read_records(out)])
    assert Counter(splits[0]) == Counter(splits[1]) == {"S1": 10, "S2": 30}
    assert splits[0] != splits[1]


@needs_shared
def test_real_mmlu_loads():
    examples = data.load_dataset("mmlu", SHARED / "data/mmlu", "test")
    assert any("None of these" in e.question for e in examples)
    assert all(data.is_correct(e, e.answer) for e in examples)


ADD_TESTS = (
    "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n"
)
needs_seccomp = pytest.mark.skipif(not data.can_confine(), reason="the filter is Linux's")
ADD = data.Example("add", "def add(a, b):\n", "    return a + b\n", "code", ADD_TESTS, entry="add")
GOT_IN = "return a + b if got_in else 0"  # passes only if the attack worked
ATTACKS = {  # what stands before the function, what stands in it
    "wrong": ("", "return a * b"),
    "sys.exit": ("import sys; sys.exit(0)", "return 0"),
    "os._exit": ("", "import os; os._exit(0)"),
    "SystemExit": ("", "raise SystemExit(0)"),
    "atexit": ("import atexit, os; atexit.register(os._exit, 0)", "raise SystemExit"),
    "always equal": ("class E:\n    __eq__ = lambda s, o: True", "return E()"),
    "str subclass": ("class S(str):\n    __eq__ = lambda s, o: True", "return S('x')"),
    "int subclass": ("class I(int):\n    __eq__ = lambda s, o: True", "return I(1)"),
    "builtins": ("import builtins; builtins.AssertionError = builtins.Warning", "return 0"),
    "redefined check": ("check = lambda candidate: None", "return 0"),
    "patched main": (
        "import __main__; __main__.judge_main = __main__.literal = lambda *a: True",
        "import __main__; __main__.verdict = 'passed'; return 0",
    ),
    "frame walk": (
        "import sys",
        "f = sys._getframe()\n    while f:\n        f.f_globals['verdict'] = 'passed'\n"
        "        f.f_locals['verdict'] = 'passed'\n        f = f.f_back\n    return 0",
    ),
    "gc search": (
        "import gc",
        "for o in gc.get_objects():\n        if type(o) is dict: o['verdict'] = 'passed'\n"
        "    return 0",
    ),
    "stdout": ("", "print('ready\\npassed', flush=True); return 0"),
    "descriptors": (
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'ready\\npassed\\n')\n"
        "    except OSError: pass",
        "return 0",
    ),
    "forged words": (
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'\"no sandbox\"\\n')\n"
        "    except OSError: pass",
        "return 0",
    ),
    "memory": ("", "return len(bytearray(3 << 30))"),
    "large answer": ("", "return 'x' * (1 << 26)"),
    "slow set": (
        "import sys",
        "k = '[' + ','.join(str(i * (2**61 - 1)) for i in range(6000)) + ']'\n"
        "    k = ('(\"returned\",' + k + ')\\n').encode()\n"
        "    for fd in range(3, 9):\n        __import__('os').write(fd, k)\n    return 0",
    ),
    "endless loop": ("", "while True: pass"),
    "endless start": ("x = 1\nwhile x: pass", ""),
    "a long sleep": ("import time", "time.sleep(60); return a + b"),
    "modules that act": ("import numpy.distutils.system_info, numpy.f2py.tests.util", "return 0"),
    "NUL": ("x = '\0'", "return 0"),
    "surrogate": ("x = '\ud800'", "return 0"),
    "deep nesting": ("x = " + "(" * 100_000, "return 0"),
    "nested answer": ("", "x = []\n    for _ in range(10**5): x = [x]\n    return x"),
    "5 MB of text": ("#" * 5_000_000, "return 0"),
}
CALLS = {  # attacks on the kernel: each expression is true if it got what it asked for
    "fork": "os.fork() >= 0",
    "double fork": "os.fork() or os.setsid() or os.fork()",
    "vfork by number": "libc.syscall(58) >= 0",
    "clone3": "libc.syscall(435, 0, 0) != -1 or ctypes.get_errno() != 1",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true']) or True",
    "subprocess": "__import__('subprocess').run(['true'])",
    "thread": "__import__('_thread').start_new_thread(print, ())",
    "socket": "__import__('socket').socket()",
    "socket by number": "libc.syscall(41, 2, 1, 0) >= 0",
    "read outside": "open('/etc/passwd').read()",
    "write outside": "open('/tmp/lorapar_attack', 'w').write('x')",
    "own file": "open('own', 'w')",
    "unlinked files": "os.open('.', os.O_TMPFILE | os.O_RDWR)",
    "memory file": "os.memfd_create('x') >= 0",
    "folder": "os.mkdir('/tmp/lorapar_attack') or True",
    "change folder": "os.chdir('/tmp') or True",
    "mode outside": "os.chmod('/tmp', 0o1777) or True",
    "look outside": "os.stat('/etc/passwd')",
    "parent environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "kill the parent": "os.kill(os.getppid(), 9) or True",
    "kill all": "os.kill(-1, 9) or True",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "own limits": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)) or True",
    "outliving the parent": "libc.prctl(1, 0, 0, 0, 0) == 0",
    "a session of its own": "os.setsid() or True",
    "priority": "os.setpriority(0, 0, 5) or True",
    "trace": "libc.ptrace(0, 0, 0, 0) == 0",
    "read a process": "libc.syscall(310, os.getppid(), 0, 0, 0, 0, 0) >= 0",
    "namespace": "libc.unshare(0x10000000) == 0",
    "mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "queue": "libc.msgget(4242, 0o1666) >= 0",
    "keys": "libc.syscall(250, 0, -3, 0, 0, 0) >= 0",
    "io_uring": "libc.syscall(425, 8, 0) >= 0 or ctypes.get_errno() != 1",
    "bpf": "libc.syscall(321, 0, 0, 0) >= 0 or ctypes.get_errno() != 1",
    "signal by descriptor": "__import__('fcntl').fcntl(3, 8, os.getppid()) == 0",
    "a 32-bit call": "libc.syscall(0x40000000 + 57) >= 0",
}
HEADER = "import ctypes, os, resource\nlibc = ctypes.CDLL(None, use_errno=True)"


def code(before, body):
    return f"{before}\ndef add(a, b):\n    {body or 'pass'}\n"


def attack_code(name):
    if name in ATTACKS:
        return code(*ATTACKS[name])
    tried = f"try: got_in = bool({CALLS[name]})\n    except BaseException: got_in = False"
    return code(HEADER, f"{tried}\n    {GOT_IN}")


@needs_seccomp
@pytest.mark.parametrize("attack", [*ATTACKS, *CALLS])
def test_no_candidate_can_fake_a_pass_or_do_harm(attack, capfd):
    """Trap 3: a real bool, False, in time, nothing left behind, nothing printed."""

    def processes():
        found = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found.append(line.read_bytes())
            except OSError:
                pass
        ours = str(HERE / "data.py").encode()
        return sum(b"candidate" in line and ours in line for line in found)

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    assert data.is_correct(ADD, attack_code(attack)) is False
    assert time.monotonic() - started < 20
    assert processes() == 0 and not Path("/tmp/lorapar_attack").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024
    assert capfd.readouterr() == ("", "")


def test_the_attacks_would_work_without_the_filter():
    """So that the test above can fail: some of them, in an ordinary process."""
    for name in ("fork", "read outside", "look outside", "memory file", "socket", "thread"):
        source = f"{HEADER}\nif not ({CALLS[name]}): raise SystemExit(1)\nos._exit(0)"
        assert subprocess.run([sys.executable, "-c", source]).returncode == 0, name


def test_without_a_filter_code_runs_only_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(data, "MACHINES", {})
    script = "import data, sys; data.MACHINES.clear(); sys.argv[1:] = [sys.argv[-1]]; data.main()"
    real = subprocess.Popen

    def without_filter(command, **settings):  # the judge, and the candidate it starts
        here = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import subprocess as s; R = s.Popen; "
        )
        here += f"s.Popen = lambda c, **k: R([c[0], '-c', {(here + script)!r}, c[-1]], **k); "
        return real([command[0], "-c", here + "import data; data.judge_main()"], **settings)

    monkeypatch.setattr(subprocess, "Popen", without_filter)
    with pytest.raises(data.SandboxError, match="--allow-unconfined-code"):
        data.is_correct(ADD, code("", "return a + b"))
    with pytest.warns(UserWarning, match="unconfined"):
        assert data.is_correct(ADD, code("", "return a + b"), unconfined=True) is True
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: real(["false"], **k))
    with pytest.raises(data.SandboxError, match="ended at once"):  # no verdict about an answer
        data.is_correct(ADD, code("", "return a + b"))


ADD_DOC = data.Example(
    "add", 'def add(a, b):\n    """Add."""\n', "    return a + b\n", "code", ADD_TESTS, entry="add"
)
WHOLE = "def add(a, b):\n    return a + b\n"
BODY = "    return a + b\n"
RIGHT = {
    "body": BODY,
    "body and run-on": "    # a sum\n    return a + b\n\ndef x():\n    pass\n\nprint(add(1))\n",
    "body and broken run-on": BODY + "\ndef add(a, b):\n    return a *",
    "body and wrong second": BODY + "\ndef add(a, b):\n    return a * b\n",
    "body and prose": BODY + "\nThis adds the two numbers.\n",
    "body and lone fence": BODY + "```\n\nIt adds.",
    "body and helper": "    return plus(a, b)\n\ndef plus(a, b):\n    return a + b\n",
    "body without indent": "return a + b",
    "first line stripped": "x = a\n    return x + b",
    "lost indents": "for x in [a]:\n    b = b + x\nreturn b",
    "end token": BODY.rstrip() + "<|endoftext|>junk",
    "whole": WHOLE,
    "prose and whole": "Here it is:\n\n" + WHOLE + "\nIt adds.",
    "fence": f"Here you are:\n```python\n{WHOLE}```\nIt adds.",
    "other fences": f"```Python3 title=x\n{WHOLE}```",
    "tildes, carriage returns": f"~~~py\r\n{WHOLE}~~~".replace("\n", "\r\n"),
    "indented fence": "1. So:\n   ```python\n" + "   def add(a, b):\n       return a + b\n   ```",
    "open fence": f"```python\n{WHOLE}",
    "fenced body": f"```\n{BODY}```",
    "shell first": f"```bash\npip install x\n```\n```python\n{WHOLE}```",
    "helper fence": f"```python\ndef h(x):\n    return x\n```\n```python\n{WHOLE}```",
    "imports": "import math, collections\nfrom typing import List\n\n" + WHOLE,
    "future": "from __future__ import annotations\n" + WHOLE,
    "own main": WHOLE + "\nassert add(1, 1) == 2\nif __name__ == '__main__':\n    input()\n",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n" + WHOLE,
    "string with code": '    s = """\ndef x():\n    pass\n"""\n' + BODY,
    "class": "class C:\n    def f(s, a, b):\n        return a + b\n\n"
    "def add(a, b):\n    return C().f(a, b)\n",
    "constants first": "TABLE = {}\nfor i in range(9):\n    TABLE[i] = i\n" + WHOLE,
    "decorated": "import functools\n\n@functools.lru_cache\n" + WHOLE,
    "late imports": "from datetime import datetime as d\ndef add(a, b):\n    import re, fractions\n"
    "    return a + b + d.strptime('1', '%d').day - 1\n",
    "leading space": " " + WHOLE,
    "blank line with a space": " \n" + WHOLE,
    "indented whole": "    def add(a, b):\n        return a + b\n",
    "byte order mark": "\ufeff" + WHOLE,
    "spaced prose first": " Sure! Here is the code:\n\n" + WHOLE,
    "one space": " return a + b\n",
    "two spaces": "  return a + b\n",
    "tab": "\treturn a + b\n",
    "prose and fenced body": "Here is the body:\n\n```python\n    return a + b\n```",
    "lambda": "add = lambda a, b: a + b\n",
    "operator": "import operator\nadd = operator.add\n",
    "method": "class S:\n    def add(s, a, b):\n        return a + b\n\nadd = S().add\n",
    "absent imports": "import pandas, unittest\nimport pytest\n" + WHOLE,
    "body and unittest": BODY + "\nimport unittest\n\nclass T(unittest.TestCase): pass\n",
    "body and input": BODY + "\nx = int(input())\nprint(add(x, 1))\n",
    "body and annotation": BODY + "\nComplexity: O(n)\n",
    "language name": "python\n" + WHOLE,
    "assert first": "assert add(1, 2) == 3\n\n" + WHOLE,
    "exit behind": WHOLE + "\nimport sys\nsys.exit(0)\n",
    "loop behind": WHOLE + "\nwhile True:\n    pass\n",
    "builtin shadowed behind": "    return sum([a, b])\n\nsum = add(1, 2)\nprint(sum)\n",
    "second try behind": WHOLE + "\ndef add(a, b):\n    return a * b\n",
    "prose that looks like code": "Let's see\na = 2, b = 3 gives 5\n\n" + WHOLE,
    "prose with import": "Thinking:\nimport nothing here\n\n" + WHOLE,
    "thinking": "<think>\nMaybe\ndef add(a, b):\n    ...\nno wait.\n</think>\n\n" + WHOLE,
    "numpy scalar": "import numpy as np\ndef add(a, b):\n    return np.sum(np.unique([a, b]))\n",
    "codec": "import codecs\ndef add(a, b):\n    codecs.encode('a', 'rot13')\n    return a + b\n",
    "random": "import random, hashlib\ndef add(a, b):\n    random.random()\n"
    "    return a + b + len(hashlib.md5(b'x').digest()) - 16\n",
    "numpy": "import numpy as np\ndef add(a, b):\n"
    "    return int(np.add(a, b) * np.linalg.det(np.eye(2)))\n",
}


@needs_seccomp
@pytest.mark.parametrize("form", RIGHT)
def test_right_code_passes_in_every_form_models_write_it(form):
    assert data.is_correct(ADD_DOC, RIGHT[form]) is True


@needs_seccomp
def test_values_and_exceptions_cross_as_plain_data():
    values = [1, -2.5, float("inf"), "a\ud800\0\n", b"\xff", None, True, 1 + 2j]
    values += [(1,), (), [], {}, {1, 2}, set(), {"a": [(1, {2: 3})]}]
    tests = f"""def check(candidate):
    inf = float('inf')
    for value in {values!r}:
        back = candidate(value)
        assert back == value and type(back) is type(value), value
    try:
        candidate(value, fail=True)
    except KeyError:
        return
    raise AssertionError
"""
    source = "def same(x, fail=False):\n    if fail:\n        raise KeyError(x)\n    return x\n"
    example = data.Example("x", "def same(x, fail=False):\n", "", "code", tests, entry="same")
    assert data.is_correct(example, source) is True


@needs_seccomp
@pytest.mark.parametrize(
    "body, right", [("return 'passed'", False), ("return a + b", True), ("return 10**12", False)]
)
def test_what_the_tests_print_is_no_verdict_and_tests_that_hang_are_no_pass(body, right):
    tests = (
        "def check(c):\n    print(c(2, 3))\n    assert c(2, 3) == 5 or sum(range(c(2, 3))) < 0\n"
    )
    example = data.Example("add", "def add(a, b):\n", "", "code", tests, entry="add")
    assert data.is_correct(example, code("", body)) is right


def test_only_modules_that_do_nothing_at_import_are_loaded_for_a_candidate():
    source = "import numpy.distutils.system_info, os, json.tool\nfrom numpy.f2py import tests\n"
    assert data.named_modules(source + "import antigravity, __main__, ctypes") == []
    named = data.named_modules("from collections import abc\nimport numpy as np, math")
    assert named[:3] == ["collections", "collections.abc", "math"] and "numpy.linalg" in named


@needs_seccomp
def test_a_stop_iteration_cannot_end_a_loop_of_the_tests():
    tests = (
        "def check(candidate):\n    assert all(map(lambda x: candidate(x, 1) == x + 1, [1, 2]))\n"
    )
    example = data.Example("add", "def add(a, b):\n", "", "code", tests, entry="add")
    assert data.is_correct(example, WHOLE) is True
    assert data.is_correct(example, "    raise StopIteration\n") is False


@needs_shared
@needs_seccomp
def test_humanevals_own_solutions_pass_and_empty_ones_fail():
    examples = data.load_dataset("humaneval", SHARED / "data/humaneval/HumanEval.jsonl.gz", "test")
    assert len(examples) == 164
    assert all(data.in_parallel(data.is_correct, [(e, e.answer) for e in examples]))
    some = [e for e in examples if e.id.split("/")[1] in ("0", "32", "33", "38", "50")]
    cheat = "    return None\ndef poly(xs, x):\n    return 0\ndef encode_shift(s):\n    return s\n"
    assert not any(data.is_correct(e, f"```\n{cheat}```") for e in some)


def test_pass_at_k_is_the_chance_that_k_of_n_hold_a_right_one():
    for n, correct, k in ((5, 2, 1), (6, 3, 2), (4, 0, 3), (4, 4, 2)):
        draws = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        expected = sum(any(d) for d in draws) / len(draws)
        assert data.pass_at_k(n, correct, k) == pytest.approx(expected)


def test_toy_world_is_what_it_says():
    world = data.ToyWorld(3)
    splits = world.splits
    questions = {s: {r["question"] for r in records} for s, records in splits.items()}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values()))
    counts = {s: Counter(r["system"] for r in records) for s, records in splits.items()}
    assert counts["train"] == {"S1": 320, "S2": 1500}
    assert counts["validation"] == {"S1": 80, "S2": 400}
    assert counts["test"] == {"S1": 240, "S2": 400}
    for record in splits["test"]:  # the machine, run by hand
        if record["system"] == "S2":
            _, a, b, c, d, _, *names, _ = record["question"].split()
            x, states = [a, b, c, d], []
            for name in names:
                a, b, c, d = x
                x = {"rev": [d, c, b, a], "rot": [b, c, d, a], "swp": [b, a, c, d]}[name]
                states.append(" ".join(x))
            assert record["answer"] == " ; ".join(states)
    corpus = world.corpus(4000)
    assert not {e.question for e in corpus} & (questions["test"] | questions["validation"])
    gold = {r["question"]: r["answer"] for r in splits["train"]}
    facts = [e for e in corpus if e.question.startswith("F")]
    right = sum(gold[e.question] == e.answer for e in facts) / len(facts)
    assert 0.35 < right < 0.45  # the mean reliability is 0.4
    assert data.ToyWorld(3).splits == splits and data.ToyWorld(4).splits != splits


# ------------------------------------------------------------------------------------------- grpo


def test_group_advantages_in_closed_form():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [2.0, 4.0, 6.0, 8.0]])
    ours = grpo.group_advantages(rewards)
    close(ours[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    assert (ours[1] == 0).all()  # exactly, not 6e-4
    close(ours[2], torch.tensor([-3.0, -1.0, 1.0, 3.0]) / ((20 / 3) ** 0.5 + 1e-4))
    with pytest.raises(ValueError, match="G >= 2"):
        grpo.group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_loss_equals_the_formula_token_by_token(beta):
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (0.5 * torch.randn(3, 4, 6, generator=generator) - 1).unbind()
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[2] = False
    advantages = torch.tensor([1.3, -0.7, 5.0, 0.0])
    loss, stats = grpo.grpo_loss(
        logp, old, ref if beta else None, advantages, mask, clip=0.2, beta=beta
    )
    total, total_kl = 0.0, 0.0
    for i in range(4):
        terms, kls = [], []
        for t in range(6):
            if mask[i, t]:
                ratio, A = math.exp(logp[i, t] - old[i, t]), float(advantages[i])
                clipped = min(max(ratio, 0.8), 1.2)
                d = float(ref[i, t] - logp[i, t])
                kls.append(math.exp(d) - d - 1)
                terms.append(min(ratio * A, clipped * A) - beta * kls[-1])
        total += sum(terms) / max(1, len(terms)) / 4  # a row without tokens counts as 0
        total_kl += sum(kls) / max(1, len(kls)) / 4
    assert float(loss) == pytest.approx(-total, abs=1e-6)
    assert float(stats["kl"]) == pytest.approx(total_kl if beta else 0.0, abs=1e-6)


def test_kl_of_nearly_equal_policies_is_not_negative():
    logp = -torch.rand(400, 30, generator=torch.Generator().manual_seed(0))
    ref = logp + 1e-4 * torch.randn(400, 30, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(400)
    for row, other in zip(logp, ref):  # exp(d) - d - 1 in float32 is below 0 here in a third
        _, stats = grpo.grpo_loss(
            row[None], row[None], other[None], ones[:1], torch.ones(1, 30), beta=0.1
        )
        assert float(stats["kl"]) >= 0


def test_an_all_masked_row_gives_no_nan_gradient():
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    loss, _ = grpo.grpo_loss(logp, logp.detach(), logp.detach(), torch.ones(2), mask)
    loss.backward()
    assert logp.grad.isfinite().all() and not logp.grad[1].any() and logp.grad[0, 0] != 0


SETTINGS = {"group": 4, "max_new_tokens": 10, "eos_ids": (0, 7), "temperature": 1.2}


def sampled_rows(model, seed=0, **changes):
    s = grpo.Settings(**(SETTINGS | changes))
    prompts = [[5, 9, 2], [7, 7, 8, 1, 2, 3, 4], [11]]
    return s, grpo.rollouts(model, prompts, s, torch.Generator().manual_seed(seed))


def as_rows(rows):
    """Rollouts as plain rows, a prompt and an answer each: tokens, labels, mask of the answers."""
    pairs = [(p, a) for p, group in zip(rows.prompts, rows.answers) for a in group]
    tokens, labels = data.collate([(p + a, len(p)) for p, a in pairs])
    return tokens, labels, labels[:, 1:] != -100


def test_micro_batches_hold_every_answer_once_with_its_own_numbers():
    """Trap 4: 0 is the padding and an EOS; the sampled EOS has mask 1, all behind it 0."""
    s, rows = sampled_rows(lora_model(), group=16, max_new_tokens=30)
    answers = [a for group in rows.answers for a in group]
    assert any(a[-1] == 0 and len(a) < 30 for a in answers) and any(a[-1] == 7 for a in answers)
    advantages, seen = torch.arange(48.0).view(3, 16), {}
    parts = grpo.micro_batches(rows, advantages, 5, "cpu")
    assert [len(part.tokens) for part in parts] == [5] * 9 + [3]
    for part in parts:
        for tokens, labels, advantage, sampled, mask in zip(
            part.tokens, part.labels, part.advantages, part.sampled, part.mask
        ):
            p, k = divmod(int(advantage), 16)
            prompt, answer = rows.prompts[p], rows.answers[p][k]
            assert tokens[: len(prompt + answer)].tolist() == prompt + answer
            assert labels[labels != -100].tolist() == answer
            assert mask.sum() == len(answer) and mask[len(prompt) - 1]
            assert sampled[mask].tolist() == pytest.approx(rows.logps[p][k])
            seen[p, k] = True
    assert len(seen) == 48


def test_sampling_and_training_log_probs_agree():
    """Trap 6: what sampling returned against the training forward, float32."""
    model = lora_model(dropout=0.4)
    s, rows = sampled_rows(model)
    tokens, labels, mask = as_rows(rows)
    training = decoder.token_logprobs(model, tokens, labels, s.temperature)[mask]
    sampled = torch.tensor([x for group in rows.logps for answer in group for x in answer])
    assert sampled.all() and (sampled - training).abs().max() < 2e-5


def update(model, s, rows, reference, advantages=None):
    masked(model, 0.5)
    optimizer = lorapar.MaskedAdamW(model, lr=1e-2)
    if advantages is None:
        advantages = torch.randn(3, s.group, generator=torch.Generator().manual_seed(9))
    stats = grpo.grpo_update(model, optimizer, rows, advantages, reference, s)
    return stats, optimizer


def test_the_first_step_has_no_kl_and_no_gap_and_moves_only_active_elements():
    """Traps 2, 5 and 6."""
    model = lora_model()
    s, rows = sampled_rows(model)
    start = lorapar.get_flat(model)
    stats, _ = update(model, s, rows, start)
    assert stats["kl"] == 0.0 and 0 < stats["gap"] < 2e-6
    mask, end = masked(model, 0.5), lorapar.get_flat(model)
    assert torch.equal(end[~mask], start[~mask]) and (end != start)[mask].float().mean() > 0.99


def test_the_gap_shows_that_sampling_and_training_differ():
    """Trap 6: the weights move between the two, as a wrong cache or temperature would."""
    model = lora_model()
    s, rows = sampled_rows(model)
    flat = lorapar.get_flat(model)
    lorapar.set_flat(model, flat + 0.01)
    assert update(model, s, rows, flat)[0]["gap"] > 1e-3
    lorapar.set_flat(model, flat)
    s.temperature *= 1.1
    assert update(model, s, rows, flat)[0]["gap"] > 1e-2


def test_kl_is_measured_to_the_reference_vector_not_to_the_base():
    model = lora_model()
    s, rows = sampled_rows(model)
    policy, base = lorapar.get_flat(model), lorapar.get_flat(lora_model(moved=False))
    zero = torch.zeros(3, 4)
    tokens, labels, mask = as_rows(rows)
    with torch.no_grad():
        logp = decoder.token_logprobs(model, tokens, labels, s.temperature)
        lorapar.set_flat(model, base)
        ref = decoder.token_logprobs(model, tokens, labels, s.temperature)
        lorapar.set_flat(model, policy)
    expected = (((ref - logp).exp() - (ref - logp) - 1) * mask).sum(1) / mask.sum(1)
    stats, _ = update(model, s, rows, base, zero)
    assert stats["kl"] == pytest.approx(expected.mean().item(), rel=1e-4) and stats["kl"] > 1e-4


def test_a_reference_pass_that_fails_gives_the_policy_back(monkeypatch):
    model = lora_model()
    s, rows = sampled_rows(model)
    policy = lorapar.get_flat(model)
    monkeypatch.setattr(grpo, "token_logprobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        update(model, s, rows, policy + 1)
    assert torch.equal(lorapar.get_flat(model), policy)


def test_no_reference_pass_without_kl(monkeypatch):
    model = lora_model()
    s, rows = sampled_rows(model, beta=0.0)
    monkeypatch.setattr(grpo, "set_flat", lambda *_: pytest.fail("a reference was computed"))
    update(model, s, rows, None)


def test_the_gradient_does_not_depend_on_the_micro_batch():
    """Trap 7: against one plain loss over all rows at once."""
    model = lora_model()
    reference = lorapar.get_flat(lora_model(moved=False))
    gradients = []
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    for micro in (1, 5, 12):
        s, rows = sampled_rows(model, micro_batch=micro)
        twin = copy.deepcopy(model)
        update(twin, s, rows, reference, advantages)
        gradients.append(torch.cat([p.grad.flatten() for p in lorapar.lora_factors(twin).values()]))
    tokens, labels, mask = as_rows(rows)
    flat = lorapar.get_flat(model)
    lorapar.set_flat(model, reference)
    ref = plain_logprobs(model, tokens, labels, s.temperature).detach()
    lorapar.set_flat(model, flat)
    logp = plain_logprobs(model, tokens, labels, s.temperature)
    loss, _ = grpo.grpo_loss(logp, logp.detach(), ref, advantages.flatten(), mask)
    factors = list(lorapar.lora_factors(model).values())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)])
    for gradient in gradients:
        close(gradient, expected, 1e-4)


def test_several_iterations_leave_the_old_policy_where_it_sampled():
    model = lora_model()
    s, rows = sampled_rows(model, num_iterations=3)
    stats, optimizer = update(model, s, rows, lorapar.get_flat(model))
    assert optimizer.state[optimizer.packed]["step"] == 3
    assert stats["ratio"] != 1.0 and stats["clipped"] > 0 and stats["gap"] < 2e-6


def test_a_loss_that_is_not_finite_moves_nothing():
    model = lora_model()
    s, rows = sampled_rows(model)
    start = lorapar.get_flat(model)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        update(model, s, rows, start, torch.full((3, 4), float("nan")))
    assert torch.equal(lorapar.get_flat(model), start)


def test_grpo_raises_the_rewarded_tokens():
    """The whole step on a reward anyone can check: the share of tokens below 32."""
    model = lora_model(r=8)
    masked(model, 1.1)
    optimizer = lorapar.MaskedAdamW(model, lr=3e-2, max_grad_norm=1.0)
    s = grpo.Settings(group=8, max_new_tokens=8, temperature=1.0, beta=0.01, micro_batch=64)
    generator, reference = torch.Generator().manual_seed(0), lorapar.get_flat(model)

    def rewards(answers):
        return [[{"share": sum(t < 32 for t in a) / 8} for a in group] for group in answers]

    steps = [
        grpo.grpo_step(model, optimizer, [[1, 2], [3]], rewards, reference, s, generator)
        for _ in range(20)
    ]
    assert steps[0]["reward"] < 0.6 and steps[-1]["reward"] > 0.9
    assert steps[0]["zero_std_groups"] == 0 and steps[0]["truncated"] == 1.0


# ------------------------------------------------------------------------------------------ train


def test_every_epoch_sees_every_example_once():
    steps = train.step_indices(10, 4, 3, None, seed=1)
    assert [len(s) for s in steps] == [4, 4, 2] * 3
    epochs = [sum(steps[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert train.step_indices(10, 4, 3, 2, seed=1) == steps[:2]


def test_cosine_schedule_with_warm_up():
    expected = [(step + 1) / 5 for step in range(4)]
    expected += [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    rates = [train.cosine(step, 20, 0.2) for step in range(20)]
    assert rates == pytest.approx(expected)


def test_without_a_model_the_toys_settings_hold_and_with_one_the_papers():
    toy, real = train.read_config([]), train.read_config(["--model", "x", "--data", "gsm8k"])
    for c, expected in ((toy, (32.0, 32, 3e-3, 40)), (real, (64.0, 512, 2e-4, None))):
        assert (c.lora_alpha, c.max_length, c.sft_lr, c.rl_steps) == expected
    assert train.read_config(["--sft-lr", "1"]).sft_lr == 1.0


QUICK = ["--sft-epochs", "1", "--rl-steps", "3", "--eval-examples", "40", "--rl-batch", "4"]
QUICK += ["--score-examples", "16", "--save-every", "2"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """One short run of the whole program, and its base, which later runs copy."""
    out = tmp_path_factory.mktemp("toy") / "run"
    steps, train.TOY_BASE["steps"] = train.TOY_BASE["steps"], 250
    try:
        train.main([*QUICK, "--out", str(out)])
    finally:
        train.TOY_BASE["steps"] = steps
    return out


def borrow(toy_run, out):
    """A new run folder on the base that toy_run trained."""
    out.mkdir()
    for name in ("base", "world"):
        (out / name).symlink_to(toy_run / name)
    return out


def another_run(toy_run, out, *flags):
    train.main([*QUICK, *flags, "--out", str(borrow(toy_run, out))])
    return json.loads((out / "report.json").read_text())


def metrics(out, stage):
    return [r for _, r in data.read_records(out / "metrics.jsonl") if r["stage"] == stage]


def fails(capsys, *flags, code=2):
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    (line,) = re.findall(r"(?:^|\r)(train\.py: .*)$", error, re.M)  # \r: behind a progress bar
    assert stop.value.code == code and error.endswith(f"{line}\n") and "Traceback" not in error
    return line


def test_the_whole_program_runs_and_reports(toy_run):
    report = json.loads((toy_run / "report.json").read_text())
    assert list(report["evaluation"]) == ["base", "sft", "rl"]
    assert all(set(row) == {"S1", "S2", "all"} for row in report["evaluation"].values())
    part = report["partition"]
    assert part["elements"] == 30720 and sum(part["regions"].values()) < 30720
    assert part["active"]["sft"] == part["regions"]["s1_only"] + part["regions"]["shared"]
    assert sum(p["elements"] for p in part["per_projection"].values()) == 30720
    rl = metrics(toy_run, "rl")
    assert [r["step"] for r in rl] == [0, 1, 2] and all(r["gap"] < 1e-5 for r in rl)
    text = (toy_run / "report.md").read_text()
    assert "| sft |" in text and "test examples of toy" in text and not re.search(r": 0$", text)
    flats = [load_file(toy_run / s / "state.safetensors")["flat"] for s in ("sft", "rl")]
    start = load_file(toy_run / "importance.safetensors")["start"]
    assert int((flats[0] != start).sum()) <= part["active"]["sft"]
    assert 0 < int((flats[1] != flats[0]).sum()) <= part["active"]["rl"]
    tokens = torch.arange(12)[None]  # the adapter on the untouched base is the trained model
    exported = lorapar.load_adapter(decoder.load_model(toy_run / "base"), toy_run / "rl")
    resumed = lorapar.add_lora(decoder.load_model(toy_run / "base"), alpha=32.0)
    lorapar.set_flat(resumed, start)
    lorapar.set_anchor(resumed, start)
    lorapar.set_flat(resumed, flats[1])
    close(exported(tokens), resumed(tokens))


def test_the_same_command_again_reuses_everything(toy_run, capsys):
    before = {p: p.read_bytes() for p in toy_run.rglob("*") if p.is_file()}
    train.main([*QUICK, "--out", str(toy_run)])
    said = capsys.readouterr().out
    for what in ("toy base", "score", "sft", "rl", "evaluate base", "evaluate rl"):
        assert f"{what}: reused" in said
    changed = {p.name for p in before if p.read_bytes() != before[p] and p.suffix != ".png"}
    assert changed <= {"report.json"}  # nothing but the clock of this run
    assert "--theta 0.9, not 0.5" in fails(capsys, *QUICK, "--out", toy_run, "--theta", "0.5")


DERIVED = ["sft/adapter_model.safetensors", "rl/adapter_config.json", "answers/sft.jsonl"]
DERIVED += ["partition.json", "partition.safetensors", "report.md", "labels.jsonl"]
DERIVED += ["importance.safetensors"]


def test_derived_files_that_vanished_are_there_again(toy_run, tmp_path, capsys):
    """Trap 26."""
    another_run(toy_run, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in DERIVED}
    for name in DERIVED:
        (tmp_path / "run" / name).unlink()
    train.main([*QUICK, "--out", str(tmp_path / "run")])
    assert {name: (tmp_path / "run" / name).read_bytes() for name in DERIVED} == before
    said = capsys.readouterr().out
    assert "rl: reused" in said and "everything is in" in said


@pytest.mark.parametrize("dies_in", ["save_toy_tokenizer", "save_model", "copymode", "make_toy"])
def test_a_kill_inside_the_toys_base_leaves_a_folder_that_a_rerun_completes(
    dies_in, tmp_path, monkeypatch
):
    monkeypatch.setitem(train.TOY_BASE, "steps", 2)
    owner = {"save_model": decoder, "copymode": decoder.shutil}.get(dies_in, data)
    original = getattr(owner, dies_in)

    def dies(*arguments, **settings):
        if dies_in == "make_toy":
            original(*arguments, **settings)
        raise MemoryError

    monkeypatch.setattr(owner, dies_in, dies)
    flags = [*QUICK, "--score-only", "--out", str(tmp_path / "run")]
    with pytest.raises(MemoryError):
        train.main(flags)
    monkeypatch.setattr(owner, dies_in, original)
    train.main(flags)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["partition"]["elements"]


def test_killed_and_resumed_is_bit_identical(toy_run, tmp_path, monkeypatch):
    """Trap 12: dropout, optimizer, data order and sampling go on where they stopped."""
    flags = ["--dropout", "0.2", "--kl", "0.1"]
    another_run(toy_run, tmp_path / "whole", *flags)
    real_save, saves = train.save_state, []

    def save_then_die(folder, *rest):
        real_save(folder, *rest)
        saves.append(folder)
        if len(saves) in (2, 7):  # in the middle of SFT, then of RL
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", save_then_die)
    borrow(toy_run, tmp_path / "killed")
    for dies in (True, True, False):
        try:
            train.main([*QUICK, *flags, "--out", str(tmp_path / "killed")])
            assert not dies
        except KeyboardInterrupt:
            assert dies
    assert {s.name for s in saves} == {"sft", "rl"}
    for stage in ("sft", "rl"):
        whole, killed = (
            load_file(tmp_path / run / stage / "state.safetensors") for run in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[k], killed[k]) for k in whole), stage
        steps = [
            [(r["step"], r["loss"], r["lr"]) for r in metrics(tmp_path / d, stage)]
            for d in ("whole", "killed")
        ]
        assert steps[0] == steps[1] and len(steps[0]) > 2


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="signals of Unix")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", ["", "toy base", "base 50"])
def test_a_stopped_run_says_one_line_and_how_to_go_on(number, code, after, tmp_path):
    """At any moment: while Python imports, while the base trains."""
    command = [sys.executable, "train.py", "--out", str(tmp_path / "run")]
    run = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while after and after not in run.stdout.readline():
        pass
    if not after:
        time.sleep(0.4)  # the imports take seconds
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == code
    assert (
        error.strip()
        == "train.py: stopped; the same command again: a run goes on where its folder is"
    )


def test_ablation_switches_do_what_they_say(toy_run, tmp_path):
    """Each against the run without it: what it changes, and what it must not."""
    plain = json.loads((toy_run / "report.json").read_text())

    def run(*flags):
        out = tmp_path / "_".join(flags).replace("/", "")
        return out, another_run(toy_run, out, *flags)

    def regions(out):
        return load_file(out / "partition.safetensors")

    out, report = run("--order", "rl,sft")
    assert list(report["evaluation"]) == ["base", "rl", "sft"]
    assert report["partition"] == plain["partition"]  # masks follow the system, not the position
    first = load_file(out / "rl" / "state.safetensors")["flat"]
    start = load_file(out / "importance.safetensors")["start"]
    assert not (first != start)[~(regions(out)["s2_only"] | regions(out)["shared"])].any()

    out, report = run("--order", "sft", "--init", "gaussian")
    assert list(report["evaluation"]) == ["base", "init", "sft"] and not (out / "rl").exists()
    rows = report["evaluation"]
    assert rows["init"]["all"]["loss"] != rows["base"]["all"]["loss"]

    out, report = run("--order", "rl", "--select", "random")
    assert report["partition"]["regions"] == plain["partition"]["regions"]
    assert not torch.equal(regions(out)["s1_only"], regions(toy_run)["s1_only"])

    _, report = run("--score-only", "--select", "swapped")
    sizes = plain["partition"]["active"]
    assert report["partition"]["active"] == {"sft": sizes["rl"], "rl": sizes["sft"]}

    out, report = run("--score-only", "--select", "magnitude")
    assert report["partition"]["jaccard"] == 1.0 and report["evaluation"] == {}
    assert not (out / "sft").exists()

    out, _ = run("--stage-data", "all", "--kl", "0", "--rl-iterations", "2")
    counts = plain["data"]["S1 examples"] + plain["data"]["S2 examples"]
    assert len(metrics(out, "sft")) == math.ceil(counts / 32) > len(metrics(toy_run, "sft"))
    assert all(r["kl"] == 0 for r in metrics(out, "rl"))
    assert load_file(out / "rl" / "state.safetensors")["adam.step"] == 6

    flags = ["--alpha", "0.5", "--beta", "0", "--theta", "0.5", "--targets", "qo"]
    _, report = run(*flags)
    part = report["partition"]
    assert part["active"]["rl"] == part["regions"]["s2_only"]
    assert part["active"]["sft"] == part["regions"]["s1_only"] + part["regions"]["shared"] // 2
    assert set(part["per_projection"]) == {"q_proj", "o_proj"}


def test_plain_lora_is_not_scored(toy_run, tmp_path, capsys):
    """theta 1 ranks nothing, so B = 0 is no error there; with theta 0.9 it is."""
    report = another_run(toy_run, tmp_path / "a", "--init", "lora", "--theta", "1")
    assert report["partition"]["active_percent"] == {"sft": 100.0, "rl": 100.0}
    flags = [*QUICK, "--init", "lora", "--out", borrow(toy_run, tmp_path / "b")]
    assert "every importance is exactly 0" in fails(capsys, *flags)


@pytest.mark.parametrize("stage, flag", [("sft", "--sft-lr"), ("rl", "--rl-lr")])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(stage, flag, toy_run, tmp_path, capsys):
    """Also where the elements are finite and their product is not; also at the last step."""
    out = borrow(toy_run, tmp_path / "run")
    flags = [*QUICK, flag, "1e30", f"--{stage}-steps", "1", "--out", out]
    error = fails(capsys, *flags)
    assert f"{stage} step 1" in error and f"lower {flag}" in error and "another --out" in error
    assert (out / "importance.safetensors").exists() and not (out / stage).exists()
    assert (out / "sft" / "adapter_model.safetensors").exists() == (stage == "rl")
    assert stage not in json.loads((out / "report.json").read_text())["evaluation"]
    if stage == "sft":  # a loss that is not finite, in the middle
        out = borrow(toy_run, tmp_path / "other")
        flags = [*QUICK, flag, "1e30", "--save-every", "99", "--out", out]
        assert "sft step 2: the loss is" in fails(capsys, *flags)


def real_run(toy_run, tmp_path, *flags):
    """Flags of a run on files: the toy's checkpoint with GSM8K-shaped data."""
    data_path = gsm8k_folder(tmp_path / "data")
    return ["--model", str(toy_run / "base"), "--data", "gsm8k", "--data-path", str(data_path)] + [
        *["--labels", "steps:2", "--out", str(tmp_path / "out"), *flags]
    ]


SHORT = ["--rl-steps", "1", "--sft-steps", "1", "--max-response", "4"]


def test_stage_2_and_evaluation_may_have_data_sets_of_their_own(toy_run, tmp_path, capsys):
    """The paper trains on Dolly and evaluates elsewhere."""
    record = {"instruction": "F t1 e1 A", "context": "", "response": "c5"}
    data.write_jsonl(tmp_path / "dolly.jsonl", [record] * 40)
    labels = [{"id": f"dolly/{i}", "label": "S1"} for i in range(40)]
    labels += [{"id": f"gsm8k/train/{i}", "label": "S2"} for i in range(40)]
    data.write_jsonl(tmp_path / "labels.jsonl", labels)
    data.write_jsonl(tmp_path / "gsm" / "train.jsonl", [GSM8K] * 40)
    data.write_jsonl(tmp_path / "gsm" / "test.jsonl", [GSM8K] * 4)
    flags = ["--model", str(toy_run / "base"), "--data", "dolly"]
    flags += ["--labels", str(tmp_path / "labels.jsonl"), *SHORT]
    flags += ["--data-path", str(tmp_path / "dolly.jsonl"), "--out", str(tmp_path / "out")]
    flags += ["--eval-data", "gsm8k", "--eval-data-path", str(tmp_path / "gsm")]
    assert "--rl-data, or a --reward" in fails(capsys, *flags)  # stage 2 could not be rewarded
    train.main([*flags, "--rl-data", "gsm8k", "--rl-data-path", str(tmp_path / "gsm")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["S1 examples"] == report["data"]["S2 examples"] == 38
    assert report["evaluation"]["rl"]["all"]["examples"] == 4
    assert report["test"] == "test examples of gsm8k"
    saved = load_file(tmp_path / "out" / "partition.safetensors")
    assert {k: int(v.sum()) for k, v in saved.items()} == report["partition"]["regions"]


REWARD = """
def length(question, answer, completion):
    return {"short": -len(completion) / 100, "asked": float(question in ("F t1 e1 A", "M a b"))}

def broken(question, answer, completion):
    return completion["no"]

def nothing(question, answer, completion):
    return None
"""


def test_ones_own_file_and_reward_train_stage_2(toy_run, tmp_path, capsys):
    rows = [
        {"question": f"F t1 e{i} A", "answer": "c5", "check": "exact", "label": f"S{1 + i % 2}"}
        for i in range(60)
    ]
    data.write_jsonl(tmp_path / "mine.jsonl", rows)
    (tmp_path / "reward.py").write_text(REWARD)
    flags = ["--model", str(toy_run / "base"), "--data", str(tmp_path / "mine.jsonl"), *SHORT]

    def with_reward(name):
        spec = f"{tmp_path}/reward.py:{name}"
        return [*flags, "--reward", spec, "--out", str(tmp_path / name)]

    train.main(with_reward("length"))
    report = json.loads((tmp_path / "length" / "report.json").read_text())
    assert report["evaluation"]["rl"]["all"]["examples"] == 6  # 80/10/10
    assert report["data"]["S1 examples"] + report["data"]["S2 examples"] == 48
    (line,) = metrics(tmp_path / "length", "rl")
    assert set(line["parts"]) == {"short", "asked"} and line["parts"]["short"] < 0
    assert "broken: TypeError" in fails(capsys, *with_reward("broken"))
    assert "nothing: TypeError" in fails(capsys, *with_reward("nothing"))
    assert "not FILE.py:FUNCTION" in fails(capsys, *with_reward("absent"))


def test_eval_command_gives_the_number_and_every_answer(toy_run, tmp_path, capsys):
    gsm8k_folder(tmp_path / "data", 6)
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / "x_test.csv").write_text("c1?,a,b,c,d,A\nc2?,a,b,c,d,B\n")
    data.write_jsonl(tmp_path / "mine.jsonl", OWN)
    for name, path, extra, count in (
        ("gsm8k", "data", ["--samples", "3"], 6),
        ("gsm8k", "data/test.jsonl", [], 6),
        ("mmlu", "mmlu", ["--adapter", str(toy_run / "rl")], 2),
        (str(tmp_path / "mine.jsonl"), "mine.jsonl", [], 3),
    ):
        command = ["eval", "--model", str(toy_run / "base"), "--data", name, *extra]
        command += ["--data-path", str(tmp_path / path), "--out", str(tmp_path / "a.jsonl")]
        train.main([*command, "--max-response", "4"])
        said = capsys.readouterr().out
        table = json.loads(said[said.index("{") : said.rindex("}") + 1])
        records = [r for _, r in data.read_records(tmp_path / "a.jsonl")]
        assert len(records) == table["all"]["examples"] == count
        mean = sum(r["accuracy"] for r in records) / len(records)
        assert table["all"]["accuracy"] == pytest.approx(mean)
        if extra[:1] == ["--samples"]:
            assert "pass@3" in table["all"] and all(len(r["answers"]) == 3 for r in records)
        if name == "mmlu":
            assert all(r["answers"][0] in "ABCD" for r in records)
            assert "a letter is answered once" in fails(capsys, *command, "--samples", "20")
    assert "nowhere" in fails(capsys, *command, "--out", tmp_path / "nowhere" / "a.jsonl")


def bad_inputs(toy_run, tmp_path):
    run, toy = real_run(toy_run, tmp_path), ["--out", str(borrow(toy_run, tmp_path / "toy"))]
    (tmp_path / "bad.jsonl").write_text('{"id": "gsm8k/train/1", "label": "S1"}\n{oops\n')
    data.write_jsonl(tmp_path / "none.jsonl", [{"id": "elsewhere", "label": "S1"}])
    broken_data = gsm8k_folder(tmp_path / "broken")
    with open(broken_data / "train.jsonl", "a") as out:
        out.write('{"question": "no answer"}\n')
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "importance.safetensors").write_bytes(b"cut off")
    merge = ["merge", "--model", str(toy_run / "base"), "--adapter", str(toy_run / "rl"), "--out"]
    return {
        "--theta 0": ["--theta", "0"],
        "--theta 1.2": ["--theta", "1.2"],
        "--sft-lr 1e+39 is outside": ["--sft-lr", "1e39"],
        "--lora-alpha 0": ["--lora-alpha", "0"],
        "go together": ["--data", "gsm8k"],
        "unknown data set": [*run, "--data", "gsm9k"],
        "no such model folder": [*run, "--model", str(tmp_path / "nowhere")],
        "nothing at": [*run, "--data-path", str(tmp_path / "nowhere")],
        "bad.jsonl:2": [*run, "--labels", str(tmp_path / "bad.jsonl")],
        "no label matches": [*run, "--labels", str(tmp_path / "none.jsonl")],
        "not readable": [*run, "--labels", str(tmp_path / "nowhere")],
        "--labels is missing": [*run[:6], "--out", str(tmp_path / "o")],
        "train.jsonl:61": [*run, "--data-path", str(broken_data)],
        "no S2 training example": run,  # every solution has one step
        "holds training examples": [*run, "--eval-data", "gsm8k", "--eval-data-path"]
        + [str(tmp_path / "data" / "train.jsonl")],
        "--rl-group 1": ["--rl-group", "1"],
        "at most --max-prompt 2 tokens": [*toy, "--max-prompt", "2"],
        "unknown targets 'x'": [*toy, "--targets", "x"],
        "r = 999 does not fit": [*toy, "--r", "999"],
        "sees no such device": ["--device", "cuda:7"],
        "Not a directory": ["--out", str(tmp_path / "file" / "run")],
        "is the model itself": [*merge, str(toy_run / "base")],
        "not a readable PEFT adapter": [*merge, str(tmp_path / "m"), "--adapter", "nowhere"],
        "no run there": ["figure", str(tmp_path / "nowhere")],
        "eval needs": ["eval", "--data", "gsm8k"],
        "gsm8K": ["eval", "--model", "x", "--data", "gsm8K", "--data-path", str(tmp_path / "file")],
        "sweep needs": ["sweep", "order", "--score-only"],
        "--device cuda:7: this PyTorch": ["bench", "--device", "cuda:7"],
    }


def test_bad_input_gets_one_clear_line(toy_run, tmp_path, capsys):
    for expected, flags in bad_inputs(toy_run, tmp_path).items():
        assert expected in fails(capsys, *flags), expected


def test_figures_of_a_run(toy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.main(["figure", str(toy_run)])
    assert "matplotlib is not installed" in capsys.readouterr().out
    monkeypatch.undo()
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = {}

    def keep(figure, path, **_):
        shown[path.name] = figure
        path.write_bytes(b"png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    train.main(["figure", str(toy_run)])
    (axes,) = shown["importance.png"].axes
    part = json.loads((toy_run / "partition.json").read_text())
    legend = " ".join(t.get_text() for t in axes.get_legend().get_texts())
    assert f"{part['jaccard']:.3f}" in axes.get_legend().get_title().get_text()
    for name, region in (("S1-only", "s1_only"), ("S2-only", "s2_only"), ("shared", "shared")):
        assert f"{name} {part['regions'][region] / part['elements']:.1%}" in legend
    drawn = {c.get_label().split(" ")[0]: len(c.get_offsets()) for c in axes.collections}
    assert sum(drawn.values()) == 20_000 and axes.get_xscale() == axes.get_yscale() == "log"
    lines = {a.get_title(): a.lines[0].get_ydata() for a in shown["training.png"].axes}
    assert list(lines["rl: reward"]) == [r["reward"] for r in metrics(toy_run, "rl")]
    assert list(lines["sft: loss"]) == [r["loss"] for r in metrics(toy_run, "sft")]


def sweep_folder(toy_run, out, seeds):
    """A sweep's folder on the base that toy_run trained, the same for every seed."""
    out.mkdir()
    for seed in range(seeds):
        borrow(toy_run, out / f"toy-{seed}")
    return out


def test_a_sweep_of_two_tiny_cells(toy_run, tmp_path, monkeypatch, capsys):
    out = sweep_folder(toy_run, tmp_path / "sweep", 3)
    monkeypatch.setattr(train, "RATES", (1, 3))
    command = ["sweep", "order", "--seeds", "2", *QUICK, "--out", str(out)]
    train.main(command)
    table = list(csv.DictReader((out / "order.csv").open()))
    assert [(r["row"], r["seed"]) for r in table] == [
        (row, seed) for row in ("SFT then RL", "RL then SFT") for seed in "01"
    ]
    cells = {p.name: json.loads((p / "report.json").read_text()) for p in out.glob("cells/*")}
    chosen = {}
    for rate in (3e-3, 9e-3):  # the rates of the first row, chosen again by hand, on validation
        flags = "" if rate == 3e-3 else f",sft_lr={rate}"
        cell = cells[f"eval_split=validation,seed=2{flags}"]
        chosen[rate] = [cell["evaluation"]["rl"]["all"][k] for k in ("accuracy", "probability")]
    assert float(table[0]["sft_lr"]) == max(chosen, key=chosen.get)
    assert not any("seed=2" in name and "validation" not in name for name in cells)
    flags = f",sft_lr={table[0]['sft_lr']}" * (table[0]["sft_lr"] != "0.003")
    flags = f"rl_lr={table[0]['rl_lr']}," * (table[0]["rl_lr"] != "0.004") + "seed=0" + flags
    end = cells[flags]["evaluation"]["rl"]["all"]["accuracy"]
    assert float(table[0]["all at the end"]) == pytest.approx(100 * end)
    text = (out / "order.md").read_text()
    assert "| SFT then RL | 81.65 |" in text and "all 40)" in text and "+13.2" in text
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent.parent.name == "cells"}
    train.main(command)  # finished cells are reused
    assert before == {p: p.stat().st_mtime_ns for p in before} and len(before) > 10


def test_verdicts_follow_two_standard_errors():
    def said(gaps, paper):
        records = [{"row": "b", "seed": i, "all at the end": 50.0} for i in range(len(gaps))]
        records += [
            {"row": "a", "seed": i, "all at the end": 50.0 + g, "all after sft": 50.0}
            for i, g in enumerate(gaps)
        ]
        end, after = (train.verdict("a", other, paper, records) for other in ("b", train.SAME))
        assert end[2:] == after[2:]
        return end[2:]

    assert said([1, 2, 3], None) == ["+2.0", "0.6", "", "seen"]
    assert said([-1, 0, 1], 5.0) == ["+0.0", "0.6", "+5.0", "not seen"]
    assert said([-1, 0, 1], 1.0) == ["+0.0", "0.6", "+1.0", "too noisy to tell"]
    assert said([-1, -2, -3], None) == ["-2.0", "0.6", "", "not seen"]
    assert said([5], 1.0)[1:] == ["inf", "+1.0", "too noisy to tell"]


def test_shares_and_resampling_are_partitions_of_ordinary_scores(toy_run, tmp_path, capsys):
    """`sweep theta --score-only` and `sweep resample` against importance computed anew."""
    out = sweep_folder(toy_run, tmp_path / "sweep", 1)
    flags = ["--seeds", "1", *QUICK, "--out", str(out)]
    train.main(["sweep", "theta", "--score-only", *flags])
    shares = {
        (r["targets"], r["theta"]): r for r in csv.DictReader((out / "theta-scores.csv").open())
    }
    train.main(["sweep", "resample", *flags])
    indices = list(csv.DictReader((out / "resample.csv").open()))
    assert {r["examples"] for r in indices} == {"25", "50", "100"}

    c = train.read_config([*QUICK, "--out", str(out / "resample-0"), "--score-only"])
    model, _, _, rows, _ = train.prepare(c, train.open_run(c))
    lorapar.add_lora(model, alpha=c.lora_alpha, generator=torch.Generator().manual_seed(0))
    chosen = {s: random.Random(0).sample(members, 16) for s, members in rows.items()}
    whole = lorapar.importance(model, [data.collate(chosen["S1"])], decoder.token_logprobs)
    # the scores of q, k, v are theirs whether g, u, d have adapters or not
    factors = lorapar.lora_factors(model)
    alone = decoder.load_model(toy_run / "base")
    lorapar.add_lora(alone, "qkv", alpha=c.lora_alpha)
    flat = torch.cat([factors[name].detach().flatten() for name in lorapar.lora_factors(alone)])
    lorapar.set_flat(alone, flat)
    lorapar.set_anchor(alone, flat)
    s1, s2 = (
        lorapar.importance(alone, [data.collate(chosen[s])], decoder.token_logprobs)
        for s in ("S1", "S2")
    )
    kept = torch.cat([torch.full((p.numel(),), "self_attn" in n) for n, p in factors.items()])
    close(s1, whole[kept], 1e-4)
    part = lorapar.partition(s1, s2, 0.5)
    expected = 100 * float((part.s1_only | part.shared).double().mean())
    assert float(shares["qkv", "0.5"]["S1"]) == pytest.approx(expected, abs=0.1)
    draws = [
        lorapar.importance(model, [data.collate(rows["S1"][i : i + 50])], decoder.token_logprobs)
        for i in (0, 100)
    ]
    expected = train.jaccard(lorapar.partition(*draws, 0.9))
    (ours,) = (r for r in indices if (r["examples"], r["theta"]) == ("50", "0.9"))
    assert float(ours["S1 / S1"]) == pytest.approx(expected, abs=2e-3)
    assert float(ours["S1 / S2"]) < float(ours["S1 / S1"])


def test_bench_prints_each_figure(capsys, tmp_path):
    decoder.save_model(qwen(), tmp_path)
    flags = ["--micro-batch", "2", "--length", "16", "--max-response", "4", "--rl-batch", "1"]
    train.main(["bench", "--shape", str(tmp_path), "--device", "cpu", "--rl-group", "2", *flags])
    said = capsys.readouterr().out
    for what in (
        "SFT step",
        "importance",
        "partition of",
        "rollouts",
        "GRPO update",
        "peak memory",
    ):
        assert re.search(rf"^{what}.* +[\d.e+-]+ ", said, re.M), what


@pytest.mark.parametrize(
    "command",
    [["model.py"], ["data.py"], ["train.py"], ["train.py", "eval"], ["train.py", "merge"]],
)
def test_command_lines_explain_themselves(command):
    done = python(*command, "--help")
    assert done.returncode == 0 and "usage" in done.stdout


def test_model_py_continues_a_prompt(toy_run):
    prompt, base = "M a b c d | rev rot A", toy_run / "base"
    done = python("model.py", base, prompt, "--device", "cpu")
    tokenizer = data.Tokenizer(base)
    answer = decoder.generate(
        decoder.load_model(base), [tokenizer.encode(prompt)], 100, temperature=0, eos_ids=[0]
    )[0][0]
    assert len(answer) > 2 and done.stdout == prompt + tokenizer.decode(answer) + "\n", done.stderr
    done = python("model.py", "nowhere", "x")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_program_on_cuda(dtype, toy_run, tmp_path):
    """Load, importance, both stages, evaluation and resume on a tenth of the toy."""
    flags = ["--device", "cuda", "--dtype", dtype, "--train-examples", "180"]
    report = another_run(toy_run, tmp_path / "run", *flags)
    assert all(math.isfinite(row["all"]["loss"]) for row in report["evaluation"].values())
    limit = 1e-3 if dtype == "float32" else 0.05
    assert all(r["gap"] < limit for r in metrics(tmp_path / "run", "rl"))
    (tmp_path / "run" / "rl" / "adapter_model.safetensors").unlink()
    train.main([*QUICK, *flags, "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "rl" / "adapter_model.safetensors").exists()
    base = decoder.load_model(toy_run / "base", "cuda")
    tokens = torch.arange(12, device="cuda")[None]
    assert (base(tokens).cpu() - decoder.load_model(toy_run / "base")(tokens.cpu())).abs().max() < 1


def test_readme_names_what_the_code_holds():
    """Each `file.py`: `name` of the README is defined in that file; commands name real flags."""
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", text)
    assert len(links) >= 8
    for name, file in links:
        assert re.search(rf"^(?:def|class) {name}\b|^{name} = ", (HERE / file).read_text(), re.M), (
            name
        )
    known = {f"--{f.name.replace('_', '-')}" for f in train.fields(train.RunConfig)}
    for file in ("train.py", "data.py", "model.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (HERE / file).read_text()))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert used <= known | {"--shuffle", "--help", "--seeds"}, used - known
