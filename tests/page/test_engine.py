"""The engine: answers equal to transformers' own, whoever is beside them; places, queue, errors and memory."""

import asyncio
import gc
import time
from dataclasses import replace

import pytest
import torch
from adapters import random_adapter
from engines import GREEDY, ask, load_versions, running, write_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TopPLogitsWarper

from benchmarks.architectures import ARCHITECTURES, write_base
from rlhf.compare.answers import Versions
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.loading import load_base
from rlhf.page import batch
from rlhf.page.engine import Settings
from rlhf.page.rows import TopP
from rlhf.page.text_stream import TextStream
from rlhf.page.tickets import EngineClosed, QueueFull, TooLong, UnknownVersion

PROMPTS = ["小猫喜欢什么？", "老师今天看见了一本书，你呢？", "1 + 2 = 3，对吗？", "我"]
NAMES = ("base", "sft", "ppo")
SAMPLED = Settings(temperature=0.9, top_p=0.95, max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory) -> dict[str, str]:
    return write_adapters(tiny_base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def versions(tiny_base, folders) -> Versions:
    return load_versions(tiny_base, folders, max_new_tokens=24, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def queries(tiny_base) -> list[list[int]]:
    prompt_format = text_format(load_tokenizer(tiny_base))
    return [prompt_format.query_ids([("user", prompt)]) for prompt in PROMPTS]


def generated(model, query: list[int], stop_ids: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens of transformers' own generate, the stop token included."""
    ids = torch.tensor([query])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=list(stop_ids),
        pad_token_id=0, use_cache=True,
    )  # fmt: skip
    return out[0, len(query) :].tolist()


def alone(base: str, folder: str | None):
    """A base with one adapter, as plain peft loads it."""
    model = load_base(base, torch.float32)
    return model if folder is None else PeftModel.from_pretrained(model, folder).eval()


# ---- what is written ----
def test_greedy_answers_of_all_versions_at_once_are_those_of_transformers(tiny_base, folders, versions, queries):
    wanted = [(name, query, GREEDY, 0) for query in queries for name in NAMES]
    with running(versions, max_rows=5) as engine:
        answers = ask(engine, wanted)
    stops = versions.prompt_format.stop_ids
    models = {name: alone(tiny_base, folders.get(name)) for name in NAMES}
    expected = [generated(models[name], query, stops, 16) for name, query, *_ in wanted]
    assert [answer.token_ids for answer in answers] == expected
    assert len(set(map(tuple, expected))) > len(queries)
    for answer in answers:
        ended = answer.token_ids[-1] in stops
        assert answer.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama (GQA)", {}),
        ("Qwen3-MoE", {}),
        ("Qwen3.5 (linear attention)", {}),
        ("Gemma 3 (text)", {"sliding_window": 6}),
        ("GPT-2", {}),
        ("BLOOM", {}),
        ("DeepSeek-V3", {}),
    ],
)
def test_rows_of_an_architecture_are_written_as_without_a_cache(name, more, tmp_path):
    kind, settings = ARCHITECTURES[name]
    base = write_base(kind, settings | more, tmp_path / "base")
    prompt_format = text_format(load_tokenizer(base))
    folders = {one: random_adapter(base, tmp_path / one, seed=seed) for seed, one in enumerate(("sft", "ppo"))}
    # Of different lengths, the longest last: the rows before it have to move.
    rows = [("sft", [5, 6, 7, 8]), ("ppo", [9] * 3), ("base", [20, 21, 5, 6, 7, 8, 30]), ("ppo", [*range(10, 25)])]
    with running(load_versions(base, folders, prompt_format)) as engine:
        answers = ask(engine, [(version, query, GREEDY, 0) for version, query in rows])
    for (version, query), answer in zip(rows, answers, strict=True):
        model = alone(base, folders.get(version))
        ids = list(query)
        for token in answer.token_ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_an_answer_is_the_same_alone_and_in_company_whenever_it_joins(versions, queries, monkeypatch):
    # Small, so that columns are made and given up within a few tokens.
    monkeypatch.setattr(batch, "ROOM", 4)
    lengths = (3, 40, 9, 17, 24, 5, 31, 12, 2, 20)
    wanted = []
    for number, length in enumerate(lengths):
        query = queries[number % len(queries)] * (1 + number % 3)
        settings = replace(SAMPLED, max_new_tokens=length, do_sample=number % 4 != 3)
        wanted.append((NAMES[number % 3], query, settings, number))
    with running(versions, max_rows=1) as engine:
        expected = [ask(engine, [request])[0].token_ids for request in wanted]
    assert len(set(map(tuple, expected))) == len(lengths)
    with running(versions, max_rows=4) as engine:
        for order in (wanted, wanted[::-1]):
            answers = [answer.token_ids for answer in ask(engine, order, pause=0.01)]
            assert answers == (expected if order is wanted else expected[::-1])


