"""Row formats: from a dataset's columns to {"prompt", "answer"}, {"prompt", "chosen", "rejected"} or {"prompt"}.

`find_format` recognises a format by its columns; `examples` turns a row of any format into a list of examples. Every
answer of an SFT dialogue makes an example; a preference is about the last answer. template.py folds earlier turns.
"""

import math
from dataclasses import dataclass

from rlhf.data.dialogues import BadRow, Turn, Unusable, first_of, text_of, turns, type_name
from rlhf.data.template import joined_turns, prompt_of, up_to_last_question

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

# Columns that extend a prompt where they hold something: `input` after an `instruction`, the others before the prompt.
EXTRA_FIELDS = ("input", "system", "history")

# Tokenizing millions of characters takes minutes, and no --max_length would keep such a row.
MAX_CHARACTERS = 200_000


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

    def __str__(self) -> str:
        names = (self.dialogue, self.prompt, *self.extras, self.answer, self.chosen, self.rejected, self.margin)
        return f"{self.kind} rows from " + " + ".join(name for name in names if name)


# ---- which columns ----
def find_format(columns: set[str], kind: str, named: dict[str, str | None]) -> Format:
    """Choose the columns for rows of `kind` ("sft", "preference" or "prompt").

    Args:
        columns: names that the data has.
        named: columns the user gave under "prompt", "answer", "chosen", "rejected" (None: find it) and "margin" (None:
            none is read); they must exist.
    Raises: ValueError naming the columns there are, and the flags that say which is which.
    """
    for role, name in named.items():
        if name and name not in columns:
            raise ValueError(f"--{role}_field {name} is not among the columns {_listed(columns)}")

    # Columns by the names that the user gave, else by the usual ones.
    prompt = named.get("prompt") or first_of(PROMPT_FIELDS, columns)
    dialogue = None if named.get("prompt") else first_of(DIALOGUE_FIELDS, columns)
    # "context" is too common a word to be taken for a dialogue where any other column fits.
    if kind == "preference" and not dialogue and not prompt:
        dialogue = first_of(("context",), columns)

    answer_names = [name for name in ANSWER_FIELDS if name != prompt]
    answer = named.get("answer") or first_of(answer_names, columns)
    chosen = named.get("chosen") or first_of(CHOSEN_FIELDS, columns)
    rejected = named.get("rejected") or first_of(REJECTED_FIELDS, columns)
    # An answer column that the user named wins over the dialogue.
    if kind == "sft" and (named.get("answer") or not dialogue):
        dialogue = None

    # The columns that extend the prompt: system, history, input.
    extras = () if dialogue or not prompt else _extras(columns, prompt)
    asked = {"prompt": None if dialogue else prompt, "dialogue": dialogue, "extras": extras}
    if kind == "preference" and chosen and rejected:
        return Format(kind, **asked, chosen=chosen, rejected=rejected, margin=named.get("margin"))

    if kind == "sft" and (dialogue or (prompt and answer)):
        return Format(kind, **asked, answer=None if dialogue else answer)

    if kind == "prompt" and (dialogue or prompt):
        return Format(kind, **asked)

    # HH-style preferences have no prompt column: the chosen side holds the whole dialogue.
    if kind == "prompt" and chosen:
        return Format(kind, chosen=chosen)

    raise _no_format(columns, kind)


def _no_format(columns: set[str], kind: str) -> ValueError:
    """The error where no columns fit; it names the flags that would settle it."""
    needed = {
        "sft": ("prompt", "answer"),
        "preference": ("prompt", "chosen", "rejected"),
        "prompt": ("prompt",),
    }
    flags = ", ".join(f"--{role}_field" for role in needed[kind])
    return ValueError(f"no {kind} format fits the columns {_listed(columns)}: name them with {flags}")


def _extras(columns: set[str], prompt: str) -> tuple[str, ...]:
    present = [name for name in EXTRA_FIELDS if name in columns]
    # `input` belongs to an `instruction`; beside another prompt it may be anything.
    if prompt != "instruction":
        present = [name for name in present if name != "input"]
    return tuple(present)


def _listed(columns: set[str]) -> str:
    # A damaged file may have names that no terminal can print, or thousands of characters long: repr escapes them.
    return ", ".join(repr(name)[1:-1][:40] for name in sorted(columns)[:20])


