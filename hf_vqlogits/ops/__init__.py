"""Operations on codes, scores and logits; they know tensors only.

`eager.py` is the specification. `registration.py`, `gather.py`, and the losses `cross_entropy.py`
and `squared_hinge.py`, which go their way through `row_losses.py`, declare the operations to
PyTorch. `backends.py` chooses who computes them: `eager.py`, `matmul.py`, the compiled `cpu.py`, or
on a GPU `triton_expand.py` and `triton_cross_entropy.py`. `direct.py` takes a few rows from hidden
states to logits, `top.py` all rows to the largest of them, and `refining.py` has the dense layer
score these again.
"""

from .cross_entropy import linear_cross_entropy
from .direct import logits
from .eager import final_logits, pack_signs, scores, unpack_signs
from .gather import gather_rows
from .refining import Dense, Offset, Rule, distance, refine, shift
from .registration import expand
from .squared_hinge import linear_squared_hinge
from .top import largest, topk

__all__ = [
    "Dense",
    "Offset",
    "Rule",
    "distance",
    "expand",
    "final_logits",
    "gather_rows",
    "largest",
    "linear_cross_entropy",
    "linear_squared_hinge",
    "logits",
    "pack_signs",
    "refine",
    "scores",
    "shift",
    "topk",
    "unpack_signs",
]
