"""Words that carry meaning, in English and Chinese, and which paragraphs hold them.

English: words without the most frequent ones, plural and possessive endings dropped. Chinese, which has no spaces:
pairs of neighbouring characters, those with grammatical characters left out. Numbers keep their digits (1,240 is 1240).
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from .document import HAN, Document, Paragraph

_TOKEN = re.compile(rf"[{HAN}]+|\d+(?:[.,:/-]\d+)*%?|[^\W\d_{HAN}]+(?:['’-][^\W\d_{HAN}]+)*")
_HAN_RUN = re.compile(rf"[{HAN}]+")
_STOP = (
    "a an the and or but nor if then than so as at by for from in into of off on onto out over to up upon with within"
    " without about above after again against all also am any are aren be because been before being below between both"
    " can cannot could did do does doing done down during each ever few further had has have having he her here hers"
    " him his how however i is isn it its itself just let me more most much many must my no not now one only other our"
    " ours own per please same shall she should some such tell that their theirs them themselves there these they this"
    " those through thus too under until us very was we were what when where whether which while who whom whose why"
    " will would yes yet you your yours document text say says said state states stated according give find exact"
    " sentence answer question new called"
)
RAREST = 0.9  # of the rarity of the rarest word: what is counted as rare as that
NEIGHBOURS = 8  # paragraphs before and after one in which its names may stand
STOP = frozenset(_STOP.split())
# Grammar: a pair with one of them says little.
_STOP_HAN = frozenset("的了是在有和与及或于为以之其这那此被把将也都就还又很对从到由而并且但")
_MEASURES = "个座支条所家名位间件台辆份张种本片项处口"  # what Chinese counts in
_NAME_ENDS = "号市县区路街桥村镇乡省河湖山寺校院店厂局社馆楼塔站港岛"  # of ships, places, houses
_ASKING_HAN = re.compile(
    "什么时候|为什么|什么|多少(?:名(?![额称字])|[个位座份件](?![位置数额谈税性])|辆|台)?|哪[里家个些位种年]?|谁|怎么样?|怎样|如何|是否|请问|几[个年月]|吗|呢|何[时地种处]"
)
# "Painted in what colour": a passage names the colour and not the word.
_KIND_HAN = re.compile(r"(?<=[成作染涂])(什么样?的?|何种|哪一?种)(?:颜色|形状|样子|语言|文字)的?(?=\W*$)")
_SENTENCE = re.compile(
    rf"(?<=[.!?])[\"”’)\]]*\s+(?=[\"“‘(\[]?[A-Z0-9\u0400-\u04ff{HAN}])|(?<=[。！？；])[”’」』）]*|\n+"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|no|vol|fig|sec|art|eq|vs|e\.g|i\.e|cf|al|inc|ltd|co|jr|sr)|\b[A-Z])\.$",
    re.IGNORECASE,
)
_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_WHAT_IS_THE = r"\bwhat (?:is|was|are|were) the (?:\w+ ){0,2}"
_AMOUNTS = "number|amount|price|budget|population|salary|wages?|fee|fare|rent"
_ASKS_NUMBER = re.compile(
    r"多少|(?<![这那哪前后上头十数好])几[^乎何]|\bhow (?:many|much|old)\b" + rf"|{_WHAT_IS_THE}(?:{_AMOUNTS}) of\b",
    re.IGNORECASE,
)
_ASKS_NAME = re.compile(
    r"^\W*(?:by |for |from |in |of |to |under |with )?(?:who|whom|whose|where"
    r"|(?:which|what) (?:person|man|woman|town|city|village|country|place|street|firm|company))\b"
    "|谁|何人|哪位|什么人|哪里|哪儿|何处|何地|什么地方|哪[座个家]?(?:城|市|镇|村|县|省|国|公司|企业|银行|机构)",
    re.IGNORECASE,
)
_ASKS_AMOUNT = re.compile(
    r"\bhow (?:many|much|old|long|large|big|high|tall|deep|wide|far|heavy|expensive)\b"
    rf"|{_WHAT_IS_THE}(?:{_AMOUNTS}|costs?|size|height|length|depth|width|weight|age|capacity|speed|temperature|distance"
    r"|total|sum|area(?! of (?:research|study|work|law|expertise|interest))) of\b|多少",
    re.IGNORECASE,
)
# Words that stand for what was spoken of before, or for a time or place reckoned from it.
_BACK = (
    "it its itself he him his himself she her hers herself they them their theirs themselves this that these those"
    " then same former latter one ones other others another also too else so such both each either neither all"
    " before after above below again further more earlier later afterwards previous previously next following"
    " instead mentioned second third last here now"
)
_POINTS_BACK = re.compile(
    rf"\b(?:{_BACK.replace(' ', '|')}|(?:what|how) about)\b|(?<!^is )(?<!^are )(?<!^was )(?<!^were )\bthere\b"
    r"|^\W*(?:and|or|but)\b"
    "|[它他她这那该此呢另两]|其|上述|以上|上面|前面|前者|后者|之前|之后|之外|然后|随后|后来|刚才|同[样一年期]|还|也|又|再|都|各|双方|对方"
    "|当[时年地]|届时|[去次上今明]年|第[二三四五]",
    re.IGNORECASE,
)
_ASKS = re.compile(
    r"\b(?:who|whom|whose|what|which|when|where|why|how)\b"
    r"|^\W*(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\b",
    re.IGNORECASE,
)
# In Chinese, which marks no names: four characters and more that end as names of ships, houses and firms do.
_NAME_HAN = re.compile(rf"^[{HAN}]{{3,}}?(?:[{_NAME_ENDS}]|公司|集团|银行|基金|项目|面包房|学院|大学|法院)")
# What Chinese does mark as a name: called so, in title or quotation marks, and from where to where.
_MARKED_HAN = re.compile(
    rf"(?:名为|叫[做作]?)([{HAN}]{{2,6}}?)的|《([^《》]{{1,40}})》|[“「『]([^“”「」『』]{{1,40}})[”」』]"
    rf"|从([{HAN}]{{3,8}}?)到(?:([{HAN}]{{2,8}}?)(?=[需要有的，,？?]|$))?"
)
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_ASKS_TIME = re.compile(
    r"什么时候|何时|哪一?[年天]|哪个?月|几[年月号]|^when\b|\b(?:which|what) (?:year|month|day|date)\b", re.IGNORECASE
)
_TIME = re.compile(
    rf"\d|[年月日]|星期|春|夏|秋|冬|{_MONTHS}|(?:mon|tues|wednes|thurs|fri|satur|sun)day|spring|summer|autumn|winter"
    "|morning|noon|evening|night|yesterday|today|tomorrow|century|decade"
)
_DATE = re.compile(
    rf"\d+年(?:\d+月)?(?:\d+日)?|[\d一二三四五六七八九十]+月(?:[\d一二三四五六七八九十]+日)?|"
    rf"(?:{_MONTHS}),? \d+(?:,? \d{{4}})?|\b(?:in|since|until|by) (?:1\d|20)\d\d\b"
    rf"|\b(?:{_MONTHS}|spring|summer|autumn|winter|year) of \d{{4}}\b"
)
# "A hospital" is no number; "only one clerk" is.
_ARTICLE_HAN = re.compile(rf"(?<![一二三四五六七八九十百千万亿第只仅共])(?<![只仅共]有)一([{_MEASURES}])(.?)")
_COUNTED = re.compile(r"(?:多少|几)(.)")
# How many are counted in whole things, and a change by nine percent is no count; "62% of them" may say one.
_ASKS_COUNT = re.compile(
    r"多少(?:[名位个座辆台](?![数额字点称置])|人(?![口工均])|员工|职工|工人|学生)"
    r"|\bhow many\b(?! of| per ?cent| points)",
    re.IGNORECASE,
)
_ASKS_SHARE = re.compile(
    r"率|比例|比重|占|百分|份额|股[权份]|多少.*多少|\b(?:percent\w*|share|rate|points?|how much)\b", re.IGNORECASE
)
_SHARE = re.compile(
    r"(?:\d+(?:\.\d+)?|\b[a-z]+)\s*(?:%|pct|percent|per cent)(?!\s*(?:of\b|的))"
    r"|(?:[百十千万一二三四五六七八九]+分之[\d零一二三四五六七八九十百点.]+|[\d.]+\s*个百分点)(?!的)"
)
_NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fifteen hundred thousand million dozen"
    " half once twice few several none no nothing free all"
)
_TENS = r"(?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ies)"
_NUMBER = re.compile(
    rf"\d|[一二三四五六七八九十百千万亿两半]|\b(?:(?:{'|'.join(_NUMBER_WORDS.split())})(?:s|-|\b)|{_TENS}\b)"
)


def can_answer(question: str, passage: str) -> bool:
    """False where a question asks for a number or a time, and the passage has none. A date is no number, a
    change in per cent no count."""
    text = normalise(passage)
    if _ASKS_TIME.search(question):
        return _TIME.search(text) is not None
    if _ASKS_NUMBER.search(question):
        counted = _COUNTED.search(question)  # how many hospitals: then "a hospital" is a number after all
        plain = _ARTICLE_HAN.sub(lambda found: found[0] if counted and counted[1] in found.groups() else " ", text)
        if _ASKS_COUNT.search(question) and not _ASKS_SHARE.search(question):
            plain = _SHARE.sub(" ", plain)
        return _NUMBER.search(_DATE.sub(" ", plain)) is not None
    return True


def is_of_the_kind(question: str, said: str) -> bool:
    """Stricter than `can_answer`: whether what is said brings what the question asks for. A person or a place: a name
    that the question has not (see `asks_a_name_unmarked`); an amount: a number that it has not, and no date."""
    if _ASKS_NAME.search(question):
        return any(not word[0].isdigit() for word in names(said) - names(question))
    if _ASKS_AMOUNT.search(question):
        text = _DATE.sub(" ", normalise(said))
        more = Counter(_DIGITS.findall(text)) - Counter(_DIGITS.findall(normalise(question)))
        return bool(more) or _NUMBER.search(_DIGITS.sub(" ", text)) is not None
    return can_answer(question, said)


def asks_a_name_unmarked(question: str) -> bool:
    """Whether a person or a place is asked for in Chinese, which marks no names: no answer can be seen to bring one."""
    return bool(_ASKS_NAME.search(question) and _HAN_RUN.search(question))


def points_back(question: str) -> bool:
    """Whether a question has a word that stands for what was spoken of before: it may not be understood alone."""
    return _POINTS_BACK.search(question) is not None


def subject(question: str) -> frozenset[str]:
    """The words that name what a whole question asks about; none where it names nothing or asks nothing. Names are
    words with a capital letter among others without one, and in Chinese four characters or more at the beginning that
    end as names do. A number or a year is no subject."""
    if _HAN_RUN.search(question):
        named = _NAME_HAN.match(question.strip()) if _ASKING_HAN.search(question) else None
        return frozenset(terms(named[0]) if named else ())
    if not _ASKS.search(question) or not re.search(r"(?<=\s)[a-z]{3}", question):
        return frozenset()
    return frozenset(word for word in names(question) if not word[0].isdigit())


def normalise(text: str) -> str:
    """One form for what looks alike: NFKC, lower case, plain quotes and dashes."""
    text = unicodedata.normalize("NFKC", text).lower()
    return text.translate(_LOOKALIKES)


_LOOKALIKES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "−": "-", "‐": "-", "‑": "-", "…": "...", "\xad": ""})  # fmt: skip  # noqa: E501


def terms(text: str) -> list[str]:
    """The words of a text that carry meaning, in order, repeated as they are."""
    found = []
    for token in _TOKEN.findall(normalise(text)):
        if _HAN_RUN.fullmatch(token):
            found += _pairs(token)
        elif token[0].isdigit():
            found.append(token.replace(",", ""))
        else:
            for part in re.split(r"['’-]", token):
                if part not in STOP and len(part) > 1:
                    found.append(_stem(part))
    return found


def groups(question: str) -> list[tuple[str, ...]]:
    """What a question asks with, one group for each English word or number and one for each unbroken run of Chinese:
    its pairs are parts of one thing. Question words are left out, and so is what follows them in "painted in what
    colour" in Chinese, where more than a subject stands beside it."""
    general = _groups(_KIND_HAN.sub(r"\1", question))
    return general if len(general) > 1 else _groups(question)


