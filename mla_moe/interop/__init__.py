"""Checkpoints in the layout of Hugging Face, in and out."""

from mla_moe.interop.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
