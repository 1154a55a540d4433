"""Bodies of OpenAI's API read and checked: what is asked of which version, or one sentence on what is wrong."""

import copy
import json
import random
import threading
from dataclasses import dataclass

from rlhf.data import dialogues
from rlhf.data.control_tokens import encode
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.template import prompt_of, turns_of
from rlhf.page.rows import Settings

# Parameters that would change an answer and are not built, with the values that change nothing.
NOT_BUILT = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none",), "audio": (),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "prediction": (), "echo": (False,),
    "suffix": ("",), "best_of": (1,),
}  # fmt: skip

# Answers that one request may ask for.
MOST_ANSWERS = 16
MOST_STOPS = 4
MOST_LOGPROBS = 20
SEEDS = 1 << 63


class BadRequest(Exception):
    """A request that cannot be answered, as the API says so.

    Attributes: status: of HTTP. param: the field that is wrong. code: a word for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


@dataclass
class Wanted:
    """What a request asks for: `n` answers to each query.

    max_tokens: None where the request does not say.
    """

    model: str
    queries: list[list[int]]
    n: int
    seed: int
    stream: bool
    usage_in_stream: bool
    max_tokens: int | None
    settings: dict

    def settings_for(self, max_new_tokens: int) -> Settings:
        """The sampling settings, for answers of that many tokens at most."""
        return Settings(max_new_tokens=max_new_tokens, score=False, **self.settings)


class Encoder:
    """The prompt format for any thread: a fast tokenizer is set up anew for each text, by one thread at a time.

    It is a copy, because the page encodes with the format itself.
    """

    def __init__(self, prompt_format: PromptFormat):
        self._format = copy.deepcopy(prompt_format)
        self._alone = threading.Lock()

    def query_ids(self, turns: list[dialogues.Turn]) -> list[int]:
        """Token ids of a dialogue up to where its answer begins. Raises: dialogues.Unusable."""
        row = prompt_of(turns, self._format.template)
        with self._alone:
            return self._format.query_ids(turns_of(row))

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text that goes on, without the format around it."""
        tokenizer = self._format.tokenizer
        # As the format of the chat begins: a model that has learnt every text behind BOS goes on badly without.
        begin = [tokenizer.bos_token_id] if self._format.bos else []
        with self._alone:
            return begin + encode(tokenizer, text)


