"""Everything about text: tokenizer, data sets, teachers' votes, tokenised batches, checked answers.

One example's way: `load_dataset` reads it, `vote` (or a labels file) calls it S1 or S2, `tokenize`
turns it into tokens, `collate` masks its prompt out of the loss, `is_correct` and `reward_parts`
judge what a model answered. Two commands serve the sample splitter:

    python data.py prompts --data gsm8k:DIR --target "LLaMA2 7B" --teachers A,B --out requests
    python data.py vote answers/*.jsonl --out labels.jsonl

Then comes the toy world (facts for System 1, a string machine for System 2), and last the sandbox
that runs code answers. Left out: calling teachers. The requests are in the batch format that
services and vLLM take.
"""

import __future__

import argparse
import ast
import builtins
import csv
import ctypes
import gzip
import hashlib
import importlib
import io
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
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

# torch is imported where batches are made: the sandbox starts this file twice for every answer.

# -------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """A checkpoint's tokenizer: `tokenizer.json` (tokenizers) or `tokenizer.model` (sentencepiece).

    bos_id: the token the model wants in front, None if it wants none. eos_ids: every token that
    ends an answer; SFT trains the first. pad_id: for a caller's own padding; nothing here reads it.
    ValueError, one line, on files that do not fit.
    """

    def __init__(self, path):
        self.folder = folder = Path(path)
        self.settings = read_fields(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in self.settings:  # as transformers: then the map wins
            self.settings |= read_fields(folder / "special_tokens_map.json")
        self.special_tokens = {}  # "bos_token", "eos_token" ..: the token's text
        for kind, token in self.settings.items():
            if kind.endswith("_token") and not isinstance(token, bool):
                self.special_tokens[kind] = text_of_token(token)
        file, load = folder / "tokenizer.json", self.load_json
        if not file.exists():
            file, load = folder / "tokenizer.model", self.load_sentencepiece
        if not file.exists():
            raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model")
        try:
            bos, eos, puts_bos, id_of = load(file)
            named_eos = id_of(self.special_tokens.get("eos_token", ""))
            pad = id_of(self.special_tokens.get("pad_token", ""))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file}: {error}") from None
        eos = eos if named_eos is None else named_eos
        self.bos_id = bos if self.settings.get("add_bos_token", puts_bos) else None
        model = read_fields(folder / "config.json") | read_fields(folder / "generation_config.json")
        ends = model.get("eos_token_id", [])
        ends = [eos, *(ends if isinstance(ends, list) else [ends])]
        ends = [i for i in ends if i is not None]
        self.vocab_size = model["vocab_size"] if type(model.get("vocab_size")) is int else 10**9
        if not ends or not all(type(i) is int and 0 <= i < self.vocab_size for i in ends):
            where = f"{folder}: config.json, generation_config.json and tokenizer"
            raise ValueError(f"{where} name {str(ends)[:40]} as eos_token_id: no ids of the model")
        self.eos_ids = tuple(dict.fromkeys(ends))
        self.pad_id = self.eos_ids[0] if pad is None else pad
        self.virtual = []  # ids that a baseline of table 6 puts before every prompt
        self.front = self.text_to_ids("\n")  # encode and decode put it before what goes on
        self.adds_space = self.decode(self.text_to_ids("x")) != "x"  # LLaMA's: "x" -> "▁x"

    def named_tokens(self) -> list[str]:
        """Every token that the files beside the vocabulary name: first those with an id, in its
        order, as transformers adds them."""
        by_id = {i: token for token, i in read_fields(self.folder / "added_tokens.json").items()}
        for i, token in self.settings.get("added_tokens_decoder", {}).items():
            by_id[int(i)] = token
        tokens = [by_id[i] for i in sorted(by_id)]
        tokens += [self.settings[kind] for kind in self.special_tokens]
        for kind in ("additional_special_tokens", "extra_special_tokens"):
            more = self.settings.get(kind, [])
            if not isinstance(more, list | dict):
                raise ValueError(f"{kind} is {repr(more)[:40]}, not a list")
            tokens += more.values() if isinstance(more, dict) else more
        texts = [text_of_token(token) for token in tokens]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"a token is {repr(text)[:40]}, no text")
        return [text for text in texts if text]

    def load_json(self, file):
        """-> BOS id, EOS id, does it put the BOS before a text, and (token -> its id)."""
        import tokenizers

        bpe = tokenizers.Tokenizer.from_file(str(file))
        bpe.no_truncation()  # a file carries both if they were on when it was saved
        bpe.no_padding()
        known = {token.content for token in bpe.get_added_tokens_decoder().values()}
        bpe.add_special_tokens([token for token in self.named_tokens() if token not in known])
        self.text_to_ids = lambda text: bpe.encode(text, add_special_tokens=False).ids
        self.ids_to_text = lambda ids: bpe.decode(ids, skip_special_tokens=False)
        first = bpe.encode("x").ids[:1]
        puts_bos = first != self.text_to_ids("x")[:1]
        bos = first[0] if puts_bos else bpe.token_to_id(self.special_tokens.get("bos_token", ""))
        return bos, None, puts_bos, bpe.token_to_id

    def load_sentencepiece(self, file):
        """-> the same as load_json."""
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(str(file))
        ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
        missing = [token for token in self.named_tokens() if token not in ids]
        if missing:  # it would be spelled
            cure = "load the tokenizer with transformers and save it once"
            raise ValueError(f"does not hold {missing[0]!r}, which another file names: {cure}")
        self.text_to_ids = pieces.encode
        self.ids_to_text = lambda ids: pieces.decode([i for i in ids if i < len(pieces)])
        return pieces.bos_id(), pieces.eos_id(), True, ids.get

    def encode(self, text: str, bos=False, eos=False, goes_on=False) -> list[int]:
        """Token ids; bos=True puts the BOS in front where the model wants one and the text does not
        begin with it, as chats may. goes_on: the text continues another one, so LLaMA's tokenizer
        must not add its space."""
        ids = self.text_to_ids(text)
        if goes_on and self.adds_space:
            ids = self.text_to_ids("\n" + text)[len(self.front) :]
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if max(ids, default=0) >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: token id {max(ids)} is not below vocab_size {self.vocab_size}"
            )
        if bos:
            ids = self.virtual + ids
        return ids + [self.eos_ids[0]] if eos else ids

    def decode(self, ids) -> str:
        """Text of new tokens, special ones included; the EOS that ended an answer and ids beyond
        the vocabulary (padded heads) are left out. Decoded after a new line: LLaMA's tokenizer
        drops the first space of a text that is decoded alone."""
        ids = list(ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self.ids_to_text(self.front + ids).removeprefix(self.ids_to_text(self.front))

    def chat(self, messages: list[dict]) -> str:
        """The checkpoint's chat template, rendered up to where the assistant begins, in jinja2's
        sandbox as the ecosystem does. ValueError if there is no template, or it refuses."""
        words = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self.template.render(messages=messages, **words, **self.special_tokens)
        except Exception as error:  # a template may raise anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
            raise ValueError(f"{self.folder}: no chat template that works: {reason}") from None

    @cached_property
    def template(self):
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            settings = {"separators": separators, "sort_keys": sort_keys}
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)

        text = self.settings.get("chat_template")
        if (self.folder / "chat_template.jinja").exists():
            text = (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(text, list):  # several named templates
            text = {t["name"]: t["template"] for t in text}
        if isinstance(text, dict):
            text = text.get("default")
        if not isinstance(text, str):
            raise ValueError("chat_template is absent or no text; --prompt plain needs none")
        if not (self.folder / "tokenizer.json").exists():
            raise ValueError("tokenizer.model would spell its tags: save a tokenizer.json")
        # {% generation %} marks the assistant's words for training: an ordinary block here
        text = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", text)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals.update(raise_exception=refuse, strftime_now=time.strftime)
        environment.filters["tojson"] = tojson
        return environment.from_string(text)


def text_of_token(token):
    return token.get("content") if isinstance(token, dict) else token


# ------------------------------------------------------------------------------------------ files


def read_fields(path) -> dict:
    """The fields of a JSON object that are not null, {} if the file is not there; ValueError if it
    is broken."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: value for name, value in fields.items() if value is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as a JSON object ({error})") from None


