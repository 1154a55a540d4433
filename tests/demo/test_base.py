"""The base that ships with the demo: it is what its recipe makes, and it knows the mini-world."""

from types import SimpleNamespace

import pytest
import torch

from demo.base import PAGES, SHAPE, SHIPPED, SHIPPED_SEED, VOCAB_SIZE, new_base, pretrain, shipped_for
from demo.build import main, parse_args
from demo.gold import content_correct
from demo.show import sample_answers
from demo.world import split_prompts
from rlhf.data.encoding import load_tokenizer
from rlhf.models.loading import load_base

TRAIN, HELD = split_prompts(SHIPPED_SEED)
# The running mean of the loss after 40 steps, as in demo/shipped_base/recipe.log.
LOSS = 4.924


def test_the_shipped_base_has_the_recipe_s_shape_and_ships_for_its_seed_alone():
    model = load_base(str(SHIPPED), torch.float32)
    assert all(getattr(model.config, name) == size for name, size in SHAPE.items())
    assert model.config.vocab_size == VOCAB_SIZE
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    # Half precision is what keeps a clone small.
    assert (SHIPPED / "model.safetensors").stat().st_size < 4_000_000
    assert [shipped_for(seed) for seed in (SHIPPED_SEED, SHIPPED_SEED + 1)] == [True, False]


def test_the_shipped_base_answers_prompts_that_it_never_read():
    prompts = [prompt.text for prompt in HELD[:100]]
    settings = SimpleNamespace(max_new_tokens=48, temperature=0.7, seed=0)
    model = load_base(str(SHIPPED), torch.float32).eval()
    answers, _ = sample_answers(model, load_tokenizer(str(SHIPPED)), prompts, settings)
    right = [content_correct(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # What the reward model and PPO build on; 0.99 on all 400 when it was made.
    assert sum(right) / len(right) >= 0.95


@pytest.mark.slow
def test_the_recipe_begins_as_it_did_when_the_shipped_base_was_made(tmp_path):
    model, batches = new_base(TRAIN, PAGES, SHIPPED_SEED, tmp_path)
    assert len(batches) == PAGES // 16
    made = load_tokenizer(str(tmp_path))
    shipped = load_tokenizer(str(SHIPPED))
    assert made.get_vocab() == shipped.get_vocab()
    # Other processors round otherwise; another recipe is further off.
    assert pretrain(model, batches, last=40) == pytest.approx(LOSS, rel=0.03)


def test_a_run_gets_the_shipped_base_byte_for_byte_unless_another_seed_wants_its_own(tmp_path):
    small = ["--sft_rows", "8", "--pairs", "8", "--eval_pairs", "8", "--seed", "7", "--shipped_base", "True"]
    main(parse_args([*small, "--output_dir", str(tmp_path)]))
    for file in SHIPPED.iterdir():
        if file.suffix != ".log":
            assert (tmp_path / "base" / file.name).read_bytes() == file.read_bytes()
