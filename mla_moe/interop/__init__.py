"""Checkpoints in the layout of Hugging Face, in and out."""

from mla_moe.interop.convert import convert
from mla_moe.interop.pretrained import load_pretrained, save_pretrained

__all__ = ["convert", "load_pretrained", "save_pretrained"]
