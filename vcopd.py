#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "numpy==2.4.6",
#     "tqdm==4.70.1",
#     "pytest==9.2.0",
# ]
# ///
"""Verifier-Calibrated On-Policy Distillation (VC-OPD): a reference implementation in one file.

A language model learns a new skill without forgetting its old ones: it trains on its own samples,
a verifier says how good they are, and a teacher adds small hints, token by token, inside that
verdict: at most lambda * clip (0.1) each.

    python vcopd.py --task codeedit        # 7 minutes on 2 cores the first time, 3 afterwards
    python vcopd.py --task arithmetic      # 3 minutes the first time, 1.5 afterwards
    python vcopd.py --task codeedit --method rl      # the same loop without a teacher

The method. Step 1 runs once, `train_step` repeats Steps 2 to 6: start reading with it, in Part I,
and skip the configuration above. It asks the teacher while the verifier judges, and refreshes
replay before the update.

    Step 1  format      SFT on a separate adapter, only if needed       train_format
    Step 2  rollouts    y_1..y_K ~ pi_theta(.|x)                                sample
    Step 3  verdict     Eq. 1  R_i = V(x, y_i)                                  collect_rollouts
                        Eq. 2  A_i = (R_i - mean R) / (std R + 1e-4)            group_advantage
    Step 4  hints       log T(a_t|s_t, hint) of the student's tokens            ask_teacher
                        Eq. 3  D_t = clip(log T(a_t|s_t, hint) - log pi_old)    teacher_gap
                        Eq. 4  G_i = sigmoid(A_i)                               GATES
                        Eq. 5  A_dense = A_i + lambda * G_i * D_t               dense_advantage
    Step 5  update      Eq. 6  rho_t = pi_theta / pi_old                        vcopd_loss
                        Eq. 7  L_policy = -mean min(rho A_dense,                vcopd_loss
                                           clip(rho, 1 - eps, 1 + eps) A_dense)
                        Eq. 8  L_kl = beta * KL(pi_theta || pi_ref), exact      vcopd_loss
                        Eq. 9  beta *= 1.2 if KL > target else 0.95             adapt_kl_coef
                        Eq. 10 H = entropy, exact                               token_terms
                        Eq. 11 L = L_policy + L_kl - eta * H                    vcopd_loss
    Step 6  replay      Eq. 12 L_total = (1 - r) * L + r * L_replay             total_loss

One frozen model plays every role but the stronger teacher's; named LoRA adapters and the prompt
decide which one:

    pi_0, the base          no adapter                      the prompt
    pi_ref, KL anchor       {format} if Step 1 ran          the prompt
    pi_theta, the student   {format} + {policy}             the prompt
    T, the self teacher     as pi_ref                       the prompt and the privileged hint
    T, a specialist         {specialist}, from a folder     the prompt and the privileged hint
    T, a stronger one       another model, the same ids     the prompt and the privileged hint

A PEFT folder as --model is one more frozen adapter of pi_ref and pi_theta. The hint is text that
only the teacher reads: what a right answer holds (`tasks.privileged_prompt`). The essay is
Marvin B. Freedman's "Verifier-Calibrated On-Policy Distillation" (2026).

Where this differs from the essay (each is marked `differs:` on its line, the last in tasks.py):

    1. KL is held to the model after Step 1, else the guard fights the format just learnt.
    2. Replay is plain NLL without a PPO ratio: its pi_old is many steps old.
    3. A group whose rewards are all equal gets A = 0 exactly, decided on max - min. KL, entropy
       and replay still act there, and hints, unless the gate is `success`.
    4. Log-probs of every role are taken at the sampling temperature, so that ratio, gap and KL
       speak of the distribution that was sampled (top_p aside). SFT and evaluation use 1.
    5. The reward's three penalties are each held in [0, 1], so no pass is below a fail.

Shapes: every per-token number is in a (B, T) tensor on completion positions, next to a mask that is
True up to and including the first stop token. Letters: P prompts, K rollouts, B = P*K rows,
T tokens, N of them under the mask, V vocabulary, D hidden size; b rows of a micro-batch; S rows of
L tokens in one forward pass, each a prompt with several answers.

To add a task: an entry of `tasks.TASKS`. A gate: one of `GATES`, and its name in `Config`. A model:
nothing, if `--model` accepts it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, groupby, pairwise, takewhile
from pathlib import Path

import tasks

# =============================================================================================
# Configuration. It comes before the heavy imports, so that --help and a mistyped option answer
# at once.
# =============================================================================================

INF = float("inf")
LARGEST = 2**31 - 1  # of whole numbers: sizes of tensors


def knob(default, text, low=None, high=None, choices=None):
    """A field of Config with its help text and the values it accepts."""
    return field(default=default, metadata={"help": text, "low": low, "high": high,
                                            "choices": choices, "kind": type(default)})


@dataclass(frozen=True)
class Config:
    """Every choice of a run. The defaults are the essay's, for a real model on one GPU."""

    # run
    task: str = knob("codeedit", "what to learn", choices=sorted(tasks.TASKS))
    method: str = knob("vcopd", "preset of the one loop",
                       choices=["vcopd", "rl", "opd", "sft"])
    model: str = knob("tiny", "tiny (built here), a Hugging Face id, a folder, or a folder with a "
                              "PEFT adapter to start from")
    teacher: str = knob("self", "self: the frozen model with the hint in its prompt; none; a "
                                "stronger model (id or folder); a folder with a PEFT adapter")
    data: str = knob("", "train on the problems of this file (JSON lines)")
    eval_data: str = knob("", "evaluate on the problems of this file")
    split: str = knob("test", "held-out problems to evaluate on; choose options on validation",
                      choices=["test", "validation"])
    benchmark: str = knob("", "general benchmark: a file in HumanEval's format")
    out: str = knob("", "run folder; runs/TASK-METHOD-sSEED when empty")
    seed: int = knob(0, "seed of everything that is drawn in training", low=0)
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = knob("auto", "of the frozen base",
                      choices=["auto", "float32", "bfloat16"])
    quantize: str = knob("none", "nf4 holds the frozen base in 4 bits (QLoRA)",
                         choices=["none", "nf4"])
    merge: str = knob("", "also write base and adapters as one plain model, to this new folder")
    eval_only: bool = knob(False, "evaluate --model and train nothing")
    check: bool = knob(False, "show which rows work, how long they are and what the model can "
                              "do already; train nothing")
    skip_bad_rows: bool = knob(False, "leave out rows of data files that nobody can pass")
    bench: bool = knob(False, "time the parts of a step on this machine and train nothing")
    inspect: bool = knob(False, "show token by token what a step would credit, and train nothing")
    compare: bool = knob(False, "train every method from one base, and print one table")
    ablations: bool = knob(False, "the same with one choice of the method changed at a time")
    seeds: int = knob(3, "how many seeds of each, with --compare and --ablations", low=1)
    # rollouts
    steps: int = knob(500, "training steps", low=1)
    prompts: int = knob(16, "P, prompts in a step", low=1)
    rollouts: int = knob(4, "K, answers sampled for each prompt", low=1)
    temperature: float = knob(0.8, "of sampling and of every training log-prob", low=0.05, high=5.0)
    top_p: float = knob(0.95, "nucleus of sampling; 1 removes its bias", low=0.01, high=1.0)
    max_new_tokens: int = knob(512, "longest answer", low=1)
    # teacher
    teacher_coef: float = knob(0.2, "weight of the teacher's hints (lambda, Eq. 5)", low=0.0)
    gap_clip: float = knob(0.5, "largest hint for one token, in nats (Eq. 3)", low=0.0)
    gate: str = knob("sigmoid", "how the verdict scales hints: more on better answers (sigmoid), "
                                "only there, more on worse, or alike (Eq. 4)",
                     choices=["sigmoid", "success", "failure", "none"])
    # update
    lora_rank: int = knob(32, "rank of the adapters", low=1)
    lora_alpha: float = knob(32.0, "the adapters are scaled by alpha / rank", low=0.0)
    lr: float = knob(1e-5, "learning rate (Adam, constant)", low=0.0)
    epochs: int = knob(2, "optimiser steps on each batch of rollouts", low=1)
    ratio_clip: float = knob(0.2, "epsilon of Eq. 7", low=0.0)
    kl_coef: float = knob(0.01, "beta of Eq. 8 at the start; 0 is no guard", low=0.0, high=10.0)
    kl_target: float = knob(0.03, "nats per token above which beta grows (Eq. 9)", low=0.0)
    entropy_coef: float = knob(0.001, "eta of Eq. 11", low=0.0)
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this norm", low=0.0)
    micro_tokens: int = knob(2048, "tokens in one forward pass, about, hints not counted", low=1)
    # replay
    replay_share: float = knob(0.1, "r of Eq. 12", low=0.0, high=0.9)
    replay_every: int = knob(200, "steps between refreshes of the replay pool", low=1)
    replay_keep: float = knob(0.2, "share of the replay samples that is kept", low=0.01, high=1.0)
    # format (Step 1)
    format_threshold: float = knob(0.8, "Step 1 runs below this share of well-formed answers",
                                   low=0.0, high=1.0)
    format_examples: int = knob(1000, "examples in the one epoch of Step 1", low=1)
    format_lr: float = knob(5e-5, "learning rate of Step 1", low=0.0)
    format_rank: int = knob(8, "rank of the format adapter", low=1)
    # evaluation
    eval_every: int = knob(100, "steps between looks at held-out problems", low=1)
    save_every: int = knob(100, "steps between checkpoints", low=1)
    eval_problems: int = knob(200, "held-out problems in each split", low=2)
    kl_budget: float = knob(0.05, "largest KL to the base (no adapter on) that is still improved",
                            low=0.0)
    unsafe_judge: bool = knob(False, "run answers even where the kernel cannot lock them in")


METHODS = {  # presets: what is fixed here cannot be set by an option. One loop, but for sft_step
    "vcopd": {},
    "rl": {"teacher_coef": 0.0},  # the verifier alone
    # blind distillation: A = 0 (see credit_answers), no gate, no clip: A_dense is D. Guards stay
    "opd": {"gate": "none", "gap_clip": INF, "teacher_coef": 1.0},
    "sft": {"teacher_coef": 0.0, "replay_share": 0.0},  # imitation of reference answers
}

IDLE = {  # options that have nothing to do in a method, and are refused there
    "vcopd": (),
    "rl": ("teacher", "gate", "gap_clip"),
    "opd": (),
    "sft": ("teacher", "gate", "gap_clip", "ratio_clip", "kl_coef", "kl_target", "entropy_coef",
            "temperature", "top_p", "replay_every", "replay_keep"),
}

OFF = {  # what does nothing where the option before it is 0
    "teacher_coef": ("teacher", "gate", "gap_clip"), "kl_coef": ("kl_target",),
    "replay_share": ("replay_every", "replay_keep"),
}

EVAL_ONLY = ("eval_only", "task", "model", "split", "eval_data", "benchmark", "out", "device",
             "dtype", "quantize", "rollouts", "max_new_tokens", "eval_problems", "skip_bad_rows",
             "unsafe_judge")

NOT_TRAINED = ("steps", "out", "merge", "split", "eval_data", "benchmark", "eval_every",
               "save_every", "eval_problems", "kl_budget", "format_threshold", "format_examples",
               "format_lr", "format_rank")

COMMANDS = {  # that do not train one model, and the options that have nothing to do there
    "check": (),
    "bench": NOT_TRAINED,
    "inspect": (*NOT_TRAINED, "lora_rank", "lora_alpha", "lr", "epochs", "ratio_clip", "kl_coef",
                "kl_target", "entropy_coef", "max_grad_norm", "replay_share", "replay_every",
                "replay_keep"),
    "compare": ("method", "merge", "split"),  # rates on validation, the table on test
    "ablations": ("method", "merge"),
}

TINY = {  # the built-in model has 1 M parameters: what differs from the essay's defaults, and why
    "steps": 48,  # under two minutes on 2 cores, and enough
    "lr": 1e-3,  # small models want larger steps: at 1e-5 nothing moves in 48
    "max_new_tokens": 96,  # its functions are short
    "kl_coef": 0.1,  # 48 steps are too few for beta to find its level from 0.01
    "replay_every": 10,  # 200 steps would be never
    "replay_keep": 0.5,  # it has 20 prompts of each old skill: with 4, coding was forgotten
    "replay_share": 0.2,  # the upper end: so small a model forgets faster
    "eval_every": 4,
    "save_every": 10,
    "format_examples": 512,
    "format_lr": 1e-3,  # as lr
}


GROUPS = {  # headings of --help: the option that each begins with
    "task": "what to run", "steps": "rollouts (Step 2)", "teacher_coef": "teacher (Step 4)",
    "lora_rank": "update (Step 5)", "replay_share": "replay (Step 6)",
    "format_threshold": "format (Step 1)", "eval_every": "evaluation",
}


def usage_error(message: str) -> None:
    """One sentence on the error stream, exit code 2."""
    print(one_line(f"{message} (see --help)"), file=sys.stderr)
    sys.exit(2)


def one_line(message: object) -> str:
    """An error as users see it, whatever line breaks the names in it bring along."""
    return f"vcopd.py: {' '.join(str(message).split())}"


