"""Which columns of a data set hold the prompt, the answer, both sides of a pair: found by their usual names."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rlhf.data.dialogues import first_of
from rlhf.data.located import Located

# Usual names of the columns; the first one that the data has is taken.
PROMPT_FIELDS = ("prompt", "instruction", "question", "query", "q", "user", "problem", "input", "text")

ANSWER_FIELDS = (
    "answer",
    "response",
    "output",
    "a",
    "completion",
    "target",
    "assistant",
    "chatgpt_answers",
    "answers",
)

DIALOGUE_FIELDS = ("conversations", "messages", "conversation", "dialogue")

CHOSEN_FIELDS = ("chosen", "response_chosen", "preferred")

REJECTED_FIELDS = ("rejected", "response_rejected", "dispreferred")

# Columns that extend a prompt where they hold something: `input` and `context` after an `instruction` or `question`,
# the others before the prompt.
EXTRA_FIELDS = ("input", "context", "system", "history")


def _sign(label) -> int | None:
    """HelpSteer's strength of a preference: negative for the first answer, positive for the second."""
    if not isinstance(label, int | float) or label == 0:
        return None
    return int(label > 0)


# Two answers with a label that says which is better: columns of both, of the label, of the prompt; what the label says
# (0: the first, 1: the second, None: neither).
# In this order: PKU-SafeRLHF; SHP, whose label is 1 for the first answer; HelpSteer3; HelpSteer2; Chatbot Arena.
LABELLED = (
    ("response_0", "response_1", "better_response_id", "prompt", {0: 0, 1: 1}.get),
    ("human_ref_A", "human_ref_B", "labels", "history", {1: 0, 0: 1}.get),
    ("response1", "response2", "overall_preference", "context", _sign),
    ("response_1", "response_2", "preference_strength", "prompt", _sign),
    ("conversation_a", "conversation_b", "winner", None, {"model_a": 0, "model_b": 1}.get),
)


@dataclass(frozen=True)
class Format:
    """The column of every role; None for a role that the data lacks. `dialogue` takes the place of `prompt`."""

    kind: str
    prompt: str | None = None
    dialogue: str | None = None
    extras: tuple[str, ...] = ()
    answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    margin: str | None = None
    # Two answers and the column that says which is better, in place of chosen and rejected.
    labelled: tuple | None = None
    # One column with a list of answers, the best first.
    ranked: str | None = None
    # Columns that hold something else than this format reads.
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = [self.dialogue, self.prompt, *self.extras, self.answer, self.chosen, self.rejected, self.margin]
        names += [*(self.labelled or ())[:3], self.ranked]
        unread = f" (not read: {_listed(set(self.unread))})" if self.unread else ""
        return f"{self.kind} rows from " + " + ".join(dict.fromkeys(name for name in names if name)) + unread


# A list of answers under this name is ranked, the best first (LLaMA-Factory).
RANKED_FIELD = "output"

# Columns of bookkeeping, which nobody misses.
BOOKKEEPING = {
    "id", "source", "category", "lang", "language", "idx", "index", "message_id", "parent_id", "conversation_id",
    "prompt_id", "dataset", "score", "human_answers", "turn", "tstamp",
}  # fmt: skip


# ---- which columns ----
def find_format(columns: set[str], kind: str, named: dict[str, str | None]) -> Format:
    """Choose the columns for rows of `kind` ("sft", "preference" or "prompt").

    Args:
        columns: names that the data has.
        named: columns the user gave under "prompt", "answer", "chosen", "rejected" (None: find it) and "margin" (None:
            none is read); they must exist.
    Raises: ValueError naming the columns there are, and the flags that say which is which.
    """
    # To find another column in place of a mistyped one would hide the mistake.
    for role, name in named.items():
        if name and name not in columns:
            raise ValueError(f"--{role}_field {name} is not among the columns {_listed(columns)}")

    # Columns by the names that the user gave, else by the usual ones.
    prompt = named.get("prompt") or first_of(PROMPT_FIELDS, columns)
    # A prompt that the user named wins over a dialogue that is there too.
    dialogue = None if named.get("prompt") else first_of(DIALOGUE_FIELDS, columns)
    # "context" is too common a word to be taken for a dialogue where any other column fits.
    if kind in ("preference", "prompt") and not dialogue and not prompt:
        dialogue = first_of(("context",), columns)

    # One column cannot be both: a user may have named one of these as the prompt.
    answer_names = [name for name in ANSWER_FIELDS if name != prompt]
    answer = named.get("answer") or first_of(answer_names, columns)
    chosen = named.get("chosen") or first_of(CHOSEN_FIELDS, columns)
    rejected = named.get("rejected") or first_of(REJECTED_FIELDS, columns)
    # An answer column that the user named wins over the dialogue.
    if kind == "sft" and (named.get("answer") or not dialogue):
        dialogue = None

    # The columns that extend the prompt: system, history, input, context.
    extras = _extras(columns, prompt, dialogue)
    asked = {"prompt": None if dialogue else prompt, "dialogue": dialogue, "extras": extras}
    settled = _settled(kind, asked, answer, chosen, rejected, named.get("margin"), columns)
    if settled is None:
        raise _no_format(columns, kind)

    # What nobody reads is named: a column that matters would otherwise be gone in silence.
    read = {
        settled.prompt,
        settled.dialogue,
        settled.answer,
        settled.chosen,
        settled.rejected,
        settled.margin,
        settled.ranked,
    }
    read |= {*settled.extras, *(settled.labelled or ())[:4]}
    return replace(settled, unread=tuple(sorted(columns - read - BOOKKEEPING)))


