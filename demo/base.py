"""The tiny base model: its SentencePiece tokenizer, the text it reads, and a pretraining loop small enough to read.

What build_base makes for SHIPPED_SEED ships in demo/shipped_base, with the log of its making.
"""

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from demo.world import Prompt, answer
from rlhf.baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
from rlhf.data.control_tokens import encode
from rlhf.data.template import DEFAULT_TEMPLATE, render
from rlhf.run.log import Eta

# Beside the code that makes it, so that a clone is all that the demo needs.
SHIPPED = Path(__file__).parent / "shipped_base"
SHIPPED_SEED = 0
# Pages that a base reads in six minutes of one core.
PAGES = 40000
# Pieces that stand alone, as digits and punctuation do in Baichuan's own tokenizer. They also escape its nmt_nfkc
# normaliser, which would turn full-width punctuation into half-width.
SYMBOLS = ["\n", *"0123456789", *"，。！？：～“”", *"对错"]
VOCAB_SIZE = 1400
# How the base's text speaks: the web holds every voice, and SFT has to choose one.
VOICE_SHARES = {"lively": 0.4, "plain": 0.25, "formal": 0.15, "mixed": 0.2}
SHAPE = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 4}
# Small batches: within two minutes the number of updates counts for more than the precision of each.
BATCH_ROWS = 16
PEAK_LEARNING_RATE = 3e-3
# Wide enough for a hidden size of 160 to tell tokens apart from the start; with the usual 0.02 it learns half as fast.
INITIALIZER_RANGE = 0.06
# Questions are worth knowing, answers more so.
QUERY_WEIGHT = 0.2
# After an answer the text goes on with what a reader thought of it. So the base comes to know right from wrong, as a
# real one does from the web, and the reward model has something to build on. Wrong answers are read, never imitated.
VERDICTS = {True: "对", False: "错"}
VERDICT_WEIGHT = 4.0
WRONG_SHARE = 0.35
# Share of the wrong answers that are right ones to another question: an answer beside the point is wrong, too.
ELSEWHERE_SHARE = 0.25


@dataclass(frozen=True)
class Page:
    """One piece of the base's text: a question in the template, an answer, and whether it is right."""

    query: str
    answer: str
    correct: bool


def write_corpus(prompts: list[Prompt], count: int, rng: random.Random) -> list[Page]:
    """`count` pages about the training prompts, answered in every voice, WRONG_SHARE of them wrongly."""
    corpus = []
    while len(corpus) < count:
        # Whole passes over the prompts, so that every fact is read equally often.
        for prompt in rng.sample(prompts, len(prompts)):
            corpus.append(_write_page(prompt, prompts, rng))
    return corpus[:count]


def _write_page(prompt: Prompt, prompts: list[Prompt], rng: random.Random) -> Page:
    voices, shares = zip(*VOICE_SHARES.items(), strict=True)
    # The seed settles the text only as long as these draws keep their order.
    correct = rng.random() >= WRONG_SHARE
    voice = rng.choices(voices, shares)[0]
    other = rng.choice(prompts).fact

    text = render(DEFAULT_TEMPLATE, prompt.text)
    # A right answer to another question. With the same key it would be right here as well.
    if not correct and rng.random() < ELSEWHERE_SHARE and other.key != prompt.fact.key:
        return Page(text, answer(other, voice, rng), correct)
    return Page(text, answer(prompt.fact, voice, rng, correct), correct)


def train_tokenizer(corpus: list[Page], directory: Path) -> BaichuanTokenizer:
    """Train a SentencePiece BPE with Baichuan's flags (byte fallback, dummy prefix, nmt_nfkc) and save it."""
    directory.mkdir(parents=True, exist_ok=True)

    # One thread, so that the pieces cannot depend on the cores of a machine.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(page.query + page.answer for page in corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        character_coverage=1.0,
        max_sentencepiece_length=4,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=SYMBOLS,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    # The model file holds everything; the list of pieces is for people.
    (directory / "tokenizer.vocab").unlink()

    tokenizer = BaichuanTokenizer(vocab_file=str(directory / "tokenizer.model"), model_max_length=512)
    tokenizer.save_pretrained(directory)
    return tokenizer


