"""Components: what a model repository holds, how much of it is needed, and how that much is loaded."""
