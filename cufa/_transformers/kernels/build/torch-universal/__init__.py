"""What transformers takes from a repository of flash attention kernels, as the ``kernels`` package loads it."""

from cufa._transformers.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
