"""Tasks of VC-OPD: problems, their verifiers, and the judge that runs untrusted code.

The first two sections, contracts and arithmetic, are all that one must read to add a task. Then
come the verifier of code edits, its problems, old skills, pretraining, data files and the judge.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import copy
import ctypes
import functools
import gc
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tokenize
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

# =============================================================================================
# Contracts: what a task is made of, and what its verifier says.
# To add a task: draw Examples, write a verifier for them, put both into a Task, and name the
# function that makes it in TASKS; options that it changes go into PRESETS. Arithmetic, which comes
# next, is small and complete: start from a copy of it.
# =============================================================================================


@dataclass(frozen=True)
class Example:
    """One prompt, and everything its verifier needs."""
    id: str
    prompt: str
    reference: str                # a right answer, as the model should write it
    hint: str                     # what only the teacher's prompt holds
    skill: str = ""               # of an anchor: which old skill it guards
    buggy: str = ""               # code: the function to repair, or to complete
    entry_point: str = ""         # code: the function that the tests call
    tests: tuple = ()             # code: ((args, expected), ...)
    test_code: str = ""           # code: or a script that defines check(candidate)
    from_json: bool = False       # tests came from JSON: 1.0 may answer 1, a tuple a list
    seconds: float = 0.0          # code: CPU time of all tests together; 0 is the judge's default
    tolerance: float = 0.0        # code: how far a float may be off


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion. Raises ValueError if `passed` and `reason` differ."""
    reward: float                 # in [-1, 1]
    passed: bool                  # exactly when the reason is "ok"
    formatted: bool               # the format rule holds
    reason: str                   # "ok", or the first thing wrong
    metrics: dict[str, float]     # of a code edit in the right format; else empty

    def __post_init__(self):
        if self.passed is not (self.reason == "ok"):
            raise ValueError(f"a verdict cannot be {self.passed} and {self.reason!r}")


@dataclass(frozen=True)
class Task:
    """What a training run needs to know of a skill.

    `verify` must give a verdict on any text and never raise. It is called from several threads at
    once. It pays a failure -1 and a pass 0 to 1; old skills, judged by `verify_skill` whatever the
    task, score 0 or 1.
    """

    name: str
    verify: Callable[[Example, str], Verdict]
    train: list[Example]
    evals: dict[str, list[Example]]  # the first split is the one that the verdict is about
    anchors: list[Example]  # prompts about old skills, for replay
    benchmark: list[Example]  # problems of old skills, for evaluation
    validation: tuple[list[Example], list[Example]]  # as evals and benchmark, to choose options on
    corpus: Callable[[random.Random], tuple[str, str]]  # a (prompt, answer) of tiny's pretraining
    edit_metrics: tuple[str, ...] = ()  # keys of Verdict.metrics to report; lower is better


def privileged_prompt(example: Example) -> str:
    """What the teacher reads: the prompt and what only it may know."""
    return f"{example.prompt}\n\nA right answer:\n{example.hint}"


TRAIN, VALID, TEST = range(0, 6), range(6, 8), range(8, 10)  # parts of all programs and sums


def part_of(text: str) -> int:
    """0-9, fixed by the sum or bug-free program: splits share none, and pretraining sees TRAIN."""
    return zlib.crc32(text.encode()) % 10


def distinct(draw: Callable[[random.Random], Example], count: int, seed: str) -> list[Example]:
    """`count` problems with different prompts, known from the seed alone."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        example = draw(rng)
        found[example.prompt] = example
    return list(found.values())


def tidy(source: str) -> str:
    """Newlines as line ends, and no white space or byte order mark around."""
    return re.sub("\r\n?", "\n", source).strip(" \t\n\u00a0\ufeff")


# =============================================================================================
# Arithmetic: order of operations in small sums.
# Here "the web" is often wrong: it reads "a + b * c" from left to right, and takes "a - b + c" for
# a - (b + c).
# =============================================================================================

FORMS = ["a + b * c", "a + b * c", "a - b + c", "a * b + c", "a * b - c"]
FORMS_UNSEEN = ["a - b * c", "a + b * c - d"]
ANSWER_LINE = re.compile(r"Answer: (0|-?[1-9][0-9]{0,17})")


def first_operation(terms: list[str], misread: bool) -> int:
    """Index of the operator to work out first: products, then left to right - or misread."""
    if misread:
        return 3 if terms[1:4:2] == ["-", "+"] else 1
    return terms.index("*") if "*" in terms else 1


def worked(sum_text: str, misread: bool) -> str:
    """The sum worked out one operation a line, right or with the popular misreading."""
    terms, lines = sum_text.split(), []
    while len(terms) > 1:
        at = first_operation(terms, misread)
        one, sign, two = terms[at - 1:at + 2]
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(one), int(two))
        lines.append(f"{one} {sign} {two} = {value}")
        terms[at - 1:at + 2] = [str(value)]
    return "\n".join([*lines, f"Answer: {terms[0]}"])


def draw_sum(forms: list[str], parts: range, rng: random.Random) -> str:
    """A sum of one of the forms, from the given parts of all sums."""
    while True:
        text = re.sub("[a-d]", lambda _: str(rng.randint(1, 5)), rng.choice(forms))
        if part_of(text) in parts:
            return text


def draw_fact(rng: random.Random) -> str:
    """A single operation of the kind that comes up inside the sums."""
    a, b, sign = rng.randint(1, 5), rng.randint(1, 5), rng.choice("+-*")
    return f"{a if sign == '*' else rng.randint(-4, 25)} {sign} {b}"


def sum_example(text: str) -> Example:
    """A sum as a problem. The teacher is told the result, not the way."""
    answer = worked(text, misread=False)
    prompt = f"Work out {text} one operation a line. End with a line 'Answer: N'."
    return Example(f"sum/{text}", prompt, answer, answer.split()[-1])


def sums(forms: list[str], parts: range, count: int, seed: str) -> list[Example]:
    """`count` different sums from the given parts."""
    return distinct(lambda rng: sum_example(draw_sum(forms, parts, rng)), count, seed)


def sum_document(rng: random.Random) -> tuple[str, str]:
    """A sum as the web has it: often misread; with a hint, always right."""
    text = draw_fact(rng) if rng.random() < 0.4 else draw_sum(FORMS, TRAIN, rng)
    example = sum_example(text)
    if rng.random() < 0.3:
        return privileged_prompt(example), example.reference
    return example.prompt, worked(text, misread=rng.random() < 0.65)


def final_integer(text: str) -> int | None:
    """N of a last line "Answer: N" of at most 18 ASCII digits; None if there is any other
    "answer:" (case ignored), because nobody should be paid for "41 or 42".
    """
    found = ANSWER_LINE.fullmatch(tidy(text).split("\n")[-1])
    return int(found[1]) if found and text.casefold().count("answer:") == 1 else None


def verify_arithmetic(example: Example, completion: str) -> Verdict:
    """1 for the integer of the reference, else -1. Nothing is evaluated."""
    value = final_integer(completion)
    if value is None:
        return Verdict(-1.0, False, False, "format: needs one last line 'Answer: N'", {})
    passed = value == final_integer(example.reference)
    return Verdict(1.0 if passed else -1.0, passed, True, "ok" if passed else "wrong value", {})


def arithmetic() -> Task:
    """Order of operations in small sums."""
    anchors, benchmark, old_skills = skill_examples("skills", 20, 20, 8)
    return Task("arithmetic", verify_arithmetic, sums(FORMS, TRAIN, 280, "train"),
                {"in_domain": sums(FORMS, TEST, 90, "in domain"),
                 "out_of_domain": sums(FORMS_UNSEEN, TEST, 90, "out")},
                anchors, benchmark, (sums(FORMS, VALID, 90, "validation"), old_skills),
                sum_document)


# =============================================================================================
# Code edit, the verifier (1): is the answer one function, and nothing else?
# =============================================================================================

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")  # some models begin with one
FENCE = re.compile(r"```(py|python3?)?\s*", re.IGNORECASE)
BAD_CHARACTERS = re.compile("[\0\ufeff\ud800-\udfff]")  # NUL, byte order mark, lone surrogates
PARSE_LIMIT = 20_000  # bytes: CPython's parser is not made for hostile megabytes
MAX_HEIGHT = 100  # levels of a parse tree; all that works on it is recursive
KEPT = 256  # sources whose results are kept: each is read a dozen times
PARSE_LOCK = threading.Lock()  # catch_warnings swaps a global, and verifiers run in threads
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
ABOVE = re.compile(r"([ \t]*(#.*)?\n)*")  # blank lines and comments above a statement


def read_answer(example: Example, completion: str) -> tuple[str, str]:
    """The whole program that a completion stands for, and '' or "format: why" it is none.

    Asked for the corrected function only, a model rightly omits imports and helpers: they are put
    back before anything is judged.
    """
    code, why = unwrap_answer(completion)
    why = why or format_error(code, example)
    return ("", f"format: {why}") if why else (put_back_omitted(code, example.buggy), "")


def unwrap_answer(text: str) -> tuple[str, str]:
    """(code, '') from bare code or one fenced block, else ('', why)."""
    lines = tidy(EMPTY_THOUGHT.sub("", tidy(text), count=1)).split("\n")
    fences = sum(line.startswith("```") for line in lines)
    if fences:
        if fences != 2 or not FENCE.fullmatch(lines[0]) or lines[-1].rstrip() != "```":
            return "", "not one fenced block and nothing else"
        lines = lines[1:-1]
    code = tidy("\n".join(lines))
    if BAD_CHARACTERS.search(code):
        return "", "NUL, byte order mark or lone surrogate"
    return code, "" if code else "empty"


def format_error(code: str, example: Example) -> str:
    """Why `code` is no answer to the example, or ''.

    At the top level it may hold definitions, imports, comments, and statements that the buggy
    source or the reference has there too. The rest is text, also where it happens to parse.
    """
    tree = parse_python(code)
    if tree is None:
        return f"not Python of at most {PARSE_LIMIT:,} bytes and {MAX_HEIGHT} levels"
    if example.entry_point not in {n.name for n in tree.body if isinstance(n, FUNCTIONS)}:
        return f"no function {example.entry_point}"
    known = {key for source in (example.buggy, example.reference) for key, _ in top_level(source)}
    loose = [node for node in tree.body if not isinstance(node, (*DEFINITIONS, *IMPORTS))]
    return "" if {ast.unparse(node) for node in loose} <= known else "text outside the function"


@functools.lru_cache(KEPT)
def parse_python(source: str) -> ast.Module | None:
    """The syntax tree; None where there is none, or the source is too long or too deep."""
    try:
        if len(source.encode()) > PARSE_LIMIT:
            return None
        with PARSE_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    level = [tree]
    for _ in range(MAX_HEIGHT):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return None if level else tree


def top_level(source: str) -> list[tuple[str, str]]:
    """(key, lines) of each statement at the top, with the comments and blank lines above it.

    The key is the name of a definition, else the statement itself without its formatting.
    """
    tree, lines, begin, found = parse_python(source), source.split("\n"), 0, []
    for node in tree.body if tree else ():
        key = node.name if isinstance(node, DEFINITIONS) else ast.unparse(node)
        found.append((key, "".join(f"{line}\n" for line in lines[begin:node.end_lineno])))
        begin = max(begin, node.end_lineno)
    return [*found, ("", "\n".join(lines[begin:]))]


def put_back_omitted(code: str, shown: str) -> str:
    """`shown` with the definitions of `code` in their places, and what `code` adds before them."""
    given: dict[str, str] = {}
    for key, text in top_level(shown):
        given[key] = given.get(key, "") + text
    placed, waiting = dict.fromkeys(given, ""), ""
    for key, text in top_level(code):
        waiting += text
        if key in given:
            above, own = (ABOVE.match(text)[0] for text in (given[key], waiting))
            placed[key] += waiting if own.strip() else above + waiting[len(own):]
            waiting = ""
    return tidy("".join(placed[key] if placed[key].strip() else given[key] for key in given))


# =============================================================================================
# Code edit, the verifier (2): does it pass the tests?
# =============================================================================================

# Names by which an answer could run a program that is hidden in a string, where neither lines nor
# complexity are seen. The sandbox keeps the machine safe; this keeps the edit metrics honest.
HIDING = re.compile(r"(?<!\bre\.)\b(exec|eval|compile|getattr|globals|locals|vars|attrgetter"
                    r"|methodcaller|__\w+__|(?:f|gi|cr|ag|tb)_(?:back|builtins|code|frame|globals"
                    r"|locals|next))\b")


def hiding_word(code: str, example: Example) -> str:
    """The first such name that an answer adds, wherever it stands, or ''."""
    known = {*HIDING.findall(example.buggy), *HIDING.findall(example.reference)}
    found = HIDING.findall(unicodedata.normalize("NFKC", code))  # as Python reads names
    return next((name for name in found if name not in known), "")


def run_example(example: Example, code: str) -> Outcome:
    """Run whole programs against the example's tests: whether all pass, and why not."""
    if example.test_code:
        return run_script(code, example.entry_point, example.test_code, example.seconds or 2.0)
    return run_tests(code, example.entry_point, example.tests, example.from_json,
                     example.seconds or 1.0, example.tolerance)


