"""--best_of: n answers of the SFT model to held-out prompts, scored by the reward model, judged by another one.

Out, beside the audit: best_of_n.json (the curve), best_of_n.jsonl (a line a prompt: all answers with their scores),
best_of_n.png; and the SFT rows of --write_best. The seed settles every answer, and all files come at the end: a run
that was killed writes the same bytes when it is given again.
"""

import json
import os
import random
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlhf.artefacts.adapters import check_adapter
from rlhf.artefacts.files import TOKEN, write_json
from rlhf.artefacts.fingerprints import adapter_hash
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.template import CHAT, turns_of
from rlhf.models.forward import backbone_of
from rlhf.models.generation import Sampling, generate
from rlhf.models.loading import refuse_small_base
from rlhf.models.lora import add_lora, score_head_of
from rlhf.reward import best_of_report
from rlhf.reward.audit import row_scorer
from rlhf.reward.best_of_n import curve, turning_point
from rlhf.run.launch import rank_and_size, say
from rlhf.run.pictures import attempt
from rlhf.run.progress import shown
from rlhf.run.stopping import explain_out_of_memory, stop_if_agreed

# Answers to one prompt that are sampled at once, at most.
ROWS = 32


def check_inputs(args, model_dir: str, identity: dict) -> None:
    """Refuse adapters that do not fit, before the base is loaded.

    Args:
        identity: base, tokenizer and prompt_format, as `check_adapter` takes them.
    Raises: ValueError or FileNotFoundError in one sentence.
    """
    if args.sft_model_lora_path:
        check_adapter(args.sft_model_lora_path, stage=("sft", "ppo"), flag="--sft_model_lora_path", **identity)
    if args.judge_lora_path:
        check_adapter(args.judge_lora_path, stage="reward", flag="--judge_lora_path", **identity)
        if adapter_hash(args.judge_lora_path) == adapter_hash(args.reward_model_lora_path):
            raise ValueError("--judge_lora_path is the reward model itself, which agrees with all its choices")
    if args.write_best and not Path(args.write_best).absolute().parent.is_dir():
        raise FileNotFoundError(f"--write_best {args.write_best}: that directory does not exist")
    # The prompts are those of pairs, so a query may be nearly as long as a whole pair.
    longest = args.max_length + args.output_max_length
    refuse_small_base(model_dir, identity["tokenizer"], longest, "--max_length, --output_max_length")


def run(args, model: PeftModel, head: nn.Module, prompt_format: PromptFormat, rows: Sequence[dict]) -> dict:
    """Sample, score, judge; write all files; return what the audit reports.

    Args:
        model: the base with the reward adapter as "reward", which is active again afterwards. head: its score head.
        rows: held-out pairs, whose prompts are asked.
    """
    prompts = draw_prompts(rows, args.best_of_prompts, args.seed)
    if not prompts:
        raise ValueError("--best_of: there is no held-out prompt to ask: give --eval_dataset_name, or --eval_size")
    # Before anything is sampled: an adapter that does not fit is refused within seconds.
    judge = _add_others(args, model)

    # 1. All answers, then what both say of them: an adapter is switched once.
    with active(model, "sft" if args.sft_model_lora_path else None) as policy:
        answers = [
            _sample(args, policy, prompt_format, row["query_ids"], number)
            for number, row in enumerate(shown(prompts, "sampling", "prompts"))
        ]
    scores = _scores(args, model, ("reward", head), prompt_format, prompts, answers)
    judged = _scores(args, model, ("judge", judge), prompt_format, prompts, answers) if judge is not None else None
    # As the caller had it.
    model.base_model.set_adapter("reward", inference_mode=True)

    # 2. The curve, and what it means.
    figures = summary(scores, judged)
    texts = [[prompt_format.decode(ids) for ids in own] for own in answers]
    # All processes that share a base come to the same; the first one writes.
    if rank_and_size()[0]:
        return figures
    _write(Path(args.reward_model_lora_path), figures, prompts, texts, scores, judged)
    if args.write_best:
        ended = [[ids[-1] in prompt_format.stop_ids for ids in own] for own in answers]
        _write_best(args.write_best, best_rows(prompts, texts, scores, ended, prompt_format.template == CHAT))
    return figures


def draw_prompts(rows: Sequence[dict], limit: int, seed: int) -> list[dict]:
    """Up to `limit` rows with different prompts, drawn by the seed; -1: all of them."""
    order = list(range(len(rows)))
    # A text as seed, so that the draw is another one than that of --eval_subset.
    random.Random(f"best of {seed}").shuffle(order)
    drawn: dict[str, dict] = {}
    for number in order:
        if len(drawn) == limit:
            break
        row = rows[number]
        # A prompt with several pairs is asked once.
        drawn.setdefault(row["prompt"], row)
    return list(drawn.values())


def _add_others(args, model: PeftModel) -> nn.Module | None:
    """Put the SFT adapter and the judge beside the reward model; the judge's score head, if there is a judge."""
    if args.sft_model_lora_path:
        rest = add_lora(model, args.sft_model_lora_path, "sft", trainable=False)[1]
        if rest:
            raise ValueError(f"{args.sft_model_lora_path} holds more than LoRA weights: merge it into the base")
    head = None
    if args.judge_lora_path:
        rest = add_lora(model, args.judge_lora_path, "judge", trainable=False)[1]
        head = score_head_of(rest, args.judge_lora_path).to(model.device)
    # New layers begin in training mode.
    model.eval()
    return head


@contextmanager
def active(model: PeftModel, name: str | None):
    """The causal LM with one adapter active within, or with none for None."""
    if name is None:
        with model.disable_adapter():
            yield model.get_base_model()
        return
    # Without inference_mode the adapter's weights would ask for gradients again.
    model.base_model.set_adapter(name, inference_mode=True)
    yield model.get_base_model()


