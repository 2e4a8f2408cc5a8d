"""Tasks of VC-OPD: the problems, their verifiers, and the judge that runs untrusted code.

The first two sections, contracts and arithmetic, are all that one must read to add a task. Then
come code edit, which the essay is about, old skills, pretraining, data files, and the judge.
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
import hashlib
import importlib
import io
import itertools
import json
import keyword
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
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
    from_json: bool = False       # tests came from JSON: a tuple may answer a list


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion."""
    reward: float                 # in [-1, 1]
    passed: bool                  # exactly when the reason is "ok"
    formatted: bool               # the format rule holds
    reason: str                   # "ok", or the first thing wrong
    metrics: dict[str, float]     # of a code edit in the right format; else empty


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
    """0-9, fixed by the sum or bug-free program: splits share none, and pretraining draws TRAIN.

    Where it then renames, it spells out 4 of the 200 test programs by chance.
    """
    return zlib.crc32(text.encode()) % 10


def distinct(draw: Callable[[random.Random], Example], count: int, seed: str) -> list[Example]:
    """`count` problems with different prompts, known from the seed alone."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        example = draw(rng)
        found[example.prompt] = example
    return list(found.values())


def tidy(source: str) -> str:
    """Newlines as line ends, and no white space around."""
    return re.sub("\r\n?", "\n", source).strip(" \t\n")


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
# Code edit, the problems: function families x bug operators
# =============================================================================================

EDIT_PROMPT = """\
You are given a buggy function.
Fix the bug.
Preserve the original structure, names, formatting, and logic.
Change only what is necessary.
Return only the corrected function."""

# A family is a function with a docstring that decides every detail, so that each bug can be seen
# from the prompt. Its first line names the kinds of its inputs. In an instance the names in NAMES
# and the constants J and K are drawn anew. Written as `ast.unparse` writes, so that a bug changes
# nothing but itself.
FAMILIES = '''
ints
def sum_above(xs):
    """Sum of the xs greater than K."""
    total = 0
    for x in xs:
        if x > K:
            total += x
    return total

ints
def sum_at_most(xs):
    """Sum of the xs that are at most K."""
    total = 0
    for x in xs:
        if x <= K:
            total += x
    return total

ints
def count_above(xs):
    """Number of xs greater than K."""
    total = 0
    for x in xs:
        if x > K:
            total += 1
    return total

ints
def count_equal(xs):
    """Number of xs equal to K."""
    total = 0
    for x in xs:
        if x == K:
            total += 1
    return total

ints
def count_multiples(xs):
    """Number of xs divisible by K."""
    total = 0
    for x in xs:
        if x % K == 0:
            total += 1
    return total

ints
def keep_below(xs):
    """List of the xs less than K."""
    out = []
    for x in xs:
        if x < K:
            out.append(x)
    return out

ints
def drop_multiples(xs):
    """List of the xs not divisible by K."""
    out = []
    for x in xs:
        if x % K != 0:
            out.append(x)
    return out

ints
def scale_all(xs):
    """List of x * K for each x in xs."""
    out = []
    for x in xs:
        out.append(x * K)
    return out

ints
def shift_all(xs):
    """List of x + K for each x in xs."""
    out = []
    for x in xs:
        out.append(x + K)
    return out

ints
def double_plus(xs):
    """List of J * x + K for each x in xs."""
    return [J * x + K for x in xs]

ints
def squares_below(xs):
    """List of x * x for each x in xs less than K."""
    return [x * x for x in xs if x < K]

ints
def sum_squares(xs):
    """Sum of x * x for each x in xs."""
    total = 0
    for x in xs:
        total += x * x
    return total

ints
def sum_from(xs):
    """K plus the sum of the xs."""
    total = K
    for x in xs:
        total += x
    return total

ints
def largest(xs):
    """Greatest of the xs."""
    best = xs[0]
    for x in xs:
        if x > best:
            best = x
    return best

ints
def smallest(xs):
    """Least of the xs."""
    best = xs[0]
    for x in xs:
        if x < best:
            best = x
    return best

ints
def first_minus_last(xs):
    """First of the xs minus the last."""
    first = xs[0]
    last = xs[-1]
    return first - last

ints
def spread(xs):
    """Greatest of the xs minus the least."""
    return max(xs) - min(xs)

ints
def capped_max(xs):
    """Greatest of the xs, but at most K."""
    return min(max(xs), K)

ints
def has_value(xs):
    """True if one of the xs is equal to K, else False."""
    for x in xs:
        if x == K:
            return True
    return False

ints
def all_above(xs):
    """False if one of the xs is at most K, else True."""
    for x in xs:
        if x <= K:
            return False
    return True

ints
def is_long(xs):
    """True if there are more than K xs, else False."""
    return len(xs) > K

ints
def without_first(xs):
    """List of the xs without the first K."""
    return xs[K:]

ints
def first_few(xs):
    """List of the first K xs."""
    return xs[:K]

ints
def index_of(xs):
    """Index of the first of the xs equal to K, or -1."""
    for i in range(len(xs)):
        if xs[i] == K:
            return i
    return -1

ints
def sorted_top(xs):
    """List of the K greatest xs, greatest first."""
    return sorted(xs, reverse=True)[:K]

int
def sum_to(n):
    """Sum of i for i from 1 to n."""
    total = 0
    for i in range(1, n + 1):
        total += i
    return total

int
def sum_until(n):
    """Sum of i * K for i from 0 to n - 1."""
    total = 0
    for i in range(n):
        total += i * K
    return total

int
def product_to(n):
    """Product of i for i from 1 to n."""
    total = 1
    for i in range(1, n + 1):
        total *= i
    return total

int
def multiples_to(n):
    """List of i from 1 to n divisible by K."""
    return [i for i in range(1, n + 1) if i % K == 0]

int int
def power_sum(n, m):
    """n times m, plus K."""
    total = n * m
    return total + K

int int
def clamp_low(n, m):
    """n plus m, but at least K."""
    return max(n + m, K)

int int
def larger(n, m):
    """Greater of n and m."""
    if n > m:
        return n
    return m

int int
def in_order(n, m):
    """True if n is less than m, else False."""
    return n < m

int int
def distance(n, m):
    """Absolute value of n minus m."""
    return abs(n - m)

int int
def between(n, m):
    """Sum of i for i from n to m."""
    total = 0
    for i in range(n, m + 1):
        total += i
    return total

word
def count_letter(s):
    """Number of times 'a' is in s."""
    total = 0
    for c in s:
        if c == 'a':
            total += 1
    return total

word int
def repeat_word(s, n):
    """s repeated n times, then 'K'."""
    out = s * n
    return out + 'K'

word word
def join_words(s, t):
    """s, then '-', then t."""
    return s + '-' + t

word
def is_short(s):
    """True if s has fewer than K letters, else False."""
    return len(s) < K

word
def without_letter(s):
    """s without each 'a'."""
    out = ''
    for c in s:
        if c != 'a':
            out += c
    return out

words
def long_words(ws):
    """List of the ws with more than K letters."""
    out = []
    for w in ws:
        if len(w) > K:
            out.append(w)
    return out

words
def total_letters(ws):
    """Number of letters of all ws."""
    total = 0
    for w in ws:
        total += len(w)
    return total
'''

# Never seen in post-training, nor in the pretraining of the tiny model.
FAMILIES_UNSEEN = '''
ints
def sum_multiples(xs):
    """Sum of the xs divisible by K."""
    total = 0
    for x in xs:
        if x % K == 0:
            total += x
    return total

ints
def keep_equal_or_more(xs):
    """List of the xs that are at least K."""
    out = []
    for x in xs:
        if x >= K:
            out.append(x)
    return out

ints
def count_not(xs):
    """Number of xs not equal to K."""
    total = 0
    for x in xs:
        if x != K:
            total += 1
    return total

ints
def minus_all(xs):
    """List of x - K for each x in xs."""
    out = []
    for x in xs:
        out.append(x - K)
    return out

ints
def product_of(xs):
    """Product of the xs."""
    total = 1
    for x in xs:
        total *= x
    return total

ints
def gap_sum(xs):
    """Sum of the absolute values of x - K for each x in xs."""
    total = 0
    for x in xs:
        total += abs(x - K)
    return total

ints
def last_minus_least(xs):
    """Last of the xs minus the least."""
    return xs[-1] - min(xs)

ints int
def count_above_n(xs, n):
    """Number of xs greater than n."""
    total = 0
    for x in xs:
        if x > n:
            total += 1
    return total

int int
def square_gap(n, m):
    """n * n minus m * m."""
    return n * n - m * m

word
def initial_upper(s):
    """First letter of s as a capital."""
    return s[0].upper()

words
def starting_with(ws):
    """List of the ws that start with 'a'."""
    out = []
    for w in ws:
        if w.startswith('a'):
            out.append(w)
    return out

words
def shouted(ws):
    """List of each of the ws in capitals."""
    return [w.upper() for w in ws]
'''

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


@dataclass(frozen=True)
class Family:
    """A template, its inputs and the name of its function."""

    name: str
    kinds: tuple[str, ...]
    source: str


@functools.cache
def read_families(text: str) -> list[Family]:
    """The blocks of FAMILIES."""
    blocks = (block.split("\n", 1) for block in text.strip().split("\n\n"))
    return [Family(re.search(r"def (\w+)", source)[1], tuple(kinds.split()), source)
            for kinds, source in blocks]


def instantiate(family: Family, rng: random.Random) -> tuple[str, str]:
    """A family with fresh names and constants: (source, entry point)."""
    names = {name: rng.choice(pool) for name, pool in NAMES.items()}
    names |= {"J": str(rng.randint(2, 4)), "K": str(rng.randint(2, 6)),
              family.name: rng.choice(PREFIXES) + family.name}
    source = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), family.source)
    return source, names[family.name]


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
    starts = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    return operator, source[:begin] + ast.unparse(wrong) + source[end:]


STEPS = 2000  # lines that one of our own functions may run


def outcomes(source: str, name: str, inputs: list[list]) -> list[str]:
    """What one of our own functions does on each input: the repr of its value, or its exception.

    Only for functions made in this file: it runs them right here, with a bound on their steps.
    """
    scope: dict = {}
    exec(source, scope)
    results, before = [], sys.gettrace()
    for args in inputs:
        try:
            sys.settrace(partial(count_steps, itertools.count()))
            results.append(repr(scope[name](*copy.deepcopy(args))))
        except Exception as error:
            results.append(type(error).__name__)
        finally:
            sys.settrace(before)
    return results


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


def make_edit(families: list[Family], operators: dict[str, int], parts: range,
              rng: random.Random) -> Example:
    """A problem of the given parts whose bug fails a test and whose reference passes all."""
    while True:
        family = rng.choice(families)
        source, entry = instantiate(family, rng)
        bug = draw_bug(source, operators, rng) if part_of(source) in parts else None
        if bug is None:
            continue
        inputs = [[draw_input(kind, rng) for kind in family.kinds] for _ in range(8)]
        right = outcomes(source, entry, inputs)
        if outcomes(bug[1], entry, inputs) != right:
            tests = tuple(zip(inputs, map(ast.literal_eval, right), strict=True))
            return edit_example(f"{family.name}/{bug[0]}/{entry}", bug[1], source, entry, tests)


def edit_problems(families: list[Family], operators: dict[str, int], parts: range, count: int,
                  seed: str) -> list[Example]:
    """`count` different problems from the given parts."""
    return distinct(partial(make_edit, families, operators, parts), count, seed)


# =============================================================================================
# Code edit, the verifier: is it one function, and nothing else?
# =============================================================================================

BAD_CHARACTERS = re.compile("[\0\ufeff\ud800-\udfff]")  # NUL, byte order mark, lone surrogates
PARSE_LIMIT = 20_000  # bytes: CPython's parser is not made for hostile megabytes
KEPT = 256  # sources whose results are kept: each is read a dozen times
PARSE_LOCK = threading.Lock()  # catch_warnings swaps a global, and verifiers run in threads
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def read_answer(example: Example, completion: str) -> tuple[str, str]:
    """The code of a completion, and "" or "format: why"."""
    code, reason = unwrap_answer(completion)
    why = "" if reason else format_error(code, example.buggy, example.entry_point)
    return code, f"format: {why}" if why else reason


def unwrap_answer(text: str) -> tuple[str, str]:
    """(code, "") from bare code or one fenced block, else ("", "format: why")."""
    if BAD_CHARACTERS.search(text):
        return "", "format: NUL, byte order mark or lone surrogate"
    lines = tidy(text).split("\n")
    fences = sum(line.startswith("```") for line in lines)
    if fences:
        opened, closed = lines[0].rstrip() in ("```", "```python"), lines[-1] == "```"
        if fences != 2 or not opened or not closed:
            return "", "format: not one fenced block and nothing else"
        lines = lines[1:-1]
    code = tidy("\n".join(lines))
    return code, "" if code else "format: empty"


def format_error(code: str, shown: str, entry_point: str) -> str:
    """Why `code` is no answer to the source `shown`, or "".

    At the top level it may hold functions, imports and the lines that `shown` has there too.
    The rest is text around the function, also where it happens to parse.
    """
    tree = parse_python(code)
    if tree is None:
        return f"not Python of at most {PARSE_LIMIT:,} bytes"
    if entry_point not in {node.name for node in tree.body if isinstance(node, FUNCTIONS)}:
        return f"no function {entry_point}"
    return "text outside the function" if loose_lines(code) - loose_lines(shown) else ""


def loose_lines(source: str) -> set[str]:
    """Lines at the top level that belong to no function and no import, comments included."""
    inside, outside = set(), set()
    for node in parse_python(source).body:
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        home = isinstance(node, (*FUNCTIONS, ast.Import, ast.ImportFrom))
        (inside if home else outside).update(range(first, node.end_lineno + 1))
    # A comment after a function belongs to it if it is indented.
    return {line for number, line in enumerate(source.split("\n"), 1) if number in outside
            or (number not in inside and line.strip() and line[0] not in " \t")}


@functools.lru_cache(KEPT)
def parse_python(source: str) -> ast.Module | None:
    """The syntax tree; None where there is none, or the source is too long or too deep."""
    try:
        if len(source.encode()) > PARSE_LIMIT:
            return None
        with PARSE_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# =============================================================================================
# Code edit, the verifier: is it an honest edit?
# The static gate keeps the edit metrics honest, not the machine safe: a program inside an exec
# string is one token of complexity 0, and old code below an early `return` looks like a small
# edit. An answer may hold nothing suspect that the buggy source does not hold just so.
# =============================================================================================

MAX_HEIGHT = 100  # levels of the parse tree; all that works on it is recursive
BANNED = re.compile(
    r"exec|eval|compile|open|globals|locals|vars|[gs]etattr|delattr|input|breakpoint|exit|quit"
    r"|__\w+__|f_(back|builtins|code|globals|locals|trace)|(gi|cr|ag|tb)_(frame|code|next)"
    r"|co_(code|consts)"
)
MATH = re.compile(r"import math( as \w+)?|from math import .+")  # what an answer may newly import


def static_gate(answer: str, buggy: str) -> str:
    """'' or "gate: why" `answer` is no honest edit of `buggy`, which must parse."""
    if len(answer) > 4 * len(buggy) + 2000:
        return "gate: too long"
    source, tree = parse_python(buggy), parse_python(answer)
    if tree is None:
        return "gate: does not parse"
    nodes = list(ast.walk(source))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if height(tree) > max(MAX_HEIGHT, height(source)):
        return "gate: too deeply nested"
    added = Counter(suspects(tree, own)) - Counter(suspects(source, own))
    return f"gate: {next(iter(added))[0]}" if added else ""


def height(tree: ast.AST) -> int:
    """Levels of a parse tree."""
    level, count = [tree], 0
    while level:
        level, count = [child for node in level for child in ast.iter_child_nodes(node)], count + 1
    return count


def suspects(tree: ast.Module, own: set[str]) -> Iterator[tuple[str, str]]:
    """(why, what) for all that an answer must have in common with the buggy source. `own`: names
    that the buggy source binds itself, be they those of dangerous builtins."""
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    yield "not the same functions and signatures", repr(list(map(signature, functions)))
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.Import, ast.ImportFrom)):
            yield "top-level statement", ast.dump(node)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.Global)):
            yield "class or global", ""
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not MATH.fullmatch(ast.unparse(node)):
            yield "new import", ast.unparse(node)
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and is_constant(node):
            yield "constant condition", ""
        if isinstance(node, FUNCTIONS) and node.lineno == node.body[0].lineno:
            yield "several statements on one line", ""
        if isinstance(node, ast.stmt):
            yield from banned_names(node, own)
        for name in ("body", "orelse", "finalbody"):
            yield from layout(getattr(node, name, None))


def signature(node: ast.FunctionDef) -> str:
    """All of a function but its body: defaults, annotations and decorators are code too."""
    parts = [node.args, *node.decorator_list, *filter(None, [node.returns])]
    return " ".join([type(node).__name__, node.name, *map(ast.dump, parts)])


def is_endless(node: ast.AST) -> bool:
    """Whether a node is `while True`, the one constant condition of honest code."""
    return isinstance(node, ast.While) and getattr(node.test, "value", None) in (True, 1)


def is_constant(node: ast.If | ast.IfExp | ast.While) -> bool:
    """Whether a condition, other than that of `while True`, depends on nothing."""
    varies = any(isinstance(part, ast.Name) for part in ast.walk(node.test))
    return not varies and not is_endless(node)


def banned_names(statement: ast.stmt, own: set[str]) -> Iterator[tuple[str, str]]:
    """Each banned name in a statement's own expressions, with the whole expression around it."""
    for child in ast.iter_child_nodes(statement):
        for node in [] if isinstance(child, ast.stmt) else ast.walk(child):
            name = getattr(node, "id", getattr(node, "attr", ""))
            if BANNED.fullmatch(name) and name not in own:
                yield f"use of {name}", ast.dump(child)


