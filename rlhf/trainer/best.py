"""The best evaluation of stages 1 and 2: its adapter is the final one, and where no better one comes, training ends.

`--load_best` and `--early_stopping_patience`. The lowest evaluation loss is the best. What was trained up to there is
kept in memory and in every checkpoint, so that a resumed run chooses as an uninterrupted one.
"""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from rlhf.artefacts.damage import refuse_nonfinite, refused
from rlhf.run.launch import say
from rlhf.run.log import read_metrics
from rlhf.trainer.stage_trainer import GO_BACK, gathered, is_zero3

# In every checkpoint that is made after an evaluation.
BEST_FILE = "best.safetensors"


class OutOfPatience(Exception):
    """Training is to end before its first step: the evaluation that a signal put off was one too many."""


class BestEvaluation(TrainerCallback):
    """The evaluation with the lowest loss so far, with the trained weights that it was made with.

    An evaluation before the first step does not count, because nothing was trained for it; a loss that is not finite
    is never the best.

    Attributes:
        step: of the best evaluation; None before the first one, and without --load_best. loss: its evaluation loss.
        waited: evaluations since. weights: name -> tensor, on the first process alone, which writes all files.
    """

    def __init__(self, flags):
        self.load_best = flags.load_best
        self.patience = flags.early_stopping_patience
        self.step: int | None = None
        self.loss = math.inf
        self.waited = 0
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """True where so many evaluations in a row were no better that training ends."""
        return 0 < self.patience <= self.waited

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if not self.load_best or state.global_step == 0:
            return control
        # Strictly lower: of two equal ones the earlier stays, which was trained less. NaN is lower than nothing.
        if metrics["eval_loss"] < self.loss:
            self.step = state.global_step
            self.loss = float(metrics["eval_loss"])
            self.waited = 0
            self._copy(model, args.should_save)
        else:
            self.waited += 1

        # The last evaluation of a run that trains no further ends nothing.
        if self.exhausted and state.global_step < state.max_steps:
            say(f"no better evaluation since step {self.step}: training ends (--early_stopping_patience)")
            control.should_training_stop = True
        return control

    def _copy(self, model, keeps: bool) -> None:
        with gathered(model):
            if keeps:
                # A copy: on a CPU the next step would change what `cpu` returns.
                self.weights = {name: p.detach().cpu().clone() for name, p in _trained(model).items()}

    # ---- checkpoints ----
    def save(self, folder: Path) -> None:
        """Write what a resumed run has to know into a checkpoint's folder; nothing before the first evaluation."""
        if self.step is None:
            return
        # As text, from which a float comes back to its last bit.
        about = {"step": str(self.step), "loss": repr(self.loss), "waited": str(self.waited)}
        save_file(self.weights, folder / BEST_FILE, about)

    def load(self, folder: str, model) -> None:
        """Go on from what `save` wrote. Raises: ValueError in one sentence where it is damaged."""
        file = Path(folder) / BEST_FILE
        # There is none before the first evaluation, and in checkpoints of older versions.
        if not self.load_best or not file.is_file():
            return
        with refused(str(file), GO_BACK), safe_open(file, "pt") as content:
            # safetensors keeps texts beside its tensors, and nothing in it can run.
            about = content.metadata()
            self.step = int(about["step"])
            self.loss = float(about["loss"])
            self.waited = int(about["waited"])
            names = list(content.keys())
            self.weights = {name: content.get_tensor(name) for name in names}
            refuse_nonfinite(self.weights, str(file))
            # Under ZeRO-3 the model holds pieces, whose shapes are others.
            if not is_zero3() and _shapes(self.weights) != _shapes(_trained(model)):
                raise ValueError("it holds other weights than this adapter")

    # ---- the end of a run ----
    def restore(self, model, last: int) -> None:
        """Give the model the weights of the best evaluation, unless it is the one of the `last` step; say which."""
        if self.step is None:
            return
        # Nothing to put back: the model has these weights.
        if self.step == last:
            say(f"best evaluation: the last one, loss {self.loss:.4f}")
            return
        say(f"best evaluation: step {self.step} of {last}, loss {self.loss:.4f}; its adapter is the final one")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.weights.items():
                # In place, as the optimizer and DDP hold these very tensors.
                parameters[name].copy_(tensor)

    def record(self, output_dir: str) -> dict[str, float]:
        """The evaluation of the final adapter, as metrics.jsonl has it, with its step as "best_step".

        Without --load_best it is the last one, and no step is named. {} where nothing was evaluated.
        """
        records = _evaluations(output_dir)
        if self.step is not None:
            records = [record | {"best_step": self.step} for record in records if record["step"] == self.step]
        return {name: value for name, value in (records or [{}])[-1].items() if name != "step"}

    def before_and_after(self, output_dir: str) -> dict[str, float]:
        """eval_loss_before (the first evaluation), eval_loss_after and best_step (the final adapter's); {} without."""
        kept = self.record(output_dir)
        if not kept:
            return {}
        losses = {"eval_loss_before": _evaluations(output_dir)[0]["eval_loss"], "eval_loss_after": kept["eval_loss"]}
        return losses if self.step is None else losses | {"best_step": self.step}


def _trained(model) -> dict[str, torch.Tensor]:
    # Adapters, and a score head where there is one: all else is the base's and never changes.
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _evaluations(output_dir: str) -> list[dict]:
    """The records of evaluations in metrics.jsonl, which a resumed run has kept."""
    return [record for record in read_metrics(output_dir) if "eval_loss" in record]
