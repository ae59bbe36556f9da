"""The letters of all tensor shapes in this package, and the definition of a horizon.

======  ==========================================================================
letter  meaning
======  ==========================================================================
B       rows of a batch
T       positions of a sequence, or of a chunk that is appended to it
P       positions, out of T, at which the horizons beyond the first are trained
H       horizons, one per head
D       width of the model
V       size of the vocabulary
K       drafted tokens per round
N       any flattened axis of independent examples
S       key positions that attention can see
======  ==========================================================================

Horizons count from 1: head ``h`` at position ``t`` predicts the token at ``t + h``, so horizon 1 is the next token.
On an ``H`` axis, index 0 is horizon 1.
"""

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Array: TypeAlias = np.ndarray
"""A NumPy array: CPU-side bookkeeping of a batch."""

Tokens: TypeAlias = Int[Tensor, "B T"]
"""Token ids, one row per sequence."""

Hidden: TypeAlias = Float[Tensor, "B T D"]
"""Hidden states, one per position."""

__all__ = ["Array", "Bool", "Float", "Hidden", "Int", "Shaped", "Tensor", "Tokens"]
