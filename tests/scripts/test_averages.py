"""Weighted sums of adapters: equal to the definition, loaded by plain peft, used in compare.py."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import NoArguments, random_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import compare
import merge_lora
from rlhf.artefacts import averaging
from rlhf.artefacts.adapters import check_adapter, read_adapter, save_adapter
from rlhf.artefacts.files import ADAPTER_FILE
from rlhf.artefacts.fingerprints import adapter_hash, base_fingerprint
from rlhf.artefacts.run_json import load_run, write_run
from rlhf.compare.answers import AnswerSettings, Versions
from rlhf.compare.arguments import terms_of
from rlhf.compare.slide import answer_kl
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.loading import load_base

IDS = torch.arange(3, 27).view(2, 12)


def adapter(base: str, folder: Path, seed: int, head: str = "causal", run: bool = True, **settings) -> str:
    """An adapter of any shape with random weights, with the run.json of an SFT run unless told otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(load_base(base, torch.float32, head=head), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, folder)
    if run:
        tokenizer = load_tokenizer(base)
        about = {"base": base_fingerprint(base), "tokenizer": tokenizer}
        write_run(folder, stage="sft", args=NoArguments(), prompt_format=text_format(tokenizer).record(), **about)
    return str(folder)


@pytest.fixture(scope="module")
def unlike(tiny_base, tmp_path_factory) -> list[str]:
    """Adapters that share as little as they may: ranks, layers, scales, patterns."""
    root = tmp_path_factory.mktemp("unlike")
    shapes = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["W_pack", "o_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["W_pack"], "use_rslora": True, "layers_to_transform": [1]},
        {"r": 3, "lora_alpha": 6, "target_modules": r".*\.(o_proj|up_proj)", "rank_pattern": {"up_proj": 5},
         "alpha_pattern": {"o_proj": 2}},
    ]  # fmt: skip
    return [adapter(tiny_base, root / str(seed), seed, **shape) for seed, shape in enumerate(shapes)]


def average(target: Path, *paths: str, weights=(), **flags) -> str:
    argv = ["--average", *paths, "--output_dir", str(target)]
    argv += ["--weights", *map(str, weights)] if weights else []
    for name, value in flags.items():
        argv += [f"--{name}", value]
    merge_lora.main(merge_lora.parse_args(argv))
    return str(target)


def changes(base: str, path: str) -> dict[str, torch.Tensor]:
    """What plain peft adds to each weight of the base."""
    model = PeftModel.from_pretrained(load_base(base, torch.float32), path)
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }


def logits(base: str, path: str, head: str = "causal") -> torch.Tensor:
    with torch.no_grad():
        model = PeftModel.from_pretrained(load_base(base, torch.float32, head=head), path).eval()
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


# ---- the sum ----
def test_a_weighted_sum_is_the_sum_of_the_terms_in_every_layer(tiny_base, unlike, tmp_path, capsys):
    weights = (0.5, -0.2, 0.7)
    found = changes(tiny_base, average(tmp_path / "sum", *unlike, weights=weights))
    expected = {}
    for weight, path in zip(weights, unlike, strict=True):
        for name, change in changes(tiny_base, path).items():
            expected[name] = expected.get(name, 0) + weight * change
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=1e-6)
    said = capsys.readouterr().out
    assert "rank 11" in said and "largest difference to the weighted sum of the terms" in said


def test_plain_peft_computes_what_a_model_with_the_summed_change_computes(tiny_base, unlike, tmp_path):
    path = average(tmp_path / "sum", *unlike[:2])
    model = load_base(tiny_base, torch.float32).eval()
    for place in unlike[:2]:
        for name, change in changes(tiny_base, place).items():
            model.get_submodule(name.removeprefix("base_model.model.")).weight.data += 0.5 * change
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(tiny_base, path), expected, rtol=0, atol=1e-4)


