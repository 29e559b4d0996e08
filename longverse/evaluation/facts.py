"""Needles: invented facts of many kinds, in English and Chinese, with questions and accepted answers.

Three sorts: plain facts (the question repeats the fact's words), facts asked by paraphrase (question and fact
share no word at all, so matching words finds nothing), and two-hop facts (two sentences far apart that only
together answer). Names and values come from seeded lists and are drawn without repetition inside a document.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from longverse.errors import UserError


@dataclass(frozen=True)
class Fact:
    """kind: name of the kind; sentences: one, or two for a two-hop fact; accepted: spellings of the answer."""

    kind: str
    sentences: tuple[str, ...]
    question: str
    accepted: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.accepted[0]


_EN = {
    "first": "Mirela Torben Ysolde Casimir Annike Leopold Renske Oswin Fenja Balthasar Ilka Corvin Jorunn Emeric "
    "Saskia Thaddeus Viveka Ruben Orsolya Matthis",
    "last": "Halloran Vestergaard Quillfeather Okonjo Brandvold Castellane Drummel Ferrant Grieve Hjalmarsson "
    "Ivarsen Kestrel Lindqvist Mortimer Nakashima Oyelaran Pemberton Rasmussen Szabo Tarrant",
    "city": "Lisbon Bergen Salzburg Havana Krakow Nairobi Toulouse Antwerp Montreal Valparaiso Tbilisi Odense Palermo "
    "Seville Gdansk Osaka Helsinki Quebec Dresden Ljubljana",
    "building": "lighthouse|town hall|old mill|grain store|post office|opera house|customs house|observatory|"
    "bathhouse|printing house|railway station|brewery|armoury|hospital|glassworks|museum",
    "object": "brass telescope|walnut desk|silk umbrella|leather saddle|silver flute|marble chessboard|oak wardrobe|"
    "copper kettle|velvet armchair|wooden globe|crystal lamp|iron stove|ivory fan|porcelain vase|bronze clock",
    "colour": "purple|orange|turquoise|crimson|yellow|violet|scarlet|indigo|magenta|emerald|golden|silver",
    "job": "glassblower|locksmith|translator|dentist|architect|botanist|surgeon|violinist|astronomer|blacksmith|"
    "cartographer|notary|geologist|pharmacist",
    "animal": "heron|badger|falcon|hedgehog|tortoise|parrot|lynx|otter|peacock|raccoon|ferret|raven",
    "word": "marzipan lantern thistle cobalt sycamore harpoon cinnamon bellows saffron gondola juniper obelisk",
    "club": "chess club|rowing club|sewing circle|mountain guild|choir|fencing school|sailing society|archery club|"
    "photography circle|book guild",
    "food": "pancakes|oysters|cherries|pretzels|dumplings|walnuts|pickles|raspberries|chestnuts|omelettes",
    "month": "January February March April May June July August September October November December",
    "boat": "Albatross|Wanderer|Morning Star|Swift|Seahorse|Polar Fox|Patience|Kingfisher|Aurora|Windflower",
    "firm": "Halden Trading Company|Brightwater Press|Osprey Shipping Line|Kestrel Insurance Office|"
    "Alder Lane Laboratory|Larkspur Textile Works|Greyfriars Bank|Tamarind Spice House|Northgate Foundry",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "team": "repair crew|survey team|rescue brigade|harvest committee|theatre troupe|translation group|night shift",
}
_ZH = {
    "first": "思远 若兰 启明 慕白 雨桐 承泽 静姝 子衿 浩然 清扬 怀瑾 知秋 云帆 嘉禾 映雪 致远",
    "last": "欧阳 司徒 上官 诸葛 慕容 东方 夏侯 皇甫 尉迟 公孙 令狐 宇文",
    "city": "洛阳 大理 泉州 敦煌 丽江 扬州 桂林 绍兴 嘉兴 曲阜 开封 承德 景德镇 都江堰 喀什",
    "building": "灯塔|粮仓|邮局|剧场|天文台|印刷厂|火车站|酒坊|医院|博物馆|玻璃厂|海关",
    "object": "黄铜望远镜|胡桃木书桌|丝绸雨伞|牛皮马鞍|银笛|大理石棋盘|橡木衣柜|天鹅绒椅|水晶灯|铁炉|瓷瓶|地球仪",
    "colour": "紫色|橙色|青色|朱红色|黄色|靛蓝色|墨绿色|银色|金色|粉色",
    "job": "锁匠|翻译|牙医|建筑师|植物学家|外科医生|小提琴手|天文学家|铁匠|制图师|公证人|药剂师",
    "animal": "苍鹭|獾|猎鹰|刺猬|乌龟|鹦鹉|猞猁|水獭|孔雀|浣熊|雪貂|乌鸦",
    "word": "灯笼 蓟花 钴蓝 梧桐 鱼叉 肉桂 风箱 藏红花 贡多拉 杜松 方尖碑",
    "club": "象棋社|划船队|缝纫组|登山会|合唱团|击剑馆|帆船会|射箭队|摄影社|读书会",
    "food": "煎饼|牡蛎|樱桃|饺子|核桃|泡菜|栗子|汤圆|麻花|桂花糕",
    "boat": "信天翁号|漫游者号|晨星号|雨燕号|海马号|北极狐号|翠鸟号|极光号",
    "firm": "海通商行|清江书局|远帆航运公司|安泰保险社|赤杨实验室|云锦纺织厂|永丰钱庄|香料行|北门铸造厂",
    "day": "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
    "team": "维修队|勘测队|救援队|秋收委员会|剧团|翻译组|夜班组",
}


def _lists(table: dict[str, str]) -> dict[str, list[str]]:
    return {key: text.split("|") if "|" in text else text.split() for key, text in table.items()}


_LISTS = {"en": _lists(_EN), "zh": _lists(_ZH)}


class Picker:
    """Draws names and values from a language's lists, none twice while the list lasts."""

    def __init__(self, language: str, seed: object) -> None:
        self.language = language
        self.rng = random.Random(f"facts {language} {seed}")
        self._left: dict[str, list[str]] = {}
        self._numbers: set[int] = set()

    def pick(self, name: str) -> str:
        left = self._left.get(name)
        if not left:
            left = self._left[name] = self.rng.sample(_LISTS[self.language][name], len(_LISTS[self.language][name]))
        return left.pop()

    def person(self) -> str:
        if self.language == "zh":
            return self.pick("last") + self.pick("first")
        return f"{self.pick('first')} {self.pick('last')}"

    def number(self, low: int, high: int) -> str:
        while (value := self.rng.randint(low, high)) in self._numbers:
            pass
        self._numbers.add(value)
        return str(value)

    def date(self) -> tuple[str, ...]:
        day, month, year = self.rng.randint(1, 28), self.rng.randint(1, 12), self.rng.randint(1822, 1988)
        if self.language == "zh":
            return (f"{year}年{month}月{day}日",)
        name = _LISTS["en"]["month"][month - 1]
        return (f"{day} {name} {year}", f"{name} {day}, {year}", f"{name} {day} {year}", f"{day} of {name} {year}")


