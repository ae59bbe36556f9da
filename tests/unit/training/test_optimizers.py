import copy

import pytest
import torch
from torch import Tensor, nn

from mtp_modules import MTPModel, RecurrentHeads, RecurrentTrunk, TransformerTrunk
from mtp_modules.training.optimizers import MuonWithAdamW, muon_parameter_groups, orthogonalize


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    )


def set_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("shape", [(16, 16), (24, 12), (12, 24)])
def test_orthogonalize_brings_every_singular_value_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(orthogonalize(matrices, steps=8))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 5, 9, dtype=torch.float64)
    result = orthogonalize(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ result @ right.mT
    torch.testing.assert_close(core, torch.diag_embed(core.diagonal(dim1=1, dim2=2)), atol=1e-10, rtol=0)


def test_orthogonalize_of_zero_is_zero() -> None:
    assert orthogonalize(torch.zeros(1, 3, 4)).abs().max() == 0


def naive_muon(parameter: Tensor, gradients: list[Tensor], lr: float, momentum: float, weight_decay: float) -> Tensor:
    """One matrix at a time, as written in the paper."""
    average = torch.zeros_like(parameter)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        x = momentum * average + (1 - momentum) * gradient
        if x.shape[0] > x.shape[1]:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        if parameter.shape[0] > parameter.shape[1]:
            x = x.T
        parameter = parameter * (1 - lr * weight_decay) - lr * 0.2 * max(parameter.shape) ** 0.5 * x
    return parameter


def test_matrices_follow_the_naive_loop_and_the_others_torch_adamw() -> None:
    net = small_net().double()
    net.append(nn.Linear(3, 11).double())  # higher than wide enough for the Gram matrix
    before, twin = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = MuonWithAdamW(muon_parameter_groups(net), lr=0.02, adamw_lr=0.004, weight_decay=0.1)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.004, betas=(0.9, 0.95), weight_decay=0.0)
    history: dict[str, list[Tensor]] = {name: [] for name, _ in net.named_parameters()}
    for seed in range(3):
        set_gradients(net, seed)
        set_gradients(twin, seed)
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            history[name].append(parameter.grad)
        optimizer.step()
        adamw.step()
    start, other = dict(before.named_parameters()), dict(twin.named_parameters())
    for name, parameter in net.named_parameters():
        if parameter.ndim == 2 and name != "0.weight":
            expected = naive_muon(start[name].detach(), history[name], 0.02, 0.95, 0.1)
        else:
            expected = other[name].detach()
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-10, rtol=1e-8)


def test_groups_keep_embeddings_outputs_biases_and_recurrent_nets_from_muon() -> None:
    transformer = MTPModel(
        trunk=TransformerTrunk(vocab_size=9, d_model=8, num_layers=2, num_heads=2, max_positions=8),
        heads=RecurrentHeads(d_model=8, num_horizons=3),
    )
    muon, adamw = muon_parameter_groups(transformer)
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    assert len(muon["params"]) + len(adamw["params"]) == len(names)
    assert {names[parameter] for parameter in muon["params"]} == {
        *(f"trunk.layers.{i}.{part}.weight" for i in (0, 1) for part in ("attention.qkv", "attention.out")),
        *(f"trunk.layers.{i}.{part}.weight" for i in (0, 1) for part in ("ffn.gate_up", "ffn.down")),
        *(f"heads.{part}.weight" for part in ("from_state", "from_token", "out")),
    }
    recurrent = MTPModel(
        trunk=RecurrentTrunk(vocab_size=9, d_model=8),
        heads=RecurrentHeads(d_model=8, num_horizons=2),
        tie_embeddings=False,
    )
    names = {parameter: name for name, parameter in recurrent.named_parameters()}
    assert all(names[parameter].startswith("heads.") for parameter in muon_parameter_groups(recurrent)[0]["params"])


def test_a_module_without_matrices_has_one_group() -> None:
    assert [group["use_muon"] for group in muon_parameter_groups(nn.LayerNorm(3))] == [False]


@pytest.mark.parametrize("named", [False, True])
def test_a_plain_iterable_is_split_by_dimension(named: bool) -> None:
    layer = nn.Linear(3, 4)
    optimizer = MuonWithAdamW(layer.named_parameters() if named else layer.parameters(), lr=0.5, adamw_lr=0.25)
    assert [(group["use_muon"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.5), (False, 0.25)]
    set_gradients(layer, 0)
    optimizer.step()


def test_a_group_may_have_its_own_options() -> None:
    layer = nn.Linear(3, 4)
    optimizer = MuonWithAdamW([{"params": layer.parameters(), "lr": 0.125}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_state_dict_round_trip_continues_exactly() -> None:
    net = small_net()
    optimizer = MuonWithAdamW(muon_parameter_groups(net))
    for seed in range(2):
        set_gradients(net, seed)
        optimizer.step()
    twin = copy.deepcopy(net)
    resumed = MuonWithAdamW(muon_parameter_groups(twin), lr=0.9, adamw_lr=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2, 4):
        for module, stepper in ((net, optimizer), (twin, resumed)):
            set_gradients(module, seed)
            stepper.step()
    for left, right in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_schedulers_scale_both_kinds() -> None:
    optimizer = MuonWithAdamW(muon_parameter_groups(small_net()), lr=0.02, adamw_lr=0.004)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002]


def test_parameters_without_a_gradient_stay() -> None:
    net = small_net()
    set_gradients(net, 0)
    net[1].weight.grad = None
    before = net[1].weight.detach().clone()
    MuonWithAdamW(muon_parameter_groups(net)).step()
    assert torch.equal(net[1].weight, before)


def test_the_loss_falls() -> None:
    net = small_net()
    optimizer = MuonWithAdamW(muon_parameter_groups(net), lr=0.05, adamw_lr=0.02)
    tokens = torch.arange(7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(tokens), tokens % 3)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lr": -1.0}, "MuonWithAdamW: lr must be at least 0, got -1.0."),
        ({"momentum": 1.0}, r"MuonWithAdamW: momentum must lie in \[0, 1\), got 1.0."),
        ({"betas": (0.9, 1.5)}, r"MuonWithAdamW: betas\[1\] must lie in \[0, 1\), got 1.5."),
        ({"newton_schulz_steps": 0}, "MuonWithAdamW: newton_schulz_steps must be at least 1, got 0."),
    ],
)
def test_bad_numbers_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MuonWithAdamW(nn.Linear(2, 2).parameters(), **arguments)


def test_muon_for_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="MuonWithAdamW: Muon needs matrices, got a parameter of shape \\(4,\\)"):
        MuonWithAdamW([{"params": [nn.Parameter(torch.zeros(4))], "use_muon": True}])
