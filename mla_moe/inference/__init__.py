"""Inference: the engine with its scheduler and prefix cache, sampling, speculative decoding, the OpenAI server."""
