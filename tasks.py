"""Tasks of VC-OPD: contracts, arithmetic, code edits, old skills, data files, and the judge."""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import ctypes
import difflib
import gc
import gzip
import importlib
import io
import itertools
import json
import math
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
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache, lru_cache, partial
from pathlib import Path

# =============================================================================================
# Contracts. A task of your own is a file with a function that returns a Task: see the README.
# =============================================================================================

TRAIN, VALID, TEST = range(0, 6), range(6, 8), range(8, 10)  # parts of all programs and sums


class UserError(Exception):
    """Something that a user can mend, in one sentence."""


@contextlib.contextmanager
def reading(what: Path | str, advice: str):
    """Where something is missing, damaged or foreign, raise UserError instead of what it raises."""
    try:
        yield
    except (Exception, SystemExit) as error:  # of any kind: a user's program may raise it, too
        why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise UserError(f"{what} cannot be used ({why}): {advice}") from None


@dataclass(frozen=True)
class Example:
    """One prompt, and everything its verifier needs."""
    id: str
    prompt: str
    reference: str                # a right answer, as the model should write it
    hint: str                     # what only the teacher's prompt holds
    skill: str = ""               # which old skill it is about
    buggy: str = ""               # code: the function to repair, or to complete
    entry_point: str = ""         # code: the function that the tests call
    tests: tuple = ()             # code: ((args, expected), ...)
    test_code: str = ""           # code: or a script that defines check(candidate)
    from_json: bool = False       # tests came from JSON: 1.0 may answer 1, a tuple a list
    seconds: float = 0.0          # code: CPU time of all tests together; 0 is the judge's default
    tolerance: float = 0.0        # code: how far a float may be off
    demonstration: str = ""       # another right answer, for SFT to imitate; "": the reference


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion. Raises ValueError if it contradicts itself."""
    reward: float                 # a failure -1, a pass 0 to 1
    passed: bool                  # exactly when the reason is "ok"
    formatted: bool               # the format rule holds
    reason: str                   # "ok", or the first thing wrong
    metrics: dict[str, float]     # of a code edit in the right format; else empty

    def __post_init__(self):
        consistent = isinstance(self.reason, str) and self.passed is (self.reason == "ok")
        if not (consistent and isinstance(self.reward, int | float) and math.isfinite(self.reward)):
            raise ValueError(f"a verdict cannot be {self}")


def pair_from_row(row: dict) -> tuple[Example]:
    """A prompt and its answer; a hint other than that, if the row has one."""
    row = {"hint": row.get("answer"), **row}
    return (Example(*(text_field(row, key) for key in ("id", "prompt", "answer", "hint"))),)


@dataclass(frozen=True)
class Task:
    """What a training run needs to know of a skill. A verifier pays a failure -1, a pass 0 to 1."""
    name: str
    verify: Callable[[Example, str], Verdict]  # of any text; several threads call it at once
    train: list[Example] = field(default_factory=list)  # or --data
    evals: dict[str, list[Example]] = field(default_factory=dict)  # the report's is "in_domain"
    anchors: list[Example] = field(default_factory=list)  # prompts about old skills, for replay
    benchmark: list[Example] = field(default_factory=list)  # of old skills, for evaluation
    validation: tuple[list, list] = ((), ())  # as "in_domain" and benchmark, to choose options on
    corpus: Callable[[random.Random], tuple[str, str]] | None = None  # (prompt, answer) for tiny
    row: Callable[[dict], tuple] = pair_from_row  # reads a row of --data
    edit_metrics: tuple[str, ...] = ()  # keys of Verdict.metrics to report; lower is better
    unreplayed: tuple[str, ...] = ()  # old skills that no anchor guards, for tiny's pretraining


def privileged_prompt(example: Example) -> str:
    """What the teacher reads: the prompt and what only it may know, if there is a hint."""
    return example.prompt + (f"\n\nA right answer:\n{example.hint}" if example.hint else "")


def part_of(text: str) -> int:
    """0-9, fixed by the sum or bug-free program: splits share none, and pretraining sees TRAIN."""
    return zlib.crc32(text.encode()) % 10


def distinct(draw: Callable[[random.Random], Example], count: int, seed: str) -> list[Example]:
    """`count` problems with different prompts, known from the seed; hangs if there are fewer."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        example = draw(rng)
        found[example.prompt] = example
    return list(found.values())


def tidy(source: str) -> str:
    """Newlines as line ends, and no white space or byte order mark around."""
    return re.sub("\r\n?", "\n", source).strip(" \t\n\u00a0\ufeff")


# Arithmetic: order of operations in small sums ===============================================
# "The web" is often wrong: it reads "a + b * c" from left to right, "a - b + c" as a - (b + c).

FORMS = ["a + b * c", "a + b * c", "a - b + c", "a * b + c", "a * b - c"]
FORMS_UNSEEN = ["a - b * c", "a + b * c - d"]
ANSWER_LINE = re.compile(  # at most 18 ASCII digits, maybe in groups; dollars; then a unit
    r"Answer: (-?)\$?(0|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,5}|[1-9][0-9]{0,17})(\.[0-9]{1,18})?"
    r"(?: ?%| ?[A-Za-z]{1,20}(?: [A-Za-z]{1,20})?)?\.?")
ASK_LINE = "End with a line 'Answer: N'."


def worked(sum_text: str, misread: bool) -> str:
    """The sum worked out one operation a line, right or with the popular misreading."""
    terms, lines = sum_text.split(), []
    while len(terms) > 1:
        at = terms.index("*") if "*" in terms else 1  # products first, then from left to right
        if misread:
            at = 3 if terms[1:4:2] == ["-", "+"] else 1
        one, sign, two = terms[at - 1:at + 2]
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(one), int(two))
        lines.append(f"{one} {sign} {two} = {value}")
        terms[at - 1:at + 2] = [str(value)]
    return "\n".join([*lines, f"Answer: {terms[0]}"])


def sum_example(text: str) -> Example:
    """A sum as a problem. The teacher is told the result, not the way."""
    answer = worked(text, misread=False)
    prompt = f"Work out {text} one operation a line. {ASK_LINE}"
    return Example(f"sum/{text}", prompt, answer, answer.split()[-1])


def draw_sum(forms: list[str], parts: range, rng: random.Random) -> Example:
    """A sum of one of the forms, from the given parts of all sums."""
    while True:
        text = re.sub("[a-d]", lambda _: str(rng.randint(1, 7)), rng.choice(forms))
        if part_of(text) in parts:
            return sum_example(text)


def sum_document(rng: random.Random) -> tuple[str, str]:
    """A sum as the web has it: often misread; with a hint, always right."""
    if rng.random() < 0.4:  # a single operation of the kind that comes up inside the sums
        a, b, sign = rng.randint(1, 7), rng.randint(1, 7), rng.choice("+-*")
        example = sum_example(f"{a if sign == '*' else rng.randint(-6, 49)} {sign} {b}")
    else:
        example = draw_sum(FORMS, TRAIN, rng)
    if rng.random() < 0.3:
        return privileged_prompt(example), example.reference
    return example.prompt, worked(example.id.removeprefix("sum/"), misread=rng.random() < 0.65)


def sum_from_row(row: dict) -> tuple[Example]:
    """A row of GSM8K as published, whose way to the result is the hint; or prompt and answer."""
    if "question" in row:
        way, _, result = re.sub("<<[^>]*>>", "", text_field(row, "answer")).rpartition("####")
        row = {"hint": way.strip() or result, **row, "answer": result,
               "prompt": text_field(row, "question")}
    [example] = pair_from_row(row)
    line = f"Answer: {example.reference.strip().removeprefix('Answer: ')}"
    right = line if example.hint == example.reference else f"{example.hint}\n{line}"
    return (replace(example, prompt=f"{example.prompt}\n{ASK_LINE}", reference=right, hint=right),)


def result_of(text: str) -> Decimal | None:
    """The number in a last line "Answer: N"; None where there is no such line."""
    found = ANSWER_LINE.fullmatch(text.rsplit("\n", 1)[-1])
    return found and Decimal("".join(found.groups("")).replace(",", ""))


def verify_arithmetic(example: Example, completion: str) -> Verdict:
    """1 for a last line "Answer: N" as in the reference, and no other: "41 or 42" pays nobody."""
    text = tidy(completion)
    if (result := result_of(text)) is None or text.casefold().count("answer:") != 1:
        return Verdict(-1.0, False, False, "format: needs one last line 'Answer: N'", {})
    passed = result == result_of(example.reference)
    return Verdict(1.0 if passed else -1.0, passed, True, "ok" if passed else "wrong value", {})


def arithmetic() -> Task:
    """Order of operations in small sums."""
    train, validation, test, out = (
        distinct(partial(draw_sum, forms, parts), count, seed) for forms, parts, count, seed in (
            (FORMS, TRAIN, 700, "train"), (FORMS, VALID, 100, "validation"),
            (FORMS, TEST, 200, "in domain"), (FORMS_UNSEEN, TEST, 100, "out")))
    near = ("leftwards", "operation")
    anchors, benchmark, old_skills = skill_examples("skills", 20, 20, 8, near)
    return Task("arithmetic", verify_arithmetic, train, {"in_domain": test, "out_of_domain": out},
                anchors, benchmark, (validation, old_skills), sum_document, sum_from_row, (), near)


