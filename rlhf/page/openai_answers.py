"""Answers in the shape of OpenAI's API: whole ones, the chunks of a stream, errors."""

import json
import time
import uuid

from starlette.responses import JSONResponse

from rlhf.page.rows import Answer, TokenLogprob

# JSON has no infinity: the API itself writes this number for it.
LEAST = -9999.0

# The word for each status, as OpenAI's own clients know them.
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """An error as the API has it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error as the API has it, with its status."""
    # A client that is told when to come back does so.
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_body(message, status, param, code), status, headers)


class Shape:
    """Objects of one response of /v1/chat/completions or /v1/completions."""

    def __init__(self, chat: bool, model: str, tokenizer):
        self.chat = chat
        self.tokenizer = tokenizer
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model
        }  # fmt: skip

    # ---- whole ----
    def whole(self, answers: list[Answer], prompt_tokens: int) -> dict:
        """The response to a request without a stream."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self.head | {"choices": choices, "usage": usage(answers, prompt_tokens)}

    def _choice(self, index: int, answer: Answer) -> dict:
        choice = {"index": index, "finish_reason": answer.finish_reason}
        if self.chat:
            logprobs = None if answer.logprobs is None else {"content": [*map(self._chat_logprob, answer.logprobs)]}
            return choice | {"message": {"role": "assistant", "content": answer.text}, "logprobs": logprobs}
        return choice | {"text": answer.text, "logprobs": answer.logprobs and self._plain_logprobs(answer.logprobs)}

    def _chat_logprob(self, token: TokenLogprob) -> dict:
        top = [self._token(*pair) for pair in token.top]
        return self._token(token.token_id, token.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict:
        text = self.tokenizer.decode([token_id])
        # The bytes beside the text: a token may be half a character, which no text can show.
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode())}

    def _plain_logprobs(self, tokens: list[TokenLogprob]) -> dict:
        texts = [self.tokenizer.decode([token.token_id]) for token in tokens]
        # Characters of the answer before each token, as the older API counts them.
        offsets = [sum(map(len, texts[:place])) for place in range(len(texts))]
        top = [{self.tokenizer.decode([token]): value for token, value in one.top} for one in tokens]
        return {
            "tokens": texts, "token_logprobs": [max(one.logprob, LEAST) for one in tokens], "top_logprobs": top,
            "text_offset": offsets,
        }  # fmt: skip

    # ---- a stream ----
    def opening(self, index: int) -> bytes:
        """The first chunk of a chat's answer: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str) -> bytes:
        """A chunk with a piece of an answer."""
        return self._chunk(index, {"content": text} if self.chat else text, None)

    def closing(self, index: int, reason: str) -> bytes:
        """The last chunk of an answer: why it ended."""
        return self._chunk(index, {} if self.chat else "", reason)

    def _chunk(self, index: int, content: dict | str, reason: str | None) -> bytes:
        choice = {"index": index, "finish_reason": reason, "logprobs": None}
        choice["delta" if self.chat else "text"] = content
        return event(self._stream_head() | {"choices": [choice]})

    def counted(self, answers: list[Answer], prompt_tokens: int) -> bytes:
        """The chunk after the last answer, for who asked for the counts."""
        # Without a choice: that is how clients tell this chunk from a piece of an answer.
        return event(self._stream_head() | {"choices": [], "usage": usage(answers, prompt_tokens)})

    def _stream_head(self) -> dict:
        return self.head | ({"object": "chat.completion.chunk"} if self.chat else {})


def event(content: dict | str) -> bytes:
    """An event of a stream."""
    # "[DONE]" is the one event that is no JSON.
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def usage(answers: list[Answer], prompt_tokens: int) -> dict:
    """Tokens of the prompts and of all answers, stop tokens included."""
    written = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
