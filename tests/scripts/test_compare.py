"""compare.py on the tiny base with random adapters: answers equal to separately loaded models', in readable forms."""

import csv
import html
import json

import pytest
import torch
from adapters import random_adapter
from peft import PeftModel

import compare
from rlhf.artefacts.files import write_json
from rlhf.artefacts.run_json import load_run
from rlhf.compare import inputs
from rlhf.compare.answers import Answer, AnswerSettings, Versions, row_seeds
from rlhf.compare.html_page import write_html
from rlhf.compare.processors import GumbelSampler
from rlhf.compare.tables import best_scores, summarize, write_csv, write_markdown
from rlhf.data.choose_format import text_format
from rlhf.data.control_tokens import encode
from rlhf.data.encoding import load_tokenizer
from rlhf.data.template import DEFAULT_TEMPLATE, render
from rlhf.models.loading import load_base
from rlhf.run.terminal import display_width, labelled, printable, wrap

PROMPTS = ["小猫喜欢什么？", "老师今天看见了一本书，你呢？", "1 + 2 = 3，对吗？"]
SHORT = 12


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory) -> dict[str, str]:
    """Adapters as the stages would have written them: sft, ppo and reward."""
    root = tmp_path_factory.mktemp("adapters")
    stages = {"sft": "sft", "rlhf10": "ppo", "reward": "reward"}
    return {
        name: random_adapter(tiny_base, root / name, stage=stage, seed=seed, scale=0.3)
        for seed, (name, stage) in enumerate(stages.items())
    }


def versions_of(tiny_base, folders, names=("sft", "rlhf10"), reward=False, **writing) -> Versions:
    """The versions `names` in memory, greedy and short unless told otherwise."""
    writing = {"max_new_tokens": SHORT, "do_sample": False, **writing}
    versions = Versions(
        tiny_base, text_format(load_tokenizer(tiny_base)), AnswerSettings(**writing), torch.float32, "cpu"
    )
    for name in names:
        versions.add(name, folders[name.split("_")[0]])
    if reward:
        versions.add_reward_model(folders["reward"])
    return versions


def queries_of(tiny_base) -> list[list[int]]:
    tokenizer = load_tokenizer(tiny_base)
    return [encode(tokenizer, render(DEFAULT_TEMPLATE, prompt)) for prompt in PROMPTS]


def command(tiny_base, folders, output_dir, *extra: str) -> list[str]:
    """A command line of compare.py with an SFT and a PPO column."""
    columns = [f"{name}={folders[name]}" for name in ("sft", "rlhf10")]
    fixed = ["--base_model_name", tiny_base, "--output_dir", str(output_dir), "--max_new_tokens", str(SHORT)]
    return [*fixed, "--adapters", *columns, *extra]


# ---- answers ----
def test_every_version_answers_as_if_it_were_loaded_alone(tiny_base, folders):
    versions, queries, tokenizer = versions_of(tiny_base, folders), queries_of(tiny_base), load_tokenizer(tiny_base)
    seeds = row_seeds(0, len(queries))
    answers = {}
    # Back and forth, so that a version left active by the one before would show.
    for name in ("sft", "base", "rlhf10", "base", "sft"):
        answers[name] = [cell.text for cell in versions.answers(name, queries, seeds)]
    for name, found in answers.items():
        alone = load_base(tiny_base, torch.float32)
        if name != "base":
            alone = PeftModel.from_pretrained(alone, folders[name]).eval()
        assert found == [greedy(alone, query, tokenizer) for query in queries]
    assert len({tuple(found) for found in answers.values()}) == 3


def greedy(model, query: list[int], tokenizer) -> str:
    """Argmax by argmax without a cache: the definition."""
    ids = list(query)
    for _ in range(SHORT):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[tokenizer.pad_token_id] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            ids.pop()
            break
    return tokenizer.decode(ids[len(query) :]).strip()


def test_an_answer_does_not_depend_on_the_batch_it_was_written_in(tiny_base, folders):
    queries, seeds = queries_of(tiny_base), row_seeds(3, len(PROMPTS))
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.3}
    one_by_one = versions_of(tiny_base, folders, batch_size=1, **sampling).answers("sft", queries, seeds)
    together = versions_of(tiny_base, folders, batch_size=8, **sampling).answers("sft", queries, seeds)
    assert one_by_one == together


