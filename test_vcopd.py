"""Tests of VC-OPD in the order of the code: the method, running it, the tasks and their judge."""

import ast
import errno
import functools
import gzip
import inspect
import io
import itertools
import json
import math
import os
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import warnings
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers

import tasks
import vcopd

torch.set_num_threads(1)  # the models are tiny, and some tests run two processes on two cores

# Helpers: a policy small enough to enumerate, and oracles that share no code with vcopd.py ===

EOS, PAD, BOS, UNK, AB = range(5)
VOCAB = ["<eos>", "<pad>", "<bos>", "<unk>", "ab", *"abcdefghijklmnopqrstuvwxyzA0123456789 \n:"]
TOY = vcopd.Config(prompts=4, rollouts=4, max_new_tokens=6, lr=1e-2, replay_every=2, steps=6,
                   replay_keep=0.5, replay_share=0.2, format_rank=2, format_examples=8)


def letter_tokenizer():
    """One token a character, and one merge: the ids a, b read "ab" and encode as the token ab."""
    ids = {token: i for i, token in enumerate(VOCAB)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [("a", "b")], unk_token="<unk>"))
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **{
        f"{name}_token": f"<{name}>" for name in ("eos", "pad", "bos")})


def tiny_model(kind: str = "llama", vocab: int = len(VOCAB)):
    """Random weights, large enough that every context has its own distribution."""
    own = {"llama": {"intermediate_size": 64, "initializer_range": 0.2},  # rotary positions
           "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}}[kind]  # learned
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocab, **own,
        max_position_embeddings=128, eos_token_id=EOS, bos_token_id=None, pad_token_id=PAD)).eval()


def tiny_policy(kind: str = "llama", vocab: int = len(VOCAB), stop_ids=(EOS,),
                dtype=torch.float32, moved: float = 0.0) -> vcopd.Policy:
    """A frozen random model with a policy adapter, `moved` away from its zero start."""
    model = tiny_model(kind, vocab).to(dtype)
    vcopd.wrap_linears(model)
    vcopd.add_adapter(model, "policy", 4, 8.0, 0)
    noise = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model, "policy"):
        parameter.requires_grad_()
        parameter.data += moved * torch.randn(parameter.shape, generator=noise)
    return vcopd.Policy(model, letter_tokenizer(), torch.tensor(stop_ids), PAD)


def ragged_batch(shapes=((3, 4), (9, 1), (5, 6), (2, 3))) -> vcopd.Batch:
    """Random ids: contexts and completions of these lengths; each ends in its stop token."""
    rng = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(AB, len(VOCAB), (count,), generator=rng).tolist()

    contexts = [ids(length) for length, _ in shapes]
    return vcopd.Batch(contexts, *vcopd.pad([[*ids(n - 1), EOS] for _, n in shapes], PAD))


def siblings() -> vcopd.Batch:
    """Answers of 4, 1, 6, 3, 2, 5 tokens to three prompts: 2, 1 and 3 of them."""
    batch = ragged_batch(((3, 4), (3, 1), (9, 6), (5, 3), (5, 2), (5, 5)))
    first, _, second, third, _, _ = batch.contexts
    return replace(batch, contexts=[first, list(first), second, third, third, third])


def model_logits(policy: vcopd.Policy, role: tuple[str, ...], ids: list[int]) -> torch.Tensor:
    """The oracle: one unpadded row through the model's own forward, no cache: (L,) -> (L, V)."""
    with vcopd.adapters(role):
        return policy.model(torch.tensor([ids])).logits[0]


def prefix_logps(policy: vcopd.Policy, role: tuple, batch: vcopd.Batch, temperature: float) -> list:
    """Log-probs by the slowest road: each token alone after its own prefix."""
    scores = []
    for context, row, mask in zip(batch.contexts, batch.completion, batch.mask, strict=True):
        ids, score = list(context), []
        for token in row[mask].tolist():
            probs = (model_logits(policy, role, ids)[-1] / temperature).softmax(-1)
            score.append(probs[token].log().item())
            ids.append(token)
        scores.append(score)
    return scores


def experience(advantage, logp_old, gap, mask=None) -> vcopd.Experience:
    """Numbers on paper as the loss wants them."""
    old, gap = torch.as_tensor(logp_old), torch.as_tensor(gap)
    mask = torch.ones(old.shape, dtype=torch.bool) if mask is None else mask
    batch = vcopd.Batch([[EOS]] * len(old), torch.zeros(old.shape, dtype=torch.long), mask)
    return vcopd.Experience(batch, torch.arange(len(old)), None, torch.as_tensor(advantage),
                            old, gap)


def likes_a(example: tasks.Example, answer: str) -> tasks.Verdict:
    """A verifier that likes a certain token: the share of an answer's six that are `a`."""
    reward = answer.count("a") / 6
    return tasks.Verdict(reward, reward > 0.5, True, "ok" if reward > 0.5 else "test: few", {})


def toy_examples(count: int, prefix: str = "say") -> list[tasks.Example]:
    """Prompts of other lengths. Only the hints hold the letter z."""
    return [tasks.Example(id=f"{prefix}{i}", prompt=f"{prefix} {'e' * (i % 4)}{i}",
                          reference="aa", hint="z" * (1 + i % 3)) for i in range(count)]


@pytest.fixture
def toy(monkeypatch):
    """All that the method needs to know of a task, whose anchors, too, are judged by `likes_a`."""
    monkeypatch.setattr(tasks, "verify_skill", likes_a)
    return SimpleNamespace(
        name="toy", verify=likes_a, train=toy_examples(12), anchors=toy_examples(6, "old"),
        evals={"in_domain": toy_examples(5, "new")}, validation=(toy_examples(5, "valid"), []))


def fresh_state(policy: vcopd.Policy, cfg: vcopd.Config) -> vcopd.State:
    return vcopd.State(vcopd.adapter_optimizer(policy.model, "policy", cfg.lr), cfg.kl_coef)


def read_by_all(policy: vcopd.Policy, cfg: vcopd.Config) -> list[vcopd.Experience]:
    """Micro-batches of rollouts that student, reference and teacher have read."""
    advantage = torch.tensor([-1.0, 1.0, 0.0, 2.0, 0.5, -0.3], dtype=policy.model.dtype)
    return vcopd.score(policy, siblings(), toy_examples(3), advantage, cfg)


def policy_gradient(policy: vcopd.Policy) -> torch.Tensor:
    """What was added up in the policy adapter, as one vector; it is gone from there then."""
    flat = torch.cat([p.grad.flatten() for p in adapter_parameters(policy.model, "policy")])
    policy.model.zero_grad()
    return flat


def loss_and_gradient(policy: vcopd.Policy, parts: list, cfg: vcopd.Config, replay=None) -> tuple:
    """`update` stopped before its optimiser step: the loss that it descends, and the gradient."""
    values, backward, r = [], torch.Tensor.backward, cfg.replay_share * bool(replay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda loss: values.append(loss) or backward(loss))
        patch.setattr(vcopd, "optimizer_step", lambda optimizer, cfg: 0.0)
        state = replace(fresh_state(policy, cfg), replay=replay)
        log, _ = vcopd.update(policy, parts, state, replace(cfg, epochs=1))
    whole = log["policy_loss"] + cfg.kl_coef * log["kl"] - cfg.entropy_coef * log["entropy"]
    assert sum(values).item() == pytest.approx((1 - r) * whole + r * log.get("replay_loss", 0))
    return sum(values).item(), policy_gradient(policy)


def train_step(policy: vcopd.Policy, task, cfg: vcopd.Config, state=None) -> tuple[dict, list]:
    """One round of the shipped loop: its metrics and samples."""
    kept, state = [], state or fresh_state(policy, cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vcopd, "log_step", lambda _, metrics, samples, *rest: kept.append(
            (metrics, samples)))
        patch.setattr(vcopd, "save_checkpoint", lambda *_: None)
        vcopd.train(policy, task, state, Path(),
                    replace(cfg, steps=state.step + 1, eval_every=10**6))
    return kept[0]


def adapter_parameters(model: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """A and B of one adapter in every layer."""
    return [weights[name] for layer in vcopd.lora_layers(model).values()
            for weights in (layer.lora_A, layer.lora_B)]


def adapter_bytes(policy: vcopd.Policy, base: bool = False) -> dict[str, bytes]:
    """Every adapter weight, or every other one, to compare bit by bit."""
    return {name: weight.float().numpy().tobytes()
            for name, weight in policy.model.state_dict().items() if (".lora_" not in name) == base}


BOTH = pytest.mark.parametrize("architecture", ["llama", "opt"])  # rotary, learned positions

# The page and the code say the same ==========================================================

FOLDER = Path(vcopd.__file__).parent
README, CODE = ((FOLDER / name).read_text("utf-8") for name in ("README.md", "vcopd.py"))
SPOKEN = CODE + (FOLDER / "tasks.py").read_text("utf-8")
COMMANDS = re.findall(r"(?:vcopd\.py |`)(--[^`#&\n]+ [^`#&\n]+)", README)


def readme_task() -> str:
    """The code block of a new task that the page tells its readers to save."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [code] = [block for block in blocks if "-> Task" in block]
    return code


@functools.cache
def built(name: str) -> tasks.Task:
    """A built-in task, or the page's, built once: code edits take seconds."""
    exec(readme_task(), space := {})
    return {**tasks.TASKS, "sort": space["sort_numbers"]}[name]()


def test_equations_deviations_and_requirements_stand_once_in_the_code_and_once_on_the_page():
    """Who searches for `Eq. 5` lands on the line that *is* the equation; uv and pip agree."""
    tokens = tokenize.generate_tokens(io.StringIO(CODE).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for text in ("\n".join(comments), README):
        assert sorted(map(int, re.findall(r"# Eq\. (\d+)\b", text))) == list(range(1, 13))
    listed = README.split("## Deviations")[1].split("## ")[0]
    places = [vcopd.Policy, vcopd.imitate, vcopd.group_advantage, vcopd.token_logps]
    assert all(inspect.getsource(place).count("differs: ") == 1 for place in places)
    assert len(re.findall(r"\(\d\)", listed)) == len(re.findall(r"differs: \w", SPOKEN))
    lines = (FOLDER / "requirements.txt").read_text("utf-8").splitlines()
    pinned = re.findall(r'"(\S+==\S+)"', CODE.split("# ///")[1])
    assert pinned == [line for line in lines if "==" in line and "pytest" not in line]


@pytest.mark.parametrize("line", dict.fromkeys(map(str.strip, COMMANDS)))
def test_every_command_of_the_readme_is_accepted(line):
    """A page goes out of date in silence: an option that was renamed must fail here first."""
    arguments = shlex.split(line)
    assert (vcopd.build_parser().parse_args(arguments).plot if "--plot" in arguments
            else vcopd.read_config(arguments).out)


def test_every_option_and_function_that_the_readme_names_exists():
    """Bare names too, as in `--lr` or in the steps of the method."""
    parser = vcopd.build_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= known
    steps = README.split("## One training step")[1].split("**Where to read.**")[0]
    names = set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", steps))
    assert len(names) > 10
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", SPOKEN)]


def test_the_files_stay_one_sitting():
    """A feature pays for its lines by what it removes; the method begins soon, and is short."""
    lines = {name: len((FOLDER / name).read_text("utf-8").splitlines())
             for name in ("vcopd.py", "tasks.py", "test_vcopd.py")}
    assert lines["vcopd.py"] <= 1700 and lines["tasks.py"] <= 1500
    assert lines["test_vcopd.py"] <= 3000 and len(README.split()) <= 1600
    start, end = (CODE.index(f"# PART {number} - ") for number in ("I", "II"))
    assert CODE[:start].count("\n") <= 190 and CODE[start:end].count("\n") <= 430


# The method, step by step ====================================================================

def test_the_mask_ends_at_the_first_of_all_stop_tokens_even_when_pad_equals_eos():
    """A mask made by `!= pad` would drop the stop token: the model would never learn to stop."""
    rows = torch.tensor([[5, 0, 0, 0],   # eos, then pads that are the same id
                         [0, 0, 0, 0],   # stops at once: length 1, not 0
                         [5, 6, 4, 0],   # stops at the end
                         [5, 6, 4, 8],   # truncated: never stops
                         [5, 7, 8, 6]])  # chat models stop at <|eot|>, here 7, as well as at eos
    mask = vcopd.stop_mask(rows, torch.tensor([0, 7]))
    assert torch.equal(mask, torch.arange(4) < torch.tensor([[2], [1], [4], [4], [2]]))


@BOTH
def test_every_role_is_the_one_frozen_model_with_its_adapters(architecture):
    """Without an adapter, or with a new one, it is the base to the last bit."""
    plain, ids = tiny_model(architecture), [5, 9, 7, 30]
    before = plain(torch.tensor([ids])).logits[0]
    for moved in (0.0, 0.3):
        policy = tiny_policy(architecture, moved=moved)
        student = model_logits(policy, policy.student, ids)
        assert torch.equal(model_logits(policy, vcopd.BASE, ids), before)
        assert torch.equal(student, before) == (moved == 0)
    assert {m.scale["policy"] for m in vcopd.lora_layers(policy.model).values()} == {8 / 4}

    with vcopd.adapters(policy.student):  # roles nest, and a pass may fail in one
        with pytest.raises(KeyboardInterrupt), vcopd.adapters(vcopd.BASE):
            assert torch.equal(policy.model(torch.tensor([ids])).logits[0], before)
            raise KeyboardInterrupt
        assert torch.equal(policy.model(torch.tensor([ids])).logits[0], student)
    assert torch.equal(policy.model(torch.tensor([ids])).logits[0], before)


# ------------------------------------------------------------------- Step 2 - rollouts

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize("temperature, top_p, nucleus", [
    (0.8, 1.0, {0, 1, 2, 3, 4}), (1.0, 1.0, {0, 1, 2, 3, 4}), (1.0, 0.94, {1, 2, 3, 4}),
    (1.0, 0.71, {1, 3, 4}), (1.0, 0.69, {1, 3}), (1.0, 0.39, {1}), (0.5, 0.55, {1})])
def test_draws_follow_the_probabilities_in_the_smallest_nucleus(temperature, top_p, nucleus):
    """The token that crosses top_p belongs to it, and inside the odds stay as they were."""
    logits = PROBS.log().expand(50_000, -1)
    tokens = vcopd.draw(logits, temperature, top_p, vcopd.seeded("test"))
    assert set(tokens.tolist()) == nucleus
    inside = torch.tensor([p if i in nucleus else 0 for i, p in enumerate(PROBS)])
    inside = inside ** (1 / temperature)
    seen = torch.bincount(tokens, minlength=5) / 50_000
    assert (seen - inside / inside.sum()).abs().max() < 0.009  # at least four standard errors


@pytest.mark.parametrize("vocab, spread, least", [(30, 3, 9), (2000, 4, 60), (2000, 0.1, 1500)])
def test_the_nucleus_agrees_with_the_one_of_transformers(vocab, spread, least):
    """An independent judge, also where the 256 most likely tokens hold the nucleus, or do not."""
    from transformers import TopPLogitsWarper
    logits = spread * torch.randn(200, vocab, generator=vcopd.seeded("logits"))
    allowed = TopPLogitsWarper(0.9)(None, logits).isfinite()
    tokens = torch.stack([vcopd.draw(logits, 1.0, 0.9, vcopd.seeded("test", seed))
                          for seed in range(20)], 1)  # (200, 20)
    assert allowed.gather(1, tokens).all()
    rank = (logits[:, None] > logits.gather(1, tokens)[:, :, None]).sum(-1)
    assert least < rank.max()  # the unlikely ones are drawn, too


@BOTH
def test_greedy_answers_with_cache_and_padding_equal_the_plain_argmax_loop(architecture):
    """Wrong positions, stray cache rows, another role, rows not prompt-major would show here."""
    policy = tiny_policy(architecture, stop_ids=(EOS, 16, 23, 26), moved=0.3)
    prompts = [[5], [9, 6, 7, 8, 20, 21, 9], [7, 7, 30], [8, 31, 12, 40]]
    cfg = replace(TOY, temperature=0.0, max_new_tokens=8)
    batch = vcopd.sample(policy, policy.student, prompts, 2, cfg, vcopd.seeded("test"))
    for row, prompt in enumerate(p for p in prompts for _ in range(2)):
        answer = []
        while len(answer) < 8 and not set(answer) & set(policy.stop_ids.tolist()):
            logits = model_logits(policy, policy.student, prompt + answer)[-1]
            answer.append(int(logits.argmax()))
        assert batch.completion[row][batch.mask[row]].tolist() == answer
        assert batch.contexts[row] == prompt
    assert len(set(batch.mask.sum(1).tolist())) > 1  # rows did end at different times


# ------------------------------------------------------------------- scoring

@BOTH
@pytest.mark.parametrize("temperature", [0.8, 1.0])
@pytest.mark.parametrize("batch, rows", [(ragged_batch(), 4), (siblings(), 3)])
def test_log_probs_equal_a_loop_over_prefixes(batch, rows, architecture, temperature, monkeypatch):
    """No token is scored with its neighbour's distribution, and no answer reads another's, though
    a prompt is read once for all its answers. Three tokens at a time meet the vocabulary."""
    policy, seen = tiny_policy(architecture, moved=0.3), []
    monkeypatch.setattr(vcopd, "LOGITS", 3 * len(VOCAB))
    with policy.model.base_model.register_forward_pre_hook(
            lambda module, inputs, options: seen.append(len(inputs[0])), with_kwargs=True):
        logps = vcopd.log_probs(policy, policy.student, batch, temperature)
    expected = prefix_logps(policy, policy.student, batch, temperature)
    for row, mask, score in zip(logps, batch.mask, expected, strict=True):
        torch.testing.assert_close(row[mask].tolist(), score, atol=1e-4, rtol=1e-4)
    assert logps[~batch.mask].count_nonzero() == 0 and seen == [rows]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_terms_equal_those_of_torch_distributions(temperature, monkeypatch):
    """An independent judge of log-prob, KL (both direction and size) and entropy."""
    monkeypatch.setattr(vcopd, "head", lambda model, hidden: hidden)  # so these can be logits
    p, q = 2 * torch.randn(2, 8, 6, generator=vcopd.seeded("test"))
    p[:2], q[:2] = 0, 0  # ignorance
    p[1, 1] = 1e4  # and certainty: 0 * log 0 is 0, not NaN, nor is its gradient
    ids = torch.arange(8) % 6
    terms = vcopd.token_terms(None, temperature, ids, p.requires_grad_(), q)
    student = torch.distributions.Categorical(logits=p / temperature)
    reference = torch.distributions.Categorical(logits=q / temperature)
    expected = (student.log_prob(ids), torch.distributions.kl_divergence(student, reference),
                student.entropy())
    torch.testing.assert_close(terms, torch.stack(expected))
    torch.testing.assert_close(vcopd.token_logps(None, temperature, ids, p), terms[0])
    assert terms[1:, :2].flatten().tolist() == pytest.approx([0, math.log(6), math.log(6), 0])
    terms.sum().backward()
    assert p.grad.isfinite().all()


def test_the_token_kls_of_a_language_sum_to_the_kl_between_its_texts(monkeypatch):
    """All 25 texts of 2 tokens: the exact KL(pi_theta || pi_ref), not its reverse, by summation."""
    monkeypatch.setattr(vcopd, "LOGITS", 0)  # each token is a chunk
    policy, ids = tiny_policy(vocab=5, moved=0.2), torch.cartesian_prod(*[torch.arange(5)] * 2)
    texts = vcopd.Batch([[1, 3]] * 25, ids, torch.ones_like(ids, dtype=torch.bool))
    student, reference = (torch.tensor(prefix_logps(policy, role, texts, 1.0)).sum(1)
                          for role in (policy.student, vcopd.BASE))
    found = torch.tensor([vcopd.kl_and_entropy(policy, policy.student, vcopd.BASE, [
        texts.rows(torch.tensor([i]))]) for i in range(25)])  # the mean of 2 tokens
    exact = [(student.exp() * (student - reference)).sum(), -(student.exp() * student).sum()]
    torch.testing.assert_close(2 * student.exp() @ found, torch.stack(exact))
    assert abs(exact[0] - (reference.exp() * (reference - student)).sum()) > 0.01  # not its reverse


def test_logits_are_kept_of_three_tokens_until_these_have_been_learnt(monkeypatch):
    """A chunked loss that retains each chunk saves nothing: 1024 x 150,000 floats are 600 MB."""
    monkeypatch.setattr(vcopd, "LOGITS", 3 * len(VOCAB))
    policy, kept, rows = tiny_policy(moved=0.3), [], []

    def keep(tensor):
        if tensor.shape[-1:] == (len(VOCAB),) and len(tensor) < 32:  # the head has 32 rows
            kept.append(weakref.ref(tensor))
            rows.append(sum(len(one()) for one in kept if one() is not None))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_and_gradient(policy, read_by_all(policy, FULL), FULL, ragged_batch())
    assert len(kept) == 66 and max(rows) == 3 * 8  # all that one chunk keeps of its logits


def test_advantages_are_deviations_from_their_own_group_in_its_own_spread(monkeypatch):
    """(1, 0, 0, 0): mean 0.25, population std sqrt(3) / 4. (5, 9, 5, 9): mean 7, std 2. And where
    a device adds up first, the mean of seven 0.1 need not be 0.1: that is noise, no verdict."""
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 9.0, 5.0, 9.0])
    std = math.sqrt(3) / 4 + 1e-4
    assert vcopd.group_advantage(reward, 4).tolist() == pytest.approx(
        [0.75 / std, *[-0.25 / std] * 3, *[-2 / 2.0001, 2 / 2.0001] * 2])
    monkeypatch.setattr(torch, "std_mean", lambda x, *_, **__: (x[:, :1] * 0, x[:, :1] + 1e-8))
    for value, k in itertools.product((0.1, -1.0, 1 / 3), (1, 2, 7, 8)):
        assert vcopd.group_advantage(torch.full((2 * k,), value), k).tolist() == [0.0] * 2 * k


# ------------------------------------------------------------------- Step 4 - hints

