"""The chat template of a merged model: a chat endpoint that renders it asks in the format of the training.

A server knows messages and a Jinja template, and encodes what the template renders without adding a BOS token.
"""

import json

from rlhf.data.template import CHAT

# Folds a dialogue as rlhf/data/template.py does, with `bos`, `before`, `after`, `opening` and `stop` set before it.
# The minus signs take away the new lines of this text, which a server would otherwise encode. A plain `set` inside
# Jinja's loop is forgotten with each round, hence the namespace.
FOLD = r"""{{- bos -}}
{%- set ns = namespace(role='') -%}
{%- for message in messages -%}
{%- set role = 'assistant' if message['role'] == 'assistant' else 'user' -%}
{%- set said = message['content'] | trim -%}
{%- if role == ns.role -%}
{{- '\n\n' + said -}}
{%- elif role == 'user' -%}
{{- ('\n\n' if ns.role else '') + before + said -}}
{%- else -%}
{{- after + said -}}
{%- endif -%}
{%- set ns.role = role -%}
{%- endfor -%}
{%- if ns.role == 'assistant' -%}
{{- stop -}}
{%- elif add_generation_prompt -%}
{{- opening -}}
{%- endif -%}"""


def served_template(record: dict, eos_token: str | None, bos_token: str | None) -> str:
    """The Jinja template that renders a stored prompt format.

    Args:
        record: of `PromptFormat.record`. eos_token, bos_token: of the tokenizer that is served with it.
    """
    settings = dict(record["chat_template_kwargs"])
    text = record["text"]
    if record["prompt_template"] != CHAT:
        before, after = record["prompt_template"].split("{prompt}")
        # A space at the end of the template belongs to the answer, as it did in training.
        opening = after.rstrip(" ") if record["space_in_answer"] else after
        bos = bos_token if record["bos"] else ""
        settings = {"bos": bos, "before": before, "after": after, "opening": opening, "stop": eos_token or ""}
        text = FOLD

    # Set in the template's own text: a server hands in messages and nothing else.
    lines = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in settings.items()]
    if record["system_prompt"]:
        system = f"[{{'role': 'system', 'content': {_literal(record['system_prompt'])}}}]"
        lines.append("{%- if messages[0]['role'] != 'system' -%}")
        lines.append(f"{{%- set messages = {system} + messages -%}}")
        lines.append("{%- endif -%}")
    return "".join([*lines, text])


def _literal(value) -> str:
    """A value as Jinja writes it: JSON, whose true, false and none Jinja knows by these names."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
