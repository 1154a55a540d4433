"""Which prompt format a run uses: as its flags say, as an adapter was trained, or a plain text."""

import json
from pathlib import Path

from rlhf.artefacts.files import read_object
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.template import AUTO, CHAT, DEFAULT_TEMPLATE, chat_template_of


def choose_format(args, tokenizer, model_dir: str | Path) -> PromptFormat:
    """The format that the flags ask for; args.prompt_template becomes what `auto` came to.

    Args:
        args: flags of `FormatFlags`. model_dir: of the base, whose generation_config names stop tokens.
    Raises: ValueError where there is no chat template, or the flags cannot be followed.
    """
    asked = args.prompt_template
    template = asked
    chat_template = chat_template_of(args.chat_template, tokenizer)
    if template == AUTO:
        template = CHAT if chat_template else DEFAULT_TEMPLATE
    # Refused and not replaced by a text: the model would be trained in one format and served in another.
    if template == CHAT and not chat_template:
        raise ValueError(
            f"--prompt_template chat: the tokenizer of {model_dir} has no chat template: give --chat_template FILE, "
            "or a text with {prompt}"
        )
    if template != CHAT and args.chat_template_kwargs:
        raise ValueError(
            f"--chat_template_kwargs, but the tokenizer of {model_dir} has no chat template to take them: leave it out"
        )

    # Settled from here on: run.json, a resume and the next stage see "chat" or a text, never "auto", which may come to
    # something else with another tokenizer.
    args.prompt_template = template
    chosen = PromptFormat(
        tokenizer,
        template,
        chat_template=chat_template if template == CHAT else None,
        kwargs=json.loads(args.chat_template_kwargs or "{}") if template == CHAT else None,
        system_prompt=args.system_prompt,
        bos=args.bos,
        base_stop_ids=generation_stop_ids(model_dir),
        stop_tokens=tuple(word for word in (args.stop_tokens or "").split("|") if word),
    )
    chosen.asked = asked
    return chosen


def stored_format(run: dict, tokenizer, model_dir: str | Path) -> PromptFormat:
    """The format that a trained adapter's run.json tells of; one of an older version had a text, EOS and no BOS."""
    stored = run.get("prompt_format")
    if stored is None:
        return PromptFormat(tokenizer, run["prompt_template"], bos=False, base_stop_ids=generation_stop_ids(model_dir))
    is_chat = stored["prompt_template"] == CHAT
    return PromptFormat(
        tokenizer,
        stored["prompt_template"],
        chat_template=stored["text"] if is_chat else None,
        kwargs=stored["chat_template_kwargs"],
        system_prompt=stored["system_prompt"],
        # A chat template without BOS and a tokenizer without one need nothing to be taken away.
        bos=stored["bos"] if tokenizer.bos_token_id is not None else None,
        # All stop tokens at once, whoever named them then; the one that is trained on follows from the template as
        # before.
        base_stop_ids=tuple(stored["stop_ids"]),
    )


def text_format(tokenizer, template: str = DEFAULT_TEMPLATE) -> PromptFormat:
    """A text template with nothing but EOS to end an answer."""
    return PromptFormat(tokenizer, template)


def generation_stop_ids(model_dir: str | Path) -> tuple[int, ...]:
    """Ids at which the base's own generation_config stops; none where it has no such file."""
    # Chat versions often stop at two tokens, of which the tokenizer's config names only one.
    file = Path(model_dir) / "generation_config.json"
    if not file.is_file():
        return ()
    named = read_object(file).get("eos_token_id")
    # transformers takes one id, or a list where several end an answer, as in chat versions of Llama 3.
    ids = named if isinstance(named, list) else [named]
    return tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool))