TRIALS = 12  # statements that are left out to see whether a test notices
GONE = "'left out'"  # stands where a statement was


def without_idle(example: Example, code: str) -> str:
    """A passing answer without the statements that it does not need to pass, largest first.

    Old code that is kept beside the new, behind an early `return` or with its result dropped, makes
    a rewrite look like a small edit. Only what the tests would miss has been kept. Statements that
    the reference does not need either stay.
    """
    tried: set[str] = set()
    for _ in range(TRIALS):
        found = {kind: node for kind, node in statements(code).items() if kind not in tried}
        if not found:
            break
        kind = max(found, key=len)
        tried.add(kind)
        twin = statements(example.reference).get(kind)
        if twin is None or left_out(example, example.reference, twin) is None:
            code = left_out(example, code, found[kind]) or code
    return re.sub(rf"(?m)^ *{GONE}\n?", "", code)


def statements(source: str) -> dict[str, ast.stmt]:
    """The statements of a program by what they say; without docstrings and `pass`."""
    return {ast.dump(node): node for node in ast.walk(parse_python(source))
            if isinstance(node, ast.stmt) and not isinstance(node, ast.Pass)
            and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))}


def left_out(example: Example, code: str, node: ast.stmt) -> str | None:
    """`code` without a statement, if it passes all the same. Of an assignment only the value may be
    idle: then None is assigned."""
    shorter = [replaced(code, node, GONE)]
    if isinstance(node, ast.Assign):
        shorter.append(replaced(code, node.value, "None"))
    return next((one for one in shorter if run_example(example, one).passed), None)


def replaced(source: str, node: ast.AST, text: str) -> str:
    """`source` with other text in the place of a node, decorators included."""
    data = source.encode()  # columns count bytes
    starts = [0, *itertools.accumulate(len(line) + 1 for line in data.split(b"\n"))]
    first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
    begin = starts[first - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    return (data[:begin] + text.encode() + data[end:]).decode()


# =============================================================================================
# Code edit, the verifier (3): what did it change beyond the bug?
# =============================================================================================

BREAKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Match, ast.IfExp)
LONG = 8  # characters of a token that is no name: where a longer one is new, its words count
QUOTED = "\0"  # no token begins with it
BRANCH_WORDS = {"if", "elif", "else", "for", "while", "except", "and", "or"}


def edit_metrics(answer: str, buggy: str, reference: str) -> dict[str, float]:
    """Shares in [0, 1], 0 for the reference: what the reward charges.

    nel, acc, ulr    tokens, complexity and lines beyond those that the reference changes; the words
                     of new strings and comments count as tokens, and branches in them too
    excess_edit      for the report, signed, in [-1, 1]: S of the minimal-editing benchmark, where
                     each of the two distances is divided by its own length
    """
    m, c, g = code_tokens(answer), code_tokens(buggy), code_tokens(reference)
    known = {*c, *g}
    spelt = [piece for token in m for piece in ([token] if token in known else in_words(token))]
    cog_m, cog_c, cog_g = map(cognitive_complexity, (answer, buggy, reference))
    cog_m += sum(piece[0] == QUOTED and piece[1:] in BRANCH_WORDS for piece in spelt if piece)
    extra = levenshtein(spelt, c) - levenshtein(g, c)
    extra_lines = changed_lines(answer, buggy) - changed_lines(reference, buggy)
    # differs: nel, acc and ulr are held in [0, 1], so that no pass is worth less than a fail
    return {"nel": max(0, extra) / max(len(spelt), len(c), 1),
            "acc": min(1.0, max(0, cog_m - max(cog_c, cog_g)) / 3),
            "ulr": min(1.0, max(0, extra_lines) / len(buggy.split("\n"))),
            "excess_edit": (levenshtein(m, c) / max(len(m), len(c), 1)
                            - levenshtein(g, c) / max(len(g), len(c), 1))}


def in_words(token: str) -> list[str]:
    """A long string, number or comment in its words, so that no program is one token. Long words
    are cut, since text can be encoded in one. Other tokens are left whole.

    Quoted words are none of the code: old code in a comment is not kept.
    """
    if token.isidentifier() or token.isspace() or len(token) <= LONG:
        return [token]
    return [QUOTED + word for word in re.findall(rf"\w{{1,{LONG}}}|[^\w\s]", token)]


def edit_reward(metrics: dict[str, float]) -> float:
    """What a passing answer is worth: 1 for the smallest edit, at least 0 whatever it changed."""
    return 1.0 - 0.5 * metrics["nel"] - 0.3 * metrics["acc"] - 0.2 * metrics["ulr"]


def verify_edit(example: Example, completion: str) -> Verdict:
    """Eq. 1 for code edits: the format, then the tests (-1 if they fail), then the edit's size.

    An answer is worth no more than what is left of it without idle statements. What this cannot
    see is old code inside an expression that the tests do need, as in `(new, old)[0]`.
    """
    code, reason = read_answer(example, completion)
    if reason:
        return Verdict(-1.0, False, False, reason, {})
    word = hiding_word(code, example)
    passed, reason = (False, f"gate: use of {word}") if word else run_example(example, code)
    metrics = edit_metrics(code, example.buggy, example.reference)
    if not passed:
        return Verdict(-1.0, False, True, reason, metrics)
    if statements(code).keys() != statements(example.reference).keys():
        shorter = edit_metrics(without_idle(example, code), example.buggy, example.reference)
        metrics = {name: max(value, shorter[name]) for name, value in metrics.items()}
    return Verdict(edit_reward(metrics), True, True, "ok", metrics)


def verify_program(example: Example, completion: str) -> Verdict:
    """Format, then tests: 1 or -1. For general coding, where nothing is edited."""
    code, why = read_answer(example, completion)
    passed, reason = (False, why) if why else run_example(example, code)
    return Verdict(1.0 if passed else -1.0, passed, not why, reason, {})


