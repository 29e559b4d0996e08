"""Rules for Chinese: classical histories and dialogues, and laws article by article."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from longverse.data.long_sft.found import Found
from longverse.data.text import paragraphs, sentences, squash, squash_zh

_HAN = r"[\u4e00-\u9fff]"
_SAID = re.compile(
    rf"(?<=[，。！？；\n\u3000」”])(?P<who>{_HAN}{{2,3}})[曰道]：[「“](?P<what>[^「」“”\n]{{12,90}})[」”]"
)
# A name that contains one of these is half a clause ("对曰", "帝乃曰").
_VERBS = frozenset(
    "谓问对答荅言告语议谋呼辞报笑叹又乃因而遂其之也者皆或诏敕令使众吾余有时故可以为不无何所是进前奏请怒泣惊喜悦既已将欲谏固"
)
_COURTESY = re.compile(
    rf"(?:^|(?<=[。\n\u3000]))(?P<who>{_HAN}{{2,3}})，字(?P<zi>{_HAN}{{1,3}})，(?P<home>{_HAN}{{2,10}})人也?(?=[，。])"
)
# "休弟夤", "长子某": a relative of somebody named before, not a name. ("温子升" is one: 子 counts as a first letter.)
_KINSHIP = re.compile(r"^子|[弟兄父母妻侄妹姊]|[长次从嫡庶少中幼季]子|曾孙|玄孙")
# Before 人, and no place: an office (太子舍人, 大夫人), or words about an origin (自云, 本, 不知何许).
_NO_HOME = re.compile(
    r"^(?:[其自位仕拜迁以与是为除累世少时弟兄子母本不何]|历(?![城阳])|封(?![丘川])|任(?![城丘])|官(?!渡)|父(?!城))|[舍夫人]$"
)
_VOLUME = re.compile(
    r"^[ \u3000]*(?:\S{1,4}[‧·・])?(?P<number>卷[一二三四五六七八九十百]+[上中下]?)[ \u3000]+"
    r"(?P<title>\S[^\n，。：]{1,24})[ \u3000]*$",
    re.MULTILINE,
)


def find_chinese(text: str, title: str) -> list[Found]:
    """Everything the rules for Chinese find, by place."""
    found = (
        [*_laws(text, title)] if is_law(text) else [*_said(text), *_people(text), *_volumes(text), *_sentences(text)]
    )
    return sorted(found, key=lambda f: (f.start, f.kind))


def is_law(text: str) -> bool:
    """Whether a text goes by numbered articles, or amends (quotes) such as do."""
    return len(_ARTICLE.findall(text[:6_000])) >= 3 or len(_QUOTED_ARTICLE.findall(text[:6_000])) >= 2


def _said(text: str) -> Iterator[Found]:
    matches = list(_SAID.finditer(text))
    often = Counter(match["who"] for match in matches)
    for match in matches:
        who, what = match["who"], match["what"]
        if often[who] < 3 or _VERBS.intersection(who) or who[-1] in "传诗书易礼经志记序赞论注史歌谣雅若":
            continue
        yield Found(
            "who_said", match.start(), match.end(), f"“{what}”这句话是谁说的？", (who,), f"是{who}说的。", once=what,
        )  # fmt: skip


def _people(text: str) -> Iterator[Found]:
    for match in _COURTESY.finditer(text):
        who = match["who"]
        if _VERBS.intersection(who) or _KINSHIP.search(who):
            continue
        place = (match.start(), match.end())
        yield Found(
            "courtesy_name", *place, f"{who}的字是什么？", (match["zi"],), f"{who}字{match['zi']}。", once=f"{who}，字"
        )
        if _NO_HOME.search(match["home"]):
            continue
        yield Found(
            "birthplace",
            *place,
            f"文中介绍{who}是哪里人？",
            (match["home"],),
            f"{who}是{match['home']}人。",
            once=f"{who}，字",
        )


def _volumes(text: str) -> Iterator[Found]:
    matches = list(_VOLUME.finditer(text))
    numbers = Counter(match["number"] for match in matches)
    for match in matches:
        if numbers[match["number"]] == 1:
            heading = squash(match["title"])
            yield Found(
                "volume_title", match.start(), match.end(), f"{match['number']}的标题是什么？", (heading,),
                f"{match['number']}的标题是“{heading}”。", once=match[0].strip(),
            )  # fmt: skip


def _sentences(text: str) -> Iterator[Found]:
    turn = 0
    for start, end in paragraphs(text):
        if not 60 <= end - start <= 3_000:
            continue
        spans = sentences(text[start:end], "zh")
        if len(spans) < 3:
            continue
        turn += 1
        i = turn % (len(spans) - 1)
        (a, b), (c, d) = spans[i], spans[i + 1]
        one, two = squash_zh(text[start + a : start + b]), squash_zh(text[start + c : start + d])
        if 12 <= len(one) <= 90 and 8 <= len(two) <= 90 and _plain(one) and _plain(two):
            yield Found(
                "next_sentence", start + a, start + d, f"文中“{one}”的下一句是什么？", (two,), f"下一句是：“{two}”",
                once=text[start + a : start + b],
            )  # fmt: skip


def _plain(sentence: str) -> bool:
    return sentence[-1] in "。！？" and not re.search(r"[「」『』“”‘’（）《》【】◇○●<>#*|]", sentence)


_NUMBER = r"[零〇一二三四五六七八九十百千]+"
_ARTICLE = re.compile(rf"^[ \u3000]*(第{_NUMBER}条)[ \u3000]+(?=\S)", re.MULTILINE)
_QUOTED_ARTICLE = re.compile(rf"[“「]?第{_NUMBER}条")
_STOP = re.compile(rf"^(?:#|[ \u3000]*第{_NUMBER}[章节编条])", re.MULTILINE)
_EFFECT = re.compile(
    r"(?:本|该)(?:条例|办法|规定|决定|细则|法|规则|通知)自(?P<day>\d{4}年\d{1,2}月\d{1,2}日)起(?:施行|实施|执行|生效)"
)
_DEFINED = re.compile(
    r"本(?:条例|办法|规定|法|细则)所称的?(?P<term>[^，。、；：是\n“”]{2,20})[，,]是指(?P<what>[^。；：\n]{8,150})[。]"
)
_PASSED = re.compile(
    r"^(?P<day>\d{4}年\d{1,2}月\d{1,2}日)[ \u3000]+(?P<who>[^\n。，]{6,60}会议)通过[ \u3000]*$", re.MULTILINE
)
_DATE_IN_TITLE = re.compile(r"[(（]\d{4}-\d{2}-\d{2}[)）]$")


def law_title(title: str) -> str:
    """A law's name without the date of the version."""
    return _DATE_IN_TITLE.sub("", title).strip()


