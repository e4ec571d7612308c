"""The seed of each random draw; a module of its own, so that processes without PyTorch can draw too."""

import hashlib


def sample_seed(*parts: object) -> int:
    """A seed from 0 to 2^63 - 1, determined by what identifies a draw, like (run seed, epoch, record id)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
