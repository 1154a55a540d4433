"""Sample answers of the SFT stage: the same prompts before and after training, printed and kept in samples.jsonl."""

from rlhf.data.prompt_format import PromptFormat
from rlhf.data.template import turns_of
from rlhf.models.generation import greedy_answers
from rlhf.models.shards import mesh_of, trained_from_first
from rlhf.run.launch import say
from rlhf.run.log import MetricsLog, show_answer
from rlhf.trainer.stage_trainer import is_zero3


def show(args, trainer, prompt_format: PromptFormat, rows: list[dict], log: MetricsLog | None) -> None:
    """Print a few answers and keep them in samples.jsonl; " ..." ends one that did not stop by itself."""
    # Of a base in shards every process runs the layers; the first alone writes.
    in_shards = mesh_of(trainer.model) is not None
    if (log is None and not in_shards) or not rows or not args.sample_max_new_tokens:
        return
    if is_zero3():
        say("no sample answers: under ZeRO-3 one process alone cannot write them")
        return

    if in_shards:
        # The first process alone has put the best evaluation's weights back.
        trained_from_first(trainer.model)
    step = trainer.state.global_step
    queries = [prompt_format.query_ids(turns_of(row)) for row in rows]
    # Left so: the Trainer's next step puts the model back into train mode.
    trainer.model.eval()
    # The language model with the adapter inside its layers, which is what `generate` asks for.
    base = trainer.model.get_base_model()
    answers = greedy_answers(base, prompt_format, queries, args.sample_max_new_tokens)
    if log is None:
        return
    records = []
    for prompt, answer in zip([row["prompt"] for row in rows], answers, strict=True):
        show_answer(prompt, answer, f"step {step}")
        records.append({"step": step, "query": prompt, "response": answer})
    log.write_samples(records, shown=0)
