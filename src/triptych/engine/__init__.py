"""Engines: what takes requests and sees them through the roles."""

import os

# Ray listens on all interfaces and runs what it is sent. It reads this once, when it is imported, which modules of this
# package do: so here is the last place to ask for its authentication.
os.environ.setdefault("RAY_AUTH_MODE", "token")