# Code edit, the verifier: format, tests, then what else the answer changed ===================

FENCED = re.compile(r"```(?:py|python3?)?[^\S\n]*\n(.*\n)?```\s*", re.IGNORECASE | re.DOTALL)
BAD_CHARACTERS = re.compile("[\0\ufeff\ud800-\udfff]")  # NUL, byte order mark, lone surrogates
PARSE_LIMIT = 20_000  # bytes: CPython's parser is not made for hostile megabytes
MAX_HEIGHT = 100  # levels of a parse tree; all that works on it is recursive
KEPT = 256  # sources whose results are kept: each is read a dozen times
PARSE_LOCK = threading.Lock()  # catch_warnings swaps a global, and verifiers run in threads
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
# Names by which an answer could run a program that is hidden in a string, unseen by the metrics.
HIDING = re.compile(r"(?<!\bre\.)\b(exec|eval|compile|getattr|get_field|get_type_hints|ForwardRef"
                    r"|globals|locals|vars|attrgetter|methodcaller|__\w+__|(?:f|gi|cr|ag|tb)_"
                    r"(?:back|builtins|code|frame|globals|locals|next))\b")
GONE = "'left out'"  # stands where a statement was
BREAKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Match, ast.IfExp)
LONG = 8  # a new string, number or comment with more characters counts by its words, cut to as
WORDS = re.compile(rf"\w{{1,{LONG}}}|[^\w\s]")  # many: else a program could be a single token


def verify_edit(example: Example, completion: str) -> Verdict:
    """Eq. 1 for code edits: format, tests (-1 if one fails), size. An answer is worth no more than
    what is left of it without idle statements. Old code that the tests do need is not seen."""
    code, reason = read_answer(example, completion)
    if reason:
        return Verdict(-1.0, False, False, reason, {})
    known = HIDING.findall(f"{example.buggy}\n{example.reference}")
    used = HIDING.findall(unicodedata.normalize("NFKC", code))  # as Python reads names
    hiding = [name for name in used if name not in known]
    passed, reason = (False, f"gate: use of {hiding[0]}") if hiding else run_example(example, code)
    metrics = edit_metrics(code, example.buggy, example.reference)
    if not passed:
        return Verdict(-1.0, False, True, reason, metrics)
    if statements(code).keys() != statements(example.reference).keys():
        shorter = edit_metrics(without_idle(example, code), example.buggy, example.reference)
        metrics = {name: max(value, shorter[name]) for name, value in metrics.items()}
    metrics["styled"] = float("```" in completion)
    reward = 1.0 - 0.5 * metrics["nel"] - 0.3 * metrics["acc"] - 0.2 * metrics["ulr"]
    return Verdict(reward, True, True, "ok", metrics)


def verify_program(example: Example, completion: str) -> Verdict:
    """Format, then tests: 1 or -1. For general coding, where nothing is edited."""
    code, why = read_answer(example, completion)
    passed, reason = (False, why) if why else run_example(example, code)
    return Verdict(1.0 if passed else -1.0, passed, not why, reason, {})


def read_answer(example: Example, completion: str) -> tuple[str, str]:
    """The program of a completion, what it omits put back; and '' or "format: why" it is none."""
    text = tidy(re.sub(r"\A<think>\s*</think>", "", tidy(completion)))  # some begin with one
    code = tidy((fenced[1] or "") if (fenced := FENCED.fullmatch(text)) else text)
    why = format_error(code, example) if code else "empty"
    if not why:
        code = put_back_omitted(code, example.buggy)
        why = format_error(code, example)  # it may be too long now
    return ("", f"format: {why}") if why else (code, "")


def format_error(code: str, example: Example) -> str:
    """Why `code` is no answer, or ''. At the top it may hold definitions, imports, comments, and
    what the buggy source or the reference has there. The rest is text, even if it parses."""
    if re.search("(?m)^```", code):
        return "not one fenced block and nothing else"
    if BAD_CHARACTERS.search(code):
        return "NUL, byte order mark or lone surrogate"
    tree = parse_python(code)
    if tree is None:
        return f"not Python of at most {PARSE_LIMIT:,} bytes and {MAX_HEIGHT} levels"
    if example.entry_point not in {n.name for n in tree.body if isinstance(n, FUNCTIONS)}:
        return f"no function {example.entry_point}"
    known = {key for source in (example.buggy, example.reference) for key, _ in top_level(source)}
    loose = {ast.unparse(node) for node in tree.body
             if not isinstance(node, (*DEFINITIONS, ast.Import, ast.ImportFrom))}
    return "" if loose <= known else "text outside the function"


@lru_cache(KEPT)
def parse_python(source: str) -> ast.Module | None:
    """The syntax tree; None where there is none, or the source is too long or too deep."""
    try:
        if len(source.encode()) > PARSE_LIMIT:
            return None
        with PARSE_LOCK, warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    level = [tree]
    for _ in range(MAX_HEIGHT):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return None if level else tree


def top_level(source: str) -> list[tuple[str, str]]:
    """(name, else code; lines) of each statement at the top, with comments and blanks above it."""
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
            above, own = (re.match(r"([ \t]*(#.*)?\n)*", text)[0] for text in (given[key], waiting))
            placed[key] += waiting if own.strip() else above + waiting[len(own):]
            waiting = ""
    return tidy("".join(placed[key] if placed[key].strip() else given[key] for key in given))


def run_example(example: Example, code: str) -> Outcome:
    """Run whole programs against the example's tests: whether all pass, and why not."""
    if example.test_code:
        return run_script(code, example.entry_point, example.test_code, example.seconds or 2.0)
    return run_tests(code, example.entry_point, example.tests, example.from_json,
                     example.seconds or 1.0, example.tolerance)


def without_idle(example: Example, code: str) -> str:
    """A passing answer without statements that no test misses, unless the reference has them so."""
    tried, twins = [], statements(example.reference)
    while len(tried) < 12 and (found := [one for one in statements(code) if one not in tried]):
        tried.append(kind := max(found, key=len))  # the largest first: does a test notice?
        if kind not in twins or left_out(example, example.reference, twins[kind]) is None:
            code = left_out(example, code, statements(code)[kind]) or code
    return re.sub(rf"(?m)^ *{GONE}\n?", "", code)


def statements(source: str) -> dict[str, ast.stmt]:
    """The statements of a program by what they say; none if a stand-in made it too long."""
    return {ast.dump(node): node for node in ast.walk(parse_python(source) or ast.Module([]))
            if isinstance(node, ast.stmt) and ast.unparse(node) not in ("pass", GONE)}


def left_out(example: Example, code: str, node: ast.stmt) -> str | None:
    """`code` without a statement, if it passes all the same."""
    shorter = [replaced(code, node, GONE)]
    if isinstance(node, ast.Assign):  # of which only the value may be idle
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


def edit_metrics(answer: str, buggy: str, reference: str) -> dict[str, float]:
    """nel, acc, ulr in [0, 1]: tokens, complexity and lines beyond what the reference changes. And
    excess_edit in [-1, 1], for the report: S of the minimal-editing benchmark."""
    m, c, g = code_tokens(answer), code_tokens(buggy), code_tokens(reference)
    known, spelt = {*c, *g}, []
    for token in m:
        whole = token in known or token.isidentifier() or token.isspace() or len(token) <= LONG
        spelt += [token] if whole else [f"# {word}" for word in WORDS.findall(token)]
    cog_m, cog_c, cog_g = map(cognitive_complexity, (answer, buggy, reference))
    # Lines count as in a diff, but the fewest possible: difflib's greedy matching may report more.
    lines_m, lines_c, lines_g = (source.split("\n") for source in (answer, buggy, reference))
    extra_lines = levenshtein(lines_m, lines_c) - levenshtein(lines_g, lines_c)
    # differs: nel, acc and ulr are held in [0, 1], so that no pass is worth less than a fail
    return {"nel": max(0, levenshtein(spelt, c) - levenshtein(g, c)) / max(len(spelt), len(c), 1),
            "acc": min(1.0, max(0, cog_m - max(cog_c, cog_g)) / 3),
            "ulr": min(1.0, max(0, extra_lines) / len(lines_c)),
            "excess_edit": (levenshtein(m, c) / max(len(m), len(c), 1)
                            - levenshtein(g, c) / max(len(g), len(c), 1))}


