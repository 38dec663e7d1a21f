"""Functions on arrays, without Flax. Each has a plain reference and, where it pays, faster paths tested against it.

Local arrays end in their shape, one letter per axis; a lower-case letter is a block, chunk or shard of that axis:

    B batch        T query time    S key time              D model          V value head, or vocabulary in losses
    H heads        N nope          R rope                  A = N + R        Q, C query and key-value latents
    F hidden       E experts       K experts per token     L layers

In `permutation`, `experts` and `grouped_matmul`, N counts tokens and R the expert-sorted rows.
"""