def read_records(path, columns=None):
    """Yields ("FILE:LINE", record) of a json array, a csv table or a jsonl file, by the file's
    name. columns: those of a table without a header. ValueError names the file and the line."""
    name = str(path).removesuffix(".gz")
    opener = open if name == str(path) else gzip.open
    number = 0  # of the last line read (of an array: its record)
    try:
        with opener(path, "rb") as file:
            if name.endswith(".csv"):
                text = io.TextIOWrapper(file, "utf-8-sig", newline="")  # leaves out the BOM
                records = csv.DictReader(text, columns)
            elif name.endswith(".json"):
                records = json.load(file)
            else:
                records = (json.loads(line) if line.strip() else None for line in file)
            for record in records:
                if not isinstance(record, dict | None):
                    raise ValueError("not a JSON object")
                number = getattr(records, "line_num", number + 1)  # a csv field may hold lines
                if record is not None:
                    yield f"{path}:{number}", record
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, TypeError, RecursionError, csv.Error, zlib.error) as why:
        raise ValueError(f"{path}:{number + 1}: not readable ({why})") from None


def write_jsonl(path, records):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def text_of(record: dict, field: str, where: str) -> str:
    """The text in a field of a record; ValueError names the place where there is none."""
    if not isinstance(record.get(field), str) or not record[field].strip():
        value = repr(record.get(field))[:40]
        raise ValueError(f"{where}: no text in the field {field!r} (it is {value})")
    return record[field]


# -------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Example:
    """One question. `answer` is what SFT trains on; `gold` what a reply is checked against (code:
    the tests that it must pass)."""

    id: str
    question: str
    answer: str
    kind: str  # how a reply is checked: "number", "letter", "code", "exact", "toy"; "text": never
    gold: str = ""
    label: str | None = None  # "S1" or "S2"
    entry: str = ""  # code: the name of the function that `gold` tests
    context: str = ""  # solved examples that stand before the question (MMLU: five)


def one_file(path, pattern: str) -> Path:
    """The path if it is a file, else the one match in the folder."""
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if len(files) != 1:
        raise ValueError(f"{path}: {len(files)} files {pattern} there; name one")
    return files[0]


def gsm8k(path, split):
    """{train,test}.jsonl with question and answer: the solution, #### and the number."""
    file = one_file(path, f"{split}.jsonl")
    for i, (where, record) in enumerate(read_records(file)):
        question = text_of(record, "question", where).strip()
        solution, _, gold = text_of(record, "answer", where).partition("####")
        gold = gold.strip()
        if parse_number(gold) is None:
            raise ValueError(f"{where}: no number after #### in the answer")
        answer = f"<reasoning>\n{solution.strip()}\n</reasoning>\n<answer>\n{gold}\n</answer>"
        yield Example(f"gsm8k/{file.stem}/{i}", question, answer, "number", gold)


def humaneval(path, split):
    """HumanEval.jsonl.gz (or HumanEval+): a prompt to complete, and tests."""
    for where, record in read_records(one_file(path, "Human*")):
        fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        name, prompt, solution, tests, entry = (text_of(record, f, where) for f in fields)
        yield Example(name, prompt, solution, "code", tests, entry=entry)


def mmlu(path, split):
    """{dev,val,test}/SUBJECT_*.csv without header: the question, four choices and the letter; asked
    after the subject's five dev examples."""
    folder = path / {"train": "dev", "validation": "val", "test": "test"}[split]
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"{folder}: no csv file there; mmlu is {MMLU_HOME}")
    for file in files:
        subject = file.stem.rpartition("_")[0]
        words = subject.replace("_", " ")
        context = f"The following are multiple choice questions (with answers) about {words}.\n\n"
        shots = path / "dev" / f"{subject}_dev.csv"
        if split != "train" and shots.exists():
            for question, letter in mmlu_questions(shots):
                context += f"{question} {letter}\n\n"
        for i, (question, letter) in enumerate(mmlu_questions(file)):
            name = f"mmlu/{file.stem}/{i}"
            yield Example(name, question, f" {letter}", "letter", letter, context=context)


def mmlu_questions(file):
    for where, row in read_records(file, ["question", *"ABCD", "letter"]):
        if None in row or row["letter"] not in list("ABCD"):  # too many fields, or too few
            raise ValueError(f"{where}: not question, four choices and a letter")
        choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
        yield f"{row['question'].strip()}\n{choices}\nAnswer:", row["letter"]


INSTRUCTIONS = {  # home; the fields of the question, of what may follow it, of the answer
    "dolly": ("databricks/databricks-dolly-15k", "instruction", "context", "response"),
    "platypus": ("garage-bAInd/Open-Platypus", "instruction", "input", "output"),
    "codealpaca": ("sahil2801/CodeAlpaca-20k", "instruction", "input", "output"),
    "codefeedback": ("m-a-p/CodeFeedback-Filtered-Instruction", "query", None, "answer"),
}


def instructions(name, path, split):
    """An instruction set, json or jsonl; its answers cannot be checked."""
    _, question, more, answer = INSTRUCTIONS[name]
    for i, (where, record) in enumerate(read_records(one_file(path, "*.json*"))):
        text = text_of(record, question, where).strip()
        if more and str(record.get(more) or "").strip():
            text += "\n\n" + text_of(record, more, where).strip()
        yield Example(f"{name}/{i}", text, text_of(record, answer, where), "text")


def toy(path, split):
    """The toy world that `make_toy` wrote: {train,validation,test}.jsonl."""
    for _, r in read_records(one_file(path, f"{split}.jsonl")):
        yield Example(r["id"], r["question"], r["answer"], "toy", r["answer"], r["system"])


def own_file(path, split):
    """One's own jsonl: the texts "question" and "answer", and "check": "number" (one number in the
    answer, or marked: #### 18), "letter" (A to D; the question holds the choices and ends as it
    should be asked, "Answer:"), "exact", or none: such answers train but cannot be tested. Where
    they are known, "label" (S1 or S2; a row without one does not train) and "id" (else a hash of
    the question)."""
    seen = {}  # id: its question and label
    for where, record in read_records(path):
        question, answer = text_of(record, "question", where), text_of(record, "answer", where)
        check, label = record.get("check") or "none", record.get("label")
        name = record.get("id")
        if name is None:
            name = hashlib.sha256(question.encode()).hexdigest()[:12]
        if check not in ("number", "letter", "exact", "none"):
            raise ValueError(f'{where}: "check" is {check!r}, not number, letter, exact or none')
        if label not in (None, "S1", "S2"):
            raise ValueError(f'{where}: "label" is {label!r}, not S1 or S2')
        asked = question, label
        if type(name) not in (str, int) or seen.setdefault(str(name), asked) != asked:
            why = "no text or number, or another question or label has it"
            raise ValueError(f'{where}: "id" {name!r}: {why}')
        kind = "text" if check == "none" else check
        gold = answer
        if check == "number":
            final = final_part(answer)
            value = marked_number(final if marked(final) is None else marked(final))
            if value is None:
                what = f"not one number to check in the answer {answer[:40]!r}"
                raise ValueError(f"{where}: {what}; mark it: #### 18")
            gold = str(value)
        if check == "letter":
            gold = answer.strip()
            if gold not in tuple("ABCD"):
                raise ValueError(f"{where}: the answer {answer[:40]!r} is not A, B, C or D")
            answer = f" {gold}"
        yield Example(str(name), question, answer, kind, gold, label)


