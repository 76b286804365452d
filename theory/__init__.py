"""Predictions of papers beside measurements: one module a paper, each claim with a control that must fail."""

PAPERS = ("kernel_finetuning", "likelihood_displacement", "mode_connectivity", "pcfg_parsing")
"""Papers with claims: each slug is a module with a tuple ``CLAIMS``."""
