"""The letters that every shape in this package is written with, and the one convention of horizons.

======  ==========================================================================
letter  meaning
======  ==========================================================================
B       rows of a batch
T       positions of a sequence or of a chunk that is appended to it
P       positions of those T at which the horizons beyond the first are trained
H       horizons, one per head
D       width of the model
V       size of the vocabulary
K       drafted tokens a round
N       any flattened axis of independent examples
S       key positions that attention can look at
======  ==========================================================================

A horizon counts from 1: head ``h`` at position ``t`` predicts the token at ``t + h``, so horizon 1 is the next token.
On an ``H`` axis, index 0 is horizon 1.
"""

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Array: TypeAlias = np.ndarray
"""What lies on the host, for the bookkeeping of a batch."""

Tokens: TypeAlias = Int[Tensor, "B T"]
"""Token ids, one row a sequence."""

Hidden: TypeAlias = Float[Tensor, "B T D"]
"""What a trunk says of every position."""

__all__ = ["Array", "Bool", "Float", "Hidden", "Int", "Shaped", "Tensor", "Tokens"]