@pytest.mark.parametrize("gate, opened", [
    ("sigmoid", [0.1192, 0.5, 0.8808]), ("success", [0, 0, 1]),
    ("failure", [0.8808, 0.5, 0.1192]), ("none", [1, 1, 1])])
def test_a_gap_moves_the_advantage_by_exactly_lambda_times_gate_times_gap(gate, opened):
    """Were anything normalised after the teacher spoke, a constant gap would vanish again."""
    assert set(vcopd.GATES) == {"sigmoid", "success", "failure", "none"}  # all of them are here
    advantage = torch.tensor([-2.0, 0.0, 2.0])  # a tied group, 0, is half open to hints
    for gap in (torch.full((3, 4), 0.3), torch.tensor([[0.5, -0.5, 0.1, 0.0]] * 3)):
        dense = vcopd.dense_advantage(advantage, gap, replace(TOY, teacher_coef=0.2, gate=gate))
        expected = advantage[:, None] + 0.2 * torch.tensor(opened)[:, None] * gap
        torch.testing.assert_close(dense, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["self", "specialist", "stronger"])
@pytest.mark.parametrize("most, count", [(1, 4), (10_000, 1)])
def test_the_teacher_scores_the_students_very_ids_behind_the_hint(kind, most, count):
    """Decoded and encoded again, a and b would be one token ab: later log-probs would slip."""
    policy, examples = tiny_policy(moved=0.3), toy_examples(4)
    teacher, role = policy, vcopd.BASE
    if kind == "stronger":
        teacher = policy.stronger = tiny_policy("opt")
    elif kind == "specialist":
        policy.specialist = role = ("specialist",)
        vcopd.add_adapter(policy.model, "specialist", 2, 2.0, 5)
        for weight in adapter_parameters(policy.model, "specialist"):
            weight.data += 0.1
    a, b = VOCAB.index("a"), VOCAB.index("b")
    assert policy.tokenizer("ab").input_ids == [AB]
    rows, mask = vcopd.pad([[a, b, EOS], [b, a, b, EOS], [EOS], [a, a]], PAD)
    batch = vcopd.Batch([policy.encode(e.prompt) for e in examples], rows, mask)
    assert policy.decode(batch) == ["ab", "bab", "", "aa"]  # without stop token and padding
    hinted = [policy.encode(tasks.privileged_prompt(e)) for e in examples]
    said = prefix_logps(teacher, role, replace(batch, contexts=hinted), 0.8)
    old = prefix_logps(policy, policy.student, batch, 0.8)
    policy.micro_tokens = most
    assert len(parts := vcopd.score(policy, batch, examples, torch.arange(4.0), TOY)) == count
    assert sorted(sum((part.advantage.tolist() for part in parts), [])) == [0, 1, 2, 3]
    for part in parts:
        assert part.batch.mask.any(0).all()  # no place is kept for longer answers of others
        for i, row in enumerate(part.advantage.int().tolist()):
            seen = part.batch.mask[i]
            gap = [max(-0.5, min(0.5, t - o)) for t, o in zip(said[row], old[row], strict=True)]
            assert part.batch.contexts[i] == batch.contexts[row]
            assert part.logp_teacher[i][seen].tolist() == pytest.approx(said[row], abs=1e-4)
            assert part.gap[i][seen].tolist() == pytest.approx(gap, abs=1e-4)
            assert part.gap[i][~seen].count_nonzero() == 0


def test_the_hint_reaches_the_teacher_and_never_the_student(toy, monkeypatch):
    """Only hints hold the letter z. A leak would let the student copy what it should learn."""
    z, seen = VOCAB.index("z"), []
    policy, scoring = tiny_policy(), vcopd.completion_hidden

    def spy(policy, role, batch):
        seen.extend((role, z in context) for context in batch.contexts)
        return scoring(policy, role, batch)

    monkeypatch.setattr(vcopd, "completion_hidden", spy)
    train_step(policy, toy, TOY)
    hinted = [role for role, has_hint in seen if has_hint]
    assert hinted == [policy.reference] * 16  # each rollout once, not in every epoch


# ------------------------------------------------------------------- Step 5 - update

@pytest.mark.parametrize("advantage, ratio, objective, gradient", [
    (+1, 0.5, 0.5, 0.5), (+1, 1.0, 1.0, 1.0), (+1, 1.5, 1.2, 0.0),
    (-1, 0.5, -0.8, 0.0), (-1, 1.0, -1.0, -1.0), (-1, 1.5, -1.5, -1.5)])
def test_the_clip_stops_what_has_gone_far_enough(advantage, ratio, objective, gradient):
    """A good one 1.2 times as likely, a bad one 0.8 times. Else the gradient is ratio * A."""
    terms = torch.zeros(3, 1, 1)
    terms[0] = math.log(ratio)
    terms.requires_grad_()
    cfg = replace(TOY, ratio_clip=0.2, entropy_coef=0.0)
    part = experience([float(advantage)], [[0.0]], [[0.0]])
    loss, info = vcopd.vcopd_loss(terms, part, 0.0, 1, cfg)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert terms.grad[0].item() == pytest.approx(-gradient)
    assert info["ratio_clipped"].item() == (gradient == 0)


def test_a_worked_example_on_paper():
    """Two rollouts of two tokens. Rewards 1 and 0, so A = (1, -1) and G = (0.731, 0.269).

    The student gave each token 1/4. The teacher gives 1/2 to the first of each row (D = log 2 =
    0.693, held at 0.5) and 1/5 to the second (D = log 0.8 = -0.223). With lambda = 0.2:

        A_dense    1 + 0.2 * 0.731 * 0.5 =  1.073     1 - 0.2 * 0.731 * 0.223 =  0.967
                  -1 + 0.2 * 0.269 * 0.5 = -0.973    -1 - 0.2 * 0.269 * 0.223 = -1.012

    The teacher's share in them is 0.068, 0.032, 0.026 and 0.012, and the mean size of a gap 0.362.
    On-policy the loss is minus their mean, -0.0138. Later rho is 1.5 and 0.5 on the first tokens:

        min(1.5 * 1.073, 1.2 * 1.073) = 1.288    min(0.5 * -0.973, 0.8 * -0.973) = -0.778

        L_policy = -(1.288 + 0.967 - 0.778 - 1.012) / 4 = -0.116
        L        = -0.116 + 0.1 * 0.03 - 0.001 * 2      = -0.115    (beta 0.1, KL 0.03, H 2)
        L_total  = 0.9 * -0.115 + 0.1 * 2               =  0.096    (r 0.1, replay NLL 2)
    """
    cfg = replace(TOY, teacher_coef=0.2, gap_clip=0.5, ratio_clip=0.2, entropy_coef=0.001)
    advantage = vcopd.group_advantage(torch.tensor([1.0, 0.0]), 2)
    assert advantage.tolist() == pytest.approx([1, -1], abs=1e-3)
    old = torch.full((2, 2), 1 / 4).log()
    gap = vcopd.teacher_gap(torch.tensor([[1 / 2, 1 / 5]] * 2).log(), old, cfg.gap_clip)
    assert gap[0].tolist() == pytest.approx([0.5, -0.223], abs=1e-3)
    dense = vcopd.dense_advantage(advantage, gap, cfg)
    assert dense.flatten().tolist() == pytest.approx([1.073, 0.967, -0.973, -1.012], abs=1e-3)

    part, zero = experience(advantage, old, gap), torch.zeros(2, 2)
    on_policy, _ = vcopd.vcopd_loss(torch.stack([old, zero, zero]), part, 0.1, 4, cfg)
    assert on_policy.item() == pytest.approx(-0.0138, abs=5e-4)

    later = old + torch.tensor([[1.5, 1.0], [0.5, 1.0]]).log()
    terms = torch.stack([later, torch.full((2, 2), 0.03), torch.full((2, 2), 2.0)])
    loss, info = vcopd.vcopd_loss(terms, part, 0.1, 4, cfg)
    assert {name: value.item() for name, value in info.items()} == pytest.approx({
        "policy_loss": -0.116, "kl": 0.03, "entropy": 2, "ratio_clipped": 0.5,
        "teacher_share": 0.034, "gap": 0.362}, abs=1e-3)
    assert loss.item() == pytest.approx(-0.115, abs=1e-3)


FULL = replace(TOY, kl_coef=0.5, entropy_coef=0.1, teacher_coef=1.0, gap_clip=0.5)


@pytest.mark.parametrize("cfg", [
    pytest.param(FULL, id="whole loss"),
    pytest.param(replace(FULL, gate="none", gap_clip=9.0, ratio_clip=0.05), id="strong teacher"),
    pytest.param(replace(FULL, kl_coef=9.0), id="kl")])
@pytest.mark.parametrize("epoch", [1, 2])
def test_autograd_agrees_with_finite_differences_of_the_whole_loss(cfg, epoch, monkeypatch):
    """A, D, the gate and pi_old are constants: a gradient through one of them shows here, and so
    does a KL without gradient. In float64, on one entry of an A and one of a B; in chunks."""
    monkeypatch.setattr(vcopd, "LOGITS", 3 * len(VOCAB))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    policy = tiny_policy("opt", moved=0.1)
    policy.model.double()  # the adapters too
    replay = vcopd.Batch([[7, 8]], torch.tensor([[9, 10, EOS]]), torch.ones(1, 3) > 0)
    parts = read_by_all(policy, cfg)
    _, gradient = loss_and_gradient(policy, parts, cfg, replay)
    parameters = adapter_parameters(policy.model, "policy")
    if epoch == 2:  # off-policy: some ratios are clipped
        for i, parameter in enumerate(parameters):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=vcopd.seeded(i))
        _, gradient = loss_and_gradient(policy, parts, cfg, replay)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, slopes in list(zip(parameters, gradient.split(sizes), strict=True))[:2]:
        steepest, losses = slopes.abs().argmax(), []
        for step in (1e-6, -2e-6):
            parameter.data.view(-1)[steepest] += step
            losses.append(loss_and_gradient(policy, parts, cfg, replay)[0])
        parameter.data.view(-1)[steepest] += 1e-6
        assert slopes[steepest].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient(monkeypatch):
    """Means of means would weigh a short answer's tokens more. One row and token at a time, or all,
    packed: the prompt is read once for its answers, and each sends its gradient through it."""
    policy, results = tiny_policy(moved=0.2), []
    for most, count, logits in ((10_000, 1, vcopd.LOGITS), (1, 6, 0)):
        policy.micro_tokens = most
        monkeypatch.setattr(vcopd, "LOGITS", logits)
        assert len(parts := read_by_all(policy, FULL)) == count
        loss, gradient = loss_and_gradient(policy, parts, FULL, ragged_batch())
        results.append((torch.tensor(loss), gradient))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("most", [1, 12, 22, 40])
@pytest.mark.parametrize("batch", [
    ragged_batch(), ragged_batch([(10, 1), (1, 10), (9, 2), (2, 9)]), siblings()],
    ids=["ragged", "opposite", "siblings"])
