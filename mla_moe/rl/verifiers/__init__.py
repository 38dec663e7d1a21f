"""Verifiers of completions, run in worker processes with a timeout."""
