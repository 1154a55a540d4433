"""The prompt format of a run: how a dialogue becomes token ids, and which tokens end an answer.

    chat        the tokenizer's own chat template; an answer ends with the token that the template writes after it
    a text      {prompt} in a text; an answer ends with EOS
    auto        chat where the tokenizer has a chat template, else the tutorial's text

Every stage goes through `PromptFormat.query_ids` and `PromptFormat.encode_answer`, so that training, sampling, the
audit and compare.py see the same ids.
"""

import hashlib
from collections.abc import Iterable

from jinja2 import TemplateError

from rlhf.artefacts.fingerprints import padding_id
from rlhf.data.control_tokens import PROBE, ControlTokens, Marked, after, encode
from rlhf.data.dialogues import Turn, Unusable
from rlhf.data.template import AUTO, CHAT, fold, merged_turns, render

# Words that answers begin with.
FIRST_WORDS = (PROBE, "I", "The", "a", "是")


class PromptFormat:
    """One format of prompts for a tokenizer.

    Attributes:
        template: "chat", or a text with {prompt}.
        stop_ids: token ids that end an answer; the first one is what training puts behind every answer.
        pad_id: what batches are padded with; masks decide what is real, so any id will do.
        bos: True where a query begins with the BOS token.
        space_in_answer: True where the space at the end of a text template is encoded with the answer.
    """

    def __init__(
        self,
        tokenizer,
        template: str,
        *,
        chat_template: str | None = None,
        kwargs: dict | None = None,
        system_prompt: str | None = None,
        bos: bool | None = None,
        base_stop_ids: tuple[int, ...] = (),
        stop_tokens: tuple[str, ...] = (),
    ):
        """Settle stop tokens and BOS.

        Args:
            chat_template, kwargs: of "chat": its Jinja text, and what it is called with.
            system_prompt: put first where a dialogue has no system message.
            bos: None adds what the tokenizer (or the chat template) adds by itself.
            base_stop_ids: ids that the base's generation_config stops at. stop_tokens: further ones, by their text.
        Raises: ValueError where the template cannot be used, a stop token is unknown, or nothing could end an answer.
        """
        self.tokenizer = tokenizer
        self.template = template
        # What --prompt_template said, for `describe`.
        self.asked = template
        self.chat_template = chat_template
        self.kwargs = kwargs or {}
        self.system_prompt = system_prompt
        self.pad_id = padding_id(tokenizer)
        self.control = ControlTokens(tokenizer)
        if bos and tokenizer.bos_token_id is None:
            raise ValueError("--bos True, but this tokenizer has no BOS token: leave the flag out")

        # The order counts: the stop set needs the rendered template, and BOS is found by encoding with all that is
        # above.
        self.space_in_answer = template != CHAT and self._glues_space()
        self._wanted_bos = bos
        end_of_turn = self._end_of_turn() if template == CHAT else None
        self.stop_ids = self._stop_set(end_of_turn, base_stop_ids, stop_tokens)
        self._adds_bos = self._tokenizer_adds_bos() if bos is None else bos
        # Found by asking, for a chat template may write a BOS of its own.
        self.bos = self.query_ids([("user", PROBE)])[:1] == [tokenizer.bos_token_id]

    # ---- ids ----
    def query_ids(self, turns: list[Turn]) -> list[int]:
        """Token ids of a dialogue up to where its answer begins. Raises: Unusable where the template refuses it."""
        return self.with_bos(self.control.encode(*self.query_text(turns)))

    def encode_answer(self, turns: list[Turn], answer: str) -> tuple[list[int], list[int]]:
        """Ids of a dialogue, and of an answer to it with its stop token.

        Both are encoded as one text wherever the query's own ids begin it. Elsewhere the answer's first letter would
        melt into the query's last token, which no sampling could reach: there the answer is encoded by itself.

        Raises: Unusable where the template refuses the dialogue.
        """
        (texts,) = self.answer_texts(turns, [answer])
        return self.answer_ids(texts, answer, {text: self.control.encode(*text) for text in texts})

    def query_text(self, turns: list[Turn]) -> Marked:
        """The text that `query_ids` encodes. Raises: as `query_ids`."""
        return self._chat_text(turns, None) if self.template == CHAT else self._texts(turns, "")[0]

    def answer_texts(self, turns: list[Turn], answers: Iterable[str]) -> list[tuple[Marked, Marked]]:
        """The two texts that `encode_answer` encodes for each answer: query, query with answer. Raises: as that."""
        if self.template == CHAT:
            query = self._chat_text(turns, None)
            return [(query, self._chat_text(turns, answer)) for answer in answers]
        made = [self._texts(turns, answer) for answer in answers]
        return [((query, mark), (query + said, mark)) for (query, mark), said in made]

    def answer_ids(
        self, texts: tuple[Marked, Marked], answer: str, known: dict[Marked, list[int]]
    ) -> tuple[list[int], list[int]]:
        """What `encode_answer` returns, from its texts and their ids (those of `ControlTokens.encode_all`)."""
        query, whole = texts
        stop = self.stop_ids[0]
        query_ids = self.with_bos(known[query])
        # None where the tokenizer merges across the border of query and answer.
        rest = after(query_ids, self.with_bos(known[whole]))

        if self.template != CHAT:
            # A space at the template's end may belong to the answer.
            said = whole[0].removeprefix(query[0])
            plain = said.replace(whole[1], "") if whole[1] else said
            return query_ids, (self.control.continuation(plain) if rest is None else rest) + [stop]
        # What a template writes behind the stop token, such as a new line, is no part of the answer.
        if rest is not None and stop in rest:
            return query_ids, rest[: rest.index(stop) + 1]
        return query_ids, self.control.continuation(answer) + [stop]

    def decode(self, ids: list[int]) -> str:
        """Text of an answer, without its stop token and without space at its ends."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # ---- a text template ----
    def _texts(self, turns: list[Turn], answer: str) -> tuple[Marked, str]:
        """Texts of query and answer, with the mark of the control tokens that were typed in them."""
        # Marked before the template is put round them: only what somebody typed may be broken.
        turns, answer, mark = self._with_marks(self._with_system(turns), answer)
        prompt = turns[0][1] if len(turns) == 1 else fold(merged_turns(turns), self.template)
        query = render(self.template, prompt)

        bare = query.rstrip(" ") if self.space_in_answer else query
        return (bare, mark), query[len(bare) :] + answer

    def _glues_space(self) -> bool:
        """Return True if the template ends with a space that the tokenizer glues to the word after it.

        Most tokenizers do, so that a query which ends with a space cannot be continued.
        """
        query = render(self.template, PROBE)
        query_ids = encode(self.tokenizer, query)
        # One such word is enough: a query's ids must not depend on the word that its answer begins with.
        glued = any(after(query_ids, encode(self.tokenizer, query + word)) is None for word in FIRST_WORDS)
        return query.endswith(" ") and glued

    # ---- a chat template ----
    def _chat_text(self, turns: list[Turn], answer: str | None) -> Marked:
        """A dialogue in the chat template: up to its answer, or with one and all that comes after it."""
        turns, said, mark = self._with_marks(self._with_system(turns), answer or "")
        if answer is not None:
            turns = [*turns, ("assistant", said)]
        return self._rendered(turns, open_end=answer is None), mark

    def _rendered(self, turns: list[Turn], open_end: bool) -> str:
        """Text of turns in the chat template; `open_end`: with the opening of the answer that comes next."""
        messages = [{"role": role, "content": said} for role, said in turns]
        # As text and not yet as ids: afterwards a control token that somebody typed would look like the template's
        # own.
        settings = {"chat_template": self.chat_template, "add_generation_prompt": open_end, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(messages, **settings, **self.kwargs)
        # A template refuses by raise_exception; a broken one fails in as many ways as Python has.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise Unusable(f"chat template: {reason}") from None

    def _end_of_turn(self) -> int | None:
        """Id of the control token that the template writes after an answer; None where it writes none.

        Raises: ValueError where the template takes no dialogue of question and answer.
        """
        try:
            text = self._rendered([("user", PROBE), ("assistant", PROBE)], open_end=False)
        except Unusable as error:
            raise ValueError(f"{error}: it takes no question with an answer; give --chat_template FILE") from None
        # The last PROBE is the answer; the first control token behind it ends a turn.
        _, answer, tail = text.rpartition(PROBE)
        return self.control.first_in(tail) if answer else None

    # ---- both ----
    def with_bos(self, ids: list[int]) -> list[int]:
        """Ids of a text, beginning with BOS where they are to, once."""
        bos = self.tokenizer.bos_token_id
        if self.template != CHAT:
            return [bos, *ids] if self._adds_bos else ids

        # The template writes its own BOS: it never gets a second one.
        begins = bos is not None and ids[:1] == [bos]
        if self._wanted_bos is True and not begins:
            return [bos, *ids]
        return ids[1:] if self._wanted_bos is False and begins else ids

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        # A dialogue's own system message wins, wherever it stands.
        if self.system_prompt is None or any(role == "system" for role, _ in turns):
            return turns
        return [("system", self.system_prompt), *turns]

    def _with_marks(self, turns: list[Turn], answer: str) -> tuple[list[Turn], str, str | None]:
        """Turns and answer with their typed control tokens marked, and the mark (None: nothing was typed)."""
        mark = self.control.mark_for([*(said for _, said in turns), answer])
        if mark is None:
            return turns, answer, None
        marked = [(role, self.control.marked(said, mark)) for role, said in turns]
        return marked, self.control.marked(answer, mark), mark

    # ---- stop tokens and BOS ----
    def _stop_set(self, end_of_turn: int | None, base: tuple[int, ...], words: tuple[str, ...]) -> tuple[int, ...]:
        """Return the stop ids, the training stop first, the others by their ids. Raises: ValueError as `__init__`."""
        named = []
        for word in words:
            # Here, other than in data, a control token written as text is meant as one.
            ids = self.tokenizer.encode(word, add_special_tokens=False, split_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"--stop_tokens {word!r} is no single token of this tokenizer: it has {len(ids)}")
            named += ids

        eos = self.tokenizer.eos_token_id
        # The first of them is what training puts behind every answer.
        candidates = [token for token in (end_of_turn, eos, *named, *base) if token is not None]
        if not candidates:
            raise ValueError("the tokenizer has no EOS token: name its eos_token in its config, or give --stop_tokens")
        # An id beyond the vocabulary can never be sampled: a config may name one of another model.
        known = {token for token in base if 0 <= token < len(self.tokenizer)}
        others = known.union(named, {eos} - {None}) - {candidates[0]}
        return (candidates[0], *sorted(others))

    def _tokenizer_adds_bos(self) -> bool:
        """Return True if the tokenizer puts its BOS in front of a text by itself (Llama and Gemma, not Qwen)."""
        bos = self.tokenizer.bos_token_id
        usual = self.tokenizer.encode(PROBE)
        # Some put it in front of a text even where nothing is to be added: then it is in every encoded text already.
        return bos is not None and usual[:1] == [bos] and encode(self.tokenizer, PROBE)[:1] != [bos]

    # ---- in words and in run.json ----
    def record(self) -> dict:
        """What run.json keeps of the format, for a later stage to compare."""
        text = self.chat_template or self.template
        return {
            "prompt_template": self.template,
            "text": text,
            # Sixteen digits are 64 bits: short enough for a sentence, and no two templates will share them.
            "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16],
            "chat_template_kwargs": self.kwargs,
            "system_prompt": self.system_prompt,
            "bos": self.bos,
            # A server's template has to end where the query ended in training (rlhf/data/served_template.py).
            "space_in_answer": self.space_in_answer,
            "stop_tokens": self.stop_tokens(),
            "stop_ids": list(self.stop_ids),
        }

    def marker_ids(self) -> list[int]:
        """Ids of the control tokens that training meets: those of the template, and the training stop."""
        query_ids, answer_ids = self.encode_answer([("user", PROBE)], PROBE)
        control = set(self.control.ids.values())
        return sorted({token for token in query_ids + answer_ids if token in control} | {self.stop_ids[0]})

    def stop_tokens(self) -> list[str]:
        """The stop set as text, the training stop first."""
        return self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))

    def describe(self) -> str:
        """One line: which format and why, and what ends an answer."""
        kind = "the tokenizer's chat template" if self.template == CHAT else f"the text template {self.template!r}"
        why = ""
        if self.asked == AUTO:
            why = " (auto: the tokenizer has one)" if self.template == CHAT else " (auto: no chat template here)"
        bos = "yes" if self.bos else "no"
        return f"prompt format: {kind}{why}; answers end with {' or '.join(self.stop_tokens())}; BOS: {bos}"
