"""Keys: who may ask the server for what. Only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from triptych.errors import UsageError, did_you_mean

Scope = Literal["all", "requests", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key opens: everything, everything but the service's replicas and metrics, or the metrics alone."""

SHORTEST = 16
"""Characters of a key. Keys are hashed without salt and without delay, which is safe only for keys nobody can guess."""

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True)
class Key:
    """A key as the server knows it.

    Attributes:
        name: whose it is, for logs.
        hash: `sha256:` and the digest.
        scope: what it opens.
    """

    name: str
    hash: str
    scope: Scope = "all"

    def line(self) -> str:
        """Return it as a line of a file of keys."""
        return f"{self.name} {self.hash} {self.scope}"

    def opens(self, scope: Scope) -> bool:
        """Return whether it opens what a scope opens."""
        return self.scope in ("all", scope)


def hash_of(key: str) -> str:
    """Return what is kept of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def make_key(name: str, scope: Scope = "all") -> tuple[str, Key]:
    """Return a new key, drawn from the system's randomness, and what is kept of it.

    Raises:
        UsageError: the name has other characters than letters, digits and `_.@-`.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"name {name!r}: 1 to 64 letters, digits and _ . @ - are accepted")
    key = f"tk-{secrets.token_urlsafe(32)}"
    return key, Key(name, hash_of(key), scope)


def read_keys(given: str) -> tuple[Key, ...]:
    """Return the keys that `--api-key` names: one in clear text, or `@FILE` with a line `NAME HASH [SCOPE]` for each.

    Raises:
        UsageError: the key is too short, or the file cannot be read or has a line of another form.
    """
    if not given.startswith("@"):
        if len(given) < SHORTEST or not given.isascii() or any(character.isspace() for character in given):
            raise UsageError(
                f"--api-key: {SHORTEST} or more ASCII characters without spaces are accepted; `triptych key NAME` makes "
                "one. A file of hashed keys is given as @FILE"
            )
        return (Key("api-key", hash_of(given)),)
    path = Path(given[1:])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key: the file {path} cannot be read: {error}") from None
    keys = tuple(
        _key(f"{path}, line {number}", line.split())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    )
    if not keys:
        raise UsageError(f"--api-key: the file {path} has no key; `triptych key NAME >> {path}` adds one")
    return keys


def find(keys: Iterable[Key], given: str) -> Key | None:
    """Return the key that was given; None where it is none of them. Takes the same time for every key."""
    presented, found = hash_of(given), None
    for key in keys:
        if hmac.compare_digest(key.hash, presented):
            found = key
    return found


def _key(where: str, words: list[str]) -> Key:
    name, digest, scope = (*words, "all")[:3] if len(words) in (2, 3) else ("", "", "")
    if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest):
        raise UsageError(
            f"--api-key: {where}: NAME sha256:DIGEST [SCOPE] is accepted, as `triptych key NAME` prints it"
        )
    for known in SCOPES:
        if scope == known:
            return Key(name, digest, known)
    raise UsageError(
        f"--api-key: {where}: scope {scope!r}: one of {', '.join(SCOPES)} is accepted{did_you_mean(scope, SCOPES)}"
    )
