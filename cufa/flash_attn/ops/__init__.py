"""Operations of flash_attn that cufa has: `rms_norm` and `triton`."""