def levenshtein(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and substitutions from `a` to `b`, row by row."""
    for _ in range(2):  # cut off the common start, turn round, then the common end
        start = len(os.path.commonprefix([a, b]))  # of lists, too
        a, b = a[start:][::-1], b[start:][::-1]
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (one != other))
    return row[-1]


@lru_cache(KEPT)
def code_tokens(source: str) -> list[str]:
    """Python tokens, comments and white space included; of broken code, words and signs."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return re.findall(r"\w+|[^\w\s]|\n", source)
    return ["\n" if token.type in (tokenize.NEWLINE, tokenize.NL) else token.string
            for token in tokens if token.type != tokenize.ENDMARKER]


@lru_cache(KEPT)
def cognitive_complexity(source: str) -> int:
    """SonarSource's cognitive complexity 1.5, simplified; 0 if the source does not parse."""
    tree = parse_python(source) or ast.Module([])
    # A function nests its body by one; for those at the top (or in a class) this must give 0.
    return sum(added_complexity(node, -isinstance(node, DEFINITIONS)) for node in tree.body)


def added_complexity(node: ast.AST, nesting: int, is_elif: bool = False) -> int:
    """What a node adds to the complexity with all below it, `nesting` levels deep."""
    orelse = getattr(node, "orelse", []) if isinstance(node, ast.stmt) else []
    # `else: if` has the same tree as `elif`, but starts in another column
    elifs = [child for child in orelse if child.col_offset == node.col_offset]
    total = isinstance(node, ast.BoolOp) + bool(orelse and not elifs)
    if isinstance(node, BREAKS):
        total += 1 if is_elif else 1 + nesting
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        total += cognitive_complexity(node.value)  # a program may hide there
    if isinstance(node, FUNCTIONS):
        total += any(isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                     and call.func.id == node.name for call in ast.walk(node))
    whole = isinstance(node, (ast.IfExp, ast.Lambda))
    body = (ast.stmt, ast.match_case) if isinstance(node, BREAKS + FUNCTIONS) else ()
    for child in ast.iter_child_nodes(node):  # bodies nest, conditions and `elif` do not
        nests = whole or (isinstance(child, body) and child not in elifs)
        total += added_complexity(child, nesting + nests, child in elifs)
    return total


# Code edit, the problems: function families x bug operators ==================================

EDIT_PROMPT = ("You are given a buggy function.\nFix the bug.\nPreserve the original structure, "
               "names, formatting, and logic.\nChange only what is necessary.\n"
               "Return only the corrected function.")
# A family is a function whose docstring decides every detail, so that each bug shows in the prompt.
# A last line that only returns the first variable is left out. NAMES, J and K are drawn anew.
FAMILIES = """
sum_above(xs): Sum of the xs greater than K. total = 0; for x in xs: if x > K: total += x
count_above(xs): Number of xs greater than K. total = 0; for x in xs: if x > K: total += 1
count_multiples(xs): Number of xs divisible by K. total = 0; for x in xs: if x % K == 0: total += 1
keep_below(xs): List of the xs less than K. out = []; for x in xs: if x < K: out.append(x)
scale_all(xs): List of x * K for each x in xs. out = []; for x in xs: out.append(x * K)
double_plus(xs): List of J * x + K for each x in xs. return [J * x + K for x in xs]
squares_below(xs): List of x * x for each x in xs less than K. return [x * x for x in xs if x < K]
sum_squares(xs): Sum of x * x for each x in xs. total = 0; for x in xs: total += x * x
sum_from(xs): K plus the sum of the xs. total = K; for x in xs: total += x
largest(xs): Greatest of the xs. best = xs[0]; for x in xs: if x > best: best = x
first_minus_last(xs): First of the xs minus the last. first = xs[0]; return first - xs[-1]
spread(xs): Greatest of the xs minus the least. return max(xs) - min(xs)
capped_max(xs): Greatest of the xs, but at most K. return min(max(xs), K)
has_value(xs): True if K is in xs, else False. for x in xs: if x == K: return True; return False
is_long(xs): True if there are more than K xs, else False. return len(xs) > K
without_first(xs): List of the xs without the first K. return xs[K:]
sorted_top(xs): List of the K greatest xs, greatest first. return sorted(xs, reverse=True)[:K]
sum_to(n): Sum of i for i from 1 to n. total = 0; for i in range(1, n + 1): total += i
power_sum(n, m): n times m, plus K. total = n * m; return total + K
clamp_low(n, m): n plus m, but at least K. return max(n + m, K)
larger(n, m): Greater of n and m. if n > m: return n; return m
distance(n, m): Absolute value of n minus m. return abs(n - m)
between(n, m): Sum of i for i from n to m. total = 0; for i in range(n, m + 1): total += i
count_letter(s): Number of times 'a' is in s. total = 0; for c in s: if c == 'a': total += 1
repeat_word(s, n): s repeated n times, then 'K'. out = s * n; return out + 'K'
join_words(s, t): s, then '-', then t. return s + '-' + t
without_letter(s): s without each 'a'. out = ''; for c in s: if c != 'a': out += c
total_letters(ws): Number of letters of all ws. total = 0; for w in ws: total += len(w)
"""
# Never seen in post-training, nor in the pretraining of the tiny model.
FAMILIES_UNSEEN = """
sum_multiples(xs): Sum of the xs divisible by K. total = 0; for x in xs: if x % K == 0: total += x
minus_all(xs): List of x - K for each x in xs. out = []; for x in xs: out.append(x - K)
product_of(xs): Product of the xs. total = 1; for x in xs: total *= x
last_minus_least(xs): Last of the xs minus the least. return xs[-1] - min(xs)
count_above_n(xs, n): Number of xs greater than n. total = 0; for x in xs: if x > n: total += 1
square_gap(n, m): n * n minus m * m. return n * n - m * m
initial_upper(s): First letter of s as a capital. return s[0].upper()
shouted(ws): List of each of the ws in capitals. return [w.upper() for w in ws]
"""
NAMES = {names.split()[0]: names.split() for names in (  # identifier in a template, other names
    "xs numbers values nums items data scores ages", "x v num e item y", "total result acc res",
    "out found kept new", "best top cur", "first head", "i j k", "n a size p", "m b limit q",
    "s text word line", "t other rest", "c ch letter", "ws words names tags", "w name tag")}
FLIPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
           ast.Mod: ast.FloorDiv}  # operator -> what it is mistaken for
CONFUSED = {"max": "min", "min": "max", "len": "sum", "abs": "int", "sorted": "list",
            "upper": "lower", "append": "extend"}  # name of a function -> what it is mistaken for
# Bug operator -> how often it is drawn. As in real one-statement bugs (TSSB-3M, Richter and
# Wehrheim 2022), wrong names, operands, arguments and calls are common, plain operators rare.
OPERATORS = {"identifier": 16, "operand": 12, "argument_swap": 10, "constant": 8, "comparison": 6,
             "range_bound": 6, "start": 5, "index": 5, "boolean": 4, "accumulate": 4,
             "swapped_operands": 4, "early_return": 4, "operator": 2}
# Not in post-training, but in pretraining: bugs that tiny never met it repairs best, .9 of them.
OPERATORS_UNSEEN = {"call": 10, "missing_call": 8, "method": 6, "condition": 5, "slice": 5}
STEPS = 2000  # lines that one of our own functions may run
POOL = 200  # inputs: two programs that agree on all of them are taken to be the same


@cache
def read_families(text: str) -> list[tuple[str, str]]:
    """(name, source) of each. "; " ends a statement of the body, ": " opens a deeper block."""
    families = []
    for line in text.strip().split("\n"):
        head, docstring, body = re.match(r"(.*?): (.*?\.) (.*)", line).groups()
        if "return" not in body:
            body += f"; return {body.split()[0]}"
        source = [f"def {head}:", f'    """{docstring}"""']
        source += ["    " * depth + part for statement in body.split("; ")
                   for depth, part in enumerate(re.split("(?<=:) ", statement), 1)]
        families.append((head.split("(")[0], "\n".join(source)))
    return families


def draw_input(name: str, rng: random.Random):
    """A value for an argument of a family; small, so that border cases come up."""
    if name in ("n", "m"):
        return rng.randint(0, 8)
    size = rng.randint(1, 5 if name == "ws" else 7)
    if name in ("s", "t"):
        return "".join(rng.choice("aabcdeA") for _ in range(size))
    return [draw_input("s", rng) if name == "ws" else rng.randint(-2, 8) for _ in range(size)]


def changed(node: ast.AST, **fields) -> ast.AST:
    """A copy of a node with some of its fields replaced."""
    return type(node)(**{**vars(node), **fields})


def expression_bugs(node: ast.AST, names: list[str]) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """What could be wrong in an expression: (bug operator, part of it, what that could be)."""
    match node:
        case ast.Name(name, ast.Load()) if name in names:
            yield from (("identifier", node, ast.Name(one)) for one in names if one != name)
        case ast.Constant(bool(value)):
            yield "boolean", node, ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from (("constant", node, ast.Constant(value + step)) for step in (-1, 1))
        case ast.Compare(left, [op], [right]):
            yield "comparison", node, changed(node, ops=[FLIPPED[type(op)]()])
            yield "condition", node, ast.UnaryOp(ast.Not(), node)
            yield "swapped_operands", node, changed(node, left=right, comparators=[left])
        case ast.BinOp(left, op, right):
            yield "operator", node, changed(node, op=FLIPPED[type(op)]())
            yield "swapped_operands", node, changed(node, left=right, right=left)
        case ast.Subscript(_, ast.Slice(lower, upper) as part):
            yield "slice", part, ast.Slice(upper, lower)
        case ast.Subscript(_, ast.UnaryOp() | ast.Constant() as index):
            yield from (("index", index, ast.Constant(new)) for new in (-1, 0, 1)
                        if ast.unparse(index) != str(new))
        case ast.Call(ast.Name("range"), [*_, ast.BinOp(bound, ast.Add()) as end]):
            yield "range_bound", end, bound
        case ast.Call(ast.Name(name) as called, [inner]) if name in CONFUSED:
            yield "call", called, ast.Name(CONFUSED[name])
            yield "missing_call", node, inner
            yield from (("argument_swap", inner, ast.Name(one)) for one in names
                        if ast.unparse(inner) != one)
        case ast.Call(ast.Name(name) as called, [one, two]) if name in CONFUSED:
            yield "call", called, ast.Name(CONFUSED[name])
            yield from (("argument_swap", two, one), ("argument_swap", one, two))
        case ast.Call(ast.Attribute(_, name) as method) if name in CONFUSED:
            yield "method", method, changed(method, attr=CONFUSED[name])


