"""Kill each stage at random times, again and again, and see that what comes out in the end is what always comes out.

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

IN_START = 0.25


def training_of(stage: Stage) -> str:
    """Where a stage's training begins, as the planted blow names it."""
    return "rl_training:train" if stage.script == "rl_training" else "rlhf.trainer.training:train"


def make_base(folder: Path) -> str:
    """The tests' tiny Baichuan."""
    folder.mkdir()
    conftest.train_sentencepiece(folder)
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
    """How long the stage takes to its first step, and from there to its end; leaves the result in `out`."""
    begin = time.monotonic()
    code = zygote.run(stage, out, signum=KILL, target=training_of(stage), when="before")
    assert code == 128 + KILL, zygote.said()
    start, begin = time.monotonic() - begin, time.monotonic()
    assert zygote.run(stage, out) == 0, zygote.said()
    return start, time.monotonic() - begin - start


def half_written(out: Path, prefix: str) -> bool:
    """Return True if a kill fell while a checkpoint was written, moved into its place or removed."""
    scratch = [path for path in out.glob(".*") if path.name != ".lock"]
    return bool(scratch) or any(why_incomplete(folder) for folder in numbered(out, prefix))


def endure(zygote: Zygote, stage: Stage, folder: Path, kills: int, rng: random.Random) -> tuple[str, bool]:
    """Kill a stage `kills` times. Returns: what happened, in words; whether all that ended had the same bytes."""
    start, training = seconds_of(zygote, stage, folder / "whole")
    whole, out, seen = result(folder / "whole"), folder / "out", Counter()
    while True:
        early = rng.random() < IN_START
        blow = {"delay": rng.uniform(0, start)}
        if not early:
            blow = {"delay": rng.uniform(0, training), "target": training_of(stage), "when": "later"}
        code = zygote.run(stage, out, signum=KILL, **blow) if seen["kills"] < kills else zygote.run(stage, out)
        seen["runs"] += 1
        if code == 128 + KILL:
            seen.update(["kills", "in the start" if early else "after it"])
            seen["while a checkpoint was written"] += half_written(out, stage.prefix)
        elif code == 0:
            seen["finished"] += 1
            seen["other bytes"] += result(out) != whole
            shutil.rmtree(out)
        else:
            raise AssertionError(zygote.said()[-3000:])
        if code == 0 and seen["kills"] == kills:
            break
    words = ", ".join(
        f"{seen[name]} {name}" for name in ("in the start", "after it", "while a checkpoint was written")
    )
    end = f"{seen['other bytes']} with OTHER BYTES" if seen["other bytes"] else "always the same bytes"
    said = f"{kills} kills ({words}) in {seen['runs']} runs, {seen['finished']} times finished, {end}"
    return said, not seen["other bytes"]


def main() -> int:
    """Kill, go on, compare; 1 if a stage ever ended with other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills a stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, broken = Path(tempfile.mkdtemp(prefix="soak.")), False
    zygote, stages = Zygote(), make_stages(make_base(folder / "base"), folder, rows=160, responses=160)
    for name, stage in stages.items():
        begin, runs = time.monotonic(), folder / f"{name}_runs"
        runs.mkdir()
        words, same = endure(zygote, stage, runs, args.kills, random.Random(f"{args.seed} {name}"))
        broken |= not same
        print(f"{name}: {words}; {time.monotonic() - begin:.0f} s", flush=True)
    zygote.close()
    shutil.rmtree(folder)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