def test_a_seed_gives_the_answer_of_compare(versions, queries):
    seeds = list(range(len(queries)))
    expected = [cell.text for cell in versions.answers("ppo", queries, seeds)]
    requests = [("ppo", query, SAMPLED, seed) for query, seed in zip(queries, seeds, strict=True)]
    with running(versions) as engine:
        # Half a character at the end of an answer that is cut stays out of it here.
        assert [answer.text for answer in ask(engine, requests)] == [text.rstrip("\ufffd ") for text in expected]


def test_weighted_adapters_are_the_weighted_sum_of_their_terms(tiny_base, folders, versions, queries):
    mix = {"sft": -0.2, "ppo": 1.2, "base": 0.5}
    settings = replace(GREEDY, logprobs=True)
    with running(versions) as engine:
        # Beside rows of its own two adapters, and with a weight of nothing.
        asked = [(mix, queries[1], settings, 0), ("sft", queries[0], settings, 0), ("ppo", queries[2], settings, 0)]
        answer, *_ = ask(engine, [*asked, ({"sft": 0.0}, queries[0], settings, 0)])

    model = load_base(tiny_base, torch.float32)
    with torch.no_grad():
        for name, weight in (("sft", -0.2), ("ppo", 1.2)):
            for key, module in alone(tiny_base, folders[name]).named_modules():
                if hasattr(module, "lora_A"):
                    own = model.get_submodule(key.removeprefix("base_model.model."))
                    own.weight += weight * module.get_delta_weight("default")
        ids = torch.tensor([queries[1] + answer.token_ids])
        logprobs = model(input_ids=ids).logits[0, len(queries[1]) - 1 : -1].log_softmax(-1)
    assert logprobs.argmax(-1).tolist() == answer.token_ids
    expected = logprobs.max(-1).values.tolist()
    assert [one.logprob for one in answer.logprobs] == pytest.approx(expected, abs=1e-4)


def test_a_variant_of_lora_computes_what_peft_computes(tiny_base, folders, tmp_path, queries):
    model = get_peft_model(
        load_base(tiny_base, torch.float32), LoraConfig(r=4, use_dora=True, target_modules=["W_pack"])
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(tmp_path / "dora"))
    versions = load_versions(tiny_base, {"sft": folders["sft"], "ppo": str(tmp_path / "dora")})
    with running(versions) as engine:
        answers = ask(engine, [(name, query, GREEDY, 0) for query in queries for name in ("ppo", "sft")])
    dora = alone(tiny_base, str(tmp_path / "dora"))
    expected = [generated(dora, query, versions.prompt_format.stop_ids, 16) for query in queries]
    assert [answer.token_ids for answer in answers[::2]] == expected


def test_logprobs_are_of_the_model_itself_with_the_likeliest_first(versions, queries):
    settings = replace(SAMPLED, logprobs=True, top_logprobs=3)
    with running(versions) as engine:
        answer, *_ = ask(engine, [("sft", queries[0], settings, 5), ("ppo", queries[1], settings, 5)])
    with versions.use("sft") as model, torch.no_grad():
        ids = torch.tensor([queries[0] + answer.token_ids])
        logprobs = model(input_ids=ids).logits[0, len(queries[0]) - 1 : -1].log_softmax(-1)
    for one, token, row in zip(answer.logprobs, answer.token_ids, logprobs, strict=True):
        assert one.token_id == token and one.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [place for place, _ in one.top] == row.topk(3).indices.tolist()