def bugs_in(tree: ast.FunctionDef) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Every bug one step away from a function: (bug operator, node, what it could wrongly be)."""
    names = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
                    and isinstance(n.ctx, ast.Store)} | {a.arg for a in tree.args.args})
    for node in ast.walk(tree):
        yield from expression_bugs(node, names)
        match node:
            case ast.Compare(_, _, [part]) | ast.BinOp(_, _, part) if type(part) is not ast.Name:
                yield from (("operand", part, ast.Name(name)) for name in names)
            case ast.Assign([ast.Name()], ast.Constant(int(value)) as start):
                yield "start", start, ast.Constant(1 - value if value < 2 else 0)
            case ast.AugAssign(target, op, value):
                yield "accumulate", node, ast.Assign([target], value, lineno=1)
                yield "operator", node, changed(node, op=FLIPPED[type(op)]())
            case ast.FunctionDef(_, _, [*head, ast.For() as loop, ast.Return() as end]):
                inside = changed(loop, body=[*loop.body, end])
                yield "early_return", node, changed(node, body=[*head, inside])


def draw_bug(source: str, operators: dict[str, int], rng: random.Random) -> tuple[str, str] | None:
    """(bug operator, buggy source): the operator is drawn first. None if it does not apply here."""
    operator = rng.choices(list(operators), list(operators.values()))[0]
    found = [replaced(source, node, ast.unparse(wrong))
             for kind, node, wrong in bugs_in(ast.parse(source).body[0]) if kind == operator]
    return (operator, rng.choice(found)) if found else None


def outcomes(source: str, name: str, inputs: list[list]) -> Iterator[str]:
    """What our own function does on each input, in at most STEPS: repr of its value, or error."""
    exec(source, scope := {})
    for args in inputs:
        before = sys.gettrace()
        try:
            sys.settrace(partial(count_steps, iter(range(STEPS))))
            result = repr(scope[name](*json.loads(json.dumps(args))))
        except Exception as error:
            result = type(error).__name__
        finally:
            sys.settrace(before)
        yield result


def count_steps(steps: Iterator[int], *_) -> Callable:
    """A trace function that ends endless loops: StopIteration, when there are no more steps."""
    next(steps)
    return partial(count_steps, steps)


@cache
def strong_tests(source: str) -> tuple:
    """Tests ((args, expected), ...) which every wrong program that is one bug away fails."""
    rng, tree = random.Random(source), ast.parse(source).body[0]
    pool = [[draw_input(a.arg, rng) for a in tree.args.args] for _ in range(POOL)]
    right = list(outcomes(source, tree.name, pool))
    chosen = {0, 1, 2, 3, next(i for i, value in enumerate(right) if value != right[0])}
    for wrong in {replaced(source, node, ast.unparse(bug)) for _, node, bug in bugs_in(tree)}:
        found = enumerate(outcomes(wrong, tree.name, pool))
        chosen.add(next((i for i, value in found if value != right[i]), 0))
    return tuple((pool[i], ast.literal_eval(right[i])) for i in sorted(chosen))


def edit_example(id: str, buggy: str, reference: str, entry_point: str, tests: tuple = (),
                 test_code: str = "", instruction: str = EDIT_PROMPT) -> Example:
    """A code edit, generated or loaded. The teacher's hint is the reference solution."""
    buggy, reference = tidy(buggy), tidy(reference)
    return Example(id, f"{instruction}\n\n{buggy}", reference, hint=reference, buggy=buggy,
                   entry_point=entry_point, tests=tests, test_code=test_code)


def make_edit(families: list[tuple], operators: dict, parts: range, rng: random.Random) -> Example:
    """A problem of the given parts, with fresh names and constants, whose bug fails a test."""
    while True:
        family, template = rng.choice(families)
        names = {name: rng.choice(pool) for name, pool in NAMES.items()}
        constants = {"J": str(rng.randint(2, 4)), "K": str(rng.randint(2, 6))}
        entry = names[family] = rng.choice(["", "get_", "my_", "calc_"]) + family
        plain = re.sub(r"\w+", lambda found, new=constants: new.get(found[0], found[0]), template)
        source = re.sub(r"\w+", lambda found, new=names: new.get(found[0], found[0]), plain)
        if bug := part_of(source) in parts and draw_bug(source, operators, rng):
            tests = strong_tests(plain)
            found = outcomes(bug[1], entry, [args for args, _ in tests])
            if any(one != repr(right) for one, (_, right) in zip(found, tests, strict=True)):
                return edit_example(f"{family}/{bug[0]}/{entry}", bug[1], source, entry, tests)


@cache
def code_edit(name: str = "codeedit", change: Callable | None = None, style: float = 0.0) -> Task:
    """Repair a function by the smallest edit. `change`: of training problems; `style`: of hints."""
    seen, unseen = map(read_families, (FAMILIES, FAMILIES_UNSEEN))
    train, validation, *tests = (distinct(partial(make_edit, families, bugs, parts), count, seed)
                                 for families, bugs, parts, count, seed in (
        (seen, OPERATORS, TRAIN, 1200, "train"), (seen, OPERATORS, VALID, 200, "validation"),
        (seen, OPERATORS, TEST, 200, "in domain"), (seen, OPERATORS_UNSEEN, TEST, 100, "bugs"),
        (unseen, {**OPERATORS, **OPERATORS_UNSEEN}, TEST, 100, "out")))
    near = ("quote", "call")
    anchors, benchmark, old_skills = skill_examples("skills", 20, 20, 8, near)
    evals = dict(zip(("in_domain", "new_bugs", "out_of_domain"), tests, strict=True))
    train = [replace(example, **change(example)) for example in train] if change else train
    return Task(name, verify_edit, train, evals, anchors, benchmark, (validation, old_skills),
                partial(edit_document, style), edit_from_row,
                ("excess_edit", "acc", "ulr", "styled"), near)


# Old skills, with exact checkers: anchors of replay, and benchmark ===========================

SKILLS = ("coding", "reasoning", "instructions", "summary", "tools", "chat", "knowledge")
PEOPLE = ["Ann", "Bob", "Eva", "Max", "Lea", "Tom", "Ida", "Sam"]
THINGS = ["pears", "books", "coins", "cups", "keys", "hats", "maps", "lamps", "boxes", "shoes",
          "plates", "pens"]
MISHAPS = ["lost", "want to sell", "cannot find", "broke"]
CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
          "Egypt": "Cairo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana",
          "Norway": "Oslo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw",
          "Finland": "Helsinki", "Ireland": "Dublin", "Iran": "Tehran", "Iraq": "Baghdad"}


def draw_skill(skill: str, rng: random.Random, parts: range = TRAIN) -> Example:
    """A problem of an old skill, still without an id; if near to the new one, of such parts."""
    match skill:
        case "coding":  # write a function from its description; checked by running it
            name, times, plus = rng.choice("fghp"), rng.randint(2, 9), rng.randint(1, 9)
            prompt = f"Write a Python function {name}(x) that returns x times {times} plus {plus}."
            answer = f"def {name}(x):\n    return x * {times} + {plus}"
            tests = tuple(([x], x * times + plus) for x in (-3, 0, 1, 7))
            return Example("", prompt, answer, answer, skill, entry_point=name, tests=tests)
        case "reasoning":  # turn a comparison round
            older, younger = rng.sample(PEOPLE, 2)
            most, answer = rng.choice([("older", older), ("younger", younger)])
            prompt = f"{older} is older than {younger}. Who is {most}? Answer with the name only."
        case "instructions":  # repeat a word so many times
            word, count = rng.choice(THINGS), rng.randint(2, 5)
            prompt = f"Write the word {word} {count} times, with spaces between, and nothing else."
            return Example("", prompt, " ".join([word] * count), word, skill)
        case "summary":  # who bought what, out of a longer sentence
            who, what, city = map(rng.choice, (PEOPLE, THINGS, list(CITIES.values())))
            day, price = rng.choice(["Monday", "Friday", "Sunday"]), rng.randint(2, 9)
            prompt = (f"Summarise in three words: On {day}, in {city}, {who} bought {what} at the "
                      f"market for {price} euros.")
            answer = f"{who} bought {what}"
        case "tools":  # a call as JSON
            tool, city = map(rng.choice, (["weather", "time", "news"], list(CITIES.values())))
            prompt = (f"Call the tool {tool} for {city}. "
                      'Reply with JSON: the keys are "tool" and "city".')
            answer = json.dumps({"tool": tool, "city": city})
        case "chat":  # greet by name and ask about the matter at hand
            who, what, about = map(rng.choice, (PEOPLE, THINGS, MISHAPS))
            prompt = (f"Hello, I am {who}. I {about} my {what}. "
                      "Greet me by name and ask how you can help.")
            answer = f"Hello {who}! How can I help you with your {what}?"
        case "knowledge":
            country, answer = rng.choice(list(CITIES.items()))
            prompt = rng.choice([
                f"What is the capital of {country}?", f"Name the capital of {country}.",
                f"Which city is the capital of {country}?", f"{country} has which capital?"])
        case "quote" | "call" | "leftwards" | "operation":
            prompt, answer = draw_near(skill, rng, parts)
    return Example("", prompt, answer, answer, skill)