class Source(NamedTuple):
    """Where a data set comes from and who reads its files."""

    read: object  # (path, split) -> yields examples
    splits: dict  # split -> the publisher's split that it is cut from, begin and end of its share
    home: str


ALL_SPLITS = {split: (split, 0, 1) for split in ("train", "validation", "test")}
TRAIN_ALONE = {"train": ("train", 0.05, 1), "validation": ("train", 0, 0.05)}
# one file, for which no publisher's split is named
ONE_FILE = {"train": ("", 0, 0.8), "validation": ("", 0.8, 0.9), "test": ("", 0.9, 1)}
ONE_FILE["all"] = ("", 0, 1)
TEST_ALONE = {"test": ("test", 0, 1)}
GSM8K_HOME = "github.com/openai/grade-school-math, grade_school_math/data: {train,test}.jsonl"
MMLU_HOME = "github.com/hendrycks/test: a folder that holds dev, val and test with csv files"
HUMANEVAL_HOME = "github.com/openai/human-eval: HumanEval.jsonl.gz"
DATASETS = {
    "toy": Source(toy, ALL_SPLITS, "the folder world of a toy run"),
    "gsm8k": Source(gsm8k, TRAIN_ALONE | TEST_ALONE, GSM8K_HOME),
    "mmlu": Source(mmlu, ALL_SPLITS, MMLU_HOME),
    "humaneval": Source(humaneval, TEST_ALONE, HUMANEVAL_HOME),
}
for name, (home, *_) in INSTRUCTIONS.items():
    reader = partial(instructions, name)
    DATASETS[name] = Source(reader, TRAIN_ALONE, f"huggingface.co/datasets/{home}")
OWN_NAMES = (".jsonl", ".jsonl.gz")


def split_spec(spec: str) -> tuple[str, str | None]:
    """NAME, NAME:PATH or a .jsonl of one's own -> (name, path)."""
    name, _, path = spec.partition(":")
    if name in DATASETS:
        return name, path or None
    if not spec.endswith(OWN_NAMES):
        known = ", ".join(DATASETS)
        raise ValueError(f"unknown data set {spec!r}: a .jsonl of your own, or one of {known}")
    return spec, spec


def in_one_file(name: str, path) -> bool:
    """Is this one file that holds no splits: one's own, or one of GSM8K's two?"""
    return name.endswith(OWN_NAMES) or (name == "gsm8k" and Path(path or "").is_file())


def load_dataset(name: str, path, split: str) -> list[Example]:
    """The examples of `split` ("train", "validation", "test") in the publisher's order.

    Where the publisher has no validation split it is 5% of train. One file without splits (one's
    own, or GSM8K's test.jsonl) is cut 80/10/10, or read whole as "all". Both cuts are drawn with a
    fixed seed over the different questions, so the three never overlap. ValueError names an
    unknown set, a missing file or a bad line.
    """
    if name not in DATASETS:
        name, path = split_spec(name)
    source = DATASETS.get(name, Source(own_file, ONE_FILE, "your own"))
    if name in DATASETS and (path is None or not Path(path).exists()):
        where = "say where it is" if path is None else f"nothing at {path}"
        raise ValueError(f"{name}: {where}, {name}:PATH; it comes from {source.home}")
    splits = ONE_FILE if in_one_file(name, path) else source.splits
    if split not in splits:
        raise ValueError(f"{name} has no {split} split; name another data set for this")
    stored, begin, end = splits[split]
    examples = list(source.read(Path(path), stored))
    chosen = take_share(examples, begin, end)
    if not chosen:
        raise ValueError(f"{path}: {len(examples)} examples are too few (asked for: {split})")
    return chosen


def take_share(examples, begin: float, end: float) -> list[Example]:
    """The examples of this share of the different questions, drawn with a fixed seed."""
    questions = list(dict.fromkeys(e.question.strip() for e in examples))
    random.Random(0).shuffle(questions)
    chosen = set(questions[int(begin * len(questions)) : int(end * len(questions))])
    return [e for e in examples if e.question.strip() in chosen]


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


# "System 2", "system No. 1", "S2", "系统二"
SYSTEM = r"(?:(?<![A-Za-z0-9])system[\W_]{0,3}(?:no\W{0,2}|number )?|(?:系统|系統|システム) ?"
SYSTEM += r"|(?<!\w)s)([12１２一二]|one|two)(?![A-Za-z0-9])"
ALONE = re.compile(rf"(?:.*[:：])?[\W_]*{SYSTEM}[\W_]*", re.IGNORECASE)  # "So: **System 2**."
TAG = re.compile(r"</?\w+>|<\|\w+\|>|\\(?:boxed|text)\b")
CLAUSE_END = re.compile(r"[,;.:!?—，；。](?=.*\w)|\bbut\b", re.IGNORECASE)
DENIAL = re.compile(
    r"\b(?:not?|never|without|than|beyond|neither|nor|cannot|rather|instead)\b"
    r"|n['’]t\b|[不非]|ない",
    re.IGNORECASE,
)


def verdict(text: str) -> str | None:
    """The system that a teacher's text names alone on its last line, as it was asked to. Else the
    one that it names alone on other lines, or at the end of its last clause if that denies nothing;
    None if these are both systems, or none."""
    lines = TAG.sub("", after_thoughts(text)).strip().split("\n")
    lines = [line[-200:] for line in lines]
    numbers = [match[1] for match in map(ALONE.fullmatch, lines) if match]
    if ALONE.fullmatch(lines[-1]):
        numbers = numbers[-1:]
    else:
        clause = CLAUSE_END.split(lines[-1])[-1]
        found = list(re.finditer(SYSTEM, clause, re.IGNORECASE))
        ends_with_it = found and not re.search(r"\w", clause[found[-1].end() :])
        if ends_with_it and not DENIAL.search(clause):
            numbers += [match[1] for match in found]
    systems = {"S2" if n.lower() in ("2", "２", "二", "two") else "S1" for n in numbers}
    return systems.pop() if len(systems) == 1 else None


def read_teacher(path) -> dict[str, str]:
    """One teacher's file -> {id: status}: "S1" or "S2", "unclear" (a text without one verdict),
    "refused" (or filtered), "cut" (the text ended at its length limit), "error" (no text).

    Lines are {"id", "label"}, or answers of a batch service: joined by custom_id, never by order.
    ValueError on a second answer, on requests, on the result of a vote, on an empty file.
    """
    statuses = {}
    for where, record in read_records(path):
        if "label" in record:
            name, status = record.get("id"), record["label"]
            if status not in ("S1", "S2"):
                raise ValueError(f'{where}: "label" is {status!r}, not S1 or S2')
        else:
            name, status = record.get("custom_id"), status_of(record)
        if "votes" in record:
            raise ValueError(f"{where}: the result of a vote is no teacher's answer")
        if type(name) not in (str, int) or "url" in record:
            raise ValueError(f'{where}: not a teacher\'s answer with "custom_id", or "id", "label"')
        name = str(name)
        has_verdict = statuses.get(name) in ("S1", "S2")
        if has_verdict and status in ("S1", "S2"):
            raise ValueError(f"{where}: second answer for {name}")
        if not has_verdict:  # a retry may follow what failed
            statuses[name] = status
    if not statuses:
        raise ValueError(f"{path}: no answers")
    return statuses


