"""Kill each stage at random times, again and again, and see that what comes out in the end is what always comes out.

python tests/soak.py --kills 50 | tee tests/soak.log
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402
from test_faults import KILL, Zygote, make_stages, result  # noqa: E402

from rlhf.baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer  # noqa: E402


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


def main() -> int:
    """Kill, go on, compare; 1 if a stage ever ended with other bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills a stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    zygote, stages, broken = Zygote(), make_stages(make_base(folder / "base"), folder), 0
    for name, stage in stages.items():
        begin = time.monotonic()
        assert zygote.run(stage, folder / f"{name}_whole") == 0, zygote.said()
        seconds = time.monotonic() - begin
        whole, rng = result(folder / f"{name}_whole"), random.Random(f"{args.seed} {name}")
        kills = runs = finished = 0
        out = folder / f"{name}_out"
        while kills < args.kills:
            # Anywhere in a run from its start to a little beyond its usual end.
            code = zygote.run(stage, out, signum=KILL, delay=rng.uniform(0.02, 1.1 * seconds))
            runs, kills = runs + 1, kills + (code == 128 + KILL)
            if code == 0:
                finished += 1
                broken += result(out) != whole
                shutil.rmtree(out)
            elif code != 128 + KILL:
                print(zygote.said()[-3000:])
                return 1
        assert zygote.run(stage, out) == 0, zygote.said()
        broken += result(out) != whole
        print(
            f"{name}: {kills} kills in {runs + 1} runs, {finished + 1} times finished, "
            f"{'always the same bytes' if not broken else 'OTHER BYTES'}",
            flush=True,
        )
    zygote.process.kill()
    shutil.rmtree(folder)
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