def test_it_is_what_peft_itself_makes_where_peft_is_exact(tiny_base, tmp_path):
    plain = {"lora_alpha": 8, "target_modules": ["W_pack"]}
    paths = [adapter(tiny_base, tmp_path / str(rank), rank, r=rank, **plain) for rank in (2, 3)]
    model = PeftModel.from_pretrained(load_base(tiny_base, torch.float32), paths[0], adapter_name="a")
    model.load_adapter(paths[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    made = average(tmp_path / "sum", *paths, weights=(0.3, 0.7))
    torch.testing.assert_close(logits(tiny_base, made), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_average_of_one_adapter_is_that_adapter(tiny_base, unlike, tmp_path, place):
    path = average(tmp_path / "one", unlike[place])
    torch.testing.assert_close(logits(tiny_base, path), logits(tiny_base, unlike[place]), rtol=0, atol=1e-5)


def test_a_sum_is_an_artefact_like_any_other(tiny_base, unlike, tmp_path):
    path = average(tmp_path / "sum", *unlike, base_model_name=tiny_base)
    run = check_adapter(path, stage="sft", base=base_fingerprint(tiny_base), tokenizer=load_tokenizer(tiny_base))
    assert [entry["adapter"] for entry in run["parents"].values()] == [adapter_hash(place) for place in unlike]
    assert run["metrics"]["difference"] <= 1e-6
    twice = average(tmp_path / "again", *unlike)
    for name in (ADAPTER_FILE, "adapter_config.json"):
        assert (Path(path) / name).read_bytes() == (Path(twice) / name).read_bytes()


# ---- reward adapters ----
def test_reward_adapters_that_differ_in_the_head_alone_score_as_the_mean(tiny_base, tmp_path):
    one = random_adapter(tiny_base, tmp_path / "one", "reward", seed=1)
    other = shutil.copytree(one, tmp_path / "other")
    tensors = load_file(other / ADAPTER_FILE)
    head = next(name for name in tensors if name.endswith("score.weight"))
    tensors[head] = tensors[head].flip(1).contiguous()
    save_file(tensors, other / ADAPTER_FILE, metadata={"format": "pt"})
    path = average(tmp_path / "mean", one, str(other))
    expected = (logits(tiny_base, one, "score") + logits(tiny_base, str(other), "score")) / 2
    torch.testing.assert_close(logits(tiny_base, path, "score"), expected, rtol=0, atol=1e-4)
    assert load_run(path)["stage"] == "reward"


def test_reward_adapters_with_one_head_score_as_that_head_on_the_summed_layers(tiny_base, tmp_path):
    paths = [random_adapter(tiny_base, tmp_path / str(seed), "reward", seed=seed) for seed in (1, 2)]
    tensors = [load_file(Path(path) / ADAPTER_FILE) for path in paths]
    head = next(name for name in tensors[0] if name.endswith("score.weight"))
    tensors[1][head] = tensors[0][head]
    save_file(tensors[1], Path(paths[1]) / ADAPTER_FILE, metadata={"format": "pt"})
    average(tmp_path / "mean", *paths)
    summed = load_file(tmp_path / "mean" / ADAPTER_FILE)
    torch.testing.assert_close(summed[head], tensors[0][head], rtol=0, atol=1e-6)


# ---- refusals ----
def test_what_cannot_be_summed_is_refused_by_name(tiny_base, tiny_llama, unlike, tmp_path):
    llama = random_adapter(tiny_llama, tmp_path / "llama")
    reward = random_adapter(tiny_base, tmp_path / "reward", "reward")
    dora = adapter(tiny_base, tmp_path / "dora", 1, r=2, target_modules=["o_proj"], use_dora=True)
    saved = adapter(tiny_base, tmp_path / "saved", 1, r=2, target_modules=["o_proj"], modules_to_save=["lm_head"])
    cases = ((llama, "another base"), (reward, "is of stage 'reward'"), (dora, "is a DoRA adapter"),
             (saved, "modules_to_save lm_head"), (str(tmp_path / "nowhere"), "is no adapter directory"))  # fmt: skip
    for path, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            average(tmp_path / "sum", unlike[0], path)
        assert not (tmp_path / "sum").exists()


def test_foreign_adapters_of_other_sizes_are_refused(tiny_base, unlike, tmp_path):
    config, tensors = read_adapter(unlike[0])
    wide = {name: torch.cat([tensor, tensor]) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    (tmp_path / "wide").mkdir()
    config.save_pretrained(str(tmp_path / "wide"))
    save_file(wide, tmp_path / "wide" / ADAPTER_FILE)
    with pytest.raises(ValueError, match="was trained on another base"):
        averaging.read_terms([(0.5, unlike[0]), (0.5, str(tmp_path / "wide"))], "--average")


def test_half_an_adapter_is_refused(unlike, tmp_path):
    config, tensors = read_adapter(unlike[0])
    (tmp_path / "half").mkdir()
    config.save_pretrained(str(tmp_path / "half"))
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "half" / ADAPTER_FILE)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        averaging.read_terms([(1.0, str(tmp_path / "half"))], "--average")


@pytest.mark.parametrize(
    "flags",
    [["--average", "a", "b", "--weights", "1"], ["--average", "a", "--lora_path", "b"], ["--weights", "1", "2"],
     ["--average", "a", "--weights", "nan"]],
)  # fmt: skip
def test_wrong_flags_end_with_the_usage(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        merge_lora.parse_args([*flags, "--output_dir", "x"])
    assert ended.value.code == 2 and "--" in capsys.readouterr().err


# ---- in compare.py ----
def test_a_column_may_name_a_sum_and_directories_may_look_like_one(tmp_path, monkeypatch):
    assert terms_of("0.4*runs/sft+0.6*runs/ppo") == [(0.4, "runs/sft"), (0.6, "runs/ppo")]
    assert terms_of("-.2*runs/sft-1+1.2*a+b") == [(-0.2, "runs/sft-1"), (1.2, "a+b")]
    assert terms_of("1e-1*x") == [(0.1, "x")]
    for plain in ("runs/sft", "a+b", "0.4*", "a*b", "x0.4*b"):
        assert terms_of(plain) == [(1.0, plain)]
    monkeypatch.chdir(tmp_path)
    Path("0.5*x").mkdir()
    assert terms_of("0.5*x") == [(1.0, "0.5*x")]


def test_a_slide_goes_from_the_first_adapter_to_the_second(tiny_base, tmp_path, capsys):
    sft = random_adapter(tiny_base, tmp_path / "sft", seed=0, scale=0.3)
    ppo = random_adapter(tiny_base, tmp_path / "ppo", "ppo", seed=1, scale=0.3)
    judge = random_adapter(tiny_base, tmp_path / "judge", "reward", seed=2)
    between = f"between=0.4*{sft}+0.6*{ppo}"
    argv = ["--base_model_name", tiny_base, "--slide", sft, ppo, "--adapters", between, "--judge_lora_path", judge,
            "--reward_model_lora_path", judge, "--max_new_tokens", "8", "--output_dir", str(tmp_path / "out"),
            "--prompts", "小猫喜欢什么？", "你呢？"]  # fmt: skip
    compare.main(compare.parse_args(argv))
    out = tmp_path / "out"
    assert f"python playground.py --answers {out}/answers.jsonl" in capsys.readouterr().out
    assert (out / "slide.png").stat().st_size > 5_000 and "KL to the first" in (out / "slide.md").read_text()

    with (out / "slide.csv").open(encoding="utf-8", newline="") as file:
        points = {row["version"]: row for row in csv.DictReader(file)}
    names = [f"slide_{share}" for share in ("0.00", "0.25", "0.50", "0.75", "1.00")]
    assert list(points) == [*names, "between"]
    distances = [float(points[name]["KL to the first"]) for name in names]
    assert distances[0] == 0 and all(distance > 0 for distance in distances[1:])
    assert all(row["score"] == row["judge"] != "" for row in points.values())

    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {"prompt", "version", "answer", "score", "seed", "sampling", "adapter"}
    assert len(rows) == 12 and all(row.keys() == names for row in rows)
    marks = {row["version"]: row["adapter"] for row in rows}
    assert marks["slide_0.00"] == adapter_hash(sft)
    assert marks["between"] == f"0.4*{adapter_hash(sft)}+0.6*{adapter_hash(ppo)}"
    assert len({row["seed"] for row in rows}) == 2 and rows[0]["sampling"]["top_p"] == 0.9


def test_the_kl_of_an_answer_is_its_definition(tiny_base, tmp_path):
    paths = {name: random_adapter(tiny_base, tmp_path / name, seed=seed, scale=0.3) for seed, name in enumerate("ab")}
    tokenizer = load_tokenizer(tiny_base)
    versions = Versions(tiny_base, text_format(tokenizer), AnswerSettings(), torch.float32, "cpu")
    for name, path in paths.items():
        versions.add(name, path)
    query, answer = [5, 6, 7], (8, 9, 10)
    ids = torch.tensor([[*query, *answer]])
    p, q = (
        PeftModel.from_pretrained(load_base(tiny_base, torch.float32), path).eval()(ids).logits[0].double().softmax(-1)
        for path in paths.values()
    )
    expected = 0.0
    for place in (2, 3, 4):
        for word in range(p.shape[1]):
            expected += (p[place, word] * (p[place, word] / q[place, word]).log()).item()
    assert answer_kl(versions, "a", "b", query, answer) == pytest.approx(expected, rel=1e-3)
