"""Sampled tokens: speculative decoding gives what plain decoding samples, or at least the same distribution."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import (
    AutoregressiveDecoder,
    ConfidenceHeads,
    JointHeads,
    LinearHeads,
    MTPModel,
    RecurrentHeads,
    RecurrentTrunk,
    SpeculativeDecoder,
    TransformerTrunk,
    TransitionHeads,
)
from mtp_modules.decoders import (
    Acceptance,
    BlockVerification,
    ConfidentDepth,
    CostAwareDepth,
    Drafter,
    DraftPolicy,
    DraftTree,
    DynamicTree,
    ExactMatch,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    StaticTree,
    TopKAcceptance,
    TypicalAcceptance,
)
from mtp_modules.decoders.sampling import noise as noise_module
from mtp_modules.decoders.sampling.batch import BatchSampling, History
from mtp_modules.decoders.sampling.noise import gumbels, sample, uniforms
from mtp_modules.decoders.verification.functional import accept_block, accept_by_rejection
from tests.helpers import TRUNKS_WITH_EVERY_HEADS, VOCAB, float64, make_model, randomise
from tests.reference import sampling as naive

PARAMS = st.fixed_dictionaries(  # built outside: the runtime checks of the constructor draw numbers
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_k": st.sampled_from([None, 1, 3, 50]),
        "top_p": st.sampled_from([1.0, 0.9, 0.4]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.2]),
        "allowed_tokens": st.sampled_from([None, (1, 2, 5, 7)]),
    }
)


def options_for(data: st.DataObject, rows: int) -> dict[str, list]:
    """Draw a budget, sampling parameters and a seed for every row."""
    params = data.draw(st.lists(PARAMS, min_size=rows, max_size=rows), label="params")
    return {
        "max_new_tokens": data.draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows), label="budgets"),
        "sampling": [SamplingParams(**one) for one in params],
        "seed": data.draw(st.lists(st.integers(-5, 5), min_size=rows, max_size=rows), label="seeds"),
    }


TOKENS = st.integers(0, VOCAB - 1)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=3)
ACCEPTANCES: dict[str, Callable[[], Acceptance]] = {
    "match": ExactMatch,
    "rejection": RejectionSampling,
    "block": BlockVerification,
}
POLICIES: dict[str, Callable[[], DraftPolicy | None]] = {
    "fixed": lambda: None,
    "confident": lambda: ConfidentDepth(threshold=0.3),
    "cost": lambda: CostAwareDepth(explore_every=2),
}
DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "heads": lambda: None,
    "lookup": lambda: PromptLookup(num_drafts=3, longest=2),
    "both": lambda: LookupOrHeads(longest=2, shortest=1, num_lookup=5),
}


def draw_tree(data: st.DataObject, most: int) -> DraftTree:
    """Draw the shape of a tree."""
    depth = data.draw(st.integers(1, most), label="depth")
    if data.draw(st.booleans(), label="static"):
        return StaticTree(widths=data.draw(st.lists(st.integers(1, 3), min_size=depth, max_size=depth), label="widths"))
    width, nodes = data.draw(st.integers(1, 4), label="width"), data.draw(st.integers(1, 9), label="nodes")
    return DynamicTree(depth=depth, width=width, nodes=nodes)


@settings(max_examples=4 * settings.default.max_examples)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=3),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    output=st.lists(st.integers(0, 7), max_size=5),
)
def test_a_distribution_is_what_its_settings_say(params: list[dict], seed: int, ties: bool, output: list[int]) -> None:
    logits = 2 * torch.randn(len(params), 2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = logits.round() if ties else logits
    built = [SamplingParams(**one) for one in params]
    prompts, rows = [[1, 3, 3]] * len(params), BatchSampling(built, 8, torch.device("cpu"))
    history = History(prompts, 8, torch.device("cpu"))
    if output:
        history.append(torch.tensor([[*output, 2]] * len(params)), torch.full((len(params),), len(output)))
    drafts = torch.full((len(params), 1), 4)
    scores = rows.scores(logits, history.after(drafts), history.prompted)
    got = rows.probs(scores)
    for b, settings_ in enumerate(built):
        for place, said in enumerate((output, [*output, 4])):
            wanted = naive.probs(logits[b, place].tolist(), settings_, prompts[b], said)
            assert got[b, place].tolist() == pytest.approx(wanted, abs=1e-12)


def generate(
    decoder: AutoregressiveDecoder | SpeculativeDecoder,
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    **kwargs: object,
) -> list[list[int]]:
    return decoder.generate(model, prompts, **kwargs).tokens


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
@settings(max_examples=settings.default.max_examples // 8)
@given(data=st.data())
def test_exact_match_gives_the_sample_of_plain_decoding(trunk: str, heads: str, data: st.DataObject) -> None:
    model = make_model(trunk, heads, data.draw(st.integers(2, 4), label="H"), seed=data.draw(st.integers(0, 9))).eval()
    prompts = data.draw(PROMPTS, label="prompts")
    options = options_for(data, len(prompts))
    if model.trunk.supports_trees and data.draw(st.booleans(), label="tree"):
        decoder = SpeculativeDecoder(tree=draw_tree(data, len(model.horizons) - 1))
    else:
        decoder = SpeculativeDecoder(
            policy=POLICIES[data.draw(st.sampled_from(list(POLICIES)), label="policy")](),
            drafter=DRAFTERS[data.draw(st.sampled_from(list(DRAFTERS)), label="drafter")](),
        )
    together = generate(decoder, model, prompts, **options)
    assert together == generate(AutoregressiveDecoder(), model, prompts, **options)
    for row, prompt in enumerate(prompts):
        own = {name: values[row] for name, values in options.items()}
        assert generate(decoder, model, [prompt], **own) == [together[row]]


RULES = ACCEPTANCES | {"typical": TypicalAcceptance, "top_k": lambda: TopKAcceptance(top_k=3)}
REPETITIVE = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=2, max_size=4)


@pytest.mark.parametrize("acceptance", RULES)
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(acceptance: str, data: st.DataObject) -> None:
    """With any rule, drafter and policy but the one that measures time; also at the end of the context."""
    heads = data.draw(st.sampled_from(["linear", "recurrent", "parallel"]), label="heads")
    model = make_model("transformer_grouped", heads, 4)
    prompts = data.draw(REPETITIVE, label="prompts")
    model.trunk.max_positions = max(map(len, prompts)) + data.draw(st.integers(0, 12), label="room")
    options = options_for(data, len(prompts))
    decoder = SpeculativeDecoder(
        acceptance=RULES[acceptance](),
        policy=POLICIES[data.draw(st.sampled_from(["fixed", "confident"]), label="policy")](),
        drafter=DRAFTERS[data.draw(st.sampled_from(list(DRAFTERS)), label="drafter")](),
    )
    together = generate(decoder, model, prompts, **options)
    for row, prompt in enumerate(prompts):
        own = {name: values[row] for name, values in options.items()}
        assert generate(decoder, model, [prompt], **own) == [together[row]]


@pytest.mark.parametrize(("num_lookup", "threshold"), [(None, 0.3), (5, 0.3), (5, 0.8)])
@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_lookup_with_confidence_gives_a_row_what_it_gets_alone(
    acceptance: str, num_lookup: int | None, threshold: float
) -> None:
    """Drafts of one row come from the text while a neighbour's end by confidence after one or two."""
    model, differ = make_model("transformer_grouped", "recurrent", 4), 0
    decoder = SpeculativeDecoder(
        acceptance=RULES[acceptance](),
        policy=ConfidentDepth(threshold=threshold),
        drafter=LookupOrHeads(longest=2, shortest=1, num_lookup=num_lookup),
    )
    prompts = [[1, 2, 1, 2, 1], [3], [4, 5], [6, 6, 6]]
    for seed in range(6):
        options = {"max_new_tokens": 12, "sampling": SamplingParams(temperature=0.7)}
        together = generate(decoder, model, prompts, seed=seed, **options)
        alone = [
            generate(decoder, model, [prompt], seed=seed + row, **options)[0] for row, prompt in enumerate(prompts)
        ]
        differ += sum(one != other for one, other in zip(together, alone, strict=True))
    assert differ == 0


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_a_row_does_not_depend_on_a_neighbour_at_the_end_of_the_context(acceptance: str) -> None:
    model = make_model("transformer_grouped", "recurrent", 4).eval()
    model.trunk.max_positions = 14
    decoder, params = SpeculativeDecoder(acceptance=ACCEPTANCES[acceptance]()), SamplingParams(temperature=1.5)
    prompts = [[1, 2], [3] * 11]
    for seed in range(20):
        options = {"max_new_tokens": 9, "sampling": params}
        together = generate(decoder, model, prompts, seed=seed, **options)
        assert together[:1] == generate(decoder, model, prompts[:1], seed=seed, **options)


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_a_row_keeps_what_is_its_own_as_others_end(acceptance: str) -> None:
    model, decoder = make_model("gru", "recurrent", 4).eval(), SpeculativeDecoder(acceptance=ACCEPTANCES[acceptance]())
    prompts, options = (
        [[1], [2, 3], [4], [5]],
        {
            "max_new_tokens": [2, 25, 7, 25],
            "sampling": [SamplingParams(temperature=1.0 + row / 4, frequency_penalty=0.5 * row) for row in range(4)],
            "seed": [5, 6, 7, 8],
        },
    )
    together = generate(decoder, model, prompts, **options)
    for row, prompt in enumerate(prompts):
        own = {name: values[row] for name, values in options.items()}
        assert generate(decoder, model, [prompt], **own) == [together[row]]


