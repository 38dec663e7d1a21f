"""Checkpoints in the layout of Hugging Face, in and out."""

from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained

__all__ = ["convert", "load_pretrained", "save_pretrained"]
