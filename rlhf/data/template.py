"""Dialogues as prompts: the text template around a prompt, earlier turns folded into it, or a plain transcript.

With `问：{prompt}\\n\\n答：` the query of a second question is

    问：<first question>\\n\\n答：<first answer>\\n\\n问：<second question>\\n\\n答：

so the model sees earlier turns in the format of single ones. A system message stands before the first question. With
the tokenizer's own chat template the turns stay turns (prompt_format.py), and a transcript of them names the prompt.
"""

from pathlib import Path

from rlhf.data.dialogues import Turn, Unlearnt, Unusable

# The tutorial's own. Later stages take it from run.json, so that a new default would change no trained adapter.
DEFAULT_TEMPLATE = "问：{prompt}\n\n答："

# Words that --prompt_template takes in place of a text.
AUTO = "auto"
CHAT = "chat"


# ---- template ----
def check_template(template: str) -> str:
    """Return `template` as it is. Raises: ValueError unless it is "auto", "chat" or holds {prompt} exactly once."""
    # Without {prompt} every query would be the same, and with two of them a prompt would be asked twice.
    if template not in (AUTO, CHAT) and template.count("{prompt}") != 1:
        raise ValueError(f"--prompt_template {template!r} must contain {{prompt}} exactly once, or be auto or chat")
    return template


def render(template: str, prompt: str) -> str:
    """The query: `prompt` in `template`. Other braces, in either of them, are plain text."""
    # str.format would fail at any other brace, and str.replace would replace a {prompt} inside the prompt.
    before, after = template.split("{prompt}")
    return f"{before}{prompt}{after}"


def chat_template_of(file: str | None, tokenizer) -> str | None:
    """The Jinja text of a file, else the tokenizer's own, else None. Raises: ValueError or OSError in one sentence."""
    if file is None:
        own = getattr(tokenizer, "chat_template", None)
        # Some tokenizers have several, by name.
        return own.get("default") if isinstance(own, dict) else own

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--chat_template {file} does not exist: give a file with a Jinja template")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--chat_template {file} is not UTF-8 text: give a file with a Jinja template") from None
    if not text.strip():
        raise ValueError(f"--chat_template {file} is empty: give a file with a Jinja template")
    return text


# ---- turns ----
def joined_turns(dialogue: list[Turn]) -> list[Turn]:
    """Neighbouring turns of one role joined, because many chat templates refuse two questions in a row."""
    joined: list[Turn] = []
    for role, said in dialogue:
        if joined and joined[-1][0] == role:
            earlier = joined[-1][1]
            # Stripped, because either of the two may be empty.
            both = f"{earlier}\n\n{said}".strip()
            joined[-1] = (role, Unlearnt(both) if isinstance(said, Unlearnt) else both)
        else:
            joined.append((role, said))
    return joined


def merged_turns(dialogue: list[Turn]) -> list[Turn]:
    """As `joined_turns`; a system message counts as part of the question after it."""
    return joined_turns([("user" if role == "system" else role, said) for role, said in dialogue])


def up_to_last_question(dialogue: list[Turn]) -> list[Turn]:
    """The turns of a dialogue, without an answer at its end."""
    joined = joined_turns(dialogue)
    # The policy answers by itself: what the data says there is another model's, or a person's.
    is_answered = joined and joined[-1][0] == "assistant"
    return joined[:-1] if is_answered else joined


# ---- prompts ----
def prompt_of(dialogue: list[Turn], template: str) -> dict:
    """A dialogue that ends with a question, as {"prompt": its text} and, unless it is one question, {"turns"}.

    Args:
        template: a text template, or "chat".
    Raises: Unusable where there is no question, an answer comes first, or a turn is empty.
    """
    if template == CHAT:
        turns = _with_question(dialogue)
        prompt = transcript(turns)
    else:
        turns = joined_turns(dialogue)
        prompt = fold(dialogue, template)
    # The turns of a single question would only say the prompt again.
    return {"prompt": prompt} if len(turns) == 1 else {"prompt": prompt, "turns": turns}


def turns_of(row: dict) -> list[Turn]:
    """The turns of a row that `prompt_of` made the prompt of."""
    return row.get("turns") or [("user", row["prompt"])]


def fold(dialogue: list[Turn], template: str) -> str:
    """A dialogue that ends with a question, as one prompt (see the head of this module).

    Raises: Unusable where there is no question, an answer comes first, or a turn is empty.
    """
    merged = merged_turns(dialogue)
    _refuse_without_question(merged)

    # `render` puts the template around the whole, so only what lies between the turns is added here.
    before, after = template.split("{prompt}")
    folded = merged[0][1]
    for role, said in merged[1:]:
        folded += f"{after}{said}" if role == "assistant" else f"\n\n{before}{said}"
    return folded


def transcript(turns: list[Turn]) -> str:
    """A dialogue to read and to tell from others: one question as it is, several turns with their roles."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {said}" for role, said in turns)


def _with_question(dialogue: list[Turn]) -> list[Turn]:
    """The turns of a dialogue for a chat template: an empty system message left out. Raises: as `prompt_of`."""
    # Many data sets have empty system messages, around which a template would write its markers all the same.
    turns = joined_turns([(role, said) for role, said in dialogue if said or role != "system"])
    # Systems apart, the same dialogues are usable as with a text template.
    _refuse_without_question([turn for turn in turns if turn[0] != "system"])
    return turns


def _refuse_without_question(turns: list[Turn]) -> None:
    if not turns or not all(said for _, said in turns):
        raise Unusable("empty prompt")
    if turns[0][0] != "user":
        raise Unusable("dialogue begins with an answer")


def opening(example: dict, template: str) -> str:
    """The first question of a dialogue, which all of its examples share; a prompt of one turn is its own opening."""
    if template != CHAT:
        return first_question(example["prompt"], template)
    # With its system message, which may be what tells two dialogues apart.
    turns = turns_of(example)
    first = next(number for number, (role, _) in enumerate(turns) if role == "user")
    return transcript(turns[: first + 1])


def first_question(prompt: str, template: str) -> str:
    """The opening of a folded dialogue; a prompt of one turn is its own opening."""
    after = template.split("{prompt}")[1]
    # A template that ends with {prompt} leaves no mark between the turns.
    # A question that holds this mark itself is cut short: it then shares its opening with others, and at worst they
    # stay on one side of a split together.
    return prompt.split(after)[0] if after else prompt