def _groups(question: str) -> list[tuple[str, ...]]:
    found: dict[tuple[str, ...], None] = {}
    for part in re.split(rf"([{HAN}]+)", _ASKING_HAN.sub(" ", question)):
        if not _HAN_RUN.fullmatch(part):
            found.update(dict.fromkeys((word,) for word in terms(part)))
            continue
        for run in re.split(f"[{''.join(_STOP_HAN)}]", part):
            if pairs := _pairs(run):
                found[tuple(pairs)] = None
    return list(found)


def _pairs(run: str) -> list[str]:
    if len(run) == 1:
        return [] if run in _STOP_HAN else [run]
    return [a + b for a, b in pairwise(run) if a not in _STOP_HAN and b not in _STOP_HAN]


def has_han(text: str) -> bool:
    """Whether anything of a text is Chinese."""
    return _HAN_RUN.search(text) is not None


def is_han(word: str) -> bool:
    """Whether a term is Chinese."""
    return _HAN_RUN.match(word) is not None


def _stem(word: str) -> str:
    """Without a plural ending (Harman's s-stemmer)."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ss", "us", "is")) or len(word) < 4:
        return word
    return word.removesuffix("s")


def names(text: str) -> set[str]:
    """The words of a text that stand for one thing alone: numbers, and words with a capital letter that do not begin a
    sentence."""
    found = {word for word in terms(text) if word[0].isdigit()}
    for start, end in sentences(text):
        for capital in re.finditer(r"(?<![\w.])[^\W\d_a-z][\w-]*", text[start:end]):
            if capital.start() and capital.group()[0].isupper():
                found.update(terms(capital.group()))
    return found


def marked_names(question: str) -> frozenset[str]:
    """What a Chinese question marks as names: 名叫白驹的马, 《茶余杂谈》, 从老槐树茶铺到省城."""
    if not has_han(question):
        return frozenset()
    found = _MARKED_HAN.findall(_ASKING_HAN.sub(" ", question))
    return frozenset(normalise(name) for names in found for name in names if name)


def has_another_name(question: str, passage: str) -> bool:
    """Whether a passage has a Chinese name of the question with other characters in it: the freighter 货轮博辉号 for
    货轮博丰号. Chinese marks no names; these are told by what such names end with, and by the two characters before."""
    asked, said = _ASKING_HAN.sub(" ", normalise(question)), normalise(passage)
    for run in _HAN_RUN.findall(asked):
        for name in re.finditer(rf"(?=(.{{2}})(.{{1,3}})([{_NAME_ENDS}]))", run):
            before, own, end = name.groups()
            other = rf"{before}[{HAN}]{{{len(own)}}}{end}"
            if own + end not in said and not set(own) & _STOP_HAN and re.search(other, said):
                return True
    return False


def sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences, without the white space between them."""
    spans: list[tuple[int, int]] = []
    begin = 0
    for gap in _SENTENCE.finditer(text):
        if gap.end() == begin or (gap.group()[:1] not in "\n" and _ABBREVIATION.search(text[begin : gap.start()])):
            continue
        closing = len(gap.group()) - len(gap.group().lstrip('"”’)]」』）'))
        spans.append((begin, gap.start() + closing))
        begin = gap.end()
    spans.append((begin, len(text)))
    trimmed = []
    for start, end in spans:
        inner = text[start:end]
        if inner.strip():
            start += len(inner) - len(inner.lstrip())
            trimmed.append((start, start + len(inner.strip())))
    return trimmed