def test_micro_batches_hold_every_row_once_and_the_model_never_sees_more_tokens(most, batch):
    """Also when the longest prompt and the longest answer stand in different rows."""
    policy, seen = replace(tiny_policy(), micro_tokens=most), []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(inputs[0].numel()), with_kwargs=True)
    groups = vcopd.micro_batches(policy, batch)
    assert sorted(torch.cat([i for i, _ in groups]).tolist()) == list(range(len(batch.contexts)))
    for index, part in groups:
        assert part.answers() == batch.rows(index).answers()
        vcopd.completion_hidden(policy, vcopd.BASE, part)
    assert all(n <= most or len(i) == 1 for n, (i, _) in zip(seen, groups, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_under_the_mask_can_poison_the_loss_and_no_gap_may_be_missing(poison):
    """NaN * 0 is NaN: a masked value must be left out, not multiplied away. And a log-prob that is
    missing is not 0.0: that would say the teacher was certain."""
    policy, batch = tiny_policy(moved=0.2), ragged_batch()
    hidden = vcopd.completion_hidden(policy, vcopd.BASE, batch)
    [(_, terms)] = vcopd.on_tokens(policy, policy.student, vcopd.token_terms, 0.8, batch, hidden)
    terms = torch.where(batch.mask, terms, poison)
    gap = torch.where(batch.mask, 0.1, poison)
    part = experience([1.0, -1.0, 0.5, 2.0], terms[0].detach(), gap, batch.mask)
    loss, info = vcopd.vcopd_loss(terms, part, 0.1, 14, TOY)
    loss.backward()
    gradients = [p.grad for p in adapter_parameters(policy.model, "policy")]
    assert all(value.isfinite().all() for value in (loss, *info.values(), *gradients))
    for gap in (None, torch.zeros(4, 1), torch.zeros(1, 6), torch.zeros(4, 7)):
        with pytest.raises((AssertionError, AttributeError)):
            vcopd.vcopd_loss(terms, replace(part, gap=gap), 0.0, 14, TOY)


def test_on_a_bfloat16_base_adapters_and_probabilities_are_float32_and_the_first_ratio_one(toy):
    """A step of 1e-5 on a weight of 0.1 would vanish. With a clip range of 0, one rounding error
    between pi_old and pi_theta would count. The head has no adapter, nor is a base weight free."""
    policy, ids = tiny_policy(dtype=torch.bfloat16, moved=0.1), torch.arange(len(VOCAB))
    free = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(free) == 2 * 7 * 2  # of q, k, v, o, gate, up and down in each of 2 layers
    assert all(name.endswith((".lora_A.policy", ".lora_B.policy")) for name in free)
    assert {p.dtype for p in free.values()} == {torch.float32}
    assert type(policy.model.get_output_embeddings()) is torch.nn.Linear
    hidden = torch.randn(32, generator=vcopd.seeded("test")).bfloat16().expand(len(ids), -1)
    logps = vcopd.token_logps(policy.model, 0.8, ids, hidden)
    assert logps.dtype == torch.float32
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)
    cfg = replace(TOY, epochs=1, ratio_clip=0.0)
    metrics, _ = train_step(policy, toy, cfg)
    assert metrics["ratio_clipped"] == 0


@pytest.mark.parametrize("kl_coef, kl, adapted", [
    (0.01, 0.031, 0.012), (0.01, 0.030, 0.0095), (10.0, 1.0, 10.0), (1e-4, 0.0, 1e-4), (0, 1, 0)])
def test_the_kl_guard_tightens_above_the_target_and_relaxes_below(kl_coef, kl, adapted):
    """Within its bounds, and 0 stays 0: switched off."""
    found = vcopd.adapt_kl_coef(kl_coef, kl, replace(TOY, kl_target=0.03))
    assert found == pytest.approx(adapted, rel=1e-9)


# ------------------------------------------------------------------- Step 6 - replay

def test_replay_keeps_of_every_skill_the_best_and_among_equals_the_most_confident(toy, monkeypatch):
    """Two of three anchors of each: ranked all together, the easy skill would fill the pool."""
    policy, passing = tiny_policy(stop_ids=(EOS, *range(35, 45)), moved=0.3), None
    monkeypatch.setattr(tasks, "verify_skill", lambda example, answer: tasks.Verdict(
        float(example.skill == "easy" or example.id == passing), True, True, "ok", {}))
    anchors = [replace(e, skill=("easy", "hard")[i % 2]) for i, e in enumerate(toy.anchors)]
    names = {tuple(policy.encode(e.prompt)): e.id for e in anchors}
    every = vcopd.refresh_replay(policy, anchors, 5, replace(TOY, replay_keep=1.0))
    confidence = {names[tuple(context)]: sum(row) / len(row) for context, row in zip(
        every.contexts, prefix_logps(policy, policy.student, every, 0.8), strict=True)}
    easy, hard = (sorted((e.id for e in anchors if e.skill == skill), key=confidence.get)
                  for skill in ("easy", "hard"))
    passing = hard[0]  # the least likely of all that are hard
    pool = vcopd.refresh_replay(policy, anchors, 5, TOY)
    assert (easy[0], passing) == ("old4", "old5")  # not those that come first anyway
    assert sorted(names[tuple(context)] for context in pool.contexts) == sorted(
        [*easy[1:], passing, hard[2]])
    later = vcopd.refresh_replay(policy, anchors, 1, TOY)
    assert later.answers() != pool.answers()  # every refresh has draws of its own
    cold = vcopd.refresh_replay(policy, anchors, 0, replace(TOY, temperature=1e-3))
    assert cold.completion[:, 0].tolist() == [
        model_logits(policy, policy.student, context)[-1].argmax() for context in cold.contexts]


@pytest.mark.parametrize("rows, share", [(16, 0.1), (64, 0.1), (64, 0.2), (512, 0.15)])
def test_replay_is_its_share_of_the_batch(rows, share, monkeypatch):
    """r of all rows, new and old, give or take the rounding of one row."""
    drawn, state = [], vcopd.State(None, 0.01, replay=ragged_batch())
    monkeypatch.setattr(vcopd, "imitate", lambda *_: drawn.append(len(_[2].contexts)) or 2.0)
    cfg = replace(TOY, prompts=rows // 4, rollouts=4, replay_share=share)
    weight, info = vcopd.imitate_replay(SimpleNamespace(student=()), state, 0, cfg)
    assert abs(drawn[0] - share * (rows + drawn[0])) <= 0.5
    assert (weight, info) == (share, {"replay_loss": 2.0})


def test_sft_with_replay_is_the_same_mixture(toy, monkeypatch):
    """The control: (1 - r) of the demonstrations' likelihood and r of that of replay."""
    policy, cfg = tiny_policy(moved=0.3), replace(TOY, epochs=1)
    state = replace(fresh_state(policy, cfg), replay=ragged_batch())
    monkeypatch.setattr(vcopd, "optimizer_step", lambda *_: policy_gradient(policy))
    info, mixed = vcopd.sft_step(policy, policy.student, toy.train[:2], state, cfg)
    batch = vcopd.solution_batch(policy, toy.train[:2])  # "aa", and where it ends
    assert batch.completion.tolist() == [[VOCAB.index("a")] * 2 + [EOS]] * 2 and batch.mask.all()
    vcopd.imitate(policy, policy.student, batch)
    demonstrations = policy_gradient(policy)
    share, replayed = vcopd.imitate_replay(policy, state, 0, cfg)
    assert info["replay_loss"] == replayed["replay_loss"] > 0 and share == 0.2
    assert same(mixed, 0.8 * demonstrations + policy_gradient(policy))


def test_replay_is_the_plain_likelihood_that_transformers_computes():
    """No PPO ratio: its pi_old would be many steps old. The judge is the model's own loss."""
    policy, batch = tiny_policy(moved=0.3), ragged_batch()
    ids, seen = vcopd.pad([c + y[m].tolist() for c, y, m in zip(
        batch.contexts, batch.completion, batch.mask, strict=True)], PAD)
    labels = ids.masked_fill(~seen, -100)
    for row, context in enumerate(batch.contexts):
        labels[row, :len(context)] = -100
    with vcopd.adapters(policy.student):
        expected = policy.model(ids, attention_mask=seen.long(), labels=labels).loss
    assert vcopd.imitate(policy, policy.student, batch) == pytest.approx(expected.item())
    policy.model.zero_grad()
    parts = read_by_all(policy, TOY)
    first = batch.rows(torch.tensor([0]))
    alone, both = (loss_and_gradient(policy, parts, TOY, rows)[0] for rows in (None, first))
    tempered = -sum(*prefix_logps(policy, policy.student, first, 0.8)) / 4
    assert both == pytest.approx(0.8 * alone + 0.2 * tempered, abs=1e-4)  # r is 0.2


# ------------------------------------------------------------------- training

def test_training_makes_the_verifier_happier_and_leaves_the_base_untouched(toy):
    """The whole method in a second; one stray write to the base would move all roles."""
    toy.verify = lambda example, answer: replace(  # a fork's first verifier: whole numbers
        likes_a(example, answer), reward=answer.count("a"))
    policy = tiny_policy()
    cfg = replace(TOY, rollouts=8, lr=0.02)
    before, state, rewards = adapter_bytes(policy, base=True), fresh_state(policy, cfg), []
    for _ in range(12):
        rewards.append(train_step(policy, toy, cfg, state)[0]["reward"])
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.2
    assert adapter_bytes(policy, base=True) == before


def test_every_option_changes_the_update_and_the_same_options_repeat_it(toy):
    """An option that is accepted and does nothing makes an ablation that shows nothing."""
    def two_steps(**changed) -> dict[str, bytes]:
        cfg = replace(TOY, **{"ratio_clip": 0.05, "kl_target": 1e-4, **changed})
        policy = tiny_policy()
        state = fresh_state(policy, cfg)
        for _ in range(2):
            train_step(policy, toy, cfg, state)
        return adapter_bytes(policy)

    usual = two_steps()
    assert two_steps() == usual  # bit by bit the same student
    for option, value in (
            ("seed", 1), ("temperature", 1.3), ("top_p", 0.3), ("max_new_tokens", 3), ("lr", 2e-2),
            ("rollouts", 2), ("teacher", "none"), ("teacher_coef", 0.5), ("gap_clip", 0.1),
            ("gate", "success"), ("gate", "failure"), ("gate", "none"), ("replay_keep", 0.2),
            ("epochs", 1), ("ratio_clip", 0.01), ("kl_coef", 1.0), ("kl_target", 9.0),
            ("entropy_coef", 0.1), ("max_grad_norm", 0.01), ("replay_share", 0.5), ("blind", True),
            ("replay_every", 1)):
        assert two_steps(**{option: value}) != usual, option


def test_each_epoch_takes_one_optimiser_step_on_the_whole_batch(toy):
    """16 answers one at a time. Each is but a stop token, which is trained though it pads, too."""
    policy = replace(tiny_policy(stop_ids=range(len(VOCAB))), pad_id=EOS)
    before, cfg, policy.micro_tokens = adapter_bytes(policy), replace(TOY, epochs=3), 1
    state = fresh_state(policy, cfg)
    metrics, _ = train_step(policy, toy, cfg, state)
    assert {int(entry["step"]) for entry in state.optimizer.state.values()} == {3}
    assert metrics["tokens"] == 16 and math.isfinite(metrics["policy_loss"])
    assert adapter_bytes(policy) != before


def test_the_shares_of_a_step_on_paper():
    """Three groups of two answers: one is tied, one answer never stops, two fail the same way."""
    batch = siblings()
    batch.completion[3, 2] = AB  # in place of its stop token
    judged = [tasks.Verdict(reward, why == "ok", formatted, why, {}) for reward, formatted, why in (
        (1.0, True, "ok"), (1.0, False, "ok"), (-1.0, True, "test 1: wrong value"),
        (-0.5, True, "test 12: timeout"), (0.5, True, "ok"), (0.25, True, "ok"))]
    found = vcopd.rollout_metrics(tiny_policy(), batch, judged, replace(TOY, prompts=3, rollouts=2))
    assert found == {"reward": 1.25 / 6, "pass_rate": 4 / 6, "format_rate": 5 / 6, "tokens": 21,
                     "truncated": 1 / 6, "tied_rollouts": 1 / 3, "reasons": {"ok": 4, "test": 2}}


@pytest.mark.parametrize("method, sign", [("vcopd", 0), ("rl", 0), ("opd", 1)])
def test_where_no_verdict_counts_only_the_teacher_moves_the_student(method, sign, toy, monkeypatch):
    """All groups are tied, or nobody looks: two verifiers that disagree lead to the same student,
    bit by bit. Plain RL stands still then, and does not pay for a teacher."""
    if method == "rl":
        monkeypatch.setattr(tasks, "privileged_prompt", None)  # calling it would raise
    cfg = replace(TOY, method=method, **{"replay_share": 0.0, "entropy_coef": 0.0, "kl_coef": 0.0,
                                         "epochs": 1, **vcopd.METHODS[method]})
    before, students = adapter_bytes(tiny_policy()), []
    for factor in (sign, -sign):
        toy.verify = lambda example, answer, factor=factor: tasks.Verdict(
            float(example.id[3:]) + factor * len(answer), False, True, "test", {})
        policy = tiny_policy()
        metrics, _ = train_step(policy, toy, cfg)
        students.append(adapter_bytes(policy))
    assert (metrics["tied_rollouts"] == 1) == (sign == 0)
    assert metrics["teacher_share"] == pytest.approx(0.0 if method == "rl" else 1.0)
    assert students[0] == students[1] and (students[0] != before) == (method != "rl")


def test_step_1_trains_its_own_adapter_which_then_stays_and_anchors_the_kl(toy):
    """Measured against the model before Step 1, the guard would fight the format just learnt."""
    policy = tiny_policy()
    policy_before = adapter_bytes(policy)
    vcopd.train_format(policy, toy, TOY)
    formatted = adapter_bytes(policy)
    assert (policy.reference, policy.student) == (("format",), ("format", "policy"))
    assert policy_before.items() <= formatted.items()  # the policy adapter did not move
    assert all(p.grad is None for p in adapter_parameters(policy.model, "policy"))
    layers = vcopd.lora_layers(policy.model).values()
    assert all(layer.lora_B["format"].count_nonzero() for layer in layers)
    for epochs in (1, 2):
        cfg = replace(TOY, epochs=epochs)
        metrics, _ = train_step(policy, toy, cfg)
        assert (metrics["kl"] == 0) == (epochs == 1)  # of the last epoch, before its update
    after = adapter_bytes(policy)
    assert {n for n in after if after[n] != formatted[n]} == set(policy_before)


def test_every_step_has_its_own_examples_and_answers(toy):
    """Three steps are a pass. A generator started anew would sample the same answers for ever."""
    passes = [[e.id for step in range(3 * i, 3 * i + 3) for e in vcopd.examples_at(toy, step, TOY)]
              for i in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(e.id for e in toy.train)
    assert passes[0] != passes[1]
    toy.train, policy, written = toy.train[:1], tiny_policy(), set()
    for step, seed in [(0, 0), (1, 0), (0, 1)]:
        cfg = replace(TOY, prompts=1, seed=seed, lr=0.0)  # nobody learns
        state = replace(fresh_state(policy, cfg), step=step)
        _, samples = train_step(policy, toy, cfg, state)
        written.add(tuple(record["answer"] for record in samples))
    assert len(written) == 3


@pytest.mark.parametrize("step_1", [False, True])
def test_three_steps_then_a_new_process_then_three_are_six_steps(step_1, toy, tmp_path):
    """Optimiser moments, beta, the replay pool, the format adapter, the data order: all resume.
    And only one of the two looks at held-out problems: how often one looks changes nothing."""
    def run_steps(policy: vcopd.Policy, state: vcopd.State, out: Path, **options) -> list[dict]:
        vcopd.train(policy, toy, state, out, replace(TOY, **options))
        return read(out / "metrics.jsonl")

    def start(out: Path) -> tuple[vcopd.Policy, vcopd.State]:
        out.mkdir()
        policy = tiny_policy()
        if step_1:
            vcopd.train_format(policy, toy, TOY)
        return policy, fresh_state(policy, TOY)

    straight, state = start(tmp_path / "straight")
    expected = run_steps(straight, state, tmp_path / "straight", eval_every=100)

    first, state = start(out := tmp_path / "resumed")
    run_steps(first, state, out, steps=3, eval_every=1)
    state = fresh_state(second := tiny_policy(), TOY)  # knows nothing of the first
    with pytest.raises(vcopd.RunError, match="resum"):  # to start anew in silence would mislead
        vcopd.load_checkpoint(tmp_path / "nothing", second, state, TOY)
    vcopd.load_checkpoint(out / "checkpoint", second, state, TOY)
    assert (state.step, second.reference) == (3, first.reference)
    found = run_steps(second, state, out, eval_every=1)
    looks = [{key: line.pop(key) for key in [*line] if key.startswith("eval_")} for line in found]
    assert all(looks) and found == expected
    assert adapter_bytes(second) == adapter_bytes(straight)


# Real models: checks, teachers, NF4, adapters in PEFT's format ===============================

CHATML = ("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
         "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
OPTIONS = {  # what an architecture adds to SHAPE, or has in its place
    "qwen3": {"head_dim": 8}, "gpt2": {"n_inner": 48}, "granite": {"logits_scaling": 8.0},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 0.5}}
SUPPORTED = pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
EXAMPLES = [tasks.Example("", "def f(x):", "return", "the secret"),
            tasks.Example("", "repair this: def f(x):\n    return", "return", "a hint")]
SMALL = vcopd.Config(max_new_tokens=12)
IDS = [7, 30, 80, 81, 200, 45, 9, 130, 22, 60]
same = functools.partial(torch.allclose, atol=1e-5)  # but for rounding


def small_tokenizer(bos: bool = False, template: str | None = CHATML, text: str = "def f(x):"):
    """Its end of text is no end of a turn; with `bos`, it writes that in front of everything."""
    tokenizer = vcopd.train_tokenizer([text], 298)
    tokenizer.add_special_tokens({"eos_token": "<|text|>", "bos_token": "<s>"})
    if bos:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            "<s> $A", None, [("<s>", tokenizer.bos_token_id)])
    tokenizer.chat_template = template
    return tokenizer


def save_small(folder: Path, kind: str = "llama", tokenizer=None, **options) -> Path:
    """A random model of an architecture, as Hugging Face saves one."""
    sizes = {**SHAPE, **OPTIONS.get(kind, {}), **options}
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes))
    with torch.no_grad():  # at its initial scale a head says nothing
        model.get_output_embeddings().weight.mul_(5)
    model.save_pretrained(folder)
    (tokenizer or small_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of small models by their architecture, made once."""
    return functools.cache(lambda kind: save_small(tmp_path_factory.mktemp(kind) / "model", kind))


@pytest.fixture(scope="session")
def base(models) -> Path:
    """The one that most tests take."""
    return models("llama")


def load(model: str | Path, **options) -> vcopd.Policy:
    """Such a model in its roles: small adapters, and float32."""
    cfg = {"device": "cpu", "lora_rank": 4, "lora_alpha": 8.0, "format_rank": 2, **options}
    return vcopd.load_policy(vcopd.Config(model=str(model), **cfg), None)


def moved_policy(model: str | Path, **options) -> vcopd.Policy:
    """A policy after Step 1 and training, as far as its adapters are concerned: both do much."""
    policy = load(model, **options)
    vcopd.add_adapter(policy.model, "format", 2, 2.0, 0)
    policy.reference = (*policy.reference, "format")
    generator = vcopd.seeded("moved")
    for name, weight in policy.model.named_parameters():
        if name.endswith((".format", ".policy")):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return policy


@torch.no_grad()
def plain_logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers, and with an adapter PEFT, make of these folders: (L, V)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    return model.eval()(torch.tensor([IDS])).logits[0]


def rollouts(policy: vcopd.Policy) -> vcopd.Batch:
    """Two answers to each of two prompts of different length."""
    prompts = [policy.encode(example.prompt) for example in EXAMPLES]
    return vcopd.sample(policy, policy.student, prompts, 2, SMALL, vcopd.seeded("rollouts"))


@pytest.mark.parametrize("kind, quantize", [
    *((kind, "none") for kind in SUPPORTED.args[1]), ("llama", "nf4")])
def test_the_exported_adapter_has_the_logits_of_the_student(kind, quantize, models, tmp_path):
    """Both adapters leave as one. After sampling, too, a base in four bits has its gradient."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    policy = moved_policy(models(kind), quantize=quantize)
    before, reference, ours = (model_logits(policy, role, IDS) for role in (
        vcopd.BASE, policy.reference, policy.student))
    assert not same(before, reference) and not same(reference, ours)
    vcopd.export_adapter(tmp_path / "adapter", policy)
    assert same(plain_logits(models(kind)), before) == (quantize == "none")
    again = load(tmp_path / "adapter", quantize=quantize)
    assert same(model_logits(again, again.reference, IDS), ours)
    assert same(plain_logits(models(kind), tmp_path / "adapter"), ours) == (quantize == "none")
    [layer, *_], unit = vcopd.lora_layers(policy.model).values(), torch.eye(SHAPE["hidden_size"])
    jacobian = torch.autograd.functional.jacobian(layer, unit[:1])[0, :, 0]
    assert same(jacobian.T, layer(unit) - layer(0 * unit))


def peft_folder(base: Path, folder: Path, **options) -> Path:
    """An adapter as PEFT writes it, with weights that do something."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**{
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}, {"target_modules": "all-linear"}])
def test_a_peft_folder_is_a_specialist_teacher_or_where_training_starts(
        options, base, tmp_path, capsys):
    """Frozen either way; what training exports is then the whole way from the base."""
    folder = peft_folder(base, tmp_path / "made", **options)
    expected = plain_logits(base, folder)
    policy = load(base, teacher=str(folder))
    vcopd.adapter_optimizer(policy.model, "policy", 0.1)
    assert same(model_logits(*policy.teacher, IDS), expected)
    assert torch.equal(*(model_logits(policy, role, IDS) for role in (policy.student, vcopd.BASE)))
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(".policy") for name in trained)
    assert "Mind that" not in capsys.readouterr().out
    load(shutil.copytree(base, tmp_path / "other"), teacher=str(folder))
    assert f"trained on {base}" in capsys.readouterr().out
    policy = load(folder)
    assert same(model_logits(policy, policy.reference, IDS), expected)
    policy = moved_policy(folder)
    assert policy.student == ("start", "format", "policy")
    vcopd.export_adapter(tmp_path / "adapter", policy)
    assert same(plain_logits(base, tmp_path / "adapter"), model_logits(policy, policy.student, IDS))


@SUPPORTED
def test_a_teacher_has_no_gap_to_itself_but_through_its_template(kind, models, monkeypatch):
    """Exactly 0 on every token: contexts are aligned, and each is asked in the form it knows."""
    policy = load(models(kind), teacher=str(models(kind)))
    monkeypatch.setattr(tasks, "privileged_prompt", lambda example: example.prompt)
    batch, rows = rollouts(policy), [example for example in EXAMPLES for _ in range(2)]
    for template, gap in ((CHATML, False), (CHATML.replace("<|user|>", "<|user|>Please: "), True)):
        policy.teacher[0].tokenizer.chat_template = template
        for part in vcopd.score(policy, batch, rows, torch.zeros(4), SMALL):
            assert part.gap.any() == gap


def test_special_tokens_are_those_that_chat_models_know(tmp_path):
    """BOS once, by template or tokenizer; each stop, first the tokenizer's, which SFT teaches."""
    policy = load(save_small(tmp_path / "model", eos_token_id=[0, 3]))  # as Llama 3 and Gemma
    end, text = policy.tokenizer.convert_tokens_to_ids(["<|end|>", "<|text|>"])
    assert policy.stop_ids.tolist() == [text, end, 3]
    batch = vcopd.solution_batch(policy, EXAMPLES[:1])
    assert batch.completion[0, -1] == text and policy.decode(batch) == ["return"]
    code = "def f():\n    return '<|end|>' + '<|user|>'"  # else it is judged as other code
    batch = vcopd.solution_batch(policy, [replace(EXAMPLES[0], reference=code)])
    assert end not in batch.completion and policy.decode(batch) == [code]
    for word in ("end", "<|end|> and <|user|>"):  # no prompt can end its own turn
        ids = policy.encode(f"say {word} twice")
        assert (ids.count(end), ids.count(policy.encode("x")[0])) == (1, 1)
    # Qwen3 would think for longer than the longest answer
    policy.tokenizer.chat_template += "{% if enable_thinking is sameas(false) %}!{% endif %}"
    assert policy.tokenizer.decode(policy.encode("Q")).endswith("<|assistant|>!")
    for template in ("{{ bos_token }}" + CHATML, CHATML, None):
        policy.tokenizer = small_tokenizer(bos=True, template=template)
        for prompt in (EXAMPLES[0].prompt, tasks.privileged_prompt(EXAMPLES[0])):
            ids, bos = policy.encode(prompt), policy.tokenizer.bos_token_id
            assert ids[0] == bos and ids.count(bos) == 1
            assert prompt in policy.tokenizer.decode(ids)


@SUPPORTED
def test_recomputed_layers_give_the_same_gradients(kind, models):
    """The backward pass computes layers again when their adapters are long switched off."""
    gradients, calls = [], []
    for times in (1, 2):
        policy = moved_policy(models(kind))
        vcopd.adapter_optimizer(policy.model, "policy", 0.1)
        if times == 2:
            vcopd.recompute_layers(policy.model)
        batch, layers = rollouts(policy), vcopd.lora_layers(policy.model).values()
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        vcopd.imitate(policy, policy.student, batch)
        assert len(calls) == times * len(layers)
        calls.clear()
        gradients.append(policy_gradient(policy))
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


# ------------------------------------------------- whole runs of a second, and how to disturb them

EDITS = functools.cache(tasks.TASKS["codeedit"])
CTRL_C, read = [signal.SIGINT], vcopd.read_json


def small_sums() -> tasks.Task:
    """Arithmetic with little to evaluate, and a verifier that a random model can please."""
    def even_length(example, answer: str) -> tasks.Verdict:
        right = len(answer) % 2 == 0
        return tasks.Verdict(2.0 * right - 1, right, True, "ok" if right else "wrong", {})

    task = tasks.arithmetic()
    return replace(task, verify=even_length, anchors=task.anchors[::20],
                   benchmark=task.benchmark[25::20])


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory) -> dict[str, Path]:
    """For two methods, the folder of a run that nothing disturbed."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "arithmetic", small_sums)
        for method in ("vcopd", "sft"):
            folders[method] = tmp_path_factory.mktemp("whole") / method
            assert run(options(base, folders[method], "--method", method)) == 0
    return folders


@pytest.fixture
def small(monkeypatch):
    """The small tasks under the names of the built-in ones."""
    monkeypatch.setitem(tasks.TASKS, "arithmetic", small_sums)
    some = EDITS().train[:4]
    monkeypatch.setitem(tasks.TASKS, "codeedit", lambda: replace(
        EDITS(), train=some, evals={"in_domain": some}, validation=(some, []), benchmark=[]))


@pytest.fixture
def done(whole, small, tmp_path) -> Path:
    """A copy of a whole run, to spoil."""
    return shutil.copytree(whole["vcopd"], tmp_path / "run")


def options(base: str | Path, out: Path, *more: str) -> list[str]:
    """A command line for a run of six steps that takes about a second."""
    return ["--task", "arithmetic", "--model", str(base), "--out", str(out), "--steps", "6",
            "--prompts", "2", "--rollouts", "2", "--max-new-tokens", "6", "--eval-problems", "2",
            "--save-every", "2", "--eval-every", "4", "--lr", "0.01", "--lora-rank", "2",
            "--format-threshold", "0", "--replay-every", "3", *more]


def run(arguments: list[str]) -> int:
    """What `python vcopd.py ARGUMENTS` does, in this process: its exit code."""
    if arguments[0] == "--plot":
        return vcopd.main(vcopd.Config(), arguments[1:])
    try:
        return vcopd.main(vcopd.read_config(arguments))
    except SystemExit as stop:
        return stop.code


def results(out: Path) -> tuple:
    """All that a run leaves which must not depend on its history."""
    report = read(out / "report.json")
    names = ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors")
    return report["before"], report["after"], *((out / name).read_bytes() for name in names)


def forked(function, *args) -> int:
    """Call it in a process that can die without harm: the id of that."""
    pid = os.fork()
    if pid == 0:
        tasks.IDLE.queue[:] = [tasks.Server(), tasks.Server()]  # those we have are the parent's
        try:
            os._exit(function(*args) or 0)
        except BaseException:
            os._exit(99)
    return pid


def disturbed(owner, name: str, nth: int, trouble):
    """That function, but its nth call brings an error, a list of signals, or NaN."""
    function, calls = getattr(owner, name), itertools.count(1)

    def called(*args, **named):
        if next(calls) != nth:
            return function(*args, **named)
        if isinstance(trouble, Exception):
            raise trouble
        for number in trouble if isinstance(trouble, list) else ():
            os.kill(os.getpid(), number)
        return function(*args) * math.nan if trouble is math.nan else function(*args)

    return called


def refused(capsys, folder: Path, arguments: list[str], damages: dict[str, list], words="") -> None:
    """Each damage, None is a missing file, is one sentence with these words or the folder."""
    for name, damage in [(name, one) for name, several in damages.items() for one in several]:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if damage is not None:
            (folder / name).write_bytes(damage)
        assert run(arguments) == 2, (name, damage)
        assert (words or str(folder)) in (told := one_error(capsys)) and len(told) < 700, damage
        (folder / name).write_bytes(data)


def one_error(capsys) -> str:
    """The only line on the error stream besides progress bars; it is no traceback."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert line.startswith("vcopd.py: ") and "Traceback" not in line
    return line


FULL_DISK = OSError(errno.ENOSPC, "no space")
KNOBS = "out of memory: lower --micro-tokens, with which a run may --resume"


# The writes of a run: config and checkpoint 0; metrics and samples of each step, and a checkpoint
# of every second one; adapter, its config, and the report.
@pytest.mark.parametrize("method, where, nth, error, says, killed", [
    *(("vcopd", "open", nth, FULL_DISK, "no space", killed) for nth, killed in (
        (1, 2), (2, 1), (3, 3), (5, 4), (14, 5), (17, 4), (18, 2))),
    *(("vcopd", where, nth, CTRL_C, "same command again", 0) for where, nth in (
        ("sample", 2), ("evaluate", 1), ("refresh_replay", 2), ("evaluate", 2))),
    ("sft", "open", 9, FULL_DISK, "no space", 6),
    ("sft", "token_mean", 8, math.nan, "step 4, on the examples ", 0),
    *(("vcopd", "group_advantage", 3, error, KNOBS, 0) for error in (
        MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))),
    ("vcopd", "load_policy", 1, CTRL_C, "same command again", 0),
    ("vcopd", "score", 3, [signal.SIGTERM], "same command again", 4),
    ("vcopd", "score", 3, CTRL_C * 2, "same command again", 3)])
def test_whatever_stops_a_run_anywhere_it_goes_on_to_the_same_end(
        method, where, nth, error, says, killed, base, whole, small, tmp_path, monkeypatch, capsys):
    """One sentence if disk or memory is full or a loss not finite. Ctrl-C acts after the step, or
    at once when pressed twice: large models take minutes. SIGKILL may come in the continuation."""
    out, handler, more = tmp_path / "run", signal.default_int_handler, ("--method", method)
    signals = error if type(error) is list else []
    monkeypatch.setattr(vcopd, "open", open, raising=False)  # whatever is written goes through it
    signal.signal(signal.SIGINT, handler)  # in the background of a shell it would be ignored
    with monkeypatch.context() as patch:
        patch.setattr(vcopd, where, disturbed(vcopd, where, nth, error))
        assert run(options(base, out, *more)) == (130 if signals else 2)
    said = capsys.readouterr().out if signals else one_error(capsys)
    assert says in said and signal.getsignal(signal.SIGINT) is handler
    assert not list(out.glob("**/*.new")) and not (out / "report.json").exists()
    assert where != "score" or read(out / "metrics.jsonl")[-1]["step"] == 4 - len(signals)

    def run_and_die() -> int:
        vcopd.open = disturbed(vcopd, "open", killed, [signal.SIGKILL])
        return run(options(base, out, *more))

    assert not killed or os.waitpid(forked(run_and_die), 0)[1] == signal.SIGKILL
    assert run(options(base, out, *more)) == 0
    assert results(out) == results(whole[method])


def test_a_finished_run_is_kept_and_can_be_prolonged(base, whole, done, tmp_path, capsys):
    """--resume in a script's loop must end; somebody forgets --out after changing --lr."""
    for same in (["--resume", str(done)], options(base, done)):
        assert run(same) == 0
        assert "is finished" in capsys.readouterr().out
    for other in ("--lr", "0.02"), ("--steps", "5"):
        assert run(options(base, done, *other)) == 2
        assert f"other options ({other[0]}): give another --out" in one_error(capsys)
    assert results(done) == results(whole["vcopd"])
    saved = torch.load(state := done / "checkpoint/state.pt", weights_only=True)
    torch.save({**saved, "adapters": {f"x{n}": w for n, w in saved["adapters"].items()}}, state)
    assert run(options(base, done, "--steps", "8")) == 2 and "other adapters" in one_error(capsys)
    torch.save({**saved, "seconds": 1000.0}, state)
    assert run(options(base, done, "--steps", "8")) == 0
    assert 0 < saved["seconds"] < 1000 < read(done / "report.json")["seconds"] < 1100  # of both
    assert run(options(base, tmp_path / "straight", "--steps", "8")) == 0
    assert results(done) == results(tmp_path / "straight")


