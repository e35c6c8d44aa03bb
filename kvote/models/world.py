"""The small language the embedded model speaks: filler, facts hidden in it, and questions about them.

Every word is one token. A document is worked on as an array of token ids and only turned into text at the end, so
its length in tokens is exact by construction, and a document of a million tokens takes seconds.

Ids are laid out in blocks: 4 specials, 1,000 three-digit numbers, 1,500 key words, then every other word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAD, BOS, EOT, UNK = range(4)
SPECIALS = ("<pad>", "<s>", "<eot>", "<unk>")
NUMBERS = tuple(f"{n:03d}" for n in range(1000))
VOCABULARY_SIZE = 3456
GLUED = (".", ",", ":", ";", "?")  # written without a space before them

TASKS = ("needle", "passkey", "kv", "multi_key", "multi_value", "variables", "turns")

_COLOURS = (
    "amber ash autumn blue bold brass bright calm cedar clear cloud cobalt copper coral crimson dawn deep drift dusk "
    "east ember fern flint frost gold green grey hazel high iron ivory jade jet lake linen long maple mild mist moss "
    "north oak old pearl pine quick quiet red river royal"
).split()
_THINGS = (
    "arrow bell bird bridge brook cliff field finch fox gate glen grove hare harbor hawk hill horn lantern leaf "
    "marsh mill moon otter path stone swan thorn tower vale wolf"
).split()
KEYS = tuple(c + t for c in _COLOURS for t in _THINGS)

_NOUNS = (
    "actor anchor apple artist aunt badge baker balcony ball banker barn barrel basket beach beam bear bed bench boat "
    "book border bottle bowl box boy bread broom brother bucket builder button cabin cake camera canal candle cap "
    "captain car card carpet cart castle cat cellar chain chair chapter cheese chest cinema circle clerk clock coach "
    "coat coin college corner cottage cousin cow cradle crane crowd crown cup curtain dancer daughter dentist desk "
    "diary dish doctor dog doll donkey door drawer dream dress driver drum duck eagle editor engine envelope evening "
    "factory farm farmer feather fence ferry fiddle film finger fire fish flag flower flute forest fork fountain frame "
    "friend frog fruit garden giant girl glove goat guard guest guitar hall hammer hat hedge helmet hen hero horse "
    "hospital hotel hour house hunter insect island jacket jar jewel judge kettle king kitchen kite ladder lamb lamp "
    "lawyer lemon lesson letter library lion lock machine map market mason meadow melon merchant mirror monkey morning "
    "motor mountain museum nail neighbor nest net notebook nurse ocean office orange orchard organ oven owl painter "
    "palace pan parcel park parrot pear pen pencil piano picture pig pigeon pillow pilot pipe pirate plank plate poem "
    "poet pond pony postcard potato prince prison puppet puzzle queen rabbit rail ribbon road robin rocket roof room "
    "root rope rose rug sailor school scholar seat shed shell ship shirt shoe shop shore shoulder singer sister sofa "
    "soldier song spider spoon spring square stable stair star station statue street student tailor teacher temple "
    "tent theater thief ticket tiger tool town toy train tree trumpet tunnel turtle uncle valley village violin wagon "
    "wall watch wheel whistle window winter writer acorn barber beetle blanket bucket butcher cherry chimney cloak "
    "compass cottage drawing falcon grocer hermit knight lizard locket mitten mule needle oyster parade pebble pillar "
    "plum porter quilt ribbon saddle scarf shepherd sparrow squirrel stove trunk weaver willow wizard"
).split()
_ADJECTIVES = (
    "ancient angry awake bitter blind brave brief brisk broad broken busy careful cheap cheerful clean clever cold "
    "common cosy crooked curious damp dark dear dry dull eager early empty fair famous fierce firm flat fresh gentle "
    "glad grand great happy hard heavy hidden hollow honest hot huge humble hungry idle kind large lazy light little "
    "lively lonely loose loud lucky merry modern muddy narrow neat new noble noisy odd open painted patient plain "
    "pleasant polite poor proud pure rare rich ripe rough round rusty sad safe sharp shiny short shy silent simple "
    "slow small smooth soft solid spare steady steep strange strong sudden sweet tall tame thick thin tidy tiny tired "
    "tough useful vain warm weak wet wide wild wise wooden young"
).split()
_VERBS = (
    "admired adored avoided blamed bought broke brought built called carried caught chased chose cleaned climbed "
    "copied counted covered crossed described drew dropped entered examined feared fetched filled followed forgot "
    "found gathered greeted guided helped hid joined kept kicked knew left lifted liked loved measured mended met "
    "missed moved noticed opened ordered painted passed planted praised pulled pushed raised reached received "
    "repaired returned sketched sold sought spotted stole studied taught tested threw thanked touched trusted turned "
    "used visited warned washed watched welcomed wanted"
).split()
_ADVERBS = (
    "again almost always badly barely bravely calmly carefully closely daily eagerly early easily everywhere finally "
    "firmly gently gladly happily loudly nearby neatly never nicely now often once outside politely proudly quickly "
    "quietly rarely sadly safely slowly softly sometimes soon still suddenly swiftly today together twice upstairs "
    "usually weekly well wisely yearly yesterday"
).split()
_PREPOSITIONS = (
    "above across against along among around behind below beneath beside between beyond inside near over under".split()
)
_NOISE_TEXT = "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
_TEMPLATE_WORDS = (
    ". , : ; ? = One of the special magic numbers for is What number mentioned in text The pass key Remember it VAR "
    "and are all value item Items Find variables assigned They A a Every Some In It was When Two Three Once After "
    "with to from by on at but while who grass sky sun yellow Here we go There back that this his her their its"
).split()


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


_PLURALS = tuple(map(_plural, _NOUNS))


def _vocabulary() -> tuple[str, ...]:
    """All words by id; plurals come last and fill the vocabulary up to its size."""
    parts = (_TEMPLATE_WORDS, _NOISE_TEXT.split(), _PREPOSITIONS, _ADVERBS, _VERBS, _ADJECTIVES, _NOUNS, _PLURALS)
    words = dict.fromkeys([*SPECIALS, *NUMBERS, *KEYS])
    for part in parts:
        words.update(dict.fromkeys(part))
    return tuple(words)[:VOCABULARY_SIZE]


WORDS = _vocabulary()
ID = {word: i for i, word in enumerate(WORDS)}
FIRST_NUMBER, FIRST_KEY, FIRST_WORD = 4, 1004, 2504

_SPACED = np.array([w if w in GLUED else " " + w for w in WORDS], dtype=object)


@dataclass(frozen=True)
class Question:
    """One question to append to a document (or to the turn before it) and the answer expected.

    prompt and answer are text without special tokens; the model ends an answer with ``<eot>``. depth is where the
    (first) fact that answers it starts, as a share of the document's tokens, in [0, 1).
    """

    task: str
    prompt: str
    answer: str
    depth: float


@dataclass(frozen=True)
class Sample:
    """A document (the text after ``<s>``, which the tokenizer adds) and questions to ask in this order."""

    document: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Ask:
    """A question as token ids; it is answered ``offset`` tokens into fact number ``fact`` of its Plan."""

    task: str
    prompt: np.ndarray
    answer: np.ndarray
    fact: int
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """The contents of a document before it has a length: fact sentences in order of appearance, and questions."""

    facts: tuple[np.ndarray, ...]
    asks: tuple[Ask, ...]


def encode(text: str) -> np.ndarray:
    """Ids [n] of text whose words and punctuation are all separated by spaces. KeyError for an unknown word."""
    return np.array([ID[w] for w in text.split()], dtype=np.int64)


def decode(ids: np.ndarray) -> str:
    """Text of ids [n]; the tokenizer gives the same ids back for it."""
    return "".join(_SPACED[ids].tolist()).removeprefix(" ")


def sample(task: str, tokens: int, seed: int, facts: int = 4, questions: int | None = None) -> Sample:
    """A document of exactly ``tokens`` tokens, ``<s>`` included, and questions of one task about it.

    facts is the number of fact sentences (for "kv" the pairs of one list; "passkey" always has one pass key).
    questions defaults to 2 for "turns" and 1 otherwise. The same arguments give the same sample, and the same seed
    says and asks the same at every length.
    Raises ValueError for an unknown task, or when the facts do not fit in the document.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
    if facts < 1 or (questions is not None and questions < 1):
        raise ValueError(f"facts and questions must be at least 1, got {facts} and {questions}")
    rng = np.random.default_rng([TASKS.index(task), facts, questions or 0, seed])
    what = plan(task, rng, facts, (2 if task == "turns" else 1) if questions is None else questions)
    ids, starts = lay_out(what.facts, tokens, rng)
    asked = (
        Question(a.task, decode(a.prompt), decode(a.answer), (starts[a.fact] + a.offset) / tokens) for a in what.asks
    )
    return Sample(decode(ids[1:]), tuple(asked))