def levenshtein(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and substitutions of items that turn `a` into `b`.

    Bit-parallel (Myers 1999, in Hyyro's form of 2003): a column of the distance table is held
    as differences, bit i of `up` (`down`) set where cell i is one above (below) the cell before
    it, so that a whole column costs some fifteen operations on big integers.
    """
    start = sum(itertools.takewhile(bool, map(operator.eq, a, b)))
    a, b = a[start:], b[start:]
    stop = sum(itertools.takewhile(bool, map(operator.eq, reversed(a), reversed(b))))
    a, b = a[:len(a) - stop], b[:len(b) - stop]
    if not a:
        return len(b)
    places: dict = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    ones, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = ones, 0, len(a)
    for item in b:
        match = places.get(item, 0)
        level = (((match & up) + up) ^ up) | match | down    # equal to its upper left neighbour
        rise = down | (ones & ~(level | up))                 # one above its left neighbour
        fall = level & up                                    # one below it
        distance += bool(rise & last) - bool(fall & last)
        rise, fall = rise << 1 | 1, fall << 1                # row 0 rises by one a column
        up = (fall | ~(level | rise)) & ones
        down = rise & level & ones
    return distance


@functools.lru_cache(KEPT)
def code_tokens(source: str) -> list[str]:
    """Python tokens in order, comments and layout included. Never raises.

    Each line end is a token, so blank lines count; an indent is its white space, so reindenting
    a block costs one; a dedent is "". Broken code is split into words, signs and line ends.
    From Python 3.12 on an f-string is several tokens, so compare numbers of one version only.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return re.findall(r"\w+|[^\w\s]|\n", source)
    return ["\n" if token.type in (tokenize.NEWLINE, tokenize.NL) else token.string
            for token in tokens if token.type != tokenize.ENDMARKER]


def changed_lines(a: str, b: str) -> int:
    """Fewest inserted, deleted or replaced lines that turn `a` into `b`; white space counts.

    As in a diff, i lines replaced by j count max(i, j); but difflib's greedy matching may
    report more than is needed, and an answer must not be charged for that.
    """
    return levenshtein(a.split("\n"), b.split("\n"))


@functools.lru_cache(KEPT)
def cognitive_complexity(source: str) -> int:
    """How hard the code is to follow, summed over its functions; 0 if it does not parse.

    After the white paper of SonarSource (G. A. Campbell, version 1.5) and, where that leaves
    Python open, SonarPython. Simpler than the paper in three places: `a or b and c or d` has two
    operator sequences, not three; only direct recursion counts; decorators nest like other
    functions.
    """
    tree = parse_python(source)
    # A function nests its body by one; for those at the top (or in a class) this must give 0.
    todo = [(node, -isinstance(node, DEFINITIONS)) for node in tree.body] if tree else []
    total = 0
    while todo:
        node, nesting = todo.pop()
        total += increment(node, nesting)
        whole = isinstance(node, (ast.IfExp, ast.Lambda))
        body = (ast.stmt, ast.match_case) if isinstance(node, BREAKS + FUNCTIONS) else ()
        for child in ast.iter_child_nodes(node):     # bodies nest, conditions and `elif` do not
            nests = whole or (isinstance(child, body) and child is not find_elif(node))
            todo.append((child, nesting + nests))
    return total


def increment(node: ast.AST, nesting: int) -> int:
    """What one node adds to the complexity, `nesting` levels deep."""
    if isinstance(node, FUNCTIONS):
        return any(isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                   and call.func.id == node.name for call in ast.walk(node))
    cost = isinstance(node, ast.BoolOp) + isinstance(node, BREAKS) * (1 + nesting)
    if find_elif(node):
        return cost - nesting        # so that the `elif`, an If as deep as this, adds only 1
    return cost + (isinstance(node, ast.stmt) and bool(getattr(node, "orelse", None)))


def find_elif(node: ast.AST) -> ast.stmt | None:
    """The `elif` of an `if`; `else: if` has the same tree, but starts in another column."""
    orelse = node.orelse if isinstance(node, ast.If) else []
    chained = (len(orelse) == 1 and isinstance(orelse[0], ast.If)
               and orelse[0].col_offset == node.col_offset)
    return orelse[0] if chained else None


# =============================================================================================
# Code edit, the problems: function families x bug operators
# =============================================================================================

EDIT_PROMPT = """\
You are given a buggy function.
Fix the bug.
Preserve the original structure, names, formatting, and logic.
Change only what is necessary.
Return only the corrected function."""

# A family is a function with a docstring that decides every detail, so that each bug can be seen
# from the prompt: the kinds of its inputs, its name and arguments, its docstring; below, its body
# (`read_families` says how it is laid out). In an instance the names in NAMES and the constants J
# and K are drawn anew.
FAMILIES = """
ints | sum_above(xs) | Sum of the xs greater than K.
    total = 0; for x in xs: if x > K: total += x; return total
ints | sum_at_most(xs) | Sum of the xs that are at most K.
    total = 0; for x in xs: if x <= K: total += x; return total
ints | count_above(xs) | Number of xs greater than K.
    total = 0; for x in xs: if x > K: total += 1; return total
ints | count_equal(xs) | Number of xs equal to K.
    total = 0; for x in xs: if x == K: total += 1; return total
ints | count_multiples(xs) | Number of xs divisible by K.
    total = 0; for x in xs: if x % K == 0: total += 1; return total
ints | keep_below(xs) | List of the xs less than K.
    out = []; for x in xs: if x < K: out.append(x); return out
ints | drop_multiples(xs) | List of the xs not divisible by K.
    out = []; for x in xs: if x % K != 0: out.append(x); return out
ints | scale_all(xs) | List of x * K for each x in xs.
    out = []; for x in xs: out.append(x * K); return out
ints | shift_all(xs) | List of x + K for each x in xs.
    out = []; for x in xs: out.append(x + K); return out
ints | double_plus(xs) | List of J * x + K for each x in xs.
    return [J * x + K for x in xs]
ints | squares_below(xs) | List of x * x for each x in xs less than K.
    return [x * x for x in xs if x < K]
ints | sum_squares(xs) | Sum of x * x for each x in xs.
    total = 0; for x in xs: total += x * x; return total
ints | sum_from(xs) | K plus the sum of the xs.
    total = K; for x in xs: total += x; return total
ints | largest(xs) | Greatest of the xs.
    best = xs[0]; for x in xs: if x > best: best = x; return best
ints | smallest(xs) | Least of the xs.
    best = xs[0]; for x in xs: if x < best: best = x; return best
ints | first_minus_last(xs) | First of the xs minus the last.
    first = xs[0]; last = xs[-1]; return first - last
ints | spread(xs) | Greatest of the xs minus the least.
    return max(xs) - min(xs)
ints | capped_max(xs) | Greatest of the xs, but at most K.
    return min(max(xs), K)
ints | has_value(xs) | True if one of the xs is equal to K, else False.
    for x in xs: if x == K: return True; return False
ints | all_above(xs) | False if one of the xs is at most K, else True.
    for x in xs: if x <= K: return False; return True
ints | is_long(xs) | True if there are more than K xs, else False.
    return len(xs) > K
ints | without_first(xs) | List of the xs without the first K.
    return xs[K:]
ints | first_few(xs) | List of the first K xs.
    return xs[:K]
ints | index_of(xs) | Index of the first of the xs equal to K, or -1.
    for i in range(len(xs)): if xs[i] == K: return i; return -1
ints | sorted_top(xs) | List of the K greatest xs, greatest first.
    return sorted(xs, reverse=True)[:K]
int | sum_to(n) | Sum of i for i from 1 to n.
    total = 0; for i in range(1, n + 1): total += i; return total
int | sum_until(n) | Sum of i * K for i from 0 to n - 1.
    total = 0; for i in range(n): total += i * K; return total
int | product_to(n) | Product of i for i from 1 to n.
    total = 1; for i in range(1, n + 1): total *= i; return total
int | multiples_to(n) | List of i from 1 to n divisible by K.
    return [i for i in range(1, n + 1) if i % K == 0]
int int | power_sum(n, m) | n times m, plus K.
    total = n * m; return total + K
int int | clamp_low(n, m) | n plus m, but at least K.
    return max(n + m, K)
int int | larger(n, m) | Greater of n and m.
    if n > m: return n; return m
int int | in_order(n, m) | True if n is less than m, else False.
    return n < m
int int | distance(n, m) | Absolute value of n minus m.
    return abs(n - m)
int int | between(n, m) | Sum of i for i from n to m.
    total = 0; for i in range(n, m + 1): total += i; return total
word | count_letter(s) | Number of times 'a' is in s.
    total = 0; for c in s: if c == 'a': total += 1; return total
word int | repeat_word(s, n) | s repeated n times, then 'K'.
    out = s * n; return out + 'K'
word word | join_words(s, t) | s, then '-', then t.
    return s + '-' + t
word | is_short(s) | True if s has fewer than K letters, else False.
    return len(s) < K
word | without_letter(s) | s without each 'a'.
    out = ''; for c in s: if c != 'a': out += c; return out
words | long_words(ws) | List of the ws with more than K letters.
    out = []; for w in ws: if len(w) > K: out.append(w); return out
words | total_letters(ws) | Number of letters of all ws.
    total = 0; for w in ws: total += len(w); return total
"""

# Never seen in post-training, nor in the pretraining of the tiny model.
FAMILIES_UNSEEN = """
ints | sum_multiples(xs) | Sum of the xs divisible by K.
    total = 0; for x in xs: if x % K == 0: total += x; return total
ints | keep_equal_or_more(xs) | List of the xs that are at least K.
    out = []; for x in xs: if x >= K: out.append(x); return out
ints | count_not(xs) | Number of xs not equal to K.
    total = 0; for x in xs: if x != K: total += 1; return total
ints | minus_all(xs) | List of x - K for each x in xs.
    out = []; for x in xs: out.append(x - K); return out
ints | product_of(xs) | Product of the xs.
    total = 1; for x in xs: total *= x; return total
ints | gap_sum(xs) | Sum of the absolute values of x - K for each x in xs.
    total = 0; for x in xs: total += abs(x - K); return total
ints | last_minus_least(xs) | Last of the xs minus the least.
    return xs[-1] - min(xs)
ints int | count_above_n(xs, n) | Number of xs greater than n.
    total = 0; for x in xs: if x > n: total += 1; return total
int int | square_gap(n, m) | n * n minus m * m.
    return n * n - m * m
word | initial_upper(s) | First letter of s as a capital.
    return s[0].upper()
words | starting_with(ws) | List of the ws that start with 'a'.
    out = []; for w in ws: if w.startswith('a'): out.append(w); return out
words | shouted(ws) | List of each of the ws in capitals.
    return [w.upper() for w in ws]
"""

NAMES = {  # identifier in a template -> its names in instances; the pools are disjoint
    "xs": ["xs", "numbers", "values", "nums", "items", "data", "scores", "ages"],
    "x": ["x", "v", "num", "e", "item", "y"],
    "total": ["total", "result", "acc", "res"],
    "out": ["out", "found", "kept", "new"],
    "best": ["best", "top", "cur"],
    "first": ["first", "head"],
    "last": ["last", "tail"],
    "i": ["i", "j", "k"],
    "n": ["n", "a", "size", "p"],
    "m": ["m", "b", "limit", "q"],
    "s": ["s", "text", "word", "line"],
    "t": ["t", "other", "rest"],
    "c": ["c", "ch", "letter"],
    "ws": ["ws", "words", "names", "tags"],
    "w": ["w", "name", "tag"],
}
PREFIXES = ["", "get_", "my_", "calc_"]


class Family(NamedTuple):
    """A template, its inputs and the name of its function."""

    name: str
    kinds: tuple[str, ...]
    source: str


@functools.cache
def read_families(text: str) -> list[Family]:
    """The families of FAMILIES. "; " ends a statement of the body, ": " opens a deeper block."""
    lines, families = iter(text.strip().split("\n")), []
    for heading, body in zip(lines, lines, strict=True):
        kinds, head, docstring = heading.split(" | ")
        source = [f"def {head}:", f'    """{docstring}"""']
        for statement in body.strip().split("; "):
            source += ["    " * depth + part for depth, part in
                       enumerate(re.split("(?<=:) ", statement), 1)]
        families.append(Family(head.split("(")[0], tuple(kinds.split()), "\n".join(source)))
    return families


def instantiate(family: Family, rng: random.Random) -> tuple[str, str, str]:
    """A family with fresh names and constants: (source, entry point, source without new names)."""
    names = {name: rng.choice(pool) for name, pool in NAMES.items()}
    constants = {"J": str(rng.randint(2, 4)), "K": str(rng.randint(2, 6))}
    names[family.name] = rng.choice(PREFIXES) + family.name
    plain = re.sub(r"\w+", lambda found: constants.get(found[0], found[0]), family.source)
    source = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), plain)
    return source, names[family.name], plain