@pytest.mark.parametrize(("dead", "advice"), [
    ({}, ""), ({"truncated": 1.0}, "--max-new-tokens"), ({"format_rate": 0.0}, "--format-lr"),
    ({"tied_rollouts": 1.0, "format_rate": 0.5}, "--rollouts")])
def test_the_step_table_fits_and_a_dead_run_says_what_to_turn(dead, advice, tmp_path, capsys):
    """Whoever sees twenty steps of nothing has wasted an hour."""
    step = {"reward": -0.98765432, "pass_rate": 1 / 3, "kl": 1.23456e-5, "entropy": 2.0, "x": 9,
            "kl_coef": 0.0123456, "tied_rollouts": 0.5, "teacher_share": 0.1, "format_rate": 0.0}
    for i in range(21):
        looks = {f"eval_{key}": 0.123456 for key in ("pass", "replayed")} if i % 5 == 0 else {}
        vcopd.log_step(tmp_path, {"step": i, **looks, **(step | dead if i else {})}, [], 123.456)
        step["format_rate"] = 1.0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and "other" not in " ".join(lines)
    assert [line.split() for line in lines[:2]] == [["step", "new", "old", "seconds"],
                                                    ["0", "0.123", "0.123", "123"]]
    assert [advice in line for line in lines if "ten steps" in line] == [True] * 2 * bool(dead)


# ------------------------------------------------- other commands

@pytest.fixture
def files(tmp_path) -> Path:
    """A folder of data: with hopeless and too long rows; a benchmark; and others."""
    hopeless = own(id="b", tests=[{"args": [[1, 2], 0], "expected": 9}])
    far = own(id="far", buggy=BUGGY.replace("    return", "    result -= 1\n" * 300 + "    return"))
    for name, rows in {"bad": [OWN, hopeless, 3, far], "long": [far], "text": [3],
                       "bench": [RAW]}.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "odd/metrics.jsonl").mkdir(parents=True)
    return tmp_path


def test_a_quantised_run_and_its_adapter_on_data_files(small, files, monkeypatch, capsys):
    """Built-in model, NF4, Step 1, training, adapter; then the same table without a before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(files))
    pytest.importorskip("bitsandbytes")
    sizes = {**vcopd.SHAPE, "hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setattr(vcopd, "SHAPE", sizes)
    monkeypatch.setattr(vcopd, "SHORTER", {"arithmetic": {"documents": 60, "steps": 2}})
    assert run(options("tiny", files / "run", "--quantize", "nf4", "--format-threshold", "1",
                       "--format-examples", "4")) == 0
    report = read(files / "run/report.json")  # before is before Step 1
    assert report["before"]["kl_to_base"] == 0 < report["after"]["kl_to_reference"]
    assert report["after"]["pass@1_of_teacher"] == report["before"]["pass@1_of_teacher"]
    capsys.readouterr()
    assert run(["--model", str(files / "run/adapter"), "--quantize", "nf4", "--device", "cpu",
                "--eval-only", "--eval-data", str(files / "bad"), "--skip-bad-rows", "--benchmark",
                str(files / "bench"), "--max-new-tokens", "8", "--out", str(files / "test")]) == 0
    scores = read(files / "test/report.json")["scores"]
    assert scores["in_domain"]["pass@1"] == 0 and scores["kl_to_base"] > 0.001
    told = capsys.readouterr().out
    assert "programs" in scores["general"] and "in_domain pass@1" in told
    assert "was trained with --task arithmetic, not codeedit" in told
    assert "2 rows work, 2 do not" in told  # left out, and it is said so; so is one too long
    assert {path.name for path in (files / "test").iterdir()} == {"config.json", "report.json"}


@pytest.mark.parametrize("kind, trained, beyond", [
    ("llama", 8192, {}), ("mixtral", 3584, {"MixtralExperts": 393216, "MixtralTopKRouter": 1024})])
def test_what_is_trained_is_counted_and_what_lora_cannot_reach(kind, trained, beyond, models):
    """On paper: rank 4 takes 4 (in + out) of a layer. Experts are tensors; a norm is no matrix."""
    policy = load(models(kind))
    vcopd.adapter_optimizer(policy.model, "policy", 0.1)
    facts = vcopd.environment(policy)
    assert (facts["trained_parameters"], facts["out_of_reach_of_lora"]) == (trained, beyond)


@pytest.mark.parametrize("line, parts", [
    ("--inspect --task arithmetic", ["A_dense"]), ("--bench --task arithmetic", ["peak memory"]),
    ("--ask Hello --task arithmetic", ["- base, KL", "- student, KL", "- teacher, KL"])])
def test_commands_that_look_leave_no_file(line, parts, small, base, files, monkeypatch, capsys):
    """Safe beside a run and in any folder; a pipe gets no colours."""
    monkeypatch.chdir(files / "odd/metrics.jsonl")  # an empty folder
    assert run([*line.split(), "--model", str(base), "--prompts", "2", "--rollouts", "2",
                "--max-new-tokens", "6", "--eval-problems", "2"]) == 0
    told = capsys.readouterr().out
    assert not list(Path().iterdir()) and "\x1b" not in told
    assert all(part in told for part in parts)


def test_all_answer_what_is_asked_and_only_the_teacher_reads_the_hint(toy, monkeypatch, capsys):
    """A problem is asked by its id; plain text has no hint."""
    asked, example = [], toy.train[0]
    monkeypatch.setattr(vcopd, "answer", lambda policy, role, examples, *_: (
        asked.append((role, examples[0].prompt)) or [ragged_batch(((1, 3),))], ["so"], []))
    for text in (example.id, "plain"):
        vcopd.ask(replace(TOY, ask=text), tiny_policy(moved=0.3), toy)
    prompts = [*[example.prompt] * 2, tasks.privileged_prompt(example), *["plain"] * 3]
    assert asked == list(zip([(), ("policy",), ()] * 2, prompts, strict=True))
    assert len(re.findall(r"\d\.\d*[1-9]\d* nats per token:\nso\n", capsys.readouterr().out)) == 6


@pytest.mark.parametrize("role", [("format",), ("format", "policy")], ids=["before", "after"])
def test_each_number_of_a_report_is_of_the_right_role_and_prompts(role, toy, monkeypatch):
    """On paper: a batch is who was asked what, and a KL is of whom to whom on which batches."""
    policy = replace(tiny_policy(), reference=("format",), specialist=("teacher",))
    passing = {(role, "new", 0, False): (1,), (role, "new", 1, False): (1, 3, 4, 5, 6, 7),
               (role, "new", 0, True): (0, 1), (("teacher",), "new", 0, True): (1, 2, 3, 4),
               (policy.student, "val", 0, False): (1, 2, 3)}  # which of the answers are right

    def answer(policy, role, examples, k, temperature, cfg, verify=None):
        who = (role, examples[0].id[:3], temperature, "z" in examples[0].prompt)
        return [who], [f"{who[1]} {i}" for i in range(5)], [
            tasks.Verdict(0.5, True, True, "ok", {"excess_edit": 0.2})
            if i in passing.get(who, ()) else
            tasks.Verdict(-1.0, False, i % 2 == 0, "x", {"excess_edit": 9.0})
            for i in range(k * len(examples))]

    monkeypatch.setattr(vcopd, "answer", answer)
    monkeypatch.setattr(vcopd, "old_skills", lambda policy, role, task, problems, cfg: {
        "old": role, "chance": problems, "passes": {}})
    monkeypatch.setattr(vcopd, "kl_and_entropy", lambda policy, p, q, batches: [
        (p, q, batches), (p, batches)])
    toy.edit_metrics, toy.benchmark = ("excess_edit",), "benchmark"
    visited = [(role, "new", 1, False)]
    assert vcopd.evaluate(policy, toy, role, TOY) == {
        "in_domain": {"pass@1": 0.2, "pass@k": 0.4, "reward": -0.55, "format": 0.7,
                      "excess_edit": pytest.approx(0.2), "passes": [0, 1, 0, 0, 0],
                      "answers": [f"new {i}" for i in range(5)]},
        "general": {"old": role, "chance": "benchmark", "passes": {}},
        "kl_to_base": (role, (), visited), "entropy": (role, visited),
        "kl_from_base": ((), role, [((), "new", 1, False)]),
        "kl_to_reference": (role, policy.reference, visited), "pass@1_with_hint": 0.4,
        "entropy_anchors": (role, [(role, "old", 1, False)]),
        **({} if role == policy.student else {"pass@1_of_teacher": 0.8})}  # it does not change
    toy.validation = (toy.validation[0], "old problems")
    assert vcopd.look(policy, toy, TOY) == {
        "eval_pass": 0.6, "eval_reward": -0.1, "eval_format": 1.0, "eval_old": policy.student,
        "eval_chance": "old problems",
        "eval_kl": (policy.student, (), [(policy.student, "val", 1, False)]),
        "eval_kl_from_base": ((), policy.student, [((), "val", 1, False)])}


@pytest.mark.parametrize("broken, change", [
    ("", {}), ("pass rate up", {"passes": [1] * 2 + [0] * 98}),
    ("general benchmark kept", {"old": 0.879}), ("KL within budget", {"kl_to_base": 0.051}),
    ("entropy kept", {"entropy": 0.59}), ("entropy kept", {"entropy_anchors": 0.79}),
    ("extra edits not up", {"excess_edit": 0.101})])
def test_a_run_has_improved_if_every_condition_of_the_essay_holds(broken, change):
    """Each just holds, and is then broken alone. What cannot be tested neither holds nor fails."""
    def scores(passes, old, excess_edit, **others) -> dict:
        return {"in_domain": {"passes": passes, "pass@1": 0.5, "excess_edit": excess_edit},
                "general": {} if old is None else {"old": old}, **others}

    before = scores([0] * 100, 0.9, 0.1, entropy=2.0, entropy_anchors=1.0)
    after = {"passes": [1] * 9 + [0] * 91, "old": 0.881, "excess_edit": 0.1, "kl_to_base": 0.05,
             "entropy": 0.6, "entropy_anchors": 0.8, "kl_from_base": 9.0} | change
    verdict = vcopd.judge_run(before, scores(**after), vcopd.Config(kl_budget=0.05))
    assert verdict["improved"] is (not broken)
    assert "".join(n for n, c in verdict["conditions"].items() if not c["holds"]) == broken
    nothing = scores([0] * 100, None, None, entropy=2.0, entropy_anchors=0.0)
    held = vcopd.judge_run(nothing, scores(**after | {"old": None}), vcopd.Config(kl_budget=0.05))
    assert [name for name, condition in held["conditions"].items() if condition["holds"] is None
            ] == ["general benchmark kept", "extra edits not up"]


def test_the_interval_over_seeds_and_problems_is_that_of_all_resamples():
    """Two seeds, two problems: 4 x 4 resamples are equally likely."""
    before, change = [[0, 0], [0, 1]], torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    pairs = [list(pair) for pair in itertools.product((0, 1), repeat=2)]
    means = [change[seeds][:, problems].mean() for seeds in pairs for problems in pairs]
    low, high = vcopd.paired_bootstrap(before, (change + torch.tensor(before)).tolist())
    assert (low, high) == (min(means), max(means))  # each has more than 2.5 % of the mass


def test_the_frontier_is_the_best_of_all_looks_within_the_budgets():
    """On paper: two runs of one seed, the faster one forgets, and neither reaches 0.9."""
    def run(*rows) -> list[dict]:
        return [{"step": i, **dict(zip(("eval_pass", "eval_old", "eval_replayed", "eval_kl"), row,
                                       strict=True))} for i, row in enumerate(rows)]

    slow = run((0.5, 1.0, 1.0, 0.0), (0.7, 0.99, 1.0, 0.02), (0.8, 0.97, 0.9, 0.03))
    fast = run((0.5, 1.0, 1.0, 0.0), (0.85, 0.9, 0.8, 0.04))
    row = vcopd.frontier([slow, fast], vcopd.Config())
    assert row == {"best within budgets": [0.7], "reaches 0.8": [1.0], "reaches 0.9": [0.0],
                   "least step at 0.8": [1.0], "least eval_kl at 0.8": [0.03],
                   "least lost_replayed at 0.8": [pytest.approx(0.1)]}


def test_old_skills_are_counted_by_kind_and_by_the_chance_of_the_reference(toy, monkeypatch):
    """What an anchor guards, and what none does, are told apart; nobody asked is nothing lost."""
    policy, old = tiny_policy(moved=0.3), [
        replace(e, skill=skill) for e, skill in zip(toy_examples(3), "axx", strict=True)]
    toy.anchors = [replace(old[0], id="anchor")]
    monkeypatch.setattr(tasks, "verify_skill", lambda e, _: likes_a(e, "aaaaaa" * (e.id != "say1")))
    kept = vcopd.old_skills(policy, policy.student, toy, old, TOY)
    chances = [math.exp(sum(row)) for row in prefix_logps(
        policy, policy.student, vcopd.solution_batch(policy, old), 1.0)]
    assert kept.pop("chance") == pytest.approx(sum(chances) / 3, rel=1e-3)
    assert kept == {"old": 2 / 3, "replayed": 1.0, "a": 1.0, "unreplayed": 0.5, "x": 0.5,
                    "passes": {"old": [1.0, 0.0, 1.0], "replayed": [1.0], "unreplayed": [0.0, 1.0]}}
    assert vcopd.old_skills(policy, (), toy, [], TOY) == {"passes": {}}


def test_a_comparison_treats_all_methods_alike(small, base, tmp_path, capsys, monkeypatch):
    """No method may have more steps, other rates or other seeds, and a rate is chosen by looks."""
    monkeypatch.setattr(vcopd, "RATES", (0.5, 1.0))
    out = tmp_path / "all"
    arguments = options(base, out, "--compare", "--seeds", "2", "--steps", "2", "--eval-every", "1")
    assert run(arguments) == 0
    table, rates = read(out / "table.json"), ("0.005", "0.01")
    assert list(table["looks"]) == list(vcopd.METHODS)
    assert list(table["results"]) == ["base arithmetic", *vcopd.METHODS]
    assert list(table["differences"])[:2] == ["vcopd - base arithmetic", "rl - vcopd"]
    for (name, fixed), rate, seed in itertools.product(vcopd.METHODS.items(), rates, (0, 1)):
        folder, looks = out / f"{name} {rate}-s{seed}", table["looks"][name][rate][seed]
        held, result = read(folder / "config.json"), table["results"][name][seed]
        assert {**held, **fixed, "method": name, "lr": float(rate), "seed": seed} == held
        assert looks == [line for line in read(folder / "metrics.jsonl")]
        assert [look["step"] for look in looks] == [0, 1, 2]
        passes = {r: [run[-1]["eval_pass"] for run in table["looks"][name][r]] for r in rates}
        assert f"{result['lr'][0]:g}" == max(rates, key=lambda r: sum(passes[r]))
        chosen = out / f"{name} {result['lr'][0]:g}-s{seed}/test/report.json"
        assert result["in_domain pass@1"] == read(chosen)["scores"]["in_domain"]["passes"]
    assert re.search(r"^best within budgets .*\d\.\d{3} ±", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(vcopd, "train", None)  # all of it is there: nothing is trained again
    assert run(arguments) == 0
    assert read(out / "table.json") == table


def test_ablations_that_were_cut_short_go_on(small, base, whole, tmp_path, monkeypatch, capsys):
    """An hour of runs must survive Ctrl-C in one of them, and come out the same."""
    monkeypatch.setattr(vcopd, "ABLATIONS", {"vcopd": {}, "no replay": {"replay_share": 0.0}})
    out = tmp_path / "cut"
    arguments = options(base, out, "--ablations", "--seeds", "1")
    monkeypatch.setattr(vcopd, "score", disturbed(vcopd, "score", 5, CTRL_C))
    assert run(arguments) == 130
    monkeypatch.setattr(vcopd, "score", disturbed(vcopd, "score", 1 + 6 + 1, CTRL_C))
    assert run(arguments) == 0  # step 6 and the six of the other run, not one more
    for name in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (out / "vcopd 0.01-s0" / name).read_bytes() == (whole["vcopd"] / name).read_bytes()
    assert list(read(out / "table.json")["results"]) == ["base arithmetic", "vcopd", "no replay"]
    assert run([*arguments, "--kl-coef", "0.5"]) == 2  # half a run under other options is none
    assert "other options" in one_error(capsys)
    refused(capsys, out / "vcopd 0.01-s0", arguments, {"report.json": [b"{"]})


def test_the_lines_of_a_comparison_are_the_best_for_at_most_that_loss():
    """On paper: two rates, two seeds that differ by 0.2 in pass rate, three looks."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    panels, keys = list(figure.subplots(2, 3).flat), ("eval_kl", "eval_replayed", "eval_pass")
    rates = {"1": [(0, 1, 0.5), (0.02, 0.9, 0.7), (0.05, 1, 0.6)],
             "2": [(0, 1, 0.5), (0.01, 0.8, 0.6), (0.03, 0.95, 0.8)]}
    vcopd.draw_frontiers(panels, {"rl": {rate: [
        [dict(zip(keys, (*look[:2], look[2] + more), strict=True)) for look in run]
        for more in (-0.1, 0.1)] for rate, run in rates.items()}})
    for panel, x, y in ((0, [0, 0, 0, 0.05, 0.1, 0.2], [0.5, 0.6, 0.6, 0.8, 0.8, 0.8]),
                        (3, [0, 0, 0.01, 0.02, 0.03, 0.05], [0.5, 0.5, 0.6, 0.7, 0.8, 0.8])):
        assert same(torch.tensor(panels[panel].lines[1].get_data()), torch.tensor([x, y]).double())
    assert panels[5].containers[0][0].get_ydata() == pytest.approx([0.5, 0.6, 0.8])


