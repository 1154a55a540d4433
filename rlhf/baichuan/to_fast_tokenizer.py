"""A SentencePiece tokenizer as a plain tokenizer.json: the same ids in stock transformers, without our code."""

import json
from graphlib import CycleError, TopologicalSorter
from itertools import permutations
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

# Stand-ins come from here: code points that Unicode gives no meaning, so no real text holds them.
PRIVATE_USE = range(0xF0000, 0xFFFFE)

# Texts on which tokenizers differ most easily: a symbol at the start, runs of spaces, line ends, rewritten characters,
# bytes, control tokens.
PROBE_TEXTS = (
    "问：1+1等于几？\n\n答：2。",
    "0 a  b   c\t\r\n",
    "《：（①…％）》，！",
    "</s><s><unk>",
    "  两 龘🀄é",
    "<h1>--->",
)


def fast_tokenizer(processor: SentencePieceProcessor, **settings) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece BPE (or character) model into a plain tokenizer.json that gives the same ids.

    User-defined pieces are what other converters get wrong: sentencepiece takes them out of the text before it
    normalises and before it merges, at the very start of a text too, where the dummy prefix still precedes them. Here
    the normalizer puts one private-use character in the place of each, which nothing can then touch or merge.
    One difference is left: a combining mark after a character that normalisation rewrites, as in "⑬" + U+05B3.

    Args:
        processor: the loaded model. settings: of PreTrainedTokenizerFast (`model_max_length`, special tokens, ...).
    Raises: ValueError on a model of another kind (unigram, word), or with flags that cannot be expressed.
    """
    # What cannot be expressed is refused before anything is built.
    proto = import_protobuf().ModelProto.FromString(processor.serialized_model_proto())
    _check_flags(proto)

    # 1. Give every user-defined piece that could be touched a character of its own.
    spec = proto.normalizer_spec
    rules = []
    if spec.precompiled_charsmap:
        rules.append(normalizers.Precompiled(spec.precompiled_charsmap))
    # The kinds of pieces are constants of a piece's class.
    kinds = type(proto.pieces[0])
    symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    altered = {symbol for symbol in symbols if any(rule.normalize_str(symbol) != symbol for rule in rules)}
    masked = [symbol for symbol in symbols if len(symbol) > 1 or symbol in altered]
    stand_in = dict(zip(masked, _unused_characters(proto), strict=False))

    # 2. The same vocabulary and merges, under those characters.
    names = [stand_in.get(piece.piece, piece.piece) for piece in proto.pieces]
    model = models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=_merges(proto),
        unk_token=proto.trainer_spec.unk_piece,
        byte_fallback=proto.trainer_spec.byte_fallback,
        # sentencepiece gives a run of unknown characters a single <unk>.
        fuse_unk=True,
    )

    # 3. Rules that put the stand-ins in, and take them out again.
    backend = Tokenizer(model)
    backend.normalizer = _normalizer(spec, rules, stand_in, altered)
    backend.decoder = _decoder(spec, stand_in)

    # 4. Control pieces, which a text is searched for before the normalizer sees it.
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _check_flags(proto) -> None:
    """Refuse a SentencePiece model whose rules the exported tokenizer would not follow."""
    trainer = proto.trainer_spec
    spec = proto.normalizer_spec
    # The types unigram and word do not build their pieces by merges.
    if trainer.model_type not in (trainer.BPE, trainer.CHAR):
        raise ValueError(
            "only a SentencePiece model of type bpe or char exports to tokenizer.json: keep its own format"
        )
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise ValueError("a SentencePiece model with whitespace as suffix or unescaped cannot be exported")


def _unused_characters(proto) -> list[str]:
    """Private-use characters that no piece contains (the 64k vocabulary of Baichuan has some of its own)."""
    used = set().union(*(piece.piece for piece in proto.pieces))
    characters = map(chr, PRIVATE_USE)
    return [character for character in characters if character not in used]


def _merges(proto) -> list[tuple[str, str]]:
    """Pairs in the order of the score of what they make; a user-defined piece is never part of one."""
    if proto.trainer_spec.model_type == proto.trainer_spec.CHAR:
        return []

    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == type(piece).NORMAL}
    merges = []
    # sentencepiece merges the pair whose result has the highest score; here the order of the list decides.
    for whole in sorted(scores, key=scores.get, reverse=True):
        for cut in range(1, len(whole)):
            left = whole[:cut]
            right = whole[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


def _normalizer(spec, rules: list, stand_in: dict[str, str], altered: set[str]):
    """sentencepiece's normalisation, with stand-ins for the user-defined pieces."""
    # Those that the rules would change are taken out of the raw text; runs of "▁" only exist after the rules.
    early = [symbol for symbol in stand_in if symbol in altered and set(symbol) != {"▁"}]
    steps = _replacements(early, stand_in) + rules

    # sentencepiece's own order: spaces first, then the dummy prefix, then spaces become "▁".
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))

    steps += _replacements(stand_in, stand_in)
    return normalizers.Sequence(steps)