class Index:
    """The words of every paragraph of some documents: how rare each is, and who holds it. Paragraphs are counted over
    all documents; a paragraph also holds the words of the headings above it."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = tuple(documents)
        self.places: list[tuple[int, Paragraph]] = [
            (number, paragraph) for number, document in enumerate(documents) for paragraph in document.paragraphs
        ]
        self.words: list[frozenset[str]] = []
        self.postings: dict[str, list[int]] = {}
        self._said: dict[int, list[frozenset[str]]] = {}
        above: dict[tuple[str, ...], frozenset[str]] = {}
        for place, (_, paragraph) in enumerate(self.places):
            if paragraph.heading not in above:
                above[paragraph.heading] = frozenset(terms(" \n ".join(paragraph.heading)))
            words = frozenset(terms(paragraph.text)) | above[paragraph.heading]
            self.words.append(words)
            for word in words:
                self.postings.setdefault(word, []).append(place)

    def rarity(self, word: str) -> float:
        """ln(1 + paragraphs / those with the word); a word that stands nowhere counts as half a paragraph."""
        return math.log1p(len(self.places) / (len(self.postings.get(word, ())) or 0.5))

    def coverage(self, wanted: Iterable[str], held: frozenset[str]) -> float:
        """The share of the wanted words that are held, rare ones counting more; 1 when nothing is wanted."""
        weights = {word: self.rarity(word) for word in set(wanted)}
        total = sum(weights.values())
        return sum(weight for word, weight in weights.items() if word in held) / total if total else 1.0

    def share(self, wanted: Sequence[tuple[str, ...]], held: frozenset[str]) -> float:
        """The share of a question's groups that is held; a group counts as much as the rarest of its words."""
        total = reached = 0.0
        for group in wanted:
            weight = max(map(self.rarity, group))
            total += weight
            reached += weight * self.coverage(group, held)
        return reached / total if total else 1.0

    def told_elsewhere(
        self, wanted: Sequence[tuple[str, ...]], held: frozenset[str], *, of_the_same: bool = False
    ) -> list[tuple[str, ...]]:
        """The groups of a question of which a passage lacks words that the documents have together in another sentence,
        beside a word that the passage does hold: what they say in these words they say there. Words that stand nowhere
        may be the asker's own for something.

        of_the_same   only beside the rarest word that question and passage share: beside a commoner one they may stand
                      by chance
        """
        shared = {word for group in wanted for word in group} & held
        if of_the_same:
            rarest = max(map(self.rarity, shared), default=0.0)
            shared = {word for word in shared if self.rarity(word) >= RAREST * rarest}
        beside = {place for word in shared for place in self.postings.get(word, ())}
        found = []
        for group in wanted:
            seen = {letter for word in held.intersection(group) for letter in word}
            # A Chinese pair across two words is no word: where both its characters are held in others, nothing lacks.
            lacking = frozenset(word for word in group if word not in held and not seen.issuperset(word))
            places = beside.intersection(*(self.postings.get(word, ()) for word in lacking)) if lacking else ()
            if any(lacking <= said and said & shared for place in places for said in self.said(place)):
                found.append(group)
        return found

    def said(self, place: int) -> list[frozenset[str]]:
        """The words of each sentence of a paragraph."""
        if place not in self._said:
            text = self.places[place][1].text
            self._said[place] = [frozenset(terms(text[start:end])) for start, end in sentences(text)]
        return self._said[place]

    def around(self, place: int) -> frozenset[str]:
        """The words of a paragraph and of its neighbours in the same section: where a pronoun's name stands."""
        heading = self.places[place][1].heading, self.places[place][0]
        words = set(self.words[place])
        for step in (-1, 1):
            for near in range(place + step, place + step * (NEIGHBOURS + 1), step):
                if not 0 <= near < len(self.places) or (self.places[near][1].heading, self.places[near][0]) != heading:
                    break
                words |= self.words[near]
        return frozenset(words)

    def nearest(self, wanted: Iterable[str], count: int, *, among: Collection[int] | None = None) -> list[int]:
        """The paragraphs (no headings) that cover most of the wanted words; `among` these, where given."""
        allowed = None if among is None else frozenset(among)
        scores: dict[int, float] = {}
        for word in set(wanted):
            weight = self.rarity(word)
            for place in self.postings.get(word, ()):
                scores[place] = scores.get(place, 0.0) + weight
        text = (p for p in scores if not self.places[p][1].level and (allowed is None or p in allowed))
        return sorted(text, key=lambda place: (-scores[place], place))[:count]