def layout(block: object) -> Iterator[tuple[str, str]]:
    """Neighbours in a block: statements never reached, or on one line."""
    for before, after in zip(block, block[1:], strict=False) if isinstance(block, list) else ():
        if ends(before):
            yield "unreachable code", ""
        if after.lineno == before.end_lineno:
            yield "several statements on one line", ""


def ends(node: ast.stmt) -> bool:
    """Whether control never passes a statement. (A `with` could swallow an exception and pass, but
    then an answer could hide the old code below a `return` in one.)"""
    if isinstance(node, ast.If):
        return any(map(ends, node.body)) and any(map(ends, node.orelse))
    if isinstance(node, (ast.With, ast.AsyncWith)):
        return any(map(ends, node.body))
    if isinstance(node, (ast.Try, ast.TryStar)):
        ways = [node.body + node.orelse, *(handler.body for handler in node.handlers)]
        return any(map(ends, node.finalbody)) or all(any(map(ends, way)) for way in ways)
    if is_endless(node):
        return not any(isinstance(inner, ast.Break) for inner in ast.walk(node))
    return isinstance(node, (ast.Return, ast.Raise, ast.Break, ast.Continue))


# =============================================================================================
# Code edit, the verifier: does it pass the tests?
# =============================================================================================


def run_example(example: Example, code: str) -> str:
    """The judge's word on an answer: "ok", or why it fails."""
    code = put_back_omitted(code, example.buggy)
    if example.test_code:
        fault = run_script(code, example.entry_point, example.test_code)
    else:
        fault = run_tests(code, example.entry_point, example.tests, example.from_json)
    return "ok" if fault == "" else str(fault)       # a judge that says None has passed nobody