def plan(task: str, rng: np.random.Generator, facts: int, questions: int) -> Plan:
    """Choose keys, values and questions; questions is cut to what the facts can answer."""
    return _PLANS[task](rng, facts, questions)


def lay_out(facts: tuple[np.ndarray, ...], tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Spread facts, in order, over filler at random sentence ends: ids [tokens] starting with ``<s>``, and starts."""
    filler = tokens - 1 - sum(map(len, facts))
    if filler < 0:
        raise ValueError(f"{len(facts)} facts need a document of at least {tokens - filler} tokens, got {tokens}")
    hay = haystack(filler, rng)
    ends = np.concatenate([[0], np.flatnonzero(hay == _STOP) + 1])
    cuts = np.sort(rng.choice(ends, size=len(facts), replace=len(ends) < len(facts)))
    pieces, starts, last, at = [np.array([BOS])], [], 0, 1
    for cut, fact in zip(cuts.tolist(), facts, strict=True):
        at += cut - last
        starts.append(at)
        pieces += [hay[last:cut], fact]
        at, last = at + len(fact), cut
    return np.concatenate([*pieces, hay[last:]]), starts


def haystack(tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Filler sentences, ids [tokens]: RULER's five noise sentences, prose, or both mixed, chosen by rng."""
    style = int(rng.integers(3))
    ids = np.resize(_NOISE, tokens) if style == 0 else _prose(tokens, rng, noise=0.0 if style == 1 else 0.15)
    if tokens >= 2:  # the cut may fall inside a sentence: close it, and never with two full stops
        ids[-2] = _TODAY if ids[-2] == _STOP else ids[-2]
        ids[-1] = _STOP
    return ids


def _prose(tokens: int, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Sentences drawn from templates until there are tokens of them; one in 1/noise is the whole noise text."""
    count = tokens // min(map(len, _SENTENCES)) + 1
    odds = np.full(len(_SENTENCES), (1 - noise) / (len(_SENTENCES) - 1))
    odds[-1] = noise
    kinds = rng.choice(len(_SENTENCES), size=count, p=odds)
    lengths = np.array([len(s) for s in _SENTENCES])[kinds]
    kinds = kinds[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    table = np.full((len(kinds), max(map(len, _SENTENCES))), -1, dtype=np.int64)
    for kind, slots in enumerate(_SENTENCES):
        rows = np.flatnonzero(kinds == kind)
        for column, words in enumerate(slots):
            table[rows, column] = words[0] if len(words) == 1 else rng.choice(words, size=len(rows))
    return table[table >= 0][:tokens]


def _say(*parts: str | int) -> np.ndarray:
    """Ids of a sentence; ids may stand among the words."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [ID[w] for w in part.split()]
    return np.array(ids, dtype=np.int64)


def _draw_keys(rng: np.random.Generator, n: int) -> list[int]:
    if n > len(KEYS):
        raise ValueError(f"at most {len(KEYS)} keys in a document, got {n}")
    return (FIRST_KEY + rng.choice(len(KEYS), size=n, replace=False)).tolist()


def _draw_values(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    """n values of two number ids; no two share their first number while there are numbers enough."""
    halves = (FIRST_NUMBER + rng.choice(1000, size=n, replace=n > 1000) for _ in range(2))
    return list(zip(*(h.tolist() for h in halves), strict=True))


def _needle(key: int, value: tuple[int, int]) -> np.ndarray:
    return _say("One of the special magic numbers for", key, "is :", *value, ".")


def _ask_needle(key: int, value: tuple[int, int], fact: int, task: str = "needle") -> Ask:
    prompt = _say(
        "What is the special magic number for", key, "mentioned in the text ?",
        "The special magic number for", key, "is :",
    )  # fmt: skip
    return Ask(task, prompt, _say(*value), fact)


def _plan_needle(rng: np.random.Generator, facts: int, questions: int, task: str = "needle") -> Plan:
    keys, values = _draw_keys(rng, facts), _draw_values(rng, facts)
    order = rng.permutation(facts)[:questions].tolist()
    asks = tuple(_ask_needle(keys[i], values[i], i, task) for i in order)
    return Plan(tuple(map(_needle, keys, values)), asks)


def _plan_turns(rng: np.random.Generator, facts: int, questions: int) -> Plan:
    return _plan_needle(rng, facts, questions, "turns")


def _plan_passkey(rng: np.random.Generator, facts: int, questions: int) -> Plan:
    value = _draw_values(rng, 1)[0]
    fact = _say("The pass key is", *value, ". Remember it .", *value, "is the pass key .")
    prompt = _say("What is the pass key mentioned in the text ? The pass key is :")
    return Plan((fact,), (Ask("passkey", prompt, _say(*value), 0),))


def _plan_kv(rng: np.random.Generator, facts: int, questions: int) -> Plan:
    keys, values = _draw_keys(rng, facts), _draw_values(rng, facts)
    pairs = [_say("Items :" if i == 0 else ";", k, ":", *v) for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    offsets = np.cumsum([0, *map(len, pairs)]).tolist()
    asks = []
    for i in rng.permutation(facts)[:questions].tolist():
        prompt = _say("What is the value of item", keys[i], "? The value of item", keys[i], "is :")
        asks.append(Ask("kv", prompt, _say(*values[i]), 0, offsets[i]))
    return Plan((np.concatenate([*pairs, _say(".")]),), tuple(asks))


def _plan_multi_key(rng: np.random.Generator, facts: int, questions: int) -> Plan:
    facts = max(facts, 2)
    keys, values = _draw_keys(rng, facts), _draw_values(rng, facts)
    order = rng.permutation(facts).tolist()
    asks = []
    for i, j in zip(order[0::2][:questions], order[1::2], strict=False):
        both = (keys[i], "and", keys[j])
        prompt = _say(
            "What are the special magic numbers for", *both, "mentioned in the text ?",
            "The special magic numbers for", *both, "are :",
        )  # fmt: skip
        answer = _say(keys[i], ":", *values[i], ",", keys[j], ":", *values[j])
        asks.append(Ask("multi_key", prompt, answer, min(i, j)))
    return Plan(tuple(map(_needle, keys, values)), tuple(asks))


def _plan_multi_value(rng: np.random.Generator, facts: int, questions: int) -> Plan:
    """Keys with two values each (the last has one when facts is odd); answers are in order of appearance."""
    facts = max(facts, 2)
    keys, values = _draw_keys(rng, (facts + 1) // 2), _draw_values(rng, facts)
    order = rng.permutation(facts)  # order[f] // 2 is the key that fact f speaks of
    owners = (order // 2).tolist()
    asks = []
    for k in rng.permutation(facts // 2)[:questions].tolist():
        first, second = (f for f, owner in enumerate(owners) if owner == k)
        prompt = _say(
            "What are all the special magic numbers for", keys[k], "mentioned in the text ?",
            "The special magic numbers for", keys[k], "are :",
        )  # fmt: skip
        asks.append(Ask("multi_value", prompt, _say(*values[first], ",", *values[second]), first))
    return Plan(tuple(_needle(keys[k], v) for k, v in zip(owners, values, strict=True)), tuple(asks))


def _plan_variables(rng: np.random.Generator, facts: int, questions: int) -> Plan:
    """Chains of one value and one variable assigned from it, asked for both names."""
    chains = max(facts // 2, 1)
    names, values = _draw_keys(rng, 2 * chains), _draw_values(rng, chains)
    order = rng.permutation(np.repeat(np.arange(chains), 2)).tolist()  # first mention: the value; second: the copy
    facts_: list[np.ndarray] = []
    starts: dict[int, int] = {}
    for f, c in enumerate(order):
        head, tail = names[2 * c], names[2 * c + 1]
        facts_.append(_say("VAR", tail, "= VAR", head, ".") if c in starts else _say("VAR", head, "=", *values[c], "."))
        starts.setdefault(c, f)
    asks = []
    for c in rng.permutation(chains)[:questions].tolist():
        prompt = _say("Find all variables assigned the value", *values[c], ". They are :")
        asks.append(Ask("variables", prompt, _say(names[2 * c], ",", names[2 * c + 1]), starts[c]))
    return Plan(tuple(facts_), tuple(asks))


_PLANS = {
    "needle": _plan_needle,
    "passkey": _plan_passkey,
    "kv": _plan_kv,
    "multi_key": _plan_multi_key,
    "multi_value": _plan_multi_value,
    "variables": _plan_variables,
    "turns": _plan_turns,
}


def _slots(template: str) -> tuple[np.ndarray, ...]:
    """A sentence template as one array of possible ids per token."""
    kinds = {
        "NOUN": _NOUNS,
        "NOUNS": [w for w in WORDS[FIRST_WORD:] if w in _PLURALS],
        "ADJ": _ADJECTIVES,
        "VERB": _VERBS,
        "ADV": _ADVERBS,
        "PREP": _PREPOSITIONS,
    }
    return tuple(np.array([ID[w] for w in kinds.get(slot, [slot])]) for slot in template.split())


_STOP, _TODAY = ID["."], ID["today"]
_NOISE = encode(_NOISE_TEXT)
_SENTENCES = tuple(
    _slots(template)
    for template in (
        "The ADJ NOUN VERB the NOUN PREP the NOUN .",
        "A NOUN VERB it ADV .",
        "Every NOUN PREP the NOUN VERB a ADJ NOUN , and the NOUN VERB it ADV .",
        "Some NOUNS ADV VERB the ADJ NOUNS .",
        "In the NOUN , a ADJ NOUN VERB the NOUNS .",
        "It was a ADJ NOUN , but the NOUNS VERB it .",
        "When the NOUN VERB his NOUN , the ADJ NOUNS VERB their NOUN .",
        "Two NOUNS VERB her NOUN from the NOUN to the NOUN .",
        "Once , while the NOUN VERB that NOUN , a NOUN with ADJ NOUNS VERB this NOUN .",
        "After a ADJ NOUN , the NOUN who VERB the NOUNS VERB its NOUN at the NOUN .",
        _NOISE_TEXT,  # last: drawn with its own odds
    )
)