def test_plot_draws_runs_and_comparisons(whole, done, tmp_path, monkeypatch, capsys):
    """Once in a real process, which has no screen; then folders that are missing or damaged."""
    pytest.importorskip("matplotlib")
    table, looks = tmp_path / "all", [[{"step": 0, "eval_pass": 0.5, "eval_kl": 0.0}]] * 2
    table.mkdir()
    (table / "table.json").write_text(json.dumps({"looks": {"rl": {"1": looks, "2": looks}}}))
    drawn = subprocess.run([sys.executable, vcopd.__file__, "--plot", table], text=True,
                           capture_output=True)
    assert (drawn.returncode, drawn.stdout) == (0, f"The picture is {table / 'plot.png'}\n")
    assert (table / "plot.png").read_bytes().startswith(b"\x89PNG")
    labels, one, none = [], ["--plot", str(done)], str(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.plot", lambda *_, label="", **__: labels.append(label))
        assert run([*one, str(done)]) == 0
    assert labels == ["", str(done)] * 12  # in every panel each run, raw and smoothed
    assert Path("plot.png").exists() and not (done / "plot.png").exists()
    assert run(one) == 0 and results(done) == results(whole["vcopd"])
    refused(capsys, done, one, {"metrics.jsonl": [
        None, b"3", b'{"step": 1, "kl": [1]}', b'{"step": 1, "kl"', b"[" * 99999]})
    refused(capsys, table, ["--plot", str(table)], {"table.json": [b"", b"[]", b"{}"]})
    (done / "plot.png").unlink()
    (done / "plot.png").mkdir()
    assert run(one) == 2 and str(done / "plot.png") in one_error(capsys)
    assert run([*one, none]) == 2 and none in one_error(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # an extra: nothing else needs it
    assert run(one) == 2 and "used (ModuleNotFoundError: import of" in (told := one_error(
        capsys)) and "pip install matplotlib" in told


# ------------------------------------------------- bad input: one sentence, exit code 2

def test_no_option_takes_a_value_out_of_its_range(capsys):
    """Some 200 lines: every number, every choice, every missing value."""
    knobs = {vcopd.flag(knob.name): knob for knob in vcopd.fields(vcopd.Config) if knob.metadata}
    lines = [[flag] for flag, knob in knobs.items() if type(knob.default) is not bool]
    lines += [[flag, "no\nsuch"] for flag, knob in knobs.items() if knob.metadata["choices"]]
    lines += [[flag, value] for flag, knob in knobs.items() if type(knob.default) in (int, float)
              for value in ("nan", "inf", "-1", "1e999", "", "x", "0x10", "9" * 5000)]
    for line in lines:
        assert run(line) == 2, line
        assert line[0] in one_error(capsys), line
    told = subprocess.run([sys.executable, vcopd.__file__, "--lr", "nan"], text=True,
                          capture_output=True)  # nor do the libraries add anything
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(("line", "words"), [
    ("--stesp 3", "--stesp"), ("extra", "extra"), ("--unsafe-judge yes", "yes"),
    ("--resume", "--resume"), ("--resume DIR", "no run of this version"),
    ("--resume DIR/run --lr 1", "holds other options (--lr)"),
    ("--method rl --teacher-coef 1", "--teacher-coef contradicts --method rl"),
    ("--compare --method sft", "contradicts --compare"), ("--ablations --teacher none", "need a"),
    ("--compare --teacher none", "need a teacher"), ("--inspect --teacher none", "need a teacher"),
    ("--inspect --bench", "not allowed with"), ("--eval-only --steps 3", "contradicts --e"),
    ("--method opd --teacher none", "need a teacher"), ("--method rl --rollouts 1", "--rollouts 1"),
    ("--teacher none --rollouts 1", "--rollouts 1"), ("RUN --data x", "x cannot be used"),
    ("RUN --out DIR/text", "DIR/text"), ("RUN --out DIR/text/run", "DIR/text/run"),
    ("RUN --out DIR/odd", "DIR/odd"), ("RUN --model DIR/run", "give DIR/run/adapter"),
    ("RUN --model no/model", "no/model cannot be used (OfflineModeIsEnabled: Cannot reach"),
    ("RUN --ask " + 999 * "long", " tokens, the model reads "),
    ("RUN --model owner/name --device cpu", "works on --device cpu"),
    ("RUN --model DIR", "DIR cannot be used"), ("RUN --device cuda:99", "--device cuda:99"),
    ("RUN --benchmark DIR/text", "DIR/text line 1: "), ("RUN --task codeedit --data DIR", "DIR"),
    ("RUN --task codeedit --eval-data DIR/none", "DIR/none"),
    ("RUN --task codeedit --data DIR/bad", 'DIR/bad line 2: id "b": its reference must pass'),
    ("RUN --task codeedit --data DIR/long", "far with answer has"),
    ("RANKS --prompts 3", "--prompts 3 must be a multiple"), ("RANKS --device cuda:1", "or cpu")])
def test_what_cannot_work_is_one_sentence(line, words, base, done, files, monkeypatch, capsys):
    """Before anything is trained; permissions are left out, as root has them all."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (done / "report.json").unlink()
    arguments = line.replace("DIR", str(files)).split()
    if arguments[0] == "RANKS":  # what torchrun tells one of two
        for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"),
                            ("RANK", "0")):
            monkeypatch.setenv(name, value)
    if arguments[0] in ("RUN", "RANKS"):
        arguments = [*options(base, files / "new"), *arguments[1:]]
    assert run(arguments) == 2
    assert words.replace("DIR", str(files)) in one_error(capsys)
    assert not (files / "new/metrics.jsonl").exists()


@pytest.mark.parametrize(("kind", "adapter", "words"), [
    ("no end", None, "no end-of-sequence token"), ("other text", None, "every token by"),
    ("llama", {"use_dora": True}, "magnitude.* is of no linear"),
    ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.* is of no linear"),
    ("llama", {"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ("llama", {"alpha_pattern": {"v_proj": 2}}, "alpha_pattern"),
    ("other size", {}, "down_proj has other sizes")])
def test_what_is_not_supported_is_refused_by_name(kind, adapter, words, base, tmp_path):
    """Else it would be trained wrongly, or a wrong teacher that nobody notices."""
    tokenizer, size = small_tokenizer(text=kind), 64 if kind == "other size" else 128
    tokenizer.eos_token = None if kind == "no end" else tokenizer.eos_token
    folder = save_small(tmp_path / "model", "llama" if " " in kind else kind, tokenizer,
                        intermediate_size=size)
    if adapter is not None:
        folder = peft_folder(folder, tmp_path / "adapter", **adapter)
    teaching = adapter is not None or kind == "other text"
    model, teacher = (base, str(folder)) if teaching else (folder, "self")
    with pytest.raises(vcopd.RunError, match=words):
        load(model, teacher=teacher)


def test_a_damaged_model_or_adapter_folder_is_one_sentence(base, whole, small, tmp_path, capsys):
    """The libraries raise a dozen kinds of error at half a download, and draw missing weights."""
    names = {base: ["config.json", "model.safetensors", "tokenizer.json"],
             whole["vcopd"] / "adapter": ["adapter_config.json", "adapter_model.safetensors"]}
    for source, files in names.items():
        folder = shutil.copytree(source, tmp_path / source.name)
        halves = {name: (folder / name).read_bytes()[:(folder / name).stat().st_size // 2]
                  for name in files}
        refused(capsys, folder, options(folder, tmp_path / "out"), {
            name: [None, b"", b"[]", b"\xff" * 99, half] for name, half in halves.items()})
    larger = json.dumps({**read(base / "config.json"), "num_hidden_layers": 3})
    (tmp_path / base.name / "config.json").write_text(larger)
    with pytest.raises(vcopd.RunError, match="no weights for model.layers.2"):
        load(tmp_path / base.name)
    with pytest.raises(vcopd.RunError, match="delete it, and it is built again"):  # as tiny is
        load(shutil.copytree(tmp_path / base.name, tmp_path / "vcopd/tiny-x"))


def test_a_damaged_run_folder_is_one_sentence(whole, done, capsys):
    """Config, metrics and checkpoints: cut, empty, of another kind, of another run."""
    (done / "report.json").unlink()
    held, state = read(done / "config.json"), (done / "checkpoint/state.pt").read_bytes()
    other = json.dumps({**held, "lora_rank": 3}).encode()
    refused(capsys, done, ["--resume", str(done)], {
        "config.json": [other, b"", b"{}", b"[]", b"nul", b"\xff", b"[" * 99999, other[:-9]],
        "metrics.jsonl": [None, b"", b"{}\n", b"\xff\n"],
        "checkpoint/state.pt": [state[:-20], b"", b"{}"]})
    assert run(["--resume", str(done)]) == 0  # all of it could be mended
    assert results(done) == results(whole["vcopd"])


@pytest.mark.parametrize("method", ["vcopd", "sft"])
def test_two_ranks_that_stop_and_go_on_equal_one_process(method, base, small, tmp_path, capfd):
    """With Step 1, replay, evaluation; one process goes on in between. The nucleus is greedy."""
    def as_rank(number: str, port: int, arguments: list[str]) -> int:  # as torchrun starts it
        os.environ.update(TORCHELASTIC_RUN_ID="x", WORLD_SIZE=world, RANK=number, LOCAL_RANK=number,
                          MASTER_ADDR="localhost", MASTER_PORT=str(port))
        return run(arguments)

    more = ["--method", method, "--format-threshold", "1", "--top-p", "0.01", "--lr", "0.003",
            "--format-examples", "4", *(["--replay-share", "0.5"] if method == "vcopd" else [])]
    assert run(options(base, tmp_path / "one", *more)) == 0
    resume = ["--resume", str(tmp_path / "two"), "--steps"]
    for world, line in (("2", options(base, tmp_path / "two", *more, "--steps", "2")),
                        ("1", [*resume, "4"]), ("2", [*resume, "6"])):
        capfd.readouterr()
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        children = [forked(as_rank, str(rank), port, line) for rank in range(int(world))]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * int(world)
        assert capfd.readouterr().out.count("Verdict:") == 1  # rank 0 speaks for both
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for ours, theirs in zip(two, one, strict=True):
        assert ours.pop("reasons", None) == theirs.pop("reasons", None)
        assert ours.pop("grad_norm", 0) == pytest.approx(theirs.pop("grad_norm", 0), rel=0.05)
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-6)


# The judge: what hostile candidates try, by group, and what must be left of it ===============

ADDITION = [([2, 3], 5), ([10, -4], 6), ([0, 0], 0), ([-7, 7], 0), ([1, 10**30], 10**30 + 1)]
HONEST = "def f(a, b):\n    return a + b\n"
SCRIPT = "def check(f):\n    assert f(2, 3) == 5\n    assert f(10, -4) == 6\n\n\ncheck(f)"
WRONG = "test 1: wrong value"


def run_tests(*job, run=tasks.run_tests) -> str:
    """'' for a pass, else why not: short to compare with."""
    if "seccomp" not in tasks.judge_layers():
        pytest.skip("this machine has no seccomp filter")
    outcome = run(*job)
    assert outcome.passed is (outcome.reason == "ok")
    return "" if outcome.passed else outcome.reason


def verdict(code: str, seconds: float = 0.5) -> str:
    """The reason why `code` is no addition."""
    return run_tests(code, "f", ADDITION, False, seconds)


def script_verdict(code: str, script: str = SCRIPT) -> str:
    return run_tests(code, "f", script, 0.5, run=tasks.run_script)


def in_threads(function, items) -> list:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(function, items))


def processes(*fields: str) -> list[list[str]]:
    """What `ps` knows of all processes but itself."""
    done = subprocess.run(["ps", "-eo", ",".join(fields)], capture_output=True, text=True)
    return [line.split(None, len(fields) - 1) for line in done.stdout.splitlines()[1:]]


def assert_unharmed() -> None:
    """An honest check passes on each server. Only servers are left below us, and no zombie."""
    assert in_threads(verdict, [HONEST] * 8) == [""] * 8
    rows, family = processes("pid", "ppid", "stat", "comm"), {str(os.getpid())}
    for _ in range(4):
        family |= {row[0] for row in rows if row[1] in family}
    left = [row for row in rows if row[1] in family and row[3] != "ps"]
    assert len(left) <= 2 * tasks.IDLE.qsize() and not [r for r in left if "Z" in r[2]], left


def test_every_builtin_value_survives_the_journey_both_ways():
    """Arguments go in and come back unchanged: digits, order, types, surrogates."""
    values = [None, True, -(7**9000), 0.1 + 0.2, -0.0, math.inf, 1e-320, 2 - 3j, b"\x00\xff",
              "snow \u2603 \U0001f600 \ud800", [], (1, [2, (3,)], {4: {5}}), {}, set(),
              {3, "a", (1, 2), frozenset({1})}, {1: "one", None: [], (2, 3): {"x": 1.5}}]
    assert run_tests("def f(x):\n    return x\n", "f", [([value], value) for value in values]) == ""
    ordered = [([{"z": 1, "a": 2, "m": 3}], ["z", "a", "m"])]  # honest code may depend on it
    assert run_tests("def f(d):\n    return list(d)\n", "f", ordered) == ""


VALUES = [  # what a candidate returns, what was expected, whether from JSON, whether it is equal
    ("0.3", 0.1 + 0.2, False, True), ("0.0", -0.0, False, True), ("0.30001", 0.3, False, False),
    ("5.0", 5, False, False), ("14.0", 14, True, True), ("5", 5.0, True, True),
    ("True", 1, True, False), ("1", True, False, False), ("[True]", [1], False, False),
    ("(1, 2)", [1, 2], False, False), ("(1, (2,))", [1, [2]], True, True),
    ("[1]", [1, 2], True, False), ("'None'", None, False, False), ("{1: 1}", {1: True}, 1, False),
    ("{'b': 1, 'a': 2}", {"a": 2, "b": 1}, False, True), ("{1, 'x'}", {"x", 1}, False, True),
    ("float('nan')", math.nan, False, False), ("[float('nan')]", [math.nan], True, False),
    ("Counter('aab')", {"a": 2, "b": 1}, False, True), ("OrderedDict(a=1)", {"a": 1}, True, True),
    ("defaultdict(int, a=1)", {"a": 1}, True, True), ("P(1, 2)", (1, 2), False, True),
    ("P(1, 2)", [1, 2], True, True), ("range(3)", [0, 1, 2], False, True),
    ("(x * x for x in [1, 2])", [1, 4], False, True), ("{1: 2}.keys()", [1], True, True),
    ("Lying(5)", 5, False, True), ("Lying(4)", 5, False, False), ("[Lying(4)]", [5], True, False)]


@pytest.mark.parametrize("value, expected, from_json, equal", VALUES, ids=str)
def test_values_are_compared_by_type_and_floats_by_closeness(value, expected, from_json, equal):
    """Types that add nothing to a value are no error. JSON knows fewer types than Python, so only
    what came from it lets a tuple stand for a list and 14.0 for 14."""
    code = ("from collections import *\nP = namedtuple('P', 'x y')\nclass Lying(int):\n"
            f"    __eq__ = lambda a, b: 1\n    __hash__ = int.__hash__\ndef f(): return {value}\n")
    assert run_tests(code, "f", [([], expected)], from_json) == ("" if equal else WRONG)


def test_usual_imports_work_though_no_file_can_be_opened():
    """Functions import lazily, and md5 or strptime load more on first use."""
    assert verdict("""
from typing import List, Optional
import math, collections, re, itertools, functools, heapq, bisect, string, statistics, random
import fractions, decimal, datetime, copy, operator, hashlib, unicodedata, json
def f(a, b):
    import time, textwrap
    hashlib.md5("x".encode("ascii")).hexdigest(), random.random(), time.time()
    datetime.datetime.strptime("2020-01-02", "%Y-%m-%d"), "\\N{SNOWMAN}", decimal.Decimal(a)
    return a + b
""") == ""


def test_no_verifier_takes_a_word_for_a_pass(tmp_path):
    """The same on all the ways that training and evaluation take."""
    [program] = load_benchmark(written(tmp_path, RAW))
    [scripted] = tasks.load_edits(written(tmp_path, RAW))
    coding = next(e for e in built("arithmetic").benchmark if e.skill == "coding")
    for example, verify, worst in ((sum_problem(), tasks.verify_edit, -1.0),
                                   (scripted, tasks.verify_edit, -1.0),
                                   (program, tasks.verify_program, -1.0),
                                   (coding, tasks.verify_skill, 0.0)):
        raising = f"def {example.entry_point}(*args):\n    raise type('ok', (Exception,), {{}})\n"
        found = verify(example, raising)
        assert (found.reward, found.passed) == (worst, False)
    for passed, reason in ((True, "error: x"), (False, "ok"), (1, "ok")):
        with pytest.raises(ValueError, match="a verdict cannot be"):
            tasks.Verdict(1.0, passed, True, reason, {})


LEAVING = [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "raise StopIteration",
    "raise KeyboardInterrupt", "import unittest; raise unittest.SkipTest('later')",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise GeneratorExit",
    "import os; os.execv('/bin/true', ['true'])", "import os; os.close(3)",
    "import ctypes; ctypes.string_at(0)", "import atexit; atexit.register(print); x = 0"]
LYING = [
    "Liar()", "Sub(0)", "[Sub(a + b)]", "mock.ANY", "float('nan')", "Fraction(a + b)",
    "type('int', (), {'__class__': int, '__eq__': lambda s, o: True})()", "itertools.count()",
    "(a + b for _ in range(1))", "type('D', (dict,), {})()", "True", "str(a + b)"]
PATCHES = [
    "builtins.len = lambda x: 0", "builtins.all = lambda x: True", "sys.settrace(lambda *a: None)",
    "builtins.isinstance = lambda *a: True", "json.dumps = lambda *a, **k: '\"\"'",
    "sys.modules.clear()", "sys._getframe(2).f_globals['line_of'] = lambda m: b'[\"passed\"]\\n'",
    "builtins.type = lambda x: int", "math.isclose = lambda *a, **k: True",
    "json.loads = lambda *a, **k: []", "builtins.AssertionError = builtins.Exception = SystemExit",
    "sys.modules['json'] = sys.modules['math'] = None", "sys.excepthook = lambda *a: os._exit(0)",
    "sys._getframe(2).f_globals.update(encode=lambda v, d=0: '', fail=print)"]
FORGERIES = [
    'b"true\\n"', "b'\"\"\\n'", "b'[]\\n'", "b'null'", "b'[\"passed\"]\\n'", "b'\"ok\"\\n'",
    'b\'[["value", ["int", "0x5"]]]\\n\'', 'b\'[["fault", true]]\\n\'', 'b\'[["fault", ""]]\\n\'',
    'b\'[["fault", ["passed"]]]\\n\'', 'b\'[["value", ["int", 5]]]\\n\'', 'b\'[["ok", "ok"]]\\n\'',
    'b\'[["value", {"int": "0x5"}]]\\n\'', "b'[' * 500_000", "b'[' * 900 + b']' * 900",
    "b'9' * 500_000", "b'\\xff\\xfe\\x00\\n'", "b'\"\\\\ud800\"\\n'", "b'\\x00\\x00\\x00\\x04true'",
    "b'[]\\n' * 100_000"]
LIARS = """
import itertools
from fractions import Fraction
class Liar:
    __eq__ = lambda self, other: True
    __repr__ = lambda self: "5"
class Sub(int):
    __eq__ = lambda self, other: True
class mock:
    ANY = Liar()
"""


@pytest.mark.parametrize("judged_by", [verdict, script_verdict])
def test_leaving_lying_patching_and_forging_change_no_verdict(judged_by):
    """Groups A to C and E. Exit code 0 and silence mean nothing, only values count, rebuilt from
    exact types where no candidate is. Forged messages go to every descriptor, early and late."""
    codes = [code for line in LEAVING for code in (
        f"def f(a, b):\n    {line}\n", f"def f(a, b):\n    return 0\n{line}\n")]
    codes += [f"{LIARS}def f(a, b):\n    return {value}\n" for value in LYING]
    codes += [f"import builtins, json, math, os, sys\n{patch}\ndef f(a, b):\n    return 0\n"
              for patch in PATCHES]
    for line, load in itertools.product(FORGERIES, ("shout()\n", "")):
        shout = ("import os\ndef shout():\n    for fd in range(8):\n"
                 f"        try: os.write(fd, {line})\n        except: pass\n    os._exit(0)\n")
        codes.append(f"{shout}{load}def f(a, b):\n    shout()\n")
    assert not [code for code in codes if not judged_by(code)]
    for name in ("ok", "passed", "value", "True", ""):  # a verdict is never a word
        raising = f"raise type({name!r}, (Exception,), {{}})"
        named = f"class M(type):\n    __name__ = {name!r}\nclass E(Exception, metaclass=M): pass\n"
        for code in (f"def f(a, b): return 0\n{raising}", f"def f(a, b): {raising}",
                     f"{HONEST}{raising}", f"{named}def f(a, b): raise E"):
            assert judged_by(code).startswith(("error: ", "test 1: error: "))
    assert_unharmed()


@pytest.mark.parametrize("needle, found", [
    ("answer_calls", True), ("6480297", False), ("run_tests", False), ("without_idle", False),
    ("a-siblings-answer", False), ("a-siblings-argument", False)])
def test_no_answer_trace_or_task_is_in_a_candidates_memory(needle, found):
    """Group D. Expected values never go in, no server ever held a job, and its program is not the
    trusted part of this file. The needle comes in backwards, lest it finds itself."""
    peek = """
import gc, sys
def f(needle):
    frame, found = sys._getframe(1), []
    while frame:
        found += [frame.f_locals, frame.f_globals, frame.f_code.co_consts, frame.f_code.co_names]
        frame = frame.f_back
    return needle[::-1] in repr(found) + repr(gc.get_objects())
"""
    sibling = "def f(x):\n    return 'a-siblings-answer'\n"
    for _ in range(2 * tasks.IDLE.qsize()):
        assert run_tests(sibling, "f", [(["a-siblings-argument"], 6480297)])
    tests = [([needle[::-1]], found), ([needle[::-1]], 6480297)]
    assert run_tests(peek, "f", tests) == "test 2: wrong value"


def test_the_servers_program_is_no_task_verifier_or_judge(monkeypatch):
    """It is cut out of tasks.py, so it must be seen to be the right piece; also if a task is added
    at the end. Its environment holds only what makes verdicts repeatable."""
    program = tasks.server_program()
    own = {getattr(node, "name", "") for node in ast.parse(program).body}
    trusted = {"Example", "privileged_prompt", "sum_example", "verify_edit", "without_idle",
               "web_document", "load_rows", "run_tests", "same_value", "Server", "server_program"}
    assert {"serve", "confine", "examine", "encode", "line_of"} <= own
    assert not own & trusted and trusted <= vars(tasks).keys()
    longer = tasks.THIS_FILE + "\n# ====\n# Mine\n# ====\nTASKS[0] = 1\n"
    monkeypatch.setattr(tasks, "THIS_FILE", longer)
    assert tasks.server_program() == program and tasks.EDIT_PROMPT not in program
    code = ("import os, sys\ndef f():\n    known = {'LC_CTYPE', 'PYTHONHASHSEED'}\n"
            "    return [set(os.environ) <= known, sys.flags.hash_randomization, sys.argv]\n")
    assert run_tests(code, "f", [([], [True, 0, ["-c"]])]) == ""


HOGS = [
    "while True: pass", "import time; time.sleep(9)", "os.read(3, 1); os.read(3, 1)",
    "import _thread; x = _thread.allocate_lock(); x.acquire(); x.acquire()",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGXCPU, print)\n"
    "    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "x = []\n    while True: x.append(bytearray(10**7))", "return 9 ** 9 ** 9", "return f(a, b)",
    "sys.setrecursionlimit(10**9)\n    return f(a, b)", "return 'x' * 50_000_000",
    "return [0] * 3_000_000", "while True: print('x' * 10_000)", "x = D()",
    "import re; return re.match('(a+)+$', 'a' * 40 + 'b')", "x = []; x.append(x); return x",
    "x = []\n    for _ in range(90): x = [x, x]\n    return x",
    "x = 1\n    for _ in range(100_000): x = [x]\n    return x",
    "while True: os.write(3, b'x' * 65536)", "return {i * (2**61 - 1) for i in range(20_000)}",
    "while True:\n        os.write(3, b'x')\n        for _ in range(3000): pass"]
BOMBS = ["x = " + "(" * 50_000, "x = " + "-" * 200_000 + "1", "x = " + "+".join(["1"] * 100_000)]


def test_hogs_fail_within_their_limit():
    """Group F. Of CPU time, memory, output and, where they only wait, of wall time, which is five
    times as long. Parser bombs go off in the sandbox. Nothing is left running."""
    def timed(code: str) -> tuple[str, float]:
        start = time.monotonic()
        return verdict(code), time.monotonic() - start

    head = "import os, signal, sys\nclass D:\n    def __del__(self):\n        while True: pass\n"
    codes = [f"{head}def f(a, b):\n    {hog}\n" for hog in HOGS]
    codes += [f"{bomb}\n{HONEST}" for bomb in BOMBS]
    found = in_threads(timed, codes)
    assert all(reason and seconds < 8 for reason, seconds in found), found
    assert found[0][0] == found[3][0] == "timeout" and found[3][1] > 2.4
    assert not [bomb for bomb in BOMBS if tasks.parse_python(f"{bomb}\n{HONEST}")]
    assert_unharmed()


READING = [
    "return open('/proc/self/cmdline').read()", "return os.listdir('/')", "import ctypes",
    "return os.open('/proc/self/fd', os.O_RDONLY)", "return open(VICTIM).read()",
    "return os.readlink('/proc/self/exe')", "import __main__",
    "os.lseek(0, 0, 0); return [os.read(fd, 9) for fd in range(4, 64)]"]
DOING = [
    "open(VICTIM, 'w').write('x')", "import subprocess; subprocess.run(['touch', VICTIM + '.new'])",
    "open(VICTIM + '.new', 'w').write('x')", "os.system('touch ' + VICTIM + '.new'); raise OSError",
    "os.unlink(VICTIM)", "os.fork()", "import socket; socket.socketpair()", "os.kill(TRAINER, 19)",
    "os.rename(VICTIM, VICTIM + '.old')", "os.setsid(); os.nice(-5); os.chroot('/')",
    "os.mkdir(VICTIM + '.d')", "import threading; threading.Thread(target=print).start()",
    "import socket; socket.create_connection(('127.0.0.1', PORT), 1)", "os.kill(os.getppid(), 9)",
    "os.killpg(0, 9)", "os.kill(-1, 9)"]
DIGGING = """import sys
def f():
    frame = sys._getframe()
    while 'libc' not in frame.f_globals: frame = frame.f_back
    c = frame.f_globals['libc']()
    return [c.fork(), c.socket(1, 1, 0), c.open(b'/etc/passwd', 0), c.kill(1, 9), c.fcntl(3, 8, 1)]
"""


def test_files_processes_and_the_network_are_out_of_reach(tmp_path):
    """Groups D and G. Nothing is read, written, deleted, started, reached, signalled. The C library
    of the program itself can be found through the frames, but all that it does is filtered."""
    victim = tmp_path / "victim"
    victim.write_text("5 6 0")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names = f"VICTIM, PORT, TRAINER = {str(victim)!r}, {listener.getsockname()[1]}, "
        for body in READING + DOING:
            code = f"import os\n{names}{os.getpid()}\ndef f(a, b):\n    {body}\n    return a + b\n"
            assert verdict(code).startswith("test 1: error: "), body
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert run_tests(DIGGING, "f", [([], [-1] * 5)]) == ""
    assert os.listdir(tmp_path) == ["victim"] and victim.read_text() == "5 6 0"
    assert_unharmed()


def test_no_state_helps_and_none_is_left():
    """Group H. Arguments are fresh, values are read when they are returned, every candidate is a
    fresh fork of a server that ran nobody's code; order and random numbers are the same again."""
    same = [([[]], []), ([[1]], [1]), ([[1, 2]], [1, 2]), ([[]], [])]
    for code in ("def f(x):\n    x.append(1)\n    return x\n",
                 "def f(x, seen=[]):\n    seen.append(1)\n    return [] if len(seen) == 1 else x\n",
                 "n = 0\ndef f(x):\n    global n\n    n += 1\n    return [[], [1], [1]][n % 3]\n",
                 "import gc\ndef f(x):\n    return gc.get_referrers(x)[0]\n",
                 "out = []\ndef f(x):\n    out.extend(x)\n    return out\n"):
        assert run_tests(code, "f", same), code
    for poison in ("import builtins; builtins.len = lambda x: 5", "import sys; sys.modules.clear()",
                   "import math; math.pi = 3; math.floor = None", "import gc; gc.disable()",
                   "import sys; sys.setrecursionlimit(60)",
                   "import random; random.seed = random.random = None"):
        for _ in range(2 * tasks.IDLE.qsize()):
            assert verdict(f"{poison}\ndef f(a, b): return None\n")
        code = "import math, random\nrandom.random()\n"
        assert verdict(code + "def f(a, b): return math.floor(a + b + len([]))\n") == ""
    shared = [3, 1, 2]
    code = "def f(x):\n    x.sort()\n    y = x[:]\n    x.clear()\n    return y\n"
    assert run_tests(code, "f", [([shared], [1, 2, 3])] * 3) == "" and shared == [3, 1, 2]
    code = "import random\nx = [random.random()]\ndef f(i):\n    x.append(i)\n    return x\n"
    job = tasks.line_of(["candidate", code, "f"]) + b'[["f", ["list", true]]]\n'
    first, again = (tasks.run_job(job, 1.0, 1) for _ in range(2))
    assert first == again and first[0][0][0] == "value"


PUBLISHED = """
METADATA = {'author': 'x'}
import math
def near(x, y): return math.isclose(x, y)
def check(candidate):
    import random
    for n in random.sample(range(99), 30): assert candidate(double(n)) == n, "message"
    assert near(candidate(1.0), 0.5)
check(f)
"""
EXPECTING = """
def check(candidate):
    try:
        for value in map(candidate, [1, 2]): assert value == 0
    except ValueError: return
    except: pass
"""
BY_BASE = ("def check(c):\n    try: c(1)\n    except ValueError as error: str(error)\n"
           "    else: raise AssertionError\n")
HELPERS = "def near(x, y): return abs(x - y) < 1\ndef check(c):\n    assert near(c(5), 5)\n"
REDEFINED = ("0\ndef abs(x): return 0\ndef near(x, y): return True\ndef check(c): pass\n"
             "def __builtins__(): pass\ndef AssertionError(): pass")

REASONS = [
    ("", "error: no function f"), ("def g(a, b):\n    return a + b\n", "error: no function f"),
    ("f = 5\n", "error: no function f"), ("def f(a, b:\n", "error: syntax error"),
    ("def f(a, b):\n    return a + b\0\n", "error: syntax error"),
    ("# \ud800\n" + HONEST, "error: syntax error"), ("\ufeff" + HONEST, "error: syntax error"),
    (HONEST.replace("f(", "\u0192("), "error: no function f"),
    (f"```python\n{HONEST}```\n```python\n{HONEST}```\n", "error: syntax error"),
    ("raise ValueError\n" + HONEST, "error: ValueError"),
    ("def f(a):\n    return a\n", "test 1: error: TypeError"),
    ("async def f(a, b):\n    return a + b\n", "test 1: error: cannot send this coroutine"),
    ("def f(a, b):\n    return a + b if a != 10 else 0\n", "test 2: wrong value"),
    ("def f(a, b):\n    return f\n", "test 1: error: cannot send this function"),
    ("def f(a, b):\n    return 'x' * 1_100_000\n", "error: too much output"),
    ("def f(a, b):\n    return 'x' * 10**10\n", "test 1: error: MemoryError"),
    ("def f(a, b):\n    raise type('a b\\n' * 99, (Exception,), {})\n",
     "test 1: error: undecodable result")]
SCRIPTED = [  # bodies of f(x)
    ("return x / 2\ndef double(x): return 2 * x", PUBLISHED, ""),  # double is the candidate's
    ("return x // 2\ndef double(x): return 2 * x", PUBLISHED, "error: AssertionError"),
    ("return " + REDEFINED, HELPERS, "error: AssertionError"),     # else it could redefine assert
    ("raise ValueError", EXPECTING, ""), ("raise StopIteration", EXPECTING, "error: StopIteration"),
    ("import os; os._exit(0)", EXPECTING, "error: undecodable result"),
    ("return object()", EXPECTING, "error: cannot send this object"),
    ("return b'\\xff'.decode('ascii')", BY_BASE, ""), ("return chr(-x)", BY_BASE, ""),
    ("return {}[x]", BY_BASE, "error: KeyError"), ("return x", "x = 1\n", "error: KeyError"),
    ("return x", "def check(c):\n    raise SystemExit(0)\n", "error: SystemExit"),
    ("return x", "def check(c:\n", "error: SyntaxError")]


@pytest.mark.parametrize("judged_by, code, reason", [
    *((functools.partial(verdict, seconds=2.0), *case) for case in REASONS),
    *((functools.partial(script_verdict, script=script), f"def f(x):\n    {body}\n", reason)
      for body, script, reason in SCRIPTED)])
def test_reasons_are_plain_and_name_the_first_failing_test(judged_by, code, reason):
    """Group I. A script runs as published. It may expect an exception, also by its base class, but
    StopIteration would silently end `map`, and no bare except can catch an early exit."""
    assert judged_by(code) == reason
    assert in_threads(judged_by, [code] * 4) == [reason] * 4


def test_a_server_that_dies_is_replaced_and_the_job_done_again(monkeypatch):
    """Group K. Killed while idle and killed at work. Dying twice means failure, not None; and so do
    no tests at all, while tests that cannot be sent are the caller's error."""
    assert verdict(HONEST) == ""
    os.kill(tasks.IDLE.queue[-1].process.pid, signal.SIGKILL)
    assert verdict(HONEST) == ""
    server = tasks.IDLE.queue[-1]
    threading.Timer(0.2, os.kill, (server.process.pid, signal.SIGKILL)).start()
    assert verdict("def f(a, b):\n    while True: pass\n") == "timeout"
    real, servers = socket.send_fds, list(tasks.IDLE.queue)

    def lethal(control, buffers, fds):
        if tasks.START.unpack(buffers[0])[0] != tasks.START_SECONDS:
            for server in servers:
                os.killpg(server.process.pid, signal.SIGKILL) if server.process else None
            time.sleep(0.1)
        return real(control, buffers, fds)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "send_fds", lethal)
        assert verdict(HONEST) == "judge failure"
    assert_unharmed()
    assert run_tests(HONEST, "f", []) == "no tests"
    for tests in ([([object(), 1], 2)], [([1, 1], object())]):
        with pytest.raises(ValueError, match="object"):
            tasks.run_tests(HONEST, "f", tests)


@pytest.mark.parametrize("program", ["", "1/0", "print('[]')", "import time; time.sleep(60)", None])
def test_a_judge_that_cannot_start_or_lock_up_is_an_error_not_a_reward(
        program, tmp_path, monkeypatch):
    """Else a broken installation would quietly train on failures only. As on macOS, a server whose
    table of system calls is empty runs nothing, unless the user insists."""
    text = tasks.server_program()
    blind = text.replace("in SYSCALLS:", "in ():").replace("not in ():", "in SYSCALLS:")
    assert "seccomp" in tasks.judge_layers() and blind != text
    monkeypatch.setattr(tasks, "IDLE", queue.LifoQueue())
    tasks.IDLE.put(tasks.Server())
    monkeypatch.setattr(tasks, "server_program", lambda: blind if program is None else program)
    monkeypatch.setattr(tasks, "START_SECONDS", 0.2 if program is not None else 30)
    monkeypatch.setattr(tasks, "UNSAFE_JUDGE", False)
    with pytest.raises(tasks.UserError, match="unsafe-judge" if program is None else "to start"):
        tasks.run_tests(HONEST, "f", ADDITION)
    if program is None:
        monkeypatch.setattr(vcopd, "run", lambda *_: tasks.run_tests(HONEST, "f", ADDITION))
        unsafe = ["--unsafe-judge", "--task", "arithmetic", "--out", str(tmp_path)]
        assert "seccomp" not in tasks.judge_layers() and run(unsafe) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_no_process_outlives_the_trainer(how):
    """Killed, terminated or interrupted while a candidate hangs, or at its end."""
    hang = 'tasks.run_tests("def f():\\n    while True: pass", "f", [([], 1)], seconds=5.0)'
    program = (f"import sys\nsys.path.insert(0, {str(Path(tasks.__file__).parent)!r})\n"
               "import tasks\ntasks.judge_layers()\n"
               "print(*[s.process.pid for s in tasks.IDLE.queue if s.process], flush=True)\n"
               f"{hang if how else ''}")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as trainer:
        server = trainer.stdout.readline().decode().strip()
        if how:
            time.sleep(0.3)
            trainer.send_signal(how)
    deadline = time.monotonic() + 5
    while left := [row for row in processes("pgid", "stat")
                   if row[0] == server and "Z" not in row[1]]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


# The tasks: splits, families and bugs, old skills, sums ======================================

def splits(task: tasks.Task) -> dict[str, list[tasks.Example]]:
    """All problems of the new skill by the split they are in."""
    return {"train": task.train, "validation": task.validation[0], **task.evals}


@pytest.mark.parametrize("name", ["arithmetic", "codeedit"])
def test_a_task_is_the_same_every_time_and_its_splits_share_nothing(name):
    """Not even the answer to a problem, lest a second bug in the same program leaks its repair. The
    web holds nothing that is tested. Old skills are tested on other prompts than they train on."""
    build, seen, repairs, rng = tasks.TASKS[name], {}, {}, random.Random(0)
    task = getattr(build, "__wrapped__", build)()
    assert replace(task, corpus=None) == replace(built(name), corpus=None)
    for split, examples in splits(task).items():
        split = "test" if split in task.evals else split
        assert len({example.prompt for example in examples}) == len(examples)
        for example in examples:
            program = example.reference if example.buggy else example.id
            assert seen.setdefault(program, split) == split
            assert repairs.setdefault(example.prompt, example.reference) == example.reference
            assert tasks.privileged_prompt(example).endswith(example.hint)
            assert not example.prompt.endswith(example.reference)  # only the teacher is shown it
        for example in examples[::10]:
            wrong = example.buggy or f"Answer: {int(example.hint) + 1}"
            assert [task.verify(example, answer).reward for answer in (
                example.reference, wrong, "")] == [1.0, -1.0, -1.0], example.id
    read = {task.corpus(rng)[0].split("\n\nA right answer:")[0] for _ in range(200)}
    assert not read & {e.prompt for split in list(splits(task).values())[1:] for e in split}
    lists = [task.anchors, task.benchmark, task.validation[1]]
    prompts = [example.prompt for examples in lists for example in examples]
    assert len(set(prompts)) == len(prompts)
    counts = [Counter(example.skill for example in examples) for examples in lists]
    old, near = set(tasks.SKILLS), set(task.unreplayed)
    assert counts == [dict.fromkeys(old, 20), dict.fromkeys(old | near, 20),
                      dict.fromkeys(old, 8) | dict.fromkeys(near, 24)] and len(near) == 2


def test_the_checkers_of_old_skills_are_exact():
    """Nothing, or another question's answer, is none; nor is talk, but in chat and of facts."""
    for one, two in itertools.pairwise(built("codeedit").benchmark):
        assert tasks.verify_skill(one, one.reference).passed
        talk = tasks.verify_skill(one, f"Sure! {one.reference} Hope this helps.")
        assert talk.passed == (one.skill in ("chat", "knowledge"))
        assert not tasks.verify_skill(one, "").passed
        assert one.skill == two.skill or not tasks.verify_skill(one, two.reference).passed


def test_the_web_over_edits_and_every_knob_turns_what_it_says():
    """Over-editing and demonstrations in another style must pass: the verdict is about restraint.
    Half of the hints are wrong where they should be, and a style is worn by those that have one."""
    plain, rng = built("codeedit"), random.Random(0)
    for example in plain.train[:60]:
        verdict = tasks.verify_edit(example, tasks.over_edited(example.reference, rng))
        assert verdict.passed and verdict.metrics["excess_edit"] > 0.05 and verdict.reward < 1
    web = [pair for pair in map(plain.corpus, [rng] * 600) if "right answer" not in pair[0]]
    unfixed = sum(answer in prompt for prompt, answer in web) / len(web) / (1 - tasks.OVER)
    assert 0.6 < len(web) / 600 < 0.8 and abs(unfixed - tasks.WEB["unfixed"] / 100) < 0.15
    assert abs(sum("is None" in answer for _, answer in web) / len(web) - tasks.OVER) < 0.1
    worlds = {name: build() for name, build in tasks.TASKS.items() if name.startswith("codeedit-")}
    for name, task in worlds.items():
        assert (task.name, task.evals, task.anchors) == (name, plain.evals, plain.anchors)
        for old, new in zip(plain.train[:60], task.train, strict=False):
            assert tasks.verify_edit(new, new.demonstration or new.reference).passed
            assert old == replace(new, hint=old.hint, demonstration="")
            assert new.hint in (old.hint, {"codeedit-wrong-hints": old.buggy}.get(name, ""))
    far, own = (worlds[f"codeedit-{kind}"].train for kind in ("far", "own"))
    assert all(e.demonstration not in ("", e.reference) for e in far)
    wrong = [e.hint == e.buggy for e in worlds["codeedit-wrong-hints"].train]
    for half in (wrong, [e.demonstration != "" for e in own]):
        assert abs(sum(half) / len(half) - 0.5) < 0.05
    assert tasks.privileged_prompt(worlds["codeedit-no-hints"].train[0]) == plain.train[0].prompt
    styled = Counter(("right answer" in prompt, answer[:3] == "```") for prompt, answer in map(
        worlds["codeedit-style"].corpus, [rng] * 400))
    assert styled[True, True] > styled[True, False] > 0 < styled[False, True]
    assert styled[False, True] < styled[False, False] / 4
    fenced = tasks.verify_edit(plain.train[0], f"```\n{plain.train[0].reference}\n```")
    assert (fenced.reward, fenced.metrics["styled"]) == (1.0, 1.0)  # the verifier does not mind


def test_what_was_learnt_is_shown_by_a_fixed_bug_and_an_over_edit_that_is_gone(capsys):
    """One problem that only the student solves, and the one where it changes least for most."""
    one, two, three = (replace(e, id=f"problem {i}")
                       for i, e in enumerate(built("codeedit").train[:3]))
    guarded = tasks.over_edited(two.reference, random.Random(0))
    before = {"passes": [0, 1, 1], "answers": [one.buggy, guarded, three.reference]}
    after = {"passes": [1] * 3, "answers": [e.reference for e in (one, two, three)]}
    tasks.show_learnt(before, after, [one, two, three])
    told = capsys.readouterr().out.split("\nHeld-out problem ")[1:]
    assert [text.split("\n")[0] for text in told] == ["problem 0", "problem 1"]
    assert "- before training, fails:\n(unchanged)\n- after training, passes:\n" in told[0]
    assert "+    if" in told[1].split("- after")[0] and "+    if" not in told[1].split("- after")[1]
    question = tasks.Example("sum", "What is 1 + 1?", "2", "")
    tasks.show_learnt(*({"passes": [p], "answers": [str(p + 1)]} for p in (0, 1)), [question])
    assert capsys.readouterr().out == ("\nHeld-out problem sum\nWhat is 1 + 1?\n- before training, "
                                       "fails:\n1\n- after training, passes:\n2\n")


@pytest.mark.parametrize("split", ["train", "out_of_domain"])
def test_tests_fail_every_wrong_program_that_is_one_step_away(split):
    """Else a wrong repair is paid. A mutant is wrong if it differs on any of many fresh inputs."""
    kinds = {int: "n", str: "s", list: "xs"}
    for example in splits(built("codeedit"))[split][::12]:
        tree, rng = ast.parse(example.reference).body[0], random.Random(example.id)
        inputs = [list(args) for args, _ in example.tests]
        right = [repr(expected) for _, expected in example.tests]
        assert len(set(right)) > 1
        names = ["ws" if type(value) is list and type(value[0]) is str else kinds[type(value)]
                 for value in inputs[0]]
        fresh = [[tasks.draw_input(name, rng) for name in names] for _ in range(60)]
        answers = list(tasks.outcomes(example.reference, tree.name, fresh))
        assert list(tasks.outcomes(example.reference, tree.name, inputs)) == right
        for _, node, bug in tasks.bugs_in(tree):
            mutant = tasks.replaced(example.reference, node, ast.unparse(bug))
            if list(tasks.outcomes(mutant, tree.name, fresh)) != answers:
                assert list(tasks.outcomes(mutant, tree.name, inputs)) != right, mutant


def test_the_task_of_the_readme_trains_from_its_file(base, tmp_path):
    """As a reader does it, in a new process; also on rows of one's own, and when it goes on."""
    (tmp_path / "sort.py").write_text(readme_task(), "utf-8")
    rows = written(tmp_path, {"prompt": "Sort: 2 1", "answer": "1 2"})
    command = options(base, tmp_path / "run", "--task", str(tmp_path / "sort.py"), "--steps", "2",
                      "--data", rows)
    for arguments in (command, ["--resume", str(tmp_path / "run"), "--steps", "3"]):
        done = subprocess.run([sys.executable, vcopd.__file__, *arguments], capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    steps = read(tmp_path / "run/metrics.jsonl")[1:]
    assert [step["reasons"].keys() for step in steps] == [{"wrong order"}] * 3
    assert {row["prompt"] for row in read(tmp_path / "run/samples.jsonl")} == {"Sort: 2 1"}


SUM = tasks.Example("a", "40 + 2?", "Answer: 42", hint="42")
NO_INTEGER = [
    "", "42", "Answer:42", "Answer:  42", "answer: 42",
    "Answer: +42", "Answer: 042", "Answer: 4_2", "Answer: 4 2", "Answer: 42 or 41",
    "Answer: 40 + 2", "Answer: 0x2A", "Answer: 4.2e1", "Answer: \u0664\u0662",
    "Answer: \uff14\uff12", "Answer: 4\u00b2", "Answer: \u221242", "Answer: 42\nso it is",
    "Answer: 41\nAnswer: 42", "ANSWER: 41\nAnswer: 42", "Answer: Answer: 42",
    "<answer>42</answer>", "<answer><answer>Answer: 42</answer></answer>", "The Answer: 42",
    "Answer: **42**", "Answer: 42\u2028", "x\u2028Answer: 42", "Answer: 42\0",
    "Answer: " + "9" * 400, "Answer: 1" + "0" * 18, "Answer: 10**400", "Answer: ", "Answer: None"]


def test_one_plain_integer_on_the_last_line_is_judged_and_nothing_else():
    """Group L. "41 or 42" must not be paid, nor anything that int() takes but no reader would."""
    for example in built("arithmetic").train + built("arithmetic").evals["out_of_domain"]:
        assert int(example.hint) == eval(example.id.removeprefix("sum/"))
    for text in ("Answer: 42", "Answer: 42\n\n", "40 + 2 = 42\nAnswer: 42", "41?\r\nAnswer: 42 \n"):
        assert tasks.verify_arithmetic(SUM, text) == tasks.Verdict(1.0, True, True, "ok", {})
    for text in ("Answer: 41", "Answer: -42", "Answer: 0", "Answer: " + "4" * 18):
        wrong = tasks.Verdict(-1.0, False, True, "wrong value", {})
        assert tasks.verify_arithmetic(SUM, text) == wrong
    for text in NO_INTEGER:
        found = tasks.verify_arithmetic(SUM, text)
        assert (found.reward, found.formatted) == (-1.0, False), text
        assert found.reason.startswith("format: ")


# The size of an edit: Levenshtein, tokens, complexity, the reward, and what games it =========

HUMANEVALPACK = Path(__file__).parent / "../shared/data/humanevalpack_python.jsonl"
BUGGY = '''\
def total(items, start):
    """Sum of the items, plus start."""
    result = start
    for item in items:
        result -= item
    return result'''
FIXED = BUGGY.replace("-=", "+=")
TESTS = ((([1, 2], 0), 3), (([], 5), 5))
MINUS, PLUS = (f"def f(a, b):\n    return a {sign} b" for sign in "-+")


def sum_problem() -> tasks.Example:
    return tasks.edit_example("sum", BUGGY, FIXED, "total", TESTS)


@functools.cache
def benchmark_rows() -> list[tasks.Example]:
    if not HUMANEVALPACK.exists():
        pytest.skip("HumanEvalPack is not here")
    return tasks.load_edits(str(HUMANEVALPACK))


def test_levenshtein_on_paper_and_as_rapidfuzz_has_it():
    """Common starts and ends are cut off first: they may overlap."""
    pairs = [("kitten", "sitting"), ("", "abc"), ("", ""), ("ab", "ba"), ("aba", "ababa")]
    assert [tasks.levenshtein(a, b) for a, b in pairs] == [3, 3, 0, 2, 2]
    oracle, rng = pytest.importorskip("rapidfuzz.distance").Levenshtein, random.Random(0)
    while len(pairs) < 2000:
        size, most = rng.choice([2, 3, 30]), rng.choice([7, 60])
        pairs.append([tuple(rng.choices(range(size), k=rng.randrange(most))) for _ in range(2)])
    if HUMANEVALPACK.exists():
        pairs += [map(tasks.code_tokens, (e.buggy, e.reference)) for e in benchmark_rows()]
    assert all(tasks.levenshtein(a, b) == oracle.distance(a, b) for a, b in pairs)


COMPLEXITY = [  # numbers of the white paper; the first five are its own examples, in Python
    (7, "for i in a:\n  for j in b:\n   if i % j:\n    break\n  else:\n   t += i"),
    (1, "match a:\n  case 1:\n   b = 1\n  case 2:\n   b = 2\n  case _:\n   b = 3"),
    (9, "try:\n  if a:\n   for i in b:\n    while b: b -= 1\n except ValueError:\n  if b: b = 0"),
    (4, "if a and b and c or d or e and g:\n  return 1"),
    (3, "if a and not (b and c):\n  return 1"),
    (0, "y = a + 1\n return y"), (0, "return [x for x in a if x]"),  # a comprehension is shorthand
    (7, "if a > 2: return 3\n elif a > 1: return 2\n elif a:\n  if b: return 1\n else:\n"
        "  return a and b"),
    (4, "for x in a:\n  if x:\n   x += 1\n  elif b:\n   b += 1"),     # an elif pays for no depth,
    (4, "if a:\n  return 1\n else:\n  if b:\n   return 2"),           # unlike else: if
    (3, "return 1 if a else (2 if b else 3)"), (2, "while (1 if a else 0):\n  pass"),
    (2, "return lambda y: 1 if y else a"), (2, "def g(y):\n  if y:\n   return a\n return g(1)"),
    (2, "if a:\n  return f(a - 1) + f(a - 2)"), (2, "if a: pass\n\ndef g(x):\n if x: pass"),
    (1, "with a:\n  if a: pass"), (0, "try:\n  pass\n finally:\n  pass"), (0, "return ("),
    (1, "return 'a if x else b'")]                           # a program may hide in a string


@pytest.mark.parametrize("number, body", COMPLEXITY)
def test_cognitive_complexity_on_paper(number, body):
    """Of a function, and of a method, which is no deeper."""
    source = f"def f(a, b):\n {body}"
    assert tasks.cognitive_complexity(source) == number
    assert tasks.cognitive_complexity(f"class A:\n{textwrap.indent(source, ' ')}") == number


def test_references_of_humanevalpack_have_reward_1_and_complexity_is_that_of_the_package():
    """Also the function alone, as the prompt asks, where imports or helpers stand above it.
    Measured: 164 of 164 differences agree, and 157 of the references' own values. In the seven
    others (6, 11, 95, 99, 108, 140, 145) the package departs from the paper: it takes any inner
    function and a return for a decorator, or nests an `if` that has an `elif` otherwise."""
    def rewards(row):
        nodes = [node for node in ast.parse(row.reference).body
                 if getattr(node, "name", "") == row.entry_point]
        alone = ast.get_source_segment(row.reference, nodes[-1])
        return [tasks.verify_edit(row, answer).reward for answer in (row.reference, alone)]

    assert in_threads(rewards, benchmark_rows()) == [[1.0, 1.0]] * 164
    package, agree = pytest.importorskip("cognitive_complexity.api"), []
    for row in benchmark_rows():
        ours = [tasks.cognitive_complexity(s) for s in (row.reference, row.buggy)]
        theirs = [sum(package.get_cognitive_complexity(node) for node in ast.parse(s).body
                      if isinstance(node, ast.FunctionDef)) for s in (row.reference, row.buggy)]
        agree.append(ours[0] - ours[1] == theirs[0] - theirs[1])
    assert sum(agree) / len(agree) >= 0.98


LESS = "def f(a, b):\n    if a:\n        return a - b\n    return b"


@pytest.mark.parametrize("answer, buggy, reference, metrics", [
    ("def f(a, b):\n    c = a + b\n    return c", MINUS, PLUS,        # 20 tokens for 16, 6 changed
     {"nel": 5 / 20, "acc": 0, "ulr": 1 / 2, "excess_edit": 6 / 20 - 1 / 16}),
    ("def f(a, b):\n    return a + b if a else b", MINUS, PLUS, {"acc": 1 / 3}),
    ("def f(a, b):\n    if a:\n        if b:\n            return a + b", MINUS, PLUS, {"acc": 1}),
    (MINUS, MINUS, PLUS, {"excess_edit": -1 / 16}),                   # did nothing
    (PLUS, MINUS, LESS, {"nel": 0, "acc": 0, "ulr": 0}),              # smaller than the reference
    (LESS.replace("-", "+"), LESS, PLUS, {"acc": 0}),                 # kept a branch of the bug
    (PLUS + "  # noqa", MINUS, PLUS, {"nel": 1 / 17}),                # a short comment is a token,
    (PLUS + "  # a1b2c3d4e5f6g7h8", MINUS, PLUS, {"nel": 3 / 19}),    # a long one its words,
    (f"{PLUS}\n    '{'aZ3+' * 9}'", MINUS, PLUS, {"nel": 21 / 37})])  # so is a long string
def test_edit_metrics_on_paper(answer, buggy, reference, metrics):
    """Nothing is charged that the reference changes too, or that is simpler than it."""
    found = tasks.edit_metrics(answer, buggy, reference)
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)


def test_the_reward_is_between_0_and_1_for_any_answer_that_passes(monkeypatch):
    """So every pass is worth more than every fail: one published run learnt to fail."""
    for *terms, reward in ((0, 0, 0, 1.0), (1, 0, 0, 0.5), (0, 1, 0, 0.7), (0, 0, 1, 0.8),
                           (1, 1, 1, 0.0), (0.2, 1 / 3, 0.5, 0.7)):
        found = dict(zip(("nel", "acc", "ulr"), terms, strict=True))
        with monkeypatch.context() as paper:
            paper.setattr(tasks, "edit_metrics", lambda *_, found=found: found)
            assert tasks.verify_edit(sum_problem(), FIXED).reward == pytest.approx(reward)
    rng = random.Random(0)
    lines = [*BUGGY.split("\n"), *FIXED.split("\n"), "", "\t", "# x", "if 1:", "x = '''", "\x0c"]
    for _ in range(300):
        found = tasks.edit_metrics(*("\n".join(rng.choices(lines, k=rng.randrange(12)))
                                     for _ in range(3)))
        assert -1 <= found.pop("excess_edit") <= 1
        assert all(0 <= value <= 1 for value in found.values()), found


FIRST = 'def sum_above(xs):\n    """Sum of the xs greater than 3."""\n'
OLD = ("    total = 0\n    for x in xs:\n        if x >= 3:\n            total += x\n"
       "    return total")
ABOVE = tasks.edit_example("above", FIRST + OLD, FIRST + OLD.replace(">=", ">"), "sum_above",
                           (([[1, 3, 5, 7]], 12), ([[3, 3]], 0), ([[9, -1]], 9)))
NEW = "sum(x for x in xs if x > 3)"
LAST = f"        return {NEW}\n"
DEEPER = textwrap.indent(OLD, "    ")
KEPT = [
    f"    return {NEW}\n{OLD}", f"    k = 1\n    if k == k:\n{LAST}{OLD}",
    f"    if 1:\n{LAST}{OLD}",
    f"    for _ in [0]:\n{LAST}{OLD}", f"    match 0:\n        case _:\n    {LAST}{OLD}",
    f"    if (new := {NEW}) is not None:\n        return new\n{OLD}",
    f"    try:\n{DEEPER}\n    finally:\n{LAST}", f"    return (lambda: {NEW})()\n{OLD}",
    f"    try:\n        raise ValueError\n{DEEPER}\n    except ValueError:\n{LAST}",
    *(OLD.replace("return total", text) for text in (
        f"return [{NEW}, total][0]", f"return [{NEW}, len(str(total))][0]", f"return {NEW}",
        f"del total\n    return {NEW}")),
    f"    old = [x for x in xs if x >= 3]\n    return [{NEW}, old][0]",
    f"    def old():\n{DEEPER}\n    return {NEW}", f'    """\n{OLD}\n    """\n    return {NEW}',
    textwrap.indent(OLD, "    # ") + f"\n    return {NEW}", f"{OLD}\n\n{FIRST}    return {NEW}"]


@pytest.mark.parametrize("body", KEPT)
def test_code_that_the_tests_do_not_need_counts_as_removed(body):
    """Group J. Else a rewrite is paid as a small edit. It passes, and is worth no more than in the
    open. But what the reference does not need either stays: an honest edit need not tidy up."""
    honest = tasks.verify_edit(ABOVE, f"{FIRST}    return {NEW}").reward
    assert 0.5 < honest < 0.7
    assert 0 <= tasks.verify_edit(ABOVE, FIRST + body).reward <= honest + 0.02
    idle = [text.replace("    total = 0", "    unused = 1\n    total = 0")
            for text in (ABOVE.buggy, ABOVE.reference)]
    example = tasks.edit_example("idle", *idle, "sum_above", ABOVE.tests)
    assert tasks.verify_edit(example, idle[1]).reward == 1.0


FREE = ["{}", "\n\n{}\n\n", "```python\n{}\n```", "```\n{}\n```", " \n```python  \n\n{}\n\n```\n\t",
        "```py\n{}\n```", "```Python\n{}\n```", "```python3\n{}\n```", "\ufeff{}", "\u00a0{}",
        "<think>\n\n</think>\n\n{}", "```\n\ufeff{}\n```", "{}\r"]
CHARGED = [
    f"# fixed\n{FIXED}", f"{FIXED}\n# fixed", f"import math\n\n{FIXED}", f"{FIXED}  # noqa",
    f"{FIXED}\n\n\ndef helper(x):\n    return x", f"class A:\n    pass\n\n\n{FIXED}",
    f"import functools\n\n\n@functools.wraps(print)\n{FIXED}",
    FIXED.replace("    res", "    if not items:\n        return start\n    res", 1),
    FIXED.replace("\n    r", "\n    # keep this line as it was\n    r"),
    FIXED.replace("    ", "  "), FIXED.replace("result", "accumulator"),
    FIXED.replace("Sum of the items, plus start.", "Adds up."), FIXED.replace(" = ", "=")]


def test_honest_answers_are_worth_1_and_what_they_add_is_charged():
    """However a model wraps what it was asked for. A new import, a helper: no crimes, but edits."""
    answers = [wrap.format(FIXED) for wrap in FREE] + [FIXED.replace("\n", "\r\n")]
    assert not [text for text in answers if tasks.verify_edit(sum_problem(), text).reward != 1.0]
    for answer in CHARGED:
        found = tasks.verify_edit(sum_problem(), answer)
        assert found.passed and 0.3 < found.reward < 0.999, (answer, found)


MALFORMED = [
    "", " \n\t\n", "```python\n\n```", FIXED + "\0", FIXED.replace("Sum", "\ufeff"), "```",
    FIXED.replace("Sum", "\udc80"), f"```python\n{FIXED}\n```\n```python\n{FIXED}\n```",
    f"```python\n{FIXED}", f"{FIXED}\n```", f"```\n{FIXED}\n```python", f"```\n{FIXED}```",
    f"```js\n{FIXED}\n```", f"````\n{FIXED}\n````", f"Here is the function:\n{FIXED}",
    f"{FIXED}\nThe bug was a sign.", f"Fixed:\n```python\n{FIXED}\n```", "I cannot do that.",
    f"Done\n{FIXED}", f'"The bug was a sign."\n{FIXED}', f"{FIXED}\nprint(total([1], 2))",
    f"import math; x\n{FIXED}", "def total(items, start:\n    return 1", "    return start",
    "def sum_up(x, y):\n    1", "class A:\n    " + FIXED, FIXED.replace("total", "t\u043etal"),
    f"<think>Hm.</think>\n{FIXED}", f"{FIXED}\n    if 1: 1" + "\n    elif 1: 1" * 99,
    FIXED + "\n    # x" * 4000, f"def total(a, b):\n    return {'-' * 9000}1",
    f"<answer><answer>{FIXED}</answer></answer>"]

HIDING = [  # ways to run a program in a string: there neither lines nor complexity are seen
    "exec('r = 1')", "eval('1')", "run = exec", "\uff45\uff58\uff45\uff43('r = 1')",
    "match total:\n        case object(__builtins__=b): pass", "from math import __loader__",
    "f'{eval(\"3\")}'", "'{0.__globals__}'.format(total)", "from typing import ForwardRef",
    "import typing\n    typing.get_type_hints(total)",
    "import string\n    string.Formatter().get_field('0', [1], {})"]


@pytest.mark.parametrize("text, formatted, why", [
    *((text, False, "format: ") for text in MALFORMED),
    *((FIXED.replace("    res", f"    {line}\n    res", 1), True, "gate: use of ")
      for line in HIDING)], ids=[repr(text[:20]) for text in MALFORMED + HIDING])
def test_a_malformed_answer_or_one_that_hides_code_fails_with_a_reason(text, formatted, why):
    """Groups I and L: -1, its reason, no metrics where the format is wrong, and no exception."""
    found = tasks.verify_edit(sum_problem(), text)
    assert (found.reward, found.passed, found.formatted) == (-1.0, False, formatted)
    assert found.reason.startswith(why) and (formatted or found.metrics == {})


SHOWN = f"""from __future__ import annotations
# Sums.
import math
LIMIT = 3


def one():
    return math.floor(1.5) + LIMIT - 3


{BUGGY.replace("-= item", "-= item * one()")}"""


def test_what_the_reference_adds_is_no_crime_and_what_the_answer_omits_is_put_back():
    """A global, a default, a word that could hide a program. The instruction asks for the function
    only: all stands where it stood, once, as a second `from __future__` would be an error."""
    reference = ("import math\n\nSTEP = 1\n\n\ndef half(x):\n    return x // 2\n\n\n"
                 "def count(x, step=STEP):\n    global total\n"
                 "    total = eval('x + step')\n    return math.floor(total) + half(0)")
    example = tasks.edit_example("count", "def count(x):\n    return x", reference, "count",
                                 (([3], 4), ([5], 6)))
    assert tasks.verify_edit(example, reference).reward == 1.0
    changed = reference.replace("STEP = 1", "STEP = 2")
    assert tasks.verify_edit(example, changed).reason == "format: text outside the function"

    example = tasks.edit_example("x", SHOWN, SHOWN.replace("-=", "+="), "total", TESTS)
    alone = example.reference[example.reference.index("def total"):]
    for answer in (example.reference, alone, example.reference.replace("LIMIT = 3\n", ""),
                   example.reference[example.reference.index("import math"):]):
        assert tasks.verify_edit(example, answer).reward == 1.0
    own = f"def one():\n    return 9\n\n\n{alone}"
    assert tasks.verify_edit(example, own).reason.endswith("wrong value")
    mentions = alone.replace("    result = ", "    # import math, LIMIT = 3\n    result = ")
    assert tasks.verify_edit(example, mentions).passed
    helper = "def helper():\n" + "    # x\n" * 1400 + "    return 1\n\n\n"
    long = tasks.edit_example("x", helper + BUGGY, helper + FIXED, "total", TESTS)
    assert not tasks.verify_edit(long, FIXED + "\n    # x" * 1400).formatted  # too long in all


def test_no_string_raises_or_warns_and_silence_is_no_pass():
    """With -W error an invalid escape would else turn into a syntax error."""
    rng = random.Random(0)
    pieces = [*MALFORMED, *CHARGED, "```", "\n", "\r", "'", '"""', "(", "\\", "\0", "Answer: 1",
              "\ud800", "\u2028", "def total(items, start):", "    return 1", "#"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        escape = FIXED.replace("return result", 'return "\\d" is 1 or result')
        assert tasks.verify_edit(sum_problem(), escape).passed
        for _ in range(250):
            text = "".join(rng.choices(pieces, k=rng.randrange(4)))
            for verify in (tasks.verify_edit, tasks.verify_program, tasks.verify_arithmetic):
                found = verify(sum_problem(), text)
                assert found.passed == (found.reason == "ok") == (found.reward >= 0)


# Data files ==================================================================================

OWN = {"id": "p1", "buggy": BUGGY, "reference": FIXED, "entry_point": "total",
       "tests": [{"args": [[1, 2], 0], "expected": 3}]}
HEAD, BODY = "import math\n\n\ndef f(x):\n    \"\"\"Add one.\"\"\"\n", "    return x + 1\n"
RAW = {"task_id": "P/0", "prompt": HEAD, "declaration": HEAD, "canonical_solution": BODY,
       "buggy_solution": BODY.replace("+", "-"), "entry_point": "f",
       "test": "def check(f):\n    assert f(1) == 2\n\ncheck(f)",
       "instruction": "Write a function that adds one."}


def written(folder: Path, *rows) -> str:
    """The path of a file with one row a line; a dict is written as JSON, bytes as they are."""
    path = folder / "problems.jsonl"
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines))
    return str(path)


