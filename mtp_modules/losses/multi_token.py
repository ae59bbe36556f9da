"""The multi-token loss: targets, horizon weights and normalisation around one linear + cross-entropy."""

from collections.abc import Collection, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn

from mtp_modules.core.checks import at_least, finite, fraction, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Heads, MixtureStates, TrunkOutput
from mtp_modules.core.objective import (
    CrossEntropyTerms,
    HorizonWeights,
    LinearCrossEntropy,
    NextTokenTeacher,
    OutputLayer,
    Teacher,
)
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Bool, Float, Int, Shaped, Tensor
from mtp_modules.core.targets import at_positions, num_positions, sample_positions
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.losses.compatibility import check_counts, check_mixture, check_single_states
from mtp_modules.losses.confidence import confidence_loss
from mtp_modules.losses.examples import Examples, examples_of, head_by_head
from mtp_modules.losses.figures import loss_terms
from mtp_modules.losses.linear_cross_entropy import FusedLinearCrossEntropy
from mtp_modules.losses.mixture import imbalance, mixture_terms
from mtp_modules.losses.teaching import teacher_for
from mtp_modules.losses.weights import UniformWeights, checked_weights


@runtime_checkable
class MultiTokenModel(Protocol):
    """Protocol of the models that the loss accepts; :class:`mtp_modules.MTPModel` is one."""

    heads: Heads
    unembedding: OutputLayer

    def __call__(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None,
        positions: Tensor | None,
        detach: Collection[str],
        known: TrunkOutput | None = None,
    ) -> tuple[Tensor, ...]:
        """Return one state per horizon."""


DETACHABLE = ("trunk", "embedding", "unembedding")
"""Parts that can be detached from the loss of horizons beyond the first."""