def put_back_omitted(code: str, shown: str) -> str:
    """`code` below whatever `shown` has at the top and `code` left out.

    Asked for the corrected function only, a model rightly omits imports and helpers.
    """
    body = parse_python(code).body
    defined = {node.name for node in body if isinstance(node, FUNCTIONS)}
    present = {ast.unparse(node) for node in body if not isinstance(node, FUNCTIONS)}
    missing = [ast.unparse(node) for node in parse_python(shown).body
               if getattr(node, "name", None) not in defined]
    return "\n".join([text for text in missing if text not in present] + [code])


# =============================================================================================
# Code edit, the verifier: what did it change beyond the bug?
# =============================================================================================

BREAKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Match, ast.IfExp)


def edit_metrics(answer: str, buggy: str, reference: str) -> dict[str, float]:
    """Shares in [0, 1]; the reference has 0 in the first four and 1 in the last three.

    nel, acc, ulr    tokens, complexity and lines beyond the reference: the reward charges these
    excess_edit      signed, in [-1, 1]: S of the minimal-editing benchmark, where each of the
                     two distances is divided by its own length
    names_kept       of the identifiers in both sources, those that the answer has too
    formatting_kept  of the lines in both sources that the answer has up to white space, those
                     that it has verbatim
    structure_kept   1 - excess of the kinds of statement, read level by level
    """
    m, c, g = code_tokens(answer), code_tokens(buggy), code_tokens(reference)
    cog_m, cog_c, cog_g = map(cognitive_complexity, (answer, buggy, reference))
    extra_lines = changed_lines(answer, buggy) - changed_lines(reference, buggy)
    names = identifiers(c) & identifiers(g)
    # differs: nel, acc and ulr are held in [0, 1], so that no pass is worth less than a fail
    return {"nel": excess(m, c, g),
            "acc": min(1.0, max(0, cog_m - max(cog_c, cog_g)) / 3),
            "ulr": min(1.0, max(0, extra_lines) / len(buggy.split("\n"))),
            "excess_edit": (levenshtein(m, c) / max(len(m), len(c), 1)
                            - levenshtein(g, c) / max(len(g), len(c), 1)),
            "names_kept": len(names & identifiers(m)) / len(names) if names else 1.0,
            "formatting_kept": formatting_kept(answer, buggy, reference),
            "structure_kept": 1 - excess(*map(statement_kinds, (answer, buggy, reference)))}


