"""From Baichuan to plain Llama: weights, adapters and tokenizer that stock transformers reads without our code."""

import json
from graphlib import CycleError, TopologicalSorter
from itertools import permutations
from pathlib import Path

import torch
from peft import LoraConfig
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

PACKED, SPLIT = "W_pack", ("q_proj", "k_proj", "v_proj")
# Stand-ins come from here: code points without a meaning, that no real text holds.
PRIVATE_USE = range(0xF0000, 0xFFFFE)


# ---- weights ----
def llama_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Baichuan's state dict under Llama's names: every W_pack [3 * hidden, hidden] is cut by rows into q, k and v."""
    found = {}
    for name, tensor in weights.items():
        if PACKED in name:
            # Copies: the three would otherwise share storage, which safetensors refuses.
            parts = [part.clone() for part in tensor.chunk(3)]
            found |= {name.replace(PACKED, to): part for to, part in zip(SPLIT, parts, strict=True)}
        else:
            found[name] = tensor
    return found


def to_llama(model):
    """A stock Llama with the weights of a Baichuan model: a language model, or a sequence classification one.

    Its rotary tables are left unfilled: save it and load it again to run it.
    """
    dropped = ("model_type", "architectures", "norm_head", "transformers_version")
    config = LlamaConfig(**{key: value for key, value in model.config.to_dict().items() if key not in dropped})
    with torch.device("meta"):
        if model.config.architectures == ["BaichuanForSequenceClassification"] or hasattr(model, "score"):
            llama = AutoModelForSequenceClassification.from_config(config)
        else:
            llama = LlamaForCausalLM(config)
            llama.generation_config = model.generation_config
    llama.load_state_dict(llama_weights(model.state_dict()), assign=True)
    return llama


# ---- adapters ----
def split_adapter(config: LoraConfig, weights: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA on W_pack as one on q, k and v: exactly the same update, since B [3 * hidden, r] is cut by rows.

        W_pack + scale * B @ A  =  [q; k; v] + scale * [B_q @ A; B_k @ A; B_v @ A]

    Raises: ValueError on anything but plain LoRA, or where there is no W_pack.
    """
    if not isinstance(config.target_modules, set | list) or not any(PACKED in name for name in weights):
        raise ValueError(f"this adapter is not on {PACKED} by name: its target_modules are {config.target_modules}")
    found = {}
    for name, tensor in weights.items():
        if PACKED not in name:
            found[name] = tensor
        elif name.endswith("lora_A.weight"):
            found |= {name.replace(PACKED, to): tensor.clone() for to in SPLIT}
        elif name.endswith("lora_B.weight"):
            parts = tensor.chunk(3)
            found |= {name.replace(PACKED, to): part.clone() for to, part in zip(SPLIT, parts, strict=True)}
        else:
            raise ValueError(f"{name} cannot be cut in three: only plain LoRA adapters (A and B) convert")
    settings = config.to_dict()
    settings["target_modules"] = sorted(_renamed(config.target_modules))
    for pattern in ("rank_pattern", "alpha_pattern"):
        settings[pattern] = {new: value for old, value in settings[pattern].items() for new in _renamed([old])}
    return LoraConfig(**settings), found


def _renamed(names) -> list[str]:
    """Module names with each W_pack replaced by q, k and v."""
    return [name.replace(PACKED, to) for name in names for to in (SPLIT if PACKED in name else (PACKED,))]


