"""Text to tokens and back: tokeniser, chat template, stop strings, reasoning."""

from tidemill.text.chat_template import ChatMessage
from tidemill.text.detokenizer import Detokenizer
from tidemill.text.reasoning import ReasoningSplitter
from tidemill.text.stop import StopMatcher
from tidemill.text.stream import Delta, TextStream
from tidemill.text.tokenizer import SamplingDefaults, Tokenizer

__all__ = [
    "ChatMessage",
    "Delta",
    "Detokenizer",
    "ReasoningSplitter",
    "SamplingDefaults",
    "StopMatcher",
    "TextStream",
    "Tokenizer",
]
