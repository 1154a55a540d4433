"""The API as its own clients see it: openai's package and bare HTTP, against a real server on this machine."""

import asyncio
import http.client
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette", reason="the page needs starlette: pip install -r requirements.txt")
pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install -r requirements.txt")
openai = pytest.importorskip("openai", reason="needs the openai client: pip install -r requirements-dev.txt")

# ruff: noqa: E402 (without the three packages there is nothing to import)
from engines import ask, load_versions, running, write_adapters
from served import served

from rlhf.page import api
from rlhf.page.engine import Settings

QUESTION = [{"role": "user", "content": "小猫喜欢什么？"}]
LONG = {"model": "sft", "messages": QUESTION, "max_tokens": 400, "stop": ["never"]}


@pytest.fixture(scope="module")
def engine(tiny_base, tmp_path_factory):
    folders = write_adapters(tiny_base, tmp_path_factory.mktemp("adapters"))
    versions = load_versions(tiny_base, {name: folders[name] for name in ("sft", "ppo")})
    with running(versions, max_rows=4, max_waiting=24) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with served(engine, default_tokens=24, body_bytes=20_000) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def direct(engine, version: str, seed: int, messages=QUESTION, **settings):
    """The engine's own answer to a dialogue."""
    query = engine.prompt_format.query_ids([(one["role"], one["content"]) for one in messages])
    return query, ask(engine, [(version, query, Settings(**settings), seed)])[0]


