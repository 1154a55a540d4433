"""Floating-point operations of training steps, and their share of a card's peak (MFU)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

# Dense matrix products, 1e12 operations a second, in bfloat16 (V100: float16), as the makers state them. The first
# name that the card's own contains counts.
PEAK_TFLOPS = {
    # A name that contains another stands before it, or an "H200" would count as an "H20".
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 4080": 97.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
}


@dataclass(frozen=True)
class FlopCounts:
    """Parameters that a model's operations are counted by.

    body: parameters of the layers' matrices; head: of the output layer; trained: of adapters; attention: width of all
    attention heads of all layers together (layers x heads x head size).
    """

    body: int
    head: int
    trained: int
    attention: int


def flop_counts(model: nn.Module, config) -> FlopCounts:
    """Counts of a model with its adapters (on any device): matrices only; embeddings and score heads aside."""
    head = config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    # A configuration may give its heads a size of their own, which is then not the hidden size over their number.
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # The base is frozen: only adapters take gradients, and a score head of a few thousand numbers.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # peft's wrapper around an adapted layer is no nn.Linear, but its base layer is one, so each matrix counts once.
    # A layer with a single output is a score head.
    body = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and module.out_features > 1
    )
    # A sequence classification model has no output layer, and so none to take off again.
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return FlopCounts(
        body - (head if output is not None else 0), head, trained, config.num_hidden_layers * heads * size
    )


def forward_flops(work: FlopCounts, lengths: Sequence[int], head_positions: int) -> float:
    """Operations of one forward over sequences of these lengths (real tokens; padding is waste, not work).

        2 * body * tokens + 2 * head * head_positions + attention * sum of length * (length + 1) * 2

    The last term is scores and weighted values, 2 operations each for every earlier token and its own. Sampling with a
    cache does the same work token by token. What rlhf.rows spares of the last layer is counted all the same.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1.
    """
    # Token n looks at n tokens, which makes length * (length + 1) / 2 pairs of tokens. A pair costs 4 operations for
    # each unit of the attention's width.
    seen = sum(length * (length + 1) for length in lengths)
    return 2.0 * work.body * sum(lengths) + 2.0 * work.head * head_positions + 2.0 * work.attention * seen


def training_flops(work: FlopCounts, lengths: Sequence[int], head_positions: int, checkpointing: bool) -> float:
    """Operations of forward and backward with frozen weights, of which only the gradient of the inputs is needed.

        2 * forward + attention + 4 * trained * tokens;  with checkpointing the layers' forward once more

    Attention has two inputs to every product, so its backward is twice its forward; of the adapters' weights the
    gradient is needed as well.
    """
    # Without the output layer, which checkpointing does not compute once more.
    layers = forward_flops(work, lengths, 0)
    # What the layers cost beside their matrices.
    attention = layers - 2.0 * work.body * sum(lengths)
    forward = forward_flops(work, lengths, head_positions)
    return 2 * forward + attention + 4.0 * work.trained * sum(lengths) + (layers if checkpointing else 0)


def ppo_flops(
    work: FlopCounts, queries: Sequence[int], responses: Sequence[int], passes: int, epochs: int, checkpointing
):
    """Operations of one PPO step.

    Args:
        queries, responses: real tokens of each row, in the same order. passes: forwards besides sampling (reference,
            reward model, policy again where asked, critic). epochs: of the update.
    """
    lengths = [query + response for query, response in zip(queries, responses, strict=True)]
    tokens = sum(responses)
    # Logits are made only where a response token is predicted. The reward model and a separate critic make none, but
    # count as if they did.
    forward = forward_flops(work, lengths, tokens)
    return (1 + passes) * forward + epochs * training_flops(work, lengths, tokens, checkpointing)


def format_mfu(share: float) -> str:
    """An MFU for the step line."""
    return f"MFU {share:.1%}"


def this_card() -> str:
    """Name of this process's card; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def peak_tflops(card: str) -> float | None:
    """A card's peak by its name, 1e12 operations a second; None where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)


def mfu(flops: float, seconds: float, card: str, cards: int) -> float | None:
    """Model FLOP/s utilisation: operations a second over the peak of all cards; None where that is not known."""
    peak = peak_tflops(card)
    return None if peak is None else flops / seconds / (peak * 1e12 * cards)
