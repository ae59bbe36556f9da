"""Bugs that others shipped, and some of our own, put back in one at a time: the tests must kill each of them."""

from tests.mutation import beams, decoding, sampling, saving, states, text, training
from tests.mutation.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *sampling.MUTANTS,
    *text.MUTANTS,
    *decoding.MUTANTS,
    *beams.MUTANTS,
    *states.MUTANTS,
    *training.MUTANTS,
    *saving.MUTANTS,
)
"""All of them, in the order of the table."""
