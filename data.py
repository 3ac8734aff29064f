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
from dataclasses import dataclass, replace
from decimal import Decimal
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
                bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{folder}/tokenizer.json: {error}") from None
            self._ids = lambda text: bpe.encode(text, add_special_tokens=False).ids
            self._text = lambda ids: bpe.decode(ids, skip_special_tokens=False)
            self._size = 2**32  # the library itself leaves out what it does not know
            names = [self._content(settings, f"{n}_token") for n in ("bos", "eos", "pad")]
            special = [None if name is None else bpe.token_to_id(name) for name in names]
            self.bos_id, eos, self.pad_id = special
            first = bpe.encode("x", add_special_tokens=True).ids[:1]
            wants_bos = settings.get("add_bos_token", first == [self.bos_id])
        elif (folder / "tokenizer.model").exists():
            import sentencepiece

            try:
                pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{folder}/tokenizer.model: {error}") from None
            self._ids, self._text, self._size = pieces.encode, pieces.decode, len(pieces)
            self.bos_id, eos, self.pad_id = pieces.bos_id(), pieces.eos_id(), None
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
        self._front = self._ids("\n")  # what stands before a text that goes on: see encode, decode
        self._adds_space = self.decode(self._ids("x")) != "x"

    @staticmethod
    def _content(settings, name):
        token = settings.get(name)
        return token.get("content") if isinstance(token, dict) else token

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
        """Text of new tokens, special ones included; the EOS that ended an answer and ids beyond
        the vocabulary (padded heads) are left out. Decoded behind a new line: LLaMA's tokenizer
        drops the first space of a text that is decoded alone."""
        ids = [i for i in ids if i < self._size]
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self._text(self._front + ids).removeprefix(self._text(self._front))


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
        with opener(path, "rt", encoding="utf-8-sig") as lines:  # a byte order mark is no text
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
                    if not isinstance(record, dict):
                        raise ValueError(f"{path}:{number}: not a JSON object")
                    yield number, record
    except (OSError, EOFError, UnicodeDecodeError) as error:
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


def _gsm8k(path, split):
    """https://github.com/openai/grade-school-math: {train,test}.jsonl with question, answer."""
    file = path if path.is_file() else path / f"{split}.jsonl"
    for number, record in read_jsonl(file):
        try:
            solution, gold = record["answer"].split("####")
            yield Example(
                id=f"gsm8k/{file.stem}/{number - 1}",
                question=record["question"].strip(),
                answer=f"<reasoning>\n{solution.strip()}\n</reasoning>\n"
                f"<answer>\n{gold.strip()}\n</answer>",
                kind="number",
                gold=gold.strip(),
            )
        except (KeyError, ValueError, AttributeError):
            where = f"{file}:{number}"
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
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), 1):  # "None" stays a string here
                if len(row) != 6 or row[5] not in list("ABCD"):
                    raise ValueError(f"{file}:{number}: not question, four choices and a letter")
                choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5]))
                yield f"{row[0].strip()}\n{choices}\nAnswer:", row[5]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not readable ({error})") from None


def _humaneval(path, split):
    """https://github.com/openai/human-eval: HumanEval.jsonl.gz; it has a test split only."""
    file = path / "HumanEval.jsonl.gz" if path.is_dir() else path
    for number, r in read_jsonl(file):
        try:
            task = r["task_id"], r["prompt"], r["canonical_solution"], "code", r["test"]
            yield Example(*task, entry=r["entry_point"])
        except KeyError as missing:
            raise ValueError(f"{file}:{number}: no field {missing}") from None


