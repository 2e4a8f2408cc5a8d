# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "tqdm==4.70.1",
#                 "pytest==9.2.0"]
# ///
"""Verifier-Calibrated On-Policy Distillation (VC-OPD): a reference implementation in one file.

A language model learns a new skill from its own samples and forgets little: a verifier says how
good they are, and a teacher hints at tokens inside that verdict, by lambda * clip (0.1) at most.

    python vcopd.py --task codeedit              # 7 minutes on 2 cores the first time, then 3
    python vcopd.py --task arithmetic            # 3 minutes the first time, then 1.5
    python vcopd.py --task codeedit --method rl  # the same loop without a teacher

Start reading at `train`, the first function of Part I. It repeats Steps 2 to 6:

    Step 1  format    SFT of a separate adapter, once, if needed            train_format
    Step 2  rollouts  y_1 .. y_K ~ pi_theta(.|x)                            sample
    Step 3  verdict   Eq. 1  R_i = V(x, y_i)                                verify_all
                      Eq. 2  A_i = (R_i - mean R) / (std R + 1e-4)          group_advantage
    Step 4  hints     log-probs of these very tokens, without gradient      score
                      Eq. 3  D_t = clip(log T(a_t|s_t, hint) - log pi_old)  teacher_gap
                      Eq. 4  G_i = sigmoid(A_i)                             GATES
                      Eq. 5  A_dense = A_i + lambda * G_i * D_t             dense_advantage
    Step 5  update    Eq. 6  rho_t = pi_theta / pi_old                      vcopd_loss
                      Eq. 7  L_policy = -mean min(rho A_dense,              vcopd_loss
                                         clip(rho, 1 - eps, 1 + eps) A_dense)
                      Eq. 8  L_kl = beta * KL(pi_theta || pi_ref), exact    vcopd_loss
                      Eq. 9  beta *= 1.2 if KL > target else 0.95           adapt_kl_coef
                      Eq. 10 H = entropy, exact                             token_terms
                      Eq. 11 L = L_policy + L_kl - eta * H                  vcopd_loss
    Step 6  replay    Eq. 12 L_total = (1 - r) * L + r * L_replay           total_loss

One frozen model plays every role but a stronger teacher's: named LoRA adapters and the prompt
decide which. A PEFT folder as --model is one more frozen adapter of pi_ref and pi_theta.

    pi_0, the base         no adapter                                       the prompt
    pi_ref, KL anchor      {format} if Step 1 ran                           the prompt
    pi_theta, the student  {format} + {policy}                              the prompt
    T, the teacher         as pi_ref, a {specialist}, or a stronger model   the prompt and a hint

Where this differs from the essay (Marvin B. Freedman, 2026), as marked by `differs:` on its line:

    1. KL is held to the model after Step 1, else the guard fights the format just learnt.
    2. Replay is plain NLL without a PPO ratio: its pi_old is many steps old.
    3. A group of equal rewards gets A = 0 exactly, decided on max - min. Hints act there,
       but for the gate `success`.
    4. Log-probs of every role are tempered as sampling is: ratio, gap and KL speak of one policy.
    5. The reward's three penalties are held in [0, 1] each, so no pass is below a fail (tasks.py).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path

import tasks


def knob(default, text, low=0, high=2**31 - 1, choices=None, heading=None):
    """A field of Config that is an option: its help, the values it accepts, a heading above it."""
    return field(default=default, metadata={"help": text, "low": low, "high": high,
                                            "choices": choices, "heading": heading})


@dataclass(frozen=True)
class Config:
    """Every choice of a run, each an option. The defaults are the essay's, for one GPU."""
    task: str = knob("codeedit", "what to learn", choices=sorted(tasks.TASKS), heading="the run")
    method: str = knob("vcopd", "preset of the one loop", choices=("vcopd", "rl", "opd", "sft"))
    model: str = knob("tiny", "tiny (built here), a Hugging Face id, a folder, or a PEFT folder")
    teacher: str = knob("self", "self (--model reads a hint), none, a better model, a PEFT folder")
    data: str = knob("", "train on the problems of this file (JSON lines)")
    eval_data: str = knob("", "evaluate on the problems of this file")
    benchmark: str = knob("", "general benchmark: a file in HumanEval's format")
    skip_bad_rows: bool = knob(False, "leave out rows of these files that cannot work")
    split: str = knob("test", "problems to evaluate on", choices=("test", "validation"))
    out: str = knob("", "run folder; runs/TASK-METHOD-sSEED when empty")
    seed: int = knob(0, "seed of everything that is drawn in training")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = knob("auto", "of the frozen base", choices=("auto", "float32", "bfloat16"))
    quantize: str = knob("none", "nf4: the frozen base in 4 bits (QLoRA)", choices=("none", "nf4"))
    merge: str = knob("", "also write base and adapters as one plain model, to this new folder")
    unsafe_judge: bool = knob(False, "run answers even where the kernel cannot lock them in")
    eval_only: bool = knob(False, "evaluate --model and train nothing", heading="other commands")
    check: bool = knob(False, "can this be learnt? rows, lengths, format, what the base solves")
    inspect: bool = knob(False, "show token by token what a step would credit")
    bench: bool = knob(False, "time the parts of a step on this machine")
    compare: bool = knob(False, "train every method from one base, and print one table")
    ablations: bool = knob(False, "train VC-OPD with one choice changed at a time; one table")
    seeds: int = knob(3, "seeds of each run of --compare and --ablations", 1)
    steps: int = knob(500, "training steps", 1, heading="rollouts (Step 2)")
    prompts: int = knob(16, "P, prompts in a step", 1)
    rollouts: int = knob(4, "K, answers sampled for each prompt", 1)
    temperature: float = knob(0.8, "of sampling and of every training log-prob", 0.05, 5)
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
    micro_tokens: int = knob(2048, "tokens in one forward pass, about, hints not counted", 1)
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
    kl_budget: float = knob(0.05, "largest KL to the base that still counts as improved")
    blind: bool = False  # set by METHODS alone, as the next: do not look at the verdict
    imitate: bool = False  # learn from reference answers, not from rollouts


TINY = {  # the built-in model has 1 M parameters: what differs from the essay's defaults, and why
    "steps": 48, "format_examples": 512, "max_new_tokens": 96,  # two minutes on 2 cores, enough
    "eval_every": 4, "save_every": 10, "replay_every": 10,  # 100 and 200 steps would be never
    "lr": 1e-3, "format_lr": 1e-3,  # small models want larger steps: at 1e-5 nothing moves in 48
    "kl_coef": 0.1,  # 48 steps are too few for beta to find its level from 0.01
    "replay_keep": 0.5,  # it has 20 prompts of each old skill: with 4, coding was forgotten
    "replay_share": 0.2,  # the upper end: so small a model forgets faster
}


def flag(name: str) -> str:
    """A field of Config as the user types it."""
    return f"--{name.replace('_', '-')}"