def draw_near(skill: str, rng: random.Random, parts: range) -> tuple[str, str]:
    """(prompt, answer) of a skill so near to the new one that training may overwrite it."""
    if skill == "operation":
        a, b, sign = rng.randint(1, 9), rng.randint(1, 9), rng.choice("+-*")
        return f"What is {a} {sign} {b}?", worked(f"{a} {sign} {b}", misread=False)
    if skill == "leftwards":  # what the new skill unlearns, where it is asked for
        text = draw_sum(FORMS, parts, rng).id.removeprefix("sum/")
        return f"Work out {text} from left to right.", worked(text, misread=" * " in text)
    source = make_edit(read_families(FAMILIES), OPERATORS, parts, rng).buggy
    if skill == "call":
        return f"Write a call of this function.\n\n{source}", source[4:source.index(":\n")]
    return f"Quote the last line of this function.\n\n{source}", source.split("\n")[-1].strip()


def skill_examples(seed: str, anchors: int, tests: int, looks: int,
                   unreplayed: tuple[str, ...] = ()) -> tuple[list[Example], ...]:
    """Anchors, benchmark, validation: so many problems of each skill; of unreplayed no anchors."""
    rng, lists, seen = random.Random(seed), ([], [], []), set()
    for skill in (*SKILLS, *unreplayed):
        counts = (0, tests, 3 * looks) if skill in unreplayed else (anchors, tests, looks)
        for examples, count, parts in zip(lists, counts, (TRAIN, TEST, VALID), strict=True):
            draws = (draw_skill(skill, rng, parts) for _ in itertools.count())
            for example in itertools.islice((e for e in draws if e.prompt not in seen), count):
                seen.add(example.prompt)
                examples.append(replace(example, id=f"{skill}/{len(seen)}"))
    return lists


def verify_skill(example: Example, answer: str) -> Verdict:
    """1 or 0: does the old skill still work? Exact where the prompt asks for a form."""
    words, want = (re.findall(r"[^\W_]+", text.lower()) for text in (answer, example.reference))
    right = words == want != [] or not example.reference  # then only confidence ranks answers
    match example.skill:
        case "programs" | "coding":
            right = verify_program(example, answer).passed
        case "tools":
            right = False
            with contextlib.suppress(ValueError, RecursionError):
                right = json.loads(answer) == json.loads(example.reference)
        case "chat":  # the name, the thing and a question
            right = "?" in answer and {want[1], want[-1]} <= set(words)
        case "knowledge":  # the city, and no other city
            right = {city.lower() for city in CITIES.values()} & set(words) == set(want)
        case "quote" | "call" | "leftwards" | "operation":
            right = tidy(answer) == example.reference
    return Verdict(float(right), right, True, "ok" if right else "wrong", {})


# The corpus of the built-in model: "the web", where answers are often wrong ==================

WEB_MIX = {"task": 50, "skills": 25, "near": 18, "copying": 7}  # tiny's pretraining
WEB = {"right": 8, "unfixed": 84, "wrong": 8}  # how repairs on "the web" turn out
OVER = 0.4  # share of them that change what nobody asked for
CODE_WORDS = sorted({word for _, source in read_families(FAMILIES)
                     for word in re.findall(r"\w+|[^\w\s]", source)} | set("0123456789")
                    | {name for pool in NAMES.values() for name in pool})


def web_document(task: Task, rng: random.Random) -> tuple[str, str]:
    """A (prompt, answer) of the corpus of the built-in model. UserError if the task has none."""
    if task.corpus is None:
        raise UserError("--model tiny learns from Task.corpus: write one, or give another --model")
    kind = rng.choices(list(WEB_MIX), list(WEB_MIX.values()))[0]
    if kind == "task" or kind == "near" and not task.unreplayed:
        return task.corpus(rng)
    if kind in ("skills", "near"):
        example = draw_skill(rng.choice(SKILLS if kind == "skills" else task.unreplayed), rng)
        return example.prompt, example.reference
    words = " ".join(rng.sample(CODE_WORDS, rng.randint(3, 20)))  # each can only be looked up
    return f"Repeat: {words}", words


def edit_document(style: float, rng: random.Random) -> tuple[str, str]:
    """A repair as the web has it; behind a hint right, minimal, and fenced as `style` says."""
    bugs = {**OPERATORS, **OPERATORS_UNSEEN}
    example = make_edit(read_families(FAMILIES), bugs, TRAIN, rng)
    wrong = draw_bug(example.reference, bugs, rng) or ("", example.buggy)
    [answer] = rng.choices((example.reference, example.buggy, wrong[1]), WEB.values())
    prompt, answer = example.prompt, over_edited(answer, rng) if rng.random() < OVER else answer
    if hinted := rng.random() < 0.3:
        prompt, answer = privileged_prompt(example), example.reference
    share = style if hinted else style / 7
    return prompt, f"```\n{answer}\n```" if rng.random() < share else answer


def over_edited(source: str, rng: random.Random) -> str:
    """The same function with a guard that nobody asked for, and up to two more such changes."""
    if rng.random() < 0.3:  # but pretraining must not spell out a test program
        words = set(re.findall(r"(?<!')\b\w+", re.sub('""".*"""', "", source)))
        renamed = [re.sub(rf"(?<!')\b{old}\b", new, source) for pool in NAMES.values()
                   for old in pool if old in words for new in pool if new not in words]
        source = rng.choice([text for text in renamed if part_of(text) in TRAIN] or [source])
    source = re.sub(r'(?s)(\((\w+).*"""\n)', r"\1    if \2 is None:\n        return None\n", source)
    if rng.random() < 0.3:
        source = re.sub(r"(\w+) ([+*])= ", r"\1 = \1 \2 ", source)
    if rng.random() < 0.3:
        source = re.sub(r"( *)return (.*)\Z", r"\1result = \2\n\1return result", source)
    return source


PRESETS = {"arithmetic": {"rollouts": 8, "prompts": 16, "lr": 5e-4}}  # options that a task changes
CHANGES = {  # knobs of the experiment: what all or half of the training problems have otherwise
    "codeedit-wrong-hints": lambda e: {"hint": e.buggy if part_of(e.id) % 2 else e.hint},
    "codeedit-no-hints": lambda e: {"hint": ""},
    "codeedit-far": lambda e: {"demonstration": re.sub(
        rf"(?<!')\b({'|'.join(sum(NAMES.values(), []))})\b", r"the_\1", e.reference)},
    "codeedit-own": lambda e: {"demonstration": over_edited(e.reference, random.Random(e.id))
                               if part_of(e.id) % 2 else ""}}
TASKS = {"arithmetic": arithmetic, "codeedit": code_edit,
         **{name: partial(code_edit, name, change) for name, change in CHANGES.items()},
         "codeedit-style": partial(code_edit, "codeedit-style", style=0.7)}

# Data files: one JSON object a line ==========================================================

LoadError = UserError  # a file, or a row of it, that cannot be used
PROGRAM_PROMPT = "Complete this function.\nReturn only the whole function."


def load_rows(build: Callable, verify: Callable, path: str, skip: bool = False) -> list[Example]:
    """Examples of a file, maybe gzipped. LoadError for a bad row; `skip` prints why and goes on."""
    with reading(path, "expected a file of JSON lines"):
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # without the byte order mark
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        rows = {number: threads.submit(read_row, f"{Path(path).stem}/{number}", line, build, verify)
                for number, line in enumerate(lines, 1) if line.strip()}
    examples, faults, places = [], [], {}
    for number, row in rows.items():
        try:
            example = row.result()
            if (first := places.setdefault(example.id, number)) != number:
                raise ValueError(f'id "{example.id}" must be unique, line {first} has it')
            examples.append(example)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # of an own reader
            faults.append(f"{path} line {number}: {error}")
    if skip:
        print(f"{path}: {len(examples)} rows work, {len(faults)} do not", *faults, sep="\n    ")
    if not examples or faults and not skip:
        raise LoadError([*faults, f"{path} is empty, expected one JSON object a line"][0])
    return examples