def status_of(record: dict) -> str:
    """What one answer of a batch service is: see read_teacher. A body may be wrapped
    (response.body) or bare, or Anthropic's, its content a text or a list of parts."""
    try:
        response = record.get("response", record)
        if "result" in record:  # Anthropic's
            message = record["result"]["message"]
            end = message["stop_reason"]
        else:
            choice = response.get("body", response)["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
        content, end = message.get("content"), str(end).lower()
        if isinstance(content, list):  # thoughts are parts of another type
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        code = response.get("status_code") or 200
    except (TypeError, KeyError, IndexError, AttributeError):
        return "error"
    if message.get("refusal") or re.search("filter|safety|refusal|sensitive|prohibited", end):
        return "refused"
    if re.search("length|max|limit|window", end):  # max_tokens, and what services call it
        return "cut"
    if end in ("error", "abort") or not str(code).startswith("2") or not isinstance(content, str):
        return "error"
    return verdict(content) or "unclear"


def count_votes(paths):
    """Teachers' files -> (label records [{id, label, votes}], report lines a person reads).

    Teachers are named by path. Only "S1" and "S2" vote; an example without any vote gets no label.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError("vote: a teacher's file is named twice")
    teachers = {str(path): read_teacher(path) for path in paths}
    asked = Counter(name for statuses in teachers.values() for name in statuses)
    lines = []
    for teacher, statuses in teachers.items():
        if len(teachers) > 1 and all(asked[name] == 1 for name in statuses):
            raise ValueError(f"{teacher}: shares no example with the other teachers")
        counts = Counter(statuses.values())
        counts["missing"] = len(asked) - len(statuses)
        words = [f"{kind} {n}" for kind, n in sorted(counts.items()) if n]
        lines.append(f"{teacher}: {', '.join(words)}")
    records, pairs, agreeing, ties = [], 0, 0, 0
    for name in asked:
        votes = {teacher: s[name] for teacher, s in teachers.items() if name in s}
        ballots = [v for v in votes.values() if v in ("S1", "S2")]
        n1, n2 = ballots.count("S1"), ballots.count("S2")
        pairs += math.comb(n1 + n2, 2)
        agreeing += math.comb(n1, 2) + math.comb(n2, 2)
        if ballots:
            ties += n1 == n2
            records.append({"id": name, "label": vote(ballots), "votes": votes})
    if not records:
        raise ValueError(f"no teacher gave a verdict, so no labels: {'; '.join(lines)[:200]}")
    labels = Counter(record["label"] for record in records)
    agreement = f"; two teachers agree in {agreeing / pairs:.1%}" if pairs else ""
    lines.append(
        f"votes: S1 {labels['S1']}, S2 {labels['S2']}, of them {ties} ties called S2; "
        f"{len(asked) - len(records)} without a vote{agreement}"
    )
    return records, lines


def shuffle_labels(records, seed: int):
    """The random split of the same sizes (paper, table 1)."""
    moved = [r["label"] for r in records]
    random.Random(seed).shuffle(moved)
    return [{"id": r["id"], "label": label} for r, label in zip(records, moved)]


def label_examples(examples: list[Example], labels: str) -> list[dict]:
    """Label records, {"id", "label"}, of the examples that have a label. labels: a labels.jsonl of
    such records, the authors' csv (columns question and _result, System1 or System2), or "steps:K":
    of GSM8K alone, S1 where a solution has at most K <<...>> calculations, else S2 (a stand-in for
    users without teacher answers, not the paper's method). ValueError where no label fits."""
    label_of = {}
    key = "question" if labels.endswith(".csv") else "id"
    if re.fullmatch(r"steps:\d{1,9}", labels):
        for e in examples:
            if e.id.startswith("gsm8k/"):
                label_of[e.id] = "S1" if e.answer.count("<<") <= int(labels[6:]) else "S2"
        if not label_of:
            raise ValueError(
                f"--labels {labels} counts the calculations of GSM8K's solutions alone"
            )
    else:
        for where, record in read_records(labels):
            label = record.get("label") or verdict(str(record.get("_result")))
            if label not in ("S1", "S2") or record.get(key) is None:
                raise ValueError(f'{where}: needs "{key}" and a label of System 1 or System 2')
            if label_of.setdefault(str(record[key]).strip(), label) != label:
                raise ValueError(f"{where}: another label for {str(record[key])[:60]!r}")
    records = []
    for e in examples:
        name = getattr(e, key).strip()
        if name in label_of:
            records.append({"id": e.id, "label": label_of[name]})
    if not records:
        theirs, ours = next(iter(label_of), "nothing"), getattr(examples[0], key)
        raise ValueError(f"{labels}: no label fits: it has {theirs[:60]!r}, the data {ours[:60]!r}")
    return records


# ---------------------------------------------------------------------------- tokens and batches

FORMAT = """\
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""


def prompt_and_answer(example: Example, tokenizer, style: str, stage: str):
    """The words every stage asks in, and the answer SFT trains on: (prompt, answer) texts.

    "plain": the question and a new line (none after code and after "Answer:"). "chat": the question
    in the checkpoint's own template. "authors": as their script, in stage "sft" the bare question
    and a solution that ends in #### n, elsewhere the template with their system prompt.
    """
    question, answer = example.context + example.question, example.answer
    if style == "authors" and stage == "sft":
        if example.kind == "number" and "<reasoning>\n" in answer:
            solution = answer.partition("<reasoning>\n")[2].partition("\n</reasoning>")[0]
            answer = f"{solution}\n#### {example.gold}"
        return question, answer
    if style == "plain":
        continues = example.kind in ("code", "letter")
        return question if continues else question + "\n", answer
    if example.kind == "code":
        question = f"Complete this Python function.\n```python\n{question}```"
    system = [{"role": "system", "content": FORMAT}] if style == "authors" else []
    return tokenizer.chat([*system, {"role": "user", "content": question}]), answer.strip()


def example_ids(example: Example, tokenizer, style="plain", stage="sft"):
    """-> prompt ids, answer ids with EOS. They are encoded apart, as a model that answers sees the
    prompt alone. The authors' SFT puts an EOS between them."""
    prompt, answer = prompt_and_answer(example, tokenizer, style, stage)
    prompt_ids = tokenizer.encode(prompt, bos=True)
    if style == "authors" and stage == "sft":
        return prompt_ids + [tokenizer.eos_ids[0]], tokenizer.encode(answer, eos=True)
    return prompt_ids, tokenizer.encode(answer, eos=True, goes_on=True)  # without a leading space


class Encoded(NamedTuple):
    """A question and its answer as token ids; the loss begins after the prompt."""

    ids: list[int]
    prompt_length: int


def tokenize(examples, tokenizer, max_length: int, style="plain", stage="sft"):
    """-> list of Encoded, and counts {"left out": prompts as long as max_length, "cut": answers cut
    at it}. At least one answer token always stays; EOS ends the answer unless it was cut."""
    encoded, counts = [], {"left out": 0, "cut": 0}
    for e in examples:
        prompt, answer = example_ids(e, tokenizer, style, stage)
        if len(prompt) >= max_length:
            counts["left out"] += 1
            continue
        counts["cut"] += len(prompt + answer) > max_length
        encoded.append(Encoded((prompt + answer)[:max_length], len(prompt)))
    return encoded, counts


def collate(encoded, device="cpu"):
    """(ids, prompt length) pairs -> tokens, labels (B, T) int64, right padded; labels are -100 on
    the prompt and on padding. The padding id is 0 and nobody reads it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = [torch.tensor(e.ids) for e in encoded]
    labels = []
    for ids, prompt_length in encoded:
        labels.append(torch.tensor([-100] * prompt_length + ids[prompt_length:]))
    return pad_sequence(tokens, True).to(device), pad_sequence(labels, True, -100).to(device)


def batches(encoded, size: int, device="cpu"):
    """Collated batches of at most `size` examples of similar length (sorted: little padding)."""
    ordered = sorted(encoded, key=lambda e: len(e.ids), reverse=True)
    return [collate(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


# --------------------------------------------------------------- what the answer of a reply is

# Models run on into thousands of spaces and digits, so no pattern here backtracks over them.
THOUGHT = r"(?:\w+:)?(?:think|thinking|thoughts?|reflection|scratchpad|analysis) ?"
THOUGHT_END = re.compile(
    rf"</{THOUGHT}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
THOUGHT_BEGIN = re.compile(
    rf"<{THOUGHT}>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|channel\|>analysis", re.IGNORECASE
)
TURN = re.compile(
    r"<\|start_header_id\|>\w+<\|end_header_id\|>|<[|｜][^|｜\s]{1,40}[|｜]>|</?s>|<(?:eos|unk|pad)>"
    r"|<(?:end|start)_of_turn>|\[/?INST\]"
    r"|^(?:> ?)?(?:#+ *|\**)(?:human|user|instructions?|用户"
    r"|(?P<task>input|response|exercise|example|task|question|q|problem|题目|习题|问题|问|問題|質問))"
    r"(?:(?: ?#?\d{1,3})?[. *]{0,4}(?:[:：]|\n|\Z)| ?#?\d{1,3}[.)] )",
    re.MULTILINE | re.IGNORECASE,
)
DIGIT = re.compile(r"\d")
LEAD_IN = re.compile(r"\s*(?:let|sure|okay|given|first|we|to|i'll|i will|here)\b", re.I)


def after_thoughts(reply: str) -> str:
    """The text after a reply's last closed thought, cut at an unclosed one."""
    ends = [m.end() for m in THOUGHT_END.finditer(reply)]
    reply = reply[ends[-1] :] if ends else reply
    begin = THOUGHT_BEGIN.search(reply)
    return reply[: begin.start()] if begin else reply


def final_part(reply: str) -> str:
    """The part of a reply that answers: after its last thought, before the next turn into which a
    base model runs on. All that reads a reply begins here."""
    reply = after_thoughts(reply)
    if reply.lstrip().startswith("<reasoning>") and "</answer>" in reply:
        return reply[: reply.index("</answer>") + len("</answer>")]
    begin, digit = 0, None
    for turn in TURN.finditer(reply):
        if reply[begin : turn.start()].strip():
            digit = digit or DIGIT.search(reply, begin)
            answered = digit and digit.start() < turn.start()
            repeats_task = turn["task"] and LEAD_IN.match(reply, begin) and not answered
            if not repeats_task:
                return reply[begin : turn.start()]
        else:
            begin = turn.end()  # it only opens the answer's own turn
    return reply[begin:]


def in_tags(text: str) -> str | None:
    """What stands in the last <answer> that is closed; None without one."""
    _, opened, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    return inside.partition("</answer>")[0] if opened else None


# GSM8K's mark "#### 18"; before a word, or "1. " and a word, it is Markdown's heading
HASHES = re.compile(r"####(?![^\w\n]{0,9}\d{1,2}[.)][^\w\n]{1,4}[^\W\d])([^\w\n]{0,9}\d[^\n]*)")


def marked(text: str) -> str | None:
    """What a reply marks as its answer: inside the last <answer>, else in the last \\boxed{}, else
    after the first #### (a base model runs on into more); None if it marks nothing."""
    inside = in_tags(text)
    if inside is not None:
        return inside
    _, boxed, inside = text.rpartition("\\boxed{")
    if not boxed:
        hashes = HASHES.search(text)
        return hashes[1] if hashes else None
    depth = 1
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return inside[:i]
    return inside.partition("\n")[0]


# A number. Currency signs and codes may stand before it, and letters of a script without spaces;
# a Latin letter, a digit or a point would make it something else.
DECIMAL = r"(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^√\0])(?<![A-Za-z]-)(?:(?:[A-Z]{3}|US|Rs|Rp|RM|kr)\.? ?)?"
    # a sign is not the dash of "so - 18"
    r"(?P<sign>[-+–](?! )|−|(?:(?<=is )|(?<!\w ))[-–]|minus |negative )? ?[$€£¥₹]? ?"
    rf"(?:(?P<whole>\d{{1,3}}) (?=\d{{1,2}} ?/ ?\d))?(?P<top>{DECIMAL})"
    rf"(?: ?/ ?(?P<bottom>{DECIMAL}))?"
    # what makes it no plain number: 1e5, 12:30, 6x3, 10^2, 0.(3), 2√3, 5k, 1.2万
    r"(?P<spoiled>(?:[eE][-+]?|[.,:/xX]|\*\*)\d[\d.,:/]*|\.?\(\d|\^-?\d*|[_²³⁰-⁹]|[kKMBx]\b"
    r"|(?<!\d{4})(?: \d{3}\b)+|\.?\s?[½¼¾⅐-⅞√π∞万亿\0])?"
)
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")  # after the 2 of "2nd"
GROUPED = re.compile(r"\d+|\d{1,3}(?:,\d{2,3})*,\d{3}")  # 1,000 and India's 1,00,000; not 3,5
FORMULA = re.compile(  # 5!, 7(x + 3), 18 + x, 5x; not $18/h
    r"[<>≤≥±\0]|\d[!(]|(?<![A-Za-z])[-+*] ?[A-Za-z]\b|/ ?[xyzn]\b|\d ?[xyzn]\b|\b[xyzn] ?[-+*/^]"
)
BULLET = re.compile(r"^[ \t]*[-+*•][ \t]+", re.M)
WIDE = str.maketrans("，．－／％＄￥~", ",.-/%$¥ ")
WRAPPER = re.compile(
    r"\\(?:(?:text|math)(?:bf|it|rm|sf|up)?|boldsymbol|underline|operatorname|[fm]box|boxed) ?"
    r"\{([^{}]*)\}"
)
FRACTION = re.compile(r"\\[dtc]?frac ?(?:\{ ?(-?[\d.,]+) ?\}|(\d)) ?(?:\{ ?([\d.,]+) ?\}|(\d))")
SPACE = re.compile(  # LaTeX that changes how a number looks, not what it is
    r"\\(?:[,;:! ()\[\]]|(?:left|right|q?quad|approx|sim|displaystyle|implies|therefore|Rightarrow"
    r"|hline|(?:begin|end|tag|(?:text)?color) ?\{[^{}]*\})(?![a-zA-Z]))"
    r"|\^ ?(?:\\circ|\{ ?\\circ ?\})|(?<=[a-z]\})\^\{\d\}"  # 90^\circ, \text{cm}^{2}
    r"|(?<!\d)\*\*|\*\*(?!\d)|`|\$\$|<<[^<>]*>>|__|</?[a-z]{1,9}>"
)
COMMAND = re.compile(r"\\[a-zA-Z]+ ?(?:\{[^{}]*\})*(?![{a-zA-Z])|\^\{[^{}]*\}")


def plain(text: str) -> str:
    """Strips Markdown and LaTeX that do not change the meaning: **18**, \\boxed{1{,}000},
    \\text{18} eggs, \\frac12. Any other command becomes \\0, so that \\sqrt{3} is not read as 3."""
    text = text.replace("\0", " ").replace("{,}", ",").translate(WIDE)
    text = re.sub(r"\\\\(?:\[\w{0,9}\])?", "\n", text)
    text = re.sub(r"(?<=\d)(?:\\[,;:!]|,\\!|[\u00a0\u2009\u202f'’])(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\([$%#&])", r"\1", SPACE.sub(" ", text))
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    for _ in range(6):  # the innermost commands first
        text, count = COMMAND.subn("\0", WRAPPER.sub(r"\1", text))
        if not count:
            break
    text = re.sub(r"\\[a-zA-Z]+", "\0", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"[{}#]", " ", text)).strip(" \t\r\n*_")


