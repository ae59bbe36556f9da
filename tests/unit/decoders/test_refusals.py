"""What decoding refuses, in one sentence each, and never answers with a silent fallback."""

import re
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder, Tokenizer
from mtp_modules.data import ByteTokenizer
from mtp_modules.decoders import (
    BeamDecoder,
    BlockVerification,
    ConfidentDepth,
    CostAwareDepth,
    DraftedBeamDecoder,
    DynamicTree,
    FixedDepth,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    StaticTree,
    StopRule,
    TopKAcceptance,
    TypicalAcceptance,
)
from mtp_modules.decoders.drafting.policies import DepthChooser
from tests.drafting import clock
from tests.helpers import make_model

NAN, INF = float("nan"), float("inf")

CONSTRUCTORS: dict[str, tuple[Callable[[], object], str]] = {
    "a negative temperature": (
        lambda: SamplingParams(temperature=-0.1),
        "SamplingParams: temperature must be at least 0, got -0.1.",
    ),
    "no temperature": (
        lambda: SamplingParams(temperature=NAN),
        "SamplingParams: temperature must be at least 0, got nan.",
    ),
    "top_k of 0": (lambda: SamplingParams(top_k=0), "SamplingParams: top_k must be at least 1, got 0."),
    "top_p of 0": (lambda: SamplingParams(top_p=0.0), "SamplingParams: top_p must lie in (0, 1], got 0.0."),
    "top_p above 1": (lambda: SamplingParams(top_p=1.1), "SamplingParams: top_p must lie in (0, 1], got 1.1."),
    "no top_p": (lambda: SamplingParams(top_p=NAN), "SamplingParams: top_p must lie in (0, 1], got nan."),
    "min_p above 1": (lambda: SamplingParams(min_p=1.5), "SamplingParams: min_p must lie in [0, 1], got 1.5."),
    "a repetition penalty of 0": (
        lambda: SamplingParams(repetition_penalty=0.0),
        "SamplingParams: repetition_penalty must be above 0, got 0.0.",
    ),
    "an endless presence penalty": (
        lambda: SamplingParams(presence_penalty=INF),
        "SamplingParams: presence_penalty must be a finite number, got inf.",
    ),
    "no frequency penalty": (
        lambda: SamplingParams(frequency_penalty=NAN),
        "SamplingParams: frequency_penalty must be a finite number, got nan.",
    ),
    "an endless temperature": (
        lambda: SamplingParams(temperature=INF),
        "SamplingParams: temperature must be a finite number, got inf.",
    ),
    "an endless repetition penalty": (
        lambda: SamplingParams(repetition_penalty=INF),
        "SamplingParams: repetition_penalty must be a finite number, got inf.",
    ),
    "half a token": (
        lambda: SamplingParams(top_k=2.5),
        "SamplingParams: top_k must be a whole number, got 2.5.",
    ),
    "half a token allowed": (
        lambda: SamplingParams(allowed_tokens=[1, 2.5]),
        "SamplingParams: allowed_tokens must be a whole number, got 2.5.",
    ),
    "no number": (lambda: SamplingParams(temperature="x"), "SamplingParams: temperature must be a number, got 'x'."),
    "no number for top_p": (lambda: SamplingParams(top_p=None), "SamplingParams: top_p must be a number, got None."),
    "a token allowed": (
        lambda: SamplingParams(allowed_tokens=5),
        "SamplingParams: allowed_tokens must be a list of token ids, got 5.",
    ),
    "half a draft": (
        lambda: SpeculativeDecoder(num_drafts=2.5),
        "SpeculativeDecoder: num_drafts must be a whole number, got 2.5.",
    ),
    "half a draft looked up": (
        lambda: PromptLookup(num_drafts=2.5),
        "PromptLookup: num_drafts must be a whole number, got 2.5.",
    ),
    "half a beam": (lambda: BeamDecoder(num_beams=2.5), "BeamDecoder: num_beams must be a whole number, got 2.5."),
    "half a path": (
        lambda: DraftedBeamDecoder(num_beams=2, num_paths=2.5),
        "DraftedBeamDecoder: num_paths must be a whole number, got 2.5.",
    ),
    "half a child": (lambda: StaticTree(widths=[2.5]), "StaticTree: widths[0] must be a whole number, got 2.5."),
    "half a level": (lambda: DynamicTree(depth=2.5), "DynamicTree: depth must be a whole number, got 2.5."),
    "half a token good enough": (
        lambda: TopKAcceptance(top_k=2.5),
        "TopKAcceptance: top_k must be a whole number, got 2.5.",
    ),
    "nothing allowed": (
        lambda: SamplingParams(allowed_tokens=[]),
        "SamplingParams: allowed_tokens is empty; allow at least one token, or give null to allow all.",
    ),
    "no token": (
        lambda: StopRule(tokens=dict.fromkeys([5, None])),  # such as the end token of a tokenizer that has none
        "StopRule: tokens holds something that is no token id, got [5, None]; leave it out.",
    ),
    "a half token": (
        lambda: StopRule(tokens=[5, 2.0]),
        "StopRule: tokens holds something that is no token id, got [5, 2.0]; leave it out.",
    ),
    "a truth value among tokens": (
        lambda: StopRule(tokens=[True, 5]),
        "StopRule: tokens holds something that is no token id, got [True, 5]; leave it out.",
    ),
    "a truth value alone": (
        lambda: StopRule(tokens=False),
        "StopRule: tokens must be token ids, got False; give a list of whole numbers.",
    ),
    "a token among strings": (
        lambda: StopRule(strings=dict.fromkeys(["end", 5]), tokenizer=ByteTokenizer()),
        "StopRule: strings holds 5, which is no text; give tokens in tokens.",
    ),
    "a string without a tokenizer": (
        lambda: StopRule(strings=["end"]),
        "StopRule: strings need a tokenizer that turns tokens into text; give tokenizer.",
    ),
    "an empty string": (
        lambda: StopRule(strings=["end", ""], tokenizer=ByteTokenizer()),
        "StopRule: strings holds an empty string, which would end every row; leave it out.",
    ),
    "a string of no text": (
        lambda: StopRule(strings=["a\ufffd"], tokenizer=ByteTokenizer()),
        "StopRule: strings holds 'a\ufffd', with the replacement character, which stands for any bytes that are no "
        "text, halves of characters too; leave it out.",
    ),
    "an epsilon of 0": (
        lambda: TypicalAcceptance(epsilon=0.0),
        "TypicalAcceptance: epsilon must lie in (0, 1], got 0.0.",
    ),
    "a delta above 1": (lambda: TypicalAcceptance(delta=2.0), "TypicalAcceptance: delta must lie in (0, 1], got 2.0."),
    "no token good enough": (lambda: TopKAcceptance(top_k=0), "TopKAcceptance: top_k must be at least 1, got 0."),
    "a threshold above 1": (
        lambda: ConfidentDepth(threshold=1.5),
        "ConfidentDepth: threshold must lie in [0, 1], got 1.5.",
    ),
    "no threshold": (lambda: ConfidentDepth(threshold=NAN), "ConfidentDepth: threshold must lie in [0, 1], got nan."),
    "an endless memory": (lambda: CostAwareDepth(memory=1.0), "CostAwareDepth: memory must lie in [0, 1), got 1.0."),
    "nothing but exploring": (
        lambda: CostAwareDepth(explore_every=1),
        "CostAwareDepth: explore_every must be at least 2, got 1.",
    ),
    "a lookup of nothing": (lambda: PromptLookup(num_drafts=0), "PromptLookup: num_drafts must be at least 1, got 0."),
    "a match of nothing": (lambda: PromptLookup(shortest=0), "PromptLookup: shortest must be at least 1, got 0."),
    "crossed lengths": (
        lambda: PromptLookup(shortest=4, longest=3),
        "PromptLookup: longest must be at least shortest (4), got 3.",
    ),
    "crossed lengths beside heads": (
        lambda: LookupOrHeads(shortest=4, longest=3),
        "PromptLookup: longest must be at least shortest (4), got 3.",
    ),
    "a tree without widths": (
        lambda: StaticTree(widths=[]),
        "StaticTree: widths is empty; give the number of children at each depth.",
    ),
    "a width of 0": (lambda: StaticTree(widths=[2, 0]), "StaticTree: widths[1] must be at least 1, got 0."),
    "a tree without nodes": (lambda: DynamicTree(depth=2, nodes=0), "DynamicTree: nodes must be at least 1, got 0."),
    "a tree without depth": (lambda: DynamicTree(depth=0), "DynamicTree: depth must be at least 1, got 0."),
    "a tree for rejection": (
        lambda: SpeculativeDecoder(tree=StaticTree(widths=[2]), acceptance=RejectionSampling()),
        "SpeculativeDecoder: a tree is verified by the model's own choices, which RejectionSampling does not make; "
        "leave acceptance out.",
    ),
    "a tree for block verification": (
        lambda: SpeculativeDecoder(tree=StaticTree(widths=[2]), acceptance=BlockVerification()),
        "SpeculativeDecoder: a tree is verified by the model's own choices, which BlockVerification does not make; "
        "leave acceptance out.",
    ),
    "a tree with a drafter": (
        lambda: SpeculativeDecoder(tree=StaticTree(widths=[2]), drafter=PromptLookup()),
        "SpeculativeDecoder: drafter does not go with a tree, which says how the heads draft; leave it out.",
    ),
    "a tree with a number of drafts": (
        lambda: SpeculativeDecoder(tree=StaticTree(widths=[2]), num_drafts=3),
        "SpeculativeDecoder: num_drafts does not go with a tree, which says how the heads draft; leave it out.",
    ),
    "no drafts": (
        lambda: SpeculativeDecoder(num_drafts=0),
        "SpeculativeDecoder: num_drafts must be at least 1, got 0.",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_constructor_refuses(make: Callable[[], object], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no checks of types
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()


class Lossy(Tokenizer):
    """Knows small letters, and writes large ones small; or does not know them at all."""

    def __init__(self, *, error: type[Exception] | None) -> None:
        self.error = error

    @property
    def vocab_size(self) -> int:
        return 26

    @property
    def end_token(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        if self.error is not None:
            raise self.error(text)
        return [ord(letter) - ord("a") for letter in text.lower()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


@pytest.mark.parametrize(
    ("tokenizer", "string"),
    [
        (ByteTokenizer(), "\ud83d"),  # half of a character, which Python can hold and UTF-8 cannot
        (Lossy(error=None), "End"),
        (Lossy(error=KeyError), "End"),
        (Lossy(error=ValueError), "end!"),
    ],
    ids=["bytes", "changed", "unknown", "refused"],
)
def test_a_string_that_the_tokenizer_cannot_write_is_refused(tokenizer: Tokenizer, string: str) -> None:
    sentence = f"StopRule: strings holds {string!r}, which the tokenizer cannot write; give a text that it can encode."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        StopRule(strings=[string], tokenizer=tokenizer)


LISTS: dict[str, tuple[dict[str, Any], str]] = {
    "budgets": ({"max_new_tokens": [3]}, "max_new_tokens holds 1 items for 2 prompts"),
    "seeds": ({"seed": [1, 2, 3]}, "seed holds 3 items for 2 prompts"),
    "distributions": ({"sampling": [SamplingParams()] * 3}, "sampling holds 3 items for 2 prompts"),
    "stops": ({"stop": []}, "stop holds 0 items for 2 prompts"),
}
DECODERS = [pytest.param(AutoregressiveDecoder(), id="plain"), pytest.param(SpeculativeDecoder(), id="speculative")]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("arguments", "sentence"), LISTS.values(), ids=LISTS)
def test_a_list_needs_one_item_a_prompt(decoder: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^generate: {sentence}; give one, or one a prompt\.$"):
        decoder.generate(clock(3), [[1], [2]], **({"max_new_tokens": 3} | arguments))


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_allowed_token_must_be_in_the_vocabulary(decoder: Any) -> None:
    params = SamplingParams(allowed_tokens=[1, 11])
    with pytest.raises(
        ValueError, match=r"^SamplingParams: allowed_tokens holds 11, outside the vocabulary 0\.\.10\.$"
    ):
        decoder.generate(clock(3), [[1]], max_new_tokens=3, sampling=params)


@pytest.mark.parametrize(
    "decoder", [*DECODERS, pytest.param(SpeculativeDecoder(tree=StaticTree(widths=[2])), id="tree")]
)
@pytest.mark.parametrize("sampling", [None, SamplingParams()], ids=["greedy", "drawn"])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_logits_that_are_not_numbers_are_refused(decoder: Any, sampling: SamplingParams | None, when: str) -> None:
    """One row is enough, whether the prompt brings the NaN or a later token, and no token of it comes out."""
    model, prompts = clock(3), [[1, 2], [3, 7]]

    def broken_in_a_row(_: object, inputs: object, out: torch.Tensor) -> torch.Tensor:
        if when == "later" and out.shape[1] == len(prompts[0]):
            return out  # the prompts' pass; blocks have another length
        return out.index_fill(0, torch.tensor([1]), NAN)

    model.heads.maps[0].register_forward_hook(broken_in_a_row)
    stream = decoder.stream(model, prompts, max_new_tokens=6, sampling=sampling)
    if when == "later":
        assert next(stream).rows == [0, 1]
    with pytest.raises(
        ValueError,
        match=r"^generate: the model's logits give no distribution \(NaN, infinity, or minus infinity for every "
        r"allowed token\); check its weights, its precision and allowed_tokens\.$",
    ):
        next(stream)


@pytest.mark.parametrize("tree", [StaticTree(widths=[2, 1]), DynamicTree(depth=2)], ids=["static", "dynamic"])
def test_a_trunk_that_cannot_read_trees_refuses_them(tree: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^{type(tree).__name__}: RecurrentTrunk cannot read a tree of drafts; leave tree out\.$"
    ):
        SpeculativeDecoder(tree=tree).generate(make_model("gru", "linear", 4), [[1]], max_new_tokens=3)
    state = make_model("gru", "linear", 4).trunk.new_state(1, 4)
    with pytest.raises(
        ValueError, match=r"^RecurrentState: can hold no tree of drafts, only a chain; decode without a tree\.$"
    ):
        state.expect_tree(torch.tensor([[-1]]), 0)


def test_a_tree_deeper_than_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^LinearHeads: num_drafts must lie in 1\.\.2 for 3 horizons, got 3\.$"):
        SpeculativeDecoder(tree=StaticTree(widths=[1, 1, 1])).generate(clock(3), [[1]], max_new_tokens=3)


def test_a_path_goes_with_a_tree_and_only_with_it() -> None:
    model = clock(3)
    for expects in (True, False):
        state = model.trunk.new_state(1, 8)
        if expects:
            state.expect_tree(torch.tensor([[-1, 0]]), 1)
        model.trunk(torch.tensor([[1, 2]]), state=state)
        with pytest.raises(
            ValueError, match=r"State: path is needed for a chunk that is a tree, and only for that; call commit"
        ):
            state.commit([1], None if expects else torch.tensor([[0]]))


def test_fixed_depth_is_as_deep_as_it_may() -> None:
    chooser = FixedDepth().start(5)
    assert isinstance(chooser, DepthChooser)
    assert chooser.depth(3) == 5
    assert not chooser.watches
    assert chooser.goes_on(torch.zeros(1)).all()
