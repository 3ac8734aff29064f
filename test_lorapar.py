"""All tests: each names the property it proves and holds it against an independent reference. They
stand in the order of the README's steps, so they are a second reading of the method.

Some tests need fixtures of other libraries or real data and skip without them; what they prove is
proved by a smaller test as well, so a bare clone needs nothing but this file:

    python -m pytest -q
    python test_lorapar.py bench    # speed, beside PEFT and transformers where they are installed
"""

import argparse
import copy
import csv
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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

# ------------------------------------------------------------------------------------ small models

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
SMALL |= dict(rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
FAMILIES = {  # fields of config.json
    "llama2": dict(model_type="llama", num_key_value_heads=4, rope_theta=10000.0),
    "llama3": dict(model_type="llama", head_dim=12, rope_theta=500000.0, rope_scaling=LLAMA3)
    | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", head_dim=16, sliding_window=None)
    | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2": dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
    | dict(sliding_window=16, use_sliding_window=False),
    "qwen3": dict(model_type="qwen3", head_dim=12, rms_norm_eps=1e-6, rope_theta=1e6)
    | dict(attention_bias=False, use_sliding_window=False),
    "linear": dict(model_type="llama", num_key_value_heads=1, rope_theta=10000.0)
    | dict(rope_scaling={"type": "linear", "factor": 4.0}, sliding_window=4),  # llama has none
}
# Six logits of the last position of row 1, one of row 0, and the mean square of all, which
# transformers 5 (eager, float32) gave for the formula weights below.
LOGITS = {
    "llama2": [-0.8731, -0.9626, 0.2564, -0.0398, -1.3312, 2.61, 0.2816, 1.4783],
    "llama3": [0.0117, 1.3003, -0.9672, -1.9394, -0.6318, -0.3565, -0.3052, 1.6281],
    "mistral": [1.7937, 0.5197, 1.5349, 1.3158, 0.3697, 1.2348, -1.8567, 1.4607],
    "qwen2": [0.6425, 0.5073, 0.507, -2.2851, -2.702, -0.8421, -0.2441, 1.479],
    "qwen3": [-0.1367, -1.2299, -0.0634, 0.3982, -0.7803, 0.6032, -2.9686, 1.5289],
    "linear": [-0.3202, -0.3558, 1.4465, -0.4891, 0.476, -0.3296, 0.0327, 1.496],
}


def small(family="qwen2"):
    """A small model whose weights are sines of their index, the same in every library."""
    config = decoder.ModelConfig.from_dict(SMALL | FAMILIES[family])
    model = decoder.Transformer(config).requires_grad_(False)
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        wave = 0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) ** 1.3 + i)
        p.copy_(((1 + wave) if "norm" in name else wave).view_as(p))
    return model.eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_model(init="anchored", moved=True, **settings):
    """A small model with adapters, away from their start unless moved=False."""
    generator = seeded(0)
    settings = {"targets": EVERY, "r": 3, "lora_alpha": 6, "std": 0.1} | settings
    model = lorapar.add_lora(small(), init=init, generator=generator, **settings)
    if moved:
        flat = lorapar.get_flat(model)
        lorapar.set_flat(model, flat + 0.05 * torch.randn(len(flat), generator=generator))
    return model.eval()


def answer_batch(rows=5, length=14, seed=0):
    """Right-padded (tokens, labels) with prompts and answers of different lengths."""
    rng = random.Random(seed)
    encoded = []
    for _ in range(rows):
        total = rng.randint(6, length)
        ids = [rng.randrange(64) for _ in range(total)]
        encoded.append(data.Encoded(ids, rng.randint(1, total - 2)))
    return data.collate(encoded)


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


def refuses(named, call, *arguments, error=ValueError, **settings):
    """The call ends in an error that names what is wrong; its text."""
    with pytest.raises(error, match=re.escape(named)) as caught:
        call(*arguments, **settings)
    return str(caught.value)


def changed(old, new):
    """A dict with other values; None removes one."""
    return {n: v for n, v in (old | new).items() if v is not None or n not in new}


def read(file):
    return json.loads(file.read_text())


def rewrite(file, **fields):
    """Changes fields of a JSON file."""
    file.write_text(json.dumps(changed(read(file), fields)))


def table(text):
    """{name: value} of lines `name => value`; backslashes are those of an ordinary string."""
    entries = [line.split(" => ", 1) for line in text.split("\n") if " => " in line]
    found = {name.strip(): value.encode().decode("unicode_escape") for name, value in entries}
    assert len(found) == len(entries)  # no name twice
    return found


def modes(folder):
    """The permissions of its files."""
    return {f.stat().st_mode & 0o777 for f in folder.iterdir()}


# ------------------------------------------------------------------------------------------- model


@needs_shared
@pytest.mark.parametrize("name", ["llama2_tiny", "llama3_tiny", "qwen2_tiny", "peft_lora"])
def test_fixture_logits_and_greedy_text(name):
    """Of transformers and of PEFT, whose adapter is active first, then merged."""
    folder, adapted = SHARED / "fixtures" / name, name == "peft_lora"
    expected, facts = load_file(folder / "expected.safetensors"), read(folder / "expected.json")
    models = [decoder.load_model(SHARED / "fixtures/llama2_tiny" if adapted else folder)]
    if adapted:
        lorapar.load_adapter(models[0], folder)
        models.append(lorapar.merge(copy.deepcopy(models[0])))
    for model in models:
        error = (model(expected["input_ids"]) - expected["logits"]).abs().max()
        assert error < facts["max_abs_tolerance"] / 10
        for rows in (64, 1):
            together = decoder.generate(model, facts["prompts"], 16, temperature=0, batch_rows=rows)
            assert [answers[0] for answers in together] == facts["greedy"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_padding_changes_neither_them_nor_greedy_text(family):
    """Grouped heads, q_norm and scaled RoPE while decoding, and the last position of each prompt,
    which MMLU's letters are read from."""
    model, prompts = small(family), [[5, 9, 2], [7] * 11, [1, 2, 3, 4, 5, 6, 7]]
    logits = model((torch.arange(40).view(2, 20) * 7 + 3) % 64)
    ours = [*logits[1, -1, :6].tolist(), logits[0, 7, 9].item(), logits.square().mean().item()]
    assert ours == pytest.approx(LOGITS[family], abs=2e-4)
    padded, _ = data.collate([data.Encoded(p, 1) for p in prompts])
    together = decoder.generate(model, prompts, 12, temperature=0)
    last, lengths = decoder.prefill(model, prompts)
    assert lengths.tolist() == [3, 11, 7]
    for i, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]))[0]
        close(model(padded)[i, : len(prompt)], alone)
        close(last[i], alone[-1])
        tokens = list(prompt)  # the slowest generation: the whole model for every token
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert together[i] == [tokens[len(prompt) :]]


@pytest.mark.parametrize("trained", ["model.norm.weight", "model.embed_tokens.weight"])
def test_token_logprobs_equal_a_full_log_softmax_and_its_gradient(trained, monkeypatch):
    """Before the head and in it; rows without an answer give zero. Full logits never
    exist, the head sees answer positions only, a few of them at once."""
    monkeypatch.setattr(decoder.HeadLogprobs, "LOGITS", 7 * 64)  # the last chunk is ragged
    model, (tokens, labels), seen = small(), answer_batch(), []
    labels[2] = -100
    parameter = model.get_parameter(trained).requires_grad_()
    reference, log_softmax = plain_logprobs(model, tokens, labels, 0.7), torch.Tensor.log_softmax

    def noted(logits, dim):
        seen.append(logits.numel())
        return log_softmax(logits, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noted)
    ours = decoder.token_logprobs(model, tokens, labels, temperature=0.7)
    if trained == "model.norm.weight":  # a frozen head
        assert max(seen) <= 7 * 64 and sum(seen) == 64 * int((labels[:, 1:] != -100).sum())
    close(ours, reference)
    weights = torch.randn(ours.shape, generator=seeded(1))
    (expected,) = torch.autograd.grad((reference * weights).sum(), parameter)
    close(torch.autograd.grad((ours * weights).sum(), parameter)[0], expected)
    assert not ours[2].any() and ours[1].any()
    assert not decoder.token_logprobs(model, tokens, torch.full_like(labels, -100)).any()


@pytest.mark.parametrize("sharpness", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_bf16_gradients_of_confident_tokens_are_no_noise(sharpness):
    """p = 0.9 to 1 - 1e-9, against float64 and against a plain head on the same bf16 states."""
    weight = torch.randn(200, 64, generator=seeded(0)).bfloat16()
    targets = torch.arange(0, 200, 3)
    hidden = sharpness * weight[targets].float() / weight[targets].float().norm(dim=1)[:, None]
    hidden = hidden.bfloat16().requires_grad_()

    def gradient(logp, states=hidden):
        return torch.autograd.grad(logp.sum(), states)[0].double()

    def plain(logits):
        return logits.log_softmax(-1).gather(-1, targets[:, None])

    wide = hidden.detach().double().requires_grad_()
    exact = gradient(plain(wide @ weight.double().T), wide)
    ours = gradient(decoder.HeadLogprobs.apply(hidden, weight, targets, 1.0))
    theirs = gradient(plain(F.linear(hidden, weight).float()))
    errors = [float((g - exact).norm() / exact.norm()) for g in (ours, theirs)]
    assert errors[0] < 0.15 and errors[0] < 1.2 * errors[1], errors


PROMPTS = [[5, 9, 2], [7] * 11, [1, 2, 3, 4]]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampling_logprobs_equal_a_full_forward_and_any_eos_ends_an_answer(temperature):
    """Prompts of different lengths, several samples, rows that end early."""
    model, eos = lora_model(dropout=0.5).train(), {0, 3, 5, 11, 40}
    settings = {"temperature": temperature, "eos_ids": eos, "samples_per_prompt": 12}
    settings |= {"generator": seeded(3), "return_logprobs": True}
    answers, logps = decoder.generate(model, PROMPTS, 30, **settings)
    assert model.training  # restored
    model.eval()
    assert {a[-1] for group in answers for a in group if len(a) < 30} == eos
    for prompt, group, group_logps in zip(PROMPTS, answers, logps):
        for answer, logp in zip(group, group_logps):
            assert not eos & set(answer[:-1])
            tokens, labels = data.collate([data.Encoded(prompt + answer, len(prompt))])
            full = plain_logprobs(model, tokens, labels, temperature)[0, len(prompt) - 1 :]
            assert torch.tensor(logp) == pytest.approx(full.tolist(), abs=2e-5)


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_what_is_sampled_depends_neither_on_the_batch_nor_on_ends(rows):
    model, settings = lora_model(), {"eos_ids": range(4), "samples_per_prompt": 5}
    expected = decoder.generate(model, PROMPTS, 16, generator=seeded(1), **settings)
    assert len({len(a) for group in expected for a in group}) > 3
    settings |= {"batch_rows": rows, "generator": seeded(1)}
    assert decoder.generate(model, PROMPTS, 16, **settings) == expected


def test_one_step_of_decoding_is_a_static_graph():
    """Traced once, replayed at every position: eager's result, so a GPU can record the step."""
    model, owner = small(), torch.tensor([0, 0, 1])
    caches = []
    for _ in range(3):
        cache = decoder.KVCache()
        _, lengths = decoder.prefill(model, [[5, 9, 2], [7] * 6], cache)
        cache.start_decoding(owner, lengths, 10)
        caches.append(cache)
    eager, replayed, traced_on = caches

    def tensors(cache):
        return [*cache.keys.values(), *cache.values.values(), cache.positions]

    def step(token, *of_cache):
        cache = decoder.KVCache()
        cache.keys = dict(enumerate(of_cache[:2]))
        cache.values = dict(enumerate(of_cache[2:4]))
        cache.positions = of_cache[4]
        return decoder.decode_one_token(model, token, cache)

    token = torch.tensor([1, 2, 3])
    graph = make_fx(step)(token, *tensors(traced_on))
    for _ in range(8):
        expected = decoder.decode_one_token(model, token, eager)
        close(graph(token, *tensors(replayed)), expected, 1e-6)
        token = expected.argmax(-1)
    assert eager.positions.tolist() == replayed.positions.tolist() == [11, 11, 14]


def test_decoding_takes_attention_in_any_memory_layout(monkeypatch):
    """CUDA's kernel for masks gives grouped heads back in a layout of its own."""
    model, attention = small("llama3"), F.scaled_dot_product_attention
    expected = decoder.generate(model, PROMPTS, 8, temperature=0)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, **k: attention(*a, **k).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert decoder.generate(model, PROMPTS, 8, temperature=0) == expected


def test_samples_follow_the_tempered_distribution_and_top_p():
    logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]).log_softmax(-1), 40_000
    uniform = torch.rand(draws, dtype=torch.float64, generator=seeded(0))
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
        refuses("generate", decoder.generate, small(), prompts, length)
    with pytest.warns(UserWarning, match="beyond max_position_embeddings 128") as caught:
        decoder.generate(small(), [[1] * 127], 3, samples_per_prompt=2)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(small(), [[1] * 126], 3)


