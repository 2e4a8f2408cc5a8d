# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "tqdm==4.70.1"]
# ///
"""Verifier-Calibrated On-Policy Distillation (VC-OPD): a reference implementation in one file.

A language model learns a new skill from its own samples and forgets little: a verifier says how
good they are, and inside it a teacher moves the credit of tokens, by lambda * clip (0.1) at most.
The source is an essay by Marvin B. Freedman (2026); lines marked `differs:` depart from it.

    python vcopd.py --task codeedit  # 6 minutes on 2 cores the first time, then 2

Start reading at `train`, the first function of Part I: it repeats the essay's Steps 2 to 6.

One frozen model plays all roles; named LoRA adapters and the prompt decide. {policy} is trained.

    pi_0, the base         no adapter                                       the prompt
    pi_ref, KL anchor      {start} of a PEFT --model, {format} of Step 1    the prompt
    pi_theta, the student  {format} + {policy}                              the prompt
    T, the teacher         as pi_ref, a {specialist}, or a stronger model   the prompt and a hint
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import fmean as mean

import tasks

RunError = tasks.UserError  # something a user can mend: shown as one sentence, exit code 2


def knob(default, text, low=0, high=2**31 - 1, choices=None, heading=None):
    """A field of Config that is an option: its help, the values it accepts, a heading above it."""
    return field(default=default, metadata={"help": text, "low": low, "high": high,
                                            "choices": choices, "heading": heading})


@dataclass(frozen=True)
class Config:
    """Every choice of a run; a knob is an option. The defaults are the essay's, for one GPU."""
    task: str = knob("codeedit", f"{', '.join(tasks.TASKS)}, or FILE.py", heading="the run")
    method: str = knob("vcopd", "preset of the one loop", choices=(
        "vcopd", "rl", "opd", "sft", "rl-bare", "sft-replay"))
    model: str = knob("tiny", "tiny (built here), a Hugging Face id, a folder, or a PEFT folder")
    teacher: str = knob("self", "self (--model reads a hint), none, a better model, a PEFT folder")
    data: str = knob("", "train on the problems of this file (JSON lines)")
    eval_data: str = knob("", "evaluate on the problems of this file")
    anchors: str = knob("", "replay the prompts of this file, old skills that the model shall keep")
    benchmark: str = knob("", "general benchmark: a file in HumanEval's format")
    skip_bad_rows: bool = knob(False, "leave out rows of these files that cannot work")
    out: str = knob("", "run folder; runs/TASK-METHOD-sSEED when empty")
    seed: int = knob(0, "seed of everything that is drawn in training")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = knob("auto", "of the frozen base", choices=("auto", "float32", "bfloat16"))
    quantize: str = knob("none", "nf4: the frozen base in 4 bits (QLoRA)", choices=("none", "nf4"))
    unsafe_judge: bool = knob(False, "run answers even where the kernel cannot lock them in")
    seeds: int = knob(3, "seeds of each run of --compare and --ablations", 1)
    eval_only: bool = knob(False, "evaluate --model and train nothing", heading="other commands")
    inspect: bool = knob(False, "show token by token what a step would credit")
    ask: str = knob("", "let base, student and teacher answer this text, or the problem of this id")
    bench: bool = knob(False, "time three steps on this machine")
    compare: bool = knob(False, "train every method from one base, and print one table")
    ablations: bool = knob(False, "train VC-OPD with one choice changed at a time; one table")
    steps: int = knob(500, "training steps", 1, heading="rollouts (Step 2)")
    prompts: int = knob(16, "P, prompts in a step", 1)
    rollouts: int = knob(4, "K, answers sampled for each prompt", 1)
    temperature: float = knob(0.8, "of sampling and of every log-prob of rollouts", 0.05, 5)
    top_p: float = knob(0.95, "nucleus of sampling; 1 removes its bias", 0.01, 1)
    max_new_tokens: int = knob(512, "longest answer", 1)
    teacher_coef: float = knob(0.2, "lambda, weight of hints (Eq. 5)", heading="teacher (Step 4)")
    gap_clip: float = knob(0.5, "largest hint for one token, in nats (Eq. 3)")
    gate: str = knob("sigmoid", "hints weigh more on better answers (sigmoid), only there, more on "
                     "worse, or alike (Eq. 4)", choices=("sigmoid", "success", "failure", "none"))
    lora_rank: int = knob(32, "rank of the adapters", 1, heading="update (Step 5)")
    lora_alpha: float = knob(32.0, "the adapters are scaled by alpha / rank")
    lr: float = knob(1e-5, "learning rate (Adam, constant)")
    epochs: int = knob(2, "optimiser steps on each batch of rollouts", 1)
    ratio_clip: float = knob(0.2, "epsilon of Eq. 7")
    kl_coef: float = knob(0.01, "beta of Eq. 8 at the start; 0 is no guard", high=10)
    kl_target: float = knob(0.03, "nats per token above which beta grows (Eq. 9)")
    entropy_coef: float = knob(0.001, "eta of Eq. 11")
    max_grad_norm: float = knob(1.0, "larger gradients are scaled down to this norm; 0 is off")
    micro_tokens: int = knob(0, "tokens in one forward pass; 0: 2,048 on a CPU, 32,768 on a GPU")
    replay_share: float = knob(0.1, "r of Eq. 12", high=0.9, heading="replay (Step 6)")
    replay_every: int = knob(200, "steps between refreshes of the replay pool", 1)
    replay_keep: float = knob(0.2, "share of the replay samples that is kept", 0.01, 1)
    format_threshold: float = knob(0.8, "format rate that needs no Step 1", 0, 1, heading="Step 1")
    format_examples: int = knob(1000, "examples in the one epoch of Step 1", 1)
    format_lr: float = knob(5e-5, "learning rate of Step 1")
    format_rank: int = knob(8, "rank of the format adapter", 1)
    eval_every: int = knob(100, "steps between looks at validation", 1, heading="evaluation")
    save_every: int = knob(100, "steps between checkpoints", 1)
    eval_problems: int = knob(200, "held-out problems in each split", 2)
    kl_budget: float = knob(0.05, "largest KL to the bare base that counts as improved")
    blind: bool = False  # set by METHODS alone, as the next: do not look at the verdict
    imitate: bool = False  # learn from reference answers, not from rollouts
    tested: bool = True  # --compare leaves the test problems to the runs that it chooses
    today: str = "2026-01-01"  # what a chat template is told that writes the date


TINY = {  # the built-in model has 1 M parameters: what differs from the essay's defaults, and why
    "steps": 32, "prompts": 8, "format_examples": 512, "max_new_tokens": 96,  # minutes on 2 cores
    "eval_every": 8, "save_every": 8, "replay_every": 10,  # 100 and 200 steps would be never
    "lr": 1e-3, "format_lr": 1e-3,  # small models want larger steps: at 1e-5 nothing moves in 32
    "kl_target": 0.05,  # the essay's upper end: not to over-edit alone costs 0.015 of these nats
    "kl_coef": 0.05,  # 32 steps are too few for beta to find its level from 0.01
    "replay_keep": 0.5,  # it has 20 prompts of each old skill: with 4, coding was forgotten
    "replay_share": 0.2}  # the upper end: so small a model forgets faster


def flag(name: str) -> str:
    """A field of Config as the user types it."""
    return f"--{name.replace('_', '-')}"