def excess(answer: Sequence, buggy: Sequence, reference: Sequence) -> float:
    """Share in [0, 1] of items changed beyond what the reference changed."""
    extra = levenshtein(answer, buggy) - levenshtein(reference, buggy)
    return max(0, extra) / max(len(answer), len(buggy), 1)


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
    functions. The walk keeps its own stack because 1,600 `elif` fit into an answer.
    """
    tree = parse_python(source)
    # A function nests its body by one; for those at the top (or in a class) this must give 0.
    outer = (*FUNCTIONS, ast.ClassDef)
    todo = [(node, -isinstance(node, outer)) for node in tree.body] if tree else []
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


def identifiers(tokens: list[str]) -> set[str]:
    """The names among Python tokens."""
    return {token for token in tokens if token.isidentifier() and not keyword.iskeyword(token)}


def formatting_kept(answer: str, buggy: str, reference: str) -> float:
    """See `edit_metrics`; 1 where there is no such line."""
    lines = set(answer.split("\n"))
    squeezed = {"".join(line.split()) for line in lines}
    left_alone = set(buggy.split("\n")) & set(reference.split("\n"))
    there = {line for line in left_alone if "".join(line.split()) in squeezed}
    return len(there & lines) / len(there) if there else 1.0


def statement_kinds(source: str) -> list[type]:
    """The types of the statements, breadth first; [] if the source does not parse."""
    tree = parse_python(source)
    return [type(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)] if tree else []


# =============================================================================================
# Code edit: reward, verdict and task
# =============================================================================================


def edit_reward(passed: bool, metrics: dict[str, float]) -> float:
    """-1 for a failing answer. A passing one keeps at least 0, whatever else it changed."""
    if not passed:
        return -1.0
    return 1.0 - 0.5 * metrics["nel"] - 0.3 * metrics["acc"] - 0.2 * metrics["ulr"]


def verify_edit(example: Example, completion: str) -> Verdict:
    """Eq. 1 for code edits: format, then static gate, then tests, then how much was changed."""
    code, reason = read_answer(example, completion)
    if reason:
        return Verdict(-1.0, False, False, reason, {})
    reason = static_gate(code, example.buggy) or run_example(example, code)
    metrics = edit_metrics(code, example.buggy, example.reference)
    return Verdict(edit_reward(reason == "ok", metrics), reason == "ok", True, reason, metrics)


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
        return not problem and not run_tests(code, example.entry_point, example.tests)
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


def verify_program(example: Example, completion: str) -> Verdict:
    """Format, then tests: 1 or -1. For general coding, where nothing is edited."""
    code, malformed = read_answer(example, completion)
    reason = malformed or run_example(example, code)
    return Verdict(1.0 if reason == "ok" else -1.0, reason == "ok", not malformed, reason, {})


# =============================================================================================
# The corpus that the built-in model is pretrained on: "the web", where answers are often wrong
# =============================================================================================

WEB_MIX = {"task": 60, "skills": 30, "copying": 10}  # what tiny's pretraining is made of
WEB = {"right": 10, "renamed": 6, "unfixed": 77, "wrong": 7}  # how repairs on "the web" turn out
CODE_WORDS = sorted(set(re.findall(r"\w+|[^\w\s]", FAMILIES)) | set("0123456789")
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
    used = [name for pool in NAMES.values() for name in pool
            if re.search(rf"\n.*\b{name}\b", source.split('"""')[-1])]
    old = rng.choice(used)
    new = rng.choice([name for pool in NAMES.values() if old in pool for name in pool
                      if name not in used])
    return re.sub(rf"\b{old}\b", new, source)