def number(text: str) -> float:
    """A float that one can calculate with. Raises ValueError, for nan and inf too."""
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from Config: every field is an option."""
    parser = argparse.ArgumentParser(
        prog="vcopd.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        usage=f"vcopd.py --task {{{','.join(sorted(tasks.TASKS))}}} [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Teach a language model a new skill without forgetting (VC-OPD).\n\n"
                    "  python vcopd.py --task codeedit              7 min on 2 cores, then 3\n"
                    "  python vcopd.py --task arithmetic            3 min, then 1.5\n"
                    "  python vcopd.py --task codeedit --method rl  the same loop, no teacher")
    parser.error = usage_error
    for knob_field in fields(Config):
        name, meta = knob_field.name, knob_field.metadata
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        flag, shown = option(name), f"{meta['help']} [{default_of(name, knob_field.default)}]"
        if meta["kind"] is bool:
            group.add_argument(flag, help=meta["help"], action="store_true")
        else:
            kind = number if meta["kind"] is float else meta["kind"]
            group.add_argument(flag, help=shown, type=kind, choices=meta["choices"],
                               metavar=None if meta["choices"] else meta["kind"].__name__.upper())
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    group.add_argument("--plot", metavar="RUN", nargs="+", action="extend",
                       help="draw the curves of these runs, or one comparison; needs matplotlib")
    return parser


def option(name: str) -> str:
    """A field of Config as the user types it."""
    return f"--{name.replace('_', '-')}"


def default_of(name: str, default) -> str:
    """The default as --help shows it, with those of the tiny model and of tasks that differ."""
    presets = {"tiny": TINY, **tasks.PRESETS}
    return "; ".join([f"{default}", *(f"{who} {preset[name]}" for who, preset in presets.items()
                                      if name in preset)])


def fault_in(name: str, value, meta: dict) -> str:
    """What is wrong with the value of an option, or nothing."""
    low, high = meta["low"], meta["high"]
    top = high or (LARGEST if meta["kind"] is int else INF)
    if type(value) is not meta["kind"] or meta["choices"] and value not in meta["choices"]:
        return f"{option(name)} is {value!r}: give one of {meta['choices'] or [meta['kind']]}"
    if low is not None and not low <= value <= top:
        return f"{option(name)} is {value}: give a number from {low}" + (
            " up" if high is None and value < low else f" to {top}")
    return ""


def check_config(values: object) -> Config:
    """The Config in a config.json. Raises ValueError when it is not just that."""
    if not isinstance(values, dict) or values.keys() != {f.name for f in fields(Config)}:
        raise ValueError("config.json does not hold the options of this version")
    for knob_field in fields(Config):
        name = knob_field.name
        preset = METHODS.get(values["method"], {}).get(name)
        if values[name] != preset and (why := fault_in(name, values[name], knob_field.metadata)):
            raise ValueError(f"config.json: {why}")
    return Config(**values)


def saved_config(folder: str, said: dict) -> Config:
    """The config of a run that is resumed. What was said may only prolong or move it."""
    try:
        saved = check_config(json.loads((Path(folder) / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        usage_error(f"--resume {folder}: no run can be read there ({error}): "
                    "give the folder of a run, as --out named it")
    if saved.eval_only:
        usage_error(f"--resume {folder}: that folder holds an evaluation, which is not resumed: "
                    "give the folder of a training run")
    for name, value in said.items():
        if (name not in ("steps", "save_every", "device", "micro_tokens", "merge")
                and value != getattr(saved, name)):
            usage_error(f"{option(name)} {value} would break the continuation of a run with "
                        f"{getattr(saved, name)}: leave it out, or start a new run")
    if (Path(folder) / "report.json").exists() and said.get("steps", 0) <= saved.steps:
        print(f"The run in {folder} is finished: read report.json there, or train longer with "
              f"--resume {folder} --steps N, N above {saved.steps}")
        sys.exit(0)
    return replace(saved, **{**said, "out": folder})


def read_config(arguments: list[str]) -> tuple[Config, bool]:
    """Defaults, then the presets of model, task and method, then what the user said; resuming?"""
    said = vars(build_parser().parse_args(arguments))
    folder = said.pop("resume", None)
    for knob_field in fields(Config):
        name = knob_field.name
        if name in said and (why := fault_in(name, said[name], knob_field.metadata)):
            usage_error(why)
    if folder is not None:
        return saved_config(folder, said), True
    method, task = said.get("method", Config.method), said.get("task", Config.task)
    fixed = [name for name in METHODS[method] if name in said]
    if fixed:
        usage_error(f"--method {method} fixes {option(fixed[0])} at "
                    f"{METHODS[method][fixed[0]]}: leave that option out")
    if (method == "opd" or "compare" in said) and said.get("teacher") == "none":
        usage_error("--method opd learns from the teacher alone: leave out --teacher none")
    tiny = TINY if said.get("model", "tiny") == "tiny" else {}
    cfg = Config(**{**tiny, **tasks.PRESETS.get(task, {}), **METHODS[method], **said})
    check_use(said, cfg)
    return replace(cfg, out=cfg.out or f"runs/{cfg.task}-{kind_of(cfg)}"), False


def read_plot(arguments: list[str]) -> list[str]:
    """The folders that --plot names, beside which no option may stand; none without it."""
    said = vars(build_parser().parse_args(arguments))
    runs = said.pop("plot", [])
    if runs and said:
        usage_error(f"{option(next(iter(said)))} does nothing with --plot: leave it out")
    return runs


def kind_of(cfg: Config) -> str:
    """What its folder is called after the task: the experiment, or the method and the seed."""
    kinds = [kind for kind in ("eval_only", "compare", "ablations") if getattr(cfg, kind)]
    return kinds[0].removesuffix("_only") if kinds else f"{cfg.method}-s{cfg.seed}"


def check_use(said: dict, cfg: Config) -> None:
    """Refuse options that would do nothing beside the others."""
    modes = [name for name in (*COMMANDS, "eval_only") if getattr(cfg, name)]
    if len(modes) > 1:
        usage_error(f"{option(modes[0])} and {option(modes[1])} are two commands: give one")
    if cfg.rollouts == 1 and cfg.method in ("rl", "vcopd") and (
            cfg.teacher == "none" or cfg.teacher_coef == 0) and not cfg.eval_only:
        usage_error("--rollouts 1 leaves nothing to compare an answer with, and without a teacher "
                    "nothing is learnt: give at least 2")
    if cfg.inspect and (cfg.teacher == "none" or cfg.teacher_coef == 0):
        usage_error("--inspect shows the hints of a teacher: leave out --teacher none, "
                    "--teacher-coef 0 and methods without a teacher")
    if cfg.task != "codeedit" and (cfg.data or cfg.eval_data):
        usage_error("--data and --eval-data hold code edits: leave them out with --task "
                    f"{cfg.task}")
    idle = {name: f"with {option(switch)} 0" for switch, names in OFF.items()
            if getattr(cfg, switch) == 0 for name in names}
    if cfg.teacher == "none":
        idle |= dict.fromkeys(("teacher_coef", "gate", "gap_clip"), "with --teacher none")
    idle |= {name: f"with --method {cfg.method}" for name in IDLE[cfg.method]}
    if cfg.split == "validation":
        idle |= dict.fromkeys(("eval_data", "benchmark"), "with --split validation")
    if not (cfg.compare or cfg.ablations):
        idle["seeds"] = "without --compare or --ablations"
    for mode in modes:
        names = COMMANDS.get(mode, said.keys() - set(EVAL_ONLY))
        idle |= dict.fromkeys(names, f"with {option(mode)}")
    for name in said:
        if name in idle:
            usage_error(f"{option(name)} does nothing {idle[name]}: leave it out")


if __name__ == "__main__":  # before the imports that take seconds
    PLOTTED = read_plot(sys.argv[1:])
    CONFIG, RESUMING = (None, False) if PLOTTED else read_config(sys.argv[1:])

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402


class RunError(Exception):
    """Something a user can mend; shown as one sentence, exit code 2."""


class NotFinite(RunError):
    """A gradient with which no step can be taken."""


# #############################################################################################
#
#   PART I - THE METHOD: one training step, from top to bottom
#
# #############################################################################################

# =============================================================================================
# One training step. Below, its Steps one by one
# =============================================================================================


@dataclass
class State:
    """What a checkpoint holds besides the adapters' weights."""

    optimizer: torch.optim.Optimizer
    kl_coef: float
    step: int = 0
    replay: Batch | None = None
    before: dict = field(default_factory=dict)  # scores before training, to compare with


@dataclass
class Rollouts:
    """What a step sampled, and what verifier, reference and teacher think of it."""

    examples: list[tasks.Example]  # (B,) the example behind each answer
    batch: Batch
    answers: list[str]  # (B,)
    verdicts: list[tasks.Verdict]  # (B,)
    reward: Tensor  # (B,)
    advantage: Tensor  # (B,)
    parts: list[Experience]  # the same in micro-batches, for `update`


def train_step(policy: Policy, task: tasks.Task, examples: list, state: State,
               cfg: Config) -> tuple[dict, list[dict]]:
    """One step of VC-OPD on P examples. Returns metrics, and the first group for people to read."""
    # Steps 2 and 3: answers of the current student, judged; meanwhile the teacher reads them
    rollouts = collect_rollouts(policy, task, examples, state.step, cfg)

    # Step 6: now and then, collect the student's best answers to prompts about old skills
    if cfg.replay_share > 0 and state.step % cfg.replay_every == 0:
        state.replay = refresh_replay(policy, task.anchors, state.step, cfg)

    # Steps 4 and 5: credit tokens, and learn, with a share of replay. In the first epoch the
    # student still is pi_old: rho is 1, and the ratio clip acts in later ones only
    for epoch in range(cfg.epochs):
        replay = draw_replay(state, len(rollouts.answers), epoch, cfg)
        info = update(policy, rollouts.parts, replay, state, cfg)

    # once a step, by the KL of the last epoch: tighten or relax the guard
    state.kl_coef = adapt_kl_coef(state.kl_coef, info["kl"], cfg)
    metrics = {**rollout_metrics(rollouts, policy), **info, "kl_coef": state.kl_coef,
               **gap_metrics(rollouts.parts, tied_groups(rollouts.reward, cfg.rollouts))}
    return metrics, sample_records(rollouts, state.step + 1, cfg.rollouts)


def collect_rollouts(policy: Policy, task: tasks.Task, examples: list, step: int,
                     cfg: Config) -> Rollouts:
    """Sample K answers to each prompt, let the verifier judge, and reference and teacher read."""
    # Step 2: sample from the current student
    prompts = [policy.encode(example.prompt) for example in examples]
    generator = seeded("rollouts", cfg.seed, world() * step + rank())
    batch = sample(policy, policy.student, prompts, cfg.rollouts, cfg, generator)
    answers = policy.decode(batch)
    examples = [example for example in examples for _ in range(cfg.rollouts)]

    # Step 3: the verifier decides what each is worth; meanwhile reference and teacher read them
    with ThreadPoolExecutor(1) as aside:
        judging = aside.submit(verify_all, task.verify, examples, answers)  # Eq. 1
        parts = split_and_ask_reference(policy, batch, cfg)
        if has_teacher(cfg):
            for part in parts:
                part.logp_teacher = ask_teacher(policy, part, examples, cfg)
        verdicts = judging.result()

    # compare the verdicts within each group
    reward = torch.tensor([float(v.reward) for v in verdicts], device=policy.device)
    advantage = credit_answers(reward, cfg)
    for part in parts:
        part.advantage = advantage[part.index.to(advantage.device)]
    return Rollouts(examples, batch, answers, verdicts, reward, advantage, parts)


def verify_all(verify, examples: list, answers: list[str]) -> list[tasks.Verdict]:
    """Judge every answer, several at a time: the verifier may wait for other processes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(verify, examples, answers))


# =============================================================================================
# Roles: one frozen model, and named LoRA adapters that are switched on and off
# =============================================================================================


@dataclass
class Batch:
    """B completions, each behind its own context."""

    contexts: list[list[int]]  # B prompts as token ids, of any lengths
    completion: Tensor  # (B, T) ids, padded on the right
    mask: Tensor  # (B, T) True up to and including the first stop token

    def answers(self) -> list[list[int]]:
        """The completions as lists of ids, without padding."""
        lengths = self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.completion.tolist(), lengths, strict=True)]

    def rows(self, index: Tensor) -> Batch:
        """The chosen rows, cut to their longest completion."""
        longest = int(self.mask[index].sum(1).max())
        return Batch([self.contexts[i] for i in index.tolist()],
                     self.completion[index, :longest], self.mask[index, :longest])


BASE: tuple[str, ...] = ()  # pi_0: no adapter at all


@dataclass
class Policy:
    """The frozen model in all its roles, not pi_theta alone: that is `student`, whose trained
    adapter is named "policy".
    """

    model: nn.Module
    tokenizer: object
    stop_ids: Tensor
    pad_id: int
    reference: tuple[str, ...] = BASE  # pi_ref and the self teacher. differs: after Step 1
    specialist: bool = False  # the teacher is the adapter of that name
    stronger: Policy | None = None  # the teacher is another model
    pack: int = 1024  # tokens in a row of several answers: in longer ones attention costs more

    @property
    def teacher(self) -> tuple[Policy, tuple[str, ...]]:
        """The model and the adapters of T: itself, unless another one was named."""
        if self.stronger:
            return self.stronger, BASE
        return self, ("specialist",) if self.specialist else self.reference

    @property
    def student(self) -> tuple[str, ...]:
        """The adapters of pi_theta."""
        return (*self.reference, "policy")

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.stop_ids.device

    def encode(self, prompt: str) -> list[int]:
        """A user message as the ids that the model continues."""
        return prompt_ids(self.tokenizer, prompt)

    def decode(self, batch: Batch) -> list[str]:
        """Completions as text, without the stop token, for the verifier and for people."""
        rows = [ids[:-1] if ids[-1] in self.stop_ids else ids for ids in batch.answers()]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def adapters(model: nn.Module, names: tuple[str, ...]):
    """Switch on exactly these adapters inside the block; nests, and survives exceptions."""
    layers = lora_layers(model).values()
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = names
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


# =============================================================================================
# Step 2 - rollouts: y_1 .. y_K ~ pi_theta(.|x)
# =============================================================================================


@torch.no_grad()
def sample(policy: Policy, role: tuple[str, ...], prompts: list[list[int]], k: int,
           cfg: Config, generator: torch.Generator) -> Batch:
    """K completions of each prompt, prompt-major: rows i*K .. i*K+K-1 answer prompt i.

    Each prompt is read once and its cache copied for its K rollouts; finished rows are dropped.
    """
    completion = torch.full((len(prompts) * k, cfg.max_new_tokens), policy.pad_id,
                            device=policy.device)  # (B, T)
    alive = torch.arange(len(completion), device=policy.device)  # rows still in the cache
    going = torch.ones_like(alive, dtype=torch.bool)  # those of them that have not stopped
    with adapters(policy.model, role):
        hidden, cache, seen = read_prompts(policy, prompts, k, cfg.max_new_tokens)
        for t in range(cfg.max_new_tokens):
            token = draw(head(policy.model, hidden), cfg.temperature, cfg.top_p, generator)
            completion[alive, t] = token
            going &= ~torch.isin(token, policy.stop_ids)
            if t + 1 == cfg.max_new_tokens or not going.any():
                break
            if going.sum() <= DROP * len(going):  # enough have finished: they leave the cache
                cache.batch_select_indices(going.nonzero()[:, 0])
                alive, token, seen, going = (rows[going] for rows in (alive, token, seen, going))
            hidden, seen = read_token(policy, token, cache, seen)
    contexts = [prompt for prompt in prompts for _ in range(k)]
    mask = stop_mask(completion, policy.stop_ids)
    completion = completion.masked_fill(~mask, policy.pad_id)
    return Batch(contexts, completion, mask).rows(torch.arange(len(completion)))


# =============================================================================================
# Scoring: what a role thinks of given completions
# =============================================================================================


@dataclass
class Experience:
    """A micro-batch of rollouts: all that the loss needs to know of them, without gradients."""

    batch: Batch
    index: Tensor  # (b,) row numbers in the whole batch
    hidden_ref: Tensor  # (N, D) of pi_ref: its logits would be V / D times larger
    advantage: Tensor | None = None  # (b,)
    logp_teacher: Tensor | None = None  # (b, T)
    logp_old: Tensor | None = None  # (b, T), computed in the first epoch, before any update
    gap: Tensor | None = None  # (b, T)


@torch.no_grad()
def split_and_ask_reference(policy: Policy, batch: Batch, cfg: Config) -> list[Experience]:
    """The rollouts in micro-batches, each read by the reference."""
    parts = []
    for index in micro_batches(policy, batch, cfg.micro_tokens):
        some = batch.rows(index)
        parts.append(Experience(some, index, completion_hidden(policy, policy.reference, some)))
    return parts


def has_teacher(cfg: Config) -> bool:
    """Does anybody hint at tokens?"""
    return cfg.teacher != "none" and cfg.teacher_coef > 0


@torch.no_grad()
def ask_teacher(policy: Policy, part: Experience, examples: list, cfg: Config) -> Tensor:
    """log T(a_t|s_t, hint) of the ids the student sampled, behind the privileged prompt: (b, T)."""
    teacher, role = policy.teacher
    prompts = [tasks.privileged_prompt(examples[i]) for i in part.index.tolist()]
    hinted = replace(part.batch, contexts=[teacher.encode(prompt) for prompt in prompts])
    return log_probs(teacher, role, hinted, cfg.temperature)


def log_probs(policy: Policy, role: tuple[str, ...], batch: Batch, temperature: float) -> Tensor:
    """log pi(a_t|s_t) of the batch's tokens under a role: (B, T), with gradient."""
    hidden = completion_hidden(policy, role, batch)
    return on_tokens(policy, token_logps, temperature, batch, hidden)


def completion_hidden(policy: Policy, role: tuple[str, ...], batch: Batch) -> Tensor:
    """The hidden states that predict the N unmasked completion tokens under a role: (N, D)."""
    ids, positions, mask, predictors = one_row_per_prompt(policy, batch)
    with adapters(policy.model, role):
        hidden = policy.model.base_model(ids, attention_mask=mask, position_ids=positions,
                                         use_cache=False).last_hidden_state  # (S, L, D)
    return hidden.flatten(0, 1).index_select(0, predictors)


def token_logps(model: nn.Module, temperature: float, ids: Tensor, hidden: Tensor) -> Tensor:
    """log pi(a_t|s_t) at the sampling temperature, in float32: ids (N,), hidden (N, D) -> (N,)."""
    logits = head(model, hidden).float() / temperature  # differs: tempered in every role
    return F.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]


def token_terms(model: nn.Module, temperature: float, ids: Tensor, hidden: Tensor,
                hidden_ref: Tensor) -> Tensor:
    """Stacked (3, N): log pi_theta(a_t|s_t), KL(pi_theta || pi_ref) and entropy, both exact."""
    logp = F.log_softmax(head(model, hidden).float() / temperature, -1)  # (N, V), tempered too
    logp_ref = F.log_softmax(head(model, hidden_ref).float() / temperature, -1)
    kl = (logp.exp() * (logp - logp_ref)).sum(-1)  # that of Eq. 8
    entropy = -(logp.exp() * logp).sum(-1)  # Eq. 10
    return torch.stack([logp.gather(-1, ids[:, None])[:, 0], kl, entropy])


# =============================================================================================
# Step 3 - verdict: the advantage of each rollout within its group
# =============================================================================================


def credit_answers(reward: Tensor, cfg: Config) -> Tensor:
    """The verdict as an advantage for each answer (B,). Blind distillation looks at none."""
    if cfg.method == "opd":
        return torch.zeros_like(reward)
    return group_advantage(reward, cfg.rollouts)


def group_advantage(reward: Tensor, k: int) -> Tensor:
    """Rewards (B,), prompt-major, compared within each group of K -> advantages (B,)."""
    group = reward.view(-1, k)  # (P, K)
    std, mean = torch.std_mean(group, 1, correction=0, keepdim=True)
    advantage = ((group - mean) / (std + 1e-4)).view(-1)  # Eq. 2
    return advantage.masked_fill(tied_groups(reward, k), 0.0)  # differs: float noise is no signal


def tied_groups(reward: Tensor, k: int) -> Tensor:
    """Which rollouts (B,) got the same reward as all the others of their group?"""
    group = reward.view(-1, k)  # (P, K)
    return (group.amax(1) == group.amin(1)).repeat_interleave(k)


# =============================================================================================
# Step 4 - hints: the teacher's gap, clipped, gated by the verdict
# =============================================================================================


def teacher_gap(logp_teacher: Tensor | None, logp_old: Tensor, clip: float) -> Tensor:
    """How much more the teacher likes each sampled token, clipped: (B, T). Carries no gradient."""
    if logp_teacher is None:  # without a teacher
        return torch.zeros_like(logp_old)
    return (logp_teacher - logp_old).clamp(-clip, clip).detach()  # Eq. 3