class MultiTokenLoss(Component, nn.Module):
    r"""Mean cross-entropy of every horizon, weighted and summed.

    .. math:: L = \sum_h w_h \frac{1}{|M_h|} \sum_{t \in M_h} -\log P_h(x_{t+h} \mid x_{\le t})

    with :math:`M_h` the positions whose target counts. With equal weights this is equation 2 of Gloeckle et al. 2024
    (arXiv 2404.19737), as a mean instead of a sum. :math:`|M_h|` is that of the batch, or that of the whole optimizer
    step if ``counts`` is given. In training, a fully frozen horizon 1 is skipped: its metrics are 0 then. Targets
    outside a horizon's draft vocabulary add nothing to the loss, and count as wrong.

    Args:
        weights: Weight of each horizon; all 1 if ``None``.
        backend: How linear + cross-entropy is computed; fused if ``None``.
        share_of_positions: Train horizons beyond the first on this random share of the positions, an unbiased estimate
            of the same loss; all positions in evaluation.
        distillation: Share of distillation in the loss of horizons beyond the first: they imitate the distribution of
            horizon 1 for the same token, because a draft is accepted if it agrees with horizon 1. The rest is
            cross-entropy against the token itself.
        total_variation: Share of the distillation loss, from horizon 1 or a teacher, that is total variation distance:
            the probability that a sampled draft is rejected. The rest is cross-entropy against the distribution, whose
            gradient is that of the Kullback-Leibler divergence.
        log_acceptance: Measure that share by minus the logarithm of the acceptance, 1 minus the distance, whose
            gradient stays large where a head's drafts are rarely accepted yet (LK losses, arXiv 2602.23881).
        lk_eta: Multiply the share of ``total_variation`` by ``1 - exp(-lk_eta * acceptance)``, example by example and
            without a gradient: cross-entropy first, the distance once drafts are accepted (their hybrid, with 3).
        detach: Parts that get no gradient from horizons beyond the first: any of ``"trunk"`` (its hidden state),
            ``"embedding"`` (of the tokens between, for heads that read them) and ``"unembedding"`` (the output matrix).
        label_smoothing: Share of the cross-entropy against the token that is spread evenly over the vocabulary.
        z_loss: Coefficient of the squared logarithm of the softmax's normaliser, which keeps logits from drifting
            (Chowdhery et al. 2022, arXiv 2204.02311, section 5). The formula with both is that of
            :class:`~mtp_modules.losses.NaiveLinearCrossEntropy`; logged losses are plain.
        balance: For heads with a joint distribution (:class:`~mtp_modules.JointHeads`): coefficient of the imbalance of
            their components' mean weights in a batch, which keeps all components in use.
        confidence_target: What :class:`~mtp_modules.ConfidenceHeads` learn to predict: whether horizon 1 has the same
            ``"argmax"``, acceptance in greedy decoding; or the ``"overlap"`` of both distributions, the probability
            that a sampled draft is accepted (DSpark 2026, arXiv 2607.05147). With ``num_draft_tokens``, of the
            distributions over those tokens.

    Of heads that predict which drafts are accepted (:class:`~mtp_modules.ConfidenceHeads`), the loss has the binary
    cross-entropy of their predictions too, with the same weights and counts. For the argmax, horizon 1 is never
    skipped.

    With a joint distribution a further horizon's term is the negative log-likelihood given the tokens before it, so
    that at equal weights the terms sum to the joint one. Then ``distillation``, ``label_smoothing`` and ``z_loss`` must
    be 0.

    Shape:
        tokens ``(B, T + max(horizons))``.

    Raises:
        ValueError: If a share lies outside its range, ``z_loss`` is negative, or ``detach`` names something else; when
            called, if there is ``total_variation`` but no teacher.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, TransformerTrunk
        >>> trunk = TransformerTrunk(vocab_size=11, d_model=8, num_layers=1, num_heads=2, max_positions=16)
        >>> model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2))
        >>> terms = MultiTokenLoss()(model, torch.randint(11, (3, 10)))
        >>> terms.count.tolist()
        [24, 24]
    """

    def __init__(
        self,
        *,
        weights: HorizonWeights | None = None,
        backend: LinearCrossEntropy | None = None,
        share_of_positions: float = 1.0,
        distillation: float = 0.0,
        total_variation: float = 0.0,
        log_acceptance: bool = False,
        lk_eta: float = 0.0,
        detach: Sequence[str] = (),
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        balance: float = 0.0,
        confidence_target: str = "argmax",
    ) -> None:
        super().__init__()
        fraction(self, "share_of_positions", share_of_positions, zero=False)
        fraction(self, "distillation", distillation)
        fraction(self, "total_variation", total_variation)
        for name in detach:
            if name not in DETACHABLE:
                refuse(self, f"detach may hold {', '.join(DETACHABLE)}, got {name!r}.")
        self.detach = frozenset(detach)
        fraction(self, "label_smoothing", label_smoothing)
        at_least(self, "z_loss", z_loss, 0)
        at_least(self, "balance", balance, 0)
        self.weights = UniformWeights() if weights is None else weights
        self.backend = FusedLinearCrossEntropy() if backend is None else backend
        self.share_of_positions, self.distillation = share_of_positions, distillation
        self.total_variation, self.log_acceptance, self.balance = total_variation, log_acceptance, balance
        if log_acceptance and not total_variation:
            refuse(self, "log_acceptance measures the share that total_variation gives, which is 0; set it above 0.")
        self.lk_eta = finite(self, "lk_eta", lk_eta, 0)
        if lk_eta and (log_acceptance or not total_variation):
            refuse(self, "lk_eta needs total_variation above 0 and no log_acceptance; set them so, or leave it out.")
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        if confidence_target not in ("argmax", "overlap"):
            refuse(self, f"confidence_target must be argmax or overlap, got {confidence_target!r}.")
        if confidence_target == "overlap" and not total_variation:
            refuse(
                self, "confidence_target: overlap is 1 minus the total variation distance; set total_variation above 0."
            )
        self.confidence_target = confidence_target

    def forward(
        self,
        model: MultiTokenModel,
        tokens: Int[Tensor, "B L"],
        *,
        document_ids: Int[Tensor, "B L"] | None = None,
        loss_mask: Bool[Tensor, "B L"] | None = None,
        inputs: Int[Tensor, "B L"] | None = None,
        counts: Shaped[Tensor, " H"] | None = None,
        weights: Sequence[float] | None = None,
        teacher: NextTokenTeacher | None = None,
        known: TrunkOutput | None = None,
    ) -> LossTerms:
        """Run the model on a batch and score every horizon.

        Args:
            model: Trunk, heads and unembedding.
            tokens: Token ids, ``L = T + max(horizons)``; with ``inputs``, negative where there is no target (-100).
            document_ids: Which document every token belongs to.
            loss_mask: False at tokens that are no targets.
            inputs: Tokens that the model reads instead of ``tokens``, such as noise or blanks. Targets are ``tokens``.
            counts: Valid targets per horizon in the whole optimizer step: all ranks, all accumulated batches. Their
                losses add up to the loss of the step. Only this batch if ``None``.
            weights: One weight per horizon; those of the start of a run if ``None``.
            teacher: Another model's next-token distributions; every horizon imitates that for the token that it
                predicts, up to the positions that the other model has read.
            known: Cached output of the model's frozen trunk for the tokens; the trunk does not run then.

        Raises:
            ValueError: If there is a teacher, and ``distillation`` is above 0; if the heads have a joint distribution,
                and an option does not support it; if ``weights`` or ``counts`` do not have one number per horizon, or
                one is negative, infinite or not a number (counts on an accelerator are not read).
        """
        if not (hasattr(model, "heads") and hasattr(model, "unembedding")):
            refuse(
                self,
                f"model must have heads and an unembedding, as MTPModel has, got {type(model).__name__}; states or "
                "logits that another model has computed go to multi_token_loss(states, tokens, matrix=...), and a "
                "wrapper such as DistributedDataParallel goes around a module that calls the loss.",
            )
        horizons, unembedding = model.heads.horizons, model.unembedding
        if counts is not None:
            counts = torch.as_tensor(counts)
            check_counts(self, counts, len(horizons))
        if weights is None:
            weights = self.horizon_weights(len(horizons))
        weights = checked_weights(self, weights, len(horizons))
        positions = self._positions(tokens, num_positions(tokens, horizons))
        examples = examples_of(tokens, horizons, positions, document_ids=document_ids, loss_mask=loss_mask)
        read = tokens if inputs is None else inputs
        passed = {} if known is None else {"known": known}
        states = model(read, document_ids=document_ids, positions=positions, detach=self.detach, **passed)
        compared = model.heads.predicts_acceptance and self.confidence_target == "argmax"
        if not (compared or self._scores_first(unembedding, states[0])):
            examples = examples.without_first()
        counts = examples.valid.sum(dim=(0, 1)) if counts is None else counts
        scale = examples.scale(weights, counts, torch.promote_types(states[0].dtype, torch.float32))
        if isinstance(states, MixtureStates):
            check_mixture(self, model.heads, inputs, teacher)
            terms = self._mixture(cast("Unembedding", unembedding), states, examples, scale, counts)
        else:
            check_single_states(self, model.heads, teacher)
            names = ("distillation", "total_variation", "log_acceptance", "lk_eta")
            measure = {name: getattr(self, name) for name in names}
            taught = teacher_for(states[0], teacher, examples.positions, horizons, **measure)
            terms = self._cross_entropy(unembedding, states, examples, scale, taught)
            if model.heads.predicts_acceptance:
                added = confidence_loss(
                    model.heads, states, terms, examples, scale, overlap=self.confidence_target == "overlap"
                )
                terms = terms._replace(loss=terms.loss + added)
        scored = examples.far_valid & unembedding.draftable(examples.far_targets.clamp(min=0))
        return loss_terms(terms, examples, horizons, scored=scored, dtype=scale.dtype)

    def horizon_weights(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return the weights of the horizons at a point of the run.

        Args:
            num_horizons: Number ``H`` of horizons.
            progress: Share of the run's optimizer steps that are done, from 0 to 1.

        Raises:
            ValueError: If there are more or fewer than horizons, or one is negative, infinite or not a number.
        """
        return checked_weights(self.weights, self.weights(num_horizons, progress), num_horizons)

    def _cross_entropy(
        self,
        unembedding: OutputLayer,
        states: Sequence[Tensor],
        examples: Examples,
        scale: Float[Tensor, " H"],
        teacher: Teacher | None,
    ) -> CrossEntropyTerms:
        """Score the states of all horizons at once."""
        scored = (states[0][:, : examples.near_valid.shape[1]], *states[1:])
        return unembedding(
            _joined(scored),
            head_by_head(examples.near_targets, examples.far_targets),
            head_by_head(*examples.weighed(scale)),
            self.backend,
            teacher,
            sizes=[state.shape[0] * state.shape[1] for state in scored],
            detach_far="unembedding" in self.detach,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )

    def _mixture(
        self,
        unembedding: Unembedding,
        states: MixtureStates,
        examples: Examples,
        scale: Float[Tensor, " H"],
        counts: Int[Tensor, " H"],
    ) -> CrossEntropyTerms:
        """Score horizon 1, and the joint distribution of the others; add the imbalance of its components."""
        conditions = at_positions(examples.targets, examples.positions)[:, :, 1:]
        terms = mixture_terms(
            unembedding,
            states._replace(first=states.first[:, : examples.near_valid.shape[1]]),
            (examples.near_targets, conditions),
            examples.weighed(scale),
            self.backend,
            detach_far="unembedding" in self.detach,
        )
        # Share of this batch in the targets of the optimizer step.
        part = (examples.far_valid.sum(dim=(0, 1)) / counts[1:].clamp(min=1)).mean() * examples.thinning
        uneven = imbalance(states.log_weights, examples.far_valid.any(dim=2))
        return terms._replace(loss=terms.loss + self.balance * part.to(scale.dtype) * uneven)

    def _scores_first(self, unembedding: OutputLayer, first: Float[Tensor, "B T D"]) -> bool:
        """Return whether horizon 1 is scored; not in training if it is fully frozen."""
        parts = unembedding.matrix(0) or ()
        trained = first.requires_grad or any(part is not None and part.requires_grad for part in parts)
        return trained or not self.training or not torch.is_grad_enabled()

    def _positions(self, tokens: Tensor, length: int) -> Int[Tensor, "B P"] | None:
        if self.share_of_positions == 1.0 or not self.training:
            return None
        return sample_positions(len(tokens), length, self.share_of_positions, tokens.device)


def _joined(states: Sequence[Float[Tensor, "B _ _"]]) -> Float[Tensor, "N W"]:
    """Return the states head by head; horizon 1's have zeros where others have factors."""
    near, *far = states
    if far and far[0].shape[2] > near.shape[2]:
        near = torch.nn.functional.pad(near, (0, far[0].shape[2] - near.shape[2]))
    return torch.cat([state.flatten(0, 1) for state in (near, *far)])
