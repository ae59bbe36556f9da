"""Compile the multi-token loss in one graph, and compare it with the eager one."""

import torch

from mtp_modules import LinearHeads, MTPModel, MultiTokenLoss, TransformerTrunk
from mtp_modules.losses import FusedLinearCrossEntropy
from tests.helpers import VOCAB, assert_same, gradients, random_tokens


def compare(compiler: str) -> None:
    """Compare loss, figures and all gradients."""
    torch.manual_seed(0)
    trunk = TransformerTrunk(vocab_size=VOCAB, d_model=8, num_layers=1, num_heads=2, max_positions=16)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2), output_bias=True)
    backend = FusedLinearCrossEntropy(rows_per_chunk=8)
    loss = MultiTokenLoss(backend=backend, distillation=0.3, label_smoothing=0.1, z_loss=0.01)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    tokens = random_tokens(2, 8)
    found, wanted = compiled(model, tokens), loss(model, tokens)
    assert_same(found.loss, wanted.loss, tolerance=1e-5)
    assert_same(found.nll, wanted.nll, tolerance=1e-5)
    assert found.rank.equal(wanted.rank)
    assert found.agrees.equal(wanted.agrees)
    assert_same(gradients(model, found.loss), gradients(model, wanted.loss), tolerance=1e-5)