def build_parser() -> argparse.ArgumentParser:
    """The command line: every knob of Config is an option."""
    parser = argparse.ArgumentParser(
        prog="vcopd.py", usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, description=__doc__.partition("\n\nStart")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = {"tiny": TINY, **{f"tiny {task}": p for task, p in tasks.PRESETS.items()}}.items()
    for option in filter(lambda option: option.metadata, fields(Config)):
        name, kind, meta = option.name, type(option.default), option.metadata
        if meta["heading"]:
            group = parser.add_argument_group(meta["heading"])
            if name == "eval_only":
                group = commands = group.add_mutually_exclusive_group()
        others = "".join(f"; {who} {values[name]}" for who, values in presets if name in values)
        shown = f" [{option.default}{others}]" if option.default or kind is int else ""
        how = {"type": kind, "choices": meta["choices"]} if kind is not bool else {}
        group.add_argument(flag(name), help=meta["help"] + shown, **how or {"action": "store_true"})
    commands.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    commands.add_argument("--plot", metavar="RUN", nargs="+", help="draw runs, or one comparison")
    return parser


if __name__ == "__main__":  # --help and mistyped options need not wait for the imports below
    PLOTTED = vars(build_parser().parse_args()).get("plot")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import constants, get_session, try_to_load_from_cache  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402

transformers.utils.logging.disable_progress_bar()  # of files; downloads keep theirs
progress = partial(tqdm, mininterval=1, disable=None, leave=False)  # where somebody is watching
COMMANDS = {"eval_only": ("method", "steps"), "inspect": (), "ask": (), "bench": (),
            "compare": ("method",), "ablations": ("method",)}  # and what they settle
LOGITS = 2**22  # in a chunk of tokens on a CPU, so that (B, T, V) never exists
LOOK = 64  # validation problems in a look
OLD = ("old", "replayed", "unreplayed", "chance")  # of references: moves before answers do
PASS_K = 4  # k of pass@k: a constant, so that runs with other --rollouts can be compared
COLUMNS = {"step": "step", "reward": "reward", "pass_rate": "passed", "eval_pass": "new",
           "eval_replayed": "old", "eval_unreplayed": "other", "kl": "kl", "entropy": "entropy",
           "kl_coef": "beta", "tied_rollouts": "tied", "teacher_share": "teacher", "nll": "nll",
           "seconds": "seconds"}  # key of metrics.jsonl, or seconds: its name in the terminal

# PART I - THE METHOD: the training loop, and below it its Steps ##############################

# Shapes: what is known of each token is (B, T), next to a mask that is True up to and including the
# first stop token. P prompts, K rollouts, B = P*K rows, T tokens, N of all where it is True, V
# vocabulary, D hidden size; b rows of a micro-batch; S rows of L tokens in one forward pass.

METHODS = {  # presets of the one loop: what is fixed here cannot be set by an option
    "vcopd": {},
    "rl": {"teacher": "none", "teacher_coef": 0.0},  # the verdict alone
    # blind distillation: A = 0, no gate, no gap clip: A_dense is the gap. KL guard and replay stay
    "opd": {"blind": True, "teacher_coef": 1.0, "gate": "none", "gap_clip": 1e9},
    # reference answers instead of rollouts: none of the Steps 2 to 6, but their loop
    "sft": {"imitate": True, "teacher": "none", "teacher_coef": 0.0, "replay_share": 0.0},
    # controls, to tell on-policy data from the guards: SFT with replay, RL without both guards
    "sft-replay": {"imitate": True, "teacher": "none", "teacher_coef": 0.0},
    "rl-bare": {"teacher": "none", "teacher_coef": 0.0, "replay_share": 0.0, "kl_coef": 0.0}}


def train(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> None:
    """Repeat Steps 2 to 6. Raises RunError, or KeyboardInterrupt behind a saved step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(state.step, cfg.steps):
        started, samples = time.perf_counter(), []
        examples = examples_at(task, step, cfg)[rank::world]  # each device has its own

        # Step 6, before the update: now and then, collect the best answers about old skills
        if cfg.replay_share > 0 and task.anchors and step % cfg.replay_every == 0:
            state.replay = refresh_replay(policy, task.anchors, step, cfg)

        if cfg.imitate:  # the SFT baseline
            info, grad_norm = sft_step(policy, policy.student, examples, state, cfg)
            metrics = over_ranks(info)
        else:
            # Step 2: sample K answers to each prompt from the current student
            prompts = [policy.encode(example.prompt) for example in examples]
            generator = seeded("rollouts", cfg.seed, world * step + rank)
            batch = rollouts(policy, policy.student, prompts, cfg.rollouts, cfg, generator)

            # Step 3: the verifier judges each answer; compare it with the others of its group
            answers = policy.decode(batch)
            verdicts = verify_all(task.verify, examples, answers)  # Eq. 1
            reward = torch.tensor([float(v.reward) for v in verdicts], device=policy.device)
            advantage = group_advantage(reward, cfg.rollouts) * (not cfg.blind)

            # Step 4: student (still pi_old), reference and teacher score these tokens once
            parts = score(policy, batch, examples, advantage, cfg)

            # Step 5: learn from verdict and hints, and replay; tighten or relax the KL guard
            info, grad_norm = update(policy, parts, state, cfg)
            metrics = over_ranks({**rollout_metrics(policy, batch, verdicts, cfg), **info})
            metrics["kl_coef"] = state.kl_coef = adapt_kl_coef(state.kl_coef, metrics["kl"], cfg)
            samples = [{"step": step + 1, "id": examples[0].id, "prompt": examples[0].prompt,
                        "answer": text, "reward": v.reward, "reason": v.reason} for text, v in
                       zip(answers[:cfg.rollouts], verdicts, strict=False)]

        # log; now and then look at validation problems, and save
        state.step, seconds = step + 1, time.perf_counter() - started
        if state.step % cfg.eval_every == 0:
            metrics |= look(policy, task, cfg)
        log_step(out, {"step": state.step, **metrics, "grad_norm": grad_norm}, samples, seconds)
        stopping = over_ranks(state.stopping)
        if stopping or state.step == cfg.steps or state.step % cfg.save_every == 0:
            save_checkpoint(out / "checkpoint", policy, state)
        if stopping and state.step < cfg.steps:
            raise KeyboardInterrupt


def update(policy: Policy, parts: list[Experience], state: State, cfg: Config) -> tuple:
    """Step 5: one optimiser step an epoch, on all micro-batches. Returns the last one's log and
    gradient norm; RunError unless that is finite. In epoch 1 the student is still pi_old."""
    total = over_ranks(sum(int(part.batch.mask.sum()) for part in parts))
    for epoch in range(cfg.epochs):
        share, replayed = imitate_replay(policy, state, epoch, cfg)
        log: Counter[str] = Counter(replayed)
        for part in parts:
            for some, terms in on_tokens(policy, policy.student, token_terms, cfg.temperature,
                                         part.batch, part.hidden_ref):  # a chunk of its tokens
                loss, info = vcopd_loss(terms, replace(part, batch=some), state.kl_coef, total, cfg)
                ((1 - share) * loss).backward()  # Eq. 12: replay has added r of its own
                log.update({name: value.item() for name, value in info.items()})
        grad_norm = optimizer_step(state.optimizer, cfg)
    return dict(log), grad_norm


@dataclass
class State:
    """What a checkpoint holds besides the adapters' weights."""
    optimizer: torch.optim.Optimizer
    kl_coef: float
    began: float = 0.0  # when the run would have begun, had it never stopped
    step: int = 0
    replay: Batch | None = None
    before: dict = field(default_factory=dict)  # scores before training, to compare with
    data: str = ""  # digest of what is learnt and evaluated
    stopping: int = 0  # how often Ctrl-C was pressed


# Roles: one frozen model, and named LoRA adapters that are switched on and off ===============

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
        """The rows of an index (n,) on the CPU, cut to their longest completion."""
        longest = int(self.mask[index].sum(1).max())
        return Batch([self.contexts[i] for i in index.tolist()],
                     self.completion[index, :longest], self.mask[index, :longest])


Role = tuple[str, ...]  # the adapters that are switched on
BASE: Role = ()  # pi_0: none at all


@dataclass
class Policy:
    """The frozen model and, for each role, the names of its adapters; "policy" alone is trained."""
    model: nn.Module
    tokenizer: object
    stop_ids: Tensor
    pad_id: int
    pack: int = 1024  # tokens in a row of several answers: in longer ones attention costs more
    memory: float = math.inf  # bytes that keys and values, or activations, may take
    positions: float = math.inf  # tokens in the longest row that it reads
    micro_tokens: int = 2048  # of one forward pass; more on a GPU, else it waits for launches
    today: str = Config.today
    reference: Role = BASE  # pi_ref and the self teacher. differs: after Step 1
    specialist: Role = BASE  # the adapter of the teacher, if it has one of its own
    stronger: Policy | None = None  # the teacher, if it is another model
    cache_bytes: float = 0.0  # of keys and values for one token; measured by self_check

    @property
    def teacher(self) -> tuple[Policy, Role]:
        """The model and the adapters of T: itself, unless another one was named."""
        return (self.stronger, BASE) if self.stronger else (self, self.specialist or self.reference)

    @property
    def student(self) -> Role:
        """The adapters of pi_theta."""
        return (*self.reference, "policy")

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.stop_ids.device

    def encode(self, prompt: str) -> list[int]:
        """A user message in the model's chat template as ids, with exactly one BOS token."""
        if (tokenizer := self.tokenizer).chat_template is None:
            ids = tokenizer(f"{prompt}\n", add_special_tokens=False,
                            split_special_tokens=True).input_ids
        else:
            day = date.fromisoformat(self.today).strftime  # else prompts change from day to day
            template = re.sub(r"strftime_now\(['\"](.*?)['\"]\)",
                              lambda found: repr(day(found[1])), tokenizer.get_chat_template())
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], chat_template=template, return_dict=False,
                sanitize_control_tokens=True,  # a special token's name in a prompt is plain text
                add_generation_prompt=True, enable_thinking=False)  # Qwen3: the answer at once
        own = tokenizer("").input_ids[:1]  # it begins with that, as some templates do already
        return own + ids if own == [tokenizer.bos_token_id] and ids[:1] != own else ids

    def decode(self, batch: Batch) -> list[str]:
        """Completions as text, as written but for the stop token at the end."""
        stops = set(self.stop_ids.tolist())
        rows = [ids[:-1] if ids[-1] in stops else ids for ids in batch.answers()]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def adapters(names: Role):
    """Switch on exactly these adapters inside the block; nests, and survives exceptions."""
    before, LoRALinear.active, LoRALinear.casts = LoRALinear.active, names, {}
    try:
        yield
    finally:
        LoRALinear.active, LoRALinear.casts = before, {}


# Step 2 - rollouts: y_1 .. y_K ~ pi_theta(.|x) ===============================================

@torch.no_grad()
def sample(policy: Policy, role: Role, prompts: list[list[int]], k: int, cfg: Config,
           generator: torch.Generator) -> Batch:
    """K completions of each prompt, prompt-major: rows i*K .. i*K+K-1 answer prompt i."""
    completion = torch.full((len(prompts) * k, cfg.max_new_tokens), policy.pad_id,
                            device=policy.device)  # (B, T)
    alive = torch.arange(len(completion), device=policy.device)  # rows still in the cache
    going = torch.ones_like(alive, dtype=torch.bool)  # those of them that have not stopped
    ids, seen = (t.to(policy.device) for t in pad(prompts, policy.pad_id, left=True))
    with adapters(role):
        hidden, cache = read_tokens(policy, ids, seen)  # each prompt is read once
        cache.batch_repeat_interleave(k)
        hidden, seen = hidden.repeat_interleave(k, 0), seen.repeat_interleave(k, 0)
        for t in range(cfg.max_new_tokens):
            token = draw(head(policy.model, hidden), cfg.temperature, cfg.top_p, generator)
            completion[alive, t] = token
            going &= ~torch.isin(token, policy.stop_ids)
            if t + 1 == cfg.max_new_tokens or not going.any():
                break
            if going.sum() <= 0.9 * len(going):  # not at each stop: this copies the cache
                cache.batch_select_indices(going.nonzero()[:, 0])
                alive, token, seen, going = (rows[going] for rows in (alive, token, seen, going))
            seen = F.pad(seen, (0, 1), value=True)
            hidden, cache = read_tokens(policy, token[:, None], seen, cache)
    contexts = [prompt for prompt in prompts for _ in range(k)]
    return Batch(contexts, completion, stop_mask(completion, policy.stop_ids))


# Step 3 - verdict: the advantage of each rollout within its group ============================

