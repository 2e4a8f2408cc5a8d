"""Tests of VC-OPD in the order of the code: the method, running it, the tasks and their judge."""

import ast
import bisect
import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tasks
import vcopd

torch.set_num_threads(1)  # the models are tiny, and some tests run two processes on two cores

# =============================================================================================
# Helpers: a policy small enough to enumerate, and oracles that share no code with vcopd.py
# =============================================================================================

EOS, PAD, BOS, UNK, AB = range(5)
VOCAB = ["<eos>", "<pad>", "<bos>", "<unk>", "ab", *"abcdefghijklmnopqrstuvwxyzA0123456789 \n:"]
EQUATIONS = range(1, 13)
TOY = vcopd.Config(prompts=4, rollouts=4, max_new_tokens=6, lr=1e-2, replay_every=2, steps=6,
                   replay_keep=0.5, replay_share=0.2, format_rank=2, format_examples=8)


def letter_tokenizer(bos: bool = False, template: str | None = None):
    """One token a character, and one merge: the ids a, b read "ab" and encode as the token ab."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast
    ids = {token: i for i, token in enumerate(VOCAB)}
    core = Tokenizer(models.BPE(ids, [("a", "b")], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>",
                                   bos_token="<bos>", unk_token="<unk>", chat_template=template)


def tiny_model(architecture: str = "llama", vocab: int = len(VOCAB), **options):
    """Random weights, large enough that every context has its own distribution."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
    sizes = {"vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": EOS,
             "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": None,
             "pad_token_id": PAD, **options}
    torch.manual_seed(0)
    if architecture == "llama":  # rotary positions
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64,
                                            initializer_range=0.2)).eval()
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32,  # learned ones
                                    init_std=0.2)).eval()


def tiny_policy(architecture: str = "llama", vocab: int = len(VOCAB), stop_ids=(EOS,),
                dtype=torch.float32, moved: float = 0.0) -> vcopd.Policy:
    """A frozen random model with a policy adapter, `moved` away from its zero start."""
    model = tiny_model(architecture, vocab).to(dtype)
    vcopd.wrap_linears(model)
    vcopd.add_adapter(model, "policy", 4, 8.0, 0)
    noise = torch.Generator().manual_seed(1)
    for parameter in vcopd.adapter_parameters(model, "policy"):
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
    with vcopd.adapters(policy.model, role):
        return policy.model(torch.tensor([ids])).logits[0]


def prefix_logps(policy: vcopd.Policy, role: tuple[str, ...], batch: vcopd.Batch,
                 temperature: float) -> list[list[float]]:
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


def scored(policy: vcopd.Policy, role: tuple[str, ...], batch: vcopd.Batch,
           temperature: float = 0.8) -> torch.Tensor:
    """The shipped road from ids to log-probs: (B, T)."""
    hidden = vcopd.completion_hidden(policy, role, batch)
    return vcopd.on_tokens(policy, vcopd.token_logps, temperature, batch, hidden)


def student_terms(policy: vcopd.Policy, batch: vcopd.Batch, temperature: float) -> torch.Tensor:
    """The shipped log-prob, KL and entropy of the student against the base: (3, B, T)."""
    hidden = [vcopd.completion_hidden(policy, role, batch) for role in (policy.student, ())]
    return vcopd.on_tokens(policy, vcopd.token_terms, temperature, batch, *hidden)


def experience(advantage, logp_old, gap, mask=None) -> vcopd.Experience:
    """Numbers on paper as the loss wants them."""
    old, gap = torch.as_tensor(logp_old), torch.as_tensor(gap)
    mask = torch.ones(old.shape, dtype=torch.bool) if mask is None else mask
    batch = vcopd.Batch([[EOS]] * len(old), torch.zeros(old.shape, dtype=torch.long), mask)
    return vcopd.Experience(batch, torch.arange(len(old)), None, torch.as_tensor(advantage),
                            logp_old=old, gap=gap)


def likes_a(example: tasks.Example, answer: str) -> tasks.Verdict:
    """A verifier that likes a certain token: the share of an answer's six that are `a`."""
    reward = answer.count("a") / 6
    return tasks.Verdict(reward, reward > 0.5, True, "ok" if reward > 0.5 else "test: few", {})


def toy_examples(count: int, prefix: str = "say") -> list[tasks.Example]:
    """Prompts of other lengths. Only the hints hold the letter z."""
    return [tasks.Example(id=f"{prefix}{i}", prompt=f"{prefix} {'e' * (i % 4)}{i}",
                          reference="aa", hint="z" * (1 + i % 3)) for i in range(count)]


def toy_task() -> SimpleNamespace:
    """All that the method needs to know of a task."""
    return SimpleNamespace(name="toy", verify=likes_a, train=toy_examples(12),
                           anchors=toy_examples(6, "old"),
                           evals={"in_domain": toy_examples(5, "new")},
                           validation=(toy_examples(5, "valid"), []))


@pytest.fixture
def toy(monkeypatch):
    """A task whose anchors, too, are judged by `likes_a`."""
    monkeypatch.setattr(tasks, "verify_skill", likes_a)
    return toy_task()


def fresh_state(policy: vcopd.Policy, cfg: vcopd.Config) -> vcopd.State:
    """Step 0."""
    parameters = vcopd.adapter_parameters(policy.model, "policy")
    return vcopd.State(torch.optim.Adam(parameters, lr=cfg.lr), cfg.kl_coef)


def read_by_all(policy: vcopd.Policy, cfg: vcopd.Config, batch: vcopd.Batch | None = None,
                advantage=(-1.0, 1.0, 0.0, 2.0), examples=None) -> list[vcopd.Experience]:
    """Micro-batches of rollouts that student, reference and teacher have read."""
    advantage = torch.tensor(advantage, dtype=policy.model.dtype)
    return vcopd.score(policy, batch or ragged_batch(), examples or toy_examples(4), advantage, cfg)


def loss_and_gradient(policy: vcopd.Policy, parts: list[vcopd.Experience], cfg: vcopd.Config,
                      replay: vcopd.Batch | None = None) -> tuple[float, torch.Tensor]:
    """`update` stopped before its optimiser step: the loss that it descends, and the gradient."""
    values, whole = [], vcopd.total_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vcopd, "total_loss", lambda *a: values.append(whole(*a)) or values[-1])
        patch.setattr(vcopd, "optimizer_step", lambda optimizer, cfg: 0.0)
        patch.setattr(vcopd, "draw_replay", lambda *_: replay)
        vcopd.update(policy, parts, fresh_state(policy, cfg), replace(cfg, epochs=1))
    parameters = vcopd.adapter_parameters(policy.model, "policy")
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    policy.model.zero_grad()
    return sum(values).item(), gradient


def train_step(policy: vcopd.Policy, task, examples: list, state: vcopd.State,
               cfg: vcopd.Config) -> tuple[dict, list[dict]]:
    """One round of the shipped loop on these examples: its metrics and samples."""
    kept = []
    log = SimpleNamespace(write=lambda metrics, samples, _: kept.append((metrics, samples)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vcopd, "Log", lambda out, cfg: log)
        patch.setattr(vcopd, "examples_at", lambda *_: examples)
        patch.setattr(vcopd, "save_checkpoint", lambda *_: None)
        vcopd.train(policy, task, state, Path(),
                    replace(cfg, steps=state.step + 1, eval_every=10**6))
    return kept[0]


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every A and B by its full name."""
    return {name: w for name, w in model.state_dict().items() if ".lora_" in name}


def adapter_bytes(policy: vcopd.Policy) -> dict[str, bytes]:
    """Every adapter weight, to compare bit by bit."""
    return {name: weight.detach().numpy().tobytes()
            for name, weight in adapter_weights(policy.model).items()}


def base_digest(policy: vcopd.Policy) -> str:
    """A fingerprint of everything in the model that is not an adapter."""
    digest = hashlib.sha256()
    for name, weight in policy.model.state_dict().items():
        if "lora_" not in name:
            digest.update(name.encode() + weight.float().numpy().tobytes())
    return digest.hexdigest()


def language(length: int = 2) -> vcopd.Batch:
    """Every text of `length` over 5 tokens, behind one context: a space small enough to sum."""
    texts = torch.tensor(list(itertools.product(range(5), repeat=length)))
    return vcopd.Batch([[1, 3]] * len(texts), texts, torch.ones_like(texts, dtype=torch.bool))


def text_logps(policy: vcopd.Policy, role: tuple[str, ...], batch: vcopd.Batch) -> torch.Tensor:
    """log pi(y) at temperature 1 of each text, by the model's own forward, with gradient."""
    texts = zip(batch.contexts, batch.completion.tolist(), strict=True)
    return torch.stack([
        -F.cross_entropy(model_logits(policy, role, c + y)[len(c) - 1:-1], torch.tensor(y),
                         reduction="sum") for c, y in texts])


BOTH = pytest.mark.parametrize("architecture", ["llama", "opt"])  # rotary, learned positions

# =============================================================================================
# The page and the code say the same
# =============================================================================================


@pytest.mark.parametrize("number", EQUATIONS)
def test_every_equation_is_named_on_exactly_one_line_of_code(number):
    """A reader who searches for `Eq. 5` must land on the line that *is* the equation."""
    source = io.StringIO(Path(vcopd.__file__).read_text("utf-8"))
    comments = [token.string for token in tokenize.generate_tokens(source.readline)
                if token.type == tokenize.COMMENT]
    assert sum(bool(re.search(rf"# Eq\. {number}\b", text)) for text in comments) == 1


def test_the_readme_names_every_equation_once_too():
    """The page is read first: its numbered steps must cover what the code does."""
    assert sorted(map(int, re.findall(r"# Eq\. (\d+)\b", readme()))) == list(EQUATIONS)


def readme() -> str:
    """The page."""
    return (Path(vcopd.__file__).parent / "README.md").read_text("utf-8")


def readme_task() -> str:
    """The code block of a new task that the page tells its readers to paste."""
    blocks = re.findall(r"^```python\n(.*?)^```$", readme(), re.MULTILINE | re.DOTALL)
    [code] = [block for block in blocks if 'TASKS["sort"] =' in block]
    return code


@functools.cache
def all_tasks() -> dict:
    """The built-in tasks, and the page's in a copy of the module's names: nothing leaks."""
    space = {**vars(tasks), "TASKS": dict(tasks.TASKS)}
    exec(readme_task(), space)
    return space["TASKS"]


@functools.cache
def built(name: str) -> tasks.Task:
    """One of them, built once: code edits take seconds."""
    return all_tasks()[name]()


def readme_commands() -> list[str]:
    """Every command line on the page, and every option that stands there with its value."""
    found = re.findall(r"(?:vcopd\.py |`)(--[^`#&\n]+ [^`#&\n]+|--resume RUN)", readme())
    return [line.strip() for line in found]


@pytest.mark.parametrize("line", dict.fromkeys(readme_commands()))
def test_every_command_of_the_readme_is_accepted(line, tmp_path, monkeypatch):
    """A page goes out of date in silence: an option that was renamed must fail here first."""
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    Path("RUN/config.json").write_text(json.dumps(asdict(vcopd.Config())), "utf-8")
    words = {"N": "1", "sort": "arithmetic"}  # placeholders, and what a reader has to paste first
    arguments = [words.get(word, word) for word in shlex.split(line)]
    if "--plot" in arguments:
        assert vars(vcopd.build_parser().parse_args(arguments))["plot"]
        return
    cfg, resuming = vcopd.read_config(arguments)
    assert cfg.out and resuming == ("RUN" in line)


def test_every_option_and_function_that_the_readme_names_exists():
    """Bare names too, as in `--lr` or in the answers to the exercises."""
    parser = vcopd.build_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", readme())) <= known
    answers = readme().split("## Exercises")[1].split("</details>")[0]
    names = set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", answers))
    spoken = Path(vcopd.__file__).read_text("utf-8") + Path(tasks.__file__).read_text("utf-8")
    assert len(names) > 10
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", spoken)]


def test_the_method_fits_one_sitting():
    """Part I is what a reader reads: what is not the method belongs behind it."""
    lines = Path(vcopd.__file__).read_text("utf-8").splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith("#   PART I ")]
    [end] = [i for i, line in enumerate(lines) if line.startswith("#   PART II ")]
    assert end - start <= 450


def test_requirements_stand_in_the_header_too():
    """`uv run vcopd.py` and `pip install -r requirements.txt` must install the same."""
    folder = Path(vcopd.__file__).parent
    header = (folder / "vcopd.py").read_text("utf-8").split("# ///")[1]
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    assert re.findall(r'"(\S+==\S+)"', header) == [line for line in lines if "==" in line]


def test_every_listed_deviation_is_marked_where_it_happens():
    """The list in the header may not drift from the code."""
    listed = vcopd.__doc__.split("Where this differs")[1].split("Shapes:")[0]
    places = [vcopd.Policy, vcopd.nll_loss, vcopd.group_advantage, vcopd.token_logps]
    assert all(inspect.getsource(place).count("differs: ") == 1 for place in places)
    marks = re.findall(r"differs: \w", Path(vcopd.__file__).read_text("utf-8"))
    marks += re.findall(r"differs: \w", Path(tasks.__file__).read_text("utf-8"))
    assert len(re.findall(r"^ +\d\. ", listed, re.MULTILINE)) == len(marks)


# =============================================================================================
# Configuration
# =============================================================================================


# =============================================================================================
# Sequences
# =============================================================================================


def test_padding_goes_to_the_named_side():
    """Prompts are padded on the left for sampling, completions on the right for scoring."""
    ids, mask = vcopd.pad([[7], [8, 9]], value=1)
    assert ids.tolist() == [[7, 1], [8, 9]]
    assert mask.tolist() == [[True, False], [True, True]]
    ids, mask = vcopd.pad([[7], [8, 9]], value=1, left=True)
    assert ids.tolist() == [[1, 7], [8, 9]]
    assert mask.tolist() == [[False, True], [True, True]]


def test_the_mask_ends_at_the_first_stop_token_even_when_pad_equals_eos():
    """A mask made by `!= pad` would drop the stop token: the model would never learn to stop."""
    rows = torch.tensor([[5, 0, 0, 0],   # eos, then pads that are the same id
                         [0, 0, 0, 0],   # stops at once: length 1, not 0
                         [5, 6, 7, 0],   # stops at the end
                         [5, 6, 7, 8]])  # truncated: never stops
    assert vcopd.stop_mask(rows, torch.tensor([0])).sum(1).tolist() == [2, 1, 4, 4]


def test_any_of_several_stop_tokens_ends_a_completion():
    """Chat models stop at <|eot|> as well as at eos; text after either is not the answer."""
    rows = torch.tensor([[5, 7, 0, 6], [5, 0, 7, 6]])
    mask = vcopd.stop_mask(rows, torch.tensor([0, 7]))
    assert mask.tolist() == [[True, True, False, False]] * 2


def test_picking_rows_keeps_order_and_cuts_to_the_longest():
    """A micro-batch must not pay for the longest answer of another."""
    batch = ragged_batch()  # completions of 4, 1, 6 and 3 tokens
    part = batch.rows(torch.tensor([3, 0]))
    assert part.contexts == [batch.contexts[3], batch.contexts[0]]
    assert part.mask.sum(1).tolist() == [3, 4]
    assert torch.equal(part.completion, batch.completion[[3, 0], :4])


def test_generators_depend_on_their_name_alone():
    """Nothing to save at a checkpoint, and nothing that an evaluation could disturb."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = torch.rand(4, generator=vcopd.seeded("rollouts", 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(torch.rand(4, generator=vcopd.seeded("rollouts", 0, 1)), first)
    for name in [("rollouts", 0, 2), ("rollouts", 1, 1), ("replay", 0, 1)]:
        assert not torch.equal(torch.rand(4, generator=vcopd.seeded(*name)), first)


def test_no_text_makes_a_special_token_and_none_in_an_answer_is_lost(base):
    """Else code that holds one is judged as other code, and a prompt could end its own turn."""
    policy = vcopd.load_policy(config(str(base)), None)
    end, user = policy.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    plain, odd = (policy.encode(f"say {word} twice") for word in ("end", "<|end|> and <|user|>"))
    assert [ids.count(end) for ids in (plain, odd)] == [1, 1]
    assert [ids.count(user) for ids in (plain, odd)] == [1, 1]
    code = "def f():\n    return '<|end|>' + '<|user|>'"
    example = tasks.edit_example("x", "def f():\n    return ''", code, "f")
    batch = vcopd.solution_batch(policy, [example])
    assert batch.completion[0].tolist().count(end) == 1  # the one that ends it
    assert policy.decode(batch) == [code]


# =============================================================================================
# Roles
# =============================================================================================


@BOTH
def test_with_adapters_off_the_model_is_the_base_to_the_last_bit(architecture):
    """pi_0 and pi_ref cost no second copy of the model, so they must be exactly the first."""
    ids = torch.tensor([[5, 9, 7, 30]])
    with torch.no_grad():
        before = tiny_model(architecture)(ids).logits
        policy = tiny_policy(architecture, moved=0.3)
        assert torch.equal(policy.model(ids).logits, before)
        assert not torch.equal(model_logits(policy, policy.student, ids[0].tolist()), before[0])


def test_a_new_adapter_is_the_identity():
    """Training starts at pi_ref: KL is exactly 0 at step 0, not merely small."""
    policy = tiny_policy()
    logp, kl, _ = student_terms(policy, ragged_batch(), 0.8)
    assert kl.count_nonzero() == 0
    assert torch.equal(logp, scored(policy, vcopd.BASE, ragged_batch()))


def test_an_adapter_equals_its_update_merged_into_the_weights():
    """y = (W + alpha / r B A) x: with rank 4 and alpha 8 the scale is 2."""
    policy = tiny_policy(moved=0.3)
    plain = tiny_model()
    for name, layer in vcopd.lora_layers(policy.model).items():
        merged = plain.get_submodule(name).weight
        merged.data += 2 * layer.lora_B["policy"].data @ layer.lora_A["policy"].data
    ids = [5, 9, 7, 30]
    expected = plain(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model_logits(policy, policy.student, ids), expected,
                               atol=1e-4, rtol=1e-4)


def test_every_linear_layer_of_attention_and_mlp_is_wrapped_and_the_head_is_not():
    """q, k, v, o, gate, up and down in each of 2 layers."""
    policy = tiny_policy()
    assert len(vcopd.lora_layers(policy.model)) == 7 * 2
    assert type(policy.model.get_output_embeddings()) is torch.nn.Linear


def test_only_a_and_b_are_trained():
    """A base weight in the optimiser would move pi_ref and pi_0 along with the student."""
    policy = tiny_policy()
    trained = {id(p) for p in vcopd.adapter_parameters(policy.model, "policy")}
    open_names = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert {id(p) for p in policy.model.parameters() if p.requires_grad} == trained
    assert len(trained) == 2 * 14
    assert all(name.endswith((".lora_A.policy", ".lora_B.policy")) for name in open_names)


def test_adapters_are_float32_on_a_bfloat16_base():
    """bfloat16 has 8 bits of precision: a step of 1e-5 on a weight of 0.1 would vanish."""
    policy = tiny_policy(dtype=torch.bfloat16)
    dtypes = {p.dtype for p in vcopd.adapter_parameters(policy.model, "policy")}
    assert policy.model.dtype == torch.bfloat16
    assert dtypes == {torch.float32}


def test_switching_roles_nests_and_survives_an_exception():
    """A teacher pass that fails must not leave the student scored without its adapter."""
    policy = tiny_policy(moved=0.3)

    def logits():
        return policy.model(torch.tensor([[5, 9]])).logits

    off = logits()
    with vcopd.adapters(policy.model, policy.student):
        on = logits()
        with pytest.raises(KeyboardInterrupt), vcopd.adapters(policy.model, vcopd.BASE):
            assert torch.equal(logits(), off)
            raise KeyboardInterrupt
        assert torch.equal(logits(), on)
    assert torch.equal(logits(), off)
    assert not torch.equal(on, off)


def test_a_loaded_model_is_frozen_in_evaluation_mode_with_all_its_stop_tokens(tmp_path):
    """Dropout in a scoring pass makes ratio and KL noise; a forgotten stop id, endless answers."""
    model = tiny_model("opt", dropout=0.5)
    model.generation_config.eos_token_id = [EOS, 7]
    model.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    cfg = vcopd.Config(model=str(tmp_path), device="cpu", dtype="float32")
    policy = vcopd.load_policy(cfg, SimpleNamespace(name="toy"))
    assert policy.stop_ids.tolist() == [EOS, 7]
    once, again = (scored(policy, policy.student, ragged_batch()) for _ in range(2))
    assert torch.equal(once, again)
    _, kl, _ = student_terms(policy, ragged_batch(), 0.8)
    assert kl.count_nonzero() == 0


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for m in messages %}"
                                            "{{ m.content }}{% endfor %}:"])
def test_student_and_teacher_prompts_begin_with_exactly_one_bos(template):
    """A template that writes BOS and a tokenizer that adds it make two: no model knows that."""
    policy = replace(tiny_policy(), tokenizer=letter_tokenizer(bos=True, template=template))
    example = toy_examples(1)[0]
    for prompt in (example.prompt, tasks.privileged_prompt(example)):
        ids = policy.encode(prompt)
        assert ids[0] == BOS
        assert ids.count(BOS) == 1


def test_the_verifier_reads_the_answer_without_stop_token_and_padding():
    """Answer `ab`, written as the tokens a and b."""
    a, b = VOCAB.index("a"), VOCAB.index("b")
    completion = torch.tensor([[a, b, EOS, PAD]])
    batch = vcopd.Batch([[5]], completion, vcopd.stop_mask(completion, torch.tensor([EOS])))
    assert tiny_policy().decode(batch) == ["ab"]


# =============================================================================================
# Step 2 - rollouts
# =============================================================================================

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def test_draws_follow_the_declared_probabilities():
    """50,000 draws at temperature 0.8; four standard errors are at most 0.009."""
    logits = PROBS.log().expand(50_000, -1)
    tokens = vcopd.draw(logits, 0.8, 1.0, vcopd.seeded("test"))
    expected = PROBS ** (1 / 0.8) / (PROBS ** (1 / 0.8)).sum()
    seen = torch.bincount(tokens, minlength=5) / 50_000
    assert (seen - expected).abs().max() < 0.009


@pytest.mark.parametrize("top_p, nucleus", [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}),
                                            (0.69, {1, 3}), (0.71, {1, 3, 4}),
                                            (0.94, {1, 2, 3, 4}), (1.0, {0, 1, 2, 3, 4})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, nucleus):
    """The token that crosses the line belongs to it, and inside the odds stay as they were."""
    tokens = vcopd.draw(PROBS.log().expand(50_000, -1), 1.0, top_p, vcopd.seeded("test"))
    assert set(tokens.tolist()) == nucleus
    inside = torch.tensor([p if i in nucleus else 0 for i, p in enumerate(PROBS)])
    seen = torch.bincount(tokens, minlength=5) / 50_000
    assert (seen - inside / inside.sum()).abs().max() < 0.009


@pytest.mark.parametrize("vocab, spread", [(30, 3), (2000, 4), (2000, 0.1)])
def test_the_nucleus_agrees_with_the_one_of_transformers(vocab, spread):
    """An independent judge, on 200 random distributions: also on vocabularies of which the 256
    most likely tokens hold the nucleus, or do not.
    """
    from transformers import TopPLogitsWarper
    logits = spread * torch.randn(200, vocab, generator=vcopd.seeded("logits"))
    allowed = TopPLogitsWarper(0.9)(None, logits).isfinite()
    for seed in range(20):
        tokens = vcopd.draw(logits, 1.0, 0.9, vcopd.seeded("test", seed))
        assert allowed.gather(1, tokens[:, None]).all()


@BOTH
def test_greedy_answers_with_cache_and_padding_equal_the_plain_argmax_loop(architecture):
    """Left padding without position ids, or a cache row that went astray, would show here."""
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


@BOTH
def test_scoring_a_rollout_reproduces_the_log_probs_it_was_sampled_with(architecture,
                                                                         monkeypatch):
    """Sampler and scorer speak of one distribution, token by token, also after rows were dropped.

    This is what makes rho of Eq. 6 a ratio of like and like. (top_p is 1: see --top-p.)
    """
    policy = tiny_policy(architecture, stop_ids=(EOS, *range(35, 45)), moved=0.3)
    draws, draw = [], vcopd.draw

    def spy(logits, *rest):
        tokens = draw(logits, *rest)
        declared = torch.distributions.Categorical(logits=logits / 0.8).log_prob(tokens)
        draws.append(list(zip(tokens.tolist(), declared.tolist(), strict=True)))
        return tokens

    monkeypatch.setattr(vcopd, "draw", spy)
    cfg = replace(TOY, temperature=0.8, top_p=1.0)
    prompts = [[5], [9, 6, 7, 8, 20, 21, 9], [7, 7, 30]]
    batch = vcopd.sample(policy, policy.student, prompts, 4, cfg, vcopd.seeded("test"))
    logps = scored(policy, policy.student, batch, 0.8)
    assert len(set(batch.mask.sum(1).tolist())) > 2
    for t, step in enumerate(draws):
        alive = batch.mask[:, t]
        assert batch.completion[alive, t].tolist() == [token for token, _ in step]
        declared = torch.tensor([logp for _, logp in step])
        torch.testing.assert_close(logps[alive, t], declared, atol=1e-4, rtol=1e-4)


def test_whole_texts_come_with_the_probability_that_the_model_gives_them():
    """All 21 texts of a language that stops at token 0 or after two tokens, 50,000 samples.

    Rows that finish are dropped from the batch: that must not change what the others say.
    The 0.999 quantile of chi-square with 20 degrees of freedom is 45.3.
    """
    policy = tiny_policy(vocab=5, stop_ids=(0,), moved=0.3)
    cfg = replace(TOY, temperature=1.0, top_p=1.0, max_new_tokens=2)
    batch = vcopd.sample(policy, policy.student, [[1, 3]], 50_000, cfg, vcopd.seeded("test"))
    texts = language()
    probs = text_logps(policy, policy.student, texts).exp().view(5, 5)
    first, second = batch.completion.T
    table = torch.bincount(5 * first + second * (first != 0), minlength=25).view(5, 5)
    expected = 50_000 * torch.cat([probs[:1].sum()[None], probs[1:].flatten()])
    seen = torch.cat([table[0, :1], table[1:].flatten()])
    assert seen.sum() == 50_000
    assert ((seen - expected) ** 2 / expected).sum() < 45.3


def test_rollouts_are_prompt_major():
    """Rows i*K .. i*K+K-1 answer prompt i: the order on which the groups of Eq. 2 rely."""
    cfg = replace(TOY, max_new_tokens=2)
    batch = vcopd.sample(tiny_policy(), vcopd.BASE, [[5], [6, 7]], 3, cfg, vcopd.seeded("test"))
    assert batch.contexts == [[5]] * 3 + [[6, 7]] * 3


def test_sampling_uses_the_named_role_and_leaves_no_role_on():
    """Rollouts must come from the student: pi_old is its own distribution, not the base's."""
    policy = tiny_policy(moved=0.3)
    cfg = replace(TOY, temperature=0.0)
    rows = [vcopd.sample(policy, role, [[5]], 1, cfg, None).completion.tolist()
            for role in (vcopd.BASE, policy.student)]
    assert rows[0] != rows[1]
    assert {layer.active for layer in vcopd.lora_layers(policy.model).values()} == {()}


