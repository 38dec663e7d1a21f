"""Flax NNX modules: latent attention, mixture of experts, the transformer and its loss. They hold the parameters; the
heavy computation is in `ops` and `parallel`. `ops` lists the letters that spell the shapes."""