def draw_input(kind: str, rng: random.Random):
    """One argument of a kind; small values, so that border cases come up."""
    if kind == "int":
        return rng.randint(0, 8)
    if kind == "ints":
        return [rng.randint(-2, 8) for _ in range(rng.randint(1, 7))]
    if kind == "word":
        return "".join(rng.choice("aabcdeA") for _ in range(rng.randint(1, 7)))
    return [draw_input("word", rng) for _ in range(rng.randint(1, 5))]


def with_fields(node: ast.AST, **parts) -> ast.AST:
    """A copy of a node with some of its fields replaced."""
    node = copy.copy(node)
    for field_name, value in parts.items():
        setattr(node, field_name, value)
    return node


FLIPPED = {  # operator -> what it is mistaken for
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv,
}
CONFUSED = {  # name of a function or method -> what it is mistaken for
    "max": "min", "min": "max", "len": "sum", "abs": "int", "sorted": "list",
    "upper": "lower", "startswith": "endswith", "append": "extend",
}

# Bug operator -> how often it is drawn. As in real one-statement bugs (TSSB-3M, Richter and
# Wehrheim 2022): wrong names, operands, arguments and calls are common, plain operators rare.
OPERATORS = {"identifier": 16, "operand": 12, "argument_swap": 10, "call": 10, "constant": 8,
             "comparison": 6, "range_bound": 6, "condition": 5, "start": 5, "index": 5,
             "slice": 5, "boolean": 4, "accumulate": 4}
OPERATORS_UNSEEN = {"operator": 2, "method": 6, "missing_call": 8, "swapped_operands": 4,
                    "early_return": 4}


