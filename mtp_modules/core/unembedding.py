"""The output matrices, in one module, so that the hooks of DDP and FSDP2 see every use of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import TokenIds, is_distributed, plain_ids, refuse
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.core.shapes import Bool, Float, Int, Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Unembedding(nn.Module):
    """Turn states into logits, or directly into a loss.

    Args:
        d_model: Width ``D`` of a state.
        vocab_size: Number ``V`` of token ids.
        tied_to: Embedding whose weight is horizon 1's output matrix; a separate matrix if ``None``.
        bias: Add a bias to the logits.
        num_own: How many horizons beyond the first have an output matrix of their own; if 0, all use horizon 1's.
        num_draft_tokens: Restrict horizons beyond the first to this many tokens, scored by matrices with as many rows:
            one shared matrix if ``num_own`` is 0. See :meth:`trim`.
        trained: Initial value of all matrices and biases. Horizon 1 uses this very tensor, unless it is tied.
        transition_rank: Number ``F`` of factors behind each state beyond horizon 1; see
            :class:`~mtp_modules.core.interfaces.Heads`.

    Attributes:
        drafts_chosen: False if horizons beyond the first score few tokens that were neither chosen by :meth:`trim` nor
            loaded with weights.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        tied_to: nn.Embedding | None = None,
        bias: bool = False,
        num_own: int = 0,
        num_draft_tokens: int | None = None,
        trained: OutputMatrix | None = None,
        transition_rank: int = 0,
    ) -> None:
        super().__init__()
        self.tied = tied_to is not None
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied_to is None else tied_to.weight
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
        self.draft_tokens: Int[Tensor, " S"] | None
        self.register_buffer("draft_tokens", None if num_draft_tokens is None else torch.arange(num_draft_tokens))
        rows = vocab_size if num_draft_tokens is None else num_draft_tokens
        num_own = num_own if num_draft_tokens is None else max(1, num_own)
        self.own_weights = nn.ParameterList(torch.empty(rows, d_model) for _ in range(num_own))
        self.own_biases = nn.ParameterList(torch.empty(rows) for _ in range(num_own if bias else 0))
        self.transition = nn.Parameter(torch.empty(rows, transition_rank)) if transition_rank else None
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_note_loaded_drafts)  # type: ignore[no-untyped-call]
        if trained is not None:
            self._start_from(trained)

    def _start_from(self, trained: OutputMatrix) -> None:
        if not self.tied:
            self.weight = nn.Parameter(trained.weight)  # shares its memory
        with torch.no_grad():
            for weight in self.own_weights:
                weight.copy_(self._scored(trained.weight))
            if trained.bias is not None and self.bias is not None:
                self.bias.copy_(trained.bias)
                for bias in self.own_biases:
                    bias.copy_(self._scored(trained.bias))

    def _scored(self, rows: Tensor) -> Tensor:
        """Return the rows of the tokens that horizons beyond the first score."""
        return rows if self.draft_tokens is None else rows[self.draft_tokens]

    def reset_parameters(self) -> None:
        """Initialise the matrices with variance 1/D, except one that the embedding owns; biases and transition with 0.

        Matrices over draft tokens start as rows of horizon 1's matrix.
        """
        self.drafts_chosen = self.draft_tokens is None
        random = () if self.draft_tokens is not None else self.own_weights
        for weight in (*(() if self.tied else (self.weight,)), *random):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if self.draft_tokens is not None:
            with torch.no_grad():
                self.draft_tokens.copy_(torch.arange(len(self.draft_tokens)))
                for weight in self.own_weights:
                    weight.copy_(self._scored(self.weight))
        for added in (self.bias, self.transition, *self.own_biases):
            if added is not None:
                nn.init.zeros_(added)

    def matrix(self, horizon_index: int) -> OutputMatrix:
        """Return the output matrix of one horizon.

        Args:
            horizon_index: 0 for horizon 1.
        """
        if horizon_index == 0 or len(self.own_weights) == 0:
            return OutputMatrix(self.weight, self.bias)
        index = min(horizon_index, len(self.own_weights)) - 1  # horizons may share one matrix over draft tokens
        return OutputMatrix(self.own_weights[index], self.own_biases[index] if len(self.own_biases) else None)

    @torch.no_grad()
    def trim(self, tokens: TokenIds) -> None:
        """Restrict horizons beyond the first to these tokens, with the rows of the matrices that they have used so far.

        If they are restricted already, the new rows come from horizon 1's matrix, and what precedes them no longer
        matters to tokens that were not among them. All other tokens have probability 0 in drafts; the model's output is
        not restricted. Zhao et al. 2025 (arXiv 2502.14856).

        Args:
            tokens: Distinct token ids: a list, a range, a tensor or an array.

        Raises:
            ValueError: If there are none, a token is no whole number, is repeated or lies outside the vocabulary, or
                matrices are sharded.
        """
        vocab_size = len(self.weight)
        ids = plain_ids(self, tokens)
        for token in ids:
            if not 0 <= token < vocab_size:
                refuse(self, f"draft tokens must lie in 0..{vocab_size - 1}, got {token}.")
        if (count := len(set(ids))) == 0 or count < len(ids):
            refuse(self, f"draft tokens must be distinct and at least one, got {len(ids)}, {count} distinct.")
        if is_distributed(self.weight):
            refuse(self, "draft tokens cannot be set once the output matrix is sharded; call trim before sharding.")
        if self.draft_tokens is not None:
            old = [self.matrix(0)] * len(self.own_weights)
        else:
            old = [self.matrix(index + 1) for index in range(len(self.own_weights))] or [self.matrix(0)]
        if self.transition is not None:
            whole = self.transition.new_zeros(vocab_size, self.transition.shape[1])
            before = slice(None) if self.draft_tokens is None else self.draft_tokens
            whole[before] = self.transition
            rows = whole[torch.tensor(sorted(ids), device=whole.device)]
            self.transition = nn.Parameter(rows, self.transition.requires_grad)
        same_size = self.draft_tokens is not None and len(self.draft_tokens) == len(ids)
        self.draft_tokens, self.drafts_chosen = torch.tensor(sorted(ids), device=self.weight.device), True
        if not same_size:
            self.own_weights = _parameters_like([matrix.weight for matrix in old], len(ids))
            self.own_biases = _parameters_like([matrix.bias for matrix in old if matrix.bias is not None], len(ids))
        for weight, matrix in zip(self.own_weights, old, strict=True):
            weight.copy_(self._scored(matrix.weight))
        for bias, matrix in zip(self.own_biases, old if len(self.own_biases) else (), strict=True):
            assert matrix.bias is not None
            bias.copy_(self._scored(matrix.bias))

    def draftable(self, tokens: Int[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        """Return whether horizons beyond the first score each token.

        Args:
            tokens: Token ids.
        """
        if self.draft_tokens is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self.draft_tokens[self._draft_index(tokens)] == tokens

    def _draft_index(self, tokens: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Return the index of tokens in the ascending draft tokens; arbitrary for tokens that are not among them."""
        assert self.draft_tokens is not None
        return torch.searchsorted(self.draft_tokens, tokens).clamp_(max=len(self.draft_tokens) - 1)

    def forward(
        self,
        states: Float[Tensor, "N D"],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        backend: LinearCrossEntropy,
        teacher: Teacher | None = None,
        *,
        sizes: Sequence[int],
        detach_far: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Compute linear + cross-entropy with a backend.

        Args:
            states: States of the heads, head by head; those of horizon 1 with zeros where others have factors.
            targets: Token to predict.
            example_weights: Factor of each example in the loss.
            backend: Implementation of the operation.
            teacher: Distribution to imitate in a share of the loss.
            sizes: How many examples each horizon has.
            detach_far: Train the output matrix with horizon 1 only.
            label_smoothing: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.
            z_loss: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.

        Raises:
            ValueError: If ``detach_far`` would leave matrices untrained, or another model is the teacher although
                horizons beyond the first score only a part of the vocabulary.
        """
        matrices = [self.matrix(index) for index in range(len(sizes))]
        if detach_far and len(sizes) > 1:
            if len(self.own_weights):
                refuse(
                    self,
                    "detach_far would leave the output matrices of the horizons beyond the first untrained; "
                    "set it to false: they give horizon 1's matrix no gradient anyway.",
                )
            matrices[1:] = [self._detached()] * (len(sizes) - 1)
        beyond_first = slice(sizes[0], None)
        if self.draft_tokens is not None and len(sizes) > 1:
            targets = torch.cat((targets[: sizes[0]], self._draft_targets(targets[beyond_first])))
            teacher = self._trimmed(teacher)
        if self.transition is not None and len(sizes) > 1:
            matrices = self._with_transition(matrices, self.transition)
            if teacher is not None and teacher.matrix is None:
                teacher = self._first_as_teacher(teacher, self.transition.shape[1])
        terms = backend(
            states,
            matrices,
            sizes,
            targets,
            example_weights,
            teacher,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        if self.draft_tokens is None or len(sizes) == 1:
            return terms
        rank = torch.where(targets[beyond_first] < 0, len(self.weight), terms.rank[beyond_first])
        return terms._replace(
            rank=torch.cat((terms.rank[: sizes[0]], rank)),
            predicted=torch.cat((terms.predicted[: sizes[0]], self.draft_tokens[terms.predicted[beyond_first]])),
        )

    @staticmethod
    def _with_transition(matrices: Sequence[OutputMatrix], transition: Float[Tensor, "V F"]) -> list[OutputMatrix]:
        """Return the matrices of states with factors behind them; what horizons share stays one tensor."""
        wide: dict[int, Tensor] = {}
        for weight, _ in matrices[1:]:
            if id(weight) not in wide:
                wide[id(weight)] = torch.cat((weight, transition), dim=1)
        near = matrices[0].weight
        if id(near) not in wide:
            like = transition if len(near) == len(transition) else near[:, :1].expand(-1, transition.shape[1])
            wide[id(near)] = torch.cat((near, torch.zeros_like(like)), dim=1)
        return [OutputMatrix(wide[id(weight)], bias) for weight, bias in matrices]

    def _first_as_teacher(self, teacher: Teacher, num_factors: int) -> Teacher:
        """Return horizon 1 as the teacher, with the narrow matrix; if it is sharded, the wide one, and zeros."""
        if is_distributed(self.weight):
            return replace(teacher, states=F.pad(teacher.states, (0, num_factors)))
        return replace(teacher, matrix=self._detached())

    def _detached(self) -> OutputMatrix:
        """Return horizon 1's matrix without gradient."""
        return OutputMatrix(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def _draft_targets(self, targets: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Return each target's index in the draft tokens; -1 if it is not among them."""
        return torch.where(self.draftable(targets), self._draft_index(targets), -1)

    def _trimmed(self, teacher: Teacher | None) -> Teacher | None:
        """Return horizon 1 as the teacher, with its distribution restricted to the draft tokens."""
        if teacher is None:
            return None
        if teacher.matrix is not None:
            refuse(
                self,
                "another model's distribution covers all tokens, but horizons beyond the first score a part of them; "
                "leave out num_draft_tokens or the teacher.",
            )
        weight, bias = self._detached()
        return replace(teacher, matrix=OutputMatrix(self._scored(weight), None if bias is None else self._scored(bias)))

    def logits(self, states: Float[Tensor, "*N D"], horizon_index: int = 0) -> Float[Tensor, "*N V"]:
        """Return the logits of one horizon; gathered if the matrix is sharded over the vocabulary.

        Tokens that the horizon does not score get minus infinity.

        Args:
            states: States of its head.
            horizon_index: 0 for horizon 1.
        """
        weight, bias = self.matrix(horizon_index)
        if not is_distributed(weight):
            if horizon_index == 0 or self.transition is None:
                logits = F.linear(states, weight, bias)
            else:
                width = weight.shape[1]
                logits = F.linear(states[..., :width], weight, bias) + F.linear(states[..., width:], self.transition)
            if horizon_index == 0 or self.draft_tokens is None:
                return logits
            full = logits.new_full((*logits.shape[:-1], len(self.weight)), -torch.inf)
            return full.index_copy_(-1, self.draft_tokens, logits)
        from torch.distributed.tensor import DTensor, Replicate  # this import takes a second, so it is made on demand

        if horizon_index and self.transition is not None:
            weight = torch.cat((weight, self.transition), dim=1)
        mesh = cast("DTensor", weight).device_mesh
        replicated = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
        gathered: Tensor = cast("DTensor", F.linear(replicated, weight, bias)).full_tensor()
        return gathered


def _parameters_like(old: Sequence[Tensor], rows: int) -> nn.ParameterList:
    """Return uninitialised parameters with another number of rows; each requires a gradient if the old one does."""
    new = (nn.Parameter(tensor.new_empty(rows, *tensor.shape[1:]), tensor.requires_grad) for tensor in old)
    return nn.ParameterList(new)


def _note_loaded_drafts(unembedding: nn.Module, _: object) -> None:
    """Note that the draft tokens are those that came with the weights."""
    unembedding.drafts_chosen = True  # type: ignore[assignment]