def fix_gap(part: Experience, logp_old: Tensor, cfg: Config) -> None:
    """Before the first update the student is pi_old: hold its log-probs, and the gap to them."""
    part.logp_old = logp_old.detach()
    part.gap = teacher_gap(part.logp_teacher, part.logp_old, cfg.gap_clip)


GATES = {  # advantage (B,) -> gate (B,). A new one needs its name in the choices of Config.gate
    "sigmoid": torch.sigmoid,  # Eq. 4
    "success": lambda advantage: (advantage > 0).float(),  # where better than the group (SDPG)
    "failure": lambda advantage: torch.sigmoid(-advantage),  # mostly where worse (SRPO)
    "none": torch.ones_like,
}


def dense_advantage(advantage: Tensor, gap: Tensor, cfg: Config) -> Tensor:
    """The advantage of each answer (B,) and the hints at its tokens (B, T), in one (B, T).

    Not normalised again: in a tied group that would blow small hints up to the size of a verdict.
    """
    gate = GATES[cfg.gate](advantage)[:, None]
    return advantage[:, None] + cfg.teacher_coef * gate * gap  # Eq. 5


# =============================================================================================
# Step 5 - update: clipped policy loss, exact KL, entropy
# =============================================================================================


def update(policy: Policy, parts: list[Experience], replay: Batch | None, state: State,
           cfg: Config) -> dict[str, float]:
    """One optimiser step on the whole batch, however it is split: gradients add up."""
    share = 0.0 if replay is None else cfg.replay_share
    tokens = over_ranks(sum(int(part.batch.mask.sum()) for part in parts))
    sums: Counter[str] = Counter()
    for part in parts:
        hidden = completion_hidden(policy, policy.student, part.batch)
        terms = on_tokens(policy, token_terms, cfg.temperature, part.batch, hidden,
                          part.hidden_ref)
        if part.logp_old is None:  # first epoch: this very pass also gives log pi_old
            fix_gap(part, terms[0], cfg)
        loss, info = vcopd_loss(terms, part, state.kl_coef, tokens, cfg)
        total_loss(loss, 0.0, share).backward()
        sums.update({name: value.item() for name, value in info.items()})
    if replay is not None:
        sums["replay_loss"] = replay_gradients(policy, replay, cfg)
    sums = {name: over_ranks(value) for name, value in sums.items()}
    return {**sums, "grad_norm": optimizer_step(state.optimizer, cfg)}


def vcopd_loss(terms: Tensor, part: Experience, kl_coef: float, tokens: int,
               cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and what to log. `terms` (3, b, T) are of `token_terms`.

    In the first epoch rho is 1. Summed over micro-batches, the *value* of the policy term is then
    minus the mean of A_dense: near 0, as advantages are centred. Its gradient is not.
    """
    logp, kl, entropy = terms
    mask, eps = part.batch.mask, cfg.ratio_clip
    assert logp.shape == mask.shape == part.logp_old.shape == part.gap.shape
    dense = dense_advantage(part.advantage, part.gap, cfg)  # (b, T)
    # far tokens: where exp overflows, 0 * inf would be a NaN gradient
    ratio = (logp - part.logp_old).clamp(-20, 20).exp()  # Eq. 6
    objective = torch.minimum(ratio * dense, ratio.clamp(1 - eps, 1 + eps) * dense)
    policy_loss = -token_mean(objective, mask, tokens)  # Eq. 7
    kl_mean = token_mean(kl, mask, tokens)
    kl_loss = kl_coef * kl_mean  # Eq. 8
    entropy_mean = token_mean(entropy, mask, tokens)
    loss = policy_loss + kl_loss - cfg.entropy_coef * entropy_mean  # Eq. 11
    clipped = (objective < ratio * dense).float()
    hint = (dense - part.advantage[:, None]).abs()
    teacher_share = hint / (hint + part.advantage.abs()[:, None]).clamp(min=1e-12)
    return loss, {"policy_loss": policy_loss, "kl": kl_mean, "entropy": entropy_mean,
                  "ratio_clipped": token_mean(clipped, mask, tokens),
                  "teacher_share": token_mean(teacher_share, mask, tokens)}


def token_mean(values: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """Sum over tokens / their count in all micro-batches and ranks, so that results add up."""
    return torch.where(mask, values, 0).sum() / tokens


LEAST_KL_COEF, MOST_KL_COEF = 1e-4, 10.0


def adapt_kl_coef(kl_coef: float, kl: float, cfg: Config) -> float:
    """Tighten the guard when the policy strays, relax it otherwise.

    The rule is stationary when KL is above the target in 22 % of steps (1.2^.22 * .95^.78 = 1).
    """
    if kl_coef == 0:  # switched off
        return 0.0
    kl_coef = kl_coef * (1.2 if kl > cfg.kl_target else 0.95)  # Eq. 9
    return min(max(kl_coef, LEAST_KL_COEF), MOST_KL_COEF)


# =============================================================================================
# Step 6 - replay: old skills, in the current student's own words
# =============================================================================================


def refresh_replay(policy: Policy, anchors: list[tasks.Example], step: int, cfg: Config) -> Batch:
    """Answers of the current student to anchor prompts: the best `replay_keep` of each skill.

    Best by verifier score, and among equals by self-confidence (mean log-prob of a token). That
    share is kept even where fewer are right.
    """
    prompts = [policy.encode(example.prompt) for example in anchors]
    batch = sample(policy, policy.student, prompts, 1, cfg, seeded("replay", cfg.seed, step))
    verdicts = verify_all(tasks.verify_skill, anchors, policy.decode(batch))
    confidence = mean_logps(policy, batch, cfg)
    by_skill: dict[str, list[int]] = {}  # else the easiest skills would fill the pool
    for i in sorted(range(len(anchors)), key=lambda i: (verdicts[i].reward, confidence[i])):
        by_skill.setdefault(anchors[i].skill, []).append(i)
    kept = [i for rows in by_skill.values()
            for i in rows[-math.ceil(cfg.replay_keep * len(rows)):]]
    return batch.rows(torch.tensor(kept))


def nll_loss(policy: Policy, role: tuple[str, ...], batch: Batch, temperature: float,
             tokens: int) -> Tensor:
    """Negative log-likelihood over `tokens`. differs: no PPO ratio, pi_old is long gone."""
    logp = log_probs(policy, role, batch, temperature)
    return -token_mean(logp, batch.mask, tokens)


def total_loss(loss: Tensor | float, loss_replay: Tensor | float, share: float) -> Tensor:
    """The new task and old skills in one loss. Called once for each: only gradients are added."""
    return (1 - share) * loss + share * loss_replay  # Eq. 12


# #############################################################################################
#
#   PART II - THE MACHINERY: what the method stands on
#
# #############################################################################################

# =============================================================================================
# Prompts as ids, padding, and randomness without a state
# =============================================================================================


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """A user message in the words of the model's chat template, with exactly one BOS token.

    Templates write the BOS themselves, or leave it to the tokenizer; some models have none.
    """
    text = prompt + "\n"
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False)  # Qwen3: the answer at once
    before, said, after = text.partition(prompt.strip())
    ids = [*tokenizer(before, add_special_tokens=False).input_ids, *text_ids(tokenizer, said),
           *tokenizer(after, add_special_tokens=False).input_ids]
    if not any(special in said for special in tokenizer.all_special_tokens):
        ids = tokenizer(text, add_special_tokens=False).input_ids  # words may span the borders
    own = tokenizer("").input_ids[:1]  # what the tokenizer itself begins with
    missing = own == [tokenizer.bos_token_id] and ids[:1] != own
    return own + ids if missing else ids


def text_ids(tokenizer, text: str) -> list[int]:
    """Ordinary text as ids: where it holds the name of a special token, that is only a word."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def pad(rows: list[list[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Lists of ids as one (B, L) tensor, and the (B, L) mask of what is not padding."""
    longest = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(longest)
    mask = places >= longest - lengths if left else places < lengths  # (B, L)
    ids = torch.full((len(rows), longest), value)
    return ids.masked_scatter(mask, torch.tensor([i for row in rows for i in row])), mask


def stop_mask(completion: Tensor, stop_ids: Tensor) -> Tensor:
    """True up to and including the first stop token of each row: (B, T) -> (B, T).

    The stop is found by position: pad may be the same token as eos, and its first must be learnt.
    """
    stops = torch.isin(completion, stop_ids).long()
    return stops.cumsum(1) - stops == 0


def seeded(*parts) -> torch.Generator:
    """A generator that depends on nothing but its name: ("rollouts", seed, step), say.

    No generator has a state to save, and an evaluation cannot disturb training.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# =============================================================================================
# LoRA: named low-rank updates of every linear layer
# =============================================================================================


class LoRALinear(nn.Module):
    """A frozen linear layer with named low-rank updates: y = W x + (alpha / r) B A x.

    Hu et al. 2021, arXiv:2106.09685. Adapters are held in float32 and applied in the dtype of
    the base, as under autocast.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.active: tuple[str, ...] = ()

    def add(self, name: str, rank: int, alpha: float, generator: torch.Generator) -> None:
        """A new adapter: A Kaiming uniform, B zero, so that it starts as the identity."""
        out_features, in_features = linear_shape(self.base)
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.put(name, a, torch.zeros(out_features, rank), alpha / rank)

    def put(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Hold given matrices as an adapter: A (r, in), B (out, r)."""
        device = next(iter(self.base.state_dict().values())).device
        self.lora_A[name] = nn.Parameter(a.to(device))
        self.lora_B[name] = nn.Parameter(b.to(device))
        self.scale[name] = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name in self.active:
            a, b = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
            y = y.add(F.linear(F.linear(x, a), b), alpha=self.scale[name])
        return y


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, and of GPT-2's Conv1D."""
    if hasattr(layer, "nf"):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every wrapped layer by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def wrap_linears(model: nn.Module) -> None:
    """Freeze the model and wrap each linear layer of attention and MLP, the head excepted."""
    from transformers.pytorch_utils import Conv1D
    model.requires_grad_(False)
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D) and not isinstance(parent, LoRALinear):
                setattr(parent, name, LoRALinear(child))


def add_adapter(model: nn.Module, name: str, rank: int, alpha: float, seed: int) -> None:
    """Add one named adapter to every wrapped layer."""
    generator = seeded("adapter", name, seed)
    for layer in lora_layers(model).values():
        layer.add(name, rank, alpha, generator)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The trainable A and B of one adapter."""
    layers = lora_layers(model).values()
    return [p for layer in layers for p in (layer.lora_A[name], layer.lora_B[name])]


def freeze(model: nn.Module, name: str) -> None:
    """Train this adapter no more."""
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)


# =============================================================================================
# Drawing tokens. The sampler reads each prompt once
# =============================================================================================

def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row: logits (B, V) -> (B,). Temperature 0 is greedy.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    full = F.softmax(logits.float() / temperature, -1)
    probs, order = full.topk(min(256, full.shape[-1]))  # as a rule they hold the nucleus
    if (probs.sum(-1) < top_p).any():
        probs, order = full.sort(-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # (B, V)
    uniform = torch.rand(len(probs), 1, generator=generator).to(probs.device)
    reached = probs.cumsum(-1)
    choice = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    inside = (probs > 0).sum(-1, keepdim=True)  # rounding must not lead out of the nucleus
    return order.gather(-1, torch.minimum(choice, inside - 1))[:, 0]


DROP = 0.9  # finished rows leave when a tenth has finished: each time the cache is copied


def read_prompts(policy: Policy, prompts: list[list[int]], k: int, room: int) -> tuple:
    """The last hidden state (B, D), the cache, and the attention mask (B, L) of K rollouts each."""
    ids, seen = (t.to(policy.device) for t in pad(prompts, policy.pad_id, left=True))
    out = policy.model.base_model(ids, attention_mask=seen.long(), use_cache=True,
                                  position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    share_cache(out.past_key_values, k, room)
    hidden = out.last_hidden_state[:, -1]
    return hidden.repeat_interleave(k, 0), out.past_key_values, seen.repeat_interleave(k, 0)


def read_token(policy: Policy, token: Tensor, cache, seen: Tensor) -> tuple[Tensor, Tensor]:
    """One more token (B,) of each row: its hidden state (B, D), and the longer attention mask."""
    seen = F.pad(seen, (0, 1), value=True)
    out = policy.model.base_model(
        token[:, None], attention_mask=seen.long(), use_cache=True,
        position_ids=seen.sum(1, keepdim=True) - 1, past_key_values=cache)
    return out.last_hidden_state[:, -1], seen


class RoomyLayer(DynamicLayer):
    """The cache of one layer, with room for the answers: its parent copies it for each token."""

    def __init__(self, prompts: DynamicLayer, k: int, room: int):
        """Each prompt's keys and values (P, heads, L, size) for its K rollouts, and `room` more."""
        super().__init__()
        self.is_initialized = True
        self.stores = [F.pad(held.repeat_interleave(k, 0), (0, 0, 0, room))
                       for held in (prompts.keys, prompts.values)]
        self.show(prompts.get_seq_length())

    def show(self, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens so far: views."""
        self.keys, self.values = (store[:, :, :end] for store in self.stores)
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Write behind what is held; return all of it."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = new
        return self.show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.stores = [store[indices] for store in self.stores]
        self.show(self.get_seq_length())


def share_cache(cache, k: int, room: int) -> None:
    """Let the K rollouts of each prompt begin with its cache, and with room for their tokens."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, k, room)
        else:  # sliding windows, states
            layer.batch_repeat_interleave(k)


# =============================================================================================
# The scorer, too, reads each prompt once: its answers stand side by side behind it
# =============================================================================================


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states (..., D) -> logits (..., V), as the model's own forward makes them."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def one_row_per_prompt(policy: Policy, batch: Batch) -> tuple[Tensor | None, ...]:
    """Ids (S, L), positions (S, L), attention mask, and the N places (in S * L) that predict.

    Rows of the batch with the same context share one. Padding stands on the right of a causal
    model, so no real token sees it.
    """
    answers, packed = batch.answers(), packs(batch, policy.pack)
    rows = [side_by_side(batch.contexts[pack[0]], [answers[i] for i in pack]) for pack in packed]
    ids, positions, owners = (pad([row[column] for row in rows], value)[0].to(policy.device)
                              for column, value in ((0, policy.pad_id), (1, 0), (2, -1)))
    alone = len(packed) == len(answers)
    mask = None if alone else answer_mask(owners, policy.model.dtype)  # None is causal
    places = [i * ids.shape[1] + place for i, row in enumerate(rows) for place in row[3]]
    return ids, positions, mask, torch.tensor(places, device=policy.device)


def packs(batch: Batch, most: int) -> list[list[int]]:
    """Row numbers: neighbours with the same context together, as far as `most` tokens reach."""
    found, used = [], 0
    for i, length in enumerate(batch.mask.sum(1).tolist()):
        used += length
        if i == 0 or batch.contexts[i] != batch.contexts[i - 1] or used > most:
            found.append([])
            used = len(batch.contexts[i]) + length
        found[-1].append(i)
    return found


def side_by_side(context: list[int], answers: list[list[int]]) -> tuple[list[int], ...]:
    """A prompt and its answers in one row, so that the prompt is read once.

    Returns ids, positions, owners (0: the prompt, k: the k-th answer), and the places in the row
    whose hidden states predict the answers' tokens. No answer's last token has to be read.
    """
    ids, positions, owners = list(context), list(range(len(context))), [0] * len(context)
    predictors = []
    for k, answer in enumerate(answers, 1):
        predictors += [len(context) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
        positions += range(len(context), len(context) + len(answer) - 1)
        owners += [k] * (len(answer) - 1)
        ids += answer[:-1]
    return ids, positions, owners, predictors


def answer_mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention mask (S, 1, L, L) under which an answer sees the prompt and itself."""
    seen = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)
    nothing = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return nothing.masked_fill(~seen.tril(), torch.finfo(dtype).min)[:, None]


# =============================================================================================
# Memory: some rows, and some tokens, at a time
# =============================================================================================


def micro_batches(policy: Policy, batch: Batch, most: int) -> list[Tensor]:
    """Row numbers, together where lengths are alike: about `most` tokens each, with padding."""
    lengths = batch.mask.sum(1).tolist()
    sized = [(len(batch.contexts[pack[0]]) + sum(lengths[i] for i in pack), pack)
             for pack in packs(batch, min(policy.pack, most))]
    parts, members = [], []
    for size, pack in sorted(sized, key=lambda pair: pair[0]):
        if members and (len(members) + 1) * size > most:
            parts.append(members)
            members = []
        members.append(pack)
    return [torch.tensor([i for pack in members for i in pack]) for members in [*parts, members]]


LOGITS = 2**22  # held at one time, so that (B, T, V) never exists


def on_tokens(policy: Policy, terms, temperature: float, batch: Batch, *hidden: Tensor) -> Tensor:
    """Apply `terms(model, temperature, ids, *hidden)` to the N unmasked tokens: -> (..., B, T).

    Some tokens at a time, and once more in the backward pass. Padding is 0.
    """
    size = max(1, LOGITS // policy.model.config.vocab_size)
    chunks = [checkpoint(terms, policy.model, temperature, *chunk, use_reentrant=False)
              for chunk in zip(*(t.split(size) for t in (batch.completion[batch.mask], *hidden)),
                               strict=True)]
    flat = torch.cat(chunks, -1)  # (..., N)
    out = flat.new_zeros(*flat.shape[:-1], *batch.mask.shape)
    return out.masked_scatter(batch.mask.expand_as(out), flat)


# =============================================================================================
# Replay, and the step of the optimiser
# =============================================================================================


def draw_replay(state: State, rollouts: int, epoch: int, cfg: Config) -> Batch | None:
    """As many kept samples as make `replay_share` of the rows. Their weight is r in any case."""
    if state.replay is None:
        return None
    new = rollouts * world()
    count = max(world(), round(new * cfg.replay_share / (1 - cfg.replay_share)))
    generator = seeded("mix", cfg.seed, state.step, epoch)
    return state.replay.rows(mine(torch.randint(len(state.replay.contexts), (count,),
                                                generator=generator)))


def replay_gradients(policy: Policy, replay: Batch, cfg: Config) -> float:
    """Add up the gradients of the replay term of Eq. 12; returns its loss."""
    tokens = over_ranks(int(replay.mask.sum()))
    return imitate(policy, policy.student, replay, tokens, cfg.micro_tokens, cfg.temperature,
                   cfg.replay_share)


@torch.no_grad()
def mean_logps(policy: Policy, batch: Batch, cfg: Config) -> list[float]:
    """The student's self-confidence in each row: its mean log-prob of a token."""
    confidence = [0.0] * len(batch.mask)
    for index in micro_batches(policy, batch, cfg.micro_tokens):
        some = batch.rows(index)
        logp = log_probs(policy, policy.student, some, cfg.temperature)  # (b, T)
        for row, value in zip(index.tolist(), logp.sum(1) / some.mask.sum(1), strict=True):
            confidence[row] = value.item()
    return confidence


def optimizer_step(optimizer: torch.optim.Optimizer, cfg: Config) -> float:
    """Clip the gradient, take the step; returns the norm. Raises NotFinite instead of the step.

    A loss that is not finite shows here too: neither is its gradient.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    if not math.isfinite(norm):
        rate = optimizer.param_groups[0]["lr"]
        raise NotFinite(f"the gradient is {norm}, so no step was taken: "
                        f"start a new run with a lower learning rate (now {rate:g})")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# =============================================================================================
# What a step reports
# =============================================================================================


def rollout_metrics(rollouts: Rollouts, policy: Policy) -> dict:
    """What the verifier saw in this step."""
    batch, verdicts = rollouts.batch, gathered(rollouts.verdicts)
    count = len(verdicts)
    ended = (torch.isin(batch.completion, policy.stop_ids) & batch.mask).any(1)
    return {"reward": sum(v.reward for v in verdicts) / count,
            "pass_rate": sum(v.passed for v in verdicts) / count,
            "format_rate": sum(v.formatted for v in verdicts) / count,
            "truncated": 1 - over_ranks(int(ended.sum())) / count,
            "tokens": over_ranks(int(batch.mask.sum())),
            "reasons": dict(sorted(Counter(v.reason.split(":")[0].rstrip(" 0123456789")
                                           for v in verdicts).items()))}


def gap_metrics(parts: list[Experience], tied: Tensor) -> dict[str, float]:
    """Where the teacher spoke: mean |D| in tied groups, where only hints teach, and in others."""
    sums = {"gap_tied": 0.0, "gap_untied": 0.0}
    counts = dict.fromkeys(sums, 0)
    for part in parts:
        in_tied = tied[part.index.to(tied.device)][:, None]
        for name, where in (("gap_tied", in_tied), ("gap_untied", ~in_tied)):
            gap = part.gap[part.batch.mask & where].abs()
            sums[name] += gap.sum().item()
            counts[name] += len(gap)
    return {"tied_rollouts": over_ranks(int(tied.sum())) / over_ranks(len(tied)),
            **{name: over_ranks(sums[name]) / max(1, over_ranks(counts[name])) for name in sums}}


def sample_records(rollouts: Rollouts, step: int, count: int) -> list[dict]:
    """The first rollouts as people read them in samples.jsonl."""
    columns = zip(rollouts.examples[:count], rollouts.answers, rollouts.verdicts,
                  rollouts.advantage.tolist(), strict=False)
    return [{"step": step, "id": example.id, "prompt": example.prompt, "answer": answer,
             "reward": verdict.reward, "reason": verdict.reason, "advantage": advantage}
            for example, answer, verdict, advantage in columns]


# =============================================================================================
# Supervised fine-tuning: Step 1 (format), and the baseline
# =============================================================================================


def solution_batch(policy: Policy, examples: list[tasks.Example]) -> Batch:
    """Reference answers, each ending in the stop token, as a batch to imitate."""
    answers = [[*text_ids(policy.tokenizer, e.reference), int(policy.stop_ids[0])]
               for e in examples]
    completion, mask = (t.to(policy.device) for t in pad(answers, policy.pad_id))
    return Batch([policy.encode(e.prompt) for e in examples], completion, mask)


def imitate(policy: Policy, role: tuple[str, ...], batch: Batch, tokens: int,
            micro_tokens: int, temperature: float = 1.0, share: float = 1.0) -> float:
    """Add up the gradients of a share of the NLL over `tokens`; returns the NLL."""
    value = 0.0
    for index in micro_batches(policy, batch, micro_tokens):
        loss = nll_loss(policy, role, batch.rows(index), temperature, tokens)
        total_loss(0.0, loss, share).backward()
        value += loss.item()
    return value


def sft_step(policy: Policy, task: tasks.Task, examples: list, state: State,
             cfg: Config) -> tuple[dict, list[dict]]:
    """The SFT baseline: as many optimiser steps on the same prompts, towards the references."""
    batch = solution_batch(policy, examples)
    tokens = over_ranks(int(batch.mask.sum()))
    for _ in range(cfg.epochs):
        nll = imitate(policy, policy.student, batch, tokens, cfg.micro_tokens)
        norm = optimizer_step(state.optimizer, cfg)
    return {"nll": over_ranks(nll), "grad_norm": norm, "tokens": tokens}, []


# =============================================================================================
# Several devices: torchrun --nproc_per_node N vcopd.py ... With one process, all this is nothing.
#
# Each process ("rank") holds the whole model and takes its share of a step's prompts. Losses are
# divided by the token count of all ranks, so that gradients and metrics need only be summed.
# Weights, optimiser, beta and replay pool stay the same everywhere. Rank 0 writes and evaluates.
# =============================================================================================


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(cfg: Config) -> None:
    """Meet the other processes, if torchrun started this one. Raises RunError."""
    count, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not dist.is_torchelastic_launched() or count == 1:
        return
    if cfg.prompts % count:
        raise RunError(f"--prompts {cfg.prompts} cannot be shared by {count} processes: "
                       "give a multiple")
    if cfg.device not in ("auto", "cuda", "cpu"):
        raise RunError(f"--device {cfg.device} is one device, and torchrun started {count} "
                       "processes: give cuda or cpu")
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise RunError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(local)
    # others wait while rank 0 evaluates; when a process dies, torchrun ends them all
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=30))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 speaks for all


def mine(items):
    """This rank's share of a list or tensor that all ranks have."""
    return items[rank()::world()]


def meeting_place() -> str:
    """The device on which tensors can be exchanged."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def over_ranks(value: int | float) -> int | float:
    """The sum of a number over all ranks."""
    if world() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64, device=meeting_place())
    dist.all_reduce(box)
    return type(value)(box.item())


def gathered(items: list) -> list:
    """The items of all ranks."""
    if world() == 1:
        return items
    boxes: list = [None] * world()
    dist.all_gather_object(boxes, items)
    return [item for box in boxes for item in box]


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients, in one message."""
    if world() == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters]).to(meeting_place())
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def on_rank_0(function, *args):
    """What the function returns on rank 0, where alone it is called: the others wait for it."""
    box = [function(*args) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# #############################################################################################
#
#   PART III - RUNNING IT: models, evaluation, run folder, command line
#
# #############################################################################################

# =============================================================================================
# The built-in model: a small Llama that is pretrained on the spot
# =============================================================================================

TINY_RECIPE = {"vocab": 768, "hidden": 128, "layers": 4, "heads": 4, "init": 0.06,
               "documents": 12000, "steps": 700, "batch_tokens": 3200, "micro_tokens": 1024,
               "lr": 3e-3, "seed": 1}
CHAT = "{% for m in messages %}<|user|>{{ m.content }}<|end|><|assistant|>{% endfor %}"


TINY_STEPS = {"arithmetic": 350}  # sums are short: half the pretraining does


def tiny_recipe(task: tasks.Task) -> dict:
    """How the built-in model of a task is made."""
    return {**TINY_RECIPE, "steps": min(TINY_RECIPE["steps"], TINY_STEPS.get(task.name, 10**9))}


def tiny_folder(task: tasks.Task) -> Path:
    """Where the built-in model of a task is cached: named by everything that makes it."""
    recipe = json.dumps(tiny_recipe(task)) + CHAT + Path(tasks.__file__).read_text("utf-8")
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "vcopd" / f"tiny-{task.name}-{digest}"


def train_tokenizer(texts: list[str], vocab: int):
    """A byte-level BPE, digits apart: any text can be written, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>",
                                   pad_token="<|end|>", chat_template=CHAT)


def new_tiny(tokenizer, recipe: dict) -> nn.Module:
    """A randomly initialised Llama of about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    width = recipe["hidden"]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=recipe["layers"], num_attention_heads=recipe["heads"],
        initializer_range=recipe["init"],  # 0.02 is for wide models: here copying emerges later
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(recipe["seed"])
    return LlamaForCausalLM(config)


def pretrain(policy: Policy, documents: list[tuple[str, str]], recipe: dict) -> None:
    """Next-token training on the answers only: at this size, copying emerges in no other way."""
    rng = random.Random(recipe["seed"])
    steps = recipe["steps"]
    stop = int(policy.stop_ids[0])
    rows = [(policy.encode(prompt), [*policy.tokenizer(answer).input_ids, stop])
            for prompt, answer in documents]
    size = recipe["batch_tokens"] * len(rows) // sum(len(p) + len(a) for p, a in rows)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98),
                                  weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.05 + 0.95 * (1 - s / steps)))
    bar = progress(range(steps), "building tiny")
    for _ in bar:
        prompts, answers = zip(*rng.choices(rows, k=size), strict=True)
        batch = Batch(list(prompts), *pad(answers, policy.pad_id))
        optimizer.zero_grad()
        loss = imitate(policy, BASE, batch, int(batch.mask.sum()), recipe["micro_tokens"])
        nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)