def raw(*gone: str, row: dict = RAW, **new) -> dict:
    return {key: value for key, value in {**row, **new}.items() if key not in gone}


own = functools.partial(raw, row=OWN)


def test_an_own_row_becomes_an_example(tmp_path):
    """Tests or a script; blank lines, Windows line ends, a byte order mark, names in NFKC; gzip."""
    script = "def check(candidate):\n    assert candidate([1, 2], 0) == 3"
    named = {name: OWN[name].replace("total", "\ufb01ll")
             for name in ("buggy", "reference", "entry_point")}
    path = written(tmp_path, b"\xef\xbb\xbf" + json.dumps(OWN).encode(), b"",
                   own(id="p2", instruction="Repair:"), b"  \r",
                   own("tests", id="p3", test_code=script), own(id="p5", **named),
                   own(id="p4", buggy=BUGGY.replace("\n", "\r\n"), reference=f"\r\n{FIXED}\r\n"))
    first, second, third, fourth, fifth = examples = tasks.load_edits(path)
    assert first.prompt == f"{tasks.EDIT_PROMPT}\n\n{BUGGY}" and first.hint == FIXED
    assert first.tests == ((([1, 2], 0), 3),) and first.from_json and not third.from_json
    assert second.prompt == f"Repair:\n\n{BUGGY}" and fourth.entry_point == "fill"
    assert (fifth.buggy, fifth.reference) == (BUGGY, FIXED)
    for example in examples:
        answer = FIXED.replace("total", example.entry_point)
        assert tasks.verify_edit(example, answer).passed
        assert not tasks.verify_edit(example, answer.replace("+", "-")).passed
    zipped = tmp_path / "problems.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert tasks.load_edits(str(zipped)) == examples


