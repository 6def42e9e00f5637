"""Prompts on which the embedded draft is distilled: templates x topics, a few thousand distinct requests.

The ten prompts of ``benchmarks/generation.py`` and the demo's prompt are deliberately not produced by these templates.
"""

from __future__ import annotations

import random

TEMPLATES = [
    "Explain {t} to a child.",
    "Explain how {t} works, step by step.",
    "Write a short story about {t}.",
    "Write a short poem about {t}.",
    "What are the main advantages and disadvantages of {t}?",
    "List five facts about {t}.",
    "List ten ideas related to {t}.",
    "Give me three tips about {t}.",
    "Why is {t} important?",
    "What is the history of {t}?",
    "Write an email to a colleague about {t}.",
    "Write a product description that mentions {t}.",
    "Summarize what you know about {t} in three sentences.",
    "How would you teach a class about {t}?",
    "Compare {t} and {u}.",
    "What do {t} and {u} have in common?",
    "Write a dialogue between two friends about {t}.",
    "Write a news article about {t}.",
    "Write an introduction for an essay on {t}.",
    "Write a Python function that has something to do with {t}, and explain it.",
    "Create a weekly plan for someone who wants to learn about {t}.",
    "What questions should I ask an expert on {t}?",
    "Describe {t} using vivid language.",
    "What are common mistakes people make with {t}?",
    "How has {t} changed over the last hundred years?",
    "Write a letter to the editor about {t}.",
    "Give a definition of {t} and an example.",
    "What is {t}?",
    "Can you help me with {t}?",
    "Who are the most famous people connected with {t}?",
    "Write a review of a book about {t}.",
    "Write a speech about {t} and {u}.",
    "How does {t} affect {u}?",
    "Make a table that compares {t} with {u}.",
    "Tell me a joke about {t}.",
    "What would the world look like without {t}?",
    "I am curious about {t}. Where should I start?",
    "Write a scene in a play in which {t} matters.",
    "What skills are needed for {t}?",
    "Discuss the ethics of {t}.",
]
RAW_TEMPLATES = [
    "{T} is",
    "The history of {t} began",
    "In this chapter we look at {t} and",
    "Once upon a time, {t}",
    "def main():\n    # {t}\n",
    "Question: What is {t}?\nAnswer:",
    "The most important thing about {t} is that",
    "Recent research on {t} and {u} suggests",
]
TOPICS = """photosynthesis; the Roman Empire; volcanoes; bicycles; machine learning; gravity; coffee; chess; the human
heart; bees; renewable energy; jazz music; earthquakes; the French Revolution; baking bread; electric cars; the immune
system; sailing; poetry; black holes; gardening; the stock market; dinosaurs; public speaking; swimming; the water
cycle; democracy; antibiotics; mountains; the printing press; cooking pasta; databases; climate change; meditation;
the solar system; basketball; vaccines; ancient Egypt; whales; photography; operating systems; tea; rivers; dreams;
friendship; the Olympic Games; DNA; painting; trains; inflation; a lost dog; a brave knight; an old lighthouse;
robots; time travel; a small village; the desert; winter; a magic garden; the ocean; sorting numbers; binary search;
prime numbers; fractions; probability; triangles; linear equations; statistics; calculus; recursion; healthy eating;
sleep; exercise; stress; teamwork; leadership; job interviews; saving money; remote work; time management; the
internet; telephones; satellites; bridges; recycling; forests; insects; the Moon; elections; museums; the piano;
football; tigers; wine; cheese; chocolate; tourism in Italy; Japanese culture; the Amazon rainforest; Antarctica;
encryption; web browsers; video games; airplanes; steel; plastic; paper; clocks; maps; languages; grammar; novels;
Shakespeare; architecture; fashion; weddings; birthdays; holidays; family traditions; schools; quantum physics; atoms;
magnets; sound; light; electricity; batteries; nuclear power; wind turbines; engines; farming; fishing; rice; apples;
salt; soil; weather forecasts; hurricanes; glaciers; coral reefs; psychology; philosophy; justice; freedom; kindness;
honesty; creativity; memory; curiosity; happiness; hospitals; surgery; dentistry; blindness; nutrition; yoga;
marathons; hiking; camping; horses; cats; parrots; spiders; snakes; elephants; penguins; wolves; butterflies;
mushrooms; roses""".replace("\n", " ").split(";")
TOPICS = [topic.strip() for topic in TOPICS]


def draft_prompts(count: int, seed: int = 0) -> list[tuple[str, bool]]:
    """``count`` prompts as ``(text, chat)``; a sixth of them are raw text to continue rather than a chat turn."""
    rng = random.Random(seed)
    prompts: dict[str, bool] = {}
    while len(prompts) < count:
        chat = rng.random() > 1 / 6
        topic, other = rng.sample(TOPICS, 2)
        template = rng.choice(TEMPLATES if chat else RAW_TEMPLATES)
        prompts[template.format(t=topic, u=other, T=topic[0].upper() + topic[1:])] = chat
    return list(prompts.items())
