"""The report of a run: one file without a network, foreign text as text, warnings in words, whatever is there."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.page import report
from rlhf.page.report_data import load_run, read_log
from rlhf.page.report_svg import thinned, ticks
from rlhf.page.report_warnings import warnings_of

NASTY = "</script><img src=x onerror=alert(1)> & \"'\x1b[31m\u202e第二行"
STEPS = 20


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ppo_rows(**ends) -> list[dict]:
    """Metrics of a PPO run that goes well; `ends`: other values that a metric (/ as __) reaches at the end."""
    start = {"score/mean": 0.0, "rewards/mean": 0.0, "kl/mean": 0.0, "len/mean": 20.0, "len/min": 9.0, "entropy": 1.0,
             "clipfrac": 0.02, "empty_frac": 0.0, "eos_frac": 1.0, "distinct_2": 0.6, "skipped": 0.0}  # fmt: skip
    end = start | {"score/mean": 1.5, "rewards/mean": 1.2, "kl/mean": 4.0, "entropy": 0.8}
    end |= {name.replace("__", "/"): value for name, value in ends.items()}
    rows = []
    for step in range(1, STEPS + 1):
        share = (step - 1) / (STEPS - 1)
        rows.append({"step": step} | {key: start.get(key, 0) + share * (end[key] - start.get(key, 0)) for key in end})
    for name, before in (("score", 0.1), ("judge", 3.0)):
        rows[0] |= {f"eval_start/{name}/mean": before, f"eval_start/{name}/error": 0.1}
        rows[-1] |= {f"eval/{name}/mean": before + 1, f"eval/{name}/error": 0.1}
    return rows


def answers(step: int, text: str, evaluation: bool = True) -> list[dict]:
    rows = [{"step": step, "query": f"问：{place}？", "response": f"{text} {place}", "score": place / 2, "kl": 1.0,
             "length": 5, "ended": place > 0} for place in range(3)]  # fmt: skip
    return [{"evaluation": True, **row} for row in rows] if evaluation else rows


def write_run(folder: Path, rows: list[dict], stage: str = "ppo", samples=(), **about) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines(rows), encoding="utf-8")
    if samples:
        (folder / "samples.jsonl").write_text(lines(samples), encoding="utf-8")
    run = {
        "stage": stage,
        "arguments": {"learning_rate": 1e-5, "seed": 0},
        "command": "python rl_training.py --seed 1",
        "base": {"model_type": "llama", "hidden_size": 8, "weights": "abc"},
        "data": {"read": 10, "kept": 9, "dropped": {"duplicate": 1}},
        "metrics": {"score/mean": 1.5},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(run | about, ensure_ascii=False), encoding="utf-8")
    return folder


def made(*folders: Path) -> str:
    return report.write_report(list(folders)).read_text(encoding="utf-8")


def said(folder: Path) -> str:
    return " ".join(english for english, _ in warnings_of(load_run(folder, "run")))


class Tags(HTMLParser):
    """Tags and attributes of a page, and its text by tag."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.stack, self.texts = [], [], [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input", "img", "path", "circle"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data):
        self.texts.setdefault(self.stack[-1] if self.stack else "", []).append(data)


