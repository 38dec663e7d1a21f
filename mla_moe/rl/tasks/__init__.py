"""Tasks: prompts with verifiable answers, in splits that never overlap."""