def test_equal_weights_sample_equal_text_and_another_seed_another_one(tiny_base, folders):
    versions = versions_of(tiny_base, folders, names=("sft", "sft_again"), do_sample=True)
    queries = queries_of(tiny_base)
    first = versions.answers("sft", queries, row_seeds(0, 3))
    assert versions.answers("sft_again", queries, row_seeds(0, 3)) == first
    assert versions.answers("sft", queries, row_seeds(1, 3)) != first


def test_noise_makes_the_argmax_a_draw_from_the_softmax():
    probabilities = torch.tensor([0.0, 0.6, 0.3, 0.1])
    count = 4000
    choice = GumbelSampler(list(range(count)))
    drawn = choice(torch.zeros(count, 1), probabilities.log().repeat(count, 1)).argmax(-1)
    share = torch.bincount(drawn, minlength=4) / count
    assert torch.allclose(share, probabilities, atol=0.03)


def test_a_score_is_the_reward_models_own_with_eos_at_the_end(tiny_base, folders):
    versions, tokenizer = versions_of(tiny_base, folders, reward=True), load_tokenizer(tiny_base)
    queries = queries_of(tiny_base)
    with versions.use("sft") as model:
        ids = model.generate(input_ids=torch.tensor([queries[0]]))[0].tolist()
    ids = ids if ids[-1] == tokenizer.eos_token_id else ids + [tokenizer.eos_token_id]
    alone = PeftModel.from_pretrained(load_base(tiny_base, torch.float32, head="score"), folders["reward"]).eval()
    with torch.no_grad():
        expected = alone(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 0]
    cells = versions.answers("sft", queries, row_seeds(0, 3))
    assert cells[0].score == pytest.approx(float(expected), abs=1e-4)
    assert len({round(cell.score, 4) for cell in cells}) == 3


def test_an_answer_that_ends_is_told_from_one_that_was_cut(tiny_base, folders):
    versions = versions_of(tiny_base, folders)
    eos = versions.prompt_format.stop_ids[0]
    query = queries_of(tiny_base)[0]
    cut = versions.answers("sft", [query], [0])[0]
    assert (cut.tokens, cut.ended) == (SHORT, False)
    with versions.use("sft") as model:
        handle = model.get_output_embeddings().register_forward_hook(lambda module, _, logits: prefer(logits, eos))
        ended = versions.answers("sft", [query], [0])[0]
        handle.remove()
    assert (ended.text, ended.tokens, ended.ended) == ("", 1, True)


def prefer(logits: torch.Tensor, token: int) -> torch.Tensor:
    return torch.where(torch.arange(logits.shape[-1]) == token, 100.0, logits)


def test_broken_weights_are_named_instead_of_written_as_text(tiny_base, folders):
    versions = versions_of(tiny_base, folders)
    with versions.use("sft") as model:
        model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        versions.answers("sft", queries_of(tiny_base), [0, 1, 2])


# ---- the whole ----
def test_a_run_writes_the_table_in_three_forms_and_prints_it(tiny_base, folders, tmp_path, capsys):
    extra = ["--reward_model_lora_path", folders["reward"], "--prompts", *PROMPTS]
    compare.main(compare.parse_args(command(tiny_base, folders, tmp_path / "out", *extra)))
    printed = capsys.readouterr().out
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == PROMPTS
    assert {"base", "sft", "rlhf10", "sft/tokens", "sft/ended", "sft/score"} <= rows[0].keys()
    markdown = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "| prompt | base | sft | rlhf10 |" in markdown
    assert "<th>prompt</th><th>base</th><th>sft</th><th>rlhf10</th>" in page
    for row in rows:
        assert html.escape(printable(row["sft"])) in page
        assert f"score {float(row['sft/score']):.3f}" in markdown
    assert "[3/3] 1 + 2 = 3，对吗？" in printed
    assert f"rlhf10: {folders['rlhf10']}" in page


def test_the_same_command_writes_the_same_bytes(tiny_base, folders, tmp_path):
    for name in ("one", "two"):
        compare.main(compare.parse_args(command(tiny_base, folders, tmp_path / name, "--prompts", *PROMPTS)))
    first, second = ((tmp_path / name / "comparison.csv").read_bytes() for name in ("one", "two"))
    assert first == second


