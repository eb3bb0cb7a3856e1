"""The HTTP front: requests, their events and their results, over any engine."""
