"""rlhf/ppo.py against definitions written as plain loops, and against NaN on the padding."""

import itertools
import math

import pytest
import torch

from rlhf import ppo

B, T, V = 5, 7, 11


@pytest.fixture
def mask():
    lengths = torch.tensor([7, 1, 4, 2, 6])
    return torch.arange(T) < lengths[:, None]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(x, mask):
    """`x` with NaN on the padding."""
    return torch.where(mask, x, torch.nan)


def real(x, mask):
    """The real entries of row after row, as plain lists."""
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def test_masked_mean_is_the_mean_over_real_entries(mask):
    x = poisoned(rand(B, T), mask)
    entries = [value for row in real(x, mask) for value in row]
    assert ppo.masked_mean(x, mask).item() == pytest.approx(sum(entries) / len(entries), abs=1e-6)


def test_masked_mean_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="selects no element"):
        ppo.masked_mean(torch.ones(2), torch.zeros(2, dtype=torch.bool))


def test_whitened_entries_have_mean_zero_and_unbiased_std_one(mask):
    white = ppo.whiten(poisoned(rand(B, T) * 3 + 5, mask), mask)
    assert white[mask].mean().abs() < 1e-6
    assert white[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()


def test_whitening_without_shift_keeps_the_mean(mask):
    x = rand(B, T) * 3 + 5
    white = ppo.whiten(x, mask, shift_mean=False)
    assert white[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-5)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-5)


def test_whitening_one_element_only_centres_it():
    white = ppo.whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]))
    assert white.tolist() == [[0.0, 0.0]]


def test_whitening_with_moments_of_two_halves_equals_whitening_the_whole(mask):
    x = rand(B, T)
    sums = ppo.masked_moments(x[:2], mask[:2]) + ppo.masked_moments(x[2:], mask[2:])
    halves = [ppo.whiten(x[rows], mask[rows], moments=ppo.moments_of(sums)) for rows in (slice(0, 2), slice(2, None))]
    torch.testing.assert_close(torch.cat(halves), ppo.whiten(x, mask), atol=1e-6, rtol=0)


def test_token_rewards_price_every_token_and_score_the_last_real_one(mask):
    old, ref, scores = rand(B, T), rand(B, T, seed=1), rand(B, seed=2)
    rewards, kl = ppo.token_rewards(scores, poisoned(old, mask), poisoned(ref, mask), mask, 0.3)
    for i, t in itertools.product(range(B), range(T)):
        n = int(mask[i].sum())
        expected = -0.3 * (old[i, t] - ref[i, t]) + (scores[i] if t == n - 1 else 0) if t < n else 0.0
        assert rewards[i, t].item() == pytest.approx(float(expected), abs=1e-6)
    torch.testing.assert_close(kl[mask], (old - ref)[mask])
    assert (kl[~mask] == 0).all()


def test_token_rewards_refuse_a_response_without_tokens():
    zero = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no real token"):
        ppo.token_rewards(torch.ones(1), zero, zero, torch.zeros(1, 2, dtype=torch.bool), 0.1)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_equals_its_two_loop_definition(mask, gamma, lam):
    rewards, values = rand(B, T), rand(B, T, seed=1)
    advantages, returns = ppo.gae(poisoned(rewards, mask), poisoned(values, mask), mask, gamma, lam)
    for i in range(B):
        n = int(mask[i].sum())
        v = [*values[i, :n].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_policy_loss_equals_its_definition(mask):
    old, now, advantages = rand(B, T), rand(B, T, seed=1), rand(B, T, seed=2)
    loss, stats = ppo.policy_loss(*(poisoned(x, mask) for x in (now, old, advantages)), mask, 0.2)
    losses, clipped = [], 0
    for n, o, a in zip(now[mask].tolist(), old[mask].tolist(), advantages[mask].tolist(), strict=True):
        ratio = math.exp(n - o)
        losses.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
        clipped += -a * min(max(ratio, 0.8), 1.2) > -a * ratio
    moved = (now - old)[mask]
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert stats["clipfrac"].item() == pytest.approx(clipped / len(losses))
    assert stats["policykl"].item() == pytest.approx(-moved.mean().item(), abs=1e-6)
    assert stats["approxkl"].item() == pytest.approx(0.5 * moved.square().mean().item(), abs=1e-6)
    assert stats["ratio/mean"].item() == pytest.approx(moved.exp().mean().item(), abs=1e-5)
    assert stats["ratio/max"].item() == pytest.approx(moved.exp().max().item(), abs=1e-5)


def test_policy_gradient_is_the_policy_gradient_where_nothing_moved(mask):
    logprobs = rand(B, T).requires_grad_()
    advantages = rand(B, T, seed=2)
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)[0].backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages, 0) / mask.sum())


