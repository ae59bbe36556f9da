"""EAGLE-3's heads: one autoregressive layer over fused hidden states of several trunk layers."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions, same_document_keys
from mtp_modules.heads.common import needed_features
from mtp_modules.heads.fused_module import SideBySideModule
from mtp_modules.heads.sequential import SequentialHeads
from mtp_modules.heads.sequential_module import SequentialModule
from mtp_modules.heads.sequential_state import SequentialState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions


class FusedFeatureHeads(Heads):
    r"""Draft with one transformer layer that continues a sequence of fused features with its own outputs.

    Horizon 1 is the trunk's hidden state itself. A matrix fuses the features of a low, a middle and a high layer,
    :math:`g_t = W [l_t; m_t; h_t]`, and the layer reads the sequence of :math:`[e(x_{t+1}); g_t]`. Its output at
    position :math:`t` is the state of horizon 2. The output also replaces the unknown feature :math:`g_{t+1}` in the
    input of horizon 3, and so on: the layer reads the features of the text up to :math:`t`, then its own outputs.
    Training takes the same steps, so it sees the inputs of drafting ("training-time test"). Li et al. 2025 (EAGLE-3,
    arXiv 2503.01840), section 3.

    Decoding is that of :class:`SequentialHeads` with one shared module, with fused features instead of the trunk's
    hidden states.

    Args:
        d_model: Width ``D`` of the trunk's hidden states and features.
        num_horizons: How many future tokens ``H`` each position is trained to predict; drafting can go further.
        num_heads: Query heads of the layer.
        num_features: How many inner layers of the trunk are fused; the trunk's ``feature_layers`` must name as many.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layer; 8/3 of ``d_model``, rounded up to a multiple of 64, if
            ``None``.
        max_positions: Maximum sequence length.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``.
        rope_base: Base of the rotary positions.
        norm_gain: Initial gain of the norm after the layer. For a pretrained trunk, use the root mean square of its
            hidden states (2.2 for SmolLM2-135M), the scale that its output matrix expects.
        merge: Map token and state by one matrix to the layer's input. If false, as in released checkpoints, the layer
            attends over both side by side and adds to the state.
        norm_before_residual: With ``merge=False``, add to the normalised state.
        norm_before_fc: Normalise the concatenated features before they are fused, with one norm.
        fc_norm: Normalise the features of each layer before they are fused, with a norm each (EAGLE-3.1).
        norm_output: Continue the sequence with outputs after the last norm, not before it (EAGLE-3.1).
        norm_eps: Added to the mean square in every norm.
        head_dim: With ``merge=False``, width of one attention head; ``d_model / num_heads`` if ``None``.

    Shape:
        hidden and features ``(B, T, D)``, future ``(B, T, H - 1, E)`` -> horizon 1 ``(B, T, D)``, the others
        ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide, there are two norms of the features, or a norm of a
            residual or a width of attention heads that the merged layer does not have; if ``future`` or ``features``
            are missing, or a sequence is longer than ``max_positions``.

    Example:
        >>> heads = FusedFeatureHeads(d_model=32, num_horizons=3, num_heads=4, max_positions=64)
        >>> features = (torch.zeros(1, 5, 32),) * 3
        >>> states = heads(torch.zeros(1, 5, 32), future=torch.zeros(1, 5, 2, 32), features=features)
        >>> len(states), states[2].shape
        (3, torch.Size([1, 5, 32]))
    """

    reads_future = True
    reads_every_token = True
    fuse: nn.Linear

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_heads: int,
        num_features: int = 3,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        max_positions: int = 2048,
        embedding_width: int | None = None,
        rope_base: float = 10000.0,
        norm_gain: float = 1.0,
        merge: bool = True,
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        norm_eps: float = 1e-6,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_heads", num_heads),
            ("num_features", num_features),
            ("max_positions", max_positions),
        ):
            at_least(self, name, value, 1)
        if norm_before_fc and fc_norm:
            refuse(self, "norm_before_fc and fc_norm both normalise the features; leave one of the two out.")
        if norm_before_residual and merge:
            refuse(self, "norm_before_residual needs a layer that adds to the state; set merge to false.")
        if head_dim is not None and merge:
            refuse(self, f"head_dim={head_dim} needs a layer that attends over both side by side; set merge to false.")
        self.drafter = SequentialHeads(
            d_model=d_model,
            num_horizons=min(2, num_horizons),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_width=ffn_width,
            max_positions=max_positions + num_horizons,
            embedding_width=embedding_width,
            shared=True,
            rope_base=rope_base,
            norm_gain=norm_gain,
            chain_norm=norm_output,
            norm_eps=norm_eps,
        )
        self.d_model, self.num_horizons, self.num_features = d_model, num_horizons, num_features
        self.max_positions, self.embedding_width = max_positions, self.drafter.embedding_width
        if num_horizons == 1:
            return  # nothing to draft, so nothing to fuse
        if not merge:
            side_by_side = SideBySideModule(
                d_model,
                embedding_width=self.embedding_width,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                ffn_width=ffn_width,
                norm_before_residual=norm_before_residual,
                norm_eps=norm_eps,
                head_dim=head_dim,
            )
            self.drafter.steps = cast("Sequence[SequentialModule]", nn.ModuleList([side_by_side]))
            if head_dim is not None:
                self.drafter.rotary = RotaryPositions(head_dim, max_positions + 2 * num_horizons, base=rope_base)
        widths = [num_features * d_model] if norm_before_fc else [d_model] * num_features if fc_norm else []
        self.feature_norms = nn.ModuleList(RMSNorm(width, eps=norm_eps) for width in widths)
        self.fuse = nn.Linear(num_features * d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the fusing matrix with variance 1/fan-in; the layer resets itself."""
        if self.num_horizons > 1:
            nn.init.normal_(self.fuse.weight, std=self.fuse.in_features**-0.5)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, self.num_horizons + 1))

    @property
    def max_drafts(self) -> int | None:
        """Any number: the layer can be repeated."""
        return self.drafter.max_drafts

    def _fused(self, features: tuple[Tensor, ...] | None) -> Float[Tensor, "B T D"]:
        features = needed_features(self, features)
        if len(self.feature_norms) == len(features) > 1:
            features = tuple(norm(part) for norm, part in zip(self.feature_norms, features, strict=True))
        joined = torch.cat(features, dim=-1)
        if len(self.feature_norms) == 1:
            joined = self.feature_norms[0](joined)
        fused: Tensor = self.fuse(joined)
        return fused

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B _ K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        features: tuple[Float[Tensor, "B T D"], ...] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`.

        A position sees the fused features up to its own, followed by the layer's outputs for that position.
        """
        length, device = hidden.shape[1], hidden.device
        within_positions(self, length, self.max_positions, "heads")
        if self.num_horizons == 1:
            return (hidden,)
        if future is None or future.shape[1] != length:
            given = "none" if future is None else f"those of {future.shape[1]}"
            refuse(
                self, f"future must hold the next tokens of all {length} positions, got {given}; MTPModel passes it."
            )
        every = torch.arange(length, device=device).expand(len(hidden), -1)
        picked = every if positions is None else positions
        if document_ids is None:
            mask = (every[:, None] <= picked[:, :, None])[:, None]
        else:
            mask = at_positions(same_document_keys(document_ids), picked)[:, None]
        step, norm = self.drafter.steps[0], self.drafter.norms[0]
        layer, attention, rotary = step.layer, step.layer.attention, self.drafter.rotary
        picked_future = at_positions(future, picked)
        x, inner = step.enter(self._fused(features), future[:, :, 0])
        queries, keys, values = attention.project(layer.attention_norm(inner), rotary(None, length, hidden))
        if positions is not None:
            x, inner = at_positions(x, picked), at_positions(inner, picked)
            queries, _, _ = attention.project(layer.attention_norm(inner), rotary(picked, picked.shape[1], hidden))
        own = torch.eye(picked.shape[1], dtype=torch.bool, device=device).expand(len(hidden), 1, -1, -1)
        states = [hidden]
        for index in range(self.num_horizons - 1):
            if index:
                x, inner = step.enter(states[-1] if self.drafter.chain_norm else x, picked_future[:, :, index])
                table = rotary(picked + index, picked.shape[1], hidden)
                queries, own_keys, own_values = attention.project(layer.attention_norm(inner), table)
                keys, values = torch.cat((keys, own_keys), dim=2), torch.cat((values, own_values), dim=2)
                mask = torch.cat((mask, own), dim=3)
            x = x + attention.attend(queries, keys, values, attention.folded(mask))
            x = x + layer.ffn(layer.ffn_norm(x))
            states.append(norm(x))
        return tuple(states)

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return ``hidden`` itself."""
        return hidden

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of fusing and of all steps; horizon 1 costs none."""
        if num_far == 0 or self.num_horizons == 1:
            return 0
        step, steps = self.drafter.steps[0], self.num_horizons - 1
        first = (2 * self.fuse.weight.numel() + step.joining_flops) * length + step.layer.flops(num_far, length)
        repeated = step.joining_flops * num_far + step.layer.flops(num_far, num_far)
        attended = (
            4
            * step.layer.attention.out.in_features
            * num_far
            * sum(length + (index - 1) * num_far for index in range(1, steps))
        )
        return first + (steps - 1) * repeated + attended

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> DecodingState:
        """Make an empty state."""
        return self.drafter.new_state(batch_size, capacity, for_drafts=for_drafts)

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        features: tuple[Float[Tensor, "B T D"], ...] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk, and return the states of horizon 1."""
        fused = self._fused(features) if isinstance(state, SequentialState) else hidden  # unused: for_drafts=False
        self.drafter.read(fused, state, tokens=tokens, embed=embed)
        return hidden

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
        """Run the layer over the last emitted token and all drafts up to each of ``tokens``."""
        return self.drafter.draft_states(tokens, state, depth=depth, before=before, parents=parents, embed=embed)