def _replacements(symbols, stand_in: dict[str, str]) -> list:
    """A step for each symbol that puts its stand-in in its place."""
    return [normalizers.Replace(symbol, stand_in[symbol]) for symbol in _leftmost_longest(symbols)]


def _leftmost_longest(symbols) -> list[str]:
    """An order in which one replacement after the other finds what a single leftmost, longest match would.

    A symbol goes after those that contain it, and after those whose end is its beginning: they start further left.
    """
    # Symbol -> those that have to be replaced before it.
    before = {symbol: set() for symbol in symbols if len(symbol) > 1}
    for first, second in permutations(before, 2):
        if second in first or (first not in second and _ends_with_start_of(first, second)):
            before[second].add(first)

    try:
        ordered = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise ValueError(f"the user-defined pieces {error.args[1]} overlap in a circle: cannot be exported") from error

    # A single character holds no other symbol, so it goes last.
    return ordered + [symbol for symbol in symbols if len(symbol) == 1]


def _ends_with_start_of(first: str, second: str) -> bool:
    # Quick to rule out, for there are many pairs of symbols.
    if second[0] not in first:
        return False
    return any(first.endswith(second[:length]) for length in range(1, len(second)))


def _decoder(spec, stand_in: dict[str, str]):
    """Join bytes and pieces into one text, put the symbols back in it, and take the dummy prefix off."""
    # Bytes are joined first, because one character may be spread over several byte pieces.
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    for symbol, mark in stand_in.items():
        steps.append(decoders.Replace(mark, symbol.replace("▁", " ")))
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def save_tokenizer(tokenizer, directory: Path) -> None:
    """Write a Baichuan tokenizer for stock transformers: tokenizer.json, its config, and the SentencePiece model.

    `</s>` in a text stays text there too (`split_special_tokens`). tokenizer.model is for tools that read it directly.

    Raises: ValueError where the exported one, read back, gives other ids.
    """
    # Settings of the tokenizer, which the SentencePiece model alone does not have.
    specials = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("unk", "bos", "eos", "pad")}
    fast = fast_tokenizer(
        tokenizer.sp_model,
        model_max_length=tokenizer.model_max_length,
        split_special_tokens=tokenizer.split_special_tokens,
        clean_up_tokenization_spaces=False,
        **specials,
    )
    fast.save_pretrained(directory)

    # Transformers 4 and 5 both know this class by this name.
    file = Path(directory) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    # Said outright: llama.cpp would put a BOS in front of every text, which no training has seen.
    settings["add_bos_token"] = tokenizer(PROBE_TEXTS[0]).input_ids[:1] == [tokenizer.bos_token_id]
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (Path(directory) / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())

    # As a user will load it, without our code.
    exported = AutoTokenizer.from_pretrained(directory)
    for text in PROBE_TEXTS:
        if exported(text).input_ids != tokenizer(text).input_ids:
            raise ValueError(f"the exported tokenizer splits {text!r} differently: keep --format baichuan")
