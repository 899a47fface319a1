"""Replacing an owner's key: a statement that both the old and the new key have signed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ....core.errors import UserError
from .fields import Fingerprint, Message, Signature
from .keys import OwnerKey, PublicKey
from .requests import canonical_json


@dataclass(frozen=True)
class KeyRotation(Message):
    """The request of an owner to be known by another key."""

    LABEL = "the key rotation"
    FORMAT = 1

    old: Fingerprint
    new: Annotated[str, Field(pattern="^[A-Za-z0-9+/= -]{1,1000}$")]
    """Public key, as in a `.pub` file."""
    old_signature: Signature
    new_signature: Signature

    @classmethod
    def of(cls, old: OwnerKey, new: OwnerKey) -> KeyRotation:
        """Return the statement that replaces one key with another."""
        content = _signed_bytes(old.public.fingerprint, new.public.line)
        return cls(old.public.fingerprint, new.public.line, old.sign(content), new.sign(content))

    def verified(self, old: PublicKey) -> PublicKey:
        """Return the new key; raises `UserError` unless both keys signed, which proves that the owner has both."""
        new, content = PublicKey.parse(self.new), _signed_bytes(self.old, self.new)
        is_signed = old.verify(content, self.old_signature) and new.verify(content, self.new_signature)
        if not is_signed or self.old != old.fingerprint or new == old:
            raise UserError(
                "the key rotation is not signed by both keys; make it again with `expertctl federate rotate-key`"
            )
        return new


def _signed_bytes(old: str, new: str) -> bytes:
    return canonical_json({"what": "expertctl key rotation", "old": old, "new": new})