def _sample(args, policy, prompt_format: PromptFormat, query: list[int], number: int) -> list[list[int]]:
    """--best_of answers to one query as PPO would sample them; they depend on no other prompt.

    Raises: Interrupted after a signal.
    """
    settings = Sampling(prompt_format.stop_ids, prompt_format.pad_id, args.output_max_length)
    # A source for each prompt: answers depend neither on the order of prompts nor on their number.
    generator = torch.Generator(policy.device).manual_seed(args.seed * 1_000_003 + number)
    answers: list[list[int]] = []
    # In parts, whose size no flag changes: another size would draw other answers.
    while len(answers) < args.best_of:
        ids = torch.tensor([query] * min(ROWS, args.best_of - len(answers)), device=policy.device)
        with explain_out_of_memory("sampling", ids.shape, "--output_max_length or --max_length"):
            rollout = generate(policy, None, ids, torch.ones_like(ids, dtype=torch.bool), settings, generator)
        # A signal has cut these answers.
        stop_if_agreed(policy.device)
        answers += [own[mask].tolist() for own, mask in zip(rollout.response_ids, rollout.mask, strict=True)]
    return answers


def _scores(args, model, judge: tuple, prompt_format: PromptFormat, prompts: list[dict], answers: list) -> Tensor:
    """[P, N] float64: the scores of all answers by the reward adapter of this name with this head.

    Raises: ValueError for scores that are not finite.
    """
    name, head = judge
    rows = []
    for row, own in zip(prompts, answers, strict=True):
        # All prompts in one call, so that the scorer can sort the rows by length.
        rows += [row["query_ids"] + ids for ids in own]

    with active(model, name) as base:
        batch = args.per_device_eval_batch_size
        score_rows = row_scorer(backbone_of(base), head, prompt_format.pad_id, batch, model.device)
        # In float64, as a mean over thousands of answers is compared in its third digit.
        scores = torch.tensor(score_rows(rows), dtype=torch.float64).view(len(prompts), args.best_of)
    if not scores.isfinite().all():
        raise ValueError(f"scores of the {name} adapter are not finite: nothing can be chosen by them")
    return scores


# ---- what it means ----
def sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most` itself."""
    return (*(2**power for power in range(most.bit_length()) if 2**power < most), most)


def summary(scores: Tensor, judged: Tensor | None) -> dict:
    """The curve of best of n with its turning point, JSON-safe.

    Args:
        scores, judged: [P, N] float64 of the answers to each prompt; without a judge None.
    Returns: n, prompts, judged, curve (see `best_of_n.curve`), deviations of single answers to one prompt, turns (the
        last n before the judge's fall; None: no fall).
    """
    # Within a prompt: prompts differ in how good any answer to them can be, and that is not what a choice gains.
    prompts, most = scores.shape
    others = scores if judged is None else judged
    return {
        "n": most,
        "prompts": prompts,
        "judged": judged is not None,
        "curve": curve(scores, others, sizes(most)),
        # Variances are averaged and not deviations, which a prompt with equal answers would pull down twice.
        "score_std": scores.var(1).mean().sqrt().item(),
        "judged_std": others.var(1).mean().sqrt().item(),
        "turns": None if judged is None else turning_point(scores, judged, sizes(most)),
    }


# ---- files ----
def _write(
    folder: Path, figures: dict, prompts: list[dict], texts: list, scores: Tensor, judged: Tensor | None
) -> None:
    """Write best_of_n.jsonl, .png and .json into a reward adapter's directory."""
    lines = []
    for number, row in enumerate(prompts):
        line = {"prompt": row["prompt"], "answers": texts[number], "scores": scores[number].tolist()}
        lines.append(line if judged is None else line | {"judged": judged[number].tolist()})
    write_lines(folder / "best_of_n.jsonl", lines)
    # The JSON comes last: with it the curve counts as made.
    attempt(best_of_report.draw, figures, folder / "best_of_n.png")
    write_json(folder / "best_of_n.json", figures | {"adapter": adapter_hash(folder)})


def best_rows(prompts: list[dict], texts: list, scores: Tensor, ended: list, is_chat: bool) -> list[dict]:
    """SFT rows of the best answer to each prompt, among those that ended by themselves and say something.

    A cut answer would teach to stop in mid-sentence; a prompt without any other is left out.
    """
    rows = []
    # All rows in one form, as a reader would take one of two kinds for malformed.
    dialogues = is_chat and any("turns" in row for row in prompts)
    for number, row in enumerate(prompts):
        whole = [place for place, text in enumerate(texts[number]) if text and ended[number][place]]
        if not whole:
            continue
        answer = texts[number][max(whole, key=lambda place: scores[number][place].item())]
        if not dialogues:
            rows.append({"prompt": row["prompt"], "answer": answer})
            continue
        # Earlier answers of a dialogue are context: weight 0 keeps them from being learnt.
        turns = [{"role": role, "content": said, "weight": 0} for role, said in turns_of(row)]
        rows.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
    return rows


def _write_best(file: str, rows: list[dict]) -> None:
    if not rows:
        raise ValueError("--write_best: no answer ended by itself within --output_max_length: nothing is written")
    write_lines(Path(file), rows)
    say(f"{len(rows)} SFT rows of the best answers in {file}")


def write_lines(file: Path, rows: list[dict]) -> None:
    """Write one JSON object a line; a reader sees the whole file or the one before it."""
    # Beside the file, for a rename is one step within a file system only.
    part = file.with_name(f".{file.name}.{TOKEN}{os.getpid()}")
    try:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        part.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
