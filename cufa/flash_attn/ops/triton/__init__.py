"""Of the operations that are written in Triton in flash_attn: `cross_entropy` and `rotary`."""
