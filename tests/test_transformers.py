"""Hidden states and heads of transformers LMs: the logits rebuilt from them, and their gradients, are the model's own."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from distilkernels.integrations import transformers as integration  # noqa: E402
from distilkernels.integrations.transformers import check, hidden_and_head  # noqa: E402

# V is a prime, so that no axis can stand for another
V = 97
GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LLAMA = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
DEFAULTS = dict(LLAMA, head_dim=8)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)

# class, its config, what it does to the logits; scales far from 1 and softcaps far below the logits, so that leaving one out shows
FAMILIES = {
    "llama": ("LlamaForCausalLM", LLAMA, {}),
    "llama-tied": ("LlamaForCausalLM", dict(LLAMA, tie_word_embeddings=True), {}),
    "mistral": ("MistralForCausalLM", LLAMA, {}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, {}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        dict(LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16), {},
    ),
    "qwen3": ("Qwen3ForCausalLM", DEFAULTS, {}),
    "qwen3-tied": ("Qwen3ForCausalLM", dict(DEFAULTS, tie_word_embeddings=True), {}),
    "gemma": ("GemmaForCausalLM", DEFAULTS, {}),
    "gemma2": ("Gemma2ForCausalLM", dict(DEFAULTS, final_logit_softcapping=0.7), dict(softcap=0.7)),
    "gemma2-uncapped": ("Gemma2ForCausalLM", dict(DEFAULTS, final_logit_softcapping=None), dict(softcap=None)),
    "gemma3": ("Gemma3ForCausalLM", dict(DEFAULTS, final_logit_softcapping=0.7), dict(softcap=0.7)),
    "granite": ("GraniteForCausalLM", dict(LLAMA, logits_scaling=3.0), dict(logit_scale=1 / 3)),
    "granite-moe": ("GraniteMoeForCausalLM", dict(LLAMA, **MOE, logits_scaling=3.0), dict(logit_scale=1 / 3)),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        dict(LLAMA, **MAMBA, **MOE, layer_types=["mamba", "attention"], shared_intermediate_size=32, logits_scaling=3.0),
        dict(logit_scale=1 / 3),
    ),
    "cohere": ("CohereForCausalLM", dict(LLAMA, logit_scale=0.25), dict(logit_scale=0.25)),
    "cohere2": ("Cohere2ForCausalLM", dict(LLAMA, logit_scale=0.25), dict(logit_scale=0.25)),
    "gpt2": ("GPT2LMHeadModel", GPT, {}),
    "gptj": ("GPTJForCausalLM", dict(GPT, rotary_dim=4), dict(bias=True)),
    "gpt-neox": ("GPTNeoXForCausalLM", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, {}),
    "phi": ("PhiForCausalLM", LLAMA, dict(bias=True)),
    "phi3": ("Phi3ForCausalLM", LLAMA, {}),
    "olmo": ("OlmoForCausalLM", LLAMA, {}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA, {}),
    "opt-projected": (
        "OPTForCausalLM",
        dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64,
             word_embed_proj_dim=16, dropout=0.0),
        {},
    ),
    "bloom": ("BloomForCausalLM", dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0), {}),
    "mamba": ("MambaForCausalLM", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8), {}),
    "falcon-h1": (
        "FalconH1ForCausalLM", dict(LLAMA, **MAMBA, mamba_d_ssm=64, head_dim=8, lm_head_multiplier=0.5), dict(logit_scale=0.5),
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, lru_width=32, intermediate_size=64,
             attention_window_size=8, logits_soft_cap=0.7),
        dict(softcap=0.7),
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        dict(DEFAULTS, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=V, num_kv_shared_layers=0,
             layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=0.7),
        dict(softcap=0.7),
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        dict(LLAMA, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
             dim_model_base=8),
        {},
    ),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, dict(bias=True)),
}  # fmt: skip


def build(name: str, config: dict, **more):
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = cls(cls.config_class(**config, **more)).eval()
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=0.3)
    if head.bias is not None:
        nn.init.normal_(head.bias, std=0.5)
    return model


def rebuilt(head):
    z = head.hidden @ head.weight.mT
    z = (z if head.bias is None else z + head.bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def batch():
    """Two rows, the second padded on the right by two tokens."""
    ids = torch.randint(3, V, (2, 7))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(1)
    return build("LlamaForCausalLM", LLAMA)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_the_models_own(name):
    cls, config, expected = FAMILIES[name]
    model, inputs = build(cls, config), batch()
    head = hidden_and_head(model, **inputs)
    lm_head = model.get_output_embeddings()
    assert head.weight is lm_head.weight and head.bias is lm_head.bias
    assert (head.bias is not None) == expected.get("bias", False)
    assert head.logit_scale == pytest.approx(expected.get("logit_scale", 1.0)) and head.softcap == expected.get("softcap")
    assert head.head_kwargs() == {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    logits, kept = model(**inputs).logits, inputs["attention_mask"].bool()
    z = rebuilt(head)
    assert (z - logits)[kept].abs().max() <= 1e-5
    if head.logit_scale != 1 or head.softcap is not None:
        assert (head.hidden @ head.weight.mT - logits)[kept].abs().max() > 0.1
    assert check(model, **inputs) <= 1e-5

    direction = torch.randn_like(logits) * kept[..., None] / kept.sum()
    early = next(p for n, p in model.named_parameters() if ".0." in n and p.dim() == 2)
    wanted = [lm_head.weight, early] + ([] if head.bias is None else [head.bias])
    for ours, theirs in zip(torch.autograd.grad((z * direction).sum(), wanted), torch.autograd.grad((logits * direction).sum(), wanted)):
        assert theirs.abs().max() > 1e-6 and (ours - theirs).abs().max() <= 1e-5


def test_a_tied_head_is_the_embedding():
    cls, config, _ = FAMILIES["qwen3-tied"]
    model = build(cls, config)
    assert hidden_and_head(model, **batch()).weight is model.get_input_embeddings().weight


def test_the_base_models_inputs_pass_through(llama):
    inputs = batch()
    ids = inputs["input_ids"]
    embedded = hidden_and_head(llama, inputs_embeds=llama.get_input_embeddings()(ids), output_hidden_states=True)
    assert len(embedded.outputs.hidden_states) == 3
    plain = hidden_and_head(llama, input_ids=ids)
    torch.testing.assert_close(embedded.hidden, plain.hidden)

    # two packed sequences in a row, which transformers tells apart only without a cache: the model's choice, either way
    packed = torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(2, 7)
    for use_cache in ({}, {"use_cache": False}):
        ours = rebuilt(hidden_and_head(llama, input_ids=ids, position_ids=packed, **use_cache))
        torch.testing.assert_close(ours, llama(input_ids=ids, position_ids=packed, **use_cache).logits, rtol=0, atol=1e-5)
    assert hidden_and_head(llama, input_ids=ids, use_cache=False).outputs.past_key_values is None

    first = hidden_and_head(llama, input_ids=ids[:, :4], use_cache=True)
    rest = hidden_and_head(llama, input_ids=ids[:, 4:], past_key_values=first.outputs.past_key_values)
    torch.testing.assert_close(torch.cat([first.hidden, rest.hidden], 1), plain.hidden, rtol=0, atol=1e-5)


def test_left_padding(llama):
    ids = torch.randint(3, V, (1, 5))
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), torch.tensor([[0] * 3 + [1] * 5])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = hidden_and_head(llama, input_ids=padded, attention_mask=mask, position_ids=positions).hidden[:, 3:]
    torch.testing.assert_close(ours, hidden_and_head(llama, input_ids=ids).hidden, rtol=0, atol=1e-5)


def test_training_mode_and_gradient_checkpointing():
    model, inputs = build("LlamaForCausalLM", LLAMA), batch()
    grads = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rebuilt(hidden_and_head(model, **inputs)).square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        model.zero_grad()
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_bfloat16_hidden_states_keep_their_dtype():
    model = build("Gemma2ForCausalLM", FAMILIES["gemma2"][1]).bfloat16()
    head = hidden_and_head(model, **batch())
    assert head.hidden.dtype == head.weight.dtype == torch.bfloat16
    check(model, **batch())


def test_check_puts_the_modes_back_and_refuses_caches(llama):
    llama.train()
    llama.lm_head.eval()
    check(llama, **batch())
    assert llama.training and llama.model.training and not llama.lm_head.training
    llama.eval()
    with pytest.raises(ValueError, match="past_key_values"):
        check(llama, input_ids=batch()["input_ids"], past_key_values=transformers.DynamicCache())


def test_a_forward_nobody_knows_is_refused_until_checked():
    class Custom(transformers.LlamaForCausalLM):
        factor = 1.0

        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * self.factor
            return output

    class Renamed(transformers.LlamaForCausalLM):
        pass

    config = transformers.LlamaConfig(**LLAMA)
    hidden_and_head(Renamed(config), **batch())
    model = Custom(config)
    with pytest.raises(ValueError, match=r"Custom: .*check\(model"):
        hidden_and_head(model, **batch())
    model.factor = 1.5
    with pytest.raises(ValueError, match="Custom: logits from hidden states and head differ"):
        check(model, **batch())
    model.factor = 1.0
    check(model, **batch())
    hidden_and_head(model, **batch())


@pytest.mark.parametrize("name", ["labels", "logits_to_keep", "num_logits_to_keep", "return_dict", "adapter_names"])
def test_inputs_that_belong_elsewhere_are_named(llama, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        hidden_and_head(llama, **batch(), **{name: 1})


def test_models_that_do_not_fit_are_named(llama):
    with pytest.raises(TypeError, match="str"):
        hidden_and_head("gpt2")
    with pytest.raises(ValueError, match="Linear: model must be"):
        hidden_and_head(nn.Linear(2, 2))
    small = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
    roberta = transformers.RobertaForCausalLM(transformers.RobertaConfig(**small, is_decoder=True))
    with pytest.raises(ValueError, match="RobertaForCausalLM: its head is an MLP"):
        hidden_and_head(roberta, **batch())
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        hidden_and_head(classifier, **batch())

    class Quantized(nn.Linear):
        def forward(self, x):
            return super().forward(x.round())

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.lm_head = Quantized(32, V, bias=False)
    with pytest.raises(ValueError, match="plain linear layer; got Quantized"):
        hidden_and_head(model, **batch())
    model.lm_head = nn.Linear(32, V, bias=False, device="meta")
    with pytest.raises(ValueError, match="offloaded"):
        hidden_and_head(model, **batch())
    # a ZeRO-3 or FSDP shard outside its gather: an empty or flat parameter
    model.lm_head = nn.Linear(32, V, bias=False)
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"weight \[V, 32\].*got \(0,\)"):
        hidden_and_head(model, **batch())


def test_compile_and_data_parallel_wrappers_are_looked_through(llama, tmp_path):
    inputs = batch()
    expected = hidden_and_head(llama, **inputs).hidden
    assert torch.equal(hidden_and_head(torch.compile(llama), **inputs).hidden, expected)
    assert torch.equal(hidden_and_head(nn.DataParallel(llama), **inputs).hidden, expected)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(llama)
        assert torch.equal(hidden_and_head(ddp, **inputs).hidden, expected)
        ddp.process_group = types.SimpleNamespace(size=lambda: 2)
        with pytest.raises(ValueError, match="would not be averaged"):
            hidden_and_head(ddp, **inputs)
        with torch.no_grad():
            hidden_and_head(ddp, **inputs)
        with ddp.no_sync():
            hidden_and_head(ddp, **inputs)
    finally:
        torch.distributed.destroy_process_group()

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        hidden_and_head(FullyShardedDataParallel(), **inputs)


def test_inside_a_compiled_step(llama):
    ids = batch()["input_ids"]

    def step(ids):
        return rebuilt(hidden_and_head(llama, input_ids=ids, use_cache=False))

    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(ids), step(ids))


class Peft(nn.Module):
    """What a PEFT wrapper looks like from outside: its own forward, and get_base_model."""

    def __init__(self, model, config=None):
        super().__init__()
        self.inner = model
        self.active_peft_config = config

    def get_base_model(self):
        return self.inner


class Adapter(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


class ModulesToSave(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.original_module, self.modules_to_save = module, nn.ModuleDict({"default": nn.Linear(32, V, bias=False)})
        self.active_adapters, self.disable_adapters = ["default"], False


def test_peft_wrappers():
    inputs = batch()
    model = build("LlamaForCausalLM", LLAMA)
    expected = hidden_and_head(model, **inputs)
    assert torch.equal(hidden_and_head(torch.compile(Peft(model)), **inputs).hidden, expected.hidden)
    with pytest.raises(ValueError, match="prompt learning"):
        hidden_and_head(Peft(model, types.SimpleNamespace(is_prompt_learning=True)), **inputs)
    with pytest.raises(ValueError, match="activated LoRA"):
        hidden_and_head(Peft(model, types.SimpleNamespace(alora_invocation_tokens=[1])), **inputs)

    plain, model.lm_head = model.lm_head, ModulesToSave(model.lm_head)
    assert hidden_and_head(Peft(model), **inputs).weight is model.lm_head.modules_to_save["default"].weight
    model.lm_head.disable_adapters = True
    assert hidden_and_head(Peft(model), **inputs).weight is plain.weight
    model.lm_head = Adapter(plain)
    with pytest.raises(ValueError, match="lm_head carries an adapter"):
        hidden_and_head(Peft(model), **inputs)


def test_peft_itself():
    peft = pytest.importorskip("peft")
    inputs = batch()

    def wrapped(**options):
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options)
        return peft.get_peft_model(build("LlamaForCausalLM", LLAMA), lora)

    model = wrapped(target_modules=["q_proj", "v_proj"])
    head, logits = hidden_and_head(model, **inputs), model(**inputs).logits
    torch.testing.assert_close(rebuilt(head), logits, rtol=0, atol=1e-5)
    adapter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    direction = torch.randn_like(logits)
    for ours, theirs in zip(*(torch.autograd.grad((z * direction).mean(), [adapter]) for z in (rebuilt(head), logits))):
        assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= 1e-5
    with model.disable_adapter():
        torch.testing.assert_close(rebuilt(hidden_and_head(model, **inputs)), model(**inputs).logits, rtol=0, atol=1e-5)

    whole = wrapped(target_modules=["q_proj"], modules_to_save=["lm_head"])
    nn.init.normal_(whole.get_base_model().lm_head.modules_to_save["default"].weight)
    head = hidden_and_head(whole, **inputs)
    assert head.weight.requires_grad
    torch.testing.assert_close(rebuilt(head), whole(**inputs).logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="lm_head carries an adapter"):
        hidden_and_head(wrapped(target_modules=["q_proj", "lm_head"]), **inputs)
    prompted = peft.get_peft_model(build("LlamaForCausalLM", LLAMA), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt learning"):
        hidden_and_head(prompted, **inputs)


def test_transformers_is_imported_by_nobody_but_the_user():
    code = "import sys, distilkernels, distilkernels.integrations.transformers as t; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tables_do_not_overlap():
    assert not set(integration.FAMILIES) & set(integration.UNSUPPORTED)