def _own(path, split):
    """One's own jsonl: "question", "answer", "check" (number, letter, exact, or none: answers that
    cannot be checked) and, where it is known, "label" (S1 or S2). A letter's question holds the
    choices and ends as it should be asked ("Answer:"). Raises ValueError, naming the line."""
    for number, r in read_jsonl(path):
        question, answer, check = r.get("question"), r.get("answer"), r.get("check") or "none"
        problem = None
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            problem = 'needs the texts "question" and "answer"'
        elif check not in ("number", "letter", "exact", "none"):
            problem = f'"check" is {check!r}, not number, letter, exact or none'
        elif check == "number" and final_number(answer) is None:
            problem = f"no number to check in the answer {answer[:40]!r}"
        elif check == "letter" and answer.strip() not in tuple("ABCD"):
            problem = f"the answer {answer[:40]!r} is not A, B, C or D"
        elif r.get("label") not in (None, "S1", "S2"):
            problem = f'"label" is {r["label"]!r}, not S1 or S2'
        if problem:
            raise ValueError(f"{path}:{number}: {problem}")
        gold = answer.strip() if check == "letter" else answer
        if check == "number":
            gold = str(final_number(answer))
        kind = "text" if check == "none" else check
        answer = f" {gold}" if check == "letter" else answer
        yield Example(f"{path.stem}/{number - 1}", question, answer, kind, gold, r.get("label"))


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
    """Where a data set comes from and who reads its files."""

    read: object  # (path, split) -> examples
    splits: str
    home: str
    hub: tuple = ()  # (dataset repository, file) where the publisher keeps plain json on the Hub


def _instructions(name: str, fields: str, repository: str, file: str | None = None) -> Source:
    """An instruction set of the Hub, json or jsonl; its answers cannot be checked. fields: those of
    the question, of what may follow it, and of the answer."""
    question, more, answer = fields.split()

    def read(path, split):
        if path.is_dir():
            files = [f for f in path.iterdir() if f.name.endswith((".json", ".jsonl", ".jsonl.gz"))]
            if len(files) != 1:
                raise ValueError(f"{path}: {len(files)} json or jsonl files there; name one")
            path = files[0]
        for number, r in read_records(path):
            try:
                parts = [r[question], r.get(more) or ""]
                text = "\n\n".join(part.strip() for part in parts if part.strip())
                yield Example(f"{name}/{number - 1}", text, r[answer] + "", "text")
            except (KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no text in the field {error}") from None

    home = f"huggingface.co/datasets/{repository}" + ("" if file else " (save it as jsonl)")
    return Source(read, "train", home, (repository, file) if file else ())


_DOLLY = "databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"
_FEEDBACK = "CodeFeedback-Filtered-Instruction"
DATASETS = {
    "toy": Source(_toy, "train validation test", "made by make_toy"),
    "gsm8k": Source(_gsm8k, "train test", "github.com/openai/grade-school-math"),
    "mmlu": Source(_mmlu, "train validation test", "github.com/hendrycks/test"),
    "humaneval": Source(_humaneval, "test", "github.com/openai/human-eval"),
    "dolly": _instructions("dolly", "instruction context response", *_DOLLY),
    "platypus": _instructions("platypus", "instruction input output", "garage-bAInd/Open-Platypus"),
    "codealpaca": _instructions(
        "codealpaca", "instruction input output", "sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json"
    ),
    "codefeedback": _instructions(
        "codefeedback", "query - answer", f"m-a-p/{_FEEDBACK}", f"{_FEEDBACK}.jsonl"
    ),
}
SPLIT_SEED = 0  # of the splits that we make ourselves


def is_own(name: str) -> bool:
    """One's own data set is named by its file."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def find_dataset(name: str, path) -> tuple[Source, Path]:
    """The data set's source and files: `path` as it is, or the publisher's file from the Hub."""
    if is_own(name):
        source, path = Source(_own, "", "your own file"), name
    elif name in DATASETS:
        source = DATASETS[name]
    else:
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
    """Is this one file that holds no splits: one's own, or one file of a set that has several?"""
    has_splits = name in DATASETS and DATASETS[name].splits == "train test"  # GSM8K
    return is_own(name) or bool(has_splits and path and Path(path).is_file())


def load_dataset(name: str, path, split: str) -> list[Example]:
    """The examples of `split` ("train", "validation", "test") in the publisher's order.

    Where the publisher has no validation split it is 5% of train. One file without splits (one's
    own, or GSM8K's test.jsonl) is cut 80/10/10, or read whole as "all". Both cuts are drawn with a
    fixed seed, so the three never overlap. ValueError names an unknown set, a missing file or a bad
    line.
    """
    source, path = find_dataset(name, path)
    splits = source.splits.split()
    if in_one_file(name, path):
        examples = list(source.read(path, "train"))
        shares = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1), "all": (0, 1)}
    elif split in splits and (split != "train" or "validation" in splits):
        return list(source.read(path, split))
    elif split in ("train", "validation") and "train" in splits:
        examples = list(source.read(path, "train"))
        shares = {"validation": (0, 0.05), "train": (0.05, 1)}
    else:
        raise ValueError(f"{name} has no {split} split; name another data set for this")
    order = list(range(len(examples)))
    random.Random(SPLIT_SEED).shuffle(order)
    begin, end = (int(share * len(order)) for share in shares[split])
    chosen = set(order[begin:end])
    if not chosen:
        raise ValueError(f"{path}: {len(examples)} examples are too few for a {split} split")
    return [e for i, e in enumerate(examples) if i in chosen]


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