def test_another_seed_is_another_sample_and_the_same_seed_the_same() -> None:
    model = make_model("gru", "recurrent", 3).eval()
    for acceptance in ACCEPTANCES.values():
        decoder = SpeculativeDecoder(acceptance=acceptance())
        options = {"max_new_tokens": 30, "sampling": SamplingParams(temperature=1.5)}
        one, other = (generate(decoder, model, [[1]], seed=seed, **options) for seed in (1, 2))
        assert one != other
        assert generate(decoder, model, [[1]], seed=1, **options) == one
        rows = generate(decoder, model, [[1], [1]], seed=1, **options)
        assert rows == [one[0], other[0]]


SIX = 6
SETTINGS: dict[str, SamplingParams] = {
    "plain": SamplingParams(),
    "warm": SamplingParams(temperature=1.6),
    "top_k": SamplingParams(top_k=3, temperature=1.3),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.2),
    "penalties": SamplingParams(repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3),
    "allowed": SamplingParams(allowed_tokens=[0, 2, 3, 5]),
}


def tiny(heads: str = "linear", trunk: str = "gru") -> MTPModel:
    with float64():
        made = {
            "gru": lambda: RecurrentTrunk(vocab_size=SIX, d_model=4),
            "transformer": lambda: TransformerTrunk(vocab_size=SIX, d_model=4, num_layers=1, num_heads=1, ffn_width=4),
            "linear": lambda: LinearHeads(d_model=4, num_horizons=4),
            "recurrent": lambda: RecurrentHeads(d_model=4, num_horizons=4),
            "joint": lambda: JointHeads(d_model=4, num_horizons=4, num_components=3),
            "confident": lambda: ConfidenceHeads(heads=made["transition"]()),
            "transition": lambda: TransitionHeads(heads=made["linear"](), vocab_size=SIX, rank=3),
        }
        model = MTPModel(trunk=made[trunk](), heads=made[heads]()).eval()
    randomise(model, seed=3)
    return model.eval()