# =============================================================================================
# Scoring
# =============================================================================================


@pytest.mark.parametrize("kind, special", [
    ("llama", {}), ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8})])
def test_the_head_gives_the_logits_of_the_models_own_forward(kind, special):
    """Some models cap their logits after the last layer: forgotten, that is another model. Those
    that do yet other things are refused when they are loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=45, hidden_size=32, intermediate_size=64,
                                  num_hidden_layers=1, num_attention_heads=4, pad_token_id=PAD,
                                  num_key_value_heads=4, initializer_range=0.5, **special)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.tensor([[5, 9, 7]])
    logits = vcopd.head(model, model.base_model(ids).last_hidden_state)
    torch.testing.assert_close(logits, model(ids).logits)


@BOTH
@pytest.mark.parametrize("temperature", [0.8, 1.0])
@pytest.mark.parametrize("batch", [ragged_batch(), siblings()], ids=["strangers", "siblings"])
def test_log_probs_equal_a_loop_over_prefixes(batch, architecture, temperature):
    """An off-by-one shift would score each token with the distribution of its neighbour, and a
    leak between answers that share their prompt would let one read the other.

    First and last token, a completion of length 1 and one behind the longest prompt are all here.
    """
    policy = tiny_policy(architecture, moved=0.3)
    logps = scored(policy, policy.student, batch, temperature)
    expected = prefix_logps(policy, policy.student, batch, temperature)
    for row, mask, score in zip(logps, batch.mask, expected, strict=True):
        torch.testing.assert_close(row[mask].tolist(), score, atol=1e-4, rtol=1e-4)
    assert logps[~batch.mask].count_nonzero() == 0


def test_answers_that_share_their_prompt_learn_as_if_each_were_alone():
    """The prompt is read once for all its answers; each sends its gradient back through it."""
    batch, seen = siblings(), []

    def values_and_gradients(pack):
        policy = replace(tiny_policy(moved=0.3), pack=pack)
        policy.model.base_model.register_forward_pre_hook(
            lambda module, inputs, options: seen.append(inputs[0].shape), with_kwargs=True)
        terms = student_terms(policy, batch, 0.8)
        (terms * torch.tensor([1.0, 2.0, 3.0])[:, None, None]).sum().backward()
        return terms, [p.grad for p in vcopd.adapter_parameters(policy.model, "policy")]

    together, alone = values_and_gradients(1024), values_and_gradients(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert [shape[0] for shape in seen] == [3, 3, 6, 6]  # rows in the forward pass


@pytest.mark.parametrize("pack, rows", [(0, 6), (9, 5), (10, 4), (14, 4), (15, 3), (1024, 3)])
def test_answers_share_a_row_up_to_its_limit(pack, rows):
    """3 + 4 + 1 tokens, 9 + 6, and 5 + 3 + 2 + 5: attention grows with the square of a row."""
    groups = vcopd.packs(siblings(), pack)
    assert len(groups) == rows
    assert sum(groups, []) == [0, 1, 2, 3, 4, 5]


def test_scoring_twice_gives_the_same_bits():
    """Dropout, or any other noise, would make KL positive and ratios wander at step 0."""
    policy, batch = tiny_policy(moved=0.3), ragged_batch()
    assert torch.equal(*(scored(policy, policy.student, batch) for _ in range(2)))


def test_neither_padding_nor_the_logits_of_the_prompt_enter_the_loss(monkeypatch):
    """The prompt is given, not chosen; padding does not exist. Loss and gradient ignore both."""
    policy, batch = tiny_policy(moved=0.3), ragged_batch()
    cfg = replace(TOY, micro_tokens=10_000)
    loss, gradient = loss_and_gradient(policy, read_by_all(policy, cfg, batch), cfg)

    other = replace(batch, completion=torch.where(batch.mask, batch.completion, 33))
    again, same = loss_and_gradient(policy, read_by_all(policy, cfg, other), cfg)
    assert again == loss
    assert torch.equal(same, gradient)

    def noise_on_prompts(module, inputs, out):  # the state after the last prompt id stays
        out.last_hidden_state[:, :1] += 5
        return out

    policy.model.base_model.register_forward_hook(noise_on_prompts)
    again, same = loss_and_gradient(policy, read_by_all(policy, cfg, batch), cfg)
    assert again == loss
    assert torch.equal(same, gradient)


def test_log_probs_are_float32_on_a_bfloat16_base():
    """In bfloat16 the probabilities of a vocabulary sum to 1 give or take a percent."""
    policy = tiny_policy(dtype=torch.bfloat16)
    ids = torch.arange(len(VOCAB))
    hidden = torch.randn(32, generator=vcopd.seeded("test")).bfloat16().expand(len(ids), -1)
    logps = vcopd.token_logps(policy.model, 0.8, ids, hidden)
    assert logps.dtype == torch.float32
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.fixture
def bare_logits(monkeypatch):
    """Let hidden states be logits, so that a distribution can be written down."""
    monkeypatch.setattr(vcopd, "head", lambda model, hidden: hidden)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_terms_equal_those_of_torch_distributions(temperature, bare_logits):
    """An independent judge of log-prob, KL (both direction and size) and entropy."""
    p, q = 2 * torch.randn(2, 8, 6, generator=vcopd.seeded("test"))
    ids = torch.arange(8) % 6
    logp, kl, entropy = vcopd.token_terms(None, temperature, ids, p, q)
    student = torch.distributions.Categorical(logits=p / temperature)
    reference = torch.distributions.Categorical(logits=q / temperature)
    torch.testing.assert_close(logp, student.log_prob(ids))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(student, reference))
    torch.testing.assert_close(entropy, student.entropy())
    torch.testing.assert_close(vcopd.token_logps(None, temperature, ids, p), logp)


def test_entropy_of_certainty_is_zero_and_of_ignorance_log_v(bare_logits):
    """0 * log 0 is 0, not NaN: neither in the value nor in the gradient."""
    logits = torch.zeros(2, 6)
    logits[1, 4] = 1e4
    logits.requires_grad_()
    ids = torch.tensor([0, 4])
    logp, kl, entropy = vcopd.token_terms(None, 1.0, ids, logits, torch.zeros(2, 6))
    assert entropy.tolist() == pytest.approx([math.log(6), 0])
    assert kl.tolist() == pytest.approx([0, math.log(6)])
    (entropy.sum() + kl.sum() + logp.sum()).backward()
    assert logits.grad.isfinite().all()


def test_the_token_kls_of_a_language_sum_to_the_kl_between_its_texts():
    """All 25 texts of 2 tokens: the exact KL(pi_theta || pi_ref), not its reverse, by summation."""
    policy, texts = tiny_policy(vocab=5, moved=0.2), language()
    student = text_logps(policy, policy.student, texts)
    reference = text_logps(policy, vcopd.BASE, texts)
    _, kl, entropy = student_terms(policy, texts, 1.0)
    exact = (student.exp() * (student - reference)).sum()
    reverse = (reference.exp() * (reference - student)).sum()
    torch.testing.assert_close((student.exp()[:, None] * kl).sum(), exact)
    torch.testing.assert_close((student.exp()[:, None] * entropy).sum(),
                               -(student.exp() * student).sum())
    assert abs(exact - reverse) > 0.01  # the two directions do differ here


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_neither_values_nor_gradients(chunk, monkeypatch):
    """14 tokens, in chunks of 1, of 3 and all at once."""
    policy, batch = tiny_policy(moved=0.3), ragged_batch()

    def values_and_gradients():
        terms = student_terms(policy, batch, 0.8)
        (terms * torch.tensor([1.0, 2.0, 3.0])[:, None, None]).sum().backward()
        gradient = [p.grad.clone() for p in vcopd.adapter_parameters(policy.model, "policy")]
        policy.model.zero_grad()
        return terms, gradient

    whole = values_and_gradients()
    monkeypatch.setattr(vcopd, "LOGITS", chunk * len(VOCAB))
    torch.testing.assert_close(values_and_gradients(), whole, atol=1e-4, rtol=1e-4)


def test_no_logits_are_kept_for_the_backward_pass():
    """A chunked loss that retains each chunk saves nothing: 1024 x 150,000 floats are 600 MB."""
    policy, batch = tiny_policy(moved=0.3), ragged_batch()
    kept = []
    hidden = [vcopd.completion_hidden(policy, role, batch) for role in (policy.student, ())]
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        vcopd.on_tokens(policy, vcopd.token_terms, 0.8, batch, *hidden)
        assert all(len(VOCAB) not in shape for shape in kept)
        vcopd.token_terms(policy.model, 0.8, batch.completion[batch.mask], *hidden)
        assert any(len(VOCAB) in shape for shape in kept)  # so the hook does see logits


# =============================================================================================
# Step 3 - verdict
# =============================================================================================


def test_advantages_are_deviations_from_the_group_in_its_own_spread():
    """(1, 0): mean 0.5, population std 0.5. (1, 0, 0, 0): mean 0.25, std sqrt(3) / 4."""
    pair = vcopd.group_advantage(torch.tensor([1.0, 0.0]), 2)
    assert pair.tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001])
    four = vcopd.group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    std = math.sqrt(3) / 4 + 1e-4
    assert four.tolist() == pytest.approx([0.75 / std, *[-0.25 / std] * 3])


@pytest.mark.parametrize("value", [0.1, -1.0, 1 / 3])
@pytest.mark.parametrize("k", [1, 2, 7, 8])
def test_equal_rewards_give_an_advantage_of_exactly_zero(value, k):
    """The mean of seven 0.1 need not be 0.1 in float32: the difference is noise, no verdict."""
    assert vcopd.group_advantage(torch.full((2 * k,), value), k).tolist() == [0.0] * 2 * k


def test_each_group_is_judged_alone_and_in_order():
    """A reshape to (K, P) instead of (P, K) mixes prompts, and nothing else would notice."""
    reward = torch.tensor([1.0, 0.0, 0.5, 5.0, 5.0, 2.0, -1.0, -3.0, 7.0])
    whole = vcopd.group_advantage(reward, 3)
    alone = [vcopd.group_advantage(group, 3) for group in reward.split(3)]
    torch.testing.assert_close(whole, torch.cat(alone))
    for order in ([2, 0, 1], [1, 2, 0]):
        within = (torch.arange(9).view(3, 3)[:, order]).flatten()
        across = (torch.arange(9).view(3, 3)[order]).flatten()
        torch.testing.assert_close(vcopd.group_advantage(reward[within], 3), whole[within])
        torch.testing.assert_close(vcopd.group_advantage(reward[across], 3), whole[across])


# =============================================================================================
# Step 4 - hints
# =============================================================================================


@pytest.mark.parametrize("gate, expected", [("sigmoid", [0.119, 0.5, 0.881]),
                                            ("success", [0, 0, 1]),
                                            ("failure", [0.881, 0.5, 0.119]),
                                            ("none", [1, 1, 1])])
def test_each_gate_opens_for_the_verdict_it_is_named_after(gate, expected):
    """Advantages -2, 0 and 2; sigmoid(2) = 0.881."""
    opened = vcopd.GATES[gate](torch.tensor([-2.0, 0.0, 2.0]))
    assert opened.tolist() == pytest.approx(expected, abs=1e-3)


def test_the_gap_is_positive_where_the_teacher_likes_the_token_more_and_is_clipped():
    """log 0.5 - log 0.4 = 0.223; log 0.9 - log 0.1 = 2.197, held at 0.5."""
    teacher = torch.tensor([[0.5, 0.9, 0.1]], requires_grad=True)
    old = torch.tensor([[0.4, 0.1, 0.9]], requires_grad=True)
    gap = vcopd.teacher_gap(teacher.log(), old.log(), 0.5)
    assert gap[0].tolist() == pytest.approx([0.223, 0.5, -0.5], abs=1e-3)
    assert not gap.requires_grad


def test_a_missing_or_misaligned_teacher_stops_the_run():
    """A log-prob that is missing is not 0.0: that would say the teacher was certain."""
    terms = torch.zeros(3, 1, 2)
    part = experience([1.0], [[0.0, 0.0]], [[0.0, 0.0]])
    for gap in (None, torch.zeros(1, 1), torch.zeros(1, 3)):
        with pytest.raises((AssertionError, AttributeError)):
            vcopd.vcopd_loss(terms, replace(part, gap=gap), 0.0, 2, TOY)


@pytest.mark.parametrize("gate", sorted(vcopd.GATES))
def test_a_constant_gap_moves_the_advantage_by_exactly_lambda_times_gate_times_gap(gate):
    """If anything were normalised after the teacher spoke, a constant would vanish again."""
    cfg = replace(TOY, teacher_coef=0.2, gate=gate)
    advantage = torch.tensor([-2.0, 0.0, 2.0])
    dense = vcopd.dense_advantage(advantage, torch.full((3, 4), 0.3), cfg)
    moved = 0.2 * vcopd.GATES[gate](advantage) * 0.3
    torch.testing.assert_close(dense, (advantage + moved)[:, None].expand(3, 4))


def test_in_a_tied_group_the_teacher_is_the_only_signal_and_half_open():
    """A = 0, G = sigmoid(0) = 0.5: the dense advantage is 0.2 * 0.5 * D = D / 10."""
    advantage = vcopd.group_advantage(torch.full((2,), 0.1), 2)
    gap = torch.tensor([[0.5, -0.5], [0.1, 0.0]])
    torch.testing.assert_close(vcopd.dense_advantage(advantage, gap, TOY), gap / 10)


@BOTH
def test_a_teacher_with_the_students_own_prompt_has_no_gap_on_any_token(architecture,
                                                                        monkeypatch):
    """Any misalignment of teacher and student shows as a gap that is not exactly 0."""
    monkeypatch.setattr(tasks, "privileged_prompt", lambda example: example.prompt)
    policy = tiny_policy(architecture)
    examples = toy_examples(4)
    batch = replace(ragged_batch(), contexts=[policy.encode(e.prompt) for e in examples])
    parts = read_by_all(policy, TOY, batch, examples=examples)
    loss_and_gradient(policy, parts, TOY)
    assert sum(int(part.batch.mask.sum()) for part in parts) == 14
    assert all(part.gap.count_nonzero() == 0 for part in parts)


@pytest.mark.parametrize("most", [1, 10_000])
def test_the_teacher_scores_the_students_very_ids_behind_the_longer_prompt(most):
    """Decoded and encoded again, the tokens a and b would become one token ab, and every later
    log-prob would slip by one place. Rows come back in the order of the micro-batches.
    """
    policy, examples = tiny_policy(moved=0.3), toy_examples(2)
    a, b = VOCAB.index("a"), VOCAB.index("b")
    completion = torch.tensor([[a, b, EOS, PAD], [b, a, b, EOS]])
    assert policy.tokenizer("ab").input_ids == [AB]
    mask = vcopd.stop_mask(completion, policy.stop_ids)
    batch = vcopd.Batch([policy.encode(e.prompt) for e in examples], completion, mask)
    hinted = replace(batch, contexts=[policy.encode(tasks.privileged_prompt(e))
                                      for e in examples])
    expected = prefix_logps(policy, vcopd.BASE, hinted, 0.8)
    cfg = replace(TOY, micro_tokens=most)
    parts = read_by_all(policy, cfg, batch, [0.0, 1.0], examples)
    rows = [(context, logp[kept].tolist(), advantage) for part in parts
            for context, logp, kept, advantage in zip(part.batch.contexts, part.logp_teacher,
                                                      part.batch.mask, part.advantage.tolist(),
                                                      strict=True)]
    assert len(rows) == 2
    for context, logp, advantage in rows:
        row = batch.contexts.index(context)
        assert advantage == row
        assert logp == pytest.approx(expected[row], abs=1e-4)


@pytest.mark.parametrize("kind", ["specialist", "stronger"])
def test_another_teacher_speaks_with_its_own_weights(kind):
    """A trained adapter, or another model: neither the base nor the student may stand in for it."""
    policy = tiny_policy(moved=0.3)
    teacher, role = policy, ("specialist",)
    if kind == "stronger":
        teacher, role = tiny_policy("opt"), vcopd.BASE
        policy.stronger = teacher
    else:
        policy.specialist = True
        vcopd.add_adapter(policy.model, "specialist", 2, 2.0, 5)
        for weight in vcopd.adapter_parameters(policy.model, "specialist"):
            weight.data += 0.1
    batch, examples = ragged_batch(), toy_examples(4)
    hinted = replace(batch, contexts=[policy.encode(tasks.privileged_prompt(e))
                                      for e in examples])
    expected = sum(prefix_logps(teacher, role, hinted, 0.8), [])
    part, = read_by_all(policy, TOY, batch, examples=examples)
    order = part.index.argsort()
    said = part.logp_teacher[order][part.batch.mask[order]].tolist()
    assert said == pytest.approx(expected, abs=1e-4)


def test_the_hint_reaches_the_teacher_and_never_the_student(toy, monkeypatch):
    """Only hints hold the letter z. A leak would let the student copy what it should learn."""
    z, seen = VOCAB.index("z"), []
    policy, scoring = tiny_policy(), vcopd.completion_hidden

    def spy(policy, role, batch):
        seen.extend((role, z in context) for context in batch.contexts)
        return scoring(policy, role, batch)

    monkeypatch.setattr(vcopd, "completion_hidden", spy)
    train_step(policy, toy, toy.train[:4], fresh_state(policy, TOY), TOY)
    hinted = {role for role, has_hint in seen if has_hint}
    assert hinted == {policy.reference}
    assert sum(has_hint for _, has_hint in seen) == 16  # each rollout once, not in every epoch


# =============================================================================================
# Step 5 - update
# =============================================================================================


@pytest.mark.parametrize("advantage, ratio, objective, gradient", [
    (+1, 0.5, 0.5, 0.5), (+1, 1.0, 1.0, 1.0), (+1, 1.5, 1.2, 0.0),
    (-1, 0.5, -0.8, 0.0), (-1, 1.0, -1.0, -1.0), (-1, 1.5, -1.5, -1.5)])
def test_the_clip_stops_a_token_that_has_gone_far_enough_and_no_other(advantage, ratio, objective,
                                                                      gradient):
    """A good token already 1.2 times as likely, or a bad one 0.8 times, is let be. One that moved
    the wrong way keeps its full gradient, which is ratio * advantage by the chain rule.
    """
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


def test_the_stop_token_is_trained_even_when_pad_equals_eos():
    """An answer that rightly says nothing: eos, then padding of the same id. One good verdict and
    one update must make that eos likelier, and count one token of the row, not three.
    """
    policy, cfg = replace(tiny_policy(), pad_id=EOS), replace(TOY, teacher_coef=0.0)
    rows = torch.tensor([[EOS, EOS, EOS], [9, 10, EOS]])
    batch = vcopd.Batch([[5, 6], [7, 8]], rows, vcopd.stop_mask(rows, policy.stop_ids))
    parts = read_by_all(policy, cfg, batch, (1.0, 0.0))
    before = model_logits(policy, policy.student, [5, 6])[-1].softmax(-1)[EOS]
    vcopd.update(policy, parts, fresh_state(policy, cfg), cfg)
    assert model_logits(policy, policy.student, [5, 6])[-1].softmax(-1)[EOS] > before
    assert sum(int(part.batch.mask.sum()) for part in parts) == 1 + 3


def test_a_worked_example_on_paper():
    """Two rollouts of two tokens. Rewards 1 and 0, so A = (1, -1) and G = (0.731, 0.269).

    The student gave each token 1/4. The teacher gives 1/2 to the first of each row (D = log 2 =
    0.693, held at 0.5) and 1/5 to the second (D = log 0.8 = -0.223). With lambda = 0.2:

        A_dense    1 + 0.2 * 0.731 * 0.5 =  1.073     1 - 0.2 * 0.731 * 0.223 =  0.967
                  -1 + 0.2 * 0.269 * 0.5 = -0.973    -1 - 0.2 * 0.269 * 0.223 = -1.012

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
    assert info["policy_loss"].item() == pytest.approx(-0.116, abs=1e-3)
    assert info["ratio_clipped"].item() == 0.5
    assert loss.item() == pytest.approx(-0.115, abs=1e-3)
    assert vcopd.total_loss(loss, 2.0, 0.1).item() == pytest.approx(0.096, abs=1e-3)


def test_at_step_0_the_loss_is_about_zero_but_its_gradient_is_not():
    """"Why is my loss 0?": rho is 1 and the advantages of equally long rollouts cancel."""
    policy = tiny_policy()
    cfg = replace(TOY, teacher_coef=0.0, entropy_coef=0.0)
    completion = torch.randint(AB, len(VOCAB), (4, 5), generator=vcopd.seeded("test"))
    batch = vcopd.Batch([[5, 6]] * 4, completion, torch.ones_like(completion, dtype=torch.bool))
    advantage = vcopd.group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4).tolist()
    loss, gradient = loss_and_gradient(policy, read_by_all(policy, cfg, batch, advantage), cfg)
    assert abs(loss) < 1e-6
    assert gradient.norm() > 0.1


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """Summed over all 25 texts with their probabilities, Eq. 7 must climb E[R] itself.

    This settles sign, shift and log-derivative at once.
    """
    policy, texts = tiny_policy(vocab=5, moved=0.2), language()
    reward = torch.randn(25, generator=vcopd.seeded("reward"))
    parameters = vcopd.adapter_parameters(policy.model, "policy")
    probs = text_logps(policy, policy.student, texts).exp()
    climb = torch.autograd.grad((probs * reward).sum(), parameters)

    terms = student_terms(policy, texts, 1.0)
    part = experience((probs * reward).detach(), terms[0].detach(), torch.zeros(25, 2))
    loss, _ = vcopd.vcopd_loss(terms, part, 0.0, 1, replace(TOY, entropy_coef=0.0))
    descend = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(descend, [-g for g in climb], atol=1e-5, rtol=1e-3)


FULL = replace(TOY, kl_coef=0.5, entropy_coef=0.1, teacher_coef=1.0, gap_clip=0.5)


@pytest.mark.parametrize("cfg", [
    pytest.param(FULL, id="whole loss"),
    pytest.param(replace(FULL, gate="none", gap_clip=9.0, ratio_clip=0.05), id="strong teacher"),
    pytest.param(replace(FULL, kl_coef=9.0), id="kl")])
@pytest.mark.parametrize("epoch", [1, 2])
def test_autograd_agrees_with_finite_differences_of_the_whole_loss(cfg, epoch, monkeypatch):
    """A, D, the gate and pi_old are constants: a gradient through one of them shows here, and so
    does a KL without gradient. In float64, on one entry of an A and one of a B.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    policy = tiny_policy("opt", moved=0.1)
    policy.model.double()  # the adapters too
    replay = vcopd.Batch([[7, 8]], torch.tensor([[9, 10, EOS]]), torch.ones(1, 3) > 0)
    parts = read_by_all(policy, cfg)
    _, gradient = loss_and_gradient(policy, parts, cfg, replay)  # fills in pi_old and D
    parameters = vcopd.adapter_parameters(policy.model, "policy")
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
        slope = (losses[0] - losses[1]) / 2e-6
        assert slopes[steepest].item() == pytest.approx(slope, rel=1e-5)


def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient():
    """Means of means would weigh a short answer's tokens more. One row at a time, or all."""
    policy = tiny_policy(moved=0.2)
    whole, split = (replace(FULL, micro_tokens=most) for most in (10_000, 1))
    parts = read_by_all(policy, split)
    assert (len(read_by_all(policy, whole)), len(parts)) == (1, 4)
    torch.testing.assert_close(loss_and_gradient(policy, parts, split, ragged_batch()),
                               loss_and_gradient(policy, read_by_all(policy, whole), whole,
                                                 ragged_batch()))


@pytest.mark.parametrize("most", [1, 12, 22, 40])
@pytest.mark.parametrize("batch", [
    ragged_batch(), ragged_batch([(10, 1), (1, 10), (9, 2), (2, 9)]), siblings()],
    ids=["ragged", "opposite", "siblings"])