def test_a_score_is_that_of_compare(versions, queries):
    expected = versions.answers("sft", queries, [1] * len(queries))
    with running(versions) as engine:
        answers = ask(engine, [("sft", query, SAMPLED, 1) for query in queries])
        unscored = ask(engine, [("sft", queries[0], replace(SAMPLED, score=False), 1)])
    assert [answer.score for answer in answers] == pytest.approx([cell.score for cell in expected], abs=1e-4)
    assert unscored[0].score is None


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p):
    generator = torch.Generator().manual_seed(0)
    # Peaked and flat: of the flat ones the share reaches beyond the likeliest.
    for scale in (0.1, 1.0, 4.0, 20.0):
        scores = torch.randn(1, 4000, generator=generator) * scale
        expected = TopPLogitsWarper(top_p)(None, scores)
        assert torch.equal(TopP(top_p)(None, scores), expected)


# ---- text ----
def pieces_of(engine, *request) -> tuple[list[str], object]:
    async def read():
        ticket = engine.submit(*request)
        return [piece async for piece in ticket.pieces()], await ticket.result()

    return asyncio.run(asyncio.wait_for(read(), 60))


@pytest.mark.parametrize("base", ["tiny_base", "tiny_llama"])
def test_pieces_are_whole_characters_and_make_the_text(base, request, tmp_path):
    base = request.getfixturevalue(base)
    folders = write_adapters(base, tmp_path)
    versions = load_versions(base, {name: folders[name] for name in ("sft", "ppo")})
    query = versions.prompt_format.query_ids([("user", "我喜欢什么？")])
    counts = []
    with running(versions) as engine:
        for seed in range(4):
            pieces, answer = pieces_of(engine, "sft", query, Settings(max_new_tokens=60), seed)
            stops = versions.prompt_format.stop_ids
            whole = versions.prompt_format.tokenizer.decode([t for t in answer.token_ids if t not in stops]).strip()
            assert "".join(pieces) == answer.text == whole.rstrip("\ufffd").strip()
            counts.append(len(pieces))
    assert max(counts) > 10


