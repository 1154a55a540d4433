"""Dialogues: turns from text with tags, from one message or from a list of messages, each checked."""

import ast
import json
import re
import unicodedata
from collections.abc import Iterable

# Names of the roles in the data sets of OpenAI, ShareGPT, HH, OpenAssistant and others.
ROLES = {
    **dict.fromkeys(("user", "human", "Human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "Assistant"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}

# The turns of HH-style text; a translation may have turned the colon into a full-width one.
HH_TAG = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant)[:：][ \t]*")

# Unicode categories of what leaves no mark: control, format (zero-width) and separators.
UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")

# Roles of turns that call tools or answer for them: no text of a person or of the model.
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython", "tool_call")

# Belle writes its turns with one new line, as text of one instruction.
BELLE_TAG = re.compile(r"(?:\A\s*|\n)(Human|Assistant)[:：][ \t]*")

Turn = tuple[str, str]


class Unlearnt(str):
    """Text of an answer that is context only: its turn has weight 0."""


class BadRow(ValueError):
    """A malformed row: the reason, without file and line; `row` is what could be read of it."""

    def __init__(self, reason: str, row=None):
        super().__init__(reason)
        self.row = row


class Unusable(ValueError):
    """A well-formed row that makes no example (empty, one-sided ...): the reason it is counted under."""


# ---- turns ----
def turns(value, field: str, default_role: str) -> list[Turn]:
    """(role, text) of a text (HH-style tags split), of one message, or of a list of messages (OpenAI or ShareGPT)."""
    if isinstance(value, str):
        # A table stores a list of messages as its text.
        stored = stored_list(value)
        if stored is None:
            return _hh_turns(text_of(value, field), default_role)
        value = stored
    if isinstance(value, dict):
        return [_message(value, field)]
    if not isinstance(value, list):
        raise BadRow(f"field '{field}' must be text or a list of messages, not {type_name(value)}")
    # A list without a message has the right form: the row is counted as empty, and stops no run.
    if not value:
        raise Unusable(f"empty {field}")
    return [_message(message, field) for message in value]


def _message(message, field: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f"field '{field}' must hold messages (objects with role and content), not {type_name(message)}")

    role_key = first_of(("role", "from"), message)
    text_key = first_of(("content", "value", "text"), message)
    if (role_key is not None and message[role_key] in TOOL_ROLES) or message.get("tool_calls"):
        raise Unusable("a turn of a tool")
    if role_key is None or text_key is None:
        raise BadRow(f"a message of field '{field}' needs role and content, or from and value")

    # A list or an object cannot be looked up in ROLES, so the type comes first.
    role = message[role_key]
    if not isinstance(role, str):
        raise BadRow(f"a message of field '{field}' has {type_name(role)} for its role")
    if role not in ROLES:
        raise BadRow(f"a message of field '{field}' has the unknown role {role!r:.40}")
    said = text_of(_joined_parts(message[text_key], field), field)
    # OpenAI's format for fine-tuning: a turn of weight 0 is context.
    return ROLES[role], Unlearnt(said) if message.get("weight") == 0 else said


def _joined_parts(content, field: str):
    """The text of a content that is a list of parts, as OpenAI's API has it; any other content as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    if any(part.get("type") != "text" for part in content):
        raise Unusable(f"{field} holds more than text")
    # A part whose text is none makes the whole content None, which `text_of` then names.
    texts = [part.get("text") for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


def stored_list(text: str) -> list | None:
    """The list of messages whose text this is (JSON, or Python's own), or None."""
    # Quick to rule out, as hardly any text begins so: the parsers would read every text of a data set to its end.
    if not re.match(r"\s*\[\s*\{", text):
        return None
    # The second for tables that hold str() of a list; it reads values, and runs nothing.
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        # Deep nesting ends Python's parser in any of these ways.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(
            isinstance(item, dict) and ("role" in item or "from" in item) for item in value
        ):
            return value
    return None


def _hh_turns(text: str, default_role: str) -> list[Turn]:
    """Turns of `\\n\\nHuman: ...\\n\\nAssistant: ...`; text that begins with no tag is one of `default_role`."""
    if not HH_TAG.match(text):
        return [(default_role, text)]
    # One new line before a tag counts where no tag has two.
    tag = HH_TAG if len(HH_TAG.findall(text)) > 1 else BELLE_TAG
    pieces = tag.split(text)[1:]
    # The tag is a group of the pattern, so that split gives roles and texts in turn.
    tagged = zip(pieces[::2], pieces[1::2], strict=True)
    dialogue = [(ROLES[tag], stripped(said)) for tag, said in tagged]
    # A prompt ends with an open "Assistant:", which the template's own end replaces.
    is_open = len(dialogue) > 1 and dialogue[-1] == ("assistant", "")
    return dialogue[:-1] if is_open else dialogue


# ---- values ----
def text_of(value, field: str) -> str:
    """`value` as `stripped` leaves it. Raises: BadRow where it is no text, or text that no file can hold."""
    if not isinstance(value, str):
        raise BadRow(f"field '{field}' must be text, not {type_name(value)}")
    # JSON may escape half of a surrogate pair: Python holds it, but neither tokenizers nor UTF-8 files take it.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"field '{field}' holds half a surrogate pair at character {error.start + 1}") from None
    return stripped(value)


def stripped(text: str) -> str:
    """`text` without space at both ends; empty where all of it is space, control or zero-width characters."""
    text = text.strip()
    visible = any(unicodedata.category(character) not in UNSEEN for character in text)
    return text if visible else ""


def type_name(value) -> str:
    # The JSON reader puts a BadRow in place of an object that has a name twice.
    if isinstance(value, BadRow):
        return str(value)
    if value is None:
        return "None"

    # The words of JSON, for readers who do not know Python's types.
    names = {
        str: "text",
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def first_of(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The first of `names` that is among `columns`, or None."""
    return next((name for name in names if name in columns), None)