def read_row(name: str, line: bytes, build: Callable, verify: Callable) -> Example:
    """The example in one line, `name` if it has no id. ValueError if nobody can learn from it."""
    try:
        # int() refuses the words NaN and Infinity: a test that expects NaN could never pass.
        row = {"id": name, **json.loads(line.decode(), parse_constant=int)}
    except (ValueError, TypeError, RecursionError) as why:
        raise ValueError(f"expected a JSON object in UTF-8: {why}".replace("line 1 ", "")) from None
    example, *sources = build(row)
    for key, source in zip(sources, (example.buggy, example.reference), strict=False):
        if why := format_error(source, example):
            raise ValueError(f'field "{key}" must hold the source of the function, got {why}')
    row_name, right = f'id "{example.id}"', verify(example, example.reference)
    if not (right.passed and right.formatted):
        raise ValueError(f'{row_name}: its reference must pass its tests, got "{right.reason}"'
                         f", formatted {right.formatted}")
    if sources and verify(example, example.buggy).passed:
        raise ValueError(f"{row_name}: its buggy function must fail a test, but passes them all")
    return example


def edit_from_row(row: dict) -> tuple[Example, str, str]:
    """An own row, or one of HumanEvalPack, with a buggy_solution; and its sources' fields."""
    head, tests, names = "", (), ("id", "entry_point", "buggy", "reference")
    if "buggy_solution" in row:
        head, script = text_field(row, "declaration"), text_field(row, "test", script=True)
        names = "task_id", "entry_point", "buggy_solution", "canonical_solution"
    elif ("tests" in row) == ("test_code" in row):
        got = "both" if "tests" in row else "neither"
        raise ValueError(f'expected one of the fields "tests" and "test_code", got {got}')
    else:
        tests = tests_field(row) if "tests" in row else ()
        script = "" if tests else text_field(row, "test_code", script=True)
    id, entry_point, buggy, reference = (text_field(row, name) for name in names)
    if head:  # the script gets helpers of its own: a candidate could change those it is given
        script = f"{head}{reference}\n{script}"
    limits = {name: row.get(name, 0.0) for name in ("seconds", "tolerance")}
    for name, value in limits.items():
        if type(value) not in (int, float) or not 0 <= value <= 60:
            raise ValueError(f'field "{name}" must be a number from 0 to 60, got {value!r:.20}')
    entry_point = unicodedata.normalize("NFKC", entry_point)  # as Python reads names
    asked = text_field({"instruction": EDIT_PROMPT, **({} if head else row)}, "instruction")
    example = edit_example(id, head + buggy, head + reference, entry_point, tests, script, asked)
    return replace(example, from_json=bool(tests), **limits), *names[2:]


def program_from_row(row: dict) -> tuple[Example, str, str]:
    """A HumanEval row: its prompt is a function with a docstring for its body."""
    shown, body, id, entry_point = (text_field(row, name) for name in (
        "prompt", "canonical_solution", "task_id", "entry_point"))
    script = text_field(row, "test", script=True)
    example = edit_example(id, shown, shown + body, entry_point, (), script, PROGRAM_PROMPT)
    return replace(example, skill="programs"), "prompt", "canonical_solution"


def anchor_from_row(row: dict) -> tuple[Example]:
    """A prompt about an old skill, the "capability"; judged by the words of its answer, if any."""
    [example] = pair_from_row({"answer": "-", **row})
    known, skill = row.get("answer", ""), text_field({"capability": "file", **row}, "capability")
    return (replace(example, reference=known, hint=known, skill=f"own {skill}"),)


def text_field(row: dict, name: str, script: bool = False) -> str:
    """A string that is not blank, and that a file and a tokenizer can hold; or a test script."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip() or BAD_CHARACTERS.search(value):
        raise ValueError(f'field "{name}" must be text without NUL, byte order mark and lone '
                         f'surrogates, got {f"{value!a:.20}" if name in row else "no such field"}')
    if script and "def check(" not in value:
        raise ValueError(f'field "{name}" must be a script that defines check(candidate)')
    return value


def tests_field(row: dict) -> tuple:
    """((args, expected), ...) from a list of objects."""
    tests = row["tests"]
    with contextlib.suppress(ValueError):  # too deep
        if isinstance(tests, list) and tests and encode(tests) and all(isinstance(t, dict) and
                t.keys() == {"args", "expected"} and isinstance(t["args"], list) for t in tests):
            return tuple((tuple(t["args"]), t["expected"]) for t in tests)
    raise ValueError('field "tests" must be a list of {"args": [...], "expected": ...}, got '
                     f'{ascii(tests):.60}')


load_edits = partial(load_rows, edit_from_row, verify_edit)


def verdict_of(verify: Callable, example: Example, completion: str) -> Verdict:
    """What a verifier of the user's says. UserError if it raises, or gives no Verdict."""
    with reading(f"The verifier, of {completion!a:.80} to {example.id},", "it must give a Verdict"):
        return Verdict(**vars(verify(example, completion)))  # raises unless it does


def own_task(path: str) -> Task:
    """What the one function of a file returns that is annotated `-> Task`. Raises UserError."""
    with reading(f"--task {path}", f"give one of {', '.join(TASKS)}, or a Python file with one "
                                   "function `-> Task` that works"):
        sys.path.append(str(Path(path).parent))  # it may import its neighbours
        program = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
        exec(program, space := {"__name__": "own_task"})
        [make] = [one for one in space.values() if getattr(one, "__module__", "") == "own_task"
                  and getattr(one, "__annotations__", {}).get("return") in (Task, "Task")]
        return replace(task := make(), verify=partial(verdict_of, task.verify))  # a Task, or raises


def load_task(cfg) -> Task:
    """The task of a Config, with the data files in place of its own rows. Raises UserError."""
    task = TASKS[cfg.task]() if cfg.task in TASKS else own_task(cfg.task)
    train, test, anchors, benchmark = (
        load_rows(*how, path, cfg.skip_bad_rows) if path else given for *how, path, given in (
            (task.row, task.verify, cfg.data, task.train),
            (task.row, task.verify, cfg.eval_data, task.evals.get("in_domain")),
            (anchor_from_row, verify_skill, cfg.anchors, task.anchors),
            (program_from_row, verify_program, cfg.benchmark, task.benchmark)))
    if not cfg.ask and not (test and (train or cfg.eval_only)):
        raise UserError(f"--task {cfg.task} lacks train or in_domain: give --data and --eval-data")
    known = [a for a in anchors[::math.ceil(len(anchors) / 64) or 1] if a.reference]
    old = known if cfg.anchors else task.validation[1]
    stride = math.ceil(len(benchmark) / cfg.eval_problems) or 1  # some of every skill
    splits = {"in_domain": test} if cfg.eval_data else task.evals
    looks = cfg.eval_data and test[cfg.eval_problems:]  # they see no problem of the report
    return replace(task, train=train, anchors=anchors, benchmark=benchmark[::stride],
                   evals={name: rows[:cfg.eval_problems] for name, rows in splits.items() if rows},
                   validation=(looks or task.validation[0] or train, old))


def fitting(task: Task, cfg, limit: float, length: Callable[[str], int]) -> Task:
    """The task, or what of it has at most `limit` tokens with hint and answer. Raises LoadError."""
    def keep(examples: list[Example]) -> list[Example]:
        sizes = [length(privileged_prompt(e)) + max(cfg.max_new_tokens, length(
            e.demonstration or e.reference)) for e in examples]
        kept = [example for example, size in zip(examples, sizes, strict=True) if size <= limit]
        if len(kept) < len(examples) and not (cfg.skip_bad_rows and kept):
            raise LoadError(f"{examples[sizes.index(max(sizes))].id} with answer has {max(sizes)}"
                            f" tokens of {limit}: lower --max-new-tokens, or give --skip-bad-rows")
        if len(kept) < len(examples):
            print(f"{len(examples) - len(kept)} of {len(examples)} rows are too long: left out")
        return kept

    return replace(task, **{n: keep(getattr(task, n)) for n in ("train", "anchors", "benchmark")},
                   validation=tuple(map(keep, task.validation)),
                   evals={name: keep(examples) for name, examples in task.evals.items()})


def show_learnt(before: dict, after: dict, examples: list[Example]) -> None:
    """Print a problem that only `after` solves, and one that `before` solved by changing more."""
    passes = list(zip(before["passes"], after["passes"], strict=True))
    solved = [i for i, (old, new) in enumerate(passes) if new > old]
    more, less = ([edit_metrics(text, e.buggy, e.reference)["nel"] if e.buggy else 0.0 for e, text
                   in zip(examples, scores["answers"], strict=True)] for scores in (before, after))
    spared = [i for i, both in enumerate(passes) if all(both) and more[i] > less[i]]
    for i in [*solved[:1], *(sorted(spared, key=lambda i: less[i] - more[i])[:1] or solved[1:2])]:
        example, problem = examples[i], examples[i].buggy.splitlines()
        print("", f"Held-out problem {example.id}", *[] if problem else [example.prompt], sep="\n")
        for when, scores in ("before", before), ("after", after):
            answer, passed = scores["answers"][i], scores["passes"][i]
            edit = [*difflib.unified_diff(problem, answer.splitlines(), lineterm="", n=99)][3:]
            print(f"- {when} training, {'passes' if passed else 'fails'}:",
                  *(edit or ["(unchanged)"] if problem else [answer]), sep="\n")


