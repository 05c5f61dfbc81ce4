"""Temperature-scaled KL divergence: loss and exact gradients to student and teacher.

For each row over V classes, with p = softmax(t/T) and q = softmax(s/T) (Hinton et al. 2015):

    KL       = Σ p·(log p - log q)                      loss = Σ_rows c·KL,   c = T²·weight/divisor
    ∂KL/∂s   = (q - p)/T                                ∂KL/∂t = p·(log p - log q - KL)/T

With δ = log p - log q and S = Σ p·expm1(-δ), which is 0 but for the rounding of the two log-sum-exps:

    KL       = Σ p·δ²·h(-δ) where |δ| < 1/2, else p·δ + (q - p);   h(x) = (expm1(x) - x)/x²
    q - p    = p·expm1(-δ) - S·q                        (recentred: exact to 3e-7 at logits 1e-4 apart)

Bytes moved, N = elements of one logit tensor: 2N for the loss alone; 3N with the student's gradient, 4N with
both, written by the forward launch. A backward whose upstream gradient is 1 moves nothing; otherwise it
recomputes (3N or 4N), so that a half-precision gradient is rounded once. Rows that do not fit on the chip
(V > 16384, on a cluster of 8 programs V > 131072) are read twice for gradients. Where 264 rows fit in the
second-level cache the second read is from there; where they surely do not, parts of rows are handed out by ticket
(tickets.py), so that a part is read again soon after it was read: 3N from memory in both cases, 5N between them. The
loss alone takes one read of them, unless KL is so small beside the difference of the log-sum-exps that it has to be
summed once more. Cross-entropy and statistics (labels.py) move nothing more of size N.

Budgets, in lane instructions an element of the compiled common path, for the student's gradient (+t: both).
tests/kernels/kl/test_audit.py holds the compiler to them:

    10 float32              48
    100 float32             34
    1000 bfloat16           31
    1000+t bfloat16         36
    1271 bfloat16           32
    8192 bfloat16           35
    13x512x1024 float32     27
    19x512x1024 float32     27
    19x512x1024 bfloat16    32
    21x512x1024 float32     28
    150x512x1024 float32    72

and 32 for both reads of a bfloat16 row that is read twice (34 in float32; by ticket 32 in both), in 64 registers
(stream.py).

Launch plans: plan.py. Kernel bodies: the files named after them.
"""

from ..common.launch_rows import Wanted
from ..common.scale import Scale
from .launch import LABELS, MOST_COUNTED, PLAIN, STATISTICS

__all__ = ["LABELS", "MOST_COUNTED", "PLAIN", "STATISTICS", "Scale", "Wanted"]
