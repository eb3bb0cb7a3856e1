"""Stages: the steps of a recipe, each bound to the role that runs it."""