# ---- one file that opens anywhere ----
def test_the_page_asks_nobody_for_anything_and_runs_its_own_script_alone(tmp_path):
    page = made(write_run(tmp_path / "ppo", ppo_rows(), samples=answers(1, "甲") + answers(20, "乙")))
    found = Tags(page)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"(?s)<script>.*?</script>", "", page))
    assert not [name for name, _ in found.attributes if name in ("src", "style") or name.startswith("on")]
    policy = re.search(r'Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.search(rf"(?s)<{tag}>(.*?)</{tag}>", page)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_foreign_text_stays_text_wherever_it_stands(tmp_path):
    rows = ppo_rows()
    rows[3]["guard"] = NASTY
    rows[4][f"reward/{NASTY}/mean"] = 1.0
    rows[4][NASTY] = 1.0
    samples = [{"step": 1, "evaluation": True, "query": NASTY, "response": NASTY, f"reward/{NASTY}": 1.0}]
    about = {"arguments": {NASTY: NASTY, "list": [NASTY]}, "command": NASTY, "base": {"model_type": NASTY},
             "prompt_template": NASTY, "git_commit": NASTY, "versions": {NASTY: NASTY}, "metrics": {NASTY: NASTY},
             "parents": {NASTY: {"path": NASTY}}, "data": {"read": 9, "kept": 1, "dropped": {NASTY: 8}}}  # fmt: skip
    folder = write_run(tmp_path / "<b>run", rows, samples=samples, **about)
    audit = {"verdict": {"verdict": NASTY, "winning": {NASTY: 1.0}, "reasons": [NASTY]}, "attacks": {NASTY: {"n": 3}}}
    (folder / "audit.json").write_text(json.dumps(audit))
    (folder / "best").mkdir()
    (folder / "best" / "state.json").write_text(json.dumps({"best": {"step": 5, "value": NASTY}}))

    page = made(folder, write_run(tmp_path / "other", ppo_rows()))
    found = Tags(page)
    assert found.tags.count("script") == 1 and not {"img", "b>run"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert "\x1b" not in page and "\u202e" not in page
    assert page.count("onerror=alert(1)&gt;") > 15


def test_every_sentence_stands_in_both_languages(tmp_path):
    page = made(write_run(tmp_path / "ppo", ppo_rows(len__mean=5.0), samples=answers(20, "甲")))
    assert page.count('class="en"') == page.count('class="zh"') > 50
    for chinese in re.findall(r'class="zh" lang="zh-CN">([^<]+)<', page):
        assert re.search(r"[\u3000-\u9fff]|KL|token", chinese), chinese


def test_the_drawing_carries_the_logs_own_numbers(tmp_path):
    rows = ppo_rows()
    page = made(write_run(tmp_path / "ppo", rows))
    points = re.findall(r'data-points="([^"]+)"', page)
    scores = ";".join(f"{row['step']} {row['score/mean']:.6g}" for row in rows)
    judged = "0 3;20 4"
    assert scores in points and judged in points


def test_a_long_line_keeps_its_peaks():
    points = [(step, float(step == 777) - (step == 1234)) for step in range(5000)]
    kept = thinned(points)
    assert len(kept) <= 300 and {(777, 1.0), (1234, -1.0), (4999, 0.0)} <= set(kept)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17.5), (1e-6, 3e-6), (5, 5.0001), (1e20, 2e20)])
def test_numbers_on_an_axis_are_few_round_and_inside(low, high):
    found = ticks(low, high, 4)
    assert 1 <= len(found) <= 6 and all(low <= value <= high for value in found)


# ---- in words ----
@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({"len__mean": 10.0}, "Length fell by 48% while the score rose"),
        ({"len__mean": 60.0}, "Length rose by"),
        ({"empty_frac": 0.5}, "are empty"),
        ({"eos_frac": 0.3}, "length limit"),
        ({"entropy": 0.1}, "Entropy fell"),
        ({"distinct_2": 0.1}, "distinct_2"),
        ({"kl__mean": 60.0}, "this far from the SFT model"),
        ({"rewards__mean": -1.0}, "the distance cost more"),
        ({"score__mean": -1.0}, "did not rise"),
        ({"clipfrac": 0.6}, "are clipped"),
        ({"left_out": 2.0}, "were left out"),
    ],
)
def test_what_should_make_one_look_twice_is_said(tmp_path, ends, words):
    assert words in said(write_run(tmp_path / "bad", ppo_rows(**ends)))
    assert words not in said(write_run(tmp_path / "good", ppo_rows()))


def test_a_run_that_goes_well_is_left_in_peace(tmp_path):
    assert said(write_run(tmp_path / "good", ppo_rows())) == ""


def test_a_judge_that_falls_while_the_score_rises_is_named(tmp_path):
    rows = ppo_rows()
    rows[-1]["eval/judge/mean"] = 1.0
    assert "the reward model is being gamed" in said(write_run(tmp_path / "run", rows))
    rows[-1]["eval/judge/mean"] = 3.05
    assert "no clear gain" in said(write_run(tmp_path / "run", rows))


