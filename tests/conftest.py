"""Tiny models every test can afford: a native Baichuan and a stock Llama, built once a session from made-up text."""

import atexit
import gc
import json
import os
import shutil
import tempfile
from itertools import product
from pathlib import Path

# Nothing here may reach the network; set before the libraries read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Encoded rows are kept for later starts: those of tests not among the user's.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rlhf-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import sentencepiece
import torch
from chat_tokenizers import REAL, REAL_FAMILY, make
from forked import stages, whole, zygote  # noqa: F401 (fixtures for all)
from short_runs import short_inputs  # noqa: F401 (a fixture for all)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from rlhf.data.encoding import load_tokenizer

# Matrices this small only lose time to threads.
torch.set_num_threads(1)

# Files that take a worker longest go first: begun last, one of them would leave every other worker idle.
LONGEST_FIRST = (
    "test_shards_stages.py", "test_demo_smoke.py", "test_circle.py", "test_scripts.py", "test_shards.py",
    "test_launchers.py", "test_faults.py", "test_damage.py",
)  # fmt: skip


def pytest_collection_finish(session):
    """Leave all that was imported out of every later garbage collection: stages collect often, and it took a third."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Order the tests by LONGEST_FIRST; inside a file, and among the other files, their order stays."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Larger than the usual 0.02, so that logits of an untrained model differ enough for a comparison to mean something.
INITIALIZER_RANGE = 0.1


def tiny_text() -> list[str]:
    """About 700 lines of Chinese and English with digits and punctuation, the same on every machine."""
    who = ["我", "你", "小猫", "老师", "医生", "妈妈", "朋友", "The cat"]
    verb = ["喜欢", "想要", "不喜欢", "今天看见了", "likes ", "wants "]
    what = ["苹果", "红茶", "一本书", "晴天", "音乐", "跑步", "a blue door", "42个橘子"]
    lines = [f"{a}{b}{c}。" for a, b, c in product(who, verb, what)]
    lines += [f"问：{a}{b}什么？\n\n答：{a}{b}{c}！" for (a, c), b in product(zip(who, what, strict=True), verb)]
    lines += [f"{a} + {b} = {a + b}，对吗？" for a, b in product(range(16), range(16))]
    return lines


def train_sentencepiece(directory: Path) -> None:
    """Write tokenizer.model with the flags of Baichuan's own (byte fallback, dummy prefix, nmt_nfkc)."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_text()),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", *"0123456789", *"，。！？：", "<h1>", "<reserved_7>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()


def train_byte_level_bpe() -> PreTrainedTokenizerFast:
    """A tokenizer of another family: byte-level BPE without BOS, its pad different from its EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(tiny_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def save_random_model(model_class, config, directory: Path) -> None:
    """Save `model_class(config)` with reproducible weights, leaving the caller's random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A saved native Baichuan: float32, 2 layers, about 600 pieces; pad is <unk> (0), EOS is </s> (2)."""
    directory = tmp_path_factory.mktemp("tiny_base")
    train_sentencepiece(directory)
    tokenizer = BaichuanTokenizer(vocab_file=str(directory / "tokenizer.model"), model_max_length=256)
    tokenizer.save_pretrained(directory)
    config = BaichuanConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=INITIALIZER_RANGE, **TINY
    )
    save_random_model(BaichuanForCausalLM, config, directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """A saved stock Llama with a tokenizer of its own; pad is <pad> (0), EOS is </s> (2)."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = train_byte_level_bpe()
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **TINY,
    )
    save_random_model(LlamaForCausalLM, config, directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory) -> str:
    """A saved stock Llama that is a chat model: BOS, turns that end with another token than EOS, two stop tokens."""
    directory = tmp_path_factory.mktemp("tiny_chat")
    tokenizer = make("llama3", directory)
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **TINY,
    )  # fmt: skip
    save_random_model(LlamaForCausalLM, config, directory)
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    GenerationConfig(eos_token_id=stops).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real sample files beside the project; skips where a checkout has none."""
    directory = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not directory.is_dir():
        pytest.skip("the sample files of ../shared/data are not in this checkout")
    return directory


@pytest.fixture(scope="session")
def sample_lines(shared_data) -> list[str]:
    """Every line of every text in both sample files, line ends included."""

    def texts(value):
        if isinstance(value, str):
            yield value
        else:
            for item in value.values() if isinstance(value, dict) else value:
                yield from texts(item)

    files = [shared_data / name for name in ("alpaca_zh_demo.json", "dpo_zh_demo.json")]
    found = [text for file in files for text in texts(json.loads(file.read_text(encoding="utf-8")))]
    return [line for text in found for line in text.splitlines(keepends=True)]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """The tokenizer of a family, saved and read back as a user's would be."""
    made = {"real": AutoTokenizer.from_pretrained(REAL)} if REAL_FAMILY else {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            make(family, folder / "parts").save_pretrained(folder)
            made[family] = load_tokenizer(str(folder))
        return made[family]

    return get
