"""Everything about text: tokenizer, data sets, teachers' votes, tokenised batches, checked answers.

One example's way: `load_dataset` reads it, `vote` (or a labels file) calls it S1 or S2, `tokenize`
makes (tokens, labels) with the prompt masked out of the loss, `is_correct` and `reward_parts` judge
what a model answered. Two commands serve the sample splitter:

    python data.py prompts --data gsm8k --data-path DIR --target "LLaMA2 7B" --teachers A,B --out R
    python data.py vote answers/*.jsonl --out labels.jsonl

The toy world (facts for System 1, a string machine for System 2) is made at the end of the file.
Left out: calling teachers. The requests are in the batch format that services and vLLM take.
"""

import argparse
import ast
import builtins
import csv
import ctypes
import gzip
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

# torch is imported where batches are made: the sandbox starts this file twice for every answer.

# -------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """A checkpoint's tokenizer: `tokenizer.json` (tokenizers) or `tokenizer.model` (sentencepiece).

    bos_id: the token the model wants in front, None if it wants none. eos_ids: every token that
    ends an answer, the one that SFT trains first. pad_id: any id, nothing here reads padding.
    """

    def __init__(self, path):
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such model folder")
        settings = _json_file(folder / "special_tokens_map.json")
        settings |= {
            k: v for k, v in _json_file(folder / "tokenizer_config.json").items() if v is not None
        }
        model = _json_file(folder / "config.json") | _json_file(folder / "generation_config.json")
        if (folder / "tokenizer.json").exists():
            import tokenizers

            try:
                self._bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{folder}/tokenizer.json: {error}") from None
            self.bos_id, eos = (
                self._special(settings, name) for name in ("bos_token", "eos_token")
            )
            self.pad_id = self._special(settings, "pad_token")
            first = self._bpe.encode("x", add_special_tokens=True).ids[:1]
            wants_bos = settings.get("add_bos_token", first == [self.bos_id])
        elif (folder / "tokenizer.model").exists():
            import sentencepiece

            self._bpe = None
            try:
                self._pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{folder}/tokenizer.model: {error}") from None
            self.bos_id, eos = self._pieces.bos_id(), self._pieces.eos_id()
            self.pad_id = None
            wants_bos = settings.get("add_bos_token", True)
        else:
            raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model")
        if not wants_bos:
            self.bos_id = None
        listed = model.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        self.eos_ids = tuple(dict.fromkeys(i for i in [eos, *listed] if i is not None))
        if not self.eos_ids:
            raise ValueError(
                f"{folder}: no file there names an EOS token, so answers could not end"
            )
        if self.pad_id is None:
            self.pad_id = self.eos_ids[0]
        self._template = settings.get("chat_template")
        if isinstance(self._template, list):  # several named templates
            self._template = {t["name"]: t["template"] for t in self._template}.get("default")
        if (folder / "chat_template.jinja").exists():
            self._template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._words = {n: self._content(settings, n) or "" for n in ("bos_token", "eos_token")}
        self._folder = folder

    @staticmethod
    def _content(settings, name):
        token = settings.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _special(self, settings, name):
        token = self._content(settings, name)
        return None if token is None else self._bpe.token_to_id(token)

    def encode(self, text: str, bos=False, eos=False) -> list[int]:
        """Token ids; bos=True puts the BOS in front where the model wants one."""
        if self._bpe is not None:
            ids = self._bpe.encode(text, add_special_tokens=False).ids
        else:
            ids = self._pieces.encode(text)
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return front + ids + ([self.eos_ids[0]] if eos else [])

    def chat(self, messages: list[dict]) -> str:
        """The checkpoint's chat template, rendered up to where the assistant begins, in jinja2's
        sandbox as the ecosystem does. ValueError if there is no template, or it refuses."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self._template:
            raise ValueError(f"{self._folder}: the tokenizer has no chat template: --prompt plain")

        def refuse(message):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = time.strftime
        environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        try:
            template = environment.from_string(self._template)
            text = template.render(messages=messages, add_generation_prompt=True, **self._words)
        except TemplateError as error:
            raise ValueError(f"{self._folder}: the chat template fails: {error}") from None
        # encode(bos=True) adds the BOS as an id; sentencepiece would read its text as letters
        return text if self.bos_id is None else text.removeprefix(self._words["bos_token"])

    def decode(self, ids) -> str:
        """Text, special tokens included; the EOS that ended an answer is left out."""
        ids = list(ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        if self._bpe is not None:
            return self._bpe.decode(ids, skip_special_tokens=False)
        return self._pieces.decode(ids)


def _json_file(path) -> dict:
    """A JSON object, {} if the file is not there; ValueError if it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def read_jsonl(path):
    """Yields (line number, object) of a jsonl file; ValueError names the file and the line."""
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
                    if not isinstance(record, dict):
                        raise ValueError(f"{path}:{number}: not a JSON object")
                    yield number, record
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable ({error})") from None


def read_records(path):
    """Yields (number, object) of a jsonl file or of a json array, by the file's name."""
    if not str(path).endswith(".json"):
        yield from read_jsonl(path)
        return
    records = _json_file(path)
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ValueError(f"{path}: not a JSON array of objects")
    yield from enumerate(records, 1)


def write_jsonl(path, records):
    """Writes under a temporary name and renames: a run that dies leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(temporary, path)


# -------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Example:
    """One question. `answer` is what SFT trains on; `gold` what a reply is checked against."""

    id: str
    question: str
    answer: str
    kind: str  # how a reply is checked: "number", "letter", "code", "toy", or "text" (not at all)
    gold: str = ""
    label: str | None = None  # "S1" or "S2"
    entry: str = ""  # code: the name of the function that `gold` tests
    context: str = ""  # solved examples that stand before the question (MMLU: five)


PROMPTS = ("plain", "chat", "authors")
FORMAT = """\
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""


def prompt_and_answer(example: Example, tokenizer, style: str = "plain", stage: str = "rl"):
    """The words every stage asks in, and the answer SFT trains on: (prompt, answer) texts.

    "plain": the question and a new line (none after code and after "Answer:"). "chat": the question
    in the checkpoint's own template. "authors": as their script, in stage "sft" the bare question
    and a solution that ends in #### n, elsewhere a system prompt that asks for the tags.
    """
    question, answer = example.context + example.question, example.answer
    if style == "chat":
        if example.kind == "code":
            question = f"Complete this Python function.\n```python\n{question}```"
        return tokenizer.chat([{"role": "user", "content": question}]), answer.strip()
    if example.kind in ("code", "letter"):
        return question, answer
    if style == "authors" and stage == "sft":
        if example.kind == "number":
            reasoning = answer.partition("<reasoning>\n")[2].partition("\n</reasoning>")[0]
            answer = f"{reasoning}\n#### {example.gold}"
        return question, answer
    return (f"{FORMAT}\n{question}\n" if style == "authors" else question + "\n"), answer


def example_ids(example: Example, tokenizer, style: str = "plain", stage: str = "rl"):
    """-> prompt ids, answer ids with EOS. They are the tokens of the joined text where that can be
    cut at the prompt's end (no space or merge then differs from what a model has read), else of
    the two texts; the authors' SFT puts an EOS between them."""
    prompt, answer = prompt_and_answer(example, tokenizer, style, stage)
    start = tokenizer.encode(prompt, bos=True)
    if style == "authors" and stage == "sft":
        return start + [tokenizer.eos_ids[0]], tokenizer.encode(answer, eos=True)
    whole = tokenizer.encode(prompt + answer, bos=True, eos=True)
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    return start, tokenizer.encode(answer, eos=True)


def _gsm8k(path, split):
    """https://github.com/openai/grade-school-math: {train,test}.jsonl with question, answer."""
    for number, record in read_jsonl(path / f"{split}.jsonl"):
        try:
            solution, gold = record["answer"].split("####")
            yield Example(
                id=f"gsm8k/{split}/{number - 1}",
                question=record["question"].strip(),
                answer=f"<reasoning>\n{solution.strip()}\n</reasoning>\n"
                f"<answer>\n{gold.strip()}\n</answer>",
                kind="number",
                gold=gold.strip(),
            )
        except (KeyError, ValueError, AttributeError):
            where = f"{path / split}.jsonl:{number}"
            raise ValueError(f"{where}: not a question and an answer with one ####") from None


def _mmlu(path, split):
    """https://github.com/hendrycks/test: {dev,val,test}/SUBJECT_*.csv without header, the question,
    four choices and the letter; asked after the subject's five dev examples."""
    folder = path / {"train": "dev", "validation": "val", "test": "test"}[split]
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"{folder}: no csv files")
    for file in files:
        subject = file.stem.rpartition("_")[0]
        shots = path / "dev" / f"{subject}_dev.csv"
        context = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        context = context.replace("_", " ")
        if split != "train" and shots.exists():
            for question, letter in _mmlu_rows(shots):
                context += f"{question} {letter}\n\n"
        for number, (question, letter) in enumerate(_mmlu_rows(file)):
            yield Example(
                id=f"mmlu/{file.stem}/{number}",
                question=question,
                answer=f" {letter}",
                kind="letter",
                gold=letter,
                context=context,
            )