def build_parser() -> argparse.ArgumentParser:
    """The command line: every knob of Config is an option."""
    parser = argparse.ArgumentParser(
        prog="vcopd.py", usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, description=__doc__.partition("\n\nStart")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = {"tiny": TINY, **tasks.PRESETS}.items()
    for option in filter(lambda option: option.metadata, fields(Config)):
        name, kind, meta = option.name, type(option.default), option.metadata
        if meta["heading"]:
            group = parser.add_argument_group(meta["heading"])
        others = "".join(f"; {who} {values[name]}" for who, values in presets if name in values)
        text = f"{meta['help']} [{option.default}{others}]"
        if kind is bool:
            group.add_argument(flag(name), help=meta["help"], action="store_true")
        else:
            group.add_argument(flag(name), help=text, type=kind, choices=meta["choices"])
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    group.add_argument("--plot", metavar="RUN", nargs="+", help="draw runs, or one comparison")
    return parser


if __name__ == "__main__":  # --help and mistyped options need not wait for the imports below
    PLOTTED = vars(build_parser().parse_args()).get("plot")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402

# #############################################################################################
#
#   PART I - THE METHOD: the training loop, and below it its Steps
#
# #############################################################################################

# Shapes: what is known of each token is (B, T), next to a mask that is True up to and including the
# first stop token. P prompts, K rollouts, B = P*K rows, T tokens, N of them under the mask, V
# vocabulary, D hidden size; b rows of a micro-batch; S rows of L tokens in one forward pass.

METHODS = {  # presets of the one loop: what is fixed here cannot be set by an option
    "vcopd": {},
    "rl": {"teacher": "none", "teacher_coef": 0.0},  # the verdict alone
    # blind distillation: A = 0, no gate, no clip, so A_dense is D. KL guard and replay stay
    "opd": {"blind": True, "teacher_coef": 1.0, "gate": "none", "gap_clip": math.inf},
    # reference answers instead of rollouts: none of the Steps 2 to 6, but their loop
    "sft": {"imitate": True, "teacher": "none", "teacher_coef": 0.0, "replay_share": 0.0},
}


def train(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> None:
    """Repeat Steps 2 to 6. Ctrl-C ends it after a step: raises KeyboardInterrupt, or NotFinite."""
    log = Log(out, cfg)
    with StopRequest() as stop, naming_prompts(policy, task, state, out, cfg):
        for step in range(state.step, cfg.steps):
            started = time.perf_counter()
            examples = examples_at(task, step, cfg)[rank()::world()]  # each device has its own
            if cfg.imitate:  # the SFT baseline
                samples = []
                metrics = sft_step(policy, policy.student, examples, state.optimizer, cfg)
            else:
                # Step 2: sample K answers to each prompt from the current student
                prompts = [policy.encode(example.prompt) for example in examples]
                generator = seeded("rollouts", cfg.seed, world() * step + rank())
                batch = sample(policy, policy.student, prompts, cfg.rollouts, cfg, generator)

                # Step 3: the verifier judges each answer; compare it with the others of its group
                examples = [example for example in examples for _ in range(cfg.rollouts)]
                answers = policy.decode(batch)
                verdicts = verify_all(task.verify, examples, answers)  # Eq. 1
                reward = torch.tensor([float(v.reward) for v in verdicts], device=policy.device)
                advantage = (torch.zeros_like(reward) if cfg.blind
                             else group_advantage(reward, cfg.rollouts))

                # Step 4: student (still pi_old), reference and teacher score these tokens once
                parts = score(policy, batch, examples, advantage, cfg)

                # Step 6: now and then, collect the student's best answers about old skills
                due = cfg.replay_share > 0 and task.anchors and step % cfg.replay_every == 0
                state.replay = (refresh_replay(policy, task.anchors, step, cfg) if due
                                else state.replay)

                # Step 5: learn from both; then tighten or relax the KL guard
                info = update(policy, parts, state, cfg)
                state.kl_coef = adapt_kl_coef(state.kl_coef, info["kl"], cfg)
                metrics = {**rollout_metrics(policy, batch, verdicts, parts, cfg), **info,
                           "kl_coef": state.kl_coef}
                samples = sample_records(step + 1, examples[:cfg.rollouts], answers, verdicts,
                                         advantage)

            # log; now and then look at validation problems, and save
            state.step = step + 1
            if state.step % cfg.eval_every == 0:
                metrics["eval_pass"] = on_rank_0(probe, policy, task, cfg)
            log.write({"step": state.step, **metrics}, samples, time.perf_counter() - started)
            stopping = over_ranks(int(stop.asked))
            if stopping or state.step == cfg.steps or state.step % cfg.save_every == 0:
                on_rank_0(save_checkpoint, out / "checkpoint", policy, state)
            if stopping and state.step < cfg.steps:
                raise KeyboardInterrupt


def update(policy: Policy, parts: list[Experience], state: State, cfg: Config) -> dict[str, float]:
    """Step 5: one optimiser step an epoch, on the sum of all micro-batches; logs the last epoch.

    In the first epoch the student still is pi_old: rho is 1, and the clip acts in later ones only.
    """
    tokens = over_ranks(sum(int(part.batch.mask.sum()) for part in parts))
    for epoch in range(cfg.epochs):
        replay = draw_replay(state, epoch, cfg)
        share = cfg.replay_share if replay else 0.0
        info: Counter[str] = Counter()
        for part in parts:
            hidden = completion_hidden(policy, policy.student, part.batch)
            terms = on_tokens(policy, token_terms, cfg.temperature, part.batch, hidden,
                              part.hidden_ref)
            loss, logged = vcopd_loss(terms, part, state.kl_coef, tokens, cfg)
            total_loss(loss, 0.0, share).backward()
            info.update({name: value.item() for name, value in logged.items()})
        if replay:
            info["replay_loss"] = imitate(policy, policy.student, replay,
                                          over_ranks(int(replay.mask.sum())), cfg.micro_tokens,
                                          cfg.temperature, share)
        grad_norm = optimizer_step(state.optimizer, cfg)
    return {**{name: over_ranks(value) for name, value in info.items()}, "grad_norm": grad_norm}


@dataclass
class State:
    """What a checkpoint holds besides the adapters' weights."""

    optimizer: torch.optim.Optimizer
    kl_coef: float
    step: int = 0
    replay: Batch | None = None
    before: dict = field(default_factory=dict)  # scores before training, to compare with


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
        """The chosen rows, cut to their longest completion."""
        longest = int(self.mask[index].sum(1).max())
        return Batch([self.contexts[i] for i in index.tolist()],
                     self.completion[index, :longest], self.mask[index, :longest])


Role = tuple[str, ...]  # the adapters that are switched on
BASE: Role = ()  # pi_0: none at all


@dataclass
class Policy:
    """The frozen model in all its roles. pi_theta is `student`, which trains adapter "policy"."""

    model: nn.Module
    tokenizer: object
    stop_ids: Tensor
    pad_id: int
    reference: Role = BASE  # pi_ref and the self teacher. differs: after Step 1
    specialist: bool = False  # the teacher is the adapter of that name
    stronger: Policy | None = None  # the teacher is another model
    pack: int = 1024  # tokens in a row of several answers: in longer ones attention costs more

    @property
    def teacher(self) -> tuple[Policy, Role]:
        """The model and the adapters of T: itself, unless another one was named."""
        if self.stronger:
            return self.stronger, BASE
        return self, ("specialist",) if self.specialist else self.reference

    @property
    def student(self) -> Role:
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
        """Completions as text, as written but for the stop token at the end."""
        stops = set(self.stop_ids.tolist())
        rows = [ids[:-1] if ids[-1] in stops else ids for ids in batch.answers()]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def adapters(model: nn.Module, names: Role):
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
    with adapters(policy.model, role):
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
    mask = stop_mask(completion, policy.stop_ids)
    completion = completion.masked_fill(~mask, policy.pad_id)
    contexts = [prompt for prompt in prompts for _ in range(k)]
    return Batch(contexts, completion, mask).rows(torch.arange(len(completion)))


# Step 3 - verdict: the advantage of each rollout within its group ============================

def verify_all(verify, examples: list, answers: list[str]) -> list[tasks.Verdict]:
    """Judge every answer, several at a time: the verifier may wait for other processes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(verify, examples, answers))


def group_advantage(reward: Tensor, k: int) -> Tensor:
    """Rewards (B,), prompt-major, compared within each group of K: -> (B,)."""
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
    advantage: Tensor | None = None  # (b,)
    logp_teacher: Tensor | None = None  # (b, T), None without a teacher
    logp_old: Tensor | None = None  # (b, T)
    gap: Tensor | None = None  # (b, T)


@torch.no_grad()
def score(policy: Policy, batch: Batch, examples: list[tasks.Example], advantage: Tensor,
          cfg: Config) -> list[Experience]:
    """Log-probs of the sampled tokens under pi_old, pi_ref and T, and the gap, in micro-batches.

    `examples` and `advantage` are of the B rows. The teacher reads the hint before the same ids.
    """
    parts = []
    for index in micro_batches(policy, batch, cfg.micro_tokens):
        some, logp_teacher = batch.rows(index), None
        hidden_ref = completion_hidden(policy, policy.reference, some)
        logp_old = log_probs(policy, policy.student, some, cfg.temperature)
        if has_teacher(cfg):
            teacher, role = policy.teacher
            hinted = [tasks.privileged_prompt(examples[i]) for i in index.tolist()]
            hinted = replace(some, contexts=[teacher.encode(prompt) for prompt in hinted])
            logp_teacher = log_probs(teacher, role, hinted, cfg.temperature)
        parts.append(Experience(some, index, hidden_ref, advantage[index], logp_teacher, logp_old,
                                teacher_gap(logp_teacher, logp_old, cfg.gap_clip)))
    return parts


def has_teacher(cfg: Config) -> bool:
    """Does anybody hint at tokens?"""
    return cfg.teacher != "none" and cfg.teacher_coef > 0


def log_probs(policy: Policy, role: Role, batch: Batch, temperature: float) -> Tensor:
    """log pi(a_t|s_t) of the batch's tokens under a role: (B, T). Has a gradient if that is on."""
    hidden = completion_hidden(policy, role, batch)
    return on_tokens(policy, token_logps, temperature, batch, hidden)


def completion_hidden(policy: Policy, role: Role, batch: Batch) -> Tensor:
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


def teacher_gap(logp_teacher: Tensor | None, logp_old: Tensor, clip: float) -> Tensor:
    """How much more the teacher likes each sampled token, clipped: (B, T). Carries no gradient."""
    if logp_teacher is None:  # without a teacher
        return torch.zeros_like(logp_old)
    return (logp_teacher - logp_old).clamp(-clip, clip).detach()  # Eq. 3


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


# Step 5 - update: clipped policy loss, exact KL, entropy =====================================

def token_terms(model: nn.Module, temperature: float, ids: Tensor, hidden: Tensor,
                hidden_ref: Tensor) -> Tensor:
    """Stacked (3, N): log pi_theta(a_t|s_t), KL(pi_theta || pi_ref) and entropy, both exact."""
    logp = F.log_softmax(head(model, hidden).float() / temperature, -1)  # (N, V), tempered too
    logp_ref = F.log_softmax(head(model, hidden_ref).float() / temperature, -1)
    kl = (logp.exp() * (logp - logp_ref)).sum(-1)  # that of Eq. 8
    entropy = -(logp.exp() * logp).sum(-1)  # Eq. 10
    return torch.stack([logp.gather(-1, ids[:, None])[:, 0], kl, entropy])


def vcopd_loss(terms: Tensor, part: Experience, kl_coef: float, tokens: int,
               cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and what to log. `terms` (3, b, T) are of `token_terms`.

    In the first epoch rho is 1. The *value* of the policy term is then minus the mean of A_dense:
    near 0, as advantages are centred. Its gradient, -mean(A_dense grad log pi), is not.
    """
    logp, kl, entropy = terms
    mask, eps = part.batch.mask, cfg.ratio_clip
    assert logp.shape == mask.shape == part.logp_old.shape == part.gap.shape
    dense = dense_advantage(part.advantage, part.gap, cfg)  # (b, T)
    log_ratio = (logp - part.logp_old).clamp(-20, 20)  # else exp overflows, and 0 * inf is NaN
    ratio = log_ratio.exp()  # Eq. 6
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


def adapt_kl_coef(kl_coef: float, kl: float, cfg: Config) -> float:
    """Tighten the guard when the policy strays, relax it otherwise; 0 stays 0, switched off.

    The rule is stationary when KL is above the target in 22 % of steps (1.2^.22 * .95^.78 = 1).
    """
    adapted = kl_coef * (1.2 if kl > cfg.kl_target else 0.95)  # Eq. 9
    return min(max(adapted, 1e-4), 10.0) if kl_coef else 0.0


# Step 6 - replay: old skills, in the current student's own words =============================

@torch.no_grad()
def refresh_replay(policy: Policy, anchors: list[tasks.Example], step: int, cfg: Config) -> Batch:
    """The student's answers to anchor prompts: the best `replay_keep` of each skill, right or not.

    Best by verifier score, and among equals by self-confidence (mean log-prob of a token).
    """
    prompts = [policy.encode(example.prompt) for example in anchors]
    batch = sample(policy, policy.student, prompts, 1, cfg, seeded("replay", cfg.seed, step))
    verdicts = verify_all(tasks.verify_skill, anchors, policy.decode(batch))
    confidence = torch.zeros(len(anchors))
    for index in micro_batches(policy, batch, cfg.micro_tokens):
        some = batch.rows(index)
        logp = log_probs(policy, policy.student, some, cfg.temperature)  # (b, T)
        confidence[index] = (logp.sum(1) / some.mask.sum(1)).cpu()
    by_skill: dict[str, list[int]] = {}  # else the easiest skills would fill the pool
    for i in sorted(range(len(anchors)), key=lambda i: (verdicts[i].reward, confidence[i].item())):
        by_skill.setdefault(anchors[i].skill, []).append(i)
    kept = [i for rows in by_skill.values()
            for i in rows[-math.ceil(cfg.replay_keep * len(rows)):]]
    return batch.rows(torch.tensor(kept))


def nll_loss(policy: Policy, role: Role, batch: Batch, temperature: float, tokens: int) -> Tensor:
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


class RunError(Exception):
    """Something a user can mend; shown as one sentence, exit code 2."""


class NotFinite(RunError):
    """A gradient with which no step can be taken."""


# Prompts as ids, padding, and randomness without a state =====================================


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """A user message in the model's chat template as ids, with exactly one BOS token.

    Templates write the BOS themselves, or leave it to the tokenizer; some models have none. A
    prompt that spells a special token stands aside while the template writes its own.
    """
    spells = any(token.special and token.content in prompt
                 for token in tokenizer.added_tokens_decoder.values())
    message = "\ufffc" if spells else prompt
    text = message + "\n"
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False)  # Qwen3: the answer at once
    pieces = [tokenizer(piece, add_special_tokens=False).input_ids
              for piece in (text.split(message) if spells else [text])]
    ids, *others = pieces
    for piece in others:
        ids = ids + plain_ids(tokenizer, prompt) + piece
    own = tokenizer("").input_ids[:1]  # what the tokenizer itself begins with
    missing = own == [tokenizer.bos_token_id] and ids[:1] != own
    return own + ids if missing else ids


def plain_ids(tokenizer, text: str) -> list[int]:
    """Text as ids, in which a special token's name is spelt like any other word."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


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

    Hu et al. 2021, arXiv:2106.09685. Held in float32, applied in the dtype of x, as by autocast.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.active: Role = BASE

    def put(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Hold an adapter: A (r, in), B (out, r), and what their product is multiplied by."""
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
    """A new adapter of every wrapped layer: A Kaiming uniform, B zero, so it changes nothing."""
    generator = seeded("adapter", name, seed)
    for layer in lora_layers(model).values():
        out_features, in_features = linear_shape(layer.base)
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        layer.put(name, a, torch.zeros(out_features, rank), alpha / rank)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The trainable A and B of one adapter."""
    layers = lora_layers(model).values()
    return [p for layer in layers for p in (layer.lora_A[name], layer.lora_B[name])]


def freeze(model: nn.Module, name: str) -> None:
    """Train this adapter no more."""
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)


# Reading, drawing and scoring tokens =========================================================


def read_tokens(policy: Policy, ids: Tensor, seen: Tensor, cache=None) -> tuple:
    """The last hidden state (B, D) of ids (B, L) behind a cache, and the cache with them.

    `seen` is False on padding, in the cache and in the ids.
    """
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    out = policy.model.base_model(ids, attention_mask=seen.long(), position_ids=positions,
                                  past_key_values=cache, use_cache=True)
    return out.last_hidden_state[:, -1], out.past_key_values


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row: logits (B, V) -> (B,). Temperature 0 is greedy.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = full = F.softmax(logits.float() / temperature, -1)
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
    """Hidden states (..., D) -> logits (..., V), as the model's own forward makes them."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
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
    """Ids (S, L), positions (S, L), attention mask, and the N places (in S * L) that predict.

    Padding stands on the right of a causal model, so no real token sees it.
    """
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
                              for column, value in ((0, policy.pad_id), (1, 0), (2, -1)))
    places = [i * ids.shape[1] + place for i, row in enumerate(rows) for place in row[3]]
    mask = None  # a causal model's own
    if len(rows) < len(answers):  # an answer sees the prompt and itself: (S, 1, L, L)
        seen = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)
        mask = torch.zeros(seen.shape, dtype=policy.model.dtype, device=policy.device)
        mask = mask.masked_fill(~seen.tril(), torch.finfo(mask.dtype).min)[:, None]
    return ids, positions, mask, torch.tensor(places, device=policy.device)


def micro_batches(policy: Policy, batch: Batch, most: int) -> list[Tensor]:
    """Row numbers, together where lengths are alike: about `most` tokens each, with padding."""
    lengths = batch.mask.sum(1).tolist()
    sized = [(len(batch.contexts[pack[0]]) + sum(lengths[i] for i in pack), pack)
             for pack in packs(batch, min(policy.pack, most))]
    found, members = [], []
    for size, pack in sorted(sized, key=lambda pair: pair[0]):
        if members and (len(members) + 1) * size > most:
            found.append(members)
            members = []
        members.append(pack)
    return [torch.tensor([i for pack in members for i in pack]) for members in [*found, members]]


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


# Imitation, the step of the optimiser, and what a training step reports ======================


def solution_batch(policy: Policy, examples: list[tasks.Example]) -> Batch:
    """Reference answers, each ending in the stop token, as a batch to imitate."""
    stop = int(policy.stop_ids[0])
    answers = [[*plain_ids(policy.tokenizer, e.reference), stop] for e in examples]
    completion, mask = (t.to(policy.device) for t in pad(answers, policy.pad_id))
    return Batch([policy.encode(e.prompt) for e in examples], completion, mask)


def imitate(policy: Policy, role: Role, batch: Batch, tokens: int,
            micro_tokens: int, temperature: float = 1.0, share: float = 1.0) -> float:
    """Add up the gradients of a share of the NLL over `tokens`; returns the NLL."""
    value = 0.0
    for index in micro_batches(policy, batch, micro_tokens):
        loss = nll_loss(policy, role, batch.rows(index), temperature, tokens)
        total_loss(0.0, loss, share).backward()
        value += loss.item()
    return value


def sft_step(policy: Policy, role: Role, examples: list[tasks.Example],
             optimizer: torch.optim.Optimizer, cfg: Config) -> dict[str, float]:
    """`epochs` optimiser steps towards the reference answers; returns what to log."""
    batch = solution_batch(policy, examples)
    tokens = over_ranks(int(batch.mask.sum()))
    for _ in range(cfg.epochs):
        nll = imitate(policy, role, batch, tokens, cfg.micro_tokens)
        grad_norm = optimizer_step(optimizer, cfg)
    return {"nll": over_ranks(nll), "grad_norm": grad_norm, "tokens": tokens}


def train_format(policy: Policy, task: tasks.Task, cfg: Config) -> None:
    """Step 1: one low-rate epoch of SFT on an adapter that is then frozen, part of pi_ref."""
    add_adapter(policy.model, "format", cfg.format_rank, cfg.format_rank, cfg.seed)
    policy.reference = (*policy.reference, "format")
    optimizer = torch.optim.Adam(adapter_parameters(policy.model, "format"), lr=cfg.format_lr)
    examples = task.train[:cfg.format_examples]
    order = torch.randperm(len(examples), generator=seeded("format", cfg.seed)).tolist()
    last = len(order) - world() + 1  # every rank needs an example
    for i in progress(range(0, last, cfg.prompts), "Step 1: format"):
        some = [examples[j] for j in order[i:i + cfg.prompts]][rank()::world()]
        sft_step(policy, policy.reference, some, optimizer, replace(cfg, epochs=1))
    freeze(policy.model, "format")


def draw_replay(state: State, epoch: int, cfg: Config) -> Batch | None:
    """As many kept samples as make `replay_share` of the rows. Their weight is r in any case."""
    if state.replay is None:
        return None
    rollouts = cfg.prompts * cfg.rollouts
    count = max(world(), round(rollouts * cfg.replay_share / (1 - cfg.replay_share)))
    generator = seeded("mix", cfg.seed, state.step, epoch)
    index = torch.randint(len(state.replay.contexts), (count,), generator=generator)
    return state.replay.rows(index[rank()::world()])


def optimizer_step(optimizer: torch.optim.Optimizer, cfg: Config) -> float:
    """Clip the gradient, take the step; its norm. Raises NotFinite instead, also of such a loss."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters if world() > 1 else ():
        dist.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(norm):
        rate = optimizer.param_groups[0]["lr"]
        raise NotFinite(f"the gradient is {norm}, so no step was taken: "
                        f"start a new run with a lower learning rate (now {rate:g})")
    optimizer.step()
    optimizer.zero_grad()
    return norm


@contextlib.contextmanager
def naming_prompts(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config):
    """Let NotFinite name step and prompts; save the state before, unless an epoch changed it."""
    try:
        yield
    except NotFinite as error:
        taken = max((int(m["step"]) for m in state.optimizer.state.values()), default=0)
        if taken == state.step * cfg.epochs:
            on_rank_0(save_checkpoint, out / "checkpoint", policy, state)
        ids = ", ".join(example.id for example in examples_at(task, state.step, cfg))
        raise NotFinite(f"step {state.step + 1}, on the examples {ids}: {error}; "
                        f"--resume {out} leads here again") from None


def rollout_metrics(policy: Policy, batch: Batch, verdicts: list[tasks.Verdict],
                    parts: list[Experience], cfg: Config) -> dict:
    """What verifier and teacher said. In tied groups hints alone teach: their mean |D| is apart."""
    reward = torch.tensor([float(v.reward) for v in verdicts]).view(-1, cfg.rollouts)
    tied = (reward.amax(1) == reward.amin(1)).repeat_interleave(cfg.rollouts)
    stopped = (torch.isin(batch.completion, policy.stop_ids) & batch.mask).any(1).cpu()
    hints, lengths = torch.zeros(len(tied)), batch.mask.sum(1).cpu()
    for part in parts:
        hints[part.index] = part.gap.abs().sum(1).cpu()
    table = torch.stack([tied, stopped, lengths, lengths * tied, hints, hints * tied]).double()
    tied, stopped, tokens, tokens_tied, hints, hints_tied = over_ranks(table.sum(1)).tolist()
    verdicts = over_ranks(verdicts)
    reasons = Counter(v.reason.split(":")[0].rstrip(" 0123456789") for v in verdicts)
    count = len(verdicts)
    return {"reward": sum(v.reward for v in verdicts) / count,
            "pass_rate": sum(v.passed for v in verdicts) / count,
            "format_rate": sum(v.formatted for v in verdicts) / count,
            "truncated": 1 - stopped / count, "tied_rollouts": tied / count, "tokens": int(tokens),
            "gap_tied": hints_tied / max(1, tokens_tied),
            "gap_untied": (hints - hints_tied) / max(1, tokens - tokens_tied),
            "reasons": dict(sorted(reasons.items()))}


def sample_records(step: int, examples: list, answers: list[str], verdicts: list,
                   advantage: Tensor) -> list[dict]:
    """Rollouts as people read them in samples.jsonl."""
    return [{"step": step, "id": example.id, "prompt": example.prompt, "answer": answer,
             "reward": verdict.reward, "reason": verdict.reason, "advantage": a.item()}
            for example, answer, verdict, a in zip(examples, answers, verdicts, advantage,
                                                   strict=False)]


# Several devices: torchrun --nproc_per_node N vcopd.py ... ===================================
#
# Each process ("rank") holds the whole model and samples its share of a step's prompts. Losses are
# divided by the token count of all ranks: gradients and metrics are summed, and weights, optimiser,
# beta and replay pool are the same everywhere. Rank 0 evaluates and writes.


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(cfg: Config) -> None:
    """Meet the other processes, if torchrun started this one. Raises RunError."""
    if not dist.is_torchelastic_launched():
        return
    count, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if (cfg.prompts % count or cfg.device not in ("auto", "cuda", "cpu")
            or cuda and local >= torch.cuda.device_count()):
        raise RunError(f"torchrun started {count} processes: --prompts {cfg.prompts} must be a "
                       f"multiple of that, --device {cfg.device} cuda or cpu, and every process "
                       "needs a GPU of its own with cuda")
    if cuda:
        torch.cuda.set_device(local)
    # others wait while rank 0 evaluates; when a process dies, torchrun ends them all
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=30))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 speaks for all


def over_ranks(value):
    """The sum of a number or tensor over all ranks; of lists, one behind the other."""
    if world() == 1:
        return value
    boxes: list = [None] * world()
    dist.all_gather_object(boxes, value)
    return sum(boxes[1:], boxes[0])


def on_rank_0(function, *args):
    """What the function returns on rank 0, where alone it is called: the others wait for it."""
    box = [function(*args) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# From the command line to a Config ===========================================================

COMMANDS = {  # what does not train one model, and the options that contradict it
    "eval_only": ("method", "steps", "merge"), "check": ("merge",), "inspect": ("merge",),
    "bench": ("merge",), "compare": ("method", "merge", "split"), "ablations": ("method", "merge")}


def usage_error(message: str) -> None:
    """One sentence on the error stream, exit code 2."""
    print(one_line(f"{message} (see --help)"), file=sys.stderr)
    sys.exit(2)


def one_line(message: object) -> str:
    """An error as users see it, whatever line breaks the names in it bring along."""
    return f"vcopd.py: {' '.join(str(message).split())}"


def read_config(arguments: list[str]) -> tuple[Config, bool]:
    """Defaults, then the presets of model, task and method, then what was said; resuming?"""
    said = vars(build_parser().parse_args(arguments))
    for name, value in said.items():
        if why := fault_in(name, value):
            usage_error(why)
    if "resume" in said:
        return saved_config(said.pop("resume"), said), True
    tiny = TINY if said.get("model", Config.model) == "tiny" else {}
    preset = tasks.PRESETS.get(said.get("task", Config.task), {})
    method = METHODS[said.get("method", Config.method)]
    cfg = Config(**{**tiny, **preset, **method, **said})
    commands = [name for name in COMMANDS if getattr(cfg, name)]
    ruled = dict.fromkeys(method, f"--method {cfg.method}")
    for command in commands:
        ruled |= dict.fromkeys({*COMMANDS, *COMMANDS[command]} - {command}, flag(command))
    for name in said.keys() & ruled.keys():
        usage_error(f"{flag(name)} contradicts {ruled[name]}, which settles it: leave one out")
    if cfg.task != "codeedit" and (cfg.data or cfg.eval_data):
        usage_error(f"--data and --eval-data are code edits: leave them out with --task {cfg.task}")
    if not has_teacher(cfg) and (cfg.blind or cfg.inspect or cfg.compare):
        usage_error("--method opd, --inspect and --compare need a teacher's hints: leave out "
                    "--teacher none, --teacher-coef 0 and methods without a teacher")
    if cfg.rollouts == 1 and not cfg.eval_only and (
            cfg.compare or not has_teacher(cfg) and not cfg.imitate):
        usage_error("--rollouts 1 leaves no other answer to compare with, and no teacher hints: "
                    "give at least 2")
    kind = commands[0].removesuffix("_only") if commands else f"{cfg.method}-s{cfg.seed}"
    return replace(cfg, out=cfg.out or f"runs/{cfg.task}-{kind}"), False


def fault_in(name: str, value) -> str:
    """Why an option cannot have this value, or ''."""
    option = {option.name: option for option in fields(Config)}.get(name)
    if option is None:  # --resume, --plot
        return ""
    meta, kind = option.metadata, type(option.default)
    if type(value) is not kind or value not in (meta.get("choices") or [value]):
        return f"{flag(name)} is {value!r}: give one of {meta.get('choices') or kind.__name__}"
    if kind in (int, float) and not meta["low"] <= value <= meta["high"]:
        return f"{flag(name)} is {value}: give a number from {meta['low']} to {meta['high']}"
    return ""


def saved_config(folder: str, said: dict) -> Config:
    """The Config of a run to go on with. What was said may only prolong or move it."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        saved = Config(**values)
        for name, value in values.items():
            if value != METHODS[saved.method].get(name) and (why := fault_in(name, value)):
                raise ValueError(why)
        if values.keys() != vars(saved).keys():
            raise ValueError("it lacks options")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        usage_error(f"--resume {folder}: no run of this version can be read there ({error}): give "
                    "the folder of a run, as --out named it")
    if saved.eval_only:
        usage_error(f"--resume {folder} holds an evaluation: give the folder of a training run")
    for name, value in said.items():
        if (name not in ("steps", "save_every", "device", "micro_tokens", "merge")
                and value != getattr(saved, name)):
            usage_error(f"{flag(name)} {value} would break the continuation of a run with "
                        f"{getattr(saved, name)}: leave it out, or start a new run")
    done = (Path(folder) / "report.json").exists() and "merge" not in said
    if done and said.get("steps", 0) <= saved.steps:
        print(f"The run in {folder} is finished: read report.json there, or train longer with "
              f"--resume {folder} --steps N, N above {saved.steps}")
        sys.exit(0)
    return replace(saved, **{**said, "out": folder})


# #############################################################################################
#
#   PART III - RUNNING IT: models, evaluation, run folder, commands
#
# #############################################################################################

# The built-in model: a small Llama that is pretrained on the spot ============================

TINY_RECIPE = {"vocab": 768, "hidden": 128, "layers": 4, "heads": 4, "init": 0.06,
               "documents": 12000, "steps": 700, "batch_tokens": 3200, "micro_tokens": 1024,
               "lr": 3e-3, "seed": 1}
CHAT = "{% for m in messages %}<|user|>{{ m.content }}<|end|><|assistant|>{% endfor %}"


def build_tiny(task: tasks.Task) -> Path:
    """The folder of the built-in model in the cache. The first call builds it. Raises RunError."""
    enough = 350 if task.name == "arithmetic" else math.inf  # sums are short
    recipe = {**TINY_RECIPE, "steps": min(TINY_RECIPE["steps"], enough)}
    rng = random.Random(recipe["seed"])
    documents = [tasks.web_document(task, rng) for _ in range(500)]  # tell one corpus from another
    digest = hashlib.sha256(json.dumps([recipe, CHAT, documents]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "vcopd")
    folder = cache / f"tiny-{task.name}-{digest}"
    if (folder / "config.json").exists():
        return folder
    print(f"Building the model tiny for {task.name}: a few minutes, once.", flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as aside:
            documents += [tasks.web_document(task, rng) for _ in range(500, recipe["documents"])]
            policy = pretrain(documents, recipe)
            policy.model.save_pretrained(aside)
            policy.tokenizer.save_pretrained(aside)
            os.rename(aside, folder)  # at the end: an interrupted build leaves no model
    except OSError as error:
        if not (folder / "config.json").exists():  # else another process was first
            raise RunError(f"the cache {cache} cannot hold the model tiny ({error}): name another "
                           "folder in XDG_CACHE_HOME") from None
    return folder


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


def pretrain(documents: list[tuple[str, str]], recipe: dict) -> Policy:
    """A small Llama, trained on the answers only: at this size, else copying never emerges."""
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = train_tokenizer([text for pair in documents for text in pair], recipe["vocab"])
    width, stop = recipe["hidden"], tokenizer.eos_token_id
    torch.manual_seed(recipe["seed"])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=recipe["layers"], num_attention_heads=recipe["heads"],
        initializer_range=recipe["init"],  # 0.02 is for wide models: here copying emerges later
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=stop, pad_token_id=stop))
    policy = Policy(model, tokenizer, torch.tensor([stop]), stop)
    corpus = solution_batch(policy, [tasks.Example("", *pair, "") for pair in documents])
    tokens = sum(map(len, corpus.contexts)) + int(corpus.mask.sum())
    size = recipe["batch_tokens"] * len(documents) // tokens  # rows of a batch
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(recipe["seed"])
    for step in progress(range(recipe["steps"]), "building tiny"):
        schedule = min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 - step / recipe["steps"]))
        optimizer.param_groups[0]["lr"] = recipe["lr"] * schedule
        batch = corpus.rows(torch.tensor(rng.choices(range(len(documents)), k=size)))
        optimizer.zero_grad()
        imitate(policy, BASE, batch, int(batch.mask.sum()), recipe["micro_tokens"])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return policy


def progress(items, what: str):
    """A progress bar with the time left, where somebody is watching."""
    return tqdm(items, what, file=sys.stdout, mininterval=1, disable=None, leave=False)


# Real models: any causal LM, as student or as teacher, and adapters in PEFT's format =========

RECOMPUTE_FROM = 300_000_000  # parameters: in larger models memory is dearer than time


def load_policy(cfg: Config, task: tasks.Task | None) -> Policy:
    """A causal LM in all its roles, with a fresh policy adapter. Raises RunError."""
    name = str(on_rank_0(build_tiny, task)) if cfg.model == "tiny" else cfg.model
    base = adapter_settings(Path(name))["base_model_name_or_path"] if is_adapter(name) else name
    policy = load_frozen(base, cfg)
    if is_adapter(name):  # frozen like the format adapter: the reference is the model as given
        load_adapter(policy.model, "start", Path(name))
        policy.reference = ("start",)
    add_adapter(policy.model, "policy", cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    if has_teacher(cfg) and is_adapter(cfg.teacher):
        load_adapter(policy.model, "specialist", Path(cfg.teacher))
        policy.specialist = True
    elif has_teacher(cfg) and cfg.teacher != "self":
        policy.stronger = load_frozen(cfg.teacher, cfg)
        if policy.stronger.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise RunError(f"--teacher {cfg.teacher} has another tokenizer than the student, and "
                           "must know every token by the same id: give one of the same family")
    return policy


def load_frozen(name: str, cfg: Config) -> Policy:
    """A causal LM and its tokenizer: frozen, wrapped in LoRA and checked. Raises RunError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()  # of reading files; downloads keep theirs
    fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    place = fastest if cfg.device == "auto" else cfg.device
    try:
        device = torch.empty(0, device=place).device
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = ("bfloat16" if bf16 else "float32") if cfg.dtype == "auto" else cfg.dtype
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if info["missing_keys"]:
            raise RunError(f"it holds no weights for {min(info['missing_keys'])}")
        large = sum(p.numel() for p in model.parameters()) >= RECOMPUTE_FROM
        wrap_linears(model.eval())  # no dropout while scoring
        if cfg.quantize == "nf4":
            quantize_linears(model, device)
        if large or cfg.quantize == "nf4":  # else autograd keeps every dequantised weight
            recompute_layers(model)
        stops = stop_tokens(tokenizer, model.generation_config)
        pad_id = stops[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        local = ("sliding_window", "attention_chunk_size", "window_size")
        alone = any(getattr(model.config, key, None) for key in local)  # no mask fits all layers
        policy = Policy(model.to(device), tokenizer, torch.tensor(stops, device=device), pad_id,
                        pack=0 if alone else Policy.pack)
        self_check(policy)
    except Exception as error:  # of any kind, where a file is damaged
        why = (str(error) or repr(error)).splitlines()[0].rstrip(".")
        raise RunError(f"{name} cannot be used on --device {place}: {why}; give a folder or a "
                       "Hugging Face id that is whole and reachable, or tiny (if it is damaged, "
                       "delete its folder: it is built again)") from None
    return policy


def stop_tokens(tokenizer, generation_config) -> list[int]:
    """Every id that ends an answer. SFT teaches the first: a chat's own end of turn."""
    if tokenizer.eos_token_id is None:
        raise RunError("its tokenizer has no end-of-sequence token, so no answer could end")
    others = generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])]
    if tokenizer.chat_template is not None:  # the special token that it writes behind an answer
        chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        first = tokenizer(text, add_special_tokens=False).input_ids[:1]
        found = [i for i in first if i in special] + found
    return list(dict.fromkeys(i for i in found if i is not None))


