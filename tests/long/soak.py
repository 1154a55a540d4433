"""Kill each stage at random times, again and again, and compare the result with that of an undisturbed run.

    python tests/long/soak.py --kills 50 | tee tests/long/soak.log

A quarter of the kills falls anywhere in a run's start, the others anywhere from its first step to its end.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

import conftest  # noqa: E402
from forked import KILL, Stage, Zygote, make_stages, result  # noqa: E402

from rlhf.artefacts.checkpoint import numbered, why_incomplete  # noqa: E402
from rlhf.baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer  # noqa: E402

# Share of the kills that fall before the first step.
IN_START = 0.25


def training_of(stage: Stage) -> str:
    """The function in which a stage's training begins, as a job of tests/support/zygote.py names it."""
    return "rl_training:train" if stage.script == "rl_training" else "rlhf.trainer.training:train"


def make_base(folder: Path) -> str:
    """Write the tests' tiny Baichuan."""
    folder.mkdir()
    conftest.train_sentencepiece(folder)
    # Without pytest there are no fixtures: the same steps as theirs.
    tokenizer = BaichuanTokenizer(vocab_file=str(folder / "tokenizer.model"), model_max_length=256)
    tokenizer.save_pretrained(folder)
    config = BaichuanConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=conftest.INITIALIZER_RANGE,
        **conftest.TINY,
    )
    conftest.save_random_model(BaichuanForCausalLM, config, folder)
    return str(folder)


def seconds_of(zygote: Zygote, stage: Stage, out: Path) -> tuple[float, float]:
    """Seconds that the stage takes to its first step, and from there to its end; leaves the result in `out`."""
    begin = time.monotonic()
    code = zygote.run(stage, out, signum=KILL, target=training_of(stage), when="before")
    assert code == 128 + KILL, zygote.said()
    start = time.monotonic() - begin

    # The whole run, start included.
    begin = time.monotonic()
    assert zygote.run(stage, out) == 0, zygote.said()
    return start, time.monotonic() - begin - start


def half_written(out: Path, prefix: str) -> bool:
    """Return True if a kill fell while a checkpoint was written, moved into its place or removed."""
    scratch = [path for path in out.glob(".*") if path.name != ".lock"]
    return bool(scratch) or any(why_incomplete(folder) for folder in numbered(out, prefix))


def endure(zygote: Zygote, stage: Stage, folder: Path, kills: int, rng: random.Random) -> tuple[str, bool]:
    """Kill a stage `kills` times. Returns: what happened, in words; True if every finished run had the same bytes."""
    start, training = seconds_of(zygote, stage, folder / "whole")
    whole = result(folder / "whole")
    out = folder / "out"
    seen = Counter()

    # A run that outlives its blow begins again from nothing; the last one, without a blow, ends the loop.
    while True:
        early = rng.random() < IN_START
        blow = {"delay": rng.uniform(0, start)}
        if not early:
            blow = {"delay": rng.uniform(0, training), "target": training_of(stage), "when": "later"}
        last = seen["kills"] == kills
        code = zygote.run(stage, out) if last else zygote.run(stage, out, signum=KILL, **blow)

        seen["runs"] += 1
        if code == 128 + KILL:
            seen.update(["kills", "in the start" if early else "after it"])
            seen["while a checkpoint was written"] += half_written(out, stage.prefix)
            continue
        if code != 0:
            raise AssertionError(zygote.said()[-3000:])

        seen["finished"] += 1
        seen["other bytes"] += result(out) != whole
        shutil.rmtree(out)
        if last:
            return in_words(seen, kills), not seen["other bytes"]


def in_words(seen: Counter, kills: int) -> str:
    """Kills, where they fell, and what the finished runs left."""
    places = ("in the start", "after it", "while a checkpoint was written")
    fell = ", ".join(f"{seen[place]} {place}" for place in places)
    end = f"{seen['other bytes']} with OTHER BYTES" if seen["other bytes"] else "always the same bytes"
    return f"{kills} kills ({fell}) in {seen['runs']} runs, {seen['finished']} times finished, {end}"


def main() -> int:
    """Kill, go on, compare; 1 if a stage ever ended with other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills a stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Longer runs than the tests', so that a kill has more places to fall.
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    zygote = Zygote()
    stages = make_stages(make_base(folder / "base"), folder, rows=160, responses=160)

    broken = False
    for name, stage in stages.items():
        begin = time.monotonic()
        runs = folder / f"{name}_runs"
        runs.mkdir()
        words, same = endure(zygote, stage, runs, args.kills, random.Random(f"{args.seed} {name}"))
        broken |= not same
        print(f"{name}: {words}; {time.monotonic() - begin:.0f} s", flush=True)

    # Where an assertion fails, the folder stays to be looked at.
    zygote.close()
    shutil.rmtree(folder)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
