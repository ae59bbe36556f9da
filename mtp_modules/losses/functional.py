"""The multi-token loss without a model of this package: states or logits, and tokens."""

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.objective import CrossEntropyTerms, HorizonWeights, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Bool, Float, Int, Shaped, Tensor
from mtp_modules.losses.multi_token import MultiTokenLoss, MultiTokenModel
from mtp_modules.losses.plain import plain_terms
from mtp_modules.losses.weights import ExplicitWeights

_NAME = "multi_token_loss"


def multi_token_loss(
    states: Sequence[Float[Tensor, "B T _"]] | Float[Tensor, "H B T _"],
    tokens: Int[Tensor, "B L"],
    *,
    matrix: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    horizons: Sequence[int] | None = None,
    document_ids: Int[Tensor, "B L"] | None = None,
    loss_mask: Bool[Tensor, "B L"] | None = None,
    counts: Shaped[Tensor, " H"] | None = None,
    weights: HorizonWeights | Sequence[float] | None = None,
    backend: LinearCrossEntropy | None = None,
    distillation: float = 0.0,
    total_variation: float = 0.0,
    log_acceptance: bool = False,
    lk_eta: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossTerms:
    """Score hidden states or logits that any model has computed: :class:`~mtp_modules.MultiTokenLoss` as a function.

    With ``matrix``, states become logits chunk by chunk, so that those of all heads are never held at once. Without,
    ``states`` are logits. Their position ``t`` has read the tokens up to ``t``; nothing needs to be shifted.

    Args:
        states: One tensor per horizon, nearest first.
        tokens: Token ids that were read, and those after them as far as they are known: ``T <= L <= T +
            max(horizons)``. Where a horizon reaches beyond their end it has no target, and where they are negative
            (-100).
        matrix: Output matrix ``(V, D)``, such as ``lm_head.weight``, or one per horizon.
        bias: Bias ``(V,)`` of the logits, or one per horizon.
        horizons: Offsets of the heads, ascending from 1; 1 .. H if ``None``.
        document_ids: Which document every token belongs to; no target lies in another one.
        loss_mask: False at tokens that are no targets.
        counts: Valid targets per horizon in the whole optimizer step; only this batch if ``None``. See
            :func:`~mtp_modules.core.targets.count_targets`.
        weights: Weight of each horizon; all 1 if ``None``.
        backend: How linear + cross-entropy is computed; fused if ``None``. Only with ``matrix``.
        distillation: See :class:`~mtp_modules.MultiTokenLoss`.
        total_variation: See :class:`~mtp_modules.MultiTokenLoss`.
        log_acceptance: See :class:`~mtp_modules.MultiTokenLoss`.
        lk_eta: See :class:`~mtp_modules.MultiTokenLoss`.
        label_smoothing: See :class:`~mtp_modules.MultiTokenLoss`.
        z_loss: See :class:`~mtp_modules.MultiTokenLoss`.

    Shape:
        ``H`` states ``(B, T, D)`` with a matrix, or ``H`` logits ``(B, T, V)``; tokens ``(B, L)``.

    Returns:
        The loss, of which call ``.loss.backward()``, and unweighted figures per horizon.

    Raises:
        ValueError: If a shape does not fit the others, a token lies outside the vocabulary, the horizons do not ascend
            from 1, or an option is out of range.

    Example:
        >>> hidden, lm_head = torch.zeros(2, 8, 16), torch.zeros(50, 16)
        >>> tokens = torch.randint(50, (2, 8))
        >>> terms = multi_token_loss([hidden, hidden], tokens, matrix=lm_head)
        >>> terms.count.tolist(), round(float(terms.loss), 2)  # 2 log 50
        ([14, 12], 7.82)
    """
    given = _checked_states(states)
    offsets = tuple(range(1, len(given) + 1)) if horizons is None else tuple(horizons)
    if len(offsets) != len(given) or list(offsets) != sorted({1, *offsets}):
        refuse(
            _NAME,
            f"horizons must ascend from 1, one for each of {len(given)} states, got {list(offsets)}; give a horizon "
            "that is not to be trained the weight 0.",
        )
    matrices = None if matrix is None else _matrices(given, matrix, bias)
    output = _Output(given[0].shape[2] if matrices is None else len(matrices[0].weight), matrices)
    if matrix is None and (bias is not None or backend is not None):
        refuse(_NAME, f"{'bias' if bias is not None else 'backend'} needs a matrix; logits are taken as they are.")
    if not (weights is None or isinstance(weights, HorizonWeights)):
        weights = ExplicitWeights(values=weights)
    loss = MultiTokenLoss(
        weights=weights,
        backend=backend,
        distillation=distillation,
        total_variation=total_variation,
        log_acceptance=log_acceptance,
        lk_eta=lk_eta,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    ).eval()  # in training, a horizon 1 without gradients is not scored
    ahead = _ahead(tokens, given[0], max(offsets))
    _check_tokens(tokens, output.vocab_size)
    terms: LossTerms = loss(
        cast("MultiTokenModel", _Computed(given, offsets, output)),
        _extended(tokens, ahead, -100),
        document_ids=_like(tokens, document_ids, "document_ids", ahead),
        loss_mask=_like(tokens, loss_mask, "loss_mask", ahead),
        counts=counts,
    )
    return terms


def _checked_states(states: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """Return the states as a tuple, if they are tensors of one shape."""
    if isinstance(states, Tensor) and states.ndim != 4:
        refuse(_NAME, f"states must hold one (B, T, D) tensor per horizon, got one of shape {tuple(states.shape)}.")
    given = tuple(states)
    shapes = [tuple(state.shape) for state in given]
    if not given or any(len(shape) != 3 or shape != shapes[0] for shape in shapes):
        refuse(_NAME, f"states must hold one (B, T, D) tensor per horizon, all of one shape, got {shapes}.")
    return given


def _ahead(tokens: Tensor, state: Tensor, farthest: int) -> int:
    """Return how many tokens are not known after the last one, up to the farthest horizon of the last position."""
    rows, length = state.shape[:2]
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        refuse(
            _NAME, f"tokens must be whole numbers, got {tokens.dtype}; give the ids, not what was computed from them."
        )
    if tokens.ndim != 2 or len(tokens) != rows or not length <= tokens.shape[1] <= length + farthest:
        refuse(
            _NAME,
            f"tokens must have the shape ({rows}, {length}), or up to {farthest} tokens more in each row, got "
            f"{tuple(tokens.shape)}; give the tokens that the states were computed from, without a shift.",
        )
    return length + farthest - tokens.shape[1]


def _check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise an error for a token beyond the vocabulary, where looking waits for no device."""
    read = tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel() > 0
    if read and (high := int(tokens.max())) >= vocab_size:
        refuse(
            _NAME,
            f"token {high} is outside the vocabulary 0..{vocab_size - 1}; mark what is no target by -100.",
        )


def _extended(values: Tensor, ahead: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, ahead), value=fill)


def _like(tokens: Tensor, values: Tensor | None, name: str, ahead: int) -> Tensor | None:
    if values is None:
        return None
    if values.shape != tokens.shape:
        refuse(_NAME, f"{name} has shape {tuple(values.shape)}, tokens {tuple(tokens.shape)}; make them equal.")
    return _extended(values, ahead, 0)


class _Computed:
    """States that are there, in the form of a model."""

    def __init__(self, states: tuple[Tensor, ...], horizons: tuple[int, ...], output: "_Output") -> None:
        self.states, self.horizons, self.unembedding, self.predicts_acceptance = states, horizons, output, False

    @property
    def heads(self) -> "_Computed":
        """What has the horizons."""
        return self

    def __call__(self, tokens: Tensor, **given: Collection[str] | Tensor | None) -> tuple[Tensor, ...]:
        """Return the states."""
        return self.states


class _Output:
    """Output layer of states that are logits already, or of given matrices.

    Args:
        vocab_size: Number ``V`` of token ids.
        matrices: One per horizon; ``None`` if the states are logits.
    """

    def __init__(self, vocab_size: int, matrices: list[OutputMatrix] | None) -> None:
        self.vocab_size, self.matrices = vocab_size, matrices

    def draftable(self, tokens: Tensor) -> Tensor:
        """Return that every token is scored."""
        return torch.ones_like(tokens, dtype=torch.bool)

    def matrix(self, horizon_index: int) -> OutputMatrix | None:
        """Return the output matrix of one horizon, if there is one."""
        return None if self.matrices is None else self.matrices[horizon_index]

    def __call__(
        self,
        states: Tensor,
        targets: Tensor,
        example_weights: Tensor,
        backend: LinearCrossEntropy,
        teacher: Teacher | None = None,
        *,
        sizes: Sequence[int],
        detach_far: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Score logits, or compute linear + cross-entropy with a backend."""
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        if self.matrices is not None:
            return backend(states, self.matrices, sizes, targets, example_weights, teacher, **options)
        logits = states.to(torch.promote_types(states.dtype, torch.float32))
        if teacher is None:
            return plain_terms(logits, targets, example_weights, **options)
        near, far = slice(sizes[0]), slice(sizes[0], None)  # horizon 1 teaches all others
        taught = teacher.states.to(logits.dtype)
        parts = (
            plain_terms(logits[near], targets[near], example_weights[near], **options),
            plain_terms(logits[far], targets[far], example_weights[far], teacher, taught, **options),
        )
        nll, rank, predicted = (torch.cat(pair) for pair in zip(parts[0][1:4], parts[1][1:4], strict=True))
        return CrossEntropyTerms(parts[0].loss + parts[1].loss, nll, rank, predicted)


def _matrices(states: tuple[Tensor, ...], matrix: Any, bias: Any) -> list[OutputMatrix]:
    """Return one output matrix per horizon, if they fit the states."""
    width, count = states[0].shape[2], len(states)
    weights = _one_each("matrix", matrix, count, 2)
    biases = [None] * count if bias is None else _one_each("bias", bias, count, 1)
    vocab_size = len(weights[0])
    for weight, own in zip(weights, biases, strict=True):
        if weight.shape != (vocab_size, width):
            refuse(
                _NAME,
                f"matrix must have the shape (V, {width}) for states of that width, got {tuple(weight.shape)}; of a "
                "linear layer, give its weight.",
            )
        if own is not None and len(own) != vocab_size:
            refuse(_NAME, f"bias must hold {vocab_size} numbers, as matrix has rows, got {len(own)}.")
    return [OutputMatrix(weight, own) for weight, own in zip(weights, biases, strict=True)]


def _one_each(name: str, given: Any, count: int, dimensions: int) -> list[Any]:
    """Return one tensor per horizon."""
    parts = [given] * count if isinstance(given, Tensor) else list(given)
    if len(parts) != count or any(part.ndim != dimensions for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        refuse(_NAME, f"{name} must be one {dimensions}-D tensor, or one for each of {count} states, got {shapes}.")
    return parts