@torch.no_grad()
def self_check(policy: Policy) -> None:
    """Raise RunError unless sampling and scoring can rely on the model.

    Its own logits, against `head` of the hidden states: for a prompt with padding on its left and
    another token on its right, and for an answer that shares its prompt with another answer.
    """
    ids = policy.encode("Hello")
    row = torch.tensor([[policy.pad_id, *ids, ids[0]]], device=policy.device)
    seen = torch.ones_like(row)
    seen[0, 0] = 0
    out = policy.model.base_model(row, attention_mask=seen, use_cache=False,
                                  position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    answers = torch.tensor([ids[:1] * 2, ids[-1:] * 2], device=policy.device)  # (2, 2)
    batch = Batch([ids] * 2, answers, torch.ones_like(answers, dtype=torch.bool))
    shared = completion_hidden(policy, BASE, batch)
    for context, hidden in ((ids, out.last_hidden_state[0, -2]), ([*ids, ids[-1]], shared[-1])):
        own = policy.model(torch.tensor([context], device=policy.device)).logits[0, -1].float()
        error = ((head(policy.model, hidden).float() - own).abs().max() / own.abs().max()).item()
        if not error <= (1e-3 if policy.model.dtype == torch.float32 else 0.05):  # bf16 has 8 bits
            raise RunError(f"the architecture {policy.model.config.model_type} is not supported: "
                           f"its logits differ from head(hidden states) by {error:.0%} (scaled "
                           "logits, odd positions, attention to later tokens, or an own mask)")


def recompute_layers(model: nn.Module) -> None:
    """Let each decoder layer keep its input only: a third more work, far less memory."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(recomputed, model, layer.forward)


def recomputed(model: nn.Module, forward, *inputs, **options):
    """A forward pass that backward repeats, with the adapters of now: by then `with` is over."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    active = next(iter(lora_layers(model).values())).active
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (contextlib.nullcontext(), adapters(model, active)),
                      **options)


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
    """Wrapped layers in NF4, one by one: the device never holds them all. Raises RunError."""
    for path, layer in lora_layers(model).items():
        if type(layer.base) is not nn.Linear:
            raise RunError(f"--quantize nf4 needs plain linear layers, and {path} is none")
        layer.base = NF4Linear(layer.base.to(device))


