"""One row of any format as {"prompt", "answer"}, {"prompt", "chosen", "rejected"} or {"prompt"}.

`columns.find_format` recognises a format by its columns; `examples` turns a row into a list of examples. Every answer
of an SFT dialogue makes an example; a preference is about the last answer. template.py folds earlier turns.
"""

import contextlib
import math

from rlhf.data.columns import RANKED_FIELD, Format
from rlhf.data.dialogues import ROLES, BadRow, Turn, Unlearnt, Unusable, text_of, turns, type_name
from rlhf.data.template import joined_turns, prompt_of, up_to_last_question

# Tokenizing millions of characters takes minutes, and no --max_length would keep such a row.
MAX_CHARACTERS = 200_000


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
        return _with_answers(row, fmt, context, template)

    # What is left is a prompt, here or inside the chosen side of a preference.
    # HH-style data keep the prompt inside the chosen side, as one text or as messages.
    if fmt.chosen and (not context or isinstance(row.get(fmt.chosen), list)):
        side = turns(_value(row, fmt.chosen), fmt.chosen, "assistant")
        context = _before_answer(side, context)
    # A data set of single messages holds answers too (OpenAssistant).
    if isinstance(row.get("role"), str) and ROLES.get(row["role"]) not in (None, "user"):
        raise Unusable("a message that is no prompt")
    return [prompt_of(up_to_last_question(context), template)]


def _with_answers(row: dict, fmt: Format, context: list[Turn], template: str) -> list[dict]:
    """Examples of a prompt and its answers; an answer that is a whole dialogue has its own context."""
    value = _value(row, fmt.answer)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        dialogue = turns(value, fmt.answer, "assistant")
        # A list that begins with a question is the whole dialogue: with the prompt column in front its question would
        # come twice.
        if dialogue[0][0] != "assistant":
            return _answered([*_systems(context), *dialogue], template)

    asked = prompt_of(up_to_last_question(context), template)
    answers = _answers(value, fmt.answer)
    # A list under this name is ranked, the best first; other lists are equally good answers.
    if fmt.answer == RANKED_FIELD and len(answers) > 1:
        answers = answers[:1]
    return [{**asked, "answer": answer} for answer in answers]


def _systems(context: list[Turn]) -> list[Turn]:
    return [turn for turn in context if turn[0] == "system"]


def _before_answer(side: list[Turn], context: list[Turn]) -> list[Turn]:
    """The turns before the last answer of a side.

    A side that is a whole dialogue holds its own context (a system message may stand beside it); a bare answer
    continues the prompt's.
    """
    before = side[:-1] if side and side[-1][0] == "assistant" else side
    # A bare answer is a side that begins with the assistant.
    is_dialogue = bool(side) and side[0][0] != "assistant"
    if not is_dialogue:
        return context + before
    return before if before[:1] and before[0][0] == "system" else _systems(context) + before


def _context(row: dict, fmt: Format) -> list[Turn]:
    """The turns before the answer: the dialogue column, or system + history + prompt + input."""
    # An empty or missing extra is usual, a 0 or False in place of text a mistake.
    extras = {name: row[name] for name in fmt.extras if row.get(name) not in (None, "", [])}
    system = []
    if "system" in extras:
        system = [("system", text_of(extras["system"], "system"))]
    if fmt.dialogue:
        dialogue = turns(_value(row, fmt.dialogue), fmt.dialogue, "user")
        # A dialogue's own system message wins.
        return dialogue if dialogue[0][0] == "system" else system + dialogue
    if not fmt.prompt:
        return system

    asked = turns(_value(row, fmt.prompt), fmt.prompt, "user")
    for name in ("input", "context"):
        if name in extras:
            role, said = asked[-1]
            given = text_of(extras[name], name)
            asked[-1] = (role, f"{said}\n{given}".strip())
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


def _sides(row: dict, fmt: Format) -> dict[str, tuple[str, object]]:
    """ "chosen" and "rejected" -> (field, value), by their columns, by a label, or by their rank."""
    if fmt.labelled:
        first, second, label, _, better = fmt.labelled
        winner = better(_value(row, label))
        # A tie is no mistake in the data, and teaches nothing: it is counted, and stops no run.
        if winner is None:
            raise Unusable("neither answer is preferred")
        names = (first, second) if winner == 0 else (second, first)
        return {side: (name, _value(row, name)) for side, name in zip(("chosen", "rejected"), names, strict=True)}

    if fmt.ranked:
        ranked = _value(row, fmt.ranked)
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise BadRow(
                f"field '{fmt.ranked}' must be a list of answers, the best first, or give chosen and rejected"
            )
        # The best two, as LLaMA-Factory takes them; what is ranked below is in no pair.
        return {"chosen": (fmt.ranked, ranked[0]), "rejected": (fmt.ranked, ranked[1])}
    return {"chosen": (fmt.chosen, _value(row, fmt.chosen)), "rejected": (fmt.rejected, _value(row, fmt.rejected))}


def _preference(row: dict, fmt: Format, context: list[Turn], template: str) -> dict:
    answers = {}
    prompts = {}

    # Each side gives an answer, and the prompt that it answers.
    for name, (field, value) in _sides(row, fmt).items():
        side = turns(value, field, "assistant")
        if side[-1][0] != "assistant" or not side[-1][1]:
            raise Unusable(f"empty {name}")
        answers[name] = side[-1][1]
        prompts[name] = prompt_of(up_to_last_question(_before_answer(side, context)), template)

    # Scores of answers to different prompts cannot be compared.
    if prompts["chosen"]["prompt"] != prompts["rejected"]["prompt"]:
        raise Unusable("chosen and rejected differ in their prompt")

    # As texts; ids are compared once more when they are made, for different texts may have the same.
    if answers["chosen"] == answers["rejected"]:
        raise Unusable("chosen == rejected")

    # Both sides have the same prompt by now.
    pair = prompts["chosen"] | answers
    if fmt.margin:
        pair["margin"] = _margin(row, fmt.margin)
    return pair


def _margin(row: dict, field: str) -> float:
    value = _value(row, field)
    # A table of texts, such as CSV, holds numbers as texts.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
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
        # A turn of weight 0 is context, and teaches nothing.
        if not isinstance(joined[number][1], Unlearnt):
            made.append({**asking, "answer": joined[number][1]})
    if not made:
        raise Unusable("every answer has weight 0")
    return made


def _value(row: dict, field: str):
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    return row[field]