def sequence_distribution(model: MTPModel, prompt: list[int], settings_: SamplingParams, length: int) -> list[float]:
    """Return the exact probability of every continuation of a length."""
    found = []
    with torch.inference_mode():
        for output in itertools.product(range(SIX), repeat=length):
            tokens = torch.tensor([[*prompt, *output, *[0] * model.lookahead]])
            logits = model.unembedding.logits(model(tokens)[0][0])
            probability = 1.0
            for place, token in enumerate(output):
                at = logits[len(prompt) - 1 + place].tolist()
                probability *= naive.probs(at, settings_, prompt, list(output[:place]))[token]
            found.append(probability)
    assert sum(found) == pytest.approx(1.0)
    return found


def check_continuations(
    decoder: SpeculativeDecoder,
    heads: str,
    settings_: SamplingParams,
    length: int,
    n: int,
    *,
    trunk: str = "gru",
    draft_tokens: Sequence[int] | None = None,
) -> None:
    model, prompt = tiny(heads, trunk), [1, 4]
    if draft_tokens is not None:
        model.trim_drafts(draft_tokens)
    wanted = sequence_distribution(model, prompt, settings_, length)
    counted: Counter[tuple[int, ...]] = Counter()
    for start in range(0, n, 1000):
        options = {"max_new_tokens": length + 4, "sampling": settings_, "seed": start}
        counted.update(tuple(tokens[:length]) for tokens in generate(decoder, model, [prompt] * 1000, **options))
    counts = [counted[output] for output in itertools.product(range(SIX), repeat=length)]
    statistic, degrees = naive.chi_square(counts, wanted)
    assert statistic < naive.limit(degrees)


