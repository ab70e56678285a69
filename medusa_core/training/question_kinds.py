"""The kinds of questions that a model is led to write, and how: a system prompt with a topic, and the first words of the message.

The kinds are those that benchmarks of speculative decoding ask about (Spec-Bench: conversation, code, mathematics, translation,
summaries, questions, and answers from documents).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_TOPICS = (
    "history", "biology", "cooking", "travel", "law", "music", "sports", "economics", "physics", "medicine", "gardening", "art",
    "psychology", "astronomy", "chemistry", "geography", "film", "politics", "education", "marketing", "technology", "philosophy",
    "animals", "climate", "family life", "careers", "literature", "games", "architecture", "finance", "fashion", "transport",
)  # fmt: skip
_LANGUAGES = ("German", "French", "Spanish", "Chinese", "Italian", "Portuguese", "Dutch", "Russian", "Japanese")
_CODE = (
    "Python functions", "string handling", "lists and dictionaries", "sorting and searching", "recursion", "SQL queries",
    "JavaScript", "C++", "Java classes", "shell scripts", "regular expressions", "unit tests", "HTML and CSS",
    "file handling", "data structures", "graph algorithms", "dynamic programming", "bug fixing", "APIs", "pandas and NumPy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """systems, openings: templates; one of each is drawn, and in it {topic}, {language} and {code}. An opening may be empty,
    and does not end with a space, which most tokenizers make part of the next word."""

    name: str
    systems: tuple[str, ...]
    openings: tuple[str, ...]

    def system(self, generator: random.Random) -> str:
        return _filled(generator.choice(self.systems), generator)

    def first_words(self, generator: random.Random) -> str:
        return _filled(generator.choice(self.openings), generator)


def _filled(template: str, generator: random.Random) -> str:
    topic, language, code = generator.choice(_TOPICS), generator.choice(_LANGUAGES), generator.choice(_CODE)
    return template.format(topic=topic, language=language, code=code)


KINDS: tuple[Kind, ...] = (
    Kind(
        "chat",
        ("You are a helpful assistant.", "You are a helpful assistant who talks with people about {topic}."),
        (
            "", "", "Write a", "Imagine you are", "Compose", "Can you explain", "Give me some advice on", "Describe",
            "What do you think about",
        ),
    ),
    Kind(
        "code",
        ("You are an expert programmer who helps with {code}.", "You are a helpful coding assistant."),
        (
            "", "Write a", "Write a Python function that", "How do I", "Implement", "Explain this code:\n",
            "Fix the bug in this code:\n",
        ),
    ),
    Kind(
        "math",
        ("You are a mathematics teacher who solves word problems step by step.",),
        ("", "A", "If", "How many", "Tom has", "Find", "Solve", "Maria buys", "There are", "Each day,", "The sum of"),
    ),
    Kind(
        "translation",
        ("You are a translator from {language} to English.", "You translate texts about {topic}."),
        (
            "Translate {language} to English:", "Translate to English:", "Translate into {language}:",
            "How do you say in {language}:",
        ),
    ),
    Kind(
        "summarization",
        ("You summarize articles about {topic}.", "You are a news editor who shortens articles."),
        ("Summarize:", "Summarize the following article:\n", "Give me a short summary of this text about {topic}:\n"),
    ),
    Kind(
        "qa",
        ("You answer questions about {topic}.", "You answer short factual questions."),
        ("", "Who", "When", "Where", "What is", "Which", "how many", "what does", "who was"),
    ),
    Kind(
        "rag",
        ("You answer questions with the help of the documents that the user gives you. They are about {topic}.",),
        (
            "Use the following pieces of context to answer the question.\n\nContext:", "Document 1:",
            "Here is a passage about {topic}:\n", "Answer the question from the text below.\n\nText:",
        ),
    ),
)  # fmt: skip