def test_best_of_adds_a_column_with_the_highest_score_of_several_draws(tiny_base, folders, tmp_path, capsys):
    more = ["--reward_model_lora_path", folders["reward"], "--best_of", "3", "--prompts", *PROMPTS]
    compare.main(compare.parse_args(command(tiny_base, folders, tmp_path / "out", *more)))
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header[1:5] == ["base", "sft", "sft best of 3", "rlhf10"]
    # The sentence at the end is about the versions: best of n is none.
    assert "rlhf10 scores above base" in capsys.readouterr().out

    versions = versions_of(tiny_base, folders, reward=True, do_sample=True)
    draws = [versions.answers("sft", queries_of(tiny_base), row_seeds(0, 3, first=3 * number)) for number in range(3)]
    for place, row in enumerate(rows):
        best = max((cells[place] for cells in draws), key=lambda cell: cell.score)
        named = dict(zip(header, row, strict=True))
        assert named["sft best of 3"] == best.text
        assert float(named["sft best of 3/score"]) == best.score >= float(named["sft/score"])
    assert len({cells[0].text for cells in draws}) > 1


def test_interactive_talks_to_the_chosen_versions_until_input_ends(tiny_base, folders, tmp_path, capsys, monkeypatch):
    lines = iter(["小猫喜欢什么？", "", "/use sft", "你呢？", "/use nobody", "很" * 600, "/all", "好吗？"])

    def type_a_line(prompt: str) -> str:
        print(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_a_line)
    compare.main(compare.parse_args(command(tiny_base, folders, tmp_path, "--interactive", "True")))
    turns = capsys.readouterr().out.split("] > ")
    assert all(f"  {name}" in turns[1] for name in ("base", "sft", "rlhf10"))
    assert turns[3].rstrip().endswith("[sft")
    assert "  sft" in turns[4]
    assert "  base" not in turns[4]
    assert "/use nobody: unknown. Versions: base, sft, rlhf10" in turns[5]
    assert "shorten it" in turns[6]
    assert "  rlhf10" in turns[8]
    assert not list(tmp_path.iterdir())


# ---- prompts and the template ----
def test_prompts_come_from_files_of_every_kind(tmp_path):
    files = {
        "a.txt": "第一\n\n 第二 \n",
        "b.json": json.dumps(["第一", "第二"]),
        "c.jsonl": '{"instruction": "第一", "output": "不看"}\n{"instruction": "第二", "output": "不看"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert inputs.read_prompts([str(tmp_path / name)], DEFAULT_TEMPLATE) == [
            {"prompt": "第一"},
            {"prompt": "第二"},
        ]
    said = ["解释一下 a.txt 是什么", "好"]
    assert inputs.read_prompts(said, DEFAULT_TEMPLATE) == [{"prompt": text} for text in said]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n\n", "is empty"),
        ("empty.jsonl", "", "is empty"),
        ("none.json", "[]", "is empty"),
        ("bad.jsonl", '{"prompt": "好"}\n{"prompt": 3}\n', "bad.jsonl:2: .*must be text"),
    ],
)
def test_a_prompts_file_without_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        inputs.read_prompts([str(tmp_path / name)], DEFAULT_TEMPLATE)


def test_a_prompts_file_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "gb.txt").write_bytes("你好".encode("gb18030"))
    with pytest.raises(ValueError, match=r"gb\.txt is not UTF-8"):
        inputs.read_prompts([str(tmp_path / "gb.txt")], DEFAULT_TEMPLATE)


def test_the_template_is_the_adapters_own(tiny_base, folders, tmp_path):
    (tmp_path / "sft").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "sft" / file).symlink_to(f"{folders['sft']}/{file}")
    write_json(
        tmp_path / "sft" / "run.json",
        load_run(folders["sft"]) | {"prompt_template": "Q{prompt}A", "prompt_format": None},
    )
    tokenizer = load_tokenizer(tiny_base)

    def template_of(*extra: str) -> str:
        args = compare.parse_args(["--base_model_name", tiny_base, *extra])
        return inputs.format_of(args, tiny_base, tokenizer).template

    assert template_of("--adapters", f"sft={tmp_path}/sft") == "Q{prompt}A"
    assert template_of("--prompt_template", "{prompt}\\n") == "{prompt}\n"
    with pytest.raises(ValueError, match="another prompt_template"):
        template_of("--adapters", f"sft={tmp_path}/sft", f"other={folders['sft']}")


