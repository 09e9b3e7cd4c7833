"""The hidden states and the head of a transformers causal LM, without its logits: what the linear-fused losses take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..primitives.head import Head


class HiddenAndHead(NamedTuple):
    """What a causal LM computes its logits from: ``z = (hidden Wᵀ + bias)·logit_scale``, then ``softcap·tanh(z / softcap)``.

    ``hidden`` [B, T, H] is what lm_head receives, in the model's dtype. ``weight`` [V, H] and ``bias`` [V] or None are the
    model's own Parameters, so that gradients reach them. ``outputs`` is the base model's output: past_key_values,
    hidden_states, attentions, router_logits where they were asked for.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    outputs: Any

    def head_kwargs(self) -> dict[str, Any]:
        """``dict(bias=, logit_scale=, softcap=)``, for a loss called as ``loss(h.hidden, h.weight, ..., **h.head_kwargs())``."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


class Family(NamedTuple):
    """How a model class gets from its base model's output to its logits; each field is a function of the causal LM.

    ``logit_scale(lm)`` multiplies the logits, ``softcap(lm)`` bounds them (None: it does not), ``before_head(lm, hidden)``
    is applied to the base model's last hidden states.
    """

    logit_scale: Callable[[Any], float] | None = None
    softcap: Callable[[Any], float | None] | None = None
    before_head: Callable[[Any, Tensor], Tensor] | None = None


# By the class that defines forward, because the way to the logits is a property of that code: subclasses inherit it.
# These hand the base model's output to lm_head and return what it gives, in transformers 4.56 and 5.23 alike.
FAMILIES: dict[str, Family] = dict.fromkeys(
    """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AriaTextForCausalLM AXK1ForCausalLM AXK2ForCausalLM BailingHybridForCausalLM
    BambaForCausalLM BartForCausalLM BertGenerationDecoder BigBirdPegasusForCausalLM BioGptForCausalLM BitNetForCausalLM
    BlenderbotForCausalLM BlenderbotSmallForCausalLM BloomForCausalLM CodeGenForCausalLM CpmAntForCausalLM CTRLLMHeadModel
    CwmForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM DiffLlamaForCausalLM
    DogeForCausalLM Dots1ForCausalLM Emu3ForCausalLM Ernie4_5_MoeForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM
    ExaoneMoeForCausalLM FalconForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM FlintForCausalLM GemmaForCausalLM
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmForCausalLM GlmMoeDsaForCausalLM GPT2LMHeadModel
    GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM GPTNeoXJapaneseForCausalLM GptOssForCausalLM
    HeliumForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HYV3ForCausalLM HYV4ForCausalLM
    Jais2ForCausalLM JambaForCausalLM JetMoeForCausalLM Kolibri1ForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
    Lfm3ForCausalLM Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM Mamba2ForCausalLM MambaForCausalLM MarianForCausalLM
    MBartForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM
    Ministral3ForCausalLM MinistralForCausalLM MistralForCausalLM MixtralForCausalLM MllamaForCausalLM MoshiForCausalLM MptForCausalLM
    MvpForCausalLM NemotronForCausalLM NemotronHForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoeForCausalLM OlmoForCausalLM
    OlmoHybridForCausalLM OpenAIGPTLMHeadModel OPTForCausalLM PegasusForCausalLM PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM
    PhimoeForCausalLM PLBartForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM RwkvForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM SolarOpenForCausalLM
    StableLmForCausalLM Starcoder2ForCausalLM TrOCRForCausalLM XGLMForCausalLM YoutuForCausalLM Zamba2ForCausalLM ZambaForCausalLM
    ZayaForCausalLM
    """.split(),
    Family(),
)

_softcapped = Family(softcap=lambda lm: _text_config(lm).final_logit_softcapping)
_multiplied = Family(logit_scale=lambda lm: lm.logit_scale)
_divided = Family(logit_scale=lambda lm: 1.0 / lm.config.logits_scaling)

FAMILIES.update(
    dict.fromkeys("CohereForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereCompassForCausalLM".split(), _multiplied)
    | dict.fromkeys(
        """
        GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM
        GraniteSWAForCausalLM
        """.split(),
        _divided,
    )
    | dict.fromkeys(
        """
        BeamForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM
        Gemma4ForConditionalGeneration Gemma4UnifiedForCausalLM Gemma4UnifiedForConditionalGeneration NanoChatForCausalLM
        VaultGemmaForCausalLM
        """.split(),
        _softcapped,
    )
)
FAMILIES["RecurrentGemmaForCausalLM"] = Family(softcap=lambda lm: lm.config.logits_soft_cap)
FAMILIES["xLSTMForCausalLM"] = Family(softcap=lambda lm: lm.config.output_logit_soft_cap)
FAMILIES["FalconH1ForCausalLM"] = Family(logit_scale=lambda lm: lm.model.lm_head_multiplier)
FAMILIES["HyperCLOVAXForCausalLM"] = Family(logit_scale=lambda lm: lm.config.logits_scaling)
FAMILIES["MiniCPM3ForCausalLM"] = Family(before_head=lambda lm, hidden: hidden / lm.config.logits_scaling)
FAMILIES["ModernBertDecoderForCausalLM"] = Family(before_head=lambda lm, hidden: lm.lm_head(hidden))

_MLP_HEAD = "its head is an MLP or a LayerNorm before the vocabulary projection, which hidden states alone do not carry"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        """
        BertLMHeadModel BigBirdForCausalLM CamembertForCausalLM Data2VecTextForCausalLM ElectraForCausalLM ErnieForCausalLM
        MegatronBertForCausalLM RemBertForCausalLM RoCBertForCausalLM RoFormerForCausalLM RobertaForCausalLM
        RobertaPreLayerNormForCausalLM XLMRobertaForCausalLM XLMRobertaXLForCausalLM XmodForCausalLM
        """.split(),
        _MLP_HEAD,
    ),
    **dict.fromkeys(["MusicgenForCausalLM", "MusicgenMelodyForCausalLM"], "it has one head per codebook"),
    **dict.fromkeys(["InklingForCausalLM", "Inkling2ForCausalLM"], "it drops the padded columns of its logits"),
    **dict.fromkeys(
        ["Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"], "its head may score clusters of tokens, not the vocabulary"
    ),
    "ProphetNetForCausalLM": "it predicts several streams of tokens",
    "WhisperForCausalLM": "it prepares the encoder's outputs before its decoder runs",
    "XLMWithLMHeadModel": "its head may be an adaptive softmax",
}

_REFUSED = {
    "labels": "no loss is computed here: give labels to the loss, where row t of hidden predicts token t + 1",
    "num_items_in_batch": "no loss is computed here: give it to the loss",
    "logits_to_keep": "no logits are computed here: slice the hidden states, hidden[:, -n:], before the loss",
    "num_logits_to_keep": "no logits are computed here: slice the hidden states, hidden[:, -n:], before the loss",
    "return_dict": "the base model's output is always taken by name",
    "adapter_names": "PEFT applies it in the wrapper's forward, which is not called; use set_adapter",
    "alora_offsets": "PEFT applies it in the wrapper's forward, which is not called",
}
_CACHES = ("past_key_values", "cache_params", "state")
_checked: weakref.WeakSet = weakref.WeakSet()


def hidden_and_head(model: nn.Module, **inputs) -> HiddenAndHead:
    """Last hidden states and head of a causal LM, without computing its [B, T, V] logits.

    The base model is called directly (a hook on lm_head that stops the forward would be exact for any family, but breaks under
    torch.compile and sharding), and what the class does between hidden states and logits comes from :data:`FAMILIES`. A
    class that is not there, remote code included, is refused until :func:`check` has compared it with the model's own
    logits. A new family is one entry.

    What goes around: torch.compile, PEFT, DataParallel and DistributedDataParallel wrappers are looked through, and so their own
    forward does not run. Compile the base model or the whole step rather than the LM. Accelerate puts mixed precision in the
    LM's forward: call this within ``accelerator.autocast()``. A DDP wrapper whose gradients would not be averaged is refused:
    wrap, in place of the LM, a module whose forward calls this function and the loss; the same module serves FSDP2 and
    ZeRO-3, whose hooks gather the parameters of what they wrap. The router loss of a mixture of experts is not included
    (``outputs.router_logits`` has its inputs).

    PEFT: adapters inside the base model and ``modules_to_save=["lm_head"]`` work. An adapter on lm_head is refused, for its
    gradient would have to pass through a merged [V, H] weight; so are prompt learning and tuners with a forward of their own.

    Args:
        model: a causal LM of transformers ≥ 4.56, in any of the wrappers above.
        inputs: for the base model, by name: input_ids [B, T] or inputs_embeds [B, T, H], attention_mask, position_ids,
            past_key_values, use_cache, output_hidden_states, pixel_values, ... As for the model itself, training and
            scoring want ``use_cache=False``: else ``outputs`` holds every layer's keys and values, and sequences packed
            by position_ids alone are not told apart.

    Returns:
        :class:`HiddenAndHead`; hidden in the dtype of the base model's output.

    Raises:
        TypeError: `model` is not a module. ValueError: names the class and what is unsupported (an unknown family, a head
        that is not a plain linear layer, sharded or offloaded weights, a wrapper as above), or an input that belongs
        elsewhere, such as labels and logits_to_keep.
    """
    lm = _unwrap(model)
    family = _family(lm)
    if family is None:
        raise ValueError(
            f"{_name(lm)}: what it does between hidden states and logits is not known. Call check(model, **inputs) once: it compares "
            "with the model's logits and lets this model pass if they agree; or describe the class in FAMILIES"
        )
    return _hidden_and_head(lm, family, inputs)


def check(model: nn.Module, *, tolerance: float | None = None, **inputs) -> float:
    """Compare logits rebuilt from :func:`hidden_and_head` with ``model(**inputs).logits``; a model that agrees passes from then on.

    Both run without gradient and in evaluation mode (each submodule's mode is put back). A few tokens are enough. A model
    outside :data:`FAMILIES` is taken to have neither scale nor softcap. Low precision hides small differences: check in float32.

    Args:
        model: as for :func:`hidden_and_head`.
        tolerance: the largest difference allowed, relative to the largest logit; 1e-5, or two units of rounding of the
            logits' or the weight's dtype where that is more.
        inputs: as for :func:`hidden_and_head`, without a cache, which the first run would change for the second.

    Returns:
        The largest absolute difference between the logits, columns at −inf in both aside.

    Raises:
        ValueError: the two differ, or as :func:`hidden_and_head`.
    """
    for name in _CACHES:
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: the check runs the model twice, and the first run would change it for the second")
    lm = _unwrap(model)
    family = _family(lm)
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        with torch.no_grad():
            head = _hidden_and_head(lm, family or Family(), inputs)
            expected = lm(**{name: value for name, value in inputs.items() if name not in _REFUSED}, return_dict=True).logits
            x = F.linear(head.hidden.to(head.weight.dtype), head.weight, head.bias)
    finally:
        for module, training in modes:
            module.training = training
    logits = Head(logit_scale=head.logit_scale, softcap=head.softcap).apply(x.double())
    if logits.shape != expected.shape:
        raise ValueError(f"{_name(lm)}: its logits have shape {tuple(expected.shape)}, hidden states and head give {tuple(logits.shape)}")
    difference = (logits - expected.double()).masked_fill(logits == expected, 0).abs().max().item()
    largest = expected.double().masked_fill(expected.isinf(), 0).abs().max().item()
    if tolerance is None:
        tolerance = max(1e-5, 2 * torch.finfo(head.weight.dtype).eps, 2 * torch.finfo(expected.dtype).eps)
    if not difference <= tolerance * largest:
        raise ValueError(
            f"{_name(lm)}: logits from hidden states and head differ from the model's by {difference:.3g}, where the largest is "
            f"{largest:.3g}: it does something between them that is not (hidden Wᵀ + bias)·{head.logit_scale:g} with softcap {head.softcap}"
        )
    _checked.add(lm)
    return difference


def _hidden_and_head(lm: nn.Module, family: Family, inputs: dict[str, Any]) -> HiddenAndHead:
    for name, reason in _REFUSED.items():
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: {reason}")
    inputs = {name: value for name, value in inputs.items() if name not in _REFUSED}
    head = _linear_head(lm)
    base = getattr(lm, "base_model", None)
    if base is None or base is lm:
        base = getattr(lm, "model", None)
    if not isinstance(base, nn.Module):
        raise ValueError(f"{_name(lm)}: it has no base model (base_model or model) to take hidden states from")
    outputs = base(**inputs, return_dict=True)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(f"{_name(lm)}: the output of its base model, a {type(outputs).__name__}, has no last_hidden_state")
    if family.before_head is not None:
        hidden = family.before_head(lm, hidden)
    weight, bias = head.weight, head.bias
    if weight.is_meta and not hidden.is_meta:
        raise ValueError(f"{_name(lm)}: the weight of lm_head is offloaded; load the head onto a device")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{_name(lm)}: lm_head must have a weight [V, {hidden.shape[-1]}], the width of the hidden states; got {tuple(weight.shape)}. "
            "A sharded weight is gathered only inside the forward of what was wrapped: wrap one that calls hidden_and_head and the loss"
        )
    scale = 1.0 if family.logit_scale is None else float(family.logit_scale(lm))
    softcap = None if family.softcap is None else family.softcap(lm)
    return HiddenAndHead(hidden, weight, bias, scale, None if softcap is None else float(softcap), outputs)


def _unwrap(model: nn.Module) -> nn.Module:
    """The causal LM inside compile, data-parallel and PEFT wrappers; ValueError where leaving one out changes the result."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM; got {type(model).__name__}")
    while True:
        children = model._modules
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if torch.is_grad_enabled() and model.require_backward_grad_sync and model.process_group.size() > 1:
                raise ValueError(
                    "DistributedDataParallel: its gradients would not be averaged, because the base model is called past its forward. "
                    "Wrap a module whose forward calls hidden_and_head and the loss, or average them yourself and pass model.module"
                )
            model = model.module
        elif any(c.__name__ == "FullyShardedDataParallel" for c in type(model).__mro__):
            raise ValueError(
                "FullyShardedDataParallel: embeddings and head are gathered only inside its forward. Wrap a module whose forward calls "
                "hidden_and_head and the loss"
            )
        elif "_orig_mod" in children:
            model = children["_orig_mod"]
        elif "module" in children:
            model = children["module"]
        elif callable(getattr(model, "get_base_model", None)):
            model = _base_of_peft(model)
        else:
            return model


