"""A divergence between two linear heads, a chunk of rows at a time, so that the logits never exist all at once.

With hidden states h [R, H], a head W [V, H], b [V] of each network (s student, t teacher), rows r:

    s_r = W_s·h_s,r + b_s,   t_r = W_t·h_t,r + b_t              logits of one row, [V]
    loss = Σ_r c_r·D(softmax(t_r/T), softmax(s_r/T))     c, D and its gradient g_r = ∂loss/∂s_r: kernels/kl, pair, topk
    ∂loss/∂h_s = g·W_s,   ∂loss/∂W_s = gᵀ·h_s,   ∂loss/∂b_s = Σ_r g_r        (the teacher gets none)

Bytes moved, N = float32 elements of one network's logits, in all chunks together: two matrix products write 2N,
the KL kernel reads them and writes the gradient over the student's logits, 3N, and one more product for each of
h_s and W_s reads it, 2N: 7N, of which nothing leaves the cache where a chunk fits it. A half-precision gradient
is a copy of half of N beside it. The products also read h once, and each W once a chunk. Labels are read by the KL
kernel on the same pass; beside another divergence they cost a launch (2N) and a sum (3N).

Peak memory, beside inputs and the gradients that are returned, for n rows a chunk: c·n·V floats of logits (c of
:func:`chunks_alive`: 2 for the forward KL divergence, 3 for another), products of n·H, and for a half-precision weight
V·H floats that its gradient is summed in and n·V halves of the rounded gradient. The logits at once would take 2·R·V.

Launch plan: plan.py chooses the rows of a chunk, so that all chunks that are alive fit one budget. A chunk is two
products, one launch of the divergence's kernel with its own plan, and one product a gradient, accumulated where the
sum is; there is no kernel body of this family's own, because the products are cuBLAS's (or the CPU's).
"""

from .plan import CHUNK_BYTES, chunks_alive, default_chunk_rows

__all__ = ["CHUNK_BYTES", "chunks_alive", "default_chunk_rows"]
