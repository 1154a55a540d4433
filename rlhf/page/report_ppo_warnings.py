"""What should make the owner of a PPO run look twice; docs/ppo.md says what to do about it."""

from rlhf.page.report_data import Run, Words, number
from rlhf.page.report_words import CLEAR, argument, ends, first_and_last, rose

# Changes from start to end that are worth a sentence: of length, of entropy, of different word pairs.
SHORTER = 0.7
LONGER = 1.5
LESS_ENTROPY = 0.4
LESS_VARIETY = 0.6

# Shares at the end that are too large: empty answers, answers that were cut, clipped updates.
MANY_EMPTY = 0.05
MANY_CUT = 0.2
LARGE_STEPS = 0.3

# Nats from the SFT model beyond which a score means little, where the flags say nothing else.
FAR = 10.0


def _guard(run: Run) -> Words | None:
    events = run.events()
    if not events:
        return None
    # Eight of them: a rollback at every step would fill the page.
    steps = ", ".join(str(step) for step, _ in events[:8])
    reason = events[-1][1]
    return (
        f"The guard stepped in at step {steps}: {reason}.",
        f"保护机制在第 {steps} 步介入，原因是：{reason}。",
    )


def _length(run: Run) -> Words | None:
    pair = ends(run, "len/mean")
    if pair is None or pair[0] <= 0 or SHORTER < pair[1] / pair[0] < LONGER:
        return None
    # Longer and shorter are both signs, of a reward model that counts words.
    change = abs(pair[1] / pair[0] - 1)
    figures = f"{pair[0]:.1f} → {pair[1]:.1f}"
    english, chinese = ("fell", "缩短") if pair[1] < pair[0] else ("rose", "变长")
    taste = ("short", "短") if pair[1] < pair[0] else ("long", "长")
    # Without a score that rises nobody is rewarded for the length.
    if not rose(run, "score/mean"):
        return (
            f"Length {english} by {change:.0%} ({figures} tokens).",
            f"回答{chinese}了 {change:.0%}（{figures} 个 token）。",
        )
    return (
        f"Length {english} by {change:.0%} while the score rose ({figures} tokens): the reward model may like "
        f"{taste[0]} answers whatever they say. Read the samples.",
        f"得分上升的同时，回答{chinese}了 {change:.0%}（{figures} 个 token）：奖励模型可能只是喜欢{taste[1]}回答。"
        "请读一读样本。",
    )


def _empty(run: Run) -> Words | None:
    pair = ends(run, "empty_frac")
    if pair is None or pair[1] < MANY_EMPTY:
        return None
    return (
        f"{pair[1]:.0%} of the last answers are empty: the reward model likes silence.",
        f"最后的回答有 {pair[1]:.0%} 是空的：奖励模型喜欢沉默。",
    )


def _cut(run: Run) -> Words | None:
    pair = ends(run, "eos_frac")
    if pair is None or 1 - pair[1] < MANY_CUT:
        return None
    return (
        f"{1 - pair[1]:.0%} of the last answers run into the length limit (--output_max_length).",
        f"最后的回答有 {1 - pair[1]:.0%} 顶到了长度上限（--output_max_length）。",
    )


def _variety(run: Run) -> Words | None:
    entropy = ends(run, "entropy")
    pairs = ends(run, "distinct_2")
    if entropy and entropy[0] > 0 and entropy[1] < LESS_ENTROPY * entropy[0]:
        fall = 1 - entropy[1] / entropy[0]
        return (
            f"Entropy fell by {fall:.0%}: the policy is left with a few set phrases.",
            f"熵下降了 {fall:.0%}：策略只剩几句套话。",
        )
    if pairs and pairs[0] > 0 and pairs[1] < LESS_VARIETY * pairs[0]:
        fall = 1 - pairs[1] / pairs[0]
        return (
            f"The share of different word pairs (distinct_2) fell by {fall:.0%}: answers grow alike.",
            f"不同词对的比例（distinct_2）下降了 {fall:.0%}：回答彼此雷同。",
        )
    return None


