# SPDX-License-Identifier: Apache-2.0
"""A conversation as the rest of the code sees it: messages, optional tools, optional branches."""

import dataclasses
import json
from typing import Any, Literal, Self

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. `thought` None means that there is none; "" is an empty thought, not none."""

    role: Role
    content: str
    thought: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def to_dict(self, with_thought: bool) -> dict[str, Any]:
        """The OpenAI form that chat templates expect; a dropped thought leaves no key behind."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if with_thought and self.thought is not None:
            out["reasoning_content"] = self.thought
        if self.tool_calls:
            out["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """The inverse of `to_dict(with_thought=True)`; trusts its input, unlike `records`."""
        return cls(
            role=record["role"],
            content=record["content"],
            thought=record.get("reasoning_content"),
            tool_calls=tuple(record.get("tool_calls", ())),
            tool_call_id=record.get("tool_call_id"),
            name=record.get("name"),
        )


@dataclasses.dataclass(frozen=True)
class Branch:
    """An edit, a regeneration or a rollout: `messages` replace the main thread's messages[at:]."""

    at: int
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A main thread, its branches, and where it came from (`file` and 1-based `line`)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    branches: tuple[Branch, ...] = ()
    file: str = ""
    line: int = 0

    def threads(self) -> list[tuple[Message, ...]]:
        """The main thread, then each branch with the messages that it shares put in front."""
        return [self.messages] + [self.messages[: b.at] + b.messages for b in self.branches]

    def turns(self) -> list[tuple[int, int]]:
        """(thread, index in that thread) of every trained message: an assistant's, after a user's.

        A message that a branch shares with the main thread is listed once, under the main thread.
        An assistant greeting before the first user message is context and is not listed.
        """
        out = []
        for number, thread in enumerate(self.threads()):
            first_own = self.branches[number - 1].at if number else 0
            seen_user = False
            for index, message in enumerate(thread):
                seen_user |= message.role == "user"
                if message.role == "assistant" and seen_user and index >= first_own:
                    out.append((number, index))
        return out

    @property
    def num_turns(self) -> int:
        """How many messages are trained, over all threads."""
        return len(self.turns())

    def to_json(self) -> str:
        """One line of JSON that `from_json` turns back into an equal conversation."""
        record: dict[str, Any] = {"messages": [m.to_dict(True) for m in self.messages]}
        if self.tools is not None:
            record["tools"] = list(self.tools)
        if self.branches:
            record["branches"] = [
                {"at": b.at, "messages": [m.to_dict(True) for m in b.messages]}
                for b in self.branches
            ]
        if self.file:
            record["file"] = self.file
        if self.line:
            record["line"] = self.line
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`; trusts its input, unlike `conversations`."""
        record = json.loads(text)
        tools = record.get("tools")
        return cls(
            messages=tuple(map(Message.from_dict, record["messages"])),
            tools=None if tools is None else tuple(tools),
            branches=tuple(
                Branch(b["at"], tuple(map(Message.from_dict, b["messages"])))
                for b in record.get("branches", ())
            ),
            file=record.get("file", ""),
            line=record.get("line", 0),
        )
