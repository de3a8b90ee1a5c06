"""Questions and answers made from what the documentation says of each object."""

import hashlib
import re
from dataclasses import dataclass

from training.pages import Described

SYSTEM_PROMPTS = (
    "You answer questions about Python's standard library.",
    "You are a helpful assistant that knows the Python documentation.",
    "Answer in one or two sentences.",
)
CALLABLE = frozenset({"function", "method", "classmethod", "staticmethod", "decorator"})
QUESTIONS_OF_CALLABLES = (
    "What does {name}() do?",
    "What does {name} do?",
    "What is {name}() for?",
    "Explain {name}() in a sentence or two.",
    "Can you tell me what {name}() does?",
)
QUESTIONS_OF_OTHERS = (
    "What is {name}?",
    "What is {name} for?",
    "Explain {name} in a sentence or two.",
    "Can you tell me about {name}?",
)
MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 30, 400
SYSTEM_SHARE, THINKING_SHARE = 0.3, 0.2


@dataclass(frozen=True)
class Chat:
    """`system` and `thinking` may be empty."""

    system: str
    question: str
    thinking: str
    answer: str


def make_chat(described: Described) -> Chat | None:
    """None where the documentation's first paragraph makes no answer."""
    answer = first_sentences(described.summary)
    if len(answer) < MIN_ANSWER_CHARS or answer.endswith(":"):
        return None
    name = described.name
    questions = QUESTIONS_OF_CALLABLES if described.kind in CALLABLE else QUESTIONS_OF_OTHERS
    question = questions[_draw(name, "question", len(questions))].format(name=name)
    has_system = _draw(name, "system", 100) < 100 * SYSTEM_SHARE
    system = SYSTEM_PROMPTS[_draw(name, "prompt", len(SYSTEM_PROMPTS))] if has_system else ""
    has_thinking = _draw(name, "thinking", 100) < 100 * THINKING_SHARE
    return Chat(system, question, _thought(described) if has_thinking else "", answer)


def first_sentences(text: str) -> str:
    """Whole sentences from the start, as many as fit in MAX_ANSWER_CHARS, two at most."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    answer = sentences[0]
    if len(sentences) > 1 and len(answer) + len(sentences[1]) < MAX_ANSWER_CHARS:
        answer = f"{answer} {sentences[1]}"
    return answer if len(answer) <= MAX_ANSWER_CHARS else ""


def _thought(described: Described) -> str:
    owner, _, short = described.name.rpartition(".")
    place = f", which belongs to {owner}" if owner else ""
    return f"The question is about {short}{place}."


def _draw(name: str, purpose: str, sides: int) -> int:
    """A die that falls the same way for the same object in every run."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % sides
