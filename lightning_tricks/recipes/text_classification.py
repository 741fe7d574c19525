"""Fine-tune an encoder to classify texts."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.mixins import Balanced, ClassWeightedLossMixin, LoRA, LoRAMixin
from lightning_tricks.recipes._encoders import load_encoder, lora_targets, pool
from lightning_tricks.recipes._scores import Scores

__all__ = ["TextClassifier"]

LEARNING_RATES = {"lora": 1e-3, "head": 5e-3, "full": 5e-5}
START, WARMUP = 0.1, 0.1  # the share of the learning rate to start from, and of all steps to rise in
WEIGHT_DECAY = 0.01
DROPOUT = 0.1  # before the head

Batch = dict[str, Tensor]


class TextClassifier(LoRAMixin, ClassWeightedLossMixin, L.LightningModule):
    """An encoder, a pooled vector a text, dropout and a linear head called `classifier`.

    Trains with AdamW on what is trainable. The learning rate rises linearly from a tenth over the first tenth of the
    steps, then falls linearly to 0. Dropout is a function of the epoch, batch, rank and global seed alone, so that a
    resumed run ends where an uninterrupted one does.

    Logs `train/loss` every step, and `val/...` and `test/...` exactly over ranks: `loss` (the same weighted mean that
    is trained), `accuracy`, `macro_f1` and, for each class, `recall_<label>`. `predict_step` gives probabilities.

    Args:
        labels: the classes' names, in the order of their indices.
        class_counts: training samples of each class, in the same order; `balanced` needs them.
        name: a Hugging Face id or local folder; `all-minilm-l6-v2` comes as a package.
        tuning: `lora` trains adapters and head, `head` the head alone, `full` everything.
        rank: of the LoRA adapters, 1 to 64 or so; alpha is twice the rank.
        lr: the highest learning rate, 1e-6 to 1e-1; by default 1e-3 (lora), 5e-3 (head), 5e-5 (full).
        class_weighting: `balanced` weighs classes inversely to their counts, `none` all samples alike.
        pooling: `mean` over the tokens, or `cls` for the first one.

    Raises:
        MisconfigurationError: for labels that are not distinct, or an option out of range.
        MissingDependencyError: without transformers, or without the packaged encoder.

    Example:
        >>> model = TextClassifier(["bad", "good"], class_counts=[10, 30], tuning="head")
        >>> model({"input_ids": torch.tensor([[101, 2204, 102]]), "attention_mask": torch.ones(1, 3)}).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        class_counts: Sequence[int] | None = None,
        name: str = "all-minilm-l6-v2",
        tuning: Literal["lora", "head", "full"] = "lora",
        rank: int = 8,
        lr: float | None = None,
        class_weighting: Literal["balanced", "none"] = "balanced",
        pooling: Literal["mean", "cls"] = "mean",
    ) -> None:
        super().__init__()
        labels = [str(label) for label in labels]
        class_counts = None if class_counts is None else [int(count) for count in class_counts]
        _check_options(labels, class_counts, class_weighting, lr)
        _one_of("tuning", tuning, tuple(LEARNING_RATES))
        _one_of("pooling", pooling, ("mean", "cls"))
        self.save_hyperparameters()  # plain values only: checkpoints load with weights_only=True
        self.labels = labels
        self.lr = LEARNING_RATES[tuning] if lr is None else lr
        self.encoder = load_encoder(name)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, len(labels))  # type: ignore[union-attr, arg-type]
        self._prepare_encoder(tuning, rank)
        # With equal counts all weights are 1, and the mean is exact over ranks all the same.
        counts = class_counts if class_weighting == "balanced" and class_counts else [1] * len(labels)
        self.weigh_classes(counts, Balanced())
        self.val_scores, self.test_scores = Scores(labels), Scores(labels)

    def _prepare_encoder(self, tuning: str, rank: int) -> None:
        if tuning == "lora":
            self.adapt(self.encoder, LoRA(rank=rank, alpha=2 * rank, targets=lora_targets(self.encoder)))
        elif tuning == "head":
            self.freeze_base(self.encoder)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, (batch, classes), of `input_ids` and `attention_mask`, both (batch, tokens)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.hparams["tuning"] != "head"):
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: Tensor = self.classifier(self.dropout(pool(hidden, mask, self.hparams["pooling"])))
        return logits

    def on_train_start(self) -> None:
        """A frozen encoder computes as in evaluation, without dropout."""
        super().on_train_start()
        if self.hparams["tuning"] == "head":
            self.encoder.eval()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout a function of where training stands: a resumed run draws what an uninterrupted one draws."""
        place = (int(os.environ.get("PL_GLOBAL_SEED", 0)), self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The class-weighted loss of a batch."""
        loss = self.class_weighted_loss(self(batch), batch["labels"])
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=len(batch["labels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the validation scores over: here, for those of `validate` are inference tensors, of no use to `fit`."""
        self.val_scores.reset()

    def on_test_epoch_start(self) -> None:
        """Start the test scores over."""
        self.test_scores.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch in."""
        self._measure(self.val_scores, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch in."""
        self._measure(self.test_scores, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities, fp32, (batch, classes)."""
        logits: Tensor = self(batch)
        return logits.float().softmax(-1)

    def on_validation_epoch_end(self) -> None:
        """Log the validation scores."""
        self._log_scores("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        """Log the test scores."""
        self._log_scores("test", self.test_scores)

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a linear descent, over the steps that the Trainer will take."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, weight_decay=WEIGHT_DECAY)
        schedule = LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        # Asked for here, not in `configure_optimizers`: that would have Lightning set the loader up before its position
        # is restored, which then never happens.
        return START if step == 0 else _rate(step, self.trainer.estimated_stepping_batches)

    def _measure(self, scores: Scores, batch: Batch) -> None:
        scores.update(self(batch).float(), batch["labels"], self.class_weights)

    def _log_scores(self, stage: str, scores: Scores) -> None:
        for name, value in scores.compute().items():  # the same on every rank, and so is their mean
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "macro_f1"), sync_dist=True)


def _rate(step: int, steps: float) -> float:
    """The share of the highest learning rate at `step` of `steps`, which may be infinite."""
    if steps == float("inf"):
        return 1.0
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return START + (1 - START) * step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _one_of(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise MisconfigurationError(f"`{option}` must be one of {', '.join(known)}, got {value!r}.")


def _check_options(labels: list[str], counts: list[int] | None, weighting: str, lr: float | None) -> None:
    _one_of("class_weighting", weighting, ("balanced", "none"))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise MisconfigurationError(f"`labels` must be two or more distinct names, got {labels}.")
    if lr is not None and not 0 < lr < 1:
        raise MisconfigurationError(f"`lr` must be above 0 and below 1, got {lr}. Try 1e-3 for LoRA.")
    if counts is None and weighting == "balanced":
        raise MisconfigurationError(
            "`class_weighting='balanced'` needs `class_counts`: pass the data's `class_counts`,"
            " or `class_weighting='none'`."
        )
    if counts is not None and len(counts) != len(labels):
        raise MisconfigurationError(f"`class_counts` has {len(counts)} entries for {len(labels)} labels: one for each.")
