"""Functions on arrays: each has a plain reference and, where it pays, a faster path held against it.

Local arrays end in their shape, one letter an axis:

    B batch        T query time    S key time      D model          V value head, or vocabulary in the loss
    H heads        N nope          R rope          A = N + R        Q, C query and key-value latents
    F hidden       E experts       K choices       L layers         b blocks of rows

In `dispatch` and `grouped_matmul`, N counts tokens and R rows.
"""
