"""Runs a recipe: the part of it that this process's roles have."""
