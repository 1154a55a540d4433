"""Prompt formats: the text template around a prompt, and dialogues folded into one prompt by repeating it.

With `问：{prompt}\\n\\n答：` the query of a second question is

    问：<first question>\\n\\n答：<first answer>\\n\\n问：<second question>\\n\\n答：

so the model sees earlier turns in the format of single ones. A system message stands before the first question.
"""

from rlhf.data.dialogues import Turn, Unusable

DEFAULT_TEMPLATE = "问：{prompt}\n\n答："


# ---- template ----
def check_template(template: str) -> str:
    """Return `template` as it is. Raises: ValueError unless it holds {prompt} exactly once."""
    if template.count("{prompt}") != 1:
        raise ValueError(f"--prompt_template {template!r} must contain {{prompt}} exactly once")
    return template


def render(template: str, prompt: str) -> str:
    """The query: `prompt` in `template`. Other braces, in either of them, are plain text."""
    # str.format would fail at any other brace, and str.replace would replace a {prompt} inside the prompt.
    before, after = template.split("{prompt}")
    return f"{before}{prompt}{after}"


def up_to_last_question(dialogue: list[Turn]) -> list[Turn]:
    """The merged turns of a dialogue, without an answer at its end."""
    merged = merged_turns(dialogue)
    is_answered = merged and merged[-1][0] == "assistant"
    return merged[:-1] if is_answered else merged


def merged_turns(dialogue: list[Turn]) -> list[Turn]:
    """Neighbouring turns of one role joined; a system message counts as part of the question after it."""
    merged: list[Turn] = []
    for spoken, said in dialogue:
        role = "user" if spoken == "system" else spoken
        if merged and merged[-1][0] == role:
            earlier = merged[-1][1]
            # Stripped, because either of the two may be empty.
            merged[-1] = (role, f"{earlier}\n\n{said}".strip())
        else:
            merged.append((role, said))
    return merged


def fold(dialogue: list[Turn], template: str) -> str:
    """A dialogue that ends with a question, as one prompt (see the head of this module).

    Args:
        dialogue: user and assistant in turn.
    Raises: Unusable where there is no question, an answer comes first, or a turn is empty.
    """
    if not dialogue or not all(said for _, said in dialogue):
        raise Unusable("empty prompt")
    if dialogue[0][0] != "user":
        raise Unusable("dialogue begins with an answer")

    # `render` puts the template around the whole, so only what lies between the turns is added here.
    before, after = template.split("{prompt}")
    folded = dialogue[0][1]
    for role, said in dialogue[1:]:
        folded += f"{after}{said}" if role == "assistant" else f"\n\n{before}{said}"
    return folded


def first_question(prompt: str, template: str) -> str:
    """The opening of a folded dialogue; a prompt of one turn is its own opening."""
    after = template.split("{prompt}")[1]
    # A template that ends with {prompt} leaves no mark between the turns.
    return prompt.split(after)[0] if after else prompt
