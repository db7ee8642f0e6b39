"""Flash attention to learn from: the same function many times over, from ten lines of NumPy to a kernel for Hopper.

Each rung of the ladder is a module, whose docstring explains what it does and what it is worth. All have ``TITLE`` and
``attention(q, k, v, *, causal=False, softmax_scale=None)``. `cufa.learn.ladder` checks and measures them, and so does
``cufa learn``.
"""