# A bug operator looks at one node of a function and returns what it could wrongly be: changed
# copies of the node. `names` are the function's variables.
def expression_bugs(node: ast.AST, names: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """What could be wrong with an expression: (bug operator, changed node) pairs."""
    match node:
        case ast.Name(name, ast.Load()) if name in names:
            yield from (("identifier", with_fields(node, id=one)) for one in names if one != name)
        case ast.Constant(bool(value)):
            yield "boolean", with_fields(node, value=not value)
        case ast.Constant(int(value)):
            yield from (("constant", with_fields(node, value=value + step)) for step in (-1, 1))
        case ast.Compare(left, [op], [right]):
            yield "comparison", with_fields(node, ops=[FLIPPED[type(op)]()])
            yield "condition", ast.UnaryOp(ast.Not(), node)
            yield from (("operand", with_fields(node, comparators=[ast.Name(name)]))
                        for name in names if not isinstance(right, ast.Name))
            yield "swapped_operands", with_fields(node, left=right, comparators=[left])
        case ast.BinOp(left, op, right):
            yield "operator", with_fields(node, op=FLIPPED[type(op)]())
            yield from (("operand", with_fields(node, right=ast.Name(name)))
                        for name in names if not isinstance(right, ast.Name))
            yield "swapped_operands", with_fields(node, left=right, right=left)
        case ast.Subscript(_, ast.Slice(lower, upper)):
            yield "slice", with_fields(node, slice=ast.Slice(upper, lower))
        case ast.Subscript(_, ast.UnaryOp() | ast.Constant()):
            at = ast.literal_eval(node.slice)
            yield from (("index", with_fields(node, slice=ast.Constant(new)))
                        for new in (-1, 0, 1) if new != at)


def call_bugs(node: ast.AST, names: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """What could be wrong with a call."""
    match node:
        case ast.Call(ast.Name("range"), [*first, ast.BinOp(bound, ast.Add(), _)]):
            yield "range_bound", with_fields(node, args=[*first, bound])
        case ast.Call(ast.Name("range"), [*first, bound]):
            yield from (("range_bound", with_fields(node, args=[*first, ast.BinOp(
                bound, op(), ast.Constant(1))])) for op in (ast.Add, ast.Sub))
        case ast.Call(ast.Name(name), [inner]):
            if name in CONFUSED:
                yield "call", with_fields(node, func=ast.Name(CONFUSED[name]))
            yield "missing_call", inner
            yield from (("argument_swap", with_fields(node, args=[ast.Name(other)]))
                        for other in names if ast.unparse(inner) != other)
        case ast.Call(ast.Name(name), [one, two]):
            yield "call", with_fields(node, func=ast.Name(CONFUSED[name]))
            yield from (("argument_swap", with_fields(node, args=pair))
                        for pair in ([one, one], [two, two]))
        case ast.Call(ast.Attribute(_, name)) if name in CONFUSED:
            yield "method", with_fields(node, func=with_fields(node.func, attr=CONFUSED[name]))


def statement_bugs(node: ast.AST, names: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """What could be wrong with a statement, or with the whole function."""
    match node:
        case ast.Assign([ast.Name()], ast.Constant(int(value))):
            yield "start", with_fields(node, value=ast.Constant(1 - value if value < 2 else 0))
        case ast.AugAssign(target, op, value):
            yield "accumulate", ast.Assign([target], value, lineno=1)
            yield "operator", with_fields(node, op=FLIPPED[type(op)]())
        case ast.FunctionDef(_, _, [*before, ast.For() as loop, ast.Return() as end]):
            yield "early_return", with_fields(node, body=[*before, with_fields(
                loop, body=[*loop.body, end])])


def bugs_in(tree: ast.FunctionDef) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Every bug one step away from a function: (bug operator, node, what it could wrongly be)."""
    names = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
                    and isinstance(n.ctx, ast.Store)} | {a.arg for a in tree.args.args})
    for node in ast.walk(tree):
        for bugs in (expression_bugs, call_bugs, statement_bugs):
            yield from ((operator, node, wrong) for operator, wrong in bugs(node, names))


def draw_bug(source: str, operators: dict[str, int], rng: random.Random) -> tuple[str, str] | None:
    """(bug operator, buggy source): the operator is drawn first. None if it does not apply here."""
    operator = rng.choices(list(operators), list(operators.values()))[0]
    found = [bug for bug in bugs_in(ast.parse(source).body[0]) if bug[0] == operator]
    if not found:
        return None
    _, node, wrong = rng.choice(found)
    return operator, replaced(source, node, ast.unparse(wrong))


STEPS = 2000  # lines that one of our own functions may run


def outcomes(source: str, name: str, inputs: list[list]) -> Iterator[str]:
    """What one of our own functions does on each input: the repr of its value, or its exception.

    Only for functions made in this file: it runs them right here, with a bound on their steps.
    """
    scope: dict = {}
    exec(source, scope)
    for args in inputs:
        before = sys.gettrace()
        try:
            sys.settrace(partial(count_steps, itertools.count()))
            result = repr(scope[name](*copy.deepcopy(args)))
        except Exception as error:
            result = type(error).__name__
        finally:
            sys.settrace(before)
        yield result


def count_steps(steps: Iterator[int], frame, event: str, arg):
    """A trace function that ends endless loops."""
    if next(steps) > STEPS:
        raise TimeoutError
    return partial(count_steps, steps)


def edit_example(id: str, buggy: str, reference: str, entry_point: str,
                 tests: tuple = (), test_code: str = "") -> Example:
    """A code edit, generated or loaded. The teacher's hint is the reference solution."""
    buggy, reference = tidy(buggy), tidy(reference)
    return Example(id, f"{EDIT_PROMPT}\n\n{buggy}", reference, hint=reference, buggy=buggy,
                   entry_point=entry_point, tests=tests, test_code=test_code)


POOL = 200  # inputs: two programs that agree on all of them are taken to be the same


@functools.cache
def strong_tests(source: str, kinds: tuple[str, ...]) -> tuple:
    """Tests ((args, expected), ...) that fail every wrong program that is one bug away.

    Some inputs, the first that gives another value than they, and for each bug the first that
    shows it.
    """
    rng, tree = random.Random(source), ast.parse(source).body[0]
    pool = [[draw_input(kind, rng) for kind in kinds] for _ in range(POOL)]
    right = list(outcomes(source, tree.name, pool))
    chosen = {0, 1, 2, 3, next(i for i, value in enumerate(right) if value != right[0])}
    for wrong in {replaced(source, node, ast.unparse(bug)) for _, node, bug in bugs_in(tree)}:
        pairs = enumerate(zip(right, outcomes(wrong, tree.name, pool), strict=False))
        chosen |= set(itertools.islice((i for i, (a, b) in pairs if a != b), 1))
    return tuple((pool[i], ast.literal_eval(right[i])) for i in sorted(chosen))


def make_edit(families: list[Family], operators: dict[str, int], parts: range,
              rng: random.Random) -> Example:
    """A problem of the given parts whose bug fails a test and whose reference passes all."""
    while True:
        family = rng.choice(families)
        source, entry, plain = instantiate(family, rng)
        bug = draw_bug(source, operators, rng) if part_of(source) in parts else None
        if bug is None:
            continue
        tests = strong_tests(plain, family.kinds)
        found = outcomes(bug[1], entry, [args for args, _ in tests])
        if any(one != repr(expected) for one, (_, expected) in zip(found, tests, strict=True)):
            return edit_example(f"{family.name}/{bug[0]}/{entry}", bug[1], source, entry, tests)


def edit_problems(families: list[Family], operators: dict[str, int], parts: range, count: int,
                  seed: str) -> list[Example]:
    """`count` different problems from the given parts."""
    return distinct(partial(make_edit, families, operators, parts), count, seed)


def code_edit() -> Task:
    """Repair a function by the smallest edit."""
    seen, unseen = read_families(FAMILIES), read_families(FAMILIES_UNSEEN)
    anchors, benchmark, old_skills = skill_examples("skills", 20, 20, 8)
    validation = edit_problems(seen, OPERATORS, VALID, 200, "validation"), old_skills
    return Task("codeedit", verify_edit,
                edit_problems(seen, OPERATORS, TRAIN, 1200, "train"),
                {"in_domain": edit_problems(seen, OPERATORS, TEST, 200, "in domain"),
                 "out_of_domain": edit_problems(unseen, OPERATORS_UNSEEN, TEST, 200, "out")},
                anchors, benchmark, validation, edit_document, ("excess_edit", "acc", "ulr"))


# =============================================================================================
# Old skills: seven small capabilities with exact checkers. They are the anchors of replay and the
# general benchmark, which hold different prompts.
# =============================================================================================

PEOPLE = ["Ann", "Bob", "Eva", "Max", "Lea", "Tom", "Ida", "Sam"]
THINGS = ["pears", "books", "coins", "cups", "keys", "hats", "maps", "lamps", "boxes", "shoes",
          "plates", "pens"]
CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
          "Egypt": "Cairo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana",
          "Norway": "Oslo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw",
          "Finland": "Helsinki", "Ireland": "Dublin", "Iran": "Tehran", "Iraq": "Baghdad"}


def coding_skill(rng: random.Random) -> Example:
    """General coding: write a function from its description. Checked by running it."""
    name, times, plus = rng.choice("fghp"), rng.randint(2, 9), rng.randint(1, 9)
    prompt = f"Write a Python function {name}(x) that returns x times {times} plus {plus}."
    answer = f"def {name}(x):\n    return x * {times} + {plus}"
    tests = tuple(([x], x * times + plus) for x in (-3, 0, 1, 7))
    return Example("", prompt, answer, answer, "coding", entry_point=name, tests=tests)


def reasoning_skill(rng: random.Random) -> Example:
    """Reasoning: turn a comparison round."""
    older, younger = rng.sample(PEOPLE, 2)
    most, who = rng.choice([("older", older), ("younger", younger)])
    prompt = f"{older} is older than {younger}. Who is {most}? Answer with the name only."
    return Example("", prompt, who, who, "reasoning")


def instruction_skill(rng: random.Random) -> Example:
    """Instruction following: repeat a word so many times."""
    word, count = rng.choice(THINGS), rng.randint(2, 5)
    prompt = f"Write the word {word} {count} times, with spaces between, and nothing else."
    return Example("", prompt, " ".join([word] * count), word, "instructions")


def summary_skill(rng: random.Random) -> Example:
    """Summarisation: who bought what, out of a longer sentence."""
    who, what, city = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(list(CITIES.values()))
    day, price = rng.choice(["Monday", "Friday", "Sunday"]), rng.randint(2, 9)
    prompt = (f"Summarise in three words: On {day}, in {city}, {who} bought {what} at the market "
              f"for {price} euros.")
    return Example("", prompt, f"{who} bought {what}", f"{who} bought {what}", "summary")


def tool_skill(rng: random.Random) -> Example:
    """Tool-use format: a call as JSON."""
    tool, city = rng.choice(["weather", "time", "news"]), rng.choice(list(CITIES.values()))
    prompt = f'Call the tool {tool} for {city}. Reply with JSON: the keys are "tool" and "city".'
    answer = json.dumps({"tool": tool, "city": city})
    return Example("", prompt, answer, answer, "tools")


def chat_skill(rng: random.Random) -> Example:
    """Chat helpfulness: greet by name and ask about the matter at hand."""
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    about = rng.choice(["lost", "want to sell", "cannot find", "broke"])
    prompt = f"Hello, I am {who}. I {about} my {what}. Greet me by name and ask how you can help."
    answer = f"Hello {who}! How can I help you with your {what}?"
    return Example("", prompt, answer, answer, "chat")


def knowledge_skill(rng: random.Random) -> Example:
    """Domain knowledge: capitals."""
    country, city = rng.choice(list(CITIES.items()))
    prompt = rng.choice(["What is the capital of {}?", "Name the capital of {}.",
                         "Which city is the capital of {}?", "{} has which capital?"])
    return Example("", prompt.format(country), city, city, "knowledge")


SKILLS = (coding_skill, reasoning_skill, instruction_skill, summary_skill, tool_skill, chat_skill,
          knowledge_skill)


def skill_examples(seed: str, *counts: int) -> list[list[Example]]:
    """One list for each count, with so many problems of each skill; no prompt is in two of them."""
    rng, lists = random.Random(seed), [[] for _ in counts]
    for skill in SKILLS:
        found: dict[str, Example] = {}
        while len(found) < sum(counts):
            example = skill(rng)
            found[example.prompt] = replace(example, id=f"{example.skill}/{len(found)}")
        drawn = iter(found.values())
        for examples, count in zip(lists, counts, strict=True):
            examples += itertools.islice(drawn, count)
    return lists


def verify_skill(example: Example, answer: str) -> Verdict:
    """1 or 0: does the old skill still work?"""
    right = has_skill(example, answer)
    return Verdict(float(right), right, True, "ok" if right else "wrong", {})


def has_skill(example: Example, answer: str) -> bool:
    """Is the answer to an anchor prompt right? Exact where the prompt asks for a form."""
    if example.skill == "programs":
        return verify_program(example, answer).passed
    if example.skill == "coding":
        code, problem = unwrap_answer(answer)
        return not problem and run_tests(code, example.entry_point, example.tests).passed
    if example.skill == "tools":
        return parsed_json(answer) == json.loads(example.reference)
    if example.skill == "chat":  # the name, the thing and a question
        asked = {example.reference.split()[1].strip("!").lower(), words_of(example.reference)[-1]}
        return "?" in answer and asked <= set(words_of(answer))
    if example.skill == "knowledge":  # the city, and no other city
        cities = {city.lower() for city in CITIES.values()}
        return cities & set(words_of(answer)) == {example.reference.lower()}
    return words_of(answer) == words_of(example.reference)


def words_of(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def parsed_json(text: str):
    """The JSON value of a text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# =============================================================================================
# The corpus that the built-in model is pretrained on: "the web", where answers are often wrong
# =============================================================================================

WEB_MIX = {"task": 60, "skills": 30, "copying": 10}  # what tiny's pretraining is made of
WEB = {"right": 10, "renamed": 6, "unfixed": 77, "wrong": 7}  # how repairs on "the web" turn out
CODE_WORDS = sorted({word for family in read_families(FAMILIES)
                     for word in re.findall(r"\w+|[^\w\s]", family.source)} | set("0123456789")
                    | {name for pool in NAMES.values() for name in pool})


def web_document(task: Task, rng: random.Random) -> tuple[str, str]:
    """A (prompt, answer) of the corpus that the built-in model is pretrained on."""
    kind = rng.choices(list(WEB_MIX), list(WEB_MIX.values()))[0]
    return {"task": task.corpus, "skills": skill_document, "copying": shuffled_words}[kind](rng)


def shuffled_words(rng: random.Random) -> tuple[str, str]:
    """Copying in its purest form: every next word can only be looked up."""
    words = " ".join(rng.sample(CODE_WORDS, rng.randint(3, 20)))
    return f"Repeat: {words}", words


def skill_document(rng: random.Random) -> tuple[str, str]:
    """An old skill, done right."""
    example = rng.choice(SKILLS)(rng)
    return example.prompt, example.reference


def edit_document(rng: random.Random) -> tuple[str, str]:
    """A repair as one finds it: often right, oftener not; with a hint, always right."""
    example = make_edit(read_families(FAMILIES), OPERATORS, TRAIN, rng)
    if rng.random() < 0.3:
        return privileged_prompt(example), example.reference
    wrong = draw_bug(example.reference, OPERATORS, rng) or ("", example.buggy)
    answers = {"right": example.reference, "renamed": renamed(example.reference, rng),
               "unfixed": example.buggy, "wrong": wrong[1]}
    return example.prompt, answers[rng.choices(list(WEB), list(WEB.values()))[0]]


def renamed(source: str, rng: random.Random) -> str:
    """The same function with one of its variables called otherwise: right, but over-edited."""
    body = source.split('"""')[-1]
    used = {name for pool in NAMES.values() for name in pool if re.search(rf"\n.*\b{name}\b", body)}
    texts = [re.sub(rf"\b{old}\b", new, source) for pool in NAMES.values()
             for old in pool if old in used for new in pool if new not in used]
    # pretraining must not spell out a test program
    return rng.choice([text for text in texts if part_of(text) in TRAIN] or [source])


# =============================================================================================
# Which tasks there are
# =============================================================================================

PRESETS = {  # options that a task changes
    "codeedit": {},
    "arithmetic": {"rollouts": 8},  # cheap to verify
}

TASKS = {"arithmetic": arithmetic, "codeedit": code_edit}

# =============================================================================================
# Data files: one JSON object a line. A row that nobody can pass stops the run with file, line,
# field or id, and what was expected: every reference and every buggy function is run.
# =============================================================================================

PROGRAM_PROMPT = "Complete this function.\nReturn only the whole function."
LINE_LIMIT = 4_000_000  # bytes; a longer one is hardly JSONL
KINDS = {str: "a string", int: "a number", float: "a number", bool: "a boolean",
         list: "a list", dict: "an object", type(None): "null"}


class LoadError(Exception):
    """A data file that cannot be used, in one sentence."""


def load_edits(path: str, refused: list[str] | None = None) -> list[Example]:
    """Code edits from own rows or raw HumanEvalPack rows. See `load_rows`."""
    return load_rows(path, edit_from_row, verify_edit, refused)


def load_benchmark(path: str, refused: list[str] | None = None) -> list[Example]:
    """Functions to complete, in the format of HumanEval. See `load_rows`."""
    return load_rows(path, program_from_row, verify_program, refused)


def load_rows(path: str, build: Callable[[dict], Example],
              verify: Callable[[Example, str], Verdict], refused: list[str] | None
              ) -> list[Example]:
    """An example from each line that is not blank, of a file that may be gzipped.

    Raises LoadError for the first bad row; with a list `refused`, bad rows are left out and their
    sentences appended to it.
    """
    rows: dict[int, Example | str] = {}  # by line: an example, or why there is none
    ids: dict[str, int] = {}
    for number, line in read_lines(path):
        try:
            rows[number] = example = build(parse_row(line))
            if ids.setdefault(example.id, number) != number:
                raise LoadError(f'id "{example.id}" must be unique, line {ids[example.id]} has it')
        except LoadError as error:
            rows[number] = str(error)
    examples = [row for row in rows.values() if isinstance(row, Example)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        whys = list(threads.map(partial(why_unusable, verify), examples))
    rows |= {ids[example.id]: why for example, why in zip(examples, whys, strict=True) if why}
    faults = [f"{path} line {number}: {row}" for number, row in rows.items()
              if isinstance(row, str)]
    if faults and refused is None:
        raise LoadError(faults[0])
    if len(faults) == len(rows):
        raise LoadError(f"{path} holds no usable row, expected one JSON object a line")
    if refused is not None:
        refused += faults
    return [row for row in rows.values() if isinstance(row, Example)]


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise LoadError(f"{path} cannot be read, expected a JSONL file: {error}") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # without the byte order mark
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def why_unusable(verify: Callable[[Example, str], Verdict], example: Example) -> str:
    """Why nobody can learn from an example, or ''."""
    right = verify(example, example.reference)
    if not right.passed:
        return f'id "{example.id}": its reference must pass its tests, got "{right.reason}"'
    if verify(example, example.buggy).passed:
        return f'id "{example.id}": its buggy function must fail a test, but passes them all'
    return ""


def parse_row(line: bytes) -> dict:
    """The object in one line."""
    if len(line) > LINE_LIMIT:
        raise LoadError(f"expected a JSON object of at most {LINE_LIMIT:,} bytes, got more")
    try:
        # int() refuses the words NaN and Infinity: a test that expects NaN could never pass.
        row = json.loads(line.decode(), parse_constant=int)
    except (ValueError, RecursionError) as error:
        why = str(error).replace("line 1 column", "column")
        raise LoadError(f"expected a JSON object in UTF-8: {why}") from None
    if not isinstance(row, dict):
        raise LoadError(f"expected a JSON object, got {KINDS[type(row)]}")
    return row


def edit_from_row(row: dict) -> Example:
    """An own row, or a raw HumanEvalPack row, known by its buggy_solution."""
    if "buggy_solution" in row:
        head, tests, script = text_field(row, "declaration"), (), script_field(row, "test")
        fields = "task_id", "buggy_solution", "canonical_solution", "entry_point"
    elif ("tests" in row) == ("test_code" in row):
        raise LoadError('expected one of the fields "tests" and "test_code", got '
                        + ("both" if "tests" in row else "neither"))
    else:
        head, tests = "", tests_field(row) if "tests" in row else ()
        script = "" if tests else script_field(row, "test_code")
        fields = "id", "buggy", "reference", "entry_point"
    id, buggy, reference, entry_point = (text_field(row, name) for name in fields)
    if head:  # the script gets helpers of its own: a candidate could change those it is given
        script = f"{head}{reference}\n{script}"
    example = edit_example(id, head + buggy, head + reference,
                           unicodedata.normalize("NFKC", entry_point), tests, script)
    if "instruction" in row and not head:      # that of HumanEvalPack asks for another task
        prompt = f"{text_field(row, 'instruction')}\n\n{example.buggy}"
        example = replace(example, prompt=prompt)
    limits = {name: number_field(row, name) for name in ("seconds", "tolerance")}
    return require_format(replace(example, from_json=bool(tests), **limits), *fields[1:3])


def program_from_row(row: dict) -> Example:
    """A HumanEval row: its prompt is a function with a docstring for its body."""
    shown, body = text_field(row, "prompt"), text_field(row, "canonical_solution")
    return require_format(Example(
        text_field(row, "task_id"), f"{PROGRAM_PROMPT}\n\n{tidy(shown)}", tidy(shown + body),
        hint=tidy(shown + body), skill="programs", buggy=tidy(shown),
        entry_point=text_field(row, "entry_point"), test_code=script_field(row, "test")),
        "prompt", "canonical_solution")


def require_format(example: Example, shown: str, reference: str) -> Example:
    """The example, if the format rule accepts the two sources that the named fields gave."""
    for field, source in ((shown, example.buggy), (reference, example.reference)):
        if why := format_error(source, example):
            raise LoadError(f'field "{field}" must hold the source of the function, got {why}')
    if example.buggy == example.reference:
        raise LoadError(f'field "{reference}" must differ from field "{shown}"')
    return example


def text_field(row: dict, name: str) -> str:
    """A string that is not blank, and that a file and a tokenizer can hold."""
    value = row.get(name)
    if not isinstance(value, str):
        got = KINDS[type(value)] if name in row else "nothing"
        raise LoadError(f'field "{name}" must be a string, got {got}')
    if not value.strip() or BAD_CHARACTERS.search(value):
        raise LoadError(f'field "{name}" must be text without NUL, byte order mark and lone '
                        f'surrogates, got {value[:20]!a}')
    return value


def number_field(row: dict, name: str) -> float:
    """An optional number, 0 without it."""
    value = row.get(name, 0)
    if type(value) not in (int, float) or not 0 <= value <= 60:
        raise LoadError(f'field "{name}" must be a number from 0 to 60, got {value!r:.20}')
    return float(value)


def script_field(row: dict, name: str) -> str:
    """A script of assertions, as HumanEval has it."""
    script = text_field(row, name)
    if not re.search(r"^def check\(", script, re.MULTILINE):
        raise LoadError(f'field "{name}" must be a script that defines check(candidate)')
    return script


def tests_field(row: dict) -> tuple:
    """((args, expected), ...) from a list of objects."""
    tests, want = row["tests"], 'must be a list of {"args": [...], "expected": ...}'
    if not isinstance(tests, list) or not tests:
        got = "an empty list" if tests == [] else KINDS[type(tests)]
        raise LoadError(f'field "tests" {want}, got {got}')
    for number, test in enumerate(tests, 1):
        if not (isinstance(test, dict) and test.keys() == {"args", "expected"}
                and isinstance(test["args"], list)):
            raise LoadError(f'field "tests" {want}, but entry {number} is not one')
        try:
            encode([test["args"], test["expected"]])
        except ValueError as error:
            raise LoadError(f'field "tests", entry {number}: too deeply nested ({error})') from None
    return tuple((tuple(test["args"]), test["expected"]) for test in tests)


# =============================================================================================
# The judge. What runs here is trusted, what arrives is not: a reply is a bounded number of bytes,
# parsed to lists and strings and compared along the *expected* value, so that a strange reply
# costs no more than an honest one. A verdict is a truth value that this side computes from values;
# a reason is text for people, always prefixed where the other side chose it, and never compared.
# =============================================================================================

UNSAFE_JUDGE = False  # True: run candidates even where the kernel cannot keep them from files
REASON = re.compile(r"\w[\w ]{0,80}")  # what a candidate's process may say about itself
START_SECONDS = 20.0  # far above what a server needs to start, or to answer for itself
THIS_FILE = Path(__file__).read_text(encoding="utf-8")  # now, lest a later edit mix two versions
WALL = 5  # seconds of waiting for each second of CPU time: only a backstop, on a busy machine


class JudgeError(Exception):
    """The judge itself cannot work here."""


class Outcome(NamedTuple):
    """What the judge found: whether an answer passes, and if not, why."""

    passed: bool
    reason: str  # "ok" if it passes


def run_tests(code: str, entry_point: str, tests: Sequence[tuple[list, object]],
              from_json: bool = False, seconds: float = 1.0, tolerance: float = 0.0) -> Outcome:
    """Call `entry_point` of `code` on tests [(args, expected), ...]: do all give the right value?

    If not, the reason is that of the first that does not. `seconds` is the CPU time of all calls
    together, in whole seconds. Calls are made in an order that is shuffled but the same each time
    for the same code, so that a verdict can be reproduced. ValueError for test data that `encode`
    refuses.
    """
    if not tests:
        return Outcome(False, "no tests")
    order = list(range(len(tests)))
    random.Random(code.encode("utf-8", "surrogatepass")).shuffle(order)
    calls = [[entry_point, encode(list(tests[i][0]))] for i in order]
    message = line_of(["candidate", code, entry_point]) + line_of(calls)
    wants = [encode(expected) for _, expected in tests]
    reply, fault = run_job(message, seconds, processes=1)
    if fault or type(reply) is not list or len(reply) != len(tests):
        return Outcome(False, fault or said(reply))
    for i, outcome in sorted(zip(order, reply, strict=True), key=operator.itemgetter(0)):
        if not (right := is_value(outcome, wants[i], from_json, tolerance)).passed:
            return Outcome(False, f"test {i + 1}: {right.reason}")
    return Outcome(True, "ok")


def run_script(code: str, entry_point: str, test_code: str, seconds: float = 2.0) -> Outcome:
    """Run a script that defines `check(candidate)` against `code`: did it end without an error?

    The script runs in one confined process and the code in another; arguments and values go
    between. A script should bring its own helpers: those it lacks are called in the candidate's
    process, where a candidate may have changed them.
    """
    message = line_of(["examiner", code, entry_point, test_code])
    reply, fault = run_job(message, seconds, processes=2)
    if reply == ["passed"]:  # the examiner's own word: no candidate can write to its line
        return Outcome(True, "ok")
    return Outcome(False, fault or said(reply[-1] if type(reply) is list and reply else reply))


def is_value(outcome: object, want: object, from_json: bool, tolerance: float) -> Outcome:
    """Is one test's untrusted outcome the expected value?"""
    try:
        kind, detail = outcome
        if kind != "value":
            return Outcome(False, said(detail))
        if same_value(detail, want, from_json, tolerance):
            return Outcome(True, "ok")
        return Outcome(False, "wrong value")
    except (TypeError, ValueError, OverflowError, RecursionError):
        return Outcome(False, said(None))


def same_value(got: object, want: object, from_json: bool, tolerance: float) -> bool:
    """Whether an untrusted encoded value equals the expected one: same exact types, floats within
    1e-9 or the tolerance, NaN equal to nothing. With `from_json` tuples are lists and 1.0 is 1.
    Some Exception if malformed."""
    if type(got) is not list or type(want) is not list or len(got) != len(want):
        return type(got) is type(want) is not list and got == want
    kind, *got_parts = got
    wanted, *want_parts = want
    alike = ({"list", "tuple"}, {"int", "float"}) if from_json else ()
    if kind != wanted and {kind, wanted} not in alike:
        return False
    if "float" in (kind, wanted) or kind == "complex":
        pairs = zip(map(number_of, got_parts), map(number_of, want_parts), strict=True)
        return all(math.isclose(*pair, rel_tol=1e-9, abs_tol=max(1e-12, tolerance))
                   for pair in pairs)
    if kind in ("set", "frozenset", "dict"):
        got_parts, want_parts = (sorted(parts, key=json.dumps) for parts in (got_parts, want_parts))
    return all(same_value(*pair, from_json, tolerance)
               for pair in zip(got_parts, want_parts, strict=True))


def number_of(text: str) -> int | float:
    """A number as `encode` writes it: floats have a "p" or are words."""
    return int(text, 16) if re.fullmatch("-?0x[0-9a-f]+", text) else float.fromhex(text)


def said(fault: object) -> str:
    """What a candidate's process says of a failure: words to show, never a verdict."""
    known = type(fault) is str and REASON.fullmatch(fault)
    return f"error: {fault if known else 'undecodable result'}"


def run_job(message: bytes, seconds: float, processes: int) -> tuple[object, str]:
    """Run one job: (parsed reply, '') or (None, why there is none). Once more if the server died.
    JudgeError where only namespaces and limits, or nothing, stand before files and processes."""
    outcome = None
    for _ in range(2):
        with contextlib.suppress(OSError), borrow() as server:
            if "seccomp" not in server.layers and not UNSAFE_JUDGE:
                raise JudgeError(f"No seccomp filter here, only {server.layers}, so candidates "
                    "could reach your files; --unsafe-judge runs them all the same.")
            outcome = server.run(message, seconds, processes)
            break
    if not outcome:
        return None, "judge failure"
    reply, late, status, cpu = outcome
    if late or cpu > math.ceil(seconds) - 0.05:  # the kernel's clock ticks in steps
        return None, "timeout"
    if len(reply) > MAX_REPLY:
        return None, "too much output"
    if status or not reply:
        return None, "killed" if os.WIFSIGNALED(status) else "left early"
    try:
        return parse_line(reply), ""
    except ValueError:
        return None, said(None)


def judge_layers() -> list[str]:
    """The kernel layers around candidates on this machine. May be empty."""
    with borrow() as server:
        return server.layers


POOL_LOCK = threading.Lock()  # functools.cache may call twice what two threads ask for at once


@contextlib.contextmanager
def borrow() -> Iterator[Server]:
    """A running server. It is stopped if its user fails."""
    with POOL_LOCK:
        idle = pool()
    server = idle.get()
    try:
        server.start()
        yield server
    except BaseException:
        server.stop()
        raise
    finally:
        idle.put(server)


@functools.cache
def pool() -> queue.LifoQueue[Server]:
    """Idle servers, one per core, the one used last on top; none is started before it is needed."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    idle: queue.LifoQueue[Server] = queue.LifoQueue(cores)
    for _ in range(cores):
        idle.put(Server())
        atexit.register(idle.queue[-1].stop)
    return idle


class Server:
    """One server process: started when needed, and again after it was stopped or has died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.layers: list[str] = []

    def start(self) -> None:
        """Start the process unless it runs. JudgeError when that fails."""
        if self.process and self.process.poll() is None:
            return
        self.control, theirs = socket.socketpair()
        self.control.settimeout(START_SECONDS)
        null = subprocess.DEVNULL
        command = [sys.executable, "-P", "-s", "-S", "-c", server_program()]
        try:
            with theirs:
                self.process = subprocess.Popen(command, stdin=theirs, stdout=null, stderr=null,
                    cwd="/", env={"PYTHONHASHSEED": "0"}, start_new_session=True)
            self.layers = parse_line(self.run(line_of(["layers"]), START_SECONDS, 1)[0])
        except (OSError, ValueError) as error:
            self.stop()
            raise JudgeError(f"The judge's server did not start: {error!r}.") from error

    def stop(self) -> None:
        """End the process and with it every candidate: it does that when its line is closed."""
        if self.process:
            self.control.close()
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.process = None

    def run(self, message: bytes, seconds: float, processes: int) -> tuple[bytes, bool, int, float]:
        """Run one job in 1 or 2 processes: (reply, whether it was late, wait status of the process
        that replied, most CPU seconds of one). OSError when the server, not a candidate, fails."""
        ours, theirs = socket.socketpair()
        sockets = [theirs, *(socket.socketpair() if processes == 2 else ())]
        with ours:
            try:
                fds = [one.fileno() for one in sockets]
                socket.send_fds(self.control, [START.pack(seconds, WALL * seconds)], fds)
            finally:  # our copies must go, or we would not see the children close theirs
                for one in sockets:
                    one.close()
            reply, late = exchange(ours, message, time.monotonic() + WALL * seconds)
        self.control.sendall(START.pack(0, 0))
        answer = self.control.recv(REPORT.size * processes)
        if len(answer) != REPORT.size * processes:
            raise ConnectionError("the server has died")
        statuses, cpu = zip(*REPORT.iter_unpack(answer), strict=True)
        return reply, late, statuses[-1], max(cpu)


def exchange(ours: socket.socket, message: bytes, deadline: float) -> tuple[bytes, bool]:
    """Send a job, then read until the other side closes or says far too much: (bytes, whether the
    deadline passed before)."""
    reply = bytearray()
    with contextlib.suppress(TimeoutError, ConnectionError):  # the child may end while we send
        ours.settimeout(max(deadline - time.monotonic(), 0.001))
        ours.sendall(message)
        ours.shutdown(socket.SHUT_WR)
        while len(reply) <= MAX_REPLY and (left := deadline - time.monotonic()) > 0:
            ours.settimeout(left)
            piece = ours.recv(65536)
            if not piece:
                break
            reply += piece
    return bytes(reply), time.monotonic() >= deadline


def server_program() -> str:
    """The imports of this file, and the section of that name."""
    parts = re.split(r"(?m)^# =+$", THIS_FILE)
    title = next(i for i, part in enumerate(parts) if part.startswith("\n# The server's program."))
    return parts[0] + parts[title + 1] + "\nserve()\n"


# =============================================================================================
# The server's program. Candidates leave early, lie about equality, patch the judge and look for
# answers. So they get arguments and give values; expected values and the verdict stay in the
# trainer. A server runs the imports of this file and this section: whoever reads all its memory
# finds no task and no reference. It forks once per candidate and never sees a job, since job and
# reply travel on a socket that only trainer and child hold; no candidate can find traces of the
# one before it.
# =============================================================================================

MAX_REPLY = 1_000_000  # bytes
MAX_DEPTH = 100  # levels of nesting in a value
MEMORY = 512 * 2**20  # bytes of address space per child
START = struct.Struct("dd")  # trainer -> server: CPU and wall limit in s; sockets attached
REPORT = struct.Struct("id")  # server -> trainer, per child: wait status, CPU seconds
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
BUILTINS = (*CONTAINERS.values(), str, bytes, int, float, complex)
RAISABLE = (ArithmeticError, LookupError, TypeError, ValueError)  # what a script may see raised
# A candidate cannot open files, so whatever honest code may import must be in memory before.
HONEST_IMPORTS = """typing math cmath collections collections.abc re itertools functools heapq
    bisect string statistics fractions decimal datetime _strptime copy operator random hashlib
    unicodedata dataclasses enum numbers time array textwrap json base64 binascii calendar queue
    contextlib types abc struct keyword zlib warnings"""
# The filter lets through: read write close fstat lseek mmap mprotect munmap brk rt_sigaction
# rt_sigprocmask rt_sigreturn writev sched_yield mremap madvise exit gettimeofday sigaltstack futex
# clock_gettime exit_group getrandom. No fcntl: its F_SETOWN can direct signals at any process.
SYSCALLS = {  # machine: (its number in the filter's data, the calls' numbers)
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 20, 24, 25, 28, 60, 96, 131,
                            202, 228, 231, 318)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 66, 124, 216,
                             233, 93, 169, 132, 98, 113, 94, 278)),
}


def serve() -> None:
    """The server. A message with sockets starts a job's children; one without ends them and is
    answered with their reports. The wall limit is kept here too, if the trainer is too busy to."""
    for name in HONEST_IMPORTS.split():
        importlib.import_module(name)
    hashlib.md5(b"")  # its first use may read a configuration file
    seccomp_program()
    layers = enter_namespaces()
    control = socket.socket(fileno=0)
    gc.freeze()
    children: list[int] = []
    while True:
        try:
            message, sockets, _, _ = socket.recv_fds(control, START.size, 3)
        except TimeoutError:
            kill_children(children)
            control.settimeout(None)
            continue
        if sockets:
            seconds, wall = START.unpack(message)
            children = start_children(sockets, seconds, layers)
            control.settimeout(wall + 1)
            continue
        kill_children(children)
        if not message:  # the trainer is gone
            os._exit(0)
        control.sendall(b"".join(map(report, children)))
        control.settimeout(None)


def start_children(sockets: list[int], seconds: float, layers: list[str]) -> list[int]:
    """Fork the owner of sockets 0 and 1, the one that answers the trainer, and before it, if
    there is a third socket, the candidate that owns that. Returns their process numbers."""
    children = []
    for own in filter(None, (sockets[2:], sockets[:2])):
        children.append(os.fork())
        if children[-1] == 0:
            run_child(own, seconds, layers)
    for fd in sockets:
        os.close(fd)
    return children


def run_child(sockets: list[int], seconds: float, layers: list[str]) -> None:
    """The forked child: own session, only null on 0-2 and `sockets` from 3 on, confinement; then
    play the part that the first message names. Never returns; silence means failure."""
    try:
        os.setsid()
        os.dup2(1, 0)  # 1 is null, 0 was the server's line to the trainer
        fds = [os.dup2(fd, target) for target, fd in enumerate(sockets, 3)]
        os.closerange(3 + len(fds), 1024)
        channels = [io.BufferedRWPair(io.FileIO(fd, "r"), io.FileIO(fd, "w")) for fd in fds]
        random.seed(0)  # the same answer gets the same verdict every time
        layers = layers + confine(seconds)
        part, *job = parse_line(channels[0].readline())
        if part == "candidate":
            answer_calls(channels[0], *job)
        elif part == "examiner":
            examine(*channels, job)
        else:
            send(channels[0], layers)
    finally:
        os._exit(0)


def answer_calls(channel: io.BufferedRWPair, code: str, entry_point: str) -> None:
    """Candidate process: to each message [[name, args], ...] answer the list of outcomes, or a
    fault if the code did not load."""
    space = {"__name__": "candidate"}
    fault = load_candidate(code, entry_point, space)
    for line in channel:
        send(channel, fault or [call_candidate(space, *one) for one in parse_line(line)])


def load_candidate(code: str, entry_point: str, space: dict) -> str:
    """Execute the candidate's code in `space`: '' or what went wrong."""
    try:
        program = compile(code, "candidate", "exec", dont_inherit=True)
    except Exception:  # also ValueError for a NUL byte, MemoryError for deep nesting
        return "syntax error"
    try:
        exec(program, space)
    except BaseException as error:
        return type(error).__name__
    return "" if callable(space.get(entry_point)) else f"no function {entry_point}"


def call_candidate(space: dict, name: str, args: object) -> list:
    """One call, with fresh arguments -> ["value", encoded at once, as later calls may change it]
    or ["fault", why]."""
    try:
        value = space[name](*decode(args))
        try:
            return ["value", encode(value)]
        except ValueError:
            return ["fault", f"cannot send this {type(value).__name__}"]
    except BaseException as error:
        return ["fault", type(error).__name__]


def examine(trainer: io.BufferedRWPair, link: io.BufferedRWPair, job: list[str]) -> None:
    """Examiner process: run the script, then `check(candidate)` once. The candidate's code is only
    parsed here: functions that a script uses but does not define are the candidate's, by
    `ask_candidate`."""
    code, entry_point, test_code = job
    send(link, ["candidate", code, entry_point])
    send(link, [])  # asks only whether the code has loaded
    try:
        loaded = parse_line(link.readline())
        if loaded != []:
            fail(trainer, loaded)
        names = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        space = {name: partial(ask_candidate, trainer, link, name) for name in names}
        space |= vars(builtins) | {"__builtins__": builtins, "__name__": "examiner"}
        script = re.sub(r"(?m)^check\(.*", "", test_code)
        exec(compile(script, "script", "exec", dont_inherit=True), space)
        space["check"](partial(ask_candidate, trainer, link, entry_point))
    except BaseException as error:
        fail(trainer, type(error).__name__)
    send(trainer, ["passed"])


def ask_candidate(trainer: io.BufferedRWPair, link: io.BufferedRWPair, name: str,
                  *args: object) -> object:
    """A script's stand-in for the candidate's function: arguments go out, an exact builtin comes
    back. An ordinary exception is raised here too, for scripts that expect one; all else ends the
    examination (StopIteration would quietly end a script's loop)."""
    try:
        send(link, [[name, encode(args)]])
        [[kind, detail]] = parse_line(link.readline())
        value = decode(detail) if kind == "value" else None
        error = None if kind == "value" else vars(builtins).get(detail)
    except Exception:
        fail(trainer, "undecodable result")
    if isinstance(error, type) and issubclass(error, RAISABLE):
        raise error.__new__(error, "raised by the candidate")  # some need more for their __init__
    if kind != "value":
        fail(trainer, detail)
    return value


def fail(trainer: io.BufferedRWPair, fault: object) -> None:
    """Examiner process: report a fault, perhaps in a candidate's words, so wrapped lest it spell
    "passed"; and leave past every `except`."""
    send(trainer, ["failed", fault])
    os._exit(0)


def send(channel: io.BufferedRWPair, message: object) -> None:
    """Write one message, or a fault in its place when it is too long."""
    line = line_of(message)
    channel.write(line if len(line) <= MAX_REPLY else line_of("too much output"))
    channel.flush()


def line_of(message: object) -> bytes:
    """The inverse of `parse_line`: one message as one line."""
    return json.dumps(message).encode("ascii") + b"\n"


def parse_line(line: bytes) -> object:
    """One message in ASCII JSON -> lists, strings, booleans, None; ValueError if it is none.
    Numbers are never sent, and stay the strings they are: a long one would take long to convert."""
    try:
        return json.loads(line.decode("ascii"), object_pairs_hook=list, parse_int=str,
                          parse_float=str, parse_constant=str)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def encode(value: object, depth: int = 0) -> object:
    """Value -> lists, strings, booleans, None: [type name, part, ...], numbers in hex.

    Subclasses count as the builtin type below them, other iterables (generators, ranges, views) as
    lists: a candidate's methods run in its own process only. ValueError for anything else and at
    depth.
    """
    value = as_builtin(value)
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return ["int", hex(value)]  # hex has no digit limit
    if kind is float:
        return ["float", value.hex()]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind not in CONTAINERS.values() or depth == MAX_DEPTH:
        raise ValueError(f"cannot send this {kind.__name__}")
    parts = value.items() if kind is dict else value
    return [kind.__name__, *(encode(part, depth + 1) for part in parts)]


def as_builtin(value: object) -> object:
    """A value of an exact builtin type that holds the same; other values as they are."""
    if value is None or type(value) in (bool, *BUILTINS):
        return value
    for kind in BUILTINS:
        if isinstance(value, kind):
            return kind(value)
    return list(itertools.islice(value, MAX_REPLY)) if isinstance(value, Iterable) else value


def decode(tree: object) -> object:
    """The inverse of `encode`, always exact builtins. Some Exception when `tree` is malformed."""
    if type(tree) is not list:
        return tree
    kind, *parts = tree
    if kind == "int":
        return int(parts[0], 16)
    if kind in ("float", "complex"):
        return {"float": float, "complex": complex}[kind](*map(float.fromhex, parts))
    if kind == "bytes":
        return bytes.fromhex(parts[0])
    return CONTAINERS[kind](map(decode, parts))


def report(pid: int) -> bytes:
    """Wait for a killed child."""
    _, status, usage = os.wait4(pid, 0)
    return REPORT.pack(status, usage.ru_utime + usage.ru_stime)


def kill_children(children: list[int]) -> None:
    """SIGKILL to each child and to its session, if it got as far as making one."""
    for pid in children:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)