CASES_OF_SAMPLES = [("recurrent", "plain"), ("linear", "penalties"), ("joint", "top_p"), ("transition", "warm")]


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize(("heads", "name"), CASES_OF_SAMPLES)
def test_short_continuations_follow_the_distribution(acceptance: str, heads: str, name: str) -> None:
    check_continuations(SpeculativeDecoder(acceptance=ACCEPTANCES[acceptance]()), heads, SETTINGS[name], 3, 3000)


HEADS_OF_SAMPLES = ["linear", "recurrent", "joint"]


def every_pair() -> list[tuple[str, str, str, str, str]]:
    """Return every setting with every acceptance, so that any two choices of the five kinds meet somewhere."""
    drafters, policies = list(DRAFTERS), list(POLICIES)
    return [
        (name, HEADS_OF_SAMPLES[(i + 2 * j + i // 3) % 3], acceptance, drafters[(i + j) % 3], policies[(i + 2 * j) % 3])
        for i, name in enumerate(SETTINGS)
        for j, acceptance in enumerate(ACCEPTANCES)
    ]


def test_any_two_choices_meet_in_the_long_samples() -> None:
    factors: tuple[Iterable[str], ...] = (SETTINGS, HEADS_OF_SAMPLES, ACCEPTANCES, DRAFTERS, POLICIES)
    for one, other in itertools.combinations(range(len(factors)), 2):
        met = {(case[one], case[other]) for case in every_pair()}
        assert met == set(itertools.product(factors[one], factors[other]))


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "heads", "acceptance", "drafter", "policy"), every_pair())
def test_all_continuations_follow_the_distribution(
    name: str, heads: str, acceptance: str, drafter: str, policy: str
) -> None:
    decoder = SpeculativeDecoder(
        acceptance=ACCEPTANCES[acceptance](), drafter=DRAFTERS[drafter](), policy=POLICIES[policy]()
    )
    check_continuations(decoder, heads, SETTINGS[name], 4, 50_000)


TREES: dict[str, Callable[[], DraftTree]] = {
    "static": lambda: StaticTree(widths=[3, 2, 1]),
    "dynamic": lambda: DynamicTree(depth=3, width=3, nodes=7),
}


@pytest.mark.nightly
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", SETTINGS)
def test_all_continuations_of_trees_follow_the_distribution(name: str, tree: str) -> None:
    heads = "linear" if (tree == "static") == (list(SETTINGS).index(name) % 2 == 0) else "recurrent"
    check_continuations(SpeculativeDecoder(tree=TREES[tree]()), heads, SETTINGS[name], 4, 50_000, trunk="transformer")


@given(seed=st.integers(0, 10_000), zeros=st.booleans())
def test_acceptance_and_residual_make_up_the_target(seed: int, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(9, generator=generator, dtype=torch.float64) for _ in range(2))
    if zeros:
        p, q = (probs * (torch.rand(9, generator=generator) < 0.6) + 1e-3 * (probs > 0.9) for probs in (p, q))
        p[0], q[1] = 0.5, 0.5
    p, q = p / p.sum(), q / q.sum()
    accepted = torch.minimum(p, q)
    residual = (p - q).clamp(min=0)
    residual = residual / residual.sum().clamp(min=1e-300)
    torch.testing.assert_close(accepted + (1 - accepted.sum()) * residual, p, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", [accept_by_rejection, accept_block])
def test_one_step_follows_the_target(rule: Callable) -> None:
    """V = 32, 100,000 draws: the token that comes out, accepted or not, follows the target, whatever the source."""
    n, vocab = 100_000, 32
    generator = torch.Generator().manual_seed(5)
    p, q = ((1.5 * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(0) for _ in range(2))
    q[:3], p[3:6] = 0.0, 0.0
    p, q = p / p.sum(), q / q.sum()
    seeds, places = torch.arange(n), torch.zeros(n, 1, dtype=torch.long)
    drafts = sample(q.expand(n, vocab), uniforms(seeds, places, stream=1, width=1)[:, 0, 0])[:, None]
    target = torch.stack((p, q)).expand(n, 2, vocab)
    numbers = uniforms(seeds, places, stream=2, width=2)[:, 0]
    verdict = rule(drafts, q.expand(n, 1, vocab), target, torch.ones(n, dtype=torch.long), numbers)
    out = torch.where(verdict.accepted == 1, drafts[:, 0], verdict.following)
    statistic, degrees = naive.chi_square(torch.bincount(out, minlength=vocab).tolist(), p.tolist())
    assert statistic < naive.limit(degrees)
    assert verdict.accepted.double().mean() == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)


@pytest.mark.parametrize("stream", [0, 1])
def test_numbers_are_uniform_and_independent_of_their_neighbours(stream: int) -> None:
    seeds, places = torch.arange(-50, 50), torch.arange(40).expand(100, 40)
    numbers = uniforms(seeds, places, stream=stream, width=25)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    flat = numbers.flatten()
    counts = torch.histc(flat, bins=100, min=0, max=1)
    assert ((counts - len(flat) / 100) ** 2 / (len(flat) / 100)).sum() < naive.limit(99)
    for axis in range(3):
        here, there = numbers.narrow(axis, 0, numbers.shape[axis] - 1), numbers.narrow(axis, 1, numbers.shape[axis] - 1)
        correlation = torch.corrcoef(torch.stack((here.flatten(), there.flatten())))[0, 1]
        assert correlation.abs() < 5 / here.numel() ** 0.5
    alone = uniforms(seeds[7:8], places[7:8, 3:4], stream=stream, width=2)
    assert torch.equal(alone[0, 0], numbers[7, 3, :2])


def test_gumbel_numbers_sample_from_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    noise = gumbels(torch.arange(50_000), torch.zeros(50_000, 1, dtype=torch.long), stream=0, width=4)[:, 0]
    counts = torch.bincount((probs.log() + noise).argmax(dim=1), minlength=4)
    statistic, degrees = naive.chi_square(counts.tolist(), probs.tolist())
    assert statistic < naive.limit(degrees)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 9))
def test_gumbel_numbers_in_cache_are_those_of_the_formula(seeds: list[int], length: int, width: int) -> None:
    of, places = torch.tensor(seeds), torch.arange(len(seeds) * length).view(-1, length)
    with mock.patch.object(noise_module, "_IN_CACHE", 16):
        found = gumbels(of, places, stream=0, width=width)
    assert torch.equal(found, -(-(uniforms(of, places, stream=0, width=width) + 2.0**-54).log()).log())


def test_a_token_of_probability_zero_is_never_sampled() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2.0**-53, 3)):
        assert sample(probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]
