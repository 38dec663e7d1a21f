"""Text to token ids and back: tokenizers, special tokens, chat templates, prompts."""