def _chinese_colour(colour: str) -> tuple[str, ...]:
    # 靛蓝 is as good as 靛蓝色, but a lone 黄 or 青 stands in many other words.
    bare = colour.removesuffix("色")
    return (colour, bare) if len(bare) > 1 else (colour,)


Maker = Callable[[Picker], Fact]


def _plain(kind: str, language: str) -> Maker:
    def make(p: Picker) -> Fact:
        en = language == "en"
        if kind == "code":
            place, value = p.pick("building"), p.number(1000, 9999)
            if en:
                return Fact(
                    kind,
                    (f"The code of the vault under the {place} is {value}.",),
                    f"What is the code of the vault under the {place}?",
                    (value,),
                )
            return Fact(kind, (f"{place}地下金库的密码是{value}。",), f"{place}地下金库的密码是多少？", (value,))
        if kind == "birthplace":
            name, city = p.person(), p.pick("city")
            if en:
                return Fact(
                    kind, (f"{name} was born in the city of {city}.",), f"In which city was {name} born?", (city,)
                )
            return Fact(kind, (f"{name}出生在{city}。",), f"{name}出生在哪里？", (city,))
        if kind == "price":
            thing, value = p.pick("object"), p.number(101, 989)
            if en:
                return Fact(
                    kind,
                    (f"The price of the {thing} is {value} crowns.",),
                    f"What is the price of the {thing}?",
                    (value,),
                )
            return Fact(kind, (f"{thing}的价格是{value}元。",), f"{thing}的价格是多少元？", (value,))
        if kind == "date":
            place, dates = p.pick("building"), p.date()
            if en:
                return Fact(
                    kind, (f"The {place} was opened on {dates[0]}.",), f"On which date was the {place} opened?", dates
                )
            return Fact(kind, (f"{place}于{dates[0]}落成。",), f"{place}是哪年哪月哪日落成的？", dates)
        if kind == "colour":
            place, colour = p.pick("building"), p.pick("colour")
            if en:
                return Fact(
                    kind,
                    (f"The front door of the {place} is painted {colour}.",),
                    f"What colour is the front door of the {place}?",
                    (colour,),
                )
            accepted = _chinese_colour(colour)
            return Fact(kind, (f"{place}的大门漆成了{colour}。",), f"{place}的大门漆成了什么颜色？", accepted)
        if kind == "profession":
            name, job = p.person(), p.pick("job")
            if en:
                return Fact(
                    kind, (f"The profession of {name} is {job}.",), f"What is the profession of {name}?", (job,)
                )
            return Fact(kind, (f"{name}的职业是{job}。",), f"{name}的职业是什么？", (job,))
        if kind == "password":
            club, word = p.pick("club"), p.pick("word")
            if en:
                return Fact(
                    kind, (f"The password of the {club} is {word}.",), f"What is the password of the {club}?", (word,)
                )
            return Fact(kind, (f"{club}的口令是“{word}”。",), f"{club}的口令是什么？", (word,))
        name, animal = p.person(), p.pick("animal")
        if en:
            return Fact(
                kind, (f"{name} keeps a tame {animal} at home.",), f"Which animal does {name} keep at home?", (animal,)
            )
        return Fact(kind, (f"{name}在家里养了一只{animal}。",), f"{name}在家里养了什么动物？", (animal,))

    return make


