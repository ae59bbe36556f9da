"""The LightningModule: model, loss, optimizer and metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim import AdamW, Optimizer

from mtp_modules.core.auxiliary import AuxiliaryObjective
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.cached_states import cached_output
from mtp_modules.loading import CHECKPOINT_KEY
from mtp_modules.losses.multi_token import MultiTokenLoss
from mtp_modules.metrics.per_head import PerHeadMetrics
from mtp_modules.model import MTPModel
from mtp_modules.training.auxiliary import Objectives
from mtp_modules.training.blocks import prepare_blocks
from mtp_modules.training.cached_states import read_cached_rows
from mtp_modules.training.checkpointing import check_checkpoint, generator_of, tokenizer_of
from mtp_modules.training.descriptions import check_same_model, described, own_description
from mtp_modules.training.draft_tokens import check_draft_tokens_chosen
from mtp_modules.training.finite import FiniteSteps, check_finite_weights
from mtp_modules.training.freezing import freeze_parts
from mtp_modules.training.last_checkpoint import check_save_points, replace_save_last
from mtp_modules.training.learning_rates import check_scales, scaled_optimizer
from mtp_modules.training.monitoring import TokenThroughput, gradient_norms, logs_this_step, pending_loss_scale
from mtp_modules.training.normalisation import StepCounts, run_length
from mtp_modules.training.parallel import Sharding, materialize
from mtp_modules.training.predicting import most_likely
from mtp_modules.training.resuming import Resumption, record_run
from mtp_modules.training.schedules import LearningRateSchedule, scheduled
from mtp_modules.training.setting_up import set_up
from mtp_modules.training.strategies import check_gradients
from mtp_modules.training.teacher import TeacherModel
from mtp_modules.training.tensor_parallel import check_same_tokens, clip_gradients, parallelize, share_random_state

TOP_K = (1, 5)


class MTPModule(LightningModule):
    """Train a multi-token model: what ``python -m mtp_modules fit`` runs.

    Batches are dictionaries with ``tokens (B, T + max(horizons))`` and optionally ``document_ids``, ``loss_mask`` and
    ``inputs`` (read instead of ``tokens``) of the same shape, and ``hidden`` ``(B, T, D)``, the cached hidden states of
    a frozen trunk, with ``features`` ``(B, F, T, D)``, those of its inner layers.
    The module logs under ``train/``, ``val/`` and ``test/``, per head, ``loss/head_h`` (unweighted, nats),
    ``perplexity/head_h``, ``accuracy/head_h`` and ``top5_accuracy/head_h``, and ``accepted_length``; in training also
    ``loss``, gradient norms before clipping, and :class:`~mtp_modules.training.monitoring.TokenThroughput`'s keys.
    The page "What is logged" has every key. Checkpoints describe model and tokenizer: decoding needs nothing else.

    Each horizon's loss is divided by the number of its valid targets in the whole optimizer step: all ranks, and all
    accumulated batches. So a step does not depend on how it is split.

    Args:
        trunk: Turns tokens into hidden states.
        heads: Turn a hidden state into one state per horizon.
        loss: What to minimise.
        teacher: A trained model to distil from; none if ``None``.
        objectives: What the trunk is trained for beside the horizons; they are dropped from what decodes.
        optimizer: Called with parameter groups, of which the one with ``use_muon`` true holds the matrices.
        lr_schedule: Factor on every learning rate; constant if ``None``.
        tie_embeddings: Share the trunk's embedding matrix with horizon 1's output.
        own_unembeddings: Give every horizon beyond the first an output matrix of its own.
        output_bias: Add a bias to the logits.
        num_draft_tokens: Size of the draft vocabulary of further horizons: the most frequent tokens of the training
            data, which :func:`~mtp_modules.training.choose_draft_tokens` finds before the fit.
        freeze: Parts that are not trained: any of ``"trunk"``, ``"heads"``, ``"unembedding"``. A frozen trunk runs
            without gradients and in evaluation mode, and freezes the output matrix that is tied to it. All else is put
            into training mode when the module is made, a pretrained trunk too.
        lr_scales: Factors on the learning rate of parts: any of ``trunk``, ``heads``, ``unembedding``; 1 where not
            named. Use a small factor for a pretrained trunk that is fine-tuned together with new heads.
        activation_checkpointing: ``"full"`` or ``"selective"`` to recompute the activations inside the blocks of trunk
            and heads in the backward pass; see :func:`~mtp_modules.training.checkpoint_blocks`.
        compile_blocks: Compile each block with ``torch.compile``.
        sharding: How weights are sharded where the strategy is ``ModelParallelStrategy``.
        skip_non_finite: How many steps in a row may be skipped because their loss or a gradient is not finite; with 0,
            the first one stops the run before the update.

    Raises:
        ValueError: If ``freeze`` names something else, a tied output matrix without its trunk, or everything;
            ``lr_scales`` something that is not trained, or a factor that is not above 0; when a run begins, if the
            trainer has an unsupported combination of options (:func:`~mtp_modules.training.check_trainer`).
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
        freeze: Sequence[str] = (),
        lr_scales: Mapping[str, float] | None = None,
        activation_checkpointing: str | None = None,
        compile_blocks: bool = False,
        sharding: Sharding | None = None,
        teacher: TeacherModel | None = None,
        num_draft_tokens: int | None = None,
        skip_non_finite: int = 0,
        objectives: Sequence[AuxiliaryObjective] = (),
    ) -> None:
        super().__init__()
        self.model = MTPModel(
            trunk=trunk,
            heads=heads,
            tie_embeddings=tie_embeddings,
            own_unembeddings=own_unembeddings,
            output_bias=output_bias,
            num_draft_tokens=num_draft_tokens,
        ).train()  # pretrained trunks start in evaluation mode, and Lightning would leave them there
        self.frozen = freeze_parts(self, self.model, freeze)
        self.lr_scales = dict(lr_scales or {})
        check_scales(self, self.model, self.lr_scales)
        self.loss, self.teacher = loss, teacher
        self.objectives = Objectives(self, objectives, trunk=trunk, lookahead=self.model.lookahead).train()
        if teacher is not None:
            teacher.check(self.model, loss)
        self.loss.horizon_weights(len(self.model.horizons))  # rejects weights that do not fit the heads early
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self.sharding, self._configured = sharding, False
        with torch.device("cpu"):  # also where the model is built on the meta device
            self.val_metrics, self.test_metrics = (self.objectives.metrics(len(self.horizons), TOP_K) for _ in range(2))
        self._resumption = Resumption()
        self._step_counts: StepCounts | None = None
        self._run_length: int | None = None
        self._gradients_checked = False
        self.finite_steps = FiniteSteps(skip_non_finite)

    @property
    def horizons(self) -> tuple[int, ...]:
        """Offsets of the heads."""
        return self.model.horizons

    @property
    def trunk(self) -> Trunk:
        """The trunk of the model."""
        return self.model.trunk

    @property
    def lookahead(self) -> int:
        """How many tokens a batch carries beyond the positions that the trunk reads."""
        return self.model.lookahead

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of token ids."""
        return self.model.trunk.vocab_size

    def setup(self, stage: str) -> None:
        """Check the trainer, and set the horizons for which the data counts targets ahead."""
        self._resumption = Resumption()
        set_up(self, self.trainer, stage)

    def configure_model(self) -> None:
        """Set up recomputation, compilation and sharding of blocks, once; Lightning calls this before every run."""
        if self._configured:
            return
        self._configured = True
        prepare_blocks(self.model, activation_checkpointing=self.activation_checkpointing, compiled=self.compile_blocks)
        if self.device_mesh is None:
            materialize(self.model, self.trainer.strategy.root_device)
        else:
            parallelize(self, self.model, mesh=self.device_mesh, sharding=self.sharding)
            register_fsdp_forward_method(self, "predict_step")

    def forward(
        self,
        batch: dict[str, Tensor],
        *,
        counts: Tensor | None = None,
        weights: Sequence[float] | None = None,
        auxiliary: bool = True,
    ) -> LossTerms:
        """Score a batch.

        Args:
            batch: ``tokens``, and optionally the other keys that the class docstring lists.
            counts: Valid targets per horizon in the whole optimizer step, and then the examples of each auxiliary
                objective; only this batch if ``None``.
            weights: One weight per horizon; those of the start of a run if ``None``.
            auxiliary: Whether to add the auxiliary objectives.
        """
        known = self.objectives.states(self.model, batch) if auxiliary else cached_output(batch)
        taught = self.teacher.of(batch, self.horizons) if self.teacher is not None and self.training else None
        terms: LossTerms = self.loss(
            self.model,
            batch["tokens"],
            document_ids=batch.get("document_ids"),
            loss_mask=batch.get("loss_mask"),
            inputs=batch.get("inputs"),
            counts=None if counts is None else counts[: len(self.horizons)],
            weights=weights,
            teacher=taught,
            known=known,
        )
        return self.objectives.added(terms, known, batch, counts) if auxiliary else terms

    def horizon_weights(self) -> list[float]:
        """Return the weights of the horizons at this step of the run."""
        progress = 0.0
        if self.loss.weights.changes:
            if self._run_length is None:
                self._run_length = run_length(self.trainer)
            progress = min(1.0, self.trainer.global_step / max(self._run_length, 1))
        return self.loss.horizon_weights(len(self.horizons), progress)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log at the trainer's logging steps."""
        if self._step_counts is None:
            self._step_counts = StepCounts(self.trainer, self.horizons, TOP_K, self.objectives.counter)
            if self.device_mesh is not None:
                check_same_tokens(batch["tokens"], mesh=self.device_mesh["tensor_parallel"])
        counts = self._step_counts(batch, batch_idx)
        terms = self(batch, counts=counts, weights=self.horizon_weights())
        # The trainer averages over ranks and accumulated batches, but losses divided by the total counts must be added.
        loss: Tensor = terms.loss * self._step_counts.parts
        self.finite_steps.add(loss)
        if logs_this_step(self.trainer):
            self._step_counts.figures.add(terms)
            if not self.trainer.fit_loop._should_accumulate():  # the last batch of the step
                self.log_dict({f"train/{name}": value for name, value in self._step_counts.figures.total().items()})
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log gradient norms, unscaled and not yet clipped, and stop or skip a step that is not finite."""
        if logs_this_step(self.trainer):
            norms = gradient_norms(self.model, loss_scale=pending_loss_scale(self.trainer, optimizer))
            self.log_dict({f"train/grad_norm/{part}": norm for part, norm in norms.items()})
            self.log("train/lr", float(optimizer.param_groups[0]["lr"]))
        self.finite_steps.check(self.trainer, self, optimizer)

    def configure_callbacks(self) -> list[Callback]:
        """Add :class:`TokenThroughput`, and :class:`LastCheckpoint` for ``save_last``, unless the trainer has them."""
        present = any(isinstance(callback, TokenThroughput) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*replace_save_last(self.trainer), *([] if present else [TokenThroughput()])]

    def on_fit_start(self) -> None:
        """Reset the state of an earlier run, reject schedules without an end of the run, and fill cached states."""
        self._step_counts = self._run_length = None
        self._gradients_checked = False
        self.finite_steps.reset()
        self._resumption.begin(self)
        self.horizon_weights()
        read_cached_rows(self.trainer, self.trunk)
        if self.teacher is not None:
            self.teacher.prepare(self.device, tokenizer_of(self._trainer), self.device_mesh)

    def on_train_start(self) -> None:
        """Set a frozen trunk to evaluation mode, and restore what a resumed run restores last."""
        check_draft_tokens_chosen(self.model)
        check_save_points(self.trainer)
        if "trunk" in self.frozen:
            self.model.trunk.eval()
        self._resumption.finish(self)
        if self.device_mesh is not None:
            share_random_state(generator_of(self.device), mesh=self.device_mesh["tensor_parallel"])

    def on_after_backward(self) -> None:
        """Reject parameters without gradients where DDP would wait for them."""
        if not self._gradients_checked:
            self._gradients_checked = True
            check_gradients(self.trainer, self)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the metrics with a validation batch."""
        self.val_metrics.update(self(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the metrics with a test batch."""
        self.test_metrics.update(self(batch))

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, stage: str, metrics: PerHeadMetrics) -> None:
        logged = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        self.log_dict(logged, rank_zero_only=True, sync_dist=True)  # already synced; both flags avoid a warning
        metrics.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the most likely token of every horizon at every position, ``(B, T, H)``, beside the batch's own."""
        return {"tokens": batch["tokens"], "predicted": most_likely(self.model, batch)}

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, if there is a schedule, its scheduler over the steps of this run."""
        optimizer = scaled_optimizer(self.optimizer, self.model, self.lr_scales, self.objectives)
        return optimizer if self.lr_schedule is None else scheduled(optimizer, self.lr_schedule, self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, also a mixture of sharded and whole ones, which Lightning does not support."""
        if self.device_mesh is None or self.device_mesh["tensor_parallel"].size() == 1:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            clip_gradients(self.parameters(), gradient_clip_val, by_value=gradient_clip_algorithm == "value")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject another model and another layout, and prepare a resumed run for its present settings."""
        check_same_model(self.model, tokenizer_of(self._trainer), own_description(checkpoint), "ckpt_path")
        check_checkpoint(self, checkpoint)
        if self._trainer is not None:
            self._resumption.load(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the description of model, tokenizer and run into the checkpoint, unless a weight is not finite."""
        check_finite_weights(self, self._trainer)
        checkpoint[CHECKPOINT_KEY] = described(self.model, tokenizer_of(self._trainer), self.objectives.all)
        if self._trainer is not None:
            record_run(self, checkpoint)
