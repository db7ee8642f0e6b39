"""Signatures of bundles: Ed25519 over the manifest, by the library ``cryptography``, which ``cufa[signing]`` brings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import files as _files
from .bundle import Bundle, BundleError

_INSTALL = "pip install 'cufa[signing]'"
_KEYGEN = "openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out key.pub"


def signer_of(path: str | os.PathLike[str]) -> Callable[[bytes], bytes]:
    """What signs a manifest's bytes with the Ed25519 private key in a PEM file.

    Raises
    ------
    BundleError
        If the file holds no such key, or one that a passphrase protects, or the library is missing.
    OSError
        If it cannot be read.
    """
    serialization = _library("signing a bundle").serialization
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
    except TypeError:
        raise BundleError(f"cufa: {path} is protected by a passphrase; give a key without one.") from None
    except ValueError:
        raise BundleError(f"cufa: {path} holds no PEM private key; to make one: {_KEYGEN}") from None
    if type(key).__name__ != "Ed25519PrivateKey":
        raise BundleError(f"cufa: {path} holds a key that is not Ed25519; to make one: {_KEYGEN}")
    sign: Callable[[bytes], bytes] = key.sign
    return sign


def public_keys(paths: Sequence[Path], trust_shared: bool) -> list[Any]:
    """The Ed25519 public keys in PEM files that ``CUFA_BUNDLE_KEYS`` names.

    Raises
    ------
    BundleError
        If a file holds none, cannot be read or could have been written by others, or the library is missing.
    """
    serialization = _library("CUFA_BUNDLE_KEYS is set, and checking signatures").serialization
    found = []
    for path in paths:
        try:
            reason = None if trust_shared else _files.SYSTEM.foreign(path, os.stat(path))
            if reason is not None:
                raise BundleError(f"CUFA_BUNDLE_KEYS: {reason}.")
            key = serialization.load_pem_public_key(path.read_bytes())
        except OSError as error:
            raise BundleError(f"CUFA_BUNDLE_KEYS: {path} cannot be read: {error.strerror or error}.") from None
        except BundleError:
            raise
        except ValueError:
            key = None
        if type(key).__name__ != "Ed25519PublicKey":
            raise BundleError(f"CUFA_BUNDLE_KEYS: {path} holds no Ed25519 public key in PEM; to make a pair: {_KEYGEN}")
        found.append(key)
    return found


def check(bundle: Bundle, paths: Sequence[Path], trust_shared: bool) -> None:
    """Refuse a bundle that none of the public keys in `paths` has signed.

    Raises
    ------
    BundleError
    """
    keys = public_keys(paths, trust_shared)
    if bundle.signature is None:
        raise BundleError(
            f"cufa: {bundle.path} is not signed, and CUFA_BUNDLE_KEYS asks for it; sign it with cufa bundle merge "
            f"OUT {bundle.path} --sign KEY."
        )
    invalid = _library("checking signatures").InvalidSignature
    for key in keys:
        try:
            key.verify(bundle.signature, bundle.text)
        except invalid:
            continue
        return
    raise BundleError(
        f"cufa: {bundle.path} is signed by none of the keys in CUFA_BUNDLE_KEYS, or was altered since; fetch it anew, "
        "or add the key of whoever signed it."
    )


class _Library:
    """What is used of ``cryptography``."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization

        self.InvalidSignature = InvalidSignature
        self.serialization = serialization


def _library(purpose: str) -> _Library:
    try:
        return _Library()
    except ImportError as error:
        raise BundleError(f"cufa: {purpose} needs the library cryptography: {_INSTALL} ({error}).") from None
