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
import importlib
import json
import math
import os
import platform
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
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
        settings = _entries(folder / "special_tokens_map.json")
        settings |= _entries(folder / "tokenizer_config.json")
        model = _entries(folder / "config.json") | _entries(folder / "generation_config.json")
        names = [settings.get(f"{name}_token") for name in ("bos", "eos", "pad")]
        names = [n.get("content") if isinstance(n, dict) else n for n in names]
        file = folder / "tokenizer.json"
        if not file.exists():
            file = folder / "tokenizer.model"
        if not file.exists():
            raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model")
        try:
            if file.suffix == ".json":
                import tokenizers

                bpe = tokenizers.Tokenizer.from_file(str(file))
                self._ids = lambda text: bpe.encode(text, add_special_tokens=False).ids
                self._text = lambda ids: bpe.decode(ids, skip_special_tokens=False)
                bos, eos, pad = (bpe.token_to_id(name) if name else None for name in names)
                puts_bos = bpe.encode("x").ids[:1] == [bos]
            else:
                import sentencepiece

                pieces = sentencepiece.SentencePieceProcessor(str(file))
                self._ids = pieces.encode
                self._text = lambda ids: pieces.decode([i for i in ids if i < len(pieces)])
                bos, eos, pad, puts_bos = pieces.bos_id(), pieces.eos_id(), None, True
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file}: {error}") from None
        self.bos_id = bos if settings.get("add_bos_token", puts_bos) else None
        listed = model.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        self.eos_ids = tuple(dict.fromkeys(i for i in [eos, *listed] if i is not None))
        if not self.eos_ids:
            raise ValueError(f"{folder}: no file names an EOS token, so answers could not end")
        self.pad_id = self.eos_ids[0] if pad is None else pad
        self._template = settings.get("chat_template")
        if isinstance(self._template, list):  # several named templates
            self._template = {t["name"]: t["template"] for t in self._template}.get("default")
        if (folder / "chat_template.jinja").exists():
            self._template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._words = {"bos_token": names[0] or "", "eos_token": names[1] or ""}
        self._folder = folder
        self._front = self._ids("\n")  # what stands before a text that goes on: see encode, decode
        self._adds_space = self.decode(self._ids("x")) != "x"  # LLaMA's: "x" -> "▁x"

    def encode(self, text: str, bos=False, eos=False, goes_on=False) -> list[int]:
        """Token ids; bos=True puts the BOS in front where the model wants one. goes_on: the text
        stands behind another one, so LLaMA's tokenizer puts no space of its own before it."""
        ids = self._ids(text)
        if goes_on and self._adds_space:
            ids = self._ids("\n" + text)[len(self._front) :]
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
        environment.globals.update(raise_exception=refuse, strftime_now=time.strftime)
        environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        try:
            template = environment.from_string(self._template)
            text = template.render(messages=messages, add_generation_prompt=True, **self._words)
        except TemplateError as error:
            raise ValueError(f"{self._folder}: the chat template fails: {error}") from None
        # encode(bos=True) adds the BOS as an id; sentencepiece would read its text as letters
        return text if self.bos_id is None else text.removeprefix(self._words["bos_token"])

    def decode(self, ids) -> str:
        """Text of new tokens, special ones included; the EOS that ended an answer and ids beyond
        the vocabulary (padded heads) are left out. Decoded behind a new line: LLaMA's tokenizer
        drops the first space of a text that is decoded alone."""
        ids = list(ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self._text(self._front + ids).removeprefix(self._text(self._front))


def _entries(path) -> dict:
    """What a JSON object sets (no nulls), {} if the file is not there; ValueError if broken."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in entries.items() if value is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def read_records(path, columns=None):
    """Yields (number, record) of a json array, a csv table or a jsonl file, by the file's name.
    columns: those of a table without a header. ValueError names the file and the line."""
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 1
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:  # leaves out the BOM
            if str(path).endswith(".csv"):
                yield from enumerate(csv.DictReader(file, columns), 1 if columns else 2)
            elif str(path).endswith(".json"):
                records = json.load(file)
                if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
                    raise ValueError(f"{path}: not a JSON array of objects")
                yield from enumerate(records, 1)
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        record = json.loads(line.strip())
                        if not isinstance(record, dict):
                            raise ValueError(f"{path}:{number}: not a JSON object")
                        yield number, record
    except json.JSONDecodeError as error:  # of a line, or of the whole array
        raise ValueError(f"{path}:{number + error.lineno - 1}: not JSON ({error.msg})") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable ({error})") from None


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
    """One question. `answer` is what SFT trains on; `gold` what a reply is checked against (code:
    the tests that it must pass)."""

    id: str
    question: str
    answer: str
    kind: str  # how a reply is checked: "number", "letter", "code", "exact", "toy", or "text": not
    gold: str = ""
    label: str | None = None  # "S1" or "S2"
    entry: str = ""  # code: the name of the function that `gold` tests
    context: str = ""  # solved examples that stand before the question (MMLU: five)


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
        if "<reasoning>\n" in answer:
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
    return start, tokenizer.encode(answer, eos=True, goes_on=True)


def _in_file(make, pattern="{split}.jsonl"):
    """A reader of the one file that a path is, or that the folder holds under this name.

    make: (record, the file's stem, its place from 0) -> example. What it cannot use becomes a
    ValueError that names the file and the line.
    """

    def read(path, split):
        name = pattern.format(split=split)
        files = [path] if path.is_file() else list(path.glob(name))
        if len(files) != 1:
            raise ValueError(f"{path}: {len(files)} files {name} there; name one")
        for number, record in read_records(files[0]):
            try:
                yield make(record, files[0].stem, number - 1)
            except (KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{files[0]}:{number}: no text in the field {error}") from None
            except ValueError as error:
                raise ValueError(f"{files[0]}:{number}: {error}") from None

    return read


def _gsm8k(r, stem, i):
    """https://github.com/openai/grade-school-math: {train,test}.jsonl with question, answer."""
    solution, *gold = map(str.strip, r["answer"].split("####"))
    if len(gold) != 1:
        raise ValueError("not a question and an answer with one ####")
    answer = f"<reasoning>\n{solution}\n</reasoning>\n<answer>\n{gold[0]}\n</answer>"
    return Example(f"gsm8k/{stem}/{i}", r["question"].strip(), answer, "number", gold[0])


def _humaneval(r, stem, i):
    """https://github.com/openai/human-eval: HumanEval.jsonl.gz; it has a test split only."""
    task = r["task_id"], r["prompt"], r["canonical_solution"], "code", r["test"]
    return Example(*task, entry=r["entry_point"])


def _toy(r, stem, i):
    """The toy world that `make_toy` wrote: {train,validation,test}.jsonl."""
    return Example(r["id"], r["question"], r["answer"], "toy", r["answer"], r["system"])


def _own(r, stem, i):
    """One's own jsonl: "question", "answer", "check" (number, letter, exact, or none: answers that
    cannot be checked) and, where it is known, "label" (S1 or S2). A letter's question holds the
    choices and ends as it should be asked ("Answer:")."""
    question, answer, check = r.get("question"), r.get("answer"), r.get("check") or "none"
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
        raise ValueError('needs the texts "question" and "answer"')
    if check not in ("number", "letter", "exact", "none"):
        raise ValueError(f'"check" is {check!r}, not number, letter, exact or none')
    if r.get("label") not in (None, "S1", "S2"):
        raise ValueError(f'"label" is {r["label"]!r}, not S1 or S2')
    kind, gold = "text" if check == "none" else check, answer
    if check == "number":
        if final_number(answer) is None:
            raise ValueError(f"no number to check in the answer {answer[:40]!r}")
        gold = str(final_number(answer))
    if check == "letter":
        gold = answer.strip()
        if gold not in tuple("ABCD"):
            raise ValueError(f"the answer {answer[:40]!r} is not A, B, C or D")
        answer = f" {gold}"
    return Example(f"{stem}/{i}", question, answer, kind, gold, r.get("label"))


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
            context += "".join(f"{question} {letter}\n\n" for question, letter in _mmlu_rows(shots))
        for i, (question, letter) in enumerate(_mmlu_rows(file)):
            name = f"mmlu/{file.stem}/{i}"
            yield Example(name, question, f" {letter}", "letter", letter, context=context)


def _mmlu_rows(file):
    for number, row in read_records(file, ["question", *"ABCD", "letter"]):
        if None in row or row["letter"] not in list("ABCD"):  # too many fields, or too few
            raise ValueError(f"{file}:{number}: not question, four choices and a letter")
        choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
        yield f"{row['question'].strip()}\n{choices}\nAnswer:", row["letter"]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and who reads its files."""

    read: object  # (path, split) -> examples
    splits: str
    home: str
    hub: tuple = ()  # (dataset repository, file) where the publisher keeps plain json on the Hub


def _instructions(name: str, fields: str, repository: str, file: str | None = None) -> Source:
    """An instruction set of the Hub, json or jsonl; its answers cannot be checked. fields: those of
    the question, of what may follow it, and of the answer."""
    question, more, answer = fields.split()

    def make(r, stem, i):
        parts = [r[question], r.get(more) or ""]
        text = "\n\n".join(part.strip() for part in parts if part.strip())
        return Example(f"{name}/{i}", text, r[answer] + "", "text")

    home = f"huggingface.co/datasets/{repository}" + ("" if file else " (save it as jsonl)")
    return Source(_in_file(make, "*.json*"), "train", home, (repository, file) if file else ())


DATASETS = {
    "toy": Source(_in_file(_toy), "train validation test", "made by make_toy"),
    "gsm8k": Source(_in_file(_gsm8k), "train test", "github.com/openai/grade-school-math"),
    "mmlu": Source(_mmlu, "train validation test", "github.com/hendrycks/test"),
    "humaneval": Source(_in_file(_humaneval, "Human*"), "test", "github.com/openai/human-eval"),
    "dolly": _instructions(
        "dolly",
        "instruction context response",
        "databricks/databricks-dolly-15k",
        "databricks-dolly-15k.jsonl",
    ),
    "platypus": _instructions("platypus", "instruction input output", "garage-bAInd/Open-Platypus"),
    "codealpaca": _instructions(
        "codealpaca", "instruction input output", "sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json"
    ),
    "codefeedback": _instructions(
        "codefeedback",
        "query - answer",
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "CodeFeedback-Filtered-Instruction.jsonl",
    ),
}
OWN, OWN_NAMES = Source(_in_file(_own), "train", "your own file"), (".jsonl", ".jsonl.gz")
SPLIT_SEED = 0  # of the splits that we make ourselves


def find_dataset(name: str, path) -> tuple[Source, Path]:
    """The data set's source and files: `path` as it is, or the publisher's file from the Hub."""
    source = DATASETS.get(name)
    if name.endswith(OWN_NAMES):
        source, path = OWN, name
    if not source:
        known = ", ".join(DATASETS)
        raise ValueError(f"unknown data set {name!r}: a jsonl file of your own, or one of {known}")
    if path is not None:
        if not Path(path).exists():
            raise ValueError(f"{name}: nothing at {path}; its home is {source.home}")
        return source, Path(path)
    if not source.hub:
        raise ValueError(f"{name}: --data-path is missing; its home is {source.home}")
    from huggingface_hub import hf_hub_download

    try:
        return source, Path(hf_hub_download(*source.hub, repo_type="dataset"))
    except Exception as error:  # network, access and name errors of several libraries
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}: not to be had from the Hub ({reason}); --data-path") from None


def in_one_file(name: str, path) -> bool:
    """Is this one file that holds no splits: one's own, or one of GSM8K's two?"""
    return name.endswith(OWN_NAMES) or (name == "gsm8k" and Path(path or "").is_file())


def load_dataset(name: str, path, split: str) -> list[Example]:
    """The examples of `split` ("train", "validation", "test") in the publisher's order.

    Where the publisher has no validation split it is 5% of train. One file without splits (one's
    own, or GSM8K's test.jsonl) is cut 80/10/10, or read whole as "all". Both cuts are drawn with a
    fixed seed, so the three never overlap. ValueError names an unknown set, a missing file or a bad
    line.
    """
    source, path = find_dataset(name, path)
    stored, shares = "train", {"train": (0.05, 1), "validation": (0, 0.05)}
    if in_one_file(name, path):
        shares = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1), "all": (0, 1)}
    elif split == "test" or "validation" in source.splits:
        stored, shares = split, {split: (0, 1)}
    if stored not in source.splits or split not in shares:
        raise ValueError(f"{name} has no {split} split; name another data set for this")
    examples = list(source.read(path, stored))
    order = list(range(len(examples)))
    random.Random(SPLIT_SEED).shuffle(order)
    begin, end = (int(share * len(order)) for share in shares[split])
    chosen = set(order[begin:end])
    if not chosen:
        raise ValueError(f"{path}: {len(examples)} examples are too few for a {split} split")
    return [e for i, e in enumerate(examples) if i in chosen]


# ----------------------------------------------------------------- the paper's sample splitter

ROLE = """\
You are now {target}, a language model of that size and training. Keep its knowledge, its habits \
and its limits: think as {target} would think, not as the model that you really are.

"""
SPLITTER = """\
You will read a question and its answer. Reason concisely, step by step, about how you would get \
from the question to this answer, and decide which kind of thinking it takes:

- System1: fast and direct. You recall the answer at once, read it off the text, or get it by one \
simple inference.
- System2: slow and deliberate. You need several logical steps, have to chain pieces of \
information together, or make a complex inference.

Question:
{question}

Answer:
{answer}

End your reply with one word alone on the last line: System1 or System2."""


def roleplay_prompt(example: Example, target_model: str, roleplay: bool = True) -> str:
    """What a teacher is asked (after the paper's figure 3, in our words); roleplay=False leaves out
    the part that asks it to act as the target model (the ablation of table 1)."""
    template = ROLE + SPLITTER if roleplay else SPLITTER
    return template.format(target=target_model, question=example.question, answer=example.answer)


def batch_request(custom_id: str, teacher: str, prompt: str) -> dict:
    """A line of the batch format that services and vLLM take."""
    body = {"model": teacher, "messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def vote(labels: list[str]) -> str:
    """The majority of "S1" and "S2" verdicts; a tie is "S2": a hard question asked fast does more
    harm than an easy one thought over. ValueError without verdicts or on another word."""
    counts = Counter(labels)
    if not counts or set(counts) - {"S1", "S2"}:
        raise ValueError(f'vote needs "S1" and "S2" verdicts, got {labels}')
    return "S1" if counts["S1"] > counts["S2"] else "S2"


VERDICT = r"(?:\bsystem[\s_-]{0,2}|(?<![\w'’])s)([12])\b"  # not the s of "It's 1 step"


def verdict(text: str) -> str | None:
    """The system a teacher's free text names: on its last line if that names one alone, else in the
    whole text if it names one alone, else None (not guessed)."""
    text = (text or "").strip()
    for part in (text.rpartition("\n")[2], text):
        named = set(re.findall(VERDICT, part, flags=re.IGNORECASE))
        if len(named) == 1:
            return "S" + named.pop()
    return None


def read_answers(paths) -> dict[str, dict[str, str | None]]:
    """Teachers' batch answers, one file per teacher -> {custom_id: {teacher: verdict}}: "S1", "S2",
    None for a text without a clear one (a refusal), "error" where the service gave no text.

    Joined by custom_id, never by order. A body may be wrapped (response.body) or bare.
    """
    answers = {}
    for path in map(Path, paths):
        for number, record in read_records(path):
            if not isinstance(record.get("custom_id"), str):
                raise ValueError(f"{path}:{number}: no custom_id")
            try:
                body = record["response"]["body"] if "response" in record else record
                text = body["choices"][0]["message"]["content"]
            except (TypeError, KeyError, IndexError):
                text = None  # an error of the service
            votes = answers.setdefault(record["custom_id"], {})
            if path.stem in votes:
                raise ValueError(f"{path}:{number}: second answer for {record['custom_id']}")
            votes[path.stem] = verdict(text) if isinstance(text, str) else "error"
    return answers


def count_votes(answers, teachers: int):
    """All votes -> (labels records [{id, label, votes}], a report of counts).

    Unusable verdicts do not vote; an example without any usable one gets no label.
    """
    records, report = [], Counter({"S1": 0, "S2": 0})
    pairs = agreeing = 0
    for custom_id, by_teacher in answers.items():
        given = Counter(by_teacher.values())
        n1, n2 = given["S1"], given["S2"]
        report["refusals (no clear verdict)"] += given[None]
        report["errors"] += given["error"]
        report["missing answers"] += teachers - len(by_teacher)
        report["examples without a usable answer"] += n1 + n2 == 0
        report["ties (called S2)"] += n1 == n2 > 0
        pairs += math.comb(n1 + n2, 2)
        agreeing += math.comb(n1, 2) + math.comb(n2, 2)
        if n1 + n2:
            label = vote(["S1"] * n1 + ["S2"] * n2)
            report[label] += 1
            records.append({"id": custom_id, "label": label, "votes": by_teacher})
    agreement = round(agreeing / pairs, 4) if pairs else None
    return records, {**report, "agreement of two teachers": agreement}


def shuffle_labels(records, seed: int):
    """The random split of the same sizes (paper, table 1)."""
    moved = [r["label"] for r in records]
    random.Random(seed).shuffle(moved)
    return [{"id": r["id"], "label": label} for r, label in zip(records, moved)]


def label_examples(examples: list[Example], labels: str) -> list[Example]:
    """The examples that have a label, with it. labels: a labels.jsonl ({"id", "label"} a line), the
    authors' csv (columns question and _result, System1 or System2), or "steps:K": of GSM8K alone,
    S1 where a solution has at most K <<...>> calculations, else S2 (a stand-in for users without
    teacher answers, not the paper's method)."""
    if re.fullmatch(r"steps:\d+", labels):
        limit = int(labels[6:])
        examples = [e for e in examples if e.id.startswith("gsm8k/")]
        return [replace(e, label="S1" if e.answer.count("<<") <= limit else "S2") for e in examples]
    is_table = labels.endswith(".csv")
    key, known = "question" if is_table else "id", {}
    for number, record in read_records(labels):
        label = verdict(record.get("_result")) if is_table else record.get("label")
        if label not in ("S1", "S2") or record.get(key) is None:
            where = f"{labels}:{number}"
            raise ValueError(f'{where}: needs "{key}" and a label of System 1 or System 2')
        known[str(record[key]).strip()] = label
    labels = [(e, known.get(getattr(e, key).strip())) for e in examples]
    return [replace(e, label=label) for e, label in labels if label]


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
    from torch.nn.utils.rnn import pad_sequence

    tokens = [torch.tensor(ids) for ids, _ in rows]
    labels = [torch.tensor([-100] * start + ids[start:]) for ids, start in rows]
    return pad_sequence(tokens, True).to(device), pad_sequence(labels, True, -100).to(device)


def batches(rows, size: int, device="cpu"):
    """Collated batches of at most `size` rows of similar length (sorted: little padding)."""
    ordered = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    return [collate(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


# ------------------------------------------------------------------------- answers and rewards

# Models run on into thousands of spaces and digits, so no pattern here backtracks over them.
NUMBER = re.compile(
    r"(?<![\w.])([-+−]?) ?[$€£]? ?((?:\d[\d,]*(?:\.\d+)?|\.\d+)(?: ?/ ?\d[\d,]*(?:\.\d+)?)?)"
)
GOES_ON = re.compile(r"[eE][-+]?\d| ?(?:=|[-+−*×÷/^x] ?[$€£]?\d)")  # into an expression
NO_NUMBER = re.compile(r"[eE][-+]?\d|(?:st|nd|rd|th)\b")  # behind it: an exponent, an ordinal
BULLET = re.compile(r"^[ \t]*[-+*•][ \t]+", re.M)
ANSWERED = re.compile(r"\d|</answer>|####|\\boxed\{")
NEW_QUESTION = re.compile(r"^[ \t]*(?:\*\*)?(?:Question|Q)(?: ?\d{1,3})?(?:\*\*)?:", re.M)


def _value(number: re.Match | None):
    """A match of NUMBER as an exact Fraction; None if it is a division by 0 or absurdly long."""
    if not number:
        return None
    top, _, bottom = re.sub(r"[ ,]", "", number[2]).partition("/")
    if len(top + bottom) > 200 or not Fraction(bottom or 1):
        return None
    value = Fraction(top) / Fraction(bottom or 1)
    return -value if number[1] in ("-", "−") else value


def parse_number(text: str):
    """The value of a text that is one number and nothing more, else None: 18, 18., $18, 1,000,
    -3.50, 3/4, 50%. Exact (Fraction): 18.00 equals 18. The sign may stand before the currency."""
    text = text.strip().removesuffix(".").strip().removesuffix("%").strip()
    return _value(NUMBER.fullmatch(text))


def _without_markup(text: str) -> str:
    """Markdown emphasis and LaTeX wrappers taken off: **18**, \\boxed{1{,}000}, \\text{18} eggs."""
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("$$", "$")
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:times|cdot|div)\b", "*", text)
    text = re.sub(r"\*\*|__|[`{}#]|\\[a-zA-Z]+|\\[,;:! ()\[\]]", "", text)
    return text.strip(" \t\r\n*_")


def _in_tags(text: str) -> str | None:
    """What stands in the last <answer> that is closed; None without one."""
    _, opened, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    return inside if opened else None


def _marked(text: str) -> str | None:
    """What a reply marks as its answer: inside the last <answer>, else in the line of the last
    ####, else in the last \\boxed{}; None if it marks nothing."""
    inside = _in_tags(text)
    if inside is not None:
        return inside
    if "####" in text:
        return text.rpartition("####")[2].lstrip().partition("\n")[0]
    _, boxed, inside = text.rpartition("\\boxed{")
    if not boxed:
        return None
    depth = 1
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return inside[:i]
    return inside.partition("\n")[0]


def _numbers(text: str) -> list[re.Match]:
    """All numbers of a text; letters may follow one as its unit (18km)."""
    return [m for m in NUMBER.finditer(text) if not NO_NUMBER.match(text, m.end())]


def marked_number(marked: str):
    """The number in a marked answer: the one it begins with, unless an expression goes on, else
    the one at the right side of its last =, else its only number; None if that leaves none."""
    text = _without_markup(marked)
    for part in (text, text.rpartition("=")[2].lstrip()):
        found = NUMBER.match(part)
        if found and not GOES_ON.match(part, found.end()):
            return _value(found)
    numbers = _numbers(text)
    return _value(numbers[0]) if len(numbers) == 1 else None


def final_number(text: str):
    """The number a reply gives as its answer (a Fraction), or None. Where the reply marks its
    answer only that counts (`marked_number`), else its last number. A base model that runs on into
    a new question is judged by what stands before it."""
    answered = ANSWERED.search(text)
    runs_on = NEW_QUESTION.search(text, answered.end()) if answered else None
    text = BULLET.sub("", text[: runs_on.start()] if runs_on else text)
    marked = _marked(text)
    if marked is not None:
        return marked_number(marked)
    numbers = _numbers(_without_markup(text))
    return _value(numbers[-1]) if numbers else None


def is_correct(example: Example, completion: str, unconfined=False) -> bool:
    """Does the reply give the right answer? Numbers are compared as numbers, letters as letters,
    code by running the problem's tests in a sandbox (unconfined: see passes_tests), the toy's
    and one's own "exact" texts as texts. ValueError for a set whose answers cannot be checked."""
    if example.kind == "number":
        value = final_number(completion)
        return value is not None and value == parse_number(example.gold)
    if example.kind == "letter":
        letter = re.match(r"\s*\(?([A-D])(?![A-Za-z])", completion)
        return letter is not None and letter[1] == example.gold
    if example.kind == "code":
        return passes_tests(example, completion, unconfined)
    if example.kind == "exact":
        return completion.strip() == example.gold.strip()
    if example.kind == "toy":  # the last state of the string machine decides, spaces do not
        reply, gold = (t.rpartition(";")[2].split() for t in (completion, example.gold))
        return reply == gold
    raise ValueError(f"{example.id}: answers of this data set cannot be checked")


def reward_parts(example: Example, completion: str, unconfined=False) -> dict[str, float]:
    """The parts of the GRPO reward; the reward is their sum.

    Where the reference answer has tags the authors' five, repaired where they punish good answers:
    2.0 a correct <answer> (compared as numbers), 0.5 an integer in it, 0.5 the strict format, 0.5
    the loose one, 0.125 each tag that occurs once, less 0.001 a character after </answer>. For
    other answers 1.0 if the reply is correct.
    """
    if example.kind != "number" or "<answer>" not in example.answer:
        return {"correct": float(is_correct(example, completion, unconfined))}
    inside = _in_tags(completion) or ""
    value, alone = marked_number(inside), parse_number(inside)
    body = completion.strip()
    strict = body.startswith("<reasoning>\n") and body.endswith("\n</answer>")
    strict = strict and "\n</reasoning>\n<answer>\n" in body[12:-10]
    before, closed, tail = completion.rpartition("</answer>")
    loose = re.search(r"</reasoning>\s*<answer>", before.partition("<reasoning>")[2])
    names = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    tags = sum(completion.count(name) == 1 for name in names)
    excess = len(tail.strip()) if closed else 0
    return {
        "correct": 2.0 * (value is not None and value == parse_number(example.gold)),
        "integer": 0.5 * (alone is not None and alone.denominator == 1),
        "strict": 0.5 * strict,
        "loose": 0.5 * bool(loose),
        "tags": 0.125 * tags - 0.001 * excess,
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from n samples of which `correct` pass (Chen et al. 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def in_parallel(function, items) -> list:
    """[function(*item) ...], on as many threads as this process may use cores."""
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    with ThreadPoolExecutor(len(available)) as pool:
        return list(pool.map(lambda item: function(*item), items))


# ---------------------------------------------------------------------------- running code safely

SECONDS = 10  # a candidate's wall clock and CPU; the verdict comes within SECONDS + 5
MEMORY, MESSAGE = 1 << 30, 1 << 17  # bytes: address space, one answer


class SandboxError(RuntimeError):
    """The sandbox itself cannot run: that is no verdict about an answer."""


def passes_tests(example: Example, completion: str, unconfined=False) -> bool:
    """Does the code pass the problem's own tests? (HumanEval; Chen et al. 2021)

    Two processes. The judge runs the problem's tests, with the helpers of its prompt, and is
    trusted. The candidate's functions live in a second one; arguments and results cross between the
    two as the text of Python literals, exceptions by name, so no object, patched builtin or walked
    frame of the candidate is ever near the verdict. The candidate has no environment, no terminal
    and limits on time and memory. Before its code runs it imports what the code names from a list
    of harmless modules; then a seccomp filter of the Linux kernel (`confine`) leaves it about
    thirty system calls, which read and write what is open (two pipes to the judge), manage memory
    and tell the time. Files, processes, threads, sockets and signals answer EPERM.

    Where there is no seccomp (not Linux on x86-64 or aarch64) it raises SandboxError, unless
    unconfined=True lets the code run with the rights of this program. Not protected against: bugs
    of the kernel, side channels, and a candidate that recognises the test inputs and answers from
    memory. Honest code that needs a file or a thread fails, and NaN does not cross.
    """
    job = {"prompt": example.question, "tests": example.gold, "entry": example.entry}
    job |= {"completion": completion, "unconfined": unconfined}
    if unconfined and not can_confine():
        warnings.warn("code answers run unconfined, with the rights of this program", stacklevel=2)
    try:
        judge = _start("judge", "-S", start_new_session=True)
    except OSError as error:
        raise SandboxError(f"the sandbox cannot start: {error}") from None
    try:
        out, _ = judge.communicate(json.dumps(job).encode(), timeout=SECONDS + 5)
    except subprocess.TimeoutExpired:  # what the candidate gave made the tests themselves hang
        out = b""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(judge.pid, signal.SIGKILL)  # the judge, and the candidate in its group
    out = out or judge.communicate()[0]
    said = out.decode().splitlines() or ["the judge ended at once"]
    if said[-1] not in ("passed", "failed"):
        raise SandboxError(f"the sandbox cannot start: {said[-1]}")
    return said[-1] == "passed"


def _start(role: str, *flags: str, **settings):
    """This file as one of the sandbox's two processes, with pipes to and from it."""
    return subprocess.Popen(
        [sys.executable, "-I", *flags, os.path.abspath(__file__), role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
        cwd="/",
        **settings,
    )


def program(prompt: str, completion: str, entry: str) -> str:
    """The candidate's source, from whatever form a model answers in: a body that continues the
    prompt, a whole function, or Markdown with fenced blocks around either. Of the ways to read it
    the one counts that keeps most of the text up to the first syntax error."""
    reply = re.sub(r"\r+\n?", "\n", completion.lstrip("\ufeff"))
    text, *rest = re.split(r"^[^\S\n]*(?:```|~~~).*\n?", reply, flags=re.M)
    fenced = [textwrap.dedent(block) for block in rest[::2]][:9]
    name = re.escape(entry)
    defines = re.compile(rf"^(?:(?:async )?def {name}\b|{name} *(?::[^=\n]+)?=(?!=))", re.M)
    whole = [block for block in fenced if defines.search(longest_that_parses(block))]
    codes = [text, *fenced]
    if whole:  # the last that parses to its end, else the first, behind the blocks of helpers
        parses = [block for block in fenced if longest_that_parses(block) == block]
        chosen = ([block for block in whole if block in parses] or whole[:1])[-1]
        before = fenced[: fenced.index(chosen)]
        codes = ["\n".join([*(b for b in before if b in parses and b not in whole), chosen])]
    # (characters kept, source, which definition of the entry counts: the prompt's own, continued,
    # or the one behind its stub)
    readings = []
    for code in codes:
        code = re.split(r"<\||</s>|\[/PYTHON\]|\0|```[ \t]*$", code, maxsplit=1, flags=re.M)[0]
        first = re.compile(r"^from __future__ .*\n", re.M)  # must be the first statement of a file
        head, code = "".join(first.findall(code)) + prompt, first.sub("", code)
        code = re.sub(r"\A(?:[ \t]*\n)+", "", code)
        stub = head + "\n    pass\n\n"
        indented = textwrap.indent(textwrap.dedent(code), "    ")
        bodies = [(head, way, 0) for way in (code, indented, "    " + code.lstrip())]
        begins = re.finditer(r"^(?:import |from |def |async def |class |@|\w+ *=)", code, re.M)
        starts = [code[m.start() :] for m in list(begins)[:20]]  # prose stands before it
        functions = [(stub, way, 1) for way in (textwrap.dedent(code), code.lstrip(), *starts)]
        is_body = code[:1].isspace() and not defines.match(code.lstrip())
        for front, way, which in bodies + functions if is_body else functions + bodies:
            kept = longest_that_parses(front + way)[len(front) :]
            if which == 0 or defines.search(kept):
                readings.append((len("".join(kept.split())), front + kept, which))
    _, source, which = max(readings, key=lambda reading: reading[0])
    return without_run_on(source, entry, which)


def longest_that_parses(source: str) -> str:
    """The source without what follows its first syntax error: prose, or an end cut off."""
    lines = source.split("\n")
    while lines:
        try:
            compile("\n".join(lines), "candidate", "exec")
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or len(lines)  # too deep: no line is named
            del lines[max(0, min(line, len(lines)) - 1) :]
    return "\n".join(lines)


HELPERS = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
HELPERS |= ast.Assign | ast.AnnAssign | ast.AugAssign  # constants; also "f.cache = {}"


def without_run_on(source: str, entry: str, which: int) -> str:
    """A base model runs on: behind the definition that counts only helpers, imports and constants
    stay; prints, tests and second tries go."""
    kept, seen = [], 0
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        stored = [n for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
        names = {getattr(node, "name", None)}
        names |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
        seen += entry in names
        if seen <= which or (entry in names and seen == which + 1):
            kept.append(node)
        elif isinstance(node, HELPERS) and not names & {entry, *dir(builtins)}:
            kept.append(node)
    # the text itself: ast.unparse fails on deep expressions and some f-strings
    parts = [part for node in kept for part in (*getattr(node, "decorator_list", ()), node)]
    texts = [ast.get_source_segment(source, part) for part in parts]
    return "\n".join("@" * isinstance(p, ast.expr) + t for p, t in zip(parts, texts))


def literal(x) -> str:
    """Plain data as the text of a Python literal; TypeError for anything else. Subclasses cross
    as what they are underneath: a Counter as a dict, an IntEnum as an int."""
    if isinstance(x, float):
        return float.__repr__(x).replace("inf", "1e999")
    for kind in (type(None), bool, int, complex, bytes, str):
        if isinstance(x, kind):
            return kind.__repr__(x).encode("ascii", "backslashreplace").decode()
    if isinstance(x, dict):
        return "{" + ",".join(f"{literal(k)}:{literal(v)}" for k, v in dict.items(x)) + "}"
    for kind, brackets in ((list, "[]"), (tuple, "()"), (set, "{}"), (frozenset, "{}")):
        if isinstance(x, kind):
            items = "".join(literal(item) + "," for item in kind.__iter__(x))
            empty = "set()" if brackets == "{}" else brackets
            return brackets[0] + items + brackets[1] if items else empty
    if type(x).__module__ == "numpy":  # a scalar, or an array of one element
        return literal(x.item())
    raise TypeError(f"{type(x).__name__} is not plain data")


def judge_main():
    """The trusted process: prints "failed" as soon as its candidate runs, then "passed" if it did,
    or why it could not be confined. The last line counts."""
    job = json.loads(sys.stdin.buffer.read())
    for name, value in (("AS", 2 * MEMORY), ("CPU", SECONDS + 5), ("CORE", 0)):
        set_limit(f"RLIMIT_{name}", value)
    verdicts = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tests print is no verdict
    candidate = _start("candidate")

    def answer():
        line = candidate.stdout.readline(MESSAGE)
        if not line.endswith(b"\n"):  # the candidate has ended, or says too much
            candidate.kill()
            candidate.wait()
            os._exit(0)  # not an exception, which the tests might catch
        return ast.literal_eval(line.decode("ascii"))

    def ask(message):
        line = literal(message).encode() + b"\n"
        with suppress(BrokenPipeError):  # then the answer is missing
            candidate.stdin.write(line)
            candidate.stdin.flush()
        return answer()

    def call(*args, **kwargs):
        kind, value = ask((args, kwargs))
        if kind == "returned":
            return value
        error = getattr(builtins, str(value), None)
        known = isinstance(error, type) and issubclass(error, BaseException)
        if not known or issubclass(error, (StopIteration, StopAsyncIteration)):
            error = RuntimeError  # a StopIteration would end a loop of the tests
        raise error("raised by the candidate")

    threading.Timer(SECONDS, candidate.kill).start()
    with suppress(BaseException):  # whatever the answers made of the tests: it is not a pass
        answer()  # "ready"
        print("failed", file=verdicts)
        confined = ask((job["prompt"], job["completion"], job["entry"], job["unconfined"]))
        if confined != "confined":  # said before any code of the candidate has run
            print(confined, file=verdicts)
        elif answer() == "loaded":
            names = {"__name__": "tests"}
            exec(job["prompt"] + "\n    pass\n", names)  # helpers: HumanEval/32, 38, 50
            names[job["entry"]] = call  # HumanEval/33 calls the function by its name
            exec(job["tests"], names)
            names["check"](call)
            print("passed", file=verdicts)
    candidate.kill()
    candidate.wait()
    os._exit(0)


# What a candidate may import: modules whose import does nothing but define.
HARMLESS = """__future__ abc array ast base64 binascii bisect calendar cmath collections
collections.abc contextlib copy csv dataclasses datetime decimal difflib enum fractions functools
gc graphlib hashlib heapq html io itertools json keyword math numbers numpy operator pprint queue
random re secrets statistics string struct sys textwrap time timeit traceback types typing
unicodedata weakref zlib""".split()
# What these load late, when the filter stands already.
LATE = "_strptime typing encodings.rot_13 encodings.cp1252 encodings.utf_8_sig".split()
LATE += ["encodings.hex_codec", "encodings.unicode_escape"]
NUMPY = [f"numpy.{m}" for m in "linalg random ma fft polynomial char strings".split()]


def candidate_main():
    """The untrusted process: confines itself, loads the code, then serves calls one a line."""
    for name, value in (("CPU", SECONDS), ("AS", MEMORY), ("FSIZE", 0), ("CORE", 0)):
        set_limit(f"RLIMIT_{name}", value)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # prints go nowhere

    def reply(value):
        message = literal(value)
        if len(message) >= MESSAGE:
            os._exit(1)
        os.write(answers, message.encode("ascii") + b"\n")

    reply("ready")
    prompt, completion, entry, unconfined = ast.literal_eval(requests.readline().decode("ascii"))
    source = program(prompt, completion, entry)
    for name in LATE + named_modules(source):
        with suppress(ImportError):  # it fails again where the code imports it
            importlib.import_module(name)
    if not confine() and not unconfined:
        return reply("no seccomp here to confine code answers: --allow-unconfined-code runs them")
    reply("confined")
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    statements = ast.parse(source).body
    future = [s for s in statements if getattr(s, "module", None) == "__future__"]
    for statement in statements:  # one that fails leaves the others standing
        with suppress(BaseException):
            part = ast.Module([*future, statement], [])
            exec(compile(part, "candidate", "exec", dont_inherit=True), module.__dict__)
    function = module.__dict__.get(entry)
    reply("loaded")
    for line in requests:
        args, kwargs = ast.literal_eval(line.decode("ascii"))
        try:
            result = ("returned", function(*args, **kwargs))
            literal(result)
        except BaseException as error:
            result = ("raised", type(error).__name__)
        reply(result)


def named_modules(source: str) -> list[str]:
    """The harmless modules that a source imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    named = sorted(names & set(HARMLESS))
    return named + NUMPY if "numpy" in named else named


def set_limit(name, value):
    try:
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))
    except (ImportError, ValueError, OSError):
        if can_confine():
            raise  # where there is a sandbox, it is whole


# The system calls a candidate is left, by their numbers on x86-64 and aarch64; None: not there.
ALLOWED = {
    "read": (0, 63), "readv": (19, 65), "write": (1, 64), "writev": (20, 66), "close": (3, 57),
    "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "futex": (202, 98), "sched_yield": (24, 124), "select": (23, None), "pselect6": (270, 72),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "getrusage": (98, 165), "times": (100, 153), "getrandom": (318, 278), "getpid": (39, 172),
    "gettid": (186, 178), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# architecture: its column above, its audit number, the number of the call seccomp
MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}


def can_confine() -> bool:
    return sys.platform == "linux" and platform.machine() in MACHINES and sys.maxsize > 2**32


def confine() -> bool:
    """Leaves this process, for good, only the calls in ALLOWED; all else answers EPERM. False where
    the system has no such filter. Every thread that exists is confined with it."""
    if not can_confine():
        return False
    column, architecture, seccomp = MACHINES[platform.machine()]
    load, equal, result = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
    kill, allow, eperm = 0x80000000, 0x7FFF0000, 0x00050000 | 1
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (result, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            code += [(equal, 0, 1, numbers[column]), (result, 0, 0, allow)]
    code += [(result, 0, 0, eperm)]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    filter_program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG: it dies with the judge
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    set_mode_filter, all_threads = 1, 1
    return libc.syscall(seccomp, set_mode_filter, all_threads, ctypes.c_char_p(filter_program)) == 0


# ---------------------------------------------------------------------------------- the toy world

ENTITIES, COLOURS, PHRASINGS, LETTERS = 80, 24, 8, "abcdefgh"
# each operator, and what the pretraining corpus takes it for: where each new letter stood
OPERATORS = {"rev": (3, 2, 1, 0), "rot": (1, 2, 3, 0), "swp": (1, 0, 2, 3)}
WRONG = {"rev": (1, 2, 3, 0), "rot": (3, 0, 1, 2), "swp": (0, 1, 3, 2)}
SLIP = {"rot": 0.5, "swp": 0.5, "rev": 0.25}  # how often the pretraining corpus gets each one wrong
TEACHERS = (0.85, 0.95, 0.75, 0.9, 0.8)  # how often each of the five is right
TOY_TOKENS = ["<eos>", "A", "F", "M", "|", ";", *LETTERS, *OPERATORS]
TOY_TOKENS += [f"t{i}" for i in range(PHRASINGS)] + [f"e{i}" for i in range(ENTITIES)]
TOY_TOKENS += [f"c{i}" for i in range(COLOURS)]


def _run_machine(question, slip=lambda name: False):
    """The states after each operator: "M b d a c | rev rot A" -> "c a d b ; a d b c"."""
    _, *letters, _, first, second, _ = question.split()
    states = []
    for name in (first, second):
        order = WRONG[name] if slip(name) else OPERATORS[name]
        letters = [letters[i] for i in order]
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
        facts, machine = [], {}  # no question twice, in the order drawn
        for e in range(ENTITIES):
            for t in rng.sample(range(PHRASINGS), PHRASINGS):
                facts.append(("S1", f"F t{t} e{e} A", f"c{self.colour[e]}"))
        while len(machine) < 2300:
            question = self._draw_machine()
            machine[question] = "S2", question, _run_machine(question)
        splits = (["train"] * 4 + ["validation"] + ["test"] * 3) * ENTITIES
        splits += ["train"] * 1500 + ["validation"] * 400 + ["test"] * 400
        self.splits = {split: [] for split in ("train", "validation", "test")}
        for split, (system, question, answer) in zip(splits, [*facts, *machine.values()]):
            record = {"id": f"toy/{split}/{len(self.splits[split])}", "question": question}
            self.splits[split].append(record | {"answer": answer, "system": system})
        self.held_out = {r["question"] for s in ("validation", "test") for r in self.splits[s]}
        self.facts = [r["question"] for r in self.splits["train"] if r["system"] == "S1"]
        for records in self.splits.values():
            rng.shuffle(records)

    def _draw_machine(self):
        letters, names = self.rng.sample(LETTERS, 4), self.rng.choices(list(OPERATORS), k=2)
        return f"M {' '.join(letters)} | {' '.join(names)} A"

    def corpus(self, count: int) -> list[Example]:
        """`count` unreliable pretraining examples, facts and machine runs in turn."""
        rng, examples = self.rng, []
        while len(examples) < count:
            if len(examples) % 2 == 0:
                question = rng.choice(self.facts)
                e = int(question.split()[2].removeprefix("e"))
                colour = self.colour if rng.random() < self.reliability[e] else self.wrong
                answer = f"c{colour[e]}"
            else:
                question = self._draw_machine()
                if question in self.held_out:
                    continue
                answer = _run_machine(question, lambda name: rng.random() < SLIP[name])
            examples.append(Example(f"corpus/{len(examples)}", question, answer, "toy"))
        return examples

    def teacher_answers(self, right: float):
        """A teacher's batch answers; each names the true system with probability `right`."""
        answers = []
        for r in self.splits["train"]:
            one = (r["system"] == "S1") == (self.rng.random() < right)
            content = f"I would answer this as asked.\nSystem{1 if one else 2}"
            body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
            answers.append({"custom_id": r["id"], "response": {"body": body}})
        self.rng.shuffle(answers)
        return answers


def make_toy(folder, seed: int) -> ToyWorld:
    """Writes the toy's splits and five teachers' answers as jsonl files."""
    world, folder = ToyWorld(seed), Path(folder)
    for split, records in world.splits.items():
        write_jsonl(folder / f"{split}.jsonl", records)
    for i, right in enumerate(TEACHERS, 1):
        write_jsonl(folder / "answers" / f"teacher{i}.jsonl", world.teacher_answers(right))
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
        return {"judge": judge_main, "candidate": candidate_main}[sys.argv[1]]()
    parser = argparse.ArgumentParser(description="The sample splitter: teacher prompts and votes.")
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write one batch request file per teacher")
    prompts.add_argument("--data", required=True, help="a data set, or a jsonl of your own")
    prompts.add_argument("--data-path", help="the data set's folder or file")
    prompts.add_argument("--target", required=True, help='the model to act as, "LLaMA2 7B"')
    prompts.add_argument("--teachers", required=True, help="model names, comma separated")
    prompts.add_argument("--no-roleplay", action="store_true", help="ask without role play")
    prompts.add_argument("--out", required=True, help="folder for TEACHER.jsonl")
    votes = commands.add_parser("vote", help="join teachers' answers into labels.jsonl")
    votes.add_argument("answers", nargs="+", help="one batch output file per teacher")
    votes.add_argument("--out", required=True, help="labels file to write")
    votes.add_argument("--shuffle", type=int, metavar="SEED", help="random, same sizes (table 1)")
    args = parser.parse_args()
    try:
        if args.command == "vote":
            records, report = count_votes(read_answers(args.answers), len(args.answers))
            if args.shuffle is not None:
                records = shuffle_labels(records, args.shuffle)
            write_jsonl(args.out, records)
            print("\n".join(f"{key}: {value}" for key, value in report.items()))
            return
        split = "all" if in_one_file(args.data, args.data_path) else "train"
        examples = load_dataset(args.data, args.data_path, split)
        for teacher in args.teachers.split(","):
            file = Path(args.out) / f"{teacher.strip().replace('/', '_')}.jsonl"
            asked = [(e, roleplay_prompt(e, args.target, not args.no_roleplay)) for e in examples]
            write_jsonl(file, (batch_request(e.id, teacher.strip(), text) for e, text in asked))
            print(f"{file}: {len(examples)} requests")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
