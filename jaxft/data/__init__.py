"""Data as batches: tasks, readers, k-shot samples and tokenisation of texts, labelled images, a generated corpus."""