def test_half_a_character_waits_for_its_other_half(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    text = " 我🙂é \n好 "
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    stream = TextStream(tokenizer)
    given = [stream.add(token)[0] for token in ids]
    assert "".join(given) + stream.rest() == text.strip()
    assert "🙂" in given and not any("\ufffd" in piece for piece in given)
    # An answer that is cut inside a character ends before it.
    stream = TextStream(tokenizer)
    half = [stream.add(token)[0] for token in tokenizer.encode("好🙂", add_special_tokens=False)[:-1]]
    assert "".join(half) + stream.rest() == "好"


def test_a_continued_text_keeps_its_space(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    before = tokenizer.encode("likes", add_special_tokens=False)
    stream = TextStream(tokenizer, before=before)
    given = [stream.add(token)[0] for token in tokenizer.encode(" red tea ", add_special_tokens=False)]
    assert "".join(given) + stream.rest() == " red tea "


def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_shown(versions, queries):
    with running(versions) as engine:
        whole, *_ = ask(engine, [("sft", queries[0], SAMPLED, 2)])
        word = whole.text[6:9]
        settings = replace(SAMPLED, stop=("never", word))
        pieces, answer = pieces_of(engine, "sft", queries[0], settings, 2)
    expected = whole.text[: whole.text.find(word)].rstrip()
    assert answer.text == "".join(pieces) == expected
    assert answer.finish_reason == "stop" and len(answer.token_ids) < len(whole.token_ids)


def test_what_only_began_like_a_stop_text_is_shown_in_the_end(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    stream = TextStream(tokenizer, ("end of it",))
    given = [stream.add(token)[0] for token in tokenizer.encode("the end of", add_special_tokens=False)]
    assert "".join(given) == "the"
    assert "".join(given) + stream.rest() == "the end of"


# ---- places ----
def test_an_answer_that_is_cancelled_frees_its_place(versions, queries):
    async def walk(engine):
        long = engine.submit("sft", queries[0], Settings(max_new_tokens=400, stop=("never",)), 0)
        waiting = engine.submit("ppo", queries[1], GREEDY, 0)
        dropped = engine.submit("ppo", queries[2], GREEDY, 0)
        dropped.cancel()
        async for _ in long.pieces():
            long.cancel()
        return await asyncio.gather(long.result(), waiting.result(), dropped.result())

    with running(versions, max_rows=1) as engine:
        long, waited, dropped = asyncio.run(asyncio.wait_for(walk(engine), 60))
        assert engine.load() == (0, 0)
    assert long.finish_reason == dropped.finish_reason == "cancelled"
    assert 0 < len(long.token_ids) < 400 and long.text and dropped.token_ids == []
    assert waited.finish_reason in ("stop", "length")


def test_short_answers_of_other_versions_pass_a_long_one(versions, queries):
    order = []

    async def walk(engine):
        async def one(name, settings):
            await engine.submit(name, queries[0], settings, seed).result()
            order.append(name)

        await asyncio.gather(one("sft", long), *(one("ppo", replace(SAMPLED, max_new_tokens=4)) for _ in range(6)))

    long = replace(SAMPLED, max_new_tokens=200)
    with running(versions, max_rows=2) as engine:
        lengths = [len(answer.token_ids) for answer in ask(engine, [("sft", queries[0], long, n) for n in range(8)])]
        seed = lengths.index(max(lengths))
        assert lengths[seed] > 60
        asyncio.run(asyncio.wait_for(walk(engine), 60))
    assert order == ["ppo"] * 6 + ["sft"]


def test_requests_in_the_background_let_everybody_else_pass(versions, queries):
    order = []

    async def walk(engine):
        async def one(name, background):
            await engine.submit("sft", queries[0], replace(SAMPLED, max_new_tokens=20), 3, background).result()
            order.append(name)

        await asyncio.gather(*(one("later", True) for _ in range(8)), *(one("now", False) for _ in range(3)))

    with running(versions, max_rows=3) as engine:
        asyncio.run(asyncio.wait_for(walk(engine), 60))
    # One place is for the background, and whoever waits takes the next.
    assert order[:4].count("now") == 3 and len(order) == 11


def test_more_than_the_queue_holds_is_refused(versions, queries):
    with running(versions, max_rows=1, max_waiting=2) as engine:
        tickets = []
        with pytest.raises(QueueFull):
            for _ in range(9):
                tickets.append(engine.submit("sft", queries[0], replace(SAMPLED, max_new_tokens=300), 0))
        assert 2 <= len(tickets) <= 4
        for ticket in tickets:
            ticket.cancel()
    with pytest.raises(EngineClosed):
        engine.submit("sft", queries[0], GREEDY, 0)


def test_closing_ends_what_is_being_written_and_what_waits(versions, queries):
    async def walk(engine):
        tickets = [engine.submit("sft", queries[0], Settings(max_new_tokens=400), seed) for seed in range(3)]
        await anext(tickets[0].pieces())
        engine.close()
        return await asyncio.gather(*(ticket.result() for ticket in tickets))

    with running(versions, max_rows=1) as engine:
        answers = asyncio.run(asyncio.wait_for(walk(engine), 60))
    assert [answer.finish_reason for answer in answers] == ["cancelled"] * 3
    assert answers[0].text and not answers[2].text


@pytest.mark.parametrize(
    ("version", "query", "settings", "error", "sentence"),
    [
        ("none", [5], GREEDY, UnknownVersion, "there is no version 'none': there are base, sft, ppo"),
        ({"sft": 1.0, "x": 1.0}, [5], GREEDY, UnknownVersion, "there is no version 'x'"),
        ({"sft": float("nan")}, [5], GREEDY, ValueError, "not finite"),
        ("sft", [5] * 500, GREEDY, TooLong, "500 tokens, the answer may have 16 more, but this model has 512"),
        ("sft", [], GREEDY, ValueError, "at least one token"),
        ("sft", [5, 100_000], GREEDY, ValueError, "outside of 0 to"),
    ],
)
def test_what_cannot_be_answered_is_refused(versions, version, query, settings, error, sentence):
    with running(versions) as engine, pytest.raises(error, match=sentence):
        engine.submit(version, query, settings, 0)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"stop": ("",)}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError):
        Settings(**wrong)


# ---- errors and memory ----
def test_a_broken_adapter_ends_its_own_answers_alone(tiny_base, tmp_path, queries):
    folders = write_adapters(tiny_base, tmp_path)
    versions = load_versions(tiny_base, {name: folders[name] for name in ("sft", "ppo")})
    with running(versions, max_rows=4) as engine:
        expected = ask(engine, [("sft", query, SAMPLED, 7) for query in queries])
        for name, weight in versions.model.named_parameters():
            if "lora_B.version ppo" in name:
                # Finite, as every adapter that can be loaded: the row itself overflows.
                weight.fill_(3e38)
        # Long ones first: whoever comes after gets their place in the cache, NaN and all.
        broken = [("ppo", queries[1] * 3, SAMPLED, 0)] * 2
        good = [("sft", query, SAMPLED, 7) for query in queries]
        answers = ask(engine, [*broken, *good, *broken])
    assert all(isinstance(answer, FloatingPointError) for answer in (*answers[:2], *answers[-2:]))
    assert answers[2:-2] == expected


def test_an_answer_that_breaks_half_way_leaves_no_trace_in_its_place(versions, queries, monkeypatch):
    with running(versions, max_rows=2) as engine:
        expected = ask(engine, [("ppo", queries[3], GREEDY, 0)])
        step = batch.Batch.step

        def poisoned(self):
            # As an adapter would that overflows at its second token: NaN in the row's own keys and values.
            logits = step(self)
            for place, row in enumerate(self.rows):
                if row.seed == 99:
                    logits[place] = torch.nan
                    for layer in self.cache.layers:
                        for store in layer.stores:
                            store[place] = torch.nan
            return logits

        monkeypatch.setattr(batch.Batch, "step", poisoned)
        requests = [("sft", queries[1] * 2, SAMPLED, 99), ("sft", queries[0], replace(SAMPLED, max_new_tokens=40), 1)]
        answers = ask(engine, [*requests, ("ppo", queries[3], GREEDY, 0)])
    assert isinstance(answers[0], FloatingPointError)
    assert answers[2] == expected[0]


def test_a_step_that_fails_ends_its_answers_and_the_next_ones_are_written(versions, queries, monkeypatch):
    with running(versions) as engine:
        expected = ask(engine, [("sft", queries[0], GREEDY, 0)])
        with monkeypatch.context() as patch:
            patch.setattr(batch, "next_logits", lambda *given: (_ for _ in ()).throw(MemoryError("no room")))
            failed = ask(engine, [("sft", queries[0], GREEDY, 0)])
        assert isinstance(failed[0], MemoryError)
        assert ask(engine, [("sft", queries[0], GREEDY, 0)]) == expected
        assert engine.load() == (0, 0)


def test_memory_is_flat_over_many_answers(versions, queries):
    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        return len(found), sum(one.numel() for one in found)

    def round_of(engine):
        requests = [(NAMES[n % 3], queries[n % 4], replace(SAMPLED, max_new_tokens=3 + n % 5), n) for n in range(40)]
        ask(engine, requests)
        # The adapters that were used last stay prepared, and the last step has to be over.
        ask(engine, [("sft", queries[0], GREEDY, 0)])
        time.sleep(0.2)

    with running(versions, max_rows=4) as engine:
        round_of(engine)
        before = tensors()
        round_of(engine)
        assert tensors() == before
