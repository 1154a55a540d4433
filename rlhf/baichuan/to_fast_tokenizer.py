"""A SentencePiece tokenizer as a plain tokenizer.json: the same ids in stock transformers, without our code."""

import json
from graphlib import CycleError, TopologicalSorter
from itertools import permutations
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

# Stand-ins come from here: code points without a meaning, that no real text holds.
PRIVATE_USE = range(0xF0000, 0xFFFFE)

# Where tokenizers differ, if they do: symbol first, runs of spaces, line ends, rewritten characters, bytes, controls.
PROBE_TEXTS = (
    "问：1+1等于几？\n\n答：2。",
    "0 a  b   c\t\r\n",
    "《：（①…％）》，！",
    "</s><s><unk>",
    "  两 龘🀄é",
    "<h1>--->",
)


def fast_tokenizer(processor: SentencePieceProcessor, **settings) -> PreTrainedTokenizerFast:
    """The ids of a SentencePiece BPE (or character) model from a plain tokenizer.json.

    User-defined pieces are what other converters get wrong: sentencepiece takes them out of the text before it
    normalises and before it merges, at the very start of a text too, where the dummy prefix still precedes them. Here
    the normalizer puts one private-use character in the place of each, which nothing can then touch or merge.
    What is left to differ: a combining mark after a character that normalisation rewrites, as in "⑬" + U+05B3.

    Args:
        processor: the loaded model. settings: of PreTrainedTokenizerFast (`model_max_length`, special tokens, ...).
    Raises: ValueError on a model of another kind (unigram, word), or with flags that cannot be expressed.
    """
    proto = import_protobuf().ModelProto.FromString(processor.serialized_model_proto())
    _check_flags(proto)
    kinds = type(proto.pieces[0])
    # 1. Give every user-defined piece that could be touched a character of its own.
    symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    rules = [normalizers.Precompiled(charsmap)] if charsmap else []
    altered = {symbol for symbol in symbols if any(rule.normalize_str(symbol) != symbol for rule in rules)}
    masked = [symbol for symbol in symbols if len(symbol) > 1 or symbol in altered]
    stand_in = dict(zip(masked, _unused_characters(proto), strict=False))

    # 2. The same vocabulary and merges, under those characters.
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
    # 3. Rules that put the stand-ins in, and take them out again.
    backend.normalizer = _normalizer(proto.normalizer_spec, rules, stand_in, altered)
    backend.decoder = _decoder(proto.normalizer_spec, stand_in)
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _check_flags(proto) -> None:
    """Refuse a SentencePiece model whose rules the exported tokenizer would not follow."""
    trainer = proto.trainer_spec
    spec = proto.normalizer_spec
    if trainer.model_type not in (trainer.BPE, trainer.CHAR):
        raise ValueError(
            "only a SentencePiece model of type bpe or char exports to tokenizer.json: keep its own format"
        )
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise ValueError("a SentencePiece model with whitespace as suffix or unescaped cannot be exported")


def _unused_characters(proto) -> list[str]:
    """Private-use characters that no piece contains (the 64k vocabulary of Baichuan has some of its own)."""
    used = set().union(*(piece.piece for piece in proto.pieces))
    return [chr(code) for code in PRIVATE_USE if chr(code) not in used]


def _merges(proto) -> list[tuple[str, str]]:
    """Pairs in the order of the score of what they make; a user-defined piece is never part of one."""
    if proto.trainer_spec.model_type == proto.trainer_spec.CHAR:
        return []
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == type(piece).NORMAL}
    merges = []
    for whole in sorted(normal, key=normal.get, reverse=True):
        halves = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        merges += [(left, right) for left, right in halves if left in normal and right in normal]
    return merges


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
        if second in first or (first not in second and _ends_with_start_of(first, second)):
            before[second].add(first)
    try:
        ordered = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise ValueError(f"the user-defined pieces {error.args[1]} overlap in a circle: cannot be exported") from error
    return ordered + [symbol for symbol in symbols if len(symbol) == 1]


def _ends_with_start_of(first: str, second: str) -> bool:
    return second[0] in first and any(first.endswith(second[:length]) for length in range(1, len(second)))


def _decoder(spec, stand_in: dict[str, str]):
    """Bytes to text first, then the stand-ins back in the one string that leaves, and the dummy prefix off."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Replace(mark, symbol.replace("▁", " ")) for symbol, mark in stand_in.items()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []))


def save_tokenizer(tokenizer, directory: Path) -> None:
    """Write a Baichuan tokenizer for stock transformers: tokenizer.json, its config, and the SentencePiece model.

    `</s>` in a text stays text there too (`split_special_tokens`). tokenizer.model is for tools that read it directly.

    Raises: ValueError where the exported one, read back, gives other ids.
    """
    fast = fast_tokenizer(
        tokenizer.sp_model,
        model_max_length=tokenizer.model_max_length,
        split_special_tokens=tokenizer.split_special_tokens,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("unk", "bos", "eos", "pad")},
    )
    fast.save_pretrained(directory)
    # The name both transformers 4 and 5 know.
    file = Path(directory) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (Path(directory) / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
    exported = AutoTokenizer.from_pretrained(directory)
    for text in PROBE_TEXTS:
        if exported(text).input_ids != tokenizer(text).input_ids:
            raise ValueError(f"the exported tokenizer splits {text!r} differently: keep --format baichuan")