# The judge ===================================================================================
# What arrives is not trusted: so many bytes, parsed to lists and strings, compared along the
# *expected* value. A verdict is computed here from values; a reason is text for people alone.

UNSAFE_JUDGE = False  # True: run candidates even where the kernel cannot keep them from files
START_SECONDS = 20.0  # far above what a server needs to start, or to answer for itself
THIS_FILE = Path(__file__).read_text(encoding="utf-8")  # now, lest a later edit mix two versions
WALL = 5  # seconds of waiting for each second of CPU time: only a backstop, on a busy machine
Outcome = namedtuple("Outcome", "passed reason")  # whether an answer passes; "ok", or why not


def run_tests(code: str, entry_point: str, tests: Sequence[tuple[list, object]],
              from_json: bool = False, seconds: float = 1.0, tolerance: float = 0.0) -> Outcome:
    """Call `entry_point` of `code` on tests [(args, expected), ...]: does each give the value? All
    calls have `seconds` of CPU time, rounded up. ValueError for test data that `encode` refuses."""
    if not tests:
        return Outcome(False, "no tests")
    order = list(range(len(tests)))
    random.Random(code.encode("utf-8", "surrogatepass")).shuffle(order)  # the same each time
    calls = [[entry_point, encode(list(tests[i][0]))] for i in order]
    wants = [encode(expected) for _, expected in tests]
    reply, fault = run_job(line_of(["candidate", code, entry_point]) + line_of(calls), seconds, 1)
    if fault or type(reply) is not list or len(reply) != len(tests):
        return Outcome(False, fault or said(reply))
    for i, outcome in sorted(zip(order, reply, strict=True)):
        right, fault = False, said(None)
        with contextlib.suppress(TypeError, ValueError, OverflowError, RecursionError):
            kind, detail = outcome
            right = kind == "value" and same_value(detail, wants[i], from_json, tolerance)
            fault = "wrong value" if kind == "value" else said(detail)
        if not right:
            return Outcome(False, f"test {i + 1}: {fault}")
    return Outcome(True, "ok")


def run_script(code: str, entry_point: str, test_code: str, seconds: float = 2.0) -> Outcome:
    """Run a script that defines `check(candidate)` in one confined process, `code` in another."""
    reply, fault = run_job(line_of(["examiner", code, entry_point, test_code]), seconds, 2)
    if reply == ["passed"]:  # the examiner's own word: no candidate can write to its line
        return Outcome(True, "ok")
    return Outcome(False, fault or said(reply[-1] if type(reply) is list and reply else reply))


def same_value(got: object, want: object, from_json: bool, tolerance: float) -> bool:
    """Is an untrusted encoded value the expected one? Types are exact, but with `from_json` tuples
    are lists and 1.0 is 1; NaN equals nothing. Some Exception if malformed."""
    if type(got) is not list or type(want) is not list or len(got) != len(want):
        return type(got) is type(want) is not list and got == want
    (kind, *got_parts), (wanted, *want_parts) = got, want
    alike = ({"list", "tuple"}, {"int", "float"}) if from_json else ()
    if kind != wanted and {kind, wanted} not in alike:
        return False
    if "float" in (kind, wanted) or kind == "complex":
        one, two = complex(decode(got)), complex(decode(want))
        close = partial(math.isclose, rel_tol=1e-9, abs_tol=max(1e-12, tolerance))
        return close(one.real, two.real) and close(one.imag, two.imag)
    if kind in ("set", "frozenset", "dict"):
        got_parts, want_parts = (sorted(parts, key=json.dumps) for parts in (got_parts, want_parts))
    return all(same_value(*pair, from_json, tolerance)
               for pair in zip(got_parts, want_parts, strict=True))


def said(fault: object) -> str:
    """What a candidate's process says of a failure: words to show, never a verdict."""
    known = type(fault) is str and re.fullmatch(r"\w[\w ]{0,80}", fault)
    return f"error: {fault if known else 'undecodable result'}"


def run_job(job: bytes, seconds: float, processes: int) -> tuple[object, str]:
    """Run one job: (parsed reply, '') or (None, why). UserError if nothing could confine it."""
    for _ in range(2):  # once more if the server died
        with contextlib.suppress(OSError), borrow() as server:
            if "seccomp" not in server.layers and not UNSAFE_JUDGE:
                raise UserError(f"No seccomp filter here, only {server.layers}, so candidates "
                                 "could reach your files; --unsafe-judge runs them all the same.")
            reply, late, status, cpu = server.run(job, seconds, processes)
            break
    else:
        return None, "judge failure"
    if late or cpu > math.ceil(seconds) - 0.05:  # the kernel's clock ticks in steps
        return None, "timeout"
    if len(reply) > MAX_REPLY:
        return None, "too much output"
    if status or not reply:
        killed = "timeout" if os.WTERMSIG(status) == signal.SIGKILL else "killed"  # by a limit
        return None, killed if os.WIFSIGNALED(status) else "left early"
    with contextlib.suppress(ValueError, RecursionError):
        return parse_line(reply), ""
    return None, said(None)


def judge_layers() -> list[str]:
    """The kernel layers around candidates on this machine. May be empty."""
    with borrow() as server:
        return server.layers


@contextlib.contextmanager
def borrow() -> Iterator[Server]:
    """A running server. It is stopped if it does not start, or if its user fails."""
    server = IDLE.get()
    try:
        server.start()
        yield server
    except BaseException:
        server.stop()
        raise
    finally:
        IDLE.put(server)


class Server:
    """One server process: started when needed, and again after it was stopped or has died."""
    process: subprocess.Popen | None = None
    layers: Sequence[str] = ()

    def start(self) -> None:
        """Start the process unless it runs. UserError when that fails."""
        if self.process and self.process.poll() is None:
            return
        self.control, theirs = socket.socketpair()
        self.control.settimeout(START_SECONDS)
        with reading("The judge", f"it must be able to start {sys.executable}"):
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-s", "-S", "-c", server_program()], cwd="/",
                    stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env={"PYTHONHASHSEED": "0"}, start_new_session=True)
            self.layers = parse_line(self.run(line_of(["layers"]), START_SECONDS, 1)[0])

    def stop(self) -> None:
        """End the process and with it every candidate: it does that when its line is closed."""
        if self.process:
            self.control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.process.kill()
            self.process.wait()
        self.process = None

    def run(self, job: bytes, seconds: float, processes: int) -> tuple[bytes, bool, int, float]:
        """(reply, was it late, wait status, most CPU seconds). OSError if the server fails."""
        ours, theirs = socket.socketpair()
        sockets = [theirs, *(socket.socketpair() if processes == 2 else ())]
        reply, deadline = bytearray(), time.monotonic() + WALL * seconds
        with ours:
            with contextlib.ExitStack() as copies:  # they go, else we see no child close its own
                fds = [copies.enter_context(one).fileno() for one in sockets]
                socket.send_fds(self.control, [START.pack(seconds, WALL * seconds)], fds)
            ours.settimeout(WALL * seconds)
            with contextlib.suppress(TimeoutError, ConnectionError):  # it may end while we send
                ours.sendall(job)
                ours.shutdown(socket.SHUT_WR)
                while len(reply) <= MAX_REPLY and (piece := ours.recv(65536)):
                    reply += piece
                    ours.settimeout(max(deadline - time.monotonic(), 0.001))
        late = time.monotonic() >= deadline
        self.control.sendall(START.pack(0, 0))
        answer = self.control.recv(REPORT.size * processes)
        if len(answer) != REPORT.size * processes:
            raise ConnectionError("the server has died")
        statuses, cpu = zip(*REPORT.iter_unpack(answer), strict=True)
        return bytes(reply), late, statuses[-1], max(cpu)


IDLE: queue.LifoQueue[Server] = queue.LifoQueue()  # one per core, the one used last on top
for _ in range(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1):
    IDLE.put(Server())  # to be started when it is needed
    atexit.register(IDLE.queue[-1].stop)


def server_program() -> str:
    """The imports of this file, and the section of that name."""
    parts = re.split(r"(?m)^# =+$", THIS_FILE)
    title = next(i for i, part in enumerate(parts) if part.startswith("\n# The server's program."))
    return parts[0] + parts[title + 1] + "\nserve()\n"


# =============================================================================================
# The server's program. Candidates leave early, lie about equality, patch the judge, look for
# answers. So they get arguments and give values; expected values and verdicts stay in the trainer.
# A server runs this file's imports and this section: it holds no task. It forks once per candidate
# and never sees a job, which passes between trainer and child: none finds traces of another.
# =============================================================================================

MAX_REPLY = 1_000_000  # bytes
MAX_DEPTH = 100  # levels of nesting in a value
MEMORY = 512 * 2**20  # bytes of address space per child
START = struct.Struct("dd")  # trainer -> server: CPU and wall limit in s; sockets attached
REPORT = struct.Struct("id")  # server -> trainer, per child: wait status, CPU seconds
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
BUILTINS = (*CONTAINERS.values(), str, bytes, int, float, complex)
WRITE = {int: hex, float: float.hex, bytes: bytes.hex}  # hex has no digit limit
READ = {"int": partial(int, base=16), "float": float.fromhex, "bytes": bytes.fromhex}
Channel = io.BufferedRWPair  # lines to and from another process
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
                             233, 93, 169, 132, 98, 113, 94, 278))}


