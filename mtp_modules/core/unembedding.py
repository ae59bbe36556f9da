"""The output matrices, in one module, so that hooks of DDP and FSDP2 see every use of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import is_distributed, refuse
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.core.shapes import Bool, Float, Int, Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Unembedding(nn.Module):
    """Turn states into logits, or straight into a loss.

    Args:
        d_model: Width ``D`` of a state.
        vocab_size: Number ``V`` of token ids.
        tied_to: Embedding whose weight is horizon 1's output matrix; a matrix of its own if ``None``.
        bias: Add a bias to the logits.
        num_own: How many horizons beyond the first have an output matrix of their own; if 0, all use horizon 1's.
        num_draft_tokens: Let horizons beyond the first score so many tokens only, by matrices with so few rows: one for
            all of them if ``num_own`` is 0. See :meth:`trim`.
        trained: What all matrices and biases start from. Horizon 1's is this very tensor, unless it is tied to another.

    Attributes:
        drafts_chosen: False where horizons beyond the first score few tokens, and which these are was neither told by
            :meth:`trim` nor loaded with weights.
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
        """Return those rows that horizons beyond the first score."""
        return rows if self.draft_tokens is None else rows[self.draft_tokens]

    def reset_parameters(self) -> None:
        """Draw the matrices with variance 1/D, but not one that the embedding owns; biases are 0.

        Matrices of few tokens start as rows of horizon 1's.
        """
        self.drafts_chosen = self.draft_tokens is None
        drawn = () if self.draft_tokens is not None else self.own_weights
        for weight in (*(() if self.tied else (self.weight,)), *drawn):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if self.draft_tokens is not None:
            with torch.no_grad():
                self.draft_tokens.copy_(torch.arange(len(self.draft_tokens)))
                for weight in self.own_weights:
                    weight.copy_(self._scored(self.weight))
        for bias in (*(() if self.bias is None else (self.bias,)), *self.own_biases):
            nn.init.zeros_(bias)

    def matrix(self, horizon_index: int) -> OutputMatrix:
        """Return the output matrix of one horizon.

        Args:
            horizon_index: 0 for horizon 1.
        """
        if horizon_index == 0 or len(self.own_weights) == 0:
            return OutputMatrix(self.weight, self.bias)
        place = min(horizon_index, len(self.own_weights)) - 1  # few tokens: one matrix for all, if there is but one
        return OutputMatrix(self.own_weights[place], self.own_biases[place] if len(self.own_biases) else None)

    @torch.no_grad()
    def trim(self, tokens: Sequence[int]) -> None:
        """Let horizons beyond the first score these tokens only, by rows of the matrices that they have used so far.

        Once trimmed, they take rows of horizon 1's matrix. Everything else is impossible for a draft, never for the
        output. Zhao et al. 2025 (arXiv 2502.14856).

        Args:
            tokens: Different token ids.

        Raises:
            ValueError: If there are none, one comes twice or lies outside the vocabulary, or matrices are sharded.
        """
        vocab_size = len(self.weight)
        for token in tokens:
            if not 0 <= token < vocab_size:
                refuse(self, f"draft tokens must lie in 0..{vocab_size - 1}, got {token}.")
        if (count := len(set(tokens))) == 0 or count < len(tokens):
            refuse(
                self, f"draft tokens must be different and at least one, got {len(tokens)}, {count} of them different."
            )
        if is_distributed(self.weight):
            refuse(self, "the output matrix is sharded, and drafts cannot be trimmed; do it before.")
        if self.draft_tokens is not None:
            old = [self.matrix(0)] * len(self.own_weights)
        else:
            old = [self.matrix(index + 1) for index in range(len(self.own_weights))] or [self.matrix(0)]
        same_size = self.draft_tokens is not None and len(self.draft_tokens) == len(tokens)
        self.draft_tokens, self.drafts_chosen = torch.tensor(sorted(tokens), device=self.weight.device), True
        if not same_size:
            self.own_weights = _parameters_like([matrix.weight for matrix in old], len(tokens))
            self.own_biases = _parameters_like([matrix.bias for matrix in old if matrix.bias is not None], len(tokens))
        for weight, matrix in zip(self.own_weights, old, strict=True):
            weight.copy_(self._scored(matrix.weight))
        for bias, matrix in zip(self.own_biases, old if len(self.own_biases) else (), strict=True):
            assert matrix.bias is not None
            bias.copy_(self._scored(matrix.bias))

    def draftable(self, tokens: Int[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        """Return which tokens horizons beyond the first can score.

        Args:
            tokens: Token ids.
        """
        if self.draft_tokens is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self.draft_tokens[self._places(tokens)] == tokens

    def _places(self, tokens: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Return where tokens stand among the draft tokens, which ascend; anywhere if they do not."""
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
        """Linear + cross-entropy, as the backend does it.

        Args:
            states: What the heads made, head by head.
            targets: Token to predict.
            example_weights: Factor of each example in the loss.
            backend: How to compute it.
            teacher: Share the loss with this law.
            sizes: How many examples each horizon has.
            detach_far: Train the output matrix by horizon 1 alone.
            label_smoothing: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.
            z_loss: See there too.

        Raises:
            ValueError: If ``detach_far`` would leave matrices without any training, or another model teaches where
                horizons beyond the first score a part of the vocabulary.
        """
        matrices = [self.matrix(index) for index in range(len(sizes))]
        if detach_far and len(sizes) > 1:
            if len(self.own_weights):
                refuse(
                    self,
                    "detach_far would leave the output matrices of the horizons beyond the first untrained; "
                    "set it to false, for they give horizon 1's matrix no gradient anyway.",
                )
            far = OutputMatrix(self.weight.detach(), None if self.bias is None else self.bias.detach())
            matrices[1:] = [far] * (len(sizes) - 1)
        behind = slice(sizes[0], None)
        if self.draft_tokens is not None and len(sizes) > 1:
            targets = torch.cat((targets[: sizes[0]], self._as_places(targets[behind])))
            teacher = self._trimmed(teacher)
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
        rank = torch.where(targets[behind] < 0, len(self.weight), terms.rank[behind])
        return terms._replace(
            rank=torch.cat((terms.rank[: sizes[0]], rank)),
            predicted=torch.cat((terms.predicted[: sizes[0]], self.draft_tokens[terms.predicted[behind]])),
        )

    def _as_places(self, targets: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Return each target's place among the draft tokens; -1 where it has none."""
        return torch.where(self.draftable(targets), self._places(targets), -1)

    def _trimmed(self, teacher: Teacher | None) -> Teacher | None:
        """Return horizon 1 as a teacher of the law among the draft tokens."""
        if teacher is None:
            return None
        if teacher.matrix is not None:
            refuse(
                self,
                "another model teaches all tokens, but horizons beyond the first score a part of them; leave out "
                "num_draft_tokens or the teacher.",
            )
        bias = None if self.bias is None else self._scored(self.bias.detach())
        return replace(teacher, matrix=OutputMatrix(self._scored(self.weight.detach()), bias))

    def logits(self, states: Float[Tensor, "*N D"], horizon_index: int = 0) -> Float[Tensor, "*N V"]:
        """Return the logits of one horizon; gathered, where the matrix is sharded over the vocabulary.

        Minus infinity for tokens that the horizon does not score.

        Args:
            states: What its head made.
            horizon_index: 0 for horizon 1.
        """
        weight, bias = self.matrix(horizon_index)
        if not is_distributed(weight):
            logits = F.linear(states, weight, bias)
            if horizon_index == 0 or self.draft_tokens is None:
                return logits
            all_of_them = logits.new_full((*logits.shape[:-1], len(self.weight)), -torch.inf)
            return all_of_them.index_copy_(-1, self.draft_tokens, logits)
        from torch.distributed.tensor import DTensor, Replicate  # takes a second, so only where it is in use

        mesh = cast("DTensor", weight).device_mesh
        whole = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
        gathered: Tensor = cast("DTensor", F.linear(whole, weight, bias)).full_tensor()
        return gathered


def _parameters_like(old: Sequence[Tensor], rows: int) -> nn.ParameterList:
    """Return parameters of other lengths, trained where the old ones are."""
    new = (nn.Parameter(tensor.new_empty(rows, *tensor.shape[1:]), tensor.requires_grad) for tensor in old)
    return nn.ParameterList(new)


def _note_loaded_drafts(unembedding: nn.Module, _: object) -> None:
    """Note that the draft tokens are those that came with the weights."""
    unembedding.drafts_chosen = True  # type: ignore[assignment]
