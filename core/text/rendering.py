"""Conversations as tokens: rendered by a chat template, with the tokens that count towards the loss."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError, first_line
from .chat_templates import NAMED_TEMPLATES, TEMPLATE_FILE, template_of
from .conversations import Conversation, Message
from .token_store import EncodedDocument
from .tokenizer import DOCUMENTS_PER_BATCH, TextEncoder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Counts = Literal["assistant", "last", "all"]
Span = tuple[int, int]
"""Begin and end of characters in a rendered text."""
PLAIN = "none"
"""Setting for a prompt and its completion one after the other, without a template."""
_HAS_GENERATION_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUOTED = 60


@dataclass(frozen=True)
class RenderedConversation:
    """The text of a conversation and which of it counts."""

    text: str
    spans: tuple[Span, ...]
    """Characters whose tokens count, in order."""


def resolved_template(setting: str | None, tokenizer_folder: Path, root: Path) -> str | None:
    """Return the text of the template for a setting: the tokenizer's (None), a name, or a file; None for `none`.

    Raises `UserError` where there is no such template.
    """
    if setting == PLAIN:
        return None
    if setting is not None:
        if setting in NAMED_TEMPLATES:
            return NAMED_TEMPLATES[setting]
        path = root / setting
        if not path.is_file():
            names = ", ".join(NAMED_TEMPLATES)
            raise UserError(f"chat_template: {path} does not exist; give a file with a template, or one of: {names}")
        return path.read_text(encoding="utf-8")
    template = template_of(tokenizer_folder)
    if template is None:
        raise UserError(
            f"the tokenizer in {tokenizer_folder} has no chat template; set chat_template of the domain to a file, or to one "
            f"of: {', '.join(NAMED_TEMPLATES)} (for prompts and completions also `{PLAIN}`), or add {TEMPLATE_FILE} there"
        )
    return template


@dataclass(frozen=True)
class ConversationEncoder:
    """A tokenizer for conversations."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: TextEncoder
    """The same tokenizer for plain text."""
    template: str | None
    """Text of the chat template; None: a prompt is followed by its completion and the separator."""
    counts: Counts
    """Turns whose tokens count: all of the assistant's, its last one, or the whole conversation."""

    @classmethod
    def of_folder(cls, folder: Path, template: str | None, counts: Counts) -> ConversationEncoder:
        """Load the tokenizer of a checkpoint folder; raises `UserError` if it has none, or none that gives offsets."""
        tokenizer = load_tokenizer(folder)
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer in {folder} does not tell where its tokens stand; add its tokenizer.json")
        return cls(tokenizer, TextEncoder.of_folder(folder), template, counts)

    @property
    def separator(self) -> int:
        """Id of the token that ends a text; it fills blocks."""
        return self.text_encoder.separator

    @property
    def vocabulary(self) -> int:
        """Number of token ids, including added tokens."""
        return self.text_encoder.vocabulary

    @cached_property
    def markers(self) -> tuple[int, ...]:
        """Ids of tokens that stand for no text."""
        return tuple(sorted({self.separator, *self.tokenizer.all_special_ids}))

    def encode_stream(self, texts: Iterable[str], *, measure_loss: bool = False) -> Iterator[EncodedDocument]:
        """Yield the conversations that texts stand for, in order; `measure_loss` decodes them to count lost bytes.

        Raises `UserError` for a conversation that the template does not render as it stands.
        """
        parts = (
            (self.rendered(part), number > 0)
            for text in texts
            for number, part in enumerate(Conversation.of_text(text).parts())
        )
        while batch := list(itertools.islice(parts, DOCUMENTS_PER_BATCH)):
            encoded = self._encoded([conversation for conversation, _ in batch], measure_loss)
            for document, (_, is_rejected) in zip(encoded, batch, strict=True):
                yield replace(document, is_rejected=True) if is_rejected else document

    def _encoded(self, conversations: Sequence[RenderedConversation], measure_loss: bool) -> Iterator[EncodedDocument]:
        encoding: Any = self.tokenizer(
            [conversation.text for conversation in conversations], add_special_tokens=False, return_offsets_mapping=True
        )
        for conversation, ids, offsets in zip(
            conversations, encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            counted = counted_tokens(offsets, conversation.spans)
            if self.template is None:
                ids, counted = [*ids, self.separator], [*counted, True]
            self.text_encoder.require_rows(ids)
            text = self._counted_text(conversation, ids, offsets)
            lost = 0
            if measure_loss:
                kept = [
                    token for token, counts in zip(ids, counted, strict=True) if counts and token not in self.markers
                ]
                lost = self.text_encoder.lost_bytes([text], [kept])[0]
            yield EncodedDocument(conversation.text, ids, lost, tuple(counted), text)

    def _counted_text(self, conversation: RenderedConversation, ids: Sequence[int], offsets: Sequence[Span]) -> str:
        """Return the counted text without the special tokens in it."""
        special = [span for span, token in zip(offsets, ids, strict=False) if token in self.markers]
        pieces = []
        for begin, end in conversation.spans:
            position = begin
            for first, last in special:
                if begin <= first < last <= end:
                    pieces.append(conversation.text[position:first])
                    position = last
            pieces.append(conversation.text[position:end])
        return "".join(pieces)

    # --- rendering ---

    def rendered(self, conversation: Conversation) -> RenderedConversation:
        """Return a conversation's text and which of it counts; raises `UserError` if the template changes or refuses it."""
        self._refuse_special_tokens(conversation)
        if self.template is None:
            return _joined(conversation)
        text, tagged = self._render(conversation, conversation.messages)
        for index, message in enumerate(conversation.messages):
            if message["role"] != "tool" and message["content"].strip() not in text:
                raise UserError(
                    f"the chat template leaves out text of message {index + 1} ({message['role']}) in {_named(conversation)}; "
                    "take it out of the corpus, or set chat_template to another one"
                )
        if self.counts == "all":
            return RenderedConversation(text, ((0, len(text)),))
        if not _HAS_GENERATION_TAGS.search(self.template):
            spans = {turn: self._span(conversation, turn, text) for turn in self._counted_turns(conversation)}
        elif len(tagged) != len(conversation.turns):
            raise UserError(
                f"the chat template marks {len(tagged)} turns of the assistant, not {len(conversation.turns)}, in "
                f"{_named(conversation)}; set chat_template to another one"
            )
        else:
            marked = dict(zip(conversation.turns, tagged, strict=True))
            spans = {turn: marked[turn] for turn in self._counted_turns(conversation)}
        return RenderedConversation(text, tuple(span for _, span in sorted(spans.items()) if span[0] < span[1]))

    def _counted_turns(self, conversation: Conversation) -> Sequence[int]:
        turns = conversation.turns if self.counts == "assistant" else conversation.turns[-1:]
        return [turn for turn in turns if conversation.messages[turn].get("weight") != 0]

    def _span(self, conversation: Conversation, turn: int, text: str) -> Span:
        """Return the characters of an assistant's turn: all but what the template puts before an answer.

        Raises `UserError` if earlier messages are rendered otherwise once later ones follow.
        """
        messages = conversation.messages
        upto, _ = self._render(conversation, messages[: turn + 1])
        if not text.startswith(upto):
            raise UserError(
                f"the chat template renders message {turn + 1} (assistant) differently once others follow, in "
                f"{_named(conversation)}; set counts to last, or chat_template to one with {{% generation %}} tags"
            )
        if turn == 0:
            other, _ = self._render(
                conversation, [{**messages[0], "content": f"\0{messages[0]['content']}"}, *messages[1:]]
            )
            return _common(text, other), len(upto)
        before, _ = self._render(conversation, messages[:turn], prompt=True)
        return _common(upto, before), len(upto)

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of messages and the spans that the template itself marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert self.template is not None, "without a template there is nothing to render"
        has_tags = _HAS_GENERATION_TAGS.search(self.template) is not None
        try:
            texts, spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in conversation.tools] or None,
                chat_template=self.template,
                return_assistant_tokens_mask=has_tags,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # whatever the template raises
            raise UserError(
                f"the chat template refuses {_named(conversation)} ({first_line(error)}); change the conversation, or set "
                "chat_template to another one"
            ) from None
        marked: list[Any] = list(spans[0]) if has_tags else []
        return texts[0], marked

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        texts = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def _refuse_special_tokens(self, conversation: Conversation) -> None:
        """Raise `UserError` for a message that spells a special token: it would end the turn, or begin another one."""
        for index, message in enumerate(conversation.messages):
            if found := self._special_token.search(message["content"]):
                raise UserError(
                    f"message {index + 1} in {_named(conversation)} has the special token {found[0]} in its text, which the "
                    "tokenizer would take for its own; take it out of the corpus"
                )


