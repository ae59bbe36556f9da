"""The drafter and the acceptance rule on their page run, and the rule is lossless."""

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import (
    Acceptance,
    BlockVerification,
    Drafter,
    RejectionSampling,
    SamplingParams,
)
from mtp_modules.decoders.sampling.noise import RowNoise
from mtp_modules.decoders.verification.rules import Candidates
from tests.architecture.imports import ROOT
from tests.helpers import VOCAB, make_model
from tests.properties.test_acceptance import RULES, error
from tests.properties.test_sampling import SETTINGS, check_continuations
from tests.reference import acceptance as naive
from tests.reference.sampling import chi_square, limit

PAGE = (ROOT / "docs/add_drafter.md").read_text(encoding="utf-8")
CODE = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S))
FOLLOWERS = [*range(1, VOCAB), 0]
OPTIONS = {"max_new_tokens": 16, "sampling": SamplingParams(temperature=0.7, frequency_penalty=0.3), "seed": 5}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(compile(CODE, "add_drafter.md", "exec"), found)
    return found


@pytest.fixture(scope="module")
def rule(names: dict[str, Any]) -> Acceptance:
    return names["IndependentMatch"]()


@pytest.fixture(scope="module")
def table(names: dict[str, Any]) -> Drafter:
    return names["TableDrafter"](followers=FOLLOWERS)


def test_the_page_prints_tokens_of_both_rows(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(CODE, "add_drafter.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[[")


def test_the_drafter_drafts_what_its_table_says(table: Drafter) -> None:
    model, prompts = make_model("transformer", "linear", 3), [[1, 2], [3]]
    decoder = SpeculativeDecoder(drafter=table, return_distributions=True)
    before = [prompt[-1] for prompt in prompts]
    for done in decoder.stream(model, prompts, max_new_tokens=[9, 5]):
        assert done.distributions is not None
        drafts = done.distributions.drafts
        for row, draft, drafted in zip(done.rows, drafts.tolist(), done.drafted, strict=True):
            assert draft == [(before[row] + 1 + depth) % VOCAB for depth in range(drafts.shape[1])]
            assert drafted <= 3
        for row, tokens in zip(done.rows, done.tokens, strict=True):
            before[row] = tokens[-1]


@pytest.mark.parametrize("params", [OPTIONS, {"max_new_tokens": 16}], ids=["sampled", "greedy"])
def test_the_drafter_changes_no_output(table: Drafter, params: dict[str, Any]) -> None:
    model = make_model("gru", "linear", 3)
    plain = AutoregressiveDecoder().generate(model, [[1, 2], [3]], **params)
    assert SpeculativeDecoder(drafter=table).generate(model, [[1, 2], [3]], **params).tokens == plain.tokens


COMPILED = """
from mtp_modules.decoders import compile_for_decoding

fast = compile_for_decoding(model, backend="eager", batch_sizes=[2])
fast.read = None  # whole rounds go without
for rule in (None, IndependentMatch()):
    decoder = SpeculativeDecoder(drafter=TableDrafter(followers=[*range(1, 16), 0]), acceptance=rule)
    compiled, eager = (decoder.generate(which, [[1, 2, 3], [4]], **options) for which in (fast, model))
    assert compiled.tokens == eager.tokens
"""


@pytest.mark.slow
def test_a_compiled_round_holds_both() -> None:
    """In a process without checks of shapes, which cannot be compiled."""
    subprocess.run([sys.executable, "-c", CODE + COMPILED], cwd=ROOT, check=True)


@pytest.mark.parametrize("acceptance", [RejectionSampling(), BlockVerification()])
def test_drafts_of_the_table_keep_the_distribution(acceptance: Acceptance, names: dict[str, Any]) -> None:
    table = names["TableDrafter"](followers=[1, 2, 3, 4, 5, 0])
    check_continuations(SpeculativeDecoder(acceptance=acceptance, drafter=table), "linear", SETTINGS["plain"], 3, 3000)


def test_errors_of_the_drafter(names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^TableDrafter: num_drafts must be at least 1, got 0\.$"):
        names["TableDrafter"](followers=[0], num_drafts=0)
    for followers in ([0, 1], [VOCAB] * VOCAB, [-1] * VOCAB):
        decoder = SpeculativeDecoder(drafter=names["TableDrafter"](followers=followers))
        with pytest.raises(
            ValueError, match=r"^TableDrafter: followers must hold one token for each of 11; count them"
        ):
            decoder.generate(make_model("gru", "linear", 3), [[1]], max_new_tokens=4)


def independent(drafts: list[int], source: list[naive.Law], target: list[naive.Law]) -> naive.Round:
    """State the rule again: a draft ``x`` is accepted with ``p(x)``; after a rejection any other token follows."""
    pairs = list(zip(drafts, target, strict=False))
    others = [[0.0 if token == x else share for token, share in enumerate(p)] for x, p in pairs]
    return naive.Round([p[x] for x, p in pairs], False, [*others, list(target[len(drafts)])])


@pytest.mark.parametrize("zeros", [False, True])
def test_the_rule_gives_every_sequence_the_probability_of_plain_decoding(zeros: bool) -> None:
    for seed, number in itertools.product(range(3), range(4)):
        assert error(independent, seed, lambda _, number=number: lambda drafts: number, zeros=zeros) < 1e-12
    assert "rejection" in RULES  # compared by the same enumeration


def test_the_rule_is_what_was_enumerated(rule: Acceptance) -> None:
    """V = 11, 50,000 rounds: accepted with ``p(x)``, and what comes out first follows ``p``."""
    n, generator = 50_000, torch.Generator().manual_seed(2)
    p, q = torch.randn(2, VOCAB, generator=generator, dtype=torch.float64).softmax(dim=1)
    noise = RowNoise(torch.arange(n), torch.zeros(n, dtype=torch.long), VOCAB, 2)
    drafts = rule.sample_draft(q.expand(n, VOCAB), 0, noise)
    target = p.expand(n, 2, VOCAB)
    limits = torch.arange(n) % 2
    candidates = Candidates(drafts[:, None], q.expand(n, 1, VOCAB), target, target.log(), limits)
    accepted, following = rule.verify(candidates, noise)
    assert not accepted[limits == 0].any()
    assert accepted[limits == 1].double().mean() == pytest.approx(float((p * q).sum()), abs=0.01)
    out = torch.where(accepted == 1, drafts, following)
    statistic, degrees = chi_square(torch.bincount(out, minlength=VOCAB).tolist(), p.tolist())
    assert statistic < limit(degrees)


@pytest.mark.parametrize("name", ["plain", "penalties"])
def test_continuations_follow_the_distribution(rule: Acceptance, name: str) -> None:
    check_continuations(SpeculativeDecoder(acceptance=rule), "recurrent", SETTINGS[name], 3, 3000)


def test_the_page_names_every_attribute_of_a_drafter() -> None:
    rows = set(re.findall(r"^\| `(\w+)", PAGE, re.M))
    own = {name for name in vars(Drafter) if not name.startswith("_")}
    assert rows == own - {"draft"}
