"""Condition Contrastive Alignment (arXiv 2410.09347) for autoregressive image models, without an orchestrator."""