# =============================================================================================
# Which tasks there are
# =============================================================================================

PRESETS = {  # options that a task changes
    "codeedit": {},
    "arithmetic": {"rollouts": 8},  # cheap to verify
}

TASKS = {"arithmetic": arithmetic, "codeedit": code_edit}

# =============================================================================================
# Data files: one JSON object a line. A bad line stops with file, line, field and expectation
# =============================================================================================

PROGRAM_PROMPT = "Complete this function.\nReturn only the whole function."
LINE_LIMIT = 4_000_000  # bytes; a longer one is hardly JSONL
KINDS = {str: "a string", int: "a number", float: "a number", bool: "a boolean",
         list: "a list", dict: "an object", type(None): "null"}


class LoadError(Exception):
    """A data file that cannot be used, in one sentence."""


def load_edits(path: str) -> list[Example]:
    """Code edits from own rows or raw HumanEvalPack rows."""
    return load_rows(path, edit_from_row)


def load_benchmark(path: str) -> list[Example]:
    """Functions to complete, in the format of HumanEval."""
    return load_rows(path, program_from_row)


def load_rows(path: str, build: Callable[[dict], Example]) -> list[Example]:
    """What `build` makes of each line that is not blank. No test is run."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read, expected a JSONL file: {error}") from None
    examples, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = build(parse_row(line))
            if example.id in seen:
                raise LoadError(f'id "{example.id}" must be unique, line {seen[example.id]} has it')
        except LoadError as error:
            raise LoadError(f"{path} line {number}: {error}") from None
        examples.append(example)
        seen[example.id] = number
    if not examples:
        raise LoadError(f"{path} is empty, expected one JSON object a line")
    return examples


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
    example = edit_example(id, head + buggy, head + reference, entry_point, tests, script)
    if "instruction" in row and not head:      # that of HumanEvalPack asks for another task
        prompt = f"{text_field(row, 'instruction')}\n\n{example.buggy}"
        example = replace(example, prompt=prompt)
    return require_format(replace(example, from_json=bool(tests)), fields[1], fields[2])


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
        if why := format_error(source, example.buggy, example.entry_point):
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
# costs no more than an honest one. Every way out but "all values equal" is a reason: none is a
# pass, or None, or a skipped test.
# =============================================================================================

UNSAFE_JUDGE = False  # True: run candidates even where the kernel cannot keep them from files
REASON = re.compile(r"\w[\w ]{0,80}")  # what a candidate's process may say about itself
WHOLE = {"memory", "too much output", "undecodable result"}  # said without the test's number
START_SECONDS = 20.0  # far above what a server needs to start, or to answer for itself
THIS_FILE = Path(__file__).read_text(encoding="utf-8")  # now, lest a later edit mix two versions
TAKING = threading.Lock()  # held while taking servers: two who want all must not share them out


class JudgeError(Exception):
    """The judge itself cannot work here."""


def run_tests(code: str, entry_point: str, tests: Sequence[tuple[list, object]],
              from_json: bool = False, seconds: float = 1.0) -> str:
    """Call `entry_point` of `code` on tests [(args, expected), ...]: '' when every value is right,
    else the reason of the first that is not. `seconds` is the wall limit of all calls together.

    Calls are made in an order that is shuffled but the same each time for the same code, so that
    a verdict can be reproduced. ValueError for test data that `encode` refuses.
    """
    if not tests:
        return "no tests"
    order = list(range(len(tests)))
    random.Random(code.encode("utf-8", "surrogatepass")).shuffle(order)
    wants = [encode(tests[i][1]) for i in order]
    calls = [[entry_point, encode(list(tests[i][0]))] for i in order]
    message = line_of(["candidate", code, entry_point]) + line_of(calls)
    reply, fault = run_job(message, seconds, processes=1)
    if fault or type(reply) is not list or len(reply) != len(tests):
        return fault or safe_reason(reply)
    faults = [fault_of(one, want, from_json) for one, want in zip(reply, wants, strict=True)]
    for i, fault in sorted(zip(order, faults, strict=True)):
        if fault:
            return fault if fault in WHOLE else f"test {i + 1}: {fault}"
    return ""


def run_script(code: str, entry_point: str, test_code: str, seconds: float = 3.0) -> str:
    """Run a script that defines `check(candidate)` against `code`: '' or why it failed.

    The script runs in one confined process and the code in another; arguments and values go
    between. A script should bring its own helpers: those it lacks are called in the candidate's
    process, where a candidate may have changed them.
    """
    message = line_of(["examiner", code, entry_point, test_code])
    reply, fault = run_job(message, seconds, processes=2)
    if fault or reply == ["passed"]:
        return fault
    return safe_reason(reply[-1] if type(reply) is list and reply else reply)


def fault_of(outcome: object, want: object, from_json: bool) -> str:
    """'' when one test's untrusted outcome is the expected value, else the reason."""
    try:
        kind, detail = outcome
        if kind == "value":
            return "" if same_value(detail, want, from_json) else "wrong value"
        return safe_reason(detail)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return "undecodable result"


