"""Real models: every claim on small random models of the architectures people use, no network."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tasks
import vcopd

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
def small(tmp_path_factory):
    """Folders of the supported architectures, made once."""
    return {kind: save_small(tmp_path_factory.mktemp(kind) / "model", kind) for kind in SUPPORTED}


def config(model: str, **options) -> vcopd.Config:
    """Small sizes, and float32."""
    return vcopd.Config(**{"model": model, "device": "cpu", "lora_rank": 4, "lora_alpha": 8.0,
                           "format_rank": 2, "max_new_tokens": 12, **options})


def moved_policy(cfg: vcopd.Config) -> vcopd.Policy:
    """A policy after Step 1 and training, as far as its adapters are concerned: both do much."""
    policy = vcopd.load_policy(cfg, None)
    vcopd.add_format_adapter(policy, cfg)
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
def test_the_exported_adapter_gives_the_same_logits_in_peft(kind, small, tmp_path):
    """Format and policy adapter leave as one: the sum of two low ranks is one low rank."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    policy = moved_policy(config(small[kind]))
    vcopd.export_adapter(tmp_path / "adapter", policy)
    base = AutoModelForCausalLM.from_pretrained(small[kind])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = logits_of(policy, policy.student)
    assert (ours - logits_of(policy, vcopd.BASE)).abs().max() > 0.1
    assert torch.allclose(theirs(IDS).logits[0], ours, atol=1e-5)


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_merged_model_is_plain_and_gives_the_same_logits(kind, quantize, small, tmp_path):
    """People take the result to tools that know no adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if (kind, quantize) == ("gpt2", "nf4"):
        with pytest.raises(vcopd.RunError, match="gpt2, whose Conv1D"):
            vcopd.load_policy(config(small[kind], quantize=quantize), None)
        return
    policy = moved_policy(config(small[kind], quantize=quantize))
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
def test_a_peft_folder_made_elsewhere_is_a_specialist_teacher(options, small, tmp_path):
    """Also with fewer layers, with ranks that differ, and with rank-stabilised scaling."""
    folder = peft_folder(small["llama"], tmp_path / "adapter", **options)
    policy = vcopd.load_policy(config(small["llama"], teacher=str(folder)), None)
    assert policy.teacher == (policy, ("specialist",))
    expected = peft_logits(small["llama"], folder)
    assert torch.allclose(logits_of(policy, ("specialist",)), expected, atol=1e-5)
    assert torch.equal(logits_of(policy, policy.student), logits_of(policy, vcopd.BASE))
    assert not any(p.requires_grad for p in vcopd.adapter_parameters(policy.model, "specialist"))


def test_a_peft_folder_as_the_model_is_where_training_starts(small, tmp_path):
    """It is frozen into the reference, and what is exported is the whole way from its base."""
    folder = peft_folder(small["llama"], tmp_path / "start", rank_pattern={"v_proj": 2})
    expected = peft_logits(small["llama"], folder)
    policy = vcopd.load_policy(config(str(folder)), None)
    assert policy.reference == ("start",) and policy.student == ("start", "policy")
    assert torch.allclose(logits_of(policy, policy.student), expected, atol=1e-5)
    policy = moved_policy(config(str(folder)))
    assert policy.student == ("start", "format", "policy")
    vcopd.export_adapter(tmp_path / "adapter", policy)
    assert torch.allclose(peft_logits(small["llama"], tmp_path / "adapter"),
                          logits_of(policy, policy.student), atol=1e-5)


@pytest.mark.parametrize("options, named", [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"alpha_pattern": {"v_proj": 2}}, "alpha_pattern")])
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(options, named, small, tmp_path):
    """Loading it as if it were would be a wrong teacher that nobody notices."""
    folder = peft_folder(small["llama"], tmp_path / "adapter", **options)
    with pytest.raises(vcopd.RunError, match=f"not plain LoRA: {named}"):
        vcopd.load_policy(config(small["llama"], teacher=str(folder)), None)


def test_an_adapter_for_another_model_is_refused(small, tmp_path):
    """Other sizes, other layer names, and no weights at all."""
    wide = save_small(tmp_path / "wide", intermediate_size=64)
    folder = peft_folder(wide, tmp_path / "adapter")
    with pytest.raises(vcopd.RunError, match="made for another model: .*down_proj"):
        vcopd.load_policy(config(small["llama"], teacher=str(folder)), None)
    folder = peft_folder(small["llama"], tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(vcopd.RunError, match="adapts base_model.model.lm_head"):
        vcopd.load_policy(config(small["llama"], teacher=str(folder)), None)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(vcopd.RunError, match="adapter_model.safetensors cannot be read"):
        vcopd.load_policy(config(small["llama"], teacher=str(folder)), None)


# ------------------------------------------------------------------- teachers


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("teacher", ["self", "stronger"])
def test_a_teacher_who_is_the_student_with_the_same_prompt_has_no_gap(kind, teacher, small,
                                                                      monkeypatch):
    """Exactly 0 on every token, whatever the architecture: contexts and tokens are aligned."""
    cfg = config(small[kind], teacher=small[kind] if teacher == "stronger" else "self")
    policy = vcopd.load_policy(cfg, None)
    monkeypatch.setattr(tasks, "privileged_prompt", lambda example: example.prompt)
    examples = [tasks.Example("", prompt, "", "") for prompt in ("def f(x):", "x" * 40)]
    prompts = [policy.encode(example.prompt) for example in examples]
    batch = vcopd.sample(policy, policy.student, prompts, 2, cfg, vcopd.seeded("rollouts"))
    parts = vcopd.ask_reference(policy, batch, torch.zeros(4), cfg)
    rows = [example for example in examples for _ in range(2)]
    for part in parts:
        part.logp_teacher = vcopd.ask_teacher(policy, part, rows, cfg)
    state = vcopd.State(torch.optim.Adam(vcopd.adapter_parameters(policy.model, "policy")), 0.01)
    vcopd.update(policy, parts, None, state, cfg)
    for part in parts:
        assert part.logp_old[part.batch.mask].abs().min() > 0
        assert torch.equal(part.gap, torch.zeros_like(part.gap))


def test_a_stronger_teacher_reads_the_prompt_in_its_own_template(small, tmp_path, monkeypatch):
    """Same ids, another chat template: each model is asked in the form that it knows."""
    other = small_tokenizer(template=CHATML.replace("<|user|>", "<|user|>Please: "))
    folder = save_small(tmp_path / "teacher", hidden_size=64, tokenizer=other)
    policy = vcopd.load_policy(config(small["llama"], teacher=folder), None)
    seen, scoring = [], vcopd.completion_hidden
    monkeypatch.setattr(vcopd, "completion_hidden", lambda policy, role, batch: (
        seen.append(batch.contexts[0]), scoring(policy, role, batch))[1])
    batch = rollouts(policy, config(small["llama"]))
    part = vcopd.ask_reference(policy, batch, torch.zeros(4), config(small["llama"]))[0]
    example = tasks.Example("", "question", "", "the secret")
    vcopd.ask_teacher(policy, part, [example] * 4, config(small["llama"]))
    text = policy.tokenizer.decode(seen[-1])
    assert text.startswith("<|user|>Please: question") and "the secret" in text


def test_a_teacher_with_another_tokenizer_is_refused(small, tmp_path):
    """Its probabilities would be about other tokens."""
    other = vcopd.train_tokenizer(["another text"], 300)
    folder = save_small(tmp_path / "teacher", tokenizer=other)
    with pytest.raises(vcopd.RunError, match="another tokenizer than the student"):
        vcopd.load_policy(config(small["llama"], teacher=folder), None)


# ------------------------------------------------------------------- prompts and stop tokens


@pytest.mark.parametrize("kind", ["template writes it", "template leaves it out", "no template"])
def test_a_prompt_begins_with_exactly_one_bos(kind, small):
    """A template may write BOS, and so may the tokenizer: twice is as wrong as never."""
    template = {"template writes it": "{{ bos_token }}" + CHATML,
                "template leaves it out": CHATML, "no template": None}[kind]
    tokenizer = small_tokenizer(bos=True, template=template)
    policy = replace(vcopd.load_policy(config(small["llama"]), None), tokenizer=tokenizer)
    example = tasks.Example("", "def f(x):", "return", "a hint")
    for prompt in (example.prompt, tasks.privileged_prompt(example)):
        ids = policy.encode(prompt)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert prompt in tokenizer.decode(ids)
    no_bos = replace(policy, tokenizer=small_tokenizer(bos=False, template=template))
    assert no_bos.encode("def")[0] != tokenizer.bos_token_id


def test_thinking_is_switched_off_where_a_template_offers_it(small):
    """Qwen3 would think for longer than the longest answer; the format asks for the answer."""
    template = CHATML + "{% if enable_thinking is sameas(false) %}!{% endif %}"
    policy = replace(vcopd.load_policy(config(small["llama"]), None),
                     tokenizer=small_tokenizer(template=template))
    assert policy.tokenizer.decode(policy.encode("Q")).endswith("<|assistant|>!")


def test_every_stop_token_is_known_and_sft_teaches_the_end_of_turn(tmp_path):
    """As with Llama 3 and Gemma: tokenizer, template and generation config name different ones,
    and the smallest id is not the one that ends an answer."""
    folder = save_small(tmp_path / "model", eos_token_id=[0, 3])
    policy = vcopd.load_policy(config(folder), None)
    end = policy.tokenizer.convert_tokens_to_ids("<|end|>")
    assert policy.stop_ids.tolist() == [end, 0, 3]
    batch = vcopd.reference_batch(policy, [tasks.Example("", "Q", "return x", "")])
    assert batch.completion[0, -1] == end and batch.mask.all()
    assert policy.decode(batch) == ["return x"]
    plain = small_tokenizer(template=None)
    assert vcopd.stop_tokens(plain, policy.model.generation_config) == [0, 3]


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    """No answer could end, and padding would have no id."""
    folder = save_small(tmp_path / "model", tokenizer=small_tokenizer(eos=False))
    with pytest.raises(vcopd.RunError, match="without an end-of-sequence token"):
        vcopd.load_policy(config(folder), None)


def test_decoding_does_not_tidy_up_code(small):
    """Tokenizers that clean up spaces turn `a != b` into `a!= b`."""
    tokenizer = small_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    policy = replace(vcopd.load_policy(config(small["llama"]), None), tokenizer=tokenizer)
    ids = torch.tensor([tokenizer("a != b , c").input_ids])
    batch = vcopd.Batch([[1]], ids, torch.ones_like(ids, dtype=torch.bool))
    assert policy.decode(batch) == ["a != b , c"]


# ------------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize("kind, why", [
    ("mixtral", "mixtral, .*layers.0.mlp.*fused experts"), ("mamba", "mamba, .*state spaces"),
    ("cohere", "cohere, .*logits differ"), ("granite", "granite, .*logits differ"),
    ("bert", "bert, .*logits differ"), ("t5", "not a causal language model")])
def test_an_architecture_that_is_not_supported_is_refused_by_name(kind, why, tmp_path):
    """Before anything is trained wrongly: the start-up check knows what the code relies on."""
    folder = save_small(tmp_path / "model", kind)
    with pytest.raises(vcopd.RunError, match=why):
        vcopd.load_policy(config(folder), None)


def test_weights_that_are_missing_are_not_drawn_at_random(small, tmp_path):
    """transformers only warns."""
    from safetensors.torch import load_file, save_file
    folder = Path(save_small(tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(vcopd.RunError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        vcopd.load_policy(config(str(folder)), None)


@pytest.mark.parametrize("name, why", [
    ("empty", "the folder holds no config.json"),
    ("./nowhere/at/all", "there is no such folder, and it is no Hugging Face id")])
def test_a_model_that_is_not_there_is_one_sentence(name, why, tmp_path, monkeypatch):
    """And it says what can be given instead."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(vcopd.RunError, match=f"{name} cannot be loaded: {why}; give tiny"):
        vcopd.load_policy(config(name), None)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_one_sentence(file, tmp_path):
    """Half a download, say."""
    folder = Path(save_small(tmp_path / "model"))
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(vcopd.RunError, match=f"{folder} cannot be loaded: .*; give tiny") as error:
        vcopd.load_policy(config(str(folder)), None)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """As the user sees it: no traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cfg = config("owner/name", task="arithmetic", out=str(tmp_path / "run"))
    assert vcopd.main(cfg, False) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("vcopd.py: owner/name cannot be loaded: ") and shown.count("\n") == 1


def test_memory_is_estimated_before_loading_and_refused_only_when_hopeless(small, monkeypatch,
                                                                            capsys):
    """The estimate of weights and adapters is exact; that of activations is an upper bound."""
    cfg = config(small["qwen2"])
    policy = vcopd.load_policy(cfg, None)
    _, plan = vcopd.read_plan(small["qwen2"])
    needed = vcopd.memory_needed(plan, torch.float32, cfg)
    adapters = vcopd.named_adapters(policy.model)
    assert needed["adapters and optimiser"] == 4 * sum(4 * p.numel() for p in adapters.values())
    frozen = [p for name, p in policy.model.named_parameters() if name not in adapters]
    assert needed["weights"] == sum(4 * p.numel() for p in frozen)
    monkeypatch.setattr(vcopd, "free_memory", lambda device: sum(needed.values()) / 1.5)
    vcopd.load_policy(cfg, None)
    monkeypatch.setattr(vcopd, "free_memory", lambda device: 100_000)
    with pytest.raises(vcopd.RunError, match="are free: lower --micro-tokens, try --quantize nf4"):
        vcopd.load_policy(cfg, None)


# ------------------------------------------------------------------- activations, and NF4


@pytest.mark.parametrize("kind", SUPPORTED)
def test_recomputed_layers_give_the_same_gradients(kind, small, monkeypatch):
    """The backward pass computes layers again when their adapters are long switched off."""
    cfg, gradients = config(small[kind]), []
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


def test_all_roles_work_on_a_quantised_base(small, tmp_path):
    """Only attention and MLP are quantised; format, specialist and policy act on top."""
    folder = peft_folder(small["llama"], tmp_path / "adapter")
    policy = moved_policy(config(small["llama"], quantize="nf4", teacher=str(folder)))
    assert all(isinstance(layer.base, vcopd.NF4Linear)
               for layer in vcopd.lora_layers(policy.model).values())
    facts = vcopd.environment(policy)
    plain = vcopd.load_policy(config(small["llama"]), None)
    assert facts["frozen_parameters"] == vcopd.environment(plain)["frozen_parameters"]
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


def test_eval_only_scores_an_adapter_on_a_data_file_and_trains_nothing(small, tmp_path, capsys):
    """The same table, without a before; the KL says how far the adapter is from its base."""
    files = own_data(tmp_path)
    folder = peft_folder(small["llama"], tmp_path / "adapter")
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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"report.json"}
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


@pytest.mark.parametrize("arguments", [["--merge", "F"], ["--steps", "3"], ["--teacher", "none"]])
def test_what_only_training_needs_is_refused_with_eval_only(arguments, capsys):
    """An option that would do nothing misleads."""
    with pytest.raises(SystemExit):
        vcopd.read_config(["--eval-only", *arguments])
    assert f"{arguments[0]} does nothing with --eval-only" in capsys.readouterr().err
