"""Write short instructions of ten kinds, with a model's own greedy answers, as the folder of JSON lines a recipe reads.

    python scripts/make_instruct_data.py models/smollm2 data/smollm2

What a frozen model may leave out is judged against what it says itself, so its own answers are the references: a routed
model that gives them loses nothing. Prompts are drawn from small vocabularies with a seed, each once in all splits
together, and rendered by the model's chat template where it has one. The same seed gives the same prompts everywhere;
the same model and versions give the same answers.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SPLITS = {"validation": 400, "calibration": 400, "test": 400, "train": 3000}
NEW_TOKENS = 32


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split("," if "," in text else None)]


CAPITALS = _list("""
    Afghanistan Albania Algeria Angola Argentina Armenia Australia Austria Azerbaijan Bahrain Bangladesh Belarus
    Belgium Belize Benin Bhutan Bolivia Botswana Brazil Bulgaria Burundi Cambodia Cameroon Canada Chad Chile
    China Colombia Croatia Cuba Cyprus Denmark Djibouti Ecuador Egypt Eritrea Estonia Ethiopia Fiji Finland
    France Gabon Georgia Germany Ghana Greece Guatemala Guinea Guyana Haiti Honduras Hungary Iceland India
    Indonesia Iran Iraq Ireland Israel Italy Jamaica Japan Jordan Kazakhstan Kenya Kuwait Laos Latvia Lebanon
    Liberia Libya Lithuania Luxembourg Madagascar Malawi Malaysia Mali Malta Mexico Moldova Mongolia Morocco
    Mozambique Namibia Nepal Netherlands Nicaragua Niger Nigeria Norway Oman Pakistan Panama Paraguay Peru
    Philippines Poland Portugal Qatar Romania Russia Rwanda Senegal Serbia Singapore Slovakia Slovenia Somalia
    Spain Sudan Sweden Switzerland Syria Thailand Togo Tunisia Turkey Uganda Ukraine Uruguay Venezuela Vietnam
    Yemen Zambia Zimbabwe
""")
WORDS = _list("""
    apple river stone cloud garden window copper silver mountain valley candle bridge forest island harbor
    meadow pepper button ladder mirror pillow rocket saddle tunnel violin walnut basket carpet dragon engine
    feather hammer jacket kettle lantern magnet needle orange pencil ribbon spider ticket umbrella velvet wagon
    zipper anchor barrel cactus
""")
NOUNS = _list("""
    house dog cat book tree car bird horse table door boat flower school hat clock
""")
ADJECTIVES = _list("""
    red big small old new green beautiful white black happy
""")
LANGUAGES = _list("""
    French Spanish German Italian
""")
THINGS = _list("""
    movie restaurant hotel phone book laptop concert play camera blender vacuum game museum tour course jacket
    backpack chair
""")
GOOD = _list("""
    wonderful excellent delightful superb charming fantastic brilliant pleasant impressive reliable outstanding
""")
BAD = _list("""
    terrible boring awful disappointing broken dull overpriced unpleasant dreadful useless frustrating
""")
NAMES = _list("""
    Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul
""")
GOODS = _list("""
    pencils marbles cookies stickers coins books cards shells stamps oranges
""")
QUALITIES = _list("""
    hot happy fast tall light early strong young rich brave full open clean quiet wide deep sharp smooth bitter
    generous polite patient simple ancient public natural visible certain flexible careful
""")
TOPICS = _list("""
    rain, friendship, the ocean, winter mornings, a lost key, cooking, the moon, a small village, trains, bread,
    gardening, music, a lighthouse, sleep, honesty, a busy market, old letters, running, mountains
""")
SUFFIXES = _list("""
    of_row in_list for_user of_order from_file in_cart of_scores by_day for_report of_batch in_page for_team
