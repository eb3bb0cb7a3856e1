"""Families: one file for each kind of diffusion pipeline, found by the name in `model_index.json`."""
