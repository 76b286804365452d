"""Labelled texts as batches of tokens: tasks, readers, k-shot samples, tokenisation, a generated corpus."""