""")
VERBS = {
    "total": ("values", "sum(values)"),
    "largest": ("values", "max(values)"),
    "smallest": ("values", "min(values)"),
    "mean": ("values", "sum(values) / len(values)"),
    "reverse": ("text", "text[::-1]"),
    "shout": ("text", "text.upper() + '!'"),
    "is_even": ("number", "number % 2 == 0"),
    "square": ("number", "number * number"),
    "first_word": ("text", "text.split()[0]"),
    "count_vowels": ("text", "sum(letter in 'aeiou' for letter in text)"),
    "unique": ("values", "list(dict.fromkeys(values))"),
    "initials": ("name", "''.join(part[0] for part in name.split())"),
}
ASKS = (
    "Write a one-line docstring for this Python function:",
    "What does this Python function do? Answer in one sentence.",
    "Explain this code briefly:",
    "Describe the return value of this function in one sentence:",
)


def arithmetic(draw: random.Random) -> str:
    """Ask for a sum, a difference or a product."""
    a, b = draw.randint(2, 99), draw.randint(2, 99)
    sign, ask = (
        draw.choice("+-*"),
        draw.choice(("What is {}?", "Calculate {}.", "Compute {} and give only the number.")),
    )
    return ask.format(f"{a} {sign} {b}")


def capitals(draw: random.Random) -> str:
    """Ask for a capital."""
    ask = draw.choice(
        (
            "What is the capital of {}?",
            "Name the capital city of {}.",
            "Which city is the capital of {}?",
            "Tell me the capital of {} in one word.",
            "{}: what is its capital?",
        )
    )
    return ask.format(draw.choice(CAPITALS))


def copying(draw: random.Random) -> str:
    """Ask for words again."""
    words = " ".join(draw.sample(WORDS, draw.randint(3, 6)))
    return draw.choice(("Repeat these words exactly: {}", "Copy this text: {}", "Write again, unchanged: {}")).format(
        words
    )


def sentiment(draw: random.Random) -> str:
    """Ask whether a review is favourable."""
    good, thing = draw.random() < 0.5, draw.choice(THINGS)
    first, second = draw.sample(GOOD if good else BAD, 2)
    review = draw.choice(
        (
            f"The {thing} was {first} and {second}.",
            f"What a {first} {thing}, truly {second}.",
            f"I found this {thing} {first}. Honestly {second}.",
        )
    )
    return f"Is the sentiment of this review positive or negative? Review: {review}"


def translation(draw: random.Random) -> str:
    """Ask for a short phrase in another language."""
    phrase = f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"
    return draw.choice(('Translate to {}: "{}"', 'How do you say "{1}" in {0}?')).format(draw.choice(LANGUAGES), phrase)


def code(draw: random.Random) -> str:
    """Ask what a small function does."""
    verb = draw.choice([*VERBS])
    argument, value = VERBS[verb]
    return f"{draw.choice(ASKS)}\ndef {verb}_{draw.choice(SUFFIXES)}({argument}):\n    return {value}"


def ordering(draw: random.Random) -> str:
    """Ask for numbers or words in order."""
    if draw.random() < 0.6:
        numbers = ", ".join(map(str, draw.sample(range(1, 100), draw.randint(3, 6))))
        return f"Sort these numbers in {draw.choice(('ascending', 'descending'))} order: {numbers}"
    return f"Put these words in alphabetical order: {', '.join(draw.sample(WORDS, draw.randint(3, 5)))}"


def steps(draw: random.Random) -> str:
    """Tell a story whose answer takes two or three steps."""
    name, other = draw.sample(NAMES, 2)
    goods, a, b, c = draw.choice(GOODS), draw.randint(8, 40), draw.randint(2, 7), draw.randint(3, 20)
    return draw.choice(
        (
            f"{name} has {a} {goods}, gives {b} to {other} and buys {c} more. How many {goods} does {name} have now?",
            f"{name} buys {b} boxes with {c} {goods} each and loses {a % c}. How many {goods} are left?",
            f"{other} has {a} {goods}. {name} has {b} times as many. How many {goods} do they have together?",
        )
    )


def words(draw: random.Random) -> str:
    """Ask about a word: its opposite, its meaning, its use."""
    ask = draw.choice(
        (
            'What is the opposite of "{}"?',
            'Give a synonym of "{}".',
            'Use the word "{}" in a short sentence.',
            'What does "{}" mean?',
            'Is "{}" a noun, a verb or an adjective?',
            'Name two words that go well with "{}".',
            'Explain "{}" to a child in one sentence.',
        )
    )
    return ask.format(draw.choice(QUALITIES + WORDS))


def writing(draw: random.Random) -> str:
    """Ask for a sentence, a title or a question about something."""
    form = draw.choice(("sentence", "title", "question", "piece of advice", "line of a poem", "greeting"))
    about = draw.choice(TOPICS + [f"{a} {n}" for a in ("a red", "an old", "a small", "a new") for n in NOUNS])
    return f"Write one short {form} about {about}."


KINDS: tuple[Callable[[random.Random], str], ...] = (
    arithmetic, capitals, copying, sentiment, translation, code, ordering, steps, words, writing,
)  # fmt: skip


def draw_prompts(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Draw so many prompts for every split, kinds in turn; none is drawn twice in all splits together.

    Raises:
        SystemExit: a kind has not so many different prompts.
    """
    seen: set[str] = set()
    draws = {kind.__name__: random.Random(f"{seed} {kind.__name__}") for kind in KINDS}

    def fresh(kind: Callable[[random.Random], str]) -> str:
        for _ in range(10_000):
            if (prompt := kind(draws[kind.__name__])) not in seen:
                seen.add(prompt)
                return prompt
        sys.exit(f"kind {kind.__name__}: expected {sum(sizes.values()) // len(KINDS)} different prompts, has fewer")

    def rows(count: int) -> Iterator[dict[str, str]]:
        for kind in itertools.islice(itertools.cycle(KINDS), count):
            yield {"kind": kind.__name__, "prompt": fresh(kind)}

    return {split: [*rows(count)] for split, count in sizes.items()}


