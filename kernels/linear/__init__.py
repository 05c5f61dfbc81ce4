"""KL between two linear heads, a chunk of rows at a time, so that the logits never exist all at once.

With hidden states h [R, H], a head W [V, H], b [V] of each network (s student, t teacher), rows r:

    s_r = W_s·h_s,r + b_s,   t_r = W_t·h_t,r + b_t              logits of one row, [V]
    loss = Σ_r c_r·KL(softmax(t_r/T) ‖ softmax(s_r/T))          c, KL and its gradient g_r = ∂loss/∂s_r: kernels/kl
    ∂loss/∂h_s = g·W_s,   ∂loss/∂W_s = gᵀ·h_s,   ∂loss/∂b_s = Σ_r g_r        (the teacher gets none)

Bytes moved, N = float32 elements of one network's logits, in all chunks together: two matrix products write 2N,
the KL kernel reads them and writes the gradient over the student's logits, 3N, and one more product for each of
h_s and W_s reads it, 2N: 7N, of which nothing leaves the cache where a chunk fits it. A half-precision gradient
is a copy of half of N beside it. The products also read h once, and each W once a chunk.

Peak memory, beside the gradients that are returned: two chunks of float32 logits (2 · 256 MiB by the plan), however
many the rows; the logits at once would take 2 · R·V floats. Gradients of half-precision tensors are summed in
float32 and kept so until the backward, which takes V·H and R·H floats.

Launch plan: plan.py chooses the rows of a chunk. A chunk is two products, one launch of the KL kernel of
kernels/kl with its own plan, and one product a gradient; there is no kernel body of this family's own, because the
products are cuBLAS's (or the CPU's) and the rest is `kl`'s row loss in place.
"""

from .plan import CHUNK_ELEMENTS, default_chunk_rows

__all__ = ["CHUNK_ELEMENTS", "default_chunk_rows"]