def test_micro_batches_hold_every_row_once_and_the_model_never_sees_more_tokens(most, batch):
    """The limit is there for memory: it must bound what really goes through the model, also when
    the longest prompt and the longest answer stand in different rows.
    """
    policy, seen = tiny_policy(), []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(inputs[0].numel()), with_kwargs=True)
    groups = vcopd.micro_batches(policy, batch, most)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(batch.contexts)))
    for index in groups:
        vcopd.completion_hidden(policy, vcopd.BASE, batch.rows(index))
    assert all(tokens <= most or len(index) == 1
               for tokens, index in zip(seen, groups, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_under_the_mask_can_poison_the_loss(poison):
    """NaN * 0 is NaN: a masked value must be left out, not multiplied away."""
    policy, batch = tiny_policy(moved=0.2), ragged_batch()
    hidden = vcopd.completion_hidden(policy, policy.student, batch)
    logp, kl, entropy = vcopd.on_tokens(policy, vcopd.token_terms, 0.8, batch, hidden,
                                        hidden.detach() * 0.9)
    logp, kl, entropy = (torch.where(batch.mask, t, poison) for t in (logp, kl, entropy))
    bad = torch.where(batch.mask, logp.detach(), poison)
    part = experience([1.0, -1.0, 0.5, 2.0], bad, torch.where(batch.mask, 0.1, poison), batch.mask)
    loss, info = vcopd.vcopd_loss(torch.stack([logp, kl, entropy]), part, 0.1, 14, TOY)
    loss.backward()
    gradients = [p.grad for p in vcopd.adapter_parameters(policy.model, "policy")]
    assert loss.isfinite()
    assert all(value.isfinite() for value in info.values())
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_on_a_bfloat16_base_the_ratio_of_the_first_epoch_is_exactly_one(toy):
    """With a clip range of 0, a single rounding error between pi_old and pi_theta would count."""
    policy = tiny_policy(dtype=torch.bfloat16, moved=0.1)
    cfg = replace(TOY, epochs=1, ratio_clip=0.0)
    metrics, _ = train_step(policy, toy, toy.train[:4], fresh_state(policy, cfg), cfg)
    assert metrics["ratio_clipped"] == 0


# =============================================================================================
# The adaptive KL coefficient
# =============================================================================================


def test_the_guard_tightens_above_the_target_and_relaxes_below():
    """Times 1.2 or times 0.95, and held between 1e-4 and 10."""
    cfg = replace(TOY, kl_target=0.03)
    assert vcopd.adapt_kl_coef(0.01, 0.031, cfg) == pytest.approx(0.012)
    assert vcopd.adapt_kl_coef(0.01, 0.030, cfg) == pytest.approx(0.0095)
    assert vcopd.adapt_kl_coef(10.0, 1.0, cfg) == 10.0
    assert vcopd.adapt_kl_coef(1e-4, 0.0, cfg) == 1e-4


def test_the_guard_stands_still_when_22_percent_of_updates_exceed_the_target():
    """So the *average* KL settles below the target: what to expect when reading a log."""
    def after(exceeding: int) -> float:
        kl_coef = 1.0
        for i in range(100):
            kl_coef = vcopd.adapt_kl_coef(kl_coef, i * exceeding % 100 < exceeding, TOY)
        return kl_coef

    assert after(22) == pytest.approx(1, abs=0.05)
    assert after(20) < 0.7 < 1.4 < after(24)


# =============================================================================================
# Step 6 - replay
# =============================================================================================


def test_replay_keeps_the_best_by_verdict_and_among_equals_the_most_confident(toy, monkeypatch):
    """Six anchors, half kept: the two that pass, then the likeliest of those that fail."""
    policy, kept_ids = tiny_policy(moved=0.2), []
    monkeypatch.setattr(tasks, "verify_skill", lambda example, answer: tasks.Verdict(
        float(example.id in ("old1", "old4")), True, True, "ok", {}))
    every = vcopd.refresh_replay(policy, toy.anchors, 0, replace(TOY, replay_keep=1.0))
    pool = vcopd.refresh_replay(policy, toy.anchors, 0, TOY)
    names = {tuple(policy.encode(e.prompt)): e.id for e in toy.anchors}
    kept_ids = [names[tuple(context)] for context in pool.contexts]
    confidence = {names[tuple(context)]: sum(row) / len(row) for context, row in zip(
        every.contexts, prefix_logps(policy, policy.student, every, 0.8), strict=True)}
    rest = {name: value for name, value in confidence.items() if name not in ("old1", "old4")}
    assert len(rest) == 4
    assert set(kept_ids) == {"old1", "old4", max(rest, key=rest.get)}


def test_every_old_skill_has_its_share_of_the_replay(toy, monkeypatch):
    """Ranked all together, the easiest skills would fill the pool, and the others be forgotten."""
    policy = tiny_policy(moved=0.2)
    monkeypatch.setattr(tasks, "verify_skill", lambda example, answer: tasks.Verdict(
        float(example.skill == "easy"), True, True, "ok", {}))
    anchors = [replace(example, skill=("easy", "hard")[i % 2])
               for i, example in enumerate(toy.anchors)]
    pool = vcopd.refresh_replay(policy, anchors, 0, TOY)
    skill = {tuple(policy.encode(example.prompt)): example.skill for example in anchors}
    assert sorted(skill[tuple(context)] for context in pool.contexts) == ["easy"] * 2 + ["hard"] * 2


@pytest.mark.parametrize("rows, share", [(16, 0.1), (64, 0.1), (64, 0.2), (512, 0.15)])
def test_replay_is_its_share_of_the_batch(rows, share):
    """r of all rows, new and old, give or take the rounding of one row."""
    state = vcopd.State(None, 0.01, replay=ragged_batch())
    cfg = replace(TOY, prompts=rows // 4, rollouts=4, replay_share=share)
    drawn = vcopd.draw_replay(state, 0, cfg)
    count = len(drawn.contexts)
    assert abs(count - share * (rows + count)) <= 0.5


def test_replay_is_the_plain_likelihood_that_transformers_computes():
    """No PPO ratio: its pi_old would be many steps old. The judge is the model's own loss."""
    policy, batch = tiny_policy(moved=0.3), ragged_batch()
    ids, seen = vcopd.pad([c + y[m].tolist() for c, y, m in zip(
        batch.contexts, batch.completion, batch.mask, strict=True)], PAD)
    labels = ids.masked_fill(~seen, -100)
    for row, context in enumerate(batch.contexts):
        labels[row, :len(context)] = -100
    with vcopd.adapters(policy.model, policy.student):
        expected = policy.model(ids, attention_mask=seen.long(), labels=labels).loss
    loss = vcopd.nll_loss(policy, policy.student, batch, 1.0, int(batch.mask.sum()))
    torch.testing.assert_close(loss, expected)


# =============================================================================================
# One training step
# =============================================================================================


def test_training_makes_the_verifier_happier(toy):
    """The whole method in a second: the share of the liked token rises."""
    policy = tiny_policy()
    cfg = replace(TOY, rollouts=8, lr=0.02)
    state, rewards = fresh_state(policy, cfg), []
    for _ in range(12):
        examples = vcopd.examples_at(toy, state.step, cfg)
        metrics, _ = train_step(policy, toy, examples, state, cfg)
        rewards.append(metrics["reward"])
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_training_leaves_the_base_untouched(toy):
    """pi_0 and pi_ref are the same weights as the student's: one stray write moves all roles."""
    policy = tiny_policy()
    before, adapter = base_digest(policy), adapter_bytes(policy)
    state = fresh_state(policy, TOY)
    for _ in range(3):
        train_step(policy, toy, toy.train[:4], state, TOY)
    assert base_digest(policy) == before
    assert adapter_bytes(policy) != adapter


def after_two_steps(task, cfg: vcopd.Config) -> dict[str, bytes]:
    """The student's weights after two steps from the start."""
    policy = tiny_policy()
    state = fresh_state(policy, cfg)
    for _ in range(2):
        train_step(policy, task, vcopd.examples_at(task, state.step, cfg), state, cfg)
    return adapter_bytes(policy)


@functools.cache
def usual_two_steps(cfg: vcopd.Config) -> dict[str, bytes]:
    """The run that every option is compared with, computed once."""
    return after_two_steps(toy_task(), cfg)


@pytest.mark.parametrize("option, value", [
    ("temperature", 1.3), ("top_p", 0.3), ("max_new_tokens", 3), ("rollouts", 2), ("seed", 1),
    ("teacher", "none"), ("teacher_coef", 0.5), ("gap_clip", 0.1), ("gate", "success"),
    ("gate", "failure"), ("gate", "none"), ("lr", 2e-2), ("epochs", 1), ("ratio_clip", 0.01),
    ("kl_coef", 1.0), ("kl_target", 9.0), ("entropy_coef", 0.1), ("max_grad_norm", 0.01),
    ("replay_share", 0.5), ("replay_every", 1), ("replay_keep", 0.2), ("blind", True)])
def test_every_option_of_the_method_changes_the_update(option, value, toy):
    """An option that is accepted and does nothing makes an ablation that shows nothing."""
    usual = replace(TOY, ratio_clip=0.05, kl_target=1e-4)
    changed = replace(usual, **{option: value})
    assert after_two_steps(toy_task(), changed) != usual_two_steps(usual)


def test_the_same_seed_gives_the_same_student_bit_by_bit(toy):
    """Else no result could be repeated, and the test above would pass for any option."""
    assert after_two_steps(toy, TOY) == after_two_steps(toy, TOY)


def test_every_step_and_every_seed_draws_its_own_answers(toy):
    """A generator that is started anew with one seed would sample the same answers for ever."""
    policy, written = tiny_policy(), []
    for step, seed in [(0, 0), (1, 0), (0, 1)]:
        cfg = replace(TOY, seed=seed, lr=0.0)  # nobody learns
        state = replace(fresh_state(policy, cfg), step=step)
        _, samples = train_step(policy, toy, toy.train[:1], state, cfg)
        written.append(tuple(record["answer"] for record in samples))
    assert len(set(written)) == 3


def test_each_epoch_takes_one_optimiser_step_on_the_whole_batch(toy):
    """Micro-batches only split the work: 4 rollouts one at a time, 3 epochs, 3 steps."""
    policy = tiny_policy()
    cfg = replace(TOY, prompts=1, epochs=3, micro_tokens=1)
    state = fresh_state(policy, cfg)
    train_step(policy, toy, toy.train[:1], state, cfg)
    assert {int(entry["step"]) for entry in state.optimizer.state.values()} == {3}


def test_answers_that_stop_at_once_have_length_one(toy):
    """Every token is a stop token here: nothing divides by zero, and the stop itself is trained."""
    policy = tiny_policy(stop_ids=range(len(VOCAB)))
    before = adapter_bytes(policy)
    metrics, _ = train_step(policy, toy, toy.train[:4], fresh_state(policy, TOY), TOY)
    assert metrics["tokens"] == 16
    assert metrics["truncated"] == 0
    assert math.isfinite(metrics["policy_loss"])
    assert adapter_bytes(policy) != before


def test_tied_groups_are_counted_and_still_learn_from_the_teacher(toy):
    """A verifier without an opinion: no verdict anywhere, but hints still move the student."""
    toy.verify = lambda example, answer: tasks.Verdict(0.1, False, True, "test", {})
    cfg = replace(TOY, replay_share=0.0, entropy_coef=0.0, kl_coef=0.0, epochs=1)
    policy = tiny_policy()
    before = adapter_bytes(policy)
    metrics, _ = train_step(policy, toy, toy.train[:4], fresh_state(policy, cfg), cfg)
    assert metrics["tied_rollouts"] == 1
    assert metrics["gap_tied"] > 0
    assert metrics["teacher_share"] == pytest.approx(1)
    assert adapter_bytes(policy) != before


def test_reinforcement_learning_never_asks_the_teacher(toy, monkeypatch):
    """The baseline differs in one number, and does not pay for what it does not use."""
    monkeypatch.setattr(tasks, "privileged_prompt", None)  # calling it would raise
    cfg = replace(TOY, method="rl", **vcopd.METHODS["rl"])
    policy = tiny_policy()
    metrics, _ = train_step(policy, toy, toy.train[:4], fresh_state(policy, cfg), cfg)
    assert metrics["teacher_share"] == 0


def test_blind_distillation_is_blind_to_the_verdict(toy):
    """Two verifiers that disagree lead to the same student, bit by bit."""
    cfg = replace(TOY, method="opd", **vcopd.METHODS["opd"])
    students = []
    for sign in (1, -1):
        toy.verify = lambda example, answer, sign=sign: replace(
            likes_a(example, answer), reward=float(sign * len(answer)))
        policy = tiny_policy()
        train_step(policy, toy, toy.train[:4], fresh_state(policy, cfg), cfg)
        students.append(adapter_bytes(policy))
    assert students[0] == students[1]


def test_a_verifier_may_speak_in_whole_numbers(toy):
    """A fork's first verifier returns 1 or -1, not 1.0 or -1.0."""
    toy.verify = lambda example, answer: tasks.Verdict(1 if "a" in answer else -1, True, True,
                                                       "ok", {})
    policy = tiny_policy()
    metrics, _ = train_step(policy, toy, toy.train[:4], fresh_state(policy, TOY), TOY)
    assert -1 < metrics["reward"] < 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step():
    """A NaN in Adam's moments never leaves again; skipping the batch in silence hides the cause."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(vcopd.RunError):
        vcopd.optimizer_step(optimizer, TOY)
    assert weight.tolist() == [1, 1]


# =============================================================================================
# Supervised fine-tuning and Step 1
# =============================================================================================


def test_imitation_learns_the_reference_and_where_it_ends(toy):
    """The reference `aa` becomes a, a and the stop token; the likelihood of all three rises."""
    policy = tiny_policy()
    batch = vcopd.solution_batch(policy, toy.train[:2])
    a = VOCAB.index("a")
    assert batch.completion.tolist() == [[a, a, EOS]] * 2
    assert batch.mask.all()
    before = scored(policy, policy.student, batch, 1.0)
    state = fresh_state(policy, TOY)
    for _ in range(5):
        vcopd.sft_step(policy, policy.student, toy.train[:2], state.optimizer, TOY)
    assert (scored(policy, policy.student, batch, 1.0) > before).all()


def test_step_1_trains_its_own_adapter_which_then_stays_and_anchors_the_kl(toy):
    """Measured against the model before Step 1, the guard would fight the format just learnt."""
    policy = tiny_policy()
    policy_before = adapter_bytes(policy)
    vcopd.train_format(policy, toy, TOY)
    formatted = adapter_bytes(policy)
    assert policy.reference == ("format",)
    assert policy.student == ("format", "policy")
    assert policy_before.items() <= formatted.items()  # the policy adapter did not move
    assert all(p.grad is None for p in vcopd.adapter_parameters(policy.model, "policy"))
    layers = vcopd.lora_layers(policy.model).values()
    assert all(layer.lora_B["format"].count_nonzero() for layer in layers)
    with torch.no_grad():
        kl, kl_to_base = (vcopd.kl_and_entropy(policy, policy.student, role, [ragged_batch()],
                                               TOY)[0] for role in (policy.reference, vcopd.BASE))
    assert kl == 0 < kl_to_base
    for epochs in (1, 2):
        cfg = replace(TOY, epochs=epochs)
        metrics, _ = train_step(policy, toy, toy.train[:4], fresh_state(policy, cfg), cfg)
        assert (metrics["kl"] == 0) == (epochs == 1)
    after = adapter_bytes(policy)
    assert {n for n in after if after[n] != formatted[n]} == set(policy_before)


# =============================================================================================
# The loop, evaluation, checkpoints, export
# =============================================================================================


def test_every_pass_over_the_data_sees_each_example_once_in_a_new_order(toy):
    """12 examples, 4 a step: three steps are a pass."""
    passes = [[e.id for step in range(3 * i, 3 * i + 3) for e in vcopd.examples_at(toy, step, TOY)]
              for i in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(e.id for e in toy.train)
    assert passes[0] != passes[1]


def run_steps(policy: vcopd.Policy, toy, state: vcopd.State, out: Path, **options) -> list[dict]:
    """The shipped loop; returns its metrics."""
    vcopd.train(policy, toy, state, out, replace(TOY, **options))
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_looking_at_held_out_problems_does_not_change_training(toy, tmp_path):
    """An evaluation that draws from training's generator makes every result depend on how often
    one looked.
    """
    runs = []
    for eval_every in (1, 100):
        out = tmp_path / str(eval_every)
        out.mkdir()
        policy = tiny_policy()
        metrics = run_steps(policy, toy, fresh_state(policy, TOY), out, eval_every=eval_every)
        looked = [line.pop("eval_pass", None) is not None for line in metrics]
        assert looked == [eval_every == 1] * 6
        runs.append((metrics, adapter_bytes(policy)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("step_1", [False, True])
def test_three_steps_then_a_new_process_then_three_more_are_six_steps_bit_by_bit(
        step_1, toy, tmp_path):
    """Optimiser moments, beta, the replay pool, the format adapter, the data order: all resume."""
    def start(out: Path) -> tuple[vcopd.Policy, vcopd.State]:
        out.mkdir()
        policy = tiny_policy()
        if step_1:
            vcopd.train_format(policy, toy, TOY)
        return policy, fresh_state(policy, TOY)

    straight, state = start(tmp_path / "straight")
    expected = run_steps(straight, toy, state, tmp_path / "straight")

    first, state = start(tmp_path / "resumed")
    run_steps(first, toy, state, tmp_path / "resumed", steps=3)
    second = tiny_policy()  # knows nothing of the first
    state = fresh_state(second, TOY)
    vcopd.load_checkpoint(tmp_path / "resumed" / "checkpoint", second, state, TOY)
    assert (state.step, second.reference) == (3, first.reference)
    assert run_steps(second, toy, state, tmp_path / "resumed") == expected
    assert adapter_bytes(second) == adapter_bytes(straight)


def test_resuming_from_nothing_says_so(tmp_path):
    """Starting anew in silence would be taken for a continued run."""
    policy = tiny_policy()
    with pytest.raises(vcopd.RunError, match="resum"):
        vcopd.load_checkpoint(tmp_path, policy, fresh_state(policy, TOY), TOY)


@BOTH
@pytest.mark.parametrize("step_1", [False, True])
def test_the_exported_adapter_is_the_student_in_peft(architecture, step_1, toy, tmp_path):
    """Both adapters go out as one of summed rank, with their scales: same logits, or no export."""
    peft = pytest.importorskip("peft")
    policy = tiny_policy(architecture, moved=0.1)
    if step_1:
        vcopd.train_format(policy, toy, TOY)
    vcopd.export_adapter(tmp_path, policy)
    exported = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    ids = [5, 9, 7, 30]
    expected = model_logits(policy, policy.student, ids)
    torch.testing.assert_close(exported(torch.tensor([ids])).logits[0], expected,
                               atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model_logits(policy, vcopd.BASE, ids), expected, atol=1e-2)


# =============================================================================================
# Real models: checks, teachers, NF4, adapters in PEFT's format
# =============================================================================================

CHATML = ("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
OPTIONS = {  # what an architecture adds to SHAPE, or has in its place
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
               "final_logit_softcapping": 0.5},
    "gpt2": {"n_inner": 48}, "mixtral": {"num_local_experts": 2}, "mamba": {}, "cohere": {},
    "granite": {"logits_scaling": 8.0}, "bert": {}, "t5": {}}
SUPPORTED = ["llama", "qwen2", "qwen3", "gemma2", "gpt2"]


def small_tokenizer(bos: bool = False, template: str | None = CHATML, eos: bool = True):
    """A byte-level BPE; with `bos`, one that writes it in front of everything by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|text|>", "<|end|>", "<|user|>", "<|assistant|>", "<s>"]
    bpe.train_from_iterator(["def f(x):\n    return x"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template,
                                   eos_token="<|text|>" if eos else None,
                                   bos_token="<s>" if bos else None)


def save_small(folder: Path, kind: str = "llama", tokenizer=None, **options) -> str:
    """A random model of an architecture, as Hugging Face saves one."""
    from transformers import AutoConfig, AutoModelForCausalLM, T5ForConditionalGeneration
    config = AutoConfig.for_model(kind, **{**SHAPE, **OPTIONS[kind], **options})
    torch.manual_seed(len(kind))
    model = (T5ForConditionalGeneration(config) if kind == "t5"
             else AutoModelForCausalLM.from_config(config))
    with torch.no_grad():  # at its initial scale a head says nothing
        model.get_output_embeddings().weight.mul_(5)
    model.save_pretrained(folder)
    (tokenizer or small_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of the supported architectures, made once."""
    return {kind: save_small(tmp_path_factory.mktemp(kind) / "model", kind) for kind in SUPPORTED}


def config(model: str, **options) -> vcopd.Config:
    """Small sizes, and float32."""
    return vcopd.Config(**{"model": model, "device": "cpu", "lora_rank": 4, "lora_alpha": 8.0,
                           "format_rank": 2, "max_new_tokens": 12, **options})


def moved_policy(cfg: vcopd.Config) -> vcopd.Policy:
    """A policy after Step 1 and training, as far as its adapters are concerned: both do much."""
    policy = vcopd.load_policy(cfg, None)
    vcopd.add_adapter(policy.model, "format", cfg.format_rank, cfg.format_rank, cfg.seed)
    policy.reference = (*policy.reference, "format")
    generator = vcopd.seeded("moved")
    for name in ("format", "policy"):
        for weight in vcopd.adapter_parameters(policy.model, name):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return policy


IDS = torch.tensor([[7, 30, 80, 81, 200, 45, 9, 130, 22, 60]])


@torch.no_grad()
def logits_of(policy: vcopd.Policy, role: tuple[str, ...]) -> torch.Tensor:
    """The logits (L, V) of a role."""
    with vcopd.adapters(policy.model, role):
        return policy.model(IDS).logits[0]


def rollouts(policy: vcopd.Policy, cfg: vcopd.Config) -> vcopd.Batch:
    """Two answers to each of two prompts of different length."""
    prompts = [policy.encode("def f(x):"), policy.encode("repair this: def f(x):\n    return")]
    return vcopd.sample(policy, policy.student, prompts, 2, cfg, vcopd.seeded("rollouts"))


# ------------------------------------------------------------------- export and merging


@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_exported_adapter_gives_the_same_logits_in_peft(kind, models, tmp_path):
    """Format and policy adapter leave as one: the sum of two low ranks is one low rank."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    policy = moved_policy(config(models[kind]))
    vcopd.export_adapter(tmp_path / "adapter", policy)
    base = AutoModelForCausalLM.from_pretrained(models[kind])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = logits_of(policy, policy.student)
    assert (ours - logits_of(policy, vcopd.BASE)).abs().max() > 0.1
    assert torch.allclose(theirs(IDS).logits[0], ours, atol=1e-5)


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_merged_model_is_plain_and_gives_the_same_logits(kind, quantize, models, tmp_path):
    """People take the result to tools that know no adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if (kind, quantize) == ("gpt2", "nf4"):
        with pytest.raises(vcopd.RunError, match="needs plain linear layers"):
            vcopd.load_policy(config(models[kind], quantize=quantize), None)
        return
    policy = moved_policy(config(models[kind], quantize=quantize))
    before = logits_of(policy, vcopd.BASE)
    vcopd.export_merged(tmp_path / "plain", policy)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ours = logits_of(policy, policy.student)
    assert torch.allclose(plain(IDS).logits[0], ours, atol=1e-5)
    assert torch.equal(logits_of(policy, vcopd.BASE), before)  # merging is no side effect
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template == CHATML


def peft_folder(base: str, folder: Path, **options) -> Path:
    """An adapter as PEFT writes it, with weights that do something."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"],
                "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def peft_logits(base: str, folder: Path) -> torch.Tensor:
    """What PEFT makes of a folder: (L, V)."""
    import peft
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, folder).eval()(IDS).logits[0].detach()


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}, {"target_modules": "all-linear"}])
def test_a_peft_folder_made_elsewhere_is_a_specialist_teacher(options, models, tmp_path):
    """Also with fewer layers, with ranks that differ, and with rank-stabilised scaling."""
    folder = peft_folder(models["llama"], tmp_path / "adapter", **options)
    policy = vcopd.load_policy(config(models["llama"], teacher=str(folder)), None)
    assert policy.teacher == (policy, ("specialist",))
    expected = peft_logits(models["llama"], folder)
    assert torch.allclose(logits_of(policy, ("specialist",)), expected, atol=1e-5)
    assert torch.equal(logits_of(policy, policy.student), logits_of(policy, vcopd.BASE))
    assert not any(p.requires_grad for p in vcopd.adapter_parameters(policy.model, "specialist"))


def test_a_peft_folder_as_the_model_is_where_training_starts(models, tmp_path):
    """It is frozen into the reference, and what is exported is the whole way from its base."""
    folder = peft_folder(models["llama"], tmp_path / "start", rank_pattern={"v_proj": 2})
    expected = peft_logits(models["llama"], folder)
    policy = vcopd.load_policy(config(str(folder)), None)
    assert policy.reference == ("start",) and policy.student == ("start", "policy")
    assert torch.allclose(logits_of(policy, policy.student), expected, atol=1e-5)
    policy = moved_policy(config(str(folder)))
    assert policy.student == ("start", "format", "policy")
    vcopd.export_adapter(tmp_path / "adapter", policy)
    assert torch.allclose(peft_logits(models["llama"], tmp_path / "adapter"),
                          logits_of(policy, policy.student), atol=1e-5)


@pytest.mark.parametrize("options, named", [
    ({"use_dora": True}, "adapts .*magnitude"),
    ({"modules_to_save": ["lm_head"]}, "adapts .*lm_head"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"alpha_pattern": {"v_proj": 2}}, "alpha_pattern")])
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(options, named, models, tmp_path):
    """Loading it as if it were would be a wrong teacher that nobody notices."""
    folder = peft_folder(models["llama"], tmp_path / "adapter", **options)
    with pytest.raises(vcopd.RunError, match=named):
        vcopd.load_policy(config(models["llama"], teacher=str(folder)), None)


