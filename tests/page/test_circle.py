"""The whole circle: votes in a browser, export, reward model, PPO, and the new policy wins the next votes."""

import json
import random
import shlex

import pytest
from pages import chromium, needs_browser, served, visitor, write_rows

import playground
from demo import build
from demo.commands import PPO, REWARD, SFT
from demo.gold import gold_score
from demo.world import answer, split_prompts
from rlhf.page.store import Store

__all__ = ["chromium"]
VOTES = 60
NEW_VOTES = 40


def with_the_gold_judges_taste(person, count: int) -> None:
    """Vote in the browser on so many pairs, for the answer that the demo's gold judge likes better."""
    page = person.page
    for _ in range(count):
        page.wait_for_selector("#ballot:not([hidden])", timeout=60_000)
        prompt = page.inner_text("#prompt")
        left, right = (gold_score(prompt, text) for text in person.sides())
        key = "3" if left == right else "1" if left > right else "2"
        person.vote(key)


def opened(*words: str):
    """A page as playground.py opens it with these flags."""
    args = playground.parse_args([*words])
    return playground.open_page(args, Store(args.output_dir))


@pytest.mark.slow
@needs_browser
def test_votes_train_a_reward_model_and_the_policy_that_follows_it_wins_the_next_votes(chromium, zygote, tmp_path):
    def run(script: str, command: str) -> None:
        code = zygote.run_script(script, shlex.split(command), tmp_path / f"{script}.log")
        assert code == 0, zygote.said()[-3000:]

    # 1. The demo's world, and an SFT model of it, which is right and formal.
    world = f"--output_dir {tmp_path} --shipped_base True --sft_rows 800 --pairs 16 --eval_pairs 16"
    build.main(build.parse_args(shlex.split(world)))
    base = f"--lora_dropout 0 --seed 0 --model_name {tmp_path}/base"
    run("sft_training", f"{base} {SFT} --dataset_name {tmp_path}/data/sft.jsonl --eval_size 0 "
        f"--sample_max_new_tokens 0 --output_dir {tmp_path}/sft")  # fmt: skip

    # 2. Two writers, one formal and one lively; a person with the gold judge's taste chooses between them, blind.
    draw = random.Random(0)
    train, _ = split_prompts(0)
    rows = []
    for prompt in draw.sample(train, VOTES):
        for voice in ("formal", "lively"):
            rows.append({"prompt": prompt.text, "version": voice, "answer": answer(prompt.fact, voice, draw)})
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    site = opened("--answers", answers, "--output_dir", f"{tmp_path}/page")
    with served(site) as address, visitor(chromium, address, name="gold") as person:
        page = person.open()
        with_the_gold_judges_taste(person, VOTES)
        page.goto(f"{address}/#results")
        page.click("#export")
        page.wait_for_selector(".command")
    pairs = [json.loads(line) for line in (tmp_path / "page" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) >= VOTES - 5

    # 3. A reward model of these votes alone, and PPO that follows it.
    run("reward_modeling", f"--model_name {tmp_path}/base {REWARD} --dataset_name {tmp_path}/page/pairs.jsonl "
        f"--seed 0 --eval_size 0 --max_steps 32 --degenerate_frac 0.25 --audit False "
        f"--output_dir {tmp_path}/reward")  # fmt: skip
    run("rl_training", f"--base_model_name {tmp_path}/base --sft_model_lora_path {tmp_path}/sft {PPO} --seed 0 "
        f"--reward_model_lora_path {tmp_path}/reward --dataset_name {tmp_path}/data/prompts.jsonl --steps 384 "
        f"--eval_freq 0 --eval_size 0 --init_kl_coef 0.1 --reward_gate warn --on_collapse off --check False "
        f"--output_dir {tmp_path}/ppo")  # fmt: skip

    # 4. The old policy against the new one, on prompts that neither has seen.
    held = (tmp_path / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:NEW_VOTES]
    (tmp_path / "held.jsonl").write_text("\n".join(held), encoding="utf-8")
    site = opened(
        "--base_model_name", f"{tmp_path}/base", "--adapters", f"sft={tmp_path}/sft", f"ppo={tmp_path}/ppo",
        "--include_base", "False", "--prompts", f"{tmp_path}/held.jsonl", "--max_new_tokens", "48", "--temperature",
        "0.7", "--output_dir", f"{tmp_path}/next",
    )  # fmt: skip
    site.chat.engine.start()
    with served(site) as address, visitor(chromium, address, name="gold") as person:
        page = person.open()
        # Where both policies write the same there is nothing to choose.
        page.wait_for_selector("#ballot:not([hidden])", timeout=60_000)
        with_the_gold_judges_taste(person, NEW_VOTES // 2)
        page.goto(f"{address}/#results")
        page.wait_for_selector("#version-pairs h3")
        assert "ppo is better" in page.inner_text("#version-pairs")
    site.chat.engine.close()
