"""Ready reward functions for --reward_functions, and what one of your own looks like.

    def mine(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float | None]:

One score a response; None where the function does not apply. A row holds the data set's other columns (an `answer` to
check against, say), and of the response `response_tokens` and `max_tokens`. A text behind `=` on the command line is a
fourth argument: --reward_functions 'pattern=^Answer: \\d+$' rewards.py:mine
"""

import re
import unicodedata

# Share of the maximum length from which on `overlong` takes something away.
SOFT_FROM = 0.8
# Words of an n-gram of `repetition`; each Chinese, Japanese or Korean character is a word.
NGRAM = 3
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# Where a solution writes its result: \boxed{...} of mathematics data, "#### ..." of GSM8K.
MARKED = re.compile(r"\\boxed\{([^{}]*)\}|####\s*(\S[^\n]*)")


def overlong(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """0 up to 80 % of the maximum length, then falling to -1 at the maximum (DAPO, arXiv:2503.14476, section 3.4)."""
    scores = []
    for row in rows:
        share = row["response_tokens"] / row["max_tokens"]
        scores.append(-max(0.0, share - SOFT_FROM) / (1 - SOFT_FROM))
    return scores


def repetition(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Minus the share of a response's n-grams that stood in it before: 0 for none, towards -1 for a loop."""
    scores = []
    for response in responses:
        words = WORD.findall(response.casefold())
        ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
        # Shorter than one n-gram there is nothing that could repeat itself.
        scores.append(len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0)
    return scores


def exact_answer(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 where the response ends in the row's `answer`, else 0.

    What counts is the last marked result (\\boxed{...}, #### ...), else the last number where the answer is one, else
    the whole response; compared without case, blanks at the ends, and thousands separators.
    """
    scores = []
    for number, (response, row) in enumerate(zip(responses, rows, strict=True)):
        if row.get("answer") is None:
            raise ValueError(f"row {number} has no column `answer`")
        scores.append(float(_result(response, str(row["answer"])) == _plain(str(row["answer"]))))
    return scores


def pattern(prompts: list[str], responses: list[str], rows: list[dict], expression: str = "") -> list[float]:
    """1 where the regular expression (behind `=`, else in the row's column `pattern`) is found in the response."""
    return [
        float(re.search(expression or row["pattern"], response) is not None)
        for response, row in zip(responses, rows, strict=True)
    ]


def _result(response: str, answer: str) -> str:
    """What a response gives as its result, in plain form."""
    marked = [first or second for first, second in MARKED.findall(response)]
    if marked:
        # The last one counts, as a solution may mark what it corrects afterwards.
        return _plain(marked[-1])
    # Only where the answer is a number: a text may hold any number of them by the way.
    numbers = NUMBER.findall(response)
    if NUMBER.fullmatch(_plain(answer)) and numbers:
        return _plain(numbers[-1])
    return _plain(response)


def _plain(text: str) -> str:
    """A text to compare: without case, blanks and full stop at its ends, one form of each character and number."""
    # NFKC makes full-width digits and letters the usual ones.
    text = unicodedata.normalize("NFKC", text).casefold().strip().strip("$.。 ")
    if NUMBER.fullmatch(text):
        return f"{float(text.replace(',', '')):g}"
    return text
