"""The factors of a LoRA adapter: which tensors belong to a layer, and the rank and scale that peft gives it there."""

import math

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

# Endings of the two factors of a layer, and of an embedding.
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
INSIDE_PEFT = "base_model.model."


def layers_of(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> its factors A [r, in] and B [out, r], in the order of the names.

    Raises: ValueError naming a layer of which one factor is missing.
    """
    layers = {}
    for name in sorted(tensors):
        for first, second in FACTORS:
            if name.endswith(first):
                layer = name.removesuffix(first)
                if layer + second not in tensors:
                    raise ValueError(f"{layer + second} is missing: the adapter is damaged, copy or train it again")
                layers[layer] = (tensors[name], tensors[layer + second])
    return layers


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """The factor s of B A in a layer, as peft has it."""
    alpha = _by_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def rank_of(config: LoraConfig, layer: str) -> int:
    """The rank that peft builds a layer with, whatever its tensors have."""
    return _by_pattern(config.rank_pattern, layer, config.r)


def _by_pattern(patterns: dict | None, layer: str, usual):
    """What a layer's pattern says, by peft's own rule, so that it means here what it means when peft loads it."""
    patterns = patterns or {}
    return patterns.get(get_pattern_key(patterns.keys(), layer.removeprefix(INSIDE_PEFT)), usual)