def test_value_loss_equals_its_definition(mask):
    old, now, returns = rand(B, T), rand(B, T, seed=1), rand(B, T, seed=2)
    loss, _ = ppo.value_loss(*(poisoned(x, mask) for x in (now, old, returns)), mask, 0.2)
    losses = []
    for n, o, r in zip(now[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True):
        losses.append(max((n - r) ** 2, (min(max(n, o - 0.2), o + 0.2) - r) ** 2))
    assert loss.item() == pytest.approx(0.5 * sum(losses) / len(losses), abs=1e-5)


def test_gradients_stay_finite_with_nan_and_infinity_on_the_padding(mask):
    for trash in (torch.nan, torch.inf, -torch.inf):
        logprobs = torch.where(mask, rand(B, T), trash).requires_grad_()
        values = torch.where(mask, rand(B, T), trash).requires_grad_()
        fixed = torch.where(mask, rand(B, T, seed=1), trash)
        (
            ppo.policy_loss(logprobs, fixed, fixed, mask, 0.2)[0] + ppo.value_loss(values, fixed, fixed, mask, 0.2)[0]
        ).backward()
        assert logprobs.grad.isfinite().all()
        assert (values.grad[~mask] == 0).all()


@pytest.mark.parametrize("loss", [ppo.policy_loss, ppo.value_loss])
def test_a_given_denominator_turns_means_into_sums(mask, loss):
    x = [rand(B, T, seed=s) for s in range(3)]
    mean, sums = loss(*x, mask, 0.2)[0], loss(*x, mask, 0.2, n_tokens=1)[0]
    assert sums.item() == pytest.approx(mean.item() * int(mask.sum()), rel=1e-5)


def test_a_loss_over_nothing_is_an_error():
    zero, nothing = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="no token"):
        ppo.policy_loss(zero, zero, zero, nothing, 0.2)


def test_entropy_of_a_uniform_choice_is_log_n_and_suppressed_tokens_count_nothing(mask):
    logits = torch.zeros(B, T, V)
    assert ppo.masked_entropy(logits, mask).item() == pytest.approx(math.log(V), abs=1e-6)
    logits[..., 3:] = -torch.inf
    assert ppo.masked_entropy(logits, mask).item() == pytest.approx(math.log(3), abs=1e-6)


def test_entropy_has_a_finite_gradient_where_tokens_are_suppressed():
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    suppressed = logits.masked_fill(torch.tensor([False, True, False, False]), -torch.inf)
    ppo.masked_entropy(suppressed, torch.ones(1, 1, dtype=torch.bool)).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_logprobs_equal_a_log_softmax_gathered_in_float32(dtype):
    logits, ids = rand(B, T, V).to(dtype), torch.randint(0, V, (B, T))
    expected = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(ppo.selective_logprobs(logits, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_selective_logprobs_are_those_of_a_gathered_log_softmax(dtype, monkeypatch):
    monkeypatch.setattr(ppo, "ROWS_AT_ONCE", 4)
    ids, weights = torch.randint(V, (2, 5)), torch.randn(2, 5)
    logits = torch.randn(2, 5, V, dtype=dtype)
    logits[0, 0, (ids[0, 0] + 1) % V] = -torch.inf
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    (ppo.selective_logprobs(found, ids) * weights).sum().backward()
    (expected.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0] * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=0)


def test_selective_logprobs_of_allowed_tokens_ignore_suppressed_ones():
    logits = torch.zeros(1, 1, 4)
    logits[..., 3] = -torch.inf
    assert ppo.selective_logprobs(logits, torch.tensor([[0]])).item() == pytest.approx(-math.log(3))


def test_exact_kl_is_never_negative_and_k1_agrees_with_it_in_the_mean():
    policy, reference = rand(1, 1, V).log_softmax(-1), rand(1, 1, V, seed=1).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert exact >= 0
    ids = torch.multinomial(policy[0].exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    old, ref = (ppo.selective_logprobs(x.expand(1, ids.shape[1], V), ids) for x in (policy, reference))
    _, kl = ppo.token_rewards(torch.zeros(1), old, ref, torch.ones_like(ids, dtype=torch.bool), 0.0)
    assert kl.mean().item() == pytest.approx(exact, abs=0.02)


def test_rloo_subtracts_the_mean_of_the_other_answers():
    scores = [1.0, 2.0, 6.0, 0.0, 0.0, 3.0]
    found = ppo.group_advantages(torch.tensor(scores), 3, "rloo").tolist()
    for i, score in enumerate(scores):
        group = scores[i // 3 * 3 : i // 3 * 3 + 3]
        others = [s for j, s in enumerate(group) if j != i % 3]
        assert found[i] == pytest.approx(score - sum(others) / 2)


def test_grpo_standardizes_within_the_group_and_a_group_of_equals_gives_zero():
    found = ppo.group_advantages(torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0]), 3, "grpo").view(2, 3)
    assert found[0].mean().abs() < 1e-6
    assert found[0].std().item() == pytest.approx(1, abs=1e-3)
    assert (found[1] == 0).all()


@pytest.mark.parametrize(("size", "kind"), [(1, "rloo"), (4, "rloo"), (3, "other")])
def test_group_advantages_refuse_what_forms_no_groups(size, kind):
    with pytest.raises(ValueError, match="group_advantages"):
        ppo.group_advantages(torch.ones(6), size, kind)


def test_the_adaptive_price_moves_by_the_clipped_error():
    controller = ppo.AdaptiveKLController(0.5, target=6.0, horizon=10000)
    controller.update(600.0, 64)
    assert controller.value == pytest.approx(0.5 * (1 + 0.2 * 64 / 10000))
    controller.update(6.6, 100)
    assert controller.value == pytest.approx(0.5 * (1 + 0.2 * 64 / 10000) * (1 + 0.1 * 100 / 10000))
    before = controller.value
    controller.update(0.0, 100)
    assert controller.value == pytest.approx(before * (1 - 0.2 * 100 / 10000))


def test_the_fixed_price_stays():
    controller = ppo.FixedKLController(0.5)
    controller.update(600.0, 64)
    assert controller.value == 0.5
