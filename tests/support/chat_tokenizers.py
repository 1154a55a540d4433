"""Tokenizers of the families that people bring, small and trained here, each with a chat template in its own style."""

import json
import os
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from rlhf.baichuan.to_fast_tokenizer import fast_tokenizer

# A directory with a real chat model, where there is one: its tokenizer is tried like the others.
REAL = os.environ.get("RLHF_REAL_MODEL", "")
REAL_FAMILY = ("real",) if Path(REAL, "tokenizer.json").is_file() else ()

TEXT = [
    "You are a helpful assistant. What is the capital of France? Paris, I think. I'm sorry, I can't say.",
    "Human: hello\n\nAssistant: Hi there! system user model assistant INST",
    "问：你喜欢什么？答：我喜欢红茶。今天天气怎么样？晴天，很好！",
    "1 + 1 = 2; 3.14159 (about) {braces} <tags> \t tabs",
] * 30

# How Qwen cuts text before merging: punctuation takes the space before it, a letter run one mark in front of it.
QWEN_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = """{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Thinking is switched off by an empty thought in front of the answer; earlier answers lose theirs.
QWEN3 = """{%- for m in messages -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content -%}
{%- if m.role == 'assistant' and loop.last -%}{%- set said = '<think>\\n\\n</think>\\n\\n' + said -%}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""

LLAMA3 = """{%- for m in messages -%}
{%- if loop.first -%}{{- bos_token -}}{%- endif -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

GEMMA = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

MISTRAL = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
{%- else -%}{{- raise_exception('Only user and assistant roles are supported') -}}{%- endif -%}
{%- endfor -%}"""


def byte_level(
    control: list[str], cut: str | None = None, bos: str | None = None, plain: tuple[str, ...] = (), **roles
):
    """A byte-level BPE tokenizer.

    Args:
        control: special tokens. cut: pattern that text is cut by; None for GPT-2's. bos: put in front of every text.
        plain: added tokens that are not special. roles: eos_token, pad_token, ... and chat_template.
    """
    tokenizer = Tokenizer(models.BPE())
    usual = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut:
        split = pre_tokenizers.Split(Regex(cut), behavior="isolated")
        usual = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.pre_tokenizer = usual
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in plain])
    if bos is None:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    return with_leading(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, **roles), bos)


def sentence_piece(folder: Path, control: list[str], **roles):
    """A SentencePiece BPE with byte fallback, dummy prefix and BOS, as Llama 2 and Mistral have it."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, split_digits=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = fast_tokenizer(pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **roles)
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    return with_leading(tokenizer, "<s>")


def metaspace(control: list[str], bos: str, **roles):
    """A BPE on pieces with `▁` for a space, byte fallback and no dummy prefix, as Gemma has it."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*control, *fallback], show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    parts = json.loads(trained.to_str())["model"]

    # Built anew: the bytes of the fallback are pieces, and only the control tokens are special.
    merges = [tuple(merge) for merge in parts["merges"]]
    model = models.BPE(vocab=parts["vocab"], merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(control)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, unk_token="<unk>", **roles)
    return with_leading(fast, bos)


def with_leading(tokenizer: PreTrainedTokenizerFast, bos: str) -> PreTrainedTokenizerFast:
    """The tokenizer, putting its BOS in front of every text from now on."""
    ids = [(bos, tokenizer.convert_tokens_to_ids(bos))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return tokenizer


def make(family: str, folder: Path):
    """The tokenizer of a family; `folder` takes the files that some are read back from."""
    if family == "chatml":
        return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN_CUT, eos_token="<|im_end|>",
                          pad_token="<|endoftext|>", chat_template=CHATML)  # fmt: skip
    if family == "qwen3":
        return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN_CUT, plain=("<think>", "</think>"),
                          eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN3)  # fmt: skip
    if family == "llama3":
        control = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return byte_level(
            control, QWEN_CUT, bos="<|begin_of_text|>", eos_token="<|end_of_text|>", chat_template=LLAMA3
        )
    if family == "gemma":
        control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        return metaspace(control, "<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA)
    if family == "mistral":
        return sentence_piece(folder, ["[INST]", "[/INST]"], chat_template=MISTRAL)
    if family == "llama2":
        return sentence_piece(folder, [])
    if family == "gpt2":
        return byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    raise ValueError(family)


CHAT_FAMILIES = ("chatml", "qwen3", "llama3", "gemma", "mistral")
TEXT_FAMILIES = ("llama2", "gpt2")
