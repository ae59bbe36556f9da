"""The loss of a joint distribution: cross-entropy of every component, then the mixture of them.

The negative log-likelihood of a mixture depends on the output matrix only through each component's log-likelihood of
the observed tokens, and its derivatives with respect to those measure each component's responsibility. So the mixture
is scored first, chunk by chunk and without gradients, and any backend of plain linear + cross-entropy then computes the
gradients, with minus the derivatives as example weights. All logits are never held at once.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.interfaces import MixtureStates
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.losses.fused import wide_logits
from mtp_modules.losses.infinities import weighted
from mtp_modules.losses.plan import default_rows


def mixture_terms(
    unembedding: Unembedding,
    states: MixtureStates,
    targets: tuple[Int[Tensor, "B T"], Int[Tensor, "B P K"]],
    weights: tuple[Float[Tensor, "B T"], Float[Tensor, "B P K"]],
    backend: LinearCrossEntropy,
    *,
    detach_far: bool = False,
) -> CrossEntropyTerms:
    """Score horizon 1, and every further horizon given the tokens before it.

    Args:
        unembedding: Turns states into logits.
        states: States of the heads.
        targets: Tokens of horizon 1, negative where there is none, and of the others, none missing: later tokens are
            conditioned on them.
        weights: Factor of each target in the loss, 0 where it does not count.
        backend: Computes the gradients.
        detach_far: Train the output matrix by horizon 1 alone.

    Returns:
        Terms of horizon 1's examples, then of each further horizon's.
    """
    (near, far), (near_weights, far_weights) = targets, weights
    num_components = states.log_weights.shape[2]
    by_head = states.components.permute(2, 0, 1, 3, 4)
    rows = torch.cat((near.flatten(), far.permute(2, 0, 1).flatten().repeat_interleave(num_components)))
    mixed = _Mixture(backend, states.log_weights.flatten(0, 1), far_weights.flatten(0, 1).T)
    return unembedding(
        torch.cat((states.first.flatten(0, 1), by_head.flatten(0, 3))),
        rows,
        F.pad(near_weights.flatten(), (0, len(rows) - near.numel())),
        mixed,
        sizes=[near.numel(), *[by_head[0, ..., 0].numel()] * len(by_head)],
        detach_far=detach_far,
    )


def imbalance(log_weights: Float[Tensor, "*N R"], counts: Bool[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation of the components' mean weights: 0 if all are equal.

    Shazeer et al. 2017 (arXiv 1701.06538), equation 6.

    Args:
        log_weights: Logarithms of weights that sum to 1.
        counts: Which of them count.
    """
    used = (log_weights.exp() * counts[..., None]).flatten(0, -2).sum(dim=0)
    mean = used / counts.sum().clamp(min=1)
    return len(mean) * mean.square().sum() - mean.sum().square()


