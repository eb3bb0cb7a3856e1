"""Measuring a model, or a running service: what asks it, and what the answers took."""