def batch_request(custom_id: str, teacher: str, prompt: str) -> dict:
    """A line of the batch format that services and vLLM take."""
    body = {"model": teacher, "messages": [{"role": "user", "content": prompt}]}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
    return request | {"body": body}


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
        for number, record in read_jsonl(path):
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

# Models run on into thousands of spaces and digits, so no pattern here backtracks over them.
NUMBER = re.compile(
    r"(?<![\w.])([-+−]?) ?[$€£]? ?((?:\d[\d,]*(?:\.\d+)?|\.\d+)(?: ?/ ?\d[\d,]*(?:\.\d+)?)?)"
)
EXPONENT = re.compile(r"[eE][-+]?\d")
OPERATION = re.compile(r" ?(?:=|[-+−*×÷/^x] ?[$€£]?\d)")  # what goes on as an expression
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
BULLET = re.compile(r"^[ \t]*[-+*•][ \t]+", re.M)
ANSWERED = re.compile(r"\d|</answer>|####|\\boxed\{")
NEW_QUESTION = re.compile(r"^[ \t]*(?:\*\*)?(?:Question|Q)(?: ?\d{1,3})?(?:\*\*)?:", re.M)


def _value(number: re.Match):
    """A match of NUMBER as an exact Fraction; None if it is a division by 0 or absurdly long."""
    top, _, bottom = re.sub(r"[ ,]", "", number[2]).partition("/")
    if len(top) + len(bottom) > 200:
        return None
    top, bottom = Fraction(Decimal(top)), Fraction(Decimal(bottom or "1"))
    if not bottom:
        return None
    return -top / bottom if number[1] in ("-", "−") else top / bottom


def parse_number(text: str):
    """The value of a text that is one number and nothing more, else None: 18, 18., $18, 1,000,
    -3.50, 3/4, 50%. Exact (Fraction): 18.00 equals 18. The sign may stand before the currency."""
    text = text.strip().removesuffix(".").strip().removesuffix("%").strip()
    found = NUMBER.fullmatch(text) if len(text) <= 200 else None
    return _value(found) if found else None


def _without_markup(text: str) -> str:
    """Markdown emphasis and LaTeX wrappers taken off: **18**, \\boxed{1{,}000}, \\text{18} eggs."""
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("$$", "$")
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:times|cdot|div)\b", "*", text)
    text = re.sub(r"\*\*|__|[`{}#]|\\[a-zA-Z]+|\\[,;:! ()\[\]]", "", text)
    return text.strip(" \t\r\n*_")