def build_tiny(task: tasks.Task) -> Path:
    """The folder of the built-in model; made, with a progress bar, when it is not there yet."""
    from transformers.utils import logging
    folder, recipe = tiny_folder(task), tiny_recipe(task)
    if (folder / "config.json").exists():
        return folder
    print(f"Building the model tiny for {task.name}: a few minutes, once.", flush=True)
    rng = random.Random(recipe["seed"])
    documents = [tasks.web_document(task, rng)
                 for _ in progress(range(recipe["documents"]), "writing its corpus")]
    tokenizer = train_tokenizer([text for pair in documents for text in pair], recipe["vocab"])
    model = new_tiny(tokenizer, recipe)
    pretrain(Policy(model, tokenizer, torch.tensor([tokenizer.eos_token_id]),
                    tokenizer.pad_token_id), documents, recipe)
    logging.disable_progress_bar()
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")  # an interrupted build leaves no model
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


# =============================================================================================
# Real models: any causal LM of linear layers, as student or as teacher
# =============================================================================================


def load_policy(cfg: Config, task: tasks.Task) -> Policy:
    """Any causal LM in all its roles, with a fresh policy adapter. Raises RunError."""
    name = str(on_rank_0(build_tiny, task)) if cfg.model == "tiny" else cfg.model
    start = is_adapter(name)
    base = adapter_settings(Path(name))["base_model_name_or_path"] if start else name
    policy = load_frozen(base, cfg)
    if start:  # frozen like the format adapter: the reference is the model as it was given
        load_adapter(policy.model, "start", Path(name))
        policy.reference = ("start",)
    add_adapter(policy.model, "policy", cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    if cfg.teacher != "self" and has_teacher(cfg) and not cfg.eval_only:
        load_teacher(policy, cfg)
    return policy


def load_teacher(policy: Policy, cfg: Config) -> None:
    """A specialist adapter, or a stronger model that speaks in the same ids. Raises RunError."""
    if is_adapter(cfg.teacher):
        load_adapter(policy.model, "specialist", Path(cfg.teacher))
        policy.specialist = True
        return
    tokenizer, _ = read_plan(cfg.teacher)
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise RunError(f"--teacher {cfg.teacher} has another tokenizer than the student: it must "
                       "know every token by the same id, so give a model of the same family")
    policy.stronger = load_frozen(cfg.teacher, cfg)


def load_frozen(name: str, cfg: Config) -> Policy:
    """A causal LM and its tokenizer: frozen, wrapped and checked. Raises RunError.

    What can be refused is refused before the weights are fetched.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()  # of reading files; downloads keep theirs
    device = pick_device(cfg.device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16,
             "auto": fast_dtype(device)}[cfg.dtype]
    tokenizer, plan = read_plan(name)
    check_layers(plan, name, cfg)
    check_memory(plan, dtype, device, cfg)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # of any kind, where a file is damaged
        raise load_error(name, error) from None
    if info["missing_keys"]:
        raise RunError(f"{name} holds no weights for {min(info['missing_keys'])}")
    model.eval()  # no dropout while scoring
    wrap_linears(model)
    if cfg.quantize == "nf4":
        quantize_linears(model, device)
    if recomputes(plan, cfg):
        recompute_layers(model)
    stops = torch.tensor(stop_tokens(tokenizer, model.generation_config), device=device)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    policy = Policy(model.to(device), tokenizer, stops, pad_id, pack=shared_row(model.config))
    self_check(policy, name)
    return policy


def shared_row(config) -> int:
    """Tokens up to which answers share a row: none where layers differ in what they attend to."""
    local = ("sliding_window", "attention_chunk_size", "window_size")
    return 0 if any(getattr(config, name, None) for name in local) else Policy.pack


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it; old GPUs only imitate that."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def read_plan(name: str) -> tuple[object, nn.Module]:
    """The tokenizer, and the wrapped model without its weights, on torch's "meta" device."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            plan = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any kind, where a file is damaged
        raise load_error(name, error) from None
    if tokenizer.eos_token_id is None:
        raise RunError(f"{name} has a tokenizer without an end-of-sequence token: no answer of "
                       "it could end")
    wrap_linears(plan)
    return tokenizer, plan


def load_error(name: str, error: Exception) -> RunError:
    """What went wrong with a model, in one sentence."""
    why = (str(error) or repr(error)).splitlines()[0].rstrip(".")
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        why = "the folder holds no config.json"
    elif "Repo id must" in why:
        why = "there is no such folder, and it is no Hugging Face id"
    elif "Unrecognized configuration class" in why:
        why = "it is not a causal language model"
    return RunError(f"{name} cannot be loaded: {why}; give tiny, a folder, or a Hugging Face id "
                    "that is cached or reachable")


def check_layers(plan: nn.Module, name: str, cfg: Config) -> None:
    """Raise RunError where a matrix of the model is out of reach of LoRA on linear layers."""
    from transformers.pytorch_utils import Conv1D
    kind, config = plan.config.model_type, plan.config
    if getattr(config, "quantization_config", None):
        raise RunError(f"{name} is quantised already: give the plain model, and --quantize nf4")
    for path, module in plan.base_model.named_modules():
        matrix = any(p.dim() > 1 for p in module.parameters(recurse=False))
        if matrix and not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            raise RunError(f"{name} is of the architecture {kind}, which is not supported: {path} "
                           f"is a {type(module).__name__} (fused experts, convolutions and state "
                           "spaces are no linear layers)")
        if isinstance(module, Conv1D) and cfg.quantize != "none":
            raise RunError(f"{name} is of the architecture {kind}, whose Conv1D layers "
                           "--quantize does not know")


RECOMPUTE_FROM = 300_000_000  # parameters


def recomputes(plan: nn.Module, cfg: Config) -> bool:
    """Is memory dearer than time? With NF4, autograd would keep every dequantised weight."""
    size = sum(p.numel() for p in plan.parameters())
    return size >= RECOMPUTE_FROM or cfg.quantize == "nf4"


def memory_needed(plan: nn.Module, dtype: torch.dtype, cfg: Config) -> dict[str, float]:
    """The most that a run will want, in bytes, by what it is for."""
    wide, config = torch.finfo(dtype).bits // 8, plan.config
    depth = config.num_hidden_layers
    shapes = [linear_shape(layer.base) for layer in lora_layers(plan).values()]
    linear = sum(out * inp for out, inp in shapes)
    others = sum(p.numel() for p in plan.parameters()) - linear
    weight = 4 / 8 + 4 / 64 if cfg.quantize == "nf4" else wide  # bytes of one
    kept = ACTIVATIONS * sum(out * wide + inp * 4 for out, inp in shapes)  # by a token
    if recomputes(plan, cfg):
        kept = kept / depth + wide * config.hidden_size * depth
    logits = 6 * 4 * LOGITS
    return {"weights": linear * weight + others * wide,
            "adapters and optimiser": 4 * 4 * cfg.lora_rank * sum(map(sum, shapes)),
            f"a micro-batch of {cfg.micro_tokens} tokens": cfg.micro_tokens * kept + logits}


ACTIVATIONS = 2  # what a layer keeps, over the inputs and outputs of its matrices (measured)


def free_memory(device: torch.device) -> float:
    """Bytes that are free there; infinite where nobody can say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return INF
    return 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])


def check_memory(plan: nn.Module, dtype: torch.dtype, device: torch.device, cfg: Config) -> None:
    """Print the estimate, if it is worth a line. Raise RunError if it clearly exceeds."""
    needed, free = memory_needed(plan, dtype, cfg), free_memory(device)
    wanted = sum(needed.values())
    shown = ", ".join(f"{what} {size / 2**30:.1f}" for what, size in needed.items())
    if wanted > 2**30:
        print(f"memory in GB, at most: {shown}; free {free / 2**30:.1f}", flush=True)
    if needed["weights"] + needed["adapters and optimiser"] > free or wanted > 2 * free:
        raise RunError(f"this needs {wanted / 2**30:.1f} GB ({shown}) and {free / 2**30:.1f} GB "
                       "are free: lower --micro-tokens, try --quantize nf4, or take a smaller "
                       "model")


def stop_tokens(tokenizer, generation_config) -> list[int]:
    """Every id that ends an answer. SFT teaches the first: a chat's own end of turn."""
    others = generation_config.eos_token_id
    others = others if isinstance(others, list) else [others]
    found = [end_of_turn(tokenizer), tokenizer.eos_token_id, *others]
    return list(dict.fromkeys(i for i in found if i is not None))


def end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template writes behind an answer, if there is one."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False).input_ids
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return ids[0] if token is not None and token.special else None


@torch.no_grad()
def self_check(policy: Policy, name: str) -> None:
    """Raise RunError unless the model does what sampling and scoring rely on.

    Its own logits for a bare prompt, against `head` of the hidden states when padding stands on
    the left of that prompt and another token on its right; and for a prompt with one answer,
    against two that share it.
    """
    ids = policy.encode("Hello")
    row = torch.tensor([[policy.pad_id, *ids, ids[0]]], device=policy.device)
    seen = torch.ones_like(row)
    seen[0, 0] = 0
    out = policy.model.base_model(row, attention_mask=seen, use_cache=False,
                                  position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    answers = torch.tensor([ids[:1] * 2, ids[-1:] * 2], device=policy.device)  # (2, 2)
    whole = torch.ones_like(answers, dtype=torch.bool)
    shared = completion_hidden(policy, BASE, Batch([ids] * 2, answers, whole))
    pairs = [(row[:, 1:-1], out.last_hidden_state[0, -2]),
             (torch.tensor([[*ids, ids[-1]]], device=policy.device), shared[-1])]
    for context, hidden in pairs:
        own, ours = policy.model(context).logits[0, -1].float(), head(policy.model, hidden).float()
        error = ((ours - own).abs().max() / own.abs().max()).item()
        if error > (1e-3 if policy.model.dtype == torch.float32 else 0.05):  # bfloat16 has 8 bits
            raise RunError(f"{name} is of the architecture {policy.model.config.model_type}, which "
                           f"is not supported: its logits differ from head(hidden states) by "
                           f"{error:.0%} (scaled logits, unusual positions, attention to later "
                           "tokens, or a mask of its own)")


def recompute_layers(model: nn.Module) -> None:
    """Let each decoder layer keep its input only: a third more work, far less memory."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(recomputed, model, layer.forward)


def recomputed(model: nn.Module, forward, *inputs, **options):
    """A layer's forward pass, which the backward pass will do again.

    Under the adapters of now: by then their `with` block is over.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    active = next(iter(lora_layers(model).values())).active
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (contextlib.nullcontext(), adapters(model, active)),
                      **options)


def pick_device(name: str) -> torch.device:
    """The named device, or the best there is. Raises RunError when it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


# =============================================================================================
# NF4: the frozen base in 4 bits
# =============================================================================================

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK = 64  # weights that share a scale


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits (Dettmers et al. 2023, arXiv:2305.14314).

    Row by row, each 64 weights: the nearest codes to w / max |w|, two in a byte, and max |w|.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = base.weight.shape
        self.bias, self.dtype = base.bias, base.weight.dtype
        flat = base.weight.detach().float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1, keepdim=True)
        codes = torch.tensor(NF4, device=flat.device)
        middles = (codes[1:] + codes[:-1]) / 2
        code = torch.bucketize(blocks / absmax.clamp(min=1e-30), middles, out_int32=True)
        code = code.to(torch.uint8).view(-1, 2)
        self.register_buffer("packed", code[:, 0] << 4 | code[:, 1])  # (weights / 2,)
        self.register_buffer("absmax", absmax)  # (weights / 64, 1)
        self.register_buffer("pairs", torch.cartesian_prod(codes, codes))  # (256, 2) of a byte

    @property
    def weight(self) -> Tensor:
        """The dequantised weights, (out, in) in the dtype they had."""
        values = F.embedding(self.packed.int(), self.pairs).view(-1, BLOCK) * self.absmax
        size = self.out_features * self.in_features
        return values.flatten()[:size].view(self.out_features, -1).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def quantize_linears(model: nn.Module, device: torch.device) -> None:
    """The base of every wrapped layer in NF4, one at a time: the device never holds them all."""
    for layer in lora_layers(model).values():
        layer.base = NF4Linear(layer.base.to(device))


# =============================================================================================
# Adapters in PEFT's format that were made elsewhere
# =============================================================================================

NOT_PLAIN = (  # settings of PEFT's LoRA that, where set, change what A and B mean or add to them
    "use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
    "target_parameters", "layer_replication", "alpha_pattern", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config")


def is_adapter(name: str) -> bool:
    """Is it a folder that PEFT has written?"""
    return (Path(name) / "adapter_config.json").exists()


def adapter_settings(folder: Path) -> dict:
    """The adapter_config.json of a plain LoRA. Raises RunError for anything else, by its name."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        kind, *_ = (settings[name] for name in ("peft_type", "base_model_name_or_path",
                                                "lora_alpha"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} holds no whole adapter_config.json of PEFT ({error!r})") from None
    if kind != "LORA":
        raise RunError(f"{folder} holds an adapter of the kind {kind}: only LORA is supported")
    odd = [name for name in NOT_PLAIN if settings.get(name) not in (None, False, "none", {}, [])]
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian", "eva"):
        odd.append("init_lora_weights")  # PiSSA and others change the base too
    if odd:
        raise RunError(f"{folder} is not plain LoRA: {odd[0]} is {settings[odd[0]]!r}, which is "
                       "not supported")
    return settings