def verify_all(verify, examples: list[tasks.Example], answers: list[str]) -> list[tasks.Verdict]:
    """Judge K answers to each example, several at a time: verifiers wait for other processes."""
    repeated = [e for e in examples for _ in range(len(answers) // max(1, len(examples)))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(verify, repeated, answers))


def group_advantage(reward: Tensor, k: int) -> Tensor:
    """Rewards (B,), prompt-major, compared in each group of K (GRPO, arXiv:2402.03300): (B,)."""
    group = reward.view(-1, k)  # (P, K)
    std, mean = torch.std_mean(group, 1, correction=0, keepdim=True)
    tied = group.amax(1, keepdim=True) == group.amin(1, keepdim=True)
    advantage = (group - mean) / (std + 1e-4)  # Eq. 2
    return advantage.masked_fill(tied, 0.0).view(-1)  # differs: float noise is no signal


# Step 4 - hints: the teacher's gap, clipped, gated by the verdict ============================

@dataclass
class Experience:
    """A micro-batch of rollouts: all that the loss needs to know of them, without gradients."""
    batch: Batch
    index: Tensor  # (b,) row numbers in the whole batch
    hidden_ref: Tensor  # (N, D) of pi_ref: its logits would be V / D times larger
    advantage: Tensor  # (b,)
    logp_old: Tensor  # (b, T)
    gap: Tensor  # (b, T)
    logp_teacher: Tensor | None = None  # (b, T); logp_old, a gap of 0, where nobody hints


@torch.no_grad()
def score(policy: Policy, batch: Batch, examples: list[tasks.Example], advantage: Tensor,
          cfg: Config) -> list[Experience]:
    """Log-probs under pi_old and T, hidden states of pi_ref and the gap, for each micro-batch.
    P `examples`, `advantage` (B,). The teacher reads the hint before the same ids."""
    parts, k = [], len(advantage) // len(examples)
    for index, some in micro_batches(policy, batch):
        hidden_ref = completion_hidden(policy, policy.reference, some)
        logp_teacher = logp_old = log_probs(policy, policy.student, some, cfg.temperature)
        if has_teacher(cfg):
            teacher, role = policy.teacher
            hinted = [teacher.encode(tasks.privileged_prompt(examples[i // k])) for i in index]
            logp_teacher = log_probs(teacher, role, replace(some, contexts=hinted), cfg.temperature)
        parts.append(Experience(some, index, hidden_ref, advantage[index], logp_old, teacher_gap(
            logp_teacher, logp_old, cfg.gap_clip), logp_teacher))
    return parts


def has_teacher(cfg: Config) -> bool:
    """Does anybody hint at tokens?"""
    return cfg.teacher != "none" and cfg.teacher_coef > 0


@torch.no_grad()
def log_probs(policy: Policy, role: Role, batch: Batch, temperature: float) -> Tensor:
    """log pi(a_t|s_t) of the batch's tokens under a role: (B, T), 0 outside the mask."""
    return sum(logp for _, logp in on_tokens(policy, role, token_logps, temperature, batch))


def completion_hidden(policy: Policy, role: Role, batch: Batch) -> Tensor:
    """The hidden states that predict the N unmasked completion tokens under a role: (N, D)."""
    ids, positions, mask, predictors = one_row_per_prompt(policy, batch)
    with adapters(role):
        hidden = policy.model.base_model(ids, attention_mask=mask, position_ids=positions,
                                         use_cache=False).last_hidden_state  # (S, L, D)
    return hidden.flatten(0, 1).index_select(0, predictors)


def token_logps(model: nn.Module, temperature: float, ids: Tensor, hidden: Tensor) -> Tensor:
    """log pi(a_t|s_t) at the sampling temperature, in float32: ids (N,), hidden (N, D) -> (N,)."""
    logits = head(model, hidden) / temperature  # differs: tempered in every role
    return F.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]


def teacher_gap(logp_teacher: Tensor, logp_old: Tensor, clip: float) -> Tensor:
    """How much more the teacher likes each sampled token, clipped: (B, T). Carries no gradient."""
    return (logp_teacher - logp_old).clamp(-clip, clip).detach()  # Eq. 3, as in arXiv:2601.18734


GATES = {  # advantage (B,) -> gate (B,). A new one needs its name in the choices of Config.gate
    "sigmoid": torch.sigmoid,  # Eq. 4
    "success": lambda advantage: (advantage > 0).float(),  # where better than the group (SDPG)
    "failure": lambda advantage: torch.sigmoid(-advantage),  # mostly where worse (SRPO)
    "none": torch.ones_like}


def dense_advantage(advantage: Tensor, gap: Tensor, cfg: Config) -> Tensor:
    """The advantage of each answer (B,) and the hints at its tokens (B, T), in one (B, T). Not
    normalised again: in a tied group that would blow small hints up to the size of a verdict."""
    gate = GATES[cfg.gate](advantage)[:, None]
    return advantage[:, None] + cfg.teacher_coef * gate * gap  # Eq. 5


# Step 5 - update: clipped policy loss, exact KL, entropy =====================================

def token_terms(model: nn.Module, temperature: float, ids: Tensor, hidden: Tensor,
                hidden_ref: Tensor) -> Tensor:
    """Stacked (3, N): log pi_theta(a_t|s_t), KL(pi_theta || pi_ref) and entropy, exact over V."""
    logp = F.log_softmax(head(model, hidden) / temperature, -1)  # (N, V), tempered too
    logp_ref = F.log_softmax(head(model, hidden_ref) / temperature, -1)
    kl = (logp.exp() * (logp - logp_ref)).sum(-1)  # that of Eq. 8
    entropy = -(logp.exp() * logp).sum(-1)  # Eq. 10
    return torch.stack([logp.gather(-1, ids[:, None])[:, 0], kl, entropy])


def vcopd_loss(terms: Tensor, part: Experience, kl_coef: float, tokens: int, cfg: Config) -> tuple:
    """The loss of the tokens in batch.mask and what to log, from `terms` (3, b, T) of `token_terms`
    and of `part` advantage (b,), logp_old and gap (b, T). `tokens` counts those of the whole step.
    In the first epoch rho is 1. The *value* of the policy term is then minus the mean of A_dense:
    near 0, as verdicts are centred. Its gradient, -mean(A_dense grad log pi), is not."""
    logp, kl, entropy = terms
    mask, eps = part.batch.mask, cfg.ratio_clip
    assert logp.shape == mask.shape == part.logp_old.shape == part.gap.shape
    dense = dense_advantage(part.advantage, part.gap, cfg)  # (b, T)
    log_ratio = (logp - part.logp_old).clamp(-20, 20)  # else exp overflows, and 0 * inf is NaN
    ratio = log_ratio.exp()  # Eq. 6
    objective = torch.minimum(ratio * dense, ratio.clamp(1 - eps, 1 + eps) * dense)
    policy_loss = -token_mean(objective, mask, tokens)  # Eq. 7 (PPO, arXiv:1707.06347)
    kl_mean = token_mean(kl, mask, tokens)
    kl_loss = kl_coef * kl_mean  # Eq. 8
    entropy_mean = token_mean(entropy, mask, tokens)
    loss = policy_loss + kl_loss - cfg.entropy_coef * entropy_mean  # Eq. 11
    hint = (dense - part.advantage[:, None]).abs()
    teacher_share = hint / (hint + part.advantage.abs()[:, None]).clamp(min=1e-12)
    return loss, {"policy_loss": policy_loss, "kl": kl_mean, "entropy": entropy_mean,
                  "ratio_clipped": token_mean((objective < ratio * dense).float(), mask, tokens),
                  "teacher_share": token_mean(teacher_share, mask, tokens),
                  "gap": token_mean(part.gap.abs(), mask, tokens)}


def token_mean(values: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """Sum over tokens / their count in all micro-batches and ranks, so that results add up."""
    return torch.where(mask, values, 0).sum() / tokens


def adapt_kl_coef(kl_coef: float, kl: float, cfg: Config) -> float:
    """Tighten the guard when the policy strays, relax it otherwise; 0 stays 0, switched off.
    The rule is stationary when KL is above the target in 22 % of steps (1.2^.22 * .95^.78 = 1)."""
    adapted = kl_coef * (1.2 if kl > cfg.kl_target else 0.95)  # Eq. 9
    return min(max(adapted, 1e-4), 10.0) if kl_coef else 0.0


# Step 6 - replay: old skills, in the current student's own words =============================

@torch.no_grad()
def refresh_replay(policy: Policy, anchors: list[tasks.Example], step: int, cfg: Config) -> Batch:
    """The student's answers to anchor prompts, right or not: the best `replay_keep` of each skill
    by verifier score, and among equals by self-confidence (mean log-prob of a token)."""
    prompts = [policy.encode(example.prompt) for example in anchors]
    batch = rollouts(policy, policy.student, prompts, 1, cfg, seeded("replay", cfg.seed, step))
    verdicts = verify_all(tasks.verify_skill, anchors, policy.decode(batch))
    confidence = torch.zeros(len(anchors))
    for index, some in micro_batches(policy, batch):
        logp = log_probs(policy, policy.student, some, cfg.temperature)  # (b, T)
        confidence[index] = (logp.sum(1) / some.mask.sum(1)).cpu()
    by_skill: dict[str, list[int]] = {}  # else the easiest skills would fill the pool
    for i in sorted(range(len(anchors)), key=lambda i: (verdicts[i].reward, confidence[i].item())):
        by_skill.setdefault(anchors[i].skill, []).append(i)
    kept = [i for rows in by_skill.values() for i in rows[-math.ceil(cfg.replay_keep * len(rows)):]]
    return batch.rows(torch.tensor(kept))


# PART II - THE MACHINERY: padding, randomness without a state, and all that comes below them ##

def pad(rows: list[list[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Lists of ids as one (B, L) tensor, and the (B, L) mask of what is not padding."""
    pad_sequence, side = nn.utils.rnn.pad_sequence, "left" if left else "right"
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side).bool()
    return pad_sequence(ids, True, value, side), mask


def stop_mask(completion: Tensor, stop_ids: Tensor) -> Tensor:
    """True up to and including the first stop token of each row: (B, T) -> (B, T)."""
    stops = torch.isin(completion, stop_ids).long()  # pad may be eos too: its first is learnt
    return stops.cumsum(1) - stops == 0


def seeded(*name) -> torch.Generator:
    """A generator that depends on its name alone: no state to save, none to be disturbed."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# LoRA: named low-rank updates of every linear layer ==========================================

class LoRALinear(nn.Module):
    """A frozen linear layer with named low-rank updates: y = W x + (alpha / r) B A x.
    Hu et al. 2021, arXiv:2106.09685. Held in float32, applied in the dtype of x, as by autocast."""
    active: Role = BASE  # the names that are switched on, in all layers at once
    casts: dict = {}  # those of an `adapters` block without gradients, else made at each token

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.train(hasattr(base.weight, "quant_state"))  # 4 bits: else no CPU gradient
        self.shape = (base.nf, base.nx) if hasattr(base, "nf") else (base.out_features,
                                                                     base.in_features)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}

    def put(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Hold a frozen adapter: A (r, in), B (out, r), and what their product is multiplied by."""
        device, self.scale[name] = self.base.weight.device, scale
        self.lora_A[name] = nn.Parameter(a.to(device), requires_grad=False)
        self.lora_B[name] = nn.Parameter(b.to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y, known = self.base(x), {} if torch.is_grad_enabled() else self.casts
        for name in self.active:
            if (self, name) not in known:
                known[self, name] = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
            a, b = known[self, name]
            y = y.add(F.linear(F.linear(x, a), b), alpha=self.scale[name])
        return y


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every wrapped layer by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def wrap_linears(model: nn.Module) -> None:
    """Freeze the model, wrap each linear layer of attention and MLP, keep a float32 head."""
    model.requires_grad_(False)
    model.float_head = model.get_output_embeddings().weight.detach().float()  # else at each token
    for name, layer in list(model.base_model.named_modules()):
        if isinstance(layer, nn.Linear | transformers.Conv1D):
            model.base_model.set_submodule(name, LoRALinear(layer))


def add_adapter(model: nn.Module, name: str, rank: int, alpha: float, seed: int) -> None:
    """A new adapter of every wrapped layer: A Kaiming uniform, B zero, so it changes nothing."""
    generator = seeded("adapter", name, seed)
    for layer in lora_layers(model).values():
        (rows, columns), bound = layer.shape, 1 / math.sqrt(layer.shape[1])
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        layer.put(name, a, torch.zeros(rows, rank), alpha / rank)


def adapter_optimizer(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """Adam for the A and B of one adapter, which from now on have gradients."""
    return torch.optim.Adam([weights[name].requires_grad_() for layer in lora_layers(model).values()
                             for weights in (layer.lora_A, layer.lora_B)], lr=lr)


# Reading, drawing and scoring tokens; imitation, the optimiser's step and what is reported ====

def rollouts(policy: Policy, role: Role, prompts: list[list[int]], k: int, cfg: Config,
             generator: torch.Generator) -> Batch:
    """`sample`, as many prompts at a time as have room; half as many whenever memory runs out.
    RunError if a prompt leaves no room for --max-new-tokens in the model's positions."""
    most, rows = max(map(len, prompts), default=0) + cfg.max_new_tokens, []
    if most > policy.positions:
        raise RunError(f"{most} tokens, the model reads {policy.positions}: lower --max-new-tokens")
    size = int(min(len(prompts), policy.memory / max(1.0, policy.cache_bytes * most * k)))
    while len(rows) < len(prompts) * k:
        try:
            some = prompts[len(rows) // k:][:max(1, size)]
            rows += sample(policy, role, some, k, cfg, generator).answers()
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
            size = len(some) // 2
            print(f"Out of memory: from here {size} prompts are sampled at a time", flush=True)
    completion, mask = (t.to(policy.device) for t in pad(rows, policy.pad_id))
    return Batch([prompt for prompt in prompts for _ in range(k)], completion, mask)


def read_tokens(policy: Policy, ids: Tensor, seen: Tensor, cache=None) -> tuple:
    """Last hidden state (B, D) of ids (B, L), and cache. `seen`, of both, is False on padding."""
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    out = policy.model.base_model(ids, attention_mask=seen.long(), position_ids=positions,
                                  past_key_values=cache, use_cache=True)
    return out.last_hidden_state[:, -1], out.past_key_values


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token of the nucleus (arXiv:1904.09751) for each row: (B, V) -> (B,). At 0 greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = full = F.softmax(logits / temperature, -1)
    order = torch.arange(full.shape[-1], device=full.device).expand_as(full)
    if top_p < 1:
        probs, order = full.topk(min(256, full.shape[-1]))  # as a rule they hold the nucleus
        if (probs.sum(-1) < top_p).any():
            probs, order = full.sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    reached = probs.cumsum(-1)
    uniform = torch.rand(len(probs), 1, generator=generator).to(probs.device)
    choice = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    last = (reached < reached[:, -1:]).sum(-1, keepdim=True)  # rounding must not lead beyond it
    return order.gather(-1, torch.minimum(choice, last))[:, 0]


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden (..., D) -> float32 logits (..., V), scaled (Cohere, Granite) or capped (Gemma)."""
    out, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = (getattr(config, "logit_scale", 0) or 1) / (getattr(config, "logits_scaling", 0) or 1)
    weight = getattr(model, "float_head", out.weight).float()  # logits in bfloat16 are off by 0.06
    before = torch.get_float32_matmul_precision()
    try:
        if hidden.dtype == out.weight.dtype == torch.bfloat16:  # faster: no number has more bits
            torch.set_float32_matmul_precision("medium")
        logits = F.linear(hidden.float(), weight, None if out.bias is None else out.bias.float())
    finally:
        torch.set_float32_matmul_precision(before)
    logits = logits if scale == 1 else scale * logits
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


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


def one_row_per_prompt(policy: Policy, batch: Batch) -> tuple[Tensor | None, ...]:
    """Ids (S, L), positions (S, L), attention mask, and the N places (in S * L) that predict."""
    answers, rows = batch.answers(), []
    for pack in packs(batch, policy.pack):
        ids = list(batch.contexts[pack[0]])
        start = len(ids)
        positions, owners, predictors = list(range(start)), [0] * start, []  # owner 0: the prompt
        for i in pack:
            size = len(answers[i]) - 1  # no answer's last token has to be read
            predictors += [start - 1, *range(len(ids), len(ids) + size)]
            positions += range(start, start + size)
            owners += [i + 1] * size
            ids += answers[i][:-1]
        rows.append((ids, positions, owners, predictors))
    ids, positions, owners = (pad([row[column] for row in rows], value)[0].to(policy.device)
                              for column, value in ((0, policy.pad_id), (1, -1), (2, -1)))
    running = torch.arange(ids.shape[1], device=policy.device)  # a restart would look like packing
    positions = torch.where(positions < 0, running, positions)
    places = [i * ids.shape[1] + place for i, row in enumerate(rows) for place in row[3]]
    mask = None  # a causal model's own: padding stands on the right, so no token sees it
    if len(rows) < len(answers):  # an answer sees the prompt and itself: (S, 1, L, L)
        seen = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)
        mask = torch.zeros(seen.shape, dtype=policy.model.dtype, device=policy.device)
        mask = mask.masked_fill(~seen.tril(), torch.finfo(mask.dtype).min)[:, None]
    return ids, positions, mask, torch.tensor(places, device=policy.device)


def micro_batches(policy: Policy, batch: Batch) -> list[tuple[Tensor, Batch]]:
    """Row numbers and rows, alike in length: about `micro_tokens` each, with padding."""
    most, lengths = policy.micro_tokens, batch.mask.sum(1).tolist()
    sized = [(len(batch.contexts[pack[0]]) + sum(lengths[i] for i in pack), pack)
             for pack in packs(batch, min(policy.pack, most))]
    found = [[]]
    for size, pack in sorted(sized, key=lambda pair: pair[0]):
        if found[-1] and (len(found[-1]) + 1) * size > most:
            found.append([])
        found[-1].append(pack)
    return [(i, batch.rows(i)) for i in (torch.tensor(sum(members, [])) for members in found)]


def on_tokens(policy: Policy, role: Role, terms, temperature: float, batch: Batch, *others: Tensor):
    """One forward pass, then the N tokens in chunks, as logits of all would not fit. Yields a batch
    whose mask is one chunk, and its `terms(model, temperature, ids, hidden, *others)`, (..., B, T),
    0 elsewhere. Call backward() on each: the model's own backward pass follows behind the last."""
    hidden = completion_hidden(policy, role, batch)  # (N, D)
    size = max(1, LOGITS * (1 if policy.device.type == "cpu" else 32) // len(policy.tokenizer))
    order = batch.mask.flatten().cumsum(0).view_as(batch.mask) - 1  # of each among the N
    cut = hidden.detach().requires_grad_() if hidden.grad_fn and len(hidden) > size else hidden
    for i, some in enumerate(zip(*(t.split(size) for t in (cut, *others)), strict=True)):
        mask = batch.mask & (order // size == i)
        flat = terms(policy.model, temperature, batch.completion[mask], *some)  # (..., n)
        out = flat.new_zeros(*flat.shape[:-1], *mask.shape)
        yield replace(batch, mask=mask), out.masked_scatter(mask.expand_as(out), flat)
    if cut is not hidden:  # where the gradients of all chunks have met
        torch.autograd.backward(hidden, cut.grad)


def solution_batch(policy: Policy, examples: list[tasks.Example]) -> Batch:
    """Reference answers, each ending in the stop token, as a batch to imitate."""
    stop = int(policy.stop_ids[0])
    rows = [[*policy.tokenizer(e.demonstration or e.reference, add_special_tokens=False,
                               split_special_tokens=True).input_ids, stop] for e in examples]
    completion, mask = (t.to(policy.device) for t in pad(rows, policy.pad_id))
    return Batch([policy.encode(e.prompt) for e in examples], completion, mask)


def imitate(policy: Policy, role: Role, batch: Batch, temperature: float = 1.0,
            share: float = 1.0) -> float:
    """Add up the gradients of a share of the batch's negative log-likelihood; returns the NLL."""
    value, tokens = 0.0, over_ranks(int(batch.mask.sum()))
    for _, part in micro_batches(policy, batch):
        for some, logp in on_tokens(policy, role, token_logps, temperature, part):
            nll = -token_mean(logp, some.mask, tokens)  # differs: no PPO ratio, pi_old is long gone
            (share * nll).backward()
            value += nll.item()
    return value


def sft_step(policy: Policy, role: Role, examples: list, state: State, cfg: Config) -> tuple:
    """`epochs` optimiser steps towards the demonstrations; returns what `update` does."""
    batch = solution_batch(policy, examples)
    for epoch in range(cfg.epochs):
        share, info = imitate_replay(policy, state, epoch, cfg)
        info["nll"] = imitate(policy, role, batch, 1.0, 1 - share)
        grad_norm = optimizer_step(state.optimizer, cfg)
    return {**info, "tokens": int(batch.mask.sum())}, grad_norm


def train_format(policy: Policy, task: tasks.Task, cfg: Config) -> None:
    """Step 1: one low-rate epoch of SFT on an adapter that is then frozen, part of pi_ref."""
    add_adapter(policy.model, "format", cfg.format_rank, cfg.format_rank, cfg.seed)
    policy.reference = (*policy.reference, "format")
    state = State(adapter_optimizer(policy.model, "format", cfg.format_lr), 0.0)
    count = min(cfg.format_examples, len(task.train))
    order = torch.randperm(count, generator=seeded("format", cfg.seed))
    for some in progress(order.split(cfg.prompts), "Step 1: format"):
        examples = [task.train[i] for i in some.tolist()]
        sft_step(policy, policy.reference, examples, state, replace(cfg, epochs=1))
    for parameter in state.optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(False)


def imitate_replay(policy: Policy, state: State, epoch: int, cfg: Config) -> tuple[float, dict]:
    """Add up r times the gradient of replayed rows, which are r of all; r, or 0, and their NLL."""
    if state.replay is None:
        return 0.0, {}
    count = round(cfg.prompts * cfg.rollouts * cfg.replay_share / (1 - cfg.replay_share))
    drawn = state.replay.rows(torch.randint(len(state.replay.contexts), (max(1, count),),
                                            generator=seeded("mix", cfg.seed, state.step, epoch)))
    loss = imitate(policy, policy.student, drawn, cfg.temperature, cfg.replay_share)
    return cfg.replay_share, {"replay_loss": loss}


def optimizer_step(optimizer: torch.optim.Optimizer, cfg: Config) -> float:
    """Clip the gradient and take the step; its norm before that. RunError unless it is finite."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters if dist.is_initialized() else ():
        dist.all_reduce(parameter.grad)
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(norm):
        raise RunError(f"the gradient is {norm}: start anew with a lower learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def rollout_metrics(policy: Policy, batch: Batch, verdicts: list, cfg: Config) -> dict:
    """What this device adds to the step's shares of answers, and to its counts."""
    count, k = cfg.prompts * cfg.rollouts, cfg.rollouts
    groups = [{v.reward for v in verdicts[i:i + k]} for i in range(0, len(verdicts), k)]
    stopped = (torch.isin(batch.completion, policy.stop_ids) & batch.mask).any(1)
    return {"reward": sum(v.reward for v in verdicts) / count,
            "pass_rate": sum(v.passed for v in verdicts) / count,
            "format_rate": sum(v.formatted for v in verdicts) / count,
            "truncated": int((~stopped).sum()) / count, "tokens": int(batch.mask.sum()),
            "tied_rollouts": sum(len(group) == 1 for group in groups) / cfg.prompts,
            "reasons": Counter(v.reason.split(":")[0].rstrip(" 0123456789") for v in verdicts)}


# Several devices: torchrun --nproc_per_node N vcopd.py ...; from the command line to a Config =
# Each rank samples its share of the prompts; gradients and metrics are summed; rank 0 writes.

def over_ranks(value):
    """The sum over ranks of a number, or of dicts, key by key."""
    if not dist.is_initialized():
        return value
    boxes: list = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return sum(boxes) if not isinstance(value, dict) else {
        key: sum((box[key] for box in boxes[1:]), boxes[0][key]) for key in value}


def join_ranks(cfg: Config) -> None:
    """Meet the other processes, if torchrun started this one. Raises RunError."""
    if not dist.is_torchelastic_launched():
        return
    rank, world, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cfg.prompts % world or ":" in cfg.device or cuda and local >= torch.cuda.device_count():
        raise RunError(f"--prompts {cfg.prompts} must be a multiple of torchrun's {world} ranks, "
                       "--device cuda or cpu, and with cuda each needs a GPU")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")


def read_config(arguments: list[str]) -> Config:
    """Defaults, then the presets of model, task and method, or an old run's; then what was said."""
    parser = build_parser()
    said = vars(parser.parse_args(arguments))
    for option in (f for f in fields(Config) if f.name in said):
        low, value, high = option.metadata["low"], said[option.name], option.metadata["high"]
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"{flag(option.name)} is {value}: give a number from {low} to {high}")
    if "" in said.values():  # an unset variable of the shell
        parser.error("an option has an empty value: leave it out")
    if out := said.pop("resume", ""):
        try:
            held = json.loads(Path(out, "config.json").read_text("utf-8"))
            return Config(**held | said | {"out": out})
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            parser.error(f"--resume {out} is no run of this version ({error!r}): give its --out")
    cfg = Config(**said)
    tiny, method = TINY | tasks.PRESETS.get(cfg.task, {}), METHODS[cfg.method]
    cfg = Config(**{**(tiny if cfg.model == "tiny" else {}), **method, **said})
    command = next((name for name in COMMANDS if getattr(cfg, name)), "")
    fixed = {**dict.fromkeys(method, f"--method {cfg.method}"),
             **dict.fromkeys(COMMANDS.get(command, ()), flag(command))}
    for name in said.keys() & fixed.keys():
        parser.error(f"{flag(name)} contradicts {fixed[name]}: leave one out")
    if command and dist.is_torchelastic_launched():
        parser.error(f"torchrun trains one model: start {flag(command)} with python")
    if not has_teacher(cfg) and (cfg.blind or cfg.inspect or cfg.compare or cfg.ablations):
        parser.error("--method opd, --inspect, --compare and --ablations need a teacher: name one")
    if cfg.rollouts < 2 and (cfg.compare or cfg.ablations or not (cfg.imitate or has_teacher(cfg))):
        parser.error("--rollouts 1 leaves no other answer to compare with: give at least 2")
    kind = command.removesuffix("_only") or f"{cfg.method}-s{cfg.seed}"
    return replace(cfg, out=cfg.out or f"runs/{Path(cfg.task).stem}-{kind}")


# PART III - RUNNING IT: the built-in model, real ones, evaluation, run folder, commands ########

RECIPE = {"vocab": 768, "documents": 12000, "steps": 700, "batch_tokens": 3200, "lr": 3e-3,
          "seed": 1}
SHAPE = {"hidden_size": 128, "intermediate_size": 341, "num_hidden_layers": 4,
         "num_attention_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
         "initializer_range": 0.06}  # 0.02 is for wide models: here copying emerges later
SHORTER = {"arithmetic": {"steps": 600}}  # sums are short
CHAT = "{% for m in messages %}<|user|>{{ m.content }}<|end|><|assistant|>{% endfor %}"


def build_tiny(task: tasks.Task) -> str:
    """The folder of the built-in model in the cache. The first call builds it. Raises RunError."""
    recipe, rng = {**RECIPE, **SHORTER.get(task.name, {})}, random.Random(RECIPE["seed"])
    documents = [tasks.web_document(task, rng) for _ in range(500)]  # tell one corpus from another
    digest = hashlib.sha256(json.dumps([recipe, SHAPE, CHAT, documents]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "vcopd")
    folder = cache / f"tiny-{task.name.partition('-')[0]}-{digest}"  # knobs may share a base
    if folder.exists():
        return str(folder)
    print(f"Building the model tiny for {task.name}: a few minutes, once.", flush=True)
    with tasks.reading(cache, "tiny is kept there: name another folder in XDG_CACHE_HOME"):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as aside:
            documents += [tasks.web_document(task, rng) for _ in range(500, recipe["documents"])]
            policy = pretrain(documents, recipe)
            policy.model.save_pretrained(aside)
            policy.tokenizer.save_pretrained(aside)
            if not folder.exists():  # else another process was first
                os.rename(aside, folder)  # at the end: an interrupted build leaves no model
    return str(folder)


def train_tokenizer(texts: list[str], vocab: int):
    """A byte-level BPE, digits apart: any text can be written, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=byte_level.alphabet(), show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT)


def pretrain(documents: list[tuple[str, str]], recipe: dict) -> Policy:
    """A small Llama, trained on the answers only: at this size, else copying never emerges."""
    tokenizer = train_tokenizer([text for pair in documents for text in pair], recipe["vocab"])
    end, rng = tokenizer.eos_token_id, random.Random(recipe["seed"])
    torch.manual_seed(recipe["seed"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SHAPE, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=end))
    policy = Policy(model, tokenizer, torch.tensor([end]), end, micro_tokens=1024)
    corpus = solution_batch(policy, [tasks.Example("", *pair, "") for pair in documents])
    tokens = sum(map(len, corpus.contexts)) + int(corpus.mask.sum())
    size = recipe["batch_tokens"] * len(documents) // tokens  # rows of a batch
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in progress(range(recipe["steps"]), "building tiny"):
        schedule = min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 - step / recipe["steps"]))
        optimizer.param_groups[0]["lr"] = recipe["lr"] * schedule
        batch = corpus.rows(torch.tensor(rng.choices(range(len(documents)), k=size)))
        imitate(policy, BASE, batch)
        optimizer_step(optimizer, Config())
    return policy


# Real models: any causal LM, as student or as teacher, and adapters in PEFT's format =========

def load_policy(cfg: Config, task: tasks.Task | None) -> Policy:
    """A causal LM in all its roles, with a fresh policy adapter. Raises RunError."""
    name = build_tiny(task) if cfg.model == "tiny" else cfg.model
    policy = load_frozen((base := adapter_base(name)) or name, cfg)
    add_adapter(policy.model, "policy", cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    if base and (cfg.inspect or cfg.ask):  # it is the student, and the teacher has none
        load_adapter(policy.model, "policy", Path(name))
    elif base:  # frozen like the format adapter: the reference is the model as given
        policy.reference = load_adapter(policy.model, "start", Path(name))
    if has_teacher(cfg) and (other := adapter_base(cfg.teacher)):
        policy.specialist = load_adapter(policy.model, "specialist", Path(cfg.teacher))
        if other != (base or name):
            print(f"Mind that --teacher {cfg.teacher} was trained on {other}, not {base or name}")
    elif has_teacher(cfg) and cfg.teacher != "self":
        policy.stronger = load_frozen(cfg.teacher, cfg)
        rows, most = (len(p.model.get_input_embeddings().weight) for p in (policy, policy.stronger))
        if rows > most or policy.tokenizer.get_vocab() != policy.stronger.tokenizer.get_vocab():
            raise RunError(f"--teacher {cfg.teacher} must know every token by the student's id")
    return policy


def load_frozen(name: str, cfg: Config) -> Policy:
    """A causal LM and its tokenizer: frozen, wrapped in LoRA and checked. Raises RunError."""
    with tasks.reading(name, "delete it, and it is built again" if "/vcopd/tiny-" in name else
                       f"give a folder or hub id in reach that works on --device {cfg.device}"):
        fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.empty(0, device=fastest if cfg.device == "auto" else cfg.device).device
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = ("bfloat16" if bf16 else "float32") if cfg.dtype == "auto" else cfg.dtype
        four_bits = {} if cfg.quantize == "none" else {  # Dettmers et al. 2023, arXiv:2305.14314
            "device_map": device, "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)}
        if not Path(name).exists() and try_to_load_from_cache(name, "config.json") is None:
            get_session().head(constants.ENDPOINT, timeout=9)  # offline: else a minute of retries
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True,
            **four_bits)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if info["missing_keys"]:
            raise ValueError(f"it holds no weights for {min(info['missing_keys'])}")
        wrap_linears(model.to(device).eval())  # no dropout while scoring
        kept = sum(sum(layer.shape) for layer in lora_layers(model).values())  # for one token
        micro_tokens = cfg.micro_tokens or (2**11 if device.type == "cpu" else 2**15)
        memory = torch.cuda.mem_get_info(device)[1] / 4 if device.type == "cuda" else (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4)
        if kept * model.dtype.itemsize * micro_tokens > memory:
            recompute_layers(model)
        stops = [tokenizer.eos_token_id, *np.atleast_1d(model.generation_config.eos_token_id)]
        if stops[0] is None:
            raise ValueError("its tokenizer has no end-of-sequence token, so no answer could end")
        stops = list(dict.fromkeys(int(i) for i in stops if i is not None))  # SFT: the first
        pad_id = stops[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # No one mask fits all layers where some see less of a row than others.
        config = model.config.get_text_config()
        solo = any(map(vars(config).get, ("sliding_window", "attention_chunk_size", "window_size")))
        rope = getattr(config, "rope_parameters", None) or {}
        known = rope if rope.get("rope_type") in ("dynamic", "longrope") else {}  # by longest row
        positions = known.get("original_max_position_embeddings") or getattr(
            config, "max_position_embeddings", None) or math.inf
        policy = Policy(model, tokenizer, torch.tensor(stops, device=device), pad_id,
                        0 if solo else Policy.pack, memory, positions, micro_tokens, cfg.today)
        self_check(policy)
    return policy


@torch.no_grad()
def self_check(policy: Policy) -> None:
    """ValueError unless samples and scores are the model's own for one row. Sets cache_bytes."""
    model, text = policy.model, "Four answers of eight tokens, two to this question"
    prompts, endless = [policy.encode(text), policy.encode(text[:30])], policy.stop_ids[:1] * 0 - 1
    ids, seen = (t.to(policy.device) for t in pad(prompts, policy.pad_id, left=True))
    if ("position_ids" not in signature(model.base_model.forward).parameters
            or getattr(model.config, "alibi", False)
            or any(isinstance(module, nn.Conv1d) for module in model.modules())
            or (cache := read_tokens(policy, ids, seen)[1]) is None):
        raise ValueError(f"{model.config.model_type} is not supported: only causal attention with "
                         "explicit positions keeps the answers apart that are read in one row")
    policy.cache_bytes = sum(part.nbytes for layer in cache.layers
                             for part in (layer.keys, layer.values)) / ids.numel()
    batch = sample(replace(policy, stop_ids=endless), BASE, prompts, 2, Config(
        max_new_tokens=8, temperature=0.0), seeded("self_check"))
    scored = log_probs(policy, BASE, batch, 1.0)  # (4, 8)
    for context, answer, found in zip(batch.contexts, batch.completion, scored, strict=True):
        row = torch.cat([torch.tensor(context, device=policy.device), answer])[None]
        logp = F.log_softmax(model(row).logits[0, len(context) - 1:-1].float(), -1)  # (8, V)
        own = logp.gather(-1, answer[:, None])[:, 0]
        error = max((found - own).abs().mean(), (logp.amax(-1) - own).mean()) / logp.std()
        if not error <= (1e-3 if model.dtype == torch.float32 else 0.05):  # bf16 has 8 bits
            raise ValueError(f"{model.config.model_type} is not supported: its log-probs padded, "
                             f"packed or with a cache are off by {error:.0%} of their spread")


def recompute_layers(model: nn.Module) -> None:
    """Let each decoder layer keep its input only: a third more work, far less memory."""
    for layer in model.modules():
        if isinstance(layer, transformers.GradientCheckpointingLayer):
            layer.forward = partial(  # by the backward pass, `with` is over
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (contextlib.nullcontext(), adapters(LoRALinear.active)))


def adapter_base(name: str) -> str:
    """The base model of an adapter that PEFT has written, '' if that is none. Raises RunError."""
    found = Path(name, "adapter_config.json")
    if Path(name, "adapter", found.name).exists():
        raise RunError(f"{name} is the folder of a run: give {name}/adapter")
    with tasks.reading(found, "give the whole folder of a plain LoRA adapter of PEFT"):
        return json.loads(found.read_bytes())["base_model_name_or_path"] if found.exists() else ""


def load_adapter(model: nn.Module, name: str, folder: Path) -> Role:
    """A plain LoRA of PEFT as a frozen adapter, filled up with zeros; its Role. Raises RunError."""
    with tasks.reading(folder, "give the whole folder of a plain LoRA adapter of this very model"):
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        for key in ("alpha_pattern", "use_qalora", "arrow_config", "init_lora_weights"):
            if config.get(key) not in (None, True, False, {}, "gaussian", "eva"):
                raise ValueError(f"{key} is {config[key]!r}")  # others leave odd weights
        weights = load_file(folder / "adapter_model.safetensors")
        rank = max(len(w) for key, w in weights.items() if ".lora_A." in key)
        for path, layer in lora_layers(model).items():
            (rows, columns), key = layer.shape, f"base_model.model.{path}.lora_"
            a = weights.pop(f"{key}A.weight", torch.zeros(0, columns)).float()
            b = weights.pop(f"{key}B.weight", torch.zeros(rows, 0)).float()
            if a.shape[1] != columns or b.shape != (rows, own := len(a)):
                raise ValueError(f"{path} has other sizes here")
            scale = config["lora_alpha"] / max(1, own) ** (0.5 if config.get("use_rslora") else 1)
            layer.put(name, F.pad(a, (0, 0, 0, rank - own)), F.pad(b, (0, rank - own)), scale)
        if weights:
            raise ValueError(f"{min(weights)} is of no linear layer of attention or MLP here")
    return (name,)


@torch.no_grad()
def export_adapter(folder: Path, policy: Policy) -> None:
    """The student as one adapter for PEFT: a sum of updates is [s1 B1, s2 B2] [A1; A2]."""
    layers, names, weights = lora_layers(policy.model), policy.student, {}
    for path, layer in layers.items():
        key = f"base_model.model.{path}.lora_"
        weights[f"{key}A.weight"] = torch.cat([layer.lora_A[n] for n in names])
        weights[f"{key}B.weight"] = torch.cat([layer.lora_B[n] * layer.scale[n] for n in names], 1)
    rank = sum(len(layer.lora_A[n]) for n in names)
    write_atomic(folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": policy.model.name_or_path,
        "fan_in_fan_out": hasattr(layer.base, "nf"),
        "target_modules": sorted({path.split(".")[-1] for path in layers})})


# Evaluation and verdict. It draws from its own generators: training never notices ============

def answer(policy: Policy, role: Role, examples: list, k: int, temperature: float, cfg: Config,
           verify=None) -> tuple[list[Batch], list[str], list[tasks.Verdict]]:
    """K answers to each example, example-major: as batches, as texts, and verdicts if asked for."""
    cfg, size = replace(cfg, temperature=temperature, top_p=1.0), max(1, 256 // k)
    prompts = [policy.encode(e.prompt) for e in examples]
    batches = [rollouts(policy, role, prompts[i:i + size], k, cfg, seeded("evaluation", i))
               for i in progress(range(0, len(prompts), size), f"answering {len(prompts)} prompts")]
    texts = [text for batch in batches for text in policy.decode(batch)]
    return batches, texts, verify_all(verify, examples, texts) if verify else []


def look(policy: Policy, task: tasks.Task, cfg: Config) -> dict[str, float]:
    """The student on a few validation problems: what steers a run sees no problem of the report."""
    new, old = task.validation[0][:min(LOOK, cfg.eval_problems)], task.validation[1]
    found = answer(policy, policy.student, new, 1, 0.0, cfg, task.verify)[2]
    kept = old_skills(policy, policy.student, task, old, cfg)
    scores = {"pass": mean(v.passed for v in found), "reward": mean(v.reward for v in found),
              "format": mean(v.formatted for v in found), **{k: kept[k] for k in OLD if k in kept}}
    for name, p, q in (("kl", policy.student, BASE), ("kl_from_base", BASE, policy.student)):
        batches = answer(policy, p, new[:LOOK // 3], 1, 1.0, cfg)[0]
        scores[name], _ = kl_and_entropy(policy, p, q, batches)
    return {f"eval_{name}": score for name, score in scores.items()}


@torch.no_grad()
def old_skills(policy: Policy, role: Role, task: tasks.Task, problems: list, cfg: Config) -> dict:
    """Shares of old problems that are still solved, by skill and by whether an anchor guards it."""
    if not problems:
        return {"passes": {}}
    verdicts = answer(policy, role, problems, 1, 0.0, cfg, tasks.verify_skill)[2]
    chance = mean(p for _, part in micro_batches(policy, solution_batch(policy, problems))
                  for p in log_probs(policy, role, part, 1.0).sum(1).exp().tolist())
    rewards, anchored = [v.reward for v in verdicts], {anchor.skill for anchor in task.anchors}
    groups: dict[str, list[float]] = {"old": rewards}
    for example, reward in zip(problems, rewards, strict=True):
        for name in ("replayed" if example.skill in anchored else "unreplayed", example.skill):
            groups.setdefault(name, []).append(reward)
    return {**{name: mean(group) for name, group in groups.items()}, "chance": chance,
            "passes": {name: groups[name] for name in OLD if name in groups}}


@torch.no_grad()
def kl_and_entropy(policy: Policy, p: Role, q: Role, batches: list[Batch]) -> list[float]:
    """KL(p || q) and entropy of p, exact, nats per token, on samples of p at temperature 1."""
    sums, tokens = torch.zeros(2), sum(int(batch.mask.sum()) for batch in batches)
    for _, part in sum((micro_batches(policy, b) for b in batches), []):
        found = on_tokens(policy, p, token_terms, 1.0, part, completion_hidden(policy, q, part))
        sums += sum(terms for _, terms in found)[1:].sum((1, 2)).cpu()
    return (sums / max(1, tokens)).tolist()


def evaluate(policy: Policy, task: tasks.Task, role: Role, cfg: Config) -> dict:
    """What the report says of one role: lists are per problem, KL in nats, edits of passes only."""
    print(f"Evaluating the {'student' if 'policy' in role else 'model as given'} ...", flush=True)
    scores, samples, problems = {}, {}, task.evals["in_domain"]
    for split, examples in task.evals.items():
        _, texts, greedy = answer(policy, role, examples, 1, 0.0, cfg, task.verify)
        samples[split], _, found = answer(policy, role, examples, PASS_K, 1.0, cfg, task.verify)
        solved = [v for v in found if v.passed]
        groups = [any(v.passed for v in found[i:i + PASS_K]) for i in range(0, len(found), PASS_K)]
        edits = {name: mean(v.metrics[name] for v in solved) if solved else None
                 for name in task.edit_metrics}
        scores[split] = {
            "pass@1": mean(v.passed for v in greedy), "pass@k": mean(groups),
            "reward": mean(v.reward for v in found), "format": mean(v.formatted for v in found),
            **edits, "passes": [int(v.passed) for v in greedy], "answers": texts}
    scores["general"] = old_skills(policy, role, task, task.benchmark, cfg)
    visited, from_base = samples["in_domain"], answer(policy, BASE, problems, 1, 1.0, cfg)[0]
    anchors = answer(policy, role, task.anchors, 1, 1.0, cfg)[0]
    scores["kl_to_base"], scores["entropy"] = kl_and_entropy(policy, role, BASE, visited)
    scores["kl_from_base"], _ = kl_and_entropy(policy, BASE, role, from_base)
    scores["kl_to_reference"], _ = kl_and_entropy(policy, role, policy.reference, visited)
    _, scores["entropy_anchors"] = kl_and_entropy(policy, role, BASE, anchors)
    readers = {"pass@1_with_hint": (policy, role)}
    if has_teacher(cfg) and role != policy.student:  # training does not change the teacher
        readers["pass@1_of_teacher"] = policy.teacher
    hinted = [replace(e, prompt=tasks.privileged_prompt(e)) for e in problems]
    for name, reader in readers.items():
        scores[name] = mean(v.passed for v in answer(*reader, hinted, 1, 0.0, cfg, task.verify)[2])
    return scores


def paired_bootstrap(before: list, after: list) -> tuple[float, float]:
    """95 % interval of the mean change of results (N,) or (S, N), resampled (Efron 1979)."""
    change = np.atleast_2d(np.array(after) - np.array(before))
    rng = np.random.default_rng(0)  # a draw weighs each seed and problem: how often it was drawn
    seeds, problems = (rng.multinomial(n, np.full(n, 1 / n), 10_000) / n for n in change.shape)
    return tuple(np.quantile(((seeds @ change) * problems).sum(1), [0.025, 0.975]).tolist())


def judge_run(before: dict, after: dict, cfg: Config) -> dict:
    """Improved only if every condition of the essay holds. Each shows its numbers."""
    old, new, kl = before["in_domain"], after["in_domain"], after["kl_to_base"]
    low, high = paired_bootstrap(old["passes"], new["passes"])
    was, now = (scores["general"].get("old") for scores in (before, after))
    edits = [scores.get("excess_edit") for scores in (old, new)]  # None: nothing passes or is code
    on_task, on_anchors = (after[name] / (before[name] or math.nan)
                           for name in ("entropy", "entropy_anchors"))
    found = {  # holds, None where that cannot be tested; numbers
        "pass rate up": (low > 0, f"{old['pass@1']:.3f} -> {new['pass@1']:.3f}, 95 % interval of "
                                  f"the change [{low:+.3f}, {high:+.3f}]"),
        "general benchmark kept": (None, "none to compare") if not was else (
            now + 0.02 >= was, f"{was:.3f} -> {now:.3f}, may fall by 0.02"),
        "KL within budget": (kl <= cfg.kl_budget, f"{kl:.4f} of {cfg.kl_budget} nats/token"),
        "entropy kept": (not (on_task < 0.3 or on_anchors < 0.8), f"x{on_task:.2f} on task (>= 0.3)"
                         f", x{on_anchors:.2f} on anchors (>= 0.8)".replace("xnan", "untested")),
        "extra edits not up": (None, "none to compare") if None in edits else (
            edits[1] <= edits[0], "{:.4f} -> {:.4f}".format(*edits))}
    return {"improved": all(holds is not False for holds, _ in found.values()), "conditions": {
        name: {"holds": holds, "numbers": text} for name, (holds, text) in found.items()}}


# A whole run, its folder, and what the terminal shows of it ==================================

def write_atomic(path: Path, value) -> None:
    """Bytes, or else JSON: the old file or the new one, never half of it, if the disk is full."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    data = value if isinstance(value, bytes) else (json.dumps(value, indent=2) + "\n").encode()
    aside = path.with_suffix(".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb") as file:
            file.write(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path):
    """The JSON in a file; of a .jsonl file, the list of its objects. Raises RunError."""
    with tasks.reading(path, "give a whole run, or delete this one: it is made again"):
        text = path.read_text("utf-8")
        return json.loads(f"[{','.join(text.splitlines())}]" if path.suffix == ".jsonl" else text)


def save_checkpoint(folder: Path, policy: Policy, state: State) -> None:
    """All that training changes, and how long the .jsonl files are. Generators have no state."""
    weights, buffer = policy.model.state_dict(), io.BytesIO()
    torch.save({**vars(state), "replay": state.replay and vars(state.replay),
                "seconds": time.perf_counter() - state.began,
                "optimizer": state.optimizer.state_dict(), "reference": policy.reference,
                "adapters": {name: w for name, w in weights.items() if ".lora_" in name},
                "sizes": {p.name: p.stat().st_size for p in folder.parent.glob("*.jsonl")}}, buffer)
    write_atomic(folder / "state.pt", buffer.getvalue())


def load_checkpoint(folder: Path, policy: Policy, state: State, cfg: Config) -> None:
    """Put back the saved state, and the .jsonl files as they were then. Raises RunError."""
    with tasks.reading(folder, "resume with what the run was started with, or start a new one"):
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if saved["data"] != state.data:
            raise ValueError("its data, or its task, have changed")
        if "format" in saved["reference"]:
            add_adapter(policy.model, "format", cfg.format_rank, cfg.format_rank, cfg.seed)
        policy.reference = saved["reference"]
        found = policy.model.load_state_dict(saved["adapters"], strict=False)
        if other := [*found.unexpected_keys, *(k for k in found.missing_keys if ".lora_" in k)]:
            raise ValueError(f"other adapters: {other[0]}")
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step, state.kl_coef, state.before = (saved[n] for n in ("step", "kl_coef", "before"))
        state.began -= saved["seconds"]
        state.replay = saved["replay"] and Batch(saved["replay"]["contexts"], *(
            saved["replay"][name].to(policy.device) for name in ("completion", "mask")))
        for name, size in saved["sizes"].items():
            if (folder.parent / name).stat().st_size < size:
                raise ValueError(f"{name} lacks steps")
            os.truncate(folder.parent / name, size)


def ask_to_stop(state: State, *signal_and_frame) -> None:
    """Ctrl-C and SIGTERM while training: stop after this step; the second one stops at once."""
    if state.stopping and not dist.is_initialized():  # torchrun passes one Ctrl-C on twice
        raise KeyboardInterrupt
    state.stopping += 1
    os.write(2, b"\nStopping after this step.\n")  # print may be busy


HOPELESS = (  # key of metrics.jsonl, a value with which nothing is learnt, and what to do
    ("truncated", 1, "every answer was cut off: raise --max-new-tokens"),
    ("format_rate", 0, "no answer was well-formed: raise --format-lr or --format-examples"),
    ("tied_rollouts", 1, "all answers to a prompt were worth the same: raise --rollouts"))


def log_step(out: Path, metrics: dict, samples: list[dict], seconds: float) -> None:
    """Append to metrics.jsonl and samples.jsonl (step 0 begins them); print what is of COLUMNS."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    for name, records in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
        with open(out / name, "a" if metrics["step"] else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    told, lines = metrics | {"seconds": seconds}, (out / "metrics.jsonl").read_text().splitlines()
    names = [name for name in COLUMNS if name in told or f'"{name}"' in lines[0]]  # of the task
    if metrics["step"] == 0 or metrics["step"] % 20 == 1:
        print("".join(f"{COLUMNS[name]:>8}" for name in names))
    print("".join(f"{told.get(name, ''):>8{'.3g' * (type(told.get(name)) is float)}}"
                  for name in names), flush=True)
    for key, value, advice in HOPELESS if metrics["step"] % 10 == 0 else ():
        if all(json.loads(line).get(key) == value for line in lines[-10:]):
            return print(f"In the last ten steps {advice}", flush=True)


def examples_at(task: tasks.Task, step: int, cfg: Config) -> list[tasks.Example]:
    """The P examples of a step: every epoch is a new shuffle, known from the seed alone."""
    size, first = len(task.train), step * cfg.prompts
    epochs = range(first // size, (first + cfg.prompts - 1) // size + 1)
    order = torch.cat([torch.randperm(size, generator=seeded("data", cfg.seed, e)) for e in epochs])
    return [task.train[i] for i in order[first % size:][:cfg.prompts].tolist()]


def environment(policy: Policy) -> dict:
    """What a result depends on besides the code, and what of the model is trained."""
    model, beyond = policy.model, Counter()
    reached = {id(p) for layer in lora_layers(model).values() for p in layer.parameters()}
    for module in model.base_model.modules():  # experts, convolutions: matrices without LoRA
        for p in module.parameters(recurse=False) if not isinstance(module, nn.Embedding) else ():
            beyond[type(module).__name__] += p.numel() * (p.dim() > 1 and id(p) not in reached)
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "device": str(policy.device),
            "dtype": str(model.dtype), "threads": torch.get_num_threads(),
            "trained_parameters": (trained := model.num_parameters(only_trainable=True)),
            "frozen_parameters": model.num_parameters() - trained,
            "out_of_reach_of_lora": dict(+beyond), "judge": tasks.judge_layers()}


def run(cfg: Config, task: tasks.Task) -> dict:
    """One whole run, or one evaluation, in the folder `cfg.out`; its report. Raises RunError."""
    began, out = time.perf_counter(), Path(cfg.out)
    policy = load_policy(cfg, task)
    task = tasks.fitting(task, cfg, min(policy.positions, policy.teacher[0].positions),
                         lambda text: len(policy.encode(text)))
    optimizer = None if cfg.eval_only else adapter_optimizer(policy.model, "policy", cfg.lr)
    data = hashlib.sha256(repr((task.train, task.evals, task.anchors, task.benchmark)).encode())
    state, facts = State(optimizer, cfg.kl_coef, began, data=data.hexdigest()), environment(policy)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if resumed := all((out / name).exists() for name in ("config.json", "checkpoint/state.pt")):
        load_checkpoint(out / "checkpoint", policy, state, cfg)
    (out / "report.json").unlink(missing_ok=True)
    write_atomic(out / "config.json", asdict(cfg))
    if cfg.eval_only:
        trained = Path(cfg.model, "../config.json")
        if trained.exists() and (other := read_json(trained).get("task")) != cfg.task:
            print(f"Mind that {cfg.model} was trained with --task {other}, not {cfg.task}")
        report = {"scores": evaluate(policy, task, policy.reference, cfg)}
        print_table({"scores": {k: f"{np.mean(x):.3f}" for k, x in flat(report["scores"]).items()}})
    else:
        report = learn(policy, task, state, resumed, cfg)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin")
    peak = (torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else used) / 2**30
    report |= {"seconds": time.perf_counter() - state.began, "peak_gib": peak, "environment": facts}
    write_atomic(out / "report.json", report)
    print(f"\n{report['seconds']:.0f} s, peak memory {peak:.2f} GiB", flush=True)
    return report


def run_or_load(cfg: Config, task: tasks.Task) -> dict:
    """The report of a run: begun, or gone on with, unless it is there. RunError if others are."""
    join_ranks(cfg)
    found, report = (Path(cfg.out, name) for name in ("config.json", "report.json"))
    held = read_json(found) if found.exists() else {}
    free = {"out", "save_every", "device", "micro_tokens",
            "steps" if held.get("steps", 0) <= cfg.steps else ""}
    other = [flag(k) for k, v in asdict(cfg).items() if held.get(k) != v and k not in free]
    if other and any(Path(cfg.out).glob("*.json*")):
        raise RunError(f"{cfg.out} holds other options ({' '.join(other[:3])}): give another --out")
    done = report.exists() and held["steps"] == cfg.steps
    print(f"\n=== {cfg.out}" + " is finished: raise --steps, or delete it" * done, flush=True)
    return read_json(report) if done else run(cfg, task)


def learn(policy: Policy, task: tasks.Task, state: State, resumed: bool, cfg: Config) -> dict:
    """Step 1 if the format needs it, the scores of the base, the loop; then scores and verdict."""
    out, given = Path(cfg.out), policy.reference
    if not resumed:
        if cfg.model != "tiny" and not cfg.anchors and cfg.replay_share > 0 and task.anchors:
            print("Replay takes the task's prompts: --anchors FILE says what this model shall keep")
        sizes = solution_batch(policy, task.train[:1000]).mask.sum(1)
        if longer := int((sizes > cfg.max_new_tokens).sum()):
            print(f"{longer} of {len(sizes)} references need --max-new-tokens {sizes.max()}")
        seen = look(policy, task, cfg)
        log_step(out, {"step": 0, **seen}, [], 0.0)
        if over_ranks(rate := seen["eval_format"]) / over_ranks(1) < cfg.format_threshold:
            print(f"Step 1: {rate:.0%} of answers are well-formed: format SFT first", flush=True)
            train_format(policy, task, cfg)
        if cfg.tested:
            state.before = evaluate(policy, task, given, cfg)
        save_checkpoint(out / "checkpoint", policy, state)
    handlers = {number: signal.signal(number, partial(ask_to_stop, state))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(policy, task, state, out, cfg)
    except RunError as error:  # a gradient that is not finite
        ids = ", ".join(example.id for example in examples_at(task, state.step, cfg))
        raise RunError(f"step {state.step + 1}, on the examples {ids}: {error}") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    export_adapter(out / "adapter", policy)
    if not cfg.tested:
        return {}
    after = (before := state.before) | evaluate(policy, task, policy.student, cfg)
    tasks.show_learnt(before["in_domain"], after["in_domain"], task.evals["in_domain"])
    print_table({name: {row: f"{np.mean(x):.3f}" for row, x in flat(scores).items()}
                 for name, scores in (("before", before), ("after", after))})
    verdict = judge_run(before, after, cfg)
    print(f"\nVerdict: {'' if verdict['improved'] else 'NOT '}IMPROVED")
    for name, condition in verdict["conditions"].items():
        holds = {True: "yes", False: "NO", None: "n/a"}[condition["holds"]]
        print(f"  {holds:4}{name}: {condition['numbers']}")
    return {"before": before, "after": after, "verdict": verdict}


def flat(scores: dict, rows: tuple = ()) -> dict[str, list[float]]:
    """Scores as "in_domain pass@1": one number, or one for each problem where that is known."""
    found = {}
    for name, part in scores.items():
        part = part if isinstance(part, dict) else {"": part}
        passes = part.get("passes", {})
        passes = {"pass@1": passes} if isinstance(passes, list) else passes
        found |= {f"{name} {key}".rstrip(): passes.get(key) or [value]
                  for key, value in part.items() if isinstance(value, float)}
    return {row: found[row] for row in rows or found if row in found}


def print_table(columns: dict[str, dict[str, str]], title: str = "") -> None:
    """A row for each score, a column for each variant; four columns beside each other."""
    for some in (list(columns)[i:i + 4] for i in range(0, len(columns), 4)):
        wide = 2 + max(22, *map(len, some))
        print(f"\n{title:28}" + "".join(f"{name:>{wide}}" for name in some))
        for row in dict.fromkeys(row for cells in columns.values() for row in cells):
            print(f"{row:28}" + "".join(f"{columns[name].get(row, '-'):>{wide}}" for name in some))


# --compare and --ablations: run after run from one base, and one table =======================

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times --lr: each method is compared at each of them
COMPARED = ("in_domain pass@1", "in_domain excess_edit", "in_domain styled", "new_bugs pass@1",
            "out_of_domain pass@1", "general replayed", "general unreplayed", "general chance",
            "kl_to_base", "kl_from_base", "entropy")
WRONG, STYLED = {"task": "codeedit-wrong-hints"}, {"task": "codeedit-style"}
ONE, TWO, OPEN = {"teacher_coef": 1.0}, {"teacher_coef": 2.0}, {"gate": "none"}
OPD, SFT = ({"method": name, **METHODS[name]} for name in ("opd", "sft"))
ABLATIONS = {  # what is changed; in the last ones what is learnt from, or by whom
    "vcopd": {}, "no replay": {"replay_share": 0.0}, "lambda 0": {"teacher_coef": 0.0},
    "lambda 1": ONE, "lambda 2": TWO, "no gate": OPEN, "lambda 1, no gate": ONE | OPEN,
    "lambda 2, no gate": TWO | OPEN, "wrong hints": WRONG, "wrong hints, opd": WRONG | OPD,
    "wrong hints, lambda 2": WRONG | TWO, "wrong hints, lambda 2, no gate": WRONG | TWO | OPEN,
    "style": STYLED, "style, opd": STYLED | OPD, "style, no clip": STYLED | {"gap_clip": 1e9},
    "far sft": {"task": "codeedit-far", **SFT}, "own sft": {"task": "codeedit-own", **SFT},
    "taught by far sft": {"task": "codeedit-no-hints", "teacher": "far sft"}}


def variants_of(cfg: Config) -> dict[str, list[Config]]:
    """The methods, each at several learning rates; or VC-OPD with one choice changed at a time."""
    base = replace(cfg, compare=False, ablations=False, seeds=Config.seeds, tested=False)
    if cfg.compare:
        return {name: [replace(base, method=name, lr=cfg.lr * rate, **fixed) for rate in RATES]
                for name, fixed in METHODS.items()}
    return {name: [replace(base, **change)] for name, change in ABLATIONS.items()
            if "task" not in change or change["task"].startswith(cfg.task) and not cfg.data}


def compare(cfg: Config) -> None:
    """Train each variant with every seed, test it at the rate that validation chose; one table."""
    task, seeds = tasks.load_task(cfg), range(cfg.seed, cfg.seed + cfg.seeds)
    looks, results, rivals, changes = {}, {}, {}, {}  # rivals: the first variant in each world
    for name, variants in variants_of(cfg).items():
        world, pupil = Path(variants[0].task).stem, variants[0].teacher in looks  # of another one
        task = task if world == task.name else tasks.load_task(variants[0])
        base = replace(cfg, compare=False, ablations=False, eval_only=True, seed=Config.seed,
                       seeds=Config.seeds, task=variants[0].task, out=f"{cfg.out}/base {world}")
        before = run_or_load(base, task)["scores"]
        results.setdefault(f"base {world}", [flat(before, COMPARED)])
        for one, seed in ((one, seed) for one in variants for seed in seeds):
            out, other = (f"{cfg.out}/{who} {one.lr:g}-s{seed}" for who in (name, one.teacher))
            run_or_load(replace(one, seed=seed, out=out, teacher=f"{other}/adapter" if pupil
                                else one.teacher, eval_every=min(one.eval_every, one.steps)), task)
            found = [look for look in read_json(Path(out, "metrics.jsonl")) if "eval_pass" in look]
            looks.setdefault(name, {}).setdefault(f"{one.lr:g}", []).append(found)
        rate = max(looks[name], key=lambda lr: mean(r[-1]["eval_pass"] for r in looks[name][lr]))
        for seed, runs in zip(seeds, zip(*looks[name].values(), strict=True), strict=True):
            out = f"{cfg.out}/{name} {rate}-s{seed}"
            scores = run_or_load(replace(base, model=f"{out}/adapter", out=f"{out}/test",
                                         teacher="none"), task)["scores"]
            improved = [float(judge_run(before, scores, cfg)["improved"])]
            results.setdefault(name, []).append({**flat(scores, COMPARED), "lr": [float(rate)],
                                                 "improved": improved, **frontier(runs, cfg)})
        rivals.setdefault(world, name if variants[0].method == "vcopd" else next(iter(looks)))
        rival = variants[0].teacher if pupil else rivals[world]
        rival = rival if rival != name else f"base {world}"
        changes[f"{name} - {rival}"] = differences(results[rival], results[name])
    means = {name: {row: [np.mean(run[row]) for run in runs if row in run]
                    for run in runs for row in run} for name, runs in results.items()}
    print_table({name: {row: f"{np.mean(x):.3f}" + f" ±{np.std(x):.3f}" * (len(x) > 1)
                        for row, x in rows.items()} for name, rows in means.items()}, "mean ± std")
    print_table(changes, "difference [95 % interval]")
    write_atomic(Path(cfg.out) / "table.json", {
        "results": results, "differences": changes, "looks": looks})


def frontier(runs: list[list[dict]], cfg: Config) -> dict[str, list[float]]:
    """Of all looks of one seed: the best within both budgets, the least paid for 0.8 and 0.9."""
    points = [look | {key.replace("eval", "lost"): run[0][key] - look[key]  # since the base
                      for key in look if key.startswith("eval_")} for run in runs for look in run]
    row = {"best within budgets": [max((point["eval_pass"] for point in points if round(
        point.get("lost_old", 0), 9) <= 0.02 and point["eval_kl"] <= cfg.kl_budget), default=0.0)]}
    for goal in (0.8, 0.9):
        reached = [point for point in points if point["eval_pass"] >= goal]
        row[f"reaches {goal}"] = [float(bool(reached))]
        for kind in ("step", "eval_kl", "lost_replayed", "lost_unreplayed", "lost_chance"):
            if values := [point[kind] for point in reached if kind in point]:
                row[f"least {kind} at {goal}"] = [float(min(values))]
    return row


def differences(rivals: list[dict], runs: list[dict]) -> dict[str, str]:
    """Of two variants, in what both have with every seed; intervals over seeds and problems."""
    cells = {}
    for row in (row for row in runs[0] if all(row in run for run in (*rivals, *runs))):
        before, after = ([run[row] for run in some] for some in (rivals, runs))
        low, high = paired_bootstrap(before, after)
        cells[row] = f"{np.mean(after) - np.mean(before):+.3f} [{low:+.3f}, {high:+.3f}]"
    return cells


# --inspect, --bench and --plot leave no run; and the program itself ==========================

def inspect(cfg: Config, policy: Policy, task: tasks.Task) -> None:
    """What a step credits, token by token, in the best and worst of fresh samples (top-p 1)."""
    k, examples = cfg.rollouts, examples_at(task, 0, cfg)[:max(1, 256 // cfg.rollouts)]
    [batch], _, verdicts = answer(
        policy, policy.student, examples, k, cfg.temperature, cfg, task.verify)
    reward = torch.tensor([float(v.reward) for v in verdicts], device=policy.device)
    advantage = group_advantage(reward, k) * (not cfg.blind)
    for i in dict.fromkeys((int(advantage.argmax()), int(advantage.argmin()))):
        rows, example = torch.tensor([i]), examples[i // k]
        [part] = score(policy, batch.rows(rows), [example], advantage[rows], cfg)
        table = torch.cat([part.logp_old, part.logp_teacher, part.logp_teacher - part.logp_old,
                           part.gap, dense_advantage(part.advantage, part.gap, cfg)]).T.tolist()
        print(f"\n{example.id}: reward {reward[i]:.2f} ({verdicts[i].reason}), "
              f"A {advantage[i]:+.2f}\n{'token':20}  student  teacher       D  clipped   A_dense")
        for token, numbers in zip(part.batch.answers()[0], table, strict=True):
            line = "{!r:20}{:9.2f}{:9.2f}{:+8.2f}{:+9.2f}{:+10.3f}".format(
                policy.tokenizer.decode([token]), *numbers)
            hinted = abs(numbers[2]) > 0.01 and sys.stdout.isatty()  # green up, red down
            print(f"\x1b[{31 + (numbers[2] > 0)}m{line}\x1b[0m" if hinted else line)


def ask(cfg: Config, policy: Policy, task: tasks.Task) -> None:
    """Greedy answers to one prompt, and how far the student is from the base at their tokens."""
    known = {example.id: example for example in sum(task.evals.values(), task.train)}
    one = known.get(cfg.ask, tasks.Example("", cfg.ask, "", ""))  # else plain text, without a hint
    hinted, own = replace(one, prompt=tasks.privileged_prompt(one)), policy.encode(one.prompt)
    for name, reader, role, asked in (("base", policy, BASE, one), (
            "student", policy, policy.student, one), ("teacher", *policy.teacher, hinted)):
        [batch], [text], _ = answer(reader, role, [asked], 1, 0.0, cfg)
        kl, _ = kl_and_entropy(policy, policy.student, BASE, [replace(batch, contexts=[own])])
        print(f"\n- {name}, KL(student || base) {kl:.4f} nats per token:\n{text}")


def plot(folders: list[str]) -> None:
    """Draw one run or comparison in its plot.png, several runs in that of the current folder."""
    with tasks.reading("--plot", "pip install matplotlib"):
        from matplotlib.figure import Figure  # draws by Agg: pyplot would look for a screen
    figure, table = Figure((14, 8), layout="constrained"), Path(folders[0], "table.json")
    panels = list(figure.subplots(2, 3).flat)
    with tasks.reading(" ".join(folders), "--plot takes folders of runs, or that of a comparison"):
        if table.exists():
            draw_frontiers(panels, read_json(table)["looks"])
        for i, folder in enumerate(folders if not table.exists() else ()):
            run, held = (read_json(Path(folder, file)) for file in ("metrics.jsonl", "config.json"))
            for panel, key in zip(panels, list(COLUMNS)[1:7], strict=True):
                points = [(row["step"], row[key]) for row in run if key in row]
                x, y = np.array(points, float).reshape(-1, 2).T
                near = [y[max(0, n - 4):n + 1].mean() for n in range(len(y))]  # of five steps
                panel.plot(x, y, ".", color=f"C{i}", alpha=0.4)
                panel.plot(x, y if "eval" in key else near, color=f"C{i}", label=folder)
                panel.set(xlabel="step", title=key)
            for level in (held["kl_target"], held["kl_budget"]):
                panels[-1].axhline(level, color="grey", linestyle=":")  # of KL
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(image := Path(folders[0] if len(folders) == 1 else "", "plot.png"), dpi=120)
    print(f"The picture is {image}")


def draw_frontiers(panels: list, looks: dict) -> None:
    """Gain over loss at each look, as a mean over seeds; lines: the best for at most that loss."""
    keys = (*OLD[1:], "kl", "kl_from_base", "pass")
    for i, (name, rates) in enumerate(looks.items()):
        runs = np.array([[[[float(look.get(f"eval_{key}", 0)) for key in keys] for look in run]
                          for run in seeds] for seeds in rates.values()])
        points = runs.mean(1).reshape(-1, len(keys))  # of (rates, seeds, looks, keys)
        points[:, :3] = points[0, :3] - points[:, :3]  # a loss, as KL is
        for panel, key, x in zip(panels, keys[:-1], points.T, strict=False):
            panel.plot(x, points[:, -1], ".", color=f"C{i}", alpha=0.3)
            panel.step(np.sort(x), np.maximum.accumulate(points[np.argsort(x), -1]), where="post",
                       color=f"C{i}", label=name)
            panel.set(xlabel=f"{key}, nats per token" if "kl" in key else f"{key}, lost",
                      ylabel="new skill", xlim=(-0.01, 0.15), ylim=(points[0, -1] - 0.05, 1))
            panel.text(0.02, 0.94, "\u2196 better", transform=panel.transAxes)
        best = runs[runs[:, :, -1, -1].mean(1).argmax(), :, :, -1]  # (seeds, looks)
        panels[5].errorbar(range(len(best[0])), best.mean(0), best.std(0), label=name)
        panels[5].set(xlabel="looks on the way, at the best rate, ± std over seeds")


def main(cfg: Config, plotted: list[str] | None = None) -> int:
    """Run. Exit code 0 also for `not improved`; 2 for what a user can mend; 130 for Ctrl-C."""
    tasks.UNSAFE_JUDGE = cfg.unsafe_judge
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc
        for option, size in ((-3, 2**25), (-1, 2**30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)  # to fetch memory anew was 40 % of a step
    try:
        if plotted:
            plot(plotted)
        elif cfg.compare or cfg.ablations:
            compare(cfg)
        elif cfg.inspect or cfg.ask:
            show, task = inspect if cfg.inspect else ask, tasks.load_task(cfg)
            show(cfg, load_policy(cfg, task), task)
        elif cfg.bench:
            with tempfile.TemporaryDirectory() as out:
                run(replace(cfg, out=out, steps=3, tested=False, format_threshold=0.0),
                    tasks.load_task(cfg))
        else:
            run_or_load(cfg, tasks.load_task(cfg))
            names = "task", "model", "data", "eval_data", "anchors", "benchmark", "skip_bad_rows"
            same = [f"{flag(k)} {v}".removesuffix(" True") for k in names if (v := getattr(cfg, k))]
            print(f"\nResults are in {cfg.out}: read report.json there, or compare methods with\n"
                  f"python vcopd.py {' '.join(same)} --compare")
        return 0
    except KeyboardInterrupt:
        print("\nInterrupted. To go on, give the same command again.")
        return 130
    except Exception as error:
        why, text = error if isinstance(error, RunError) else "", str(error).lower()
        if isinstance(error, MemoryError) or "of memory" in text or "allocate memory" in text:
            why = ("out of memory: lower --micro-tokens, with which a run may --resume, --prompts, "
                   "--max-new-tokens, --rollouts or --lora-rank; or take --quantize nf4")
        elif isinstance(error, OSError) or "no space left" in text:  # torch says it in its own way
            why = f"{error}: once mended, the same command goes on; or give another --out"
        if not why:
            raise
        print("vcopd.py:", *str(why).split(), file=sys.stderr)  # one line, whatever names hold
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: servers are stopped
    sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold any character
    sys.exit(main(Config(), PLOTTED) if PLOTTED else main(read_config(sys.argv[1:])))
