"""The LightningModule: model, loss, optimizer and metrics."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mtp_modules.core.component import describe
from mtp_modules.core.interfaces import Heads, Tokenizer, Trunk
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Tensor
from mtp_modules.losses.multi_token import MultiTokenLoss
from mtp_modules.metrics.functional import counts, figures
from mtp_modules.metrics.per_head import PerHeadMetrics
from mtp_modules.model import MTPModel
from mtp_modules.training.checkpointing import CHECKPOINT_KEY, check_weights
from mtp_modules.training.optimizers import muon_parameter_groups
from mtp_modules.training.schedules import LearningRateSchedule

TOP_K = (1, 5)


class MTPModule(LightningModule):
    """Train a multi-token model: what ``python -m mtp_modules fit`` runs.

    Batches are dictionaries with ``tokens (B, T + max(horizons))`` and optionally ``document_ids`` and ``loss_mask`` of
    the same shape. Logged, each as ``train/``, ``val/`` and ``test/``: ``loss``, and per head ``loss/head_h``
    (unweighted, nats), ``accuracy/head_h`` and ``top5_accuracy/head_h``, and ``accepted_length``. Checkpoints describe
    the model and the tokenizer, so that they can be decoded without the configuration.

    Args:
        trunk: Turns tokens into hidden states.
        heads: Turn a hidden state into one state a horizon.
        loss: What to minimise.
        optimizer: Made from parameter groups, of which the one with ``use_muon`` true holds the matrices.
        lr_schedule: Factor on every learning rate; constant if ``None``.
        tie_embeddings: Share the trunk's embedding matrix with horizon 1's output.
        own_unembeddings: Give every horizon beyond the first an output matrix of its own.
        output_bias: Add a bias to the logits.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: Heads,
        loss: MultiTokenLoss,
        optimizer: OptimizerCallable = AdamW,
        lr_schedule: LearningRateSchedule | None = None,
        tie_embeddings: bool = True,
        own_unembeddings: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        self.model = MTPModel(
            trunk=trunk,
            heads=heads,
            tie_embeddings=tie_embeddings,
            own_unembeddings=own_unembeddings,
            output_bias=output_bias,
        )
        self.loss = loss
        self.loss.weights(len(self.model.horizons))  # weights that do not fit the heads are refused before any work
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.val_metrics = PerHeadMetrics(num_horizons=len(self.model.horizons), top_k=TOP_K)
        self.test_metrics = PerHeadMetrics(num_horizons=len(self.model.horizons), top_k=TOP_K)
        self._tokens, self._since = 0, time.perf_counter()
        self._random_state: Tensor | None = None

    @property
    def trunk(self) -> Trunk:
        """What turns tokens into hidden states."""
        return self.model.trunk

    @property
    def lookahead(self) -> int:
        """How many tokens a batch carries beyond the positions that the trunk reads."""
        return self.model.lookahead

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of token ids."""
        return self.model.trunk.vocab_size

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """Score a batch.

        Args:
            batch: ``tokens``, and optionally ``document_ids`` and ``loss_mask``.
        """
        terms: LossTerms = self.loss(
            self.model, batch["tokens"], document_ids=batch.get("document_ids"), loss_mask=batch.get("loss_mask")
        )
        return terms

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log now and then."""
        terms = self(batch)
        self._tokens += batch["tokens"].shape[0] * (batch["tokens"].shape[1] - self.lookahead)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # lightning sets it where mypy cannot see
        if self.trainer.global_step % every == 0:
            self._log_training(terms)
        return terms.loss

    def _log_training(self, terms: LossTerms) -> None:
        now = time.perf_counter()
        logged = {f"train/{name}": value for name, value in figures(counts(terms, TOP_K), TOP_K).items()}
        logged["train/loss"] = terms.loss.detach()
        logged["train/tokens_per_second"] = torch.tensor(self._tokens / max(now - self._since, 1e-9))
        self.log_dict(logged)
        self._tokens, self._since = 0, now

    def on_train_start(self) -> None:
        """Start the clock of the throughput; in a resumed run, go on with the random numbers where they stopped."""
        self._tokens, self._since = 0, time.perf_counter()
        if self._random_state is not None:
            _generator(self.device).set_state(self._random_state.cpu())
            self._random_state = None

    def on_validation_end(self) -> None:
        """Leave the validation out of the throughput."""
        self._tokens, self._since = 0, time.perf_counter()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a held-out batch."""
        self.val_metrics.update(self(batch))

    def on_validation_epoch_end(self) -> None:
        """Log what was counted."""
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a test batch."""
        self.test_metrics.update(self(batch))

    def on_test_epoch_end(self) -> None:
        """Log what was counted."""
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, stage: str, metrics: PerHeadMetrics) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.compute().items()}, rank_zero_only=True)
        metrics.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the likeliest token of every horizon at every position, ``(B, T, H)``, beside the batch's own."""
        states = self.model(batch["tokens"], document_ids=batch.get("document_ids"))
        logits = self.model.unembedding.logits
        predicted = [logits(state, index).argmax(dim=-1) for index, state in enumerate(states)]
        return {"tokens": batch["tokens"], "predicted": torch.stack(predicted, dim=-1)}

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, if there is a schedule, its scheduler over the steps of this run."""
        optimizer = self.optimizer(muon_parameter_groups(self.model))
        if self.lr_schedule is None:
            return optimizer
        schedule, total = self.lr_schedule, int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model before they are loaded."""
        check_weights(self, checkpoint["state_dict"], "the checkpoint")
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._random_state = checkpoint[CHECKPOINT_KEY].get("random_state")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint describe itself."""
        datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        tokenizer = getattr(datamodule, "tokenizer", None)
        checkpoint[CHECKPOINT_KEY] = {
            "format": 1,
            "model": describe(self.model),
            "tokenizer": describe(tokenizer) if isinstance(tokenizer, Tokenizer) else None,
        }
        if self._trainer is not None and self.trainer.world_size == 1:
            checkpoint[CHECKPOINT_KEY]["random_state"] = _generator(self.device).get_state()


def _generator(device: torch.device) -> torch.Generator:
    """Return the generator that a device draws from unless it is told another."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
