"""Text of an answer while its tokens come: whole characters only, and nothing that may turn out to be a stop word."""

# What decoding puts in place of bytes that are no whole character yet.
HALF = "\ufffd"


class TextStream:
    """Tokens in, pieces of text out; joined, the pieces are the answer's text.

    Only the last few tokens are decoded at each step, once with and once without the new one: a tokenizer drops the
    space in front of the first token of whatever it decodes.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = (), before: list[int] | None = None):
        """
        Args:
            stop: texts that end the answer and are no part of it.
            before: the last tokens of a text that the answer continues; None for an answer by itself, which loses the
                space at its ends.
        """
        self.tokenizer = tokenizer
        self.stop = stop
        self.strips = before is None
        # Tokens not yet known to be whole characters, behind a few that are: those up to `known`.
        self.ids = list(before or [])
        self.known = len(self.ids)
        # Text that is whole, and not yet given out.
        self.held = ""
        self.begun = False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that can be given out after one more token, and True where a stop word has ended the answer."""
        self.ids.append(token)
        shown = self._decode(self.ids[: self.known])
        whole = self._decode(self.ids)
        # A character may be spread over several tokens: nothing is shown until its last byte is there.
        if not whole.endswith(HALF):
            # The difference of two decodings, as a tokenizer may write a token otherwise at the beginning of a text.
            self.held += whole[len(shown) :]
            self.ids = self.ids[self.known :]
            self.known = len(self.ids)

        places = [place for word in self.stop if (place := self.held.find(word)) >= 0]
        if places:
            # The first of several stop words counts, whichever was named first.
            given = self._give(min(places))
            self.held = ""
            return given, True
        return self._give(len(self.held) - self._perhaps_stop()), False

    def rest(self) -> str:
        """What is left to give out where the answer ends; half a character is dropped."""
        shown = self._decode(self.ids[: self.known])
        self.held += self._decode(self.ids)[len(shown) :].rstrip(HALF)
        self.ids = self.ids[: self.known]
        return self._give(len(self.held))

    def _decode(self, ids: list[int]) -> str:
        # Control tokens stay visible: a model that writes them should not look better than it is.
        return self.tokenizer.decode(ids) if ids else ""

    def _perhaps_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop word."""
        longest = max((len(word) - 1 for word in self.stop), default=0)
        # The longest first: it holds back all that a shorter one would.
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(word.startswith(self.held[-length:]) for word in self.stop):
                return length
        return 0

    def _give(self, length: int) -> str:
        """The first characters of what is held; space at the ends of an answer by itself is never given out."""
        given = self.held[:length]
        if self.strips:
            # Kept back, and given out if more text follows: only then is it not at the end.
            given = given.rstrip()
        self.held = self.held[len(given) :]
        if self.strips and not self.begun:
            given = given.lstrip()
        self.begun = self.begun or bool(given)
        return given