# ---- refusals ----
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapters", "a=x", "a=y"], "names a twice"),
        (["--adapters", "base=x"], "names base twice"),
        (["--adapters", "runs/sft"], "write NAME=DIR"),
        (["--include_base", "False"], "nothing to compare"),
        (["--slide", "runs/sft"], "give two, not 1"),
        (["--temperature", "0"], "--do_sample False"),
        (["--top_p", "1.5"], "--top_p 1.5"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--best_of", "1"], "--best_of 1 must be at least 2"),
        (["--best_of", "4"], "give --reward_model_lora_path"),
        (["--best_of", "4", "--reward_model_lora_path", "x", "--do_sample", "False"], "greedy decoding has only one"),
        (["--prompt_template", "no place"], "--prompt_template"),
    ],
)
def test_wrong_flags_end_with_the_usage(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.parse_args(["--base_model_name", "x", *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": ["sft=nowhere"]}, "nowhere is no adapter directory"),
        ({"adapters": ["sft={reward}"]}, "is of stage 'reward'"),
        ({"reward_model_lora_path": "{sft}"}, "is of stage 'sft'"),
        ({"base_model_name": "{llama}"}, "another base"),
        ({"base_model_name": "./nowhere"}, "--base_model_name ./nowhere does not exist"),
        ({"prompts": ["nowhere.txt"]}, "nowhere.txt does not exist"),
        ({"prompts": ["很" * 600]}, "shorten it"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_loads(
    tiny_base, tiny_llama, folders, change, message, monkeypatch
):
    monkeypatch.setattr(compare, "load_versions", lambda *_: pytest.fail("the model was loaded"))
    flags = {"base_model_name": tiny_base, "adapters": ["sft={sft}"], **change}
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(one.format(llama=tiny_llama, **folders) for one in values)]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare.main(compare.parse_args(argv))


# ---- the forms ----
NASTY = '<script>alert("1")</script> a|b *bold* `x`\n第二行\x1b[31m'


def test_markup_in_an_answer_stays_text(tmp_path):
    columns = {"sft": [Answer(NASTY, 5, True)]}
    write_html(tmp_path / "a.html", [NASTY], columns, [("sft", "<dir>")])
    write_markdown(tmp_path / "a.md", [NASTY], columns, [("sft", "<dir>")])
    write_csv(tmp_path / "a.csv", [NASTY], columns)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<dir>" not in page
    assert "\x1b" not in page
    row = next(line for line in (tmp_path / "a.md").read_text(encoding="utf-8").splitlines() if "alert" in line)
    assert "<script" not in row
    assert r"a\|b \*bold\* \`x\`<br>第二行" in row
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file))[1][:2] == [NASTY, NASTY]


def test_the_best_score_of_each_prompt_is_marked_and_wins_are_counted_by_hand(tmp_path):
    scores = {"base": [1.0, 2.0], "sft": [3.0, 2.0]}
    columns = {name: [Answer("好", 1, True, score) for score in column] for name, column in scores.items()}
    # One win and one tie of two.
    header, *lines = summarize(columns)
    assert header[-2:] == ["mean score", "win rate"]
    assert [line[-2:] for line in lines] == [["1.500", "25%"], ["2.500", "75%"]]
    rows = [{name: cells[number] for name, cells in columns.items()} for number in (0, 1)]
    assert [best_scores(row) for row in rows] == [{"sft"}, {"base", "sft"}]

    write_html(tmp_path / "a.html", ["你好", "hello"], columns, [])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count('class="best"') == page.count("★ 1 tokens") == 3
    # A phone, a reader of Chinese and a dark room.
    assert all(words in page for words in ('name="viewport"', '<td lang="zh">你好', "prefers-color-scheme: dark"))
    assert '<td class="best" data-version="sft" lang="zh">好' in page


def test_scores_of_one_version_alone_win_nothing():
    alone = {"sft": [Answer("好", 1, True, 2.0)]}
    assert summarize(alone)[0][-1] == "mean score"
    assert best_scores({"sft": alone["sft"][0]}) == set()


def test_chinese_counts_two_columns_and_latin_words_stay_whole():
    assert display_width("你好，ok") == 8
    assert wrap("你好世界", 5) == ["你好", "世界"]
    assert wrap("say hello 你好", 9) == ["say hello", "你好"]
    assert wrap("abcdef", 4) == ["abcd", "ef"]
    assert wrap("一\n\n二", 10) == ["一", "", "二"]


def test_labels_line_up_whatever_their_script():
    lines = labelled([("微调", "你好" * 20), ("a", "\x1b[2Jok")], 40)
    assert len({display_width(line.split("│")[0]) for line in lines}) == 1
    assert all(display_width(line) <= 40 for line in lines)
    assert "\x1b" not in "".join(lines)