def _distance(run: Run) -> Words | None:
    pair = ends(run, "kl/mean")
    # Whoever set a larger budget wanted to go that far.
    budget = argument(run, "best_kl_budget", FAR)
    if pair is None or pair[1] <= max(budget, FAR):
        return None
    return (
        f"KL is {pair[1]:.1f} nats an answer: this far from the SFT model a reward model's score means little.",
        f"KL 达到每个回答 {pair[1]:.1f} nat：离 SFT 模型这么远，奖励模型的得分说明不了什么。",
    )


def _judge(run: Run) -> Words | None:
    """What the judge says of the last evaluation beside the SFT model."""
    judged = run.points("eval/judge/mean")
    errors = dict(run.points("eval/judge/error"))
    if len(judged) < 2 or judged[0][0] != 0:
        return None
    start, before = judged[0]
    last, now = judged[-1]
    # Of a difference of two independent means.
    error = (errors.get(start, 0.0) ** 2 + errors.get(last, 0.0) ** 2) ** 0.5
    scored = first_and_last(run, "eval/score/mean")
    figures = f"{before:.2f} → {now:.2f}"
    # The graver finding first: a judge that falls is also one that sees no gain.
    if now < before - CLEAR * error and scored and scored[1] > scored[0]:
        return (
            f"The score rose while the judge fell ({figures}): the reward model is being gamed.",
            f"得分上升，裁判的评分却下降（{figures}）：策略在钻奖励模型的空子。",
        )
    if now <= before + CLEAR * error:
        return (
            f"The judge sees no clear gain over the SFT model ({figures}, standard error {error:.2f}).",
            f"裁判看不出比 SFT 模型有明显的提高（{figures}，标准误 {error:.2f}）。",
        )
    return None


def _no_judge(run: Run) -> Words | None:
    if run.points("eval/judge/mean") or not run.points("score/mean"):
        return None
    return (
        "No judge watched this run: only the samples tell whether answers got better (--judge_lora_path).",
        "没有裁判看着这次训练：回答是否变好，只有样本能说明（--judge_lora_path）。",
    )


def _no_rise(run: Run) -> Words | None:
    pair = ends(run, "score/mean")
    if pair is None or pair[1] > pair[0]:
        return None
    return (
        f"The score did not rise ({pair[0]:.2f} → {pair[1]:.2f}).",
        f"得分没有上升（{pair[0]:.2f} → {pair[1]:.2f}）。",
    )


def _costly(run: Run) -> Words | None:
    pair = ends(run, "rewards/mean")
    if pair is None or not rose(run, "score/mean") or pair[1] >= pair[0]:
        return None
    return (
        "The score minus the KL penalty fell: the distance cost more than the score gained.",
        "得分减去 KL 惩罚反而下降：付出的 KL 惩罚多过得分的增益。",
    )


def _best_is_earlier(run: Run) -> Words | None:
    step = number(run.best.get("step"))
    evaluated = run.points("eval/score/mean")
    # Beside the last evaluation and not the last step, after which nothing was measured.
    if step is None or not evaluated or step >= evaluated[-1][0]:
        return None
    return (
        f"The best evaluation was at step {step:.0f}, not at the end: best/ holds it.",
        f"最好的一次评估在第 {step:.0f} 步，不在最后：保存在 best/ 里。",
    )


def _updates(run: Run) -> Words | None:
    pair = ends(run, "clipfrac")
    skipped = sum(value for _, value in run.points("skipped"))
    if pair and pair[1] > LARGE_STEPS:
        return (
            f"{pair[1]:.0%} of the updates are clipped: lower --learning_rate or --ppo_epochs.",
            f"有 {pair[1]:.0%} 的更新被裁剪：请降低 --learning_rate 或 --ppo_epochs。",
        )
    if skipped:
        return (
            f"{skipped:.0f} updates were skipped because the ratio exploded: lower --learning_rate.",
            f"有 {skipped:.0f} 次更新因 ratio 爆炸而跳过：请降低 --learning_rate。",
        )
    return None


# The gravest first.
PPO_CHECKS = (
    _guard, _judge, _length, _empty, _cut, _variety, _distance, _costly, _no_rise, _best_is_earlier, _updates,
)  # fmt: skip
# After what is said of the reward model.
PPO_REMARKS = (_no_judge,)