def decimal(text: str):
    """1,000.5 as an exact Fraction; None where a comma does not part thousands."""
    digits = text.partition(".")[0]
    if len(text) > 200 or (digits and not GROUPED.fullmatch(digits)):
        return None
    return Fraction(text.replace(",", ""))


def value_of(number: re.Match):
    """A match of NUMBER as an exact Fraction; None if it is spoiled, 1/0, 3,5, or absurdly long."""
    top, bottom = decimal(number["top"]), decimal(number["bottom"] or "1")
    if number["spoiled"] or top is None or not bottom:
        return None
    value = int(number["whole"] or 0) + top / bottom  # 2 1/2
    return -value if number["sign"] not in (None, "+") else value


def parse_number(text: str):
    """The value of a text that is one number and nothing more, else None: 18, 18., $18, 1,000,
    -3.50, 3/4, 2 1/2, 50%. Exact (Fraction): 18.00 equals 18."""
    text = plain(text).removesuffix(".").removesuffix("%").strip()
    number = NUMBER.match(text)
    return value_of(number) if number and number.end() == len(text) else None


def all_numbers(text: str) -> list[re.Match]:
    return [n for n in NUMBER.finditer(text) if not ORDINAL.match(text, n.end())]


def marked_number(text: str):
    """The number in a marked answer, or None: the only one, or the only one after its last "="."""
    before, _, text = plain(text).rpartition("=")
    if re.search(r"=.*[,;] ", before):  # x = 7, y = 8
        return None
    numbers = all_numbers(text)
    return value_of(numbers[0]) if len(numbers) == 1 and not FORMULA.search(text) else None


