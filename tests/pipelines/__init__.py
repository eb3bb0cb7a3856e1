"""Every family against diffusers' own pipeline, and what the comparisons share."""
