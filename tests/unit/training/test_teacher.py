"""A teacher says what it always said, is never moved, and pulls the student to its distribution."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk, TransformerTrunk
from mtp_modules.core.targets import future_targets
from mtp_modules.data import ByteTokenizer, StarGraphTask, TaskDataModule
from mtp_modules.loading import load_model
from mtp_modules.training import MTPModule, TeacherModel
from tests.helpers import TRUNKS_WITH_HEADS, VOCAB, assert_same, gradients, make_model, random_tokens
from tests.unit.training.running import SaveAt, data, module, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


def teacher_of(model: MTPModel, folder: Path, **kwargs: float) -> TeacherModel:
    model.save_pretrained(folder)
    return TeacherModel(ckpt_path=str(folder), **kwargs)


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
def test_its_distribution_is_what_the_model_says_of_the_next_token(trunk: str, heads: str, tmp_path: Path) -> None:
    model = make_model(trunk, heads, 3)
    tokens = random_tokens(2, 10)
    documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 10])
    target = teacher_of(model, tmp_path)(tokens, length=7, document_ids=documents)
    with torch.no_grad():
        first, *_ = model(tokens, document_ids=documents)
    assert_same(F.linear(target.states, *target.matrix), model.unembedding.logits(first), tolerance=1e-12)
    assert not target.states.requires_grad


@pytest.mark.parametrize("num_horizons", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_formula(num_horizons: int, training: bool, tmp_path: Path) -> None:
    """For every target: (1 - s) nll + s tau^2 soft cross-entropy, where the teacher has read the text."""
    share, tau, length = 0.3, 2.5, 7
    student = make_model("gru", "linear", num_horizons, tied=False, own=num_horizons > 1, seed=1)
    other = make_model("transformer", "recurrent", 2, bias=True, seed=2)
    teacher = teacher_of(other, tmp_path, share=share, temperature=tau)
    tokens = random_tokens(2, length + num_horizons)
    learned = torch.rand(tokens.shape) < 0.7
    loss = MultiTokenLoss().train(training)
    terms = loss(student, tokens, loss_mask=learned, teacher=teacher(tokens, length=length))

    with torch.no_grad():
        told = other.unembedding.logits(other(F.pad(tokens, (0, 1))[:, : length + other.lookahead])[0])
    states = student(tokens)
    targets, valid = future_targets(tokens, student.horizons, loss_mask=learned)
    expected = torch.zeros((), dtype=torch.float64)
    for index, h in enumerate(student.horizons):
        logits = student.unembedding.logits(states[index], index)
        costs = []
        for b in range(2):
            for t in range(length):
                if not valid[b, t, index]:
                    continue
                cost = F.cross_entropy(logits[b, t], targets[b, t, index])
                if t + h - 1 < length:
                    probs = (told[b, t + h - 1] / tau).softmax(dim=0)
                    imitation = -(probs * (logits[b, t] / tau).log_softmax(dim=0)).sum()
                    cost = (1 - share) * cost + share * tau**2 * imitation
                costs.append(cost)
        expected = expected + torch.stack(costs).mean()
    assert_same(terms.loss, expected)
    assert_same(gradients(student, terms.loss), gradients(student, expected))


def test_a_student_that_equals_its_teacher_does_not_learn(tmp_path: Path) -> None:
    model = make_model("transformer", "linear", 1)
    target = teacher_of(model, tmp_path, share=1.0, temperature=3.0)(random_tokens(2, 8), length=7)
    moved = gradients(model, MultiTokenLoss()(model, random_tokens(2, 8), teacher=target).loss)
    assert_same(moved, {name: torch.zeros_like(value) for name, value in moved.items()}, tolerance=1e-12)


def student(teacher: TeacherModel | None = None) -> MTPModule:
    made = module()
    parts = {"trunk": made.trunk, "heads": made.model.heads, "optimizer": made.optimizer}
    return MTPModule(**parts, loss=MultiTokenLoss(), teacher=teacher)


@pytest.fixture
def taught(tmp_path: Path) -> TeacherModel:
    torch.manual_seed(3)
    trunk = TransformerTrunk(vocab_size=24, d_model=8, num_layers=1, num_heads=2, max_positions=16)
    other = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=1))
    return teacher_of(other, tmp_path / "teacher", share=1.0, temperature=2.0)


def test_training_moves_the_student_to_the_teacher_and_the_teacher_not_by_one_bit(
    taught: TeacherModel, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in taught.model.state_dict().items()}
    run, tokens = student(taught), next(iter(data().val_dataloader()))["tokens"]

    def divergence() -> float:
        with torch.no_grad():
            target = taught(tokens, length=6)
            told = F.linear(target.states, *target.matrix).log_softmax(dim=-1)
            said = run.model.unembedding.logits(run.model(tokens)[0]).log_softmax(dim=-1)
            return (told.exp() * (told - said)).sum(dim=-1).mean().item()

    start = divergence()
    path = tmp_path / "student.ckpt"
    trainer(tmp_path, SaveAt(path, 60), max_epochs=10).fit(run, data())
    assert divergence() < 0.5 * start
    assert all(value.equal(before[name]) for name, value in taught.model.state_dict().items())
    assert all(parameter.grad is None for parameter in taught.model.parameters())
    assert not taught.model.training
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved.keys() == student().state_dict().keys(), "the teacher is no part of the student's checkpoint"
    assert load_model(path)[0].horizons == (1, 2, 3)
    trainer(tmp_path, max_epochs=11).fit(student(taught), data(), ckpt_path=path, weights_only=True)


def test_evaluation_does_not_ask_the_teacher(taught: TeacherModel) -> None:
    batch = next(iter(data().val_dataloader()))
    with_teacher, without = student(taught).eval()(batch), student().eval()(batch)
    assert with_teacher.loss.equal(without.loss)
    assert not student(taught).train()(batch).loss.equal(without.loss)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = MTPModel(trunk=RecurrentTrunk(vocab_size=23, d_model=8), heads=LinearHeads(d_model=8, num_horizons=1))
    sentence = (
        r"^TeacherModel: the teacher's vocab_size is 23, the model's is 24; a distribution over other tokens cannot be "
        r"imitated, so train a teacher with the model's vocabulary\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        student(teacher_of(other, tmp_path))


def test_two_teachers_are_refused(taught: TeacherModel) -> None:
    made = module()
    with pytest.raises(
        ValueError, match=r"^TeacherModel: loss\.distillation is 0\.5, which makes horizon 1 a teacher,"
    ):
        MTPModule(trunk=made.trunk, heads=made.model.heads, loss=MultiTokenLoss(distillation=0.5), teacher=taught)
    target = taught(torch.zeros(1, 5, dtype=torch.long), length=2)
    with pytest.raises(ValueError, match=r"^MultiTokenLoss: distillation is 0\.5, but there is a teacher already"):
        MultiTokenLoss(distillation=0.5)(made.model, torch.zeros(1, 5, dtype=torch.long), teacher=target)


def test_total_variation_without_anybody_to_imitate_is_refused() -> None:
    sentence = r"^MultiTokenLoss: total_variation is 1\.0, but there is no teacher; set distillation above 0, give"
    with pytest.raises(ValueError, match=sentence):
        MultiTokenLoss(total_variation=1.0)(module().model, torch.zeros(1, 5, dtype=torch.long))


def test_total_variation_reaches_another_model_s_distribution(taught: TeacherModel) -> None:
    model, tokens = module().model, torch.arange(16).view(2, 8)
    target = taught(tokens, length=5)
    soft, varied = (MultiTokenLoss(total_variation=v)(model, tokens, teacher=target).loss for v in (0.0, 1.0))
    assert not soft.equal(varied)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    task = StarGraphTask(num_arms=2, path_length=2, num_nodes=20)  # 24 tokens
    trunk = RecurrentTrunk(vocab_size=24, d_model=8)
    MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=1)).save_pretrained(
        tmp_path / "bytes", tokenizer=ByteTokenizer()
    )
    run = student(TeacherModel(ckpt_path=str(tmp_path / "bytes")))
    with pytest.raises(ValueError, match=r"^TeacherModel: the teacher was trained with another tokenizer than"):
        trainer(tmp_path).fit(run, TaskDataModule(task=task, batch_size=2, lookahead=3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"share": 1.5}, r"^TeacherModel: share must lie in \[0, 1\], got 1\.5\.$"),
        (
            {"temperature": 0.0},
            r"^TeacherModel: temperature must be above 0, got 0\.0; 1 leaves both distributions unchanged\.$",
        ),
        ({"temperature": float("nan")}, r"^TeacherModel: temperature must be above 0, got nan; "),
        ({}, r"^ckpt_path: nowhere does not exist; give a checkpoint file, or the folder of a run\.$"),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherModel(ckpt_path="nowhere", **kwargs)


def test_its_operations_are_what_runs(tmp_path: Path) -> None:
    other = make_model("transformer", "linear", 1)
    teacher, tokens = teacher_of(other, tmp_path), random_tokens(2, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        target = teacher(tokens, length=6)
        F.linear(target.states, *target.matrix)
    assert teacher.flops(batch_size=2, length=6, num_horizons=1) == counter.get_total_flops()
    logits = 2 * other.trunk.d_model * VOCAB
    third = teacher.flops(batch_size=2, length=6, num_horizons=3, share_of_positions=0.5)
    assert third == counter.get_total_flops() + 2 * 2 * 3 * logits