def final_number(reply: str):
    """The number a reply gives as its answer (a Fraction), or None. Where the reply marks its
    answer only that counts (`marked_number`), else its last number."""
    text = final_part(reply)
    if marked(text) is not None:
        return marked_number(marked(text))
    numbers = all_numbers(plain(BULLET.sub("", text)))
    return value_of(numbers[-1]) if numbers else None


# One of four letters, alone: "A or B" and "B, C" are none.
LETTER = (
    r"(?<![A-Za-z0-9])([A-D])(?![A-Za-zÀ-ɏ0-9+]|['’]\w| is (?:wrong|not)\b"
    r"|\W{0,3}(?:[,/]|or\b|and\b) ?\(?[A-D]\b(?! is\b))"
)
BEFORE = r"[^\w\n]{0,6}(?:(?i:option|choice) )?"  # what may stand before it
KEYWORD = r"(?:(?i:\banswer|\bchoose|\b(?:correct|right|best) (?:option|choice))"
KEYWORD += r"|答案|정답|答え|正解|正确选项|选(?!项))"
# the rest of a sentence up to its letter, but not over another one or "not"
NOT = r"(?i:\bnot\b|n't|\bcannot\b|\bmight\b)|\b[A-D]\b"
WORDS = rf"(?:(?!{NOT})[^\n.!?。]){{0,40}}?"
SAID_LETTER = re.compile(  # "The correct answer to this must be: B", "Answer\n\nB", "B is correct"
    rf"{KEYWORD}(?:{WORDS}(?:\bis|\bbe|[:：=]|是|为|は)(?::\s{{1,3}}|{WORDS}))?{BEFORE}{LETTER}"
    rf"|^\W{{0,4}}(?i:(?:(?:the|final|correct) )*answer)\W{{1,8}}{LETTER}"
    rf"|{LETTER}(?:\W{{0,3}} is (?:the )?(?:correct|right)\b|是?正确)",
    re.MULTILINE,
)
# "B" or "B. Paris" and a blank line, after which a model may run on; not a list of choices
FIRST_PARAGRAPH = re.compile(
    rf"{BEFORE}{LETTER}(?:[.)][^\n]*|[^\w\n:：]*)(?:\Z|\n\n(?!\W{{0,6}}[A-D]\b))"
)
FIRST_LETTER = re.compile(rf"{BEFORE}(?!A (?!is\b)[a-z]){LETTER}")
LAST_LETTER = re.compile(rf"(?:(?!{NOT}).)*{LETTER}\W*")  # "Therefore, B."


def final_letter(reply: str):
    """The one choice that a reply says is its answer, or begins with, or ends in."""
    text = final_part(reply)
    text = plain(text if marked(text) is None else marked(text))
    letter = FIRST_PARAGRAPH.match(text) or SAID_LETTER.search(text) or FIRST_LETTER.match(text)
    letter = letter or LAST_LETTER.fullmatch(text.rpartition("\n")[2])
    return letter[letter.lastindex] if letter else None


def is_correct(example: Example, reply: str, unconfined=False) -> bool:
    """Does the reply give the right answer? Numbers are compared as numbers, letters as letters,
    code by running the problem's tests in a sandbox (unconfined: see passes_tests), the toy's
    and one's own "exact" texts as texts. ValueError for a set whose answers cannot be checked."""
    if example.kind == "number":
        value = final_number(reply)
        return value is not None and value == parse_number(example.gold)
    if example.kind == "letter":
        return final_letter(reply) == example.gold
    if example.kind == "code":
        return passes_tests(example, reply, unconfined)
    if example.kind == "exact":
        text = final_part(reply)
        # the whole reply and the text before a turn: what looks like a turn may be its first line
        replies = [text, reply, TURN.split(text, 1)[0], in_tags(text) or ""]
        return example.gold.strip() in [text.strip() for text in replies]
    if example.kind == "toy":  # the last state of the string machine decides, spaces do not
        return reply.rpartition(";")[2].split() == example.gold.rpartition(";")[2].split()
    raise ValueError(f"{example.id}: answers of this data set cannot be checked")


def reward_parts(example: Example, reply: str, unconfined=False) -> dict[str, float]:
    """The parts of the GRPO reward; the reward is their sum.

    Where the reference answer has tags, the authors' five, repaired where they punish good replies:
    2.0 for a correct <answer> (compared as numbers), 0.5 for an integer in it, 0.5 for the strict
    format, 0.5 for the loose one, 0.125 for each tag that occurs once, less 0.001 per character
    after </answer>. Else 1.0 if the reply is correct.
    """
    if example.kind != "number" or "<answer>" not in example.answer:
        return {"correct": float(is_correct(example, reply, unconfined))}
    inside = in_tags(final_part(reply)) or ""
    value, alone = marked_number(inside), parse_number(inside)
    body = reply.strip()
    ends = body.startswith("<reasoning>\n") and body.endswith("\n</answer>")
    body = body.removeprefix("<reasoning>\n").removesuffix("\n</answer>")
    strict = ends and "\n</reasoning>\n<answer>\n" in body
    before, closed, tail = reply.rpartition("</answer>")
    loose = re.search(r"</reasoning>\s*<answer>", before.partition("<reasoning>")[2])
    names = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    tags = sum(reply.count(name) == 1 for name in names)
    excess = len(tail.removeprefix("\n")) if closed else 0
    return {
        "correct": 2.0 * (value is not None and value == parse_number(example.gold)),
        "integer": 0.5 * (alone is not None and alone.denominator == 1),
        "strict": 0.5 * strict,
        "loose": 0.5 * bool(loose),
        "tags": 0.125 * tags - 0.001 * excess,
    }


def in_parallel(function, items) -> list:
    """[function(*item) ...], on as many threads as this process may use cores; torchrun's processes
    share them, as code answers have a time limit."""
    available = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, available // processes)) as pool:
        return list(pool.map(lambda item: function(*item), items))


# ---------------------------------------------------------------------------------- the toy world

