"""A pair in one sequence: the scores, and what training makes of them, are those of two separate rows."""

import pytest
import torch
from safetensors.torch import load_file
from stages import words, write_pairs
from transformers import BloomConfig, BloomModel, FalconConfig, FalconModel, MistralConfig, MistralModel

import reward_modeling
from rlhf.models.forward import TOLERANCE, backbone_of
from rlhf.models.loading import load_base
from rlhf.models.scoring import score
from rlhf.reward.pairs import PairCollator, SharedPromptCollator, block_mask, check_shareable, score_pairs

ROWS = [
    {"query_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 12, 13, 14, 2]},
    {"query_ids": [15, 16], "chosen_ids": [17, 18, 19, 20, 21, 22, 2], "rejected_ids": [2]},
    {"query_ids": [23, 24, 25], "chosen_ids": [26, 2], "rejected_ids": []},
]


@pytest.fixture(params=["tiny_base", "tiny_llama"])
def scorer(request):
    """Backbone and head of a model whose attention is not uniform."""
    model = load_base(request.getfixturevalue(request.param), torch.float32, head="score").eval()
    torch.nn.init.normal_(model.score.weight, generator=torch.manual_seed(0))
    return backbone_of(model), model.score


@torch.no_grad()
def test_scores_equal_those_of_separate_rows(scorer):
    batch = SharedPromptCollator(0)(ROWS)
    batch.pop("attention_mask")
    found = score_pairs(*scorer, batch)
    torch.testing.assert_close(found, score(*scorer, **PairCollator(0)(ROWS)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_neither_the_other_answer_nor_the_padding_beside_it_changes_a_score(scorer):
    alone = score_pairs(*scorer, SharedPromptCollator(0)(ROWS[:1]))
    changed = [ROWS[0] | {"rejected_ids": [30] * 9 + [2]}, *ROWS[1:]]
    beside = score_pairs(*scorer, SharedPromptCollator(7)(changed))
    torch.testing.assert_close(beside[0], alone[0], atol=1e-5, rtol=0)
    assert not torch.isclose(beside[3], alone[1], atol=1e-3)


def test_a_token_sees_the_query_and_its_own_answer_up_to_itself():
    segments = torch.tensor([[1, 1, 2, 2, 3, 3, 0]])
    seen = block_mask(segments, torch.float32)[0, 0] == 0
    expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]
    assert [row.nonzero().flatten().tolist() for row in seen[:6]] == expected
    assert seen[6, 6]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_but_for_rounding(tiny_base, tmp_path, checkpointing):
    data = write_pairs(tmp_path / "pairs.jsonl")
    outputs = []
    for shared in (False, True):
        flags = {
            "model_name": tiny_base, "dataset_name": data, "output_dir": tmp_path / str(shared), "max_steps": 1,
            "share_prompt": shared, "per_device_train_batch_size": 64, "lora_dropout": 0, "save_steps": 0,
            "gradient_checkpointing": checkpointing, "audit": False, "optim": "sgd", "learning_rate": 0.1,
        }  # fmt: skip
        reward_modeling.main(reward_modeling.parse_args(words(flags)))
        outputs.append(load_file(tmp_path / str(shared) / "adapter_model.safetensors"))
    # One batch holds every pair, so its order does not matter.
    for name, tensor in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], tensor, atol=1e-5, rtol=0)
    untrained = reward_modeling.build_model(reward_modeling.parse_args(words(flags)), tiny_base)
    assert not torch.allclose(untrained.get_base_model().score.weight, outputs[0]["base_model.model.score.weight"])


# ---- models it does not suit ----
def small_model(kind, config, **settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(config(**sizes | settings))


def small_mistral(window):
    return small_model(
        MistralModel, MistralConfig, num_key_value_heads=2, intermediate_size=64, sliding_window=window,
        initializer_range=0.3,
    )  # fmt: skip


def test_a_model_without_positions_of_its_own_is_refused_by_name():
    for kind, config in ((BloomModel, BloomConfig), (FalconModel, FalconConfig)):
        model = small_model(kind, config, **({"alibi": True} if kind is FalconModel else {}))
        with pytest.raises(ValueError, match=f"{kind.__name__} does not let tokens have a position"):
            check_shareable(model, ROWS[0], 0)


def test_a_sliding_window_is_refused_where_a_pair_is_longer_and_else_does_no_harm():
    long = {"query_ids": [5, 6], "chosen_ids": list(range(7, 27)) + [2], "rejected_ids": list(range(27, 40)) + [2]}
    with pytest.raises(ValueError, match=r"hidden states of MistralModel differ by [\d.]+% .*sliding window"):
        check_shareable(small_mistral(8), long, 0)
    for window in (64, None):
        check_shareable(small_mistral(window), long, 0)


def test_attention_that_takes_no_mask_and_states_that_are_no_numbers_are_refused():
    model = small_mistral(None).train()
    check_shareable(model, ROWS[0], 0)
    assert model.training
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="differ by nan"):
        check_shareable(model, ROWS[0], 0)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="eager or sdpa attention, not flash_attention_2"):
        check_shareable(model, ROWS[0], 0)


def test_the_check_comes_before_training(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.reward.pairs.MAX_DIFFERENCE", dict.fromkeys(TOLERANCE, -1.0))
    flags = {
        "model_name": tiny_base, "dataset_name": write_pairs(tmp_path / "pairs.jsonl"), "output_dir": tmp_path / "out",
        "share_prompt": True, "max_steps": 1,
    }  # fmt: skip
    monkeypatch.setattr(reward_modeling.training, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match="--share_prompt True: the hidden states"):
        reward_modeling.main(reward_modeling.parse_args(words(flags)))