def test_an_adapter_for_another_model_is_refused(models, tmp_path):
    """Other sizes, other layer names, and no weights at all."""
    wide = save_small(tmp_path / "wide", intermediate_size=64)
    folder = peft_folder(wide, tmp_path / "adapter")
    with pytest.raises(vcopd.RunError, match="made for another model: .*down_proj"):
        vcopd.load_policy(config(models["llama"], teacher=str(folder)), None)
    folder = peft_folder(models["llama"], tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(vcopd.RunError, match="adapts base_model.model.lm_head"):
        vcopd.load_policy(config(models["llama"], teacher=str(folder)), None)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(vcopd.RunError, match="adapter_model.safetensors cannot be used"):
        vcopd.load_policy(config(models["llama"], teacher=str(folder)), None)


# ------------------------------------------------------------------- teachers


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("teacher", ["self", "stronger"])
def test_a_teacher_who_is_the_student_with_the_same_prompt_has_no_gap(kind, teacher, models,
                                                                      monkeypatch):
    """Exactly 0 on every token, whatever the architecture: contexts and tokens are aligned."""
    cfg = config(models[kind], teacher=models[kind] if teacher == "stronger" else "self")
    policy = vcopd.load_policy(cfg, None)
    monkeypatch.setattr(tasks, "privileged_prompt", lambda example: example.prompt)
    examples = [tasks.Example("", prompt, "", "") for prompt in ("def f(x):", "x" * 40)]
    prompts = [policy.encode(example.prompt) for example in examples]
    batch = vcopd.sample(policy, policy.student, prompts, 2, cfg, vcopd.seeded("rollouts"))
    rows = [example for example in examples for _ in range(2)]
    for part in vcopd.score(policy, batch, rows, torch.zeros(4), cfg):
        assert part.logp_old[part.batch.mask].abs().min() > 0
        assert torch.equal(part.gap, torch.zeros_like(part.gap))


def test_a_stronger_teacher_reads_the_prompt_in_its_own_template(models, tmp_path, monkeypatch):
    """Same ids, another chat template: each model is asked in the form that it knows."""
    other = small_tokenizer(template=CHATML.replace("<|user|>", "<|user|>Please: "))
    folder = save_small(tmp_path / "teacher", hidden_size=64, tokenizer=other)
    policy = vcopd.load_policy(config(models["llama"], teacher=folder), None)
    seen, scoring = [], vcopd.completion_hidden
    monkeypatch.setattr(vcopd, "completion_hidden", lambda policy, role, batch: (
        seen.append(batch.contexts[0]), scoring(policy, role, batch))[1])
    batch = rollouts(policy, config(models["llama"]))
    example = tasks.Example("", "question", "", "the secret")
    vcopd.score(policy, batch, [example] * 4, torch.zeros(4), config(models["llama"]))
    text = policy.tokenizer.decode(seen[-1])
    assert text.startswith("<|user|>Please: question") and "the secret" in text


def test_a_teacher_with_another_tokenizer_is_refused(models, tmp_path):
    """Its probabilities would be about other tokens."""
    other = vcopd.train_tokenizer(["another text"], 300)
    folder = save_small(tmp_path / "teacher", tokenizer=other)
    with pytest.raises(vcopd.RunError, match="another tokenizer than the student"):
        vcopd.load_policy(config(models["llama"], teacher=folder), None)


# ------------------------------------------------------------------- prompts and stop tokens


@pytest.mark.parametrize("kind", ["template writes it", "template leaves it out", "no template"])
def test_a_prompt_begins_with_exactly_one_bos(kind, models):
    """A template may write BOS, and so may the tokenizer: twice is as wrong as never."""
    template = {"template writes it": "{{ bos_token }}" + CHATML,
                "template leaves it out": CHATML, "no template": None}[kind]
    tokenizer = small_tokenizer(bos=True, template=template)
    policy = replace(vcopd.load_policy(config(models["llama"]), None), tokenizer=tokenizer)
    example = tasks.Example("", "def f(x):", "return", "a hint")
    for prompt in (example.prompt, tasks.privileged_prompt(example)):
        ids = policy.encode(prompt)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert prompt in tokenizer.decode(ids)
    no_bos = replace(policy, tokenizer=small_tokenizer(bos=False, template=template))
    assert no_bos.encode("def")[0] != tokenizer.bos_token_id


def test_thinking_is_switched_off_where_a_template_offers_it(models):
    """Qwen3 would think for longer than the longest answer; the format asks for the answer."""
    template = CHATML + "{% if enable_thinking is sameas(false) %}!{% endif %}"
    policy = replace(vcopd.load_policy(config(models["llama"]), None),
                     tokenizer=small_tokenizer(template=template))
    assert policy.tokenizer.decode(policy.encode("Q")).endswith("<|assistant|>!")


def test_every_stop_token_is_known_and_sft_teaches_the_end_of_turn(tmp_path):
    """As with Llama 3 and Gemma: tokenizer, template and generation config name different ones,
    and the smallest id is not the one that ends an answer."""
    folder = save_small(tmp_path / "model", eos_token_id=[0, 3])
    policy = vcopd.load_policy(config(folder), None)
    end = policy.tokenizer.convert_tokens_to_ids("<|end|>")
    assert policy.stop_ids.tolist() == [end, 0, 3]
    batch = vcopd.solution_batch(policy, [tasks.Example("", "Q", "return x", "")])
    assert batch.completion[0, -1] == end and batch.mask.all()
    assert policy.decode(batch) == ["return x"]
    plain = small_tokenizer(template=None)
    assert vcopd.stop_tokens(plain, policy.model.generation_config) == [0, 3]


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    """No answer could end, and padding would have no id."""
    folder = save_small(tmp_path / "model", tokenizer=small_tokenizer(eos=False))
    with pytest.raises(vcopd.RunError, match="no end-of-sequence token"):
        vcopd.load_policy(config(folder), None)


def test_decoding_does_not_tidy_up_code(models):
    """Tokenizers that clean up spaces turn `a != b` into `a!= b`."""
    tokenizer = small_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    policy = replace(vcopd.load_policy(config(models["llama"]), None), tokenizer=tokenizer)
    ids = torch.tensor([tokenizer("a != b , c").input_ids])
    batch = vcopd.Batch([[1]], ids, torch.ones_like(ids, dtype=torch.bool))
    assert policy.decode(batch) == ["a != b , c"]


# ------------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize("kind, why", [
    ("cohere", "cohere is not supported: .*logits differ"),
    ("granite", "granite is not supported: .*logits differ"),
    ("bert", "bert is not supported: .*logits differ"), ("t5", "Unrecognized configuration")])
def test_an_architecture_that_is_not_supported_is_refused_by_name(kind, why, tmp_path):
    """Before anything is trained wrongly: the start-up check knows what the code relies on."""
    folder = save_small(tmp_path / "model", kind)
    with pytest.raises(vcopd.RunError, match=why):
        vcopd.load_policy(config(folder), None)


def test_weights_that_are_missing_are_not_drawn_at_random(models, tmp_path):
    """transformers only warns."""
    from safetensors.torch import load_file, save_file
    folder = Path(save_small(tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(vcopd.RunError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        vcopd.load_policy(config(str(folder)), None)


@pytest.mark.parametrize("name, why", [
    ("empty", ".*config"), ("./nowhere/at/all", ".*Repo id")])
def test_a_model_that_is_not_there_is_one_sentence(name, why, tmp_path, monkeypatch):
    """And it says what can be given instead."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(vcopd.RunError, match=f"{name} cannot be used on .*: {why}.*; give"):
        vcopd.load_policy(config(name), None)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_one_sentence(file, tmp_path):
    """Half a download, say."""
    folder = Path(save_small(tmp_path / "model"))
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(vcopd.RunError, match=f"{folder} cannot be used on .*; give") as error:
        vcopd.load_policy(config(str(folder)), None)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """As the user sees it: no traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cfg = config("owner/name", task="arithmetic", out=str(tmp_path / "run"))
    assert vcopd.main(cfg, False) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("vcopd.py: owner/name cannot be used on --device cpu: ")
    assert shown.count("\n") == 1


# ------------------------------------------------------------------- activations, and NF4


@pytest.mark.parametrize("kind", SUPPORTED)
def test_recomputed_layers_give_the_same_gradients(kind, models, monkeypatch):
    """The backward pass computes layers again when their adapters are long switched off."""
    cfg, gradients = config(models[kind]), []
    for threshold in (10**9, 0):
        monkeypatch.setattr(vcopd, "RECOMPUTE_FROM", threshold)
        policy = moved_policy(cfg)
        calls, forward = [], vcopd.LoRALinear.forward
        monkeypatch.setattr(vcopd.LoRALinear, "forward",
                            lambda layer, x, calls=calls, forward=forward: (
                                calls.append(layer.active), forward(layer, x))[1])
        batch = rollouts(policy, cfg)
        calls.clear()
        vcopd.nll_loss(policy, policy.student, batch, 1.0, 10).backward()
        monkeypatch.setattr(vcopd.LoRALinear, "forward", forward)
        layers = len(vcopd.lora_layers(policy.model))
        assert calls == [policy.student] * layers * (1 if threshold else 2)
        weights = vcopd.adapter_parameters(policy.model, "policy")
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def dense(out: int, inp: int, scale: float = 1.0) -> torch.nn.Linear:
    """A linear layer with normal weights."""
    layer = torch.nn.Linear(inp, out)
    layer.weight.data = torch.randn(out, inp, generator=vcopd.seeded("dense")) * scale
    return layer


def test_nf4_holds_the_nearest_code_times_the_largest_weight_of_its_block():
    """By a search over all sixteen codes; a block of zeros stays zero, odd sizes are padded."""
    layer = dense(7, 25)
    layer.weight.data[:3] = 0  # the whole first block
    got = vcopd.NF4Linear(layer).weight.flatten()
    flat = layer.weight.detach().flatten()
    for start in range(0, len(flat), 64):
        block = flat[start:start + 64]
        values = torch.tensor(vcopd.NF4) * block.abs().max()
        nearest = (block[:, None] - values).abs().min(1).values
        assert torch.allclose((block - got[start:start + 64]).abs(), nearest, atol=1e-6)
    assert got[:64].abs().max() == 0


def test_nf4_equals_bitsandbytes():
    """Value for value, where that is installed."""
    functional = pytest.importorskip("bitsandbytes").functional
    layer = dense(96, 128, 0.02)
    packed, state = functional.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
    ours = vcopd.NF4Linear(layer)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax)
    assert torch.equal(ours.weight, functional.dequantize_4bit(packed, state))


def test_nf4_takes_about_a_quarter_and_computes_in_the_dtype_of_the_model():
    """4 bits and a float32 for 64 weights: 0.28 of bfloat16."""
    layer = dense(256, 512).bfloat16()
    ours = vcopd.NF4Linear(layer)
    size = sum(t.nbytes for t in (ours.packed, ours.absmax))
    assert size / layer.weight.nbytes == pytest.approx(0.28, abs=0.01)
    x = torch.randn(3, 512, generator=vcopd.seeded("x")).bfloat16()
    assert torch.equal(ours(x), F.linear(x, ours.weight, layer.bias))
    assert ours(x).dtype == torch.bfloat16
    assert not ours.weight.requires_grad


def test_all_roles_work_on_a_quantised_base(models, tmp_path):
    """Only attention and MLP are quantised; format, specialist and policy act on top."""
    folder = peft_folder(models["llama"], tmp_path / "adapter")
    policy = moved_policy(config(models["llama"], quantize="nf4", teacher=str(folder)))
    assert all(isinstance(layer.base, vcopd.NF4Linear)
               for layer in vcopd.lora_layers(policy.model).values())
    plain, packed = (vcopd.load_policy(config(models["llama"], quantize=quantize), None)
                     for quantize in ("none", "nf4"))
    assert (vcopd.environment(plain)["frozen_parameters"]
            == vcopd.environment(packed)["frozen_parameters"])
    roles = [vcopd.BASE, policy.reference, policy.student, ("specialist",)]
    logits = [logits_of(policy, role) for role in roles]
    assert all((one - two).abs().max() > 0.01 for one, two in zip(logits, logits[1:], strict=False))
    assert (logits[0] - logits_of(plain, vcopd.BASE)).abs().max() > 1e-4


# ------------------------------------------------------------------- whole runs


def own_data(folder: Path) -> dict[str, str]:
    """A raw HumanEvalPack file, and a benchmark in HumanEval's format."""
    code = {"raw": {"task_id": "P/0", "declaration": "def g(x):\n", "entry_point": "g",
                    "buggy_solution": "    return x", "canonical_solution": "    return x * 2",
                    "test": "def check(g):\n    assert g(2) == 4\n\ncheck(g)"},
            "bench": {"task_id": "H/0", "prompt": 'def h(x):\n    """Add one."""\n',
                      "canonical_solution": "    return x + 1", "entry_point": "h",
                      "test": "def check(candidate):\n    assert candidate(2) == 3"}}
    for name, row in code.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in code}


def test_a_benchmark_program_is_judged_by_its_tests(tmp_path):
    """Not by comparing words with the reference: another right program is right."""
    example = tasks.load_benchmark(own_data(tmp_path)["bench"])[0]
    assert tasks.verify_skill(example, "def h(x):\n    return 1 + x").passed
    assert not tasks.verify_skill(example, "def h(x):\n    return x").passed


def test_eval_only_scores_an_adapter_on_a_data_file_and_trains_nothing(models, tmp_path, capsys):
    """The same table, without a before; the KL says how far the adapter is from its base."""
    files = own_data(tmp_path)
    folder = peft_folder(models["llama"], tmp_path / "adapter")
    cfg, _ = vcopd.read_config([
        "--model", str(folder), "--eval-only", "--eval-data", files["raw"], "--benchmark",
        files["bench"], "--max-new-tokens", "8", "--eval-problems", "2", "--device", "cpu"])
    assert cfg.out == "runs/codeedit-eval"
    assert vcopd.main(replace(cfg, out=str(tmp_path / "run")), False) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report.keys() == {"scores", "seconds", "environment"}
    assert report["scores"]["eval_data"]["pass@1"] == 0.0
    assert report["scores"]["kl_to_base"] > 0.001
    assert "programs" in report["scores"]["general"]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"config.json", "report.json"}
    printed = capsys.readouterr().out
    assert "eval_data pass@1" in printed and "before" not in printed


def test_a_quantised_run_completes_and_its_results_load(monkeypatch, tmp_path):
    """Built-in model, NF4, Step 1, training, adapter and merged model: the whole way."""
    from transformers import AutoModelForCausalLM
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vcopd, "TINY_RECIPE", {
        **vcopd.TINY_RECIPE, "documents": 60, "steps": 2, "hidden": 32, "layers": 2})
    cfg, _ = vcopd.read_config([
        "--task", "arithmetic", "--quantize", "nf4", "--steps", "2", "--prompts", "2",
        "--rollouts", "2", "--eval-problems", "2", "--eval-every", "2", "--format-examples", "4",
        "--max-new-tokens", "8", "--device", "cpu", "--out", str(tmp_path / "run"),
        "--merge", str(tmp_path / "plain")])
    assert vcopd.main(cfg, False) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert sum(p.numel() for p in plain.parameters()) > 0
    assert vcopd.main(cfg, False) == 2  # the folder to merge into is taken


# =============================================================================================
# Survival: interruption, bad input, several processes
# =============================================================================================

HERE = Path(vcopd.__file__).parent

# =============================================================================================
# Helpers: a base of some thousand parameters, and whole runs of a second
# =============================================================================================


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random model and a tokenizer in a folder, as --model takes it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    folder, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    texts = [text for _ in range(100) for text in tasks.sum_document(rng)]
    tokenizer = vcopd.train_tokenizer(texts, 280)
    torch.manual_seed(1)
    ids = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=42, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.06, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def even_length(example, answer: str) -> tasks.Verdict:
    """A verifier of which a random model gets some right."""
    right = len(answer) % 2 == 0
    return tasks.Verdict(2.0 * right - 1, right, True, "ok" if right else "wrong", {})


def small_task() -> tasks.Task:
    """Arithmetic with an easy verifier and little to evaluate."""
    task = tasks.arithmetic()
    return replace(task, verify=even_length, anchors=task.anchors[::20],
                   benchmark=task.benchmark[25::20])


@pytest.fixture
def small(monkeypatch):
    """The small task under the name of arithmetic."""
    monkeypatch.setitem(tasks.TASKS, "arithmetic", small_task)


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory) -> dict[str, Path]:
    """For two methods, the folder of a run that nothing disturbed."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "arithmetic", small_task)
        for method in ("vcopd", "sft"):
            folders[method] = tmp_path_factory.mktemp("whole") / method
            assert run(options(base, folders[method], "--method", method)) == 0
    return folders


@pytest.fixture
def done(whole, small, tmp_path) -> Path:
    """A copy of such a run, to spoil."""
    return shutil.copytree(whole["vcopd"], tmp_path / "run")


def options(base: Path, out: Path, *more: str) -> list[str]:
    """A command line for a run of six steps that takes about a second."""
    return ["--task", "arithmetic", "--model", str(base), "--out", str(out), "--steps", "6",
            "--prompts", "2", "--rollouts", "2", "--max-new-tokens", "6", "--eval-problems", "2",
            "--save-every", "2", "--eval-every", "4", "--lr", "0.01", "--lora-rank", "2",
            "--format-threshold", "0", *more,
            *([] if "sft" in more else ["--replay-every", "3"])]


def run(arguments: list[str]) -> int:
    """What `python vcopd.py ARGUMENTS` does, in this process: its exit code."""
    try:
        return vcopd.main(*vcopd.read_config(arguments))
    except SystemExit as stop:
        return stop.code


def results(out: Path) -> tuple:
    """All that a run leaves which must not depend on its history."""
    report = json.loads((out / "report.json").read_text("utf-8"))
    names = ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors")
    return report["before"], report["after"], *((out / name).read_bytes() for name in names)


def in_child(function, *args) -> int:
    """Call it in a forked process that can die without harm: its wait status."""
    pid = os.fork()
    if pid == 0:
        tasks.pool.cache_clear()  # the judge's servers belong to the parent
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            os._exit(function(*args) or 0)
        except BaseException:
            os._exit(99)
    return os.waitpid(pid, 0)[1]


class FailingSync:
    """os.fsync that does something dreadful when it is called for the nth time."""

    def __init__(self, nth: int, dreadful):
        self.left, self.dreadful, self.real = nth, dreadful, os.fsync

    def __call__(self, fd: int) -> None:
        self.left -= 1
        if self.left == 0:
            self.dreadful(fd)
        self.real(fd)


def cut_and_die(fd: int) -> None:
    """SIGKILL while the file is written: its last bytes are missing."""
    with contextlib.suppress(OSError):  # a folder
        os.ftruncate(fd, max(os.fstat(fd).st_size - 7, 0))
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(arguments: list[str], nth: int) -> int:
    """A run that is killed at its nth write."""
    os.fsync = FailingSync(nth, cut_and_die)
    return run(arguments)


def one_error(capsys) -> str:
    """The only line on the error stream besides progress bars; it is no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("vcopd.py: ") and "Traceback" not in lines[0]
    return lines[0]


# =============================================================================================
# Interruption
# =============================================================================================


# The writes of a run: 2 for each of config, metrics, samples, and checkpoint 0, then 1 or 2 for
# each step's lines and 2 for each checkpoint.
@pytest.mark.parametrize(("method", "nth"), [("vcopd", 3), ("vcopd", 15), ("sft", 13)])
def test_a_run_killed_while_it_writes_ends_as_if_nothing_had_happened(
        method, nth, base, whole, small, tmp_path):
    """Killed before the first checkpoint, in a line of metrics, in a checkpoint; then resumed."""
    out = tmp_path / "killed"
    arguments = options(base, out, "--method", method)
    assert in_child(run_and_die, arguments, nth) == signal.SIGKILL
    assert not (out / "report.json").exists()
    assert run(["--resume", str(out)]) == 0
    assert results(out) == results(whole[method])
    assert not list(out.glob("**/*.new"))