def _mmlu_rows(file):
    with open(file, encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):  # "None" stays a string here
            if len(row) != 6 or row[5] not in list("ABCD"):
                raise ValueError(f"{file}:{number}: not question, four choices and a letter")
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5]))
            yield f"{row[0].strip()}\n{choices}\nAnswer:", row[5]


def _humaneval(path, split):
    """https://github.com/openai/human-eval: HumanEval.jsonl.gz; it has a test split only."""
    for number, r in read_jsonl(path / "HumanEval.jsonl.gz"):
        try:
            yield Example(
                id=r["task_id"],
                question=r["prompt"],
                answer=r["canonical_solution"],
                kind="code",
                gold=r["test"],
                entry=r["entry_point"],
            )
        except KeyError as missing:
            raise ValueError(f"{path}/HumanEval.jsonl.gz:{number}: no field {missing}") from None


def _instructions(name, question, more, answer):
    """A reader of instruction sets (json or jsonl); their answers cannot be checked."""

    def read(path, split):
        if path.is_dir():
            files = [
                f for pattern in ("*.jsonl", "*.json", "*.jsonl.gz") for f in path.glob(pattern)
            ]
            if len(files) != 1:
                raise ValueError(f"{path}: {len(files)} json or jsonl files there; name one")
            path = files[0]
        for number, r in read_records(path):
            try:
                parts = [r[question], r.get(more) or ""]
                text = "\n\n".join(part.strip() for part in parts if part.strip())
                yield Example(f"{name}/{number - 1}", text, r[answer], "text")
            except (KeyError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: no text in the field {error}") from None

    return read


def _toy(path, split):
    """The toy world that `make_toy` wrote: {train,validation,test}.jsonl."""
    for number, r in read_jsonl(path / f"{split}.jsonl"):
        try:
            label = None if split == "train" else r["system"]  # training labels come from votes
            yield Example(r["id"], r["question"], r["answer"], "toy", r["answer"], label)
        except KeyError as missing:
            raise ValueError(f"{path / split}.jsonl:{number}: no field {missing}") from None


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, who reads its files, and what of it can be checked."""

    read: object  # (path, split) -> examples
    splits: str
    checked: str  # "numbers", "letters", "code", "strings", or "" for not at all
    home: str
    hub: tuple = ()  # (dataset repository, file) where the publisher keeps plain json on the Hub


DATASETS = {
    "toy": Source(_toy, "train validation test", "strings", "made by make_toy"),
    "gsm8k": Source(_gsm8k, "train test", "numbers", "github.com/openai/grade-school-math"),
    "mmlu": Source(_mmlu, "train validation test", "letters", "github.com/hendrycks/test"),
    "humaneval": Source(_humaneval, "test", "code", "github.com/openai/human-eval"),
    "dolly": Source(
        _instructions("dolly", "instruction", "context", "response"),
        "train",
        "",
        "huggingface.co/datasets/databricks/databricks-dolly-15k",
        ("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"),
    ),
    "platypus": Source(
        _instructions("platypus", "instruction", "input", "output"),
        "train",
        "",
        "huggingface.co/datasets/garage-bAInd/Open-Platypus (parquet: save it as jsonl)",
    ),
    "codealpaca": Source(
        _instructions("codealpaca", "instruction", "input", "output"),
        "train",
        "",
        "huggingface.co/datasets/sahil2801/CodeAlpaca-20k",
        ("sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json"),
    ),
    "codefeedback": Source(
        _instructions("codefeedback", "query", "", "answer"),
        "train",
        "",
        "huggingface.co/datasets/m-a-p/CodeFeedback-Filtered-Instruction",
        ("m-a-p/CodeFeedback-Filtered-Instruction", "CodeFeedback-Filtered-Instruction.jsonl"),
    ),
}
VALIDATION, VALIDATION_SEED = 0.05, 0  # the share of train that validates, and its fixed seed


def find_dataset(name: str, path):
    """The data set's files: `path` as it is, or, without one, the publisher's file from the Hub."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; one of {', '.join(DATASETS)}")
    source = DATASETS[name]
    if path is not None:
        if not Path(path).exists():
            raise ValueError(f"{name}: nothing at {path}; its home is {source.home}")
        return Path(path)
    if not source.hub:
        raise ValueError(f"{name}: --data-path is missing; its home is {source.home}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*source.hub, repo_type="dataset"))
    except Exception as error:  # network, access and name errors of several libraries
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}: not to be had from the Hub ({reason}); --data-path") from None


