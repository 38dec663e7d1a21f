"""Flax NNX modules. They hold parameters; the mathematics is in pure functions here and in `ops/`. See `ops` for the
letters that shapes are spelled in."""
