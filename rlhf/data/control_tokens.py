"""Control tokens (BOS, EOS, markers of turns): a template may write them, a typed one stays characters.

A typed `<|im_end|>` is broken by a mark before the template sees it. Between the template's own control tokens the
text is then encoded piece by piece, each piece as plain text without its marks.
"""

import copy
import re
from collections.abc import Iterable
from functools import cached_property
from itertools import chain

# Texts in front of which another text is encoded, to see it as a continuation.
ANCHORS = ("\n", "。", ":", "a")

# Characters that no text holds by the Unicode standard: one of them marks a typed control token.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# A word that every tokenizer has tokens for.
PROBE = "Yes"

# A text, and the mark of the control tokens that were typed in it (None: there are none).
Marked = tuple[str, str | None]


# ---- plain text ----
def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`: no BOS or EOS added, and a `</s>` written in the text stays plain characters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def continuation(tokenizer, text: str) -> list[int]:
    """Token ids of a text in the middle of another: SentencePiece puts a space in front of a text that begins."""
    for anchor in ANCHORS:
        rest = after(encode(tokenizer, anchor), encode(tokenizer, anchor + text))
        if rest is not None:
            return rest
    return encode(tokenizer, text)


def after(prefix: list[int], whole: list[int]) -> list[int] | None:
    """What `whole` holds after `prefix`; None where it does not begin with it."""
    return whole[len(prefix) :] if whole[: len(prefix)] == prefix else None


# ---- control tokens ----
class ControlTokens:
    """The control tokens of a tokenizer, and text around them as ids.

    Attributes:
        ids: text -> id of every token that stands for no text. `<think>` is none of them: answers may hold it.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {token.content: index for index, token in added if token.special}
        for word, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            # Not every tokenizer lists its special tokens among the added ones.
            self.ids.setdefault(word, index)
        # Some templates end a turn with an added token that is not flagged as special.
        self._added = self.ids | {token.content: index for index, token in added}
        self._pattern = _any_of(self.ids)
        # What the tokenizer itself cuts a text at, before anything else looks at it.
        self._cuts = _any_of(token.content for _, token in added if not token.normalized)
        self._cuts_freely = _cuts_freely(tokenizer)
        # Whether a text by itself has other ids than the same text inside another.
        self._has_prefix = encode(tokenizer, PROBE) != continuation(tokenizer, PROBE)

    def first_in(self, text: str) -> int | None:
        """Id of the first added token in a text of the template's; it counts as a control token from now on."""
        match = _any_of(self._added).search(text)
        if match is None:
            return None
        self.ids[match.group()] = self._added[match.group()]
        self._pattern = _any_of(self.ids)
        return self.ids[match.group()]

    def mark_for(self, texts: Iterable[str]) -> str | None:
        """A character to mark typed control tokens with; None where no text holds one, as in nearly every row."""
        texts = list(texts)
        if not any(self._pattern.search(text) for text in texts):
            return None
        return next(mark for mark in MARKS if not any(mark in text for text in texts))

    def marked(self, text: str, mark: str) -> str:
        """`text` with its control tokens broken by `mark`, so that they are told from the template's own."""
        return self._pattern.sub(lambda match: f"{match.group()[0]}{mark}{match.group()[1:]}", text)

    def encode(self, text: str, mark: str | None) -> list[int]:
        """Ids of a text whose control tokens are tokens, but for the marked ones.

        Without a mark the whole text is one call, so its ids are those of the tokenizer's own apply_chat_template.
        """
        if mark is None:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

        ids: list[int] = []
        # The pattern is one group, so that the control tokens come out between the pieces.
        for piece in self._pattern.split(text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            elif piece:
                plain = piece.replace(mark, "")
                ids += self.continuation(plain) if ids else encode(self.tokenizer, plain)
        return ids

    def encode_all(self, texts: Iterable[Marked]) -> dict[Marked, list[int]]:
        """The ids that `encode` gives each text: one call of a fast tokenizer, which spreads it over its threads.

        Texts of one row share most of their pieces, such as the prompt of two answers: each is encoded once.
        """
        texts = set(texts)
        # Marked texts are rare, and a Python tokenizer has no threads.
        single = {text for text in texts if text[1] is not None or not self.tokenizer.is_fast}
        own = self._of_another_thread
        known = {text: own.encode(*text) for text in single}

        cut = {text: self._cuts.split(text[0]) if self._cuts_freely else [text[0]] for text in texts - single}
        pieces = list(dict.fromkeys(chain.from_iterable(cut.values())))
        if pieces:
            settings = {"add_special_tokens": False, "split_special_tokens": False, "return_attention_mask": False}
            ids = dict(zip(pieces, own.tokenizer(pieces, **settings)["input_ids"], strict=True))
            known |= {text: list(chain.from_iterable(map(ids.get, parts))) for text, parts in cut.items()}
        return known

    @cached_property
    def _of_another_thread(self) -> "ControlTokens":
        """A copy of these: a tokenizer changes its settings at every call, so two threads must not share one."""
        return copy.deepcopy(self)

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on another one."""
        return continuation(self.tokenizer, text) if self._has_prefix else encode(self.tokenizer, text)


def _cuts_freely(tokenizer) -> bool:
    """Return True if the ids of a text are those of its pieces between added tokens, wherever a piece stands."""
    if not tokenizer.is_fast:
        return False
    # Such a token takes the space beside it, or is none beside a letter.
    outer = (token for token in tokenizer.added_tokens_decoder.values() if not token.normalized)
    looks_around = any(token.lstrip or token.rstrip or token.single_word for token in outer)
    # Metaspace with this scheme puts a space in front of the first piece alone.
    before = tokenizer.backend_tokenizer.pre_tokenizer
    first_differs = before is not None and b'"first"' in before.__getstate__()
    return not looks_around and not first_differs


def _any_of(words: Iterable[str]) -> re.Pattern:
    """A pattern of these words, the longest first, in a group; one that never matches where there are none."""
    escaped = [re.escape(word) for word in sorted(words, key=len, reverse=True) if word]
    return re.compile(f"({'|'.join(escaped)})" if escaped else "((?!))")
