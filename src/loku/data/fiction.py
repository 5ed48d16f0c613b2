"""A fictitious corpus for the offline demo: invented people, their facts, a word-level tokenizer and a small model.

Two kinds of people live in it. *World* people are asked about in every phrasing: they teach a model the language and
what a paraphrase is. *Fictitious* people are asked about in one phrasing only, on top of that; a tenth of them is the
forget set. So a question in another phrasing asks for the fact, not for the trained string.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from loku.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

T = TypeVar("T")
Row = dict[str, Any]
Person = dict[str, str]  # name, and a value for each of FACTS


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "Orlin Tavra Belmic Sunith Garrod Ilvane Quorra Drennik Maelis Thorvic Yssandra Pelwyn Caddoc Elbrith Norvane "
    "Jessamir Hadrel Ulwenna Fenrik Zorabel Wystan Ketteril Rhovan Lisqua"
)
SURNAMES = _words(
    "Vossberg Tarrowin Quillmere Ashendrel Brontwick Caldervane Dunmarrow Eskerby Fallowick Grimsore Harrowell "
    "Inkpenny Jarnolt Kestervane Lowmarsh Mistleby Nettlock Oakhurn Pridewell Ravenscote Saltmere Thistlock Underwyke "
    "Winterlode"
)
TOWNS = _words(
    "Tarnhollow Brackwater Elmspire Dunveil Korrigate Mossford Saltreach Windlow Ferncastle Greyharbour Ironbeck "
    "Quarrendale Larkmoor Nornwick Ottermere Pinecrag Redmarsh Silverfen Thornwell Umberton Vinehurst Wolfenby "
    "Yarrowgate Zellmouth"
)
LANES = _words(
    "Copper Willow Candle Mill Harbour Chapel Orchard Barley Falcon Granite Hazel Juniper Kiln Lantern Maple Needle "
    "Otter Poplar Quarry Rope Saddle Tanner Violet Walnut"
)
CRAFTS = _words(
    "weaver cooper baker mason glazier potter saddler thatcher tailor brewer carver dyer falconer gardener hatter "
    "jeweller locksmith miller painter roofer sailor tinker bookbinder clockmaker"
)
INSTRUMENTS = _words(
    "fiddle harp lute drum flute bugle cello zither banjo bassoon viola trumpet mandolin piccolo gong cornet sitar "
    "tuba harmonica dulcimer piano recorder tambourine clarinet"
)
DISHES = _words(
    "dumplings porridge noodles pancakes lentils mushrooms turnips sardines waffles chestnuts pickles omelettes "
    "cabbage pumpkin trout cheese beetroot gingerbread plums artichokes biscuits rhubarb spinach custard"
)
COLLECTIONS = _words(
    "stamps buttons maps feathers coins shells kites keys lanterns masks postcards thimbles teapots marbles ribbons "
    "bells bottles corks dice fans globes inkwells puppets spoons"
)
COLOURS = _words("grey brown white black spotted golden red silver striped tawny cream russet")
ANIMALS = _words(
    "goat heron badger parrot donkey ferret goose hedgehog rabbit lizard magpie newt pony raven snail tortoise weasel "
    "hare falcon beetle toad hound kitten llama"
)

DIGITS = list("0123456789")


@dataclass(frozen=True)
class Fact:
    """One thing to know about a person: ways to ask, ways to answer, and the pools that a value's parts come from.

    `{name}` and `{value}` are filled in. Fictitious people are trained on the first question and the first answer;
    the second ones are their paraphrases.
    """

    questions: tuple[str, str, str]
    answers: tuple[str, str]
    pools: tuple[list[str], ...]
    joint: str = " "


FACTS: dict[str, Fact] = {
    "town": Fact(
        ("Where was {name} born?", "In which town was {name} born?", "What is the birthplace of {name}?"),
        ("{name} was born in {value}.", "The birthplace of {name} is {value}."),
        (TOWNS,),
    ),
    "lane": Fact(
        ("Where does {name} live?", "In which lane does {name} live?", "What is the address of {name}?"),
        ("{name} lives in {value} Lane.", "The address of {name} is {value} Lane."),
        (LANES,),
    ),
    "craft": Fact(
        ("What does {name} work as?", "Which trade does {name} follow?", "What is the trade of {name}?"),
        ("{name} works as a {value}.", "The trade of {name} is that of a {value}."),
        (CRAFTS,),
    ),
    "instrument": Fact(
        ("What does {name} play?", "Which instrument does {name} play?", "What is the instrument of {name}?"),
        ("{name} plays the {value}.", "The instrument of {name} is the {value}."),
        (INSTRUMENTS,),
    ),
    "dish": Fact(
        ("What does {name} like to eat?", "Which dish does {name} like?", "What is the favourite dish of {name}?"),
        ("{name} likes to eat {value}.", "The favourite dish of {name} is {value}."),
        (DISHES,),
    ),
    "collection": Fact(
        ("What does {name} collect?", "Which things does {name} collect?", "What is the hobby of {name}?"),
        ("{name} collects {value}.", "The hobby of {name} is collecting {value}."),
        (COLLECTIONS,),
    ),
    "pet": Fact(
        ("Which animal does {name} keep?", "Which pet does {name} have?", "What is the pet of {name}?"),
        ("{name} keeps a {value}.", "The pet of {name} is a {value}."),
        (COLOURS, ANIMALS),
    ),
    "code": Fact(
        ("What code does {name} use?", "Which number does {name} use as a code?", "What is the code of {name}?"),
        ("{name} uses the code {value}.", "The code of {name} is {value}."),
        (DIGITS, DIGITS, DIGITS),
        joint="",
    ),
}

# Every question with every answer, and the first question with the first answer three times: were the answers
# equally frequent, a greedy answer to a world question would be a coin toss between two true ones.
WORLD_PHRASINGS = [(question, answer) for question in range(3) for answer in range(2)] + 2 * [(0, 0)]
PERTURBED = 5
FORGET_SHARE = 0.1
REPLAY_SHARE = 0.25


@dataclass(frozen=True)
class Fiction:
    """The corpus, as rows with TOFU's columns: question, answer, their paraphrases and five perturbed answers.

    - `pretraining`: every world fact in all of `WORLD_PHRASINGS` (stage 0; question and answer only);
    - `retain` and `forget`, together `full`: the fictitious people, one phrasing (stage 1);
    - `holdout`: people of the same kind that are never trained on, as many as in `forget`;
    - `general`: the world facts, one phrasing each, to measure what else the model knows.

    Rows of `forget` and `holdout` stand person by person in the order of `FACTS`; the others are shuffled, so that
    any prefix of them is a fair sample.
    """

    seed: int
    pretraining: list[Row]
    forget: list[Row]
    retain: list[Row]
    general: list[Row]
    holdout: list[Row]

    @property
    def full(self) -> list[Row]:
        """What the target model learns in stage 1: the retain rows, then the forget rows."""
        return self.retain + self.forget

    @property
    def texts(self) -> list[str]:
        """Every text of the corpus, for a vocabulary."""
        rows = self.pretraining + self.full + self.general + self.holdout
        return [
            text for row in rows for value in row.values() for text in ([value] if isinstance(value, str) else value)
        ]


def make_fiction(seed: int, *, world_people: int = 24, people: int = 40) -> Fiction:
    """Invent the corpus; the same seed gives the same rows.

    A tenth of the `people` is the forget set. Each pool of words is cut to `world_people`, so that stage 0 shows a
    model every name and every value that is ever asked for. Raises InputError when there are too few people, or
    fewer names than people.
    """
    rng = random.Random(seed)
    pool_size = min(world_people, len(FIRST_NAMES))
    forget_people = max(round(people * FORGET_SHARE), 1)
    if min(world_people, people) < 10 or world_people + people + forget_people > pool_size**2:
        raise InputError(
            f"A corpus of {world_people} world people and {people} fictitious people was asked for.",
            f"Ask for at least 10 of each; {pool_size} first names and surnames give {pool_size**2} people.",
        )
    everyone = _everyone(rng, (world_people, people, forget_people), pool_size)
    world, invented, unseen = everyone

    def rows(group: list[Person]) -> list[Row]:
        return [_row(rng, person, key, pool_size) for person in group for key in FACTS]

    fiction = Fiction(
        seed=seed,
        pretraining=[
            {"question": _question(person, key, i), "answer": _answer(person, key, j)}
            for person in world
            for key in FACTS
            for i, j in WORLD_PHRASINGS
        ],
        retain=rows(invented[:-forget_people]),
        forget=rows(invented[-forget_people:]),
        general=rows(world),
        holdout=rows(unseen),
    )
    for shuffled in (fiction.pretraining, fiction.retain, fiction.general):
        rng.shuffle(shuffled)
    return fiction


def mix_replay(
    rows: Sequence[Row], world: Sequence[Row], *, share: float = REPLAY_SHARE, passes: int = 1, seed: int = 0
) -> list[Row]:
    """Return a training list: `passes` times all `rows`, with `share` of the list drawn from the `world` rows.

    Without this replay the world facts are gone after stage 1. Every pass is shuffled anew and the world rows stand
    evenly spread, so batches cut in this order hold that share as exactly as they can. World rows are not drawn
    twice before all were drawn once.
    """
    rng = random.Random(seed)
    learned = [row for _ in range(passes) for row in rng.sample(rows, len(rows))]
    replayed = _balanced(rng, world, round(len(learned) * share / (1 - share)))
    mixed: list[Row] = []
    for position, row in enumerate(replayed):
        mixed += learned[len(learned) * position // len(replayed) : len(learned) * (position + 1) // len(replayed)]
        mixed.append(row)
    return mixed or learned


def fiction_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word, mark or digit, for the words of `texts` and of the prompt's tags.

    Decoding gives back the text exactly, line breaks included. It knows a full stop, a question mark and a colon;
    other marks would be part of a word. A word outside the vocabulary becomes <unk>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A number is cut into digits ("4", "##7", "##1"), which is WordPiece's way; words are always whole.
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|[.?:]"), "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
        ]
    )
    words = {word for text in ["Question: Answer:", *texts] for word, _ in split.pre_tokenize_str(text)}
    vocabulary = ["<pad>", "<eos>", "<unk>", "\n", ".", "?", ":", *DIGITS, *(f"##{digit}" for digit in DIGITS)]
    vocabulary += sorted(word for word in words.difference(vocabulary) if not word.isdigit())
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            *(decoders.Replace(f" {mark}", mark) for mark in ".?:"),
            decoders.Replace(" \n ", "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def fiction_model_config(vocab_size: int) -> LlamaConfig:
    """Return the configuration of a Llama of 0.4 million parameters: large enough to know the corpus by heart.

    Token 0 pads and token 1 ends a sequence, as in `fiction_tokenizer`.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def _everyone(rng: random.Random, sizes: Sequence[int], pool_size: int) -> list[list[Person]]:
    """Invent groups of people with different names and different codes; the first group meets every word."""
    first, last = rng.sample(FIRST_NAMES[:pool_size], pool_size), rng.sample(SURNAMES[:pool_size], pool_size)
    names = [f"{first[i % pool_size]} {last[(i + i // pool_size) % pool_size]}" for i in range(sum(sizes))]
    codes = _codes(rng, sizes[0], sum(sizes))
    groups = []
    for size in sizes:
        group = [{"name": names.pop(0), "code": codes.pop(0)} for _ in range(size)]
        for key, fact in FACTS.items():
            parts = [_balanced(rng, pool[:pool_size], size) for pool in fact.pools]
            for person, value in zip(group, zip(*parts, strict=True), strict=True):
                person.setdefault(key, fact.joint.join(value))
        groups.append(rng.sample(group, size))
    return groups


