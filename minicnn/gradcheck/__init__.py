"""Check a hand-written backward pass, and learn what is wrong with it.

`gradcheck` compares any pair of functions, layer or model with finite differences.
"""

from minicnn.gradcheck.check import GradcheckReport, gradcheck
from minicnn.gradcheck.differences import (
    STEP,
    STREAM,
    Check,
    Step,
    adjoint_gap,
    compare,
    numerical_gradient,
    sweep,
)
from minicnn.gradcheck.hints import Hint
from minicnn.gradcheck.shrink import Smallest