# ---- tokenizer ----
def fast_tokenizer(processor: SentencePieceProcessor, **settings) -> PreTrainedTokenizerFast:
    """The ids of a SentencePiece BPE (or character) model from a plain tokenizer.json.

    User-defined pieces are what other converters get wrong: sentencepiece takes them out of the text before it
    normalises and before it merges, at the very start of a text too, where the dummy prefix still precedes them. Here
    the normalizer puts one private-use character in the place of each, which nothing can then touch or merge.

    Args:
        processor: the loaded model. settings: of PreTrainedTokenizerFast (`model_max_length`, special tokens, ...).
    Raises: ValueError on a model of another kind (unigram, word), or with flags that cannot be expressed.
    """
    proto = import_protobuf().ModelProto.FromString(processor.serialized_model_proto())
    _check_flags(proto)
    kinds = type(proto.pieces[0])
    symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    rules = [normalizers.Precompiled(charsmap)] if charsmap else []
    altered = {symbol for symbol in symbols for rule in rules if rule.normalize_str(symbol) != symbol}
    masked = [symbol for symbol in symbols if len(symbol) > 1 or symbol in altered]
    stand_in = dict(zip(masked, _unused_characters(proto), strict=False))

    vocabulary = {stand_in.get(piece.piece, piece.piece): index for index, piece in enumerate(proto.pieces)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(proto),
            unk_token=proto.trainer_spec.unk_piece,
            byte_fallback=proto.trainer_spec.byte_fallback,
            fuse_unk=True,
        )
    )
    backend.normalizer = _normalizer(proto.normalizer_spec, rules, stand_in, altered)
    backend.decoder = _decoder(proto.normalizer_spec, stand_in)
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _check_flags(proto) -> None:
    """Refuse a SentencePiece model whose rules the exported tokenizer would not follow."""
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.BPE, trainer.CHAR):
        raise ValueError("only a SentencePiece model of type bpe or char exports to tokenizer.json: keep its own format")
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise ValueError("a SentencePiece model with whitespace as suffix or unescaped cannot be exported")


def _unused_characters(proto) -> list[str]:
    """Private-use characters that no piece contains (the 64k vocabulary of Baichuan has some of its own)."""
    used = {character for piece in proto.pieces for character in piece.piece}
    return [chr(code) for code in PRIVATE_USE if chr(code) not in used]


def _merges(proto) -> list[tuple[str, str]]:
    """Pairs in the order of the score of what they make; a user-defined piece is never part of one."""
    if proto.trainer_spec.model_type == proto.trainer_spec.CHAR:
        return []
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == type(piece).NORMAL}
    found = []
    for whole in sorted(normal, key=normal.get, reverse=True):
        halves = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        found += [(left, right) for left, right in halves if left in normal and right in normal]
    return found


def _normalizer(spec, rules: list, stand_in: dict[str, str], altered: set[str]):
    """sentencepiece's normalisation, with stand-ins for the user-defined pieces."""
    # Those that the rules would change are taken out of the raw text; runs of "▁" only exist after the rules.
    early = [symbol for symbol in stand_in if symbol in altered and set(symbol) != {"▁"}]
    steps = [normalizers.Replace(symbol, stand_in[symbol]) for symbol in _leftmost_longest(early)] + rules
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    steps += [normalizers.Replace(symbol, stand_in[symbol]) for symbol in _leftmost_longest(stand_in)]
    return normalizers.Sequence(steps)


def _leftmost_longest(symbols) -> list[str]:
    """An order in which one replacement after the other finds what a single leftmost, longest match would.

    A symbol goes after those that contain it, and after those whose end is its beginning: they start further left.
    """
    before = {symbol: set() for symbol in symbols if len(symbol) > 1}
    for first, second in permutations(before, 2):
        overlaps = any(first.endswith(second[:length]) for length in range(1, min(len(first), len(second))))
        if second in first or (overlaps and first not in second):
            before[second].add(first)
    try:
        ordered = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise ValueError(f"the user-defined pieces {error.args[1]} overlap in a circle: cannot be exported") from error
    return ordered + [symbol for symbol in symbols if len(symbol) == 1]


def _decoder(spec, stand_in: dict[str, str]):
    """Bytes to text first, then the stand-ins back in the one string that leaves, and the dummy prefix off."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Replace(mark, symbol.replace("▁", " ")) for symbol, mark in stand_in.items()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []))


def save_tokenizer(tokenizer, directory: Path) -> PreTrainedTokenizerFast:
    """Write a Baichuan tokenizer for stock transformers: tokenizer.json, its config, and the SentencePiece model.

    `</s>` in a text stays text there too (`split_special_tokens`). tokenizer.model is for tools that read it directly.
    """
    tokens = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("unk", "bos", "eos", "pad")}
    fast = fast_tokenizer(
        tokenizer.sp_model,
        model_max_length=tokenizer.model_max_length,
        split_special_tokens=tokenizer.split_special_tokens,
        clean_up_tokenization_spaces=False,
        **tokens,
    )
    fast.save_pretrained(directory)
    # The name both transformers 4 and 5 know.
    file = Path(directory) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (Path(directory) / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
    return fast