def load_dataset(name: str, path, split: str) -> list[Example]:
    """The examples of `split` ("train", "validation" or "test") in the publisher's order.

    Where the publisher has no validation split it is 5% of train, drawn with a fixed seed, so the
    three never overlap. ValueError names an unknown set, a missing file or a bad line.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; train, validation or test")
    path, source = find_dataset(name, path), DATASETS[name]
    splits = source.splits.split()
    if split in splits and (split != "train" or "validation" in splits):
        return list(source.read(path, split))
    if "train" not in splits or split == "test":
        raise ValueError(f"{name} has no {split} split; name another data set for this")
    examples = list(source.read(path, "train"))
    indices = range(len(examples))
    held_out = set(random.Random(VALIDATION_SEED).sample(indices, int(VALIDATION * len(indices))))
    return [e for i, e in enumerate(examples) if (i in held_out) == (split == "validation")]


# ----------------------------------------------------------------- the paper's sample splitter

ROLEPLAY = """\
You are now {target}, a language model of that size and training. Keep its knowledge, its habits \
and its limits: think as {target} would think, not as the model that you really are.

You will read a question and its answer. Reason concisely, step by step, as {target} would, about \
how {target} would get from the question to this answer, and decide which kind of thinking it takes:

- System1: fast and direct. {target} recalls the answer at once, reads it off the text, or gets it \
by one simple inference.
- System2: slow and deliberate. {target} needs several logical steps, has to chain pieces of \
information together, or makes a complex inference.

Question:
{question}

Answer:
{answer}

End your reply with one word alone on the last line: System1 or System2."""

PLAIN = """\
Classify the question below by the thinking that answers it. System1: immediate recall, reading \
off the text or one simple inference. System2: several logical steps, chained information or a \
complex inference.

Question:
{question}

Answer:
{answer}