def confine(seconds: float) -> list[str]:
    """Limits, then the filter, for good. Returns the layers that took."""
    layers = set()
    cpu = math.ceil(seconds)  # the kernel counts in whole seconds, and kills at this limit
    limits = {"CPU": cpu, "AS": MEMORY, "FSIZE": 0, "CORE": 0, "NPROC": 0}
    for name, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
            layers.add("rlimits")
    for name in ("__main__", "ctypes", "_ctypes"):
        sys.modules.pop(name, None)  # tidiness, not safety: they lead nowhere past the filter
    program = seccomp_program()
    if program:
        libc().prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the server
        libc().prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        header = struct.pack("HP", len(program) // 8, ctypes.addressof(program))
        buffer = ctypes.create_string_buffer(header)  # named, so that it outlives the call
        layers |= {"seccomp"} if libc().prctl(22, 2, ctypes.addressof(buffer), 0, 0) == 0 else set()
    return sorted(layers)


@functools.cache
def seccomp_program() -> ctypes.Array | None:
    """BPF: kill a foreign architecture, allow SYSCALLS, answer EPERM to the rest. None where the
    numbers are not known."""
    if sys.platform != "linux" or os.uname().machine not in SYSCALLS:
        return None
    arch, numbers = SYSCALLS[os.uname().machine]
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    lines += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    return ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))


@functools.cache
def libc() -> ctypes.CDLL:
    """The C library, with the prototype of the one call that is made with pointers."""
    library = ctypes.CDLL(None)
    if sys.platform == "linux":
        library.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return library


def enter_namespaces() -> list[str]:
    """New user, network and pid namespaces where the kernel allows; the caller goes on as the
    first process inside, whose end is the end of all others there."""
    flags = 0x10000000 | 0x40000000 | 0x20000000  # CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID
    if not hasattr(libc(), "unshare") or libc().unshare(flags) != 0:
        return []
    inner = os.fork()
    if inner:
        os.close(0)  # only the inner process may hold the line to the trainer
        os.waitpid(inner, 0)
        os._exit(0)
    libc().prctl(1, signal.SIGKILL, 0, 0, 0)
    return ["namespaces"]


# =============================================================================================
# End of the server's program: what is added below, say a task, is kept from candidates
# =============================================================================================