def test_a_finished_run_says_so_and_can_be_prolonged(base, whole, done, tmp_path, capsys):
    """--resume in a script's loop must end; 6 steps and 2 more are 8 steps."""
    assert run(["--resume", str(done)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert results(done) == results(whole["vcopd"])
    assert run(["--resume", str(done), "--steps", "8"]) == 0
    assert run(options(base, tmp_path / "straight", "--steps", "8")) == 0
    assert results(done) == results(tmp_path / "straight")
    assert run(["--resume", str(done)]) == 0  # 8 is now what it was asked for


def test_a_new_run_destroys_no_other(base, whole, done, capsys):
    """A newcomer repeats the same command; somebody else forgets --out after changing --lr."""
    assert run(options(base, done)) == 0  # the same again: the same results
    assert results(done) == results(whole["vcopd"])
    capsys.readouterr()
    assert run(options(base, done, "--lr", "0.02")) == 2
    assert "--out" in one_error(capsys)
    report = (done / "report.json").read_bytes()
    (done / "report.json").unlink()
    assert run(options(base, done)) == 2
    assert f"--resume {done}" in one_error(capsys)
    (done / "report.json").write_bytes(report)
    assert results(done) == results(whole["vcopd"])


@pytest.mark.parametrize(("where", "nth", "saved"), [
    ("sample", 1, False), ("evaluate", 1, False), ("score", 3, True),
    ("verify_all", 10, True), ("refresh_replay", 2, True), ("probe", 1, True),
    ("evaluate", 2, True)])
def test_ctrl_c_anywhere_leaves_a_run_that_goes_on_to_the_same_end(
        where, nth, saved, base, whole, small, tmp_path, monkeypatch, capsys):
    """Sampling, judging, training, evaluation: each is a place where people lose patience."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(vcopd, where, Pressed(getattr(vcopd, where), nth))
        capsys.readouterr()
        assert run(options(base, out)) == 130
    assert f"python vcopd.py --resume {out}" in capsys.readouterr().out
    assert bool(list(out.glob("checkpoint/*.pt"))) == saved
    assert run(["--resume", str(out)]) == 0
    assert results(out) == results(whole["vcopd"])


class Pressed:
    """A function during whose nth call Ctrl-C is pressed, so many times."""

    def __init__(self, function, nth: int, times: int = 1):
        self.function, self.left, self.times = function, nth, times

    def __call__(self, *args):
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return self.function(*args)


class Once:
    """Counts its calls."""

    calls = 0

    def __call__(self, *args) -> None:
        self.calls += 1


def test_a_second_ctrl_c_ends_at_once(base, small, tmp_path, monkeypatch):
    """A step of a large model takes minutes."""
    monkeypatch.setattr(vcopd, "score", Pressed(vcopd.score, 2, times=2))
    monkeypatch.setattr(vcopd.Log, "write", once := Once())  # must not come to a second step
    handler = signal.getsignal(signal.SIGINT)
    assert run(options(base, tmp_path / "run", "--eval-every", "1")) == 130
    assert signal.getsignal(signal.SIGINT) is handler and once.calls == 1


def test_ctrl_c_before_anything_was_begun_does_not_promise_a_resume(
        base, small, tmp_path, monkeypatch, capsys):
    """While the base is built there is nothing to go on with."""
    monkeypatch.setattr(vcopd, "load_policy", Pressed(vcopd.load_policy, 1))
    assert run(options(base, tmp_path / "run")) == 130
    assert "same command again" in capsys.readouterr().out


def processes_below(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_process_behind(base, tmp_path):
    """The judge's servers run in sessions of their own, where Ctrl-C does not reach them."""
    process = subprocess.Popen(
        [sys.executable, HERE / "vcopd.py", *options(base, tmp_path / "run", "--task", "codeedit",
                                                     "--steps", "1000")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.split()[:1] == ["2"]:
            break
    servers = processes_below(process.pid)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"python vcopd.py --resume {tmp_path / 'run'}" in printed and "Traceback" not in printed
    assert servers and not any(Path(f"/proc/{pid}").exists() for pid in servers)


# =============================================================================================
# --compare and --ablations
# =============================================================================================


def columns_of(out: Path) -> dict:
    """The numbers behind the table."""
    return json.loads((out / "table.json").read_text("utf-8"))["columns"]


def test_a_comparison_chooses_on_validation_and_gives_each_method_the_same(
        small, base, tmp_path, capsys, monkeypatch):
    """No rate may be chosen on test problems, and no method may have more steps or other ones."""
    looked, evaluate = [], vcopd.evaluate
    monkeypatch.setattr(vcopd, "evaluate", lambda policy, task, *more: (
        looked.append(next(iter(task.evals))), evaluate(policy, task, *more))[1])
    monkeypatch.setattr(vcopd, "LR_GRID", (0.5, 1.0))
    arguments = options(base, tmp_path / "all", "--compare", "--seeds", "2")
    assert run(arguments) == 0

    assert looked == ["validation"] * 16 + ["in_domain"] * 16  # before and after each run
    columns = columns_of(tmp_path / "all")
    assert list(columns) == ["base", "sft", "rl", "opd", "vcopd"]
    assert all(len(columns[name]) == 2 for name in ("sft", "rl", "opd", "vcopd"))
    for path in (tmp_path / "all").glob("*-s*/metrics.jsonl"):
        assert path.read_text("utf-8").count("\n") == 6
    for path in (tmp_path / "all/tune").glob("*/config.json"):  # a resumed one must look there too
        assert json.loads(path.read_text("utf-8"))["split"] == "validation"
    rates = json.loads((tmp_path / "all" / "table.json").read_text("utf-8"))["lr"]
    for method, rate in rates.items():
        held = json.loads((tmp_path / "all" / f"{method}-s1" / "config.json").read_text("utf-8"))
        assert held["lr"] == rate and held["seed"] == 1 and held["method"] == method

    rewards = [run["in_domain reward"] for run in columns["rl"]]
    *_, line = (line for line in capsys.readouterr().out.splitlines()
                if line.startswith("in_domain reward"))
    assert f"{statistics.mean(rewards):.3f} ±" in line

    monkeypatch.setattr(vcopd, "train", None)  # all of it is there: nothing is trained again
    assert run(arguments) == 0
    assert columns_of(tmp_path / "all") == columns


def test_a_comparison_that_was_cut_short_goes_on(small, base, tmp_path, monkeypatch, capsys):
    """An hour of runs must survive Ctrl-C in one of them, and come out the same."""
    monkeypatch.setattr(vcopd, "ABLATIONS", {"vcopd": {}, "no replay": {"replay_share": 0.0}})
    whole, cut = (options(base, tmp_path / name, "--ablations", "--seeds", "1")
                  for name in ("whole", "cut"))
    assert run(whole) == 0
    step, calls = vcopd.score, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 9:  # in the second run
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(vcopd, "score", interrupted)
    assert run(cut) == 130
    assert run(cut) == 0
    assert run([*cut, "--kl-coef", "0.5"]) == 2  # half a run under other options is none
    for name in ("vcopd-s0", "no replay-s0"):
        assert results(tmp_path / "cut" / name) == results(tmp_path / "whole" / name)
    assert len(calls) == 9 + 4 + 6  # steps 3 to 6 of that run (step 2 was saved), and the last
    for name in ("metrics.jsonl", "report.json"):
        (tmp_path / "cut" / "vcopd-s0" / name).write_text("{", "utf-8")
        capsys.readouterr()
        assert run(cut) == 2
        assert "cannot be used" in one_error(capsys)


def test_every_ablation_changes_one_choice():
    """And to a value that the option accepts."""
    for name, change in vcopd.ABLATIONS.items():
        assert len(change) == (name != "vcopd")
        for option, value in change.items():
            arguments = [vcopd.flag(option), str(value)]
            assert getattr(vcopd.read_config(arguments)[0], option) == value
            assert getattr(vcopd.Config(), option) != value


# =============================================================================================
# --inspect
# =============================================================================================


def inspected(base: Path, *more: str) -> list[str]:
    """A command line that inspects four rollouts."""
    return ["--task", "arithmetic", "--model", str(base), "--inspect", "--prompts", "2",
            "--rollouts", "2", "--max-new-tokens", "6", *more]


def test_inspect_shows_what_a_step_would_credit_and_trains_nothing(
        small, base, tmp_path, monkeypatch, capsys):
    """To look must be safe, beside a run and in any folder; a pipe gets no colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vcopd, "optimizer_step", None)
    assert run(inspected(base)) == 0
    plain = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "\x1b" not in plain
    assert re.search(r"Style is \d+% of the tokens", plain)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(inspected(base)) == 0
    coloured = capsys.readouterr().out
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    for colour, sign in re.findall(r"\x1b\[(\d+)m.{38} *([-+])", coloured):
        assert colour == ("32" if sign == "+" else "31")


# =============================================================================================
# --plot
# =============================================================================================


def plotted(*runs: Path) -> int:
    """What `python vcopd.py --plot RUNS` does, in this process: its exit code."""
    try:
        return vcopd.plot([*map(str, runs)])
    except SystemExit as stop:
        return stop.code


def comparison(folder: Path, methods=("base", "sft", "rl")) -> Path:
    """A folder with the table of a comparison of two seeds, in which every number is another."""
    count = itertools.count()
    columns = {method: [{name: next(count) / 100 for name in (
        "hard_split pass@1", "hard_split pass@k", "out_of_domain pass@1", "general mean",
        "kl_to_base")} for _ in range(1 if method == "base" else 2)] for method in methods}
    folder.mkdir()
    (folder / "table.json").write_text(json.dumps({"columns": columns}))
    return folder


def test_the_picture_is_in_the_first_folder(whole, tmp_path, capsys):
    """And nothing else is changed; where it cannot be written, a sentence says so."""
    pytest.importorskip("matplotlib")
    folders = [shutil.copytree(kept, tmp_path / name) for name, kept in whole.items()]
    before = [{path.name for path in folder.iterdir()} for folder in folders]
    assert plotted(*folders) == 0
    picture = folders[0] / "plot.png"
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    after = [{path.name for path in folder.iterdir()} for folder in folders]
    assert after == [before[0] | {"plot.png"}, before[1]]

    picture.unlink()
    picture.mkdir()
    assert plotted(*folders) == 2
    assert str(picture) in one_error(capsys)
    assert not picture.with_name("plot.png.new").exists()


def test_the_command_draws_and_trains_nothing(tmp_path):
    """In a real process, which has no screen."""
    pytest.importorskip("matplotlib")
    folder = comparison(tmp_path / "all")
    done = subprocess.run([sys.executable, HERE / "vcopd.py", "--plot", folder], timeout=120,
                          capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"The picture is {folder / 'plot.png'}\n")
    assert {path.name for path in tmp_path.rglob("*")} == {"all", "table.json", "plot.png"}


def test_without_matplotlib_a_sentence_says_how_to_get_it(whole, monkeypatch, capsys):
    """It is an extra: nothing else needs it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plotted(whole["vcopd"]) == 2
    assert "--plot needs matplotlib: pip install matplotlib" in one_error(capsys)
    assert not (whole["vcopd"] / "plot.png").exists()


def test_a_folder_that_cannot_be_drawn_is_one_sentence(done, tmp_path, capsys):
    """Missing, no folder, or with a file that is cut, empty, or of another kind."""
    table = comparison(tmp_path / "all")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none", table / "table.json"):
        assert plotted(done, folder) == 2
        assert str(folder) in one_error(capsys)

    damages = [(done / "metrics.jsonl", text) for text in (
        '"step"', "3", '{"step": 1, "kl": null}', '{"step": 1, "kl": 1' + "0" * 400 + "}",
        '{"step": 1, "reward": "high"}', '{"step": 1, "kl"', "[" * 99999)]
    damages += [(table / "table.json", text) for text in (
        "", "[]", "{}", '{"columns": []}', '{"columns": {"base": []}}', "[" * 99999,
        '{"columns": {"base": [{"x pass@1": 1}]}}', '{"columns": {"base": [{"kl_to_base": 1}]}}')]
    for path, text in damages:
        path.write_text(text)
        assert plotted(path.parent) == 2, text[:99]
        assert str(path.parent) in one_error(capsys)
        assert not (path.parent / "plot.png").exists()


# =============================================================================================
# Guards
# =============================================================================================


@pytest.mark.parametrize(("epoch", "saved"), [(0, 3), (1, 2)])
def test_a_loss_that_is_not_finite_stops_with_step_examples_and_a_saved_state(
        epoch, saved, base, whole, small, tmp_path, monkeypatch, capsys):
    """Step 4 fails. Its first epoch leaves the state of step 3, which is saved; its second finds
    the weights changed already, and step 2 stands. Neither takes the step.
    """
    out, losses, nll_loss = tmp_path / "run", [], vcopd.nll_loss

    def bad(*args):
        losses.append(nll_loss(*args))
        return losses[-1] * (math.nan if len(losses) == 1 + 2 * 3 + epoch else 1)

    cfg, _ = vcopd.read_config(options(base, out, "--method", "sft"))
    monkeypatch.setattr(vcopd, "nll_loss", bad)
    assert vcopd.main(cfg, False) == 2
    message = one_error(capsys)
    examples = vcopd.examples_at(tasks.TASKS["arithmetic"](), 3, cfg)
    assert "step 4" in message and all(example.id in message for example in examples)
    assert torch.load(out / "checkpoint/state.pt")["step"] == saved
    monkeypatch.setattr(vcopd, "nll_loss", nll_loss)
    assert run(["--resume", str(out)]) == 0
    assert results(out) == results(whole["sft"])


def test_kl_far_over_budget_and_tied_groups_are_told_after_patience():
    """One bad step is noise; twenty in a row are a wasted night."""
    cfg, good = vcopd.Config(), {"kl": 0.01, "tied_rollouts": 0.5}
    strayed, tied = {"kl": 0.16, "tied_rollouts": 0.5}, {"kl": 0.01, "tied_rollouts": 1.0}
    count = vcopd.PATIENCE
    assert vcopd.warnings_of([strayed, tied] * (count // 2), cfg) == set()
    assert vcopd.warnings_of([tied] * (count - 1), cfg) == set()
    assert vcopd.warnings_of([good, *[tied] * (count - 1)], cfg) == set()
    [warning] = vcopd.warnings_of([strayed] * count, cfg)
    assert "KL" in warning and "--lr" in warning
    [warning] = vcopd.warnings_of([tied] * count, cfg)
    assert "easier or harder problems" in warning
    assert vcopd.warnings_of([tied] * count, replace(cfg, blind=True)) == set()
    assert vcopd.warnings_of([{"nll": 1.0}] * count, replace(cfg, method="sft")) == set()


def test_a_warning_is_given_once(base, small, tmp_path, monkeypatch, capsys):
    """A warning on every line is read by nobody."""
    monkeypatch.setattr(vcopd, "PATIENCE", 2)
    run(options(base, tmp_path / "run", "--kl-budget", "0", "--lr", "0.1"))
    assert capsys.readouterr().out.count("Warning: KL") == 1


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_names_the_knobs_in_order(error, base, small, tmp_path, monkeypatch, capsys):
    """The first costs nothing but time; the last ones change the experiment."""
    def full(*args):
        raise error

    monkeypatch.setattr(vcopd, "score", full)
    assert run(options(base, tmp_path / "run")) == 2
    message = one_error(capsys)
    knobs = ["--micro-tokens", "--prompts", "--max-new-tokens", "--rollouts", "--lora-rank"]
    assert sorted(knobs, key=message.index) == knobs
    monkeypatch.undo()
    cfg, _ = vcopd.read_config(["--resume", str(tmp_path / "run"), "--micro-tokens", "64"])
    assert cfg.micro_tokens == 64


def test_a_defect_is_not_dressed_up_as_a_users_mistake(base, small, tmp_path, monkeypatch):
    """A traceback is the right answer to a bug of ours."""
    monkeypatch.setattr(vcopd, "score", None)
    with pytest.raises(TypeError):
        run(options(base, tmp_path / "run"))


def fill_disk(fd: int) -> None:
    """No byte more."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("nth", [1, 4, 6, 8, 15, 20])
def test_a_full_disk_stops_with_one_sentence_and_loses_nothing(
        nth, base, whole, small, tmp_path, monkeypatch, capsys):
    """In config, first checkpoint, a line of metrics, a later checkpoint, adapter, report."""
    capsys.readouterr()
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FailingSync(nth, fill_disk))
        assert run(options(base, out)) == 2
    assert "No space left" in one_error(capsys)
    assert not list(out.glob("**/*.new"))
    again = ["--resume", str(out)] if (out / "config.json").exists() else options(base, out)
    assert run(again) == 0
    assert results(out) == results(whole["vcopd"])


# =============================================================================================
# Bad input: one sentence, exit code 2
# =============================================================================================


def edit_row(**changes) -> str:
    """A line of --data, with changes."""
    row = {"id": "a", "buggy": "def f(x):\n    return x", "entry_point": "f",
           "reference": "def f(x):\n    return x + 1", "tests": [{"args": [1], "expected": 2}]}
    return json.dumps({**row, **changes})


def bad_commands(base: Path, folder: Path) -> list[list[str]]:
    """Command lines of which none can work."""
    flags = {vcopd.flag(f.name): (type(f.default), f.metadata["choices"])
             for f in vcopd.fields(vcopd.Config) if f.metadata}
    numbers = [flag for flag, (kind, _) in flags.items() if kind in (int, float)]
    values = ["nan", "inf", "-inf", "-1", "1e999", "", "x", "1_0_", "0x10", "\u0663x", "9" * 5000]
    lines = [[flag, value] for flag in numbers for value in values]
    lines += [[flag, "no\nsuch"] for flag, (_, choices) in flags.items() if choices]
    lines += [[flag] for flag, (kind, _) in flags.items() if kind is not bool]
    lines += [["--stesp", "3"], ["extra"], ["--unsafe-judge", "yes"], ["--resume"],
              ["--method", "rl", "--teacher-coef", "1"], ["--task", "arithmetic", "--data", "x"]]
    (folder / "file").write_text("x")
    lines += [["--resume", str(path)] for path in (folder, folder / "no", folder / "file")]
    return lines


def test_a_bad_command_line_is_one_sentence(base, tmp_path, capsys):
    """Some 200 of them: every number out of range, every choice, every missing value."""
    lines = bad_commands(base, tmp_path)
    assert len(lines) >= 200
    for line in lines:
        with pytest.raises(SystemExit) as stop:
            vcopd.read_config(line)
        assert stop.value.code == 2, line
        assert one_error(capsys), line


def edits_file(folder: Path, *rows: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows), "utf-8")
    return path


HOPELESS = edit_row(id="b", tests=[{"args": [1], "expected": 9}])  # its own reference fails


def test_a_row_that_nobody_can_pass_stops_the_run_or_is_left_out_and_told(base, tmp_path, capsys):
    """Before anything is trained: such a row would teach nothing for hours."""
    path = edits_file(tmp_path, edit_row(), HOPELESS)
    line = ["--data", path, "--max-new-tokens", "90", "--teacher", "none"]
    command = [*options(base, tmp_path / "run", "--task", "codeedit"), *map(str, line)]
    assert run(command) == 2
    assert f'{path} line 2: id "b": its reference must pass' in capsys.readouterr().err
    assert run([*command, "--skip-bad-rows", "--eval-only"]) == 2  # trains nothing: no --data
    assert run([*command, "--skip-bad-rows", "--steps", "1"]) == 0
    assert "1 rows work, 1 are left out" in capsys.readouterr().out


def test_check_tells_what_one_needs_before_training(base, tmp_path, capsys):
    path = edits_file(tmp_path, edit_row(), HOPELESS, "{")
    command = ["--task", "codeedit", "--check", "--model", str(base), "--data", str(path),
               "--max-new-tokens", "6", "--eval-problems", "2", "--rollouts", "2"]
    assert run(command) == 2 and run([*command, "--skip-bad-rows"]) == 0
    told = capsys.readouterr().out
    for part in (f"{path}: 1 rows work, 2 are left out", 'line 2: id "b": its reference must pass',
                 "line 3: expected a JSON object", "longest prompt, of a, has",
                 "references are longer than --max-new-tokens 6", "0% of 2 answers are well-formed",
                 "the base solves 1 never, 0 sometimes"):
        assert part in told
    assert not (tmp_path / "runs").exists()


def test_a_prompt_or_reference_that_does_not_fit_is_told_by_its_id(base, tmp_path, capsys):
    long = "def f(x):\n" + "    x = x - 1\n" * 300 + "    return x"
    path = edits_file(tmp_path, edit_row(id="far", buggy=long))
    command = [*options(base, tmp_path / "run", "--task", "codeedit"), "--data", str(path)]
    assert run(command) == 2
    told = capsys.readouterr()
    assert "longest prompt, of far, has" in told.err and "--max-new-tokens" in told.err
    path = edits_file(tmp_path, edit_row())
    assert run([*command, "--steps", "1"]) == 0
    assert "references are longer than --max-new-tokens 6; the longest, " in capsys.readouterr().out


def test_reinforcement_learning_from_one_answer_is_refused(capsys):
    """Its advantage is always 0."""
    for more in (["--method", "rl"], ["--teacher", "none"]):
        with pytest.raises(SystemExit):
            vcopd.read_config(["--rollouts", "1", *more])
        assert "--rollouts 1" in capsys.readouterr().err
    assert vcopd.read_config(["--rollouts", "1"])[0].rollouts == 1  # hints remain


def bad_data() -> list[bytes]:
    """Files that hold no problems."""
    good = edit_row().encode()
    texts = [edit_row(**{name: value}) for name in ("id", "buggy", "reference", "entry_point",
                                                    "tests", "instruction")
             for value in (None, 3, [], {}, "", "\0", "\ud800", [[]], True, [{"args": 1}])]
    deep = []
    for _ in range(150):
        deep = [deep]
    texts += [edit_row(tests=[{"args": [deep], "expected": 1}]), "[" * 99999, "null", "3", "[]",
              edit_row(buggy="def f(:"), edit_row(entry_point="g"), edit_row(test_code="x"),
              edit_row(tests=[{"args": [1]}]), edit_row(tests=[{"args": [1], "expected": 1e999}])
              .replace("Infinity", "NaN"), f"{edit_row()}\n{edit_row()}", '{"id": 1' + "0" * 5000]
    return [b"", b"\n\n", b"\xff\xfe", good[:-1], good + b"\n" + good[:40], good + b"x", b"\0" * 99,
            b"PK\x03\x04", *(text.encode() for text in texts)]


def test_a_bad_data_file_is_one_sentence(base, tmp_path, capsys):
    """With file and line; before any model is loaded, let alone trained."""
    path = tmp_path / "data.jsonl"
    files = bad_data()
    for data in files:
        path.write_bytes(data)
        with pytest.raises(tasks.LoadError) as error:
            tasks.load_edits(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value), data[:200]
    assert len(files) >= 60
    assert run(["--data", str(path), "--model", str(base), "--out", str(tmp_path / "o")]) == 2
    assert str(path) in one_error(capsys)


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_file(
        base, small, tmp_path, capsys):
    """Permissions would do the same, but root has them all."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    for more in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "file/run")],
                 ["--out", str(tmp_path / "run")],
                 ["--task", "codeedit", "--data", str(tmp_path)],
                 ["--task", "codeedit", "--eval-data", str(tmp_path / "none")],
                 ["--benchmark", str(tmp_path / "file")]):
        assert run(options(base, tmp_path / "new", *more)) == 2
        message = one_error(capsys)
        assert str(tmp_path) in message and "Errno" not in message.replace("[Errno 2", "")


def damaged_bases(base: Path, folder: Path) -> list[Path]:
    """Copies of the model folder: each lacks one file, or has it cut, emptied or of another kind"""
    copies = []
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        data = (base / name).read_bytes()
        for damage in (None, b"", b"[]", b"\xff" * 99, data[:len(data) // 2]):
            copies.append(folder / f"base{len(copies)}")
            copies[-1].mkdir()
            for path in base.iterdir():
                (copies[-1] / path.name).write_bytes(path.read_bytes())
            if damage is None:
                (copies[-1] / name).unlink()
            else:
                (copies[-1] / name).write_bytes(damage)
    return copies


def test_a_damaged_model_folder_is_one_sentence(base, small, tmp_path, capsys):
    """The libraries raise a dozen kinds of error at them."""
    wrong = [*damaged_bases(base, tmp_path), tmp_path / "none", tmp_path]
    for folder in wrong:
        assert run(options(folder, tmp_path / "out")) == 2, folder
        assert str(folder) in one_error(capsys)


def test_a_damaged_run_folder_is_one_sentence(done, capsys):
    """Config, metrics and checkpoints: cut, empty, of another kind, of another run."""
    out = done
    (out / "report.json").unlink()
    config = json.loads((out / "config.json").read_text("utf-8"))
    configs = [b"", b"{}", b"[]", b"nul", b"\xff", b"[" * 99999, json.dumps(config)[:-9].encode()]
    for name, value in asdict(vcopd.Config()).items():
        bad = {"steps": "4"}.get(name, [] if isinstance(value, str) else "x")
        configs.append(json.dumps({**config, name: bad}).encode())
        configs.append(json.dumps({k: v for k, v in config.items() if k != name}).encode())
    configs += [json.dumps({**config, "lr": math.nan}).encode()]
    damages = [("config.json", data) for data in configs]
    damages += [("metrics.jsonl", data) for data in (b"", b"{}\n", b"\xff\n")]
    whole = (out / "checkpoint/state.pt").read_bytes()
    damages += [("checkpoint/state.pt", data) for data in (whole[:-20], b"", b"{}")]
    for name, data in damages:
        kept = (out / name).read_bytes()
        (out / name).write_bytes(data)
        assert run(["--resume", str(out)]) == 2, (name, data[:200])
        assert str(out) in one_error(capsys)
        (out / name).write_bytes(kept)
    assert run(["--resume", str(out)]) == 0  # all of it could be mended


def test_a_checkpoint_of_another_model_is_refused(done, capsys):
    """Adapters of the same names and other sizes must not be loaded in part."""
    (done / "report.json").unlink()
    config = json.loads((done / "config.json").read_text("utf-8"))
    (done / "config.json").write_text(json.dumps({**config, "lora_rank": 3}))
    assert run(["--resume", str(done)]) == 2
    assert "cannot be used" in one_error(capsys)


def test_random_bytes_in_any_input_never_end_in_a_traceback(base, small, tmp_path, capsys):
    """200 mutations of good files and commands: each is used as it is, or refused in a line."""
    rng, out = random.Random(0), tmp_path / "run"
    good = "\n".join(edit_row(id=str(i)) for i in range(3)).encode()
    config = json.dumps(asdict(vcopd.Config())).encode()
    out.mkdir()
    for _ in range(200):
        data = bytearray(rng.choice([good, config]))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at:at + rng.choice([0, 1, 30])] = rng.choice(
                [b"", b"\0", b'"', b"}", b"[[", b"1e9", b"\xff", b"null", rng.randbytes(3)])
        (out / "config.json").write_bytes(data)
        with contextlib.suppress(SystemExit):
            vcopd.read_config(["--resume", str(out)])
        with contextlib.suppress(tasks.LoadError):
            tasks.load_edits(str(out / "config.json"))
        assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("arguments", [["--lr", "nan"], ["--resume", "/no/such/run"]])
def test_usage_errors_are_one_line_in_a_real_process(arguments):
    """Nothing of it is lost in what the libraries print."""
    done = subprocess.run([sys.executable, HERE / "vcopd.py", *arguments], capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# =============================================================================================
# Several processes
# =============================================================================================


def as_rank(number: int, count: int, meeting: Path, function, *args) -> int:
    """Play one rank of a gloo group, in a child."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number,
                            world_size=count)
    function(*args)
    return 0


def on_two_ranks(meeting: Path, function, *args) -> None:
    """Run it on two ranks, each in its own process."""
    first = os.fork()
    if first == 0:
        status = in_child(as_rank, 0, 2, meeting, function, *args)
        os._exit(status != 0)
    assert in_child(as_rank, 1, 2, meeting, function, *args) == 0
    assert os.waitpid(first, 0)[1] == 0


def whole_run(arguments: list[str], out: Path) -> None:
    """A run as one rank; what must be the same everywhere is kept."""
    cfg, resuming = vcopd.read_config(arguments)
    loaded, load_policy = [], vcopd.load_policy
    vcopd.load_policy = lambda *args: loaded.append(load_policy(*args)) or loaded[-1]
    vcopd.run(cfg, resuming, vcopd.load_task(cfg)[0])
    weights = adapter_weights(loaded[0].model)
    torch.save(weights, out / f"weights-{vcopd.rank()}.pt")


@pytest.mark.parametrize("method", ["vcopd", "sft"])
def test_a_run_on_two_ranks_writes_once_keeps_equal_weights_and_resumes(
        method, base, small, tmp_path):
    """With Step 1, replay and evaluation; every step's reward is that of all the rollouts."""
    out = tmp_path / "run"
    out.mkdir()
    more = ["--method", method, "--format-threshold", "1", "--format-examples", "5"]
    on_two_ranks(tmp_path / "meet", whole_run, options(base, out, *more), tmp_path)
    weights = [torch.load(tmp_path / f"weights-{number}.pt") for number in range(2)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert method == "sft" or all(line["reward"] in (-1, -0.5, 0, 0.5, 1) for line in lines)
    kept = results(out)
    (out / "report.json").unlink()
    on_two_ranks(tmp_path / "meet again", whole_run, ["--resume", str(out)], tmp_path)
    assert results(out) == kept


@pytest.mark.parametrize(("more", "said"), [
    (["--prompts", "3"], "--prompts 3 must be a multiple"),
    (["--device", "cuda:1"], "cuda or cpu")])
def test_what_two_processes_cannot_share_is_told_before_they_meet(
        more, said, base, tmp_path, monkeypatch, capsys):
    """Unequal shares would weigh some prompts more; one device cannot be two."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run(options(base, tmp_path / "run", *more)) == 2
    assert said in one_error(capsys)


def test_torchrun_meets_and_speaks_with_one_voice(base, tmp_path):
    """The real launcher; what is printed and written is rank 0's."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         HERE / "vcopd.py", *options(base, tmp_path / "run", "--steps", "1")],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Verdict:") == 1
    assert (tmp_path / "run/metrics.jsonl").read_text("utf-8").count("\n") == 1


BUGGY = '''\
def total(items, start):
    """Sum of the items, plus start."""
    result = start
    for item in items:
        result -= item
    return result'''
FIXED = BUGGY.replace("-=", "+=")
TESTS = ((([1, 2], 0), 3), (([], 5), 5))


def sum_problem() -> tasks.Example:
    return tasks.edit_example("sum", BUGGY, FIXED, "total", TESTS)


# =============================================================================================
# The judge: what hostile candidates try, by group, and what must be left of it
# =============================================================================================

ADDITION = [([2, 3], 5), ([10, -4], 6), ([0, 0], 0), ([-7, 7], 0), ([1, 10**30], 10**30 + 1)]
HONEST = "def f(a, b):\n    return a + b\n"
ADDING_SCRIPT = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(10, -4) == 6
    assert candidate(0, 0) == 0
"""


@functools.cache
def sandboxed() -> bool:
    return "seccomp" in tasks.judge_layers()


def word(outcome: tasks.Outcome) -> str:
    """'' for a pass, else why not: short to compare with."""
    assert outcome.passed is (outcome.reason == "ok")
    return "" if outcome.passed else outcome.reason


def run_tests(*job) -> str:
    if not sandboxed():
        pytest.skip("this machine has no seccomp filter")
    return word(tasks.run_tests(*job))


def verdict(code: str, seconds: float = 0.5) -> str:
    """The reason why `code` is not an addition; attacks cost at most `seconds`."""
    return run_tests(code, "f", ADDITION, False, seconds)


def script_verdict(code: str, script: str = ADDING_SCRIPT) -> str:
    if not sandboxed():
        pytest.skip("this machine has no seccomp filter")
    return word(tasks.run_script(code, "f", script, seconds=0.5))


def value_verdict(body: str, expected: object, from_json: bool = False) -> str:
    """Whether `f`, with no arguments and this body, returns `expected`."""
    return run_tests(f"def f():\n    {body}\n", "f", [([], expected)], from_json)


def descendants() -> list[str]:
    """`ps` lines of all processes below this one, but for `ps` itself."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True)
    rows = [line.split(None, 3) for line in lines.stdout.splitlines()[1:]]
    family = {str(os.getpid())}
    for _ in range(4):
        family |= {row[0] for row in rows if row[1] in family}
    return [" ".join(row) for row in rows if row[1] in family and row[3:4] != ["ps"]]


def assert_unharmed() -> None:
    """Only servers are left below us (at most two processes per core), no zombie, and an honest
    check passes on each of them."""
    left = [row for row in descendants() if "ps -eo" not in row]
    assert len(left) <= 2 * tasks.pool().maxsize, left
    assert not [row for row in left if row.split()[2].startswith("Z")], left
    with ThreadPoolExecutor(tasks.pool().maxsize) as threads:
        assert set(threads.map(verdict, [HONEST] * 4)) == {""}


# Honest code


@pytest.mark.parametrize(
    "expected",
    [
        None,
        True,
        -(7**9000),
        0.1 + 0.2,
        -0.0,
        math.inf,
        1e-320,
        2 - 3j,
        b"\x00\xff",
        "snow \u2603 \U0001f600 \ud800",
        [],
        (1, [2, (3,)], {4: {5}}),
        {3, "a", (1, 2), frozenset({1})},
        {1: "one", None: [], (2, 3): {"x": 1.5}},
        {},
        set(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_builtin_value_survives_the_journey_both_ways(expected):
    """Arguments go in and come back unchanged: digits, order, types, surrogates."""
    assert run_tests("def f(x):\n    return x\n", "f", [([expected], expected)]) == ""


@pytest.mark.parametrize(
    "body, expected, from_json, reason",
    [
        ("return 0.3", 0.1 + 0.2, False, ""),
        ("return 0.0", -0.0, False, ""),
        ("return 0.30001", 0.1 + 0.2, False, "test 1: wrong value"),
        ("return 5.0", 5, False, "test 1: wrong value"),
        ("return 5.0", 5, True, ""),
        ("return 5", 5.0, True, ""),
        ("return True", 1, True, "test 1: wrong value"),
        ("return (1, 2)", [1, 2], False, "test 1: wrong value"),
        ("return (1, (2,))", [1, [2]], True, ""),
        ("return {'b': 1, 'a': 2}", {"a": 2, "b": 1}, False, ""),
        ("return {1, 2, 300, 'x'}", {300, "x", 2, 1}, False, ""),
        ("return {1: 1}", {1: True}, False, "test 1: wrong value"),
        ("return [1]", [1, 2], False, "test 1: wrong value"),
        ("return 'None'", None, False, "test 1: wrong value"),
    ],
)
def test_values_are_compared_by_exact_type_and_floats_by_closeness(
    body, expected, from_json, reason
):
    """JSON has no tuples, so only data from JSON lets a tuple stand for a list."""
    assert value_verdict(body, expected, from_json) == reason


def test_dictionaries_keep_their_order_on_the_way_in():
    """Honest code may depend on the order of keys."""
    tests = [([{"z": 1, "a": 2, "m": 3}], ["z", "a", "m"])]
    assert run_tests("def f(d):\n    return list(d)\n", "f", tests) == ""


def test_usual_imports_work_though_no_file_can_be_opened():
    """Functions import lazily, and md5 or strptime load more on first use."""
    code = """
from typing import List, Optional
import math, collections, re, itertools, functools, heapq, bisect, string, statistics, random
import fractions, decimal, datetime, copy, operator, hashlib, unicodedata, json
def f(a, b):
    import time, textwrap
    hashlib.md5("x".encode("ascii")).hexdigest(), random.random(), time.time()
    datetime.datetime.strptime("2020-01-02", "%Y-%m-%d"), "\\N{SNOWMAN}"
    return int(decimal.Decimal(a) + fractions.Fraction(0) * 1.0 == -1) or a + b
"""
    assert verdict(code.replace("decimal.Decimal(a) + fractions.Fraction(0) * 1.0", "-2")) == ""


def test_threads_share_the_servers_and_get_their_own_verdicts():
    """The trainer judges a batch from a thread pool."""
    codes = [HONEST, HONEST.replace("+", "-"), "def f(a, b): raise KeyError", "x ="] * 6
    want = ["", "test 1: wrong value", "test 1: error: KeyError", "error: syntax error"] * 6
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(verdict, codes)) == want


# A: leaving early


@pytest.mark.parametrize(
    "line",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import unittest; raise unittest.SkipTest('later')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.close(3)",
        "import atexit; atexit.register(print); return 0",
        "import ctypes; ctypes.string_at(0)",
        "raise GeneratorExit",
        "raise StopIteration",
    ],
)
@pytest.mark.parametrize("judged_by", [verdict, script_verdict])
def test_leaving_early_is_a_failure(line, judged_by):
    """Exit code 0 and silence mean nothing; only values count. Also while loading."""
    assert judged_by(f"def f(a, b):\n    {line}\n")
    assert judged_by(f"def f(a, b):\n    return 0\n{line.replace('return 0', 'pass')}\n")


# B: lying objects


@pytest.mark.parametrize(
    "value",
    [
        "Liar()",
        "Sub(a - b - 1)",
        "[Sub(a + b)]",
        "type('int', (), {'__class__': int, '__eq__': lambda s, o: True})()",
        "mock.ANY",
        "float('nan')",
        "Fraction(a + b)",
        "(a + b for _ in range(1))",
        "itertools.count()",
        "type('D', (dict,), {})()",
        "True",
        "str(a + b)",
        "float(a + b)",
    ],
)
@pytest.mark.parametrize("judged_by", [verdict, script_verdict])
def test_objects_that_claim_equality_are_not_believed(value, judged_by):
    """Values are rebuilt from exact builtin types, so no method of theirs ever runs here: a number
    that lies is the number it holds. (Scripts compare by ==, to which 5.0 is 5.)"""
    code = f"""
import itertools
from fractions import Fraction
class Liar:
    def __eq__(self, other): return True
    def __repr__(self): return "5"
    __hash__ = None
class Sub(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
class mock:
    ANY = Liar()
def f(a, b):
    return {value}
"""
    if judged_by is verdict or "float(a" not in value:
        assert judged_by(code)


def test_nan_equals_nothing_and_a_truth_value_is_no_number():
    """Neither where expected, nor nested."""
    assert value_verdict("return float('nan')", math.nan) == "test 1: wrong value"
    assert value_verdict("return [float('nan')]", [math.nan]) == "test 1: wrong value"
    assert value_verdict("return [True]", [1]) == "test 1: wrong value"
    assert value_verdict("return 1", True) == "test 1: wrong value"


# C: patching the judge


@pytest.mark.parametrize(
    "patch",
    [
        "builtins.len = lambda x: 0",
        "builtins.isinstance = lambda *a: True",
        "builtins.type = lambda x: int",
        "builtins.all = lambda x: True",
        "json.dumps = lambda *a, **k: '\"\"'",
        "json.loads = lambda *a, **k: []",
        "math.isclose = lambda *a, **k: True",
        "sys.settrace(lambda *a: None)",
        "sys.modules.clear()",
        "sys.modules['json'] = sys.modules['math'] = None",
        "sys.excepthook = lambda *a: os._exit(0)",
        "builtins.AssertionError = builtins.Exception = SystemExit",
        "sys._getframe(2).f_globals.update(encode=lambda v, d=0: '', fail=print)",
        "sys._getframe(2).f_globals['line_of'] = lambda m: b'[\"passed\"]\\n'",
    ],
)
@pytest.mark.parametrize("judged_by", [verdict, script_verdict])
def test_patching_whatever_is_in_reach_changes_no_verdict(patch, judged_by):
    """A candidate owns its process, but neither comparison nor expected values are in it."""
    code = f"import builtins, json, math, os, sys\n{patch}\ndef f(a, b):\n    return 0\n"
    assert judged_by(code)
    assert judged_by(HONEST) == ""


# D: reading answers


PEEK = """
import gc, sys
def everything():
    frame, found = sys._getframe(), []
    while frame:
        found += [frame.f_locals, frame.f_globals, frame.f_code.co_consts, frame.f_code.co_names]
        frame = frame.f_back
    return repr(found) + repr(gc.get_objects())
def f(needle):
    text = everything()
    return needle[::-1] in text
"""


@pytest.mark.parametrize(
    "needle, found",
    [
        ("answer_calls", True),
        ("6480297", False),
        ("run_tests", False),
        ("without_idle", False),
        ("a-siblings-answer", False),
        ("a-siblings-argument", False),
    ],
)
def test_no_answer_trace_or_task_is_in_a_candidates_memory(needle, found):
    """Expected values never go in, no server ever held a job, and its program is not the trusted
    part of this file. The needle comes in backwards, to be found only if it was there."""
    sibling = "def f(x):\n    return 'a-siblings-answer'\n"
    for _ in range(2 * tasks.pool().maxsize):
        assert run_tests(sibling, "f", [(["a-siblings-argument"], 6480297)])
    tests = [([needle[::-1]], found), ([needle[::-1]], 6480297)]
    assert run_tests(PEEK, "f", tests) == "test 2: wrong value"


def test_the_servers_program_is_no_task_verifier_or_judge(monkeypatch):
    """It is cut out of tasks.py, so it must be seen to be the right piece; also if a task is added
    at the end."""
    own = {getattr(node, "name", "") for node in ast.parse(tasks.server_program()).body}
    trusted = {"Example", "privileged_prompt", "sum_example", "verify_edit", "without_idle",
               "web_document", "load_edits", "run_tests", "same_value", "Server", "server_program"}
    assert {"serve", "confine", "examine", "encode", "line_of"} <= own
    assert not own & trusted and trusted <= vars(tasks).keys()
    program = tasks.server_program()
    longer = tasks.THIS_FILE + "\n# ====\n# Mine\n# ====\nTASKS[0] = 1\n"
    monkeypatch.setattr(tasks, "THIS_FILE", longer)
    assert tasks.server_program() == program and tasks.EDIT_PROMPT not in program


def test_environment_and_arguments_are_empty():
    """But for the locale that Python sets for itself, and the hash seed that makes verdicts on
    answers that depend on the order of a set repeatable."""
    body = """import os, sys
    known = {'LC_CTYPE', 'PYTHONHASHSEED'}
    return [set(os.environ) <= known, sys.flags.hash_randomization, sys.argv]"""
    assert value_verdict(body, [True, 0, ["-c"]]) == ""


@pytest.mark.parametrize(
    "body",
    [
        "return open('/proc/self/cmdline').read()",
        "return os.listdir('/')",
        "return os.open('/proc/self/fd', os.O_RDONLY)",
        "return open(VICTIM).read()",
        "import ctypes",
        "return os.readlink('/proc/self/exe')",
        "import __main__",
        "os.lseek(0, 0, 0); return [os.read(fd, 9) for fd in range(4, 64)]",
    ],
)
def test_files_and_inherited_descriptors_are_out_of_reach(body, tmp_path):
    victim = tmp_path / "answers.txt"
    victim.write_text("5 6 0")
    code = f"import os\nVICTIM = {str(victim)!r}\ndef f(a, b):\n    {body}\n"
    assert verdict(code) in {
        "test 1: error: PermissionError",
        "test 1: error: ModuleNotFoundError",
        "test 1: error: OSError",
    }
    assert victim.read_text() == "5 6 0"
    assert_unharmed()


# E: forging the channel


FORGERIES = [
    'b"true\\n"',
    "b'\"\"\\n'",
    "b'[]\\n'",
    "b'null'",
    "b'[\"passed\"]\\n'",
    'b\'[["value", ["int", "0x5"]]]\\n\'',
    'b\'[["fault", true]]\\n\'',
    'b\'[["fault", ""]]\\n\'',
    'b\'[["fault", ["passed"]]]\\n\'',
    'b\'[["value", ["int", 5]]]\\n\'',
    'b\'[["value", {"int": "0x5"}]]\\n\'',
    "b'[' * 500_000",
    "b'[' * 900 + b']' * 900",
    "b'9' * 500_000",
    "b'\\xff\\xfe\\x00\\n'",
    "b'\"\\\\ud800\"\\n'",
    "b'\\x00\\x00\\x00\\x04true'",
    "b'[]\\n' * 100_000",
]


@pytest.mark.parametrize("line", FORGERIES, ids=lambda line: line[:30])
@pytest.mark.parametrize("judged_by", [verdict, script_verdict])
@pytest.mark.parametrize("when", ["load", "call"])
def test_messages_a_candidate_writes_itself_are_never_a_pass(line, judged_by, when):
    """On every descriptor, before or during the first call, leaving right after."""
    shout = f"""
import os
def shout():
    for fd in range(8):
        try: os.write(fd, {line})
        except OSError: pass
    os._exit(0)
"""
    load = "shout()\n" if when == "load" else ""
    assert judged_by(f"{shout}{load}def f(a, b):\n    shout()\n")


def test_a_channel_that_forged_messages_is_not_reused():
    """Each candidate has its own socket, so leftovers cannot reach the next."""
    assert_unharmed()


# F: resources


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(9)",
        "import _thread; x = _thread.allocate_lock(); x.acquire(); x.acquire()",
        "import os; os.read(3, 1); os.read(3, 1)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGXCPU, print)\n"
        "    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass",
        "x = []\n    while True: x.append(bytearray(10**7))",
        "return 9 ** 9 ** 9",
        "return f(a, b)",
        "sys.setrecursionlimit(10**9)\n    return f(a, b)",
        "return 'x' * 50_000_000",
        "return [0] * 3_000_000",
        "while True: print('x' * 10_000)",
        "import re; return re.match('(a+)+$', 'a' * 40 + 'b')",
        "x = D()",
        "x = []; x.append(x); return x",
        "x = []\n    for _ in range(90): x = [x, x]\n    return x",
        "x = 1\n    for _ in range(100_000): x = [x]\n    return x",
        "while True: os.write(3, b'x' * 65536)",
        "while True:\n        os.write(3, b'x')\n        for _ in range(3000): pass",
        "return {i * (2**61 - 1) for i in range(20_000)}",
    ],
)
def test_hogs_fail_within_their_limit(body):
    """A wall limit, one retry alone for those that used little CPU, and nothing left running."""
    head = "import os, signal, sys\nclass D:\n    def __del__(self):\n        while True: pass\n"
    start = time.monotonic()
    assert verdict(f"{head}def f(a, b):\n    {body}\n", seconds=0.3)
    assert time.monotonic() - start < 5
    assert_unharmed()


@pytest.mark.parametrize(
    "code",
    ["x = " + "(" * 50_000, "x = " + "-" * 200_000 + "1", "x = " + "+".join(["1"] * 100_000)],
    ids=["parentheses", "minus signs", "sum"],
)
def test_parser_bombs_go_off_in_the_sandbox(code):
    assert verdict(f"{code}\n{HONEST}")
    assert tasks.parse_python(f"{code}\n{HONEST}") is None
    assert_unharmed()


def test_a_large_reply_says_so():
    assert verdict("def f(a, b):\n    return 'x' * 1_100_000\n", 2.0) == "error: too much output"
    assert verdict("def f(a, b):\n    return 'x' * 10**10\n", 2.0) == "test 1: error: MemoryError"


# G: the system


@pytest.mark.parametrize(
    "body",
    [
        "open(VICTIM, 'w').write('x')",
        "open(VICTIM + '.new', 'w').write('x')",
        "os.unlink(VICTIM)",
        "os.rename(VICTIM, VICTIM + '.old')",
        "os.mkdir(VICTIM + '.d')",
        "os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['touch', VICTIM + '.new'])",
        "os.system('touch ' + VICTIM + '.new'); raise OSError",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
        "import socket; socket.socketpair()",
        "os.kill(os.getppid(), 9)",
        "os.kill(TRAINER, 19)",
        "os.killpg(0, 9)",
        "os.kill(-1, 9)",
        "os.setsid(); os.nice(-5); os.chroot('/')",
    ],
)
def test_the_system_is_out_of_reach(body, tmp_path):
    """Nothing is written, deleted, started, reached or signalled."""
    victim = tmp_path / "victim"
    victim.write_text("intact")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names = f"VICTIM, PORT, TRAINER = {str(victim)!r}, {listener.getsockname()[1]}, "
        code = f"import os\n{names}{os.getpid()}\ndef f(a, b):\n    {body}\n    return a + b\n"
        assert verdict(code)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert os.listdir(tmp_path) == ["victim"] and victim.read_text() == "intact"
    assert_unharmed()


def test_the_filter_reaches_those_who_dig_up_the_c_library():
    """The program's own ctypes is found through the frames; every call it makes is filtered."""
    body = """
    frame = sys._getframe()
    while 'libc' not in frame.f_globals: frame = frame.f_back
    c = frame.f_globals['libc']()
    return [c.fork(), c.socket(1, 1, 0), c.open(b'/etc/passwd', 0), c.kill(1, 9), c.fcntl(3, 8, 1)]
"""
    assert run_tests(f"import sys\ndef f():{body}", "f", [([], [-1] * 5)]) == ""
    assert_unharmed()


# H: state and arguments


@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n    x.append(1)\n    return x\n",
        "def f(x, seen=[]):\n    seen.append(1)\n    return [] if len(seen) == 1 else x\n",
        "n = 0\ndef f(x):\n    global n\n    n += 1\n    return [[], [1], [1, 2]][n % 3]\n",
        "import gc\ndef f(x):\n    return gc.get_referrers(x)[0]\n",
    ],
    ids=["mutates its argument", "default list", "call counter", "referrers"],
)
def test_state_between_calls_does_not_help(code):
    same = [([[]], []), ([[1]], [1]), ([[1, 2]], [1, 2]), ([[]], [])]
    assert run_tests(code, "f", same)
    assert_unharmed()


def test_each_call_gets_fresh_arguments_and_ours_stay_as_they_are():
    """Clearing what it was given harms neither other tests nor the trainer's own data."""
    shared = [3, 1, 2]
    tests = [([shared], [1, 2, 3]), ([shared], [1, 2, 3]), ([shared], [1, 2, 3])]
    code = "def f(x):\n    x.sort()\n    y = x[:]\n    x.clear()\n    return y\n"
    assert run_tests(code, "f", tests) == ""
    assert shared == [3, 1, 2]


def test_a_value_returned_twice_is_read_when_it_is_returned():
    """Later calls cannot correct an earlier answer."""
    code = "out = []\ndef f(x):\n    out.append(x)\n    return out\n"
    assert run_tests(code, "f", [([1], [1, 2]), ([2], [1, 2])])


@pytest.mark.parametrize(
    "poison",
    [
        "import builtins; builtins.len = lambda x: 5",
        "import math; math.pi = 3; math.floor = None",
        "import sys; sys.setrecursionlimit(60)",
        "import random; random.seed = random.random = None",
        "import gc; gc.disable(); gc.set_threshold(1)",
    ],
)
def test_one_candidate_cannot_poison_the_next(poison):
    """Every candidate is a fresh fork of a server that ran nobody's code."""
    for _ in range(2 * tasks.pool().maxsize):
        assert verdict(f"{poison}\ndef f(a, b): return None\n")
    code = "import math, random\nrandom.random()\n"
    assert verdict(code + "def f(a, b): return math.floor(a + b + len([]))\n") == ""
    assert_unharmed()


def test_the_same_code_gets_the_same_order_and_the_same_random_numbers():
    """A resumed run must see the verdicts of the first."""
    code = "import random\nx = [random.random()]\ndef f(i):\n    x.append(i)\n    return x\n"
    reply = [run_tests(code, "f", [([i], [0.5]) for i in range(5)]) for _ in range(2)]
    assert reply == ["test 1: wrong value"] * 2
    job = tasks.line_of(["candidate", code, "f"]) + b'[["f", ["list", true]]]\n'
    first, again = (tasks.run_job(job, 1.0, 1) for _ in range(2))
    assert first == again and first[0][0][0] == "value"


# I: the contract


@pytest.mark.parametrize(
    "code, reason",
    [
        ("", "error: no function f"),
        ("def g(a, b):\n    return a + b\n", "error: no function f"),
        ("f = 5\n", "error: no function f"),
        ("def f(a, b:\n", "error: syntax error"),
        ("def f(a, b):\n    return a + b\0\n", "error: syntax error"),
        ("# \ud800\n" + HONEST, "error: syntax error"),
        ("\ufeff" + HONEST, "error: syntax error"),
        (HONEST.replace("f(", "\u0192("), "error: no function f"),
        ("```python\n" + HONEST + "```\n```python\n" + HONEST + "```\n", "error: syntax error"),
        ("raise ValueError\n" + HONEST, "error: ValueError"),
        ("def f(a):\n    return a\n", "test 1: error: TypeError"),
        ("async def f(a, b):\n    return a + b\n", "test 1: error: cannot send this coroutine"),
        ("def f(a, b):\n    return a + b if a != 10 else 0\n", "test 2: wrong value"),
        ("def f(a, b):\n    return f\n", "test 1: error: cannot send this function"),
        ("def f(a, b):\n    raise type('a b\\n' * 99, (Exception,), {})\n",
         "test 1: error: undecodable result"),
    ],
)
def test_reasons_are_plain_and_name_the_first_failing_test(code, reason):
    assert verdict(code) == reason


# Scripts: an examiner and a candidate


def test_a_script_may_have_helpers_imports_metadata_and_a_last_line():
    """The form in which such data is published. `double` is missing here, so it is the
    candidate's, called where the candidate lives."""
    script = """
METADATA = {'author': 'x'}
import math
def near(x, y): return math.isclose(x, y)
def check(candidate):
    import random
    for _ in range(30):
        n = random.randint(0, 99)
        assert candidate(double(n)) == n, "message"
        assert near(candidate(1.0), 0.5)
check(f)
"""
    helper = "def double(x):\n    return 2 * x\n"
    code = helper + "def f(x):\n    return x / 2\n"
    assert script_verdict(code, script) == ""
    assert script_verdict(code.replace("/", "//"), script) == "error: AssertionError"


def test_a_scripts_own_helpers_and_builtins_win_over_the_candidates():
    """Else a candidate could redefine what the assertions are made of."""
    code = "def abs(x): return 0\ndef near(x, y): return True\ndef check(c): pass\n"
    code += "def __builtins__(): pass\ndef AssertionError(): pass\ndef f(a, b): return 0\n"
    script = "def near(x, y): return abs(x - y) < 1\ndef check(c):\n    assert near(c(2, 3), 5)\n"
    assert script_verdict(code, script) == "error: AssertionError"


def test_a_script_may_expect_an_exception_but_not_be_ended_by_one():
    """StopIteration would silently end `map`; an early exit cannot be caught by a bare except."""
    script = """
def check(candidate):
    try:
        for value in map(candidate, [1, 2]): assert value == 0
    except ValueError: return
    except: pass
"""
    assert script_verdict("def f(x):\n    raise ValueError\n", script) == ""
    assert script_verdict("def f(x):\n    raise StopIteration\n", script) == "error: StopIteration"
    assert script_verdict("import os\ndef f(x):\n    os._exit(0)\n", script)
    code = "def f(x):\n    return object()\n"
    assert script_verdict(code, script) == "error: cannot send this object"


def test_a_script_may_expect_an_exception_by_its_base_class():
    """UnicodeDecodeError is a ValueError, but one that cannot be made from a message alone."""
    script = "def check(c):\n    try: c(1)\n    except ValueError as error: str(error)\n"
    script += "    else: raise AssertionError\n"
    assert script_verdict("def f(x):\n    return b'\\xff'.decode('ascii')\n", script) == ""
    assert script_verdict("def f(x):\n    return chr(-x)\n", script) == ""
    assert script_verdict("def f(x):\n    return {}[x]\n", script) == "error: KeyError"


def test_a_script_without_check_or_with_an_error_passes_nobody():
    assert script_verdict(HONEST, "x = 1\n") == "error: KeyError"
    assert script_verdict(HONEST, "def check(c):\n    raise SystemExit(0)\n") == "error: SystemExit"
    assert script_verdict(HONEST, "def check(c:\n") == "error: SyntaxError"


# The verdict is no word


NAMED_OK = [
    "raise type('ok', (Exception,), {})",
    "raise type('passed', (Exception,), {})",
    "raise type('', (Exception,), {})",
    "raise type('value', (Exception,), {})('ok')",
    "raise type('ok', (BaseException,), {})",
    "raise type('M', (type,), {'__name__': 'ok'})('ok', (Exception,), {})",
    "return 'ok'",
    "return ['passed']",
    "import os; os.write(3, b'\"ok\"\\n'); os._exit(0)",
    "import os; os.write(3, b'[[\"fault\", \"ok\"]]\\n'); os._exit(0)",
    "import os; os.write(3, b'[[\"ok\", \"ok\"]]\\n'); os._exit(0)",
]


@pytest.mark.parametrize("body", NAMED_OK)
def test_no_word_of_a_candidate_is_a_verdict(body):
    """An exception called ok once passed 164 of 164 problems. Tests, scripts, old skills, general
    coding, and code that fails while it loads."""
    code = f"def f(a, b=0):\n    {body}\n"
    for text in (code, f"f(1)\n{code}", f"{body.replace('return', 'f =')}\n"):
        assert verdict(text) not in ("", "ok") and script_verdict(text) not in ("", "ok")
    tests = (([1], 2), ([2], 3))
    skill = tasks.Example("", "", "", "", "coding", entry_point="f", tests=tests)
    assert not tasks.verify_skill(skill, code).passed
    program = replace(skill, skill="programs", test_code="def check(f):\n    assert f(1) == 2")
    assert not tasks.verify_program(program, code).passed


# J: gaming the edit metrics


def gamed(new: str, old: str = "") -> str:
    """`total` with a new body, above the old one."""
    head, _ = BUGGY.split("    result = start\n")
    return head + textwrap.indent(textwrap.dedent(new).strip("\n"), "    ") + "\n" + old


OLD = BUGGY[BUGGY.index("    result"):]
DEEPER = textwrap.indent(OLD, "    ")
REWRITE = gamed("return start + sum(items)")
KEPT_ONLY_FOR_SHOW = {
    "early return": gamed("return start + sum(items)", OLD),
    "a condition that holds": gamed("if items == items:\n    return start + sum(items)", OLD),
    "a loop of one": gamed("for _ in [0]:\n    return start + sum(items)", OLD),
    "match": gamed("match 0:\n    case _:\n        return start + sum(items)", OLD),
    "walrus": gamed("if (x := start + sum(items)) is not None:\n    return x", OLD),
    "finally": gamed("try:", DEEPER + "\n    finally:\n        return start + sum(items)"),
    "except": gamed("try:\n    raise ValueError", DEEPER
                    + "\n    except ValueError:\n        return start + sum(items)"),
    "result dropped": BUGGY.replace("return result", "return start + sum(items)"),
    "result not chosen": BUGGY.replace("return result", "return [start + sum(items), result][0]"),
    "never called": gamed("def old():", DEEPER + "\n    return start + sum(items)"),
    "decorated": gamed("@repr\ndef old():", DEEPER + "\n    return start + sum(items)"),
    "the old one below, renamed": f"{REWRITE}\n\n{BUGGY.replace('total', 'old')}",
    "the old one above": f"{BUGGY}\n\n{REWRITE}",
    "an idle name": gamed("x = [i for i in items]\nreturn [start + sum(items), x][0]"),
}


@pytest.mark.parametrize("trick", KEPT_ONLY_FOR_SHOW)
def test_old_code_that_no_test_needs_does_not_make_a_rewrite_a_small_edit(trick):
    """It is worth no more than the same rewrite without it (0.02: a name that must stay)."""
    honest = tasks.verify_edit(sum_problem(), REWRITE)
    found = tasks.verify_edit(sum_problem(), KEPT_ONLY_FOR_SHOW[trick])
    assert honest.passed and honest.reward < 0.7
    assert found.passed and found.reward <= honest.reward + 0.02


def test_idle_code_of_the_reference_itself_costs_nothing():
    """A guard that no test reaches was there before, and a model is right to leave it."""
    guarded = [source.replace("    result = start", "    if items is None:\n        return 0\n"
                              "    result = start") for source in (BUGGY, FIXED)]
    example = tasks.edit_example("x", *guarded, "total", TESTS)
    other = guarded[0].replace("result -= item", "result = result + item")
    honest = tasks.verify_edit(example, other)
    assert tasks.without_idle(example, other) == other
    assert tasks.verify_edit(example, guarded[1]).reward == 1.0 and honest.reward > 0.9


HIDDEN = {
    "exec": "exec('return_ = start + sum(items)')",
    "eval": "return eval('start + sum(items)')",
    "an alias": "run = exec\nreturn 0",
    "a class pattern": "match total:\n    case object(__builtins__=b):\n        return b",
    "a loader": "from math import __loader__\nreturn __loader__",
    "a format": "return '{0.__globals__}'.format(total)",
    "full width": "return \uff45\uff56\uff41\uff4c('start + sum(items)')",
    "frames": "return (i for i in items).gi_frame.f_back",
    "getattr": "return getattr(items, '__le' + 'n__')()",
}


@pytest.mark.parametrize("trick", HIDDEN)
def test_a_program_hidden_in_a_string_is_refused(trick):
    answer = gamed(HIDDEN[trick], OLD)
    assert tasks.verify_edit(sum_problem(), answer).reason.startswith("gate: use of ")


@pytest.mark.parametrize("literal", [
    "'for item in items: result += item'", "f'{[i for i in items]} {sum(items)} {start + 1}'",
    f"0x{'5f' * 40}", "'" + "5f" * 40 + "'", "[]  # result is the start and each of the items"])
def test_a_long_literal_is_charged_by_its_words(literal):
    """A program in one token, in whatever code, must not look like an edit of one token."""
    answer = gamed(f"x = {literal}", FIXED[FIXED.index("    result"):])
    found = tasks.verify_edit(sum_problem(), answer)
    assert found.passed and found.metrics["nel"] > 0.15


def test_calling_what_the_buggy_source_calls_is_no_crime():
    """And `re.compile` hides nothing."""
    buggy = "import re\ndef f(s):\n    s = s + '-'\n    return eval(s)\n"
    example = tasks.edit_example("x", buggy, buggy.replace("'-'", "''"), "f", ((("1",), 1),))
    assert tasks.verify_edit(example, buggy.replace("+ '-'", "* 1")).passed
    for call, refused in (("re.compile('a')", False), ("compile('a', 'b', 'eval')", True)):
        answer = buggy.replace("+ '-'", "* 1").replace("    return", f"    {call}\n    return")
        assert tasks.verify_edit(example, answer).reason.startswith("gate: ") == refused


# Values of other kinds, limits


@pytest.mark.parametrize("body, expected", [
    ("return (i for i in (1, 2))", [1, 2]), ("return range(3)", [0, 1, 2]),
    ("return map(str, (1, 2))", ["1", "2"]), ("return {'a': 1}.items()", [["a", 1]]),
    ("import collections; return collections.deque([1])", [1]),
    ("import collections; return collections.Counter('aab')", {"a": 2, "b": 1}),
    ("import collections; d = collections.defaultdict(list); d['a'].append(1); return d",
     {"a": [1]}),
    ("import collections; return collections.OrderedDict(b=1, a=2)", {"a": 2, "b": 1}),
    ("import collections; return collections.namedtuple('P', 'x y')(1, 2)", [1, 2]),
    ("import enum; return enum.IntEnum('E', 'a b').b", 2), ("return 14.0", 14), ("return 3", 3.0)])
def test_equal_values_of_other_kinds_are_right_where_the_tests_come_from_json(body, expected):
    """Converted where the candidate lives: none of its methods runs in the trainer."""
    assert value_verdict(body, expected, True) == ""


def test_a_tolerance_is_as_wide_as_it_says():
    for tolerance, passes in ((0.0, False), (1e-4, False), (2e-3, True)):
        outcome = tasks.run_tests("def f():\n    return 0.333", "f", [([], 1 / 3)], True, 1.0,
                                  tolerance)
        assert outcome.passed == (passes or tolerance > 4e-4)


def test_a_busy_machine_is_no_timeout_and_an_endless_loop_is():
    """Limits count CPU time: others may use the processor meanwhile."""
    work = "def f(a, b):\n    import time\n    while time.process_time() < 0.6: pass\n"
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(4)]
    try:
        assert verdict(work + "    return a + b", 1.0) == ""
        assert verdict("def f(a, b):\n    while True: pass", 1.0) == "timeout"
    finally:
        for other in others:
            other.kill()
            other.wait()

# K: reward plumbing


def test_no_tests_is_a_failure():
    assert word(tasks.run_tests(HONEST, "f", [])) == "no tests"


def test_a_server_that_dies_is_replaced_and_the_job_done_again():
    """Killed while idle and killed at work."""
    assert verdict(HONEST) == ""
    server = tasks.pool().queue[-1]
    os.kill(server.process.pid, signal.SIGKILL)
    assert verdict(HONEST) == ""
    server = tasks.pool().queue[-1]
    threading.Timer(0.2, os.kill, (server.process.pid, signal.SIGKILL)).start()
    assert verdict("def f(a, b):\n    while True: pass\n") == "timeout"
    assert_unharmed()


def test_a_server_that_dies_twice_means_failure_not_none(monkeypatch):
    """Nothing but values earns a pass, and no job is skipped."""
    real = tasks.Server.run

    def lethal(server, job, *more):
        if b"candidate" in job:
            os.killpg(server.process.pid, signal.SIGKILL)
        return real(server, job, *more)

    assert verdict(HONEST) == ""
    with monkeypatch.context() as patch:
        patch.setattr(tasks.Server, "run", lethal)
        assert verdict(HONEST) == "judge failure"
    assert verdict(HONEST) == ""


@pytest.mark.parametrize("program", ["", "1/0", "print('[]')", "import time; time.sleep(60)"])
def test_a_judge_that_cannot_start_is_an_error_not_a_reward(program, monkeypatch):
    """Else a broken installation would quietly train on failures only."""
    monkeypatch.setattr(tasks, "pool", functools.cache(tasks.pool.__wrapped__))
    monkeypatch.setattr(tasks, "server_program", lambda: program)
    monkeypatch.setattr(tasks, "START_SECONDS", 0.5)
    with pytest.raises(tasks.JudgeError, match="did not start"):
        tasks.run_tests(HONEST, "f", ADDITION)


def test_without_a_filter_nothing_runs_unless_the_user_insists(monkeypatch):
    """As on macOS. The server's table of system calls is emptied for this."""
    text = tasks.server_program()
    blind = text.replace("in SYSCALLS:", "in ():").replace("not in ():", "in SYSCALLS:")
    assert "seccomp" in tasks.judge_layers() and blind != text
    monkeypatch.setattr(tasks, "pool", functools.cache(tasks.pool.__wrapped__))
    monkeypatch.setattr(tasks, "server_program", lambda: blind)
    assert "seccomp" not in tasks.judge_layers()
    with pytest.raises(tasks.JudgeError, match="unsafe-judge"):
        tasks.run_tests(HONEST, "f", ADDITION)
    monkeypatch.setattr(tasks, "UNSAFE_JUDGE", True)
    assert tasks.run_tests(HONEST, "f", ADDITION).passed


def test_unsafe_judge_on_the_command_line_reaches_the_judge(monkeypatch, tmp_path):
    """The remedy that the error names must work."""
    monkeypatch.setattr(tasks, "UNSAFE_JUDGE", False)
    seen = []
    monkeypatch.setattr(vcopd, "run", lambda *_: seen.append(tasks.UNSAFE_JUDGE) or {"seconds": 0})
    for said in ([], ["--unsafe-judge"]):
        cfg, _ = vcopd.read_config(["--task", "arithmetic", "--out", str(tmp_path), *said])
        assert vcopd.main(cfg, False) == 0
    assert seen == [False, True]


def test_unsendable_test_data_is_the_callers_error():
    with pytest.raises(ValueError, match="object"):
        tasks.run_tests(HONEST, "f", [([object(), 1], 2)])
    with pytest.raises(ValueError, match="object"):
        tasks.run_tests(HONEST, "f", [([1, 1], object())])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_trainer(how):
    """Killed, terminated or interrupted while a candidate hangs."""
    module = Path(tasks.__file__)
    program = f"""
import sys
sys.path.insert(0, {str(module.parent)!r})
import {module.stem} as tasks
tasks.judge_layers()
print(*[server.process.pid for server in tasks.pool().queue if server.process], flush=True)
tasks.run_tests("def f():\\n    while True: pass", "f", [([], 1)], seconds=5.0)
"""
    command = [sys.executable, "-c", program]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    server = int(trainer.stdout.readline())
    time.sleep(0.3)
    trainer.send_signal(how)
    trainer.wait(10)
    trainer.stdout.close()
    deadline = time.monotonic() + 5
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(server)


def alive(group: int) -> list[str]:
    """Processes of a group that have not ended."""
    lines = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True).stdout
    return [row for row in lines.splitlines() if row.split()[0] == str(group) and "Z" not in row]


# =============================================================================================
# The tasks: families, bugs, splits, old skills
# =============================================================================================


@pytest.fixture(scope="module")
def edits() -> tasks.Task:
    """The code-edit task as it ships."""
    return built("codeedit")


def splits(task: tasks.Task) -> dict[str, list[tasks.Example]]:
    """All problems of the new skill by the split they are in."""
    return {"train": task.train, "validation": task.validation[0], **task.evals}


ALL_TASKS = pytest.mark.parametrize("name", ["arithmetic", "codeedit", "sort"])  # sort: README


@ALL_TASKS
def test_references_pass_silence_fails_and_no_split_shares_a_problem(name):
    """What every task owes its user, the one that the page teaches to write among them."""
    task = built(name)
    prompts = [example.prompt for examples in splits(task).values() for example in examples]
    assert len(set(prompts)) == len(prompts)
    for example in [e for examples in splits(task).values() for e in examples[:10]]:
        assert task.verify(example, example.reference).reward == 1.0
        assert task.verify(example, "").reward == -1.0
    rng = random.Random(0)
    read = {task.corpus(rng)[0].split("\n\nA right answer:")[0] for _ in range(200)}
    assert not read & set(prompts[len(task.train):])


def test_there_are_enough_families_and_bugs_and_the_unseen_ones_are_others():
    """Names alone could hide a copy: the programs differ too, when names do not count."""
    seen, unseen = (tasks.read_families(text) for text in (tasks.FAMILIES, tasks.FAMILIES_UNSEEN))
    bodies = [re.sub(r"\w+", "", source.split('"""')[-1]) + name for name, source in seen + unseen]
    assert (len(seen), len(unseen)) >= (28, 8)
    assert len({name for name, _ in seen + unseen}) == len(bodies) == len(set(bodies))
    assert len(tasks.OPERATORS) >= 12
    assert not tasks.OPERATORS.keys() & tasks.OPERATORS_UNSEEN.keys()


def test_every_family_and_every_bug_is_in_the_training_problems(edits):
    """A family whose bugs no test sees would never be drawn, in silence."""
    drawn = [example.id.split("/") for example in edits.train]
    assert {family for family, _, _ in drawn} == {n for n, _ in tasks.read_families(tasks.FAMILIES)}
    assert {bug for _, bug, _ in drawn} == set(tasks.OPERATORS)


@pytest.mark.parametrize("split", ["train", "validation", "in_domain", "out_of_domain"])
def test_the_reference_passes_and_the_bug_fails_in_the_real_judge(split, edits):
    """And expected values are what the reference returns: run here, outside the judge."""
    for example in splits(edits)[split][::10]:
        fixed = tasks.verify_edit(example, example.reference)
        assert (fixed.reward, fixed.reason) == (1.0, "ok"), example.id
        assert not tasks.run_example(example, example.buggy).passed, example.id
        assert tasks.verify_edit(example, example.buggy).reward == -1.0
        scope: dict = {}
        exec(example.reference, scope)
        for args, expected in example.tests:
            assert scope[example.entry_point](*copy.deepcopy(args)) == expected


def test_no_program_of_one_split_is_in_another(edits):
    """By the bug-free program, so that no second bug in the same one leaks its repair."""
    seen: dict[str, str] = {}
    for split, examples in splits(edits).items():
        assert len({e.prompt for e in examples}) == len(examples)
        for example in examples:
            assert seen.setdefault(example.reference, split) == split


def test_tests_fail_every_bug_that_is_one_step_away_and_every_constant(edits):
    """Else a wrong answer is paid. Inputs drawn anew decide which bugs change anything."""
    rng = random.Random(1)
    kinds = {name: [a.arg for a in ast.parse(source).body[0].args.args]
             for text in (tasks.FAMILIES, tasks.FAMILIES_UNSEEN)
             for name, source in tasks.read_families(text)}
    for example in rng.sample(edits.train + edits.evals["out_of_domain"], 60):
        calls, wanted = zip(*((args, repr(want)) for args, want in example.tests), strict=True)
        assert len(set(wanted)) > 1, example.id
        fresh = [[tasks.draw_input(kind, rng) for kind in kinds[example.id.split("/")[0]]]
                 for _ in range(100)]
        right = [*tasks.outcomes(example.reference, example.entry_point, fresh)]
        tree = ast.parse(example.reference).body[0]
        for _, node, bug in tasks.bugs_in(tree):
            wrong = tasks.replaced(example.reference, node, ast.unparse(bug))
            if tuple(tasks.outcomes(wrong, example.entry_point, calls)) == wanted:
                assert [*tasks.outcomes(wrong, example.entry_point, fresh)] == right, wrong


def test_out_of_domain_neither_family_nor_bug_is_known(edits):
    known = {part for e in edits.train for part in e.id.split("/")[:2]}
    assert not known & {part for e in edits.evals["out_of_domain"] for part in e.id.split("/")[:2]}


def test_a_prompt_decides_its_repair(edits):
    """Else about half is the most that any method could reach."""
    answers: dict[str, set[str]] = {}
    for examples in splits(edits).values():
        for example in examples:
            answers.setdefault(example.prompt, set()).add(example.reference)
    assert all(len(repairs) == 1 for repairs in answers.values())


def test_only_the_teacher_is_shown_the_solution(edits):
    for example in edits.train[:50]:
        assert example.reference not in example.prompt
        assert example.reference in tasks.privileged_prompt(example)


def test_the_web_holds_noisy_repairs_of_training_programs_only(edits):
    """Pretraining must show how, must not prefer to, and must not know the test problems."""
    rng = random.Random(0)
    documents = [tasks.edit_document(rng) for _ in range(600)]
    tested = {e.reference for name in ("in_domain", "out_of_domain") for e in edits.evals[name]}
    tested |= {e.reference for e in edits.validation[0]}
    assert not any(answer in tested for _, answer in documents)
    plain = [(prompt, answer) for prompt, answer in documents if "A right answer:" not in prompt]
    unfixed = sum(prompt.endswith(answer) or answer in prompt for prompt, answer in plain)
    assert 0.6 < len(plain) / len(documents) < 0.8
    assert abs(unfixed / len(plain) - tasks.WEB["unfixed"] / 100) < 0.06


@ALL_TASKS
def test_a_task_is_the_same_every_time(name):
    assert all_tasks()[name]() == built(name)


@ALL_TASKS
def test_old_skills_are_seven_and_no_prompt_is_used_twice(name):
    """Anchors are trained on: a benchmark that shared a prompt would measure nothing."""
    task = built(name)
    lists = [task.anchors, task.benchmark, task.validation[1]]
    prompts = [example.prompt for examples in lists for example in examples]
    assert len(set(prompts)) == len(prompts)
    for examples, count in zip(lists, (20, 20, 8), strict=True):
        assert set(Counter(e.skill for e in examples).values()) == {count}
        assert len({e.skill for e in examples}) == 7


def test_the_checkers_of_old_skills_are_exact(edits):
    """The reference has the skill; nothing, or the answer to another question, has not. Talk around
    an answer is an error too, but in a chat or about facts.
    """
    for one, two in itertools.pairwise(edits.benchmark):
        assert tasks.verify_skill(one, one.reference).passed
        assert not tasks.verify_skill(one, "").passed
        talk = tasks.verify_skill(one, f"Sure! {one.reference} Hope this helps.")
        assert talk.passed == (one.skill in ("chat", "knowledge"))
        if one.skill != two.skill:
            assert not tasks.verify_skill(one, two.reference).passed


def test_the_task_of_the_readme_trains_when_it_is_pasted(base, tmp_path):
    """As a reader does it: at the end of tasks.py, and then by its name in a new process."""
    shutil.copy(vcopd.__file__, tmp_path)
    pasted = Path(tasks.__file__).read_text("utf-8") + "\n\n" + readme_task()
    (tmp_path / "tasks.py").write_text(pasted, "utf-8")
    command = options(base, tmp_path / "run", "--task", "sort", "--steps", "2")
    done = subprocess.run([sys.executable, tmp_path / "vcopd.py", *command], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["reasons"].keys() for line in steps] == [{"wrong order"}] * 2


def test_sums_are_right_and_no_split_shares_one():
    """Python does the sum; the way to it has one operation a line."""
    task = tasks.arithmetic()
    texts = [example.id.removeprefix("sum/") for examples in splits(task).values()
             for example in examples]
    assert len(set(texts)) == len(texts)
    for example in task.train + task.evals["out_of_domain"]:
        text = example.id.removeprefix("sum/")
        assert int(example.hint) == eval(text)
        assert tasks.verify_arithmetic(example, example.reference).reward == 1.0
        assert tasks.verify_arithmetic(example, f"Answer: {eval(text) + 1}").reward == -1.0


# =============================================================================================
# Edit metrics, the reward, the format rule, arithmetic and the data files
# =============================================================================================

HUMANEVALPACK = Path(__file__).parent / "../shared/data/humanevalpack_python.jsonl"

def benchmark_rows() -> list[tasks.Example]:
    if not HUMANEVALPACK.exists():
        pytest.skip("HumanEvalPack is not here")
    return tasks.load_edits(str(HUMANEVALPACK))


def real_pairs() -> list[tuple[list[str], list[str]]]:
    """Token lists of buggy and right code if it is here, else neighbours in the library."""
    if HUMANEVALPACK.exists():
        return [(tasks.code_tokens(row.buggy), tasks.code_tokens(row.reference))
                for row in benchmark_rows()]
    sources = [inspect.getsource(f) for module in (textwrap, statistics, bisect)
               for _, f in inspect.getmembers(module, inspect.isfunction)]
    return list(itertools.pairwise(map(tasks.code_tokens, sources)))


# =============================================================================================
# Levenshtein, tokens, lines
# =============================================================================================


@pytest.mark.parametrize("a, b, distance", [
    ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("", "", 0),
    ("same", "same", 0), ("ab", "ba", 2), ("aaa", "aa", 1), ("abcdef", "azced", 3)])
def test_levenshtein_on_paper(a, b, distance):
    assert tasks.levenshtein(a, b) == distance


def test_levenshtein_agrees_with_rapidfuzz_on_two_thousand_random_and_real_pairs():
    """Small alphabets make long runs of equal items, where a carry could go wrong."""
    oracle = pytest.importorskip("rapidfuzz.distance").Levenshtein
    rng = random.Random(0)
    pairs = real_pairs()
    assert len(pairs) > 20
    while len(pairs) < 2000:
        size = rng.choice([2, 3, 30])
        pairs.append(tuple([rng.randrange(size) for _ in range(rng.randrange(150))]
                           for _ in range(2)))
    for a, b in pairs:
        assert tasks.levenshtein(a, b) == oracle.distance(a, b)


def test_tokens_include_comments_line_ends_and_indentation():
    assert tasks.code_tokens("if a:\n\n    b = 1  # why\n") == [
        "if", "a", ":", "\n", "\n", "    ", "b", "=", "1", "# why", "\n", ""]


@pytest.mark.parametrize("broken", [
    "def f(:\n  '", "'''never closed", "(", "  x\n y", "\\", "a\0b", "\ud800", "\t\x0c$?!", "\r"])
def test_tokens_of_broken_code_are_a_list_and_not_an_error(broken):
    assert all(isinstance(token, str) for token in tasks.code_tokens(broken))
    assert tasks.code_tokens("") == []


def test_words_of_broken_code_still_count():
    assert tasks.code_tokens("'''never closed + 1") == ["'", "'", "'", "never", "closed", "+", "1"]


@pytest.mark.parametrize("old, new, lines", [
    ("+= item", "+= item", 0), ("result += item", "x = item\n        result += x", 1),
    ("    return", "\n    return", 1), ("start\n", "start \n", 1)])
def test_lines_count_as_in_the_shortest_diff(old, new, lines):
    found = tasks.edit_metrics(FIXED.replace(old, new), BUGGY, FIXED)
    assert found["ulr"] == pytest.approx(lines / 6)


# =============================================================================================
# Cognitive complexity
# =============================================================================================

# Numbers of the white paper (the first five are its own examples, in Python), then one rule each.
COMPLEXITY = {
    "sum of primes: 1 + 2 + 3, and 1 for the loop's else": (7, """
        def f(limit):
            for i in range(1, limit):
                for j in range(2, i):
                    if i % j == 0:
                        break
                else:
                    total += i"""),
    "a switch is 1, however many cases": (1, """
        def f(n):
            match n:
                case 1:
                    return "one"
                case 2:
                    return "a couple"
                case _:
                    return "lots" """),
    "try is free, catch is not: 1 + 2 + 3, 1 + 2": (9, """
        def f(a, b):
            try:
                if a:
                    for i in range(10):
                        while b:
                            b -= 1
            except ValueError:
                if b:
                    b = 0"""),
    "sequences of like operators: if 1, and 1, or 1, and 1": (4, """
        def f(a, b, c, d, e, g):
            if a and b and c or d or e and g:
                return 1"""),
    "a negated group is a sequence of its own": (3, """
        def f(a, b, c):
            if a and not (b and c):
                return 1"""),
    "straight code": (0, "def f(x):\n    y = x + 1\n    return y"),
    "elif and else add 1 each, their bodies nest": (7, """
        def f(x):
            if x > 2:
                return 3
            elif x > 1:
                return 2
            elif x:
                if y:
                    return 1
            else:
                return x and y"""),
    "elif deep down does not pay for its depth": (4, """
        def f(xs):
            for x in xs:
                if x:
                    x += 1
                elif y:
                    y += 1"""),
    "else: if is nested, unlike elif": (4, """
        def f(x):
            if x:
                return 1
            else:
                if y:
                    return 2"""),
    "a ternary in a ternary": (3, "def f(x):\n    return 1 if x else (2 if y else 3)"),
    "a lambda nests, but costs nothing": (2, "def f(x):\n    return lambda y: 1 if y else x"),
    "a function in a function nests": (2, """
        def f(x):
            def g(y):
                if y:
                    return x
            return g(1)"""),
    "direct recursion adds 1, once": (2, """
        def f(n):
            if n:
                return f(n - 1) + f(n - 2)"""),
    "comprehensions are shorthand": (0, "def f(xs):\n    return [x for x in xs if x]"),
    "a condition is not inside its body": (2, """
        def f(x):
            while (1 if x else 0):
                pass"""),
    "functions add up": (2, "def f(x):\n    if x: pass\n\ndef g(x):\n    if x: pass"),
    "a method is no deeper than a function": (3, """
        class A:
            def f(self, x):
                if x:
                    if x > 1:
                        pass"""),
    "with is free": (1, "def f(p):\n    with p:\n        if p: pass"),
    "finally is free": (0, "def f():\n    try:\n        pass\n    finally:\n        pass"),
    "code that does not parse": (0, "def f(:"),
}


@pytest.mark.parametrize("rule", COMPLEXITY)
def test_cognitive_complexity_on_paper(rule):
    number, source = COMPLEXITY[rule]
    assert tasks.cognitive_complexity(textwrap.dedent(source)) == number


def test_cognitive_complexity_agrees_with_the_package_on_how_fixes_change_it():
    """Measured: 164 of 164 differences agree, and 157 of the references' own values.

    In the seven others (6, 11, 95, 99, 108, 140, 145) the package takes any function that is an
    inner function and a return for a decorator, charges an `elif` for its depth, or does not nest
    the body of an `if` that has an `elif`. The paper does none of these; they cancel in a
    difference unless the fix is just there.
    """
    package = pytest.importorskip("cognitive_complexity.api")
    agree = []
    for row in benchmark_rows():
        ours = [tasks.cognitive_complexity(s) for s in (row.reference, row.buggy)]
        theirs = [sum(package.get_cognitive_complexity(node) for node in ast.parse(s).body
                      if isinstance(node, ast.FunctionDef)) for s in (row.reference, row.buggy)]
        agree.append(ours[0] - ours[1] == theirs[0] - theirs[1])
    assert sum(agree) / len(agree) >= 0.98


# =============================================================================================
# Edit metrics and reward
# =============================================================================================

MINUS, PLUS = (f"def f(a, b):\n    return a {sign} b" for sign in "-+")


def test_edit_metrics_on_paper():
    """16 tokens and 2 lines are buggy, 20 tokens answered; 6 tokens and 2 lines were changed
    where 1 and 1 would do."""
    found = tasks.edit_metrics("def f(a, b):\n    c = a + b\n    return c", MINUS, PLUS)
    assert found == pytest.approx({
        "nel": 5 / 20, "acc": 0, "ulr": 1 / 2, "excess_edit": 6 / 20 - 1 / 16})
    assert tasks.edit_reward(found) == pytest.approx(1 - 0.125 - 0 - 0.1)


@pytest.mark.parametrize("answer, name, value", [
    ("def f(a, b):\n    return a + b if a else b", "acc", 1 / 3),
    ("def f(a, b):\n    if a:\n        if b:\n            return a + b", "acc", 1),
    ("def f(a, b):\n    while a:\n        if b:\n            if a:\n                b", "acc", 1),
    (MINUS, "excess_edit", -1 / 16)])                                # did nothing
def test_one_metric_on_paper(answer, name, value):
    assert tasks.edit_metrics(answer, MINUS, PLUS)[name] == pytest.approx(value)


def test_a_simpler_or_smaller_answer_than_the_reference_is_not_charged():
    wordy = "def f(a, b):\n    if a:\n        return a + b\n    return b"
    found = tasks.edit_metrics(PLUS, MINUS, wordy)
    assert tasks.edit_reward(found) == 1.0
    assert found["excess_edit"] < 0


def test_added_complexity_counts_from_the_more_complex_of_bug_and_reference():
    """Keeping a branch that the reference removed is an edit not made, not one too many."""
    branched = "def f(a, b):\n    if a:\n        return a - b\n    return b"
    found = tasks.edit_metrics(branched.replace("-", "+"), branched, PLUS)
    assert found["acc"] == 0 and tasks.cognitive_complexity(branched) == 1


@pytest.mark.parametrize("nel, acc, ulr, reward", [
    (0, 0, 0, 1.0), (1, 0, 0, 0.5), (0, 1, 0, 0.7), (0, 0, 1, 0.8), (0.2, 1 / 3, 0.5, 0.7)])
def test_reward_on_paper(nel, acc, ulr, reward):
    terms = {"nel": nel, "acc": acc, "ulr": ulr}
    assert tasks.edit_reward(terms) == pytest.approx(reward)


def test_every_pass_is_worth_more_than_every_fail():
    """Else a model learns to fail on purpose; one published run did."""
    steps = [0.0, 1e-12, 1 / 3, 0.5, 0.999, 1.0]
    grid = [dict(zip(("nel", "acc", "ulr"), terms, strict=True))
            for terms in itertools.product(steps, repeat=3)]
    passes = [tasks.edit_reward(terms) for terms in grid]
    assert tasks.verify_edit(sum_problem(), BUGGY).reward == -1.0
    assert min(passes) >= -1e-9 and max(passes) == 1.0


def test_terms_stay_between_0_and_1_for_any_answer():
    """Answers are shuffled, cut and repeated pieces of code, some of them not code at all."""
    rng = random.Random(0)
    lines = [*BUGGY.split("\n"), *FIXED.split("\n"), "", "\t", "# x", "if 1:", "x = '''", "\x0c"]
    for _ in range(300):
        answer, buggy, reference = ("\n".join(rng.choices(lines, k=rng.randrange(12)))
                                    for _ in range(3))
        found = tasks.edit_metrics(answer, buggy, reference)
        signed = found.pop("excess_edit")
        assert -1 <= signed <= 1
        assert all(0 <= value <= 1 for value in found.values()), found
        assert 0 <= tasks.edit_reward(found) + 1e-9 <= 1 + 1e-9


def test_humanevalpack_is_judged_as_it_was_published():
    """References and bare corrected functions are worth exactly 1, bugs exactly -1."""
    for row in benchmark_rows():
        [bare] = [ast.get_source_segment(row.reference, node)
                  for node in ast.parse(row.reference).body
                  if getattr(node, "name", "") == row.entry_point]
        rewards = [tasks.verify_edit(row, text).reward for text in (row.reference, bare, row.buggy)]
        assert rewards == [1.0, 1.0, -1.0], row.id


GAMING = {
    "one line": 'def total(items, start):\n    """Sum of the items, plus start."""\n'
                "    return start + sum(items)",
    "comment spam": FIXED.replace("\n    r", "\n    # keep this line as it was\n    r"),
    "reindented": FIXED.replace("    ", "  "),
    "docstring rewritten": FIXED.replace("Sum of the items, plus start.",
                                         "\n    Adds up.\n\n    Returns: the sum.\n    "),
    "dead code": FIXED.replace("    return", "    if start is None:\n        for item in items:\n"
                               "            result = 0\n    return"),
    "renamed": FIXED.replace("result", "accumulator"),
    "noqa": FIXED.replace("+= item", "+= item  # noqa"),
    "spaces": FIXED.replace(" = ", "="),
}


@pytest.mark.parametrize("trick", GAMING)
def test_a_trick_that_passes_the_tests_is_paid_less_than_the_plain_fix(trick):
    """Group J."""
    honest = tasks.verify_edit(sum_problem(), FIXED)
    gamed = tasks.verify_edit(sum_problem(), GAMING[trick])
    assert honest.reward == 1.0 and gamed.passed
    assert 0 <= gamed.reward < 0.999


# =============================================================================================
# Format rule
# =============================================================================================


@pytest.mark.parametrize("wrap", [
    "{}", "\n\n{}\n\n", "```python\n{}\n```", "```\n{}\n```", " \n```python  \n\n{}\n\n```\n\t",
    "```py\n{}\n```", "```Python\n{}\n```", "```python3\n{}\n``` ", "\ufeff{}", "\u00a0{}",
    "<think>\n\n</think>\n\n{}"])
def test_bare_code_or_one_fenced_block_is_the_right_format(wrap):
    assert tasks.unwrap_answer(wrap.format(FIXED)) == (FIXED, "")
    assert tasks.verify_edit(sum_problem(), wrap.format(FIXED)).reward == 1.0


MALFORMED = {
    "empty": "", "blank": " \n\t\n", "empty block": "```python\n\n```", "NUL": FIXED + "\0",
    "BOM inside": FIXED.replace("Sum", "\ufeff"), "lone surrogate": FIXED.replace("Sum", "\udc80"),
    "two blocks": f"```python\n{FIXED}\n```\n```python\n{FIXED}\n```",
    "unclosed fence": f"```python\n{FIXED}", "only a fence": "```", "never opened": f"{FIXED}\n```",
    "closed as python": f"```\n{FIXED}\n```python",
    "other language": f"```js\n{FIXED}\n```", "longer fence": f"````\n{FIXED}\n````",
    "text before": f"Here is the function:\n{FIXED}", "text after": f"{FIXED}\nThe bug was a sign.",
    "text around a block": f"Fixed:\n```python\n{FIXED}\n```",
    "text that parses": f"Done\n{FIXED}", "a string": f'"The bug was a sign."\n{FIXED}',
    "code below": f"{FIXED}\nprint(total([1], 2))", "code on an import": f"import math; x\n{FIXED}",
    "syntax error": "def total(items, start:\n    return 1", "prose": "I cannot do that.",
    "body only": "    result = start\n    return result", "other name": "def sum_up(x, y):\n    1",
    "homoglyph": FIXED.replace("total", "t\u043etal"), "in a class": "class A:\n    " + FIXED,
    "too long": FIXED + "\n    # x" * 4000, "deep": f"def total(a, b):\n    return {'-' * 9000}1",
    "nested tags": f"<answer><answer>{FIXED}</answer></answer>",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_answer_fails_with_a_reason(case):
    """Groups I and L: -1, reason "format", no metrics, and never an exception."""
    verdict = tasks.verify_edit(sum_problem(), MALFORMED[case])
    assert (verdict.reward, verdict.passed, verdict.formatted) == (-1.0, False, False)
    assert verdict.reason.startswith("format: ") and verdict.metrics == {}


def test_what_the_buggy_source_has_at_the_top_may_be_repeated_but_not_changed():
    shown = f"# Sums.\nimport math\nLIMIT = 3\n{BUGGY}"
    example = tasks.edit_example("x", shown, shown.replace("-=", "+="), "total", TESTS)
    assert tasks.verify_edit(example, example.reference).reward == 1.0
    changed = example.reference.replace("LIMIT = 3", "LIMIT = 4")
    assert tasks.verify_edit(example, changed).reason == "format: text outside the function"


def test_a_trailing_indented_comment_and_decorators_belong_to_the_function():
    code = f"import functools\n\n@functools.cache\ndef g():\n    pass\n\n{FIXED}\n    # the end"
    assert tasks.format_error(code, sum_problem()) == ""


SHOWN = f"""\
# Sums.
from __future__ import annotations
from typing import List

LIMIT = 3


def one():
    return 1


{BUGGY.replace("(items,", "(items: List[int],").replace("-= item", "-= item * one()")}


def unused():
    return LIMIT"""


def shown_problem() -> tasks.Example:
    return tasks.edit_example("x", SHOWN, SHOWN.replace("-=", "+="), "total", TESTS)


def test_what_the_answer_omits_is_put_back_before_anything_is_judged():
    """The instruction asks for the function only: leaving the rest out costs nothing."""
    example = shown_problem()
    [alone] = [ast.get_source_segment(example.reference, node)
               for node in ast.parse(example.reference).body
               if getattr(node, "name", "") == "total"]
    assert tasks.put_back_omitted(alone, SHOWN) == example.reference
    for answer in (alone, f"from typing import List\n\n{alone}", example.reference):
        assert tasks.verify_edit(example, answer).reward == 1.0
    own_helper = "def one():\n    return 9\n\n" + alone
    assert tasks.verify_edit(example, own_helper).reason.endswith("wrong value")


@pytest.mark.parametrize("line", ["# LIMIT = 3", "'LIMIT = 3'", "MAX_LIMIT = 30"])
def test_what_the_answer_only_mentions_is_put_back(line):
    """A text that holds a statement's text does not yet make the statement."""
    example = shown_problem()
    alone = example.reference[example.reference.index("def total"):].split("\n\n")[0]
    answer = alone.replace("    result =", f"    {line}\n    result = LIMIT - LIMIT +")
    assert tasks.verify_edit(example, answer).passed


@pytest.mark.parametrize("answer, lines", [
    (f"# The bug was a sign.\n{FIXED}", 1), (f"{FIXED}\n# Fixed.", 1),
    (f"import math\n{FIXED}", 1), (f"from string import digits\n{FIXED}", 1),
    (f"{FIXED}\ndef g():\n    return 1", 2), (f"class A:\n    x = 1\n{FIXED}", 2)])
def test_comments_imports_and_helpers_are_edits_and_no_crime(answer, lines):
    verdict = tasks.verify_edit(sum_problem(), answer)
    assert verdict.passed and verdict.metrics["ulr"] == pytest.approx(lines / 6)
    assert 0.8 < verdict.reward < 1


@pytest.mark.parametrize("buggy, reference, tests", [
    ("def f(x, seen=[]):\n    seen.append(x)\n    return seen",
     "def f(x, seen=None):\n    seen = seen or []\n    seen.append(x)\n    return seen",
     (((1,), [1]), ((2,), [2]))),
    ("def f(w, h=0):\n    return w * h", "def f(w, h=1):\n    return w * h", (((3,), 3),)),
    ("def f(s):\n    return re.sub('a', '', s)",
     "import re\n\ndef f(s):\n    return re.sub('a', '', s)", ((("ab",), "b"),)),
    ("def f(x):\n    return x + C", "C = 2\n\ndef f(x):\n    return x + C", (((1,), 3),)),
    ("N = 0\ndef f(x):\n    N = x\n    return g()\ndef g():\n    return N",
     "N = 0\ndef f(x):\n    global N\n    N = x\n    return g()\ndef g():\n    return N",
     (((1,), 1),)),
    ("def f(x):\n    return x", "def f(x):\n    return eval(x)", ((("1 + 1",), 2),))])
def test_what_the_reference_adds_is_no_crime(buggy, reference, tests):
    example = tasks.edit_example("x", buggy, reference, "f", tests)
    assert tasks.verify_edit(example, reference).reward == 1.0
    assert tasks.verify_edit(example, buggy).reward == -1.0


def test_what_the_gate_refuses_is_not_run(monkeypatch):
    monkeypatch.setattr(tasks, "run_tests", None)
    verdict = tasks.verify_edit(sum_problem(), FIXED.replace("start\n", "eval('start')\n"))
    assert (verdict.reward, verdict.formatted) == (-1.0, True)
    assert verdict.reason == "gate: use of eval"


def test_a_judge_without_a_verdict_is_a_failure(monkeypatch):
    """Silence must never be taken for success, nor a word for a verdict."""
    for reply, fault in ((None, ""), (None, "timeout"), ("ok", ""), (["passed"], ""), ([], ""),
                         ([["ok", "ok"]], ""), ([["value", "ok"], ["value", True]], "")):
        monkeypatch.setattr(tasks, "run_job", lambda *job, r=reply, f=fault, **size: (r, f))
        verdict = tasks.verify_edit(sum_problem(), FIXED)
        assert (verdict.reward, verdict.passed) == (-1.0, False)
    for passed, reason in ((True, "wrong value"), (False, "ok")):
        with pytest.raises(ValueError, match="cannot be"):
            tasks.Verdict(1.0, passed, True, reason, {})


def test_a_wrong_edit_has_metrics_and_reward_minus_1():
    verdict = tasks.verify_edit(sum_problem(), BUGGY)
    assert (verdict.reward, verdict.passed, verdict.formatted) == (-1.0, False, True)
    assert verdict.reason != "ok" and verdict.metrics["excess_edit"] < 0


def test_parsing_an_answer_warns_nobody():
    """With -W error an invalid escape would else turn into a syntax error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tasks.verify_edit(sum_problem(), FIXED + ' if "\\d" is 1 else result').passed


def test_no_string_raises():
    rng = random.Random(0)
    pieces = [*MALFORMED.values(), *GAMING.values(), "```", "\n", "\r", "'", '"""', "(", "\\", "\0",
              "Answer: 1", "\ud800", "\u2028", "def total(items, start):", "    return 1", "#"]
    problem = sum_problem()
    for _ in range(400):
        text = "".join(rng.choices(pieces, k=rng.randrange(4)))
        for verify in (tasks.verify_edit, tasks.verify_program, tasks.verify_arithmetic):
            verdict = verify(problem, text)
            assert verdict.passed == (verdict.reason == "ok") == (verdict.reward >= 0)


# =============================================================================================
# Arithmetic
# =============================================================================================

SUM = tasks.Example("a", "40 + 2?", "Answer: 42", hint="42")


@pytest.mark.parametrize("text", [
    "Answer: 42", "Answer: 42\n\n", "40 + 2 = 42\nAnswer: 42", "\n\nAnswer: 42 \n",
    "41?\r\nAnswer: 42"])
def test_the_right_integer_on_the_last_line_passes(text):
    assert tasks.verify_arithmetic(SUM, text) == tasks.Verdict(1.0, True, True, "ok", {})


@pytest.mark.parametrize("text", ["Answer: 41", "Answer: -42", "Answer: 0", "Answer: " + "4" * 18])
def test_a_wrong_integer_is_formatted_and_fails(text):
    assert tasks.verify_arithmetic(SUM, text) == tasks.Verdict(-1.0, False, True, "wrong value", {})


@pytest.mark.parametrize("text", [
    "", "42", "Answer:42", "Answer:  42", "answer: 42", "Answer: 42.", "Answer: 42.0",
    "Answer: +42", "Answer: 042", "Answer: -0", "Answer: 4_2", "Answer: 4 2", "Answer: 42 or 41",
    "Answer: 40 + 2", "Answer: 0x2A", "Answer: 4.2e1", "Answer: \u0664\u0662",
    "Answer: \uff14\uff12", "Answer: 4\u00b2", "Answer: \u221242", "Answer: 42\nso it is",
    "Answer: 41\nAnswer: 42", "ANSWER: 41\nAnswer: 42", "Answer: Answer: 42",
    "<answer>42</answer>", "<answer><answer>Answer: 42</answer></answer>", "The Answer: 42",
    "Answer: **42**", "Answer: 42\u2028", "x\u2028Answer: 42", "Answer: 42\0",
    "Answer: " + "9" * 400, "Answer: 1" + "0" * 18, "Answer: 10**400", "Answer: ", "Answer: None"])
def test_anything_but_one_plain_integer_is_a_format_failure(text):
    """Group L. "41 or 42" must not be paid, nor anything that int() takes but no reader would."""
    verdict = tasks.verify_arithmetic(SUM, text)
    assert (verdict.reward, verdict.passed, verdict.formatted) == (-1.0, False, False)
    assert verdict.reason.startswith("format: ")


def test_negative_numbers_and_zero_are_integers_too():
    for value in ("-7", "0", "999999999999999999"):
        example = tasks.Example("a", "?", f"Reasoning.\nAnswer: {value}", hint=value)
        assert tasks.verify_arithmetic(example, f"Answer: {value}").passed


# =============================================================================================
# Data files
# =============================================================================================

OWN = {"id": "p1", "buggy": BUGGY, "reference": FIXED, "entry_point": "total",
       "tests": [{"args": [[1, 2], 0], "expected": 3}]}
HEAD, BODY = "import math\n\n\ndef f(x):\n    \"\"\"Add one.\"\"\"\n", "    return x + 1\n"
SCRIPT = "def check(f):\n    assert f(1) == 2\n\ncheck(f)"
RAW = {"task_id": "P/0", "prompt": HEAD, "declaration": HEAD, "canonical_solution": BODY,
       "buggy_solution": BODY.replace("+", "-"), "entry_point": "f", "test": SCRIPT,
       "instruction": "Write a function that adds one."}


def written(folder: Path, *rows) -> str:
    """The path of a file with one row a line; a dict is written as JSON, bytes as they are."""
    path = folder / "problems.jsonl"
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_an_own_row_becomes_an_example(tmp_path):
    path = written(tmp_path, OWN, b"", {**OWN, "id": "p2", "instruction": "Repair:"}, b"  \r")
    first, second = tasks.load_edits(path)
    assert first.prompt == f"{tasks.EDIT_PROMPT}\n\n{BUGGY}" and first.hint == FIXED
    assert first.tests == ((([1, 2], 0), 3),) and first.from_json
    assert second.prompt == f"Repair:\n\n{BUGGY}"
    assert tasks.verify_edit(first, FIXED).reward == 1.0


def test_a_script_of_assertions_may_stand_for_tests(tmp_path):
    row = {k: v for k, v in OWN.items() if k != "tests"}
    row["test_code"] = "def check(candidate):\n    assert candidate([1, 2], 0) == 3"
    [example] = tasks.load_edits(written(tmp_path, row))
    assert tasks.verify_edit(example, FIXED).passed
    assert not tasks.verify_edit(example, BUGGY).passed


def test_a_raw_humanevalpack_row_is_accepted_as_published(tmp_path):
    """Its own instruction asks to write the function anew, so it is not used. The script gets the
    helpers of the declaration: an answer that changes its own would deceive it otherwise."""
    [example] = tasks.load_edits(written(tmp_path, RAW))
    assert example.buggy == (HEAD + RAW["buggy_solution"]).strip()
    assert example.prompt == f"{tasks.EDIT_PROMPT}\n\n{example.buggy}"
    assert example.reference == example.hint == (HEAD + BODY).strip()
    assert (example.id, example.entry_point) == ("P/0", "f")
    assert example.test_code == f"{HEAD}{BODY}\n{SCRIPT}"


def test_a_benchmark_row_asks_for_a_whole_function(tmp_path):
    [example] = tasks.load_benchmark(written(tmp_path, RAW))
    assert example.prompt == f"{tasks.PROGRAM_PROMPT}\n\n{HEAD.strip()}"
    right = tasks.verify_program(example, f"```python\n{example.reference}\n```")
    assert right == tasks.Verdict(1.0, True, True, "ok", {})
    assert tasks.verify_program(example, "def f(x):\n    return 1 + x").reward == 1.0
    wrong = tasks.verify_program(example, "def f(x):\n    return x")
    assert (wrong.reward, wrong.formatted) == (-1.0, True)
    body_only = tasks.verify_program(example, BODY)
    assert (body_only.reward, body_only.formatted) == (-1.0, False)


def test_windows_line_ends_change_nothing(tmp_path):
    row = {**OWN, "buggy": BUGGY.replace("\n", "\r\n"), "reference": f"\r\n{FIXED}\r\n"}
    [example] = tasks.load_edits(written(tmp_path, row))
    assert (example.buggy, example.reference) == (BUGGY, FIXED)
    assert tasks.verify_edit(example, FIXED.replace("\n", "\r\n")).reward == 1.0


def without(name: str) -> dict:
    return {key: value for key, value in OWN.items() if key != name}


BAD_ROWS = {
    "cut short": (b'{"id": "p2", "buggy": ', "expected a JSON object in UTF-8"),
    "not JSON": (b"id,buggy,reference", "expected a JSON object"),
    "single quotes": (b"{'id': 1}", "expected a JSON object"),
    "two objects": (b"{} {}", "Extra data"),
    "a list": (b"[]", "expected a JSON object, got a list"),
    "a string": (b'"row"', "got a string"),
    "null": (b"null", "got null"),
    "a number": (b"3", "got a number"),
    "true": (b"true", "got a boolean"),
    "NaN": (b'{"expected": NaN}', "NaN"),
    "Infinity": (b'{"expected": -Infinity}', "Infinity"),
    "deep JSON": (b"[" * 100_000, "expected a JSON object"),
    "a huge integer": (b'{"id": ' + b"9" * 5000 + b"}", "expected a JSON object"),
    "binary": (b"\x00\x01\x02", "expected a JSON object"),
    "Latin-1": ('{"id": "caf\u00e9"}'.encode("latin-1"), "UTF-8"),
    "UTF-16": ('{"id": "x"}'.encode("utf-16"), "UTF-8"),
    "seconds is a string": ({**OWN, "id": "p2", "seconds": "1"}, '"seconds" must be a number'),
    "tolerance is negative": ({**OWN, "id": "p2", "tolerance": -1}, "from 0 to 60, got -1"),
    "its reference fails": ({**OWN, "id": "p2", "tests": [{"args": [[1], 0], "expected": 7}]},
                            'id "p2": its reference must pass its tests, got "test 1: wrong'),
    "its bug passes": ({**OWN, "id": "p2", "tests": [{"args": [[], 3], "expected": 3}]},
                       'id "p2": its buggy function must fail a test'),
    "its script needs numpy": ({**without("tests"), "id": "p2", "test_code": "import numpy\n"
                                "def check(f):\n    assert f([1], 0) == 1"}, "must pass its tests"),
    "its script prints no check": ({**without("tests"), "id": "p2", "test_code": "def check(\n"
                                    "        f):\n    assert f([1], 0) == 1\ncheck(\n    1)"},
                                   "must pass its tests"),
    "NUL in a string": (b'{"id": "a\x00b"}', "expected a JSON object"),
    "too long": (b'{"id": "' + b"x" * 4_000_000 + b'"}', "4,000,000 bytes"),
    "no id": (without("id"), '"id" must be a string, got nothing'),
    "no buggy": (without("buggy"), '"buggy" must be a string, got nothing'),
    "no reference": (without("reference"), '"reference" must be a string, got nothing'),
    "no entry point": (without("entry_point"), '"entry_point" must be a string, got nothing'),
    "no tests": (without("tests"), "got neither"),
    "both tests": ({**OWN, "test_code": SCRIPT}, "got both"),
    "id is a number": ({**OWN, "id": 7}, '"id" must be a string, got a number'),
    "id is blank": ({**OWN, "id": " "}, '"id" must be text'),
    "id is taken": (OWN, 'id "p1" must be unique, line 1 has it'),
    "buggy is a list": ({**OWN, "buggy": []}, '"buggy" must be a string, got a list'),
    "reference is null": ({**OWN, "reference": None}, '"reference" must be a string, got null'),
    "escaped NUL": ({**OWN, "buggy": BUGGY + "\0"}, '"buggy" must be text without NUL'),
    "lone surrogate": ({**OWN, "id": "\ud800"}, '"id" must be text without'),
    "buggy does not parse": ({**OWN, "buggy": "def total(:"}, '"buggy" must hold the source'),
    "reference does not parse": ({**OWN, "reference": "x ="}, '"reference" must hold the source'),
    "buggy is too long": ({**OWN, "buggy": BUGGY + "\n    #" * 9000}, "20,000 bytes"),
    "buggy defines another": ({**OWN, "buggy": "def f(): pass"}, '"buggy" must hold'),
    "reference defines another": ({**OWN, "reference": "def f(): pass"}, "no function total"),
    "entry point is no function": ({**OWN, "entry_point": "items"}, "no function items"),
    "nothing to repair": ({**OWN, "reference": BUGGY}, '"reference" must differ'),
    "tests is a string": ({**OWN, "tests": "assert"}, 'field "tests" must be a list of '
                          '{"args": [...], "expected": ...}, got a string'),
    "tests is an object": ({**OWN, "tests": {}}, "got an object"),
    "tests is empty": ({**OWN, "tests": []}, "got an empty list"),
    "a test is a list": ({**OWN, "tests": [[1, 2]]}, "entry 1 is not one"),
    "a test without args": ({**OWN, "tests": [{"expected": 1}]}, "entry 1 is not one"),
    "a test with keywords": ({**OWN, "tests": [*OWN["tests"], {"args": [], "expected": 1,
                              "kwargs": {}}]}, "entry 2 is not one"),
    "args is a number": ({**OWN, "tests": [{"args": 1, "expected": 1}]}, "entry 1 is not one"),
    "instruction is a number": ({**OWN, "instruction": 1}, '"instruction" must be a string'),
    "script without check": ({**without("tests"), "test_code": "assert True"}, "check(candidate)"),
    "raw row without declaration": ({k: v for k, v in RAW.items() if k != "declaration"},
                                    '"declaration" must be a string, got nothing'),
    "raw row without test": ({**RAW, "test": 1}, '"test" must be a string, got a number'),
    "raw row that does not parse": ({**RAW, "buggy_solution": "    return ("},
                                    '"buggy_solution" must hold the source'),
}


def test_gzip_and_a_byte_order_mark_are_read_as_what_they_are(tmp_path):
    text = json.dumps(OWN).encode()
    marked = b"\xef\xbb\xbf" + text
    for data in (marked, gzip.compress(text), gzip.compress(marked)):
        (tmp_path / "rows").write_bytes(data)
        assert [example.id for example in tasks.load_edits(str(tmp_path / "rows"))] == ["p1"]
    (tmp_path / "rows").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(tasks.LoadError, match="cannot be read"):
        tasks.load_edits(str(tmp_path / "rows"))


def test_bad_rows_are_listed_for_those_who_go_on_without_them(tmp_path):
    bad = {**OWN, "id": "p2", "tests": [{"args": [[1], 0], "expected": 7}]}
    refused: list[str] = []
    assert [e.id for e in tasks.load_edits(written(tmp_path, OWN, b"{", bad), refused)] == ["p1"]
    assert [sentence.split(": ")[0].split()[-1] for sentence in refused] == ["2", "3"]
    with pytest.raises(tasks.LoadError, match="no usable row"):
        tasks.load_edits(written(tmp_path, bad), refused)


def test_seconds_tolerance_and_names_of_a_row(tmp_path):
    """A row may ask for more time and less precision; names compare as Python compares them."""
    row = {"id": "r", "buggy": "def \ufb01(x):\n    return x / 2", "entry_point": "\ufb01",
           "reference": "def \ufb01(x):\n    return x / 3", "seconds": 3, "tolerance": 1e-4,
           "tests": [{"args": [1], "expected": 0.3333}]}
    [example] = tasks.load_edits(written(tmp_path, row))
    assert (example.seconds, example.tolerance, example.entry_point) == (3.0, 1e-4, "fi")
    assert tasks.verify_edit(example, "def fi(x):\n    return x / 3").passed


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_stops_with_file_line_field_and_expectation(case, tmp_path):
    row, says = BAD_ROWS[case]
    path = written(tmp_path, {**OWN, "id": "p1"}, b"", row)
    with pytest.raises(tasks.LoadError) as error:
        tasks.load_edits(path)
    message = str(error.value)
    assert message.startswith(f"{path} line 3: ") and says in message
    assert "\n" not in message and len(message) < len(path) + 250


@pytest.mark.parametrize("row, says", [
    ({k: v for k, v in RAW.items() if k != "prompt"}, '"prompt" must be a string, got nothing'),
    ({**RAW, "prompt": "def f(x):\n"}, '"prompt" must hold the source'),
    ({**RAW, "canonical_solution": "  return 1"}, '"canonical_solution" must hold the source'),
    ({**RAW, "entry_point": "g"}, "no function g"),
    ({**RAW, "task_id": 3}, '"task_id" must be a string, got a number'),
    (OWN, '"prompt" must be a string, got nothing')])
def test_a_bad_benchmark_row_stops_too(row, says, tmp_path):
    with pytest.raises(tasks.LoadError, match="problems.jsonl line 1: ") as error:
        tasks.load_benchmark(written(tmp_path, row))
    assert says in str(error.value)


@pytest.mark.parametrize("name, content", [
    ("empty.jsonl", b""), ("blank.jsonl", b"\n \n\r\n"), ("missing.jsonl", None), (".", None),
    ("nul\0.jsonl", None)])
def test_a_file_without_rows_is_named(name, content, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tasks.LoadError, match="expected"):
        tasks.load_edits(str(path))
