"""A trained model as a teacher for distillation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from mtp_modules.core.checks import fraction, refuse
from mtp_modules.core.component import Component, describe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.objective import NextTokenTeacher
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.targets import num_positions, num_sampled
from mtp_modules.loading import load_model
from mtp_modules.losses.multi_token import MultiTokenLoss
from mtp_modules.model import MTPModel


class TeacherModel(Component):
    r"""A trained model whose next-token distribution a student imitates beside the tokens themselves.

    Hinton et al. 2015 (arXiv 1503.02531): with the student's distribution :math:`p`, the teacher's :math:`q` and a
    temperature :math:`\tau` that softens both, the loss of a token :math:`y` is

    .. math:: (1 - s) \, (-\log p_y) - s \, \tau^2 \sum_v q^\tau_v \log p^\tau_v

    Every horizon of the student is distilled for the token that it predicts, up to the positions that the teacher has
    read. The teacher reads the true tokens, is never trained, and is not saved in the student's checkpoints.

    Args:
        ckpt_path: Its checkpoint, the folder of its run, or what ``save_pretrained`` wrote.
        share: Share of distillation in the loss, :math:`s`.
        temperature: :math:`\tau`.

    Raises:
        ValueError: If there is no such checkpoint, or a number lies outside its range.
    """

    def __init__(self, *, ckpt_path: str, share: float = 0.5, temperature: float = 1.0) -> None:
        fraction(self, "share", share)
        if not temperature > 0:
            refuse(self, f"temperature must be above 0, got {temperature}; 1 leaves both distributions unchanged.")
        self.share, self.temperature = share, temperature
        self.model, self.tokenizer = load_model(ckpt_path)
        self.model.requires_grad_(False)

    @classmethod
    def check_stored(cls, arguments: Mapping[str, Any]) -> None:
        """Raise an error: a teacher is a file, which only a configuration may name."""
        refuse(cls.__name__, f"a file names {arguments.get('ckpt_path')!r:.100} as a teacher; make it yourself.")

    def check(self, student: MTPModel, loss: MultiTokenLoss) -> None:
        """Raise an error if the student cannot learn from this teacher.

        Args:
            student: Trunk, heads and unembedding.
            loss: The student's loss.

        Raises:
            ValueError: If the vocabularies differ, or the loss has horizon 1 as a teacher already.
        """
        has, needs = self.model.trunk.vocab_size, student.trunk.vocab_size
        if has != needs:
            refuse(
                self,
                f"the teacher's vocab_size is {has}, the model's is {needs}; a distribution over other tokens "
                "cannot be imitated, so train a teacher with the model's vocabulary.",
            )
        if loss.distillation > 0.0:
            refuse(
                self,
                f"loss.distillation is {loss.distillation}, which makes horizon 1 a teacher, and there can be only "
                "one; set it to 0, or leave teacher out.",
            )

    def prepare(self, device: torch.device, tokenizer: Tokenizer | None, mesh: DeviceMesh | None) -> None:
        """Move the teacher to the student's device, and raise an error if the run cannot use it.

        Args:
            device: Of the student.
            tokenizer: Of the data, if it has one.
            mesh: Device mesh, if the strategy shards the student.

        Raises:
            ValueError: If the teacher was trained with another tokenizer, or the student is sharded by tensor
                parallelism.
        """
        size = 1 if mesh is None else mesh["tensor_parallel"].size()
        if size > 1:
            refuse(
                self,
                f"tensor_parallel_size is {size}, but the teacher's output matrix is whole and cannot be compared with "
                "a sharded one; set tensor_parallel_size to 1, or leave teacher out.",
            )
        if tokenizer is not None and self.tokenizer is not None and describe(tokenizer) != describe(self.tokenizer):
            refuse(self, "the teacher was trained with another tokenizer than the data has; train one on this data.")
        self.model.to(device)

    @torch.no_grad()
    def __call__(
        self, tokens: Int[Tensor, "B L"], *, length: int, document_ids: Int[Tensor, "B L"] | None = None
    ) -> NextTokenTeacher:
        """Run the teacher on a batch.

        Args:
            tokens: Token ids.
            length: How many positions ``T`` of them the student reads.
            document_ids: Which document every token belongs to.
        """
        read = None if document_ids is None else document_ids[:, :length]
        hidden = self.model.trunk(tokens[:, :length], document_ids=read).hidden
        first = self.model.heads.first(hidden, document_ids=read)
        return NextTokenTeacher(first, self.model.unembedding.matrix(0), self.share, self.temperature)

    def of(self, batch: Mapping[str, Tensor], horizons: Sequence[int]) -> NextTokenTeacher:
        """Run the teacher on a training batch; where a token is no target, it reads what the student reads.

        Args:
            batch: ``tokens``, and optionally ``inputs`` and ``document_ids``.
            horizons: Of the student.
        """
        tokens = batch["tokens"]
        read = torch.where(tokens < 0, batch["inputs"], tokens) if "inputs" in batch else tokens
        return self(read, length=num_positions(tokens, horizons), document_ids=batch.get("document_ids"))

    def flops(self, *, batch_size: int, length: int, num_horizons: int, share_of_positions: float = 1.0) -> int:
        """Return the floating-point operations that it adds to a step of the student's training.

        Args:
            batch_size: Number ``B`` of rows.
            length: Number ``T`` of positions that the student reads of each.
            num_horizons: Of the student; the logits are computed once for each.
            share_of_positions: Share of the positions at which the student's horizons beyond the first are trained.
        """
        model = self.model
        scored = length + (num_horizons - 1) * num_sampled(length, share_of_positions)
        unembedding = 2 * model.trunk.d_model * model.trunk.vocab_size * scored
        return batch_size * (model.trunk.flops(length) + model.heads.flops(length, 0) + unembedding)