def load_adapter(model: nn.Module, name: str, folder: Path) -> None:
    """A PEFT LoRA folder as a frozen adapter. Raises RunError where it does not fit.

    Layers that it leaves out, or adapts at a lower rank, are filled up with zeros.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    settings = adapter_settings(folder)
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}/adapter_model.safetensors cannot be read: {error}") from None
    rank = max((len(w) for key, w in weights.items() if ".lora_A." in key), default=1)
    for path, layer in lora_layers(model).items():
        a, b = (weights.pop(f"base_model.model.{path}.lora_{kind}.weight", None) for kind in "AB")
        out_features, in_features = linear_shape(layer.base)
        if a is None or b is None:
            a, b = torch.zeros(0, in_features), torch.zeros(out_features, 0)
        own = len(a)
        if a.shape != (own, in_features) or b.shape != (out_features, own):
            raise RunError(f"{folder} was made for another model: {path} has other sizes here")
        divisor = math.sqrt(own) if settings.get("use_rslora") else own
        layer.put(name, F.pad(a.float(), (0, 0, 0, rank - own)),
                  F.pad(b.float(), (0, rank - own)), settings["lora_alpha"] / max(divisor, 1))
    if weights:
        raise RunError(f"{folder} adapts {min(weights)}, which is no linear layer of attention or "
                       "MLP here")
    freeze(model, name)


# =============================================================================================
# Evaluation and verdict. It draws from its own generators: training never notices.
# =============================================================================================

SLICE = 256  # answers that are written at one time


def mean(values) -> float:
    """Arithmetic mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


@torch.no_grad()
def movement(policy: Policy, p: tuple[str, ...], q: tuple[str, ...], batches: list[Batch],
             cfg: Config) -> tuple[float, float]:
    """KL(p || q) and entropy of p, nats per token, exact over the vocabulary at temperature 1.

    `batches` are samples of p at temperature 1, so the states are those that p visits.
    """
    sums, tokens = torch.zeros(2), sum(int(batch.mask.sum()) for batch in batches)
    for part in (b.rows(i) for b in batches for i in micro_batches(policy, b, cfg.micro_tokens)):
        hidden = [completion_hidden(policy, role, part) for role in (p, q)]
        terms = on_tokens(policy, token_terms, 1.0, part, *hidden)
        sums += terms[1:].sum((1, 2)).cpu()
    kl, entropy = (sums / tokens).tolist()
    return kl, entropy


