"""Metrics of a PPO step: the numbers of metrics.jsonl, samples as text, one readable line."""

from itertools import pairwise
from resource import RUSAGE_SELF, getrusage

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.cost.flops import FlopCounts, format_mfu, mfu, ppo_flops, this_card
from rlhf.models.generation import Rollout
from rlhf.rl.loop import PPOLoop, global_moments
from rlhf.run.log import Eta, MetricsLog


def sample_records(tokenizer, rollout: Rollout, columns: dict[str, Tensor], stop_ids: tuple[int, ...]) -> list[dict]:
    """One record a row: query and response as text, length, whether it ended, the numbers of `columns` ([B] each)."""
    # 1. Text, without padding and special tokens.
    table = {
        "query": _texts(tokenizer, rollout.query_ids, rollout.query_mask),
        "response": _texts(tokenizer, rollout.response_ids, rollout.mask),
    }

    # 2. Numbers, each column copied from the GPU once.
    columns = {**columns, "length": rollout.lengths(), "ended": rollout.ended(stop_ids)}
    for name, column in columns.items():
        # A reward function need not apply to every answer; JSON has no NaN.
        table[name] = [None if number != number else number for number in column.tolist()]

    # 3. Columns become rows.
    rows = zip(*table.values(), strict=True)
    return [dict(zip(table, row, strict=True)) for row in rows]


def _texts(tokenizer, ids: Tensor, mask: Tensor) -> list[str]:
    """The real tokens of each row as text."""
    real = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(real, skip_special_tokens=True)


def describe(accelerator: Accelerator, rollout: Rollout, samples: list[dict]) -> dict[str, float]:
    """Statistics of a trained batch over all ranks, with the critic's if there is one; `samples`: its rows."""
    # Without a critic there are no values to judge.
    if rollout.returns is None:
        return describe_samples(accelerator, rollout, samples)

    # 1 is a critic that foresees every return, 0 one that says the same of all.
    _, error = global_moments(accelerator, rollout.returns - rollout.values, rollout.mask)
    _, spread = global_moments(accelerator, rollout.returns, rollout.mask)
    explained = (1 - error / spread.clamp(min=1e-12)).item()
    return describe_samples(accelerator, rollout, samples) | {"var_explained": explained}


def describe_samples(accelerator: Accelerator, rollout: Rollout, samples: list[dict]) -> dict[str, float]:
    """Statistics of sampled answers over all ranks (as many rows on each); `samples`: the rows with text."""
    # 1. One gather for all of them: each would be a synchronisation of all ranks.
    names = ("score", "raw_score", "kl", "reward", "length", "ended")
    rows = [[float(row[name]) for name in names] for row in samples]
    empty = [[float(not row["response"].strip())] for row in samples]
    table = torch.cat([torch.tensor(rows), torch.tensor(empty)], 1).to(rollout.mask.device)
    score, raw, kl, reward, length, ended, empty = accelerator.gather(table).T

    # 2. The names of metrics.jsonl. A single score has no standard deviation: torch would give NaN.
    return {
        "score/mean": score.mean().item(),
        "score/std": score.std().item() if len(score) > 1 else 0.0,
        "score/raw_mean": raw.mean().item(),
        # The same number once more, under the name that trackers show it by.
        "env/reward_mean": score.mean().item(),
        "kl/mean": kl.mean().item(),
        "rewards/mean": reward.mean().item(),
        "len/mean": length.mean().item(),
        "len/min": length.min().item(),
        "empty_frac": empty.mean().item(),
        "eos_frac": ended.mean().item(),
        "distinct_2": _distinct_2(accelerator, rollout),
        "entropy": global_moments(accelerator, rollout.entropy, rollout.mask)[0].item(),
    }


def _distinct_2(accelerator: Accelerator, rollout: Rollout) -> float:
    """Share of a batch's token pairs that are new in it, mean over ranks; it falls as answers grow alike."""
    bigrams = []
    for ids, length in zip(rollout.response_ids.tolist(), rollout.lengths().tolist(), strict=True):
        # No pair reaches from one answer into the next.
        bigrams += pairwise(ids[:length])
    # Li et al. 2016, arXiv:1510.03055, who call it distinct-2.
    share = len(set(bigrams)) / max(1, len(bigrams))
    shares = accelerator.gather(torch.tensor([share], device=rollout.mask.device))
    return shares.mean().item()


