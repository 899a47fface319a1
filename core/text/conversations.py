"""Conversations, and the text that stands for one in a corpus: its messages and tools as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates read them, with the tools that the assistant may call."""

    messages: Sequence[Message]
    """Each has `role` and `content` (text), and may have `tool_calls`, whose arguments are objects, and `weight`."""
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON Schemas of functions."""
    rejected: Sequence[Message] = ()
    """The messages with a worse answer, in a pair of answers."""

    def as_text(self) -> str:
        """Return the conversation as one line of JSON, with keys in their order, which templates can show."""
        content: dict[str, Any] = {"messages": self.messages}
        content |= {name: value for name, value in (("tools", self.tools), ("rejected", self.rejected)) if value}
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def of_text(cls, text: str) -> Conversation:
        """Return the conversation that a text stands for."""
        content = json.loads(text)
        return cls(content["messages"], content.get("tools", ()), content.get("rejected", ()))

    def parts(self) -> Sequence[Conversation]:
        """Return the conversation, of a pair both conversations, the better one first."""
        if not self.rejected:
            return (self,)
        return (Conversation(self.messages, self.tools), Conversation(self.rejected, self.tools))

    @property
    def turns(self) -> tuple[int, ...]:
        """Indices of the assistant's messages."""
        return tuple(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
