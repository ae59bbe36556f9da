"""DeepSeek-V3's heads: a chain of modules, each of which reads one more token."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions, same_document_keys
from mtp_modules.heads.common import needed_future, picked_rows
from mtp_modules.heads.sequential_module import ChainStep, SequentialModule
from mtp_modules.heads.sequential_state import DraftPath, SequentialState
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.last_hidden import LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions


class SequentialHeads(Heads):
    r"""Predict each further horizon with a module that reads one more token, a complete causal chain at every depth.

    Horizon 1 is the trunk's hidden state :math:`h^0_t` itself. Module :math:`k` reads the token :math:`k` ahead,

    .. math:: h^k_{1:T} = \mathrm{Layer}_k(M_k [\mathrm{norm}(e(x_{t+k})); \mathrm{norm}(h^{k-1}_t)])_{t=1:T}

    and :math:`\mathrm{norm}(h^k_t)` is the state of horizon :math:`k + 1`. Training uses the true tokens, decoding
    the previous drafts. DeepSeek-AI 2024 (arXiv 2412.19437), section 2.2. With ``shared`` a single module is applied
    repeatedly (FastMTP, Cai et al. 2025, arXiv 2509.18362), and the heads can draft beyond their horizons.

    Modules attend to their own outputs at all earlier positions. So even if only some positions are trained, all
    modules but the last compute every position.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_heads: Query heads per layer.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layers; 8/3 of ``d_model``, rounded up to a multiple of 64, if
            ``None``.
        max_positions: Maximum sequence length.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``.
        shared: Use the same module, norm included, for all horizons.
        shared_norm: Use the same norm after all modules, as Qwen3-Next does; DeepSeek-V3 has one per module.
        chain_norm: Pass the state after that norm to the next module (Qwen3-Next), not the one before it, as in the
            paper. Readers of DeepSeek-V3's own checkpoints disagree about it.
        embedding_first: Whether matrix ``M`` has the embedding's columns first (DeepSeek-V3, GLM, Qwen3-Next), or the
            state's (MiMo).
        rope_base: Base of the rotary positions.
        qk_norm: Normalise every query and key before its rotation, as Qwen3 does.
        norm_eps: Added to the mean square in every norm.
        norm_gain: Initial gain of the norm after each module. For a pretrained trunk, use the root mean square of its
            hidden states (2.2 for SmolLM2-135M), the scale that its output matrix expects.

    Shape:
        hidden ``(B, T, D)``, future ``(B, T, H - 1, E)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide, ``future`` is missing or does not cover every position, or
            a sequence is longer than ``max_positions``.

    Example:
        >>> heads = SequentialHeads(d_model=32, num_horizons=3, num_heads=4, max_positions=64)
        >>> states = heads(torch.zeros(1, 5, 32), future=torch.zeros(1, 5, 2, 32))
        >>> len(states), states[2].shape
        (3, torch.Size([1, 5, 32]))
    """

    reads_future = True
    reads_every_token = True

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        max_positions: int = 2048,
        embedding_width: int | None = None,
        shared: bool = False,
        shared_norm: bool = False,
        chain_norm: bool = False,
        embedding_first: bool = True,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding_width = d_model if embedding_width is None else embedding_width
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_heads", num_heads),
            ("max_positions", max_positions),
            ("embedding_width", self.embedding_width),
        ):
            at_least(self, name, value, 1)
        self.d_model, self.num_horizons, self.max_positions = d_model, num_horizons, max_positions
        self.shared, self.chain_norm = shared, chain_norm
        # Drafts from the last position lie in the slots after it.
        self.rotary = RotaryPositions(d_model // num_heads, max_positions + num_horizons, base=rope_base)
        count = min(1, num_horizons - 1) if shared else num_horizons - 1
        modules = (
            SequentialModule(
                d_model,
                embedding_width=self.embedding_width,
                embedding_first=embedding_first,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                ffn_width=ffn_width,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
            )
            for _ in range(count)
        )
        self.steps = cast("Sequence[SequentialModule]", nn.ModuleList(modules))
        num_norms = min(1, count) if shared_norm else count
        self.norms = nn.ModuleList(RMSNorm(d_model, eps=norm_eps, gain=norm_gain) for _ in range(num_norms))

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, self.num_horizons + 1))

    @property
    def max_drafts(self) -> int | None:
        """One per module; any number if the module is shared, because it can be repeated."""
        return None if self.shared and self.num_horizons > 1 else self.num_horizons - 1

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The modules."""
        return tuple(self.steps)

    def _step(self, index: int) -> ChainStep:
        return self.steps[min(index, len(self.steps) - 1)]

    def _out(self, index: int, chain: Float[Tensor, "*N D"]) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N D"]]:
        """Return the horizon's state and the input of the next module."""
        state: Tensor = self.norms[min(index, len(self.norms) - 1)](chain)
        return state, state if self.chain_norm else chain

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B _ K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`."""
        length = hidden.shape[1]
        within_positions(self, length, self.max_positions, "heads")
        if self.num_horizons == 1:
            return (hidden,)
        future = needed_future(self, future)
        if future.shape[1] != length:
            refuse(
                self,
                f"future holds the next tokens of {future.shape[1]} positions, but the modules attend to all of them; "
                f"pass it for all {length} positions, even if only some are trained.",
            )
        chain = hidden if far_hidden is None else far_hidden
        table = self.rotary(None, length, hidden)
        seen = None if document_ids is None else same_document_keys(document_ids)
        mask = None if seen is None else seen[:, None]
        states = [hidden]
        for index, tokens in enumerate(future.unbind(dim=2)):
            step = self._step(index)
            if positions is not None and index == self.num_horizons - 2:
                chain = step(chain, tokens, table, *self._picked(positions, seen, hidden))
                states.append(self._out(index, chain)[0])
                break
            state, chain = self._out(index, step(chain, tokens, table, mask))
            states.append(state if positions is None else at_positions(state, positions))
        return tuple(states)

    def _picked(
        self, positions: Int[Tensor, "B P"], seen: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the attention mask of some positions, the positions and their rotations."""
        rows = picked_rows(positions, seen, like.shape[1])
        return rows, positions, self.rotary(positions, positions.shape[1], like)

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return ``hidden`` itself."""
        return hidden

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the modules, of which only the last can skip positions; horizon 1 costs none."""
        count, total = self.num_horizons - 1 if num_far else 0, 0
        for index in range(count):
            step = self._step(index)
            queries = num_far if index == count - 1 else length
            total += step.joining_flops * length + step.layer.flops(queries, length)
        return total

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> DecodingState:
        """Make an empty state."""
        hidden = LastHiddenState(batch_size, capacity)
        if not for_drafts or self.num_horizons == 1:
            return hidden
        attention = self.steps[0].layer.attention
        keys_values = KeyValueState(
            batch_size,
            capacity,
            num_layers=self.num_horizons - 1,
            num_kv_heads=attention.local_kv_heads,
            head_dim=attention.head_dim,
            like=self.steps[0].state_norm.weight,
            max_positions=self.max_positions,
        )
        return SequentialState(keys_values, hidden)

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk, and return the states of horizon 1."""
        own = self._own(state)
        if isinstance(own, LastHiddenState):
            own.append(hidden)
            return hidden
        if tokens is None or embed is None:
            refuse(self, "tokens and embed are missing; pass the chunk's tokens and the trunk's embedding.")
        embedded = embed(tokens)
        table = self.rotary(own.keys_values.positions, hidden.shape[1], hidden)
        passed = [hidden]
        for index in range(own.num_modules):
            step = self._step(index)
            attention = step.layer.attention
            x, inner = step.enter(own.before_each(index, passed[-1]), embedded)
            queries, keys, values = attention.project(step.layer.attention_norm(inner), table)
            keys, values, mask = own.append(index, keys, values, attention.groups)
            if index < own.num_modules - 1:  # nothing reads the last module's output for a chunk
                x = x + attention.attend(queries, keys, values, mask)
                passed.append(self._out(index, x + step.layer.ffn(step.layer.ffn_norm(x)))[1])
        own.hidden.append(torch.cat(passed, dim=-1))
        own.path = None
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
        """Run the next module over the last emitted token and all drafts up to each of ``tokens``.

        Its keys for the last committed positions depend on these tokens, so they are computed here. Beyond ``H``, the
        last module reads its own outputs.
        """
        own = self._own(state)
        if not isinstance(own, SequentialState):
            refuse(self, "the state was made with for_drafts=False; make one for drafts.")
        index, (batch, num) = min(depth, own.num_modules - 1), tokens.shape
        step, embedded = self._step(index), embed(tokens)[:, :, None]
        first = own.last(index, self.d_model)[:, None, None]
        if depth == 0:
            inputs, embeddings = first, embedded
        else:
            assert own.path is not None
            path = own.path.of(parents)
            embeddings = torch.cat((path.tokens, embedded), dim=2)
            if depth == index:
                inputs = torch.cat((first.expand(-1, num, -1, -1), path.outputs), dim=2)
            else:
                inputs = torch.cat((path.inputs, path.outputs[:, :, -1:]), dim=2)
        layer, attention = step.layer, step.layer.attention
        x, inner = step.enter(inputs.flatten(1, 2), embeddings.flatten(1, 2))
        table = own.path.table if depth and own.path is not None else ()
        if num > 1 or not table or table[0].shape[1] <= depth:  # else a chain goes on, whose rotations are known
            count = depth + 1 if num > 1 else max(own.num_modules, depth + 1)
            table = self.rotary(own.positions_of_drafts(count, num), count * num, x)
        cos, sin = (part[:, : x.shape[1]] for part in table)
        queries, keys, values = attention.project(layer.attention_norm(inner), (cos, sin))
        keys, values, mask = own.with_drafts(index, keys, values, num)
        x = x + attention.attend(queries, keys, values, attention.folded(mask))
        x = (x + layer.ffn(layer.ffn_norm(x))).view(batch, num, depth + 1, -1)
        state_of_each, passed = self._out(index, x)
        own.path = DraftPath(inputs, embeddings, passed, table if num == 1 else ())
        return state_of_each[:, :, -1]

    def _own(self, state: DecodingState) -> SequentialState | LastHiddenState:
        if not isinstance(state, SequentialState | LastHiddenState):
            refuse(self, f"state must come from these heads' new_state, got {type(state).__name__}.")
        return state
