"""Needles: invented facts of many kinds, in English and Chinese, with questions and accepted answers.

Three sorts: plain facts (the question repeats the fact's words), facts asked by paraphrase (question and fact
share no word at all, so matching words finds nothing), and two-hop facts (two sentences far apart that only
together answer). Names and values come from seeded lists and are drawn without repetition inside a document.
"""

from __future__ import annotations

import random
import re
import unicodedata
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
        value = self.rng.randint(low, high)
        while value in self._numbers:
            value = self.rng.randint(low, high)
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


# kind: what the fact is about ("person", or a list), the sort of its value, and (fact, question) by language, with {a}
# for what it is about and {x} for the value.
_PLAIN: dict[str, tuple[str, str, dict[str, tuple[str, ...]]]] = {
    "code": ("building", "code", {
        "en": ("The code of the vault under the {a} is {x}.", "What is the code of the vault under the {a}?"),
        "zh": ("{a}地下金库的密码是{x}。", "{a}地下金库的密码是多少？"),
    }),
    "birthplace": ("person", "city", {
        "en": ("{a} was born in the city of {x}.", "In which city was {a} born?"),
        "zh": ("{a}出生在{x}。", "{a}出生在哪里？"),
    }),
    "price": ("object", "price", {
        "en": ("The price of the {a} is {x} crowns.", "What is the price of the {a}?"),
        "zh": ("{a}的价格是{x}元。", "{a}的价格是多少元？"),
    }),
    "date": ("building", "date", {
        "en": ("The {a} was opened on {x}.", "On which date was the {a} opened?"),
        "zh": ("{a}于{x}落成。", "{a}是哪年哪月哪日落成的？"),
    }),
    "colour": ("building", "colour", {
        "en": ("The front door of the {a} is painted {x}.", "What colour is the front door of the {a}?"),
        "zh": ("{a}的大门漆成了{x}。", "{a}的大门漆成了什么颜色？"),
    }),
    "profession": ("person", "job", {
        "en": ("The profession of {a} is {x}.", "What is the profession of {a}?"),
        "zh": ("{a}的职业是{x}。", "{a}的职业是什么？"),
    }),
    "password": ("club", "word", {
        "en": ("The password of the {a} is {x}.", "What is the password of the {a}?"),
        "zh": ("{a}的口令是“{x}”。", "{a}的口令是什么？"),
    }),
    "pet": ("person", "animal", {
        "en": ("{a} keeps a tame {x} at home.", "Which animal does {a} keep at home?"),
        "zh": ("{a}在家里养了一只{x}。", "{a}在家里养了什么动物？"),
    }),
}  # fmt: skip
PLAIN_KINDS = tuple(_PLAIN)

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


# kind: (names, sort of the value, and (first sentence, second, question) by language): {p} is a person, {a} what stands
# in both sentences, {x} the value.
_HOPS: dict[str, tuple[str, str, dict[str, tuple[str, ...]]]] = {
    "employer": ("firm", "city", {
        "en": ("{p} works for the {a}.", "The {a} has its head office in {x}.",
               "In which city is the head office of the firm that {p} works for?"),
        "zh": ("{p}在{a}工作。", "{a}的总部设在{x}。", "{p}工作的单位总部设在哪里？"),
    }),
    "boat": ("boat", "colour", {
        "en": ("{p} owns the boat called {a}.", "The boat called {a} is painted {x}.",
               "What colour is the boat that {p} owns?"),
        "zh": ("{p}的船叫做{a}。", "{a}漆成了{x}。", "{p}的船漆成了什么颜色？"),
    }),
    "meeting": ("team", "day", {
        "en": ("{p} is the leader of the {a}.", "The {a} meets every {x}.",
               "On which day of the week does the group led by {p} meet?"),
        "zh": ("{p}是{a}的负责人。", "{a}每逢{x}集合。", "{p}负责的那个队伍星期几集合？"),
    }),
}  # fmt: skip
HOP_KINDS = tuple(_HOPS)

KINDS = {"facts": PLAIN_KINDS, "paraphrase": PARAPHRASE_KINDS, "hop": HOP_KINDS, "several": ("number",)}


def make_fact(mode: str, kind: str, picker: Picker) -> Fact:
    """One fact of the given mode ("facts", "paraphrase", "hop") and kind, from the picker's lists."""
    if kind not in KINDS[mode]:
        raise UserError(f"No kind of fact is called {kind!r}; choose among {', '.join(KINDS[mode])}.")
    language = picker.language
    if mode == "facts":
        about, sort, texts = _PLAIN[kind]
        names = {"a": picker.person() if about == "person" else picker.pick(about)}
        *sentences, question = texts[language]
    elif mode == "hop":
        about, sort, texts = _HOPS[kind]
        names = {"p": picker.person(), "a": picker.pick(about)}
        *sentences, question = texts[language]
    else:
        _, *sentences, question, sort = next(row for row in _PARAPHRASED[language] if row[0] == kind)
        names = {}
    accepted = _value(picker, sort)
    names["x"] = accepted[0]
    return Fact(kind, tuple(one.format(**names) for one in sentences), question.format(**names), accepted)


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