def test_sharded_and_single_files_load_alike_and_round_trip(tmp_path):
    """Also after the file was saved over: it is mapped into memory."""
    model, one, shards = small("llama2"), tmp_path / "one", tmp_path / "shards"
    decoder.save_model(model, one, eos_token_id=2)
    assert {f.name for f in one.iterdir()} == {"config.json", "model.safetensors"}
    assert len(modes(one)) == 1
    shards.mkdir()
    shutil.copy(one / "config.json", shards)
    state = load_file(one / "model.safetensors")
    where = {n: f"model-{i % 3}.safetensors" for i, n in enumerate(sorted(state))}
    for file in set(where.values()):
        save_file({n: t for n, t in state.items() if where[n] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    loaded, other = [decoder.load_model(folder) for folder in (one, shards)], small("llama2")
    other.head_weight.mul_(2)
    for folder in (one, shards):  # one file wins over the index of older shards
        decoder.save_model(other, folder)
        assert torch.equal(decoder.load_model(folder).head_weight, other.head_weight)
    tokens = torch.arange(20)[None]
    for ours in loaded:
        assert torch.equal(ours(tokens), model(tokens))
        assert not any(p.requires_grad for p in ours.parameters())


def saved(folder, model, tensors=None, fields=None):
    """A checkpoint of the model in which some tensors and fields of the configuration differ."""
    decoder.save_model(model, folder)
    state = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(changed(state, tensors or {}), folder / "model.safetensors")
    rewrite(folder / "config.json", **(fields or {}))
    return folder


def test_a_tied_head_is_tied_where_the_file_says_so_too(tmp_path):
    """Equal: tied. Different: kept apart, with a warning. A head alone serves as embedding too."""
    model, tokens = small("qwen2"), torch.arange(12)[None]
    embedding, other = model.head_weight, model.head_weight.flip(0).contiguous()
    saved(tmp_path, model, {"lm_head.weight": embedding.clone()})
    assert decoder.load_model(tmp_path).lm_head is None
    saved(tmp_path, model, {"lm_head.weight": other})
    with pytest.warns(UserWarning, match="lm_head.weight differs"):
        apart = decoder.load_model(tmp_path)
    close(apart(tokens), F.linear(model.model(tokens), other))
    alone = {"model.embed_tokens.weight": None, "lm_head.weight": embedding.clone()}
    saved(tmp_path, model, alone)
    close(decoder.load_model(tmp_path)(tokens), model(tokens))


def test_rope_scaling_that_a_user_added_wins_and_ignored_biases_are_ignored():
    written = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    added = SMALL | FAMILIES["qwen2"] | written
    added |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "attention_bias": True}
    config = decoder.ModelConfig.from_dict(added)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.rope_theta == 1e6 and not config.attention_bias
    assert decoder.ModelConfig.from_dict(added | {"rope_theta": 333.0}).rope_theta == 333


def test_a_checkpoint_we_cannot_run_is_refused_by_name(tmp_path):
    norm = "model.norm.weight"
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for named, tensors, fields in (
        (norm, {norm: None}, {}),
        ("extra", {"extra": torch.ones(2)}, {}),
        (norm, {norm: torch.ones(32, dtype=torch.int8)}, {}),
        ("model_type", {}, {"model_type": "gpt2"}),
        ("sliding_window", {}, {"model_type": "mistral", "sliding_window": 8}),
        ("sliding_window", {}, {"model_type": "mistral", "sliding_window": None}),
        ("sliding_window", {}, {"use_sliding_window": True, "sliding_window": 8}),
        ("yarn", {}, {"rope_scaling": yarn}),
        ("yarn", {}, {"rope_parameters": yarn}),
        ("rope_parameters", {}, {"rope_parameters": [1]}),
        ("each kind of layer", {}, {"rope_parameters": {"full_attention": {"rope_type": "x"}}}),
        ("no factor", {}, {"rope_scaling": {"rope_type": "linear"}}),
        ("num_key_value_heads is m", {}, {"model_type": "qwen2", "num_key_value_heads": None}),
        ("hidden_size is 32.0", {}, {"hidden_size": 32.0}),
        ("num_attention_heads is 0", {}, {"num_attention_heads": 0}),
        ("num_key_value_heads is True", {}, {"num_key_value_heads": True}),
        ("rms_norm_eps is -1", {}, {"rms_norm_eps": -1}),
        ("tie_word_embeddings is 1", {}, {"tie_word_embeddings": 1}),
        ("hidden_act", {}, {"hidden_act": "gelu"}),
        ("is_causal", {}, {"is_causal": False}),
        ("layer_types", {}, {"layer_types": ["full_attention", "chunked_attention"]}),
        ("layer_types", {}, {"layer_types": 5}),
    ):
        folder = saved(tmp_path, small("llama2"), tensors, fields)
        line = refuses(named, decoder.load_model, folder)
        assert "\n" not in line and len(line) < 300
    for text in ("[1]", "3", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert "\n" not in refuses("config.json", decoder.load_model, tmp_path)


def test_a_truncated_or_absent_file_is_refused(tmp_path):
    folder = saved(tmp_path / "a", small("llama2"))
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weights.write_bytes(weights.read_bytes()[:9999])
    refuses("not a whole safetensors file", decoder.load_model, folder)
    refuses("not a whole safetensors file", decoder.auto_dtype, folder, "cuda")
    weights.unlink()
    refuses("no model.safetensors", decoder.load_model, folder)
    index.write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    refuses("gone.safetensors: this shard is missing", decoder.load_model, folder)
    index.write_text("{}")
    refuses("no weight_map", decoder.load_model, folder)
    large = saved(tmp_path / "b", small("llama2"), {"model.norm.weight": torch.full((32,), 1e5)})
    refuses("not finite in torch.float16", decoder.load_model, large, "cpu", torch.float16)
    refuses("no such model folder", decoder.load_model, tmp_path / "nowhere")


def test_checkpointing_recomputes_every_layer_and_changes_no_gradient():
    model, (tokens, labels) = lora_model(dropout=0.3).train(), answer_batch()
    gradients, calls = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.model.checkpointing in (False, True):
        torch.manual_seed(0)
        decoder.token_logprobs(model, tokens, labels).sum().backward()
        gradients.append(gradient(model))
        model.zero_grad()
    assert len(calls) == 2 + 4  # each of two layers again
    assert torch.equal(*gradients)


def test_old_files_and_every_stored_dtype_load(tmp_path):
    """rotary_emb.inv_freq of old files, a stored copy of a tied head; float16, bfloat16, mixed. In
    bf16, RoPE's frequencies would be off by radians at position 2,000: they are never cast."""
    tokens, angles = torch.arange(12)[None], small().model.inv_freq
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for dtype, on_cuda in ((f32, f32), (f16, bf16), (bf16, bf16), (None, bf16)):
        model = small().to(dtype or f32)
        if dtype is None:  # a file of mixed dtypes
            model.model.layers[0].to(bf16)
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        saved(tmp_path, model, old | {"lm_head.weight": model.head_weight.clone()})
        kept, wide = decoder.load_model(tmp_path, dtype=None), decoder.load_model(tmp_path)
        assert kept.head_weight.dtype == model.head_weight.dtype
        assert all(torch.equal(m.model.inv_freq, angles) for m in (model, kept))
        close(wide(tokens), copy.deepcopy(kept).float()(tokens), 1e-6)
        assert decoder.auto_dtype(tmp_path, "cpu") == f32
        assert decoder.auto_dtype(tmp_path, "cuda:1") == on_cuda
        decoder.load_model(tmp_path, dtype=on_cuda)(tokens)  # one dtype throughout


def test_a_folder_or_a_hub_id_becomes_a_folder(tmp_path, monkeypatch):
    """What the loader reads is downloaded, and no second set of weights."""
    from fnmatch import fnmatch

    download = Mock(return_value=tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert decoder.find_model(tmp_path) == tmp_path and not download.called
    assert decoder.find_model("Qwen/Qwen2.5-7B") == tmp_path
    assert download.call_args.args == ("Qwen/Qwen2.5-7B",)
    wanted = download.call_args.kwargs["allow_patterns"]
    for name, loaded in {
        "model-00001-of-00002.safetensors": True,
        "model-00001-of-000002.safetensors": True,  # as DeepSeek writes it
        "model.safetensors": True,
        "model.fp16.safetensors": False,
        "tokenizer.model": True,
        "chat_template.jinja": True,
        "consolidated.safetensors": False,
        "pytorch_model.bin": False,
    }.items():
        assert any(fnmatch(name, pattern) for pattern in wanted) == loaded, name
    for nowhere in ("nowhere", "./a", "../a", "/a", "~/a", "a/b/c"):
        refuses("no such model folder", decoder.find_model, nowhere)
    download.side_effect = OSError("offline\nand more")
    assert refuses("Hub", decoder.find_model, "a/b").endswith("(offline)")


# ------------------------------------------------------------------------------------- LoRA layers


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
    assert A.untyped_storage().nbytes() == 4 * A.numel()  # no view that keeps all of R
    assert B.untyped_storage().nbytes() == 4 * B.numel()
    A, B = lorapar.start_factors(torch.empty(400, 500), "anchored", r, scale, 0.01, None)
    assert A.std() == pytest.approx(0.01, rel=0.1) and B.std() == pytest.approx(0.01, rel=0.1)
    A, B = lorapar.start_factors(W, "lora", r, scale, 0.01, None)
    assert not B.any() and A.abs().max() <= 12**-0.5


@pytest.mark.parametrize("init", ["anchored", "pissa", "olora", "lora", "gaussian"])
def test_one_formula_serves_start_forward_export_and_merge(init, tmp_path):
    """Step 0 is the base, in train mode with dropout. Then each layer against
    W x + s (B A - B0 A0) x written out, then the file, then the merge."""
    start, model = lora_model(init, moved=False, dropout=0.5), lora_model(init, dropout=0.5)
    base, tokens = small(), torch.arange(24).view(2, 12)
    if init == "gaussian":
        assert (start.train()(tokens) - base(tokens)).abs().max() > 0.01
    else:
        close(start.train()(tokens), base(tokens), 1e-6)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()  # exact below, without dropout
    starts, dense = lorapar.lora_layers(start), {}
    for name, layer in lorapar.lora_layers(model).items():
        delta = layer.lora_B @ layer.lora_A
        if init in ("anchored", "pissa", "olora"):
            delta = delta - starts[name].lora_B @ starts[name].lora_A
        dense[name] = layer.weight + 2.0 * delta.detach()  # s = alpha / r = 6 / 3
        x = torch.randn(4, layer.in_features)
        close(layer(x), F.linear(x, dense[name], layer.bias))
    model.config._name_or_path = "org/base"  # Hugging Face's models say where they are from
    lorapar.save_adapter(model, tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    assert modes(tmp_path) == {0o666 & ~umask}  # safetensors' own is 0600
    config = read(tmp_path / "adapter_config.json")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["r"] == len(next(t for n, t in tensors.items() if "lora_A" in n))
    assert config["base_model_name_or_path"] == "org/base"
    reference = small()
    for name, weight in dense.items():  # as PEFT reads it, on the untouched base
        A, B = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        scale = config["lora_alpha"] / config["r"]
        close(base.get_submodule(name).weight + scale * B @ A, weight)
        reference.get_submodule(name).weight.copy_(weight)
    twin = copy.deepcopy(model)
    assert lorapar.merge(twin).config._name_or_path == ""  # no longer that checkpoint
    for ours in (model, lorapar.load_adapter(small(), tmp_path)):
        close(ours(tokens), reference(tokens))
        assert not any(isinstance(m, lorapar.LoRALinear) for m in lorapar.merge(ours).modules())
        close(ours(tokens), reference(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_command_writes_a_whole_checkpoint(dtype, tmp_path, monkeypatch):
    """Merged in float32, stored in the checkpoint's dtype, every other file copied but
    the index of the weights; a Hub id works too."""
    base, out, adapter = tmp_path / "base", tmp_path / "merged", tmp_path / "adapter"
    decoder.save_model(small("llama2").to(dtype), base, eos_token_id=7)
    data.save_toy_tokenizer(base)
    tuned = lorapar.add_lora(decoder.load_model(base), r=3, lora_alpha=6)
    lorapar.set_flat(tuned, 0.1 * torch.randn(len(lorapar.get_flat(tuned))))
    lorapar.save_adapter(tuned, adapter)
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(return_value=base))
    (base / "LICENSE").write_text("MIT")
    rewrite(base / "config.json", tie_word_embeddings=True)  # it says so wrongly
    with pytest.warns(UserWarning, match="not tied"):
        train.main(["merge", "--adapter", str(adapter), "--out", str(out), "--model", "org/base"])
    assert read(out / "config.json")["tie_word_embeddings"] is False
    assert (out / "LICENSE").exists() and not list(tmp_path.glob("*.tmp"))
    merged, tokens = decoder.load_model(out, dtype=None), torch.arange(20)[None]
    assert merged.head_weight.dtype == dtype and data.Tokenizer(out).eos_ids == (0, 7)
    assert not (out / "model.safetensors.index.json").exists() and len(modes(out)) == 1
    expected = lorapar.merge(tuned)
    for name, weight in expected.named_parameters():
        assert torch.equal(merged.get_parameter(name), weight.to(dtype)), name
    close(merged.float()(tokens), expected(tokens), 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("init", ["anchored", "pissa"])
def test_peft_reads_our_adapter_on_the_untouched_base(init, tmp_path):
    """With the libraries themselves where they are installed."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    decoder.save_model(small(), tmp_path / "base", bos_token_id=1, eos_token_id=2)
    model, tokens = lora_model(init), torch.arange(20)[None]
    lorapar.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close(theirs(tokens).logits, small()(tokens))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    close(theirs(tokens).logits, model(tokens))


def test_adapters_of_other_writers_load_and_what_we_cannot_run_is_refused(tmp_path):
    """rslora scales by the root of the rank; PEFT loads keys with an adapter's name in them."""
    model, tokens = lora_model("gaussian", r=4, lora_alpha=8), torch.arange(20)[None]
    lorapar.save_adapter(model, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good = config.read_text()
    rewrite(config, use_rslora=True, lora_alpha=4)  # 4 / sqrt(4) is our 8 / 4
    close(lorapar.load_adapter(small(), tmp_path)(tokens), model(tokens))
    for named, fields in {
        "use_dora": {"use_dora": True},
        "not LORA": {"peft_type": "IA3"},
        "PEFT changes the base": {"init_lora_weights": "pissa_niter_16"},
        "lora_alpha is True": {"lora_alpha": True},
        "r is '4'": {"r": "4"},
        "of r = 16": {"r": 16},
        "bias is 'all'": {"bias": "all"},
    }.items():
        config.write_text(good)
        rewrite(config, **fields)
        assert "\n" not in refuses(named, lorapar.load_adapter, small(), tmp_path)
    config.write_text("[]")
    refuses("not a JSON object", lorapar.load_adapter, small(), tmp_path)
    config.write_text(good)
    assert " here" in refuses("which is ", lorapar.load_adapter, small("mistral"), tmp_path)
    refuses("already", lorapar.load_adapter, model, tmp_path)
    tensors = load_file(weights)
    named = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    save_file(named, weights)
    close(lorapar.load_adapter(small(), tmp_path)(tokens), model(tokens))
    next(iter(tensors.values()))[0] = math.nan
    save_file(tensors, weights)
    refuses("not finite", lorapar.load_adapter, small(), tmp_path)


def compile_inside(model):
    """Its first layer and one linear are compiled by themselves."""
    first, mlp = model.model.layers[0], model.model.layers[1].mlp
    model.model.layers[0] = torch.compile(first, backend="eager")
    mlp.up_proj = torch.compile(mlp.up_proj, backend="eager")
    return model


WRAPS = [torch.compile, nn.DataParallel, compile_inside, torch.optim.swa_utils.AveragedModel]
WRAPS += [lambda model: torch.compile(nn.DataParallel(model))]
WRAPS += [type("DeepSpeedEngine", (nn.DataParallel,), {})]  # known by its name alone


@pytest.mark.parametrize("wrap", WRAPS)
def test_an_adapter_file_has_the_wrapped_models_names(wrap, tmp_path):
    """torch.compile and DataParallel put names of their own in front."""
    model, tokens = lora_model(), torch.arange(20)[None]
    lorapar.save_adapter(wrap(model), tmp_path)
    close(lorapar.load_adapter(small(), tmp_path)(tokens), model(tokens))
    wrapped = wrap(small())
    lorapar.load_adapter(wrapped, tmp_path)
    close(lorapar.unwrapped(wrapped)(tokens), lorapar.unwrapped(model)(tokens))
    some = lorapar.add_lora(small(), ["layers.1.self_attn.q_proj"], r=2)
    lorapar.save_adapter(some, tmp_path)  # not every q_proj has an adapter, so full names
    expected = ["model.layers.1.self_attn.q_proj"]
    assert read(tmp_path / "adapter_config.json")["target_modules"] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_cached_for_decoding_change_nothing_and_are_given_back(dtype):
    model = lorapar.add_lora(small().to(dtype), r=3, std=0.1).eval()
    lorapar.set_flat(model, 1.5 * lorapar.get_flat(model))
    tokens = torch.arange(20)[None]
    plain = model(tokens)
    with pytest.raises(KeyError), lorapar.cached_factors(model):
        assert torch.equal(model(tokens), plain)
        lorapar.set_flat(model, 0 * lorapar.get_flat(model))
        assert torch.equal(model(tokens), plain)  # the cached ones
        raise KeyError
    assert not torch.equal(model(tokens), plain)


def test_flat_order_is_named_modules_then_A_then_B_row_major():
    model = lora_model(targets=["q_proj", "down_proj"])
    named = [m for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]
    expected = [factor.flatten() for m in named for factor in (m.lora_A, m.lora_B)]
    flat = lorapar.get_flat(model)
    assert torch.equal(flat, torch.cat(expected).detach())
    lorapar.set_flat(model, torch.arange(len(flat)).float())
    assert named[0].lora_A[1, 0] == named[0].in_features
    refuses("shape", lorapar.set_flat, model, flat[:-1])
    refuses("no anchor", lorapar.set_anchor, lora_model("gaussian"), flat)


class Foreign(nn.Module):
    """A model of another project: gives logits as its library does."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.embed, self.q_proj, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)
        self.wrap = wrap
        self.spare = nn.Sequential(nn.Linear(8, 8))  # no token reaches it
        # a linear that computes its own way: no layer of ours may stand in for it
        self.own = type("Doubled", (nn.Linear,), {"forward": lambda s, x: 2 * x})(4, 4)

    def forward(self, tokens):
        return self.wrap(self.head(self.q_proj(self.embed(tokens)).relu()))


def test_targets_are_names_or_their_ends_or_all_linears_but_the_head():
    def adapted(model, targets):
        lorapar.add_lora(model, targets, r=1)
        return list(lorapar.lora_layers(model))

    assert adapted(Foreign(), ["q_proj", "spare.0"]) == ["q_proj", "spare.0"]
    assert adapted(Foreign(), ("0",)) == ["spare.0"]
    headed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64))
    headed.get_output_embeddings = lambda: headed[1]
    assert adapted(headed, "all-linear") == ["0"]
    names = adapted(small("llama2"), "all-linear")
    assert len(names) == 14 and not any("head" in name for name in names)
    tail = nn.Sequential(nn.Tanh(), nn.LayerNorm(8))  # 2.1 ends like the linear 1
    assert adapted(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), tail), "all-linear") == ["1"]
    layer = next(iter(lorapar.lora_layers(lora_model(r=2, lora_alpha=None)).values()))
    assert layer.scale == 8 and "r=2, scale=8" in repr(layer)


def test_every_name_of_a_linear_gets_the_layer_and_hooks_stay(tmp_path):
    model, calls = Foreign(), []
    model.twin = model.q_proj
    model.q_proj.register_forward_hook(lambda *_: calls.append(1))
    lorapar.add_lora(model, ["twin"], r=2)
    assert type(model.q_proj) is type(model.twin) is lorapar.LoRALinear
    assert model.q_proj is model.twin and len(lorapar.lora_layers(model)) == 1
    lorapar.save_adapter(model, tmp_path)
    file, tensors = tmp_path / "adapter_model.safetensors", {}
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        tensors[name.replace("q_proj", "twin")] = tensor  # as another writer may call it
    save_file(tensors, file)
    other = Foreign()
    other.twin = other.q_proj
    assert type(lorapar.load_adapter(other, tmp_path).q_proj) is lorapar.LoRALinear
    model.config = SimpleNamespace()  # of one's own: PEFT must not take it for Hugging Face's
    lorapar.save_adapter(model, tmp_path)
    assert read(tmp_path / "adapter_config.json")["task_type"] is None
    model(torch.arange(4)[None])
    assert calls == [1]
    assert (lorapar.importance(model, [answer_batch()]) > 0).any()
    plain = lorapar.merge(model)
    assert type(plain.q_proj) is nn.Linear and "lora_A" not in dict(plain.named_parameters())


def test_add_lora_refuses_bad_calls():
    def offloaded():
        model = Foreign()
        model.q_proj.weight = nn.Parameter(torch.empty(8, 8, device="meta"))
        return model

    def patched():
        model = Foreign()
        model.q_proj.forward = lambda x: x
        return model

    def of_peft():
        model = small("llama2")
        model.peft_config = {}
        return model

    for make, expected, arguments in (
        (small, "targets 'q_proj': a sequence", {"targets": "q_proj"}),
        (small, "no targets", {"targets": []}),
        (small, "no module is named kproj", {"targets": ["q_proj", "kproj"]}),
        (small, "unknown init", {"init": "x"}),
        (small, "r = 99", {"r": 99}),
        (small, "r = 0 must be", {"r": 0}),
        (small, "r = 2.0 must be", {"r": 2.0}),
        (Foreign, "1 of 3 targets", {"targets": "all-linear", "r": 2}),
        (small, "lora_alpha = 0", {"lora_alpha": 0}),
        (small, "dropout = 1.5", {"dropout": 1.5}),
        (lambda: baseline_model("ia3"), "adapters already", {}),
        (of_peft, "adapters already", {}),
        (Foreign, "the model's linears are 0, head, q_proj", {"targets": ["x"]}),
        (Foreign, "is a Doubled", {"targets": ["own"]}),
        (offloaded, "meta device", {"targets": ["q_proj"], "r": 2}),
        (patched, "another library", {"targets": ["q_proj"], "r": 2}),
        (lora_model, "already", {}),
    ):
        model = make()
        layers = [type(m) for m in model.modules()]
        refuses(expected, lorapar.add_lora, model, **arguments)
        assert [type(m) for m in model.modules()] == layers  # nothing was half done


def test_what_would_be_wrong_in_silence_is_refused(tmp_path):
    model = lorapar.add_lora(small("llama2"), ["lm_head"], r=2)
    refuses("adapters on lm_head", decoder.token_logprobs, model, *answer_batch())
    model = lora_model().to(torch.bfloat16)
    refuses("small steps need float32", lorapar.MaskedAdamW, model)
    refuses("cast before add_lora or after merge", model, answer_batch(1)[0])
    for adapted in (model, baseline_model("ia3")):
        refuses("merge the adapters first", decoder.save_model, adapted, tmp_path)
    assert not list(tmp_path.iterdir())
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    refuses("fast path", lorapar.add_lora, nn.TransformerEncoder(layer, 1), ["linear1"], r=2)
    for wrap in (
        lambda logits: {"logits": logits},
        lambda logits: logits[:, 0],
        lambda logits: logits[:, -1:],  # nanoGPT without targets
    ):
        model = lorapar.add_lora(Foreign(wrap), ["q_proj"], r=2)
        refuses("must give logits", lorapar.importance, model, [answer_batch(2)])
    tokens, labels = answer_batch(2)
    for batches in ([{"tokens": tokens, "labels": labels}], (tokens, labels), [(tokens,)]):
        refuses("needs pairs (tokens, labels)", lorapar.importance, model, batches)
    noisy = lorapar.add_lora(Foreign(lambda x: F.dropout(x, 0.5, True)), ["q_proj"], r=2)
    refuses("vmap cannot run this model", lorapar.importance, noisy, [answer_batch(2)])


# -------------------------------------------------------------------------------------- importance


def importance_by_loop(model, batches):
    """The definition: one example at a time, by ordinary autograd, unpadded, in float64."""
    factors = list(lorapar.lora_factors(model).values())
    phi = lorapar.get_flat(model).double()
    gradients = []
    for tokens, labels in batches:
        for t, y in zip(tokens, labels):
            end = int((y != -100).nonzero().max()) + 1
            output = model(t[None, : end - 1])
            output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            logp = output[0].log_softmax(-1).gather(-1, y[1:end, None].clamp(min=0))[:, 0]
            answer = y[1:end] != -100
            loss = -(logp * answer).sum() / answer.sum()
            of_one = torch.autograd.grad(loss, factors, materialize_grads=True)
            gradients.append(torch.cat([g.flatten() for g in of_one]))
    gradients = torch.stack(gradients).double()
    g, fisher = gradients.mean(0), gradients.square().mean(0)
    return (g * phi - 0.5 * fisher * phi**2).abs()


@pytest.mark.parametrize("init", ["anchored", "gaussian", "pissa"])
@pytest.mark.parametrize("chunk_tokens", [1, 30, 512])
def test_importance_equals_a_loop_over_single_examples(init, chunk_tokens):
    """Without the prompts' loss, whatever the padding holds, whatever chunk passes at once."""
    model, (tokens, labels) = lora_model(init, moved=False, dropout=0.3), answer_batch(4, seed=2)
    padded = F.pad(tokens, (0, 5), value=63), F.pad(labels, (0, 5), value=-100)
    batches = [answer_batch(5, seed=1), padded]
    expected = importance_by_loop(model, batches)
    model.train()
    model.model.layers[0].eval()  # a frozen part: every module gets its own flag back
    flags = [m.training for m in model.modules()]
    with torch.no_grad():  # what the caller has switched on changes nothing
        ours = lorapar.importance(model, batches, chunk_tokens)
    assert [m.training for m in model.modules()] == flags and ours.dtype == torch.float32
    close(ours.double(), expected)


def test_scoring_takes_no_fused_attention_kernel():
    """On CUDA they keep nothing for the backward where vmap hides that a gradient is needed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lorapar.importance(lora_model(moved=False), [answer_batch()])
    kernels = {event.key for event in profile.key_averages() if "scaled_dot" in event.key}
    assert kernels == {
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_attention_math",
    }


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: SimpleNamespace(logits=x)]
)
def test_importance_works_on_any_model(wrap):
    torch.manual_seed(0)
    model = lorapar.add_lora(Foreign(wrap), ["q_proj", "head", "0"], r=2)
    scores = lorapar.importance(model, [answer_batch()])
    close(scores.double(), importance_by_loop(model, [answer_batch()]))
    plain, packed = model.embed.forward, []

    def packs(tokens):  # into (1, B T, in): any shape inside the model is right
        packed.append(tokens.shape)
        return plain(tokens).reshape(1, -1, 8)

    model.embed.forward = packs
    model.wrap = lambda logits: wrap(logits.reshape(*packed[-1], 64))
    close(lorapar.importance(model, [answer_batch()]), scores)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_importance_of_transformers_own_models_equals_the_loop(family, attention):
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in SMALL.items() if k != "rms_norm_eps"} | {"head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    lorapar.add_lora(model, r=2, std=0.1, generator=seeded(0))
    batches = [answer_batch(4), answer_batch(3, seed=1)]
    ours = lorapar.importance(model, batches)
    close(ours.double(), importance_by_loop(model, batches), 1e-4)


def test_default_dtype_and_device_of_the_caller_change_nothing():
    expected = [lora_model(), decoder.generate(lora_model(), PROMPTS, 4, generator=seeded(0))]
    start = lorapar.get_flat(lora_model(moved=False))
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = lora_model(moved=False)
        assert torch.equal(lorapar.get_flat(model), start)
        logp = decoder.token_logprobs(expected[0], *answer_batch())
        assert logp.dtype == torch.float32
        assert decoder.generate(expected[0], PROMPTS, 4, generator=seeded(0)) == expected[1]
    finally:
        torch.set_default_dtype(torch.float32)
    scores = lorapar.importance(expected[0], [answer_batch()])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lorapar.importance(expected[0], [answer_batch()]), scores)
    with torch.device("meta"):  # a default device that can do nothing
        A, B = lorapar.start_factors(torch.empty(6, 5), "anchored", 2, 1.0, 0.1, seeded(0))
        assert A.device.type == B.device.type == "cpu"
        assert decoder.rope_frequencies(expected[0].config).device.type == "cpu"


def test_scores_that_rank_nothing_are_an_error_that_names_the_cure():
    """With B = 0, dL/dA and phi_B vanish."""
    refuses("anchored", lorapar.importance, lora_model("lora", moved=False), [answer_batch()])
    empty = answer_batch()
    empty[1][3] = -100
    refuses("example 3 has no answer", lorapar.importance, lora_model(), [empty])
    refuses("at least one", lorapar.importance, lora_model(), [])


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
    s1, s2 = torch.randn(2, 500, generator=seeded(5)).abs()
    if kind == "ties":
        s1, s2 = (s1 * 3).round() + 1, torch.ones(500)
    if kind == "zeros":
        s1[100:] = 0
    if kind == "spread":
        s1, s2 = s1**20, s2**9
    one, two = (region_by_definition(s.tolist(), theta) for s in (s1, s2))
    part = [set(region.nonzero()[:, 0].tolist()) for region in lorapar.partition(s1, s2, theta)]
    assert part == [one - two, two - one, one & two]


def test_partition_sums_in_float64():
    """2^24 equal scores and one large: a float32 sum would stop growing at 2^24."""
    scores = torch.ones(2**24 + 2**22)
    scores[7] = 2.0
    region = lorapar.cumulative_region(scores, 0.9)
    count = math.ceil(0.9 * (len(scores) + 1)) - 1
    assert int(region.sum()) == count and region[:count].all()  # ties to the lower index


def test_partition_refuses_bad_input():
    good = torch.ones(4)
    for theta in (0, -0.1, 1.01, float("nan")):
        refuses("theta", lorapar.partition, good, good, theta)
    odd = [torch.tensor([1.0, float(x), 1, 1]) for x in ("nan", "inf", "-1")]
    for bad in [*odd, torch.zeros(4), -good, torch.ones(3)]:
        for theta in (0.5, 1):
            refuses("scores", lorapar.partition, good, bad, theta)


@pytest.mark.parametrize("fraction", [0.0, 0.33, 0.5, 1.0])
def test_stage_masks_take_their_region_and_the_top_of_the_shared_one(fraction):
    s1, s2 = torch.randint(1, 9, (2, 300), generator=seeded(2)).float()
    part = lorapar.partition(s1, s2, 0.8)
    shared = part.shared.nonzero()[:, 0].tolist()
    for scores, own in ((s1, part.s1_only), (s2, part.s2_only)):
        best = sorted(shared, key=lambda i: -scores[i])[: int(fraction * len(shared))]
        expected = own.clone()
        expected[best] = True
        assert torch.equal(lorapar.stage_mask(own, part.shared, scores, fraction), expected)
    for bad in (1.5, -0.1):
        refuses("fraction", lorapar.stage_mask, part.s1_only, part.shared, s1, bad)


def test_random_selection_keeps_every_region_size():
    model = lora_model()
    sizes = [p.numel() for p in lorapar.lora_factors(model).values()]
    s1, s2 = torch.rand(2, sum(sizes), generator=seeded(1)) ** 4
    real = lorapar.partition(s1, s2, 0.7)
    for select in ("random", "random-in-tensor"):
        moved = train.permuted(model, s1, s2, select, seeded(0))
        for region, original in zip(lorapar.partition(*moved, 0.7), real):
            assert region.sum() == original.sum() and not torch.equal(region, original)
            tensors = zip(region.split(sizes), original.split(sizes))
            in_tensor = all(a.sum() == b.sum() for a, b in tensors)
            assert in_tensor == (select == "random-in-tensor")


# --------------------------------------------------------------------------------------- optimizer


def masked(model, share=0.3, seed=0):
    mask = torch.rand(len(lorapar.get_flat(model)), generator=seeded(seed)) < share
    lorapar.set_mask(model, mask)
    return mask


def random_gradients(model, seed=0):
    generator = seeded(seed)
    for factor in lorapar.lora_factors(model).values():
        factor.grad = torch.randn(factor.shape, generator=generator)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in lorapar.lora_factors(model).values()])


def gradient_of(loss, model):
    """The loss's gradient as a flat vector, by ordinary autograd."""
    factors = list(lorapar.lora_factors(model).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)])


@pytest.mark.parametrize("share", [0.3, 1.1])
def test_active_elements_take_the_steps_of_adamw_and_frozen_ones_never_move(share):
    """Bit for bit, with weight decay, momentum from before, and the gradient's norm
    clipped over the active elements; against torch's AdamW on a vector of those alone."""
    model, settings = lora_model(), {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
    mask, start = masked(model, share), lorapar.get_flat(model)
    optimizer = lorapar.MaskedAdamW(model, **settings, max_grad_norm=0.5)
    vector = nn.Parameter(start[mask])
    reference = torch.optim.AdamW([vector], **settings)
    for step in range(20):
        random_gradients(model, step)
        vector.grad = gradient(model)[mask]
        norm = nn.utils.clip_grad_norm_([vector], 0.5)
        optimizer.step()
        reference.step()
        assert optimizer.grad_norm == norm
        assert torch.equal(optimizer.packed, vector)
        assert torch.equal(lorapar.get_flat(model), start.masked_scatter(mask, vector))
        state = optimizer.state[optimizer.packed]
        assert sum(t.nbytes for t in state.values()) == 8 * int(mask.sum()) + 4
        if step == 0:
            for moments in (state, reference.state[vector]):
                moments["exp_avg"] += 1.0
                moments["exp_avg_sq"] += 1.0
    assert (vector != start[mask]).all()


def test_the_optimizer_keeps_adamws_contract():
    """step(closure), copies and files, and a state that belongs to another mask."""
    model, batch = lora_model(), answer_batch()
    masked(model)
    optimizer, hooked = lorapar.MaskedAdamW(model, lr=0.01, max_grad_norm=1.0), []
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # makes AdamW.step call hooks, too

    def closure():
        optimizer.zero_grad()
        loss = -decoder.token_logprobs(model, *batch).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        hook = optimizer.register_step_post_hook(lambda *_: hooked.append(1))
        first, second = optimizer.step(closure), optimizer.step(closure)
        hook.remove()
    assert second < first and len(hooked) == 2
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    alone = copy.deepcopy(optimizer)  # with a model of its own
    for m, o in ((model, optimizer), (twin, its_optimizer), (alone.model, alone)):
        random_gradients(m)
        o.step()
        assert torch.equal(lorapar.get_flat(m), lorapar.get_flat(model))
    assert its_optimizer.model is twin and alone.model is not model
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    optimizer.load_state_dict(optimizer.state_dict())
    lorapar.set_mask(model, lorapar.get_mask(model).roll(1))  # as many, but others
    refuses("another mask", lorapar.MaskedAdamW(model).load_state_dict, state)


def test_an_update_of_nothing_or_of_what_is_not_finite_is_an_error_and_moves_nothing():
    model = lora_model()
    start = lorapar.get_flat(model)
    nothing = torch.zeros(len(start), dtype=torch.bool)
    refuses("bool", lorapar.set_mask, model, nothing.float())
    lorapar.set_mask(model, nothing)
    refuses("no active element", lorapar.MaskedAdamW, model)
    masked(model)
    refuses("max_grad_norm = 0", lorapar.MaskedAdamW, model, max_grad_norm=0)
    optimizer = lorapar.MaskedAdamW(model)
    refuses("backward", optimizer.step)
    for bad in (float("inf"), float("nan")):
        random_gradients(model)
        for factor in lorapar.lora_factors(model).values():
            factor.grad[0] = bad
        refuses("norm of the gradient", optimizer.step, error=FloatingPointError)
        assert torch.equal(lorapar.get_flat(model), start)
    random_gradients(model)
    optimizer.step()  # Adam's state took no harm
    start = lorapar.get_flat(model)
    assert start.isfinite().all()
    optimizer.packed.data.fill_(0)
    optimizer.state[optimizer.packed]["exp_avg"].fill_(float("inf"))
    refuses("updated element is not finite", optimizer.step, error=FloatingPointError)
    assert torch.equal(lorapar.get_flat(model), start)
    masked(model, seed=1)
    refuses("set_mask was called", optimizer.step)


# --------------------------------------------------------------------------- baselines of table 6

VIRTUAL = 4
# Six logits of the last position of row 0 that PEFT 0.21 gave (eager, float32), for the same
# parameters; Prefix-Tuning's keys turned back by their positions, for PEFT does not rotate them.
BASELINE_LOGITS = {
    "prompt": [1.2645, 2.5069, 2.5237, 1.597, 1.5667, -0.5525],
    "p-tuning": [-0.4237, 0.8576, -1.8835, 0.1229, -0.907, 0.0258],
    "prefix": [1.0949, 2.474, 0.8861, 1.4334, 1.0032, -0.1399],
    "ia3": [0.6604, 2.7272, 1.0037, 0.8323, 0.79, -0.9467],
}


def baseline_model(method):
    """A baseline on a small model, its parameters sines of their index."""
    model = lorapar.add_baseline(small("llama2"), method, VIRTUAL, seeded(0))
    wave = 0.5 * torch.sin(torch.arange(len(lorapar.get_flat(model)), dtype=torch.float64) ** 1.2)
    lorapar.set_flat(model, wave.float() + (method == "ia3"))
    return model


def with_virtual(method, tokens):
    n = 0 if method == "ia3" else VIRTUAL
    virtual = torch.arange(64, 64 + n).expand(len(tokens), n)
    return torch.cat((virtual, tokens), 1)


@pytest.mark.parametrize("method", lorapar.BASELINE_METHODS)
def test_baselines_compute_what_peft_computes(method, tmp_path):
    """Also live where PEFT is installed; what generates and trains reads the same."""
    tokens = torch.tensor([[5, 9, 2, 33, 17, 60], [1, 2, 3, 4, 5, 6]])
    model, rows = baseline_model(method), with_virtual(method, tokens)
    logits = model(rows)[0, -1]
    close(logits[:6], torch.tensor(BASELINE_LOGITS[method]), 1e-3)
    for prompt, answer in zip(rows, decoder.generate(model, rows.tolist(), 5, temperature=0)):
        whole = torch.cat((prompt, torch.tensor(answer[0])))[None]
        greedy = model(whole)[0, len(prompt) - 1 : -1].argmax(-1)  # without a cache
        assert greedy.tolist() == answer[0]
    lorapar.save_adapter(torch.compile(nn.DataParallel(model)), tmp_path / "saved")
    again = lorapar.load_baseline(small("llama2"), tmp_path / "saved")
    assert torch.equal(again(rows), model(rows))
    try:
        import peft
        import transformers
    except ImportError:
        return
    decoder.save_model(small("llama2"), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    n = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
    linears = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**n),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=32, **n),
        "prefix": lambda: peft.PrefixTuningConfig(**n),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **linears),
    }[method]()
    theirs = peft.get_peft_model(theirs, config).eval()
    assert theirs.get_nb_trainable_parameters()[0] == len(lorapar.get_flat(model))
    embedding, modules = model.model.embed_tokens, dict(model.named_modules())
    with torch.no_grad():
        if method == "ia3":
            for name, module in theirs.named_modules():
                if getattr(module, "ia3_l", None):
                    own = modules[name.removeprefix("base_model.model.")].scale
                    module.ia3_l["default"].copy_(own.view_as(module.ia3_l["default"]))
        else:
            encoder = theirs.prompt_encoder["default"]
            vectors = embedding.virtual
            if method == "p-tuning":
                encoder.mlp_head.load_state_dict(embedding.mlp.state_dict())
            if method == "prefix":
                angles = torch.arange(VIRTUAL)[:, None] * model.model.inv_freq
                angles = torch.cat((angles, angles), -1)
                vectors = []
                for layer in model.model.layers:
                    keys = layer.self_attn.k_proj.prefix.unflatten(1, (-1, angles.shape[1]))
                    keys = decoder.rotate(keys.transpose(0, 1), angles.cos(), angles.sin())
                    vectors += [keys.transpose(0, 1).flatten(1), layer.self_attn.v_proj.prefix]
                vectors = torch.cat(vectors, 1)
            encoder.embedding.weight.copy_(vectors)
        close(logits, theirs(input_ids=tokens).logits[0, -1], 1e-4)


@pytest.mark.parametrize("method", lorapar.BASELINE_METHODS)
def test_baselines_start_as_their_papers_say(method, tmp_path):
    plain, model = small("llama2"), small("llama2").requires_grad_(True)
    lorapar.add_baseline(model, method, VIRTUAL, seeded(0))
    assert all(p.dtype == torch.float32 for p in lorapar.trainable(model).values())
    assert not model.head_weight.requires_grad
    tokens = torch.tensor([[5, 9, 2, 33]])
    if method == "ia3":  # as the identity
        assert torch.equal(model(tokens), plain(tokens))
    words = torch.randint(64, (1, VIRTUAL), generator=seeded(0))
    if method in ("prompt", "prefix"):  # like so many words in front
        behind = plain(torch.cat((words, tokens), 1))[:, -4:]
        close(model(with_virtual(method, tokens))[:, -4:], behind)
    if method == "p-tuning":
        assert abs(float(model.model.embed_tokens.virtual.detach().std()) - 1) < 0.2
    refuses("unknown method", lorapar.add_baseline, plain, "lora")
    (tmp_path / "baseline.json").write_text("{")
    refuses(f"{tmp_path}: not a readable", lorapar.load_baseline, plain, tmp_path)
    refuses("adapters already", lorapar.add_baseline, model, method)
    if method in ("prefix", "ia3"):
        refuses("needs an nn.Embedding and linears", lorapar.add_baseline, Foreign(), method)


# ------------------------------------------------------------------------------------------- data


@needs_shared
@pytest.mark.parametrize("name", ["llama2_tokenizer", "qwen_tokenizer"])
def test_real_tokenizers_chats_and_answers(name):
    """Against fixtures of transformers; an answer survives, and its tokens with the prompt's are
    those of the whole text."""
    folder = SHARED / "fixtures" / name
    tokenizer, facts = data.Tokenizer(folder), read(folder / "expected.json")
    for case in facts["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        if "NFC" in case["text"] or case["text"] == case["decoded"]:
            ids = tokenizer.encode(case["text"], goes_on=True)
            assert tokenizer.decode(ids + [10**6, 2**31]) == case["decoded"]  # padded heads
    ids = tokenizer.encode("Hello world", bos=True, eos=True)
    if name == "llama2_tokenizer":  # exactly one BOS where the model wants one
        assert ids.count(1) == 1 and ids[0] == 1 and ids[-1] == 2
    else:
        assert tokenizer.bos_id is None and ids[-1] == 1002
        chats = [chat for chat in facts["chats"] if chat["add_generation_prompt"]]
        texts = [tokenizer.chat(chat["messages"]) for chat in chats]
        assert texts == [chat["rendered"] for chat in chats] and len(chats) >= 2
        assert [tokenizer.encode(t, bos=True) for t in texts] == [chat["ids"] for chat in chats]
    for text in SPACES:
        assert tokenizer.decode(tokenizer.encode(text, goes_on=True)) == text
    for e in data.load_dataset("humaneval", SHARED / "data/humaneval", "test"):
        assert tokenizer.decode(data.example_ids(e, tokenizer)[1]) == e.answer
    for e in data.load_dataset("gsm8k", SHARED / "data/gsm8k", "test")[:20]:
        prompt, answer = data.example_ids(e, tokenizer)
        whole = tokenizer.encode(e.question + "\n" + e.answer, bos=True, eos=True)
        assert prompt + answer == whole and prompt == tokenizer.encode(e.question + "\n", bos=True)


SPACES = "  x|\tx|\n\n x|x| ||    return| \n|a  b |<s> x| é\U0001f600 ".split("|")


def test_the_spaces_of_an_answer_survive(tmp_path):
    """In small: LLaMA's way of marking spaces, which drops the first one when decoding."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = dict.fromkeys(["<eos>", *"▁\n\tabxreturn<s>é\U0001f600"])
    bpe = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<eos>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    bpe.normalizer = normalizers.Sequence(marks)
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    unmarks = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(unmarks)
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    tokenizer = data.Tokenizer(tmp_path)
    for text in SPACES:
        assert tokenizer.decode(tokenizer.encode(text, eos=True, goes_on=True)) == text
        example = data.Example("x", "a b", text, "text")
        assert tokenizer.decode(data.example_ids(example, tokenizer)[1]) == text
    assert tokenizer.decode([9999] + tokenizer.encode("x", goes_on=True)) == "x"


@pytest.fixture
def toy_tokenizer(tmp_path):
    data.save_toy_tokenizer(tmp_path)
    return data.Tokenizer(tmp_path)


def test_tokenizer_reads_special_tokens_from_the_checkpoints_files(toy_tokenizer, tmp_path):
    assert toy_tokenizer.decode(toy_tokenizer.encode("M b d | rev A", eos=True)) == "M b d | rev A"
    assert (toy_tokenizer.bos_id, toy_tokenizer.eos_ids) == (None, (0,))
    assert toy_tokenizer.pad_id == 0  # none is named: the EOS
    settings = {"bos_token": {"content": "F"}, "eos_token": "<eos>", "add_bos_token": True}
    settings["pad_token"] = "M"
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.encode("A", bos=True, eos=True) == [2, 1, 0] and tokenizer.eos_ids == (0, 5)
    assert tokenizer.pad_id == data.TOY_TOKENS.index("M")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "c1"}')
    assert data.Tokenizer(tmp_path).eos_ids[0] == data.TOY_TOKENS.index("c1")  # the map wins,
    config.write_text(json.dumps(settings | {"added_tokens_decoder": {}}))  # but not over this
    assert data.Tokenizer(tmp_path).eos_ids == (0, 5)
    (tmp_path / "special_tokens_map.json").unlink()
    config.write_text("{}")  # the model's files alone name an EOS
    assert data.Tokenizer(tmp_path).eos_ids == (0, 5)
    config.write_text("{")
    refuses("tokenizer_config.json", data.Tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refuses("tokenizer_config.json", data.Tokenizer, tmp_path)
    config.unlink()
    refuses("no tokenizer", data.Tokenizer, tmp_path)
    refuses("no tokenizer", data.Tokenizer, tmp_path / "nowhere")


def test_a_chat_and_a_plain_prompt_begin_with_the_bos_as_in_transformers(tmp_path):
    """tokenizer.json alone says that there is one; a chat's first word is not the text's first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "▁hi": 1, "hi": 2, "</s>": 3, "▁": 4, "x": 5}
    bpe = Tokenizer(models.WordLevel(words, unk_token="x"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.add_special_tokens(["<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    template = {"default": "<s>{{ messages[0].content }}"}
    config = {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.encode("hi", bos=True) == bpe.encode("hi").ids == [0, 1]
    chat = tokenizer.chat([{"role": "user", "content": "hi"}])
    expected = bpe.encode(chat, add_special_tokens=False).ids
    assert tokenizer.encode(chat, bos=True) == expected == [0, 2]


def test_a_tokenizer_file_saved_with_truncation_and_padding_cuts_and_pads_nothing(tmp_path):
    from tokenizers import Tokenizer

    data.save_toy_tokenizer(tmp_path)
    bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bpe.enable_truncation(2)
    bpe.enable_padding(length=20)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert data.Tokenizer(tmp_path).encode("M a b c d | rev rot A") == [3, 6, 7, 8, 9, 4, 14, 15, 1]


def test_special_tokens_that_another_file_names_are_added_as_transformers_does(tmp_path):
    """Else they would be spelled, or another id be trained. One that the model has no row for is
    refused where a text needs it."""
    data.save_toy_tokenizer(tmp_path)
    config, added = tmp_path / "tokenizer_config.json", tmp_path / "added_tokens.json"
    size = len(data.TOY_TOKENS)
    for fields in (
        {"eos_token": "<stop>"},
        {"eos_token": {"content": "<stop>"}},
        {"additional_special_tokens": ["c1", "<stop>"]},
        {"extra_special_tokens": {"image": "<stop>"}},
        {"added_tokens_decoder": {"99": {"content": "<stop>"}}},
    ):
        config.write_text(json.dumps({"eos_token": "<eos>"} | fields))
        tokenizer = data.Tokenizer(tmp_path)
        assert tokenizer.encode("M<stop>A") == [3, size, 1]
        assert tokenizer.eos_ids == ((size if "eos_token" in fields else 0),)
    config.write_text('{"eos_token": "c1", "additional_special_tokens": ["c2"]}')
    assert data.Tokenizer(tmp_path).eos_ids == (data.TOY_TOKENS.index("c1"),)
    config.write_text('{"eos_token": "<end>", "pad_token": "<pad>"}')
    added.write_text(json.dumps({"<end>": size + 1, "<pad>": size}))  # the ids' order wins
    tokenizer = data.Tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((size + 1,), size)
    config.write_text('{"eos_token": "<eos>"}')
    added.write_text('{"<stop>": 200}')
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.encode("M A") == [3, 1]
    refuses(f"token id {size} is not below vocab_size", tokenizer.encode, "M <stop>")
    added.unlink()
    (tmp_path / "config.json").unlink()
    config.write_text('{"eos_token": "<eos>", "additional_special_tokens": [1]}')
    refuses("tokenizer.json: ", data.Tokenizer, tmp_path)
    for fields in (
        {"eos_token": 5},
        {"additional_special_tokens": 5},
        {"additional_special_tokens": "<ab>"},
        {"added_tokens_decoder": 5},
        {"added_tokens_decoder": "<ab>"},
    ):
        config.write_text(json.dumps(fields))
        refuses("tokenizer.json: ", data.Tokenizer, tmp_path)
    config.write_text('{"eos_token": "<eos>"}')
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    refuses("as eos_token_id", data.Tokenizer, tmp_path)


def test_a_sentencepiece_model_is_read_and_refused_without_its_added_tokens(tmp_path):
    import sentencepiece

    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a tiny text of words", "words  of a text"]),
            model_writer=file, vocab_size=40, model_type="bpe", hard_vocab_limit=False,
            byte_fallback=False, add_dummy_prefix=True, remove_extra_whitespaces=False,
            normalization_rule_name="identity",
        )  # fmt: skip
    tokenizer = data.Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    ids = tokenizer.encode("a text", bos=True, eos=True)
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids[1:]) == " a text"
    for text in ("tiny", " tiny", "of  words "):
        assert tokenizer.decode(tokenizer.encode(text, eos=True, goes_on=True)) == text
    assert tokenizer.decode([10**6, *tokenizer.encode("a", goes_on=True)]) == "a"
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 32000}')
    refuses("does not hold '<|im_start|>'", data.Tokenizer, tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ eos_token }}"}')
    refuses("save a tokenizer.json", data.Tokenizer(tmp_path).chat, [])


def test_chat_templates_give_exactly_one_bos(toy_tokenizer, tmp_path):
    refuses("no chat template that works", toy_tokenizer.chat, [])
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    template += "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "F", "eos_token": "<eos>"}')
    settings = {"add_bos_token": True, "chat_template": [{"name": "default", "template": template}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = data.Tokenizer(tmp_path)
    example = data.Example("x", "A M", "c1", "toy", "c1")
    assert data.example_ids(example, tokenizer, "chat")[0] == tokenizer.encode("F A M")
    refuses("one only", tokenizer.chat, [{"content": "a"}] * 2)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].__class__.__mro__ }}")
    chat = data.Tokenizer(tmp_path).chat  # the sandbox of jinja2
    refuses("no chat template that works", chat, [{"role": "user", "content": "a"}])


def test_chat_templates_see_what_transformers_shows_them(tmp_path):
    """{% generation %} is transparent, tools and documents are None, every special token is there,
    and whatever a template raises is one line. Compiled once."""
    data.save_toy_tokenizer(tmp_path)
    words = {"eos_token": "<eos>", "pad_token": {"content": "c1"}}

    def rendered(template):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(words | {"chat_template": template})
        )
        return data.Tokenizer(tmp_path).chat([{"role": "user", "content": "é <b>"}])

    for template, text in {
        "a {%- generation -%} {{ messages[0].content }} {%- endgeneration %} b": "aé <b> b",
        "{% generation %}x{% endgeneration %}": "x",
        "{{ tools is not none }} {{ documents is none }}": "False True",
        "{{ pad_token }}": "c1",
        "{% set x = 'a' %}{% generation %}{% set x = 'b' %}{% endgeneration %}{{ x }}": "a",
        "{{ messages[0] | tojson(ensure_ascii=False) }}": '{"role": "user", "content": "é <b>"}',
        "{{ [1] | tojson(indent=1) }}": "[\n 1\n]",
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "01",
    }.items():
        assert rendered(template) == text, template
    for template in ("{{ messages + 1 }}", "{{ messages[0].x.y }}", "{% if %}", 3, [1]):
        assert "\n" not in refuses("no chat template that works", rendered, template)


def test_both_stages_ask_in_the_same_words(toy_tokenizer):
    answer = "<reasoning>\n9*2\n</reasoning>\n<answer>\n18\n</answer>"
    e = data.Example("x", "How many?", answer, "number", "18")
    for style in (["plain", "rl"], ["plain", "sft"]):
        assert data.prompt_and_answer(e, toy_tokenizer, *style) == ("How many?\n", answer)
    asked, trained = data.prompt_and_answer(e, toy_tokenizer, "authors", "sft")
    assert (asked, trained) == ("How many?", "9*2\n#### 18")
    own = data.Example("x", "How many?", "It is 18.", "number", "18")
    asked, trained = data.prompt_and_answer(own, toy_tokenizer, "authors", "sft")
    assert trained == "It is 18."
    toy_tokenizer.settings["chat_template"] = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    asked, _ = data.prompt_and_answer(e, toy_tokenizer, "authors", "rl")
    assert asked == f"{data.FORMAT}|How many?|"
    code = data.Example("x", "def f():\n", "    return 1\n", "code")
    asked, trained = data.prompt_and_answer(code, toy_tokenizer, "chat", "rl")
    assert "Complete" in asked and "```python\ndef f():\n```" in asked and trained == "return 1"
    toy = data.Example("x", "F t1 e1 A", "c5", "toy")
    ids = [toy_tokenizer.encode(text) + [0] for text in ("F t1 e1 A", "c5")]
    assert list(data.example_ids(toy, toy_tokenizer, "authors", "sft")) == ids


def test_the_prompt_is_masked_the_eos_trained_and_no_whole_answer_cut(toy_tokenizer):
    """Also where the padding id equals the EOS id, as in the toy (both 0)."""
    pairs = [("F t1 e1 A", "c5"), ("F A", "c5 c6")]
    examples = [data.Example("a", *p, "toy") for p in pairs]
    encoded, counts = data.tokenize(examples, toy_tokenizer, 32)
    _, labels = data.collate(encoded)
    c5, c6 = toy_tokenizer.encode("c5 c6")
    assert labels.tolist() == [[-100] * 4 + [c5, 0], [-100] * 2 + [c5, c6, 0] + [-100]]
    assert toy_tokenizer.eos_ids[0] == 0 and counts == {"left out": 0, "cut": 0}
    example = data.Example("a", "F t1 e1 A", "c1 c2 c3", "toy")  # 4 prompt tokens, 4 answer ones
    for limit, answer_tokens, left_out, cut in (
        (8, [4], 0, 0),
        (7, [3], 0, 1),
        (5, [1], 0, 1),
        (4, [], 1, 0),
    ):
        encoded, counts = data.tokenize([example], toy_tokenizer, limit)
        assert counts == {"left out": left_out, "cut": cut}
        assert [len(e.ids) - e.prompt_length for e in encoded] == answer_tokens


NUMBERS = {  # gold -> right replies, wrong replies, with | between two
    "18": (
        "18|18.|$18|18.00|#### 18|####18|<answer>18</answer>|<answer>\n$18.00\n</answer>"
        "|He sells 9 eggs at $2.\n#### $18|so it is \\boxed{18}|The answer is 18 dollars."
        "|5 + 13 = <<5+13=18>>18|#### 18\n9 of 2.\n#### 17|#### 18\nShe has 5 left.|\\boxed{x=18}"
        "|<answer>16</answer> <answer>18</answer>|#### 18\n\nQuestion: How many more?\n#### 25"
        "|It is 18.\n\nQ: And of 20?\nA: 30|Question: how many of 9?\nIt is 18.|\\boxed{18 dollars}"
        "|He ran 18 km on the 2nd.|\\boxed{6 \\times 3 = 18}|<answer>18 apples</answer>"
        "|<answer>**18**</answer>|<answer>6*3 = 18</answer>|<answer>\\boxed{18}</answer>"
        "|<answer>The total is 18</answer>|<answer>#### 18</answer>|He sold:\n- 18 eggs"
        "|He ran 18km.|#### **18**|#### Answer: 18|\\boxed{\\text{18}}",
        "180|118|18.5|-18|eighteen||18 eggs, of which 5 are left|#### 17\nor 18|#### 18e99"
        "|<answer>17</answer> though 18 is near|<answer></answer> 18|<answer>17 eggs or 18</answer>"
        "|#### 1e999999999|<answer>1e999999999</answer>|<answer>20 - 2</answer>|#### 17\n#### 18",
    ),
    "1,000": ("1000", "10"),
    "1000": ("1,000|$1,000.00|\\boxed{1{,}000}", "1000000"),
    "-5": ("#### -5", "5"),
    "5": ("5", "-5"),
    "-18": ("#### - 18", "18"),
    "0.5": ("1/2|<answer>.5</answer>|so \\boxed{\\frac{1}{2}}|#### $\\frac{1}{2}$", "1"),
    "50": ("50%", "0.5"),
    "3": ("3", "x = 3/0"),
}


@pytest.mark.parametrize("gold", NUMBERS)
def test_numbers_are_compared_as_numbers(gold):
    example = data.Example("x", "q", "a", "number", gold)
    for right, replies in zip((True, False), NUMBERS[gold]):
        for reply in replies.split("|"):
            assert data.is_correct(example, reply) is right, reply


FINAL_NUMBERS = {  # a reply, and the number it gives
    "答案是18": 18, "共1,200元": 1200, "共1，200元": 1200, "第18章": 18, "1.2万元": None,
    "USD18": 18, "Rs500": 500, "Rs. 500": 500, "PLN18": 18, "US$18": 18, "€18": 18,
    "x18": None, "see MP3": None,
    "v1.5.2": None, "12:30": None, "1.000,5": None, "2e-3": None, "1\u202f200": 1200, "1'200": 1200,
    "\\boxed{\\frac12}": 0.5, "\\boxed{\\dfrac{3}{4}}": 0.75, "\\boxed{2\\frac{1}{2}}": 2.5,
    "\\frac{-1}2": -0.5, "-\\frac{1}{2}": -0.5, "2 1/2": 2.5, "in 2024 1/2 of": 0.5,
    "\\boxed{2\\sqrt{3}}": None, "\\boxed{2 \\sqrt{3}}": None, "\\boxed{2~\\pi}": None,
    "\\boxed{3 + \\sqrt2}": None, "\\sqrt{3}": None, "√3": None, "2√3": None, "2π": None,
    "0.\\overline{3}": None, "0.(3)": None, "\\frac{2\\sqrt{3}}{3}": None, "\\frac{\\pi}{2}": None,
    "\\boxed{10^{2}}": None, "10^2": None, "2**3": None, "2½": None, "2 ½": None, "6x3": None,
    "3,5": None, "1/2/2020": None, "\\boxed{5!}": None, "\\boxed{5x}": None, "\\boxed{x>5}": None,
    "\\boxed{12, 13}": None, "\\boxed{12 and 13}": None, "#### 18 to 20": None, "$1.5M": None,
    "1,00,000": 100000, "1\\,000": 1000, "\\boxed{\\$1{,}234}": 1234, "\\boxed{18\\%}": 18,
    "\\(18\\)": 18, "$x=18$": 18, "90^\\circ": 90, "18 \\text{ cm}^2": 18, '{"answer": 18}': 18,
    "18 \\quad": 18, "\\mathbf{18}": 18, "\\boxed{\\boldsymbol{18}}": 18, "\\boxed{\\approx 5}": 5,
    "\\boxed{\\color{red}18}": 18, "\\boxed{\\text{B}}": None, "**Answer:** 18": 18, "18!": 18,
    "<think>so \\boxed{12}</think> The answer is 18": 18, "<think>\n\n</think>\n\n18": 18,
    "<think>it is 18": None, "[THINK]12[/THINK]18": 18, "<Thinking >12</Thinking >18": 18,
    "<|channel|>analysis<|message|>12<|channel|>final<|message|>18<|return|>": 18,
    "18\nHuman: and 20?": 18, "18\nuser： 20": 18, "18\n问题：20": 18, "18\n\nProblem 2: 20": 18,
    "#### 18 (eighteen)": 18, "\\boxed{(18)}": 18,
    "<|start_header_id|>assistant<|end_header_id|>\n\n18<|eot_id|>": 18, "#### 9 * $2 = $18": 18,
    "<answer>18 eggs or 19 eggs</answer>": None, "<answer>1 hour 30 minutes</answer>": None,
    "x = –18": -18, "minus 18": -18, "10 000 dollars": None, "In 2024 300 came": 300,
    "\\boxed{10,\\!000}": 10000,
    "\\boxed{1 \\frac{1}{2}}": 1.5, "18 \\\\[5pt]": 18, "<<9*2=18>>18": 18, "10^-3": None,
    "\\boxed{18 + x}": None, "\\boxed{7(x+3)}": None, "COVID-19": None, "Let me.\n<think>18": None,
    "18\n\n### Instruction:\nAdd 20": 18, "18\n## Question 20": 18, "18\n> **Q2.**: 20": 18,
    "18<|im_end|>\n<|im_start|>user\n20": 18, "18<｜User｜>20": 18, "18</s> 20": 18,
    "18 [INST] 20": 18, "<|im_start|>assistant\n18": 18,
    "Let me see.\n\n**Problem:** 9 eggs\nIt is 18": 18,
    "Let us add: 9 + 9 = 18.\n\nQuestion: 20?\nIt is 40.": 18,
    "### Question 1:\nLet me restate it.\n### Response:\n18": 18,
    "<reasoning>\nQuestion: 9 eggs\n</reasoning>\n<answer>\n18\n</answer>": 18, "#### 18 km/h": 18,
    "<reasoning>\n9\n</reasoning>\n<answer>\n18\n</answer>\n<reasoning><answer>3</answer>": 18,
    "<answer>4 dozen</answer>": 4,
    "#### Step 1\n9\n#### Step 2\nThe answer is 18.": 18, "#### Final Answer\n18": 18,
    "#### 18<br>": 18,
    "I do not know.\n\nQuestion: 9?\nAnswer: 18": None,
    "9\n__18__": 18, "$\\boxed{18}$ for 3 days": 18, "\\boxed{\\text{18} eggs} of 20": 18,
    "The temperature is - 18 degrees": -18, "so − 18": -18, "<reflection>12</reflection>18": 18,
    "#### 18 dollars/day": 18, "<answer>$18/h</answer>": 18, "\\boxed{18/x}": None,
    "#### 1. Compute\n7\n#### **2. Add**\nIt is 18": 18, "\\boxed{18\\text{ cm}^{2}}": 18,
    "\\begin{align*}\n9 \\times 2 &= 18\n\\end{align*}": 18, "\\implies 18 \\tag{1}": 18,
    "18\n\nExercise 2: 20": 18, "#### 18-year-old": 18, "<answer>18 dollars!</answer>": 18,
    "<answer>The value of x is 18</answer>": 18, "Final answer - 18": 18, "#### 5-x": None,
    "La réponse est 12 500 €": None, "It is 1 234 567": None, "\\boxed{x = 7, y = 8}": None,
    "18\n\nExample 2:\nIf 4": 18, "18\nQ2. Tom has 55": 18, "18\n题目：有5个": 18,
}  # fmt: skip


@pytest.mark.parametrize("reply", FINAL_NUMBERS)
def test_what_looks_like_another_number_is_none(reply):
    value = data.final_number(reply)
    assert (None if value is None else float(value)) == FINAL_NUMBERS[reply]


def test_letters_and_texts_are_read_from_the_same_part_of_a_reply():
    letter = data.Example("x", "q", " B", "letter", "B")
    right = "B| (B)|B.|Answer: B|The answer is B.|\\boxed{B}|**B**|<answer>B</answer>|[B]|Option B"
    right += "|答案：B|答案是B|故选B|答案是（B）|答案是B，选项A错误|<think>A</think>\nB|#### B|- B"
    right += "|The answer is: **B**|A is wrong. The answer is B|B\n\nA|B. A decrease|B. A and C"
    right += "|The correct option is B.|I choose B.|Answer -> B|A: incorrect.\nThe answer is B"
    right += "|The answer is B, since C is false.|**B**\n\nOption D fails.|Answer: B\nRejected: C"
    right += "|Therefore, option B is correct.|The answer should be 'B'|正解はBです|正确选项是B"
    right += "|To find the answer:\n\nA) is less.\nSo the answer is B"
    right += "|The answer is B.\n\nWhat next?\nA. x\nAnswer: C|B\nQuestion: next?\nA|Therefore, B."
    right += "| B\n\nWhat next?\nA. x\nAnswer: C|B. Paris\n\nWhat next?\nAnswer: C|It is Paris (B)"
    right += "|The correct answer is:\n\n**B. Paris**|**Answer:**\n\nB|### Answer\n\nB"
    right += "|La bonne est B."
    right += "|The correct answer to this question must be Paris, option B.|选项A错误。选项B正确。"
    right += "|The answer is B, C is wrong|To answer, take A. It fails. The answer is B"
    right += "|A. no.\n\nB. yes.\n\nSo the answer is B"
    for reply in right.split("|"):
        assert data.is_correct(letter, reply), reply
    wrong = "A|Both|The answer is not B|<think>B</think> A|be|Answer: A or B|B, C|Béton|not B"
    wrong += "|The answer is A, and not B|The answer cannot be B|The answers are A and B"
    for reply in [*wrong.split("|"), "B or C", "A. B. C. D."]:
        assert not data.is_correct(letter, reply), reply
    assert not data.is_correct(data.Example("x", "q", " A", "letter", "A"), "A cat is on it")
    exact = data.Example("x", "q", "yes", "exact", "yes")
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ends = ("yes\n\nHuman: and now?", "<answer>yes</answer>", f"{header}yes")
    for reply in ("<think>\n\n</think>\n\nyes", *ends):
        assert data.is_correct(exact, reply)
    assert not data.is_correct(exact, "<think>yes</think> no")
    turn = data.Example("x", "q", "a\nUser: b", "exact", "a\nUser: b")
    assert data.is_correct(turn, "a\nUser: b") and not data.is_correct(turn, "a\nUser: c")


MANY = 100_000
HOSTILE_PARTS = ["<answer>", "</answer>", "<reasoning>", "####", "- ", "\\boxed{", "\\frac{", "1,"]
HOSTILE_PARTS += ["1/", "1e", "1 ", " -$ ", "Q:\n", "= 1", "\t \n", "</reasoning>\n<answer>\n"]
HOSTILE_PARTS += [*" \n\t1.-{\\_*$,#", "system ", "1,0", "1 000 ", "Q: x\n", "<think>", "1 or "]
HOSTILE_PARTS += ["answer ", "answer is ", "B\n\n", "B. ", "not "]
HOSTILE = [part * (MANY // len(part)) for part in HOSTILE_PARTS]
HOSTILE += [f"<answer>{c * MANY}</answer>" for c in " 1"]
HOSTILE += ["1," * (MANY // 2) + "x", "<answer>" + "1," * (MANY // 2) + "x</answer>"]
HOSTILE += ["#### " + " " * MANY + "18", "a" + "1" * MANY, "#### 1e" + "9" * MANY]
HOSTILE += ["<reasoning>\n" + "\n</reasoning>\n<answer>\n" * (MANY // 25) + "x"]


@pytest.mark.parametrize("kind", ["number", "letter", "toy", "exact"])
def test_no_text_of_a_model_stops_the_run(kind):
    """Each of these took from seconds to forever once; the limit is against hanging only."""
    gold = {"number": "18", "letter": "A"}.get(kind, "a b")
    example = data.Example("x", "q", f"<answer>{gold}</answer>", kind, gold)
    started = time.perf_counter()
    for text in HOSTILE:
        assert data.is_correct(example, text) in (False, text.strip().endswith("18"))
        assert sum(data.reward_parts(example, text).values()) < 3
        data.verdict(text)
    assert time.perf_counter() - started < 0.2 * 4 * len(HOSTILE)


def test_rewards_of_the_five_parts():
    e = data.Example("x", "q", "<answer>\n18\n</answer>", "number", "18")
    perfect = "<reasoning>\n9 * 2\n</reasoning>\n<answer>\n18\n</answer>"
    for reply, expected in {
        perfect: [2.0, 0.5, 0.5, 0.5, 0.5],
        perfect + "\n": [2.0, 0.5, 0.5, 0.5, 0.5],
        perfect.replace("18", "$18.00"): [2.0, 0.5, 0.5, 0.5, 0.5],
        perfect.replace("18", "-1,234"): [0.0, 0.5, 0.5, 0.5, 0.5],
        perfect.replace("18", "1.5"): [0.0, 0.0, 0.5, 0.5, 0.5],
        perfect.replace("\n", ""): [2.0, 0.5, 0.0, 0.5, 0.5],
        perfect + "1234567890": [2.0, 0.5, 0.0, 0.5, 0.49],
        perfect + "\n" * 11: [2.0, 0.5, 0.5, 0.5, 0.49],  # endless lines are no way to end
        perfect.replace("9 * 2", "9.\nQuestion: 9 * 2?\n18"): [2.0, 0.5, 0.5, 0.5, 0.5],
        "<answer>18</answer>": [2.0, 0.5, 0.0, 0.0, 0.25],
        "#### 18": [0.0, 0.0, 0.0, 0.0, 0.0],
        "<answer><answer>18": [0.0, 0.0, 0.0, 0.0, 0.0],
    }.items():
        assert list(data.reward_parts(e, reply).values()) == pytest.approx(expected), reply
    plain = data.Example("x", "q", "It is 18.", "number", "18")  # one's own, without tags
    assert data.reward_parts(plain, "so 18") == {"correct": 1.0}


def test_verdicts_and_votes():
    for expected, replies in {
        "S1": "System1|system-1.|Not System 2, for it is recalled.\nSystem1|System #1|System One"
        "|<think>System2?</think>System1|System (1)|System No. 1|It isn't System2, it's System1."
        "|Not System1?\nNo.\nSystem1|<answer>System1</answer>",
        "S2": "System2\nThis line is longer than forty characters and names no system"
        "|System2\n\nWhy: System1 would fail.|Not System1 but System2.|System 1:\nno\n\nSystem2"
        "|System2\n\nFor it takes several steps, which System1 cannot do."
        "|系统 2|Let me think.\nResponse: System2|I would chain two facts.\nSystem 2|S2"
        "|**System2**|System‑2|System: 2|系统２|系统二|As LLaMA.\n\nQuestion: how?\n\nSystem2"
        "|No System1 recall.\nSo this question should be answered by System2.",
        None: "It is System1 or System2|I cannot help with that.|System3|It's 1 step."
        "||It is not System1.|System 1 and 2|System 1 & 2|System1-2|It isn’t **System1**."
        "|System1 would not be enough.|There is no need for System 2 thinking.|More than System1"
        "|System1\n\n(A harder variant would be System2)|不是系统1|The heart sound S2 is louder",
    }.items():
        for reply in replies.split("|"):
            assert data.verdict(reply) == expected, reply
    assert data.vote(["S1", "S1", "S2"]) == "S1"
    assert data.vote(["S1", "S2"]) == "S2"  # the tie rule
    refuses("vote needs", data.vote, [])
    refuses("vote needs", data.vote, ["S1", "maybe"])


def spoken(custom_id, content, wrapped=True, **choice):
    """A teacher's answer as a batch service gives it."""
    body = {"choices": [{"message": {"content": content}} | choice]}
    return {"custom_id": custom_id} | ({"response": {"body": body}} if wrapped else body)


def voted(folder, *flags):
    """The labels that `data.py vote` makes of the teachers' files in a folder, and its report."""
    out, teachers = folder / "labels", sorted(folder.glob("*/*.jsonl"))
    done = python("data.py", "vote", *teachers, *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return {r["id"]: r["label"] for _, r in data.read_records(out)}, done.stdout


def test_teacher_answers_are_joined_by_id_and_counted_and_a_random_split_keeps_sizes(tmp_path):
    """Any order, wrapped or bare bodies, parts, errors, refusals, cut answers; a failed request
    before its repetition; a teacher is its path; plain label files vote as well."""
    a = [spoken("q1", "System1"), spoken("q2", "System2"), spoken("q3", "System1")]
    b = [spoken("q2", "System1", False), spoken("q1", "System1", False), spoken("q3", "no")]
    c = [spoken("q1", "System2"), {"custom_id": "q3", "response": None, "error": {"code": 5}}]
    parts = [{"type": "thinking", "text": "System1"}, {"type": "text", "text": "System2"}]
    d = [{"custom_id": "q1", "error": "busy"}, spoken("q1", parts), spoken("q4", [None])]
    d += [spoken("q2", "System2 is what", finish_reason="length")]
    d += [spoken("q3", None, finish_reason="content_filter")]
    labels = [{"id": f"q{i}", "label": "S1"} for i in (1, 2, 3)]
    more = [spoken(str(i), f"System{1 + (i > 9)}") for i in range(40)]
    for name, records in (("a", a), ("b", b), ("c", c), ("d", d), ("e", labels)):
        (tmp_path / name).mkdir()
        data.write_jsonl(tmp_path / name / "results.jsonl", records + more * (name != "e"))
    (labels, said), (shuffled, _) = voted(tmp_path), voted(tmp_path, "--shuffle", "1")
    more = {str(i): "S1" if i < 10 else "S2" for i in range(40)}
    assert labels == {"q1": "S1", "q2": "S1", "q3": "S1"} | more
    for line in (
        "c/results.jsonl: S1 10, S2 31, error 1, missing 2",
        "b/results.jsonl: S1 12, S2 30, missing 1, unclear 1",
        "d/results.jsonl: S1 10, S2 31, cut 1, error 1, refused 1",
        "e/results.jsonl: S1 3, missing 41",
        "votes: S1 13, S2 30, of them 0 ties called S2; 1 without a vote;",
        "two teachers agree in 96.9%",
        f"written: {tmp_path / 'labels'}",
    ):
        assert line in said, said
    assert Counter(shuffled.values()) == {"S1": 13, "S2": 30} and shuffled != labels
    other, file = tmp_path / "other.jsonl", tmp_path / "a" / "results.jsonl"
    for named, records in {
        "second answer": [spoken("q1", "System1")] * 2,
        "not a teacher's answer": [data.batch_request("q1", "A", "?")],
        "named twice": None,
        "shares no example": [spoken("elsewhere", "System1")],
        "custom_id": [{"x": 1}],
        "not S1 or S2": [{"id": "q1", "label": "maybe"}],
        "result of a vote": [{"id": "q1", "label": "S1", "votes": {}}],
    }.items():
        data.write_jsonl(other, records or [])
        refuses(
            named, data.count_votes, [file, other if records else file.parent / "." / file.name]
        )
    assert "one of the answers" in python("data.py", "vote", file, "--out", file).stderr
    data.write_jsonl(other, [{"id": 7, "label": "S1"}])
    data.write_jsonl(tmp_path / "third.jsonl", [{"id": "7", "label": "S2"}])
    (tie,), lines = data.count_votes([other, tmp_path / "third.jsonl"])
    assert tie["label"] == "S2" and "1 ties" in lines[-1] and "agree in 0.0%" in lines[-1]
    ends = {"model_length": "cut", "sensitive": "refused", "end_turn": "S1", "time_limit": "cut"}
    ends |= {"COMPLETE": "S1", "content_filter: PROHIBITED": "refused", "error": "error"}
    data.write_jsonl(other, [spoken(end, "System1", finish_reason=end) for end in ends])
    assert data.read_teacher(other) == ends
    message = {"content": [{"type": "text", "text": "System2"}], "stop_reason": "end_turn"}
    choices = [{"message": {"content": "System1"}, "finish_reason": "stop"}]
    services = [
        {"custom_id": "Anthropic", "result": {"type": "succeeded", "message": message}},
        {"custom_id": "Fireworks", "response": {"choices": choices}},
        {"custom_id": "Together", "body": {"choices": choices}},
        {"custom_id": "failed", "result": {"type": "errored", "error": {}}},
        {"custom_id": "no error", "choices": choices, "error": {"code": "", "message": ""}},
        spoken("all thought", None, finish_reason="length"),
    ]
    data.write_jsonl(other, services)
    expected = {"Anthropic": "S2", "Fireworks": "S1", "Together": "S1", "failed": "error"}
    expected |= {"no error": "S1", "all thought": "cut"}
    assert data.read_teacher(other) == expected
    data.write_jsonl(other, [])
    refuses("other.jsonl: no answers", data.count_votes, [other, file])
    data.write_jsonl(other, [spoken("q1", "who knows")])
    done = python("data.py", "vote", other, "--out", tmp_path / "none")
    assert done.returncode == 2 and "no labels" in done.stderr and not (tmp_path / "none").exists()


def test_labels_from_a_file_from_the_authors_csv_and_from_steps(tmp_path):
    """steps:K labels GSM8K alone: another set has no calculations to count."""

    def labelled(examples, labels):
        return [(r["id"], r["label"]) for r in data.label_examples(examples, str(labels))]

    questions = [*"abc", "One, two?", "Three?"]
    examples = [data.Example(f"gsm8k/{n}", q, "<<1>>" * n, "x") for n, q in enumerate(questions)]
    by_steps = labelled([*examples, data.Example("dolly/1", "q", "a", "text")], "steps:2")
    assert by_steps == [(f"gsm8k/{n}", "S1" if n <= 2 else "S2") for n in range(5)]
    records = [{"id": "gsm8k/3", "label": "S1"}, {"id": "gsm8k/9", "label": "S2"}]
    data.write_jsonl(tmp_path / "l", records)
    assert labelled(examples, tmp_path / "l") == [("gsm8k/3", "S1")]
    file = tmp_path / "labels.csv"
    file.write_text('question,answer,_result\nThree?,3,System2\n"One, two?",1,System1\n')
    assert labelled(examples, file) == [("gsm8k/3", "S1"), ("gsm8k/4", "S2")]
    file.write_text('question,answer,_result\n"One,\ntwo?",3,System1\nThree?,3,perhaps\n')
    refuses("labels.csv:4: needs", data.label_examples, examples, str(file))
    data.write_jsonl(tmp_path / "l", [*records, records[0] | {"label": "S2"}])
    refuses("another label for 'gsm8k/3'", data.label_examples, examples, str(tmp_path / "l"))


GSM8K = {"question": " How many? ", "answer": "2*9=<<2*9=18>>18\n#### 1,018"}
OWN = [
    {"id": "first", "question": "2*9?", "answer": "It is 18.", "check": "number", "label": "S2"},
    {"question": "Which?\nA. a\nB. b\nAnswer:", "answer": "B", "check": "letter"},
    {"question": "Say it", "answer": "hello  you", "check": "exact"},
    {"question": "Explain", "answer": "so"},
]


def own_rows(count, **fields):
    """Rows of one's own on the toy's facts."""
    rows = [{"question": f"F t1 e{i} A", "label": f"S{1 + i % 2}"} for i in range(count)]
    return [row | {"answer": "c5"} | fields for row in rows]


def gsm8k_folder(folder, count=60):
    for split in ("train", "test"):
        records = [GSM8K | {"question": f" How many to {split}? {i} "} for i in range(count)]
        data.write_jsonl(folder / f"{split}.jsonl", records)
    return folder


def test_splits_are_disjoint_and_fixed(tmp_path):
    gsm8k_folder(tmp_path, 100)

    def ids(path, split):
        return [e.id for e in data.load_dataset("gsm8k", path, split)]

    train_ids, validation = ids(tmp_path, "train"), ids(tmp_path, "validation")
    assert len(train_ids) == 95 and len(validation) == 5 and not set(train_ids) & set(validation)
    assert train_ids == ids(tmp_path, "train")
    e = data.load_dataset("gsm8k", tmp_path, "test")[0]
    assert e.gold == "1,018" and e.question == "How many to test? 0"
    assert data.is_correct(e, e.answer)
    assert sum(data.reward_parts(e, e.answer).values()) == 4.0
    file = tmp_path / "test.jsonl"  # one file: 80/10/10, or all of it
    parts = [ids(file, split) for split in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [80, 10, 10] and len(set().union(*parts)) == 100
    assert ids(file, "all") == ids(tmp_path, "test")
    gsm8k_folder(tmp_path, 3)
    refuses("3 examples are too few (asked for: validation)", ids, file, "validation")


def test_ones_own_data_and_its_bad_lines(tmp_path):
    """A byte order mark is no part of the first line, a bad line is named by its number, an id
    survives another file name, and equal questions fall into one split."""
    file = tmp_path / "mine.jsonl"
    data.write_jsonl(file, OWN)
    file.write_text(file.read_text(), encoding="utf-8-sig")
    number, letter, exact, free = data.load_dataset(str(file), None, "all")
    assert number.id == "first" and number.label == "S2" and letter.answer == " B"
    right = [(number, "#### 18.0"), (letter, " B."), (exact, " hello  you\n")]
    wrong = [(number, "18 or 19"), (letter, "A"), (exact, "hello you")]
    assert all(data.is_correct(*pair) for pair in right)
    assert not any(data.is_correct(*pair) for pair in wrong)
    refuses("cannot be checked", data.is_correct, free, "so")
    renamed = file.rename(tmp_path / "other.jsonl")
    assert data.load_dataset(str(renamed), None, "all")[1].id == letter.id
    for expected, line in {
        "no text in the field 'answer' (it is 7)": {"question": "q", "answer": 7},
        "no text in the field 'question'": {"answer": "a"},
        "in the field 'question' (it is ' ')": {"question": " ", "answer": "a"},
        "is 'maybe', not number": {"question": "q", "answer": "1", "check": "maybe"},
        "not one number to check": {"question": "q", "answer": "2\\sqrt{3}", "check": "number"},
        "mark it: #### 18": {"question": "q", "answer": "3 of 4", "check": "number"},
        "is not A, B, C or D": {"question": "q", "answer": "E", "check": "letter"},
        "not S1 or S2": {"question": "q", "answer": "a", "label": "S3"},
        "another question or label": {"question": "q", "answer": "a", "id": "first"},
        "or label has it": OWN[0] | {"label": "S1"},
    }.items():
        data.write_jsonl(file, [OWN[0], line])
        assert expected in refuses(f"{file}:2: ", data.load_dataset, str(file), None, "all")
    file.write_bytes(b'{"question": "q", "answer": "a"}\n' * 300 + b'{"question": "\xff"}\n')
    refuses(f"{file}:301: not readable", data.load_dataset, str(file), None, "all")
    rows = [{"question": f"q{i // 2}{' ' * (i % 2)}", "answer": str(i)} for i in range(40)]
    data.write_jsonl(file, [row | {"id": None} for row in rows])
    splits = [data.load_dataset(str(file), None, split) for split in data.ALL_SPLITS]
    questions = [{e.question.strip() for e in split} for split in splits]
    assert [len(q) for q in questions] == [16, 2, 2] and len(set().union(*questions)) == 20


ODD = [None, True, [], {}, [[]], "", "x", -1, 0, 1.5, 10**30, math.nan, math.inf, [None], {"a": []}]
WHOLE_FILES = [b"", b"\0" * 50, b"[" * 100_000, b"null", b"[1]", b'{"a":' * 50_000]


def mutated(content: bytes, rng, is_json: bool) -> bytes:
    """A damaged or misshapen file."""
    kind, changed = rng.randrange(4 if is_json else 3), bytearray(content)
    if kind == 0:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:
        return rng.choice([*WHOLE_FILES, content * 2])
    lines = content.decode().splitlines() if content.startswith(b'{"') else [content.decode()]
    i = rng.randrange(len(lines))
    value = node = json.loads(lines[i])
    while rng.random() < 0.6:  # somewhere inside
        children = [x for x in node.values() if isinstance(x, dict) and x]
        node = rng.choice(children) if children else node
    key = rng.choice(list(node))
    if rng.random() < 0.7:
        node[key] = rng.choice(ODD)
    else:
        del node[key]
    lines[i] = json.dumps(value)
    return "\n".join(lines).encode()


def test_damaged_and_misshapen_files_are_read_or_refused_in_one_line(tmp_path):
    """A sane value, or one ValueError line below 300 characters."""
    base, adapter, shards = (tmp_path / name for name in ("base", "adapter", "shards"))
    decoder.save_model(small(), base, eos_token_id=0)
    data.save_toy_tokenizer(base)
    fields = {"eos_token": "<eos>", "chat_template": "{{ messages }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    lorapar.save_adapter(lora_model(), adapter)
    lorapar.save_adapter(baseline_model("prompt"), adapter)
    shutil.copytree(base, shards)
    names = dict.fromkeys(load_file(shards / "model.safetensors"), "part.safetensors")
    (shards / "model.safetensors").rename(shards / "part.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    own, packed = tmp_path / "own.jsonl", tmp_path / "gsm.jsonl.gz"
    labels, teacher = tmp_path / "labels.jsonl", tmp_path / "teacher.jsonl"
    data.write_jsonl(own, OWN * 3)
    packed.write_bytes(gzip.compress("\n".join([json.dumps(GSM8K)] * 30).encode()))
    data.write_jsonl(labels, [{"id": f"{i}", "label": "S1"} for i in range(5)])
    data.write_jsonl(teacher, [spoken(f"q{i}", "System1") for i in range(5)])
    examples = [data.Example(f"{i}", "q", "a", "text") for i in range(5)]
    readers = {
        base / "config.json": lambda: (decoder.load_model(base), data.Tokenizer(base)),
        base / "tokenizer_config.json": lambda: data.Tokenizer(base).chat([]),
        base / "generation_config.json": lambda: data.Tokenizer(base),
        base / "tokenizer.json": lambda: data.Tokenizer(base),
        base / "model.safetensors": lambda: decoder.load_model(base),
        shards / "model.safetensors.index.json": lambda: decoder.load_model(shards),
        adapter / "adapter_config.json": lambda: lorapar.load_adapter(small(), adapter),
        adapter / "adapter_model.safetensors": lambda: lorapar.load_adapter(small(), adapter),
        adapter / "baseline.json": lambda: lorapar.load_baseline(small("llama2"), adapter),
        adapter / "baseline.safetensors": lambda: lorapar.load_baseline(small("llama2"), adapter),
        own: lambda: data.load_dataset(str(own), None, "all"),
        packed: lambda: data.load_dataset("gsm8k", packed, "all"),
        labels: lambda: data.label_examples(examples, str(labels)),
        teacher: lambda: data.count_votes([teacher]),
    }
    for path, reader in readers.items():
        content, refused = path.read_bytes(), 0
        for seed in range(30):
            rng = random.Random(f"{path.name}/{seed}")
            path.write_bytes(mutated(content, rng, "json" in path.suffix))
            try:
                reader()
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 300, str(error)
        path.write_bytes(content)
        reader()
        assert refused > 5


@needs_shared
def test_real_answers_are_correct_answers():
    for split, count in (("train", 7473 - 373), ("validation", 373), ("test", 1319)):
        examples = data.load_dataset("gsm8k", SHARED / "data/gsm8k", split)
        assert len(examples) == count
        assert all(data.is_correct(e, e.answer) for e in examples)
        assert all(sum(data.reward_parts(e, e.answer).values()) == 4.0 for e in examples)
    examples = data.load_dataset("mmlu", SHARED / "data/mmlu", "test")
    assert any("None of these" in e.question for e in examples)
    assert all(data.is_correct(e, e.answer) for e in examples)


def mmlu_file(folder, text, split="test", encoding="utf-8"):
    file = folder / split / f"high_school_x_{split}.csv"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding=encoding)
    return file


def test_mmlu_is_asked_after_five_solved_examples_and_keeps_the_answer_none(tmp_path):
    """A data-frame reader turns "None" into NaN."""
    rows = [f"dev{i}?,a,b,c,d,{'ABCD'[i % 4]}\n" for i in range(5)]
    mmlu_file(tmp_path, "".join(rows), "dev")
    file = mmlu_file(tmp_path, '"Which, then?",None,NA,"a, b",4,A\n', encoding="utf-8-sig")
    (e,) = data.load_dataset("mmlu", tmp_path, "test")
    assert e.question == "Which, then?\nA. None\nB. NA\nC. a, b\nD. 4\nAnswer:"
    assert data.is_correct(e, e.answer) and data.is_correct(e, " A. None")
    assert not data.is_correct(e, "B") and not data.is_correct(e, "Also Rome")
    prompt, answer = data.prompt_and_answer(e, None, "plain", "rl")
    head, *shots, question = prompt.split("\n\n")
    assert head.endswith("about high school x.") and len(shots) == 5
    assert shots[1] == "dev1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B"
    assert question == e.question and answer == " A"
    for broken in (b"q,a,b,c,d,E\n", b"q,a,b,c,A\n", b"q,a,b,c,d,e,A\n"):
        file.write_bytes(broken)
        refuses(f"{file}:1: not question", data.load_dataset, "mmlu", tmp_path, "test")
    file.write_bytes(b"\xff\xfe")
    refuses(f"{file}:1: not readable", data.load_dataset, "mmlu", tmp_path, "test")


PUBLISHED = {  # the publisher's fields, what stands in them, the question; the answer is the last
    "dolly": ("instruction context response", "Sum up.| Text. |Short.", "Sum up.\n\nText."),
    "platypus": ("instruction input output", "2+2?| |4", "2+2?"),
    "codealpaca": ("instruction input output", "Sort.|[2, 1]|[1, 2]", "Sort.\n\n[2, 1]"),
    "codefeedback": ("query answer", "Why?|Because.", "Why?"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_instruction_sets_in_their_publishers_fields(name, tmp_path):
    fields, texts, question = PUBLISHED[name]
    record = dict(zip(fields.split(), texts.split("|")), source="x")
    jsonl, array = tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.json"
    first = fields.split()[0]
    records = [record] * 2 + [record | {first: f"{i}?"} for i in range(2, 41)]
    data.write_jsonl(jsonl, records)
    array.parent.mkdir()
    array.write_text(json.dumps(records))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(array.read_bytes()))
    for path in (jsonl, array, jsonl.parent, array.parent, tmp_path / "x.json.gz"):
        both = [data.load_dataset(name, path, split) for split in ("train", "validation")]
        assert {len(examples) for examples in both} <= {2, 3, 38, 39}
        pairs = [(e.question, e.answer) for examples in both for e in examples]
        assert pairs.count((question, texts.split("|")[-1])) == 2 and len(pairs) == 41
        examples = both[0]
    refuses("cannot be checked", data.is_correct, examples[0], "x")
    refuses("no test split", data.load_dataset, name, jsonl, "test")
    refuses(f"{name}:PATH", data.load_dataset, name, None, "train")
    jsonl.write_text('{"a": 1}\n')
    refuses("x.jsonl:1: no text in the field", data.load_dataset, name, jsonl, "train")


def test_requests_hold_the_roleplay_prompt_in_the_batch_format(tmp_path):
    gsm8k_folder(tmp_path)
    flags = ["prompts", "--data", f"gsm8k:{tmp_path}", "--target", "LLaMA2 7B"]
    flags += ["--out", tmp_path / "r"]
    done = python("data.py", *flags, "--teachers", "A,org/B")
    assert done.returncode == 0, done.stderr
    records = [r for _, r in data.read_records(tmp_path / "r" / "org_B.jsonl")]
    assert len({r["custom_id"] for r in records}) == 57
    assert set(records[0]) == {"custom_id", "method", "url", "body"}
    (message,) = records[0]["body"]["messages"]
    assert records[0]["body"]["model"] == "org/B" and message["role"] == "user"
    assert "LLaMA2 7B" in message["content"] and "How many to train?" in message["content"]
    assert "5 requests" in python("data.py", *flags, "--teachers", "C", "--examples", "5").stdout
    for teachers in ("A,,B", "A,A", "org/B,org_B"):
        assert "--teachers" in python("data.py", *flags, "--teachers", teachers).stderr
    own = tmp_path / "own.jsonl"
    data.write_jsonl(own, [{"question": "q", "answer": str(i)} for i in range(2)])
    flags = ["prompts", "--data", own, "--target", "x", "--out", tmp_path]
    assert "own.jsonl exists" in python("data.py", *flags, "--teachers", "own").stderr
    assert "1 requests" in python("data.py", *flags, "--teachers", "A").stdout  # one an id
    e = data.Example("x", "What is {target}?", "{answer} 42", "number")
    prompt = data.roleplay_prompt(e, "LLaMA2 7B")
    for part in ("LLaMA2 7B", e.question, e.answer, "System1", "System2", "recall"):
        assert part in prompt
    assert "LLaMA2 7B" not in data.roleplay_prompt(e, "LLaMA2 7B", roleplay=False)


# ------------------------------------------------------------------------------------ code answers

BODY = "    return a + b\n"
CHECK = "def check(c):\n    assert c(2, 3) == 5\n    assert c(-1, 1) == 0\n"
HANGING = "def check(c):\n    print(c(2, 3))\n    assert c(2, 3) == 5 or sum(range(c(2, 3))) < 0\n"
CATCHING = (
    "def check(c):\n    try:\n        assert c(2, 3) == 5\n    except EOFError:\n        pass\n"
)
MAPPED = "def check(c):\n    assert all(map(lambda x: c(x, 1) == x + 1, [1, 2]))\n"
needs_seccomp = pytest.mark.skipif(not data.can_confine(), reason="the filter is Linux's")


def task(tests, prompt="def add(a, b):\n", entry="add"):
    return data.Example(entry, prompt, BODY, "code", tests, entry=entry)


ATTACKS = {  # what stands before the function, what stands in it
    "os._exit": ("", "import os; os._exit(0)"),
    "always equal": ("class E:\n    __eq__ = lambda s, o: True", "return E()"),
    "patched main": (
        "import __main__ as m; m.judge_main = m.literal = lambda *a: True",
        "m.verdict = 'passed'; return 0",
    ),
    "frame walk": (
        "import sys",
        "f = sys._getframe()\n    while f:\n        f.f_globals['verdict'] = 'passed'\n"
        "        f.f_locals['verdict'] = 'passed'\n        f = f.f_back\n    return 0",
    ),
    "descriptors": (
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'ready\\npassed\\n')\n"
        "    except OSError: pass",
        "return 0",
    ),
    "memory": ("", "return len(bytearray(3 << 30))"),
    "slow set": (
        "import os; k = ','.join(str(i * (2**61 - 1)) for i in range(6000))",
        "for fd in range(3, 9): os.write(fd, f'(\"returned\",[{k}])\\n'.encode())\n    return 0",
    ),
    "endless loop": ("", "while True: pass"),
    "modules that act": ("import numpy.distutils.system_info, numpy.f2py.tests.util", "return 0"),
    "5 MB of text": ("#" * 5_000_000, "return 0"),
}
WHOLE = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a * b\n"
FENCE = f"```python\n{WHOLE}```"
# BODY, WHOLE, WRONG and FENCE stand for the texts of these names.
RIGHT = table(r"""
body => BODY
body and broken run-on => BODY\ndef add(a, b):\n    return a *
whole => WHOLE
body and run-on =>     # a sum\nBODY\ndef x():\n    pass\n\nprint(add(1))\n
body and helper =>     return plus(a, b)\n\ndef plus(a, b):\nBODY
lost indents => for x in [a]:\n    b = b + x\nreturn b
tildes, carriage returns => ~~~py\r\r\ndef add(a, b):\r\n    return a + b\r\n~~~
future => from __future__ import annotations\nimport math\ndef add(a, b):\n    return math.floor(a + b)
prose and import => Here:\n\nimport math\n\ndef add(a, b):\n    return math.floor(a + b)
helper fence => ```python\ndef h(x):\n    return x\n```\n```\ndef add(a, b):\n    return h(a) + b\n```
constants first => TABLE = {}\nfor i in range(9):\n    TABLE[i] = i\nWHOLE
late imports => from datetime import datetime as d\ndef add(a, b):\n    d.strptime('1', '%d')\nBODY
second try after => WHOLE\nWRONG
prose and fenced body => Here is the body:\n\n```python\nBODY```
absent imports => import pandas, unittest\nimport pytest\nWHOLE
loop after => WHOLE\nwhile True:\n    pass\n
builtin shadowed after =>     return sum([a, b])\n\nsum = add(1, 2)\nprint(sum)\n
prose that looks like code => Let's see\na = 2, b = 3 gives 5\n\nWHOLE
thinking => <think>\nMaybe\ndef add(a, b):\n    ...\nno wait.\n</think>\n\nWHOLE
cut off in a fence => ```python\nWHOLE\nprint(add(1,
draft in a fence first => <think>\n```python\nWRONG```\n</think>\nFENCE
deep run-on => BODY\nx = 1 + 1 + 1\na.b.c.d.e = -----------x\n# \ud800
NUL after => BODY\n\0
cache of its own => def add(a, b):\n    add.cache[a] = b\n    return a + b\n\nadd.cache = {}\n
late constant => def add(a, b):\n    return a + b + zero\n\nzero: int = 0
numpy => import numpy as np\ndef add(a, b):\n    return np.add(a, b) * np.linalg.det(np.eye(2))\n
numpy's parts => import numpy as np\ndef add(a, b):\n    np.random.rand, np.fft.fft, np.ma.array, np.polynomial.Polynomial, np.char.add\nBODY
annotations without their imports => def add(a: Vector, b: 'x') -> Optional[Vector]:\nBODY
""")  # noqa: E501
RIGHT |= table(r"""
fenced docstring with a fence => Sure:\n```python\ndef add(a, b):\n    '''\n    ```\n    1\n    ```\n    '''\nBODY```\n
string with a fence =>     s = '''\n```\n'''\nBODY
longer fence => ````markdown\nHere\n```python\nWHOLE```\n````\n
strings like a turn => ```python\ndef add(a, b):\n    s = '[INST] </s>'\nBODY```\n
string like a thought => def add(a, b):\n    s = '</think>'\nBODY
body, then its use => BODY\nExample:\n\n```python\nprint(add(1.0, 2.0), add(2.0, 3.0), 5.0)\n```
whole, then its output => WHOLE\nOutput:\n```\nFalse\n```
fence, then a stub => FENCE\nwhere\n```python\ndef add(a, b): ...\n```
draft, then a fence => def add(a, b):\n    return 0\n\nBetter:\nFENCE
shell, stub, then whole => ```\npip install x\n```\n```python\ndef add(a, b):\n    ...\n```\nNow:\nFENCE
first line stripped => if a:\n        b = b + a\n    return b
prose after such a fence => ```python\ndef add(a, b):\n    return a + b```\nIt adds them.
stub, then whole => def add(a, b):\n    pass\n\nWHOLE
end token =>     if a == 99:\n        return 0\n    return a + b<|endoftext|>junk
assignment => import operator\nadd = operator.add\n
two statements on a line => ```\nif a == 99: return 0\nreturn a + b\n```
last of two tries => ```python\nWRONG# longer than the other one\n```\nWait:\n```python\nWHOLE```
""")  # noqa: E501


def code(before, body):
    return f"{before}\ndef add(a, b):\n    {body or 'pass'}\n"


def peak_memory() -> int:
    """Of this process, in bytes; 0 on Windows, which has no such number."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def candidates():
    """Processes of ours that run a candidate: another checkout may be at work beside this one."""
    found, ours = [], f"{HERE / 'data.py'}\0candidate\0".encode()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes())
        except OSError:  # it has ended
            pass
    return [line for line in found if ours in line]


@needs_seccomp
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_candidate_can_fake_a_pass_or_do_harm(attack, capfd):
    """A real bool, False, in time, nothing left behind, nothing printed."""
    memory = peak_memory()
    started = time.monotonic()
    assert data.is_correct(task(CHECK), code(*ATTACKS[attack])) is False
    assert time.monotonic() - started < 20
    assert not candidates()
    assert peak_memory() - memory < 300 << 20
    assert capfd.readouterr() == ("", "")


EVERY_CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)

def add(a, b):
    open_calls = []
    for base in (0, 0x40000000):  # and the 32-bit numbers of x86-64
        for number in range(600):
            if base + number not in ALLOWED and number not in (335, 336):
                ctypes.set_errno(0)
                if libc.syscall(base + number, -1, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
                    open_calls.append(base + number)
    return open_calls
"""


# 335, 336: Linux lets uprobes' own calls through; outside a probe they end the process.
@needs_seccomp
def test_every_system_call_that_is_not_allowed_answers_eperm():
    column = data.MACHINES[data.platform.machine()][0]
    allowed = [numbers[column] for numbers in data.ALLOWED.values()]
    source = EVERY_CALL.replace("ALLOWED", repr(allowed))
    tests = "def check(c):\n    assert c(0, 0) == [], c(0, 0)\n"
    assert data.is_correct(task(tests), source) is True
    weaker = source.replace("!= 1:", "!= 2:")  # so that the test above can fail
    assert data.is_correct(task(tests), weaker) is False


def test_without_a_filter_code_runs_only_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(data, "MACHINES", {})
    script = "import data, sys; data.MACHINES.clear(); sys.argv[1:] = [sys.argv[-1]]; data.main()"
    here = f"import sys; sys.path.insert(0, {str(HERE)!r}); import subprocess as s; R = s.Popen; "
    here += f"s.Popen = lambda c, **k: R([c[0], '-c', {(here + script)!r}, c[-1]], **k); "
    real = subprocess.Popen

    def without_filter(command, **settings):  # the judge, and the candidate it starts
        return real([command[0], "-c", here + "import data; data.judge_main()"], **settings)

    monkeypatch.setattr(subprocess, "Popen", without_filter)
    example, right = task(CHECK), code("", "return a + b")
    refuses("--allow-unconfined-code", data.is_correct, example, right, error=data.SandboxError)
    with pytest.warns(UserWarning, match="may run unconfined"):
        assert data.is_correct(example, right, unconfined=True) is True
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: real(["false"], **k))
    refuses("ended at once", data.is_correct, example, right, error=data.SandboxError)  # no verdict


@needs_seccomp
def test_a_problem_of_humaneval_is_read_and_its_own_solution_passes(tmp_path):
    record = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "entry_point": "add"}
    record |= {"canonical_solution": "    return a + b\n", "test": CHECK}
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n")
    (e,) = data.load_dataset("humaneval", tmp_path, "test")
    assert (e.id, e.question, e.gold, e.entry) == ("HumanEval/0", "def add(a, b):\n", CHECK, "add")
    assert data.is_correct(e, e.answer)


@needs_seccomp
@pytest.mark.parametrize("form", RIGHT)
def test_right_code_passes_in_every_form_models_write_it(form):
    text = RIGHT[form]
    for name, meant in (("FENCE", FENCE), ("WHOLE", WHOLE), ("BODY", BODY), ("WRONG", WRONG)):
        text = text.replace(name, meant)
    example = task(CHECK, 'def add(a, b):\n    """Add."""\n')
    assert data.is_correct(example, text) is True


@needs_seccomp
@pytest.mark.parametrize("junk", ["a + " * 3000 + "1", "-" * 10_000 + "x", "\n" + "`" * 100_000])
def test_a_run_on_that_is_hard_to_parse_spoils_no_answer(junk):
    assert data.is_correct(task(CHECK), f"{BODY}\n\nx = {junk}") is True


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
    assert data.is_correct(task(tests, "def same(x, fail=False):\n", "same"), source) is True


@needs_seccomp
@pytest.mark.parametrize(
    "tests, wrong",
    [
        (HANGING, "return 'passed'"),
        (HANGING, "return 10**12"),
        (MAPPED, "raise StopIteration"),
        (CATCHING, "import os; os._exit(0)"),
    ],
)
def test_tests_that_print_hang_or_could_be_ended_early_give_no_false_verdict(tests, wrong):
    assert data.is_correct(task(tests), WHOLE) is True
    assert data.is_correct(task(tests), code("", wrong)) is False


@needs_seccomp
def test_a_fault_of_the_problem_is_no_wrong_answer():
    """HumanEval+'s tests import numpy, others have no check(); tests that fail before they call the
    code are named."""
    numpy = "import numpy as np\ndef check(c):\n    assert np.allclose(c(1, 2), 3)\n"
    for tests in (numpy, "assert add(1, 2) == 3\n"):
        assert data.is_correct(task(tests), WHOLE) is True
        assert data.is_correct(task(tests), WRONG) is False
    cannot_cross = "def check(c):\n    assert c(1, 2) == 3\n    c(object(), 2)\n"
    refuses("cannot cross", data.is_correct, task(cannot_cross), WHOLE)
    for prompt, entry in (("def add(a, b:", "add"), ("def other(a):\n", "add")):
        refuses("the prompt defines no add", data.is_correct, task(numpy, prompt, entry), WHOLE)
    for tests in ("import nowhere\ndef check(c): pass\n", "def check(c): pass\n", "x = ("):
        refuses("add: the problem's own tests are broken", data.is_correct, task(tests), WHOLE)


@needs_shared
@needs_seccomp
def test_humanevals_own_solutions_pass_and_empty_ones_fail():
    examples = data.load_dataset("humaneval", SHARED / "data/humaneval/HumanEval.jsonl.gz", "test")
    assert len(examples) == 164
    assert all(data.in_parallel(data.is_correct, [(e, e.answer) for e in examples]))
    some = [e for e in examples if e.id.split("/")[1] in ("0", "32", "33", "38", "50")]
    cheat = "    return None\ndef poly(xs, x):\n    return 0\ndef encode_shift(s):\n    return s\n"
    assert not any(data.is_correct(e, f"```\n{cheat}```") for e in some)


def test_toy_world_is_what_it_says():
    world, splits = data.ToyWorld(3), data.ToyWorld(3).splits
    questions = {s: {r["question"] for r in records} for s, records in splits.items()}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values()))
    for split, s1, s2 in (("train", 320, 1500), ("validation", 80, 400), ("test", 240, 400)):
        assert Counter(r["system"] for r in splits[split]) == {"S1": s1, "S2": s2}
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
    right = [gold[e.question] == e.answer for e in corpus if e.question.startswith("F")]
    assert 0.35 < sum(right) / len(right) < 0.45  # the mean reliability is 0.4
    assert world.splits == splits and data.ToyWorld(4).splits != splits


# ------------------------------------------------------------------------------------------- grpo


def test_group_advantages_in_closed_form():
    ours = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0], [0.1] * 4, [2.0, 4, 6, 8]]))
    close(ours[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    assert (ours[1] == 0).all()  # exactly, not 6e-4
    close(ours[2], torch.tensor([-3.0, -1.0, 1.0, 3.0]) / ((20 / 3) ** 0.5 + 1e-4))
    undivided = grpo.group_advantages(torch.tensor([[2.0, 4, 6, 8], [5, 5, 5, 5]]), by_std=False)
    assert undivided.tolist() == [[-3.0, -1.0, 1.0, 3.0], [0.0] * 4]  # Dr. GRPO
    refuses("G >= 2", grpo.group_advantages, torch.ones(3, 1))


@pytest.mark.parametrize(
    "kl, kind, high",
    [(0, "grpo", None), (0.3, "grpo", 0.28), (0.3, "token", 0.28), (0, "dr_grpo", None)],
)
def test_grpo_loss_equals_the_formula_token_by_token(kl, kind, high):
    """A row without tokens counts as 0 and has a gradient of 0."""
    generator = seeded(0)
    logp, old, ref = (0.5 * torch.randn(3, 4, 6, generator=generator) - 1).unbind()
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[2] = False
    advantages, new = torch.tensor([1.3, -0.7, 5.0, 2.0]), logp.clone().requires_grad_()
    given = ref if kl else None
    settings = {"clip": 0.2, "kl": kl, "clip_high": high, "loss": kind, "max_new_tokens": 7}
    loss, stats = grpo.grpo_loss(new, old, given, advantages, mask, **settings)
    total, total_kl, total_clipped = 0.0, 0.0, 0.0
    for i in range(4):
        terms, kls, cut = [], [], []
        for t in range(6):
            if mask[i, t]:
                ratio, A = math.exp(logp[i, t] - old[i, t]), float(advantages[i])
                clipped = min(max(ratio, 0.8), 1 + (high or 0.2))
                d = float(ref[i, t] - logp[i, t])
                kls.append(math.exp(d) - d - 1)
                terms.append(min(ratio * A, clipped * A) - kl * kls[-1])
                cut.append(clipped * A < ratio * A)
        count = {"grpo": 4 * max(1, len(terms)), "token": int(mask.sum()), "dr_grpo": 4 * 7}[kind]
        total += sum(terms) / count
        total_kl += sum(kls) / max(1, len(kls)) / 4
        total_clipped += sum(cut) / max(1, len(cut)) / 4
    assert loss.item() == pytest.approx(-total, abs=1e-6)
    assert float(stats["kl"]) == pytest.approx(total_kl if kl else 0.0, abs=1e-6)
    assert float(stats["clipped"]) == pytest.approx(total_clipped) and total_clipped > 0
    loss.backward()
    assert new.grad.isfinite().all() and new.grad[mask].any() and not new.grad[~mask].any()


def test_kl_of_nearly_equal_policies_is_not_negative():
    logp = -torch.rand(400, 30, generator=seeded(0))
    ref = logp + 1e-4 * torch.randn(400, 30, generator=seeded(1))
    for row, other in zip(logp.split(1), ref.split(1)):  # exp(d) - d - 1 in float32 is below 0
        mask = torch.ones(1, 30)  # here in a third
        _, stats = grpo.grpo_loss(row, row, other, torch.ones(1), mask, kl=0.1)
        assert float(stats["kl"]) >= 0


ADVANTAGES = torch.randn(12, generator=seeded(9))
SETTINGS = {"group": 4, "max_new_tokens": 10, "eos_ids": (0, 7), "temperature": 1.2}


def sampled(model, **changes):
    s = grpo.Settings(**(SETTINGS | changes))
    prompts = [[5, 9, 2], [7, 7, 8, 1, 2, 3, 4], [11]]
    rollouts = grpo.sample_rollouts(model, prompts, s, seeded(0))
    assert [r.prompt for r in rollouts] == [p for p in prompts for _ in range(s.group)]
    for rollout, advantage in zip(rollouts, ADVANTAGES.tolist() * 99):
        rollout.advantage = advantage
    return s, rollouts


def update(model, s, rollouts, reference):
    masked(model, 0.5)
    optimizer = lorapar.MaskedAdamW(model, lr=1e-2)
    return grpo.grpo_update(model, optimizer, rollouts, reference, s), optimizer


def test_the_first_step_has_no_kl_and_the_gap_tells_sampling_from_training():
    """In float32, without dropout, training says of the tokens what sampling said, in all
    iterations of the step. The gap shows weights that moved between the two, as a wrong cache or
    temperature would."""
    model = lora_model(dropout=0.4).train()
    s, rollouts = sampled(model)
    start = lorapar.get_flat(model)
    stats, _ = update(model, s, rollouts, start)
    assert stats["kl"] == 0.0 and 0 < stats["gap"] < 2e-6
    lorapar.set_flat(model, start)
    s.iterations = 3
    stats, optimizer = update(model, s, rollouts, start)
    assert optimizer.state[optimizer.packed]["step"] == 3
    assert stats["ratio"] != 1.0 and stats["clipped"] > 0 and stats["gap"] < 2e-6
    s.iterations = 1
    lorapar.set_flat(model, start + 0.01)
    assert update(model, s, rollouts, start)[0]["gap"] > 1e-3
    lorapar.set_flat(model, start)
    s.temperature *= 1.1
    assert update(model, s, rollouts, start)[0]["gap"] > 1e-2


def test_an_update_that_fails_gives_the_policy_back(monkeypatch):
    model = lora_model()
    s, rollouts = sampled(model)
    policy = lorapar.get_flat(model)
    rollouts[3].advantage = math.nan
    refuses("gradient is nan", update, model, s, rollouts, policy, error=FloatingPointError)
    assert torch.equal(lorapar.get_flat(model), policy)
    monkeypatch.setattr(grpo, "token_logprobs", Mock(side_effect=KeyError("died")))
    refuses("died", update, model, s, rollouts, policy + 1, error=KeyError)  # in the reference's
    assert torch.equal(lorapar.get_flat(model), policy)


@pytest.mark.parametrize("kind, kl", [("grpo", 0.04), ("token", 0.0), ("dr_grpo", 0.04)])
def test_every_loss_and_kl_has_one_gradient_in_any_micro_batch(kind, kl):
    """Against one plain loss over all answers at once, KL to the reference vector; answers cut at
    the limit are left out; without KL no reference is needed."""
    model, reference = lora_model(), lorapar.get_flat(lora_model(moved=False)) if kl else None
    s, rollouts = sampled(model, group=8, loss=kind, kl=kl, clip_high=0.28, mask_truncated=True)
    for rollout in rollouts:
        rollout.trains = rollout.answer[-1] in s.eos_ids
    assert 2 < sum(r.trains for r in rollouts) < len(rollouts) - 2
    encoded = [data.Encoded(r.prompt + r.answer, len(r.prompt)) for r in rollouts]
    tokens, labels = data.collate(encoded)
    labels[[i for i, r in enumerate(rollouts) if not r.trains]] = -100
    logp = plain_logprobs(model, tokens, labels, s.temperature)
    advantages, mask = torch.tensor([r.advantage for r in rollouts]), labels[:, 1:] != -100
    ref, twin = None, copy.deepcopy(model)
    if kl:
        lorapar.set_flat(twin, reference)
        ref = plain_logprobs(twin, tokens, labels, s.temperature).detach()
    settings = {"kl": kl, "loss": kind, "max_new_tokens": 10}
    loss, parts = grpo.grpo_loss(logp, logp.detach(), ref, advantages, mask, **settings)
    expected = gradient_of(loss, model)
    assert (parts["kl"] > 1e-4) == (kl > 0)
    for s.micro_batch in (1, 5, 64):
        twin = copy.deepcopy(model)
        optimizer = lorapar.MaskedAdamW(twin, lr=1e-30)
        stats = grpo.grpo_update(twin, optimizer, rollouts, reference, s)
        close(optimizer.packed.grad, expected, 1e-4)
        assert stats["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        kl_of_trained = float(parts["kl"]) * len(rollouts) / sum(r.trains for r in rollouts)
        assert stats["kl"] == pytest.approx(kl_of_trained, rel=1e-4) and stats["gap"] < 2e-6
        assert stats["ratio"] == pytest.approx(1)  # a mean over the answers that train
    for rollout in rollouts:
        rollout.trains = False  # a step of nothing moves nothing
    grpo.grpo_update(model, lorapar.MaskedAdamW(model, lr=1), rollouts, reference, s)


def test_the_step_marks_cut_answers_and_divides_by_no_deviation_in_dr_grpo(monkeypatch):
    model = lora_model()
    s = grpo.Settings(**SETTINGS | {"loss": "dr_grpo", "mask_truncated": True, "kl": 0.0})
    s.eos_ids = range(16)
    optimizer = lorapar.MaskedAdamW(model, lr=0.0)

    def rewards(rollouts):
        return [{"length": float(len(r.answer))} for r in rollouts]

    stats, rollouts = grpo.grpo_step(model, optimizer, [[5, 9, 2]], rewards, None, s, seeded(0))
    lengths = [len(r.answer) for r in rollouts]
    assert len(set(lengths)) > 2 and 0 < stats["truncated"] < 1
    assert stats["reward"] == stats["length"] == sum(lengths) / 4 and stats["equal_groups"] == 0
    assert [r.advantage for r in rollouts] == [n - sum(lengths) / 4 for n in lengths]
    assert [r.trains for r in rollouts] == [r.answer[-1] in s.eos_ids for r in rollouts]
    assert stats["truncated"] == sum(not r.trains for r in rollouts) / 4
    arguments = model, optimizer, [[5, 9, 2]], rewards, None, s
    s.loss = "mean"
    refuses("unknown loss 'mean'", grpo.grpo_step, *arguments)
    monkeypatch.setattr(grpo, "rank_and_size", lambda: (0, 2))
    refuses("sum_gradients=True", grpo.grpo_step, *arguments)


# ------------------------------------------------------------------------------------------ train


def test_every_epoch_and_its_batches_hold_every_example_once():
    steps = train.step_batches(range(10), 4, 3, None, seed=1)
    assert [len(s) for s in steps] == [4, 4, 2] * 3
    epochs = [sum(steps[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert train.step_batches(range(10), 4, 3, 2, seed=1) == steps[:2]
    encoded = [data.Encoded([i] * random.Random(i).randint(3, 20), 1) for i in range(1, 24)]
    seen = [t[0].item() for tokens, _ in data.batches(encoded, 5) for t in tokens]
    assert sorted(seen) == list(range(1, 24))


def test_cosine_schedule_with_warm_up():
    expected = [(step + 1) / 5 for step in range(4)]
    expected += [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = [train.set_lr(optimizer, 2.0, step, 20, 0.2) / 2 for step in range(20)]
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected[-1])


def test_the_sft_gradient_is_that_of_the_plain_loss_in_any_micro_batch(toy_tokenizer):
    """The mean over examples of each answer's mean cross-entropy, however it is cut."""
    model = lora_model()
    encoded = [data.Encoded(list(range(i, i + 9 + i)), 3 + i) for i in range(5)]
    tokens, labels = data.collate(encoded)
    logp = plain_logprobs(model, tokens, labels)
    loss = -(logp.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
    expected = gradient_of(loss, model)
    for micro_batch in (1, 2, 8):
        model.zero_grad()
        ours = train.backward(model, encoded, len(encoded), micro_batch, "cpu")
        assert ours == pytest.approx(loss.item())
        close(gradient(model), expected, 1e-4)


def test_without_a_model_the_toys_settings_hold_and_with_one_the_papers():
    toy, real = train.read_config([]), train.read_config(["--model", "a/x", "--data", "gsm8k:d"])
    for c, expected in ((toy, (32.0, 32, 3e-3, 2)), (real, (64.0, 512, 2e-4, 1))):
        assert (c.lora_alpha, c.max_length, c.sft_lr, c.rl_epochs) == expected
    assert (toy.out, real.out) == (Path("runs/toy"), Path("runs/x-gsm8k"))
    assert train.read_config(["--sft-lr", "1"]).sft_lr == 1.0
    assert set(train.TOY) <= set(train.defaults())


QUICK = "--sft-epochs 1 --rl-steps 3 --eval-examples 40 --rl-batch 4".split()
QUICK += "--score-examples 16 --save-every 2 --device cpu".split()
SHORT = "--rl-steps 1 --sft-steps 1 --max-response 4 --device cpu".split()
DERIVED = ["answers/sft.jsonl", "partition.json", "partition.safetensors", "report.md"]
DERIVED += ["labels.jsonl", "importance.safetensors"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """One short run of the whole program, and its base, which later runs copy."""
    out = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.TOY_BASE, "steps", 250)
        train.main([*QUICK, "--out", str(out)])
    return out


def borrow(toy_run, out):
    """A new run folder on the base that toy_run trained."""
    out.mkdir(parents=True)
    for name in ("base", "world"):
        (out / name).symlink_to(toy_run / name)
    return out


def another_run(toy_run, out, *flags):
    train.main([*QUICK, *flags, "--out", str(borrow(toy_run, out))])
    return read(out / "report.json")


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


def test_the_whole_program_runs_and_reports(toy_run, capsys):
    report, text = read(toy_run / "report.json"), (toy_run / "report.md").read_text()
    assert list(report["evaluation"]) == ["base", "sft", "rl"]
    assert all(set(row) == {"S1", "S2", "all"} for row in report["evaluation"].values())
    part, active = report["partition"], report["partition"]["active"]
    assert part["elements"] == 30720 and sum(part["regions"].values()) < 30720
    assert active["sft"] == part["regions"]["s1_only"] + part["regions"]["shared"]
    assert sum(p["elements"] for p in part["per_projection"].values()) == 30720
    rl = metrics(toy_run, "rl")
    assert [r["step"] for r in rl] == [0, 1, 2] and all(r["gap"] < 1e-5 for r in rl)
    assert "| sft |" in text and "40 test examples of toy" in text
    saved = load_file(toy_run / "importance.safetensors")
    for theta in (0.1, 0.9):  # the table of thetas, from the scores
        part_of = lorapar.partition(saved["s1"], saved["s2"], theta)
        share = 100 * (part_of.s1_only | part_of.shared).double().mean()
        assert f"| {theta} | {share:.2f} |" in text
    row = report["evaluation"]["rl"]["all"]
    records = [r for _, r in data.read_records(toy_run / "answers" / "rl.jsonl")]
    assert row["accuracy"] == sum(r["correct"] for r in records) / 40
    p = row["accuracy"]
    assert f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / 40):.1f} | {row['loss']:.3f} |" in text
    samples = [r for _, r in data.read_records(toy_run / "rl" / "samples.jsonl")]
    assert [s["step"] for s in samples] == [0] * 3 + [1] * 3 + [2] * 3
    assert {"id", "question", "answer", "reward"} <= set(samples[0])
    start = saved["start"]
    first, second = (load_file(toy_run / s / "state.safetensors")["flat"] for s in ("sft", "rl"))
    assert int((first != start).sum()) <= active["sft"]
    assert 0 < int((second != first).sum()) <= active["rl"]


def test_the_same_command_again_reuses_and_restores_everything(toy_run, tmp_path, capsys):
    """Also files that vanished; nothing changes but the clock of the run. Flags of size and speed
    may change, others not."""
    out = shutil.copytree(toy_run, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for vanished, flags in (
        ([], ["--micro-batch", "64", "--batch-rows", "20", "--save-every", "1"]),
        (DERIVED, []),
    ):
        for name in vanished:
            (out / name).unlink()
        capsys.readouterr()
        train.main([*QUICK, *flags, "--out", str(out)])
        said = capsys.readouterr().out
        assert ("score: reused" in said) == (not vanished)
        assert "\nsft: goes on after step" in said and "everything is in" in said
        for name in ("device ", "LoRA ", "S1 ", "rl ", "test ", "steps ", "folder "):
            assert f"\n{name}" in said
        changed = {p.name for p in before if p.read_bytes() != before[p] and p.suffix != ".png"}
        assert changed <= {"report.json", "report.md", "config.json", "labels.jsonl"}
    assert "--theta 0.9, not 0.5" in fails(capsys, *QUICK, "--out", out, "--theta", "0.5")
    assert "--rl-lr 0.004, not 0.1" in fails(capsys, *QUICK, "--out", out, "--rl-lr", "0.1")
    shutil.rmtree(out / "rl")
    older = (out / "answers" / "rl.jsonl").stat().st_mtime_ns
    for name in ("draft.tmp", "state.safetensors.tmp"):
        (out / name).write_text("")
    assert "--theta" in fails(capsys, *QUICK, "--out", out, "--theta", "0.5")
    assert len(list(out.glob("*.tmp"))) == 2  # what is refused is not touched
    changed_flags = ["--rl-lr", "0.1", "--kl", "0.1"]
    train.main([*QUICK, *changed_flags, "--out", str(out)])  # RL has not begun
    assert (out / "answers" / "rl.jsonl").stat().st_mtime_ns > older  # no older stage's answers
    assert [file.name for file in out.glob("*.tmp")] == ["draft.tmp"]
    shutil.copy(out / "sft" / "adapter_model.safetensors", out / "importance.safetensors")
    assert "does not hold start" in fails(capsys, *QUICK, *changed_flags, "--out", out)


def test_killed_and_resumed_is_bit_identical(toy_run, tmp_path, monkeypatch):
    """Dropout, optimizer, data order and sampling go on where they stopped."""
    flags, whole, killed = "--dropout 0.2 --kl 0.1".split(), tmp_path / "whole", tmp_path / "killed"
    another_run(toy_run, whole, *flags)
    real_save, saves = train.save_state, []

    def save_then_die(folder, *rest):
        saves.append(folder.name)
        if len(saves) in (2, 8):  # in the middle of SFT, then of RL; the steps since run again
            raise MemoryError("died")
        real_save(folder, *rest)

    monkeypatch.setattr(train, "save_state", save_then_die)
    command = [*QUICK, *flags, "--out", str(borrow(toy_run, killed))]
    for stage in ("sft", "rl"):
        refuses("died", train.main, command, error=MemoryError)
        assert saves[-1] == stage
        with open(killed / "metrics.jsonl", "a") as file:
            file.write('{"stage')  # killed inside a line
    train.main(command)
    for stage in ("sft", "rl"):
        states = [load_file(out / stage / "state.safetensors") for out in (whole, killed)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), stage
        of_whole, of_killed = metrics(whole, stage), metrics(killed, stage)
        for name in ("step", "loss", "lr"):
            assert [r[name] for r in of_whole] == [r[name] for r in of_killed]
        assert len(of_whole) > 2
    samples = [(out / "rl" / "samples.jsonl").read_text() for out in (whole, killed)]
    assert samples[0] == samples[1] and samples[0].count("\n") == 9


def test_a_stop_while_the_last_step_is_saved_is_not_lost(toy_run, tmp_path, monkeypatch):
    out, real_save = borrow(toy_run, tmp_path / "run"), train.save_state

    def save_and_interrupt(folder, *rest):
        real_save(folder, *rest)
        train.ask_to_stop(None, None)

    monkeypatch.setattr(train, "save_state", save_and_interrupt)
    with pytest.raises(SystemExit, match="130"):
        train.main([*QUICK, "--save-every", "99", "--out", str(out)])
    assert len(metrics(out, "sft")) == int(load_file(out / "sft/state.safetensors")["step"]) > 2
    assert not (out / "rl").exists()


def test_lines_of_a_file_end_at_new_lines_alone(tmp_path):
    records = [{"step": i, "answer": "a\u2028b\x85c\u2029"} for i in range(4)]
    train.write_lines(tmp_path / "x.jsonl", records)
    train.keep_lines(tmp_path / "x.jsonl", lambda r: r["step"] < 3)
    assert [r for _, r in data.read_records(tmp_path / "x.jsonl")] == records[:3]


def test_long_steps_are_saved_by_time(toy_run, tmp_path, monkeypatch):
    clock, saved, real_save = itertools.count(0, 601), [], train.save_state
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))  # ten minutes a step

    def noted(folder, model, optimizer, step):
        saved.append(step)
        real_save(folder, model, optimizer, step)

    monkeypatch.setattr(train, "save_state", noted)
    another_run(toy_run, tmp_path / "run", "--save-every", "99", "--order", "sft")
    assert saved == list(range(1, 1 + len(metrics(tmp_path / "run", "sft")))) and len(saved) > 2


def test_ablation_switches_do_what_they_say(toy_run, tmp_path, capsys):
    """Each against the run without it: what it changes, and what it must not."""
    plain, real = read(toy_run / "report.json"), load_file(toy_run / "partition.safetensors")

    def run(flags):
        out = tmp_path / flags.replace(" ", "_")
        report = another_run(toy_run, out, *flags.split())
        regions = load_file(out / "partition.safetensors")
        return out, report["evaluation"], report["partition"], regions

    out, rows, part, regions = run("--order rl-sft")
    assert list(rows) == ["base", "rl", "sft"]
    assert part == plain["partition"]  # masks follow the system, not the position
    start = load_file(out / "importance.safetensors")["start"]
    moved = load_file(out / "rl" / "state.safetensors")["flat"] != start
    assert not moved[~(regions["s2_only"] | regions["shared"])].any()

    out, rows, part, _ = run("--order sft --init gaussian")
    assert list(rows) == ["base", "init", "sft"] and not (out / "rl").exists()
    assert list(part["active_percent"]) == ["sft"]
    assert rows["init"]["all"]["loss"] != rows["base"]["all"]["loss"]

    _, _, part, regions = run("--order rl --select random")
    assert part["regions"] == plain["partition"]["regions"]
    assert not torch.equal(regions["s1_only"], real["s1_only"])

    out, rows, part, _ = run("--order none --select swapped")
    sizes = plain["partition"]["active"]
    assert part["active"] == {"sft": sizes["rl"], "rl": sizes["sft"]}

    assert rows == {} and not (out / "sft").exists() and (out / "report.md").exists()

    out, _, _, _ = run("--stage-data all --kl 0 --rl-iterations 2")
    counts = sum(int(plain["data"][system].split()[0]) for system in ("S1", "S2"))
    assert len(metrics(out, "sft")) == math.ceil(counts / 32) > len(metrics(toy_run, "sft"))
    assert all(r["kl"] == 0 for r in metrics(out, "rl"))
    assert load_file(out / "rl" / "state.safetensors")["adam.step"] == 6

    _, _, part, _ = run("--alpha 0.5 --beta 0 --theta 0.5 --targets qo")
    sizes = part["regions"]
    assert part["active"]["rl"] == sizes["s2_only"]
    assert part["active"]["sft"] == sizes["s1_only"] + sizes["shared"] // 2
    assert set(part["per_projection"]) == {"q_proj", "o_proj"}

    # theta 1 ranks nothing, so plain LoRA's B = 0 is no error there
    _, _, part, _ = run("--init lora --theta 1")
    assert part["active_percent"] == {"sft": 100.0, "rl": 100.0}


def test_options_of_rl_and_validation_while_training(toy_run, tmp_path, monkeypatch, capsys):
    """The best adapter is that of the best look; a run that stops and goes on keeps all of it."""
    out, flags = tmp_path / "run", ["--eval-every", "2", "--sft-lr", "0.02"]
    flags += ["--kl-reference", "base", "--rl-loss", "token", "--clip-high", "0.3"]
    another_run(toy_run, out, *flags, "--mask-truncated")
    said = capsys.readouterr().out
    looks = [r for r in metrics(out, "sft") if "accuracy" in r]
    assert [r["step"] % 2 for r in looks[:-1]] == [1] * (len(looks) - 1) and "; for one:" in said
    assert metrics(out, "rl")[0]["kl"] > 1e-3  # not to the policy as RL began
    best = max(looks, key=lambda r: r["accuracy"])  # the first of equals
    c = train.read_config([*QUICK, *flags, "--out", str(out)])
    _, inputs = train.prepare(c)
    model = lorapar.load_adapter(decoder.load_model(out / "base"), out / "sft" / "best")
    records = train.answer_all(c, model, inputs, inputs.validation, "best")
    assert train.averages(records)["all"]["accuracy"] == best["accuracy"]
    assert all(e.id.startswith("toy/validation/") for e in inputs.validation)
    train.main(["compare", str(toy_run), str(out)])
    table = capsys.readouterr().out
    answers = []
    for folder in (toy_run, out):
        records = data.read_records(folder / "answers" / "rl.jsonl")
        answers.append([float(r["correct"]) for _, r in records])
    gaps = [100 * (b - a) for a, b in zip(*answers)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    assert f"| {statistics.fmean(gaps):+.1f} ± {error:.1f} |" in table and "| hours" in table
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    train.main(["compare", str(toy_run), str(out)])  # a terminal that knows no ±


@pytest.mark.parametrize("method", ["prompt", "ia3"])
def test_a_baseline_trains_evaluates_and_is_loaded_again(method, toy_run, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--method", method, "--order", "sft", "--sft-lr", "0.03", "--sft-epochs", "6"]
    report = another_run(toy_run, out, *flags)
    loss = {row: means["S1"]["loss"] for row, means in report["evaluation"].items()}
    assert list(loss) == ["base", "sft"] and loss["sft"] < loss["base"]
    elements = {"prompt": 20 * 128, "ia3": 2 * (128 * 2 + 256)}[method]
    assert report["partition"]["elements"] == elements
    capsys.readouterr()
    train.main(["eval", str(out), "--device", "cpu"])
    said = capsys.readouterr().out
    rows = json.loads(said[: said.rindex("}") + 1])
    assert rows["all"]["accuracy"] == report["evaluation"]["sft"]["all"]["accuracy"]
    assert "--order sft" in fails(capsys, "--method", method)


def test_readmes_trainers_move_active_elements_alone(tmp_path, monkeypatch):
    """transformers' Trainer, then TRL's GRPOTrainer, as the README shows them."""
    pytest.importorskip("trl")
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, 64)}
    words = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens, labels = answer_batch()
    decoder.save_model(small("llama2"), tmp_path)
    names = {"__name__": "snippet"}
    names |= {"tokenizer": transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<eos>"
    )}  # fmt: skip
    names["model"] = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    names["s1_batches"] = [(tokens, labels)]
    names["s2_batches"] = [(tokens.flip(0), labels.flip(0))]
    names["s1_rows"] = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels)]
    names["s2_prompts"] = datasets.Dataset.from_list([{"prompt": "w5 w6 w7"}] * 8)
    names["reward"] = lambda completions, **_: [float(len(set(c.split()))) for c in completions]
    small_steps = {"use_cpu": True, "max_steps": 2, "report_to": []}
    names["sft_settings"] = {"output_dir": str(tmp_path / "sft"), **small_steps}
    names["rl_settings"] = {"output_dir": str(tmp_path / "rl"), **small_steps}
    names["rl_settings"] |= {"per_device_train_batch_size": 4, "num_generations": 4}
    names["rl_settings"] |= {"max_completion_length": 6, "bf16": False}
    readme = (HERE / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(from transformers.*?)```", readme, re.S)
    imports, sft, rl = snippet.split("\n\n")
    exec(f"from lorapar import *\nimport torch\n{imports}", names)
    monkeypatch.chdir(tmp_path)
    for stage in (sft, rl):
        before = lorapar.get_flat(names["model"]) if stage is rl else None
        exec(stage, names)
        if before is None:  # the start is what the anchors hold
            anchors = lorapar.lora_buffers(names["model"], "anchor")
            before = torch.cat([anchor.flatten() for anchor in anchors])
        mask, after = lorapar.get_mask(names["model"]), lorapar.get_flat(names["model"])
        moved = after != before
        assert moved[mask].float().mean() > 0.95 and not moved[~mask].any() and (~mask).any()
    assert lorapar.load_adapter(decoder.load_model(tmp_path), tmp_path / "adapter")


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(stage, toy_run, tmp_path, capsys):
    """Also where the elements are finite and their product is not; also at the last step."""
    out, flags = borrow(toy_run, tmp_path / "run"), [*QUICK, f"--{stage}-lr", "1e30", "--out"]
    error = fails(capsys, *flags, out, f"--{stage}-steps", "1")
    for part in (f"{stage} step 1", f"lower --{stage}-lr", "another --out"):
        assert part in error
    assert (out / "importance.safetensors").exists()
    assert not (out / stage / "state.safetensors").exists()
    assert (out / "sft" / "adapter_model.safetensors").exists() == (stage == "rl")
    assert not (out / "answers" / f"{stage}.jsonl").exists()
    if stage == "sft":  # a loss that is not finite, in the middle
        out = borrow(toy_run, tmp_path / "other")
        error = fails(capsys, *flags, out, "--save-every", "99")
        assert "sft step 2: the norm of the gradient is" in error


def test_stage_2_and_evaluation_may_have_data_sets_of_their_own(toy_run, tmp_path, capsys):
    """The paper trains on Dolly and evaluates elsewhere."""
    dolly, labels, gsm = tmp_path / "dolly.jsonl", tmp_path / "labels.jsonl", tmp_path / "gsm"
    records = [{"instruction": f"F t1 e{i} A", "context": "", "response": "c5"} for i in range(40)]
    data.write_jsonl(dolly, records)
    votes = [{"id": f"dolly/{i}", "label": "S1"} for i in range(40)]
    votes += [{"id": f"gsm8k/train/{i}", "label": "S2"} for i in range(40)]
    data.write_jsonl(labels, votes)
    gsm8k_folder(gsm, 40)
    flags = ["--model", toy_run / "base", "--data", f"dolly:{dolly}", *SHORT]
    flags += ["--labels", labels, "--eval-data", f"gsm8k:{gsm}/test.jsonl"]
    flags = [str(flag) for flag in [*flags, "--out", tmp_path / "out"]]
    assert "--rl-data or a --reward" in fails(capsys, *flags)  # RL could not be rewarded
    train.main([*flags, "--rl-data", f"gsm8k:{gsm}"])
    report = read(tmp_path / "out" / "report.json")
    assert report["data"]["S1"] == report["data"]["S2"] == "38 training examples"
    assert report["evaluation"]["rl"]["all"]["examples"] == 40
    assert report["data"]["test"] == f"40 test examples of gsm8k:{gsm}/test.jsonl"
    records = [r for _, r in data.read_records(tmp_path / "out" / "answers" / "rl.jsonl")]
    cut = sum(len(r["reply"].split()) == 4 for r in records) / 40  # without an end
    assert report["evaluation"]["rl"]["all"]["truncated"] == cut > 0
    assert f"rl {cut:.1%}." in (tmp_path / "out" / "report.md").read_text()
    c = train.read_config([*flags, "--rl-data", f"gsm8k:{gsm}", "--order", "rl"])
    inputs, _ = train.read_inputs(c, toy_run / "base")
    assert "only --prompt authors asks for its tags" in inputs.notes["reward"]
    capsys.readouterr()
    train.main(["eval", str(tmp_path / "out"), "--device", "cpu"])  # asks as the run asks
    assert '"examples": 40' in capsys.readouterr().out
    saved = load_file(tmp_path / "out" / "partition.safetensors")
    assert {k: int(v.sum()) for k, v in saved.items()} == report["partition"]["regions"]


REWARD = """
def two(question, answer):
    return 1

def length(question, answer, completion):
    return {"short": -len(completion) / 100, "asked": float(question in ("F t1 e1 A", "M a b"))}

def broken(question, answer, completion):
    return completion["no"]

def nothing(question, answer, completion):
    return None

def alarm(question, answer, completion):
    import signal
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return 0.0
"""


def test_ones_own_file_and_reward_train_stage_2(toy_run, tmp_path, capsys):
    """The split is said in one line; the reward is tried before anything is loaded."""
    mine = tmp_path / "mine.jsonl"
    data.write_jsonl(mine, own_rows(60, check="exact"))
    (tmp_path / "reward.py").write_text(REWARD)

    def with_reward(name):
        flags = ["--model", str(toy_run / "base"), "--data", str(mine), *SHORT]
        return [*flags, f"--reward={tmp_path}/reward.py:{name}", "--out", str(tmp_path / name)]

    train.main(with_reward("length"))
    said = capsys.readouterr().out
    assert f"{mine}: 60 examples: 48 train, 6 validation, 6 test" in said
    for same_file in (mine, tmp_path / "length" / ".." / mine.name):
        assert "leave --data out" in fails(capsys, "eval", tmp_path / "length", "--data", same_file)
    assert "reward    of the reference answer of" in said and "'short': -0.02" in said
    report = read(tmp_path / "length" / "report.json")
    assert report["evaluation"]["rl"]["all"]["examples"] == 6  # 80/10/10
    assert sum(int(report["data"][system].split()[0]) for system in ("S1", "S2")) == 48
    (line,) = metrics(tmp_path / "length", "rl")
    assert set(line["parts"]) == {"short", "asked"} and line["parts"]["short"] < 0
    free = tmp_path / "free.jsonl"  # nothing but the reward can tell: its mean is evaluated
    data.write_jsonl(free, own_rows(60))
    flags = [str(free) if flag == str(mine) else flag for flag in with_reward("length")[:-1]]
    train.main([*flags, str(tmp_path / "free")])
    means = read(tmp_path / "free" / "report.json")["evaluation"]["rl"]["all"]
    records = [r for _, r in data.read_records(tmp_path / "free" / "answers" / "rl.jsonl")]
    expected = statistics.fmean(-len(r["reply"]) / 100 for r in records)
    assert means["accuracy"] == pytest.approx(expected) and means["examples"] == 6
    assert "| reward | " in (tmp_path / "free" / "report.md").read_text()
    capsys.readouterr()
    train.main(["eval", str(tmp_path / "free"), "--device", "cpu"])
    rows = json.loads(capsys.readouterr().out.partition("\n")[2].rpartition("}")[0] + "}")
    assert rows["all"] == pytest.approx(means, rel=1e-4) and "S1" in rows
    train.main(["compare", str(tmp_path / "free"), str(tmp_path / "free")])
    assert f"| {means['accuracy']:.3f} |" in capsys.readouterr().out  # a reward is no per cent
    assert "same questions" in fails(capsys, "compare", toy_run, tmp_path / "free")
    other = shutil.copytree(tmp_path / "free", tmp_path / "other")
    answers = (other / "answers" / "rl.jsonl").read_text()
    (other / "answers" / "rl.jsonl").write_text(answers.replace("F t1", "F t2"))  # the same ids
    assert "same questions" in fails(capsys, "compare", other, tmp_path / "free")
    for name, error in (
        ("broken", "(line 9, on "),
        ("two", "arguments but 3 were given (on "),
        ("nothing", "TypeError"),
        ("alarm", "signal only works in main thread"),
        ("absent", "KeyError: 'absent'"),
    ):
        assert error in fails(capsys, *with_reward(name))
        assert not (tmp_path / name / "config.json").exists()  # nothing was begun


def test_eval_command_gives_the_number_and_every_answer(toy_run, tmp_path, capsys, monkeypatch):
    """Of a run with the run's own settings; of foreign checkpoints; never over an older file."""
    gsm8k_folder(tmp_path / "data", 6)
    mmlu_file(tmp_path / "mmlu", "c1?,a,b,c,d,A\nc2?,a,b,c,d,B\n")
    data.write_jsonl(tmp_path / "mine.jsonl", OWN)
    monkeypatch.chdir(tmp_path)
    base = ["--model", str(toy_run / "base"), "--max-response", "4"]

    def evaluated(*command):
        train.main(["eval", "--device", "cpu", *command])
        said = capsys.readouterr().out
        assert ("examples: taken whole" in said) == command[-1].endswith(".jsonl")
        out = re.search("every answer of .* is in (.*)", said)[1]
        rows = json.loads(said[said.index("{") : said.rindex("}") + 1])
        records = [r for _, r in data.read_records(out)]
        assert rows["all"]["examples"] == len(records)
        assert rows["all"]["accuracy"] == sum(r["correct"] for r in records) / len(records)
        return rows, records, Path(out).name

    for count, source in ((6, "gsm8k:data"), (6, "gsm8k:data/test.jsonl"), (3, "mine.jsonl")):
        _, records, name = evaluated(*base, "--data", source)
        assert len(records) == count
    _, records, name = evaluated(*base, "--data", "mmlu:mmlu", "--adapter", str(toy_run / "rl"))
    assert all(r["reply"] in "ABCD" for r in records) and name.startswith("eval-mmlu-2")
    rows, _, name = evaluated(str(toy_run))
    known = read(toy_run / "report.json")["evaluation"]["rl"]
    for system, row in rows.items():
        assert row["accuracy"] == known[system]["accuracy"]
        assert row["loss"] == pytest.approx(known[system]["loss"], rel=1e-4)
    assert name.startswith("eval-toy-2") and (toy_run / "answers" / name).exists()
    assert "no such file" in fails(capsys, "eval", "nowhere")


def test_out_of_memory_names_the_flags_to_lower(monkeypatch, tmp_path):
    def full(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..")

    def score(c=None):
        lorapar.importance(lora_model(), [answer_batch()])

    monkeypatch.setattr(lorapar, "vmap", full)
    with pytest.raises(torch.OutOfMemoryError):  # not told as a model that vmap cannot run
        score()
    monkeypatch.setattr(train, "run", score)
    with pytest.raises(SystemExit, match="CUDA out of memory: lower --micro-batch, --batch-rows"):
        train.main(["--device", "cpu", "--out", str(tmp_path / "run")])


def test_bad_input_gets_one_clear_line(toy_run, tmp_path, capsys):
    base, nowhere, file = toy_run / "base", tmp_path / "nowhere", tmp_path / "file"
    few = sweep_folder(toy_run, tmp_path / "few", 1)
    good, none = gsm8k_folder(tmp_path / "good"), tmp_path / "none.jsonl"
    split = f"gsm8k:{good}/train.jsonl"
    run = f"--model {base} --data gsm8k:{good} --out {tmp_path}/out"
    labelled, toy = f"{run} --labels steps:2", f"--out {borrow(toy_run, tmp_path / 'toy')}"
    merge = f"merge --model {base} --adapter {toy_run}/rl --out"
    data.write_jsonl(none, [{"id": "elsewhere", "label": "S1"}])
    unmarked = tmp_path / "unmarked"
    data.write_jsonl(unmarked / "train.jsonl", [GSM8K, GSM8K, GSM8K | {"answer": "It is 18."}])
    mine = tmp_path / "mine.jsonl"
    owned = f"--model {base} --data {mine} --out {tmp_path}/own"
    data.write_jsonl(mine, own_rows(40, check="exact"))
    data.write_jsonl(
        tmp_path / "again.jsonl",
        [row | {"id": i} for i, row in enumerate(own_rows(9, check="exact"))],
    )
    data.write_jsonl(tmp_path / "clash.jsonl", [GSM8K | {"id": "gsm8k/train/3", "check": "number"}])
    file.write_text("")
    commands = f"""
        --theta: 0 is not from => --theta 0
        --theta: 1.2 is not from => --theta 1.2
        go together => --data gsm8k
        --targets x: letters of => --targets x
        --labels teachers:6: in the toy => --labels teachers:6
        argument --lora-alpha: 0 => --lora-alpha 0
        1e39 is not from => --sft-lr 1e39
        invalid choice: 'sft,rl' => --order sft,rl
        argument --r: 0 is not from 1 => --r 0
        --rl-group: 1 is not from 2 => --rl-group 1
        unknown data set => {run} --data gsm9k
        --labels is missing => {run}
        nothing at => {labelled} --data gsm8k:{nowhere}
        nowhere: no such file => {run} --labels {nowhere}
        nowhere.jsonl: no such file => {labelled} --data {nowhere}.jsonl
        no csv file there => {labelled} --eval-data mmlu:{good}
        each once => --targets qq
        every importance is 0 => --init lora
        sets --seed itself => sweep order --seed 3
        holds test.jsonl, but no config.json => {run} --labels steps:2 --out {good}
        is not of a run: name => {run} --labels steps:2 --out {base}
        is a file that the run writes => {run} --labels {tmp_path}/out/labels.jsonl
        it has 'elsewhere', the data 'gsm8k/train/ => {run} --labels {none}
        0 files train.jsonl there => {labelled} --data gsm8k:{base}
        train.jsonl:3: no number after #### => {labelled} --data gsm8k:{unmarked}
        S2 of gsm8k:{good}: 0 training examples => {labelled}
        the evaluation holds training => {owned} --eval-data {tmp_path}/again.jsonl
        have the id gsm8k/train/3 => {labelled} --eval-data {tmp_path}/clash.jsonl
        evaluation holds => {labelled} --data {split} --eval-data gsm8k:{good} --eval-every 1
        longer than --max-prompt 2 => {toy} --max-prompt 2 --train-examples 70
        sees no device cuda:99 => --device cuda:99
        --seed: -1 is not from 0 => --seed -1
        sft: no element is active: raise --alpha => {toy} --theta 1 --alpha 0
        Not a directory => --out {file}/run
        is not empty => {merge} {base}
        not a readable PEFT adapter => {merge} {tmp_path}/m --adapter nowhere
        no run there => figure {nowhere}
        unrecognized arguments: --thet => --thet 0.5
        is for the toy => sweep splits --model {base} --data {mine}
        needs 50 training examples => sweep resample --train-examples 60 --out {few}
        sweep order sets --order itself => sweep order --order=sft
        has no validation split => {labelled} --eval-data {mine} --eval-split validation
        GSM8K's solutions alone => {owned} --labels steps:2
        eval needs => eval --data gsm8k
    """
    for expected, command in table(commands).items():
        assert expected in fails(capsys, *command.split()), expected


def test_figures_of_a_run(toy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.main(["figure", str(toy_run)])
    assert "matplotlib is not installed" in capsys.readouterr().out
    monkeypatch.undo()
    pyplot, shown = pytest.importorskip("matplotlib.pyplot"), {}

    def keep(figure, path, **_):
        shown[path.name] = figure
        path.write_bytes(b"png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    train.main(["figure", str(toy_run)])
    (axes,) = shown["importance.png"].axes
    part = read(toy_run / "partition.json")
    legend = " ".join(t.get_text() for t in axes.get_legend().get_texts())
    assert f"{part['jaccard']:.3f}" in axes.get_legend().get_title().get_text()
    for name, region in (("S1-only", "s1_only"), ("S2-only", "s2_only"), ("shared", "shared")):
        assert f"{name} {part['regions'][region] / part['elements']:.1%}" in legend
    assert sum(len(c.get_offsets()) for c in axes.collections) == 20_000
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {a.get_title(): list(a.lines[0].get_ydata()) for a in shown["training.png"].axes}
    for stage, what in (("rl", "reward"), ("sft", "loss")):
        assert lines[f"{stage}: {what}"] == [r[what] for r in metrics(toy_run, stage)]


def sweep_folder(toy_run, out, seeds):
    """A sweep's folder on the base that toy_run trained, the same for every seed."""
    for seed in (*range(seeds), train.RATES_SEED):
        borrow(toy_run, out / f"toy-{seed}")
    return out


def test_a_sweep_of_two_tiny_cells(toy_run, tmp_path, monkeypatch, capsys):
    out = sweep_folder(toy_run, tmp_path / "sweep", 2)
    shutil.rmtree(out / f"toy-{train.RATES_SEED}")  # this one is made
    monkeypatch.setitem(train.TOY_BASE, "steps", 2)
    monkeypatch.setattr(train, "RATES", (1, 3))
    command = ["sweep", "order", "--seeds", "2", *QUICK, "--out", str(out)]
    train.main(command)
    said = capsys.readouterr().out
    assert re.search(r"cell 1 of 12, left \d+:\d\d\n", said) and "cell 12 of 12, left 0:00" in said
    records = list(csv.DictReader((out / "order.csv").open()))
    expected = list(itertools.product(("SFT then RL", "RL then SFT"), "01"))
    assert [(r["row"], r["seed"]) for r in records] == expected
    cells = {p.name: read(p / "report.json")["evaluation"] for p in out.glob("cells/*")}
    chosen = {}
    for rate in (3e-3, 9e-3):  # the rates of the first row, chosen again by hand, on validation
        flags = "" if rate == 3e-3 else f",sft_lr={rate}"
        end = cells[f"eval_split=validation,seed={train.RATES_SEED}{flags}"]["rl"]["all"]
        chosen[rate] = [end["accuracy"], -end["loss"]]
    assert float(records[0]["sft_lr"]) == max(chosen, key=chosen.get)
    assert all(("validation" in name) == ("seed=1000" in name) for name in cells)
    ends = {(r["row"], r["seed"]): float(r["all at the end"]) for r in records}
    flags = f",sft_lr={records[0]['sft_lr']}" * (records[0]["sft_lr"] != "0.003")
    flags = f"rl_lr={records[0]['rl_lr']}," * (records[0]["rl_lr"] != "0.004") + "seed=0" + flags
    accuracy = cells[flags]["rl"]["all"]["accuracy"]
    assert ends["SFT then RL", "0"] == pytest.approx(100 * accuracy)
    text = (out / "order.md").read_text()
    gaps = [ends["RL then SFT", seed] - ends["SFT then RL", seed] for seed in "01"]
    error = statistics.stdev(gaps) / 2**0.5
    assert f"| SFT then RL | {statistics.mean(gaps):+.1f} ± {error:.1f} |" in text
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent.parent.name == "cells"}
    train.main(command)  # finished cells are reused
    assert before == {p: p.stat().st_mtime_ns for p in before} and len(before) > 10


def test_every_sweep_has_rows_that_are_flags_and_references():
    assert [len(train.sweep_rows(name)) for name in train.SWEEPS] == [4, 9, 23, 9, 6, 2, 2, 0]
    for name in train.SWEEPS:
        rows = train.sweep_rows(name)
        for flags, reference in rows.values():
            assert train.read_config(flags.split()) and reference in rows


def test_a_rate_is_lost_by_diverging_alone():
    def cell(sft_lr, **changes):
        if sft_lr in (9e-3, 9e-2):
            raise error
        return {"all at the end": sft_lr, "all loss at the end": 0.5}

    c, error = train.read_config(["--order", "sft"]), train.Diverged("not finite")
    assert train.best_rates(c, cell) == {"sft_lr": 3e-3}
    c.method = "ia3"
    assert train.best_rates(c, cell) == {"sft_lr": 3e-2}
    error = ValueError("another run is there")
    refuses("another run", train.best_rates, c, cell)


def test_resampling_is_partitions_of_ordinary_scores(toy_run, tmp_path):
    """`sweep resample` against importance computed anew."""
    out = sweep_folder(toy_run, tmp_path / "sweep", 1)
    train.main(["sweep", "resample", "--seeds", "1", *QUICK, "--out", str(out)])
    indices = list(csv.DictReader((out / "resample.csv").open()))
    assert {r["examples"] for r in indices} == {"25", "50", "100"}
    c = train.read_config([*QUICK, "--out", str(out / "resample-0"), "--order", "none"])
    model, inputs = train.prepare(c)
    lorapar.add_lora(model, lora_alpha=c.lora_alpha, generator=seeded(0))
    encoded = inputs.encoded["S1"]
    draws = [lorapar.importance(model, [data.collate(encoded[i : i + 50])]) for i in (0, 50)]
    expected = train.jaccard(lorapar.partition(*draws, 0.9))
    (ours,) = (r for r in indices if r["examples"] == "50")
    assert float(ours["S1 / S1"]) == pytest.approx(expected, abs=2e-3)
    assert float(ours["S1 / S2"]) < float(ours["S1 / S1"])


def test_command_lines_explain_themselves_and_model_py_continues_a_prompt(toy_run):
    for command in ("data.py", "train.py sweep"):
        done = python(*command.split(), "--help")
        assert done.returncode == 0 and "usage" in done.stdout
    prompt, base = "M a b c d | rev rot A", toy_run / "base"
    done = python("model.py", base, prompt, "--max-new-tokens", "20")
    model, tokenizer = decoder.load_model(base), data.Tokenizer(base)
    settings = {"temperature": 0, "eos_ids": [0]}
    ((answer,),) = decoder.generate(model, [tokenizer.encode(prompt)], 20, **settings)
    assert len(answer) > 2 and done.stdout == prompt + tokenizer.decode(answer) + "\n", done.stderr
    done = python("model.py", "nowhere", "x")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------- kills, changes, several processes

KILLER = """
import builtins, os, signal, sys
count, last = 0, int(sys.argv.pop(1))

def counted(function):
    def call(*arguments, **settings):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)
    return call

os.replace, os.fsync = counted(os.replace), counted(os.fsync)
import train
train.open = counted(open)
train.TOY_BASE["steps"] = 30
train.main(sys.argv[1:])
"""
SHORT_RUN = [*QUICK, "--eval-every", "2", "--micro-batch", "64"]


def start(out, last=0):
    """A short run in a process of its own, killed at its file event number `last` (0: never)."""
    command = [sys.executable, "-c", KILLER, str(last), *SHORT_RUN, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def outcome(out):
    """All that a run leaves, but for its times."""
    files = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix in (".safetensors", ".jsonl", ".json", ".md"):
            files[name] = path.read_bytes()
    labels = files.pop("labels.jsonl").splitlines()  # its votes name files of the folder
    files["labels"] = [json.loads(line)["label"] for line in labels]
    lines = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    timed = ("seconds", "rollout_s", "reward_s", "update_s")
    files["metrics"] = [{k: v for k, v in r.items() if k not in timed} for r in lines]
    return files


def same(ours, whole):
    assert ours.keys() == whole.keys()
    return [name for name in whole if ours[name] != whole[name]]


def phase_of(log):
    """The last thing that a killed run said it does."""
    words = re.findall(r"^(base|score|partition|sft|rl|evaluate|toy base)\b", log, re.M)
    return words[-1] if words else "start"


def kill_and_go_on(out, whole, rng, seconds):
    """Kills a run at random until it ends -> the phases of the kills; it ends as the whole one."""
    phases = []
    for kill in ("at a file event", "by time", "by time", None):
        run = start(out, rng.randrange(1, 60) if kill == "at a file event" else 0)
        try:
            log, _ = run.communicate(timeout=rng.uniform(2, seconds) if kill == "by time" else None)
        except subprocess.TimeoutExpired:
            run.kill()
            log, _ = run.communicate()
        if run.returncode == 0:
            return phases, same(outcome(out), whole)
        assert run.returncode == -signal.SIGKILL, log
        phases.append(phase_of(log))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    log, _ = start(out).communicate()
    assert "everything is in" in log, log
    return outcome(out)


def test_a_run_killed_at_random_ends_bit_identical(whole_run, tmp_path):
    """`python test_lorapar.py soak 100` kills a hundred times."""
    phases, different = kill_and_go_on(tmp_path / "run", whole_run, random.Random(0), 6)
    assert not different, different
    assert phases


def test_the_first_interrupt_saves_and_a_second_process_is_refused(whole_run, tmp_path):
    out = tmp_path / "run"
    run = start(out)
    for line in run.stdout:
        if line.startswith("sft:"):  # the first step begins
            break
    run.send_signal(signal.SIGTERM)
    rest = run.stdout.read()
    assert run.wait() == 130 and "stopped; repeat" in rest, rest
    step = int(re.search(r"saved after sft step (\d+)", rest)[1])
    state = load_file(out / "sft" / "state.safetensors")
    assert int(state["step"]) == step == len(metrics(out, "sft"))
    with train.lock_folder(out):
        log, _ = start(out).communicate()
        assert "another process is at work there" in log.splitlines()[-1]
    log, _ = start(out).communicate()
    assert f"goes on after step {step}" in log and not same(outcome(out), whole_run)


def test_what_a_run_was_made_from_may_not_change(toy_run, tmp_path, capsys):
    """Nor may its config vanish; a redone first stage is not mixed with the old second one."""
    (tmp_path / "reward.py").write_text(REWARD)
    mine, rows = tmp_path / "mine.jsonl", own_rows(60, check="exact")
    data.write_jsonl(mine, rows)
    base, out = shutil.copytree(toy_run / "base", tmp_path / "base"), tmp_path / "out"
    flags = ["--model", base, "--data", mine, *SHORT, "--out", out]
    flags = [str(flag) for flag in [*flags, f"--reward={tmp_path}/reward.py:length"]]
    train.main(flags)

    def refused(what, path, change):
        content = path.read_bytes()
        change(path)
        assert f"made from another {what}" in fails(capsys, *flags), what
        path.write_bytes(content)

    refused("reward", tmp_path / "reward.py", lambda p: p.write_text(REWARD + "\n"))
    refused("data", mine, lambda p: p.write_text(p.read_text().replace("c5", "c6")))
    content = mine.read_bytes()  # other rows would be the test's
    mine.write_bytes(content.partition(b"\n")[2])
    assert "made from another data" in fails(capsys, "eval", out)
    mine.write_bytes(content)
    content = (base / "config.json").read_bytes()
    (base / "config.json").write_bytes(content + b" ")
    assert "made from another base" in fails(capsys, "eval", out)
    (base / "config.json").write_bytes(content)
    refused("base", base / "tokenizer_config.json", lambda p: p.write_text(p.read_text() + " "))
    other = decoder.load_model(base)
    other.model.norm.weight.data.add_(0.1)
    refused("base", base / "model.safetensors", lambda p: decoder.save_model(other, tmp_path / "b")
            or shutil.copy(tmp_path / "b" / "model.safetensors", p))  # fmt: skip
    rows[0]["label"] = "S2"
    refused("data", mine, lambda p: data.write_jsonl(p, rows))
    scores = load_file(out / "importance.safetensors")
    swapped = scores | {"s1": scores["s2"], "s2": scores["s1"]}
    refused("mask", out / "importance.safetensors", lambda p: train.write_tensors(p, swapped))
    torn = (out / "answers" / "rl.jsonl").read_bytes()
    for left in (torn[:-9], torn.rpartition(b"\n{")[0], b""):  # torn, one answer lost, all
        (out / "answers" / "rl.jsonl").write_bytes(left)
        assert "delete it to ask again" in fails(capsys, *flags)
    (out / "answers" / "rl.jsonl").write_bytes(torn)
    shutil.rmtree(out / "rl")  # another reward is another RL, the rest stays
    (tmp_path / "reward.py").write_text(REWARD + "\n")
    train.main(flags)
    shutil.rmtree(out / "sft")
    error = fails(capsys, *flags, "--sft-lr", "0.1")
    assert "rl/state.safetensors was made from another start" in error
    assert not (out / "report.json").exists()  # it would tell of the old first stage
    (out / "config.json").unlink()
    assert "no config.json: name another --out" in fails(capsys, *flags)


@pytest.mark.parametrize("module, name", [(train, "answer_all"), (lorapar, "importance")])
def test_a_run_folder_that_vanishes_is_not_made_again(
    module, name, toy_run, tmp_path, monkeypatch, capsys
):
    out, real = borrow(toy_run, tmp_path / "out"), getattr(module, name)

    def vanish(*arguments):
        shutil.rmtree(out, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(module, name, vanish)
    assert "No such file" in fails(capsys, *QUICK, "--out", out)
    assert not out.exists()


def test_a_lost_base_is_not_replaced_by_another(toy_run, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(toy_run, tmp_path / "out")
    (out / "base" / "model.safetensors").unlink()
    monkeypatch.setitem(train.TOY_BASE, "steps", 2)
    assert "was made from another base" in fails(capsys, *QUICK, "--out", out)


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(toy_run, tmp_path, monkeypatch):
    out = borrow(toy_run, tmp_path / "run")
    script = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({200_000}, {200_000}))\n"
    script += f"import train; train.main({[*QUICK, '--out', str(out)]!r})"
    done = python("-c", script)
    assert done.returncode == 2 and "File too large: '" in done.stderr.splitlines()[-1]
    train.main([*QUICK, "--out", str(out)])
    assert not list(out.rglob("*.tmp"))
    report, good = out / "report.json", (out / "report.json").read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "full")))
    refuses("report.json", lorapar.write_file, report, b"new", error=OSError)
    assert report.read_bytes() == good


COUNTING = """
import json, os, sys
import torch, torch.distributed as dist
import grpo, lorapar, train
rows, sent, folder = {"sft": 0, "rl": 0}, 0, sys.argv.pop(1)
train.TOY_BASE["steps"] = 30
real_sum, real_logprobs = dist.all_reduce, train.token_logprobs

def counted_sum(tensor, *rest):
    global sent
    sent += tensor.nbytes
    return real_sum(tensor, *rest)

def counting(stage):
    def call(model, tokens, *rest):
        rows[stage] += len(tokens) * torch.is_grad_enabled()
        return real_logprobs(model, tokens, *rest)
    return call

dist.all_reduce = counted_sum
train.token_logprobs, grpo.token_logprobs = counting("sft"), counting("rl")
train.main(sys.argv[1:])
with open(f"{folder}/{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(rows | {"bytes": sent}, file)
"""


def test_two_processes_compute_what_one_computes(tmp_path):
    """Importance, SFT, sampled tokens and update to float32 rounding; half of the rows each. One
    of them makes the toy's base."""
    (tmp_path / "count.py").write_text(COUNTING)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    counts = {}
    for n in (1, 2):
        out, folder = tmp_path / f"run{n}", tmp_path / f"counts{n}"
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
        command += ["--standalone", str(tmp_path / "count.py"), str(folder), *QUICK]
        done = subprocess.run(
            [*command, "--out", str(out)], env=environment, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        counts[n] = [read(folder / f"{rank}.json") for rank in range(n)]
    one, two = tmp_path / "run1", tmp_path / "run2"
    for name in ("s1", "s2", "start"):
        a, b = (load_file(out / "importance.safetensors")[name] for out in (one, two))
        close(a, b, 1e-5)
    for stage in ("sft", "rl"):
        a, b = (load_file(out / stage / "state.safetensors")["flat"] for out in (one, two))
        close(a, b, 1e-3)
    texts = [(out / "rl" / "samples.jsonl").read_text() for out in (one, two)]
    assert texts[0] == texts[1]
    for ours, theirs in zip(metrics(two, "rl"), metrics(one, "rl")):
        assert ours["reward"] == theirs["reward"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-5)
    base_rows = 30 * 96
    for stage in ("sft", "rl"):
        rows = [rank[stage] for rank in counts[2]]
        alone = counts[1][0][stage]
        if stage == "sft":
            rows[0], alone = rows[0] - base_rows, alone - base_rows
        assert sum(rows) == alone and abs(rows[0] - rows[1]) <= len(metrics(one, stage))
    report = read(two / "report.json")["partition"]
    steps = {stage: len(metrics(two, stage)) for stage in ("sft", "rl")}
    gradients = 4 * sum(report["active"][stage] * n for stage, n in steps.items())
    scores = 2 * 2 * 8 * report["elements"]  # g and F of two systems, in float64
    assert counts[1][0]["bytes"] == 0
    few = 100 * sum(steps.values())
    assert 0 <= counts[2][0]["bytes"] - gradients - scores < few


def test_processes_must_agree_share_the_cores_and_run_no_other_command(
    toy_run, tmp_path, monkeypatch, capsys
):
    c = train.read_config([*QUICK, "--out", str(borrow(toy_run, tmp_path / "run"))])
    model, _ = train.prepare(c)
    train.add_adapters(c, model)
    optimizer = lorapar.MaskedAdamW(model)
    stage = (c, "sft", model, optimizer, 3)
    assert train.load_state(*stage) == 0
    with monkeypatch.context() as patch:  # the other one would begin with step 2
        patch.setattr(grpo, "gather_over_ranks", lambda own: [*own, (own[0][0], 2)])
        refuses("do not have the same start, mask and step", train.load_state, *stage)

    def thread():
        time.sleep(0.01)
        return threading.get_ident()

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert len(set(data.in_parallel(thread, [()] * 9))) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "eval runs in one process" in fails(capsys, "eval", toy_run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-3), ("bfloat16", 0.05)])
def test_the_whole_program_on_cuda(dtype, limit, toy_run, tmp_path):
    """Load, importance, both stages, evaluation and resume on a tenth of the toy."""
    flags, out = f"--device cuda --dtype {dtype} --train-examples 180".split(), tmp_path / "run"
    report = another_run(toy_run, out, *flags)
    assert all(math.isfinite(row["all"]["loss"]) for row in report["evaluation"].values())
    assert all(r["gap"] < limit for r in metrics(out, "rl"))
    adapter = out / "rl" / "adapter_model.safetensors"
    adapter.unlink()
    train.main([*QUICK, *flags, "--out", str(out)])
    assert adapter.exists()
    here, there = (decoder.load_model(toy_run / "base", device) for device in ("cpu", "cuda"))
    tokens = torch.arange(12)[None]
    assert (there(tokens.cuda()).cpu() - here(tokens)).abs().max() < 1
    model = lora_model()
    optimizer = lorapar.MaskedAdamW(model)
    for x in (tokens, tokens.cuda()):  # a Trainer moves the model after its optimizer was made
        model.to(x.device)(x).sum().backward()
        optimizer.step()
    assert optimizer.packed.is_cuda


def test_readmes_snippet_runs_and_its_names_and_flags_are_the_codes(tmp_path, monkeypatch):
    """Each [`name`](file.py) of the README is defined in that file; commands name real flags."""
    text = (HERE / "README.md").read_text()
    starts, masks = [], []

    def loss(model, tokens, labels):
        starts.append(lorapar.get_flat(model))
        masks.append(lorapar.get_mask(model))
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())

    names = vars(lorapar) | {"model": Foreign(), "s1_batches": [answer_batch()], "loss": loss}
    names |= {"s2_batches": [answer_batch(seed=1)]}
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("v_proj", "head")
    exec(snippet, names)
    model = names["model"]
    moved = lorapar.get_flat(model) != starts[0]
    assert moved.any() and not moved[~masks[0]].any()
    assert not torch.equal(lorapar.get_mask(model), masks[0])  # stage 2's
    assert lorapar.load_adapter(Foreign(), tmp_path / "adapter")
    assert read(tmp_path / "adapter/adapter_config.json")["task_type"] is None  # for PEFT

    code = {file.name: file.read_text() for file in HERE.glob("*.py") if file != Path(__file__)}
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", text)
    assert len(links) >= 8
    for name, file in links:
        assert re.search(rf"^(?:def|class) {name}\b|^{name} = ", code[file], re.M), name
    known = {train.option(name) for name in train.defaults()}
    for source in code.values():
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    known |= {"--shuffle", "--help", "--seeds"}
    theirs = {"--model_args", "--tasks", "--max-lora-rank", "--nproc"}
    assert used <= known | theirs, used - known


# ------------------------------------------------------------------------------------------- bench

SHAPES = {  # the first seven fields of ModelConfig: vocabulary, hidden, ffn, layers, heads ..
    "58m": (32000, 512, 1376, 8, 8, 8, 64),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 128),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128),
}


def random_model(shape, device, dtype):
    kind = "qwen2" if shape.startswith("qwen") else "llama"
    config = decoder.ModelConfig(*SHAPES[shape], model_type=kind)
    with torch.device("meta"):
        model = decoder.Transformer(config)
    model.to(dtype).to_empty(device=device).requires_grad_(False)
    model.model.inv_freq = decoder.rope_frequencies(config)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim == 2 else p.fill_(1.0)
    return model.eval()


def in_turns(works: dict, device, rounds=5) -> dict:
    """Median seconds of each work, the works in turns, after one call of each to warm up."""
    times = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def soak(arguments):
    """python test_lorapar.py soak 100: kills so often, a run first at a file event, then by time,
    and says in which phase each kill fell and how many runs ended bit-identical."""
    import tempfile

    wanted, phases, runs, identical = int(arguments[0]), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        run = start(Path(folder) / "whole")
        run.communicate()
        whole = outcome(Path(folder) / "whole")
        while sum(phases.values()) < wanted:
            out = Path(folder) / str(runs)
            fell, different = kill_and_go_on(out, whole, random.Random(runs), 8)
            phases.update(fell)
            runs, identical = runs + 1, identical + (not different)
            print(f"{sum(phases.values())} kills, {identical} of {runs} runs identical", different)
            shutil.rmtree(out)
    print(", ".join(f"{phase} {n}" for phase, n in phases.most_common()))


def bench(arguments):
    """What a shape costs on this device: SFT step, GRPO update, generation, importance, partition.
    Beside it PEFT and transformers where they are installed, else plain PyTorch (importance beside
    a plain forward and backward always); for a 7B shape the device's own matmul and copy rates."""
    parser = argparse.ArgumentParser("test_lorapar.py bench", description=bench.__doc__)
    parser.add_argument("--shape", default="58m", choices=SHAPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=256, help="a row's, half of them answer")
    parser.add_argument("--batch", type=int, default=8, help="rows of an SFT step")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args(arguments)
    device, T = args.device, args.tokens
    dtype = torch.bfloat16 if device != "cpu" or "7b" in args.shape else torch.float32
    threads = torch.get_num_threads()
    print(f"{args.shape}, {dtype}, {device}, {threads} threads, torch {torch.__version__}")
    torch.manual_seed(0)
    model = lorapar.add_lora(random_model(args.shape, device, dtype), r=8)
    tokens = torch.randint(model.config.vocab_size, (args.batch, T), device=device)
    labels = tokens.clone()
    labels[:, : T // 2] = -100
    encoded = [data.Encoded(row, T // 2) for row in tokens.tolist()]
    optimizer = lorapar.MaskedAdamW(model, lr=1e-5)

    def sft_step():
        train.backward(model, encoded, len(encoded), args.batch, device)
        optimizer.step()
        optimizer.zero_grad()

    def plain_pass():
        logits = model(tokens[:2, :-1]).float()
        F.cross_entropy(logits.flatten(0, 1), labels[:2, 1:].flatten()).backward()

    def score():
        lorapar.importance(model, [(tokens[:2], labels[:2])])

    prompts, few = [e.ids[: T // 2] for e in encoded] * 4, [e.ids[: T // 2] for e in encoded[:4]]
    settings = grpo.Settings(group=8, max_new_tokens=args.new_tokens, eos_ids=(), batch_rows=64)
    rollouts = grpo.sample_rollouts(model, few, settings)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = 1.0 if i % 2 else -1.0
    reference = lorapar.get_flat(model)

    def ours(prompts, samples):
        with lorapar.cached_factors(model):
            decoder.generate(model, prompts, args.new_tokens, samples_per_prompt=samples)

    scores = torch.rand(2, len(reference)) ** 4
    works = {
        "SFT step": {"ours": sft_step},
        "GRPO update with KL": {
            "ours": lambda: grpo.grpo_update(model, optimizer, rollouts, reference, settings)
        },
        f"generate {len(prompts)} x 1": {"ours": lambda: ours(prompts, 1)},
        "generate 4 x 8": {"ours": lambda: ours(few, 8)},
        "importance": {"ours": score, "a plain pass": plain_pass},
        f"partition of {len(reference):,}": {"ours": lambda: lorapar.partition(*scores, 0.9)},
    }
    add_peers(works, args, model, tokens, labels, prompts, few)
    if "7b" in args.shape:
        add_rates(works, device, dtype)
    for what, each in works.items():
        seconds = in_turns(each, device, 5 if args.shape == "58m" else 2)
        line = f"{what:24s} {seconds['ours']:9.3f} s"
        for peer, other in seconds.items():
            if peer != "ours":
                line += f"   {peer} {other:.3f} s, ratio {other / seconds['ours']:.2f}"
        print(line)
    peak = peak_memory()
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated(device)
    print(f"peak memory {peak / 1e9:.1f} GB, peers included")


def add_peers(works, args, model, tokens, labels, prompts, few):
    """PEFT and transformers on the same shape, where they are installed."""
    try:
        import peft
        import transformers
    except ImportError:
        print("PEFT and transformers are not installed: no peers but plain PyTorch")
        return
    c = model.config
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[c.model_type]
    sizes = {name: getattr(c, name) for name in SMALL} | {"head_dim": c.head_dim}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device(args.device):
        theirs = getattr(transformers, f"{kind}ForCausalLM")._from_config(
            config, dtype=model.head_weight.dtype
        )
    lora = peft.LoraConfig(r=8, lora_alpha=64, target_modules=list(lorapar.QKVGUD))
    theirs = peft.get_peft_model(theirs, lora)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-5)

    def sft_step():
        theirs(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def generate(prompts, samples):
        theirs.generate(
            input_ids=torch.tensor(prompts, device=args.device),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), device=args.device),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=True,
            top_k=0,
            num_return_sequences=samples,
            pad_token_id=0,
        )

    works["SFT step"]["PEFT"] = sft_step
    works[f"generate {len(prompts)} x 1"]["transformers"] = lambda: generate(prompts, 1)
    works["generate 4 x 8"]["transformers"] = lambda: generate(few, 8)


def add_rates(works, device, dtype):
    """What the device itself can do."""
    n = 8192 if device != "cpu" else 2048
    square = torch.randn(n, n, device=device, dtype=dtype)
    source, target = torch.zeros(2, 2**30, dtype=torch.uint8, device=device)
    flops = 2 * n**3 / in_turns({"ours": lambda: square @ square}, device)["ours"]
    copied = 2 * len(source) / in_turns({"ours": lambda: target.copy_(source)}, device)["ours"]
    print(f"matrix product {flops / 1e12:.2f} TFLOP/s, copy {copied / 1e9:.0f} GB/s")


if __name__ == "__main__":
    commands = {"bench": bench, "soak": soak}
    if sys.argv[1:2] and sys.argv[1] in commands:
        commands[sys.argv[1]](sys.argv[2:])
    else:
        sys.exit("python test_lorapar.py bench | soak N; the tests: python -m pytest -q")