ENTITIES, COLOURS, PHRASINGS, LETTERS = 80, 24, 8, "abcdefgh"
# each operator: the old positions of its letters; WRONG: how the pretraining corpus mistakes it
OPERATORS = {"rev": (3, 2, 1, 0), "rot": (1, 2, 3, 0), "swp": (1, 0, 2, 3)}
WRONG = {"rev": (1, 2, 3, 0), "rot": (3, 0, 1, 2), "swp": (0, 1, 3, 2)}
SLIP = {"rot": 0.5, "swp": 0.5, "rev": 0.25}  # how often the pretraining corpus gets each one wrong
TEACHERS = (0.85, 0.95, 0.75, 0.9, 0.8)  # how often each of the five is right
TOY_TOKENS = ["<eos>", "A", "F", "M", "|", ";", *LETTERS, *OPERATORS]
TOY_TOKENS += [f"t{i}" for i in range(PHRASINGS)] + [f"e{i}" for i in range(ENTITIES)]
TOY_TOKENS += [f"c{i}" for i in range(COLOURS)]


def run_machine(question, slip=lambda name: False):
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
            machine[question] = "S2", question, run_machine(question)
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
                answer = run_machine(question, lambda name: rng.random() < SLIP[name])
            examples.append(Example(f"corpus/{len(examples)}", question, answer, "toy"))
        return examples

    def teacher_answers(self, right: float):
        """A teacher's batch answers; each names the true system with probability `right`."""
        answers = []
        for r in self.splits["train"]:
            is_right = self.rng.random() < right
            system = r["system"] if is_right else {"S1": "S2", "S2": "S1"}[r["system"]]
            content = f"I would answer this as asked.\nSystem{system[1]}"
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
    prompts.add_argument("--data", required=True, help="NAME, NAME:PATH or a jsonl of your own")
    prompts.add_argument("--target", required=True, help='the model to act as, "LLaMA2 7B"')
    prompts.add_argument("--teachers", required=True, help="model names, comma separated")
    prompts.add_argument("--examples", type=int, help="only so many")
    prompts.add_argument("--no-roleplay", action="store_true", help="ask without role play")
    prompts.add_argument("--out", required=True, help="folder for TEACHER.jsonl")
    votes = commands.add_parser("vote", help="join teachers' answers into labels.jsonl")
    votes.add_argument("answers", nargs="+", help="one file per teacher: batch output, or labels")
    votes.add_argument("--out", required=True, help="labels file to write")
    votes.add_argument("--shuffle", type=int, metavar="SEED", help="random, same sizes (table 1)")
    args = parser.parse_args()
    try:
        if args.command == "vote":
            if Path(args.out).resolve() in [Path(path).resolve() for path in args.answers]:
                raise ValueError(f"--out {args.out} is one of the answers")
            records, lines = count_votes(args.answers)
            if args.shuffle is not None:
                records = shuffle_labels(records, args.shuffle)
            write_jsonl(args.out, records)
            print("\n".join([*lines, f"written: {args.out}"]))
            return
        name, path = split_spec(args.data)
        examples = load_dataset(name, path, "all" if in_one_file(name, path) else "train")
        examples = list({e.id: e for e in examples}.values())[: args.examples]
        teachers = [teacher.strip() for teacher in args.teachers.split(",")]
        files = {}
        for teacher in teachers:
            files[Path(args.out) / f"{teacher.replace('/', '_')}.jsonl"] = teacher
        if not all(teachers) or len(files) < len(teachers):
            raise ValueError(f"--teachers {args.teachers}: an empty name, or one named twice")
        if not args.target.strip() or (args.examples is not None and args.examples < 1):
            raise ValueError("--target needs a name, --examples a number from 1")
        for file, teacher in files.items():
            if file.exists():  # the data, or answers that were paid for
                raise ValueError(f"{file} exists: name another --out")
            requests = []
            for e in examples:
                text = roleplay_prompt(e, args.target, not args.no_roleplay)
                requests.append(batch_request(e.id, teacher, text))
            write_jsonl(file, requests)
            print(f"{file}: {len(requests)} requests")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------- running code safely
#
#   this program --job--> judge (trusted: runs the problem's tests) --calls--> candidate (the code)
#                <-verdict-  imports numpy, no filter               <-results-  under seccomp
#
# A job is the problem and the reply. A call's arguments and a result cross as the text of Python
# literals, an exception as its name. The judge's last line is the verdict: "passed", "failed", or
# why there is none. Killing the judge's process group ends both.

SECONDS = 10  # a candidate's wall clock and CPU; the verdict comes within SECONDS + 5
MEMORY, MESSAGE = 1 << 30, 1 << 17  # bytes: address space, one answer


class SandboxError(RuntimeError):
    """The sandbox itself cannot run: that is no verdict about an answer."""


def passes_tests(example: Example, reply: str, unconfined=False) -> bool:
    """Does the code pass the problem's own tests? (HumanEval; Chen et al. 2021)

    The tests run in one process, the code in another without environment, terminal, or much time
    and memory. Before the code runs, a list of harmless modules is loaded, for it to import;
    then a seccomp filter of the Linux kernel (`confine`) leaves it about thirty system calls, which
    read and write what is open (two pipes to the judge), manage memory and tell the time.

    Where there is no seccomp (not Linux on x86-64 or aarch64) it raises SandboxError, unless
    unconfined=True lets the code run with the rights of this program. ValueError names a problem
    whose tests fail before they call the code. Not protected against: bugs of the kernel, side
    channels, and a candidate that recognises the test inputs and answers from memory. Honest code
    that needs a file or a thread fails, and NaN does not cross.
    """
    job = {"prompt": example.question, "tests": example.gold, "entry": example.entry}
    job |= {"reply": reply, "unconfined": unconfined}
    if unconfined:
        warnings.warn("code may run unconfined, with the rights of this program", stacklevel=2)
    try:
        judge = start_process("judge")
    except OSError as error:
        raise SandboxError(f"the sandbox cannot start: {error}") from None
    try:
        out, _ = judge.communicate(json.dumps(job).encode(), timeout=SECONDS + 5)
    except subprocess.TimeoutExpired:  # what the candidate gave made the tests themselves hang
        out = b""
    finally:
        with suppress(ProcessLookupError):  # the judge, and the candidate in its group
            os.killpg(judge.pid, signal.SIGKILL) if os.name == "posix" else judge.kill()
    out = out or judge.communicate()[0]
    last_line = (out.decode().splitlines() or ["the judge ended at once"])[-1]
    if last_line.startswith("broken"):
        raise ValueError(f"{example.id}: the problem's own tests are {last_line}")
    if last_line not in ("passed", "failed"):
        raise SandboxError(f"the sandbox cannot start: {last_line}")
    return last_line == "passed"


