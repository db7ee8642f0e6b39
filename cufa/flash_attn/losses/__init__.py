"""Losses of flash_attn that cufa has: `cross_entropy`."""
