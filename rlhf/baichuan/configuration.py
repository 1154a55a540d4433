"""Configuration of baichuan-7B and Baichuan2-7B: Llama's, with one packed attention projection."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

# The 13B model shares the name "baichuan" but has ALiBi in place of rotary positions; its width tells it apart.
ALIBI_HIDDEN_SIZE = 5120
# The vocabulary of Baichuan2, whose output head has rows of unit length.
NORM_HEAD_VOCAB_SIZE = 125696


@strict
class BaichuanConfig(LlamaConfig):
    """Fields of the hub's config.json, with baichuan-7B's values as defaults.

    Args:
        norm_head: whether the rows of `lm_head` have unit length; None asks the vocabulary size (True for Baichuan2).
    Raises:
        ValueError: on the 13B model, whose positions (ALiBi) this implementation does not have.
    """

    model_type = "baichuan"
    # `W_pack` cannot be cut over devices by columns, so neither can `o_proj` by rows; the MLP still can.
    base_model_tp_plan: ClassVar[dict] = {
        name: how for name, how in LlamaConfig.base_model_tp_plan.items() if not name.startswith("layers.*.self_attn")
    }

    # Ours can: the parts of `W_pack` are exchanged as activations (rlhf/models/tensor_parallel.py).
    packed_tp_plan: ClassVar[dict] = {
        "layers.*.self_attn.W_pack": "packed_thirds",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    vocab_size: int = 64000
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    norm_head: bool | None = None

    def __post_init__(self, **kwargs):
        # The .py files it points to are never run and never saved, so the pointer would dangle in a saved copy.
        kwargs.pop("auto_map", None)
        if self.hidden_size == ALIBI_HIDDEN_SIZE:
            raise ValueError(
                f"Baichuan-13B (hidden_size {ALIBI_HIDDEN_SIZE}) is not supported: it has ALiBi positions where "
                "this code has rotary ones; use baichuan-7B or Baichuan2-7B"
            )
        if self.norm_head is None:
            self.norm_head = self.vocab_size == NORM_HEAD_VOCAB_SIZE
        super().__post_init__(**kwargs)