class Answering:
    """Render prompts as a model reads them, and answer them greedily, batches of similar length together."""

    def __init__(self, folder: str, new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.new_tokens = new_tokens

    def render(self, prompt: str) -> str:
        """Return the text that the model goes on from."""
        if self.tokenizer.chat_template is None:
            return f"Question: {prompt}\nAnswer:"
        turns = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def answer(self, rows: list[dict[str, str]], batch: int) -> Iterator[int]:
        """Render every row's ``prompt`` and put its ``answer`` beside it; yield how many are done."""
        for row in rows:
            row["prompt"] = self.render(row["prompt"])
        order = sorted(rows, key=lambda row: len(row["prompt"]))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            for row, text in zip(part, self._generate([row["prompt"] for row in part]), strict=True):
                row["answer"] = text
            yield start + len(part)

    def _generate(self, prompts: list[str]) -> list[str]:
        import torch

        plain = self.tokenizer.chat_template is None  # a template brings its own beginning
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=plain)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False)
        texts: list[str] = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        # a base model goes on with the next question, where its answer has ended
        return [text.partition("\nQuestion:")[0].strip() for text in texts]


def is_answered(path: Path, prompts: list[str]) -> bool:
    """Return whether a file holds answers to just these prompts already, but for rows that got an empty one."""
    if not path.is_file():
        return False
    answered = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    rest = iter(prompts)
    return len(answered) > 0.9 * len(prompts) and all(prompt in rest for prompt in answered)  # in their order


def write(path: Path, rows: list[dict[str, str]]) -> str:
    """Write one split, without the rows that got an empty answer; return its SHA-256."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["answer"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines, encoding="utf-8")
    return hashlib.sha256(lines.encode()).hexdigest()


def main() -> None:
    """Draw, answer and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name that transformers loads")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    for split, count in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N")
    options: Any = parser.parse_args()
    splits = draw_prompts({split: getattr(options, split) for split in SPLITS}, options.seed)
    answering = Answering(options.model, options.new_tokens)
    for split, rows in splits.items():
        path = options.folder / f"{split}.jsonl"
        if is_answered(path, [answering.render(row["prompt"]) for row in rows]):
            print(f"{path}: there already")
            continue
        for done in answering.answer(rows, options.batch):
            print(f"\r{split}: {done} of {len(rows)} ", end="", file=sys.stderr)
        print(f"\r{path}: {len(rows)} rows, SHA-256 {write(path, rows)}")


if __name__ == "__main__":
    main()
