"""Distributed training of language models whose weights exist only as packed low-bit codes."""
