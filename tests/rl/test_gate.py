"""From the data to the gate: hardening, loss options, halves, the audit of a run, and what PPO makes of it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from conftest import TINY, save_random_model
from stages import words, write_pairs
from test_rl_training import PROMPTS
from test_rl_training import arguments as ppo_arguments

import reward_modeling
import rl_training
from rlhf.artefacts.fingerprints import adapter_hash
from rlhf.artefacts.run_json import load_run
from rlhf.baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer, preference_rows
from rlhf.data.funnel import Funnel, one_fold, one_half
from rlhf.reward.audit_report import read_audit
from rlhf.reward.degenerate import GATE_KINDS, HARDENING_KINDS, KINDS, degenerate_pairs, kinds_of
from rlhf.rl import gate
from rlhf.run.log import read_metrics

ROWS = [
    {"prompt": f"{who}喜欢什么？", "chosen": f"{who}喜欢{what}！", "rejected": f"{who}。", "where": "f:1"}
    for who, what in (
        ("我", "红茶，不喜欢跑步"), ("你", "听音乐，也爱唱歌"), ("小猫", "小鱼和牛奶"), ("老师", "读一本好书"),
        ("医生", "晴天和公园"), ("妈妈", "花朵"), ("朋友", "苹果、香蕉和橙子"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 120)


def reward_arguments(base, data, output_dir, **changed):
    flags = {
        "model_name": base, "dataset_name": data, "output_dir": output_dir, "max_steps": 4, "learning_rate": 5e-3,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "save_steps": 0, "eval_steps": 0,
        "eval_size": 20,
    } | changed  # fmt: skip
    return reward_modeling.parse_args(words(flags))


# ---- hardening ----
@pytest.fixture(scope="module")
def encoded(tiny_base):
    return preference_rows(text_format(load_tokenizer(tiny_base)), ROWS, 100, Funnel())


def hardened(tiny_base, rows, funnel=None, share=2.0, kinds=HARDENING_KINDS, limit=100, seed=0):
    tokenizer = load_tokenizer(tiny_base)
    return degenerate_pairs(rows, share, list(kinds), text_format(tokenizer), limit, seed, funnel or Funnel())


def test_hardening_adds_its_share_of_pairs_against_every_kind_and_counts_them(tiny_base, encoded):
    funnel = Funnel(read=len(encoded))
    made = hardened(tiny_base, encoded, funnel, share=4.0)
    assert len(made) == 4 * len(encoded) == funnel.made.total()
    assert set(funnel.made) == {f"chosen against {kind}" for kind in HARDENING_KINDS}
    assert funnel.kept == len(encoded) + len(made)
    assert funnel.as_dict()["made"] == dict(funnel.made)
    assert "made here, for training only" in funnel.table()


def test_hardening_keeps_the_chosen_side_and_its_query_and_stays_within_the_length(tiny_base, encoded):
    known = {tuple(row["query_ids"]): row["chosen_ids"] for row in encoded}
    longest = max(len(row["query_ids"]) + len(row["chosen_ids"]) for row in encoded)
    for row in hardened(tiny_base, encoded, limit=longest):
        assert row["chosen_ids"] == known[tuple(row["query_ids"])]
        assert row["rejected_ids"] != row["chosen_ids"]
        assert len(row["query_ids"]) + len(row["rejected_ids"]) <= longest


def test_hardening_takes_no_answer_for_wrong_that_may_be_right(tiny_base):
    sorry = ("抱歉，我无法回答这个问题。", "很抱歉，我无法回答这个问题！", "抱歉，我无法回答这类问题。")
    rows = [ROWS[n] | {"prompt": f"{who}几岁？", "chosen": sorry[n]} for n, who in enumerate("我你他")]
    rows = preference_rows(text_format(load_tokenizer(tiny_base)), rows, 100, Funnel())
    assert hardened(tiny_base, rows, kinds=["other_answer"]) == []
    assert len(hardened(tiny_base, rows, kinds=["cut", "other_answer"])) == 6
    asked_twice = [row | {"prompt": "几岁" + mark} for row, mark in zip(rows, "？！。", strict=True)]
    assert hardened(tiny_base, asked_twice, kinds=["other_answer"]) == []
    assert len(hardened(tiny_base, asked_twice, kinds=["cut"])) == 6


def test_the_seed_settles_hardening_and_zero_adds_nothing(tiny_base, encoded):
    assert hardened(tiny_base, encoded) == hardened(tiny_base, encoded)
    assert hardened(tiny_base, encoded, seed=1) != hardened(tiny_base, encoded)
    assert hardened(tiny_base, encoded, share=0.0) == []


def test_hardening_that_cannot_make_a_kind_ends_all_the_same(tiny_base, encoded):
    assert hardened(tiny_base, encoded, kinds=["repeated_token"], limit=4) == []


def test_kinds_are_selectable_and_unknown_ones_are_named():
    assert kinds_of("cut|eos_only") == ["cut", "eos_only"]
    assert set(kinds_of("all")) == set(HARDENING_KINDS)
    with pytest.raises(ValueError, match="silence"):
        kinds_of("cut|silence")


def test_hardening_reaches_training_and_never_the_evaluation(tiny_base, pairs, tmp_path):
    tokenizer = load_tokenizer(tiny_base)
    plain = reward_modeling.load_data(reward_arguments(tiny_base, pairs, tmp_path), text_format(tokenizer))
    args = reward_arguments(tiny_base, pairs, tmp_path, degenerate_frac=0.5)
    rows, eval_rows, about = reward_modeling.load_data(args, text_format(tokenizer))
    assert len(rows) == round(1.5 * len(plain[0]))
    assert eval_rows == plain[1]
    assert sum(about["funnel"]["made"].values()) == len(rows) - len(plain[0])


# ---- halves ----
def test_the_halves_share_no_prompt_and_together_are_everything():
    funnels = Funnel(), Funnel()
    rows = [
        row | {"prompt": f"{row['prompt']}{n}", "chosen": text} for row in ROWS for n in range(3) for text in "甲乙"
    ]
    halves = [one_half(rows, half, funnel) for half, funnel in enumerate(funnels)]
    prompts = [{row["prompt"] for row in half} for half in halves]
    assert not prompts[0] & prompts[1]
    assert len(halves[0]) + len(halves[1]) == len(rows)
    assert [funnel.dropped["in the other half"] for funnel in funnels] == [len(halves[1]), len(halves[0])]


def test_the_folds_share_no_prompt_are_together_everything_and_cut_either_half():
    asked = [row | {"prompt": f"{row['prompt']}{n}"} for row in ROWS for n in range(30)]
    rows = [row | {"chosen": text} for row in asked for text in "甲乙"]
    funnel = Funnel()
    folds = [one_fold(rows, number, 3, funnel) for number in (1, 2, 3)]
    prompts = [{row["prompt"] for row in fold} for fold in folds]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == len(ROWS) * 30
    assert sum(map(len, folds)) == len(rows)
    assert funnel.dropped["in the other folds"] == 2 * len(rows)
    # Neither of a half nor of its neighbour does a fold take all.
    for half in (0, 1):
        sizes = [len(one_half(fold, half, Funnel())) for fold in folds]
        assert min(sizes) > len(rows) / 10
    with pytest.raises(ValueError, match="no prompt falls into fold 2/9999"):
        one_fold(rows[:2], 2, 9999, Funnel())


@pytest.mark.parametrize("flags", [({"split_half": 0}, {"split_half": 1}), ({"fold": "1/2"}, {"fold": "2/2"})])
def test_two_commands_train_on_disjoint_prompts_and_evaluate_on_the_same(tiny_base, pairs, tmp_path, flags):
    tokenizer = load_tokenizer(tiny_base)
    made = [
        reward_modeling.load_data(reward_arguments(tiny_base, pairs, tmp_path, **flag), text_format(tokenizer))
        for flag in flags
    ]
    prompts = [{row["prompt"] for row in rows} for rows, _, _ in made]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert made[0][1] == made[1][1]


# ---- loss options ----
CHOSEN, REJECTED = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0, 0.5])


def by_hand(margin=0.0, smoothing=0.0, centring=0.0):
    total = 0.0
    for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True):
        d = c - r - margin
        total += (1 - smoothing) * math.log1p(math.exp(-d)) + smoothing * math.log1p(math.exp(d))
        total += centring * (c + r) ** 2
    return total / len(CHOSEN)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, by_hand()),
        ({"margin": torch.tensor([0.7, 0.7, 0.7])}, by_hand(margin=0.7)),
        ({"label_smoothing": 0.1}, by_hand(smoothing=0.1)),
        ({"center_rewards_coefficient": 0.01}, by_hand(centring=0.01)),
    ],
)
def test_each_option_of_the_loss_is_its_definition(options, expected):
    assert reward_modeling.pairwise_loss(CHOSEN, REJECTED, **options).item() == pytest.approx(expected, abs=1e-6)


def test_options_reach_the_training_loss_and_leave_the_evaluation_alone(tiny_base, pairs, tmp_path):
    first, evaluated = [], []
    for number, flags in enumerate(({}, {"label_smoothing": 0.3}, {"center_rewards_coefficient": 10.0})):
        out = tmp_path / str(number)
        args = reward_arguments(tiny_base, pairs, out, audit=False, max_steps=1, learning_rate=1e-9, **flags)
        reward_modeling.main(args)
        rows = read_metrics(out)
        first.append(next(row["loss"] for row in rows if "loss" in row))
        evaluated.append(load_run(out)["metrics"]["eval_loss"])
    assert len({round(loss, 5) for loss in first}) == 3
    assert evaluated == pytest.approx([evaluated[0]] * 3, abs=1e-5)


def test_a_margin_column_is_read_reaches_the_loss_and_a_bad_one_is_named(tiny_base, tmp_path):
    rows = [{"prompt": f"问{n}？", "chosen": "好的！", "rejected": "不好。", "margin": n / 10} for n in range(40)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = reward_arguments(tiny_base, data, tmp_path / "out", margin_field="margin")
    made, eval_rows, _ = reward_modeling.load_data(args, text_format(load_tokenizer(tiny_base)))
    assert {row["margin"] for row in made + eval_rows} == {n / 10 for n in range(40)}
    batch = reward_modeling.pairs.PairCollator(0)(made[:3])
    assert batch["margin"].tolist() == pytest.approx([row["margin"] for row in made[:3]])
    data.write_text(json.dumps(rows[0] | {"margin": "much"}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: field 'margin' must be a number, not 'much'"):
        reward_modeling.load_data(args, text_format(load_tokenizer(tiny_base)))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"split_half": 2}, "--split_half 2 must be 0 or 1"),
        ({"fold": "0/4"}, "--fold 0/4 must be I/K"),
        ({"fold": "5/4"}, "--fold 5/4 must be I/K"),
        ({"fold": "1/1"}, "--fold 1/1 must be I/K"),
        ({"fold": "first"}, "--fold first must be I/K"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5"),
        ({"degenerate_kinds": "silence"}, "--degenerate_kinds silence"),
        ({"degenerate_frac": -0.1}, "--degenerate_frac -0.1"),
        ({"audit_only": True}, "--audit_only True and --reward_model_lora_path belong together"),
    ],
)
def test_bad_values_end_with_usage_and_code_2(flags, complaint, capsys):
    with pytest.raises(SystemExit) as code:
        reward_arguments("b", "d", "o", **flags)
    assert code.value.code == 2
    assert complaint in capsys.readouterr().err


# ---- the audit of a run ----
@pytest.fixture(scope="module")
def trained(tiny_base, pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("reward") / "out"
    reward_modeling.main(reward_arguments(tiny_base, pairs, out))
    return out


def test_training_ends_with_an_audit_and_run_json_keeps_its_shares(trained):
    found, metrics = read_audit(trained), load_run(trained)["metrics"]
    assert found["adapter"] == adapter_hash(trained)
    assert metrics["audit_pass"] == (found["verdict"]["verdict"] == "pass")
    assert metrics["audit/empty"] == found["attacks"]["empty"]["share"]
    assert found["padding_change"] < 1e-4
    assert {"chosen_mean", "chosen_std", "rejected_mean", "rejected_std"} <= {n.removeprefix("eval_") for n in metrics}


def test_an_audit_alone_finds_what_the_audit_after_training_found(trained, tiny_base, pairs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "audit.json").unlink()
    args = reward_arguments(
        tiny_base, pairs, tmp_path / "unused", audit_only=True, reward_model_lora_path=copy, lora_rank=1
    )
    reward_modeling.main(args)
    again, before = read_audit(copy), read_audit(trained)
    for kind, result in before["attacks"].items():
        assert again["attacks"][kind]["share"] == result["share"], kind
        assert again["attacks"][kind]["margin"] == pytest.approx(result["margin"], abs=1e-5), kind
    assert not (tmp_path / "unused" / "adapter_model.safetensors").exists()


# ---- the gate ----
@pytest.fixture
def ppo(tiny_base, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    return {
        "base_model_name": tiny_base, "dataset_name": str(prompts), "steps": 8,
        "sft_model_lora_path": random_adapter(tiny_base, tmp_path / "sft"),
        "reward_model_lora_path": random_adapter(tiny_base, tmp_path / "reward", "reward", seed=1),
    }  # fmt: skip


def plant_audit(folder, winning, adapter=None):
    content = {"verdict": {"winning": winning}, "adapter": adapter or adapter_hash(folder)}
    (Path(folder) / "audit.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_failed_audit_refuses_before_a_model_loads_and_says_how_to_mend_it(ppo, tmp_path, monkeypatch):
    plant_audit(ppo["reward_model_lora_path"], {"empty": 0.63})
    monkeypatch.setattr(rl_training.roles, "load_roles", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"empty wins on 63% of prompts.*say nothing.*--degenerate_frac"):
        rl_training.main(ppo_arguments(ppo, tmp_path / "out", reward_gate="refuse"))


def test_by_default_a_failed_audit_warns_loudly_and_the_run_goes_on(ppo, tmp_path):
    plant_audit(ppo["reward_model_lora_path"], {"empty": 0.63})
    with pytest.warns(UserWarning, match="empty wins on 63% of prompts"):
        rl_training.main(ppo_arguments(ppo, tmp_path / "out"))
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_passed_audit_opens_the_gate(ppo, tmp_path, capsys):
    plant_audit(ppo["reward_model_lora_path"], {})
    rl_training.main(ppo_arguments(ppo, tmp_path / "out", reward_gate="refuse"))
    assert "quick audit" not in capsys.readouterr().out


@pytest.mark.parametrize("stale", [False, True])
def test_without_an_audit_of_this_very_adapter_a_quick_one_judges(ppo, tmp_path, monkeypatch, capsys, stale):
    if stale:
        plant_audit(ppo["reward_model_lora_path"], {}, adapter="of another time")
    monkeypatch.setattr(gate, "winning_attacks", lambda results: {"one_token": 0.5})
    with pytest.raises(ValueError, match=r"a quick audit says .* one_token wins on 50% of prompts"):
        rl_training.main(ppo_arguments(ppo, tmp_path / "out", reward_gate="refuse"))
    assert "the SFT model's own answer wins against" in capsys.readouterr().out


def test_the_quick_audit_finds_a_reward_model_that_loves_silence(ppo, tmp_path, monkeypatch):
    def silence(backbone, head, pad_id, batch_size, device):
        return lambda rows: [-float(len(row)) for row in rows]

    monkeypatch.setattr(gate, "row_scorer", silence)
    with pytest.raises(ValueError, match="empty wins on 100% of prompts"):
        rl_training.main(ppo_arguments(ppo, tmp_path / "out", reward_gate="refuse", output_max_length=40))


def test_the_gate_kinds_are_those_that_no_good_answer_can_be():
    assert set(GATE_KINDS) == {
        "empty", "eos_only", "one_token", "very_short", "repeated_token", "repeated_sentence", "random_characters",
        "copied_prompt",
    }  # fmt: skip


# ---- real data ----
@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"share_prompt": True, "degenerate_frac": 0.2, "split_half": 1}], ids=str)
def test_real_preferences_of_several_turns_train_a_reward_model_and_are_audited(shared_data, tmp_path, capsys, flags):
    base = tmp_path / "base"
    tokenizer = BaichuanTokenizer(vocab_file=str(shared_data / "baichuan_64k.model"), model_max_length=4096)
    tokenizer.save_pretrained(base)
    config = BaichuanConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **TINY)
    save_random_model(BaichuanForCausalLM, config, base)
    data, out = shared_data / "dpo_zh_demo.json", tmp_path / "out"
    args = reward_arguments(base, data, out, max_length=1024, audit_prompts=30, **flags)
    assert any(row["prompt"] != row["opening"] for row in reward_modeling.load_data(args, text_format(tokenizer))[0])
    reward_modeling.main(args)
    said = capsys.readouterr().out
    assert "preference rows from conversations + chosen + rejected" in said
    assert "audit of the reward model" in said
    funnel = load_run(out)["data"]["funnel"]
    assert funnel["kept"] > 100
    assert funnel["dropped"]["longer than 1024 tokens"] > 0
    assert set(read_audit(out)["attacks"]) == set(KINDS)