# ---- both kinds ----
def read_json(body: bytes) -> dict:
    """The JSON object of a body. Raises: BadRequest."""

    # Python reads NaN and Infinity, which are no JSON and no setting.
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"[:200]
        raise BadRequest(f"the body is no JSON that can be read: {reason}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def chat(content: bytes, encoder: Encoder) -> Wanted:
    """What the body of a /v1/chat/completions asks for. Raises: BadRequest."""
    body = read_json(content)
    messages = _field(body, "messages", list)
    if not messages:
        raise BadRequest("messages is empty: give at least one message", "messages")
    try:
        # By the reader of the training data, so that roles and parts mean the same in both.
        turns = dialogues.turns(messages, "messages", "user")
        # A chat that ends with an answer would have it continued, which no version was trained to do.
        if turns[-1][0] != "user":
            raise BadRequest("the last message must be the user's", "messages")
        query = encoder.query_ids(turns)
    except (dialogues.BadRow, dialogues.Unusable) as error:
        raise BadRequest(f"messages: {error}", "messages") from None

    wanted = _wanted(body, [query])
    if _optional(body, "logprobs", bool, False):
        wanted.settings |= {"logprobs": True, "top_logprobs": _whole(body, "top_logprobs", 0, 0, MOST_LOGPROBS)}
    elif body.get("top_logprobs") is not None:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    return _checked(wanted)


def completion(content: bytes, encoder: Encoder) -> Wanted:
    """What the body of a /v1/completions asks for: plain text goes on, without the format. Raises: BadRequest."""
    body = read_json(content)
    prompt = body.get("prompt")
    # A list of numbers is one prompt as ids, any other list holds prompts.
    several = isinstance(prompt, list) and not all(_is_whole(token) for token in prompt)
    prompts = prompt if several else [prompt]
    if len(prompts) > MOST_ANSWERS:
        raise BadRequest(f"prompt holds {len(prompts)} texts: give {MOST_ANSWERS} at most", "prompt")

    wanted = _wanted(body, [_plain_ids(text, encoder) for text in prompts])
    wanted.settings["continues"] = True
    if body.get("logprobs") is not None:
        wanted.settings |= {"logprobs": True, "top_logprobs": _whole(body, "logprobs", 0, 0, MOST_LOGPROBS)}
    return _checked(wanted)


def _plain_ids(text, encoder: Encoder) -> list[int]:
    """Token ids of a plain text, which may come as ids."""
    if isinstance(text, list) and text and all(_is_whole(token) for token in text):
        # A client that sends ids has encoded them itself: nothing is put in front.
        return text
    if not isinstance(text, str) or not text:
        raise BadRequest("prompt must be text (or token ids), or a list of such, none of them empty", "prompt")
    try:
        # JSON may escape half a surrogate pair, which no tokenizer takes.
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("prompt holds half a surrogate pair", "prompt") from None
    return encoder.plain_ids(text)


def _wanted(body: dict, queries: list[list[int]]) -> Wanted:
    """The fields that both kinds of request have."""
    for name, neutral in NOT_BUILT.items():
        # Refused, not ignored: an answer that was asked for otherwise would look as if it were what was asked for.
        if body.get(name) is not None and body[name] not in neutral:
            raise BadRequest(f"{name} is not supported here", name, code="unsupported_parameter")

    temperature = _number(body, "temperature", 1.0, 0.0, 2.0)
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
    # Both are the API's ways to ask for the likeliest token; the settings themselves allow no 0.
    greedy = temperature == 0 or top_p == 0
    most = body.get("max_completion_tokens")
    # The newer name wins where a client sends both.
    name = "max_tokens" if most is None else "max_completion_tokens"
    options = _optional(body, "stream_options", dict, {})
    settings = {"do_sample": not greedy, "stop": _stops(body)}
    if not greedy:
        settings |= {"temperature": temperature, "top_p": top_p}

    return Wanted(
        model=_field(body, "model", str),
        queries=queries,
        n=_whole(body, "n", 1, 1, MOST_ANSWERS),
        # Drawn where none is given, or every request without one would get the same answer.
        seed=_whole(body, "seed", random.randrange(SEEDS), -SEEDS, SEEDS - 1),
        stream=_optional(body, "stream", bool, False),
        usage_in_stream=options.get("include_usage") is True,
        max_tokens=_whole(body, name, None, 1, 1 << 31),
        settings=settings,
    )


def _checked(wanted: Wanted) -> Wanted:
    """Refuse what goes well by itself only. Raises: BadRequest."""
    # One request may not fill the queue by itself.
    if len(wanted.queries) * wanted.n > MOST_ANSWERS:
        raise BadRequest(f"that is more than {MOST_ANSWERS} answers: lower n", "n")
    if wanted.stream and wanted.settings.get("logprobs"):
        raise BadRequest("logprobs come with whole answers only: leave stream out", "logprobs")
    return wanted


# ---- fields ----
def _stops(body: dict) -> tuple[str, ...]:
    value = body.get("stop")
    # null stands for none, as in all fields of the API.
    words = [value] if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise BadRequest("stop must be text, or a list of texts, none of them empty", "stop")
    # Each is looked for at every token.
    if len(words) > MOST_STOPS:
        raise BadRequest(f"stop holds {len(words)} texts: give {MOST_STOPS} at most", "stop")
    return tuple(words)


def _field(body: dict, name: str, kind: type):
    """A field that must be there. Raises: BadRequest."""
    if body.get(name) is None:
        raise BadRequest(f"{name} is missing", name)
    return _optional(body, name, kind, None)


def _optional(body: dict, name: str, kind: type, default):
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRequest(f"{name} must be {NAMES[kind]}, not {dialogues.type_name(value)}", name)
    return value


def _number(body: dict, name: str, default: float, least: float, most: float) -> float:
    """Raises: BadRequest for no number, or one that is out of range."""
    value = body.get(name)
    if value is None:
        return default
    # To Python true and false are numbers.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name} must be a number, not {dialogues.type_name(value)}", name)
    if not least <= value <= most:
        raise BadRequest(f"{name} must be {least:g} to {most:g}", name)
    return float(value)


def _whole(body: dict, name: str, default: int | None, least: int, most: int) -> int | None:
    """Raises: BadRequest for no whole number, or one that is out of range."""
    value = body.get(name)
    if value is None:
        return default
    if not _is_whole(value):
        raise BadRequest(f"{name} must be a whole number, not {dialogues.type_name(value)}", name)
    if not least <= value <= most:
        raise BadRequest(f"{name} must be {least} to {most}", name)
    return value


def _is_whole(value) -> bool:
    # To Python true and false are numbers.
    return isinstance(value, int) and not isinstance(value, bool)


NAMES = {str: "text", bool: "true or false", dict: "an object", list: "a list"}
