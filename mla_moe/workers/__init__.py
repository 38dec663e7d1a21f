"""Worker processes with deadlines and memory limits, for code that is not ours: rewards, templates, tokenizers."""