PLAIN_KINDS = ("code", "birthplace", "price", "date", "colour", "profession", "password", "pet")

# (kind, fact, question): the question shares no word with the fact. {x} is the value.
_PARAPHRASED = {
    "en": (
        ("safe", "The strongroom opens with the digits {x}.", "What number unlocks our safe?", "code"),
        ("origin", "Old Doctor Verhoeven came into the world in {x}.", "Where was that physician born?", "city"),
        ("cost", "You pay {x} crowns for the copper kettle.", "How much does a metal teapot cost?", "price"),
        ("wreck", "The ferry sank on {x}.", "At which date did that ship go down?", "date"),
        ("hue", "Somebody painted the chapel door {x}.", "What colour has a church entrance been given?", "colour"),
        ("dish", "The magistrate adores {x}.", "What food does our judge love most?", "food"),
        (
            "guard",
            "A tame {x} guards the mill at night.",
            "Which animal watches over our flour house after dark?",
            "animal",
        ),
        ("home", "The young painter lives next to the {x}.", "Beside what does that artist dwell?", "building"),
    ),
    "zh": (
        ("safe", "地库的密码是{x}。", "打开保险箱要输入哪几个数字？", "code"),
        ("origin", "老大夫柳先生的故乡是{x}。", "那位医者在哪里出世？", "city"),
        ("cost", "这面铜锣卖{x}元。", "买那件打击乐器要花多少钱？", "price"),
        ("wreck", "渡船沉没于{x}。", "客轮是哪一天遇难的？", "date"),
        ("hue", "教堂大门刷成了{x}。", "信徒做礼拜的地方，入口涂的是哪种颜料？", "colour"),
        ("dish", "法官最爱吃{x}。", "审案的人喜欢哪种点心？", "food"),
        ("guard", "磨坊夜里由一只{x}看守。", "天黑后，哪种动物保护做面粉的地方？", "animal"),
        ("home", "年轻画家住在{x}旁边。", "那位搞美术的小伙子，居所靠近什么？", "building"),
    ),
}
PARAPHRASE_KINDS = tuple(kind for kind, *_ in _PARAPHRASED["en"])
HOP_KINDS = ("employer", "boat", "meeting")