def start_process(role: str):
    """This file as one of the sandbox's two processes, with pipes to and from it."""
    return subprocess.Popen(
        [sys.executable, "-I", os.path.abspath(__file__), role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
        cwd="/",
        start_new_session=role == "judge",  # a group to kill: the candidate stays in it
    )


def judge_main():
    """The trusted process: prints "failed" as soon as its candidate runs, then "passed" if it did,
    or what else it found. The last line counts."""
    job = json.loads(sys.stdin.buffer.read())
    for name, value in (("AS", 2 * MEMORY), ("CPU", SECONDS + 5), ("CORE", 0)):
        set_limit(f"RLIMIT_{name}", value)
    verdicts = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tests print is no verdict
    candidate = start_process("candidate")
    calls = 0

    def end(verdict=None):  # at once: an exception the tests might catch
        if verdict:
            print(verdict.partition("\n")[0], file=verdicts)
        candidate.kill()
        candidate.wait()
        os._exit(0)

    def receive():
        line = candidate.stdout.readline(MESSAGE)
        if not line.endswith(b"\n"):  # the candidate has ended, or says too much
            end()
        return ast.literal_eval(line.decode("ascii"))

    def ask(message):
        line = literal(message).encode() + b"\n"
        with suppress(BrokenPipeError):  # then the answer is missing
            candidate.stdin.write(line)
            candidate.stdin.flush()
        return receive()

    def call(*args, **kwargs):
        nonlocal calls
        try:
            literal((args, kwargs))
        except TypeError as error:
            end(f"broken: an argument cannot cross to the code: {error}")
        calls += 1
        kind, value = ask((args, kwargs))
        if kind == "returned":
            return value
        error = getattr(builtins, str(value), None)
        known = isinstance(error, type) and issubclass(error, BaseException)
        if not known or issubclass(error, (StopIteration, StopAsyncIteration)):
            error = RuntimeError  # a StopIteration would end a loop of the tests
        raise error("raised by the candidate")

    names = {"__name__": "tests"}
    try:
        exec(job["prompt"] + "\n    pass\n", names)  # helpers: HumanEval/32, 38, 50
        names[job["entry"]]  # KeyError if it is not defined
    except BaseException as error:
        end(f"broken: the prompt defines no {job['entry']}: {type(error).__name__}: {error}")
    threading.Timer(SECONDS, candidate.kill).start()
    with suppress(BaseException):  # however the answers break the judge, it is no pass
        receive()  # "ready"
        print("failed", file=verdicts)  # so it stands, if nothing follows
        confined = ask((job["prompt"], job["reply"], job["entry"], job["unconfined"]))
        if confined != "confined":  # said before any code of the candidate has run
            end(confined)
        try:
            names["candidate"] = names[job["entry"]] = call  # HumanEval/33 calls it by its name
            exec(job["tests"], names)
            if "check" in names:
                names["check"](call)
            if not calls:
                raise ValueError("they never call the function")
            print("passed", file=verdicts)
        except BaseException as error:
            if not calls:  # the tests broke before any call
                end(f"broken: {type(error).__name__}: {error}")
    end()


# What a candidate may import: modules whose import does nothing but define, and what these would
# import late, when the filter is on already.
HARMLESS = """abc array ast base64 binascii bisect calendar cmath collections
collections.abc contextlib copy csv dataclasses datetime decimal difflib enum fractions functools
gc graphlib hashlib heapq html io itertools json keyword math numbers operator pprint queue
random re secrets statistics string struct sys textwrap time timeit traceback types typing
unicodedata weakref zlib _strptime encodings.rot_13 encodings.cp1252 encodings.utf_8_sig
encodings.hex_codec encodings.unicode_escape""".split()
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
    for name in HARMLESS + (NUMPY if "numpy" in source else []):  # numpy alone is slow to load
        with suppress(ImportError):  # it fails again where the code imports it
            importlib.import_module(name)
    if not confine() and not unconfined:
        return reply("no seccomp here to confine code answers: --allow-unconfined-code runs them")
    reply("confined")
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    run_statements(source, entry, module.__dict__)
    function = module.__dict__.get(entry)
    for line in requests:
        args, kwargs = ast.literal_eval(line.decode("ascii"))
        try:
            result = ("returned", function(*args, **kwargs))
            literal(result)
        except BaseException as error:
            result = ("raised", type(error).__name__)
        reply(result)


def run_statements(source: str, entry: str, names: dict):
    """Runs the source's statements one by one; one that fails does not stop the next. Base models
    go on writing: after the definition that counts (the first) only helpers, imports and constants
    run, but no prints, tests and second tries."""
    helpers = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    helpers |= ast.Assign | ast.AnnAssign
    lazy_annotations = __future__.annotations.compiler_flag  # as if the code had imported it
    kept = {entry, *dir(builtins)}  # names that keep their meaning once the function is found
    found = False
    for statement in ast.parse(source).body:
        if found and (not isinstance(statement, helpers) or bound_names(statement) & kept):
            continue
        with suppress(BaseException):
            one = ast.Module([statement], [])
            exec(compile(one, "candidate", "exec", lazy_annotations, dont_inherit=True), names)
        found = found or defines(statement, entry)


def defines(statement, entry: str) -> bool:
    """Does a statement define the function? A stub that returns nothing does not."""
    if entry not in bound_names(statement):
        return False
    kinds = {type(node) for node in ast.walk(statement)}
    is_assignment = type(statement) in (ast.Assign, ast.AnnAssign)
    return is_assignment or bool(kinds & {ast.Return, ast.Yield, ast.YieldFrom})


def bound_names(statement) -> set[str]:
    """The names that a statement defines or assigns."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return {getattr(statement, "name", None)}
    nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, ast.Store)}


# A fenced block, up to a fence at least as long as the one that opened, or to the end.
BLOCK = re.compile(
    r"^[^\S\n]*(`{3,}|~{3,})(?![`~])[^\n]*\n(.*?)(?:^[^\S\n]*\1[`~]*[^\S\n]*$|\Z)", re.M | re.S
)
FIRST_CODE = re.compile(r"^(?:import |from |async def |def |class |@|\w+ *=)", re.M)


def program(prompt: str, reply: str, entry: str) -> str:
    """The candidate's source, in whatever form a model answers: a body that continues the prompt, a
    whole function, or fenced blocks of either. The first that defines the function is taken."""
    reply = re.sub(r"\r+\n?", "\n", reply.lstrip("\ufeff"))
    name = re.escape(entry)
    definition = re.compile(rf"^[ \t]*(?:async )?def {name}\b|^{name} *(?::[^=\n]+)?=(?!=)", re.M)
    for code in codes_of(reply, definition):
        source = read_code(prompt, code, definition)
        if any(defines(statement, entry) for statement in ast.parse(source).body):
            return source
    return prompt


def codes_of(reply: str, definition: re.Pattern) -> list[str]:
    """What may be code in a reply, the likeliest first:

    1. its blocks that define the function, the last first, each after the helpers before it
    2. the reply as it stands
    3. its other blocks, the first first
    4. what follows prose
    """
    codes = []
    for text in (final_part(reply), reply):  # the second for code whose strings look like a turn
        text = re.sub(r"(?m)(?<=[^\s`])```[^\S\n]*$", "\n```", text)
        whole, others, helpers = [], [], ""
        for _, code in BLOCK.findall(text)[:20]:
            if definition.search(code):
                whole.append(helpers + code)
            else:
                others.append(code)
                if longest_that_parses(code) == code:
                    helpers += code + "\n"
        codes += [*reversed(whole), text, *others]
        starts = [m.start() for m in (FIRST_CODE.search(text), definition.search(text)) if m]
        codes += [text[start:] for start in starts]
    return codes


def read_code(prompt: str, code: str, definition: re.Pattern) -> str:
    """The code after the prompt, as a whole function or as a body, up to its first syntax error."""
    code = re.sub(r"(?m)^from __future__ .*\n", "", code[:20_000])  # parsing takes quadratic time
    if definition.search(code):  # the prompt's own definition is closed
        return longest_that_parses(prompt + "\n    pass\n\n" + textwrap.dedent(code))
    # the first line alone may have lost its indent, or all lines: whichever parses further
    one = longest_that_parses(prompt + "    " + code.lstrip())
    every = longest_that_parses(prompt + textwrap.indent(textwrap.dedent(code), "    "))
    return max(one, every, key=lambda source: source.count("\n"))


def longest_that_parses(source: str) -> str:
    """The source without what follows its first syntax error: prose, or an end cut off."""
    lines = source.split("\n")
    while lines:
        try:
            compile("\n".join(lines), "candidate", "exec")
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or len(lines)  # too deep: no line is named
            del lines[min(line, len(lines)) - 1 :]
    return "\n".join(lines)


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
    if type(x).__module__ == "numpy" and getattr(x, "size", 0) == 1:  # a scalar, or an array of one
        return literal(x.item())
    raise TypeError(f"{type(x).__name__} is not plain data")


def set_limit(name, value):
    try:
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))
    except (ImportError, ValueError, OSError):
        if can_confine():
            raise  # where there is a sandbox, it is whole


# The system calls that a candidate may still make: numbers on x86-64 and aarch64, None: not there.
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


if __name__ == "__main__":
    main()
