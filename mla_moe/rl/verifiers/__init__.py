"""Verifiers of answers, run in worker processes with a time limit."""