def _value(p: Picker, sort: str) -> tuple[str, ...]:
    if sort == "code":
        return (p.number(1000, 9999),)
    if sort == "price":
        return (p.number(101, 989),)
    if sort == "date":
        return p.date()
    value = p.pick(sort)
    if p.language == "zh" and sort == "colour":
        return _chinese_colour(value)
    return (value,)


def _paraphrased(kind: str, language: str) -> Maker:
    def make(p: Picker) -> Fact:
        _, fact, question, sort = next(row for row in _PARAPHRASED[language] if row[0] == kind)
        accepted = _value(p, sort)
        return Fact(kind, (fact.replace("{x}", accepted[0]),), question, accepted)

    return make


def _two_hop(kind: str, language: str) -> Maker:
    def make(p: Picker) -> Fact:
        name, en = p.person(), language == "en"
        if kind == "employer":
            firm, city = p.pick("firm"), p.pick("city")
            if en:
                first, second = f"{name} works for the {firm}.", f"The {firm} has its head office in {city}."
                question = f"In which city is the head office of the firm that {name} works for?"
            else:
                first, second = f"{name}在{firm}工作。", f"{firm}的总部设在{city}。"
                question = f"{name}工作的单位总部设在哪里？"
            return Fact(kind, (first, second), question, (city,))
        if kind == "boat":
            boat, accepted = p.pick("boat"), _value(p, "colour")
            if en:
                first, second = (
                    f"{name} owns the boat called {boat}.",
                    f"The boat called {boat} is painted {accepted[0]}.",
                )
                question = f"What colour is the boat that {name} owns?"
            else:
                first, second = f"{name}的船叫做{boat}。", f"{boat}漆成了{accepted[0]}。"
                question = f"{name}的船漆成了什么颜色？"
            return Fact(kind, (first, second), question, accepted)
        team, day = p.pick("team"), p.pick("day")
        if en:
            first, second = f"{name} is the leader of the {team}.", f"The {team} meets every {day}."
            question = f"On which day of the week does the group led by {name} meet?"
        else:
            first, second = f"{name}是{team}的负责人。", f"{team}每逢{day}集合。"
            question = f"{name}负责的那个队伍星期几集合？"
        return Fact(kind, (first, second), question, (day,))

    return make


KINDS = {"facts": PLAIN_KINDS, "paraphrase": PARAPHRASE_KINDS, "hop": HOP_KINDS, "several": ("number",)}


def make_fact(mode: str, kind: str, picker: Picker) -> Fact:
    """One fact of the given mode ("facts", "paraphrase", "hop") and kind, from the picker's lists."""
    if kind not in KINDS[mode]:
        raise UserError(f"No kind of fact is called {kind!r}; choose among {', '.join(KINDS[mode])}.")
    makers = {"facts": _plain, "paraphrase": _paraphrased, "hop": _two_hop}
    return makers[mode](kind, picker.language)(picker)


def several_facts(picker: Picker, count: int) -> tuple[list[Fact], str]:
    """`count` facts of one kind and the one question that asks for all of them."""
    club = picker.pick("club")
    values = [picker.number(10000, 99999) for _ in range(count)]
    if picker.language == "zh":
        question = f"文中提到{club}的幸运数字共有{count}个，请全部列出。"
        texts = [f"{club}的幸运数字之一是{value}。" for value in values]
    else:
        question = f"The text gives {count} lucky numbers of the {club}. List all of them."
        texts = [f"One of the lucky numbers of the {club} is {value}." for value in values]
    return [Fact("number", (text,), question, (v,)) for text, v in zip(texts, values, strict=True)], question


def normalise(text: str) -> str:
    """Case, width (NFKC), white space and separators inside numbers folded away."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text)


def contains(answer: str, accepted: tuple[str, ...]) -> bool:
    """True when the answer holds an accepted value as a whole: 48 is not found in 1482, nor "art" in "party".

    Chinese has no spaces between words, so there only digits need a border.
    """
    folded = normalise(answer)
    for value in accepted:
        value = normalise(value)
        before = r"(?<![0-9a-z])" if re.match(r"[0-9a-z]", value) else ""
        after = r"(?![0-9a-z])" if re.search(r"[0-9a-z]$", value) else ""
        if re.search(before + re.escape(value) + after, folded):
            return True
    return False