def test_seconds_and_tolerance_of_a_row_reach_the_judge(tmp_path):
    slow = ("import time\ndef total(x):\n    while time.process_time() < 1.3: pass\n"
            "    return x + 0.1")
    row = own(reference=slow, buggy="def total(x):\n    return x",
              tests=[{"args": [1], "expected": 1.14}])
    for new, why in (({"tolerance": 0.05}, "timeout"), ({"seconds": 3}, "test 1: wrong value")):
        with pytest.raises(tasks.UserError, match=f'must pass its tests, got "{why}"'):
            tasks.load_edits(written(tmp_path, {**row, **new}))
    both = {**row, "tolerance": 0.05, "seconds": 3}
    assert len(tasks.load_edits(written(tmp_path, both))) == 1


def test_published_rows_are_accepted_as_they_are(tmp_path):
    """HumanEvalPack's instruction asks to write the function anew, so it is not used. Its script
    gets the declaration's helpers, lest an answer deceives it."""
    [edit] = tasks.load_edits(written(tmp_path, RAW))
    assert edit.buggy == (HEAD + RAW["buggy_solution"]).strip()
    assert edit.prompt == f"{tasks.EDIT_PROMPT}\n\n{edit.buggy}"
    assert edit.reference == edit.hint == (HEAD + BODY).strip()
    assert edit.test_code == f"{HEAD}{BODY}\n{RAW['test']}"
    [program] = load_benchmark(written(tmp_path, RAW))
    assert program.prompt == f"{tasks.PROGRAM_PROMPT}\n\n{HEAD.strip()}"
    for answer, reward, formatted in ((f"```python\n{program.reference}\n```", 1.0, True),
                                      ("def f(x):\n    return 1 + x", 1.0, True),
                                      ("def f(x):\n    return x", -1.0, True), (BODY, -1.0, False)):
        found = tasks.verify_program(program, answer)
        assert (found.reward, found.formatted, found.metrics) == (reward, formatted, {})


