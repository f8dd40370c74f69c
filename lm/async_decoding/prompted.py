# SPDX-License-Identifier: Apache-2.0
"""Annotation by a language model at an endpoint: it is told the language, shown seven examples, and
asked to rewrite an answer with tags (arXiv 2502.11517, section on data, with words of our own).

What comes back goes through the same parser and validator as everything else, and must read exactly
as the answer did.
"""

from collections.abc import Sequence

from lm.async_decoding import annotate, language
from lm.async_decoding.endpoint import Endpoint, Reply, Request
from lm.async_decoding.language import LanguageError, Program
from lm.data.conversations import Conversation
from lm.data.messages import Message

_DESCRIPTION = f"""You mark up answers so that a machine can write independent parts of them at \
the same time. You never change the wording: with the tags taken out and each part put where it \
was promised, the result must be the original answer, character by character.

The tags:

{language.PROMISE}TOPIC{language.TOKENS}N{language.PROMISE_END}
    A promise. It stands where a part will stand. TOPIC says in at most three words what the part is
    about; N is its length in tokens, rounded up to a multiple of {language.STEP} (a token is about
    four characters).
{language.ASYNC}TOPIC{language.ASYNC_BODY}TEXT{language.ASYNC_END}
    The part itself, with the topic of its promise. Write the parts of a group one after another, in
    the order of their promises, right before the {language.SYNC} that waits for them, or at the
    very end of the answer.
{language.SYNC}
    What comes after it may depend on the parts promised before it.

The rules:
1. Promise a part only if someone who has read the request, and the answer up to the promise, could
   write it without having seen the other parts since the last {language.SYNC}.
2. Text after a promise and before the next {language.SYNC} must not depend on the promised part.
3. A conclusion, a sum, a comparison or a later step that needs parts comes after a {language.SYNC}.
4. Leave the last independent part of a group in the main text: it is written meanwhile.
5. Promise only parts that are worth it, of about {language.STEP} tokens or more.
6. No tag stands inside a part, and each promise has exactly one part.
7. Keep all spaces and line breaks. A line break belongs to the part that it ends.
8. If nothing can be written independently, return the answer as it is.

Reply with the marked-up answer alone: no explanation, no code fence."""

# (request, program as text); the answer is what the program reads as
_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "Give me three tips for keeping houseplants alive.",
        "Here are three tips:\n"
        '<promise topic="watering" tokens="40"/><promise topic="light" tokens="40"/>'
        "3. Wipe dust off the leaves once a month, since it keeps light away from them.\n"
        '<async topic="watering">1. Push a finger into the soil first and water only when the top '
        "few centimetres are dry; most houseplants die of too much water.\n</async>"
        '<async topic="light">2. Put the pot near a window that gets bright, indirect light, and '
        "turn it a little every week so that it grows straight.\n</async>",
    ),
    (
        "Compare trains and planes for a 500 km trip. Which one should I take?",
        '<promise topic="trains" tokens="30"/>'
        "Planes: the flight takes an hour, but getting to the airport, security and boarding add "
        "about three more.\n"
        '<async topic="trains">Trains: two to four hours from centre to centre, with room to work '
        "and no queue before boarding.\n</async><sync/>"
        "So the train is as fast from door to door and more comfortable: take the train unless you "
        "connect to another flight.",
    ),
    (
        "What is the capital of Portugal?",
        "The capital of Portugal is Lisbon.",
    ),
    (
        "A shop sells 12 pens a day at 3 euros each. How much does it earn in a week of 6 days?",
        "It earns 12 x 3 = 36 euros a day. Over 6 days that makes 36 x 6 = 216 euros.",
    ),
    (
        "Explain photosynthesis and respiration for a school class.",
        '## Photosynthesis\n<promise topic="photosynthesis" tokens="40"/>'
        "## Respiration\n"
        "All living cells break sugar down with oxygen to get energy; carbon dioxide and water are "
        "left over.\n"
        '<async topic="photosynthesis">Green plants catch light with chlorophyll and use its '
        "energy to build sugar from water and carbon dioxide. Oxygen is set free in the process."
        "\n\n</async>",
    ),
    (
        "Plan a birthday dinner: a starter, a main course, and a shopping list.",
        '<promise topic="starter" tokens="20"/>'
        "Main course: mushroom risotto with parmesan and parsley.\n"
        '<async topic="starter">Starter: tomato salad with basil and mozzarella.\n</async><sync/>'
        "Shopping list: tomatoes, basil, mozzarella, rice, mushrooms, parmesan, parsley.",
    ),
    (
        "Write a Python function that doubles a number and one that halves it, and use both.",
        '<promise topic="double" tokens="20"/>'
        "def halve(x):\n    return x / 2\n\n\n"
        '<async topic="double">def double(x):\n    return 2 * x\n\n\n</async><sync/>'
        "print(halve(double(21)))\n",
    ),
)