class _Mixture(LinearCrossEntropy):
    """Backend for horizon 1's examples, and behind them all components of every further horizon's.

    Args:
        backend: Scores the examples one by one.
        log_weights: ``(M, R)``, of the mixture of each of ``M`` positions.
        weights: ``(K, M)``, factor of each position in the loss of each further horizon.
    """

    def __init__(self, backend: LinearCrossEntropy, log_weights: Tensor, weights: Tensor) -> None:
        self.backend, self.log_weights, self.weights = backend, log_weights, weights

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss, and the values that metrics need of each example."""
        near, shape = sizes[0], (len(self.weights), *self.log_weights.shape)
        components, tokens = states[near:].view(*shape, -1), targets[near:].view(shape)[..., 0]
        log_probs, rank, predicted = _scored(components, matrices[1:], tokens, self.log_weights)
        impossible, possible_log_probs = _without_impossible(log_probs)
        nll = _conditional_nll(self.log_weights, possible_log_probs)
        nll = torch.where(impossible, torch.inf, nll)
        if torch.is_grad_enabled():
            slopes = _slopes(self.log_weights.detach(), possible_log_probs, torch.where(impossible, 0.0, self.weights))
            slopes = torch.where(impossible[..., None], 0.0, slopes)
            example_weights = torch.cat((example_weights[:near], -slopes.flatten().to(example_weights.dtype)))
            terms = self.backend(states, matrices, sizes, targets, example_weights)
        else:
            terms = self.backend(states[:near], matrices[:1], sizes[:1], targets[:near], example_weights[:near])
        first = weighted(terms.nll[:near], example_weights[:near], targets[:near] >= 0).sum()
        further = weighted(nll, self.weights, torch.ones_like(impossible)).sum()
        return CrossEntropyTerms(
            # The gradient comes from the backend and the mixture's weights, the value from the mixture itself.
            loss=(terms.loss - terms.loss.detach()).nan_to_num(nan=0.0) + first + further,
            nll=torch.cat((terms.nll[:near], nll.detach().flatten().to(terms.nll.dtype))),
            rank=torch.cat((terms.rank[:near], rank.flatten())),
            predicted=torch.cat((terms.predicted[:near], predicted.flatten())),
        )


def _without_impossible(log_probs: Float[Tensor, "*K M R"]) -> tuple[Bool[Tensor, "*K M"], Float[Tensor, "*K M R"]]:
    """Return which tokens no component can give, and log-likelihoods with 0 for those: they favour no component."""
    impossible = (log_probs == -torch.inf).all(dim=-1)
    return impossible, torch.where(impossible[..., None], 0.0, log_probs)


def _conditional_nll(log_weights: Float[Tensor, "M R"], log_probs: Float[Tensor, "K M R"]) -> Float[Tensor, "K M"]:
    """Return the negative log-likelihood of each token given those before it, from differences of the joint ones."""
    joint = (log_weights + log_probs.cumsum(dim=0)).logsumexp(dim=-1)
    return torch.cat((torch.zeros_like(joint[:1]), joint[:-1])) - joint


def _slopes(
    log_weights: Float[Tensor, "M R"], log_probs: Float[Tensor, "K M R"], weights: Float[Tensor, "K M"]
) -> Float[Tensor, "K M R"]:
    """Return the derivatives of the weighted loss with respect to each component's log-likelihood of each token."""
    given = log_probs.clone().requires_grad_()
    return torch.autograd.grad((_conditional_nll(log_weights, given) * weights).sum(), given)[0]


@torch.no_grad()
def _scored(
    components: Float[Tensor, "K M R D"],
    matrices: Sequence[OutputMatrix],
    tokens: Int[Tensor, "K M"],
    log_weights: Float[Tensor, "M R"],
) -> tuple[Float[Tensor, "K M R"], Int[Tensor, "K M"], Int[Tensor, "K M"]]:
    """Return each component's log-likelihood of each token, the token's rank in the mixture, and the argmax."""
    num_components = log_weights.shape[1]
    step = max(1, default_rows(len(matrices[0].weight)) // num_components)
    found = []
    for low in range(0, len(log_weights), step):
        rows = slice(low, low + step)
        weights, columns = log_weights[rows], []
        for states, matrix, observed in zip(components, matrices, tokens, strict=True):
            component_log_probs = wide_logits(states[rows], matrix).log_softmax(dim=-1)
            mixed = (weights[:, :, None] + component_log_probs).logsumexp(dim=1)
            own = component_log_probs.gather(2, observed[rows, None, None].expand(-1, num_components, -1))[..., 0]
            rank = (mixed > mixed.gather(1, observed[rows, None])).sum(dim=1)
            columns.append((own, rank, mixed.argmax(dim=1)))
            weights = (weights + _without_impossible(own)[1]).log_softmax(dim=-1)
        found.append([torch.stack(column) for column in zip(*columns, strict=True)])
    log_probs, rank, predicted = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
    return log_probs, rank, predicted
