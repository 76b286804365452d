"""Measurements on trained networks: probes of their representations."""
