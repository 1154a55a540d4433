"""Fields of requests, each checked: its type, its length, its range. What a browser sends may be anything."""

import math

# Characters of a text, and turns of a conversation.
MAX_TEXT = 100_000
MAX_TURNS = 200

SIDES = ("left", "right", "tie", "bad", "skip")


class BadField(ValueError):
    """A field of a request is missing, or is not what it has to be."""


def text_field(given, name: str, longest: int, required: bool = True) -> str | None:
    """A text of at most so many characters; None where it is empty and not required. Raises: BadField."""
    # A body may be a list or a number as well, and both have no fields.
    value = given.get(name) if hasattr(given, "get") else None
    if value is None and not required:
        return None
    if not isinstance(value, str) or len(value) > longest:
        raise BadField(f"{name} must be a text of at most {longest} characters")
    # Half of a surrogate pair is no character, and no file could hold it.
    value = value.encode("utf-8", "replace").decode()
    if required and not value.strip():
        raise BadField(f"{name} must not be empty")
    return value if value.strip() else None


def number_field(given: dict, name: str, low: float, high: float, whole: bool = False) -> float:
    """A finite number from low to high. Raises: BadField."""
    value = given.get(name)
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not low <= value <= high:
        raise BadField(f"{name} must be {'a whole' if whole else 'a'} number from {low:g} to {high:g}")
    return value


def count_field(given, name: str, most: int) -> int:
    """A small number of a query string, 1 where it is left out. Raises: BadField."""
    text = given.get(name, "1")
    if not text.isdecimal() or len(text) > 3 or int(text) > most:
        raise BadField(f"{name} must be a whole number from 0 to {most}")
    return int(text)


def vote_fields(given) -> dict:
    """The fields of a vote. Raises: BadField."""
    given = _object(given)
    side = given.get("side")
    if side not in SIDES:
        raise BadField(f"side must be one of {', '.join(SIDES)}")
    # Of a tie there is no better answer that a margin or an edit could belong to.
    prefers = side in ("left", "right")
    # How much better, and an edited answer, belong to the better one.
    margin = number_field(given, "margin", 1, 3, whole=True) if prefers and given.get("margin") is not None else None
    return {
        "key": text_field(given, "key", 60),
        # Up to 2^53, beyond which a browser's numbers are not exact.
        "pair": number_field(given, "pair", 1, 2**53, whole=True),
        "person": text_field(given, "person", 60),
        "side": side,
        "margin": margin,
        "reason": text_field(given, "reason", 2000, required=False),
        "edited": text_field(given, "edited", MAX_TEXT, required=False) if prefers else None,
        "seconds": number_field(given, "seconds", 0, 1e7),
    }


def undo_fields(given) -> tuple[int, str, str]:
    """(vote, person, tab) of an undo. Raises: BadField."""
    given = _object(given)
    number = number_field(given, "vote", 1, 2**53, whole=True)
    return number, text_field(given, "person", 60), text_field(given, "tab", 60)


def prompt_fields(given) -> list[tuple[str, str]]:
    """The turns of a conversation that ends with a question. Raises: BadField."""
    turns = _object(given).get("turns")
    # Checked here as well as in the browser: a request need not come from our page.
    if not isinstance(turns, list) or not 0 < len(turns) <= MAX_TURNS:
        raise BadField(f"turns must be a list of at most {MAX_TURNS} turns")

    checked = []
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or turn[0] not in ("system", "user", "assistant"):
            raise BadField("a turn must be [role, text], its role system, user or assistant")
        # A model may have said nothing, but nobody asks nothing.
        said = text_field({"text": turn[1]}, "text", MAX_TEXT, required=turn[0] == "user")
        checked.append((turn[0], said or ""))
    if checked[-1][0] != "user":
        raise BadField("the last turn must be the user's")
    return checked


def chat_fields(given, names: list[str]) -> dict:
    """The fields of a question to a version or to a mix of them. Raises: BadField."""
    given = _object(given)
    turns = prompt_fields(given)
    asked = given.get("version")
    if isinstance(asked, dict):
        if not 0 < len(asked) <= 2 or not set(asked) <= set(names):
            raise BadField("a mix has one or two versions of this page")
        asked = {name: number_field(asked, name, -0.2, 1.2) for name in asked}
    elif asked not in names:
        raise BadField("version must be one of this page")

    return {
        "version": asked,
        "turns": turns,
        "temperature": number_field(given, "temperature", 0, 5),
        "top_p": number_field(given, "top_p", 0.01, 1),
        "max_new_tokens": number_field(given, "max_new_tokens", 1, 100_000, whole=True),
        "seed": number_field(given, "seed", 0, 2**53, whole=True),
    }


def _object(given) -> dict:
    if not isinstance(given, dict):
        raise BadField("send an object")
    return given
