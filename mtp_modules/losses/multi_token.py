"""The multi-token loss: targets, horizon weights and normalisation around one linear + cross-entropy."""

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from mtp_modules.core.checks import at_least, fraction, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Heads, MixtureStates, TrunkOutput
from mtp_modules.core.objective import CrossEntropyTerms, HorizonWeights, LinearCrossEntropy, NextTokenLaw, Teacher
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.targets import at_positions, num_positions, positions_of_horizon_one, sample_positions
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.losses.examples import Examples, examples_of, head_by_head
from mtp_modules.losses.figures import loss_terms
from mtp_modules.losses.linear_cross_entropy import FusedLinearCrossEntropy
from mtp_modules.losses.mixture import imbalance, mixture_terms
from mtp_modules.losses.weights import UniformWeights


@runtime_checkable
class MultiTokenModel(Protocol):
    """What the loss needs of a model; :class:`mtp_modules.MTPModel` is one."""

    heads: Heads
    unembedding: Unembedding

    def __call__(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None,
        positions: Tensor | None,
        detach: Collection[str],
        known: TrunkOutput | None = None,
    ) -> tuple[Tensor, ...]:
        """Return one state a horizon."""


DETACHABLE = ("trunk", "embedding", "unembedding")
"""What horizons beyond the first may leave untrained."""


