"""What this package decodes with a model: the tokens and accepted drafts that an engine is compared with."""

from typing import Any, NamedTuple

import torch

from mtp_modules import AutoregressiveDecoder, MTPModel, SequentialHeads, SpeculativeDecoder, build, describe

PROMPTS = ("import os\n\ndef ", "class Foo(object):\n    def __init__", "    return self._", "    if not isinstance(")


class Ours(NamedTuple):
    """Counts over all prompts.

    Attributes:
        tokens: Plain greedy decoding of each prompt.
        rounds: How many rounds verified drafts.
        accepted: How many drafts were accepted at each depth.
    """

    tokens: list[list[int]]
    rounds: int
    accepted: list[int]


ZERO_FIRST = ("glm", "deepseek", "mimo")
"""Formats whose modules vLLM gives zero for the embedding at position 0."""
BEFORE_NORM = ("mimo",)
"""Formats whose modules vLLM gives the trunk's state before its final norm."""


def as_served(model: MTPModel, format: str) -> MTPModel:
    """Return a model that drafts as vLLM does with the folder of a format.

    A module for several drafts has one KV cache there, not one for each draft: heads of two horizons that draft more do
    just that. What else it does otherwise is done to the module's input.

    Args:
        model: The model.
        format: Of the folder.
    """
    described = describe(model)
    if not (isinstance(model.heads, SequentialHeads) and model.heads.shared):
        return model
    described["init_args"]["heads"]["init_args"]["num_horizons"] = 2
    made: MTPModel = build(described, trusted=("mtp_modules",), role=MTPModel)
    made.load_state_dict(model.state_dict())
    made.eval()
    heads: Any = made.heads
    read, gains = heads.read, made.trunk.norm.weight.detach()

    def as_theirs(hidden: torch.Tensor, state: Any, *, tokens: torch.Tensor, embed: Any) -> torch.Tensor:
        starts = max(state.lengths) == 0 and tokens.shape[1] > 1

        def embedded(ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = embed(ids)
            if starts and format in ZERO_FIRST:
                found = torch.cat((found[:, :1], torch.zeros_like(found[:, :1]), found[:, 2:]), dim=1)
            return found

        read(hidden / gains if format in BEFORE_NORM else hidden, state, tokens=tokens, embed=embedded)
        return hidden

    heads.read = as_theirs
    return made


def decode(model: MTPModel, prompts: list[list[int]], max_tokens: int, format: str = "") -> Ours:
    """Decode greedily, without drafts and with them, in the rounds of an engine.

    An engine reads a prompt and emits a token, then drafts in every round, in the last one too, whose tokens may exceed
    the budget.

    Args:
        model: The model.
        prompts: Token ids.
        max_tokens: Budget of each prompt.
        format: Of the folder that the engine has read.
    """
    tokens = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=max_tokens).tokens
    depth, rounds, served = len(model.horizons) - 1, 0, as_served(model, format)
    accepted, decoder = [0] * depth, SpeculativeDecoder(num_drafts=depth)
    for prompt in prompts:
        emitted = 0
        for made in decoder.stream(served, [prompt], max_new_tokens=max_tokens + 2 * depth + 2):
            if emitted >= max_tokens:
                break
            if emitted:
                rounds += 1
                for place in range(int(made.arrays.accepted[0])):
                    accepted[place] += 1
            emitted += int(made.arrays.counts[0])
    return Ours(tokens, rounds, accepted)


@torch.no_grad()
def drafted(model: MTPModel, prompt: list[int]) -> dict[str, Any]:
    """Return one chain of greedy drafts after a prompt and the next token, and what it is made from.

    Args:
        model: A model whose heads read inner layers of the trunk.
        prompt: Token ids.

    Returns:
        The trunk's ``features``, the ``token`` after the prompt, the ``count`` of drafts, and ``ours``: their tokens,
        their logits over the draft vocabulary, and their confidence.
    """
    tokens, heads = torch.tensor([prompt]), model.heads
    output = model.trunk(tokens)
    state = heads.new_state(1, len(prompt) + len(model.horizons))
    state.begin(len(prompt))
    heads.read(output.hidden, state, tokens=tokens, embed=model.trunk.embedding, features=output.features)
    state.commit([len(prompt)])
    token, count = model.unembedding.logits(output.hidden)[:, -1].argmax(-1), len(model.horizons) - 1
    draft = heads.draft(token, state, num_drafts=count, embed=model.trunk.embedding, unembed=model.unembedding.logits)
    assert draft.logits is not None
    ids = model.unembedding.draft_tokens
    ours = {
        "tokens": draft.tokens[0].tolist(),
        "logits": (draft.logits[0] if ids is None else draft.logits[0, :, ids]).tolist(),
        "confidence": [] if draft.confidence is None else draft.confidence[0].tolist(),
    }
    return {"features": torch.cat(output.features, -1)[0].tolist(), "token": int(token), "count": count, "ours": ours}


@torch.no_grad()
def distributions(model: MTPModel, prompt: list[int]) -> list[torch.Tensor]:
    """Return the exact distributions of the first and of the second token after a prompt, sampled at temperature 1.

    Args:
        model: The model.
        prompt: Token ids.
    """
    double = model.double()
    vocab = model.trunk.vocab_size
    first = double.unembedding.logits(double.heads.first(double.trunk(torch.tensor([prompt])).hidden))[0, -1].softmax(
        -1
    )
    every = torch.cat((torch.tensor([prompt]).expand(vocab, -1), torch.arange(vocab)[:, None]), dim=1)
    second = double.unembedding.logits(double.heads.first(double.trunk(every).hidden))[:, -1].softmax(-1)
    return [first, first @ second]


def distance(counts: dict[str, int], expected: torch.Tensor) -> tuple[float, float]:
    """Return how far samples are from a distribution, and how far they may be by chance.

    Pearson's statistic over the tokens that are expected at least five times, the others together, against the mean and
    six standard deviations of its distribution.

    Args:
        counts: How often each token was sampled.
        expected: Probability of each token.
    """
    total = sum(counts.values())
    observed = torch.zeros(len(expected), dtype=torch.float64)
    for token, count in counts.items():
        observed[int(token)] = count
    common = expected * total >= 5
    groups: Any = [
        torch.cat((part[common].double(), part[~common].double().sum()[None])) for part in (observed, expected * total)
    ]
    statistic = ((groups[0] - groups[1]) ** 2 / groups[1].clamp_min(1e-9)).sum().item()
    freedom = int(common.sum())
    return statistic, freedom + 6 * (2 * freedom) ** 0.5