def book(title: str) -> str:
    """A title between its marks: 《 》, and 〈 〉 for a title within it."""
    return f"《{title.replace('《', '〈').replace('》', '〉')}》"


def articles(text: str) -> list[tuple[str, int, int]]:
    """(number as written, start of the line, end of the article's text), in order."""
    out = []
    for match in _ARTICLE.finditer(text):
        stop = _STOP.search(text, match.end())
        end = stop.start() if stop else len(text)
        start = match.start() + len(match[0]) - len(match[0].lstrip(" \u3000\n"))
        body = text[start:end].rstrip()
        while (line := body.rfind("\n")) > 0 and body[-1] not in "。；：！？”」）)":  # the heading of what follows
            body = body[:line].rstrip()
        out.append((match[1], start, start + len(body)))
    return out


def _laws(text: str, title: str) -> Iterator[Found]:
    name = law_title(title)
    all_articles = articles(text)
    numbers = Counter(number for number, _, _ in all_articles)
    folded = squash_zh(text)
    for turn, (number, start, end) in enumerate(all_articles):
        body = squash_zh(text[start + len(number) : end])
        if numbers[number] != 1 or not 20 <= len(body) <= 260 or body[-1] != "。":
            continue
        if turn % 2:
            yield Found(
                "article_text", start, end, f"{book(name)}{number}是怎样规定的？", (body,), f"{number}规定：{body}",
                title=name,
            )  # fmt: skip
        else:
            whole = len(body) <= 70
            piece = body if whole else body[: body.find("，", 40) + 1 or 60].rstrip("，")
            if folded.count(piece) != 1:  # another article says the same
                continue
            piece += "" if whole else "……"
            yield Found(
                "article_number", start, end, f"在{book(name)}中，“{piece}”是第几条的内容？", (number,),
                f"这是{number}的内容。", title=name,
            )  # fmt: skip
    effects = list(_EFFECT.finditer(text))
    if len(effects) == 1:
        match = effects[0]
        yield Found(
            "effective_date", match.start(), match.end(), f"{book(name)}自何时起施行？", (match["day"],),
            f"自{match['day']}起施行。", title=name,
        )  # fmt: skip
    defined = list(_DEFINED.finditer(text))
    for match in defined:
        if sum(other["term"] == match["term"] for other in defined) == 1:
            yield Found(
                "definition", match.start(), match.end(), f"{book(name)}所称的“{match['term']}”是指什么？",
                (match["what"],),
                f"“{match['term']}”是指{match['what']}。", title=name,
            )  # fmt: skip
    passed = list(_PASSED.finditer(text[:3_000]))
    if len(passed) == 1:
        match = passed[0]
        yield Found(
            "passed_by", match.start(), match.end(), f"{book(name)}是由哪次会议通过的？", (match["who"],),
            f"由{match['who']}通过。", title=name,
        )  # fmt: skip
    if all_articles and _in_order([number for number, _, _ in all_articles]):
        number, start, end = all_articles[-1]
        count = number[1:-1]
        yield Found(
            "article_count", start, end, f"{book(name)}一共有多少条？", (f"{count}条",), f"一共有{count}条。",
            title=name, whole=True,
        )  # fmt: skip


_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0}


def chinese_number(text: str) -> int:
    """The value of a number below ten thousand written in Chinese; 0 when it is none."""
    total = digit = 0
    for char in text:
        if char in _DIGITS:
            digit = _DIGITS[char]
        elif char in "十百千":
            total += (digit or 1) * {"十": 10, "百": 100, "千": 1000}[char]
            digit = 0
        else:
            return 0
    return total + digit


def _in_order(numbers: list[str]) -> bool:
    return [chinese_number(number[1:-1]) for number in numbers] == list(range(1, len(numbers) + 1))
