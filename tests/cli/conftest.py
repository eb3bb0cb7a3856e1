"""The server that these tests talk to."""

from serving import caller, serve  # noqa: F401
