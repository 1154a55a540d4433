"""Texts of answers: their language, their sentences, and whether two of them may be equally good."""

import re

# Two answers that share this part of the shorter one's pairs of letters may be equally good.
ALIKE = 0.6


def language(text: str) -> str:
    """Return "zh" where a text holds a Chinese character, else "en"."""
    return "zh" if re.search(r"[\u3400-\u9fff]", text) else "en"


def sentences(text: str) -> list[str]:
    """The sentences of a Chinese or English text, with their marks; what holds no letter or digit is none."""
    # A full stop ends a sentence only before white space: "3.14" stays whole.
    parts = re.split(r"(?<=[。！？!?\n])|(?<=\.)(?=\s)", text)
    return [part.strip() for part in parts if re.search(r"\w", part)]


def letters(text: str) -> str:
    """A text without its marks and white space, in lower case."""
    return "".join(re.findall(r"\w", text.lower()))


def alike(one: str, other: str) -> bool:
    """Return True if two texts have the same letters, or most of their pairs of neighbouring letters in common.

    Data is full of such answers: "yes" and "Yes.", one apology after the other.
    """
    one = letters(one)
    other = letters(other)
    if one == other:
        return True

    # Pairs, because any two texts of one language share most of their single letters.
    one_pairs = _pairs_of_letters(one)
    other_pairs = _pairs_of_letters(other)
    common = one_pairs & other_pairs
    fewer = min(len(one_pairs), len(other_pairs))
    # A text of one letter has no pair, and is like nothing but itself.
    return fewer > 0 and len(common) >= ALIKE * fewer


def _pairs_of_letters(text: str) -> set[str]:
    return {text[place : place + 2] for place in range(len(text) - 1)}


def same_question(row: dict, other: dict) -> bool:
    """Return True if two rows are of one dialogue, or have one prompt but for its marks: one answer may suit both."""
    # A row without an opening belongs to no known dialogue: None never equals "".
    if row.get("opening") == other.get("opening", ""):
        return True
    return letters(row["prompt"]) == letters(other["prompt"])
