"""Seeds of single draws. Apart from what draws, so that a process that draws without PyTorch need not load it."""

import hashlib


def sample_seed(*parts: object) -> int:
    """A seed in 0..2^63-1 from what makes a draw unique; equal on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