def answers_to(policy: Policy, role: tuple[str, ...], prompts: list[str], k: int,
               cfg: Config) -> tuple[list[Batch], list[str]]:
    """K answers to each prompt, prompt-major: as batches of ids, and as one list of texts."""
    batches, texts = [], []
    size = max(1, SLICE // k)
    for i in range(0, len(prompts), size):
        ids = [policy.encode(prompt) for prompt in prompts[i:i + size]]
        batches.append(sample(policy, role, ids, k, cfg, seeded("evaluation", i)))
        texts += policy.decode(batches[-1])
    return batches, texts


def greedy_verdicts(policy: Policy, role: tuple[str, ...], examples: list, verify,
                    cfg: Config) -> list[tuple[str, tasks.Verdict]]:
    """The most likely answer to each example, and what the verifier says of it."""
    prompts = [e.prompt for e in examples]
    _, texts = answers_to(policy, role, prompts, 1, replace(cfg, temperature=0.0))
    return list(zip(texts, verify_all(verify, examples, texts), strict=True))


def split_scores(policy: Policy, task: tasks.Task, role: tuple[str, ...], examples: list,
                 cfg: Config) -> tuple[dict, list[Batch]]:
    """Scores on one set of problems, and K samples of each at temperature 1 (for `movement`).

    Edit metrics are means over the sampled answers that pass, None if none does: a failing edit
    repairs nothing.
    """
    greedy = greedy_verdicts(policy, role, examples, task.verify, cfg)
    batches, texts = answers_to(policy, role, [e.prompt for e in examples], cfg.rollouts, full(cfg))
    sampled = verify_all(task.verify, [e for e in examples for _ in range(cfg.rollouts)], texts)
    groups = [sampled[i:i + cfg.rollouts] for i in range(0, len(sampled), cfg.rollouts)]
    scores = {"pass@1": mean(v.passed for _, v in greedy),
              "pass@k": mean(any(v.passed for v in group) for group in groups),
              "reward": mean(v.reward for v in sampled),
              "format": mean(v.formatted for v in sampled)}
    for name in task.edit_metrics:
        values = [v.metrics[name] for v in sampled if v.passed]
        scores[name] = mean(values) if values else None
    return {**scores, "passes": [int(v.passed) for _, v in greedy],
            "answers": [text for text, _ in greedy]}, batches


def full(cfg: Config) -> Config:
    """Sampling from the model's own distribution: temperature 1, whole vocabulary."""
    return replace(cfg, temperature=1.0, top_p=1.0)


def evaluate(policy: Policy, task: tasks.Task, role: tuple[str, ...], cfg: Config) -> dict:
    """All that the report says of one role; `passes` and `answers` are per problem.

    KL is in nats per token: to the base, from the base, and to the reference (after Step 1).
    """
    scores, batches = {}, {}
    for split, examples in task.evals.items():
        scores[split], batches[split] = split_scores(policy, task, role,
                                                     examples[:cfg.eval_problems], cfg)
    problems = first_split(task.evals)[:cfg.eval_problems]
    prompts = [example.prompt for example in problems]
    from_base, _ = answers_to(policy, BASE, prompts, 1, full(cfg))
    anchors, _ = answers_to(policy, role, [e.prompt for e in task.anchors], 1, full(cfg))
    visited = first_split(batches)
    kl, entropy = movement(policy, role, BASE, visited, cfg)
    return {**scores, "general": general_scores(policy, task, role, cfg), "kl_to_base": kl,
            "kl_from_base": movement(policy, BASE, role, from_base, cfg)[0],
            "kl_to_reference": movement(policy, role, policy.reference, visited, cfg)[0],
            "entropy": entropy, "entropy_anchors": movement(policy, role, BASE, anchors, cfg)[1],
            "pass@1_with_hint": hinted_pass(policy, role, problems, task, cfg),
            "pass@1_of_teacher": hinted_pass(*policy.teacher, problems, task, cfg)}


def general_scores(policy: Policy, task: tasks.Task, role: tuple[str, ...],
                   cfg: Config) -> dict[str, float]:
    """The general benchmark: the mean, and each old skill by its name."""
    verdicts = greedy_verdicts(policy, role, task.benchmark, tasks.verify_skill, cfg)
    by_skill: dict[str, list[float]] = {}
    for example, (_, verdict) in zip(task.benchmark, verdicts, strict=True):
        by_skill.setdefault(example.skill, []).append(verdict.reward)
    return {"mean": mean(v.reward for _, v in verdicts),
            **{skill: mean(rewards) for skill, rewards in by_skill.items()}}


def hinted_pass(policy: Policy, role: tuple[str, ...], problems: list, task: tasks.Task,
                cfg: Config) -> float:
    """Greedy pass rate with the privileged hint in the prompt."""
    hinted = [replace(e, prompt=tasks.privileged_prompt(e)) for e in problems]
    return mean(v.passed for _, v in greedy_verdicts(policy, role, hinted, task.verify, cfg))


def paired_bootstrap(before: list[int], after: list[int], draws: int = 10_000
                     ) -> tuple[float, float]:
    """95 % interval of the mean change, resampling problems (Efron 1979)."""
    change = np.array(after) - np.array(before)
    picks = np.random.default_rng(0).integers(len(change), size=(draws, len(change)))
    low, high = np.quantile(change[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def first_split(scores: dict) -> dict:
    """The scores of the split that the verdict is about."""
    return next(iter(scores.values()))


def judge_run(before: dict, after: dict, edit_metrics: tuple[str, ...], cfg: Config) -> dict:
    """Improved only if every condition of the essay holds. Each shows its numbers."""
    old, new = first_split(before), first_split(after)
    low, high = paired_bootstrap(old["passes"], new["passes"])
    kept = after["general"]["mean"] - before["general"]["mean"]
    on_task = after["entropy"] / max(before["entropy"], 1e-9)
    on_anchors = after["entropy_anchors"] / max(before["entropy_anchors"], 1e-9)
    conditions = {
        "pass rate up": (low > 0, f"{old['pass@1']:.3f} -> {new['pass@1']:.3f}, "
                                  f"95 % interval of the change [{low:+.3f}, {high:+.3f}]"),
        "general benchmark kept": (kept >= -0.02, f"{before['general']['mean']:.3f} -> "
                                   f"{after['general']['mean']:.3f}, may fall by 0.02"),
        "KL within budget": (after["kl_to_base"] <= cfg.kl_budget,
                             f"{after['kl_to_base']:.4f} of {cfg.kl_budget} nats/token"),
        "entropy kept": (on_task >= 0.3 and on_anchors >= 0.8,
                         f"x{on_task:.2f} on the task (at least 0.3), "
                         f"x{on_anchors:.2f} on anchors (at least 0.8)")}
    if "excess_edit" in edit_metrics:
        edits = [old["excess_edit"], new["excess_edit"]]
        conditions["extra edits not up"] = (
            None in edits or edits[1] <= edits[0],
            " -> ".join("nothing passes" if e is None else f"{e:.4f}" for e in edits))
    return {"improved": all(holds for holds, _ in conditions.values()),
            "conditions": {name: {"holds": bool(holds), "numbers": numbers}
                           for name, (holds, numbers) in conditions.items()}}


# =============================================================================================
# The run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, adapter/, report.json
# =============================================================================================


def write_atomic(path: Path, data: bytes) -> None:
    """The old file or the new one, never half of it, even if the disk is full or power fails."""
    aside = path.with_name(path.name + ".new")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)


def write_json(path: Path, value) -> None:
    """Indented JSON, written atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def append_jsonl(path: Path, records: list[dict]) -> None:
    """One object a line, on the disk before a checkpoint can say that the step was taken."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def trim_jsonl(path: Path, step: int) -> int:
    """Drop the records after a step, also one that was cut off. Returns how many are left."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = list(takewhile(lambda line: step_of(line) <= step, lines))
    write_atomic(path, b"".join(kept))
    return len(kept)


def step_of(line: bytes) -> float:
    """The step that a record is of; infinity when it is none, or not whole."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else INF
    except (ValueError, KeyError, TypeError, RecursionError):
        return INF


def named_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter weight by its full name."""
    return {name: p for name, p in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name}


def save_checkpoint(folder: Path, policy: Policy, state: State) -> None:
    """All that training changes, behind its checksum; the newest two are kept.

    Generators have no state to save: see `seeded`.
    """
    buffer = io.BytesIO()
    torch.save({"step": state.step, "kl_coef": state.kl_coef,
                "replay": state.replay and vars(state.replay),
                "before": json.dumps(state.before),
                "format": "format" in policy.reference,
                "adapters": {n: p.detach() for n, p in named_adapters(policy.model).items()},
                "optimizer": state.optimizer.state_dict()}, buffer)
    data = buffer.getvalue()
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{state.step:08d}.pt", hashlib.sha256(data).digest() + data)
    for path in sorted(folder.glob("*.pt"))[:-2]:
        path.unlink()


def newest_checkpoint(folder: Path) -> dict:
    """The last checkpoint that is whole. Raises RunError when there is none."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        print(f"{path} is damaged: going back to the one before it")
    raise RunError(f"{folder} holds no whole checkpoint, so nothing can be resumed: "
                   "start the run anew, without --resume and with another --out")


def load_checkpoint(folder: Path, policy: Policy, state: State, cfg: Config) -> None:
    """Put the newest saved state back. Raises RunError when there is none, or of another run."""
    saved = newest_checkpoint(folder)
    try:
        if saved["format"]:
            add_format_adapter(policy, cfg)
            freeze(policy.model, "format")
        weights = named_adapters(policy.model)
        for name in weights.keys() | saved["adapters"].keys():
            weights[name].data.copy_(saved["adapters"][name])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step, state.kl_coef = saved["step"], saved["kl_coef"]
        state.replay = saved["replay"] and Batch(saved["replay"]["contexts"], *(
            saved["replay"][name].to(policy.device) for name in ("completion", "mask")))
        state.before = json.loads(saved["before"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{folder} is of another model or version ({error!r}): resume with what "
                       "the run was started with, or start a new one") from None


def export_adapter(folder: Path, policy: Policy) -> None:
    """The student as one adapter in PEFT's format.

    A sum of low-rank updates is one update of the summed rank: [s1 B1, s2 B2] [A1; A2].
    """
    from safetensors.torch import save
    weights = {}
    for name, layer in lora_layers(policy.model).items():
        a = torch.cat([layer.lora_A[n] for n in policy.student])
        b = torch.cat([layer.lora_B[n] * layer.scale[n] for n in policy.student], 1)
        for kind, weight in (("lora_A", a), ("lora_B", b)):
            weights[f"base_model.model.{name}.{kind}.weight"] = weight.detach().cpu().contiguous()
    rank = len(a)
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": policy.model.name_or_path,
        "fan_in_fan_out": hasattr(layer.base, "nf"),
        "target_modules": sorted({n.split(".")[-1] for n in lora_layers(policy.model)})})


def export_merged(folder: Path, policy: Policy) -> None:
    """The student as a plain model with its tokenizer: W + s B A in the dtype of W."""
    layers = lora_layers(policy.model)
    wrapped = tuple(f"{path}." for path in layers)
    state = {k: w for k, w in policy.model.state_dict().items() if not k.startswith(wrapped)}
    for path, layer in layers.items():
        weight = layer.base.weight.detach()
        change = sum(layer.scale[n] * layer.lora_B[n] @ layer.lora_A[n] for n in policy.student)
        change = change.T if hasattr(layer.base, "nf") else change
        state[f"{path}.weight"] = (weight.float() + change.detach()).to(weight.dtype).cpu()
        if layer.base.bias is not None:
            state[f"{path}.bias"] = layer.base.bias
    policy.model.save_pretrained(folder, state_dict=state)
    policy.tokenizer.save_pretrained(folder)


# =============================================================================================
# Training
# =============================================================================================


def add_format_adapter(policy: Policy, cfg: Config) -> None:
    """Step 1's adapter: from now on part of the reference, and of the student."""
    add_adapter(policy.model, "format", cfg.format_rank, cfg.format_rank, cfg.seed)
    policy.reference = (*policy.reference, "format")


def train_format(policy: Policy, task: tasks.Task, cfg: Config) -> None:
    """Step 1: one low-rate epoch towards reference answers on an adapter that is then frozen."""
    add_format_adapter(policy, cfg)
    optimizer = torch.optim.Adam(adapter_parameters(policy.model, "format"), lr=cfg.format_lr)
    examples = task.train[:cfg.format_examples]
    order = torch.randperm(len(examples), generator=seeded("format", cfg.seed)).tolist()
    last = len(order) - world() + 1  # every rank needs an example
    for i in progress(range(0, last, cfg.prompts), "Step 1: format"):
        batch = solution_batch(policy, mine([examples[j] for j in order[i:i + cfg.prompts]]))
        tokens = over_ranks(int(batch.mask.sum()))
        imitate(policy, policy.reference, batch, tokens, cfg.micro_tokens)
        optimizer_step(optimizer, cfg)
    freeze(policy.model, "format")


def progress(items, what: str):
    """A progress bar with the time left, where somebody is watching."""
    return tqdm(items, what, file=sys.stdout, mininterval=1, disable=None, leave=False)


def examples_at(task: tasks.Task, step: int, cfg: Config) -> list[tasks.Example]:
    """The P examples of a step: every epoch is a new shuffle, known from the seed alone."""
    size = len(task.train)
    places = range(step * cfg.prompts, (step + 1) * cfg.prompts)
    orders = {e: torch.randperm(size, generator=seeded("data", cfg.seed, e)).tolist()
              for e in {place // size for place in places}}
    return [task.train[orders[place // size][place % size]] for place in places]


class StopRequest:
    """Ctrl-C and SIGTERM as a request to stop after the step; a second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    asked = False

    def __enter__(self) -> StopRequest:
        self.handlers = [signal.signal(number, self.ask) for number in self.SIGNALS]
        return self

    def __exit__(self, *error) -> None:
        for number, handler in zip(self.SIGNALS, self.handlers, strict=True):
            signal.signal(number, handler)

    def ask(self, *signal_and_frame) -> None:
        """The signal handler. torchrun passes one Ctrl-C on more than once, so it only asks."""
        if self.asked and world() == 1:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nStopping after this step; once more stops at once.\n")  # print may be busy


def train(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> None:
    """The loop: one call a step, one line of metrics a step. Ctrl-C ends it between two steps."""
    recent, warned = deque(maxlen=PATIENCE), set()
    print(log_header())
    with StopRequest() as stop:
        while state.step < cfg.steps and not over_ranks(int(stop.asked)):
            started = time.perf_counter()
            metrics, samples = one_step(policy, task, state, out, cfg)
            state.step += 1
            if state.step % cfg.eval_every == 0:
                metrics["eval_pass"] = on_rank_0(probe, policy, task, cfg)
            metrics = {"step": state.step, **metrics}
            on_rank_0(append_jsonl, out / "metrics.jsonl", [metrics])
            on_rank_0(append_jsonl, out / "samples.jsonl", samples)
            print(log_line({**metrics, "seconds": time.perf_counter() - started}), flush=True)
            recent.append(metrics)
            for warning in warnings_of(list(recent), cfg) - warned:
                print(f"Warning: {warning}", flush=True)
                warned.add(warning)
            if state.step % cfg.save_every == 0 or state.step == cfg.steps:
                on_rank_0(save_checkpoint, out / "checkpoint", policy, state)
        if state.step < cfg.steps:
            on_rank_0(save_checkpoint, out / "checkpoint", policy, state)
            raise KeyboardInterrupt


def method_step(policy: Policy, task: tasks.Task, examples: list, state: State,
                cfg: Config) -> tuple[dict, list[dict]]:
    """A training step of the chosen method."""
    step = sft_step if cfg.method == "sft" else train_step
    return step(policy, task, examples, state, cfg)


def one_step(policy: Policy, task: tasks.Task, state: State, out: Path,
             cfg: Config) -> tuple[dict, list[dict]]:
    """The method's step. If it fails, the state before it is saved and the error says where."""
    examples = examples_at(task, state.step, cfg)
    try:
        return method_step(policy, task, mine(examples), state, cfg)
    except NotFinite as error:
        ids = ", ".join(example.id for example in examples)
        raise RunError(f"step {state.step + 1}, on the examples {ids}: {error}; "
                       f"{save_failed(policy, state, out, cfg)}") from None


def save_failed(policy: Policy, state: State, out: Path, cfg: Config) -> str:
    """Save the state before a failed step, unless one of its epochs has changed it already."""
    taken = max((int(moments["step"]) for moments in state.optimizer.state.values()), default=0)
    if taken != state.step * cfg.epochs:
        return f"the last checkpoint is kept, and --resume {out} leads here again"
    on_rank_0(save_checkpoint, out / "checkpoint", policy, state)
    return f"the state before it is saved, and --resume {out} leads here again"


PATIENCE = 20  # steps in a row until a warning


def warnings_of(recent: list[dict], cfg: Config) -> set[str]:
    """What has been wrong in each of the last PATIENCE steps, and what to do about it."""
    found = set()
    if len(recent) == PATIENCE and min(m.get("kl", 0.0) for m in recent) > 3 * cfg.kl_budget:
        found.add(f"KL has been over 3 times --kl-budget for {PATIENCE} steps: the model forgets. "
                  "Start anew with a lower --lr, a higher --kl-coef or fewer --steps")
    tied = len(recent) == PATIENCE and min(m.get("tied_rollouts", 0.0) for m in recent) == 1
    if tied and cfg.method != "opd":  # which looks at no verdict
        found.add(f"in {PATIENCE} steps no group of rollouts had a better and a worse answer: the "
                  "task is too easy or too hard: take other problems, more --rollouts, a higher "
                  "--temperature")
    return found


def probe(policy: Policy, task: tasks.Task, cfg: Config) -> float:
    """Greedy pass rate on a few held-out problems: a look while training runs."""
    problems = first_split(task.evals)[:cfg.eval_problems][:64]
    verdicts = greedy_verdicts(policy, policy.student, problems, task.verify, cfg)
    return mean(v.passed for _, v in verdicts)


LOG = {"step": "5d", "reward": "8.3f", "pass_rate": "9.2f", "format_rate": "11.2f",
       "tied_rollouts": "13.2f", "kl": "8.4f", "kl_coef": "8.4f", "entropy": "8.3f",
       "teacher_share": "13.3f", "nll": "8.3f", "eval_pass": "9.2f", "seconds": "7.1f"}


def log_line(metrics: dict) -> str:
    """One fixed-width line; a column that a method does not have stays out."""
    return " ".join(f"{metrics[name]:{form}}" if name in metrics else
                    " " * int(form.split(".")[0].rstrip("d")) for name, form in LOG.items())


def log_header() -> str:
    """The names above the columns of `log_line`."""
    return " ".join(f"{name:>{form.split('.')[0].rstrip('d')}}" for name, form in LOG.items())


# =============================================================================================
# What the terminal shows
# =============================================================================================


def environment(policy: Policy) -> dict:
    """What a result depends on besides the code."""
    import transformers
    layers = lora_layers(policy.model).values()
    size = sum(p.numel() for n, p in policy.model.named_parameters() if ".lora_" not in n)
    size += sum(2 * m.base.packed.numel() for m in layers if isinstance(m.base, NF4Linear))
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "device": str(policy.device),
            "dtype": str(policy.model.dtype), "threads": torch.get_num_threads(),
            "frozen_parameters": size, "judge": tasks.judge_layers()}


def print_environment(facts: dict) -> None:
    """One line that a reader can paste into a question."""
    print(", ".join(f"{name} {', '.join(value) if isinstance(value, list) else value}"
                    for name, value in facts.items()))


def flat(scores: dict, prefix: str = "") -> dict[str, float]:
    """Nested scores as "in_domain pass@1": number; lists are left out."""
    rows = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{name} ")
        elif isinstance(value, float):
            rows[prefix + name] = value
    return rows


def print_report(report: dict) -> None:
    """The before/after table and the verdict."""
    before, after = flat(report["before"]), flat(report["after"])
    print(f"\n{'':36}{'before':>9}{'after':>9}")
    for name in after:
        old = f"{before[name]:9.3f}" if name in before else f"{'-':>9}"
        print(f"{name:36}{old}{after[name]:9.3f}")
    verdict = report["verdict"]
    print(f"\nVerdict: {'IMPROVED' if verdict['improved'] else 'NOT IMPROVED'}")
    for name, condition in verdict["conditions"].items():
        print(f"  {'yes' if condition['holds'] else 'NO ':4}{name}: {condition['numbers']}")


def print_examples(task: tasks.Task, before: dict, after: dict) -> None:
    """Two held-out problems that the base failed and the student solves."""
    before, after, problems = map(first_split, (before, after, task.evals))
    pairs = zip(before["passes"], after["passes"], strict=True)
    learnt = [i for i, (old, new) in enumerate(pairs) if new > old]
    for i in learnt[:2]:
        example = problems[i]
        shown = example.buggy or example.prompt
        for when, answer in (("before", before["answers"][i]), ("after", after["answers"][i])):
            print(f"\nHeld-out problem {example.id}, {when}:")
            print("\n".join(difflib.unified_diff(shown.splitlines(), answer.splitlines(),
                                                 "problem", "answer", lineterm="", n=9))
                  or "(the problem, unchanged)")


# =============================================================================================
# --compare and --ablations: run after run from one base, and one table
# =============================================================================================

LR_GRID = (0.3, 1.0, 3.0)  # times --lr: what each method chooses from, on the validation split

ABLATIONS = {
    "vcopd": {}, "gate success": {"gate": "success"}, "gate failure": {"gate": "failure"},
    "gate none": {"gate": "none"}, "no clip": {"gap_clip": 1e9}, "lambda 0": {"teacher_coef": 0.0},
    "lambda 0.05": {"teacher_coef": 0.05}, "lambda 1": {"teacher_coef": 1.0},
    "no replay": {"replay_share": 0.0}, "no KL guard": {"kl_coef": 0.0}, "K 2": {"rollouts": 2},
    "K 8": {"rollouts": 8}}


@contextlib.contextmanager
def reading(out: Path, advice: str = "delete it, and it is made again"):
    """Where a run is missing or damaged, raise RunError instead of what reading it raises."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            RecursionError) as error:
        raise RunError(f"{out} holds no run or a damaged one ({error}): {advice}") from None


def finished(cfg: Config, task: tasks.Task, known: dict) -> dict:
    """The report of a run: made unless it is there; a run that was cut short goes on.

    `known` holds the base's scores, which all runs share. Raises RunError where another run is
    in the folder.
    """
    out, key = Path(cfg.out), (*task.evals, cfg.rollouts, cfg.teacher)
    resuming = (out / "config.json").exists()
    if resuming:
        check_same(out, cfg)
    if not (out / "report.json").exists():
        print(f"\n=== {out}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        run(cfg, out, resuming, task, known.get(key, {}))
    with reading(out):
        report = json.loads((out / "report.json").read_text("utf-8"))
        known[key] = report["before"]
    return report


def tuned(cfg: Config, known: dict, out: Path) -> Config:
    """With the learning rate of the grid that does best on the validation split."""
    rates = [cfg.lr * factor for factor in LR_GRID]
    tried = [replace(cfg, lr=lr, split="validation", out=f"{out}/tune/{cfg.method}-lr{lr:g}")
             for lr in rates]
    held_out = load_task(tried[0])
    reports = [finished(one, held_out, known) for one in tried]
    best = max(range(len(tried)), key=lambda i: (
        reports[i]["verdict"]["improved"], first_split(reports[i]["after"])["pass@1"]))
    print(f"\n{cfg.method}: --lr {tried[best].lr:g} is best on the validation split", flush=True)
    return replace(cfg, lr=tried[best].lr)


def compare(cfg: Config, out: Path) -> None:
    """Every method with as many optimiser steps, prompts and seeds, each at its best --lr."""
    task, known, base = load_task(cfg), {}, one_of(cfg)
    methods = {name: tuned(replace(base, method=name, **METHODS[name]), known, out)
               for name in ("sft", "rl", "opd", "vcopd")}
    tabulate(methods, cfg.seeds, task, known, out)


def one_of(cfg: Config) -> Config:
    """A single run of an experiment: whatever the number of seeds, it is the same run."""
    return replace(cfg, compare=False, ablations=False, seeds=Config.seeds)


def ablate(cfg: Config, out: Path) -> None:
    """VC-OPD with one choice changed at a time, with every seed. The specialist is an SFT run."""
    task, known, base = load_task(cfg), {}, one_of(cfg)
    expert = replace(base, method="sft", **METHODS["sft"], out=f"{out}/expert")
    finished(expert, task, known)
    changes = {**ABLATIONS, "specialist": {"teacher": f"{expert.out}/adapter"}}
    variants = {name: replace(base, **change) for name, change in changes.items()}
    told = {name: v for name, v in variants.items() if name == "vcopd" or v != variants["vcopd"]}
    tabulate(told, cfg.seeds, task, known, out)


def tabulate(variants: dict[str, Config], seeds: int, task: tasks.Task, known: dict,
             out: Path) -> None:
    """Run each variant with every seed; print one table, and save it with the numbers behind."""
    columns, passes, steps = {"base": []}, {}, {}
    for name, variant in variants.items():
        runs = [replace(variant, seed=variant.seed + i, out=f"{out}/{name}-s{variant.seed + i}")
                for i in range(seeds)]
        reports = [finished(one, task, known) for one in runs]
        steps[name] = [read_metrics(Path(one.out)) for one in runs]
        columns[name] = [numbers_of(*each, variant)
                         for each in zip(reports, steps[name], strict=True)]
        passes[name] = np.mean([first_split(r["after"])["passes"] for r in reports], 0)
        if name == "vcopd":
            columns["base"] = [flat(reports[0]["before"])]
    if "rl" in variants:
        count_rollouts_to_rl(columns, steps, variants)
    changes = {name: paired_bootstrap(passes["vcopd"], passes[name]) for name in variants}
    print_table(columns, changes)
    on_rank_0(write_json, out / "table.json", {
        "columns": columns, "pass@1_minus_vcopd": changes,
        "lr": {name: variant.lr for name, variant in variants.items()}})


def read_metrics(out: Path, *advice: str) -> list[dict]:
    """What a run wrote in each step. Raises RunError, with the advice of `reading`."""
    with reading(out, *advice):
        lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


def answers_in_step(cfg: Config) -> int:
    """How many answers a step learns from: rollouts, or the references of SFT."""
    return cfg.prompts * (1 if cfg.method == "sft" else cfg.rollouts)


def numbers_of(report: dict, steps: list[dict], cfg: Config) -> dict[str, float]:
    """One run's entries of the table: scores, and what they cost."""
    before, after = report["before"], report["after"]
    return {**flat(after), "general worst": min(after["general"].values()),
            "entropy_ratio": after["entropy"] / max(before["entropy"], 1e-9),
            "teacher_share": mean(m.get("teacher_share", 0.0) for m in steps),
            "improved": float(report["verdict"]["improved"]),
            "answers": float(len(steps) * answers_in_step(cfg)),
            "tokens": float(sum(m["tokens"] for m in steps)), "minutes": report["seconds"] / 60}


def count_rollouts_to_rl(columns: dict, steps: dict, variants: dict[str, Config]) -> None:
    """Credit density: after how many answers a run first passed as often as RL at its end.

    By the looks at held-out problems during training; None where it never did.
    """
    looks = {name: [[(m["step"], m["eval_pass"]) for m in run if "eval_pass" in m]
                    for run in runs] for name, runs in steps.items()}
    goal = mean(run[-1][1] for run in looks["rl"] if run)
    for name, runs in looks.items():
        for numbers, run in zip(columns[name], runs, strict=True):
            first = min((step for step, rate in run if rate >= goal), default=None)
            numbers["answers_to_rl"] = first and float(first * answers_in_step(variants[name]))
            numbers["reached_rl"] = float(first is not None)


ACROSS = 5  # methods that fit on a terminal


def print_table(columns: dict[str, list[dict]], changes: dict[str, tuple]) -> None:
    """Mean and standard deviation over seeds; methods side by side."""
    for i in range(0, len(columns), ACROSS):
        some = dict(list(columns.items())[i:i + ACROSS])
        print("\n" + " " * 24 + "".join(f"{name:>15}" for name in some))
        for row in columns["vcopd"][0]:
            print(f"{row:24}" + "".join(spread([run.get(row) for run in runs])
                                        for runs in some.values()))
    print("\npass@1 against vcopd, mean over seeds, 95 % interval over problems:")
    for name, (low, high) in changes.items():
        print(f"  {name:20}[{low:+.3f}, {high:+.3f}]")


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation of those that are there; a dash for none."""
    values = [value for value in values if value is not None]
    if not values:
        return f"{'-':>15}"
    digits = 0 if values[0] >= 100 else 3
    return f"{np.mean(values):8.{digits}f} ±{np.std(values):5.{digits}f}"


# =============================================================================================
# --inspect: what a step would credit, token by token
# =============================================================================================

FAINT = 0.01  # nats: a smaller gap is no hint
LEGEND = """
A token a line: its log-prob for the student, for the teacher, who reads the hint, and for the
reference; D = teacher - student, and what the clip leaves of it where that is less; the advantage
that a step would give the token. Green: the hint pushes it up. Red: down. Bold: D is clipped."""
STAKES = """
The essay clips because the largest gaps are often on style, on which no verdict turns. So it is
here if style holds most of |D|, and the clip helps if style holds less of what it leaves. Style is
all but the places where a failed answer to the prompt, or the buggy program, departs from the
reference. The fair test is the answers that passed: a teacher who knows the reference must dislike
what departs from it.

        answers  tokens  over the clip   on style: tokens    |D|  clipped"""


@dataclass
class Rollout:
    """One answer, and all that a step holds of its T tokens."""

    example: tasks.Example
    answer: str
    verdict: tasks.Verdict
    advantage: float
    gate: float
    texts: list[str]
    columns: Tensor  # (6, T), of `token_columns`


def inspect(cfg: Config) -> None:
    """Print what the first step of a run would credit, and where hints gather; train nothing.

    An adapter given as --model is the student here, and the model under it the reference.
    """
    task = load_task(cfg)
    policy = load_policy(cfg, task)
    if is_adapter(cfg.model):
        load_adapter(policy.model, "policy", Path(cfg.model))
        policy.reference = BASE
    print_environment(environment(policy))
    groups = credited(policy, task, examples_at(task, 0, cfg), cfg)
    print(LEGEND)
    for rollout in telling(groups):
        print_rollout(rollout)
    print_stakes(groups, cfg)


@torch.no_grad()
def credited(policy: Policy, task: tasks.Task, examples: list, cfg: Config) -> list[list[Rollout]]:
    """K rollouts of each example, and what `train_step` finds out about them before it learns."""
    rollouts, found = collect_rollouts(policy, task, examples, 0, cfg), {}
    gates = GATES[cfg.gate](rollouts.advantage).tolist()
    for part in rollouts.parts:
        columns = token_columns(policy, part, cfg)
        for i, ids, values in zip(part.index.tolist(), part.batch.answers(), columns, strict=True):
            found[i] = Rollout(rollouts.examples[i], rollouts.answers[i], rollouts.verdicts[i],
                               rollouts.advantage[i].item(), gates[i], token_texts(policy, ids),
                               values[:, :len(ids)])
    return [[found[i + k] for k in range(cfg.rollouts)]
            for i in range(0, len(found), cfg.rollouts)]


def token_columns(policy: Policy, part: Experience, cfg: Config) -> Tensor:
    """Log-probs of student, teacher, reference; D as it is and clipped; A_dense: (b, 6, T)."""
    student = log_probs(policy, policy.student, part.batch, cfg.temperature)
    reference = on_tokens(policy, token_logps, cfg.temperature, part.batch, part.hidden_ref)
    gap, clipped = (teacher_gap(part.logp_teacher, student, clip) for clip in (INF, cfg.gap_clip))
    dense = dense_advantage(part.advantage, clipped, cfg)
    return torch.stack([student, part.logp_teacher, reference, gap, clipped, dense], 1).cpu()


def token_texts(policy: Policy, ids: list[int]) -> list[str]:
    """What each token adds to the text: alone, some tokenizers write it otherwise."""
    begun = policy.tokenizer.batch_decode([ids[:n] for n in range(len(ids) + 1)],
                                          skip_special_tokens=True,
                                          clean_up_tokenization_spaces=False)
    return [text[len(before):] for before, text in pairwise(begun)]


def telling(groups: list[list[Rollout]]) -> list[Rollout]:
    """The best and the worst answer to one prompt; of tied groups, the answer with most hints."""
    untied = [group for group in groups if len({r.verdict.reward for r in group}) > 1]
    tied = [r for group in groups if len({r.verdict.reward for r in group}) == 1 for r in group]
    ends = [pick(untied[0], key=lambda r: r.verdict.reward) for pick in (max, min) if untied]
    return ends + sorted(tied, key=lambda r: -r.columns[4].abs().sum().item())[:1]


def print_rollout(rollout: Rollout) -> None:
    """A line for each token with a hint, and one for each stretch of tokens without."""
    print(f"\n{rollout.example.id}: reward {rollout.verdict.reward:.2f} "
          f"({rollout.verdict.reason}), A {rollout.advantage:+.2f}, gate {rollout.gate:.2f}\n"
          f"{'token':20}  student  teacher reference       D  clipped   A_dense")
    lines = zip(rollout.texts, rollout.columns.T.tolist(), strict=True)
    for hinted, stretch in groupby(lines, lambda line: abs(line[1][3]) >= FAINT):
        texts, values = zip(*stretch, strict=True)
        if hinted:
            print("\n".join(map(token_line, texts, values)))
        else:
            print(f"… {len(texts)} token{'s' * (len(texts) > 1)} without a hint, up to "
                  f"{''.join(texts)[-20:]!r}")


def token_line(text: str, values: list[float]) -> str:
    """The columns of one token, coloured where a person watches."""
    student, teacher, reference, gap, clipped, dense = values
    cut = gap != clipped
    name = repr(text) if text else "(special token)"
    line = (f"{name:20}{student:9.2f}{teacher:9.2f}{reference:10.2f}{gap:+8.2f}"
            f"{f'{clipped:+.2f}' if cut else '':>9}{dense:+10.3f}")
    if not sys.stdout.isatty():
        return line
    return f"\x1b[{'1;' * cut}{32 if gap > 0 else 31}m{line}\x1b[0m"


def words(text: str) -> list[str]:
    """Names and numbers whole, every other character alone."""
    return re.findall(r"\w+|\W", text)


def aligned(one: str, two: str) -> list[tuple[bool, range, range]]:
    """Stretches of words that two texts share, or have otherwise: then a place in each at least."""
    codes = difflib.SequenceMatcher(None, words(one), words(two), autojunk=False).get_opcodes()
    return [(kind == "equal", range(a, max(b, a + 1)), range(c, max(d, c + 1)))
            for kind, a, b, c, d in codes]


def contested(group: list[Rollout]) -> set[int]:
    """Places of words in the reference that some wrong text has otherwise."""
    example = group[0].example
    wrong = [r.answer for r in group if not r.verdict.passed]
    wrong += [example.buggy] if example.buggy else []
    return {place for text in wrong for same, _, places in aligned(text, example.reference)
            for place in places if not same}


def at_stake(rollout: Rollout, places: set[int]) -> Tensor:
    """The tokens (T,) of an answer that stand where the reference has its words at `places`."""
    staked: set[int] = set()
    for same, here, there in aligned(rollout.answer, rollout.example.reference):
        if same:
            staked |= {i for i, j in zip(here, there, strict=True) if j in places}
        elif places & set(there):
            staked |= set(here)
    owner = [i for i, word in enumerate(words(rollout.answer)) for _ in word]  # of a character
    owner.append(len(words(rollout.answer)))  # at the end, the stop token writes nothing
    starts = accumulate(map(len, rollout.texts), initial=0)
    return torch.tensor([not staked.isdisjoint(owner[start:start + max(1, len(text))])
                         for start, text in zip(starts, rollout.texts, strict=False)])


def tally(rollout: Rollout, places: set[int], cfg: Config) -> Tensor:
    """Sums (7,): tokens over the clip; tokens, |D| and |D| clipped in all; the same of style."""
    gap, clipped = rollout.columns[3:5].abs()
    values = torch.stack([torch.ones_like(gap), gap, clipped])  # (3, T)
    style = values[:, ~at_stake(rollout, places)]
    return torch.cat([(gap > cfg.gap_clip).sum()[None], values.sum(1), style.sum(1)])


def print_stakes(groups: list[list[Rollout]], cfg: Config) -> None:
    """How much of |D| lies on style. Groups without a wrong text, which cannot tell, stay out."""
    counts = [(r.verdict.passed, tally(r, places, cfg))
              for group in groups if (places := contested(group)) for r in group]
    print(STAKES)
    for name, kinds in (("passed", [True]), ("failed", [False]), ("all", [True, False])):
        chosen = [sums for passed, sums in counts if passed in kinds]
        over, *sums = sum(chosen, torch.zeros(7)).tolist()
        shares = [part / (whole or INF) for whole, part in zip(sums[:3], sums[3:], strict=True)]
        print(f"{name:8}{len(chosen):7}{sums[0]:8.0f}{over:15.0f}"
              f"{shares[0]:19.1%}{shares[1]:7.1%}{shares[2]:9.1%}")


# =============================================================================================
# --plot: the curves of runs, or what a comparison trades, in plot.png
# =============================================================================================

CURVES = {  # columns of metrics.jsonl: the panel that shows each, and the line it is drawn with
    "reward": ("reward", ".-"), "pass_rate": ("pass rate (dashed: held out)", ".-"),
    "eval_pass": ("pass rate (dashed: held out)", "o--"), "kl": ("KL, nats per token", ".-"),
    "entropy": ("entropy, nats per token", ".-"), "kl_coef": ("beta (kl_coef)", ".-")}

FORGETTING = {"kl_to_base": "KL to the base, nats per token",
              "general mean": "general benchmark, mean"}

DRAWN = "--plot takes the folder of a run or of a comparison, as --out named it"


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """A run's points (step, value) of each column that its method has. Raises RunError."""
    with reading(folder, DRAWN):
        steps = {float(record["step"]): record for record in read_metrics(folder, DRAWN)}
        curves = {column: [(step, float(record[column])) for step, record in steps.items()
                           if column in record] for column in CURVES}
        if not steps:
            raise ValueError("no step has been taken")
    return {column: points for column, points in curves.items() if points}


def read_table(folder: Path) -> tuple[str, dict[str, list[dict[str, float]]]]:
    """Which score is the new skill, and a comparison's runs by method. Raises RunError."""
    with reading(folder, DRAWN):
        columns = json.loads((folder / "table.json").read_text("utf-8"))["columns"]
        skill = [name for name in columns["base"][0] if name.endswith(" pass@1")][0]
        return skill, {method: [{name: float(run[name]) for name in (skill, *FORGETTING)}
                                for run in runs] for method, runs in columns.items()}


def blank_figure(rows: int, names: list[str]) -> tuple:
    """A figure, its panels, and a colour for each name; the legend has the place of the last."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # draws by Agg: pyplot would look for a screen
    except ImportError:
        raise RunError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(13, 4 * rows), layout="constrained")
    *panels, key = figure.subplots(rows, 3).flat
    key.axis("off")
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "turbo"]  # tab10 has no more
    colours = palette.resampled(max(10, len(names)))(range(len(names)))
    handles = [key.plot([], [], "o-", color=colour)[0] for colour in colours]
    for text in key.legend(handles, names, loc="center left").get_texts():
        text.set_parse_math(False)  # a $ in the name of a folder begins no formula
    return figure, panels, colours


def draw_runs(runs: dict[str, dict]):
    """The figure of some runs: a panel for each quantity over the steps, a colour for each run."""
    figure, panels, colours = blank_figure(2, list(runs))
    places = dict(zip(dict.fromkeys(title for title, _ in CURVES.values()), panels, strict=True))
    for title, panel in places.items():
        panel.set(title=title, xlabel="step")
    for curves, colour in zip(runs.values(), colours, strict=True):
        for column, points in curves.items():
            title, line = CURVES[column]
            places[title].plot(*zip(*points, strict=True), line, color=colour, markersize=3)
    return figure


def draw_comparison(skill: str, methods: dict[str, list[dict]]):
    """The figure of a comparison: new skill over forgetting, a point for each method and seed."""
    figure, panels, colours = blank_figure(1, list(methods))
    for panel, (cost, title) in zip(panels, FORGETTING.items(), strict=True):
        panel.set(xlabel=title, ylabel=skill)
        for runs, colour in zip(methods.values(), colours, strict=True):
            panel.plot([run[cost] for run in runs], [run[skill] for run in runs], "o",
                       color=colour, alpha=0.8)
    return figure


def figure_of(folders: list[Path]):
    """What there is to see in these folders. Raises RunError."""
    tables = [folder for folder in folders if (folder / "table.json").exists()]
    if tables and len(folders) > 1:
        raise RunError(f"{tables[0]} holds a comparison, which is drawn alone: give it as the only "
                       "RUN of --plot, or leave it out")
    if tables:
        return draw_comparison(*read_table(tables[0]))
    paths = [os.path.abspath(folder) for folder in folders]
    shared = os.path.commonpath(map(os.path.dirname, paths))  # what tells a/run from b/run is kept
    return draw_runs({os.path.relpath(path, shared): read_curves(folder)
                      for path, folder in zip(paths, folders, strict=True)})


def plot(runs: list[str]) -> int:
    """Draw, and save it in the first folder. Exit code 2 for what a user can mend."""
    out, image = Path(runs[0]) / "plot.png", io.BytesIO()
    try:
        figure_of([Path(run) for run in runs]).savefig(image, format="png", dpi=120)
        write_atomic(out, image.getvalue())
    except (RunError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 2
    print(f"The picture is {out}")
    return 0


# =============================================================================================
# --bench: how fast this machine is
# =============================================================================================


def timed(what: str, units: str, size, function, *arguments):
    """Call it, print a row of the table with `size(result)` units a second, return its result."""
    started = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(f"{what:24}{seconds:8.2f} s{size(result) / seconds:9.0f} {units}/s", flush=True)
    return result


@torch.no_grad()
def generate(policy: Policy, prompts: list[list[int]], cfg: Config) -> Batch:
    """The same rollouts by transformers' own `generate`: what `sample` is measured against."""
    rows = [prompt for prompt in prompts for _ in range(cfg.rollouts)]
    ids, seen = (t.to(policy.device) for t in pad(rows, policy.pad_id, left=True))
    with adapters(policy.model, policy.student):
        out = policy.model.generate(
            ids, attention_mask=seen.long(), do_sample=True, temperature=cfg.temperature,
            top_p=cfg.top_p, top_k=0, max_new_tokens=cfg.max_new_tokens,
            pad_token_id=policy.pad_id, eos_token_id=policy.stop_ids.tolist())
    completion = out[:, ids.shape[1]:]
    return Batch(rows, completion, stop_mask(completion, policy.stop_ids))


def bench(cfg: Config) -> None:
    """Time rollouts, the judge and a step, whole and in parts, twice: the first is a warm-up."""
    task = load_task(cfg)
    policy = load_policy(cfg, task)
    state = State(torch.optim.Adam(adapter_parameters(policy.model, "policy"), lr=cfg.lr),
                  cfg.kl_coef, step=1)  # few steps begin with a refresh of the replay pool
    if cfg.replay_share > 0:
        state.replay = refresh_replay(policy, task.anchors, 0, cfg)
    print_environment(environment(policy))
    examples = examples_at(task, 0, cfg)
    prompts = [policy.encode(example.prompt) for example in examples]
    edits = tasks.edit_problems(tasks.read_families(tasks.FAMILIES), tasks.OPERATORS, tasks.TRAIN,
                                500, "bench")
    answers = [example.reference for example in edits]
    for _ in range(2):
        print()
        timed("rollouts by generate", "tokens", tokens_in, generate, policy, prompts, cfg)
        batch = timed("rollouts", "tokens", tokens_in, sample, policy, policy.student, prompts,
                      cfg.rollouts, cfg, seeded("bench"))
        timed("judge, right answers", "checks", len, verify_all, tasks.run_example, edits, answers)
        bench_learning(policy, batch, examples, state, cfg)
        timed("whole step", "rollouts", lambda _: cfg.prompts * cfg.rollouts, method_step, policy,
              task, examples, state, cfg)
    print(f"\npeak memory {peak_memory():.2f} GiB")


def tokens_in(batch: Batch) -> int:
    """How many tokens were sampled."""
    return int(batch.mask.sum())


def bench_learning(policy: Policy, batch: Batch, examples: list, state: State,
                   cfg: Config) -> None:
    """Time what a step does with its rollouts, part by part."""
    rows = [example for example in examples for _ in range(cfg.rollouts)]

    def size(result) -> int:
        return tokens_in(batch)

    parts = timed("reference", "tokens", size, split_and_ask_reference, policy, batch, cfg)
    if has_teacher(cfg):
        read = timed("teacher", "tokens", size, lambda: [ask_teacher(policy, part, rows, cfg)
                                                         for part in parts])
        for part, logp in zip(parts, read, strict=True):
            part.logp_teacher = logp
    for part in parts:
        part.advantage = torch.zeros(len(part.index), device=policy.device)
    timed("update, one epoch", "tokens", size, update, policy, parts, None, state, cfg)


def peak_memory() -> float:
    """The most that was held, in GiB: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    units = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


# =============================================================================================
# A whole run
# =============================================================================================


def load_task(cfg: Config) -> tasks.Task:
    """The task, with the user's own data files in place of its own.

    Every row of a file is run. A bad one raises LoadError, or is left out if --skip-bad-rows says
    so, and is told.
    """
    own, refused = {}, [] if cfg.skip_bad_rows else None
    if cfg.data:
        own["train"] = tasks.load_edits(cfg.data, refused)
    if cfg.eval_data:
        own["evals"] = {"eval_data": tasks.load_edits(cfg.eval_data, refused)}
    if cfg.benchmark:
        own["benchmark"] = tasks.load_benchmark(cfg.benchmark, refused)
    if refused:
        print(f"--skip-bad-rows: {len(refused)} rows are left out, the first: {refused[0]}")
    task = replace(tasks.TASKS[cfg.task](), **own)
    if cfg.split == "validation":
        problems, old_skills = task.validation
        task = replace(task, evals={"validation": problems}, benchmark=old_skills)
    stride = math.ceil(len(task.benchmark) / cfg.eval_problems)  # some of every skill
    return replace(task, benchmark=task.benchmark[::stride])


def fit_lengths(policy: Policy, examples: list[tasks.Example], cfg: Config) -> None:
    """Raise RunError for a prompt with which an answer exceeds the model's context; say how many
    references are longer than an answer may be."""
    limit = getattr(policy.model.config, "max_position_embeddings", None) or INF
    for e in examples:
        texts = [e.prompt, tasks.privileged_prompt(e)] if has_teacher(cfg) else [e.prompt]
        size = max(map(len, (text.encode() for text in texts)))  # no token is shorter than a byte
        if size + cfg.max_new_tokens > limit - 64:  # and 64 are for the chat template
            size = max(len(policy.encode(text)) for text in texts)
        if size + cfg.max_new_tokens > limit:
            raise RunError(f"example {e.id}: its prompt takes {size} tokens and an answer up to "
                           f"{cfg.max_new_tokens}, but the model reads {limit}: leave it out, or "
                           "lower --max-new-tokens")
    long = [(len(ids) + 1, e.id) for e, ids in zip(examples, policy.tokenizer(
        [e.reference for e in examples], add_special_tokens=False).input_ids, strict=True)
        if len(ids) >= cfg.max_new_tokens]
    if long:
        print(f"Note: {len(long)} of {len(examples)} references are longer than --max-new-tokens "
              f"{cfg.max_new_tokens}; the longest, {max(long)[1]}, takes {max(long)[0]}. Such "
              "answers are cut off and fail")


def check(cfg: Config) -> int:
    """--check: which rows work, how long they are, and what the base makes of them."""
    refused: list[str] = []
    for path, load in ((cfg.data, tasks.load_edits), (cfg.eval_data, tasks.load_edits),
                       (cfg.benchmark, tasks.load_benchmark)):
        if path:
            bad: list[str] = []
            rows = load(path, bad)
            print(f"{path}: {len(rows)} rows pass, {len(bad)} are refused", *bad, sep="\n  ")
            refused += bad
    task = load_task(replace(cfg, skip_bad_rows=True))
    policy = load_policy(cfg, task)
    print_environment(environment(policy))
    prompts, answers = zip(*((len(policy.encode(e.prompt)), len(ids)) for e, ids in zip(
        task.train, solution_batch(policy, task.train).answers(), strict=True)), strict=True)
    print(f"{len(task.train)} training problems: the longest prompt takes {max(prompts)} tokens, "
          f"the longest answer {max(answers)} of --max-new-tokens {cfg.max_new_tokens}")
    fit_lengths(policy, [*task.train, *first_split(task.evals)], cfg)
    problems, k = task.train[:cfg.eval_problems], cfg.rollouts
    _, texts = answers_to(policy, policy.reference, [e.prompt for e in problems], k, cfg)
    verdicts = verify_all(task.verify, [e for e in problems for _ in range(k)], texts)
    passes = [sum(v.passed for v in verdicts[i:i + k]) for i in range(0, len(verdicts), k)]
    never, always = passes.count(0), passes.count(k)
    print(f"The base answers in the right format {mean(v.formatted for v in verdicts):.0%} of the "
          f"time. Of {len(problems)} problems, in {k} answers each, it solves {never} never, "
          f"{len(passes) - never - always} sometimes, {always} always")
    return 2 if refused and not cfg.skip_bad_rows else 0


def check_same(out: Path, cfg: Config) -> None:
    """Raise RunError unless the run in this folder was started with the same options."""
    try:
        held = json.loads((out / "config.json").read_text("utf-8"))
        same = {**held, "out": cfg.out} == asdict(cfg)
    except (OSError, ValueError, TypeError, RecursionError):
        same = False
    if not same:
        raise RunError(f"{out} holds a run with other options: give another --out, or delete it")


def check_free(out: Path, cfg: Config) -> None:
    """A new run destroys no other; a finished one of the same config comes out the same again.

    Raises RunError.
    """
    if not any((out / name).exists() for name in ("metrics.jsonl", "checkpoint", "report.json")):
        return
    check_same(out, cfg)
    if not (out / "report.json").exists():
        raise RunError(f"{out} holds this run, unfinished: go on with --resume {out}, "
                       "or give another --out")


def empty_folder(out: Path, cfg: Config) -> None:
    """The run folder before the first step."""
    (out / "report.json").unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    write_json(out / "config.json", asdict(cfg))
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_atomic(out / name, b"")


def start(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> None:
    """Measure the base unless it is known, teach it the format if it needs that, save: step 0."""
    on_rank_0(empty_folder, out, cfg)
    if not state.before:
        print("Evaluating the base ...", flush=True)
        state.before = on_rank_0(evaluate, policy, task, policy.reference, cfg)
    rate = first_split(state.before)["format"]
    if rate < cfg.format_threshold:
        print(f"Step 1: {rate:.0%} of the answers are well-formed, "
              f"below {cfg.format_threshold:.0%}: format SFT first")
        train_format(policy, task, cfg)
        now = on_rank_0(format_rate, policy, task, cfg)
        print(f"Step 1: {rate:.0%} -> {now:.0%} well-formed answers", flush=True)
    on_rank_0(save_checkpoint, out / "checkpoint", policy, state)


def format_rate(policy: Policy, task: tasks.Task, cfg: Config) -> float:
    """The share of well-formed answers of the reference."""
    problems = first_split(task.evals)[:cfg.eval_problems]
    _, texts = answers_to(policy, policy.reference, [e.prompt for e in problems], cfg.rollouts,
                          full(cfg))
    asked = [example for example in problems for _ in range(cfg.rollouts)]
    return mean(v.formatted for v in verify_all(task.verify, asked, texts))


def rewind_folder(out: Path, step: int, cfg: Config) -> None:
    """The run folder as it was after a step. Raises RunError when metrics are missing."""
    (out / "report.json").unlink(missing_ok=True)
    write_json(out / "config.json", asdict(cfg))
    for stray in out.glob("**/*.new"):  # a write that was killed
        stray.unlink()
    trim_jsonl(out / "samples.jsonl", step)
    left = trim_jsonl(out / "metrics.jsonl", step)
    if left != step:
        raise RunError(f"{out / 'metrics.jsonl'} is damaged after step {left}, and the checkpoint "
                       f"is of step {step}: start a new run with another --out")


def resume(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> None:
    """Put everything back as it was at the last checkpoint. Raises RunError."""
    if not any((out / "checkpoint").glob("*.pt")):
        print(f"{out} has no checkpoint yet: beginning again")
        start(policy, task, state, out, cfg)
        return
    load_checkpoint(out / "checkpoint", policy, state, cfg)
    if state.step > cfg.steps:
        raise RunError(f"--steps {cfg.steps} is over: step {state.step} is saved, give at least it")
    on_rank_0(rewind_folder, out, state.step, cfg)
    print(f"resuming after step {state.step}")


def run(cfg: Config, out: Path, resuming: bool, task: tasks.Task, before: dict) -> dict:
    """One whole run: base (unless its scores are given), Step 1 if needed, training, report."""
    started = time.perf_counter()
    if cfg.merge and any(Path(cfg.merge).glob("*")):
        raise RunError(f"--merge {cfg.merge} is not empty: name a new folder")
    policy = load_policy(cfg, task)
    splits = (*task.evals.values(), *([] if cfg.eval_only else [task.train]))
    fit_lengths(policy, [example for split in splits for example in split], cfg)
    optimizer = torch.optim.Adam(adapter_parameters(policy.model, "policy"), lr=cfg.lr)
    state = State(optimizer, cfg.kl_coef, before=before)
    print_environment(environment(policy))
    if cfg.eval_only:
        return only_evaluate(policy, task, out, cfg)
    (resume if resuming else start)(policy, task, state, out, cfg)
    train(policy, task, state, out, cfg)
    print("Evaluating the student ...", flush=True)
    after = on_rank_0(evaluate, policy, task, policy.student, cfg)
    on_rank_0(export_adapter, out / "adapter", policy)
    if cfg.merge:
        on_rank_0(export_merged, Path(cfg.merge), policy)
    report = {"before": state.before, "after": after,
              "verdict": judge_run(state.before, after, task.edit_metrics, cfg),
              "seconds": time.perf_counter() - started, "environment": environment(policy)}
    on_rank_0(write_json, out / "report.json", report)
    print_examples(task, state.before, after)
    print_report(report)
    return report


def only_evaluate(policy: Policy, task: tasks.Task, out: Path, cfg: Config) -> dict:
    """The scores of the model as it was given, in a table and in report.json."""
    started = time.perf_counter()
    scores = on_rank_0(evaluate, policy, task, policy.reference, cfg)
    print()
    for name, value in flat(scores).items():
        print(f"{name:36}{value:9.3f}")
    report = {"scores": scores, "seconds": time.perf_counter() - started,
              "environment": environment(policy)}
    on_rank_0(write_json, out / "config.json", asdict(cfg))
    on_rank_0(write_json, out / "report.json", report)
    return report


def os_sentence(error: OSError, out: Path) -> str:
    """What a file or folder did not allow, and what to do about it."""
    return (f"{error.filename or out}: {error.strerror or error}: "
            "mend that, or give a run folder that can be written with --out")


def failure_sentence(error: Exception, out: Path, cfg: Config) -> str:
    """What stopped a run, for the user; empty when it is nothing that a user can mend."""
    text = str(error).lower()
    if isinstance(error, (RunError, tasks.LoadError, tasks.JudgeError)):
        return str(error)
    if "no space left" in text or getattr(error, "errno", 0) == errno.EDQUOT:  # of any library
        return f"the disk is full: make room, then go on with --resume {out}; nothing saved is lost"
    if isinstance(error, OSError):
        return os_sentence(error, out)
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return (f"out of memory: lower --micro-tokens (now {cfg.micro_tokens}; --resume {out} "
                "accepts it too), then in a new run --prompts, --max-new-tokens, --rollouts and "
                "--lora-rank, or take a smaller --model")
    if world() > 1 and ("closed by peer" in text or "reset by peer" in text):
        return "another process of this run has stopped: its own message says why"
    return ""


def keep_memory() -> None:
    """Let glibc keep what is freed: fetching it anew for each large tensor is 40 % of a step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def main(cfg: Config, resuming: bool) -> int:
    """Run. Exit code 0 also for `not improved`; 2 for what a user can mend; 130 for Ctrl-C."""
    out = Path(cfg.out)
    tasks.UNSAFE_JUDGE = cfg.unsafe_judge
    keep_memory()
    try:
        join_ranks(cfg)
        if cfg.check:
            return check(cfg)
        if cfg.bench or cfg.inspect:
            (bench if cfg.bench else inspect)(cfg)
            return 0
        if not resuming and not (cfg.compare or cfg.ablations):
            on_rank_0(check_free, out, cfg)
        out.mkdir(parents=True, exist_ok=True)
        if cfg.compare or cfg.ablations:
            (compare if cfg.compare else ablate)(cfg, out)
            return 0
        report = run(cfg, out, resuming, load_task(cfg), {})
    except KeyboardInterrupt:
        began = not (cfg.bench or cfg.inspect or cfg.check) and (out / "config.json").exists()
        print("\nInterrupted. To go on: "
              + (f"python vcopd.py --resume {out}" if began else "give the same command again"))
        return 130
    except Exception as error:
        sentence = failure_sentence(error, out, cfg)
        if not sentence:
            raise
        print(one_line(sentence), file=sys.stderr)
        return 2
    if world() > 1:
        dist.destroy_process_group()
    unread = cfg.eval_only or cfg.method == "sft"  # no rollouts
    print(f"\nResults are in {out} after {report['seconds']:.0f} s. "
          + ("Compare" if unread else f"Read {out}/samples.jsonl next, or compare")
          + f": python vcopd.py --task {cfg.task} --compare")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: servers are stopped
    sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold any character
    sys.exit(plot(PLOTTED) if PLOTTED else main(CONFIG, RESUMING))
