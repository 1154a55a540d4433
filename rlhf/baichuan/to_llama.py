"""From Baichuan to plain Llama: the weights of a model, and adapters."""

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

# Baichuan's one matrix for query, key and value, and Llama's three.
PACKED = "W_pack"
SPLIT = ("q_proj", "k_proj", "v_proj")


# ---- weights ----
def llama_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Baichuan's state dict under Llama's names: every W_pack [3 * hidden, hidden] is cut by rows into q, k and v."""
    converted = {}
    for name, tensor in weights.items():
        converted |= _in_three(name, tensor) if PACKED in name else {name: tensor}
    return converted


def _in_three(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The thirds of a tensor's rows, under the names of q, k and v."""
    parts = tensor.chunk(3)
    # Copies: the three would otherwise share storage, which safetensors refuses.
    return {name.replace(PACKED, to): part.clone() for to, part in zip(SPLIT, parts, strict=True)}


def to_llama(model):
    """A stock Llama with the weights of a Baichuan model: a language model, or a sequence classification one.

    Its rotary tables are left unfilled: save it and load it again to run it.
    """
    # norm_head is of Baichuan2 alone: since loading, the rows of such a head have unit length, and a plain head
    # computes the same.
    dropped = ("model_type", "architectures", "norm_head", "transformers_version")
    settings = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
    model_class = LlamaForSequenceClassification if hasattr(model, "score") else LlamaForCausalLM
    config = LlamaConfig(**settings)
    # Without storage of its own: it takes over the tensors below, so that one model is in memory, not two.
    with torch.device("meta"):
        llama = model_class(config)

    # A classification model has no settings of generation.
    if model.can_generate():
        llama.generation_config = model.generation_config
    llama.load_state_dict(llama_weights(model.state_dict()), assign=True)
    return llama


# ---- adapters ----
def split_adapter(config: LoraConfig, weights: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA on W_pack as one on q, k and v: exactly the same update, since B [3 * hidden, r] is cut by rows.

        W_pack + scale * B @ A  =  [q; k; v] + scale * [B_q @ A; B_k @ A; B_v @ A]

    Raises: ValueError on anything but plain LoRA, or where there is no W_pack.
    """
    # A pattern for module names, a string, cannot be renamed with certainty.
    by_name = isinstance(config.target_modules, set | list)
    if not by_name or not any(PACKED in name for name in weights):
        raise ValueError(f"this adapter is not on {PACKED} by name: its target_modules are {config.target_modules}")

    # The weights: q, k and v share A, and each gets a third of B.
    split = {}
    for name, tensor in weights.items():
        if PACKED not in name:
            split[name] = tensor
        elif name.endswith("lora_A.weight"):
            # All three have the same A.
            split |= {name.replace(PACKED, to): tensor.clone() for to in SPLIT}
        elif name.endswith("lora_B.weight"):
            split |= _in_three(name, tensor)
        else:
            raise ValueError(f"{name} cannot be cut in three: only plain LoRA adapters (A and B) convert")

    # The settings name modules, too.
    settings = config.to_dict()
    settings["target_modules"] = sorted(_renamed(config.target_modules))
    for pattern in ("rank_pattern", "alpha_pattern"):
        renamed = {}
        for old, value in settings[pattern].items():
            renamed |= dict.fromkeys(_renamed([old]), value)
        settings[pattern] = renamed

    return LoraConfig(**settings), split


def _renamed(names) -> list[str]:
    """Module names with each W_pack replaced by q, k and v."""
    renamed = []
    for name in names:
        if PACKED in name:
            renamed += [name.replace(PACKED, to) for to in SPLIT]
        else:
            renamed.append(name)
    return renamed
