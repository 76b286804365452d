"""Predictions of papers beside measurements: one module a paper, each claim with a control that must fail."""
