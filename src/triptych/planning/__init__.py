"""Says what a model would take before any of it is loaded."""