def is_adapter(name: str) -> bool:
    """Is it a folder that PEFT has written?"""
    return (Path(name) / "adapter_config.json").exists()


def adapter_settings(folder: Path) -> dict:
    """The adapter_config.json of a plain LoRA. Raises RunError for anything else, by its name.

    Most variants leave weights of their own, which `load_adapter` refuses.
    """
    plain = {"peft_type": ["LORA"], "init_lora_weights": [None, True, False, "gaussian", "eva"]}
    plain |= dict.fromkeys(("alpha_pattern", "use_qalora", "arrow_config"), [None, False, {}])
    with reading(folder / "adapter_config.json", "give the folder of a LoRA adapter of PEFT"):
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        settings |= {"r": int(settings["r"]), "lora_alpha": float(settings["lora_alpha"]),
                     "base_model_name_or_path": str(settings["base_model_name_or_path"])}
        odd = [key for key, values in plain.items() if settings.get(key) not in values]
    if odd:
        raise RunError(f"{folder} is not plain LoRA: {odd[0]} is {settings[odd[0]]!r}, which is "
                       "not supported")
    return settings


def load_adapter(model: nn.Module, name: str, folder: Path) -> None:
    """A PEFT LoRA folder as a frozen adapter. Raises RunError where it does not fit.

    Layers that it leaves out, or adapts at a lower rank, are filled up with zeros.
    """
    from safetensors.torch import load_file
    settings = adapter_settings(folder)
    with reading(folder / "adapter_model.safetensors", "give the whole folder of an adapter"):
        weights = load_file(folder / "adapter_model.safetensors")
    rank = max((len(w) for key, w in weights.items() if ".lora_A." in key), default=1)
    for path, layer in lora_layers(model).items():
        out_features, in_features = linear_shape(layer.base)
        a = weights.pop(f"base_model.model.{path}.lora_A.weight", torch.zeros(0, in_features))
        b = weights.pop(f"base_model.model.{path}.lora_B.weight", torch.zeros(out_features, 0))
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