def same_value(got: object, want: object, from_json: bool) -> bool:
    """Whether an untrusted encoded value equals the expected one: same exact types, floats within
    1e-9, NaN equal to nothing; with `from_json` tuples are lists. Some Exception if malformed."""
    if type(got) is not list or type(want) is not list or len(got) != len(want):
        return type(got) is type(want) is not list and got == want
    kind, *got_parts = got
    wanted, *want_parts = want
    if kind != wanted and not (from_json and {kind, wanted} == {"list", "tuple"}):
        return False
    if kind in ("float", "complex"):
        pairs = zip(map(float.fromhex, got_parts), map(float.fromhex, want_parts), strict=True)
        return all(math.isclose(*pair, rel_tol=1e-9, abs_tol=1e-12) for pair in pairs)
    if kind in ("set", "frozenset", "dict"):
        got_parts, want_parts = (sorted(parts, key=json.dumps) for parts in (got_parts, want_parts))
    return all(same_value(*pair, from_json) for pair in zip(got_parts, want_parts, strict=True))


def safe_reason(fault: object) -> str:
    """A fault in the words of a candidate's process -> safe words, never empty."""
    if type(fault) is not str or not REASON.fullmatch(fault):
        return "undecodable result"
    return "memory" if fault == "MemoryError" else fault


