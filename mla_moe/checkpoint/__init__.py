"""Checkpoints: saved and restored with Orbax during training, imported from and exported to the Hugging Face layout."""

from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.reader import open_checkpoint

__all__ = ["convert", "load_pretrained", "open_checkpoint", "save_pretrained"]