@torch.no_grad()
def export_adapter(folder: Path, policy: Policy) -> None:
    """The student as one adapter in PEFT's format.

    A sum of low-rank updates is one update of the summed rank: [s1 B1, s2 B2] [A1; A2].
    """
    from safetensors.torch import save
    layers, names, weights = lora_layers(policy.model), policy.student, {}
    for path, layer in layers.items():
        key = f"base_model.model.{path}.lora_"
        weights[f"{key}A.weight"] = torch.cat([layer.lora_A[n] for n in names])
        weights[f"{key}B.weight"] = torch.cat([layer.lora_B[n] * layer.scale[n] for n in names], 1)
    rank = sum(len(layer.lora_A[n]) for n in names)
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": policy.model.name_or_path,
        "fan_in_fan_out": hasattr(layer.base, "nf"),
        "target_modules": sorted({path.split(".")[-1] for path in layers})})


@torch.no_grad()
def export_merged(folder: Path, policy: Policy) -> None:
    """The student as a plain model with its tokenizer: W + s B A in the dtype of W."""
    layers = lora_layers(policy.model)
    wrapped = tuple(f"{path}." for path in layers)
    state = {k: w for k, w in policy.model.state_dict().items() if not k.startswith(wrapped)}
    for path, layer in layers.items():
        weight, bias = layer.base.weight, layer.base.bias
        change = sum(layer.scale[n] * layer.lora_B[n] @ layer.lora_A[n] for n in policy.student)
        change = change.T if hasattr(layer.base, "nf") else change
        state[f"{path}.weight"] = (weight.float() + change).to(weight.dtype).cpu()
        state |= {} if bias is None else {f"{path}.bias": bias}
    policy.model.save_pretrained(folder, state_dict=state)
    policy.tokenizer.save_pretrained(folder)


# Evaluation and verdict. It draws from its own generators: training never notices ============

SLICE = 256  # answers that are sampled at one time
PASS_K = 4  # k of pass@k: a constant, so that runs with other --rollouts can be compared


def mean(values) -> float:
    """Arithmetic mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def first_split(scores: dict):
    """What belongs to the split that the verdict is about."""
    return next(iter(scores.values()))


def answers_to(policy: Policy, role: Role, examples: list, k: int, temperature: float,
               cfg: Config) -> tuple[list[Batch], list[str]]:
    """K answers to each example, example-major: as batches of ids, and as one list of texts."""
    cfg, size = replace(cfg, temperature=temperature, top_p=1.0), max(1, SLICE // k)
    batches = []
    for i in range(0, len(examples), size):
        prompts = [policy.encode(example.prompt) for example in examples[i:i + size]]
        batches.append(sample(policy, role, prompts, k, cfg, seeded("evaluation", i)))
    return batches, [text for batch in batches for text in policy.decode(batch)]


def greedy_verdicts(policy: Policy, role: Role, examples: list, verify,
                    cfg: Config) -> list[tasks.Verdict]:
    """What the verifier says of the most likely answer to each example."""
    return verify_all(verify, examples, answers_to(policy, role, examples, 1, 0.0, cfg)[1])


def few(task: tasks.Task, cfg: Config) -> list[tasks.Example]:
    """Validation problems for a look that steers a run: it sees no problem of the report."""
    return task.validation[0][:min(64, cfg.eval_problems)]


def probe(policy: Policy, task: tasks.Task, cfg: Config) -> float:
    """The student's greedy pass rate on a few validation problems, while training runs."""
    verdicts = greedy_verdicts(policy, policy.student, few(task, cfg), task.verify, cfg)
    return mean(verdict.passed for verdict in verdicts)


@torch.no_grad()
def kl_and_entropy(policy: Policy, p: Role, q: Role, batches: list[Batch],
                   cfg: Config) -> tuple[float, float]:
    """KL(p || q) and entropy of p, nats per token, exact over the vocabulary at temperature 1.

    `batches` are samples of p at temperature 1, so the states are those that p visits.
    """
    sums, tokens = torch.zeros(2), sum(int(batch.mask.sum()) for batch in batches)
    for part in (b.rows(i) for b in batches for i in micro_batches(policy, b, cfg.micro_tokens)):
        hidden = [completion_hidden(policy, role, part) for role in (p, q)]
        sums += on_tokens(policy, token_terms, 1.0, part, *hidden)[1:].sum((1, 2)).cpu()
    kl, entropy = (sums / max(1, tokens)).tolist()
    return kl, entropy


def split_scores(policy: Policy, task: tasks.Task, role: Role, examples: list,
                 cfg: Config) -> tuple[dict, list[Batch]]:
    """Scores on one set of problems, and k samples of each at temperature 1.

    Edit metrics are means over samples that pass, None without: a failing edit repairs nothing.
    """
    _, texts = answers_to(policy, role, examples, 1, 0.0, cfg)
    passes = [int(verdict.passed) for verdict in verify_all(task.verify, examples, texts)]
    batches, samples = answers_to(policy, role, examples, PASS_K, 1.0, cfg)
    verdicts = verify_all(task.verify, [e for e in examples for _ in range(PASS_K)], samples)
    groups = [verdicts[i:i + PASS_K] for i in range(0, len(verdicts), PASS_K)]
    scores = {"pass@1": mean(passes), "pass@k": mean(any(v.passed for v in g) for g in groups),
              "reward": mean(v.reward for v in verdicts),
              "format": mean(v.formatted for v in verdicts)}
    for name in task.edit_metrics:
        values = [v.metrics[name] for v in verdicts if v.passed]
        scores[name] = mean(values) if values else None
    return {**scores, "passes": passes, "answers": texts}, batches


def evaluate(policy: Policy, task: tasks.Task, role: Role, cfg: Config) -> dict:
    """All that the report says of one role; `passes` and `answers` are per problem.

    KL is in nats per token. Training does not change the teacher: it is not measured again then.
    """
    scores, batches = {}, {}
    for split, examples in task.evals.items():
        scores[split], batches[split] = split_scores(policy, task, role,
                                                     examples[:cfg.eval_problems], cfg)
    verdicts = greedy_verdicts(policy, role, task.benchmark, tasks.verify_skill, cfg)
    old = [(example.skill, v.reward) for example, v in zip(task.benchmark, verdicts, strict=True)]
    scores["general"] = {"mean": mean(reward for _, reward in old), **{
        skill: mean(reward for name, reward in old if name == skill) for skill in dict(old)}}
    problems, visited = first_split(task.evals)[:cfg.eval_problems], first_split(batches)
    from_base, _ = answers_to(policy, BASE, problems, 1, 1.0, cfg)
    anchors, _ = answers_to(policy, role, task.anchors, 1, 1.0, cfg)
    scores["kl_to_base"], scores["entropy"] = kl_and_entropy(policy, role, BASE, visited, cfg)
    scores["kl_from_base"], _ = kl_and_entropy(policy, BASE, role, from_base, cfg)
    scores["kl_to_reference"], _ = kl_and_entropy(policy, role, policy.reference, visited, cfg)
    _, scores["entropy_anchors"] = kl_and_entropy(policy, role, BASE, anchors, cfg)
    readers = {"pass@1_with_hint": (policy, role)}
    if has_teacher(cfg) and role != policy.student:
        readers["pass@1_of_teacher"] = policy.teacher
    hinted = [replace(e, prompt=tasks.privileged_prompt(e)) for e in problems]
    for name, reader in readers.items():
        verdicts = greedy_verdicts(*reader, hinted, task.verify, cfg)
        scores[name] = mean(verdict.passed for verdict in verdicts)
    return scores