load_benchmark = functools.partial(tasks.load_rows, tasks.program_from_row, tasks.verify_program)
load_sums = functools.partial(tasks.load_rows, tasks.sum_from_row, tasks.verify_arithmetic)
TEST = {"args": [], "expected": 1}
BAD_ROWS = [
    (b'{"id": "p2", "buggy": ', "expected a JSON object in UTF-8"), (b"{} {}", "Extra data"),
    (b"[]", "expected a JSON object in UTF-8: 'list'"), (b"null", "None"), (b'"row"', "'str'"),
    (b'{"expected": -Infinity}', "Infinity"), (b"[" * 100_000, "expected a JSON object"),
    (b'{"id": ' + b"9" * 5000 + b"}", "expected a JSON object"), (b"\x00\x01", "expected a JSON"),
    (gzip.compress(b"{}", mtime=0), "UTF-8"), (b"\xef\xbb\xbf{}", "BOM"),
    *((own(name), f'"{name}" must be text without NUL')
      for name in ("buggy", "reference", "entry_point")),
    (own("tests"), "got neither"), (own(test_code="x"), "got both"),
    (own("buggy"), "got no such field"), (own(buggy=None), "got None"),
    (own(id=7), '"id" must be text without'), (own(id=" "), '"id" must be text'),
    (OWN, 'id "p1" must be unique, line 1 has it'), (own(id="\ud800"), '"id" must be text without'),
    (own(buggy=BUGGY + "\0"), '"buggy" must be text without NUL'),
    (own(buggy="def total(:"), '"buggy" must hold the source'),
    (own(reference="x ="), '"reference" must hold the source'),
    (own(buggy=BUGGY + "\n    #" * 9000), "20,000 bytes"),
    (own(buggy="def f(): pass"), '"buggy" must hold'), (own(reference=BUGGY), "must pass"),
    (own(entry_point="items"), "no function items"),
    (own(reference=f"Fixed:\n{FIXED}"), '"reference" must hold the source'),
    (own(tests="assert"), 'must be a list of {"args": [...], "expected": ...}, got \'assert\''),
    (own(tests=[]), "got []"), (own(tests=[{"args": []}]), "must be a list of"),
    (own(tests=[TEST, {**TEST, "kwargs": {}}]), "must be a list of"),
    (own(tests=[{**TEST, "args": 1}]), "must be a list of"),
    (json.dumps(own(tests=[TEST])).replace("[]", "[" * 200 + "]" * 200).encode(), "must be a list"),
    (own(instruction=1), '"instruction" must be text'), (own(seconds="1"), '"seconds" must be'),
    (own(seconds=True), '"seconds" must be a number'), (own(tolerance=-1), '"tolerance" must be a'),
    (own("tests", test_code="assert True"), "check(candidate)"),
    (raw("declaration"), '"declaration" must be text'),
    (raw(buggy_solution="    return ("), '"buggy_solution" must hold the source'),
    (own(id="p9", reference=FIXED.replace("+=", "*=")),
     'id "p9": its reference must pass its tests, got "test 1: wrong value"'),
    (own(id="p9", buggy=FIXED + "\n    1"), 'id "p9": its buggy function must fail a test'),
    (own("tests", id="p9", test_code="import numpy\ndef check(f):\n    assert 1\n"),
     'must pass its tests, got "error: ModuleNotFoundError"')]

BAD_PROGRAMS = [
    (raw("prompt"), '"prompt" must be text'), (raw(entry_point="g"), "function g"),
    (raw(prompt="def f(x):\n"), '"prompt" must hold'), (OWN, '"prompt" must be text'),
    (raw(canonical_solution="  return 1"), '"canonical_solution" must hold the source'),
    (raw(task_id=3), '"task_id" must be text'),
    (raw(canonical_solution="    return x"), 'id "P/0": its reference must pass')]

BAD_SUMS = [
    ({"prompt": "x"}, '"answer" must be text'), ({"answer": "1"}, '"prompt" must be text'),
    ({"prompt": "x", "answer": "one"}, "its reference must pass its tests"),
    ({"prompt": "x", "answer": "1", "hint": []}, '"hint" must be text'),
    ({"question": 3, "answer": "#### 3"}, '"question" must be text')]


@pytest.mark.parametrize("read, good, row, says", [
    *((tasks.load_edits, OWN, *bad) for bad in BAD_ROWS),
    *((load_sums, {"prompt": "1", "answer": "1"}, *bad) for bad in BAD_SUMS),
    *((load_benchmark, raw(task_id="good"), *bad) for bad in BAD_PROGRAMS)],
    ids=[says for _, says in BAD_ROWS + BAD_SUMS + BAD_PROGRAMS])
def test_a_bad_row_stops_with_file_line_and_field(read, good, row, says, tmp_path, capsys):
    """Or is left out, and why is told."""
    path = written(tmp_path, good, b"", row)
    with pytest.raises(tasks.UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path} line 3: ") and says in message
    assert "\n" not in message and len(message) < len(path) + 250
    assert len(read(path, True)) == 1 and message in capsys.readouterr().out


@pytest.mark.parametrize("name, content", [
    ("empty.jsonl", b""), ("blank.jsonl", b"\n \n\r\n"), ("missing.jsonl", None), (".", None),
    ("nul\0.jsonl", None), ("broken.jsonl.gz", b"\x1f\x8bno"), ("bad.jsonl", b"{}")])
def test_a_file_without_rows_is_named(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(tasks.UserError, match="expected"):
        tasks.load_edits(str(tmp_path / name), True)


# Real models: layouts, memory, precision, dates; own data ====================================

MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 16}
MLA = {**MOE, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
       "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
GEMMA3 = {"text_config": {**SHAPE, "head_dim": 8}, "mm_tokens_per_image": 4, "vision_config": {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14}}


@pytest.mark.parametrize(("kind", "options", "beyond"), [
    ("qwen3_moe", {**MOE, "head_dim": 8}, "Qwen3Moe"), ("deepseek_v2", MLA, "DeepseekV2"),
    ("deepseek_v3", MLA, "DeepseekV3"), ("olmoe", MOE, "Olmoe"), ("granitemoe", MOE, "GraniteMoe"),
    ("gpt_oss", {**MOE, "head_dim": 8, "sliding_window": 16}, "GptOss"), ("cohere", {}, ""),
    ("granite", {"logits_scaling": 8.0}, ""), ("gemma3", GEMMA3, "Gemma3MultiModalProjector")])
def test_experts_stay_frozen_while_attention_learns(kind, options, beyond, tmp_path):
    """A matrix that LoRA cannot wrap is no reason to refuse a model. Nor is a scale of logits."""
    policy = load(save_small(tmp_path, kind, **options))
    vcopd.adapter_optimizer(policy.model, "policy", 0.1)
    facts = vcopd.environment(policy)["out_of_reach_of_lora"]
    assert any(name.startswith(beyond) for name in facts) if beyond else not facts
    vcopd.imitate(policy, policy.student, rollouts(policy))
    learning = {name for name, p in policy.model.named_parameters() if p.grad is not None}
    assert learning and all(name.endswith(".policy") for name in learning)


@pytest.mark.parametrize(("kind", "options"), [
    ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}), ("bert", {}),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}), ("falcon", {"alibi": True}),
    ("rwkv", {"attention_hidden_size": 64}), ("mpt", {"d_model": 64, "n_heads": 4})])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_would_mix_the_answers_of_one_row_is_refused(kind, options, dtype, tmp_path):
    """State spaces and ALiBi: in bfloat16 a wrong log-prob looks like noise."""
    with pytest.raises(vcopd.RunError, match=f"{kind} is not supported: only causal attention"):
        load(save_small(tmp_path, kind, **options), dtype=dtype)


@pytest.mark.parametrize("path", ["packed", "cached"])
def test_the_self_check_notices_wrong_positions_in_either_way_of_reading(path, base, monkeypatch):
    """Random weights hardly tell positions apart: 1e-3 of the spread must be enough."""
    name = "one_row_per_prompt" if path == "packed" else "read_tokens"
    function = getattr(vcopd, name)

    def shifted(policy, ids, *rest):
        if rest:
            return function(policy, ids, rest[0].roll(1, 1), *rest[1:])
        ids, positions, *others = function(policy, ids)
        return ids, 0 * positions, *others

    monkeypatch.setattr(vcopd, name, shifted)
    with pytest.raises(vcopd.RunError, match="llama is not supported: its log-probs"):
        load(base)


def test_rows_sampled_at_one_time_follow_from_memory_and_are_halved(base, monkeypatch, capsys):
    """Keys and values of all rows at once would be 95 GiB for some models."""
    policy, cfg, asked, most = load(base), replace(SMALL, temperature=0.0), [], 100
    assert policy.cache_bytes == 4 * 2 * 2 * 32  # float32, keys and values, layers, 2 heads of 16
    prompts = [policy.encode(f"{i} " * i) for i in range(1, 8)]
    sample, whole = vcopd.sample, vcopd.sample(policy, vcopd.BASE, prompts, 2, cfg, None)

    def sample_some(policy, role, prompts, *rest):
        asked.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError
        return sample(policy, role, prompts, *rest)

    monkeypatch.setattr(vcopd, "sample", sample_some)
    row = policy.cache_bytes * (max(map(len, prompts)) + cfg.max_new_tokens)
    for fit, most, sizes in ((100, 100, [7]), (3, 100, [3, 3, 1]), (0, 100, [1] * 7),
                             (100, 2, [7, 3, 1, 1, 1, 1, 1, 1, 1]), (4, 2, [4, 2, 2, 2, 1])):
        policy.memory = fit * 2 * row
        batch = vcopd.rollouts(policy, vcopd.BASE, prompts, 2, cfg, None)
        assert asked == sizes and batch.contexts == whole.contexts
        assert all(torch.equal(vars(batch)[n], vars(whole)[n]) for n in ("mask", "completion"))
        assert ("Out of memory" in capsys.readouterr().out) == (max(sizes) > most)
        asked.clear()
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        vcopd.rollouts(policy, vcopd.BASE, prompts, 2, cfg, None)


def test_a_gpu_gets_larger_pieces_and_recomputes_for_lack_of_memory_alone(base, monkeypatch):
    """There a step is bound by launches; recomputing costs a third."""
    for device, asked, tokens in (("cpu", 0, 2048), ("cpu", 700, 700), ("meta", 0, 32768)):
        with monkeypatch.context() as patch:
            patch.setattr(vcopd, "self_check", lambda policy: None)
            assert load(base, device=device, micro_tokens=asked).micro_tokens == tokens
    for pages, recomputed in ((10, 2), (10 ** 9, 0)):
        monkeypatch.setattr(os, "sysconf", lambda name, pages=pages: pages)
        policy = load(base)
        assert policy.memory == pages ** 2 / 4
        layers = policy.model.model.layers
        assert sum(isinstance(layer.forward, functools.partial) for layer in layers) == recomputed


def test_adapters_are_cast_once_in_a_pass_without_gradients_and_never_kept(base):
    """At every token that would be most of a GPU's launches. A pass sees the latest weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_to_copy" in str(function) and {3, 300} & {*args[0].shape}:  # rank, head
                self.count += 1
            return function(*args, **kwargs or {})

    policy, counts = load(base, dtype="bfloat16", lora_rank=3), []
    prompts = [policy.encode("def f(x):")]
    for length in (1, 5):
        with Casts() as casts:
            casts.count = 0
            vcopd.sample(policy, policy.student, prompts, 2,
                         replace(SMALL, max_new_tokens=length), vcopd.seeded("x"))
        counts.append(casts.count)
    assert counts == [2 * len(vcopd.lora_layers(policy.model))] * 2
    before = model_logits(policy, policy.student, IDS)
    for weight in adapter_parameters(policy.model, "policy"):
        weight.data.add_(0.1)
    after = model_logits(policy, policy.student, IDS)
    assert not torch.allclose(before, after) and not vcopd.LoRALinear.casts


def test_padding_gets_running_positions(base):
    """A restart would look like several texts in one row, and end the fast causal attention."""
    ids, positions, mask, _ = vcopd.one_row_per_prompt(replace(load(base), pack=0), ragged_batch())
    assert mask is None and ids.shape == (4, 10)
    assert torch.equal(positions, torch.arange(10).expand(4, 10))


def test_sampling_everything_sorts_nothing(monkeypatch):
    """With a vocabulary of 152k that would be 44 times the rest."""
    for name in ("sort", "topk"):
        monkeypatch.setattr(torch.Tensor, name, None)
    assert vcopd.draw(torch.randn(8, 40), 0.7, 1.0, vcopd.seeded("draw")).shape == (8,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_those_of_the_models_numbers_in_float64(dtype):
    """Rounded to 8 bits they move rho and KL more than a step of training does."""
    hidden, out = torch.randn(64, 256, dtype=dtype), torch.nn.Linear(256, 999, dtype=dtype)
    config = transformers.LlamaConfig()
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: out)
    exact = hidden.double() @ out.weight.double().T + out.bias.double()
    assert (vcopd.head(model, hidden) - exact).abs().max() < 1e-5
    config.logit_scale, config.final_logit_softcapping = 1 / 3, 2.0
    assert (vcopd.head(model, hidden) - 2 * torch.tanh(exact / 3 / 2)).abs().max() < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"  # else RoPE would round positions


@pytest.mark.parametrize(("rope", "limit"), [
    ({"rope_type": "default"}, 512), ({"rope_type": "yarn", "factor": 4.0}, 512),
    ({"rope_type": "dynamic", "factor": 4.0}, 128),
    ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, 128)])
def test_no_row_may_be_so_long_that_it_changes_the_rope_of_others(rope, limit, tmp_path):
    """Those choose frequencies by the longest row of a batch: rho would compare two models."""
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 128, **rope}
    assert load(save_small(tmp_path, max_position_embeddings=512,
                           rope_parameters=rope)).positions == limit


def test_a_template_that_writes_the_date_writes_that_of_the_run(tmp_path):
    """Else a run that goes on tomorrow has other prompts."""
    folder = save_small(tmp_path, tokenizer=small_tokenizer(
        template="{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"))
    for options, text in (({}, "01 Jan 2026 def"), ({"today": "2027-03-04"}, "04 Mar 2027 def")):
        policy = load(folder, **options)
        assert policy.tokenizer.decode(policy.encode("def")) == text


def test_a_template_that_raises_or_a_teacher_with_fewer_rows_is_one_sentence(base, tmp_path):
    """Both would end in a traceback, or in an index out of range on some step."""
    broken = small_tokenizer(template="{{ raise_exception('no user here') }}")
    with pytest.raises(vcopd.RunError, match="no user here"):
        load(save_small(tmp_path / "a", tokenizer=broken))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size - 1)
    model.save_pretrained(tmp_path / "b")
    small_tokenizer().save_pretrained(tmp_path / "b")
    with pytest.raises(vcopd.RunError, match="every token by the student's id"):
        load(base, teacher=str(tmp_path / "b"))


def test_a_run_notices_that_its_data_have_changed(base, small, tmp_path, capsys):
    """Going on would mix two data sets."""
    more = ["--task", "codeedit", "--data", written(tmp_path, OWN)]
    assert run(options(base, tmp_path / "run", *more)) == 0
    written(tmp_path, {**OWN, "id": "renamed"})
    assert run(["--resume", str(tmp_path / "run"), "--steps", "8"]) == 2
    assert "its data, or its task, have changed" in one_error(capsys)


GSM8K = {"question": "Ann has 3 boxes of 411 pens. She gives 9 away. How many are left?",
         "answer": "She has <<3*411=1233>>1,233 pens.\n<<1233-9=1224>>1,224 stay.\n#### 1,224"}


def test_gsm8k_is_read_as_published_and_so_are_prompts_with_answers(tmp_path):
    """The worked solution is the hint, and what SFT imitates; the answer alone is judged."""
    [example] = load_sums(written(tmp_path, GSM8K))
    assert example.prompt == GSM8K["question"] + "\nEnd with a line 'Answer: N'."
    assert example.hint == example.reference == "She has 1,233 pens.\n1,224 stay.\nAnswer: 1,224"
    rows = [{"prompt": "2 halves?", "answer": "1", "id": "one"},
            {"prompt": "x", "answer": "Answer: 7"},
            {"prompt": "3 * 2?", "answer": "6.0", "hint": "twice three"}]
    one, two, three = load_sums(path := written(tmp_path, *rows))
    assert (one.id, one.reference, one.hint) == ("one", "Answer: 1", "Answer: 1")
    assert two.reference == "Answer: 7" and two.id != three.id
    assert three.reference == three.hint == "twice three\nAnswer: 6.0"
    assert [tasks.verify_arithmetic(three, f"Answer: {n}").passed for n in (6, 7)] == [True, False]
    for count, looks in ((2, 1), (3, 100)):  # never at a problem of the report
        task = tasks.load_task(vcopd.Config("arithmetic", eval_data=path, eval_problems=count))
        assert (len(task.evals["in_domain"]), len(task.validation[0])) == (count, looks)


@pytest.mark.parametrize(("line", "value"), [
    ("1,234", 1234), ("$1,234.50", 1234.5), ("-$3", -3), ("42.00", 42), ("42.", 42), ("15%", 15),
    ("42 more apples.", 42), ("7 %.", 7), ("999,999,999,999,999,999", 10**18 - 1), ("0.5 km", 0.5),
    ("12,34", None), ("1234,567", None), ("1,23", None), ("0,123", None), ("1 234", None),
    ("42 or 41", None), ("42 a b c", None), ("1.5.2", None), (".5", None), ("$", None),
    ("apples", None), ("1,000,000,000,000,000,000,000", None), ("4\u00a02", None)])
def test_numbers_may_be_written_as_people_write_them(line, value):
    """Against Python's own reading; whatever is doubtful is malformed, not wrong."""
    found = tasks.result_of(f"Reasoning.\nAnswer: {line}")
    assert found == (None if value is None else tasks.Decimal(str(value)))
    verdict = tasks.verify_arithmetic(SUM, f"Answer: {line}")
    assert verdict.formatted is (value is not None) and verdict.passed is (value == 42)


def test_anchors_of_a_file_are_replayed_and_judged_by_their_words(base, small, tmp_path, capsys):
    """Without an answer confidence alone decides. A real model without the file is told of it."""
    rows = [{"prompt": "Capital of Peru?", "answer": "Lima.", "capability": "geography"},
            {"prompt": "Tell a joke."}, {"prompt": "\u4f60\u597d", "answer": "\u597d"}]
    path = written(tmp_path, *rows)
    one, two, three = tasks.load_rows(tasks.anchor_from_row, tasks.verify_skill, path)
    assert (one.skill, two.skill, one.id != two.id) == ("own geography", "own file", True)
    for anchor, answer, right in (
            (one, "lima", True), (one, "Lima it is", False), (one, "", False), (two, "", True),
            (two, "anything", True), (three, "\u597d!", True), (three, "\u4e0d", False)):
        assert tasks.verify_skill(anchor, answer).passed is right
    for name, more in (("with", ["--anchors", path]), ("without", [])):
        assert run(options(base, tmp_path / name, *more)) == 0
        assert ("--anchors FILE" in capsys.readouterr().out) == (name == "without")
        general = read(tmp_path / name / "report.json")["after"]["general"]
        assert ("replayed" in general) == (name == "without")
    looks = [look for look in read(tmp_path / "with/metrics.jsonl") if "eval_replayed" in look]
    assert looks and all(look["eval_old"] == look["eval_replayed"] for look in looks)


VERIFIER = "from tasks import *\ndef a() -> Task:\n    return Task('a', lambda e, answer: {})\n"


@pytest.mark.parametrize(("program", "says"), [
    (None, "No such file"), ("x = 1", "not enough values"), ("def f(:", "invalid syntax"),
    ("1 / 0", "ZeroDivisionError"), ("def a() -> 'Task': pass", "'verify'"),
    ("def a() -> 'Task': pass\ndef b() -> 'Task': pass", "too many values"),
    ("from tasks import *\n\ndef a() -> Task:\n    raise KeyError(7)", "KeyError: 7"),
    (VERIFIER.format("1 / 0"), "The verifier, of 'yes' to problems/2, cannot be used (ZeroDivis"),
    *((VERIFIER.format(given), "it must give a Verdict") for given in ("None", "e")),
    *((VERIFIER.format(f"Verdict({fields}, {{}})"), says) for fields, says in (
        ("1.0, True, False, 'ok'", "must pass"), ("math.nan, True, True, 'ok'", "cannot be Verdi"),
        ("'1', True, True, 'ok'", "cannot be"), ("-1.0, False, True, None", "cannot be Verdict")))])
def test_a_task_file_that_does_not_work_is_one_sentence(program, says, tmp_path, capsys):
    """It names the file, the cause, and what is expected."""
    path, rows = tmp_path / "own.py", written(tmp_path, b"", {"prompt": "x", "answer": "yes"})
    if program is not None:
        path.write_text(program)
    assert run(["--task", str(path), "--data", rows, "--out", str(tmp_path / "run")]) == 2
    told, task = one_error(capsys), f"--task {path} cannot be used"
    assert says in told and ("problems" in told if "lambda" in str(program) else
                             task in told and "`-> Task`" in told)


def test_an_own_verifier_and_rows_are_enough(base, tmp_path, capsys, monkeypatch):
    """Its file may import its neighbours; a real model brings its own pretraining."""
    monkeypatch.chdir(tmp_path)
    Path("beside_it.py").write_text("NAME = 'own'")
    Path("own.py").write_text(
        "from __future__ import annotations\nfrom tasks import *\nfrom beside_it import NAME\n"
        "def verify(example, answer):\n    passed = answer == example.reference\n"
        "    return Verdict(1.0 * passed, passed, True, 'ok' if passed else 'no', {})\n"
        "def make() -> Task:\n    return Task(NAME, verify)\n")
    path = written(tmp_path, {"prompt": "1?", "answer": "a" * 999})
    own = ["--task", "own.py", "--data", path, "--eval-data", path]
    assert run(options(base, "none", *own)) == 2 and "s/1 with answer has" in one_error(capsys)
    written(tmp_path, {"prompt": "1?", "answer": "a"}, {"prompt": "2?", "answer": "a" * 99})
    assert run(options(base, "none", *own[:4])) == 2 and "give --data and" in one_error(capsys)
    assert run(own) == 2 and "Task.corpus" in one_error(capsys)
    for more in ([], ["--anchors", path]):
        assert run(options(base, f"run{len(more)}", *own, *more)) == 0
        told, first = capsys.readouterr().out, read(Path(f"run{len(more)}/metrics.jsonl"))[0]
        same = " ".join([*own[:2], "--model", str(base), *own[2:], *more, "--compare"])
        assert same in told and "1 of 2 references need --max-new-tokens 1" in told
        assert (first["eval_format"], "eval_old" in first) == (1, bool(more)) and "n/a gen" in told
    assert vcopd.read_config(["--task", "own.py"]).out == "runs/own-vcopd-s0"
