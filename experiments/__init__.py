"""Train and measure: one package a paper, run by ``python -m experiments run <slug>``."""

PAPERS = ("kernel_finetuning", "pcfg_parsing", "mode_connectivity", "likelihood_displacement")
"""Papers with an experiment: each slug is a package with ``main(argv) -> exit status``."""
