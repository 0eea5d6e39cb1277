"""The primitives of a secure sum, all of them from libraries: keys, masks, sealed shares, shared secrets.

s_kj = HKDF-SHA256(X25519(key of k, public key of j)), the same for k and j
mask = ChaCha20 keystream under a key that is used once, as integers of 64 bits
seal = ChaCha20-Poly1305 under a key of its own for each sender, receiver and attempt
shares = Shamir's, of secrets of 16 bytes, in GF(2^128)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hosfl_client.bfloat16 import Array
from hosfl_client.refusals import EndpointError

#: Bytes of a secret that is shared, and of a share; of a public key.
SEED, PUBLIC = 16, 32
#: Bytes of a pair of shares, sealed.
SEALED = 2 * SEED + 16
_ONCE = bytes(12)  # a nonce: each key seals one text


def derived(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), 32, salt=None, info=b"hosfl-secure/1 " + purpose.encode()).derive(secret)


def private_key(seed: bytes) -> X25519PrivateKey:
    """The key pair that follows from a seed."""
    return X25519PrivateKey.from_private_bytes(derived(seed, "key pair"))


def public_of(private: X25519PrivateKey) -> bytes:
    """Its public key."""
    return private.public_key().public_bytes_raw()


def agreed(private: X25519PrivateKey, public: bytes, purpose: str) -> bytes:
    """A key that the owners of the two pairs have in common.

    Raises:
        EndpointError: The public key is none.
    """
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise EndpointError(f"a public key of a secure sum is none: {error}") from error
    return derived(shared, purpose)


def stream(key: bytes, count: int) -> Array:
    """So many integers of 64 bits, (count,) uint64."""
    keystream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    return np.frombuffer(keystream, "<u8")


def self_mask(seed: bytes, count: int) -> Array:
    """PRG(b_k): of one client alone."""
    return stream(derived(seed, "self-mask"), count)


def pair_mask(client: int, private: X25519PrivateKey, other: int, public: bytes, count: int) -> Array:
    """What ``client`` adds for ``other``: PRG(s_kj), with the other sign at the one with the larger number."""
    mask = stream(agreed(private, public, "pair mask"), count)
    return mask if client < other else np.negative(mask)


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret of 16 bytes, any ``threshold`` of which give it."""
    return [share for _, share in Shamir.split(threshold, count, secret)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret, of exactly ``threshold`` shares and their places in what `split` gave, from 0 on."""
    return Shamir.combine([(place + 1, share) for place, share in shares])


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypt and authenticate the one text that this key is for."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, text, None)


def unseal(key: bytes, sealed: bytes, sender: int) -> bytes:
    """The text.

    Raises:
        EndpointError: It was not sealed under this key.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, None)
    except InvalidTag:
        raise EndpointError(f"the shares that client {sender} sealed were changed on the way") from None
