"""Haystacks: long, harmless prose to hide facts in.

`generated` writes our own prose from templates of a quiet country town; no two documents of different seeds
are alike, and nothing in it is a name of a person, a code, a price, a date or a colour, so it never answers
a question about a needle. `from_text` cuts the user's own text at the ends of its sentences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from longverse.errors import UserError

# Each template takes its words from these lists; a hundred thousand different sentences come of them.
_EN = {
    "when": "In the morning|At noon|Towards evening|After the rain|Before the market opened|On quiet days|"
    "When the wind turned|During the harvest|Long after supper|In the first frost|At low tide|"
    "Whenever the bells rang|On the way home|By the end of the week|While the bread was rising",
    "who": "the baker|the ferryman|a group of children|the schoolteacher|two old fishermen|the librarian|"
    "the gardener|a travelling musician|the postman|the people of the lower town|the miller|the beekeeper|"
    "a few students|the carpenter|the night watchman|the weaver|the clockmaker|an elderly couple",
    "did": "walked slowly along|stopped for a while beside|told long stories about|made careful drawings of|"
    "carried heavy baskets past|swept the leaves from|sat down and looked at|argued quietly about|"
    "measured once again|took the longer way around|wrote a letter about|spoke with great warmth of|"
    "repaired some of the stones of|counted the swallows above",
    "what": "the old stone bridge|the orchard behind the wall|the narrow canal|the empty market square|"
    "the meadow by the river|the ruined watchtower|the rows of willows|the little harbour|the flooded fields|"
    "the road to the hills|the reading room|the long wooden pier|the vineyard on the slope|the rope factory|"
    "the greenhouse|the steps of the theatre",
    "how": "as if nothing else in the world mattered|without saying much|and nobody thought it strange|"
    "until the light began to fade|and the afternoon passed quickly|although the path was muddy|"
    "with more patience than skill|while the dogs slept in the shade|as their parents had done before them|"
    "and then everyone went back to work|because there was no hurry|to the surprise of the visitors",
    "thing": "The weather|The river|The dust on the shelves|The smell of fresh wood|The sound of the looms|"
    "The fog over the valley|The long winter|The silence after the concert|The taste of the first apples|"
    "The work in the fields|The slow traffic of barges|The moss on the roofs",
    "effect": "made people thoughtful|never lasted very long|was remembered for years|changed from hour to hour|"
    "brought the neighbours together|kept the older people indoors|was praised in many songs|"
    "gave the whole place its character|was a frequent subject of conversation|belonged to the season|"
    "could be noticed even from the hills|seemed to grow stronger every year",
    "belief": "It is commonly said that|Most visitors agree that|The older people believe that|"
    "Nobody ever doubted that|In the local paper one could read that|A traveller once remarked that|"
    "It was generally understood that|Some of the farmers insisted that",
    "claim": "good soil needs more rest than rain|a quiet street is worth a long walk|"
    "the best stories are told in winter|patience is the larger part of every craft|"
    "a river remembers its old bed|bread tastes better when it is shared|every roof wants mending sooner or later|"
    "the shortest path is rarely the prettiest|a garden teaches more than a book|"
    "clouds from the west bring a calm night|old tools work best in old hands|a good harvest begins with good fences",
}
_EN_FORMS = (
    "{when} {who} {did} {what}, {how}.",
    "{when} {who} {did} {what}.",
    "{belief} {claim}.",
    "{thing} {effect}, {how}.",
    "{thing} {effect}.",
    "{when} {who} and {who} {did} {what}.",
    "{who} {did} {what}, and {when_low} {who} {did} {what}.",
    "{belief} {claim}, {how}.",
    "{when}, {who} {did} {what}; {thing_low} {effect}.",
)
_ZH = {
    "when": "清晨|正午时分|傍晚|雨后|集市开张之前|天气晴好的日子|起风的时候|收割的季节|晚饭过后|初霜那几天|"
    "退潮的时候|钟声响起时|回家路上|临近周末|面团发酵的那一会儿",
    "who": "面包师|摆渡人|一群孩子|学堂里的先生|几个打鱼的老人|图书管理员|花匠|走村串巷的乐手|邮差|下城的居民|"
    "养蜂人|几名学生|木匠|巡夜人|织布的妇人|修表匠|一对老夫妇",
    "did": "慢慢走过|在旁停了许久，望着|说起了许多往事，都关于|一笔一笔地描画|提着沉沉的篮子经过|扫净了落叶，又看了看|"
    "坐下来静静端详|小声争论着|又丈量了一遍|绕远路避开了|写信谈到|满怀温情地讲起|修补了几块石头，都来自|数着燕子，望着",
    "what": "那座老石桥|围墙后面的果园|狭窄的运河|空荡荡的集市|河边的草地|荒废的瞭望台|成排的垂柳|小小的码头|"
    "被水漫过的田地|通往山里的路|安静的阅览室|长长的木栈桥|坡上的葡萄园|制绳的作坊|温室|戏院的台阶",
    "how": "好像世上再没有别的要紧事|话也不多|谁也不觉得奇怪|直到天色渐渐暗下来|一个下午就这样过去了|尽管路上满是泥泞|"
    "耐心比手艺还多些|狗儿在荫凉里睡着|和他们的父辈一样|然后大家又各自忙去了|因为并不着急|让外来的客人很是惊讶",
    "thing": "天气|河水|书架上的灰尘|新木头的气味|织机的声音|山谷里的雾|漫长的冬天|音乐会之后的寂静|头一批苹果的滋味|"
    "田里的活计|慢悠悠的驳船|屋顶的青苔",
    "effect": "总让人沉思|从来不会持续太久|多年以后还有人记得|时时都在变化|把邻里聚到了一起|让上了年纪的人不愿出门|"
    "在许多歌谣里受到称赞|给整个地方添了几分性格|常常是人们闲谈的话题|属于这个季节|在山上也能察觉|似乎一年比一年更浓",
    "belief": "人们常说，|来过的客人大多同意，|老一辈人相信，|从来没有人怀疑，|本地的小报上写道，|有位旅人曾经感叹，|"
    "大家心里都明白，|有些农人坚持认为，",
    "claim": "好土地要的是休息，不只是雨水|安静的街道值得多走几步|最好的故事总在冬天讲|任何手艺，大半靠的是耐心|"
    "河流记得自己的旧河道|面包分着吃才更香|每个屋顶迟早都要修补|最短的路很少是最美的|园子教人的比书本还多|"
    "西边来的云带来平静的夜|老工具在老手里最好使|好收成从好篱笆开始",
}
_ZH_FORMS = (
    "{when}，{who}{did}{what}，{how}。",
    "{when}，{who}{did}{what}。",
    "{belief}{claim}。",
    "{thing}{effect}，{how}。",
    "{thing}{effect}。",
    "{when}，{who}和{who}{did}{what}。",
    "{who}{did}{what}，而{when}，{who}{did}{what}。",
    "{belief}{claim}，{how}。",
    "{when}，{who}{did}{what}；{thing}{effect}。",
)
_WORDS = {lang: {key: text.split("|") for key, text in table.items()} for lang, table in (("en", _EN), ("zh", _ZH))}

LANGUAGES = ("en", "zh")
# A sentence ends at . ! ? before white space (closing quotes and brackets belong to it), at the full-width
# marks anywhere, or at the end of a line.
_END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）】》]*|\n)\s*")


def generated(language: str, seed: int) -> Iterator[str]:
    """Endless prose: sentences with the white space that follows them, in paragraphs of four to seven.

    language: "en" or "zh". The same seed gives the same text; a later sentence never changes an earlier one,
    so a longer document of one seed begins with the shorter one.
    """
    if language not in LANGUAGES:
        raise UserError(f"No haystack is written in {language!r}; choose one of {', '.join(LANGUAGES)}.")
    rng = random.Random(f"haystack {language} {seed}")
    forms, words = (_EN_FORMS, _WORDS["en"]) if language == "en" else (_ZH_FORMS, _WORDS["zh"])
    seen: set[str] = set()
    while True:
        length = rng.randint(4, 7)
        for index in range(length):
            for _ in range(20):
                sentence = _compose(rng, rng.choice(forms), words, language)
                if sentence not in seen:
                    break
            seen.add(sentence)
            last = index == length - 1
            yield sentence + ("\n\n" if last else " " if language == "en" else "")


def generated_text(language: str, seed: int, characters: int) -> str:
    """At least `characters` characters of `generated` prose, ended at a sentence."""
    parts: list[str] = []
    size = 0
    for sentence in generated(language, seed):
        parts.append(sentence)
        size += len(sentence)
        if size >= characters:
            break
    return "".join(parts)


def vocabulary() -> list[str]:
    """The English words of four letters and more that the prose is made of, in alphabetical order."""
    return sorted(set(re.findall(r"[a-z]{4,}", " ".join(_EN.values()).lower())))


def _compose(rng: random.Random, form: str, words: dict[str, list[str]], language: str) -> str:
    used: dict[str, list[str]] = {}

    def word(match: re.Match[str]) -> str:
        key = match[1].removesuffix("_low")
        left = [w for w in words[key] if w not in used.get(key, ())]
        chosen = rng.choice(left)
        used.setdefault(key, []).append(chosen)
        if match[1].endswith("_low") or (language == "en" and key == "thing" and match.start() > 0):
            chosen = chosen[0].lower() + chosen[1:]
        return chosen

    sentence = re.sub(r"\{(\w+)\}", word, form)
    return sentence[0].upper() + sentence[1:]


def cut_sentences(text: str) -> list[str]:
    """Cuts a text at its sentence ends, 。！？ included; joined, the pieces are the text again."""
    pieces: list[str] = []
    start = 0
    for match in _END.finditer(text):
        if text[start : match.end()].strip():
            pieces.append(text[start : match.end()])
            start = match.end()
    if text[start:].strip():
        pieces.append(text[start:])
    return pieces


def from_text(text: str, source: str) -> Iterator[str]:
    """The user's own text as an endless haystack: read again from its beginning when it is used up.

    source: the file's name, for the error when the text holds no sentence. The first piece of a new round
    begins a paragraph.
    """
    pieces = cut_sentences(text)
    if not pieces:
        raise UserError(f"{source} holds no text to hide needles in; give a file with some sentences.")
    if not pieces[-1][-1].isspace():
        pieces[-1] += "\n\n"

    def rounds() -> Iterator[str]:
        while True:
            yield from pieces

    return rounds()


def language_of(text: str) -> str:
    """ "zh" when at least a tenth of the letters are Chinese characters, else "en"."""
    letters = [c for c in text[:20000] if c.isalpha()]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    return "zh" if letters and chinese * 10 >= len(letters) else "en"
