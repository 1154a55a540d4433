"""The command lines of the demo and of its two other stories, stage by stage, as demo/run.py prints and runs them."""

import shlex
from dataclasses import dataclass

# All layers get an adapter of rank 16: the models are tiny, and what they learn is not.
ADAPTER = "--lora_target_models W_pack|o_proj|gate_proj|up_proj|down_proj --lora_rank 16"
SFT = (
    f"{ADAPTER} --max_length 128 --logging_steps 50 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 "
    "--learning_rate 2e-3 --eval_steps 0 --save_steps 0"
)
REWARD = (
    f"{ADAPTER} --lora_dropout 0 --max_length 128 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 "
    "--learning_rate 2e-3 --eval_steps 0 --save_steps 0 --logging_steps 50"
)
PPO = (
    "--reward_transform standardize --batch_size 64 --mini_batch_size 32 --gradient_accumulation_steps 2 "
    "--ppo_epochs 4 --learning_rate 8e-4 --output_max_length 48"
)
# PPO's steps in the demo, and between two of its checkpoints.
DEMO_STEPS = 24
DEMO_SAVE = 4


@dataclass(frozen=True)
class Command:
    """One command line.

    name: of its times. argv: what follows `python`. log: file for what it prints, if it
    must not mix with another's. fine: exit codes that are no failure.
    """

    name: str
    argv: tuple[str, ...]
    log: str | None = None
    fine: tuple[int, ...] = (0,)

    @property
    def module(self) -> str:
        return self.argv[1] if self.argv[0] == "-m" else self.argv[0].removesuffix(".py")


@dataclass(frozen=True)
class Stage:
    """A heading with its usual seconds, and turns of commands; those of one turn run side by side."""

    title: str
    seconds: int
    turns: tuple[tuple[Command, ...], ...]


def command(name: str, words: str, *more: str, **settings) -> Command:
    """A command from words as a shell would split them, and more that are one word each."""
    return Command(name, (*shlex.split(words), *more), **settings)


def alone(title: str, seconds: int, *commands: Command) -> Stage:
    """A stage of commands one after the other."""
    return Stage(title, seconds, tuple((one,) for one in commands))