def post(address: str, body: bytes, path: str = "/v1/chat/completions", method: str = "POST") -> tuple[int, dict]:
    """Status and JSON of the answer to a raw body."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def wait_until_idle(engine) -> None:
    """Wait until nothing is written and nobody waits. Raises: AssertionError after ten seconds."""
    deadline = time.monotonic() + 10
    while engine.load() != (0, 0):
        assert time.monotonic() < deadline, engine.load()
        time.sleep(0.02)


# ---- answers ----
def test_a_chat_is_the_engines_answer_with_its_counts(engine, client):
    answer = client.chat.completions.create(model="sft", messages=QUESTION, seed=3, max_tokens=20, temperature=0.8)
    query, expected = direct(engine, "sft", 3, max_new_tokens=20, temperature=0.8)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert (answer.object, answer.model) == ("chat.completion", "sft")
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(query), len(expected.token_ids), len(query) + len(expected.token_ids))


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_stream_is_the_same_answer_in_pieces(client, tokens):
    given = {"model": "ppo", "messages": QUESTION, "seed": 4, "max_completion_tokens": tokens}
    whole = client.chat.completions.create(**given)
    chunks = [*client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})]
    assert chunks[0].choices[0].delta.role == "assistant"
    content = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(content) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1


def test_temperature_nothing_is_greedy_and_without_a_seed_answers_differ(client):
    def texts(**settings):
        made = [client.chat.completions.create(model="sft", messages=QUESTION, **settings) for _ in range(2)]
        return [one.choices[0].message.content for one in made]

    greedy = texts(temperature=0)
    assert greedy[0] == greedy[1] != texts(temperature=1, seed=1)[0]
    drawn = texts()
    assert drawn[0] != drawn[1]


def test_several_answers_to_a_request_differ_and_the_first_is_that_of_one(client):
    given = {"model": "sft", "messages": QUESTION, "seed": 5}
    three = client.chat.completions.create(**given, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in three.choices] == [0, 1, 2]
    assert client.chat.completions.create(**given).choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**given, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_stop_text_ends_a_chat(client):
    given = {"model": "sft", "messages": QUESTION, "seed": 3}
    whole = client.chat.completions.create(**given).choices[0].message.content
    cut = client.chat.completions.create(**given, stop=whole[4:6]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.find(whole[4:6])].rstrip(), "stop")


def test_a_dialogue_has_the_form_that_the_adapter_was_trained_in(engine, client):
    messages = [
        {"role": "system", "content": "请简短。"}, *QUESTION, {"role": "assistant", "content": "苹果。"},
        {"role": "user", "content": [{"type": "text", "text": "为什么？"}]},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="ppo", messages=messages, temperature=0, max_tokens=12)
    flat = [*messages[:-1], {"role": "user", "content": "为什么？"}]
    _, expected = direct(engine, "ppo", 0, flat, do_sample=False, max_new_tokens=12)
    assert answer.choices[0].message.content == expected.text


def test_logprobs_come_with_each_token(engine, client):
    answer = client.chat.completions.create(
        model="sft", messages=QUESTION, seed=3, max_tokens=6, logprobs=True, top_logprobs=2
    )
    _, expected = direct(engine, "sft", 3, max_new_tokens=6, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected.logprobs])
    assert [len(one.top_logprobs) for one in found] == [2] * len(found)


def test_a_completion_goes_on_a_plain_text(engine, client):
    answer = client.completions.create(model="base", prompt="我喜欢", max_tokens=8, temperature=0, logprobs=2)
    query = engine.prompt_format.tokenizer.encode("我喜欢", add_special_tokens=False)
    settings = Settings(do_sample=False, max_new_tokens=8, continues=True)
    expected = ask(engine, [("base", query, settings, 0)])[0]
    assert answer.choices[0].text == expected.text
    assert answer.usage.prompt_tokens == len(query)
    assert len(answer.choices[0].logprobs.tokens) == len(expected.token_ids)
    streamed = client.completions.create(model="base", prompt=query, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected.text


def test_several_texts_go_on_each_by_itself(client):
    both = client.completions.create(model="sft", prompt=["我喜欢", "小猫"], max_tokens=6, temperature=0, n=2)
    alone = client.completions.create(model="sft", prompt="小猫", max_tokens=6, temperature=0)
    assert [choice.text for choice in both.choices[2:]] == [alone.choices[0].text] * 2


def test_every_version_is_a_model(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["base", "sft", "ppo"]
    assert client.models.retrieve("sft").id == "sft"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_two_clients_at_once_get_what_they_get_alone(address, engine):
    async def one(client, number: int) -> str:
        given = {"model": ("sft", "ppo")[number % 2], "messages": QUESTION, "seed": number, "max_tokens": 16}
        if number % 3:
            return (await client.chat.completions.create(**given)).choices[0].message.content
        stream = await client.chat.completions.create(**given, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once():
        clients = [openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") for _ in range(2)]
        texts = await asyncio.gather(*(one(clients[number % 2], number) for number in range(16)))
        for client in clients:
            await client.close()
        return texts

    texts = asyncio.run(all_at_once())
    expected = [direct(engine, ("sft", "ppo")[n % 2], n, max_new_tokens=16)[1].text for n in range(16)]
    assert texts == expected


# ---- wrong requests ----
CHAT = {"model": "sft", "messages": QUESTION, "max_tokens": 2}
WRONG = [
    ({"model": "none"}, 404, "model", "there are base, sft, ppo"),
    ({"model": None}, 400, "model", "missing"),
    ({"model": 3}, 400, "model", "must be text, not a number"),
    ({"messages": []}, 400, "messages", "empty"),
    ({"messages": None}, 400, "messages", "missing"),
    ({"messages": "hello"}, 400, "messages", "must be a list"),
    ({"messages": ["hello"]}, 400, "messages", "must hold messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages", "needs role and content"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "messages", "empty prompt"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "half a surrogate pair"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages", "unknown role"),
    ({"messages": [*QUESTION, {"role": "assistant", "content": "hi"}]}, 400, "messages", "last message"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "more than text"),
    ({"messages": [{"role": "user", "content": "我" * 600}]}, 400, None, "512 positions"),
    ({"max_tokens": 5000}, 400, None, "512 positions"),
    ({"max_tokens": 0}, 400, "max_tokens", "must be 1 to"),
    ({"max_completion_tokens": "7"}, 400, "max_completion_tokens", "must be a whole number, not text"),
    ({"temperature": -1}, 400, "temperature", "must be 0 to 2"),
    ({"temperature": "hot"}, 400, "temperature", "must be a number"),
    ({"top_p": 1.5}, 400, "top_p", "must be 0 to 1"),
    ({"n": 0}, 400, "n", "must be 1 to"),
    ({"n": 99}, 400, "n", "must be 1 to"),
    ({"n": True}, 400, "n", "must be a whole number, not true or false"),
    ({"seed": 1 << 70}, 400, "seed", "must be"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "give 4 at most"),
    ({"stream": "yes"}, 400, "stream", "must be true or false"),
    ({"logprobs": True, "stream": True}, 400, "logprobs", "whole answers only"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ({"logit_bias": {"5": 3}}, 400, "logit_bias", "not supported"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
]


@pytest.mark.parametrize(("change", "status", "param", "sentence"), WRONG)
def test_a_wrong_request_is_told_what_is_wrong(address, change, status, param, sentence):
    found, body = post(address, json.dumps(CHAT | change).encode())
    assert found == status and set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert sentence in body["error"]["message"] and body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(address):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "user": "x"}
    neutral |= {"response_format": {"type": "text"}, "n": None, "stream": None, "unheard_of": 3, "top_p": 0}
    assert post(address, json.dumps(CHAT | neutral).encode())[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 9000,
        b'{"model": ' + b"9" * 6000 + b"}",
        b'"text"',
    ],
)
def test_what_is_no_json_object_is_refused(address, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, answer = post(address, body, path)
        assert status == 400 and answer["error"]["message"]


def test_wrong_paths_and_methods_have_the_same_shape(address):
    assert post(address, b"", "/v1/nothing")[0] == 404
    status, answer = post(address, b"", "/v1/chat/completions", method="GET")
    assert status == 405 and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], ["a", 3], {"a": 1}, 5, [10**9], [[-1]], ["\ud800"], ["a"] * 17]
)
def test_a_wrong_prompt_is_refused(address, prompt):
    body = json.dumps({"model": "sft", "prompt": prompt, "max_tokens": 2}).encode()
    status, answer = post(address, body, "/v1/completions")
    assert status == 400 and answer["error"]["message"]


def test_too_large_and_too_slow_bodies_are_refused(address, monkeypatch):
    status, answer = post(address, json.dumps(CHAT | {"user": "x" * 30_000}).encode())
    assert status == 413 and "20000 bytes" in answer["error"]["message"]
    monkeypatch.setattr(api, "BODY_SECONDS", 0.2)
    with socket.create_connection(address.removeprefix("http://").split(":"), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_clients_own_errors(address, client):
    with pytest.raises(openai.NotFoundError) as wrong:
        client.chat.completions.create(model="none", messages=QUESTION)
    assert wrong.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="sft", messages=[{"role": "user", "content": "我" * 700}])
    assert wrong.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="sft", messages=QUESTION, temperature=9)


def test_a_full_queue_is_said_and_the_clients_try_again(engine, address):
    body = json.dumps(LONG | {"n": 16}).encode()
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(post, address, json.dumps(LONG | {"n": 12, "max_tokens": 30}).encode()) for _ in range(2)]
        while engine.load()[1] < 16:
            time.sleep(0.005)
        status, answer = post(address, body)
        assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
        # What was not taken leaves nothing behind, and a client that waits is served.
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=9) as client:
            assert client.chat.completions.create(**LONG | {"max_tokens": 4}, n=16).choices
        assert [one.result()[0] for one in first] == [200, 200]
    wait_until_idle(engine)


def random_value(rng: random.Random, depth: int = 0):
    """Any JSON value."""
    kinds = [None, True, 0, -1, 1e300, 10**30, "", "我\0\u202e", "a" * 300, "user", "sft", [], {}]
    if depth < 3 and rng.random() < 0.4:
        inner = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {str(key): value for key, value in zip("abcd", inner, strict=False)}
    return rng.choice(kinds)


def test_random_bodies_are_answered_in_the_apis_shape(engine, address):
    rng = random.Random(0)
    names = ["model", "messages", "prompt", "n", "seed", "stop", "temperature", "top_p", "logprobs"]
    names += ["stream_options", "max_tokens", "max_completion_tokens", "top_logprobs", "tools", "logit_bias"]
    for number in range(250):
        path = ("/v1/chat/completions", "/v1/completions")[number % 2]
        body = {"model": "sft", "messages": QUESTION, "prompt": "我", "max_tokens": 2}
        for name in rng.sample(names, 1 + number % 3):
            body[name] = random_value(rng)
        data = bytearray(json.dumps(body).encode())
        if number % 5 == 0:
            data[rng.randrange(len(data))] = rng.randrange(256)
        status, answer = post(address, bytes(data), path)
        assert status in (200, 400, 404), (status, body)
        assert ("choices" if status == 200 else "error") in answer, body
    wait_until_idle(engine)


# ---- clients that go away ----
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_places(engine, address, stream):
    wait_until_idle(engine)
    body = json.dumps(LONG | {"n": 8, "stream": stream}).encode()
    with socket.create_connection(address.removeprefix("http://").split(":"), timeout=10) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        while engine.load() != (4, 4):
            time.sleep(0.005)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    begin = time.monotonic()
    wait_until_idle(engine)
    # Four hundred tokens of eight answers would take far longer.
    assert time.monotonic() - begin < 2


def test_an_error_of_the_model_is_said_within_a_stream_and_without_one(engine, client, monkeypatch):
    monkeypatch.setattr("rlhf.page.rows.Row.take", lambda *given: (_ for _ in ()).throw(FloatingPointError("broken")))
    with pytest.raises(openai.InternalServerError, match="broken"):
        client.chat.completions.create(model="sft", messages=QUESTION)
    with pytest.raises(openai.APIError, match="broken"):
        list(client.chat.completions.create(model="sft", messages=QUESTION, stream=True))
    wait_until_idle(engine)


def test_a_server_that_closes_ends_its_answers(tiny_base, tmp_path):
    folders = write_adapters(tiny_base, tmp_path)
    versions = load_versions(tiny_base, {name: folders[name] for name in ("sft", "ppo")})
    with running(versions) as engine, served(engine) as address, ThreadPoolExecutor(1) as pool:
        late = pool.submit(post, address, json.dumps(LONG).encode())
        while not engine.load()[0]:
            time.sleep(0.005)
        engine.close()
        status, answer = late.result()
        assert status == 503 and answer["error"]["message"] == "the server is closing"
        assert post(address, json.dumps(CHAT).encode())[0] == 503
