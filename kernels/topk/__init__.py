"""KL to a teacher of which only the k largest logits were kept.

For each row, with k classes K, q = softmax(s/T) over all V classes, p_c = exp(t_c/T - Z) for c in K:

    bucket       outcomes: the k classes and all others together, p_o = 1 - Σ_K p, q_o = 1 - Σ_K q
                 KL = Σ_K p·log(p/q) + p_o·log(p_o/q_o)
                 ∂KL/∂s_c = (q_c - p_c)/T for c in K,   q_c·(1 - p_o/q_o)/T for the others
    renormalize  both softmaxes over K alone; the others get no gradient

Z is the teacher's log-sum-exp over all V classes; where it was not kept, over the k (and p_o = 0).

Bytes moved, N = elements of the student's logits, k ≪ V: N for the loss, 2N with the gradient while a row
stays in the cache between its two reads (3N where it does not); renormalize only writes: N.

Launch plan: one row a program, 16 classes a thread at a time: topk_plan in plan.py. Body: bodies.py.
"""

from .launch import TOPK, topk_arguments

__all__ = ["TOPK", "topk_arguments"]