def test_the_guards_steps_stand_in_words_and_in_every_chart(tmp_path):
    rows = ppo_rows()
    rows[6]["guard"] = "KL jumped"
    folder = write_run(tmp_path / "run", rows)
    assert "The guard stepped in at step 7: KL jumped" in said(folder)
    page = made(folder)
    assert page.count('class="event guard"') == page.count('<figure class="chart">') > 6


def test_the_other_stages_have_warnings_of_their_own(tmp_path):
    points = ((2, 0.7), (4, 0.6), (6, 0.9))
    losses = [{"step": step, "eval_loss": loss, "eval_accuracy": 0.55} for step, loss in points]
    reward = write_run(tmp_path / "reward", losses, "reward")
    audit = {"verdict": {"verdict": "fail", "winning": {"empty": 0.4}}, "length": {"spearman": 0.8}}
    (reward / "audit.json").write_text(json.dumps(audit))
    words = said(reward)
    assert all(
        part in words for part in ("rose again", "little better than a coin", "(nothing at all)", "largely length")
    )
    sft = write_run(tmp_path / "sft", losses, "sft", data={"read": 9, "dropped": {"bad": 8}})
    assert "More than half" in said(sft)


# ---- several runs ----
def test_two_runs_are_laid_over_one_another_with_the_flags_that_differ(tmp_path):
    one = write_run(tmp_path / "one", ppo_rows(), samples=answers(20, "甲"), arguments={"seed": 0, "steps": 8})
    other = ppo_rows(len__mean=5.0)
    two = write_run(tmp_path / "two", other, samples=answers(20, "乙"), arguments={"seed": 1, "steps": 8})
    page = made(one, two)
    assert [path.parent.name for path in tmp_path.glob("*/*.html")] == ["one"]
    assert not (one / "report.html").exists()
    differing = page[page.index("Flags that differ") : page.index("All flags")]
    assert "<code>seed</code>" in differing and "<code>steps</code>" not in differing
    score = page[page.index('aria-label="Score / 得分"') :].split("</svg>")[0]
    assert score.count('class="line c0') == score.count('class="line c1') == 2
    assert '<option value="0" selected>one, step 20' in page and '<option value="1" selected>two, step 20' in page