End your reply with one word alone on the last line: System1 or System2."""


def roleplay_prompt(example: Example, target_model: str, roleplay: bool = True) -> str:
    """What a teacher is asked (after the paper's figure 3, in our words); roleplay=False leaves out
    the part that asks it to act as the target model (the ablation of table 1)."""
    template = ROLEPLAY if roleplay else PLAIN
    fields = {"target": target_model, "question": example.question, "answer": example.answer}
    return re.sub(r"{(target|question|answer)}", lambda m: fields[m[1]], template)


def vote(labels: list[str]) -> str:
    """The majority of "S1" and "S2" verdicts; a tie is "S2": a hard question asked fast does more
    harm than an easy one thought over. ValueError without verdicts or on another word."""
    counts = Counter(labels)
    if not counts or set(counts) - {"S1", "S2"}:
        raise ValueError(f'vote needs "S1" and "S2" verdicts, got {labels}')
    return "S1" if counts["S1"] > counts["S2"] else "S2"


def verdict(text: str) -> str | None:
    """The system a teacher's free text names: on its last line if that names one alone, else in the
    whole text if it names one alone, else None (not guessed)."""
    text = (text or "").strip()
    for part in (text.rpartition("\n")[2], text):
        named = set(re.findall(r"\b(?:system|s)[\s_-]*([12])\b", part, flags=re.IGNORECASE))
        if len(named) == 1:
            return "S" + named.pop()
    return None


def read_answers(paths) -> dict[str, dict[str, str | None]]:
    """Teachers' batch answers, one file a teacher -> {custom_id: {teacher: verdict}}: "S1", "S2",
    None for a text without a clear one (a refusal), "error" where the service gave no text.

    Joined by custom_id, never by order. A body may be wrapped (response.body) or bare.
    """
    answers = {}
    for path in map(Path, paths):
        for number, record in read_jsonl(path):
            if not isinstance(record.get("custom_id"), str):
                raise ValueError(f"{path}:{number}: no custom_id")
            response = record.get("response")
            body = (response or {}).get("body") if "response" in record else record
            try:
                text = body["choices"][0]["message"]["content"]
            except (TypeError, KeyError, IndexError):
                text = None  # an error of the service
            votes = answers.setdefault(record["custom_id"], {})
            if path.stem in votes:
                raise ValueError(f"{path}:{number}: second answer for {record['custom_id']}")
            votes[path.stem] = "error" if text is None else verdict(text)
    return answers


def count_votes(answers, teachers: int):
    """All votes -> (labels records [{id, label, votes}], a report of counts).

    Unusable verdicts do not vote; an example without any usable one gets no label.
    """
    records, report = [], Counter({"S1": 0, "S2": 0})
    pairs = agreeing = 0
    for custom_id, by_teacher in answers.items():
        usable = [v for v in by_teacher.values() if v in ("S1", "S2")]
        given = list(by_teacher.values())
        report["refusals (no clear verdict)"] += given.count(None)
        report["errors"] += given.count("error")
        report["missing answers"] += teachers - len(by_teacher)
        n1, n2 = usable.count("S1"), usable.count("S2")
        pairs += len(usable) * (len(usable) - 1) // 2
        agreeing += (n1 * (n1 - 1) + n2 * (n2 - 1)) // 2
        if not usable:
            report["examples without a usable answer"] += 1
            continue
        report["ties (called S2)"] += n1 == n2
        label = vote(usable)
        report[label] += 1
        records.append({"id": custom_id, "label": label, "votes": by_teacher})
    report = dict(report)
    report["agreement of two teachers"] = round(agreeing / pairs, 4) if pairs else None
    return records, report


def label_examples(examples: list[Example], labels: str) -> list[Example]:
    """The examples that have a label, with it. labels: a labels.jsonl ({"id", "label"} a line), the
    authors' csv (columns question and _result, System1 or System2), or "steps:K": S1 where a GSM8K
    solution has at most K <<...>> calculations, else S2 (a stand-in for users without teacher
    answers, not the paper's method)."""
    if re.fullmatch(r"steps:\d+", labels):
        limit = int(labels[6:])
        return [replace(e, label="S1" if e.answer.count("<<") <= limit else "S2") for e in examples]
    known, key = {}, "question" if labels.endswith(".csv") else "id"
    for where, name, label in _label_records(labels, key):
        if label not in ("S1", "S2") or name is None:
            raise ValueError(f'{where}: needs "{key}" and a label of System 1 or System 2')
        known[name] = label
    return [replace(e, label=known[getattr(e, key)]) for e in examples if getattr(e, key) in known]


def _label_records(path, key):
    if key == "id":
        for number, record in read_jsonl(path):
            yield f"{path}:{number}", record.get("id"), record.get("label")
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines), 2):
                name = row.get("question")
                yield f"{path}:{number}", name and name.strip(), verdict(row.get("_result"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable ({error})") from None


# ---------------------------------------------------------------------------- tokens and batches


def tokenize(examples, tokenizer, max_length: int, style="plain", stage="sft"):
    """-> rows of (tokens, prompt length), and a report {"left out": prompts as long as max_length,
    "cut": answers cut at it}. A row always holds at least one answer token; EOS ends the answer
    unless it was cut."""
    rows, report = [], {"left out": 0, "cut": 0}
    for e in examples:
        prompt, answer = example_ids(e, tokenizer, style, stage)
        if len(prompt) >= max_length:
            report["left out"] += 1
            continue
        report["cut"] += len(prompt + answer) > max_length
        rows.append(((prompt + answer)[:max_length], len(prompt)))
    return rows, report


def collate(rows, device="cpu"):
    """rows of (tokens, prompt length) -> tokens, labels (B, T) int64, right padded; labels are -100
    on the prompt and on padding. The padding id is 0 and nobody reads it."""
    import torch

    T = max(len(tokens) for tokens, _ in rows)
    tokens = torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full((len(rows), T), -100)
    for i, (ids, prompt_length) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return tokens.to(device), labels.to(device)


def batches(rows, size: int, device="cpu"):
    """Collated batches of at most `size` rows of similar length (sorted: little padding)."""
    ordered = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    return [collate(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


# ------------------------------------------------------------------------- answers and rewards

NUMBER = r"[-+−]?\s*[$€£]?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d[\d,]*(?:\.\d+)?)?"


def parse_number(text: str):
    """The value of a text that is one number and nothing more, else None: 18, 18., $18, 1,000,
    -3.50, 3/4, 50%. Exact (Fraction): 18.00 equals 18. The sign may stand before the currency."""
    text = text.strip().removesuffix(".").strip().removesuffix("%").strip()
    if not re.fullmatch(NUMBER, text) or len(text) > 200:
        return None
    parts = re.sub(r"[\s,$€£]", "", text).replace("−", "-").split("/")
    try:
        top, bottom = Fraction(Decimal(parts[0])), Fraction(Decimal((parts + ["1"])[1]))
    except InvalidOperation:
        return None
    return top / bottom if bottom else None


def final_number(text: str):
    """The number a reply gives as its answer, or None. Where the reply marks its answer, only the
    marked text counts: the last <answer>...</answer>, else the number right after the last ####,
    else the last \\boxed{}. An unmarked reply counts by its last number."""
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return parse_number(tagged[-1])
    if "####" in text:
        found = re.match(rf"\s*({NUMBER})", text.rpartition("####")[2])
        return parse_number(found[1]) if found else None
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    if boxed:
        return parse_number(boxed[-1].replace("\\$", "$").replace("\\%", "%"))
    numbers = re.findall(rf"(?<![\w.]){NUMBER}(?![\w])", text)
    return parse_number(numbers[-1]) if numbers else None


def is_correct(example: Example, completion: str, allow_network=False) -> bool:
    """Does the reply give the right answer? Numbers are compared as numbers, letters as letters,
    code by running the problem's tests in a sandbox (allow_network: see passes_tests), the toy's
    strings exactly. ValueError for a set whose answers cannot be checked."""
    if example.kind == "number":
        value = final_number(completion)
        return value is not None and value == parse_number(example.gold)
    if example.kind == "letter":
        letter = re.match(r"\s*\(?([A-D])(?![A-Za-z])", completion)
        return letter is not None and letter[1] == example.gold
    if example.kind == "code":
        return passes_tests(example, completion, allow_network)
    if example.kind == "toy":  # the last state of the string machine decides, spaces do not
        reply, gold = (t.rpartition(";")[2].split() for t in (completion, example.gold))
        return reply == gold
    raise ValueError(f"{example.id}: answers of this data set cannot be checked")


def reward_parts(example: Example, completion: str) -> dict[str, float]:
    """The parts of the GRPO reward; the reward is their sum.

    For numbers the authors' five, repaired where they punish good answers: 2.0 a correct
    <answer> (compared as numbers), 0.5 an integer in it, 0.5 the strict format, 0.5 the loose one,
    0.125 each tag that occurs once, less 0.001 a character after </answer>. For other kinds 1.0 if
    the reply is correct.
    """
    if example.kind != "number":
        return {"correct": float(is_correct(example, completion))}
    text = completion
    inside = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    value = parse_number(inside[-1]) if inside else None
    strict = r"\s*<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\s*"
    loose = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    tags = sum(text.count(t) == 1 for t in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    tail = text.rpartition("</answer>")[2].strip() if "</answer>" in text else ""
    return {
        "correct": 2.0 * (value is not None and value == parse_number(example.gold)),
        "integer": 0.5 * (value is not None and value.denominator == 1),
        "strict": 0.5 * bool(re.fullmatch(strict, text, flags=re.DOTALL)),
        "loose": 0.5 * bool(re.search(loose, text, flags=re.DOTALL)),
        "tags": 0.125 * tags - 0.001 * len(tail),
    }


# ---------------------------------------------------------------------------- running code safely

SECONDS = 10  # a candidate's wall clock and CPU; the verdict comes within SECONDS + 5
MEMORY, DISK, MESSAGE = 1 << 30, 64 << 20, 1 << 17  # bytes: address space, folder, one answer


class SandboxError(RuntimeError):
    """The sandbox itself cannot run: that is no verdict about an answer."""


def passes_tests(example: "Example", completion: str, allow_network=False) -> bool:
    """Does the code pass the problem's own tests? (HumanEval; Chen et al. 2021)

    Two processes. The judge runs the problem's tests, with the helpers of its prompt, and is
    trusted. The candidate's functions live in a second one; arguments and results cross between the
    two as the text of Python literals, exceptions by name, so no object, patched builtin or walked
    frame of the candidate is ever near the verdict. The candidate has no environment, no terminal,
    limits on time and memory, and a temporary folder of 64 MB that ends with it.

    Closed by the Linux kernel, without privileges, where it offers it: a seccomp filter ends a
    candidate that starts a process, opens a socket, signals or changes other processes or changes
    a file's mode, owner or times; namespaces take away the network, other processes and IPC, and
    give the folder; Landlock closes every file outside it but Python's library (which can be read).
    Where namespaces are missing the folder cannot be written. Where seccomp or Landlock is missing
    an audit hook ends the process instead; native code gets around that. If the network cannot be
    closed at all (not on Linux, say), candidates run only with allow_network=True. Not protected
    against: bugs of the kernel, side channels, learning that a file outside exists, and a candidate
    that recognises the test inputs and answers from memory.

    Raises SandboxError if the sandbox itself cannot run.
    """
    job = {"prompt": example.question, "tests": example.gold, "entry": example.entry}
    job |= {"completion": completion, "allow_network": allow_network}
    folder = tempfile.mkdtemp(prefix="candidate-")
    judge, out = None, b""
    try:
        judge = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), "judge", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        out, _ = judge.communicate(json.dumps(job).encode(), timeout=SECONDS + 5)
    except subprocess.TimeoutExpired:
        pass  # what the candidate gave made the tests themselves hang
    except OSError as error:
        raise SandboxError(f"the sandbox cannot start: {error}") from None
    finally:
        if judge is not None:
            try:
                os.killpg(judge.pid, signal.SIGKILL)  # the judge, and the candidate in its group
            except ProcessLookupError:
                pass
            out = out or judge.communicate()[0]
        shutil.rmtree(folder, ignore_errors=True)  # on the outside it is empty
    said = out.decode().split("\n")
    if said[0] != "ready":
        raise SandboxError(f"the sandbox cannot start: {said[0] or 'no word from the judge'}")
    return said[1:2] == ["passed"]


def program(prompt: str, completion: str, entry: str) -> str:
    """The candidate's source, from whatever form a model answers in: a body that continues the
    prompt (and then runs on), a whole function, or Markdown with fenced blocks around either."""
    blocks = re.findall(
        r"^[ \t]*(?:```|~~~)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", completion, flags=re.M | re.S
    )
    whole = [i for i, block in enumerate(blocks) if re.search(rf"^\s*def {entry}\b", block, re.M)]
    if whole:
        completion = "\n".join(textwrap.dedent(block) for block in blocks[: whole[-1] + 1])
    elif blocks and re.match(r"\s*(```|~~~)", completion):
        completion = blocks[0]
    completion = re.split(r"\n?^(?:```|~~~)|<\||</s>|\[/PYTHON\]", completion, flags=re.M)[0]
    body = completion.strip() and re.match(r"\s*\n?[ \t]", completion)
    if not body and re.search(rf"^(?:async )?def {entry}\b", completion, re.M):
        if not parses(completion.partition(f"def {entry}")[0]):  # prose stands before it
            code = r"^(?=import |from |def |async def |class |@|\w+ *=)"
            completion = re.split(code, completion, maxsplit=1, flags=re.M)[-1]
        first = r"^from __future__ .*\n"  # must be the first statement of a file
        future = "".join(re.findall(first, completion, flags=re.M))
        completion = re.sub(first, "", completion, flags=re.M)
        return future + longest_that_parses(prompt + "\n    pass\n\n" + completion)
    if not body:  # it lost its indent: all of it, or the first line alone
        indented = textwrap.indent(completion, "    ")
        completion = indented if parses(prompt + indented) else "    " + completion
    source = longest_that_parses(prompt + completion)
    if not parses(source):
        return source
    kept, defined = [], set()  # a base model runs on: keep helpers, not prints, tests, second tries
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if not isinstance(node, (ast.Expr, ast.Assert, ast.If, ast.For, ast.While)):
            if name != entry or name not in defined:
                kept.append(node)
            defined.add(name)
    return ast.unparse(ast.Module(kept, []))


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def longest_that_parses(source: str) -> str:
    """The source without what follows its first syntax error: prose, or an end cut off."""
    lines = source.split("\n")
    while lines:
        try:
            ast.parse("\n".join(lines))
            return "\n".join(lines)
        except SyntaxError as error:
            del lines[max(0, min(error.lineno or 1, len(lines)) - 1) :]
    return source


def literal(x) -> str:
    """Plain data as the text of a Python literal; TypeError for anything else. Subclasses cross
    as what they are underneath: a Counter as a dict, an IntEnum as an int."""
    if x is None or isinstance(x, bool):
        return repr(x)
    if isinstance(x, float):
        return float.__repr__(x).replace("inf", "1e999")
    for kind in (int, complex, bytes):
        if isinstance(x, kind):
            return kind.__repr__(x)
    if isinstance(x, str):
        return ascii(str.__str__(x))
    if isinstance(x, dict):
        return "{" + ",".join(f"{literal(k)}:{literal(v)}" for k, v in dict.items(x)) + "}"
    for kind, brackets in ((list, "[]"), (tuple, "()"), (set, "{}"), (frozenset, "{}")):
        if isinstance(x, kind):
            items = "".join(literal(item) + "," for item in kind.__iter__(x))
            empty = "set()" if brackets == "{}" else brackets
            return brackets[0] + items + brackets[1] if items else empty
    raise TypeError(f"{type(x).__name__} is not plain data")


def judge_main(folder):
    """The trusted process: prints "ready" (or why not), then "passed" or "failed"."""
    job = json.loads(sys.stdin.buffer.read())
    set_limit("RLIMIT_AS", 2 * MEMORY)
    candidate = subprocess.Popen(
        [sys.executable, "-I", os.path.abspath(__file__), "candidate", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )

    def ask(message):
        candidate.stdin.write(message.encode() + b"\n")
        candidate.stdin.flush()
        line = candidate.stdout.readline(MESSAGE)
        if not line.endswith(b"\n"):
            raise EOFError("the candidate has ended, or says too much")
        return ast.literal_eval(line.decode("ascii"))

    def call(*args, **kwargs):
        kind, value = ask(literal((args, kwargs)))
        if kind == "returned":
            return value
        error = getattr(builtins, str(value), None)
        known = isinstance(error, type) and issubclass(error, BaseException)
        if not known or issubclass(error, (StopIteration, StopAsyncIteration)):
            error = RuntimeError  # a StopIteration would end a loop of the tests
        raise error("raised by the candidate")

    passed, deadline = False, time.monotonic() + SECONDS
    threading.Timer(SECONDS, candidate.kill).start()
    try:
        started = ask(literal(job["allow_network"]))
        print("ready" if started == "ready" else started, flush=True)
        if ask(literal((job["prompt"], job["completion"], job["entry"]))) == "loaded":
            names = {"__name__": "tests"}
            exec(job["prompt"] + "\n    pass\n", names)  # helpers: HumanEval/32, 38, 50
            names[job["entry"]] = call  # HumanEval/33 calls the function by its name
            exec(job["tests"], names)
            names["check"](call)
            passed = time.monotonic() < deadline
    except BaseException:  # whatever the answers made of the tests: it is not a pass
        passed = False
    candidate.kill()
    candidate.wait()
    print("passed" if passed else "failed", flush=True)
    os._exit(0)


def candidate_main(folder):
    """The untrusted process: closes what it can around itself, then serves calls one a line."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # prints go nowhere

    def reply(value):
        os.write(answers, literal(value).encode("ascii") + b"\n")

    allow_network = ast.literal_eval(requests.readline().decode("ascii"))
    try:
        network_closed = confine(folder)
    except OSError as error:
        return reply(f"confinement failed: {error}")
    if not network_closed and not allow_network:
        return reply("this system cannot close the network to candidates: --allow-network goes on")
    reply("ready")
    prompt, completion, entry = ast.literal_eval(requests.readline().decode("ascii"))
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    try:
        source = program(prompt, completion, entry)
        exec(compile(source, "candidate", "exec"), module.__dict__)
        function = module.__dict__[entry]
        reply("loaded")
    except BaseException as error:
        return reply(type(error).__name__)
    for line in requests:
        args, kwargs = ast.literal_eval(line.decode("ascii"))
        try:
            message = literal(("returned", function(*args, **kwargs)))
        except BaseException as error:
            message = literal(("raised", type(error).__name__))
        os.write(answers, message.encode("ascii") + b"\n") if len(message) < MESSAGE else os._exit(
            1
        )


def set_limit(name, value):
    import resource

    resource.setrlimit(getattr(resource, name), (value, value))


def confine(folder) -> bool:
    """Closes what the system lets this process close around itself, for good. Returns whether the
    network is closed."""
    for name, value in (("CPU", SECONDS), ("AS", MEMORY), ("FSIZE", DISK), ("CORE", 0)):
        set_limit(f"RLIMIT_{name}", value)
    set_limit("RLIMIT_NOFILE", 32)
    if sys.platform != "linux":
        audit()
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    isolated, own_folder = namespaces(libc, folder)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities, also as root
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    landlocked = landlock(libc, folder, own_folder)
    filtered = seccomp(libc)
    if not (landlocked and filtered):
        audit()
    return isolated or filtered


def namespaces(libc, folder):
    """Moves this process (a child of it) into namespaces of its own: users, network, processes,
    IPC, mounts, with a small tmpfs as the folder. -> (isolated, the folder is that tmpfs)"""
    user, group = os.getuid(), os.getgid()
    # CLONE_NEWUSER | NEWNET | NEWPID | NEWIPC | NEWNS
    if libc.unshare(0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000):
        return False, False
    try:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1")):
            Path(f"/proc/self/{file}").write_text(text)
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        pass  # without a mapping the mount below fails, and the folder stays closed
    private, flags = 0x4000 | 0x40000, 0b1110  # MS_REC | MS_PRIVATE; NOSUID | NODEV | NOEXEC
    size = f"size={DISK},nr_inodes=1000,mode=700".encode()
    own_folder = libc.mount(b"none", b"/", None, private, None) == 0
    own_folder = own_folder and libc.mount(b"t", folder.encode(), b"tmpfs", flags, size) == 0
    child = os.fork()  # the first process of the new namespace
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    os.chdir(folder)
    return True, own_folder


def landlock(libc, folder, writable: bool) -> bool:
    """Files: the folder, reading Python's and the system's libraries, nothing else. From ABI 4 no
    TCP, from ABI 6 no signals to processes outside."""
    abi = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset(VERSION)
    if abi < 1:
        return False
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = libc.syscall(444, attributes, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    read = 0b1101  # execute, read files, list folders
    places = dict.fromkeys(
        ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"], read
    )
    places |= {place: read for place in sys.path if os.path.isdir(place)}
    places |= {"/dev/null": 0b110, "/dev/urandom": 0b100, folder: rights if writable else read}
    for place, allowed in places.items():
        if os.path.exists(place):
            handle = os.open(place, os.O_PATH)
            rule = struct.pack("=Qi", allowed & rights, handle)
            if libc.syscall(445, ruleset, 1, rule, 0):  # landlock_add_rule(PATH_BENEATH)
                return False
            os.close(handle)
    done = libc.syscall(446, ruleset, 0) == 0  # landlock_restrict_self
    os.close(ruleset)
    return done


# The system calls that end a candidate, by the architecture's numbers: new processes and programs;
# sockets; signals; other processes' memory; sessions, groups and priorities; mode, owner, times and
# attributes of files; memory, keys and queues outside the limits; watches; namespaces and mounts.
FORBIDDEN = {
    "x86_64": "57 58 59 322 41 53 62 200 234 129 297 101 310 311 312 112 109 141 142 144 203 314 "
    "251 90 91 268 92 93 94 260 132 235 261 280 188 189 190 197 198 199 319 29 68 64 240 "
    "248 249 250 323 321 298 253 294 300 272 308 165 166 155 161",
    "aarch64": "221 281 198 199 129 130 131 138 240 117 270 271 272 157 154 140 118 119 122 274 30 "
    "52 53 54 55 88 5 6 7 14 15 16 279 194 186 190 180 217 218 219 282 280 241 26 262 97 "
    "268 40 39 41 51",
}
EVERYWHERE = "424 425 428 429 430 434 438 440 442 447 448 452 463 466"
# architecture: its audit name, clone, prctl, prlimit64
CALLS = {"x86_64": (0xC000003E, 56, 157, 302), "aarch64": (0xC00000B7, 220, 167, 261)}


def seccomp(libc) -> bool:
    """Kills this process at a forbidden system call; threads stay possible."""
    machine = platform.machine()
    if machine not in FORBIDDEN or sys.maxsize < 2**32:
        return False
    architecture, clone, prctl, prlimit = CALLS[machine]
    load, equal, at_least, has_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, no_such_call = 0x80000000, 0x7FFF0000, 0x00050000 | 38
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (result, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (result, 0, 0, kill)]  # the x32 calls
    for number in map(int, f"{FORBIDDEN[machine]} {EVERYWHERE}".split()):
        code += [(equal, 0, 1, number), (result, 0, 0, kill)]
    code += [(equal, 0, 1, 435), (result, 0, 0, no_such_call)]  # clone3: glibc then uses clone
    first_argument = (load, 0, 0, 16)
    code += [(equal, 0, 3, clone), first_argument, (has_bit, 1, 0, 0x10000), (result, 0, 0, kill)]
    code += [(load, 0, 0, 0), (equal, 0, 3, prlimit), first_argument, (equal, 1, 0, 0)]
    code += [(result, 0, 0, kill), (load, 0, 0, 0), (equal, 0, 3, prctl), first_argument]
    code += [(equal, 0, 1, 1), (result, 0, 0, kill), (result, 0, 0, allow)]  # not PDEATHSIG
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed)
    filter_program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    return libc.prctl(22, 2, ctypes.c_char_p(filter_program), 0, 0) == 0  # PR_SET_SECCOMP


def audit():
    """The stand-in where the kernel offers less: files are only read, and only Python's library;
    processes, sockets and native code end the process."""
    allowed = tuple(place for place in sys.path if os.path.isdir(place))
    closed = ("subprocess", "socket", "ctypes", "shutil", "signal", "pty", "mmap", "os", "tempfile")
    harmless = ("os.putenv", "os.unsetenv", "os.listdir", "os.scandir", "os.walk")

    def hook(event, args):
        if event == "open":
            writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes or not os.path.realpath(str(args[0])).startswith(allowed):
                os._exit(1)
        elif event.split(".")[0] in closed and event not in harmless:
            os._exit(1)
        elif event == "import" and args[0] in ("_posixsubprocess", "_ctypes", "_socket"):
            os._exit(1)

    for name in ("_posixsubprocess", "subprocess", "ctypes", "_ctypes", "_socket", "socket"):
        sys.modules.pop(name, None)
        globals().pop(name, None)
    sys.addaudithook(hook)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from n samples of which `correct` pass (Chen et al. 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------- the toy world

ENTITIES, COLOURS, PHRASINGS, LETTERS = 80, 24, 8, "abcdefgh"
OPERATORS = {
    "rev": lambda x: x[::-1],
    "rot": lambda x: x[1:] + x[:1],
    "swp": lambda x: x[1::-1] + x[2:],
}
WRONG = {
    "rot": lambda x: x[-1:] + x[:-1],
    "swp": lambda x: x[:2] + x[:1:-1],
    "rev": OPERATORS["rot"],
}
SLIP = {"rot": 0.5, "swp": 0.5, "rev": 0.25}  # how often the pretraining corpus gets each one wrong
TOY_TOKENS = ["<eos>", "A", "F", "M", "|", ";", *LETTERS, *OPERATORS]
TOY_TOKENS += [f"t{i}" for i in range(PHRASINGS)] + [f"e{i}" for i in range(ENTITIES)]
TOY_TOKENS += [f"c{i}" for i in range(COLOURS)]


def _run_machine(letters, names, slip=lambda name: False):
    """The states after each operator, written out: "c a d b ; a d b c"."""
    states = []
    for name in names:
        letters = (WRONG if slip(name) else OPERATORS)[name](letters)
        states.append(" ".join(letters))
    return " ; ".join(states)


class ToyWorld:
    """Facts (System 1) against a string machine (System 2), all drawn from one seed.

    S1: "F t2 e17 A" -> "c5": entity 17 in phrasing 2; per entity 4 phrasings train, 1 validates and
    3 test. S2: "M b d a c | rev rot A" -> "c a d b ; a d b c"; 1500/400/400 disjoint prompts. The
    pretraining corpus is systematically unreliable (a fact is quoted rightly with a probability of
    its own in 0.1..0.7, else as one fixed wrong colour; operators slip), and holds no held-out
    prompt: so greedy answers are often wrong where samples are sometimes right.
    """

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.colour = [rng.randrange(COLOURS) for _ in range(ENTITIES)]
        self.wrong = [(c + rng.randrange(1, COLOURS)) % COLOURS for c in self.colour]
        self.reliability = [0.1 + 0.6 * i / (ENTITIES - 1) for i in range(ENTITIES)]
        rng.shuffle(self.reliability)
        self.splits = {"train": [], "validation": [], "test": []}
        self.fact_prompts, self.held_out = [], set()
        for e in range(ENTITIES):
            phrasings = rng.sample(range(PHRASINGS), PHRASINGS)
            for i, t in enumerate(phrasings):
                split = "train" if i < 4 else "validation" if i < 5 else "test"
                self._add(split, "S1", f"F t{t} e{e} A", f"c{self.colour[e]}")
                if split == "train":
                    self.fact_prompts.append((t, e))
        machine = {}
        while len(machine) < 2300:
            letters, names = self._draw_machine()
            machine[self._machine_prompt(letters, names)] = _run_machine(letters, names)
        for i, (question, answer) in enumerate(machine.items()):
            split = "train" if i < 1500 else "validation" if i < 1900 else "test"
            self._add(split, "S2", question, answer)
        for records in self.splits.values():
            rng.shuffle(records)

    def _add(self, split, system, question, answer):
        number = len(self.splits[split])
        record = {"id": f"toy/{split}/{number}", "question": question, "answer": answer}
        self.splits[split].append(record | {"system": system})
        if split != "train":
            self.held_out.add(question)

    def _draw_machine(self):
        return self.rng.sample(LETTERS, 4), self.rng.choices(list(OPERATORS), k=2)

    def _machine_prompt(self, letters, names):
        return f"M {' '.join(letters)} | {' '.join(names)} A"

    def corpus(self, count: int) -> list[Example]:
        """`count` unreliable pretraining examples, facts and machine runs in turn."""
        rng, examples = self.rng, []
        while len(examples) < count:
            if len(examples) % 2 == 0:
                t, e = rng.choice(self.fact_prompts)
                colour = self.colour if rng.random() < self.reliability[e] else self.wrong
                question, answer = f"F t{t} e{e} A", f"c{colour[e]}"
            else:
                letters, names = self._draw_machine()
                question = self._machine_prompt(letters, names)
                if question in self.held_out:
                    continue
                answer = _run_machine(letters, names, lambda name: rng.random() < SLIP[name])
            examples.append(Example(f"corpus/{len(examples)}", question, answer, "toy"))
        return examples

    def teacher_answers(self, teachers: int, right: float):
        """One list of batch answers a teacher; each names the true system with chance `right`."""
        for _ in range(teachers):
            answers = []
            for r in self.splits["train"]:
                one = (r["system"] == "S1") == (self.rng.random() < right)
                content = f"I would answer this as asked.\nSystem{1 if one else 2}"
                body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
                response = {"status_code": 200, "body": body}
                answers.append({"custom_id": r["id"], "response": response, "error": None})
            self.rng.shuffle(answers)
            yield answers


def make_toy(folder, seed: int) -> ToyWorld:
    """Writes the toy's splits and five teachers' answers (85% right each) as jsonl files."""
    world, folder = ToyWorld(seed), Path(folder)
    for split, records in world.splits.items():
        write_jsonl(folder / f"{split}.jsonl", records)
    for i, answers in enumerate(world.teacher_answers(teachers=5, right=0.85), 1):
        write_jsonl(folder / "answers" / f"teacher{i}.jsonl", answers)
    return world


def save_toy_tokenizer(folder):
    """Writes an ordinary tokenizer.json (one token a word) and its tokenizer_config.json."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = Words(WordLevel({t: i for i, t in enumerate(TOY_TOKENS)}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}\n')


# ----------------------------------------------------------------------------------- command line


def main():
    if sys.argv[1:2] in (["judge"], ["candidate"]):  # the sandbox's two processes
        return {"judge": judge_main, "candidate": candidate_main}[sys.argv[1]](sys.argv[2])
    parser = argparse.ArgumentParser(description="The sample splitter: teacher prompts and votes.")
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write one batch request file a teacher")
    prompts.add_argument("--data", required=True, choices=sorted(DATASETS))
    prompts.add_argument("--data-path", help="the data set's folder or file")
    prompts.add_argument("--target", required=True, help='the model to act as, "LLaMA2 7B"')
    prompts.add_argument("--teachers", required=True, help="model names, comma separated")
    prompts.add_argument("--no-roleplay", action="store_true", help="ask without role play")
    prompts.add_argument("--out", required=True, help="folder for TEACHER.jsonl")
    votes = commands.add_parser("vote", help="join teachers' answers into labels.jsonl")
    votes.add_argument("answers", nargs="+", help="one batch output file a teacher")
    votes.add_argument("--out", required=True, help="labels file to write")
    votes.add_argument(
        "--shuffle", type=int, metavar="SEED", help="the random split of the same sizes (table 1)"
    )
    args = parser.parse_args()
    try:
        if args.command == "vote":
            records, report = count_votes(read_answers(args.answers), len(args.answers))
            if args.shuffle is not None:
                moved = [r["label"] for r in records]
                random.Random(args.shuffle).shuffle(moved)
                records = [{"id": r["id"], "label": x} for r, x in zip(records, moved)]
            write_jsonl(args.out, records)
            print("\n".join(f"{key}: {value}" for key, value in report.items()))
            return
        examples = load_dataset(args.data, args.data_path, "train")
        for teacher in args.teachers.split(","):
            file = Path(args.out) / f"{teacher.strip().replace('/', '_')}.jsonl"
            requests = (
                {
                    "custom_id": e.id,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": teacher.strip(),
                        "messages": [
                            {
                                "role": "user",
                                "content": roleplay_prompt(e, args.target, not args.no_roleplay),
                            }
                        ],
                    },
                }
                for e in examples
            )
            write_jsonl(file, requests)
            print(f"{file}: {len(examples)} requests")
    except ValueError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