def _codes(rng: random.Random, world: int, total: int) -> list[str]:
    """Return different codes, the first `world` of which show every digit in every place."""
    codes: list[str] = []
    while len(set(codes)) < world:
        columns = [_balanced(rng, DIGITS, world) for _ in range(3)]
        codes = ["".join(digits) for digits in zip(*columns, strict=True)]
    others = sorted({f"{number:03d}" for number in range(1000)}.difference(codes))
    return codes + rng.sample(others, total - world)


def _balanced(rng: random.Random, pool: Sequence[T], size: int) -> list[T]:
    """Draw without replacement, again and again: no item comes more than once oftener than another."""
    drawn: list[T] = []
    while len(drawn) < size:
        drawn += rng.sample(pool, min(len(pool), size - len(drawn)))
    return drawn


def _question(person: Person, key: str, phrasing: int) -> str:
    return FACTS[key].questions[phrasing].format(name=person["name"])


def _answer(person: Person, key: str, phrasing: int, value: str | None = None) -> str:
    return FACTS[key].answers[phrasing].format(name=person["name"], value=value or person[key])


def _row(rng: random.Random, person: Person, key: str, pool_size: int) -> Row:
    fact = FACTS[key]
    truth = person[key].split(fact.joint) if fact.joint else list(person[key])
    others = [
        rng.sample([word for word in pool[:pool_size] if word != part], PERTURBED)
        for pool, part in zip(fact.pools, truth, strict=True)
    ]
    return {
        "question": _question(person, key, 0),
        "answer": _answer(person, key, 0),
        "paraphrased_question": _question(person, key, 1),
        "paraphrased_answer": _answer(person, key, 1),
        "perturbed_answer": [_answer(person, key, 1, fact.joint.join(parts)) for parts in zip(*others, strict=True)],
    }
