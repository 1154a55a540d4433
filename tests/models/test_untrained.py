"""Stop tokens that a base was never trained on are named, trained ones are not."""

import os
from pathlib import Path

import pytest
import torch
from chat_tokenizers import make
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.data.encoding import load_tokenizer
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.untrained import untrained_tokens, warn_of_untrained

REAL = os.environ.get("RLHF_REAL_MODEL", "")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def chat_of(tokenizer) -> PromptFormat:
    return PromptFormat(tokenizer, "chat", chat_template=tokenizer.chat_template)


def trained_looking(tokenizer, padding: int, tied: bool) -> LlamaForCausalLM:
    """A model whose seen tokens have rows of many lengths, and whose `padding` last rows are as initialised."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer) + padding, tie_word_embeddings=tied, **SIZES)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            seen = layer.weight[: len(tokenizer)]
            seen.mul_(torch.rand(len(seen), 1) * 3 + 1.5)
    return model


def plant(model, token: int, source: int) -> None:
    """Give a token's rows the look of an unused one: another draw of the same initialisation."""
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            std = layer.weight[source].std()
            layer.weight[token] = torch.randn(layer.weight.shape[1]) * std


@pytest.mark.parametrize("tied", [True, False])
def test_a_planted_untrained_end_of_turn_is_named_and_the_others_are_not(tmp_path, tied):
    tokenizer = make("chatml", tmp_path)
    chat = chat_of(tokenizer)
    model = trained_looking(tokenizer, 32, tied)
    assert untrained_tokens(model, chat) == []
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plant(model, end, len(tokenizer) + 1)
    assert untrained_tokens(model, chat) == ["<|im_end|>"]
    with pytest.warns(UserWarning, match=r"never trained on <\|im_end\|>.*text --prompt_template"):
        warn_of_untrained(model, chat)


def test_without_unused_ids_or_where_all_rows_look_alike_nothing_is_named(tmp_path):
    tokenizer = make("chatml", tmp_path)
    model = trained_looking(tokenizer, 0, tied=True)
    plant(model, tokenizer.convert_tokens_to_ids("<|im_end|>"), 5)
    assert untrained_tokens(model, chat_of(tokenizer)) == []
    # A model that nothing was trained in: no row can be told from any other.
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 32, **SIZES))
    assert untrained_tokens(fresh, chat_of(tokenizer)) == []


@pytest.mark.skipif(not Path(REAL, "config.json").is_file(), reason="RLHF_REAL_MODEL names no real chat model")
def test_a_real_chat_model_passes_and_a_planted_token_in_it_is_named():
    tokenizer = load_tokenizer(REAL)
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype="float32")
    chat = chat_of(tokenizer)
    assert untrained_tokens(model, chat) == []
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    assert untrained_tokens(model, chat) == []
    plant(model, chat.stop_ids[0], len(tokenizer) + 3)
    assert untrained_tokens(model, chat) == ["<|im_end|>"]
