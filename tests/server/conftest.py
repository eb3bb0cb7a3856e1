"""The server that these tests talk to."""

from filming import film, filmer, wan, wan_i2v  # noqa: F401
from serving import caller, serve  # noqa: F401