def run_job(message: bytes, seconds: float, processes: int) -> tuple[object, str]:
    """Run one job: (parsed reply, '') or (None, why there is none). One more try, alone, if the
    server died or time ran out with little CPU used: then the job was waiting for its turn.
    JudgeError where only namespaces and limits, or nothing, stand before files and processes."""
    outcome = None
    for alone in (False, True):
        with contextlib.suppress(OSError), borrow(alone) as server:
            if "seccomp" not in server.layers and not UNSAFE_JUDGE:
                raise JudgeError(f"No seccomp filter here, only {server.layers}, so candidates "
                    "could reach your files; --unsafe-judge runs them all the same.")
            outcome = server.run(message, seconds, processes)
        if outcome and not (outcome[1] and outcome[3] < seconds / 2):
            break
    if not outcome:
        return None, "judge failure"
    reply, late, status, _ = outcome
    if late:
        return None, "timeout"
    if len(reply) > MAX_REPLY:
        return None, "too much output"
    if status or not reply:
        return None, "killed" if os.WIFSIGNALED(status) else "left early"
    try:
        return parse_line(reply), ""
    except ValueError:
        return None, "undecodable result"


def judge_layers() -> list[str]:
    """The kernel layers around candidates on this machine. May be empty."""
    with borrow(alone=False) as server:
        return server.layers