# ---- one row ----
def examples(row, fmt: Format, template: str) -> list[dict]:
    """The examples of one row, texts stripped at both ends; an answer may be empty.

    Raises: BadRow where the row is malformed, Unusable where it is well-formed but makes no example.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object with named fields, not {type_name(row)}")

    if not row:
        raise BadRow("the row has no fields")

    context = _context(row, fmt)
    if fmt.kind == "preference":
        return [_preference(row, fmt, context, template)]

    if fmt.kind == "sft" and fmt.dialogue:
        return _answered(context, template)

    if fmt.kind == "sft":
        asked = prompt_of(up_to_last_question(context), template)
        answers = _answers(_value(row, fmt.answer), fmt.answer)
        return [{**asked, "answer": answer} for answer in answers]

    # What is left is a prompt, here or inside the chosen side of a preference.
    if fmt.chosen:
        context = turns(_value(row, fmt.chosen), fmt.chosen, "assistant")
    return [prompt_of(up_to_last_question(context), template)]


def _context(row: dict, fmt: Format) -> list[Turn]:
    """The turns before the answer: the dialogue column, or system + history + prompt + input."""
    if fmt.dialogue:
        return turns(_value(row, fmt.dialogue), fmt.dialogue, "user")
    if not fmt.prompt:
        return []

    asked = turns(_value(row, fmt.prompt), fmt.prompt, "user")
    # An empty or missing extra is usual, a 0 or False in place of text a mistake.
    extras = {name: row[name] for name in fmt.extras if row.get(name) not in (None, "", [])}
    if "input" in extras:
        role, said = asked[-1]
        given = text_of(extras["input"], "input")
        asked[-1] = (role, f"{said}\n{given}".strip())

    system = []
    if "system" in extras:
        system = [("system", text_of(extras["system"], "system"))]
    return system + _history(extras.get("history", [])) + asked


def _history(pairs) -> list[Turn]:
    is_list = isinstance(pairs, list)
    if not is_list or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise BadRow("field 'history' must be a list of [question, answer] pairs")

    history = []
    for question, answer in pairs:
        history.append(("user", text_of(question, "history")))
        history.append(("assistant", text_of(answer, "history")))
    return history


def _preference(row: dict, fmt: Format, context: list[Turn], template: str) -> dict:
    answers = {}
    prompts = {}

    # Each side gives an answer, and the prompt that it answers.
    for name, field in (("chosen", fmt.chosen), ("rejected", fmt.rejected)):
        side = turns(_value(row, field), field, "assistant")
        if side[-1][0] != "assistant" or not side[-1][1]:
            raise Unusable(f"empty {name}")
        # A side that is a whole dialogue holds its own context; a bare answer continues the prompt's.
        is_dialogue = side[0][0] != "assistant"
        before = side[:-1] if is_dialogue else context + side[:-1]
        answers[name] = side[-1][1]
        prompts[name] = prompt_of(up_to_last_question(before), template)

    # Scores of answers to different prompts cannot be compared.
    if prompts["chosen"]["prompt"] != prompts["rejected"]["prompt"]:
        raise Unusable("chosen and rejected differ in their prompt")

    if answers["chosen"] == answers["rejected"]:
        raise Unusable("chosen == rejected")

    pair = prompts["chosen"] | answers
    if fmt.margin:
        pair["margin"] = _margin(row, fmt.margin)
    return pair


def _margin(row: dict, field: str) -> float:
    value = _value(row, field)
    # Python counts true and false among its integers.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        shown = repr(value) if isinstance(value, str | float) else type_name(value)
        raise BadRow(f"field '{field}' must be a number, not {shown}"[:200])
    return float(value)


def _answers(value, field: str) -> list[str]:
    """Answers of a text, of a list of texts (HC3: one example each), or of a list of messages."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        answers = [text_of(item, field) for item in value]
    else:
        dialogue = turns(value, field, "assistant")
        answers = [said for role, said in dialogue if role == "assistant"]

    # Among several answers an empty one is dropped alone, later, and counted.
    if not any(answers):
        raise Unusable("empty answer")
    return answers


def _answered(dialogue: list[Turn], template: str) -> list[dict]:
    """One example for each answer of a dialogue, with everything before it as its prompt."""
    joined = joined_turns(dialogue)
    asked = [number for number, (role, _) in enumerate(joined) if role == "assistant"]
    if not asked:
        raise Unusable("no answer in the dialogue")

    if asked[0] == 0:
        raise Unusable("dialogue begins with an answer")

    made = []
    asking = {"prompt": ""}

    for number in asked:
        # A prompt that is too long to be kept grows no further, or a dialogue of 10,000 turns would fill the memory.
        if len(asking["prompt"]) <= MAX_CHARACTERS:
            asking = prompt_of(joined[:number], template)
        made.append({**asking, "answer": joined[number][1]})
    return made


def _value(row: dict, field: str):
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    return row[field]
