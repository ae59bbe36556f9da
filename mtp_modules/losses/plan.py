"""Grouping and chunking of the examples of a backend."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mtp_modules.core.checks import is_distributed, refuse
from mtp_modules.core.objective import OutputMatrix, Teacher
from mtp_modules.core.shapes import Tensor


class Group(NamedTuple):
    """Consecutive examples that share an output matrix, and all or none of which have a teacher.

    Attributes:
        start: The first example.
        stop: One past the last.
        matrix: Output matrix of their states.
    """

    start: int
    stop: int
    matrix: OutputMatrix


def groups_of(
    owner: object,
    states: Tensor,
    matrices: Sequence[OutputMatrix],
    sizes: Sequence[int],
    teacher: Teacher | None,
    *,
    merge: bool,
) -> list[Group]:
    """Return the examples of each output matrix, leaving out heads without examples.

    Args:
        owner: Named in the error message.
        states: ``(N, D)``, head by head.
        matrices: One per head.
        sizes: How many examples each head has.
        teacher: A group ends where its examples begin.
        merge: Merge consecutive heads with the same matrix into one group.

    Raises:
        ValueError: If the sizes do not fit the matrices or the states.
    """
    if len(matrices) != len(sizes) or sum(sizes) != len(states):
        refuse(
            owner,
            f"sizes must hold one number for each of {len(matrices)} matrices and sum to {len(states)} examples, "
            f"got {list(sizes)}.",
        )
    cut = first_taught(states, teacher)
    groups: list[Group] = []
    end = 0
    for matrix, size in zip(matrices, sizes, strict=True):
        start, end = end, end + size
        for low, high in ((start, min(end, cut)), (max(start, cut), end)):
            if low >= high:
                continue
            if merge and low != cut and groups and _same(groups[-1].matrix, matrix):
                low = groups.pop().start
            groups.append(Group(low, high, matrix))
    return groups


def _same(one: OutputMatrix, other: OutputMatrix) -> bool:
    return one.weight is other.weight and one.bias is other.bias


def first_taught(states: Tensor, teacher: Teacher | None) -> int:
    """Return the index of the first example with a teacher.

    Args:
        states: ``(N, D)``.
        teacher: Of the last ``M`` examples.
    """
    return len(states) - (0 if teacher is None else len(teacher.states))


def rows_taught(teacher: Teacher | None, states: Tensor, start: int, stop: int) -> Teacher | None:
    """Return the teacher of some examples, which all have one or none.

    Args:
        teacher: Of the last examples.
        states: ``(N, D)``.
        start: The first example.
        stop: One past the last.
    """
    first = first_taught(states, teacher)
    if teacher is None or start < first:
        return None
    rows = slice(start - first, stop - first)
    return replace(teacher, states=teacher.states[rows], share=teacher.share[rows])


def check_teacher(teacher: Teacher | None, matrix: OutputMatrix) -> None:
    """Reject a teacher whose logits are not available where the student's are sharded.

    Args:
        teacher: If there is one.
        matrix: Horizon 1's.

    Raises:
        ValueError: If the student's output matrices are sharded, and the teacher is another model or is imitated by
            total variation.
    """
    if teacher is None or not is_distributed(matrix.weight):
        return
    if teacher.matrix or teacher.temperature != 1.0:
        refuse(
            "LinearCrossEntropy",
            "output matrices are sharded over the vocabulary, where no other model can be a teacher; "
            "train without tensor parallelism, or leave the teacher out.",
        )
    if teacher.total_variation:
        refuse(
            "LinearCrossEntropy",
            f"output matrices are sharded over the vocabulary, where total_variation must be 0, got "
            f"{teacher.total_variation}; train without tensor parallelism, or leave it out.",
        )


def spans(group: Group, rows: int | None) -> list[tuple[int, int]]:
    """Cut a group into chunks.

    Args:
        group: Its examples.
        rows: Examples per chunk; all if ``None``.

    Returns:
        The first example of each, and one past its last.
    """
    step = rows or group.stop - group.start
    return [(low, min(low + step, group.stop)) for low in range(group.start, group.stop, step)]


def default_rows(vocab_size: int) -> int:
    """Return the number of rows of logits per chunk: 256, or as many as fit into 4 million numbers.

    Args:
        vocab_size: Number ``V`` of logits in a row.
    """
    return max(256, (1 << 22) // vocab_size)
