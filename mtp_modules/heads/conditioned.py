"""Hydra's heads: a small network per horizon, which reads all tokens up to that horizon."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.heads.common import LastStateHeads, last_hidden_state, needed_future
from mtp_modules.heads.residual import ResidualBlock


class ConditionedStep(nn.Module):
    """Add to a state the output of a network with one inner layer, which reads the state and the tokens after it.

    Args:
        d_model: Width ``D`` of the state.
        embedding_width: Width ``E`` of an embedding.
        num_tokens: How many tokens the network reads.
        width: Inner width.
    """

    def __init__(self, d_model: int, *, embedding_width: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.join = nn.Linear(d_model + num_tokens * embedding_width, width)
        self.out = nn.Linear(width, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices with variance 1/fan-in, the second smaller: horizons start close to the first."""
        nn.init.normal_(self.join.weight, std=self.join.in_features**-0.5)
        nn.init.zeros_(self.join.bias)
        nn.init.normal_(self.out.weight, std=0.1 * self.out.in_features**-0.5)

    def forward(self, hidden: Float[Tensor, "*N D"], tokens: Float[Tensor, "*N S E"]) -> Float[Tensor, "*N D"]:
        """Transform hidden states.

        Args:
            hidden: The trunk's hidden states.
            tokens: Embeddings of the tokens after each state, nearest first.
        """
        inner = self.join(torch.cat((hidden, tokens.flatten(-2)), dim=-1))
        output: Tensor = hidden + self.out(F.silu(inner))
        return output


class ConditionedHeads(LastStateHeads):
    r"""Predict each further horizon with a network of its own over the trunk's hidden state and *all* tokens between.

    Horizon 1 is the trunk's hidden state :math:`z_t` itself, so the next-token model is unchanged. Horizon :math:`h`
    computes

    .. math:: s_h = z_t + W'_h \, \mathrm{silu}(W_h [z_t; e(x_{t+1}); \dots; e(x_{t+h-1})] + b_h)

    followed by Medusa's residual blocks. The tokens are the true ones in training and the previous drafts in decoding.
    Ankner et al. 2024 (Hydra, arXiv 2402.05109), section 3; the deeper networks of the paper have ``num_layers=4``.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        width: Inner width of the first layer; ``d_model`` if ``None``.
        num_layers: Layers of each network: the first layer, then residual blocks.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``.

    Shape:
        hidden ``(B, T, D)``, future ``(B, P, H - 1, E)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1, or ``future`` is missing.

    Example:
        >>> heads = ConditionedHeads(d_model=8, num_horizons=3)
        >>> states = heads(torch.zeros(1, 5, 8), future=torch.zeros(1, 5, 2, 8))
        >>> len(states), states[2].shape
        (3, torch.Size([1, 5, 8]))
    """

    reads_future = True

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        width: int | None = None,
        num_layers: int = 1,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding_width = d_model if embedding_width is None else embedding_width
        width = d_model if width is None else width
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("width", width),
            ("num_layers", num_layers),
            ("embedding_width", self.embedding_width),
        ):
            at_least(self, name, value, 1)
        self.d_model = d_model
        steps = (
            ConditionedStep(d_model, embedding_width=self.embedding_width, num_tokens=count, width=width)
            for count in range(1, num_horizons)
        )
        self.steps = cast("Sequence[ConditionedStep]", nn.ModuleList(steps))
        stacks = (nn.Sequential(*(ResidualBlock(d_model) for _ in range(num_layers - 1))) for _ in self.steps)
        self.stacks = cast("Sequence[nn.Sequential]", nn.ModuleList(stacks))

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, len(self.steps) + 2))

    def _state(
        self, index: int, hidden: Float[Tensor, "*N D"], tokens: Float[Tensor, "*N S E"]
    ) -> Float[Tensor, "*N D"]:
        state: Tensor = self.stacks[index](self.steps[index](hidden, tokens))
        return state

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B P K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`."""
        if not self.steps:
            return (hidden,)
        future = needed_future(self, future)
        far = hidden if far_hidden is None else far_hidden
        picked = far if positions is None else at_positions(far, positions)
        return (hidden, *(self._state(index, picked, future[:, :, : index + 1]) for index in range(len(self.steps))))

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the networks; horizon 1 costs none."""
        matrices = (weight for weight in self.parameters() if weight.ndim == 2)
        return 2 * num_far * sum(matrix.numel() for matrix in matrices)

    def draft_states(
        self,
        tokens: Int[Tensor, "B N"],
        state: DecodingState,
        *,
        depth: int,
        before: Float[Tensor, "B M D"] | None,
        parents: Int[Tensor, "B N"],
        embed: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "B _ D"]:
        """Apply the next horizon's network to the last hidden state and the tokens up to each of ``tokens``."""
        own = last_hidden_state(self, state)
        path = embed(tokens)[:, :, None]
        if depth > 0:
            one = parents.shape[1] == own.scratch.shape[1] == 1
            previous = own.scratch if one else at_positions(own.scratch, parents)
            path = torch.cat((previous, path), dim=2)
        own.scratch = path
        return self._state(depth, own.last[:, None].expand(-1, tokens.shape[1], -1), path)