def timings(accelerator: Accelerator, rollout: Rollout, clock: list[float]) -> dict[str, float]:
    """Seconds between the four ticks of `clock` on this rank, and the tokens and samples of all ranks in a second."""
    # Each rank has as many rows as the others, but not as many tokens.
    tokens = accelerator.reduce(rollout.mask.sum(), "sum").item()
    samples = len(rollout.mask) * accelerator.num_processes
    start, sampled, scored, end = clock
    seconds = end - start

    # In bytes; Linux counts resident memory in KiB.
    peak = getrusage(RUSAGE_SELF).ru_maxrss * 1024
    # On a GPU, its own memory is what runs out.
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()

    return {
        "time/rollout": sampled - start,
        "time/score": scored - sampled,
        "time/update": end - scored,
        "time/step": seconds,
        "tokens/s": tokens / seconds,
        "samples/s": samples / seconds,
        "mem/peak_gb": peak / 1e9,
    }


def utilisation(
    accelerator: Accelerator, rollout: Rollout, work: FlopCounts, seconds: float, **passes
) -> dict[str, float]:
    """{"mfu": share of all cards' peak that a step's real tokens account for}, or {} where the peak is not known.

    Args:
        work: of the policy. seconds: of the step. passes: as `ppo_flops` takes them.
    """
    queries = rollout.query_mask.sum(1).tolist()
    responses = rollout.lengths().tolist()
    flops = ppo_flops(work, queries, responses, **passes)

    # Summed in teraFLOPs, as float32: a share needs no more digits.
    teraflops = torch.tensor(flops / 1e12, device=rollout.mask.device)
    total = accelerator.reduce(teraflops, "sum").item()
    share = mfu(total * 1e12, seconds, this_card(), accelerator.num_processes)
    return {} if share is None else {"mfu": share}


def step_line(metrics: dict, total: int, eta: str = "") -> str:
    """A step in one line of at most 120 columns; metrics.jsonl has the rest."""
    # The tokens a second of a card that is known say less than the share of its peak.
    speed = format_mfu(metrics["mfu"]) if "mfu" in metrics else f"{metrics['tokens/s']:.0f} tok/s"
    seconds = metrics["time/step"]
    kl = metrics["kl/mean"]
    return (
        f"step {metrics['step']}/{total} | score {metrics['score/mean']:+.2f} "
        f"| kl {kl:.{0 if abs(kl) >= 100 else 2}f} | len {metrics['len/mean']:.0f} "
        f"| empty {metrics['empty_frac']:.0%} | entropy {metrics['entropy']:.2f} "
        f"| {seconds:.{0 if seconds >= 100 else 1}f} s, {speed}{eta}"
    )


def batch_sizes(loop: PPOLoop) -> str:
    """The sizes of batch, mini-batch and optimizer step, in one sentence."""
    args = loop.args
    groups = f" ({args.group_size} to a prompt)" if args.group_size > 1 else ""
    responses = args.batch_size * loop.processes
    # An optimizer step sees one window of each process.
    window = args.mini_batch_size * args.gradient_accumulation_steps * loop.processes
    bound = f"{args.mini_batch_size} rows"
    if args.tokens_per_backward:
        bound = f"at most {args.tokens_per_backward:,} tokens"
    return (
        f"{loop.total_steps} steps of {responses} responses{groups}; {bound} a backward pass, "
        f"an optimizer step each {window}"
    )


def log_step(log: MetricsLog, metrics: dict, samples: list[dict], total: int, eta: Eta, sample_freq: int) -> None:
    """Write a step to metrics.jsonl and tracker, one line to the screen, and now and then samples with text."""
    step = metrics["step"]
    log.write(metrics)
    print(step_line(metrics, total, eta.left(step)), flush=True)

    # Evaluations are rare, so their answers are kept at any step.
    if step not in (1, total) and step % sample_freq:
        samples = [row for row in samples if "evaluation" in row]
    log.write_samples([{"step": step, **row} for row in samples])