# ---- whatever is there ----
BROKEN = {
    "metrics.jsonl": ["", "\n\n", "[]\n{}\n", '{"step": 1, "kl/mean": "nan"}\n{"step": 2, "kl/mean": 1e999}\n',
                      '{"step": 1, "score/mean": 1}\n{"st', "\x00\xff" * 50, '{"step": 1e3}\n{"step": true}\n',
                      '{"step": ' + "9" * 400 + "}\n", "[" * 100_000, '{"step": 3, "score/mean": 1e308, "loss": {}}\n',
                      '{"step": 3, "score/mean": -1e308}\n{"step": 4, "score/mean": 1e308}\n',
                      '{"step": 5, "guard": [1]}\n',
                      '{"step": 3, "score/mean": 1e-320}\n{"step": 4, "score/mean": 0}\n'],
    "samples.jsonl": ["x", '{"step": 1}\n', '{"step": 1, "query": 3, "response": null, "score": []}\n',
                      '{"step": 1, "response": "\\ud800"}\n'],
    "run.json": ["", "[]", "null", '{"stage": 3}', '{"stage": "ppo", "arguments": [], "base": 3, "data": "x"}',
                 '{"metrics": 1}',
                 '{"data": {"read": "x", "dropped": [], "funnel": {"read": 3, "made": 3, "dropped": {"a": "b"}}}}',
                 '{"parents": {"reward": {"path": 3}, "x": null}, "versions": [], "prompt_template": {}}',
                 '{"stage": "ppo", "parents": {"reward": {"path": "a\\u0000b"}}}'],
    "audit.json": ["x", '{"verdict": 3, "attacks": {"a": 3, "b": {"share": "x", "interval": 3}}, "length": []}'],
    "best/state.json": ["[]", '{"best": {"step": "x"}}', '{"best": {"step": 1e400}}'],
    ".lock": ["", "x", "0", "99999999999999999999", "-1"],
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_cost_their_part_of_the_report_alone(tmp_path, name):
    for place, content in enumerate(BROKEN[name]):
        folder = write_run(tmp_path / str(place), ppo_rows(), samples=answers(20, "甲"))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8", errors="surrogatepass")
        page = made(folder)
        assert "</html>" in page and "<nav>" in page
        assert "nan," not in page and 'd="M nan' not in page


def test_damaged_lines_are_counted_and_a_line_that_is_being_written_is_not(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "a": 1}\nrubbish\n{"step": 1}\n{"step": 3, "a', encoding="utf-8")
    notes = []
    assert [row["step"] for row in read_log(file, notes)] == [1, 2]
    words = "metrics.jsonl: 1 damaged lines are left out, line 2 the first of them."
    assert [english for english, _ in notes] == [words]


def test_of_a_long_log_the_beginning_and_the_end_are_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines([{"step": step, "a": "x" * 90} for step in range(1000)]), encoding="utf-8")
    notes = []
    steps = [row["step"] for row in read_log(file, notes, 20_000)]
    assert steps[0] == 0 and steps[-1] == 999 and 100 < len(steps) < 300
    assert len(notes) == 1 and "is long" in notes[0][0]


def test_a_run_without_its_result_says_so_and_is_described_by_its_newest_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run", ppo_rows())
    for step in (4, 16):
        write_run(folder / f"step_{step}", [], arguments={"seed": step})
    (folder / "run.json").unlink()
    page = made(folder)
    assert "The run has no final result: it was stopped after 20 logged steps" in page
    assert "<code>step_16/run.json</code>" in page and "<td>16</td>" in page
    (folder / ".lock").write_text("1")
    assert "seems to go on (process 1)" in made(folder)


def test_where_there_is_no_run_one_sentence_says_so(tmp_path, capsys):
    write_run(tmp_path / "runs" / "ppo", ppo_rows())
    for folder, words in ((tmp_path / "runs", "give"), (tmp_path / "nowhere", "is no directory")):
        assert report.main(report.parse_args([str(folder)])) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("report: error: ") and errors.count("\n") == 1 and words in errors
    with pytest.raises(SystemExit) as ended:
        report.parse_args([])
    assert ended.value.code == 2


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    folder = write_run(tmp_path / "run", ppo_rows())
    (folder / "report.html").mkdir()
    with pytest.warns(UserWarning, match="the report could not be written"):
        report.write_at_end(folder)
    assert not list(folder.glob(".report*"))


def test_the_command_needs_no_model_library(tmp_path):
    folder = write_run(tmp_path / "run", ppo_rows())
    code = (
        "import sys; from rlhf.page import report; report.main(report.parse_args(sys.argv[1:]))\n"
        "print({'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"written: {folder}/report.html (one file, opens without a network)", "set()"
    ]  # fmt: skip


# ---- in a browser ----
def test_a_reader_points_chooses_searches_and_switches_the_language(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    samples = answers(1, "甲") + answers(10, "乙") + answers(20, "丙") + answers(20, "别的", evaluation=False)
    file = report.write_report([write_run(tmp_path / "ppo", ppo_rows(), samples=samples)])

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
        complaints, asked = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())

        # Pointing at the left end of one chart shows the first step in all of them.
        drawing = page.locator(".chart > svg").first
        width = drawing.bounding_box()["width"]
        drawing.hover(position={"x": width * 0.13, "y": 40})
        shown = page.locator(".chart .legend b").all_inner_texts()
        assert shown[0].startswith("0") and page.locator(".chart .at").first.text_content() in ("0", "1")
        drawing.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".chart .legend b").all_inner_texts() != shown

        # The first and the last held-out answers stand beside one another.
        visible = page.locator(".answer:visible p")
        assert [text.split()[0] for text in visible.all_inner_texts()] == ["甲", "丙"] * 3
        page.select_option("#left", label="step 10 / 第 10 步")
        assert visible.all_inner_texts()[0].startswith("乙")
        page.fill("#search", "丙 2")
        assert page.locator("article:visible").count() == 1 and page.locator("#found").text_content().startswith("1 /")

        page.click("label[for=use-zh]")
        assert page.locator("h2").first.inner_text() == "概要"
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert complaints == [] and asked == [file.as_uri()]