def _base_of_peft(model: nn.Module) -> nn.Module:
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"{_name(model)}: prompt learning adds its tokens in the wrapper's forward, which is not called")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(f"{_name(model)}: activated LoRA finds its tokens in the wrapper's forward, which is not called")
    tuner = model._modules.get("base_model")
    if config is not None and tuner is not None and _forward_owner(tuner).__name__ != "BaseTuner":
        raise ValueError(f"{_name(model)}: {type(tuner).__name__} has a forward of its own, which is not called")
    return model.get_base_model()


def _family(lm: nn.Module) -> Family | None:
    """How this LM's class makes logits, or None where nobody knows yet; ValueError for a class known not to fit."""
    if not callable(getattr(lm, "get_output_embeddings", None)):
        raise ValueError(f"{_name(lm)}: model must be a transformers causal LM, with get_output_embeddings")
    owner = _forward_owner(lm)
    known = owner.__module__.startswith("transformers.")
    if known and owner.__name__ in UNSUPPORTED:
        raise ValueError(f"{_name(lm)}: {UNSUPPORTED[owner.__name__]}")
    if known and owner.__name__ in FAMILIES:
        return FAMILIES[owner.__name__]
    return Family() if lm in _checked else None


def _linear_head(lm: nn.Module) -> nn.Linear:
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"{_name(lm)}: it has no output embeddings, so it is no causal LM")
    if "modules_to_save" in head._modules:
        active = list(head.active_adapters)
        head = head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
    if hasattr(head, "base_layer") or "token_adapter" in head._modules:
        raise ValueError(
            f"{_name(lm)}: lm_head carries an adapter ({type(head).__name__}). Leave it out of target_modules, train it whole with "
            "modules_to_save=['lm_head'], or merge the adapter first"
        )
    if not isinstance(head, nn.Linear) or _forward_owner(head) is not nn.Linear:
        raise ValueError(
            f"{_name(lm)}: lm_head must be a plain linear layer; got {type(head).__name__}, whose weight alone does not give the logits"
        )
    return head


def _forward_owner(module: nn.Module) -> type:
    return next(c for c in type(module).__mro__ if "forward" in vars(c))


def _text_config(lm: nn.Module):
    return lm.config.get_text_config()


def _name(module: nn.Module) -> str:
    return type(module).__name__