def paired_bootstrap(before: list[int], after: list[int]) -> tuple[float, float]:
    """95 % interval of the mean change, resampling problems (Efron 1979)."""
    change = np.array(after) - np.array(before)
    picks = np.random.default_rng(0).integers(len(change), size=(10_000, len(change)))
    low, high = np.quantile(change[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def judge_run(before: dict, after: dict, edit_metrics: tuple, cfg: Config) -> dict:
    """Improved only if every condition of the essay holds. Each shows its numbers."""
    old, new = first_split(before), first_split(after)
    low, high = paired_bootstrap(old["passes"], new["passes"])
    general, kl = (before["general"]["mean"], after["general"]["mean"]), after["kl_to_base"]
    on_task, on_anchors = (after[name] / before[name] if before[name] else 1.0  # without anchors
                           for name in ("entropy", "entropy_anchors"))
    found = {
        "pass rate up": (low > 0, f"{old['pass@1']:.3f} -> {new['pass@1']:.3f}, 95 % interval of "
                                  f"the change [{low:+.3f}, {high:+.3f}]"),
        "general benchmark kept": (general[1] - general[0] >= -0.02,
                                   "{:.3f} -> {:.3f}, may fall by 0.02".format(*general)),
        "KL within budget": (kl <= cfg.kl_budget, f"{kl:.4f} of {cfg.kl_budget} nats/token"),
        "entropy kept": (on_task >= 0.3 and on_anchors >= 0.8,
                         f"x{on_task:.2f} on the task (at least 0.3), "
                         f"x{on_anchors:.2f} on anchors (at least 0.8)")}
    if "excess_edit" in edit_metrics:
        edits = [old["excess_edit"], new["excess_edit"]]
        shown = ["nothing passes" if edit is None else f"{edit:.4f}" for edit in edits]
        found["extra edits not up"] = (None in edits or edits[1] <= edits[0], " -> ".join(shown))
    return {"improved": all(holds for holds, _ in found.values()),
            "conditions": {name: {"holds": bool(holds), "numbers": numbers}
                           for name, (holds, numbers) in found.items()}}


# The run folder: config, metrics, samples, checkpoint, adapter, report; and the log ==========


@contextlib.contextmanager
def reading(path: Path, advice: str):
    """Where something is missing, damaged or foreign, raise RunError instead of what it raises."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # of any kind, where a file is damaged
        raise RunError(f"{path} cannot be used ({error!r}): {advice}") from None


def write_atomic(path: Path, data: bytes) -> None:
    """The old file or the new one, never half of it, even if the disk is full."""
    aside = path.with_name(f"{path.name}.new")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else the name could be on the disk before the content
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Indented JSON, written atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path):
    """The JSON in a file; of a .jsonl file, the list of its objects. Raises RunError."""
    with reading(path, "give a whole run, or delete this one: it is made again"):
        text = path.read_text("utf-8")
        return json.loads(f"[{','.join(text.splitlines())}]" if path.suffix == ".jsonl" else text)


def append_jsonl(path: Path, records: list[dict]) -> None:
    """One object a line, on the disk before a checkpoint can say that the step was taken."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def save_checkpoint(folder: Path, policy: Policy, state: State) -> None:
    """All that training changes, and how long the .jsonl files are. Generators have no state."""
    weights, buffer = policy.model.state_dict(), io.BytesIO()
    torch.save({**vars(state), "replay": state.replay and vars(state.replay),
                "optimizer": state.optimizer.state_dict(), "reference": policy.reference,
                "adapters": {name: w for name, w in weights.items() if ".lora_" in name},
                "sizes": {p.name: p.stat().st_size for p in folder.parent.glob("*.jsonl")}}, buffer)
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "state.pt", buffer.getvalue())


def load_checkpoint(folder: Path, policy: Policy, state: State, cfg: Config) -> dict[str, int]:
    """Put the saved state back; returns the sizes for `rewind`. Raises RunError."""
    with reading(folder, "resume with what the run was started with, or start a new one"):
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if "format" in saved["reference"]:
            add_adapter(policy.model, "format", cfg.format_rank, cfg.format_rank, cfg.seed)
            freeze(policy.model, "format")
        policy.reference = saved["reference"]
        found = policy.model.load_state_dict(saved["adapters"], strict=False)
        if other := [*found.unexpected_keys, *(k for k in found.missing_keys if ".lora_" in k)]:
            raise ValueError(f"other adapters: {other[0]}")
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step, state.kl_coef, state.before = (saved[n] for n in ("step", "kl_coef", "before"))
        state.replay = saved["replay"] and Batch(saved["replay"]["contexts"], *(
            saved["replay"][name].to(policy.device) for name in ("completion", "mask")))
    if state.step > cfg.steps:
        raise RunError(f"--steps {cfg.steps} is over: step {state.step} is saved, give at least it")
    return saved["sizes"]


def holds_run(out: Path, cfg: Config) -> bool:
    """Is this very run in the folder? Raises RunError where there is another."""
    if not any(out.glob("*.json*")):
        return False
    with reading(out / "config.json", "give another --out, or delete the folder"):
        if {**json.loads((out / "config.json").read_text("utf-8")), "out": cfg.out} != asdict(cfg):
            raise RunError(f"{out} holds a run of other options: give another --out, or delete it")
    return True


def rewind(out: Path, sizes: dict[str, int], cfg: Config) -> None:
    """The run folder as it was when its files had these sizes. Raises RunError."""
    (out / "report.json").unlink(missing_ok=True)
    write_json(out / "config.json", asdict(cfg))
    for name, size in sizes.items():
        with open(out / name, "ab") as file:
            if file.tell() < size:
                raise RunError(f"{out / name} lacks steps of the checkpoint: start a new run")
            file.truncate(size)


class StopRequest:
    """Ctrl-C and SIGTERM as a request to stop after the step; a second one stops at once."""

    asked = False

    def __enter__(self) -> StopRequest:
        self.handlers = {number: signal.signal(number, self.ask)
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ask(self, *signal_and_frame) -> None:
        """The signal handler. torchrun passes one Ctrl-C on more than once, so it only asks."""
        if self.asked and world() == 1:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nStopping after this step; once more stops at once.\n")  # print may be busy


COLUMNS = {"step": "5.0f", "reward": "8.3f", "pass_rate": "9.2f", "format_rate": "11.2f",
           "tied_rollouts": "13.2f", "kl": "8.4f", "kl_coef": "8.4f", "entropy": "8.3f",
           "teacher_share": "13.3f", "nll": "8.3f", "eval_pass": "9.2f", "seconds": "7.1f"}
PATIENCE = 20  # steps in a row until a warning


class Log:
    """What rank 0 writes of each step: to metrics.jsonl, samples.jsonl and the terminal."""

    def __init__(self, out: Path, cfg: Config):
        self.out, self.cfg = out, cfg
        self.recent, self.warned = deque(maxlen=PATIENCE), set()
        print(" ".join(f"{name:>{form.split('.')[0]}}" for name, form in COLUMNS.items()))

    def write(self, metrics: dict, samples: list[dict], seconds: float) -> None:
        """Append a step; a column that its method does not have stays blank."""
        if rank() > 0:
            return
        append_jsonl(self.out / "metrics.jsonl", [metrics])
        append_jsonl(self.out / "samples.jsonl", samples)
        shown = {**metrics, "seconds": seconds}
        print(" ".join(f"{shown[name]:{form}}" if name in shown else " " * int(form.split(".")[0])
                       for name, form in COLUMNS.items()), flush=True)
        self.recent.append(metrics)
        for warning in warnings_of(list(self.recent), self.cfg) - self.warned:
            print(f"Warning: {warning}", flush=True)
            self.warned.add(warning)


def warnings_of(recent: list[dict], cfg: Config) -> set[str]:
    """What has been wrong in each of the last PATIENCE steps, and what to do about it."""
    found, full = set(), len(recent) == PATIENCE
    if full and min(m.get("kl", 0.0) for m in recent) > 3 * cfg.kl_budget:
        found.add(f"KL has been over 3 times --kl-budget for {PATIENCE} steps: the model forgets. "
                  "Start anew with a lower --lr, a higher --kl-coef or fewer --steps")
    if full and not cfg.blind and min(m.get("tied_rollouts", 0.0) for m in recent) == 1:
        found.add(f"no group has had a better and a worse answer for {PATIENCE} steps: take easier "
                  "or harder problems, more --rollouts, a higher --temperature")
    return found


# A whole run, and what the terminal shows of it ==============================================


def load_task(cfg: Config) -> tuple[tasks.Task, int]:
    """The task with the user's data files in place of its own, and how many rows are left out.

    Without --skip-bad-rows and --check, the first row that cannot work raises LoadError.
    """
    task, rows, refused = tasks.TASKS[cfg.task](), {}, 0
    for name, load in (("data", tasks.load_edits), ("eval_data", tasks.load_edits),
                       ("benchmark", tasks.load_benchmark)):
        if path := getattr(cfg, name):
            bad = [] if cfg.skip_bad_rows or cfg.check else None
            rows[name] = load(path, bad)
            if bad is not None:
                print(f"{path}: {len(rows[name])} rows work, {len(bad)} are left out",
                      *(bad if cfg.check else bad[:1]), sep="\n    ")
                refused += len(bad)
    problems, old_skills = rows.get("eval_data", task.validation[0]), task.validation[1]
    task = replace(task, train=rows.get("data", task.train), validation=(problems, old_skills),
                   evals={"eval_data": problems} if cfg.eval_data else task.evals,
                   benchmark=rows.get("benchmark", task.benchmark))
    if cfg.split == "validation":
        task = replace(task, evals={"validation": problems}, benchmark=old_skills)
    stride = math.ceil(len(task.benchmark) / cfg.eval_problems) or 1  # some of every skill
    return replace(task, benchmark=task.benchmark[::stride]), refused


def fit_task(policy: Policy, task: tasks.Task, cfg: Config) -> tasks.Task:
    """The task, where prompt and answer fit what the model reads. Tells of too long references.

    Raises RunError for a row that does not fit, or leaves it out with --skip-bad-rows.
    """
    limit = min(getattr(reader.model.config, "max_position_embeddings", None) or math.inf
                for reader in (policy, policy.teacher[0]))
    rows = [example for part in (task.train, *task.evals.values()) for example in part]
    sizes = solution_batch(policy, rows).mask.sum(1).tolist()
    if cfg.check or max(sizes) > cfg.max_new_tokens:
        print(f"{sum(size > cfg.max_new_tokens for size in sizes)} of {len(rows)} references are "
              f"longer than --max-new-tokens {cfg.max_new_tokens}; the longest, of "
              f"{rows[np.argmax(sizes)].id}, has {max(sizes)} tokens")
    parts = {"train": task.train, "validation": task.validation[0]} if not cfg.eval_only else {}
    parts |= {**task.evals, **({"benchmark": task.benchmark} if task.benchmark else {})}
    for split, examples in parts.items():
        hinted = split in task.evals or split == "train" and has_teacher(cfg)
        sizes = [max(len(policy.encode(prompt)) for prompt in
                     (e.prompt, tasks.privileged_prompt(e))[:1 + hinted]) for e in examples]
        parts[split] = [e for e, size in zip(examples, sizes, strict=True)
                        if size + cfg.max_new_tokens <= limit]
        left_out = len(examples) - len(parts[split])
        told = (f"{split}: the longest prompt, of {examples[np.argmax(sizes)].id}, has "
                f"{max(sizes)} tokens, and with --max-new-tokens {cfg.max_new_tokens} it must fit "
                f"into the {limit} that the model reads")
        if left_out and not (parts[split] and (cfg.skip_bad_rows or cfg.check)):
            raise RunError(f"{told}: lower that, shorten the prompt, or give --skip-bad-rows")
        if left_out or cfg.check:
            print(f"{told}: {left_out} of {len(examples)} rows are left out")
    return replace(task, train=parts.get("train", []), benchmark=parts.get("benchmark", []),
                   validation=(parts.get("validation", []), task.validation[1]),
                   evals={split: parts[split] for split in task.evals})


def examples_at(task: tasks.Task, step: int, cfg: Config) -> list[tasks.Example]:
    """The P examples of a step: every epoch is a new shuffle, known from the seed alone."""
    size = len(task.train)
    places = range(step * cfg.prompts, (step + 1) * cfg.prompts)
    orders = {e: torch.randperm(size, generator=seeded("data", cfg.seed, e)).tolist()
              for e in {place // size for place in places}}
    return [task.train[orders[place // size][place % size]] for place in places]


def environment(policy: Policy) -> dict:
    """What a result depends on besides the code, and what of the model is trained."""
    import transformers
    model, beyond = policy.model, Counter()  # layers that LoRA cannot wrap: experts, convolutions
    wrapped = {id(p) for layer in lora_layers(model).values() for p in layer.parameters()}
    for module in model.base_model.modules():
        matrices = [p.numel() for p in module.parameters(recurse=False)
                    if p.dim() > 1 and id(p) not in wrapped]
        if matrices and not isinstance(module, nn.Embedding):
            beyond[type(module).__name__] += sum(matrices)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(2 * m.packed.numel() for m in model.modules() if isinstance(m, NF4Linear))
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "device": str(policy.device),
            "dtype": str(model.dtype), "threads": torch.get_num_threads(),
            "trained_parameters": trained,
            "frozen_parameters": sum(p.numel() for p in model.parameters()) - trained + packed,
            "out_of_reach_of_lora": dict(beyond),
            "judge": tasks.judge_layers()}


def start(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> None:
    """Begin a run: Step 1 if the format needs it, the scores of the base, checkpoint 0."""
    on_rank_0(shutil.rmtree, out / "checkpoint", True)
    on_rank_0(rewind, out, {"metrics.jsonl": 0, "samples.jsonl": 0}, cfg)
    given, looks = policy.reference, few(task, cfg)
    verdicts = on_rank_0(greedy_verdicts, policy, given, looks, task.verify, cfg)
    rate = mean(verdict.formatted for verdict in verdicts)
    if rate < cfg.format_threshold:
        print(f"Step 1: {rate:.0%} of the answers are well-formed, below --format-threshold "
              f"{cfg.format_threshold:.0%}: format SFT first", flush=True)
        train_format(policy, task, cfg)
        verdicts = on_rank_0(greedy_verdicts, policy, policy.reference, looks, task.verify, cfg)
        print(f"Step 1: now {mean(verdict.formatted for verdict in verdicts):.0%} are")
    print("Evaluating the base ...", flush=True)
    state.before = on_rank_0(evaluate, policy, task, given, cfg)
    on_rank_0(save_checkpoint, out / "checkpoint", policy, state)


def finish(policy: Policy, task: tasks.Task, state: State, out: Path, cfg: Config) -> dict:
    """Score and export the trained student; show two problems that it learnt; the verdict."""
    print("Evaluating the student ...", flush=True)
    before, after = state.before, evaluate(policy, task, policy.student, cfg)
    after |= {key: before[key] for key in before.keys() - after.keys()}  # that of the teacher
    export_adapter(out / "adapter", policy)
    if cfg.merge:
        export_merged(Path(cfg.merge), policy)
    old, new = first_split(before), first_split(after)
    learnt = [i for i, passed in enumerate(new["passes"]) if passed > old["passes"][i]]
    for i in learnt[:2]:
        example = first_split(task.evals)[i]
        shown = (example.buggy or example.prompt).splitlines()
        for when, scores in (("before", old), ("after", new)):
            lines = difflib.unified_diff(shown, scores["answers"][i].splitlines(), "problem",
                                         "answer", lineterm="", n=9)
            print(f"\nHeld-out problem {example.id}, {when}:")
            print("\n".join(lines) or "(the problem, unchanged)")
    return {"before": before, "after": after,
            "verdict": judge_run(before, after, task.edit_metrics, cfg)}


def run(cfg: Config, resuming: bool, task: tasks.Task) -> dict:
    """One whole run, or one evaluation, in the folder `cfg.out`; its report. Raises RunError."""
    started, out = time.perf_counter(), Path(cfg.out)
    if cfg.merge and any(Path(cfg.merge).glob("*")):
        raise RunError(f"--merge {cfg.merge} is not empty: name a new folder")
    policy = load_policy(cfg, task)
    task, facts = fit_task(policy, task, cfg), environment(policy)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(adapter_parameters(policy.model, "policy"), lr=cfg.lr)
    state = State(optimizer, cfg.kl_coef)
    if cfg.eval_only:
        on_rank_0(write_json, out / "config.json", asdict(cfg))
        report = {"scores": on_rank_0(evaluate, policy, task, policy.reference, cfg)}
    else:
        if resuming and (out / "checkpoint" / "state.pt").exists():
            sizes = load_checkpoint(out / "checkpoint", policy, state, cfg)
            on_rank_0(rewind, out, sizes, cfg)
            print(f"resuming after step {state.step}")
        else:
            start(policy, task, state, out, cfg)
        train(policy, task, state, out, cfg)
        report = on_rank_0(finish, policy, task, state, out, cfg)
    report |= {"seconds": time.perf_counter() - started, "environment": facts}
    on_rank_0(write_json, out / "report.json", report)
    print_table({name: [flat(report[name])] for name in ("before", "after", "scores")
                 if name in report})
    if "verdict" in report:
        print(f"\nVerdict: {'' if report['verdict']['improved'] else 'NOT '}IMPROVED")
        for name, condition in report["verdict"]["conditions"].items():
            print(f"  {'yes' if condition['holds'] else 'NO ':4}{name}: {condition['numbers']}")
    return report


def flat(scores: dict) -> dict[str, float]:
    """Scores as "in_domain pass@1": number; lists are left out."""
    parts = {name: part if isinstance(part, dict) else {"": part} for name, part in scores.items()}
    return {f"{name} {key}".rstrip(): value for name, part in parts.items()
            for key, value in part.items() if isinstance(value, float)}


def print_table(columns: dict[str, list[dict]]) -> None:
    """A row for each score, a column for each variant: mean and deviation over its runs."""
    print("\n" + " " * 28 + "".join(f"{name:>15}" for name in columns))
    for row in list(columns.values())[-1][0]:
        line = f"{row:28}"
        for runs in columns.values():
            values = [run[row] for run in runs if run.get(row) is not None]
            digits = 0 if values and max(values) >= 100 else 3
            spread = f" ±{np.std(values):.{digits}f}" if len(values) > 1 else ""
            line += f"{f'{np.mean(values):.{digits}f}{spread}' if values else '-':>15}"
        print(line)


# --compare and --ablations: run after run from one base, and one table =======================

LR_GRID = (0.3, 1.0, 3.0)  # times --lr: what each method chooses from, on the validation split
ABLATIONS = {
    "vcopd": {}, "gate success": {"gate": "success"}, "gate failure": {"gate": "failure"},
    "gate none": {"gate": "none"}, "no clip": {"gap_clip": 1e9}, "lambda 0": {"teacher_coef": 0.0},
    "lambda 0.05": {"teacher_coef": 0.05}, "lambda 1": {"teacher_coef": 1.0},
    "no replay": {"replay_share": 0.0}, "no KL guard": {"kl_coef": 0.0}, "K 2": {"rollouts": 2},
    "K 8": {"rollouts": 8}}


def run_or_load(cfg: Config, task: tasks.Task) -> dict:
    """The report of a run: made unless it is there; a run that was cut short goes on."""
    out = Path(cfg.out)
    begun = on_rank_0(holds_run, out, cfg)
    if (out / "report.json").exists():
        return read_json(out / "report.json")
    print(f"\n=== {out}", flush=True)
    return run(cfg, begun, task)


def tune_lr(cfg: Config) -> Config:
    """With the learning rate of the grid that does best on the validation split."""
    found, (task, _) = {}, load_task(replace(cfg, split="validation"))
    for lr in (cfg.lr * factor for factor in LR_GRID):
        folder = f"{cfg.out}/tune/{cfg.method}-lr{lr:g}"
        report = run_or_load(replace(cfg, lr=lr, split="validation", out=folder), task)
        found[lr] = report["verdict"]["improved"], first_split(report["after"])["pass@1"]
    best = max(found, key=found.get)
    print(f"\n{cfg.method}: --lr {best:g} is best on the validation split", flush=True)
    return replace(cfg, lr=best)


def variants_of(cfg: Config, task: tasks.Task) -> dict[str, Config]:
    """The methods, each at its best rate; or VC-OPD with one choice changed at a time."""
    base = replace(cfg, compare=False, ablations=False, seeds=Config.seeds)
    if cfg.compare:
        return {name: tune_lr(replace(base, method=name, **METHODS[name]))
                for name in ("sft", "rl", "opd", "vcopd")}
    expert = replace(base, method="sft", **METHODS["sft"], out=f"{cfg.out}/expert")
    run_or_load(expert, task)
    changes = {**ABLATIONS, "specialist": {"teacher": f"{expert.out}/adapter"}}
    changed = {name: replace(base, **change) for name, change in changes.items()}
    return {name: one for name, one in changed.items() if name == "vcopd" or one != base}


def compare(cfg: Config) -> None:
    """Run each variant with every seed; print one table, and save it with the numbers behind."""
    (task, _), runs = load_task(cfg), {}
    variants = variants_of(cfg, task)
    for name, variant in variants.items():
        seeds = [replace(variant, seed=seed, out=f"{cfg.out}/{name}-s{seed}")
                 for seed in range(cfg.seed, cfg.seed + cfg.seeds)]
        runs[name] = [(run_or_load(one, task), read_json(Path(one.out, "metrics.jsonl")))
                      for one in seeds]
    with reading(Path(cfg.out), "delete the damaged run in it: it is made again"):
        ends = [[m["eval_pass"] for m in steps if "eval_pass" in m][-1:]
                for _, steps in runs.get("rl", [])]
        goal = mean(sum(ends, [])) if ends else math.inf
        columns = {"base": [flat(runs["vcopd"][0][0]["before"])]}
        columns |= {name: [numbers_of(*each, goal, variants[name]) for each in pairs]
                    for name, pairs in runs.items()}
        passes = {name: np.mean([first_split(report["after"])["passes"] for report, _ in pairs], 0)
                  for name, pairs in runs.items()}
    for i in range(0, len(columns), 5):  # as many as a terminal shows
        print_table(dict(list(columns.items())[i:i + 5]))
    print("\npass@1 against vcopd, mean over seeds, 95 % interval over problems:")
    changes = {name: paired_bootstrap(passes["vcopd"], passes[name]) for name in variants}
    for name, (low, high) in changes.items():
        print(f"  {name:20}[{low:+.3f}, {high:+.3f}]")
    on_rank_0(write_json, Path(cfg.out) / "table.json", {
        "columns": columns, "pass@1_minus_vcopd": changes,
        "lr": {name: variant.lr for name, variant in variants.items()}})


def numbers_of(report: dict, steps: list[dict], goal: float, cfg: Config) -> dict:
    """One run's scores, and their cost: `answers_to_rl` as it first probed `goal`, RL's last."""
    before, after = report["before"], report["after"]
    answers = cfg.prompts * (1 if cfg.imitate else cfg.rollouts)  # SFT: references
    reached = [m["step"] for m in steps if m.get("eval_pass", -1.0) >= goal]
    return {**flat(after), "general worst": min(after["general"].values()),
            "entropy_ratio": after["entropy"] / max(before["entropy"], 1e-9),
            "teacher_share": mean(m.get("teacher_share", 0.0) for m in steps),
            "improved": float(report["verdict"]["improved"]),
            "answers": float(len(steps) * answers),
            "tokens": float(sum(m["tokens"] for m in steps)), "minutes": report["seconds"] / 60,
            "answers_to_rl": float(reached[0] * answers) if reached else None,
            "reached_rl": float(bool(reached))}


# --check, --inspect, --plot and --bench leave no run =======================================

FAINT = 0.01  # nats: a smaller gap is no hint
CURVES = ("reward", "pass_rate", "eval_pass", "kl", "entropy", "kl_coef")


def load_both(cfg: Config) -> tuple[Policy, tasks.Task, int]:
    """The policy, the task fitted to it, and how many rows of data files cannot work."""
    task, refused = load_task(cfg)
    policy = load_policy(cfg, task)
    return policy, fit_task(policy, task, cfg), refused


def check(cfg: Config) -> int:
    """Can this be learnt? Exit code 2 where a row was refused, but for --skip-bad-rows."""
    (policy, task, refused), k = load_both(cfg), cfg.rollouts
    examples = task.train[:cfg.eval_problems]
    _, texts = answers_to(policy, policy.reference, examples, k, cfg.temperature, cfg)
    verdicts = verify_all(task.verify, [e for e in examples for _ in range(k)], texts)
    passes = [sum(v.passed for v in verdicts[i:i + k]) for i in range(0, len(verdicts), k)]
    never, always = passes.count(0), passes.count(k)
    print(f"{mean(v.formatted for v in verdicts):.0%} of {len(verdicts)} answers are well-formed\n"
          f"{len(passes)} problems, {k} answers each: the base solves {never} never, "
          f"{len(passes) - never - always} sometimes and {always} always")
    return 2 if refused and not cfg.skip_bad_rows else 0


def inspect(cfg: Config) -> None:
    """What the first step of a run would credit, token by token, and how much of |D| is style.

    Style is a token that stands at the same place in a text of the opposite verdict, too: it
    decides nothing. An adapter given as --model is the student here, and the teacher has none.
    """
    (policy, task, _), k = load_both(cfg), cfg.rollouts
    if is_adapter(cfg.model):
        load_adapter(policy.model, "policy", Path(cfg.model))
        policy.reference = BASE
    examples = [e for e in examples_at(task, 0, cfg) for _ in range(k)]
    prompts = [policy.encode(e.prompt) for e in examples[::k]]
    batch = sample(policy, policy.student, prompts, k, cfg, seeded("rollouts", cfg.seed, 0))
    verdicts = verify_all(task.verify, examples, policy.decode(batch))
    reward = torch.tensor([float(v.reward) for v in verdicts], device=policy.device)
    advantage = torch.zeros_like(reward) if cfg.blind else group_advantage(reward, k)
    columns: dict[int, Tensor] = {}  # of each answer: (T, 5)
    for part in score(policy, batch, examples, advantage, cfg):
        gap, dense = part.logp_teacher - part.logp_old, dense_advantage(advantage[part.index],
                                                                        part.gap, cfg)
        table = torch.stack([part.logp_old, part.logp_teacher, gap, part.gap, dense], 2).cpu()
        columns |= zip(part.index.tolist(), table, strict=True)
    sums = torch.zeros(2, 3)  # style and all, of tokens, |D| and |D| clipped
    answers = batch.answers()
    for i, ids in enumerate(answers):
        opposite = [answers[j] for j in range(i - i % k, i - i % k + k)
                    if verdicts[j].passed != verdicts[i].passed]
        known = examples[i].buggy if verdicts[i].passed else examples[i].reference
        opposite += [policy.tokenizer(known, add_special_tokens=False).input_ids] if known else []
        sizes = torch.cat([torch.ones(len(ids), 1), columns[i][:len(ids), 2:4].abs()], 1)  # (T, 3)
        if opposite:
            sums += torch.stack([sizes[shared_tokens(ids, opposite)].sum(0), sizes.sum(0)])
    for i in dict.fromkeys((int(advantage.argmax()), int(advantage.argmin()))):
        print(f"\n{examples[i].id}: reward {reward[i]:.2f} ({verdicts[i].reason}), "
              f"A {advantage[i]:+.2f}")
        print_tokens([policy.tokenizer.decode([token]) for token in answers[i]], columns[i])
    tokens, raw, clipped = (sums[0] / sums[1]).tolist()
    print(f"\nStyle is {tokens:.0%} of the tokens. It holds {raw:.0%} of |D|, and {clipped:.0%} of "
          "what the clip leaves of it.")


def shared_tokens(ids: list[int], others: list[list[int]]) -> list[bool]:
    """Which tokens also stand, at the same place, in one of the other texts?"""
    shared = [False] * len(ids)
    for other in others:
        matcher = difflib.SequenceMatcher(None, ids, other, autojunk=False)
        for start, _, size in matcher.get_matching_blocks():
            shared[start:start + size] = [True] * size
    return shared


def print_tokens(texts: list[str], columns: Tensor) -> None:
    """A line for each token with a hint, green where it pushes up and red where down."""
    print(f"{'token':20}  student  teacher       D  clipped   A_dense")
    rows = zip(texts, columns.tolist(), strict=False)
    for hinted, stretch in groupby(rows, lambda row: abs(row[1][2]) >= FAINT):
        if not hinted:
            rest = [text for text, _ in stretch]
            print(f"... {len(rest)} tokens without a hint, up to {''.join(rest)[-20:]!r}")
            continue
        for text, (student, teacher, gap, clipped, dense) in stretch:
            line = (f"{text!r:20}{student:9.2f}{teacher:9.2f}{gap:+8.2f}{clipped:+9.2f}"
                    f"{dense:+10.3f}")
            colour = 32 if gap > 0 else 31
            print(f"\x1b[{colour}m{line}\x1b[0m" if sys.stdout.isatty() else line)


def plot(folders: list[str]) -> int:
    """Draw the curves of runs, or what comparisons trade, in plot.png of the first folder."""
    panels: dict[str, dict] = {}  # title -> name -> (xs, ys)
    try:
        from matplotlib.figure import Figure  # draws by Agg: pyplot would look for a screen
        for folder in folders:
            for title, name, *line in lines_of(Path(folder)):
                panels.setdefault(title, {})[name] = line
        figure, image = Figure(figsize=(13, 8), layout="constrained"), io.BytesIO()
        axes = figure.subplots(math.ceil(len(panels) / 3), 3, squeeze=False).flat
        for panel, (title, lines) in zip(axes, panels.items(), strict=False):
            panel.set(title=title)
            for name, line in lines.items():
                panel.plot(*line, "o" if " over " in title else ".-", label=name)
            panel.legend()
        figure.savefig(image, format="png", dpi=120)
        write_atomic(Path(folders[0], "plot.png"), image.getvalue())
    except ImportError:
        usage_error("--plot needs matplotlib: pip install matplotlib")
    except (RunError, OSError) as error:
        usage_error(str(error))
    print(f"The picture is {Path(folders[0], 'plot.png')}")
    return 0


def lines_of(folder: Path) -> list[tuple]:
    """(title, name, xs, ys): of a run over its steps; of a comparison, a point for each run."""
    with reading(folder, "--plot takes the folder of a run or of a comparison, as --out named it"):
        if (folder / "table.json").exists():
            columns = read_json(folder / "table.json")["columns"]
            skill = next(name for name in columns["base"][0] if name.endswith(" pass@1"))
            return [(f"{skill} over {cost}", name, *([float(run[key]) for run in runs]
                                                     for key in (cost, skill)))
                    for cost in ("kl_to_base", "general mean") for name, runs in columns.items()]
        steps = [dict(step) for step in read_json(folder / "metrics.jsonl")]
        return [(column, str(folder), *([float(step[key]) for step in steps if column in step]
                                        for key in ("step", column))) for column in CURVES]


def bench(cfg: Config) -> None:
    """Tokens a second of sampling, seconds of whole steps, and peak memory, on this machine."""
    policy, task, _ = load_both(cfg)
    print(environment(policy))
    prompts = [policy.encode(example.prompt) for example in examples_at(task, 0, cfg)]
    for what in ("warm-up", "rollouts"):
        started = time.perf_counter()
        batch = sample(policy, policy.student, prompts, cfg.rollouts, cfg, seeded("bench"))
        tokens = int(batch.mask.sum())
        print(f"{what}: {tokens / (time.perf_counter() - started):.0f} tokens/s", flush=True)
    state = State(torch.optim.Adam(adapter_parameters(policy.model, "policy"), lr=cfg.lr),
                  cfg.kl_coef)
    with tempfile.TemporaryDirectory() as out:
        train(policy, task, state, Path(out), replace(cfg, steps=3, eval_every=4, save_every=4))
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = (torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    print(f"peak memory {peak:.2f} GiB")


# The program =================================================================================


def failure_sentence(error: Exception, cfg: Config) -> str:
    """What stopped a run, for the user; empty when it is nothing that a user can mend."""
    text = str(error).lower()
    signs = ("out of memory", "allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return (f"out of memory: lower --micro-tokens (now {cfg.micro_tokens}; --resume {cfg.out} "
                "accepts it too), then in a new run --prompts, --max-new-tokens, --rollouts and "
                "--lora-rank, try --quantize nf4, or take a smaller --model")
    if isinstance(error, OSError) or "no space left" in text:  # torch and safetensors say it, too
        where, why = (getattr(error, name, None) for name in ("filename", "strerror"))
        return (f"{where or cfg.out}: {why or error}: mend that, or give a folder that can be "
                f"written with --out; what was saved goes on with --resume {cfg.out}")
    return str(error) if isinstance(error, RunError | tasks.LoadError | tasks.JudgeError) else ""


def main(cfg: Config, resuming: bool) -> int:
    """Run. Exit code 0 also for `not improved`; 2 for what a user can mend; 130 for Ctrl-C."""
    tasks.UNSAFE_JUDGE = cfg.unsafe_judge
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc
        allocator = ctypes.CDLL(None)  # fetching freed memory anew would be 40 % of a step: keep it
        allocator.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes
        allocator.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    try:
        join_ranks(cfg)
        if cfg.check:
            return check(cfg)
        if cfg.bench or cfg.inspect or cfg.compare or cfg.ablations:
            (bench if cfg.bench else inspect if cfg.inspect else compare)(cfg)
            return 0
        begun = not resuming and on_rank_0(holds_run, Path(cfg.out), cfg)
        if begun and not Path(cfg.out, "report.json").exists():
            raise RunError(f"{cfg.out} holds this run, unfinished: go on with --resume {cfg.out}, "
                           "or give another --out")
        run(cfg, resuming, load_task(cfg)[0])
    except KeyboardInterrupt:
        begun = Path(cfg.out, "config.json").exists()
        print("\nInterrupted. To go on: " + (f"python vcopd.py --resume {cfg.out}" if begun else
                                             "give the same command again"))
        return 130
    except Exception as error:
        if not (sentence := failure_sentence(error, cfg)):
            raise
        print(one_line(sentence), file=sys.stderr)
        return 2
    samples = "" if cfg.imitate or cfg.eval_only else f"Read {cfg.out}/samples.jsonl next, or "
    print(f"\nResults are in {cfg.out}. {samples or 'To '}compare: python vcopd.py "
          f"--task {cfg.task} --model {cfg.model} --compare")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: servers are stopped
    sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold any character
    sys.exit(plot(PLOTTED) if PLOTTED else main(*read_config(sys.argv[1:])))
