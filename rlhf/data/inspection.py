"""--inspect_data: the funnel, how long the rows are, and the first rows as the model will see them."""

import sys
from itertools import groupby

from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows
from rlhf.run.terminal import printable

# Limits that people choose between, in tokens.
LIMITS = (512, 1024)

# Share of pairs above which the longer answer being the better one is a rule worth a warning.
LONGER_IS_BETTER = 0.65

# Round what is trained on: in the character sets of UTF-8 and GBK, and hardly ever in a text.
OPENS = "〖"
CLOSES = "〗"


def inspect_rows(prompt_format: PromptFormat, rows: Rows, funnel: Funnel, count: int = 3) -> None:
    """Print funnel, lengths, and the first rows: text, ids, and 1 where there is a loss."""
    print(funnel.table(), prompt_format.describe(), *length_lines(rows, funnel), sep="\n")
    # A prompt of PPO has nothing that is trained on.
    if any(1 in mask for _, _, mask in _sequences(rows[0])):
        print(f"{OPENS} and {CLOSES} stand round what is trained on")

    for number, row in enumerate(rows[:count], start=1):
        for name, ids, mask in _sequences(row):
            print(f"\n--- row {number}, {name}, {len(ids)} tokens")
            print(_readable(prompt_format, ids, mask))
            print("ids ", *ids)
            print("mask", *mask)


# ---- lengths ----
def length_lines(rows: Rows, funnel: Funnel) -> list[str]:
    """Tokens of the rows that were encoded, those too long included; of pairs also both sides of the kept ones."""
    lengths = sorted(funnel.lengths)
    if not lengths:
        return []
    # A length that some row has, not a mean of two.
    middle = lengths[len(lengths) // 2]
    high = lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
    lost = [f"{sum(length > limit for length in lengths) / len(lengths):.1%} at {limit}" for limit in LIMITS]
    lines = [f"tokens of a row: half have at most {middle}, 95 % at most {high}, the longest {lengths[-1]}"]
    lines.append(f"longer than a limit, and lost by it: {', '.join(lost)}")

    if len(rows) and "chosen_ids" in rows[0]:
        chosen = rows.lengths("chosen_ids")
        rejected = rows.lengths("rejected_ids")
        longer = (chosen > rejected).mean()
        lines.append(
            f"mean tokens of an answer: chosen {chosen.mean():.0f}, rejected {rejected.mean():.0f}; chosen is the "
            f"longer one in {longer:.0%} of the pairs"
        )
        # A reward model finds the easiest rule, and length is the easiest of all.
        if longer > LONGER_IS_BETTER:
            lines.append("! most chosen answers are longer: the reward model may learn length; watch len/mean in PPO")
    return lines


# ---- text ----
def _readable(prompt_format: PromptFormat, ids: list[int], mask: list[int]) -> str:
    """Text of a row; on a terminal its control tokens have a colour, which tells them from typed ones."""
    tokenizer = prompt_format.tokenizer
    # In a file the codes of a colour would be rubbish.
    control = set(prompt_format.control.ids.values()) if sys.stdout.isatty() else set()
    text = ""
    for trained, tokens in groupby(zip(ids, mask, strict=True), key=lambda token: token[1]):
        piece = _coloured(tokenizer, [index for index, _ in tokens], control)
        text += f"{OPENS}{piece}{CLOSES}" if trained else piece
    return text


def _coloured(tokenizer, ids: list[int], control: set[int]) -> str:
    """Text of some tokens, those of `control` in a colour."""
    text = ""
    for is_control, group in groupby(ids, key=control.__contains__):
        # Data may hold escape sequences, which would steer the terminal.
        piece = printable(tokenizer.decode(list(group)))
        text += f"\033[36m{piece}\033[0m" if is_control else piece
    return text


def _sequences(row: dict) -> list[tuple[str, list[int], list[int]]]:
    """(name, ids, mask) of each sequence of an encoded row of any kind."""
    if "input_ids" in row:
        return [("query and answer", row["input_ids"], row["completion_mask"])]

    query = row["query_ids"]
    no_loss = [0] * len(query)
    sequences = []
    for name in ("chosen", "rejected"):
        if f"{name}_ids" in row:
            answer = row[f"{name}_ids"]
            sequences.append((name, query + answer, no_loss + [1] * len(answer)))
    # A row of PPO has its query alone.
    return sequences or [("query", query, no_loss)]