def _settled(kind: str, asked: dict, answer, chosen, rejected, margin, columns: set[str]) -> Format | None:
    """The format of these columns, or None where none fits."""
    has_prompt = asked["dialogue"] or asked["prompt"]
    if kind == "preference" and chosen and rejected:
        return Format(kind, **asked, chosen=chosen, rejected=rejected, margin=margin)
    if kind == "preference":
        # Both answers and their label have to be there; the prompt may go by another name.
        known = [rule for rule in LABELLED if {*rule[:3]} <= columns]
        if known:
            prompt = known[0][3] if known[0][3] in columns else asked["prompt"]
            return Format(kind, prompt=prompt, extras=asked["extras"], labelled=known[0], margin=margin)
        is_ranked = RANKED_FIELD in columns and has_prompt
        return Format(kind, **asked, ranked=RANKED_FIELD) if is_ranked else None

    if kind == "sft" and (asked["dialogue"] or (asked["prompt"] and answer)):
        return Format(kind, **asked, answer=None if asked["dialogue"] else answer)
    # A chosen side that is a whole dialogue says what its pair asks, whatever stands in the prompt column.
    if kind == "sft" and chosen and answer == chosen:
        return Format(kind, answer=chosen)
    if kind == "prompt" and has_prompt:
        return Format(kind, **asked, chosen=chosen if rejected else None)

    # HH-style preferences have no prompt column: the chosen side holds the whole dialogue.
    return Format(kind, chosen=chosen) if kind == "prompt" and chosen else None


def _no_format(columns: set[str], kind: str) -> ValueError:
    """The error where no columns fit; it names the flags that would settle it."""
    needed = {
        "sft": ("prompt", "answer"),
        "preference": ("prompt", "chosen", "rejected"),
        "prompt": ("prompt",),
    }
    flags = ", ".join(f"--{role}_field" for role in needed[kind])
    chosen = first_of(CHOSEN_FIELDS, columns)
    if kind == "sft" and chosen and first_of(REJECTED_FIELDS, columns):
        pairs = f"these are preference pairs: give --answer_field {chosen} to train on the better answers"
        return ValueError(f"no sft format fits the columns {_listed(columns)}: {pairs}")
    return ValueError(f"no {kind} format fits the columns {_listed(columns)}: name them with {flags}")


def _extras(columns: set[str], prompt: str | None, dialogue: str | None) -> tuple[str, ...]:
    """The columns that extend a prompt; beside a dialogue a system message alone."""
    if dialogue:
        return (first_of(("system",), columns) and ("system",)) or ()
    if not prompt:
        return ("system",) if "system" in columns else ()
    present = [name for name in EXTRA_FIELDS if name in columns and name != prompt]
    # `input` belongs to an `instruction`, `context` to that or to a `question`; beside others they may be anything.
    if prompt != "instruction":
        present = [name for name in present if name != "input"]
    if prompt not in ("instruction", "question"):
        present = [name for name in present if name != "context"]
    return tuple(present)


def _listed(columns: set[str]) -> str:
    # A damaged file may have names that no terminal can print, or thousands of characters long: repr escapes them.
    return ", ".join(repr(name)[1:-1][:40] for name in sorted(columns)[:20])


class Survey:
    """What all rows of a split show together: how many there are, which columns, whether they are texts alone."""

    def __init__(self, located: Iterable[Located]):
        self.count = 0
        self.only_texts = True
        self.first_place = ""
        self.counts: Counter = Counter()
        for where, row in located:
            self.first_place = self.first_place or where
            self.count += 1
            self.only_texts = self.only_texts and isinstance(row, str)
            self.counts.update(row.keys() if isinstance(row, dict) else ())

    def usual_columns(self) -> set[str]:
        """The columns that most rows have: one stray name must not decide how all the others are read."""
        most = max(self.counts.values(), default=0)
        return {name for name, count in self.counts.items() if 2 * count >= most}

    def hint(self) -> str:
        """Hint for a source whose columns fit no format: a file's shape shows in its rows only."""
        if self.first_place.rpartition(":")[0].lower().endswith(".csv"):
            return "; the first line of a .csv must hold the column names"
        return "; a file of one object must be made a list of rows" if self.count == 1 else ""