def encode_page(tokenizer: BaichuanTokenizer, page: Page) -> tuple[list[int], list[float]]:
    """Ids of query, answer, EOS and verdict, and how much each of them counts in the loss."""
    query = encode(tokenizer, page.query)
    row = encode(tokenizer, page.query + page.answer) + [tokenizer.eos_token_id]
    verdict = tokenizer.convert_tokens_to_ids(VERDICTS[page.correct])

    # Of a wrong page the verdict alone is learned.
    weights = [QUERY_WEIGHT * page.correct] * len(query)
    weights += [1.0 * page.correct] * (len(row) - len(query))
    weights.append(VERDICT_WEIGHT)
    return row + [verdict], weights


def make_batches(rows: list[tuple[list[int], list[float]]], rng: random.Random) -> list[tuple[Tensor, Tensor]]:
    """Batches (input_ids, weights), [BATCH_ROWS, L] each, of rows of like length, in random order.

    Rows are padded on the right, with weight 0.
    """
    # Sorting within big chunks leaves almost no padding and still mixes the kinds of question.
    batches = []
    size = 16 * BATCH_ROWS
    for start in range(0, len(rows), size):
        chunk = sorted(rows[start : start + size], key=lambda row: len(row[0]))
        chunk_batches = [chunk[i : i + BATCH_ROWS] for i in range(0, len(chunk), BATCH_ROWS)]
        batches += rng.sample(chunk_batches, len(chunk_batches))
    return [_padded(batch) for batch in batches]


def _padded(batch: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    ids, weights = zip(*batch, strict=True)
    return pad(ids), pad(weights)


def pad(rows: Sequence[list]) -> Tensor:
    """[rows, longest], zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over the first 3 %, then a cosine to a twentieth of the peak."""
    warmup = max(steps * 0.03, 1.0)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    return PEAK_LEARNING_RATE * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def language_model_loss(model: BaichuanForCausalLM, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over tokens of -log p(token | tokens before it), in nats."""
    # Causal attention and right padding: real tokens never see the padding, so no mask is needed.
    logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pretrain(model: BaichuanForCausalLM, batches: list[tuple[Tensor, Tensor]], last: int | None = None) -> float:
    """One pass of AdamW over the batches, the learning rate on a cosine; stops after `last` steps where it is given.

    Returns: the running mean of the loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    steps = len(batches)
    eta = Eta(steps, 0)
    recent = None

    for step, (input_ids, weights) in enumerate(batches[:last]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)

        loss = language_model_loss(model, input_ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # One batch says little: what is printed is a running mean over about twenty.
        value = loss.item()
        recent = value if recent is None else 0.95 * recent + 0.05 * value
        done = step + 1
        if done % 100 == 0 or done == steps:
            print(f"step {done:4d}/{steps} | loss {recent:.3f} | {eta.left(done)} left", flush=True)
    return recent


def new_base(
    prompts: list[Prompt], pages: int, seed: int, directory: Path
) -> tuple[BaichuanForCausalLM, list[tuple[Tensor, Tensor]]]:
    """A native Baichuan before its pretraining, and the batches of that; its tokenizer is saved in `directory`."""
    rng = random.Random(f"base {seed}")
    corpus = write_corpus(prompts, pages, rng)
    tokenizer = train_tokenizer(corpus, directory)
    encoded = [encode_page(tokenizer, page) for page in corpus]

    # The weights are drawn after the tokenizer is known, because its size is theirs.
    torch.manual_seed(seed)
    pieces = len(tokenizer)
    config = BaichuanConfig(
        vocab_size=pieces,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        **SHAPE,
    )
    model = BaichuanForCausalLM(config)
    tokens = sum(len(ids) for ids, _ in encoded)
    print(f"base: {model.num_parameters():,} parameters, {pieces} pieces, {tokens:,} tokens", flush=True)
    return model, make_batches(encoded, rng)


def build_base(prompts: list[Prompt], pages: int, seed: int, directory: Path) -> None:
    """Write tokenizer, config and pretrained weights of a native Baichuan into `directory`, in half precision.

    The stages load them in float32, from the same 3.5 MB that ship with the project.
    """
    model, batches = new_base(prompts, pages, seed, directory)
    pretrain(model, batches)
    model.half().save_pretrained(directory)


# ---- the one that ships ----
def shipped_for(seed: int) -> bool:
    """Return True for the seed whose base ships: another seed holds out prompts which that base has read."""
    return seed == SHIPPED_SEED


def copy_shipped(directory: Path) -> None:
    """Put the shipped base where build_base would write one."""
    shutil.copytree(SHIPPED, directory, ignore=shutil.ignore_patterns("*.log"))
    print(f"base: the one in {SHIPPED.relative_to(SHIPPED.parents[1])} (--build_base True makes it again)", flush=True)
