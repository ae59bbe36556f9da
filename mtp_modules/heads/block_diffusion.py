"""Block diffusion heads: masked denoising of the next block of tokens."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.heads.common import LastStateHeads, last_hidden_state, needed_future
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer


class Denoised(NamedTuple):
    """Intermediate results of the drafts of a round.

    Attributes:
        tokens: ``(B, N, S, D)``, layer inputs of the last emitted token and of the drafts up to each of ``N``.
        states: ``(B, N, G, D)``, states of the slots that the last step has denoised.
    """

    tokens: Float[Tensor, "B N S D"]
    states: Float[Tensor, "B N G D"]


class BlockDiffusionHeads(LastStateHeads):
    r"""Denoise the block of tokens that follow the next one, in a few steps from left to right.

    Horizon 1 is the trunk's hidden state :math:`h_t` itself. A small transformer without a causal mask reads
    :math:`[h_t, x_{t+1}, y_2 \dots y_H]`, where :math:`y_k` is a mask or, once it is known, the token
    :math:`x_{t+k}`, and predicts the token of each masked slot. With one step all slots are masked and are denoised
    together, as in DFlash (arXiv 2602.06036) but without its context. With more, each step denoises the next few slots,
    given those of earlier steps: block diffusion (Arriola et al. 2025, BD3-LM, arXiv 2503.09573) in the order of the
    text.

    The tokens of one step are sampled independently, so the distribution that a draft is sampled from is its
    distribution given all previous drafts, which verification needs. If a step unmasked the most confident slot first,
    the distribution of a token given the tokens before it would be unknown. Training uses the same masks as drafting,
    with one pass per step.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_heads: Query heads per layer.
        num_steps: In how many steps a block is denoised, from 1 to ``H - 1``.
        num_layers: Layers of the denoiser.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layers; 8/3 of ``d_model``, rounded up to a multiple of 64, if
            ``None``.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``.

    Shape:
        hidden ``(B, T, D)``, future ``(B, P, H - 1, E)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide, there are more steps than tokens to denoise, or ``future``
            is missing.

    Example:
        >>> heads = BlockDiffusionHeads(d_model=32, num_horizons=5, num_heads=4, num_steps=2)
        >>> states = heads(torch.zeros(1, 6, 32), future=torch.zeros(1, 6, 4, 32))
        >>> len(states), states[4].shape
        (5, torch.Size([1, 6, 32]))
    """

    reads_future = True
    from_state: nn.Linear
    from_token: nn.Linear

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_heads: int,
        num_steps: int = 1,
        num_layers: int = 1,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding_width = d_model if embedding_width is None else embedding_width
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_heads", num_heads),
            ("num_steps", num_steps),
            ("num_layers", num_layers),
            ("embedding_width", self.embedding_width),
        ):
            at_least(self, name, value, 1)
        self.d_model, self.num_horizons = d_model, num_horizons
        slots = num_horizons - 1
        if num_horizons > 1 and num_steps > slots:
            refuse(self, f"num_steps must lie in 1..{slots} for {num_horizons} horizons, got {num_steps}.")
        self.bounds = [slots * step // num_steps for step in range(num_steps + 1)]
        """Step ``i`` denoises the slots from ``bounds[i]`` up to, not including, ``bounds[i + 1]``."""
        if num_horizons == 1:
            return  # nothing to denoise
        self.from_state = nn.Linear(d_model, d_model, bias=False)
        self.from_token = nn.Linear(self.embedding_width, d_model, bias=False)
        self.mask = nn.Parameter(torch.empty(d_model))
        self.rotary = RotaryPositions(d_model // num_heads, slots + 2)
        layers = (
            TransformerLayer(
                d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn_width=ffn_width, depth=num_layers
            )
            for _ in range(num_layers)
        )
        self.layers = cast("Sequence[TransformerLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the input maps with variance 1/fan-in, the mask with variance 1; the layers reset themselves."""
        if self.num_horizons > 1:
            nn.init.normal_(self.from_state.weight, std=self.from_state.in_features**-0.5)
            nn.init.normal_(self.from_token.weight, std=self.from_token.in_features**-0.5)
            nn.init.normal_(self.mask)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, self.num_horizons + 1))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The denoiser's layers."""
        return tuple(self.layers) if self.num_horizons > 1 else ()

    def _denoise(self, state: Float[Tensor, "N D"], known: Float[Tensor, "N S D"], step: int) -> Float[Tensor, "N G D"]:
        """Return the states of the slots that a step denoises.

        Args:
            state: Layer input of the trunk's hidden state.
            known: Layer inputs of the next token and of the tokens denoised so far.
            step: Index of the step.
        """
        low, high = self.bounds[step], self.bounds[step + 1]
        masks = self.mask.expand(len(state), self.num_horizons - 1 - low, -1)
        x = torch.cat((state[:, None], known, masks), dim=1)
        length = x.shape[1]
        table = self.rotary(None, length, x)
        full_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, table, full_mask)
        states: Tensor = self.norm(x[:, 2 + low : 2 + high])
        return states

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
        if self.num_horizons == 1:
            return (hidden,)
        future = needed_future(self, future)
        far = hidden if far_hidden is None else far_hidden
        picked = far if positions is None else at_positions(far, positions)
        state, tokens = self.from_state(picked).flatten(0, 1), self.from_token(future).flatten(0, 1)
        steps = range(len(self.bounds) - 1)
        states = [self._denoise(state, tokens[:, : 1 + self.bounds[step]], step) for step in steps]
        return (hidden, *torch.cat(states, dim=1).view(*picked.shape[:2], -1, self.d_model).unbind(dim=2))

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of one pass of the denoiser per step; horizon 1 costs none."""
        if self.num_horizons == 1:
            return 0
        inputs = self.from_state.weight.numel() + (self.num_horizons - 1) * self.from_token.weight.numel()
        block = self.num_horizons + 1
        one_pass = sum(layer.flops(block, block) for layer in self.layers)
        return num_far * (2 * inputs + (len(self.bounds) - 1) * one_pass)

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
        """Return the next slot's states; run the denoiser if a step begins with that slot."""
        own, new = last_hidden_state(self, state), self.from_token(embed(tokens))[:, :, None]
        if depth == 0:
            known, states = new, None
        else:
            known = torch.cat((at_positions(own.scratch.tokens, parents), new), dim=2)
            states = at_positions(own.scratch.states, parents)
        if depth in self.bounds:
            step = self.bounds.index(depth)
            last = self.from_state(own.last)[:, None].expand(-1, tokens.shape[1], -1)
            states = self._denoise(last.flatten(0, 1), known.flatten(0, 1), step).view(*tokens.shape, -1, self.d_model)
        assert states is not None
        own.scratch = Denoised(known, states)
        return states[:, :, depth - max(bound for bound in self.bounds if bound <= depth)]