def _marked(text: str) -> str | None:
    """What a reply marks as its answer: inside the last <answer>, else in the line of the last
    ####, else in the last \\boxed{}; None if it marks nothing."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end]
    if "####" in text:
        return text.rpartition("####")[2].lstrip().partition("\n")[0]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin:i]
    return text[begin:].partition("\n")[0]


def _leading(text: str):
    """The number that a text begins with, None if there is none or an expression goes on."""
    found = NUMBER.match(text.lstrip())
    rest = text.lstrip()[found.end() : found.end() + 4] if found else ""
    return None if EXPONENT.match(rest) or OPERATION.match(rest) else found


def _numbers(text: str) -> list[re.Match]:
    """All numbers of a text; letters may follow one as its unit (18km), an exponent may not."""
    rest = [(m, text[m.end() : m.end() + 4]) for m in NUMBER.finditer(text)]
    return [m for m, r in rest if not EXPONENT.match(r) and not ORDINAL.match(r)]


def marked_number(marked: str):
    """The number in a marked answer: the one it begins with, else the right side of its last =,
    else its only number; None if that leaves none."""
    text = _without_markup(marked)
    found = _leading(text) or _leading(text.rpartition("=")[2])
    if not found:
        numbers = _numbers(text)
        found = numbers[0] if len(numbers) == 1 else None
    return _value(found) if found else None


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
    text = completion
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    inside = text[start + len("<answer>") : end] if start >= 0 else ""
    value, alone = marked_number(inside), parse_number(inside)
    body = text.strip()
    strict = body.startswith("<reasoning>\n") and body.endswith("\n</answer>")
    body = body[len("<reasoning>\n") : -len("\n</answer>")]
    strict = strict and "\n</reasoning>\n<answer>\n" in body
    first = text.find("<reasoning>")
    loose = first >= 0 and re.search(r"</reasoning>\s*<answer>", text[first : max(end, 0)])
    tags = sum(text.count(t) == 1 for t in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    tail = text[end + len("</answer>") :].strip() if end >= 0 else ""
    return {
        "correct": 2.0 * (value is not None and value == parse_number(example.gold)),
        "integer": 0.5 * (alone is not None and alone.denominator == 1),
        "strict": 0.5 * strict,
        "loose": 0.5 * bool(loose),
        "tags": 0.125 * tags - 0.001 * len(tail),
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
        judge = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), "judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"the sandbox cannot start: {error}") from None
    try:
        out, _ = judge.communicate(json.dumps(job).encode(), timeout=SECONDS + 5)
    except subprocess.TimeoutExpired:  # what the candidate gave made the tests themselves hang
        out = b""
    finally:
        try:
            os.killpg(judge.pid, signal.SIGKILL)  # the judge, and the candidate in its group
        except ProcessLookupError:
            pass
    out = out or judge.communicate()[0]
    said = out.decode().split("\n")
    if said[0] != "ready":
        raise SandboxError(f"the sandbox cannot start: {said[0] or 'the judge ended at once'}")
    verdict = said[1] if len(said) > 1 else ""
    if verdict not in ("", "passed", "failed"):  # "": the tests themselves hang
        raise SandboxError(verdict)
    return verdict == "passed"


def program(prompt: str, completion: str, entry: str) -> str:
    """The candidate's source, from whatever form a model answers in: a body that continues the
    prompt, a whole function, or Markdown with fenced blocks around either. Of the ways to read it
    the one counts that keeps most of the text up to the first syntax error."""
    text, blocks, inside = [], [], False
    for line in completion.lstrip("\ufeff").splitlines():
        if line.strip().startswith(("```", "~~~")):
            inside = not inside
            if inside:
                blocks.append([])
        elif inside:
            blocks[-1].append(line)
        elif not blocks:
            text.append(line)
    name = re.escape(entry)
    defines = re.compile(rf"^(?:(?:async )?def {name}\b|{name} *(?::[^=\n]+)?=(?!=))", re.M)
    fenced = [textwrap.dedent("\n".join(block)) for block in blocks]
    whole = [i for i, block in enumerate(fenced) if defines.search(block)]
    codes = ["\n".join(text), *fenced[:1]]
    if whole:  # with the blocks before it that are code: helpers, imports
        codes = ["\n".join(b for b in fenced[: whole[-1] + 1] if longest_that_parses(b) == b)]
    readings = []  # (characters kept, source, which definition of the entry counts)
    for code in codes:
        code = re.split(r"<\||</s>|\[/PYTHON\]", code, maxsplit=1)[0]
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
        except SyntaxError as error:
            del lines[max(0, min(error.lineno or 1, len(lines)) - 1) :]
    return "\n".join(lines)


def without_run_on(source: str, entry: str, which: int) -> str:
    """A base model runs on: behind the definition that counts only helpers, imports and constants
    stay; prints, tests and second tries go."""
    kept, seen = [], 0
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = {getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)}
        helper = isinstance(node, ast.Import | ast.ImportFrom) or names - {None}
        seen += entry in names
        if seen <= which or (entry in names and seen == which + 1):
            kept.append(node)
        elif helper and not isinstance(node, ast.For) and not names & {entry, *dir(builtins)}:
            kept.append(node)
    return ast.unparse(ast.Module(kept, []))


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
    if type(x).__module__ == "numpy":  # a scalar, or an array of one element
        return literal(x.item())
    raise TypeError(f"{type(x).__name__} is not plain data")


def judge_main():
    """The trusted process: prints "ready" (or why not), then "passed", "failed", or why the
    candidate could not be confined."""
    job = json.loads(sys.stdin.buffer.read())
    set_limit("RLIMIT_AS", 2 * MEMORY)
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tests print is no verdict
    candidate = subprocess.Popen(
        [sys.executable, "-I", os.path.abspath(__file__), "candidate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )

    def answer():
        line = candidate.stdout.readline(MESSAGE)
        if not line.endswith(b"\n"):
            raise EOFError("the candidate has ended, or says too much")
        return ast.literal_eval(line.decode("ascii"))

    def ask(message):
        candidate.stdin.write(literal(message).encode() + b"\n")
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

    verdict, deadline = "failed", time.monotonic() + SECONDS
    threading.Timer(SECONDS, candidate.kill).start()
    try:
        print(answer(), file=verdicts, flush=True)  # "ready"
        confined = ask((job["prompt"], job["completion"], job["entry"], job["unconfined"]))
        if confined != "confined":  # said before any code of the candidate has run
            verdict = confined
        elif answer() == "loaded":
            names = {"__name__": "tests"}
            exec(job["prompt"] + "\n    pass\n", names)  # helpers: HumanEval/32, 38, 50
            names[job["entry"]] = call  # HumanEval/33 calls the function by its name
            exec(job["tests"], names)
            names["check"](call)
            if time.monotonic() < deadline:
                verdict = "passed"
    except BaseException:  # whatever the answers made of the tests: it is not a pass
        pass
    candidate.kill()
    candidate.wait()
    print(verdict, file=verdicts, flush=True)
    os._exit(0)


# What a candidate may import: modules whose import does nothing but define; and what these load
# late, when the filter stands.
HARMLESS = """__future__ abc array ast base64 binascii bisect calendar cmath collections
collections.abc contextlib copy csv dataclasses datetime decimal difflib enum fractions functools
gc graphlib hashlib heapq html io itertools json keyword math numbers numpy operator pprint queue
random re secrets statistics string struct sys textwrap time timeit traceback types typing
unicodedata weakref zlib""".split()
LATE = ["_strptime", "typing", *(f"encodings.{c}" for c in ("rot_13", "cp1252", "utf_8_sig"))]
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
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # it fails again where the code imports it
    if not confine() and not unconfined:
        return reply("no seccomp here to confine code answers: --allow-unconfined-code runs them")
    reply("confined")
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    statements = ast.parse(source).body
    future = [s for s in statements if getattr(s, "module", None) == "__future__"]
    for statement in statements:  # one that fails leaves the others standing
        try:
            part = ast.Module([*future, statement], [])
            exec(compile(part, "candidate", "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            pass
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
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return libc.syscall(seccomp, 1, 1, ctypes.c_char_p(filter_program)) == 0  # all threads


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
TEACHERS = (0.85, 0.95, 0.75, 0.9, 0.8)  # how often each of the five is right
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

    def teacher_answers(self):
        """One list of batch answers a teacher; each names the true system with its own chance."""
        for right in TEACHERS:
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
    """Writes the toy's splits and five teachers' answers as jsonl files."""
    world, folder = ToyWorld(seed), Path(folder)
    for split, records in world.splits.items():
        write_jsonl(folder / f"{split}.jsonl", records)
    for i, answers in enumerate(world.teacher_answers(), 1):
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
    votes.add_argument(
        "--shuffle", type=int, metavar="SEED", help="the random split of the same sizes (table 1)"
    )
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