class MultiTokenLoss(Component, nn.Module):
    r"""Mean cross-entropy of every horizon, weighted and summed.

    .. math:: L = \sum_h w_h \frac{1}{|M_h|} \sum_{t \in M_h} -\log P_h(x_{t+h} \mid x_{\le t})

    with :math:`M_h` the positions whose target counts. With equal weights this is equation 2 of Gloeckle et al. 2024
    (arXiv 2404.19737), as a mean instead of a sum. :math:`|M_h|` is that of the batch, or of everything that one
    optimizer step sees, where ``counts`` says so. In training, a horizon 1 of which nothing is trained is left out: its
    figures are 0 then. Targets that a horizon with few draft tokens cannot score cost nothing, and count as wrong.

    Args:
        weights: Weight of each horizon; all 1 if ``None``.
        backend: How linear + cross-entropy is computed; fused if ``None``.
        share_of_positions: Train horizons beyond the first on this random share of the positions, an unbiased estimate
            of the same loss; all positions in evaluation.
        distillation: How much of the loss of horizons beyond the first is imitation of the law of horizon 1 for the
            same token, instead of cross-entropy against the token itself. What drafts need is agreement with horizon 1.
        total_variation: How much of that imitation, or of the imitation of another model, is total variation, the
            chance that a drawn draft is rejected; the rest is cross-entropy against the law, whose gradient is that of
            the Kullback-Leibler divergence.
        detach: What gets no gradient from horizons beyond the first: any of ``"trunk"`` (its hidden state),
            ``"embedding"`` (of the tokens between, for heads that read them) and ``"unembedding"`` (the output matrix).
        label_smoothing: Share of the loss that is spread evenly over the vocabulary; of what a teacher leaves.
        z_loss: Coefficient of the squared logarithm of the softmax's normaliser, which keeps logits from drifting
            (Chowdhery et al. 2022, arXiv 2204.02311, section 5). The formula with both is that of
            :class:`~mtp_modules.losses.NaiveLinearCrossEntropy`; logged losses are plain.
        balance: Of heads with a joint law (:class:`~mtp_modules.JointHeads`): coefficient of the imbalance of their
            components' mean weights in a batch, which keeps all of them in use.

    With such heads a further horizon's term is the negative log-likelihood given the tokens before it, so that at equal
    weights the terms sum to that of the joint law. Then ``distillation``, ``label_smoothing`` and ``z_loss`` must be 0.

    Shape:
        tokens ``(B, T + max(horizons))``.

    Raises:
        ValueError: If a share lies outside its range, ``z_loss`` is negative, or ``detach`` names something else; when
            called, if there is ``total_variation`` but nobody to imitate.

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
        detach: Sequence[str] = (),
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        balance: float = 0.0,
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
        self.total_variation, self.balance = total_variation, balance
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(
        self,
        model: MultiTokenModel,
        tokens: Int[Tensor, "B L"],
        *,
        document_ids: Int[Tensor, "B L"] | None = None,
        loss_mask: Bool[Tensor, "B L"] | None = None,
        inputs: Int[Tensor, "B L"] | None = None,
        counts: Int[Tensor, " H"] | None = None,
        weights: Sequence[float] | None = None,
        teacher: NextTokenLaw | None = None,
        known: TrunkOutput | None = None,
    ) -> LossTerms:
        """Run the model on a batch and score every horizon.

        Args:
            model: Trunk, heads and unembedding.
            tokens: Token ids, ``L = T + max(horizons)``.
            document_ids: Which document every token belongs to.
            loss_mask: False at tokens that must not be learned.
            inputs: What the model reads, where that is not ``tokens``: noise, or blanks. Targets are ``tokens``.
            counts: How many valid targets each horizon has in everything that one optimizer step sees: all ranks, all
                accumulated batches. The losses of those add up to the loss of the step. Only this batch if ``None``.
            weights: One weight a horizon; those of the start of a run if ``None``.
            teacher: What another model says of the next token; imitated by every horizon for the token that it
                predicts, where the other model has read up to there.
            known: What the model's frozen trunk has said of the tokens before, so that it need not run.

        Raises:
            ValueError: If there is a teacher, and ``distillation`` makes horizon 1 another; if the heads have a joint
                law, and something does not go with it.
        """
        horizons, unembedding = model.heads.horizons, model.unembedding
        positions = self._positions(tokens, num_positions(tokens, horizons))
        examples = examples_of(tokens, horizons, positions, document_ids=document_ids, loss_mask=loss_mask)
        read = tokens if inputs is None else inputs
        passed = {} if known is None else {"known": known}
        states = model(read, document_ids=document_ids, positions=positions, detach=self.detach, **passed)
        if not self._scores_first(unembedding, states[0]):
            examples = examples.without_first()
        counts = examples.valid.sum(dim=(0, 1)) if counts is None else counts
        weights = self.weights(len(horizons)) if weights is None else weights
        scale = examples.scale(weights, counts, _real(states[0].dtype))
        if isinstance(states, MixtureStates):
            self._check_mixture(model.heads, inputs, teacher)
            terms = self._mixture(unembedding, states, examples, scale, counts)
        else:
            self._check_balance(model.heads)
            law = self._teacher(states[0], teacher, examples.positions, horizons)
            terms = self._cross_entropy(unembedding, states, examples, scale, law)
        scored = examples.far_valid & unembedding.draftable(examples.far_targets.clamp(min=0))
        return loss_terms(terms, examples, horizons, scored=scored, dtype=scale.dtype)

    def _cross_entropy(
        self,
        unembedding: Unembedding,
        states: Sequence[Tensor],
        examples: Examples,
        scale: Float[Tensor, " H"],
        law: Teacher | None,
    ) -> CrossEntropyTerms:
        """Score the states of all horizons at once."""
        scored = (states[0][:, : examples.near_valid.shape[1]], *states[1:])
        return unembedding(
            torch.cat([state.flatten(0, 1) for state in scored]),
            head_by_head(examples.near_targets, examples.far_targets),
            head_by_head(*examples.weighed(scale)),
            self.backend,
            law,
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
        """Score horizon 1, and the joint law of the others; add the imbalance of its components."""
        conditions = at_positions(examples.targets, examples.positions)[:, :, 1:]
        terms = mixture_terms(
            unembedding,
            states._replace(first=states.first[:, : examples.near_valid.shape[1]]),
            (examples.near_targets, conditions),
            examples.weighed(scale),
            self.backend,
            detach_far="unembedding" in self.detach,
        )
        # Of all that the optimizer step sees, this batch has so much.
        part = (examples.far_valid.sum(dim=(0, 1)) / counts[1:].clamp(min=1)).mean() * examples.thinning
        unevenly = imbalance(states.log_weights, examples.far_valid.any(dim=2))
        return terms._replace(loss=terms.loss + self.balance * part.to(scale.dtype) * unevenly)

    def _check_balance(self, heads: Heads) -> None:
        """Refuse to balance components that are not there."""
        if self.balance:
            refuse(self, f"balance is {self.balance}, but {type(heads).__name__} have no components; set it to 0.")

    def _check_mixture(self, heads: Heads, inputs: Tensor | None, teacher: NextTokenLaw | None) -> None:
        """Refuse what has no meaning for the likelihood of a joint law."""
        given = {name: getattr(self, name) for name in ("distillation", "total_variation", "label_smoothing", "z_loss")}
        for name, value in given.items():
            if value:
                refuse(self, f"{name} is {value}, which the joint law of {type(heads).__name__} has not; set it to 0.")
        for name, part in (("inputs", inputs), ("a teacher", teacher)):
            if part is not None:
                refuse(
                    self, f"{name} is given, which the joint law of {type(heads).__name__} cannot use; leave it out."
                )

    def _scores_first(self, unembedding: Unembedding, first: Float[Tensor, "B T D"]) -> bool:
        """Say whether horizon 1 is scored; not in training where nothing of it is trained."""
        trained = first.requires_grad or any(part is not None and part.requires_grad for part in unembedding.matrix(0))
        return trained or not self.training or not torch.is_grad_enabled()

    def _positions(self, tokens: Tensor, length: int) -> Int[Tensor, "B P"] | None:
        if self.share_of_positions == 1.0 or not self.training:
            return None
        return sample_positions(len(tokens), length, self.share_of_positions, tokens.device)

    def _teacher(
        self,
        first: Float[Tensor, "B T D"],
        other: NextTokenLaw | None,
        positions: Int[Tensor, "B P"],
        horizons: tuple[int, ...],
    ) -> Teacher | None:
        """The next-token state for the token that each horizon predicts, where the trunk has read that far.

        Horizon 1 teaches the others, or another model teaches all.
        """
        if other is not None and self.distillation > 0.0:
            refuse(self, f"distillation is {self.distillation}, but there is a teacher already; set it to 0.")
        if other is None and self.distillation == 0.0 and self.total_variation > 0.0:
            refuse(
                self,
                f"total_variation is {self.total_variation}, but there is nobody to imitate; set distillation above 0, "
                "give a teacher, or leave it out.",
            )
        if other is None and (self.distillation == 0.0 or len(horizons) == 1):
            return None
        near = first.detach() if other is None else other.states
        length = near.shape[1]
        same = positions_of_horizon_one(positions, horizons[1:]).permute(2, 0, 1).contiguous()
        known = (same < length).flatten().to(_real(first.dtype))
        rows = torch.arange(near.shape[0], device=near.device)[:, None]
        far = near[rows, same.clamp(max=length - 1)].flatten(0, 2)
        if other is None:
            return Teacher(far, self.distillation * known, total_variation=self.total_variation)
        share = other.share * torch.cat((known.new_ones(near.shape[0] * length), known))
        return Teacher(
            torch.cat((near.flatten(0, 1), far)), share, other.matrix, other.temperature, self.total_variation
        )


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
