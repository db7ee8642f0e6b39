"""Layers of flash_attn that cufa has: `rotary`."""