def counted_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether its characters overlap one of the spans, which are in order."""
    counted, number = [], 0
    for begin, end in offsets:
        begin = min(begin, end - 1)  # tokenizers may give white space no characters, but its end
        while number < len(spans) and spans[number][1] <= begin:
            number += 1
        counted.append(number < len(spans) and end > spans[number][0])
    return counted


def _common(text: str, other: str) -> int:
    """Return the number of characters that two texts begin with in common."""
    return next(
        (index for index, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]),
        min(len(text), len(other)),
    )


def _joined(conversation: Conversation) -> RenderedConversation:
    """Return a prompt and its completion without a template; raises `UserError` for any other conversation."""
    if [message["role"] for message in conversation.messages] != ["user", "assistant"]:
        raise UserError(
            f"chat_template: {PLAIN} is for a prompt and its completion, not for {_named(conversation)}; name a template"
        )
    prompt, completion = (str(message["content"]) for message in conversation.messages)
    return RenderedConversation(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))


def _named(conversation: Conversation) -> str:
    """Return the begin of a conversation's first message that has text."""
    text = next((message["content"] for message in conversation.messages if message["content"].strip()), "")
    line = " ".join(text[: 2 * _QUOTED].split())
    return f"the conversation that begins {line[:_QUOTED]!r}"