# ---- the demo ----
def demo(args) -> list[Stage]:
    """Base, SFT, reward model and judge, merge, PPO with the gold judge beside it, comparison, report."""
    out = shlex.quote(args.output_dir)
    common = f"--seed {args.seed} --overwrite_output_dir True"
    base = f"--model_name {out}/base"
    show = f"-m demo.show --output_dir {out} --seed {args.seed} --version"
    # A smoke run: two steps of everything.
    world = sft = evaluate = ""
    # Past the accuracy that is promised; all the pairs would take twice the time.
    reward = "--max_steps 280"
    gate = "refuse"
    steps = DEMO_STEPS
    save = DEMO_SAVE
    ppo = f"--steps {64 * steps} --save_freq {save} --eval_freq {steps // 2}"
    if args.smoke:
        world = "--shipped_base True --sft_rows 64 --pairs 64 --eval_pairs 16"
        sft = "--max_steps 2"
        reward = "--max_steps 2 --audit_prompts 10"
        gate = "warn"
        steps = 2
        save = 1
        ppo = "--steps 128 --save_freq 1 --eval_freq 1 --eval_size 16 --eval_prompts 16 --on_collapse off"
        evaluate = "--prompts 16 --max_new_tokens 16"

    stages = [
        alone(
            "the mini-world and its base model",
            5,
            command(
                "base", f"-m demo.build --output_dir {out} --seed {args.seed} --build_base {args.build_base} {world}"
            ),
            command("show_base", f"{show} base"),
        ),
        alone(
            "SFT",
            30,
            command(
                "sft",
                f"sft_training.py {base} {SFT} --dataset_name {out}/data/sft.jsonl --eval_dataset_name "
                f"{out}/data/sft_eval.jsonl --num_train_epochs 2 {common} --output_dir {out}/sft {sft}",
            ),
            command("show_sft", f"{show} sft"),
        ),
    ]

    # Two reward models on disjoint halves of the prompts: the one that PPO maximises, and the judge, which PPO never
    # sees. Neither waits for the other: a thread for each.
    halves = []
    for half, name in enumerate(("reward", "judge")):
        words = (
            f"reward_modeling.py {base} {REWARD} --dataset_name {out}/data/preferences.jsonl --eval_dataset_name "
            f"{out}/data/preferences_eval.jsonl --split_half {half} --degenerate_frac 0.25 {common} --output_dir "
            f"{out}/{name} {reward}"
        )
        log = f"{args.output_dir}/judge.log" if name == "judge" else None
        halves.append(command(name, words, log=log))
    stages.append(Stage("reward model, and beside it the judge", 55, (tuple(halves),)))

    stages.append(
        alone(
            "merge",
            1,
            command(
                "merge",
                f"merge_lora.py --base_model_name {out}/base --lora_path {out}/sft --dtype float32 "
                f"--output_dir {out}/merged",
            ),
        )
    )
    words = (
        f"rl_training.py --base_model_name {out}/base --merged_sft_model_path {out}/merged --sft_model_lora_path "
        f"{out}/sft --reward_model_lora_path {out}/reward --judge_lora_path {out}/judge --dataset_name "
        f"{out}/data/prompts.jsonl --eval_size 100 --eval_prompts 100 --reward_gate {gate} {PPO} --init_kl_coef 0.1 "
        f"--sample_freq 1000 {common} --output_dir {out}/ppo {ppo}"
    )
    looks_on = f"-m demo.evaluate --output_dir {out} --seed {args.seed} --follow True {evaluate}"
    stages.append(
        Stage(
            "PPO, and beside it the gold judge",
            60,
            ((command("ppo", words), command("evaluate", looks_on)),),
        )
    )

    versions = [f"sft={out}/sft"]
    versions += [f"rlhf{step}={out}/ppo/step_{step}" for step in sorted({save, steps // 2}) if step < steps]
    stages.append(
        alone(
            "comparison",
            4,
            command(
                "compare",
                f"compare.py --base_model_name {out}/base --adapters {' '.join(versions)} rlhf={out}/ppo --prompts "
                f"{out}/data/compare.txt --reward_model_lora_path {out}/reward --max_new_tokens 64 --temperature 0.7 "
                f"--seed {args.seed} --output_dir {out}/compare",
            ),
        )
    )
    stages.append(
        alone("report", 1, command("report", f"-m demo.report --output_dir {out} --language {args.language}"))
    )
    return stages


def page_command(output_dir: str) -> list[str]:
    """What follows `python` to vote between the demo's SFT and PPO, on prompts that no stage has trained on."""
    out = shlex.quote(output_dir)
    words = (
        f"playground.py --base_model_name {out}/base --adapters sft={out}/sft rlhf={out}/ppo --include_base False "
        f"--reward_model_lora_path {out}/reward --prompts {out}/data/heldout.jsonl --max_new_tokens 64 "
        f"--temperature 0.7 --output_dir {out}/page"
    )
    return shlex.split(words)


# ---- the other stories ----
def collapse(args) -> list[Stage]:
    """The tutorial's collapse in small: a careless reward model, PPO without guards, PPO with them."""
    out = shlex.quote(args.output_dir)
    start = shlex.quote(args.demo_dir)
    common = f"--seed {args.seed} --overwrite_output_dir True"
    pairs = "--pairs 400 --eval_pairs 200"
    reward = "--max_steps 60"
    steps = "--steps 3200 --save_freq 10 --eval_freq 5 --eval_size 200 --eval_prompts 200"
    story = ""
    if args.smoke:
        pairs = "--pairs 32 --eval_pairs 8"
        reward = "--max_steps 2 --audit_prompts 10"
        steps = "--steps 128 --save_freq 1 --eval_freq 1 --eval_size 16 --eval_prompts 16"
        story = "--prompts 16 --max_new_tokens 16"

    # Both runs maximise the careless reward model without a KL penalty; the demo's own reward model is the judge of
    # both. Only the second run acts on its scores: it rolls back to the weights that the judge liked last, and starts
    # a KL penalty.
    ppo = (
        f"rl_training.py --base_model_name {start}/base --sft_model_lora_path {start}/sft --reward_model_lora_path "
        f"{out}/reward --judge_lora_path {start}/reward --dataset_name {start}/data/prompts.jsonl {PPO} {steps} "
        f"--init_kl_coef 0 {common}"
    )
    unguarded = command("unguarded", f"{ppo} --on_collapse off --output_dir {out}/unguarded")
    # Exit code 3 means that the guard ended the run, which is a result here and no error.
    guarded = command(
        "guarded",
        f"{ppo} --on_collapse rollback --output_dir {out}/guarded",
        log=f"{args.output_dir}/guarded.log",
        fine=(0, 3),
    )
    drawn = f"-m demo.pairs --kind careless --demo_dir {start} --output_dir {out} --seed {args.seed} {pairs}"
    trained = (
        f"reward_modeling.py --model_name {start}/base {REWARD} --dataset_name {out}/pairs.jsonl --eval_dataset_name "
        f"{out}/pairs_eval.jsonl {common} --output_dir {out}/reward {reward}"
    )
    told = f"-m demo.story --demo_dir {start} --output_dir {out} --seed {args.seed} {story}"
    return [
        alone("pairs of a careless project", 5, command("pairs", drawn)),
        alone("a careless reward model", 12, command("reward", trained)),
        Stage("PPO without guards, and beside it PPO with them", 140, ((unguarded, guarded),)),
        alone(
            "what became of both",
            25,
            command(
                "story",
                told,
                "--title",
                "A careless reward model: PPO without guards and with them",
                "--runs",
                f"without guards={args.output_dir}/unguarded",
                f"with guards={args.output_dir}/guarded",
            ),
        ),
    ]


def long(args) -> list[Stage]:
    """Over-optimisation in small: 160 steps, once without a KL penalty and once with one."""
    out = shlex.quote(args.output_dir)
    start = shlex.quote(args.demo_dir)
    steps = "--steps 10240 --save_freq 10 --eval_freq 10 --eval_size 200 --eval_prompts 200"
    story = ""
    if args.smoke:
        steps = "--steps 128 --save_freq 1 --eval_freq 1 --eval_size 16 --eval_prompts 16"
        story = "--prompts 16 --max_new_tokens 16"

    # The judge scores the evaluations of both runs, and with --on_collapse off nothing follows from its scores.
    ppo = (
        f"rl_training.py --base_model_name {start}/base --sft_model_lora_path {start}/sft --reward_model_lora_path "
        f"{start}/reward --judge_lora_path {start}/judge --dataset_name {start}/data/prompts.jsonl {PPO} {steps} "
        f"--on_collapse off --seed {args.seed} --overwrite_output_dir True"
    )
    free = command("free", f"{ppo} --init_kl_coef 0 --output_dir {out}/free")
    priced = command(
        "priced", f"{ppo} --init_kl_coef 0.1 --output_dir {out}/priced", log=f"{args.output_dir}/priced.log"
    )
    told = f"-m demo.story --demo_dir {start} --output_dir {out} --seed {args.seed} {story}"
    return [
        Stage("PPO without a KL penalty, and beside it with one", 420, ((free, priced),)),
        alone(
            "what became of both",
            60,
            command(
                "story",
                told,
                "--title",
                "160 steps against a good reward model, without a KL penalty and with one",
                "--runs",
                f"no KL penalty={args.output_dir}/free",
                f"0.1 a nat={args.output_dir}/priced",
            ),
        ),
    ]


STORIES = {"demo": demo, "collapse": collapse, "long": long}
