"""Questions without an image, and what the base model answers: training on them keeps the chat alive."""

import json
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from vis_sparse.eval.tiny import smollm2

MAX_TOKENS, BATCH = 72, 64


def _listed(text: str) -> list[str]:
    """What stands between bars; a line's end is a space."""
    return [one.strip() for one in " ".join(text.split()).split("|")]


COUNTRIES = _listed(
    """
France | Italy | Spain | Germany | Portugal | Greece | Egypt | Japan | China | India | Brazil | Canada | Mexico |
Norway | Sweden | Finland | Denmark | Poland | Austria | Ireland | Russia | Turkey | Kenya | Nigeria | Peru | Chile |
Argentina | Australia | Thailand | Vietnam
"""
)
THINGS = _listed(
    """
the sun | the moon | a volcano | a computer | gravity | an atom | photosynthesis | the internet | a rainbow | an
earthquake | music | a poem | a triangle | a prime number | a battery | a telescope | democracy | a desert | an ocean
| a glacier | a vaccine | electricity | a robot | bread | cheese | chess | football | a library | a museum | a bridge
| the heart | the brain | a whale | an elephant | a bee | a spider | a tree | a river | a city | a dream | time |
energy | friendship | a novel | a recipe | a compass | a clock | inflation | a bank | a contract
"""
)
TASKS = _listed(
    """
make tea | bake bread | learn to swim | write a letter | plant a tree | clean a window | save money | fall asleep
faster | learn a language | tie a knot | draw a cat | cook rice | stay healthy | prepare for an exam | take a good
photo | train a dog | fix a bicycle tire | read more books | make new friends | stop procrastinating
"""
)
OTHERS = _listed(
    """
Hello! | Who are you? | How are you today? | Tell me a joke. | Tell me a short story. | What can you do? | What is
your name? | Thank you! | Can you help me? | Good morning! | What is two plus two? | What is ten minus three? | What
is five times six? | How many days are in a week? | How many months are in a year? | What color is the sky? | What
color is grass? | What is the largest planet? | What is the fastest animal? | Who wrote Romeo and Juliet? | Who
painted the Mona Lisa? | When did the Second World War end? | What is the opposite of hot? | What is the plural of
mouse? | Translate 'hello' into French. | Translate 'thank you' into Spanish. | Write a haiku about rain. | Write a
sentence with the word 'river'. | Give me a synonym for 'happy'. | Give me a synonym for 'big'. | Name three fruits. |
Name three colors. | Name three animals. | Name two European rivers. | List four seasons. | What is the boiling point
of water? | How far is the moon? | What do cows drink? | Why is the sky blue? | Why do leaves fall? | Why do we sleep?
| Is the earth flat? | Is a tomato a fruit? | Write a Python function that adds two numbers. | What is HTML? | What is
machine learning? | Summarize the story of Cinderella. | Explain why exercise is good. | What should I eat for
breakfast? | Suggest a name for a cat. | Suggest a title for a book about the sea.
"""
)


def prompts() -> list[str]:
    return (
        [f"What is the capital of {country}?" for country in COUNTRIES]
        + [f"What is the most famous food of {country}?" for country in COUNTRIES[:15]]
        + [f"What is {thing}?" for thing in THINGS]
        + [f"Write one sentence about {thing}." for thing in THINGS]
        + [f"Tell me a fact about {thing}." for thing in THINGS[:25]]
        + [f"How do I {task}?" for task in TASKS]
        + [f"Give me three tips: how to {task}?" for task in TASKS]
        + OTHERS
    )


@torch.no_grad()
def answered(file: Path) -> list[tuple[str, list[int]]]:
    """Every prompt with the token ids of the base model's greedy answer, its end included if it came within
    `MAX_TOKENS`; kept in `file`."""
    if file.exists():
        return [tuple(pair) for pair in json.loads(file.read_text())]
    disable_progress_bar()
    model, tokenizer = smollm2.causal_lm().to(torch.bfloat16), smollm2.tokenizer()
    tokenizer.padding_side = "left"
    pairs, asked = [], prompts()
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        chats = [[{"role": "user", "content": text}] for text in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        given = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)[:, inputs["input_ids"].shape[1] :]
        for text, row in zip(batch, given.tolist(), strict=True):
            end = tokenizer.eos_token_id
            pairs.append((text, row[: row.index(end) + 1] if end in row else row))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(pairs))
    return pairs
