"""The benchmarks' common workload: a 33-million-parameter Llama with random weights, and a tokenizer for it."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

# Llama's own BOS and EOS, which all contenders know; 0 is free for padding.
PAD = 0
BOS = 1
EOS = 2
VOCABULARY = 8000


def config(**changed) -> LlamaConfig:
    """Hidden size 512, 8 layers, 8 heads, 1376 in the middle, 8000 pieces."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "max_position_embeddings": 2048, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS,
    }  # fmt: skip
    return LlamaConfig(**settings | changed)


def causal_model(seed: int = 0) -> LlamaForCausalLM:
    """The language model, fp32."""
    # Every contender gets the same weights.
    torch.manual_seed(seed)
    return LlamaForCausalLM(config())


def score_model(seed: int = 0) -> LlamaForSequenceClassification:
    """The model with a one-number head, fp32."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=1))


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a piece, "t3" .. "t7999": trainers want a tokenizer although the rows are encoded already."""
    words = {f"t{number}": number for number in range(3, VOCABULARY)}
    words |= {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    # Nothing is ever read with it, so what stands for an unknown word does not matter.
    word_level = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )  # fmt: skip