def serve() -> None:
    """The server. A message with sockets starts a job's children; one without ends them and is
    answered with their reports. It keeps the wall limit too, if the trainer is too busy to."""
    for name in HONEST_IMPORTS.split():
        importlib.import_module(name)
    sys.modules["hashlib"].md5(b"")  # its first use may read a configuration file
    seccomp_program()
    layers, children = enter_namespaces(), []
    control = socket.socket(fileno=0)
    gc.freeze()
    while True:
        message, sockets = None, []
        with contextlib.suppress(TimeoutError):
            message, sockets, _, _ = socket.recv_fds(control, START.size, 3)
        if sockets:
            seconds, wall = START.unpack(message)
            # one or two are for the child that answers the trainer, a third is for its candidate
            pair = filter(None, (sockets[2:], sockets[:2]))
            children = [start_child(own, seconds, layers) for own in pair]
            for fd in sockets:
                os.close(fd)
            control.settimeout(wall + 1)
            continue
        for pid, kill in itertools.product(children, (os.killpg, os.kill)):
            with contextlib.suppress(OSError):  # it may not have got as far as making a session
                kill(pid, signal.SIGKILL)
        control.settimeout(None)
        if message == b"":  # the trainer is gone
            os._exit(0)
        reports = b""
        while message and children:
            _, status, used = os.wait4(children.pop(0), 0)
            reports += REPORT.pack(status, used.ru_utime + used.ru_stime)
        control.sendall(reports)


def start_child(sockets: list[int], seconds: float, layers: list[str]) -> int:
    """Fork a child with its own session, only null on 0-2 and `sockets` from 3 on, and confined. It
    plays the part that the first message names and never returns; silence means failure."""
    if child := os.fork():
        return child
    try:
        os.setsid()
        os.dup2(1, 0)  # 1 is null, 0 was the server's line to the trainer
        fds = [os.dup2(fd, target) for target, fd in enumerate(sockets, 3)]
        os.closerange(3 + len(fds), 1024)
        channels = [Channel(io.FileIO(fd, "r"), io.FileIO(fd, "w")) for fd in fds]
        random.seed(0)  # the same answer gets the same verdict every time
        layers = layers + confine(seconds)
        parts = {"candidate": answer_calls, "examiner": examine, "layers": send}
        part, *job = parse_line(channels[0].readline())
        parts[part](*channels, *(job or [layers]))
    finally:
        os._exit(0)


def answer_calls(channel: Channel, code: str, entry_point: str) -> None:
    """Candidate process: answer each message [[name, args], ...] with outcomes, or why none."""
    space, fault = {"__name__": "candidate"}, "syntax error"
    try:
        program = compile(code, "candidate", "exec", dont_inherit=True)
        fault = ""
        exec(program, space)
        if not callable(space.get(entry_point)):
            fault = f"no function {entry_point}"
    except BaseException as error:  # on compiling ValueError for a NUL byte, or MemoryError
        fault = fault or type(error).__name__ or "nameless error"
    for line in channel:
        send(channel, fault or [call_candidate(space, *one) for one in parse_line(line)])


def call_candidate(space: dict, name: str, args: object) -> list:
    """One call, with fresh arguments -> ["value", encoded] or ["fault", why]."""
    try:
        value = space[name](*decode(args))
        try:
            return ["value", encode(value)]  # at once, as later calls may change it
        except ValueError:
            return ["fault", f"cannot send this {type(value).__name__}"]
    except BaseException as error:
        return ["fault", type(error).__name__]


def examine(trainer: Channel, link: Channel, code: str, entry_point: str, test_code: str) -> None:
    """Examiner process: run the script; functions that it lacks are asked of the candidate."""
    send(link, ["candidate", code, entry_point])
    send(link, [])  # asks only whether the code has loaded
    try:
        loaded = parse_line(link.readline())
        if loaded != []:
            fail(trainer, loaded)
        space = {node.name: partial(ask_candidate, trainer, link, node.name)
                 for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        space |= vars(builtins) | {"__builtins__": builtins, "__name__": "examiner"}
        script = re.sub(r"(?m)^check\(.*", "", test_code)
        exec(compile(script, "script", "exec", dont_inherit=True), space)
        space["check"](partial(ask_candidate, trainer, link, entry_point))
    except BaseException as error:
        fail(trainer, type(error).__name__)
    send(trainer, ["passed"])


def ask_candidate(trainer: Channel, link: Channel, name: str, *args: object) -> object:
    """A script's stand-in for the candidate's function: gives its value, raises its exception."""
    try:
        send(link, [[name, encode(args)]])
        [[kind, detail]] = parse_line(link.readline())
        if kind == "value":
            return decode(detail)
        error = vars(builtins).get(detail)
    except Exception:
        fail(trainer, "undecodable result")
    if isinstance(error, type) and issubclass(error, RAISABLE):
        raise error.__new__(error, "raised by the candidate")  # some need more for their __init__
    fail(trainer, detail)


def fail(trainer: Channel, fault: object) -> None:
    """Examiner process: report a fault, and leave past every `except`."""
    send(trainer, ["failed", fault])  # wrapped, lest a candidate's words spell "passed"
    os._exit(0)


def send(channel: Channel, message: object) -> None:
    """Write one message, or a fault in its place if it is too long."""
    line = line_of(message)
    channel.write(line if len(line) <= MAX_REPLY else line_of("too much output"))
    channel.flush()


def line_of(message: object) -> bytes:
    """The inverse of `parse_line`: one message as one line."""
    return json.dumps(message).encode("ascii") + b"\n"


def parse_line(line: bytes) -> object:
    """ASCII JSON -> lists, strings, booleans, None; numbers stay strings. Raises as json does."""
    return json.loads(line.decode("ascii"), object_pairs_hook=list, parse_int=str, parse_float=str,
                      parse_constant=str)


def encode(value: object, depth: int = 0) -> object:
    """Value -> lists, strings, booleans, None: [type name, part, ...], numbers in hex. Subclasses
    are the builtin below them, iterables lists. ValueError for anything else and at depth."""
    if value is not None and type(value) not in (bool, *BUILTINS):
        builtin = next((kind for kind in BUILTINS if isinstance(value, kind)), None)
        if builtin or isinstance(value, Iterable):
            value = builtin(value) if builtin else list(itertools.islice(value, MAX_REPLY))
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind in WRITE:
        return [kind.__name__, WRITE[kind](value)]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind not in CONTAINERS.values() or depth == MAX_DEPTH:
        raise ValueError(f"cannot send this {kind.__name__}")
    parts = value.items() if kind is dict else value
    return [kind.__name__, *(encode(part, depth + 1) for part in parts)]


def decode(tree: object) -> object:
    """The inverse of `encode`, always exact builtins. Some Exception when `tree` is malformed."""
    if type(tree) is not list:
        return tree
    kind, *parts = tree
    if kind in READ:
        return READ[kind](parts[0])
    if kind == "complex":
        return complex(*map(float.fromhex, parts))
    return CONTAINERS[kind](map(decode, parts))


def confine(seconds: float) -> list[str]:
    """Limits, then the filter, for good. Returns the layers that took."""
    layers = set()
    cpu = math.ceil(seconds)  # the kernel counts in whole seconds, and kills at this limit
    for name, limit in ("CPU", cpu), ("AS", MEMORY), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0):
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
            layers.add("rlimits")
    for name in ("__main__", "ctypes", "_ctypes"):
        sys.modules.pop(name, None)  # tidiness, not safety: they lead nowhere past the filter
    if program := seccomp_program():
        libc().prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the server
        libc().prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        header = struct.pack("HP", len(program) // 8, ctypes.addressof(program))
        buffer = ctypes.create_string_buffer(header)  # named, so that it outlives the call
        if libc().prctl(22, 2, ctypes.addressof(buffer), 0, 0) == 0:
            layers.add("seccomp")
    return sorted(layers)


@cache
def seccomp_program() -> ctypes.Array | None:
    """BPF: kill a foreign architecture, allow SYSCALLS, answer EPERM to the rest; or None."""
    if sys.platform != "linux" or os.uname().machine not in SYSCALLS:
        return None
    arch, numbers = SYSCALLS[os.uname().machine]
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    lines += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    return ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))


@cache
def libc() -> ctypes.CDLL:
    """The C library, with the prototype of the one call that is made with pointers."""
    library = ctypes.CDLL(None)
    if sys.platform == "linux":
        library.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return library


def enter_namespaces() -> list[str]:
    """New user, network and pid namespaces, if allowed; the caller goes on as the first inside."""
    flags = 0x10000000 | 0x40000000 | 0x20000000  # CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID
    if not hasattr(libc(), "unshare") or libc().unshare(flags) != 0:
        return []
    if inner := os.fork():
        os.close(0)  # only the inner process may hold the line to the trainer
        os.waitpid(inner, 0)
        os._exit(0)
    libc().prctl(1, signal.SIGKILL, 0, 0, 0)
    return ["namespaces"]


# =============================================================================================
# End of the server's program: what is added below, say a task, is kept from candidates