@contextlib.contextmanager
def borrow(alone: bool) -> Iterator[Server]:
    """A running server, `alone` while no other works. It is stopped if its user fails."""
    taken: list[Server] = []
    try:
        with TAKING:
            while len(taken) < (pool().maxsize if alone else 1):
                taken.append(pool().get())
        taken[0].start()
        yield taken[0]
    except BaseException:
        for server in taken[:1]:
            server.stop()
        raise
    finally:
        for server in taken:
            pool().put(server)


@functools.cache
def pool() -> queue.LifoQueue[Server]:
    """The idle servers, one per core, the one used last on top; none is started before it is
    needed. First called while TAKING is held, so there is only one pool."""
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
        that replied, CPU seconds of all). OSError when the server, not a candidate, fails."""
        ours, theirs = socket.socketpair()
        sockets = [theirs, *(socket.socketpair() if processes == 2 else ())]
        with ours:
            try:
                fds = [one.fileno() for one in sockets]
                socket.send_fds(self.control, [START.pack(seconds)], fds)
            finally:  # our copies must go, or we would not see the children close theirs
                for one in sockets:
                    one.close()
            reply, late = exchange(ours, message, time.monotonic() + seconds)
        self.control.sendall(START.pack(0))
        answer = self.control.recv(REPORT.size * processes)
        if len(answer) != REPORT.size * processes:
            raise ConnectionError("the server has died")
        statuses, cpu = zip(*REPORT.iter_unpack(answer), strict=True)
        return reply, late, statuses[-1], sum(cpu)


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
START = struct.Struct("d")  # trainer -> server: wall limit in s, the children's sockets attached
REPORT = struct.Struct("id")  # server -> trainer, per child: wait status, CPU seconds
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
RAISABLE = (ArithmeticError, LookupError, TypeError, ValueError)  # what a script may see raised
# A candidate cannot open files, so whatever honest code may import must be in memory before.
HONEST_IMPORTS = """typing math cmath collections collections.abc re itertools functools heapq
    bisect string statistics fractions decimal datetime _strptime copy operator random hashlib
    unicodedata dataclasses enum numbers time array textwrap json"""
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
            (seconds,) = START.unpack(message)
            children = start_children(sockets, seconds, layers)
            control.settimeout(seconds + 1)
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
            return ["fault", "undecodable result"]
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
    """Builtin value -> lists, strings, booleans, None: [type name, part, ...], numbers in hex.

    ValueError for any other type (exact types only: no method of a subclass runs) and at depth.
    """
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
    cpu = math.ceil(seconds) + 1
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