def examples() -> list[tuple[str, str, str]]:
    """(request, answer, the answer marked up) of each example."""
    return [(asked, language.render(language.parse(text)), text) for asked, text in _EXAMPLES]


def request(history: Sequence[Message], answer: str) -> Request:
    """What is asked about an answer: the description, seven exchanges, and the answer with the
    user's last message."""
    messages = [("system", _DESCRIPTION)]
    for asked, plain, marked in examples():
        messages += [("user", _shown(asked, plain)), ("assistant", marked)]
    asked = next((m.content for m in reversed(history) if m.role == "user"), "")
    messages.append(("user", _shown(asked, answer)))
    # tags add to what the answer takes, and too few would cut the reply off: twice the usual four
    # bytes a token, which is 1.5 tokens of a character that takes three
    return Request(tuple(messages), max_tokens=256 + len(answer.encode()) // 2)


def _shown(asked: str, answer: str) -> str:
    return f"[request]\n{asked}\n[answer to mark up]\n{answer}"


class Prompted:
    """The annotator of an endpoint. `fetch` asks for many answers at once, after an estimate of
    what that costs; single ones are asked for as they come."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._replies: dict[tuple[tuple[str, str], ...], Reply | None] = {}

    def fetch(self, conversations: Sequence[Conversation]) -> None:
        """Gets the replies for every answer of these conversations. Raises UserError above the
        limit of cost."""
        self._ask(
            [
                request(conversation.messages[:index], conversation.messages[index].content)
                for conversation in conversations
                for index in annotate.answers_in(conversation)
            ]
        )

    def _ask(self, wanted: Sequence[Request]) -> None:
        replies = self._endpoint.fetch(wanted)
        self._replies |= {one.messages: it for one, it in zip(wanted, replies, strict=True)}

    def __call__(self, history: Sequence[Message], answer: str) -> Program:
        asked = request(history, answer)
        if asked.messages not in self._replies:  # what failed is left to a rerun
            self._ask([asked])
        reply = self._replies[asked.messages]
        if reply is None:
            raise LanguageError(0, "the endpoint gave no reply")
        return program_of(reply, answer)


def program_of(reply: Reply, answer: str) -> Program:
    """The program of a reply, a fence around it and a lost or added line break at the end aside.
    Raises LanguageError."""
    text = reply.text
    if reply.finish == "length":
        raise LanguageError(len(text), "the reply was cut off")
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and not answer.startswith("```"):
        _, _, text = stripped.removesuffix("```").partition("\n")
    program = language.parse(text)
    rendered = language.render(program)
    if rendered != answer and rendered.rstrip() == answer.rstrip():
        bare = text.rstrip("\n")  # behind blocks a line break is text of main
        for other in (bare, bare + "\n", _with_end(text, rendered, answer)):
            program = language.parse(other)
            if language.render(program) == answer:
                break
    return program


def _with_end(text: str, rendered: str, answer: str) -> str:
    """A program's text whose reading ends in the space that the answer ends in, where main has the
    last word."""
    tail = rendered[len(rendered.rstrip()) :]
    wanted = answer[len(answer.rstrip()) :]
    return text.removesuffix(tail) + wanted if text.endswith(tail) else text
